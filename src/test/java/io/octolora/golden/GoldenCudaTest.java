// SPDX-License-Identifier: Apache-2.0
package io.octolora.golden;

import io.octolora.runtime.Device;
import java.util.Optional;
import org.junit.jupiter.api.Assumptions;
import org.junit.jupiter.api.Tag;

@Tag("gpu")
class GoldenCudaTest extends GoldenSuite {
  @Override
  Device open() {
    Optional<String> absent = Device.cudaUnavailableReason();
    absent.ifPresent(why -> System.out.println("SKIPPED: GoldenCudaTest: " + why));
    Assumptions.assumeTrue(absent.isEmpty(), () -> absent.orElse(""));
    return Device.cuda(0);
  }
}
