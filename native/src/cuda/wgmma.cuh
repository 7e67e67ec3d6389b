// SPDX-License-Identifier: Apache-2.0
//
// The PTX of sm_90a: mbarriers, the tensor copy engine, and wgmma on operands in shared memory.
//
// An operand tile has rows of 128 bytes (128 int8 or 64 16-bit values of K) in the copy engine's 128-byte swizzle, and
// starts at a multiple of 1024 bytes. wgmma reads 32 bytes of each row: k32 for int8, k16 for 16-bit.
//
// Accumulators of m64nNk*: thread l of warp w of the warpgroup holds rows 16w + l/4 and 16w + l/4 + 8; d[4j..4j+3] are
// columns 8j + 2(l%4), +1 of the first row, then of the second: the same for int32 and for float.
#pragma once

#include <cuda.h>

#include <cstdint>

// Kernels on wgmma have bodies on sm_90a alone. Where they have none, what only they use is no oversight.
#if !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#pragma nv_diag_suppress 177
#endif

namespace octolora::cuda::ptx {

// ---- mbarrier ----

__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
}
__device__ __forceinline__ void barrier_expect_bytes(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(barrier), "r"(bytes) : "memory");
}
// Arrives at the barrier at the same address in block `rank` of the cluster. No .cluster scope here or in barrier_wait:
// what the barriers guard is written and read by the copy engine and by wgmma, and the wider scope costs a memory fence
// and an L1 invalidation a block, more than the block's arithmetic.
__device__ __forceinline__ void barrier_arrive_cluster(uint32_t barrier, uint32_t rank) {
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}\n" ::"r"(barrier),
      "r"(rank)
      : "memory");
}
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(barrier) : "memory");
}
// A hardware barrier for `threads` threads of the block; number 0 is __syncthreads'.
__device__ __forceinline__ void named_sync(int number, int threads) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(number), "r"(threads) : "memory");
}
// The same, and whether all of them say so.
__device__ __forceinline__ bool named_sync_and(int number, int threads, bool own) {
  uint32_t all;
  asm volatile(
      "{\n.reg .pred own, all;\n"
      "setp.ne.u32 own, %1, 0;\n"
      "bar.red.and.pred all, %2, %3, own;\n"
      "selp.u32 %0, 1, 0, all;\n}\n"
      : "=r"(all)
      : "r"(static_cast<uint32_t>(own)), "r"(number), "r"(threads)
      : "memory");
  return all != 0;
}

// Volatile: a compiler that gathers such loads ahead of their uses runs out of registers beside the accumulators.
__device__ __forceinline__ float2 load_shared_pair(uint32_t address) {
  float2 value;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];\n" : "=f"(value.x), "=f"(value.y) : "r"(address) : "memory");
  return value;
}
__device__ __forceinline__ uint4 load_shared_16(uint32_t address) {
  uint4 value;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "r"(address)
               : "memory");
  return value;
}
// 16 bytes by one instruction. A store of a uint4 behind a condition has been seen to become four, of 4 bytes each.
__device__ __forceinline__ void store_16(void* to, uint4 value) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};\n" ::"l"(to), "r"(value.x), "r"(value.y), "r"(value.z),
               "r"(value.w)
               : "memory");
}
__device__ __forceinline__ void store_shared(uint32_t address, float value) {
  asm volatile("st.shared.f32 [%0], %1;\n" ::"r"(address), "f"(value) : "memory");
}
__device__ __forceinline__ uint2 load_shared_8(uint32_t address) {
  uint2 value;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];\n" : "=r"(value.x), "=r"(value.y) : "r"(address) : "memory");
  return value;
}
__device__ __forceinline__ void store_shared(uint32_t address, uint2 value) {
  asm volatile("st.shared.v2.u32 [%0], {%1, %2};\n" ::"r"(address), "r"(value.x), "r"(value.y) : "memory");
}
__device__ __forceinline__ void store_shared(uint32_t address, uint4 value) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};\n" ::"r"(address), "r"(value.x), "r"(value.y), "r"(value.z),
               "r"(value.w)
               : "memory");
}

// ---- Tensor copies; coordinates are {byte of the row, row} ----

