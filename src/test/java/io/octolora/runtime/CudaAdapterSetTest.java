// SPDX-License-Identifier: Apache-2.0
package io.octolora.runtime;

import java.util.Optional;
import org.junit.jupiter.api.Assumptions;
import org.junit.jupiter.api.BeforeAll;
import org.junit.jupiter.api.Tag;

@Tag("gpu")
class CudaAdapterSetTest extends AdapterSetContract {
  @BeforeAll
  static void needsADevice() {
    Optional<String> reason = Device.cudaUnavailableReason();
    reason.ifPresent(why -> System.out.println("CudaAdapterSetTest skipped: " + why));
    Assumptions.assumeTrue(reason.isEmpty(), () -> "no CUDA device: " + reason.get());
  }

  @Override
  Device open() {
    return Device.cuda(0);
  }

  @Override
  int soakForwards() {
    return 8000;
  }
}
