// SPDX-License-Identifier: Apache-2.0
//
// W8A8 for Hopper: wgmma on tiles that the copy engine brings, and the low-rank update as more blocks of the same
// pipeline.
//
//   y[m,n] = p[m] * ( s_w[n] * (s_x[m] / p[m]) * sum_k q[m,k] W[n,k]  +  sum_r h[m,r] B[n,r] ) + bias[n]
//
//   q [M,k_pitch] int8   W [N,k_pitch] int8   h [M,R], B [N,R] 16-bit   y [M,N] bf16 or fp16, rows of whole 16 bytes
//
// A block has one producer warp and two consumer warpgroups, which own 64 rows each of a 128 x BlockN tile; blocks stay
// and walk over tiles. A cluster of two blocks takes two tiles above each other: each loads half of their common rows
// of W and multicasts it to both, which brings the traffic from L2 below what L2 can give. A stage is 128 bytes of each
// row of both operands, so 64 ranks of h and B fit where 128 values of q and W were (gemm.cuh has the arithmetic in
// words).
//
// Barriers a stage: `full` (the bytes of both operands, one producer arrival) in each block; `empty`, with an arrival
// from each consumer warpgroup of both blocks, since a producer writes into both.
#include <cuda.h>

#include <algorithm>

#include "check.h"
#include "convert.cuh"
#include "kernels.h"
#include "ptx.cuh"
#include "wgmma.cuh"

namespace octolora::cuda {
namespace {

constexpr int kBlockM = 128, kBlockK = 128, kBlockRank = 64;
constexpr int kWarpgroups = 2, kThreads = 128 * (kWarpgroups + 1);
constexpr int kCluster = 2;
constexpr int kStoreColumns = 64;                    // 128 bytes of y
constexpr int kStoreBytes = 64 * kStoreColumns * 2;  // a warpgroup's rows
[[maybe_unused]] constexpr int kRasterPairs = 6;     // pairs of tiles along M that a wave walks together

template <int BlockN_>
struct Config {
  static constexpr int kBlockN = BlockN_;
  static constexpr int kStageBytes = (kBlockM + kBlockN) * 128;
  static constexpr int kStages = kBlockN == 192 ? 4 : 6;
  static constexpr int kColumns = kStages * kStageBytes + kWarpgroups * 2 * kStoreBytes;  // {s_w, bias} of the tile
  static constexpr int kBarriers = kColumns + kBlockN * 8;
  static constexpr int kSharedBytes = kBarriers + kStages * 16;
  static_assert(kSharedBytes <= 232448, "what a block may have on sm_90");
  static_assert(kBlockN % kStoreColumns == 0 && kBlockN / kCluster % 8 == 0,
                "whole swizzle groups a block of the cluster");
};

struct Params {
  CUtensorMap q, w, h, b, y;
  const RowScale* rows;
  const float* scale;
  const float* bias;
  const Chunk* chunks;
  int m, n;
  int k_blocks, rank_blocks, up_columns, chunk_columns;
  int pairs_m, tiles_n;
  bool y_f16;
  // Outlier columns: their list and number, the x and W they are gathered from.
  const int32_t* outlier_list;
  const int32_t* outlier_count;
  const void* raw_x;  // [M,k]
  Dtype raw_type;
  const int8_t* weight;  // [N,k_pitch]
  int k, k_pitch;
};

// value [16 x 8 columns a tile] += x_o . W_o^T over the outlier columns, for the rows row, row + 8 and the columns of
// `first_column` that a lane holds. Outliers are few, so mma operands are gathered straight from memory; int8 is exact
// in both 16-bit types, and fp32 x goes in as three bf16 pieces.
template <int Tiles>
__device__ __forceinline__ void add_outliers(float (&value)[Tiles][4], const Params& p, int count, int row,
                                             int first_column) {
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
      column[i] = at < count ? p.outlier_list[at] : -1;
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
    for (int j = 0; j < Tiles; ++j) {
      const int n = first_column + j * 8 + g;
      const int8_t* const w = p.weight + static_cast<int64_t>(n) * p.k_pitch;
      uint32_t bits[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) bits[i] = column[i] >= 0 && n < p.n ? encode16(w[column[i]], f16) : 0;
      const uint32_t b0 = bits[0] | bits[1] << 16, b1 = bits[2] | bits[3] << 16;
#pragma unroll
      for (int piece = 0; piece < 3; ++piece) {
        if (piece < pieces) {
          if (f16)
            ptx::mma_f16(value[j], x[piece], b0, b1);
          else
            ptx::mma_bf16(value[j], x[piece], b0, b1);
        }
      }
    }
  }
}

template <class C, bool kOutliers>
__global__ __launch_bounds__(kThreads, 1) void gemm(const __grid_constant__ Params p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) uint8_t memory[];
  const uint32_t base = ptx::shared_address(memory);
  const uint32_t staging = base + C::kStages * C::kStageBytes, columns = base + C::kColumns,
                 barriers = base + C::kBarriers;
  const auto full = [&](int stage) { return barriers + stage * 16; };
  const auto empty = [&](int stage) { return barriers + stage * 16 + 8; };
  const uint32_t rank = ptx::cluster_rank();
  const int warpgroup = static_cast<int>(threadIdx.x) / 128;

