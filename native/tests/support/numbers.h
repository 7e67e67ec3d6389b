// SPDX-License-Identifier: Apache-2.0
//
// Number formats and random numbers of the tests, written from the IEEE definitions and not from the library's code.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "octolora/octolora.h"

namespace test {

// Values are those of the C header: OCTOLORA_FLOAT32, OCTOLORA_FLOAT16, OCTOLORA_BFLOAT16.
enum class Type : int32_t { f32 = OCTOLORA_FLOAT32, f16 = OCTOLORA_FLOAT16, bf16 = OCTOLORA_BFLOAT16 };

struct Format {
  const char* name;
  int precision;  // bits of the significand, the leading one included: unit roundoff is 2^-precision
  int min_exponent, max_exponent;
  int bytes;
};

inline const Format& format(Type type) {
  static const Format formats[] = {{"f32", 24, -126, 127, 4}, {"f16", 11, -14, 15, 2}, {"bf16", 8, -126, 127, 2}};
  return formats[static_cast<int>(type)];
}

inline double unit_roundoff(Type type) { return std::ldexp(1.0, -format(type).precision); }
// Half the smallest subnormal: what a rounding near zero may cost.
inline double tiny(Type type) { return std::ldexp(1.0, format(type).min_exponent - format(type).precision); }
inline double largest(Type type) {
  return std::ldexp(2.0 - std::ldexp(1.0, 1 - format(type).precision), format(type).max_exponent);
}

// One rounding to nearest, ties to even, from double to the format; overflow gives an infinity.
inline double round_to(Type type, double value) {
  if (value == 0 || !std::isfinite(value)) return value;
  const Format& f = format(type);
  int exponent;
  std::frexp(value, &exponent);
  const int quantum = std::max(exponent - 1, f.min_exponent) - (f.precision - 1);
  const double rounded = std::ldexp(std::nearbyint(std::ldexp(value, -quantum)), quantum);
  if (std::fabs(rounded) > largest(type)) return std::copysign(std::numeric_limits<double>::infinity(), value);
  return rounded;
}

// value is one of the format's numbers.
inline void encode(Type type, double value, uint8_t* to) {
  const float single = static_cast<float>(value);
  uint32_t bits;
  std::memcpy(&bits, &single, 4);
  if (type == Type::f32) {
    std::memcpy(to, &bits, 4);
    return;
  }
  uint16_t half = static_cast<uint16_t>(bits >> 16);
  if (type == Type::f16) {
    const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
    if (std::isnan(value)) {
      half = 0x7e00;
    } else if (std::isinf(value)) {
      half = sign | 0x7c00;
    } else if (std::fabs(value) < std::ldexp(1.0, -14)) {
      half = sign | static_cast<uint16_t>(std::ldexp(std::fabs(value), 24));
    } else {
      int exponent;
      const double significand = std::frexp(std::fabs(value), &exponent);  // [0.5, 1)
      half = static_cast<uint16_t>(sign | ((exponent + 14) << 10) |
                                   (static_cast<int>(std::ldexp(significand, 11)) - 1024));
    }
  }
  std::memcpy(to, &half, 2);
}

inline float decode(Type type, const uint8_t* from) {
  uint32_t bits = 0;
  float value;
  if (type == Type::f32) {
    std::memcpy(&value, from, 4);
    return value;
  }
  uint16_t half;
  std::memcpy(&half, from, 2);
  if (type == Type::bf16) {
    bits = static_cast<uint32_t>(half) << 16;
    std::memcpy(&value, &bits, 4);
    return value;
  }
  const int exponent = (half >> 10) & 31, mantissa = half & 1023;
  if (exponent == 31) {
    value = mantissa ? std::numeric_limits<float>::quiet_NaN() : std::numeric_limits<float>::infinity();
  } else {
    value = exponent ? std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25)
                     : std::ldexp(static_cast<float>(mantissa), -24);
  }
  return half & 0x8000 ? -value : value;
}

// An array as a caller stores it, and the exact value of each element.
struct Typed {
  Type type = Type::f32;
  std::vector<uint8_t> bytes;
  std::vector<float> value;

  Typed() = default;
  Typed(Type t, size_t count) : type(t), bytes(count * format(t).bytes), value(count) {}
  size_t size() const { return value.size(); }
  void set(size_t i, double v) {
    const double rounded = round_to(type, v);
    encode(type, rounded, &bytes[i * format(type).bytes]);
    value[i] = static_cast<float>(rounded);
  }
};

// SplitMix64: small, seedable, the same everywhere.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
  }
  int below(int count) { return static_cast<int>(next() % static_cast<uint64_t>(count)); }
  int between(int low, int high) { return low + below(high - low + 1); }
  bool coin() { return next() & 1; }
  double uniform() { return static_cast<double>(next() >> 11) * std::ldexp(1.0, -53); }
  // Mean 0, variance 1, |value| < 6: a sum of twelve uniform numbers.
  double normal() {
    double sum = -6;
    for (int i = 0; i < 12; ++i) sum += uniform();
    return sum;
  }

 private:
  uint64_t state_;
};

}  // namespace test
