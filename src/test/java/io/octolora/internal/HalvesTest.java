// SPDX-License-Identifier: Apache-2.0
package io.octolora.internal;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertTrue;

import org.junit.jupiter.api.Test;

class HalvesTest {
  /** Every bit pattern against the definition in double arithmetic. */
  @Test
  void float16IsWidenedExactly() {
    for (int bits = 0; bits < 1 << 16; bits++) {
      int exponent = bits >> 10 & 31;
      double fraction = (bits & 1023) / 1024.0;
      double sign = bits < 1 << 15 ? 1 : -1;
      float actual = Halves.fromFloat16((short) bits);
      if (exponent == 31 && fraction != 0) {
        assertTrue(Float.isNaN(actual), Integer.toHexString(bits));
        continue;
      }
      double expected = exponent == 31 ? sign / 0.0
          : exponent == 0 ? sign * fraction * Math.pow(2, -14) : sign * (1 + fraction) * Math.pow(2, exponent - 15);
      assertEquals(Float.floatToRawIntBits((float) expected), Float.floatToRawIntBits(actual),
          Integer.toHexString(bits));
    }
  }

  @Test
  void bfloat16IsTheUpperHalf() {
    for (int bits = 0; bits < 1 << 16; bits++) {
      assertEquals(bits << 16, Float.floatToRawIntBits(Halves.fromBfloat16((short) bits)));
    }
  }

  /** Every pair of neighbours: each is kept, and what lies between goes to the nearer, the middle to the even one. */
  @Test
  void roundingGoesToTheNearestEven() {
    for (int bits = 0; bits < 0x7f80; bits++) {
      if (bits < 0x7c00) {
        double next = bits == 0x7bff ? 65536 : Halves.fromFloat16((short) (bits + 1));
        float middle = (float) ((Halves.fromFloat16((short) bits) + next) / 2);
        assertNeighbours(bits, middle, Halves::toFloat16, Halves.fromFloat16((short) bits));
      }
      double next = bits == 0x7f7f ? 0x1p128 : Halves.fromBfloat16((short) (bits + 1));
      float middle = (float) ((Halves.fromBfloat16((short) bits) + next) / 2);
      assertNeighbours(bits, middle, Halves::toBfloat16, Halves.fromBfloat16((short) bits));
    }
  }

  @FunctionalInterface
  private interface Rounding {
    short of(float value);
  }

  private static void assertNeighbours(int bits, float middle, Rounding rounding, float value) {
    int even = bits + (bits & 1);
    assertEquals((short) bits, rounding.of(value));
    assertEquals((short) (bits | 0x8000), rounding.of(-value));
    assertEquals((short) bits, rounding.of(Math.nextDown(middle)));
    assertEquals((short) even, rounding.of(middle));
    assertEquals((short) (even | 0x8000), rounding.of(-middle));
    assertEquals((short) (bits + 1), rounding.of(Math.nextUp(middle)));
  }

  @Test
  void whatIsNoNumberStaysSo() {
    for (int bits : new int[] {0x7f800001, 0x7fc00000, 0x7fffffff, 0xffffffff, 0xff800001}) {
      float nan = Float.intBitsToFloat(bits);
      assertTrue(Float.isNaN(Halves.fromFloat16(Halves.toFloat16(nan))), Integer.toHexString(bits));
      assertTrue(Float.isNaN(Halves.fromBfloat16(Halves.toBfloat16(nan))), Integer.toHexString(bits));
    }
    assertEquals((short) 0x7c00, Halves.toFloat16(Float.POSITIVE_INFINITY));
    assertEquals((short) 0xff80, Halves.toBfloat16(Float.NEGATIVE_INFINITY));
  }
}
