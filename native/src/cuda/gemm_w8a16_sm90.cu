// SPDX-License-Identifier: Apache-2.0
//
// W8A16 for Hopper: int8 weights widen in registers on their way into wgmma, x stays in 16 bits, and the low-rank
// update joins the same accumulators.
//
//   v[m,n] = p[m] * ( s_w[n] / p[m] * sum_k x[m,k] W[n,k]  +  sum_r h[m,r] B[n,r] ) + bias[n]
//   y[m,n] = residual[m,n] + gate[n] * activation(v[m,n])
//
//   x [M,K] bf16 or fp16   W [N,k_pitch] int8, in the order of kernels.h   h [M,R], B [N,R] 16-bit
//   y [M,N] bf16 or fp16, rows of whole 16 bytes; several outputs of one x are one launch
//
// wgmma takes its first operand from registers and its second from shared memory. So the weights are the first: a
// warpgroup owns 64 rows of W and all tokens of the tile, and its accumulators are y^T. A stage of the pipeline is 64
// values of K: the tokens' rows of x, 128 bytes each, and 128 rows of W, 64 bytes each. While the four k-steps of one
// stage multiply, the warpgroup widens the next stage into a second set of registers, so the tensor cores never wait.
// For the low-rank update a stage holds 64 ranks of h, and B goes from memory to registers as it is.
//
// Two consumer warpgroups share a tile of 128 x kTokens, and a cluster of two blocks shares the tokens of two tiles:
// each loads half of x (or h) and multicasts it to both. Blocks stay and walk over tiles. A finished tile leaves
// through shared memory of its own, which the copy engine empties while the next tile multiplies. Where x is read in
// place, the main loop needs nothing that prepare makes, and the kernel starts while prepare still runs.
//
// With block scales the two k-steps of 32 values of K make sums of their own, which are multiplied by d and added to
// the accumulators. A stage brings the d of its two blocks and 128 rows of W.
//
// Barriers a stage: `full` (the bytes of the stage, one producer arrival) in each block; `empty`, with an arrival from
// each consumer warp of both blocks, since a producer writes into both.
#include <cuda.h>

#include <algorithm>
#include <cmath>
#include <iterator>

#include "check.h"
#include "convert.cuh"
#include "dependent_launch.cuh"
#include "epilogue.cuh"
#include "explanation.h"
#include "kernels.h"
#include "ptx.cuh"
#include "tensor_map.h"
#include "wgmma.cuh"
#include "wgmma_rs.cuh"

