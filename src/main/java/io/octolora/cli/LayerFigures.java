// SPDX-License-Identifier: Apache-2.0
package io.octolora.cli;

import io.octolora.checkpoint.BaseLinear;
import io.octolora.checkpoint.Quantization;
import io.octolora.cli.Verification.Weighted;
import io.octolora.oracle.FloatFormat;
import io.octolora.oracle.Oracle;
import io.octolora.oracle.Oracle.Arithmetic;
import io.octolora.oracle.OracleAdapter;
import io.octolora.oracle.OracleLinear;
import java.util.Arrays;
import java.util.List;
import java.util.stream.IntStream;
import org.jetbrains.annotations.Nullable;

/**
 * What the report tells of a layer beyond its errors, all computed by the oracle in double precision from the x that
 * the layer was run with.
 *
 * @param effect null without adapters
 * @param cost null without an unquantized base
 */
record LayerFigures(Outliers outliers, @Nullable Effect effect, @Nullable Cost cost) {
  /** Where a layer without outlier columns of its own is measured: bitsandbytes' default. */
  private static final float REFERENCE_THRESHOLD = 6;

  /**
   * Columns of x with a value at or above the threshold.
   *
   * @param active whether the layer treats them apart; otherwise they are shown for comparison
   * @param largest absolute value of each of the columns
   */
  record Outliers(float threshold, boolean active, int[] columns, float[] largest) {
    static Outliers of(Quantization how, float[] x, int k) {
      boolean active = how.mode() == Quantization.Mode.W8A8_DYNAMIC && how.outlierThreshold() > 0;
      float threshold = active ? how.outlierThreshold() : REFERENCE_THRESHOLD;
      float[] maximum = new float[k];
      for (int i = 0; i < x.length; i++) {
        maximum[i % k] = Math.max(maximum[i % k], Math.abs(x[i]));
      }
      int[] columns = IntStream.range(0, k).filter(c -> maximum[c] >= threshold).toArray();
      float[] largest = new float[columns.length];
      for (int i = 0; i < columns.length; i++) {
        largest[i] = maximum[columns[i]];
      }
      return new Outliers(threshold, active, columns, largest);
    }
  }

  /**
   * How much the adapters change y, element by element, in units of the root mean square of the base's y.
   *
   * @param share root mean square of the change
   * @param low 5 % of the changes are smaller
   * @param median half of the changes are smaller
   * @param high 95 % of the changes are smaller
   * @param histogram counts of changes, see {@link #bin}
   */
  record Effect(double share, double low, double median, double high, long[] histogram) {
    /** The histogram goes from 10^FIRST_DECADE on; what is smaller or larger is in its first or last bin. */
    static final int FIRST_DECADE = -5;
    static final int DECADES = 6;
    static final int BINS_PER_DECADE = 6;

    static Effect of(double[] base, double[] adapted) {
      double unit = rms(base);
      double[] changes = new double[base.length];
      long[] histogram = new long[DECADES * BINS_PER_DECADE];
      for (int i = 0; i < base.length; i++) {
        changes[i] = Math.abs(adapted[i] - base[i]) / unit;
        histogram[bin(changes[i])]++;
      }
      Arrays.sort(changes);
      return new Effect(rms(changes), quantile(changes, 0.05), quantile(changes, 0.5), quantile(changes, 0.95),
          histogram);
    }

    static int bin(double change) {
      int bin = (int) Math.floor((Math.log10(change) - FIRST_DECADE) * BINS_PER_DECADE); // 0 gives the least int
      return Math.max(0, Math.min(DECADES * BINS_PER_DECADE - 1, bin));
    }

    private static double quantile(double[] sorted, double share) {
      return sorted[(int) Math.floor(share * (sorted.length - 1))];
    }
  }

  /**
   * What int8 loses against the unquantized layer: norms of differences over norms.
   *
   * @param weight of W
   * @param output of y without adapters, where x is quantized too if the layer does that
   */
  record Cost(double weight, double output) {
    static Cost of(OracleLinear linear, BaseLinear original, float[] x, int rows, double[] y) {
      int n = linear.n();
      int k = linear.k();
      double weightDifference = 0;
      double weightNorm = 0;
      double outputDifference = 0;
      double outputNorm = 0;
      float[] bias = original.bias();
      for (int channel = 0; channel < n; channel++) {
        float[] row = original.weight().toFloats((long) channel * k, k);
        double scale = linear.scale()[linear.scale().length == 1 ? 0 : channel];
        for (int c = 0; c < k; c++) {
          weightNorm += (double) row[c] * row[c];
          weightDifference += square(row[c] - scale * linear.weightAt(channel, c));
        }
        for (int m = 0; m < rows; m++) {
          double sum = bias == null ? 0 : bias[channel];
          for (int c = 0; c < k; c++) {
            sum += (double) x[m * k + c] * row[c];
          }
          outputNorm += sum * sum;
          outputDifference += square(y[m * n + channel] - sum);
        }
      }
      return new Cost(share(weightDifference, weightNorm), share(outputDifference, outputNorm));
    }

    /** Nothing of nothing is no loss. */
    private static double share(double difference, double norm) {
      return difference == 0 ? 0 : Math.sqrt(difference / norm);
    }
  }

  /** @param original the layer before it was quantized, of the same size, or null */
  static LayerFigures of(BaseLinear base, Quantization how, List<Weighted> adapters, float[] x, int rows,
      FloatFormat xFormat, Arithmetic arithmetic, @Nullable BaseLinear original) {
    OracleLinear linear = OracleLinear.of(base, how);
    List<OracleAdapter> plain = adapters.stream().map(Verification::plain).toList();
    double[] y = Oracle.evaluate(linear, x, rows, xFormat, xFormat, arithmetic).value();
    Effect effect = plain.isEmpty() ? null
        : Effect.of(y, Oracle.evaluate(linear, plain, x, rows, xFormat, xFormat, arithmetic).value());
    Cost cost = original == null ? null : Cost.of(linear, original, x, rows, y);
    return new LayerFigures(Outliers.of(how, x, base.k()), effect, cost);
  }

  private static double square(double value) {
    return value * value;
  }

  private static double rms(double[] values) {
    return Math.sqrt(Arrays.stream(values).map(LayerFigures::square).average().orElse(0));
  }
}
