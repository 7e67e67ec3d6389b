// SPDX-License-Identifier: Apache-2.0
//
// Few tokens (M <= 64) on Hopper: the weights are read once, at the speed of memory, and everything else hides behind
// that stream.
//
//   q, s_x    as in prepare.cu                 down [parts][M][R] fp32, pieces of x.A^T        (first kernel)
//   y[m,n]  = p[m] * ( s_w[n] * (s_x[m] / p[m]) * sum_k q[m,k] W[n,k] + sum_r h[m,r] B[n,r] ) + bias[n]
//             h = the sum of the pieces, scaled and rounded as in prepare.cu                  (second kernel)
//
// The second kernel is a programmatic dependent of the first: it fills its shared memory with weights, which do not
// hang on the first, while that one still runs. The roles of the operands are swapped: weights are the 64 rows of a
// wgmma, tokens its 8 to 64 columns. A block has up to 256 rows of W and a share of K; the blocks of a cluster have the
// same rows and the other shares, and add up through distributed shared memory in a fixed order. A warp then has 16
// rows as mma fragments, takes the low-rank update onto them and stores.
//
// A stage is 128 values of K: 128 bytes of each row of W and 128 (W8A8) or 256 (W8A16) bytes of each token.
#include <cuda.h>

#include <algorithm>
#include <cfloat>
#include <climits>
#include <cstring>

#include "check.h"
#include "convert.cuh"
#include "epilogue.cuh"
#include "kernels.h"
#include "ptx.cuh"
#include "wgmma_narrow.cuh"

namespace octolora::cuda {

DecodeTuning decode_tuning;

namespace {

constexpr int kMaxTokens = kDecodeRows;
constexpr int kBlockK = 128;

__device__ __forceinline__ void launch_dependents() { asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory"); }
__device__ __forceinline__ void wait_for_primaries() { asm volatile("griddepcontrol.wait;\n" ::: "memory"); }

// ---- First kernel: rows quantized, x projected down ------------------------------------------------------------------
//
// Clusters of kSlices blocks. In the first clusters a block quantizes a row; in the others the cluster has 16 columns of
// a and one of `parts` pieces of K, of which each block takes a slice. It uses little shared memory and few registers,
// so that a block of the second kernel fits beside it on a multiprocessor.

constexpr int kPrepareThreads = 256, kPrepareWarps = kPrepareThreads / 32;
constexpr int kSlices = 8;
constexpr int kHeld = 6;  // vectors of a row that a thread keeps between the maximum and the codes
constexpr int kPowerLimit = 126;

struct DownArgs {
  int parts;
  int row_clusters;
};

template <class X>
__device__ __forceinline__ void quantize_row(const PrepareArgs& args, int row) {
  __shared__ uint32_t maxima[kPrepareWarps];
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const X* const x = static_cast<const X*>(args.x) + static_cast<int64_t>(row) * args.k;
  const uint4* const vectors = reinterpret_cast<const uint4*>(x);
  const int count = args.k / 8, padded = args.k_pitch / 8;
  const bool round = args.spec.round_x_to_f16;
  constexpr bool kF16 = std::is_same_v<X, __half>;

  // Magnitudes order like integers, in 16 bits as in 32.
  uint32_t full = 0;
  uint4 held[kHeld];
  const auto measure = [&](const uint4& v) {
    full = __vmaxu2(full, __vmaxu2(__vmaxu2(v.x & 0x7fff7fffu, v.y & 0x7fff7fffu),
                                   __vmaxu2(v.z & 0x7fff7fffu, v.w & 0x7fff7fffu)));
  };
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int at = static_cast<int>(threadIdx.x) + i * kPrepareThreads;
    held[i] = at < count ? __ldg(vectors + at) : uint4{0, 0, 0, 0};
  }
#pragma unroll
  for (int i = 0; i < kHeld; ++i) measure(held[i]);
#pragma unroll 4
  for (int at = static_cast<int>(threadIdx.x) + kHeld * kPrepareThreads; at < count; at += kPrepareThreads) {
    measure(__ldg(vectors + at));
  }
  full = __reduce_max_sync(~0u, max(full & 0xffffu, full >> 16));
  if (lane == 0) maxima[warp] = full;

  // The exponent that brings the largest adapter term near the middle of fp16, where x is below 1.
  int exponent = INT_MIN;
  for (int member = 0; member < args.member_count; ++member) {
    const AdapterView& ad = args.member[member].adapters;
    for (int i = lane; i < ad.chunk_count; i += 32) {
      const Chunk& chunk = ad.chunks[i];
      const float scale = ad.scale[chunk.slot];
      if (chunk.ranks && scale != 0 && (!args.row_slot || args.row_slot[row] == chunk.slot))
        exponent = max(exponent, ilogbf(scale) + 1 + chunk.range);
    }
  }
  exponent = __reduce_max_sync(~0u, exponent);
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kPrepareWarps; ++i) full = max(full, maxima[i]);

  const float largest = decode16(static_cast<uint16_t>(full), kF16);
  const float measured = round ? round_to_f16(largest) : largest;  // rounding is monotonic
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

  // |value * factor| stays below 127.5 with these: 1.5 * 2^23 rounds it to nearest even and leaves it in the low byte.
  const bool by_addition = args.spec.mode == Mode::dynamic && args.spec.x_divisor <= 127.f && factor <= FLT_MAX;
  uint2* const q = reinterpret_cast<uint2*>(args.q + static_cast<int64_t>(row) * args.k_pitch);
  const auto encode = [&](const uint4& v, int at) {
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
    uint32_t code[8];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float2 both = decode16x2(words[i], kF16);
      if (round) both = {round_to_f16(both.x), round_to_f16(both.y)};
      if (by_addition) {
        code[2 * i] = __float_as_uint(__fadd_rn(__fmul_rn(both.x, factor), 12582912.f));
        code[2 * i + 1] = __float_as_uint(__fadd_rn(__fmul_rn(both.y, factor), 12582912.f));
      } else if (args.spec.mode == Mode::dynamic) {
        code[2 * i] = ptx::round_to_s8(__fmul_rn(both.x, factor));
        code[2 * i + 1] = ptx::round_to_s8(__fmul_rn(both.y, factor));
      } else {
        code[2 * i] = ptx::round_to_s8(__fdiv_rn(both.x, args.spec.x_scale));
        code[2 * i + 1] = ptx::round_to_s8(__fdiv_rn(both.y, args.spec.x_scale));
      }
    }
    q[at] = {ptx::pack_bytes(code[0], code[1], code[2], code[3]), ptx::pack_bytes(code[4], code[5], code[6], code[7])};
  };
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int at = static_cast<int>(threadIdx.x) + i * kPrepareThreads;
    if (at < padded) encode(held[i], at);
  }
