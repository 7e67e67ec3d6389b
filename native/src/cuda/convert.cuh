// SPDX-License-Identifier: Apache-2.0
//
// Element conversions that the kernels share.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace octolora::cuda {

template <class T>
__device__ __forceinline__ float to_float(T value) {
  if constexpr (std::is_same_v<T, float>) return value;
  if constexpr (std::is_same_v<T, __half>) return __half2float(value);
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return __bfloat162float(value);
}

__device__ __forceinline__ float round_to_f16(float value) { return __half2float(__float2half_rn(value)); }

// The bits of a finite or infinite float without its sign order like the float; a NaN is above them all. So an integer
// maximum of these finds the absolute maximum and lets a NaN through.
__device__ __forceinline__ uint32_t magnitude_bits(float value) { return __float_as_uint(value) & 0x7fffffffu; }
constexpr uint32_t kInfinityBits = 0x7f800000u;

// 16-bit encoding of a float, fp16 or bf16.
__device__ __forceinline__ uint16_t encode16(float value, bool f16) {
  return f16 ? __half_as_ushort(__float2half_rn(value)) : __bfloat16_as_ushort(__float2bfloat16_rn(value));
}
__device__ __forceinline__ float decode16(uint16_t bits, bool f16) {
  return f16 ? __half2float(__ushort_as_half(bits)) : __bfloat162float(__ushort_as_bfloat16(bits));
}
// The low and the high of two packed 16-bit values.
__device__ __forceinline__ float2 decode16x2(uint32_t bits, bool f16) {
  if (f16) return __half22float2(*reinterpret_cast<const __half2*>(&bits));
  return {__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u)};
}

__device__ __forceinline__ uint32_t pack_f16x2(float low, float high) {
  const __half2 both = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&both);
}
__device__ __forceinline__ uint32_t pack_bf16x2(float low, float high) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&both);
}

// Piece `piece` of an fp32 value as a sum of bf16 numbers, 8 bits each: three pieces carry all 24.
__device__ __forceinline__ uint16_t bf16_piece(float value, int piece) {
#pragma unroll
  for (int i = 0; i < 2; ++i) value -= i < piece ? __bfloat162float(__float2bfloat16_rn(value)) : 0.f;
  return __bfloat16_as_ushort(__float2bfloat16_rn(value));
}

// Four int8, in the order that kernels.h gives for W8A16, to two registers of two 16-bit numbers, exactly. bf16: sign
// and magnitude bits go into the mantissas of 128 or 256 and of 128, whose difference is the value.
__device__ __forceinline__ void widen(uint32_t bytes, bool f16, uint32_t& low, uint32_t& high) {
  const uint32_t pair[2] = {__byte_perm(bytes, 0, 0x4140), __byte_perm(bytes, 0, 0x4342)};
  uint32_t out[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (f16) {
      // 1024 + (b ^ 0x80) as fp16, less 1152
      const uint32_t biased = (pair[i] ^ 0x00800080u) | 0x64006400u;
      const __half2 value = __hsub2(*reinterpret_cast<const __half2*>(&biased), __half2half2(__ushort_as_half(0x6480)));
      out[i] = *reinterpret_cast<const uint32_t*>(&value);
    } else {
      const uint32_t magnitude = (pair[i] & 0x007f007fu) | 0x43004300u, sign = (pair[i] & 0x00800080u) | 0x43004300u;
      const __nv_bfloat162 value = __hsub2(*reinterpret_cast<const __nv_bfloat162*>(&magnitude),
                                           *reinterpret_cast<const __nv_bfloat162*>(&sign));
      out[i] = *reinterpret_cast<const uint32_t*>(&value);
    }
  }
  low = out[0];
  high = out[1];
}

}  // namespace octolora::cuda