namespace octolora::cuda {
namespace {

constexpr int kBlockN = 128, kBlockK = 64, kBlockRank = 64;
constexpr int kWarpgroups = 2, kThreads = 128 * (kWarpgroups + 1);
constexpr int kCluster = 2;
constexpr int kWeightBytes = kBlockN * kBlockK;
constexpr int kNoRanks = -1;                      // come after a stage
constexpr int kMaxShared = 232448;                // what a block may have on sm_90
[[maybe_unused]] constexpr int kRasterTiles = 6;  // tiles along the tokens that a wave walks together

// Tokens of a tile, those that are stored together, and whether W has block scales.
template <int Tokens, int StoreTokens, bool BlockScales = false>
struct Config {
  static constexpr bool kBlockScales = BlockScales;
  static constexpr int kTokens = Tokens, kStoreTokens = StoreTokens;
  [[maybe_unused]] static constexpr int kParts = kTokens / kStoreTokens;
  // Rows that one block of the cluster loads. Where half of the tile is no whole number of swizzle groups, the two
  // blocks load some rows twice.
  static constexpr int kBoxTokens = round_up(kTokens / kCluster, 8);
  static constexpr int kTokenBytes = kTokens * 128;
  static constexpr int kStageBytes = kTokenBytes + kWeightBytes;
  static constexpr int kStoreBytes = kTokens * 128;  // 64 columns of y in 16 bits, a warpgroup's own
  static constexpr int kPowers = kTokens * 4;        // p of the tile, a warpgroup's own
  static constexpr int kFixedBytes = kWarpgroups * (kStoreBytes + kPowers);
  static constexpr int kScaleBytes = kBlockScales ? kBlockK / kScaleBlock * kBlockN * 2 : 0;  // fp16 [2][kBlockN]
  static constexpr int kStages = std::min((kMaxShared - kFixedBytes) / (kStageBytes + kScaleBytes + 32), 8);
  static constexpr int kStaging = kStages * kStageBytes;
  static constexpr int kPowersAt = kStaging + kWarpgroups * kStoreBytes;
  static constexpr int kBarriers = kPowersAt + kWarpgroups * kPowers;
  static constexpr int kTold = kBarriers + kStages * 16;  // 16 bytes a stage, by the producer to the consumers
  static constexpr int kScales = kTold + kStages * 16;
  static constexpr int kSharedBytes = kScales + kStages * kScaleBytes;
  static_assert(kSharedBytes <= kMaxShared && kStages >= 4);
  static_assert(kTokenBytes % 1024 == 0 && kBoxTokens % 8 == 0, "whole swizzle groups");
  static_assert(kTokens % kStoreTokens == 0 && kStoreTokens % 8 == 0 && kStoreTokens * 2 <= kTokens);
  static_assert(kTokens * 8 <= kWeightBytes, "rows of the tile lie where the weights of a stage do");
};

struct Output {
  CUtensorMap w, h, y;
  int first_pair;  // of all pairs of tiles along the columns of all outputs
  int rank_blocks, chunk_columns;
};

struct Params {
  CUtensorMap x;
  Output output[kMaxMembers];
  GemmArgs args;
  int k_blocks, tiles_m, pairs;
};

// Four int8 in the order of kernels.h to two registers of two 16-bit values, kWidened times what they are: for bf16
// that takes fewer instructions than the numbers themselves.
template <bool kF16>
constexpr float kWidened = kF16 ? 1.f : 1.f / 64;
template <bool kF16>
__device__ __forceinline__ void widen(uint32_t bytes, uint32_t& low, uint32_t& high) {
  bytes ^= 0x80808080u;
  const auto widen_pair = [](uint32_t pair) {
    if constexpr (kF16) {
      // 1024 + (b ^ 0x80), less 1152
      const __half2 value = __hsub2(*reinterpret_cast<const __half2*>(&pair), __half2half2(__ushort_as_half(0x6480)));
      return *reinterpret_cast<const uint32_t*>(&value);
    } else {
      // As bf16, 0x00nn is n * 2^-133 for every byte nn, since the subnormal numbers and those of the next exponent are
      // equally far apart: n * 2^-133 * 2^127 - 2 = (n - 128) / 64, exactly.
      return ptx::fma_bf16x2(pair, 0x7f007f00u, 0xc000c000u);
    }
  };
  constexpr uint32_t kUpper = kF16 ? 0x64 : 0;
  low = widen_pair(__byte_perm(bytes, kUpper, 0x4140));
  high = widen_pair(__byte_perm(bytes, kUpper, 0x4342));
}

template <class C, bool kF16, bool kEpilogue>
__global__ __launch_bounds__(kThreads, 1) void gemm(const __grid_constant__ Params p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) uint8_t memory[];
  const uint32_t base = ptx::shared_address(memory);
  const auto full = [&](int stage) { return base + C::kBarriers + stage * 16; };
  const auto empty = [&](int stage) { return base + C::kBarriers + stage * 16 + 8; };
  const uint32_t rank = ptx::cluster_rank();
  const int warpgroup = static_cast<int>(threadIdx.x) / 128;

  if (threadIdx.x == 0) {
    for (int stage = 0; stage < C::kStages; ++stage) {
      ptx::barrier_init(full(stage), 1);
      ptx::barrier_init(empty(stage), kWarpgroups * (128 + (kCluster - 1) * 4));
    }
    ptx::barrier_init_fence();
  }
  ptx::cluster_sync();
  ptx::launch_dependents();  // the next call's prepare may take the place of blocks that are done

  const GemmArgs& args = p.args;
  const int tiles = p.tiles_m * p.pairs;
  const int cluster = static_cast<int>(blockIdx.x) / kCluster, clusters = static_cast<int>(gridDim.x) / kCluster;
  // Tile of this block: first token, first column of an output.
  struct Place {
    int m, n, output;
  };
  const auto place = [&](int tile) {
    const int group = tile / (kRasterTiles * p.pairs), within = tile - group * kRasterTiles * p.pairs;
    const int rows = min(kRasterTiles, p.tiles_m - group * kRasterTiles);
    const int pair = within / rows;
    int output = 0;
    while (output + 1 < args.member_count && pair >= p.output[output + 1].first_pair) ++output;
    return Place{(group * kRasterTiles + within % rows) * C::kTokens,
                 ((pair - p.output[output].first_pair) * kCluster + static_cast<int>(rank)) * kBlockN, output};
  };
  int stage = 0;
  uint32_t phase = 0;
  const auto step_stage = [&] {
    if (++stage == C::kStages) {
      stage = 0;
      phase ^= 1;
    }
  };

