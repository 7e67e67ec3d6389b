// SPDX-License-Identifier: Apache-2.0
package io.octolora.runtime;

import static org.junit.jupiter.api.Assertions.assertArrayEquals;
import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertNotEquals;
import static org.junit.jupiter.api.Assertions.assertNull;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import com.sun.management.ThreadMXBean;
import io.octolora.OctoloraException;
import io.octolora.Status;
import io.octolora.checkpoint.Quantization;
import io.octolora.runtime.DeviceContract.Address;
import java.lang.management.ManagementFactory;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.List;
import org.bytedeco.javacpp.FloatPointer;
import org.junit.jupiter.api.AfterEach;
import org.junit.jupiter.api.BeforeEach;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.EnumSource;

/** What calls with several outputs, and with something behind them, do on every device; one subclass for each. */
abstract class ForwardCallContract {
  private static final int K = 53;
  private static final int ROWS = 7;

  private Device device;
  private long before;
  /** Closed in reverse order after each test. */
  private final List<AutoCloseable> opened = new ArrayList<>();

  abstract Device open();

  @BeforeEach
  void openDevice() {
    device = open();
    before = device.memoryInUse();
  }

  @AfterEach
  void nothingIsLeft() throws Exception {
    for (int i = opened.size() - 1; i >= 0; i--) {
      opened.get(i).close();
    }
    assertEquals(before, device.memoryInUse(), "bytes in use on " + device);
    device.close();
  }

  private <T extends AutoCloseable> T keep(T one) {
    opened.add(one);
    return one;
  }

  private DeviceMemory floats(float[] values) {
    DeviceMemory memory = keep(device.allocate(4L * values.length));
    memory.copyFrom(values, null);
    return memory;
  }

  private DeviceMemory ints(int... values) {
    DeviceMemory memory = keep(device.allocate(4L * values.length));
    ByteBuffer bytes = ByteBuffer.allocateDirect(4 * values.length).order(ByteOrder.nativeOrder());
    bytes.asIntBuffer().put(values);
    memory.copyFrom(bytes, null);
    return memory;
  }

  private static float[] read(DeviceMemory memory, int count) {
    float[] values = new float[count];
    memory.copyTo(values, null);
    return values;
  }

  private void enqueue(ForwardCall call) {
    call.workspace(keep(device.allocate(call.workspaceBytes()))).enqueue(0);
  }

  @Test
  void layersOfOneXAreOneCall() {
    int[] n = {37, 8, 64};
    RandomLayer[] layers = new RandomLayer[3];
    Int8Linear[] linears = new Int8Linear[3];
    for (int i = 0; i < 3; i++) {
      layers[i] = new RandomLayer(i, n[i], K, DeviceContract.DYNAMIC, i != 1, i == 1);
      linears[i] = keep(layers[i].load(device));
    }
    layers[0].attach(linears[0], layers[0].adapter(4, 0.5f));
    layers[2].attach(linears[2], layers[2].adapter(17, -1));
    layers[2].attach(linears[2], layers[2].adapter(1, 2));
    float[] x = layers[0].floats(ROWS * K);
    ForwardCall call = new ForwardCall(linears).x(floats(x), DataType.FLOAT32, ROWS);
    DeviceMemory[] y = new DeviceMemory[3];
    for (int i = 0; i < 3; i++) {
      y[i] = keep(device.allocate(4L * ROWS * n[i]));
      call.y(i, y[i]);
    }
    enqueue(call);
    for (int i = 0; i < 3; i++) {
      float[] got = read(y[i], ROWS * n[i]);
      assertNull(layers[i].judge(x, ROWS, got), "output " + i);
    }

    // What is attached counts when the call is enqueued; fewer rows fit the same memory.
    linears[0].detachAll();
    layers[0].adapters.clear();
    call.x(floats(Arrays.copyOfRange(x, K, 3 * K)), DataType.FLOAT32, 2).enqueue(0);
    assertNull(layers[0].judge(Arrays.copyOfRange(x, K, 3 * K), 2, read(y[0], 2 * n[0])));
    assertEquals("layer, layer, layer [rows = 2]", call.toString());
  }

