// SPDX-License-Identifier: Apache-2.0
package io.octolora.oracle;

import org.jetbrains.annotations.Nullable;

/**
 * One low-rank update as the oracle reads it: {@code y += scale * ((x A^T) B^T + bias)}; with a magnitude (DoRA)
 * {@code y = g * (y + scale * (x A^T) B^T)} with {@code g = magnitude / |row of W + scale * B A|}, before the
 * layer's bias.
 *
 * @param a {@code [rank,k]}, row-major
 * @param aFormat type of A in the file
 * @param b {@code [n,rank]}, row-major
 * @param bFormat type of B in the file
 * @param bias {@code [n]}
 * @param magnitude {@code [n]}
 */
public record OracleAdapter(int rank, float[] a, FloatFormat aFormat, float[] b, FloatFormat bFormat,
    float @Nullable [] bias, float @Nullable [] magnitude, double scale) {
  public OracleAdapter {
    if (rank < 1 || a.length % rank != 0 || b.length % rank != 0) {
      throw new IllegalArgumentException("rank %d: A has %d elements, B has %d".formatted(rank, a.length, b.length));
    }
  }

  /** Without a magnitude. */
  public OracleAdapter(int rank, float[] a, FloatFormat aFormat, float[] b, FloatFormat bFormat,
      float @Nullable [] bias, double scale) {
    this(rank, a, aFormat, b, bFormat, bias, null, scale);
  }

  /** The same factors, weighted: {@code scale * weight}. */
  public OracleAdapter weighted(double weight) {
    return new OracleAdapter(rank, a, aFormat, b, bFormat, bias, magnitude, scale * weight);
  }
}
