// SPDX-License-Identifier: Apache-2.0
//
// h, p and the sums of the biases for W8A16 whose GEMM reads x where it is: nothing of x is written, so this is a
// product with a few columns that is bound by reading x once. What h and p are stands at the head of prepare.cu.
//
// A block has 16 rows of x, and its warps divide K: each brings pieces of 64 values of every row into shared memory of
// its own, some ahead of those that it multiplies by 16 columns of A. Sums of the warps meet in shared memory and are
// added in a fixed order.
//
// x [M,K] 16-bit, rows of whole and aligned 16 bytes. It is read again for every 16 columns of A.
#include "check.h"
#include "dependent_launch.cuh"
#include "explanation.h"
#include "prepare.cuh"

namespace octolora::cuda {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * 32;
constexpr int kRows = 16;          // of a block, one mma
constexpr int kStep = 32;          // values of K that a lane's 16 bytes of A are a quarter of
constexpr int kPiece = 2 * kStep;  // 128 bytes of a row
constexpr int kPieces = 4;         // in a warp's shared memory
constexpr int kPieceBytes = kRows * kPiece * 2;
constexpr int kSharedBytes = kWarps * kPieces * kPieceBytes;
constexpr int kMostColumns = 32;  // beyond, keeping x in shared memory pays
// p is 1 where it would be within 2^kBf16Powers of it and every adapter is bf16, whose range needs no help: the GEMM
// has less to do then.
constexpr int kBf16Powers = 60;

// Volatile: to be issued where it is written, long before its use.
__device__ __forceinline__ uint4 load_early(const uint4* from) {
  uint4 v;
  asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from));
  return v;
}

// sum += 16 columns of x.A^T, as far as this warp's part of K goes; maximum: of rows g and g + 8, two magnitudes each.
// kMixed: A is of the other 16-bit type than x.
template <bool kF16, bool kMixed>
__device__ __forceinline__ void multiply(const PrepareArgs& args, uint32_t ring, const uint4* a, uint32_t (&maximum)[2],
                                         float (&sum)[2][4]) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int steps = (args.k + kStep - 1) / kStep, pieces = (args.k + kPiece - 1) / kPiece;
  const int first = static_cast<int>(blockIdx.x) * kRows, last = args.m - 1 - first;
  // Eight lanes copy a row's 128 bytes; 16 bytes at c of row r lie at c ^ (r % 8).
  const uint16_t* const x =
      static_cast<const uint16_t*>(args.x) + static_cast<int64_t>(first + lane / 8) * args.k + lane % 8 * 8;
  const uint32_t to = ring + lane / 8 * 128;
  const auto fetch = [&](int piece, int slot) {
    if (piece < pieces) {
#pragma unroll
      for (int i = 0; i < kRows / 4; ++i) {
        const int row = i * 4 + lane / 8;
        const bool present = row <= last && piece * kPiece + lane % 8 * 8 < args.k;
        const uint16_t* const from = x + (i * 4 * args.k + piece * kPiece);
        ptx::copy_async_16(to + slot * kPieceBytes + i * 512 + ((lane % 8 ^ row % 8) * 16), present ? from : args.x,
                           present);
      }
    }
    ptx::copy_async_commit();
  };
  const auto load_a = [&](int piece, uint4(&b)[2][2]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int step = piece * 2 + i / 2;
      b[i / 2][i % 2] = {};
      if (step < steps) b[i / 2][i % 2] = load_early(a + (i % 2 * steps + step) * 32);
    }
  };
  uint4 next[2][2];
  load_a(warp, next);
  __syncwarp();
#pragma unroll
  for (int i = 0; i + 1 < kPieces; ++i) fetch(warp + i * kWarps, i);
  int slot = 0;
#pragma unroll 1
  for (int piece = warp; piece < pieces; piece += kWarps) {
    ptx::copy_async_wait<kPieces - 2>();
    __syncwarp();
    fetch(piece + (kPieces - 1) * kWarps, slot == 0 ? kPieces - 1 : slot - 1);
    uint4 b[2][2];
#pragma unroll
    for (int i = 0; i < 4; ++i) b[i / 2][i % 2] = next[i / 2][i % 2];
    load_a(piece + kWarps, next);
#pragma unroll
    for (int half = 0; half < 4; ++half) {  // of 16 values
      uint32_t x_part[4];
      const int row = lane % 16, chunk = half * 2 + lane / 16;
      ptx::load_matrix_x4(x_part, ring + slot * kPieceBytes + row * 128 + ((chunk ^ row % 8) * 16));
#pragma unroll
      for (int j = 0; j < 4; ++j) maximum[j % 2] = __vmaxu2(maximum[j % 2], x_part[j] & 0x7fff7fffu);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const uint4 both = b[half / 2][n];
        const uint32_t b0 = half % 2 ? both.z : both.x, b1 = half % 2 ? both.w : both.y;
        if constexpr (!kMixed) {
          if constexpr (kF16)
            ptx::mma_f16(sum[n], x_part, b0, b1);
          else
            ptx::mma_bf16(sum[n], x_part, b0, b1);
        } else {
          float2 v[4];
#pragma unroll
          for (int l = 0; l < 4; ++l) v[l] = decode16x2(x_part[l], kF16);
          const float2 low = decode16x2(b0, !kF16), high = decode16x2(b1, !kF16);
          const float even[4] = {v[0].x, v[1].x, v[0].y, v[1].y}, odd[4] = {v[2].x, v[3].x, v[2].y, v[3].y};
          ptx::mma_tf32(sum[n], even, low.x, low.y);
          ptx::mma_tf32(sum[n], odd, high.x, high.y);
        }
      }
    }
    slot = slot + 1 == kPieces ? 0 : slot + 1;
  }
  ptx::copy_async_wait<0>();
}

