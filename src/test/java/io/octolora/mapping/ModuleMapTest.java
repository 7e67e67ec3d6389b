// SPDX-License-Identifier: Apache-2.0
package io.octolora.mapping;

import static org.junit.jupiter.api.Assertions.assertArrayEquals;
import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import io.octolora.Fixtures;
import io.octolora.OctoloraException;
import io.octolora.SafetensorsWriter;
import io.octolora.Status;
import io.octolora.adapter.LoraAdapter;
import io.octolora.checkpoint.Checkpoint;
import io.octolora.checkpoint.ElementType;
import io.octolora.mapping.MappingReport.Entry;
import java.io.IOException;
import java.nio.BufferOverflowException;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.file.Path;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.Set;
import java.util.stream.Stream;
import org.junit.jupiter.api.AfterAll;
import org.junit.jupiter.api.BeforeAll;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.io.TempDir;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.Arguments;
import org.junit.jupiter.params.provider.CsvSource;
import org.junit.jupiter.params.provider.MethodSource;
import org.junit.jupiter.params.provider.ValueSource;

/** The rules of names, shapes and splits, one by one; the base is a FLUX of width 128 unless a test makes its own. */
class ModuleMapTest {
  private static Checkpoint flux;

  @TempDir Path folder;

  @BeforeAll
  static void open() throws IOException {
    flux = Checkpoint.open(Fixtures.path("flux/base_bnb8"));
  }

  @AfterAll
  static void close() {
    flux.close();
  }

  // ---- Names --------------------------------------------------------------------------------------------------------

  /** Every line of FLUX's table, with the rows that the module takes of the original matrix. */
  static Stream<Arguments> originalNames() {
    return Stream.of(
        Arguments.of("img_in", 16, List.of("x_embedder")),
        Arguments.of("txt_in", 64, List.of("context_embedder")),
        Arguments.of("time_in.in_layer", 256, List.of("time_text_embed.timestep_embedder.linear_1")),
        Arguments.of("time_in.out_layer", 128, List.of("time_text_embed.timestep_embedder.linear_2")),
        Arguments.of("vector_in.in_layer", 32, List.of("time_text_embed.text_embedder.linear_1")),
        Arguments.of("vector_in.out_layer", 128, List.of("time_text_embed.text_embedder.linear_2")),
        Arguments.of("guidance_in.in_layer", 256, List.of("time_text_embed.guidance_embedder.linear_1")),
        Arguments.of("guidance_in.out_layer", 128, List.of("time_text_embed.guidance_embedder.linear_2")),
        Arguments.of("double_blocks.0.img_attn.qkv", 128, List.of("transformer_blocks.0.attn.to_q",
            "transformer_blocks.0.attn.to_k", "transformer_blocks.0.attn.to_v")),
        Arguments.of("double_blocks.0.img_attn.proj", 128, List.of("transformer_blocks.0.attn.to_out.0")),
        Arguments.of("double_blocks.0.img_mlp.0", 128, List.of("transformer_blocks.0.ff.net.0.proj")),
        Arguments.of("double_blocks.0.img_mlp.2", 512, List.of("transformer_blocks.0.ff.net.2")),
        Arguments.of("double_blocks.0.img_mod.lin", 128, List.of("transformer_blocks.0.norm1.linear")),
        Arguments.of("double_blocks.0.txt_attn.qkv", 128, List.of("transformer_blocks.0.attn.add_q_proj",
            "transformer_blocks.0.attn.add_k_proj", "transformer_blocks.0.attn.add_v_proj")),
        Arguments.of("double_blocks.0.txt_attn.proj", 128, List.of("transformer_blocks.0.attn.to_add_out")),
        Arguments.of("double_blocks.0.txt_mlp.0", 128, List.of("transformer_blocks.0.ff_context.net.0.proj")),
        Arguments.of("double_blocks.0.txt_mlp.2", 512, List.of("transformer_blocks.0.ff_context.net.2")),
        Arguments.of("double_blocks.0.txt_mod.lin", 128, List.of("transformer_blocks.0.norm1_context.linear")),
        Arguments.of("single_blocks.1.linear1", 128, List.of("single_transformer_blocks.1.attn.to_q",
            "single_transformer_blocks.1.attn.to_k", "single_transformer_blocks.1.attn.to_v",
            "single_transformer_blocks.1.proj_mlp")),
        Arguments.of("single_blocks.1.linear2", 640, List.of("single_transformer_blocks.1.proj_out")),
        Arguments.of("single_blocks.1.modulation.lin", 128, List.of("single_transformer_blocks.1.norm.linear")),
        Arguments.of("final_layer.linear", 128, List.of("proj_out")),
        Arguments.of("final_layer.adaLN_modulation.1", 128, List.of("norm_out.linear")));
  }

