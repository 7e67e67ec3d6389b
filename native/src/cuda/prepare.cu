// SPDX-License-Identifier: Apache-2.0
//
// Row quantization and down-projection: one pass over x makes everything that a GEMM needs beside the weights.
//
//   W8A8    a[m] = max_k |x[m,k]|   s_x[m] = a[m] / divisor   q[m,k] = rne(x[m,k] * (divisor / a[m]))
//   all     h[m,r] = c * (x . A^T)[m,r] / p[m]                 p[m] a power of two near a[m]
//           total_bias[n] = bias[n] + sum over the slots of c * slot_bias[n]
//           needed_steps, see kernels.h
//
//   x [M,K] bf16, fp16 or fp32   q int8 [M,k_pitch]   rows {s_x, p} [M]   h 16-bit [M,up_columns]
//
// This is the kernel for every type, alignment and architecture; prepare_sm90.cu takes what it can on Hopper.
//
// A cluster of blocks owns 16 rows and each of its blocks a slice of K, which stays in shared memory from the maximum
// over the quantization to the down-projection: x is read from memory once. The blocks exchange maxima and partial sums
// of x.A^T through distributed shared memory, in a fixed order, so the same input gives the same bits. Before sm_90
// there are no clusters, and where a slice does not fit, the block walks over several and reads x again for each step.
//
// The outputs of a forward share x, q and p; each has its own A, h and bias. Where a row names the slot that it uses, h
// is zero in the columns of the others; where no adapter applies to a row, p = 1.
//
// p keeps h in the range of fp16 whatever x and the adapter hold, at no cost in precision: it only moves exponents, and
// the GEMM multiplies it back in. x.A^T multiplies 16-bit by 16-bit exactly: in the common type where x and A share it,
// else in tf32, which holds both; fp32 x goes in as a sum of two tf32 numbers. Sums are fp32.
#include <algorithm>

#include "check.h"
#include "dependent_launch.cuh"
#include "prepare.cuh"
#include "row_slots.cuh"

namespace octolora::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kRows = 16;   // of x, a cluster's: one mma tile
constexpr int kGroup = 32;  // columns of a that are multiplied at a time; high and low parts of 16 ranks come together
constexpr int kColumns = kGroup / 8;
constexpr int kMaxCluster = 8;

struct Plan {
  int cluster;  // blocks that share kRows rows
  int slice;    // elements of K in a block's shared memory, a multiple of 32
  int passes;   // slices a block walks over; 1: x is read once
};

__host__ __device__ constexpr int tile_pitch(int slice, int element_bytes) {
  return slice * element_bytes + 16;
}  // shifts banks by row

struct Shared {
  float warps[kWarps / 2][kRows * kGroup];  // partial sums over the warps' k-steps
  float block[2][kRows * kGroup];  // the block's sums, read by the cluster; two, so that one sync a group is enough
  uint32_t below[kRows];           // magnitude bits: maximum that sets the scale
  uint32_t full[kRows];            // ... of all of the row
  PreparedRow rows[kRows];
};

