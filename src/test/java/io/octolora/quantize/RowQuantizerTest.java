// SPDX-License-Identifier: Apache-2.0
package io.octolora.quantize;

import static org.junit.jupiter.api.Assertions.assertArrayEquals;
import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertTrue;

import io.octolora.checkpoint.ElementType;
import io.octolora.internal.Halves;
import java.util.Random;
import java.util.stream.Stream;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.Arguments;
import org.junit.jupiter.params.provider.MethodSource;

class RowQuantizerTest {
  private static final float[] ROW_A = {127, 0.5f, 1.5f, 2.5f, -2.5f, -126.5f, -127, 64};
  private static final float[] ROW_B = {1, -0.5f, 0.25f, -0.75f, 0.126953125f, -1, 0, 0.3330078125f};

  /** What the CPU code of bitsandbytes and Quanto gave for the two rows, and the formula of compressed-tensors. */
  static Stream<Arguments> vectors() {
    return Stream.of(
        Arguments.of(TargetFormat.BITSANDBYTES, ElementType.F32, ROW_A, "127 0 2 2 -2 -126 -127 64", 127f),
        Arguments.of(TargetFormat.BITSANDBYTES, ElementType.F32, ROW_B, "127 -64 32 -95 16 -127 0 42", 1f),
        Arguments.of(TargetFormat.QUANTO, ElementType.F32, ROW_A, "127 0 2 2 -2 -126 -127 64", 1f),
        Arguments.of(TargetFormat.QUANTO, ElementType.F32, ROW_B, "127 -64 32 -95 16 -127 0 42", 0.00787401572f),
        Arguments.of(TargetFormat.QUANTO, ElementType.BF16, ROW_A, "127 0 2 2 -2 -126 -127 64", 1f),
        Arguments.of(TargetFormat.QUANTO, ElementType.BF16, ROW_B, "127 -64 32 -96 16 -127 0 42", 0.00787353516f),
        Arguments.of(TargetFormat.COMPRESSED_TENSORS, ElementType.F32, ROW_A, "127 1 2 3 -3 -127 -128 64",
            0.996078432f),
        Arguments.of(TargetFormat.COMPRESSED_TENSORS, ElementType.F32, ROW_B, "127 -64 32 -96 16 -127 0 42",
            0.00784313772f));
  }

  @ParameterizedTest
  @MethodSource("vectors")
  void checkVectors(TargetFormat format, ElementType type, float[] row, String expected, float scale) {
    byte[] codes = new byte[row.length];
    float stored = RowQuantizer.of(format, type).quantize(row.clone(), 0, row.length, codes);
    assertEquals(expected, text(codes));
    assertEquals(scale, stored);
  }

  @Test
  void aRowOfZeros() {
    for (ElementType type : new ElementType[] {ElementType.F32, ElementType.F16, ElementType.BF16}) {
      for (TargetFormat format : TargetFormat.values()) {
        byte[] codes = {1, 1};
        float stored = RowQuantizer.of(format, type).quantize(new float[] {0, -0f}, 0, 2, codes);
        assertArrayEquals(new byte[2], codes);
        // compressed-tensors puts the type's epsilon in place of a scale of 0
        float epsilon = type == ElementType.F32 ? 0x1p-23f : type == ElementType.F16 ? 0x1p-10f : 0x1p-7f;
        assertEquals(format == TargetFormat.COMPRESSED_TENSORS ? epsilon : 0, stored, format + " " + type);
      }
    }
  }

  @Test
  void valuesWithoutACode() {
    for (TargetFormat format : TargetFormat.values()) {
      RowQuantizer quantizer = RowQuantizer.of(format, ElementType.F32);
      for (float bad : new float[] {Float.NaN, Float.POSITIVE_INFINITY, Float.NEGATIVE_INFINITY}) {
        assertEquals(Float.NaN, quantizer.quantize(new float[] {1, bad, 2}, 0, 3, new byte[3]), format + " " + bad);
      }
    }
    // 65520 is the least number that fp16 rounds to infinity
    RowQuantizer bitsandbytes = RowQuantizer.of(TargetFormat.BITSANDBYTES, ElementType.F32);
    assertEquals(Float.NaN, bitsandbytes.quantize(new float[] {65520}, 0, 1, new byte[1]));
    assertEquals(65504, bitsandbytes.quantize(new float[] {Math.nextDown(65520f)}, 0, 1, new byte[1]));
  }

  @Test
  void theCastToFp16ComesFirst() {
    // fp16 has steps of 2^-10 from 1 on: 1 + 2^-11 is a tie and becomes 1, so both have the absmax 1
    byte[] codes = new byte[2];
    RowQuantizer quantizer = RowQuantizer.of(TargetFormat.BITSANDBYTES, ElementType.F32);
    assertEquals(1, quantizer.quantize(new float[] {1 + 0x1p-11f, -1}, 0, 2, codes));
    assertArrayEquals(new byte[] {127, -127}, codes);
  }

