// SPDX-License-Identifier: Apache-2.0
package io.octolora.internal;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import io.octolora.FormatException;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.CsvSource;
import org.junit.jupiter.params.provider.ValueSource;

class PythonPatternTest {
  /** What Python's re.match gives. */
  @ParameterizedTest
  @CsvSource({"b, abc, false", "a, abc, true", "a$, abc, false", ".*c$, abc, true", "(a|b)\\1, bbc, true",
      "[^]a]x, bx, false", "[a-c]+, cab, true", "\\d+, 12, true", "a\\.b, a.b, true", "a\\.b, axb, false"})
  void matchesFromTheStart(String regex, String text, boolean expected) {
    if (regex.startsWith("[^]")) {
      assertThrows(FormatException.class, () -> PythonPattern.compile(regex, "here")); // Java reads it differently
      return;
    }
    assertEquals(expected, PythonPattern.compile(regex, "here").matchesStart(text));
  }

  @ParameterizedTest
  @ValueSource(strings = {"(?P<x>a)", "(?P=x)", "[a&&b]", "[a[b]]", "\\Qa\\E", "\\p{L}", "\\h", "\\R", "\\z", "\\v",
      "[]a]",
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

  @Test
  void deepNestingEnds() {
    assertThrows(FormatException.class, () -> PythonPattern.compile("(".repeat(5000) + ")".repeat(5000),
        "config: key"));
  }
}
