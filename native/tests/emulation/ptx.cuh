// SPDX-License-Identifier: Apache-2.0
//
// The instructions of src/cuda/ptx.cuh on the emulated machine.
#pragma once

namespace octolora::cuda::ptx {

namespace machine = ::emulation;

template <class T>
T load_shared_as(uint32_t address) {
  machine::breathe();
  T value;
  std::memcpy(&value, machine::shared_memory(address, sizeof value, sizeof value), sizeof value);
  return value;
}
template <class T>
void store_shared_as(uint32_t address, T value) {
  std::memcpy(machine::shared_memory(address, sizeof value, sizeof value), &value, sizeof value);
  machine::breathe();
}

inline uint32_t shared_address(const void* pointer) { return machine::shared_address(pointer); }

inline void finish(machine::CopyAsync& copy) {
  if (copy.done) return;
  copy.done = true;
  uint8_t* const to = machine::shared_memory(copy.to, 16, 16);
  if (copy.present)
    std::memcpy(to, copy.from, 16);
  else
    std::memset(to, 0, 16);
}
inline void copy_async_16(uint32_t to, const void* from, bool present) {
  auto& copies = machine::current->copies;
  if (reinterpret_cast<uintptr_t>(from) % 16) machine::fault("cp.async from %p", from);
  copies.push_back({to, from, present, machine::current->copy_group, false});
  std::memset(machine::shared_memory(to, 16, 16), 0xc5, 16);
  if (machine::random(2)) finish(copies.back());
  if (machine::random(4) == 0) finish(copies[machine::random(static_cast<uint32_t>(copies.size()))]);
}
inline void touch(const void*) {}
inline void copy_async_commit() { ++machine::current->copy_group; }
template <int Pending>
void copy_async_wait() {
  machine::breathe();
  auto& copies = machine::current->copies;
  const int last = machine::current->copy_group - Pending;
  size_t kept = 0;
  for (machine::CopyAsync& copy : copies) {
    if (copy.group < last)
      finish(copy);
    else
      copies[kept++] = copy;
  }
  copies.resize(kept);
}

template <class T>
T load_early(const T* from) {
  return *from;
}
inline void prefetch_l2(const void*) {}

inline uint32_t load_shared(uint32_t address) { return load_shared_as<uint32_t>(address); }
inline uint16_t load_shared_u16(uint32_t address) { return load_shared_as<uint16_t>(address); }

inline void load_matrix_x4(uint32_t (&r)[4], uint32_t address) {
  const auto addresses = machine::show(address, "ldmatrix");
  const int lane = machine::current->lane();
  for (int i = 0; i < 4; ++i)
    std::memcpy(&r[i], machine::shared_memory(addresses[8 * i + lane / 4], 16, 16) + lane % 4 * 4, 4);
}

struct Fragments {
  uint32_t a[4], b[2];
};
// c [16,8] += a [16,Depth] . b [Depth,8], of elements of `Bits` bits that `decode` turns into numbers.
template <int Depth, int Bits, class Sum, class Decode>
void mma(Sum (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Decode decode) {
  constexpr int kInWord = 32 / Bits, kHalf = Depth / 2;
  const auto all = machine::show(Fragments{{a[0], a[1], a[2], a[3]}, {b0, b1}}, "mma");
  const int g = machine::current->lane() / 4, t = machine::current->lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = g + i / 2 * 8, column = 2 * t + i % 2;
    Sum sum = 0;
    for (int k = 0; k < Depth; ++k) {
      const int holder = k % kHalf / kInWord, shift = k % kInWord * Bits;
      const uint32_t av = all[row % 8 * 4 + holder].a[row / 8 + k / kHalf * 2] >> shift;
      const uint32_t bv = all[column * 4 + holder].b[k / kHalf] >> shift;
      sum += decode(av) * decode(bv);
    }
    c[i] += sum;
  }
}
inline void mma_s8(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  mma<32, 8>(c, a, b0, b1, [](uint32_t v) { return static_cast<int32_t>(static_cast<int8_t>(v)); });
}
inline void mma_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  mma<16, 16>(c, a, b0, b1, [](uint32_t v) { return machine::widen16(v & 0xffff, machine::Wgmma::Type::f16); });
}
inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  mma<16, 16>(c, a, b0, b1, [](uint32_t v) { return machine::widen16(v & 0xffff, machine::Wgmma::Type::bf16); });
}
inline void mma_tf32(float (&c)[4], const float (&a)[4], float b0, float b1) {
  const uint32_t bits[4] = {__float_as_uint(a[0]), __float_as_uint(a[1]), __float_as_uint(a[2]), __float_as_uint(a[3])};
  mma<8, 32>(c, bits, __float_as_uint(b0), __float_as_uint(b1),
             [](uint32_t v) { return __uint_as_float(v & 0xffffe000u); });
}

inline uint32_t round_to_s8(float value) {
  if (value != value) return 0;
  return static_cast<uint32_t>(static_cast<int32_t>(std::min(127.f, std::max(-128.f, std::nearbyint(value)))));
}
inline float flush(float v) { return std::fabs(v) < FLT_MIN ? std::copysign(0.f, v) : v; }
inline float exp2_approximate(float v) { return flush(std::exp2(flush(v))); }
inline float reciprocal_approximate(float v) { return flush(1.f / flush(v)); }
inline uint32_t fma_bf16x2(uint32_t a, uint32_t b, uint32_t c) {
  return emulated_halves([&](int s) {
    const auto number = [&](uint32_t v) { return machine::widen16(v >> s & 0xffff, machine::Wgmma::Type::bf16); };
    return static_cast<uint32_t>(__bfloat16_as_ushort(__float2bfloat16_rn(std::fma(number(a), number(b), number(c)))));
  });
}
inline void pin(float&) {}
inline void pin(uint32_t&) {}
template <int Count>
void pin_all(float (&)[Count]) {}
inline int thread_again() { return static_cast<int>(threadIdx.x); }
inline uint32_t pack_bytes(uint32_t b0, uint32_t b1, uint32_t b2, uint32_t b3) {
  return (b0 & 0xff) | (b1 & 0xff) << 8 | (b2 & 0xff) << 16 | (b3 & 0xff) << 24;
}

inline uint32_t cluster_rank() { return static_cast<uint32_t>(machine::block().rank); }
inline void cluster_meet() {
  machine::cluster_arrive();
  machine::cluster_wait();
}
// The release has what the thread did to other blocks done; messages by st.async are not of the thread.
inline void cluster_sync() {
  uint32_t& arrivals = machine::current->arrivals;
  while (arrivals) machine::wait_while(&arrivals, arrivals, "its arrivals at other blocks");
  cluster_meet();
}
inline uint32_t load_cluster_u32(uint32_t address, uint32_t rank) {
  return load_shared_as<uint32_t>(machine::peer_address(address, static_cast<int>(rank)));
}

inline void launch_dependents() {
  machine::breathe();
  machine::Block& block = machine::block();
  if (!block.lets_dependents_start) ++block.grid->letting;
  block.lets_dependents_start = true;
}
inline void wait_for_primaries() {
  if (const auto& primary = machine::block().grid->primary)
    machine::wait_while(&primary->complete, 0, "the kernel before");
  machine::breathe();
}

}  // namespace octolora::cuda::ptx
