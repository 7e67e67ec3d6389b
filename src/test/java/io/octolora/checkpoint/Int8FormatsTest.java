// SPDX-License-Identifier: Apache-2.0
package io.octolora.checkpoint;

import static org.junit.jupiter.api.Assertions.assertArrayEquals;
import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertNull;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import io.octolora.FormatException;
import io.octolora.SafetensorsWriter;
import io.octolora.Status;
import io.octolora.checkpoint.Quantization.Mode;
import io.octolora.runtime.Device;
import io.octolora.runtime.Int8Linear;
import java.io.IOException;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.List;
import java.util.stream.Stream;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.io.TempDir;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.Arguments;
import org.junit.jupiter.params.provider.CsvSource;
import org.junit.jupiter.params.provider.MethodSource;
import org.junit.jupiter.params.provider.ValueSource;

/**
 * torchao, compressed-tensors and ComfyUI. No file of the tools themselves is among the fixtures: these are
 * written here in the layouts that the tools' sources write, with codes and steps worked out from their formulas.
 */
class Int8FormatsTest {
  private static final float[] ROW_A = {127, 0.5f, 1.5f, 2.5f, -2.5f, -126.5f, -127, 64};
  private static final float[] ROW_B = {1, -0.5f, 0.25f, -0.75f, 0.126953125f, -1, 0, 0.3330078125f};
  /** step = max|w| / 127.5, code = rne(w / step): torchao and compressed-tensors. */
  private static final byte[] CODES_127_5 = {127, 1, 2, 3, -3, -127, -128, 64, 127, -64, 32, -96, 16, -127, 0, 42};
  private static final float[] STEPS_127_5 = {127 / 127.5f, 1 / 127.5f};
  /** step = max|w| / 127: ComfyUI. */
  private static final byte[] CODES_127 = {127, 0, 2, 2, -2, -126, -127, 64, 127, -64, 32, -95, 16, -127, 0, 42};
  private static final float[] STEPS_127 = {1, 1 / 127f};

  private static final String INT8_TENSOR = "{\"_type\":\"Int8Tensor\",\"_data\":{\"block_size\":%s,"
      + "\"dtype\":{\"_type\":\"torch.dtype\",\"_data\":\"bfloat16\"},\"act_quant_kwargs\":%s},"
      + "\"_tensor_data_names\":[\"zero_point\",\"qdata\",\"scale\"]}";
  private static final String PER_ROW = "{\"_type\":\"QuantizeTensorToInt8Kwargs\",\"_data\":{\"granularity\":"
      + "{\"_type\":\"PerRow\",\"_data\":{\"dim\":-1}},\"mapping_type\":{\"_type\":\"MappingType\",\"_data\":"
      + "\"SYMMETRIC\"}}}";

  private static final String WEIGHTS = "{\"num_bits\":8,\"type\":\"int\",\"strategy\":\"channel\",\"symmetric\":true,"
      + "\"dynamic\":false}";
  private static final String TOKENS = "{\"num_bits\":8,\"type\":\"int\",\"strategy\":\"token\",\"dynamic\":true,"
      + "\"symmetric\":true}";
  private static final String STATIC = "{\"num_bits\":8,\"type\":\"int\",\"strategy\":\"tensor\",\"dynamic\":false,"
      + "\"symmetric\":true}";

  @TempDir Path folder;

  // ---- torchao ------------------------------------------------------------------------------------------------------

  @ParameterizedTest
  @CsvSource({"._weight_", ".weight:"})
  void torchaoWeightOnly(String infix) throws IOException {
    model(torchao(infix, "[1, 8]", "null"), null);
    try (Checkpoint base = Checkpoint.open(folder)) {
      BaseLinear linear = base.linear("m");
      assertEquals("torchao int8 (1)", base.format());
      assertTrue(base.recognition().startsWith("torchao int8: 1 layers have tensors named like m" + infix + "qdata I8"),
          base.recognition());
      assertEquals(WeightFormat.TORCHAO_INT8, linear.format());
      assertEquals(Quantization.weightOnly(), linear.quantization());
      assertNull(linear.bias());
      assertRepresents(linear, 0.51);
    }
  }

