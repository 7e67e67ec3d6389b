// SPDX-License-Identifier: Apache-2.0
//
// What the kernels for few rows share: what a row is quantized by, the adapters' powers of two, and the store of y from
// the fragments of a warp.
#pragma once

#include <cfloat>
#include <climits>

#include "convert.cuh"
#include "epilogue.cuh"
#include "kernels.h"
#include "ptx.cuh"

namespace octolora::cuda {

constexpr int kPowerLimit = 126;  // of log2 p: p and 1 / p are normal numbers

// The exponent of the largest adapter term of a row, where x is below 1; INT_MIN for none. Thread `thread` of `threads`
// sees some of the chunks.
__device__ __forceinline__ int largest_exponent(const PrepareArgs& args, int row, int thread, int threads) {
  int exponent = INT_MIN;
  const int slot = args.row_slot ? args.row_slot[row] : -1;
#pragma unroll 1
  for (int member = 0; member < args.member_count; ++member) {
    const AdapterView& ad = args.member[member].adapters;
#pragma unroll 1
    for (int i = thread; i < ad.chunk_count; i += threads) {
      const Chunk& chunk = ad.chunks[i];
      const float scale = ad.scale[chunk.slot];
      if (chunk.ranks && scale != 0 && (!args.row_slot || slot == chunk.slot))
        exponent = max(exponent, ilogbf(scale) + 1 + chunk.range);
    }
  }
  return exponent;
}

// log2 p of a row: brings its largest term near the middle of fp16.
__device__ __forceinline__ int power_of_row(int exponent, float largest) {
  if (exponent == INT_MIN) return 0;
  const uint32_t bits = magnitude_bits(largest);
  const int power = exponent + 1 + (bits && bits < kInfinityBits ? static_cast<int>(bits >> 23) - 127 : 0);
  return max(-kPowerLimit, min(kPowerLimit, power));
}

// Magnitudes order like integers, in 16 bits as in 32.
__device__ __forceinline__ uint32_t magnitudes(const uint4& v) {
  return __vmaxu2(__vmaxu2(v.x & 0x7fff7fffu, v.y & 0x7fff7fffu), __vmaxu2(v.z & 0x7fff7fffu, v.w & 0x7fff7fffu));
}

// What the row with this largest magnitude, in the bits of X, is quantized by.
struct RowQuantizer {
  float scale, factor;  // s_x; divisor / the largest
  bool in_range;        // |value * factor| stays below 127.5

  template <class X>
  static __device__ __forceinline__ RowQuantizer of(const LinearSpec& spec, uint32_t full) {
    const float largest = decode16(static_cast<uint16_t>(full), std::is_same_v<X, __half>);
    const float measured = spec.round_x_to_f16 ? round_to_f16(largest) : largest;  // rounding keeps the order
    RowQuantizer row{1.f, 0.f, false};
    if (spec.mode == Mode::dynamic) {
      row.scale = __fdiv_rn(measured, spec.x_divisor);
      row.factor = measured > 0 ? __fdiv_rn(spec.x_divisor, measured) : 0.f;
      if (magnitude_bits(largest) > kInfinityBits) row.scale = largest;  // NaN
      row.in_range = spec.x_divisor <= 127.f && row.factor <= FLT_MAX && !spec.round_x_to_f16;
    } else if (spec.mode == Mode::fixed) {
      row.scale = magnitude_bits(largest) < kInfinityBits ? spec.x_scale : __uint_as_float(0x7fc00000u);
    }
    return row;
  }
};

// Eight codes of eight values.
template <class X, class Code>
__device__ __forceinline__ uint2 encode_eight(const uint4& v, Code&& code) {
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
  uint32_t codes[8];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 both = decode16x2(words[i], std::is_same_v<X, __half>);
    codes[2 * i] = code(both.x);
    codes[2 * i + 1] = code(both.y);
  }
  return {ptx::pack_bytes(codes[0], codes[1], codes[2], codes[3]),
          ptx::pack_bytes(codes[4], codes[5], codes[6], codes[7])};
}
// Where the row is in range: 1.5 * 2^23 rounds to nearest even and leaves the code in the low byte.
template <class X>
__device__ __forceinline__ uint2 quantize_in_range(const RowQuantizer& row, const uint4& v) {
  return encode_eight<X>(
      v, [&](float value) { return __float_as_uint(__fadd_rn(__fmul_rn(value, row.factor), 12582912.f)); });
}
template <class X>
__device__ __forceinline__ uint2 quantize_any(const LinearSpec& spec, const RowQuantizer& row, const uint4& v) {
  return encode_eight<X>(v, [&](float value) {
    if (spec.round_x_to_f16) value = round_to_f16(value);
    return ptx::round_to_s8(spec.mode == Mode::dynamic ? __fmul_rn(value, row.factor) : __fdiv_rn(value, spec.x_scale));
  });
}