// Of the largest terms of two rows whose slots these are, INT_MIN where no adapter applies, and whether one that does
// is fp16. Four lanes share the work.
__device__ __forceinline__ void find_exponents(const PrepareArgs& args, const int (&slot)[2], int (&exponent)[2],
                                               bool (&f16)[2]) {
  exponent[0] = exponent[1] = INT_MIN;
  f16[0] = f16[1] = false;
#pragma unroll 1
  for (int m = 0; m < args.member_count; ++m) {
    const AdapterView& ad = args.member[m].adapters;
#pragma unroll 1
    for (int c = static_cast<int>(threadIdx.x) % 4; c < ad.chunk_count; c += 4) {
      const Chunk chunk = ad.chunks[c];
      const int term = term_exponent(chunk, ad.scale[chunk.slot]);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (args.row_slot && slot[i] != chunk.slot) continue;
        exponent[i] = max(exponent[i], term);
        f16[i] |= term != INT_MIN && chunk.b_f16;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    exponent[i] = max(exponent[i], __shfl_xor_sync(~0u, exponent[i], 1));
    exponent[i] = max(exponent[i], __shfl_xor_sync(~0u, exponent[i], 2));
    f16[i] |= __shfl_xor_sync(~0u, f16[i], 1);
    f16[i] |= __shfl_xor_sync(~0u, f16[i], 2);
  }
}

struct Shared {
  float sum[kWarps][2 * 4][32];
  uint32_t maximum[kWarps][2][32];
  int power[kRows];  // log2 p
};

// 16 columns of A, of all members'.
struct Columns {
  int member, chunk;
  bool split, low;  // the chunk is of a high and a low part; these are the low one
};
__device__ __forceinline__ Columns find_columns(const PrepareArgs& args, int block) {
#pragma unroll 1
  for (int m = 0; m < args.member_count; ++m) {
    const AdapterView& ad = args.member[m].adapters;
    const int blocks = ad.down_columns / kChunkRank;
    if (block < blocks) {
      const bool split = blocks > ad.chunk_count;
      return {m, split ? block / 2 : block, split, split && block % 2};
    }
    block -= blocks;
  }
  return {-1, 0, false, false};
}

__device__ __forceinline__ int slot_of(const PrepareArgs& args, int row) {
  return args.row_slot && row < args.m ? args.row_slot[row] : -1;
}

// Adds up the warps' sums of columns `block`, and stores h of them. With the first, finds and stores p.
template <bool kF16>
__device__ __forceinline__ void join(const PrepareArgs& args, Shared& shared, int block, const uint32_t (&measured)[2],
                                     const float (&sum)[2][4]) {
  const int warp = static_cast<int>(threadIdx.x) / 32, index = static_cast<int>(threadIdx.x) % 32;
  const int g = index / 4, t = index % 4;
  const int first = static_cast<int>(blockIdx.x) * kRows, last = args.m - 1 - first;  // rows of the block: 0 to last
  const Columns columns = find_columns(args, block);
  if (columns.split && !columns.low) return;
  const PrepareMember& member = args.member[columns.member];
  const AdapterView& ad = member.adapters;
  __syncthreads();  // what was there has been read
#pragma unroll
  for (int i = 0; i < 8; ++i) shared.sum[warp][i][index] = sum[i / 4][i % 4];
#pragma unroll
  for (int i = 0; i < 2; ++i) shared.maximum[warp][i][index] = measured[i];
  __syncthreads();
  if (warp) return;
  const int slot[2] = {slot_of(args, first + g), slot_of(args, first + g + 8)};
  if (block == columns.split) {  // the first of all
    int exponent[2];
    bool f16[2];
    find_exponents(args, slot, exponent, f16);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint32_t both = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) both = __vmaxu2(both, shared.maximum[w][i][index]);
      uint32_t maximum = max(both & 0xffff, both >> 16);
      maximum = max(maximum, __shfl_xor_sync(~0u, maximum, 1));
      maximum = max(maximum, __shfl_xor_sync(~0u, maximum, 2));
      const uint32_t full = magnitude_bits(decode16(static_cast<uint16_t>(maximum), kF16));
      PreparedRow prepared = prepare_row(args.spec, full, full, exponent[i]);
      if (!f16[i] && abs(prepared.power) <= kBf16Powers) {
        prepared.power = 0;
        prepared.out.power = 1.f;
      }
      if (t == 0) shared.power[g + 8 * i] = prepared.power;
      if (t == 0 && g + 8 * i <= last) args.rows[first + g + 8 * i] = prepared.out;
    }
    __syncwarp();
  }
  const Chunk& chunk = ad.chunks[columns.chunk];
  const int own = chunk.slot, ranks = chunk.ranks, exponent = chunk.exponent;
  const bool b_f16 = chunk.b_f16;
  const float scale = ad.scale[own];
  const auto total = [&](int i) {
    float value = 0.f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) value += shared.sum[w][i][index];
    return value;
  };
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = g + 8 * i;
    if (row > last) continue;
    uint16_t* const h = member.h + static_cast<int64_t>(first + row) * ad.up_columns + chunk.up + 2 * t;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      uint32_t high = 0, low = 0;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int at = n * 4 + 2 * i + j;  // of the lane's sums
        float value = total(at);
        if ((args.row_slot && slot[i] != own) || n * 8 + 2 * t + j >= ranks) continue;
        value = scalbnf(value * scale, -exponent - shared.power[row]);
        const uint16_t rounded = encode16(value, b_f16);
        high |= static_cast<uint32_t>(rounded) << 16 * j;
        low |= static_cast<uint32_t>(encode16(value - decode16(rounded, b_f16), b_f16)) << 16 * j;
      }
      *reinterpret_cast<uint32_t*>(h + n * 8) = high;
      if (columns.split) {
        *reinterpret_cast<uint32_t*>(h + kChunkRank + n * 8) = low;
        *reinterpret_cast<uint32_t*>(h + 2 * kChunkRank + n * 8) = high;
      }
    }
  }
}

