// SPDX-License-Identifier: Apache-2.0
package io.octolora.mapping;

import static org.junit.jupiter.api.Assertions.assertArrayEquals;
import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertNotNull;
import static org.junit.jupiter.api.Assertions.assertNull;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import io.octolora.Fixtures;
import io.octolora.SafetensorsWriter;
import io.octolora.adapter.LoraAdapter;
import io.octolora.checkpoint.Checkpoint;
import io.octolora.checkpoint.SafetensorsFile;
import io.octolora.checkpoint.Tensor;
import io.octolora.internal.Json;
import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.List;
import java.util.Map;
import java.util.TreeSet;
import java.util.stream.Stream;
import org.junit.jupiter.api.io.TempDir;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.Arguments;
import org.junit.jupiter.params.provider.CsvSource;
import org.junit.jupiter.params.provider.MethodSource;
import org.junit.jupiter.params.provider.ValueSource;

/** The adapters that real tools wrote, on the checkpoints that real tools wrote. */
class RealAdaptersTest {
  private static final List<String> FLUX_BASES = List.of("flux/base_bnb8", "flux/base_quanto_diffusers");

  /** File of an adapter, and what its scale must be multiplied with to be that of the folder of PEFT. */
  static Stream<Arguments> sameAdapters() {
    Stream.Builder<Arguments> cases = Stream.builder();
    for (String base : FLUX_BASES) {
      for (String name : List.of("r4", "r8_attn_bf16", "r5_bf16", "pattern", "rslora", "lora_bias", "shared")) {
        cases.add(Arguments.of(base, name, "diffusers_lora.safetensors", 1.0));
      }
      for (String name : List.of("r4", "shared")) {
        cases.add(Arguments.of(base, name, "kohya.safetensors", 1.0));
        cases.add(Arguments.of(base, name, "bfl.safetensors", 1.0));
        // neither alpha nor configuration: scale 1 where PEFT has alpha / rank, 8 / 4 and 2 / 4
        cases.add(Arguments.of(base, name, "pytorch_lora_weights.safetensors", name.equals("r4") ? 2.0 : 0.5));
      }
      cases.add(Arguments.of(base, "shared", "bfl_diffusion_model_prefix.safetensors", 1.0));
    }
    return cases.build();
  }

  /**
   * Delta weights in double. Both sides hold the same bf16 factors, and the scales are powers of two, which fold into
   * a bf16 factor exactly; the products of a pair are exact in double and their sums of at most 16 terms differ only
   * in zeros added, so the two are equal but for the rounding of scale times sum: 2^-52.
   */
  @ParameterizedTest(name = "{1}/{2} on {0}")
  @MethodSource("sameAdapters")
  void everyFileOfAnAdapterGivesTheSameDelta(String basePath, String name, String file,
      double factor) throws IOException {
    Path folder = Fixtures.path("flux/adapters/" + name);
    try (Checkpoint base = Checkpoint.open(Fixtures.path(basePath));
        LoraAdapter peft = LoraAdapter.open(folder.resolve("peft"));
        LoraAdapter other = LoraAdapter.open(folder.resolve(file))) {
      ModuleMap expected = ModuleMap.of(base, peft);
      ModuleMap actual = ModuleMap.of(base, other);
      assertEquals(expected.modules(), actual.modules());
      assertEquals(List.of(), actual.report().unmapped());
      assertTrue(expected.modules().size() >= 7);
      for (String module : expected.modules()) {
        double[] want = deltaWeight(expected.delta(module));
        double[] have = deltaWeight(actual.delta(module));
        double largest = 0;
        for (int i = 0; i < want.length; i++) {
          assertEquals(want[i], factor * have[i], 0x1p-51 * Math.abs(want[i]), module + " at " + i);
          largest = Math.max(largest, Math.abs(want[i]));
        }
        assertTrue(largest > 0, module + " has no delta at all");
        assertBiasEquals(expected.delta(module), actual.delta(module));
      }
    }
  }

