// SPDX-License-Identifier: Apache-2.0
//
// Few rows (M <= 64) of W8A8 on Hopper in one launch: quantization, x.A^T, the product and the low-rank update.
//
//   y[m,n] = p[m] * ( s_w[n] * (s_x[m] / p[m]) * sum_k q[m,k] W[n,k] + sum_r h[m,r] B[n,r] ) + bias[n]
//
// Clusters of 8 blocks, each with an eighth of K. A cluster quantizes x and makes h for itself, so that the stream of
// weights hangs on nothing: of its eighth a block finds the largest magnitudes of the rows and its share of x.A^T, and
// both are joined across the cluster. The codes of its eighth stay in shared memory; nothing is kept in the workspace.
//
// As in decode.cu the weights are the 64 rows of a wgmma and the tokens its 8 to 64 columns, a stage is 128 values of K
// of each row of a tile. The blocks of a cluster have the same tiles: when its eighth is multiplied, a block sends each
// 16 rows of the sums to the one that finishes them. All that crosses blocks goes by st.async, which completes on a
// barrier of the receiver. Eight warps quantize, of which then four multiply and one is the producer; eight others make
// h, and then have the low-rank update of their rows ready before the sums come.
//
// The kernel is a programmatic dependent of whatever ran before: shared memory fills with weights while that ends.
#include <cuda.h>

#include <algorithm>
#include <cstring>

#include "check.h"
#include "decode.cuh"
#include "dependent_launch.cuh"
#include "kernels.h"
#include "ptx.cuh"
#include "tensor_map.h"
#include "wgmma_narrow.cuh"

namespace octolora::cuda {

namespace {

constexpr int kMaxTokens = kDecodeRows;
constexpr int kBlockK = 128;
constexpr int kSlices = 8;                         // of K: blocks in a cluster
constexpr int kConsumers = 128, kFinishers = 256;  // threads; behind them those that only quantize
constexpr int kQuantizers = 256, kThreads = kFinishers + kQuantizers;
[[maybe_unused]] constexpr int kWarps = 8;  // that quantize, and that finish
constexpr int kMaxStages = 16;
constexpr int kBarriers = kMaxStages * 2 + 7;

// 16-rank chunks that are multiplied at a time.
__host__ __device__ constexpr int chunks_at_once(int tokens) { return tokens == 8 ? 4 : tokens == 64 ? 1 : 2; }

struct Slice {
  CUtensorMap w[kMaxMembers];
  PrepareArgs prepare;
  GemmArgs gemm;
  const float* bias[kMaxMembers];   // of the linear alone, or null
  int first_tile[kMaxMembers + 1];  // of each member
  int h_at[kMaxMembers], h_pitch[kMaxMembers];
  int tile_rows;  // of W, a multiple of 8
  int k_blocks;
  int stages, stage_bytes;
  int fragments;  // that a block may finish at a time
  int q_at, received_at, given_at, maxima_at, rows_at, barriers_at;
};

// Positions of a warp's vectors of 8 values, its rows one after the other.
struct Cursor {
  int row, at;  // at: of lane 0
  __device__ __forceinline__ void next(int vectors) {
    at += 32;
    if (at >= vectors) row += kWarps, at = 0;
  }
};

// The codes of a block's eighth of x, by warp `warp` of kWarps. q: [K / 128][kTokens][128] in the copy engine's
// swizzle.
template <class X, int kTokens>
__device__ __forceinline__ void quantize_slice(const Slice& p, int first_block, int blocks, int rank, int warp,
                                               uint2* q, const uint32_t* maxima, uint32_t maxima_full) {
  constexpr int kHeld = kTokens == 64 ? 16 : 8;
  const PrepareArgs& args = p.prepare;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int vectors = blocks * 16, each = max(1, (vectors + 31) / 32);
  const int total = warp < args.m ? (args.m - warp + kWarps - 1) / kWarps * each : 0;
  const auto load = [&](const Cursor& c) {
    const int at = c.at + lane, column = first_block * kBlockK + at * 8;
    if (c.row >= args.m || at >= vectors || column >= args.k) return uint4{0, 0, 0, 0};
    return __ldcg(
        reinterpret_cast<const uint4*>(static_cast<const X*>(args.x) + static_cast<int64_t>(c.row) * args.k + column));
  };
  uint4 held[kHeld];
  Cursor loaded{warp, 0}, measured{warp, 0};
  uint32_t largest = 0;
#pragma unroll 1
  for (int done = 0; done < total; done += kHeld) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i, loaded.next(vectors)) held[i] = load(loaded);
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (measured.row >= args.m) break;
      largest = __vmaxu2(largest, magnitudes(held[i]));
      const int row = measured.row;
      measured.next(vectors);
      if (measured.row != row) {
        const uint32_t full = __reduce_max_sync(~0u, max(largest & 0xffffu, largest >> 16));
        if (lane < kSlices)
          ptx::store_async_cluster(ptx::shared_address(maxima + rank * kTokens + row), maxima_full, lane, full);
        largest = 0;
      }
    }
  }
  ptx::barrier_wait(maxima_full, 0);
  // Lane i knows what the warp's row i is quantized by.
  const int mine = warp + lane * kWarps;
  uint32_t full = 0;
