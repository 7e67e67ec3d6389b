// SPDX-License-Identifier: Apache-2.0
package io.octolora.internal;

/** 16-bit floating-point numbers widened to float, which is always exact. */
public final class Halves {
  private Halves() {}

  /** IEEE 754 binary16: 1 sign, 5 exponent (bias 15), 10 fraction bits. NaN payloads are kept in the upper bits. */
  public static float fromFloat16(short half) {
    int sign = (half & 0x8000) << 16;
    int exponent = half >> 10 & 0x1f;
    int fraction = half & 0x3ff;
    if (exponent == 0) { // zero or subnormal: fraction · 2^-24
      float magnitude = fraction * 0x1p-24f;
      return sign == 0 ? magnitude : -magnitude;
    }
    int widened = exponent == 0x1f ? 0xff : exponent - 15 + 127;
    return Float.intBitsToFloat(sign | widened << 23 | fraction << 13);
  }

  /** bfloat16: the upper half of an fp32. */
  public static float fromBfloat16(short half) {
    return Float.intBitsToFloat(half << 16);
  }
}
