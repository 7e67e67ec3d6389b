// SPDX-License-Identifier: Apache-2.0
//
// W8A16 for Hopper: int8 weights widen in registers on their way into wgmma, x stays in 16 bits, and the low-rank
// update joins the same accumulators.
//
//   y[m,n] = p[m] * ( s_w[n] / p[m] * sum_k x[m,k] W[n,k]  +  sum_r h[m,r] B[n,r] ) + bias[n]
//
//   x [M,K] bf16 or fp16   W [N,k_pitch] int8, in the order of kernels.h   h [M,R], B [N,R] 16-bit
//   y [M,N] bf16 or fp16, rows of whole 16 bytes
//
// wgmma takes its first operand from registers and its second from shared memory. So the weights are the first: a
// warpgroup owns 64 rows of W and all tokens of the tile, and its accumulators are y^T. A stage of the pipeline is 64
// values of K: the tokens' rows of x, 128 bytes each, and 128 rows of W, 64 bytes each. While the four k-steps of one
// stage multiply, the warpgroup widens the next stage into a second set of registers.
//
// Two consumer warpgroups share a tile of 128 x kTokens, and a cluster of two blocks shares the tokens of two tiles:
// each loads half of x (or h) and multicasts it to both. Blocks stay and walk over tiles. The second warpgroup starts a
// few stages after the first and stays behind, so that one multiplies while the other scales, adds the low-rank update
// and stores.
//
// Barriers a stage: `full` (the bytes of the stage, one producer arrival) in each block; `empty`, with an arrival from
// each consumer warp of both blocks, since a producer writes into both.
#include <cuda.h>

#include <algorithm>

#include "check.h"
#include "convert.cuh"
#include "kernels.h"
#include "ptx.cuh"
#include "wgmma.cuh"
#include "wgmma_rs.cuh"

namespace octolora::cuda {
namespace {

constexpr int kBlockN = 128, kBlockK = 64, kBlockRank = 64;
constexpr int kWarpgroups = 2, kThreads = 128 * (kWarpgroups + 1);
constexpr int kCluster = 2;
constexpr int kWeightBytes = kBlockN * kBlockK;
constexpr int kMaxShared = 232448;  // what a block may have on sm_90

// Tokens of a tile; tokens that one store takes, and the number of such buffers a warpgroup has.
template <int Tokens, int StoreTokens, int Stores>
struct Config {
  static constexpr int kTokens = Tokens, kStoreTokens = StoreTokens, kStores = Stores;
  // Rows that one block of the cluster loads. Where half of the tile is no whole number of swizzle groups, the two
  // blocks load some rows twice.
  static constexpr int kBoxTokens = round_up(kTokens / kCluster, 8);
  static constexpr int kTokenBytes = kTokens * 128;
  static constexpr int kStageBytes = kTokenBytes + kWeightBytes;
  static constexpr int kStoreBytes = kStoreTokens * 128;  // 64 columns of y
  static constexpr int kPowers = kTokens * 4;             // p of the tile, a warpgroup's own
  static constexpr int kFixedBytes = kWarpgroups * (kStores * kStoreBytes + kPowers);
  static constexpr int kStages = std::min((kMaxShared - kFixedBytes) / (kStageBytes + 16), 8);
  static constexpr int kStaging = kStages * kStageBytes;
  static constexpr int kPowersAt = kStaging + kWarpgroups * kStores * kStoreBytes;
  static constexpr int kBarriers = kPowersAt + kWarpgroups * kPowers;
  static constexpr int kSharedBytes = kBarriers + kStages * 16;
  static_assert(kSharedBytes <= kMaxShared && kStages >= 4);
  static_assert(kTokenBytes % 1024 == 0 && kStoreBytes % 1024 == 0, "whole swizzle groups");
  static_assert(kTokens % kStoreTokens == 0 && kStoreTokens % 8 == 0);
  static_assert(kTokens * 8 <= kWeightBytes, "rows of the tile lie where the weights of a stage do");
};

struct Params {
  CUtensorMap x, w, h, y;
  const RowScale* rows;  // null: no adapters
  const float* scale;
  const float* bias;
  const uint16_t* b;
  const Chunk* chunks;
  int m, n;
  int k_blocks, rank_blocks, up_columns, chunk_columns;
  int tiles_m, pairs_n;
  int raster, lead;
  bool y_f16;
};

__device__ __forceinline__ uint32_t load_shared_u32(uint32_t address) {
  uint32_t value;
  asm volatile("ld.shared.u32 %0, [%1];\n" : "=r"(value) : "r"(address) : "memory");
  return value;
}

// Bytes from memory to shared memory, both at multiples of 16.
__device__ __forceinline__ void bulk_load(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];\n" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}

__device__ __forceinline__ void store_matrix_x4_transposed(uint32_t address, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(address), "r"(r[0]),
               "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}
__device__ __forceinline__ void store_matrix_x2_transposed(uint32_t address, uint32_t a, uint32_t b) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};\n" ::"r"(address), "r"(a), "r"(b)
               : "memory");
}

