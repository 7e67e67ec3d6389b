// SPDX-License-Identifier: Apache-2.0
//
// Outlier columns of x: every k with some |x[m,k]| >= threshold, over all M rows (LLM.int8(), arXiv 2208.07339).
//
// A property of whole columns needs a pass over x of its own before any row can be quantized. The first kernel leaves
// one bit a column for each band of rows, so nothing has to be cleared and no atomics on memory are needed; the second
// joins the bands and writes the columns down in ascending order. Where the GEMM takes the first of them as one more
// block of K, every block of the second kernel joins the bands, which are few, and puts its share of the rows of these
// columns, of x and of W, beside each other.
#include <algorithm>

#include "check.h"
#include "dependent_launch.cuh"
#include "outliers.cuh"
#include "prepare.cuh"

namespace octolora::cuda {
namespace {

constexpr int kMarkThreads = 256;
constexpr int kMarkWarps = kMarkThreads / 32;
constexpr int kMarkBlocks = 1024 / kMarkThreads;  // resident on a multiprocessor
constexpr int kRowsAhead = 8;                     // loads in flight a thread
constexpr int kListThreads = 1024;
constexpr int kListWarps = kListThreads / 32;
constexpr int kGatherRows = 4;  // of a warp at a time
constexpr int kMaxWords = (OCTOLORA_MAX_K + 31) / 32;

// Magnitudes of X in the halves of a word, or of a float. An outlier is a magnitude from limit to infinity: less limit,
// modulo 2^16 or 2^32, these become the smallest numbers, and a minimum over the rows tells whether there was one.
template <class X>
__device__ __forceinline__ uint32_t shifted_minimum(uint32_t bits, uint32_t minus_limit, uint32_t minimum) {
  if constexpr (sizeof(X) == 2)
    return __viaddmin_u16x2(bits & 0x7fff7fffu, minus_limit, minimum);
  else
    return min((bits & 0x7fffffffu) + minus_limit, minimum);
}

// A lane looks at Columns neighbouring columns, the warps of a block at every kMarkWarps-th row of a band.
template <class X, int Columns>
__global__ __launch_bounds__(kMarkThreads, kMarkBlocks) void mark(const void* input, int rows, int k, uint32_t limit,
                                                                  uint32_t* partial, int words) {
  static_assert(32 % Columns == 0, "32 / Columns lanes make a word");
  constexpr int kRegisters = (Columns * sizeof(X) + 3) / 4;
  constexpr int kInRegister = Columns / kRegisters;
  using Magnitude = std::conditional_t<sizeof(X) == 2, uint16_t, uint32_t>;
  struct alignas(sizeof(X) * Columns) Vector {
    X x[Columns];
  };
  __shared__ uint32_t words_of[kMarkWarps][Columns];
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = threadIdx.x % 32;
  const int column = (static_cast<int>(blockIdx.x) * 32 + lane) * Columns;
  const int first = static_cast<int>(static_cast<int64_t>(rows) * blockIdx.y / gridDim.y);
  const int last = static_cast<int>(static_cast<int64_t>(rows) * (blockIdx.y + 1) / gridDim.y);
  const auto minus_limit = static_cast<Magnitude>(-limit);
  const uint32_t shift = sizeof(X) == 2 ? minus_limit * 0x10001u : minus_limit;
  uint32_t minimum[kRegisters];
#pragma unroll
  for (int i = 0; i < kRegisters; ++i) minimum[i] = ~0u;
  ptx::wait_for_primaries();
  ptx::launch_dependents();
  if (column < k) {
    const X* const x = static_cast<const X*>(input) + column;
    for (int m = first + warp; m < last; m += kMarkWarps * kRowsAhead) {
      uint32_t bits[kRowsAhead][kRegisters] = {};
#pragma unroll
      for (int i = 0; i < kRowsAhead; ++i) {
        if (m + i * kMarkWarps >= last) break;
        *reinterpret_cast<Vector*>(bits[i]) =
            *reinterpret_cast<const Vector*>(x + static_cast<int64_t>(m + i * kMarkWarps) * k);
      }
#pragma unroll
      for (int i = 0; i < kRowsAhead; ++i) {
#pragma unroll
        for (int j = 0; j < kRegisters; ++j) minimum[j] = shifted_minimum<X>(bits[i][j], shift, minimum[j]);
      }
    }
  }
  constexpr uint32_t kInfinity = sizeof(X) == 4 ? kInfinityBits : std::is_same_v<X, __half> ? 0x7c00 : 0x7f80;
  uint32_t found = 0;
#pragma unroll
  for (int i = 0; i < Columns; ++i) {
    const auto least = static_cast<Magnitude>(minimum[i / kInRegister] >> i % kInRegister * 16);
    found |= static_cast<uint32_t>(least <= kInfinity - limit) << i;
  }
  found <<= lane * Columns % 32;
#pragma unroll
  for (int lanes = 1; lanes < 32 / Columns; lanes *= 2) found |= __shfl_xor_sync(~0u, found, lanes);
  if (lane % (32 / Columns) == 0) words_of[warp][lane / (32 / Columns)] = found;
  __syncthreads();
  const int word = static_cast<int>(blockIdx.x) * Columns + static_cast<int>(threadIdx.x);
  if (threadIdx.x < Columns && word < words) {
    uint32_t joined = 0;
    for (int i = 0; i < kMarkWarps; ++i) joined |= words_of[i][threadIdx.x];
    partial[static_cast<int64_t>(blockIdx.y) * words + word] = joined;
  }
}

// A warp has some of the rows; pair(row) is what a lane puts there.
template <class Pair>
__device__ __forceinline__ void gather(uint16_t* to, int rows, const Pair& pair) {
  const int warp = static_cast<int>(blockIdx.x) * kListWarps + static_cast<int>(threadIdx.x) / 32;
  const int warps = static_cast<int>(gridDim.x) * kListWarps, lane = threadIdx.x % 32;
  for (int first = warp; first < rows; first += warps * kGatherRows) {
    uint32_t bits[kGatherRows];
#pragma unroll
    for (int i = 0; i < kGatherRows; ++i) bits[i] = first + i * warps < rows ? pair(first + i * warps) : 0;
#pragma unroll
    for (int i = 0; i < kGatherRows; ++i) {
      const int64_t row = first + i * warps;
      if (row < rows) reinterpret_cast<uint32_t*>(to + row * kOutlierColumns)[lane] = bits[i];
    }
  }
}

template <class X>
__global__ __launch_bounds__(kListThreads) void list(const __grid_constant__ PrepareArgs args, int bands) {
  const OutlierView& view = args.outliers;
  __shared__ uint32_t flags[kMaxWords];
  __shared__ int counts[kListWarps];
  __shared__ int columns[kOutlierColumns];
  const int lane = threadIdx.x % 32, warp = static_cast<int>(threadIdx.x) / 32;
  for (int word = threadIdx.x; word < view.words; word += kListThreads) flags[word] = 0;
  __syncthreads();
  ptx::wait_for_primaries();
  ptx::launch_dependents();
  // 32 words of every splits-th band are a warp's.
  const int chunks = (view.words + 31) / 32, splits = max(1, min(bands, kListWarps / chunks));
  for (int item = warp; item < chunks * splits; item += kListWarps) {
    const int word = item % chunks * 32 + lane;
    uint32_t bits = 0;
    if (word < view.words) {
#pragma unroll 8
      for (int band = item / chunks; band < bands; band += splits)
        bits |= view.partial[static_cast<int64_t>(band) * view.words + word];
    }
    if (bits) atomicOr(&flags[word], bits);
  }
  __syncthreads();
  const int span = (view.words + kListThreads - 1) / kListThreads;
  const int first = static_cast<int>(threadIdx.x) * span, last = min(view.words, first + span);
  const bool writes = blockIdx.x == 0;
  int count = 0;
  for (int word = first; word < last; ++word) {
    if (writes) view.flags[word] = flags[word];
    count += __popc(flags[word]);
  }
  // Exclusive prefix sum over the block.
  int before = count;
  for (int offset = 1; offset < 32; offset *= 2) {
    const int other = __shfl_up_sync(~0u, before, offset);
    if (lane >= offset) before += other;
  }
  if (lane == 31) counts[warp] = before;
  __syncthreads();
  int all = counts[lane];
  before += __reduce_add_sync(~0u, lane < warp ? all : 0);
  all = __reduce_add_sync(~0u, all);
  if (writes && threadIdx.x == 0) *view.count = all;
  int at = before - count;
  for (int word = first; word < last; ++word) {
    for (uint32_t bits = flags[word]; bits; bits &= bits - 1, ++at) {
      const int column = word * 32 + __ffs(bits) - 1;
      if (writes) view.list[at] = column;
      if (at < kOutlierColumns) columns[at] = column;
    }
  }
  if (!view.x || all == 0) return;
  __syncthreads();
  constexpr int kPieces = outlier_pieces(sizeof(X) == 4 ? Dtype::f32 : Dtype::bf16);
  using Bits = std::conditional_t<sizeof(X) == 4, float, uint16_t>;
  const int gathered = min(all, (kOutlierColumns + kPieces - 1) / kPieces);
  for (int block = 0; block * kOutlierBlock < min(gathered * kPieces, kOutlierColumns); ++block) {
    const OutlierPair pair(columns, gathered, kPieces > 1, block);
    uint16_t* to = view.x + block * kOutlierBlock;
    gather(to, args.m,
           [&](int row) { return pair.x(static_cast<const Bits*>(args.x) + static_cast<int64_t>(row) * args.k); });
    to = view.weight + block * kOutlierBlock;
    for (int m = 0; m < args.member_count; ++m) {
      const PrepareMember& member = args.member[m];
      gather(to, member.n, [&](int row) {
        return pair.weight(member.weight + static_cast<int64_t>(row) * args.k_pitch, std::is_same_v<X, __half>);
      });
      to += static_cast<int64_t>(member.n) * kOutlierColumns;
    }
  }
}

// A warp for each row to gather, as far as one wave of blocks has them.
int list_blocks(const PrepareArgs& args, const Limits& limits) {
  if (!args.outliers.x) return 1;
  int64_t rows = args.m;
  for (int i = 0; i < args.member_count; ++i) rows += args.member[i].n;
  return static_cast<int>(std::min<int64_t>(limits.multiprocessors, (rows + kListWarps - 1) / kListWarps));
}

template <class X>
int vector_columns(const PrepareArgs& args) {
  constexpr int kVector = 16 / sizeof(X);
  return reinterpret_cast<uintptr_t>(args.x) % 16 == 0 && args.k % kVector == 0 ? kVector : 1;
}

// Bands of rows, so that one wave of blocks fills the device.
template <class X>
dim3 mark_grid(const PrepareArgs& args, const Limits& limits) {
  const int columns = 32 * vector_columns<X>(args), blocks = (args.k + columns - 1) / columns;
  const int bands = std::clamp(limits.multiprocessors * kMarkBlocks / blocks, 1,
                               std::min(kOutlierRowChunks, (args.m + kMarkWarps - 1) / kMarkWarps));
  return dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(bands));
}

template <class X>
void launch(const PrepareArgs& args, const Limits& limits, cudaStream_t stream) {
  const dim3 grid = mark_grid<X>(args, limits);
  const auto kernel = vector_columns<X>(args) > 1 ? mark<X, 16 / sizeof(X)> : mark<X, 1>;
  DependentLaunch first(limits, grid, kMarkThreads, 1, 0, stream);
  OCTOLORA_CUDA(cudaLaunchKernelEx(&first.config, kernel, args.x, args.m, args.k, outlier_limit<X>(args.spec),
                                   args.outliers.partial, args.outliers.words),
                "mark outliers: M = %d, K = %d", args.m, args.k);
  DependentLaunch second(limits, dim3(static_cast<unsigned>(list_blocks(args, limits))), kListThreads, 1, 0, stream);
  OCTOLORA_CUDA(cudaLaunchKernelEx(&second.config, list<X>, args, static_cast<int>(grid.y)), "list outliers: K = %d",
                args.k);
}

}  // namespace

