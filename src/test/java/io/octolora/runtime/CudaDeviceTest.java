// SPDX-License-Identifier: Apache-2.0
package io.octolora.runtime;

import static org.junit.jupiter.api.Assertions.assertArrayEquals;
import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import io.octolora.OctoloraException;
import io.octolora.Status;
import java.util.Optional;
import org.junit.jupiter.api.Assumptions;
import org.junit.jupiter.api.BeforeAll;
import org.junit.jupiter.api.Tag;
import org.junit.jupiter.api.Test;

@Tag("gpu")
class CudaDeviceTest extends DeviceContract {
  @BeforeAll
  static void needsADevice() {
    Optional<String> reason = Device.cudaUnavailableReason();
    reason.ifPresent(why -> System.out.println("CudaDeviceTest skipped: " + why));
    Assumptions.assumeTrue(reason.isEmpty(), () -> "no CUDA device: " + reason.get());
  }

  @Override
  Device open() {
    return Device.cuda(0);
  }

  @Test
  void describesItself() {
    try (Device device = Device.cuda(0)) {
      DeviceInfo info = device.info();
      assertEquals("cuda:0", info.id());
      assertTrue(info.computeCapability() >= 80, info.toString());
      assertTrue(info.memoryBytes() > 1L << 30, info.toString());
      assertTrue(info.kernels().contains("mma.sync"), info.kernels());
      assertEquals(Status.UNSUPPORTED,
          assertThrows(OctoloraException.class, () -> device.setThreads(1)).status());
    }
  }

  /** The sums are exact, so the two devices agree bit for bit. */
  @Test
  void sumsEqualTheCpus() {
    RandomLayer layer = new RandomLayer(20, 129, 257, DYNAMIC, true, true);
    float[] x = layer.floats(17 * 257);
    try (Device cuda = Device.cuda(0);
        Device cpu = Device.cpu();
        Int8Linear there = layer.load(cuda);
        Int8Linear here = layer.load(cpu)) {
      Int8Linear.Quantized a = there.quantized(x, 17);
      Int8Linear.Quantized b = here.quantized(x, 17);
      assertArrayEquals(b.codes(), a.codes());
      assertArrayEquals(b.rowScale(), a.rowScale());
      assertArrayEquals(b.sums(), a.sums());
    }
  }

  @Test
  void streamsAreDistinctAndNotTheDefault() {
    try (Device device = Device.cuda(0); Stream one = device.createStream(); Stream two = device.createStream()) {
      assertTrue(one.address() != 0 && two.address() != 0 && one.address() != two.address());
    }
  }
}
