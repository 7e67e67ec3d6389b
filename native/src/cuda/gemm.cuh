// SPDX-License-Identifier: Apache-2.0
//
// Tensor-core GEMM for sm_80 and later whose accumulators take the low-rank update before the single store.
//
//   v[m,n] = p[m] * ( s_w[n] * (s_x[m] / p[m]) * sum_k q[m,k] W[n,k]  +  sum_r h[m,r] B[n,r] ) + bias[n]
//   y[m,n] = residual[m,n] + gate[n] * activation(v[m,n])
//
//   q [M,K] int8 (W8A8) or x [M,K] 16-bit (W8A16)   W [N,K] int8   h [M,R], B [N,R] 16-bit   y [M,N] fp32, fp16 or bf16
//
// W8A16 with block scales has  sum_b d[n,b] * sum_{k in b} x[m,k] W[n,k]  in place of the sum over k: the two k-steps
// of a block of 32 begin with sums of 0, which are then multiplied by d in fp32 and added to the accumulators.
//
// A stage holds 128 bytes of each row of both operands: 128 int8 of K or 64 16-bit ranks. The low-rank update is
// therefore ceil(R/64) more blocks of the same pipeline, fetched while the last blocks of K still multiply; between the
// two, the int32 accumulators become floats where they are, since both instructions share the layout of C (ptx.cuh).
//
// In shared memory the 16-byte chunk c of row r lies at chunk c ^ (r % 8) of its row, which keeps both cp.async and
// ldmatrix free of bank conflicts. Rows and columns beyond the matrices are zeros that are never read from memory.
//
// A launch makes one output, member[0] of its arguments.
#pragma once

#include <algorithm>
#include <climits>
#include <string>

#include "check.h"
#include "convert.cuh"
#include "epilogue.cuh"
#include "kernels.h"
#include "ptx.cuh"