// Until the kernel before in the stream has finished, where this one was allowed to start early.
__device__ __forceinline__ void wait_for_previous_kernel() { asm volatile("griddepcontrol.wait;\n" ::: "memory"); }

// Keeps the compiler from moving uses of accumulators to before this point.
template <int Count>
__device__ __forceinline__ void pin(float (&d)[Count]) {
#pragma unroll
  for (int i = 0; i < Count; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// Four int8 in the order of kernels.h to two registers of two 16-bit values.
template <bool kF16>
__device__ __forceinline__ void widen(uint32_t bytes, uint32_t& low, uint32_t& high) {
  const auto widen_pair = [](uint32_t pair) {
    if constexpr (kF16) {
      // 1024 + (b ^ 0x80) as fp16, less 1152
      const uint32_t biased = (pair ^ 0x00800080u) | 0x64006400u;
      const __half2 value = __hsub2(*reinterpret_cast<const __half2*>(&biased), __half2half2(__ushort_as_half(0x6480)));
      return *reinterpret_cast<const uint32_t*>(&value);
    } else {
      // Sign and magnitude bits in the mantissas of 128 or 256 and of 128, whose difference is the value, exactly.
      const uint32_t magnitude = (pair & 0x007f007fu) | 0x43004300u, sign = (pair & 0x00800080u) | 0x43004300u;
      const __nv_bfloat162 value = __hsub2(*reinterpret_cast<const __nv_bfloat162*>(&magnitude),
                                           *reinterpret_cast<const __nv_bfloat162*>(&sign));
      return *reinterpret_cast<const uint32_t*>(&value);
    }
  };
  low = widen_pair(__byte_perm(bytes, 0, 0x4140));
  high = widen_pair(__byte_perm(bytes, 0, 0x4342));
}

template <class C, bool kF16>
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
      ptx::barrier_init(empty(stage), kCluster * kWarpgroups * 4);
    }
    ptx::barrier_init_fence();
  }
  ptx::cluster_sync();

  const int tiles = p.tiles_m * p.pairs_n;
  const int cluster = static_cast<int>(blockIdx.x) / kCluster, clusters = static_cast<int>(gridDim.x) / kCluster;
  // Tile of this block: first token, first column of y.
  const auto place = [&](int tile) {
    const int group = tile / (p.raster * p.pairs_n), within = tile - group * p.raster * p.pairs_n;
    const int rows = min(p.raster, p.tiles_m - group * p.raster);
    const int pair = within / rows;
    return int2{(group * p.raster + within % rows) * C::kTokens, (pair * kCluster + static_cast<int>(rank)) * kBlockN};
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
    ptx::registers_fewer<24>();
    if (threadIdx.x == kWarpgroups * 128) {
      for (const CUtensorMap* map : {&p.x, &p.w, &p.h}) ptx::prefetch_map(map);
      const int part = static_cast<int>(rank) * (C::kTokens - C::kBoxTokens);
      bool waited = false;
      for (int tile = cluster; tile < tiles; tile += clusters) {
        const int2 at = place(tile);
        const auto load_tokens = [&](const CUtensorMap* map, int byte) {
          ptx::tensor_load_multicast(base + stage * C::kStageBytes + part * 128, map, byte, at.x + part, full(stage),
                                     (1 << kCluster) - 1);
        };
        for (int block = 0; block < p.k_blocks; ++block) {
          ptx::barrier_wait(empty(stage), phase ^ 1);
          ptx::barrier_expect_bytes(full(stage), kCluster * C::kBoxTokens * 128 + kWeightBytes);
          load_tokens(&p.x, block * 128);
          ptx::tensor_load(base + stage * C::kStageBytes + C::kTokenBytes, &p.w, block * kBlockK, at.y, full(stage));
          step_stage();
        }
        if (p.rank_blocks && !waited) {
          wait_for_previous_kernel();
          waited = true;
        }
        for (int block = 0; block < p.rank_blocks; ++block) {
          ptx::barrier_wait(empty(stage), phase ^ 1);
          const uint32_t row_bytes = block ? 0 : round_up(min(C::kTokens, p.m - at.x) * 8, 16);
          ptx::barrier_expect_bytes(full(stage), kCluster * C::kBoxTokens * 128 + row_bytes);
          load_tokens(&p.h, block * 128);
          if (row_bytes)
            bulk_load(base + stage * C::kStageBytes + C::kTokenBytes, p.rows + at.x, row_bytes, full(stage));
          step_stage();
        }
      }
    }
  } else {
    ptx::registers_more<240>();
    constexpr int kRegisters = C::kTokens / 2;
    const int warp = static_cast<int>(threadIdx.x) / 32 % 4, lane = static_cast<int>(threadIdx.x) % 32;
    const int g = lane / 4, t = lane % 4;
    const bool leader = threadIdx.x % 128 == 0;
    const int row = warpgroup * 64 + warp * 16 + g;  // of the tile's 128 columns of y; the other is row + 8
    const auto sync_warpgroup = [&] {
      if (warpgroup == 0)
        ptx::named_sync<2>(128);
      else
        ptx::named_sync<3>(128);
    };
    const auto release = [&](int which) {
      if (lane < kCluster) ptx::barrier_arrive_cluster(empty(which), lane);
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
        bytes[k][0] = load_shared_u32(at + ((k ^ swizzle) * 16));
        bytes[k][1] = load_shared_u32(at + ((k ^ swizzle) * 16) + 8 * 64);
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        widen<kF16>(bytes[k][0], a[k][0], a[k][2]);
        widen<kF16>(bytes[k][1], a[k][1], a[k][3]);
      }
    };

    // Bit i: the 16 ranks of k-step i are fp16, for the first 32 steps.
    const auto step_f16 = [&](int step) { return p.chunks[step * kChunkRank / p.chunk_columns].b_f16 != 0; };
    const uint32_t f16_steps = __ballot_sync(~0u, lane * kChunkRank < p.up_columns && step_f16(lane));

    uint32_t store = 0;  // counts, so that the staging buffers take turns from tile to tile too
    bool waited = false;
    if (warpgroup == 1 && p.k_blocks > p.lead) ptx::barrier_wait(full(p.lead), 0);

    for (int tile = cluster; tile < tiles; tile += clusters) {
      const int2 at = place(tile);
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
      widen_stage(a[0]);
      multiply_stage(a[0], true);
      for (int block = 1; block < p.k_blocks; block += 2) {
        widen_stage(a[1]);
        multiply_stage(a[1], false);
        if (block + 1 == p.k_blocks) break;
        widen_stage(a[0]);
        multiply_stage(a[0], false);
      }

      // While the last stage multiplies.
      if (p.rank_blocks && !waited) {
        wait_for_previous_kernel();
        waited = true;
      }
      const int column[2] = {at.y + row, at.y + row + 8};
      float scale[2], bias[2];
      const uint16_t* b_row[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const bool exists = column[i] < p.n;
        scale[i] = exists ? p.scale[column[i]] : 0.f;
        bias[i] = exists && p.bias ? p.bias[column[i]] : 0.f;
        b_row[i] = p.b + static_cast<int64_t>(exists ? column[i] : 0) * p.up_columns + 2 * t;
      }
      uint32_t b[4][4];
      const auto load_b = [&](int block) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const int rank_at = block * kBlockRank + k * 16;
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            if (rank_at < p.up_columns)
              b[k][i] = __ldg(reinterpret_cast<const uint32_t*>(b_row[i % 2] + rank_at + i / 2 * 8));
          }
        }
      };
      if (p.rank_blocks) load_b(0);
      ptx::wgmma_wait<0>();
      pin(value);
      release(previous);

      const uint32_t powers = base + C::kPowersAt + warpgroup * C::kPowers;
      if (p.rank_blocks) {
        ptx::barrier_wait(full(stage), phase);
        const uint32_t rows = base + stage * C::kStageBytes + C::kTokenBytes;
        for (int i = static_cast<int>(threadIdx.x) % 128; i < C::kTokens; i += 128) {
          ptx::store_shared(powers + i * 4, __uint_as_float(load_shared_u32(rows + i * 8 + 4)));
        }
        sync_warpgroup();
#pragma unroll
        for (int j = 0; j < C::kTokens / 8; ++j) {
          const float2 power = ptx::load_shared_pair(powers + (j * 8 + 2 * t) * 4);
          // 1 / p: the sum of the exponent fields of a power of two and its inverse is 254.
          const float inverse[2] = {__uint_as_float(0x7f000000u - __float_as_uint(power.x)),
                                    __uint_as_float(0x7f000000u - __float_as_uint(power.y))};
#pragma unroll
          for (int i = 0; i < 4; ++i) value[4 * j + i] = value[4 * j + i] * inverse[i % 2] * scale[i / 2];
        }
        for (int block = 0; block < p.rank_blocks; ++block) {
          if (block) {
            load_b(block);
            ptx::barrier_wait(full(stage), phase);
          }
          const uint64_t h = tokens();
          // A step at a time: ptxas serializes every wgmma of the kernel if one with its operand in registers is
          // skipped or chosen by a branch within a group.
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            const int step = block * 4 + k;
            if (step * 16 >= p.up_columns) break;
            pin(value);
            if (step < 32 ? f16_steps >> step & 1 : step_f16(step)) {
              ptx::wgmma_fence();
              ptx::wgmma_rs_f16(value, b[k], h + 2 * k, true);
              ptx::wgmma_commit();
              ptx::wgmma_wait<0>();
            } else {
              ptx::wgmma_fence();
              ptx::wgmma_rs_bf16(value, b[k], h + 2 * k, true);
              ptx::wgmma_commit();
              ptx::wgmma_wait<0>();
            }
            pin(value);
          }
          release(stage);
          step_stage();
        }
      }

      constexpr int kPairs = C::kStoreTokens / 8;
