// SPDX-License-Identifier: Apache-2.0
package io.octolora.oracle;

import io.octolora.FormatException;
import io.octolora.checkpoint.SafetensorsFile;
import io.octolora.checkpoint.Tensor;
import io.octolora.internal.Json;
import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.Objects;
import org.jetbrains.annotations.Nullable;

/**
 * Layer inputs and outputs recorded while the real tools ran a model: {@code NAME.safetensors} with the tensors as fp32
 * copies and {@code NAME.json} beside it, which says which tensors belong to which module and how they were computed.
 * The data is readable until {@link #close()}.
 */
public final class Recording implements AutoCloseable {
  private static final String PEFT_PREFIX = "base_model.model.";

  private final Path path;
  private final SafetensorsFile file;
  private final Map<String, Layer> layers;
  private final String base;
  private final String adapter;
  private final List<Double> adapterWeights;

  /**
   * One layer of the recorded run.
   *
   * @param module the base checkpoint's name
   * @param tool what multiplied by the base weights; null for an unquantized layer
   * @param xFormat type of x and y while the tools ran
   * @param x {@code [..., k]}
   * @param y {@code [..., n]}: the output with adapters
   * @param yBase the output without adapters; the same tensor as y where no adapter was active
   * @param threshold the outlier threshold in force, NaN if the tool has none
   * @param adapters by the name in the recorded run, in the order in which they were added
   */
  public record Layer(String module, PeftReference.@Nullable BaseTool tool, FloatFormat xFormat, Tensor x, Tensor y,
      Tensor yBase, double threshold, Map<String, Adapter> adapters) {
    /** Rows of x and y: the product of the leading dimensions. */
    public int rows() {
      return (int) (x.elementCount() / x.dimension(x.dimensions() - 1));
    }
  }

  /**
   * @param factorFormat type of A and B while the tools ran
   * @param scaling the number that multiplied B(A(x)), weights included
   */
  public record Adapter(int rank, double scaling, FloatFormat factorFormat) {}

  private Recording(Path path, SafetensorsFile file, Map<?, ?> description) {
    this.path = path;
    this.file = file;
    Fields fields = new Fields("", description);
    base = fields.text("base");
    adapter = fields.text("adapter");
    adapterWeights = description.containsKey("adapter_weights")
        ? fields.list("adapter_weights").stream().map(v -> fields.number("adapter_weights", v)).toList() : List.of();
    layers = new LinkedHashMap<>();
    for (Object entry : fields.list("layers")) {
      Layer layer = layer(new Fields("layers", entry));
      if (layers.put(layer.module(), layer) != null) {
        throw new FormatException("%s: layers: module %s twice".formatted(json(), layer.module()));
      }
    }
  }

  /**
   * @param path the safetensors file
   * @throws FormatException if it or the description beside it is damaged, or the two disagree
   */
  public static Recording open(Path path) throws IOException {
    SafetensorsFile file = SafetensorsFile.open(path);
    try {
      Path json = jsonBeside(path);
      if (!Files.isRegularFile(json)) {
        throw new FormatException("%s: no %s beside it, which tells what module each tensor belongs to"
            .formatted(path, json.getFileName()));
      }
      return new Recording(path, file, Json.readObject(json));
    } catch (IOException | RuntimeException e) {
      file.close();
      throw e;
    }
  }

  public Path path() {
    return path;
  }

  /** By module, in recorded order. */
  public Map<String, Layer> layers() {
    return layers;
  }

  /** Name of the recorded base checkpoint. */
  public String base() {
    return base;
  }

  /** Name of the recorded adapter; "none" without one, joined by "+" for several. */
  public String adapter() {
    return adapter;
  }

  /** The weights given to several active adapters, in the order of their names; empty for all 1. */
  public List<Double> adapterWeights() {
    return adapterWeights;
  }

  @Override
  public void close() {
    file.close();
  }

