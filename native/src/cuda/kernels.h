// SPDX-License-Identifier: Apache-2.0
//
// The layouts in device memory, and the launchers of the kernels that read and write them. Launchers enqueue on the
// current device and throw Error when the launch is refused.
//
//   weight   int8 [N][k_pitch], k_pitch = K up to a multiple of 16, zero filled. For W8A16 the 16 values of each
//            aligned group of K are stored as 0 1 8 9  2 3 10 11  4 5 12 13  6 7 14 15, so that four bytes widen to
//            the two registers of an mma operand.
//   d        block scales, fp16 [kScaleBlock columns of K][N up to a multiple of 8], zero filled
//   q        int8 [M][k_pitch], zero filled                                          (workspace)
//   rows     {s_x, p} [M], p a power of two, see prepare.cu                          (workspace)
//   h        16-bit [M][up_columns]: x.A^T of all slots, scaled                      (workspace)
//   b        16-bit [N][up_columns]: the up-projections beside each other
//   a        the down-projections as mma B fragments: [down_columns/8][ceil(K/32)][32 lanes][16 bytes]; lane (g, t)
//            holds of rank g the k offsets 2t, 2t+1, 8+2t, 9+2t, 16+2t, 17+2t, 24+2t, 25+2t
//   planes   x for W8A16 where it cannot be read in place: 16-bit [1 or 3][M][k_pitch] (workspace)
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "backend.h"

