// SPDX-License-Identifier: Apache-2.0
package io.octolora.mapping;

import static org.junit.jupiter.api.Assertions.assertArrayEquals;
import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertFalse;
import static org.junit.jupiter.api.Assertions.assertNull;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import io.octolora.ArabicDigits;
import io.octolora.FormatException;
import io.octolora.SafetensorsWriter;
import io.octolora.adapter.AdapterFormat;
import io.octolora.adapter.LoraAdapter;
import io.octolora.checkpoint.Checkpoint;
import io.octolora.checkpoint.ElementType;
import io.octolora.mapping.MappingReport.Entry;
import io.octolora.mapping.MappingReport.Landing;
import io.octolora.runtime.Device;
import io.octolora.runtime.Int8Linear;
import java.io.IOException;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.file.Path;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.Random;
import java.util.Set;
import java.util.stream.Stream;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.io.TempDir;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.Arguments;
import org.junit.jupiter.params.provider.CsvSource;
import org.junit.jupiter.params.provider.MethodSource;
import org.junit.jupiter.params.provider.ValueSource;

/**
 * Families of names and layers that are stored together. No files of these tools are among the fixtures: they are
 * written here under the names that the tools' sources use. What a delta must be is worked out from {@code s·B·A} in
 * double arithmetic; all numbers are small integers and scales powers of two, so that every sum is exact.
 */
class AdapterFamiliesTest {
  private final Random random = new Random(7);
  /** By the name of a pair: {@code B·A}, [out, in]. */
  private final Map<String, double[]> products = new LinkedHashMap<>();

  @TempDir Path folder;

  // ---- XLabs --------------------------------------------------------------------------------------------------------

  /** h = 4: the fused rows of a processor are those of q, k and v; 1 is the image's, 2 the text's. */
  static Stream<Arguments> xlabs() {
    String block = "transformer_blocks.0.attn.";
    String single = "single_transformer_blocks.0.";
    return Stream.of(
        Arguments.of("double_blocks.0.processor.qkv_lora1", 4, 12,
            List.of(block + "to_q", block + "to_k", block + "to_v")),
        Arguments.of("double_blocks.0.processor.qkv_lora2", 4, 12,
            List.of(block + "add_q_proj", block + "add_k_proj", block + "add_v_proj")),
        Arguments.of("double_blocks.0.processor.proj_lora1", 4, 4, List.of(block + "to_out.0")),
        Arguments.of("double_blocks.0.processor.proj_lora2", 4, 4, List.of(block + "to_add_out")),
        Arguments.of("single_blocks.0.processor.qkv_lora", 4, 12,
            List.of(single + "attn.to_q", single + "attn.to_k", single + "attn.to_v")),
        Arguments.of("single_blocks.0.processor.proj_lora", 20, 4, List.of(single + "proj_out")));
  }

  @ParameterizedTest(name = "{0}")
  @MethodSource("xlabs")
  void processorsOfXlabsLandOnTheLayersTheyReplace(String name, int in, int out, List<String> modules)
      throws IOException {
    for (String prefix : List.of("", "diffusion_model.")) {
      try (Checkpoint base = checkpoint(diffusersFlux());
          LoraAdapter adapter = adapter(pair(new SafetensorsWriter(), prefix + name, ".down.weight", ".up.weight", 3,
              in, out))) {
        assertEquals(AdapterFormat.XLABS, adapter.format());
        ModuleMap map = ModuleMap.of(base, adapter);
        assertEquals(Set.copyOf(modules), map.modules());
        int row = 0;
        for (String module : modules) {
          assertDelta(map, module, prefix + name, 1, row);
          row += map.delta(module).n();
        }
      }
    }
  }

  /** A base with FLUX's original names, as ComfyUI's are: a processor is the first 3h rows of linear1. */
  @Test
  void processorsOfXlabsLandOnOriginalNamesToo() throws IOException {
    SafetensorsWriter writer = new SafetensorsWriter();
    pair(writer, "single_blocks.0.processor.qkv_lora", ".down.weight", ".up.weight", 3, 4, 12);
    pair(writer, "double_blocks.0.processor.qkv_lora2", ".down.weight", ".up.weight", 2, 4, 12);
    try (Checkpoint base = checkpoint(originalFlux("")); LoraAdapter adapter = adapter(writer)) {
      ModuleMap map = ModuleMap.of(base, adapter);
      assertEquals(Set.of("single_blocks.0.linear1", "double_blocks.0.txt_attn.qkv"), map.modules());
      double[] want = new double[28 * 4];
      System.arraycopy(products.get("single_blocks.0.processor.qkv_lora"), 0, want, 0, 12 * 4);
      assertArrayEquals(want, RealAdaptersTest.deltaWeight(map.delta("single_blocks.0.linear1")));
      assertDelta(map, "double_blocks.0.txt_attn.qkv", "double_blocks.0.processor.qkv_lora2", 1, 0);
    }
  }

  // ---- Early diffusers ----------------------------------------------------------------------------------------------

