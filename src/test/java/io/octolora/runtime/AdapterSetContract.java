// SPDX-License-Identifier: Apache-2.0
package io.octolora.runtime;

import static org.junit.jupiter.api.Assertions.assertArrayEquals;
import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertFalse;
import static org.junit.jupiter.api.Assertions.assertNotNull;
import static org.junit.jupiter.api.Assertions.assertNull;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import com.sun.management.ThreadMXBean;
import io.octolora.Fixtures;
import io.octolora.OctoloraException;
import io.octolora.Status;
import io.octolora.adapter.LoraAdapter;
import io.octolora.checkpoint.Checkpoint;
import io.octolora.checkpoint.Quantization;
import io.octolora.mapping.ModuleMap;
import java.io.IOException;
import java.lang.management.ManagementFactory;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.Random;
import java.util.concurrent.Callable;
import java.util.concurrent.ExecutorService;
import java.util.concurrent.Executors;
import java.util.concurrent.Future;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.atomic.AtomicInteger;
import java.util.concurrent.locks.LockSupport;
import java.util.stream.IntStream;
import org.junit.jupiter.api.AfterEach;
import org.junit.jupiter.api.BeforeEach;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.function.Executable;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.ValueSource;

/** What sets of adapters do on every device; one subclass for each. */
abstract class AdapterSetContract {
  private static final String FORWARDS = "octolora.soak.forwards";
  private static final int THREADS = 4;
  private static final int ROWS = 3;
  /** Bytes that the first adapter of a test fits, and not the second. */
  private static final long PINS_THE_FIRST = 100_000;

  private Device device;
  private long before;
  private Member q;
  private Member v;
  private AdapterSet set;
  /** Bytes in use with the layers loaded and nothing active. */
  private long idle;

  abstract Device open();

  /** Forwards of the soak test where the property does not say. */
  abstract int soakForwards();

  /**
   * A layer and its adapters. "ink" and "wash" sit on both layers, "line" on v alone. Their own scales are powers of
   * two, so that weight times scale has no rounding that the oracle would have to know.
   */
  private static final class Member {
    final RandomLayer layer;
    final Int8Linear linear;
    final Map<String, RandomLayer.Adapter> adapters = new LinkedHashMap<>();
    final Map<String, HostAdapter> hosts = new LinkedHashMap<>();

    Member(Device device, String name, RandomLayer layer) {
      this.layer = layer;
      this.linear = device.load(name, layer.n, layer.k, layer.quantization, layer.weight, layer.scale, layer.bias);
    }

    /** Remembers the adapter's own scale as its weight. */
    HostAdapter host(String name, int rank, float scale) {
      RandomLayer.Adapter made = layer.adapter(rank, scale);
      adapters.put(name, made);
      HostAdapter host = HostAdapter.of(rank, made.a(), made.b(), linear.name(), layer.n, layer.k);
      hosts.put(name, new HostAdapter(rank, host.a, host.aType, host.b, host.bType, null, null, scale));
      return hosts.get(name);
    }

    /** What the oracle adds for weights by name. */
    List<RandomLayer.Adapter> weighted(Map<String, Float> weights) {
      List<RandomLayer.Adapter> all = new ArrayList<>();
      weights.forEach((name, weight) -> {
        RandomLayer.Adapter one = adapters.get(name);
        if (one != null) {
          all.add(new RandomLayer.Adapter(one.rank(), one.a(), one.b(), weight * one.weight()));
        }
      });
      return all;
    }

    float[] x() {
      return layer.floats(ROWS * layer.k);
    }

    String judge(float[] x, float[] y, Map<String, Float> weights) {
      return layer.judge(x, ROWS, y, weighted(weights));
    }
  }

  @BeforeEach
  void load() {
    device = open();
    before = device.memoryInUse();
    q = new Member(device, "to_q", new RandomLayer(1, 37, 53, DeviceContract.DYNAMIC, true, true));
    v = new Member(device, "to_v", new RandomLayer(2, 24, 40, Quantization.weightOnly(), false, false));
    idle = device.memoryInUse();
    set = new AdapterSet(List.of(q.linear, v.linear));
    set.add("ink", Map.of("to_q", q.host("ink", 4, 0.5f), "to_v", v.host("ink", 8, 0.5f)));
    set.add("wash", Map.of("to_q", q.host("wash", 17, 2), "to_v", v.host("wash", 1, 1)));
    set.add("line", Map.of("to_v", v.host("line", 3, 1)));
  }

  @AfterEach
  void nothingIsLeft() {
    set.close();
    assertEquals(idle, device.memoryInUse(), "bytes of selections on " + device);
    q.linear.close();
    v.linear.close();
    assertEquals(before, device.memoryInUse(), "bytes in use on " + device);
    device.close();
  }

