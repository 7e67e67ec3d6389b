// SPDX-License-Identifier: Apache-2.0
package io.octolora.runtime;

import io.octolora.OctoloraException;
import io.octolora.Status;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.util.ArrayList;
import java.util.List;
import org.bytedeco.javacpp.BytePointer;
import org.bytedeco.javacpp.Pointer;

/**
 * Pinned host memory, handed out in pieces that are freed together: what a device reads at the speed of its bus, and
 * copies from without anyone waiting. On the CPU any memory. Calls come from one thread at a time. Defined by
 * {@code octolora_host_alloc} in {@code octolora/octolora.h}.
 */
final class PinnedMemory implements AutoCloseable {
  /** The system locks memory in units of many pages: a call for each piece would take longer than filling it. */
  static final int CHUNK_BYTES = 1 << 26;
  private static final int ALIGNMENT = 256;

  private static final class Address extends Pointer {
    Address(long address) {
      this.address = address;
    }
  }

  private final NativeHandle device;
  private final NativeHandle handle;
  private final List<Long> chunks = new ArrayList<>();
  private ByteBuffer rest = ByteBuffer.allocate(0);
  private long expected;

  /**
   * No memory yet.
   *
   * @param expected bytes of all pieces, each as {@link #taken} counts it
   */
  PinnedMemory(NativeHandle device, String what, long expected) {
    this.device = device;
    this.expected = expected;
    this.handle = device.child("pinned memory of " + what, parent -> 0, (parent, none) -> {
      // cudaFreeHost may be early for what other streams still read
      NativeLibrary.warn(NativeOctolora.deviceSynchronize(parent), "waiting for the readers of pinned memory");
      for (long chunk : chunks) {
        NativeLibrary.warn(NativeOctolora.hostFree(parent, chunk), "freeing pinned memory");
      }
    });
  }

  /** Bytes that a piece takes up. */
  static long taken(long bytes) {
    return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
  }

  /**
   * A direct, little-endian buffer, not cleared and good until {@link #close}.
   *
   * @throws OctoloraException {@link Status#OUT_OF_MEMORY}
   */
  ByteBuffer take(int bytes) {
    if (rest.remaining() < bytes) {
      int chunk = (int) Math.min(Integer.MAX_VALUE, Math.max(taken(bytes), Math.min(CHUNK_BYTES, expected)));
      long[] memory = new long[1];
      NativeLibrary.check(NativeOctolora.hostAlloc(device.address(), chunk, memory));
      chunks.add(memory[0]);
      rest = new BytePointer(new Address(memory[0])).capacity(chunk).asByteBuffer();
    }
    ByteBuffer piece = rest.slice(rest.position(), bytes).order(ByteOrder.LITTLE_ENDIAN);
    rest.position((int) Math.min(rest.limit(), rest.position() + taken(bytes)));
    expected -= taken(bytes);
    return piece;
  }

  /** Waits for the device, which may be reading it. */
  @Override
  public void close() {
    handle.close();
  }
}
