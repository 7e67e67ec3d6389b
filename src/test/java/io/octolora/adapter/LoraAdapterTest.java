// SPDX-License-Identifier: Apache-2.0
package io.octolora.adapter;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertNotNull;
import static org.junit.jupiter.api.Assertions.assertNull;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import io.octolora.Fixtures;
import io.octolora.FormatException;
import io.octolora.SafetensorsWriter;
import io.octolora.Status;
import io.octolora.checkpoint.SafetensorsFile;
import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.List;
import java.util.Map;
import java.util.TreeSet;
import java.util.stream.Collectors;
import java.util.stream.Stream;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.io.TempDir;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.Arguments;
import org.junit.jupiter.params.provider.CsvSource;
import org.junit.jupiter.params.provider.MethodSource;
import org.junit.jupiter.params.provider.ValueSource;

class LoraAdapterTest {
  private static final String PEFT = "base_model.model.";

  @TempDir Path folder;

  // ---- What real tools wrote ----------------------------------------------------------------------------------------

  static Stream<Arguments> realAdapters() {
    return Stream.of(
        Arguments.of("flux/adapters/r4/peft", AdapterFormat.PEFT, 26),
        Arguments.of("flux/adapters/r4/diffusers_lora.safetensors", AdapterFormat.DIFFUSERS, 26),
        Arguments.of("flux/adapters/r4/pytorch_lora_weights.safetensors", AdapterFormat.DIFFUSERS, 26),
        Arguments.of("flux/adapters/r4/kohya.safetensors", AdapterFormat.KOHYA, 16),
        Arguments.of("flux/adapters/r4/bfl.safetensors", AdapterFormat.BFL, 16),
        Arguments.of("flux/adapters/shared/bfl_diffusion_model_prefix.safetensors", AdapterFormat.BFL, 16),
        Arguments.of("flux/adapters/lora_bias/peft", AdapterFormat.PEFT, 7),
        Arguments.of("llama/adapters/r4_all", AdapterFormat.PEFT, 14),
        Arguments.of("llama/adapters/r8_qv_bf16/adapter_model.safetensors", AdapterFormat.PEFT, 4),
        Arguments.of("llama/adapters/r8_qv_bf16/adapter_config.json", AdapterFormat.PEFT, 4));
  }

  @ParameterizedTest(name = "{0}")
  @MethodSource("realAdapters")
  void everyTensorBelongsToAPair(String fixture, AdapterFormat format, int pairs) throws IOException {
    try (LoraAdapter adapter = LoraAdapter.open(Fixtures.path(fixture))) {
      assertEquals(format, adapter.format());
      assertEquals(pairs, adapter.pairs().size());
      assertEquals(List.of(), adapter.unsupported());
      assertEquals(List.of(), adapter.notes());
      try (SafetensorsFile file = SafetensorsFile.open(adapter.pairs().get(0).a().file())) {
        assertEquals(new TreeSet<>(file.tensors().keySet()),
            adapter.pairs().stream().flatMap(pair -> pair.keys()
                .stream()).collect(Collectors.toCollection(TreeSet::new)));
      }
    }
  }

  @ParameterizedTest
  @ValueSource(strings = {"flux/adapters/pattern/peft", "flux/adapters/pattern/diffusers_lora.safetensors"})
  void patternsSetRankAndScaleOfEachModule(String fixture) throws IOException {
    try (LoraAdapter adapter = LoraAdapter.open(Fixtures.path(fixture))) {
      for (LoraPair pair : adapter.pairs()) {
        // rank_pattern: to_q 8, single_transformer_blocks.1.proj_mlp 12; alpha_pattern: to_k 16, the same proj_mlp 3
        boolean special = pair.name().endsWith("single_transformer_blocks.1.proj_mlp");
        int rank = pair.name().endsWith("to_q") ? 8 : special ? 12 : 4;
        double alpha = pair.name().endsWith("to_k") ? 16 : special ? 3 : 4;
        assertEquals(rank, pair.rank(), pair.name());
        assertEquals(alpha / rank, pair.scale(), pair.name());
      }
    }
  }

