// SPDX-License-Identifier: Apache-2.0
//
// W8A8 for Hopper: wgmma on tiles that the copy engine brings, all outputs of a call in one launch, and the low-rank
// update in the same accumulator fragments before the single store.
//
//   v[m,n] = p[m] * ( s_w[n] * (s_x[m] / p[m]) * sum_k q[m,k] W[n,k]  +  sum_r h[m,r] B[n,r] ) + bias[n]
//   y[m,n] = residual[m,n] + gate[n] * activation(v[m,n])
//
//   q [M,k_pitch] int8   W [N,k_pitch] int8   h [M,R], B [N,R] 16-bit   y [M,N] bf16 or fp16, rows of whole 16 bytes
//
// A block has one producer warp and two consumer warpgroups, which own 64 rows each of a 128 x kBlockN tile; blocks
// stay and walk over tiles. A cluster of two blocks takes two tiles above each other: each loads half of their common
// rows of W and multicasts it to both, which brings the traffic from L2 below what L2 can give. A stage is 128 bytes of
// each row of both operands, so 64 ranks of h and B fit where 128 values of q and W were, and two parts of a tile's
// residual. Where rows name their slots, only blocks of 64 ranks that a row of the cluster needs come, and of them a
// block multiplies the 16s that its own rows need.
//
// The producer thread decides what comes next and tells the consumers: a tile's place through a ring of two entries,
// the ranks that it needs beside its scales and biases. Between two tiles the tensor cores wait for the consumers to
// scale, add the low-rank update and round; to keep that short, a tile's results wait as 16-bit numbers, part in shared
// memory and part in registers, and leave during the main loop of the next tile.
//
// Barriers a stage: `full` (the bytes of both operands, one producer arrival) in each block; `empty`, with an arrival
// from each consumer warpgroup of both blocks, since a producer writes into both.
#include <cuda.h>

#include <algorithm>
#include <cmath>

#include "check.h"
#include "convert.cuh"
#include "dependent_launch.cuh"
#include "epilogue.cuh"
#include "kernels.h"
#include "ptx.cuh"
#include "tensor_map.h"
#include "wgmma.cuh"

namespace octolora::cuda {
namespace {

constexpr int kBlockM = 128, kBlockK = 128, kBlockRank = 64;
constexpr int kWarpgroups = 2, kThreads = 128 * (kWarpgroups + 1);
constexpr int kCluster = 2;
constexpr int kPart = 64;                   // columns of a tile that are finished together
constexpr int kPartBytes = 16 * kPart * 2;  // of y, a warp's
constexpr int kRasterPairs = 6;             // pairs of tiles along M that a wave walks together
constexpr int kResidentRankBlocks = 2;      // up to here the low-rank blocks of a tile are in stages at once
constexpr int kMmaColumns = 32;             // of h, up to which mma.sync is used in place of wgmma
constexpr int kResidualBytes = kBlockM * kPart * 2;
constexpr int kMaxSteps = 1024;  // of 16 low-rank columns, of all members
static_assert(kBlockM == kSlotRows, "a tile of rows has one answer to which steps it needs");

template <int BlockN_>
struct Config {
  static constexpr int kBlockN = BlockN_;
  static constexpr int kStages = kBlockN == 128 ? 6 : 4;
  static constexpr int kParts = (kBlockN + kPart - 1) / kPart;  // the last may be half of one
  static constexpr int kHeld =
      kBlockN == 192 || kBlockN == 224 ? 3 : 2;  // parts that wait in shared memory, the others in registers
  static constexpr int kStageBytes = (kBlockM + kBlockN) * 128;
  // Offsets in shared memory.
  static constexpr int kStaging = kStages * kStageBytes;
  static constexpr int kColumns = kStaging + kWarpgroups * 4 * kHeld * kPartBytes;  // s_w and bias of the tile
  static constexpr int kZeros = kColumns + kBlockN * 8;  // 32 bytes, the bias of those without
  static constexpr int kTypes = kZeros + 32;             // bit i: step i of B is fp16
  static constexpr int kNeeds = kTypes + kMaxSteps / 8;  // of the tile: {steps that come, steps it needs}, 32 each
  static constexpr int kWork = kNeeds + kMaxSteps / 4;   // ring of two int4
  static constexpr int kBarriers = kWork + 2 * 16;
  static constexpr int kSharedBytes = kBarriers + (kStages + 3) * 16;
  static_assert(kSharedBytes <= 232448, "what a block may have on sm_90");
};

// What a kernel can do beyond scales, adapters that all rows use, and bias: slots of rows; residual and gate, alone or
// behind one activation; all of these; and outliers too. What it cannot do is not in its code: even skipped, it delays
// what follows.
enum class After { nothing, slots_of_rows, residual, gelu_tanh, gelu_erf, silu, anything, outliers };

// Columns of a tile for which there are registers.
constexpr int widest(After what) { return what < After::residual ? 256 : what < After::outliers ? 224 : 192; }

struct Member {
  CUtensorMap w, h, b, residual;
  GemmMember out;
  int tiles_n, first_tile_n;  // of the columns of tiles of all members
  int rank_blocks, up_columns, chunk_columns;
  int first_step, steps;  // of 16 low-rank columns, whole words of bits
  int words;              // of 32 steps
  bool streams_ranks;     // more low-rank blocks than stay at once: they come once for each part of a tile
};

// Where a block's tile begins, and in which output. Columns are multiples of 32; one register has both.
struct Tile {
  int row, column_and_member;