  /** The scale that PEFT itself recorded while it ran the model, for every module of every recorded run. */
  @ParameterizedTest
  @ValueSource(strings = {"flux", "llama"})
  void scalesAndRanksAreThoseOfTheToolsOwnRuns(String model) throws IOException {
    int compared = 0;
    for (String golden : Fixtures.goldens(model).toList()) {
      Map<String, Object> json = Json.readObject(Fixtures.goldenJson(model, golden));
      // the whole unquantized FLUX is not here: int8 has its names and shapes
      String base = model + "/" + (golden.equals("bf16__r4") ? "base_bnb8" : json.get("base"));
      for (Object layer : (List<?>) json.get("layers")) {
        Map<String, Object> fields = Json.object(layer, golden);
        Object adapters = fields.get("adapters");
        if (adapters == null) {
          continue;
        }
        for (Map.Entry<String, Object> entry : Json.object(adapters, golden).entrySet()) {
          Map<String, Object> recorded = Json.object(entry.getValue(), golden);
          boolean isFlux = model.equals("flux"); // PEFT calls an adapter without a name "default"
          Path path = Fixtures.path(model + "/adapters/" + (isFlux ? entry.getKey() + "/peft" : json.get("adapter")));
          try (Checkpoint checkpoint = Checkpoint.open(Fixtures.path(base));
              LoraAdapter adapter = LoraAdapter.open(path)) {
            String module = ((String) fields.get("module")).replaceFirst("^base_model\\.model\\.", "");
            LoraDelta delta = ModuleMap.of(checkpoint, adapter).delta(module);
            // scaling includes the weight of the adapter where two are active: 0.7 and 0.4
            double weight = !golden.contains("+") ? 1 : entry.getKey().equals("r4") ? 0.7 : 0.4;
            assertEquals(((Number) recorded.get("scaling")).doubleValue(), weight * delta.scale(),
                1e-12 * Math.abs(delta.scale()), golden + " " + module);
            assertEquals(((Number) recorded.get("r")).intValue(), delta.rank());
            assertEquals(recorded.get("lora_bias"), delta.bias() != null);
            compared++;
          }
        }
      }
    }
    assertEquals(model.equals("flux") ? 301 : 46, compared, "adapted layers in all runs");
  }

  @ParameterizedTest
  @CsvSource({"r4_all, 14", "pattern, 6", "r5_rslora, 4", "r8_qv_bf16, 4"})
  void languageModelAdaptersLandOnFullPaths(String name, int modules) throws IOException {
    Path path = Fixtures.path("llama/adapters/" + name);
    for (String basePath : List.of("llama/base_bnb8", "llama/base_bf16")) {
      try (Checkpoint base = Checkpoint.open(Fixtures.path(basePath)); LoraAdapter adapter = LoraAdapter.open(path);
          SafetensorsFile file = SafetensorsFile.open(path.resolve("adapter_model.safetensors"))) {
        ModuleMap map = ModuleMap.of(base, adapter);
        assertEquals(modules, map.modules().size());
        for (String module : map.modules()) {
          Tensor a = file.tensors().get("base_model.model." + module + ".lora_A.weight");
          LoraDelta delta = map.delta(module);
          assertEquals(a.name(), delta.a().tensor().name());
          assertEquals(base.linear(module).n(), delta.n());
          assertEquals(base.linear(module).k(), delta.k());
        }
      }
    }
  }

