// SPDX-License-Identifier: Apache-2.0
package io.octolora.runtime;

import static org.junit.jupiter.api.Assertions.assertArrayEquals;
import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertFalse;
import static org.junit.jupiter.api.Assertions.assertNotEquals;
import static org.junit.jupiter.api.Assertions.assertNull;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import com.sun.management.ThreadMXBean;
import io.octolora.OctoloraException;
import io.octolora.Status;
import io.octolora.checkpoint.Quantization;
import io.octolora.checkpoint.Quantization.Mode;
import java.lang.management.ManagementFactory;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.concurrent.Callable;
import java.util.concurrent.CountDownLatch;
import java.util.concurrent.ExecutorService;
import java.util.concurrent.Executors;
import java.util.concurrent.Future;
import java.util.concurrent.TimeUnit;
import java.util.stream.Stream;
import org.bytedeco.javacpp.FloatPointer;
import org.bytedeco.javacpp.Pointer;
import org.junit.jupiter.api.AfterEach;
import org.junit.jupiter.api.BeforeEach;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.function.Executable;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.MethodSource;
import org.junit.jupiter.params.provider.ValueSource;

/** What every device does; one subclass for each. Odd sizes, so that no tile fits. */
abstract class DeviceContract {
  static final Quantization DYNAMIC = new Quantization(Mode.W8A8_DYNAMIC, false, 0, 127, 0);
  private static final int N = 37;
  private static final int K = 53;
  private static final int ROWS = 5;

  private Device device;
  private long before;

  abstract Device open();

  @BeforeEach
  void openDevice() {
    device = open();
    before = device.memoryInUse();
  }

  @AfterEach
  void nothingIsLeft() {
    assertEquals(before, device.memoryInUse(), "bytes in use on " + device);
    device.close();
  }

  static Stream<Quantization> quantizations() {
    return Stream.of(DYNAMIC, new Quantization(Mode.W8A8_DYNAMIC, false, 0, 127.5f, 0), Quantization.fixed(0.0625f),
        Quantization.weightOnly());
  }

  @ParameterizedTest
  @MethodSource("quantizations")
  void forwardAddsEveryAdapter(Quantization quantization) {
    for (boolean scalePerRow : new boolean[] {true, false}) {
      RandomLayer layer = new RandomLayer(1, N, K, quantization, scalePerRow, scalePerRow);
      float[] x = layer.floats(ROWS * K);
      Arrays.fill(x, 2 * K, 3 * K, 0);
      try (Int8Linear linear = layer.load(device)) {
        assertNull(layer.judge(x, ROWS, linear.forward(x, ROWS)));
        float[] base = linear.forward(x, ROWS);
        layer.attach(linear, layer.adapter(1, 0.7f));
        assertNull(layer.judge(x, ROWS, linear.forward(x, ROWS)));
        layer.attach(linear, layer.adapter(9, -0.4f));
        layer.attach(linear, layer.adapter(33, 1));
        assertEquals(3, linear.attachedCount());
        assertNull(layer.judge(x, ROWS, linear.forward(x, ROWS)));
        linear.detachAll();
        assertArrayEquals(base, linear.forward(x, ROWS));
      }
    }
  }

  /** Codes, scales and bias, and no copy in a wider type: of 16 bits it would be twice the codes more. */
  @ParameterizedTest
  @MethodSource("quantizations")
  void aLayerTakesNoMoreMemoryThanItsCodesAndScales(Quantization quantization) {
    int n = 1024;
    int k = 1040;
    long most = (long) n * k + 16L * n + (64 << 10);
    try (Int8Linear linear = new RandomLayer(3, n, k, quantization, true, true).load(device)) {
      long made = device.memoryInUse() - before;
      assertTrue(made >= (long) n * k && made <= most, made + " bytes, expected at most " + most);
      linear.forward(new float[2 * k], 2);
      assertEquals(made, device.memoryInUse() - before, "after a forward");
    }
  }