  if (warpgroup == kWarpgroups) {
    ptx::registers_fewer<56>();
    if (threadIdx.x == kWarpgroups * 128) {
      if (!args.x_in_place) ptx::wait_for_primaries();
      ptx::prefetch_map(&p.x);
      const int part = static_cast<int>(rank) * (C::kTokens - C::kBoxTokens);
      bool waited = !args.x_in_place;
      // The first block of 64 ranks from `block` on that rows of the tile need: 16 times its number, and a bit for
      // each of its k-steps.
      const auto next_ranks = [&](const Place& at, int block) {
        const GemmMember& out = args.member[at.output];
        const int last = (min(at.m + C::kTokens, args.m) - 1) / kSlotRows,
                  words = slot_words(out.adapters.up_columns);
        for (; block < p.output[at.output].rank_blocks; ++block) {
          uint32_t bits = out.needed_steps ? 0 : ~0u;
          for (int i = at.m / kSlotRows; out.needed_steps && i <= last; ++i)
            bits |= out.needed_steps[static_cast<int64_t>(i) * words + block / 8];
          const int steps = bits >> block % 8 * 4 & 15;
          if (steps) return block * 16 | steps;
        }
        return kNoRanks;
      };
      for (int tile = cluster; tile < tiles; tile += clusters) {
        const Place at = place(tile);
        const Output& output = p.output[at.output];
        const auto load_tokens = [&](const CUtensorMap* map, int byte) {
          ptx::tensor_load_multicast(base + stage * C::kStageBytes + part * 128, map, byte, at.m + part, full(stage),
                                     (1 << kCluster) - 1);
        };
        const int tile_rows = min(C::kTokens, args.m - at.m);
        // What the consumers are told: the tile, and which ranks come after a stage.
        const auto tell = [&](int next_ranks) {
          ptx::store_shared(base + C::kTold + stage * 16,
                            uint4{static_cast<uint32_t>(at.m), static_cast<uint32_t>(at.n),
                                  static_cast<uint32_t>(at.output), static_cast<uint32_t>(next_ranks)});
        };
        const GemmMember& out = args.member[at.output];
        const int pitch = block_scale_pitch(out.n);
        const int scale_bytes = C::kBlockScales ? max(0, min(kBlockN, pitch - at.n)) * 2 : 0;
        int next = kNoRanks;
        for (int block = 0; block < p.k_blocks; ++block) {
          ptx::barrier_wait(empty(stage), phase ^ 1);
          if (block + 1 == p.k_blocks && output.rank_blocks) {
            if (!waited) ptx::wait_for_primaries();
            waited = true;
            next = next_ranks(at, 0);
          }
          if (block == 0 || block + 1 == p.k_blocks) tell(next);
          ptx::barrier_expect_bytes(full(stage), kCluster * C::kBoxTokens * 128 + kWeightBytes + 2 * scale_bytes);
          if (scale_bytes) {
            const int last = (args.k - 1) / kScaleBlock;  // once more where a stage has no second: it meets zeros
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const int64_t row = min(2 * block + half, last);
              ptx::bulk_load(base + C::kScales + stage * C::kScaleBytes + half * kBlockN * 2,
                             out.block_scale + row * pitch + at.n, scale_bytes, full(stage));
            }
          }
          load_tokens(&p.x, block * 128);
          ptx::tensor_load(base + stage * C::kStageBytes + C::kTokenBytes, &output.w, block * kBlockK, at.n,
                           full(stage));
          step_stage();
        }
        uint32_t row_bytes = (tile_rows * 8 + 15) / 16 * 16;  // the workspace goes on behind rows
        while (next != kNoRanks) {
          const int block = next / 16;
          ptx::barrier_wait(empty(stage), phase ^ 1);
          next = next_ranks(at, block + 1);
          tell(next);
          ptx::barrier_expect_bytes(full(stage), kCluster * C::kBoxTokens * 128 + row_bytes);
          load_tokens(&output.h, block * 128);
          if (row_bytes)
            ptx::bulk_load(base + stage * C::kStageBytes + C::kTokenBytes, args.rows + at.m, row_bytes, full(stage));
          row_bytes = 0;
          step_stage();
        }
      }
    }
  } else {
    ptx::registers_more<224>();
    constexpr int kRegisters = C::kTokens / 2;
    const int warp = static_cast<int>(threadIdx.x) / 32 % 4, lane = static_cast<int>(threadIdx.x) % 32;
    const int g = lane / 4, t = lane % 4;
    const int thread = static_cast<int>(threadIdx.x) % 128;  // of the warpgroup
    const int row = warpgroup * 64 + warp * 16 + g;          // of the tile's 128 columns of y; the other is row + 8
    const auto sync_warpgroup = [&] {
      if (warpgroup == 0)
        ptx::named_sync(2, 128);
      else
        ptx::named_sync(3, 128);
    };
    const auto release = [&](int which) {
      // Each thread for the weights that it has read, one of a warp for the tokens that wgmma has: racecheck takes no
      // thread's word for another's.
      ptx::barrier_arrive(empty(which));
      __syncwarp();
      if (lane == 0) ptx::barrier_arrive_cluster(empty(which), rank ^ 1);
    };
    const auto tokens = [&] { return ptx::wgmma_descriptor(base + stage * C::kStageBytes); };
    const auto multiply = [&](float(&d)[kRegisters], const uint32_t(&a)[4], uint64_t b, bool f16, bool accumulate) {
      if (f16)
        ptx::wgmma_rs_f16(d, a, b, accumulate);
      else
        ptx::wgmma_rs_bf16(d, a, b, accumulate);
    };
    // Chunk c of 16 bytes of a row of 64 lies at c ^ (row / 2 % 4).
    const uint32_t my_weights = base + C::kTokenBytes + row * 64 + t * 4, swizzle = row / 2 % 4;
    const auto widen_stage = [&](uint32_t(&a)[4][4]) {
      ptx::barrier_wait(full(stage), phase);
      const uint32_t at = my_weights + stage * C::kStageBytes;
      uint32_t bytes[4][2];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        bytes[k][0] = ptx::load_shared(at + ((k ^ swizzle) * 16));
        bytes[k][1] = ptx::load_shared(at + ((k ^ swizzle) * 16) + 8 * 64);
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        widen<kF16>(bytes[k][0], a[k][0], a[k][2]);
        widen<kF16>(bytes[k][1], a[k][1], a[k][3]);
      }
    };

