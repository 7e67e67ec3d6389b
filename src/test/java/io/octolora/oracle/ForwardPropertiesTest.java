// SPDX-License-Identifier: Apache-2.0
package io.octolora.oracle;

import static org.junit.jupiter.api.Assertions.assertArrayEquals;
import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertTrue;

import io.octolora.checkpoint.Quantization;
import io.octolora.checkpoint.Quantization.Mode;
import io.octolora.cli.Activations;
import io.octolora.cli.Verification;
import io.octolora.oracle.Expectation.Deviation;
import io.octolora.runtime.DataType;
import io.octolora.runtime.Device;
import io.octolora.runtime.DeviceMemory;
import io.octolora.runtime.Int8Linear;
import io.octolora.runtime.LoraPrecision;
import java.nio.ByteBuffer;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.Collections;
import java.util.List;
import java.util.Random;
import net.jqwik.api.Arbitraries;
import net.jqwik.api.Arbitrary;
import net.jqwik.api.Combinators;
import net.jqwik.api.ForAll;
import net.jqwik.api.Property;
import net.jqwik.api.Provide;
import net.jqwik.api.lifecycle.AfterContainer;
import net.jqwik.api.lifecycle.BeforeContainer;

/** Layers of any shape, mode and type on the best device here, against the oracle and against themselves. */
class ForwardPropertiesTest {
  private static Device device;

  @BeforeContainer
  static void openDevice() {
    device = Device.best();
  }

  @AfterContainer
  static void closeDevice() {
    device.close();
  }

  /** The random numbers follow from the seed, which jqwik prints with the shape when a property fails. */
  record Shape(long seed, int rows, int n, int k, List<Integer> ranks, Mode mode, float threshold, boolean roundX,
      boolean perTensor, boolean bias, FloatFormat xFormat, FloatFormat yFormat, FloatFormat factors) {}

  @Provide
  Arbitrary<Shape> shapes() {
    Arbitrary<int[]> mnk = Combinators.combine(Arbitraries.integers().between(1, 40),
        Arbitraries.integers().between(1, 90), Arbitraries.integers().between(1, 400)).as((m, n, k) ->
            new int[] {m, n, k});
    Arbitrary<FloatFormat> formats = Arbitraries.of(FloatFormat.class);
    return Combinators.combine(Arbitraries.longs(), mnk,
        Arbitraries.integers().between(1, 40).list().ofMaxSize(3), Arbitraries.of(Mode.class),
        Arbitraries.of(0f, 3f, 6f), Arbitraries.integers().between(0, 7), Combinators.combine(formats, formats, formats)
            .as((x, y, factors) -> new FloatFormat[] {x, y, factors})).as((seed, size, ranks, mode, threshold, flags,
            types) -> new Shape(seed, size[0], size[1], size[2], ranks, mode, mode == Mode.W8A8_DYNAMIC ? threshold : 0,
            (flags & 1) != 0 && mode != Mode.W8A16, (flags & 2) != 0, (flags & 4) != 0, types[0], types[1], types[2]));
  }

  @Property(tries = 300)
  void everyResultIsWithinItsBound(@ForAll("shapes") Shape shape) {
    Layer layer = new Layer(shape);
    Deviation deviation = layer.oracle().compare(layer.forward(layer.x, shape.yFormat, 1));
    assertTrue(deviation.withinBound(), deviation::toString);
  }

  @Property(tries = 100)
  void codesAndSumsAreEqualBitForBit(@ForAll("shapes") Shape shape) {
    if (shape.mode == Mode.W8A16) {
      return;
    }
    Layer layer = new Layer(shape);
    Oracle.Quantized expected = Oracle.quantize(layer.linear.quantization(), layer.x, shape.rows, shape.k);
    try (Int8Linear loaded = layer.load()) {
      Int8Linear.Quantized found = loaded.quantized(layer.x, shape.rows);
      assertArrayEquals(expected.codes(), found.codes());
      assertArrayEquals(expected.rowScale(), found.rowScale());
      int[] sums = new int[shape.rows * shape.n];
      for (int i = 0; i < sums.length; i++) {
        for (int c = 0; c < shape.k; c++) {
          sums[i] += expected.codes()[i / shape.n * shape.k + c] * layer.linear.weight()[i % shape.n * shape.k + c];
        }
      }
      assertArrayEquals(sums, found.sums());
    }
  }

  @Property(tries = 50)
  void aWeightOfZeroIsTheBase(@ForAll("shapes") Shape shape) {
    Layer layer = new Layer(shape);
    float[] zero = layer.forward(layer.x, shape.yFormat, 0);
    layer.adapters.clear();
    assertArrayEquals(layer.forward(layer.x, shape.yFormat, 1), zero);
  }

  @Property(tries = 50)
  void twoRunsGiveTheSameBits(@ForAll("shapes") Shape shape) {
    Layer layer = new Layer(shape);
    assertArrayEquals(layer.forward(layer.x, shape.yFormat, 1), layer.forward(layer.x, shape.yFormat, 1));
  }