  @ParameterizedTest
  @CsvSource({
      "a.attn1.processor.to_q_lora, .down.weight, .up.weight, a.attn1.to_q",
      "a.attn1.processor.to_k_lora, .down.weight, .up.weight, a.attn1.to_k",
      "a.attn1.processor.to_v_lora, .down.weight, .up.weight, a.attn1.to_v",
      "a.attn1.processor.to_out_lora, .down.weight, .up.weight, a.attn1.to_out.0",
      "unet.a.attn1.processor.to_q_lora, .down.weight, .up.weight, a.attn1.to_q",
      "unet.a.proj_in, .lora.down.weight, .lora.up.weight, a.proj_in",
      "text_encoder.text_model.layers.0.self_attn.to_q_lora, .down.weight, .up.weight, "
          + "text_model.layers.0.self_attn.q_proj",
      "text_encoder.text_model.layers.0.self_attn.to_out_lora, .down.weight, .up.weight, "
          + "text_model.layers.0.self_attn.out_proj",
      "text_encoder.text_model.layers.0.self_attn.k_proj, .lora_linear_layer.down.weight, "
          + ".lora_linear_layer.up.weight, text_model.layers.0.self_attn.k_proj",
      "text_projection, .lora.down.weight, .lora.up.weight, text_projection"})
  void namesOfEarlyDiffusers(String name, String down, String up, String module) throws IOException {
    SafetensorsWriter base = new SafetensorsWriter();
    for (String each : List.of("a.attn1.to_q", "a.attn1.to_k", "a.attn1.to_v", "a.attn1.to_out.0", "a.proj_in",
        "text_model.layers.0.self_attn.q_proj", "text_model.layers.0.self_attn.k_proj",
        "text_model.layers.0.self_attn.v_proj", "text_model.layers.0.self_attn.out_proj", "text_projection")) {
      base.bitsandbytes(each, 5, 6);
    }
    try (Checkpoint checkpoint = checkpoint(base);
        LoraAdapter adapter = adapter(pair(new SafetensorsWriter(), name, down, up, 2, 6, 5))) {
      assertEquals(AdapterFormat.OLD_DIFFUSERS, adapter.format());
      assertTrue(adapter.recognition().startsWith("early diffusers: 2 of 2 keys are named like " + name),
          adapter.recognition());
      ModuleMap map = ModuleMap.of(checkpoint, adapter);
      assertEquals(Set.of(module), map.modules());
      assertDelta(map, module, name, 1, 0);
    }
  }

  /** Paths of diffusers with the early suffixes, and alpha beside them as community files have it. */
  @Test
  void earlySuffixesWithAlpha() throws IOException {
    String name = "transformer.transformer_blocks.0.attn.to_q";
    SafetensorsWriter writer = pair(new SafetensorsWriter(), name, ".lora.down.weight", ".lora.up.weight", 2, 4, 4)
        .floats(name + ".alpha", new long[0], 1);
    try (Checkpoint base = checkpoint(diffusersFlux()); LoraAdapter adapter = adapter(writer)) {
      assertEquals(AdapterFormat.OLD_DIFFUSERS, adapter.format());
      assertDelta(ModuleMap.of(base, adapter), "transformer_blocks.0.attn.to_q", name, 0.5, 0);
    }
  }

  // ---- Flattened names ----------------------------------------------------------------------------------------------

  @ParameterizedTest
  @CsvSource({"lora_transformer_, ONETRAINER", "lycoris_, LYCORIS", "lora_unet_, KOHYA"})
  void flattenedDiffusersPathsWithAlpha(String prefix, AdapterFormat format) throws IOException {
    String name = prefix + "single_transformer_blocks_0_attn_to_q";
    try (Checkpoint base = checkpoint(diffusersFlux());
        LoraAdapter adapter = adapter(kohya(name, 4, 4, 4).floats(name + ".alpha", new long[0], 2))) {
      assertEquals(format, adapter.format());
      assertDelta(ModuleMap.of(base, adapter), "single_transformer_blocks.0.attn.to_q", name, 0.5, 0);
    }
  }

  /** sd-scripts and OneTrainer name text encoders alike. */
  @ParameterizedTest
  @CsvSource({"lora_transformer_, ONETRAINER", "lora_unet_, KOHYA"})
  void textEncodersBelongToEitherFamily(String prefix, AdapterFormat format) throws IOException {
    SafetensorsWriter writer = kohya(prefix + "single_transformer_blocks_0_attn_to_q", 4, 4, 4);
    kohya(writer, "lora_te1_text_model_q_proj", 2, 6, 5);
    try (Checkpoint base = checkpoint(diffusersFlux()); LoraAdapter adapter = adapter(writer)) {
      assertEquals(format, adapter.format());
      List<Entry> unmapped = ModuleMap.lenient(base, adapter).report().unmapped();
      assertEquals(2, unmapped.size());
      assertTrue(unmapped.get(0).remedy().startsWith("it is a text encoder's"), unmapped.get(0).remedy());
    }
  }

  /** Original names of the SDXL UNet, as sd-scripts flattens them, beside those of diffusers. */
  @ParameterizedTest
  @CsvSource({
      "input_blocks_4_1_transformer_blocks_0_attn1_to_q, down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
      "input_blocks_5_1_proj_in, down_blocks.1.attentions.1.proj_in",
      "input_blocks_7_1_transformer_blocks_9_ff_net_0_proj, "
          + "down_blocks.2.attentions.0.transformer_blocks.9.ff.net.0.proj",
      "input_blocks_8_1_proj_out, down_blocks.2.attentions.1.proj_out",
      "input_blocks_1_0_emb_layers_1, down_blocks.0.resnets.0.time_emb_proj",
      "input_blocks_5_0_emb_layers_1, down_blocks.1.resnets.1.time_emb_proj",
      "middle_block_0_emb_layers_1, mid_block.resnets.0.time_emb_proj",
      "middle_block_1_transformer_blocks_3_attn2_to_k, mid_block.attentions.0.transformer_blocks.3.attn2.to_k",
      "middle_block_2_emb_layers_1, mid_block.resnets.1.time_emb_proj",
      "output_blocks_0_1_transformer_blocks_0_attn1_to_out_0, "
          + "up_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0",
      "output_blocks_2_1_proj_in, up_blocks.0.attentions.2.proj_in",
      "output_blocks_3_1_proj_in, up_blocks.1.attentions.0.proj_in",
      "output_blocks_8_0_emb_layers_1, up_blocks.2.resnets.2.time_emb_proj",
      "time_embed_0, time_embedding.linear_1", "time_embed_2, time_embedding.linear_2",
      "label_emb_0_0, add_embedding.linear_1", "label_emb_0_2, add_embedding.linear_2"})
  void originalNamesOfSdxl(String flat, String module) throws IOException {
    for (String name : List.of("lora_unet_" + flat, "lora_unet_" + module.replace('.', '_'))) {
      try (Checkpoint base = checkpoint(new SafetensorsWriter().bitsandbytes(module, 5, 6));
          LoraAdapter adapter = adapter(kohya(name, 2, 6, 5).floats(name + ".alpha", new long[0], 1));
          ArabicDigits egypt = new ArabicDigits()) {
        assertEquals(AdapterFormat.KOHYA, adapter.format());
        assertDelta(ModuleMap.of(base, adapter), module, name, 0.5, 0);
      }
    }
  }

