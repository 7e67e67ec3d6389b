// SPDX-License-Identifier: Apache-2.0
package io.octolora.runtime;

import io.octolora.OctoloraException;
import io.octolora.Status;
import io.octolora.checkpoint.Quantization;
import io.octolora.mapping.LoraDelta;
import java.nio.ByteBuffer;
import java.util.ArrayList;
import java.util.List;
import java.util.Objects;
import org.jetbrains.annotations.Nullable;

/**
 * The int8 weights of one layer on a device, and any number of adapters that are active together.
 *
 * <p>W [n, k] int8 with one fp32 scale an output feature or one for all, or with fp16 scales for blocks of a row;
 * adapters A [rank, k], B [n, rank]. The caller who loaded it closes it. It may be used by several threads: attaching
 * builds new adapter storage beside the old and swaps it in, so a call in progress ends with the adapters it began
 * with. Made by {@link Device#load}; defined by {@code octolora_linear} and {@code octolora_slots} in
 * {@code octolora/octolora.h}.
 */
public final class Int8Linear extends Forward {
  /** Weights go to the device in pieces of at most this many bytes, where a row is not longer. */
  static final int WRITE_BYTES = 1 << 30;
  /** The same where each piece is copied out of the Java heap first. */
  static final int HEAP_WRITE_BYTES = 1 << 24;

  /** OCTOLORA_LORA_MAGNITUDES. */
  private static final int MAGNITUDES = 2;

  /** Direct views of the weight's bytes. */
  interface WeightBytes {
    ByteBuffer slice(long offset, int length);
  }

  private record Attached(HostAdapter adapter, float weight, LoraPrecision precision) {}

  private final Quantization quantization;
  /** Guarded by this; what {@link #active} was built from. */
  private List<Attached> attached = List.of();
  private volatile @Nullable NativeHandle active;

  private Int8Linear(NativeHandle device, NativeHandle linear, String name, int n, int k, Quantization quantization) {
    super(device, linear, name, n, k);
    this.quantization = quantization;
  }

  static Int8Linear create(NativeHandle device, String name, int n, int k, Quantization q, WeightBytes weight,
      float[] scale, float @Nullable [] bias, int writeBytes) {
    return create(device, name, n, k, q, weight, scale, 0, null, bias, writeBytes);
  }

  /** @param blockScale fp16 [n, ceil(k / scaleBlock)], direct and of this machine's byte order, or null */
  static Int8Linear create(NativeHandle device, String name, int n, int k, Quantization q, WeightBytes weight,
      float[] scale, int scaleBlock, @Nullable ByteBuffer blockScale, float @Nullable [] bias, int writeBytes) {
    Objects.requireNonNull(name, "name");
    if (n < 1 || k < 1) {
      throw new IllegalArgumentException("%s: n = %d, k = %d, expected 1 or more".formatted(name, n, k));
    }
    if (scale.length != 1 && scale.length != n) {
      throw new IllegalArgumentException("%s: %d scales, expected 1 or n = %d".formatted(name, scale.length, n));
    }
    if (bias != null && bias.length != n) {
      throw new IllegalArgumentException("%s: %d bias values, expected n = %d".formatted(name, bias.length, n));
    }
    boolean whole = (long) n * k <= writeBytes;
    NativeHandle linear = device.child("Int8Linear " + name, parent -> {
      long[] made = new long[1];
      NativeLibrary.check(
          NativeOctolora.linearCreate(parent, n, k, q.mode().ordinal(),
              (q.roundXToF16() ? DataType.FLOAT16 : DataType.FLOAT32).code(), q.xScale(), q.xDivisor(),
              q.outlierThreshold(), whole ? weight.slice(0, n * k) : null, scale.length, scale, scaleBlock, blockScale,
              bias, made),
          name);
      return made[0];
    }, (parent, address) -> NativeOctolora.linearDestroy(address));
    boolean complete = false;
    try {
      if (!whole) {
        int step = Math.max(1, writeBytes / k);
        for (int row = 0; row < n; row += Math.min(step, n - row)) {
          int rows = Math.min(step, n - row);
          ByteBuffer part = weight.slice((long) row * k, rows * k);
          NativeLibrary.check(NativeOctolora.linearWrite(linear.address(), row, rows, part), name);
        }
      }
      complete = true;
      return new Int8Linear(device, linear, name, n, k, q);
    } finally {
      if (!complete) {
        linear.close();
      }
    }
  }

