// SPDX-License-Identifier: Apache-2.0
package io.octolora.quantize;

import static org.junit.jupiter.api.Assertions.assertEquals;

import java.util.List;
import java.util.stream.Stream;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.Arguments;
import org.junit.jupiter.params.provider.MethodSource;

class ShellPatternTest {
  private static final List<String> TEXTS = List.of("", "a", "b", "[", "]", "-", "^", "ac", "abc", "a[", "a.c", "q",
      "k", "{q,k}", "x.q.k", "bx", "blocks.0.attn.to_q", "blocks.0.attn.to_v", "[]", "[!]", "e", "\\", "\\x", "&",
      "a\\", "qk\nq");

  /** What Python's fnmatch.fnmatchcase takes of them. */
  static Stream<Arguments> patterns() {
    return Stream.of(
        Arguments.of("*", TEXTS),
        Arguments.of("?", List.of("a", "b", "[", "]", "-", "^", "q", "k", "e", "\\", "&")),
        Arguments.of("[", List.of("[")),
        Arguments.of("a[", List.of("a[")),
        Arguments.of("[]", List.of("[]")),
        Arguments.of("[!]", List.of("[!]")),
        Arguments.of("[]a]", List.of("a", "]")),
        Arguments.of("[!]a]", List.of("b", "[", "-", "^", "q", "k", "e", "\\", "&")),
        Arguments.of("[a-c]", List.of("a", "b")),
        Arguments.of("[!a-c]", List.of("[", "]", "-", "^", "q", "k", "e", "\\", "&")),
        Arguments.of("[a-]", List.of("a", "-")),
        Arguments.of("[-a]", List.of("a", "-")),
        Arguments.of("[a-c-e]", List.of("a", "b", "-", "e")),
        Arguments.of("[c-a]", List.of()),
        Arguments.of("[!c-a]x", List.of("bx", "\\x")),
        Arguments.of("{q,k}", List.of("{q,k}")),
        Arguments.of("*q*k*", List.of("{q,k}", "x.q.k", "qk\nq")),
        Arguments.of("a?c", List.of("abc", "a.c")),
        Arguments.of("a*c", List.of("ac", "abc", "a.c")),
        Arguments.of("[[]", List.of("[")),
        Arguments.of("[^a]", List.of("a", "^")),
        Arguments.of("\\*", List.of("\\", "\\x")),
        Arguments.of("*.attn.to_[qk]", List.of("blocks.0.attn.to_q")),
        Arguments.of("**", TEXTS),
        Arguments.of("[a&&b]", List.of("a", "b", "&")),
        Arguments.of("a\\", List.of("a\\")));
  }

  @ParameterizedTest(name = "{0}")
  @MethodSource("patterns")
  void matchesWhatPythonDoes(String pattern, List<String> expected) {
    assertEquals(expected, TEXTS.stream().filter(new ShellPattern(pattern)).toList());
  }
}
