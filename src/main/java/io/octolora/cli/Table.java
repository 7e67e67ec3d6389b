// SPDX-License-Identifier: Apache-2.0
package io.octolora.cli;

import java.util.ArrayList;
import java.util.Arrays;
import java.util.List;

/** Rows of text in aligned columns; the longest texts give way where they are too wide. */
final class Table {
  private static final String GAP = "  ";

  private final List<String> header;
  private final boolean[] right;
  private final List<List<String>> rows = new ArrayList<>();

  /** @param columns titles; one that begins with {@code >} makes a column that is aligned to the right */
  Table(String... columns) {
    header = new ArrayList<>();
    right = new boolean[columns.length];
    for (int i = 0; i < columns.length; i++) {
      right[i] = columns[i].startsWith(">");
      header.add(right[i] ? columns[i].substring(1) : columns[i]);
    }
  }

  void add(Object... cells) {
    List<String> row = new ArrayList<>();
    for (Object cell : cells) {
      row.add(printable(String.valueOf(cell)));
    }
    if (row.size() != header.size()) {
      throw new IllegalArgumentException("%d cells in a table of %d columns".formatted(row.size(), header.size()));
    }
    rows.add(row);
  }

  /** The header, then the rows, at most of this many characters. */
  List<String> lines(int most) {
    int[] width = new int[header.size()];
    for (int c = 0; c < width.length; c++) {
      width[c] = header.get(c).length();
      for (List<String> row : rows) {
        width[c] = Math.max(width[c], row.get(c).length());
      }
    }
    for (int excess = Arrays.stream(width).sum() + GAP.length() * (width.length - 1) - most; excess > 0; excess--) {
      int widest = 0;
      for (int c = 1; c < width.length; c++) {
        widest = width[c] > width[widest] ? c : widest;
      }
      width[widest]--;
    }
    List<String> lines = new ArrayList<>();
    lines.add(line(header, width));
    rows.forEach(row -> lines.add(line(row, width)));
    return lines;
  }

  private String line(List<String> cells, int[] width) {
    StringBuilder line = new StringBuilder();
    for (int c = 0; c < width.length; c++) {
      String text = shorten(cells.get(c), width[c]);
      String padding = " ".repeat(width[c] - text.length());
      line.append(c == 0 ? "" : GAP).append(right[c] ? padding + text : text + padding);
    }
    return line.toString().stripTrailing();
  }

  /** Leaves the ends, which tell names apart, and puts an ellipsis between them. */
  static String shorten(String text, int width) {
    if (text.length() <= width) {
      return text;
    }
    int tail = (width - 1) * 2 / 3;
    return text.substring(0, width - 1 - tail) + "…" + text.substring(text.length() - tail);
  }

  /** Names come from files: control characters must not reach a terminal. */
  static String printable(String text) {
    StringBuilder clean = null;
    for (int i = 0; i < text.length(); i++) {
      char c = text.charAt(i);
      if (Character.isISOControl(c) || Character.getType(c) == Character.FORMAT) {
        clean = clean == null ? new StringBuilder(text) : clean;
        clean.setCharAt(i, '?');
      }
    }
    return clean == null ? text : clean.toString();
  }
}