  @ParameterizedTest(name = "{0}")
  @MethodSource("originalNames")
  void originalFluxNamesWithEveryPrefix(String name, int in, List<String> modules) throws IOException {
    int out = modules.stream().mapToInt(module -> flux.linear(module).n()).sum();
    String flat = name.replace('.', '_');
    for (String spelled : List.of(name, "diffusion_model." + name, "model.diffusion_model." + name,
        "base_model.model." + name, "transformer." + name, "lora_unet_" + flat)) {
      SafetensorsWriter writer = new SafetensorsWriter().ramp(spelled + ".lora_A.weight", 1, 5, in)
          .ramp(spelled + ".lora_B.weight", 1, out, 5);
      if (spelled.startsWith("base_model.model.")) {
        writer.metadata("lora_adapter_metadata", "{\"r\":5,\"lora_alpha\":5}");
      }
      try (LoraAdapter adapter = adapter(writer)) {
        ModuleMap map = ModuleMap.of(flux, adapter);
        assertEquals(Set.copyOf(modules), Set.copyOf(map.modules()), spelled);
        int row = 0;
        for (String module : modules) {
          LoraDelta delta = map.delta(module);
          assertEquals(row, delta.b().firstRow());
          assertEquals(flux.linear(module).n(), delta.n());
          assertEquals(in, delta.k());
          assertEquals(5, delta.rank());
          row += delta.n();
        }
      }
    }
  }

  @Test
  void fluxTwoKeepsItsFusedMatrices() throws IOException {
    SafetensorsWriter base = new SafetensorsWriter();
    List<String> parts = List.of("double_stream_modulation_img.linear", "transformer_blocks.0.ff.linear_in",
        "transformer_blocks.0.ff_context.linear_out", "single_transformer_blocks.0.attn.to_qkv_mlp_proj",
        "single_transformer_blocks.0.attn.to_out", "time_guidance_embed.guidance_embedder.linear_2");
    List<String> names = List.of("double_stream_modulation_img.lin", "double_blocks.0.img_mlp.0",
        "double_blocks.0.txt_mlp.2", "single_blocks.0.linear1", "single_blocks.0.linear2", "guidance_in.out_layer");
    SafetensorsWriter lora = new SafetensorsWriter();
    for (int i = 0; i < parts.size(); i++) {
      base.bitsandbytes(parts.get(i), 7 + i, 3);
      pair(lora, "diffusion_model." + names.get(i), 2, 3, 7 + i);
    }
    try (Checkpoint checkpoint = checkpoint(base); LoraAdapter adapter = adapter(lora)) {
      assertEquals(Set.copyOf(parts), Set.copyOf(ModuleMap.of(checkpoint, adapter).modules()));
    }
  }