#pragma unroll 2
  for (int at = static_cast<int>(threadIdx.x) + kHeld * kPrepareThreads; at < padded; at += kPrepareThreads) {
    encode(at < count ? __ldg(vectors + at) : uint4{0, 0, 0, 0}, at);
  }
}

// 4x4 words across the four lanes of a quad: word j of lane t becomes word t of lane j.
__device__ __forceinline__ uint4 transpose_quad(uint4 v, int t) {
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
__device__ __forceinline__ void project_down(const PrepareArgs& args, const DownArgs& down, int cluster) {
  __shared__ float warps[kPrepareWarps][256];
  __shared__ float block[kMaxTokens / 16][256];
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int g = lane / 4, t = lane % 4;
  const int rank = static_cast<int>(ptx::cluster_rank());
  constexpr bool kF16 = std::is_same_v<X, __half>;

  int group = cluster / down.parts, member = 0;
  const int part = cluster % down.parts;
  while (group >= args.member[member].adapters.down_columns / 16) {
    group -= args.member[member].adapters.down_columns / 16;
    ++member;
  }
  const AdapterView& ad = args.member[member].adapters;
  const bool f16 = ad.chunks[group * 16 / (ad.down_columns / ad.chunk_count)].a_f16;

  const int steps = (args.k + 31) / 32, slices = kSlices * down.parts;
  const int each = (steps + slices - 1) / slices;
  const int first = (part * kSlices + rank) * each, last = min(steps, first + each);
  const int tiles = args.m <= 16 ? 1 : args.m <= 32 ? 2 : 4, strides = kPrepareWarps / tiles;
  const int tile = warp % tiles;
  const int row[2] = {tile * 16 + g, tile * 16 + g + 8};
  const X* const x = static_cast<const X*>(args.x);
  const uint4* const a = ad.a + static_cast<int64_t>(group) * 2 * steps * 32 + lane;

  float sum[2][4] = {};
  constexpr int kBatch = 2;  // steps whose operands are on their way at a time
  for (int base = first + warp / tiles; base < last; base += strides * kBatch) {
    uint4 xs[kBatch][2], as[kBatch][2];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int step = base + i * strides;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int column = step * 32 + t * 8;
        const bool present = step < last && row[j] < args.m && column < args.k;
        xs[i][j] = present ? __ldg(reinterpret_cast<const uint4*>(x + static_cast<int64_t>(row[j]) * args.k + column))
                           : uint4{0, 0, 0, 0};
        as[i][j] = step < last ? __ldg(a + (static_cast<int64_t>(j) * steps + step) * 32) : uint4{0, 0, 0, 0};
      }
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const uint4 low = transpose_quad(xs[i][0], t), high = transpose_quad(xs[i][1], t);
      const uint32_t fragment[2][4] = {{low.x, high.x, low.y, high.y}, {low.z, high.z, low.w, high.w}};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const uint32_t b0 = half ? as[i][j].z : as[i][j].x, b1 = half ? as[i][j].w : as[i][j].y;
          if (f16 == kF16) {
            if constexpr (kF16)
              ptx::mma_f16(sum[j], fragment[half], b0, b1);
            else
              ptx::mma_bf16(sum[j], fragment[half], b0, b1);
          } else {
            float2 v[4];
#pragma unroll
            for (int c = 0; c < 4; ++c) v[c] = decode16x2(fragment[half][c], kF16);
            const float2 r0 = decode16x2(b0, f16), r1 = decode16x2(b1, f16);
            const float one[4] = {v[0].x, v[1].x, v[0].y, v[1].y}, two[4] = {v[2].x, v[3].x, v[2].y, v[3].y};
            ptx::mma_tf32(sum[j], one, r0.x, r0.y);
            ptx::mma_tf32(sum[j], two, r1.x, r1.y);
          }
        }
      }
    }
  }
#pragma unroll
  for (int j = 0; j < 2; ++j) {
#pragma unroll
    for (int c = 0; c < 4; ++c) warps[warp][(g + c / 2 * 8) * 16 + j * 8 + 2 * t + c % 2] = sum[j][c];
  }
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < tiles * 256; i += kPrepareThreads) {
    float value = 0.f;
    for (int s = 0; s < strides; ++s) value += warps[s * tiles + i / 256][i % 256];
    block[i / 256][i % 256] = value;
  }
  ptx::cluster_sync();
  const int share = tiles * 256 / kSlices;
  if (static_cast<int>(threadIdx.x) < share) {
    const int i = rank * share + static_cast<int>(threadIdx.x);
    const int m = i / 16, column = group * 16 + i % 16;
    float value = 0.f;
#pragma unroll
    for (int s = 0; s < kSlices; ++s) {
      value += __uint_as_float(ptx::load_cluster_u32(ptx::shared_address(&block[i / 256][i % 256]), s));
    }
    if (m < args.m) {
      args.member[member].down[(static_cast<int64_t>(part) * args.m + m) * ad.down_columns + column] = value;
    }
  }
  ptx::cluster_sync();  // a block's shared memory outlives the reads of its peers
}

template <class X>
__global__ __launch_bounds__(kPrepareThreads, 3) void prepare_few(const __grid_constant__ PrepareArgs args,
                                                                  const __grid_constant__ DownArgs down) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  launch_dependents();
  wait_for_primaries();
  const int cluster = static_cast<int>(blockIdx.x) / kSlices;
  if (cluster < down.row_clusters) {
    const int row = static_cast<int>(blockIdx.x);
    if (row < args.m) quantize_row<X>(args, row);
  } else {
    project_down<X>(args, down, cluster - down.row_clusters);
  }