#pragma unroll
  for (int s = 0; s < kSlices; ++s) full = max(full, mine < args.m ? maxima[s * kTokens + mine] : 0);
  RowQuantizer quantizer = RowQuantizer::of<X>(args.spec, full);
  const bool in_range = __all_sync(~0u, mine >= args.m || quantizer.in_range);
  const auto to = [&](const Cursor& c) -> uint2& {
    const int at = c.at + lane;
    return q[(at / 16 * kTokens + c.row) * 16 + (at % 16 ^ c.row % 8 * 2)];
  };
  Cursor encoded{warp, 0};
  loaded = encoded;
  if (in_range) {
#pragma unroll 1
    for (int done = 0; done < total; done += kHeld) {
      if (total > kHeld) {
#pragma unroll
        for (int i = 0; i < kHeld; ++i, loaded.next(vectors)) held[i] = load(loaded);
      }
#pragma unroll
      for (int i = 0; i < kHeld; ++i, encoded.next(vectors)) {
        const RowQuantizer row{0.f, __shfl_sync(~0u, quantizer.factor, encoded.row / kWarps), true};
        if (encoded.row < args.m && encoded.at + lane < vectors) to(encoded) = quantize_in_range<X>(row, held[i]);
      }
    }
  } else {
#pragma unroll 1
    for (int done = 0; done < total; ++done, encoded.next(vectors)) {
      const RowQuantizer row{0.f, __shfl_sync(~0u, quantizer.factor, encoded.row / kWarps), false};
      if (encoded.at + lane < vectors) to(encoded) = quantize_any<X>(args.spec, row, load(encoded));
    }
  }
}

// h of all members into the shared memory of the whole cluster, by the finishers. Ranks are the rows of an mma, tokens
// its columns, which is what the layout of A suits. Some chunks at a time, a pass: the warps share the block's eighth
// of K, the block of the cluster that has a token adds up the eighths, scales and rounds.
template <class X, int kTokens>
struct Down {
  static constexpr int kTiles = kTokens / 8, kChunks = chunks_at_once(kTokens), kBatch = kTokens <= 16 ? 2 : 1;
  static constexpr int kElements = kChunks * kTokens * 8;         // pairs of tokens times ranks, of a pass
  static constexpr int kGiven = kSlices * kChunks * kTiles * 16;  // floats that a block gets in a pass
  static constexpr int kFew = kTiles < 2 ? kTiles : 2;            // octets of tokens at a time, where types differ
  static constexpr bool kF16 = std::is_same_v<X, __half>;

  const Slice& p;
  int rank, warp, lane, thread;
  int steps, first, last;                          // of 32 values: of K, and the block's
  uint32_t base, h_full, given_full, maxima_full;  // shared memory, and barriers in it

  // What the pass makes of h is complete.
  __device__ __forceinline__ void wait_for(int pass) const { ptx::barrier_wait(h_full + pass % 2 * 8, pass / 2 & 1); }

  // Of kMany chunks from `chunk` on, for kSteps of the warp's steps from `step` on.
  template <int kSteps, int kMany>
  __device__ __forceinline__ void load_a(uint4 (&a)[kSteps][kMany][2], const AdapterView& ad, int chunk, int columns,
                                         int half, int step) const {
    const uint4* from = ad.a + static_cast<int64_t>(chunk * (columns / 8) + half * 2) * steps * 32 + step * 32 + lane;
    const int octet = steps * 32, next = (columns / 8 - 1) * octet;
#pragma unroll
    for (int c = 0; c < kMany; ++c, from += next) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int i = 0; i < kSteps; ++i) {
          const bool present = step + i * kWarps < last && chunk + c < ad.chunk_count;
          a[i][c][j] = present ? __ldcg(from + i * kWarps * 32) : uint4{0, 0, 0, 0};
        }
        if (j == 0) from += octet;
      }
    }
  }

  __device__ __forceinline__ uint4 load_x(int step, int octet) const {
    const PrepareArgs& args = p.prepare;
    const int column = step * 32 + lane % 4 * 8, row = octet * 8 + lane / 4;
    if (step >= last || row >= args.m || column >= args.k) return {0, 0, 0, 0};
    return __ldcg(
        reinterpret_cast<const uint4*>(static_cast<const X*>(args.x) + static_cast<int64_t>(row) * args.k + column));
  }

  // The warp's share of x.A^T for kMany chunks and the kOctets * 8 tokens from octet `octet` on, into `to`. kMixed: A
  // may be of the type that x is not. loaded: the first of A is in `a`.
  template <bool kMixed, int kOctets, int kSteps, int kMany>
  __device__ __forceinline__ void multiply(uint4 (&a)[kSteps][kMany][2], bool loaded, const AdapterView& ad, int chunk,
                                           int columns, bool a_f16, int octet, float2* to) const {
    float sum[kMany][kOctets][4] = {};
#pragma unroll 1
    for (int half = 0; half < columns / 16; ++half) {  // the low parts join the high ones
#pragma unroll 1
      for (int step = first + warp; step < last; step += kWarps * kSteps) {
        uint4 x[kSteps][kOctets];
#pragma unroll
        for (int i = 0; i < kSteps * kOctets; ++i)
          x[i / kOctets][i % kOctets] = load_x(step + i / kOctets * kWarps, octet + i % kOctets);
        if (!loaded) load_a(a, ad, chunk, columns, half, step);
        loaded = false;
#pragma unroll
        for (int i = 0; i < kSteps; ++i) {
#pragma unroll
          for (int j = 0; j < kOctets; ++j) {
            const uint4 v = transpose_quad(x[i][j], lane % 4);
            const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int c = 0; c < kMany; ++c) {
              const uint32_t low[4] = {a[i][c][0].x, a[i][c][0].y, a[i][c][0].z, a[i][c][0].w};
              const uint32_t high[4] = {a[i][c][1].x, a[i][c][1].y, a[i][c][1].z, a[i][c][1].w};
              if constexpr (kMixed) {
#pragma unroll
                for (int part = 0; part < 4; ++part) {
                  const float2 ranks = decode16x2(low[part], a_f16), more = decode16x2(high[part], a_f16);
                  const float2 tokens = decode16x2(words[part], kF16);
                  const float operand[4] = {ranks.x, more.x, ranks.y, more.y};
                  ptx::mma_tf32(sum[c][j], operand, tokens.x, tokens.y);
                }
              } else {
#pragma unroll
                for (int part = 0; part < 4; part += 2) {
                  const uint32_t operand[4] = {low[part], high[part], low[part + 1], high[part + 1]};
                  if constexpr (kF16)
                    ptx::mma_f16(sum[c][j], operand, words[part], words[part + 1]);
                  else
                    ptx::mma_bf16(sum[c][j], operand, words[part], words[part + 1]);
                }
              }
            }
          }
        }
      }
    }