  /**
   * The hardware's reciprocal is a neighbour of the exact one, so where it is not the nearest fp32 the exact one lies
   * between the two. A wrong entry would be on the right side by luck alone.
   */
  @Test
  void theReciprocalIsOneOfTheTwoNeighbours() {
    int corrected = 0;
    for (int bits = 1; bits < 0x7c00; bits++) {
      float value = Halves.fromFloat16((short) bits);
      float reciprocal = RowQuantizer.Bitsandbytes.reciprocal(value);
      float nearest = 1 / value;
      if (reciprocal != nearest) {
        corrected++;
        assertEquals(Math.ulp(Math.min(reciprocal, nearest)), Math.abs(reciprocal - nearest), "1 / " + value);
        // 24 bits times 11 bits are exact in double
        double below = (double) value * Math.min(reciprocal, nearest);
        double above = (double) value * Math.max(reciprocal, nearest);
        assertTrue(below < 1 && 1 < above, "1 / %s is not between %s and %s".formatted(value, reciprocal, nearest));
      }
    }
    // of 1024 fractions 40 lie below and 90 above, in each of 30 exponents; subnormal numbers have some of them
    assertTrue(corrected >= 30 * 130, corrected + " corrected");
  }

  @Test
  void theReciprocalOfTheGpu() {
    // bits that an H200 gave: below the nearest for 6, 32 and 1016, above it for 11
    int[] fractions = {0, 6, 11, 32, 512, 1016, 1023};
    int[] expected = {0x3f800000, 0x3f7e823c, 0x3f7d477c, 0x3f783e0f, 0x3f2aaaab, 0x3f008080, 0x3f001002};
    for (int i = 0; i < fractions.length; i++) {
      for (int exponent : new int[] {-14, 0, 15}) {
        float value = Math.scalb(1 + fractions[i] / 1024f, exponent);
        assertEquals(Math.scalb(Float.intBitsToFloat(expected[i]), -exponent),
            RowQuantizer.Bitsandbytes.reciprocal(value), fractions[i] + " 2^" + exponent);
      }
    }
  }

  @Test
  void onlyTheGivenPartIsTouched() {
    float[] values = {9, 1, 2, 9};
    byte[] codes = {5, 5, 5, 5};
    assertEquals(2, RowQuantizer.of(TargetFormat.BITSANDBYTES, ElementType.F32).quantize(values, 1, 2, codes));
    assertArrayEquals(new byte[] {5, 64, 127, 5}, codes); // 63.5 to even
  }

  /**
   * A code is the nearest integer to w / s up to the roundings on the way: with u the unit roundoff of the arithmetic
   * (2^-24, 2^-11, 2^-8), the scale, the quotient and for bitsandbytes the reciprocal and the factor are each off by
   * at most two u of 128, so |w - s·q| is at most s·(1/2 + 128·5u); the scale itself may also end the range half a
   * step early (a quotient of 127.5 is cut to 127, another half step).
   */
  @Test
  void codesStandForTheWeights() {
    Random random = new Random(4);
    for (ElementType type : new ElementType[] {ElementType.F32, ElementType.F16, ElementType.BF16}) {
      for (TargetFormat format : TargetFormat.values()) {
        for (int trial = 0; trial < 200; trial++) {
          float[] row = new float[1 + random.nextInt(64)];
          double size = Math.scalb(1.0, random.nextInt(12) - 8);
          for (int i = 0; i < row.length; i++) {
            row[i] = round((float) (random.nextGaussian() * size), type);
          }
          byte[] codes = new byte[row.length];
          float stored = RowQuantizer.of(format, type).quantize(row.clone(), 0, row.length, codes);
          double step = format == TargetFormat.BITSANDBYTES ? stored / 127.0 : stored;
          double u = format == TargetFormat.BITSANDBYTES || type == ElementType.F16 ? 0x1p-11
              : type == ElementType.BF16 ? 0x1p-8 : 0x1p-24;
          for (int i = 0; i < row.length; i++) {
            double half = Math.abs(codes[i]) >= 127 ? 1 : 0.5;
            double error = Math.abs(row[i] - step * codes[i]);
            assertTrue(error <= step * (half + 128 * 5 * u) + 0x1p-24, "%s %s: %s as %d x %s, error %s".formatted(
                format, type, row[i], codes[i], step, error));
          }
        }
      }
    }
  }

  private static float round(float value, ElementType type) {
    return switch (type) {
      case F16 -> Halves.fromFloat16(Halves.toFloat16(value));
      case BF16 -> Halves.fromBfloat16(Halves.toBfloat16(value));
      default -> value;
    };
  }

  private static String text(byte[] codes) {
    StringBuilder text = new StringBuilder();
    for (byte code : codes) {
      text.append(text.length() == 0 ? "" : " ").append(code);
    }
    return text.toString();
  }
}
