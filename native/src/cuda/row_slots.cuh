// SPDX-License-Identifier: Apache-2.0
//
// What of the low-rank update some rows need: a tile whose rows use two of eight slots multiplies the ranks of two. A
// kernel asks once a tile, which is a few loads from L2, and every part of it that walks the ranks gets the same answer.
#pragma once

#include "kernels.h"

namespace octolora::cuda {

// Bit i stands for the slots s with s % 64 == i: beyond 64 slots, one that is absent may be taken for present.
class SlotSet {
 public:
  // Rows first to end - 1, by one warp whose lanes all call.
  static __device__ __forceinline__ SlotSet of_rows(const int32_t* row_slot, int first, int end) {
    SlotSet set;
    if (!row_slot) return set;  // every row uses every slot
    uint32_t low = 0, high = 0;
    for (int row = first + static_cast<int>(threadIdx.x) % 32; row < end; row += 32) {
      const int slot = row_slot[row];
      const uint32_t bit = slot < 0 ? 0u : 1u << slot % 32;
      if (slot % 64 < 32)
        low |= bit;
      else
        high |= bit;
    }
    set.bits_ = static_cast<uint64_t>(__reduce_or_sync(~0u, high)) << 32 | __reduce_or_sync(~0u, low);
    return set;
  }

  __device__ __forceinline__ bool has(int slot) const { return bits_ >> slot % 64 & 1; }
  __device__ __forceinline__ bool empty() const { return bits_ == 0; }

  // Whether columns step * 16 .. of b and h hold ranks of a slot in the set.
  __device__ __forceinline__ bool needs_step(const AdapterView& adapters, int step) const {
    const Chunk& chunk = adapters.chunks[step / (adapters.up_columns / adapters.chunk_count / 16)];
    return chunk.ranks > 0 && has(chunk.slot);
  }

 private:
  uint64_t bits_ = ~uint64_t{0};
};

}  // namespace octolora::cuda