#pragma unroll
    for (int c = 0; c < kMany; ++c) {
#pragma unroll
      for (int j = 0; j < kOctets; ++j) {
        float2* const at = to + ((c * kTiles + octet + j) * 4 + lane % 4) * 16 + lane / 4;
        at[0] = {sum[c][j][0], sum[c][j][1]};
        at[8] = {sum[c][j][2], sum[c][j][3]};
      }
    }
  }

  // Returns the number of passes. before: the first of A is on its way ahead of it.
  template <class Before>
  __device__ __forceinline__ int run(float2* scratch, float* given, const uint32_t* maxima, int& exponent,
                                     Before&& before) const {
    const PrepareArgs& args = p.prepare;
    int pass = 0;
#pragma unroll 1
    for (int member = 0; member < args.member_count; ++member) {
      const AdapterView& ad = args.member[member].adapters;
      if (!ad.chunk_count) continue;
      const int columns = ad.down_columns / ad.chunk_count;
#pragma unroll 1
      for (int chunk = 0; chunk < ad.chunk_count; chunk += kChunks, ++pass) {
        uint4 a[kBatch][kChunks][2];
        load_a(a, ad, chunk, columns, 0, first + warp);
        if (!pass) before();
        const int chunks = min(kChunks, ad.chunk_count - chunk);
        bool mixed = false;
#pragma unroll
        for (int c = 0; c < kChunks; ++c) mixed |= c < chunks && (ad.chunks[chunk + c].a_f16 != 0) != kF16;
        float2* const own = scratch + warp * kElements;
        if (!mixed) {
          multiply<false, kTiles>(a, true, ad, chunk, columns, kF16, 0, own);
        } else {
#pragma unroll 1
          for (int i = 0; i < chunks * (kTiles / kFew); ++i) {
            const int c = i / (kTiles / kFew);
            uint4 some[1][1][2];
            multiply<true, kFew>(some, false, ad, chunk + c, columns, ad.chunks[chunk + c].a_f16 != 0,
                                 i % (kTiles / kFew) * kFew, own + c * kTiles * 4 * 16);
          }
        }
        if (pass >= 2) wait_for(pass - 2);
        const uint32_t given_barrier = given_full + pass % 2 * 8, h_barrier = h_full + pass % 2 * 8;
        if (thread == 0) {
          const int tokens = (args.m + kSlices - 1 - rank) / kSlices;  // that the block adds up
          ptx::barrier_expect_bytes(given_barrier, tokens * chunks * 16 * kSlices * static_cast<int>(sizeof(float)));
          ptx::barrier_expect_bytes(h_barrier, args.m * chunks * (ad.up_columns / ad.chunk_count) * 2);
        }
        ptx::named_sync(2, kFinishers);
        float* const given_here = given + pass % 2 * kGiven;
#pragma unroll
        for (int e = thread; e < kElements; e += kFinishers) {
          const int r = e % 16, pair = e / 16 % (kTokens / 2), c = e / 16 / (kTokens / 2);
          float2 value = {0.f, 0.f};
#pragma unroll
          for (int w = 0; w < kWarps; ++w) {
            const float2 some = scratch[w * kElements + e];
            value.x += some.x;
            value.y += some.y;
          }
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int m = pair * 2 + i;
            if (m < args.m && c < chunks) {
              ptx::store_async_cluster(
                  ptx::shared_address(given_here + ((rank * kChunks + c) * kTiles + m / kSlices) * 16 + r),
                  given_barrier, m % kSlices, __float_as_uint(i ? value.y : value.x));
            }
          }
        }
        ptx::named_sync(2, kFinishers);  // the scratch has been read
        finish(ad, p.h_at[member], p.h_pitch[member], chunk, chunks, exponent, given_here, given_barrier, h_barrier,
               pass, maxima);
      }
    }
    if (!pass) before();
    return pass;
  }

  // A half warp has a token of the block's and 16 ranks.
  __device__ __forceinline__ void finish(const AdapterView& ad, int h_at, int h_pitch, int chunk, int chunks,
                                         int exponent, const float* given, uint32_t given_barrier, uint32_t h_barrier,
                                         int pass, const uint32_t* maxima) const {
    if (thread >= kChunks * kTiles * 16) return;
    const int r = thread % 16, c = thread / 16 / kTiles, m = rank + thread / 16 % kTiles * kSlices;
    const bool present = m < p.prepare.m && c < chunks;
    const Chunk of = ad.chunks[chunk + (present ? c : 0)];
    const float scale = ad.scale[of.slot];
    ptx::barrier_wait(maxima_full, 0);
    uint32_t full = 0;
#pragma unroll
    for (int s = 0; s < kSlices; ++s) full = max(full, present ? maxima[s * kTokens + m] : 0);
    const int power = power_of_row(exponent, decode16(static_cast<uint16_t>(full), kF16));
    ptx::barrier_wait(given_barrier, pass / 2 & 1);
    float value = 0.f;
#pragma unroll
    for (int s = 0; s < kSlices; ++s) value += given[((s * kChunks + c) * kTiles + thread / 16 % kTiles) * 16 + r];
    const float v = r < of.ranks ? scalbnf(value * scale, -of.exponent - power) : 0.f;
    const uint16_t high = encode16(v, of.b_f16);
    const uint16_t low = r < of.ranks ? encode16(v - decode16(high, of.b_f16), of.b_f16) : 0;
    const uint32_t both = high | static_cast<uint32_t>(low) << 16;
    const uint32_t other = __shfl_xor_sync(~0u, both, 1);
    // Of two lanes one sends to half of the cluster, the other to the rest.
    const uint32_t even = r % 2 ? other : both, odd = r % 2 ? both : other;
    const uint32_t highs = __byte_perm(even, odd, 0x5410), lows = __byte_perm(even, odd, 0x7632);
    if (!present) return;
    const uint32_t to = base + h_at + m * h_pitch + (of.up + r / 2 * 2) * 2;
#pragma unroll
    for (int s = 0; s < kSlices / 2; ++s) {
      const int block = r % 2 * (kSlices / 2) + s;
      ptx::store_async_cluster(to, h_barrier, block, highs);
      if (of.split) {
        ptx::store_async_cluster(to + kChunkRank * 2, h_barrier, block, lows);
        ptx::store_async_cluster(to + kChunkRank * 4, h_barrier, block, highs);
      }
    }
  }
};