  @Test
  void anEndOfAPathIsNeverEnough() throws IOException {
    SafetensorsWriter base = new SafetensorsWriter().bitsandbytes("single_transformer_blocks.0.attn.to_q", 4, 3)
        .bitsandbytes("transformer_blocks.0.attn.to_q", 4, 3);
    try (Checkpoint checkpoint = checkpoint(base)) {
      for (String module : List.of("single_transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_q")) {
        for (String name : List.of(module, "transformer." + module, "lora_unet_" + module.replace('.', '_'),
            "lora_transformer_" + module.replace('.', '_'), "lycoris_" + module.replace('.', '_'))) {
          try (LoraAdapter adapter = adapter(pair(new SafetensorsWriter(), name, 2, 3, 4))) {
            assertEquals(Set.of(module), ModuleMap.of(checkpoint, adapter).modules(), name);
          }
        }
      }
      for (String name : List.of("blocks.0.attn.to_q", "attn.to_q", "to_q", "x.transformer_blocks.0.attn.to_q",
          "transformer.blocks.0.attn.to_q", "lora_unet_blocks_0_attn_to_q",
              "unet.transformer.transformer_blocks.0.attn.to_q",
          "transformer_blocks_0_attn_to_q", "lora_unet_transformer_blocks.0.attn.to_q",
              "Transformer_blocks.0.attn.to_q")) {
        try (LoraAdapter adapter = adapter(pair(new SafetensorsWriter(), name, 2, 3, 4))) {
          MappingException e = assertThrows(MappingException.class, () -> ModuleMap.lenient(checkpoint, adapter), name);
          assertTrue(e.getMessage().contains("the base has no such linear layer"), e.getMessage());
        }
      }
    }
  }

  @Test
  void theWrapperOfPeftIsStrippedOnceAndModelIsKept() throws IOException {
    SafetensorsWriter base = new SafetensorsWriter().bitsandbytes("model.layers.0.q_proj", 4, 3);
    try (Checkpoint checkpoint = checkpoint(base)) {
      String metadata = "{\"r\":2,\"lora_alpha\":2}";
      try (LoraAdapter adapter = adapter(pair(new SafetensorsWriter(), "base_model.model.model.layers.0.q_proj", 2, 3,
          4)
          .metadata("lora_adapter_metadata", metadata))) {
        assertEquals(Set.of("model.layers.0.q_proj"), ModuleMap.of(checkpoint, adapter).modules());
      }
      for (String name : List.of("base_model.model.layers.0.q_proj",
          "base_model.model.base_model.model.model.layers.0.q_proj",
          "base_model.model.layers.0.q_proj")) {
        try (LoraAdapter adapter = adapter(pair(new SafetensorsWriter(), name, 2, 3, 4)
            .metadata("lora_adapter_metadata", metadata))) {
          MappingException e = assertThrows(MappingException.class, () -> ModuleMap.of(checkpoint, adapter));
          assertEquals(List.of("model.layers.0.q_proj"), e.report().unmapped().get(0).nearest());
        }
      }
    }
  }

  @Test
  void aNameWithTwoMeaningsIsRefused() throws IOException {
    SafetensorsWriter base = new SafetensorsWriter().bitsandbytes("transformer.a", 4, 3).bitsandbytes("a", 4, 3)
        .bitsandbytes("x.y_z", 4, 3).bitsandbytes("x_y.z", 4, 3);
    try (Checkpoint checkpoint = checkpoint(base)) {
      for (String name : List.of("transformer.a", "lora_unet_x_y_z")) {
        try (LoraAdapter adapter = adapter(pair(new SafetensorsWriter(), name, 2, 3, 4))) {
          MappingException e = assertThrows(MappingException.class, () -> ModuleMap.of(checkpoint, adapter));
          assertTrue(e.report().unmapped().get(0).why().startsWith("it could be "), e.getMessage());
          assertEquals(2, e.report().unmapped().get(0).nearest().size());
        }
      }
      try (LoraAdapter adapter = adapter(pair(new SafetensorsWriter(), "a", 2, 3, 4))) {
        assertEquals(Set.of("a"), ModuleMap.of(checkpoint, adapter).modules());
      }
    }
  }

