// SPDX-License-Identifier: Apache-2.0
package io.octolora.cli;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertFalse;
import static org.junit.jupiter.api.Assertions.assertTrue;

import io.octolora.Fixtures;
import io.octolora.SafetensorsWriter;
import io.octolora.internal.Json;
import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.List;
import java.util.Map;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.Timeout;
import org.junit.jupiter.api.condition.DisabledOnOs;
import org.junit.jupiter.api.condition.OS;
import org.junit.jupiter.api.io.TempDir;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.ValueSource;

class InspectCommandTest {
  private static final Path BASE = Fixtures.path("flux/base_bnb8");

  @TempDir
  Path folder;

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

  @Test
  void gguf() {
    Cli cli = Cli.run("inspect", Fixtures.path("llama/base_gguf"), Fixtures.path("llama/adapters/r4_all")).expect(0);
    assertTrue(cli.out().contains("16 linears: GGUF Q8_0 (14), F16 (2)"), cli.out());
    assertTrue(cli.out().contains("read as     GGUF version 3, architecture llama: 14 of 21 tensors are Q8_0"),
        cli.out());
    assertTrue(cli.out().contains("note: "), cli.out());
    assertTrue(cli.lines().stream().anyMatch(
        line -> line.matches("model\\.layers\\.\\*\\.self_attn\\.q_proj +2 +64 +64 +GGUF Q8_0 +float \\(W8A16\\) +no")),
        cli.out());
    assertTrue(cli.out().endsWith("OK: every adapter key landed" + System.lineSeparator()), cli.out());
  }

  @Test
  void anAdapterAloneIsSaidToBeOne() {
    Cli cli = Cli.run("inspect", Fixtures.path("flux/adapters/r4/peft")).expect(0);
    assertTrue(cli.out().contains("note: this is an adapter, and needs its checkpoint before it: PEFT: 52 of 52 keys"),
        cli.out());
    assertFalse(Cli.run("inspect", Fixtures.path("llama/base_bf16")).expect(0).out().contains("note: "));
  }

  @Test
  void aFileWithoutLayersHasNoTable() {
    Cli cli = Cli.run("inspect", Fixtures.path("flux/golden/bnb8__r4.safetensors")).expect(0);
    assertTrue(cli.out().contains("  no linear layers"), cli.out());
    assertFalse(cli.out().contains("MODULE"), cli.out());
  }

  @ParameterizedTest
  @ValueSource(strings = {"r4/peft", "r4/diffusers_lora.safetensors", "r4/kohya.safetensors", "r4/bfl.safetensors",
      "r4/pytorch_lora_weights.safetensors", "shared/kohya.safetensors",
      "shared/bfl_diffusion_model_prefix.safetensors"})
  void everyKeyLands(String adapter) {
    Cli cli = Cli.run("inspect", BASE, Fixtures.path("flux/adapters/" + adapter)).expect(0)
        .expectTable("MODULE", "KEYS", "ROWS OF B", "RANKS", "RANK", "SCALE");
    assertTrue(cli.out().contains(" keys landed on 26 modules"), cli.out());
    assertTrue(cli.out().endsWith("OK: every adapter key landed" + System.lineSeparator()), cli.out());
  }

  /** A pipe without a writer: who opens it to read waits for ever. */
  @Test
  @DisabledOnOs(value = OS.WINDOWS, disabledReason = "no mkfifo")
  @Timeout(value = 60, threadMode = Timeout.ThreadMode.SEPARATE_THREAD)
  void pipesAreRefused() throws Exception {
    Path pipe = pipe("pipe.safetensors");
    Cli.run("inspect", pipe).expectError(pipe.toString(), "expected a regular file");
    Cli.run("inspect", BASE, pipe).expectError(pipe.toString(), "expected a regular file");
    Path index = pipe("model.safetensors.index.json");
    Cli.run("inspect", index).expectError(index.toString(), "expected a regular file");
    Path gguf = pipe("a/model.gguf");
    Cli.run("inspect", gguf).expectError(gguf.toString(), "expected a regular file");
    Cli.run("inspect", gguf.getParent()).expectError(gguf.toString(), "expected a regular file");
  }

  private Path pipe(String name) throws Exception {
    Path pipe = folder.resolve(name);
    Files.createDirectories(pipe.getParent());
    assertEquals(0, new ProcessBuilder("mkfifo", pipe.toString()).start().waitFor());
    return pipe;
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
    assertTrue(cli.out().endsWith("FAILED: 28 adapter keys landed nowhere and would be dropped: "
        + Fixtures.path("llama/adapters/r4_all") + " may be for another model"
        + System.lineSeparator()), cli.out());
  }