// 16 rows of W from `first` to `end`, 8 tokens from first_token on: what is in y beside the int32 sums.
struct Update {
  float value[4];  // of h.B^T
  float2 channel[2];

  // ready: waits for h.
  template <class Ready>
  __device__ __forceinline__ void load(const GemmArgs& args, const GemmMember& out, const float* bias, int first,
                                       int end, int first_token, const uint8_t* h, int h_pitch, Ready&& ready) {
    constexpr int kSteps = 4;  // of B on their way at a time
    const AdapterView& ad = out.adapters;
    const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int n = first + g + 8 * i;
      channel[i] = {n < end ? out.scale[n] : 0.f, n < end && bias ? bias[n] : 0.f};
    }
#pragma unroll
    for (int c = 0; c < 4; ++c) value[c] = 0.f;
    const int pitch = ad.up_columns * 2, steps = ad.up_columns / 16;
    const uint8_t* const b = reinterpret_cast<const uint8_t*>(ad.b) + t * 8;
    const uint8_t* const one = b + static_cast<int64_t>(first + g < end ? first + g : first) * pitch;
    const uint8_t* const two = first + g + 8 < end ? one + 8 * pitch : one;
    h += (first_token + g) * h_pitch + t * 8;
    uint32_t f16 = 0;
#pragma unroll 1
    for (int some = 0; some < steps; some += kSteps) {
      uint2 low[kSteps], high[kSteps];
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        low[i] = high[i] = {0, 0};
        if (some + i < steps) {
          low[i] = __ldcg(reinterpret_cast<const uint2*>(one + (some + i) * 32));
          high[i] = __ldcg(reinterpret_cast<const uint2*>(two + (some + i) * 32));
        }
      }
      if (some % 32 == 0) f16 = half_steps(ad, some, steps);
      if (some == 0) ready();
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        if (some + i >= steps) break;
        const uint32_t operand[4] = {low[i].x, high[i].x, low[i].y, high[i].y};
        const uint2 token = *reinterpret_cast<const uint2*>(h + (some + i) * 32);
        if (f16 >> ((some + i) % 32) & 1)
          ptx::mma_f16(value, operand, token.x, token.y);
        else
          ptx::mma_bf16(value, operand, token.x, token.y);
      }
    }
    // The biases of the slots, where the linear's own is all that `bias` has.
    const int slots = args.row_slot ? 0 : ad.slot_count;
#pragma unroll 1
    for (int some = 0; some < slots; some += 32) {
      uint32_t biased = __ballot_sync(~0u, some + lane < slots && ad.has_bias[some + lane]);
#pragma unroll 1
      for (; biased; biased &= biased - 1) {
        const int slot = some + __ffs(static_cast<int>(biased)) - 1;
        const float scale = ad.scale[slot];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int n = first + g + 8 * i;
          if (n < end) channel[i].y += scale * ad.slot_bias[static_cast<int64_t>(slot) * out.n + n];
        }
      }
    }
  }
};

