// SPDX-License-Identifier: Apache-2.0
//
// prepare.cu for few rows (M <= 64) on Hopper: the same rows {s_x, p} and h, and q in the order in which decode.cu
// copies it (kernels.h), spread over enough blocks that one row is quantized and A is read in little time.
//
// Clusters of 8 blocks. In the first clusters a block quantizes a row. Each of the others has 16 ranks of a slot and 16
// rows, of which its blocks take a slice of K each: they send their sums and the maxima of the rows, from which p
// follows, to the block that scales and rounds a row, and that adds them up in a fixed order. With row_slot h is
// written, and A read, only where a row has the slot.
//
// The kernel shares the multiprocessors with the stream of weights that starts meanwhile, behind which its loads queue:
// few registers, little shared memory, all of a thread's loads on their way at once, and no fence that waits for them.
#include <algorithm>
#include <cfloat>
#include <climits>

#include "check.h"
#include "convert.cuh"
#include "dependent_launch.cuh"
#include "ptx.cuh"
#include "wgmma_narrow.cuh"

namespace octolora::cuda {
namespace {

constexpr int kThreads = 256;
[[maybe_unused]] constexpr int kWarps = kThreads / 32;
constexpr int kSlices = 8;
[[maybe_unused]] constexpr int kHeld = 4;  // vectors of a row that a thread keeps between the maximum and the codes
[[maybe_unused]] constexpr int kPowerLimit = 126;

// The exponent of the largest adapter term of a row, where x is below 1; INT_MIN for none. Thread `thread` of `threads`
// sees some of the chunks.
__device__ __forceinline__ int largest_exponent(const PrepareArgs& args, int row, int thread, int threads) {
  int exponent = INT_MIN;
  const int slot = args.row_slot ? args.row_slot[row] : -1;
#pragma unroll 1
  for (int member = 0; member < args.member_count; ++member) {
    const AdapterView& ad = args.member[member].adapters;
#pragma unroll 1
    for (int i = thread; i < ad.chunk_count; i += threads) {
      const Chunk& chunk = ad.chunks[i];
      const float scale = ad.scale[chunk.slot];
      if (chunk.ranks && scale != 0 && (!args.row_slot || slot == chunk.slot))
        exponent = max(exponent, ilogbf(scale) + 1 + chunk.range);
    }
  }
  return exponent;
}

// log2 p of a row: brings its largest term near the middle of fp16.
__device__ __forceinline__ int power_of_row(int exponent, float largest) {
  if (exponent == INT_MIN) return 0;
  const uint32_t bits = magnitude_bits(largest);
  const int power = exponent + 1 + (bits && bits < kInfinityBits ? static_cast<int>(bits >> 23) - 127 : 0);
  return max(-kPowerLimit, min(kPowerLimit, power));
}

// Magnitudes order like integers, in 16 bits as in 32.
__device__ __forceinline__ uint32_t magnitudes(const uint4& v) {
  return __vmaxu2(__vmaxu2(v.x & 0x7fff7fffu, v.y & 0x7fff7fffu), __vmaxu2(v.z & 0x7fff7fffu, v.w & 0x7fff7fffu));
}

template <class X>
__device__ __forceinline__ void quantize_row(const PrepareArgs& args, int row) {
  __shared__ uint32_t maxima[kWarps];
  constexpr bool kF16 = std::is_same_v<X, __half>;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const uint4* const x =
      reinterpret_cast<const uint4*>(static_cast<const X*>(args.x) + static_cast<int64_t>(row) * args.k);
  const int count = args.k / 8, padded = args.k_pitch / 8;
  const auto load = [&](int at) { return at < count ? __ldcg(x + at) : uint4{0, 0, 0, 0}; };

  uint4 held[kHeld];
#pragma unroll
  for (int i = 0; i < kHeld; ++i) held[i] = load(static_cast<int>(threadIdx.x) + i * kThreads);

  int exponent = INT_MIN;
  if (warp == 0) exponent = __reduce_max_sync(~0u, largest_exponent(args, row, lane, 32));

  uint32_t full = 0;
  const auto measure = [&](const uint4& v) { full = __vmaxu2(full, magnitudes(v)); };
#pragma unroll
  for (int i = 0; i < kHeld; ++i) measure(held[i]);
#pragma unroll 4
  for (int at = static_cast<int>(threadIdx.x) + kHeld * kThreads; at < count; at += kThreads) measure(load(at));
  full = __reduce_max_sync(~0u, max(full & 0xffffu, full >> 16));
  if (lane == 0) maxima[warp] = full;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kWarps; ++i) full = max(full, maxima[i]);

