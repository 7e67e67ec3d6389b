// SPDX-License-Identifier: Apache-2.0
//
// The PTX that the kernels share, sm_80 and later, and the fragment layouts they rely on. This file and the three
// wgmma*.cuh have all the inline assembly there is; kernels call it by the names given here.
//
// Lane l of a warp is (g, t) = (l / 4, l % 4). One row of a shared tile is 128 bytes: 128 int8 of K, or 64 16-bit
// values.
//
//   mma m16n8k32 s8    A [16,32] 4 registers of 4 int8     a0 (g, 4t..)     a1 (g+8, 4t..)
//                                                          a2 (g, 16+4t..)  a3 (g+8, 16+4t..)
//                      B [32,8]  2 registers of 4 int8     b0 (k 4t.., n g) b1 (k 16+4t.., n g)
//   mma m16n8k16 16bit A [16,16] 4 registers of 2 values   a0 (g, 2t..)     a1 (g+8, 2t..)
//                                                          a2 (g, 8+2t..)   a3 (g+8, 8+2t..)
//                      B [16,8]  2 registers of 2 values   b0 (k 2t.., n g) b1 (k 8+2t.., n g)
//   mma m16n8k8 tf32   A [16,8]  4 registers               a0 (g, t)   a1 (g+8, t)   a2 (g, t+4)   a3 (g+8, t+4)
//                      B [8,8]   2 registers               b0 (k t, n g)    b1 (k t+4, n g)
//   C [16,8] of all three, int32 or float: c0 (g, 2t)  c1 (g, 2t+1)  c2 (g+8, 2t)  c3 (g+8, 2t+1)
//
// In bytes the int8 and the 16-bit operand fragments are the same: 16 bytes of 8 rows a matrix, four matrices a
// register set. So one ldmatrix serves the int8 blocks and the low-rank blocks, and C needs no shuffle between the two.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace octolora::cuda::ptx {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 16 bytes global to shared; with present false, 16 zero bytes and no read.
__device__ __forceinline__ void copy_async_16(uint32_t to, const void* from, bool present) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(to), "l"(from), "r"(present ? 16 : 0)
               : "memory");
}
// Brings 4 bytes and what lies beside them into L1. Nobody waits for them.
__device__ __forceinline__ void touch(const void* from) {
  [[maybe_unused]] uint32_t unused;
  asm volatile("ld.global.ca.u32 %0, [%1];\n" : "=r"(unused) : "l"(from));
}
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
template <int Pending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(Pending) : "memory");
}

// 4 bytes, here and not where the compiler would rather have them.
template <class T>
__device__ __forceinline__ T load_early(const T* from) {
  static_assert(sizeof(T) == 4);
  uint32_t bits;
  asm volatile("ld.global.b32 %0, [%1];\n" : "=r"(bits) : "l"(from) : "memory");
  return *reinterpret_cast<T*>(&bits);
}
// Memory that another kernel may still write may be asked for, since L2 is coherent.
__device__ __forceinline__ void prefetch_l2(const void* from) {
  asm volatile("prefetch.global.L2 [%0];\n" ::"l"(from));
}

__device__ __forceinline__ uint32_t load_shared(uint32_t address) {
  uint32_t value;
  asm volatile("ld.shared.u32 %0, [%1];\n" : "=r"(value) : "r"(address) : "memory");
  return value;
}

__device__ __forceinline__ uint16_t load_shared_u16(uint32_t address) {
  uint16_t value;
  asm volatile("ld.shared.u16 %0, [%1];\n" : "=h"(value) : "r"(address) : "memory");
  return value;
}

__device__ __forceinline__ void load_matrix_x4(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void mma_s8(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};\n"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Operands are floats of which the unit reads the upper 19 bits: bf16 and fp16 values pass exactly.
__device__ __forceinline__ void mma_tf32(float (&c)[4], const float (&a)[4], float b0, float b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])), "r"(__float_as_uint(a[3])),
        "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
}

// clamp(round to nearest even, -128, 127) in the low byte; 0 for NaN.
__device__ __forceinline__ uint32_t round_to_s8(float value) {
  int32_t r;
  asm("cvt.rni.sat.s8.f32 %0, %1;\n" : "=r"(r) : "f"(value));
  return static_cast<uint32_t>(r);
}

// 2^v and 1 / v to about 22 bits; results that would be subnormal are 0.
__device__ __forceinline__ float exp2_approximate(float v) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(r) : "f"(v));
  return r;
}
__device__ __forceinline__ float reciprocal_approximate(float v) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;\n" : "=f"(r) : "f"(v));
  return r;
}
// a * b + c of two bf16 values each.
__device__ __forceinline__ uint32_t fma_bf16x2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t r;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
}

// The compiler has the value in a register here, and computes nothing from it before.
__device__ __forceinline__ void pin(float& value) { asm volatile("" : "+f"(value)); }
__device__ __forceinline__ void pin(uint32_t& value) { asm volatile("" : "+r"(value)); }
// The same for accumulators, and no access to memory is moved across.
template <int Count>
__device__ __forceinline__ void pin_all(float (&d)[Count]) {
#pragma unroll
  for (int i = 0; i < Count; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// threadIdx.x, read anew: the compiler does not know that it is the same each time.
__device__ __forceinline__ int thread_again() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;\n" : "=r"(thread));
  return thread;
}

__device__ __forceinline__ uint32_t pack_bytes(uint32_t b0, uint32_t b1, uint32_t b2, uint32_t b3) {
  return __byte_perm(__byte_perm(b0, b1, 0x0040), __byte_perm(b2, b3, 0x0040), 0x5410);
}

// Clusters exist from sm_90 on; below, a block is its own cluster of one.
__device__ __forceinline__ uint32_t cluster_rank() {
#if __CUDA_ARCH__ >= 900
  uint32_t r;
  asm volatile("mov.u32 %0, %%cluster_ctarank;\n" : "=r"(r));
  return r;
#else
  return 0;
#endif
}
__device__ __forceinline__ void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;\n" ::: "memory");
#else
  __syncthreads();
#endif
}
// The same, but nothing is ordered: a release would wait for all copies and stores under way.
__device__ __forceinline__ void cluster_meet() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;\n" ::: "memory");
}
// A 32-bit word at the same shared address in block `rank` of the cluster.
__device__ __forceinline__ uint32_t load_cluster_u32(uint32_t address, uint32_t rank) {
  uint32_t value;
#if __CUDA_ARCH__ >= 900
  uint32_t remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;\n" : "=r"(remote) : "r"(address), "r"(rank));
  asm volatile("ld.shared::cluster.u32 %0, [%1];\n" : "=r"(value) : "r"(remote) : "memory");
#else
  (void)rank;
  asm volatile("ld.shared.u32 %0, [%1];\n" : "=r"(value) : "r"(address) : "memory");
#endif
  return value;
}

// ---- Programmatic dependent launch, from sm_90 on (dependent_launch.cuh) ----

// Lets the next kernel start once every block has called this or is done.
__device__ __forceinline__ void launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_primaries() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}

}  // namespace octolora::cuda::ptx
