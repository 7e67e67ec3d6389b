// SPDX-License-Identifier: Apache-2.0
package io.octolora.checkpoint;

import java.util.HashMap;
import java.util.Map;
import org.jetbrains.annotations.Nullable;

/** The element types of safetensors; a constant's name is the (case-sensitive) string in the file. */
public enum ElementType {
  BOOL(8),
  U8(8),
  I8(8),
  F8_E5M2(8),
  F8_E4M3(8),
  F8_E8M0(8),
  F8_E4M3FNUZ(8),
  F8_E5M2FNUZ(8),
  I16(16),
  U16(16),
  F16(16),
  BF16(16),
  I32(32),
  U32(32),
  F32(32),
  I64(64),
  U64(64),
  F64(64),
  C64(64),
  F4(4),
  F6_E2M3(6),
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
