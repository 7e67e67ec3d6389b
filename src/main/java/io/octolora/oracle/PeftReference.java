// SPDX-License-Identifier: Apache-2.0
package io.octolora.oracle;

import io.octolora.checkpoint.Quantization;
import java.util.List;
import java.util.stream.IntStream;
import org.jetbrains.annotations.Nullable;

/**
 * What PEFT over bitsandbytes, Quanto or torch's own Linear computes for one layer, in double precision, with a bound
 * of its roundings: the judge of recorded outputs.
 *
 * <p>Roundings of <i>operands</i> are a function of the files, so they are carried out here. Those of <i>results</i>
 * depend on the order of summation, so each is a term of the bound. {@code X} is the type of x (and of the result),
 * {@code T} the type of A and B at run time, {@code u = 2^-24}, {@code rd(F, v)} half a unit in the last place of v in
 * F: {@code 2^-11 |v|} for fp16, {@code 2^-8 |v|} for bf16, with v taken at its largest.
 *
 * <p><b>bitsandbytes</b> ({@code MatMul8bitLt}, row-wise codes of fp16(x), threshold t):
 * <ol>
 *   <li>codes: the tool divides 127 by the row's maximum with an approximate division (2 units in the last place), so
 *       a code whose unrounded value lies within 2^-20, relative, of a tie may be the neighbour: {@code s_x s_w |W|}
 *   <li>{@code acc * rs * SCB / 127^2} in fp32 with a constant of seven digits: {@code 6 u + 2^-23} relative
 *   <li>stored as fp16: {@code rd(fp16)}; a bias that is not fp16 is added to that and rounded again: {@code rd(fp16)}
 *   <li>cast to X: {@code rd(X)}
 *   <li>outlier columns: W dequantized to X (an operand; where two fp32 roundings could move it over a tie, both
 *       neighbours are allowed), the sum accumulated in fp32, {@code (|O| + 1) u sum|x||W|}, and, because PyTorch lets
 *       cuBLAS reduce partial sums in X, stored before it is added: {@code rd(X)} of the outlier part; added to the
 *       result: {@code rd(X)}
 * </ol>
 *
 * <p><b>Quanto</b>, weight-only: {@code s_w W} is rounded to X (operand); the product accumulates in fp32,
 * {@code (K + 1) u sum|x||W|}, and is stored in X, {@code rd(X)}; the bias is added in X, {@code rd(X)}.
 *
 * <p><b>torch</b>, an unquantized layer whose weight has type X: the same with W as it is. A bias added before the
 * product is stored rounds less, which the bound covers.
 *
 * <p><b>PEFT</b>, per active adapter in turn: x, A and B are cast to T (operands); {@code x A^T}: {@code (K + 1) u
 * sum|x||A| + rd(T)}; times {@code B^T} (+ bias): the former through |B|, {@code (r + 2) u sum|H||B| + rd(T)}; times
 * the scaling: {@code rd(T)}; cast to X where T differs: {@code rd(X)}; added to the result: {@code rd(X)}.
 *
 * <p><b>DoRA</b> in PEFT, with z = result - bias in X, {@code rd(X)}: {@code result + (g - 1) z + g s B(A(x))} in fp32
 * or T, {@code rd(T)} for each of four results, cast to X: {@code rd(X)}. g = magnitude / norm of the row of W + s B A,
 * all in T: of each element {@code 2 rd(T)} of |W| and five of s |B||A|, and {@code (r + 4) u}; their length by the
 * norm, and {@code (K + 8) u + 4 rd(T)} beside them, are the relative error of g.
 */
public final class PeftReference {
  private static final double U = Math.scalb(1.0, -24);

  private PeftReference() {}

  /** The program that multiplies by the int8 weights. */
  public enum BaseTool { BITSANDBYTES, QUANTO }

  /**
   * @param x {@code [rows,k]}, values of {@code xFormat}
   * @param xFormat type of x and of the result
   * @param factorFormats type of A and B at run time, one an adapter
   */
  public static Expectation evaluate(BaseTool tool, OracleLinear linear, List<OracleAdapter> adapters,
      List<FloatFormat> factorFormats, float[] x, int rows, FloatFormat xFormat) {
    double[] value = new double[rows * linear.n()];
    double[] bound = new double[rows * linear.n()];
    if (tool == BaseTool.BITSANDBYTES) {
      bitsandbytes(linear, x, rows, xFormat, value, bound);
    } else {
      quanto(linear, x, rows, xFormat, value, bound);
    }
    Weight weight = (channel, column) ->
        (double) linear.scaleOf(channel) * linear.weight()[channel * linear.k() + column];
    return withAdapters(weight, linear.bias(), linear.n(), linear.k(), adapters, factorFormats, x, rows, xFormat, value,
        bound);
  }