  static_assert(kMaxMembers <= 32);
  __device__ __forceinline__ int column() const { return column_and_member & ~31; }
  __device__ __forceinline__ int member() const { return column_and_member & 31; }
};

struct Params {
  CUtensorMap q;
  GemmArgs args;
  int k_blocks, pairs_m, tiles_n, members;
  Member member[kMaxMembers];
};

// Of the bits of 32 steps, those of low-rank block `block`, with 8 of them in a word.
__device__ __forceinline__ uint32_t of_block(uint32_t steps, int block) { return steps >> block % 8 * 4 & 15; }

// Columns 8 j ... of a part: the accumulators of one mma tile.
__device__ __forceinline__ float (&four(float (&value)[kPart / 2], int j))[4] {
  return reinterpret_cast<float(&)[4]>(value[4 * j]);
}

// value [16 x 8 columns a tile] += x_o . W_o^T over the outlier columns, for the rows row, row + 8 and the columns of
// `first_column` that a lane holds. Outliers are few, so mma operands are gathered straight from memory; int8 is exact
// in both 16-bit types, and fp32 x goes in as three bf16 pieces.
__device__ __forceinline__ void add_outliers(float (&value)[kPart / 2], const GemmArgs& p, const GemmMember& out,
                                             int count, int row, int first_column) {
  const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  const bool f16 = p.raw_type == Dtype::f16;
  const auto x_at = [&](int m, int column, int piece) -> uint32_t {
    if (column < 0 || m >= p.m) return 0;
    const int64_t at = static_cast<int64_t>(m) * p.k + column;
    return p.raw_type == Dtype::f32 ? bf16_piece(static_cast<const float*>(p.raw_x)[at], piece)
                                    : static_cast<const uint16_t*>(p.raw_x)[at];
  };
  for (int base = 0; base < count; base += 16) {
    int column[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = base + i / 2 * 8 + 2 * t + i % 2;
      column[i] = at < count ? p.outliers.list[at] : -1;
    }
    const int pieces = p.raw_type == Dtype::f32 ? 3 : 1;
    uint32_t x[3][4];
#pragma unroll
    for (int piece = 0; piece < 3; ++piece) {
      if (piece < pieces) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int m = row + i % 2 * 8;
          x[piece][i] = x_at(m, column[i / 2 * 2], piece) | x_at(m, column[i / 2 * 2 + 1], piece) << 16;
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kPart / 8; ++j) {
      const int n = first_column + j * 8 + g;
      const int8_t* const w = out.weight + static_cast<int64_t>(n) * p.k_pitch;
      uint32_t bits[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) bits[i] = column[i] >= 0 && n < out.n ? encode16(w[column[i]], f16) : 0;
      const uint32_t b0 = bits[0] | bits[1] << 16, b1 = bits[2] | bits[3] << 16;
#pragma unroll
      for (int piece = 0; piece < 3; ++piece) {
        if (piece < pieces) {
          if (f16)
            ptx::mma_f16(four(value, j), x[piece], b0, b1);
          else
            ptx::mma_bf16(four(value, j), x[piece], b0, b1);
        }
      }
    }
  }
}

template <class C, bool kWide, After kAfter>
__global__ __launch_bounds__(kThreads, 1) void gemm(const __grid_constant__ Params p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr bool kOutliers = kAfter == After::outliers, kAnything = kAfter == After::anything || kOutliers;
  constexpr bool kSlots = kAfter == After::slots_of_rows || kAnything, kEpilogue = kAfter >= After::residual;
  extern __shared__ __align__(1024) uint8_t memory[];
  const uint32_t base = ptx::shared_address(memory);
  const uint32_t columns = base + C::kColumns, types = base + C::kTypes, barriers = base + C::kBarriers;
  const auto needs_at = [&](int word) { return base + C::kNeeds + word * 8; };
  const auto full = [&](int stage) { return barriers + stage * 16; };
  const auto empty = [&](int stage) { return barriers + stage * 16 + 8; };
  const uint32_t columns_full = barriers + C::kStages * 16, columns_empty = columns_full + 8;
  const auto work_entry = [&](int step) { return base + C::kWork + step % 2 * 16; };
  const auto work_full = [&](int step) { return columns_full + 16 + step % 2 * 16; };
  const auto work_empty = [&](int step) { return columns_full + 24 + step % 2 * 16; };
  const uint32_t rank = ptx::cluster_rank();
  const int warpgroup = static_cast<int>(threadIdx.x) / 128, lane = static_cast<int>(threadIdx.x) % 32;

  if (threadIdx.x == 0) {
    for (int stage = 0; stage < C::kStages; ++stage) {
      ptx::barrier_init(full(stage), 1);
      ptx::barrier_init(empty(stage), kCluster * kWarpgroups);
    }
    ptx::barrier_init(columns_full, 1);
    ptx::barrier_init(columns_empty, kWarpgroups * 4);
    for (int i = 0; i < 2; ++i) {
      ptx::barrier_init(work_full(i), 1);
      ptx::barrier_init(work_empty(i), kWarpgroups * 4);
    }
    ptx::barrier_init_fence();
  }
  if (threadIdx.x < 8) ptx::store_shared(base + C::kZeros + threadIdx.x * 4, 0.f);
  __syncthreads();
  ptx::cluster_sync();

  const int cluster = static_cast<int>(blockIdx.x) / kCluster;
  int stage = 0;
  uint32_t phase = 0;
  const auto step_stage = [&] {
    if (++stage == C::kStages) {
      stage = 0;
      phase ^= 1;
    }
  };

  if (warpgroup == kWarpgroups) {
    ptx::registers_fewer<40>();
    if (threadIdx.x == kWarpgroups * 128) {
      const int clusters = static_cast<int>(gridDim.x) / kCluster;
      const int tiles = p.pairs_m * p.tiles_n;
      const auto place = [&](int tile) {
        const int group = tile / (kRasterPairs * p.tiles_n), within = tile - group * kRasterPairs * p.tiles_n;
        const int pairs = min(kRasterPairs, p.pairs_m - group * kRasterPairs);
        const int pair = group * kRasterPairs + within % pairs, tile_n = within / pairs;
        int member = 0;
        while (member + 1 < p.members && tile_n >= p.member[member + 1].first_tile_n) ++member;
        return Tile{(pair * kCluster + static_cast<int>(rank)) * kBlockM,
                    (tile_n - p.member[member].first_tile_n) * C::kBlockN + member};
      };

      ptx::prefetch_map(&p.q);
      ptx::prefetch_map(&p.member[0].w);
      constexpr uint32_t kXBytes = kBlockM * 128;
      const auto x_tile = [&] { return base + stage * C::kStageBytes; };
      const auto load_w = [&](const CUtensorMap& map, int byte, int row, int rows) {
        const int part = static_cast<int>(rank) * (rows / kCluster);
        ptx::tensor_load_multicast(x_tile() + kXBytes + part * 128, &map, byte, row + part, full(stage),
                                   (1 << kCluster) - 1);
      };
      const auto begin_stage = [&](int rows) {
        ptx::barrier_wait(empty(stage), phase ^ 1);
        ptx::barrier_expect_bytes(full(stage), kXBytes + rows * 128);
      };

      Tile tile = place(cluster);
      // Weights do not depend on the kernel before: the first of them come while it ends.
      const int early = min(C::kStages, p.k_blocks);
      for (int block = 0; block < early; ++block) {
        begin_stage(C::kBlockN);
        load_w(p.member[tile.member()].w, block * 128, tile.column(), C::kBlockN);
        step_stage();
      }
      ptx::wait_for_primaries();
      stage = 0;
      for (int block = 0; block < early; ++block) {
        ptx::tensor_load(x_tile(), &p.q, block * 128, tile.row, full(stage));
        step_stage();
      }
      phase = early == C::kStages;
      const auto tell = [&](int step, uint4 entry) {
        ptx::barrier_wait(work_empty(step), (step / 2 & 1) ^ 1);
        ptx::store_shared(work_entry(step), entry);
        ptx::barrier_arrive(work_full(step));
      };
      // Which steps the tile of rows at `row` needs.
      const auto needed = [&](const Member& member, int row, int word) -> uint32_t {
        if (row >= p.args.m) return 0;
        if (member.out.needed_steps) return member.out.needed_steps[row / kSlotRows * member.words + word];
        const int steps = member.up_columns / kChunkRank - word * 32;
        return steps < 32 ? (1u << steps) - 1 : ~0u;
      };
      int step = 0;
      for (int next = cluster; next < tiles; next += clusters, ++step) {
        if (step > 0) tile = place(next);
        const Member& member = p.member[tile.member()];
        tell(step, {static_cast<uint32_t>(tile.row), static_cast<uint32_t>(tile.column_and_member), 1, 0});
        for (int block = 0; block < p.k_blocks; ++block) {
          if (step > 0 || block >= early) {
            begin_stage(C::kBlockN);
            load_w(member.w, block * 128, tile.column(), C::kBlockN);
            ptx::tensor_load(x_tile(), &p.q, block * 128, tile.row, full(stage));
            step_stage();
          }
          // Once the consumers are in this tile for sure, where there are enough blocks.
          if (block == min(C::kStages, p.k_blocks - 1)) {
            ptx::barrier_wait(columns_empty, step & 1 ^ 1);
            for (int word = 0; kSlots && word < member.words; ++word) {
              const uint32_t mine = needed(member, tile.row, word), other = needed(member, tile.row ^ kBlockM, word);
              ptx::store_shared(needs_at(word), uint2{mine | other, mine});
            }
            const uint32_t bytes = static_cast<uint32_t>(min(C::kBlockN, member.out.n - tile.column())) * 4;
            ptx::barrier_expect_bytes(columns_full, member.out.bias ? 2 * bytes : bytes);
            ptx::bulk_load(columns, member.out.scale + tile.column(), bytes, columns_full);
            if (member.out.bias)
              ptx::bulk_load(columns + C::kBlockN * 4, member.out.bias + tile.column(), bytes, columns_full);
          }
        }
        const bool streams = kWide && member.streams_ranks;
        const int rows = streams ? kPart : C::kBlockN;
        for (int part = 0; part < (streams ? C::kParts : 1); ++part) {
#pragma unroll 1
          for (int block = 0; block < member.rank_blocks; ++block) {
            if (kSlots && !of_block(ptx::load_shared(needs_at(block / 8)), block)) continue;
            begin_stage(rows);
            load_w(member.b, block * 128, tile.column() + part * kPart, rows);
            ptx::tensor_load(x_tile(), &member.h, block * 128, tile.row, full(stage));
            step_stage();
          }
          if (!kEpilogue || !member.out.residual) continue;
          // Two parts of the residual a stage, or the one that is next.
          const int end = streams ? part + 1 : C::kParts;
#pragma unroll 1
          for (int first = part; first < end; first += 2) {
            const int boxes = min(2, end - first);
            ptx::barrier_wait(empty(stage), phase ^ 1);
            ptx::barrier_expect_bytes(full(stage), boxes * kResidualBytes);
#pragma unroll 1
            for (int i = 0; i < boxes; ++i) {
              ptx::tensor_load(x_tile() + i * kResidualBytes, &member.residual,
                               (tile.column() + (first + i) * kPart) * 2, tile.row, full(stage));
            }
            step_stage();
          }
        }
      }
      tell(step, {0, 0, 0, 0});
    }
  } else {
    ptx::registers_more<232>();
    constexpr int kRegisters = C::kBlockN / 2;
    const int warp = static_cast<int>(threadIdx.x) / 32 % 4;
    const int g = lane / 4, t = lane % 4;
    const auto release = [&](int which) {
      if (threadIdx.x % 128 < kCluster) ptx::barrier_arrive_cluster(empty(which), threadIdx.x % 128);
    };
    const auto before_stage = [&] { return (stage ? stage : C::kStages) - 1; };
    const auto x_operand = [&](int which) {
      return ptx::wgmma_descriptor(base + which * C::kStageBytes + warpgroup * 64 * 128);
    };
    const auto w_operand = [&](int which) {
      return ptx::wgmma_descriptor(base + which * C::kStageBytes + kBlockM * 128);
    };
    // The last part of a tile may be half of one.
    const auto exists = [](int part, int column) { return part * kPart + column < C::kBlockN; };
    const auto meet = [&] { ptx::named_sync(2 + warpgroup, 128); };  // of the warpgroup
    ptx::wait_for_primaries();
    // Which steps of 16 ranks are fp16: 32 of them a warp at a time. Slots change between launches, not during one.
    for (int i = 0; i < p.members; ++i) {
      const Member& member = p.member[i];
      for (int step = static_cast<int>(threadIdx.x); step < member.steps; step += kWarpgroups * 128) {
        const bool f16 = step * kChunkRank < member.up_columns &&
                         member.out.adapters.chunks[step * kChunkRank / member.chunk_columns].b_f16;
        const uint32_t bits = __ballot_sync(~0u, f16);
        if (lane == 0) ptx::store_shared(types + (member.first_step + step) / 8, __uint_as_float(bits));
      }
    }
    ptx::named_sync(1, kWarpgroups * 128);

    Tile tile{};
    // What waits to be stored: the place of its tile and the parts that are in registers. At first nothing, in a row
    // that does not exist.
    Tile waiting{p.args.m, 0};
    constexpr int kInRegisters = C::kParts - C::kHeld;
    uint32_t packed[kInRegisters ? kInRegisters * 16 : 1] = {};
    const uint32_t my_staging = base + C::kStaging + (warpgroup * 4 + warp) * C::kHeld * kPartBytes;
    // 16 bytes of a part of the warp's rows; they are swizzled.
    const auto piece_at = [&](int part, int row, int piece) {
      return my_staging + part % C::kHeld * kPartBytes + row * 128 + ((piece ^ row % 8) * 16);
    };
    const auto stage_part = [&](int part, const uint32_t* bits) {
#pragma unroll
      for (int pair = 0; pair < kPart / 16; ++pair) {
        // Matrix i of the four: rows 8 (i % 2).., columns 8 (i / 2)..; a lane gives the address of one row.
        ptx::store_matrix_x4(piece_at(part, lane % 16, pair * 2 + lane / 16), bits[4 * pair], bits[4 * pair + 1],
                             bits[4 * pair + 2], bits[4 * pair + 3]);
      }
      __syncwarp();
    };
    // Reads ahead what the tail needs from memory beside the rows' numbers.
    [[maybe_unused]] const auto touch_ahead = [&](const GemmMember& out, int row) {
      if (kSlots && p.args.row_slot && row < p.args.m) ptx::touch(p.args.row_slot + row);
      const int column = tile.column() + lane * 8;
      if (kEpilogue && out.gate && lane * 8 < C::kBlockN && column < out.n)
        ptx::touch(static_cast<const uint16_t*>(out.gate) + column);
    };
    const auto store_part = [&](int part) {
      if constexpr (kInRegisters > 0) {
        if (part >= C::kHeld) stage_part(part, packed + (part >= C::kHeld ? part - C::kHeld : 0) * 16);
      }
      const GemmMember& out = p.member[waiting.member()].out;
      const int row = waiting.row + warpgroup * 64 + warp * 16 + lane / 8;
      const int column = waiting.column() + part * kPart + lane % 8 * 8;
      uint16_t* const to = static_cast<uint16_t*>(out.y) + static_cast<int64_t>(row) * out.n + column;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint4 bits = ptx::load_shared_16(piece_at(part, i * 4 + lane / 8, lane % 8));
        if (row + i * 4 < p.args.m && column < out.n && exists(part, lane % 8 * 8))
          *reinterpret_cast<uint4*>(to + static_cast<int64_t>(i) * 4 * out.n) = bits;
      }
      __syncwarp();
    };

    for (int step = 0;; ++step) {
      ptx::barrier_wait(work_full(step), step / 2 & 1);
      const uint4 entry = ptx::load_shared_16(work_entry(step));
      __syncwarp();
      if (lane == 0) ptx::barrier_arrive(work_empty(step));
      if (entry.z == 0) break;
      tile = {static_cast<int>(entry.x), static_cast<int>(entry.y)};
      const Member& member = p.member[tile.member()];
      const int first_row = tile.row + warpgroup * 64 + warp * 16 + g;
      RowScale rows[2];
      for (int i = 0; i < 2; ++i) {
        rows[i] = first_row + 8 * i < p.args.m ? p.args.rows[first_row + 8 * i] : RowScale{1.f, 1.f};
      }
      int32_t sum[kRegisters];
      for (int block = 0; block < p.k_blocks; ++block) {
        ptx::barrier_wait(full(stage), phase);
        const uint64_t x = x_operand(stage), w = w_operand(stage);
        ptx::wgmma_fence();
#pragma unroll
        for (int k = 0; k < 4; ++k) ptx::wgmma_s8(sum, x + 2 * k, w + 2 * k, block > 0 || k > 0);
        ptx::wgmma_commit();
        if (block > 0) {
          ptx::wgmma_wait<1>();
          release(before_stage());
        }
        // One part every other block: the writes spread over time.
#pragma unroll
        for (int part = 0; part < C::kParts; ++part) {
          if (block == 1 + 2 * part) store_part(part);
        }
        if ((kSlots || kEpilogue) && block == 2 * C::kParts) touch_ahead(member.out, first_row);
        step_stage();
      }
      ptx::wgmma_wait<0>();
      release(before_stage());
#pragma unroll
      for (int part = 0; part < C::kParts; ++part) {
        if (p.k_blocks <= 1 + 2 * part) store_part(part);
      }
      if ((kSlots || kEpilogue) && p.k_blocks <= 2 * C::kParts) touch_ahead(member.out, first_row);
      // 1 / p of a power of two. The empty statement keeps the compiler from computing this before the main loop,
      // where it would wait for the rows' numbers.
      float inverse[2];
      for (int i = 0; i < 2; ++i) {
        ptx::pin(rows[i].power);
        inverse[i] = __uint_as_float((254u << 23) - __float_as_uint(rows[i].power));
        if (!kOutliers) rows[i].scale *= inverse[i];  // outliers join before the division
      }
      waiting = tile;
      ptx::barrier_wait(columns_full, step & 1);
      const uint32_t my_scales = columns + t * 8;
      const uint32_t my_biases = member.out.bias ? my_scales + C::kBlockN * 4 : base + C::kZeros + t * 8;
      const int bias_step = member.out.bias ? 32 : 0;
      const bool streams = kWide && member.streams_ranks;
      // Low-rank blocks that stay in their stages until the last part.
      int held = streams ? 0 : member.rank_blocks;
      uint2 needs{};  // of the first 32 steps
      bool slot_biases = false;
      if constexpr (kSlots) {
        if (member.rank_blocks) needs = ptx::load_shared_8(needs_at(0));
        for (int block = 0; !streams && block < member.rank_blocks; ++block) held -= of_block(needs.x, block) == 0;
        slot_biases = p.args.row_slot && __any_sync(~0u, slot_with_bias(p.args, member.out, first_row) >= 0 ||
                                                             slot_with_bias(p.args, member.out, first_row + 8) >= 0);
      }

      // The sums as floats in units of p, with the low-rank update.
      const auto begin_part = [&](int part, float(&v)[kPart / 2]) {
#pragma unroll
        for (int j = 0; j < kPart / 8; ++j) {
          if (!exists(part, j * 8)) continue;
          const int32_t* const total = sum + part * 32 + 4 * j;
          if constexpr (kOutliers) {
#pragma unroll
            for (int i = 0; i < 4; ++i) v[4 * j + i] = static_cast<float>(total[i]) * rows[i / 2].scale;
          } else {
            const float2 scale = ptx::load_shared_pair(my_scales + (part * kPart / 8 + j) * 32);
#pragma unroll
            for (int i = 0; i < 4; ++i)
              v[4 * j + i] = static_cast<float>(total[i]) * rows[i / 2].scale * (i % 2 ? scale.y : scale.x);
          }
        }
        if constexpr (kOutliers) {
          add_outliers(v, p.args, member.out, *p.args.outliers.count, first_row, tile.column() + part * kPart);
#pragma unroll
          for (int j = 0; j < kPart / 8; ++j) {
            const float2 scale = ptx::load_shared_pair(my_scales + (part * kPart / 8 + j) * 32);
#pragma unroll
            for (int i = 0; i < 4; ++i) v[4 * j + i] = v[4 * j + i] * inverse[i / 2] * (i % 2 ? scale.y : scale.x);
          }
        }
        if constexpr (kWide) {
          int from = stage;
          uint32_t from_phase = phase;
          for (int block = 0; block < member.rank_blocks; ++block) {
            [[maybe_unused]] uint32_t needed = 0;
            if constexpr (kSlots) {
              const uint2 of_word = ptx::load_shared_8(needs_at(block / 8));
              if (!of_block(of_word.x, block)) continue;
              needed = of_block(of_word.y, block);
            }
            if (part == 0 || streams) ptx::barrier_wait(full(from), from_phase);
            const uint64_t x = x_operand(from);
            const uint64_t b = w_operand(from) + (streams ? 0 : part * (kPart * 128 >> 4));
            const int steps = min(4, member.up_columns / kChunkRank - block * 4);
            const uint32_t f16 = of_block(ptx::load_shared(types + (member.first_step / 8 + block / 8 * 4)), block);
            ptx::wgmma_fence();
            for (int k = 0; k < steps; ++k) {
              if (kSlots && !(needed >> k & 1)) continue;
              const auto multiply = [&](auto& value) {
                if (f16 >> k & 1)
                  ptx::wgmma_f16(value, x + 2 * k, b + 2 * k, true);
                else
                  ptx::wgmma_bf16(value, x + 2 * k, b + 2 * k, true);
              };
              if (exists(part, kPart / 2))
                multiply(v);
              else
                multiply(reinterpret_cast<float(&)[kPart / 4]>(v));
            }
            ptx::wgmma_commit();
            ptx::wgmma_wait<0>();
            if (streams) {
              if (kSlots && !needed) meet();  // no wgmma says that all warps have seen the stage
              release(from);
            }
            if (++from == C::kStages) {
              from = 0;
              from_phase ^= 1;
            }
          }
          if (streams) {
            stage = from;
            phase = from_phase;
          }
        } else if (kSlots ? needs.x : member.rank_blocks) {
          if (part == 0) ptx::barrier_wait(full(stage), phase);
          const uint32_t h_tile = base + stage * C::kStageBytes + (warpgroup * 64 + warp * 16) * 128;
          const uint32_t b_tile = base + stage * C::kStageBytes + (kBlockM + part * kPart) * 128;
          const int h_row = lane % 16, b_row = lane / 16 * 8 + lane % 8;
          const uint32_t f16 = ptx::load_shared(types + member.first_step / 8);
          for (int k = 0; k * kChunkRank < member.up_columns; ++k) {
            if (kSlots && !(needs.y >> k & 1)) continue;
            uint32_t h[4];
            ptx::load_matrix_x4(h, h_tile + h_row * 128 + (((k * 2 + lane / 16) ^ h_row % 8) * 16));
            const uint32_t b_at = b_tile + b_row * 128 + (((k * 2 + lane / 8 % 2) ^ b_row % 8) * 16);
            const auto multiply = [&](auto&& mma) {
#pragma unroll
              for (int pair = 0; pair < kPart / 16; ++pair) {
                if (!exists(part, pair * 16)) continue;
                uint32_t b[4];
                ptx::load_matrix_x4(b, b_at + pair * 16 * 128);
                mma(four(v, 2 * pair), h, b[0], b[1]);
                mma(four(v, 2 * pair + 1), h, b[2], b[3]);
              }
            };
            using Registers = const uint32_t(&)[4];
            if (f16 >> k & 1)
              multiply([](float(&c)[4], Registers x, uint32_t b0, uint32_t b1) { ptx::mma_f16(c, x, b0, b1); });
            else
              multiply([](float(&c)[4], Registers x, uint32_t b0, uint32_t b1) { ptx::mma_bf16(c, x, b0, b1); });
          }
        }
      };
      // From a stage that holds this part, or it and its neighbour.
      [[maybe_unused]] const auto add_residual = [&](int part, float(&v)[kPart / 2]) {
        const int by = (streams ? 0 : part / 2) + held, of_two = streams ? 0 : part % 2;
        const int from = stage + by < C::kStages ? stage + by : stage + by - C::kStages;
        if (of_two == 0) ptx::barrier_wait(full(from), phase ^ (stage + by >= C::kStages));
        // The rows of a warp lie there as in its staging buffer.
        const uint32_t from_staging =
            base + from * C::kStageBytes + of_two * kResidualBytes + (warpgroup * 4 + warp) * kPartBytes - my_staging;
#pragma unroll
        for (int pair = 0; pair < kPart / 16; ++pair) {
          if (!exists(part, pair * 16)) continue;
          uint32_t bits[4];
          ptx::load_matrix_x4(bits, piece_at(0, lane % 16, pair * 2 + lane / 16) + from_staging);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float2 more = decode16x2(bits[i], p.args.y_type == Dtype::f16);
            v[8 * pair + 2 * i] += more.x;
            v[8 * pair + 2 * i + 1] += more.y;
          }
        }
        if (streams || of_two == 1 || part + 1 == C::kParts) {
          meet();  // ldmatrix of all warps is done
          release(from);
          if (streams) step_stage();
        }
      };
      // Out of units of p, finished and rounded.
      const auto end_part = [&](int part, float(&v)[kPart / 2]) {
#pragma unroll
        for (int j = 0; j < kPart / 8; ++j) {
          if (!exists(part, j * 8)) continue;
          const float2 bias = ptx::load_shared_pair(my_biases + (part * kPart / 8 + j) * bias_step);
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            v[4 * j + 2 * i] = v[4 * j + 2 * i] * rows[i].power + bias.x;
            v[4 * j + 2 * i + 1] = v[4 * j + 2 * i + 1] * rows[i].power + bias.y;
          }
        }
        if (kSlots && slot_biases)
          add_slot_biases(p.args, member.out, v, first_row, tile.column() + part * kPart + 2 * t);
        if constexpr (kEpilogue) {
          const auto is = [&](After one, Activation activation) {
            return kAfter == one || (kAnything && member.out.activation == activation);
          };
          if (is(After::gelu_tanh, Activation::gelu_tanh)) activate_all<Activation::gelu_tanh>(v);
          if (is(After::gelu_erf, Activation::gelu_erf)) activate_all<Activation::gelu_erf>(v);
          if (is(After::silu, Activation::silu)) activate_all<Activation::silu>(v);
          if (member.out.gate) multiply_gate(p.args, member.out, v, tile.column() + part * kPart + 2 * t);
          if (member.out.residual) add_residual(part, v);
        }
        uint32_t bits[kPart / 4];
        if (p.args.y_type == Dtype::f16) {
#pragma unroll
          for (int i = 0; i < kPart / 4; ++i)
            bits[i] = exists(part, i / 2 * 8) ? pack_f16x2(v[2 * i], v[2 * i + 1]) : 0;
        } else {
#pragma unroll
          for (int i = 0; i < kPart / 4; ++i)
            bits[i] = exists(part, i / 2 * 8) ? pack_bf16x2(v[2 * i], v[2 * i + 1]) : 0;
        }
        if (part < C::kHeld) {
          stage_part(part, bits);
        } else if constexpr (kInRegisters > 0) {
#pragma unroll
          for (int i = 0; i < kPart / 4; ++i) packed[(part - C::kHeld) * 16 + i] = bits[i];
        }
      };
#pragma unroll
      for (int part = 0; part < C::kParts; ++part) {
        float v[kPart / 2];
        begin_part(part, v);
        if (part + 1 == C::kParts) {
          // All warps are done with the stages, by ldmatrix, or having skipped them.
          if ((!kWide || kSlots) && held) meet();
          for (; held > 0; --held) {
            release(stage);
            step_stage();
          }
        }
        end_part(part, v);
      }
      if (kEpilogue && member.out.residual && !streams) {
        for (int part = 0; part < C::kParts; part += 2) step_stage();
      }
      __syncwarp();
      if (lane == 0) ptx::barrier_arrive(columns_empty);
    }
#pragma unroll
    for (int part = 0; part < C::kParts; ++part) store_part(part);
  }
  ptx::cluster_sync();  // no block leaves while its peer may still write to it
