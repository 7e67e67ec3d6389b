// SPDX-License-Identifier: Apache-2.0
package io.octolora.checkpoint;

import static org.junit.jupiter.api.Assertions.assertArrayEquals;
import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertFalse;
import static org.junit.jupiter.api.Assertions.assertNotNull;
import static org.junit.jupiter.api.Assertions.assertNull;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import io.octolora.Fixtures;
import io.octolora.FormatException;
import io.octolora.OctoloraException;
import io.octolora.SafetensorsWriter;
import io.octolora.Status;
import io.octolora.checkpoint.Quantization.Mode;
import java.io.IOException;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.List;
import java.util.Map;
import java.util.stream.Stream;
import org.junit.jupiter.api.Assumptions;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.io.TempDir;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.Arguments;
import org.junit.jupiter.params.provider.CsvSource;
import org.junit.jupiter.params.provider.MethodSource;
import org.junit.jupiter.params.provider.ValueSource;

class CheckpointTest {
  private static final String BITSANDBYTES =
      "{\"quantization_config\":{\"quant_method\":\"bitsandbytes\",\"load_in_8bit\":true%s}}";

  @TempDir Path folder;

  // ---- What real tools wrote ----------------------------------------------------------------------------------------

  @Test
  void readsBitsandbytesOfDiffusers() throws IOException {
    try (Checkpoint base = Checkpoint.open(Fixtures.path("flux/base_bnb8"))) {
      assertEquals("bitsandbytes int8 (36)", base.format());
      assertEquals(List.of(), base.notes());
      BaseLinear linear = base.linear("single_transformer_blocks.1.proj_out");
      assertEquals(128, linear.n());
      assertEquals(640, linear.k());
      assertEquals(WeightFormat.BITSANDBYTES_INT8, linear.format());
      assertEquals(new Quantization(Mode.W8A8_DYNAMIC, true, 0, 127, 6), linear.quantization());
      assertEquals(ElementType.I8, linear.weight().type());
      assertEquals(128, linear.bias().length);
      float[] scb = base.tensors().get("single_transformer_blocks.1.proj_out.SCB").toFloats();
      float[] scale = linear.scale();
      for (int row = 0; row < scb.length; row++) {
        assertEquals(scb[row] / 127, scale[row]);
      }
      assertEquals(128, scale.length);
      assertFalse(base.linears().containsKey("single_transformer_blocks.1.attn.norm_q"));
    }
  }

  @Test
  void readsQuantoOfDiffusers() throws IOException {
    try (Checkpoint base = Checkpoint.open(Fixtures.path("flux/base_quanto_diffusers"))) {
      assertEquals("Quanto qint8 (36)", base.format());
      assertEquals(List.of(), base.notes());
      BaseLinear linear = base.linear("x_embedder");
      assertEquals(128, linear.n());
      assertEquals(16, linear.k());
      assertEquals(Quantization.weightOnly(), linear.quantization());
      assertArrayEquals(base.tensors().get("x_embedder.weight._scale").toFloats(), linear.scale());
      assertEquals("x_embedder.weight._data", linear.weight().name());
    }
  }

  /** Both tools quantized one model: dequantized weights differ by half a step of each at most. */
  @Test
  void bothFormatsDequantizeToTheSameModel() throws IOException {
    try (Checkpoint one = Checkpoint.open(Fixtures.path("flux/base_bnb8"));
        Checkpoint other = Checkpoint.open(Fixtures.path("flux/base_quanto_diffusers"))) {
      assertEquals(one.linears().keySet(), other.linears().keySet());
      for (BaseLinear a : one.linears().values()) {
        BaseLinear b = other.linear(a.name());
        assertArrayEquals(a.bias(), b.bias());
        float[] stepA = a.scale();
        float[] stepB = b.scale();
        for (int i = 0; i < a.n() * a.k(); i++) {
          int row = i / a.k();
          double valueA = a.weight().bytes().get(i) * (double) stepA[row];
          double valueB = b.weight().bytes().get(i) * (double) stepB[row];
          double difference = valueA - valueB;
          // Half a step for each rounding. Quanto divides in bf16: its quotient of up to 127 is off by 2^-9 of itself.
          double bound = stepA[row] / 2.0 + stepB[row] / 2.0 + 127 * 0x1p-9 * stepB[row];
          assertTrue(Math.abs(difference) <= bound * 1.001, a.name() + " at " + i + ": " + difference + " > " + bound);
        }
      }
    }
  }

