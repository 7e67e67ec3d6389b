// SPDX-License-Identifier: Apache-2.0
//
// Few rows (M <= 64) on Hopper: the weights are read once, at the speed of memory, and everything else hides behind
// that stream.
//
//   y[m,n] = p[m] * ( s_w[n] * (s_x[m] / p[m]) * sum_k q[m,k] W[n,k] + sum_r h[m,r] B[n,r] ) + bias[n]
//
//   q, s_x, p and h from prepare_few.cu. W8A16 multiplies x itself by widened weights.
//
// The kernel is a programmatic dependent of prepare_few: it fills its shared memory with weights, which do not hang on
// x, while that one still runs. The roles of the operands are swapped: weights are the 64 rows of a wgmma, tokens its 8
// to 64 columns. A block has up to 256 rows of W and a share of K; the blocks of a cluster have the same rows and the
// other shares, and add up through distributed shared memory in a fixed order. A warp then has 16 rows as mma
// fragments, takes the low-rank update onto them and stores.
//
// A stage is 128 values of K: 128 bytes of each row of W and 128 (W8A8) or 256 (W8A16) bytes of each token. One warp is
// the producer; three others fetch h and what a tile's channels need; two warpgroups multiply, 64 rows each at a time,
// or where a tile has no more than 64 every other stage each. With row_slot a token takes the ranks of its own slot
// alone. What runs once a tile is kept short and free of divisions.
#include <cuda.h>

#include <algorithm>
#include <cstring>

#include "check.h"
#include "convert.cuh"
#include "dependent_launch.cuh"
#include "epilogue.cuh"
#include "kernels.h"
#include "ptx.cuh"
#include "tensor_map.h"
#include "wgmma_narrow.cuh"

namespace octolora::cuda {

namespace {

constexpr int kMaxTokens = kDecodeRows;
constexpr int kBlockK = 128;

enum class Kind { s8, bf16, f16 };

constexpr int kConsumers = 256, kHelpers = 96;  // threads; between them the warp of the producer
constexpr int kStreamThreads = kConsumers + 32 + kHelpers;
constexpr int kMaxTileRows = 256, kMaxStages = 16, kMaxSplits = 8;

struct Stream {
  CUtensorMap x;  // W8A16
  CUtensorMap w[kMaxMembers];
  GemmArgs gemm;
  const float* bias[kMaxMembers];   // of the linear alone, or null
  int tile_rows;                    // of W, a multiple of 8
  int first_tile[kMaxMembers + 1];  // of each member
  int splits;                       // of K: blocks in a cluster
  int k_blocks;
  int stages, stage_bytes;
  int held;                                                   // stages that the sums of a tile take
  int h_pitch;                                                // bytes
  int h_at, own_at, b_at, rows_at, channels_at, barriers_at;  // in shared memory; b_at 0: B is read where it is
};

// Where rows name their slots, the 16-column steps of a token's slot in b and h.
struct Own {
  int first;
  uint32_t count;  // kLead: no token before it in its eight has this slot; kF16: of b
};
constexpr int kAtOnce = 4;  // tokens whose steps of b are on their way together
constexpr uint32_t kLead = 1u << 31, kF16Own = 1u << 30, kCount = kF16Own - 1;

// Thread `token` of whole warps.
[[maybe_unused]] __device__ __forceinline__ Own own_steps(const Stream& p, const AdapterView& ad, int token) {
  const int slot = token < p.gemm.m ? p.gemm.row_slot[token] : -1, steps = ad.up_columns / 16 / ad.chunk_count;
  Own own{-1, 0};
#pragma unroll 4
  for (int i = 0; i < ad.chunk_count; ++i) {
    if (ad.chunks[i].slot != slot) continue;
    if (own.first < 0) own = {i * steps, ad.chunks[i].b_f16 ? kF16Own : 0};
    own.count += static_cast<uint32_t>(steps);
  }
  bool lead = own.first >= 0;
#pragma unroll
  for (int i = 1; i < 8; ++i) {
    const int other = __shfl_up_sync(~0u, own.first, i, 8);
    lead = lead && (token % 8 < i || other != own.first);
  }
  if (lead) own.count |= kLead;
  return own;
}

// h of one member into shared memory [token][h_pitch bytes]; with `own`, of each token its own columns alone. What
// `meanwhile` does happens while the first of it is on its way.
template <class Meanwhile>
__device__ __forceinline__ void copy_h(const Stream& p, int member, uint8_t* h, const Own* own, int thread,
                                       Meanwhile&& meanwhile) {
  constexpr int kFirst = 6;
  const AdapterView& ad = p.gemm.member[member].adapters;
  const int row = ad.up_columns / 8, pieces = (own ? ad.slot_columns : ad.up_columns) / 8;  // of 16 bytes
  const int wide = 32 - __clz(pieces - 1), count = p.gemm.m << wide;
  const uint4* const from = reinterpret_cast<const uint4*>(p.gemm.member[member].h);
  struct Place {
    int from, to;  // from negative: nothing
  };
  const auto place = [&](int i) {
    const int m = i >> wide, piece = i & ((1 << wide) - 1);
    if (i >= count || piece >= pieces || (own && piece >= static_cast<int>(own[m].count & kCount) * 2))
      return Place{-1, 0};
    return Place{m * row + (own ? own[m].first * 2 : 0) + piece, m * p.h_pitch + piece * 16};
  };
  uint4 bits[kFirst];
#pragma unroll
  for (int i = 0; i < kFirst; ++i) {
    const Place at = place(thread + i * kHelpers);
    if (at.from >= 0) bits[i] = __ldcg(from + at.from);
  }
  meanwhile();
#pragma unroll
  for (int i = 0; i < kFirst; ++i) {
    const Place at = place(thread + i * kHelpers);
    if (at.from >= 0) *reinterpret_cast<uint4*>(h + at.to) = bits[i];
  }
#pragma unroll 4
  for (int i = thread + kFirst * kHelpers; i < count; i += kHelpers) {
    const Place at = place(i);
    if (at.from >= 0) *reinterpret_cast<uint4*>(h + at.to) = __ldcg(from + at.from);
  }
}

// {s_w, bias} of the channels of a tile.
[[maybe_unused]] __device__ __forceinline__ void gather_channels(const Stream& p, int member, int first,
                                                                 float2* channels, int thread) {
  constexpr int kEach = (kMaxTileRows + kHelpers - 1) / kHelpers;
  const GemmMember& out = p.gemm.member[member];
  const AdapterView& ad = out.adapters;
  const float* const bias = p.bias[member];
  float2 channel[kEach];
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int at = thread + i * kHelpers, n = first + at;
    const bool present = at < p.tile_rows && n < out.n;
    channel[i] = {present ? out.scale[n] : 0.f, present && bias ? bias[n] : 0.f};
  }
  const int slots = p.gemm.row_slot ? 0 : ad.slot_count;
#pragma unroll 1
  for (int some = 0; some < slots; some += 32) {
    const int lane = thread % 32;
    uint32_t biased = __ballot_sync(~0u, some + lane < slots && ad.has_bias[some + lane]);
#pragma unroll 1
    for (; biased; biased &= biased - 1) {
      const int slot = some + __ffs(static_cast<int>(biased)) - 1;
#pragma unroll 1
      for (int i = 0; i < kEach; ++i) {
        const int at = thread + i * kHelpers, n = first + at;
        if (at >= p.tile_rows || n >= out.n) continue;
        const float more = ad.scale[slot] * ad.slot_bias[static_cast<int64_t>(slot) * out.n + n];
        channel[0].y += i == 0 ? more : 0.f;
        channel[1].y += i == 1 ? more : 0.f;
        channel[2].y += i == 2 ? more : 0.f;
      }
    }
  }
  static_assert(kEach == 3);
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int at = thread + i * kHelpers;
    if (at < p.tile_rows) channels[at] = channel[i];
  }
}