template <class X, bool kPlain>
__global__ __launch_bounds__(kThreads, 2) void prepare(const __grid_constant__ PrepareArgs args, const Plan plan,
                                                       const bool vectors) {
  constexpr int kVector = 16 / sizeof(X);
  extern __shared__ __align__(128) uint8_t memory[];
  auto& shared = *reinterpret_cast<Shared*>(memory);
  uint8_t* const tile = memory + sizeof(Shared);
  const int pitch = tile_pitch(plan.slice, sizeof(X));
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int rank = static_cast<int>(ptx::cluster_rank());
  const int first_row = static_cast<int>(blockIdx.x) / plan.cluster * kRows;

  const auto slice_start = [&](int pass) { return (pass * plan.cluster + rank) * plan.slice; };

  // Slice `pass` of K into the tile, zeros where there is no x.
  const auto load_slice = [&](int pass) {
    const X* const x = static_cast<const X*>(args.x);
    const int start = slice_start(pass);
    __syncthreads();
    if (vectors) {
      const int row_vectors = plan.slice / kVector;
      for (int i = threadIdx.x; i < kRows * row_vectors; i += kThreads) {
        const int r = i / row_vectors, c = i % row_vectors * kVector;
        const bool present = first_row + r < args.m && start + c < args.k;
        const X* from = present ? x + static_cast<int64_t>(first_row + r) * args.k + start + c : x;
        ptx::copy_async_16(ptx::shared_address(tile + r * pitch + c * sizeof(X)), from, present);
      }
      ptx::copy_async_commit();
      ptx::copy_async_wait<0>();
    } else {
      for (int i = threadIdx.x; i < kRows * plan.slice; i += kThreads) {
        const int r = i / plan.slice, c = i % plan.slice;
        const bool present = first_row + r < args.m && start + c < args.k;
        reinterpret_cast<X*>(tile + r * pitch)[c] =
            present ? x[static_cast<int64_t>(first_row + r) * args.k + start + c] : X(0.f);
      }
    }
    __syncthreads();
  };

  const auto measure_slice = [&] {
    const float threshold = args.spec.outlier_threshold;
    const uint32_t limit = threshold > 0 ? __float_as_uint(threshold) : ~0u;
    for (int r = warp; r < kRows; r += kWarps) {
      uint32_t below = 0, full = 0;
      for (int c = lane * kVector; c < plan.slice; c += 32 * kVector) {
        const uint4 bits = *reinterpret_cast<const uint4*>(tile + r * pitch + c * sizeof(X));
        if constexpr (kPlain && sizeof(X) == 2) {
          // Two 16-bit magnitudes at a time; they order like the 32-bit ones.
          const uint32_t both = __vmaxu2(__vmaxu2(bits.x & 0x7fff7fffu, bits.y & 0x7fff7fffu),
                                         __vmaxu2(bits.z & 0x7fff7fffu, bits.w & 0x7fff7fffu));
          full = __vmaxu2(full, both);
          continue;
        }
        const X* values = reinterpret_cast<const X*>(&bits);
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          const uint32_t magnitude = magnitude_bits(measured<kPlain>(args.spec, to_float(values[i])));
          full = max(full, magnitude_bits(to_float(values[i])));
          if (magnitude < limit) below = max(below, magnitude);
        }
      }
      if constexpr (kPlain && sizeof(X) == 2) {
        const float2 both = decode16x2(full, std::is_same_v<X, __half>);
        full = below = max(magnitude_bits(both.x), magnitude_bits(both.y));
      }
      below = __reduce_max_sync(~0u, below);
      full = __reduce_max_sync(~0u, full);
      if (lane == 0) {
        shared.below[r] = max(shared.below[r], below);
        shared.full[r] = max(shared.full[r], full);
      }
    }
  };

  // Whether a slot is added to row r of the cluster's.
  const auto applies = [&](int slot, int r) {
    return !args.row_slot || (first_row + r < args.m && args.row_slot[first_row + r] == slot);
  };

  // The exponent that brings the largest adapter term of row r near the middle of fp16, where x is below 1; INT_MIN
  // where no adapter applies.
  const auto adapter_exponent = [&](int r) {
    int exponent = INT_MIN;
    for (int member = 0; member < args.member_count; ++member) {
      const AdapterView& ad = args.member[member].adapters;
      for (int i = 0; i < ad.chunk_count; ++i) {
        const Chunk& chunk = ad.chunks[i];
        const float scale = ad.scale[chunk.slot];
        if (applies(chunk.slot, r)) exponent = max(exponent, term_exponent(chunk, scale));
      }
    }
    return exponent;
  };

  const auto scale_rows = [&] {
    const int r = threadIdx.x;
    if (r >= kRows) return;
    uint32_t below = 0, full = 0;
    for (int i = 0; i < plan.cluster; ++i) {
      below = max(below, ptx::load_cluster_u32(ptx::shared_address(&shared.below[r]), i));
      full = max(full, ptx::load_cluster_u32(ptx::shared_address(&shared.full[r]), i));
    }
    shared.rows[r] = prepare_row(args.spec, below, full, adapter_exponent(r));
    if (rank == 0 && first_row + r < args.m && args.rows) args.rows[first_row + r] = shared.rows[r].out;
  };

  const auto quantize_slice = [&](int pass) {
    const int start = slice_start(pass);
    const int vectors_per_row = min(plan.slice, args.k_pitch - start) / 16;
    for (int i = threadIdx.x; i < kRows * vectors_per_row; i += kThreads) {
      const int r = i / vectors_per_row, c = i % vectors_per_row * 16;
      if (first_row + r >= args.m) break;
      uint4 bits[sizeof(X)];
#pragma unroll
      for (int j = 0; j < static_cast<int>(sizeof(X)); ++j) {
        bits[j] = reinterpret_cast<const uint4*>(tile + r * pitch + c * sizeof(X))[j];
      }
      const X* const values = reinterpret_cast<const X*>(bits);
      const float factor = shared.rows[r].factor;
      uint32_t codes[4];
      const auto encode = [&](auto&& four) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const X* const v = values + 4 * j;
          codes[j] = four(to_float(v[0]), to_float(v[1]), to_float(v[2]), to_float(v[3]));
        }
      };
      if (stays_in_range<kPlain>(args.spec, factor))
        encode([&](auto... v) { return quantize_in_range<kPlain>(args.spec, factor, v...); });
      else
        encode([&](auto... v) { return quantize<kPlain>(args.spec, factor, v...); });
      if (!kPlain && args.outliers.flags) {
        const uint32_t outliers = args.outliers.flags[(start + c) / 32] >> ((start + c) % 32);
#pragma unroll
        for (int j = 0; j < 16; ++j) {
          if (outliers >> j & 1) codes[j / 4] &= ~(0xffu << j % 4 * 8);
        }
      }
      *reinterpret_cast<uint4*>(args.q + static_cast<int64_t>(first_row + r) * args.k_pitch + start + c) = {
          codes[0], codes[1], codes[2], codes[3]};
    }
  };

  // W8A16 where the GEMM cannot read x in place: 16-bit values copied, fp32 as three bf16 planes.
  const auto copy_slice = [&](int pass) {
    const int start = slice_start(pass);
    for (int r = warp; r < kRows; r += kWarps) {
      if (first_row + r >= args.m) break;
      const X* from = reinterpret_cast<const X*>(tile + r * pitch);
      for (int c = lane; c < plan.slice && start + c < args.k_pitch; c += 32) {
        uint16_t* to = args.planes + static_cast<int64_t>(first_row + r) * args.k_pitch + start + c;
        if constexpr (sizeof(X) == 2) {
          *to = *reinterpret_cast<const uint16_t*>(&from[c]);
        } else {
          for (int piece = 0; piece < 3; ++piece) {
            to[static_cast<int64_t>(piece) * args.m * args.k_pitch] = bf16_piece(from[c], piece);
          }
        }
      }
    }
  };

  const int k_steps = (args.k + 31) / 32;
  // Columns of a that one chunk has.
  const auto columns_of_chunk = [](const AdapterView& ad) { return ad.down_columns / ad.chunk_count; };

  // The block's part of kGroup columns of a member's x.A^T, into shared.block[turn].
  const auto multiply_down = [&](const PrepareMember& member, int group, int turn) {
    const AdapterView& ad = member.adapters;
    const int chunk_columns = columns_of_chunk(ad);
    float sum[kColumns][4] = {};
    bool f16[kGroup / kChunkRank];
#pragma unroll
    for (int i = 0; i < kGroup / kChunkRank; ++i) {
      const int column = group * kGroup + i * kChunkRank;
      f16[i] = column < ad.down_columns && ad.chunks[column / chunk_columns].a_f16;
    }
    const bool both = group * kGroup + kChunkRank < ad.down_columns;  // a second half of the group exists
    for (int pass = 0; pass < plan.passes; ++pass) {
      if (plan.passes > 1) load_slice(pass);
      const int first_step = slice_start(pass) / 32, steps = min(plan.slice / 32, k_steps - first_step);
      const uint4* const a = ad.a + (static_cast<int64_t>(group) * kColumns * k_steps + first_step) * 32 + lane;
      const auto fetch = [&](uint4(&b)[kColumns], int step) {
#pragma unroll
        for (int n = 0; n < kColumns; ++n) {
          if (step < steps && (n < 2 || both)) b[n] = __ldg(a + (n * k_steps + step) * 32);
        }
      };
      uint4 b[kColumns], ahead[kColumns];
      fetch(ahead, warp);
      for (int step = warp; step < steps; step += kWarps) {
#pragma unroll
        for (int n = 0; n < kColumns; ++n) b[n] = ahead[n];
        fetch(ahead, step + kWarps);
        const auto multiply_half = [&](int half) {
          const uint8_t* const at = tile + (step * 32 + half * 16) * sizeof(X);
          if constexpr (sizeof(X) == 2) {
            constexpr bool x_f16 = std::is_same_v<X, __half>;
            uint32_t fragment[4];
            ptx::load_matrix_x4(fragment, ptx::shared_address(at + lane % 16 * pitch + lane / 16 * 16));
#pragma unroll
            for (int n = 0; n < kColumns; ++n) {
              if (n >= 2 && !both) continue;
              const uint32_t b0 = half ? b[n].z : b[n].x, b1 = half ? b[n].w : b[n].y;
              if (f16[n / 2] == x_f16) {
                if constexpr (x_f16)
                  ptx::mma_f16(sum[n], fragment, b0, b1);
                else
                  ptx::mma_bf16(sum[n], fragment, b0, b1);
              } else {
                float2 f[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) f[i] = decode16x2(fragment[i], x_f16);
                const float2 low = decode16x2(b0, f16[n / 2]), high = decode16x2(b1, f16[n / 2]);
                const float first[4] = {f[0].x, f[1].x, f[0].y, f[1].y}, second[4] = {f[2].x, f[3].x, f[2].y, f[3].y};
                ptx::mma_tf32(sum[n], first, low.x, low.y);
                ptx::mma_tf32(sum[n], second, high.x, high.y);
              }
            }
          } else {
            const int g = lane / 4, t = lane % 4;
            const auto pair = [&](int row, int offset) {
              return *reinterpret_cast<const float2*>(at + row * pitch + (2 * t + offset) * sizeof(float));
            };
            const auto upper = [](float v) { return __uint_as_float(__float_as_uint(v) & 0xffffe000u); };
            const auto multiply_eight = [&](int offset, auto&& operand) {
              const float2 f[2] = {pair(g, offset), pair(g + 8, offset)};
              const float value[4] = {f[0].x, f[1].x, f[0].y, f[1].y};
              float high[4], low[4];
#pragma unroll
              for (int i = 0; i < 4; ++i) {
                high[i] = upper(value[i]);
                low[i] = upper(value[i] - high[i]);
              }
#pragma unroll
              for (int n = 0; n < kColumns; ++n) {
                if (n >= 2 && !both) continue;
                const float2 rank = decode16x2(operand(n), f16[n / 2]);
                ptx::mma_tf32(sum[n], low, rank.x, rank.y);
                ptx::mma_tf32(sum[n], high, rank.x, rank.y);
              }
            };
            multiply_eight(0, [&](int n) { return half ? b[n].z : b[n].x; });
            multiply_eight(8, [&](int n) { return half ? b[n].w : b[n].y; });
          }
        };
#pragma unroll
        for (int half = 0; half < 2; ++half) multiply_half(half);
      }
    }
    // Over the warps: the upper half hands its sums to the lower half, and the block adds up four.
    const auto each_sum = [&](auto&& visit) {
      const int g = lane / 4, t = lane % 4;
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) visit(sum[n][i], (g + i / 2 * 8) * kGroup + n * 8 + 2 * t + i % 2);
      }
    };
    constexpr int kHalf = kWarps / 2;
    __syncthreads();
    if (warp >= kHalf) each_sum([&](float& value, int at) { shared.warps[warp - kHalf][at] = value; });
    __syncthreads();
    if (warp < kHalf) each_sum([&](float& value, int at) { shared.warps[warp][at] += value; });
    __syncthreads();
    float* const block = shared.block[turn];
    for (int i = threadIdx.x; i < kRows * kGroup; i += kThreads) {
      block[i] = (shared.warps[0][i] + shared.warps[1][i]) + (shared.warps[2][i] + shared.warps[3][i]);
    }
  };

  // The cluster's kGroup columns of x.A^T, summed, scaled and rounded to h.
  const auto store_down = [&](const PrepareMember& member, int group, int turn) {
    const AdapterView& ad = member.adapters;
    const int chunk_columns = columns_of_chunk(ad);
    const float* const block = shared.block[turn];
    const auto total = [&](int at) {
      float value = 0.f;
      for (int i = 0; i < plan.cluster; ++i) {
        value += __uint_as_float(ptx::load_cluster_u32(ptx::shared_address(&block[at]), i));
      }
      return value;
    };
    for (int i = threadIdx.x; i < kRows * kGroup; i += kThreads) {
      const int r = i / kGroup, column = i % kGroup;
      if (r % plan.cluster != rank || first_row + r >= args.m || group * kGroup + column >= ad.down_columns) continue;
      const Chunk chunk = ad.chunks[(group * kGroup + column) / chunk_columns];
      if (chunk.split && column >= kChunkRank) continue;  // the low parts join the high ones
      const int j = column % kChunkRank;
      uint16_t* const h = member.h + static_cast<int64_t>(first_row + r) * ad.up_columns + chunk.up + j;
      const bool present = j < chunk.ranks && applies(chunk.slot, r);
      float value = 0.f;
      if (present) {
        value = total(r * kGroup + column);
        if (chunk.split) value += total(r * kGroup + column + kChunkRank);
        value = scalbnf(value * ad.scale[chunk.slot], -chunk.exponent - shared.rows[r].power);
      }
      const uint16_t high = encode16(value, chunk.b_f16);
      h[0] = high;
      if (chunk.split) {
        h[kChunkRank] = encode16(present ? value - decode16(high, chunk.b_f16) : 0.f, chunk.b_f16);
        h[2 * kChunkRank] = high;
      }
    }
  };

  ptx::wait_for_primaries();
  ptx::launch_dependents();
  add_up_bias(args, static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x),
              static_cast<int>(gridDim.x) * kThreads);
  if (warp == 0) find_needed_steps(args, static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x));
  if (threadIdx.x < kRows) shared.below[threadIdx.x] = shared.full[threadIdx.x] = 0;
  for (int pass = 0; pass < plan.passes; ++pass) {
    load_slice(pass);
    measure_slice();
  }
  // The groups of all members, one after the other. The first is multiplied before the rows are scaled, so that both
  // wait for the cluster at once.
  int member = 0, group = 0, turn = 0;
  for (bool first = true;; first = false) {
    while (member < args.member_count && group * kGroup >= args.member[member].adapters.down_columns) {
      ++member;
      group = 0;
    }
    const bool present = member < args.member_count;
    if (present)
      multiply_down(args.member[member], group, turn);
    else if (!first)
      break;
    ptx::cluster_sync();
    if (first) {
      scale_rows();
      __syncthreads();
      if (args.q || args.planes) {
        for (int pass = 0; pass < plan.passes; ++pass) {
          if (plan.passes > 1) load_slice(pass);
          if (args.spec.mode == Mode::w8a16)
            copy_slice(pass);
          else
            quantize_slice(pass);
        }
      }
    }
    if (present) store_down(args.member[member], group, turn);
    ++group;
    turn ^= 1;
  }
  ptx::cluster_sync();  // a block's shared memory outlives the reads of its peers
}