// kTokens: M rounded up. kSubs: 64-row pieces of a tile, rounded up to 2 or 4.
template <class X, int kTokens, int kSubs>
__global__ __launch_bounds__(kThreads) void stream_sliced(const __grid_constant__ Slice p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr int kTiles = kTokens / 8, kSums = kTokens / 2;
  using Ranks = Down<X, kTokens>;
  extern __shared__ __align__(1024) uint8_t memory[];
  const uint32_t base = ptx::shared_address(memory), barriers = base + p.barriers_at;
  const auto full = [&](int stage) { return barriers + stage * 16; };
  const auto empty = [&](int stage) { return barriers + stage * 16 + 8; };
  const uint32_t maxima_full = barriers + kMaxStages * 16, h_full = maxima_full + 8, given_full = h_full + 16,
                 sums_full = given_full + 16, sums_free = sums_full + 8;
  // The same in all lanes, and known to be: descriptors are then computed in uniform registers.
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32, 0), lane = static_cast<int>(threadIdx.x) % 32;
  const int rank = static_cast<int>(ptx::cluster_rank());
  const int cluster = static_cast<int>(blockIdx.x) / kSlices, clusters = static_cast<int>(gridDim.x) / kSlices;
  const int first_block = rank * p.k_blocks / kSlices, blocks = (rank + 1) * p.k_blocks / kSlices - first_block;
  const int tiles = p.first_tile[p.gemm.member_count], octets = (p.gemm.m + 7) / 8;
  const auto member_of = [&](int tile) {
    int member = 0;
    while (tile >= p.first_tile[member + 1]) ++member;
    return member;
  };
  // Rows of W, of which the last may be fewer.
  struct Tile {
    int member, first, rows;
  };
  const auto tile_at = [&](int tile) {
    const int member = member_of(tile), first = (tile - p.first_tile[member]) * p.tile_rows;
    return Tile{member, first, min(p.tile_rows, p.gemm.member[member].n - first)};
  };
  const uint32_t* const maxima = reinterpret_cast<const uint32_t*>(memory + p.maxima_at);  // [block][token]

  if (threadIdx.x == 0) {
    for (int stage = 0; stage < p.stages; ++stage) {
      ptx::barrier_init(full(stage), 1);
      ptx::barrier_init(empty(stage), 1);
    }
    ptx::barrier_init(maxima_full, 1);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      ptx::barrier_init(h_full + i * 8, 1);
      ptx::barrier_init(given_full + i * 8, 1);
    }
    ptx::barrier_init(sums_full, 1);
    ptx::barrier_init(sums_free, kSlices);
    ptx::barrier_init_fence();
    ptx::barrier_expect_bytes(maxima_full, p.gemm.m * kSlices * static_cast<int>(sizeof(uint32_t)));
  }
  __syncthreads();
  ptx::cluster_arrive_relaxed();
  launch_dependents();

  const auto multiply = [&] {
    int stage = 0;
    uint32_t phase = 0, turn = 0;
    const auto release = [&](int which) {
      if (threadIdx.x == 0) ptx::barrier_arrive(empty(which));
    };
    for (int tile = cluster; tile < tiles; tile += clusters, turn ^= 1) {
      const int row_tiles = (tile_at(tile).rows + 15) / 16;
      int32_t sum[kSubs][kSums];
#pragma unroll
      for (int i = 0; i < kSubs * kSums; ++i) sum[i / kSums][i % kSums] = 0;
      int previous = 0;
      for (int block = 0; block < blocks; ++block) {
        const uint32_t w_tile = base + stage * p.stage_bytes;
        const uint64_t x = ptx::wgmma_descriptor(base + p.q_at + block * kTokens * 128);
        ptx::barrier_wait(full(stage), phase);
        ptx::wgmma_fence();
#pragma unroll
        for (int sub = 0; sub < kSubs; ++sub) {
          const uint64_t w = ptx::wgmma_descriptor(w_tile + sub * 64 * 128);
#pragma unroll
          for (int k = 0; k < 4; ++k) ptx::wgmma_s8(sum[sub], w + 2 * k, x + 2 * k, true);
        }
        ptx::wgmma_commit();
        if (block) {
          ptx::wgmma_wait<1>();
          release(previous);
        }
        previous = stage;
        if (++stage == p.stages) stage = 0, phase ^= 1;
      }
      ptx::wgmma_wait<0>();
      if (blocks) release(previous);
      ptx::barrier_wait(sums_free, turn);
#pragma unroll
      for (int sub = 0; sub < kSubs; ++sub) {
        const int row_tile = sub * 4 + warp;
        if (row_tile >= row_tiles) continue;
        const int owner = (row_tile * kSlices + kSlices - 1) / row_tiles;
        const int at = (rank * p.fragments + (row_tile - owner * row_tiles / kSlices) * octets) * 32 + lane;
        const uint32_t to = ptx::cluster_address(base + p.received_at + at * 16, owner),
                       on = ptx::cluster_address(sums_full, owner);
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
          uint4 bits;
          memcpy(&bits, &sum[sub][4 * j], sizeof bits);
          if (j < octets) ptx::store_async_cluster(to + j * 512, on, bits);
        }
      }
    }
  };

  if (warp < kConsumers / 32 || warp >= (kConsumers + kFinishers) / 32) {
    const bool consumer = warp < kConsumers / 32, producer = threadIdx.x == kConsumers + kFinishers;
    const uint64_t policy = ptx::evict_first();
    int tile = cluster, block = 0;
    const auto load = [&](const Tile& at, int stage) {
      ptx::barrier_expect_bytes(full(stage), p.tile_rows * 128);
      ptx::tensor_load_hinted(base + stage * p.stage_bytes, &p.w[at.member], (first_block + block) * 128, at.first,
                              full(stage), policy);
    };
    if (producer) {
      for (int stage = 0; stage < p.stages && tile < tiles && blocks; ++stage) {
        load(tile_at(tile), stage);
        if (++block == blocks) tile += clusters, block = 0;
      }
    }
    __syncwarp();
    ptx::cluster_wait();  // the barriers of all blocks are there
    wait_for_primaries();
    quantize_slice<X, kTokens>(p, first_block, blocks, rank, consumer ? warp : warp - kWarps,
                               reinterpret_cast<uint2*>(memory + p.q_at), maxima, maxima_full);
    ptx::fence_async_shared();
    if (consumer) {
      ptx::named_sync(1, kQuantizers);
      multiply();
    } else {
      ptx::named_arrive(1, kQuantizers);
      if (producer) {
        int stage = 0;
        uint32_t phase = 0;
        while (tile < tiles && blocks) {
          const Tile at = tile_at(tile);
          for (; block < blocks; ++block) {
            ptx::barrier_wait(empty(stage), phase);
            load(at, stage);
            if (++stage == p.stages) stage = 0, phase ^= 1;
          }
          tile += clusters, block = 0;
        }
      }
      __syncwarp();
    }
  } else {
    const int thread = static_cast<int>(threadIdx.x) - kConsumers, index = warp - kConsumers / 32;
    float2* const rows = reinterpret_cast<float2*>(memory + p.rows_at);  // {s_x / p, p} of the tokens
    // Adapters are written by kernels that are launched like any others, let nothing start before they end, and end
    // with a fence. So each block brings some of A into L2 before the memory is busy.
    for (int member = 0; member < p.prepare.member_count; ++member) {
      const AdapterView& ad = p.prepare.member[member].adapters;
      const int64_t lines = static_cast<int64_t>(ad.down_columns / 8) * ((p.prepare.k + 31) / 32) * 4;
      for (int64_t i = static_cast<int64_t>(blockIdx.x) * kFinishers + thread; i < lines; i += gridDim.x * kFinishers)
        prefetch_l2(ad.a + i * 8);
    }
    // The rows of a tile that this block finishes, in sixteens.
    const auto first_own = [&](const Tile& at) { return rank * ((at.rows + 15) / 16) / kSlices; };
    const auto own_count = [&](const Tile& at) { return (rank + 1) * ((at.rows + 15) / 16) / kSlices - first_own(at); };
    if (cluster < tiles) {  // and the rows of B that it needs first
      const Tile at = tile_at(cluster);
      const AdapterView& ad = p.gemm.member[at.member].adapters;
      const int pitch = ad.up_columns * 2, first = first_own(at) * 16;
      const uint8_t* const b = reinterpret_cast<const uint8_t*>(ad.b) + static_cast<int64_t>(at.first + first) * pitch;
      const int bytes = min(own_count(at) * 16, at.rows - first) * pitch;
      for (int i = thread * 128; i < bytes; i += kFinishers * 128) prefetch_l2(b + i);
    }
    int exponent = INT_MIN;
    const Ranks ranks{p,
                      rank,
                      index,
                      lane,
                      thread,
                      (p.prepare.k + 31) / 32,
                      first_block * 4,
                      min((p.prepare.k + 31) / 32, (first_block + blocks) * 4),
                      base,
                      h_full,
                      given_full,
                      maxima_full};
    const int passes = ranks.run(reinterpret_cast<float2*>(memory + p.received_at),
                                 reinterpret_cast<float*>(memory + p.given_at), maxima, exponent, [&] {
                                   ptx::cluster_wait();
                                   wait_for_primaries();
                                   exponent = __reduce_max_sync(~0u, largest_exponent(p.prepare, 0, lane, 32));
                                 });
    ptx::barrier_wait(maxima_full, 0);
    if (thread < p.gemm.m) {
      uint32_t largest = 0;
#pragma unroll
      for (int s = 0; s < kSlices; ++s) largest = max(largest, maxima[s * kTokens + thread]);
      const float power =
          scalbnf(1.f, power_of_row(exponent, decode16(static_cast<uint16_t>(largest), std::is_same_v<X, __half>)));
      rows[thread] = {RowQuantizer::of<X>(p.prepare.spec, largest).scale / power, power};
    }
    // The sums of a tile may come: what shared memory had in their place is read.
    const auto ask_for = [&](const Tile& at) {
      ptx::named_sync(2, kFinishers);
      if (index == 0) {
        const int bytes = own_count(at) * octets * 512 * kSlices;
        if (lane == 0 && bytes) ptx::barrier_expect_bytes(sums_full, bytes);
        __syncwarp();
        if (lane < kSlices) ptx::barrier_arrive_cluster(sums_free, lane);
      }
    };
    uint32_t phase = 0;
    if (cluster < tiles) ask_for(tile_at(cluster));
    for (int tile = cluster; tile < tiles; tile += clusters) {
      const Tile at = tile_at(tile);
      const GemmMember& out = p.gemm.member[at.member];
      const int fragments = own_count(at) * octets, part = index % octets;
      const int first = at.first + (first_own(at) + index / octets) * 16, end = at.first + at.rows;
      int32_t total[4] = {};
      Update update;
      if (index < fragments) {
        update.load(p.gemm, out, p.bias[at.member], first, end, part * 8, memory + p.h_at[at.member],
                    p.h_pitch[at.member], [&] {
                      if (passes > 1) ranks.wait_for(passes - 2);
                      ranks.wait_for(passes - 1);
                    });
        ptx::barrier_wait(sums_full, phase);
        const uint32_t from = base + p.received_at + (index * 32 + lane) * 16;
#pragma unroll
        for (int s = 0; s < kSlices; ++s) {
          const uint4 bits = ptx::load_shared_16(from + s * p.fragments * 512);
          total[0] += static_cast<int32_t>(bits.x);
          total[1] += static_cast<int32_t>(bits.y);
          total[2] += static_cast<int32_t>(bits.z);
          total[3] += static_cast<int32_t>(bits.w);
        }
      }
      if (fragments) phase ^= 1;
      if (tile + clusters < tiles) ask_for(tile_at(tile + clusters));
      if (index >= fragments) continue;
      const float4* const tokens = reinterpret_cast<const float4*>(rows) + part * 4 + lane % 4;
      float value[1][4];
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const float product =
            static_cast<float>(total[c]) * ((c % 2 ? tokens->z : tokens->x) * update.channel[c / 2].x);
        value[0][c] = passes ? product + update.value[c] : product;
      }
      if (has_epilogue(p.gemm, out))
        store_fragments<1, true>(p.gemm, out, value, update.channel, tokens, first, end, part * 8);
      else
        store_fragments<1, false>(p.gemm, out, value, update.channel, tokens, first, end, part * 8);
    }
  }
  __syncwarp();
  ptx::cluster_arrive_relaxed();
  ptx::cluster_wait();  // a block's shared memory outlives what its peers send