  @Test
  void rankStabilizedScaleDividesByTheRoot() throws IOException {
    try (LoraAdapter adapter = LoraAdapter.open(Fixtures.path("llama/adapters/r5_rslora"))) {
      adapter.pairs().forEach(pair -> assertEquals(5, pair.rank()));
      Map<String, Object> config =
          io.octolora.internal.Json.readObject(Fixtures.path("llama/adapters/r5_rslora/adapter_config.json"));
      double alpha = ((Number) config.get("lora_alpha")).doubleValue();
      adapter.pairs().forEach(pair -> assertEquals(alpha / Math.sqrt(5), pair.scale()));
    }
  }

  @ParameterizedTest
  @ValueSource(strings = {"flux/adapters/dora/peft", "flux/adapters/dora/diffusers_lora.safetensors",
      "llama/adapters/dora"})
  void doraHasAMagnitudeForEveryPair(String fixture) throws IOException {
    try (LoraAdapter adapter = LoraAdapter.open(Fixtures.path(fixture))) {
      assertEquals(List.of(), adapter.unsupported());
      assertTrue(!adapter.pairs().isEmpty());
      for (LoraPair pair : adapter.pairs()) {
        assertNotNull(pair.magnitude(), pair.name());
        assertEquals(pair.out(), pair.magnitude().elementCount());
        assertEquals(3, pair.keys().size());
      }
    }
  }

  /** Of LyCORIS and OneTrainer; which axis it is of is told by its two dimensions alone. */
  @Test
  void doraScaleOfRowsIsAMagnitude() throws IOException {
    Path file = pair(new SafetensorsWriter(), "lycoris_m", 2).ramp("lycoris_m.dora_scale", 1, 5, 1)
        .write(folder.resolve("x.safetensors"));
    try (LoraAdapter adapter = LoraAdapter.open(file)) {
      assertEquals(List.of(), adapter.unsupported());
      assertEquals(5, adapter.pairs().get(0).magnitude().elementCount());
    }
  }

  @Test
  void doraScalesOfAnotherAxisOrOfNoneAreListedWithTheReadings() throws IOException {
    pair(new SafetensorsWriter(), "m", 2).ramp("m.dora_scale", 1, 1, 3).write(folder.resolve("x.safetensors"));
    assertUnsupported("is a DoRA magnitude of W's columns, which is not supported: expected [5, 1]", 3);
    pair(new SafetensorsWriter(), "m", 2).ramp("m.dora_scale", 1, 5).write(folder.resolve("x.safetensors"));
    assertUnsupported("m.dora_scale F32 [5] has one dimension, expected [5, 1]", 3);
    new SafetensorsWriter().ramp("m.lora_A.weight", 1, 2, 4).ramp("m.lora_B.weight", 1, 4, 2)
        .ramp("m.dora_scale", 1, 4).write(folder.resolve("x.safetensors"));
    assertUnsupported("could be a DoRA magnitude of W's 4 rows or of its 4 columns", 3);
  }

  @Test
  void magnitudesThatPeftDoesNotHaveAreListed() throws IOException {
    peft(pair(new SafetensorsWriter(), PEFT + "m", 2).ramp(PEFT + "m.lora_magnitude_vector", 1, 5),
        "\"r\":2,\"lora_alpha\":2");
    assertUnsupported("use_dora is not set", 3);
    peft(pair(new SafetensorsWriter(), PEFT + "m", 2).ramp(PEFT + "m.lora_magnitude_vector", 1, 5)
        .ramp(PEFT + "m.lora_B.bias", 1, 5), "\"r\":2,\"lora_alpha\":2,\"use_dora\":true");
    assertUnsupported("beside a bias", 4);
  }

  // ---- PEFT's configuration -----------------------------------------------------------------------------------------

