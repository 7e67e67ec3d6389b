// SPDX-License-Identifier: Apache-2.0
//
// Row quantization and down-projection where blocks form clusters and x is 16-bit with aligned rows; what is computed
// stands at the head of prepare.cu.
//
// One wave of clusters shares the rows of x. A cluster takes its rows in batches, and each of its blocks a slice of K
// of every batch. The slice of a batch comes in stages of kStageK columns through a ring of shared buffers, as many
// ahead as fit. A block's warps divide the work:
//
//   copy      one warp brings the stages, one finds the ranks that tiles of rows need, two describe the adapters
//   multiply  two warpgroups take turns at the items (batch, 64 columns of x.A^T). wgmma has the ranks as its 64 rows,
//             A comes from memory or shared memory in the registers of the lanes that need it, and the rows of x are
//             the columns. An item's sums go to the blocks that own the rows, which add them up in a fixed order and
//             write h
//   quantize  two teams take turns at the batches. A warp has two, four or six rows: it measures them, tells the same
//             warp of the other blocks, and writes q
//
// Maxima and sums are messages (st.async) into mailboxes that are used in turn: full when their bytes have come, free
// when the sender knows that they have been read. For maxima two boxes are enough: who sends the next but one has
// received the next, which its reader sent after it had read this one.
//
// A stage is four tiles of 64 columns, in the 128-byte swizzle of the copy engine. A quantizing lane reads 16 columns
// of one row; eight lanes read two rows, which the swizzle puts into different banks.
#include <algorithm>

#include "check.h"
#include "dependent_launch.cuh"
#include "prepare.cuh"
#include "row_slots.cuh"
#include "tensor_map.h"
#include "wgmma_narrow.cuh"

namespace octolora::cuda {
namespace {

constexpr int kCopyWarps = 4;
constexpr int kMultiplyGroups = 2;  // warpgroups
constexpr int kTeams = 2;           // of quantizing warps
constexpr int kTeamWarps = 8;
constexpr int kQuantizeWarps = kTeams * kTeamWarps;
constexpr int kThreads = (kCopyWarps + kMultiplyGroups * 4 + kQuantizeWarps) * 32;
constexpr int kTileK = 64;  // 128 bytes of a row
constexpr int kStageK = 4 * kTileK;
constexpr int kMaxStages = 48;
constexpr int kBatchesAhead = 6;  // in the ring, at most
constexpr int kPowers = 16;       // batches whose rows' powers are kept: those ahead, and what two blocks are apart
constexpr int kMaxRows = 48;      // of a batch
constexpr int kMaxCluster = 8;
constexpr int kMaxPairs = kMaxRows / 2 / kTeamWarps;
constexpr int kBlock = kChunkRank;  // columns of A that share a description
constexpr int kGroupBlocks = 4;     // ... that are multiplied at a time
constexpr int kMaxBlocks = 64;

struct Plan {
  int cluster;  // blocks that share rows
  int clusters;
  int rows;         // of x that a wgmma takes: 16, 32, 48
  int batch_rows;   // at most rows
  int tile_rows;    // batch_rows up to a multiple of 8
  int slice;        // of K in a block, a multiple of 2 kTileK
  int stages;       // in shared memory
  int blocks;       // of kBlock columns
  int groups;       // of kGroupBlocks blocks
  bool a_resident;  // the slice of A is in shared memory
  uint32_t limit;   // magnitude of x from which on it is an outlier
  // What follows from these.
  int cluster_log;
  int box_blocks, box_bytes;  // of a mailbox of sums
  int a_at, boxes_at, flags_at, shared_bytes;
};

// kBlock columns of x.A^T.
struct Block {
  const uint4* a;  // its fragments; null: an empty block that keeps the next one's two parts together
  uint16_t* h;     // its first column in row 0
  int up_columns;
  float scale;
  int slot;
  int exponent;       // of the stored values
  int term_exponent;  // INT_MIN: h is zero
  int16_t ranks;
  bool split, low;  // of two parts; the second of them
  bool a_f16, b_f16;
};

struct Shared {
  uint64_t full[kMaxStages], empty[kMaxStages], described, a_full, flags_full;
  uint64_t maxima_full[2][kQuantizeWarps], powers_full[kPowers];
  uint64_t sums_full[kMultiplyGroups], sums_free[kMultiplyGroups];
  int exponent;  // largest of the blocks
  // Low half: of all of the row, high half: below the limit.
  uint32_t maxima[2][kQuantizeWarps][kMaxPairs][kMaxCluster][2];
  int8_t power[kPowers][kMaxRows];
  Block block[kMaxBlocks];
};

constexpr int kRingAt = (static_cast<int>(sizeof(Shared)) + 1023) / 1024 * 1024;

// The blocks of a member come after those of the members before it; a pair of parts starts at an even one.
__host__ __device__ inline int first_block(const AdapterView& ad, int after) {
  const bool split = ad.chunk_count && ad.down_columns / ad.chunk_count > kBlock;
  return split ? (after + 1) / 2 * 2 : after;
}

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

// A place in the ring of stages, and the parity of its use.
struct Ring {
  int stage = 0;
  uint32_t phase = 0;
  __device__ __forceinline__ void step(int stages) {
    if (++stage == stages) {
      stage = 0;
      phase ^= 1;
    }
  }
  __device__ __forceinline__ void advance(int count, int stages) {
    for (stage += count; stage >= stages; stage -= stages) phase ^= 1;
  }
};

template <bool kF16, int kSums>
__device__ __forceinline__ void multiply_16(float (&sum)[kSums], const uint32_t* a, uint64_t x, bool accumulate) {
  if constexpr (kF16)
    ptx::wgmma_f16(sum, a, x, accumulate);
  else
    ptx::wgmma_bf16(sum, a, x, accumulate);
}

#endif

// kRows: plan.rows.
template <class X, bool kPlain, int kRows>
__global__ __launch_bounds__(kThreads, 1) void prepare_rows(const __grid_constant__ PrepareArgs args,
                                                            const __grid_constant__ Plan plan,
                                                            const __grid_constant__ CUtensorMap x_map) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr bool x_f16 = std::is_same_v<X, __half>;
  constexpr int kPairs = kRows / 2 / kTeamWarps;  // pairs of rows that a quantizing warp has
  extern __shared__ __align__(1024) uint8_t memory[];
  auto& shared = *reinterpret_cast<Shared*>(memory);
  const uint32_t base = ptx::shared_address(memory), ring = base + kRingAt;
  const auto barrier = [](uint64_t& b) { return ptx::shared_address(&b); };