  /** A neighbouring block's name is not taken for another's. */
  @ParameterizedTest
  @ValueSource(strings = {"input_blocks_3_1_proj_in", "input_blocks_4_0_proj_in", "output_blocks_4_1_proj_in",
      "middle_block_1_proj_in"})
  void otherBlocksOfSdxlAreNotFound(String flat) throws IOException {
    try (Checkpoint base = checkpoint(new SafetensorsWriter().bitsandbytes("down_blocks.1.attentions.0.proj_in", 5, 6));
        LoraAdapter adapter = adapter(kohya("lora_unet_" + flat, 2, 6, 5))) {
      assertThrows(MappingException.class, () -> ModuleMap.lenient(base, adapter));
    }
  }

  // ---- Layers that the base stores as one ---------------------------------------------------------------------------

  /** Queries have 8 rows, keys and values 4: what is missing is zero, whichever of the three it is. */
  @ParameterizedTest
  @CsvSource({"qkv, 1, 1, 1", "qk, 1, 1, 1", "qv, 2, 2, 2", "kv, 1, 1, 1", "q, 1, 1, 1", "k, 4, 4, 4", "v, 1, 1, 1",
      "qkv, 1, 2, 0.5", "kv, 1, 2, -4"})
  void partsOnAFusedMatrix(String parts, double q, double k, double v) throws IOException {
    SafetensorsWriter writer = new SafetensorsWriter();
    Map<Character, Double> scales = Map.of('q', q, 'k', k, 'v', v);
    double[] want = new double[16 * 6];
    int ranks = 0;
    for (char part : parts.toCharArray()) {
      String name = "model.layers.0.self_attn." + part + "_proj";
      int rank = part == 'q' ? 3 : 2;
      kohya(writer, name, rank, 6, part == 'q' ? 8 : 4)
          .floats(name + ".alpha", new long[0], (float) (rank * scales.get(part)));
      ranks += rank;
      double[] product = products.get(name);
      for (int i = 0; i < product.length; i++) {
        want[(part == 'q' ? 0 : part == 'k' ? 8 * 6 : 12 * 6) + i] = scales.get(part) * product[i];
      }
    }
    try (Checkpoint base = checkpoint(new SafetensorsWriter().bitsandbytes("model.layers.0.self_attn.qkv_proj", 16, 6));
        LoraAdapter adapter = adapter(writer)) {
      ModuleMap map = ModuleMap.of(base, adapter);
      LoraDelta delta = map.delta("model.layers.0.self_attn.qkv_proj");
      assertEquals(ranks, delta.rank());
      assertArrayEquals(want, RealAdaptersTest.deltaWeight(delta));
      boolean equal = parts.chars().mapToDouble(part -> scales.get((char) part)).distinct().count() == 1;
      assertEquals(equal ? scales.get(parts.charAt(0)) : 1, delta.scale(), "equal scales stay apart");
      for (Entry entry : map.report().entries()) {
        Landing landing = entry.landings().get(0);
        assertEquals(entry.key().contains("q_proj") ? 0 : entry.key().contains("k_proj") ? 8 : 12,
            landing.moduleRow());
      }
    }
  }

  /** Half of them missing, their biases, and the layer itself on a device: y is exact. */
  @Test
  void aJoinedDeltaRuns() throws IOException {
    SafetensorsWriter writer = new SafetensorsWriter();
    pair(writer, "m.up_proj", ".lora_A.weight", ".lora_B.weight", 2, 6, 5);
    writer.ramp("m.up_proj.lora_B.bias", 1, 5);
    SafetensorsWriter zeros = new SafetensorsWriter().bytes("m.gate_up_proj.weight._data", "I8", new long[] {10, 6},
        new byte[60]).ramp("m.gate_up_proj.weight._scale", 1, 10, 1);
    try (Checkpoint base = checkpoint(zeros); LoraAdapter adapter = adapter(writer); Device cpu = Device.cpu();
        Int8Linear layer = cpu.load(base.linear("m.gate_up_proj"))) {
      layer.attach(ModuleMap.of(base, adapter).delta("m.gate_up_proj"), 1);
      float[] x = {1, -2, 3, 0, 1, 2};
      float[] y = layer.forward(x, 1);
      for (int row = 0; row < 10; row++) {
        double want = row < 5 ? 0 : row - 5;
        for (int i = 0; row >= 5 && i < 6; i++) {
          want += products.get("m.up_proj")[(row - 5) * 6 + i] * x[i];
        }
        assertEquals(want, y[row]);
      }
    }
  }

  /** Lengths of rows: each row of a joined matrix has one, or none has. */
  @Test
  void magnitudesOfJoinedPairs() throws IOException {
    SafetensorsWriter both = new SafetensorsWriter();
    for (String module : List.of("m.gate_proj", "m.up_proj")) {
      pair(both, module, ".lora_A.weight", ".lora_B.weight", 2, 6, 5);
      both.ramp(module + ".dora_scale", module.equals("m.up_proj") ? 2 : 1, 5, 1)
          .floats(module + ".alpha", new long[0], module.equals("m.up_proj") ? 6 : 3); // so that B is scaled
    }
    SafetensorsWriter one = new SafetensorsWriter();
    pair(one, "m.up_proj", ".lora_A.weight", ".lora_B.weight", 2, 6, 5);
    one.ramp("m.up_proj.dora_scale", 1, 5, 1);
    try (Checkpoint base = checkpoint(new SafetensorsWriter().bitsandbytes("m.gate_up_proj", 10, 6));
        LoraAdapter adapter = adapter(both)) {
      assertArrayEquals(new float[] {0, 1, 2, 3, 4, 0, 2, 4, 6, 8},
          ModuleMap.of(base, adapter).delta("m.gate_up_proj").magnitude().toFloats());
    }
    try (Checkpoint base = checkpoint(new SafetensorsWriter().bitsandbytes("m.gate_up_proj", 10, 6));
        LoraAdapter adapter = adapter(one)) {
      MappingException refused = assertThrows(MappingException.class, () -> ModuleMap.of(base, adapter));
      assertTrue(refused.getMessage().contains("a DoRA magnitude is needed for all 10 rows of m.gate_up_proj or for "
          + "none: 1 of 1 pairs have one, for 5 rows in all"), refused.getMessage());
    }
  }

