// SPDX-License-Identifier: Apache-2.0
package io.octolora.checkpoint;

import io.octolora.FormatException;
import io.octolora.OctoloraException;
import io.octolora.Status;
import io.octolora.internal.Names;
import java.io.IOException;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.Collections;
import java.util.EnumMap;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.TreeMap;
import java.util.regex.Pattern;
import java.util.stream.Collectors;
import org.jetbrains.annotations.Nullable;

/**
 * The files of a base model: one safetensors file, an index with its shards, or a folder of transformers, diffusers or
 * optimum-quanto with its {@code config.json}. Each module's format is read from its tensors: bitsandbytes LLM.int8(),
 * Quanto qint8, or not quantized. Nothing is copied or converted. Safe for use by several threads.
 */
public final class Checkpoint implements AutoCloseable {
  private final Path path;
  private final WeightFiles weights;
  private final Map<String, Tensor> tensors;
  private final Map<String, BaseLinear> linears;
  private final List<String> notes;

  private Checkpoint(Path path, WeightFiles weights, Map<String, BaseLinear> linears, List<String> notes) {
    this.path = path;
    this.weights = weights;
    this.tensors = Collections.unmodifiableMap(weights.tensors());
    this.linears = Collections.unmodifiableMap(linears);
    this.notes = List.copyOf(notes);
  }

  /**
   * @param path a folder, a {@code .safetensors} file or a {@code .safetensors.index.json} file
   * @throws IOException if a file cannot be read or mapped
   * @throws FormatException if a file is damaged, or of a format that is not read here; the message says which
   */
  public static Checkpoint open(Path path) throws IOException {
    List<String> notes = new ArrayList<>();
    WeightFiles weights = WeightFiles.open(path, notes);
    try {
      QuantizationConfig config = QuantizationConfig.read(weights);
      Map<String, BaseLinear> linears = new LinearReader(path, weights, config, notes).read();
      return new Checkpoint(path, weights, linears, notes);
    } catch (Throwable e) {
      weights.close();
      throw e;
    }
  }

  /** As given to {@link #open}. */
  public Path path() {
    return path;
  }

  /** The formats of the linear layers with their counts, for people: "bitsandbytes int8 (34), BF16 (2)". */
  public String format() {
    Map<WeightFormat, Integer> counts = new EnumMap<>(WeightFormat.class);
    Map<String, Integer> floats = new TreeMap<>();
    for (BaseLinear linear : linears.values()) {
      if (linear.format() == WeightFormat.FLOAT) {
        floats.merge(linear.weight().type().name(), 1, Integer::sum);
      } else {
        counts.merge(linear.format(), 1, Integer::sum);
      }
    }
    List<String> parts = new ArrayList<>();
    counts.forEach((format, count) -> parts.add("%s (%d)".formatted(
        format == WeightFormat.BITSANDBYTES_INT8 ? "bitsandbytes int8" : "Quanto qint8", count)));
    floats.forEach((type, count) -> parts.add("%s (%d)".formatted(type, count)));
    return parts.isEmpty() ? "no linear layers" : String.join(", ", parts);
  }

  /** By module path, blocks in numeric order; unmodifiable. See {@link BaseLinear} for what counts as linear. */
  public Map<String, BaseLinear> linears() {
    return linears;
  }

  /**
   * @param name the module's full path
   * @throws OctoloraException for a name that is not in {@link #linears()}; the message has the nearest ones
   */
  public BaseLinear linear(String name) {
    BaseLinear linear = linears.get(name);
    if (linear == null) {
      throw new OctoloraException(Status.INVALID_ARGUMENT, "%s has no linear layer %s; nearest: %s".formatted(path,
          name, String.join(", ", Names.nearest(name, linears.keySet(), 3))));
    }
    return linear;
  }

  /** Every tensor of every file, by name; unmodifiable. */
  public Map<String, Tensor> tensors() {
    return tensors;
  }

  /** What a person should know though no rule forbids it, for example where configuration and tensors disagree. */
  public List<String> notes() {
    return notes;
  }

