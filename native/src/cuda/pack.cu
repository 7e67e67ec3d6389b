// SPDX-License-Identifier: Apache-2.0
//
// What changes in device memory when weights or adapters are loaded, not when a forward runs.
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

__global__ void total_bias(float* total, const float* bias, const float* slot_bias, const float* scale,
                           const int32_t* active, int slots, int n) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= n) return;
  float sum = bias ? bias[i] : 0.f;
  for (int slot = 0; slot < slots; ++slot) {
    if (active[slot]) sum += scale[slot] * slot_bias[static_cast<int64_t>(slot) * n + i];
  }
  total[i] = sum;
}

}  // namespace

void launch_widen_order(int8_t* weight, int64_t groups, cudaStream_t stream) {
  widen_order<<<static_cast<unsigned>((groups + kThreads - 1) / kThreads), kThreads, 0, stream>>>(
      reinterpret_cast<uint4*>(weight), groups);
  OCTOLORA_CUDA(cudaGetLastError(), "order for widening: %lld groups of 16", static_cast<long long>(groups));
}

void launch_total_bias(float* total, const float* bias, const float* slot_bias, const float* scale,
                       const int32_t* active, int slots, int n, cudaStream_t stream) {
  total_bias<<<(n + kThreads - 1) / kThreads, kThreads, 0, stream>>>(total, bias, slot_bias, scale, active, slots, n);
  OCTOLORA_CUDA(cudaGetLastError(), "total bias: N = %d, %d slots", n, slots);
}

}  // namespace octolora::cuda
