// SPDX-License-Identifier: Apache-2.0
//
// h, p and the sums of the biases for a W8A16 GEMM on Hopper that reads x where it is, in blocks so small that each
// fits on a multiprocessor beside a block of gemm_w8a16_sm90.cu. That kernel starts when this one does, and needs h at
// the end of its first tile: the pass over x costs what it takes from the main loop.
//
//   h[m,r] = c * (x . A^T)[m,r] / p[m]      p[m] a power of two, see prepare.cu
//
//   x [M,K] bf16 or fp16, rows of whole and aligned 16 bytes; every row uses all slots
//
// A block has an equal share of the rows, at most kRows at a time, and all of K, which comes through a ring of stages
// of 64 columns: x by the tensor copy engine in its 128-byte swizzle, and A beside it in the fragments of kernels.h,
// for kBlocks times 16 ranks. The ranks are the rows of an mma and the rows of x its columns. A stage's steps of 16
// columns are divided among the four warps, whose sums meet in shared memory and are added in a fixed order.
#include <algorithm>

#include "check.h"
#include "dependent_launch.cuh"
#include "explanation.h"
#include "prepare.cuh"
#include "tensor_map.h"
#include "wgmma.cuh"

namespace octolora::cuda {
namespace {

constexpr int kWarps = 4, kThreads = kWarps * 32;
constexpr int kGroups = 5;  // of 8 rows
constexpr int kRows = kGroups * 8;
constexpr int kStageK = 64, kStageSteps = kStageK / 16;
constexpr int kMaxBlocks = 4;  // of 16 ranks, of all members
constexpr int kRowBytes = kStageK * 2;
constexpr int kFragmentBytes = 32 * 16;          // of 8 ranks and 32 columns
constexpr int kBlockBytes = 4 * kFragmentBytes;  // 16 ranks and kStageK columns
// p is 1 where it would be within 2^kBf16Powers of it and every adapter is bf16, whose range needs no help: the GEMM
// has less to do then.
constexpr int kBf16Powers = 60;

// 16 columns of x.A^T.
struct Block {
  const uint4* a;
  uint16_t* h;  // its first column in row 0
  int up_columns;
  float scale;
  int exponent;
  int ranks;
  bool a_f16, b_f16;
};

struct Shared {
  uint64_t full[4], empty[4];
  Block block[kMaxBlocks];
  int exponent;  // of the largest term; INT_MIN: h is zero
  bool any_f16;
  int power[kRows];  // log2 p
  uint32_t maximum[kWarps][kRows];
};

template <int kBlocks>
struct Ring {
  static constexpr int kTileBytes = kRows * kRowBytes, kStageBytes = kTileBytes + kBlocks * kBlockBytes;
  static constexpr int kStages = std::min((kBesideShared - static_cast<int>(sizeof(Shared))) / kStageBytes, 4);
  static constexpr int kBytes = kStages * kStageBytes;
  static constexpr int kSharedBytes = kBytes + static_cast<int>(sizeof(Shared));
  static_assert(kStages >= 3 && kTileBytes % 1024 == 0 && kStageBytes % 1024 == 0);
  static_assert(kWarps * kGroups * 32 * 16 <= kBytes, "the warps' sums lie where the stages were");
};

struct Plan {
  int share;       // rows of a block
  int batch_rows;  // at a time
  int blocks;      // of 16 ranks
  int passes_log;  // of x, kBlocks of them at a time
};

template <bool kF16, int kBlocks>
__global__ __launch_bounds__(kThreads, 65536 / (kThreads * kBesideRegisters)) void project_down(
    const __grid_constant__ PrepareArgs args, const Plan plan, const __grid_constant__ CUtensorMap x_map) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using R = Ring<kBlocks>;
  extern __shared__ __align__(1024) uint8_t memory[];
  auto& shared = *reinterpret_cast<Shared*>(memory + R::kBytes);
  const uint32_t ring = ptx::shared_address(memory);
  const auto full = [&](int stage) { return ptx::shared_address(&shared.full[stage]); };
  const auto empty = [&](int stage) { return ptx::shared_address(&shared.empty[stage]); };
  // Read from one lane, so that the compiler knows what is the same in all of a warp.
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32, 0), lane = threadIdx.x % 32;
  const int k_blocks = (args.k + kStageK - 1) / kStageK, k_steps = (args.k + 31) / 32;