  /** What happens to x. */
  public Quantization quantization() {
    return quantization;
  }

  // ---- Adapters

  /** {@link #attach(LoraDelta, float, LoraPrecision)} with {@link LoraPrecision#BITS_16}. */
  public void attach(LoraDelta delta, float weight) {
    attach(delta, weight, LoraPrecision.BITS_16);
  }

  /**
   * Adds an adapter to those attached: {@code y += weight · delta.scale · ((x·Aᵀ)·Bᵀ + bias)}. Returns when calls that
   * begin from now on use it. Its factors are copied, so the adapter's file may be closed afterwards. For changes
   * without an allocation, or inside a captured graph, see {@link #slots}.
   *
   * @param weight any finite number
   * @throws IllegalArgumentException if the adapter does not fit n and k, naming both
   * @throws OctoloraException {@link Status#OUT_OF_MEMORY}, with what was attached before still in place
   */
  public void attach(LoraDelta delta, float weight, LoraPrecision precision) {
    attach(HostAdapter.of(delta, name, n, k), weight, precision);
  }

  /**
   * {@link #attach(LoraDelta, float)} for factors that come from no file.
   *
   * @param a [rank, k]
   * @param b [n, rank]
   */
  public void attach(int rank, float[] a, float[] b, float weight, LoraPrecision precision) {
    attach(HostAdapter.of(rank, a, b, name, n, k), weight, precision);
  }

  private synchronized void attach(HostAdapter adapter, float weight, LoraPrecision precision) {
    List<Attached> next = new ArrayList<>(attached);
    next.add(new Attached(adapter, weight, Objects.requireNonNull(precision, "precision")));
    swap(next, build(next));
  }

  /** Takes all adapters away. Calls in progress end with them. */
  public synchronized void detachAll() {
    if (linear.isClosed()) {
      throw linear.closed();
    }
    swap(List.of(), null);
  }

  /** How many adapters are attached. */
  public synchronized int attachedCount() {
    return attached.size();
  }

  private void swap(List<Attached> next, @Nullable NativeHandle fresh) {
    NativeHandle old = active;
    attached = List.copyOf(next);
    active = fresh;
    if (linear.isClosed()) { // closed meanwhile, and so without having seen fresh
      close();
    }
    if (old != null) {
      old.close();
    }
  }

  private NativeHandle build(List<Attached> adapters) {
    int[] capacity = adapters.stream().mapToInt(one -> one.adapter().rank).toArray();
    boolean split = adapters.stream().anyMatch(one -> one.precision() == LoraPrecision.SPLIT);
    boolean magnitudes = adapters.stream().anyMatch(one -> one.adapter().magnitude != null);
    NativeHandle slots = createSlots(split ? LoraPrecision.SPLIT : LoraPrecision.BITS_16, magnitudes, capacity);
    boolean complete = false;
    try {
      for (int i = 0; i < capacity.length; i++) {
        Attached one = adapters.get(i);
        one.adapter().set(slots, i, one.weight(), one.precision(), 0, name);
      }
      // A caller's stream need not be ordered behind the default one, on which the slots were filled.
      NativeLibrary.check(NativeOctolora.streamSynchronize(device.address(), 0), name);
      complete = true;
      return slots;
    } finally {
      if (!complete) {
        slots.close();
      }
    }
  }

