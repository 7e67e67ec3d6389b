// SPDX-License-Identifier: Apache-2.0
//
// prepare.cu for few rows (M <= 64) on Hopper: the same q, rows {s_x, p} and x.A^T, spread over enough blocks that one
// row is quantized and A is read in little time.
//
//   down [parts][M][down_columns] fp32: x.A^T over each of decode_parts(K) pieces of K, before any scale; decode.cu
//   adds them up, scales and rounds
//
// Clusters of 8 blocks. In the first clusters a block quantizes a row; each of the others has 16 columns of a and a
// piece of K, of which its blocks take a slice each, and adds up through distributed shared memory in a fixed order.
//
// The kernel shares the multiprocessors with the stream of weights that starts meanwhile: few registers, little shared
// memory, and what is run once is kept short, since its instructions come from memory too.
#include <algorithm>
#include <cfloat>
#include <climits>

#include "check.h"
#include "convert.cuh"
#include "dependent_launch.cuh"
#include "kernels.h"
#include "ptx.cuh"

namespace octolora::cuda {
namespace {

constexpr int kThreads = 256;
[[maybe_unused]] constexpr int kWarps = kThreads / 32;
constexpr int kSlices = 8;
[[maybe_unused]] constexpr int kHeld = 4;  // vectors of a row that a thread keeps between the maximum and the codes
[[maybe_unused]] constexpr int kPowerLimit = 126;

struct Pieces {
  int parts;
  int row_clusters;
};

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

  // The exponent that brings the largest adapter term near the middle of fp16, where x is below 1.
  int exponent = INT_MIN;
  if (warp == 0) {
    const int slot = args.row_slot ? args.row_slot[row] : -1;
    for (int member = 0; member < args.member_count; ++member) {
      const AdapterView& ad = args.member[member].adapters;
      for (int i = lane; i < ad.chunk_count; i += 32) {
        const Chunk& chunk = ad.chunks[i];
        const float scale = ad.scale[chunk.slot];
        if (chunk.ranks && scale != 0 && (!args.row_slot || slot == chunk.slot))
          exponent = max(exponent, ilogbf(scale) + 1 + chunk.range);
      }
    }
    exponent = __reduce_max_sync(~0u, exponent);
  }

  // Magnitudes order like integers, in 16 bits as in 32.
  uint32_t full = 0;
  const auto measure = [&](const uint4& v) {
    full = __vmaxu2(
        full, __vmaxu2(__vmaxu2(v.x & 0x7fff7fffu, v.y & 0x7fff7fffu), __vmaxu2(v.z & 0x7fff7fffu, v.w & 0x7fff7fffu)));
  };
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
    int power = 0;
    if (exponent != INT_MIN) {
      power = exponent + 1 + (finite && full ? static_cast<int>(magnitude_bits(largest) >> 23) - 127 : 0);
      power = max(-kPowerLimit, min(kPowerLimit, power));
    }
    args.rows[row] = {scale, scalbnf(1.f, power)};
  }
  if (args.spec.mode == Mode::w8a16) return;

  uint2* const q = reinterpret_cast<uint2*>(args.q + static_cast<int64_t>(row) * args.k_pitch);
  const auto encode = [&](const uint4& v, int at, auto&& code) {
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
    uint32_t codes[8];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 both = decode16x2(words[i], kF16);
      codes[2 * i] = code(both.x);
      codes[2 * i + 1] = code(both.y);
    }
    q[at] = {ptx::pack_bytes(codes[0], codes[1], codes[2], codes[3]),
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

template <class X>
__device__ __forceinline__ void project_down(const PrepareArgs& args, const Pieces& pieces, int cluster) {
  __shared__ float warps[kWarps][256];
  __shared__ float block[kDecodeRows / 16][256];
  constexpr bool kF16 = std::is_same_v<X, __half>;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int g = lane / 4, t = lane % 4;
  const int rank = static_cast<int>(ptx::cluster_rank());

  int group = cluster / pieces.parts, member = 0;
  const int part = cluster % pieces.parts;
  while (group >= args.member[member].adapters.down_columns / 16) {
    group -= args.member[member].adapters.down_columns / 16;
    ++member;
  }
  const AdapterView& ad = args.member[member].adapters;

  const int steps = (args.k + 31) / 32, slices = kSlices * pieces.parts;
  const int each = (steps + slices - 1) / slices;
  const int first = (part * kSlices + rank) * each, last = min(steps, first + each);
  const int tiles = args.m <= 16 ? 1 : args.m <= 32 ? 2 : 4, strides = kWarps / tiles;
  const int tile = warp % tiles;
  const uint4* const a = ad.a + static_cast<int64_t>(group) * 2 * steps * 32;

  // A step is 512 bytes of 8 columns.
  for (int i = static_cast<int>(threadIdx.x); i < (last - first) * 8; i += kThreads)
    prefetch_l2(a + (static_cast<int64_t>(i % 2) * steps + first) * 32 + i / 2 * 8);
  wait_for_primaries();

  const bool f16 = ad.chunks[group * 16 / (ad.down_columns / ad.chunk_count)].a_f16;
  const int row[2] = {tile * 16 + g, tile * 16 + g + 8};
  const X* const x = static_cast<const X*>(args.x);
  float sum[2][4] = {};
  const auto multiply = [&](auto batch, auto&& mma) {
    constexpr int kBatch = decltype(batch)::value;  // steps whose operands are on their way at a time
#pragma unroll 1
    for (int base = first + warp / tiles; base < last; base += strides * kBatch) {
      uint4 xs[kBatch][2], as[kBatch][2];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int step = base + i * strides, column = step * 32 + t * 8;
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const bool present = step < last && row[j] < args.m && column < args.k;
          xs[i][j] = present
                         ? __ldcg(reinterpret_cast<const uint4*>(x + static_cast<int64_t>(row[j]) * args.k + column))
                         : uint4{0, 0, 0, 0};
          as[i][j] = step < last ? __ldcg(a + (static_cast<int64_t>(j) * steps + step) * 32 + lane) : uint4{0, 0, 0, 0};
        }
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const uint4 low = transpose_quad(xs[i][0], t), high = transpose_quad(xs[i][1], t);
        const uint32_t fragment[2][4] = {{low.x, high.x, low.y, high.y}, {low.z, high.z, low.w, high.w}};
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          mma(sum[j], fragment[0], as[i][j].x, as[i][j].y);
          mma(sum[j], fragment[1], as[i][j].z, as[i][j].w);
        }
      }
    }
  };
  if (f16 == kF16) {
    multiply(std::integral_constant<int, 2>(), [](float(&c)[4], const uint32_t(&x4)[4], uint32_t b0, uint32_t b1) {
      if constexpr (kF16)
        ptx::mma_f16(c, x4, b0, b1);
      else
        ptx::mma_bf16(c, x4, b0, b1);
    });
  } else {
    multiply(std::integral_constant<int, 1>(), [&](float(&c)[4], const uint32_t(&x4)[4], uint32_t b0, uint32_t b1) {
      float2 v[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) v[i] = decode16x2(x4[i], kF16);
      const float2 low = decode16x2(b0, f16), high = decode16x2(b1, f16);
      const float one[4] = {v[0].x, v[1].x, v[0].y, v[1].y}, two[4] = {v[2].x, v[3].x, v[2].y, v[3].y};
      ptx::mma_tf32(c, one, low.x, low.y);
      ptx::mma_tf32(c, two, high.x, high.y);
    });
  }