  if (threadIdx.x == 0) {
    ptx::prefetch_map(&x_map);
    for (int i = 0; i < R::kStages; ++i) {
      ptx::barrier_init(full(i), 1);
      ptx::barrier_init(empty(i), kWarps);
    }
    ptx::barrier_init_fence();
  }
  wait_for_primaries();
  launch_dependents();
  if (warp == 1) {
    Block block{};
    int at = lane, term = INT_MIN;
    for (int m = 0; m < args.member_count && lane < plan.blocks; ++m) {
      const PrepareMember& member = args.member[m];
      const AdapterView& ad = member.adapters;
      if (at >= 0 && at < ad.chunk_count) {
        const Chunk chunk = ad.chunks[at];
        block.a = ad.a + static_cast<int64_t>(chunk.down / 8) * k_steps * 32;
        block.h = member.h + chunk.up;
        block.up_columns = ad.up_columns;
        block.scale = ad.scale[chunk.slot];
        block.exponent = chunk.exponent;
        block.ranks = chunk.ranks;
        block.a_f16 = chunk.a_f16;
        block.b_f16 = chunk.b_f16;
        term = term_exponent(chunk, block.scale);
      }
      at -= ad.chunk_count;
    }
    if (lane < kMaxBlocks) shared.block[lane] = block;
    const int largest = __reduce_max_sync(~0u, term);
    const bool any_f16 = __any_sync(~0u, term != INT_MIN && block.b_f16);
    if (lane == 0) {
      shared.exponent = largest;
      shared.any_f16 = any_f16;
    }
  }
  __syncthreads();

