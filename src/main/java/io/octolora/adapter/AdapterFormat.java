// SPDX-License-Identifier: Apache-2.0
package io.octolora.adapter;

import java.util.List;
import java.util.regex.Pattern;

/** The family of names and scale rules that an adapter file follows; the first whose sign a key has is taken. */
public enum AdapterFormat {
  /** FLUX's attention processors, {@code double_blocks.#.processor.qkv_lora1}: x-flux. */
  XLABS("XLabs", "(diffusion_model\\.)?(double|single)_blocks\\.\\d+\\.processor\\..*",
      "FLUX's attention processors stand for the linear layers they replace; scale alpha / rank, 1 without alpha"),
  /** {@code to_q_lora.down}, {@code lora.down}, {@code lora_linear_layer.down}: early diffusers. */
  OLD_DIFFUSERS("early diffusers", ".*_lora\\.(down|up)\\.weight|.*\\.(lora|lora_linear_layer)\\.(down|up)\\.weight",
      "diffusers module paths, attention processors stand for the linear layers they replace; scale alpha / rank, "
          + "1 without alpha"),
  /** Flattened diffusers paths, {@code lora_transformer_…}, with {@code alpha}: OneTrainer. */
  ONETRAINER("OneTrainer", "lora_transformer_.*",
      "after the prefix every dot of a module path is an underscore; scale alpha / rank"),
  /** Flattened diffusers paths, {@code lycoris_…}: LyCORIS. */
  LYCORIS("LyCORIS", "lycoris_.*", "after the prefix every dot of a module path is an underscore; scale alpha / rank"),
  /** Flattened module paths, {@code lora_unet_…}, with {@code alpha}: sd-scripts. */
  KOHYA("kohya", "lora_unet_.*", "after the prefix every dot of a module path is an underscore; scale alpha / rank"),
  /** FLUX's original module paths, {@code double_blocks.…}: ComfyUI, ai-toolkit, fal. */
  BFL("BFL", "(base_model\\.model\\.)?((model\\.)?diffusion_model\\.|transformer\\.)?(double|single)_blocks\\..*",
      "paths of FLUX's original code, with or without a known prefix; scale alpha / rank, 1 without alpha"),
  /** A folder written by PEFT: {@code adapter_config.json} and {@code adapter_model.safetensors}. */
  PEFT("PEFT", "base_model\\.model\\..*",
      "base_model.model. comes off once, the rest is a full module path; scale from the configuration"),
  /** diffusers module paths with {@code lora_A}/{@code lora_B}: diffusers, ai-toolkit. */
  DIFFUSERS("diffusers", "(.*\\.)?(single_)?transformer_blocks\\.\\d+\\..*",
      "full module paths, with or without a known prefix; scale from the header, alpha / rank, or 1");

  private static final Pattern FLATTENED_TEXT_ENCODER = Pattern.compile("lora_te\\d?_.*");

  private final String label;
  private final Pattern sign;
  private final String rule;

  AdapterFormat(String label, String sign, String rule) {
    this.label = label;
    this.sign = Pattern.compile(sign);
    this.rule = rule;
  }

  /** The name for people, such as "kohya". */
  public String label() {
    return label;
  }

  /** How the family's names lead to modules and what scale it has, for people. */
  public String rule() {
    return rule;
  }

  /**
   * The families that a key may belong to, the likeliest first; empty if it tells nothing, as any may have it. Some
   * share names that mean the same in both: PEFT's wrapper may be around FLUX's original paths (fal), paths of
   * diffusers are the same early and late, and sd-scripts and OneTrainer name text encoders alike.
   */
  static List<AdapterFormat> of(String key) {
    for (AdapterFormat format : values()) {
      if (format.sign.matcher(key).matches()) {
        return switch (format) {
          case PEFT -> List.of(PEFT, BFL);
          case DIFFUSERS -> List.of(DIFFUSERS, OLD_DIFFUSERS);
          default -> List.of(format);
        };
      }
    }
    return FLATTENED_TEXT_ENCODER.matcher(key).matches() ? List.of(KOHYA, ONETRAINER) : List.of();
  }
}