  // Read from one lane, so that the compiler knows what is the same in all of a warp.
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32, 0), lane = threadIdx.x % 32;
  const int rank = __shfl_sync(~0u, static_cast<int>(ptx::cluster_rank()), 0);
  const int cluster = static_cast<int>(blockIdx.x) >> plan.cluster_log;
  const int start = rank * plan.slice;
  const int valid = max(0, min(plan.slice, args.k - start));  // of the slice, a multiple of 8
  const int batch_stages = (valid + kStageK - 1) / kStageK;
  const int k_steps = (args.k + 31) / 32, steps = (valid + 31) / 32;
  const int tile_bytes = plan.tile_rows * 128, stage_bytes = 4 * tile_bytes;
  const int stages = max(1, min(plan.stages, kBatchesAhead * batch_stages));

  const int few = args.m / plan.clusters, more = args.m % plan.clusters;
  const int first_row = cluster * few + min(cluster, more), end_row = first_row + few + (cluster < more);
  const int batches = (end_row - first_row + plan.batch_rows - 1) / plan.batch_rows;
  const auto batch_first = [&](int batch) { return first_row + batch * plan.batch_rows; };
  const auto rows_of = [&](int batch) { return min(plan.batch_rows, end_row - batch_first(batch)); };
  const int pairs = (plan.batch_rows + 1) / 2, pair_warps = min(kTeamWarps, pairs);
  // A place of the ring is known to have got over its use before once the batch of that use has been measured. Who had
  // no part in that batch has to ask, or would take the one use for the other: copies do not end in their order. The
  // first stages of a batch lie where those `apart` batches before did, from stage `nearer` on where those after them.
  const int apart = (stages + batch_stages - 1) / max(1, batch_stages);
  const int nearer = stages - (apart - 1) * batch_stages;
  const auto await_batch_before = [&](int batch, int stage) {
    if (stage != 0 && stage != nearer) return;
    const int before = batch - apart + (stage == nearer);
    if (before >= 0) ptx::barrier_wait(barrier(shared.powers_full[before % kPowers]), before / kPowers & 1);
  };

  if (threadIdx.x == 0) {
    ptx::prefetch_map(&x_map);
    for (int i = 0; i < plan.stages; ++i) {
      ptx::barrier_init(barrier(shared.full[i]), 1);
      ptx::barrier_init(barrier(shared.empty[i]), pair_warps + 4 * plan.groups);
    }
    ptx::barrier_init(barrier(shared.described), 2 * 32);
    ptx::barrier_init(barrier(shared.a_full), 1);
    ptx::barrier_init(barrier(shared.flags_full), 1);
    for (int i = 0; i < 2; ++i) {
      for (int w = 0; w < kQuantizeWarps; ++w) ptx::barrier_init(barrier(shared.maxima_full[i][w]), 1);
    }
    for (int i = 0; i < kPowers; ++i) ptx::barrier_init(barrier(shared.powers_full[i]), pair_warps);
    for (int i = 0; i < kMultiplyGroups; ++i) {
      ptx::barrier_init(barrier(shared.sums_full[i]), 1);
      ptx::barrier_init(barrier(shared.sums_free[i]), plan.cluster);
    }
    ptx::barrier_init_fence();
  }
  // Pointers to the fragments of a block's first ranks, from the slice on; null for an empty block.
  const auto fragments_of = [&](int block) -> const uint4* {
    for (int m = 0, after = 0; m < args.member_count; ++m) {
      const AdapterView& ad = args.member[m].adapters;
      const int at = block - first_block(ad, after), count = ad.down_columns / kBlock;
      if (at >= 0 && at < count) return ad.a + (static_cast<int64_t>(at) * 2 * k_steps + start / 32) * 32;
      after = first_block(ad, after) + count;
    }
    return nullptr;
  };
  // What may still change is asked for all the same, to be in L2 once it is read.
  if (warp == 2) {
    for (int i = cluster + lane * plan.clusters; i < plan.blocks * 2 && steps; i += 32 * plan.clusters) {
      if (const uint4* const from = fragments_of(i / 2))
        ptx::bulk_prefetch(from + static_cast<int64_t>(i % 2) * k_steps * 32, static_cast<uint32_t>(steps * 512));
    }
    if (lane < args.member_count && args.member[lane].adapters.chunk_count) {
      ptx::prefetch_l2(args.member[lane].adapters.chunks);
      ptx::prefetch_l2(args.member[lane].adapters.scale);
    }
  }
  __syncwarp();
  ptx::cluster_meet();
  ptx::wait_for_primaries();
  ptx::launch_dependents();

