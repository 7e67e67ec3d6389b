// SPDX-License-Identifier: Apache-2.0
package io.octolora.runtime;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertFalse;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import java.util.ArrayList;
import java.util.List;
import java.util.concurrent.ExecutorService;
import java.util.concurrent.Executors;
import java.util.concurrent.Future;
import java.util.concurrent.atomic.AtomicBoolean;
import java.util.concurrent.atomic.AtomicInteger;
import org.junit.jupiter.api.Test;

class NativeHandleTest {
  private final List<String> freed = new ArrayList<>();

  private NativeHandle handle(String what, long address) {
    return new NativeHandle(what, address, freedAddress -> freed.add(what + " " + freedAddress));
  }

  @Test
  void theLastUserOutFreesOnce() {
    NativeHandle handle = handle("thing", 7);
    assertEquals(7, handle.acquire());
    assertEquals(7, handle.acquire());
    handle.close();
    assertTrue(handle.isClosed());
    assertEquals(List.of(), freed);
    assertEquals("thing is closed", assertThrows(IllegalStateException.class, handle::acquire).getMessage());
    handle.release();
    assertEquals(List.of(), freed);
    handle.close();
    handle.release();
    assertEquals(List.of("thing 7"), freed);
    handle.close();
    assertEquals(List.of("thing 7"), freed);
  }

  @Test
  void aChildKeepsItsParent() {
    NativeHandle parent = handle("parent", 1);
    NativeHandle child = parent.child("child", address -> address + 1,
        (parentAddress, address) -> freed.add("child " + address + " of " + parentAddress));
    parent.close();
    assertEquals(List.of(), freed);
    assertFalse(child.isClosed());
    child.close();
    assertEquals(List.of("child 2 of 1", "parent 1"), freed);
  }

  @Test
  void aChildThatFailsLeavesNothing() {
    NativeHandle parent = handle("parent", 1);
    assertThrows(ArithmeticException.class,
        () -> parent.child("child", address -> Math.floorDiv(address, 0L), (p, c) -> {}));
    parent.close();
    assertEquals(List.of("parent 1"), freed);
    assertThrows(IllegalStateException.class, () -> parent.child("child", address -> 2, (p, c) -> {}));
  }

  @Test
  void closeAndCallsRaceFromEightThreads() throws Exception {
    ExecutorService threads = Executors.newFixedThreadPool(8);
    try {
      for (int round = 0; round < 300; round++) {
        AtomicInteger frees = new AtomicInteger();
        AtomicBoolean alive = new AtomicBoolean(true);
        NativeHandle handle = new NativeHandle("raced", 3, address -> {
          alive.set(false);
          frees.incrementAndGet();
        });
        List<Future<?>> users = new ArrayList<>();
        for (int i = 0; i < 8; i++) {
          boolean closer = i == 7;
          users.add(threads.submit(() -> {
            while (handle.tryAcquire()) {
              boolean seen = alive.get();
              handle.release();
              assertTrue(seen, "freed while in use");
              if (closer) {
                handle.close();
              }
              Thread.yield();
            }
          }));
        }
        for (Future<?> user : users) {
          user.get();
        }
        assertEquals(1, frees.get());
      }
    } finally {
      threads.shutdownNow();
    }
  }
}