#endif
}

// ---- Second kernel: the stream of weights ----------------------------------------------------------------------------

enum class Kind { s8, bf16, f16 };

constexpr int kConsumers = 256, kHelpers = 96;  // threads; between them the warp of the producer
constexpr int kStreamThreads = kConsumers + 32 + kHelpers;
constexpr int kMaxTileRows = 256, kMaxStages = 16, kMaxSplits = 8;

struct Stream {
  CUtensorMap x;
  CUtensorMap w[kMaxMembers];
  GemmArgs gemm;
  const float* down[kMaxMembers];  // as the first kernel left it
  const float* bias[kMaxMembers];  // of the linear alone, or null
  int parts;
  int tile_rows;                     // of W, a multiple of 8
  int first_tile[kMaxMembers + 1];   // of each member
  int splits;                        // of K: blocks in a cluster
  int k_blocks;
  int stages, stage_bytes;
  int stage_units;  // fragments of sums that fit a stage
  int held;         // stages that the sums of a tile take
  int h_at, h_pitch, rows_at, barriers_at;  // in shared memory; bytes
};

__device__ __forceinline__ uint64_t evict_first() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;\n" : "=l"(policy));
  return policy;
}
__device__ __forceinline__ void tensor_load_hinted(uint32_t to, const CUtensorMap* map, int x, int y, uint32_t barrier,
                                                   uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, "
      "%3}], [%4], %5;\n" ::"r"(to),
      "l"(map), "r"(x), "r"(y), "r"(barrier), "l"(policy)
      : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(barrier) : "memory");
}
template <int Number>
__device__ __forceinline__ void named_arrive(int threads) {
  asm volatile("bar.arrive %0, %1;\n" ::"n"(Number), "r"(threads) : "memory");
}
__device__ __forceinline__ void prefetch_l2(const void* from) {
  asm volatile("prefetch.global.L2 [%0];\n" ::"l"(from));
}
__device__ __forceinline__ uint4 load_cluster_16(uint32_t address, uint32_t rank) {
  uint32_t remote;
  uint4 v;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;\n" : "=r"(remote) : "r"(address), "r"(rank));
  asm volatile("ld.shared::cluster.v4.u32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(remote)
               : "memory");
  return v;
}

// Four int8, in the order that kernels.h gives for W8A16, to two registers of two 16-bit floats; gemm.cuh has the idea.
template <bool kF16>
__device__ __forceinline__ void widen(uint32_t bytes, uint32_t& low, uint32_t& high) {
  const uint32_t pair[2] = {__byte_perm(bytes, 0, 0x4140), __byte_perm(bytes, 0, 0x4342)};
  uint32_t out[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if constexpr (kF16) {
      const uint32_t biased = (pair[i] ^ 0x00800080u) | 0x64006400u;
      const __half2 value = __hsub2(*reinterpret_cast<const __half2*>(&biased), __half2half2(__ushort_as_half(0x6480)));
      out[i] = *reinterpret_cast<const uint32_t*>(&value);
    } else {
      const uint32_t magnitude = (pair[i] & 0x007f007fu) | 0x43004300u, sign = (pair[i] & 0x00800080u) | 0x43004300u;
      const __nv_bfloat162 value = __hsub2(*reinterpret_cast<const __nv_bfloat162*>(&magnitude),
                                           *reinterpret_cast<const __nv_bfloat162*>(&sign));
      out[i] = *reinterpret_cast<const uint32_t*>(&value);
    }
  }
  low = out[0];
  high = out[1];
}

// h of one member, in 16 bits, into shared memory [token][h_pitch bytes].
__device__ __forceinline__ void encode_h(const Stream& p, int member, uint8_t* h, int thread) {
  const AdapterView& ad = p.gemm.member[member].adapters;
  const int chunk_down = ad.chunk_count ? ad.down_columns / ad.chunk_count : 0;
  const int quads = ad.chunk_count * 4;  // four ranks at a time
  const int64_t piece = static_cast<int64_t>(p.gemm.m) * ad.down_columns;
  for (int i = thread; i < p.gemm.m * quads; i += kHelpers) {
    const int m = i / quads, chunk_index = i % quads / 4, j = i % 4 * 4;
    const Chunk chunk = ad.chunks[chunk_index];
    const float* const from = p.down[member] + static_cast<int64_t>(m) * ad.down_columns + chunk_index * chunk_down + j;
    float4 sum = {0.f, 0.f, 0.f, 0.f};
    const auto add = [&](int offset) {
#pragma unroll 4
      for (int part = 0; part < p.parts; ++part) {
        const float4 v = __ldcg(reinterpret_cast<const float4*>(from + part * piece + offset));
        sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
      }
    };
    add(0);
    if (chunk.split) add(kChunkRank);
    const bool applies = !p.gemm.row_slot || p.gemm.row_slot[m] == chunk.slot;
    const float scale = ad.scale[chunk.slot];
    const int exponent = -chunk.exponent - ilogbf(p.gemm.rows[m].power);
    const float value[4] = {sum.x, sum.y, sum.z, sum.w};
    uint16_t high[4], low[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const float v = applies && j + c < chunk.ranks ? scalbnf(value[c] * scale, exponent) : 0.f;
      high[c] = encode16(v, chunk.b_f16);
      low[c] = applies && j + c < chunk.ranks ? encode16(v - decode16(high[c], chunk.b_f16), chunk.b_f16) : 0;
    }
    const auto pack = [](const uint16_t(&v)[4]) {
      return uint2{static_cast<uint32_t>(v[0]) | static_cast<uint32_t>(v[1]) << 16,
                   static_cast<uint32_t>(v[2]) | static_cast<uint32_t>(v[3]) << 16};
    };
    uint8_t* const to = h + m * p.h_pitch + (chunk.up + j) * 2;
    *reinterpret_cast<uint2*>(to) = pack(high);
    if (chunk.split) {
      *reinterpret_cast<uint2*>(to + kChunkRank * 2) = pack(low);
      *reinterpret_cast<uint2*>(to + kChunkRank * 4) = pack(high);
    }
  }
}

