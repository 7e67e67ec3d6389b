// SPDX-License-Identifier: Apache-2.0
package io.octolora.mapping;

import java.util.LinkedHashMap;
import java.util.Map;
import java.util.regex.Matcher;
import java.util.regex.Pattern;
import org.jetbrains.annotations.Nullable;

/**
 * Names of a UNet's modules in the original code of Stable Diffusion XL (Stability-AI/generative-models), which
 * sd-scripts uses, for those of diffusers. There the blocks of a side are counted through: with 2 layers a block,
 * {@code down_blocks.b} has the inputs 3b + 1 to 3b + 3 and {@code up_blocks.b} the outputs 3b to 3b + 2.
 */
final class UnetNames {
  private static final Map<String, String> SINGLE = Map.of(
      "time_embedding.linear_1", "time_embed.0",
      "time_embedding.linear_2", "time_embed.2",
      "add_embedding.linear_1", "label_emb.0.0",
      "add_embedding.linear_2", "label_emb.0.2");
  private static final Pattern BLOCK =
      Pattern.compile("(down|up|mid)_block(?:s\\.(\\d+))?\\.(resnets|attentions)\\.(\\d+)\\.(.+)");
  /** Inside a residual block. */
  private static final Map<String, String> INNER = new LinkedHashMap<>();

  static {
    INNER.put("conv1", "in_layers.2");
    INNER.put("conv2", "out_layers.3");
    INNER.put("time_emb_proj", "emb_layers.1");
    INNER.put("conv_shortcut", "skip_connection");
  }

  private UnetNames() {}

  /** The original name, or null if the module is none of a UNet in diffusers. */
  static @Nullable String original(String module) {
    if (SINGLE.containsKey(module)) {
      return SINGLE.get(module);
    }
    Matcher matcher = BLOCK.matcher(module);
    if (!matcher.matches()) {
      return null;
    }
    boolean attention = matcher.group(3).equals("attentions");
    String inner = attention ? matcher.group(5) : INNER.get(matcher.group(5));
    if (inner == null || matcher.group(1).equals("mid") != (matcher.group(2) == null)) {
      return null;
    }
    int layer = Integer.parseInt(matcher.group(4));
    String place = attention ? "1" : "0";
    if (matcher.group(2) == null) {
      return "middle_block." + (attention ? 1 : 2 * layer) + "." + inner;
    }
    int block = Integer.parseInt(matcher.group(2));
    return matcher.group(1).equals("down") ? "input_blocks." + (3 * block + layer + 1) + "." + place + "." + inner
        : "output_blocks." + (3 * block + layer) + "." + place + "." + inner;
  }
}
