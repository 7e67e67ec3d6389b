// SPDX-License-Identifier: Apache-2.0
package io.octolora.runtime;

import io.octolora.checkpoint.ElementType;

/** Element type of activations and adapters, in the order of the constants of {@code octolora.h}. */
public enum DataType {
  /** IEEE 754 binary32. */
  FLOAT32(4),
  /** IEEE 754 binary16. */
  FLOAT16(2),
  /** The upper half of a {@link #FLOAT32}. */
  BFLOAT16(2);

  private final int bytes;

  DataType(int bytes) {
    this.bytes = bytes;
  }

  /** Bytes of one element. */
  public int bytes() {
    return bytes;
  }

  /** The number of this type in the C ABI. */
  int code() {
    return ordinal();
  }

  /**
   * The type of a tensor's elements.
   *
   * @throws IllegalArgumentException for every other type than F32, F16 and BF16
   */
  public static DataType of(ElementType type) {
    return switch (type) {
      case F32 -> FLOAT32;
      case F16 -> FLOAT16;
      case BF16 -> BFLOAT16;
      default -> throw new IllegalArgumentException("element type " + type + ", expected F32, F16 or BF16");
    };
  }
}
