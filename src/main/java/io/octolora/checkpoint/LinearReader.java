// SPDX-License-Identifier: Apache-2.0
package io.octolora.checkpoint;

import io.octolora.FormatException;
import io.octolora.Status;
import io.octolora.internal.Names;
import java.nio.ByteBuffer;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.EnumMap;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.Set;
import java.util.TreeMap;
import java.util.stream.Collectors;
import org.jetbrains.annotations.Nullable;

/** Finds the linear layers among the tensors. */
final class LinearReader {
  private static final String WEIGHT = ".weight";
  private static final String QUANTO_DATA = ".weight._data";
  private static final String QUANTO_SCALE = ".weight._scale";
  private static final String SCALE = ".weight_scale";
  private static final String PACKED = ".weight_packed";

  /** A tensor whose name ends so speaks for a format, in this order. */
  private static final List<Mark> MARKS = List.of(
      new Mark(".SCB", WeightFormat.BITSANDBYTES_INT8),
      new Mark(".weight_format", WeightFormat.BITSANDBYTES_INT8),
      new Mark(QUANTO_DATA, WeightFormat.QUANTO_QINT8),
      new Mark(QUANTO_SCALE, WeightFormat.QUANTO_QINT8),
      new Mark("._weight_qdata", WeightFormat.TORCHAO_INT8),
      new Mark(".weight:qdata", WeightFormat.TORCHAO_INT8),
      new Mark(ComfyLayers.END, WeightFormat.COMFYUI_INT8),
      new Mark(SCALE, WeightFormat.COMPRESSED_TENSORS_INT8), // ComfyUI's where a layer is marked as its own
      new Mark(PACKED, WeightFormat.COMPRESSED_TENSORS_INT8));

  private record Mark(String end, WeightFormat format) {}

  /** A tensor whose name ends so belongs to a format that is not read here. */
  private static final Map<String, String> FOREIGN_ENDS = new LinkedHashMap<>();

  static {
    FOREIGN_ENDS.put(".weight:_data", "torchao before Int8Tensor");
    FOREIGN_ENDS.put(".weight_g_idx", "compressed-tensors with reordered groups");
    FOREIGN_ENDS.put(".qweight", "GPTQ or AWQ");
    FOREIGN_ENDS.put(".qzeros", "GPTQ or AWQ");
    FOREIGN_ENDS.put(".weight.absmax", "bitsandbytes 4-bit");
    FOREIGN_ENDS.put(".weight.quant_map", "bitsandbytes 4-bit");
    FOREIGN_ENDS.put(".weight._zeropoint", "Quanto with fewer than 8 bits");
    FOREIGN_ENDS.put(".weight._shift", "Quanto with fewer than 8 bits");
    FOREIGN_ENDS.put(".weight._data._data", "Quanto with fewer than 8 bits");
  }

  private final Path path;
  private final Map<String, Tensor> tensors;
  private final QuantizationConfig config;
  private final ComfyLayers comfy;
  private final TorchaoLayers torchao;
  private final List<String> notes;
  private final Map<String, BaseLinear> linears = new TreeMap<>(Names.NATURAL);
  /** By module, the formats that its tensors speak for and the first tensor that does. */
  private final Map<String, Map<WeightFormat, Tensor>> marked = new LinkedHashMap<>();

  LinearReader(Path path, WeightFiles weights, QuantizationConfig config, List<String> notes) {
    this.path = path;
    this.tensors = weights.tensors();
    this.config = config;
    this.comfy = ComfyLayers.read(weights);
    this.torchao = TorchaoLayers.read(path, weights);
    this.notes = notes;
  }

  Map<String, BaseLinear> read() {
    tensors.values().forEach(this::refuseForeign);
    tensors.values().forEach(this::mark);
    refuseMixed();
    marked.forEach((module, formats) -> read(module, formats.keySet().iterator().next()));
    for (Tensor tensor : tensors.values()) {
      if (tensor.name().endsWith(WEIGHT) && !linears.containsKey(strip(tensor.name(), WEIGHT))) {
        readFloat(strip(tensor.name(), WEIGHT), tensor);
      }
    }
    compareWithConfig();
    return new LinkedHashMap<>(linears);
  }