namespace octolora::cuda {

constexpr int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }
constexpr int64_t round_up64(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

constexpr int kChunkRank = 16;   // ranks that share one description, one k-step of an mma
constexpr int kScaleBlock = 32;  // values of K that share a block scale; longer blocks are stored as several
__host__ __device__ constexpr int block_scale_pitch(int n) { return (n + 7) / 8 * 8; }

// 16 ranks of a slot. Without OCTOLORA_LORA_SPLIT a chunk has 16 columns in a and in b/h, at the same index. With it,
// 32 in a (high, low) and 48 in b/h, so that (h_hi + h_lo)(b_hi + b_lo) becomes h_hi b_hi + h_lo b_hi + h_hi b_lo.
struct Chunk {
  int32_t down;      // first column in a
  int32_t up;        // first column in b and h
  int32_t slot;      // index into scale
  int32_t split;     // laid out for high and low parts
  int32_t ranks;     // filled ranks, 0 to 16; h is zero in the others
  int32_t exponent;  // stored A and B are 2^exponent times the true A.B product
  int32_t range;     // c * 2^range bounds the size of a term c * x * A_stored / 2^exponent for |x| < 1
  int16_t a_f16;     // element types: 1 fp16, 0 bf16
  int16_t b_f16;
};

struct AdapterView {
  const uint4* a = nullptr;
  const uint16_t* b = nullptr;
  const Chunk* chunks = nullptr;
  float* scale = nullptr;             // [slots]; the caller's kernels may write it
  const float* slot_bias = nullptr;   // [slots][N]
  const int32_t* has_bias = nullptr;  // [slots], whether the adapter in it has one
  int slot_count = 0;
  int chunk_count = 0;
  int down_columns = 0;
  int up_columns = 0;    // of b and h, multiple of 16
  int slot_columns = 0;  // of these, the most that one slot has
};

struct RowScale {
  float scale;  // s_x
  float power;  // p: h holds (x.A^T) c / p
};

struct OutlierView {
  uint32_t* partial = nullptr;  // [kOutlierRowChunks][words]
  uint32_t* flags = nullptr;    // [words], bit k % 32 of word k / 32
  int32_t* list = nullptr;      // outlier columns, ascending
  int32_t* count = nullptr;
  int words = 0;
  // The first outlier columns of x [M][kOutlierColumns] and of W, that of all outputs one below the other, as 16-bit
  // numbers, fp16 where x is and else bf16; zeros in the rest of the last kOutlierBlock. An fp32 column of x is three
  // whose sum it is, beside W's three times. Null: nobody reads them.
  uint16_t *x = nullptr, *weight = nullptr;
};
constexpr int kOutlierRowChunks = 128;  // bands of rows, enough blocks to fill a device
constexpr int kOutlierBlock = 64, kOutlierColumns = 4 * kOutlierBlock;
__host__ __device__ constexpr int outlier_pieces(Dtype x_type) { return x_type == Dtype::f32 ? 3 : 1; }

constexpr int kSlotRows = 128;  // rows that share the answer to which slots they need
// Words of bits for the steps of 16 columns of h, and with what else is said of a tile of rows.
__host__ __device__ constexpr int needed_words(int up_columns) { return (up_columns / kChunkRank + 31) / 32; }
__host__ __device__ constexpr int slot_words(int up_columns) { return needed_words(up_columns) + 1; }

constexpr int kMaxMembers = OCTOLORA_MAX_OUTPUTS;

// What one output of a forward needs beside the quantized x that all of them share.
struct PrepareMember {
  AdapterView adapters;
  uint16_t* h = nullptr;
  // total_bias[i] = bias[i] + the biases of all slots, scaled; null: not asked for.
  float* total_bias = nullptr;  // [N]
  const float* bias = nullptr;  // [N] or null
  int n = 0;
  const int8_t* weight = nullptr;
  // With row_slot: bit s % 32 of word [m / kSlotRows][s / 32] (slot_words of them a tile of rows) says whether the
  // tile's rows need columns 16 s .. of h and b, the last word whether one of their slots has a bias; null: not asked
  // for.
  uint32_t* needed_steps = nullptr;
};

struct PrepareArgs {
  const void* x = nullptr;  // [M,K]
  Dtype x_type = Dtype::bf16;
  int m = 0, k = 0, k_pitch = 0;
  LinearSpec spec;
  OutlierView outliers;        // flags null: no outlier columns
  int8_t* q = nullptr;         // W8A8
  uint16_t* planes = nullptr;  // W8A16, where x is not read in place
  RowScale* rows = nullptr;
  // [M]: the one slot that a row uses, h is zero in the columns of all others; null: a row uses every slot.
  const int32_t* row_slot = nullptr;
  int member_count = 0;
  PrepareMember member[kMaxMembers];
};

// One output: y = residual + gate * activation(what the head of gemm.cuh says).
struct GemmMember {
  const int8_t* weight = nullptr;
  int n = 0;
  const float* scale = nullptr;           // s_w [N]
  const uint16_t* block_scale = nullptr;  // d, or null: 1
  // [N] or null. With row_slot it is the linear's own, and a row adds scale * slot_bias of its slot where has_bias;
  // without, it has the biases of all slots in it.
  const float* bias = nullptr;
  AdapterView adapters;
  const uint16_t* h = nullptr;
  const uint32_t* needed_steps = nullptr;  // PrepareMember's; null: all are needed
  void* y = nullptr;
  Activation activation = Activation::none;
  const void* residual = nullptr;  // [M,N] of y's type, y itself or null
  const void* gate = nullptr;      // [N] of y's type, or null
};

struct GemmArgs {
  const void* x = nullptr;  // W8A8: q. W8A16: 16-bit x or its planes
  int64_t x_pitch = 0;      // elements
  int planes = 1;           // W8A16: planes of x, each multiplied by all of W
  bool x_f16 = false;       // W8A16: fp16, else bf16
  bool x_in_place = false;  // x is the caller's, nothing that prepare makes
  int m = 0, k = 0, k_pitch = 0;
  const RowScale* rows = nullptr;     // null: W8A16 without adapters, scale 1 and power 1
  const int32_t* row_slot = nullptr;  // [M] or null, see PrepareArgs
  // Outlier columns: list null, or the raw x [M,K] they are gathered from.
  OutlierView outliers;
  const void* raw_x = nullptr;
  Dtype raw_type = Dtype::bf16;
  Dtype y_type = Dtype::bf16;
  bool store_sums = false;  // y int32: the sums before any scale
  int member_count = 0;
  GemmMember member[kMaxMembers];
};

struct Limits {
  int capability;  // 90 for 9.0
  int multiprocessors;
  int shared_bytes;              // a block may have, opt-in
  int clusters[9] = {};          // clusters of 1 to 8 blocks of decode.cu that run at once
  int prepare_clusters[4] = {};  // of 1, 2, 4 and 8 blocks of prepare_sm90.cu
};

// prepare.cu
void set_up_prepare(Limits& limits);  // fills in the clusters
void launch_prepare(const PrepareArgs& args, const Limits& limits, cudaStream_t stream);
void describe_prepare(const PrepareArgs& args, const Limits& limits, Explanation& to);
// prepare_sm90.cu: 16-bit x with aligned rows on Hopper
void set_up_prepare_sm90(Limits& limits);
bool prepare_sm90_takes(const PrepareArgs& args, const Limits& limits);
void launch_prepare_sm90(const PrepareArgs& args, const Limits& limits, cudaStream_t stream);
void describe_prepare_sm90(const PrepareArgs& args, const Limits& limits, Explanation& to);
// outliers.cu
void set_up_find_outliers(const Limits& limits);
void launch_find_outliers(const PrepareArgs& args, const Limits& limits, cudaStream_t stream);
void describe_find_outliers(const PrepareArgs& args, const Limits& limits, Explanation& to);

// Kernels that multiply. A call goes to the first family of its list that takes it.
struct GemmFamily {
  const char* name;
  void (*set_up)(const Limits& limits);  // once a device
  // Why it does not take the call; null: it does.
  const char* (*refuses)(const GemmArgs& args, const Limits& limits);
  void (*launch)(const GemmArgs& args, const Limits& limits, cudaStream_t stream);
  // A line for each launch, with what decided.
  void (*describe)(const GemmArgs& args, const Limits& limits, Explanation& to);
};
extern const GemmFamily kGemmSm90;       // gemm_sm90.cu: W8A8 on Hopper
extern const GemmFamily kGemmW8a16Sm90;  // gemm_w8a16_sm90.cu: W8A16 on Hopper
extern const GemmFamily kGemmW8a8;       // gemm_w8a8.cu: everywhere
extern const GemmFamily kGemmW8a16;      // gemm_w8a16.cu: everywhere

inline bool has_block_scales(const GemmArgs& args) {
  for (int i = 0; i < args.member_count; ++i)
    if (args.member[i].block_scale) return true;
  return false;
}

// decode.cu: all of a forward with few rows on Hopper
constexpr int kDecodeRows = 64;
// Its q: for each 128 values of K [decode_tokens(M)][128], as the copy engine's 128-byte swizzle has it: the 16 bytes c
// of row r lie at c ^ r % 8. Rows from M on are whatever was there.
__host__ __device__ constexpr int decode_tokens(int m) { return m <= 8 ? 8 : m <= 16 ? 16 : m <= 32 ? 32 : 64; }
constexpr size_t decode_q_bytes(int m, int k) {
  return static_cast<size_t>(round_up(k, 128)) * decode_tokens(m < kDecodeRows ? m : kDecodeRows);
}
void launch_prepare_few(const PrepareArgs& args, cudaStream_t stream);
void describe_prepare_few(const PrepareArgs& args, Explanation& to);
void set_up_decode(Limits& limits);  // fills limits.clusters
const char* decode_refuses(const PrepareArgs& prepare, const GemmArgs& gemm, const Limits& limits);  // null: takes it
void launch_decode(const PrepareArgs& prepare, const GemmArgs& gemm, const Limits& limits, cudaStream_t stream);
void describe_decode(const PrepareArgs& prepare, const GemmArgs& gemm, const Limits& limits, Explanation& to);

// pack.cu
void launch_widen_order(int8_t* weight, int64_t groups, cudaStream_t stream);

}  // namespace octolora::cuda
