// SPDX-License-Identifier: Apache-2.0
//
// The parts of a kernel table that are the same loops on every instruction set; the compiler vectorizes them with the
// flags of the file that includes this one.
//
// Everything here has internal linkage, and no inline function of the standard library is called: two files would
// otherwise emit one symbol with different instructions, and the linker could keep the one that an older processor
// does not have. The including files are compiled without contraction, so a * b + c rounds twice everywhere and the
// codes are the same bits on every instruction set.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace octolora::cpu {
namespace {

constexpr uint32_t kMagnitude = 0x7fffffffu;

inline uint32_t bits_of(float v) {
  uint32_t bits;
  __builtin_memcpy(&bits, &v, 4);
  return bits;
}
inline float float_of(uint32_t bits) {
  float v;
  __builtin_memcpy(&v, &bits, 4);
  return v;
}

inline void widen_bf16(const void* x, int64_t count, float* out) {
  const char* bytes = static_cast<const char*>(x);
  for (int64_t i = 0; i < count; ++i) {
    uint16_t b;
    __builtin_memcpy(&b, bytes + 2 * i, 2);
    out[i] = float_of(static_cast<uint32_t>(b) << 16);
  }
}

inline void narrow_bf16(const float* v, int64_t count, void* out) {
  char* bytes = static_cast<char*>(out);
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = bits_of(v[i]);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const uint32_t nan = (bits >> 16) | 0x40u;
    const uint16_t b = static_cast<uint16_t>((bits & kMagnitude) > kInfinityBits ? nan : rounded);
    __builtin_memcpy(bytes + 2 * i, &b, 2);
  }
}

void measure(const float* v, int64_t count, uint32_t limit, Magnitudes* magnitudes) {
  // Signed, which every instruction set compares: a magnitude fits, and kNoLimit becomes one that none exceeds.
  const int32_t highest = static_cast<int32_t>(limit - 1);
  int32_t below = static_cast<int32_t>(magnitudes->below), all = static_cast<int32_t>(magnitudes->all);
  for (int64_t i = 0; i < count; ++i) {
    const int32_t magnitude = static_cast<int32_t>(bits_of(v[i]) & kMagnitude);
    const int32_t kept = magnitude <= highest ? magnitude : 0;
    below = kept > below ? kept : below;
    all = magnitude > all ? magnitude : all;
  }
  *magnitudes = {static_cast<uint32_t>(below), static_cast<uint32_t>(all)};
}

void flag_reached(const float* v, int64_t count, uint32_t limit, uint8_t* flags) {
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t magnitude = bits_of(v[i]) & kMagnitude;
    if (magnitude >= limit && magnitude <= kInfinityBits) __atomic_store_n(flags + i, uint8_t{1}, __ATOMIC_RELAXED);
  }
}

// Adding 1.5 * 2^23 leaves no bit below 1, so the sum is v rounded to the nearest even integer, for |v| <= 2^22.
// Clamping first changes nothing, as both ends are integers. The NaN test keeps the conversion to int defined.
inline int8_t code_of(float product) {
  constexpr float kRound = 12582912.f;
  float v = product == product ? product : 0.f;
  v = v < -128.f ? -128.f : v;
  v = v > 127.f ? 127.f : v;
  return static_cast<int8_t>(static_cast<int32_t>((v + kRound) - kRound));
}

int32_t quantize_any(const float* v, int64_t count, float factor, bool divide, int8_t* q) {
  int32_t sum = 0;
  if (divide) {
    for (int64_t i = 0; i < count; ++i) q[i] = code_of(v[i] / factor);
  } else {
    for (int64_t i = 0; i < count; ++i) q[i] = code_of(v[i] * factor);
  }
  for (int64_t i = 0; i < count; ++i) sum += q[i];
  return sum;
}

template <class Code>
void store_codes(const int8_t* q, int64_t count, void* codes) {
  Code* out = static_cast<Code*>(codes);
  for (int64_t i = 0; i < count; ++i) out[i] = static_cast<Code>(q[i]);
}