  /** Closes the files: see {@link SafetensorsFile#close()}. Idempotent. */
  @Override
  public void close() {
    weights.close();
  }

  @Override
  public String toString() {
    return "%s: %s".formatted(path, format());
  }

  /** Finds the linear layers among the tensors. */
  private static final class LinearReader {
    private static final String WEIGHT = ".weight";
    private static final String QUANTO_DATA = ".weight._data";
    private static final String QUANTO_SCALE = ".weight._scale";
    /** A tensor whose name ends so belongs to a format that is not read here. */
    private static final Map<String, String> FOREIGN_ENDS = new LinkedHashMap<>();

    static {
      FOREIGN_ENDS.put("._weight_qdata", "torchao");
      FOREIGN_ENDS.put(".weight:qdata", "torchao");
      FOREIGN_ENDS.put(".weight:_data", "torchao");
      FOREIGN_ENDS.put(".weight_packed", "compressed-tensors pack-quantized");
      FOREIGN_ENDS.put(".comfy_quant", "ComfyUI");
      FOREIGN_ENDS.put(".qweight", "GPTQ or AWQ");
      FOREIGN_ENDS.put(".qzeros", "GPTQ or AWQ");
      FOREIGN_ENDS.put(".weight.absmax", "bitsandbytes 4-bit");
      FOREIGN_ENDS.put(".weight.quant_map", "bitsandbytes 4-bit");
      FOREIGN_ENDS.put(".weight._zeropoint", "Quanto with fewer than 8 bits");
      FOREIGN_ENDS.put(".weight._shift", "Quanto with fewer than 8 bits");
      FOREIGN_ENDS.put(".weight._data._data", "Quanto with fewer than 8 bits");
    }

    /** Usual names of embedding tables, which quantizers leave alone without being told. */
    private static final Pattern EMBEDDING =
        Pattern.compile("(.*\\.)?(embed[^.]*|[^.]*embeddings?|wte|wpe|emb|shared|relative_attention_bias)");

    private final Path path;
    private final WeightFiles weights;
    private final Map<String, Tensor> tensors;
    private final QuantizationConfig config;
    private final List<String> notes;
    private final Map<String, BaseLinear> linears = new TreeMap<>(Names.NATURAL);

    LinearReader(Path path, WeightFiles weights, QuantizationConfig config, List<String> notes) {
      this.path = path;
      this.weights = weights;
      this.tensors = weights.tensors();
      this.config = config;
      this.notes = notes;
    }

    Map<String, BaseLinear> read() {
      tensors.values().forEach(this::refuseForeign);
      for (Tensor tensor : tensors.values()) {
        String name = tensor.name();
        if (name.endsWith(QUANTO_DATA)) {
          readQuanto(strip(name, QUANTO_DATA), tensor);
        } else if (name.endsWith(WEIGHT)) {
          readPlain(strip(name, WEIGHT), tensor);
        }
      }
      tensors.values().forEach(this::refuseOrphan);
      compareWithConfig();
      return new LinkedHashMap<>(linears);
    }

    private void refuseForeign(Tensor tensor) {
      FOREIGN_ENDS.forEach((end, format) -> {
        if (tensor.name().endsWith(end)) {
          throw unsupported(tensor, format);
        }
      });
      if (tensor.name().contains(".weight.quant_state.bitsandbytes__")) {
        throw unsupported(tensor, "bitsandbytes 4-bit");
      }
    }

    private static FormatException unsupported(Tensor tensor, String format) {
      return new FormatException(Status.UNSUPPORTED,
          "%s: this checkpoint is quantized by %s, expected bitsandbytes int8 or Quanto qint8".formatted(tensor,
              format));
    }

    private void refuseOrphan(Tensor tensor) {
      for (String end : List.of(".SCB", ".weight_format", QUANTO_SCALE)) {
        if (tensor.name().endsWith(end)) {
          BaseLinear linear = linears.get(strip(tensor.name(), end));
          if (linear == null || !linear.quantized()) {
            throw new FormatException("%s has no int8 weight beside it".formatted(tensor));
          }
        }
      }
    }

