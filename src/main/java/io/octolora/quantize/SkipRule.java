// SPDX-License-Identifier: Apache-2.0
package io.octolora.quantize;

import io.octolora.internal.PythonPattern;
import java.nio.file.FileSystems;
import java.nio.file.Path;
import java.nio.file.PathMatcher;
import java.util.ArrayList;
import java.util.List;
import java.util.Map;
import java.util.Set;
import java.util.function.Predicate;
import org.jetbrains.annotations.Nullable;

/** Which layers stay as they are: the rules by which the format's own tools read their skip lists. */
final class SkipRule {
  /** Output embeddings, which transformers leaves alone unless it is given a list. */
  private static final Set<String> HEADS = Set.of("lm_head", "embed_out");
  /** Models of transformers with modules that stay in fp32, list or not: the feed-forward output of T5. */
  private static final Map<String, String> KEPT = Map.of("t5", "wo", "mt5", "wo", "umt5", "wo");

  private final Predicate<String> skipped;
  private final @Nullable List<String> written;

  private SkipRule(Predicate<String> skipped, @Nullable List<String> written) {
    this.skipped = skipped;
    this.written = written;
  }

  /**
   * @param patterns as the user gave them; empty: the tool's default
   * @param modelType {@code model_type} of transformers' config.json, empty for diffusers or where there is none
   * @param modules all candidates
   */
  static SkipRule of(TargetFormat format, List<String> patterns, boolean diffusers, String modelType,
      Set<String> modules) {
    if (format == TargetFormat.COMPRESSED_TENSORS) {
      List<String> ignored = patterns.isEmpty() && !diffusers
          ? modules.stream().filter(module -> HEADS.contains(leaf(module))).toList() : patterns;
      return new SkipRule(any(ignored, SkipRule::compressedTensors), ignored);
    }
    List<String> written = patterns.isEmpty() ? null : patterns;
    if (format == TargetFormat.QUANTO) {
      return new SkipRule(any(patterns, diffusers ? SkipRule::leafName : SkipRule::glob), written);
    }
    if (diffusers) {
      return new SkipRule(any(patterns, SkipRule::diffusersBitsandbytes), written);
    }
    Predicate<String> listed = patterns.isEmpty() ? module -> HEADS.contains(leaf(module))
        : any(patterns, SkipRule::transformersBitsandbytes);
    String kept = KEPT.get(modelType);
    return new SkipRule(kept == null ? listed : listed.or(module -> leaf(module).equals(kept)), written);
  }

  boolean skips(String module) {
    return skipped.test(module);
  }

  /** For the configuration; null stands for the default. */
  @Nullable List<String> written() {
    return written;
  }

  private interface Reading {
    Predicate<String> of(String item);
  }

  private static Predicate<String> any(List<String> items, Reading reading) {
    List<Predicate<String>> tests = new ArrayList<>();
    items.forEach(item -> tests.add(reading.of(item)));
    return module -> tests.stream().anyMatch(test -> test.test(module));
  }

  private static Predicate<String> leafName(String item) {
    return module -> leaf(module).equals(item);
  }

  private static Predicate<String> diffusersBitsandbytes(String item) {
    return module -> leaf(module).equals(item) || module.contains(item + ".") || module.equals(item);
  }

  /** The start of the path by a regular expression, or its end by text. */
  private static Predicate<String> transformersBitsandbytes(String item) {
    PythonPattern pattern = PythonPattern.compile(item, "--skip");
    return module -> pattern.matchesStart(module) || module.endsWith(item);
  }

  private static Predicate<String> compressedTensors(String item) {
    if (item.startsWith("re:")) {
      PythonPattern pattern = PythonPattern.compile(item.substring("re:".length()), "--skip");
      return pattern::matchesStart;
    }
    return item::equals;
  }

  /** Module paths have no slashes, so a shell pattern for file names reads them as Python's fnmatch does. */
  private static Predicate<String> glob(String item) {
    PathMatcher matcher = FileSystems.getDefault().getPathMatcher("glob:" + item);
    return module -> matcher.matches(Path.of(module));
  }

  private static String leaf(String module) {
    return module.substring(module.lastIndexOf('.') + 1);
  }
}
