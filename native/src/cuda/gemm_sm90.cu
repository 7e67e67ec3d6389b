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
// A block has one producer warp and two or three consumer warpgroups, which own 64 rows each of a tile of 128 or 192;
// blocks stay and walk over tiles. A cluster of two blocks takes two tiles above each other: each loads half of their
// common rows of W and multicasts it to both, which brings the traffic from L2 below what L2 can give. A stage is 128
// bytes of each row of both operands, so 64 ranks of h and B fit where 128 values of q and W were, and two parts of a
// tile's residual. Where rows name their slots, only blocks of 64 ranks that a row of the cluster needs come, and of
// them a block multiplies the 16s that its own rows need.
//
// Outlier columns of x and of W, which outliers.cu gathers, come between K and the ranks. Up to 64 of them are one more
// such stage; more come once for each part of a tile, as do the ranks behind them, and beyond those that were gathered
// two idle warps of the producer's warpgroup fill the stages.
//
// The producer thread decides what comes next and tells the consumers a tile's place through a ring of two entries. A
// second thread brings what the end of a tile takes: its scales and biases, and which ranks it needs. Between two tiles
// the tensor cores wait for the consumers to scale, add the low-rank update and round; to keep that short, a tile's
// results wait as 16-bit numbers, part in shared memory and part in registers, and leave during the main loop of the
// next tile.
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
#include "outliers.cuh"
#include "ptx.cuh"
#include "tensor_map.h"
#include "wgmma.cuh"

namespace octolora::cuda {
namespace {

constexpr int kBlockK = 128, kBlockRank = 64;
constexpr int kCluster = 2;
constexpr int kPart = 64;                   // columns of a tile that are finished together
constexpr int kPartBytes = 16 * kPart * 2;  // of y, a warp's
constexpr int kRasterPairs = 6;             // pairs of tiles along M that a wave walks together
constexpr int kResidentRankBlocks = 2;      // up to here the low-rank blocks of a tile are in stages at once
// Columns of h up to which mma.sync is used in place of wgmma; where rows name slots, a tile needs few of them.
constexpr int kMmaColumns = 32, kMmaColumnsOfSlots = kBlockRank;
constexpr int kGatherBarrier = 5;  // behind those of the warpgroups
constexpr int kMaxSteps = 1024;    // of 16 low-rank columns, of all members

template <int BlockM_, int BlockN_>
struct Config {
  static constexpr int kBlockM = BlockM_, kBlockN = BlockN_;
  static constexpr int kWarpgroups = kBlockM / 64, kConsumers = kWarpgroups * 128, kThreads = kConsumers + 128;
  // The warpgroups share what a block has at launch, the same number for each thread.
  static constexpr int kConsumerRegisters = kWarpgroups == 2 ? 232 : 160;
  static constexpr int kProducerRegisters = kWarpgroups == 2 ? 40 : 32;
  static_assert(kWarpgroups * kConsumerRegisters + kProducerRegisters <= 65536 / kThreads / 8 * 8 * (kWarpgroups + 1));
  static constexpr int kStages = kBlockN == 128 ? 6 : 4;
  static constexpr int kParts = (kBlockN + kPart - 1) / kPart;  // the last may be half of one
  // Of a tile's parts, the first leave at once, then come those that wait in shared memory, then those in registers.
  static constexpr int kAtOnce = kBlockM == 192 ? 1 : 0;
  static constexpr int kHeld = kBlockM == 192 ? 1 : kBlockN == 192 || kBlockN == 224 ? 3 : 2;
  static constexpr int kInRegisters = kParts - kAtOnce - kHeld;
  static constexpr int kStageBytes = (kBlockM + kBlockN) * 128;
  static constexpr int kResidualBytes = kBlockM * kPart * 2;
  // Offsets in shared memory.
  static constexpr int kStaging = kStages * kStageBytes;
  static constexpr int kColumns = kStaging + kWarpgroups * 4 * kHeld * kPartBytes;  // s_w and bias of the tile
  static constexpr int kZeros = kColumns + kBlockN * 8;  // 32 bytes, the bias of those without
  static constexpr int kTypes = kZeros + 32;             // bit i: step i of B is fp16
  static constexpr int kNeeds = kTypes + kMaxSteps / 8;  // of the tile: {steps that come, that it needs}, 32 each; bias
  static constexpr int kWork = kNeeds + kMaxSteps / 4 + 16;  // ring of two int4
  static constexpr int kOutliers = kWork + 2 * 16;           // {how many numbers of a row}, {what to gather}
  static constexpr int kBarriers = kOutliers + 2 * 16;
  static constexpr int kSharedBytes = kBarriers + (kStages + 4) * 16;
  static_assert(kSharedBytes <= 232448, "what a block may have on sm_90");
  static_assert(2 * kResidualBytes <= kStageBytes, "a stage holds two parts of the residual");
};

// What a kernel can do beyond scales, adapters that all rows use, and bias: slots of rows; outliers; residual and gate,
// alone or behind one activation; all of these but outliers; and with them. What it cannot do is not in its code: even
// skipped, it delays what follows.
enum class After {
  nothing,
  slots_of_rows,
  outliers,
  residual,
  gelu_tanh,
  gelu_erf,
  silu,
  anything,
  anything_and_outliers
};

struct Member {
  CUtensorMap w, h, b, residual;
  GemmMember out;
  int tiles_n, first_tile_n;  // of the columns of tiles of all members
  int rank_blocks, up_columns, chunk_columns;
  int first_step, steps;  // of 16 low-rank columns, whole words of bits
  int words;              // of 32 steps
  bool streams_ranks;     // more low-rank blocks than stay at once: they come once for each part of a tile
  int first_row;          // of its outlier columns of W
};

// Where a block's tile begins, and in which output. Columns are multiples of 32; one register has both.
struct Tile {
  int row, column_and_member;

