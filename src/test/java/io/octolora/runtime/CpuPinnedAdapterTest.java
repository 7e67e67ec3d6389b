// SPDX-License-Identifier: Apache-2.0
package io.octolora.runtime;

class CpuPinnedAdapterTest extends PinnedAdapterContract {
  @Override
  Device open() {
    return Device.cpu();
  }
}
