// SPDX-License-Identifier: Apache-2.0
package io.octolora.cli;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertFalse;
import static org.junit.jupiter.api.Assertions.assertNotNull;
import static org.junit.jupiter.api.Assertions.assertNull;
import static org.junit.jupiter.api.Assertions.assertTrue;

import io.octolora.Fixtures;
import io.octolora.SafetensorsWriter;
import io.octolora.internal.Json;
import java.io.IOException;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.Arrays;
import java.util.List;
import java.util.Map;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.io.TempDir;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.CsvSource;

class VerifyCommandTest {
  private static final Path BASE = Fixtures.path("flux/base_bnb8");
  private static final Path R4 = Fixtures.path("flux/adapters/r4/peft");
  private static final Path R8 = Fixtures.path("flux/adapters/r8_attn_bf16/peft");

  @TempDir
  Path folder;

  private static Path golden(String name) {
    return Fixtures.golden("flux", name);
  }

  @Test
  void theMainJob() {
    Cli cli = Cli.run("verify", BASE, R4, "--golden", golden("bnb8__r4"), "--device", "cpu").expect(0);
    cli.expectTable("MODULE", "KEYS", "RANK", "SCALE").expectTable("MODULE", "FROM ORACLE", "FROM RECORDED", "/ BOUND");
    assertTrue(cli.out().contains("52 of 52 keys landed on 26 modules"), cli.out());
    assertEquals(26, cli.lines().stream().filter(line -> line.endsWith("  ok")).count(), cli.out());
    assertTrue(cli.lines().stream().anyMatch(line -> line.startsWith("device      cpu (")), cli.out());
    List<String> lines = cli.lines();
    assertTrue(lines.get(lines.size() - 1).startsWith("OK: 26 of 26 layers within bounds on cpu; at most 0."),
        cli.out());
    assertEquals("", cli.err());
  }

  @Test
  void everyAdaptedModuleIsShownWithItsKeys() {
    Cli cli = Cli.run("verify", BASE, R4, "--golden", golden("bnb8__r4"), "--device", "cpu", "--verbose").expect(0);
    for (String half : List.of("lora_A", "lora_B")) {
      for (String module : List.of("transformer_blocks.0.attn.to_q", "single_transformer_blocks.1.proj_out")) {
        String key = "base_model.model." + module + "." + half + ".weight";
        int at = cli.lines().indexOf(key);
        assertTrue(at >= 0 && cli.lines().get(at + 1).startsWith("  lands on " + module + ", rows 0..128, ranks 0..4"),
            key + " in\n" + cli.out());
      }
    }
  }

  @Test
  void weightsOfSeveralAdapters() {
    Path recording = golden("bnb8__r4+r8_attn_bf16");
    Cli.run("verify", BASE, R4 + "=0.7", R8 + "=0.4", "--golden", recording, "--device", "cpu").expect(0);
    Cli wrong = Cli.run("verify", BASE, R4 + "=0.4", R8 + "=0.7", "--golden", recording, "--device", "cpu").expect(1);
    assertTrue(wrong.out().contains("OUTSIDE"), wrong.out());
    String verdict = wrong.lines().get(wrong.lines().size() - 1);
    assertTrue(verdict.startsWith("FAILED: ") && verdict.contains("the recording was made with other adapters"),
        verdict);
    Cli.run("verify", BASE, R4, "--golden", recording, "--device", "cpu").expect(1);
  }

  @Test
  void thresholdOverride() {
    Path recording = golden("bnb8__r4__t0");
    Cli.run("verify", BASE, R4, "--golden", recording, "--threshold", "0", "--device", "cpu").expect(0);
    Cli.run("verify", BASE, R4, "--golden", recording, "--device", "cpu").expect(1);
  }

  @Test
  void quantoAndLlama() {
    Path quanto = Fixtures.path("flux/base_quanto_diffusers");
    Cli.run("verify", quanto, R4, "--golden", golden("quanto_diffusers__r4"), "--device", "cpu").expect(0);
    Cli llama = Cli.run("verify", Fixtures.path("llama/base_bnb8"), Fixtures.path("llama/adapters/r4_all"), "--golden",
        Fixtures.golden("llama", "bnb8__r4_all"), "--device", "cpu").expect(0);
    assertTrue(llama.out().contains("OK: 14 of 14 layers"), llama.out());
  }