  @Test
  void namesAreReadAsTheCallerSays() throws IOException {
    SafetensorsWriter writer = pair(new SafetensorsWriter(), "my.blocks.0.fc", 2, 128, 16);
    writer.ramp("my.other.diff", 1, 2);
    try (LoraAdapter adapter = adapter(writer)) {
      Map<String, String> renames = new LinkedHashMap<>();
      renames.put("my.", "");
      renames.put("blocks.0.fc", "proj_out");
      renames.put("other", "x_embedder");
      ModuleMap map = ModuleMap.lenient(flux, adapter, renames);
      assertEquals(Set.of("proj_out"), map.modules());
      assertEquals(List.of(), map.report().notes());
      assertEquals("my.blocks.0.fc.lora_A.weight", map.report().entries().get(0).key(), "keys stay the file's");
      assertEquals(List.of("x_embedder"), entry(map, "my.other.diff").nearest());
      MappingException e = assertThrows(MappingException.class, () -> ModuleMap.of(flux, adapter, renames));
      assertEquals(1, e.report().unmapped().size());
      renames.remove("my.");
      renames.put("no such", "x");
      e = assertThrows(MappingException.class, () -> ModuleMap.lenient(flux, adapter, renames));
      assertEquals(List.of("rename no such=x: no name of this adapter has no such"), e.report().notes());
      assertThrows(OctoloraException.class, () -> ModuleMap.of(flux, adapter, Map.of("", "x")));
    }
  }

  /** The part that differs is told where the nearest module has the pair's shape and no other name needs that part. */
  @ParameterizedTest
  @CsvSource({"transformer_blocks.0.atn.to_q, 128, 128, --rename atn=attn",
      "transformer_blocks.0.attn.to_qq, 128, 128, --rename to_qq=to_q",
      "transformer_blocks.0.atn.to_q, 127, 128, --rename FROM=TO",
      "transformer_blocks.7.attn.to_q, 128, 128, --rename FROM=TO",
      "xproj_out, 128, 16, --rename FROM=TO"})
  void aLikelyNameIsTold(String name, int in, int out, String remedy) throws IOException {
    try (LoraAdapter adapter = adapter(pair(new SafetensorsWriter(), name, 2, in, out))) {
      MappingException e = assertThrows(MappingException.class, () -> ModuleMap.of(flux, adapter));
      for (Entry entry : e.report().unmapped()) {
        assertTrue(entry.remedy().startsWith(remedy + " "), entry.remedy());
      }
    }
    SafetensorsWriter both = pair(new SafetensorsWriter(), "transformer_blocks.0.to.to_q", 2, 128, 128);
    try (LoraAdapter adapter = adapter(pair(both, "transformer_blocks.0.attn.to_k", 2, 128, 128))) {
      Entry entry = assertThrows(MappingException.class, () -> ModuleMap.of(flux, adapter)).report().unmapped().get(0);
      assertTrue(entry.remedy().startsWith("--rename FROM=TO "), entry.remedy() + ": to_k has \"to\" too");
    }
  }

  @Test
  void oneModuleTakesOnePair() throws IOException {
    SafetensorsWriter writer = pair(pair(new SafetensorsWriter(), "proj_out", 2, 128, 16), "transformer.proj_out", 2,
        128, 16);
    try (LoraAdapter adapter = adapter(writer)) {
      MappingException e = assertThrows(MappingException.class, () -> ModuleMap.of(flux, adapter));
      assertEquals(2, e.report().unmapped().size());
      assertTrue(e.getMessage().contains("proj_out is also the place of proj_out"), e.getMessage());
    }
  }

  @Test
  void namesOfTheBaseComeBeforeOriginalNames() throws IOException {
    SafetensorsWriter base = new SafetensorsWriter().bitsandbytes("img_in", 4, 3).bitsandbytes("x_embedder", 4, 3);
    try (Checkpoint checkpoint = checkpoint(base);
        LoraAdapter adapter = adapter(pair(new SafetensorsWriter(), "img_in", 2, 3, 4))) {
      assertEquals(Set.of("img_in"), ModuleMap.of(checkpoint, adapter).modules());
    }
  }