  @Test
  void weightsArriveInPieces() {
    RandomLayer layer = new RandomLayer(2, N, K, DYNAMIC, true, false);
    float[] x = layer.floats(ROWS * K);
    List<int[]> pieces = new ArrayList<>();
    float[] whole;
    try (Int8Linear linear = layer.load(device)) {
      whole = linear.forward(x, ROWS);
    }
    NativeHandle handle = device.handle();
    try (Int8Linear linear = Int8Linear.create(handle, "layer", N, K, DYNAMIC, (offset, length) -> {
      pieces.add(new int[] {(int) offset, length});
      return layer.weight.slice((int) offset, length);
    }, layer.scale, layer.bias, 5 * K + 1)) {
      assertArrayEquals(whole, linear.forward(x, ROWS));
    }
    assertEquals(8, pieces.size(), "37 rows, 5 at a time");
    assertArrayEquals(new int[] {35 * K, 2 * K}, pieces.get(7));
  }

  @Test
  void weightsComeFromTheHeapToo() {
    RandomLayer layer = new RandomLayer(3, N, K, DYNAMIC, true, true);
    float[] x = layer.floats(ROWS * K);
    ByteBuffer heap = ByteBuffer.allocate(N * K + 3);
    heap.position(3).put(layer.weight.duplicate()).position(3);
    try (Int8Linear direct = layer.load(device);
        Int8Linear copied = device.load("layer", N, K, DYNAMIC, heap, layer.scale, layer.bias)) {
      assertArrayEquals(direct.forward(x, ROWS), copied.forward(x, ROWS));
    }
    assertEquals(3, heap.position());
  }

  @Test
  void slotsAreFilledChangedAndCleared() {
    RandomLayer layer = new RandomLayer(4, N, K, DYNAMIC, true, true);
    float[] x = layer.floats(ROWS * K);
    try (Int8Linear linear = layer.load(device); AdapterSlots slots = linear.slots(LoraPrecision.BITS_16, 4, 16)) {
      float[] base = linear.forward(x, ROWS);
      assertArrayEquals(base, slots.forward(x, ROWS), "empty slots");
      RandomLayer.Adapter first = layer.adapter(4, 0.5f);
      RandomLayer.Adapter second = layer.adapter(7, 2);
      slots.set(0, first.rank(), first.a(), first.b(), first.weight(), 0);
      slots.set(1, second.rank(), second.a(), second.b(), second.weight(), 0);
      layer.adapters.addAll(List.of(first, second));
      assertNull(layer.judge(x, ROWS, slots.forward(x, ROWS)));
      slots.setWeight(1, -1, 0);
      layer.adapters.set(1, new RandomLayer.Adapter(second.rank(), second.a(), second.b(), -1));
      assertNull(layer.judge(x, ROWS, slots.forward(x, ROWS)));
      try (DeviceMemory scale = device.allocate(4)) {
        scale.copyFrom(new float[] {0.25f}, null);
        device.copy(slots.scales() + 4, scale.address(), 4, 0);
        slots.refresh(0);
        device.synchronize(0);
      }
      layer.adapters.set(1, new RandomLayer.Adapter(second.rank(), second.a(), second.b(), 0.25f));
      assertNull(layer.judge(x, ROWS, slots.forward(x, ROWS)), "a scale written on the device");
      slots.clear(0, 0);
      layer.adapters.remove(0);
      assertNull(layer.judge(x, ROWS, slots.forward(x, ROWS)));
      slots.clear(1, 0);
      assertArrayEquals(base, slots.forward(x, ROWS), "cleared slots");

      try (io.octolora.runtime.Stream stream = device.createStream()) {
        Pointer on = new Address(stream.address());
        slots.set(1, second.rank(), second.a(), second.b(), 3, on);
        slots.setWeight(1, 0.25f, on);
        slots.refresh(on);
        stream.synchronize();
        assertNull(layer.judge(x, ROWS, slots.forward(x, ROWS)), "filled on JavaCPP's stream");
        slots.clear(1, on);
        stream.synchronize();
        assertArrayEquals(base, slots.forward(x, ROWS), "cleared there");
      }

      assertEquals("layer: slot 1 is empty",
          assertThrows(IllegalStateException.class, () -> slots.setWeight(1, 1, 0)).getMessage());
      OctoloraException tooWide = assertThrows(OctoloraException.class,
          () -> slots.set(0, second.rank(), second.a(), second.b(), 1, 0));
      assertEquals("layer: adapter.rank = 7, expected 1 to 4, the capacity of slot 0", tooWide.getMessage());
      List<Executable> beyond = List.of(() -> slots.set(2, first.rank(), first.a(), first.b(), 1, 0),
          () -> slots.setWeight(2, 1, 0), () -> slots.clear(2, 0), () -> slots.capacity(2));
      for (Executable call : beyond) {
        assertEquals("layer: slot = 2, expected 0 to 1", assertThrows(OctoloraException.class, call).getMessage());
      }
    }
  }

