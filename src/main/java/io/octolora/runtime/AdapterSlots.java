// SPDX-License-Identifier: Apache-2.0
package io.octolora.runtime;

import io.octolora.OctoloraException;
import io.octolora.Status;
import io.octolora.mapping.LoraDelta;
import java.lang.ref.Reference;
import java.util.Arrays;
import org.bytedeco.javacpp.Pointer;
import org.jetbrains.annotations.Nullable;

/**
 * Adapter storage of fixed capacity beside one {@link Int8Linear}. Filling a slot, changing its weight and clearing it
 * are work on a stream and no allocation: a CUDA graph captured earlier replays with what the slots hold then.
 * {@link PinnedAdapter#fill} does it for the slots of many layers, and without waiting. {@link #forward} is the layer
 * with these slots alone.
 *
 * <p>Changes must be ordered with the calls that read the slots: on one stream, or by waiting. The caller closes the
 * slots; the layer's memory stays until then. Calls throw {@link IllegalStateException} after that, and
 * {@link OctoloraException} with {@link Status#INVALID_ARGUMENT} naming slot, rank and capacity. Made by
 * {@link Int8Linear#slots}; defined by {@code octolora_slots} in {@code octolora/octolora.h}.
 */
public final class AdapterSlots extends Forward {
  final NativeHandle handle;
  private final int[] capacity;
  private final LoraPrecision precision;
  /** Guarded by this; each adapter's own scale, NaN for an empty slot. */
  private final double[] scale;

  AdapterSlots(Int8Linear linear, NativeHandle handle, int[] capacity, LoraPrecision precision) {
    super(linear.device, linear.linear, linear.name, linear.n, linear.k);
    this.handle = handle;
    this.capacity = capacity;
    this.precision = precision;
    this.scale = new double[capacity.length];
    Arrays.fill(scale, Double.NaN);
  }

  /** Number of slots. */
  public int count() {
    return capacity.length;
  }

  /** The greatest rank that a slot takes. */
  public int capacity(int slot) {
    requireSlot(slot);
    return capacity[slot];
  }

  void requireSlot(int slot) {
    if (slot < 0 || slot >= capacity.length) {
      throw new OctoloraException(Status.INVALID_ARGUMENT,
          "%s: slot = %d, expected 0 to %d".formatted(name, slot, capacity.length - 1));
    }
  }

  /**
   * Fills a slot in the precision that the slots were made for: {@code y += weight · delta.scale · ((x·Aᵀ)·Bᵀ + bias)}.
   * Returns when the stream has come to it. With a magnitude (DoRA), in slots that were made for them, it applies to
   * what the slots before it made of the base, and a weight of 0 leaves the rows of W at its lengths; {@link #clear}
   * takes it away.
   *
   * @param stream a {@code cudaStream_t}, as everywhere here; 0 is the default stream, and the only one on the CPU
   */
  public void set(int slot, LoraDelta delta, float weight, long stream) {
    set(slot, HostAdapter.of(delta, name, n, k), weight, stream);
  }

  /** The same on a stream such as {@code org.bytedeco.cuda.cudart.CUstream_st}. */
  public void set(int slot, LoraDelta delta, float weight, Pointer stream) {
    try {
      set(slot, delta, weight, stream.address());
    } finally { // a pointer that owns its stream destroys it when it is collected
      Reference.reachabilityFence(stream);
    }
  }

  /** {@link #set(int, LoraDelta, float, long)} for factors that come from no file: a [rank, k], b [n, rank]. */
  public void set(int slot, int rank, float[] a, float[] b, float weight, long stream) {
    set(slot, HostAdapter.of(rank, a, b, name, n, k), weight, stream);
  }

  /** The same on JavaCPP's stream. */
  public void set(int slot, int rank, float[] a, float[] b, float weight, Pointer stream) {
    try {
      set(slot, rank, a, b, weight, stream.address());
    } finally {
      Reference.reachabilityFence(stream);
    }
  }

  private synchronized void set(int slot, HostAdapter adapter, float weight, long stream) {
    handle.acquire();
    try {
      adapter.set(handle, slot, weight, precision, stream, name);
      scale[slot] = adapter.scale;
    } finally {
      handle.release();
    }
  }

  /** Has an adapter put into a slot, where the fills run; the caller holds {@link #handle}. */
  void fill(SlotFills fills, int slot, HostAdapter adapter, float weight) {
    fills.add(name, handle, slot, adapter, weight, precision);
  }

  /** After such a fill. */
  synchronized void filled(int slot, HostAdapter adapter) {
    scale[slot] = adapter.scale;
  }

  /**
   * Gives the adapter in a slot another weight; its own scale stays.
   *
   * @param weight any finite number
   * @throws IllegalStateException also if the slot is empty
   */
  public synchronized void setWeight(int slot, float weight, long stream) {
    requireSlot(slot);
    long slots = handle.acquire();
    try {
      if (Double.isNaN(scale[slot])) {
        throw new IllegalStateException("%s: slot %d is empty".formatted(name, slot));
      }
      NativeLibrary.check(NativeOctolora.slotsSetScale(slots, slot, (float) (weight * scale[slot]), stream), name);
    } finally {
      handle.release();
    }
  }

  /** The same on JavaCPP's stream. */
  public void setWeight(int slot, float weight, Pointer stream) {
    try {
      setWeight(slot, weight, stream.address());
    } finally {
      Reference.reachabilityFence(stream);
    }
  }

  /**
   * The device address of the slots' scales, [{@link #count}] fp32: weight times the adapter's own. The caller's
   * kernels may write them, on a stream, in place of {@link #setWeight}; a forward reads them when it runs. Valid until
   * {@link #close}. Slots with magnitudes need {@link #refresh} after that.
   */
  public long scales() {
    long slots = handle.acquire();
    try {
      long[] scales = new long[1];
      NativeLibrary.check(NativeOctolora.slotsScales(slots, scales), name);
      return scales[0];
    } finally {
      handle.release();
    }
  }

  /** Brings what depends on the scales up to date, after {@link #scales} were written: of use with magnitudes alone. */
  public void refresh(long stream) {
    long slots = handle.acquire();
    try {
      NativeLibrary.check(NativeOctolora.slotsRefresh(slots, stream), name);
    } finally {
      handle.release();
    }
  }

  /** The same on JavaCPP's stream. */
  public void refresh(Pointer stream) {
    try {
      refresh(stream.address());
    } finally {
      Reference.reachabilityFence(stream);
    }
  }

  /** Empties a slot. */
  public synchronized void clear(int slot, long stream) {
    requireSlot(slot);
    long slots = handle.acquire();
    try {
      NativeLibrary.check(NativeOctolora.slotsClear(slots, slot, stream), name);
      scale[slot] = Double.NaN;
    } finally {
      handle.release();
    }
  }

  /** The same on JavaCPP's stream. */
  public void clear(int slot, Pointer stream) {
    try {
      clear(slot, stream.address());
    } finally {
      Reference.reachabilityFence(stream);
    }
  }

  @Override
  @Nullable NativeHandle acquireSlots() {
    handle.acquire();
    return handle;
  }

  @Override
  public void close() {
    handle.close();
  }
}
