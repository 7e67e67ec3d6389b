// SPDX-License-Identifier: Apache-2.0
package io.octolora.cli;

/** "[██████░░░░]  61 %  14.5 GB of 23.8 GB, 512 MB/s, 18 s left  name" on the terminal's progress line. */
final class ProgressBar {
  private static final int WIDTH = 24;
  private static final long MIN_NANOS = 100_000_000; // between two drawings, for the eye and slow terminals

  private final Terminal terminal;
  private final long start = System.nanoTime();
  private long firstDone = -1;
  private long drawn;

  ProgressBar(Terminal terminal) {
    this.terminal = terminal;
  }

  /** Draws unless it did so just before. */
  void at(String what, long done, long total) {
    long now = System.nanoTime();
    if (!terminal.progress() || drawn != 0 && now - drawn < MIN_NANOS && done < total) {
      return;
    }
    drawn = now;
    firstDone = firstDone < 0 ? done : firstDone;
    terminal.progressLine(line(done, total, (now - start) / 1e9, firstDone), what);
  }

  /** @param before bytes that were done when the clock started: they say nothing about the speed */
  static String line(long done, long total, double seconds, long before) {
    int filled = (int) (WIDTH * done / Math.max(total, 1));
    double speed = (done - before) / Math.max(seconds, 1e-3);
    String rate = done == before ? "" : ", %s/s, %d s left".formatted(size((long) speed),
        (long) Math.ceil((total - done) / Math.max(speed, 1)));
    return "[%s%s] %3d %%  %s of %s%s  ".formatted("█".repeat(filled), "░".repeat(WIDTH - filled),
        100 * done / Math.max(total, 1), size(done), size(total), rate);
  }

  /** Three digits and a decimal unit. */
  static String size(long bytes) {
    if (bytes < 1000) {
      return bytes + " B";
    }
    double value = bytes;
    int unit = -1;
    while (value >= 999.5 && unit < 4) {
      value /= 1000;
      unit++;
    }
    return "%s %cB".formatted(value < 9.995 ? "%.2f".formatted(value) : value < 99.95 ? "%.1f".formatted(value)
        : "%.0f".formatted(value), "kMGTP".charAt(unit));
  }
}
