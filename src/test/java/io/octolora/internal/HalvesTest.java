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
}
