// SPDX-License-Identifier: Apache-2.0
package io.octolora.benchmarks.plots;

import java.util.Locale;

/** A picture that needs nothing but itself: its colours follow the reader's light or dark setting. */
final class Svg {
  /** Who is who, the same in every plot. */
  enum Ink {
    /** Octolora. */ OURS,
    /** torch without an adapter. */ BASE,
    /** What an adapter costs, and systems with one beside a bf16 base. */ ADAPTER,
    /** Quantizing x. */ QUANTIZE,
    /** What no kernel can pass. */ FLOOR,
    TEXT, MUTED, GRID,
    /** What lies below everything: for numbers on a bar. */ CARD;

    String css() {
      return name().toLowerCase(Locale.ROOT);
    }
  }

  enum Anchor { START, MIDDLE, END }

  private static final String STYLE = """
      svg { --card: #ffffff; --edge: #e1e5ec; --text: #171a21; --muted: #596273; --grid: #e9ecf1;
            --ours: #2b62cf; --base: #8a93a3; --adapter: #c0600a; --quantize: #0c7a70; --floor: #171a21; }
      @media (prefers-color-scheme: dark) {
        svg { --card: #14171d; --edge: #2b313b; --text: #e8ebf1; --muted: #9aa4b5; --grid: #262b34;
              --ours: #7aa5ff; --base: #7f8999; --adapter: #f0a35c; --quantize: #4fc3b5; --floor: #e8ebf1; } }
      text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
             font-variant-numeric: tabular-nums; }
      """;

  private final StringBuilder body = new StringBuilder();
  private final int width;
  private final int height;
  private final String title;
  private final String description;

  Svg(int width, int height, String title, String description) {
    this.width = width;
    this.height = height;
    this.title = title;
    this.description = description;
  }

  Svg text(double x, double y, int size, Ink ink, Anchor anchor, boolean bold, String text) {
    return add("<text x=\"%.1f\" y=\"%.1f\" font-size=\"%d\" fill=\"var(--%s)\"%s%s>%s</text>", x, y, size, ink.css(),
        anchor == Anchor.START ? "" : " text-anchor=\"" + anchor.name().toLowerCase(Locale.ROOT) + "\"",
        bold ? " font-weight=\"600\"" : "", escape(text));
  }

  Svg line(double x1, double y1, double x2, double y2, Ink ink, double thick, boolean dashed) {
    return add("<line x1=\"%.1f\" y1=\"%.1f\" x2=\"%.1f\" y2=\"%.1f\" stroke=\"var(--%s)\" stroke-width=\"%.1f\"%s/>",
        x1, y1, x2, y2, ink.css(), thick, dashed ? " stroke-dasharray=\"3 3\"" : "");
  }

  Svg dot(double x, double y, double radius, Ink ink) {
    return add("<circle cx=\"%.1f\" cy=\"%.1f\" r=\"%.1f\" fill=\"var(--%s)\"/>", x, y, radius, ink.css());
  }

  Svg bar(double x, double y, double wide, double high, Ink ink) {
    return add("<rect x=\"%.1f\" y=\"%.1f\" width=\"%.1f\" height=\"%.1f\" fill=\"var(--%s)\"/>", x, y, wide, high,
        ink.css());
  }

  /** @param points "x,y x,y …" */
  Svg path(String points, Ink ink, double thick, boolean dashed) {
    return add("<polyline points=\"%s\" fill=\"none\" stroke=\"var(--%s)\" stroke-width=\"%.1f\"%s/>", points,
        ink.css(), thick, dashed ? " stroke-dasharray=\"4 3\"" : " stroke-linejoin=\"round\"");
  }

  Svg area(String points, Ink ink) {
    return add("<polygon points=\"%s\" fill=\"var(--%s)\" fill-opacity=\"0.18\"/>", points, ink.css());
  }

  private Svg add(String format, Object... values) {
    body.append("  ").append(format.formatted(values)).append('\n');
    return this;
  }

  static String point(double x, double y) {
    return String.format(Locale.ROOT, "%.1f,%.1f ", x, y);
  }

  /** About how wide a text is: system fonts differ by some per cent. */
  static double widthOf(String text, int size) {
    return 0.6 * size * text.codePointCount(0, text.length());
  }

  private static String escape(String text) {
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("\"", "&quot;");
  }

  @Override
  public String toString() {
    return """
        <?xml version="1.0" encoding="UTF-8"?>
        <!-- SPDX-License-Identifier: Apache-2.0 -->
        <svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" width="%d" height="%d" role="img">
          <title>%s</title>
          <desc>%s</desc>
          <style>
        %s  </style>
          <rect x="0.5" y="0.5" width="%d" height="%d" rx="10" fill="var(--card)" stroke="var(--edge)"/>
        %s</svg>
        """.formatted(width, height, width, height, escape(title), escape(description), STYLE.indent(4), width - 1,
        height - 1, body);
  }
}