  /** Outlier columns belong to the whole call, so the order of its rows does not matter. */
  @Property(tries = 50)
  void rowsKeepTheirBitsInAnyOrder(@ForAll("shapes") Shape shape) {
    Layer layer = new Layer(shape);
    List<Integer> order = new ArrayList<>();
    for (int m = 0; m < shape.rows; m++) {
      order.add(m);
    }
    Collections.shuffle(order, new Random(shape.seed));
    float[] shuffled = new float[layer.x.length];
    for (int m = 0; m < shape.rows; m++) {
      System.arraycopy(layer.x, order.get(m) * shape.k, shuffled, m * shape.k, shape.k);
    }
    float[] y = layer.forward(layer.x, shape.yFormat, 1);
    float[] found = layer.forward(shuffled, shape.yFormat, 1);
    for (int m = 0; m < shape.rows; m++) {
      int from = order.get(m) * shape.n;
      assertArrayEquals(Arrays.copyOfRange(y, from, from + shape.n),
          Arrays.copyOfRange(found, m * shape.n, (m + 1) * shape.n), "row " + m);
    }
  }

  /** One row with a NaN and one with an infinity: theirs alone are not finite. */
  @Property(tries = 50)
  void notANumberStaysInItsRow(@ForAll("shapes") Shape shape) {
    Layer layer = new Layer(shape);
    Random random = new Random(shape.seed);
    int bad = random.nextInt(shape.rows);
    layer.x[bad * shape.k + random.nextInt(shape.k)] = random.nextBoolean() ? Float.NaN : Float.NEGATIVE_INFINITY;
    float[] y = layer.forward(layer.x, FloatFormat.FLOAT32, 1);
    for (int i = 0; i < y.length; i++) {
      int at = i;
      assertEquals(i / shape.n != bad, Float.isFinite(y[i]),
          () -> "row %d, channel %d, y %s; the bad row is %d".formatted(at / shape.n, at % shape.n, y[at], bad));
    }
  }

  /** Numbers of one shape, on the host. */
  private static final class Layer {
    private final Shape shape;
    private final OracleLinear linear;
    private final List<OracleAdapter> adapters = new ArrayList<>();
    private final float[] x;

    Layer(Shape shape) {
      this.shape = shape;
      Random random = new Random(shape.seed);
      byte[] weight = new byte[shape.n * shape.k];
      random.nextBytes(weight);
      float[] scale = gaussian(random, shape.perTensor ? 1 : shape.n, 0.01f, FloatFormat.FLOAT32);
      float[] bias = shape.bias ? gaussian(random, shape.n, 2, FloatFormat.FLOAT32) : null;
      Quantization how = switch (shape.mode) {
        case W8A16 -> Quantization.weightOnly();
        case W8A8_STATIC -> new Quantization(Mode.W8A8_STATIC, shape.roundX, 0.03f, 0, 0);
        case W8A8_DYNAMIC -> new Quantization(Mode.W8A8_DYNAMIC, shape.roundX, 0, shape.perTensor ? 127.5f : 127,
            shape.threshold);
      };
      linear = new OracleLinear(shape.n, shape.k, weight, scale, bias, how);
      for (int rank : shape.ranks) {
        adapters.add(new OracleAdapter(rank, gaussian(random, rank * shape.k, 0.2f, shape.factors),
            FloatFormat.FLOAT32, gaussian(random, shape.n * rank, 0.2f, shape.factors), FloatFormat.FLOAT32, null,
            (float) random.nextGaussian()));
      }
      x = Activations.random(shape.seed, shape.rows, shape.k, shape.xFormat);
    }

    Expectation oracle() {
      return Oracle.evaluate(linear, adapters, x, shape.rows, shape.xFormat, shape.yFormat,
          Verification.arithmetic(device));
    }

    Int8Linear load() {
      ByteBuffer weight = ByteBuffer.allocateDirect(linear.weight().length).put(linear.weight()).flip();
      return device.load("layer", shape.n, shape.k, linear.quantization(), weight, linear.scale(), linear.bias());
    }

    float[] forward(float[] x, FloatFormat yFormat, float weight) {
      byte[] xBytes = Activations.pack(x, shape.xFormat);
      byte[] yBytes = new byte[shape.rows * shape.n * (yFormat == FloatFormat.FLOAT32 ? 4 : 2)];
      try (Int8Linear loaded = load()) {
        for (OracleAdapter adapter : adapters) {
          loaded.attach(adapter.rank(), adapter.a(), adapter.b(), weight * (float) adapter.scale(),
              LoraPrecision.BITS_16);
        }
        DataType xType = DataType.valueOf(shape.xFormat.name());
        try (DeviceMemory xs = device.allocate(xBytes.length); DeviceMemory ys = device.allocate(yBytes.length);
            DeviceMemory workspace = device.allocate(loaded.workspaceBytes(shape.rows, xType))) {
          xs.copyFrom(xBytes, null);
          loaded.forward(xs, xType, ys, DataType.valueOf(yFormat.name()), shape.rows, workspace, null);
          ys.copyTo(yBytes, null);
        }
      }
      return Activations.unpack(yBytes, yFormat);
    }


    private static float[] gaussian(Random random, int count, float scale, FloatFormat format) {
      float[] values = new float[count];
      for (int i = 0; i < count; i++) {
        values[i] = (float) format.round(random.nextGaussian() * scale);
      }
      return values;
    }
  }
}