  /**
   * The same for an unquantized layer.
   *
   * @param weight {@code [n,k]}, values of {@code xFormat}
   * @param bias {@code [n]}, or null
   */
  public static Expectation evaluateUnquantized(float[] weight, float @Nullable [] bias, int n,
      List<OracleAdapter> adapters, List<FloatFormat> factorFormats, float[] x, int rows, FloatFormat xFormat) {
    int k = weight.length / n;
    double[] value = new double[rows * n];
    double[] bound = new double[rows * n];
    Weight at = (channel, column) -> weight[channel * k + column];
    product(at, n, k, bias, x, rows, xFormat, value, bound);
    return withAdapters(at, bias, n, k, adapters, factorFormats, x, rows, xFormat, value, bound);
  }

  private static Expectation withAdapters(Weight weight, float @Nullable [] bias, int n, int k,
      List<OracleAdapter> adapters, List<FloatFormat> factorFormats, float[] x, int rows, FloatFormat xFormat,
      double[] value, double[] bound) {
    if (factorFormats.size() != adapters.size()) {
      throw new IllegalArgumentException("%d adapters, %d types".formatted(adapters.size(), factorFormats.size()));
    }
    for (int i = 0; i < adapters.size(); i++) {
      addAdapter(weight, bias, adapters.get(i), factorFormats.get(i), x, rows, n, k, xFormat, value, bound);
    }
    return new Expectation(rows, n, value, bound);
  }

  private static void bitsandbytes(OracleLinear linear, float[] x, int rows, FloatFormat xFormat, double[] value,
      double[] bound) {
    int n = linear.n();
    int k = linear.k();
    Quantization how = linear.quantization();
    if (how.mode() != Quantization.Mode.W8A8_DYNAMIC || !how.roundXToF16()) {
      throw new IllegalArgumentException("not a bitsandbytes layer: " + how);
    }
    Oracle.Quantized quantized = Oracle.quantize(how, x, rows, k);
    byte[] codes = quantized.codes();
    int[] outlierColumns = quantized.outlierColumns();
    int[][] nearTie = new int[rows][];
    for (int m = 0; m < rows; m++) {
      int row = m * k;
      nearTie[m] = IntStream.range(0, k)
          .filter(c -> !quantized.outlier()[c] && nearTie(Math.abs(quantized.scaled()[row + c]))).toArray();
    }
    byte[] weights = linear.weight();
    IntStream.range(0, n).parallel().forEach(channel -> {
      double sw = linear.scaleOf(channel);
      for (int m = 0; m < rows; m++) {
        double sx = quantized.rowScale()[m];
        long sum = 0;
        for (int c = 0; c < k; c++) {
          sum += codes[m * k + c] * weights[channel * k + c];
        }
        long ties = 0;
        for (int c : nearTie[m]) {
          ties += Math.abs(weights[channel * k + c]);
        }
        double outliers = 0;
        double magnitude = 0;
        double moved = 0;
        for (int c : outlierColumns) {
          double xv = x[m * k + c];
          double w = sw * weights[channel * k + c];
          double rounded = xFormat.round(w);
          outliers += xv * rounded;
          magnitude += Math.abs(xv * rounded);
          moved += Math.abs(xv) * Math.abs(xFormat.round(w * (1 + 4 * U)) - xFormat.round(w * (1 - 4 * U)));
        }
        double y = sx * sw * sum;
        double e = sx * sw * ties + (6 * U + 2 * U) * Math.abs(y);
        e += FloatFormat.FLOAT16.roundingError(Math.abs(y) + e);
        if (linear.bias() != null) {
          y += linear.bias()[channel];
          e += FloatFormat.FLOAT16.roundingError(Math.abs(y) + e);
        }
        e += xFormat.roundingError(Math.abs(y) + e);
        if (outlierColumns.length > 0) {
          y += outliers;
          e += moved + (outlierColumns.length + 1) * U * (magnitude + Math.abs(y)) + xFormat.roundingError(outliers);
          e += xFormat.roundingError(Math.abs(y) + e);
        }
        value[m * n + channel] = y;
        bound[m * n + channel] = e;
      }
    });
  }

  private static boolean nearTie(double magnitude) {
    return Math.abs(magnitude - Math.floor(magnitude) - 0.5) <= Math.scalb(magnitude, -20);
  }

  private static void quanto(OracleLinear linear, float[] x, int rows, FloatFormat xFormat, double[] value,
      double[] bound) {
    if (linear.quantization().mode() != Quantization.Mode.W8A16) {
      throw new IllegalArgumentException("not a weight-only Quanto layer: " + linear.quantization());
    }
    int k = linear.k();
    product((channel, column) ->
        xFormat.round((double) linear.scaleOf(channel) * linear.weight()[channel * k + column]), linear.n(), k,
        linear.bias(), x, rows, xFormat, value, bound);
  }

  private interface Weight {
    double at(int channel, int column);
  }

