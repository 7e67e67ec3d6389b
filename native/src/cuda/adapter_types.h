// SPDX-License-Identifier: Apache-2.0
//
// Which 16-bit numbers an adapter's factors become, decided on the host when a slot is filled.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>

#include "backend.h"

namespace octolora::cuda {

// A factor as the caller gave it: element (i, j) at i * stride + j.
struct FactorView {
  const void* data;
  Dtype type;
  int rows, columns;
  int64_t stride;

  float at(int i, int j) const {
    const int64_t index = i * stride + j;
    switch (type) {
      case Dtype::f32:
        return static_cast<const float*>(data)[index];
      case Dtype::f16:
        return __half2float(static_cast<const __half*>(data)[index]);
      case Dtype::bf16:
        return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[index]);
    }
    return 0.f;
  }
};

// Stored value = true value * 2^exponent, as fp16 or bf16.
struct FactorType {
  bool f16;
  int exponent;
  float largest;  // stored absolute maximum
};

inline uint16_t encode(float value, bool f16) {
  return f16 ? static_cast<__half_raw>(__float2half_rn(value)).x
             : static_cast<__nv_bfloat16_raw>(__float2bfloat16_rn(value)).x;
}

inline float decode(uint16_t bits, bool f16) {
  if (f16) return __half2float(__half(__half_raw{bits}));
  return __bfloat162float(__nv_bfloat16(__nv_bfloat16_raw{bits}));
}

// 16-bit factors keep their type. fp32 goes into a type that holds every element exactly, else into whichever of bf16
// and of fp16 times a power of two (largest element in [1, 2)) leaves the smaller squared error; with split always the
// latter, whose two parts carry 22 bits.
inline FactorType choose_type(const FactorView& factor, bool split) {
  float largest = 0.f;
  for (int i = 0; i < factor.rows; ++i) {
    for (int j = 0; j < factor.columns; ++j) largest = std::fmax(largest, std::fabs(factor.at(i, j)));
  }
  if (factor.type != Dtype::f32) return {factor.type == Dtype::f16, 0, largest};
  bool exact_bf16 = true, exact_f16 = true;
  double error_bf16 = 0, error_f16 = 0;
  const int exponent = largest > 0 ? -std::ilogb(largest) : 0;
  for (int i = 0; i < factor.rows; ++i) {
    for (int j = 0; j < factor.columns; ++j) {
      const float value = factor.at(i, j);
      const double b = static_cast<double>(decode(encode(value, false), false)) - value;
      const double s =
          std::ldexp(static_cast<double>(decode(encode(std::ldexp(value, exponent), true), true)), -exponent) - value;
      exact_bf16 &= b == 0;
      exact_f16 &= decode(encode(value, true), true) == value;
      error_bf16 += b * b;
      error_f16 += s * s;
    }
  }
  if (exact_bf16) return {false, 0, largest};
  if (exact_f16) return {true, 0, largest};
  if (split || error_f16 <= error_bf16) return {true, exponent, std::ldexp(largest, exponent)};
  return {false, 0, largest};
}

}  // namespace octolora::cuda