  @Test
  void gguf() throws IOException {
    Path report = folder.resolve("gguf.html");
    Cli cli = Cli.run("verify", Fixtures.path("llama/base_gguf"), Fixtures.path("llama/adapters/r4_all"), "--base",
        Fixtures.path("llama/base_bf16"), "--report", report, "--device", "cpu").expect(0);
    assertTrue(cli.out().contains("OK: 12 of 12 layers within bounds on cpu"), cli.out());
    assertTrue(cli.out().contains("not run: model.layers.0.mlp.down_proj: the weight is F16, not int8"), cli.out());
    assertTrue(Files.readString(report).contains("GGUF Q8_0"));
    Cli.run("verify", Fixtures.path("flux/base_gguf"), "--device", "cpu").expect(0);
    Cli golden = Cli.run("verify", Fixtures.path("llama/base_gguf"), "--golden",
        Fixtures.golden("llama", "bnb8__none"), "--device", "cpu").expect(Main.BAD_INPUT);
    assertTrue(golden.err().contains("is GGUF Q8_0; recordings are understood of bitsandbytes"), golden.err());
  }

  @Test
  void withoutAdaptersTheBaseIsVerified() {
    Cli.run("verify", BASE, "--golden", golden("bnb8__none"), "--device", "cpu").expect(0);
    Cli made = Cli.run("verify", BASE, "--device", "cpu", "--rows", "3").expect(0);
    assertTrue(made.out().contains("OK: 36 of 36 layers"), made.out());
  }

  @Test
  void madeUpActivationsHaveOnlyTheOracle() {
    Cli cli = Cli.run("verify", BASE, R4, "--device", "cpu", "--rows", "4", "--seed", "5").expect(0);
    assertFalse(cli.out().contains("FROM RECORDED"), cli.out());
    assertTrue(cli.out().contains("4 rows, seed 5"), cli.out());
  }

  @Test
  void keysThatLandNowhereFail() {
    Cli cli = Cli.run("verify", Fixtures.path("llama/base_bnb8"), R4, "--device", "cpu").expect(1);
    assertTrue(cli.out().contains("landed nowhere: base_model.model.single_transformer_blocks.0.attn.to_k.lora_A"),
        cli.out());
    assertTrue(cli.out().contains("; nearest: "), cli.out());
    assertTrue(cli.lines().get(cli.lines().size() - 1).startsWith("FAILED: no layer was run"), cli.out());
  }

  @Test
  void anAdapterOfALayerThatIsNotInt8IsNotRun() throws IOException {
    Path adapter = new SafetensorsWriter().ramp("transformer.lm_head.lora_A.weight", 0.01f, 2, 64)
        .ramp("transformer.lm_head.lora_B.weight", 0.01f, 256, 2)
        .ramp("transformer.model.layers.0.self_attn.q_proj.lora_A.weight", 0.01f, 2, 64)
        .ramp("transformer.model.layers.0.self_attn.q_proj.lora_B.weight", 0.01f, 64, 2)
        .write(folder.resolve("head.safetensors"));
    Cli cli = Cli.run("verify", Fixtures.path("llama/base_bnb8"), adapter, "--device", "cpu").expect(0);
    assertTrue(cli.out().contains("not run: lm_head: the weight is BF16, not int8"), cli.out());
    assertTrue(cli.lines().get(cli.lines().size() - 1).endsWith("not int8 and so not run: 1"), cli.out());
  }