  @Test
  void torchaoDynamicActivationsAreMeasuredBy127AndAHalf() throws IOException {
    model(torchao("._weight_", "[1, 8]", PER_ROW).ramp("m.bias", 1, 2), null);
    try (Checkpoint base = Checkpoint.open(folder)) {
      assertEquals(new Quantization(Mode.W8A8_DYNAMIC, false, 0, 127.5f, 0), base.linear("m").quantization());
      assertArrayEquals(new float[] {0, 1}, base.linear("m").bias());
    }
  }

  @Test
  void torchaoPerTensorHasOneScale() throws IOException {
    SafetensorsWriter writer = new SafetensorsWriter()
        .bytes("m._weight_qdata", "I8", new long[] {2, 8}, CODES_127_5)
        .floats("m._weight_scale", new long[] {1, 1}, 0.5f)
        .bytes("m._weight_zero_point", "I8", new long[] {1, 1}, new byte[1])
        .metadata("tensor_names", "[\"m.weight\"]").metadata("m.weight", INT8_TENSOR.formatted("[2, 8]", "null"));
    model(writer, null);
    try (Checkpoint base = Checkpoint.open(folder); Device cpu = Device.cpu()) {
      assertArrayEquals(new float[] {0.5f}, base.linear("m").scale());
      // integers and halves below 2^11: exact in every float type on the way
      assertRuns(cpu, base.linear("m"), CODES_127_5, 8, 0.5);
    }
  }

  @Test
  void torchaoMetadataMayStandInTheIndex() throws IOException {
    new SafetensorsWriter().bytes("m._weight_qdata", "I8", new long[] {2, 8}, CODES_127_5)
        .floats("m._weight_scale", new long[] {2, 1}, STEPS_127_5).write(folder.resolve("s.safetensors"));
    Files.writeString(folder.resolve("model.safetensors.index.json"), ("{\"metadata\":{\"total_size\":1,"
        + "\"tensor_names\":\"[\\\"m.weight\\\"]\",\"m.weight\":%s},\"weight_map\":{\"m._weight_qdata\":"
        + "\"s.safetensors\",\"m._weight_scale\":\"s.safetensors\"}}").formatted(
            SafetensorsWriter.quote(INT8_TENSOR.formatted("[1, 8]", "null"))));
    try (Checkpoint base = Checkpoint.open(folder)) {
      assertArrayEquals(STEPS_127_5, base.linear("m").scale());
    }
  }

  static Stream<Arguments> refusedTorchao() {
    return Stream.of(
        Arguments.of("groups", torchao("._weight_", "[1, 4]", "null", new long[] {2, 2}),
            List.of("2 scales a row", "one for each group")),
        Arguments.of("blocks that are no rows", torchao("._weight_", "[1, 4]", "null"), List.of("block_size = [1, 4]")),
        Arguments.of("no metadata", new SafetensorsWriter().codes("m._weight_qdata", 2, 3), List.of("tensor_names")),
        Arguments.of("another class", new SafetensorsWriter().codes("a._weight_qdata", 2, 3)
            .metadata("tensor_names", "[\"a.weight\"]")
            .metadata("a.weight", "{\"_type\":\"Float8Tensor\",\"_data\":{}}"), List.of("a.weight", "Float8Tensor")),
        Arguments.of("smoothing", torchao("._weight_", "[1, 8]", PER_ROW).ramp("m._weight_act_pre_scale", 1, 8),
            List.of("m._weight_act_pre_scale", "act_pre_scale is not supported")),
        Arguments.of("static", torchao("._weight_", "[1, 8]", PER_ROW).ramp("m._weight_act_quant_scale", 1, 1),
            List.of("act_quant_scale is not supported")),
        Arguments.of("asymmetric weights", torchao("._weight_", "[1, 8]", "null")
            .bytes("m._weight_zero_point", "I8", new long[] {2, 1}, new byte[] {0, 1}), List.of("zero point is not 0")),
        Arguments.of("asymmetric activations", torchao("._weight_", "[1, 8]", PER_ROW.replace("\"SYM", "\"ASYM")),
            List.of("expected granularity PerRow, mapping_type SYMMETRIC")),
        Arguments.of("one scale for all of x", torchao("._weight_", "[1, 8]", PER_ROW.replace("PerRow", "PerTensor")),
            List.of("expected granularity PerRow")));
  }