template <bool kF16>
__global__ __launch_bounds__(kThreads, 3) void project_down(const __grid_constant__ PrepareArgs args) {
  extern __shared__ __align__(128) uint8_t memory[];
  __shared__ Shared shared;
  const uint32_t ring = ptx::shared_address(memory) + threadIdx.x / 32 * kPieces * kPieceBytes;
  wait_for_primaries();
  launch_dependents();
  float sum[2][4];
#pragma unroll 1
  for (int block = 0;; ++block) {
    const Columns columns = find_columns(args, block);
    if (columns.member < 0) break;
    const AdapterView& ad = args.member[columns.member].adapters;
    const int first_column = ad.chunks[columns.chunk].down + (columns.low ? kChunkRank : 0);
    const uint4* const a = ad.a + static_cast<int64_t>(first_column / 8) * ((args.k + kStep - 1) / kStep) * 32 +
                           static_cast<int>(threadIdx.x) % 32;
    if (!columns.low) {  // the low part is added to the high one
#pragma unroll
      for (int i = 0; i < 8; ++i) sum[i / 4][i % 4] = 0.f;
    }
    uint32_t measured[2] = {0, 0};
    if ((ad.chunks[columns.chunk].a_f16 != 0) == kF16)
      multiply<kF16, false>(args, ring, a, measured, sum);
    else
      multiply<kF16, true>(args, ring, a, measured, sum);
    join<kF16>(args, shared, block, measured, sum);
  }
  add_up_bias(args, static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x),
              static_cast<int>(gridDim.x) * kThreads);
}

int columns_of(const PrepareArgs& args) {
  int columns = 0;
  for (int i = 0; i < args.member_count; ++i) columns += args.member[i].adapters.down_columns;
  return columns;
}

}  // namespace

void set_up_down_projection() {
  for (const auto kernel : {project_down<false>, project_down<true>}) {
    OCTOLORA_CUDA(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                       cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes),
                  "down-projection: %d bytes of shared memory", kSharedBytes);
  }
}

bool down_projection_takes(const PrepareArgs& args) {
  const int columns = columns_of(args);
  return !args.q && !args.planes && args.x_type != Dtype::f32 && args.k % 8 == 0 &&
         reinterpret_cast<uintptr_t>(args.x) % 16 == 0 && columns > 0 && columns <= kMostColumns;
}

void launch_down_projection(const PrepareArgs& args, const Limits& limits, cudaStream_t stream) {
  const dim3 blocks(static_cast<unsigned>((args.m + kRows - 1) / kRows));
  DependentLaunch launch(limits, blocks, kThreads, 1, kSharedBytes, stream);
  const auto kernel = args.x_type == Dtype::f16 ? project_down<true> : project_down<false>;
  OCTOLORA_CUDA(cudaLaunchKernelEx(&launch.config, kernel, args), "down-projection: M = %d, K = %d", args.m, args.k);
}

void describe_down_projection(const PrepareArgs& args, Explanation& to) {
  to.launch("down-projection: %d ranks of x.A^T; %d rows a block, K divided among %d warps", columns_of(args), kRows,
            kWarps);
}

}  // namespace octolora::cuda
