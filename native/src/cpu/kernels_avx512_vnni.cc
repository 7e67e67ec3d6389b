// SPDX-License-Identifier: Apache-2.0
//
// AVX-512 with VNNI.  vpdpbusd: 16 lanes, each  int32 += u8·s8 + u8·s8 + u8·s8 + u8·s8, without saturation.
//
// The unsigned side is the weight, stored as w + 128, because the instruction takes its signed side from the broadcast
// of four codes and the codes then stay what they are. The excess, 128 * sum_k q[m,k], is one number a row, which the
// quantizer knows. A lane can pass 2^31 on the way (255 * 128 * 131071 > 2^31); it wraps modulo 2^32, and the true sum,
// at most 128 * 128 * 131071 < 2^31, comes back when the excess is taken off.
//
// The register tile is 8 rows x 48 channels: 24 accumulators, 3 weights, 1 broadcast of 32 registers. A step over four
// k is 24 multiplies and 11 loads, so two multiplies and two loads a cycle keep each other busy.
#include <immintrin.h>

#include "products.h"
#include "row_ops.h"

namespace octolora::cpu {
namespace {

constexpr int kRows = 8, kVectors = 3, kLanes = 16, kGroup = 4;
static_assert(kVectors * kLanes == kColumns, "a tile is as wide as a panel");
static_assert(kRows * kVectors + kVectors + 1 <= 32, "accumulators, weights and a broadcast stay in registers");

struct Vector {
  using Float = __m512;
  static constexpr int kLanes = 16, kRows = 8;
  static constexpr int vectors(int) { return kVectors; }
  static Float zero() { return _mm512_setzero_ps(); }
  static Float load(const float* p) { return _mm512_loadu_ps(p); }
  static Float load(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  static void store(float* p, Float v) { _mm512_storeu_ps(p, v); }
  static Float broadcast(float v) { return _mm512_set1_ps(v); }
  static Float multiply(Float a, Float b) { return _mm512_mul_ps(a, b); }
  static Float multiply_add(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
};

inline __m512i broadcast_codes(const int8_t* codes) {
  int32_t four;
  __builtin_memcpy(&four, codes, 4);
  return _mm512_set1_epi32(four);
}

// Few rows leave few accumulators; several sets of them, for steps that alternate, hide the latency of vpdpbusd.
constexpr int sets_of(int rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }

struct CodeTile {
  static constexpr int kRows = 8, kLanes = 16, kWeights = kLanes * kGroup;
  static constexpr int vectors(int) { return kVectors; }

  template <int Rows, int Vectors>
  static void run(const Product<uint8_t, int8_t, int32_t>& product) {
    constexpr int kSets = sets_of(Rows), kStep = Vectors * kWeights;
    __m512i sums[kSets][Rows][Vectors];
    const int8_t* row[Rows];
    const uint8_t* weights = product.weights;
    const int64_t k = product.k;
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) {
      row[i] = product.x + i * product.x_stride;
#pragma GCC unroll 8
      for (int j = 0; j < Vectors; ++j) {
        const int32_t* from = product.tile + i * product.tile_stride + j * kLanes;
        sums[0][i][j] = product.accumulate ? _mm512_loadu_si512(from) : _mm512_setzero_si512();
#pragma GCC unroll 8
        for (int s = 1; s < kSets; ++s) sums[s][i][j] = _mm512_setzero_si512();
      }
    }
    auto step = [&](int64_t p, const uint8_t* at, __m512i(&to)[Rows][Vectors]) __attribute__((always_inline)) {
      __m512i w[Vectors];
#pragma GCC unroll 8
      for (int j = 0; j < Vectors; ++j) {
        w[j] = _mm512_load_si512(at + j * kWeights);
        __builtin_prefetch(at + j * kWeights + kPrefetchBytes);
      }
#pragma GCC unroll 8
      for (int i = 0; i < Rows; ++i) {
        const __m512i four = broadcast_codes(row[i] + p);
#pragma GCC unroll 8
        for (int j = 0; j < Vectors; ++j) to[i][j] = _mm512_dpbusd_epi32(to[i][j], w[j], four);
      }
    };
    int64_t p = 0;
    for (; p + kSets * kGroup <= k; p += kSets * kGroup, weights += kSets * kStep) {
#pragma GCC unroll 8
      for (int s = 0; s < kSets; ++s) step(p + s * kGroup, weights + s * kStep, sums[s]);
    }
    for (; p < k; p += kGroup, weights += kStep) step(p, weights, sums[0]);
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < Vectors; ++j) {
#pragma GCC unroll 8
        for (int s = 1; s < kSets; ++s) sums[0][i][j] = _mm512_add_epi32(sums[0][i][j], sums[s][i][j]);
        _mm512_storeu_si512(product.tile + i * product.tile_stride + j * kLanes, sums[0][i][j]);
      }
    }
  }
};

void multiply_codes(int row_count, int vectors, const void* weights, const void* codes, int64_t code_stride, int64_t k,
                    int32_t* tile, int64_t tile_stride, bool accumulate) {
  run_tiles<CodeTile>(row_count, vectors,
                      Product<uint8_t, int8_t, int32_t>{static_cast<const uint8_t*>(weights), nullptr, vectors * kLanes,
                                                        static_cast<const int8_t*>(codes), code_stride, k, tile,
                                                        tile_stride, accumulate});
}

// The first count of 16 lanes, for the end of a row.
inline __mmask16 first_lanes(int64_t count) { return static_cast<__mmask16>(count >= 16 ? 0xffff : (1 << count) - 1); }

void widen(const void* x, Dtype type, int64_t count, float* out) {
  switch (type) {
    case Dtype::f32:
      __builtin_memcpy(out, x, static_cast<size_t>(count) * 4);
      break;
    case Dtype::f16:
      for (int64_t i = 0; i < count; i += 16) {
        const __mmask16 lanes = first_lanes(count - i);
        const __m256i halves = _mm256_maskz_loadu_epi16(lanes, static_cast<const char*>(x) + 2 * i);
        _mm512_mask_storeu_ps(out + i, lanes, _mm512_cvtph_ps(halves));
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
      for (int64_t i = 0; i < count; i += 16) {
        const __mmask16 lanes = first_lanes(count - i);
        const __m256i halves = _mm512_cvtps_ph(_mm512_maskz_loadu_ps(lanes, v + i), _MM_FROUND_TO_NEAREST_INT);
        _mm256_mask_storeu_epi16(static_cast<char*>(out) + 2 * i, lanes, halves);
      }
      break;
    case Dtype::bf16:
      narrow_bf16(v, count, out);
      break;
  }
}

void round_f16(float* v, int64_t count) {
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 lanes = first_lanes(count - i);
    const __m256i halves = _mm512_cvtps_ph(_mm512_maskz_loadu_ps(lanes, v + i), _MM_FROUND_TO_NEAREST_INT);
    _mm512_mask_storeu_ps(v + i, lanes, _mm512_cvtph_ps(halves));
  }
}

// code_of() of row_ops.h for 16 lanes: NaN to 0, both ends, then the conversion, which rounds to nearest even.
inline __m512i codes_of(__m512 product) {
  const __mmask16 numbers = _mm512_cmp_ps_mask(product, product, _CMP_ORD_Q);
  const __m512 low = _mm512_maskz_max_ps(numbers, product, _mm512_set1_ps(-128.f));
  return _mm512_cvtps_epi32(_mm512_min_ps(low, _mm512_set1_ps(127.f)));
}

int32_t quantize(const float* v, int64_t count, float factor, bool divide, int8_t* q) {
  const __m512 factors = _mm512_set1_ps(factor);
  __m512i sum = _mm512_setzero_si512();
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    const __m512 value = _mm512_loadu_ps(v + i);
    const __m512i codes = codes_of(divide ? _mm512_div_ps(value, factors) : _mm512_mul_ps(value, factors));
    sum = _mm512_add_epi32(sum, codes);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(q + i), _mm512_cvtepi32_epi8(codes));
  }
  int32_t lanes[16], total = quantize_any(v + i, count - i, factor, divide, q + i);
  _mm512_storeu_si512(lanes, sum);
  for (const int32_t lane : lanes) total += lane;
  return total;
}

}  // namespace

const Kernels kAvx512Vnni = {
    .name = "avx512-vnni",
    .rows = kRows,
    .lanes = kLanes,
    .group = kGroup,
    .code_bytes = sizeof(int8_t),
    .weight_flip = 0x80,
    .weight_shift = 128,
    .widen = widen,
    .narrow = narrow,
    .round_f16 = round_f16,
    .measure = measure,
    .flag_reached = flag_reached,
    .quantize = quantize,
    .store_codes = store_codes<int8_t>,
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
