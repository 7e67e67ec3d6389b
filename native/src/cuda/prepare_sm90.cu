// SPDX-License-Identifier: Apache-2.0
//
// Row quantization and down-projection where blocks form clusters and x is 16-bit with aligned rows; what is computed
// stands at the head of prepare.cu.
//
// One wave of clusters shares the rows of x. A cluster takes its rows in batches, and each of its blocks a slice of K
// of every batch. A block's warps divide the work:
//
//   copy      bring the batches of the slice into a ring of shared buffers, as many ahead as fit
//   multiply  measure the rows of a batch and multiply them by the slice of A; each warp has 16 rows of the batch and a
//             part of the slice or of the columns. Its maxima go to all blocks of the cluster, its sums to the block
//             that owns the row
//   teams     take turns at the batches: join the maxima, write q of the slice, join the sums and write h of own rows
//
// Maxima and sums are messages (st.async) into mailboxes that are used in turn. A mailbox is full when its bytes have
// come, and free when the blocks it is written from know that it has been read. So one batch is read from memory while
// others are measured and written, and nothing waits for the whole cluster. Sums are added in a fixed order.
#include <algorithm>

#include "check.h"
#include "dependent_launch.cuh"
#include "prepare.cuh"
#include "wgmma.cuh"

namespace octolora::cuda {
namespace {

constexpr int kMultiplyWarps = 8;
constexpr int kTeams = 2;  // of quantizing warps
constexpr int kTeamWarps = 4;
[[maybe_unused]] constexpr int kTeamThreads = kTeamWarps * 32;
constexpr int kCopyWarps = 4;
constexpr int kThreads = (kCopyWarps + kMultiplyWarps + kTeams * kTeamWarps) * 32;
constexpr int kTile = 16;     // rows of an mma
constexpr int kMaxTiles = 4;  // of a batch
constexpr int kMaxBuffers = 16;
constexpr int kMaxCluster = 8;
constexpr int kBlock = kChunkRank;  // columns of A that share a description
constexpr int kMaxBlocks = 64;      // two warps describe them

struct Plan {
  int cluster;  // blocks that share rows
  int clusters;
  int batch_rows;     // at most tiles * kTile
  int slice;          // of K in a block, a multiple of 32
  int tiles;          // kTile rows of a batch: 1, 2, 4
  int buffers;        // batches in shared memory
  bool a_resident;    // the slice of A is in shared memory
  int blocks;         // of kBlock columns
  int blocks_a_warp;  // 1 or 2 at a time
  int column_parts;   // warps that share 16 rows divide the columns in as many,
  int k_parts;        // and K in as many
  uint32_t limit;     // magnitude of x from which on it is an outlier
  // What follows from these; all but blocks are powers of two, or their logarithms.
  int columns, groups;  // columns at a time, and how many times
  int tiles_log, cluster_log, columns_log, parts_log, k_parts_log;
  int pitch;                                             // bytes of a row in shared memory
  int sums_bytes, a_at, a_bytes, ring_at, buffer_bytes;  // of a mailbox of sums; in shared memory
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

struct Row {
  float factor;
  int power;
  int slot;
};

struct Shared {
  uint64_t full[kMaxBuffers], empty[kMaxBuffers], described, a_full;
  uint64_t maxima_full[kTeams], maxima_free[kTeams], sums_full[2], sums_free[2];
  int exponent;  // largest of the blocks
  bool mixed;    // some of the blocks have the other 16-bit type than x
  Row row[kTeams][kMaxTiles * kTile];
  // Low half: of all of the row, high half: below the limit.
  uint32_t maxima[kTeams][kMaxCluster][kMultiplyWarps][kTile];
  Block block[kMaxBlocks];
};

constexpr int kHeaderBytes = (static_cast<int>(sizeof(Shared)) + 127) / 128 * 128;

// The blocks of a member come after those of the members before it; a pair of parts starts at an even one.
__host__ __device__ inline int first_block(const AdapterView& ad, int after) {
  const bool split = ad.chunk_count && ad.down_columns / ad.chunk_count > kBlock;
  return split ? (after + 1) / 2 * 2 : after;
}

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

// A place in the ring of buffers, and the parity of its use.
struct Ring {
  int buffer = 0;
  uint32_t phase = 0;
  __device__ __forceinline__ void advance(int batches, int buffers) {
    for (buffer += batches; buffer >= buffers; buffer -= buffers) phase ^= 1;
  }
};

// All threads of the cluster arrive, but nothing is ordered: a release would wait for all copies and stores under way.
__device__ __forceinline__ void cluster_meet() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;\n" ::: "memory");
}
__device__ __forceinline__ int log2_of(int power) { return 31 - __clz(power); }

__device__ __forceinline__ uint32_t cluster_address(uint32_t address, int rank) {
  uint32_t remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;\n" : "=r"(remote) : "r"(address), "r"(rank));
  return remote;
}
// Stores into the shared memory of a block of the cluster, which count as bytes at its barrier.
__device__ __forceinline__ void send(uint32_t to, uint32_t value, uint32_t barrier) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];\n" ::"r"(to), "r"(value),
               "r"(barrier)
               : "memory");
}
__device__ __forceinline__ void send(uint32_t to, float first, float second, uint32_t barrier) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];\n" ::"r"(to),
               "f"(first), "f"(second), "r"(barrier)
               : "memory");
}
__device__ __forceinline__ void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void named_sync(int number, int threads) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(number), "r"(threads) : "memory");
}
__device__ __forceinline__ void copy_bulk(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];\n" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}

