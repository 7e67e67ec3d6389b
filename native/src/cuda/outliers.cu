// SPDX-License-Identifier: Apache-2.0
//
// Outlier columns of x: every k with some |x[m,k]| >= threshold, over all M rows (LLM.int8(), arXiv 2208.07339).
//
// A property of whole columns needs a pass over x of its own before any row can be quantized. The first kernel leaves
// one bit a column for each of kOutlierRowChunks bands of rows, so nothing has to be cleared and no atomics are needed;
// the second joins the bands and writes the columns down in ascending order.
#include "check.h"
#include "convert.cuh"
#include "kernels.h"

namespace octolora::cuda {
namespace {

constexpr int kMarkThreads = 128;
constexpr int kCompactThreads = 1024;

// A thread looks at Columns neighbouring columns of a band, which it reads in one load: 16 bytes where rows are aligned
// so.
template <class X, int Columns>
__global__ __launch_bounds__(kMarkThreads) void mark(const PrepareArgs args) {
  static_assert(32 % Columns == 0, "32 / Columns lanes make a word");
  struct alignas(sizeof(X) * Columns) Vector {
    X x[Columns];
  };
  const int column = (blockIdx.x * kMarkThreads + threadIdx.x) * Columns;
  const int band = (args.m + kOutlierRowChunks - 1) / kOutlierRowChunks;
  const int first = blockIdx.y * band, last = min(args.m, first + band);
  const uint32_t limit = __float_as_uint(args.spec.outlier_threshold);
  uint32_t found = 0;
  if (column < args.k) {
    const X* const x = static_cast<const X*>(args.x) + column;
#pragma unroll 8
    for (int m = first; m < last; ++m) {
      const Vector values = *reinterpret_cast<const Vector*>(x + static_cast<int64_t>(m) * args.k);
#pragma unroll
      for (int i = 0; i < Columns; ++i) {
        const float value = to_float(values.x[i]);
        const uint32_t magnitude = magnitude_bits(args.spec.round_x_to_f16 ? round_to_f16(value) : value);
        found |= static_cast<uint32_t>(magnitude >= limit && magnitude <= kInfinityBits) << i;
      }
    }
  }
  found <<= column % 32;
  for (int lanes = 1; lanes < 32 / Columns; lanes *= 2) found |= __shfl_xor_sync(~0u, found, lanes);
  if (column % 32 == 0 && column / 32 < args.outliers.words) {
    args.outliers.partial[blockIdx.y * args.outliers.words + column / 32] = found;
  }
}

__global__ __launch_bounds__(kCompactThreads) void compact(const OutlierView view) {
  __shared__ int counts[kCompactThreads / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int word = warp; word < view.words; word += kCompactThreads / 32) {
    uint32_t bits = 0;
#pragma unroll
    for (int band = 0; band < kOutlierRowChunks; band += 32) bits |= view.partial[(band + lane) * view.words + word];
    bits = __reduce_or_sync(~0u, bits);
    if (lane == 0) view.flags[word] = bits;
  }
  __syncthreads();
  const int span = (view.words + kCompactThreads - 1) / kCompactThreads;
  const int first = threadIdx.x * span, last = min(view.words, first + span);
  int count = 0;
  for (int word = first; word < last; ++word) count += __popc(view.flags[word]);
  // Exclusive prefix sum over the block.
  int before = count;
  for (int offset = 1; offset < 32; offset *= 2) {
    const int other = __shfl_up_sync(~0u, before, offset);
    if (lane >= offset) before += other;
  }
  if (lane == 31) counts[warp] = before;
  __syncthreads();
  for (int i = 0; i < warp; ++i) before += counts[i];
  if (threadIdx.x == kCompactThreads - 1) *view.count = before;
  int at = before - count;
  for (int word = first; word < last; ++word) {
    for (uint32_t bits = view.flags[word]; bits; bits &= bits - 1) view.list[at++] = word * 32 + __ffs(bits) - 1;
  }
}

template <class X, int Columns>
void launch_mark(const PrepareArgs& args, cudaStream_t stream) {
  constexpr int kBlockColumns = kMarkThreads * Columns;
  const dim3 grid((args.k + kBlockColumns - 1) / kBlockColumns, kOutlierRowChunks);
  mark<X, Columns><<<grid, kMarkThreads, 0, stream>>>(args);
  OCTOLORA_CUDA(cudaGetLastError(), "mark outliers: M = %d, K = %d", args.m, args.k);
}

template <class X>
void launch(const PrepareArgs& args, cudaStream_t stream) {
  constexpr int kVector = 16 / sizeof(X);
  if (reinterpret_cast<uintptr_t>(args.x) % 16 == 0 && args.k % kVector == 0)
    launch_mark<X, kVector>(args, stream);
  else
    launch_mark<X, 1>(args, stream);
  compact<<<1, kCompactThreads, 0, stream>>>(args.outliers);
  OCTOLORA_CUDA(cudaGetLastError(), "list outliers: K = %d", args.k);
}

}  // namespace

void launch_find_outliers(const PrepareArgs& args, cudaStream_t stream) {
  switch (args.x_type) {
    case Dtype::f32:
      return launch<float>(args, stream);
    case Dtype::f16:
      return launch<__half>(args, stream);
    case Dtype::bf16:
      return launch<__nv_bfloat16>(args, stream);
  }
}

void describe_find_outliers(const PrepareArgs& args, Explanation& to) {
  to.launch("mark outliers: columns with an element of at least %g, in %d bands of rows",
            static_cast<double>(args.spec.outlier_threshold), kOutlierRowChunks);
  to.launch("list outliers");
}

}  // namespace octolora::cuda
