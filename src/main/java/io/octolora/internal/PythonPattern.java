// SPDX-License-Identifier: Apache-2.0
package io.octolora.internal;

import io.octolora.FormatException;
import io.octolora.Status;
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
    refuseOtherSyntax(regex, where);
    try {
      return new PythonPattern(Pattern.compile(regex, Pattern.UNICODE_CHARACTER_CLASS), regex, where);
    } catch (PatternSyntaxException e) {
      throw new FormatException("%s: regular expression %s: %s".formatted(where, regex, e.getDescription()), e);
    } catch (StackOverflowError e) {
      throw new FormatException("%s: regular expression %s is nested too deeply".formatted(where, regex), e);
    }
  }

  /** Python's {@code re.match}: whether a match begins at the start of the text, wherever it ends. */
  public boolean matchesStart(String text) {
    try {
      Matcher matcher = pattern.matcher(new Counted(text, new int[] {MAX_STEPS}));
      return matcher.lookingAt();
    } catch (TooManySteps e) {
      throw new FormatException(Status.INVALID_ARGUMENT,
          "%s: regular expression %s takes more than %d steps on %s".formatted(where, regex, MAX_STEPS, text));
    } catch (StackOverflowError e) {
      throw new FormatException("%s: regular expression %s recurses too deeply on %s".formatted(where, regex, text), e);
    }
  }

  private static void refuseOtherSyntax(String regex, String where) {
    boolean inClass = false;
    for (int i = 0; i < regex.length(); i++) {
      char c = regex.charAt(i);
      boolean bad = false;
      if (c == '\\' && i + 1 < regex.length()) {
        char escaped = regex.charAt(++i);
        bad = Character.isLetter(escaped) && COMMON_ESCAPES.indexOf(escaped) < 0;
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
      } else {
        bad = regex.startsWith("(?P", i);
      }
      if (bad) {
        throw new FormatException(Status.UNSUPPORTED,
            "%s: regular expression %s uses syntax at character %d that is not the same in Java as in Python".formatted(
                where, regex, i));
      }
    }
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