  @ParameterizedTest(name = "{0}")
  @MethodSource("refusedTorchao")
  void otherTorchaoIsRefusedByName(String what, SafetensorsWriter writer, List<String> parts) throws IOException {
    model(writer, null);
    assertRejected(Status.UNSUPPORTED, parts);
  }

  // ---- compressed-tensors -------------------------------------------------------------------------------------------

  @Test
  void compressedTensorsDynamicTokensAreMeasuredAsTheServingKernelDoes() throws IOException {
    model(compressed(), config(group(WEIGHTS, TOKENS)));
    try (Checkpoint base = Checkpoint.open(folder)) {
      assertEquals("compressed-tensors int8 (1)", base.format());
      assertEquals(List.of(), base.notes());
      assertTrue(base.recognition().contains("m.weight_scale F32; the configuration names compressed-tensors"),
          base.recognition());
      assertEquals(new Quantization(Mode.W8A8_DYNAMIC, false, 0, 127, 0), base.linear("m").quantization());
      assertRepresents(base.linear("m"), 0.51);
    }
  }

  @Test
  void compressedTensorsStaticActivationsHaveTheirScaleInTheFile() throws IOException {
    model(compressed().floats("m.input_scale", new long[] {1}, 0.25f)
        .bytes("m.input_zero_point", "I8", new long[] {1}, new byte[1]), config(group(WEIGHTS, STATIC)));
    try (Checkpoint base = Checkpoint.open(folder)) {
      assertEquals(new Quantization(Mode.W8A8_STATIC, false, 0.25f, 0, 0), base.linear("m").quantization());
    }
  }

  @Test
  void compressedTensorsPerTensorAndWeightOnly() throws IOException {
    model(new SafetensorsWriter().bytes("m.weight", "I8", new long[] {2, 8}, CODES_127_5)
        .floats("m.weight_scale", new long[] {1}, 2), config(group(WEIGHTS.replace("channel", "tensor"), "null")));
    try (Checkpoint base = Checkpoint.open(folder)) {
      assertEquals(Quantization.weightOnly(), base.linear("m").quantization());
      assertArrayEquals(new float[] {2}, base.linear("m").scale());
    }
  }

  /** k = 6 is no multiple of the 4 codes in a word: rows are padded. Codes reach from -128 to 127. */
  @Test
  void packedCodesAreUnpackedByRows() throws IOException {
    byte[] codes = {-128, -1, 0, 1, 127, 5, 7, 6, -5, 4, -3, 2};
    ByteBuffer words = ByteBuffer.allocate(16).order(ByteOrder.LITTLE_ENDIAN);
    for (int row = 0; row < 2; row++) {
      for (int word = 0; word < 2; word++) {
        int packed = 0;
        for (int i = 0; i < 4 && 4 * word + i < 6; i++) {
          packed |= (codes[row * 6 + 4 * word + i] + 128) << 8 * i;
        }
        words.putInt(packed);
      }
    }
    ByteBuffer shape = ByteBuffer.allocate(16).order(ByteOrder.LITTLE_ENDIAN).putLong(2).putLong(6);
    SafetensorsWriter writer = new SafetensorsWriter()
        .bytes("m.weight_packed", "I32", new long[] {2, 2}, words.array())
        .floats("m.weight_scale", new long[] {2, 1}, 1, 1)
        .bytes("m.weight_shape", "I64", new long[] {2}, shape.array());
    model(writer, config(group(WEIGHTS, "null")));
    BaseLinear closed;
    try (Checkpoint base = Checkpoint.open(folder); Device cpu = Device.cpu()) {
      BaseLinear linear = base.linear("m");
      closed = linear;
      assertEquals(Quantization.weightOnly(), linear.quantization());
      assertEquals(List.of(2, 6, ElementType.I8), List.of(linear.n(), linear.k(), linear.weight().type()));
      byte[] read = new byte[12];
      linear.weight().bytes().get(read);
      assertArrayEquals(codes, read);
      for (int from = 0; from < 12; from++) {
        for (int to = from; to <= 12; to++) {
          ByteBuffer part = linear.weight().bytes(from, to - from);
          assertTrue(part.isDirect() && part.isReadOnly());
          for (int i = from; i < to; i++) {
            assertEquals(codes[i], part.get(i - from));
          }
        }
      }
      assertRuns(cpu, linear, codes, 6, 1);
    }
    assertThrows(IllegalStateException.class, () -> closed.weight().bytes());
  }