  /**
   * The same adapter under diffusers names and under FLUX's original ones, on a base with the original matrices: joined
   * pairs of the one are the pairs of the other, half-swapped final modulation included. Only the base is made here,
   * from the sizes of the real one. Equal but for 2^-52, as above.
   */
  @ParameterizedTest
  @CsvSource({"r4, bfl.safetensors, 16", "r4, kohya.safetensors, 16", "shared, bfl.safetensors, 4",
      "shared, kohya.safetensors, 4"})
  void bothNamesMeanTheSameOnOriginalMatrices(String name, String file, int rank, @TempDir Path folder)
      throws IOException {
    SafetensorsWriter writer = new SafetensorsWriter();
    try (Checkpoint real = Checkpoint.open(Fixtures.path("flux/base_bnb8"))) {
      ModuleMapTest.originalNames().map(Arguments::get).forEach(line -> {
        for (int block = 0; block < 2; block++) {
          String number = "." + block + ".";
          List<String> parts = ((List<?>) line[2]).stream()
              .map(part -> part.toString().replaceFirst("\\.[01]\\.", number)).toList();
          boolean numbered = !parts.equals(line[2]) || parts.get(0).contains("blocks.");
          if (real.linears().keySet().containsAll(parts) && (numbered || block == 0)) {
            writer.bitsandbytes(line[0].toString().replaceFirst("\\.[01]\\.", number),
                parts.stream().mapToInt(part -> real.linear(part).n()).sum(), real.linear(parts.get(0)).k());
          }
        }
      });
    }
    Path adapters = Fixtures.path("flux/adapters/" + name);
    try (Checkpoint base = Checkpoint.open(writer.write(folder.resolve("model.safetensors")));
        LoraAdapter diffusers = LoraAdapter.open(adapters.resolve("diffusers_lora.safetensors"));
        LoraAdapter original = LoraAdapter.open(adapters.resolve(file))) {
      ModuleMap one = ModuleMap.of(base, diffusers);
      ModuleMap other = ModuleMap.of(base, original);
      assertEquals(other.modules(), one.modules());
      assertEquals(16, one.modules().size());
      assertEquals(rank, one.delta("single_blocks.1.linear1").rank());
      for (String module : one.modules()) {
        double[] want = deltaWeight(other.delta(module));
        double[] have = deltaWeight(one.delta(module));
        for (int i = 0; i < want.length; i++) {
          assertEquals(want[i], have[i], 0x1p-52 * Math.abs(want[i]), module);
        }
      }
    }
  }

  @ParameterizedTest
  @ValueSource(strings = {"peft", "diffusers_lora.safetensors"})
  void magnitudesComeWithTheirModules(String file) throws IOException {
    try (Checkpoint base = Checkpoint.open(Fixtures.path("flux/base_bnb8"));
        LoraAdapter adapter = LoraAdapter.open(Fixtures.path("flux/adapters/dora").resolve(file));
        SafetensorsFile raw = SafetensorsFile.open(
            Fixtures.path("flux/adapters/dora/peft/adapter_model.safetensors"))) {
      ModuleMap map = ModuleMap.of(base, adapter);
      assertEquals(3 * map.modules().size(), map.report().entries().size());
      for (String module : map.modules()) {
        Factor magnitude = map.delta(module).magnitude();
        assertNotNull(magnitude, module);
        assertArrayEquals(raw.tensors().get("base_model.model." + module + ".lora_magnitude_vector").toFloats(),
            magnitude.toFloats());
      }
    }
  }