#endif

template <class X, bool kPlain>
__global__ __launch_bounds__(kThreads, 1) void prepare_rows(const __grid_constant__ PrepareArgs args,
                                                            const __grid_constant__ Plan plan) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr bool x_f16 = std::is_same_v<X, __half>;
  extern __shared__ __align__(128) uint8_t memory[];
  auto& shared = *reinterpret_cast<Shared*>(memory);
  uint8_t* const sums = memory + kHeaderBytes;
  uint8_t* const a_tile = memory + plan.a_at;
  uint8_t* const ring = memory + plan.ring_at;
  const auto barrier = [](uint64_t& b) { return ptx::shared_address(&b); };

  const int warp = static_cast<int>(threadIdx.x) / 32, lane = threadIdx.x % 32;
  const int rank = static_cast<int>(ptx::cluster_rank());
  const int cluster = static_cast<int>(blockIdx.x) / plan.cluster;
  const int capacity = plan.tiles * kTile;  // rows of a buffer
  const int start = rank * plan.slice;
  const int valid = max(0, min(plan.slice, args.k - start));  // of the slice, a multiple of 8
  const int k_steps = (args.k + 31) / 32, steps = (valid + 31) / 32;

  const int base = args.m / plan.clusters, more = args.m % plan.clusters;
  const int first_row = cluster * base + min(cluster, more), end_row = first_row + base + (cluster < more);
  const int batches = (end_row - first_row + plan.batch_rows - 1) / plan.batch_rows;
  const auto batch_first = [&](int batch) { return first_row + batch * plan.batch_rows; };
  const auto rows_of = [&](int batch) { return min(plan.batch_rows, end_row - batch_first(batch)); };

  const auto load = [&](int batch, int buffer) {
    const int rows = rows_of(batch);
    const uint32_t full = barrier(shared.full[buffer]);
    if (warp == 0) ptx::barrier_expect_bytes(full, static_cast<uint32_t>(rows * valid * 2));
    if (!valid) return;
    const X* x = static_cast<const X*>(args.x) + static_cast<int64_t>(batch_first(batch) + warp) * args.k + start;
    uint32_t to = ptx::shared_address(ring + buffer * plan.buffer_bytes) + warp * plan.pitch;
    for (int r = warp; r < rows; r += kCopyWarps) {
      copy_bulk(to, x, valid * 2, full);
      x += static_cast<int64_t>(kCopyWarps) * args.k;
      to += kCopyWarps * plan.pitch;
    }
  };

  if (threadIdx.x == 0) {
    for (int i = 0; i < plan.buffers; ++i) {
      ptx::barrier_init(barrier(shared.full[i]), 1);
      ptx::barrier_init(barrier(shared.empty[i]), kMultiplyWarps + kTeamWarps);
    }
    ptx::barrier_init(barrier(shared.described), 1);
    ptx::barrier_init(barrier(shared.a_full), 1);
    for (int i = 0; i < kTeams; ++i) {
      ptx::barrier_init(barrier(shared.maxima_full[i]), 1);
      ptx::barrier_init(barrier(shared.maxima_free[i]), plan.cluster);
    }
    for (int i = 0; i < 2; ++i) {
      ptx::barrier_init(barrier(shared.sums_full[i]), 1);
      ptx::barrier_init(barrier(shared.sums_free[i]), plan.cluster);
    }
    ptx::barrier_init_fence();
  }
  __syncwarp();
  cluster_meet();
  wait_for_primaries();
  launch_dependents();

  const int describer = static_cast<int>(threadIdx.x) - kCopyWarps * 32;
  if (describer >= 0 && describer < plan.blocks) {
    Block block{};
    int after = 0;
    for (int m = 0; m < args.member_count; ++m) {
      const PrepareMember& member = args.member[m];
      const AdapterView& ad = member.adapters;
      const int first = first_block(ad, after), at = describer - first, count = ad.down_columns / kBlock;
      if (at >= 0 && at < count) {
        const int parts = count / ad.chunk_count;
        const Chunk chunk = ad.chunks[at / parts];
        block.a = ad.a + (static_cast<int64_t>(at) * 2 * k_steps + start / 32) * 32;
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
  if (warp == kCopyWarps || warp == kCopyWarps + 1) named_sync(2, 2 * 32);
  if (warp == kCopyWarps) {
    int exponent = INT_MIN;
    bool mixed = false;
    for (int i = lane; i < plan.blocks; i += 32) {
      exponent = max(exponent, shared.block[i].term_exponent);
      mixed |= shared.block[i].a && shared.block[i].a_f16 != x_f16;
    }
    exponent = __reduce_max_sync(~0u, exponent);
    mixed = __any_sync(~0u, mixed);
    if (lane == 0) {
      shared.exponent = exponent;
      shared.mixed = mixed;
      arrive(barrier(shared.described));
    }
  }
  if (warp >= kCopyWarps) named_sync(1, kThreads - kCopyWarps * 32);

  if (warp < kCopyWarps) {
    ptx::registers_fewer<32>();
    if (lane == 0) {
      // What is multiplied first comes first.
      const int loaded = min(batches, plan.buffers);
      load(0, 0);
      if (plan.a_resident && plan.blocks && steps) {
        const uint32_t full = barrier(shared.a_full);
        ptx::barrier_wait(barrier(shared.described), 0);
        int present = 0;
        for (int i = 0; i < plan.blocks * 2; ++i) {  // tiles of 8 plan.columns
          const uint4* const from = shared.block[i / 2].a;
          if (!from) continue;
          ++present;
          if (i % kCopyWarps == warp) {
            copy_bulk(ptx::shared_address(a_tile) + i * plan.slice * 16,
                      from + static_cast<int64_t>(i % 2) * k_steps * 32, static_cast<uint32_t>(steps * 512), full);
          }
        }
        if (warp == 0) ptx::barrier_expect_bytes(full, static_cast<uint32_t>(present * steps * 512));
      }
      for (int batch = 1; batch < loaded; ++batch) load(batch, batch);
      Ring at;
      for (int batch = plan.buffers; batch < batches; ++batch) {
        ptx::barrier_wait(barrier(shared.empty[at.buffer]), at.phase);
        load(batch, at.buffer);
        at.advance(1, plan.buffers);
      }
    }
  } else if (warp < kCopyWarps + kMultiplyWarps) {
    ptx::registers_more<128>();
    const int w = warp - kCopyWarps, tile = w & (plan.tiles - 1), part = w >> plan.tiles_log;
    const int k_part = part & (plan.k_parts - 1), column_part = part >> plan.k_parts_log;
    const int g = lane / 4, t = lane % 4;
    const uint32_t minus_limit = kPlain ? 0 : (0u - plan.limit & 0xffffu) * 0x10001u;
    if (plan.a_resident && plan.blocks && steps) ptx::barrier_wait(barrier(shared.a_full), 0);

    Ring at;
    for (int batch = 0, turn = 0; batch < batches; ++batch, at.advance(1, plan.buffers)) {
      const int buffer = at.buffer;
      const bool used = tile * kTile < rows_of(batch);
      const uint8_t* const x_tile = ring + buffer * plan.buffer_bytes + tile * kTile * plan.pitch;
      const uint32_t x_lane = ptx::shared_address(x_tile) + lane % 16 * plan.pitch + lane / 16 * 16;
      ptx::barrier_wait(barrier(shared.full[buffer]), at.phase);

      uint32_t full[2] = {}, below[2] = {};  // rows g and g + 8, two magnitudes each
      // Tiles of 8 plan.columns of A times the warp's part of the rows, which are measured on the way. kMixed: some
      // plan.columns are of the other 16-bit type than x.
      const auto multiply = [&](auto tiles_constant, auto mixed_constant, int first, bool measures) {
        constexpr int kTiles = decltype(tiles_constant)::value;
        constexpr bool kMixed = decltype(mixed_constant)::value;
        constexpr int kSize = kTiles ? kTiles : 1;
        float sum[kSize][4] = {};
        const uint4* a[(kSize + 1) / 2] = {};
        bool f16[kSize] = {};
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
          const Block& block = shared.block[min(first + n / 2, plan.blocks - 1)];
          f16[n] = kMixed ? block.a_f16 : x_f16;
          a[n / 2] = (block.a ? block.a : shared.block[plan.blocks - 1].a) + lane;
        }
        const uint4* const a_shared =
            reinterpret_cast<const uint4*>(a_tile) + min(first, plan.blocks - 1) * 2 * plan.slice + lane;
        int until_measured = column_part;  // the warps that share K measure in turn
        const auto multiply_steps = [&](auto count_constant, auto whole_constant, int step) {
          constexpr int kSteps = decltype(count_constant)::value;
          constexpr bool kWhole = decltype(whole_constant)::value;  // no part of a step is beyond K
          uint32_t x[kSteps][2][4];
          uint4 b[kSteps][kSize];
#pragma unroll
          for (int i = 0; i < kSteps; ++i) {
            const int s = step + i * plan.k_parts;
            ptx::load_matrix_x4(x[i][0], x_lane + s * 64);
            ptx::load_matrix_x4(x[i][1], x_lane + s * 64 + 32);
          }
          const auto operand_at = [&](int n, int s) {
            return plan.a_resident ? a_shared + n * plan.slice + s * 32 : a[n / 2] + (n % 2 * k_steps + s) * 32;
          };
          // With mixed types there are no registers for all operands at a time.
          if constexpr (!kMixed) {
            if (plan.a_resident) {
#pragma unroll
              for (int i = 0; i < kSteps * kTiles; ++i)
                b[i / kSize][i % kSize] = a_shared[i % kSize * plan.slice + (step + i / kSize * plan.k_parts) * 32];
            } else {
#pragma unroll
              for (int i = 0; i < kSteps * kTiles; ++i)
                b[i / kSize][i % kSize] = __ldg(operand_at(i % kSize, step + i / kSize * plan.k_parts));
            }
          }
          if constexpr (!kWhole) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              if (step * 32 + i * 8 >= valid) x[0][i / 2][i % 2 * 2] = x[0][i / 2][i % 2 * 2 + 1] = 0;
            }
          }
          if (measures && until_measured == 0) {
#pragma unroll
            for (int i = 0; i < kSteps * 8; ++i) {
              const uint32_t magnitudes = x[i / 8][i / 4 % 2][i % 4] & 0x7fff7fffu;
              full[i % 2] = __vmaxu2(full[i % 2], magnitudes);
              if constexpr (!kPlain) below[i % 2] = __viaddmax_u16x2(magnitudes, minus_limit, below[i % 2]);
            }
          }
          until_measured = until_measured ? until_measured - 1 : plan.column_parts - 1;
#pragma unroll
          for (int i = 0; i < kSteps * 2 * kTiles; ++i) {
            const int n = i % kSize, half = i / kSize % 2, at_step = i / kSize / 2;
            const uint4 operand = kMixed ? *operand_at(n, step) : b[at_step][n];
            const auto& fragment = x[at_step][half];
            const uint32_t b0 = half ? operand.z : operand.x, b1 = half ? operand.w : operand.y;
            if (!kMixed || f16[n] == x_f16) {
              if constexpr (x_f16)
                ptx::mma_f16(sum[n], fragment, b0, b1);
              else
                ptx::mma_bf16(sum[n], fragment, b0, b1);
            } else {
              float2 f[4];
#pragma unroll
              for (int j = 0; j < 4; ++j) f[j] = decode16x2(fragment[j], x_f16);
              const float2 low = decode16x2(b0, f16[n]), high = decode16x2(b1, f16[n]);
              const float even[4] = {f[0].x, f[1].x, f[0].y, f[1].y}, odd[4] = {f[2].x, f[3].x, f[2].y, f[3].y};
              ptx::mma_tf32(sum[n], even, low.x, low.y);
              ptx::mma_tf32(sum[n], odd, high.x, high.y);
            }
          }
        };
        if (used) {
          // As many as there are registers for.
          constexpr int kAtOnce = kMixed || (!kPlain && kTiles == 4) ? 1 : kTiles == 4 ? 2 : 3;
          const int whole_steps = valid / 32;
          int step = k_part;
          if constexpr (kAtOnce > 1) {
            for (; step + (kAtOnce - 1) * plan.k_parts < whole_steps; step += kAtOnce * plan.k_parts)
              multiply_steps(std::integral_constant<int, kAtOnce>(), std::true_type(), step);
          }
          for (; step < steps; step += plan.k_parts)
            multiply_steps(std::integral_constant<int, 1>(), std::false_type(), step);
        }
        if (measures) {
          uint32_t packed[2];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            full[i] = max(full[i] & 0xffff, full[i] >> 16);
            below[i] = max(below[i] & 0xffff, below[i] >> 16);
            packed[i] = full[i] | below[i] << 16;
            packed[i] = __vmaxu2(packed[i], __shfl_xor_sync(~0u, packed[i], 1));
            packed[i] = __vmaxu2(packed[i], __shfl_xor_sync(~0u, packed[i], 2));
          }
          ptx::barrier_wait(barrier(shared.maxima_free[batch % kTeams]), (batch / kTeams & 1) ^ 1);
          const int row = g + t % 2 * 8;
          const uint32_t to = ptx::shared_address(&shared.maxima[batch % kTeams][rank][w][row]);
          for (int i = t / 2; i < plan.cluster; i += 2) {
            send(cluster_address(to, i), t % 2 ? packed[1] : packed[0],
                 cluster_address(barrier(shared.maxima_full[batch % kTeams]), i));
          }
        }
        if constexpr (kTiles > 0) {
          const int box = turn & 1;
          ptx::barrier_wait(barrier(shared.sums_free[box]), (turn / 2 & 1) ^ 1);
          ++turn;
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int row = tile * kTile + g + half * 8, owner = row & (plan.cluster - 1);
            const int at =
                ((((rank << plan.k_parts_log) + k_part) * (capacity >> plan.cluster_log) + (row >> plan.cluster_log))
                 << plan.columns_log) +
                column_part * kTiles * 8 + 2 * t;
            const uint32_t to = cluster_address(ptx::shared_address(sums + box * plan.sums_bytes) + at * 4, owner);
            const uint32_t full_box = cluster_address(barrier(shared.sums_full[box]), owner);
#pragma unroll
            for (int n = 0; n < kTiles; ++n) send(to + n * 32, sum[n][half * 2], sum[n][half * 2 + 1], full_box);
          }
        }
      };

      const auto multiply_typed = [&](auto tiles_constant, int group) {
        const int first = (group * plan.column_parts + column_part) * plan.blocks_a_warp;
        if (shared.mixed)
          multiply(tiles_constant, std::true_type(), first, group == 0);
        else
          multiply(tiles_constant, std::false_type(), first, group == 0);
      };
      if (plan.groups == 0) multiply(std::integral_constant<int, 0>(), std::false_type(), 0, true);
      for (int group = 0; group < plan.groups; ++group) {
        if (plan.blocks_a_warp == 1)
          multiply_typed(std::integral_constant<int, 2>(), group);
        else
          multiply_typed(std::integral_constant<int, 4>(), group);
      }
      __syncwarp();
      if (lane == 0) arrive(barrier(shared.empty[buffer]));
    }
  } else {
    const int team = (warp - kCopyWarps - kMultiplyWarps) / kTeamWarps;
    const int thread = static_cast<int>(threadIdx.x) - (kCopyWarps + kMultiplyWarps + team * kTeamWarps) * 32;
    const auto team_sync = [&] { named_sync(3 + team, kTeamThreads); };
    const int row_units = args.q ? max(0, min(plan.slice, args.k_pitch - start)) / 8 : 0;
    const int units = valid / 8;  // of 8 values; row_units has one more where K is no multiple of 16
    const int own_rows = capacity >> plan.cluster_log;
    add_up_bias(args, static_cast<int>(blockIdx.x * kTeams + team) * kTeamThreads + thread,
                static_cast<int>(gridDim.x) * kTeams * kTeamThreads);

    Ring at_batch;
    at_batch.advance(team, plan.buffers);
    for (int batch = team; batch < batches; batch += kTeams, at_batch.advance(kTeams, plan.buffers)) {
      const int buffer = at_batch.buffer;
      const int first = batch_first(batch), rows = rows_of(batch);
      const uint32_t maxima_full = barrier(shared.maxima_full[team]);
      if (thread == 0) ptx::barrier_expect_bytes(maxima_full, plan.cluster * kMultiplyWarps * kTile * 4);
      ptx::barrier_wait(maxima_full, batch / kTeams & 1);
      // As many neighbouring lanes join the maxima of a row as there are threads for it.
      const int lanes_log = log2_of(kTeamThreads / kTile) - plan.tiles_log, lanes = 1 << lanes_log,
                own = thread >> lanes_log;
      uint32_t packed = 0;
#pragma unroll 4
      for (int i = thread & (lanes - 1); i < plan.cluster << plan.parts_log; i += lanes) {
        const int w = ((i & ((1 << plan.parts_log) - 1)) << plan.tiles_log) + own / kTile;
        packed = __vmaxu2(packed, shared.maxima[team][i >> plan.parts_log][w][own % kTile]);
      }
      for (int i = 1; i < lanes; i *= 2) packed = __vmaxu2(packed, __shfl_xor_sync(~0u, packed, i));
      if ((thread & (lanes - 1)) == 0 && own < rows) {
        const uint32_t full = magnitude_bits(decode16(packed & 0xffff, x_f16));
        uint32_t below = full;
        if constexpr (!kPlain) {
          // Magnitudes below the limit came as themselves minus the limit, modulo 2^16, and so above all the others.
          const uint32_t wrapped = (packed >> 16) + plan.limit;
          const auto largest = static_cast<uint16_t>(wrapped >= 0x10000u ? wrapped : 0);
          below = magnitude_bits(measured<kPlain>(args.spec, decode16(largest, x_f16)));
        }
        Row& row = shared.row[team][own];
        int exponent = shared.exponent;
        if (args.row_slot) {
          row.slot = args.row_slot[first + own];
          exponent = INT_MIN;
          for (int i = 0; i < plan.blocks; ++i) {
            if (shared.block[i].slot == row.slot) exponent = max(exponent, shared.block[i].term_exponent);
          }
        }
        const PreparedRow prepared = prepare_row(args.spec, below, full, exponent);
        row.factor = prepared.factor;
        row.power = prepared.power;
        if (rank == 0 && args.rows) args.rows[first + own] = prepared.out;
      }
      team_sync();
      if (thread < plan.cluster) ptx::barrier_arrive_cluster(barrier(shared.maxima_free[team]), thread);

      if (row_units) {
        ptx::barrier_wait(barrier(shared.full[buffer]), at_batch.phase);
        // A warp writes every kTeamWarps-th row, a lane 8 values of every 256.
        for (int r = thread / 32; r < rows; r += kTeamWarps) {
          const uint8_t* const x_row = ring + buffer * plan.buffer_bytes + r * plan.pitch;
          int8_t* const q_row = args.q + static_cast<int64_t>(first + r) * args.k_pitch + start;
          const float factor = shared.row[team][r].factor;
          const auto encode_row = [&](auto units_constant, auto&& four) {
            constexpr int kUnits = decltype(units_constant)::value;
            for (int unit = lane; unit < units; unit += kUnits * 32) {
              uint4 bits[kUnits];
#pragma unroll
              for (int i = 0; i < kUnits; ++i)
                bits[i] = *reinterpret_cast<const uint4*>(x_row + min(unit + i * 32, units - 1) * 16);
#pragma unroll
              for (int i = 0; i < kUnits; ++i) {
                const float2 v0 = decode16x2(bits[i].x, x_f16), v1 = decode16x2(bits[i].y, x_f16);
                const float2 v2 = decode16x2(bits[i].z, x_f16), v3 = decode16x2(bits[i].w, x_f16);
                uint2 codes = {four(v0.x, v0.y, v1.x, v1.y), four(v2.x, v2.y, v3.x, v3.y)};
                if (!kPlain && args.outliers.flags && unit + i * 32 < units) {
                  const int k = start + (unit + i * 32) * 8;
                  const uint32_t outliers = args.outliers.flags[k / 32] >> k % 32 & 0xff;
#pragma unroll
                  for (int j = 0; j < 4; ++j) {
                    if (outliers >> j & 1) codes.x &= ~(0xffu << j * 8);
                    if (outliers >> (j + 4) & 1) codes.y &= ~(0xffu << j * 8);
                  }
                }
                if (unit + i * 32 < units) *reinterpret_cast<uint2*>(q_row + (unit + i * 32) * 8) = codes;
              }
            }
          };
          if (stays_in_range<kPlain>(args.spec, factor))
            encode_row(std::integral_constant<int, 3>(),
                       [&](auto... v) { return quantize_in_range<kPlain>(args.spec, factor, v...); });
          else
            encode_row(std::integral_constant<int, 1>(),
                       [&](auto... v) { return quantize<kPlain>(args.spec, factor, v...); });
          if (lane == 0 && units < row_units) *reinterpret_cast<uint2*>(q_row + units * 8) = {};
        }
      }
      __syncwarp();
      if (lane == 0) arrive(barrier(shared.empty[buffer]));
      for (int group = 0; group < plan.groups; ++group) {
        const int turn = batch * plan.groups + group, sum_box = turn & 1;
        if (thread == 0) {
          // The other team may have yet to see the box's last use.
          ptx::barrier_wait(barrier(shared.sums_full[sum_box]), (turn / 2 & 1) ^ 1);
          ptx::barrier_expect_bytes(barrier(shared.sums_full[sum_box]), plan.sums_bytes);
        }
        ptx::barrier_wait(barrier(shared.sums_full[sum_box]), turn / 2 & 1);
        const float* const mail = reinterpret_cast<const float*>(sums + sum_box * plan.sums_bytes);
        // Where there are fewer sums than threads, neighbouring lanes share the terms of one.
        const int sums_log = plan.columns_log + log2_of(own_rows), sources = plan.cluster << plan.k_parts_log;
        const int share_log = max(0, min(log2_of(kTeamThreads) - sums_log, min(5, log2_of(sources))));
        for (int i = thread >> share_log; i < own_rows * plan.columns; i += kTeamThreads >> share_log) {
          const int index = i >> plan.columns_log, column = i & (plan.columns - 1),
                    share = thread & ((1 << share_log) - 1);
          const int r = (index << plan.cluster_log) + rank, at = group * (plan.columns / kBlock) + column / kBlock;
          const auto total = [&](int offset) {
            float value = 0.f;
#pragma unroll 8
            for (int source = share; source < sources; source += 1 << share_log)
              value += mail[(((source * own_rows) + index) << plan.columns_log) + column + offset];
            return value;
          };
          if (share_log == 0 && (r >= rows || at >= plan.blocks)) continue;
          const Block& block = shared.block[min(at, plan.blocks - 1)];
          float value = total(0);
          if (block.split && !block.low) value += total(kBlock);
          for (int lanes = 1; lanes < 1 << share_log; lanes *= 2) value += __shfl_xor_sync(~0u, value, lanes);
          if (share || r >= rows || at >= plan.blocks || !block.a || block.low)
            continue;  // low parts join the high ones
          const Row& row = shared.row[team][r];
          const int j = column % kBlock;
          const bool present = j < block.ranks && (!args.row_slot || block.slot == row.slot);
          value = present ? scalbnf(value * block.scale, -block.exponent - row.power) : 0.f;
          uint16_t* const h = block.h + static_cast<int64_t>(first + r) * block.up_columns + j;
          const uint16_t high = encode16(value, block.b_f16);
          h[0] = high;
          if (block.split) {
            h[kBlock] = encode16(present ? value - decode16(high, block.b_f16) : 0.f, block.b_f16);
            h[2 * kBlock] = high;
          }
        }
        team_sync();
        if (thread < plan.cluster) ptx::barrier_arrive_cluster(barrier(shared.sums_free[sum_box]), thread);
      }
    }
  }
  __syncwarp();
  cluster_meet();  // a block's shared memory outlives the messages of its peers
