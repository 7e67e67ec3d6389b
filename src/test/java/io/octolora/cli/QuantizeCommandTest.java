// SPDX-License-Identifier: Apache-2.0
package io.octolora.cli;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertFalse;
import static org.junit.jupiter.api.Assertions.assertTrue;

import io.octolora.Fixtures;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.List;
import java.util.Map;
import java.util.stream.Stream;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.io.TempDir;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.ValueSource;

class QuantizeCommandTest {
  private static final Path LLAMA = Fixtures.path("llama/base_bf16");

  @TempDir
  Path folder;

  @Test
  void theMainJob() {
    Path out = folder.resolve("int8");
    Cli cli = Cli.run("quantize", LLAMA, out, "--format", "bitsandbytes").expect(0);
    assertEquals("left as they are: lm_head, model.embed_tokens", cli.lines().get(0));
    assertTrue(cli.lines().get(1).matches("OK: .*int8: 14 layers in bitsandbytes int8, 7 tensors copied; "
        + "168 kB from 250 kB in 1 file, \\d+\\.\\d s"), cli.out());
    assertEquals("", cli.err());
    Cli.run("verify", out, Fixtures.path("llama/adapters/r4_all"), "--golden",
        Fixtures.golden("llama", "bnb8__r4_all"), "--device", "cpu").expect(0);
  }

  @Test
  void theResultOfQuantoRuns() {
    Path out = folder.resolve("int8");
    Cli.run("quantize", Fixtures.path("flux/base_bf16_part"), out, "--format", "quanto", "-v").expect(0);
    Cli cli = Cli.run("verify", out, "--device", "cpu", "--rows", "2").expect(0);
    assertTrue(cli.out().contains("OK: 21 of 21 layers within bounds"), cli.out());
  }

  @Test
  void optionsReachTheConfiguration() throws Exception {
    Path out = folder.resolve("int8");
    Cli cli = Cli.run("quantize", LLAMA, out, "--format", "bitsandbytes", "--skip", "v_proj", "--skip", "lm_head",
        "--threshold", "4.5", "--max-shard-size", "50kB", "-v").expect(0);
    assertTrue(cli.lines().contains("float: model.layers.1.self_attn.v_proj"), cli.out());
    assertTrue(cli.lines().contains("int8:  model.layers.1.self_attn.q_proj"), cli.out());
    String config = Files.readString(out.resolve("config.json"));
    assertTrue(config.contains("\"llm_int8_threshold\": 4.5,"), config);
    assertTrue(config.contains("\"llm_int8_skip_modules\": [\n      \"v_proj\",\n      \"lm_head\"\n    ]"), config);
    assertTrue(Files.exists(out.resolve("model.safetensors.index.json")));
    assertTrue(Cli.run("inspect", out).expect(0).out().contains("outlier threshold 4.5"));
  }

  @Test
  void json() {
    Map<String, Object> json = Cli.run("quantize", LLAMA, folder.resolve("int8"), "--format", "compressed-tensors",
        "--json").expect(0).json();
    assertEquals(List.of("command", "path", "format", "int8", "float", "unusedSkips", "copied", "files",
        "resumedFiles", "sourceBytes", "writtenBytes", "seconds", "ok"), List.copyOf(json.keySet()));
    assertEquals(14, ((List<?>) json.get("int8")).size());
    assertEquals(250_496L, json.get("sourceBytes"));
  }

  @Test
  void aFileInPlaceOfTheWorkingFolderIsNamed() throws Exception {
    Path file = Files.createFile(folder.resolve("int8.partial"));
    Cli.run("quantize", LLAMA, folder.resolve("int8"), "--format", "quanto", "--resume")
        .expectError(file + ": exists and is no folder");
  }