  @Test
  void aFailedMappingSaysHowToFixIt() throws IOException {
    Path adapter = twoPairs("transformer.transformer_blocks.0.attn.to_q", "transformer.transformer_blocks.0.atn.to_k");
    Cli cli = Cli.run("inspect", BASE, adapter).expect(1);
    assertTrue(cli.lines().stream().anyMatch(line -> line.matches("read as     .* keys are named like .*")), cli.out());
    assertTrue(cli.lines().stream().anyMatch(line -> line.startsWith(
        "landed nowhere: transformer.transformer_blocks.0.atn.to_k.lora_A.weight: the base has no such linear layer as "
        + "transformer_blocks.0.atn.to_k [128, 128]; nearest: transformer_blocks.0.attn.to_k [128, 128], ")
        && line.endsWith("; fix 1")), cli.out());
    assertTrue(cli.lines().stream().anyMatch(line -> line.startsWith("names were read as ")), cli.out());
    assertTrue(cli.lines().stream().anyMatch(line -> line.startsWith("fix 1, for 2 keys: --rename atn=attn ")),
        cli.out());
    assertTrue(cli.out().contains(
        "FAILED: 2 adapter keys landed nowhere and would be dropped (--lenient accepts that)"), cli.out());
    Map<String, Object> json = Cli.run("inspect", "--json", BASE, adapter).expect(1).json();
    Map<String, Object> view = Json.object(((List<?>) json.get("adapters")).get(0), "adapter");
    assertFalse(((String) view.get("recognition")).isEmpty());
    Map<String, Object> key = Json.object(((List<?>) view.get("unmapped")).get(0), "unmapped");
    assertEquals(List.of("key", "why", "nearest", "rule", "remedy"), List.copyOf(key.keySet()));
    assertTrue(((String) key.get("remedy")).startsWith("--rename atn=attn "), json.toString());

    Cli fixed = Cli.run("inspect", BASE, adapter, "--rename", "atn=attn").expect(0);
    assertTrue(fixed.out().contains("4 of 4 keys landed on 2 modules"), fixed.out());
    Cli run = Cli.run("verify", BASE, adapter, "--rename", "atn=attn", "--device", "cpu").expect(0);
    assertTrue(run.out().contains("OK: 2 of 2 layers within bounds"), run.out());
  }

  /** Each key says which of the fixes is its own. */
  @Test
  void fixesAreNumbered() throws IOException {
    SafetensorsWriter writer = new SafetensorsWriter();
    for (String module : List.of("mine.transformer_blocks.0.attn.to_q", "text_encoder.layers.0.fc1")) {
      writer.ramp(module + ".lora_A.weight", 0.001f, 2, 128).ramp(module + ".lora_B.weight", 0.001f, 128, 2);
    }
    writer.ramp("proj_out.lora_A.weight", 1, 2, 64).ramp("proj_out.lora_B.weight", 1, 16, 2);
    Path adapter = writer.write(folder.resolve("three.safetensors"));
    Cli cli = Cli.run("inspect", BASE, adapter).expect(1);
    for (String[] expected : new String[][] {
        {"mine.transformer_blocks.0.attn.to_q", "--rename FROM=TO (in Java: the renames of ModuleMap.of) reads FROM"},
        {"proj_out", "it was made for a layer of another size"},
        {"text_encoder.layers.0.fc1", "it is a text encoder's"}}) {
      String line = cli.lines().stream().filter(one -> one.startsWith("landed nowhere: " + expected[0] + ".lora_B."))
          .findFirst().orElseThrow();
      String fix = line.substring(line.lastIndexOf("fix "));
      assertTrue(cli.lines().stream().anyMatch(one -> one.startsWith(fix + ", for 2 keys: " + expected[1])),
          line + " in\n" + cli.out());
    }
    Cli renamed = Cli.run("inspect", BASE, adapter, "--rename", "mine.=", "--rename", "nobody=x").expect(1);
    assertTrue(renamed.out().contains("2 of 6 keys landed on 1 modules"), renamed.out());
    assertTrue(renamed.out().contains("note: rename nobody=x: no name of this adapter has nobody"), renamed.out());
    Cli.run("inspect", BASE, adapter, "--rename", "=x").expectError("a rename of the empty text");
    Cli.run("inspect", BASE, adapter, "--rename", "x").expectError("--rename", "x");
  }

  @Test
  void whatLandsNowhereMayBeAccepted() throws IOException {
    Path partly = twoPairs("transformer.transformer_blocks.0.attn.to_q", "transformer.transformer_blocks.9.attn.to_k");
    Cli cli = Cli.run("inspect", "--lenient", BASE, partly).expect(0);
    assertTrue(cli.out().contains("OK: 2 adapter keys left out, as asked"), cli.out());
    Cli verified = Cli.run("verify", "--lenient", BASE, partly, "--device", "cpu").expect(0);
    assertTrue(verified.out().contains("OK: 1 of 1 layers within bounds"), verified.out());
    assertTrue(verified.out().contains("2 adapter keys left out, as asked"), verified.out());
    Cli.run("verify", BASE, partly, "--device", "cpu").expect(1);
    // an adapter without any effect is no success
    Cli.run("inspect", "--lenient", BASE, Fixtures.path("llama/adapters/r4_all")).expect(1);
  }

  private Path twoPairs(String... modules) throws IOException {
    SafetensorsWriter writer = new SafetensorsWriter();
    for (String module : modules) {
      writer.ramp(module + ".lora_A.weight", 0.001f, 2, 128).ramp(module + ".lora_B.weight", 0.001f, 128, 2);
    }
    return writer.write(folder.resolve("adapter.safetensors"));
  }

  @Test
  void magnitudesOfDoraAreMapped() {
    Cli cli = Cli.run("inspect", BASE, Fixtures.path("flux/adapters/dora/peft")).expect(0);
    assertTrue(cli.out().contains("lora_magnitude_vector"), cli.out());
  }

  @Test
  void json() {
    Map<String, Object> json =
        Cli.run("inspect", "--json", BASE, Fixtures.path("flux/adapters/r4/kohya.safetensors")).expect(0).json();
    assertEquals(List.of("command", "checkpoint", "adapters", "ok"), List.copyOf(json.keySet()));
    Map<String, Object> checkpoint = Json.object(json.get("checkpoint"), "checkpoint");
    assertEquals(List.of("path", "format", "recognition", "linears", "notes"), List.copyOf(checkpoint.keySet()));
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
