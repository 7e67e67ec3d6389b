// SPDX-License-Identifier: Apache-2.0
package io.octolora.checkpoint;

import io.octolora.FormatException;
import io.octolora.Status;
import io.octolora.internal.Json;
import java.nio.ByteBuffer;
import java.util.LinkedHashMap;
import java.util.Map;
import java.util.Set;

/**
 * What ComfyUI wrote about its layers: a JSON text in a {@code comfy_quant} tensor beside each, or all in the header's
 * {@code _quantization_metadata}.
 */
final class ComfyLayers {
  static final String END = ".comfy_quant";
  private static final String METADATA = "_quantization_metadata";
  private static final Set<String> KNOWN = Set.of("format", "convrot", "convrot_groupsize");

  /** A layer's fields and where they stand. */
  private record Layer(String where, Map<String, Object> fields) {}

  private final Map<String, Layer> layers = new LinkedHashMap<>();

  private ComfyLayers() {}

  static ComfyLayers read(WeightFiles weights) {
    ComfyLayers comfy = new ComfyLayers();
    for (SafetensorsFile file : weights.files()) {
      String text = file.metadata().get(METADATA);
      if (text != null) {
        String where = file.file() + ": " + METADATA;
        Map<String, Object> all = Json.object(Json.parse(text, where), where);
        if (all.get("layers") != null) {
          Json.object(all.get("layers"), where + ": layers")
              .forEach((module, fields) -> comfy.add(module, where + ": " + module, fields));
        }
      }
    }
    for (Tensor tensor : weights.tensors().values()) {
      if (tensor.name().endsWith(END)) {
        if (tensor.type() != ElementType.U8) {
          throw new FormatException("%s: expected U8, the bytes of a JSON text".formatted(tensor));
        }
        ByteBuffer bytes = tensor.bytes();
        byte[] text = new byte[bytes.remaining()];
        bytes.get(text);
        comfy.add(tensor.name().substring(0, tensor.name().length() - END.length()), tensor.toString(),
            Json.parse(text, 0, text.length, tensor.toString(), Json::value));
      }
    }
    return comfy;
  }

  private void add(String module, String where, Object value) {
    Map<String, Object> fields = Json.object(value, where);
    Layer before = layers.putIfAbsent(module, new Layer(where, fields));
    if (before != null && !before.fields.equals(fields)) {
      throw new FormatException("%s is %s, but %s is %s".formatted(before.where, Json.describe(before.fields), where,
          Json.describe(fields)));
    }
  }

  /** Whether anything is said about the module. */
  boolean has(String module) {
    return layers.containsKey(module);
  }

  /** @throws FormatException unless the layer is int8 in the basis that x comes in */
  void requireInt8(String module) {
    Layer layer = layers.get(module);
    Object format = layer.fields.get("format");
    if (!"int8_tensorwise".equals(format)) {
      throw new FormatException(Status.UNSUPPORTED, "%s: ComfyUI format = %s, expected int8_tensorwise".formatted(
          layer.where, Json.describe(format)));
    }
    if (isSet(layer.fields.get("convrot"))) {
      throw new FormatException(Status.UNSUPPORTED, ("%s: convrot = %s: the weight is stored in a rotated input basis "
          + "(groups of %s), which is not supported; expected int8_tensorwise without convrot").formatted(layer.where,
              Json.describe(layer.fields.get("convrot")), Json.describe(layer.fields.get("convrot_groupsize"))));
    }
    layer.fields.forEach((name, value) -> {
      if (!KNOWN.contains(name) && isSet(value)) {
        throw new FormatException(Status.UNSUPPORTED,
            "%s: ComfyUI field %s = %s is not known here and may change what is computed".formatted(layer.where, name,
                Json.describe(value)));
      }
    });
  }

  private static boolean isSet(Object value) {
    return value != null && !Boolean.FALSE.equals(value);
  }
}