#endif
}

template <class C>
Params params_of(const GemmArgs& args) {
  Params p{};
  p.args = args;
  p.q = tensor_map(args.x, args.k_pitch, args.m, args.x_pitch, kBlockM);
  p.k_blocks = (args.k + kBlockK - 1) / kBlockK;
  p.pairs_m = (args.m + kBlockM * kCluster - 1) / (kBlockM * kCluster);
  p.members = args.member_count;
  int steps = 0;
  for (int i = 0; i < p.members; ++i) {
    Member& to = p.member[i];
    to.out = args.member[i];
    const int up = to.out.adapters.up_columns;
    to.rank_blocks = (up + kBlockRank - 1) / kBlockRank;
    to.words = needed_words(up);
    to.streams_ranks = up > kResidentRankBlocks * kBlockRank;
    to.w = tensor_map(to.out.weight, args.k_pitch, to.out.n, args.k_pitch, C::kBlockN / kCluster);
    if (up) {
      to.h = tensor_map(to.out.h, up * 2, args.m, up * 2, kBlockM);
      to.b =
          tensor_map(to.out.adapters.b, up * 2, to.out.n, up * 2, (to.streams_ranks ? kPart : C::kBlockN) / kCluster);
    }
    if (to.out.residual)
      to.residual = tensor_map(to.out.residual, int64_t{to.out.n} * 2, args.m, int64_t{to.out.n} * 2, kBlockM);
    to.up_columns = up;
    to.chunk_columns = up ? up / to.out.adapters.chunk_count : kChunkRank;
    to.first_step = steps;
    to.steps = to.words * 32;
    steps += to.steps;
    to.first_tile_n = p.tiles_n;
    to.tiles_n = (to.out.n + C::kBlockN - 1) / C::kBlockN;
    p.tiles_n += to.tiles_n;
  }
  return p;
}

