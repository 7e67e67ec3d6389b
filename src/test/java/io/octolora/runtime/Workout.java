// SPDX-License-Identifier: Apache-2.0
package io.octolora.runtime;

import io.octolora.OctoloraException;
import java.nio.ByteBuffer;
import java.util.List;

/**
 * Calls every native function at least once, failures included; run by {@link ChildProcessTest} in a JVM of its own.
 */
final class Workout {
  static final String DONE = "every native function called";

  private Workout() {}

  public static void main(String[] args) {
    System.out.println(Device.libraryVersion());
    Device.cudaUnavailableReason().ifPresent(System.out::println);
    run(Device.cpu());
    if (Device.cudaCount() > 0) {
      run(Device.cuda(0));
    }
    System.out.println(DONE);
  }

  private static void run(Device opened) {
    RandomLayer layer = new RandomLayer(1, 16, 48, DeviceContract.DYNAMIC, true, true);
    float[] x = layer.floats(3 * 48);
    try (Device device = opened;
        Int8Linear linear = layer.load(device);
        Int8Linear pieces = Int8Linear.create(device.handle(), "pieces", 16, 48, DeviceContract.DYNAMIC,
            (offset, length) -> layer.weight.slice((int) offset, length), layer.scale, layer.bias, 100);
        AdapterSlots slots = linear.slots(LoraPrecision.SPLIT, 8, 4);
        Stream stream = device.createStream();
        DeviceMemory memory = device.allocate(4L * x.length);
        DeviceMemory y = device.allocate(4L * 3 * 16)) {
      if (!device.info().isCuda()) {
        device.setThreads(2);
      }
      layer.attach(linear, layer.adapter(8, 1));
      RandomLayer.Adapter other = layer.adapter(4, 1);
      slots.set(1, other.rank(), other.a(), other.b(), 0.5f, stream.address());
      slots.setWeight(1, 2, stream.address());
      slots.clear(1, stream.address());
      stream.synchronize();
      slots.forward(x, 3);
      linear.quantized(x, 3);
      pieces.forward(x, 3);
      String wrong = layer.judge(x, 3, linear.forward(x, 3));
      if (wrong != null) {
        throw new AssertionError(wrong);
      }
      memory.copyFrom(x, stream);
      ForwardCall call = new ForwardCall(linear).activation(0, Activation.GELU_ERF).y(0, y).residual(0, y)
          .x(memory, DataType.FLOAT32, 3);
      y.copyFrom(new byte[4 * 3 * 16], stream);
      try (DeviceMemory workspace = device.allocate(call.workspaceBytes())) {
        call.workspace(workspace).enqueue(stream);
        System.out.println(call.explain());
        stream.synchronize();
      }
      try (PinnedMemory pinned = new PinnedMemory(device.handle(), "workout", 8)) {
        memory.copyFrom(pinned.take(8).putInt(0, 1), stream);
      }
      memory.copyFrom(new byte[8], stream);
      memory.copyFrom(ByteBuffer.allocateDirect(8), stream);
      memory.copyTo(new float[2], stream);
      memory.copyTo(new byte[2], stream);
      memory.copyTo(new int[2], stream);
      memory.copyTo(ByteBuffer.allocate(8), stream);
      device.copy(memory.address(), memory.address() + 16, 16, stream.address());
      device.synchronize(stream.address());
      System.out.println(device + " " + device.memoryInUse());
      for (Runnable refused : List.<Runnable>of(
          () -> device.allocate(1L << 60),
          () -> linear.forward(0, DataType.FLOAT32, 0, DataType.FLOAT32, -1, 0, 0, 0),
          () -> call.y(0, 0L).workspace(null).enqueue(0),
          () -> slots.set(7, other.rank(), other.a(), other.b(), 1, 0),
          () -> device.load("wide", 1, 131072, DeviceContract.DYNAMIC, ByteBuffer.allocate(131072), new float[1],
              null))) {
        try {
          refused.run();
          throw new AssertionError("not refused");
        } catch (OctoloraException expected) {
          System.out.println(expected.status() + ": " + expected.getMessage());
        }
      }
    }
  }
}