  if (threadIdx.x == 0) {
    for (int stage = 0; stage < C::kStages; ++stage) {
      ptx::barrier_init(full(stage), 1);
      ptx::barrier_init(empty(stage), kCluster * kWarpgroups);
    }
    ptx::barrier_init_fence();
  }
  ptx::cluster_sync();

  const int tiles = p.pairs_m * p.tiles_n, blocks = p.k_blocks + p.rank_blocks;
  const int cluster = static_cast<int>(blockIdx.x) / kCluster, clusters = static_cast<int>(gridDim.x) / kCluster;
  // Tile of this block: first row, first column.
  const auto place = [&](int tile) {
    const int group = tile / (kRasterPairs * p.tiles_n), within = tile - group * kRasterPairs * p.tiles_n;
    const int pairs = min(kRasterPairs, p.pairs_m - group * kRasterPairs);
    const int pair = group * kRasterPairs + within % pairs;
    return int2{(pair * kCluster + static_cast<int>(rank)) * kBlockM, within / pairs * C::kBlockN};
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
    ptx::registers_fewer<40>();
    if (threadIdx.x == kWarpgroups * 128) {
      for (const CUtensorMap* map : {&p.q, &p.w, &p.h, &p.b}) ptx::prefetch_map(map);
      for (int tile = cluster; tile < tiles; tile += clusters) {
        const int2 at = place(tile);
        for (int block = 0; block < blocks; ++block) {
          ptx::barrier_wait(empty(stage), phase ^ 1);
          ptx::barrier_expect_bytes(full(stage), C::kStageBytes);
          const bool low_rank = block >= p.k_blocks;
          const int byte = (low_rank ? block - p.k_blocks : block) * 128;
          const uint32_t x_tile = base + stage * C::kStageBytes, w_tile = x_tile + kBlockM * 128;
          const int part = static_cast<int>(rank) * (C::kBlockN / kCluster);
          ptx::tensor_load(x_tile, low_rank ? &p.h : &p.q, byte, at.x, full(stage));
          ptx::tensor_load_multicast(w_tile + part * 128, low_rank ? &p.b : &p.w, byte, at.y + part, full(stage),
                                     (1 << kCluster) - 1);
          step_stage();
        }
      }
    }
  } else {
    ptx::registers_more<232>();
    constexpr int kRegisters = C::kBlockN / 2;
    const int warp = static_cast<int>(threadIdx.x) / 32 % 4, lane = static_cast<int>(threadIdx.x) % 32;
    const int g = lane / 4, t = lane % 4;
    const bool leader = threadIdx.x % 128 == 0;
    uint32_t store = 0;  // counts, so that the two staging buffers take turns from tile to tile too
    const auto release = [&](int which) {
      if (threadIdx.x % 128 < kCluster) ptx::barrier_arrive_cluster(empty(which), threadIdx.x % 128);
    };
    const auto x_operand = [&] { return ptx::wgmma_descriptor(base + stage * C::kStageBytes + warpgroup * 64 * 128); };
    const auto w_operand = [&] { return ptx::wgmma_descriptor(base + stage * C::kStageBytes + kBlockM * 128); };

    // Bit i: the 16 ranks of k-step i are fp16, for the first 32 steps.
    const auto step_f16 = [&](int step) { return p.chunks[step * kChunkRank / p.chunk_columns].b_f16 != 0; };
    const uint32_t f16_steps = __ballot_sync(~0u, lane * kChunkRank < p.up_columns && step_f16(lane));

    for (int tile = cluster; tile < tiles; tile += clusters) {
      const int2 at = place(tile);
      const int first_row = at.x + warpgroup * 64 + warp * 16 + g;
      RowScale rows[2];
      for (int i = 0; i < 2; ++i) {
        rows[i] = first_row + 8 * i < p.m ? p.rows[first_row + 8 * i] : RowScale{1.f, 1.f};
        if (!kOutliers) rows[i].scale /= rows[i].power;  // outliers join before the division
      }

      const int my_column = at.y + static_cast<int>(threadIdx.x);
      const bool my_column_exists = threadIdx.x < C::kBlockN && my_column < p.n;
      const float my_scale = my_column_exists ? p.scale[my_column] : 0.f;
      const float my_bias = my_column_exists && p.bias ? p.bias[my_column] : 0.f;

      int32_t sum[kRegisters];
      int previous = 0;
      for (int block = 0; block < p.k_blocks; ++block) {
        ptx::barrier_wait(full(stage), phase);
        const uint64_t x = x_operand(), w = w_operand();
        ptx::wgmma_fence();
#pragma unroll
        for (int k = 0; k < 4; ++k) ptx::wgmma_s8(sum, x + 2 * k, w + 2 * k, block > 0 || k > 0);
        ptx::wgmma_commit();
        if (block > 0) {
          ptx::wgmma_wait<1>();
          release(previous);
        }
        previous = stage;
        step_stage();
      }
      // While the last block multiplies: the columns' numbers, once both warpgroups are done with the tile before.
      ptx::named_sync<1>(kWarpgroups * 128);
      if (threadIdx.x < C::kBlockN) {
        ptx::store_shared(columns + threadIdx.x * 4, my_scale);
        ptx::store_shared(columns + (C::kBlockN + threadIdx.x) * 4, my_bias);
      }
      ptx::named_sync<1>(kWarpgroups * 128);
      const uint32_t my_scales = columns + t * 8, my_biases = my_scales + C::kBlockN * 4;
      ptx::wgmma_wait<0>();
      release(previous);

      // The sums and the floats are two sets of registers to the compiler, which is why BlockN stops at 192: twice 128
      // of them do not fit a thread.
      constexpr int kQuarters = C::kBlockN / kStoreColumns;
      float value[kQuarters][32];
      if constexpr (kOutliers) {
        const int count = *p.outlier_count;
        float tile[kRegisters / 4][4];
#pragma unroll
        for (int i = 0; i < kRegisters; ++i) tile[i / 4][i % 4] = static_cast<float>(sum[i]) * rows[i / 2 % 2].scale;
        add_outliers(tile, p, count, first_row, at.y);
#pragma unroll
        for (int i = 0; i < kRegisters; ++i) sum[i] = __float_as_int(tile[i / 4][i % 4]);
      }
#pragma unroll
      for (int quarter = 0; quarter < kQuarters; ++quarter) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const float2 scale = ptx::load_shared_pair(my_scales + (quarter * 8 + j) * 32);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int32_t bits = sum[quarter * 32 + 4 * j + i];
            const float base =
                kOutliers ? __int_as_float(bits) / rows[i / 2].power : static_cast<float>(bits) * rows[i / 2].scale;
            value[quarter][4 * j + i] = base * (i % 2 ? scale.y : scale.x);
          }
        }
      }

      for (int block = 0; block < p.rank_blocks; ++block) {
        ptx::barrier_wait(full(stage), phase);
        const uint64_t x = x_operand(), b = w_operand();
#pragma unroll
        for (int quarter = 0; quarter < kQuarters; ++quarter) {
          ptx::wgmma_fence();
          for (int k = 0; k < 4 && block * kBlockRank + k * 16 < p.up_columns; ++k) {
            const uint64_t x_step = x + 2 * k, b_step = b + quarter * (kStoreColumns * 128 >> 4) + 2 * k;
            const int step = block * 4 + k;
            if (step < 32 ? f16_steps >> step & 1 : step_f16(step)) {
              ptx::wgmma_f16(value[quarter], x_step, b_step, true);
            } else {
              ptx::wgmma_bf16(value[quarter], x_step, b_step, true);
            }
          }
          ptx::wgmma_commit();
          ptx::wgmma_wait<0>();
        }
        release(stage);
        step_stage();
      }

      // Through two staging buffers of 64 x 64, in the swizzle of the copy engine.
