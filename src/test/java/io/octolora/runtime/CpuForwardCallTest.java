// SPDX-License-Identifier: Apache-2.0
package io.octolora.runtime;

class CpuForwardCallTest extends ForwardCallContract {
  @Override
  Device open() {
    return Device.cpu();
  }
}
