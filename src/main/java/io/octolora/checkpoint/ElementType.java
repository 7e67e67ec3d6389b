// SPDX-License-Identifier: Apache-2.0
package io.octolora.checkpoint;

import java.util.HashMap;
import java.util.Map;
import org.jetbrains.annotations.Nullable;

/** The element types of safetensors; a constant's name is the (case-sensitive) string in the file. */
public enum ElementType {
  /** A byte, 0 or 1. */
  BOOL(8),
  /** Unsigned. */
  U8(8),
  /** Signed: the codes of int8 weights. */
  I8(8),
  /** Float with 5 bits of exponent and 2 of mantissa. */
  F8_E5M2(8),
  /** Float with 4 bits of exponent and 3 of mantissa. */
  F8_E4M3(8),
  /** A power of two: 8 bits of exponent. */
  F8_E8M0(8),
  /** {@link #F8_E4M3} with one zero, no infinities and half the values. */
  F8_E4M3FNUZ(8),
  /** {@link #F8_E5M2} with one zero, no infinities and half the values. */
  F8_E5M2FNUZ(8),
  /** Signed. */
  I16(16),
  /** Unsigned. */
  U16(16),
  /** IEEE 754 binary16. */
  F16(16),
  /** The upper half of an {@link #F32}. */
  BF16(16),
  /** Signed. */
  I32(32),
  /** Unsigned. */
  U32(32),
  /** IEEE 754 binary32. */
  F32(32),
  /** Signed. */
  I64(64),
  /** Unsigned. */
  U64(64),
  /** IEEE 754 binary64. */
  F64(64),
  /** Complex: two of {@link #F32}. */
  C64(64),
  /** Float with 2 bits of exponent and 1 of mantissa, two in a byte. */
  F4(4),
  /** Float with 2 bits of exponent and 3 of mantissa, four in three bytes. */
  F6_E2M3(6),
  /** Float with 3 bits of exponent and 2 of mantissa, four in three bytes. */
  F6_E3M2(6);

  private static final Map<String, ElementType> BY_NAME = new HashMap<>();

  static {
    for (ElementType type : values()) {
      BY_NAME.put(type.name(), type);
    }
  }

  private final int bits;

  ElementType(int bits) {
    this.bits = bits;
  }

  /** Bits an element; below 8 elements are packed and a tensor still ends on a byte boundary. */
  public int bits() {
    return bits;
  }

  /** Whether this is {@link #F32}, {@link #F16} or {@link #BF16}: the types of unquantized weights and adapters. */
  public boolean isFloat() {
    return this == F32 || this == F16 || this == BF16;
  }

  static @Nullable ElementType ofName(String name) {
    return BY_NAME.get(name);
  }
}
