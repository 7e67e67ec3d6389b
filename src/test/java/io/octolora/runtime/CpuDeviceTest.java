// SPDX-License-Identifier: Apache-2.0
package io.octolora.runtime;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertFalse;
import static org.junit.jupiter.api.Assertions.assertNull;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import io.octolora.OctoloraException;
import io.octolora.Status;
import org.bytedeco.cuda.cudart.CUstream_st;
import org.bytedeco.javacpp.Pointer;
import org.junit.jupiter.api.Test;

class CpuDeviceTest extends DeviceContract {
  @Override
  Device open() {
    return Device.cpu();
  }

  @Test
  void describesItself() {
    try (Device device = Device.cpu()) {
      DeviceInfo info = device.info();
      assertEquals("cpu", info.id());
      assertEquals(0, info.computeCapability());
      assertTrue(info.units() >= 1, info.toString());
      assertFalse(info.name().isBlank());
      assertTrue(info.kernels().matches("avx512-vnni|avx2|portable"), info.kernels());
      device.setThreads(1);
      assertEquals("threads = 1025, expected 1 to 1024",
          assertThrows(OctoloraException.class, () -> device.setThreads(1025)).getMessage());
    }
  }

  @Test
  void knowsOnlyTheDefaultStream() {
    try (Device device = Device.cpu(); Stream stream = device.createStream()) {
      assertEquals(0, stream.address());
      stream.synchronize();
    }
  }

  /** The type alone: its native library is never loaded. */
  @Test
  void takesAStreamOfTheCudaBindings() {
    RandomLayer layer = new RandomLayer(30, 3, 5, DYNAMIC, true, true);
    float[] x = layer.floats(5);
    try (Device device = Device.cpu();
        Int8Linear linear = layer.load(device);
        DeviceMemory onDevice = device.allocate(20);
        DeviceMemory y = device.allocate(12);
        DeviceMemory workspace = device.allocate(linear.workspaceBytes(1, DataType.FLOAT32))) {
      onDevice.copyFrom(x, null);
      CUstream_st stream = new CUstream_st((Pointer) null);
      linear.forward(new Address(onDevice.address()), DataType.FLOAT32, new Address(y.address()), DataType.FLOAT32, 1,
          new Address(workspace.address()), workspace.bytes(), stream);
      float[] result = new float[3];
      y.copyTo(result, null);
      assertNull(layer.judge(x, 1, result));
    }
  }

  @Test
  void absentCudaHasAReason() {
    OctoloraException none = assertThrows(OctoloraException.class, () -> Device.cuda(99).close());
    assertEquals(Status.NO_DEVICE, none.status());
    assertEquals("CUDA ordinal -1, expected 0 or more",
        assertThrows(IllegalArgumentException.class, () -> Device.cuda(-1).close()).getMessage());
    assertEquals(Device.cudaCount() == 0, Device.cudaUnavailableReason().isPresent());
    try (Device best = Device.best()) {
      assertEquals(Device.cudaCount() > 0, best.info().isCuda());
    }
  }
}
