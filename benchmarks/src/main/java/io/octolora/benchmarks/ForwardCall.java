// SPDX-License-Identifier: Apache-2.0
package io.octolora.benchmarks;

import io.octolora.checkpoint.Quantization;
import io.octolora.runtime.DataType;
import io.octolora.runtime.Device;
import io.octolora.runtime.DeviceMemory;
import io.octolora.runtime.Int8Linear;
import io.octolora.runtime.LoraPrecision;
import java.nio.ByteBuffer;
import java.util.Arrays;
import java.util.Random;
import java.util.concurrent.TimeUnit;
import org.openjdk.jmh.annotations.Benchmark;
import org.openjdk.jmh.annotations.BenchmarkMode;
import org.openjdk.jmh.annotations.Fork;
import org.openjdk.jmh.annotations.Measurement;
import org.openjdk.jmh.annotations.Mode;
import org.openjdk.jmh.annotations.OutputTimeUnit;
import org.openjdk.jmh.annotations.Scope;
import org.openjdk.jmh.annotations.Setup;
import org.openjdk.jmh.annotations.State;
import org.openjdk.jmh.annotations.TearDown;
import org.openjdk.jmh.annotations.Warmup;

/**
 * What a forward through Java costs beside the C call it makes, on the CPU with one thread, M = 1, N = K = 32.
 *
 * <p>{@code noRows} goes all the way through Java and JNI, with a layer and its adapters held, into the C function,
 * which checks its arguments and returns: an upper bound of the time above the C call. The others are whole calls on
 * data in the first-level cache. {@code -prof gc} shows the bytes allocated a call: the profiler's own, spread over the
 * calls, are some thousandths of a byte.
 */
@State(Scope.Benchmark)
@BenchmarkMode(Mode.AverageTime)
@OutputTimeUnit(TimeUnit.NANOSECONDS)
@Fork(value = 3, jvmArgsAppend = "--enable-native-access=ALL-UNNAMED")
@Warmup(iterations = 3, time = 1)
@Measurement(iterations = 5, time = 1)
public class ForwardCall {
  private static final int N = 32;
  private static final int K = 32;
  private static final int RANK = 4;

  private Device device;
  private Int8Linear linear;
  private Int8Linear adapted;
  private DeviceMemory x;
  private DeviceMemory y;
  private DeviceMemory workspace;
  private long xAddress;
  private long yAddress;
  private long scratch;
  private long scratchBytes;

  @Setup
  public void open() {
    Random random = new Random(1);
    byte[] weight = new byte[N * K];
    random.nextBytes(weight);
    float[] scale = new float[N];
    Arrays.fill(scale, 0.01f);
    Quantization dynamic = new Quantization(Quantization.Mode.W8A8_DYNAMIC, false, 0, 127, 0);
    device = Device.cpu();
    device.setThreads(1);
    linear = device.load("base", N, K, dynamic, ByteBuffer.wrap(weight), scale, null);
    adapted = device.load("adapted", N, K, dynamic, ByteBuffer.wrap(weight), scale, null);
    adapted.attach(RANK, normal(random, RANK * K), normal(random, N * RANK), 0.5f, LoraPrecision.BITS_16);
    x = device.allocate(4 * K);
    y = device.allocate(4 * N);
    workspace = device.allocate(Math.max(linear.workspaceBytes(1, DataType.FLOAT32),
        adapted.workspaceBytes(1, DataType.FLOAT32)));
    x.copyFrom(normal(random, K), null);
    y.copyFrom(new float[N], null);
    xAddress = x.address();
    yAddress = y.address();
    scratch = workspace.address();
    scratchBytes = workspace.bytes();
  }

  private static float[] normal(Random random, int count) {
    float[] values = new float[count];
    for (int i = 0; i < count; i++) {
      values[i] = (float) random.nextGaussian();
    }
    return values;
  }

  @Benchmark
  public void noRows() {
    adapted.forward(xAddress, DataType.FLOAT32, yAddress, DataType.FLOAT32, 0, scratch, scratchBytes, 0);
  }

  @Benchmark
  public void oneRow() {
    linear.forward(xAddress, DataType.FLOAT32, yAddress, DataType.FLOAT32, 1, scratch, scratchBytes, 0);
  }

  @Benchmark
  public void oneRowWithAdapter() {
    adapted.forward(xAddress, DataType.FLOAT32, yAddress, DataType.FLOAT32, 1, scratch, scratchBytes, 0);
  }

  /** The same through the objects that check sizes and lifetimes. */
  @Benchmark
  public void oneRowOfDeviceMemory() {
    linear.forward(x, DataType.FLOAT32, y, DataType.FLOAT32, 1, workspace, null);
  }

  /** y is one of the two products, or was never written, by noRows alone. */
  @TearDown
  public void check() {
    float[] result = new float[N];
    y.copyTo(result, null);
    float[] input = new float[K];
    x.copyTo(input, null);
    boolean zeros = Arrays.equals(result, new float[N]);
    boolean plain = Arrays.equals(result, linear.forward(input, 1));
    if (!zeros && !plain && !Arrays.equals(result, adapted.forward(input, 1))) {
      throw new AssertionError("y is neither of the two products: " + Arrays.toString(result));
    }
    for (AutoCloseable one : new AutoCloseable[] {x, y, workspace, linear, adapted, device}) {
      try {
        one.close();
      } catch (Exception e) {
        throw new AssertionError(e);
      }
    }
  }
}
