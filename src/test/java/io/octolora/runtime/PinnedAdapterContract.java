// SPDX-License-Identifier: Apache-2.0
package io.octolora.runtime;

import static org.junit.jupiter.api.Assertions.assertArrayEquals;
import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertFalse;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import io.octolora.Fixtures;
import io.octolora.OctoloraException;
import io.octolora.SafetensorsWriter;
import io.octolora.Status;
import io.octolora.adapter.LoraAdapter;
import io.octolora.checkpoint.Checkpoint;
import io.octolora.mapping.ModuleMap;
import java.io.IOException;
import java.nio.ByteBuffer;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.HashSet;
import java.util.List;
import java.util.Set;
import org.junit.jupiter.api.AfterEach;
import org.junit.jupiter.api.BeforeEach;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.function.Executable;
import org.junit.jupiter.api.io.TempDir;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.ValueSource;

/** What pinned adapters do on every device; one subclass for each. Two adapters of different layers, and DoRA. */
abstract class PinnedAdapterContract {
  private static final int ROWS = 3;
  private static final int CAPACITY = 8;

  private Device device;
  private long before;
  private Checkpoint base;
  private ModuleMap r4;
  private ModuleMap r8;
  private final List<LoraAdapter> files = new ArrayList<>();
  private final List<Int8Linear> layers = new ArrayList<>();
  private final List<AdapterSlots> slots = new ArrayList<>();

  abstract Device open();

  @BeforeEach
  void load() throws IOException {
    device = open();
    before = device.memoryInUse();
    base = Checkpoint.open(Fixtures.path("flux/base_bnb8"));
    r4 = map("r4");
    r8 = map("r8_attn_bf16");
    assertNotSameModules();
    for (String module : r4.modules()) {
      Int8Linear layer = device.load(base.linear(module));
      layers.add(layer);
      slots.add(layer.slots(LoraPrecision.BITS_16, true, 1, CAPACITY));
    }
  }

  private ModuleMap map(String name) throws IOException {
    LoraAdapter file = LoraAdapter.open(Fixtures.path("flux/adapters/" + name + "/peft"));
    files.add(file);
    return ModuleMap.of(base, file);
  }

  /** The test of what is left of another adapter needs layers that one of them alone changes. */
  private void assertNotSameModules() {
    assertTrue(r4.modules().containsAll(r8.modules()) && r4.modules().size() > r8.modules().size());
  }

  @AfterEach
  void nothingIsLeft() {
    slots.forEach(AdapterSlots::close);
    layers.forEach(Int8Linear::close);
    files.forEach(LoraAdapter::close);
    base.close();
    assertEquals(before, device.memoryInUse(), "bytes in use on " + device);
    device.close();
  }

  @Test
  void fillingAModelIsFillingItsLayers() throws IOException {
    ModuleMap dora = map("dora");
    try (PinnedAdapter first = device.pin("first", r4);
        PinnedAdapter second = device.pin("second", r8);
        PinnedAdapter third = device.pin("third", dora);
        Stream stream = device.createStream()) {
      files.forEach(LoraAdapter::close); // they were copied
      try (LoraAdapter r4File = LoraAdapter.open(Fixtures.path("flux/adapters/r4/peft"));
          LoraAdapter r8File = LoraAdapter.open(Fixtures.path("flux/adapters/r8_attn_bf16/peft"));
          LoraAdapter doraFile = LoraAdapter.open(Fixtures.path("flux/adapters/dora/peft"))) {
        first.fill(slots, 1, 0.5f, stream.address());
        expect(ModuleMap.of(base, r4File), 0.5f, stream);
        second.fill(slots, 1, -2, new DeviceContract.Address(stream.address()));
        expect(ModuleMap.of(base, r8File), -2, stream);
        third.fill(slots, 1, 1, stream.address());
        expect(ModuleMap.of(base, doraFile), 1, stream);
        first.fill(slots, 1, 1, stream.address());
        for (AdapterSlots one : slots) {
          one.setWeight(1, 0.5f, stream.address()); // the adapter's own scale is remembered
        }
        expect(ModuleMap.of(base, r4File), 0.5f, stream);
        assertThrows(IllegalStateException.class, () -> slots.get(0).setWeight(0, 1, stream.address()),
            "slot 0 is empty");
      }
    }
  }