  @Test
  void readsBitsandbytesOfTransformersWithAnUnquantizedHead() throws IOException {
    try (Checkpoint base = Checkpoint.open(Fixtures.path("llama/base_bnb8"))) {
      assertEquals("bitsandbytes int8 (14), BF16 (2)", base.format());
      BaseLinear head = base.linear("lm_head");
      assertEquals(WeightFormat.FLOAT, head.format());
      assertFalse(head.quantized());
      assertNull(head.quantization());
      assertNull(head.bias());
      assertThrows(IllegalStateException.class, head::scale);
      assertEquals("lm_head", base.linears().keySet().iterator().next());
    }
  }

  @Test
  void reportsAPlainModelAsNotQuantized() throws IOException {
    try (Checkpoint base = Checkpoint.open(Fixtures.path("llama/base_bf16"))) {
      assertEquals("BF16 (16)", base.format());
      assertTrue(base.linears().values().stream().noneMatch(BaseLinear::quantized));
    }
  }

  @Test
  void opensTheFileItselfWithTheConfigBesideIt() throws IOException {
    try (Checkpoint base = Checkpoint.open(Fixtures.path("llama/base_bnb8/model.safetensors"))) {
      assertEquals(6, base.linear("model.layers.0.mlp.up_proj").quantization().outlierThreshold());
      assertEquals(List.of(), base.notes());
    }
  }

  @Test
  void anUnknownModuleIsNamedWithItsNeighbours() throws IOException {
    try (Checkpoint base = Checkpoint.open(Fixtures.path("llama/base_bnb8"))) {
      OctoloraException e = assertThrows(OctoloraException.class, () -> base.linear("layers.1.self_attn.q_proj"));
      assertEquals(Status.INVALID_ARGUMENT, e.status());
      assertTrue(e.getMessage().contains("nearest: model.layers.1.self_attn.q_proj"), e.getMessage());
    }
  }

  @Test
  void closedCheckpointsDescribeButDoNotRead() throws IOException {
    Checkpoint base = Checkpoint.open(Fixtures.path("llama/base_bnb8"));
    BaseLinear linear = base.linear("model.layers.0.mlp.up_proj");
    base.close();
    base.close();
    assertEquals(176, linear.n());
    assertThrows(IllegalStateException.class, linear::scale);
  }

  // ---- bitsandbytes -------------------------------------------------------------------------------------------------

  @ParameterizedTest
  @CsvSource({"'', 6", "',\"llm_int8_threshold\":null', 6", "',\"llm_int8_threshold\":4.5', 4.5",
      "',\"llm_int8_threshold\":0', 0", "',\"llm_int8_threshold\":3', 3"})
  void thresholdComesFromTheConfig(String fields, float expected) throws IOException {
    model(new SafetensorsWriter().bitsandbytes("m", 2, 3), BITSANDBYTES.formatted(fields));
    try (Checkpoint base = Checkpoint.open(folder)) {
      assertEquals(Quantization.bitsandbytes(expected), base.linear("m").quantization());
      assertEquals(List.of(), base.notes());
    }
  }

  @ParameterizedTest
  @ValueSource(strings = {"-1", "\"6\"", "1e400", "true", "[]"})
  void badThresholdsAreRejected(String value) throws IOException {
    model(new SafetensorsWriter().bitsandbytes("m", 2, 3), BITSANDBYTES.formatted(",\"llm_int8_threshold\":" + value));
    assertRejected(Status.INVALID_ARGUMENT, folder.resolve("config.json") + ": ", "llm_int8_threshold");
  }

  @Test
  void withoutConfigTheDefaultThresholdIsNoted() throws IOException {
    model(new SafetensorsWriter().bitsandbytes("m", 2, 3), null);
    try (Checkpoint base = Checkpoint.open(folder)) {
      assertEquals(6, base.linear("m").quantization().outlierThreshold());
      assertTrue(base.notes().get(0).contains("outlier threshold"), base.notes().toString());
    }
  }

  @ParameterizedTest
  @ValueSource(bytes = {1, 2, 3, (byte) 255})
  void tiledLayoutsAreRefused(byte layout) throws IOException {
    model(new SafetensorsWriter().codes("m.weight", 2, 3).ramp("m.SCB", 1, 2)
        .bytes("m.weight_format", "U8", new long[0], new byte[] {layout}), null);
    assertRejected(Status.UNSUPPORTED, "m.weight_format", (layout & 0xff) + ", a tiled layout");
  }