  // ---- What is active

  @Test
  void weightsScaleAndReplaceTheFormerOnes() {
    List<Map<String, Float>> choices = List.of(Map.of(), Map.of("ink", 1f), Map.of("ink", -0.75f, "line", 0.5f),
        Map.of("wash", 0.25f), Map.of("ink", 0.5f, "wash", 1f, "line", 2f), Map.of("ink", 0f), Map.of());
    for (Map<String, Float> weights : choices) {
      set.setAdapters(weights);
      assertEquals(weights, set.active());
      for (Member member : List.of(q, v)) {
        float[] x = member.x();
        float[] y = set.layer(member.linear.name()).forward(x, ROWS);
        assertNull(member.judge(x, y, weights), () -> member.linear + " with " + weights);
      }
    }
    set.setAdapters("line", "ink");
    assertEquals(Map.of("ink", 1f, "line", 1f), set.active());
    float[] x = v.x();
    assertNull(v.judge(x, set.layer("to_v").forward(x, ROWS), set.active()));
    set.setAdapters();
    assertEquals(Map.of(), set.active());
    assertArrayEquals(v.linear.forward(x, ROWS), set.layer("to_v").forward(x, ROWS));
    assertEquals(idle, device.memoryInUse(), "with nothing active");
  }

  @Test
  void theOrderOfNamesChangesNoBit() {
    float[] x = q.x();
    Forward layer = set.layer("to_q");
    set.setAdapters(ordered("ink", 0.3f, "wash", 0.7f));
    float[] one = layer.forward(x, ROWS);
    set.setAdapters(); // gives the slots up, so that the next are filled anew
    set.setAdapters(ordered("wash", 0.7f, "ink", 0.3f));
    assertArrayEquals(one, layer.forward(x, ROWS));
  }

  private static Map<String, Float> ordered(String first, float one, String second, float two) {
    Map<String, Float> weights = new LinkedHashMap<>();
    weights.put(first, one);
    weights.put(second, two);
    return weights;
  }

  @Test
  void whatIsAttachedToALayerIsApart() {
    float[] x = q.x();
    q.layer.attach(q.linear, q.layer.adapter(5, 1));
    set.setAdapters("ink");
    assertNull(q.layer.judge(x, ROWS, q.linear.forward(x, ROWS)));
    assertNull(q.judge(x, set.layer("to_q").forward(x, ROWS), set.active()));
    q.linear.detachAll();
  }

  @Test
  void aRemovedAdapterIsNoLongerActive() {
    set.setAdapters(Map.of("ink", 0.5f, "wash", 1f));
    float[] x = q.x();
    try (AdapterSet.Selection kept = set.select()) {
      set.remove("ink");
      assertEquals(List.of("wash", "line"), List.copyOf(set.names()));
      assertEquals(Map.of("wash", 1f), set.active());
      assertNull(q.judge(x, set.layer("to_q").forward(x, ROWS), Map.of("wash", 1f)));
      assertNull(q.judge(x, kept.layer("to_q").forward(x, ROWS), Map.of("ink", 0.5f, "wash", 1f)));

      // another adapter of the same name is not taken for the one that the selection holds
      set.add("ink", Map.of("to_q", q.host("ink", 6, 1)));
      set.setAdapters(Map.of("ink", 0.5f, "wash", 1f));
      assertNull(q.judge(x, set.layer("to_q").forward(x, ROWS), set.active()));
      assertNotNull(q.judge(x, kept.layer("to_q").forward(x, ROWS), set.active()));
    }
  }

  // ---- Selections

  @Test
  void aSelectionIsItsHoldersAlone() {
    float[] x = v.x();
    Map<String, Float> weights = new LinkedHashMap<>(Map.of("line", 0.5f));
    AdapterSet.Selection own = set.select(weights);
    weights.put("ink", 1f);
    assertEquals(Map.of("line", 0.5f), own.weights());
    set.setAdapters("ink");
    Forward layer = own.layer("to_v");
    assertNull(v.judge(x, layer.forward(x, ROWS), Map.of("line", 0.5f)));
    assertNull(v.judge(x, set.layer("to_v").forward(x, ROWS), Map.of("ink", 1f)));
    float[] onQ = q.x();
    assertArrayEquals(q.linear.forward(onQ, ROWS), own.layer("to_q").forward(onQ, ROWS), "line is not on to_q");
    set.close();
    layer.close();
    assertNull(v.judge(x, layer.forward(x, ROWS), Map.of("line", 0.5f)), "after the set's end");
    own.close();
    own.close();
    for (Forward one : List.of(layer, own.layer("to_q"))) {
      assertMessage(IllegalStateException.class, "Selection {line=0.5} is closed",
          () -> one.workspaceBytes(ROWS, DataType.FLOAT32));
    }
  }