  /** What PEFT itself was seen to do; the whole path is the one without PEFT's wrapper. */
  @ParameterizedTest(name = "{0} on {1}: {2}")
  @CsvSource({
      "q_proj, model.layers.1.self_attn.q_proj, true",
      "^q_proj, model.layers.1.self_attn.q_proj, false",
      "^q_proj, q_proj, true",
      "^model.layers.1.self_attn.q_proj, model.layers.1.self_attn.q_proj, true",
      "elf_attn.q_proj, model.layers.1.self_attn.q_proj, false",
      "base_model.model.model.layers.1.self_attn.q_proj, model.layers.1.self_attn.q_proj, false",
      "layers.1.*.q_proj, model.layers.11.self_attn.q_proj, true",
      "layers\\.1\\..*\\.q_proj, model.layers.11.self_attn.q_proj, false",
      "q_proj, model.layers.1.self_attn.q_proj_extra, false",
      "q|k, model.q, true",
      "(q|k)_proj, model.k_proj, true"})
  void patternKeysFollowPeft(String key, String path, boolean matches) throws IOException {
    peft(pair(new SafetensorsWriter(), PEFT + path, 4), "\"r\":4,\"lora_alpha\":4,\"alpha_pattern\":{%s:12}".formatted(
        SafetensorsWriter.quote(key)));
    try (LoraAdapter adapter = LoraAdapter.open(folder)) {
      assertEquals(matches ? 3 : 1, adapter.pairs().get(0).scale());
      assertEquals(matches ? 0 : 1, adapter.notes().size(), adapter.notes().toString());
      if (!matches) {
        assertTrue(adapter.notes().get(0).contains("alpha_pattern key " + key + " fits no module"),
            adapter.notes().get(0));
      }
    }
  }

  @Test
  void theFirstPatternThatFitsWins() throws IOException {
    peft(pair(new SafetensorsWriter(), PEFT + "a.q", 4),
        "\"r\":4,\"lora_alpha\":4,\"alpha_pattern\":{\"zz\":1,\"q\":8,\"a.q\":12}");
    try (LoraAdapter adapter = LoraAdapter.open(folder)) {
      assertEquals(2, adapter.pairs().get(0).scale());
    }
  }

  /** The key's own group is the third: two stand around it. */
  @Test
  void backReferencesCountTheGroupsAroundTheKey() throws IOException {
    peft(pair(new SafetensorsWriter(), PEFT + "x.abab", 4),
        "\"r\":4,\"lora_alpha\":4,\"alpha_pattern\":{\"(ab)\\\\3\":8}");
    try (LoraAdapter adapter = LoraAdapter.open(folder)) {
      assertEquals(2, adapter.pairs().get(0).scale());
    }
  }

  @Test
  void rankPatternsAreCheckedAgainstTheTensors() throws IOException {
    peft(pair(new SafetensorsWriter(), PEFT + "a.q", 4), "\"r\":4,\"lora_alpha\":4,\"rank_pattern\":{\"q\":8}");
    assertUnsupported("rank 8, A has 4", 2);
  }

  static Stream<Arguments> refusedConfigs() {
    return Stream.of(
        refused("\"peft_type\":\"LOHA\"", Status.UNSUPPORTED, "peft_type = \"LOHA\", expected LORA"),
        refused("\"init_lora_weights\":\"pissa\"", Status.UNSUPPORTED, "init_lora_weights = \"pissa\""),
        refused("\"init_lora_weights\":\"pissa_niter_4\"", Status.UNSUPPORTED, "pissa_niter_4"),
        refused("\"init_lora_weights\":\"olora\"", Status.UNSUPPORTED, "olora"),
        refused("\"init_lora_weights\":\"corda\"", Status.UNSUPPORTED, "corda"),
        refused("\"init_lora_weights\":\"lora_ga\"", Status.UNSUPPORTED, "lora_ga"),
        refused("\"init_lora_weights\":\"loftq\"", Status.UNSUPPORTED, "loftq"),
        refused("\"init_lora_weights\":\"something_new\"", Status.UNSUPPORTED, "something_new"),
        refused("\"init_lora_weights\":3", Status.UNSUPPORTED, "init_lora_weights = 3"),
        refused("\"target_parameters\":[\"x\"]", Status.UNSUPPORTED, "target_parameters"),
        refused("\"layer_replication\":[[0,4]]", Status.UNSUPPORTED, "layer_replication"),
        refused("\"trainable_token_indices\":[1]", Status.UNSUPPORTED, "trainable_token_indices"),
        refused("\"alora_invocation_tokens\":[1]", Status.UNSUPPORTED, "alora_invocation_tokens"),
        refused("\"use_qalora\":true", Status.UNSUPPORTED, "use_qalora"),
        refused("\"arrow_config\":{\"a\":1}", Status.UNSUPPORTED, "arrow_config"),
        refused("\"use_bdlora\":true", Status.UNSUPPORTED, "use_bdlora"),
        refused("\"use_bdlora\":{\"a\":1}", Status.UNSUPPORTED, "use_bdlora"),
        refused("\"kasa_config\":{\"a\":1}", Status.UNSUPPORTED, "kasa_config"),
        refused("\"monteclora_config\":{\"a\":1}", Status.UNSUPPORTED, "monteclora_config"),
        refused("\"rank_pattern\":[]", Status.INVALID_ARGUMENT, "rank_pattern", "expected an object"),
        refused("\"rank_pattern\":{\"q\":0}", Status.INVALID_ARGUMENT, "rank_pattern q = 0"),
        refused("\"rank_pattern\":{\"q\":2.5}", Status.INVALID_ARGUMENT, "rank_pattern q = 2.5"),
        refused("\"alpha_pattern\":{\"q\":\"x\"}", Status.INVALID_ARGUMENT, "alpha_pattern q = \"x\""),
        refused("\"alpha_pattern\":{\"q\":1e999}", Status.INVALID_ARGUMENT, "alpha_pattern q"),
        refused("\"alpha_pattern\":{\"(?P<n>q)\":1}", Status.UNSUPPORTED, "alpha_pattern (?P<n>q)",
            "not the same in Java"),
        refused("\"alpha_pattern\":{\"(\":1}", Status.INVALID_ARGUMENT, "alpha_pattern ("),
        refused("\"use_rslora\":\"yes\"", Status.INVALID_ARGUMENT, "use_rslora = \"yes\""));
  }