  const float largest = decode16(static_cast<uint16_t>(full), kF16);
  const float measured = args.spec.round_x_to_f16 ? round_to_f16(largest) : largest;  // rounding keeps the order
  const bool finite = magnitude_bits(largest) < kInfinityBits;
  float scale = 1.f, factor = 0.f;
  if (args.spec.mode == Mode::dynamic) {
    scale = __fdiv_rn(measured, args.spec.x_divisor);
    factor = measured > 0 ? __fdiv_rn(args.spec.x_divisor, measured) : 0.f;
    if (magnitude_bits(largest) > kInfinityBits) scale = largest;  // NaN
  } else if (args.spec.mode == Mode::fixed) {
    scale = finite ? args.spec.x_scale : __uint_as_float(0x7fc00000u);
  }
  if (threadIdx.x == 0) {
    args.rows[row] = {scale, scalbnf(1.f, power_of_row(exponent, largest))};
  }
  if (args.spec.mode == Mode::w8a16) return;

  // Eight codes each, see kernels.h.
  uint2* const q = reinterpret_cast<uint2*>(args.q) + row * 16;
  const int block_pitch = decode_tokens(args.m) * 16, turn = row % 8 * 2;
  const auto encode = [&](const uint4& v, int at, auto&& code) {
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
    uint32_t codes[8];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 both = decode16x2(words[i], kF16);
      codes[2 * i] = code(both.x);
      codes[2 * i + 1] = code(both.y);
    }
    q[at / 16 * block_pitch + (at % 16 ^ turn)] = {ptx::pack_bytes(codes[0], codes[1], codes[2], codes[3]),
                                                   ptx::pack_bytes(codes[4], codes[5], codes[6], codes[7])};
  };
  if (args.spec.mode == Mode::dynamic && args.spec.x_divisor <= 127.f && factor <= FLT_MAX &&
      !args.spec.round_x_to_f16) {
    // |value * factor| stays below 127.5: 1.5 * 2^23 rounds it to nearest even and leaves it in the low byte.
    const auto code = [&](float v) { return __float_as_uint(__fadd_rn(__fmul_rn(v, factor), 12582912.f)); };
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int at = static_cast<int>(threadIdx.x) + i * kThreads;
      if (at < padded) encode(held[i], at, code);
    }
#pragma unroll 2
    for (int at = static_cast<int>(threadIdx.x) + kHeld * kThreads; at < padded; at += kThreads)
      encode(load(at), at, code);
  } else {
#pragma unroll 1
    for (int at = static_cast<int>(threadIdx.x); at < padded; at += kThreads) {
      encode(load(at), at, [&](float v) {
        if (args.spec.round_x_to_f16) v = round_to_f16(v);
        return ptx::round_to_s8(args.spec.mode == Mode::dynamic ? __fmul_rn(v, factor)
                                                                : __fdiv_rn(v, args.spec.x_scale));
      });
    }
  }
}