#pragma unroll
      for (int part = 0; part < kQuarters; ++part, ++store) {
        const uint32_t buffer = staging + (warpgroup * 2 + store % 2) * kStoreBytes;
        if (leader) ptx::store_wait_read<1>();
        if (warpgroup == 0)
          ptx::named_sync<2>(128);
        else
          ptx::named_sync<3>(128);
#pragma unroll
        for (int pair = 0; pair < kStoreColumns / 16; ++pair) {
          uint32_t packed[4];
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int j = pair * 2 + half;
            const float2 bias = ptx::load_shared_pair(my_biases + (part * 8 + j) * 32);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              const float low = value[part][4 * j + 2 * i] * rows[i].power + bias.x;
              const float high = value[part][4 * j + 2 * i + 1] * rows[i].power + bias.y;
              if (p.y_f16) {
                const __half2 both = __floats2half2_rn(low, high);
                packed[half * 2 + i] = *reinterpret_cast<const uint32_t*>(&both);
              } else {
                const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
                packed[half * 2 + i] = *reinterpret_cast<const uint32_t*>(&both);
              }
            }
          }
          // Matrix i of the four: rows 8 (i % 2).., columns 8 (i / 2)..; a lane gives the address of one row.
          const int row = warp * 16 + lane % 16, chunk = pair * 2 + lane / 16;
          ptx::store_matrix_x4(buffer + row * 128 + ((chunk ^ row % 8) * 16), packed[0], packed[1], packed[2],
                               packed[3]);
        }
        ptx::fence_async_shared();
        if (warpgroup == 0)
          ptx::named_sync<2>(128);
        else
          ptx::named_sync<3>(128);
        if (leader) {
          ptx::tensor_store(&p.y, (at.y + part * kStoreColumns) * 2, at.x + warpgroup * 64, buffer);
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

// A matrix of bytes [rows, width] in boxes of `box_rows` x 128 bytes; what lies outside reads as zero and is not
// written.
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

template <class C, bool kOutliers>
void launch(const GemmArgs& args, const GemmMember& out, const Limits& limits, cudaStream_t stream) {
  Params p{};
  const int up = out.adapters.up_columns;
  p.q = map_of(args.x, args.k_pitch, args.m, args.x_pitch, kBlockM);
  p.w = map_of(out.weight, args.k_pitch, out.n, args.k_pitch, C::kBlockN / kCluster);
  if (up) {
    p.h = map_of(out.h, up * 2, args.m, up * 2, kBlockM);
    p.b = map_of(out.adapters.b, up * 2, out.n, up * 2, C::kBlockN / kCluster);
  } else {
    p.h = p.q;
    p.b = p.w;
  }
  p.y = map_of(out.y, static_cast<int64_t>(out.n) * 2, args.m, static_cast<int64_t>(out.n) * 2, 64);
  p.rows = args.rows;
  p.scale = out.scale;
  p.bias = out.bias;
  p.chunks = out.adapters.chunks;
  p.m = args.m;
  p.n = out.n;
  p.k_blocks = (args.k + kBlockK - 1) / kBlockK;
  p.rank_blocks = (up + kBlockRank - 1) / kBlockRank;
  p.up_columns = up;
  p.chunk_columns = out.adapters.chunk_count ? up / out.adapters.chunk_count : kChunkRank;
  p.pairs_m = (args.m + kBlockM * kCluster - 1) / (kBlockM * kCluster);
  p.tiles_n = (out.n + C::kBlockN - 1) / C::kBlockN;
  p.y_f16 = args.y_type == Dtype::f16;
  p.outlier_list = args.outliers.list;
  p.outlier_count = args.outliers.count;
  p.raw_x = args.raw_x;
  p.raw_type = args.raw_type;
  p.weight = out.weight;
  p.k = args.k;
  p.k_pitch = args.k_pitch;

  const int clusters = std::min(p.pairs_m * p.tiles_n, limits.multiprocessors / kCluster);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(clusters * kCluster));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = C::kSharedBytes;
  config.stream = stream;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = kCluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  config.attrs = &attribute;
  config.numAttrs = 1;
  OCTOLORA_CUDA(cudaLaunchKernelEx(&config, gemm<C, kOutliers>, p),
                "sm_90 gemm tile %dx%d: M = %d, N = %d, K = %d, up columns = %d", kBlockM, C::kBlockN, args.m, out.n,
                args.k, up);
}

