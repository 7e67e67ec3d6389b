// SPDX-License-Identifier: Apache-2.0
package io.octolora.checkpoint;

import io.octolora.FormatException;
import io.octolora.Status;
import io.octolora.internal.Json;
import io.octolora.internal.PythonPattern;
import java.util.ArrayList;
import java.util.List;
import java.util.Map;
import java.util.function.Predicate;
import org.jetbrains.annotations.Nullable;

/**
 * {@code quantization_config} of compressed-tensors: groups of modules and how each is quantized. Read are symmetric
 * 8-bit integers, a scale a row or one for all; activations float, dynamic per token, or static per tensor.
 */
final class CompressedTensorsConfig {
  /** Steps from 0 to the largest |x| of a token: see {@link WeightFormat#COMPRESSED_TENSORS_INT8}. */
  private static final float DIVISOR = 127;

  private final String where;
  private final List<Predicate<String>> ignored = new ArrayList<>();
  private final List<Group> groups = new ArrayList<>();

  CompressedTensorsConfig(Map<String, Object> fields, String where) {
    this.where = where;
    for (String name : List.of("transform_config", "sparsity_config")) {
      Object value = fields.get(name);
      if (value != null && !Map.of().equals(value) && !List.of().equals(value)) {
        throw new FormatException(Status.UNSUPPORTED,
            "%s: %s = %s changes what is computed and is not supported".formatted(where, name, Json.describe(value)));
      }
    }
    names(fields.get("ignore"), "ignore").forEach(item -> ignored.add(byName(item)));
    Json.object(fields.get("config_groups"), where + ": config_groups").forEach((name, value) ->
        groups.add(new Group(name, Json.object(value, where + ": config_groups " + name))));
  }

  /** Whether the module is left as it is: it is ignored, or no group takes it. */
  boolean skips(String module) {
    return ignored.stream().anyMatch(item -> item.test(module)) || find(module).isEmpty();
  }

  /**
   * The group of a quantized module: one that names it, else one that takes all linear layers.
   *
   * @throws FormatException if none or several do
   */
  Group group(String module) {
    List<Group> found = find(module);
    if (found.size() != 1) {
      throw new FormatException("%s: %s of config_groups take %s, whose tensors are int8; expected one".formatted(where,
          found.isEmpty() ? "none" : found, module));
    }
    return found.get(0);
  }

  private List<Group> find(String module) {
    List<Group> named = groups.stream().filter(group -> group.named.stream().anyMatch(item -> item.test(module)))
        .toList();
    return named.isEmpty() ? groups.stream().filter(group -> group.allLinears).toList() : named;
  }

  private Predicate<String> byName(String item) {
    if (item.startsWith("re:")) {
      return PythonPattern.compile(item.substring(3), where + ": " + item)::matchesStart;
    }
    return item::equals;
  }

  private List<String> names(@Nullable Object value, String field) {
    List<String> names = new ArrayList<>();
    if (value != null && !(value instanceof List<?>)) {
      throw new FormatException("%s: %s = %s, expected a list of names".formatted(where, field, Json.describe(value)));
    }
    for (Object item : value == null ? List.of() : (List<?>) value) {
      if (!(item instanceof String name)) {
        throw new FormatException("%s: %s has %s, expected names".formatted(where, field, Json.describe(item)));
      }
      names.add(name);
    }
    return names;
  }

  /** One entry of config_groups. */
  final class Group {
    private final String name;
    private final List<Predicate<String>> named = new ArrayList<>();
    private final boolean allLinears;
    private final Map<String, Object> weights;
    private final @Nullable Map<String, Object> activations;
    private final @Nullable Object outputs;

    private Group(String name, Map<String, Object> fields) {
      this.name = name;
      String place = where + ": config_groups " + name;
      List<String> targets = names(fields.get("targets"), "config_groups " + name + " targets");
      allLinears = targets.contains("Linear");
      targets.stream().filter(target -> !target.equals("Linear")).forEach(target -> named.add(byName(target)));
      weights = fields.get("weights") == null ? Map.of() : Json.object(fields.get("weights"), place + " weights");
      Object inputs = fields.get("input_activations");
      activations = inputs == null ? null : Json.object(inputs, place + " input_activations");
      outputs = fields.get("output_activations");
    }

    /** Whether the scale of x stands in the file. */
    boolean fixedActivations() {
      return activations != null && !Boolean.TRUE.equals(activations.get("dynamic"));
    }

    /**
     * @param inputScale of a module with {@link #fixedActivations()}
     * @throws FormatException if the group asks for something else than is read here
     */
    Quantization quantization(float inputScale) {
      if (outputs != null) {
        throw new FormatException(Status.UNSUPPORTED, "%s: output_activations = %s are not supported".formatted(this,
            Json.describe(outputs)));
      }
      require(weights, "weights", "channel", "tensor");
      if (!(weights.get("dynamic") == null || Boolean.FALSE.equals(weights.get("dynamic")))) {
        throw unsupported("weights", "dynamic", weights.get("dynamic"), "false");
      }
      if (activations == null) {
        return Quantization.weightOnly();
      }
      Object dynamic = activations.get("dynamic");
      if (dynamic != null && !(dynamic instanceof Boolean)) {
        throw unsupported("input_activations", "dynamic", dynamic, "true or false");
      }
      require(activations, "input_activations", fixedActivations() ? "tensor" : "token");
      return fixedActivations() ? Quantization.fixed(inputScale) : Quantization.dynamic(DIVISOR);
    }

    private void require(Map<String, Object> fields, String what, String... strategies) {
      if (!Long.valueOf(8).equals(fields.get("num_bits"))) {
        throw unsupported(what, "num_bits", fields.get("num_bits"), "8");
      }
      if (!"int".equals(fields.get("type"))) {
        throw unsupported(what, "type", fields.get("type"), "int");
      }
      if (!(fields.get("symmetric") == null || Boolean.TRUE.equals(fields.get("symmetric")))) {
        throw unsupported(what, "symmetric", fields.get("symmetric"), "true: zero points are not supported");
      }
      if (!List.of(strategies).contains(String.valueOf(fields.get("strategy")))) {
        throw unsupported(what, "strategy", fields.get("strategy"), String.join(" or ", strategies));
      }
    }

    private FormatException unsupported(String what, String field, @Nullable Object value, String expected) {
      return new FormatException(Status.UNSUPPORTED, "%s: %s: %s = %s, expected %s".formatted(this, what, field,
          Json.describe(value), expected));
    }

    @Override
    public String toString() {
      return where + ": config_groups " + name;
    }
  }
}