    // The same of two of a stage's k-steps, for block scales, and the scales of rows `row` and row + 8.
    [[maybe_unused]] const auto widen_half = [&](uint32_t(&a)[2][4], float(&d)[2], int half) {
      const uint32_t at = my_weights + stage * C::kStageBytes;
      const uint32_t scales = base + C::kScales + stage * C::kScaleBytes + (half * kBlockN + row) * 2;
      uint32_t bytes[2][2];
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        bytes[k][0] = ptx::load_shared(at + (((2 * half + k) ^ swizzle) * 16));
        bytes[k][1] = ptx::load_shared(at + (((2 * half + k) ^ swizzle) * 16) + 8 * 64);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) d[i] = decode16(ptx::load_shared_u16(scales + i * 16), true);
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        widen<kF16>(bytes[k][0], a[k][0], a[k][2]);
        widen<kF16>(bytes[k][1], a[k][1], a[k][3]);
      }
    };

    const uint32_t staging = base + C::kStaging + warpgroup * C::kStoreBytes;
    const uint32_t powers = base + C::kPowersAt + warpgroup * C::kPowers;
    bool ready = !args.rows;  // prepare is done, or there is none

    for (int left = (tiles - cluster + clusters - 1) / clusters; left > 0; --left) {
      float value[kRegisters];
      uint32_t a[2][4][4];
      int previous = -1;
      // Starts stage's four k-steps, and waits until those of the stage before have read their operands.
      const auto multiply_stage = [&](const uint32_t(&from)[4][4], bool first) {
        const uint64_t x = tokens();
        ptx::wgmma_fence();
#pragma unroll
        for (int k = 0; k < 4; ++k) multiply(value, from[k], x + 2 * k, kF16, !first || k > 0);
        ptx::wgmma_commit();
        ptx::wgmma_wait<1>();
        if (!first) release(previous);
        previous = stage;
        step_stage();
      };
      // With block scales: one block after the other. While its sums are added the other warpgroup has the tensor
      // cores.
      float sum[kRegisters], d[2][2];
      uint32_t half_a[2][2][4];
      [[maybe_unused]] const auto start_half = [&](int half) {
        const uint64_t x = tokens() + 4 * half;
        ptx::wgmma_fence();
        multiply(sum, half_a[half][0], x, kF16, false);
        multiply(sum, half_a[half][1], x + 2, kF16, true);
        ptx::wgmma_commit();
      };
      [[maybe_unused]] const auto widen_next = [&](int half) { widen_half(half_a[half], d[half], half); };
      [[maybe_unused]] const auto add_half = [&](int half) {
        ptx::pin_all(sum);
#pragma unroll
        for (int i = 0; i < kRegisters; ++i) value[i] = fmaf(d[half][i / 2 % 2], sum[i], value[i]);
      };
      [[maybe_unused]] const auto first_half = [&] {
        start_half(0);
        widen_next(1);
        ptx::wgmma_wait<0>();
        add_half(0);
      };
      [[maybe_unused]] const auto start_second_half = [&] {
        start_half(1);
        previous = stage;
        step_stage();
      };
      const auto read_told = [&](int which) { return ptx::load_shared_16(base + C::kTold + which * 16); };
      uint4 told;
      if constexpr (C::kBlockScales) {
#pragma unroll
        for (int i = 0; i < kRegisters; ++i) value[i] = 0.f;
        ptx::barrier_wait(full(stage), phase);
        widen_next(0);
        for (int block = 1; block < p.k_blocks; ++block) {
          first_half();
          start_second_half();
          ptx::barrier_wait(full(stage), phase);
          widen_next(0);
          ptx::wgmma_wait<0>();
          add_half(1);
          release(previous);
        }
        first_half();
        start_second_half();
        told = read_told(previous);  // told again with the last stage
      } else {
        widen_stage(a[0]);
        told = read_told(stage);
        multiply_stage(a[0], true);
      }
      const Place at = {static_cast<int>(told.x), static_cast<int>(told.y), static_cast<int>(told.z)};
      const Output& output = p.output[at.output];
      const GemmMember& out = args.member[at.output];

      // What the end of the tile needs, except for what prepare makes.
      const int up_columns = out.adapters.up_columns;
      bool exists[2];
      float scale[2], bias[2];
      const uint16_t* b_row[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int column = at.n + row + 8 * i;
        exists[i] = column < out.n;
        scale[i] = exists[i] ? ptx::load_early(out.scale + column) * (1 / kWidened<kF16>) : 0.f;
        b_row[i] = out.adapters.b + static_cast<int64_t>(exists[i] ? column : 0) * up_columns + 2 * t;
      }
      const auto load_bias = [&] {
#pragma unroll
        for (int i = 0; i < 2; ++i)
          bias[i] = exists[i] && out.bias ? ptx::load_early(out.bias + at.n + row + 8 * i) : 0.f;
      };
      if (ready) load_bias();
      uint32_t b[2][4];
      const auto load_b = [&](uint32_t(&to)[4], int step) {
        if (step * 16 >= up_columns) return;
#pragma unroll
        for (int i = 0; i < 4; ++i)
          to[i] = ptx::load_early(reinterpret_cast<const uint32_t*>(b_row[i % 2] + step * 16 + i / 2 * 8));
      };
      load_b(b[0], 0);
      // Bit i: the 16 ranks of k-step i are fp16, for the first 32 steps.
      const auto step_f16 = [&](int step) {
        return out.adapters.chunks[step * kChunkRank / output.chunk_columns].b_f16 != 0;
      };
      const uint32_t f16_steps = __ballot_sync(~0u, lane * kChunkRank < up_columns && step_f16(lane));
      for (int block = 1; !C::kBlockScales && block < p.k_blocks; block += 2) {
        widen_stage(a[1]);
        multiply_stage(a[1], false);
        if (block + 1 == p.k_blocks) break;
        widen_stage(a[0]);
        multiply_stage(a[0], false);
      }

      // While the last stage multiplies.
      if (!ready) {
        ptx::wait_for_primaries();
        ready = true;
        load_bias();
      }
      const auto next_ranks = [&](int which) {
        return static_cast<int>(ptx::load_shared(base + C::kTold + which * 16 + 12));
      };
      int ranks = next_ranks(previous);
      const bool adapted = ranks != kNoRanks;
      bool ones = true;  // p of all rows is 1
      if (adapted) {
        if (ranks / 16) load_b(b[0], ranks / 16 * 4);
        ptx::barrier_wait(full(stage), phase);
        const uint32_t rows = base + stage * C::kStageBytes + C::kTokenBytes;
        for (int i = thread; i < C::kTokens; i += 128) {
          const uint32_t power = ptx::load_shared(rows + i * 8 + 4);
          ones &= at.m + i >= args.m || power == 0x3f800000u;
          ptx::store_shared(powers + i * 4, __uint_as_float(power));
        }
      }
      if (thread == 0) ptx::store_wait_read<0>();  // of the tile before
      ones = ptx::named_sync_and(2 + warpgroup, 128, ones);
      ptx::wgmma_wait<0>();
      if constexpr (C::kBlockScales) add_half(1);
      ptx::pin_all(value);
      release(previous);

      if (adapted) {
        if (ones) {  // as without adapters, but before the low-rank update
#pragma unroll
          for (int j = 0; j < kRegisters; ++j) value[j] *= scale[j / 2 % 2];
          scale[0] = scale[1] = 1.f;
        } else {
#pragma unroll
          for (int j = 0; j < C::kTokens / 8; ++j) {
            const float2 power = ptx::load_shared_pair(powers + (j * 8 + 2 * t) * 4);
            // 1 / p: the exponent fields of a power of two and its inverse add up to 254.
            const float inverse[2] = {__uint_as_float(0x7f000000u - __float_as_uint(power.x)),
                                      __uint_as_float(0x7f000000u - __float_as_uint(power.y))};
#pragma unroll
            for (int i = 0; i < 4; ++i) value[4 * j + i] = value[4 * j + i] * inverse[i % 2] * scale[i / 2];
          }
        }
        while (ranks != kNoRanks) {
          const int block = ranks / 16;
          const uint64_t h = tokens();
          // A step at a time: ptxas serializes every wgmma of the kernel if one with its operand in registers is
          // skipped or chosen by a branch within a group.
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            const int step = block * 4 + k;
            if (step * 16 >= up_columns) break;
            load_b(b[(k + 1) % 2], step + 1);
            if (!(ranks >> k & 1)) continue;
            ptx::pin_all(value);
            if (step < 32 ? f16_steps >> step & 1 : step_f16(step)) {
              ptx::wgmma_fence();
              ptx::wgmma_rs_f16(value, b[k % 2], h + 2 * k, true);
              ptx::wgmma_commit();
              ptx::wgmma_wait<0>();
            } else {
              ptx::wgmma_fence();
              ptx::wgmma_rs_bf16(value, b[k % 2], h + 2 * k, true);
              ptx::wgmma_commit();
              ptx::wgmma_wait<0>();
            }
            ptx::pin_all(value);
          }
          ranks = next_ranks(stage);
          release(stage);
          step_stage();
          if (ranks == kNoRanks) break;
          if (ranks / 16 != block + 1) load_b(b[0], ranks / 16 * 4);
          ptx::barrier_wait(full(stage), phase);
        }
      }

      // y goes through shared memory: rows of 64 columns, in the swizzle of the copy engine.
      // Of tokens first + 2t and the next: column row, then column row + 8.
      const auto finish = [&](int first, float2(&both)[2]) {
#pragma unroll
        for (int i = 0; i < 2; ++i) both[i] = {value[first / 2 + 2 * i], value[first / 2 + 2 * i + 1]};
        if (!ones) {
          const float2 power = ptx::load_shared_pair(powers + (first + 2 * t) * 4);
#pragma unroll
          for (int i = 0; i < 2; ++i) both[i] = {both[i].x * power.x + bias[i], both[i].y * power.y + bias[i]};
        } else {
          // Rounded twice, as above: a row that no adapter touches has the same bits with and without slots.
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            both[i].x = __fmul_rn(both[i].x, scale[i]) + bias[i];
            both[i].y = __fmul_rn(both[i].y, scale[i]) + bias[i];
          }
        }
      };
      const bool y_f16 = args.y_type == Dtype::f16;
      const auto pack = [&](float2 both) {
        if (y_f16) {
          const __half2 rounded = __floats2half2_rn(both.x, both.y);
          return *reinterpret_cast<const uint32_t*>(&rounded);
        }
        const __nv_bfloat162 rounded = __floats2bfloat162_rn(both.x, both.y);
        return *reinterpret_cast<const uint32_t*>(&rounded);
      };
      const int first_column = at.n + warpgroup * 64;
      if (kEpilogue && has_epilogue(args, out)) {
        // As fp32, a part at a time; 8 values from column 8c of token i lie at 8 (c ^ (i / 2 % 4)).
#pragma unroll 1
        for (int part = 0; part < C::kParts; ++part) {
#pragma unroll
          for (int q = 0; q < C::kParts; ++q) {
            if (q != part) continue;
#pragma unroll
            for (int j = 0; j < C::kStoreTokens / 8; ++j) {
              float2 both[2];
              finish(q * C::kStoreTokens + j * 8, both);
#pragma unroll
              for (int i = 0; i < 2; ++i) {
                const int column = warp * 16 + g + 8 * i;
                const uint32_t to = staging + (j * 8 + 2 * t) * 256 + (column ^ t * 8) * 4;
                ptx::store_shared(to, both[i].x);
                ptx::store_shared(to + 256, both[i].y);
              }
            }
          }
          sync_warpgroup();
          for (int i = thread; i < C::kStoreTokens * 8; i += 128) {
            const int token = i / 8, c = i % 8, m = at.m + part * C::kStoreTokens + token, n = first_column + c * 8;
            if (m >= args.m || n >= out.n) continue;
            const uint8_t* const from = memory + (staging - base) + token * 256 + ((c ^ token / 2 % 4) * 32);
            finish_eight(args, out, reinterpret_cast<const float*>(from), m, n);
          }
          sync_warpgroup();
        }
        continue;
      }
      constexpr int kEights = C::kStoreTokens / 8;
