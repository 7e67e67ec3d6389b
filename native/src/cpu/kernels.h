// SPDX-License-Identifier: Apache-2.0
//
// What one instruction set brings to the CPU backend: row operations and the register-blocked products, as a table of
// functions, chosen once a device.
//
// A product reads packed weights and row-major activations:
//
//   weights      panels of at most kColumns output channels; a panel of width w (a multiple of `lanes`) is
//                [k / group][w][group], so that one vector load brings `group` consecutive k of `lanes` channels
//   activations  [rows][stride], a 32-bit piece of a row is broadcast to all lanes
//   result       tile [rows][stride], added to or overwritten
//
// The int8 product sees codes in the form the instruction set multiplies (`code_bytes` each: int8, int16 or float) and
// weights whose bytes were XORed with `weight_flip`; its result is  sum_k q[m,k] * W[n,k] + weight_shift * sum_k q[m,k]
// modulo 2^32. The true sum fits an int32 for k <= OCTOLORA_MAX_K, so taking the second term off again, modulo 2^32,
// is exact whatever overflowed on the way.
#pragma once

#include <cstdint>

#include "../backend.h"

namespace octolora::cpu {

// Maxima of |v| as the bits of a float, which order like the magnitudes they stand for, NaNs above infinity.
struct Magnitudes {
  uint32_t below = 0;  // among those below a limit
  uint32_t all = 0;
};
constexpr uint32_t kNoLimit = 0x80000000u;
constexpr uint32_t kInfinityBits = 0x7f800000u;

struct Kernels {
  const char* name;
  int rows;              // of the largest register tile; a product of a multiple of them has no smaller ones
  int lanes;             // 32-bit numbers in a vector
  int group;             // consecutive k side by side in a panel of int8 weights for the int8 product
  int code_bytes;        // bytes of an activation code
  uint8_t weight_flip;   // 0x80 stores w + 128 in a byte
  int32_t weight_shift;  // what the flip added to each weight

  // out[i] = x[i] as fp32, exact.
  void (*widen)(const void* x, Dtype type, int64_t count, float* out);
  // out[i] = v[i] rounded to nearest even.
  void (*narrow)(const float* v, int64_t count, Dtype type, void* out);
  // v[i] rounded to fp16 and back.
  void (*round_f16)(float* v, int64_t count);

  // Takes |v[i]| into the maxima; a limit of kNoLimit lets all of them, NaNs too, count as below it.
  void (*measure)(const float* v, int64_t count, uint32_t limit, Magnitudes* magnitudes);
  // flags[i] = 1 where |v[i]| is at the bits `limit` or above and not a NaN. Several threads may flag at once.
  void (*flag_reached)(const float* v, int64_t count, uint32_t limit, uint8_t* flags);
  // q[i] = clamp(rne(v[i] * factor), -128, 127), or v[i] / factor if divide; 0 where that is a NaN. The operation is
  // one fp32 rounding. Returns the sum of q.
  int32_t (*quantize)(const float* v, int64_t count, float factor, bool divide, int8_t* q);
  void (*store_codes)(const int8_t* q, int64_t count, void* codes);

  // vectors = panel width / lanes, 1 to kColumns / lanes.
  // codes: code_stride in codes; k is the panel's, a multiple of group, codes past the layer's k are 0.
  void (*multiply_codes)(int row_count, int vectors, const void* weights, const void* codes, int64_t code_stride,
                         int64_t k, int32_t* tile, int64_t tile_stride, bool accumulate);
  // The same in fp32, every product and sum in the order of k: the bits do not depend on row_count or on how k is cut.
  // int8 weights are [k][w] and unflipped; scales null, or [k / kScaleBlock][w] that they are multiplied by, exactly.
  void (*multiply_int8)(int row_count, int vectors, const int8_t* weights, const float* scales, const float* x,
                        int64_t x_stride, int64_t k, float* tile, int64_t tile_stride, bool accumulate);
  // The same for a row of bf16 in pairs of neighbours in k, which fits_pairs says are not too small for it: x_stride
  // counts pairs, and weights have two rows for each. Sums of a block are multiplied by its scale. Both null where the
  // processor has no such product.
  bool (*fits_pairs)(const void* x, int64_t count);
  void (*multiply_pairs)(int row_count, int vectors, const int8_t* weights, const float* scales, const uint32_t* x,
                         int64_t x_stride, int64_t pairs, float* tile, int64_t tile_stride, bool accumulate);
  void (*multiply_float)(int row_count, int vectors, const float* weights, const float* x, int64_t x_stride, int64_t k,
                         float* tile, int64_t tile_stride, bool accumulate);

  // out[i] = float(sums[i] - correction) * factor, the difference modulo 2^32.
  void (*scale_sums)(const int32_t* sums, int64_t count, int32_t correction, float factor, float* out);
  // v[i] = v[i] * factors[i]
  void (*multiply_by)(float* v, const float* factors, int64_t count);
  // v[i] = v[i] + factor * addends[i], two roundings
  void (*add_scaled)(float* v, float factor, const float* addends, int64_t count);
  // v[i] = activation(v[i]), within a few roundings.
  void (*activate)(float* v, int64_t count, Activation activation);
};

constexpr int kScaleBlock = 32;  // values of k that share a block scale; longer blocks are stored as several
constexpr int kColumns = 48;     // output channels of a panel
// How far ahead of its use a line of streamed weights is asked for: what memory brings during its own latency.
constexpr int64_t kPrefetchBytes = 12288;

extern const Kernels kPortable;
#if defined(OCTOLORA_CPU_X86)
extern const Kernels kAvx2;
extern const Kernels kAvx512Vnni;
bool fits_pairs_avx512_bf16(const void* x, int64_t count);
void multiply_pairs_avx512_bf16(int row_count, int vectors, const int8_t* weights, const float* scales,
                                const uint32_t* x, int64_t x_stride, int64_t pairs, float* tile, int64_t tile_stride,
                                bool accumulate);
#endif

// The best that the processor has and OCTOLORA_CPU_ISA allows.
const Kernels& choose_kernels();

}  // namespace octolora::cpu