template <class C, bool kWide, After kAfter>
void launch(const GemmArgs& args, const Limits& limits, cudaStream_t stream) {
  const Params p = params_of<C>(args);
  const int clusters = std::min(p.pairs_m * p.tiles_n, limits.multiprocessors / kCluster);
  const DependentLaunch launch(clusters * kCluster, kThreads, kCluster, C::kSharedBytes, stream);
  OCTOLORA_CUDA(cudaLaunchKernelEx(&launch.config, gemm<C, kWide, kAfter>, p),
                "sm_90 gemm tile %dx%d: M = %d, K = %d, %d outputs, N = %d, up columns = %d", kBlockM, C::kBlockN,
                args.m, args.k, args.member_count, args.member[0].n, args.member[0].adapters.up_columns);
}

template <class C, After kAfter>
void set_up() {
  for (const auto kernel : {gemm<C, false, kAfter>, gemm<C, true, kAfter>}) {
    OCTOLORA_CUDA(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                       cudaFuncAttributeMaxDynamicSharedMemorySize, C::kSharedBytes),
                  "sm_90 gemm tile %dx%d: %d bytes of shared memory", kBlockM, C::kBlockN, C::kSharedBytes);
  }
}

template <After kAfter>
void set_up_epilogue() {
  set_up<Config<224>, kAfter>();
  set_up<Config<192>, kAfter>();
}