namespace octolora::cuda::gemm {

// What is multiplied: int8 alone, int8 and then outlier columns in 16 bits, int8 alone with the sums as the result, or
// 16-bit x with widened weights, without and with block scales.
enum class Base { w8a8, w8a8_outliers, w8a8_sums, w8a16_bf16, w8a16_f16, w8a16_bf16_blocks, w8a16_f16_blocks };

// What a block may have where this is compiled for; a tile that needs more is not built there. A multiprocessor has 1
// KiB more, and takes 1 KiB for itself of every block.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200)
constexpr int kSharedLimit = 99 * 1024;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kSharedLimit = 163 * 1024;
#else
constexpr int kSharedLimit = 227 * 1024;
#endif

template <Base kBase_, int BlockM, int BlockN, int WarpM, int WarpN, int Stages_>
struct Config {
  static constexpr Base kBase = kBase_;
  static constexpr bool kInt8 = kBase == Base::w8a8 || kBase == Base::w8a8_outliers || kBase == Base::w8a8_sums;
  static constexpr bool kBlockScales = kBase == Base::w8a16_bf16_blocks || kBase == Base::w8a16_f16_blocks;
  static constexpr int kBlockM = BlockM, kBlockN = BlockN, kWarpM = WarpM, kWarpN = WarpN, kStages = Stages_;
  static constexpr int kWarps = BlockM / WarpM * (BlockN / WarpN);
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kXTiles = kInt8 ? 1 : 2;  // 128-byte tiles of x a stage: 128 values of K
  static constexpr int kXBytes = BlockM * 128 * kXTiles;
  static constexpr int kWBytes = BlockN * 128;
  static constexpr int kScaleBytes = kBlockScales ? 4 * BlockN * 2 : 0;  // d [4 blocks][BlockN] fp16
  static constexpr int kStageBytes = kXBytes + kWBytes + kScaleBytes;
  static constexpr int kStoreBytes = BlockM * (BlockN * 4 + 16);
  static constexpr int kPipelineBytes = kStages * kStageBytes > kStoreBytes ? kStages* kStageBytes : kStoreBytes;
  static constexpr int kSharedBytes = kPipelineBytes + BlockM * 8 + BlockN * 8;
  // Blocks on one multiprocessor, by shared memory; eight warps with block scales need more than half of the registers.
  static constexpr bool kTwoBlocks =
      2 * (kSharedBytes + 1024) <= kSharedLimit + 1024 && !(kBlockScales && kThreads > 128);
  static constexpr int kBlocks = kTwoBlocks ? 2 : 1;
  static_assert(WarpM % 16 == 0 && WarpN % 16 == 0, "ldmatrix.x4 brings 16 rows of either operand");
  static_assert(BlockM % WarpM == 0 && BlockN % WarpN == 0 && kStages >= 2);
};

constexpr int kBlockK = 128;  // values of K a block of the pipeline
constexpr int kBlockRank = 64;
constexpr int kRasterRows = 12;  // tiles of M that are walked together, so that a wave shares its rows of W in L2

template <class C>
__device__ __forceinline__ void multiply_tile(const GemmArgs& args) {
  constexpr bool kInt8 = C::kInt8, kOutliers = C::kBase == Base::w8a8_outliers, kSums = C::kBase == Base::w8a8_sums;
  constexpr int kTilesM = C::kWarpM / 16, kTilesN = C::kWarpN / 8;
  const GemmMember& out = args.member[0];
  extern __shared__ __align__(128) uint8_t memory[];
  auto* const row_scales = reinterpret_cast<RowScale*>(memory + C::kPipelineBytes);
  auto* const column_scales = reinterpret_cast<float*>(row_scales + C::kBlockM);
  auto* const column_bias = column_scales + C::kBlockN;

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_m = warp / (C::kBlockN / C::kWarpN) * C::kWarpM, warp_n = warp % (C::kBlockN / C::kWarpN) * C::kWarpN;
  const int g = lane / 4, t = lane % 4;

  const int tiles_m = (args.m + C::kBlockM - 1) / C::kBlockM, tiles_n = (out.n + C::kBlockN - 1) / C::kBlockN;
  const int group = static_cast<int>(blockIdx.x) / (kRasterRows * tiles_n);
  const int group_rows = min(kRasterRows, tiles_m - group * kRasterRows);
  const int within = static_cast<int>(blockIdx.x) - group * kRasterRows * tiles_n;
  const int m0 = (group * kRasterRows + within % group_rows) * C::kBlockM, n0 = within / group_rows * C::kBlockN;

  const int k_blocks = (args.k + kBlockK - 1) / kBlockK * (kInt8 ? 1 : args.planes);
  const int rank_blocks = (out.adapters.up_columns + kBlockRank - 1) / kBlockRank;

  // The steps of 16 ranks that the tile's rows need: of a block, four bits; and the first such block from `block` on.
  const auto needed_steps = [&](int block) -> uint32_t {
    if (!out.needed_steps) return 15;
    const int words = slot_words(out.adapters.up_columns), end = min(m0 + C::kBlockM, args.m);
    uint32_t bits = 0;
    for (int tile = m0 / kSlotRows; tile * kSlotRows < end; ++tile)
      bits |= out.needed_steps[static_cast<int64_t>(tile) * words + block / 8];
    return bits >> block % 8 * 4 & 15;
  };
  const auto needed_from = [&](int block) {
    while (block < rank_blocks && !needed_steps(block)) ++block;
    return block;
  };

  // A thread copies chunk `chunk` of every kRowStep-th row of a tile, from row `row` on.
  constexpr int kRowStep = C::kThreads / 8;
  const int row = static_cast<int>(threadIdx.x) / 8, chunk = static_cast<int>(threadIdx.x) % 8;
  const uint32_t to_chunk = row * 128 + ((chunk ^ row % 8) * 16);
  const uint32_t pipeline = ptx::shared_address(memory);

  // Rows first, first + 1, ... of a matrix of `total` rows, `width` of their `pitch` bytes filled.
  struct Rows {
    const uint8_t* from;  // this thread's first chunk
    int step;             // to its next row
    int present;          // how many of its rows exist
    int width;
  };
  const auto rows_of = [&](const void* matrix, int pitch, int width, int first, int total) {
    const auto* from = static_cast<const uint8_t*>(matrix) + static_cast<int64_t>(first + row) * pitch + chunk * 16;
    return Rows{from, kRowStep * pitch, (total - first - row + kRowStep - 1) / kRowStep, width};
  };
  // Part `part` of `parts` of a tile of `count` rows, from byte `offset` of each row on.
  const auto load_rows = [&](auto count, const Rows& rows, uint32_t to, int offset, int part, auto parts) {
    constexpr int kCopies = decltype(count)::value * 8 / C::kThreads, kParts = decltype(parts)::value;
    static_assert(decltype(count)::value * 8 % C::kThreads == 0);
    const bool within = offset + chunk * 16 < rows.width;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      if (i % kParts == part) {
        ptx::copy_async_16(to + to_chunk + i * kRowStep * 128, rows.from + offset + i * rows.step,
                           within && i < rows.present);
      }
    }
  };
  const std::integral_constant<int, C::kBlockM> rows_m;
  const std::integral_constant<int, C::kBlockN> rows_n;
  const std::integral_constant<int, 4> quarters;
  const int x_bytes = static_cast<int>(args.x_pitch) * (kInt8 ? 1 : 2);
  Rows x_rows = rows_of(args.x, x_bytes, x_bytes, m0, args.m);
  const Rows w_rows = rows_of(out.weight, args.k_pitch, args.k_pitch, n0, out.n);

