// SPDX-License-Identifier: Apache-2.0
package io.octolora.checkpoint;

import java.util.Objects;

/**
 * How the activations of an int8 layer meet its weights; the fields of {@code octolora_linear_desc} in octolora.h.
 *
 * @param mode what happens to x
 * @param roundXToF16 x is rounded to fp16 before it is measured or quantized, as bitsandbytes does
 * @param xScale {@link Mode#W8A8_STATIC}: real units per int8 step, above 0; 0 in other modes
 * @param xDivisor {@link Mode#W8A8_DYNAMIC}: steps that the row's absolute maximum spans, 127 or 127.5; 0 in other
 *     modes
 * @param outlierThreshold {@link Mode#W8A8_DYNAMIC}: columns with some |x| at or above it leave the int8 product;
 *     0 is off
 */
public record Quantization(
    Mode mode, boolean roundXToF16, float xScale, float xDivisor, float outlierThreshold) {

  /** In the order of the constants of octolora.h. */
  public enum Mode {
    /** x as it is, int8 weights widened in registers. */
    W8A16,
    /** One scale a row of x, from the row's absolute maximum. */
    W8A8_DYNAMIC,
    /** One given scale for all of x. */
    W8A8_STATIC
  }

  /**
   * Checks the numbers.
   *
   * @throws IllegalArgumentException for one outside what the parameters allow in this mode
   */
  public Quantization {
    Objects.requireNonNull(mode, "mode");
    boolean fixed = mode == Mode.W8A8_STATIC;
    boolean dynamic = mode == Mode.W8A8_DYNAMIC;
    require(fixed ? positive(xScale) : xScale == 0, mode, "xScale", xScale, fixed ? "above 0 and finite" : "0");
    require(dynamic ? positive(xDivisor) : xDivisor == 0, mode, "xDivisor", xDivisor,
        dynamic ? "above 0 and finite" : "0");
    require(dynamic ? outlierThreshold == 0 || positive(outlierThreshold) : outlierThreshold == 0, mode,
        "outlierThreshold", outlierThreshold, dynamic ? "0 or above and finite" : "0");
  }

  /** Float activations. */
  public static Quantization weightOnly() {
    return new Quantization(Mode.W8A16, false, 0, 0, 0);
  }

  /** bitsandbytes LLM.int8(): dynamic per row after rounding to fp16, divisor 127. */
  public static Quantization bitsandbytes(float outlierThreshold) {
    return new Quantization(Mode.W8A8_DYNAMIC, true, 0, 127, outlierThreshold);
  }

  /** Dynamic per row, {@code s_x = max |x| / divisor}, x as it is. */
  public static Quantization dynamic(float divisor) {
    return new Quantization(Mode.W8A8_DYNAMIC, false, 0, divisor, 0);
  }

  /** One scale for all of x: {@code q = clamp(rne(x / xScale), -128, 127)}. */
  public static Quantization fixed(float xScale) {
    return new Quantization(Mode.W8A8_STATIC, false, xScale, 0, 0);
  }

  /** The same with another threshold; 0 turns the outlier columns off. */
  public Quantization withOutlierThreshold(float threshold) {
    return new Quantization(mode, roundXToF16, xScale, xDivisor, threshold);
  }

  private static boolean positive(float value) {
    return value > 0 && Float.isFinite(value);
  }

  private static void require(boolean condition, Mode mode, String name, float value, String expected) {
    if (!condition) {
      throw new IllegalArgumentException("%s: %s = %s, expected %s".formatted(mode, name, value, expected));
    }
  }
}
