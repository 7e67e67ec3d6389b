// SPDX-License-Identifier: Apache-2.0
//
// What a linear with adapters must give, from the formulas of octolora.h in plain loops and double precision, and by
// how much an implementation may differ. Knows no tile, no thread and nothing of the library's code.
#pragma once

#include <cstdint>
#include <vector>

#include "numbers.h"

namespace test {

struct Adapter {
  int rank = 0;
  int b_stride = 0;         // elements from one row of B to the next
  Typed a;                  // [rank,k]
  Typed b;                  // [n,b_stride]
  std::vector<float> bias;  // [n] or empty
  float scale = 1.f;
  bool split = false;            // OCTOLORA_LORA_SPLIT
  std::vector<float> magnitude;  // [n] or empty
};

struct Problem {
  int m = 0, n = 0, k = 0;
  int32_t mode = OCTOLORA_W8A16;
  bool round_x = false;  // to fp16, before anything is measured or quantized
  float x_scale = 0.f;
  float x_divisor = 127.f;
  float threshold = 0.f;
  std::vector<int8_t> w;       // [n,k]
  std::vector<float> w_scale;  // [n] or [1]
  int scale_block = 0;         // columns of k that share a block scale, or 0
  Typed block_scale;           // fp16 [n, ceil(k / scale_block)], or empty
  std::vector<float> bias;     // [n] or empty
  Typed x;                     // [m,k]
  Type y_type = Type::f32;
  std::vector<Adapter> adapters;  // of the slots, in their order
  // [m] or empty: the one adapter that a row uses, by its number; others, such as -1, are none.
  std::vector<int32_t> row_slot;
  // y = residual + gate * activation(the linear)
  int32_t activation = OCTOLORA_ACTIVATION_NONE;
  Typed residual;  // [m,n] of y's type, or empty
  Typed gate;      // [n] of y's type, or empty
  // Every product and every partial sum is a number that fp32 (and, for x.A^T, 16 bits) holds exactly, so that y is
  // the exact result rounded once, whatever the order of the additions.
  bool exact = false;
};

// How the device under test computes, where the contract leaves room.
struct Arithmetic {
  // Relative error of one fp32 addition: 2^-24 rounded to nearest; 2^-23 in tensor cores, which cut off.
  double addition;
  // CUDA tensor cores take 16-bit operands: c * x.A^T is rounded to one 16-bit number (two with split), an fp32 x of
  // the outlier columns to a pair, an fp32 x of W8A16 to three bf16 and of x.A^T to two tf32.
  bool operands16;
};
constexpr Arithmetic kCpuArithmetic = {0x1p-24, false};
constexpr Arithmetic kCudaArithmetic = {0x1p-23, true};

struct Quantized {
  std::vector<uint8_t> outlier;  // [k]: columns that leave the int8 sum
  std::vector<int8_t> codes;     // [m,k]
  std::vector<int32_t> sums;     // [m,n]
  std::vector<float> row_scale;  // [m]
  // [m]: no code is defined, for a NaN or an infinity in x, or because x_divisor / a overflows and the row has zeros
  std::vector<uint8_t> undefined;
};

struct Expected {
  std::vector<double> y;            // [m,n], before the rounding to y's type
  std::vector<double> bound;        // [m,n], for the distance from y to what the device stores
  std::vector<uint8_t> not_finite;  // [m]: a NaN or an infinity in x: every y of the row is NaN or infinite
};

Quantized quantize(const Problem& p);  // W8A8 modes only
// beside: the other outputs of the same call; they have the same x.
Expected evaluate(const Problem& p, const Arithmetic& arithmetic, const std::vector<const Problem*>& beside = {});

// Throws Failure with the numbers of the first element of y [m,n] that is not within its bound.
void expect_close(const Problem& p, const Expected& want, const std::vector<uint8_t>& y);

}  // namespace test