// 4x4 words across the four lanes of a quad: word j of lane t becomes word t of lane j.
[[maybe_unused]] __device__ __forceinline__ uint4 transpose_quad(uint4 v, int t) {
  const bool odd = t & 1, high = t & 2;
  const uint32_t s0 = __shfl_xor_sync(~0u, odd ? v.x : v.y, 1), s1 = __shfl_xor_sync(~0u, odd ? v.z : v.w, 1);
  if (odd) {
    v.x = s0, v.z = s1;
  } else {
    v.y = s0, v.w = s1;
  }
  const uint32_t u0 = __shfl_xor_sync(~0u, high ? v.x : v.z, 2), u1 = __shfl_xor_sync(~0u, high ? v.y : v.w, 2);
  if (high) {
    v.x = u0, v.y = u1;
  } else {
    v.z = u0, v.w = u1;
  }
  return v;
}

// 16 ranks of a slot for up to 16 rows: a cluster has all of K, so it also knows what h is scaled by.
template <class X, int kRows>
__device__ __forceinline__ void project_down(const PrepareArgs& args, int cluster) {
  // Steps whose operands are on their way at a time: with many rows this kernel shares the registers with more of them.
  constexpr int kBatch = kRows <= 8 ? 4 : kRows <= 16 ? 3 : 2, kHalves = kRows <= 8 ? 1 : 2;
  constexpr bool kF16 = std::is_same_v<X, __half>;
  constexpr int kOwn = 256 / kSlices;  // sums that a block finishes
  __shared__ float partial[kWarps][256];
  __shared__ uint32_t maxima[kWarps][16];
  __shared__ float given[kSlices][kOwn];  // by the blocks of the cluster
  __shared__ uint32_t given_maxima[kSlices][kOwn / 16];
  __shared__ uint64_t all_given;
  const uint32_t given_barrier = ptx::shared_address(&all_given);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
  const int rank = static_cast<int>(ptx::cluster_rank());

  const int row_tiles = (args.m + 15) / 16, first_row = cluster % row_tiles * 16;
  int index = cluster / row_tiles, member = 0;
  while (index >= args.member[member].adapters.chunk_count) index -= args.member[member++].adapters.chunk_count;
  const AdapterView& ad = args.member[member].adapters;
  const int columns = ad.down_columns / ad.chunk_count;  // 16, or 32 with high and low parts

  const int steps = (args.k + 31) / 32, each = (steps + kSlices - 1) / kSlices;
  const int first = rank * each, last = min(steps, first + each);
  const uint4* const a = ad.a + static_cast<int64_t>(index) * (columns / 8) * steps * 32;
  const X* const x = static_cast<const X*>(args.x) + static_cast<int64_t>(first_row + g) * args.k;
  uint4 xs[kBatch][kHalves], as[kBatch][2];
  const auto load_a = [&](int base, int half) {
#pragma unroll
    for (int i = 0; i < kBatch * 2; ++i) {
      const int step = base + i / 2 * kWarps;
      as[i / 2][i % 2] = step < last ? __ldcg(a + (static_cast<int64_t>(half * 2 + i % 2) * steps + step) * 32 + lane)
                                     : uint4{0, 0, 0, 0};
    }
  };
  const auto load_x = [&](int base) {
#pragma unroll
    for (int i = 0; i < kBatch * kHalves; ++i) {
      const int step = base + i / kHalves * kWarps, column = step * 32 + t * 8, row = i % kHalves * 8;
      const bool present = step < last && first_row + g + row < args.m && column < args.k;
      xs[i / kHalves][i % kHalves] =
          present ? __ldcg(reinterpret_cast<const uint4*>(x + static_cast<int64_t>(row) * args.k + column))
                  : uint4{0, 0, 0, 0};
    }
  };
  // A is there: the kernels that write it are launched like any others, let nothing start before they end, and end with
  // a fence. So what is read first is read before the memory is busy with the weights, the rest brought into L2; a step
  // is 512 bytes of 8 columns.
  if (!args.row_slot) {
    load_a(first + warp, 0);
    for (int i = thread; i < (last - first) * columns / 2; i += kThreads) {
      ptx::prefetch_l2(a + (static_cast<int64_t>(i / 4 % (columns / 8)) * steps + first + i / (columns / 2)) * 32 +
                       i % 4 * 8);
    }
  }
  if (thread == 0) {
    ptx::barrier_init(given_barrier, 1);
    ptx::barrier_init_fence();
    ptx::barrier_expect_bytes(given_barrier, sizeof given + sizeof given_maxima);
  }
  __syncwarp();
  ptx::cluster_arrive_relaxed();
  ptx::wait_for_primaries();
  const Chunk chunk = ad.chunks[index];  // all of it, before the memory is busy
  if (args.row_slot) {
    // What no row asks for is not read either.
    const int m = first_row + lane;
    const bool asked = lane < 16 && m < args.m && args.row_slot[m] == chunk.slot;
    if (!__any_sync(~0u, asked)) {
      ptx::cluster_wait();
      return;
    }
    load_a(first + warp, 0);
  }
  load_x(first + warp);
  // Half a warp finishes a row. What its largest term is hangs on nothing but the scales.
  const int m = first_row + rank * (kOwn / 16) + thread / 16, r = thread % 16;
  const bool finishes = thread < kOwn && m < args.m;
  int exponent = INT_MIN;
  if (thread < kOwn) {
    if (finishes) exponent = largest_exponent(args, m, r, 16);
#pragma unroll
    for (int i = 8; i > 0; i /= 2) exponent = max(exponent, __shfl_xor_sync(~0u, exponent, i));
  }
  const float scale = ad.scale[chunk.slot];

  float sum[2][4] = {};
  uint32_t largest[2] = {};
  const bool f16 = chunk.a_f16;
  bool loaded = true;
#pragma unroll 1
  for (int half = 0; half < columns / 16; ++half) {  // the low parts join the high ones
#pragma unroll 1
    for (int base = first + warp; base < last; base += kWarps * kBatch) {
      if (!loaded) load_a(base, half), load_x(base);
      loaded = false;
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
#pragma unroll
        for (int j = 0; j < kHalves; ++j) largest[j] = __vmaxu2(largest[j], magnitudes(xs[i][j]));
        const uint4 low = transpose_quad(xs[i][0], t);
        const uint4 high = kHalves == 2 ? transpose_quad(xs[i][kHalves - 1], t) : uint4{0, 0, 0, 0};
        const uint32_t fragment[2][4] = {{low.x, high.x, low.y, high.y}, {low.z, high.z, low.w, high.w}};
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const uint32_t b[4] = {as[i][j].x, as[i][j].y, as[i][j].z, as[i][j].w};
#pragma unroll
          for (int part = 0; part < 2; ++part) {
            if (f16 != kF16) {
              float2 v[4];
#pragma unroll
              for (int c = 0; c < 4; ++c) v[c] = decode16x2(fragment[part][c], kF16);
              const float2 b_low = decode16x2(b[2 * part], f16), b_high = decode16x2(b[2 * part + 1], f16);
              const float one[4] = {v[0].x, v[1].x, v[0].y, v[1].y}, two[4] = {v[2].x, v[3].x, v[2].y, v[3].y};
              ptx::mma_tf32(sum[j], one, b_low.x, b_low.y);
              ptx::mma_tf32(sum[j], two, b_high.x, b_high.y);
            } else if constexpr (kF16) {
              ptx::mma_f16(sum[j], fragment[part], b[2 * part], b[2 * part + 1]);
            } else {
              ptx::mma_bf16(sum[j], fragment[part], b[2 * part], b[2 * part + 1]);
            }
          }
        }
      }
    }
  }