  @Test
  void pointersNeedNoMoreThanElementAlignment() {
    RandomLayer layer = new RandomLayer(5, N, K, DYNAMIC, true, true);
    float[] x = layer.floats(ROWS * K);
    try (Int8Linear linear = layer.load(device);
        DeviceMemory memory = device.allocate(4096);
        DeviceMemory y16 = device.allocate(2 * ROWS * N + 2)) {
      layer.attach(linear, layer.adapter(3, 1));
      try (DeviceMemory workspace = device.allocate(linear.workspaceBytes(ROWS, DataType.FLOAT32))) {
        ByteBuffer host = ByteBuffer.allocateDirect(4096).order(ByteOrder.nativeOrder());
        host.position(4).slice().order(ByteOrder.nativeOrder()).asFloatBuffer().put(x);
        memory.copyFrom(host.rewind(), null);
        long y = memory.address() + 2052; // 4 bytes behind a multiple of 16, and behind x
        linear.forward(memory.address() + 4, DataType.FLOAT32, y, DataType.FLOAT32, ROWS, workspace.address(),
            workspace.bytes(), 0);
        memory.copyTo(host, null);
        float[] result = new float[ROWS * N];
        host.position(2052).slice().order(ByteOrder.nativeOrder()).asFloatBuffer().get(result);
        assertNull(layer.judge(x, ROWS, result));
        linear.forward(memory.address() + 4, DataType.FLOAT32, y16.address() + 2, DataType.BFLOAT16, ROWS,
            workspace.address(), workspace.bytes(), 0);
        byte[] halves = new byte[2 * ROWS * N + 2];
        y16.copyTo(halves, null);
        ByteBuffer bits = ByteBuffer.wrap(halves).order(ByteOrder.nativeOrder());
        for (int i = 0; i < result.length; i++) {
          float rounded = Float.intBitsToFloat(bits.getShort(2 + 2 * i) << 16);
          // one rounding to bf16 of the very same fp32 sum
          assertEquals(result[i], rounded, Math.abs(result[i]) * 0x1p-8, "y as bf16, element " + i);
        }
      }
    }
  }

  @Test
  void javaCppPointersCountFromTheirPosition() {
    RandomLayer layer = new RandomLayer(6, N, K, DYNAMIC, true, true);
    float[] x = layer.floats(ROWS * K);
    try (Int8Linear linear = layer.load(device);
        DeviceMemory onDevice = device.allocate(4 * (x.length + 3));
        DeviceMemory y = device.allocate(4 * ROWS * N);
        DeviceMemory workspace = device.allocate(linear.workspaceBytes(ROWS, DataType.FLOAT32));
        FloatPointer host = new FloatPointer(x.length + 3)) {
      host.position(3).put(x);
      FloatPointer target = new FloatPointer(new Address(onDevice.address())).position(3);
      device.copy(target, host.position(3), 4L * x.length, null);
      device.synchronize(0);
      linear.forward(target, DataType.FLOAT32, new Address(y.address()), DataType.FLOAT32, ROWS,
          new Address(workspace.address()), workspace.bytes(), null);
      float[] result = new float[ROWS * N];
      y.copyTo(result, null);
      assertNull(layer.judge(x, ROWS, result));
      host.position(0);
    }
  }

