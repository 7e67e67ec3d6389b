// SPDX-License-Identifier: Apache-2.0
package io.octolora.runtime;

import io.octolora.OctoloraException;
import io.octolora.Status;
import java.lang.ref.Reference;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.List;
import java.util.regex.Matcher;
import java.util.regex.Pattern;

/** Adapters for slots of layers of one device, put there by one call of {@code octolora_slots_set_many}. */
final class SlotFills {
  /** Of each fill, in the order of octolora_java.h. */
  private static final int NUMBERS = 10;
  private static final Pattern FILL = Pattern.compile("fills\\[(\\d+)]: (.*)", Pattern.DOTALL);

  private final List<String> layers = new ArrayList<>();
  /** Whose memory the numbers are addresses of. */
  private final List<HostAdapter> adapters = new ArrayList<>();
  private long[] numbers = new long[NUMBERS];
  private float[] scales = new float[1];

  /**
   * @param layer its name, for messages
   * @param slots held by the caller until {@link #run} returns
   */
  void add(String layer, NativeHandle slots, int slot, HostAdapter adapter, float weight, LoraPrecision precision) {
    int at = layers.size();
    if (at == scales.length) {
      numbers = Arrays.copyOf(numbers, 2 * numbers.length);
      scales = Arrays.copyOf(scales, 2 * scales.length);
    }
    int first = at * NUMBERS;
    numbers[first] = slots.address();
    numbers[first + 1] = slot;
    numbers[first + 2] = adapter.rank;
    numbers[first + 3] = adapter.aType.code();
    numbers[first + 4] = adapter.bType.code();
    numbers[first + 5] = precision.code();
    System.arraycopy(adapter.addresses, 0, numbers, first + 6, adapter.addresses.length);
    scales[at] = (float) (weight * adapter.scale);
    layers.add(layer);
    adapters.add(adapter);
  }

  /** Enqueues all of them or, naming the layer, none. What lies in pageable memory is read before this returns. */
  void run(long stream) {
    int status = layers.isEmpty() ? 0 : NativeOctolora.slotsSet(numbers, scales, layers.size(), stream);
    Reference.reachabilityFence(adapters);
    if (status != 0) {
      String message = NativeOctolora.lastError();
      Matcher fill = FILL.matcher(message);
      throw new OctoloraException(Status.ofCode(status), fill.matches()
          ? layers.get(Integer.parseInt(fill.group(1))) + ": " + fill.group(2)
          : layers.size() == 1 ? layers.get(0) + ": " + message : message);
    }
  }
}