#pragma unroll
      for (int part = 0; part < C::kTokens / C::kStoreTokens; ++part, ++store) {
        const uint32_t buffer =
            base + C::kStaging + (warpgroup * C::kStores + static_cast<int>(store % C::kStores)) * C::kStoreBytes;
        if (leader) ptx::store_wait_read<C::kStores - 1>();
        sync_warpgroup();
        uint32_t packed[4];
#pragma unroll
        for (int j = 0; j < kPairs; ++j) {
          const int first = part * C::kStoreTokens + j * 8;  // token
          float2 power = {1.f, 1.f};
          if (p.rank_blocks) power = ptx::load_shared_pair(powers + (first + 2 * t) * 4);
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float low = value[first / 2 + 2 * i], high = value[first / 2 + 2 * i + 1];
            if (p.rank_blocks) {
              low = low * power.x + bias[i];
              high = high * power.y + bias[i];
            } else {
              low = low * scale[i] + bias[i];
              high = high * scale[i] + bias[i];
            }
            if (p.y_f16) {
              const __half2 both = __floats2half2_rn(low, high);
              packed[j % 2 * 2 + i] = *reinterpret_cast<const uint32_t*>(&both);
            } else {
              const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
              packed[j % 2 * 2 + i] = *reinterpret_cast<const uint32_t*>(&both);
            }
          }
          // Matrix i of the four: columns 8 (i % 2).. of y, tokens 8 (i / 2)..; a lane gives the address of a token.
          const int chunk = warp * 2 + lane / 8 % 2;
          if (j % 2) {
            const int token = (j - 1) * 8 + lane / 16 * 8 + lane % 8;
            store_matrix_x4_transposed(buffer + token * 128 + ((chunk ^ lane % 8) * 16), packed);
          } else if (j == kPairs - 1) {
            const int token = j * 8 + lane % 8;
            store_matrix_x2_transposed(buffer + token * 128 + ((chunk ^ lane % 8) * 16), packed[0], packed[1]);
          }
        }
        ptx::fence_async_shared();
        sync_warpgroup();
        if (leader) {
          ptx::tensor_store(&p.y, (at.y + warpgroup * 64) * 2, at.x + part * C::kStoreTokens, buffer);
          ptx::store_commit();
        }
      }
    }
    if (leader) ptx::store_wait<0>();
  }
  ptx::cluster_sync();  // no block leaves while its peer may still write to it
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