  /** Some memory as JavaCPP sees it. */
  static final class Address extends Pointer {
    Address(long address) {
      this.address = address;
    }
  }

  @Test
  void noRowsAreNoWork() {
    RandomLayer layer = new RandomLayer(7, N, K, DYNAMIC, true, true);
    try (Int8Linear linear = layer.load(device)) {
      assertEquals(0, linear.forward(new float[0], 0).length);
      linear.forward(0, DataType.FLOAT32, 0, DataType.FLOAT32, 0, 0, 0, 0);
    }
  }

  @Test
  void quantizedShowsTheExactSums() {
    RandomLayer layer = new RandomLayer(8, N, K, DYNAMIC, true, true);
    float[] x = layer.floats(ROWS * K);
    try (Int8Linear linear = layer.load(device)) {
      Int8Linear.Quantized result = linear.quantized(x, ROWS);
      for (int row = 0; row < ROWS; row++) {
        float max = 0;
        for (int c = 0; c < K; c++) {
          max = Math.max(max, Math.abs(x[row * K + c]));
        }
        assertEquals(max / 127f, result.rowScale()[row]);
        for (int c = 0; c < K; c++) {
          assertEquals((byte) Math.rint(x[row * K + c] * (127f / max)), result.codes()[row * K + c]);
        }
        for (int o = 0; o < N; o++) {
          int sum = 0;
          for (int c = 0; c < K; c++) {
            sum += result.codes()[row * K + c] * layer.weight.get(o * K + c);
          }
          assertEquals(sum, result.sums()[row * N + o]);
        }
      }
    }
    try (Int8Linear wide = new RandomLayer(8, N, K, Quantization.weightOnly(), true, true).load(device)) {
      OctoloraException e = assertThrows(OctoloraException.class, () -> wide.quantized(x, ROWS));
      assertEquals(Status.UNSUPPORTED, e.status());
    }
  }

  @Test
  void streamsOrderTheWork() {
    RandomLayer layer = new RandomLayer(9, N, K, DYNAMIC, true, true);
    float[] x = layer.floats(ROWS * K);
    try (Int8Linear linear = layer.load(device);
        io.octolora.runtime.Stream stream = device.createStream();
        DeviceMemory onDevice = device.allocate(4L * x.length);
        DeviceMemory y = device.allocate(4L * ROWS * N);
        DeviceMemory workspace = device.allocate(linear.workspaceBytes(ROWS, DataType.FLOAT32))) {
      onDevice.copyFrom(x, stream);
      linear.forward(onDevice, DataType.FLOAT32, y, DataType.FLOAT32, ROWS, workspace, stream);
      stream.synchronize();
      float[] result = new float[ROWS * N];
      y.copyTo(result, stream);
      assertArrayEquals(linear.forward(x, ROWS), result);
    }
  }

  // ---- Refusals

