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

/**
 * Where results, messages and progress go.
 *
 * @param out results
 * @param err messages and progress
 * @param colours whether out understands escape sequences and the user wants them
 * @param progress whether somebody watches err
 */
record Terminal(PrintWriter out, PrintWriter err, boolean colours, boolean progress) {
  private static final String[] CODES = {"\u001b[32m", "\u001b[31m", "\u001b[33m", "\u001b[1m"};

  /** What a text says. */
  enum Tone { GOOD, BAD, WARNING, TITLE }

  /**
   * Standard output, given as a stream, and standard error; {@code NO_COLOR} in the environment turns colours off
   * (no-color.org).
   */
  static Terminal ofProcess(OutputStream out) {
    @Nullable String noColor = System.getenv("NO_COLOR");
    boolean colours = isTerminal(1) && (noColor == null || noColor.isEmpty()) && !"dumb".equals(System.getenv("TERM"));
    return new Terminal(writer(out), writer(System.err), colours, isTerminal(2));
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
    progressLine("%d/%d  %s".formatted(done, total, what));
  }

  /** The same with any text. */
  void progressLine(String text) {
    if (progress) {
      err.print("\r\u001b[K" + Table.shorten(Table.printable(text), 100));
      err.flush();
    }
  }

  void clearProgress() {
    if (progress) {
      err.print("\r\u001b[K");
      err.flush();
    }
  }
}