  @Test
  void aPatternThatFitsNothingIsSaid() {
    Cli cli = Cli.run("quantize", LLAMA, folder.resolve("int8"), "--format", "quanto", "--skip", "*.q_proj", "--skip",
        "q_proj").expect(0);
    assertTrue(cli.lines().contains("note: --skip q_proj fits no layer"), cli.out());
    assertFalse(cli.out().contains("--skip *.q_proj"), cli.out());
    Map<String, Object> json = Cli.run("quantize", LLAMA, folder.resolve("other"), "--format", "compressed-tensors",
        "--skip", "lm_head", "--skip", "[", "--json").expect(0).json();
    assertEquals(List.of("["), json.get("unusedSkips"));
  }

  @Test
  void aBarIsDrawnForThoseWhoWatch() {
    Cli cli = Cli.run(false, true, new Object[] {"quantize", LLAMA, folder.resolve("int8"), "--format", "quanto"})
        .expect(0);
    assertTrue(cli.err().contains(" of 250 kB"), cli.err());
    assertTrue(cli.err().endsWith("\r\u001b[K"), "the bar is cleared");
    assertFalse(cli.out().contains("\r"), cli.out());
  }

  @Test
  void theBarSaysWhatIsLeft() {
    assertEquals("[████████████░░░░░░░░░░░░]  50 %  2.00 GB of 4.00 GB, 1.00 GB/s, 2 s left  ",
        ProgressBar.line(2_000_000_000L, 4_000_000_000L, 1.5, 500_000_000L));
    assertEquals("[░░░░░░░░░░░░░░░░░░░░░░░░]   0 %  0 B of 1.23 kB  ", ProgressBar.line(0, 1234, 0, 0));
    assertEquals("999 B", ProgressBar.size(999));
    assertEquals("1.00 MB", ProgressBar.size(999_999));
    assertEquals("12.3 MB", ProgressBar.size(12_345_678));
    assertEquals("123 GB", ProgressBar.size(123_456_789_012L));
  }

  @Test
  void badUsage() {
    Path out = folder.resolve("int8");
    Cli.run("quantize", LLAMA, out).expectError("--format");
    Cli.run("quantize", LLAMA, out, "--format", "gguf").expectError("--format gguf", "bitsandbytes, quanto");
    Cli.run("quantize", LLAMA, out, "--format", "quanto", "--threshold", "3").expectError("no outlier threshold");
    Cli.run("quantize", LLAMA, out, "--format", "bitsandbytes", "--threshold", "-1").expectError("0 or above");
    Cli.run("quantize", folder.resolve("nowhere"), out, "--format", "quanto").expectError("nowhere");
    Cli.run("quantize", Fixtures.path("llama/base_bnb8"), out, "--format", "quanto").expectError("already");
    Cli.run("quantize", Fixtures.path("llama/base_gguf"), out, "--format", "quanto").expectError("a GGUF file");
    assertFalse(Files.exists(out));
  }

  @ParameterizedTest
  @ValueSource(strings = {"0", "0GB", "x", "-1GB", "1iB", "9999999999TB", "GB"})
  void badSizes(String size) {
    Cli.run("quantize", LLAMA, folder.resolve("int8"), "--format", "quanto", "--max-shard-size=" + size)
        .expectError("--max-shard-size " + size, "5GB");
  }

  @Test
  void anUnfinishedRunIsContinuedOnRequest() throws Exception {
    Path out = folder.resolve("int8");
    Path partial = Files.createDirectory(folder.resolve("int8.partial"));
    Files.writeString(partial.resolve("model-00001-of-00009.safetensors.unfinished"), "half");
    Cli.run("quantize", LLAMA, out, "--format", "quanto").expectError("int8.partial", "resume");
    Cli.run("quantize", LLAMA, out, "--format", "quanto", "--resume").expect(0);
    assertFalse(Files.exists(partial));
    try (Stream<Path> files = Files.list(out)) {
      assertEquals(List.of("config.json", "generation_config.json", "model.safetensors", "quanto_qmap.json"),
          files.map(file -> file.getFileName().toString()).sorted().toList());
    }
  }
}