void set_up_all(const Limits& limits) {
  if (limits.capability != 90) return;
  tensor_map_encoder();  // a driver without it fails here, not in a forward
  set_up<Config<256>, After::nothing>();
  set_up<Config<224>, After::nothing>();
  set_up<Config<192>, After::nothing>();
  set_up<Config<128>, After::nothing>();
  set_up<Config<256>, After::slots_of_rows>();
  set_up<Config<224>, After::slots_of_rows>();
  set_up<Config<192>, After::slots_of_rows>();
  set_up<Config<128>, After::slots_of_rows>();
  for (const auto set_up_one :
       {set_up_epilogue<After::residual>, set_up_epilogue<After::gelu_tanh>, set_up_epilogue<After::gelu_erf>,
        set_up_epilogue<After::silu>, set_up_epilogue<After::anything>})
    set_up_one();
  set_up<Config<128>, After::anything>();
  set_up<Config<192>, After::outliers>();
  set_up<Config<128>, After::outliers>();
}

const char* refuses(const GemmArgs& args, const Limits& limits) {
  if (limits.capability != 90) return "not compute capability 9.0";
  if (args.m <= 64) return "M <= 64";
  if (args.y_type == Dtype::f32) return "y is fp32";
  if (args.store_sums) return "the sums are asked for";
  int steps = 0;
  for (int i = 0; i < args.member_count; ++i) {
    const GemmMember& out = args.member[i];
    if (out.n % 8 || reinterpret_cast<uintptr_t>(out.y) % 16) return "rows of y are not of whole 16 bytes";
    if (reinterpret_cast<uintptr_t>(out.residual) % 16 || reinterpret_cast<uintptr_t>(out.gate) % 4)
      return "the residual or the gate is not aligned to 16 and 4 bytes";
    steps += round_up(out.adapters.up_columns / kChunkRank, 32);
  }
  return steps > kMaxSteps ? "more than 16384 columns of h" : nullptr;
}