__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];\n" ::"l"(map) : "memory");
}
__device__ __forceinline__ void tensor_load(uint32_t to, const CUtensorMap* map, int x, int y, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];\n" ::"r"(
          to),
      "l"(map), "r"(x), "r"(y), "r"(barrier)
      : "memory");
}
// To the same address in every block of `blocks`, completing on the barrier of each.
__device__ __forceinline__ void tensor_load_multicast(uint32_t to, const CUtensorMap* map, int x, int y,
                                                      uint32_t barrier, uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%2, "
      "%3}], [%4], "
      "%5;\n" ::"r"(to),
      "l"(map), "r"(x), "r"(y), "r"(barrier), "h"(blocks)
      : "memory");
}
// Whole 16 bytes, from a multiple of 16.
__device__ __forceinline__ void bulk_load(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];\n" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}
__device__ __forceinline__ void tensor_store(const CUtensorMap* map, int x, int y, uint32_t from) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];\n" ::"l"(map), "r"(x),
               "r"(y), "r"(from)
               : "memory");
}
__device__ __forceinline__ void store_commit() { asm volatile("cp.async.bulk.commit_group;\n" ::: "memory"); }
// Until at most Pending stores still read shared memory.
template <int Pending>
__device__ __forceinline__ void store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;\n" ::"n"(Pending) : "memory");
}
template <int Pending>
__device__ __forceinline__ void store_wait() {
  asm volatile("cp.async.bulk.wait_group %0;\n" ::"n"(Pending) : "memory");
}
// Orders ordinary writes of shared memory before the copy engine's reads.
__device__ __forceinline__ void fence_async_shared() { asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory"); }

__device__ __forceinline__ void store_matrix_x4(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(address), "r"(a), "r"(b),
               "r"(c), "r"(d)
               : "memory");
}
// The same with each 8 x 8 matrix transposed.
__device__ __forceinline__ void store_matrix_x4_transposed(uint32_t address, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(address), "r"(r[0]),
               "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}
__device__ __forceinline__ void store_matrix_x2_transposed(uint32_t address, uint32_t a, uint32_t b) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};\n" ::"r"(address), "r"(a), "r"(b)
               : "memory");
}

template <int Registers>
__device__ __forceinline__ void registers_more() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(Registers));
}
template <int Registers>
__device__ __forceinline__ void registers_fewer() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(Registers));
}

// ---- wgmma ----

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }
template <int Pending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(Pending) : "memory");
}

// Descriptor of a K-major tile in the 128-byte swizzle: address, 1024 bytes from one group of 8 rows to the next.
// Adding 2 moves it 32 bytes along K.
__device__ __forceinline__ uint64_t wgmma_descriptor(uint32_t address) {
  return (static_cast<uint64_t>(1) << 62) | (static_cast<uint64_t>(1024 >> 4) << 32) |
         (static_cast<uint64_t>(1) << 16) | ((address & 0x3ffff) >> 4);
}

#define OCTOLORA_TENS(a) \
  "%" #a "0, %" #a "1, %" #a "2, %" #a "3, %" #a "4, %" #a "5, %" #a "6, %" #a "7, %" #a "8, %" #a "9, "
#define OCTOLORA_R10 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, "
#define OCTOLORA_REGISTERS_16 OCTOLORA_R10 "%10, %11, %12, %13, %14, %15"
#define OCTOLORA_REGISTERS_32 OCTOLORA_R10 OCTOLORA_TENS(1) OCTOLORA_TENS(2) "%30, %31"
#define OCTOLORA_R60 OCTOLORA_R10 OCTOLORA_TENS(1) OCTOLORA_TENS(2) OCTOLORA_TENS(3) OCTOLORA_TENS(4) OCTOLORA_TENS(5)
#define OCTOLORA_REGISTERS_64 OCTOLORA_R60 "%60, %61, %62, %63"
#define OCTOLORA_REGISTERS_96 \
  OCTOLORA_R60 OCTOLORA_TENS(6) OCTOLORA_TENS(7) OCTOLORA_TENS(8) "%90, %91, %92, %93, %94, %95"
#define OCTOLORA_REGISTERS_112 \
  OCTOLORA_R60 OCTOLORA_TENS(6) OCTOLORA_TENS(7) OCTOLORA_TENS(8) OCTOLORA_TENS(9) OCTOLORA_TENS(10) "%110, %111"
#define OCTOLORA_REGISTERS_128                                                                       \
  OCTOLORA_R60 OCTOLORA_TENS(6) OCTOLORA_TENS(7) OCTOLORA_TENS(8) OCTOLORA_TENS(9) OCTOLORA_TENS(10) \
      OCTOLORA_TENS(11) "%120, %121, %122, %123, %124, %125, %126, %127"