  // ---- Shapes -------------------------------------------------------------------------------------------------------

  @ParameterizedTest
  @CsvSource({"proj_out, 127, 16, A takes 127 inputs; proj_out has 128",
      "proj_out, 128, 17, B gives 17 outputs; proj_out has 16",
      "double_blocks.0.img_attn.qkv, 128, 383, B gives 383 outputs; has 384",
      "double_blocks.0.img_attn.qkv, 64, 384, A takes 64 inputs; transformer_blocks.0.attn.to_q has 128",
      "x_embedder, 32, 128, A takes 32 inputs; x_embedder has 16"})
  void shapesThatDoNotFitAreListedWithTheirNumbers(String name, int in, int out, String why) throws IOException {
    try (LoraAdapter adapter = adapter(pair(new SafetensorsWriter(), name, 2, in, out))) {
      MappingException e = assertThrows(MappingException.class, () -> ModuleMap.lenient(flux, adapter));
      for (Entry entry : e.report().unmapped()) {
        for (String part : why.split("; ")) {
          assertTrue(entry.why().contains(part), entry.why());
        }
      }
      assertEquals(2, e.report().unmapped().size());
    }
  }

  @Test
  void ranksAboveTheLayersSidesAreFine() throws IOException {
    try (LoraAdapter adapter = adapter(pair(new SafetensorsWriter(), "proj_out", 300, 128, 16))) {
      assertEquals(300, ModuleMap.of(flux, adapter).delta("proj_out").rank());
    }
  }

  // ---- Splits -------------------------------------------------------------------------------------------------------

  /** B's rows of a diffusers module start half-way through the original's: (shift, scale) becomes (scale, shift). */
  @Test
  void finalModulationSwapsTheHalvesOfBAndBias() throws IOException {
    SafetensorsWriter writer = pair(new SafetensorsWriter(), "final_layer.adaLN_modulation.1", 3, 128, 256)
        .ramp("final_layer.adaLN_modulation.1.lora_B.bias", 1, 256);
    try (LoraAdapter adapter = adapter(writer)) {
      ModuleMap map = ModuleMap.of(flux, adapter);
      LoraDelta delta = map.delta("norm_out.linear");
      float[] b = delta.b().toFloats();
      float[] bias = delta.bias().toFloats();
      ByteBuffer copy = ByteBuffer.allocate((int) delta.b().byteSize()).order(ByteOrder.LITTLE_ENDIAN);
      delta.b().copyTo(copy);
      for (int row = 0; row < 256; row++) {
        int original = (row + 128) % 256;
        assertEquals(original, bias[row]);
        for (int r = 0; r < 3; r++) {
          assertEquals(original * 3 + r, b[row * 3 + r]);
          assertEquals(original * 3 + r, copy.getFloat((row * 3 + r) * 4));
        }
      }
      assertArrayEquals(adapter.pairs().get(0).a().toFloats(), delta.a().toFloats());
      assertTrue(map.report().entries().get(0).landings().get(0).halvesSwapped());
    }
  }

  @Test
  void theDiffusersNameOfTheSameModuleSwapsNothing() throws IOException {
    try (LoraAdapter adapter = adapter(pair(new SafetensorsWriter(), "norm_out.linear", 3, 128, 256))) {
      assertArrayEquals(adapter.pairs().get(0).b().toFloats(),
          ModuleMap.of(flux, adapter).delta("norm_out.linear").b().toFloats());
    }
  }

  @Test
  void anOddNumberOfRowsHasNoHalves() throws IOException {
    try (Checkpoint base = checkpoint(new SafetensorsWriter().bitsandbytes("norm_out.linear", 5, 3));
        LoraAdapter adapter = adapter(pair(new SafetensorsWriter(), "final_layer.adaLN_modulation.1", 2, 3, 5))) {
      MappingException e = assertThrows(MappingException.class, () -> ModuleMap.of(base, adapter));
      assertTrue(e.getMessage().contains("5 outputs have no halves"), e.getMessage());
    }
  }