// Bit i: the 16 ranks of step first + i are fp16.
__device__ __forceinline__ uint32_t half_steps(const AdapterView& ad, int first, int steps) {
  const int step = first + static_cast<int>(threadIdx.x) % 32;
  return __ballot_sync(~0u, step < steps && ad.chunks[step * ad.chunk_count / steps].b_f16);
}

// 16 rows of W from `first` to `end` of the member, kTiles * 8 tokens from first_token on. value: the sums as mma
// accumulators, row g (and g + 8) of W and tokens 2t, 2t + 1. b: row `first` of B. f16: half_steps of the
// first 32. With kOwn a tile of tokens has steps of its own; without kAfter nothing follows the product.
template <int kTiles, bool kOwn, bool kAfter>
__device__ __forceinline__ void finish(const Stream& p, int member, float (&value)[kTiles][4], int first, int end,
                                       int first_token, const float2* channels, const uint8_t* b, const uint8_t* h,
                                       const float4* rows, const Own* own, uint32_t f16) {
  const GemmMember& out = p.gemm.member[member];
  const AdapterView& ad = out.adapters;
  const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  const bool beyond = first + g + 8 >= end;  // of B there may be no such row
  const float2 channel[2] = {channels[g], channels[g + 8]};
  rows += first_token / 2 + t;
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
    const float4 token = rows[j * 4];
#pragma unroll
    for (int c = 0; c < 4; ++c) value[j][c] *= (c % 2 ? token.z : token.x) * channel[c / 2].x;
  }

  const int pitch = ad.up_columns * 2, steps = ad.up_columns / 16;
  const uint8_t* const one = b + (first + g < end ? g : 0) * pitch + t * 8;
  const uint8_t* const two = beyond ? one : one + 8 * pitch;
  const uint8_t* const token_h = h + (first_token + g) * p.h_pitch + t * 8;
  if constexpr (kOwn) {
    static_assert(kTiles == 1);
    own += first_token;
    const Own mine = own[g];
#pragma unroll 1
    for (int token = 0; token < 8; token += kAtOnce, own += kAtOnce) {
#pragma unroll 1
      for (uint32_t step = 0;; ++step) {
        uint2 low[kAtOnce], high[kAtOnce];
        bool any = false, wanted[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {  // all on their way before the first is used
          const Own of = own[i];
          wanted[i] = (of.count & kLead) && step < (of.count & kCount);
          if (!wanted[i]) continue;
          any = true;
          low[i] = *reinterpret_cast<const uint2*>(one + (of.first + step) * 32);
          high[i] = *reinterpret_cast<const uint2*>(two + (of.first + step) * 32);
        }
        if (!any) break;
        const bool has = step < (mine.count & kCount);
        const uint2 mine_h = has ? *reinterpret_cast<const uint2*>(token_h + step * 32) : uint2{0, 0};
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          if (!wanted[i]) continue;
          const Own of = own[i];
          const uint32_t operand[4] = {low[i].x, high[i].x, low[i].y, high[i].y};
          const bool apply = mine.first == of.first;
          if (of.count & kF16Own)
            ptx::mma_f16(value[0], operand, apply ? mine_h.x : 0, apply ? mine_h.y : 0);
          else
            ptx::mma_bf16(value[0], operand, apply ? mine_h.x : 0, apply ? mine_h.y : 0);
        }
      }
    }
  }