  @Test
  void anAbsentWeightFormatMeansRows() throws IOException {
    model(new SafetensorsWriter().codes("m.weight", 2, 3).ramp("m.SCB", 1, 2), BITSANDBYTES.formatted(""));
    try (Checkpoint base = Checkpoint.open(folder)) {
      assertArrayEquals(new float[] {0, 1 / 127f}, base.linear("m").scale());
    }
  }

  static Stream<Arguments> damagedLayers() {
    return Stream.of(
        damaged("I8 without a scale", new SafetensorsWriter().codes("m.weight", 2, 3), "m.weight I8 [2, 3]",
            "no m.SCB"),
        damaged("SCB alone", new SafetensorsWriter().ramp("m.SCB", 1, 2), "m.SCB F32 [2] has no int8 weight"),
        damaged("SCB beside a float weight", new SafetensorsWriter().ramp("m.weight", 1, 2, 3).ramp("m.SCB", 1, 2),
            "m.SCB F32 [2] has no int8 weight"),
        damaged("weight_format alone", new SafetensorsWriter().bytes("m.weight_format", "U8", new long[0], new byte[1]),
            "m.weight_format", "no int8 weight"),
        damaged("short SCB", new SafetensorsWriter().codes("m.weight", 2, 3).ramp("m.SCB", 1, 1), "m.SCB F32 [1]",
            "expected F32 [2]"),
        damaged("SCB as a column", new SafetensorsWriter().codes("m.weight", 2, 3).ramp("m.SCB", 1, 2, 1),
            "m.SCB F32 [2, 1]"),
        damaged("SCB of another type", new SafetensorsWriter().codes("m.weight", 2, 3).codes("m.SCB", 2), "m.SCB I8"),
        damaged("flat codes", new SafetensorsWriter().codes("m.weight", 6).ramp("m.SCB", 1, 6), "m.weight I8 [6]",
            "two dimensions"),
        damaged("no rows", new SafetensorsWriter().codes("m.weight", 0, 3).ramp("m.SCB", 1, 0), "m.weight I8 [0, 3]"),
        damaged("weight_format of two", new SafetensorsWriter().codes("m.weight", 2, 3).ramp("m.SCB", 1, 2)
            .bytes("m.weight_format", "U8", new long[] {2}, new byte[2]), "m.weight_format U8 [2]"),
        damaged("short bias", new SafetensorsWriter().bitsandbytes("m", 2, 3).ramp("m.bias", 1, 3), "m.bias F32 [3]",
            "[2]"),
        damaged("int8 bias", new SafetensorsWriter().bitsandbytes("m", 2, 3).codes("m.bias", 2), "m.bias I8 [2]"),
        damaged("Quanto codes without a scale", new SafetensorsWriter().codes("m.weight._data", 2, 3),
            "m.weight._data I8 [2, 3]", "no m.weight._scale"),
        damaged("Quanto scale alone", new SafetensorsWriter().ramp("m.weight._scale", 1, 2, 1), "m.weight._scale",
            "no int8 weight"),
        damaged("Quanto scale as a row", new SafetensorsWriter().codes("m.weight._data", 2, 3)
            .ramp("m.weight._scale", 1, 1, 2), "m.weight._scale F32 [1, 2]", "[2, 1]"),
        damaged("Quanto scalar scale for two rows", new SafetensorsWriter().codes("m.weight._data", 2, 3)
            .floats("m.weight._scale", new long[0], 1), "m.weight._scale F32 []", "[2, 1]"),
        damaged("Quanto and plain weight", new SafetensorsWriter().codes("m.weight._data", 2, 3)
            .ramp("m.weight._scale", 1, 2, 1).ramp("m.weight", 1, 2, 3), "m.weight._data", "there is also",
                "m.weight F32"),
        damaged("Quanto input_scale of two", quanto().ramp("m.input_scale", 1, 2), "m.input_scale F32 [2]"),
        damaged("Quanto negative input_scale", quanto().floats("m.input_scale", new long[0], -1), "m.input_scale",
            "-1.0"),
        damaged("Quanto NaN input_scale", quanto().floats("m.input_scale", new long[0], Float.NaN), "NaN"));
  }

  @ParameterizedTest(name = "{0}")
  @MethodSource("damagedLayers")
  void damagedLayersAreRejected(String what, SafetensorsWriter writer, List<String> messageParts) throws IOException {
    model(writer, null);
    assertRejected(Status.INVALID_ARGUMENT, messageParts.toArray(new String[0]));
  }

