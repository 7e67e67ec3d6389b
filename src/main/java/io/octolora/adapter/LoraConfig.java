// SPDX-License-Identifier: Apache-2.0
package io.octolora.adapter;

import io.octolora.FormatException;
import io.octolora.Status;
import io.octolora.internal.Json;
import io.octolora.internal.PythonPattern;
import java.util.ArrayList;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.Set;
import org.jetbrains.annotations.Nullable;

/**
 * PEFT's LoraConfig as {@code adapter_config.json} or a header's {@code lora_adapter_metadata} has it: the rank and
 * scale of each module. Fields that change the base or the formula are refused by name.
 */
final class LoraConfig {
  /** Set to anything, these change what is computed. */
  private static final Set<String> STRUCTURAL = Set.of("target_parameters", "layer_replication",
      "trainable_token_indices", "use_qalora", "arrow_config", "use_bdlora", "kasa_config", "monteclora_config");
  /** The same, by their beginning. */
  private static final List<String> STRUCTURAL_STARTS = List.of("alora_", "kasa_", "use_kasa", "monteclora",
      "use_monteclora");
  /** Read here, or without an effect on what a finished adapter computes. */
  private static final Set<String> KNOWN = Set.of("peft_type", "r", "lora_alpha", "use_rslora", "use_dora",
      "rank_pattern", "alpha_pattern", "init_lora_weights", "auto_mapping", "base_model_name_or_path", "bias",
      "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode",
      "layers_pattern", "layers_to_transform", "loftq_config", "lora_bias", "lora_dropout", "lora_ga_config",
      "megatron_config", "megatron_core", "modules_to_save", "peft_version", "qalora_group_size", "revision",
      "runtime_config", "target_modules", "task_type");
  /** Initialisations that leave the base as it is. */
  private static final Set<String> HARMLESS_INITIALISATIONS = Set.of("gaussian", "orthogonal", "eva");

  private final String where;
  private final long rank;
  private final double alpha;
  private final boolean rankStabilized;
  private final boolean dora;
  private final List<PatternEntry<Long>> rankPattern;
  private final List<PatternEntry<Double>> alphaPattern;
  private final List<String> unknownFields = new ArrayList<>();

  /** One entry of rank_pattern or alpha_pattern, in the order of the file. */
  private static final class PatternEntry<T> {
    final String key;
    final PythonPattern pattern;
    final T value;
    boolean used;

    PatternEntry(String key, String where, T value) {
      this.key = key;
      this.pattern = PythonPattern.compile("(.*\\.)?(" + key + ")$", where + " " + key);
      this.value = value;
    }

    void noteIfUnused(String name, String where, List<String> notes) {
      if (!used) {
        notes.add("%s: %s key %s fits no module of the adapter".formatted(where, name, key));
      }
    }
  }

  /**
   * @param fields the names of LoraConfig without a prefix
   * @param typeRequired whether peft_type must be there
   */
  LoraConfig(Map<String, Object> fields, String where, boolean typeRequired) {
    this.where = where;
    Object type = fields.get("peft_type");
    if (!"LORA".equals(type) && (typeRequired || type != null)) {
      throw new FormatException(Status.UNSUPPORTED, "%s: peft_type = %s, expected LORA".formatted(where,
          Json.describe(type)));
    }
    refuseStructural(fields);
    fields.forEach((name, value) -> {
      if (!KNOWN.contains(name) && !STRUCTURAL.contains(name) && isSet(value)) {
        unknownFields.add("%s: %s = %s is not known here and has no effect".formatted(where, name,
            Json.describe(value)));
      }
    });
    this.rank = positiveInteger(fields.get("r"), where + ": r");
    this.alpha = number(fields.get("lora_alpha"), where + ": lora_alpha");
    this.rankStabilized = isTrue(fields, "use_rslora");
    this.dora = isTrue(fields, "use_dora");
    this.rankPattern = overrides(fields, "rank_pattern", LoraConfig::positiveInteger);
    this.alphaPattern = overrides(fields, "alpha_pattern", LoraConfig::number);
  }

