// SPDX-License-Identifier: Apache-2.0
//
// Where the bound on y[m,n] comes from. u(t) is the unit roundoff of a type (fp32 2^-24, fp16 2^-11, bf16 2^-8), d the
// relative error of one fp32 addition of the device.
//
//   base, W8A8      the int32 sum is exact; its conversion to fp32 and the two scales:      3 u(f32) |base|
//   base, W8A16     k additions; the scale:                      (k d + u(f32)) s_w sum |x||w|
//                   fp32 x in three bf16 pieces, on tensor cores:         2^-23 s_w sum |x||w|
//                   with block scales, w = d q is exact in fp32 (8 and 11 bits); where instead sums of a block are
//                   multiplied, one fma a block and piece:      b d s_w sum |x||w|
//   outliers        one addition a column; the scale:            (|O| d + u(f32)) s_w sum |x||w|
//                   fp32 x as a pair of 16-bit numbers, on tensor cores:  2^-16 s_w sum |x||w|
//   h = c x.A^T     k additions, c:                              (k d + u(f32)) |c| sum |x||A|
//                   A, where an fp32 factor is stored in 16 bits: |c| sum |x| dA, see storage()
//                   on tensor cores fp32 x as two tf32 numbers:  2^-21 |c| sum |x||A|
//                   on tensor cores h itself in 16 bits:         u(h) |h|, and for fp16, whose rows share a power of
//                   two, over all outputs of a call, half a
//                   subnormal of the row's largest:              2^-24 max |h| these errors reach y through |B|
//   B               where an fp32 factor is stored in 16 bits:   sum |h| dB
//   adapter bias    product and addition:                        2 u(f32) |c bias|
//                   on tensor cores the bias in the 16-bit type, c as a pair: (u(h) + 2^-16) |c bias|
//   the last sum    of rank + 8 terms, in any order:             (rank + 8) d (sum of the terms' absolute values)
//   underflow       of a product anywhere:                       2^-149 a product, times what follows it, if above 1
//                   of the pieces of an fp32 x, on tensor cores: bf16 stops at 2^-133, rounded: 2^-134 s_w sum |w|
//                                                                tf32 at 2^-136, cut off:       2^-136 |c| sum |A|
//   activation f    an error e of its argument v:                sup |f(z) - f(v)| for |z - v| <= e. f falls to its one
//                                                                minimum and rises from there, so the largest distance
//                                                                is at an end or, where it lies between, the minimum
//     v s(t)        s(t) = 1 / (1 + exp(-t)): SiLU with t = v, GELU by tanh with t = 2 sqrt(2/pi) (v + 0.044715 v^3).
//                   t in a few roundings, exp in about four, their effect on s, and the sum, quotient and product:
//                                                                ((8 |t| + 8) (1 - s) + 4) u(f32) |f|
//                   where s < 2^-126, subnormal, it may be 0:    2^-126 |v|
//     v (1 + erf)/2 the argument and erf in a few roundings:     4 u(f32) |v| + 2 u(f32) |f|
//   gate g          the product:                                 |g| e + u(f32) |g f| + 2^-149
//   residual r      the addition:                                d (|g f| + |r|)
//   the store       u(y) |y| + half a subnormal of y
//
// Magnitudes: the adapters apply one after the other, so that with g of those that have one and 1 for the others,
//   y - bias = G base + sum F_i (h_i.B_i + c bias_i),   F_i the product of g_j for j >= i, G of all
//   g = m / |w|     what of A and B is stored in 16 bits, and (rank + 4) u(f32), are an error of each element of w; by
//                   the triangle inequality |error of w| / |w| is one of g; (k + 8) u(f32) for the sum of the squares
//   F B             stored in 16 bits:                           u(B) |F B| + 2^-25, times the power of two of B
//
// OCTOLORA_LORA_SPLIT replaces u(h) and the storage errors by those of two 16-bit numbers, 2^-16, and leaves out the
// product of the two small halves, another 2^-16.
#include "oracle.h"

#include <algorithm>

#include "harness.h"