void scale_sums(const int32_t* sums, int64_t count, int32_t correction, float factor, float* out) {
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t sum = static_cast<uint32_t>(sums[i]) - static_cast<uint32_t>(correction);
    out[i] = static_cast<float>(static_cast<int32_t>(sum)) * factor;
  }
}

void multiply_by(float* v, const float* factors, int64_t count) {
  for (int64_t i = 0; i < count; ++i) v[i] *= factors[i];
}

void add_scaled(float* v, float factor, const float* addends, int64_t count) {
  for (int64_t i = 0; i < count; ++i) v[i] += factor * addends[i];
}

// Written without calls and branches, so that the compiler can vectorize the loops over them; polynomials are minimax
// fits, whose error is below that of their evaluation.

// exp(x) = 2^n exp(r), |r| <= ln(2) / 2, within 2 units of the last place; 0 or infinity beyond the range of fp32. A
// NaN gives 1.
inline float exp_of(float x) {
  constexpr float kRound = 12582912.f;                                // 1.5 * 2^23, see code_of
  constexpr float kLn2High = 0.693145752f, kLn2Low = 1.42860677e-6f;  // n times the first is exact
  x = x == x ? x : 0.f;
  x = x < -128.f ? -128.f : x;
  x = x > 128.f ? 128.f : x;
  const float n = (x * 1.44269504f + kRound) - kRound;
  const float r = (x - n * kLn2High) - n * kLn2Low;
  float p = 0.00138146128f;
  p = p * r + 0.00836871006f;
  p = p * r + 0.041668389f;
  p = p * r + 0.166665211f;
  p = p * r + 0.49999994f;
  p = p * (r * r) + r + 1.f;
  // 2^n may be beyond the normal numbers, its two halves are not.
  const int32_t exponent = static_cast<int32_t>(n), half = exponent >> 1;
  return p * float_of(static_cast<uint32_t>(half + 127) << 23) *
         float_of(static_cast<uint32_t>(exponent - half + 127) << 23);
}

// z P(z^2) near 0, else 1 - exp(-Q(|z|)) with the sign of z.
inline float erf_of(float z) {
  const float magnitude = float_of(bits_of(z) & kMagnitude), s = z * z;
  float p = 7.85386073e-05f;
  p = p * s - 0.000801019371f;
  p = p * s + 0.00518832775f;
  p = p * s - 0.0268538129f;
  p = p * s + 0.112835854f;
  p = p * s - 0.37612626f;
  p = p * s + 1.12837911f;
  const float t = magnitude < 4.f ? magnitude : 4.f;  // erf is 1 in fp32 from here on
  float q = 0.00115041947f;
  q = q * t - 0.0147781009f;
  q = q * t + 0.0886341184f;
  q = q * t + 0.65448904f;
  q = q * t + 1.11743844f;
  q = q * t + 0.0026717179f;
  const float far = 1.f - exp_of(-q);
  return magnitude < 1.f ? z * p : float_of(bits_of(far) | (bits_of(z) & ~kMagnitude));
}

inline float gelu_tanh(float v) {
  // 1 + tanh(u) = 2 / (1 + exp(-2u)), which loses nothing where tanh(u) is near -1.
  constexpr float kLinear = -1.59576912f, kCubic = kLinear * 0.044715f;  // -2 sqrt(2 / pi)
  return v / (1.f + exp_of(v * (kCubic * v * v + kLinear)));
}
inline float gelu_erf(float v) { return 0.5f * v * (1.f + erf_of(v * 0.707106781f)); }
inline float silu(float v) { return v / (1.f + exp_of(-v)); }

void activate(float* v, int64_t count, Activation activation) {
  switch (activation) {
    case Activation::none:
      return;
    case Activation::gelu_tanh:
      for (int64_t i = 0; i < count; ++i) v[i] = gelu_tanh(v[i]);
      return;
    case Activation::gelu_erf:
      for (int64_t i = 0; i < count; ++i) v[i] = gelu_erf(v[i]);
      return;
    case Activation::silu:
      for (int64_t i = 0; i < count; ++i) v[i] = silu(v[i]);
      return;
  }
}

}  // namespace
}  // namespace octolora::cpu
