// SPDX-License-Identifier: Apache-2.0
package io.octolora.adapter;

/** The family of names and scale rules that an adapter file follows. */
public enum AdapterFormat {
  /** A folder written by PEFT: {@code adapter_config.json} and {@code adapter_model.safetensors}. */
  PEFT,
  /** diffusers module paths with {@code lora_A}/{@code lora_B}. */
  DIFFUSERS,
  /** Flattened module paths, {@code lora_unet_…}, with {@code alpha}: sd-scripts, OneTrainer, LyCORIS. */
  KOHYA,
  /** FLUX's original module paths, {@code double_blocks.…}: ComfyUI, ai-toolkit, fal. */
  BFL
}
