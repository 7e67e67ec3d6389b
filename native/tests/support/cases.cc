// SPDX-License-Identifier: Apache-2.0
#include "cases.h"

#include <algorithm>
#include <array>
#include <set>

#include "harness.h"

namespace test {
namespace {

constexpr float kThreshold = 6.f;
constexpr Type kTypes[] = {Type::f32, Type::f16, Type::bf16};

const char* fill_name(Fill fill) {
  static const char* const names[] = {"normal", "exact", "zero_rows", "nan_rows", "inf_rows", "subnormal", "huge"};
  return names[static_cast<int>(fill)];
}

// ---- x ----

// Integers small enough that every sum is exact. 127 in column 0 makes the quantizer's step 1; with a threshold the
// last columns hold 200, above it, and nothing between.
void fill_exact(const Spec& s, Random& random, Problem& p) {
  for (int m = 0; m < s.m; ++m) {
    for (int k = 0; k < s.k; ++k) {
      double v = random.between(-2, 2);
      if (k == 0) v = random.coin() ? 127 : -127;
      if (s.outlier_columns > 0 && k >= s.k - std::min(s.outlier_columns, s.k - 1) && random.below(3)) v = 200;
      p.x.set(static_cast<int64_t>(m) * s.k + k, v);
    }
  }
}

void fill_random(const Spec& s, Random& random, Problem& p) {
  double magnitude = 1;
  if (s.fill == Fill::subnormal) magnitude = s.x_type == Type::f16 ? 0x1p-18 : 0x1p-129;
  if (s.fill == Fill::huge) magnitude = s.x_type == Type::f16 || s.round_x ? 8000 : 1e28;
  const int most = std::min(s.outlier_columns, s.k);
  std::vector<uint8_t> column(s.k);
  for (int count = 0; count < most;) {
    uint8_t& taken = column[most == s.k ? count : random.below(s.k)];
    count += !taken;
    taken = 1;
  }
  for (int m = 0; m < s.m; ++m) {
    const bool special = m % 3 == 1 || s.m == 1;
    for (int k = 0; k < s.k; ++k) {
      double v = magnitude * std::min(5.5, std::max(-5.5, random.normal()));
      if (s.outlier_columns > 0 && column[k] && (m % 2 == 0 || random.below(4) == 0)) v = random.coin() ? 11.3 : -40.7;
      if (s.outlier_columns > 0 && column[k] && m == 0 && k % 5 == 0)
        v = kThreshold;  // the boundary belongs to the outliers
      if (s.fill == Fill::zero_rows && special) v = 0;
      p.x.set(static_cast<int64_t>(m) * s.k + k, v);
    }
    if (special && s.fill == Fill::nan_rows) p.x.set(static_cast<int64_t>(m) * s.k + random.below(s.k), NAN);
    if (special && s.fill == Fill::inf_rows) {
      p.x.set(static_cast<int64_t>(m) * s.k + random.below(s.k), random.coin() ? INFINITY : -INFINITY);
    }
  }
}

// ---- Adapters ----

Adapter make_adapter(const Spec& s, const Spec::AdapterSpec& a, Random& random) {
  Adapter adapter;
  adapter.rank = a.rank;
  adapter.b_stride = a.rank + random.below(2) * 3;
  adapter.scale = a.scale;
  adapter.split = a.split;
  adapter.a = Typed(a.a_type, static_cast<size_t>(a.rank) * s.k);
  adapter.b = Typed(a.b_type, static_cast<size_t>(s.n) * adapter.b_stride);
  if (s.fill == Fill::exact) {
    // |x.A^T| <= 2 * 100 and multiples of 1 or 1/2: eight bits, which bf16 holds. Columns with large x stay 0.
    adapter.scale = a.scale == 0 ? 0.f : a.scale < 0 ? -1.f : a.scale < 0.6f ? 0.5f : 1.f;
    const int first = 1, last = s.k - (s.outlier_columns > 0 ? std::min(s.outlier_columns, s.k) : 0);
    for (int r = 0; r < a.rank; ++r) {
      for (int i = 0; i < 100 && last > first; ++i) {
        adapter.a.set(static_cast<int64_t>(r) * s.k + random.between(first, last - 1), random.coin() ? 1 : -1);
      }
    }
    for (int64_t i = 0; i < static_cast<int64_t>(adapter.b.size()); ++i) adapter.b.set(i, random.between(-2, 2));
  } else {
    const double a_size = 1 / std::sqrt(static_cast<double>(s.k)),
                 b_size = 0.3 / std::sqrt(static_cast<double>(a.rank));
    for (size_t i = 0; i < adapter.a.size(); ++i) adapter.a.set(i, a_size * random.normal());
    for (size_t i = 0; i < adapter.b.size(); ++i) adapter.b.set(i, b_size * random.normal());
  }
  // What lies between the rows of B is not the adapter's.
  for (int n = 0; n < s.n; ++n) {
    for (int i = a.rank; i < adapter.b_stride; ++i) adapter.b.set(static_cast<int64_t>(n) * adapter.b_stride + i, NAN);
  }
  if (a.bias) {
    adapter.bias.resize(s.n);
    for (float& b : adapter.bias)
      b = static_cast<float>(s.fill == Fill::exact ? random.between(-100, 100) : random.normal());
  }
  // From a third to three times the length of the row of W.
  if (a.magnitude) {
    adapter.magnitude.resize(s.n);
    for (float& m : adapter.magnitude) m = static_cast<float>(0.4 * std::sqrt(s.k) * (0.3 + 3 * random.uniform()));
  }
  return adapter;
}

}  // namespace

// ---- What follows the linear ----

const char* activation_name(int32_t activation) {
  static const char* const names[] = {"", " gelu_tanh", " gelu_erf", " silu"};
  return names[activation];
}

void fill_row_slots(const Spec& s, Random& random, Problem& p) {
  if (s.row_slots == RowSlots::all) return;
  const int slots = static_cast<int>(s.adapters.size());
  p.row_slot.assign(s.m, -1);
  if (s.row_slots == RowSlots::no_slot) return;
  for (int m = 0; m < s.m; ++m) {
    // From -1 to a number too many.
    p.row_slot[m] = s.row_slots == RowSlots::shuffled
                        ? random.between(-1, slots)
                        : static_cast<int32_t>(static_cast<int64_t>(m) * (slots + 2) / s.m) - 1;
  }
  if (s.row_slots == RowSlots::shuffled && s.m > 2) p.row_slot[random.below(s.m)] = INT32_MAX;
}

void fill_epilogue(const Spec& s, Random& random, Problem& p) {
  p.activation = s.activation;
  if (s.gate) {
    p.gate = Typed(s.y_type, s.n);
    // Where sums are exact, factors that keep them so.
    for (int n = 0; n < s.n; ++n) p.gate.set(n, p.exact ? random.between(-1, 2) : random.normal());
  }
  if (s.residual) {
    p.residual = Typed(s.y_type, static_cast<size_t>(s.m) * s.n);
    for (size_t i = 0; i < p.residual.size(); ++i)
      p.residual.set(i, p.exact ? random.between(-100, 100) : 3 * random.normal());
  }
}

std::string Spec::name() const {
  static const char* const modes[] = {"w8a16", "dynamic", "static"};
  std::string s = text("%s%s%s m=%d n=%d k=%d %s->%s %s%s%s", modes[mode], round_x ? "+round" : "",
                       x_divisor == 127.5f ? "/127.5" : "", m, n, k, format(x_type).name, format(y_type).name,
                       fill_name(fill), bias ? " bias" : "", scale_per_channel ? "" : " tensor_scale");
  if (scale_block) s += text(" blocks=%d", scale_block);
  if (outlier_columns == kAll) s += " outliers=all";
  if (outlier_columns >= 0 && outlier_columns != kAll) s += text(" outliers=%d", outlier_columns);
  for (const AdapterSpec& a : adapters) {
    s += text(" [r=%d %s/%s c=%g%s%s]", a.rank, format(a.a_type).name, format(a.b_type).name, a.scale,
              a.split ? " split" : "",
              a.bias        ? " bias"
              : a.magnitude ? " dora"
                            : "");
  }
  static const char* const rows[] = {"", " rows=blocks", " rows=shuffled", " rows=-1"};
  s += rows[static_cast<int>(row_slots)];
  s += activation_name(activation);
  if (gate) s += " gate";
  if (residual) s += " residual";
  if (x_offset || y_offset) s += text(" offset=%d,%d", x_offset, y_offset);
  return s + text(" seed=%llu", static_cast<unsigned long long>(seed));
}

Problem make_problem(const Spec& s) {
  Random random(s.seed);
  Problem p;
  p.m = s.m;
  p.n = s.n;
  p.k = s.k;
  p.mode = s.mode;
  p.round_x = s.round_x;
  p.x_divisor = s.x_divisor;
  p.y_type = s.y_type;
  p.exact = s.fill == Fill::exact;
  p.w.resize(static_cast<size_t>(s.n) * s.k);
  for (int8_t& w : p.w) w = static_cast<int8_t>(random.between(-128, 127));
  p.w_scale.resize(s.scale_per_channel ? s.n : 1);
  for (float& v : p.w_scale) {
    v = p.exact ? static_cast<float>(std::ldexp(1.0, -random.below(3)))
                : static_cast<float>(0.001 + 0.01 * random.uniform());
  }
  p.scale_block = s.scale_block;
  if (s.scale_block) {
    p.block_scale = Typed(Type::f16, static_cast<size_t>(s.n) * ((s.k + s.scale_block - 1) / s.scale_block));
    // Some are subnormal, some zero, some negative; a row is not all zeros, which no magnitude could bring to a length.
    const double sizes[] = {1, 1, 1, 0x1p-16, 0};
    for (size_t i = 0; i < p.block_scale.size(); ++i) {
      const bool first = i % (p.block_scale.size() / s.n) == 0;
      const double size = sizes[random.below(first ? 3 : 5)] * (random.coin() ? 1 : -1);
      p.block_scale.set(i, p.exact ? std::ldexp(1.0, -random.below(2)) : size * (0.2 + 2 * random.uniform()));
    }
  }
  if (s.bias) {
    p.bias.resize(s.n);
    for (float& b : p.bias) b = static_cast<float>(p.exact ? random.between(-1000, 1000) : random.normal());
  }
  p.x = Typed(s.x_type, static_cast<size_t>(s.m) * s.k);
  if (p.exact) {
    fill_exact(s, random, p);
  } else {
    fill_random(s, random, p);
  }
  if (s.outlier_columns >= 0) p.threshold = p.exact ? 150.f : s.outlier_columns == Spec::kAll ? 1e-3f : kThreshold;
  if (s.mode == OCTOLORA_W8A8_STATIC) {
    const double largest = s.fill == Fill::huge        ? (s.x_type == Type::f16 || s.round_x ? 8000 : 1e28)
                           : s.fill == Fill::subnormal ? (s.x_type == Type::f16 ? 0x1p-18 : 0x1p-126)
                                                       : 1;
    p.x_scale = p.exact ? 1.f : static_cast<float>(largest * 3.1 / 127);  // so that some codes are clamped
  }
  for (const Spec::AdapterSpec& a : s.adapters) p.adapters.push_back(make_adapter(s, a, random));
  fill_row_slots(s, random, p);
  fill_epilogue(s, random, p);
  return p;
}

// ---- The selection ----

namespace {

// What the factors of a case are drawn from; the numbers count the rows of tables in spec_of.
struct Levels {
  std::vector<int> edges, ranks;
  std::vector<Fill> fills;
  std::vector<int> modes, adapters, epilogues;
};
// 16, 32, 64, 128, 192 and 256 are the tile sizes of kernels; an edge case lies on either side of each.
const Levels kAllLevels = {
    {1, 2, 5, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 191, 192, 193, 255, 256, 257},
    {1, 5, 8, 16, 33, 64, 128, 512},
    {Fill::normal, Fill::exact, Fill::zero_rows, Fill::nan_rows, Fill::inf_rows, Fill::subnormal, Fill::huge},
    {0, 1, 2, 3, 4, 5, 6, 7},
    {0, 1, 2, 3, 4, 5, 6},
    {0, 1, 2, 3, 4, 5}};
// For sanitizers, which look at accesses and not at numbers: what takes another branch.
const Levels kQuickLevels = {{1, 16, 17, 33, 65}, {1, 8, 16, 33},  {Fill::normal, Fill::exact, Fill::nan_rows},
                             {0, 1, 2, 4, 6},     {0, 3, 4, 5, 6}, {0, 1, 4, 5}};

enum Factor {
  kMode,
  kXType,
  kYType,
  kBias,
  kScale,
  kM,
  kN,
  kK,
  kAdapters,
  kRank,
  kOutliers,
  kFill,
  kOffset,
  kEpilogue,
  kRows,
  kFactors
};

Spec spec_of(const std::vector<int>& level, const Levels& levels, uint64_t seed) {
  Random random(seed);
  Spec s;
  s.seed = seed;
  static const struct {
    int32_t mode;
    bool round;
    float divisor;
    int scale_block = 0;
  } modes[] = {{OCTOLORA_W8A16, false, 127.f},       {OCTOLORA_W8A8_DYNAMIC, false, 127.f},
               {OCTOLORA_W8A8_DYNAMIC, true, 127.f}, {OCTOLORA_W8A8_DYNAMIC, false, 127.5f},
               {OCTOLORA_W8A8_STATIC, false, 127.f}, {OCTOLORA_W8A8_STATIC, true, 127.f},
               {OCTOLORA_W8A16, false, 127.f, 32},   {OCTOLORA_W8A16, false, 127.f, 96}};
  const auto& mode = modes[levels.modes[level[kMode]]];
  s.mode = mode.mode;
  s.round_x = mode.round;
  s.x_divisor = mode.divisor;
  s.scale_block = mode.scale_block;
  s.x_type = kTypes[level[kXType]];
  s.y_type = kTypes[level[kYType]];
  s.bias = level[kBias];
  s.scale_per_channel = level[kScale];
  s.m = levels.edges[level[kM]];
  s.n = levels.edges[level[kN]];
  s.k = levels.edges[level[kK]];
  s.fill = levels.fills[level[kFill]];
  if (s.fill == Fill::exact) s.x_divisor = 127.f;  // the other divisor has no exact step
  static const int outliers[] = {-1, 0, 1, 7, Spec::kAll};
  if (s.mode == OCTOLORA_W8A8_DYNAMIC) s.outlier_columns = outliers[level[kOutliers]];
  static const int offsets[][2] = {{0, 0}, {1, 0}, {0, 1}, {3, 5}};
  s.x_offset = offsets[level[kOffset]][0];
  s.y_offset = offsets[level[kOffset]][1];

  static const struct {
    int32_t activation;
    bool gate, residual;
  } epilogues[] = {{OCTOLORA_ACTIVATION_NONE, false, false},    {OCTOLORA_ACTIVATION_NONE, true, true},
                   {OCTOLORA_ACTIVATION_NONE, false, true},     {OCTOLORA_ACTIVATION_GELU_TANH, false, false},
                   {OCTOLORA_ACTIVATION_GELU_ERF, true, false}, {OCTOLORA_ACTIVATION_SILU, true, true}};
  const auto& epilogue = epilogues[levels.epilogues[level[kEpilogue]]];
  s.activation = epilogue.activation;
  s.gate = epilogue.gate;
  s.residual = epilogue.residual;
  if (s.fill == Fill::exact) s.activation = OCTOLORA_ACTIVATION_NONE;
  s.row_slots = static_cast<RowSlots>(level[kRows]);

  const std::vector<int>& ranks = levels.ranks;
  const int rank = ranks[level[kRank]];
  auto add = [&](int r, Type a, Type b, float scale, bool split, bool bias) {
    s.adapters.push_back({r, a, b, scale, split, bias});
  };
  const int any = random.below(3);
  switch (levels.adapters[level[kAdapters]]) {
    case 0:
      break;
    case 1:
      add(rank, Type::f16, Type::f16, 0.7f, false, false);
      break;
    case 2:
      add(rank, Type::bf16, Type::bf16, 1.5f, false, true);
      break;
    case 3:
      add(rank, Type::f32, Type::f32, 0.4f, false, false);
      break;
    case 4:
      add(rank, Type::f32, kTypes[any], -1.25f, true, true);
      break;
    case 5:
      add(rank, Type::f32, Type::f32, 0.7f, false, true);
      add(ranks[(level[kRank] + 3) % ranks.size()], Type::bf16, Type::bf16, 0.4f, false, false);
      break;
    default:
      add(rank, Type::bf16, Type::f16, 0.7f, false, false);
      add(5, Type::f16, kTypes[any], 0.f, false, true);
      add(8, Type::f32, Type::bf16, -2.5f, false, false);
  }
  return s;
}

}  // namespace

std::vector<Spec> pairwise_specs(uint64_t seed, bool quick) {
  const Levels& from = quick ? kQuickLevels : kAllLevels;
  const int edge_levels = static_cast<int>(from.edges.size());
  std::vector<int> levels(kFactors);
  levels[kMode] = static_cast<int>(from.modes.size());
  levels[kXType] = levels[kYType] = 3;
  levels[kBias] = levels[kScale] = 2;
  levels[kM] = levels[kN] = levels[kK] = edge_levels;
  levels[kAdapters] = static_cast<int>(from.adapters.size());
  levels[kRank] = static_cast<int>(from.ranks.size());
  levels[kOutliers] = 5;
  levels[kFill] = static_cast<int>(from.fills.size());
  levels[kOffset] = 4;
  levels[kEpilogue] = static_cast<int>(from.epilogues.size());
  levels[kRows] = 4;

  // Greedy: of some random candidates, the one with the most pairs not seen yet; half of the candidates are built
  // around such a pair, so that the last ones are found.
  Random random(seed);
  using Pair = std::array<int, 4>;
  std::set<Pair> open;
  for (int f = 0; f < kFactors; ++f) {
    for (int g = f + 1; g < kFactors; ++g) {
      for (int i = 0; i < levels[f]; ++i) {
        for (int j = 0; j < levels[g]; ++j) open.insert({f, i, g, j});
      }
    }
  }
  std::vector<Spec> specs;
  while (!open.empty()) {
    std::vector<int> best;
    int best_count = -1;
    for (int candidate = 0; candidate < (quick ? 100 : 12); ++candidate) {
      std::vector<int> level(kFactors);
      for (int f = 0; f < kFactors; ++f) level[f] = random.below(levels[f]);
      if (candidate % 2) {
        auto at = open.lower_bound({random.below(kFactors), random.below(edge_levels), 0, 0});
        if (at == open.end()) at = open.begin();
        level[(*at)[0]] = (*at)[1];
        level[(*at)[2]] = (*at)[3];
      }
      int count = 0;
      for (int f = 0; f < kFactors; ++f) {
        for (int g = f + 1; g < kFactors; ++g) count += static_cast<int>(open.count({f, level[f], g, level[g]}));
      }
      if (count > best_count) {
        best_count = count;
        best = level;
      }
    }
    if (best_count == 0) continue;
    for (int f = 0; f < kFactors; ++f) {
      for (int g = f + 1; g < kFactors; ++g) open.erase({f, best[f], g, best[g]});
    }
    specs.push_back(spec_of(best, from, random.next() % 1000000));
  }
  return specs;
}

std::vector<Spec> corner_specs(uint64_t seed, bool quick) {
  std::vector<Spec> specs;
  Random random(seed + 1);
  auto add = [&](Spec s) {
    s.seed = random.next() % 1000000;
    specs.push_back(s);
  };
  const struct {
    int32_t mode;
    int scale_block;
  } kinds[] = {{OCTOLORA_W8A16, 0}, {OCTOLORA_W8A8_DYNAMIC, 0}, {OCTOLORA_W8A8_STATIC, 0}, {OCTOLORA_W8A16, 32}};
  const Spec::AdapterSpec f16 = {16, Type::f16, Type::f16, 0.7f, false, false};
  const Spec::AdapterSpec bf16 = {33, Type::bf16, Type::bf16, 0.4f, false, true};
  for (const auto& kind : kinds) {
    Spec s;
    s.mode = kind.mode;
    s.scale_block = kind.scale_block;
    s.adapters = {f16, bf16};
    s.bias = true;
    s.m = 0, s.n = 33, s.k = 65;
    add(s);  // no rows
    s.m = s.n = s.k = 1;
    for (Type x : kTypes) {
      s.x_type = s.y_type = x;
      add(s);
    }
    // The longest sum, and layers as wide and as long as real ones, exactly.
    s.x_type = s.y_type = Type::f32;
    s.fill = Fill::exact;
    s.m = 3, s.n = 9, s.k = quick ? 700 : 4097;
    add(s);
    if (quick) continue;
    s.fill = Fill::normal;
    s.m = 2, s.n = 5, s.k = OCTOLORA_MAX_K;
    add(s);
    s.fill = Fill::exact;
    s.m = 130, s.n = 1000, s.k = 1024;
    for (Type x : kTypes) {
      s.x_type = x;
      add(s);
    }
    s.m = 7, s.n = 4099, s.k = 640;
    add(s);
    // Rows longer than any piece that a kernel takes at a time, with outliers in every piece.
    if (s.mode == OCTOLORA_W8A8_DYNAMIC) {
      Spec wide = s;
      wide.m = 35, wide.n = 70, wide.k = 9001;
      for (Fill fill : {Fill::exact, Fill::normal}) {
        for (int columns : {60, 2500}) {
          wide.fill = fill;
          wide.outlier_columns = columns;
          add(wide);
        }
      }
    }
    s.m = 1, s.n = 3072, s.k = 3072, s.y_type = Type::bf16;
    add(s);
    s.m = 1500, s.n = 40, s.k = 136, s.y_type = Type::f16;
    add(s);
  }
  return specs;
}

}  // namespace test
