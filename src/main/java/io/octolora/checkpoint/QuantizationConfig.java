// SPDX-License-Identifier: Apache-2.0
package io.octolora.checkpoint;

import io.octolora.FormatException;
import io.octolora.Status;
import io.octolora.internal.Json;
import io.octolora.internal.PythonPattern;
import java.io.IOException;
import java.util.ArrayList;
import java.util.List;
import java.util.Map;
import org.jetbrains.annotations.Nullable;

/**
 * What the JSON files beside the weights say about quantization: {@code quantization_config} in {@code config.json}
 * (transformers, diffusers) and {@code quanto_qmap.json} (optimum-quanto). The tensors decide what a module is; this
 * adds what they cannot tell and is checked against them.
 */
final class QuantizationConfig {
  /** Where bitsandbytes sets the outlier threshold when nobody does. */
  static final float DEFAULT_THRESHOLD = 6;

  private final String where;
  private final String mapFile;
  private final @Nullable Map<String, Object> fields;
  private final @Nullable Map<String, Object> quantoMap;
  private final boolean diffusers;
  private final List<String> skipped;
  private final List<PythonPattern> skippedPatterns = new ArrayList<>();
  private final @Nullable CompressedTensorsConfig compressedTensors;

  private QuantizationConfig(String where, String mapFile, @Nullable Map<String, Object> fields,
      @Nullable Map<String, Object> quantoMap, boolean diffusers) {
    this.where = where;
    this.mapFile = mapFile;
    this.fields = fields;
    this.quantoMap = quantoMap;
    this.diffusers = diffusers;
    this.skipped = names(method().equals("bitsandbytes") ? "llm_int8_skip_modules" : "modules_to_not_convert");
    this.compressedTensors =
        fields != null && method().equals("compressed-tensors") ? new CompressedTensorsConfig(fields, where) : null;
    if (method().equals("bitsandbytes") && !diffusers) {
      for (String item : skipped) {
        skippedPatterns.add(PythonPattern.compile(item, where + ": llm_int8_skip_modules"));
      }
    }
  }

  static QuantizationConfig read(WeightFiles weights) throws IOException {
    Map<String, Object> config = weights.json("config.json");
    Map<String, Object> fields = null;
    String where = weights.beside("config.json") + ": quantization_config";
    boolean diffusers = false;
    if (config != null) {
      diffusers = config.containsKey("_diffusers_version") || config.containsKey("_class_name");
      Object value = config.get("quantization_config");
      fields = value == null ? null : Json.object(value, where);
    }
    return new QuantizationConfig(where, weights.beside("quanto_qmap.json"), fields, weights.json("quanto_qmap.json"),
        diffusers);
  }

  /** {@code quant_method}, empty if there is none. */
  String method() {
    Object value = fields == null ? null : fields.get("quant_method");
    return value instanceof String text ? text : "";
  }

  /** Whether config.json or the map says that there are int8 modules. */
  boolean promisesInt8() {
    return switch (method()) {
      case "bitsandbytes" -> isTrue("load_in_8bit") || isTrue("_load_in_8bit");
      case "quanto" -> "int8".equals(fields.get("weights_dtype")) || "int8".equals(fields.get("weights"));
      case "compressed-tensors" -> true;
      case "torchao" -> String.valueOf(fields.get("quant_type")).contains("Int8");
      default -> quantoMap != null && !quantoMap.isEmpty();
    };
  }

  /** null unless compressed-tensors is the method. */
  @Nullable CompressedTensorsConfig compressedTensors() {
    return compressedTensors;
  }

  /** Columns of x with a value at or above it are outliers; 0 is off. */
  float outlierThreshold() {
    Object value = fields == null ? null : fields.get("llm_int8_threshold");
    if (value == null) {
      return DEFAULT_THRESHOLD;
    }
    if (!(value instanceof Number number) || !(number.floatValue() >= 0) || Float.isInfinite(number.floatValue())) {
      throw new FormatException("%s: llm_int8_threshold = %s, expected a finite number, 0 or above".formatted(where,
          Json.describe(value)));
    }
    return number.floatValue();
  }

  /** Whether Quanto quantized this module's activations to int8, as far as the files say. */
  boolean quantizesActivations(String module) {
    Object activations = null;
    String place = where + ": activations";
    if (quantoMap != null && quantoMap.get(module) != null) {
      place = mapFile + ": " + module;
      Map<String, Object> entry = Json.object(quantoMap.get(module), place);
      if (!"qint8".equals(entry.get("weights"))) {
        throw new FormatException(Status.UNSUPPORTED,
            "%s: weights = %s, expected qint8, as the tensors are int8".formatted(
            place, Json.describe(entry.get("weights"))));
      }
      activations = entry.get("activations");
    } else if (method().equals("quanto")) {
      activations = fields.get("activations");
    }
    if (activations == null || activations.equals("none")) {
      return false;
    }
    if (activations.equals("qint8") || activations.equals("int8")) {
      return true;
    }
    throw new FormatException(Status.UNSUPPORTED, "%s: activations = %s, expected none or qint8".formatted(place,
        Json.describe(activations)));
  }

  /** Whether the files say that the module stays float; null if they do not say. */
  @Nullable Boolean skips(String module) {
    if (quantoMap != null) {
      return !quantoMap.containsKey(module);
    }
    if (compressedTensors != null) {
      return compressedTensors.skips(module);
    }
    if (skipped.isEmpty()) {
      return null;
    }
    String leaf = module.substring(module.lastIndexOf('.') + 1);
    if (method().equals("quanto")) {
      return skipped.contains(leaf);
    }
    if (method().equals("torchao")) {
      String parameter = module + ".weight";
      return skipped.stream().anyMatch(item -> parameter.contains(item + ".") || parameter.equals(item));
    }
    if (method().equals("bitsandbytes") && diffusers) {
      return skipped.stream().anyMatch(item -> leaf.equals(item) || module.contains(item + ".") || module.equals(item));
    }
    if (method().equals("bitsandbytes")) {
      return skipped.stream().anyMatch(module::endsWith)
          || skippedPatterns.stream().anyMatch(pattern -> pattern.matchesStart(module));
    }
    return null;
  }

  private boolean isTrue(String field) {
    return Boolean.TRUE.equals(fields.get(field));
  }

  private List<String> names(String field) {
    Object value = fields == null ? null : fields.get(field);
    if (value == null) {
      return List.of();
    }
    List<String> names = new ArrayList<>();
    if (value instanceof List<?> list) {
      for (Object item : list) {
        if (!(item instanceof String name)) {
          throw new FormatException("%s: %s has %s, expected names".formatted(where, field, Json.describe(item)));
        }
        names.add(name);
      }
      return names;
    }
    throw new FormatException("%s: %s = %s, expected a list of names".formatted(where, field, Json.describe(value)));
  }
}