  @Test
  void jsonHasAStableShape() {
    Map<String, Object> json = Cli.run("verify", BASE, R4 + "=1", "--golden", golden("bnb8__r4"), "--device", "cpu",
        "--json").expect(0).json();
    assertEquals(List.of("command", "checkpoint", "threshold", "device", "recording", "adapters", "layers", "notRun",
        "ok", "verdict"), List.copyOf(json.keySet()));
    assertEquals("verify", json.get("command"));
    assertNull(json.get("threshold"));
    assertEquals(Boolean.TRUE, json.get("ok"));
    assertEquals(List.of("id", "name", "kernels", "cudaAbsent"), keys(json.get("device")));
    List<?> adapters = (List<?>) json.get("adapters");
    assertEquals(List.of("path", "format", "recognition", "weight", "keys", "mapped", "modules", "unmapped", "notes"),
        keys(adapters.get(0)));
    Map<String, Object> adapter = Json.object(adapters.get(0), "adapter");
    assertEquals(52L, adapter.get("keys"));
    assertEquals(52L, adapter.get("mapped"));
    assertEquals(List.of("module", "a", "b", "firstRow", "rows", "rotation", "firstRank", "rank", "scale", "bias"),
        keys(((List<?>) adapter.get("modules")).get(0)));
    List<?> layers = (List<?>) json.get("layers");
    assertEquals(26, layers.size());
    for (Object entry : layers) {
      Map<String, Object> layer = Json.object(entry, "layer");
      assertEquals(List.of("module", "n", "k", "rows", "ranks", "oracle", "recorded", "ok"), keys(layer));
      assertEquals(List.of(4L), layer.get("ranks"));
      for (String judge : List.of("oracle", "recorded")) {
        assertEquals(List.of("maxError", "boundRatio", "row", "channel"), keys(layer.get(judge)));
        double ratio = ((Number) Json.object(layer.get(judge), judge).get("boundRatio")).doubleValue();
        assertTrue(ratio > 0 && ratio <= 1, layer::toString);
      }
    }
  }

  @Test
  void jsonOfAFailureSaysWhatLandedNowhere() {
    Map<String, Object> json =
        Cli.run("verify", Fixtures.path("llama/base_bnb8"), R4, "--device", "cpu", "--json").expect(1).json();
    assertEquals(Boolean.FALSE, json.get("ok"));
    Map<String, Object> adapter = Json.object(((List<?>) json.get("adapters")).get(0), "adapter");
    assertEquals(0L, adapter.get("mapped"));
    assertEquals(52, ((List<?>) adapter.get("unmapped")).size());
    assertEquals(List.of("key", "why", "nearest", "rule", "remedy"),
        keys(((List<?>) adapter.get("unmapped")).get(0)));
  }

  private static List<String> keys(Object object) {
    assertNotNull(object);
    return List.copyOf(Json.object(object, "object").keySet());
  }

  // ---- Bad usage and bad input: status 2 and one line

  @Test
  void badUsage() {
    Cli.run().expectError("a command is needed");
    Cli.run("verify").expectError("CHECKPOINT");
    Cli.run("frobnicate").expectError("frobnicate");
    Cli.run("verify", BASE, R4, "--threshold", "-1").expectError("--threshold -1.0", "0 or above");
    Cli.run("verify", BASE, R4, "--threshold", "NaN").expectError("--threshold NaN");
    Cli.run("verify", BASE, R4, "--threshold", "six").expectError("six");
    Cli.run("verify", BASE, R4, "--device", "tpu").expectError("--device tpu", "cpu or cuda:N");
    Cli.run("verify", BASE, R4, "--device", "cuda:x").expectError("--device cuda:x");
    Cli.run("verify", BASE, R4, "--rows", "0").expectError("--rows 0");
    Cli.run("verify", BASE, R4 + "=1e99").expectError("1e99", "32-bit float");
    for (String scale : List.of("nan", "NaN", "-inf", "+Infinity")) {
      Cli.run("verify", BASE, R4 + "=" + scale).expectError("scale " + scale + " of " + R4, "expected a finite number");
    }
    Cli.run("verify", BASE, R4, "--nonsense").expectError("--nonsense");
    Cli.run("verify", Fixtures.path("flux/base_quanto_diffusers"), R4, "--threshold", "6", "--device", "cpu")
        .expectError("--threshold 6.0", "no layer with an outlier threshold");
  }