  @ParameterizedTest
  @ValueSource(floats = {-1, Float.NaN, Float.POSITIVE_INFINITY, Float.NEGATIVE_INFINITY})
  void badScalesAreRejectedWhenRead(float bad) throws IOException {
    model(new SafetensorsWriter().codes("m.weight", 2, 3).floats("m.SCB", new long[] {2}, 1, bad), null);
    try (Checkpoint base = Checkpoint.open(folder)) {
      FormatException e = assertThrows(FormatException.class, () -> base.linear("m").scale());
      assertTrue(e.getMessage().contains("m.SCB F32 [2]: row 1 is " + bad), e.getMessage());
    }
  }

  // ---- Quanto -------------------------------------------------------------------------------------------------------

  @Test
  void aSingleQuantoRowHasAScalarScale() throws IOException {
    model(new SafetensorsWriter().codes("m.weight._data", 1, 3).floats("m.weight._scale", new long[0], 0.5f), null);
    try (Checkpoint base = Checkpoint.open(folder)) {
      assertArrayEquals(new float[] {0.5f}, base.linear("m").scale());
      assertEquals(1, base.linear("m").n());
    }
  }

  @Test
  void quantoMapMarksStaticActivations() throws IOException {
    model(quanto().floats("m.input_scale", new long[0], 0.25f).floats("m.output_scale", new long[0], 1), null);
    Files.writeString(folder.resolve("quanto_qmap.json"), "{\"m\":{\"weights\":\"qint8\",\"activations\":\"qint8\"}}");
    try (Checkpoint base = Checkpoint.open(folder)) {
      assertEquals(new Quantization(Mode.W8A8_STATIC, false, 0.25f, 0, 0), base.linear("m").quantization());
      assertEquals(List.of(), base.notes());
    }
  }

  @Test
  void uncalibratedOrUnmarkedActivationsStayFloatAndAreNoted() throws IOException {
    model(quanto().floats("m.input_scale", new long[0], 1).floats("m.output_scale", new long[0], 3), null);
    Files.writeString(folder.resolve("quanto_qmap.json"), "{\"m\":{\"weights\":\"qint8\",\"activations\":\"qint8\"}}");
    try (Checkpoint base = Checkpoint.open(folder)) {
      assertEquals(Quantization.weightOnly(), base.linear("m").quantization());
      assertEquals(2, base.notes().size());
      assertTrue(base.notes().get(0).contains("m.output_scale is 3.0"), base.notes().toString());
      assertTrue(base.notes().get(1).contains("not calibrated"), base.notes().toString());
    }
    Files.delete(folder.resolve("quanto_qmap.json"));
    model(quanto().floats("m.input_scale", new long[0], 0.25f), null);
    try (Checkpoint base = Checkpoint.open(folder)) {
      assertEquals(Quantization.weightOnly(), base.linear("m").quantization());
      assertTrue(base.notes().get(0).contains("m.input_scale is 0.25"), base.notes().toString());
    }
  }

  @ParameterizedTest
  @ValueSource(strings = {"{\"weights\":\"qint4\",\"activations\":\"none\"}",
      "{\"weights\":\"qint8\",\"activations\":\"qfloat8_e4m3fn\"}"})
  void otherQuantoTypesAreRefused(String entry) throws IOException {
    model(quanto(), null);
    Files.writeString(folder.resolve("quanto_qmap.json"), "{\"m\":" + entry + "}");
    assertRejected(Status.UNSUPPORTED, "quanto_qmap.json: m");
  }

  @Test
  void quantoMapAndTensorsAreCompared() throws IOException {
    model(quanto().ramp("f.weight", 1, 2, 3).ramp("g.weight", 1, 2, 3), null);
    Files.writeString(folder.resolve("quanto_qmap.json"), "{\"f\":{\"weights\":\"qint8\",\"activations\":\"none\"}}");
    try (Checkpoint base = Checkpoint.open(folder)) {
      assertTrue(base.linear("m").quantized());
      assertFalse(base.linear("f").quantized());
      assertTrue(base.notes().get(0).contains("1 linear layers are int8 by their tensors"), base.notes().toString());
      assertTrue(base.notes().get(0).endsWith(": m"), base.notes().toString());
      assertTrue(base.notes().get(1).endsWith(": f"), base.notes().toString());
    }
  }

  // ---- Other formats ------------------------------------------------------------------------------------------------

