// SPDX-License-Identifier: Apache-2.0
package io.octolora.runtime;

import io.octolora.OctoloraException;
import io.octolora.Status;
import java.lang.ref.Reference;
import java.nio.charset.StandardCharsets;
import java.util.Arrays;
import java.util.Objects;
import java.util.stream.Collectors;
import org.bytedeco.javacpp.Pointer;
import org.jetbrains.annotations.Nullable;

/**
 * One forward of layers that read the same x, such as q, k and v or gate and up: x is read and quantized once, and each
 * layer writes {@code y = residual + gate ⊙ activation(base(x) + bias + Σ adapters)} to memory of its own.
 *
 * <pre>{@code
 * ForwardCall call = new ForwardCall(gate, up).yType(BFLOAT16).activation(0, Activation.SILU);
 * call.x(x, BFLOAT16, rows).y(0, gated).y(1, upper).workspace(scratch).enqueue(stream);
 * }</pre>
 *
 * <p>A call is set up once and enqueued as often as wanted, with whatever is changed in between; enqueuing allocates
 * nothing, in Java or below, waits for nothing and may be captured in a CUDA graph. Each layer adds the adapters that
 * it has at that moment: an {@link Int8Linear} what is attached to it, {@link AdapterSlots} what they hold, a layer of
 * an {@link AdapterSet} the active choice.
 *
 * <p>All memory is the layers' device's, dense and row-major. y, x and the workspace do not overlap; a residual may be
 * its own y. Addresses given as {@code long} or as JavaCPP's pointers are used as they are; {@link DeviceMemory} is
 * checked for its size and kept alive during {@link #enqueue}. The caller owns all of it, and the layers. Methods may
 * be called from any thread, one after the other.
 *
 * <p>They throw {@link IllegalStateException} where a layer or a memory is closed, {@link IllegalArgumentException} for
 * memory that is too small, naming both sizes, and for an output beyond the last, and {@link OctoloraException} naming
 * the layers, the argument and the numbers: {@link Status#WORKSPACE_TOO_SMALL} for a workspace below
 * {@link #workspaceBytes}, else {@link Status#INVALID_ARGUMENT}. Defined by {@code octolora_forward} in
 * {@code octolora/octolora.h}.
 */
public final class ForwardCall {
  /** The most layers that one call takes. */
  public static final int MAX_OUTPUTS = 8;

  // The numbers of one output, in the order of octolora_java.h.
  private static final int LINEAR = 0;
  private static final int SLOTS = 1;
  private static final int Y = 2;
  private static final int RESIDUAL = 3;
  private static final int GATE = 4;
  private static final int ACTIVATION = 5;
  private static final int FIELDS = 6;

  private static final int EXPLANATION_BYTES = 1 << 14;

  private final Forward[] layers;
  private final String names;
  /** Guarded by this, as all below. */
  private final long[] outputs;
  /** For each number above the memory that it is the address of, or null. */
  private final @Nullable DeviceMemory[] memories;
  /**
   * The same for JavaCPP's pointers, and behind them those of x, rowSlots and workspace: held, since a pointer that
   * owns its memory frees it when it is collected.
   */
  private final @Nullable Pointer[] pointers;

  private long x;
  private @Nullable DeviceMemory xMemory;
  private long rowSlots;
  private @Nullable DeviceMemory rowSlotsMemory;
  private long workspace;
  private long workspaceBytes;
  private @Nullable DeviceMemory workspaceMemory;
  private DataType xType = DataType.FLOAT32;
  private DataType yType = DataType.FLOAT32;
  private int rows;

  /** What the call in progress holds. */
  private final NativeHandle[] held;
  private int heldCount;

  /**
   * A call without rows, and so without work.
   *
   * @param layers 1 to {@value #MAX_OUTPUTS} layers of one {@link Device}, of the same input features and quantization;
   *     their order numbers the outputs from 0
   */
  public ForwardCall(Forward... layers) {
    if (layers.length < 1 || layers.length > MAX_OUTPUTS) {
      throw new IllegalArgumentException("%d layers, expected 1 to %d".formatted(layers.length, MAX_OUTPUTS));
    }
    this.layers = layers.clone();
    this.names = Arrays.stream(layers).map(Forward::name).collect(Collectors.joining(", "));
    this.outputs = new long[FIELDS * layers.length];
    this.memories = new DeviceMemory[outputs.length];
    this.pointers = new Pointer[outputs.length + 3];
    this.held = new NativeHandle[outputs.length + 4];
  }

  // ---- What is read