  /** Whether each module also has a magnitude that its row norms are replaced by. */
  boolean dora() {
    return dora;
  }

  /** @param path the module without {@code base_model.model.} */
  long rank(String path) {
    return first(rankPattern, path, rank);
  }

  /** {@code alpha / rank}, or {@code alpha / sqrt(rank)} under rank stabilization. */
  double scale(String path) {
    double moduleAlpha = first(alphaPattern, path, alpha);
    long moduleRank = rank(path);
    return rankStabilized ? moduleAlpha / Math.sqrt(moduleRank) : moduleAlpha / moduleRank;
  }

  /**
   * Fields that are set but not known, and keys of the patterns that fitted no module so far, for people: PEFT itself
   * ignores a mistyped key silently.
   */
  List<String> notes() {
    List<String> notes = new ArrayList<>(unknownFields);
    rankPattern.forEach(entry -> entry.noteIfUnused("rank_pattern", where, notes));
    alphaPattern.forEach(entry -> entry.noteIfUnused("alpha_pattern", where, notes));
    return notes;
  }

  private static <T> T first(List<PatternEntry<T>> overrides, String path, T otherwise) {
    for (PatternEntry<T> entry : overrides) {
      if (entry.pattern.matchesStart(path)) {
        entry.used = true;
        return entry.value;
      }
    }
    return otherwise;
  }

  private void refuseStructural(Map<String, Object> fields) {
    fields.forEach((name, value) -> {
      boolean structural = STRUCTURAL.contains(name) || STRUCTURAL_STARTS.stream().anyMatch(name::startsWith);
      if (structural && isSet(value)) {
        throw new FormatException(Status.UNSUPPORTED,
            "%s: %s = %s changes what the adapter computes and is not supported".formatted(where, name,
                Json.describe(value)));
      }
    });
    Object initialisation = fields.get("init_lora_weights");
    boolean harmless = initialisation == null || initialisation instanceof Boolean
        || initialisation instanceof String text && HARMLESS_INITIALISATIONS.contains(text);
    if (!harmless) {
      throw new FormatException(Status.UNSUPPORTED,
          "%s: init_lora_weights = %s, expected true, false or one of %s: others may have changed the base weights"
              .formatted(where, Json.describe(initialisation), HARMLESS_INITIALISATIONS.stream().sorted().toList()));
    }
  }

  private static boolean isSet(@Nullable Object value) {
    return value != null && !Boolean.FALSE.equals(value) && !List.of().equals(value) && !Map.of().equals(value);
  }

  private boolean isTrue(Map<String, Object> fields, String name) {
    Object value = fields.get(name);
    if (value == null || value instanceof Boolean) {
      return Boolean.TRUE.equals(value);
    }
    throw new FormatException("%s: %s = %s, expected true or false".formatted(where, name, Json.describe(value)));
  }

  @FunctionalInterface
  private interface Reader<T> {
    T read(@Nullable Object value, String where);
  }

  private <T> List<PatternEntry<T>> overrides(Map<String, Object> fields, String name, Reader<T> reader) {
    Object value = fields.get(name);
    List<PatternEntry<T>> overrides = new ArrayList<>();
    if (value != null) {
      String place = where + ": " + name;
      new LinkedHashMap<>(Json.object(value, place)).forEach((key, entry) ->
          overrides.add(new PatternEntry<>(key, place, reader.read(entry, place + " " + key))));
    }
    return overrides;
  }

  private static long positiveInteger(@Nullable Object value, String where) {
    if (value instanceof Long number && number > 0) {
      return number;
    }
    throw new FormatException("%s = %s, expected an integer above 0".formatted(where, Json.describe(value)));
  }

  private static double number(@Nullable Object value, String where) {
    if (value instanceof Number number && Double.isFinite(number.doubleValue())) {
      return number.doubleValue();
    }
    throw new FormatException("%s = %s, expected a finite number".formatted(where, Json.describe(value)));
  }
}
