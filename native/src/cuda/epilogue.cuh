// SPDX-License-Identifier: Apache-2.0
//
// What follows the product, in fp32 and before the one rounding:
//
//   y[m,n] = residual[m,n] + gate[n] * activation(v[m,n] + c * slot_bias[n])
//
// The last term only where rows name their slots and the row's has a bias; else `bias` has it already (kernels.h).
#pragma once

#include "convert.cuh"
#include "kernels.h"
#include "ptx.cuh"

namespace octolora::cuda {

// v / (1 + 2^u), by the two approximations of the hardware: 2^u within 2^-22, 1 / z within 2^-23. Where 2^u overflows
// or the reciprocal would be subnormal the result is 0.
__device__ __forceinline__ float over_one_plus_exp2(float v, float u) {
  return v * ptx::reciprocal_approximate(1.f + ptx::exp2_approximate(u));
}

// GELU by tanh is written with 1 + tanh(u) = 2 / (1 + exp(-2u)), which loses nothing where tanh(u) is near -1.
__device__ __forceinline__ float activate(float v, Activation activation) {
  constexpr float kLog2e = 1.4426950408889634f;
  switch (activation) {
    case Activation::gelu_tanh: {
      constexpr float kLinear = -1.5957691216057308f * kLog2e;  // -2 sqrt(2 / pi)
      constexpr float kCubic = kLinear * 0.044715f;
      return over_one_plus_exp2(v, v * fmaf(kCubic * v, v, kLinear));
    }
    case Activation::gelu_erf: {
      // u = v P(v^2) with (1 + erf(v / sqrt 2)) / 2 = 1 / (1 + 2^u), P fitted so that with its roundings the latter is
      // within 2^-24 for v^2 <= 32; beyond, both are within 2^-26 of 0 or 1.
      const float w = fminf(v * v, 32.f);
      float p = fmaf(-5.06721598e-9f, w, 3.81630514e-7f);
      p = fmaf(p, w, -1.14398235e-5f);
      p = fmaf(p, w, 1.59579882e-4f);
      p = fmaf(p, w, 9.40493774e-5f);
      p = fmaf(p, w, -0.104835123f);
      p = fmaf(p, w, -2.30220938f);
      return over_one_plus_exp2(v, v * p);
    }
    case Activation::silu:
      return over_one_plus_exp2(v, v * -kLog2e);
    case Activation::none:
      return v;
  }
  return v;
}

// Something is left to do between the sum of a product, its adapters and `bias`, and the rounding.
__host__ __device__ __forceinline__ bool has_epilogue(const GemmArgs& args, const GemmMember& out) {
  return out.activation != Activation::none || out.residual || out.gate || (args.row_slot && out.adapters.slot_count);
}

// Elements at, at + 1, ... of an array as floats: `count` of them, or all eight by 16-byte loads.
__device__ __forceinline__ void load_eight(float (&to)[8], const void* from, Dtype type, int64_t at, int count,
                                           bool vectors) {
  if (vectors && type != Dtype::f32) {
    const uint4 bits = *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(from) + at);
    const uint32_t word[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 both = decode16x2(word[i], type == Dtype::f16);
      to[2 * i] = both.x;
      to[2 * i + 1] = both.y;
    }
  } else if (vectors) {
    const float4* const four = reinterpret_cast<const float4*>(static_cast<const float*>(from) + at);
    const float4 low = four[0], high = four[1];
    to[0] = low.x, to[1] = low.y, to[2] = low.z, to[3] = low.w;
    to[4] = high.x, to[5] = high.y, to[6] = high.z, to[7] = high.w;
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      to[i] = 0.f;
      if (i < count) {
        to[i] = type == Dtype::f32 ? static_cast<const float*>(from)[at + i]
                                   : decode16(static_cast<const uint16_t*>(from)[at + i], type == Dtype::f16);
      }
    }
  }
}

__device__ __forceinline__ void store_eight(void* to, const float (&from)[8], Dtype type, int64_t at, int count,
                                            bool vectors) {
  if (vectors && type != Dtype::f32) {
    uint32_t word[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      word[i] = encode16(from[2 * i], type == Dtype::f16) |
                static_cast<uint32_t>(encode16(from[2 * i + 1], type == Dtype::f16)) << 16;
    }
    *reinterpret_cast<uint4*>(static_cast<uint16_t*>(to) + at) = {word[0], word[1], word[2], word[3]};
  } else if (vectors) {
    float4* const four = reinterpret_cast<float4*>(static_cast<float*>(to) + at);
    four[0] = {from[0], from[1], from[2], from[3]};
    four[1] = {from[4], from[5], from[6], from[7]};
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i >= count) break;
      if (type == Dtype::f32)
        static_cast<float*>(to)[at + i] = from[i];
      else
        static_cast<uint16_t*>(to)[at + i] = encode16(from[i], type == Dtype::f16);
    }
  }
}

