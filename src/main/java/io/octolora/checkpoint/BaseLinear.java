// SPDX-License-Identifier: Apache-2.0
package io.octolora.checkpoint;

import io.octolora.FormatException;
import io.octolora.internal.Halves;
import java.nio.ByteBuffer;
import org.jetbrains.annotations.Nullable;

/**
 * One linear layer of a checkpoint, {@code y[M,n] = x[M,k] · Wᵀ + bias}. Describes; the data belongs to the
 * {@link Checkpoint} and is readable until that is closed.
 *
 * <p>A module counts as linear if it has a two-dimensional {@code weight}. Among unquantized modules, and in GGUF
 * files, embedding tables are such too: nothing in the files tells them apart. Norms (one dimension) and convolutions
 * (three to five) are not listed.
 */
public final class BaseLinear {
  private final String name;
  private final int n;
  private final int k;
  private final WeightFormat format;
  private final @Nullable Quantization quantization;
  private final Tensor weight;
  private final @Nullable Tensor scale;
  private final int scaleBlock;
  private final @Nullable Tensor bias;

  /** One scale a row or for all; scale and quantization are null exactly for {@link WeightFormat#FLOAT}. */
  BaseLinear(String name, int n, int k, WeightFormat format, @Nullable Quantization quantization, Tensor weight,
      @Nullable Tensor scale, @Nullable Tensor bias) {
    this(name, n, k, format, quantization, weight, scale, 0, bias);
  }

  private BaseLinear(String name, int n, int k, WeightFormat format, @Nullable Quantization quantization, Tensor weight,
      @Nullable Tensor scale, int scaleBlock, @Nullable Tensor bias) {
    this.name = name;
    this.n = n;
    this.k = k;
    this.format = format;
    this.quantization = quantization;
    this.weight = weight;
    this.scale = scale;
    this.scaleBlock = scaleBlock;
    this.bias = bias;
  }

  /** Weight-only, with a scale for each scaleBlock columns of a row and none beside: F16 [n, k / scaleBlock]. */
  static BaseLinear ofBlocks(String name, int n, int k, WeightFormat format, Tensor weight, Tensor scales,
      int scaleBlock, @Nullable Tensor bias) {
    return new BaseLinear(name, n, k, format, Quantization.weightOnly(), weight, scales, scaleBlock, bias);
  }

  /** The module's path in the checkpoint. */
  public String name() {
    return name;
  }

  /** Output features: rows of the weight; at least 1. */
  public int n() {
    return n;
  }

  /** Input features: columns of the weight; at least 1. */
  public int k() {
    return k;
  }

  /** How the weight is stored. */
  public WeightFormat format() {
    return format;
  }

  /** Whether the weight is int8. */
  public boolean quantized() {
    return quantization != null;
  }

  /** How the checkpoint wants activations to be treated; null if the layer is not quantized. */
  public @Nullable Quantization quantization() {
    return quantization;
  }

  /** [n, k], row-major: I8 codes, unpacked where the file packs them, or the float weight of an unquantized layer. */
  public Tensor weight() {
    return weight;
  }

  /**
   * Real units per code: {@code W[row, column] = scale[row] · code}, and times a {@link #blockScale} where there are
   * such. A new array of n numbers, or of one for the whole matrix; finite and not negative. bitsandbytes:
   * {@code SCB / 127}, one division rounded to fp32 (bitsandbytes multiplies by its fp32 constant for 1/127, which
   * differs by at most one unit in the last place). Others: the stored scale, widened; with block scales 1.
   *
   * @throws IllegalStateException if the layer is not quantized, or the checkpoint is closed
   * @throws FormatException if a stored value is negative, infinite or NaN
   */
  public float[] scale() {
    if (scale == null) {
      throw new IllegalStateException("%s is not quantized: %s".formatted(name, weight));
    }
    if (scaleBlock > 0) {
      return new float[] {1};
    }
    float[] values = scale.toFloats();
    for (int row = 0; row < values.length; row++) {
      if (!(values[row] >= 0) || values[row] == Float.POSITIVE_INFINITY) {
        throw new FormatException("%s: row %d is %s, expected a finite number, 0 or above".formatted(scale, row,
            values[row]));
      }
      if (format == WeightFormat.BITSANDBYTES_INT8) {
        values[row] /= 127;
      }
    }
    return values;
  }

  /** Columns of a row that share a {@link #blockScale}: 32 for GGUF Q8_0, 0 where there are none. */
  public int scaleBlock() {
    return scaleBlock;
  }

  /**
   * {@code [n, k / scaleBlock]} fp16 in a new direct little-endian buffer; null where {@link #scaleBlock} is 0.
   *
   * @throws IllegalStateException if the checkpoint is closed
   * @throws FormatException if one is infinite or NaN
   */
  public @Nullable ByteBuffer blockScale() {
    if (scale == null || scaleBlock == 0) {
      return null;
    }
    ByteBuffer values = scale.bytes();
    for (int i = 0; i < values.limit(); i += 2) {
      if ((values.getShort(i) & 0x7c00) == 0x7c00) {
        int row = (int) (i / 2 / scale.dimension(1));
        throw new FormatException("%s: block %d of row %d is %s, expected a finite number".formatted(scale,
            i / 2 % scale.dimension(1), row, Halves.fromFloat16(values.getShort(i))));
      }
    }
    return values;
  }

  /** n numbers in a new array, exact; null if the layer has none. */
  public float @Nullable [] bias() {
    return bias == null ? null : bias.toFloats();
  }

  /** The stored bias [n], F32, F16 or BF16, or null. */
  public @Nullable Tensor biasTensor() {
    return bias;
  }

  /** "name: format [n, k]", for messages. */
  @Override
  public String toString() {
    return "%s: %s [%d, %d]".formatted(name, format, n, k);
  }
}
