// SPDX-License-Identifier: Apache-2.0
//
// AVX2 with FMA and F16C.  vpmaddwd: 8 lanes, each  int32 = s16·s16 + s16·s16.
//
// Weights widen from int8 to int16 in registers, codes are stored as int16. A pair of products is at most
// 2 * 128 * 128 = 2^15, far inside an int32, so every step is exact; the byte instruction vpmaddubsw would saturate its
// 16-bit sums.
//
// The largest register tile is 6 rows x 16 channels: 12 accumulators, 2 weights, 1 broadcast, 1 product of 16
// registers. Fewer rows take more channels, so that there are accumulators enough to hide the latency of an addition.
#include <immintrin.h>

#include "products.h"
#include "row_ops.h"

namespace octolora::cpu {
namespace {

constexpr int kRows = 6, kLanes = 8, kGroup = 2;
constexpr int vectors_beside(int rows) { return rows <= 2 ? 6 : 12 / rows; }
static_assert(kColumns == 6 * kLanes, "the widest tile is as wide as a panel");

struct Vector {
  using Float = __m256;
  static constexpr int kLanes = 8, kRows = 6;
  static constexpr int vectors(int rows) { return vectors_beside(rows); }
  static Float zero() { return _mm256_setzero_ps(); }
  static Float load(const float* p) { return _mm256_loadu_ps(p); }
  static Float load(const int8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  static void store(float* p, Float v) { _mm256_storeu_ps(p, v); }
  static Float broadcast(float v) { return _mm256_set1_ps(v); }
  static Float multiply(Float a, Float b) { return _mm256_mul_ps(a, b); }
  static Float multiply_add(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
};

inline __m256i broadcast_codes(const int16_t* codes) {
  int32_t two;
  __builtin_memcpy(&two, codes, 4);
  return _mm256_set1_epi32(two);
}

inline __m256i* vector_at(int32_t* p) { return reinterpret_cast<__m256i*>(p); }

struct CodeTile {
  static constexpr int kRows = 6, kLanes = 8, kWeights = kLanes * kGroup;
  static constexpr int vectors(int rows) { return vectors_beside(rows); }

  template <int Rows, int Vectors>
  static void run(const Product<int8_t, int16_t, int32_t>& product) {
    __m256i sums[Rows][Vectors];
    const int16_t* row[Rows];
    const int8_t* weights = product.weights;
    const int64_t k = product.k, step = product.width * kGroup;
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) {
      row[i] = product.x + i * product.x_stride;
#pragma GCC unroll 8
      for (int j = 0; j < Vectors; ++j) {
        int32_t* from = product.tile + i * product.tile_stride + j * kLanes;
        sums[i][j] = product.accumulate ? _mm256_loadu_si256(vector_at(from)) : _mm256_setzero_si256();
      }
    }
    for (int64_t p = 0; p < k; p += kGroup, weights += step) {
      __m256i w[Vectors];
#pragma GCC unroll 8
      for (int j = 0; j < Vectors; ++j) {
        if (j % 4 == 0) __builtin_prefetch(weights + j * kWeights + kPrefetchBytes);
        w[j] = _mm256_cvtepi8_epi16(_mm_load_si128(reinterpret_cast<const __m128i*>(weights + j * kWeights)));
      }
#pragma GCC unroll 8
      for (int i = 0; i < Rows; ++i) {
        const __m256i two = broadcast_codes(row[i] + p);
#pragma GCC unroll 8
        for (int j = 0; j < Vectors; ++j) sums[i][j] = _mm256_add_epi32(sums[i][j], _mm256_madd_epi16(w[j], two));
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < Vectors; ++j)
        _mm256_storeu_si256(vector_at(product.tile + i * product.tile_stride + j * kLanes), sums[i][j]);
    }
  }
};

void multiply_codes(int row_count, int vectors, const void* weights, const void* codes, int64_t code_stride, int64_t k,
                    int32_t* tile, int64_t tile_stride, bool accumulate) {
  run_tiles<CodeTile>(row_count, vectors,
                      Product<int8_t, int16_t, int32_t>{static_cast<const int8_t*>(weights), nullptr, vectors * kLanes,
                                                        static_cast<const int16_t*>(codes), code_stride, k, tile,
                                                        tile_stride, accumulate});
}

void widen_f16(const char* x, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8)
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + 2 * i))));
  for (; i < count; ++i) {
    uint16_t half;
    __builtin_memcpy(&half, x + 2 * i, 2);
    out[i] = _cvtsh_ss(half);
  }
}

