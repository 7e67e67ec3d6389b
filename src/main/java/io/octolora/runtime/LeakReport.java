// SPDX-License-Identifier: Apache-2.0
package io.octolora.runtime;

import java.lang.ref.Cleaner;
import org.jetbrains.annotations.Nullable;

/**
 * Says which native objects became unreachable without being closed: a warning of the System.Logger
 * {@value #LOGGER}, with the stack that made the object where the system property {@value #TRACE_PROPERTY} is true.
 * It frees nothing: a collector that frees device memory at a time of its own would hide the mistake and race with work
 * in flight.
 */
final class LeakReport {
  static final String LOGGER = "io.octolora.runtime";
  static final String TRACE_PROPERTY = "octolora.leak.trace";

  private static final System.Logger LOG = System.getLogger(LOGGER);
  private static final Cleaner CLEANER = Cleaner.create();

  private LeakReport() {}

  /** Closed by the owner, or found open by the cleaner. It must not refer to the owner. */
  static final class Ticket {
    private final Report report;
    private final Cleaner.Cleanable cleanable;

    private Ticket(Object owner, Report report) {
      this.report = report;
      this.cleanable = CLEANER.register(owner, report);
    }

    void close() {
      report.closed = true;
      cleanable.clean();
    }
  }

  private static final class Report implements Runnable {
    private final String what;
    private final @Nullable Throwable created;
    private volatile boolean closed;

    Report(String what, @Nullable Throwable created) {
      this.what = what;
      this.created = created;
    }

    @Override
    public void run() {
      if (closed) {
        return;
      }
      String message = what + " was never closed; its native memory stays allocated";
      if (created == null) {
        LOG.log(System.Logger.Level.WARNING, message + " (-D" + TRACE_PROPERTY + "=true says where it was made)");
      } else {
        LOG.log(System.Logger.Level.WARNING, message, created);
      }
    }
  }

  static Ticket open(Object owner, String what) {
    Throwable created = Boolean.getBoolean(TRACE_PROPERTY) ? new Throwable(what + " was made here") : null;
    return new Ticket(owner, new Report(what, created));
  }
}