#pragma unroll
  for (int j = 0; j < 2; ++j) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      *reinterpret_cast<float2*>(&partial[warp][(g + c * 8) * 16 + j * 8 + 2 * t]) = {sum[j][2 * c], sum[j][2 * c + 1]};
    }
    uint32_t full = max(largest[j] & 0xffffu, largest[j] >> 16);
    full = max(full, __shfl_xor_sync(~0u, full, 1));
    full = max(full, __shfl_xor_sync(~0u, full, 2));
    if (t == 0) maxima[warp][g + j * 8] = full;
  }
  ptx::cluster_wait();  // all blocks have started
  __syncthreads();
  float value = 0.f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) value += partial[w][thread];
  ptx::store_async_cluster(ptx::shared_address(&given[rank][thread % kOwn]), given_barrier, thread / kOwn,
                           __float_as_uint(value));
  uint32_t full = 0;
  if (thread < 16) {
#pragma unroll
    for (int w = 0; w < kWarps; ++w) full = max(full, maxima[w][thread]);
    ptx::store_async_cluster(ptx::shared_address(&given_maxima[rank][thread % (kOwn / 16)]), given_barrier,
                             thread / (kOwn / 16), full);
  }
  if (thread >= kOwn) return;
  ptx::barrier_wait(given_barrier, 0);
  if (!finishes || (args.row_slot && args.row_slot[m] != chunk.slot)) return;
  value = 0.f;
  full = 0;