  /** "line" is on to_v alone, so that the numbers are the same on to_q only because its place is kept there. */
  @Test
  void rowsTakeTheirOwnAdapters() {
    Map<String, Float> weights = Map.of("line", 0.5f, "ink", 1f, "wash", -0.5f);
    set.remove("ink"); // and so added last
    set.add("ink", Map.of("to_q", q.host("ink", 4, 0.5f), "to_v", v.host("ink", 8, 0.5f)));
    String[] perRow = {"ink", null, "line"};
    try (AdapterSet.Selection own = set.selectForRows(weights); AdapterSet.Selection whole = set.select(weights);
        AdapterSet.Selection off = set.selectForRows(Map.of("ink", 0f));
        DeviceMemory slots = device.allocate(4L * ROWS)) {
      assertEquals(List.of(0, 1, 2), List.of(own.slot("wash"), own.slot("line"), own.slot("ink")));
      assertEquals(-1, off.slot("ink"));
      assertMessage(OctoloraException.class, "no adapter inc; nearest: ink, line, wash", () -> own.slot("inc"));
      assertMessage(OctoloraException.class, whole + " is for whole calls: selectForRows makes one whose rows choose",
          () -> whole.slot("ink"));
      ByteBuffer numbers = ByteBuffer.allocateDirect(4 * ROWS).order(ByteOrder.nativeOrder());
      for (int row = 0; row < ROWS; row++) {
        numbers.putInt(4 * row, perRow[row] == null ? -1 : own.slot(perRow[row]));
      }
      slots.copyFrom(numbers, null);
      for (Member member : List.of(q, v)) {
        String name = member.linear.name();
        float[] x = member.x();
        float[] y = rowForward(member, own.layer(name), x, slots);
        float[] base = member.linear.forward(x, ROWS);
        int n = member.layer.n;
        int k = member.layer.k;
        for (int row = 0; row < ROWS; row++) {
          float[] mine = Arrays.copyOfRange(y, row * n, (row + 1) * n);
          Map<String, Float> only = perRow[row] == null ? Map.of() : Map.of(perRow[row], weights.get(perRow[row]));
          assertNull(member.layer.judge(Arrays.copyOfRange(x, row * k, (row + 1) * k), 1, mine, member.weighted(only)),
              name + " row " + row);
          if (member.weighted(only).isEmpty()) {
            assertArrayEquals(Arrays.copyOfRange(base, row * n, (row + 1) * n), mine, name + " row " + row);
          }
        }
        assertArrayEquals(whole.layer(name).forward(x, ROWS), own.layer(name).forward(x, ROWS), name);
      }
    }
  }

  private float[] rowForward(Member member, Forward layer, float[] hostX, DeviceMemory slots) {
    float[] result = new float[ROWS * member.layer.n];
    ForwardCall call = new ForwardCall(layer);
    try (DeviceMemory x = device.allocate(4L * hostX.length); DeviceMemory y = device.allocate(4L * result.length)) {
      x.copyFrom(hostX, null);
      call.x(x, DataType.FLOAT32, ROWS).y(0, y).rowSlots(slots);
      try (DeviceMemory workspace = device.allocate(call.workspaceBytes())) {
        call.workspace(workspace).enqueue(0);
        y.copyTo(result, null);
      }
    }
    return result;
  }

  @Test
  void equalSelectionsShareTheirMemory() {
    try (AdapterSet.Selection one = set.select(Map.of("ink", 0.5f, "wash", 0f))) {
      long with = device.memoryInUse();
      assertTrue(with > idle, with + " bytes with a selection, " + idle + " without");
      AdapterSet.Selection same = set.select(Map.of("ink", 0.5f));
      set.setAdapters(Map.of("ink", 0.5f));
      assertEquals(with, device.memoryInUse());
      try (AdapterSet.Selection other = set.select(Map.of("ink", 0.25f))) {
        assertTrue(device.memoryInUse() > with, other + " has slots of its own");
      }
      assertEquals(with, device.memoryInUse());
      same.close();
      set.setAdapters();
      assertEquals(with, device.memoryInUse(), "one of the three is open");
      float[] x = q.x();
      assertNull(q.judge(x, one.layer("to_q").forward(x, ROWS), one.weights()));
    }
    assertEquals(idle, device.memoryInUse());
  }