  /** x [rows, k], for this and the following calls. */
  public ForwardCall x(DeviceMemory x, DataType type, int rows) {
    return setX(0, Objects.requireNonNull(x, "x"), null, type, rows);
  }

  /** The same by its address. */
  public ForwardCall x(long address, DataType type, int rows) {
    return setX(address, null, null, type, rows);
  }

  /** The same from a pointer's position on. */
  public ForwardCall x(Pointer x, DataType type, int rows) {
    return setX(Device.address(x, "x"), null, x, type, rows);
  }

  private synchronized ForwardCall setX(long address, @Nullable DeviceMemory memory, @Nullable Pointer pointer,
      DataType type, int rows) {
    this.x = address;
    this.xMemory = memory;
    this.pointers[outputs.length] = pointer;
    this.xType = Objects.requireNonNull(type, "type");
    this.rows = rows;
    return this;
  }

  /**
   * The slot that each row uses, in every output by its number; -1, and whatever is no filled slot of an output, adds
   * nothing there.
   *
   * @param slots [rows] int32; null, as at first: every row uses all filled slots
   */
  public ForwardCall rowSlots(@Nullable DeviceMemory slots) {
    return setRowSlots(0, slots, null);
  }

  /** The same by its address, 0 for none. */
  public ForwardCall rowSlots(long address) {
    return setRowSlots(address, null, null);
  }

  /** The same from a pointer's position on. */
  public ForwardCall rowSlots(Pointer slots) {
    return setRowSlots(Device.address(slots, "slots"), null, slots);
  }

  private synchronized ForwardCall setRowSlots(long address, @Nullable DeviceMemory memory, @Nullable Pointer pointer) {
    this.rowSlots = address;
    this.rowSlotsMemory = memory;
    this.pointers[outputs.length + 1] = pointer;
    return this;
  }

  // ---- The outputs

  /** The type of every y, residual and gate; at first {@link DataType#FLOAT32}. */
  public synchronized ForwardCall yType(DataType type) {
    this.yType = Objects.requireNonNull(type, "type");
    return this;
  }

  /** y [rows, n] of an output. */
  public ForwardCall y(int output, DeviceMemory y) {
    return set(output, Y, 0, Objects.requireNonNull(y, "y"), null);
  }

  /** The same by its address. */
  public ForwardCall y(int output, long address) {
    return set(output, Y, address, null, null);
  }

  /** The same from a pointer's position on. */
  public ForwardCall y(int output, Pointer y) {
    return set(output, Y, Device.address(y, "y"), null, y);
  }

  /** What is added to y, [rows, n], which may be y itself; null, as at first, for nothing. */
  public ForwardCall residual(int output, @Nullable DeviceMemory residual) {
    return set(output, RESIDUAL, 0, residual, null);
  }

  /** The same by its address, 0 for none. */
  public ForwardCall residual(int output, long address) {
    return set(output, RESIDUAL, address, null, null);
  }

  /** The same from a pointer's position on. */
  public ForwardCall residual(int output, Pointer residual) {
    return set(output, RESIDUAL, Device.address(residual, "residual"), null, residual);
  }

  /** A factor for each output feature, [n]; null, as at first, for 1. */
  public ForwardCall gate(int output, @Nullable DeviceMemory gate) {
    return set(output, GATE, 0, gate, null);
  }

  /** The same by its address, 0 for none. */
  public ForwardCall gate(int output, long address) {
    return set(output, GATE, address, null, null);
  }

  /** The same from a pointer's position on. */
  public ForwardCall gate(int output, Pointer gate) {
    return set(output, GATE, Device.address(gate, "gate"), null, gate);
  }

  /** At first {@link Activation#NONE}. */
  public ForwardCall activation(int output, Activation activation) {
    return set(output, ACTIVATION, activation.code(), null, null);
  }

  private synchronized ForwardCall set(int output, int field, long number, @Nullable DeviceMemory memory,
      @Nullable Pointer pointer) {
    if (output < 0 || output >= layers.length) {
      throw new IllegalArgumentException("%s: output %d, expected 0 to %d".formatted(names, output, layers.length - 1));
    }
    int at = FIELDS * output + field;
    outputs[at] = number;
    memories[at] = memory;
    pointers[at] = pointer;
    return this;
  }

  // ---- The call

  /** Scratch of at least {@link #workspaceBytes} bytes; null where that is 0. */
  public ForwardCall workspace(@Nullable DeviceMemory workspace) {
    return setWorkspace(0, workspace, null, workspace == null ? 0 : workspace.bytes());
  }

  /** The same by its address. */
  public ForwardCall workspace(long address, long bytes) {
    return setWorkspace(address, null, null, bytes);
  }

