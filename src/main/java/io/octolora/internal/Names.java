// SPDX-License-Identifier: Apache-2.0
package io.octolora.internal;

import java.util.ArrayList;
import java.util.Collection;
import java.util.Comparator;
import java.util.List;
import java.util.regex.Pattern;

/** Order of module names and likeness between them. */
public final class Names {
  /** By characters, but runs of digits by their number: blocks.2 before blocks.10. */
  public static final Comparator<String> NATURAL = Names::compareNatural;

  /** Usual names of embedding tables, which quantizers leave alone without being told. */
  private static final Pattern EMBEDDING =
      Pattern.compile("(.*\\.)?(embed[^.]*|[^.]*embeddings?|wte|wpe|emb|shared|relative_attention_bias)");

  private Names() {}

  /** Whether a module with a weight of two dimensions is an embedding table by its name, not a linear layer. */
  public static boolean isEmbedding(String module) {
    return EMBEDDING.matcher(module).matches();
  }

  /**
   * The candidates closest to a name, best first: those where one is a dotted end of the other, then by edit distance;
   * dots and underscores count as equal.
   */
  public static List<String> nearest(String name, Collection<String> candidates, int count) {
    record Scored(String name, int score) {}
    String wanted = name.replace('_', '.');
    List<Scored> best = new ArrayList<>();
    for (String candidate : candidates) {
      String other = candidate.replace('_', '.');
      int limit = best.size() < count ? Integer.MAX_VALUE : best.get(best.size() - 1).score;
      int score = wanted.endsWith("." + other) || other.endsWith("." + wanted)
          ? Integer.MIN_VALUE / 2 + Math.abs(other.length() - wanted.length())
          : distance(wanted, other, limit);
      if (score < limit) {
        int at = best.size();
        while (at > 0 && best.get(at - 1).score > score) {
          at--;
        }
        best.add(at, new Scored(candidate, score));
        if (best.size() > count) {
          best.remove(count);
        }
      }
    }
    return best.stream().map(Scored::name).toList();
  }

  /** Levenshtein distance; any number &ge; limit where it is not below limit. */
  static int distance(String a, String b, int limit) {
    if (Math.abs(a.length() - b.length()) >= limit) {
      return limit;
    }
    int[] row = new int[b.length() + 1];
    for (int j = 0; j <= b.length(); j++) {
      row[j] = j;
    }
    for (int i = 1; i <= a.length(); i++) {
      int diagonal = row[0];
      row[0] = i;
      int least = i;
      for (int j = 1; j <= b.length(); j++) {
        int substituted = diagonal + (a.charAt(i - 1) == b.charAt(j - 1) ? 0 : 1);
        diagonal = row[j];
        row[j] = Math.min(substituted, Math.min(row[j], row[j - 1]) + 1);
        least = Math.min(least, row[j]);
      }
      if (least >= limit) {
        return limit;
      }
    }
    return row[b.length()];
  }

  private static int compareNatural(String a, String b) {
    int i = 0;
    int j = 0;
    while (i < a.length() && j < b.length()) {
      if (isDigit(a.charAt(i)) && isDigit(b.charAt(j))) {
        int endA = endOfDigits(a, i);
        int endB = endOfDigits(b, j);
        int startA = skipZeros(a, i, endA);
        int startB = skipZeros(b, j, endB);
        int order = Integer.compare(endA - startA, endB - startB);
        for (int d = 0; order == 0 && d < endA - startA; d++) {
          order = Character.compare(a.charAt(startA + d), b.charAt(startB + d));
        }
        if (order != 0) {
          return order;
        }
        i = endA;
        j = endB;
      } else if (a.charAt(i) != b.charAt(j)) {
        return Character.compare(a.charAt(i), b.charAt(j));
      } else {
        i++;
        j++;
      }
    }
    int order = Integer.compare(a.length() - i, b.length() - j);
    return order != 0 ? order : a.compareTo(b); // "01" and "1" differ
  }

  private static boolean isDigit(char c) {
    return c >= '0' && c <= '9';
  }

  private static int endOfDigits(String text, int from) {
    int end = from;
    while (end < text.length() && isDigit(text.charAt(end))) {
      end++;
    }
    return end;
  }

  private static int skipZeros(String text, int from, int end) {
    int start = from;
    while (start < end - 1 && text.charAt(start) == '0') {
      start++;
    }
    return start;
  }
}