template <class C>
void set_up() {
  for (const auto kernel : {gemm<C, false>, gemm<C, true>}) {
    OCTOLORA_CUDA(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                       cudaFuncAttributeMaxDynamicSharedMemorySize, C::kSharedBytes),
                  "sm_90 gemm tile %dx%d: %d bytes of shared memory", kBlockM, C::kBlockN, C::kSharedBytes);
  }
}

void set_up_all(const Limits& limits) {
  if (limits.capability != 90) return;
  encoder();  // a driver without it fails here, not in a forward
  set_up<Config<192>>();
  set_up<Config<128>>();
}

const char* refuses(const GemmArgs& args, const Limits& limits) {
  if (limits.capability != 90) return "not compute capability 9.0";
  if (args.m <= 64) return "M <= 64";
  if (args.y_type == Dtype::f32) return "y is fp32";
  if (args.store_sums) return "the sums are asked for";
  for (int i = 0; i < args.member_count; ++i) {
    const GemmMember& out = args.member[i];
    if (out.n % 8 || reinterpret_cast<uintptr_t>(out.y) % 16) return "rows of y are not of whole 16 bytes";
    if (out.activation != Activation::none || out.gate || out.residual) return "activation, gate or residual";
    if (args.row_slot && out.adapters.slot_count) return "rows have slots of their own";
  }
  return nullptr;
}

