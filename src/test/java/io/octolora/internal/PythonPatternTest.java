// SPDX-License-Identifier: Apache-2.0
package io.octolora.internal;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTimeoutPreemptively;
import static org.junit.jupiter.api.Assertions.assertTrue;

import io.octolora.FormatException;
import java.time.Duration;
import java.util.List;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.CsvSource;
import org.junit.jupiter.params.provider.ValueSource;

class PythonPatternTest {
  /** What Python's re.match gives. */
  @ParameterizedTest
  @CsvSource({"b, abc, false", "a, abc, true", "a$, abc, false", ".*c$, abc, true", "(a|b)\\1, bbc, true",
      "[^]a]x, bx, false", "[a-c]+, cab, true", "\\d+, 12, true", "a\\.b, a.b, true", "a\\.b, axb, false", "(?i)A|B, b, true",
      "(?i:A)b, aB, false", "(?:a|)(?:b|)$, ab, true", "(?!ab).*, abc, false", ".*(?<=b|c)$, abc, true",
      ".*(?<!c)$, abc, false", "[(|]a, |a, true", "\\(a\\|b\\), (a|b), true", "(a)(b)?\\2, aa, false",
      "(x?)\\1*y, y, true", "a|$, '', true", "(|a)$, '', true", "a?b, '', false"})
  void matchesFromTheStart(String regex, String text, boolean expected) {
    if (regex.startsWith("[^]")) {
      assertThrows(FormatException.class, () -> PythonPattern.compile(regex, "here")); // Java reads it differently
      return;
    }
    assertEquals(expected, PythonPattern.compile(regex, "here").matchesStart(text));
  }

  @ParameterizedTest
  @ValueSource(strings = {"(?P<x>a)", "(?P=x)", "[a&&b]", "[a[b]]", "\\Qa\\E", "\\p{L}", "\\h", "\\R", "\\z", "\\v",
      "[]a]", "(?<x>a)", "a$?", "\\b{g}a", "^*a",
      "(", "a{2,1}", "*"})
  void refusesWhatIsNotTheSameInBoth(String regex) {
    FormatException e = assertThrows(FormatException.class, () -> PythonPattern.compile(regex, "config: key"));
    assertTrue(e.getMessage().contains("config: key: regular expression " + regex), e.getMessage());
  }

  @Test
  void endlessBacktrackingEnds() {
    PythonPattern pattern = PythonPattern.compile(".*.*.*.*.*.*b", "config: key");
    FormatException e = assertThrows(FormatException.class, () -> pattern.matchesStart("a".repeat(100)));
    assertTrue(e.getMessage().contains("more than 1000000 steps"), e.getMessage());
  }

  /** At the end of the text Java's matcher tries all of these without reading a character. */
  @ParameterizedTest
  @ValueSource(strings = {"((((){999}){999}){999}){999}", ".*(OPTIONAL)x", ".*(ALTERNATIVE)x", ".*()(REFERENCE)x",
      "()\\1{2147483647}", "(.*\\.)?(OPTIONAL)$x"})
  void choicesOfNothingEnd(String regex) {
    PythonPattern pattern = PythonPattern.compile(regex.replace("OPTIONAL", "()?".repeat(40))
        .replace("ALTERNATIVE", "(|)".repeat(40)).replace("REFERENCE", "\\1?".repeat(40)), "config: key");
    for (String text : List.of("model.layers.0.q_proj", "")) {
      assertTimeoutPreemptively(Duration.ofSeconds(20), () -> assertThrows(FormatException.class,
          () -> pattern.matchesStart(text)));
    }
  }

  @Test
  void deepNestingEnds() {
    assertThrows(FormatException.class, () -> PythonPattern.compile("(".repeat(5000) + ")".repeat(5000),
        "config: key"));
  }
}