// 16 rows of W from `first` to `end` of the member, kTiles * 8 tokens from first_token on: load_sums brings the sums as mma
// accumulators, row g (and g + 8) of W and tokens 2t, 2t + 1.
template <int kTiles, class LoadSums>
__device__ __forceinline__ void finish(const Stream& p, int member, int first, int end, int first_token,
                                       const uint8_t* h, const float4* rows, LoadSums load_sums) {
  const GemmMember& out = p.gemm.member[member];
  const AdapterView& ad = out.adapters;
  const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  const int n[2] = {first + g, first + g + 8};
  const bool present[2] = {n[0] < end, n[1] < end};

  float scale[2], bias[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    scale[i] = present[i] ? __ldg(out.scale + n[i]) : 0.f;
    bias[i] = present[i] && p.bias[member] ? __ldg(p.bias[member] + n[i]) : 0.f;
  }
  if (!p.gemm.row_slot) {
    for (int slot = 0; slot < ad.slot_count; ++slot) {
      if (!ad.has_bias[slot]) continue;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (present[i]) bias[i] += ad.scale[slot] * ad.slot_bias[static_cast<int64_t>(slot) * out.n + n[i]];
      }
    }
  }
  const int steps = ad.up_columns / 16;
  const int chunk_columns = ad.chunk_count ? ad.up_columns / ad.chunk_count : 16;
  const uint16_t* const b = ad.b + static_cast<int64_t>(n[0]) * ad.up_columns + 4 * t;
  constexpr int kAhead = 4;
  uint2 low[kAhead], high[kAhead];
  bool f16[kAhead];
  const auto load_b = [&](int base) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const bool exists = base + i < steps;
      const uint2* const at = reinterpret_cast<const uint2*>(b + (base + i) * 16);
      low[i] = exists && present[0] ? __ldg(at) : uint2{0, 0};
      high[i] = exists && present[1] ? __ldg(at + 2 * ad.up_columns) : uint2{0, 0};
      f16[i] = exists && ad.chunks[(base + i) * 16 / chunk_columns].b_f16;
    }
  };
  load_b(0);

  float value[kTiles][4];
  load_sums(value);
  rows += (first_token + 2 * t) / 2;
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
    const float4 token = rows[j * 4];
#pragma unroll
    for (int c = 0; c < 4; ++c) value[j][c] *= (c % 2 ? token.z : token.x) * scale[c / 2];
  }
  for (int base = 0; base < steps; base += kAhead) {
    if (base) load_b(base);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (base + i >= steps) break;
      const uint32_t operand[4] = {low[i].x, high[i].x, low[i].y, high[i].y};
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        const uint2 token = *reinterpret_cast<const uint2*>(h + (first_token + j * 8 + g) * p.h_pitch +
                                                            ((base + i) * 16 + 4 * t) * 2);
        if (f16[i])
          ptx::mma_f16(value[j], operand, token.x, token.y);
        else
          ptx::mma_bf16(value[j], operand, token.x, token.y);
      }
    }
  }

  // Lanes of neighbouring rows exchange a token each, so that a lane has two columns of y side by side.
  const Dtype type = p.gemm.y_type;
  const bool odd = g & 1;
  const bool pairs = out.n % 2 == 0 && reinterpret_cast<uintptr_t>(out.y) % (type == Dtype::f32 ? 8 : 4) == 0;
  const bool more = has_epilogue(p.gemm, out);
  const auto at16 = [&](const void* from, int64_t at) {
    return type == Dtype::f32 ? static_cast<const float*>(from)[at]
                              : decode16(static_cast<const uint16_t*>(from)[at], type == Dtype::f16);
  };
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
    const float4 token = rows[j * 4];
    const int m = first_token + j * 8 + 2 * t + odd;
    const int slot = p.gemm.row_slot && m < p.gemm.m ? p.gemm.row_slot[m] : -1;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float one = value[j][2 * i] * token.y + bias[i], two = value[j][2 * i + 1] * token.w + bias[i];
      const float got = __shfl_xor_sync(~0u, odd ? one : two, 4);
      float v[2] = {odd ? got : one, odd ? two : got};
      const int column = first + (g & ~1) + 8 * i;
      if (m >= p.gemm.m || column >= end) continue;
      const int count = min(2, end - column);
      const int64_t at = static_cast<int64_t>(m) * out.n + column;
      if (more) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          if (c >= count) break;
          if (slot >= 0 && slot < ad.slot_count && ad.has_bias[slot])
            v[c] += ad.scale[slot] * ad.slot_bias[static_cast<int64_t>(slot) * out.n + column + c];
          v[c] = activate(v[c], out.activation);
          if (out.gate) v[c] *= at16(out.gate, column + c);
          if (out.residual) v[c] += at16(out.residual, at + c);
        }
      }
      if (type == Dtype::f32) {
        float* const y = static_cast<float*>(out.y) + at;
        if (pairs) {
          *reinterpret_cast<float2*>(y) = {v[0], v[1]};
        } else {
          y[0] = v[0];
          if (count > 1) y[1] = v[1];
        }
      } else {
        uint16_t* const y = static_cast<uint16_t*>(out.y) + at;
        const uint32_t low = encode16(v[0], type == Dtype::f16), high = encode16(v[1], type == Dtype::f16);
        if (pairs) {
          *reinterpret_cast<uint32_t*>(y) = low | high << 16;
        } else {
          y[0] = static_cast<uint16_t>(low);
          if (count > 1) y[1] = static_cast<uint16_t>(high);
        }
      }
    }
  }
}