// Columns n .. n + 7 of row m, as far as they exist. value [8]: 16-byte aligned.
__device__ __forceinline__ void finish_eight(const GemmArgs& args, const GemmMember& out, const float* value, int m,
                                             int n) {
  const Dtype type = args.y_type;
  const int count = min(8, out.n - n);
  const auto aligned = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; };
  // gate and residual are often slices of something larger.
  const bool vectors = out.n % 8 == 0 && aligned(out.y) && aligned(out.residual) && aligned(out.gate);
  const int64_t at = static_cast<int64_t>(m) * out.n + n;
  float v[8], other[8];
  load_eight(v, value, Dtype::f32, 0, 8, true);
  if (args.row_slot) {
    const AdapterView& ad = out.adapters;
    const int slot = args.row_slot[m];
    if (slot >= 0 && slot < ad.slot_count && ad.has_bias[slot]) {
      load_eight(other, ad.slot_bias, Dtype::f32, static_cast<int64_t>(slot) * out.n + n, count, false);
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] += ad.scale[slot] * other[i];
    }
  }
  const auto activate_all = [&](Activation activation) {
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = activate(v[i], activation);
  };
  if (out.activation == Activation::gelu_tanh) activate_all(Activation::gelu_tanh);
  if (out.activation == Activation::gelu_erf) activate_all(Activation::gelu_erf);
  if (out.activation == Activation::silu) activate_all(Activation::silu);
  if (out.gate) {
    load_eight(other, out.gate, type, n, count, vectors);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] *= other[i];
  }
  if (out.residual) {
    load_eight(other, out.residual, type, at, count, vectors);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] += other[i];
  }
  store_eight(out.y, v, type, at, count, vectors);
}

// The slot of a row if the adapter in it has a bias that the row adds, else -1.
__device__ __forceinline__ int slot_with_bias(const GemmArgs& args, const GemmMember& out, int m) {
  if (!args.row_slot || m >= args.m) return -1;
  const int slot = args.row_slot[m];
  return slot >= 0 && slot < out.adapters.slot_count && out.adapters.has_bias[slot] ? slot : -1;
}

// Accumulator fragments: value[4 j + i] is row m + 8 (i / 2), column n + 8 j + i % 2.
template <int Count>
__device__ __forceinline__ void add_slot_biases(const GemmArgs& args, const GemmMember& out, float (&value)[Count],
                                                int m, int n) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int slot = slot_with_bias(args, out, m + 8 * i);
    if (slot < 0) continue;
    const float scale = out.adapters.scale[slot];
    const float* const bias = out.adapters.slot_bias + static_cast<int64_t>(slot) * out.n + n;
#pragma unroll
    for (int j = 0; j < Count / 4; ++j) {
      if (n + 8 * j >= out.n) continue;
      value[4 * j + 2 * i] += scale * bias[8 * j];
      value[4 * j + 2 * i + 1] += scale * bias[8 * j + 1];
    }
  }
}

template <Activation kActivation, int Count>
__device__ __forceinline__ void activate_all(float (&value)[Count]) {
#pragma unroll
  for (int i = 0; i < Count; ++i) value[i] = activate(value[i], kActivation);
}

// Fragments as above, from column n on.
template <int Count>
__device__ __forceinline__ void multiply_gate(const GemmArgs& args, const GemmMember& out, float (&value)[Count],
                                              int n) {
#pragma unroll
  for (int j = 0; j < Count / 4; ++j) {
    const uint32_t bits =
        n + 8 * j < out.n ? __ldg(reinterpret_cast<const uint32_t*>(static_cast<const uint16_t*>(out.gate) + n + 8 * j))
                          : 0;
    const float2 factor = decode16x2(bits, args.y_type == Dtype::f16);
#pragma unroll
    for (int i = 0; i < 4; ++i) value[4 * j + i] *= i % 2 ? factor.y : factor.x;
  }
}

}  // namespace octolora::cuda
