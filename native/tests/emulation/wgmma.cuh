// SPDX-License-Identifier: Apache-2.0
//
// The instructions of src/cuda/wgmma.cuh on the emulated machine, with the demands of the hardware on addresses.
#pragma once

#include "ptx.cuh"

namespace octolora::cuda::ptx {

// ---- mbarrier ----

inline void barrier_init(uint32_t barrier, uint32_t arrivals) {
  machine::shared_memory(barrier, 8, 8);
  const int count = static_cast<int>(arrivals);
  machine::block().barriers[barrier] = {count, count, 0, 0};
}
inline void barrier_init_fence() {}
inline void arrive(uint32_t barrier) {
  machine::Barrier& b = machine::barrier_at(barrier);
  --b.pending;
  machine::settle(b);
}
inline void arrive_with_bytes(uint32_t barrier, uint32_t bytes) {
  machine::Barrier& b = machine::barrier_at(barrier);
  b.bytes -= bytes;
  machine::settle(b);
}
inline void barrier_expect_bytes(uint32_t barrier, uint32_t bytes) {
  machine::breathe();
  machine::barrier_at(barrier).bytes += bytes;
  arrive(barrier);
}
inline void barrier_arrive(uint32_t barrier) {
  machine::breathe();
  arrive(barrier);
}
inline void barrier_arrive_cluster(uint32_t barrier, uint32_t rank) {
  machine::breathe();
  const uint32_t remote = machine::peer_address(barrier, static_cast<int>(rank));
  uint32_t& arrivals = machine::current->arrivals;
  ++arrivals;
  machine::later([remote, &arrivals] {
    arrive(remote);
    --arrivals;
  });
}
inline void barrier_wait(uint32_t barrier, uint32_t parity) {
  if (parity > 1) machine::fault("parity %u", parity);
  machine::wait_while(&machine::barrier_at(barrier).phase, parity, "an mbarrier");
  machine::breathe();
}
inline void named_sync(int number, int threads) { machine::hardware_barrier(number, threads, true, true); }
inline bool named_sync_and(int number, int threads, bool own) {
  return machine::hardware_barrier(number, threads, true, own);
}

inline float2 load_shared_pair(uint32_t address) { return load_shared_as<float2>(address); }
inline uint4 load_shared_16(uint32_t address) { return load_shared_as<uint4>(address); }
inline uint2 load_shared_8(uint32_t address) { return load_shared_as<uint2>(address); }
inline void store_16(void* to, uint4 value) { *static_cast<uint4*>(to) = value; }
inline void store_shared(uint32_t address, float value) { store_shared_as(address, value); }
inline void store_shared(uint32_t address, uint2 value) { store_shared_as(address, value); }
inline void store_shared(uint32_t address, uint4 value) { store_shared_as(address, value); }

// ---- Tensor copies ----

struct Box {
  machine::TensorMap map;
  int x, y;