  static Stream<Arguments> refusedCompressed() {
    SafetensorsWriter plain = compressed();
    return Stream.of(
        Arguments.of("no configuration", plain, null, List.of("m.weight_scale", "read as compressed-tensors "
            + "int-quantized it needs a config.json", "as ComfyUI int8 a tensor m.comfy_quant")),
        Arguments.of("no configuration of packed codes", new SafetensorsWriter().codes("m.weight_packed", 2, 8), null,
            List.of("m.weight_packed", "pack-quantized, but no config.json")),
        Arguments.of("4 bits", plain, config(group(WEIGHTS.replace("8", "4"), TOKENS)),
            List.of("group_0", "weights: num_bits = 4, expected 8")),
        Arguments.of("floats", plain, config(group(WEIGHTS.replace("\"int\"", "\"float\""), TOKENS)),
            List.of("type = \"float\"")),
        Arguments.of("asymmetric weights", plain, config(group(WEIGHTS.replace("true", "false"), TOKENS)),
            List.of("weights: symmetric = false")),
        Arguments.of("a zero point", compressed().bytes("m.weight_zero_point", "I8", new long[] {2, 1},
            new byte[] {0, 3}), config(group(WEIGHTS, TOKENS)), List.of("m.weight_zero_point", "not 0")),
        Arguments.of("an input zero point", compressed().floats("m.input_scale", new long[] {1}, 1)
            .bytes("m.input_zero_point", "I8", new long[] {1}, new byte[] {-128}), config(group(WEIGHTS, STATIC)),
            List.of("m.input_zero_point", "not 0")),
        Arguments.of("asymmetric activations", plain, config(group(WEIGHTS, TOKENS.replace("\"symmetric\":true",
            "\"symmetric\":false"))), List.of("input_activations: symmetric = false")),
        Arguments.of("groups", plain, config(group(WEIGHTS.replace("channel", "group"), TOKENS)),
            List.of("strategy = \"group\", expected channel or tensor")),
        Arguments.of("dynamic per tensor", plain, config(group(WEIGHTS, TOKENS.replace("token", "tensor"))),
            List.of("strategy = \"tensor\", expected token")),
        Arguments.of("rotations", plain, config(group(WEIGHTS, TOKENS)).replace("\"ignore\"",
            "\"transform_config\":{\"config_groups\":{}},\"ignore\""), List.of("transform_config", "not supported")),
        Arguments.of("sparsity", plain, config(group(WEIGHTS, TOKENS)).replace("\"ignore\"",
            "\"sparsity_config\":{\"format\":\"sparse-24\"},\"ignore\""), List.of("sparsity_config", "sparse-24")),
        Arguments.of("group scales", new SafetensorsWriter().codes("m.weight", 2, 8).ramp("m.weight_scale", 1, 2, 4),
            config(group(WEIGHTS, TOKENS)), List.of("m.weight_scale F32 [2, 4]", "4 scales a row")),
        Arguments.of("reordered groups", compressed().codes("m.weight_g_idx", 8), config(group(WEIGHTS, TOKENS)),
            List.of("m.weight_g_idx", "reordered")));
  }