  /** FLUX's fused qkv with one length a row, on the parts. */
  @Test
  void magnitudesOfAFusedPair() throws IOException {
    SafetensorsWriter fused = new SafetensorsWriter();
    pair(fused, "double_blocks.0.img_attn.qkv", ".lora_A.weight", ".lora_B.weight", 2, 6, 12);
    fused.ramp("double_blocks.0.img_attn.qkv.dora_scale", 1, 12, 1);
    SafetensorsWriter parts = new SafetensorsWriter();
    for (String part : List.of("q", "k", "v")) {
      parts.bitsandbytes("transformer_blocks.0.attn.to_" + part, 4, 6);
    }
    try (Checkpoint base = checkpoint(parts); LoraAdapter adapter = adapter(fused)) {
      ModuleMap map = ModuleMap.of(base, adapter);
      assertArrayEquals(new float[] {4, 5, 6, 7},
          map.delta("transformer_blocks.0.attn.to_k").magnitude().toFloats());
      assertArrayEquals(new float[] {8, 9, 10, 11},
          map.delta("transformer_blocks.0.attn.to_v").magnitude().toFloats());
    }
  }

  @Test
  void oneSharedAStaysOne() throws IOException {
    float[] a = numbers(2 * 6);
    SafetensorsWriter writer = new SafetensorsWriter();
    float[][] b = {numbers(5 * 2), numbers(5 * 2)};
    for (int i = 0; i < 2; i++) {
      String name = i == 0 ? "m.gate_proj" : "m.up_proj";
      writer.floats(name + ".lora_A.weight", new long[] {2, 6}, a)
          .floats(name + ".lora_B.weight", new long[] {5, 2}, b[i]);
    }
    try (Checkpoint base = checkpoint(new SafetensorsWriter().bitsandbytes("m.gate_up_proj", 10, 6));
        LoraAdapter adapter = adapter(writer)) {
      LoraDelta delta = ModuleMap.of(base, adapter).delta("m.gate_up_proj");
      assertEquals(2, delta.rank());
      assertArrayEquals(a, delta.a().toFloats());
      float[] both = new float[20];
      System.arraycopy(b[0], 0, both, 0, 10);
      System.arraycopy(b[1], 0, both, 10, 10);
      assertArrayEquals(both, delta.b().toFloats());
    }
  }

  /** Types are kept where they agree and widened where not; 0x3c00 is 1 in F16, 0x3f80 in BF16. */
  @ParameterizedTest
  @CsvSource({"F16, F16, F16", "BF16, BF16, BF16", "F16, BF16, F32", "F32, F16, F32"})
  void typesOfJoinedPairs(ElementType gate, ElementType up, ElementType joined) throws IOException {
    SafetensorsWriter writer = new SafetensorsWriter();
    for (Map.Entry<String, ElementType> each : Map.of("m.gate_proj", gate, "m.up_proj", up).entrySet()) {
      writer.floats(each.getKey() + ".alpha", new long[0], each.getKey().equals("m.up_proj") ? 6 : 3);
      int rank = each.getKey().equals("m.up_proj") ? 2 : 1; // unlike A's
      writer.bytes(each.getKey() + ".lora_A.weight", each.getValue().name(), new long[] {rank, 6},
          ones(each.getValue(), rank * 6));
      writer.bytes(each.getKey() + ".lora_B.weight", each.getValue().name(), new long[] {5, rank},
          ones(each.getValue(), 5 * rank));
    }
    try (Checkpoint base = checkpoint(new SafetensorsWriter().bitsandbytes("m.gate_up_proj", 10, 6));
        LoraAdapter adapter = adapter(writer)) {
      LoraDelta delta = ModuleMap.of(base, adapter).delta("m.gate_up_proj");
      assertEquals(List.of(joined, joined), List.of(delta.a().type(), delta.b().type()));
      ByteBuffer copy = ByteBuffer.allocate((int) delta.b().byteSize()).order(ByteOrder.LITTLE_ENDIAN);
      delta.b().copyTo(copy);
      assertFalse(copy.hasRemaining());
      double[] weight = RealAdaptersTest.deltaWeight(delta);
      for (int i = 0; i < 60; i++) {
        assertEquals(i < 30 ? 3 : 6, weight[i]);
      }
      assertEquals(3, delta.scale());
    }
  }

  /** A PEFT adapter of Phi-3's fused layer on a base that keeps the three apart, with keys of fewer heads. */
  @Test
  void aFusedPairOnParts() throws IOException {
    SafetensorsWriter base = new SafetensorsWriter();
    for (String part : List.of("q", "k", "v")) {
      base.bitsandbytes("model.layers.3.self_attn." + part + "_proj", part.equals("q") ? 8 : 4, 6);
    }
    base.bitsandbytes("model.layers.3.mlp.gate_proj", 5, 6).bitsandbytes("model.layers.3.mlp.up_proj", 5, 6);
    String name = "base_model.model.model.layers.3.self_attn.qkv_proj";
    String mlp = "base_model.model.model.layers.3.mlp.gate_up_proj";
    SafetensorsWriter writer = pair(new SafetensorsWriter(), name, ".lora_A.weight", ".lora_B.weight", 3, 6, 16)
        .metadata("lora_adapter_metadata", "{\"r\":3,\"lora_alpha\":6}");
    pair(writer, mlp, ".lora_A.weight", ".lora_B.weight", 3, 6, 10);
    try (Checkpoint checkpoint = checkpoint(base); LoraAdapter adapter = adapter(writer)) {
      ModuleMap map = ModuleMap.of(checkpoint, adapter);
      assertDelta(map, "model.layers.3.self_attn.q_proj", name, 2, 0);
      assertDelta(map, "model.layers.3.self_attn.k_proj", name, 2, 8);
      assertDelta(map, "model.layers.3.self_attn.v_proj", name, 2, 12);
      assertDelta(map, "model.layers.3.mlp.gate_proj", mlp, 2, 0);
      assertDelta(map, "model.layers.3.mlp.up_proj", mlp, 2, 5);
    }
  }

