// SPDX-License-Identifier: Apache-2.0
package io.octolora.runtime;

class CpuAdapterSetTest extends AdapterSetContract {
  @Override
  Device open() {
    return Device.cpu();
  }

  @Override
  int soakForwards() {
    return 100_000;
  }
}