  // The four rows of d of a block, from row `first` on: a thread copies 8 columns of one.
  const auto fetch_block_scales = [&](uint32_t to, int first) {
    constexpr int kPieces = C::kBlockN / 8;
    static_assert(!C::kBlockScales || 4 * kPieces <= C::kThreads);
    const int row = first + static_cast<int>(threadIdx.x) / kPieces, column = static_cast<int>(threadIdx.x) % kPieces;
    if (threadIdx.x >= 4 * kPieces) return;
    const int pitch = block_scale_pitch(out.n), n = n0 + column * 8;
    ptx::copy_async_16(to + threadIdx.x * 16, out.block_scale + static_cast<int64_t>(row) * pitch + n,
                       row * kScaleBlock < args.k && n < pitch);
  };

  // A quarter of a block: they are issued between the k-steps of the block that multiplies meanwhile.
  int next = 0, next_stage = 0, next_k = 0, next_rank = needed_from(0);
  const auto fetch_quarter = [&](int quarter) {
    const uint32_t x_tile = pipeline + next_stage * C::kStageBytes, w_tile = x_tile + C::kXBytes;
    if (next < k_blocks) {
      for (int part = 0; part < C::kXTiles; ++part) {
        load_rows(rows_m, x_rows, x_tile + part * C::kBlockM * 128, next_k * C::kXTiles + part * 128, quarter,
                  quarters);
      }
      load_rows(rows_n, w_rows, w_tile, next_k, quarter, quarters);
      if constexpr (C::kBlockScales) {
        if (quarter == 0) fetch_block_scales(w_tile + C::kWBytes, next_k / kScaleBlock);
      }
    } else if (next_rank < rank_blocks) {
      const int offset = next_rank * kBlockRank * 2, pitch = out.adapters.up_columns * 2;
      load_rows(rows_m, rows_of(out.h, pitch, pitch, m0, args.m), x_tile, offset, quarter, quarters);
      load_rows(rows_n, rows_of(out.adapters.b, pitch, pitch, n0, out.n), w_tile, offset, quarter, quarters);
    }
    if (quarter == 3) {
      ptx::copy_async_commit();
      if (next++ >= k_blocks) next_rank = needed_from(next_rank + 1);
      next_stage = next_stage + 1 == C::kStages ? 0 : next_stage + 1;
      next_k += kBlockK;
      if (!kInt8 && next_k >= args.k) {  // the next plane of x meets W from its first column on
        next_k = 0;
        x_rows.from += static_cast<int64_t>(args.m) * x_bytes;
      }
    }
  };

