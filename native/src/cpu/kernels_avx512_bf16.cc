// SPDX-License-Identifier: Apache-2.0
//
// AVX512-BF16 beside AVX-512.  vdpbf16ps: 16 lanes, each  fp32 += bf16·bf16 + bf16·bf16, products exact.
//
// An int8 is a bf16, so a bf16 x meets int8 weights at twice the rate of fp32. The instruction takes subnormal numbers
// for zero; see kLeastBf16.
#include <immintrin.h>

#include "products.h"

namespace octolora::cpu {
namespace {

constexpr int kLaneCount = 16;
// The bits of 2^-100 as a bf16. Products of an int8 and a bf16 of at least this are multiples of 2^-107, and so are
// their sums in fp32, which therefore never become subnormal.
constexpr uint16_t kLeastBf16 = 27 << 7;

// The weights of two values of k, side by side in each lane: the upper half of a float is the bf16, and the lower half
// of a float that holds an int8 is zero.
inline __m512bh weight_pairs(const int8_t* even, const int8_t* odd) {
  const auto widened = [](const int8_t* p) __attribute__((always_inline)) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)));
  };
  return reinterpret_cast<__m512bh>(_mm512_or_si512(_mm512_srli_epi32(widened(even), 16), widened(odd)));
}

inline __m512bh broadcast_pair(const uint32_t* pair) {
  return reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int32_t>(*pair)));
}

// Product::k counts pairs. With scales, every sum of kScaleBlock products is multiplied by its own and added to the
// tile.
template <bool Scaled>
struct PairTile {
  static constexpr int kRows = 8, kLanes = kLaneCount, kWeights = kLaneCount;
  static constexpr int vectors(int) { return kColumns / kLaneCount; }

  template <int Rows, int Vectors>
  static void run(const Product<int8_t, uint32_t, float>& product) {
    constexpr int64_t kBlockPairs = kScaleBlock / 2;
    __m512 sums[Rows][Vectors];
    const uint32_t* row[Rows];
    const int8_t* weights = product.weights;
    const int64_t width = product.width, k = product.k;
    const auto tile = [&](int i, int j) { return product.tile + i * product.tile_stride + j * kLanes; };
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) {
      row[i] = product.x + i * product.x_stride;
#pragma GCC unroll 8
      for (int j = 0; j < Vectors; ++j) {
        sums[i][j] = product.accumulate && !Scaled ? _mm512_loadu_ps(tile(i, j)) : _mm512_setzero_ps();
        if (Scaled && !product.accumulate) _mm512_storeu_ps(tile(i, j), sums[i][j]);
      }
    }
    const float* scales = product.scales;
    for (int64_t p = 0; p < k;) {
      const int64_t end = Scaled && p + kBlockPairs < k ? p + kBlockPairs : k;
      for (; p < end; ++p, weights += 2 * width) {
        __m512bh w[Vectors];
        __builtin_prefetch(weights + kPrefetchBytes);
        __builtin_prefetch(weights + width + kPrefetchBytes);
#pragma GCC unroll 8
        for (int j = 0; j < Vectors; ++j) w[j] = weight_pairs(weights + j * kLanes, weights + width + j * kLanes);
#pragma GCC unroll 8
        for (int i = 0; i < Rows; ++i) {
          const __m512bh pair = broadcast_pair(row[i] + p);
#pragma GCC unroll 8
          for (int j = 0; j < Vectors; ++j) sums[i][j] = _mm512_dpbf16_ps(sums[i][j], w[j], pair);
        }
      }
      if constexpr (Scaled) {
#pragma GCC unroll 8
        for (int j = 0; j < Vectors; ++j) {
          const __m512 scale = _mm512_loadu_ps(scales + j * kLanes);
#pragma GCC unroll 8
          for (int i = 0; i < Rows; ++i) {
            _mm512_storeu_ps(tile(i, j), _mm512_fmadd_ps(scale, sums[i][j], _mm512_loadu_ps(tile(i, j))));
            sums[i][j] = _mm512_setzero_ps();
          }
        }
        scales += width;
      }
    }
    if constexpr (!Scaled) {
#pragma GCC unroll 8
      for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 8
        for (int j = 0; j < Vectors; ++j) _mm512_storeu_ps(tile(i, j), sums[i][j]);
      }
    }
  }
};

}  // namespace

bool fits_pairs_avx512_bf16(const void* x, int64_t count) {
  const char* bytes = static_cast<const char*>(x);
  uint16_t small = 0;
  for (int64_t i = 0; i < count; ++i) {
    uint16_t b;
    __builtin_memcpy(&b, bytes + 2 * i, 2);
    // 0 wraps around to the largest.
    small |= static_cast<uint16_t>(static_cast<uint16_t>((b & 0x7fffu) - 1u) < kLeastBf16 - 1u);
  }
  return small == 0;
}

void multiply_pairs_avx512_bf16(int row_count, int vectors, const int8_t* weights, const float* scales,
                                const uint32_t* x, int64_t x_stride, int64_t pairs, float* tile, int64_t tile_stride,
                                bool accumulate) {
  const Product<int8_t, uint32_t, float> product{weights, scales, vectors * kLaneCount, x,         x_stride,
                                                 pairs,   tile,   tile_stride,          accumulate};
  if (scales != nullptr) {
    run_tiles<PairTile<true>>(row_count, vectors, product);
  } else {
    run_tiles<PairTile<false>>(row_count, vectors, product);
  }
}

}  // namespace octolora::cpu
