// SPDX-License-Identifier: Apache-2.0
package io.octolora.oracle;

import io.octolora.checkpoint.Quantization;
import java.util.ArrayList;
import java.util.List;
import java.util.stream.IntStream;

/**
 * The numerics contract in double precision and plain loops, with a bound for every element. It shares no code with the
 * native library, with its binding or with the mapping of adapters, and knows no tile.
 *
 * <p>With {@code x[M,K]}, {@code W[N,K]} int8, {@code s_w[N]}, and adapters {@code (A_i[r,K], B_i[N,r], beta_i[N], c_i)}:
 *
 * <pre>{@code
 * x'    = round_x ? fp16(x) : x
 * O     = { k : |x'[m,k]| >= t for some m }, empty without a threshold t
 * a[m]  = max |x'[m,k]| over the elements below t
 * q     = 0 for k in O, else clamp(rne(fl32(x' * fl32(divisor / a[m]))), -128, 127)      s_x[m] = fl32(a[m] / divisor)
 *         static: clamp(rne(fl32(x' / x_scale)), -128, 127)                              s_x = x_scale
 * base  = s_x[m] * s_w[n] * sum_k q W  +  s_w[n] * sum_{k in O} x W          W8A16: s_w[n] * sum_k x W
 * y     = base + bias + sum_i c_i * (sum_r H_i[m,r] B_i[n,r] + beta_i[n])    H_i = x . A_i^T
 * }</pre>
 *
 * <p>Everything up to {@code q} and {@code s_x} is prescribed down to the fp32 rounding, so {@code q} and the int32 sum
 * are equal bit for bit and have no error.
 *
 * <p><b>The bound.</b> Let {@code u = 2^-24} (fp32), {@code u_y} the unit roundoff of the type of y, and {@code u_h} that
 * of the 16-bit type in which an adapter is kept: 2^-8 for bf16, 2^-11 for fp16 (half a unit in the last place of 8 and
 * 11 significant bits). A sum of L products in fp32, in any order, errs by at most {@code (L + 1) u} times the sum of the
 * absolute products; the truncating accumulation of tensor cores, one alignment for at least eight products, stays below
 * that. Per element, where {@code |.|} under a sum means absolute values:
 *
 * <ol>
 *   <li>int8 part: conversion of the sum, two scales, one spare: {@code 4 u |base_int8|}
 *   <li>outlier part over {@code |O|} columns: {@code (|O| + 4) u s_w sum|x||W|}; W8A16: the same over K
 *   <li>factors: a file's 16-bit factors are kept as they are, and so are fp32 factors that a 16-bit type holds.
 *       Other fp32 factors become fp16 times a power of two: {@code d(a) = 2^-11 |a| + 2^-35 max|a|} (the second term:
 *       subnormals, when the power of two brings the largest element to 2^10 or more); or bf16, {@code 2^-8 |a|}, which
 *       can lose less only where the non-zero magnitudes span more than 2^24
 *   <li>down-projection: {@code e(H) = sum|x| d(A) + (K + 4) u sum|x|(|A| + d(A))}, plus {@code u_h} times the sum over
 *       {@code |x| (|A| + d(A))} when x itself has to be rounded to the adapter's 16-bit type, plus the rounding of H to
 *       that type, {@code u_h (|H| + e)}
 *   <li>up-projection: {@code sum (e(H)(|B| + d(B)) + |H| d(B)) + (r + 6) u sum (|H| + e(H)) (|B| + d(B))}, which
 *       includes c, the division and multiplication by s_x and the product in fp32; all times {@code |c|}
 *   <li>adding the parts in fp32: {@code (3 + 2 adapters) u} times the sum of their magnitudes
 *   <li>the store: {@code u_y (|y| + what came before)} and half of the smallest subnormal
 * </ol>
 */
public final class Oracle {
  private static final double U = Math.scalb(1.0, -24);

  private Oracle() {}

  /**
   * The quantized rows.
   *
   * @param codes {@code [rows,k]}
   * @param rowScale {@code [rows]}: s_x
   * @param outlier {@code [k]}: columns kept out of the int8 sum
   * @param scaled {@code [rows,k]}: what was rounded to a code, in fp32
   * @param finite {@code [rows]}: whether the row holds neither NaN nor infinity, before and after rounding x
   */
  public record Quantized(byte[] codes, float[] rowScale, boolean[] outlier, float[] scaled, boolean[] finite) {}