  @Test
  void moreRowsThanAnArrayHolds() throws IOException {
    Path wide = new SafetensorsWriter().bitsandbytes("wide", 1, 9000).write(folder.resolve("wide.safetensors"));
    Cli.run("verify", wide, "--device", "cpu", "--rows", 60000)
        .expectError("--rows 60000: expected at most 59652 for wide: ");
    Cli.run("verify", wide, "--device", "cpu", "--rows", 2).expect(0);
  }

  @Test
  void emptyPaths() {
    Cli.run("verify", "").expectError("CHECKPOINT", "the path is empty");
    Cli.run("verify", BASE, "").expectError("ADAPTER: the path is empty");
    Cli.run("verify", BASE, R4, "--golden", "").expectError("--golden", "the path is empty");
    Cli.run("verify", BASE, R4, "--report", "").expectError("--report", "the path is empty");
    Cli.run("inspect", "").expectError("CHECKPOINT", "the path is empty");
    Cli.run("quantize", BASE, "", "--format", "quanto").expectError("the path is empty");
  }

  @Test
  void reportsThatCannotBeWritten() {
    Cli.run("verify", BASE, R4, "--report", "/").expectError("--report /: a folder, expected the name of a file");
    Cli.run("verify", BASE, R4, "--report", folder).expectError("--report " + folder + ": a folder");
    Cli.run("verify", BASE, R4, "--report", "/dev/null")
        .expectError("--report /dev/null: a pipe, socket or device, expected the name of a file");
    Cli.run("verify", BASE, R4, "--report", folder.resolve("no/page.html"))
        .expectError("page.html: there is no folder " + folder.resolve("no"));
  }

  @ParameterizedTest
  @CsvSource({"lora_A.weight, 64, NaN", "lora_B.weight, 63, Infinity", "lora_B.bias, 1, -Infinity",
      "lora_magnitude_vector, 1, NaN"})
  void anAdapterWithoutNumbersIsRefused(String part, int at, float bad) throws IOException {
    String module = "transformer.model.layers.0.self_attn.q_proj.";
    Map<String, long[]> shapes = Map.of("lora_A.weight", new long[] {2, 64}, "lora_B.weight", new long[] {64, 2},
        part.startsWith("lora_magnitude") ? part : "lora_B.bias", new long[] {64});
    for (boolean broken : new boolean[] {false, true}) {
      SafetensorsWriter writer = new SafetensorsWriter();
      shapes.forEach((name, shape) -> {
        float[] values = new float[(int) Arrays.stream(shape).reduce(1, (a, b) -> a * b)];
        Arrays.fill(values, 0.01f);
        if (broken && name.equals(part)) {
          values[at] = bad;
        }
        writer.floats(module + name, shape, values);
      });
      Path adapter = writer.write(folder.resolve("adapter.safetensors"));
      Cli cli = Cli.run("verify", Fixtures.path("llama/base_bnb8"), adapter, "--device", "cpu");
      if (broken) {
        cli.expectError("adapter.safetensors", module + part, "element " + at, "is " + bad);
      } else {
        cli.expect(0);
      }
    }
  }

  @Test
  void missingAndHostileFiles() throws IOException {
    Cli.run("verify", folder.resolve("nowhere"), R4).expectError("nowhere");
    Cli.run("verify", BASE, folder.resolve("nowhere")).expectError("nowhere");
    Cli.run("verify", BASE, R4 + "=half").expectError("scale 'half' of " + R4, "expected a number");
    Cli.run("verify", folder, R4).expectError(folder.toString());
    Path empty = Files.createFile(folder.resolve("empty.safetensors"));
    Cli.run("verify", empty, R4).expectError("empty.safetensors");
    Cli.run("verify", BASE, empty).expectError("empty.safetensors");
    Cli.run("verify", BASE, R4, "--golden", empty).expectError("empty.safetensors");
    Path huge = Files.write(folder.resolve("huge.safetensors"), new byte[] {-1, -1, -1, -1, -1, -1, -1, 127, '{', '}'});
    Cli.run("verify", huge, R4).expectError("huge.safetensors");
    Path names = safetensors("escape.safetensors", "{\"\\u001b[2J\\nevil\":{\"dtype\":\"F32\",\"shape\":[1],"
        + "\"data_offsets\":[0,9]}}", 4);
    Cli escape = Cli.run("inspect", names);
    escape.expectError("escape.safetensors");
    assertFalse(escape.err().contains("\u001b"), escape.err());
  }

