// SPDX-License-Identifier: Apache-2.0
package io.octolora.golden;

import io.octolora.runtime.Device;

class GoldenCpuTest extends GoldenSuite {
  @Override
  Device open() {
    return Device.cpu();
  }
}
