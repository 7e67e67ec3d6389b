// SPDX-License-Identifier: Apache-2.0
package io.octolora.runtime;

import io.octolora.OctoloraException;
import io.octolora.Status;
import java.lang.ref.Reference;
import org.bytedeco.javacpp.Pointer;
import org.jetbrains.annotations.Nullable;

/**
 * {@code y = base(x) + bias + Σ adapters} of one layer: an {@link Int8Linear} with what is attached to it, or the same
 * layer with the {@link AdapterSlots} of the caller or with a selection of an {@link AdapterSet}. {@link ForwardCall}
 * runs several of them on one x, and adds activation, gate, residual and slots for each row.
 *
 * <p>x [rows, k] and y [rows, n] are dense, row-major, in memory of the layer's device, aligned to their element type
 * and do not overlap; 16-byte alignment of them and their rows is faster. The caller owns them and the workspace, which
 * is scratch, 256-byte aligned and not shared by calls that may run at the same time. A call enqueues on the stream and
 * returns; on the CPU it is done on return. It allocates nothing, in Java or below, and may be captured in a CUDA
 * graph, which must not outlive what it captured.
 *
 * <p>The calls throw {@link IllegalStateException} after close, and {@link OctoloraException} naming the layer, the
 * argument and the numbers: {@link Status#WORKSPACE_TOO_SMALL} for a workspace below {@link #workspaceBytes},
 * {@link Status#INVALID_ARGUMENT} for the rest. The formula is that of {@code octolora/octolora.h}.
 */
public abstract sealed class Forward implements AutoCloseable permits Int8Linear, AdapterSlots, AdaptedLayer {
  final NativeHandle device;
  final NativeHandle linear;
  final String name;
  final int n;
  final int k;

  Forward(NativeHandle device, NativeHandle linear, String name, int n, int k) {
    this.device = device;
    this.linear = linear;
    this.name = name;
    this.n = n;
    this.k = k;
  }

  /** The slots that a call uses now, held until it releases them; null for none. The linear is held already. */
  abstract @Nullable NativeHandle acquireSlots();

  /** The layer's name in its checkpoint. */
  public final String name() {
    return name;
  }

  /** Output features. */
  public final int n() {
    return n;
  }

  /** Input features. */
  public final int k() {
    return k;
  }

  /**
   * Bytes of scratch for a forward of at most rows rows with the adapters of now, for every alignment of x and y.
   * Attaching more adapters can raise it.
   */
  public final long workspaceBytes(int rows, DataType xType) {
    long address = linear.acquire();
    try {
      NativeHandle slots = acquireSlots();
      try {
        return workspaceBytes(address, slots, rows, xType);
      } finally {
        release(slots);
      }
    } finally {
      linear.release();
    }
  }

  private long workspaceBytes(long address, @Nullable NativeHandle slots, int rows, DataType xType) {
    long[] bytes = new long[1];
    NativeLibrary.check(NativeOctolora.linearWorkspace(address, address(slots), rows, xType.code(), bytes), name);
    return bytes[0];
  }

  /**
   * The call on addresses.
   *
   * @param x device pointer to [rows, k]
   * @param y device pointer to [rows, n]
   * @param rows 0 or more
   * @param workspace device pointer, or 0 where {@link #workspaceBytes} is 0
   * @param stream a {@code cudaStream_t}; 0 is the default stream, and the only one on the CPU
   */
  public final void forward(long x, DataType xType, long y, DataType yType, int rows, long workspace,
      long workspaceBytes, long stream) {
    long address = linear.acquire();
    try {
      NativeHandle slots = acquireSlots();
      try {
        NativeLibrary.check(
            NativeOctolora.linearForward(address, address(slots), x, xType.code(), y, yType.code(), rows, workspace,
                workspaceBytes, stream),
            name);
      } finally {
        release(slots);
      }
    } finally {
      linear.release();
    }
  }

  /**
   * The same on JavaCPP's pointers, from their positions on.
   *
   * @param stream such as {@code org.bytedeco.cuda.cudart.CUstream_st}; null is the default stream
   */
  public final void forward(Pointer x, DataType xType, Pointer y, DataType yType, int rows, @Nullable Pointer workspace,
      long workspaceBytes, @Nullable Pointer stream) {
    try {
      forward(Device.address(x, "x"), xType, Device.address(y, "y"), yType, rows,
          workspace == null ? 0 : Device.address(workspace, "workspace"), workspaceBytes,
          stream == null ? 0 : stream.address());
    } finally { // a pointer that owns its memory frees it when it is collected
      Reference.reachabilityFence(x);
      Reference.reachabilityFence(y);
      Reference.reachabilityFence(workspace);
      Reference.reachabilityFence(stream);
    }
  }

  /**
   * The same on memory whose sizes are checked, and which stays alive during the call.
   *
   * @param workspace null where {@link #workspaceBytes} is 0
   * @param stream null is the default stream
   * @throws IllegalArgumentException if x or y is too small for rows, naming both sizes
   */
  public final void forward(DeviceMemory x, DataType xType, DeviceMemory y, DataType yType, int rows,
      @Nullable DeviceMemory workspace, @Nullable Stream stream) {
    long xAddress = x.acquire((long) rows * k * xType.bytes(), "x");
    try {
      long yAddress = y.acquire((long) rows * n * yType.bytes(), "y");
      try {
        long scratch = workspace == null ? 0 : workspace.acquire(0, "workspace");
        try {
          long onStream = Stream.acquire(stream);
          try {
            forward(xAddress, xType, yAddress, yType, rows, scratch, workspace == null ? 0 : workspace.bytes(),
                onStream);
          } finally {
            Stream.release(stream);
          }
        } finally {
          if (workspace != null) {
            workspace.release();
          }
        }
      } finally {
        y.release();
      }
    } finally {
      x.release();
    }
  }

  /**
   * The same on the Java heap, for tests and tools: allocates, copies, waits and frees.
   *
   * @param x [rows, k]
   * @return y [rows, n]
   */
  public final float[] forward(float[] x, int rows) {
    if (rows < 0 || x.length != (long) rows * k) {
      throw new IllegalArgumentException(
          "%s: x holds %d numbers, expected rows x k = %d x %d".formatted(name, x.length, rows, k));
    }
    float[] y = new float[Math.multiplyExact(rows, n)];
    long address = linear.acquire();
    try {
      NativeHandle slots = acquireSlots();
      try (DeviceMemory xs = new DeviceMemory(device, 4L * x.length);
          DeviceMemory ys = new DeviceMemory(device, 4L * y.length);
          DeviceMemory scratch = new DeviceMemory(device, workspaceBytes(address, slots, rows, DataType.FLOAT32))) {
        xs.copyFrom(x, null);
        NativeLibrary.check(
            NativeOctolora.linearForward(address, address(slots), xs.address(), DataType.FLOAT32.code(), ys.address(),
                DataType.FLOAT32.code(), rows, scratch.address(), scratch.bytes(), 0),
            name);
        ys.copyTo(y, null);
      } finally {
        release(slots);
      }
    } finally {
      linear.release();
    }
    return y;
  }

  private static long address(@Nullable NativeHandle slots) {
    return slots == null ? 0 : slots.address();
  }

  private static void release(@Nullable NativeHandle slots) {
    if (slots != null) {
      slots.release();
    }
  }

  /** A second time does nothing; the native memory goes when the last call in progress is out. */
  @Override
  public abstract void close();

  @Override
  public String toString() {
    return "%s [n = %d, k = %d]".formatted(name, n, k);
  }
}