  static Stream<Arguments> foreignFormats() {
    return Stream.of(
        damaged("torchao before Int8Tensor", new SafetensorsWriter().codes("m.weight:_data", 2, 3), "torchao"),
        damaged("GPTQ", new SafetensorsWriter().codes("m.qweight", 2, 3), "m.qweight", "GPTQ or AWQ"),
        damaged("bitsandbytes 4-bit", new SafetensorsWriter().bytes("m.weight", "U8", new long[] {3, 1}, new byte[3])
            .ramp("m.weight.absmax", 1, 1), "m.weight.absmax", "4-bit"),
        damaged("bitsandbytes 4-bit state", new SafetensorsWriter()
            .bytes("m.weight.quant_state.bitsandbytes__nf4", "U8", new long[] {1}, new byte[1]), "4-bit"),
        damaged("Quanto qint4", new SafetensorsWriter().bytes("m.weight._data._data", "U8", new long[] {3},
            new byte[3]),
            "Quanto with fewer than 8 bits"),
        damaged("Quanto qfloat8", new SafetensorsWriter().bytes("m.weight._data", "F8_E4M3", new long[] {1, 3},
            new byte[3]),
            "Quanto with F8_E4M3 codes"),
        damaged("float8", new SafetensorsWriter().bytes("m.weight", "F8_E4M3", new long[] {1, 3}, new byte[3]),
            "m.weight F8_E4M3", "8-bit float"),
        damaged("fp64", new SafetensorsWriter().bytes("m.weight", "F64", new long[] {1, 1}, new byte[8]),
            "m.weight F64"));
  }

  @ParameterizedTest(name = "{0}")
  @MethodSource("foreignFormats")
  void otherFormatsAreRefusedByName(String what, SafetensorsWriter writer,
      List<String> messageParts) throws IOException {
    model(writer, null);
    assertRejected(Status.UNSUPPORTED, messageParts.toArray(new String[0]));
  }

  @ParameterizedTest
  @ValueSource(strings = {"pytorch_model.bin", "model.pt", "model.pth", "sd.ckpt"})
  void picklesAreRefusedByName(String name) throws IOException {
    Path pickle = Files.write(folder.resolve(name), new byte[100]);
    FormatException e = assertThrows(FormatException.class, () -> Checkpoint.open(pickle));
    assertEquals(Status.UNSUPPORTED, e.status());
    assertTrue(e.getMessage().contains(name) && e.getMessage().contains("pickle"), e.getMessage());
    assertRejected(Status.UNSUPPORTED, name, "pickle");
  }

  @Test
  void ggufIsKnownByItsNameAndByItsFirstBytes() throws IOException {
    byte[] start = "GGUF\3\0\0\0\0\0\0\0".getBytes(StandardCharsets.ISO_8859_1);
    Files.write(folder.resolve("model.gguf"), start);
    assertRejected(Status.INVALID_ARGUMENT, "model.gguf", "GGUF", "cut short or damaged");
    Files.write(folder.resolve("other"), start);
    FormatException e = assertThrows(FormatException.class, () -> Checkpoint.open(folder.resolve("other")));
    assertTrue(e.getMessage().contains("GGUF"), e.getMessage());
    Files.write(folder.resolve("second.gguf"), start);
    assertRejected(Status.INVALID_ARGUMENT, "model.gguf, second.gguf could each be the model");
    Files.write(folder.resolve("second.gguf"), new byte[] {'P', 'K'});
    e = assertThrows(FormatException.class, () -> Checkpoint.open(folder.resolve("second.gguf")));
    assertTrue(e.getMessage().contains("a GGUF file by its name, but not by its first bytes"), e.getMessage());
  }

  // ---- Float modules ------------------------------------------------------------------------------------------------

  @Test
  void onlyTwoDimensionalWeightsAreLinear() throws IOException {
    model(new SafetensorsWriter().ramp("norm.weight", 1, 3).ramp("conv.weight", 1, 2, 3, 1, 1).ramp("linear.weight", 1,
        2, 3)
        .ramp("empty.weight", 1, 0, 3).bytes("steps.weight", "I64", new long[] {1}, new byte[8]), null);
    try (Checkpoint base = Checkpoint.open(folder)) {
      assertEquals(List.of("linear"), List.copyOf(base.linears().keySet()));
      assertEquals("F32 (1)", base.format());
    }
  }

  @Test
  void blocksAreListedInNumericOrder() throws IOException {
    model(new SafetensorsWriter().bitsandbytes("b.10", 1, 1).bitsandbytes("b.9", 1, 1).bitsandbytes("a", 1, 1), null);
    try (Checkpoint base = Checkpoint.open(folder)) {
      assertEquals(List.of("a", "b.9", "b.10"), List.copyOf(base.linears().keySet()));
    }
  }

