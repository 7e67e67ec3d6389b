// SPDX-License-Identifier: Apache-2.0
package io.octolora.mapping;

import io.octolora.checkpoint.BaseLinear;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.HashMap;
import java.util.LinkedHashMap;
import java.util.LinkedHashSet;
import java.util.List;
import java.util.Map;
import java.util.Set;
import java.util.regex.Matcher;
import java.util.regex.Pattern;
import org.jetbrains.annotations.Nullable;

/**
 * From the names that adapters use to the modules of one base. Built from the base's own modules, never by parsing a
 * name: full paths, other names of the same layers ({@link #ALIASES}, {@link UnetNames}), and all of them flattened,
 * every dot an underscore. A base may store several layers as one matrix where the adapter has them apart, and the
 * other way round: names of such layers lead to rows of that matrix.
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
  /** In front of the modules of a base in a single file. */
  private static final List<String> BASE_PREFIXES = List.of("model.diffusion_model.", "diffusion_model.");

  /**
   * Other names of layers. # stands for a block's number, * for any beginning of a path. The rows of the name's matrix
   * are those of the parts, one after the other. A line holds for a base that has all the parts, apart or in one
   * matrix, or the name itself.
   */
  private static final List<Alias> ALIASES = List.of(
      // FLUX's original code: black-forest-labs/flux
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
      new Alias("single_blocks.#.linear1", List.of("single_transformer_blocks.#.attn.to_q",
          "single_transformer_blocks.#.attn.to_k", "single_transformer_blocks.#.attn.to_v",
          "single_transformer_blocks.#.proj_mlp"), false, Rows.SQUARES_AND_REST),
      alias("single_blocks.#.linear2", "single_transformer_blocks.#.proj_out"),
      alias("single_blocks.#.modulation.lin", "single_transformer_blocks.#.norm.linear"),
      alias("final_layer.linear", "proj_out"),
      // original rows: shift, then scale; diffusers: scale, then shift
      new Alias("final_layer.adaLN_modulation.1", List.of("norm_out.linear"), true, Rows.EQUAL),
      // FLUX.2, where it differs: black-forest-labs/flux2
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
      alias("single_blocks.#.linear2", "single_transformer_blocks.#.attn.to_out"),
      // FLUX's attention processors: XLabs-AI/x-flux; 1 is the image's, 2 the text's
      alias("double_blocks.#.processor.qkv_lora1", "transformer_blocks.#.attn.to_q", "transformer_blocks.#.attn.to_k",
          "transformer_blocks.#.attn.to_v"),
      alias("double_blocks.#.processor.qkv_lora2", "transformer_blocks.#.attn.add_q_proj",
          "transformer_blocks.#.attn.add_k_proj", "transformer_blocks.#.attn.add_v_proj"),
      alias("double_blocks.#.processor.proj_lora1", "transformer_blocks.#.attn.to_out.0"),
      alias("double_blocks.#.processor.proj_lora2", "transformer_blocks.#.attn.to_add_out"),
      alias("single_blocks.#.processor.qkv_lora", "single_transformer_blocks.#.attn.to_q",
          "single_transformer_blocks.#.attn.to_k", "single_transformer_blocks.#.attn.to_v"),
      alias("single_blocks.#.processor.proj_lora", "single_transformer_blocks.#.proj_out"),
      // attention processors of early diffusers
      alias("*processor.to_q_lora", "*to_q"),
      alias("*processor.to_k_lora", "*to_k"),
      alias("*processor.to_v_lora", "*to_v"),
      alias("*processor.to_out_lora", "*to_out.0"),
      alias("*self_attn.to_q_lora", "*self_attn.q_proj"),
      alias("*self_attn.to_k_lora", "*self_attn.k_proj"),
      alias("*self_attn.to_v_lora", "*self_attn.v_proj"),
      alias("*self_attn.to_out_lora", "*self_attn.out_proj"),
      // language models: Phi-3's files and vLLM's layers
      new Alias("*qkv_proj", List.of("*q_proj", "*k_proj", "*v_proj"), false, Rows.QUERY_KEY_VALUE),
      alias("*gate_up_proj", "*gate_proj", "*up_proj"));

  /** How many rows of a fused matrix each part has. */
  private enum Rows {
    /** The same number. */
    EQUAL {
      @Override
      int[] of(int n, int k, int[] known) {
        int[] rows = new int[known.length];
        Arrays.fill(rows, n / known.length);
        return rows;
      }
    },
    /** As many as inputs, but the last, which has the rest. */
    SQUARES_AND_REST {
      @Override
      int[] of(int n, int k, int[] known) {
        int[] rows = new int[known.length];
        Arrays.fill(rows, k);
        rows[known.length - 1] = n - k * (known.length - 1);
        return rows;
      }
    },
    /** Keys and values have one number, queries any; one of both must be known. */
    QUERY_KEY_VALUE {
      @Override
      int[] of(int n, int k, int[] known) {
        int shared = Math.max(known[1], known[2]);
        if (shared == 0) {
          shared = (n - known[0]) / 2;
        }
        return new int[] {n - 2 * shared, shared, shared};
      }
    };

    /** @param known rows of each part where they are known, else 0 */
    abstract int[] of(int n, int k, int[] known);
  }

  private record Alias(String name, List<String> parts, boolean halvesSwapped, Rows rows, Pattern namePattern,
      Pattern firstPartPattern) {
    Alias(String name, List<String> parts, boolean halvesSwapped, Rows rows) {
      this(name, parts, halvesSwapped, rows, pattern(name), pattern(parts.get(0)));
    }
  }

  /**
   * Rows of one module: all of them, or parts from to to - 1 of a fused matrix.
   *
   * @param fused how the matrix is divided; null for a whole module
   */
  record Piece(BaseLinear module, @Nullable Fused fused, int from, int to) {
    boolean whole() {
      return fused == null;
    }

    /** The module, and the parts if not all of them are meant. */
    String describe() {
      return fused == null ? module.name() : module.name() + " " + fused.parts.subList(from, to);
    }
  }

  /** A module that holds several layers, one after the other. */
  record Fused(BaseLinear module, List<String> parts, Rows division) {
    /** Rows of each part, or null if the known ones do not divide the matrix so. */
    int @Nullable [] rows(int[] known) {
      int[] rows = division.of(module.n(), module.k(), known);
      int sum = 0;
      for (int i = 0; i < rows.length; i++) {
        if (rows[i] < 1 || known[i] != 0 && known[i] != rows[i]) {
          return null;
        }
        sum += rows[i];
      }
      return sum == module.n() ? rows : null;
    }
  }

  /**
   * What a name stands for: the rows of these pieces, one after the other.
   *
   * @param halvesSwapped whether the second half of the name's rows is the first of the module's
   */
  record Target(List<Piece> pieces, boolean halvesSwapped) {
    /** The paths, for messages. */
    String describe() {
      return String.join(" + ", pieces.stream().map(Piece::describe).toList());
    }
  }

  private final Map<String, Target> byPath = new HashMap<>();
  private final Map<String, Set<Target>> byFlatName = new HashMap<>();
  private final Set<String> modules;

  ModuleTable(Map<String, BaseLinear> linears) {
    modules = new LinkedHashSet<>(linears.keySet());
    Map<String, Target> layers = new LinkedHashMap<>();
    linears.forEach((name, linear) -> {
      Target target = new Target(List.of(new Piece(linear, null, 0, 1)), false);
      add(name, target);
      layers.put(local(name), target);
    });
    Map<String, Target> parts = new LinkedHashMap<>();
    ALIASES.forEach(alias -> resolveParts(alias, layers, parts));
    parts.forEach(layers::putIfAbsent);
    Map<String, Target> names = new LinkedHashMap<>(layers);
    ALIASES.forEach(alias -> resolveName(alias, layers, names));
    layers.forEach((name, target) -> {
      String original = UnetNames.original(name);
      if (original != null) {
        names.putIfAbsent(original, target);
      }
    });
    names.forEach((name, target) -> {
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

  private static String local(String name) {
    for (String prefix : BASE_PREFIXES) {
      if (name.startsWith(prefix)) {
        return name.substring(prefix.length());
      }
    }
    return name;
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

  /** Where the base has the alias' name, its parts are found there. */
  private static void resolveParts(Alias alias, Map<String, Target> layers, Map<String, Target> parts) {
    layers.forEach((name, target) -> {
      Matcher matcher = alias.namePattern.matcher(name);
      if (matcher.matches()) {
        BaseLinear module = target.pieces.get(0).module;
        List<String> names = alias.parts.stream().map(part -> filled(part, matcher)).toList();
        Fused fused = names.size() == 1 ? null : new Fused(module, names, alias.rows);
        for (int i = 0; i < names.size(); i++) {
          parts.putIfAbsent(names.get(i), new Target(List.of(new Piece(module, fused, i, i + 1)), alias.halvesSwapped));
        }
      }
    });
  }

  /** Where the base has the alias' parts, apart or in one matrix, its name is found there. */
  private static void resolveName(Alias alias, Map<String, Target> layers, Map<String, Target> names) {
    for (String first : layers.keySet()) {
      Matcher matcher = alias.firstPartPattern.matcher(first);
      if (!matcher.matches()) {
        continue;
      }
      List<Piece> pieces = new ArrayList<>();
      boolean swapped = alias.halvesSwapped;
      for (String part : alias.parts) {
        Target target = layers.get(filled(part, matcher));
        if (target == null) {
          pieces.clear();
          break;
        }
        swapped ^= target.halvesSwapped;
        append(pieces, target.pieces.get(0));
      }
      if (!pieces.isEmpty()) {
        names.putIfAbsent(filled(alias.name, matcher), new Target(pieces, swapped));
      }
    }
  }

  /** Neighbouring parts of one matrix become one piece. */
  private static void append(List<Piece> pieces, Piece piece) {
    Piece last = pieces.isEmpty() ? null : pieces.get(pieces.size() - 1);
    if (last != null && last.fused != null && last.fused == piece.fused && last.to == piece.from) {
      boolean all = last.from == 0 && piece.to == piece.fused.parts.size();
      pieces.set(pieces.size() - 1, all ? new Piece(piece.module, null, 0, 1)
          : new Piece(piece.module, piece.fused, last.from, piece.to));
    } else {
      pieces.add(piece);
    }
  }

  private static Pattern pattern(String template) {
    StringBuilder regex = new StringBuilder();
    for (String literal : template.split("(?<=[#*])|(?=[#*])")) {
      regex.append(literal.equals("#") ? "(\\d+)" : literal.equals("*") ? "((?:.*\\.)?)" : Pattern.quote(literal));
    }
    return Pattern.compile(regex.toString());
  }

  private static String filled(String template, Matcher matcher) {
    return matcher.groupCount() == 0 ? template
        : template.replaceFirst("[#*]", Matcher.quoteReplacement(matcher.group(1)));
  }

  private static Alias alias(String name, String... parts) {
    return new Alias(name, List.of(parts), false, Rows.EQUAL);
  }
}