  // Operand fragments of the 32 bytes `step` of a 128-byte tile: 16 rows of x, 16 rows of W or B.
  const auto x_fragment = [&](uint32_t(&out)[4], uint32_t tile, int tile_m, int step) {
    ptx::load_matrix_x4(out,
                        tile + (warp_m + tile_m * 16 + lane % 16) * 128 + (((step * 2 + lane / 16) ^ lane % 8) * 16));
  };
  const auto w_fragment = [&](uint32_t(&out)[4], uint32_t tile, int pair, int step) {
    ptx::load_matrix_x4(out, tile + (warp_n + pair * 16 + lane % 8 + lane / 16 * 8) * 128 +
                                 (((step * 2 + lane / 8 % 2) ^ lane % 8) * 16));
  };

  // {s_x / p, p}; with outlier columns {s_x, p}, since those join before the division by p.
  if (threadIdx.x < C::kBlockM) {
    const bool present = args.rows && m0 + static_cast<int>(threadIdx.x) < args.m;
    RowScale row = present ? args.rows[m0 + threadIdx.x] : RowScale{1.f, 1.f};
    if (!kOutliers) row.scale /= row.power;
    row_scales[threadIdx.x] = row;
  }
  static_assert(C::kBlockM <= C::kThreads);
  for (int i = threadIdx.x; i < C::kBlockN; i += C::kThreads) {
    const bool present = n0 + i < out.n;
    column_scales[i] = present ? out.scale[n0 + i] : 0.f;
    column_bias[i] = present && out.bias ? out.bias[n0 + i] : 0.f;
  }

  const auto fetch = [&] {
#pragma unroll
    for (int quarter = 0; quarter < 4; ++quarter) fetch_quarter(quarter);
  };
  for (int i = 0; i < C::kStages - 1; ++i) fetch();
  int stage = 0;
  // Waits for the oldest block and returns its address; the stage read before it is then free for the next fetch.
  const auto advance = [&] {
    ptx::copy_async_wait<C::kStages - 2>();
    __syncthreads();
    const uint32_t at = pipeline + stage * C::kStageBytes;
    stage = stage + 1 == C::kStages ? 0 : stage + 1;
    return at;
  };

  float value[kTilesM][kTilesN][4];
  const auto each = [&](auto&& visit) {
#pragma unroll
    for (int i = 0; i < kTilesM; ++i) {
#pragma unroll
      for (int j = 0; j < kTilesN; ++j) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          visit(value[i][j][c], warp_m + i * 16 + g + c / 2 * 8, warp_n + j * 8 + 2 * t + c % 2, i, j, c);
        }
      }
    }
  };
  // One k-step of 16 values: all of the x fragments with a pair of n-tiles.
  const auto multiply16 = [&](const uint32_t(&x)[kTilesM][4], const uint32_t(&w)[4], int pair, bool f16) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int i = 0; i < kTilesM; ++i) {
        if (f16)
          ptx::mma_f16(value[i][2 * pair + j], x[i], w[2 * j], w[2 * j + 1]);
        else
          ptx::mma_bf16(value[i][2 * pair + j], x[i], w[2 * j], w[2 * j + 1]);
      }
    }
  };
  const auto multiply_tile16 = [&](uint32_t x_tile, uint32_t w_tile, int step, bool f16) {
    uint32_t x[kTilesM][4];
#pragma unroll
    for (int i = 0; i < kTilesM; ++i) x_fragment(x[i], x_tile, i, step);
#pragma unroll
    for (int j = 0; j < kTilesN / 2; ++j) {
      uint32_t w[4];
      w_fragment(w, w_tile, j, step);
      multiply16(x, w, j, f16);
    }
  };
  // 32 values of 16-bit x and of int8 W: 64 and 32 bytes.
  [[maybe_unused]] const auto multiply_widened = [&](uint32_t x_tile, uint32_t w_tile, int step, bool f16) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t x[kTilesM][4];