#else
  (void)args;
  (void)plan;
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

int shared_bytes(const Plan& plan) { return plan.ring_at + plan.buffers * plan.buffer_bytes; }

int log2_of_power(int power) {
  int log = 0;
  while (1 << log < power) ++log;
  return log;
}

// Equal batches for as many clusters.
void spread(Plan& plan, int m, int clusters) {
  plan.clusters = std::min((m + kTile - 1) / kTile, clusters);
  const int rows = (m + plan.clusters - 1) / plan.clusters, capacity = plan.tiles * kTile;
  const int batches = (rows + capacity - 1) / capacity;
  plan.batch_rows = (rows + batches - 1) / batches;
}
// A plan of this shape with as many buffers as fit; no buffers: it does not fit.
Plan shape(int k, int blocks, int cluster, int tiles, bool a_resident, const Limits& limits) {
  Plan plan{};
  plan.cluster = cluster;
  plan.slice = round_up((k + cluster - 1) / cluster, 32);
  plan.tiles = tiles;
  plan.a_resident = a_resident;
  plan.blocks = blocks;
  plan.blocks_a_warp = blocks <= 1 ? 1 : 2;
  plan.column_parts = 1;
  while (plan.column_parts * plan.blocks_a_warp < blocks && plan.column_parts * tiles < kMultiplyWarps)
    plan.column_parts *= 2;
  plan.k_parts = kMultiplyWarps / tiles / plan.column_parts;
  plan.columns = plan.column_parts * plan.blocks_a_warp * kBlock;
  plan.groups = (blocks * kBlock + plan.columns - 1) / plan.columns;
  plan.tiles_log = log2_of_power(tiles);
  plan.cluster_log = log2_of_power(cluster);
  plan.columns_log = log2_of_power(plan.columns);
  plan.parts_log = log2_of_power(kMultiplyWarps / tiles);
  plan.k_parts_log = log2_of_power(plan.k_parts);
  plan.pitch = plan.slice * 2 + 16;  // shifts banks by row
  plan.sums_bytes = blocks ? tiles * kTile * plan.columns * plan.k_parts * 4 : 0;
  plan.a_at = kHeaderBytes + 2 * plan.sums_bytes;
  plan.a_bytes = a_resident ? blocks * plan.slice * kBlock * 2 : 0;
  plan.ring_at = plan.a_at + plan.a_bytes;
  plan.buffer_bytes = tiles * kTile * plan.pitch;
  plan.buffers = std::clamp((limits.shared_bytes - plan.ring_at) / plan.buffer_bytes, 0, kMaxBuffers);
  return plan;
}