  // ---- Skip lists ---------------------------------------------------------------------------------------------------

  static Stream<Arguments> skipLists() {
    String bitsandbytes = "{%s\"quantization_config\":{\"quant_method\":\"bitsandbytes\",\"load_in_8bit\":true,"
        + "\"llm_int8_skip_modules\":[\"%s\"]}}";
    String diffusers = "\"_class_name\":\"X\",";
    return Stream.of(
        Arguments.of("diffusers: leaf name", bitsandbytes.formatted(diffusers, "q"), true),
        Arguments.of("diffusers: part of the path", bitsandbytes.formatted(diffusers, "blocks.0"), true),
        Arguments.of("diffusers: end of a part", bitsandbytes.formatted(diffusers, "locks"), true),
        Arguments.of("diffusers: the path", bitsandbytes.formatted(diffusers, "blocks.0.q"), true),
        Arguments.of("diffusers: end of a leaf", bitsandbytes.formatted(diffusers, "0.q"), false),
        Arguments.of("transformers: end of the path", bitsandbytes.formatted("", "0.q"), true),
        Arguments.of("transformers: start of the path", bitsandbytes.formatted("", "bl.cks"), true),
        Arguments.of("transformers: middle of the path", bitsandbytes.formatted("", "locks"), false),
        Arguments.of("Quanto of diffusers: leaf name", "{\"quantization_config\":{\"quant_method\":\"quanto\","
            + "\"weights_dtype\":\"int8\",\"modules_to_not_convert\":[\"q\"]}}", true),
        Arguments.of("Quanto of diffusers: path", "{\"quantization_config\":{\"quant_method\":\"quanto\","
            + "\"weights_dtype\":\"int8\",\"modules_to_not_convert\":[\"blocks.0.q\"]}}", false));
  }

  @ParameterizedTest(name = "{0}")
  @MethodSource("skipLists")
  void skipListsAreReadAsTheirWritersDo(String what, String config, boolean skipped) throws IOException {
    SafetensorsWriter writer = config.contains("quanto")
        ? new SafetensorsWriter().codes("blocks.0.q.weight._data", 2, 3).ramp("blocks.0.q.weight._scale", 1, 2, 1)
        : new SafetensorsWriter().bitsandbytes("blocks.0.q", 2, 3);
    model(writer, config);
    try (Checkpoint base = Checkpoint.open(folder)) {
      assertTrue(base.linear("blocks.0.q").quantized());
      assertEquals(skipped ? 1 : 0, base.notes().size(), base.notes().toString());
    }
  }

  @Test
  void embeddingTablesAreNotMissedInTheSkipList() throws IOException {
    model(new SafetensorsWriter().bitsandbytes("q", 2, 3).ramp("model.embed_tokens.weight", 1, 2, 3)
        .ramp("lm_head.weight", 1, 2, 3).ramp("other.weight", 1, 2, 3),
        BITSANDBYTES.formatted(",\"llm_int8_skip_modules\":[\"lm_head\"]"));
    try (Checkpoint base = Checkpoint.open(folder)) {
      assertEquals(1, base.notes().size(), base.notes().toString());
      assertTrue(base.notes().get(0).endsWith(": other"), base.notes().toString());
    }
  }

  @Test
  void aConfigThatPromisesInt8WithoutAnyIsNoted() throws IOException {
    model(new SafetensorsWriter().ramp("m.weight", 1, 2, 3), BITSANDBYTES.formatted(""));
    try (Checkpoint base = Checkpoint.open(folder)) {
      assertTrue(base.notes().get(0).contains("says int8 (bitsandbytes)"), base.notes().toString());
    }
  }

  @ParameterizedTest
  @ValueSource(strings = {"[]", "{\"a\":1,\"a\":2}", "{", "{\"quantization_config\":3}",
      "{\"quantization_config\":{\"quant_method\":\"bitsandbytes\",\"llm_int8_skip_modules\":[3]}}",
      "{\"quantization_config\":{\"quant_method\":\"bitsandbytes\",\"llm_int8_skip_modules\":\"x\"}}",
      "{\"quantization_config\":{\"quant_method\":\"bitsandbytes\",\"llm_int8_skip_modules\":[\"(\"]}}"})
  void damagedConfigsAreRejected(String config) throws IOException {
    model(new SafetensorsWriter().bitsandbytes("m", 2, 3), config);
    assertRejected(Status.INVALID_ARGUMENT, "config.json");
  }