namespace test {
namespace {

constexpr double kSingle = 0x1p-24;
constexpr double kPair = 0x1p-16;
constexpr double kThreePieces = 0x1p-23;
constexpr double kTf32Pair = 0x1p-21;
constexpr double kBf16Underflow = 0x1p-134;
constexpr double kTf32Underflow = 0x1p-136;

// x as the quantizer sees it.
float measured(const Problem& p, int64_t i) {
  const float x = p.x.value[i];
  return p.round_x ? static_cast<float>(round_to(Type::f16, x)) : x;
}

float b_at(const Adapter& a, int n, int r) { return a.b.value[static_cast<int64_t>(n) * a.b_stride + r]; }

float w_scale(const Problem& p, int n) { return p.w_scale.size() == 1 ? p.w_scale[0] : p.w_scale[n]; }

// The code at (n, k), times its block scale: exact.
double weight_at(const Problem& p, int n, int k) {
  const double code = p.w[static_cast<int64_t>(n) * p.k + k];
  if (!p.scale_block) return code;
  const int64_t blocks = (p.k + p.scale_block - 1) / p.scale_block;
  return code * p.block_scale.value[n * blocks + k / p.scale_block];
}

// Rows that hold a NaN or an infinity, as given or after the rounding to fp16.
std::vector<uint8_t> rows_not_finite(const Problem& p) {
  std::vector<uint8_t> rows(p.m);
  const bool measures = p.mode != OCTOLORA_W8A16;
  for (int m = 0; m < p.m; ++m) {
    for (int k = 0; k < p.k; ++k) {
      const int64_t i = static_cast<int64_t>(m) * p.k + k;
      if (!std::isfinite(p.x.value[i]) || (measures && !std::isfinite(measured(p, i)))) rows[m] = 1;
    }
  }
  return rows;
}

// How a factor may be kept in 16 bits, from its values.
struct FactorStorage {
  bool half;        // is or may become fp16
  bool bfloat;      // is or may become bf16
  double relative;  // error of an element is at most relative * |element| + absolute; 0 where 16 bits hold the values
  double absolute;
};

FactorStorage storage(const Typed& factor, bool split) {
  if (factor.type == Type::f16) return {true, false, 0, 0};
  if (factor.type == Type::bf16) return {false, true, 0, 0};
  bool in_half = true, in_bfloat = true;
  double most = 0;
  for (float v : factor.value) {
    if (std::isnan(v)) continue;  // between the rows of B
    in_half = in_half && round_to(Type::f16, v) == v;
    in_bfloat = in_bfloat && round_to(Type::bf16, v) == v;
    most = std::max<double>(most, std::fabs(v));
  }
  if (in_half || in_bfloat) return {in_half, in_bfloat, 0, 0};
  // fp16 times a power of two that puts the largest element at 1 or above: smaller ones down to 2^-14 of it are normal
  // numbers, the others lose half a subnormal, 2^-25 of it.
  return {true, false, split ? kPair : 0x1p-11, 0x1p-25 * most};
}

// g of one adapter and channel and its relative error.
struct Factor {
  double value = 1, error = 0;
};

Factor factor_of(const Problem& p, const Adapter& a, const FactorStorage& a_storage, const FactorStorage& b_storage,
                 int n) {
  if (a.magnitude.empty()) return {};
  const double c = a.scale, s_w = w_scale(p, n);
  double square = 0, error_square = 0;
  for (int k = 0; k < p.k; ++k) {
    const double base = s_w * weight_at(p, n, k);
    double sum = 0, absolute = std::fabs(base), error = 0;
    for (int r = 0; r < a.rank; ++r) {
      const double up = b_at(a, n, r), down = a.a.value[static_cast<int64_t>(r) * p.k + k];
      const double up_error = b_storage.relative * std::fabs(up) + b_storage.absolute;
      const double down_error = a_storage.relative * std::fabs(down) + a_storage.absolute;
      sum += up * down;
      absolute += std::fabs(c * up * down);
      error += std::fabs(c) * (std::fabs(up) * down_error + up_error * (std::fabs(down) + down_error));
    }
    error += (a.rank + 4) * kSingle * absolute;
    square += (base + c * sum) * (base + c * sum);
    error_square += error * error;
  }
  return {a.magnitude[n] / std::sqrt(square), std::sqrt(error_square / square) + (p.k + 8) * kSingle};
}

}  // namespace

Quantized quantize(const Problem& p) {
  Quantized q;
  q.outlier.assign(p.k, 0);
  q.codes.assign(static_cast<size_t>(p.m) * p.k, 0);
  q.sums.assign(static_cast<size_t>(p.m) * p.n, 0);
  q.row_scale.assign(p.m, 0.f);
  q.undefined = rows_not_finite(p);
  const bool dynamic = p.mode == OCTOLORA_W8A8_DYNAMIC;
  const float threshold = dynamic ? p.threshold : 0.f;
  if (threshold > 0) {
    for (int64_t i = 0; i < static_cast<int64_t>(p.m) * p.k; ++i) {
      if (std::fabs(measured(p, i)) >= threshold) q.outlier[i % p.k] = 1;
    }
  }
  for (int m = 0; m < p.m; ++m) {
    const int64_t row = static_cast<int64_t>(m) * p.k;
    float largest = 0;
    bool zero = false;
    for (int k = 0; k < p.k; ++k) {
      const float v = std::fabs(measured(p, row + k));
      zero = zero || v == 0;
      if (threshold == 0 || v < threshold) largest = std::max(largest, v);
    }
    const float steps = largest > 0 ? p.x_divisor / largest : 0.f;  // one fp32 division
    if (dynamic && std::isinf(steps) && zero) q.undefined[m] = 1;
    q.row_scale[m] = dynamic ? largest / p.x_divisor : p.x_scale;
    if (q.undefined[m]) continue;
    for (int k = 0; k < p.k; ++k) {
      if (q.outlier[k]) continue;
      const float v = measured(p, row + k);
      const float scaled = dynamic ? v * steps : v / p.x_scale;  // one fp32 operation
      q.codes[row + k] = static_cast<int8_t>(std::min(127.f, std::max(-128.f, std::nearbyint(scaled))));
    }
    for (int n = 0; n < p.n; ++n) {
      const int8_t* w = &p.w[static_cast<int64_t>(n) * p.k];
      int64_t sum = 0;
      for (int k = 0; k < p.k; ++k) sum += static_cast<int64_t>(q.codes[row + k]) * w[k];
      q.sums[static_cast<int64_t>(m) * p.n + n] = static_cast<int32_t>(sum);
    }
  }
  return q;
}

namespace {

bool applies(const Problem& p, int m, size_t adapter) {
  return p.row_slot.empty() || p.row_slot[m] == static_cast<int32_t>(adapter);
}

// |c x.A^T| of a row, the largest over all adapters and ranks.
double largest_h(const Problem& p, int m) {
  double largest = 0;
  for (size_t i = 0; i < p.adapters.size(); ++i) {
    if (!applies(p, m, i)) continue;
    for (int r = 0; r < p.adapters[i].rank; ++r) {
      double sum = 0;
      for (int k = 0; k < p.k; ++k) {
        sum += static_cast<double>(p.x.value[static_cast<int64_t>(m) * p.k + k]) *
               p.adapters[i].a.value[static_cast<int64_t>(r) * p.k + k];
      }
      largest = std::max(largest, std::fabs(p.adapters[i].scale * sum));
    }
  }
  return largest;
}

// An activation as v * s(t), by erf for GELU_ERF, and where its minimum is.
struct ActivationAt {
  double value, t, s;
};
ActivationAt activate(int32_t activation, double v) {
  if (activation == OCTOLORA_ACTIVATION_GELU_ERF) return {v / 2 * std::erfc(-v / std::sqrt(2.0)), 0, 0};
  double t = v;
  if (activation == OCTOLORA_ACTIVATION_GELU_TANH) t = 2 * std::sqrt(2 / M_PI) * (v + 0.044715 * v * v * v);
  const double s = 1 / (1 + std::exp(-t));
  return {v * s, t, s};
}
double minimum_of(int32_t activation) {
  switch (activation) {
    case OCTOLORA_ACTIVATION_GELU_TANH:
      return -0.7524614227082506;
    case OCTOLORA_ACTIVATION_GELU_ERF:
      return -0.7517915246935645;
    default:
      return -1.2784645427610738;
  }
}

// What follows the linear: y and its error in, y and its error out, before the store.
void finish(const Problem& p, int m, int n, const Arithmetic& arithmetic, double& y, double& error) {
  if (p.activation != OCTOLORA_ACTIVATION_NONE) {
    const double v = y, low = minimum_of(p.activation);
    const ActivationAt f = activate(p.activation, v);
    double spread = 0;
    for (double z : {v - error, v + error, std::min(std::max(low, v - error), v + error)})
      spread = std::max(spread, std::fabs(activate(p.activation, z).value - f.value));
    const double size = std::fabs(f.value) + spread;
    y = f.value;
    error = spread + 0x1p-126 * std::fabs(v);
    if (p.activation == OCTOLORA_ACTIVATION_GELU_ERF)
      error += 4 * kSingle * std::fabs(v) + 2 * kSingle * size;
    else
      error += ((8 * std::fabs(f.t) + 8) * (1 - f.s) + 4) * kSingle * size;
  }
  if (p.gate.size()) {
    const double gate = p.gate.value[n];
    y *= gate;
    error = std::fabs(gate) * error + kSingle * (std::fabs(y) + std::fabs(gate) * error) + 0x1p-149;
  }
  if (p.residual.size()) {
    const double residual = p.residual.value[static_cast<int64_t>(m) * p.n + n];
    error += arithmetic.addition * (std::fabs(y) + error + std::fabs(residual));
    y += residual;
  }
}

}  // namespace

Expected evaluate(const Problem& p, const Arithmetic& arithmetic, const std::vector<const Problem*>& beside) {
  Expected e;
  e.y.assign(static_cast<size_t>(p.m) * p.n, 0);
  e.bound.assign(static_cast<size_t>(p.m) * p.n, 0);
  e.not_finite = rows_not_finite(p);
  const bool w8a16 = p.mode == OCTOLORA_W8A16;
  const bool x_in_pieces = arithmetic.operands16 && p.x.type == Type::f32;
  const double d = arithmetic.addition;
  const Quantized q = w8a16 ? Quantized{} : quantize(p);

  int outliers = 0;
  for (uint8_t o : q.outlier) outliers += o;
  int total_rank = 0;
  std::vector<FactorStorage> a_storage, b_storage;
  std::vector<double> h_roundoff, b_largest;
  std::vector<uint8_t> h_half;
  for (const Adapter& a : p.adapters) {
    total_rank += a.rank;
    b_largest.push_back(0);
    for (int n = 0; n < p.n; ++n) {
      for (int r = 0; r < a.rank; ++r) b_largest.back() = std::max<double>(b_largest.back(), std::fabs(b_at(a, n, r)));
    }
    a_storage.push_back(storage(a.a, a.split));
    b_storage.push_back(storage(a.b, a.split));
    const bool bfloat = a_storage.back().bfloat || b_storage.back().bfloat;
    h_half.push_back(a_storage.back().half || b_storage.back().half);
    h_roundoff.push_back(!arithmetic.operands16 ? 0 : a.split ? kPair : bfloat ? 0x1p-8 : 0x1p-11);
  }

  std::vector<double> w_absolutes(p.n);  // sum |w| of each channel
  for (int n = 0; n < p.n; ++n) {
    for (int k = 0; k < p.k; ++k) w_absolutes[n] += std::fabs(weight_at(p, n, k));
  }

  // With block scales: sums that are multiplied by one, and the largest, if above 1.
  const double sums = p.scale_block ? (p.k + 31) / 32 * (x_in_pieces ? 3 : 1) : 0;
  double most_scale = 1;
  for (float scale : p.block_scale.value) most_scale = std::max<double>(most_scale, std::fabs(scale));

  // F_i and its relative error, [n][adapters + 1]: the first is G, the last 1.
  const size_t count = p.adapters.size();
  std::vector<Factor> factors(static_cast<size_t>(p.n) * (count + 1));
  for (int n = 0; n < p.n; ++n) {
    for (size_t i = count; i-- > 0;) {
      const Factor g = factor_of(p, p.adapters[i], a_storage[i], b_storage[i], n),
                   &after = factors[n * (count + 1) + i + 1];
      factors[n * (count + 1) + i] = {g.value * after.value, g.error + after.error + kSingle};
    }
  }

  for (int m = 0; m < p.m; ++m) {
    if (e.not_finite[m]) continue;
    const float* x = &p.x.value[static_cast<int64_t>(m) * p.k];

    // h = c x.A^T of every adapter, one after the other, with the error that each element has before it meets B.
    std::vector<double> h, h_error;
    double half_largest = 0;
    for (size_t i = 0; i < p.adapters.size(); ++i) {
      const Adapter& adapter = p.adapters[i];
      const double c = adapter.scale;
      if (!applies(p, m, i)) {
        h.resize(h.size() + adapter.rank);
        h_error.resize(h.size());
        continue;
      }
      for (int r = 0; r < adapter.rank; ++r) {
        const float* a = &adapter.a.value[static_cast<int64_t>(r) * p.k];
        double sum = 0, absolute = 0, x_absolute = 0, a_absolute = 0;
        for (int k = 0; k < p.k; ++k) {
          const double product = static_cast<double>(x[k]) * a[k];
          sum += product;
          absolute += std::fabs(product);
          x_absolute += std::fabs(static_cast<double>(x[k]));
          a_absolute += std::fabs(static_cast<double>(a[k]));
        }
        double error = (p.k * d + kSingle + (x_in_pieces ? kTf32Pair : 0)) * absolute;
        error += a_storage[i].relative * absolute + a_storage[i].absolute * x_absolute + 0x1p-149 * p.k;
        if (x_in_pieces) error += kTf32Underflow * a_absolute;
        h.push_back(c * sum);
        h_error.push_back(std::fabs(c) * error + h_roundoff[i] * std::fabs(c * sum));
        if (h_half[i]) half_largest = std::max(half_largest, std::fabs(c * sum));
      }
    }
    for (const Problem* other : beside) half_largest = std::max(half_largest, largest_h(*other, m));
    if (arithmetic.operands16 && half_largest > 0) {
      size_t at = 0;
      for (size_t i = 0; i < p.adapters.size(); ++i) {
        for (int r = 0; r < p.adapters[i].rank; ++r, ++at)
          h_error[at] += h_half[i] && applies(p, m, i) ? 0x1p-24 * half_largest : 0;
      }
    }

    for (int n = 0; n < p.n; ++n) {
      const int64_t at = static_cast<int64_t>(m) * p.n + n;
      const int8_t* w = &p.w[static_cast<int64_t>(n) * p.k];
      const double s_w = w_scale(p, n), w_absolute = w_absolutes[n];
      double y = 0, error = 0, terms = 0;  // terms: what the last sum adds, in absolute values

      if (w8a16) {
        double absolute = 0;
        for (int k = 0; k < p.k; ++k) {
          const double weight = weight_at(p, n, k);
          y += x[k] * weight;
          absolute += std::fabs(x[k] * weight);
        }
        y *= s_w;
        error += ((p.k + sums) * d + kSingle + (x_in_pieces ? kThreePieces : 0)) * std::fabs(s_w) * absolute;
        error += 0x1p-149 * p.k * most_scale + (x_in_pieces ? kBf16Underflow * std::fabs(s_w) * w_absolute : 0);
        terms += std::fabs(y);
      } else {
        double base = static_cast<double>(q.row_scale[m]) * s_w * q.sums[at];
        if (q.undefined[m]) {  // some code of -128 to 127 for every element
          base = 0;
          error += q.row_scale[m] * std::fabs(s_w) * 128 * w_absolute;
        }
        double sum = 0, absolute = 0;
        for (int k = 0; outliers && k < p.k; ++k) {
          if (!q.outlier[k]) continue;
          sum += static_cast<double>(x[k]) * w[k];
          absolute += std::fabs(static_cast<double>(x[k]) * w[k]);
        }
        y = base + s_w * sum;
        error += 3 * kSingle * std::fabs(base) + 0x1p-149 * (1.0 + std::abs(static_cast<double>(q.sums[at])));
        error += (outliers * d + kSingle + (x_in_pieces ? kPair : 0)) * std::fabs(s_w) * absolute;
        if (outliers && x_in_pieces) error += kBf16Underflow * std::fabs(s_w) * w_absolute;
        terms += std::fabs(base) + std::fabs(s_w) * absolute;
      }

      const Factor* const factor = &factors[n * (count + 1)];
      const bool composed = std::any_of(p.adapters.begin(), p.adapters.end(),
                                        [](const Adapter& adapter) { return !adapter.magnitude.empty(); });
      if (composed) {
        error = std::fabs(factor[0].value) * (error + (factor[0].error + 2 * kSingle) * (std::fabs(y) + error));
        y *= factor[0].value;
        terms *= std::fabs(factor[0].value);
      }

      size_t j = 0;
      for (size_t i = 0; i < count; ++i) {
        const Adapter& adapter = p.adapters[i];
        if (!applies(p, m, i)) {
          j += adapter.rank;
          continue;
        }
        const double f = std::fabs(factor[i].value);
        for (int r = 0; r < adapter.rank; ++r, ++j) {
          double b = b_at(adapter, n, r);
          double b_error = b_storage[i].relative * std::fabs(b) + b_storage[i].absolute;
          if (composed) {
            const double fits = adapter.split ? kPair : b_storage[i].bfloat ? 0x1p-8 : 0x1p-11;
            const double rounding = arithmetic.operands16 ? fits : 2 * kSingle;
            b_error = f * (b_error + (factor[i].error + rounding) * (std::fabs(b) + b_error));
            if (arithmetic.operands16) b_error += 0x1p-25 * std::max(1.0, b_largest[i]);
            b *= factor[i].value;
          }
          y += h[j] * b;
          terms += std::fabs(h[j] * b);
          error += h_error[j] * (std::fabs(b) + b_error) + std::fabs(h[j]) * b_error + 0x1p-149;
          if (adapter.split && arithmetic.operands16) error += kPair * std::fabs(h[j] * b);
        }
        if (!adapter.bias.empty()) {
          const double bias = factor[i].value * adapter.scale * adapter.bias[n];
          error += (composed ? factor[i].error + kSingle : 0) * std::fabs(bias);
          y += bias;
          terms += std::fabs(bias);
          error += 2 * kSingle * std::fabs(bias);
          if (arithmetic.operands16) error += (h_roundoff[i] + kPair) * std::fabs(bias);
        }
      }
      if (!p.bias.empty()) {
        y += p.bias[n];
        terms += std::fabs(p.bias[n]);
      }
      error += (total_rank + 8) * d * terms;
      finish(p, m, n, arithmetic, y, error);
      e.y[at] = y;
      e.bound[at] = error + unit_roundoff(p.y_type) * (std::fabs(y) + error) + tiny(p.y_type);
    }
  }
  return e;
}

void expect_close(const Problem& p, const Expected& want, const std::vector<uint8_t>& y) {
  const int bytes = format(p.y_type).bytes;
  // From here on a value rounds to an infinity.
  const double overflow = largest(p.y_type) * (1 + unit_roundoff(p.y_type) / 2);
  int64_t wrong = 0;
  std::string first;
  for (int m = 0; m < p.m; ++m) {
    for (int n = 0; n < p.n; ++n) {
      const int64_t i = static_cast<int64_t>(m) * p.n + n;
      const double got = decode(p.y_type, &y[i * bytes]);
      const char* why = nullptr;
      double exact = want.y[i], bound = want.bound[i];
      if (want.not_finite[m]) {
        if (std::isfinite(got)) why = "finite, though its row of x is not";
        exact = bound = NAN;
      } else if (p.exact) {
        exact = round_to(p.y_type, exact);
        bound = 0;
        if (got != exact) why = "not the exact result rounded once";
      } else if (std::isnan(got)) {
        why = "NaN";
      } else if (std::isinf(got)) {
        if (std::copysign(1.0, got) * exact + bound < overflow) why = "infinite";
      } else if (std::fabs(got - exact) > bound) {
        why = "too far";
      }
      if (!why) continue;
      if (wrong++ == 0) {
        first = text("y[%d,%d] = %.9g, expected %.9g within %.3g (%s)", m, n, got, exact, bound, why);
      }
    }
  }
  if (wrong) {
    fail("%s; %lld of %lld elements wrong", first.c_str(), static_cast<long long>(wrong),
         static_cast<long long>(p.m) * p.n);
  }
}

}  // namespace test