#pragma unroll
  for (int j = 0; j < 2; ++j) {
#pragma unroll
    for (int c = 0; c < 4; ++c) warps[warp][(g + c / 2 * 8) * 16 + j * 8 + 2 * t + c % 2] = sum[j][c];
  }
  __syncthreads();
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < tiles * 256; i += kThreads) {
    float value = 0.f;
#pragma unroll 2
    for (int s = 0; s < strides; ++s) value += warps[s * tiles + i / 256][i % 256];
    block[i / 256][i % 256] = value;
  }
  ptx::cluster_sync();
  const int share = tiles * 256 / kSlices;
  if (static_cast<int>(threadIdx.x) < share) {
    const int i = rank * share + static_cast<int>(threadIdx.x), m = i / 16;
    float value = 0.f;
#pragma unroll
    for (int s = 0; s < kSlices; ++s)
      value += __uint_as_float(ptx::load_cluster_u32(ptx::shared_address(&block[i / 256][i % 256]), s));
    if (m < args.m)
      args.member[member].down[(static_cast<int64_t>(part) * args.m + m) * ad.down_columns + group * 16 + i % 16] =
          value;
  }
  ptx::cluster_sync();  // a block's shared memory outlives the reads of its peers
}

template <class X>
__global__ __launch_bounds__(kThreads, 3) void prepare_few(const __grid_constant__ PrepareArgs args,
                                                           const __grid_constant__ Pieces pieces) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  launch_dependents();
  const int cluster = static_cast<int>(blockIdx.x) / kSlices, row = static_cast<int>(blockIdx.x);
  if (cluster >= pieces.row_clusters) {
    project_down<X>(args, pieces, cluster - pieces.row_clusters);
  } else {
    wait_for_primaries();
    if (row < args.m) quantize_row<X>(args, row);
  }
#endif
}

}  // namespace

int decode_parts(int k) { return std::min(8, (k + 4095) / 4096); }

void launch_prepare_few(const PrepareArgs& args, cudaStream_t stream) {
  const Pieces pieces = {decode_parts(args.k), (args.m + kSlices - 1) / kSlices};
  int groups = 0;
  for (int i = 0; i < args.member_count; ++i) groups += args.member[i].adapters.down_columns / 16;
  const DependentLaunch launch((pieces.row_clusters + groups * pieces.parts) * kSlices, kThreads, kSlices, 0, stream);
  OCTOLORA_CUDA(
      cudaLaunchKernelEx(&launch.config, args.x_type == Dtype::f16 ? prepare_few<__half> : prepare_few<__nv_bfloat16>,
                         args, pieces),
      "prepare for few rows: M = %d, K = %d, %d groups of 16 ranks", args.m, args.k, groups);
}

void describe_prepare_few(const PrepareArgs& args, Explanation& to) {
  int columns = 0;
  for (int i = 0; i < args.member_count; ++i) columns += args.member[i].adapters.down_columns;
  to.launch("prepare for few rows: %s%d ranks of x.A^T, 16 for a cluster of %d; %d pieces of K",
            args.q ? "quantizes x, " : "", columns, kSlices, decode_parts(args.k));
}

}  // namespace octolora::cuda
