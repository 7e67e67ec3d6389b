// SPDX-License-Identifier: Apache-2.0
package io.octolora.checkpoint;

import org.jetbrains.annotations.Nullable;

/** One linear layer of a checkpoint. */
public final class BaseLinear {
  private final String name;
  private final int n;
  private final int k;
  private final WeightFormat format;
  private final @Nullable Quantization quantization;
  private final Tensor weight;
  private final @Nullable Tensor scale;
  private final @Nullable Tensor bias;

  BaseLinear(String name, int n, int k, WeightFormat format, @Nullable Quantization quantization, Tensor weight,
      @Nullable Tensor scale, @Nullable Tensor bias) {
    this.name = name;
    this.n = n;
    this.k = k;
    this.format = format;
    this.quantization = quantization;
    this.weight = weight;
    this.scale = scale;
    this.bias = bias;
  }

  public String name() {
    return name;
  }

  public int n() {
    return n;
  }

  public int k() {
    return k;
  }

  public WeightFormat format() {
    return format;
  }

  public boolean quantized() {
    return quantization != null;
  }

  public @Nullable Quantization quantization() {
    return quantization;
  }

  public Tensor weight() {
    return weight;
  }

  public float[] scale() {
    throw new UnsupportedOperationException();
  }

  public float @Nullable [] bias() {
    return bias == null ? null : bias.toFloats();
  }
}