void narrow_f16(const float* v, int64_t count, char* out) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 2 * i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(v + i), _MM_FROUND_TO_NEAREST_INT));
  for (; i < count; ++i) {
    const uint16_t half = static_cast<uint16_t>(_cvtss_sh(v[i], _MM_FROUND_TO_NEAREST_INT));
    __builtin_memcpy(out + 2 * i, &half, 2);
  }
}

void widen(const void* x, Dtype type, int64_t count, float* out) {
  switch (type) {
    case Dtype::f32:
      __builtin_memcpy(out, x, static_cast<size_t>(count) * 4);
      break;
    case Dtype::f16:
      widen_f16(static_cast<const char*>(x), count, out);
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
      narrow_f16(v, count, static_cast<char*>(out));
      break;
    case Dtype::bf16:
      narrow_bf16(v, count, out);
      break;
  }
}

void round_f16(float* v, int64_t count) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8)
    _mm256_storeu_ps(v + i, _mm256_cvtph_ps(_mm256_cvtps_ph(_mm256_loadu_ps(v + i), _MM_FROUND_TO_NEAREST_INT)));
  for (; i < count; ++i) v[i] = _cvtsh_ss(_cvtss_sh(v[i], _MM_FROUND_TO_NEAREST_INT));
}

// code_of() of row_ops.h for 8 lanes: NaN to 0, both ends, then the conversion, which rounds to nearest even.
inline __m256i codes_of(__m256 product) {
  const __m256 number = _mm256_and_ps(product, _mm256_cmp_ps(product, product, _CMP_ORD_Q));
  const __m256 low = _mm256_max_ps(number, _mm256_set1_ps(-128.f));
  return _mm256_cvtps_epi32(_mm256_min_ps(low, _mm256_set1_ps(127.f)));
}

int32_t quantize(const float* v, int64_t count, float factor, bool divide, int8_t* q) {
  const __m256 factors = _mm256_set1_ps(factor);
  __m256i sum = _mm256_setzero_si256();
  int64_t i = 0;
  for (; i + 32 <= count; i += 32) {
    __m256i codes[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const __m256 value = _mm256_loadu_ps(v + i + 8 * j);
      codes[j] = codes_of(divide ? _mm256_div_ps(value, factors) : _mm256_mul_ps(value, factors));
      sum = _mm256_add_epi32(sum, codes[j]);
    }
    // The packs work on halves: groups of four codes come out as 0 2 4 6 1 3 5 7.
    const __m256i bytes =
        _mm256_packs_epi16(_mm256_packs_epi32(codes[0], codes[1]), _mm256_packs_epi32(codes[2], codes[3]));
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(q + i), _mm256_permutevar8x32_epi32(bytes, order));
  }
  int32_t lanes[8], total = quantize_any(v + i, count - i, factor, divide, q + i);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), sum);
  for (const int32_t lane : lanes) total += lane;
  return total;
}

}  // namespace

const Kernels kAvx2 = {
    .name = "avx2",
    .rows = kRows,
    .lanes = kLanes,
    .group = kGroup,
    .code_bytes = sizeof(int16_t),
    .weight_flip = 0,
    .weight_shift = 0,
    .widen = widen,
    .narrow = narrow,
    .round_f16 = round_f16,
    .measure = measure,
    .flag_reached = flag_reached,
    .quantize = quantize,
    .store_codes = store_codes<int16_t>,
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
