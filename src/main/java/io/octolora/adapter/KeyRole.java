// SPDX-License-Identifier: Apache-2.0
package io.octolora.adapter;

import java.util.List;

/**
 * What one tensor of an adapter file is, told from the end of its name.
 *
 * @param module the name without that end
 * @param why what it is, if it is no part of a plain low-rank pair
 */
record KeyRole(Kind kind, String module, String why) {
  enum Kind {
    /** Down-projection, [rank, in]. */
    A,
    /** Up-projection, [out, rank]. */
    B,
    /** Added to the up-projection's result, [out]. */
    B_BIAS,
    /** Scale times rank, one number. */
    ALPHA,
    /** Something of an adapter that is more than a low-rank pair. */
    UNSUPPORTED,
    /** Nothing that only adapters have. */
    UNKNOWN
  }

  /** An end of a name; a longer one stands before a shorter one that it ends with. */
  private record End(String text, Kind kind, String why) {
    KeyRole of(String key) {
      return new KeyRole(kind, key.substring(0, key.length() - text.length()), why);
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
      end(".alpha", Kind.ALPHA),
      unsupported(".lora_magnitude_vector.default.weight", "a DoRA magnitude"),
      unsupported(".lora_magnitude_vector.weight", "a DoRA magnitude"),
      unsupported(".lora_magnitude_vector.default", "a DoRA magnitude"),
      unsupported(".lora_magnitude_vector", "a DoRA magnitude"),
      unsupported(".dora_scale", "a DoRA magnitude"),
      unsupported(".hada_w1_a", "part of LoHa, a Hadamard product of pairs"),
      unsupported(".hada_w1_b", "part of LoHa, a Hadamard product of pairs"),
      unsupported(".hada_w2_a", "part of LoHa, a Hadamard product of pairs"),
      unsupported(".hada_w2_b", "part of LoHa, a Hadamard product of pairs"),
      unsupported(".hada_t1", "part of LoHa, a Hadamard product of pairs"),
      unsupported(".hada_t2", "part of LoHa, a Hadamard product of pairs"),
      unsupported(".lokr_w1", "part of LoKr, a Kronecker product"),
      unsupported(".lokr_w1_a", "part of LoKr, a Kronecker product"),
      unsupported(".lokr_w1_b", "part of LoKr, a Kronecker product"),
      unsupported(".lokr_w2", "part of LoKr, a Kronecker product"),
      unsupported(".lokr_w2_a", "part of LoKr, a Kronecker product"),
      unsupported(".lokr_w2_b", "part of LoKr, a Kronecker product"),
      unsupported(".lokr_t2", "part of LoKr, a Kronecker product"),
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
    int processor = key.indexOf(".processor.");
    if (processor >= 0 && key.indexOf("_lora", processor) >= 0) {
      return new KeyRole(Kind.UNSUPPORTED, key, "named by attention processors (XLabs, early diffusers), "
          + "which are not supported");
    }
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
    return new End(text, kind, "");
  }

  private static End unsupported(String text, String why) {
    return new End(text, Kind.UNSUPPORTED, why);
  }

  private static End whole(String text, String why) {
    return new End(text, Kind.UNKNOWN, why);
  }
}