  @ParameterizedTest(name = "{0}")
  @MethodSource("refusedConfigs")
  void configsThatChangeTheFormulaAreRefusedByName(String field, Status status, List<String> messageParts)
      throws IOException {
    pair(new SafetensorsWriter(), PEFT + "a.q", 4).write(folder.resolve("adapter_model.safetensors"));
    String type = field.contains("peft_type") ? "" : "\"peft_type\":\"LORA\",";
    Files.writeString(folder.resolve("adapter_config.json"), "{%s\"r\":4,\"lora_alpha\":4,%s}".formatted(type, field));
    FormatException e = assertRejected(folder, "adapter_config.json");
    messageParts.forEach(part -> assertTrue(e.getMessage().contains(part), e.getMessage()));
    assertEquals(status, e.status(), e.getMessage());
  }

  @ParameterizedTest
  @ValueSource(strings = {"true", "false", "null", "\"gaussian\"", "\"orthogonal\"", "\"eva\""})
  void initialisationsThatLeaveTheBaseAloneAreAccepted(String value) throws IOException {
    peft(pair(new SafetensorsWriter(), PEFT + "a.q", 4), "\"r\":4,\"lora_alpha\":8,\"fan_in_fan_out\":true,"
        + "\"target_parameters\":null,\"layer_replication\":[],\"use_qalora\":false,\"init_lora_weights\":" + value);
    try (LoraAdapter adapter = LoraAdapter.open(folder)) {
      assertEquals(2, adapter.pairs().get(0).scale());
    }
  }

  @ParameterizedTest
  @CsvSource({"'\"lora_alpha\":8', r = null", "'\"r\":4', lora_alpha = null", "'\"r\":0,\"lora_alpha\":8', r = 0",
      "'\"r\":\"4\",\"lora_alpha\":8', 'r = \"4\"'", "'\"r\":4,\"r\":4,\"lora_alpha\":8', Duplicate"})
  void rankAndAlphaMustBeThere(String fields, String messagePart) throws IOException {
    peft(pair(new SafetensorsWriter(), PEFT + "a.q", 4), fields);
    assertRejected(folder, "adapter_config.json", messagePart);
  }

  @Test
  void theWrapperIsStrippedOnceAndTheAdapterNameToo() throws IOException {
    SafetensorsWriter writer = new SafetensorsWriter().ramp(PEFT + "m.lora_A.default.weight", 1, 2, 3)
        .ramp(PEFT + "m.lora_B.default.weight", 1, 4, 2).ramp(PEFT + "m.lora_B.default.bias", 1, 4);
    peft(writer, "\"r\":2,\"lora_alpha\":2,\"lora_bias\":true");
    try (LoraAdapter adapter = LoraAdapter.open(folder)) {
      LoraPair pair = adapter.pairs().get(0);
      assertEquals(PEFT + "m", pair.name());
      assertNotNull(pair.bias());
      assertEquals(3, pair.keys().size());
    }
  }