  if (warp < kCopyWarps) {
    ptx::registers_fewer<40>();
    if (warp == 0) {
      if (!kPlain && args.outliers.flags && valid && lane == 0) {
        const uint32_t bytes = static_cast<uint32_t>((valid + 127) / 128 * 16);
        ptx::barrier_expect_bytes(barrier(shared.flags_full), bytes);
        ptx::bulk_load(base + plan.flags_at, args.outliers.flags + start / 32, bytes, barrier(shared.flags_full));
      }
      Ring at;
      for (int batch = 0; batch < batches; ++batch) {
        for (int stage = 0; stage < batch_stages; ++stage, at.step(stages)) {
          const uint32_t full = barrier(shared.full[at.stage]);
          ptx::barrier_wait(barrier(shared.empty[at.stage]), at.phase ^ 1);
          if (lane == 0) ptx::barrier_expect_bytes(full, static_cast<uint32_t>(4 * plan.batch_rows * 128));
          __syncwarp();
          if (lane < 4) {
            // A tile that is not the slice's is taken from beyond the end of the rows, where zeros are.
            const int column = stage * kStageK + lane * kTileK;
            ptx::tensor_load(ring + at.stage * stage_bytes + lane * tile_bytes, &x_map,
                             (column < valid ? start + column : args.k) * 2, batch_first(batch), full);
          }
        }
      }
    } else if (warp == 1) {
      find_needed_steps(args, static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x));
    } else {
      // Before anything is read: behind the copies of x a load takes microseconds.
      if (warp == 2 && plan.a_resident && steps) {
        const uint32_t full = barrier(shared.a_full);
        int present = 0;
        for (int i = lane; i < plan.blocks * 2; i += 32) present += fragments_of(i / 2) != nullptr;
        present = __reduce_add_sync(~0u, present);
        if (lane == 0) ptx::barrier_expect_bytes(full, static_cast<uint32_t>(present * steps * 512));
        __syncwarp();
        for (int i = lane; i < plan.blocks * 2; i += 32) {
          if (const uint4* const from = fragments_of(i / 2)) {
            ptx::bulk_load(base + plan.a_at + i * plan.slice * 16, from + static_cast<int64_t>(i % 2) * k_steps * 32,
                           static_cast<uint32_t>(steps * 512), full);
          }
        }
      }
      const int describer = static_cast<int>(threadIdx.x) - 2 * 32;
      if (describer < plan.blocks) {
        Block block{};
        int after = 0;
        for (int m = 0; m < args.member_count; ++m) {
          const PrepareMember& member = args.member[m];
          const AdapterView& ad = member.adapters;
          const int first = first_block(ad, after), at = describer - first, count = ad.down_columns / kBlock;
          if (at >= 0 && at < count) {
            const int parts = count / ad.chunk_count;
            const Chunk chunk = ad.chunks[at / parts];
            block.a = fragments_of(describer);
            block.h = member.h + chunk.up;
            block.up_columns = ad.up_columns;
            block.scale = ad.scale[chunk.slot];
            block.slot = chunk.slot;
            block.exponent = chunk.exponent;
            block.term_exponent = term_exponent(chunk, block.scale);
            block.ranks = static_cast<int16_t>(chunk.ranks);
            block.split = parts == 2;
            block.low = at % parts;
            block.a_f16 = chunk.a_f16;
            block.b_f16 = chunk.b_f16;
          }
          after = first + count;
        }
        shared.block[describer] = block;
      }
      ptx::named_sync(1, 2 * 32);
      if (warp == 2) {
        int exponent = INT_MIN;
        for (int i = lane; i < plan.blocks; i += 32) exponent = max(exponent, shared.block[i].term_exponent);
        exponent = __reduce_max_sync(~0u, exponent);
        if (lane == 0) shared.exponent = exponent;
      }
      ptx::barrier_arrive(barrier(shared.described));  // each for what it has written
    }
  } else if (warp < kCopyWarps + kMultiplyGroups * 4) {
    ptx::registers_more<104>();
    const int group_of_warps = warp / 4 - kCopyWarps / 4, w = warp % 4, thread = static_cast<int>(threadIdx.x) % 128;
    const int g = lane / 4, t = lane % 4;
    constexpr int kSums = kRows / 2;
    const int owned = kRows / 2 >> plan.cluster_log;  // pairs of rows, of a full batch
    const uint32_t box = base + plan.boxes_at + group_of_warps * plan.box_bytes;
    const uint32_t sums_full = barrier(shared.sums_full[group_of_warps]);
    const uint32_t sums_free = barrier(shared.sums_free[group_of_warps]);
    if (plan.groups) {
      ptx::barrier_wait(barrier(shared.described), 0);
      if (plan.a_resident && steps) ptx::barrier_wait(barrier(shared.a_full), 0);
    }
    Ring first_stage;  // of the batch
    int turn = 0, batch = 0, group = group_of_warps;
    for (; plan.groups; group += kMultiplyGroups) {
      for (; group >= plan.groups; group -= plan.groups, ++batch) first_stage.advance(batch_stages, stages);
      if (batch >= batches) break;
      const int first = batch_first(batch), rows = rows_of(batch);
      // The blocks of the group that some row of the batch needs; all blocks of the cluster agree on them.
      uint32_t needed = 0;
      bool mixed = false;  // some of them have the other 16-bit type than x
      {
        SlotSet slots;
        if (args.row_slot) slots = SlotSet::of_rows(args.row_slot, first, first + rows);
        for (int i = 0; i < kGroupBlocks && group * kGroupBlocks + i < plan.blocks; ++i) {
          const Block& block = shared.block[group * kGroupBlocks + i];
          if (!block.a || !block.ranks || (args.row_slot && !slots.has(block.slot))) continue;
          needed |= 1u << i;
          mixed |= block.a_f16 != x_f16;
        }
      }
      const bool mine = needed >> w & 1;
      Ring at = first_stage;
      const auto await_stage = [&](int stage) {
        await_batch_before(batch, stage);
        ptx::barrier_wait(barrier(shared.full[at.stage]), at.phase);
      };
      const auto leave_stage = [&](Ring& which) {
        __syncwarp();
        if (lane == 0) ptx::barrier_arrive(barrier(shared.empty[which.stage]));
        which.step(stages);
      };
      // Fragments of A for two steps of 32 columns: ranks g and g + 8 of the warp's block, as kernels.h has them.
      // Where the block is not needed, what comes out is not used.
      const int at_block = min(group * kGroupBlocks + w, plan.blocks - 1);
      const uint4* const a =
          (plan.a_resident ? reinterpret_cast<const uint4*>(memory + plan.a_at) + at_block * 2 * plan.slice
                           : shared.block[at_block].a) +
          lane;
      const int a_stride = plan.a_resident ? plan.slice : k_steps * 32;  // from ranks 0 to 7 of the block to the others
      const auto load_a = [&](uint4(&fragments)[2][2], int step) {
        if (!mine) return;
        const uint4 *const low = a + step * 32, *const high = low + a_stride;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          fragments[i][0] = low[i * 32];
          fragments[i][1] = high[i * 32];
        }
      };
      // A lane's sums of ranks g and g + 8 over the rows 8 j + 2 t and the one after it, to the row's owner.
      const auto send_sums = [&](const float(&sum)[kSums]) {
        if (mine) {
          ptx::barrier_wait(sums_free, turn & 1 ^ 1);
          uint32_t to = box;
          ptx::pin(to);  // else the compiler keeps all the addresses for the next batch, and spills
#pragma unroll
          for (int j = 0; j < kRows / 8; ++j) {
            const int pair = 4 * j + t, owner = pair & (plan.cluster - 1);
            if (2 * pair >= rows) continue;
            const int place = ((rank * owned + (pair >> plan.cluster_log)) * plan.box_blocks + w) * 8 + g;
            ptx::store_async(ptx::cluster_address(to + place * 16, owner), sum + 4 * j,
                             ptx::cluster_address(sums_full, owner));
          }
        }
      };
      if (!needed) {
        for (int stage = 0; stage < batch_stages; ++stage) {
          await_stage(stage);
          leave_stage(at);
        }
      } else if (!mixed && steps % 2 == 0) {
        float sum[kSums];
        if (batch_stages == 0) {
#pragma unroll
          for (float& value : sum) value = 0.f;
        }
        // One tile of 64 columns multiplies while the fragments for the one after the next are loaded, into two sets of
        // registers in turn. With one set that is loaded ahead and copied, ptxas puts the copies in front of the wait,
        // into registers that wgmma still reads.
        uint4 a_even[2][2] = {}, a_odd[2][2] = {};
        const int tiles = steps / 2;
        Ring left = at;  // the stage that is released next
        const auto start_tile = [&](const uint4(&from)[2][2], int tile) {
          if (tile % 4 == 0) await_stage(tile / 4);
          const uint64_t x = ptx::wgmma_descriptor(ring + at.stage * stage_bytes + tile % 4 * tile_bytes);
          ptx::wgmma_fence();
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const uint4 low = from[i / 2][0], high = from[i / 2][1];
            const uint32_t operand[4] = {i % 2 ? low.z : low.x, i % 2 ? high.z : high.x, i % 2 ? low.w : low.y,
                                         i % 2 ? high.w : high.y};
            multiply_16<x_f16>(sum, operand, x + i * 2, tile > 0 || i > 0);
          }
          ptx::wgmma_commit();
          if (tile % 4 == 3) at.step(stages);
        };
        // After the tile that came before `tile`, whose registers are free.
        const auto end_tile = [&](uint4(&next)[2][2], int tile) {
          ptx::wgmma_wait<1>();
          if (tile % 4 == 3) leave_stage(left);
          if (tile + 2 < tiles) load_a(next, 2 * tile + 4);
        };
        if (tiles) {
          load_a(a_even, 0);
          if (tiles > 1) load_a(a_odd, 2);
          start_tile(a_even, 0);
          for (int tile = 1; tile < tiles; tile += 2) {
            start_tile(a_odd, tile);
            end_tile(a_even, tile - 1);
            if (tile + 1 == tiles) break;
            start_tile(a_even, tile + 1);
            end_tile(a_odd, tile);
          }
          ptx::wgmma_wait<0>();
          leave_stage(left);
        }
        send_sums(sum);
      } else {
        // Products of the two types are exact in tf32, where A is zero beyond the slice. An mma takes the even or the
        // odd columns of 16.
        float sum[kSums] = {};
        const bool a_f16 = shared.block[at_block].a_f16;
#pragma unroll 1
        for (int step = 0; step < 8 * batch_stages; ++step) {
          if (step % 8 == 0) await_stage(step / 8);
          const uint32_t x = ring + at.stage * stage_bytes + step % 8 / 2 * tile_bytes;
          uint4 low{}, high{};
          if (mine && step < steps) {
            low = a[step * 32];
            high = a[step * 32 + a_stride];
          }
          const uint32_t a_low[4] = {low.x, low.y, low.z, low.w}, a_high[4] = {high.x, high.y, high.z, high.w};
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const float2 f[4] = {decode16x2(a_low[2 * i], a_f16), decode16x2(a_high[2 * i], a_f16),
                                 decode16x2(a_low[2 * i + 1], a_f16), decode16x2(a_high[2 * i + 1], a_f16)};
            const float even[4] = {f[0].x, f[1].x, f[2].x, f[3].x}, odd[4] = {f[0].y, f[1].y, f[2].y, f[3].y};
#pragma unroll
            for (int j = 0; j < kRows / 8; ++j) {
              if (8 * j >= rows) continue;
              const int piece = step % 2 * 4 + i * 2;
              const uint32_t row = x + (8 * j + g) * 128 + 4 * t;
              const float2 v0 = decode16x2(ptx::load_shared(row + (piece ^ g) * 16), x_f16);
              const float2 v1 = decode16x2(ptx::load_shared(row + ((piece + 1) ^ g) * 16), x_f16);
              float(&four)[4] = reinterpret_cast<float(&)[4]>(sum[4 * j]);
              ptx::mma_tf32(four, even, v0.x, v1.x);
              ptx::mma_tf32(four, odd, v0.y, v1.y);
            }
          }
          if (step % 8 == 7) leave_stage(at);
        }
        send_sums(sum);
      }

      // h of the rows that the block owns.
      const int own_pairs = ((rows + 1) / 2 - rank + plan.cluster - 1) >> plan.cluster_log;  // of the batch
      if (needed) {
        if (thread == 0) {
          ptx::barrier_expect_bytes(sums_full,
                                    static_cast<uint32_t>(own_pairs * __popc(needed) * 8 * 16 << plan.cluster_log));
        }
        ptx::barrier_wait(sums_full, turn & 1);
        ptx::barrier_wait(barrier(shared.powers_full[batch % kPowers]), batch / kPowers & 1);
      }
      const int columns_log = plan.box_blocks > 2 ? 2 : plan.box_blocks - 1;
      for (int i = thread; i < own_pairs * 8 << columns_log; i += 128) {
        const int index = i >> (3 + columns_log), column = i / 8 & ((1 << columns_log) - 1), first_rank = i % 8;
        const int at = group * kGroupBlocks + column, row = 2 * ((index << plan.cluster_log) + rank);
        if (at >= plan.blocks) continue;
        const Block& block = shared.block[at];
        if (!block.a || block.low) continue;  // low parts join the high ones
        float total[4] = {};
        if (needed >> column & 1) {
          const auto add = [&](int of_column) {
            float part[4] = {};
            for (int source = 0; source < plan.cluster; ++source) {
              const int place = ((source * owned + index) * plan.box_blocks + of_column) * 8 + first_rank;
              const uint4 bits = ptx::load_shared_16(box + place * 16);
              part[0] += __uint_as_float(bits.x), part[1] += __uint_as_float(bits.y);
              part[2] += __uint_as_float(bits.z), part[3] += __uint_as_float(bits.w);
            }
#pragma unroll
            for (int j = 0; j < 4; ++j) total[j] += part[j];
          };
          add(column);
          if (block.split) add(column + 1);
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int r = row + j % 2, of_block = first_rank + j / 2 * 8;
          if (r >= rows) continue;
          const bool present = needed >> column & 1 && of_block < block.ranks &&
                               (!args.row_slot || block.slot == args.row_slot[first + r]);
          float value = 0.f;
          if (present) value = scalbnf(total[j] * block.scale, -block.exponent - shared.power[batch % kPowers][r]);
          uint16_t* const h = block.h + static_cast<int64_t>(first + r) * block.up_columns + of_block;
          const uint16_t high = encode16(value, block.b_f16);
          h[0] = high;
          if (block.split) {
            h[kBlock] = encode16(present ? value - decode16(high, block.b_f16) : 0.f, block.b_f16);
            h[2 * kBlock] = high;
          }
        }
      }
      if (needed) {
        ptx::named_sync(2 + group_of_warps, 128);
        if (thread < plan.cluster) ptx::barrier_arrive_cluster(sums_free, thread);
        ++turn;
      }
    }
    if (turn) ptx::barrier_wait(sums_free, turn & 1 ^ 1);  // the block stays until its peers have arrived
  } else {
    ptx::registers_fewer<64>();
    const int w = warp - kCopyWarps - kMultiplyGroups * 4, team = w / kTeamWarps, pair = w % kTeamWarps;
    add_up_bias(args, static_cast<int>(blockIdx.x) * kQuantizeWarps * 32 + w * 32 + lane,
                static_cast<int>(gridDim.x) * kQuantizeWarps * 32);
    const int of_pair = lane / 4 % 2, tile = lane / 8, piece = lane % 4;
    const int among = tile * 4 + piece;                                 // of the 16 lanes of a row
    const int my_pairs = (pairs - pair + kTeamWarps - 1) / kTeamWarps;  // pair, pair + kTeamWarps ..
    const int my_row = 2 * pair + of_pair;  // of the batch; of the next pair 2 kTeamWarps more
    const uint32_t my_place = tile * tile_bytes + my_row * 128 + ((2 * piece ^ my_row % 8) * 16);
    constexpr uint32_t kNext = 2 * kTeamWarps * 128;
    const int my_column = tile * kTileK + piece * 16;  // of a stage
    const int written = args.q ? max(0, min(plan.slice, args.k_pitch - start)) : 0;
    const uint32_t minus_limit = kPlain ? 0 : (0u - plan.limit & 0xffffu) * 0x10001u;

    Ring at;
    at.advance(team * batch_stages, stages);
    for (int batch = team; my_pairs > 0 && batch < batches; batch += kTeams) {
      const int first = batch_first(batch), rows = rows_of(batch);
      int slot[kPairs];
#pragma unroll
      for (int i = 0; i < kPairs; ++i)
        slot[i] = args.row_slot ? args.row_slot[first + min(my_row + i * 2 * kTeamWarps, rows - 1)] : 0;

      uint32_t full[kPairs] = {}, below[kPairs] = {};  // two magnitudes each
      Ring seen = at;
      for (int stage = 0; stage < batch_stages; ++stage, seen.step(stages)) {
        await_batch_before(batch, stage);
        ptx::barrier_wait(barrier(shared.full[seen.stage]), seen.phase);
        const uint32_t from = ring + seen.stage * stage_bytes + my_place;
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
          if (i >= my_pairs) break;
          const uint4 bits[2] = {ptx::load_shared_16(from + i * kNext), ptx::load_shared_16((from ^ 16) + i * kNext)};
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const uint32_t words[4] = {bits[j].x, bits[j].y, bits[j].z, bits[j].w};
#pragma unroll
            for (int k = 0; k < 4; ++k) {
              const uint32_t magnitudes = words[k] & 0x7fff7fffu;
              full[i] = __vmaxu2(full[i], magnitudes);
              if constexpr (!kPlain) below[i] = __viaddmax_u16x2(magnitudes, minus_limit, below[i]);
            }
          }
        }
      }
      // Of all lanes of a row, then of all blocks.
      uint32_t packed[kPairs];
      const auto join = [&](uint32_t& value) {
#pragma unroll
        for (const int lanes : {1, 2, 8, 16}) value = __vmaxu2(value, __shfl_xor_sync(~0u, value, lanes));
      };
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        packed[i] = max(full[i] & 0xffff, full[i] >> 16) | max(below[i] & 0xffff, below[i] >> 16) << 16;
        join(packed[i]);
      }
      if (plan.cluster > 1) {
        const int turn = batch / kTeams, box = turn & 1;
        const uint32_t maxima_full = barrier(shared.maxima_full[box][w]);
        if (lane == 0) ptx::barrier_expect_bytes(maxima_full, static_cast<uint32_t>(my_pairs * 8 << plan.cluster_log));
        __syncwarp();
        const bool joins = among < plan.cluster;
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
          if (i < my_pairs && joins) {
            ptx::store_async(ptx::cluster_address(ptx::shared_address(&shared.maxima[box][w][i][rank][of_pair]), among),
                             packed[i], ptx::cluster_address(maxima_full, among));
          }
        }
        ptx::barrier_wait(maxima_full, turn / 2 & 1);
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
          packed[i] = i < my_pairs && joins ? shared.maxima[box][w][i][among][of_pair] : 0;
          join(packed[i]);
        }
      }

      if (plan.blocks && batch == team) ptx::barrier_wait(barrier(shared.described), 0);
      if (!kPlain && args.outliers.flags && valid && batch == team) ptx::barrier_wait(barrier(shared.flags_full), 0);
      // Lane `among` of a row's sixteen has the numbers of the pair of that index.
      const int mine = min(among, kPairs - 1), row = my_row + mine * 2 * kTeamWarps;
      int exponent = plan.blocks ? shared.exponent : INT_MIN;
      uint32_t maxima = packed[0];