// The smallest cluster whose blocks hold three batches of x and that fills the device; A is in shared memory where it
// leaves room for three batches. Measured on an H200, M = 4608, us (cluster, tiles, R: A in shared memory, / buffers):
//   K 3072   rank 0    2,1 /4 17.2   1,1 /2 18.3   4,2 /4 18.6   2,2 /2 18.9
//            rank 16   2,1 R/3 21.2   4,2 R/3 22.0   2,1 /4 22.9   4,2 /4 24.1
//            rank 64   2,1 /3 32.6   4,2 /3 33.1   4,1 R/3 36.7   8,4 R/2 40.6
//            rank 128  4,2 /3 44.9   2,1 /3 46.5   4,1 /7 49.8   8,2 R/3 53.2
//   K 12288  rank 16   8,1 R/3 68.6   8,1 /4 72.6   4,1 /2 79.9   8,2 /2 84.0
//   K 15360  rank 16   8,1 /3 90.8   8,1 R/2 99.3   4,1 /1 127   8,2 R/1 139
Plan plan_for(const PrepareArgs& args, const Limits& limits) {
  constexpr int kEnough = 3;
  const int blocks = blocks_of(args), batches = (args.m + kTile - 1) / kTile;
  Plan plan{};
  for (int i = 0; i < 4; ++i) {
    const int cluster = 1 << i;
    if (!limits.prepare_clusters[i]) continue;
    const int held = shape(args.k, 0, cluster, 1, false, limits).buffers;
    plan = shape(args.k, blocks, cluster, 1, true, limits);
    if (plan.buffers < kEnough) plan = shape(args.k, blocks, cluster, 1, false, limits);
    if (plan.buffers) spread(plan, args.m, limits.prepare_clusters[i]);
    if (held >= kEnough && batches * cluster >= limits.multiprocessors) break;
  }
  return plan;
}