#endif
}

using Kernel = void (*)(Slice);

template <class X, int kTokens>
Kernel kernel_for(int subs) {
  return subs == 2 ? stream_sliced<X, kTokens, 2> : stream_sliced<X, kTokens, 4>;
}

template <class X>
Kernel kernel_for(int tokens, int subs) {
  switch (tokens) {
    case 8:
      return kernel_for<X, 8>(subs);
    case 16:
      return kernel_for<X, 16>(subs);
    case 32:
      return kernel_for<X, 32>(subs);
    default:
      return stream_sliced<X, 64, 2>;
  }
}

Kernel kernel_for(Dtype x_type, int tokens, int subs) {
  return x_type == Dtype::f16 ? kernel_for<__half>(tokens, subs) : kernel_for<__nv_bfloat16>(tokens, subs);
}

// ---- Dispatch
// --------------------------------------------------------------------------------------------------------

struct Plan {
  int tokens, clusters, tile_rows, tiles, subs;
  int stages, stage_bytes, fragments;
  int h_at[kMaxMembers], h_pitch[kMaxMembers];
  int q_at, received_at, given_at, maxima_at, rows_at, barriers_at, shared_bytes;
};

static_assert(sizeof(Slice) <= 4096, "kernel parameters");
constexpr int kFewStages = 3;
// What all clusters read of x and A from L2, for each byte of W; where it is more, each is better read once.
constexpr double kMostFromL2 = 1.5;