  /** The same from a pointer's position on. */
  public ForwardCall workspace(Pointer workspace, long bytes) {
    return setWorkspace(Device.address(workspace, "workspace"), null, workspace, bytes);
  }

  private synchronized ForwardCall setWorkspace(long address, @Nullable DeviceMemory memory, @Nullable Pointer pointer,
      long bytes) {
    this.workspace = address;
    this.workspaceMemory = memory;
    this.pointers[outputs.length + 2] = pointer;
    this.workspaceBytes = bytes;
    return this;
  }

  /** Bytes of scratch for the rows and types set, with the adapters of now; enough for fewer rows as well. */
  public synchronized long workspaceBytes() {
    long[] bytes = new long[1];
    try {
      holdLayers();
      NativeLibrary.check(
          NativeOctolora.forwardWorkspace(rows, xType.code(), yType.code(), x, rowSlots, outputs, layers.length, bytes),
          names);
    } finally {
      release();
    }
    return bytes[0];
  }

  /** Enqueues the call on a stream and returns; null is the default stream. On the CPU it is done on return. */
  public synchronized void enqueue(@Nullable Stream stream) {
    try {
      enqueueHeld(stream == null ? 0 : hold(stream.handle()));
    } finally {
      release();
    }
  }

  /** The same on a {@code cudaStream_t}, 0 being the default stream. */
  public synchronized void enqueue(long stream) {
    try {
      enqueueHeld(stream);
    } finally {
      release();
    }
  }

  /** The same on a stream such as {@code org.bytedeco.cuda.cudart.CUstream_st}. */
  public void enqueue(Pointer stream) {
    try {
      enqueue(stream.address());
    } finally { // a pointer that owns its stream destroys it when it is collected
      Reference.reachabilityFence(stream);
    }
  }

  private void enqueueHeld(long stream) {
    holdLayers();
    holdMemories();
    NativeLibrary.check(
        NativeOctolora.forward(rows, xType.code(), yType.code(), x, rowSlots, outputs, layers.length, workspace,
            workspaceBytes, stream),
        names);
  }

  /** How the call would run: its kernels, tiles and launches and why, in lines for people. */
  public synchronized String explain() {
    byte[] text = new byte[EXPLANATION_BYTES];
    try {
      holdLayers();
      holdMemories();
      NativeLibrary.check(
          NativeOctolora.forwardExplain(rows, xType.code(), yType.code(), x, rowSlots, outputs, layers.length, text,
              text.length),
          names);
    } finally {
      release();
    }
    int length = 0;
    while (text[length] != 0) {
      length++;
    }
    return new String(text, 0, length, StandardCharsets.UTF_8);
  }

  // ---- What a call holds

  private void holdLayers() {
    for (int i = 0; i < layers.length; i++) {
      outputs[FIELDS * i + LINEAR] = hold(layers[i].linear);
      NativeHandle slots = layers[i].acquireSlots();
      if (slots != null) {
        held[heldCount++] = slots;
      }
      outputs[FIELDS * i + SLOTS] = slots == null ? 0 : slots.address();
    }
  }

  private void holdMemories() {
    if (xMemory != null) {
      x = hold(xMemory, (long) rows * layers[0].k * xType.bytes(), "x");
    }
    if (rowSlotsMemory != null) {
      rowSlots = hold(rowSlotsMemory, 4L * rows, "rowSlots");
    }
    if (workspaceMemory != null) {
      workspace = hold(workspaceMemory, 0, "workspace");
    }
    for (int i = 0; i < layers.length; i++) {
      long row = (long) layers[i].n * yType.bytes();
      holdMemory(FIELDS * i + Y, rows * row, "y");
      holdMemory(FIELDS * i + RESIDUAL, rows * row, "residual");
      holdMemory(FIELDS * i + GATE, row, "gate");
    }
  }

  private void holdMemory(int at, long needed, String what) {
    DeviceMemory memory = memories[at];
    if (memory != null) {
      outputs[at] = hold(memory, needed, what);
    }
  }

  private long hold(DeviceMemory memory, long needed, String what) {
    memory.require(needed, what);
    return hold(memory.handle());
  }

  private long hold(NativeHandle handle) {
    long address = handle.acquire();
    held[heldCount++] = handle;
    return address;
  }

  private void release() {
    while (heldCount > 0) {
      held[--heldCount].release();
    }
  }

  /** Such as {@code "to_q, to_k, to_v [rows = 4608]"}. */
  @Override
  public synchronized String toString() {
    return "%s [rows = %d]".formatted(names, rows);
  }
}