#pragma unroll
      for (int i = 1; i < kPairs; ++i) maxima = i == mine ? packed[i] : maxima;
      if (args.row_slot) {
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
          int largest = INT_MIN;
          for (int b = among; b < plan.blocks; b += 16) {
            if (shared.block[b].slot == slot[i]) largest = max(largest, shared.block[b].term_exponent);
          }
#pragma unroll
          for (const int lanes : {1, 2, 8, 16}) largest = max(largest, __shfl_xor_sync(~0u, largest, lanes));
          if (i == mine) exponent = largest;
        }
      }
      const float largest = decode16(static_cast<uint16_t>(maxima), x_f16);
      uint32_t below_bits = magnitude_bits(largest);
      if constexpr (!kPlain) {
        // Magnitudes below the limit came as themselves minus the limit, modulo 2^16, and so above all the others.
        const uint32_t wrapped = (maxima >> 16) + plan.limit;
        const auto magnitude = static_cast<uint16_t>(wrapped >= 0x10000u ? wrapped : 0);
        below_bits = magnitude_bits(measured<kPlain>(args.spec, decode16(magnitude, x_f16)));
      }
      const PreparedRow prepared = prepare_row(args.spec, below_bits, magnitude_bits(largest), exponent);
      if (among < kPairs && row < rows && rank == 0 && args.rows) args.rows[first + row] = prepared.out;
