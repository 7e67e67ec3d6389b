// SPDX-License-Identifier: Apache-2.0
package io.octolora.cli;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertTrue;

import io.octolora.Fixtures;
import io.octolora.internal.Json;
import java.nio.file.Path;
import java.util.List;
import java.util.Map;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.ValueSource;

class InspectCommandTest {
  private static final Path BASE = Fixtures.path("flux/base_bnb8");

  @Test
  void checkpointAlone() {
    Cli cli = Cli.run("inspect", BASE).expect(0)
        .expectTable("MODULE", "LAYERS", "N", "K", "WEIGHT", "ACTIVATIONS", "BIAS");
    assertTrue(cli.out().contains("36 linears: bitsandbytes int8 (36), outlier threshold 6"), cli.out());
    assertTrue(cli.lines().stream().anyMatch(
        line -> line.matches("single_transformer_blocks\\.\\*\\.attn\\.to_q +2 +128 +128 .*outliers from 6 +yes")),
        cli.out());
  }

  @Test
  void verboseShowsEveryLayer() {
    Cli cli = Cli.run("inspect", "-v", BASE).expect(0)
        .expectTable("MODULE", "LAYERS", "N", "K", "WEIGHT", "ACTIVATIONS", "BIAS");
    assertTrue(cli.lines().stream().anyMatch(line -> line.startsWith("single_transformer_blocks.1.attn.to_q ")),
        cli.out());
  }

  @Test
  void layersThatAreNotInt8() {
    Cli cli = Cli.run("inspect", Fixtures.path("llama/base_bnb8")).expect(0);
    assertTrue(cli.out().contains("16 linears: bitsandbytes int8 (14), BF16 (2), outlier threshold 6"), cli.out());
    assertTrue(cli.lines().stream().anyMatch(line -> line.startsWith("lm_head ") && line.contains("not quantized")),
        cli.out());
  }

  @ParameterizedTest
  @ValueSource(strings = {"r4/peft", "r4/diffusers_lora.safetensors", "r4/kohya.safetensors", "r4/bfl.safetensors",
      "r4/pytorch_lora_weights.safetensors", "shared/kohya.safetensors",
      "shared/bfl_diffusion_model_prefix.safetensors"})
  void everyKeyLands(String adapter) {
    Cli cli = Cli.run("inspect", BASE, Fixtures.path("flux/adapters/" + adapter)).expect(0)
        .expectTable("MODULE", "KEYS", "ROWS OF B", "RANKS", "RANK", "SCALE");
    assertTrue(cli.out().contains(" keys landed on 26 modules"), cli.out());
    assertTrue(cli.out().endsWith("OK: every key landed" + System.lineSeparator()), cli.out());
  }

  @Test
  void fusedKeysShowTheirRows() {
    Cli cli = Cli.run("inspect", BASE, Fixtures.path("flux/adapters/shared/kohya.safetensors")).expect(0);
    assertTrue(cli.lines().stream().anyMatch(
        line -> line.startsWith("transformer_blocks.0.attn.to_k ") && line.contains("128..256 of 384")), cli.out());
  }

  @Test
  void keysThatWouldBeDropped() {
    Cli cli = Cli.run("inspect", BASE, Fixtures.path("llama/adapters/r4_all")).expect(1);
    assertTrue(cli.out().contains("landed nowhere: base_model.model.model.layers.0.mlp.down_proj.lora_A.weight: "),
        cli.out());
    assertTrue(cli.out().contains("; nearest: "), cli.out());
    assertTrue(cli.out().contains("FAILED: keys landed nowhere"), cli.out());
  }

  @Test
  void doraIsNamed() {
    Cli cli = Cli.run("inspect", BASE, Fixtures.path("flux/adapters/dora/peft")).expect(1);
    assertTrue(cli.out().contains("lora_magnitude_vector"), cli.out());
  }

  @Test
  void json() {
    Map<String, Object> json =
        Cli.run("inspect", "--json", BASE, Fixtures.path("flux/adapters/r4/kohya.safetensors")).expect(0).json();
    assertEquals(List.of("command", "checkpoint", "adapters", "ok"), List.copyOf(json.keySet()));
    Map<String, Object> checkpoint = Json.object(json.get("checkpoint"), "checkpoint");
    assertEquals(List.of("path", "format", "linears", "notes"), List.copyOf(checkpoint.keySet()));
    List<?> linears = (List<?>) checkpoint.get("linears");
    assertEquals(36, linears.size());
    assertEquals(List.of("module", "n", "k", "format", "mode", "threshold", "bias"),
        List.copyOf(Json.object(linears.get(0), "linear").keySet()));
    assertEquals(Boolean.TRUE, json.get("ok"));
  }

  @Test
  void badUsage() {
    Cli.run("inspect").expectError("CHECKPOINT");
    Cli.run("inspect", BASE, "nowhere.safetensors").expectError("nowhere.safetensors");
  }
}