  // ---- Shards and folders -------------------------------------------------------------------------------------------

  @Test
  void aWeightAndItsScaleMayLieInDifferentShards() throws IOException {
    for (String stem : List.of("model", "diffusion_pytorch_model")) {
      Path sub = Files.createDirectories(folder.resolve(stem));
      new SafetensorsWriter().codes("m.weight", 2, 3).write(sub.resolve(stem + "-00001-of-00002.safetensors"));
      new SafetensorsWriter().ramp("m.SCB", 127, 2).write(sub.resolve(stem + "-00002-of-00002.safetensors"));
      Path index = Files.writeString(sub.resolve(stem + ".safetensors.index.json"),
          "{\"metadata\":{\"total_size\":14},\"weight_map\":{\"m.weight\":\"%s-00001-of-00002.safetensors\","
              .formatted(stem) + "\"m.SCB\":\"%s-00002-of-00002.safetensors\"}}".formatted(stem));
      Files.writeString(sub.resolve("config.json"), BITSANDBYTES.formatted(",\"llm_int8_threshold\":5.0"));
      for (Path path : List.of(sub, index)) {
        try (Checkpoint base = Checkpoint.open(path)) {
          assertArrayEquals(new float[] {0, 1}, base.linear("m").scale());
          assertEquals(5, base.linear("m").quantization().outlierThreshold());
          assertEquals(List.of(), base.notes());
        }
      }
    }
  }

  @ParameterizedTest
  @ValueSource(strings = {"../s.safetensors", "sub/s.safetensors", "sub\\\\s.safetensors", "..", "", "/etc/passwd"})
  void shardsStayInTheirFolder(String name) throws IOException {
    index("{\"weight_map\":{\"m.weight\":\"%s\"}}".formatted(name));
    assertRejected(Status.INVALID_ARGUMENT, "weight_map m.weight", "in the same folder");
  }

  @Test
  void missingShardsAndTensorsAreNamed() throws IOException {
    index("{\"weight_map\":{\"m.weight\":\"none.safetensors\"}}");
    assertRejected(Status.INVALID_ARGUMENT, "weight_map m.weight", "none.safetensors");
    new SafetensorsWriter().codes("other", 1).write(folder.resolve("s.safetensors"));
    index("{\"weight_map\":{\"m.weight\":\"s.safetensors\"}}");
    assertRejected(Status.INVALID_ARGUMENT, "weight_map m.weight", "s.safetensors has no such tensor");
    index("{\"weight_map\":{\"m.weight\":3}}");
    assertRejected(Status.INVALID_ARGUMENT, "weight_map m.weight", "3, expected a file name");
    index("{\"weight_map\":[]}");
    assertRejected(Status.INVALID_ARGUMENT, "weight_map", "expected an object");
    index("{}");
    assertRejected(Status.INVALID_ARGUMENT, "weight_map", "null, expected an object");
    index("{\"weight_map\":{\"a\":\"s.safetensors\",\"a\":\"s.safetensors\"}}");
    assertRejected(Status.INVALID_ARGUMENT, "Duplicate");
    index("{\"weight_map\":{\"a\":\"s.bin\"}}");
    assertRejected(Status.UNSUPPORTED, "s.bin", "pickle");
  }

  @Test
  void tensorsThatTheIndexLeavesOutAreUsedAndNoted() throws IOException {
    new SafetensorsWriter().bitsandbytes("m", 2, 3).write(folder.resolve("s.safetensors"));
    new SafetensorsWriter().ramp("n.weight", 1, 1, 1).ramp("m.SCB", 9, 2).write(folder.resolve("t.safetensors"));
    index("{\"weight_map\":{\"m.weight\":\"s.safetensors\",\"m.SCB\":\"s.safetensors\","
        + "\"n.weight\":\"t.safetensors\"}}");
    Files.writeString(folder.resolve("config.json"), BITSANDBYTES.formatted(""));
    try (Checkpoint base = Checkpoint.open(folder)) {
      assertEquals(2, base.notes().size(), base.notes().toString());
      assertTrue(base.notes().get(0).contains("m.weight_format"), base.notes().toString());
      assertTrue(base.notes().get(1).contains("m.SCB") && base.notes().get(1).contains("second copy"));
      assertArrayEquals(new float[] {0, 1 / 127f}, base.linear("m").scale());
    }
  }