  /** diffusers names on FLUX's original matrices, whose final modulation has its halves the other way round. */
  @ParameterizedTest
  @ValueSource(strings = {"", "model.diffusion_model."})
  void diffusersNamesOnOriginalMatrices(String prefix) throws IOException {
    SafetensorsWriter writer = new SafetensorsWriter();
    String a = ".lora_A.weight";
    String b = ".lora_B.weight";
    pair(writer, "transformer.transformer_blocks.0.attn.to_k", a, b, 2, 4, 4);
    pair(writer, "transformer.transformer_blocks.0.attn.to_v", a, b, 3, 4, 4);
    pair(writer, "transformer.single_transformer_blocks.0.proj_mlp", a, b, 2, 4, 16);
    pair(writer, "transformer.single_transformer_blocks.0.attn.to_q", a, b, 2, 4, 4);
    pair(writer, "transformer.norm_out.linear", a, b, 2, 4, 8);
    try (Checkpoint base = checkpoint(originalFlux(prefix)); LoraAdapter adapter = adapter(writer)) {
      assertEquals(AdapterFormat.DIFFUSERS, adapter.format());
      ModuleMap map = ModuleMap.of(base, adapter);
      double[] qkv = new double[12 * 4];
      put(qkv, 4, "transformer.transformer_blocks.0.attn.to_k");
      put(qkv, 8, "transformer.transformer_blocks.0.attn.to_v");
      assertArrayEquals(qkv, RealAdaptersTest.deltaWeight(map.delta(prefix + "double_blocks.0.img_attn.qkv")));
      double[] linear1 = new double[28 * 4];
      put(linear1, 0, "transformer.single_transformer_blocks.0.attn.to_q");
      put(linear1, 12, "transformer.single_transformer_blocks.0.proj_mlp");
      assertArrayEquals(linear1, RealAdaptersTest.deltaWeight(map.delta(prefix + "single_blocks.0.linear1")));
      double[] straight = products.get("transformer.norm_out.linear");
      double[] swapped = new double[8 * 4];
      System.arraycopy(straight, 16, swapped, 0, 16);
      System.arraycopy(straight, 0, swapped, 16, 16);
      assertArrayEquals(swapped,
          RealAdaptersTest.deltaWeight(map.delta(prefix + "final_layer.adaLN_modulation.1")));
    }
  }

  /** Original names on original matrices: nothing is swapped, split or joined, whatever the prefixes. */
  @Test
  void originalNamesOnOriginalMatrices() throws IOException {
    for (String prefix : List.of("", "model.diffusion_model.")) {
      for (String name : List.of("diffusion_model.final_layer.adaLN_modulation.1",
          "lora_unet_final_layer_adaLN_modulation_1", "model.diffusion_model.final_layer.adaLN_modulation.1")) {
        try (Checkpoint base = checkpoint(originalFlux(prefix));
            LoraAdapter adapter = adapter(kohya(name, 2, 4, 8))) {
          assertDelta(ModuleMap.of(base, adapter), prefix + "final_layer.adaLN_modulation.1", name, 1, 0);
        }
      }
    }
  }

  @Test
  void partsThatDoNotFitAreListed() throws IOException {
    SafetensorsWriter writer = kohya("m.q_proj", 2, 6, 7); // 16 - 7 is odd: no equal keys and values
    assertUnmapped("m.qkv_proj", writer, "m.q_proj", "B gives 7 outputs; the 16 rows of m.qkv_proj are no [m.q_proj");
    assertUnmapped("m.qkv_proj", kohya("m.q_proj", 2, 5, 8), "m.q_proj", "A takes 5 inputs, m.qkv_proj has 6");
    writer = kohya("m.qkv_proj", 2, 6, 16);
    assertUnmapped("m.qkv_proj", kohya(writer, "m.q_proj", 2, 6, 8), "m.qkv_proj", "also the place of m.q_proj");
    writer = kohya("m.k_proj", 2, 6, 4);
    assertUnmapped("m.qkv_proj", kohya(writer, "m.v_proj", 2, 6, 5), "m.v_proj", "are no [m.q_proj");
  }

  // ---- LoHa and LoKr ------------------------------------------------------------------------------------------------

  /** ΔW = (w1a·w1b) ∘ (w2a·w2b) · alpha / r. */
  @Test
  void hadamardProductsAreLowRankPairs() throws IOException {
    float[] w1a = numbers(9 * 2);
    float[] w1b = numbers(2 * 7);
    float[] w2a = numbers(9 * 2);
    float[] w2b = numbers(2 * 7);
    SafetensorsWriter writer = new SafetensorsWriter().floats("lycoris_m.hada_w1_a", new long[] {9, 2}, w1a)
        .floats("lycoris_m.hada_w1_b", new long[] {2, 7}, w1b).floats("lycoris_m.hada_w2_a", new long[] {9, 2}, w2a)
        .floats("lycoris_m.hada_w2_b", new long[] {2, 7}, w2b).floats("lycoris_m.alpha", new long[0], 1);
    double[] one = product(w1b, w1a, 2, 7, 9);
    double[] two = product(w2b, w2a, 2, 7, 9);
    try (Checkpoint base = checkpoint(new SafetensorsWriter().bitsandbytes("m", 9, 7));
        LoraAdapter adapter = adapter(writer)) {
      ModuleMap map = ModuleMap.of(base, adapter);
      assertEquals(4, map.delta("m").rank());
      assertEquals(0.5, map.delta("m").scale());
      assertEquals(5, map.report().entries().size());
      double[] weight = RealAdaptersTest.deltaWeight(map.delta("m"));
      for (int i = 0; i < weight.length; i++) {
        assertEquals(one[i] * two[i] / 2 + 0.0, weight[i], "+ 0.0 takes the sign off a zero");
      }
    }
  }