#pragma unroll
      for (int part = 0; part < C::kParts; ++part) {
        const uint32_t buffer = staging + part * C::kStoreTokens * 128;
        uint32_t packed[4];
#pragma unroll
        for (int j = 0; j < kEights; ++j) {
          float2 both[2];
          finish(part * C::kStoreTokens + j * 8, both);
#pragma unroll
          for (int i = 0; i < 2; ++i) packed[j % 2 * 2 + i] = pack(both[i]);
          // Matrix i of the four: columns 8 (i % 2).. of y, tokens 8 (i / 2)..; a lane gives the address of a token.
          const int chunk = warp * 2 + lane / 8 % 2;
          if (j % 2) {
            const int token = (j - 1) * 8 + lane / 16 * 8 + lane % 8;
            ptx::store_matrix_x4_transposed(buffer + token * 128 + ((chunk ^ lane % 8) * 16), packed);
          } else if (j == kEights - 1) {
            const int token = j * 8 + lane % 8;
            ptx::store_matrix_x2_transposed(buffer + token * 128 + ((chunk ^ lane % 8) * 16), packed[0], packed[1]);
          }
        }
      }
      ptx::fence_async_shared();
      sync_warpgroup();
      if (thread == 0) {
#pragma unroll
        for (int part = 0; part < C::kParts; ++part) {
          ptx::tensor_store(&output.y, first_column * 2, at.m + part * C::kStoreTokens,
                            staging + part * C::kStoreTokens * 128);
        }
        ptx::store_commit();
      }
    }
    if (thread == 0) ptx::store_wait<0>();
  }
  ptx::cluster_sync();  // no block leaves while its peer may still write to it