// kTokens: M rounded up. kSubs: 64-row pieces of a tile for each of the two warpgroups.
template <Kind kKind, int kTokens, int kSubs>
__global__ __launch_bounds__(kStreamThreads) __maxnreg__(kTokens < 64 ? 104 : kKind == Kind::s8 ? 112 : 128) void stream(const __grid_constant__ Stream p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr bool kInt8 = kKind == Kind::s8;
  constexpr int kXBoxes = kInt8 ? 1 : 2, kXBytes = kTokens * 128 * kXBoxes;
  constexpr int kTiles = kTokens / 8, kSums = kTokens / 2;
  extern __shared__ __align__(1024) uint8_t memory[];
  const uint32_t base = ptx::shared_address(memory), barriers = base + p.barriers_at;
  const auto full = [&](int stage) { return barriers + stage * 16; };
  const auto empty = [&](int stage) { return barriers + stage * 16 + 8; };
  // The same in all lanes, and known to be: descriptors are then computed in uniform registers.
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32, 0), lane = static_cast<int>(threadIdx.x) % 32;
  const int rank = p.splits > 1 ? static_cast<int>(ptx::cluster_rank()) : 0;
  const int cluster = static_cast<int>(blockIdx.x) / p.splits, clusters = static_cast<int>(gridDim.x) / p.splits;
  const int first_block = rank * p.k_blocks / p.splits, blocks = (rank + 1) * p.k_blocks / p.splits - first_block;
  const int tiles = p.first_tile[p.gemm.member_count];
  const auto member_of = [&](int tile) {
    int member = 0;
    while (tile >= p.first_tile[member + 1]) ++member;
    return member;
  };
  uint8_t* const h = memory + p.h_at;
  float4* const rows = reinterpret_cast<float4*>(memory + p.rows_at);  // {s_x / p, p} of two tokens
  enum { kPair = 1, kReady = 2, kFree = 3 };                           // named barriers

  if (threadIdx.x == 0) {
    for (int stage = 0; stage < p.stages; ++stage) {
      ptx::barrier_init(full(stage), 1);
      ptx::barrier_init(empty(stage), 2);
    }
    ptx::barrier_init_fence();
  }
  __syncthreads();
  launch_dependents();

  if (warp == kConsumers / 32) {
    if (lane == 0) {
      const uint64_t policy = evict_first();
      // One of these walks over the stages with weights, the other with x.
      struct Walk {
        int tile, block, member, row;
      };
      const auto enter = [&](Walk& at) {
        at.block = 0;
        at.member = member_of(min(at.tile, tiles - 1));
        at.row = (at.tile - p.first_tile[at.member]) * p.tile_rows;
      };
      const auto step = [&](Walk& at) {
        if (++at.block == blocks) {
          at.tile += clusters;
          enter(at);
        }
      };
      const auto load_w = [&](const Walk& at, int stage) {
        ptx::barrier_expect_bytes(full(stage), p.tile_rows * 128 + kXBytes);
        tensor_load_hinted(base + stage * p.stage_bytes, &p.w[at.member], (first_block + at.block) * 128, at.row,
                           full(stage), policy);
      };
      const auto load_x = [&](int block, int stage) {
#pragma unroll
        for (int box = 0; box < kXBoxes; ++box) {
          ptx::tensor_load(base + stage * p.stage_bytes + p.tile_rows * 128 + box * kTokens * 128, &p.x,
                           ((first_block + block) * kXBoxes + box) * 128, 0, full(stage));
        }
      };
      Walk at{cluster, 0, 0, 0};
      enter(at);
      int ahead = 0;
      for (; ahead < p.stages && at.tile < tiles && blocks; ++ahead, step(at)) load_w(at, ahead);
      wait_for_primaries();
      for (int i = 0, block = 0; i < ahead; ++i) {
        load_x(block, i);
        if (++block == blocks) block = 0;
      }
      int stage = 0;
      uint32_t phase = 0;
      for (; at.tile < tiles && blocks; step(at)) {
        ptx::barrier_wait(empty(stage), phase);
        load_w(at, stage);
        load_x(at.block, stage);
        if (++stage == p.stages) stage = 0, phase ^= 1;
      }
    }
    __syncwarp();
  } else if (warp > kConsumers / 32) {
    const int thread = static_cast<int>(threadIdx.x) - kConsumers - 32;
    if (cluster < tiles) {
      const int member = member_of(cluster), columns = p.gemm.member[member].adapters.up_columns;
      const int n = (cluster - p.first_tile[member]) * p.tile_rows;
      const auto* const b = reinterpret_cast<const uint8_t*>(p.gemm.member[member].adapters.b) +
                            static_cast<int64_t>(n) * columns * 2;
      const int bytes = min(p.tile_rows, p.gemm.member[member].n - n) * columns * 2;
      for (int i = thread * 128; i < bytes; i += kHelpers * 128) prefetch_l2(b + i);
    }
    wait_for_primaries();
    for (int m = thread; m < kTokens; m += kHelpers) {
      const RowScale row = p.gemm.rows && m < p.gemm.m ? p.gemm.rows[m] : RowScale{1.f, 1.f};
      reinterpret_cast<float2*>(rows)[m] = {row.scale / row.power, row.power};
    }
    int encoded = -1;
    for (int tile = cluster; tile < tiles; tile += clusters) {
      const int member = member_of(tile);
      if (tile != cluster) ptx::named_sync<kFree>(kConsumers + kHelpers);
      if (member != encoded) encode_h(p, member, h, thread);
      encoded = member;
      named_arrive<kReady>(kConsumers + kHelpers);
    }
  } else {
    const int warpgroup = warp / 4, warp_rows = warp % 4 * 16;
    wait_for_primaries();
    int stage = 0;
    uint32_t phase = 0;
    const auto release = [&](int which) {
      if (threadIdx.x % 128 == 0) barrier_arrive(empty(which));
    };
    for (int tile = cluster; tile < tiles; tile += clusters) {
      const int member = member_of(tile), first = (tile - p.first_tile[member]) * p.tile_rows;
      std::conditional_t<kInt8, int32_t, float> sum[kSubs][kSums];
#pragma unroll
      for (int i = 0; i < kSubs * kSums; ++i) sum[i / kSums][i % kSums] = 0;
      int previous = 0;
      for (int block = 0; block < blocks; ++block) {
        const uint32_t w_tile = base + stage * p.stage_bytes, x_tile = w_tile + p.tile_rows * 128;
        ptx::barrier_wait(full(stage), phase);
        const uint64_t x = ptx::wgmma_descriptor(x_tile);
        if constexpr (kInt8) {
          ptx::wgmma_fence();
#pragma unroll
          for (int sub = 0; sub < kSubs; ++sub) {
            const uint64_t w = ptx::wgmma_descriptor(w_tile + (warpgroup + 2 * sub) * 64 * 128);
#pragma unroll
            for (int k = 0; k < 4; ++k) ptx::wgmma_s8(sum[sub], w + 2 * k, x + 2 * k, true);
          }
          ptx::wgmma_commit();
          if (block > 0) {
            ptx::wgmma_wait<1>();
            if (block <= blocks - p.held) release(previous);
          }
          previous = stage;
        } else {
          constexpr bool kF16 = kKind == Kind::f16;
#pragma unroll
          for (int sub = 0; sub < kSubs; ++sub) {
            const uint32_t w_rows = w_tile + ((warpgroup + 2 * sub) * 64 + warp_rows) * 128;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              uint32_t operand[4][4];
#pragma unroll
              for (int step = 0; step < 2; ++step) {
                uint32_t bytes[4];
                ptx::load_matrix_x4(bytes, w_rows + (lane % 8 + lane / 16 * 8) * 128 +
                                               ((((half * 2 + step) * 2 + lane / 8 % 2) ^ lane % 8) * 16));
#pragma unroll
                for (int k = 0; k < 2; ++k) {
                  widen<kF16>(bytes[k], operand[step * 2 + k][0], operand[step * 2 + k][2]);
                  widen<kF16>(bytes[k + 2], operand[step * 2 + k][1], operand[step * 2 + k][3]);
                }
              }
              ptx::wgmma_fence();
#pragma unroll
              for (int k = 0; k < 4; ++k) {
                const uint64_t x_step = x + half * (kTokens * 128 >> 4) + 2 * k;
                if constexpr (kF16)
                  ptx::wgmma_f16(sum[sub], operand[k], x_step, true);
                else
                  ptx::wgmma_bf16(sum[sub], operand[k], x_step, true);
              }
              ptx::wgmma_commit();
              ptx::wgmma_wait<0>();
            }
          }
          if (block < blocks - p.held) release(stage);
        }
        if (++stage == p.stages) stage = 0, phase ^= 1;
      }
      if constexpr (kInt8) ptx::wgmma_wait<0>();

      // The sums go where the last stages were, a fragment of 16 rows and 8 tokens after the other, once nobody reads
      // those any more. Behind a tile that is not the last the producer fills the other stages meanwhile.
      const bool last = tile + clusters >= tiles;
      const int spare = last ? 0 : stage >= p.held ? stage - p.held : stage - p.held + p.stages;
      const auto place = [&](int unit) {
        int at = spare + unit / p.stage_units;
        if (at >= p.stages) at -= p.stages;
        return at * p.stage_bytes + (unit % p.stage_units * 32 + lane) * 16;
      };
      const int rows_here = min(p.tile_rows, p.gemm.member[member].n - first);
      ptx::named_sync<kPair>(kConsumers);
#pragma unroll
      for (int sub = 0; sub < kSubs; ++sub) {
        const int row_tile = (warpgroup + 2 * sub) * 4 + warp % 4;
        if (row_tile * 16 < rows_here) {
#pragma unroll
          for (int j = 0; j < kTiles; ++j) {
            uint4 bits;
            memcpy(&bits, &sum[sub][4 * j], sizeof bits);
            *reinterpret_cast<uint4*>(memory + place(row_tile * kTiles + j)) = bits;
          }
        }
      }
      ptx::named_sync<kReady>(kConsumers + kHelpers);
      if (p.splits > 1) ptx::cluster_sync();
      // Each block finishes a share of the fragments, some tokens of 16 rows at a time.
      constexpr int kPart = kTiles < 4 ? kTiles : 4, kParts = kTiles / kPart;
      const int row_tiles = (rows_here + 15) / 16;
      const int first_unit = rank * row_tiles / p.splits * kParts, end = (rank + 1) * row_tiles / p.splits * kParts;
      for (int unit = first_unit + warp; unit < end; unit += kConsumers / 32) {
        const int row_tile = unit / kParts, part = unit % kParts * kPart;
        finish<kPart>(p, member, first + row_tile * 16, first + rows_here, part * 8, h, rows, [&](float(&value)[kPart][4]) {
#pragma unroll
          for (int j = 0; j < kPart; ++j) {
            const uint32_t from = base + place(row_tile * kTiles + part + j);
            std::conditional_t<kInt8, int32_t, float> total[4] = {};
            for (int s = 0; s < p.splits; ++s) {
              const uint4 bits = load_cluster_16(from, s);
              std::conditional_t<kInt8, int32_t, float> piece[4];
              memcpy(piece, &bits, sizeof bits);
#pragma unroll
              for (int c = 0; c < 4; ++c) total[c] += piece[c];
            }
#pragma unroll
            for (int c = 0; c < 4; ++c) value[j][c] = static_cast<float>(total[c]);
          }
        });
      }
      if (!last) {
        ptx::named_sync<kFree>(kConsumers + kHelpers);
        for (int i = 0; i < p.held; ++i) {
          const int at = spare + i;
          release(at >= p.stages ? at - p.stages : at);
        }
      }
    }
  }
  if (p.splits > 1) {
    if (warp >= kConsumers / 32) ptx::cluster_sync();
    ptx::cluster_sync();  // a block's shared memory outlives the reads of its peers
  }
