// SPDX-License-Identifier: Apache-2.0
package io.octolora.runtime;

/**
 * How exactly an adapter's A, B and x·Aᵀ are kept on the device, in the order of the constants of {@code octolora.h}.
 */
public enum LoraPrecision {
  /** One 16-bit number each. 16-bit factors are kept as they are, fp32 ones become the 16-bit type that loses least. */
  BITS_16,
  /** Sums of two 16-bit numbers: about 16 more bits, for fp32 adapters, at two to three times the cost. */
  SPLIT;

  int code() {
    return ordinal();
  }
}