  @Test
  void swapsOfEqualRanksAllocateNothing() {
    set.add("blot", Map.of("to_q", q.host("blot", 4, 1), "to_v", v.host("blot", 8, 1)));
    set.setAdapters("ink");
    long one = device.memoryInUse();
    set.setAdapters("blot");
    long two = device.memoryInUse();
    assertTrue(two > one && two - one <= one - idle, "the former choice's slots are kept: " + idle + ", " + one + ", "
        + two + " bytes");
    for (Map<String, Float> weights : List.of(Map.of("ink", 1f), Map.of("blot", -1f), Map.of("ink", 0.5f))) {
      set.setAdapters(weights);
      assertEquals(two, device.memoryInUse());
      for (Member member : List.of(q, v)) {
        float[] x = member.x();
        assertNull(member.judge(x, set.layer(member.linear.name()).forward(x, ROWS), weights));
      }
    }
    set.setAdapters(Map.of("ink", 0.5f));
    assertEquals(two, device.memoryInUse(), "the same choice again");

    set.setAdapters("wash"); // of other ranks
    long other = device.memoryInUse();
    try (AdapterSet.Selection own = set.select(Map.of("wash", 2f))) {
      assertTrue(device.memoryInUse() > other, own + " takes none of what is kept for the active choice");
      float[] x = q.x();
      assertNull(q.judge(x, own.layer("to_q").forward(x, ROWS), own.weights()));
    }
    assertEquals(other, device.memoryInUse(), "after a selection");
    try (AdapterSet.Selection holder = set.select()) {
      set.setAdapters("line");
      float[] x = q.x();
      assertNull(q.judge(x, holder.layer("to_q").forward(x, ROWS), Map.of("wash", 1f)), "someone holds the former one");
    }
    set.setAdapters();
    assertEquals(idle, device.memoryInUse(), "with nothing active");
    set.setAdapters("ink");
    set.setAdapters("blot");
    set.close();
    assertEquals(idle, device.memoryInUse(), "after the set's end");
  }

  /** Ranks from 1 to 17, one adapter, two or none, on both layers or one: slots of before are cleared or refilled. */
  @Test
  void swapsWithinTheCapacityAllocateNothing() {
    try (AdapterSet roomy = new AdapterSet(List.of(q.linear, v.linear), LoraPrecision.BITS_16, 0,
        new AdapterSet.Capacity(2, 17))) {
      addAll(roomy);
      long made = device.memoryInUse();
      assertTrue(made > idle, made + " bytes with the capacity, " + idle + " without");
      Map<Map<String, Float>, List<float[]>> first = new LinkedHashMap<>();
      float[][] x = {q.x(), v.x()};
      long[] scratch = {0, 0};
      List<Map<String, Float>> choices = List.of(Map.of("ink", 1f), Map.of("wash", 0.5f),
          Map.of("ink", 0.5f, "wash", 1f), Map.of("line", 2f), Map.of(), Map.of("wash", 1.5f, "line", -2f));
      Random random = new Random(11);
      for (int swap = 0; swap < 60; swap++) {
        Map<String, Float> weights = choices.get(swap < choices.size() ? swap : random.nextInt(choices.size()));
        roomy.setAdapters(weights);
        assertEquals(made, device.memoryInUse(), "bytes with " + weights);
        List<float[]> y = new ArrayList<>();
        for (Member member : List.of(q, v)) {
          int at = y.size();
          Forward layer = roomy.layer(member.linear.name());
          y.add(layer.forward(x[at], ROWS));
          assertNull(member.judge(x[at], y.get(at), weights), () -> member.linear + " with " + weights);
          if (!member.weighted(weights).isEmpty()) {
            long bytes = layer.workspaceBytes(ROWS, DataType.FLOAT32);
            assertTrue(scratch[at] == 0 || scratch[at] == bytes, bytes + " bytes of scratch, before " + scratch[at]);
            scratch[at] = bytes;
          }
        }
        List<float[]> before = first.putIfAbsent(weights, y);
        for (int i = 0; before != null && i < y.size(); i++) {
          assertArrayEquals(before.get(i), y.get(i), "the bits of " + weights + " after other choices");
        }
      }
      roomy.setAdapters("ink");
      try (AdapterSet.Selection held = roomy.select()) {
        roomy.setAdapters("wash");
        roomy.setAdapters("line");
        assertNull(q.judge(x[0], held.layer("to_q").forward(x[0], ROWS), Map.of("ink", 1f)));
        assertArrayEquals(q.linear.forward(x[0], ROWS), roomy.layer("to_q").forward(x[0], ROWS));
      }
      roomy.setAdapters();
      assertEquals(made, device.memoryInUse(), "after a selection that held its part of it");

      roomy.setAdapters("ink", "wash", "line"); // three on to_v: beyond the capacity, and yet right
      assertNull(v.judge(x[1], roomy.layer("to_v").forward(x[1], ROWS), roomy.active()));
      assertTrue(device.memoryInUse() > made);
      roomy.setAdapters("wash");
      roomy.setAdapters();
      assertEquals(made, device.memoryInUse(), "after a choice beyond it");
      AdapterSet.Selection late = roomy.select(Map.of("ink", 1f));
      roomy.setAdapters("ink");
      roomy.close();
      assertNull(q.judge(x[0], late.layer("to_q").forward(x[0], ROWS), Map.of("ink", 1f)));
      late.close();
    }
    assertEquals(idle, device.memoryInUse(), "after the set's end");
  }