#pragma unroll
      for (int i = 0; i < 2 * kPairs; ++i) {
        const int power = __shfl_sync(~0u, prepared.power, i % 2 * 4 + i / 2),
                  r = 2 * pair + i % 2 + i / 2 * 2 * kTeamWarps;
        if (lane == 0 && r < rows) shared.power[batch % kPowers][r] = static_cast<int8_t>(power);
      }
      float factor[kPairs];
#pragma unroll
      for (int i = 0; i < kPairs; ++i) factor[i] = __shfl_sync(~0u, prepared.factor, of_pair * 4 + i);
      __syncwarp();
      if (lane == 0) ptx::barrier_arrive(barrier(shared.powers_full[batch % kPowers]));

      bool in_range = true;
#pragma unroll
      for (int i = 0; i < kPairs; ++i) in_range &= stays_in_range<kPlain>(args.spec, factor[i]);
      const auto encode_rows = [&](auto&& four) {
        for (int stage = 0; stage < batch_stages; ++stage, at.step(stages)) {
          const uint32_t from = ring + at.stage * stage_bytes + my_place;
          const int column = stage * kStageK + my_column;
          uint32_t outliers = 0;
          if (!kPlain && args.outliers.flags && column < written)
            outliers = ptx::load_shared_u16(base + plan.flags_at + column / 8);
#pragma unroll
          for (int i = 0; i < kPairs; ++i) {
            const int r = my_row + i * 2 * kTeamWarps;
            if (column >= written || r >= rows) break;
            uint32_t codes[4];
#pragma unroll
            for (int j = 0; j < 2; ++j) {
              const uint4 bits = ptx::load_shared_16((from ^ j * 16) + i * kNext);
              const float2 v0 = decode16x2(bits.x, x_f16), v1 = decode16x2(bits.y, x_f16);
              const float2 v2 = decode16x2(bits.z, x_f16), v3 = decode16x2(bits.w, x_f16);
              codes[2 * j] = four(factor[i], v0.x, v0.y, v1.x, v1.y);
              codes[2 * j + 1] = four(factor[i], v2.x, v2.y, v3.x, v3.y);
            }
            if (!kPlain && outliers) {
#pragma unroll
              for (int j = 0; j < 16; ++j) {
                if (outliers >> j & 1) codes[j / 4] &= ~(0xffu << j % 4 * 8);
              }
            }
            *reinterpret_cast<uint4*>(args.q + static_cast<int64_t>(first + r) * args.k_pitch + start + column) = {
                codes[0], codes[1], codes[2], codes[3]};
          }
          __syncwarp();
          if (lane == 0) ptx::barrier_arrive(barrier(shared.empty[at.stage]));
        }
      };
      if (__all_sync(~0u, in_range))
        encode_rows([&](auto... v) { return quantize_in_range<kPlain>(args.spec, v...); });
      else
        encode_rows([&](auto... v) { return quantize<kPlain>(args.spec, v...); });
      at.advance((kTeams - 1) * batch_stages, stages);
    }
  }
  __syncwarp();
  ptx::cluster_meet();  // a block's shared memory outlives the messages of its peers