#endif
}

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                            const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                            CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

Encode encoder() {
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    OCTOLORA_CUDA(
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found),
        "tensor maps");
    return reinterpret_cast<Encode>(function);
  }();
  return encode;
}

CUtensorMap map_of(const void* matrix, int64_t width, int64_t rows, int64_t pitch, int box_rows) {
  CUtensorMap map;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(width), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(pitch)};
  const cuuint32_t box[2] = {128, static_cast<cuuint32_t>(box_rows)}, steps[2] = {1, 1};
  const CUresult result = encoder()(&map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, const_cast<void*>(matrix), sizes, strides,
                                    box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                    CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw Error(OCTOLORA_CUDA_ERROR, "cuTensorMapEncodeTiled: error %d for %lld rows of %lld bytes, pitch %lld, at %p",
                static_cast<int>(result), static_cast<long long>(rows), static_cast<long long>(width),
                static_cast<long long>(pitch), matrix);
  }
  return map;
}

using Kernel = void (*)(Stream);

template <Kind kKind>
Kernel kernel_for(int tokens, bool two) {
  switch (tokens) {
    case 8:
      return two ? stream<kKind, 8, 2> : stream<kKind, 8, 1>;
    case 16:
      return two ? stream<kKind, 16, 2> : stream<kKind, 16, 1>;
    case 32:
      return two ? stream<kKind, 32, 2> : stream<kKind, 32, 1>;
    default:
      return two ? stream<kKind, 64, 2> : stream<kKind, 64, 1>;
  }
}

