// SPDX-License-Identifier: Apache-2.0
package io.octolora.oracle;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertTrue;

import net.jqwik.api.ForAll;
import net.jqwik.api.Property;
import org.junit.jupiter.api.Test;

class FloatFormatTest {
  /** Java's own narrowing is the second opinion for fp32. */
  @Property
  void float32IsJavas(@ForAll double value) {
    assertEquals((double) (float) value, FloatFormat.FLOAT32.round(value));
  }

  /** bf16 is the upper half of an fp32: round to even by adding 0x7fff and the last kept bit. */
  @Property
  void bfloat16IsTheUpperHalf(@ForAll float value) {
    int bits = Float.floatToRawIntBits(value);
    float expected = Float.intBitsToFloat(bits + 0x7fff + (bits >>> 16 & 1) & 0xffff0000);
    assertEquals(expected, (float) FloatFormat.BFLOAT16.round(value));
  }

  @Property
  void errorStaysBelowItsBound(@ForAll float value) {
    for (FloatFormat format : FloatFormat.values()) {
      double rounded = format.round(value);
      assertTrue(Double.isInfinite(rounded) || Math.abs(rounded - value) <= format.roundingError(value),
          () -> format + " " + value);
      assertEquals(rounded, format.round(rounded));
    }
  }

  @Test
  void float16AtItsEdges() {
    FloatFormat f16 = FloatFormat.FLOAT16;
    assertEquals(65504, f16.round(65519.99));
    assertEquals(Double.POSITIVE_INFINITY, f16.round(65520));
    assertEquals(Double.NEGATIVE_INFINITY, f16.round(-1e9));
    assertEquals(0x1p-24, f16.round(0x1p-24));
    assertEquals(0, f16.round(0x1p-25)); // the tie between 0 and the smallest subnormal goes to even
    assertEquals(0x1p-24, f16.round(0x1.0002p-25));
    assertEquals(2048, f16.round(2049)); // a tie
    assertEquals(2052, f16.round(2051));
    assertTrue(Double.isNaN(f16.round(Double.NaN)));
  }

  @Test
  void unitsAreHalfUlps() {
    assertEquals(Math.ulp(1f) / 2, FloatFormat.FLOAT32.unitRoundoff());
    assertEquals(0x1p-11, FloatFormat.FLOAT16.unitRoundoff());
    assertEquals(0x1p-8, FloatFormat.BFLOAT16.unitRoundoff());
    assertEquals(Float.MIN_VALUE / 2.0, FloatFormat.FLOAT32.underflow());
    assertEquals(0x1p-25, FloatFormat.FLOAT16.underflow());
  }
}
