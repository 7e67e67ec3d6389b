// SPDX-License-Identifier: Apache-2.0
package io.octolora.oracle;

/** A binary floating-point format, as far as rounding to nearest even is concerned. */
public enum FloatFormat {
  FLOAT32(24, -149, Float.MAX_VALUE),
  FLOAT16(11, -24, 65504.0),
  BFLOAT16(8, -133, 0x1.FEp127);

  private final int precision;
  private final int minExponent;
  private final double max;

  /**
   * @param precision significant bits, the implicit one included
   * @param minExponent exponent of the smallest subnormal
   * @param max largest finite value
   */
  FloatFormat(int precision, int minExponent, double max) {
    this.precision = precision;
    this.minExponent = minExponent;
    this.max = max;
  }

  /** Largest relative error of one rounding in the normal range: half a unit in the last place, 2^-precision. */
  public double unitRoundoff() {
    return Math.scalb(1.0, -precision);
  }

  /** Largest absolute error of one rounding below the normal range: half of the smallest subnormal. */
  public double underflow() {
    return Math.scalb(0.5, minExponent);
  }

  /** A bound of one rounding of a value of this magnitude. */
  public double roundingError(double magnitude) {
    return unitRoundoff() * Math.abs(magnitude) + underflow();
  }

  /** The nearest value of this format, ties to even; beyond the range an infinity, as IEEE 754 asks. */
  public double round(double value) {
    if (value == 0 || Double.isNaN(value) || Double.isInfinite(value)) {
      return value;
    }
    int step = Math.max(Math.getExponent(value) - precision + 1, minExponent);
    // a power of two scales exactly, and rint rounds ties to even
    double rounded = Math.scalb(Math.rint(Math.scalb(value, -step)), step);
    return Math.abs(rounded) > max ? Math.copySign(Double.POSITIVE_INFINITY, value) : rounded;
  }

  /** Whether every value is one of this format. */
  public boolean holds(float[] values) {
    for (float value : values) {
      if (round(value) != value) {
        return false;
      }
    }
    return true;
  }

  /** In place. */
  public void roundAll(float[] values) {
    for (int i = 0; i < values.length; i++) {
      values[i] = (float) round(values[i]);
    }
  }
}
