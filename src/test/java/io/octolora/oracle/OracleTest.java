// SPDX-License-Identifier: Apache-2.0
package io.octolora.oracle;

import static org.junit.jupiter.api.Assertions.assertArrayEquals;
import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertFalse;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import io.octolora.checkpoint.Quantization;
import io.octolora.checkpoint.Quantization.Mode;
import io.octolora.oracle.Oracle.Arithmetic;
import java.util.List;
import java.util.Random;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.EnumSource;

/** The oracle against numbers worked out by hand, and its bound against a plain fp32 evaluation of the same formula. */
class OracleTest {
  private static final FloatFormat F32 = FloatFormat.FLOAT32;

  @Test
  void codesRoundTiesToEven() {
    float[] x = {127, 0.5f, 1.5f, 2.5f, -2.5f, -126.5f, -127, 64};
    Oracle.Quantized q = Oracle.quantize(Quantization.bitsandbytes(0), x, 1, 8);
    assertArrayEquals(new byte[] {127, 0, 2, 2, -2, -126, -127, 64}, q.codes());
    assertEquals(1f, q.rowScale()[0]);
    x = new float[] {1, -0.5f, 0.25f, -0.75f, 0.126953125f, -1, 0, 0.3330078125f};
    q = Oracle.quantize(Quantization.bitsandbytes(0), x, 1, 8);
    assertArrayEquals(new byte[] {127, -64, 32, -95, 16, -127, 0, 42}, q.codes());
    assertEquals(1 / 127f, q.rowScale()[0]);
  }

  @Test
  void divisorOfTorchao() {
    float[] x = {127, 0.5f, 1.5f, 2.5f, -2.5f, -126.5f, -127, 64};
    Quantization how = new Quantization(Mode.W8A8_DYNAMIC, false, 0, 127.5f, 0);
    assertArrayEquals(new byte[] {127, 1, 2, 3, -3, -127, -128, 64}, Oracle.quantize(how, x, 1, 8).codes());
  }

  @Test
  void staticScaleClamps() {
    float[] x = {0.25f, -0.75f, 1000, -1000, 0, 63.75f, 1.25f, -1.25f};
    Oracle.Quantized q = Oracle.quantize(Quantization.fixed(0.5f), x, 2, 4);
    assertArrayEquals(new byte[] {0, -2, 127, -128, 0, 127, 2, -2}, q.codes());
    assertArrayEquals(new float[] {0.5f, 0.5f}, q.rowScale());
  }

  /** Row 1 has the outlier in column 2; row 0's small element there leaves the sum too, but counts for its maximum. */
  @Test
  void outlierColumns() {
    float[] x = {1, 2, 4, /* row 1 */ -3, 1, 8};
    Oracle.Quantized q = Oracle.quantize(Quantization.bitsandbytes(6), x, 2, 3);
    assertArrayEquals(new boolean[] {false, false, true}, q.outlier());
    assertArrayEquals(new float[] {4 / 127f, 3 / 127f}, q.rowScale());
    assertArrayEquals(new byte[] {32, 64, 0, -127, 42, 0}, q.codes());
    OracleLinear linear = linear(1, 3, new byte[] {1, 2, 3}, 0.5f, null, Quantization.bitsandbytes(6));
    Expectation y = Oracle.evaluate(linear, x, 2, F32, F32, Arithmetic.FP32);
    assertEquals(0.5 * ((double) (4 / 127f) * (32 + 128) + 4 * 3), y.value()[0]);
    assertEquals(0.5 * ((double) (3 / 127f) * (-127 + 84) + 8 * 3), y.value()[1]);
  }

  @Test
  void thresholdIsMeasuredAfterRoundingToFp16() {
    float[] x = {5.9999f, 1};
    assertTrue(Oracle.quantize(Quantization.bitsandbytes(6), x, 1, 2).outlier()[0]);
    Quantization plain = new Quantization(Mode.W8A8_DYNAMIC, false, 0, 127, 6);
    assertFalse(Oracle.quantize(plain, x, 1, 2).outlier()[0]);
  }

  @Test
  void adapterReadsTheUnquantizedRow() {
    float[] x = {1.004f, 100};
    OracleLinear linear = linear(1, 2, new byte[] {0, 0}, 1, new float[] {0.5f}, Quantization.bitsandbytes(6));
    OracleAdapter adapter = new OracleAdapter(1, new float[] {1, 0}, F32, new float[] {2}, F32, new float[] {4}, 3);
    assertEquals(0.5 + 3 * (1.004f * 2.0 + 4),
        Oracle.evaluate(linear, List.of(adapter), x, 1, F32, F32, Arithmetic.FP32).value()[0], 1e-15);
  }