Kernel kernel_for(Kind kind, int tokens, bool two) {
  switch (kind) {
    case Kind::bf16:
      return kernel_for<Kind::bf16>(tokens, two);
    case Kind::f16:
      return kernel_for<Kind::f16>(tokens, two);
    default:
      return kernel_for<Kind::s8>(tokens, two);
  }
}

// ---- Dispatch --------------------------------------------------------------------------------------------------------

constexpr int kSharedBytes = 208 * 1024;  // leaves room for a block of the first kernel beside it

struct Plan {
  Kind kind;
  int tokens, splits, clusters;
  int tile_rows, tiles;  // tile_rows 0: no tile of at most kMaxTileRows
  int stages, stage_bytes, held, stage_units;
  int h_pitch, h_bytes, up_columns;
  int h_at, rows_at, barriers_at;
  bool prepares;
};

// Tiles of 96 rows and more read x often enough from L2 to hide it; below, blocks that share the rows and divide K have
// taller ones. us at rank 64, M = 1 and 64:
//   SPLITS_TABLE
constexpr int kShortTile = 96;

Plan plan_of(const PrepareArgs& prepare, const GemmArgs& gemm, const Limits& limits) {
  Plan plan{};
  int64_t total_n = 0;
  for (int i = 0; i < gemm.member_count; ++i) {
    total_n += gemm.member[i].n;
    plan.up_columns = std::max(plan.up_columns, gemm.member[i].adapters.up_columns);
  }
  const bool int8 = prepare.spec.mode != Mode::w8a16;
  plan.prepares = int8 || plan.up_columns;
  plan.kind = int8 ? Kind::s8 : gemm.x_f16 ? Kind::f16 : Kind::bf16;
  plan.tokens = gemm.m <= 8 ? 8 : gemm.m <= 16 ? 16 : gemm.m <= 32 ? 32 : 64;

  const auto tiles_of = [&](int rows) {
    int tiles = 0;
    for (int i = 0; i < gemm.member_count; ++i) tiles += (gemm.member[i].n + rows - 1) / rows;
    return tiles;
  };
  // The lowest tiles of which no cluster has more than `turns`; 0 where they are too high.
  const auto rows_for = [&](int splits, int turns) {
    const int64_t most = static_cast<int64_t>(limits.clusters[splits]) * turns;
    if (most == 0) return 0;
    int64_t rows = std::max<int64_t>(16, round_up64((total_n + most - 1) / most, 8));
    while (rows <= kMaxTileRows && tiles_of(static_cast<int>(rows)) > most) rows += 8;
    return rows <= kMaxTileRows ? static_cast<int>(rows) : 0;
  };
  for (const int splits : {1, 2, 3, 4, kMaxSplits}) {
    if (decode_tuning.splits && splits != decode_tuning.splits) continue;
    const int rows = rows_for(splits, 1);
    if (!rows) break;
    plan.splits = splits;
    plan.tile_rows = rows;
    if (rows >= kShortTile) break;
  }
  for (int turns = 2; !plan.tile_rows && turns < 1 << 16; ++turns) {
    plan.splits = 1;
    plan.tile_rows = rows_for(1, turns);
  }
  if (!plan.tile_rows) return plan;
  plan.tiles = tiles_of(plan.tile_rows);
  plan.clusters = std::min(plan.tiles, limits.clusters[plan.splits]);

  plan.stage_bytes = plan.tile_rows * 128 + plan.tokens * 128 * (int8 ? 1 : 2);
  plan.stage_units = plan.stage_bytes / 512;
  plan.held = ((plan.tile_rows + 15) / 16 * (plan.tokens / 8) + plan.stage_units - 1) / plan.stage_units;
  // A row of h is 32 or 96 bytes beyond a multiple of 128, so that eight rows lie in different banks.
  plan.h_pitch = plan.up_columns * 2 + (plan.up_columns % 32 == 0 ? 32 : 0);
  plan.h_bytes = plan.up_columns ? plan.tokens * plan.h_pitch : 0;
  const int limit = kSharedBytes - plan.h_bytes - kMaxTokens * 8 - kMaxStages * 16;
  const int reach = (plan.tile_rows > 128 ? 256 : 128) * 128;  // what a wgmma reads from the start of a stage on
  plan.stages = std::min(kMaxStages, limit / plan.stage_bytes);
  while (plan.stages > 0 && (plan.stages - 1) * plan.stage_bytes + reach > limit) --plan.stages;
  plan.rows_at = std::max(plan.stages * plan.stage_bytes, (plan.stages - 1) * plan.stage_bytes + reach);
  plan.barriers_at = plan.rows_at + kMaxTokens * 8;
  plan.h_at = plan.barriers_at + kMaxStages * 16;
  return plan;
}

void set_up_kernels(const Limits& limits) {
  for (const Kind kind : {Kind::s8, Kind::bf16, Kind::f16}) {
    for (const int tokens : {8, 16, 32, 64}) {
      for (const bool two : {false, true}) {
        OCTOLORA_CUDA(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel_for(kind, tokens, two)),
                                           cudaFuncAttributeMaxDynamicSharedMemorySize, limits.shared_bytes),
                      "decode: %d bytes of shared memory", limits.shared_bytes);
      }
    }
  }
}

