// SPDX-License-Identifier: Apache-2.0
//
// The instructions of src/cuda/wgmma_narrow.cuh on the emulated machine.
#pragma once

#include "wgmma.cuh"

namespace octolora::cuda::ptx {

inline uint64_t evict_first() { return 0; }
inline void tensor_load_hinted(uint32_t to, const CUtensorMap* map, int x, int y, uint32_t barrier, uint64_t) {
  tensor_load(to, map, x, y, barrier);
}
inline void tensor_prefetch(const CUtensorMap* map, int x, int y) { Box(map, x, y); }
inline void bulk_prefetch(const void* from, uint32_t bytes) {
  if (reinterpret_cast<uintptr_t>(from) % 16 || bytes % 16)
    machine::fault("a prefetch of %u bytes from %p", bytes, from);
}
inline void named_arrive(int number, int threads) { machine::hardware_barrier(number, threads, false, true); }
inline uint4 load_cluster_16(uint32_t address, uint32_t rank) {
  return load_shared_as<uint4>(machine::peer_address(address, static_cast<int>(rank)));
}

inline uint32_t cluster_address(uint32_t address, int rank) { return machine::peer_address(address, rank); }
template <class T>
void send(uint32_t to, T value, uint32_t barrier) {
  machine::breathe();
  if (&machine::shared_block(to) != &machine::shared_block(barrier))
    machine::fault("a store and a barrier of two blocks");
  machine::barrier_at(barrier);
  machine::later([=] {
    std::memcpy(machine::shared_memory(to, sizeof value, sizeof value), &value, sizeof value);
    arrive_with_bytes(barrier, sizeof value);
  });
}
inline void store_async(uint32_t to, uint32_t value, uint32_t barrier) { send(to, value, barrier); }
inline void store_async(uint32_t to, const float* four, uint32_t barrier) {
  send(to, float4{four[0], four[1], four[2], four[3]}, barrier);
}
inline void store_async_cluster(uint32_t address, uint32_t barrier, uint32_t rank, uint32_t value) {
  send(machine::peer_address(address, static_cast<int>(rank)), value,
       machine::peer_address(barrier, static_cast<int>(rank)));
}
inline void cluster_arrive_relaxed() { machine::cluster_arrive(); }
inline void cluster_wait() { machine::cluster_wait(); }

template <int Registers>
void wgmma_bf16(float (&d)[Registers], const uint32_t* a, uint64_t b, bool accumulate) {
  machine::wgmma_issue(WgmmaType::bf16, Registers * 2, d, 0, a, b, accumulate);
}
template <int Registers>
void wgmma_f16(float (&d)[Registers], const uint32_t* a, uint64_t b, bool accumulate) {
  machine::wgmma_issue(WgmmaType::f16, Registers * 2, d, 0, a, b, accumulate);
}
inline void keep(uint32_t (&)[4][4]) {}

}  // namespace octolora::cuda::ptx