  /** A rank that the parts divide is no evidence; zeros outside the blocks are. Minus zero is zero, NaN is not. */
  @ParameterizedTest
  @CsvSource({"6, 0, true", "6, -0.0, true", "6, 1e-45, false", "6, NaN, false", "7, 0, false", "3, 0, true"})
  void blocksOfRanksAreFoundByTheirZeros(int rank, float outside, boolean split) throws IOException {
    float[] b = new float[384 * rank];
    int block = Math.max(1, rank / 3);
    for (int row = 0; row < 384; row++) {
      for (int r = 0; r < rank; r++) {
        b[row * rank + r] = r / block == row / 128 ? row + 1 : 0;
      }
    }
    b[rank - 1] = outside; // row 0, last rank: outside the first block
    SafetensorsWriter writer = new SafetensorsWriter().ramp("double_blocks.0.img_attn.qkv.lora_A.weight", 1, rank, 128)
        .floats("double_blocks.0.img_attn.qkv.lora_B.weight", new long[] {384, rank}, b)
        .floats("double_blocks.0.img_attn.qkv.alpha", new long[0], 12);
    try (LoraAdapter adapter = adapter(writer)) {
      ModuleMap map = ModuleMap.of(flux, adapter);
      List<String> modules = List.of("transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k",
          "transformer_blocks.0.attn.to_v");
      for (int i = 0; i < 3; i++) {
        LoraDelta delta = map.delta(modules.get(i));
        assertEquals(split ? rank / 3 : rank, delta.rank());
        assertEquals(12.0 / rank, delta.scale(), "the scale is the whole pair's");
        assertEquals(split ? i * rank / 3 : 0, delta.a().firstRow());
        assertEquals(split ? i * rank / 3 : 0, delta.b().firstColumn());
        assertEquals(128 * i, delta.b().firstRow());
        assertEquals(128 * i + 1f, delta.b().toFloats()[split ? 0 : i * block]);
      }
    }
  }

  @Test
  void biasOfAFusedPairIsSplitByRows() throws IOException {
    SafetensorsWriter writer = pair(new SafetensorsWriter(), "single_blocks.0.linear1", 5, 128, 896)
        .ramp("single_blocks.0.linear1.lora_B.bias", 1, 896);
    try (LoraAdapter adapter = adapter(writer)) {
      ModuleMap map = ModuleMap.of(flux, adapter);
      float[] bias = map.delta("single_transformer_blocks.0.proj_mlp").bias().toFloats();
      assertEquals(512, bias.length);
      assertEquals(384, bias[0]);
      assertEquals(895, bias[511]);
    }
  }

  @Test
  void alphaOfJoinedPairsIsNotedWhereItWasMeantForOne() throws IOException {
    for (String alpha : List.of("2.0", "6.0")) {
      SafetensorsWriter writer = new SafetensorsWriter()
          .ramp("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", 1, 6, 128)
          .ramp("lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight", 0, 384, 6)
          .floats("lora_unet_double_blocks_0_img_attn_qkv.alpha", new long[0], Float.parseFloat(alpha));
      String entries = "{\"ss_network_dim\":\"2\",\"ss_network_alpha\":\"2.0\"}";
      Path file = writer.write(folder.resolve("plain.safetensors"));
      Path marked = withMetadata(file, entries);
      try (LoraAdapter adapter = LoraAdapter.open(marked)) {
        ModuleMap map = ModuleMap.of(flux, adapter);
        assertEquals(alpha.equals("2.0") ? 1 : 0, map.report().notes().size(), map.report().notes().toString());
        assertEquals(Double.parseDouble(alpha) / 6, map.delta("transformer_blocks.0.attn.to_q").scale());
      }
    }
  }

  // ---- Strict, lenient, nothing at all ------------------------------------------------------------------------------

