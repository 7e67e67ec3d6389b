// SPDX-License-Identifier: Apache-2.0
package io.octolora.internal;

import io.octolora.FormatException;
import io.octolora.Status;
import java.util.List;
import java.util.regex.Matcher;
import java.util.regex.Pattern;
import java.util.regex.PatternSyntaxException;

/**
 * A regular expression of Python's re module, as configuration files contain them. What Java reads in another way than
 * Python is refused, and so is a match that takes too many steps.
 */
public final class PythonPattern {
  private static final int MAX_LENGTH = 4096;
  private static final int MAX_STEPS = 1_000_000;
  /** Escapes by a letter that mean the same in both; \Z is close: Java also stops before a last line break. */
  private static final String COMMON_ESCAPES = "dDwWsSbBAZnrtfaxu";
  private static final String QUANTIFIERS = "?*+{";
  /**
   * True everywhere, and reads a character that follows or comes before. At the end of the text Java's matcher reads
   * nothing, and alternatives that match nothing would multiply there without a step that is counted.
   */
  private static final String STEP = "(?=(?s:.)|(?<=(?s:.)))";

  private final Pattern pattern;
  private final String regex;
  private final String where;

  private PythonPattern(Pattern pattern, String regex, String where) {
    this.pattern = pattern;
    this.regex = regex;
    this.where = where;
  }

  /** @throws FormatException naming the place and the expression if it cannot be used */
  public static PythonPattern compile(String regex, String where) {
    if (regex.length() > MAX_LENGTH) {
      throw new FormatException("%s: a regular expression of %d characters, expected at most %d".formatted(where,
          regex.length(), MAX_LENGTH));
    }
    String counted = counted(regex, where);
    try {
      return new PythonPattern(Pattern.compile(counted, Pattern.UNICODE_CHARACTER_CLASS), regex, where);
    } catch (PatternSyntaxException e) {
      throw new FormatException("%s: regular expression %s: %s".formatted(where, regex, e.getDescription()), e);
    } catch (StackOverflowError e) {
      throw new FormatException("%s: regular expression %s is nested too deeply".formatted(where, regex), e);
    }
  }

  /** Python's {@code re.match}: whether a match begins at the start of the text, wherever it ends. */
  public boolean matchesStart(String text) {
    try {
      Matcher matcher = pattern.matcher(new Counted(text.isEmpty() ? "\n" : text, new int[] {MAX_STEPS}));
      if (text.isEmpty()) {
        matcher.region(0, 0).useTransparentBounds(true); // STEP finds a character behind the end
      }
      return matcher.lookingAt();
    } catch (TooManySteps e) {
      throw new FormatException(Status.INVALID_ARGUMENT,
          "%s: regular expression %s takes more than %d steps on %s".formatted(where, regex, MAX_STEPS, text));
    } catch (StackOverflowError e) {
      throw new FormatException("%s: regular expression %s recurses too deeply on %s".formatted(where, regex, text), e);
    }
  }

  /** The same expression with a {@link #STEP} at the start of every alternative and before every back reference. */
  private static String counted(String regex, String where) {
    StringBuilder counted = new StringBuilder();
    boolean inClass = false;
    boolean assertion = false; // of a place, which Python does not repeat
    for (int i = 0; i < regex.length(); i++) {
      int start = i;
      char c = regex.charAt(i);
      boolean bad = assertion && QUANTIFIERS.indexOf(c) >= 0;
      assertion = false;
      if (c == '\\' && i + 1 < regex.length()) {
        char escaped = regex.charAt(++i);
        bad |= Character.isLetter(escaped) && COMMON_ESCAPES.indexOf(escaped) < 0;
        assertion = !inClass && "bBAZ".indexOf(escaped) >= 0;
        if (!inClass && isDigit(escaped)) {
          while (i + 1 < regex.length() && isDigit(regex.charAt(i + 1))) {
            i++;
          }
          counted.append("(?:").append(STEP).append(regex, start, i + 1).append(')');
          continue;
        }
      } else if (inClass) {
        bad = c == '[' || regex.startsWith("&&", i); // nested classes and intersections are Java's alone
        inClass = c != ']';
      } else if (c == '[') {
        inClass = true;
        if (regex.startsWith("^", i + 1)) {
          i++;
        }
        if (regex.startsWith("]", i + 1)) {
          i++; // a closing bracket in first place is a plain character in Python
          bad = true;
        }
      } else if (c == '(') {
        i = openingEnd(regex, i);
        bad |= i < 0;
      } else {
        assertion = c == '^' || c == '$';
      }
      if (bad) {
        throw new FormatException(Status.UNSUPPORTED,
            "%s: regular expression %s uses syntax at character %d that is not the same in Java as in Python".formatted(
                where, regex, start));
      }
      counted.append(regex, start, i + 1);
      boolean flags = c == '(' && regex.charAt(i) == ')';
      if (!inClass && !flags && (c == '(' || c == '|')) {
        counted.append(STEP);
      }
    }
    return counted.toString();
  }

  /** The last character of what opens a group, "(" or "(?:" and so on, or of "(?i)"; -1 if Java alone reads it. */
  private static int openingEnd(String regex, int at) {
    if (!regex.startsWith("(?", at)) {
      return at;
    }
    for (String opening : List.of("(?:", "(?=", "(?!", "(?>", "(?<=", "(?<!")) {
      if (regex.startsWith(opening, at)) {
        return at + opening.length() - 1;
      }
    }
    int end = at + 2;
    while (end < regex.length() && (Character.isLetter(regex.charAt(end)) || regex.charAt(end) == '-')) {
      end++;
    }
    boolean python = regex.startsWith("(?P", at);
    return !python && end < regex.length() && (regex.charAt(end) == ':' || regex.charAt(end) == ')') ? end : -1;
  }

  private static boolean isDigit(char c) {
    return c >= '0' && c <= '9';
  }

  private static final class TooManySteps extends RuntimeException {
    private static final long serialVersionUID = 1;

    TooManySteps() {
      super(null, null, false, false);
    }
  }

  /** Counts the characters a matcher looks at: catastrophic backtracking ends in an exception. */
  private record Counted(CharSequence text, int[] left) implements CharSequence {
    @Override
    public int length() {
      return text.length();
    }

    @Override
    public char charAt(int index) {
      if (--left[0] < 0) {
        throw new TooManySteps();
      }
      return text.charAt(index);
    }

    @Override
    public CharSequence subSequence(int start, int end) {
      return new Counted(text.subSequence(start, end), left);
    }

    @Override
    public String toString() {
      return text.toString();
    }
  }
}
