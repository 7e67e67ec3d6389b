// SPDX-License-Identifier: Apache-2.0
//
// Any processor, through the compiler's 4-lane vectors.
//
// The int8 product runs in fp32: a code times a weight is at most 2^14, and a sum of kExactTerms of them at most 2^24,
// up to where every integer is a float. So each piece of the sum is exact, in any order and with or without FMA, and
// the pieces add up in int32.
#include "products.h"
#include "row_ops.h"

namespace octolora::cpu {
namespace {

constexpr int kRows = 4, kLanes = 4;
constexpr int64_t kExactTerms = 1024;
constexpr int kExactRows = 64;
static_assert(kExactTerms * 128 * 128 <= 1 << 24, "every partial sum is an integer that a float holds");

struct Vector {
  typedef float Float __attribute__((vector_size(16)));
  typedef int8_t Bytes __attribute__((vector_size(4)));
  static constexpr int kLanes = 4, kRows = 4;
  static constexpr int vectors(int rows) { return rows == 1 ? 6 : rows == 2 ? 4 : 2; }
  static Float zero() { return Float{0, 0, 0, 0}; }
  static Float load(const float* p) {
    Float v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  }
  static Float load(const int8_t* p) {
    Bytes b;
    __builtin_memcpy(&b, p, sizeof b);
    return __builtin_convertvector(b, Float);
  }
  static void store(float* p, Float v) { __builtin_memcpy(p, &v, sizeof v); }
  static Float broadcast(float v) { return Float{v, v, v, v}; }
  static Float multiply(Float a, Float b) { return a * b; }
  static Float multiply_add(Float a, Float b, Float c) { return a * b + c; }
};

void multiply_codes(int row_count, int vectors, const void* weights, const void* codes, int64_t code_stride, int64_t k,
                    int32_t* tile, int64_t tile_stride, bool accumulate) {
  const int8_t* w = static_cast<const int8_t*>(weights);
  const float* q = static_cast<const float*>(codes);
  const int width = vectors * kLanes;
  for (int64_t first = 0; first < k; first += kExactTerms) {
    const int64_t terms = k - first < kExactTerms ? k - first : kExactTerms;
    const bool add = accumulate || first > 0;
    for (int row = 0; row < row_count; row += kExactRows) {
      const int rows = row_count - row < kExactRows ? row_count - row : kExactRows;
      float exact[kExactRows * kColumns];
      multiply_int8<Vector>(rows, vectors, w + first * width, nullptr, q + row * code_stride + first, code_stride,
                            terms, exact, width, false);
      for (int i = 0; i < rows; ++i) {
        for (int j = 0; j < width; ++j) {
          int32_t& sum = tile[(row + i) * tile_stride + j];
          sum = (add ? sum : 0) + static_cast<int32_t>(exact[i * width + j]);
        }
      }
    }
  }
}

// fp16 by its fields: sign, 5 bits of exponent (bias 15), 10 bits of fraction.
inline float f16_to_float(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16, exponent = (half >> 10) & 31u, fraction = half & 0x3ffu;
  if (exponent == 31) return float_of(sign | kInfinityBits | (fraction << 13) | (fraction != 0 ? 0x400000u : 0u));
  if (exponent != 0) return float_of(sign | ((exponent + 112u) << 23) | (fraction << 13));
  const float subnormal = static_cast<float>(fraction) * 0x1p-24f;
  return float_of(sign | bits_of(subnormal));
}

inline uint16_t float_to_f16(float v) {
  const uint32_t bits = bits_of(v), magnitude = bits & kMagnitude;
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  if (magnitude > kInfinityBits) return static_cast<uint16_t>(sign | 0x7e00u | ((magnitude >> 13) & 0x1ffu));
  // 65520 is halfway between the largest fp16 and the next power of two; the tie goes to the even side, infinity.
  if (magnitude >= bits_of(65520.f)) return static_cast<uint16_t>(sign | 0x7c00u);
  if (magnitude >= bits_of(0x1p-14f)) {
    const uint32_t rebiased = magnitude - (112u << 23);
    return static_cast<uint16_t>(sign | ((rebiased + 0xfffu + ((rebiased >> 13) & 1u)) >> 13));
  }
  // Subnormal: 0.5 has a unit of 2^-24 in its last place, as subnormal fp16 do, so the addition rounds to them.
  const float shifted = float_of(magnitude) + 0.5f;
  return static_cast<uint16_t>(sign | (bits_of(shifted) - bits_of(0.5f)));
}

void widen(const void* x, Dtype type, int64_t count, float* out) {
  switch (type) {
    case Dtype::f32:
      __builtin_memcpy(out, x, static_cast<size_t>(count) * 4);
      break;
    case Dtype::f16:
      for (int64_t i = 0; i < count; ++i) {
        uint16_t half;
        __builtin_memcpy(&half, static_cast<const char*>(x) + 2 * i, 2);
        out[i] = f16_to_float(half);
      }
      break;
    case Dtype::bf16:
      widen_bf16(x, count, out);
      break;
  }
}

void narrow(const float* v, int64_t count, Dtype type, void* out) {
  switch (type) {
    case Dtype::f32:
      __builtin_memcpy(out, v, static_cast<size_t>(count) * 4);
      break;
    case Dtype::f16:
      for (int64_t i = 0; i < count; ++i) {
        const uint16_t half = float_to_f16(v[i]);
        __builtin_memcpy(static_cast<char*>(out) + 2 * i, &half, 2);
      }
      break;
    case Dtype::bf16:
      narrow_bf16(v, count, out);
      break;
  }
}

void round_f16(float* v, int64_t count) {
  for (int64_t i = 0; i < count; ++i) v[i] = f16_to_float(float_to_f16(v[i]));
}

}  // namespace

const Kernels kPortable = {
    .name = "portable",
    .rows = kRows,
    .lanes = kLanes,
    .group = 1,
    .code_bytes = sizeof(float),
    .weight_flip = 0,
    .weight_shift = 0,
    .widen = widen,
    .narrow = narrow,
    .round_f16 = round_f16,
    .measure = measure,
    .flag_reached = flag_reached,
    .quantize = quantize_any,
    .store_codes = store_codes<float>,
    .multiply_codes = multiply_codes,
    .multiply_int8 = multiply_int8<Vector>,
    .fits_pairs = nullptr,
    .multiply_pairs = nullptr,
    .multiply_float = multiply_float<Vector>,
    .scale_sums = scale_sums,
    .multiply_by = multiply_by,
    .add_scaled = add_scaled,
    .activate = activate,
};

}  // namespace octolora::cpu