#endif
}

int pairs_of(const GemmMember& out) { return (out.n + kBlockN * kCluster - 1) / (kBlockN * kCluster); }

template <class C, bool kEpilogue>
void launch(const GemmArgs& args, const Limits& limits, cudaStream_t stream) {
  Params p{};
  p.args = args;
  p.x = tensor_map(args.x, static_cast<int64_t>(args.k) * 2, args.m, args.x_pitch * 2, C::kBoxTokens, 128);
  p.k_blocks = (args.k + kBlockK - 1) / kBlockK;
  p.tiles_m = (args.m + C::kTokens - 1) / C::kTokens;
  for (int i = 0; i < args.member_count; ++i) {
    const GemmMember& out = args.member[i];
    const int up = out.adapters.up_columns;
    Output& output = p.output[i];
    output.w = tensor_map(out.weight, args.k_pitch, out.n, args.k_pitch, kBlockN, kBlockK);
    if (up) output.h = tensor_map(out.h, up * 2, args.m, up * 2, C::kBoxTokens, 128);
    const int64_t y_bytes = static_cast<int64_t>(out.n) * 2;
    output.y = tensor_map(out.y, y_bytes, args.m, y_bytes, C::kStoreTokens, 128);
    output.first_pair = p.pairs;
    output.rank_blocks = (up + kBlockRank - 1) / kBlockRank;
    output.chunk_columns = out.adapters.chunk_count ? up / out.adapters.chunk_count : kChunkRank;
    p.pairs += pairs_of(out);
  }

  const int clusters = std::min(p.tiles_m * p.pairs, limits.multiprocessors / kCluster);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(clusters * kCluster));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = C::kSharedBytes;
  config.stream = stream;
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim.x = kCluster;
  attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  config.attrs = attributes;
  config.numAttrs = args.rows ? 2 : 1;  // rows: prepare comes before
  OCTOLORA_CUDA(cudaLaunchKernelEx(&config, args.x_f16 ? gemm<C, true, kEpilogue> : gemm<C, false, kEpilogue>, p),
                "sm_90 W8A16 gemm, %d tokens a tile: M = %d, N = %d, K = %d, %d outputs", C::kTokens, args.m,
                args.member[0].n, args.k, args.member_count);
}

