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

// What of the adapters each tile of kSlotRows rows needs, so that a GEMM multiplies the ranks and adds the biases of
// the slots that are there, and tiles without any cost what they do without adapters. By warp `worker` of `workers`.
__device__ __forceinline__ void find_needed_steps(const PrepareArgs& args, int worker, int workers) {
  if (!args.row_slot) return;
  const int lane = static_cast<int>(threadIdx.x) % 32, tiles = (args.m + kSlotRows - 1) / kSlotRows;
  for (int item = worker; item < tiles * args.member_count; item += workers) {
    const PrepareMember& member = args.member[item / tiles];
    if (!member.needed_steps) continue;
    const int tile = item % tiles, first = tile * kSlotRows;
    const SlotSet slots = SlotSet::of_rows(args.row_slot, first, min(first + kSlotRows, args.m));
    const AdapterView& ad = member.adapters;
    const int steps = ad.up_columns / kChunkRank, words = needed_words(ad.up_columns);
    uint32_t* const to = member.needed_steps + static_cast<int64_t>(tile) * slot_words(ad.up_columns);
    const int chunk_steps = steps / ad.chunk_count;
    for (int word = 0; word < words; ++word) {
      const int step = word * 32 + lane;
      bool needed = false;
      if (step < steps) {
        const Chunk& chunk = ad.chunks[step / chunk_steps];
        needed = chunk.ranks > 0 && slots.has(chunk.slot);
      }
      const uint32_t bits = __ballot_sync(~0u, needed);
      if (lane == 0) to[word] = bits;
    }
    bool biased = false;
    for (int slot = lane; slot < ad.slot_count; slot += 32) biased |= ad.has_bias[slot] && slots.has(slot);
    biased = __any_sync(~0u, biased);
    if (lane == 0) to[words] = biased;
  }
}

}  // namespace octolora::cuda