#pragma unroll 1
  for (int some = 0; !kOwn && some < steps; some += 32) {
    if (some) f16 = half_steps(ad, some, steps);
    const int count = min(32, steps - some);
#pragma unroll 2
    for (int step = 0; step < count; ++step) {
      const int at = (some + step) * 32;
      const uint2 low = *reinterpret_cast<const uint2*>(one + at);
      const uint2 high = *reinterpret_cast<const uint2*>(two + at);
      const uint32_t operand[4] = {low.x, high.x, low.y, high.y};
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        const uint2 token = *reinterpret_cast<const uint2*>(token_h + j * 8 * p.h_pitch + at);
        if (f16 >> step & 1)
          ptx::mma_f16(value[j], operand, token.x, token.y);
        else
          ptx::mma_bf16(value[j], operand, token.x, token.y);
      }
    }
  }

  // Lanes of neighbouring rows exchange a token each, so that a lane has two columns of y side by side.
  const Dtype type = p.gemm.y_type;
  const bool odd = g & 1;
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
    const float4 token = rows[j * 4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float v0 = value[j][2 * i] * token.y + channel[i].y, v1 = value[j][2 * i + 1] * token.w + channel[i].y;
      const float got = __shfl_xor_sync(~0u, odd ? v0 : v1, 4);
      value[j][2 * i] = odd ? got : v0;
      value[j][2 * i + 1] = odd ? v1 : got;
    }
  }
  const int m0 = first_token + 2 * t + odd, n0 = first + (g & ~1);
  if constexpr (kAfter) {
    const auto at16 = [&](const void* from, int64_t at) {
      return type == Dtype::f32 ? static_cast<const float*>(from)[at]
                                : decode16(static_cast<const uint16_t*>(from)[at], type == Dtype::f16);
    };
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      const int m = m0 + j * 8, slot = p.gemm.row_slot && m < p.gemm.m ? p.gemm.row_slot[m] : -1;
      const bool biased = slot >= 0 && slot < ad.slot_count && ad.has_bias[slot];
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int n = n0 + c / 2 * 8 + c % 2;
        if (m >= p.gemm.m || n >= end) continue;
        float v = value[j][c];
        if (biased) v += ad.scale[slot] * ad.slot_bias[static_cast<int64_t>(slot) * out.n + n];
        v = activate(v, out.activation);
        if (out.gate) v *= at16(out.gate, n);
        if (out.residual) v += at16(out.residual, static_cast<int64_t>(m) * out.n + n);
        value[j][c] = v;
      }
    }
  }
  const int element = type == Dtype::f32 ? 4 : 2;
  const bool pairs = out.n % 2 == 0 && reinterpret_cast<uintptr_t>(out.y) % (2 * element) == 0;
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
    const int m = m0 + j * 8;
    if (m >= p.gemm.m) break;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int n = n0 + 8 * i;
      uint8_t* const y = static_cast<uint8_t*>(out.y) + (static_cast<int64_t>(m) * out.n + n) * element;
      const float v0 = value[j][2 * i], v1 = value[j][2 * i + 1];
      if (type == Dtype::f32) {
        if (pairs && n < end) {
          *reinterpret_cast<float2*>(y) = {v0, v1};
        } else {
          if (n < end) reinterpret_cast<float*>(y)[0] = v0;
          if (n + 1 < end) reinterpret_cast<float*>(y)[1] = v1;
        }
      } else {
        const uint32_t low = encode16(v0, type == Dtype::f16), high = encode16(v1, type == Dtype::f16);
        if (pairs && n < end) {
          *reinterpret_cast<uint32_t*>(y) = low | high << 16;
        } else {
          if (n < end) reinterpret_cast<uint16_t*>(y)[0] = static_cast<uint16_t>(low);
          if (n + 1 < end) reinterpret_cast<uint16_t*>(y)[1] = static_cast<uint16_t>(high);
        }
      }
    }
  }
}