  /** W = [[3,4],[0,2]], bias [1,-1], A = [[1,0]], B = [[1],[0.5]], scale 2, m = [10,4], x = [1,2] in PEFT 0.21. */
  @Test
  void magnitudesAreThoseOfPeft() {
    OracleLinear linear = linear(2, 2, new byte[] {3, 4, 0, 2}, 1, new float[] {1, -1}, Quantization.weightOnly());
    OracleAdapter adapter = new OracleAdapter(1, new float[] {1, 0}, F32, new float[] {1, 0.5f}, F32, null,
        new float[] {10, 4}, 2);
    float[] x = {1, 2};
    Expectation y = Oracle.evaluate(linear, List.of(adapter), x, 1, F32, F32, Arithmetic.FP32);
    assertArrayEquals(new double[] {21.302588, 7.944272}, y.value(), 2e-6); // in fp32
    Expectation peft = PeftReference.evaluate(PeftReference.BaseTool.QUANTO, linear, List.of(adapter), List.of(F32), x,
        1, F32);
    assertArrayEquals(y.value(), peft.value(), 1e-12);
  }

  /** One row by hand: W x = 11, a plain adapter of 6, and one of 18 with which the row is (5, 12) and 26 long. */
  @Test
  void adaptersAfterEachOther() {
    OracleLinear linear = linear(1, 2, new byte[] {3, 4}, 1, new float[] {100}, Quantization.weightOnly());
    float[] x = {1, 2};
    OracleAdapter plain = new OracleAdapter(1, new float[] {0, 3}, F32, new float[] {1}, F32, null, 1);
    OracleAdapter dora = new OracleAdapter(1, new float[] {2, 8}, F32, new float[] {1}, F32, null, new float[] {26}, 1);
    double length = Math.sqrt(5 * 5 + 12 * 12);
    double g = 26 / length;
    assertEquals(100 + g * (11 + 6 + 18), value(linear, List.of(plain, dora), x), 1e-9);
    assertEquals(100 + g * (11 + 18) + 6, value(linear, List.of(dora, plain), x), 1e-9);
    assertEquals(100 + g * (g * (11 + 18) + 18), value(linear, List.of(dora, dora), x), 1e-9);
  }

  private static double value(OracleLinear linear, List<OracleAdapter> adapters, float[] x) {
    return Oracle.evaluate(linear, adapters, x, 1, F32, F32, Arithmetic.FP32).value()[0];
  }

  @Test
  void zeroRowGivesTheBias() {
    OracleLinear linear = linear(2, 3, new byte[] {1, 2, 3, 4, 5, 6}, 1, new float[] {7, -8},
        Quantization.bitsandbytes(6));
    assertArrayEquals(new double[] {7, -8},
        Oracle.evaluate(linear, new float[3], 1, F32, F32, Arithmetic.FP32).value());
  }

  @Test
  void whatIsNotFiniteMatchesItselfAlone() {
    float[] kinds = {Float.NaN, Float.POSITIVE_INFINITY, Float.NEGATIVE_INFINITY, 1};
    for (float expected : kinds) {
      for (float found : kinds) {
        Expectation y = new Expectation(1, 1, new double[] {expected}, new double[] {0.5});
        boolean same = Float.compare(expected, found) == 0;
        String text = "expected %s, found %s".formatted(expected, found);
        assertEquals(same, y.compare(new float[] {found}).withinBound(), text);
        assertEquals(same, y.compare(new float[] {found}, new float[] {expected}).withinBound(), text);
      }
    }
  }

  @Test
  void notANumberStaysInItsRow() {
    OracleLinear linear = linear(1, 2, new byte[] {1, 1}, 1, null, Quantization.bitsandbytes(6));
    Expectation y = Oracle.evaluate(linear, new float[] {Float.NaN, 1, 1, 1}, 2, F32, F32, Arithmetic.FP32);
    assertTrue(Double.isNaN(y.value()[0]));
    assertTrue(Double.isFinite(y.value()[1]));
    assertTrue(y.compare(new float[] {Float.NaN, (float) y.value()[1]}).withinBound());
    assertFalse(y.compare(new float[] {0, (float) y.value()[1]}).withinBound());
    assertFalse(y.compare(new float[] {Float.NaN, Float.NaN}).withinBound());
  }

  @Test
  void weightOnlyTakesXAsItIs() {
    OracleLinear linear = linear(1, 2, new byte[] {-128, 3}, 0.25f, null, Quantization.weightOnly());
    assertEquals(0.25 * (-128 * 1.25 + 3 * 7),
        Oracle.evaluate(linear, new float[] {1.25f, 7}, 1, F32, F32, Arithmetic.FP32).value()[0]);
  }

