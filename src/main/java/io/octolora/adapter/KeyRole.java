// SPDX-License-Identifier: Apache-2.0
package io.octolora.adapter;

import java.util.List;

/**
 * What one tensor of an adapter file is, told from the end of its name.
 *
 * @param module the name without that end
 * @param why what it is, if it is no part of a plain low-rank pair; for {@link Kind#FACTOR} that factor's name
 */
record KeyRole(Kind kind, String module, String why) {
  enum Kind {
    /** Down-projection, [rank, in]. */
    A,
    /** Up-projection, [out, rank]. */
    B,
    /** Added to the up-projection's result, [out]. */
    B_BIAS,
    /** DoRA: the lengths of the rows of W + scale · B · A, [out]. */
    MAGNITUDE,
    /** DoRA of LyCORIS and OneTrainer: the same, [out, 1], or the lengths of the columns, [1, in]. */
    DORA_SCALE,
    /** Scale times rank, one number. */
    ALPHA,
    /** One of the factors of LoHa or LoKr. */
    FACTOR,
    /** Something of an adapter that is more than a low-rank pair. */
    UNSUPPORTED,
    /** Nothing that only adapters have. */
    UNKNOWN
  }

  /**
   * An end of a name; a longer one stands before a shorter one that it ends with.
   *
   * @param kept how many of its first characters belong to the module's name
   */
  private record End(String text, Kind kind, String why, int kept) {
    KeyRole of(String key) {
      return new KeyRole(kind, key.substring(0, key.length() - text.length() + kept), why);
    }
  }

  private static final List<End> ENDS = List.of(
      end(".lora_A.default.weight", Kind.A),
      end(".lora_B.default.weight", Kind.B),
      end(".lora_B.default.bias", Kind.B_BIAS),
      end(".lora_A.weight", Kind.A),
      end(".lora_B.weight", Kind.B),
      end(".lora_B.bias", Kind.B_BIAS),
      end(".lora_A", Kind.A),
      end(".lora_B", Kind.B),
      end(".lora_down.weight", Kind.A),
      end(".lora_up.weight", Kind.B),
      end(".lora.down.weight", Kind.A),
      end(".lora.up.weight", Kind.B),
      end(".lora_linear_layer.down.weight", Kind.A),
      end(".lora_linear_layer.up.weight", Kind.B),
      // attention processors: to_q_lora of early diffusers, qkv_lora1 of XLabs
      processor("_lora", ".down.weight", Kind.A),
      processor("_lora", ".up.weight", Kind.B),
      processor("_lora1", ".down.weight", Kind.A),
      processor("_lora1", ".up.weight", Kind.B),
      processor("_lora2", ".down.weight", Kind.A),
      processor("_lora2", ".up.weight", Kind.B),
      end(".alpha", Kind.ALPHA),
      end(".lora_magnitude_vector.default.weight", Kind.MAGNITUDE),
      end(".lora_magnitude_vector.weight", Kind.MAGNITUDE),
      end(".lora_magnitude_vector.default", Kind.MAGNITUDE),
      end(".lora_magnitude_vector", Kind.MAGNITUDE),
      end(".dora_scale", Kind.DORA_SCALE),
      factor("hada_w1_a"),
      factor("hada_w1_b"),
      factor("hada_w2_a"),
      factor("hada_w2_b"),
      unsupported(".hada_t1", "the core of a LoHa convolution"),
      unsupported(".hada_t2", "the core of a LoHa convolution"),
      factor("lokr_w1"),
      factor("lokr_w1_a"),
      factor("lokr_w1_b"),
      factor("lokr_w2"),
      factor("lokr_w2_a"),
      factor("lokr_w2_b"),
      unsupported(".lokr_t2", "the core of a LoKr convolution"),
      unsupported(".oft_blocks", "an orthogonal (OFT) adapter"),
      unsupported(".oft_diag", "an orthogonal (OFT) adapter"),
      unsupported(".diff", "a full weight difference"),
      unsupported(".diff_b", "a bias difference"),
      unsupported(".set_weight", "a replacement of the base weight"),
      unsupported(".w_norm", "a difference of norm weights"),
      unsupported(".b_norm", "a difference of norm biases"),
      unsupported(".reshape_weight", "a new shape of the base weight"),
      unsupported(".lora_mid.weight", "the core of a Tucker convolution"),
      unsupported(".lora_embedding_A", "an adapter of an embedding table"),
      unsupported(".lora_embedding_B", "an adapter of an embedding table"),
      unsupported(".base_layer.bias", "a replacement of the base bias"),
      unsupported(".base_layer.weight", "a replacement of the base weight"));

  /** Ends of modules saved whole; asked last, as pairs end so too. */
  private static final List<End> WHOLE = List.of(
      whole(".weight", "a replacement of the base module's weight"),
      whole(".bias", "a replacement of the base module's bias"),
      whole(".scale", "a replacement of the base module's scale"));

  static KeyRole of(String key) {
    for (End end : ENDS) {
      if (fits(key, end)) {
        return end.of(key);
      }
    }
    for (End end : WHOLE) {
      if (fits(key, end) && !key.contains("lora")) {
        return end.of(key);
      }
    }
    return new KeyRole(Kind.UNKNOWN, key, "no name of a known adapter format");
  }

  private static boolean fits(String key, End end) {
    return key.length() > end.text.length() && key.endsWith(end.text);
  }

  private static End end(String text, Kind kind) {
    return new End(text, kind, "", 0);
  }

  private static End processor(String kept, String text, Kind kind) {
    return new End(kept + text, kind, "", kept.length());
  }

  private static End factor(String name) {
    return new End("." + name, Kind.FACTOR, name, 0);
  }

  private static End unsupported(String text, String why) {
    return new End(text, Kind.UNSUPPORTED, why, 0);
  }

  private static End whole(String text, String why) {
    return new End(text, Kind.UNKNOWN, why, 0);
  }
}