// kTokens: M rounded up. kShape: 1 or 2, 64-row pieces of a tile for each of the two warpgroups; 0, both have the one
// piece, every other stage of it each. Registers: up to 104 leave room for a block of prepare_few with 96 beside this
// one, up to 112 for one with 88; the others have more to hold.
template <Kind kKind, int kTokens, int kShape>
__global__ __launch_bounds__(kStreamThreads)
    __maxnreg__(kKind == Kind::s8 ? (kTokens < 32 ? 104 : 112)
                : kTokens < 16    ? 104
                : kTokens < 32    ? 120
                : kTokens < 64    ? 136
                                  : 160) void stream(const __grid_constant__ Stream p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr bool kInt8 = kKind == Kind::s8, kInTurn = kShape == 0;
  constexpr int kSubs = kInTurn ? 1 : kShape, kStep = kInTurn ? 2 : 1;
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
  Own* const own = p.gemm.row_slot ? reinterpret_cast<Own*>(memory + p.own_at) : nullptr;
  float2* const rows = reinterpret_cast<float2*>(memory + p.rows_at);          // {s_x / p, p} of the tokens
  float2* const channels = reinterpret_cast<float2*>(memory + p.channels_at);  // {s_w, bias} of the tile
  const uint32_t b_full = barriers + kMaxStages * 16;
  enum { kPair = 1, kReady = 2, kFree = 3, kHelp = 4 };  // named barriers

  if (threadIdx.x == kConsumers) {
    if (!kInt8) ptx::prefetch_map(&p.x);
    ptx::prefetch_map(&p.w[0]);
  }
  if (threadIdx.x == 0) {
    ptx::barrier_init(b_full, 1);
    for (int stage = 0; stage < p.stages; ++stage) {
      ptx::barrier_init(full(stage), 1);
      ptx::barrier_init(empty(stage), kInTurn ? 1 : 2);
    }
    ptx::barrier_init_fence();
  }
  __syncthreads();
  ptx::launch_dependents();

  if (warp == kConsumers / 32) {
    if (lane == 0) {
      const uint64_t policy = ptx::evict_first();
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
        ptx::tensor_load_hinted(base + stage * p.stage_bytes, &p.w[at.member], (first_block + at.block) * 128, at.row,
                                full(stage), policy);
      };
      const auto load_x = [&](int block, int stage) {
        const uint32_t to = base + stage * p.stage_bytes + p.tile_rows * 128;
        if constexpr (kInt8) {
          ptx::bulk_load(to,
                         static_cast<const uint8_t*>(p.gemm.x) + static_cast<int64_t>(first_block + block) * kXBytes,
                         kXBytes, full(stage));
        } else {
#pragma unroll
          for (int box = 0; box < kXBoxes; ++box)
            ptx::tensor_load(to + box * kTokens * 128, &p.x, ((first_block + block) * kXBoxes + box) * 128, 0,
                             full(stage));
        }
      };
      Walk at{cluster, 0, 0, 0};
      enter(at);
      int loaded = 0;
      for (; loaded < p.stages && at.tile < tiles && blocks; ++loaded, step(at)) load_w(at, loaded);
      ptx::wait_for_primaries();
      for (int i = 0, block = 0; i < loaded; ++i) {
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
    if (thread == 0 && cluster < tiles) {
      const int member = member_of(cluster), first = (cluster - p.first_tile[member]) * p.tile_rows;
      const GemmMember& out = p.gemm.member[member];
      const int pitch = out.adapters.up_columns * 2;
      if (pitch) {
        ptx::bulk_prefetch(reinterpret_cast<const uint8_t*>(out.adapters.b) + static_cast<int64_t>(first) * pitch,
                           min(p.tile_rows, out.n - first) * pitch);
      }
    }
    __syncwarp();
    ptx::wait_for_primaries();
    RowScale row{1.f, 1.f};
    if (p.gemm.rows && thread < p.gemm.m) row = p.gemm.rows[thread];
    int copied = -1;
    for (int tile = cluster; tile < tiles; tile += clusters) {
      const int member = member_of(tile), first = (tile - p.first_tile[member]) * p.tile_rows;
      const GemmMember& out = p.gemm.member[member];
      if (tile != cluster) ptx::named_sync(kFree, kConsumers + kHelpers);
      if (thread == 0 && p.b_at && out.adapters.up_columns) {
        const int pitch = out.adapters.up_columns * 2, bytes = min(p.tile_rows, out.n - first) * pitch;
        ptx::fence_async_shared();  // after the reads of the tile before
        ptx::barrier_expect_bytes(b_full, bytes);
        ptx::bulk_load(base + p.b_at,
                       reinterpret_cast<const uint8_t*>(out.adapters.b) + static_cast<int64_t>(first) * pitch, bytes,
                       b_full);
      }
      const auto gather = [&] {
        gather_channels(p, member, first, channels, thread);
        if (tile == cluster && thread < kTokens) rows[thread] = {row.scale / row.power, row.power};
      };
      if (member != copied && out.adapters.chunk_count) {
        if (own) {
          if (thread < kMaxTokens) own[thread] = own_steps(p, out.adapters, thread);
          ptx::named_sync(kHelp, kHelpers);
        }
        copy_h(p, member, h, own, thread, gather);
      } else {
        gather();
      }
      copied = member;
      ptx::named_arrive(kReady, kConsumers + kHelpers);
    }
  } else {
    const int warpgroup = warp / 4, warp_rows = warp % 4 * 16, piece = kInTurn ? 0 : warpgroup;
    ptx::wait_for_primaries();
    int stage = 0;
    uint32_t phase = 0, b_phase = 0;
    const auto release = [&](int which) {
      if (threadIdx.x % 128 == 0) ptx::barrier_arrive(empty(which));
    };
    for (int tile = cluster; tile < tiles; tile += clusters) {
      const int member = member_of(tile), first = (tile - p.first_tile[member]) * p.tile_rows;
      const AdapterView& ad = p.gemm.member[member].adapters;
      const int pitch = ad.up_columns * 2, steps = ad.up_columns / 16;
      const uint8_t* const b =
          p.b_at ? memory + p.b_at : reinterpret_cast<const uint8_t*>(ad.b) + static_cast<int64_t>(first) * pitch;
      const uint32_t f16 = half_steps(ad, 0, steps);
      std::conditional_t<kInt8, int32_t, float> sum[kSubs][kSums];
#pragma unroll
      for (int i = 0; i < kSubs * kSums; ++i) sum[i / kSums][i % kSums] = 0;
      int previous = 0;
      const auto next_stage = [&] {
        if (++stage == p.stages) stage = 0, phase ^= 1;
      };
      if (kInTurn && warpgroup) next_stage();
      int block = kInTurn ? warpgroup : 0;
      for (; block < blocks; block += kStep) {
        const uint32_t w_tile = base + stage * p.stage_bytes, x_tile = w_tile + p.tile_rows * 128;
        ptx::barrier_wait(full(stage), phase);
        const uint64_t x = ptx::wgmma_descriptor(x_tile);
        if constexpr (kInt8) {
          ptx::wgmma_fence();
#pragma unroll
          for (int sub = 0; sub < kSubs; ++sub) {
            const uint64_t w = ptx::wgmma_descriptor(w_tile + (piece + 2 * sub) * 64 * 128);
#pragma unroll
            for (int k = 0; k < 4; ++k) ptx::wgmma_s8(sum[sub], w + 2 * k, x + 2 * k, true);
          }
          ptx::wgmma_commit();
          if (block >= kStep) {
            ptx::wgmma_wait<1>();
            if (block - kStep < blocks - p.held) release(previous);
          }
          previous = stage;
        } else {
          constexpr bool kF16 = kKind == Kind::f16;
          uint32_t operands[2][4][4];
#pragma unroll
          for (int part = 0; part < 2 * kSubs; ++part) {
            const int sub = part / 2, half = part % 2;
            uint32_t(&operand)[4][4] = operands[half];
            if (part >= 2) {
              ptx::wgmma_wait<1>();  // those before the last have read this operand
              ptx::keep(operand);
            }
            const uint32_t w_rows = w_tile + ((piece + 2 * sub) * 64 + warp_rows) * 128;
#pragma unroll
            for (int step = 0; step < 2; ++step) {
              uint32_t bytes[4];
              ptx::load_matrix_x4(bytes, w_rows + (lane % 8 + lane / 16 * 8) * 128 +
                                             ((((half * 2 + step) * 2 + lane / 8 % 2) ^ lane % 8) * 16));
#pragma unroll
              for (int k = 0; k < 2; ++k) {
                widen(bytes[k], kF16, operand[step * 2 + k][0], operand[step * 2 + k][2]);
                widen(bytes[k + 2], kF16, operand[step * 2 + k][1], operand[step * 2 + k][3]);
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
          }
          ptx::wgmma_wait<0>();
          ptx::keep(operands[0]);
          ptx::keep(operands[1]);
          if (block < blocks - p.held) release(stage);
        }
#pragma unroll
        for (int i = 0; i < kStep; ++i) next_stage();
      }
      if constexpr (kInt8) ptx::wgmma_wait<0>();
      if (block > blocks && --stage < 0) stage = p.stages - 1, phase ^= 1;  // behind the last, whoever had that

      // The sums go where the last stages were, a fragment of 16 rows and 8 tokens after the other, once nobody reads
      // those any more. Behind a tile that is not the last the producer fills the other stages meanwhile.
      const bool last = tile + clusters >= tiles;
      const int spare = last ? 0 : stage >= p.held ? stage - p.held : stage - p.held + p.stages;
      const auto place = [&](int unit) {  // a stage is a whole number of fragments
        const int at = spare * p.stage_bytes + (unit * 32 + lane) * 16, ring = p.stages * p.stage_bytes;
        return at < ring ? at : at - ring;
      };
      const int rows_here = min(p.tile_rows, p.gemm.member[member].n - first);
      ptx::named_sync(kPair, kConsumers);
#pragma unroll
      for (int sub = 0; sub < kSubs; ++sub) {
        const int row_tile = (piece + 2 * sub) * 4 + warp % 4;
        if (row_tile * 16 < rows_here) {
#pragma unroll
          for (int j = 0; j < kTiles; ++j) {
            uint4 bits;
            memcpy(&bits, &sum[sub][4 * j], sizeof bits);
            *reinterpret_cast<uint4*>(memory + place((kInTurn * 4 * warpgroup + row_tile) * kTiles + j)) = bits;
          }
        }
      }
      ptx::named_sync(kReady, kConsumers + kHelpers);
      if (p.splits > 1) ptx::cluster_sync();
      if (p.b_at && steps) {
        ptx::barrier_wait(b_full, b_phase);
        b_phase ^= 1;
      }
      // Each block finishes a share of the fragments, some tokens of 16 rows at a time.
      const int row_tiles = (rows_here + 15) / 16;
      const auto finish_all = [&](auto tiles_at_once, auto with_own, auto with_after) {
        constexpr int kPart = decltype(tiles_at_once)::value, kParts = kTiles / kPart;
        const int first_unit = (p.splits == 1 ? 0 : rank * row_tiles / p.splits) * kParts;
        const int end = (p.splits == 1 ? row_tiles : (rank + 1) * row_tiles / p.splits) * kParts;
#pragma unroll 1
        for (int unit = first_unit + warp; unit < end; unit += kConsumers / 32) {
          const int row_tile = unit / kParts, part = unit % kParts * kPart;
          float value[kPart][4];
#pragma unroll
          for (int j = 0; j < kPart; ++j) {
            const int unit_at = row_tile * kTiles + part + j;
            const uint32_t from[2] = {base + place(unit_at), base + (kInTurn ? place(unit_at + 4 * kTiles) : 0)};
            std::conditional_t<kInt8, int32_t, float> total[4] = {};
            const auto add = [&](const uint4& bits) {
              std::conditional_t<kInt8, int32_t, float> some[4];
              memcpy(some, &bits, sizeof bits);
#pragma unroll
              for (int c = 0; c < 4; ++c) total[c] += some[c];
            };
            if (p.splits == 1) {
#pragma unroll
              for (int i = 0; i <= kInTurn; ++i) add(ptx::load_shared_16(from[i]));
            } else {
#pragma unroll 2
              for (int s = 0; s < p.splits; ++s) {
#pragma unroll
                for (int i = 0; i <= kInTurn; ++i) add(ptx::load_cluster_16(from[i], s));
              }
            }
#pragma unroll
            for (int c = 0; c < 4; ++c) value[j][c] = static_cast<float>(total[c]);
          }
          finish<kPart, decltype(with_own)::value, decltype(with_after)::value>(
              p, member, value, first + row_tile * 16, first + rows_here, part * 8, channels + row_tile * 16,
              b + row_tile * 16 * pitch, h, reinterpret_cast<const float4*>(rows), own, f16);
        }
      };
      constexpr std::integral_constant<int, (kTiles < 4 ? kTiles : 4)> kFour;
      if (own && steps)
        finish_all(std::integral_constant<int, 1>(), std::true_type(), std::true_type());
      else if (has_epilogue(p.gemm, p.gemm.member[member]))
        finish_all(kFour, std::false_type(), std::true_type());
      else
        finish_all(kFour, std::false_type(), std::false_type());
      if (!last) {
        ptx::named_sync(kFree, kConsumers + kHelpers);
        for (int i = 0; i < p.held && (!kInTurn || warpgroup == 0); ++i) {
          const int at = spare + i;
          release(at >= p.stages ? at - p.stages : at);
        }
      }
    }
  }
  if (p.splits > 1) {
    if (warp >= kConsumers / 32) ptx::cluster_sync();
    ptx::cluster_arrive_relaxed();
    ptx::cluster_wait();  // a block's shared memory outlives the reads of its peers
  }
#endif
}

using Kernel = void (*)(Stream);

template <Kind kKind, int kTokens>
Kernel kernel_for(int shape) {
  return shape == 0 ? stream<kKind, kTokens, 0> : shape == 1 ? stream<kKind, kTokens, 1> : stream<kKind, kTokens, 2>;
}

template <Kind kKind>
Kernel kernel_for(int tokens, int shape) {
  switch (tokens) {
    case 8:
      return kernel_for<kKind, 8>(shape);
    case 16:
      return kernel_for<kKind, 16>(shape);
    case 32:
      return kernel_for<kKind, 32>(shape);
    default:
      return kernel_for<kKind, 64>(shape);
  }
}

Kernel kernel_for(Kind kind, int tokens, int shape) {
  switch (kind) {
    case Kind::bf16:
      return kernel_for<Kind::bf16>(tokens, shape);
    case Kind::f16:
      return kernel_for<Kind::f16>(tokens, shape);
    default:
      return kernel_for<Kind::s8>(tokens, shape);
  }
}

// ---- Dispatch
// --------------------------------------------------------------------------------------------------------

constexpr int kSharedBytes = 208 * 1024;  // leaves room for a block of the first kernel beside it

struct Plan {
  Kind kind;
  int tokens, splits, clusters;
  int tile_rows, tiles;  // tile_rows 0: no tile of at most kMaxTileRows
  int shape;             // of the kernel
  int stages, stage_bytes, held;
  int up_columns, h_pitch;
  int h_at, own_at, b_at, rows_at, channels_at, barriers_at, shared_bytes;
  bool prepares;
};

// Where a block a tile gives tiles of fewer rows than kShortTile, blocks share the rows and divide K, the fewest that
// have kShortPart of them. Measured on an H200, us, by the number of blocks that share; W8A8 with rank 64, M = 1 and
// 64, W8A16 with rank 16, M = 1 and 16. N 8192 was measured with both warpgroups on every stage, W8A16 without adapters
// and M = 64 in place of 16.
//   W8A8   N 8192,  K 28672   1: 65.8 76.5   2: 67.0 81.5   3: 68.2 87.6   (tiles of 64, 128, 216 rows)
//          N 4096,  K 4096    1: 11.4 13.5   2: 10.7 12.3   3: 10.8 13.1   (32, 64, 112)
//          N 14336, K 4096    1: 19.3 22.0   2: 20.5 24.8                  (112, 224)
//   W8A16  N 8192,  K 28672   1: 132  173    2: 68.9 93.0   3: 88.3 110
//          N 4096,  K 4096    1: 15.1 17.5   2: 12.8 15.2   3: 14.5 16.2
//          N 14336, K 4096    1: 27.8 27.5   2: 26.5 28.3
constexpr int kShortTile = 96, kShortPart = 64;
constexpr int kFewStages = 4;  // that B leaves, or it is read where it is

Plan plan_of(const PrepareArgs& prepare, const GemmArgs& gemm, const Limits& limits) {
  Plan plan{};
  int64_t total_n = 0;
  int h_columns = 0;
  for (int i = 0; i < gemm.member_count; ++i) {
    total_n += gemm.member[i].n;
    const AdapterView& adapters = gemm.member[i].adapters;
    plan.up_columns = std::max(plan.up_columns, adapters.up_columns);
    h_columns = std::max(h_columns, gemm.row_slot ? adapters.slot_columns : adapters.up_columns);
  }
  const bool int8 = prepare.spec.mode != Mode::w8a16;
  plan.prepares = int8 || plan.up_columns;
  plan.kind = int8 ? Kind::s8 : gemm.x_f16 ? Kind::f16 : Kind::bf16;
  plan.tokens = decode_tokens(gemm.m);

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
    const int rows = rows_for(splits, 1);
    if (!rows) break;
    plan.splits = splits;
    plan.tile_rows = rows;
    if (rows >= (splits == 1 ? kShortTile : kShortPart)) break;
  }
  for (int turns = 2; !plan.tile_rows && turns < 1 << 16; ++turns) {
    plan.splits = 1;
    plan.tile_rows = rows_for(1, turns);
  }
  if (!plan.tile_rows) return plan;
  plan.tiles = tiles_of(plan.tile_rows);
  plan.clusters = std::min(plan.tiles, limits.clusters[plan.splits]);

  plan.stage_bytes = plan.tile_rows * 128 + plan.tokens * 128 * (int8 ? 1 : 2);
  const int stage_units = plan.stage_bytes / 512;  // fragments of sums
  plan.shape = plan.tile_rows <= 64 ? 0 : plan.tile_rows <= 128 ? 1 : 2;
  const int row_tiles = plan.shape == 0 ? 8 : (plan.tile_rows + 15) / 16;
  plan.held = std::max(2, (row_tiles * (plan.tokens / 8) + stage_units - 1) / stage_units);
  // A row of h is 32 or 96 bytes beyond a multiple of 128, so that eight rows lie in different banks.
  plan.h_pitch = h_columns * 2 + (h_columns % 32 == 0 ? 32 : 0);
  const int h_bytes = plan.up_columns ? plan.tokens * plan.h_pitch : 0, b_bytes = plan.tile_rows * plan.up_columns * 2;
  const int own_bytes = gemm.row_slot ? kMaxTokens * static_cast<int>(sizeof(Own)) : 0;
  const int reach = (plan.shape == 2   ? 256
                     : plan.shape == 1 ? 128
                                       : 64) *
                    128;  // what a wgmma reads from the start of a stage on
  const int fixed = kMaxTokens * 8 + round_up(plan.tile_rows, 16) * 8 + kMaxStages * 16 + 16 + own_bytes + h_bytes;
  const auto stages_in = [&](int bytes) {
    int stages = std::min(kMaxStages, bytes / plan.stage_bytes);
    while (stages > 0 && (stages - 1) * plan.stage_bytes + reach > bytes) --stages;
    return stages;
  };
  // B lies in shared memory where the stages can spare that.
  plan.stages = stages_in(kSharedBytes - fixed - b_bytes);
  const bool b_shared = b_bytes && plan.stages >= kFewStages;
  if (b_bytes && !b_shared) plan.stages = stages_in(kSharedBytes - fixed);
  int at = std::max(plan.stages * plan.stage_bytes, (plan.stages - 1) * plan.stage_bytes + reach);
  const auto take = [&](int bytes) {
    at += bytes;
    return at - bytes;
  };
  plan.b_at = b_shared ? take(b_bytes) : 0;
  plan.rows_at = take(kMaxTokens * 8);
  plan.channels_at = take(round_up(plan.tile_rows, 16) * 8);
  plan.barriers_at = take(kMaxStages * 16 + 16);
  plan.own_at = take(own_bytes);
  plan.h_at = take(h_bytes);
  plan.shared_bytes = at;
  return plan;
}

void set_up_kernels(const Limits& limits) {
  for (const Kind kind : {Kind::s8, Kind::bf16, Kind::f16}) {
    for (const int tokens : {8, 16, 32, 64}) {
      for (const int shape : {0, 1, 2}) {
        OCTOLORA_CUDA(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel_for(kind, tokens, shape)),
                                           cudaFuncAttributeMaxDynamicSharedMemorySize, limits.shared_bytes),
                      "decode: %d bytes of shared memory", limits.shared_bytes);
      }
    }
  }
}

}  // namespace