  /** What was seen and what that makes it, after {@link #read}. */
  String recognition() {
    if (marked.isEmpty()) {
      return "not quantized: no tensor is named as a part of an int8 layer";
    }
    Map.Entry<String, Map<WeightFormat, Tensor>> first = marked.entrySet().iterator().next();
    Map.Entry<WeightFormat, Tensor> evidence = first.getValue().entrySet().iterator().next();
    String method = config.method();
    return "%s: %d layers have tensors named like %s %s; %s".formatted(evidence.getKey().label(), marked.size(),
        evidence.getValue().name(), evidence.getValue().type(),
        method.isEmpty() ? "no configuration names a method" : "the configuration names " + method);
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
        "%s: this checkpoint is quantized by %s, expected int8 of bitsandbytes, Quanto, torchao, compressed-tensors "
            .formatted(tensor, format) + "or ComfyUI");
  }

  private void mark(Tensor tensor) {
    for (Mark mark : MARKS) {
      if (tensor.name().endsWith(mark.end)) {
        String module = strip(tensor.name(), mark.end);
        WeightFormat format = mark.end.equals(SCALE) && comfy.has(module) ? WeightFormat.COMFYUI_INT8 : mark.format;
        marked.computeIfAbsent(module, name -> new EnumMap<>(WeightFormat.class)).putIfAbsent(format, tensor);
        return;
      }
    }
  }

  private void refuseMixed() {
    Tensor first = null;
    WeightFormat format = null;
    for (Map<WeightFormat, Tensor> formats : marked.values()) {
      for (Map.Entry<WeightFormat, Tensor> entry : formats.entrySet()) {
        if (first != null && entry.getKey() != format) {
          throw new FormatException("%s: read as %s by %s, as %s by %s; expected one int8 format".formatted(path,
              format.label(), first, entry.getKey().label(), entry.getValue()));
        }
        first = entry.getValue();
        format = entry.getKey();
      }
    }
  }

  private void read(String module, WeightFormat format) {
    switch (format) {
      case BITSANDBYTES_INT8 -> readBitsandbytes(module);
      case QUANTO_QINT8 -> readQuanto(module);
      case TORCHAO_INT8 -> readTorchao(module);
      case COMPRESSED_TENSORS_INT8 -> readCompressedTensors(module);
      case COMFYUI_INT8 -> readComfy(module);
      case GGUF_Q8_0, FLOAT -> throw new IllegalStateException(module);
    }
  }

  private void readBitsandbytes(String module) {
    Tensor weight = codes(module, WEIGHT, ".SCB", ".weight_format");
    int[] size = size(weight);
    Tensor scb = tensors.get(module + ".SCB");
    if (scb == null) {
      throw unscaled(module, weight);
    }
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

  private void readQuanto(String module) {
    Tensor data = tensors.get(module + QUANTO_DATA);
    if (data == null) {
      throw new FormatException("%s has no int8 weight beside it".formatted(tensors.get(module + QUANTO_SCALE)));
    }
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
    float value = positive(tensor);
    return value == 1 ? null : value;
  }

  private static float positive(Tensor tensor) {
    if (!tensor.type().isFloat() || tensor.elementCount() != 1) {
      throw new FormatException("%s: expected one F32, F16 or BF16 number".formatted(tensor));
    }
    float value = (float) tensor.scalar();
    if (!(value > 0) || Float.isInfinite(value)) {
      throw new FormatException("%s: %s, expected a finite number above 0".formatted(tensor, value));
    }
    return value;
  }

  private void readTorchao(String module) {
    TorchaoLayers.Layer layer = torchao.layer(module, marked.get(module).values().iterator().next());
    Tensor codes = codes(module, layer.key("qdata"));
    int[] size = size(codes);
    for (String part : List.of("act_pre_scale", "act_quant_scale", "act_quant_zero_point")) {
      if (tensors.containsKey(module + layer.key(part))) {
        throw new FormatException(Status.UNSUPPORTED,
            "%s: torchao's %s is not supported, expected weight-only or dynamic per-row activations".formatted(
                tensors.get(module + layer.key(part)), part));
      }
    }
    Tensor scale = scale(module, layer.key("scale"), size);
    requireZeros(tensors.get(module + layer.key("zero_point")));
    layer.requireBlocks(size, scale);
    add(module, WeightFormat.TORCHAO_INT8, size, layer.quantization(), codes, scale);
  }

  private void readCompressedTensors(String module) {
    CompressedTensorsConfig scheme = config.compressedTensors();
    Tensor packed = tensors.get(module + PACKED);
    if (packed == null && tensors.containsKey(module + WEIGHT)
        && tensors.get(module + WEIGHT).type().name().startsWith("F8")) {
      throw unsupported(tensors.get(module + WEIGHT), "an 8-bit float format");
    }
    if (scheme == null) {
      Tensor evidence = marked.get(module).values().iterator().next();
      throw new FormatException(Status.UNSUPPORTED, packed != null
          ? ("%s: compressed-tensors pack-quantized, but no config.json with quant_method compressed-tensors beside "
              + "it: how activations are treated is unknown").formatted(evidence)
          : ("%s: read as compressed-tensors int-quantized it needs a config.json with quant_method "
              + "compressed-tensors, as ComfyUI int8 a tensor %s%s or _quantization_metadata in the header; there is "
              + "neither, and how activations are treated is unknown").formatted(evidence, module, ComfyLayers.END));
    }
    CompressedTensorsConfig.Group group = scheme.group(module);
    Tensor codes = packed == null ? codes(module, WEIGHT, SCALE) : unpacked(module, packed);
    int[] size = size(codes);
    Tensor scale = scale(module, SCALE, size);
    requireZeros(tensors.get(module + ".weight_zero_point"));
    requireZeros(tensors.get(module + ".input_zero_point"));
    Tensor input = tensors.get(module + ".input_scale");
    if (group.fixedActivations() && input == null) {
      throw new FormatException("%s: static activations by %s, but no %s.input_scale".formatted(codes, group, module));
    }
    if (!group.fixedActivations() && input != null) {
      throw new FormatException("%s: activations are not static by %s".formatted(input, group));
    }
    add(module, WeightFormat.COMPRESSED_TENSORS_INT8, size,
        group.quantization(input == null ? 0 : positive(input)), codes, scale);
  }

  /**
   * 8-bit pack-quantized: I32 [n, ceil(k / 4)], code + 128 in each byte from the low end, so that the bytes stand in
   * order and differ from int8 codes in the top bit; the last word of a row is padded.
   */
  private Tensor unpacked(String module, Tensor packed) {
    Tensor shape = tensors.get(module + ".weight_shape");
    if (shape == null || shape.type() != ElementType.I64 || shape.elementCount() != 2) {
      throw new FormatException("%s: expected I64 [2] in %s.weight_shape, found %s".formatted(packed, module, shape));
    }
    ByteBuffer sides = shape.bytes();
    long n = sides.getLong(0);
    long k = sides.getLong(8);
    if (packed.type() != ElementType.I32 || packed.dimensions() != 2 || n < 1 || k < 1 || packed.dimension(0) != n
        || packed.dimension(1) != (k + 3) / 4) {
      throw new FormatException("%s: expected I32 [%d, %d] for %d x %d codes of 8 bits".formatted(packed, n,
          (k + 3) / 4, n, k));
    }
    long stride = packed.dimension(1) * 4;
    return Tensor.derived(packed, packed.name() + " unpacked", ElementType.I8, new long[] {n, k}, (offset, length) -> {
      ByteBuffer codes = ByteBuffer.allocateDirect(length);
      while (codes.hasRemaining()) {
        long at = offset + codes.position();
        int count = (int) Math.min(codes.remaining(), k - at % k);
        ByteBuffer row = packed.bytes(at / k * stride + at % k, count);
        for (int i = 0; i < count; i++) {
          codes.put((byte) (row.get(i) ^ 0x80));
        }
      }
      return codes.flip();
    });
  }

  private void readComfy(String module) {
    comfy.requireInt8(module);
    Tensor codes = codes(module, WEIGHT, SCALE, ComfyLayers.END);
    int[] size = size(codes);
    add(module, WeightFormat.COMFYUI_INT8, size, Quantization.dynamic(127), codes, scale(module, SCALE, size));
  }

  private Tensor codes(String module, String end, String... marks) {
    Tensor codes = tensors.get(module + end);
    if (codes == null || codes.type() != ElementType.I8) {
      for (String mark : marks) {
        if (tensors.containsKey(module + mark)) {
          throw new FormatException("%s has no int8 weight beside it%s".formatted(tensors.get(module + mark),
              codes == null ? "" : ", but " + codes));
        }
      }
      throw new FormatException("%s: expected I8".formatted(codes == null ? path + ": " + module + end : codes));
    }
    return codes;
  }

  /** One number, or one for each row. */
  private Tensor scale(String module, String end, int[] size) {
    Tensor scale = tensors.get(module + end);
    if (scale == null) {
      throw new FormatException("%s: int8 codes of %s without a scale: no %s%s".formatted(path, module, module, end));
    }
    boolean one = scale.elementCount() == 1 && scale.dimensions() <= 2;
    boolean column = scale.dimensions() == 1 || scale.dimensions() == 2 && scale.dimension(1) == 1;
    if (scale.type().isFloat() && (one || column && scale.dimension(0) == size[0])) {
      return scale;
    }
    boolean groups = scale.dimensions() == 2 && scale.dimension(0) == size[0] && scale.dimension(1) > 0;
    if (scale.type().isFloat() && groups) {
      throw new FormatException(Status.UNSUPPORTED,
          "%s: %d scales a row, one for each group of inputs; expected one a row or one for all".formatted(scale,
              scale.dimension(1)));
    }
    throw new FormatException("%s: expected F32, F16 or BF16, one or [%d, 1] for %d x %d codes".formatted(scale,
        size[0], size[0], size[1]));
  }

  /** Zero points of symmetric quantization may be stored, all 0; others are refused. */
  private static void requireZeros(@Nullable Tensor points) {
    if (points == null) {
      return;
    }
    ByteBuffer bytes = points.bytes();
    for (int i = 0; i < bytes.limit(); i++) {
      if (bytes.get(i) != 0) {
        throw new FormatException(Status.UNSUPPORTED,
            "%s: a zero point is not 0; asymmetric quantization is not supported, expected symmetric".formatted(
                points));
      }
    }
  }

  private void readFloat(String module, Tensor weight) {
    if (weight.type() == ElementType.I8) {
      throw unscaled(module, weight);
    }
    if (weight.dimensions() != 2) {
      return;
    }
    if (!weight.type().isFloat()) {
      if (weight.type().name().startsWith("F8")) {
        throw unsupported(weight, "an 8-bit float format");
      }
      throw new FormatException(Status.UNSUPPORTED, "%s: expected an I8, F32, F16 or BF16 weight".formatted(weight));
    }
    if (weight.elementCount() > 0) {
      add(module, WeightFormat.FLOAT, size(weight), null, weight, null);
    }
  }

  private static FormatException unscaled(String module, Tensor weight) {
    return new FormatException(("%s: an int8 weight without a scale: no %s.SCB, which bitsandbytes writes, and no "
        + "%s.weight_scale of compressed-tensors or ComfyUI").formatted(weight, module, module));
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
    for (BaseLinear linear : linears.values()) {
      Boolean skipped = config.skips(linear.name());
      boolean embedding = !linear.quantized() && Names.isEmbedding(linear.name());
      if (skipped != null && skipped == linear.quantized() && !embedding) {
        (skipped ? shouldBeFloat : shouldBeInt8).add(linear.name());
      }
    }
    note(shouldBeFloat, "int8 by their tensors, though the configuration leaves them unquantized");
    note(shouldBeInt8, "not quantized by their tensors, though the configuration does not leave them out");
    Set<WeightFormat> formats = linears.values().stream().filter(BaseLinear::quantized).map(BaseLinear::format)
        .collect(Collectors.toSet());
    if (config.promisesInt8() && formats.isEmpty()) {
      notes.add("%s: the configuration says int8 (%s), but no linear layer is".formatted(path,
          config.method().isEmpty() ? "quanto_qmap.json" : config.method()));
    }
    if (!config.method().equals("bitsandbytes") && formats.contains(WeightFormat.BITSANDBYTES_INT8)) {
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