  @Test
  void doraWithoutMagnitudesIsListedToo() throws IOException {
    peft(pair(new SafetensorsWriter(), PEFT + "m", 2), "\"r\":2,\"lora_alpha\":2,\"use_dora\":true");
    assertUnsupported("use_dora is set", 2);
  }

  @Test
  void peftNamesWithoutAnyConfigurationAreRejected() throws IOException {
    Path file = pair(new SafetensorsWriter(), PEFT + "m", 2).write(folder.resolve("x.safetensors"));
    assertRejected(file, "no adapter_config.json", "lora_adapter_metadata");
    pair(new SafetensorsWriter(), PEFT + "m", 2).write(folder.resolve("adapter_model.safetensors"));
    assertRejected(folder, "no adapter_config.json");
  }

  @Test
  void peftWrapperAroundOriginalFluxNamesNeedsNoConfiguration() throws IOException {
    Path file = pair(new SafetensorsWriter(), PEFT + "double_blocks.0.img_attn.proj",
        2).write(folder.resolve("x.safetensors"));
    try (LoraAdapter adapter = LoraAdapter.open(file)) {
      assertEquals(AdapterFormat.BFL, adapter.format());
      assertEquals(1, adapter.pairs().get(0).scale());
    }
  }

  // ---- Scale from the header or from alpha --------------------------------------------------------------------------

  @ParameterizedTest
  @CsvSource({"pytorch_lora_weights", "anything"})
  void headerMetadataIsHonouredWhateverTheFileIsCalled(String name) throws IOException {
    SafetensorsWriter writer = pair(pair(new SafetensorsWriter(), "transformer.m", 2), "text_encoder.m", 2)
        .metadata("lora_adapter_metadata", "{\"transformer.r\":2,\"transformer.lora_alpha\":6,"
            + "\"text_encoder.r\":2,\"text_encoder.lora_alpha\":4,\"text_encoder.use_rslora\":true,"
            + "\"text_encoder.alpha_pattern\":{\"^m\":8}}");
    try (LoraAdapter adapter = LoraAdapter.open(writer.write(folder.resolve(name + ".safetensors")))) {
      assertEquals(8 / Math.sqrt(2), adapter.pairs().get(0).scale());
      assertEquals("text_encoder.m", adapter.pairs().get(0).name());
      assertEquals(3, adapter.pairs().get(1).scale());
    }
  }

  @Test
  void headerMetadataWithoutComponentIsForTheWholeFile() throws IOException {
    Path file = pair(new SafetensorsWriter(), "blocks.0.m", 2)
        .metadata("lora_adapter_metadata", "{\"r\":2,\"lora_alpha\":6,\"peft_type\":\"LORA\"}")
        .write(folder.resolve("x.safetensors"));
    try (LoraAdapter adapter = LoraAdapter.open(file)) {
      assertEquals(3, adapter.pairs().get(0).scale());
    }
  }

  @Test
  void aModuleThatTheHeadersConfigurationLeavesOutIsListed() throws IOException {
    SafetensorsWriter writer = pair(pair(new SafetensorsWriter(), "transformer.m", 2), "blocks.0.m", 2)
        .metadata("lora_adapter_metadata", "{\"transformer.r\":2,\"transformer.lora_alpha\":6}");
    pair(writer, "text_encoder.m", 2);
    try (LoraAdapter adapter = LoraAdapter.open(writer.write(folder.resolve("x.safetensors")))) {
      assertEquals(List.of("text_encoder.m", "transformer.m"), adapter.pairs().stream().map(LoraPair::name).toList());
      assertEquals(List.of(1.0, 3.0), adapter.pairs().stream().map(LoraPair::scale).toList());
      assertEquals(2, adapter.unsupported().size());
      assertTrue(adapter.unsupported().get(0).why().contains("is for [transformer] alone"));
    }
  }