void set_up_decode(Limits& limits) {
  if (limits.capability != 90) return;
  tensor_map_encoder();  // a driver without it fails here, not in a forward
  set_up_kernels(limits);
  limits.clusters[1] = limits.multiprocessors;
  for (int blocks = 2; blocks <= kMaxSplits; ++blocks) {
    const DependentLaunch launch(blocks, kStreamThreads, blocks, kSharedBytes, nullptr);
    cudaLaunchConfig_t config = launch.config;
    cudaLaunchAttribute cluster = launch.attributes[1];
    config.attrs = &cluster;
    config.numAttrs = 1;
    OCTOLORA_CUDA(cudaOccupancyMaxActiveClusters(&limits.clusters[blocks], stream<Kind::s8, 64, 2>, &config),
                  "decode: clusters of %d", blocks);
  }
}

const char* decode_refuses(const PrepareArgs& prepare, const GemmArgs& gemm, const Limits& limits) {
  if (limits.capability != 90) return "it is for compute capability 9.0";
  if (gemm.m > kMaxTokens) return "it is for at most 64 rows";
  if (gemm.outliers.list) return "outlier columns are taken out";
  if (prepare.x_type == Dtype::f32) return "x is fp32";
  if (has_block_scales(gemm)) return "W has block scales";
  if (prepare.k % 8 || reinterpret_cast<uintptr_t>(prepare.x) % 16) return "rows of x are not 16-byte aligned";
  const Plan plan = plan_of(prepare, gemm, limits);
  if (!plan.tile_rows) return "N is too large";
  if (plan.stages <= plan.held) return "the ranks of all slots leave too little shared memory";
  if (plan.tiles > plan.clusters && (gemm.k + kBlockK - 1) / kBlockK < plan.held) return "K is too short";
  return nullptr;
}