  int stage = 0;
  uint32_t phase = 0;
  // A batch of rows, for the first kBlocks blocks and then for the others. What is known of it is computed where it is
  // used, for the loop over K has no registers to spare.
  for (int item = 0;; ++item) {
    const auto first_row = [&] {
      int block;
      asm volatile("mov.u32 %0, %%ctaid.x;\n" : "=r"(block));
      return block * plan.share + (item >> plan.passes_log) * plan.batch_rows;
    };
    const auto rows_from = [&](int first) {
      return min(plan.batch_rows, min((static_cast<int>(blockIdx.x) + 1) * plan.share, args.m) - first);
    };
    if (rows_from(first_row()) <= 0) break;
    const int pass = (item & ((1 << plan.passes_log) - 1)) * kBlocks, of_pass = min(kBlocks, plan.blocks - pass);
    const int my_block = kBlocks == 1 ? 0 : warp % kBlocks;
    const bool mixed = shared.block[pass + my_block].a_f16 != kF16;
    float sum[kGroups][4] = {};
    uint32_t maximum[kGroups] = {};  // two magnitudes each
    // 16 columns of a stage. Rows beyond the batch are whatever was there, and their sums are not used.
    const auto multiply = [&](auto mixed_types, uint32_t tile, int step) {
      const uint32_t fragments = tile + R::kTileBytes + my_block * kBlockBytes + step / 2 * kFragmentBytes;
      const uint2 low = ptx::load_shared_8(fragments + lane * 16 + step % 2 * 8);
      const uint2 high = ptx::load_shared_8(fragments + 2 * kFragmentBytes + lane * 16 + step % 2 * 8);
      const uint32_t a[4] = {low.x, high.x, low.y, high.y};
      // Matrix i of the four: rows 8 (i / 2).., columns 8 (i % 2)..; a lane gives the address of one row. The last
      // group has no second.
      const uint32_t x_step = tile + lane % 8 * kRowBytes + ((step * 2 + lane / 8 % 2) ^ lane % 8) * 16;
#pragma unroll
      for (int group = 0; group < kGroups; group += 2) {
        uint32_t x[4];
        ptx::load_matrix_x4(x, x_step + (group + (group + 1 < kGroups ? lane / 16 : 0)) * 8 * kRowBytes);
#pragma unroll
        for (int j = 0; j < 2 && group + j < kGroups; ++j) {
          const uint32_t b0 = x[2 * j], b1 = x[2 * j + 1];
          uint32_t& largest = maximum[group + j];
          largest = __vmaxu2(largest, __vmaxu2(b0 & 0x7fff7fffu, b1 & 0x7fff7fffu));
          if constexpr (decltype(mixed_types)::value) {
            // Products of the two types are exact in tf32. An mma takes the even or the odd columns of 16.
            const float2 v0 = decode16x2(b0, kF16), v1 = decode16x2(b1, kF16);
            float even[4], odd[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const float2 both = decode16x2(a[i], !kF16);
              even[i] = both.x, odd[i] = both.y;
            }
            ptx::mma_tf32(sum[group + j], even, v0.x, v1.x);
            ptx::mma_tf32(sum[group + j], odd, v0.y, v1.y);
          } else if constexpr (kF16) {
            ptx::mma_f16(sum[group + j], a, b0, b1);
          } else {
            ptx::mma_bf16(sum[group + j], a, b0, b1);
          }
        }
      }
    };
    // A stage is filled for block + kStages once block has been multiplied; those before 0 are there to be filled.
#pragma unroll 1
    for (int block = -R::kStages; block < k_blocks; ++block) {
      const uint32_t tile = ring + stage * R::kStageBytes;
      if (block >= 0) {
        ptx::barrier_wait(full(stage), phase ^ 1);
#pragma unroll 1
        for (int step = warp / kBlocks; step < kStageSteps; step += kStageSteps / kBlocks) {
          if (block * kStageK + step * 16 >= args.k) break;
          if (mixed)
            multiply(std::true_type(), tile, step);
          else
            multiply(std::false_type(), tile, step);
        }
        __syncwarp();
        if (lane == 0) ptx::barrier_arrive(empty(stage));
      }
      const int next = block + R::kStages;
      if (threadIdx.x == 0 && next < k_blocks) {
        ptx::barrier_wait(empty(stage), phase ^ 1);
        const uint32_t bytes = static_cast<uint32_t>(min(k_steps - 2 * next, 2) * kFragmentBytes);
        ptx::barrier_expect_bytes(full(stage),
                                  static_cast<uint32_t>(plan.batch_rows * kRowBytes) + 2 * of_pass * bytes);
        ptx::tensor_load(tile, &x_map, next * kRowBytes, first_row(), full(stage));
#pragma unroll 1
        for (int i = 0; i < 2 * of_pass; ++i) {
          const uint4* const a = shared.block[pass + i / 2].a + (i % 2 * static_cast<int64_t>(k_steps) + 2 * next) * 32;
          ptx::bulk_load(tile + R::kTileBytes + i * 2 * kFragmentBytes, a, bytes, full(stage));
        }
      }
      if (++stage == R::kStages) stage = 0, phase ^= 1;
    }
    phase ^= 1;  // as many stages as there are blocks of K, and not kStages more

    __syncthreads();  // all stages have been read
    auto* const sums = reinterpret_cast<float4*>(memory);
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
      sums[(warp * kGroups + j) * 32 + lane] = {sum[j][0], sum[j][1], sum[j][2], sum[j][3]};
      uint32_t largest = max(maximum[j] & 0xffff, maximum[j] >> 16);
      largest = max(largest, __shfl_xor_sync(~0u, largest, 1));
      largest = max(largest, __shfl_xor_sync(~0u, largest, 2));
      if (lane % 4 == 0) shared.maximum[warp][j * 8 + lane / 4] = largest;
    }
    __syncthreads();
    const int first = first_row(), rows = rows_from(first);
    const int row_of_thread = static_cast<int>(threadIdx.x);
    if (pass == 0 && row_of_thread < rows) {
      uint32_t largest = 0;
      for (int w = 0; w < kWarps; ++w) largest = max(largest, shared.maximum[w][row_of_thread]);
      const uint32_t bits = magnitude_bits(decode16(static_cast<uint16_t>(largest), kF16));
      PreparedRow prepared = prepare_row(args.spec, bits, bits, shared.exponent);
      if (!shared.any_f16 && abs(prepared.power) <= kBf16Powers) {
        prepared.power = 0;
        prepared.out.power = 1.f;
      }
      shared.power[row_of_thread] = prepared.power;
      args.rows[first + row_of_thread] = prepared.out;
    }
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < rows * 8 * of_pass; i += kThreads) {
      const int of_block = i / (rows * 8), row = i / 8 % rows, rank = i % 8 * 2;
      const Block& block = shared.block[pass + of_block];
      uint32_t packed = 0;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int from = rank % 8 * 4 + j * 4 + row % 8 / 2;  // the lane that has it
        float total = 0.f;
#pragma unroll
        for (int w = 0; w < kWarps / kBlocks; ++w) {
          const float4& four = sums[((w * kBlocks + of_block) * kGroups + row / 8) * 32 + from];
          total += reinterpret_cast<const float*>(&four)[row % 2 + rank / 8 * 2];
        }
        float value = 0.f;
        if (rank + j < block.ranks) value = scalbnf(total * block.scale, -block.exponent - shared.power[row]);
        packed |= static_cast<uint32_t>(encode16(value, block.b_f16)) << 16 * j;
      }
      *reinterpret_cast<uint32_t*>(block.h + static_cast<int64_t>(first + row) * block.up_columns + rank) = packed;
    }
    ptx::fence_async_shared();  // the next stages are written by the copy engine
    __syncthreads();
  }
  add_up_bias(args, static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x),
              static_cast<int>(gridDim.x) * kThreads);