    private void readQuanto(String module, Tensor data) {
      if (data.type() != ElementType.I8) {
        throw unsupported(data, "Quanto with " + data.type() + " codes");
      }
      int[] size = size(data);
      if (tensors.containsKey(module + WEIGHT)) {
        throw new FormatException("%s: there is also %s".formatted(data, tensors.get(module + WEIGHT)));
      }
      Tensor scale = tensors.get(module + QUANTO_SCALE);
      if (scale == null) {
        throw new FormatException("%s: no %s%s".formatted(data, module, QUANTO_SCALE));
      }
      boolean scalar = scale.dimensions() == 0 && size[0] == 1; // what Quanto writes for a single row
      boolean column = scale.dimensions() == 2 && scale.dimension(0) == size[0] && scale.dimension(1) == 1;
      if (!scale.type().isFloat() || !scalar && !column) {
        throw new FormatException("%s: expected F32, F16 or BF16 [%d, 1] for %d x %d codes".formatted(scale, size[0],
            size[0], size[1]));
      }
      add(module, WeightFormat.QUANTO_QINT8, size, quantoActivations(module), data, scale);
    }

    /** Static activation scales count only where a file says that activations are quantized. */
    private Quantization quantoActivations(String module) {
      boolean quantized = config.quantizesActivations(module);
      Float input = calibrated(module + ".input_scale");
      Float output = calibrated(module + ".output_scale");
      if (output != null) {
        notes.add("%s.output_scale is %s: whether outputs are quantized is not recorded; they are left as they are"
            .formatted(module, output));
      }
      if (quantized && input != null) {
        return Quantization.fixed(input);
      }
      if (quantized) {
        notes.add("%s: activations are marked qint8 but input_scale is not calibrated; they are left as they are"
            .formatted(module));
      } else if (input != null) {
        notes.add("%s.input_scale is %s but no file marks activations as qint8; they are left as they are".formatted(
            module, input));
      }
      return Quantization.weightOnly();
    }

    /** null if absent or 1, which stands for not calibrated. */
    private @Nullable Float calibrated(String name) {
      Tensor tensor = tensors.get(name);
      if (tensor == null) {
        return null;
      }
      if (!tensor.type().isFloat() || tensor.elementCount() != 1) {
        throw new FormatException("%s: expected one F32, F16 or BF16 number".formatted(tensor));
      }
      float value = (float) tensor.scalar();
      if (!(value > 0) || Float.isInfinite(value)) {
        throw new FormatException("%s: %s, expected a finite number above 0".formatted(tensor, value));
      }
      return value == 1 ? null : value;
    }

    private void readPlain(String module, Tensor weight) {
      Tensor scb = tensors.get(module + ".SCB");
      if (weight.type() == ElementType.I8) {
        if (scb == null) {
          throw unscaled(module, weight);
        }
        readBitsandbytes(module, weight, scb);
        return;
      }
      if (weight.dimensions() != 2) {
        return;
      }
      if (!weight.type().isFloat()) {
        if (weight.type().name().startsWith("F8")) {
          throw unsupported(weight, "an 8-bit float format");
        }
        throw new FormatException(Status.UNSUPPORTED,
            "%s: expected an I8, F32, F16 or BF16 weight".formatted(weight));
      }
      if (weight.elementCount() > 0) {
        add(module, WeightFormat.FLOAT, size(weight), null, weight, null);
      }
    }

    private FormatException unscaled(String module, Tensor weight) {
      boolean comfy = weights.files().stream().anyMatch(file -> file.metadata().containsKey("_quantization_metadata"));
      if (comfy) {
        return unsupported(weight, "ComfyUI");
      }
      return tensors.containsKey(module + ".weight_scale")
          ? unsupported(tensors.get(module + ".weight_scale"), "compressed-tensors int-quantized")
          : new FormatException("%s: an int8 weight without a scale: no %s.SCB, which bitsandbytes writes".formatted(
              weight, module));
    }