  @Test
  void refusalsNameTheLayerAndTheNumbers() {
    RandomLayer layer = new RandomLayer(10, N, K, DYNAMIC, true, true);
    float[] x = layer.floats(ROWS * K);
    try (Int8Linear linear = layer.load(device);
        DeviceMemory small = device.allocate(4 * (ROWS * K - 1));
        DeviceMemory y = device.allocate(4 * ROWS * N)) {
      assertEquals("layer: x holds 265 numbers, expected rows x k = 6 x 53",
          assertThrows(IllegalArgumentException.class, () -> linear.forward(x, 6)).getMessage());
      assertEquals("x holds 1056 bytes, expected at least 1060",
          assertThrows(IllegalArgumentException.class,
              () -> linear.forward(small, DataType.FLOAT32, y, DataType.FLOAT32, ROWS, null, null)).getMessage());
      OctoloraException rows = assertThrows(OctoloraException.class,
          () -> linear.forward(1, DataType.FLOAT32, 1, DataType.FLOAT32, -1, 0, 0, 0));
      assertEquals(Status.INVALID_ARGUMENT, rows.status());
      assertEquals("layer: rows = -1, expected 0 or more", rows.getMessage());
      OctoloraException odd = assertThrows(OctoloraException.class,
          () -> linear.forward(y.address() + 2, DataType.FLOAT32, y.address(), DataType.FLOAT32, 1, 0, 0, 0));
      assertTrue(odd.getMessage().matches("layer: x = 0x[0-9a-f]+ is not aligned to 4 bytes"), odd.getMessage());
      long needed = linear.workspaceBytes(1, DataType.FLOAT32);
      assertNotEquals(0, needed, "an int8 copy of x lives in the workspace");
      OctoloraException workspace = assertThrows(OctoloraException.class,
          () -> linear.forward(small.address(), DataType.FLOAT32, y.address(), DataType.FLOAT32, 1, 0, 0, 0));
      assertEquals(Status.WORKSPACE_TOO_SMALL, workspace.status());
      assertEquals("layer: workspace_bytes = 0, expected at least " + needed, workspace.getMessage());
      assertEquals("layer: A holds 52 and B 37 numbers, expected 1 x 53 and 37 x 1",
          assertThrows(IllegalArgumentException.class,
              () -> linear.attach(1, new float[52], new float[37], 1, LoraPrecision.BITS_16)).getMessage());
      OctoloraException nan = assertThrows(OctoloraException.class,
          () -> linear.attach(1, new float[K], new float[N], Float.NaN, LoraPrecision.BITS_16));
      assertEquals("layer: scale = nan is not finite", nan.getMessage());
      assertEquals(0, linear.attachedCount(), "after an attach that failed");
      assertNull(layer.judge(x, ROWS, linear.forward(x, ROWS)), "after the refusals");
    }
    assertEquals("layer: 2 scales, expected 1 or n = 3",
        assertThrows(IllegalArgumentException.class,
            () -> device.load("layer", 3, 4, DYNAMIC, ByteBuffer.allocateDirect(12), new float[2], null)).getMessage());
    assertEquals("layer: 4 bias values, expected n = 3",
        assertThrows(IllegalArgumentException.class,
            () -> device.load("layer", 3, 4, DYNAMIC, ByteBuffer.allocateDirect(12), new float[3], new float[4]))
                .getMessage());
    assertEquals("layer: weight holds 11 bytes, expected 3 x 4 = 12",
        assertThrows(IllegalArgumentException.class,
            () -> device.load("layer", 3, 4, DYNAMIC, ByteBuffer.allocateDirect(11), new float[3], null)).getMessage());
    OctoloraException wide = assertThrows(OctoloraException.class,
        () -> device.load("wide", 1, 131072, DYNAMIC, ByteBuffer.allocateDirect(131072), new float[1], null));
    assertEquals("wide: k = 131072, expected 1 to 131071, where the int32 sum is exact", wide.getMessage());
    OctoloraException scale = assertThrows(OctoloraException.class, () -> device.load("layer", 3, 4, DYNAMIC,
        ByteBuffer.allocateDirect(12), new float[] {1, Float.POSITIVE_INFINITY, 1}, null));
    assertEquals("layer: scale[1] = inf is not finite", scale.getMessage());
  }

  @Test
  void outOfMemoryKeepsNothing() {
    OctoloraException e = assertThrows(OctoloraException.class, () -> device.allocate(1L << 60));
    assertEquals(Status.OUT_OF_MEMORY, e.status());
    assertTrue(e.getMessage().contains(Long.toString(1L << 60)), e.getMessage());
    assertEquals(before, device.memoryInUse());
    try (DeviceMemory memory = device.allocate(16)) {
      assertEquals(16, memory.bytes());
    }
  }