  @ParameterizedTest(name = "{0}")
  @MethodSource("refusedCompressed")
  void otherCompressedTensorsAreRefusedByName(String what, SafetensorsWriter writer, String config, List<String> parts)
      throws IOException {
    model(writer, config);
    assertRejected(Status.UNSUPPORTED, parts);
  }

  static Stream<Arguments> damagedCompressed() {
    return Stream.of(
        Arguments.of("static without scale", compressed(), STATIC, List.of("no m.input_scale")),
        Arguments.of("scale without static", compressed().floats("m.input_scale", new long[] {1}, 1), TOKENS,
            List.of("m.input_scale", "not static")),
        Arguments.of("negative scale", compressed().floats("m.input_scale", new long[] {1}, -1), STATIC,
            List.of("-1.0")),
        Arguments.of("scale as a row", new SafetensorsWriter().codes("m.weight", 2, 8).ramp("m.weight_scale", 1, 1, 2),
            TOKENS, List.of("m.weight_scale F32 [1, 2]")),
        Arguments.of("no codes", new SafetensorsWriter().ramp("m.weight_scale", 1, 1, 2), TOKENS,
            List.of("m.weight_scale", "no int8 weight")),
        Arguments.of("no shape", new SafetensorsWriter().bytes("m.weight_packed", "I32", new long[] {1, 1},
            new byte[4]), "null", List.of("m.weight_shape, found null")),
        Arguments.of("another shape", new SafetensorsWriter().bytes("m.weight_packed", "I32", new long[] {1, 1},
            new byte[4]).bytes("m.weight_shape", "I64", new long[] {2}, new byte[] {1, 0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0,
                0, 0, 0, 0}), "null", List.of("expected I32 [1, 2] for 1 x 5")));
  }

  @ParameterizedTest(name = "{0}")
  @MethodSource("damagedCompressed")
  void damagedCompressedTensorsAreRejected(String what, SafetensorsWriter writer, String activations,
      List<String> parts) throws IOException {
    model(writer, config(group(WEIGHTS, activations)));
    assertRejected(Status.INVALID_ARGUMENT, parts);
  }

  /** Names and patterns come before the class; what no group takes or what is ignored should be float. */
  @Test
  void targetsAndIgnoredModules() throws IOException {
    SafetensorsWriter writer = new SafetensorsWriter();
    for (String module : List.of("a.q", "a.k", "b.q", "lm_head")) {
      writer.codes(module + ".weight", 2, 8).ramp(module + ".weight_scale", 1, 2, 1);
    }
    String groups = "\"g0\":{\"targets\":[\"Linear\"],\"weights\":%s,\"input_activations\":%s},".formatted(WEIGHTS,
        TOKENS) + "\"g1\":{\"targets\":[\"re:.*k$\",\"b.q\"],\"weights\":%s,\"input_activations\":null}".formatted(
        WEIGHTS);
    model(writer, config(groups).replace("\"ignore\":[]", "\"ignore\":[\"lm_head\"]"));
    try (Checkpoint base = Checkpoint.open(folder)) {
      assertEquals(Mode.W8A8_DYNAMIC, base.linear("a.q").quantization().mode());
      assertEquals(Mode.W8A16, base.linear("a.k").quantization().mode());
      assertEquals(Mode.W8A16, base.linear("b.q").quantization().mode());
      assertEquals(1, base.notes().size());
      assertTrue(base.notes().get(0).endsWith("configuration leaves them unquantized: lm_head"), base.notes().get(0));
    }
    model(writer, config(groups.replace("\"Linear\"", "\"other\"")));
    assertRejected(Status.INVALID_ARGUMENT, List.of("none of config_groups take a.q"));
    model(writer, config(groups.replace("\"Linear\"", "\"b.q\",\"re:a\",\"lm_head\"")));
    assertRejected(Status.INVALID_ARGUMENT, List.of("config_groups g0", "config_groups g1", "take a.k"));
  }

