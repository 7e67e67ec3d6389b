// SPDX-License-Identifier: Apache-2.0
//
// What of the low-rank update each tile of rows needs, where rows name their slots: so that a GEMM multiplies the ranks
// of the slots that are there, and tiles without any cost what they do without adapters.
#include "check.h"
#include "row_slots.cuh"

namespace octolora::cuda {
namespace {

constexpr int kWarps = 4;

// A warp has a tile of kSlotRows rows and one output.
__global__ __launch_bounds__(kWarps * 32) void find_needed_steps(const GemmArgs args) {
  const int tile = static_cast<int>(blockIdx.x) * kWarps + static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32, first = tile * kSlotRows;
  const GemmMember& out = args.member[blockIdx.y];
  if (first >= args.m || !out.needed_steps) return;
  const SlotSet slots = SlotSet::of_rows(args.row_slot, first, min(first + kSlotRows, args.m));
  const AdapterView& ad = out.adapters;
  const int steps = ad.up_columns / kChunkRank, words = needed_words(ad.up_columns);
  const int chunk_steps = steps / ad.chunk_count;
  for (int word = 0; word < words; ++word) {
    const int step = word * 32 + lane;
    bool needed = false;
    if (step < steps) {
      const Chunk& chunk = ad.chunks[step / chunk_steps];
      needed = chunk.ranks > 0 && slots.has(chunk.slot);
    }
    const uint32_t bits = __ballot_sync(~0u, needed);
    if (lane == 0) out.needed_steps[static_cast<int64_t>(tile) * words + word] = bits;
  }
}

}  // namespace

void launch_find_needed_steps(const GemmArgs& args, cudaStream_t stream) {
  const int tiles = (args.m + kSlotRows - 1) / kSlotRows;
  const dim3 grid(static_cast<unsigned>((tiles + kWarps - 1) / kWarps), static_cast<unsigned>(args.member_count));
  find_needed_steps<<<grid, kWarps * 32, 0, stream>>>(args);
  OCTOLORA_CUDA(cudaGetLastError(), "slots of rows: M = %d, %d outputs", args.m, args.member_count);
}

void describe_find_needed_steps(Explanation& to) {
  to.launch("find needed ranks: which slots each %d rows use", kSlotRows);
}

}  // namespace octolora::cuda