  @Test
  void copiesStayInsideTheirMemory() {
    try (DeviceMemory memory = device.allocate(16)) {
      assertEquals("a copy of 20 bytes in 16 bytes of device memory",
          assertThrows(IndexOutOfBoundsException.class, () -> memory.copyFrom(new float[5], null)).getMessage());
      assertThrows(IndexOutOfBoundsException.class, () -> memory.copyTo(new byte[17], null));
      assertThrows(java.nio.ReadOnlyBufferException.class,
          () -> memory.copyTo(ByteBuffer.allocate(4).asReadOnlyBuffer(), null));
      memory.copyFrom(new float[] {1, 2, 3, 4}, null);
      ByteBuffer heap = ByteBuffer.allocate(12).order(ByteOrder.nativeOrder());
      memory.copyTo(heap.position(4), null);
      assertEquals(1, heap.getFloat(4));
      assertEquals(2, heap.getFloat(8));
      memory.copyFrom(heap.position(8), null); // 2 over 1
      float[] back = new float[4];
      memory.copyTo(back, null);
      assertArrayEquals(new float[] {2, 2, 3, 4}, back);
    }
  }

  // ---- Lifetime

  @Test
  void closingTwiceIsNothingAndUseAfterwardsIsNamed() {
    RandomLayer layer = new RandomLayer(11, N, K, DYNAMIC, true, true);
    Device second = open();
    Int8Linear linear = layer.load(second);
    AdapterSlots slots = linear.slots(LoraPrecision.BITS_16, 4);
    DeviceMemory memory = second.allocate(64);
    io.octolora.runtime.Stream stream = second.createStream();
    for (AutoCloseable one : List.of(stream, memory, slots, linear, second)) {
      try {
        one.close();
        one.close();
      } catch (Exception e) {
        throw new AssertionError(one + " closed twice", e);
      }
    }
    String id = second.info().id();
    assertClosed("Stream on " + id, stream::synchronize);
    assertClosed("Stream on " + id, stream::address);
    assertClosed("DeviceMemory of 64 bytes", () -> memory.copyTo(new byte[1], null));
    assertClosed("DeviceMemory of 64 bytes", memory::address);
    assertClosed("AdapterSlots of layer", () -> slots.clear(0, 0));
    assertClosed("Int8Linear layer", () -> linear.forward(new float[K], 1));
    assertClosed("Int8Linear layer", () -> linear.attach(1, new float[K], new float[N], 1, LoraPrecision.BITS_16));
    assertClosed("Int8Linear layer", linear::detachAll);
    assertClosed("Int8Linear layer", () -> linear.workspaceBytes(1, DataType.FLOAT32));
    assertClosed("Device " + id, second::memoryInUse);
    assertClosed("Device " + id, () -> second.allocate(1));
    assertClosed("Device " + id, () -> layer.load(second));
  }

  private static void assertClosed(String what, org.junit.jupiter.api.function.Executable call) {
    assertEquals(what + " is closed", assertThrows(IllegalStateException.class, call).getMessage());
  }

  @Test
  void whatWasMadeOutlivesItsMaker() {
    RandomLayer layer = new RandomLayer(12, N, K, DYNAMIC, true, true);
    float[] x = layer.floats(ROWS * K);
    Device second = open();
    Int8Linear linear = layer.load(second);
    AdapterSlots slots = linear.slots(LoraPrecision.BITS_16, 4);
    DeviceMemory memory = second.allocate(8);
    DeviceMemory xs = second.allocate(4 * x.length);
    xs.copyFrom(x, null);
    DeviceMemory ys = second.allocate(4 * ROWS * N);
    DeviceMemory workspace = second.allocate(linear.workspaceBytes(ROWS, DataType.FLOAT32));
    second.close();
    float[] bytes = {1, 2};
    memory.copyFrom(bytes, null);
    memory.copyTo(bytes, null);
    linear.forward(xs, DataType.FLOAT32, ys, DataType.FLOAT32, ROWS, workspace, null);
    float[] y = new float[ROWS * N];
    ys.copyTo(y, null);
    assertNull(layer.judge(x, ROWS, y));
    assertClosed("Device " + second.info().id(), () -> linear.forward(x, ROWS));
    assertClosed("Device " + second.info().id(), () -> linear.quantized(x, ROWS));
    List.of(xs, ys, workspace).forEach(DeviceMemory::close);
    linear.close();
    assertClosed("Int8Linear layer", () -> slots.forward(x, ROWS));
    slots.close();
    memory.close();
  }