// 4x4 words across the four lanes of a quad: word j of lane t becomes word t of lane j.
[[maybe_unused]] __device__ __forceinline__ uint4 transpose_quad(uint4 v, int t) {
  const bool odd = t & 1, high = t & 2;
  const uint32_t s0 = __shfl_xor_sync(~0u, odd ? v.x : v.y, 1), s1 = __shfl_xor_sync(~0u, odd ? v.z : v.w, 1);
  if (odd) {
    v.x = s0, v.z = s1;
  } else {
    v.y = s0, v.w = s1;
  }
  const uint32_t u0 = __shfl_xor_sync(~0u, high ? v.x : v.z, 2), u1 = __shfl_xor_sync(~0u, high ? v.y : v.w, 2);
  if (high) {
    v.x = u0, v.y = u1;
  } else {
    v.z = u0, v.w = u1;
  }
  return v;
}

// Bit i: the 16 ranks of step first + i are fp16.
__device__ __forceinline__ uint32_t half_steps(const AdapterView& ad, int first, int steps) {
  const int step = first + static_cast<int>(threadIdx.x) % 32;
  return __ballot_sync(~0u, step < steps && ad.chunks[step * ad.chunk_count / steps].b_f16);
}

// y from fragments of 16 rows of W and kTiles * 8 tokens, that are scaled and have their adapters: row g (and g + 8) of
// W from `first` on, of those before `end`, tokens 2t, 2t + 1. channel: {s_w, bias} of the lane's rows. rows: {s_x / p,
// p} of the tokens first_token + 2t and the next. Without kAfter nothing follows the product.
template <int kTiles, bool kAfter>
__device__ __forceinline__ void store_fragments(const GemmArgs& args, const GemmMember& out, float (&value)[kTiles][4],
                                                const float2 (&channel)[2], const float4* rows, int first, int end,
                                                int first_token) {
  const AdapterView& ad = out.adapters;
  const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  // Lanes of neighbouring rows exchange a token each, so that a lane has two columns of y side by side.
  const Dtype type = args.y_type;
  const bool odd = g & 1;
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
    const float4 token = rows[j * 4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float v0 = value[j][2 * i] * token.y + channel[i].y, v1 = value[j][2 * i + 1] * token.w + channel[i].y;
      const float got = __shfl_xor_sync(~0u, odd ? v0 : v1, 4);
      value[j][2 * i] = odd ? got : v0;
      value[j][2 * i + 1] = odd ? v1 : got;
    }
  }
  const int m0 = first_token + 2 * t + odd, n0 = first + (g & ~1);
  if constexpr (kAfter) {
    const auto at16 = [&](const void* from, int64_t at) {
      return type == Dtype::f32 ? static_cast<const float*>(from)[at]
                                : decode16(static_cast<const uint16_t*>(from)[at], type == Dtype::f16);
    };
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      const int m = m0 + j * 8, slot = args.row_slot && m < args.m ? args.row_slot[m] : -1;
      const bool biased = slot >= 0 && slot < ad.slot_count && ad.has_bias[slot];
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int n = n0 + c / 2 * 8 + c % 2;
        if (m >= args.m || n >= end) continue;
        float v = value[j][c];
        if (biased) v += ad.scale[slot] * ad.slot_bias[static_cast<int64_t>(slot) * out.n + n];
        v = activate(v, out.activation);
        if (out.gate) v *= at16(out.gate, n);
        if (out.residual) v += at16(out.residual, static_cast<int64_t>(m) * out.n + n);
        value[j][c] = v;
      }
    }
  }
  const int element = type == Dtype::f32 ? 4 : 2;
  const bool pairs = out.n % 2 == 0 && reinterpret_cast<uintptr_t>(out.y) % (2 * element) == 0;
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
    const int m = m0 + j * 8;
    if (m >= args.m) break;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int n = n0 + 8 * i;
      uint8_t* const y = static_cast<uint8_t*>(out.y) + (static_cast<int64_t>(m) * out.n + n) * element;
      const float v0 = value[j][2 * i], v1 = value[j][2 * i + 1];
      if (type == Dtype::f32) {
        if (pairs && n < end) {
          *reinterpret_cast<float2*>(y) = {v0, v1};
        } else {
          if (n < end) reinterpret_cast<float*>(y)[0] = v0;
          if (n + 1 < end) reinterpret_cast<float*>(y)[1] = v1;
        }
      } else {
        const uint32_t low = encode16(v0, type == Dtype::f16), high = encode16(v1, type == Dtype::f16);
        if (pairs && n < end) {
          *reinterpret_cast<uint32_t*>(y) = low | high << 16;
        } else {
          if (n < end) reinterpret_cast<uint16_t*>(y)[0] = static_cast<uint16_t>(low);
          if (n + 1 < end) reinterpret_cast<uint16_t*>(y)[1] = static_cast<uint16_t>(high);
        }
      }
    }
  }
}

}  // namespace octolora::cuda
