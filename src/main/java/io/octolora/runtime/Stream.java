// SPDX-License-Identifier: Apache-2.0
package io.octolora.runtime;

import io.octolora.OctoloraException;
import org.jetbrains.annotations.Nullable;

/**
 * An order of work on a device: what is enqueued on one stream runs one after the other. A CUDA stream; on the CPU,
 * where calls finish before they return, address 0.
 *
 * <p>The caller closes it, which waits for its work. Calls throw {@link IllegalStateException} after that, and
 * {@link OctoloraException} for what the device reports. Defined by {@code octolora_stream_create} in
 * {@code octolora/octolora.h}.
 */
public final class Stream implements AutoCloseable {
  private final NativeHandle device;
  private final NativeHandle handle;

  Stream(NativeHandle device, String what) {
    this.device = device;
    this.handle = device.child(what, parent -> {
      long[] stream = new long[1];
      NativeLibrary.check(NativeOctolora.streamCreate(parent, stream));
      return stream[0];
    }, (parent, stream) -> {
      NativeLibrary.warn(NativeOctolora.streamSynchronize(parent, stream), "waiting for a stream before it closes");
      NativeLibrary.warn(NativeOctolora.streamDestroy(parent, stream), "closing a stream");
    });
  }

  /** The {@code cudaStream_t}; valid until {@link #close()}. */
  public long address() {
    if (handle.isClosed()) {
      throw handle.closed();
    }
    return handle.address();
  }

  /** Waits for all work enqueued here and throws its errors. */
  public void synchronize() {
    long stream = handle.acquire();
    try {
      NativeLibrary.check(NativeOctolora.streamSynchronize(device.address(), stream));
    } finally {
      handle.release();
    }
  }

  NativeHandle handle() {
    return handle;
  }

  /** The address, 0 for null, held until {@link #release}. */
  static long acquire(@Nullable Stream stream) {
    return stream == null ? 0 : stream.handle.acquire();
  }

  static void release(@Nullable Stream stream) {
    if (stream != null) {
      stream.handle.release();
    }
  }

  @Override
  public void close() {
    handle.close();
  }
}