  Box(const CUtensorMap* of, int x_, int y_) : x(x_), y(y_) {
    std::memcpy(&map, of, sizeof map);
    if (map.magic != machine::TensorMap::kMagic) machine::fault("a tensor copy with a map that nobody made");
  }
  uint32_t bytes() const { return static_cast<uint32_t>(map.box_rows * map.box_bytes); }
  // In the tile, of 16 bytes of a row of the box.
  uint32_t place(uint32_t tile, int row, int sixteen) const {
    const uint32_t at = tile + static_cast<uint32_t>(row * map.box_bytes + sixteen * 16);
    const uint32_t swizzle = map.box_bytes == 128 ? at >> 7 & 7 : at >> 7 & 3;
    return at ^ swizzle << 4;
  }
  bool inside(int row, int column) const {
    return y + row >= 0 && y + row < map.rows && x + column >= 0 && x + column < map.width;
  }
  uint8_t* element(int row, int column) const { return map.matrix + (y + row) * map.pitch + x + column; }
  void check(uint32_t tile) const {
    if (tile % kPeerless % (map.box_bytes == 128 ? 1024 : 512)) machine::fault("a tile at shared address %u", tile);
  }
  static constexpr uint32_t kPeerless = machine::kPeer;
};

inline void bring(const Box& box, uint32_t to) {
  for (int row = 0; row < box.map.box_rows; ++row) {
    for (int i = 0; i < box.map.box_bytes / 16; ++i) {
      uint8_t values[16];
      for (int j = 0; j < 16; ++j) values[j] = box.inside(row, 16 * i + j) ? *box.element(row, 16 * i + j) : 0;
      std::memcpy(machine::shared_memory(box.place(to, row, i), 16, 16), values, 16);
    }
  }
}
inline void load_box(uint32_t to, const Box& box, uint32_t barrier) {
  box.check(to);
  machine::barrier_at(barrier);
  for (uint32_t at = 0; at < box.bytes(); at += 16) std::memset(machine::shared_memory(to + at, 16, 16), 0x5b, 16);
  machine::later([=] {
    bring(box, to);
    arrive_with_bytes(barrier, box.bytes());
  });
}
inline void prefetch_map(const CUtensorMap*) {}
inline void tensor_load(uint32_t to, const CUtensorMap* map, int x, int y, uint32_t barrier) {
  machine::breathe();
  load_box(machine::peer_address(to, machine::block().rank), Box(map, x, y),
           machine::peer_address(barrier, machine::block().rank));
}
inline void tensor_load_multicast(uint32_t to, const CUtensorMap* map, int x, int y, uint32_t barrier,
                                  uint16_t blocks) {
  machine::breathe();
  const Box box(map, x, y);
  for (int rank = 0; rank < 16; ++rank)
    if (blocks >> rank & 1) load_box(machine::peer_address(to, rank), box, machine::peer_address(barrier, rank));
}
inline void bulk_load(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  machine::breathe();
  if (to % 16 || reinterpret_cast<uintptr_t>(from) % 16 || bytes % 16)
    machine::fault("a copy of %u bytes from %p", bytes, from);
  const int rank = machine::block().rank;
  const uint32_t here = machine::peer_address(to, rank), on = machine::peer_address(barrier, rank);
  machine::barrier_at(on);
  std::memset(machine::shared_memory(here, bytes, 16), 0x5b, bytes);
  machine::later([=] {
    std::memcpy(machine::shared_memory(here, bytes, 16), from, bytes);
    arrive_with_bytes(on, bytes);
  });
}
inline void tensor_store(const CUtensorMap* map, int x, int y, uint32_t from) {
  machine::breathe();
  const Box box(map, x, y);
  box.check(from);
  const uint32_t here = machine::peer_address(from, machine::block().rank);
  auto& open = machine::current->open_stores;
  if (!open) open = std::make_shared<machine::StoreGroup>();
  ++open->unread;
  ++open->unwritten;
  machine::later([=, group = open] {
    std::vector<uint8_t> values(box.bytes());
    for (int row = 0; row < box.map.box_rows; ++row)
      for (int i = 0; i < box.map.box_bytes / 16; ++i)
        std::memcpy(&values[static_cast<size_t>(row * box.map.box_bytes + i * 16)],
                    machine::shared_memory(box.place(here, row, i), 16, 16), 16);
    for (int row = 0; row < box.map.box_rows; ++row)
      for (int i = 0; i < box.map.box_bytes; ++i)
        if (box.inside(row, i)) *box.element(row, i) = values[static_cast<size_t>(row * box.map.box_bytes + i)];
    --group->unread;
    --group->unwritten;
  });
}
inline void store_commit() {
  auto& open = machine::current->open_stores;
  machine::current->store_groups.push_back(open ? open : std::make_shared<machine::StoreGroup>());
  open.reset();
}
template <int Pending>
void store_wait_read() {
  machine::breathe();
  auto& groups = machine::current->store_groups;
  for (; groups.size() > Pending; groups.pop_front()) {
    const auto group = groups.front();
    while (group->unread) machine::wait_while(&group->unread, group->unread, "stores that read");
  }
}
template <int Pending>
void store_wait() {
  store_wait_read<Pending>();
}
inline void fence_async_shared() { machine::breathe(); }

template <int Count>
void store_matrices(uint32_t address, const uint32_t (&own)[Count], bool transposed) {
  struct Stored {
    uint32_t address, values[Count];
  } mine{address, {}};
  std::memcpy(mine.values, own, sizeof own);
  const auto shown = machine::show(mine, "stmatrix");
  // Lane 8 i + r writes row r of matrix i.
  const int lane = machine::current->lane(), matrix = lane / 8, row = lane % 8;
  if (matrix >= Count) return;
  uint16_t values[8];
  for (int column = 0; column < 8; ++column) {
    const int y = transposed ? column : row, x = transposed ? row : column;
    values[column] = static_cast<uint16_t>(shown[y * 4 + x / 2].values[matrix] >> x % 2 * 16);
  }
  std::memcpy(machine::shared_memory(address, 16, 16), values, 16);
}
inline void store_matrix_x4(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  store_matrices<4>(address, {a, b, c, d}, false);
}
inline void store_matrix_x4_transposed(uint32_t address, const uint32_t (&r)[4]) {
  store_matrices<4>(address, r, true);
}
inline void store_matrix_x2_transposed(uint32_t address, uint32_t a, uint32_t b) {
  store_matrices<2>(address, {a, b}, true);
}

template <int>
void registers_more() {
  machine::warp_sync("setmaxnreg");
}
template <int>
void registers_fewer() {
  machine::warp_sync("setmaxnreg");
}

// ---- wgmma ----

inline void wgmma_fence() {
  machine::breathe();
  machine::current->wgmma_fenced = true;
}
inline void wgmma_commit() { machine::current->wgmma_groups.push_back(machine::current->wgmma_issued); }
template <int Pending>
void wgmma_wait() {
  machine::wgmma_wait(Pending);
}
inline uint64_t wgmma_descriptor(uint32_t address) {
  return (static_cast<uint64_t>(1) << 62) | (static_cast<uint64_t>(1024 >> 4) << 32) |
         (static_cast<uint64_t>(1) << 16) | ((address & 0x3ffff) >> 4);
}

using WgmmaType = machine::Wgmma::Type;
template <int Registers>
void wgmma_s8(int32_t (&d)[Registers], uint64_t a, uint64_t b, bool accumulate) {
  machine::wgmma_issue(WgmmaType::s8, Registers * 2, d, a, nullptr, b, accumulate);
}
template <int Registers>
void wgmma_bf16(float (&d)[Registers], uint64_t a, uint64_t b, bool accumulate) {
  machine::wgmma_issue(WgmmaType::bf16, Registers * 2, d, a, nullptr, b, accumulate);
}
template <int Registers>
void wgmma_f16(float (&d)[Registers], uint64_t a, uint64_t b, bool accumulate) {
  machine::wgmma_issue(WgmmaType::f16, Registers * 2, d, a, nullptr, b, accumulate);
}

}  // namespace octolora::cuda::ptx