  static_assert(kMaxMembers <= 32);
  __device__ __forceinline__ int column() const { return column_and_member & ~31; }
  __device__ __forceinline__ int member() const { return column_and_member & 31; }
};

struct Params {
  CUtensorMap q, outlier_x, outlier_w;
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

template <class C, bool kWide, After kAfter>
__global__ __launch_bounds__(C::kThreads, 1) void gemm(const __grid_constant__ Params p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr bool kOutliers = kAfter == After::outliers || kAfter == After::anything_and_outliers;
  constexpr bool kAnything = kAfter >= After::anything;
  constexpr bool kSlots = kAfter == After::slots_of_rows || kAnything, kEpilogue = kAfter >= After::residual;
  // Outliers, ranks and residual of a tile have to fit, or the last part is behind what frees the first stage.
  static_assert(!kOutliers || 1 + kResidentRankBlocks + (kEpilogue ? C::kParts / 2 : 0) <= C::kStages);
  extern __shared__ __align__(1024) uint8_t memory[];
  const uint32_t base = ptx::shared_address(memory);
  const uint32_t columns = base + C::kColumns, types = base + C::kTypes, barriers = base + C::kBarriers;
  const uint32_t outliers_at = base + C::kOutliers, gather_entry = outliers_at + 16;
  const auto needs_at = [&](int word) { return base + C::kNeeds + word * 8; };
  const auto full = [&](int stage) { return barriers + stage * 16; };
  const auto empty = [&](int stage) { return barriers + stage * 16 + 8; };
  const uint32_t columns_full = barriers + C::kStages * 16, columns_empty = columns_full + 8;
  const uint32_t gather = columns_full + 16 + 2 * 16;
  const auto work_entry = [&](int step) { return base + C::kWork + step % 2 * 16; };
  const auto work_full = [&](int step) { return columns_full + 16 + step % 2 * 16; };
  const auto work_empty = [&](int step) { return columns_full + 24 + step % 2 * 16; };
  const uint32_t rank = ptx::cluster_rank();
  const int warpgroup = static_cast<int>(threadIdx.x) / 128, lane = static_cast<int>(threadIdx.x) % 32;

  if (threadIdx.x == 0) {
    for (int stage = 0; stage < C::kStages; ++stage) {
      ptx::barrier_init(full(stage), 1);
      ptx::barrier_init(empty(stage), kCluster * C::kWarpgroups);
    }
    ptx::barrier_init(columns_full, 1);
    ptx::barrier_init(columns_empty, C::kWarpgroups * 4 + kSlots);
    for (int i = 0; i < 2; ++i) {
      ptx::barrier_init(work_full(i), 1);
      ptx::barrier_init(work_empty(i), C::kWarpgroups * 4);
    }
    if (kOutliers) ptx::barrier_init(gather, 1);
    ptx::barrier_init_fence();
  }
  if (threadIdx.x < 8) ptx::store_shared(base + C::kZeros + threadIdx.x * 4, 0.f);
  __syncthreads();
  ptx::cluster_sync();
  ptx::launch_dependents();  // the next call's prepare may take the place of blocks that are done

  const int cluster = static_cast<int>(blockIdx.x) / kCluster;
  int stage = 0;
  uint32_t phase = 0;
  const auto step_stage = [&] {
    if (++stage == C::kStages) {
      stage = 0;
      phase ^= 1;
    }
  };

  if (warpgroup == C::kWarpgroups) {
    ptx::registers_fewer<C::kProducerRegisters>();
    const int clusters = static_cast<int>(gridDim.x) / kCluster;
    const int tiles = p.pairs_m * p.tiles_n;
    const auto place = [&](int tile) {
      const int group = tile / (kRasterPairs * p.tiles_n), within = tile - group * kRasterPairs * p.tiles_n;
      const int pairs = min(kRasterPairs, p.pairs_m - group * kRasterPairs);
      const int pair = group * kRasterPairs + within % pairs, tile_n = within / pairs;
      int member = 0;
      while (member + 1 < p.members && tile_n >= p.member[member + 1].first_tile_n) ++member;
      return Tile{(pair * kCluster + static_cast<int>(rank)) * C::kBlockM,
                  (tile_n - p.member[member].first_tile_n) * C::kBlockN + member};
    };
    if (threadIdx.x == C::kConsumers) {
      ptx::prefetch_map(&p.q);
      ptx::prefetch_map(&p.member[0].w);
      constexpr uint32_t kXBytes = C::kBlockM * 128;
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
      int outliers = 0;
      if constexpr (kOutliers) {
        outliers = *p.args.outliers.count * outlier_pieces(p.args.raw_type);
        ptx::store_shared(outliers_at, __int_as_float(outliers));
      }
      const auto tell = [&](int step, uint4 entry) {
        ptx::barrier_wait(work_empty(step), (step / 2 & 1) ^ 1);
        ptx::store_shared(work_entry(step), entry);
        ptx::barrier_arrive(work_full(step));
      };
      int step = 0;
      for (; cluster + step * clusters < tiles; ++step) {
        if (step > 0) tile = place(cluster + step * clusters);
        const Member& member = p.member[tile.member()];
        tell(step, {static_cast<uint32_t>(tile.row), static_cast<uint32_t>(tile.column_and_member), 1, 0});
        for (int block = 0; block < p.k_blocks; ++block) {
          if (step > 0 || block >= early) {
            begin_stage(C::kBlockN);
            load_w(member.w, block * 128, tile.column(), C::kBlockN);
            ptx::tensor_load(x_tile(), &p.q, block * 128, tile.row, full(stage));
            step_stage();
          }
        }
        if (kSlots) ptx::barrier_wait(columns_full, step & 1);
        const bool streams = kWide && member.streams_ranks;
        const bool each_part = streams || (kOutliers && outliers > kOutlierBlock);
        const int rows = streams ? kPart : C::kBlockN;
#pragma unroll 1
        for (int part = 0; part < (each_part ? C::kParts : 1); ++part) {
#pragma unroll 1
          for (int block = 0; kOutliers && block * kOutlierBlock < outliers; ++block) {
            if (block * kOutlierBlock < kOutlierColumns) {
              begin_stage(C::kBlockN);
              load_w(p.outlier_w, block * 128, member.first_row + tile.column(), C::kBlockN);
              ptx::tensor_load(x_tile(), &p.outlier_x, block * 128, tile.row, full(stage));
            } else {
              ptx::barrier_wait(empty(stage), phase ^ 1);
              ptx::store_shared(
                  gather_entry,
                  uint4{static_cast<uint32_t>(tile.row), static_cast<uint32_t>(tile.column_and_member),
                        1u + static_cast<uint32_t>(part), static_cast<uint32_t>(block * C::kStages + stage)});
              ptx::barrier_arrive(gather);
              ptx::barrier_wait(full(stage), phase);
            }
            step_stage();
          }
#pragma unroll 1
          for (int block = 0; block < member.rank_blocks; ++block) {
            if (kSlots && !of_block(ptx::load_shared(needs_at(block / 8)), block)) continue;
            begin_stage(rows);
            load_w(member.b, block * 128, tile.column() + (streams ? part * kPart : 0), rows);
            ptx::tensor_load(x_tile(), &member.h, block * 128, tile.row, full(stage));
            step_stage();
          }
          if (!kEpilogue || !member.out.residual) continue;
          // Two parts of the residual a stage, or the one that is next.
          const int end = each_part ? part + 1 : C::kParts;
#pragma unroll 1
          for (int first = part; first < end; first += 2) {
            const int boxes = min(2, end - first);
            ptx::barrier_wait(empty(stage), phase ^ 1);
            ptx::barrier_expect_bytes(full(stage), boxes * C::kResidualBytes);
#pragma unroll 1
            for (int i = 0; i < boxes; ++i) {
              ptx::tensor_load(x_tile() + i * C::kResidualBytes, &member.residual,
                               (tile.column() + (first + i) * kPart) * 2, tile.row, full(stage));
            }
            step_stage();
          }
        }
        if (kSlots) ptx::barrier_arrive(columns_empty);  // what the tile needs has been read
      }
      tell(step, {0, 0, 0, 0});
      if (kOutliers && outliers > kOutlierColumns) {
        ptx::store_shared(gather_entry, uint4{});
        ptx::barrier_arrive(gather);
      }
      // The block stays until all that arrive at its barriers have done so.
      for (int i = 0; i < C::kStages; ++i) {
        ptx::barrier_wait(empty(stage), phase ^ 1);
        step_stage();
      }
    } else if (threadIdx.x == C::kConsumers + 32) {
      // What the end of a tile takes beside its stages, as soon as that of the tile before is done with.
      ptx::wait_for_primaries();
      // Which steps the tile of rows at `row` needs; in the word behind them, whether it adds biases of slots.
      const auto needed = [&](const Member& member, int row, int word) -> uint32_t {
        if (row >= p.args.m) return 0;
        if (const uint32_t* const of_rows = member.out.needed_steps) {
          const int last = (min(row + C::kBlockM, p.args.m) - 1) / kSlotRows;
          uint32_t bits = 0;
#pragma unroll 1
          for (int i = row / kSlotRows; i <= last; ++i) bits |= of_rows[i * (member.words + 1) + word];
          return bits;
        }
        if (word == member.words) return 0;
        const int steps = member.up_columns / kChunkRank - word * 32;
        return steps < 32 ? (1u << steps) - 1 : ~0u;
      };
#pragma unroll 1
      for (int step = 0; cluster + step * clusters < tiles; ++step) {
        const Tile tile = place(cluster + step * clusters);
        const Member& member = p.member[tile.member()];
        ptx::barrier_wait(columns_empty, step & 1 ^ 1);
        const int other_row = rank ? tile.row - C::kBlockM : tile.row + C::kBlockM;
#pragma unroll 1
        for (int word = 0; kSlots && word <= member.words; ++word) {
          const uint32_t mine = needed(member, tile.row, word), other = needed(member, other_row, word);
          ptx::store_shared(needs_at(word), uint2{mine | other, mine});
        }
        const uint32_t bytes = static_cast<uint32_t>(min(C::kBlockN, member.out.n - tile.column())) * 4;
        ptx::barrier_expect_bytes(columns_full, member.out.bias ? 2 * bytes : bytes);
        ptx::bulk_load(columns, member.out.scale + tile.column(), bytes, columns_full);
        if (member.out.bias)
          ptx::bulk_load(columns + C::kBlockN * 4, member.out.bias + tile.column(), bytes, columns_full);
      }
    } else if (kOutliers && threadIdx.x >= C::kConsumers + 64) {
      // Outlier columns beyond those that have been gathered: of x's rows and, one part at a time, of W's.
      ptx::wait_for_primaries();
      const int count = *p.args.outliers.count, pieces = outlier_pieces(p.args.raw_type);
#pragma unroll 1
      for (uint32_t turn = 0; count * pieces > kOutlierColumns; turn ^= 1) {
        ptx::barrier_wait(gather, turn);
        const uint4 entry = ptx::load_shared_16(gather_entry);
        if (entry.z == 0) break;
        const Tile tile{static_cast<int>(entry.x), static_cast<int>(entry.y)};
        const int first_n = (static_cast<int>(entry.z) - 1) * kPart, which = static_cast<int>(entry.w) % C::kStages;
        const GemmMember& out = p.member[tile.member()].out;
        const Dtype type = p.args.raw_type;
        const OutlierPair pair(p.args.outliers.list, count, pieces > 1, static_cast<int>(entry.w) / C::kStages);
        // Row after row, as far as there are any: what is beside them is not stored.
        const auto fill = [&](uint32_t to, int rows, const auto* from, int pitch, auto&& bits) {
          const int first = static_cast<int>(threadIdx.x) / 32 % 2;
          from += static_cast<int64_t>(first) * pitch;
#pragma unroll 1
          for (int i = first; i < rows; i += 2, from += 2 * pitch)
            ptx::store_shared(to + i * 128 + (lane / 4 ^ i % 8) * 16 + lane % 4 * 4, __uint_as_float(bits(from)));
        };
        const auto fill_x = [&](const auto* from) {
          fill(base + which * C::kStageBytes, min(C::kBlockM, p.args.m - tile.row),
               from + static_cast<int64_t>(tile.row) * p.args.k, p.args.k,
               [&](const auto* row) { return pair.x(row); });
        };
        if (type == Dtype::f32)
          fill_x(static_cast<const float*>(p.args.raw_x));
        else
          fill_x(static_cast<const uint16_t*>(p.args.raw_x));
        const int n = tile.column() + first_n;
        fill(base + which * C::kStageBytes + (C::kBlockM + first_n) * 128,
             min(min(kPart, C::kBlockN - first_n), out.n - n), out.weight + static_cast<int64_t>(n) * p.args.k_pitch,
             p.args.k_pitch, [&](const int8_t* row) { return pair.weight(row, type == Dtype::f16); });
        ptx::fence_async_shared();
        ptx::named_sync(kGatherBarrier, 64);
        if (threadIdx.x == C::kConsumers + 64) ptx::barrier_arrive(full(which));
      }
    }
  } else {
    ptx::registers_more<C::kConsumerRegisters>();
    constexpr int kRegisters = C::kBlockN / 2;
    const int warp = static_cast<int>(threadIdx.x) / 32 % 4;
    const int g = lane / 4, t = lane % 4;
    // The number of the thread. Where registers are short the compiler does not know that it is the same each time: it
    // computes what follows from it again, and keeps none of that through the main loop.
    const auto this_thread = [] {
      int thread = static_cast<int>(threadIdx.x);
      if (C::kWarpgroups > 2) {
        thread = ptx::thread_again();
        __builtin_assume(thread >= 0 && thread < C::kThreads);
      }
      return thread;
    };
    const auto release = [&](int which) {
      const int block = this_thread() % 128;
      if (block < kCluster) ptx::barrier_arrive_cluster(empty(which), block);
    };
    const auto before_stage = [&] { return (stage ? stage : C::kStages) - 1; };
    const auto x_operand = [&](int which) {
      return ptx::wgmma_descriptor(base + which * C::kStageBytes + warpgroup * 64 * 128);
    };
    const auto w_operand = [&](int which) {
      return ptx::wgmma_descriptor(base + which * C::kStageBytes + C::kBlockM * 128);
    };
    // The last part of a tile may be half of one.
    const auto exists = [](int part, int column) { return part * kPart + column < C::kBlockN; };
    const auto meet = [&] { ptx::named_sync(2 + warpgroup, 128); };  // of the warpgroup
    ptx::wait_for_primaries();
    // Which steps of 16 ranks are fp16: 32 of them a warp at a time. Slots change between launches, not during one.
    for (int i = 0; i < p.members; ++i) {
      const Member& member = p.member[i];
      for (int step = static_cast<int>(threadIdx.x); step < member.steps; step += C::kConsumers) {
        const bool f16 = step * kChunkRank < member.up_columns &&
                         member.out.adapters.chunks[step * kChunkRank / member.chunk_columns].b_f16;
        const uint32_t bits = __ballot_sync(~0u, f16);
        if (lane == 0) ptx::store_shared(types + (member.first_step + step) / 8, __uint_as_float(bits));
      }
    }
    ptx::named_sync(1, C::kConsumers);

    Tile tile{};
    // What waits to be stored: the place of its tile and the parts that are in registers. At first nothing, in a row
    // that does not exist.
    Tile waiting{p.args.m, 0};
    constexpr int kFirstInRegisters = C::kAtOnce + C::kHeld;
    uint32_t packed[C::kInRegisters ? C::kInRegisters * 16 : 1] = {};
    // 16 bytes of a part of a warp's 16 rows; they are swizzled.
    const auto swizzled = [](int row, int piece) { return row * 128 + ((piece ^ row % 8) * 16); };
    const auto staging = [&](int thread, int part) {
      return base + C::kStaging + (thread / 32 * C::kHeld + part % C::kHeld) * kPartBytes;
    };
    const auto stage_part = [&](int part, const uint32_t* bits) {
      const int thread = this_thread(), lane = thread % 32;
      const uint32_t to = staging(thread, part);
#pragma unroll
      for (int pair = 0; pair < kPart / 16; ++pair) {
        // Matrix i of the four: rows 8 (i % 2).., columns 8 (i / 2)..; a lane gives the address of one row.
        ptx::store_matrix_x4(to + swizzled(lane % 16, pair * 2 + lane / 16), bits[4 * pair], bits[4 * pair + 1],
                             bits[4 * pair + 2], bits[4 * pair + 3]);
      }
      __syncwarp();
    };
    // Reads ahead what the tail needs from memory beside the rows' numbers.
    [[maybe_unused]] const auto touch_ahead = [&](const GemmMember& out) {
      const int lane = this_thread() % 32, column = tile.column() + lane * 8;
      if (out.gate && lane * 8 < C::kBlockN && column < out.n)
        ptx::touch(static_cast<const uint16_t*>(out.gate) + column);
    };
    const auto store_part = [&](int part) {
      if constexpr (C::kInRegisters > 0) {
        if (part >= kFirstInRegisters) stage_part(part, packed + max(part - kFirstInRegisters, 0) * 16);
      }
      const int thread = this_thread(), lane = thread % 32;
      const GemmMember& out = p.member[waiting.member()].out;
      const int row = waiting.row + thread / 32 * 16 + lane / 8;
      const int column = waiting.column() + part * kPart + lane % 8 * 8;
      const uint32_t from = staging(thread, part);
      uint16_t* const to = static_cast<uint16_t*>(out.y) + static_cast<int64_t>(row) * out.n + column;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint4 bits = ptx::load_shared_16(from + swizzled(i * 4 + lane / 8, lane % 8));
        if (row + i * 4 < p.args.m && column < out.n && exists(part, lane % 8 * 8))
          ptx::store_16(to + static_cast<int64_t>(i) * 4 * out.n, bits);
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
          if (part >= C::kAtOnce && block == 1 + 2 * (part - C::kAtOnce)) store_part(part);
        }
        if (kEpilogue && block == 2 * C::kParts) touch_ahead(member.out);
        step_stage();
      }
      ptx::wgmma_wait<0>();
      release(before_stage());
#pragma unroll
      for (int part = 0; part < C::kParts; ++part) {
        if (part >= C::kAtOnce && p.k_blocks <= 1 + 2 * (part - C::kAtOnce)) store_part(part);
      }
      if (kEpilogue && p.k_blocks <= 2 * C::kParts) touch_ahead(member.out);
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
      const int here = this_thread();
      const uint32_t my_scales = columns + here % 4 * 8;
      const uint32_t my_biases = member.out.bias ? my_scales + C::kBlockN * 4 : base + C::kZeros + here % 4 * 8;
      const int bias_step = member.out.bias ? 32 : 0;
      const bool streams = kWide && member.streams_ranks;
      // Outlier columns, as 16-bit numbers. Up to a block of them stays in its stage until the last part.
      [[maybe_unused]] int outliers = 0, outlier_stage = stage;
      [[maybe_unused]] uint32_t outlier_phase = phase;
      bool each_part = streams;
      if constexpr (kOutliers) {
        outliers = static_cast<int>(ptx::load_shared(outliers_at));
        each_part = each_part || outliers > kOutlierBlock;
        if (outliers && !each_part) step_stage();
      }
      // Low-rank blocks that stay in their stages until the last part.
      int held = each_part ? 0 : member.rank_blocks;
      uint2 needs{};  // of the first 32 steps
      bool slot_biases = false;
      if constexpr (kSlots) {
        if (member.rank_blocks) needs = ptx::load_shared_8(needs_at(0));
        for (int block = 0; !each_part && block < member.rank_blocks; ++block) held -= of_block(needs.x, block) == 0;
        slot_biases = ptx::load_shared_8(needs_at(member.words)).y;
      }

      // Once for each part: what is in the stage has been read by ldmatrix.
      [[maybe_unused]] const auto leave_stage = [&] {
        meet();
        release(stage);
        step_stage();
      };
      // v += x.w^T over columns 16 k .. of the operands in a stage, by mma.sync.
      const auto multiply_16 = [&](int part, float(&v)[kPart / 2], int from, int k, bool f16) {
        const int thread = this_thread(), lane = thread % 32;
        const uint32_t x_rows = base + from * C::kStageBytes + thread / 32 * 16 * 128;
        const uint32_t w_rows = base + from * C::kStageBytes + (C::kBlockM + part * kPart) * 128;
        const int x_row = lane % 16, w_row = lane / 16 * 8 + lane % 8;
        uint32_t x[4];
        ptx::load_matrix_x4(x, x_rows + x_row * 128 + (((k * 2 + lane / 16) ^ x_row % 8) * 16));
        const uint32_t w_at = w_rows + w_row * 128 + (((k * 2 + lane / 8 % 2) ^ w_row % 8) * 16);
        // The next 16 rows of w are under way while these multiply, where there are registers for them.
        constexpr int kAhead = C::kWarpgroups == 2 ? 1 : 0;
        uint32_t w[kAhead + 1][4];
        const auto load_w = [&](int pair) {
          if (pair < kPart / 16 && exists(part, pair * 16))
            ptx::load_matrix_x4(w[pair % (kAhead + 1)], w_at + pair * 16 * 128);
        };
        const auto multiply = [&](auto&& mma) {
          if (kAhead) load_w(0);
#pragma unroll
          for (int pair = 0; pair < kPart / 16; ++pair) {
            load_w(pair + kAhead);
            if (!exists(part, pair * 16)) continue;
            const uint32_t(&of_pair)[4] = w[pair % (kAhead + 1)];
            mma(four(v, 2 * pair), x, of_pair[0], of_pair[1]);
            mma(four(v, 2 * pair + 1), x, of_pair[2], of_pair[3]);
          }
        };
        using Registers = const uint32_t(&)[4];
        if (f16)
          multiply([](float(&c)[4], Registers x, uint32_t b0, uint32_t b1) { ptx::mma_f16(c, x, b0, b1); });
        else
          multiply([](float(&c)[4], Registers x, uint32_t b0, uint32_t b1) { ptx::mma_bf16(c, x, b0, b1); });
      };
      [[maybe_unused]] const auto add_outliers = [&](int part, float(&v)[kPart / 2]) {
#pragma unroll 1
        for (int first = 0; first < outliers; first += kOutlierBlock) {
          const int from = each_part ? stage : outlier_stage;
          if (each_part || part == 0) ptx::barrier_wait(full(from), each_part ? phase : outlier_phase);
          const int steps = min(kOutlierBlock, outliers - first + 15) / 16;
#pragma unroll 1
          for (int k = 0; k < steps; ++k) multiply_16(part, v, from, k, p.args.raw_type == Dtype::f16);
          if (each_part) leave_stage();
        }
      };
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
          if (outliers) add_outliers(part, v);
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
            if (part == 0 || each_part) ptx::barrier_wait(full(from), from_phase);
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
            if (each_part) {
              if (kSlots && !needed) meet();  // no wgmma says that all warps have seen the stage
              release(from);
            }
            if (++from == C::kStages) {
              from = 0;
              from_phase ^= 1;
            }
          }
          if (each_part) {
            stage = from;
            phase = from_phase;
          }
        } else if (kSlots ? needs.x : member.rank_blocks) {
          if (part == 0 || each_part) ptx::barrier_wait(full(stage), phase);
          const uint32_t f16 = ptx::load_shared(types + member.first_step / 8);
#pragma unroll 1
          for (int k = 0; k * kChunkRank < member.up_columns; ++k) {
            if (kSlots && !(needs.y >> k & 1)) continue;
            multiply_16(part, v, stage, k, f16 >> k & 1);
          }
          if (each_part) leave_stage();
        }
      };
      // From a stage that holds this part, or it and its neighbour.
      [[maybe_unused]] const auto add_residual = [&](int part, float(&v)[kPart / 2]) {
        const int thread = this_thread(), lane = thread % 32;
        const int by = (each_part ? 0 : part / 2) + held, of_two = each_part ? 0 : part % 2;
        const int from = stage + by < C::kStages ? stage + by : stage + by - C::kStages;
        if (of_two == 0) ptx::barrier_wait(full(from), phase ^ (stage + by >= C::kStages));
        // The rows of a warp lie there as in its staging buffer.
        const uint32_t rows_at = base + from * C::kStageBytes + of_two * C::kResidualBytes + thread / 32 * kPartBytes;
#pragma unroll
        for (int pair = 0; pair < kPart / 16; ++pair) {
          if (!exists(part, pair * 16)) continue;
          uint32_t bits[4];
          ptx::load_matrix_x4(bits, rows_at + swizzled(lane % 16, pair * 2 + lane / 16));
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float2 more = decode16x2(bits[i], p.args.y_type == Dtype::f16);
            v[8 * pair + 2 * i] += more.x;
            v[8 * pair + 2 * i + 1] += more.y;
          }
        }
        if (each_part || of_two == 1 || part + 1 == C::kParts) {
          meet();  // ldmatrix of all warps is done
          release(from);
          if (each_part) step_stage();
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
        if (part < kFirstInRegisters) {
          if (part >= C::kHeld) store_part(part - C::kHeld);
          stage_part(part, bits);
        } else if constexpr (C::kInRegisters > 0) {
#pragma unroll
          for (int i = 0; i < kPart / 4; ++i) packed[(part - kFirstInRegisters) * 16 + i] = bits[i];
        }
      };
#pragma unroll
      for (int part = 0; part < C::kParts; ++part) {
        float v[kPart / 2];
        begin_part(part, v);
        if (part + 1 == C::kParts) {
          const bool stays = kOutliers && outliers && !each_part;
          // All warps are done with the stages, by ldmatrix, or having skipped them.
          if (stays || ((!kWide || kSlots) && held)) meet();
          if (stays) release(outlier_stage);
          for (; held > 0; --held) {
            release(stage);
            step_stage();
          }
        }
        end_part(part, v);
      }
      if (kEpilogue && member.out.residual && !each_part) {
        for (int part = 0; part < C::kParts; part += 2) step_stage();
      }
      __syncwarp();
      if (lane == 0) ptx::barrier_arrive(columns_empty);
    }
