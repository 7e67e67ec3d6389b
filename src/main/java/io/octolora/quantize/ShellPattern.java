// SPDX-License-Identifier: Apache-2.0
package io.octolora.quantize;

import java.util.ArrayList;
import java.util.List;
import java.util.function.Predicate;

/**
 * A shell pattern as Python's {@code fnmatch} reads it: {@code *} is any text, {@code ?} one character, {@code [seq]}
 * one of these and {@code [!seq]} one of the others, with ranges. All else stands for itself, a {@code [} that is not
 * closed and braces too, and so every text is a pattern.
 */
final class ShellPattern implements Predicate<String> {
  /** One character of the text; null for a star. */
  private final List<Predicate<Character>> parts = new ArrayList<>();

  ShellPattern(String pattern) {
    for (int i = 0; i < pattern.length(); ) {
      char c = pattern.charAt(i++);
      int end = c == '[' ? closing(pattern, i) : -1;
      if (c == '*') {
        parts.add(null);
      } else if (c == '?') {
        parts.add(any -> true);
      } else if (end >= 0) {
        parts.add(set(pattern.substring(i, end)));
        i = end + 1;
      } else {
        parts.add(one -> one == c);
      }
    }
  }

  /** The bracket that closes a set whose first character is at from; one in first place is of the set. -1: none. */
  private static int closing(String pattern, int from) {
    int first = pattern.startsWith("!", from) ? from + 1 : from;
    return pattern.indexOf(']', first + 1);
  }

  private static Predicate<Character> set(String text) {
    boolean others = text.startsWith("!");
    List<Predicate<Character>> members = new ArrayList<>();
    for (int i = others ? 1 : 0; i < text.length(); ) {
      char first = text.charAt(i);
      boolean range = i + 2 < text.length() && text.charAt(i + 1) == '-';
      char last = range ? text.charAt(i + 2) : first;
      members.add(one -> first <= one && one <= last);
      i += range ? 3 : 1;
    }
    return one -> others != members.stream().anyMatch(member -> member.test(one));
  }

  /** Whether it is a pattern of the whole text. */
  @Override
  public boolean test(String text) {
    int part = 0;
    int at = 0;
    int star = -1; // the last one, and where the text that it stands for ends so far
    int starEnd = 0;
    while (at < text.length()) {
      if (part < parts.size() && parts.get(part) == null) {
        star = part++;
        starEnd = at;
      } else if (part < parts.size() && parts.get(part).test(text.charAt(at))) {
        part++;
        at++;
      } else if (star >= 0) {
        part = star + 1;
        at = ++starEnd;
      } else {
        return false;
      }
    }
    while (part < parts.size() && parts.get(part) == null) {
      part++;
    }
    return part == parts.size();
  }
}
