// SPDX-License-Identifier: Apache-2.0
package io.octolora.quantize;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertNull;
import static org.junit.jupiter.api.Assertions.assertThrows;

import io.octolora.FormatException;
import java.util.List;
import java.util.Set;
import java.util.TreeSet;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.CsvSource;

class SkipRuleTest {
  private static final Set<String> MODULES = new TreeSet<>(List.of("proj_out", "blocks.0.proj_out", "blocks.0.ff.net.0",
      "blocks.10.ff.net.0", "lm_head", "encoder.wo"));

  private static String skipped(SkipRule rule) {
    return String.join(" ", MODULES.stream().filter(rule::skips).toList());
  }

  @ParameterizedTest
  @CsvSource({
      // diffusers and bitsandbytes: a last name, a part of the path with its dot, a whole path
      "BITSANDBYTES, true, proj_out, blocks.0.proj_out proj_out",
      "BITSANDBYTES, true, ff, blocks.0.ff.net.0 blocks.10.ff.net.0",
      "BITSANDBYTES, true, blocks.0, blocks.0.ff.net.0 blocks.0.proj_out",
      "BITSANDBYTES, true, blocks.0.ff.net.0, blocks.0.ff.net.0",
      // transformers: the start as a regular expression, in which a dot is any character, or the end
      "BITSANDBYTES, false, blocks.1, blocks.10.ff.net.0",
      "BITSANDBYTES, false, proj_out, blocks.0.proj_out proj_out",
      "BITSANDBYTES, false, 'blocks.\\d+.ff', blocks.0.ff.net.0 blocks.10.ff.net.0",
      // Quanto in diffusers knows last names alone, optimum-quanto shell patterns
      "QUANTO, true, proj_out, blocks.0.proj_out proj_out",
      "QUANTO, true, ff, ''",
      "QUANTO, false, *proj_out, blocks.0.proj_out proj_out",
      "QUANTO, false, blocks.?.*, blocks.0.ff.net.0 blocks.0.proj_out",
      "COMPRESSED_TENSORS, false, proj_out, proj_out",
      "COMPRESSED_TENSORS, false, re:.*proj_out, blocks.0.proj_out proj_out"})
  void patternsAreReadAsTheToolsDo(TargetFormat format, boolean diffusers, String pattern, String expected) {
    SkipRule rule = SkipRule.of(format, List.of(pattern), diffusers, "", MODULES);
    assertEquals(expected, skipped(rule));
    assertEquals(List.of(pattern), rule.written());
    assertEquals(expected.isEmpty() ? List.of(pattern) : List.of(), rule.unused());
  }

  @Test
  void defaults() {
    assertEquals("", skipped(SkipRule.of(TargetFormat.BITSANDBYTES, List.of(), true, "", MODULES)));
    assertEquals("", skipped(SkipRule.of(TargetFormat.QUANTO, List.of(), false, "", MODULES)));
    SkipRule transformers = SkipRule.of(TargetFormat.BITSANDBYTES, List.of(), false, "llama", MODULES);
    assertEquals("lm_head", skipped(transformers));
    assertNull(transformers.written());
    SkipRule compressed = SkipRule.of(TargetFormat.COMPRESSED_TENSORS, List.of(), false, "llama", MODULES);
    assertEquals("lm_head", skipped(compressed));
    assertEquals(List.of("lm_head"), compressed.written());
  }

  @Test
  void t5KeepsItsFeedForwardOutput() {
    assertEquals("encoder.wo lm_head",
        skipped(SkipRule.of(TargetFormat.BITSANDBYTES, List.of(), false, "t5", MODULES)));
    assertEquals("encoder.wo proj_out",
        skipped(SkipRule.of(TargetFormat.BITSANDBYTES, List.of("^proj_out"), false, "umt5", MODULES)));
  }

  @Test
  void badExpressionsAreNamed() {
    FormatException e = assertThrows(FormatException.class,
        () -> SkipRule.of(TargetFormat.BITSANDBYTES, List.of("(a"), false, "", MODULES));
    assertEquals(true, e.getMessage().startsWith("--skip: "), e.getMessage());
  }
}
