// SPDX-License-Identifier: Apache-2.0
package io.octolora.runtime;

import java.util.function.Supplier;
import org.jetbrains.annotations.Nullable;

/** A layer with the slots that its {@link AdapterSet} or {@link AdapterSet.Selection} has for it. It owns nothing. */
final class AdaptedLayer extends Forward {
  private final Supplier<@Nullable NativeHandle> slots;

  /** @param slots {@link #acquireSlots} */
  AdaptedLayer(Int8Linear layer, Supplier<@Nullable NativeHandle> slots) {
    super(layer.device, layer.linear, layer.name, layer.n, layer.k);
    this.slots = slots;
  }

  @Override
  @Nullable NativeHandle acquireSlots() {
    return slots.get();
  }

  /** Nothing to free. */
  @Override
  public void close() {}
}