  @ParameterizedTest
  @EnumSource(Activation.class)
  void activationGateAndResidualFollow(Activation activation) {
    int n = 21;
    RandomLayer layer = new RandomLayer(4, n, K, Quantization.weightOnly(), true, true);
    Int8Linear linear = keep(layer.load(device));
    layer.attach(linear, layer.adapter(4, 0.5f));
    float[] x = layer.floats(ROWS * K);
    for (int i = 0; i < x.length; i++) {
      x[i] /= 16; // so that the activations are in their curve
    }
    float[] gate = layer.floats(n);
    float[] residual = layer.floats(ROWS * n);
    float[] plain = linear.forward(x, ROWS);
    DeviceMemory y = keep(device.allocate(4L * ROWS * n));
    ForwardCall call = new ForwardCall(linear).x(floats(x), DataType.FLOAT32, ROWS).activation(0, activation).y(0, y);
    for (boolean gated : new boolean[] {false, true}) {
      for (boolean added : new boolean[] {false, true}) {
        call.gate(0, gated ? floats(gate) : null);
        y.copyFrom(residual, null);
        call.residual(0, added ? y : null); // in place
        enqueue(call);
        float[] got = read(y, ROWS * n);
        for (int i = 0; i < got.length; i++) {
          double v = plain[i];
          double want = apply(activation, v) * (gated ? gate[i % n] : 1) + (added ? residual[i] : 0);
          // v, rounded once more than in the call, and a few roundings of each step
          double bound = 0x1p-20 * ((Math.abs(v) + 1) * (gated ? Math.abs(gate[i % n]) : 1) + 8);
          assertEquals(want, got[i], bound, "element %d, gate %b, residual %b".formatted(i, gated, added));
        }
      }
    }
  }

