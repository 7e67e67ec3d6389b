// SPDX-License-Identifier: Apache-2.0
//
// Matrix products out of register tiles, for the files of kernels; see row_ops.h for why everything is internal to
// them.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace octolora::cpu {
namespace {

// tile[row_count, vectors] (+)= x[row_count, k] · weights[k, vectors]. weights has `width` columns, of which the
// product may take some.
template <class Weight, class X, class Sum>
struct Product {
  const Weight* weights;
  const float* scales;
  int64_t width;
  const X* x;
  int64_t x_stride, k;
  Sum* tile;
  int64_t tile_stride;
  bool accumulate;
};

// Cuts a product into register tiles. Tile names them: kRows of the largest, vectors(rows) that fit beside so many
// rows, kLanes columns and kWeights elements of weights a vector, and run<Rows, Vectors>(product).
template <class Tile, int Rows, int Vectors, class P>
void run_vectors(int vectors, P product) {
  for (; vectors >= Vectors; vectors -= Vectors) {
    Tile::template run<Rows, Vectors>(product);
    product.weights += Vectors * Tile::kWeights;
    if (product.scales != nullptr) product.scales += Vectors * Tile::kLanes;
    product.tile += Vectors * Tile::kLanes;
  }
  if constexpr (Vectors > 1) {
    if (vectors > 0) run_vectors<Tile, Rows, Vectors - 1>(vectors, product);
  }
}

template <class Tile, int Rows = Tile::kRows, class P>
void run_tiles(int row_count, int vectors, P product) {
  for (; row_count >= Rows; row_count -= Rows) {
    run_vectors<Tile, Rows, Tile::vectors(Rows)>(vectors, product);
    product.x += Rows * product.x_stride;
    product.tile += Rows * product.tile_stride;
  }
  if constexpr (Rows > 1) {
    if (row_count > 0) run_tiles<Tile, Rows - 1>(row_count, vectors, product);
  }
}

// The fp32 tile. V names the vector: Float, kLanes, zero(), load() of kLanes floats or int8, store(), broadcast(),
// multiply(), multiply_add(); and kRows and vectors() of the tile. scales: see Kernels::multiply_int8; an int8 times an
// fp16 has at most 19 bits, so the product is exact.
template <class V, bool Scaled>
struct FloatTile {
  static constexpr int kRows = V::kRows, kLanes = V::kLanes, kWeights = V::kLanes;
  static constexpr int vectors(int rows) { return V::vectors(rows); }

  template <int Rows, int Vectors, class Weight>
  static void run(const Product<Weight, float, float>& product) {
    typename V::Float sums[Rows][Vectors];
    const float* row[Rows];
    const Weight* weights = product.weights;
    const float* scales = product.scales;
    const int64_t width = product.width, k = product.k;
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) {
      row[i] = product.x + i * product.x_stride;
#pragma GCC unroll 8
      for (int j = 0; j < Vectors; ++j)
        sums[i][j] = product.accumulate ? V::load(product.tile + i * product.tile_stride + j * kLanes) : V::zero();
    }
    const auto multiply = [&](int64_t from, int64_t to) __attribute__((always_inline)) {
      for (int64_t p = from; p < to; ++p, weights += width) {
        typename V::Float w[Vectors];
#pragma GCC unroll 8
        for (int64_t at = 0; at < static_cast<int64_t>(Vectors * kLanes * sizeof(Weight)); at += 64)
          __builtin_prefetch(reinterpret_cast<const char*>(weights) + at + kPrefetchBytes);
#pragma GCC unroll 8
        for (int j = 0; j < Vectors; ++j) {
          w[j] = V::load(weights + j * kLanes);
          if constexpr (Scaled) w[j] = V::multiply(w[j], V::load(scales + j * kLanes));
        }
#pragma GCC unroll 8
        for (int i = 0; i < Rows; ++i) {
          const typename V::Float value = V::broadcast(row[i][p]);
#pragma GCC unroll 8
          for (int j = 0; j < Vectors; ++j) sums[i][j] = V::multiply_add(value, w[j], sums[i][j]);
        }
      }
    };
    if constexpr (Scaled) {
      for (int64_t p = 0; p < k; p += kScaleBlock, scales += width)
        multiply(p, p + kScaleBlock < k ? p + kScaleBlock : k);
    } else {
      multiply(0, k);
    }
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < Vectors; ++j) V::store(product.tile + i * product.tile_stride + j * kLanes, sums[i][j]);
    }
  }
};

template <class V>
void multiply_float(int row_count, int vectors, const float* weights, const float* x, int64_t x_stride, int64_t k,
                    float* tile, int64_t tile_stride, bool accumulate) {
  run_tiles<FloatTile<V, false>>(row_count, vectors,
                                 Product<float, float, float>{weights, nullptr, vectors * V::kLanes, x, x_stride, k,
                                                              tile, tile_stride, accumulate});
}

template <class V>
void multiply_int8(int row_count, int vectors, const int8_t* weights, const float* scales, const float* x,
                   int64_t x_stride, int64_t k, float* tile, int64_t tile_stride, bool accumulate) {
  const Product<int8_t, float, float> product{weights, scales, vectors * V::kLanes, x,         x_stride,
                                              k,       tile,   tile_stride,         accumulate};
  if (scales != nullptr) {
    run_tiles<FloatTile<V, true>>(row_count, vectors, product);
  } else {
    run_tiles<FloatTile<V, false>>(row_count, vectors, product);
  }
}

}  // namespace
}  // namespace octolora::cpu
