// SPDX-License-Identifier: Apache-2.0
package io.octolora.examples;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertTrue;

import io.octolora.Fixtures;
import io.octolora.adapter.LoraAdapter;
import io.octolora.checkpoint.Checkpoint;
import io.octolora.cli.Activations;
import io.octolora.cli.Verification;
import io.octolora.mapping.ModuleMap;
import io.octolora.oracle.Expectation.Deviation;
import io.octolora.oracle.FloatFormat;
import io.octolora.oracle.Oracle;
import io.octolora.oracle.OracleLinear;
import io.octolora.runtime.Device;
import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.List;
import java.util.regex.Matcher;
import java.util.regex.Pattern;
import org.junit.jupiter.api.Assumptions;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.CsvSource;

/** The examples of README.md are the ones that are compiled and run. */
class ReadmeTest {
  private static final Path ROOT = Path.of(System.getProperty("basedir", ""));

  @ParameterizedTest
  @CsvSource({"java,src/test/java/io/octolora/examples/ReadmeExample.java", "c,native/tests/readme_example.c"})
  void theExampleIsTheCompiledSource(String language, String source) throws IOException {
    Path readme = ROOT.resolve("README.md");
    boolean sources = Files.exists(readme) && Files.exists(ROOT.resolve(source));
    if (!sources) {
      System.out.println("SKIPPED: ReadmeTest: not run in the source tree, no README.md or no " + source);
    }
    Assumptions.assumeTrue(sources, "not in the source tree");
    Matcher block = Pattern.compile("^```" + language + "\n(.*?)^```$", Pattern.DOTALL | Pattern.MULTILINE)
        .matcher(Files.readString(readme));
    assertTrue(block.find(), "README.md has no ```" + language + " block");
    String marked = marked(Files.readString(ROOT.resolve(source)));
    assertEquals(marked, block.group(1), () -> "README.md's " + language + " example and " + source + " differ");
    assertTrue(marked.lines().count() <= 15, () -> "the example has grown to " + marked.lines().count() + " lines");
  }

  /** The lines between the markers, without the indentation they share. */
  private static String marked(String source) {
    Matcher part = Pattern.compile("^ *(?://|/\\*) README begin.*?\n(.*?)^ *(?://|/\\*) README end",
        Pattern.DOTALL | Pattern.MULTILINE).matcher(source);
    assertTrue(part.find(), "no README begin and README end in\n" + source);
    return part.group(1).stripTrailing().stripIndent() + "\n";
  }

  @Test
  void theExampleComputesWhatItSays() throws IOException {
    Path checkpoint = Fixtures.path("flux/base_bnb8");
    Path lora = Fixtures.path("flux/adapters/r4/diffusers_lora.safetensors");
    String module = "transformer_blocks.0.attn.to_q";
    int rows = 3;
    float[] x = Activations.random(1, rows, 128, FloatFormat.FLOAT32);
    float[] y = ReadmeExample.run(checkpoint, lora, x, rows);
    try (Checkpoint base = Checkpoint.open(checkpoint); LoraAdapter adapter = LoraAdapter.open(lora);
        Device device = Device.best()) {
      Verification.Weighted weighted = new Verification.Weighted(ModuleMap.of(base, adapter).delta(module), 0.8f);
      Deviation deviation = Oracle.evaluate(OracleLinear.of(base.linear(module)),
          List.of(Verification.plain(weighted)), x, rows, FloatFormat.FLOAT32, FloatFormat.FLOAT32,
          Verification.arithmetic(device)).compare(y);
      assertTrue(deviation.withinBound(), deviation::toString);
    }
  }
}
