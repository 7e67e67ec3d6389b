// SPDX-License-Identifier: Apache-2.0
//
// What both prepare kernels do to a value, to a row and to the biases.
#pragma once

#include <cfloat>
#include <climits>
#include <cstring>

#include "convert.cuh"
#include "kernels.h"
#include "ptx.cuh"

namespace octolora::cuda {

constexpr int kPowerLimit = 126;  // of log2 p: p and 1/p are normal numbers

// kPlain, here and in the kernels: x is measured and quantized as it is, dynamically, to 127 at most and without
// outlier columns, or not at all.
inline bool is_plain(const LinearSpec& spec) {
  return spec.mode == Mode::w8a16 || (spec.mode == Mode::dynamic && !spec.round_x_to_f16 &&
                                      !(spec.outlier_threshold > 0) && spec.x_divisor <= 127.f);
}

template <bool kPlain>
__device__ __forceinline__ float measured(const LinearSpec& spec, float value) {
  return !kPlain && spec.round_x_to_f16 ? round_to_f16(value) : value;
}

// Calls visit with a value of the type.
template <class Visit>
void with_type(Dtype type, Visit&& visit) {
  switch (type) {
    case Dtype::f32:
      return visit(float());
    case Dtype::f16:
      return visit(__half());
    case Dtype::bf16:
      return visit(__nv_bfloat16());
  }
}

// The smallest magnitude (the bits of X without its sign) whose measured value is an outlier; with none, above all.
template <class X>
uint32_t outlier_limit(const LinearSpec& spec) {
  constexpr uint32_t kInfinity = sizeof(X) == 4 ? kInfinityBits : std::is_same_v<X, __half> ? 0x7c00 : 0x7f80;
  if (!(spec.outlier_threshold > 0)) return sizeof(X) == 4 ? 0x80000000u : 0x8000u;
  uint32_t below = 0, limit = kInfinity;
  while (limit - below > 1) {
    const uint32_t middle = below + (limit - below) / 2;
    float value = 0.f;
    if constexpr (std::is_same_v<X, __half>) {
      value = __half2float(__half(__half_raw{static_cast<unsigned short>(middle)}));
    } else {
      const uint32_t bits = sizeof(X) == 4 ? middle : middle << 16;
      std::memcpy(&value, &bits, sizeof value);
    }
    if (spec.round_x_to_f16) value = __half2float(__float2half_rn(value));
    (value >= spec.outlier_threshold ? limit : below) = middle;
  }
  return limit;
}

// Four values in the bytes of a word.
template <bool kPlain>
__device__ __forceinline__ uint32_t quantize(const LinearSpec& spec, float factor, float v0, float v1, float v2,
                                             float v3) {
  const auto code = [&](float value) {
    value = measured<kPlain>(spec, value);
    const bool fixed = !kPlain && spec.mode == Mode::fixed;
    return ptx::round_to_s8(fixed ? __fdiv_rn(value, spec.x_scale) : __fmul_rn(value, factor));
  };
  return ptx::pack_bytes(code(v0), code(v1), code(v2), code(v3));
}
// The same where nothing can leave the range, and dynamic |value * factor| stays below 127.5: adding 1.5 * 2^23 rounds
// to nearest even and leaves the number in the low byte. Elements beyond the maximum are in outlier columns, whose
// codes are cleared. Static, factor is 1 / x_scale, correctly rounded: two steps of Newton's from value * factor end in
// the correctly rounded quotient (Markstein 1990), as long as all that comes between is a normal number.
template <bool kPlain>
__device__ __forceinline__ uint32_t quantize_in_range(const LinearSpec& spec, float factor, float v0, float v1,
                                                      float v2, float v3) {
  constexpr float kRound = 12582912.f;
  if (!kPlain && spec.mode == Mode::fixed) {
    const auto code = [&](float value) {
      value = measured<kPlain>(spec, value);
      float quotient = __fmul_rn(value, factor);
#pragma unroll
      for (int i = 0; i < 2; ++i) quotient = fmaf(fmaf(-quotient, spec.x_scale, value), factor, quotient);
      return __float_as_uint(__fadd_rn(fminf(fmaxf(quotient, -128.f), 127.f), kRound));
    };
    return ptx::pack_bytes(code(v0), code(v1), code(v2), code(v3));
  }
  const auto code = [&](float value) {
    return __float_as_uint(__fadd_rn(__fmul_rn(measured<kPlain>(spec, value), factor), kRound));
  };
  return ptx::pack_bytes(code(v0), code(v1), code(v2), code(v3));
}
// A row so small that its factor overflows has to saturate; one with an infinity or a NaN has the factor 0, and its
// codes have to be what 0 rounds to. Static rows have the factor 0 where the quotient cannot be made that way.
template <bool kPlain>
__device__ __forceinline__ bool stays_in_range(const LinearSpec& spec, float factor) {
  return (kPlain || spec.mode == Mode::fixed || (spec.mode == Mode::dynamic && spec.x_divisor <= 127.f)) &&
         factor > 0 && factor <= FLT_MAX;
}

// The exponent that brings the largest term of a chunk near the middle of fp16, where x is below 1; INT_MIN for none.
__device__ __forceinline__ int term_exponent(const Chunk& chunk, float scale) {
  return chunk.ranks && scale != 0 ? ilogbf(scale) + 1 + chunk.range : INT_MIN;
}

struct PreparedRow {
  RowScale out;
  float factor;  // divisor / a, or what quantize_in_range takes in its place
  int power;     // log2 p
};

// below: magnitude bits of the maximum that sets the scale; full: of all of the row; exponent: of its largest term.
__device__ __forceinline__ PreparedRow prepare_row(const LinearSpec& spec, uint32_t below, uint32_t full,
                                                   int exponent) {
  PreparedRow row{{1.f, 1.f}, 0.f, 0};
  if (spec.mode == Mode::dynamic) {
    const float maximum = __uint_as_float(below);
    row.out.scale = __fdiv_rn(maximum, spec.x_divisor);
    row.factor = maximum > 0 ? __fdiv_rn(spec.x_divisor, maximum) : 0.f;
    if (full > kInfinityBits) row.out.scale = __uint_as_float(full);  // NaN: no outlier, but its row
  } else if (spec.mode == Mode::fixed) {
    row.out.scale = full >= kInfinityBits ? __uint_as_float(0x7fc00000u) : spec.x_scale;
    const float factor = __frcp_rn(spec.x_scale);
    const bool normal = !spec.round_x_to_f16 && spec.x_scale > 0x1p-100f && spec.x_scale < 0x1p100f &&
                        __uint_as_float(full) * factor < 0x1p20f;
    row.factor = normal ? factor : 0.f;
  }
  if (exponent != INT_MIN) {
    const bool usable = full != 0 && full < kInfinityBits;
    row.power = max(-kPowerLimit, min(kPowerLimit, exponent + (usable ? static_cast<int>(full >> 23) - 127 : 0) + 1));
    row.out.power = scalbnf(1.f, row.power);
  }
  return row;
}

// total_bias of all members, thread `thread` of `threads`.
__device__ __forceinline__ void add_up_bias(const PrepareArgs& args, int thread, int threads) {
  for (int m = 0; m < args.member_count; ++m) {
    const PrepareMember& member = args.member[m];
    const AdapterView& ad = member.adapters;
    if (!member.total_bias) continue;
    for (int i = thread; i < member.n; i += threads) {
      float sum = member.bias ? member.bias[i] : 0.f;
      for (int slot = 0; slot < ad.slot_count; ++slot) {
        if (ad.has_bias[slot]) sum += ad.scale[slot] * ad.slot_bias[static_cast<int64_t>(slot) * member.n + i];
      }
      member.total_bias[i] = sum;
    }
  }
}

}  // namespace octolora::cuda
