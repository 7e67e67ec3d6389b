// SPDX-License-Identifier: Apache-2.0
package io.octolora.mapping;

import java.util.Objects;
import org.jetbrains.annotations.Nullable;

/**
 * What an adapter adds to one module: {@code y += scale · ((x · Aᵀ) · Bᵀ + bias)}. With a magnitude (DoRA) what it
 * makes of the module: {@code y = g · (W·x + scale · (x · Aᵀ) · Bᵀ)} before the module's own bias, g the magnitude by
 * the length of the row of {@code W + scale · B · A}.
 *
 * @param module the base checkpoint's name
 * @param a [rank, k], k the module's input features
 * @param b [n, rank], n the module's output features
 * @param scale alpha / rank or what the format puts in its place; finite
 * @param bias [n, 1], or null
 * @param magnitude [n, 1], or null; never beside a bias
 */
public record LoraDelta(String module, Factor a, Factor b, double scale, @Nullable Factor bias,
    @Nullable Factor magnitude) {
  /** Refuses shapes that do not go together, with an {@link IllegalArgumentException} that names them. */
  public LoraDelta {
    Objects.requireNonNull(module, "module");
    if (a.rows() != b.columns() || bias != null && (bias.rows() != b.rows() || bias.columns() != 1)) {
      throw new IllegalArgumentException("%s: A is %d x %d, B is %d x %d%s".formatted(module, a.rows(), a.columns(),
          b.rows(), b.columns(), bias == null ? "" : ", bias is " + bias.rows() + " x " + bias.columns()));
    }
    if (magnitude != null && (magnitude.rows() != b.rows() || magnitude.columns() != 1 || bias != null)) {
      throw new IllegalArgumentException("%s: B is %d x %d, magnitude %d x %d%s".formatted(module, b.rows(),
          b.columns(), magnitude.rows(), magnitude.columns(), bias == null ? "" : " beside a bias"));
    }
    if (!Double.isFinite(scale)) {
      throw new IllegalArgumentException("%s: scale = %s, expected a finite number".formatted(module, scale));
    }
  }

  /** Rows of A and columns of B. */
  public int rank() {
    return a.rows();
  }

  /** Output features. */
  public int n() {
    return b.rows();
  }

  /** Input features. */
  public int k() {
    return a.columns();
  }
}