  /** What the test's own set has. */
  private void addAll(AdapterSet other) {
    for (String name : List.of("ink", "wash", "line")) {
      Map<String, HostAdapter> byLayer = new LinkedHashMap<>();
      for (Member member : List.of(q, v)) {
        HostAdapter host = member.hosts.get(name);
        if (host != null) {
          byLayer.put(member.linear.name(), host);
        }
      }
      other.add(name, byLayer);
    }
  }

  @Test
  void capacitiesThatCannotBeAreRefused() {
    assertEquals("0 adapters, expected 1 or more",
        assertThrows(IllegalArgumentException.class, () -> new AdapterSet.Capacity(0, 16)).getMessage());
    for (int rank : new int[] {0, 4097}) {
      assertEquals("rank = %d, expected 1 to 4096".formatted(rank),
          assertThrows(IllegalArgumentException.class, () -> new AdapterSet.Capacity(1, rank)).getMessage());
    }
    v.linear.close(); // the second in the set's order
    idle = device.memoryInUse();
    assertMessage(IllegalStateException.class, "Int8Linear to_v is closed", () -> new AdapterSet(
        List.of(q.linear, v.linear), LoraPrecision.BITS_16, 0, new AdapterSet.Capacity(2, 64)));
    assertEquals(idle, device.memoryInUse(), "of a set that was not made");
  }

  // ---- Refusals

  @Test
  void refusalsNameTheAdapterAndTheLayer() {
    set.setAdapters("ink");
    long with = device.memoryInUse();
    assertMessage(OctoloraException.class, "no adapter inc; nearest: ink, line, wash",
        () -> set.setAdapters("wash", "inc"));
    assertMessage(OctoloraException.class, "no adapter inc; nearest: ink, line, wash", () -> set.remove("inc"));
    assertMessage(OctoloraException.class, "adapter wash: weight = NaN, expected a finite number",
        () -> set.select(Map.of("wash", Float.NaN)));
    assertMessage(OctoloraException.class, "to_q: scale = inf is not finite",
        () -> set.setAdapters(Map.of("wash", Float.MAX_VALUE)));
    assertMessage(OctoloraException.class, "adapter ink is in this set already", () -> set.add("ink", Map.of()));
    assertMessage(OctoloraException.class, "no layer to_k; nearest: to_q, to_v", () -> set.layer("to_k"));
    try (AdapterSet.Selection one = set.select()) {
      assertMessage(OctoloraException.class, "no layer to_k; nearest: to_q, to_v", () -> one.layer("to_k"));
    }
    assertMessage(OctoloraException.class, "two layers have the name to_q",
        () -> new AdapterSet(List.of(q.linear, q.linear)));
    try (AdapterSet none = new AdapterSet(List.of(q.linear))) {
      assertMessage(OctoloraException.class, "no adapter ink: there is none yet", () -> none.setAdapters("ink"));
    }
    assertEquals(Map.of("ink", 1f), set.active(), "after the refusals");
    assertEquals(with, device.memoryInUse(), "after the refusals");

    Forward layer = set.layer("to_q");
    set.close();
    set.close();
    for (Executable call : new Executable[] {() -> set.setAdapters("ink"), () -> set.select(), () -> set.remove("ink"),
        () -> set.add("new", Map.of()), () -> layer.forward(q.x(), ROWS)}) {
      assertMessage(IllegalStateException.class, "AdapterSet of 2 layers is closed", call);
    }
  }

  private static <T extends Exception> void assertMessage(Class<T> type, String message, Executable call) {
    T thrown = assertThrows(type, call);
    assertEquals(message, thrown.getMessage());
    if (thrown instanceof OctoloraException refused) {
      assertEquals(Status.INVALID_ARGUMENT, refused.status());
    }
  }