  /** In single blocks qkv is a part of linear1; double and single blocks share the ends of their paths. */
  @ParameterizedTest
  @ValueSource(strings = {"kohya.safetensors", "bfl.safetensors"})
  void fusedKeysReportTheRowsAndRanksOfEachModule(String file) throws IOException {
    try (Checkpoint base = Checkpoint.open(Fixtures.path("flux/base_bnb8"));
        LoraAdapter diagonal = LoraAdapter.open(Fixtures.path("flux/adapters/r4").resolve(file));
        LoraAdapter shared = LoraAdapter.open(Fixtures.path("flux/adapters/shared").resolve(file))) {
      String key = file.startsWith("kohya") ? "lora_unet_single_blocks_1_linear1.lora_up.weight"
          : "single_blocks.1.linear1.lora_B.weight";
      String block = "single_transformer_blocks.1.";
      assertEquals(List.of(
          new MappingReport.Landing(block + "attn.to_q", 0, 128, 0, 4, false),
          new MappingReport.Landing(block + "attn.to_k", 128, 256, 4, 8, false),
          new MappingReport.Landing(block + "attn.to_v", 256, 384, 8, 12, false),
          new MappingReport.Landing(block + "proj_mlp", 384, 896, 12, 16, false)), landings(base, diagonal, key));
      assertEquals(List.of(
          new MappingReport.Landing(block + "attn.to_q", 0, 128, 0, 4, false),
          new MappingReport.Landing(block + "attn.to_k", 128, 256, 0, 4, false),
          new MappingReport.Landing(block + "attn.to_v", 256, 384, 0, 4, false),
          new MappingReport.Landing(block + "proj_mlp", 384, 896, 0, 4, false)), landings(base, shared, key));
    }
  }

  @ParameterizedTest
  @ValueSource(strings = {"diffusers_lora.safetensors", "kohya.safetensors", "bfl.safetensors"})
  void theReportHasOneEntryForEachTensor(String file) throws IOException {
    Path path = Fixtures.path("flux/adapters/r4").resolve(file);
    try (Checkpoint base = Checkpoint.open(Fixtures.path("flux/base_bnb8"));
        LoraAdapter adapter = LoraAdapter.open(path);
        SafetensorsFile tensors = SafetensorsFile.open(path)) {
      List<String> keys = ModuleMap.of(base, adapter).report()
          .entries().stream().map(MappingReport.Entry::key).toList();
      assertEquals(new TreeSet<>(tensors.tensors().keySet()), new TreeSet<>(keys));
      assertEquals(tensors.tensors().size(), keys.size());
    }
  }

  /** No fixture may have slipped out of the tests above. */
  @ParameterizedTest
  @ValueSource(strings = {"flux", "llama"})
  void everyAdapterFixtureIsOpened(String model) throws IOException {
    try (Stream<Path> files = Files.walk(Fixtures.path(model + "/adapters"))) {
      List<Path> weights = files.filter(file -> file.toString().endsWith(".safetensors")).toList();
      assertEquals(model.equals("flux") ? 23 : 5, weights.size());
      for (Path file : weights) {
        try (Checkpoint base = Checkpoint.open(Fixtures.path(model + "/base_bnb8"));
            LoraAdapter adapter = LoraAdapter.open(file)) {
          ModuleMap map = ModuleMap.of(base, adapter);
          map.modules().forEach(module -> assertEquals(List.of(map.delta(module)), map.deltas(module)));
        }
      }
    }
  }

  private static List<MappingReport.Landing> landings(Checkpoint base, LoraAdapter adapter, String key) {
    return ModuleMap.of(base, adapter).report().entries().stream().filter(entry -> entry.key().equals(key)).findFirst()
        .orElseThrow().landings();
  }

  private static void assertBiasEquals(LoraDelta expected, LoraDelta actual) {
    if (expected.bias() == null) {
      assertNull(actual.bias());
      return;
    }
    float[] want = expected.bias().toFloats();
    float[] have = actual.bias().toFloats();
    for (int i = 0; i < want.length; i++) {
      assertEquals(expected.scale() * want[i], actual.scale() * have[i]);
    }
  }

  /** scale · B · A, [n, k]. */
  static double[] deltaWeight(LoraDelta delta) {
    float[] a = delta.a().toFloats();
    float[] b = delta.b().toFloats();
    double[] weight = new double[delta.n() * delta.k()];
    for (int row = 0; row < delta.n(); row++) {
      for (int column = 0; column < delta.k(); column++) {
        double sum = 0;
        for (int r = 0; r < delta.rank(); r++) {
          sum += (double) b[row * delta.rank() + r] * a[r * delta.k() + column];
        }
        weight[row * delta.k() + column] = delta.scale() * sum;
      }
    }
    return weight;
  }
}
