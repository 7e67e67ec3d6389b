// SPDX-License-Identifier: Apache-2.0
package io.octolora.quantize;

import io.octolora.internal.PythonPattern;
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
  private final List<String> unused;

  private SkipRule(Predicate<String> skipped, @Nullable List<String> written, List<String> unused) {
    this.skipped = skipped;
    this.written = written;
    this.unused = unused;
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
      return new SkipRule(any(ignored, SkipRule::compressedTensors), ignored,
          unused(patterns, SkipRule::compressedTensors, modules));
    }
    List<String> written = patterns.isEmpty() ? null : patterns;
    if (format == TargetFormat.QUANTO) {
      Reading reading = diffusers ? SkipRule::leafName : ShellPattern::new;
      return new SkipRule(any(patterns, reading), written, unused(patterns, reading, modules));
    }
    if (diffusers) {
      return new SkipRule(any(patterns, SkipRule::diffusersBitsandbytes), written,
          unused(patterns, SkipRule::diffusersBitsandbytes, modules));
    }
    Predicate<String> listed = patterns.isEmpty() ? module -> HEADS.contains(leaf(module))
        : any(patterns, SkipRule::transformersBitsandbytes);
    String kept = KEPT.get(modelType);
    return new SkipRule(kept == null ? listed : listed.or(module -> leaf(module).equals(kept)), written,
        unused(patterns, SkipRule::transformersBitsandbytes, modules));
  }

  boolean skips(String module) {
    return skipped.test(module);
  }

  /** For the configuration; null stands for the default. */
  @Nullable List<String> written() {
    return written;
  }

  /** What the user gave and no module fits: the tools ignore it silently. */
  List<String> unused() {
    return unused;
  }

  private static List<String> unused(List<String> patterns, Reading reading, Set<String> modules) {
    return patterns.stream().filter(item -> modules.stream().noneMatch(reading.of(item))).toList();
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

  private static String leaf(String module) {
    return module.substring(module.lastIndexOf('.') + 1);
  }
}