  @Test
  void layersMayBeClosedFirst() {
    AdapterSet.Selection own = set.select(Map.of("wash", 1f));
    q.linear.close();
    assertMessage(IllegalStateException.class, "Int8Linear to_q is closed",
        () -> own.layer("to_q").forward(q.x(), ROWS));
    assertMessage(IllegalStateException.class, "Int8Linear to_q is closed", () -> set.setAdapters("ink"));
    float[] x = v.x();
    assertNull(v.judge(x, own.layer("to_v").forward(x, ROWS), Map.of("wash", 1f)));
    own.close();
    idle = device.memoryInUse(); // less by to_q
  }

  @Test
  void theDeviceMayBeClosedFirst() throws IOException {
    try (Checkpoint base = Checkpoint.open(Fixtures.path("flux/base_bnb8"));
        LoraAdapter r8 = LoraAdapter.open(Fixtures.path("flux/adapters/r8_attn_bf16/peft"))) {
      ModuleMap map = ModuleMap.of(base, r8);
      Device gone = open();
      List<Int8Linear> layers = new ArrayList<>();
      map.modules().forEach(module -> layers.add(gone.load(base.linear(module))));
      try (AdapterSet own = new AdapterSet(layers)) {
        gone.close();
        own.add("late", map);
        assertEquals(0, own.pinnedBytes(), "a closed device pins nothing");
        own.setAdapters("late");
        own.setAdapters();
      } finally {
        layers.forEach(Int8Linear::close);
      }
    }
  }

  // ---- Files

  @ParameterizedTest
  @ValueSource(longs = {0, PINS_THE_FIRST, 1 << 30})
  void adaptersOfFilesMayBeClosedOnceAdded(long mostPinnedBytes) throws IOException {
    try (Checkpoint base = Checkpoint.open(Fixtures.path("flux/base_bnb8"))) {
      List<Int8Linear> layers = new ArrayList<>();
      List<Int8Linear> attached = new ArrayList<>();
      try {
        LoraAdapter r4 = LoraAdapter.open(Fixtures.path("flux/adapters/r4/peft"));
        LoraAdapter r8 = LoraAdapter.open(Fixtures.path("flux/adapters/r8_attn_bf16/peft"));
        ModuleMap first = ModuleMap.of(base, r4);
        ModuleMap second = ModuleMap.of(base, r8);
        for (String module : first.modules()) {
          layers.add(device.load(base.linear(module)));
        }
        try (AdapterSet some = new AdapterSet(layers.subList(0, 1));
            AdapterSet all = new AdapterSet(layers, LoraPrecision.BITS_16, mostPinnedBytes)) {
          OctoloraException absent = assertThrows(OctoloraException.class, () -> some.add("first", first));
          List<String> modules = List.copyOf(first.modules());
          assertEquals("adapter first changes %d layers that are not in this set of 1: %s, …".formatted(
              modules.size() - 1, String.join(", ", modules.subList(1, 4))), absent.getMessage());
          all.add("first", first);
          long pinned = all.pinnedBytes();
          assertThrows(OctoloraException.class, () -> all.add("first", second), "the name is taken");
          assertEquals(pinned, all.pinnedBytes());
          all.add("second", second);
          assertEquals(mostPinnedBytes > 0, pinned > 0);
          assertEquals(mostPinnedBytes > PINS_THE_FIRST, all.pinnedBytes() > pinned,
              pinned + ", then " + all.pinnedBytes() + " bytes are pinned");
          for (Int8Linear layer : layers) {
            Int8Linear twin = device.load(base.linear(layer.name()));
            attached.add(twin);
            twin.attach(first.delta(layer.name()), 0.5f);
            second.deltas(layer.name()).forEach(delta -> twin.attach(delta, -2));
          }
          r4.close();
          r8.close();
          all.setAdapters(Map.of("second", -2f, "first", 0.5f));
          Random random = new Random(3);
          for (int i = 0; i < layers.size(); i++) {
            float[] x = new float[ROWS * layers.get(i).k()];
            IntStream.range(0, x.length).forEach(c -> x[c] = (float) random.nextGaussian());
            float[] y = all.layer(layers.get(i).name()).forward(x, ROWS);
            assertArrayEquals(attached.get(i).forward(x, ROWS), y, layers.get(i).name());
            assertFalse(Arrays.equals(layers.get(i).forward(x, ROWS), y), layers.get(i).name());
          }
          all.remove("second");
          assertEquals(pinned, all.pinnedBytes());
          all.close();
          assertEquals(0, all.pinnedBytes());
        }
      } finally {
        layers.forEach(Int8Linear::close);
        attached.forEach(Int8Linear::close);
      }
    }
  }

  // ---- Under way

