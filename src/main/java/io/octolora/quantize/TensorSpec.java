// SPDX-License-Identifier: Apache-2.0
package io.octolora.quantize;

import io.octolora.checkpoint.ElementType;
import io.octolora.checkpoint.Tensor;
import java.util.Arrays;

/**
 * A tensor to be written.
 *
 * @param shape outermost first; empty for a single number
 */
record TensorSpec(String name, ElementType type, long... shape) {
  static TensorSpec of(Tensor tensor) {
    return new TensorSpec(tensor.name(), tensor.type(), tensor.shape());
  }

  long elements() {
    return Arrays.stream(shape).reduce(1, Math::multiplyExact);
  }

  long bytes() {
    return Math.multiplyExact(elements(), type.bits()) / 8;
  }
}