#pragma unroll
      for (int i = 0; i < kTilesM; ++i) {
        x_fragment(x[i], x_tile + step / 2 * C::kBlockM * 128, i, step % 2 * 2 + half);
      }
#pragma unroll
      for (int j = 0; j < kTilesN / 2; ++j) {
        uint32_t bytes[4], w[4];
        w_fragment(bytes, w_tile, j, step);
        widen(bytes[half], f16, w[0], w[1]);
        widen(bytes[half + 2], f16, w[2], w[3]);
        multiply16(x, w, j, f16);
      }
    }
  };
  // The same with block scales: value += d * (x . W over the block).
  [[maybe_unused]] const auto multiply_scaled = [&](uint32_t x_tile, uint32_t w_tile, int step, bool f16) {
    const uint32_t scales = w_tile + C::kWBytes + (step * C::kBlockN + warp_n + 2 * t) * 2;
    // All of W once, then x piece by piece: the other way round needs more registers.
    uint32_t w[kTilesN][2][2];
    float2 d[kTilesN];
#pragma unroll
    for (int j = 0; j < kTilesN; j += 2) {
      uint32_t bytes[4];
      w_fragment(bytes, w_tile, j / 2, step);
#pragma unroll
      for (int i = 0; i < 4; ++i) widen(bytes[i], f16, w[j + i / 2][i % 2][0], w[j + i / 2][i % 2][1]);
#pragma unroll
      for (int i = j; i < j + 2; ++i) d[i] = decode16x2(ptx::load_shared(scales + i * 16), true);
    }
#pragma unroll
    for (int i = 0; i < kTilesM; ++i) {
      uint32_t x[2][4];
#pragma unroll
      for (int half = 0; half < 2; ++half)
        x_fragment(x[half], x_tile + step / 2 * C::kBlockM * 128, i, step % 2 * 2 + half);
#pragma unroll
      for (int j = 0; j < kTilesN; ++j) {
        float sum[4] = {};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (f16)
            ptx::mma_f16(sum, x[half], w[j][half][0], w[j][half][1]);
          else
            ptx::mma_bf16(sum, x[half], w[j][half][0], w[j][half][1]);
        }
#pragma unroll
        for (int c = 0; c < 4; ++c) value[i][j][c] = fmaf(c % 2 ? d[j].y : d[j].x, sum[c], value[i][j][c]);
      }
    }
  };

  if constexpr (kInt8) {
    int32_t sum[kTilesM][kTilesN][4] = {};
    for (int block = 0; block < k_blocks; ++block) {
      const uint32_t x_tile = advance(), w_tile = x_tile + C::kXBytes;
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        uint32_t x[kTilesM][4], w[2][4];
#pragma unroll
        for (int i = 0; i < kTilesM; ++i) x_fragment(x[i], x_tile, i, step);
        w_fragment(w[0], w_tile, 0, step);
#pragma unroll
        for (int j = 0; j < kTilesN / 2; ++j) {
          if (j + 1 < kTilesN / 2) w_fragment(w[(j + 1) % 2], w_tile, j + 1, step);
#pragma unroll
          for (int i = 0; i < kTilesM; ++i) {
            ptx::mma_s8(sum[i][2 * j], x[i], w[j % 2][0], w[j % 2][1]);
            ptx::mma_s8(sum[i][2 * j + 1], x[i], w[j % 2][2], w[j % 2][3]);
          }
        }
        fetch_quarter(step);
      }
    }
    each([&](float& v, int m, int, int i, int j, int c) {
      v = kSums ? __int_as_float(sum[i][j][c]) : static_cast<float>(sum[i][j][c]) * row_scales[m].scale;
    });
  } else {
    constexpr bool kF16 = C::kBase == Base::w8a16_f16 || C::kBase == Base::w8a16_f16_blocks;
    each([](float& v, int, int, int, int, int) { v = 0.f; });
    for (int block = 0; block < k_blocks; ++block) {
      const uint32_t x_tile = advance(), w_tile = x_tile + C::kXBytes;
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        if constexpr (C::kBlockScales)
          multiply_scaled(x_tile, w_tile, step, kF16);
        else
          multiply_widened(x_tile, w_tile, step, kF16);
        fetch_quarter(step);
      }
    }
    each([&](float& v, int m, int, int, int, int) { v *= row_scales[m].scale; });
  }

  // Outlier columns: gathered, 64 at a time, into one stage while the pipeline stands still. int8 is exact in both
  // 16-bit types; fp32 x goes in as three bf16 pieces.
  if constexpr (kOutliers) {
    ptx::copy_async_wait<0>();
    const int count = *args.outliers.count;
    const bool f16 = args.raw_type == Dtype::f16;
    // Of the stages, the one that was read last holds no fetched block.
    uint8_t* const x_tile = memory + (stage == 0 ? C::kStages - 1 : stage - 1) * C::kStageBytes;
    uint8_t* const w_tile = x_tile + C::kXBytes;
    const auto place = [](int r, int j) { return r * 128 + (((j / 8) ^ (r % 8)) * 16) + j % 8 * 2; };
    for (int piece = 0; piece < (args.raw_type == Dtype::f32 ? 3 : 1); ++piece) {
      for (int base = 0; base < count; base += kBlockRank) {
        __syncthreads();
        for (int i = threadIdx.x; i < C::kBlockM * kBlockRank; i += C::kThreads) {
          const int r = i / kBlockRank, j = i % kBlockRank;
          uint16_t bits = 0;
          if (base + j < count && m0 + r < args.m) {
            const int64_t at = static_cast<int64_t>(m0 + r) * args.k + args.outliers.list[base + j];
            bits = args.raw_type == Dtype::f32 ? bf16_piece(static_cast<const float*>(args.raw_x)[at], piece)
                                               : static_cast<const uint16_t*>(args.raw_x)[at];
          }
          *reinterpret_cast<uint16_t*>(x_tile + place(r, j)) = bits;
        }
        for (int i = threadIdx.x; i < C::kBlockN * kBlockRank; i += C::kThreads) {
          const int r = i / kBlockRank, j = i % kBlockRank;
          float w = 0.f;
          if (base + j < count && n0 + r < out.n) {
            w = out.weight[static_cast<int64_t>(n0 + r) * args.k_pitch + args.outliers.list[base + j]];
          }
          *reinterpret_cast<uint16_t*>(w_tile + place(r, j)) = encode16(w, f16);
        }
        __syncthreads();
        for (int step = 0; step < 4 && base + step * 16 < count; ++step) {
          multiply_tile16(ptx::shared_address(x_tile), ptx::shared_address(w_tile), step, f16);
        }
      }
    }
    __syncthreads();
    each([&](float& v, int m, int, int, int, int) { v /= row_scales[m].power; });
  }

  if constexpr (!kSums) {
    each([&](float& v, int, int n, int, int, int) { v *= column_scales[n]; });
  }
  const int columns_per_chunk =
      out.adapters.chunk_count ? out.adapters.up_columns / out.adapters.chunk_count : kChunkRank;
  for (int block = needed_from(0); block < rank_blocks; block = needed_from(block + 1)) {
    const uint32_t needed = needed_steps(block);
    bool f16[4];
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      const int column = block * kBlockRank + step * 16;
      f16[step] = column < out.adapters.up_columns && out.adapters.chunks[column / columns_per_chunk].b_f16;
    }
    const uint32_t x_tile = advance();
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      if (block * kBlockRank + step * 16 < out.adapters.up_columns && needed >> step & 1) {
        multiply_tile16(x_tile, x_tile + C::kXBytes, step, f16[step]);
      }
      fetch_quarter(step);
    }
  }

  // Through shared memory, so that a warp stores whole rows of the tile.
  ptx::copy_async_wait<0>();
  __syncthreads();
  const bool epilogue = !kSums && has_epilogue(args, out), wide = epilogue || args.y_type == Dtype::f32;
  const int element = args.y_type == Dtype::f32 ? 4 : 2, staged = wide ? 4 : 2;
  const int pitch = C::kBlockN * staged + 16;
  if constexpr (!kSums) {
    each([&](float& v, int m, int n, int, int, int) { v = v * row_scales[m].power + column_bias[n]; });
  }
