// SPDX-License-Identifier: Apache-2.0
package io.octolora.adapter;

import io.octolora.checkpoint.Tensor;
import java.util.List;
import java.util.Objects;
import org.jetbrains.annotations.Nullable;

/**
 * One low-rank pair as the file has it: {@code ΔW = scale · B · A}, and {@code scale · bias} on the result. With a
 * magnitude (DoRA) the rows of {@code W + ΔW} are brought to its lengths.
 *
 * @param name the module under the file's own name, without the suffixes of A and B
 * @param a down-projection [rank, in], or [rank, in, 1, 1]; F32, F16 or BF16
 * @param b up-projection [out, rank], or [out, rank, 1, 1]; F32, F16 or BF16
 * @param bias [out], or null
 * @param magnitude [out], or [out, 1], or null; F32, F16 or BF16
 * @param scale alpha / rank, or what the format puts in its place; finite
 * @param keys the tensors of the file that this pair was made of
 */
public record LoraPair(String name, Tensor a, Tensor b, @Nullable Tensor bias, @Nullable Tensor magnitude,
    double scale, List<String> keys) {
  /** The greatest rank that a device takes: OCTOLORA_MAX_RANK in octolora.h. */
  public static final int MAX_RANK = 4096;

  /** Copies the keys. */
  public LoraPair {
    Objects.requireNonNull(name, "name");
    keys = List.copyOf(keys);
  }

  /** Rows of A and columns of B. */
  public int rank() {
    return Math.toIntExact(a.dimension(0));
  }

  /** Input features. */
  public int in() {
    return Math.toIntExact(a.dimension(1));
  }

  /** Output features. */
  public int out() {
    return Math.toIntExact(b.dimension(0));
  }
}
