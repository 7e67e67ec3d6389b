// SPDX-License-Identifier: Apache-2.0
package io.octolora.checkpoint;

import io.octolora.FormatException;
import io.octolora.Status;
import io.octolora.internal.Json;
import java.nio.file.Path;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import org.jetbrains.annotations.Nullable;

/**
 * What torchao wrote about its tensors into headers or the index: {@code tensor_names} lists the original names, and
 * under each name stands its class and how activations meet it. {@code Int8Tensor} alone is read here, symmetric, with
 * float or dynamic per-row activations; torchao measures rows by {@code max |x| / 127.5}.
 */
final class TorchaoLayers {
  private static final String WEIGHT = ".weight";

  /** By module. */
  private final Map<String, Layer> layers = new HashMap<>();

  private TorchaoLayers() {}

  static TorchaoLayers read(Path path, WeightFiles weights) {
    TorchaoLayers torchao = new TorchaoLayers();
    for (Map<String, ?> metadata : weights.metadata()) {
      if (metadata.get("tensor_names") instanceof String text) {
        String where = path + ": tensor_names";
        if (!(Json.parse(text, where) instanceof List<?> names)) {
          throw new FormatException("%s: %s, expected a list of names".formatted(where, Json.describe(text)));
        }
        names.forEach(name -> torchao.add(path, String.valueOf(name), metadata.get(String.valueOf(name))));
      }
    }
    return torchao;
  }

  private void add(Path path, String name, @Nullable Object text) {
    if (!(text instanceof String json)) {
      return; // reported where the tensor itself turns up
    }
    String where = path + ": torchao's metadata of " + name;
    Map<String, Object> entry = Json.object(Json.parse(json, where), where);
    Object type = entry.get("_type");
    if ("Tensor".equals(type)) {
      return;
    }
    if (!"Int8Tensor".equals(type) || !name.endsWith(WEIGHT)) {
      throw new FormatException(Status.UNSUPPORTED,
          "%s: _type = %s, expected Int8Tensor for a weight or Tensor for the rest".formatted(where,
              Json.describe(type)));
    }
    layers.put(name.substring(0, name.length() - WEIGHT.length()),
        new Layer(where, Json.object(entry.get("_data"), where + ": _data")));
  }

  /** @param evidence a tensor of the module, for the message */
  Layer layer(String module, Tensor evidence) {
    Layer layer = layers.get(module);
    if (layer == null) {
      throw new FormatException(Status.UNSUPPORTED, ("%s: named as by torchao, but no header or index has its class: "
          + "tensor_names does not lead to %s.weight").formatted(evidence, module));
    }
    return layer.like(evidence.name());
  }

  /** One weight; colon tells the names of the first releases, {@code m.weight:qdata}, from {@code m._weight_qdata}. */
  static final class Layer {
    private final String where;
    private final Map<String, Object> fields;
    private final boolean colon;

    private Layer(String where, Map<String, Object> fields) {
      this(where, fields, false);
    }

    private Layer(String where, Map<String, Object> fields, boolean colon) {
      this.where = where;
      this.fields = fields;
      this.colon = colon;
    }

    private Layer like(String name) {
      return new Layer(where, fields, name.endsWith(".weight:qdata"));
    }

    /** What follows the module in the name of a part. */
    String key(String part) {
      return (colon ? ".weight:" : "._weight_") + part;
    }

    /** The stated blocks must be those of the scale: a row, or all. */
    void requireBlocks(int[] size, Tensor scale) {
      Object blocks = fields.get("block_size");
      List<Long> row = List.of(1L, (long) size[1]);
      List<Long> all = List.of((long) size[0], (long) size[1]);
      if (blocks != null && !blocks.equals(scale.elementCount() == 1 ? all : row)) {
        throw new FormatException(Status.UNSUPPORTED, "%s: block_size = %s for %s of a %d x %d weight, expected %s"
            .formatted(where, Json.describe(blocks), scale, size[0], size[1], scale.elementCount() == 1 ? all : row));
      }
    }

    Quantization quantization() {
      Object kwargs = fields.get("act_quant_kwargs");
      if (kwargs == null) {
        return Quantization.weightOnly();
      }
      Map<String, Object> activations = data(kwargs, "act_quant_kwargs");
      Object granularity = activations.get("granularity");
      Object mapping = activations.get("mapping_type");
      boolean perRow = List.of("PerRow", "PerToken").contains(type(granularity));
      boolean symmetric = mapping == null || "SYMMETRIC".equals(mapping)
          || mapping instanceof Map<?, ?> map && "SYMMETRIC".equals(map.get("_data"));
      if (!perRow || !symmetric || isSet(activations.get("scale")) || isSet(activations.get("reduce_range"))
          || isSet(fields.get("reduce_range"))) {
        throw new FormatException(Status.UNSUPPORTED,
            "%s: act_quant_kwargs = %s, reduce_range = %s; expected granularity PerRow, mapping_type SYMMETRIC, no "
                .formatted(where, Json.describe(kwargs), fields.get("reduce_range"))
                + "scale and no reduced range");
      }
      return Quantization.dynamic(127.5f);
    }

    private static boolean isSet(@Nullable Object value) {
      return value != null && !Boolean.FALSE.equals(value);
    }

    private Map<String, Object> data(Object value, String name) {
      Map<String, Object> map = Json.object(value, where + ": " + name);
      return map.containsKey("_data") ? Json.object(map.get("_data"), where + ": " + name) : map;
    }

    private static Object type(@Nullable Object value) {
      return value instanceof Map<?, ?> map && map.get("_type") instanceof String name ? name : String.valueOf(value);
    }
  }
}