  @Test
  void closingWaitsForTheCallsInProgress() throws Exception {
    RandomLayer layer = new RandomLayer(13, N, K, DYNAMIC, true, true);
    float[] x = layer.floats(ROWS * K);
    ExecutorService threads = Executors.newFixedThreadPool(8);
    try {
      for (int round = 0; round < 20; round++) {
        layer.adapters.clear();
        Int8Linear linear = layer.load(device);
        layer.attach(linear, layer.adapter(8, 0.5f));
        CountDownLatch running = new CountDownLatch(8);
        Callable<Integer> caller = () -> {
          for (int calls = 0; ; calls++) {
            float[] y;
            try {
              y = linear.forward(x, ROWS);
            } catch (IllegalStateException closed) {
              assertEquals("Int8Linear layer is closed", closed.getMessage());
              return calls;
            }
            assertNull(layer.judge(x, ROWS, y));
            if (calls == 0) {
              running.countDown();
            }
          }
        };
        List<Future<Integer>> calls = new ArrayList<>();
        for (int i = 0; i < 8; i++) {
          calls.add(threads.submit(caller));
        }
        boolean all = running.await(60, TimeUnit.SECONDS);
        linear.close();
        for (Future<Integer> one : calls) {
          assertTrue(one.get() > 0); // throws what stopped a caller
        }
        assertTrue(all, "a caller did not come through its first call within 60 s");
        assertEquals(before, device.memoryInUse(), "after round " + round);
      }
    } finally {
      threads.shutdownNow();
    }
  }

  /** Memory, stream, slots, their layer or the device: the calls end as they began, or say what is closed. */
  @ParameterizedTest
  @ValueSource(strings = {"x", "y", "workspace", "stream", "slots", "layer", "device"})
  void closingWhatCallsUseStopsTheNextOnes(String what) throws Exception {
    int users = 4;
    RandomLayer layer = new RandomLayer(14, N, K, DYNAMIC, true, true);
    ExecutorService threads = Executors.newFixedThreadPool(users);
    try {
      for (int round = 0; round < 10; round++) {
        Device own = open();
        Int8Linear linear = layer.load(own);
        AdapterSlots slots = linear.slots(LoraPrecision.BITS_16, 4);
        RandomLayer.Adapter adapter = layer.adapter(4, 0.5f);
        slots.set(0, 4, adapter.a(), adapter.b(), adapter.weight(), 0);
        io.octolora.runtime.Stream stream = own.createStream();
        DeviceMemory x = own.allocate(4L * ROWS * K);
        x.copyFrom(layer.floats(ROWS * K), stream);
        Map<String, List<AutoCloseable>> all = new LinkedHashMap<>(Map.of("x", List.of(x), "stream", List.of(stream),
            "slots", List.of(slots), "layer", List.of(linear), "device", List.of(own), "y", new ArrayList<>(),
            "workspace", new ArrayList<>()));
        CountDownLatch running = new CountDownLatch(users);
        List<Future<String>> calls = new ArrayList<>();
        for (int i = 0; i < users; i++) {
          DeviceMemory y = own.allocate(4L * ROWS * N);
          DeviceMemory workspace = own.allocate(slots.workspaceBytes(ROWS, DataType.FLOAT32));
          all.get("y").add(y);
          all.get("workspace").add(workspace);
          calls.add(threads.submit(() -> {
            try {
              while (true) {
                if (what.equals("device")) {
                  own.allocate(16).close();
                } else {
                  slots.forward(x, DataType.FLOAT32, y, DataType.FLOAT32, ROWS, workspace, stream);
                }
                running.countDown();
              }
            } catch (IllegalStateException closed) {
              return closed.getMessage();
            }
          }));
        }
        boolean begun = running.await(60, TimeUnit.SECONDS);
        for (AutoCloseable one : all.get(what)) {
          one.close();
        }
        for (Future<String> one : calls) {
          String message = one.get(60, TimeUnit.SECONDS);
          assertTrue(message.endsWith(" is closed"), message);
        }
        assertTrue(begun, "%d calls did not come through within 60 s".formatted(users));
        for (List<AutoCloseable> kind : all.values()) {
          for (AutoCloseable one : kind) {
            one.close();
          }
        }
      }
    } finally {
      threads.shutdownNow();
    }
  }