  /** The choices of the tests with threads, any two of which the oracle tells apart on both layers. */
  private static final List<Map<String, Float>> KNOWN = List.of(Map.of(), Map.of("ink", 1f), Map.of("ink", -1f),
      Map.of("wash", 0.5f), Map.of("ink", 0.5f, "wash", 1f), Map.of("wash", 1.5f, "line", 2f));

  /** The caller's side of forwards of one layer on a stream of its own. */
  private final class Caller implements AutoCloseable {
    final Member member;
    final Stream stream = device.createStream();
    final DeviceMemory x;
    final DeviceMemory y;
    final DeviceMemory workspace;
    final float[] hostX;
    final float[] hostY;

    Caller(Member member) {
      this.member = member;
      this.hostX = member.x();
      this.hostY = new float[ROWS * member.layer.n];
      this.x = device.allocate(4L * hostX.length);
      this.y = device.allocate(4L * hostY.length);
      long most = 0;
      for (Map<String, Float> weights : KNOWN) {
        try (AdapterSet.Selection one = set.select(weights)) {
          most = Math.max(most, one.layer(member.linear.name()).workspaceBytes(ROWS, DataType.FLOAT32));
        }
      }
      this.workspace = device.allocate(most);
      x.copyFrom(hostX, stream);
    }

    void newX() {
      System.arraycopy(member.x(), 0, hostX, 0, hostX.length);
      x.copyFrom(hostX, stream);
    }

    void forward(Forward layer) {
      layer.forward(x, DataType.FLOAT32, y, DataType.FLOAT32, ROWS, workspace, stream);
    }

    /** Waits for the last forward. */
    float[] result() {
      y.copyTo(hostY, stream);
      return hostY;
    }

    /** The index in {@link #KNOWN} of the one choice that the last result is of. */
    int choice() {
      float[] result = result();
      int[] possible = IntStream.range(0, KNOWN.size())
          .filter(i -> member.judge(hostX, result, KNOWN.get(i)) == null).toArray();
      assertEquals(1, possible.length, () -> "a result of the choices " + Arrays.toString(possible));
      return possible[0];
    }

    @Override
    public void close() {
      stream.close();
      x.close();
      y.close();
      workspace.close();
    }
  }

  @ParameterizedTest
  @ValueSource(booleans = {false, true})
  void activeAdaptersSwapUnderRunningForwards(boolean withCapacity) throws Exception {
    if (withCapacity) {
      set.close();
      set = new AdapterSet(List.of(q.linear, v.linear), LoraPrecision.BITS_16, 1 << 20,
          new AdapterSet.Capacity(2, 17));
      addAll(set);
    }
    long made = device.memoryInUse();
    long deadline = System.nanoTime() + TimeUnit.SECONDS.toNanos(60);
    try (Callers callers = new Callers()) {
      List<Callable<Integer>> work = new ArrayList<>();
      for (Caller caller : callers.all) {
        List<float[]> results = new ArrayList<>();
        for (Map<String, Float> weights : KNOWN) {
          try (AdapterSet.Selection one = set.select(weights)) {
            caller.forward(one.layer(caller.member.linear.name()));
            assertEquals(results.size(), caller.choice());
            results.add(caller.hostY.clone());
          }
        }
        work.add(() -> {
          Forward layer = set.layer(caller.member.linear.name());
          int seen = 0; // a bit for each choice
          for (int call = 0; call < 500 || Integer.bitCount(seen) < 2 && System.nanoTime() < deadline; call++) {
            caller.forward(layer);
            float[] y = caller.result();
            int[] equal = IntStream.range(0, KNOWN.size()).filter(i -> Arrays.equals(results.get(i), y)).toArray();
            assertEquals(1, equal.length, "a result of the choices " + Arrays.toString(equal));
            seen |= 1 << equal[0];
          }
          return seen;
        });
      }
      Random random = new Random(5);
      for (int seen : whileRunning(work, () -> set.setAdapters(KNOWN.get(random.nextInt(KNOWN.size()))))) {
        assertTrue(Integer.bitCount(seen) > 1, "a thread saw no swap in 60 s");
      }
    }
    set.setAdapters();
    assertEquals(made, device.memoryInUse(), "with nothing active again");
  }

