// SPDX-License-Identifier: Apache-2.0
package io.octolora.oracle;

import io.octolora.checkpoint.BaseLinear;
import io.octolora.checkpoint.Quantization;
import io.octolora.checkpoint.Tensor;
import java.nio.ByteBuffer;
import java.util.Objects;
import org.jetbrains.annotations.Nullable;

/**
 * One int8 layer as the oracle reads it.
 *
 * @param n output channels
 * @param k input channels
 * @param weight {@code [n,k]}, row-major
 * @param scale {@code [n]} or {@code [1]}; the real weight is {@code scale * weight}
 * @param bias {@code [n]}
 */
public record OracleLinear(int n, int k, byte[] weight, float[] scale, float @Nullable [] bias,
    Quantization quantization) {
  public OracleLinear {
    Objects.requireNonNull(quantization, "quantization");
    if (weight.length != (long) n * k || scale.length != n && scale.length != 1 || bias != null && bias.length != n) {
      throw new IllegalArgumentException("n %d, k %d: %d weights, %d scales, %s biases".formatted(n, k, weight.length,
          scale.length, bias == null ? "no" : bias.length));
    }
  }

  /** Copies the weights of a checkpoint's layer out of its file. */
  public static OracleLinear of(BaseLinear linear) {
    return of(linear, Objects.requireNonNull(linear.quantization(), () -> linear.name() + " is not quantized"));
  }

  public static OracleLinear of(BaseLinear linear, Quantization quantization) {
    Tensor tensor = linear.weight();
    byte[] weight = new byte[Math.multiplyExact(linear.n(), linear.k())];
    ByteBuffer bytes = tensor.bytes(0, weight.length);
    bytes.get(weight);
    return new OracleLinear(linear.n(), linear.k(), weight, linear.scale(), linear.bias(), quantization);
  }

  float scaleOf(int channel) {
    return scale[scale.length == 1 ? 0 : channel];
  }
}