int64_t tiles_of(int m, int n, int block_n) {  // of two blocks
  return static_cast<int64_t>((m + 2 * kBlockM - 1) / (2 * kBlockM)) * ((n + block_n - 1) / block_n);
}

// The width whose tiles fill the last wave best, weighed by what each reaches in its main loop.
int choose_width(int m, int n, const Limits& limits) {
  const auto cost = [&](int block_n, double efficiency) {
    const int clusters = limits.multiprocessors / kCluster;
    return static_cast<double>((tiles_of(m, n, block_n) + clusters - 1) / clusters) * block_n / efficiency;
  };
  return cost(192, 1.0) <= cost(128, 0.9) ? 192 : 128;
}

template <bool kOutliers>
void launch_widest(const GemmArgs& args, const GemmMember& out, const Limits& limits, cudaStream_t stream) {
  if (choose_width(args.m, out.n, limits) == 192)
    launch<Config<192>, kOutliers>(args, out, limits, stream);
  else
    launch<Config<128>, kOutliers>(args, out, limits, stream);
}

void launch_all(const GemmArgs& args, const Limits& limits, cudaStream_t stream) {
  for (int i = 0; i < args.member_count; ++i) {
    if (args.outliers.list)
      launch_widest<true>(args, args.member[i], limits, stream);
    else
      launch_widest<false>(args, args.member[i], limits, stream);
  }
}

void describe(const GemmArgs& args, const Limits& limits, Explanation& to) {
  for (int i = 0; i < args.member_count; ++i) {
    const int n = args.member[i].n, width = choose_width(args.m, n, limits);
    const double waves = static_cast<double>(tiles_of(args.m, n, width)) / (limits.multiprocessors / kCluster);
    to.launch("%s, N = %d: tile %dx%d, clusters of %d, %d stages, %.2f waves; %s", kGemmSm90.name, n, kBlockM, width,
              kCluster, width == 192 ? Config<192>::kStages : Config<128>::kStages, waves,
              width == 192 ? "the widest tile" : "128 columns leave less of the last wave empty than 192");
  }
}

}  // namespace

const GemmFamily kGemmSm90 = {"wgmma s8", set_up_all, refuses, launch_all, describe};

}  // namespace octolora::cuda