  /**
   * Forwards on {@value #THREADS} streams under swaps: half of them on what is active, half on selections that come and
   * go. The property {@value #FORWARDS} says how many in all. Every 1000th of a thread is judged by the oracle, of
   * fewer than 100 000 every 100th.
   */
  @Test
  void swapsForALongTime() throws Exception {
    int forwards = Integer.getInteger(FORWARDS, soakForwards());
    int every = forwards >= 100_000 ? 1000 : 100;
    long all = 0; // bytes of every known choice at once
    long largest = 0;
    for (Map<String, Float> weights : KNOWN) {
      try (AdapterSet.Selection one = set.select(weights)) {
        long bytes = device.memoryInUse() - idle;
        all += bytes;
        largest = Math.max(largest, bytes);
      }
    }
    int judged = 0;
    AtomicInteger swaps = new AtomicInteger();
    try (Callers callers = new Callers()) {
      long flat = device.memoryInUse();
      // Equal choices share, so each is there once; of those given up, what a call in progress still holds, or what one
      // of the threads or the swapper is freeing just now, and what is kept for the next swap.
      long most = flat + all + (2 * THREADS + 2) * largest;
      List<Callable<Integer>> work = new ArrayList<>();
      for (int thread = 0; thread < THREADS; thread++) {
        Caller caller = callers.all.get(thread);
        Random random = new Random(100 + thread);
        work.add(() -> {
          String name = caller.member.linear.name();
          Forward live = set.layer(name);
          int judgedHere = 0;
          for (int call = 1; call <= forwards / THREADS; call++) {
            boolean judge = call % every == 0;
            if (judge) {
              caller.newX();
            }
            int own = random.nextBoolean() ? random.nextInt(KNOWN.size()) : -1;
            if (own < 0) {
              caller.forward(live);
            } else {
              try (AdapterSet.Selection request = set.select(KNOWN.get(own))) {
                caller.forward(request.layer(name));
              }
            }
            if (judge) {
              int choice = caller.choice();
              assertTrue(own < 0 || choice == own, () -> KNOWN.get(choice) + " in place of " + KNOWN.get(own));
              judgedHere++;
            }
          }
          return judgedHere;
        });
      }
      Random random = new Random(7);
      for (int judgedHere : whileRunning(work, () -> {
        set.setAdapters(KNOWN.get(random.nextInt(KNOWN.size())));
        swaps.incrementAndGet();
        long now = device.memoryInUse();
        assertTrue(now <= most, () -> now + " bytes in use, at most " + most + " have a holder");
      })) {
        judged += judgedHere;
      }
      set.setAdapters();
      assertEquals(flat, device.memoryInUse(), "after " + forwards + " forwards and " + swaps + " swaps");
      assertEquals(forwards / THREADS / every * THREADS, judged);
    }
    System.out.printf("%s: %d forwards on %d streams under %d swaps, %d judged%n", device, forwards, THREADS,
        swaps.get(), judged);
  }

  private final class Callers implements AutoCloseable {
    final List<Caller> all = new ArrayList<>();

    Callers() {
      for (int i = 0; i < THREADS; i++) {
        all.add(new Caller(i % 2 == 0 ? q : v));
      }
    }

    @Override
    public void close() {
      all.forEach(Caller::close);
    }
  }

  /** Repeats an action as long as one of the workers runs, and returns what they return. */
  private static List<Integer> whileRunning(List<Callable<Integer>> work, Runnable action) throws Exception {
    ExecutorService threads = Executors.newFixedThreadPool(work.size());
    try {
      List<Future<Integer>> running = work.stream().map(threads::submit).toList();
      while (!running.stream().allMatch(Future::isDone)) {
        action.run();
        LockSupport.parkNanos(20_000); // a driver's locks are not fair
      }
      List<Integer> results = new ArrayList<>();
      for (Future<Integer> one : running) {
        results.add(one.get()); // throws what stopped a worker
      }
      return results;
    } finally {
      threads.shutdownNow();
      assertTrue(threads.awaitTermination(60, TimeUnit.SECONDS), "workers did not end");
    }
  }

  // ---- Cost

  @Test
  void forwardAllocatesNothingOnTheHeap() {
    set.setAdapters("ink");
    try (AdapterSet.Selection own = set.select(Map.of("wash", 1f)); Caller caller = new Caller(q)) {
      ThreadMXBean threads = (ThreadMXBean) ManagementFactory.getThreadMXBean();
      long measuring = threads.getCurrentThreadAllocatedBytes();
      measuring = threads.getCurrentThreadAllocatedBytes() - measuring;
      for (Forward layer : List.of(set.layer("to_q"), own.layer("to_q"))) {
        caller.forward(layer);
        int calls = 2000;
        long start = threads.getCurrentThreadAllocatedBytes();
        for (int i = 0; i < calls; i++) {
          caller.forward(layer);
        }
        long bytes = threads.getCurrentThreadAllocatedBytes() - start - measuring;
        caller.stream.synchronize();
        assertTrue(bytes < calls, bytes + " bytes in " + calls + " calls");
      }
    }
  }
}
