// SPDX-License-Identifier: Apache-2.0
package io.octolora.mapping;

import static org.junit.jupiter.api.Assertions.assertEquals;

import io.octolora.Fixtures;
import io.octolora.SafetensorsWriter;
import io.octolora.adapter.LoraAdapter;
import io.octolora.checkpoint.BaseLinear;
import io.octolora.checkpoint.Checkpoint;
import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.Collections;
import java.util.List;
import java.util.Random;
import java.util.Set;
import net.jqwik.api.Arbitraries;
import net.jqwik.api.Arbitrary;
import net.jqwik.api.ForAll;
import net.jqwik.api.Property;
import net.jqwik.api.Provide;
import net.jqwik.api.constraints.IntRange;
import net.jqwik.api.lifecycle.AfterContainer;
import net.jqwik.api.lifecycle.BeforeContainer;

class ModuleMapPropertiesTest {
  private static final List<String> PREFIXES =
      List.of("", "transformer.", "unet.", "diffusion_model.", "model.diffusion_model.", "base_model.model.",
          "base_model.model.transformer.");
  private static final List<String> FLAT_PREFIXES = List.of("lora_unet_", "lora_te1_", "lora_transformer_", "lycoris_");

  private static Checkpoint flux;
  private static Checkpoint llama;
  private static Path file;

  @BeforeContainer
  static void open() throws IOException {
    flux = Checkpoint.open(Fixtures.path("flux/base_bnb8"));
    llama = Checkpoint.open(Fixtures.path("llama/base_bnb8"));
    file = Files.createTempFile("octolora", ".safetensors");
  }

  @AfterContainer
  static void close() throws IOException {
    flux.close();
    llama.close();
    Files.delete(file);
  }

  @Provide
  Arbitrary<BaseLinear> linears() {
    List<BaseLinear> all = new ArrayList<>(flux.linears().values());
    all.addAll(llama.linears().values());
    return Arbitraries.of(all);
  }

  /** Every module is found under its own path with any prefix, flattened or not, and nothing else is. */
  @Property
  void everyModuleIsFoundUnderEachOfItsNames(@ForAll("linears") BaseLinear linear) {
    for (Checkpoint base : List.of(flux, llama)) {
      boolean own = base.linears().get(linear.name()) == linear;
      Set<ModuleTable.Target> expected = own ? Set.of(new ModuleTable.Target(
          List.of(new ModuleTable.Piece(linear, null, 0, 1)), false)) : Set.of();
      ModuleTable table = new ModuleTable(base.linears());
      PREFIXES.forEach(prefix -> assertEquals(expected, table.find(prefix + linear.name()), prefix));
      String flat = linear.name().replace('.', '_');
      FLAT_PREFIXES.forEach(prefix -> assertEquals(expected, table.find(prefix + flat), prefix));
    }
  }

  /** A changed character, a shortened or a longer name means nothing, unless it happens to be another module's. */
  @Property
  void anyOtherNameIsNotFound(@ForAll("linears") BaseLinear linear, @ForAll @IntRange(max = 1000) int place,
      @ForAll("replacements") char replacement) {
    ModuleTable table = new ModuleTable(flux.linears());
    String name = linear.name();
    int at = place % name.length();
    for (String other : List.of(name.substring(at), name.substring(0, at), name + replacement, replacement + name,
        name.substring(0, at) + replacement + name.substring(at + 1))) {
      boolean module = flux.linears().containsKey(other);
      assertEquals(module ? Set.of(other) : Set.of(), names(table.find(other)), other);
    }
  }

  @Provide
  Arbitrary<Character> replacements() {
    return Arbitraries.chars().with("abcxyz0123._-");
  }

  /** The parts of a fused pair, put together again, are the fused product: any rank, with blocks of zeros or not. */
  @Property(tries = 60)
  void splittingAFusedPairKeepsItsProduct(@ForAll @IntRange(min = 1, max = 13) int rank, @ForAll boolean blocks,
      @ForAll long seed) throws IOException {
    Random random = new Random(seed);
    float[] a = new float[rank * 128];
    float[] b = new float[896 * rank];
    for (int i = 0; i < a.length; i++) {
      a[i] = random.nextInt(17) - 8;
    }
    for (int i = 0; i < b.length; i++) {
      int part = Math.min(i / rank / 128, 3);
      boolean zero = blocks && rank % 4 == 0 && i % rank / (rank / 4) != part;
      b[i] = zero ? 0 : random.nextInt(17) - 8;
    }
    new SafetensorsWriter().floats("single_blocks.0.linear1.lora_A.weight", new long[] {rank, 128}, a)
        .floats("single_blocks.0.linear1.lora_B.weight", new long[] {896, rank}, b).write(file);
    try (LoraAdapter adapter = LoraAdapter.open(file)) {
      ModuleMap map = ModuleMap.of(flux, adapter);
      int row = 0;
      for (String leaf : List.of("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")) {
        LoraDelta delta = map.delta("single_transformer_blocks.0." + leaf);
        assertEquals(blocks && rank % 4 == 0 ? rank / 4 : rank, delta.rank());
        double[] part = RealAdaptersTest.deltaWeight(delta);
        for (int i = 0; i < part.length; i++) {
          double sum = 0; // small integers: exact in any order
          for (int r = 0; r < rank; r++) {
            sum += b[(row + i / 128) * rank + r] * a[r * 128 + i % 128];
          }
          assertEquals(sum, part[i]);
        }
        row += delta.n();
      }
      assertEquals(896, row);
    }
  }

  private static Set<String> names(Set<ModuleTable.Target> targets) {
    return targets.isEmpty() ? Collections.emptySet() : Set.of(targets.iterator().next().describe());
  }
}