  /** ΔW = w1 ⊗ w2, each full or a pair; alpha counts only beside a pair, whose rank divides it. */
  @ParameterizedTest
  @CsvSource({"false, true, 3, 0.5, 6, 0", "true, true, 3, 0.5, 4, 0", "true, false, 3, 0.5, 6, 0",
      "false, false, 5, 1, 9, 0", "false, false, 3, 1, 9, 1", "false, false, 2, 1, 6, 1"})
  void kroneckerProductsAreLowRankPairs(boolean pairOne, boolean pairTwo, int rows, double scale, int rank, int notes)
      throws IOException {
    // w1 is rows x 3; w2 is 10 x 9, or 3 x 11 where it is full
    int height = pairTwo ? 10 : 3;
    int width = pairTwo ? 9 : 11;
    SafetensorsWriter writer = new SafetensorsWriter().floats("m.alpha", new long[] {1}, 1);
    double[] one = factor(writer, "m.lokr_w1", pairOne, rows, 3);
    double[] two = factor(writer, "m.lokr_w2", pairTwo, height, width);
    int n = rows * height;
    int k = 3 * width;
    try (Checkpoint base = checkpoint(new SafetensorsWriter().bitsandbytes("m", n, k));
        LoraAdapter adapter = adapter(writer)) {
      LoraDelta delta = ModuleMap.of(base, adapter).delta("m");
      assertEquals(rank, delta.rank());
      assertEquals(scale, delta.scale());
      assertEquals(rank >= Math.min(n, k) ? List.of(("1 modules are low-rank pairs of no less rank than their layers, "
          + "exact and as costly: m, a LoKr of %d x %d with rank %d").formatted(n, k, rank)) : List.of(),
          adapter.notes());
      assertEquals(notes, adapter.notes().size());
      double[] weight = RealAdaptersTest.deltaWeight(delta);
      for (int i = 0; i < weight.length; i++) {
        int row = i / k;
        int column = i % k;
        assertEquals(scale * one[row / height * 3 + column / width] * two[row % height * width + column % width] + 0.0,
            weight[i], "+ 0.0 takes the sign off a zero");
      }
    }
  }

  static Stream<Arguments> refusedFactors() {
    return Stream.of(
        Arguments.of("too large a rank", new SafetensorsWriter().ramp("m.lokr_w1", 1, 17, 17)
            .ramp("m.lokr_w2", 1, 241, 241), "this LoKr of 4097 x 4097 has rank 4097 as a low-rank pair, expected at "
                + "most 4096"),
        Arguments.of("too large a LoHa", new SafetensorsWriter().ramp("m.hada_w1_a", 1, 9, 65)
            .ramp("m.hada_w1_b", 1, 65, 7).ramp("m.hada_w2_a", 1, 9, 65).ramp("m.hada_w2_b", 1, 65, 7),
            "this LoHa of 9 x 7 has rank 4225"),
        Arguments.of("one factor", new SafetensorsWriter().ramp("m.lokr_w1", 1, 2, 2), "LoKr needs two factors"),
        Arguments.of("half a pair", new SafetensorsWriter().ramp("m.hada_w1_a", 1, 9, 1), "LoHa needs two factors"),
        Arguments.of("both", new SafetensorsWriter().ramp("m.hada_w1_a", 1, 9, 1).ramp("m.lokr_w1", 1, 2, 2),
            "factors of LoHa and of LoKr"),
        Arguments.of("beside a pair", new SafetensorsWriter().ramp("m.lora_A.weight", 1, 2, 3).ramp("m.lokr_w1", 1, 2,
            2), "factors of LoHa or LoKr"),
        Arguments.of("core", new SafetensorsWriter().ramp("m.lokr_t2", 1, 2, 2, 3, 3).ramp("m.lokr_w1", 1, 2, 2),
            "core of a LoKr convolution"),
        Arguments.of("convolution", new SafetensorsWriter().ramp("m.lokr_w1", 1, 2, 2).ramp("m.lokr_w2", 1, 3, 3, 3, 3),
            "is no matrix"),
        Arguments.of("shapes", new SafetensorsWriter().ramp("m.hada_w1_a", 1, 9, 1).ramp("m.hada_w1_b", 1, 2, 7)
            .ramp("m.hada_w2_a", 1, 9, 1).ramp("m.hada_w2_b", 1, 1, 7), "has 1 columns, m.hada_w1_b 2 rows"),
        Arguments.of("sizes", new SafetensorsWriter().ramp("m.hada_w1_a", 1, 9, 1).ramp("m.hada_w1_b", 1, 1, 7)
            .ramp("m.hada_w2_a", 1, 8, 1).ramp("m.hada_w2_b", 1, 1, 7), "9 x 7 of rank 1 and 8 x 7 of rank 1"),
        Arguments.of("ranks", new SafetensorsWriter().ramp("m.lokr_w1_a", 1, 9, 1).ramp("m.lokr_w1_b", 1, 1, 7)
            .ramp("m.lokr_w2_a", 1, 8, 2).ramp("m.lokr_w2_b", 1, 2, 7), "ranks 1 and 2"));
  }

  @ParameterizedTest(name = "{0}")
  @MethodSource("refusedFactors")
  void otherProductsAreListed(String what, SafetensorsWriter writer, String why) throws IOException {
    try (LoraAdapter adapter = adapter(writer)) {
      assertEquals(List.of(), adapter.pairs());
      assertTrue(adapter.unsupported().stream().anyMatch(key -> key.why().contains(why)),
          adapter.unsupported().toString());
    }
  }

  // ---- Alpha, recognition, report -----------------------------------------------------------------------------------