// stages 0: the kernel does not take the call.
Plan plan_of(const PrepareArgs& prepare, const GemmArgs& gemm, const Limits& limits) {
  Plan plan{};
  plan.clusters = limits.sliced_clusters;
  if (prepare.spec.mode == Mode::w8a16 || gemm.row_slot || !plan.clusters) return plan;
  plan.tokens = decode_tokens(gemm.m);
  const int most_rows = plan.tokens == 64 ? 128 : 256;
  int64_t total_n = 0;
  for (int i = 0; i < gemm.member_count; ++i) total_n += gemm.member[i].n;
  const auto tiles_of = [&](int rows) {
    int tiles = 0;
    for (int i = 0; i < gemm.member_count; ++i) tiles += (gemm.member[i].n + rows - 1) / rows;
    return tiles;
  };
  // The lowest tiles of which no cluster has more turns than of the highest.
  const int turns = (tiles_of(most_rows) + plan.clusters - 1) / plan.clusters;
  const int64_t most = static_cast<int64_t>(turns) * plan.clusters;
  plan.tile_rows = static_cast<int>(std::max<int64_t>(16, round_up64((total_n + most - 1) / most, 8)));
  while (plan.tile_rows < most_rows && tiles_of(plan.tile_rows) > most) plan.tile_rows += 8;
  plan.tile_rows = std::min(plan.tile_rows, most_rows);
  plan.tiles = tiles_of(plan.tile_rows);
  plan.clusters = std::min(plan.tiles, plan.clusters);
  plan.subs = plan.tile_rows > 128 ? 4 : 2;

  const int k_blocks = (gemm.k + kBlockK - 1) / kBlockK;
  const int row_tiles = (plan.tile_rows + 15) / 16, octets = (gemm.m + 7) / 8;
  plan.fragments = (row_tiles + kSlices - 1) / kSlices * octets;
  plan.stage_bytes = round_up(plan.tile_rows * 128, 1024);
  int at = 0;
  const auto take = [&](int bytes) {
    at += round_up(bytes, 16);
    return at - round_up(bytes, 16);
  };
  plan.q_at = take((k_blocks + kSlices - 1) / kSlices * plan.tokens * 128);
  int passes = 0, down_columns = 0;
  for (int i = 0; i < gemm.member_count; ++i) {
    const AdapterView& ad = gemm.member[i].adapters;
    const int columns = ad.up_columns;
    if (!columns) continue;
    passes += (ad.chunk_count + chunks_at_once(plan.tokens) - 1) / chunks_at_once(plan.tokens);
    down_columns += ad.down_columns;
    // A row is 32 or 96 bytes beyond a multiple of 128, so that eight rows lie in different banks.
    plan.h_pitch[i] = columns * 2 + (columns % 32 == 0 ? 32 : 0);
    const int64_t bytes = static_cast<int64_t>(plan.h_pitch[i]) * plan.tokens;
    if (bytes > limits.shared_bytes) return plan;
    plan.h_at[i] = take(static_cast<int>(bytes));
    if (at > limits.shared_bytes) return plan;
  }
  if (plan.clusters * 2.0 * (gemm.m * (1.0 + passes) + down_columns) > kMostFromL2 * static_cast<double>(total_n))
    return plan;
  const int pass = chunks_at_once(plan.tokens) * plan.tokens * 16 * static_cast<int>(sizeof(float));
  plan.received_at = take(std::max(kSlices * plan.fragments * 512, passes ? pass * kWarps : 0));
  plan.given_at = take(passes ? 2 * pass : 0);
  plan.maxima_at = take(kSlices * plan.tokens * static_cast<int>(sizeof(uint32_t)));
  plan.rows_at = take(kMaxTokens * 8);
  plan.barriers_at = take(kBarriers * 8);
  // A wgmma reads 64 rows whatever the tile has.
  const int reach = plan.subs * 64 * 128;
  const int left = limits.shared_bytes - at;
  int stages = std::min(kMaxStages, left / plan.stage_bytes);
  while (stages > 0 && (stages - 1) * plan.stage_bytes + reach > left) --stages;
  plan.stages = stages < kFewStages ? 0 : stages;
  const int ring = round_up(std::max(stages * plan.stage_bytes, (stages - 1) * plan.stage_bytes + reach), 1024);
  if (ring > left) {
    plan.stages = 0;
    return plan;
  }
  for (int* const place :
       {&plan.q_at, &plan.received_at, &plan.given_at, &plan.maxima_at, &plan.rows_at, &plan.barriers_at})
    *place += ring;
  for (int i = 0; i < gemm.member_count; ++i) plan.h_at[i] += ring;
  plan.shared_bytes = at + ring;
  return plan;
}

}  // namespace