bool is_wide(const GemmArgs& args) {
  for (int i = 0; i < args.member_count; ++i) {
    if (args.member[i].adapters.up_columns > kMmaColumns) return true;
  }
  return false;
}

After after(const GemmArgs& args) {
  if (args.outliers.list) return After::outliers;
  bool same = true, slots = false, more = false;
  for (int i = 0; i < args.member_count; ++i) {
    const GemmMember& out = args.member[i];
    same = same && out.activation == args.member[0].activation;
    slots = slots || (args.row_slot && out.adapters.slot_count);
    more = more || out.activation != Activation::none || out.residual || out.gate;
  }
  if (!more) return slots ? After::slots_of_rows : After::nothing;
  if (slots || !same) return After::anything;
  switch (args.member[0].activation) {
    case Activation::gelu_tanh:
      return After::gelu_tanh;
    case Activation::gelu_erf:
      return After::gelu_erf;
    case Activation::silu:
      return After::silu;
    case Activation::none:
      return After::residual;
  }
  return After::anything;
}

struct Choice {
  int width;
  double waves;
};

// The width whose whole waves take the least time, weighed by what a tile's main loop reaches of the tensor cores: the
// narrower it is, the more it asks of shared memory. Clocks of a main loop at K = 3072 on an H200: 256 columns 25 700,
// 192 columns 20 200; the others follow the trend.
Choice choose(const GemmArgs& args, const Limits& limits) {
  constexpr struct {
    int width;
    double speed;
  } kWidths[] = {{256, 1.}, {224, 0.99}, {192, 0.97}, {128, 0.85}};
  Choice best{};
  double best_cost = 0;
  for (const auto& [width, speed] : kWidths) {
    if (width > widest(after(args))) continue;
    int64_t tiles = 0;
    for (int i = 0; i < args.member_count; ++i) tiles += (args.member[i].n + width - 1) / width;
    tiles *= (args.m + kBlockM * kCluster - 1) / (kBlockM * kCluster);
    const double waves = static_cast<double>(tiles) / (limits.multiprocessors / kCluster);
    const double cost = std::ceil(waves) * width / speed;
    if (best.width == 0 || cost < best_cost) {
      best = {width, waves};
      best_cost = cost;
    }
  }
  return best;
}