#pragma unroll
    for (int part = C::kAtOnce; part < C::kParts; ++part) store_part(part);
  }
  ptx::cluster_meet();  // no block leaves while its peer may still write to it
#endif
}

template <class C>
Params params_of(const GemmArgs& args) {
  Params p{};
  p.args = args;
  p.q = tensor_map(args.x, args.k_pitch, args.m, args.x_pitch, C::kBlockM);
  p.k_blocks = (args.k + kBlockK - 1) / kBlockK;
  p.pairs_m = (args.m + C::kBlockM * kCluster - 1) / (C::kBlockM * kCluster);
  p.members = args.member_count;
  int steps = 0, rows_n = 0;
  for (int i = 0; i < p.members; ++i) {
    Member& to = p.member[i];
    to.out = args.member[i];
    to.first_row = rows_n;
    rows_n += to.out.n;
    const int up = to.out.adapters.up_columns;
    to.rank_blocks = (up + kBlockRank - 1) / kBlockRank;
    to.words = needed_words(up);
    to.streams_ranks = up > kResidentRankBlocks * kBlockRank;
    to.w = tensor_map(to.out.weight, args.k_pitch, to.out.n, args.k_pitch, C::kBlockN / kCluster);
    if (up) {
      to.h = tensor_map(to.out.h, up * 2, args.m, up * 2, C::kBlockM);
      to.b =
          tensor_map(to.out.adapters.b, up * 2, to.out.n, up * 2, (to.streams_ranks ? kPart : C::kBlockN) / kCluster);
    }
    if (to.out.residual)
      to.residual = tensor_map(to.out.residual, int64_t{to.out.n} * 2, args.m, int64_t{to.out.n} * 2, C::kBlockM);
    to.up_columns = up;
    to.chunk_columns = up ? up / to.out.adapters.chunk_count : kChunkRank;
    to.first_step = steps;
    to.steps = to.words * 32;
    steps += to.steps;
    to.first_tile_n = p.tiles_n;
    to.tiles_n = (to.out.n + C::kBlockN - 1) / C::kBlockN;
    p.tiles_n += to.tiles_n;
  }
  if (args.outliers.list) {
    constexpr int kPitch = kOutlierColumns * 2;
    p.outlier_x = tensor_map(args.outliers.x, kPitch, args.m, kPitch, C::kBlockM);
    p.outlier_w = tensor_map(args.outliers.weight, kPitch, rows_n, kPitch, C::kBlockN / kCluster);
  }
  return p;
}

