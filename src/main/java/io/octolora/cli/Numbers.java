// SPDX-License-Identifier: Apache-2.0
package io.octolora.cli;

/** Numbers as people read them. */
final class Numbers {
  private Numbers() {}

  /** "1.23e-04". */
  static String error(double value) {
    return "%.2e".formatted(value);
  }

  /** In units of a bound. */
  static String ratio(double value) {
    return value < 100 ? "%.3f".formatted(value) : "%.2e".formatted(value);
  }

  /** A share: two significant digits, "0.83 %". */
  static String percent(double share) {
    double value = 100 * share;
    if (!Double.isFinite(value)) {
      return "–";
    }
    return value >= 1e4 ? "%.1e %%".formatted(value) : value >= 9.95 ? "%.0f %%".formatted(value)
        : value >= 0.995 ? "%.1f %%".formatted(value) : value >= 0.00995 ? "%.2f %%".formatted(value)
        : value == 0 ? "0 %" : "%.1e %%".formatted(value);
  }
}
