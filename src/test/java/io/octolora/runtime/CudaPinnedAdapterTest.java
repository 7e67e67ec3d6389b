// SPDX-License-Identifier: Apache-2.0
package io.octolora.runtime;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertTrue;

import java.nio.ByteBuffer;
import java.util.ArrayList;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.Optional;
import java.util.Random;
import org.junit.jupiter.api.Assumptions;
import org.junit.jupiter.api.BeforeAll;
import org.junit.jupiter.api.Tag;
import org.junit.jupiter.api.Test;

@Tag("gpu")
class CudaPinnedAdapterTest extends PinnedAdapterContract {
  @BeforeAll
  static void needsADevice() {
    Optional<String> reason = Device.cudaUnavailableReason();
    reason.ifPresent(why -> System.out.println("CudaPinnedAdapterTest skipped: " + why));
    Assumptions.assumeTrue(reason.isEmpty(), () -> "no CUDA device: " + reason.get());
  }

  @Override
  Device open() {
    return Device.cuda(0);
  }

  /**
   * As many layers and bytes as a rank 16 adapter of FLUX.1 has. Waiting for the device is part of each time; the best
   * of some rounds counts, since the machine may have other work. In a set with a capacity the other adapter has half
   * the rank.
   */
  @Test
  void swappingAModelTakesAtMostTwiceTheTimeOfCopyingItsBytes() {
    int layerCount = 504;
    int size = 3072;
    int rank = 32;
    long bytes = 2L * 2 * rank * size * layerCount;
    List<Int8Linear> layers = new ArrayList<>();
    List<AdapterSlots> slots = new ArrayList<>();
    Random random = new Random(1);
    byte[] numbers = new byte[2 * rank * size];
    random.nextBytes(numbers);
    for (int i = 1; i < numbers.length; i += 2) {
      numbers[i] = (byte) (numbers[i] & 0x80 | 0x3b + (numbers[i] & 3)); // bf16 of about 0.01, either sign
    }
    ByteBuffer weight = ByteBuffer.allocateDirect(size * size);
    try (Device device = open();
        PinnedMemory memory = new PinnedMemory(device.handle(), "test", 2 * bytes);
        DeviceMemory target = device.allocate(PinnedMemory.CHUNK_BYTES);
        Stream stream = device.createStream()) {
      for (int i = 0; i < layerCount; i++) {
        Int8Linear layer = device.load("layer " + i, size, size, DeviceContract.DYNAMIC, weight, new float[] {0.01f},
            null);
        layers.add(layer);
        slots.add(layer.slots(LoraPrecision.BITS_16, rank));
      }
      List<Map<String, HostAdapter>> adapters = new ArrayList<>();
      for (int adapter = 0; adapter < 2; adapter++) {
        Map<String, HostAdapter> copies = new LinkedHashMap<>();
        for (Int8Linear layer : layers) {
          ByteBuffer a = memory.take(numbers.length).put(numbers).flip();
          ByteBuffer b = memory.take(numbers.length).put(numbers).flip();
          copies.put(layer.name(), new HostAdapter(rank, a, DataType.BFLOAT16, b, DataType.BFLOAT16, null, null, 1));
        }
        adapters.add(copies);
      }
      ByteBuffer whole = memory.take(PinnedMemory.CHUNK_BYTES);
      long from = NativeOctolora.address(whole);
      double copy = best(stream, round -> {
        for (long left = bytes; left > 0; left -= PinnedMemory.CHUNK_BYTES) {
          device.copy(target.address(), from, Math.min(left, PinnedMemory.CHUNK_BYTES), stream.address());
        }
      });
      double filled;
      try (PinnedAdapter first = new PinnedAdapter(device.handle(), "first", 0, none -> adapters.get(0));
          PinnedAdapter second = new PinnedAdapter(device.handle(), "second", 0, none -> adapters.get(1))) {
        filled = best(stream, round -> (round % 2 == 0 ? first : second).fill(slots, 0, 1, stream.address()));
      }
      double swapped;
      try (AdapterSet set = new AdapterSet(layers)) {
        set.add("0", adapters.get(0));
        set.add("1", adapters.get(1));
        swapped = best(stream, round -> set.setAdapters(Integer.toString(round % 2)));
      }
      double resized;
      try (AdapterSet set = new AdapterSet(layers, LoraPrecision.BITS_16, 0, new AdapterSet.Capacity(1, rank))) {
        set.add("0", adapters.get(0));
        set.add("1", half(adapters.get(1)));
        long made = device.memoryInUse();
        resized = best(stream, round -> set.setAdapters(Integer.toString(round % 2)), 2);
        assertEquals(made, device.memoryInUse(), "bytes in use on " + device);
      }
      System.out.printf("%s: %d layers, %.1f MB: one copy %.2f ms, PinnedAdapter.fill %.2f ms, AdapterSet.setAdapters "
          + "%.2f ms, to and fro between two ranks %.2f ms%n", device, layerCount, bytes / 1e6, copy, filled, swapped,
          resized);
      assertTrue(filled <= 2 * copy, "fill takes " + filled + " ms, a copy " + copy);
      assertTrue(swapped <= 2 * copy, "setAdapters takes " + swapped + " ms, a copy " + copy);
      assertTrue(resized <= 2 * 1.5 * copy, "setAdapters of two ranks takes " + resized + " ms, their copies "
          + 1.5 * copy);
    } finally {
      slots.forEach(AdapterSlots::close);
      layers.forEach(Int8Linear::close);
    }
  }

  /** The first half of the ranks of A and as many numbers of B. */
  private static Map<String, HostAdapter> half(Map<String, HostAdapter> adapters) {
    Map<String, HostAdapter> halves = new LinkedHashMap<>();
    adapters.forEach((layer, one) -> halves.put(layer, new HostAdapter(one.rank / 2,
        one.a.slice(0, one.a.capacity() / 2), one.aType, one.b.slice(0, one.b.capacity() / 2), one.bType, null, null,
        one.scale)));
    return halves;
  }

  private interface Round {
    void run(int round);
  }

  private static double best(Stream stream, Round action) {
    return best(stream, action, 1);
  }

  /** Milliseconds of as many actions one after the other. */
  private static double best(Stream stream, Round action, int actions) {
    double best = Double.MAX_VALUE;
    for (int round = 0; round < 40; round++) {
      stream.synchronize();
      long start = System.nanoTime();
      for (int i = 0; i < actions; i++) {
        action.run(actions * round + i);
      }
      stream.synchronize();
      best = Math.min(best, (System.nanoTime() - start) / 1e6);
    }
    return best;
  }
}