// A matrix of bytes [rows, width] in boxes of `box_rows` x `box_bytes`; what lies outside reads as zero and is not
// written.
CUtensorMap map_of(const void* matrix, int64_t width, int64_t rows, int64_t pitch, int box_rows, int box_bytes) {
  CUtensorMap map;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(width), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(pitch)};
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(box_bytes), static_cast<cuuint32_t>(box_rows)}, steps[2] = {1, 1};
  const CUresult result =
      encoder()(&map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, const_cast<void*>(matrix), sizes, strides, box, steps,
                CU_TENSOR_MAP_INTERLEAVE_NONE, box_bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_128B,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw Error(OCTOLORA_CUDA_ERROR, "cuTensorMapEncodeTiled: error %d for %lld rows of %lld bytes, pitch %lld, at %p",
                static_cast<int>(result), static_cast<long long>(rows), static_cast<long long>(width),
                static_cast<long long>(pitch), matrix);
  }
  return map;
}

#ifdef TUNE
int g_raster = 6, g_lead = 3, g_tokens = 0, g_pdl = 1;
#endif

template <class C>
void launch(const GemmArgs& args, const Limits& limits, cudaStream_t stream) {
  Params p{};
  const int up = args.adapters.up_columns;
  p.x = map_of(args.x, static_cast<int64_t>(args.k) * 2, args.m, args.x_pitch * 2, C::kBoxTokens, 128);
  p.w = map_of(args.weight, args.k_pitch, args.n, args.k_pitch, kBlockN, kBlockK);
  p.h = up ? map_of(args.h, up * 2, args.m, up * 2, C::kBoxTokens, 128) : p.x;
  p.y =
      map_of(args.y, static_cast<int64_t>(args.n) * 2, args.m, static_cast<int64_t>(args.n) * 2, C::kStoreTokens, 128);
  p.rows = args.rows;
  p.scale = args.scale;
  p.bias = args.bias;
  p.b = args.adapters.b;
  p.chunks = args.adapters.chunks;
  p.m = args.m;
  p.n = args.n;
  p.k_blocks = (args.k + kBlockK - 1) / kBlockK;
  p.rank_blocks = (up + kBlockRank - 1) / kBlockRank;
  p.up_columns = up;
  p.chunk_columns = args.adapters.chunk_count ? up / args.adapters.chunk_count : kChunkRank;
  p.tiles_m = (args.m + C::kTokens - 1) / C::kTokens;
  p.pairs_n = (args.n + kBlockN * kCluster - 1) / (kBlockN * kCluster);
  p.y_f16 = args.y_type == Dtype::f16;
  p.raster = 6;
  p.lead = 3;
#ifdef TUNE
  p.raster = g_raster;
  p.lead = std::min(g_lead, C::kStages - 1);
#endif

  const int clusters = std::min(p.tiles_m * p.pairs_n, limits.multiprocessors / kCluster);
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
  config.numAttrs = up ? 2 : 1;
#ifdef TUNE
  if (!g_pdl) config.numAttrs = 1;
#endif
  OCTOLORA_CUDA(cudaLaunchKernelEx(&config, args.x_f16 ? gemm<C, true> : gemm<C, false>, p),
                "sm_90 W8A16 gemm, %d tokens a tile: M = %d, N = %d, K = %d, up columns = %d", C::kTokens, args.m,
                args.n, args.k, up);
}