#else
  (void)args;
  (void)plan;
  (void)x_map;
#endif
}

int blocks_of(const PrepareArgs& args) {
  int blocks = 0;
  for (int i = 0; i < args.member_count; ++i) blocks += args.member[i].adapters.chunk_count;
  return blocks;
}

Plan plan_for(const PrepareArgs& args, const Limits& limits) {
  Plan plan{};
  plan.blocks = blocks_of(args);
  plan.share = (args.m + limits.multiprocessors - 1) / limits.multiprocessors;
  const int batches = (plan.share + kRows - 1) / kRows;
  plan.batch_rows = (plan.share + batches - 1) / batches;
  plan.passes_log = plan.blocks > 2;
  return plan;
}

template <bool kF16, int kBlocks>
void launch(const PrepareArgs& args, const Plan& plan, cudaStream_t stream) {
  const CUtensorMap x_map = tensor_map(args.x, static_cast<int64_t>(args.k) * 2, args.m,
                                       static_cast<int64_t>(args.k) * 2, plan.batch_rows, kRowBytes);
  DependentLaunch launch((args.m + plan.share - 1) / plan.share, kThreads, 1, Ring<kBlocks>::kSharedBytes, stream);
  OCTOLORA_CUDA(cudaLaunchKernelEx(&launch.config, project_down<kF16, kBlocks>, args, plan, x_map),
                "down-projection: M = %d, K = %d, %d blocks of columns", args.m, args.k, plan.blocks);
}

template <bool kF16, int kBlocks>
void set_up() {
  share_memory(project_down<kF16, kBlocks>, Ring<kBlocks>::kSharedBytes, "down-projection");
}

}  // namespace

void set_up_down_projection(const Limits& limits) {
  if (limits.capability != 90) return;
  set_up<false, 1>();
  set_up<false, 2>();
  set_up<true, 1>();
  set_up<true, 2>();
}

bool down_projection_takes(const PrepareArgs& args, const Limits& limits) {
  if (limits.capability != 90 || args.q || args.planes || args.x_type == Dtype::f32 || args.row_slot) return false;
  if (args.k % 8 || reinterpret_cast<uintptr_t>(args.x) % 16) return false;
  for (int i = 0; i < args.member_count; ++i) {
    const AdapterView& ad = args.member[i].adapters;
    if (ad.down_columns != ad.chunk_count * kChunkRank) return false;  // parts of 16 ranks
  }
  const int blocks = blocks_of(args);
  return blocks > 0 && blocks <= kMaxBlocks;
}

void launch_down_projection(const PrepareArgs& args, const Limits& limits, cudaStream_t stream) {
  const Plan plan = plan_for(args, limits);
  if (args.x_type == Dtype::f16)
    (plan.blocks == 1 ? launch<true, 1> : launch<true, 2>)(args, plan, stream);
  else
    (plan.blocks == 1 ? launch<false, 1> : launch<false, 2>)(args, plan, stream);
}

void describe_down_projection(const PrepareArgs& args, const Limits& limits, Explanation& to) {
  const Plan plan = plan_for(args, limits);
  to.launch("down-projection: %d ranks of x.A^T beside the GEMM's first tile; %d rows a block, %d at a time",
            plan.blocks * kChunkRank, plan.share, plan.batch_rows);
}

}  // namespace octolora::cuda