    private void readBitsandbytes(String module, Tensor weight, Tensor scb) {
      int[] size = size(weight);
      if (scb.type() != ElementType.F32 || scb.dimensions() != 1 || scb.dimension(0) != size[0]) {
        throw new FormatException("%s: expected F32 [%d] for %d x %d codes".formatted(scb, size[0], size[0], size[1]));
      }
      Tensor layout = tensors.get(module + ".weight_format");
      if (layout != null) {
        if (layout.type() != ElementType.U8 || layout.elementCount() != 1) {
          throw new FormatException("%s: expected one U8".formatted(layout));
        }
        int format = (int) layout.scalar();
        if (format != 0) {
          throw new FormatException(Status.UNSUPPORTED,
              "%s: %d, a tiled layout (1 col32, 2 col_turing, 3 col_ampere) that bitsandbytes before 0.45 wrote; "
                  .formatted(layout, format) + "expected 0, rows: save the model again with a newer version");
        }
      }
      add(module, WeightFormat.BITSANDBYTES_INT8, size, Quantization.bitsandbytes(config.outlierThreshold()), weight,
          scb);
    }

    private void add(String module, WeightFormat format, int[] size, @Nullable Quantization quantization,
        Tensor weight, @Nullable Tensor scale) {
      Tensor bias = tensors.get(module + ".bias");
      if (bias != null && (!bias.type().isFloat() || bias.dimensions() != 1 || bias.dimension(0) != size[0])) {
        throw new FormatException("%s: expected F32, F16 or BF16 [%d] beside %s".formatted(bias, size[0], weight));
      }
      linears.put(module, new BaseLinear(module, size[0], size[1], format, quantization, weight, scale, bias));
    }

    private static int[] size(Tensor weight) {
      if (weight.dimensions() != 2 || weight.elementCount() == 0 || weight.dimension(0) > Integer.MAX_VALUE
          || weight.dimension(1) > Integer.MAX_VALUE) {
        throw new FormatException("%s: expected two dimensions from 1 to %d".formatted(weight, Integer.MAX_VALUE));
      }
      return new int[] {(int) weight.dimension(0), (int) weight.dimension(1)};
    }

    private void compareWithConfig() {
      List<String> shouldBeFloat = new ArrayList<>();
      List<String> shouldBeInt8 = new ArrayList<>();
      boolean quantized = false;
      for (BaseLinear linear : linears.values()) {
        quantized |= linear.quantized();
        Boolean skipped = config.skips(linear.name());
        boolean embedding = !linear.quantized() && EMBEDDING.matcher(linear.name()).matches();
        if (skipped != null && skipped == linear.quantized() && !embedding) {
          (skipped ? shouldBeFloat : shouldBeInt8).add(linear.name());
        }
      }
      note(shouldBeFloat, "int8 by their tensors, though the configuration leaves them unquantized");
      note(shouldBeInt8, "not quantized by their tensors, though the configuration does not leave them out");
      if (config.promisesInt8() && !quantized) {
        notes.add("%s: the configuration says int8 (%s), but no linear layer is".formatted(path,
            config.method().isEmpty() ? "quanto_qmap.json" : config.method()));
      }
      if (!config.method().equals("bitsandbytes")
          && linears.values().stream().anyMatch(linear -> linear.format() == WeightFormat.BITSANDBYTES_INT8)) {
        notes.add("%s: no config.json of bitsandbytes; the outlier threshold is taken as bitsandbytes' default, %s"
            .formatted(path, QuantizationConfig.DEFAULT_THRESHOLD));
      }
    }

    private void note(List<String> modules, String what) {
      if (!modules.isEmpty()) {
        notes.add("%d linear layers are %s: %s%s".formatted(modules.size(), what,
            modules.stream().limit(5).collect(Collectors.joining(", ")), modules.size() > 5 ? ", ..." : ""));
      }
    }

    private static String strip(String name, String end) {
      return name.substring(0, name.length() - end.length());
    }
  }
}
