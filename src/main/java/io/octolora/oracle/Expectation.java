// SPDX-License-Identifier: Apache-2.0
package io.octolora.oracle;

/**
 * What a product should be, element by element: {@code value[rows,n]} with {@code bound[rows,n]}, the largest distance
 * that the roundings of the computation under test can explain. Row-major. A value that is not finite asks for the
 * same: NaN for NaN, an infinity for that of its sign.
 */
public record Expectation(int rows, int n, double[] value, double[] bound) {
  public Expectation {
    if (value.length != (long) rows * n || bound.length != value.length) {
      throw new IllegalArgumentException("value has %d and bound %d elements, expected rows %d x n %d = %d"
          .formatted(value.length, bound.length, rows, n, (long) rows * n));
    }
  }

  /** The same values, each bound widened by the distance to {@code other} and by its bound (triangle inequality). */
  public Expectation against(Expectation other) {
    if (other.rows != rows || other.n != n) {
      throw new IllegalArgumentException("[%d,%d] against [%d,%d]".formatted(rows, n, other.rows, other.n));
    }
    double[] wide = new double[bound.length];
    for (int i = 0; i < wide.length; i++) {
      wide[i] = bound[i] + Math.abs(value[i] - other.value[i]) + other.bound[i];
    }
    return new Expectation(rows, n, value, wide);
  }

  /** How far {@code y[rows,n]} is from the values. */
  public Deviation compare(float[] y) {
    double[] wide = new double[y.length];
    for (int i = 0; i < y.length; i++) {
      wide[i] = y[i];
    }
    return compare(wide);
  }

  /** How far {@code y[rows,n]} is from the values. */
  public Deviation compare(double[] y) {
    return deviation(y, value, bound, n);
  }

  /** How far {@code y} is from {@code target}, in units of this bound. */
  public Deviation compare(float[] y, float[] target) {
    double[] a = new double[y.length];
    double[] b = new double[target.length];
    for (int i = 0; i < a.length; i++) {
      a[i] = y[i];
      b[i] = target[i];
    }
    return deviation(a, b, bound, n);
  }

  private static Deviation deviation(double[] y, double[] target, double[] bound, int n) {
    if (y.length != target.length || y.length != bound.length) {
      throw new IllegalArgumentException("%d results against %d values".formatted(y.length, target.length));
    }
    double maxError = 0;
    double maxRatio = 0;
    int worst = 0;
    for (int i = 0; i < y.length; i++) {
      double error;
      double ratio;
      if (!Double.isFinite(target[i])) {
        error = Double.compare(y[i], target[i]) == 0 ? 0 : Double.POSITIVE_INFINITY;
        ratio = error;
      } else {
        error = Double.isNaN(y[i]) ? Double.POSITIVE_INFINITY : Math.abs(y[i] - target[i]);
        ratio = error == 0 ? 0 : error / bound[i];
        // a bound that is not a number proves nothing
        ratio = Double.isNaN(ratio) ? Double.POSITIVE_INFINITY : ratio;
      }
      maxError = Math.max(maxError, error);
      if (ratio > maxRatio) {
        maxRatio = ratio;
        worst = i;
      }
    }
    return new Deviation(maxError, maxRatio, n == 0 ? 0 : worst / n, n == 0 ? 0 : worst % n);
  }

  /**
   * @param maxError largest absolute distance
   * @param maxRatio largest distance in units of its own element's bound: up to 1 is explained by rounding
   * @param row of the element with the largest ratio
   * @param channel of the element with the largest ratio
   */
  public record Deviation(double maxError, double maxRatio, int row, int channel) {
    public boolean withinBound() {
      return maxRatio <= 1;
    }
  }
}
