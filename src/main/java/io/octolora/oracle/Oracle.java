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
 * <p>With {@code x[M,K]}, {@code W[N,K]} int8, {@code s_w[N]}, adapters {@code (A_i[r,K], B_i[N,r], beta_i[N], c_i)}:
 *
 * <pre>{@code
 * x'    = round_x ? fp16(x) : x
 * O     = { k : |x'[m,k]| >= t for some m }, empty without a threshold t
 * a[m]  = max |x'[m,k]| over the elements below t
 * q     = 0 for k in O, else clamp(rne(fl32(x' * fl32(divisor / a[m]))), -128, 127)      s_x[m] = fl32(a[m] / divisor)
 *         static: clamp(rne(fl32(x' / x_scale)), -128, 127)                              s_x = x_scale
 * base  = s_x[m] * s_w[n] * sum_k q W  +  s_w[n] * sum_{k in O} x W
 *         W8A16: s_w[n] * sum_k x W, with block scales s_w[n] * sum_b d[n,b] * sum_{k in b} x W
 * y     = base + bias + sum_i c_i * (sum_r H_i[m,r] B_i[n,r] + beta_i[n])    H_i = x . A_i^T
 * }</pre>
 *
 * <p>Where an adapter has a magnitude (DoRA), each applies to what those before it made of the base, as in PEFT:
 *
 * <pre>{@code
 * y     = G * base + bias + sum_i F_i * c_i * (...)      F_i = product of g_j for j >= i, G of all
 * g_i   = m_i[n] / |row n of s_w W + c_i B_i A_i|, 1 without a magnitude
 * }</pre>
 *
 * <p>Everything up to {@code q} and {@code s_x} is prescribed down to the fp32 rounding, so {@code q} and the int32 sum
 * are equal bit for bit and have no error.
 *
 * <p><b>The bound.</b> The contract leaves {@link Arithmetic} open: fp32 throughout, or tensor cores, which take 16-bit
 * operands; what is marked (t) below is there for those alone. Let {@code u = 2^-24} (fp32), {@code u_y} the unit
 * roundoff of the type of y, and {@code u_h} that of the 16-bit type in which an adapter is kept: 2^-8 for bf16, 2^-11
 * for fp16 (half a unit in the last place of 8 and 11 significant bits). One addition errs by {@code d = u}, and by
 * {@code 2 u} in tensor cores, which cut off instead of rounding. Per element, {@code sum|.|} adding absolute values:
 *
 * <ol>
 *   <li>int8 part: conversion of the sum, two scales, one spare: {@code 4 u |base_int8|}
 *   <li>outlier part over {@code |O|} columns: {@code (|O| d + 4 u) s_w sum|x||W|}; (t) an fp32 x may go in as a sum of
 *       two 16-bit numbers: {@code 2^-16 s_w sum|x||W|}. W8A16 the same over K, an fp32 x as three: {@code 2^-23}.
 *       With block scales W is d times the code, which is exact in fp32; where instead the sums of blocks are
 *       multiplied, each is added once more, and once for each of the three: {@code blocks d}, or three times that
 *   <li>factors: a file's 16-bit factors are kept as they are, and so are fp32 factors that a 16-bit type holds.
 *       Other fp32 factors become fp16 times a power of two that brings the largest element to 2^14 or more:
 *       {@code d(a) = 2^-11 |a| + 2^-35 max|a|}, the second term for subnormals and for choosing by the squared error
 *       of the whole matrix; or bf16, {@code 2^-8 |a| + 2^-35 max|a|}, which can be the better choice only where the
 *       non-zero magnitudes span more than 2^24
 *   <li>down-projection: {@code e(H) = sum|x| d(A) + (K d + 4 u) sum|x|(|A| + d(A))}, an fp32 x as two numbers of 11
 *       bits: {@code 2^-22} times the same sum; then H is rounded to 16 bits, {@code u_h (|H| + e)}, times a power of
 *       two per row that keeps K max|x| max|A| below 2^14 for the largest of the adapters: half an fp16 subnormal is
 *       {@code 2^-34 max|x| K max|A|}, counting three powers of two for rounding exponents up
 *   <li>up-projection: {@code sum (e(H)(|B| + d(B)) + |H| d(B)) + (r d + 6 u) sum (|H| + e(H)) (|B| + d(B))}, which
 *       includes c, the division and multiplication by s_x and the product in fp32; all times {@code |c|}
 *   <li>(t) an adapter's bias may be stored in 16 bits and c as two numbers: {@code (u_h + 2^-16) |c beta|}
 *   <li>with magnitudes: what is lost of A and B in storage and {@code (r + 4) u} of the magnitudes added are an error
 *       of each element of a row, whose length by the length of the row is one of g, as are {@code (K + 8) u} for the
 *       sum of its squares. Errors of factors add up. (t) F B is kept in B's 16-bit type: its unit roundoff and half an
 *       fp16 subnormal, {@code 2^-25 max(1, max|B|)}
 *   <li>adding the parts in fp32: {@code (3 + 2 adapters) d} times the sum of their magnitudes
 *   <li>the store: {@code u_y (|y| + what came before)} and half of the smallest subnormal
 * </ol>
 */
public final class Oracle {
  private static final double U = Math.scalb(1.0, -24);
  private static final double TWO_BF16 = Math.scalb(1.0, -16);
  private static final double THREE_BF16 = Math.scalb(1.0, -23);
  private static final double TWO_TF32 = Math.scalb(1.0, -22);

  private Oracle() {}

  /** How the computation under test may multiply and add. */
  public enum Arithmetic {
    /** Sums and products in fp32, rounded to nearest: the CPU. */
    FP32,
    /** 16-bit operands, fp32 sums that are cut off: CUDA. */
    TENSOR_CORES;

    /** Relative error of one addition. */
    private double addition() {
      return this == FP32 ? U : 2 * U;
    }

    /** The error where operands have to be 16 bits, else 0. */
    private double operand(double error) {
      return this == FP32 ? 0 : error;
    }
  }

  /**
   * The quantized rows.
   *
   * @param codes {@code [rows,k]}
   * @param rowScale {@code [rows]}: s_x
   * @param outlier {@code [k]}: columns kept out of the int8 sum
   * @param scaled {@code [rows,k]}: what was rounded to a code, in fp32
   * @param finite {@code [rows]}: whether the row holds neither NaN nor infinity, before and after rounding x
   */
  public record Quantized(byte[] codes, float[] rowScale, boolean[] outlier, float[] scaled, boolean[] finite) {
    /** The indices of the outlier columns, ascending. */
    int[] outlierColumns() {
      return IntStream.range(0, outlier.length).filter(c -> outlier[c]).toArray();
    }
  }

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
      FloatFormat yFormat, Arithmetic arithmetic) {
    return evaluate(linear, List.of(), x, rows, xFormat, yFormat, arithmetic);
  }

  /**
   * @param x {@code [rows,k]}, values of {@code xFormat}
   * @param xFormat type in which x is given to the computation under test
   * @param yFormat type in which it stores y
   */
  public static Expectation evaluate(OracleLinear linear, List<OracleAdapter> adapters, float[] x, int rows,
      FloatFormat xFormat, FloatFormat yFormat, Arithmetic arithmetic) {
    int n = linear.n();
    int k = linear.k();
    if (x.length != (long) rows * k) {
      throw new IllegalArgumentException("x has %d elements, expected rows %d x k %d".formatted(x.length, rows, k));
    }
    boolean weightOnly = linear.quantization().mode() == Quantization.Mode.W8A16;
    Quantized quantized = weightOnly ? null : quantize(linear.quantization(), x, rows, k);
    double addition = arithmetic.addition();
    double pieces = xFormat == FloatFormat.FLOAT32 ? arithmetic.operand(1) : 0;
    double largest = 0;
    for (OracleAdapter adapter : adapters) {
      largest = Math.max(largest, Math.abs(adapter.scale()) * k * max(adapter.a()) * exponentOfB(adapter));
    }
    List<Projected> deltas = new ArrayList<>();
    for (OracleAdapter adapter : adapters) {
      deltas.add(new Projected(adapter, n, k, x, rows, arithmetic, pieces, largest));
    }

    boolean composed = adapters.stream().anyMatch(adapter -> adapter.magnitude() != null);

    byte[] weights = linear.weight();
    byte[] codes = weightOnly ? null : quantized.codes();
    int[] outlierColumns = weightOnly ? null : quantized.outlierColumns();
    double[] value = new double[Math.multiplyExact(rows, n)];
    double[] bound = new double[rows * n];
    IntStream.range(0, n).parallel().forEach(channel -> {
      double sw = linear.scaleOf(channel);
      double[] factor = new double[deltas.size() + 1];
      double[] factorError = new double[factor.length];
      factor[deltas.size()] = 1;
      for (int i = deltas.size() - 1; i >= 0; i--) {
        deltas.get(i).multiplyFactor(linear, channel, factor, factorError, i);
      }
      for (int m = 0; m < rows; m++) {
        double base;
        double error;
        if (weightOnly) {
          double sum = 0;
          double magnitude = 0;
          for (int c = 0; c < k; c++) {
            double product = x[m * k + c] * linear.weightAt(channel, c);
            sum += product;
            magnitude += Math.abs(product);
          }
          base = sw * sum;
          double additions = k + linear.blocks() * (1 + 2 * pieces);
          error = (additions * addition + 4 * U + pieces * THREE_BF16) * Math.abs(sw) * magnitude;
        } else {
          long sum = 0;
          for (int c = 0; c < k; c++) {
            sum += codes[m * k + c] * weights[channel * k + c];
          }
          double outliers = 0;
          double magnitude = 0;
          for (int c : outlierColumns) {
            double product = (double) x[m * k + c] * weights[channel * k + c];
            outliers += product;
            magnitude += Math.abs(product);
          }
          double exact = (double) quantized.rowScale()[m] * sw * sum;
          base = exact + sw * outliers;
          error = 4 * U * Math.abs(exact)
              + (outlierColumns.length * addition + 4 * U + pieces * TWO_BF16) * Math.abs(sw) * magnitude
              + addition * (Math.abs(exact) + Math.abs(sw * outliers));
          if (!quantized.finite()[m]) {
            base = Double.NaN;
          }
        }
        if (composed) {
          error = Math.abs(factor[0]) * (error + (factorError[0] + 2 * U) * (Math.abs(base) + error));
          base *= factor[0];
        }
        double y = base;
        double parts = Math.abs(base);
        if (linear.bias() != null) {
          y += linear.bias()[channel];
          parts += Math.abs(linear.bias()[channel]);
        }
        for (int i = 0; i < deltas.size(); i++) {
          Projected delta = deltas.get(i);
          double d = factor[i] * delta.value(m, channel);
          y += d;
          parts += Math.abs(d);
          error += delta.error(m, channel, composed, Math.abs(factor[i]), factorError[i]);
        }
        error += (3 + 2 * deltas.size()) * addition * (parts + error);
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
    private final double[] aError;
    private final double[] bError;
    private final double addition;
    private final double unit;
    /** Of F B. */
    private final double composedUnit;
    private final double composedSubnormal;

    Projected(OracleAdapter adapter, int n, int k, float[] x, int rows, Arithmetic arithmetic,
        double pieces, double largest) {
      this.adapter = adapter;
      this.rank = adapter.rank();
      if (adapter.a().length != (long) rank * k || adapter.b().length != (long) n * rank) {
        throw new IllegalArgumentException("A has %d elements, expected rank %d x k %d; B has %d, expected n %d x rank"
            .formatted(adapter.a().length, rank, k, adapter.b().length, n));
      }
      aError = storageError(adapter.a(), adapter.aFormat());
      bError = storageError(adapter.b(), adapter.bFormat());
      addition = arithmetic.addition();
      unit = arithmetic.operand(Math.max(storageUnit(adapter.a(), adapter.aFormat()),
          storageUnit(adapter.b(), adapter.bFormat())));
      composedUnit = Math.max(arithmetic.operand(storageUnit(adapter.b(), adapter.bFormat())), 2 * U);
      composedSubnormal = arithmetic.operand(Math.scalb(Math.max(1, max(adapter.b())), -25));
      double own = Math.abs(adapter.scale()) * exponentOfB(adapter);
      double subnormal = own == 0 ? 0 : arithmetic.operand(Math.scalb(largest / own, -34));
      h = new double[rows * rank];
      hError = new double[rows * rank];
      IntStream.range(0, rows).parallel().forEach(m -> {
        double xMax = 0;
        for (int c = 0; c < k; c++) {
          xMax = Math.max(xMax, Math.abs(x[m * k + c]));
        }
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
          double error = lost + (k * addition + 4 * U + pieces * TWO_TF32) * magnitude;
          h[m * rank + r] = sum;
          hError[m * rank + r] = error + unit * (Math.abs(sum) + error) + subnormal * xMax;
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

    /** Of what {@link #value} is multiplied by: the product from this adapter on and its relative error. */
    void multiplyFactor(OracleLinear linear, int channel, double[] factor, double[] error, int i) {
      factor[i] = factor[i + 1];
      error[i] = error[i + 1];
      if (adapter.magnitude() == null) {
        return;
      }
      int k = linear.k();
      double square = 0;
      double errorSquare = 0;
      for (int c = 0; c < k; c++) {
        double base = linear.scaleOf(channel) * linear.weightAt(channel, c);
        double sum = 0;
        double parts = Math.abs(base);
        double lost = 0;
        for (int r = 0; r < rank; r++) {
          double b = adapter.b()[channel * rank + r];
          double a = adapter.a()[r * k + c];
          double eb = bError[channel * rank + r];
          double ea = aError[r * k + c];
          sum += b * a;
          parts += Math.abs(adapter.scale() * b * a);
          lost += Math.abs(adapter.scale()) * (Math.abs(b) * ea + eb * (Math.abs(a) + ea));
        }
        lost += (rank + 4) * U * parts;
        square += (base + adapter.scale() * sum) * (base + adapter.scale() * sum);
        errorSquare += lost * lost;
      }
      factor[i] *= adapter.magnitude()[channel] / Math.sqrt(square);
      error[i] += Math.sqrt(errorSquare / square) + (k + 9) * U;
    }

    /** @param f what the value is multiplied by, @param fe the relative error of that */
    double error(int m, int channel, boolean composed, double f, double fe) {
      double magnitude = adapter.bias() == null ? 0 : f * Math.abs(adapter.bias()[channel]);
      double error = (unit + (unit == 0 ? 0 : TWO_BF16) + (composed ? fe + U : 0)) * magnitude;
      for (int r = 0; r < rank; r++) {
        double ah = Math.abs(h[m * rank + r]);
        double eh = hError[m * rank + r];
        double ab = Math.abs(adapter.b()[channel * rank + r]);
        double eb = bError[channel * rank + r];
        if (composed) {
          eb = f * (eb + (fe + composedUnit) * (ab + eb)) + composedSubnormal;
          ab *= f;
        }
        error += eh * (ab + eb) + ah * eb;
        magnitude += (ah + eh) * (ab + eb);
      }
      return Math.abs(adapter.scale()) * (error + (rank * addition + 6 * U) * magnitude);
    }
  }

  /** Per element, how far the 16-bit copy of a factor may be from the factor. */
  private static double[] storageError(float[] values, FloatFormat format) {
    double[] error = new double[values.length];
    if (format != FloatFormat.FLOAT32 || FloatFormat.BFLOAT16.holds(values) || FloatFormat.FLOAT16.holds(values)) {
      return error;
    }
    double unit = storageUnit(values, format);
    double subnormal = Math.scalb(max(values), -35);
    for (int i = 0; i < error.length; i++) {
      error[i] = unit * Math.abs(values[i]) + subnormal;
    }
    return error;
  }

  /** Unit roundoff of the 16-bit type that holds a factor, and with it H. */
  private static double storageUnit(float[] values, FloatFormat format) {
    if (format != FloatFormat.FLOAT32) {
      return format.unitRoundoff();
    }
    if (FloatFormat.BFLOAT16.holds(values)) {
      return FloatFormat.BFLOAT16.unitRoundoff();
    }
    double min = Double.POSITIVE_INFINITY;
    for (float v : values) {
      min = v == 0 ? min : Math.min(min, Math.abs(v));
    }
    boolean wide = !FloatFormat.FLOAT16.holds(values) && max(values) > Math.scalb(min, 24);
    return (wide ? FloatFormat.BFLOAT16 : FloatFormat.FLOAT16).unitRoundoff();
  }

  /** What H is multiplied by, within a power of two, for the exponent that B is stored with. */
  private static double exponentOfB(OracleAdapter adapter) {
    boolean kept = adapter.bFormat() != FloatFormat.FLOAT32 || FloatFormat.BFLOAT16.holds(adapter.b())
        || FloatFormat.FLOAT16.holds(adapter.b());
    double max = max(adapter.b());
    return kept || max == 0 ? 1 : Math.scalb(max, -14);
  }

  private static double max(float[] values) {
    double max = 0;
    for (float v : values) {
      max = Math.max(max, Math.abs(v));
    }
    return max;
  }
}
