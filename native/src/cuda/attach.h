// SPDX-License-Identifier: Apache-2.0
//
// What slots.cc tells the kernels of attach.cu.
#pragma once

#include "kernels.h"

namespace octolora::cuda {

// A factor where the device can read it: element (i, j) at i * stride + j.
struct FactorSource {
  const void* data = nullptr;
  Dtype type = Dtype::f32;
  int rows = 0, columns = 0;
  int64_t stride = 0;
};

// What is found out about a factor on the way. All zero between two adapters.
struct FactorStatistics {
  uint32_t largest;                  // magnitude bits
  uint32_t beyond_bf16, beyond_f16;  // fp32: some element is no number of that type
  uint32_t blocks;                   // A: that are done; B: that have measured
};

// An adapter and its place. b, bias and magnitude are what a forward reads, or the originals that it is composed from.
struct PackArgs {
  FactorSource a_source, b_source;          // A [rank,K], B [N,rank]
  const float* bias_source = nullptr;       // [N] or null
  const float* magnitude_source = nullptr;  // [N] or null
  int n = 0;
  int chunk_count = 0;  // the slot's, filled up with zeros beyond the rank
  int first_down = 0, first_up = 0, up_columns = 0;
  FactorStatistics* found = nullptr;  // [2]: A, B
  uint4* a = nullptr;
  uint16_t* b = nullptr;
  Chunk* chunks = nullptr;  // the slot's first
  float* scale = nullptr;   // the slot's, as all below
  int32_t* has_bias = nullptr;
  int32_t* has_magnitude = nullptr;  // null: slots without
  float* bias = nullptr;             // [N]
  float* magnitude = nullptr;        // [N]
  float new_scale = 0.f;
  unsigned first_block = 0, blocks = 0;  // of a launch
  bool split = false;
  bool low_parts = false;  // split: what the high parts leave is kept, else zero
};

// Adapters for different slots, as many as the arguments of a kernel hold.
constexpr int kMaxPack = 20;
struct PackBatch {
  int count = 0;
  PackArgs member[kMaxPack];
};
static_assert(sizeof(PackBatch) <= 4096);

struct ClearArgs {
  int n = 0, chunk_count = 0;
  int first_up = 0, up_columns = 0, columns = 0;  // of b
  uint16_t* b = nullptr;
  Chunk* chunks = nullptr;
  int32_t* has_bias = nullptr;
  int32_t* has_magnitude = nullptr;  // or null
};

// factor[i] = magnitude[i] / norm of row i of W + c B A, of one slot.
struct NormArgs {
  const int8_t* weight = nullptr;
  const float* weight_scale = nullptr;    // s_w [N]
  const uint16_t* block_scale = nullptr;  // d, or null: 1
  int n = 0, k = 0, k_pitch = 0;
  const uint4* a = nullptr;
  const uint16_t* b = nullptr;
  int up_columns = 0;
  const Chunk* chunks = nullptr;  // the slot's
  int chunk_count = 0;
  int split = 0;
  const float* scale = nullptr;
  const int32_t* has_magnitude = nullptr;
  const float* magnitude = nullptr;  // [N]
  float* factor = nullptr;           // [N]
};

// What a forward of slots with magnitudes reads, from the originals; the head of attach.cu has the formula.
struct ComposeArgs {
  int n = 0, slot_count = 0, chunk_count = 0, up_columns = 0;
  const Chunk* chunks = nullptr;
  const int32_t *has_bias = nullptr, *has_magnitude = nullptr;  // [slots]
  const float* factor = nullptr;                                // g [slots][N]
  const float* weight_scale = nullptr;                          // s_w [N]
  const uint16_t* given_b = nullptr;
  const float* given_bias = nullptr;  // [slots][N]
  float* scale = nullptr;             // [N]
  uint16_t* b = nullptr;
  float* bias = nullptr;
};

void launch_pack(const PackBatch& batch, const Limits& limits, cudaStream_t stream);
void launch_set_scale(float* scale, float value, cudaStream_t stream);
void launch_clear(const ClearArgs& args, cudaStream_t stream);
// w8a16: the weights lie in the order for widening.
void launch_row_norms(const NormArgs& args, bool w8a16, cudaStream_t stream);
void launch_compose(const ComposeArgs& args, cudaStream_t stream);

}  // namespace octolora::cuda
