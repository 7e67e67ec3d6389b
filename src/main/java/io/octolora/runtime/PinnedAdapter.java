// SPDX-License-Identifier: Apache-2.0
package io.octolora.runtime;

import io.octolora.OctoloraException;
import io.octolora.Status;
import java.lang.ref.Reference;
import java.nio.ByteBuffer;
import java.util.ArrayList;
import java.util.Collection;
import java.util.Collections;
import java.util.LinkedHashSet;
import java.util.List;
import java.util.Map;
import java.util.Objects;
import java.util.Set;
import java.util.function.Function;
import java.util.function.IntFunction;
import org.bytedeco.javacpp.Pointer;

/**
 * An adapter of many layers in pinned host memory. {@link #fill} puts it into their slots in a few launches, at the
 * speed of the bus: a swap of a whole model's adapter that waits for nothing, under forwards in progress on other
 * streams and for graphs that were captured before.
 *
 * <p>Pinned memory is not swapped out, and taking it takes longer than filling it: adapters that are used again and
 * again belong here. The caller closes it; {@link #close()} waits for the device. It may be used by several threads.
 * Calls throw {@link IllegalStateException} after that, and {@link OctoloraException} with
 * {@link Status#INVALID_ARGUMENT} naming the adapter, the layer and the numbers. Made by {@link Device#pin}; defined by
 * {@code octolora_slots_set_many} in {@code octolora/octolora.h}.
 */
public final class PinnedAdapter implements AutoCloseable {
  private final NativeHandle device;
  private final String name;
  private final long bytes;
  private final Map<String, HostAdapter> layers;
  private final NativeHandle handle;

  PinnedAdapter(NativeHandle device, String name, long bytes,
      Function<IntFunction<ByteBuffer>, Map<String, HostAdapter>> copy) {
    this.device = device;
    this.name = Objects.requireNonNull(name, "name");
    this.bytes = bytes;
    PinnedMemory memory = new PinnedMemory(device, "adapter " + name, bytes);
    boolean complete = false;
    try {
      this.layers = copy.apply(memory::take);
      this.handle = new NativeHandle("PinnedAdapter " + name, 0, none -> memory.close());
      complete = true;
    } finally {
      if (!complete) {
        memory.close();
      }
    }
  }

  /** The layers that it changes. */
  public Set<String> modules() {
    return Collections.unmodifiableSet(layers.keySet());
  }

  /** Bytes of pinned memory. */
  public long bytes() {
    return bytes;
  }

  /**
   * Fills one slot of each of these, and clears it where the adapter does not change the layer, so that nothing is left
   * there of another adapter. Enqueues and returns; this stays open until the stream is past it, and changes must be
   * ordered with the calls that read the slots, as {@link AdapterSlots} says. May be captured in a CUDA graph.
   *
   * @param slots of layers on the device that this was made by; every layer that the adapter changes is there
   * @param slot its number, in all of them
   * @param weight any finite number; it multiplies the adapter's own scale
   * @param stream a {@code cudaStream_t}; 0 is the default stream, and the only one on the CPU
   */
  public void fill(Collection<AdapterSlots> slots, int slot, float weight, long stream) {
    Set<String> absent = new LinkedHashSet<>(layers.keySet());
    slots.forEach(one -> absent.remove(one.name));
    if (!absent.isEmpty()) {
      throw invalid(HostAdapter.absent(name, List.copyOf(absent), slots.size()));
    }
    List<NativeHandle> held = new ArrayList<>();
    try {
      hold(handle, held);
      SlotFills fills = new SlotFills();
      for (AdapterSlots one : slots) {
        hold(one.handle, held);
        if (one.device != device) {
          throw invalid("%s is on another device than adapter %s".formatted(one.name, name));
        }
        one.requireSlot(slot);
        HostAdapter adapter = layers.get(one.name);
        if (adapter != null) {
          adapter.requireFit(one.name, one.n, one.k);
          one.fill(fills, slot, adapter, weight);
        }
      }
      fills.run(stream);
      for (AdapterSlots one : slots) {
        HostAdapter adapter = layers.get(one.name);
        if (adapter != null) {
          one.filled(slot, adapter);
        } else {
          one.clear(slot, stream);
        }
      }
    } finally {
      held.forEach(NativeHandle::release);
    }
  }

  /** The same on a stream such as {@code org.bytedeco.cuda.cudart.CUstream_st}. */
  public void fill(Collection<AdapterSlots> slots, int slot, float weight, Pointer stream) {
    try {
      fill(slots, slot, weight, stream.address());
    } finally { // a pointer that owns its stream destroys it when it is collected
      Reference.reachabilityFence(stream);
    }
  }

  private static void hold(NativeHandle one, List<NativeHandle> held) {
    one.acquire();
    held.add(one);
  }

  private static OctoloraException invalid(String message) {
    return new OctoloraException(Status.INVALID_ARGUMENT, message);
  }

  @Override
  public void close() {
    handle.close();
  }

  @Override
  public String toString() {
    return "PinnedAdapter %s of %d layers, %d bytes".formatted(name, layers.size(), bytes);
  }
}