  /** Quantizes {@code x[rows,k]} as the contract prescribes. Not for W8A16. */
  public static Quantized quantize(Quantization how, float[] x, int rows, int k) {
    float[] measured = x.clone();
    if (how.roundXToF16()) {
      FloatFormat.FLOAT16.roundAll(measured);
    }
    boolean dynamic = how.mode() == Quantization.Mode.W8A8_DYNAMIC;
    float threshold = dynamic ? how.outlierThreshold() : 0;
    boolean[] outlier = new boolean[k];
    if (threshold > 0) {
      for (int m = 0; m < rows; m++) {
        for (int c = 0; c < k; c++) {
          outlier[c] |= Math.abs(measured[m * k + c]) >= threshold;
        }
      }
    }
    byte[] codes = new byte[rows * k];
    float[] rowScale = new float[rows];
    float[] scaled = new float[rows * k];
    boolean[] finite = new boolean[rows];
    for (int m = 0; m < rows; m++) {
      finite[m] = true;
      float max = 0;
      for (int c = 0; c < k; c++) {
        float v = Math.abs(measured[m * k + c]);
        finite[m] &= Float.isFinite(v);
        if (threshold <= 0 || v < threshold) {
          max = Math.max(max, v);
        }
      }
      float divisor = how.xDivisor() == 0 ? 127f : how.xDivisor();
      rowScale[m] = dynamic ? max / divisor : how.xScale();
      float inverse = divisor / max;
      for (int c = 0; c < k; c++) {
        float v = measured[m * k + c];
        float p = dynamic ? (max == 0 ? 0 : v * inverse) : v / how.xScale();
        scaled[m * k + c] = p;
        codes[m * k + c] = outlier[c] ? 0 : (byte) Math.max(-128, Math.min(127, (int) Math.rint(p)));
      }
    }
    return new Quantized(codes, rowScale, outlier, scaled, finite);
  }

  /** The plain layer, without adapters. */
  public static Expectation evaluate(OracleLinear linear, float[] x, int rows, FloatFormat xFormat,
      FloatFormat yFormat) {
    return evaluate(linear, List.of(), x, rows, xFormat, yFormat);
  }

  /**
   * @param x {@code [rows,k]}, values of {@code xFormat}
   * @param xFormat type in which x is given to the computation under test
   * @param yFormat type in which it stores y
   */
  public static Expectation evaluate(OracleLinear linear, List<OracleAdapter> adapters, float[] x, int rows,
      FloatFormat xFormat, FloatFormat yFormat) {
    int n = linear.n();
    int k = linear.k();
    if (x.length != (long) rows * k) {
      throw new IllegalArgumentException("x has %d elements, expected rows %d x k %d".formatted(x.length, rows, k));
    }
    boolean weightOnly = linear.quantization().mode() == Quantization.Mode.W8A16;
    Quantized quantized = weightOnly ? null : quantize(linear.quantization(), x, rows, k);
    List<Projected> deltas = new ArrayList<>();
    for (OracleAdapter adapter : adapters) {
      deltas.add(new Projected(adapter, n, k, x, rows, xFormat));
    }

    byte[] weights = linear.weight();
    double[] value = new double[Math.multiplyExact(rows, n)];
    double[] bound = new double[rows * n];
    IntStream.range(0, n).parallel().forEach(channel -> {
      double sw = linear.scaleOf(channel);
      for (int m = 0; m < rows; m++) {
        double base;
        double error;
        if (weightOnly) {
          double sum = 0;
          double magnitude = 0;
          for (int c = 0; c < k; c++) {
            double product = (double) x[m * k + c] * weights[channel * k + c];
            sum += product;
            magnitude += Math.abs(product);
          }
          base = sw * sum;
          error = (k + 4) * U * Math.abs(sw) * magnitude;
        } else {
          long sum = 0;
          double outliers = 0;
          double magnitude = 0;
          int columns = 0;
          for (int c = 0; c < k; c++) {
            int w = weights[channel * k + c];
            sum += quantized.codes()[m * k + c] * w;
            if (quantized.outlier()[c]) {
              outliers += (double) x[m * k + c] * w;
              magnitude += Math.abs((double) x[m * k + c] * w);
              columns++;
            }
          }
          double exact = (double) quantized.rowScale()[m] * sw * sum;
          base = exact + sw * outliers;
          error = 4 * U * Math.abs(exact) + (columns + 4) * U * Math.abs(sw) * magnitude
              + 2 * U * (Math.abs(exact) + Math.abs(sw * outliers));
          if (!quantized.finite()[m]) {
            base = Double.NaN;
          }
        }
        double y = base;
        double parts = Math.abs(base);
        if (linear.bias() != null) {
          y += linear.bias()[channel];
          parts += Math.abs(linear.bias()[channel]);
        }
        for (Projected delta : deltas) {
          double d = delta.value(m, channel);
          y += d;
          parts += Math.abs(d);
          error += delta.error(m, channel);
        }
        error += (3 + 2 * deltas.size()) * U * (parts + error);
        error += yFormat.roundingError(Math.abs(y) + error);
        value[m * n + channel] = Double.isInfinite(yFormat.round(y)) ? yFormat.round(y) : y;
        bound[m * n + channel] = error;
      }
    });
    return new Expectation(rows, n, value, bound);
  }