#pragma unroll
  for (int i = 0; i < kTilesM; ++i) {
#pragma unroll
    for (int j = 0; j < kTilesN; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float low = value[i][j][half * 2], high = value[i][j][half * 2 + 1];
        uint8_t* const to = memory + (warp_m + i * 16 + g + half * 8) * pitch + (warp_n + j * 8 + 2 * t) * staged;
        if (wide) {
          *reinterpret_cast<float2*>(to) = {low, high};
        } else if (args.y_type == Dtype::f16) {
          *reinterpret_cast<__half2*>(to) = __floats2half2_rn(low, high);
        } else {
          *reinterpret_cast<__nv_bfloat162*>(to) = __floats2bfloat162_rn(low, high);
        }
      }
    }
  }
  __syncthreads();
  if (epilogue) {
    constexpr int kPieces = C::kBlockN / 8;
    for (int i = threadIdx.x; i < C::kBlockM * kPieces; i += C::kThreads) {
      const int r = i / kPieces, c = i % kPieces * 8;
      if (m0 + r >= args.m || n0 + c >= out.n) continue;
      finish_eight(args, out, reinterpret_cast<const float*>(memory + r * pitch + c * 4), m0 + r, n0 + c);
    }
    return;
  }
  auto* const y = static_cast<uint8_t*>(out.y);
  const int64_t y_pitch = static_cast<int64_t>(out.n) * element;
  if (reinterpret_cast<uintptr_t>(y) % 16 == 0 && y_pitch % 16 == 0) {
    const int row_vectors = C::kBlockN * element / 16;
    for (int i = threadIdx.x; i < C::kBlockM * row_vectors; i += C::kThreads) {
      const int r = i / row_vectors, c = i % row_vectors * 16;
      if (m0 + r < args.m && static_cast<int64_t>(n0) * element + c < y_pitch) {
        *reinterpret_cast<uint4*>(y + (m0 + r) * y_pitch + static_cast<int64_t>(n0) * element + c) =
            *reinterpret_cast<const uint4*>(memory + r * pitch + c);
      }
    }
  } else {
    for (int i = threadIdx.x; i < C::kBlockM * C::kBlockN; i += C::kThreads) {
      const int r = i / C::kBlockN, c = i % C::kBlockN;
      if (m0 + r < args.m && n0 + c < out.n) {
        const int64_t at = static_cast<int64_t>(m0 + r) * out.n + n0 + c;
        if (element == 4)
          reinterpret_cast<uint32_t*>(y)[at] = *reinterpret_cast<const uint32_t*>(memory + r * pitch + c * 4);
        else
          reinterpret_cast<uint16_t*>(y)[at] = *reinterpret_cast<const uint16_t*>(memory + r * pitch + c * 2);
      }
    }
  }
}