  // ---- ComfyUI ------------------------------------------------------------------------------------------------------

  @ParameterizedTest
  @ValueSource(strings = {"tensor", "header", "both"})
  void comfyMarksItsLayersInTwoWays(String where) throws IOException {
    SafetensorsWriter writer = new SafetensorsWriter()
        .bytes("model.diffusion_model.m.weight", "I8", new long[] {2, 8}, CODES_127)
        .floats("model.diffusion_model.m.weight_scale", new long[] {2, 1}, STEPS_127);
    String fields = "{\"format\":\"int8_tensorwise\",\"convrot\":false}";
    if (!where.equals("header")) {
      comfy(writer, "model.diffusion_model.m", fields);
    }
    if (!where.equals("tensor")) {
      writer.metadata("_quantization_metadata",
          "{\"format_version\":\"1.0\",\"layers\":{\"model.diffusion_model.m\":%s}}".formatted(fields));
    }
    Path file = writer.write(folder.resolve("flux_int8.safetensors"));
    try (Checkpoint base = Checkpoint.open(file)) {
      BaseLinear linear = base.linear("model.diffusion_model.m");
      assertEquals(WeightFormat.COMFYUI_INT8, linear.format());
      assertEquals(new Quantization(Mode.W8A8_DYNAMIC, false, 0, 127, 0), linear.quantization());
      assertRepresents(linear, 0.501);
    }
  }

  @ParameterizedTest
  @CsvSource(delimiter = ';', value = {"; 1", "1; 1", "2; 2", "2, 1; 2"})
  void comfyScalesOfEveryShape(String shape, int count) throws IOException {
    long[] sides = shape == null ? new long[0]
        : Stream.of(shape.split(", ")).mapToLong(Long::parseLong).toArray();
    float[] steps = count == 1 ? new float[] {0.5f} : STEPS_127;
    model(comfy(new SafetensorsWriter().codes("m.weight", 2, 8).floats("m.weight_scale", sides, steps), "m",
        "{\"format\":\"int8_tensorwise\"}"), null);
    try (Checkpoint base = Checkpoint.open(folder)) {
      assertArrayEquals(steps, base.linear("m").scale());
    }
  }

  @ParameterizedTest
  @CsvSource(delimiter = ';', value = {
      "{\"format\":\"int8_tensorwise\",\"convrot\":true,\"convrot_groupsize\":256}; convrot = true; groups of 256",
      "{\"format\":\"asym_w4a8_int8\"}; asym_w4a8_int8; expected int8_tensorwise",
      "{\"format\":\"float8_e4m3fn\"}; float8_e4m3fn; expected int8_tensorwise", "{}; format = null; m.comfy_quant",
      "{\"format\":\"int8_tensorwise\",\"new_switch\":true}; new_switch = true; may change what is computed"})
  void otherComfyFormatsAreRefusedByName(String fields, String part, String other) throws IOException {
    model(comfy(new SafetensorsWriter().codes("m.weight", 2, 8).ramp("m.weight_scale", 1, 2), "m", fields), null);
    assertRejected(Status.UNSUPPORTED, List.of(part, other));
  }

  @Test
  void comfyMarksThatDisagreeAreRejectedWithBoth() throws IOException {
    model(comfy(new SafetensorsWriter().codes("m.weight", 2, 8).ramp("m.weight_scale", 1, 2), "m",
        "{\"format\":\"int8_tensorwise\"}").metadata("_quantization_metadata",
            "{\"layers\":{\"m\":{\"format\":\"nvfp4\"}}}"), null);
    assertRejected(Status.INVALID_ARGUMENT, List.of("format=nvfp4", "format=int8_tensorwise"));
  }

  // ---- Two readings -------------------------------------------------------------------------------------------------

