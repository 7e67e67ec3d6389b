// SPDX-License-Identifier: Apache-2.0
//
// Rows of outlier columns as OutlierView lays them out: what a lane puts there, which has two neighbours of each row.
#pragma once

#include "convert.cuh"
#include "kernels.h"

namespace octolora::cuda {

// Elements 2 lane and 2 lane + 1 of a block of kOutlierBlock.
struct OutlierPair {
  int column[2];  // of x and W; -1: zero
  int piece;      // where they are such, the first's; the second has the next

  // Of `count` columns in `list`.
  __device__ __forceinline__ OutlierPair(const int32_t* list, int count, bool in_pieces, int block) {
    constexpr uint32_t kPieces = outlier_pieces(Dtype::f32);
    const uint32_t first = block * kOutlierBlock + 2 * (threadIdx.x % 32);
    piece = first % kPieces;
#pragma unroll
    for (uint32_t i = 0; i < 2; ++i) {
      const int at = static_cast<int>(in_pieces ? (first + i) / kPieces : first + i);
      column[i] = at < count ? list[at] : -1;
    }
  }
  template <class X>
  __device__ __forceinline__ uint32_t x(const X* row) const {
    return both([&](int i) {
      if constexpr (sizeof(X) == 4)
        return bf16_piece(row[column[i]], piece + i < 3 ? piece + i : 0);
      else
        return row[column[i]];
    });
  }
  // int8 is exact in both types.
  __device__ __forceinline__ uint32_t weight(const int8_t* row, bool f16) const {
    return both([&](int i) { return encode16(row[column[i]], f16); });
  }

 private:
  template <class At>
  __device__ __forceinline__ uint32_t both(const At& at) const {
    const uint32_t low = column[0] >= 0 ? at(0) : 0, high = column[1] >= 0 ? at(1) : 0;
    return low | high << 16;
  }
};

}  // namespace octolora::cuda
