// SPDX-License-Identifier: Apache-2.0
//
// What the kernels for few columns need beside wgmma.cuh: wgmma with up to 64 columns, with the accumulators, tiles and
// descriptors of wgmma.cuh; copies that pass through L2 without staying; stores into other blocks of the cluster.
//
// With A in registers a warp holds its 16 rows as mma m16n8k16 does (ptx.cuh); they must stay until the wgmma is done.
#pragma once

#include "wgmma.cuh"

namespace octolora::cuda::ptx {

__device__ __forceinline__ uint64_t evict_first() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;\n" : "=l"(policy));
  return policy;
}
__device__ __forceinline__ void tensor_load_hinted(uint32_t to, const CUtensorMap* map, int x, int y, uint32_t barrier,
                                                   uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, "
      "%3}], [%4], %5;\n" ::"r"(to),
      "l"(map), "r"(x), "r"(y), "r"(barrier), "l"(policy)
      : "memory");
}
// Brings a box into L2.
__device__ __forceinline__ void tensor_prefetch(const CUtensorMap* map, int x, int y) {
  asm volatile("cp.async.bulk.prefetch.tensor.2d.L2.global.tile [%0, {%1, %2}];\n" ::"l"(map), "r"(x), "r"(y)
               : "memory");
}
// Whole 16 bytes, from a multiple of 16.
__device__ __forceinline__ void bulk_prefetch(const void* from, uint32_t bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;\n" ::"l"(from), "r"(bytes) : "memory");
}
// Arrives at a hardware barrier for `threads` threads without waiting for it.
__device__ __forceinline__ void named_arrive(int number, int threads) {
  asm volatile("bar.arrive %0, %1;\n" ::"r"(number), "r"(threads) : "memory");
}
__device__ __forceinline__ uint4 load_cluster_16(uint32_t address, uint32_t rank) {
  uint32_t remote;
  uint4 v;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;\n" : "=r"(remote) : "r"(address), "r"(rank));
  asm volatile("ld.shared::cluster.v4.u32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(remote)
               : "memory");
  return v;
}

// To the same address in block `rank` of the cluster, completing four bytes on the barrier at the same address there.
// No fence: those of the cluster scope wait for all that the thread has under way in memory.
__device__ __forceinline__ void store_async_cluster(uint32_t address, uint32_t barrier, uint32_t rank, uint32_t value) {
  asm volatile(
      "{\n.reg .b32 to, on;\n"
      "mapa.shared::cluster.u32 to, %0, %2;\n"
      "mapa.shared::cluster.u32 on, %1, %2;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [to], %3, [on];\n}\n" ::"r"(address),
      "r"(barrier), "r"(rank), "r"(value)
      : "memory");
}
// An address that stands for the same place in block `rank`, and stores to such addresses that count as bytes at a
// barrier of the same block.
__device__ __forceinline__ uint32_t cluster_address(uint32_t address, int rank) {
  uint32_t remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;\n" : "=r"(remote) : "r"(address), "r"(rank));
  return remote;
}
__device__ __forceinline__ void store_async(uint32_t to, uint32_t value, uint32_t barrier) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];\n" ::"r"(to), "r"(value),
               "r"(barrier)
               : "memory");
}
__device__ __forceinline__ void store_async(uint32_t to, const float* four, uint32_t barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];\n" ::"r"(to),
      "f"(four[0]), "f"(four[1]), "f"(four[2]), "f"(four[3]), "r"(barrier)
      : "memory");
}
// The halves of a barrier of the cluster that says nothing about memory.
__device__ __forceinline__ void cluster_arrive_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\n" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;\n" ::: "memory"); }

#define OCTOLORA_D4(c, i) c(d[i]), c(d[i + 1]), c(d[i + 2]), c(d[i + 3])
#define OCTOLORA_D8(c, i) OCTOLORA_D4(c, i), OCTOLORA_D4(c, i + 4)
#define OCTOLORA_D16(c, i) OCTOLORA_D8(c, i), OCTOLORA_D8(c, i + 8)
#define OCTOLORA_D24(c, i) OCTOLORA_D16(c, i), OCTOLORA_D8(c, i + 16)
#define OCTOLORA_D32(c, i) OCTOLORA_D16(c, i), OCTOLORA_D16(c, i + 16)
#define OCTOLORA_N4 "%0, %1, %2, %3"
#define OCTOLORA_N8 OCTOLORA_N4 ", %4, %5, %6, %7"
#define OCTOLORA_N16 OCTOLORA_N8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define OCTOLORA_N24 OCTOLORA_N16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define OCTOLORA_N32 OCTOLORA_N24 ", %24, %25, %26, %27, %28, %29, %30, %31"

