// SPDX-License-Identifier: Apache-2.0
package io.octolora.cli;

import java.util.ArrayDeque;
import java.util.Deque;

/** Closes what was added, last first, whatever happens. */
final class Closeables implements AutoCloseable {
  private final Deque<AutoCloseable> opened = new ArrayDeque<>();

  <T extends AutoCloseable> T add(T closeable) {
    opened.push(closeable);
    return closeable;
  }

  @Override
  public void close() {
    RuntimeException failure = null;
    while (!opened.isEmpty()) {
      try {
        opened.pop().close();
      } catch (Exception e) {
        if (failure == null) {
          failure = new IllegalStateException("closing an input: " + e.getMessage(), e);
        } else {
          failure.addSuppressed(e);
        }
      }
    }
    if (failure != null) {
      throw failure;
    }
  }
}
