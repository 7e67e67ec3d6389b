// SPDX-License-Identifier: Apache-2.0
package io.octolora.runtime;

import java.util.concurrent.atomic.AtomicLong;
import java.util.function.LongConsumer;
import java.util.function.LongUnaryOperator;

/**
 * Owns one native object. Calls hold it between {@link #acquire} and {@link #release}; {@link #close} keeps new calls
 * out and the last user out frees the object, once, whatever the order. What lives on another object (memory on a
 * device, slots on a linear) holds that one the same way until it is freed itself.
 *
 * <p>This guards against host threads alone: work already enqueued on a stream is waited for by the native destroy
 * call.
 */
final class NativeHandle implements AutoCloseable {
  /** Frees a child; parent is alive during the call. */
  interface Destroy {
    void accept(long parent, long child);
  }

  private static final long CLOSED = 1L << 62;

  /** {@link #CLOSED} once closed; below it the number of users. */
  private final AtomicLong state = new AtomicLong();

  private final String what;
  private final long address;
  private final LongConsumer destroy;
  private final LeakReport.Ticket ticket;

  /** @param what names the object in messages, such as {@code "Int8Linear blocks.0.to_q"} */
  NativeHandle(String what, long address, LongConsumer destroy) {
    this.what = what;
    this.address = address;
    this.destroy = destroy;
    this.ticket = LeakReport.open(this, what);
  }

  /** Makes an object that keeps this one until it is freed. create takes this address and returns the new one's. */
  NativeHandle child(String what, LongUnaryOperator create, Destroy destroyChild) {
    long parent = acquire();
    boolean made = false;
    try {
      NativeHandle child = new NativeHandle(what, create.applyAsLong(parent), address -> {
        try {
          destroyChild.accept(parent, address);
        } finally {
          release();
        }
      });
      made = true;
      return child;
    } finally {
      if (!made) {
        release();
      }
    }
  }

  /** The address, valid until {@link #release}; throws if the handle is closed. */
  long acquire() {
    if (!tryAcquire()) {
      throw closed();
    }
    return address;
  }

  boolean tryAcquire() {
    long users;
    do {
      users = state.get();
      if ((users & CLOSED) != 0) {
        return false;
      }
    } while (!state.compareAndSet(users, users + 1));
    return true;
  }

  void release() {
    if (state.decrementAndGet() == CLOSED) {
      destroy.accept(address);
    }
  }

  /** For a caller that holds the handle. */
  long address() {
    return address;
  }

  IllegalStateException closed() {
    return new IllegalStateException(what + " is closed");
  }

  boolean isClosed() {
    return (state.get() & CLOSED) != 0;
  }

  @Override
  public void close() {
    long before = state.getAndUpdate(users -> users | CLOSED);
    if ((before & CLOSED) != 0) {
      return;
    }
    ticket.close();
    if (before == 0) {
      destroy.accept(address);
    }
  }

  @Override
  public String toString() {
    return what;
  }
}