  private static double apply(Activation activation, double v) {
    return switch (activation) {
      case NONE -> v;
      case GELU_TANH -> v / 2 * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (v + 0.044715 * v * v * v)));
      case GELU_ERF -> v / 2 * (1 + erf(v / Math.sqrt(2)));
      case SILU -> v / (1 + Math.exp(-v));
    };
  }

  /** By its Taylor series, which is enough for what occurs here. */
  private static double erf(double z) {
    if (Math.abs(z) > 4) {
      return Math.signum(z);
    }
    double sum = 0;
    double term = z;
    for (int i = 0; i < 120; i++) {
      sum += term / (2 * i + 1);
      term *= -z * z / (i + 1);
    }
    return 2 / Math.sqrt(Math.PI) * sum;
  }

  @Test
  void rowsHaveSlotsOfTheirOwn() {
    int n = 24;
    RandomLayer layer = new RandomLayer(5, n, K, DeviceContract.DYNAMIC, true, true);
    Int8Linear linear = keep(layer.load(device));
    AdapterSlots slots = keep(linear.slots(LoraPrecision.BITS_16, 4, 8));
    RandomLayer.Adapter[] adapters = {layer.adapter(4, 0.5f), layer.adapter(8, -2)};
    for (int slot = 0; slot < 2; slot++) {
      slots.set(slot, adapters[slot].rank(), adapters[slot].a(), adapters[slot].b(), adapters[slot].weight(), 0);
    }
    float[] x = layer.floats(ROWS * K);
    float[] base = linear.forward(x, ROWS);
    int[] rowSlots = {1, -1, 0, 0, 2, 1, -1};
    DeviceMemory y = keep(device.allocate(4L * ROWS * n));
    ForwardCall call = new ForwardCall(slots).x(floats(x), DataType.FLOAT32, ROWS).y(0, y).rowSlots(ints(rowSlots));
    enqueue(call);
    float[] got = read(y, ROWS * n);
    for (int row = 0; row < ROWS; row++) {
      float[] one = Arrays.copyOfRange(got, row * n, (row + 1) * n);
      int slot = rowSlots[row];
      if (slot < 0 || slot > 1) {
        assertArrayEquals(Arrays.copyOfRange(base, row * n, (row + 1) * n), one, "row " + row);
      } else {
        assertNull(layer.judge(Arrays.copyOfRange(x, row * K, (row + 1) * K), 1, one, List.of(adapters[slot])),
            "row " + row);
      }
    }
    enqueue(call.rowSlots(0));
    assertNull(layer.judge(x, ROWS, read(y, ROWS * n), List.of(adapters)), "all slots");
  }

  @Test
  void addressesAreTakenAsTheyAre() {
    int n = 16;
    RandomLayer layer = new RandomLayer(6, n, K, DeviceContract.DYNAMIC, true, true);
    Int8Linear linear = keep(layer.load(device));
    float[] x = layer.floats(ROWS * K);
    float[] residual = layer.floats(ROWS * n);
    float[] gate = layer.floats(n);
    DeviceMemory xs = floats(x);
    DeviceMemory first = keep(device.allocate(4L * ROWS * n));
    DeviceMemory second = keep(device.allocate(4L * ROWS * n));
    DeviceMemory added = floats(residual);
    DeviceMemory factor = floats(gate);
    DeviceMemory none = ints(new int[ROWS]);
    ForwardCall call = new ForwardCall(linear).x(xs, DataType.FLOAT32, ROWS).y(0, first).residual(0, added)
        .gate(0, factor).rowSlots(none);
    enqueue(call);
    try (DeviceMemory workspace = device.allocate(call.workspaceBytes())) {
      new ForwardCall(linear).x(xs.address(), DataType.FLOAT32, ROWS).yType(DataType.FLOAT32).y(0, second.address())
          .residual(0, added.address()).gate(0, factor.address()).rowSlots(none.address())
          .workspace(workspace.address(), workspace.bytes()).enqueue(0);
      device.synchronize(0);
    }
    float[] got = read(first, ROWS * n);
    assertArrayEquals(got, read(second, ROWS * n));
    second.copyFrom(new float[ROWS * n], null);
    try (DeviceMemory workspace = device.allocate(call.workspaceBytes()); Stream stream = device.createStream()) {
      new ForwardCall(linear).x(new Address(xs.address()), DataType.FLOAT32, ROWS).y(0, new Address(second.address()))
          .residual(0, new Address(added.address())).gate(0, new Address(factor.address()))
          .rowSlots(new Address(none.address())).workspace(new Address(workspace.address()), workspace.bytes())
          .enqueue(new Address(stream.address()));
      stream.synchronize();
    }
    assertArrayEquals(got, read(second, ROWS * n), "by JavaCPP's pointers");
    FloatPointer later = new FloatPointer(new Address(xs.address())).position(K); // from the second row on
    call.x(later, DataType.FLOAT32, 1).gate(0, 0L).residual(0, 0L).enqueue(0);
    assertNull(layer.judge(Arrays.copyOfRange(x, K, 2 * K), 1, Arrays.copyOf(read(first, ROWS * n), n)));
    call.x(xs, DataType.FLOAT32, ROWS).enqueue(0);
    assertArrayEquals(linear.forward(x, ROWS), read(first, ROWS * n), "taken away again");
  }

  @Test
  void explainsWhatRuns() {
    Int8Linear one = keep(new RandomLayer(7, 37, K, DeviceContract.DYNAMIC, true, true).load(device));
    Int8Linear two = keep(new RandomLayer(8, 40, K, DeviceContract.DYNAMIC, true, true).load(device));
    ForwardCall call = new ForwardCall(one, two);
    assertTrue(call.explain().contains("no rows"), call.explain());
    String text = call.x(0, DataType.BFLOAT16, 5).yType(DataType.FLOAT16).explain();
    assertTrue(text.contains("x [5, 53] bf16, W8A8 dynamic, y fp16, 2 outputs"), text);
    assertTrue(text.contains(device.info().id() + ":"), text);
    assertTrue(text.contains("N = 37") && text.contains("N = 40") && text.endsWith("\n"), text);
  }

  @Test
  void refusalsNameTheLayersAndTheNumbers() {
    RandomLayer layer = new RandomLayer(9, 10, K, DeviceContract.DYNAMIC, true, true);
    Int8Linear linear = keep(layer.load(device));
    Int8Linear other = keep(new RandomLayer(9, 10, K, Quantization.weightOnly(), true, true).load(device));
    DeviceMemory x = keep(device.allocate(4L * ROWS * K));
    DeviceMemory y = keep(device.allocate(4L * ROWS * 10));
    DeviceMemory small = keep(device.allocate(12));
    ForwardCall call = new ForwardCall(linear).x(x, DataType.FLOAT32, ROWS).y(0, y);

    assertEquals("0 layers, expected 1 to 8",
        assertThrows(IllegalArgumentException.class, ForwardCall::new).getMessage());
    Forward[] nine = new Forward[9];
    Arrays.fill(nine, linear);
    assertEquals("9 layers, expected 1 to 8",
        assertThrows(IllegalArgumentException.class, () -> new ForwardCall(nine)).getMessage());
    assertEquals("layer: output 1, expected 0 to 0",
        assertThrows(IllegalArgumentException.class, () -> call.y(1, y)).getMessage());
    assertRefused("layer: workspace_bytes = 0, expected at least " + call.workspaceBytes(),
        Status.WORKSPACE_TOO_SMALL, call);
    call.workspace(keep(device.allocate(call.workspaceBytes())));
    for (ForwardCall bad : List.of(new ForwardCall(linear, other), new ForwardCall(other, linear))) {
      OctoloraException e = assertThrows(OctoloraException.class, bad::workspaceBytes);
      assertEquals(Status.INVALID_ARGUMENT, e.status());
      assertTrue(e.getMessage().startsWith("layer, layer: outputs[1].linear reads x another way"), e.getMessage());
    }
    assertRefused("layer: outputs[0].y is NULL", Status.INVALID_ARGUMENT, call.y(0, 0L));
    call.y(0, y);
    assertRefused("layer: rows = -1, expected 0 or more", Status.INVALID_ARGUMENT, call.x(0, DataType.FLOAT32, -1));
    call.x(x, DataType.FLOAT32, ROWS);
    assertTooSmall("x", 1484, call.x(small, DataType.FLOAT32, ROWS));
    call.x(x, DataType.FLOAT32, ROWS);
    assertTooSmall("y", 280, call.y(0, small));
    call.y(0, y);
    assertTooSmall("residual", 280, call.residual(0, small));
    call.residual(0, 0L);
    assertTooSmall("gate", 40, call.gate(0, small));
    call.gate(0, 0L);
    assertTooSmall("rowSlots", 28, call.rowSlots(small));
    call.rowSlots(0).enqueue(0); // all is well again

    DeviceMemory gone = device.allocate(4L * ROWS * 10);
    gone.close();
    assertEquals("DeviceMemory of 280 bytes is closed",
        assertThrows(IllegalStateException.class, () -> call.residual(0, gone).enqueue(0)).getMessage());
    linear.close();
    assertEquals("Int8Linear layer is closed",
        assertThrows(IllegalStateException.class, () -> call.enqueue(0)).getMessage());
  }

  private static void assertRefused(String message, Status status, ForwardCall call) {
    OctoloraException e = assertThrows(OctoloraException.class, () -> call.enqueue(0));
    assertEquals(message, e.getMessage());
    assertEquals(status, e.status());
  }

  private static void assertTooSmall(String what, int needed, ForwardCall call) {
    assertEquals("%s holds 12 bytes, expected at least %d".formatted(what, needed),
        assertThrows(IllegalArgumentException.class, () -> call.enqueue(0)).getMessage());
  }

  @Test
  void enqueuingAllocatesNothingOnTheHeap() {
    RandomLayer layer = new RandomLayer(10, 8, 16, DeviceContract.DYNAMIC, true, true);
    Int8Linear linear = keep(layer.load(device));
    layer.attach(linear, layer.adapter(4, 0.5f));
    DeviceMemory x = floats(layer.floats(16));
    DeviceMemory residual = floats(layer.floats(8));
    DeviceMemory[] y = {keep(device.allocate(32)), keep(device.allocate(32))};
    ForwardCall call = new ForwardCall(linear, linear).activation(1, Activation.SILU).x(x, DataType.FLOAT32, 1)
        .y(0, y[0]).y(1, y[1]);
    call.workspace(keep(device.allocate(call.workspaceBytes())));
    ThreadMXBean threads = (ThreadMXBean) ManagementFactory.getThreadMXBean();
    long measuring = threads.getCurrentThreadAllocatedBytes();
    measuring = threads.getCurrentThreadAllocatedBytes() - measuring;
    call.enqueue(0);
    int calls = 2000;
    long start = threads.getCurrentThreadAllocatedBytes();
    for (int i = 0; i < calls; i++) {
      call.x(x, DataType.FLOAT32, 1).y(0, y[i % 2]).y(1, y[1 - i % 2]).residual(0, residual).enqueue(0);
    }
    long bytes = threads.getCurrentThreadAllocatedBytes() - start - measuring;
    device.synchronize(0);
    assertTrue(bytes < calls, bytes + " bytes in " + calls + " calls");
    assertNotEquals(0, read(y[0], 8)[0]);
  }
}