  @Test
  void strictListsEverythingAndLenientReturnsTheSameList() throws IOException {
    SafetensorsWriter writer = pair(new SafetensorsWriter(), "transformer.proj_out", 2, 128, 16);
    pair(writer, "transformer.transformer_blocks.0.attn.to_qq", 2, 128, 128);
    pair(writer, "text_encoder.text_model.encoder.layers.0.mlp.fc1", 2, 8, 8);
    writer.ramp("transformer.x_embedder.lora_A.weight", 1, 2, 16)
        .ramp("transformer.x_embedder.lora_B.weight", 1, 128, 2).ramp("transformer.x_embedder.dora_scale", 1, 1, 16);
    try (LoraAdapter adapter = adapter(writer)) {
      MappingException e = assertThrows(MappingException.class, () -> ModuleMap.of(flux, adapter));
      assertEquals(Status.INVALID_ARGUMENT, e.status());
      assertTrue(e.getMessage().startsWith("7 of 9 tensors of " + adapter.path()), e.getMessage());
      ModuleMap map = ModuleMap.lenient(flux, adapter);
      assertEquals(e.report(), map.report());
      assertEquals(Set.of("proj_out"), map.modules());
      assertEquals(9, map.report().entries().size());
      assertEquals(7, map.report().unmapped().size());
      for (Entry entry : map.report().unmapped()) {
        assertTrue(e.getMessage().contains("\n  " + entry.key() + ": " + entry.why()), entry.key());
      }
      Entry misspelled = entry(map, "transformer.transformer_blocks.0.attn.to_qq.lora_A.weight");
      assertEquals("transformer_blocks.0.attn.to_q", misspelled.nearest().get(0));
      assertEquals(3, misspelled.nearest().size());
      Entry dora = entry(map, "transformer.x_embedder.lora_A.weight");
      assertTrue(dora.why().contains("is a DoRA magnitude of W's columns"), dora.why());
      assertEquals(List.of("x_embedder"), dora.nearest());
      assertEquals(List.of(), entry(map, "transformer.proj_out.lora_A.weight").nearest());
    }
  }

  @Test
  void nothingMatchedIsAnErrorEvenWhenLenient() throws IOException {
    SafetensorsWriter writer = new SafetensorsWriter();
    for (int i = 0; i < 300; i++) {
      pair(writer, "lora_unet_input_blocks_%d_1_transformer_blocks_0_attn1_to_q".formatted(i), 2, 4, 4);
    }
    try (LoraAdapter adapter = adapter(writer)) {
      MappingException e = assertThrows(MappingException.class, () -> ModuleMap.lenient(flux, adapter));
      assertTrue(e.getMessage().startsWith("none of the 600 tensors of "), e.getMessage().substring(0, 80));
      assertEquals(600, e.report().unmapped().size());
    }
  }

  @Test
  void unknownAndUnchangedModulesAreTold() throws IOException {
    try (LoraAdapter adapter = adapter(pair(new SafetensorsWriter(), "proj_out", 2, 128, 16))) {
      ModuleMap map = ModuleMap.of(flux, adapter);
      assertEquals(List.of(), map.deltas("x_embedder"));
      OctoloraException unchanged = assertThrows(OctoloraException.class, () -> map.delta("x_embedder"));
      assertTrue(unchanged.getMessage().contains("does not change x_embedder; nearest that it changes: proj_out"),
          unchanged.getMessage());
      assertThrows(OctoloraException.class, () -> map.deltas("nothing"));
      assertThrows(OctoloraException.class, () -> map.delta("nothing"));
    }
  }

  // ---- Factors ------------------------------------------------------------------------------------------------------