  @Test
  void fieldsOfLaterVersionsAreNotedIfTheyAreSet() throws IOException {
    peft(pair(new SafetensorsWriter(), PEFT + "m", 2),
        "\"r\":2,\"lora_alpha\":2,\"new_field\":7,\"other_field\":null,\"third\":false,\"fourth\":{}");
    try (LoraAdapter adapter = LoraAdapter.open(folder)) {
      assertEquals(1, adapter.notes().size(), adapter.notes().toString());
      assertTrue(adapter.notes().get(0).contains("new_field = 7 is not known"), adapter.notes().get(0));
    }
  }

  @Test
  void damagedHeaderMetadataIsRejected() throws IOException {
    for (String text : List.of("{", "[]", "{\"r\":2}", "{\"transformer.r\":2}", "")) {
      Path file = pair(new SafetensorsWriter(), "m", 2).metadata("lora_adapter_metadata", text)
          .write(folder.resolve("x.safetensors"));
      assertRejected(file, "lora_adapter_metadata");
    }
  }

  @Test
  void alphaIsPerModuleAndOfAnyType() throws IOException {
    SafetensorsWriter writer = new SafetensorsWriter();
    for (String module : List.of("a", "b", "c", "d", "e")) {
      writer.ramp("lora_unet_" + module + ".lora_down.weight", 1, 4, 3)
          .ramp("lora_unet_" + module + ".lora_up.weight", 1, 5, 4);
    }
    writer.floats("lora_unet_a.alpha", new long[0], 2)
        .bytes("lora_unet_b.alpha", "BF16", new long[] {1}, new byte[] {(byte) 0x80, 0x40})
        .bytes("lora_unet_c.alpha", "I64", new long[0], new byte[] {8, 0, 0, 0, 0, 0, 0, 0})
        .bytes("lora_unet_d.alpha", "F16", new long[0], new byte[] {0, 0x4c});
    try (LoraAdapter adapter = LoraAdapter.open(writer.write(folder.resolve("x.safetensors")))) {
      assertEquals(AdapterFormat.KOHYA, adapter.format());
      assertEquals(List.of(0.5, 1.0, 2.0, 4.0, 1.0), adapter.pairs().stream().map(LoraPair::scale).toList());
      assertEquals(List.of(3, 3, 3, 3, 2), adapter.pairs().stream().map(pair -> pair.keys().size()).toList());
    }
  }

  @Test
  void badAlphaIsListed() throws IOException {
    pair(new SafetensorsWriter(), "m", 2).floats("m.alpha", new long[0],
        Float.NaN).write(folder.resolve("x.safetensors"));
    assertUnsupported("m.alpha is NaN", 3);
    pair(new SafetensorsWriter(), "m", 2).floats("m.alpha", new long[0], Float.POSITIVE_INFINITY)
        .write(folder.resolve("x.safetensors"));
    assertUnsupported("m.alpha is Infinity", 3);
    pair(new SafetensorsWriter(), "m", 2).floats("m.alpha", new long[] {2}, 1,
        1).write(folder.resolve("x.safetensors"));
    assertUnsupported("m.alpha F32 [2] is no single number", 3);
  }

  @Test
  void anAlphaThatContradictsTheConfigurationIsListed() throws IOException {
    SafetensorsWriter writer = pair(new SafetensorsWriter(), "m", 2)
        .metadata("lora_adapter_metadata", "{\"r\":2,\"lora_alpha\":6}");
    writer.floats("m.alpha", new long[0], 5).write(folder.resolve("x.safetensors"));
    assertUnsupported("its alpha gives scale 2.5, the configuration 3.0", 3);
  }

  // ---- Names --------------------------------------------------------------------------------------------------------

  @ParameterizedTest
  @CsvSource({".lora_A.weight, .lora_B.weight", ".lora_A, .lora_B", ".lora_A.default.weight, .lora_B.default.weight",
      ".lora_down.weight, .lora_up.weight", ".lora.down.weight, .lora.up.weight",
      ".lora_linear_layer.down.weight, .lora_linear_layer.up.weight"})
  void spellingsOfAPair(String down, String up) throws IOException {
    Path file = new SafetensorsWriter().ramp("m" + down, 1, 2, 3).ramp("m" + up, 1, 4, 2)
        .write(folder.resolve("x.safetensors"));
    try (LoraAdapter adapter = LoraAdapter.open(file)) {
      LoraPair pair = adapter.pairs().get(0);
      assertEquals("m", pair.name());
      assertEquals(List.of(2, 3, 4), List.of(pair.rank(), pair.in(), pair.out()));
      assertNull(pair.bias());
    }
  }