  /** One adapter's {@code H = x . A^T} with its errors, ready to be multiplied by rows of B. */
  private static final class Projected {
    private final OracleAdapter adapter;
    private final int rank;
    private final double[] h;
    private final double[] hError;
    private final double[] bError;

    Projected(OracleAdapter adapter, int n, int k, float[] x, int rows, FloatFormat xFormat) {
      this.adapter = adapter;
      this.rank = adapter.rank();
      if (adapter.a().length != (long) rank * k || adapter.b().length != (long) n * rank) {
        throw new IllegalArgumentException("A has %d elements, expected rank %d x k %d; B has %d, expected n %d x rank"
            .formatted(adapter.a().length, rank, k, adapter.b().length, n));
      }
      double[] aError = storageError(adapter.a(), adapter.aFormat());
      bError = storageError(adapter.b(), adapter.bFormat());
      double unit = Math.max(storageUnit(adapter.a(), adapter.aFormat()), storageUnit(adapter.b(), adapter.bFormat()));
      // bf16 values survive the way into fp16 and fp32 alike; every other change of type rounds
      boolean xRounds = xFormat.unitRoundoff() < unit;
      h = new double[rows * rank];
      hError = new double[rows * rank];
      IntStream.range(0, rows).parallel().forEach(m -> {
        for (int r = 0; r < rank; r++) {
          double sum = 0;
          double lost = 0;
          double magnitude = 0;
          for (int c = 0; c < k; c++) {
            double value = x[m * k + c];
            double a = adapter.a()[r * k + c];
            double ea = aError[r * k + c];
            sum += value * a;
            lost += Math.abs(value) * ea;
            magnitude += Math.abs(value) * (Math.abs(a) + ea);
          }
          double error = lost + (k + 4) * U * magnitude + (xRounds ? unit * magnitude : 0);
          h[m * rank + r] = sum;
          hError[m * rank + r] = error + unit * (Math.abs(sum) + error);
        }
      });
    }

    double value(int m, int channel) {
      double sum = adapter.bias() == null ? 0 : adapter.bias()[channel];
      for (int r = 0; r < rank; r++) {
        sum += h[m * rank + r] * adapter.b()[channel * rank + r];
      }
      return adapter.scale() * sum;
    }

    double error(int m, int channel) {
      double error = 0;
      double magnitude = adapter.bias() == null ? 0 : Math.abs(adapter.bias()[channel]);
      for (int r = 0; r < rank; r++) {
        double ah = Math.abs(h[m * rank + r]);
        double eh = hError[m * rank + r];
        double ab = Math.abs(adapter.b()[channel * rank + r]);
        double eb = bError[channel * rank + r];
        error += eh * (ab + eb) + ah * eb;
        magnitude += (ah + eh) * (ab + eb);
      }
      return Math.abs(adapter.scale()) * (error + (rank + 6) * U * magnitude);
    }
  }

  /** Per element, how far the 16-bit copy of a factor may be from the factor. */
  private static double[] storageError(float[] values, FloatFormat format) {
    double[] error = new double[values.length];
    if (keptAsIs(values, format)) {
      return error;
    }
    double max = 0;
    double min = Double.POSITIVE_INFINITY;
    for (float v : values) {
      max = Math.max(max, Math.abs(v));
      min = v == 0 ? min : Math.min(min, Math.abs(v));
    }
    boolean wide = max > Math.scalb(min, 24);
    for (int i = 0; i < error.length; i++) {
      double v = Math.abs(values[i]);
      error[i] = wide ? FloatFormat.BFLOAT16.unitRoundoff() * v
          : FloatFormat.FLOAT16.unitRoundoff() * v + Math.scalb(max, -35);
    }
    return error;
  }

  /** Unit roundoff of the 16-bit type that holds a factor, and with it H. */
  private static double storageUnit(float[] values, FloatFormat format) {
    if (format != FloatFormat.FLOAT32) {
      return format.unitRoundoff();
    }
    return FloatFormat.BFLOAT16.holds(values) ? FloatFormat.BFLOAT16.unitRoundoff()
        : FloatFormat.FLOAT16.unitRoundoff();
  }

  private static boolean keptAsIs(float[] values, FloatFormat format) {
    return format != FloatFormat.FLOAT32 || FloatFormat.BFLOAT16.holds(values) || FloatFormat.FLOAT16.holds(values);
  }
}