  @Test
  void aFolderHasOneModel() throws IOException {
    assertRejected(Status.INVALID_ARGUMENT, folder.toString(), "no model.safetensors");
    Files.writeString(folder.resolve("model_index.json"), "{}");
    assertRejected(Status.INVALID_ARGUMENT, "pipeline", "transformer folder");
    new SafetensorsWriter().ramp("m.weight", 1, 1, 1).write(folder.resolve("any.safetensors"));
    try (Checkpoint base = Checkpoint.open(folder)) {
      assertNotNull(base.linear("m"));
    }
    new SafetensorsWriter().write(folder.resolve("model.safetensors"));
    index("{\"weight_map\":{}}");
    assertRejected(Status.INVALID_ARGUMENT, "model.safetensors", "model.safetensors.index.json", "name one of them");
  }

  @Test
  void aFileWithAnotherNameStandsAlone() throws IOException {
    Path file = new SafetensorsWriter().bitsandbytes("m", 2, 3).write(folder.resolve("my.safetensors"));
    Files.writeString(folder.resolve("config.json"), BITSANDBYTES.formatted(",\"llm_int8_threshold\":5.0"));
    try (Checkpoint base = Checkpoint.open(file)) {
      assertEquals(6, base.linear("m").quantization().outlierThreshold());
      assertEquals(1, base.notes().size());
    }
  }

  @Test
  void aFailedOpenLeavesNoFileOpen() throws IOException {
    Path links = Path.of("/proc/self/fd");
    if (!Files.isDirectory(links)) {
      String reason = "no /proc/self/fd to count open files in";
      System.out.println("SKIPPED: CheckpointTest.aFailedOpenLeavesNoFileOpen: " + reason);
      Assumptions.abort(reason);
    }
    model(new SafetensorsWriter().codes("m.weight", 2, 3), null);
    for (int i = 0; i < 3; i++) {
      assertThrows(FormatException.class, () -> Checkpoint.open(folder));
    }
    try (Stream<Path> open = Files.list(links)) {
      assertEquals(0, open.filter(link -> {
        try {
          return Files.readSymbolicLink(link).startsWith(folder);
        } catch (IOException e) {
          return false; // the listing's own descriptor, gone by now
        }
      }).count());
    }
  }

  @Test
  void quantizationChecksItsNumbers() {
    for (float bad : new float[] {0, -1, Float.NaN, Float.POSITIVE_INFINITY}) {
      assertThrows(IllegalArgumentException.class, () -> Quantization.fixed(bad));
      assertThrows(IllegalArgumentException.class, () -> new Quantization(Mode.W8A8_DYNAMIC, true, 0, bad, 0));
    }
    assertThrows(IllegalArgumentException.class, () -> Quantization.bitsandbytes(-1));
    assertThrows(IllegalArgumentException.class, () -> Quantization.weightOnly().withOutlierThreshold(6));
    assertEquals(0, Quantization.bitsandbytes(6).withOutlierThreshold(0).outlierThreshold());
    assertEquals(Map.of(Mode.W8A16, 0, Mode.W8A8_DYNAMIC, 1, Mode.W8A8_STATIC, 2), Map.of(Mode.W8A16,
        Mode.W8A16.ordinal(), Mode.W8A8_DYNAMIC, Mode.W8A8_DYNAMIC.ordinal(), Mode.W8A8_STATIC,
        Mode.W8A8_STATIC.ordinal()));
  }

  private static SafetensorsWriter quanto() {
    return new SafetensorsWriter().codes("m.weight._data", 2, 3).ramp("m.weight._scale", 1, 2, 1);
  }

  private void model(SafetensorsWriter writer, String config) throws IOException {
    writer.write(folder.resolve("model.safetensors"));
    if (config != null) {
      Files.writeString(folder.resolve("config.json"), config);
    }
  }

  private void index(String json) throws IOException {
    Files.writeString(folder.resolve("model.safetensors.index.json"), json);
  }

  private void assertRejected(Status status, String... messageParts) {
    FormatException e = assertThrows(FormatException.class, () -> Checkpoint.open(folder).close());
    for (String part : messageParts) {
      assertTrue(e.getMessage().contains(part), () -> "no \"" + part + "\" in: " + e.getMessage());
    }
    assertEquals(status, e.status(), e.getMessage());
  }

  private static Arguments damaged(String what, SafetensorsWriter writer, String... messageParts) {
    return Arguments.of(what, writer, List.of(messageParts));
  }
}