  NativeHandle createSlots(LoraPrecision precision, boolean magnitudes, int[] capacity) {
    return linear.child("AdapterSlots of " + name, parent -> {
      long[] made = new long[1];
      NativeLibrary.check(
          NativeOctolora.slotsCreate(parent, capacity.length, capacity,
              precision.code() | (magnitudes ? MAGNITUDES : 0), made), name);
      return made[0];
    }, (parent, address) -> NativeOctolora.slotsDestroy(address));
  }

  /**
   * Storage for adapters beside this layer, one slot for each rank capacity and all empty. It is apart from what is
   * attached: {@link AdapterSlots#forward} adds the slots alone, and the caller closes them.
   *
   * @param precision the highest that a slot may be asked for
   * @param capacity the greatest rank of each slot, 1 to 4096
   */
  public AdapterSlots slots(LoraPrecision precision, int... capacity) {
    return slots(precision, false, capacity);
  }

  /**
   * {@link #slots(LoraPrecision, int...)}, with magnitudes also for adapters that have one (DoRA): for more memory, and
   * all rows of a call use the same slots.
   */
  public AdapterSlots slots(LoraPrecision precision, boolean magnitudes, int... capacity) {
    int[] ranks = capacity.clone();
    return new AdapterSlots(this, createSlots(precision, magnitudes, ranks), ranks, precision);
  }

  @Override
  @Nullable NativeHandle acquireSlots() {
    while (true) {
      NativeHandle slots = active;
      if (slots == null || slots.tryAcquire()) {
        return slots;
      }
      if (slots == active) { // not replaced by a newer one, so the layer itself was closed
        throw linear.closed();
      }
    }
  }

  // ---- The int8 product by itself

  /**
   * What a W8A8 layer computes before any scale, for tools that judge results.
   *
   * @param sums [rows, n] exact sums
   * @param codes [rows, k] the quantized x; outlier columns are 0
   * @param rowScale [rows] real units per step
   */
  public record Quantized(int[] sums, byte[] codes, float[] rowScale) {}

  /**
   * Quantizes x and multiplies, on the Java heap: allocates, copies, waits and frees.
   *
   * @param x [rows, k]
   * @throws OctoloraException {@link Status#UNSUPPORTED} for W8A16
   */
  public Quantized quantized(float[] x, int rows) {
    if (rows < 0 || x.length != (long) rows * k) {
      throw new IllegalArgumentException(
          "%s: x holds %d numbers, expected rows x k = %d x %d".formatted(name, x.length, rows, k));
    }
    Quantized result = new Quantized(new int[Math.multiplyExact(rows, n)], new byte[x.length], new float[rows]);
    long address = linear.acquire();
    try {
      long[] workspace = new long[1];
      NativeLibrary.check(
          NativeOctolora.linearWorkspace(address, 0, rows, DataType.FLOAT32.code(), workspace), name);
      try (DeviceMemory xs = new DeviceMemory(device, 4L * x.length);
          DeviceMemory sums = new DeviceMemory(device, 4L * result.sums.length);
          DeviceMemory codes = new DeviceMemory(device, x.length);
          DeviceMemory scales = new DeviceMemory(device, 4L * rows);
          DeviceMemory scratch = new DeviceMemory(device, workspace[0])) {
        xs.copyFrom(x, null);
        NativeLibrary.check(
            NativeOctolora.linearQuantized(address, xs.address(), DataType.FLOAT32.code(), sums.address(),
                codes.address(), scales.address(), rows, scratch.address(), scratch.bytes(), 0),
            name);
        sums.copyTo(result.sums, null);
        codes.copyTo(result.codes, null);
        scales.copyTo(result.rowScale, null);
      }
    } finally {
      linear.release();
    }
    return result;
  }

  @Override
  public void close() {
    linear.close();
    NativeHandle slots = active;
    if (slots != null) {
      slots.close();
    }
  }
}