  /** Every layer has the bits that slots filled one by one give, or empty ones where the adapter has nothing for it. */
  private void expect(ModuleMap map, float weight, Stream stream) {
    stream.synchronize();
    int changed = 0;
    for (int i = 0; i < layers.size(); i++) {
      Int8Linear layer = layers.get(i);
      float[] x = new RandomLayer(i, 1, 1, DeviceContract.DYNAMIC, false, false).floats(ROWS * layer.k());
      try (AdapterSlots one = layer.slots(LoraPrecision.BITS_16, true, 1, CAPACITY)) {
        float[] plain = one.forward(x, ROWS);
        if (map.modules().contains(layer.name())) {
          one.set(1, map.delta(layer.name()), weight, 0);
          assertFalse(Arrays.equals(plain, one.forward(x, ROWS)), layer.name());
          changed++;
        }
        assertArrayEquals(one.forward(x, ROWS), slots.get(i).forward(x, ROWS), layer.name());
      }
    }
    assertEquals(map.modules().size(), changed);
  }

  @Test
  void itSaysWhatItIs() {
    try (PinnedAdapter pinned = device.pin("style", r8)) {
      assertEquals(r8.modules(), pinned.modules());
      assertThrows(UnsupportedOperationException.class, () -> pinned.modules().clear());
      long numbers = r8.modules().stream().map(r8::delta)
          .mapToLong(delta -> delta.a().byteSize() + delta.b().byteSize()).sum();
      assertTrue(pinned.bytes() >= numbers && pinned.bytes() < numbers + 512L * r8.modules().size(),
          pinned.bytes() + " bytes for " + numbers);
      assertEquals("PinnedAdapter style of %d layers, %d bytes".formatted(r8.modules().size(), pinned.bytes()),
          pinned.toString());
    }
  }

  @Test
  void refusalsNameTheLayerAndFillNothing() {
    PinnedAdapter pinned = device.pin("style", r4);
    String first = slots.get(0).name();
    float[] x = new float[slots.get(0).k()];
    Arrays.fill(x, 1);
    float[] plain = slots.get(0).forward(x, 1);
    List<AdapterSlots> rest = slots.subList(1, slots.size());
    refused("adapter style changes 1 layers that are not in this set of %d: %s".formatted(rest.size(), first),
        () -> pinned.fill(rest, 1, 1, 0));
    refused(first + ": slot = 2, expected 0 to 1", () -> pinned.fill(slots, 2, 1, 0));
    refused(first + ": slot = -1, expected 0 to 1", () -> pinned.fill(slots, -1, 1, 0));
    refused(first + ": adapter.rank = 4, expected 1 to 1, the capacity of slot 0", () -> pinned.fill(slots, 0, 1, 0));
    refused(first + ": scale = nan is not finite", () -> pinned.fill(slots, 1, Float.NaN, 0));
    try (Device other = open();
        Int8Linear layer = other.load(base.linear(first));
        AdapterSlots elsewhere = layer.slots(LoraPrecision.BITS_16, CAPACITY)) {
      List<AdapterSlots> mixed = new ArrayList<>(rest);
      mixed.add(elsewhere);
      refused(first + " is on another device than adapter style", () -> pinned.fill(mixed, 0, 1, 0));
    }
    ByteBuffer weight = ByteBuffer.allocateDirect(6);
    try (Int8Linear narrow = device.load(first, 2, 3, DeviceContract.DYNAMIC, weight, new float[] {1}, null);
        AdapterSlots one = narrow.slots(LoraPrecision.BITS_16, 1, CAPACITY)) {
      List<AdapterSlots> mixed = new ArrayList<>(rest);
      mixed.add(one);
      String message = assertThrows(IllegalArgumentException.class, () -> pinned.fill(mixed, 1, 1, 0)).getMessage();
      assertTrue(message.startsWith(first + ": an adapter of rank 4 with ") && message.endsWith("n = 2, k = 3"),
          message);
    }
    try (AdapterSlots gone = layers.get(0).slots(LoraPrecision.BITS_16, 1, CAPACITY)) {
      List<AdapterSlots> closed = new ArrayList<>(rest);
      closed.add(gone);
      gone.close();
      assertEquals("AdapterSlots of %s is closed".formatted(first),
          assertThrows(IllegalStateException.class, () -> pinned.fill(closed, 1, 1, 0)).getMessage());
    }
    assertArrayEquals(plain, slots.get(0).forward(x, 1), "after the refusals");
    pinned.close();
    pinned.close();
    assertEquals("PinnedAdapter style is closed",
        assertThrows(IllegalStateException.class, () -> pinned.fill(slots, 1, 1, 0)).getMessage());
  }