template <class C>
__global__ __launch_bounds__(C::kThreads, C::kBlocks) void gemm(const __grid_constant__ GemmArgs args) {
  if constexpr (C::kSharedBytes <= kSharedLimit) multiply_tile<C>(args);
}

// One row of a tuned table: a kernel and the shapes it is for.
struct Tuned {
  int max_m;      // the row fits M up to here
  int min_tiles;  // ... and this many tiles, a wave or so
  int shared_bytes;
  int block_m, block_n, threads, stages;
  void (*kernel)(GemmArgs);

  int64_t tiles(int m, int n) const {
    return static_cast<int64_t>((m + block_m - 1) / block_m) * ((n + block_n - 1) / block_n);
  }
};

template <class C>
constexpr Tuned tuned(int max_m, int min_tiles) {
  return {max_m, min_tiles, C::kSharedBytes, C::kBlockM, C::kBlockN, C::kThreads, C::kStages, gemm<C>};
}

inline void set_up(const Tuned* table, int count, const Limits& limits) {
  for (int i = 0; i < count; ++i) {
    if (table[i].shared_bytes > limits.shared_bytes) continue;
    OCTOLORA_CUDA(cudaFuncSetAttribute(reinterpret_cast<const void*>(table[i].kernel),
                                       cudaFuncAttributeMaxDynamicSharedMemorySize, table[i].shared_bytes),
                  "tile %dx%d: %d bytes of shared memory", table[i].block_m, table[i].block_n, table[i].shared_bytes);
  }
}

