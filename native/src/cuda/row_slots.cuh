// SPDX-License-Identifier: Apache-2.0
//
// Which slots some rows use, where each names the one that it uses.
#pragma once

#include "kernels.h"

namespace octolora::cuda {

// Bit i stands for the slots s with s % 64 == i: beyond 64 slots, one that is absent may be taken for present.
class SlotSet {
 public:
  // Rows first to end - 1, by one warp whose lanes all call.
  static __device__ __forceinline__ SlotSet of_rows(const int32_t* row_slot, int first, int end) {
    uint32_t low = 0, high = 0;
    for (int row = first + static_cast<int>(threadIdx.x) % 32; row < end; row += 32) {
      const int slot = row_slot[row];
      const uint32_t bit = slot < 0 ? 0u : 1u << slot % 32;
      if (slot % 64 < 32)
        low |= bit;
      else
        high |= bit;
    }
    SlotSet set;
    set.bits_ = static_cast<uint64_t>(__reduce_or_sync(~0u, high)) << 32 | __reduce_or_sync(~0u, low);
    return set;
  }

  __device__ __forceinline__ bool has(int slot) const { return bits_ >> slot % 64 & 1; }

 private:
  uint64_t bits_ = 0;
};

}  // namespace octolora::cuda
