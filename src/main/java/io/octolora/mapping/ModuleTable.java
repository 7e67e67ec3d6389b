// SPDX-License-Identifier: Apache-2.0
package io.octolora.mapping;

import io.octolora.checkpoint.BaseLinear;
import java.util.ArrayList;
import java.util.Collection;
import java.util.HashMap;
import java.util.LinkedHashMap;
import java.util.LinkedHashSet;
import java.util.List;
import java.util.Map;
import java.util.Set;
import java.util.TreeSet;
import java.util.regex.Matcher;
import java.util.regex.Pattern;
import org.jetbrains.annotations.Nullable;

/**
 * From the names that adapters use to the modules of one base. Built from the base's own modules, never by parsing a
 * name: full paths, the paths of FLUX's original code (black-forest-labs/flux, /flux2) for the modules that diffusers
 * made of them, and both flattened, every dot an underscore.
 */
final class ModuleTable {
  /** PEFT's wrapper; one of the other prefixes may follow it. */
  private static final String PEFT_PREFIX = "base_model.model.";

  /** Components of a pipeline as diffusers and ComfyUI name them. */
  private static final List<String> PATH_PREFIXES = List.of("transformer.", "unet.", "text_encoder.",
      "text_encoder_2.", "text_encoder_3.", "diffusion_model.", "model.diffusion_model.");
  /** Components in front of flattened paths. */
  private static final List<String> FLAT_PREFIXES =
      List.of("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_", "lora_te3_", "lora_transformer_", "lycoris_");

  private static final Pattern BLOCK = Pattern.compile("(transformer_blocks|single_transformer_blocks)\\.(\\d+)\\..*");

  /**
   * Names of FLUX's original code, # standing for the block's number. The rows of the original matrix are those of the
   * parts, one after the other. A line holds for a base that has all its parts.
   */
  private static final List<Alias> ALIASES = List.of(
      alias("img_in", "x_embedder"),
      alias("txt_in", "context_embedder"),
      alias("time_in.in_layer", "time_text_embed.timestep_embedder.linear_1"),
      alias("time_in.out_layer", "time_text_embed.timestep_embedder.linear_2"),
      alias("vector_in.in_layer", "time_text_embed.text_embedder.linear_1"),
      alias("vector_in.out_layer", "time_text_embed.text_embedder.linear_2"),
      alias("guidance_in.in_layer", "time_text_embed.guidance_embedder.linear_1"),
      alias("guidance_in.out_layer", "time_text_embed.guidance_embedder.linear_2"),
      alias("double_blocks.#.img_attn.qkv", "transformer_blocks.#.attn.to_q", "transformer_blocks.#.attn.to_k",
          "transformer_blocks.#.attn.to_v"),
      alias("double_blocks.#.img_attn.proj", "transformer_blocks.#.attn.to_out.0"),
      alias("double_blocks.#.img_mlp.0", "transformer_blocks.#.ff.net.0.proj"),
      alias("double_blocks.#.img_mlp.2", "transformer_blocks.#.ff.net.2"),
      alias("double_blocks.#.img_mod.lin", "transformer_blocks.#.norm1.linear"),
      alias("double_blocks.#.txt_attn.qkv", "transformer_blocks.#.attn.add_q_proj",
          "transformer_blocks.#.attn.add_k_proj", "transformer_blocks.#.attn.add_v_proj"),
      alias("double_blocks.#.txt_attn.proj", "transformer_blocks.#.attn.to_add_out"),
      alias("double_blocks.#.txt_mlp.0", "transformer_blocks.#.ff_context.net.0.proj"),
      alias("double_blocks.#.txt_mlp.2", "transformer_blocks.#.ff_context.net.2"),
      alias("double_blocks.#.txt_mod.lin", "transformer_blocks.#.norm1_context.linear"),
      alias("single_blocks.#.linear1", "single_transformer_blocks.#.attn.to_q", "single_transformer_blocks.#.attn.to_k",
          "single_transformer_blocks.#.attn.to_v", "single_transformer_blocks.#.proj_mlp"),
      alias("single_blocks.#.linear2", "single_transformer_blocks.#.proj_out"),
      alias("single_blocks.#.modulation.lin", "single_transformer_blocks.#.norm.linear"),
      alias("final_layer.linear", "proj_out"),
      // original rows: shift, then scale; diffusers: scale, then shift
      new Alias("final_layer.adaLN_modulation.1", List.of("norm_out.linear"), true),
      // FLUX.2, where it differs
      alias("time_in.in_layer", "time_guidance_embed.timestep_embedder.linear_1"),
      alias("time_in.out_layer", "time_guidance_embed.timestep_embedder.linear_2"),
      alias("guidance_in.in_layer", "time_guidance_embed.guidance_embedder.linear_1"),
      alias("guidance_in.out_layer", "time_guidance_embed.guidance_embedder.linear_2"),
      alias("double_blocks.#.img_mlp.0", "transformer_blocks.#.ff.linear_in"),
      alias("double_blocks.#.img_mlp.2", "transformer_blocks.#.ff.linear_out"),
      alias("double_blocks.#.txt_mlp.0", "transformer_blocks.#.ff_context.linear_in"),
      alias("double_blocks.#.txt_mlp.2", "transformer_blocks.#.ff_context.linear_out"),
      alias("double_stream_modulation_img.lin", "double_stream_modulation_img.linear"),
      alias("double_stream_modulation_txt.lin", "double_stream_modulation_txt.linear"),
      alias("single_stream_modulation.lin", "single_stream_modulation.linear"),
      alias("single_blocks.#.linear1", "single_transformer_blocks.#.attn.to_qkv_mlp_proj"),
      alias("single_blocks.#.linear2", "single_transformer_blocks.#.attn.to_out"));

