// SPDX-License-Identifier: Apache-2.0
package io.octolora.oracle;

import io.octolora.checkpoint.BaseLinear;
import io.octolora.checkpoint.Quantization;
import io.octolora.checkpoint.Tensor;
import io.octolora.internal.Halves;
import java.nio.ByteBuffer;
import java.util.Objects;
import org.jetbrains.annotations.Nullable;

/**
 * One int8 layer as the oracle reads it.
 *
 * @param n output channels
 * @param k input channels
 * @param weight {@code [n,k]}, row-major
 * @param scale {@code [n]} or {@code [1]}; the real weight is {@code scale * weight}, times the block's scale
 * @param scaleBlock columns that share a block scale, or 0
 * @param blockScale {@code [n, ceil(k / scaleBlock)]} or null
 * @param bias {@code [n]}
 */
public record OracleLinear(int n, int k, byte[] weight, float[] scale, int scaleBlock, float @Nullable [] blockScale,
    float @Nullable [] bias, Quantization quantization) {
  public OracleLinear(int n, int k, byte[] weight, float[] scale, float @Nullable [] bias, Quantization quantization) {
    this(n, k, weight, scale, 0, null, bias, quantization);
  }

  public OracleLinear {
    Objects.requireNonNull(quantization, "quantization");
    if (weight.length != (long) n * k || scale.length != n && scale.length != 1 || bias != null && bias.length != n) {
      throw new IllegalArgumentException("n %d, k %d: %d weights, %d scales, %s biases".formatted(n, k, weight.length,
          scale.length, bias == null ? "no" : bias.length));
    }
    long blocks = scaleBlock == 0 ? 0 : (k + scaleBlock - 1L) / scaleBlock * n;
    if (blocks != (blockScale == null ? 0 : blockScale.length)) {
      throw new IllegalArgumentException("n %d, k %d, blocks of %d: %s block scales, expected %d".formatted(n, k,
          scaleBlock, blockScale == null ? "no" : blockScale.length, blocks));
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
    return new OracleLinear(linear.n(), linear.k(), weight, linear.scale(), linear.scaleBlock(),
        widened(linear.blockScale()), linear.bias(), quantization);
  }

  private static float @Nullable [] widened(@Nullable ByteBuffer halves) {
    if (halves == null) {
      return null;
    }
    float[] floats = new float[halves.limit() / 2];
    for (int i = 0; i < floats.length; i++) {
      floats[i] = Halves.fromFloat16(halves.getShort(2 * i));
    }
    return floats;
  }

  float scaleOf(int channel) {
    return scale[scale.length == 1 ? 0 : channel];
  }

  /** The code times its block's scale, which is exact; the real weight is {@link #scaleOf} times this. */
  public double weightAt(int channel, int column) {
    byte code = weight[channel * k + column];
    return blockScale == null ? code
        : (double) code * blockScale[channel * ((k + scaleBlock - 1) / scaleBlock) + column / scaleBlock];
  }

  /** How many sums of a block are multiplied by a scale each for one element of y; 0 without block scales. */
  int blocks() {
    return scaleBlock == 0 ? 0 : (k + 31) / 32;
  }
}