void set_up_decode_sliced(Limits& limits) {
  for (const Dtype type : {Dtype::bf16, Dtype::f16}) {
    for (const int tokens : {8, 16, 32, 64}) {
      for (const int subs : {2, 4}) {
        share_memory(kernel_for(type, tokens, subs), limits.shared_bytes, "decode in slices");
      }
    }
  }
  const DependentLaunch launch(kSlices, kThreads, kSlices, limits.shared_bytes, nullptr);
  cudaLaunchConfig_t config = launch.config;
  cudaLaunchAttribute cluster = launch.attributes[1];
  config.attrs = &cluster;
  config.numAttrs = 1;
  OCTOLORA_CUDA(cudaOccupancyMaxActiveClusters(&limits.sliced_clusters, stream_sliced<__nv_bfloat16, 64, 2>, &config),
                "decode in slices: clusters of %d", kSlices);
  if (limits.sliced_clusters * kSlices * 10 < limits.multiprocessors * 9) limits.sliced_clusters = 0;
}

bool decode_sliced_takes(const PrepareArgs& prepare, const GemmArgs& gemm, const Limits& limits) {
  return plan_of(prepare, gemm, limits).stages > 0;
}

void launch_decode_sliced(const PrepareArgs& prepare, const GemmArgs& gemm, const Limits& limits, cudaStream_t stream) {
  const Plan plan = plan_of(prepare, gemm, limits);
  Slice s{};
  for (int i = 0; i < gemm.member_count; ++i) {
    const GemmMember& member = gemm.member[i];
    s.bias[i] = prepare.member[i].total_bias ? prepare.member[i].bias : member.bias;
    s.w[i] = tensor_map(member.weight, gemm.k_pitch, member.n, gemm.k_pitch, plan.tile_rows);
    s.first_tile[i + 1] = s.first_tile[i] + (member.n + plan.tile_rows - 1) / plan.tile_rows;
    s.h_at[i] = plan.h_at[i];
    s.h_pitch[i] = plan.h_pitch[i];
  }
  s.prepare = prepare;
  s.gemm = gemm;
  s.tile_rows = plan.tile_rows;
  s.k_blocks = (gemm.k + kBlockK - 1) / kBlockK;
  s.stages = plan.stages;
  s.stage_bytes = plan.stage_bytes;
  s.fragments = plan.fragments;
  s.q_at = plan.q_at;
  s.received_at = plan.received_at;
  s.given_at = plan.given_at;
  s.maxima_at = plan.maxima_at;
  s.rows_at = plan.rows_at;
  s.barriers_at = plan.barriers_at;
  const DependentLaunch launch(plan.clusters * kSlices, kThreads, kSlices, plan.shared_bytes, stream);
  OCTOLORA_CUDA(cudaLaunchKernelEx(&launch.config, kernel_for(prepare.x_type, plan.tokens, plan.subs), s),
                "decode in slices: M = %d, K = %d, %d tiles of %d rows", gemm.m, gemm.k, plan.tiles, plan.tile_rows);
}

void describe_decode_sliced(const PrepareArgs& prepare, const GemmArgs& gemm, const Limits& limits, Explanation& to) {
  const Plan plan = plan_of(prepare, gemm, limits);
  int columns = 0;
  for (int i = 0; i < prepare.member_count; ++i) columns += prepare.member[i].adapters.down_columns;
  to.launch(
      "wgmma s8 for few rows, all in one launch: %d tokens x %d rows of W, %d tiles, K divided by the %d blocks of a "
      "cluster, %d stages; each cluster quantizes x and makes %d ranks of x.A^T",
      plan.tokens, plan.tile_rows, plan.tiles, kSlices, plan.stages, columns);
}

}  // namespace octolora::cuda