  @Test
  void alphaZeroIsZeroAndNoted() throws IOException {
    try (Checkpoint base = checkpoint(new SafetensorsWriter().bitsandbytes("m", 5, 6));
        LoraAdapter adapter = adapter(kohya("lora_unet_m", 2, 6, 5).floats("lora_unet_m.alpha", new long[0], 0))) {
      ModuleMap map = ModuleMap.of(base, adapter);
      assertEquals(0, map.delta("m").scale());
      assertEquals(List.of("1 modules have scale 0 and change nothing, as their alpha is 0: lora_unet_m"),
          map.report().notes());
    }
  }

  /** Without alpha and without the training program's metadata the scale is 1. */
  @Test
  void missingAlphaAndMetadataMeanOne() throws IOException {
    try (Checkpoint base = checkpoint(new SafetensorsWriter().bitsandbytes("m", 5, 6));
        LoraAdapter adapter = adapter(kohya("lora_unet_m", 2, 6, 5))) {
      assertEquals(Map.of(), adapter.metadata());
      assertDelta(ModuleMap.of(base, adapter), "m", "lora_unet_m", 1, 0);
    }
  }

  static Stream<Arguments> families() {
    return Stream.of(Arguments.of("lora_unet_m.lora_down.weight", "kohya"),
        Arguments.of("lycoris_m.lora_down.weight", "LyCORIS"),
        Arguments.of("lora_transformer_m.lora_down.weight", "OneTrainer"),
        Arguments.of("diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight", "BFL"),
        Arguments.of("double_blocks.0.processor.qkv_lora1.down.weight", "XLabs"),
        Arguments.of("unet.a.processor.to_q_lora.down.weight", "early diffusers"),
        Arguments.of("base_model.model.a.lora_A.weight", "PEFT"),
        Arguments.of("transformer.transformer_blocks.0.attn.to_q.lora_A.weight", "diffusers"));
  }

  @ParameterizedTest(name = "{1}")
  @MethodSource("families")
  void twoFamiliesInAFileAreRefusedWithBothReadings(String key, String family) throws IOException {
    for (Arguments each : families().toList()) {
      String other = (String) each.get()[1];
      if (family.equals(other) || List.of("BFL", "PEFT").containsAll(List.of(family, other))
          || List.of("early diffusers", "diffusers").containsAll(List.of(family, other))) {
        continue; // one family, FLUX's names as fal wraps them, or paths that mean the same early and late
      }
      Path file = new SafetensorsWriter().ramp(key, 1, 2, 3).ramp((String) each.get()[0], 1, 2, 3)
          .write(folder.resolve("mixed.safetensors"));
      FormatException e = assertThrows(FormatException.class, () -> LoraAdapter.open(file).close());
      for (String part : List.of("as " + family, "as " + other, key, (String) each.get()[0])) {
        assertTrue(e.getMessage().contains(part), e.getMessage());
      }
    }
  }

  /** fal wraps FLUX's original names as PEFT wraps modules, without PEFT's configuration; the scale is 1. */
  @Test
  void originalNamesInsideTheWrapperOfPeft() throws IOException {
    String proj = "base_model.model.double_blocks.0.img_attn.proj";
    String last = "base_model.model.final_layer.linear";
    SafetensorsWriter writer = pair(new SafetensorsWriter(), proj, ".lora_A.weight", ".lora_B.weight", 2, 4, 4);
    pair(writer, last, ".lora_A.weight", ".lora_B.weight", 3, 4, 7);
    try (Checkpoint base = checkpoint(diffusersFlux().bitsandbytes("proj_out", 7, 4));
        LoraAdapter adapter = adapter(writer)) {
      assertEquals(AdapterFormat.BFL, adapter.format());
      ModuleMap map = ModuleMap.of(base, adapter);
      assertDelta(map, "transformer_blocks.0.attn.to_out.0", proj, 1, 0);
      assertDelta(map, "proj_out", last, 1, 0);
    }
  }

  @Test
  void computedFactorsOfAClosedAdapterDoNotRead() throws IOException {
    SafetensorsWriter writer = kohya("m.up_proj", 2, 6, 5);
    writer.ramp("l.hada_w1_a", 1, 9, 1).ramp("l.hada_w1_b", 1, 1, 7).ramp("l.hada_w2_a", 1, 9, 1)
        .ramp("l.hada_w2_b", 1, 1, 7);
    try (Checkpoint base = checkpoint(new SafetensorsWriter().bitsandbytes("m.gate_up_proj", 10, 6)
        .bitsandbytes("l", 9, 7)); LoraAdapter adapter = adapter(writer)) {
      ModuleMap map = ModuleMap.of(base, adapter);
      List<Factor> factors = List.of(map.delta("l").b(), map.delta("m.gate_up_proj").b());
      factors.forEach(Factor::toFloats);
      adapter.close();
      for (Factor b : factors) {
        assertThrows(IllegalStateException.class, b::toFloats);
        assertThrows(IllegalStateException.class, () -> b.copyTo(ByteBuffer.allocate((int) b.byteSize())));
      }
    }
  }

  @Test
  void unmatchedKeysTellRuleAndRemedy() throws IOException {
    SafetensorsWriter writer = kohya("lora_unet_m", 2, 6, 5);
    kohya(writer, "lora_unet_mm", 2, 6, 5);
    kohya(writer, "lora_unet_l", 2, 6, 4);
    writer.ramp("lora_unet_d.diff", 1, 5, 6);
    try (Checkpoint base = checkpoint(new SafetensorsWriter().bitsandbytes("m", 5, 6).bitsandbytes("l", 5, 6));
        LoraAdapter adapter = adapter(writer)) {
      Map<String, Entry> entries = new LinkedHashMap<>();
      ModuleMap.lenient(base, adapter).report().entries().forEach(entry -> entries.put(entry.key(), entry));
      for (Entry entry : entries.values()) {
        assertEquals(AdapterFormat.KOHYA.rule(), entry.rule());
        assertEquals(entry.why() == null, entry.remedy() == null);
      }
      assertNull(entries.get("lora_unet_m.lora_up.weight").remedy());
      Entry unknown = entries.get("lora_unet_mm.lora_up.weight");
      assertEquals("m", unknown.nearest().get(0));
      assertTrue(unknown.remedy().startsWith("--rename FROM=TO "), unknown.remedy());
      assertTrue(entries.get("lora_unet_l.lora_up.weight").remedy().startsWith("it was made for a layer of another"));
      assertTrue(entries.get("lora_unet_d.diff").remedy()
          .endsWith("leave its module out with --lenient (in Java: ModuleMap.lenient)"));
    }
  }