template <class X>
int shared_bytes(int slice) {
  return static_cast<int>(sizeof(Shared)) + kRows * tile_pitch(slice, sizeof(X));
}

// The smallest cluster whose slices are short enough for several blocks on a multiprocessor and that fills the device.
// Where a slice does not fit at all, as many passes as it takes. Measured on an H200, M = 4608, rank 16 and 128, us:
//   K 3072    slice 3072  37   93     1536  34   82     768  47  129
//   K 12288   slice 3072 111  280     1536 116  295
//   K 4096    slice 4096  22   48     2048  21   45    1024  28   69     (M = 2048)
// 32 rows a cluster read A half as often but took 33 and 101 at best for K = 3072.
template <class X>
Plan plan_for(int m, int k, const Limits& limits) {
  constexpr int kShort = 4096 / sizeof(X);
  const int max_cluster = limits.capability >= 90 ? kMaxCluster : 1;
  for (int cluster = 1; cluster <= max_cluster; cluster *= 2) {
    const int slice = round_up((k + cluster - 1) / cluster, 32);
    const bool last = cluster == max_cluster || slice <= 256;
    const bool fills = (m + kRows - 1) / kRows * cluster >= limits.multiprocessors;
    if (shared_bytes<X>(slice) <= limits.shared_bytes && ((slice <= kShort && fills) || last))
      return {cluster, slice, 1};
  }
  const int slice = (limits.shared_bytes - shared_bytes<X>(0)) / kRows / static_cast<int>(sizeof(X)) / 32 * 32;
  return {max_cluster, slice, (k + max_cluster * slice - 1) / (max_cluster * slice)};
}