template <class C, bool kEpilogue>
void set_up() {
  for (const auto kernel : {gemm<C, false, kEpilogue>, gemm<C, true, kEpilogue>}) {
    OCTOLORA_CUDA(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                       cudaFuncAttributeMaxDynamicSharedMemorySize, C::kSharedBytes),
                  "sm_90 W8A16 gemm, %d tokens a tile: %d bytes of shared memory", C::kTokens, C::kSharedBytes);
  }
}

// A tile, and what its main loop costs a token beside that of the widest.
struct Tile {
  int tokens, stages;
  double weight;
  bool epilogue, block_scales;
  void (*launch)(const GemmArgs&, const Limits&, cudaStream_t);
  void (*set_up)();
};
template <class C, bool kEpilogue>
constexpr Tile tile_of(double weight) {
  return {C::kTokens, C::kStages, weight, kEpilogue, C::kBlockScales, launch<C, kEpilogue>, set_up<C, kEpilogue>};
}
using Wide = Config<256, 64>;
using Odd = Config<216, 72>;
using Narrow = Config<128, 64>;
using Scaled = Config<160, 80, true>;
using ScaledNarrow = Config<128, 64, true>;
constexpr Tile kTiles[] = {
    tile_of<Wide, false>(1.0),          tile_of<Odd, false>(1.01),  tile_of<Narrow, false>(1.4),
    tile_of<Odd, true>(1.01),           tile_of<Narrow, true>(1.4), tile_of<Scaled, false>(1.0),
    tile_of<ScaledNarrow, false>(1.05), tile_of<Scaled, true>(1.0), tile_of<ScaledNarrow, true>(1.05)};