  // -------------------------------------------------------------------------------------------------------------------

  /** The delta is scale times these rows of the named pair's product. */
  private void assertDelta(ModuleMap map, String module, String name, double scale, int firstRow) {
    LoraDelta delta = map.delta(module);
    assertEquals(scale, delta.scale());
    double[] weight = RealAdaptersTest.deltaWeight(delta);
    double[] all = products.get(name);
    for (int i = 0; i < weight.length; i++) {
      assertEquals(scale * all[firstRow * delta.k() + i], weight[i]);
    }
  }

  private void put(double[] weight, int row, String name) {
    double[] product = products.get(name);
    System.arraycopy(product, 0, weight, row * 4, product.length);
  }

  private void assertUnmapped(String module, SafetensorsWriter writer, String name, String why) throws IOException {
    try (Checkpoint base = checkpoint(new SafetensorsWriter().bitsandbytes(module, 16, 6));
        LoraAdapter adapter = adapter(writer)) {
      MappingException e = assertThrows(MappingException.class, () -> ModuleMap.of(base, adapter));
      Entry entry = e.report().unmapped().stream().filter(each -> each.key().startsWith(name)).findFirst()
          .orElseThrow();
      assertTrue(entry.why().contains(why), entry.why());
    }
  }

  /** A full matrix, or a pair of rank 2; returns the matrix. */
  private double[] factor(SafetensorsWriter writer, String name, boolean pair, int rows, int columns) {
    if (pair) {
      float[] a = numbers(rows * 2);
      float[] b = numbers(2 * columns);
      writer.floats(name + "_a", new long[] {rows, 2}, a).floats(name + "_b", new long[] {2, columns}, b);
      return product(b, a, 2, columns, rows);
    }
    float[] full = numbers(rows * columns);
    writer.floats(name, new long[] {rows, columns}, full);
    double[] wide = new double[full.length];
    for (int i = 0; i < full.length; i++) {
      wide[i] = full[i];
    }
    return wide;
  }

  private SafetensorsWriter kohya(String name, int rank, int in, int out) {
    return kohya(new SafetensorsWriter(), name, rank, in, out);
  }

  private SafetensorsWriter kohya(SafetensorsWriter writer, String name, int rank, int in, int out) {
    return pair(writer, name, ".lora_down.weight", ".lora_up.weight", rank, in, out);
  }

  private SafetensorsWriter pair(SafetensorsWriter writer, String name, String down, String up, int rank, int in,
      int out) {
    float[] a = numbers(rank * in);
    float[] b = numbers(out * rank);
    products.put(name, product(a, b, rank, in, out));
    return writer.floats(name + down, new long[] {rank, in}, a).floats(name + up, new long[] {out, rank}, b);
  }

  /** B·A in double. */
  private static double[] product(float[] a, float[] b, int rank, int in, int out) {
    double[] product = new double[out * in];
    for (int row = 0; row < out; row++) {
      for (int column = 0; column < in; column++) {
        for (int r = 0; r < rank; r++) {
          product[row * in + column] += (double) b[row * rank + r] * a[r * in + column];
        }
      }
    }
    return product;
  }

  /** Integers from -4 to 4, none of them 0. */
  private float[] numbers(int count) {
    float[] numbers = new float[count];
    for (int i = 0; i < count; i++) {
      numbers[i] = (1 + random.nextInt(4)) * (random.nextBoolean() ? 1 : -1);
    }
    return numbers;
  }

  private static byte[] ones(ElementType type, int count) {
    ByteBuffer bytes = ByteBuffer.allocate(count * type.bits() / 8).order(ByteOrder.LITTLE_ENDIAN);
    for (int i = 0; i < count; i++) {
      switch (type) {
        case F16 -> bytes.putShort((short) 0x3c00);
        case BF16 -> bytes.putShort((short) 0x3f80);
        default -> bytes.putFloat(1);
      }
    }
    return bytes.array();
  }

  /** One block of each kind with h = 4 and an mlp of 16. */
  private static SafetensorsWriter diffusersFlux() {
    SafetensorsWriter writer = new SafetensorsWriter();
    for (String leaf : List.of("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0",
        "to_add_out")) {
      writer.bitsandbytes("transformer_blocks.0.attn." + leaf, 4, 4);
    }
    for (String leaf : List.of("to_q", "to_k", "to_v")) {
      writer.bitsandbytes("single_transformer_blocks.0.attn." + leaf, 4, 4);
    }
    return writer.bitsandbytes("single_transformer_blocks.0.proj_mlp", 16, 4)
        .bitsandbytes("single_transformer_blocks.0.proj_out", 4, 20).bitsandbytes("norm_out.linear", 8, 4);
  }

  private static SafetensorsWriter originalFlux(String prefix) {
    return new SafetensorsWriter().bitsandbytes(prefix + "double_blocks.0.img_attn.qkv", 12, 4)
        .bitsandbytes(prefix + "double_blocks.0.txt_attn.qkv", 12, 4)
        .bitsandbytes(prefix + "double_blocks.0.img_attn.proj", 4, 4)
        .bitsandbytes(prefix + "single_blocks.0.linear1", 28, 4).bitsandbytes(prefix + "single_blocks.0.linear2", 4, 20)
        .bitsandbytes(prefix + "final_layer.adaLN_modulation.1", 8, 4);
  }

  private LoraAdapter adapter(SafetensorsWriter writer) throws IOException {
    return LoraAdapter.open(writer.write(folder.resolve("lora.safetensors")));
  }

  private Checkpoint checkpoint(SafetensorsWriter writer) throws IOException {
    return Checkpoint.open(writer.write(folder.resolve("model.safetensors")));
  }
}