void launch_decode(const PrepareArgs& prepare, const GemmArgs& gemm, const Limits& limits, cudaStream_t stream) {
  const Plan plan = plan_of(prepare, gemm, limits);
  Stream s{};
  for (int i = 0; i < gemm.member_count; ++i) {
    const GemmMember& member = gemm.member[i];
    s.bias[i] = prepare.member[i].total_bias ? prepare.member[i].bias : member.bias;
    s.w[i] = tensor_map(member.weight, gemm.k_pitch, member.n, gemm.k_pitch, plan.tile_rows);
    s.first_tile[i + 1] = s.first_tile[i] + (member.n + plan.tile_rows - 1) / plan.tile_rows;
  }
  if (plan.kind != Kind::s8) s.x = tensor_map(gemm.x, gemm.k * int64_t{2}, gemm.m, gemm.x_pitch * 2, plan.tokens);
  s.gemm = gemm;
  s.tile_rows = plan.tile_rows;
  s.splits = plan.splits;
  s.k_blocks = (gemm.k + kBlockK - 1) / kBlockK;
  if (plan.prepares) launch_prepare_few(prepare, stream);
  s.stages = plan.stages;
  s.stage_bytes = plan.stage_bytes;
  s.held = plan.held;
  s.h_at = plan.h_at;
  s.own_at = plan.own_at;
  s.h_pitch = plan.h_pitch;
  s.b_at = plan.b_at;
  s.rows_at = plan.rows_at;
  s.channels_at = plan.channels_at;
  s.barriers_at = plan.barriers_at;
  const DependentLaunch launch(plan.clusters * plan.splits, kStreamThreads, plan.splits, plan.shared_bytes, stream);
  OCTOLORA_CUDA(cudaLaunchKernelEx(&launch.config, kernel_for(plan.kind, plan.tokens, plan.shape), s),
                "decode: M = %d, K = %d, %d tiles of %d rows, %d blocks each", gemm.m, gemm.k, plan.tiles,
                plan.tile_rows, plan.splits);
}

void describe_decode(const PrepareArgs& prepare, const GemmArgs& gemm, const Limits& limits, Explanation& to) {
  const Plan plan = plan_of(prepare, gemm, limits);
  if (plan.prepares)
    describe_prepare_few(prepare, to);
  else
    to.note("no prepare: x is read where it is and there are no adapters");
  to.launch(
      "%s for few rows, started while the launch before it runs: %d tokens x %d rows of W, %d tiles, K divided by "
      "%d, %d stages",
      plan.kind == Kind::s8 ? "wgmma s8" : "wgmma 16-bit with widened weights", plan.tokens, plan.tile_rows, plan.tiles,
      plan.splits, plan.stages);
}

}  // namespace octolora::cuda