template <class C, After kAfter>
void launch_config(const GemmArgs& args, const Limits& limits, cudaStream_t stream) {
  (is_wide(args) ? launch<C, true, kAfter> : launch<C, false, kAfter>)(args, limits, stream);
}

template <After kAfter>
void launch_width(int width, const GemmArgs& args, const Limits& limits, cudaStream_t stream) {
  if constexpr (widest(kAfter) >= 256) {
    if (width == 256) return launch_config<Config<256>, kAfter>(args, limits, stream);
  }
  if constexpr (widest(kAfter) >= 224) {
    if (width == 224) return launch_config<Config<224>, kAfter>(args, limits, stream);
  }
  if (width == 192) return launch_config<Config<192>, kAfter>(args, limits, stream);
  constexpr bool kOne = kAfter >= After::residual && kAfter < After::anything;  // narrow tiles have no kernels for one
  launch_config<Config<128>, kOne ? After::anything : kAfter>(args, limits, stream);
}

void launch_all(const GemmArgs& args, const Limits& limits, cudaStream_t stream) {
  constexpr void (*kLaunch[])(int, const GemmArgs&, const Limits&, cudaStream_t) = {
      launch_width<After::nothing>,   launch_width<After::slots_of_rows>, launch_width<After::residual>,
      launch_width<After::gelu_tanh>, launch_width<After::gelu_erf>,      launch_width<After::silu>,
      launch_width<After::anything>,  launch_width<After::outliers>};
  kLaunch[static_cast<int>(after(args))](choose(args, limits).width, args, limits, stream);
}

constexpr const char* kAfterText[] = {"",
                                      "; of the ranks, those of the rows' slots",
                                      "; residual or gate before the store",
                                      "; gelu_tanh before the store",
                                      "; gelu_erf before the store",
                                      "; silu before the store",
                                      "; epilogue before the store",
                                      "; outliers and epilogue before the store"};

void describe(const GemmArgs& args, const Limits& limits, Explanation& to) {
  const Choice choice = choose(args, limits);
  int n = 0;
  for (int i = 0; i < args.member_count; ++i) n += args.member[i].n;
  to.launch(
      "%s, %d output%s, N = %d: tile %dx%d, whose %.2f waves take the least time, clusters of %d, %d stages; "
      "low-rank update by %s%s",
      kGemmSm90.name, args.member_count, args.member_count == 1 ? "" : "s", n, kBlockM, choice.width, choice.waves,
      kCluster, choice.width == 128 ? Config<128>::kStages : Config<256>::kStages, is_wide(args) ? "wgmma" : "mma.sync",
      kAfterText[static_cast<int>(after(args))]);
}

}  // namespace

const GemmFamily kGemmSm90 = {"wgmma s8", set_up_all, refuses, launch_all, describe};

}  // namespace octolora::cuda