  private Layer layer(Fields fields) {
    String module = fields.text("module");
    Fields named = new Fields(module, fields.map);
    Tensor x = tensor(named, "x");
    Tensor y = tensor(named, "y");
    Tensor yBase = named.has("y_base") ? tensor(named, "y_base") : y;
    if (x.dimensions() < 1 || y.dimensions() < 1 || x.elementCount() == 0 || y.elementCount() == 0) {
      throw new FormatException("%s: %s: empty x or y: %s, %s".formatted(json(), module, x, y));
    }
    long rows = x.elementCount() / x.dimension(x.dimensions() - 1);
    long yRows = y.elementCount() / y.dimension(y.dimensions() - 1);
    if (rows != yRows || y.elementCount() != yBase.elementCount() || rows > Integer.MAX_VALUE) {
      throw new FormatException("%s: %s: x has %d rows, y %d; y has %d elements, y_base %d".formatted(json(), module,
          rows, yRows, y.elementCount(), yBase.elementCount()));
    }
    FloatFormat xFormat = format(named, "x_dtype");
    if (named.has("y_dtype") && format(named, "y_dtype") != xFormat) {
      throw new FormatException("%s: %s: y_dtype is %s, x_dtype %s; recordings of layers that change the type are not "
          .formatted(json(), module, named.text("y_dtype"), named.text("x_dtype")) + "understood");
    }
    String baseClass = named.text("base_class");
    PeftReference.BaseTool tool = switch (baseClass.substring(baseClass.lastIndexOf('.') + 1)) {
      case "Linear8bitLt" -> PeftReference.BaseTool.BITSANDBYTES;
      case "QLinear" -> PeftReference.BaseTool.QUANTO;
      default -> null;
    };
    Map<String, Adapter> adapters = new LinkedHashMap<>();
    if (named.has("adapters")) {
      for (Map.Entry<?, ?> entry : named.object("adapters").entrySet()) {
        Fields one = new Fields(module + ": " + entry.getKey(), entry.getValue());
        adapters.put(String.valueOf(entry.getKey()),
            new Adapter((int) one.number("r"), one.number("scaling"), format(one, "A_dtype")));
      }
    }
    double threshold = named.has("bnb_threshold") ? named.number("bnb_threshold") : Double.NaN;
    String name = module.startsWith(PEFT_PREFIX) ? module.substring(PEFT_PREFIX.length()) : module;
    return new Layer(name, tool, xFormat, x, y, yBase, threshold, adapters);
  }

  private Tensor tensor(Fields fields, String field) {
    Tensor tensor = file.tensors().get(fields.text(field));
    if (tensor == null) {
      throw new FormatException("%s: %s: %s names tensor %s, which %s does not hold".formatted(json(), fields.where,
          field, fields.text(field), path.getFileName()));
    }
    return tensor;
  }

  private FloatFormat format(Fields fields, String field) {
    return switch (fields.text(field)) {
      case "torch.float32" -> FloatFormat.FLOAT32;
      case "torch.float16" -> FloatFormat.FLOAT16;
      case "torch.bfloat16" -> FloatFormat.BFLOAT16;
      default -> throw new FormatException("%s: %s: %s = %s, expected torch.float32, torch.float16 or torch.bfloat16"
          .formatted(json(), fields.where, field, fields.text(field)));
    };
  }

  private Path json() {
    return jsonBeside(path);
  }

  private static Path jsonBeside(Path path) {
    String name = path.getFileName().toString();
    return path.resolveSibling(name.replaceFirst("\\.safetensors$", "") + ".json");
  }

  /** A JSON object whose fields have the types we expect, or else an exception that says where. */
  private final class Fields {
    private final String where;
    private final Map<?, ?> map;

    Fields(String where, @Nullable Object value) {
      this.where = where;
      if (!(value instanceof Map<?, ?> object)) {
        throw new FormatException("%s: %s: expected an object, found %s".formatted(json(), where,
            Json.describe(value)));
      }
      this.map = object;
    }

    boolean has(String field) {
      return map.get(field) != null;
    }

    String text(String field) {
      return expect(field, String.class);
    }

    List<?> list(String field) {
      return expect(field, List.class);
    }

    Map<?, ?> object(String field) {
      return expect(field, Map.class);
    }

    double number(String field) {
      return number(field, Objects.requireNonNullElse(map.get(field), "nothing"));
    }

    double number(String field, Object value) {
      if (!(value instanceof Number number) || !Double.isFinite(number.doubleValue())) {
        throw new FormatException("%s: %s: %s = %s, expected a number".formatted(json(), where, field,
            Json.describe(value)));
      }
      return number.doubleValue();
    }

    private <T> T expect(String field, Class<T> type) {
      Object value = map.get(field);
      if (!type.isInstance(value)) {
        throw new FormatException("%s: %s: %s = %s, expected a %s".formatted(json(), where, field, Json.describe(value),
            type == Map.class ? "JSON object" : type == List.class ? "JSON array" : "string"));
      }
      return type.cast(value);
    }
  }
}