// The first row that fits; the last row of a table fits everything.
inline const Tuned& choose(const Tuned* table, int count, int m, int n, const Limits& limits) {
  for (int i = 0; i < count; ++i) {
    const Tuned& row = table[i];
    if (m <= row.max_m && row.tiles(m, n) >= row.min_tiles && row.shared_bytes <= limits.shared_bytes) return row;
  }
  throw Error(OCTOLORA_INTERNAL, "no kernel for M = %d, N = %d", m, n);
}

// One launch for each output.
inline void launch(const Tuned* table, int count, const GemmArgs& args, const Limits& limits, cudaStream_t stream) {
  GemmArgs one = args;
  one.member_count = 1;
  for (int i = 0; i < args.member_count; ++i) {
    const GemmMember& out = one.member[0] = args.member[i];
    const Tuned& row = choose(table, count, args.m, out.n, limits);
    const int64_t tiles = row.tiles(args.m, out.n);
    if (tiles > INT32_MAX) {
      throw Error(OCTOLORA_UNSUPPORTED, "M = %d, N = %d: %lld tiles in one launch, at most %d", args.m, out.n,
                  static_cast<long long>(tiles), INT32_MAX);
    }
    row.kernel<<<static_cast<unsigned>(tiles), row.threads, row.shared_bytes, stream>>>(one);
    OCTOLORA_CUDA(cudaGetLastError(), "gemm tile %dx%d: M = %d, N = %d, K = %d, up columns = %d", row.block_m,
                  row.block_n, args.m, out.n, args.k, out.adapters.up_columns);
  }
}

inline void describe(const char* name, const Tuned* table, int count, const GemmArgs& args, const Limits& limits,
                     Explanation& to) {
  for (int i = 0; i < args.member_count; ++i) {
    const GemmMember& out = args.member[i];
    const Tuned& row = choose(table, count, args.m, out.n, limits);
    const std::string up_to = row.max_m == INT_MAX ? "any M" : "M <= " + std::to_string(row.max_m);
    const std::string from = row.min_tiles ? " and at least " + std::to_string(row.min_tiles) + " tiles" : "";
    to.launch("%s, N = %d: tile %dx%d, %d threads, %d stages, %lld tiles; the first fit of %d: %s%s", name, out.n,
              row.block_m, row.block_n, row.threads, row.stages, static_cast<long long>(row.tiles(args.m, out.n)),
              count, up_to.c_str(), from.c_str());
  }
}

}  // namespace octolora::cuda::gemm
