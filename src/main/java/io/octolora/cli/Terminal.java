// SPDX-License-Identifier: Apache-2.0
package io.octolora.cli;

import java.io.BufferedWriter;
import java.io.IOException;
import java.io.OutputStream;
import java.io.OutputStreamWriter;
import java.io.PrintWriter;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import org.jetbrains.annotations.Nullable;
import picocli.CommandLine.Model.UsageMessageSpec;

/**
 * Where results, messages and progress go.
 *
 * @param out results
 * @param err messages and progress
 * @param colours whether out understands escape sequences and the user wants them
 * @param progress whether somebody watches err
 * @param width of out in characters, for tables
 */
record Terminal(PrintWriter out, PrintWriter err, boolean colours, boolean progress, int width) {
  /** What every table fits; a narrower terminal breaks its lines. */
  static final int MIN_WIDTH = 120;
  /** All names of the trainers are shorter, and what is no name does not fill memory. */
  private static final int FILE_WIDTH = 1000;
  private static final String CLEAR_LINE = "\r\u001b[K";
  private static final String[] CODES = {"\u001b[32m", "\u001b[31m", "\u001b[33m", "\u001b[1m"};

  /** What a text says. */
  enum Tone { GOOD, BAD, WARNING, TITLE }

  /**
   * Standard output, given as a stream, and standard error; {@code NO_COLOR} in the environment turns colours off
   * (no-color.org).
   */
  static Terminal ofProcess(OutputStream out) {
    @Nullable String noColor = System.getenv("NO_COLOR");
    boolean escapes = !"dumb".equals(System.getenv("TERM"));
    boolean colours = escapes && isTerminal(1) && (noColor == null || noColor.isEmpty());
    return new Terminal(writer(out), writer(System.err), colours, escapes && isTerminal(2), columns());
  }

  /** picocli asks stty. */
  private static int columns() {
    return isTerminal(1) ? Math.max(MIN_WIDTH, new UsageMessageSpec().autoWidth(true).width()) : FILE_WIDTH;
  }

  /** UTF-8 whatever the locale: JSON asks for it, and names in files are not bound to a locale. */
  private static PrintWriter writer(OutputStream stream) {
    return new PrintWriter(new BufferedWriter(new OutputStreamWriter(stream, StandardCharsets.UTF_8)), true);
  }

  private static boolean isTerminal(int descriptor) {
    try {
      String target = Files.readSymbolicLink(Path.of("/proc/self/fd/" + descriptor)).toString();
      return target.startsWith("/dev/pts/") || target.startsWith("/dev/tty") || target.equals("/dev/console");
    } catch (IOException | UnsupportedOperationException e) {
      return false;
    }
  }

  String paint(Tone tone, String text) {
    return colours ? CODES[tone.ordinal()] + text + "\u001b[0m" : text;
  }

  /** Replaces the progress line; gone with {@link #clearProgress}. */
  void progress(String what, int done, int total) {
    progressLine("%d/%d  ".formatted(done, total), what);
  }

  /** The same with any text before the name. It ends where the terminal does: a broken line would not be replaced. */
  void progressLine(String text, String what) {
    if (progress) {
      err.print(CLEAR_LINE + "\u001b[?7l" + text + Table.shorten(Table.printable(what), 100) + "\u001b[?7h");
      err.flush();
    }
  }

  void clearProgress() {
    if (progress) {
      err.print(CLEAR_LINE);
      err.flush();
    }
  }
}
