// SPDX-License-Identifier: Apache-2.0
package io.octolora.runtime;

import io.octolora.OctoloraException;
import java.nio.ByteBuffer;
import org.jetbrains.annotations.Nullable;

/**
 * A piece of device memory that knows its size.
 *
 * <p>The copies move bytes as they are, native byte order, and return when they are done. They are ordered behind the
 * work on the given stream, null being the default stream. The caller closes the memory; {@link #close()} waits for
 * work on the device. Calls throw {@link IllegalStateException} after that, {@link IndexOutOfBoundsException} naming
 * both sizes where a copy leaves the memory, and {@link OctoloraException} for what the device reports. Defined by
 * {@code octolora_device_alloc} and {@code octolora_device_copy} in {@code octolora/octolora.h}.
 */
public final class DeviceMemory implements AutoCloseable {
  private final NativeHandle device;
  private final NativeHandle handle;
  private final long bytes;

  DeviceMemory(NativeHandle device, long bytes) {
    this.device = device;
    this.bytes = bytes;
    this.handle = device.child("DeviceMemory of " + bytes + " bytes", parent -> {
      long[] memory = new long[1];
      NativeLibrary.check(NativeOctolora.deviceAlloc(parent, bytes, memory));
      return memory[0];
    }, (parent, memory) -> NativeLibrary.warn(NativeOctolora.deviceFree(parent, memory), "freeing device memory"));
  }

  /** Size in bytes. */
  public long bytes() {
    return bytes;
  }

  /** The device pointer, 256-byte aligned; valid until {@link #close()}. */
  public long address() {
    if (handle.isClosed()) {
      throw handle.closed();
    }
    return handle.address();
  }

  /** Host to device, from the buffer's position to its limit, which do not move. A heap buffer is copied once more. */
  public void copyFrom(ByteBuffer from, @Nullable Stream stream) {
    int length = from.remaining();
    ByteBuffer direct = from.isDirect() ? from.slice() : ByteBuffer.allocateDirect(length).put(from.slice()).flip();
    transfer(length, stream, (onDevice, to, onStream) -> NativeOctolora.copyIn(onDevice, to, direct, length, onStream));
  }

  /** Host to device. */
  public void copyFrom(float[] from, @Nullable Stream stream) {
    long length = 4L * from.length;
    transfer(length, stream, (onDevice, to, onStream) -> NativeOctolora.copyIn(onDevice, to, from, length, onStream));
  }

  /** Host to device. */
  public void copyFrom(byte[] from, @Nullable Stream stream) {
    transfer(from.length, stream,
        (onDevice, to, onStream) -> NativeOctolora.copyIn(onDevice, to, from, from.length, onStream));
  }

  /** Device to host, from the buffer's position to its limit, which do not move. */
  public void copyTo(ByteBuffer to, @Nullable Stream stream) {
    if (to.isReadOnly()) {
      throw new java.nio.ReadOnlyBufferException();
    }
    int length = to.remaining();
    ByteBuffer direct = to.isDirect() ? to.slice() : ByteBuffer.allocateDirect(length);
    transfer(length, stream,
        (onDevice, from, onStream) -> NativeOctolora.copyOut(onDevice, direct, from, length, onStream));
    if (!to.isDirect()) {
      to.slice().put(direct);
    }
  }

  /** Device to host. */
  public void copyTo(float[] to, @Nullable Stream stream) {
    long length = 4L * to.length;
    transfer(length, stream,
        (onDevice, from, onStream) -> NativeOctolora.copyOut(onDevice, to, from, length, onStream));
  }

  /** Device to host. */
  public void copyTo(byte[] to, @Nullable Stream stream) {
    transfer(to.length, stream,
        (onDevice, from, onStream) -> NativeOctolora.copyOut(onDevice, to, from, to.length, onStream));
  }

  /** Device to host. */
  public void copyTo(int[] to, @Nullable Stream stream) {
    long length = 4L * to.length;
    transfer(length, stream,
        (onDevice, from, onStream) -> NativeOctolora.copyOut(onDevice, to, from, length, onStream));
  }

  private interface Copy {
    int run(long device, long memory, long stream);
  }

  private void transfer(long length, @Nullable Stream stream, Copy copy) {
    if (length > bytes) {
      throw new IndexOutOfBoundsException("a copy of %d bytes in %d bytes of device memory".formatted(length, bytes));
    }
    long memory = handle.acquire(); // and with it its device
    try {
      long onStream = Stream.acquire(stream);
      try {
        NativeLibrary.check(copy.run(device.address(), memory, onStream));
      } finally {
        Stream.release(stream);
      }
    } finally {
      handle.release();
    }
  }

  /** The address, held until {@link #release}; throws where fewer than needed bytes are there. */
  long acquire(long needed, String what) {
    require(needed, what);
    return handle.acquire();
  }

  void require(long needed, String what) {
    if (needed > bytes) {
      throw new IllegalArgumentException("%s holds %d bytes, expected at least %d".formatted(what, bytes, needed));
    }
  }

  NativeHandle handle() {
    return handle;
  }

  void release() {
    handle.release();
  }

  @Override
  public void close() {
    handle.close();
  }
}