  @Test
  void attachingSwapsUnderRunningCalls() throws Exception {
    RandomLayer layer = new RandomLayer(14, N, K, DYNAMIC, true, true);
    float[] x = layer.floats(ROWS * K);
    RandomLayer.Adapter adapter = layer.adapter(8, 0.5f);
    try (Int8Linear linear = layer.load(device)) {
      float[] without = linear.forward(x, ROWS);
      layer.attach(linear, adapter);
      float[] with = linear.forward(x, ROWS);
      assertFalse(Arrays.equals(without, with));
      ExecutorService threads = Executors.newFixedThreadPool(4);
      try {
        List<Future<?>> calls = new ArrayList<>();
        for (int i = 0; i < 4; i++) {
          calls.add(threads.submit(() -> {
            for (int call = 0; call < 200; call++) {
              float[] y = linear.forward(x, ROWS);
              assertTrue(Arrays.equals(y, with) || Arrays.equals(y, without), "neither with nor without the adapter");
            }
          }));
        }
        while (!calls.stream().allMatch(Future::isDone)) {
          linear.detachAll();
          linear.attach(adapter.rank(), adapter.a(), adapter.b(), adapter.weight(), LoraPrecision.BITS_16);
        }
        for (Future<?> one : calls) {
          one.get();
        }
      } finally {
        threads.shutdownNow();
      }
    }
  }

  // ---- Cost

  @Test
  void forwardAllocatesNothingOnTheHeap() {
    RandomLayer layer = new RandomLayer(15, 8, 16, DYNAMIC, true, true);
    try (Int8Linear linear = layer.load(device)) {
      layer.attach(linear, layer.adapter(4, 0.5f));
      try (DeviceMemory x = device.allocate(16 * 4);
          DeviceMemory y = device.allocate(8 * 4);
          DeviceMemory workspace = device.allocate(linear.workspaceBytes(1, DataType.FLOAT32))) {
        x.copyFrom(layer.floats(16), null);
        ThreadMXBean threads = (ThreadMXBean) ManagementFactory.getThreadMXBean();
        long measuring = threads.getCurrentThreadAllocatedBytes();
        measuring = threads.getCurrentThreadAllocatedBytes() - measuring;
        Runnable addresses = () -> linear.forward(x.address(), DataType.FLOAT32, y.address(), DataType.FLOAT32, 1,
            workspace.address(), workspace.bytes(), 0);
        Runnable memories = () -> linear.forward(x, DataType.FLOAT32, y, DataType.FLOAT32, 1, workspace, null);
        for (Runnable call : new Runnable[] {addresses, memories}) {
          call.run();
          int calls = 2000;
          long start = threads.getCurrentThreadAllocatedBytes();
          for (int i = 0; i < calls; i++) {
            call.run();
          }
          long bytes = threads.getCurrentThreadAllocatedBytes() - start - measuring;
          device.synchronize(0);
          assertTrue(bytes < calls, bytes + " bytes in " + calls + " calls");
        }
      }
    }
  }
}