template <class C, bool kWide, After kAfter>
void launch(const GemmArgs& args, const Limits& limits, cudaStream_t stream) {
  const Params p = params_of<C>(args);
  const int clusters = std::min(p.pairs_m * p.tiles_n, limits.multiprocessors / kCluster);
  const DependentLaunch launch(clusters * kCluster, C::kThreads, kCluster, C::kSharedBytes, stream);
  OCTOLORA_CUDA(cudaLaunchKernelEx(&launch.config, gemm<C, kWide, kAfter>, p),
                "sm_90 gemm tile %dx%d: M = %d, K = %d, %d outputs, N = %d, up columns = %d", C::kBlockM, C::kBlockN,
                args.m, args.k, args.member_count, args.member[0].n, args.member[0].adapters.up_columns);
}

template <class C, bool kWide, After kAfter>
void set_up() {
  share_memory(gemm<C, kWide, kAfter>, C::kSharedBytes, "sm_90 gemm");
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
    if (args.member[i].adapters.up_columns > (args.row_slot ? kMmaColumnsOfSlots : kMmaColumns)) return true;
  }
  return false;
}

After after(const GemmArgs& args) {
  bool same = true, slots = false, more = false;
  for (int i = 0; i < args.member_count; ++i) {
    const GemmMember& out = args.member[i];
    same = same && out.activation == args.member[0].activation;
    slots = slots || (args.row_slot && out.adapters.slot_count);
    more = more || out.activation != Activation::none || out.residual || out.gate;
  }
  if (args.outliers.list) return slots || more ? After::anything_and_outliers : After::outliers;
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

// A tile, and what it takes of an H200 in clocks: 128 of K, and all that follows the main loop.
struct Kernel {
  int block_m, block_n, stages;
  double block_clocks, end_clocks;
  void (*set_up)();
  void (*launch)(const GemmArgs& args, const Limits& limits, cudaStream_t stream);
};

template <class C, bool kWide, After kAfter>
constexpr Kernel kernel(double block_clocks, double end_clocks) {
  return {
      C::kBlockM, C::kBlockN, C::kStages, block_clocks, end_clocks, set_up<C, kWide, kAfter>, launch<C, kWide, kAfter>};
}
template <bool kWide, After kAfter>
constexpr Kernel kTile128x256 = kernel<Config<128, 256>, kWide, kAfter>(1071, 3250);
template <bool kWide, After kAfter>
constexpr Kernel kTile128x224 = kernel<Config<128, 224>, kWide, kAfter>(929, 2935);
template <bool kWide, After kAfter>
constexpr Kernel kTile192x192 = kernel<Config<192, 192>, kWide, kAfter>(1195, 3100);
template <bool kWide, After kAfter>
constexpr Kernel kTile128x192 = kernel<Config<128, 192>, kWide, kAfter>(842, 2600);
template <bool kWide, After kAfter>
constexpr Kernel kTile128x128 = kernel<Config<128, 128>, kWide, kAfter>(602, 1900);

struct Kernels {
  Kernel kernel[5];
  int count;

  constexpr void add(const Kernel& one) { kernel[count++] = one; }
  const Kernel* begin() const { return kernel; }
  const Kernel* end() const { return kernel + count; }
};

// Of the tiles those that there are registers for; the smallest has no kernels for one activation alone.
template <bool kWide, After kAfter>
constexpr Kernels kernels_of() {
  constexpr bool kOne = kAfter >= After::residual && kAfter < After::anything;
  constexpr bool kWideOutliers = kWide && kAfter == After::outliers;
  Kernels all{};
  if constexpr (kAfter < After::residual && !kWideOutliers) all.add(kTile128x256<kWide, kAfter>);
  if constexpr (kAfter < After::anything_and_outliers) all.add(kTile128x224<kWide, kAfter>);
  if constexpr (kAfter < After::anything_and_outliers && kAfter != After::silu && !kWideOutliers)
    all.add(kTile192x192<kWide, kAfter>);
  all.add(kTile128x192<kWide, kAfter>);
  all.add(kTile128x128 < kWide, kOne ? After::anything : kAfter >);
  return all;
}
// By After.
template <bool kWide>
constexpr Kernels kKernels[] = {kernels_of<kWide, After::nothing>(),
                                kernels_of<kWide, After::slots_of_rows>(),
                                kernels_of<kWide, After::outliers>(),
                                kernels_of<kWide, After::residual>(),
                                kernels_of<kWide, After::gelu_tanh>(),
                                kernels_of<kWide, After::gelu_erf>(),
                                kernels_of<kWide, After::silu>(),
                                kernels_of<kWide, After::anything>(),
                                kernels_of<kWide, After::anything_and_outliers>()};

const Kernels& kernels_for(const GemmArgs& args) {
  return (is_wide(args) ? kKernels<true> : kKernels<false>)[static_cast<int>(after(args))];
}

void set_up_all(const Limits& limits) {
  if (limits.capability != 90) return;
  tensor_map_encoder();  // a driver without it fails here, not in a forward
  for (const Kernels* all : {kKernels<false>, kKernels<true>}) {
    for (int i = 0; i <= static_cast<int>(After::anything_and_outliers); ++i) {
      for (const Kernel& kernel : all[i]) kernel.set_up();
    }
  }
}

struct Choice {
  const Kernel* kernel;
  double waves;
};

// The tile whose whole waves take the least time.
Choice choose(const GemmArgs& args, const Limits& limits) {
  Choice best{};
  double least = 0;
  for (const Kernel& kernel : kernels_for(args)) {
    int64_t tiles = 0;
    for (int i = 0; i < args.member_count; ++i) tiles += (args.member[i].n + kernel.block_n - 1) / kernel.block_n;
    tiles *= (args.m + kernel.block_m * kCluster - 1) / (kernel.block_m * kCluster);
    const double waves = static_cast<double>(tiles) / (limits.multiprocessors / kCluster);
    const double blocks = (args.k + kBlockK - 1) / kBlockK;
    const double clocks = std::ceil(waves) * (blocks * kernel.block_clocks + kernel.end_clocks);
    if (!best.kernel || clocks < least) {
      best = {&kernel, waves};
      least = clocks;
    }
  }
  return best;
}

void launch_all(const GemmArgs& args, const Limits& limits, cudaStream_t stream) {
  choose(args, limits).kernel->launch(args, limits, stream);
}

constexpr const char* kAfterText[] = {"",
                                      "; of the ranks, those of the rows' slots",
                                      "; outliers before the scales",
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
      kGemmSm90.name, args.member_count, args.member_count == 1 ? "" : "s", n, choice.kernel->block_m,
      choice.kernel->block_n, choice.waves, kCluster, choice.kernel->stages, is_wide(args) ? "wgmma" : "mma.sync",
      kAfterText[static_cast<int>(after(args))]);
}

}  // namespace

const GemmFamily kGemmSm90 = {"wgmma s8", set_up_all, refuses, launch_all, describe};

}  // namespace octolora::cuda