#else
  (void)args;
  (void)plan;
  (void)x_map;
#endif
}

int blocks_of(const PrepareArgs& args) {
  int blocks = 0;
  for (int i = 0; i < args.member_count; ++i) {
    const AdapterView& ad = args.member[i].adapters;
    blocks = first_block(ad, blocks) + ad.down_columns / kBlock;
  }
  return blocks;
}

// A plan of this shape for at most `rows` rows a batch, with as many stages as fit; no stages: a batch does not fit.
Plan shape(int m, int k, int blocks, int cluster, int clusters, int rows, bool a_resident, bool outliers,
           const Limits& limits) {
  Plan plan{};
  plan.cluster = cluster;
  while (1 << plan.cluster_log < cluster) ++plan.cluster_log;
  // Equal batches for as many clusters.
  plan.clusters = std::min((m + 7) / 8, clusters);
  const int of_cluster = (m + plan.clusters - 1) / plan.clusters, batches = (of_cluster + rows - 1) / rows;
  plan.batch_rows = (of_cluster + batches - 1) / batches;
  plan.tile_rows = round_up(plan.batch_rows, 8);
  plan.rows = plan.tile_rows <= 16 ? 16 : plan.tile_rows <= 32 ? 32 : 48;
  plan.slice = round_up((k + cluster - 1) / cluster, 2 * kTileK);
  plan.blocks = blocks;
  plan.groups = (blocks + kGroupBlocks - 1) / kGroupBlocks;
  plan.a_resident = a_resident;
  plan.box_blocks = std::min(blocks, kGroupBlocks);
  plan.box_bytes = plan.rows / 2 * plan.box_blocks * 8 * 16;
  const int batch_stages = (plan.slice + kStageK - 1) / kStageK, stage_bytes = plan.tile_rows * kStageK * 2;
  const int a_bytes = a_resident ? blocks * plan.slice * kBlock * 2 : 0;
  // A wgmma reads plan.rows rows of the last tile.
  const int others = std::max(a_bytes + kMultiplyGroups * plan.box_bytes, (plan.rows - plan.tile_rows) * 128);
  const int behind = others + (outliers ? plan.slice / 8 : 0);
  plan.stages = std::clamp((limits.shared_bytes - kRingAt - behind) / stage_bytes, 0,
                           std::min(kMaxStages, std::min(kBatchesAhead, batches) * batch_stages));
  if (plan.stages < batch_stages) plan.stages = 0;
  plan.a_at = kRingAt + plan.stages * stage_bytes;
  plan.boxes_at = plan.a_at + a_bytes;
  plan.flags_at = plan.a_at + others;
  plan.shared_bytes = plan.a_at + behind;
  return plan;
}