  /** fp32 loops over 16-bit factors, H in fp32 or in 16 bits, y in each type: inside, and not by far. */
  @ParameterizedTest
  @EnumSource(Arithmetic.class)
  void boundHoldsForAPlainEvaluation(Arithmetic arithmetic) {
    Random random = new Random(7);
    for (Mode mode : Mode.values()) {
      for (FloatFormat type : FloatFormat.values()) {
        Case c = new Case(random, mode, type, 3, 40, 200, 5);
        Expectation oracle = c.oracle(arithmetic);
        Expectation.Deviation deviation = oracle.compare(c.evaluate(arithmetic, 1f));
        assertTrue(deviation.withinBound(), () -> mode + " " + type + ": " + deviation);
        assertTrue(deviation.maxRatio() > 0.01, () -> "a bound a hundred times too wide? " + mode + " " + deviation);
        Expectation.Deviation wrong = oracle.compare(c.evaluate(arithmetic, 1.25f));
        assertFalse(wrong.withinBound(), () -> "scale of the adapter + 25 %: " + mode + " " + type + ": " + wrong);
      }
    }
  }

  @Test
  void shapesAreChecked() {
    OracleLinear linear = linear(1, 2, new byte[] {1, 1}, 1, null, Quantization.bitsandbytes(6));
    assertThrows(IllegalArgumentException.class,
        () -> Oracle.evaluate(linear, new float[3], 1, F32, F32, Arithmetic.FP32));
    assertThrows(IllegalArgumentException.class, () -> linear(2, 2, new byte[3], 1, null, Quantization.weightOnly()));
    OracleAdapter narrow = new OracleAdapter(1, new float[3], F32, new float[1], F32, null, 1);
    assertThrows(IllegalArgumentException.class,
        () -> Oracle.evaluate(linear, List.of(narrow), new float[2], 1, F32, F32, Arithmetic.FP32));
  }

  private static OracleLinear linear(int n, int k, byte[] weight, float scale, float[] bias, Quantization how) {
    return new OracleLinear(n, k, weight, new float[] {scale}, bias, how);
  }

  /** Random operands of one layer with one adapter. */
  private static final class Case {
    private final FloatFormat type;
    private final int rows;
    private final int n;
    private final int k;
    private final float[] x;
    private final OracleLinear linear;
    private final OracleAdapter adapter;

    Case(Random random, Mode mode, FloatFormat type, int rows, int n, int k, int rank) {
      this.type = type;
      this.rows = rows;
      this.n = n;
      this.k = k;
      x = gaussian(random, rows * k, 2);
      type.roundAll(x);
      byte[] weight = new byte[n * k];
      random.nextBytes(weight);
      float[] scale = gaussian(random, n, 0.01f);
      Quantization how = switch (mode) {
        case W8A16 -> Quantization.weightOnly();
        case W8A8_DYNAMIC -> Quantization.bitsandbytes(6);
        case W8A8_STATIC -> Quantization.fixed(0.05f);
      };
      linear = new OracleLinear(n, k, weight, scale, gaussian(random, n, 1), how);
      adapter = new OracleAdapter(rank, gaussian(random, rank * k, 0.3f), FloatFormat.FLOAT32,
          gaussian(random, n * rank, 0.3f), FloatFormat.FLOAT32, gaussian(random, n, 1), 1.5);
    }

    Expectation oracle(Arithmetic arithmetic) {
      return Oracle.evaluate(linear, List.of(adapter), x, rows, type, type, arithmetic);
    }

    float[] evaluate(Arithmetic arithmetic, float weight) {
      Oracle.Quantized q = linear.quantization().mode() == Mode.W8A16 ? null
          : Oracle.quantize(linear.quantization(), x, rows, k);
      float[] a = adapter.a().clone();
      float[] b = adapter.b().clone();
      FloatFormat.FLOAT16.roundAll(a);
      FloatFormat.FLOAT16.roundAll(b);
      float[] y = new float[rows * n];
      for (int m = 0; m < rows; m++) {
        for (int channel = 0; channel < n; channel++) {
          int sum = 0;
          float direct = 0;
          for (int c = 0; c < k; c++) {
            int w = linear.weight()[channel * k + c];
            sum += q == null ? 0 : q.codes()[m * k + c] * w;
            direct += q == null || q.outlier()[c] ? x[m * k + c] * w : 0;
          }
          float delta = adapter.bias()[channel];
          for (int r = 0; r < adapter.rank(); r++) {
            float h = 0;
            for (int c = 0; c < k; c++) {
              h += x[m * k + c] * a[r * k + c];
            }
            delta += (arithmetic == Arithmetic.FP32 ? h : (float) FloatFormat.FLOAT16.round(h))
                * b[channel * adapter.rank() + r];
          }
          float sw = linear.scale()[channel];
          float base = (q == null ? 0 : q.rowScale()[m] * sw * sum) + sw * direct;
          y[m * n + channel] = (float) type.round(
              base + linear.bias()[channel] + (float) adapter.scale() * weight * delta);
        }
      }
      return y;
    }

    private static float[] gaussian(Random random, int count, float scale) {
      float[] values = new float[count];
      for (int i = 0; i < count; i++) {
        values[i] = (float) random.nextGaussian() * scale;
      }
      return values;
    }
  }
}