  @ParameterizedTest
  @ValueSource(strings = {"F16", "BF16", "F32"})
  void copiesKeepTheTypeAndAreDense(String type) throws IOException {
    int width = ElementType.valueOf(type).bits() / 8;
    byte[] b = new byte[384 * 6 * width];
    for (int row = 0; row < 384; row++) {
      for (int r = 2 * (row / 128); r < 2 * (row / 128) + 2; r++) {
        for (int i = 0; i < width; i++) {
          b[(row * 6 + r) * width + i] = (byte) (1 + (row * 6 + r) * width + i & 0x3f);
        }
      }
    }
    SafetensorsWriter writer = new SafetensorsWriter()
        .bytes("double_blocks.0.img_attn.qkv.lora_A.weight", type, new long[] {6, 128}, new byte[6 * 128 * width])
        .bytes("double_blocks.0.img_attn.qkv.lora_B.weight", type, new long[] {384, 6}, b);
    try (LoraAdapter adapter = adapter(writer)) {
      Factor factor = ModuleMap.of(flux, adapter).delta("transformer_blocks.0.attn.to_k").b();
      assertEquals(ElementType.valueOf(type), factor.type());
      assertEquals(128 * 2 * width, factor.byteSize());
      ByteBuffer copy = ByteBuffer.allocate(128 * 2 * width + 3);
      copy.position(2);
      factor.copyTo(copy);
      assertEquals(1, copy.remaining());
      for (int row = 0; row < 128; row++) {
        for (int i = 0; i < 2 * width; i++) {
          assertEquals(b[((128 + row) * 6 + 2) * width + i], copy.get(2 + row * 2 * width + i));
        }
      }
      assertThrows(BufferOverflowException.class, () -> factor.copyTo(ByteBuffer.allocate(128 * 2 * width - 1)));
      assertTrue(factor.toString().endsWith("rows 128..256 columns 2..4"), factor.toString());
    }
  }

  @Test
  void oneByOneConvolutionsLandOnLinears() throws IOException {
    SafetensorsWriter writer = new SafetensorsWriter().ramp("proj_out.lora_down.weight", 1, 2, 128, 1, 1)
        .ramp("proj_out.lora_up.weight", 1, 16, 2, 1, 1);
    try (LoraAdapter adapter = adapter(writer)) {
      LoraDelta delta = ModuleMap.of(flux, adapter).delta("proj_out");
      assertEquals(List.of(2, 128, 16), List.of(delta.rank(), delta.k(), delta.n()));
      assertEquals(255, delta.a().toFloats()[255]);
    }
  }

  @Test
  void factorsOfAClosedAdapterDoNotRead() throws IOException {
    LoraDelta delta;
    try (LoraAdapter adapter = adapter(pair(new SafetensorsWriter(), "proj_out", 2, 128, 16))) {
      delta = ModuleMap.of(flux, adapter).delta("proj_out");
    }
    assertThrows(IllegalStateException.class, () -> delta.a().toFloats());
  }

  private static Entry entry(ModuleMap map, String key) {
    return map.report().entries().stream().filter(entry -> entry.key().equals(key)).findFirst().orElseThrow();
  }

  private static SafetensorsWriter pair(SafetensorsWriter writer, String name, int rank, int in, int out) {
    return writer.ramp(name + ".lora_A.weight", 1, rank, in).ramp(name + ".lora_B.weight", 1, out, rank);
  }

  private LoraAdapter adapter(SafetensorsWriter writer) throws IOException {
    return LoraAdapter.open(writer.write(folder.resolve("lora.safetensors")));
  }

  private Checkpoint checkpoint(SafetensorsWriter writer) throws IOException {
    return Checkpoint.open(writer.write(folder.resolve("model.safetensors")));
  }

  /** The same file with this JSON as __metadata__. */
  private Path withMetadata(Path file, String json) throws IOException {
    ByteBuffer bytes = ByteBuffer.wrap(java.nio.file.Files.readAllBytes(file)).order(ByteOrder.LITTLE_ENDIAN);
    byte[] header = new byte[(int) bytes.getLong()];
    bytes.get(header);
    byte[] data = new byte[bytes.remaining()];
    bytes.get(data);
    return SafetensorsWriter.raw(folder.resolve("marked.safetensors"),
        "{\"__metadata__\":" + json + "," + new String(header).substring(1), data);
  }
}