  @ParameterizedTest
  @CsvSource({".dora_scale, DoRA magnitude of B's 5 rows", ".hada_w1_a, LoHa", ".hada_t2, LoHa",
      ".lokr_w1, LoKr", ".lokr_w2_b, LoKr", ".oft_blocks, OFT", ".oft_diag, OFT",
      ".diff, full weight difference", ".diff_b, bias difference", ".set_weight, replacement", ".w_norm, norm weights",
      ".b_norm, norm biases", ".reshape_weight, new shape", ".lora_mid.weight, Tucker", ".lora_embedding_A, embedding",
      ".base_layer.bias, base bias", ".weight, replacement of the base module's weight",
      ".bias, replacement of the base module's bias"})
  void whatIsNoPlainPairTakesItsModuleOut(String end, String what) throws IOException {
    Path file = pair(pair(new SafetensorsWriter(), "m", 2), "plain", 2).ramp("m" + end, 1, 4)
        .write(folder.resolve("x.safetensors"));
    try (LoraAdapter adapter = LoraAdapter.open(file)) {
      assertEquals(List.of("plain"), adapter.pairs().stream().map(LoraPair::name).toList());
      assertEquals(3, adapter.unsupported().size());
      for (UnsupportedKey key : adapter.unsupported()) {
        assertEquals("m", key.module());
        assertTrue(key.why().contains(what), key.toString());
      }
    }
  }

  @ParameterizedTest
  @CsvSource({"unet.a.attn1.processor.to_q_lora.down.weight, no up-projection (B)",
      "double_blocks.0.processor.qkv_lora3.down.weight, no name of a known", "m.lora_C.weight, no name of a known",
      "lora_te_something, no name of a known"})
  void unknownNamesAreListed(String key, String why) throws IOException {
    Path file = pair(new SafetensorsWriter(), "m", 2).ramp(key, 1, 4).write(folder.resolve("x.safetensors"));
    try (LoraAdapter adapter = LoraAdapter.open(file)) {
      assertEquals(1, adapter.pairs().size());
      assertEquals(key, adapter.unsupported().get(0).key());
      assertTrue(adapter.unsupported().get(0).why().contains(why), adapter.unsupported().toString());
    }
  }

  @Test
  void aModuleCalledProcessorIsAModule() throws IOException {
    Path file = pair(new SafetensorsWriter(), "vision.processor.fc", 2).write(folder.resolve("x.safetensors"));
    try (LoraAdapter adapter = LoraAdapter.open(file)) {
      assertEquals("vision.processor.fc", adapter.pairs().get(0).name());
    }
  }

  static Stream<Arguments> brokenPairs() {
    return Stream.of(
        Arguments.of("A alone", new SafetensorsWriter().ramp("m.lora_A.weight", 1, 2, 3), "no up-projection (B)", 1),
        Arguments.of("B alone", new SafetensorsWriter().ramp("m.lora_B.weight", 1, 2, 3), "no down-projection (A)", 1),
        Arguments.of("alpha alone", new SafetensorsWriter().ramp("m.alpha", 1), "no low-rank pair", 1),
        Arguments.of("ranks differ", new SafetensorsWriter().ramp("m.lora_A.weight", 1, 2, 3).ramp("m.lora_B.weight",
            1, 4, 3),
            "A has 2 rows, B 3 columns", 2),
        Arguments.of("rank 0", new SafetensorsWriter().ramp("m.lora_A.weight", 1, 0, 3).ramp("m.lora_B.weight", 1, 4,
            0),
            "is no matrix", 2),
        Arguments.of("a vector", new SafetensorsWriter().ramp("m.lora_A.weight", 1, 3).ramp("m.lora_B.weight", 1, 4, 1),
            "m.lora_A.weight F32 [3] is no matrix", 2),
        Arguments.of("3 x 3 convolution", new SafetensorsWriter().ramp("m.lora_A.weight", 1, 2, 3, 3, 3)
            .ramp("m.lora_B.weight", 1, 4, 2, 1, 1), "1 x 1 convolution", 2),
        Arguments.of("integers", new SafetensorsWriter().codes("m.lora_A.weight", 2, 3).ramp("m.lora_B.weight", 1, 4,
            2),
            "type I8, expected F32, F16 or BF16", 2),
        Arguments.of("short bias", pair(new SafetensorsWriter(), "m", 2).ramp("m.lora_B.bias", 1, 3), "B's 5 rows", 3),
        Arguments.of("two spellings", pair(new SafetensorsWriter(), "m", 2).ramp("m.lora_down.weight", 1, 2, 3),
            "m.lora_A.weight", 3));
  }