#pragma unroll
  for (int s = 0; s < kSlices; ++s) {
    value += given[s][thread];
    full = max(full, given_maxima[s][thread / 16]);
  }
  const int power = power_of_row(exponent, decode16(static_cast<uint16_t>(full), kF16));
  const bool present = r < chunk.ranks;
  const float v = present ? scalbnf(value * scale, -chunk.exponent - power) : 0.f;
  uint16_t* const h = args.member[member].h + static_cast<int64_t>(m) * ad.up_columns + chunk.up + r;
  const uint16_t high = encode16(v, chunk.b_f16);
  h[0] = high;
  if (chunk.split) {
    h[kChunkRank] = present ? encode16(v - decode16(high, chunk.b_f16), chunk.b_f16) : 0;
    h[2 * kChunkRank] = high;
  }
}

// Registers: what decode.cu leaves of a multiprocessor's, see there.
template <class X, int kRows>
__global__ __maxnreg__(kRows <= 16 ? 96 : 88) void prepare_few(const __grid_constant__ PrepareArgs args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  ptx::launch_dependents();
  const int row = static_cast<int>(blockIdx.x), row_blocks = (args.m + kSlices - 1) / kSlices * kSlices;
  if (row >= row_blocks) {
    project_down<X, kRows>(args, (row - row_blocks) / kSlices);
  } else {
    ptx::wait_for_primaries();
    if (row < args.m) quantize_row<X>(args, row);
  }
#endif
}

}  // namespace

void launch_prepare_few(const PrepareArgs& args, cudaStream_t stream) {
  const int row_tiles = (args.m + 15) / 16;
  int chunks = 0;
  for (int i = 0; i < args.member_count; ++i) chunks += args.member[i].adapters.chunk_count;
  const DependentLaunch launch(round_up(args.m, kSlices) + chunks * row_tiles * kSlices, kThreads, kSlices, 0, stream);
  const auto kernel = [&](auto x) {
    using X = decltype(x);
    return args.m <= 8 ? prepare_few<X, 8> : args.m <= 16 ? prepare_few<X, 16> : prepare_few<X, kDecodeRows>;
  };
  OCTOLORA_CUDA(
      cudaLaunchKernelEx(&launch.config, args.x_type == Dtype::f16 ? kernel(__half()) : kernel(__nv_bfloat16()), args),
      "prepare for few rows: M = %d, K = %d, %d times 16 ranks", args.m, args.k, chunks);
}

void describe_prepare_few(const PrepareArgs& args, Explanation& to) {
  int columns = 0;
  for (int i = 0; i < args.member_count; ++i) columns += args.member[i].adapters.down_columns;
  to.launch("prepare for few rows: %s%d ranks of x.A^T, 16 of them and 16 rows for a cluster of %d",
            args.q ? "quantizes x, " : "", columns, kSlices);
}

}  // namespace octolora::cuda