  @Test
  void badRecordings() throws IOException {
    Path good = golden("bnb8__r4");
    String json = Files.readString(Fixtures.goldenJson("flux", "bnb8__r4"));
    Path copy = Files.copy(good, folder.resolve("copy.safetensors"));
    Path description = folder.resolve("copy.json");
    recorded(copy).expectError("copy.safetensors", "copy.json");
    Files.writeString(description, "{");
    recorded(copy).expectError("copy.json");
    Files.writeString(description, "[]");
    recorded(copy).expectError("copy.json", "object");
    Files.writeString(description, "{}");
    recorded(copy).expectError("copy.json", "base");
    Files.writeString(description, json.replaceFirst("\"x\\.0\"", "\"x.99\""));
    recorded(copy).expectError("copy.json", "x.99");
    Files.writeString(description, json.replaceFirst("torch\\.float32", "torch.int4"));
    recorded(copy).expectError("copy.json", "torch.int4");
    Files.writeString(description, json.replaceFirst("\"module\": \"[^\"]*\"", "\"module\": \"no.such.module\""));
    recorded(copy).expectError("no.such.module");
    Cli.run("verify", Fixtures.path("flux/base_quanto_diffusers"), R4, "--golden", good, "--device", "cpu")
        .expect(2);
  }

  private static Cli recorded(Path golden) {
    return Cli.run("verify", BASE, R4, "--golden", golden, "--device", "cpu");
  }

  /** A file of this header and so many bytes of data. */
  private Path safetensors(String name, String header, int data) throws IOException {
    byte[] text = header.getBytes(StandardCharsets.UTF_8);
    java.nio.ByteBuffer bytes = java.nio.ByteBuffer.allocate(8 + text.length + data)
        .order(java.nio.ByteOrder.LITTLE_ENDIAN);
    bytes.putLong(text.length).put(text);
    return Files.write(folder.resolve(name), bytes.array());
  }

  @Test
  void aCheckpointWithoutInt8Layers() {
    Cli cli = Cli.run("verify", Fixtures.path("llama/base_bf16"), "--device", "cpu").expect(1);
    assertTrue(cli.out().contains("FAILED: no layer was run, as the checkpoint has none of int8"), cli.out());
  }

  @Test
  void stackTracesOnlyOnRequest() {
    Cli cli = Cli.run("verify", folder.resolve("nowhere"), R4, "--stacktrace").expect(2);
    assertTrue(cli.err().contains("\tat io.octolora."), cli.err());
  }

  @Test
  void coloursAndProgressOnlyOnATerminal() {
    Object[] args = {"verify", BASE, R4, "--golden", golden("bnb8__r4"), "--device", "cpu"};
    Cli plain = Cli.run(args).expect(0);
    assertFalse(plain.out().contains("\u001b") || plain.err().contains("\r"), plain.out());
    Cli seen = Cli.run(true, true, args).expect(0);
    assertTrue(seen.out().contains("\u001b[32mOK\u001b[0m"), seen.out());
    assertTrue(seen.err().contains("26/26"), seen.err());
    assertTrue(seen.err().endsWith("\r\u001b[K"), "the progress line is not cleared");
  }

  @Test
  void helpAndVersion() {
    assertTrue(Cli.run("--help").expect(0).out().contains("Exit status"));
    assertTrue(Cli.run("--version").expect(0).out().startsWith("octolora "));
    for (String command : List.of("inspect", "verify", "quantize")) {
      Cli help = Cli.run(command, "--help").expect(0);
      assertTrue(help.out().contains("Usage: octolora " + command + " ["), help.out());
      assertTrue(help.out().contains("Exit status"), help.out());
      help.lines().forEach(line -> assertTrue(line.length() <= 100, line));
      assertTrue(Cli.run(command, "--version").expect(0).out().startsWith("octolora "));
    }
    assertTrue(Cli.run("verify", "--help").out().contains("verify [OPTIONS] CHECKPOINT [ADAPTER[=SCALE]...]"));
  }
}