template <class C>
void set_up() {
  for (const auto kernel : {gemm<C, false>, gemm<C, true>}) {
    OCTOLORA_CUDA(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                       cudaFuncAttributeMaxDynamicSharedMemorySize, C::kSharedBytes),
                  "sm_90 W8A16 gemm, %d tokens a tile: %d bytes of shared memory", C::kTokens, C::kSharedBytes);
  }
}

using Wide = Config<256, 32, 3>;
using Odd = Config<216, 24, 2>;
using Narrow = Config<128, 32, 3>;

}  // namespace

void set_up_gemm_w8a16_sm90(const Limits& limits) {
  if (limits.capability != 90) return;
  encoder();  // a driver without it fails here, not in a forward
  set_up<Wide>();
  set_up<Odd>();
  set_up<Narrow>();
}

bool gemm_w8a16_sm90_takes(const GemmArgs& args, const Limits& limits) {
  return limits.capability == 90 && args.m > 64 && args.planes == 1 && args.x_pitch % 8 == 0 &&
         reinterpret_cast<uintptr_t>(args.x) % 16 == 0 && args.y_type != Dtype::f32 && !args.store_sums &&
         args.n % 8 == 0 && reinterpret_cast<uintptr_t>(args.y) % 16 == 0;
}

void launch_gemm_w8a16_sm90(const GemmArgs& args, const Limits& limits, cudaStream_t stream) {
  // The width whose tiles fill the last wave best.
  const auto cost = [&](int tokens) {
    const int64_t tiles = static_cast<int64_t>((args.m + tokens - 1) / tokens) *
                          ((args.n + kBlockN * kCluster - 1) / (kBlockN * kCluster));
    const int clusters = limits.multiprocessors / kCluster;
    return (tiles + clusters - 1) / clusters * tokens;
  };
  int best = cost(256) <= cost(216) ? 256 : 216;
  if (cost(128) < 0.9 * static_cast<double>(cost(best))) best = 128;
#ifdef TUNE
  if (g_tokens) best = g_tokens;
#endif
  if (best == 256)
    launch<Wide>(args, limits, stream);
  else if (best == 216)
    launch<Odd>(args, limits, stream);
  else
    launch<Narrow>(args, limits, stream);
}

}  // namespace octolora::cuda
