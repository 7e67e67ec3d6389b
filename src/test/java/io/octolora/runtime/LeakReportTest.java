// SPDX-License-Identifier: Apache-2.0
package io.octolora.runtime;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertNull;
import static org.junit.jupiter.api.Assertions.assertTrue;

import java.util.ArrayList;
import java.util.Collections;
import java.util.List;
import java.util.concurrent.atomic.AtomicInteger;
import java.util.logging.Handler;
import java.util.logging.LogRecord;
import java.util.logging.Logger;
import org.junit.jupiter.api.AfterEach;
import org.junit.jupiter.api.BeforeEach;
import org.junit.jupiter.api.Test;

class LeakReportTest {
  private final Logger logger = Logger.getLogger(LeakReport.LOGGER);
  private final List<LogRecord> records = Collections.synchronizedList(new ArrayList<>());
  private final AtomicInteger freed = new AtomicInteger();
  private final Handler handler = new Handler() {
    @Override
    public void publish(LogRecord one) {
      records.add(one);
    }

    @Override
    public void flush() {}

    @Override
    public void close() {}
  };

  @BeforeEach
  void listen() {
    logger.addHandler(handler);
    logger.setUseParentHandlers(false);
  }

  @AfterEach
  void stopListening() {
    logger.removeHandler(handler);
    logger.setUseParentHandlers(true);
    System.clearProperty(LeakReport.TRACE_PROPERTY);
  }

  private LogRecord leak(String what) throws InterruptedException {
    new NativeHandle(what, 1, address -> freed.incrementAndGet()).acquire();
    for (int i = 0; i < 200; i++) {
      System.gc();
      for (LogRecord one : records.toArray(new LogRecord[0])) {
        if (one.getMessage().startsWith(what)) {
          return one;
        }
      }
      Thread.sleep(10);
    }
    throw new AssertionError("no report of " + what);
  }

  @Test
  void namesWhatWasLostAndFreesNothing() throws InterruptedException {
    LogRecord report = leak("lost thing");
    assertEquals("WARNING", report.getLevel().getName());
    assertEquals("lost thing was never closed; its native memory stays allocated"
        + " (-Doctolora.leak.trace=true says where it was made)", report.getMessage());
    assertNull(report.getThrown());
    assertEquals(0, freed.get());
  }

  @Test
  void tellsWhereItWasMadeWhenAsked() throws InterruptedException {
    System.setProperty(LeakReport.TRACE_PROPERTY, "true");
    LogRecord report = leak("traced thing");
    List<StackTraceElement> stack = List.of(report.getThrown().getStackTrace());
    assertTrue(stack.stream().anyMatch(frame -> frame.getMethodName().equals("leak")), stack.toString());
  }

  @Test
  void staysSilentAboutWhatWasClosed() throws InterruptedException {
    new NativeHandle("closed thing", 1, address -> freed.incrementAndGet()).close();
    leak("later thing"); // once this is reported, the collector has seen the other too
    assertTrue(records.stream().noneMatch(one -> one.getMessage().startsWith("closed thing")));
    assertEquals(1, freed.get());
  }
}
