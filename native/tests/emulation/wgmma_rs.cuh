// SPDX-License-Identifier: Apache-2.0
//
// The instructions of src/cuda/wgmma_rs.cuh on the emulated machine. Operands in registers are read as the instruction
// is issued: which registers the compiler gives them only the machine code shows.
#pragma once

#include "wgmma.cuh"

namespace octolora::cuda::ptx {

template <int Registers>
void wgmma_rs_bf16(float (&d)[Registers], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  machine::wgmma_issue(WgmmaType::bf16, Registers * 2, d, 0, a, b, accumulate);
}
template <int Registers>
void wgmma_rs_f16(float (&d)[Registers], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  machine::wgmma_issue(WgmmaType::f16, Registers * 2, d, 0, a, b, accumulate);
}

}  // namespace octolora::cuda::ptx