// Without adapters a slice of at most 2048, and small batches unless the cluster is large. With adapters batches as
// large as leave stages under way, since each of them reads A again; up to 32 ranks A is in shared memory, beyond that
// only beside a large batch. Measured on an H200, us (cluster, rows of a batch, R: A in shared memory, / stages):
//   M 4608, K 3072    rank 0    2,14 /27 14.0    1,12 /27 14.5     2,24 /17 14.6
//                     rank 16   2,35 R/8 17.5    4,39 R/9 19.9     2,24 R/13 21.1
//                     rank 64   4,31 R/6 22.4    2,35 /9 23.8      4,39 /9 24.5
//                     rank 128  2,35 /9 32.2     4,39 /9 36.9      8,44 R/4 38.5
//     4 slots of rank 16, rows in order    2,35 /9 23.0     4,31 R/6 23.5    none used  2,35 /9 16.2   4,31 R/6 17.5
//   M 4608, K 12288   rank 0    8,31 /13 44.9    8,24 /17 45.6     4,16 /27 46.7
//                     rank 16   8,31 R/10 52.4   8,39 R/8 56.6     8,44 R/6 60.6
//                     rank 64   8,44 /8 76.4     8,31 /12 82.6     4,31 /12 93.8
//                     rank 128  8,44 /8 101.8    8,31 /12 114.6    4,31 /12 125.7
//   M 4608, K 15360   rank 16   8,24 R/12 71.8   8,31 R/9 71.9     8,44 /8 88.8
//                     rank 128  8,44 /8 130.5    8,31 /12 147.8
//   M 4096, K 8192    rank 64   8,46 /8 43.0     8,23 R/6 49.6     4,46 /8 51.8
//   M 2048, K 14336   rank 64   8,46 /8 45.1     8,28 /12 51.2     4,23 /16 63.4
Plan plan_for(const PrepareArgs& args, const Limits& limits) {
  const int blocks = blocks_of(args);
  const auto good = [&](const Plan& plan, int rows) {
    const bool last = plan.cluster == kMaxCluster;
    const int of_cluster = (args.m + plan.clusters - 1) / plan.clusters;
    const int batches = (of_cluster + plan.batch_rows - 1) / plan.batch_rows;
    const int of_batch = (plan.slice + kStageK - 1) / kStageK;
    if (!last && plan.clusters * plan.cluster < limits.multiprocessors * 3 / 4) return false;
    const bool all = plan.stages >= batches * of_batch, half_more = 2 * plan.stages >= 3 * of_batch;
    const bool large = plan.batch_rows > 30;
    if (!blocks) return rows <= (last ? 32 : 16) && (last || plan.slice <= 2048) && (all || half_more);
    if (!last && (rows < 32 || of_cluster < 24)) return false;
    if (!plan.a_resident) return last || (plan.stages > of_batch && large);
    if (blocks > 4 || (blocks > 2 && (!large || args.row_slot))) return false;
    return all || (half_more && plan.batch_rows > 12) || (batches == 2 && 4 * plan.stages >= 5 * of_batch);
  };
  Plan plan{};  // the last that fits, where none is good
  for (const bool a_resident : {true, false}) {
    for (int i = 0; i < 4; ++i) {
      for (const int rows : {48, 32, 24, 16, 8}) {
        if (!limits.prepare_clusters[i]) continue;
        const Plan next = shape(args.m, args.k, blocks, 1 << i, limits.prepare_clusters[i], rows, a_resident && blocks,
                                args.outliers.flags, limits);
        if (!next.stages) continue;
        plan = next;
        if (good(plan, rows)) return plan;
      }
    }
  }
  return plan;
}