template <class X>
void launch(const PrepareArgs& args, const Limits& limits, cudaStream_t stream) {
  Plan plan = plan_for(args, limits);
  plan.limit = outlier_limit<X>(args.spec);
  DependentLaunch launch(plan.clusters * plan.cluster, kThreads, plan.cluster, shared_bytes(plan), stream);
  const auto kernel = is_plain(args.spec) ? prepare_rows<X, true> : prepare_rows<X, false>;
  OCTOLORA_CUDA(cudaLaunchKernelEx(&launch.config, kernel, args, plan),
                "prepare: M = %d, K = %d, %d blocks of columns, clusters of %d", args.m, args.k, plan.blocks,
                plan.cluster);
}

}  // namespace

void set_up_prepare_sm90(Limits& limits) {
  if (limits.capability != 90) return;
  for (const auto kernel : {prepare_rows<__half, true>, prepare_rows<__half, false>, prepare_rows<__nv_bfloat16, true>,
                            prepare_rows<__nv_bfloat16, false>}) {
    OCTOLORA_CUDA(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                       cudaFuncAttributeMaxDynamicSharedMemorySize, limits.shared_bytes),
                  "prepare: %d bytes of shared memory", limits.shared_bytes);
  }
  limits.prepare_clusters[0] = limits.multiprocessors;
  for (int i = 1; i < 4; ++i) {
    const DependentLaunch launch(1 << i, kThreads, 1 << i, limits.shared_bytes, nullptr);
    cudaLaunchConfig_t config = launch.config;  // of which the question takes the cluster's attribute alone
    cudaLaunchAttribute cluster = launch.attributes[1];
    config.attrs = &cluster;
    config.numAttrs = 1;
    OCTOLORA_CUDA(
        cudaOccupancyMaxActiveClusters(&limits.prepare_clusters[i], prepare_rows<__nv_bfloat16, true>, &config),
        "clusters of %d", 1 << i);
  }
}

bool prepare_sm90_takes(const PrepareArgs& args, const Limits& limits) {
  return limits.capability == 90 && args.x_type != Dtype::f32 && args.k % 8 == 0 && !args.planes &&
         reinterpret_cast<uintptr_t>(args.x) % 16 == 0 && blocks_of(args) <= kMaxBlocks &&
         plan_for(args, limits).buffers;
}

void launch_prepare_sm90(const PrepareArgs& args, const Limits& limits, cudaStream_t stream) {
  if (args.x_type == Dtype::f16)
    launch<__half>(args, limits, stream);
  else
    launch<__nv_bfloat16>(args, limits, stream);
}

void describe_prepare_sm90(const PrepareArgs& args, const Limits& limits, Explanation& to) {
  const Plan plan = plan_for(args, limits);
  to.launch(
      "prepare_sm90: %s%d ranks of x.A^T; %d rows at a time for %d clusters of %d, %d of K in each block, A in %s",
      args.q ? "quantizes x, " : "", plan.blocks * kBlock, plan.batch_rows, plan.clusters, plan.cluster, plan.slice,
      plan.a_resident ? "shared memory" : "global memory");
}

}  // namespace octolora::cuda
