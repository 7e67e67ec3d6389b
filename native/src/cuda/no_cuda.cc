// SPDX-License-Identifier: Apache-2.0
//
// Stands in for the CUDA backend in a library built without nvcc.
#include "backend.h"

namespace octolora {

std::shared_ptr<Device> make_cuda_device(int ordinal) {
  throw Error(OCTOLORA_NO_DEVICE, "cuda:%d: this library was built without nvcc and has the CPU backend only", ordinal);
}

int cuda_device_count() {
  throw Error(OCTOLORA_NO_DEVICE, "this library was built without nvcc and has the CPU backend only");
}

}  // namespace octolora