  private static void refused(String message, Executable call) {
    OctoloraException thrown = assertThrows(OctoloraException.class, call);
    assertEquals(message, thrown.getMessage());
    assertEquals(Status.INVALID_ARGUMENT, thrown.status());
  }

  /** From pinned memory the device reads them for itself, from pageable memory the library checks them: the same. */
  @ParameterizedTest
  @ValueSource(strings = {"lora_B.bias", "lora_magnitude_vector"})
  void vectorsThatAreNoNumbersAreRefused(String part, @TempDir Path folder) throws IOException {
    String module = "model.layers.0.self_attn.q_proj";
    float[] vector = new float[64];
    vector[3] = Float.NEGATIVE_INFINITY;
    Path file = new SafetensorsWriter().ramp("transformer." + module + ".lora_A.weight", 0.01f, 2, 64)
        .ramp("transformer." + module + ".lora_B.weight", 0.01f, 64, 2)
        .floats("transformer." + module + "." + part, new long[] {64}, vector).write(folder.resolve("x.safetensors"));
    String what = module + ": adapter." + (part.endsWith("bias") ? "bias" : "magnitude")
        + "[3] = -Infinity is not finite";
    try (Checkpoint llama = Checkpoint.open(Fixtures.path("llama/base_bnb8"));
        LoraAdapter bad = LoraAdapter.open(file);
        Int8Linear layer = device.load(llama.linear(module));
        AdapterSet set = new AdapterSet(List.of(layer))) {
      ModuleMap map = ModuleMap.of(llama, bad);
      refused(what, () -> device.pin("bad", map));
      refused(what, () -> set.add("bad", map));
      assertEquals(0, set.pinnedBytes());
      refused(what, () -> layer.attach(map.delta(module), 1));
    }
  }

  @Test
  void piecesOfPinnedMemoryAreApart() {
    Set<Long> addresses = new HashSet<>();
    int large = PinnedMemory.CHUNK_BYTES / 2 + 1;
    try (PinnedMemory memory = new PinnedMemory(device.handle(), "test", 3L * large)) {
      List<ByteBuffer> pieces = new ArrayList<>();
      for (int bytes : new int[] {1, 255, 0, large, 257, large, large, 3}) {
        ByteBuffer piece = memory.take(bytes);
        assertTrue(piece.isDirect());
        assertEquals(bytes, piece.capacity());
        assertEquals(0, NativeOctolora.address(piece) % 256);
        assertTrue(bytes == 0 || addresses.add(NativeOctolora.address(piece)));
        for (int i = 0; i < bytes; i += 97) {
          piece.put(i, (byte) pieces.size());
        }
        pieces.add(piece);
      }
      for (int p = 0; p < pieces.size(); p++) {
        for (int i = 0; i < pieces.get(p).capacity(); i += 97) {
          assertEquals((byte) p, pieces.get(p).get(i), "piece " + p);
        }
      }
    }
  }
}
