// SPDX-License-Identifier: Apache-2.0
//
// The order of W8A16 weights in device memory, made when they are written.
#include "check.h"
#include "kernels.h"

namespace octolora::cuda {
namespace {

constexpr int kThreads = 256;

// Of 16 values of K, lane t of an mma holds 2t, 2t+1, 8+2t and 9+2t: its four bytes are put beside each other.
__global__ void widen_order(uint4* groups, int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  const uint4 k = groups[i];
  groups[i] = {__byte_perm(k.x, k.z, 0x5410), __byte_perm(k.x, k.z, 0x7632), __byte_perm(k.y, k.w, 0x5410),
               __byte_perm(k.y, k.w, 0x7632)};
}

}  // namespace

void launch_widen_order(int8_t* weight, int64_t groups, cudaStream_t stream) {
  widen_order<<<static_cast<unsigned>((groups + kThreads - 1) / kThreads), kThreads, 0, stream>>>(
      reinterpret_cast<uint4*>(weight), groups);
  OCTOLORA_CUDA(cudaGetLastError(), "order for widening: %lld groups of 16", static_cast<long long>(groups));
}

}  // namespace octolora::cuda