// A launch whose blocks may start while the kernel before it still runs.
struct Launch {
  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute attributes[2];

  Launch(int blocks, int threads, int cluster, int shared_bytes, cudaStream_t stream) {
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
    config.stream = stream;
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim.x = static_cast<unsigned>(cluster);
    attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
    config.attrs = attributes;
    config.numAttrs = cluster > 1 ? 2 : 1;
  }
};

}  // namespace

void set_up_decode(Limits& limits) {
  if (limits.capability != 90) return;
  encoder();  // a driver without it fails here, not in a forward
  set_up_kernels(limits);
  limits.clusters[1] = limits.multiprocessors;
  for (int blocks = 2; blocks <= kMaxSplits; ++blocks) {
    const Launch launch(blocks, kStreamThreads, blocks, kSharedBytes, nullptr);
    cudaLaunchConfig_t config = launch.config;
    cudaLaunchAttribute cluster = launch.attributes[1];
    config.attrs = &cluster;
    config.numAttrs = 1;
    OCTOLORA_CUDA(cudaOccupancyMaxActiveClusters(&limits.clusters[blocks], stream<Kind::s8, 64, 2>, &config),
                  "decode: clusters of %d", blocks);
  }
}

int decode_parts(int k) { return std::min(8, (k + 4095) / 4096); }

const char* decode_refuses(const PrepareArgs& prepare, const GemmArgs& gemm, const Limits& limits) {
  if (limits.capability != 90) return "it is for compute capability 9.0";
  if (gemm.m > kMaxTokens) return "it is for at most 64 rows";
  if (gemm.outliers.list) return "outlier columns are taken out";
  if (prepare.x_type == Dtype::f32) return "x is fp32";
  if (prepare.k % 8 || reinterpret_cast<uintptr_t>(prepare.x) % 16) return "rows of x are not 16-byte aligned";
  const Plan plan = plan_of(prepare, gemm, limits);
  if (!plan.tile_rows) return "N is too large";
  if (plan.stages <= plan.held) return "the ranks of all slots leave too little shared memory";
  if (plan.tiles > plan.clusters && (gemm.k + kBlockK - 1) / kBlockK < plan.held) return "K is too short";
  return nullptr;
}

void launch_decode(const PrepareArgs& prepare, const GemmArgs& gemm, const Limits& limits, cudaStream_t stream) {
  const Plan plan = plan_of(prepare, gemm, limits);
  DownArgs down{};
  Stream s{};
  down.parts = s.parts = decode_parts(prepare.k);
  int groups = 0;
  for (int i = 0; i < gemm.member_count; ++i) {
    const GemmMember& member = gemm.member[i];
    groups += member.adapters.down_columns / 16;
    s.down[i] = prepare.member[i].down;
    s.bias[i] = prepare.member[i].total_bias ? prepare.member[i].bias : member.bias;
    s.w[i] = map_of(member.weight, gemm.k_pitch, member.n, gemm.k_pitch, plan.tile_rows);
    s.first_tile[i + 1] = s.first_tile[i] + (member.n + plan.tile_rows - 1) / plan.tile_rows;
  }
  if (plan.prepares) {
    down.row_clusters = (prepare.m + kSlices - 1) / kSlices;
    const Launch launch((down.row_clusters + groups * down.parts) * kSlices, kPrepareThreads, kSlices, 0, stream);
    OCTOLORA_CUDA(cudaLaunchKernelEx(&launch.config,
                                     prepare.x_type == Dtype::f16 ? prepare_few<__half> : prepare_few<__nv_bfloat16>,
                                     prepare, down),
                  "prepare: M = %d, K = %d, %d groups of 16 ranks", prepare.m, prepare.k, groups);
  }

  const int x_bytes = plan.kind == Kind::s8 ? 1 : 2;
  s.x = map_of(gemm.x, (plan.kind == Kind::s8 ? gemm.k_pitch : gemm.k) * static_cast<int64_t>(x_bytes), gemm.m,
               gemm.x_pitch * x_bytes, plan.tokens);
  s.gemm = gemm;
  s.tile_rows = plan.tile_rows;
  s.splits = plan.splits;
  s.k_blocks = (gemm.k + kBlockK - 1) / kBlockK;
  s.stages = plan.stages;
  s.stage_bytes = plan.stage_bytes;
  s.stage_units = plan.stage_units;
  s.held = plan.held;
  s.h_at = plan.h_at;
  s.h_pitch = plan.h_pitch;
  s.rows_at = plan.rows_at;
  s.barriers_at = plan.barriers_at;
  const Launch launch(plan.clusters * plan.splits, kStreamThreads, plan.splits, plan.h_at + plan.h_bytes, stream);
  OCTOLORA_CUDA(cudaLaunchKernelEx(&launch.config, kernel_for(plan.kind, plan.tokens, plan.tile_rows > 128), s),
                "decode: M = %d, K = %d, %d tiles of %d rows, %d blocks each", gemm.m, gemm.k, plan.tiles,
                plan.tile_rows, plan.splits);
}

void describe_decode(const PrepareArgs& prepare, const GemmArgs& gemm, const Limits& limits, Explanation& to) {
  const Plan plan = plan_of(prepare, gemm, limits);
  int columns = 0;
  for (int i = 0; i < gemm.member_count; ++i) columns += gemm.member[i].adapters.down_columns;
  if (plan.prepares) {
    to.launch("prepare for few rows: %s%d ranks of x.A^T, 16 at a time in clusters of %d, K in %d pieces",
              plan.kind == Kind::s8 ? "quantizes x, " : "", columns, kSlices, decode_parts(prepare.k));
  } else {
    to.note("no prepare: x is read where it is and there are no adapters");
  }
  to.launch("%s for few rows, started while the launch before it runs: %d tokens x %d rows of W, %d tiles, K divided by "
            "%d, %d stages",
            plan.kind == Kind::s8 ? "wgmma s8" : "wgmma 16-bit with widened weights", plan.tokens, plan.tile_rows,
            plan.tiles, plan.splits, plan.stages);
}

}  // namespace octolora::cuda
