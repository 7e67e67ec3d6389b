// SPDX-License-Identifier: Apache-2.0
package io.octolora.quantize;

import io.octolora.FormatException;
import io.octolora.Status;
import io.octolora.checkpoint.BaseLinear;
import io.octolora.checkpoint.Tensor;
import io.octolora.internal.Names;
import java.io.IOException;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.security.MessageDigest;
import java.security.NoSuchAlgorithmException;
import java.util.ArrayList;
import java.util.HexFormat;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Locale;
import java.util.Map;
import java.util.TreeMap;

/** What will be written where, decided before the first byte is. */
final class Plan {
  /** A source tensor and what it becomes: itself, or codes and scales. Stays within a shard. */
  record Unit(Tensor source, boolean quantized, List<TensorSpec> outputs) {
    long bytes() {
      return outputs.stream().mapToLong(TensorSpec::bytes).sum();
    }
  }

  /** A file to be written. */
  record Shard(String file, List<Unit> units, ShardLayout layout) {
    long sourceBytes() {
      return units.stream().mapToLong(unit -> unit.source().byteSize()).sum();
    }
  }

  private static final String WEIGHT = ".weight";

  private final Source source;
  private final Quantizer.Options options;
  private final SkipRule skip;
  private final List<Shard> shards = new ArrayList<>();
  private final List<String> quantized = new ArrayList<>();
  private final List<String> skipped = new ArrayList<>();

  Plan(Source source, Quantizer.Options options) {
    this.source = source;
    this.options = options;
    Map<String, BaseLinear> linears = source.checkpoint().linears();
    for (BaseLinear linear : linears.values()) {
      if (linear.quantized()) {
        throw new FormatException(Status.UNSUPPORTED,
            "%s: %s is int8 already, expected F32, F16 or BF16 weights".formatted(source.checkpoint().path(), linear));
      }
    }
    skip = SkipRule.of(options.format(), options.skip(), source.diffusers(), source.modelType(), linears.keySet());
    arrange(units(linears));
  }

  private List<Unit> units(Map<String, BaseLinear> linears) {
    Map<String, Unit> units = new TreeMap<>(Names.NATURAL);
    for (Tensor tensor : source.checkpoint().tensors().values()) {
      units.put(tensor.name(), new Unit(tensor, false, List.of(TensorSpec.of(tensor))));
    }
    for (BaseLinear linear : linears.values()) {
      String module = linear.name();
      if (Names.isEmbedding(module) || skip.skips(module)) {
        skipped.add(module);
      } else {
        quantized.add(module);
        refuseParts(module);
        units.put(module + WEIGHT, new Unit(linear.weight(), true,
            options.format().tensors(module, linear.weight().type(), linear.n(), linear.k())));
      }
    }
    if (quantized.isEmpty()) {
      throw new FormatException("%s: none of %d linear layers would be quantized%s".formatted(
          source.checkpoint().path(), linears.size(), skipped.isEmpty() ? "" : "; all are skipped"));
    }
    return new ArrayList<>(units.values());
  }

  /** A tensor that would be taken for a part of the layer once it is int8, or stand where such a part is written. */
  private void refuseParts(String module) {
    for (String part : options.format().parts()) {
      Tensor tensor = source.checkpoint().tensors().get(module + part);
      if (tensor != null) {
        throw new FormatException(Status.UNSUPPORTED, "%s: %s would read it as a part of the int8 layer %s; skip that "
            .formatted(tensor, options.format().tool(), module) + "layer, or take the tensor out of the source");
      }
    }
  }

  private void arrange(List<Unit> units) {
    List<List<Unit>> groups = new ArrayList<>();
    long bytes = 0;
    for (Unit unit : units) {
      if (groups.isEmpty() || bytes + unit.bytes() > options.maxShardBytes(source.diffusers())) {
        groups.add(new ArrayList<>());
        bytes = 0;
      }
      groups.get(groups.size() - 1).add(unit);
      bytes += unit.bytes();
    }
    for (int i = 0; i < groups.size(); i++) {
      String name = source.stem() + (groups.size() == 1 ? "" : String.format(Locale.ROOT, "-%05d-of-%05d", i + 1, groups.size()));
      List<TensorSpec> tensors = groups.get(i).stream().flatMap(unit -> unit.outputs().stream()).toList();
      shards.add(new Shard(name + ".safetensors", groups.get(i), new ShardLayout(tensors)));
    }
  }

  List<Shard> shards() {
    return shards;
  }

  /** Modules that become int8, in numeric order. */
  List<String> quantized() {
    return quantized;
  }

  /** Modules with a weight of two dimensions that stay as they are. */
  List<String> skipped() {
    return skipped;
  }