template <class X>
void launch(const PrepareArgs& args, const Limits& limits, cudaStream_t stream) {
  const Plan plan = plan_for<X>(args.m, args.k, limits);
  const bool vectors =
      reinterpret_cast<uintptr_t>(args.x) % 16 == 0 && static_cast<int64_t>(args.k) * sizeof(X) % 16 == 0;
  DependentLaunch launch(limits, dim3(static_cast<unsigned>((args.m + kRows - 1) / kRows * plan.cluster)), kThreads,
                         plan.cluster, shared_bytes<X>(plan.slice), stream);
  const auto kernel = is_plain(args.spec) ? prepare<X, true> : prepare<X, false>;
  OCTOLORA_CUDA(cudaLaunchKernelEx(&launch.config, kernel, args, plan, vectors), "prepare: M = %d, K = %d, %d outputs",
                args.m, args.k, args.member_count);
}

template <class X>
void describe(const PrepareArgs& args, const Limits& limits, Explanation& to) {
  const Plan plan = plan_for<X>(args.m, args.k, limits);
  int columns = 0;
  for (int i = 0; i < args.member_count; ++i) columns += args.member[i].adapters.down_columns;
  to.launch("prepare: %s%s%d ranks of x.A^T; 16 rows for a cluster of %d, %d of K in each block%s",
            args.q ? "quantizes x, " : "", args.planes ? "copies x, " : "", columns, plan.cluster, plan.slice,
            plan.passes > 1 ? " at a time, since more does not fit" : "");
}

template <class X>
void set_up(const Limits& limits) {
  for (const auto kernel : {prepare<X, false>, prepare<X, true>}) {
    OCTOLORA_CUDA(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                       cudaFuncAttributeMaxDynamicSharedMemorySize, limits.shared_bytes),
                  "prepare: %d bytes of shared memory", limits.shared_bytes);
  }
}

}  // namespace

void set_up_prepare(Limits& limits) {
  set_up<float>(limits);
  set_up<__half>(limits);
  set_up<__nv_bfloat16>(limits);
  set_up_prepare_sm90(limits);
}

void launch_prepare(const PrepareArgs& args, const Limits& limits, cudaStream_t stream) {
  if (prepare_sm90_takes(args, limits)) return launch_prepare_sm90(args, limits, stream);
  with_type(args.x_type, [&](auto x) { launch<decltype(x)>(args, limits, stream); });
}

void describe_prepare(const PrepareArgs& args, const Limits& limits, Explanation& to) {
  if (prepare_sm90_takes(args, limits)) return describe_prepare_sm90(args, limits, to);
  with_type(args.x_type, [&](auto x) { describe<decltype(x)>(args, limits, to); });
}

}  // namespace octolora::cuda