  @Test
  void mixedFilesAreRefusedWithBothReadings() throws IOException {
    model(new SafetensorsWriter().bitsandbytes("a", 2, 3).codes("b.weight._data", 2, 3)
        .ramp("b.weight._scale", 1, 2, 1), null);
    assertRejected(Status.INVALID_ARGUMENT,
        List.of("read as bitsandbytes int8 by", "a.SCB", "as Quanto qint8 by", "b.weight._data"));
    model(compressed().ramp("m.SCB", 1, 2), config(group(WEIGHTS, TOKENS)));
    assertRejected(Status.INVALID_ARGUMENT, List.of("bitsandbytes int8", "m.SCB", "compressed-tensors int8",
        "m.weight_scale"));
  }

  // -------------------------------------------------------------------------------------------------------------------

  /** Steps times codes give the rows of the check vectors, to this share of a step. */
  private static void assertRepresents(BaseLinear linear, double share) {
    float[] scale = linear.scale();
    for (int row = 0; row < 2; row++) {
      float[] want = row == 0 ? ROW_A : ROW_B;
      for (int i = 0; i < 8; i++) {
        assertEquals(want[i], linear.weight().bytes().get(row * 8 + i) * (double) scale[row], share * scale[row]);
      }
    }
  }

  /** One row x = 1, 2, 3, …: what the layer gives is step times the exact sum of codes times x. */
  private static void assertRuns(Device device, BaseLinear linear, byte[] codes, int k, double step) {
    float[] x = new float[k];
    for (int i = 0; i < k; i++) {
      x[i] = i + 1;
    }
    try (Int8Linear layer = device.load(linear)) {
      float[] y = layer.forward(x, 1);
      for (int row = 0; row < y.length; row++) {
        double sum = 0;
        for (int i = 0; i < k; i++) {
          sum += codes[row * k + i] * (double) x[i];
        }
        assertEquals(step * sum, y[row]);
      }
    }
  }

  private static SafetensorsWriter torchao(String infix, String blocks, String activations) {
    return torchao(infix, blocks, activations, new long[] {2, 1});
  }

  private static SafetensorsWriter torchao(String infix, String blocks, String activations, long[] scale) {
    int count = (int) (scale[0] * scale[1]);
    return new SafetensorsWriter().bytes("m" + infix + "qdata", "I8", new long[] {2, 8}, CODES_127_5)
        .floats("m" + infix + "scale", scale, count == 2 ? STEPS_127_5 : new float[count])
        .metadata("tensor_names", "[\"m.weight\"]")
        .metadata("m.weight", INT8_TENSOR.formatted(blocks, activations));
  }

  private static SafetensorsWriter compressed() {
    return new SafetensorsWriter().bytes("m.weight", "I8", new long[] {2, 8}, CODES_127_5)
        .floats("m.weight_scale", new long[] {2, 1}, STEPS_127_5);
  }

  private static String group(String weights, String activations) {
    return "\"group_0\":{\"targets\":[\"Linear\"],\"weights\":%s,\"input_activations\":%s}".formatted(weights,
        activations);
  }

  private static String config(String groups) {
    return ("{\"quantization_config\":{\"quant_method\":\"compressed-tensors\",\"format\":\"int-quantized\","
        + "\"ignore\":[],\"config_groups\":{%s}}}").formatted(groups);
  }

  private static SafetensorsWriter comfy(SafetensorsWriter writer, String module, String json) {
    byte[] text = json.getBytes(StandardCharsets.UTF_8);
    return writer.bytes(module + ".comfy_quant", "U8", new long[] {text.length}, text);
  }

  private void model(SafetensorsWriter writer, String config) throws IOException {
    writer.write(folder.resolve("model.safetensors"));
    Files.deleteIfExists(folder.resolve("config.json"));
    if (config != null) {
      Files.writeString(folder.resolve("config.json"), config);
    }
  }

  private void assertRejected(Status status, List<String> messageParts) {
    FormatException e = assertThrows(FormatException.class, () -> Checkpoint.open(folder).close());
    for (String part : messageParts) {
      assertTrue(e.getMessage().contains(part), () -> "no \"" + part + "\" in: " + e.getMessage());
    }
    assertEquals(status, e.status(), e.getMessage());
  }
}