  /** Patterns of the skip list that fit no module. */
  List<String> unusedSkips() {
    return skip.unused();
  }

  long sourceBytes() {
    return shards.stream().mapToLong(Shard::sourceBytes).sum();
  }

  long outputBytes() {
    return shards.stream().mapToLong(shard -> shard.layout().fileBytes()).sum();
  }

  /** The small files of the result, by name; an index comes last. */
  Map<String, String> texts() {
    Map<String, String> texts = new LinkedHashMap<>();
    Map<String, Object> config = new LinkedHashMap<>(source.config());
    boolean map = options.format() == TargetFormat.QUANTO && !source.diffusers();
    if (map) {
      // optimum-quanto's own container; transformers has none for Quanto
      Map<String, Object> modules = new LinkedHashMap<>();
      quantized.forEach(module -> modules.put(module, Map.of("weights", "qint8", "activations", "none")));
      texts.put("quanto_qmap.json", PythonJson.write(modules));
    } else {
      config.put("quantization_config", quantizationConfig());
    }
    if (!config.isEmpty()) {
      texts.put("config.json", PythonJson.write(config));
    }
    if (shards.size() > 1) {
      Map<String, Object> weightMap = new LinkedHashMap<>();
      long total = 0;
      for (Shard shard : shards) {
        for (Unit unit : shard.units()) {
          unit.outputs().forEach(tensor -> weightMap.put(tensor.name(), shard.file()));
          total += unit.bytes();
        }
      }
      texts.put(source.stem() + ".safetensors.index.json",
          PythonJson.write(Map.of("metadata", Map.of("total_size", total), "weight_map", weightMap)));
    }
    return texts;
  }

  private Map<String, Object> quantizationConfig() {
    Map<String, Object> fields = new LinkedHashMap<>();
    fields.put("quant_method", options.format().tool());
    switch (options.format()) {
      case BITSANDBYTES -> {
        fields.put("load_in_8bit", true);
        fields.put("_load_in_8bit", true);
        fields.put("load_in_4bit", false);
        fields.put("_load_in_4bit", false);
        fields.put("llm_int8_threshold", Double.parseDouble(Float.toString(options.threshold())));
        fields.put("llm_int8_skip_modules", skip.written());
        fields.put("llm_int8_enable_fp32_cpu_offload", false);
        fields.put("llm_int8_has_fp16_weight", false);
        fields.put("bnb_4bit_compute_dtype", "float32");
        fields.put("bnb_4bit_quant_storage", "uint8");
        fields.put("bnb_4bit_quant_type", "fp4");
        fields.put("bnb_4bit_use_double_quant", false);
      }
      case QUANTO -> {
        fields.put("weights_dtype", "int8");
        fields.put("modules_to_not_convert", skip.written());
      }
      case COMPRESSED_TENSORS -> {
        fields.put("format", "int-quantized");
        fields.put("quantization_status", "compressed");
        fields.put("ignore", skip.written());
        fields.put("kv_cache_scheme", null);
        Map<String, Object> group = new LinkedHashMap<>();
        group.put("targets", List.of("Linear"));
        group.put("weights", arguments("channel", false));
        group.put("input_activations", arguments("token", true));
        group.put("output_activations", null);
        fields.put("config_groups", Map.of("group_0", group));
      }
    }
    return fields;
  }

  private static Map<String, Object> arguments(String strategy, boolean dynamic) {
    return Map.of("num_bits", 8, "type", "int", "symmetric", true, "strategy", strategy, "dynamic", dynamic);
  }

  /** Tells this job from every other: what is read, from which state of the files, and what is to be written. */
  String fingerprint() throws IOException {
    StringBuilder text = new StringBuilder();
    for (Path file : source.weightFiles()) {
      text.append(file.toAbsolutePath()).append(' ').append(Files.size(file)).append(' ')
          .append(Files.getLastModifiedTime(file)).append('\n');
    }
    for (Shard shard : shards) {
      text.append(shard.file()).append('\n');
      text.append(StandardCharsets.UTF_8.decode(shard.layout().start())).append('\n');
      shard.units().forEach(unit -> text.append(unit.quantized() ? '1' : '0').append(unit.source()).append('\n'));
    }
    texts().forEach((name, content) -> text.append(name).append('\n').append(content));
    try {
      return HexFormat.of().formatHex(
          MessageDigest.getInstance("SHA-256").digest(text.toString().getBytes(StandardCharsets.UTF_8)));
    } catch (NoSuchAlgorithmException e) {
      throw new IllegalStateException(e); // every Java platform has it
    }
  }
}