// d [64,N] += a [64,32] . b [N,32]^T, both in shared memory; with accumulate false, d = a . b^T.
#define OCTOLORA_NARROW_S8(n, registers, a_operand, b_operand, p_operand)                                     \
  __device__ __forceinline__ void wgmma_s8(int32_t(&d)[registers], uint64_t a, uint64_t b, bool accumulate) { \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #p_operand                                              \
                 ", 0;\n"                                                                                     \
                 "wgmma.mma_async.sync.aligned.m64n" #n "k32.s32.s8.s8 {" OCTOLORA_N##registers               \
                 "}, %" #a_operand ", %" #b_operand ", p;\n}\n"                                               \
                 : OCTOLORA_D##registers("+r", 0)                                                             \
                 : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));                                        \
  }
OCTOLORA_NARROW_S8(8, 4, 4, 5, 6)
OCTOLORA_NARROW_S8(16, 8, 8, 9, 10)
OCTOLORA_NARROW_S8(32, 16, 16, 17, 18)
OCTOLORA_NARROW_S8(64, 32, 32, 33, 34)

// d [64,N] += a [64,16] . b [N,16]^T, a in registers, b in shared memory.
#define OCTOLORA_NARROW_16(name, type, n, registers, a0, a1, a2, a3, b_operand, p_operand)                     \
  __device__ __forceinline__ void name(float(&d)[registers], const uint32_t* a, uint64_t b, bool accumulate) { \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #p_operand                                               \
                 ", 0;\n"                                                                                      \
                 "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" OCTOLORA_N##registers    \
                 "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #b_operand ", p, 1, 1, 0;\n}\n"              \
                 : OCTOLORA_D##registers("+f", 0)                                                              \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)));     \
  }
OCTOLORA_NARROW_16(wgmma_bf16, "bf16", 8, 4, 4, 5, 6, 7, 8, 9)
OCTOLORA_NARROW_16(wgmma_bf16, "bf16", 16, 8, 8, 9, 10, 11, 12, 13)
OCTOLORA_NARROW_16(wgmma_bf16, "bf16", 32, 16, 16, 17, 18, 19, 20, 21)
OCTOLORA_NARROW_16(wgmma_bf16, "bf16", 48, 24, 24, 25, 26, 27, 28, 29)
OCTOLORA_NARROW_16(wgmma_bf16, "bf16", 64, 32, 32, 33, 34, 35, 36, 37)
OCTOLORA_NARROW_16(wgmma_f16, "f16", 8, 4, 4, 5, 6, 7, 8, 9)
OCTOLORA_NARROW_16(wgmma_f16, "f16", 16, 8, 8, 9, 10, 11, 12, 13)
OCTOLORA_NARROW_16(wgmma_f16, "f16", 32, 16, 16, 17, 18, 19, 20, 21)
OCTOLORA_NARROW_16(wgmma_f16, "f16", 48, 24, 24, 25, 26, 27, 28, 29)
OCTOLORA_NARROW_16(wgmma_f16, "f16", 64, 32, 32, 33, 34, 35, 36, 37)

// The registers of an operand stay what they are until here.
__device__ __forceinline__ void keep(uint32_t (&a)[4][4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(a[i][0]), "+r"(a[i][1]), "+r"(a[i][2]), "+r"(a[i][3])::"memory");
}

#undef OCTOLORA_NARROW_16
#undef OCTOLORA_NARROW_S8
#undef OCTOLORA_N32
#undef OCTOLORA_N24
#undef OCTOLORA_N16
#undef OCTOLORA_N8
#undef OCTOLORA_N4
#undef OCTOLORA_D32
#undef OCTOLORA_D24
#undef OCTOLORA_D16
#undef OCTOLORA_D8
#undef OCTOLORA_D4

}  // namespace octolora::cuda::ptx
