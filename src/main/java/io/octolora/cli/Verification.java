// SPDX-License-Identifier: Apache-2.0
package io.octolora.cli;

import io.octolora.checkpoint.BaseLinear;
import io.octolora.checkpoint.ElementType;
import io.octolora.checkpoint.Quantization;
import io.octolora.mapping.Factor;
import io.octolora.mapping.LoraDelta;
import io.octolora.oracle.Expectation;
import io.octolora.oracle.Expectation.Deviation;
import io.octolora.oracle.FloatFormat;
import io.octolora.oracle.Oracle;
import io.octolora.oracle.Oracle.Arithmetic;
import io.octolora.oracle.OracleAdapter;
import io.octolora.oracle.OracleLinear;
import io.octolora.oracle.PeftReference;
import io.octolora.runtime.DataType;
import io.octolora.runtime.Device;
import io.octolora.runtime.DeviceMemory;
import io.octolora.runtime.Int8Linear;
import io.octolora.runtime.Stream;
import java.util.List;
import org.jetbrains.annotations.Nullable;

/** One layer run on a device and judged by the oracle and, where there is one, a recorded output of the real tools. */
public final class Verification {
  private Verification() {}

  /** An adapter's part of a layer and the weight that the user gives it. */
  public record Weighted(LoraDelta delta, float weight) {}

  /**
   * A recorded output of the layer for the same x.
   *
   * @param y {@code [rows,n]}
   * @param factorFormats type of A and B while the tools ran, one an adapter
   */
  public record Recorded(PeftReference.BaseTool tool, float[] y, List<FloatFormat> factorFormats) {}

  /**
   * What came out.
   *
   * @param ranks of the adapters
   * @param oracle distance from the oracle, in units of the bound derived in {@link Oracle}
   * @param recorded distance from the recorded output, in units of that bound plus the one of {@link PeftReference}
   *     plus the distance between the two formulas (operands that the tools round before they multiply); null without
   */
  public record Result(String module, int n, int k, int rows, List<Integer> ranks, Deviation oracle,
      @Nullable Deviation recorded) {
    public boolean withinBounds() {
      return oracle.withinBound() && (recorded == null || recorded.withinBound());
    }
  }

  /**
   * @param how treatment of x, which may differ from the checkpoint's
   * @param x {@code [rows,k]}, values of {@code xFormat}
   */
  public static Result check(Device device, BaseLinear base, Quantization how, List<Weighted> adapters, float[] x,
      int rows, FloatFormat xFormat, FloatFormat yFormat, @Nullable Recorded recorded) {
    return judge(arithmetic(device), base, how, adapters, x, rows, xFormat, yFormat, recorded,
        forward(device, base, how, adapters, x, rows, xFormat, yFormat));
  }

  /** Judges {@code y[rows,n]}, wherever it comes from. */
  public static Result judge(Arithmetic arithmetic, BaseLinear base, Quantization how, List<Weighted> adapters,
      float[] x, int rows, FloatFormat xFormat, FloatFormat yFormat, @Nullable Recorded recorded, float[] y) {
    OracleLinear linear = OracleLinear.of(base, how);
    List<OracleAdapter> plain = adapters.stream().map(Verification::plain).toList();
    Expectation oracle = Oracle.evaluate(linear, plain, x, rows, xFormat, yFormat, arithmetic);
    Deviation fromRecorded = null;
    if (recorded != null) {
      Expectation tool = PeftReference.evaluate(recorded.tool(), linear, plain, recorded.factorFormats(), x, rows,
          xFormat);
      fromRecorded = oracle.against(tool).compare(y, recorded.y());
    }
    return new Result(base.name(), base.n(), base.k(), rows, adapters.stream().map(a -> a.delta().rank()).toList(),
        oracle.compare(y), fromRecorded);
  }

  /** What the bound has to allow for on this device. */
  public static Arithmetic arithmetic(Device device) {
    return device.info().isCuda() ? Arithmetic.TENSOR_CORES : Arithmetic.FP32;
  }

  /** {@code y[rows,n]} as the device computes it. */
  public static float[] forward(Device device, BaseLinear base, Quantization how, List<Weighted> adapters, float[] x,
      int rows, FloatFormat xFormat, FloatFormat yFormat) {
    byte[] xBytes = Activations.pack(x, xFormat);
    int yWidth = yFormat == FloatFormat.FLOAT32 ? 4 : 2;
    byte[] yBytes = new byte[Math.multiplyExact(Math.multiplyExact(rows, base.n()), yWidth)];
    DataType xType = type(xFormat);
    try (Int8Linear linear = device.load(base, how); Stream stream = device.createStream()) {
      for (Weighted adapter : adapters) {
        linear.attach(adapter.delta(), adapter.weight());
      }
      long workspaceBytes = linear.workspaceBytes(rows, xType);
      try (DeviceMemory xMemory = device.allocate(xBytes.length);
          DeviceMemory yMemory = device.allocate(yBytes.length);
          DeviceMemory workspace = device.allocate(workspaceBytes)) {
        xMemory.copyFrom(xBytes, stream);
        linear.forward(xMemory.address(), xType, yMemory.address(), type(yFormat), rows, workspace.address(),
            workspaceBytes, stream.address());
        yMemory.copyTo(yBytes, stream);
      }
    }
    return Activations.unpack(yBytes, yFormat);
  }

  /** Copies the factors out of their file. */
  public static OracleAdapter plain(Weighted adapter) {
    LoraDelta delta = adapter.delta();
    Factor bias = delta.bias();
    Factor magnitude = delta.magnitude();
    return new OracleAdapter(delta.rank(), delta.a().toFloats(), format(delta.a().type()), delta.b().toFloats(),
        format(delta.b().type()), bias == null ? null : bias.toFloats(),
        magnitude == null ? null : magnitude.toFloats(), delta.scale() * adapter.weight());
  }

  private static FloatFormat format(ElementType type) {
    return switch (type) {
      case F32 -> FloatFormat.FLOAT32;
      case F16 -> FloatFormat.FLOAT16;
      case BF16 -> FloatFormat.BFLOAT16;
      default -> throw new IllegalArgumentException("adapter factor of type " + type);
    };
  }

  private static DataType type(FloatFormat format) {
    return switch (format) {
      case FLOAT32 -> DataType.FLOAT32;
      case FLOAT16 -> DataType.FLOAT16;
      case BFLOAT16 -> DataType.BFLOAT16;
    };
  }
}