  /** x · Wᵀ (+ bias) in the type of x. */
  private static void product(Weight weight, int n, int k, float @Nullable [] bias, float[] x, int rows,
      FloatFormat xFormat, double[] value, double[] bound) {
    IntStream.range(0, n).parallel().forEach(channel -> {
      double[] w = new double[k];
      for (int c = 0; c < k; c++) {
        w[c] = weight.at(channel, c);
      }
      for (int m = 0; m < rows; m++) {
        double y = 0;
        double magnitude = 0;
        for (int c = 0; c < k; c++) {
          y += x[m * k + c] * w[c];
          magnitude += Math.abs(x[m * k + c] * w[c]);
        }
        double e = (k + 1) * U * magnitude;
        e += xFormat.roundingError(Math.abs(y) + e);
        if (bias != null) {
          y += bias[channel];
          e += xFormat.roundingError(Math.abs(y) + e);
        }
        value[m * n + channel] = y;
        bound[m * n + channel] = e;
      }
    });
  }

  private static void addAdapter(Weight weight, float @Nullable [] baseBias, OracleAdapter adapter, FloatFormat type,
      float[] x, int rows, int n, int k, FloatFormat xFormat, double[] value, double[] bound) {
    int rank = adapter.rank();
    float[] xs = cast(x, type);
    float[] a = cast(adapter.a(), type);
    float[] b = cast(adapter.b(), type);
    float[] beta = adapter.bias() == null ? null : cast(adapter.bias(), type);
    double[] g = new double[n];
    double[] ge = new double[n];
    if (adapter.magnitude() != null) {
      factors(weight, adapter, a, b, type, n, k, g, ge);
    }
    IntStream.range(0, rows).parallel().forEach(m -> {
      double[] h = new double[rank];
      double[] he = new double[rank];
      for (int r = 0; r < rank; r++) {
        double sum = 0;
        double magnitude = 0;
        for (int c = 0; c < k; c++) {
          double product = (double) xs[m * k + c] * a[r * k + c];
          sum += product;
          magnitude += Math.abs(product);
        }
        h[r] = sum;
        he[r] = (k + 1) * U * magnitude;
        he[r] += type.roundingError(Math.abs(sum) + he[r]);
      }
      for (int channel = 0; channel < n; channel++) {
        double d = beta == null ? 0 : beta[channel];
        double e = 0;
        double magnitude = Math.abs(d);
        for (int r = 0; r < rank; r++) {
          double bv = b[channel * rank + r];
          d += h[r] * bv;
          e += he[r] * Math.abs(bv);
          magnitude += (Math.abs(h[r]) + he[r]) * Math.abs(bv);
        }
        e += (rank + 2) * U * magnitude;
        e += type.roundingError(Math.abs(d) + e);
        d *= adapter.scale();
        e *= Math.abs(adapter.scale());
        e += type.roundingError(Math.abs(d) + e);
        int i = m * n + channel;
        if (adapter.magnitude() != null) {
          double bias = baseBias == null ? 0 : baseBias[channel];
          double z = value[i] - bias;
          double ze = baseBias == null ? 0 : xFormat.roundingError(Math.abs(z) + bound[i]);
          double factor = Math.abs(g[channel]);
          double terms = (1 + factor) * (Math.abs(z) + bound[i] + ze) + factor * (Math.abs(d) + e);
          bound[i] = factor * bound[i] + Math.abs(g[channel] - 1) * ze + factor * e
              + factor * ge[channel] * (Math.abs(z) + bound[i] + ze + Math.abs(d) + e) + 8 * U * terms
              + (type == FloatFormat.FLOAT32 ? 0 : 4 * type.roundingError(terms));
          value[i] = bias + g[channel] * (z + d);
          bound[i] += xFormat.roundingError(Math.abs(value[i]) + bound[i]);
          continue;
        }
        if (type != xFormat) {
          e += xFormat.roundingError(Math.abs(d) + e);
        }
        value[i] += d;
        bound[i] += e;
        bound[i] += xFormat.roundingError(Math.abs(value[i]) + bound[i]);
      }
    });
  }

  /** g and its relative error, of every channel. */
  private static void factors(Weight weight, OracleAdapter adapter, float[] a, float[] b, FloatFormat type, int n,
      int k, double[] g, double[] error) {
    int rank = adapter.rank();
    double unit = type == FloatFormat.FLOAT32 ? 0 : type.unitRoundoff();
    IntStream.range(0, n).parallel().forEach(channel -> {
      double square = 0;
      double errorSquare = 0;
      for (int c = 0; c < k; c++) {
        double w = weight.at(channel, c);
        double sum = 0;
        double magnitude = 0;
        for (int r = 0; r < rank; r++) {
          sum += (double) b[channel * rank + r] * a[r * k + c];
          magnitude += Math.abs((double) b[channel * rank + r] * a[r * k + c]);
        }
        double element = w + adapter.scale() * sum;
        double parts = Math.abs(adapter.scale()) * magnitude;
        double lost = (rank + 4) * U * (parts + Math.abs(w)) + unit * (2 * Math.abs(w) + 5 * parts);
        square += element * element;
        errorSquare += lost * lost;
      }
      g[channel] = adapter.magnitude()[channel] / Math.sqrt(square);
      error[channel] = Math.sqrt(errorSquare / square) + (k + 8) * U + 4 * unit;
    });
  }

  private static float[] cast(float[] values, FloatFormat type) {
    float[] copy = values.clone();
    type.roundAll(copy);
    return copy;
  }
}