int64_t tiles_of(const GemmArgs& args, int tokens) {
  int64_t pairs = 0;
  for (int i = 0; i < args.member_count; ++i) pairs += pairs_of(args.member[i]);
  return (args.m + tokens - 1) / tokens * pairs;
}

bool any_epilogue(const GemmArgs& args) {
  return std::any_of(args.member, args.member + args.member_count,
                     [&](const GemmMember& out) { return has_epilogue(args, out); });
}

// The one whose tiles fill the last wave best.
const Tile& choose_tile(const GemmArgs& args, const Limits& limits) {
  const bool epilogue = any_epilogue(args), block_scales = has_block_scales(args);
  const auto cost = [&](const Tile& tile) {
    if (tile.epilogue != epilogue || tile.block_scales != block_scales) return HUGE_VAL;
    const int64_t tiles = tiles_of(args, tile.tokens), clusters = limits.multiprocessors / kCluster;
    return static_cast<double>((tiles + clusters - 1) / clusters) * tile.tokens * tile.weight;
  };
  return *std::min_element(std::begin(kTiles), std::end(kTiles),
                           [&](const Tile& a, const Tile& b) { return cost(a) < cost(b); });
}

void set_up_all(const Limits& limits) {
  if (limits.capability != 90) return;
  tensor_map_encoder();  // a driver without it fails here, not in a forward
  for (const Tile& tile : kTiles) tile.set_up();
}

const char* refuses(const GemmArgs& args, const Limits& limits) {
  if (limits.capability != 90) return "not compute capability 9.0";
  if (args.m <= 64) return "M <= 64";
  if (args.planes != 1) return "x is fp32";
  if (args.y_type == Dtype::f32) return "y is fp32";
  for (int i = 0; i < args.member_count; ++i) {
    const GemmMember& out = args.member[i];
    if (!out.block_scale != !args.member[0].block_scale) return "only some outputs have block scales";
    if (out.n % 8 || reinterpret_cast<uintptr_t>(out.y) % 16) return "rows of y are not of whole 16 bytes";
  }
  return nullptr;
}

void launch_best(const GemmArgs& args, const Limits& limits, cudaStream_t stream) {
  choose_tile(args, limits).launch(args, limits, stream);
}

void describe(const GemmArgs& args, const Limits& limits, Explanation& to) {
  const Tile& tile = choose_tile(args, limits);
  const double waves = static_cast<double>(tiles_of(args, tile.tokens)) / (limits.multiprocessors / kCluster);
  to.launch("%s%s, %d output%s: tile of %d tokens x %d, clusters of %d, %d stages, %.2f waves; %s", kGemmW8a16Sm90.name,
            tile.block_scales ? ", block scales" : "", args.member_count, args.member_count == 1 ? "" : "s",
            tile.tokens, kBlockN, kCluster, tile.stages, waves,
            tile.tokens == (tile.block_scales ? Scaled::kTokens : Wide::kTokens)
                ? "the widest tile"
                : "leaves less of the last wave empty than wider tiles");
}

}  // namespace

const GemmFamily kGemmW8a16Sm90 = {"wgmma 16-bit, weights widened in registers", set_up_all, refuses, launch_best,
                                   describe};

}  // namespace octolora::cuda
