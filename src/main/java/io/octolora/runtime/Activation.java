// SPDX-License-Identifier: Apache-2.0
package io.octolora.runtime;

/** What {@link ForwardCall} applies to the sum of a layer and its adapters, in the order of octolora.h's constants. */
public enum Activation {
  /** v */
  NONE,
  /** v / 2 · (1 + tanh(√(2/π) · (v + 0.044715 v³))) */
  GELU_TANH,
  /** v / 2 · (1 + erf(v / √2)) */
  GELU_ERF,
  /** v / (1 + exp(-v)) */
  SILU;

  /** The number of this activation in the C ABI. */
  int code() {
    return ordinal();
  }
}