  private record Alias(String name, List<String> parts, boolean halvesSwapped) {}

  /**
   * What a name stands for: the rows of these modules, one after the other.
   *
   * @param halvesSwapped whether the second half of the name's rows is the first of the module's
   */
  record Target(List<BaseLinear> parts, boolean halvesSwapped) {
    /** The paths, for messages. */
    String describe() {
      return String.join(" + ", parts.stream().map(BaseLinear::name).toList());
    }
  }

  private final Map<String, Target> byPath = new HashMap<>();
  private final Map<String, Set<Target>> byFlatName = new HashMap<>();
  private final Set<String> modules;

  ModuleTable(Map<String, BaseLinear> linears) {
    modules = new LinkedHashSet<>(linears.keySet());
    linears.forEach((name, linear) -> add(name, new Target(List.of(linear), false)));
    Map<String, Target> aliases = new LinkedHashMap<>();
    Collection<String> blocks = blockNumbers(modules);
    for (Alias alias : ALIASES) {
      if (alias.name.contains("#")) {
        blocks.forEach(block -> resolve(alias, block, linears, aliases));
      } else {
        resolve(alias, "", linears, aliases);
      }
    }
    aliases.forEach((name, target) -> {
      if (!modules.contains(name)) { // the base's own names come first
        add(name, target);
      }
    });
  }

  Set<String> modules() {
    return modules;
  }

  /**
   * All the meanings of an adapter's name: none if the base has no such module, more than one if that cannot be told.
   * The whole name counts, with or without one of the known prefixes; an end of a path is never enough.
   */
  Set<Target> find(String name) {
    Set<Target> found = new LinkedHashSet<>();
    List<String> names = new ArrayList<>(List.of(name));
    if (name.startsWith(PEFT_PREFIX)) {
      names.add(name.substring(PEFT_PREFIX.length()));
    }
    for (String candidate : names) {
      addIfKnown(candidate, found);
      for (String prefix : PATH_PREFIXES) {
        if (candidate.startsWith(prefix)) {
          addIfKnown(candidate.substring(prefix.length()), found);
        }
      }
    }
    for (String prefix : FLAT_PREFIXES) {
      if (name.startsWith(prefix)) {
        found.addAll(byFlatName.getOrDefault(name.substring(prefix.length()), Set.of()));
      }
    }
    return found;
  }

  /** The name without the prefixes that {@link #find} knows, for judging likeness. */
  static String bare(String name) {
    String bare = name.startsWith(PEFT_PREFIX) ? name.substring(PEFT_PREFIX.length()) : name;
    for (List<String> prefixes : List.of(PATH_PREFIXES, FLAT_PREFIXES)) {
      for (String prefix : prefixes) {
        if (bare.startsWith(prefix)) {
          return bare.substring(prefix.length());
        }
      }
    }
    return bare;
  }

  private void addIfKnown(String path, Set<Target> found) {
    Target target = byPath.get(path);
    if (target != null) {
      found.add(target);
    }
  }

  private void add(String path, Target target) {
    byPath.put(path, target);
    byFlatName.computeIfAbsent(path.replace('.', '_'), flat -> new LinkedHashSet<>()).add(target);
  }

  private static void resolve(Alias alias, String block, Map<String, BaseLinear> linears, Map<String, Target> aliases) {
    List<BaseLinear> parts = new ArrayList<>();
    for (String part : alias.parts) {
      @Nullable BaseLinear linear = linears.get(part.replace("#", block));
      if (linear == null) {
        return;
      }
      parts.add(linear);
    }
    aliases.putIfAbsent(alias.name.replace("#", block), new Target(parts, alias.halvesSwapped));
  }

  private static Set<String> blockNumbers(Collection<String> modules) {
    Set<String> numbers = new TreeSet<>();
    for (String module : modules) {
      Matcher matcher = BLOCK.matcher(module);
      if (matcher.matches()) {
        numbers.add(matcher.group(2));
      }
    }
    return numbers;
  }

  private static Alias alias(String name, String... parts) {
    return new Alias(name, List.of(parts), false);
  }
}