#define OCTOLORA_O8(c, i) \
  c(d[i]), c(d[i + 1]), c(d[i + 2]), c(d[i + 3]), c(d[i + 4]), c(d[i + 5]), c(d[i + 6]), c(d[i + 7])
#define OCTOLORA_O32(c, i) OCTOLORA_O8(c, i), OCTOLORA_O8(c, i + 8), OCTOLORA_O8(c, i + 16), OCTOLORA_O8(c, i + 24)
#define OCTOLORA_OPERANDS_32(c) OCTOLORA_O32(c, 0)
#define OCTOLORA_OPERANDS_64(c) OCTOLORA_O32(c, 0), OCTOLORA_O32(c, 32)
#define OCTOLORA_OPERANDS_96(c) OCTOLORA_OPERANDS_64(c), OCTOLORA_O32(c, 64)
#define OCTOLORA_OPERANDS_16(c) OCTOLORA_O8(c, 0), OCTOLORA_O8(c, 8)
#define OCTOLORA_OPERANDS_112(c) OCTOLORA_OPERANDS_96(c), OCTOLORA_O8(c, 96), OCTOLORA_O8(c, 104)
#define OCTOLORA_OPERANDS_128(c) OCTOLORA_OPERANDS_96(c), OCTOLORA_O32(c, 96)

// d [64,N] += a [64,k] . b [N,k]^T; with accumulate false, d = a . b^T.
#define OCTOLORA_WGMMA(name, element, type, constraint, n, registers, a_operand, b_operand, p_operand, tail) \
  __device__ __forceinline__ void name(element(&d)[registers], uint64_t a, uint64_t b, bool accumulate) {    \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #p_operand                                             \
                 ", 0;\n"                                                                                    \
                 "wgmma.mma_async.sync.aligned.m64n" #n type " {" OCTOLORA_REGISTERS_##registers             \
                 "}, %" #a_operand ", %" #b_operand ", p" tail ";\n}\n"                                      \
                 : OCTOLORA_OPERANDS_##registers(constraint)                                                 \
                 : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));                                       \
  }
OCTOLORA_WGMMA(wgmma_s8, int32_t, "k32.s32.s8.s8", "+r", 128, 64, 64, 65, 66, "")
OCTOLORA_WGMMA(wgmma_s8, int32_t, "k32.s32.s8.s8", "+r", 192, 96, 96, 97, 98, "")
OCTOLORA_WGMMA(wgmma_s8, int32_t, "k32.s32.s8.s8", "+r", 224, 112, 112, 113, 114, "")
OCTOLORA_WGMMA(wgmma_s8, int32_t, "k32.s32.s8.s8", "+r", 256, 128, 128, 129, 130, "")
OCTOLORA_WGMMA(wgmma_bf16, float, "k16.f32.bf16.bf16", "+f", 32, 16, 16, 17, 18, ", 1, 1, 0, 0")
OCTOLORA_WGMMA(wgmma_f16, float, "k16.f32.f16.f16", "+f", 32, 16, 16, 17, 18, ", 1, 1, 0, 0")
OCTOLORA_WGMMA(wgmma_bf16, float, "k16.f32.bf16.bf16", "+f", 64, 32, 32, 33, 34, ", 1, 1, 0, 0")
OCTOLORA_WGMMA(wgmma_f16, float, "k16.f32.f16.f16", "+f", 64, 32, 32, 33, 34, ", 1, 1, 0, 0")

#undef OCTOLORA_WGMMA
#undef OCTOLORA_OPERANDS_128
#undef OCTOLORA_OPERANDS_112
#undef OCTOLORA_OPERANDS_96
#undef OCTOLORA_OPERANDS_64
#undef OCTOLORA_OPERANDS_32
#undef OCTOLORA_OPERANDS_16
#undef OCTOLORA_O32
#undef OCTOLORA_O8
#undef OCTOLORA_REGISTERS_128
#undef OCTOLORA_REGISTERS_112
#undef OCTOLORA_REGISTERS_96
#undef OCTOLORA_REGISTERS_64
#undef OCTOLORA_REGISTERS_32
#undef OCTOLORA_REGISTERS_16
#undef OCTOLORA_R60
#undef OCTOLORA_R10
#undef OCTOLORA_TENS

}  // namespace octolora::cuda::ptx