  @ParameterizedTest(name = "{0}")
  @MethodSource("brokenPairs")
  void brokenPairsAreListed(String what, SafetensorsWriter writer, String why, int keys) throws IOException {
    writer.write(folder.resolve("x.safetensors"));
    assertUnsupported(why, keys);
  }

  @Test
  void oneByOneConvolutionsAreMatrices() throws IOException {
    Path file = new SafetensorsWriter().ramp("m.lora_down.weight", 1, 2, 3, 1, 1).ramp("m.lora_up.weight", 1, 4, 2, 1,
        1)
        .write(folder.resolve("x.safetensors"));
    try (LoraAdapter adapter = LoraAdapter.open(file)) {
      assertEquals(List.of(2, 3, 4), List.of(adapter.pairs().get(0).rank(), adapter.pairs().get(0).in(),
          adapter.pairs().get(0).out()));
    }
  }

  // ---- Files --------------------------------------------------------------------------------------------------------

  @ParameterizedTest
  @ValueSource(strings = {"adapter_model.bin", "lora.pt", "lora.ckpt"})
  void picklesAreRefusedByName(String name) throws IOException {
    Path pickle = Files.write(folder.resolve(name), new byte[100]);
    assertEquals(Status.UNSUPPORTED, assertRejected(pickle, name, "pickle").status());
    Files.writeString(folder.resolve("adapter_config.json"), "{}");
    assertEquals(Status.UNSUPPORTED, assertRejected(folder, name, "pickle").status());
  }

  @Test
  void aFolderWithOneFileIsOpenedAndOthersAreNot() throws IOException {
    assertRejected(folder, "no safetensors file");
    pair(new SafetensorsWriter(), "m", 2).write(folder.resolve("pytorch_lora_weights.safetensors"));
    try (LoraAdapter adapter = LoraAdapter.open(folder)) {
      assertEquals(1, adapter.pairs().size());
    }
    pair(new SafetensorsWriter(), "m", 2).write(folder.resolve("other.safetensors"));
    assertRejected(folder, "2 safetensors files");
  }

  @Test
  void aBaseModelIsNoAdapter() {
    assertRejected(Fixtures.path("llama/base_bf16/model.safetensors"), "none of its", "named as part of an adapter");
  }

  @Test
  void anEmptyFileIsNoAdapter() throws IOException {
    assertRejected(new SafetensorsWriter().write(folder.resolve("x.safetensors")), "no tensors");
  }

  private static SafetensorsWriter pair(SafetensorsWriter writer, String module, int rank) {
    return writer.ramp(module + ".lora_A.weight", 1, rank, 3).ramp(module + ".lora_B.weight", 1, 5, rank);
  }

  private void peft(SafetensorsWriter writer, String fields) throws IOException {
    writer.write(folder.resolve("adapter_model.safetensors"));
    Files.writeString(folder.resolve("adapter_config.json"), "{\"peft_type\":\"LORA\",%s}".formatted(fields));
  }

  private void assertUnsupported(String why, int keys) throws IOException {
    try (LoraAdapter adapter = LoraAdapter.open(folder)) {
      assertEquals(List.of(), adapter.pairs());
      assertEquals(keys, adapter.unsupported().size());
      adapter.unsupported().forEach(key -> assertTrue(key.why().contains(why), key.toString()));
    }
  }

  private static FormatException assertRejected(Path path, String... messageParts) {
    FormatException e = assertThrows(FormatException.class, () -> LoraAdapter.open(path).close());
    for (String part : messageParts) {
      assertTrue(e.getMessage().contains(part), () -> "no \"" + part + "\" in: " + e.getMessage());
    }
    return e;
  }

  private static Arguments refused(String field, Status status, String... messageParts) {
    return Arguments.of(field, status, List.of(messageParts));
  }
}