void set_up_find_outliers(const Limits& limits) {
  if (limits.capability != 90) return;
  for (const auto kernel : {mark<float, 4>, mark<float, 1>, mark<__half, 8>, mark<__half, 1>, mark<__nv_bfloat16, 8>,
                            mark<__nv_bfloat16, 1>})
    share_memory(kernel, 0, "mark outliers");
  for (const auto kernel : {list<float>, list<__half>, list<__nv_bfloat16>}) share_memory(kernel, 0, "list outliers");
}

void launch_find_outliers(const PrepareArgs& args, const Limits& limits, cudaStream_t stream) {
  with_type(args.x_type, [&](auto x) { launch<decltype(x)>(args, limits, stream); });
}

void describe_find_outliers(const PrepareArgs& args, const Limits& limits, Explanation& to) {
  with_type(args.x_type, [&](auto x) {
    to.launch("mark outliers: columns with an element of at least %g, in %d bands of rows",
              static_cast<double>(args.spec.outlier_threshold),
              static_cast<int>(mark_grid<decltype(x)>(args, limits).y));
  });
  if (args.outliers.x)
    to.launch("list outliers, the first %d gathered by %d blocks", kOutlierColumns / outlier_pieces(args.x_type),
              list_blocks(args, limits));
  else
    to.launch("list outliers");
}

}  // namespace octolora::cuda