template <class X, int kRows>
auto kernel_of(bool plain) {
  return plain ? prepare_rows<X, true, kRows> : prepare_rows<X, false, kRows>;
}
template <class X>
auto kernel_of(bool plain, int rows) {
  return rows == 16 ? kernel_of<X, 16>(plain) : rows == 32 ? kernel_of<X, 32>(plain) : kernel_of<X, 48>(plain);
}

template <class X>
void launch(const PrepareArgs& args, Plan plan, cudaStream_t stream) {
  plan.limit = outlier_limit<X>(args.spec);
  const CUtensorMap x_map =
      tensor_map(args.x, static_cast<int64_t>(args.k) * 2, args.m, static_cast<int64_t>(args.k) * 2, plan.batch_rows);
  DependentLaunch launch(plan.clusters * plan.cluster, kThreads, plan.cluster, plan.shared_bytes, stream);
  OCTOLORA_CUDA(cudaLaunchKernelEx(&launch.config, kernel_of<X>(is_plain(args.spec), plan.rows), args, plan, x_map),
                "prepare: M = %d, K = %d, %d blocks of columns, clusters of %d", args.m, args.k, plan.blocks,
                plan.cluster);
}

}  // namespace

void set_up_prepare_sm90(Limits& limits) {
  if (limits.capability != 90) return;
  tensor_map_encoder();  // a driver without it fails here, not in a forward
  for (const bool plain : {false, true}) {
    for (const int rows : {16, 32, 48}) {
      for (const auto kernel : {kernel_of<__half>(plain, rows), kernel_of<__nv_bfloat16>(plain, rows)}) {
        share_memory(kernel, limits.shared_bytes, "prepare");
      }
    }
  }
  limits.prepare_clusters[0] = limits.multiprocessors;
  for (int i = 1; i < 4; ++i) {
    const DependentLaunch launch(1 << i, kThreads, 1 << i, limits.shared_bytes, nullptr);
    cudaLaunchConfig_t config = launch.config;  // of which the question takes the cluster's attribute alone
    cudaLaunchAttribute cluster = launch.attributes[1];
    config.attrs = &cluster;
    config.numAttrs = 1;
    OCTOLORA_CUDA(
        cudaOccupancyMaxActiveClusters(&limits.prepare_clusters[i], kernel_of<__nv_bfloat16>(true, 16), &config),
        "clusters of %d", 1 << i);
  }
}

bool prepare_sm90_takes(const PrepareArgs& args, const Limits& limits) {
  return limits.capability == 90 && args.x_type != Dtype::f32 && args.k % 8 == 0 && !args.planes &&
         reinterpret_cast<uintptr_t>(args.x) % 16 == 0 && blocks_of(args) <= kMaxBlocks &&
         plan_for(args, limits).stages;
}

void launch_prepare_sm90(const PrepareArgs& args, const Limits& limits, cudaStream_t stream) {
  const Plan plan = plan_for(args, limits);
  if (args.x_type == Dtype::f16)
    launch<__half>(args, plan, stream);
  else
    launch<__nv_bfloat16>(args, plan, stream);
}

void describe_prepare_sm90(const PrepareArgs& args, const Limits& limits, Explanation& to) {
  const Plan plan = plan_for(args, limits);
  to.launch(
      "prepare_sm90: %s%d ranks of x.A^T; %d rows at a time for %d clusters of %d, %d of K in each block, A in %s",
      args.q ? "quantizes x, " : "", plan.blocks * kBlock, plan.batch_rows, plan.clusters, plan.cluster, plan.slice,
      plan.a_resident ? "shared memory" : "global memory");
}

}  // namespace octolora::cuda
