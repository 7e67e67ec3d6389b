// SPDX-License-Identifier: Apache-2.0
//
// Forward and quantized sums of every kind of linear against the double-precision oracle.
#include <cstring>

#include "support/cases.h"
#include "support/runner.h"

namespace test {
namespace {

std::vector<int32_t> capacities(const Problem& p) {
  std::vector<int32_t> capacity;
  for (const Adapter& a : p.adapters) capacity.push_back(a.rank);
  return capacity;
}

bool any_split(const Problem& p) {
  bool split = false;
  for (const Adapter& a : p.adapters) split = split || a.split;
  return split;
}

// None where there are no adapters.
Slots filled_slots(octolora_linear* linear, const Problem& p) {
  if (p.adapters.empty()) return nullptr;
  Slots slots = make_slots(linear, capacities(p), any_split(p));
  for (size_t i = 0; i < p.adapters.size(); ++i) {
    const octolora_adapter_desc desc = describe(p.adapters[i]);
    CHECK_OK(octolora_slots_set(slots.get(), static_cast<int32_t>(i), &desc, p.adapters[i].scale, nullptr));
  }
  return slots;
}

// Rows in which y is finite, byte for byte.
void expect_same_rows(const Problem& p, const Expected& want, const std::vector<uint8_t>& a,
                      const std::vector<uint8_t>& b, const char* what) {
  const size_t row = static_cast<size_t>(p.n) * format(p.y_type).bytes;
  for (int m = 0; m < p.m; ++m) {
    if (want.not_finite[m]) continue;
    for (size_t i = m * row; i < (m + 1) * row; ++i) {
      if (a[i] == b[i]) continue;
      const size_t element = i / format(p.y_type).bytes, at = element * format(p.y_type).bytes;
      fail("%s: y[%d,%d] = %.9g and %.9g", what, m, static_cast<int>(element % p.n), decode(p.y_type, &a[at]),
           decode(p.y_type, &b[at]));
    }
  }
}

bool uses_a_slot(const Problem& p, int m) {
  return p.row_slot.empty() || (p.row_slot[m] >= 0 && p.row_slot[m] < static_cast<int>(p.adapters.size()));
}

// want, with the rows that use a slot taken out.
Expected rows_without_slot(const Problem& p, const Expected& want) {
  Expected rows = want;
  for (int m = 0; m < p.m; ++m) rows.not_finite[m] |= uses_a_slot(p, m);
  return rows;
}

void forward_case(const Options& options, octolora_device* device, const Spec& spec) {
  const Problem p = make_problem(spec);
  const Expected want = evaluate(p, options.cuda() ? kCudaArithmetic : kCpuArithmetic);
  const uint64_t before = memory_in_use(device);
  {
    const Linear linear = make_linear(device, p);
    const Slots slots = filled_slots(linear.get(), p);
    Runner runner(device, options.cuda(), linear.get(), slots.get(), p, spec.x_offset, spec.y_offset);
    const uint64_t ready = memory_in_use(device);
    const std::vector<uint8_t> y = runner.forward();
    if (memory_in_use(device) != ready) fail("a forward changed memory_in_use");
    expect_close(p, want, y);
    if (!options.quick) expect_same_rows(p, want, y, runner.forward(), "the same call again");

    if (!p.adapters.empty()) {  // slots that add nothing give the bits of the base alone
      const std::vector<uint8_t> base = runner.forward(nullptr);
      expect_same_rows(p, rows_without_slot(p, want), base, y, "no slots and rows that use none");
      for (size_t i = 0; i < p.adapters.size(); ++i) {
        CHECK_OK(octolora_slots_set_scale(slots.get(), static_cast<int32_t>(i), 0.f, nullptr));
      }
      expect_same_rows(p, want, base, runner.forward(), "no slots and slots of scale 0");
      for (size_t i = 0; i < p.adapters.size(); ++i) {
        CHECK_OK(octolora_slots_clear(slots.get(), static_cast<int32_t>(i), nullptr));
      }
      expect_same_rows(p, want, base, runner.forward(), "no slots and empty slots");
    }
    runner.expect_intact();
  }
  if (memory_in_use(device) != before)
    fail("%llu bytes in use are left", (unsigned long long)(memory_in_use(device) - before));
}

// Several linears on one x: each output is what its linear gives.
void group_case(const Options& options, octolora_device* device, const std::vector<Spec>& specs, bool in_place) {
  std::vector<Problem> problems;
  for (const Spec& spec : specs) problems.push_back(make_problem(spec));
  for (Problem& p : problems) p.x = problems[0].x, p.row_slot = problems[0].row_slot;
  std::vector<Linear> linears;
  std::vector<Slots> slots;
  std::vector<Runner::Member> members;
  for (const Problem& p : problems) {
    linears.push_back(make_linear(device, p));
    slots.push_back(filled_slots(linears.back().get(), p));
    members.push_back({linears.back().get(), slots.back().get(), &p});
  }
  Runner runner(device, options.cuda(), members, specs[0].x_offset, specs[0].y_offset, in_place);
  const uint64_t ready = memory_in_use(device);
  runner.forward();
  if (memory_in_use(device) != ready) fail("a forward changed memory_in_use");
  std::vector<std::vector<uint8_t>> y;
  for (size_t i = 0; i < problems.size(); ++i) {
    std::vector<const Problem*> beside;
    for (size_t j = 0; j < problems.size(); ++j)
      if (j != i) beside.push_back(&problems[j]);
    y.push_back(runner.read_y(i));
    const Expected want = evaluate(problems[i], options.cuda() ? kCudaArithmetic : kCpuArithmetic, beside);
    try {
      expect_close(problems[i], want, y[i]);
    } catch (const Failure& failure) {
      fail("output %zu: %s", i, failure.what());
    }
    // Where the linears share nothing but the codes, each has the bits that it has alone.
    if (!options.cuda()) {
      Runner alone(device, false, {members[i]}, specs[0].x_offset, specs[0].y_offset, in_place);
      expect_same_rows(problems[i], want, y[i], alone.forward(), "in a group and alone");
    }
  }
  runner.expect_intact();
  runner.forward();
  for (size_t i = 0; i < problems.size(); ++i)
    if (runner.read_y(i) != y[i]) fail("output %zu: the same call gives other bits", i);
}

// Groups of 2 to 4 outputs, and one of as many as there may be, with everything drawn at random but x.
std::vector<std::vector<Spec>> group_specs(const Options& options) {
  Random random(options.seed + 7);
  std::vector<std::vector<Spec>> groups;
  const int32_t modes[] = {OCTOLORA_W8A8_DYNAMIC, OCTOLORA_W8A16, OCTOLORA_W8A8_STATIC, OCTOLORA_W8A8_DYNAMIC};
  const int count = options.quick ? 6 : 60;
  for (int i = 0; i < count; ++i) {
    Spec shared;
    shared.mode = modes[i % 4];
    if (i % 8 == 3) shared.outlier_columns = 5;
    shared.x_type = static_cast<Type>(random.below(3));
    shared.y_type = static_cast<Type>(random.below(3));
    shared.row_slots = static_cast<RowSlots>(i / 3 % 4);
    shared.m = random.between(1, options.quick ? 40 : 200);
    shared.k = random.between(1, options.quick ? 80 : 400);
    if (i % 5 == 0) shared.k = (shared.k + 7) / 8 * 8;  // x may be read where it is
    if (i % 6 == 1) shared.x_offset = random.below(4), shared.y_offset = random.below(4);
    if (i % 10 == 9) shared.fill = Fill::exact;
    if (i % 20 == 4) shared.fill = Fill::nan_rows;
    std::vector<Spec> group(i % 16 == 15 ? OCTOLORA_MAX_OUTPUTS : random.between(2, 4), shared);
    for (Spec& s : group) {
      s.seed = random.next() % 1000000;
      s.n = random.between(1, options.quick ? 70 : 300);
      if (random.coin()) s.n = (s.n + 7) / 8 * 8;
      s.bias = random.coin();
      s.scale_per_channel = random.coin();
      if (s.mode == OCTOLORA_W8A16 && random.coin()) s.scale_block = 32;
      s.activation = shared.fill == Fill::exact ? OCTOLORA_ACTIVATION_NONE : random.below(4);
      s.gate = random.coin();
      s.residual = random.coin();
      for (int j = random.below(4); j > 0; --j) {
        const Type type = static_cast<Type>(random.below(3));
        s.adapters.push_back({random.between(1, 40), type, type, j == 2 ? -0.5f : 0.8f,
                              type == Type::f32 && random.coin(), random.coin()});
      }
    }
    groups.push_back(std::move(group));
  }
  // q, k, v and mlp as the large tiles take them: nothing after the bias, all of it, and rows with slots of their own.
  const struct {
    int32_t mode;
    int scale_block, outlier_columns;
  } kinds[] = {{OCTOLORA_W8A8_DYNAMIC, 0, -1},
               {OCTOLORA_W8A8_DYNAMIC, 0, 17},
               {OCTOLORA_W8A8_DYNAMIC, 0, 70},
               {OCTOLORA_W8A16, 0, -1},
               {OCTOLORA_W8A16, 32, -1}};
  for (const RowSlots rows : {RowSlots::all, RowSlots::blocks}) {
    for (const bool epilogue : {false, true}) {
      for (const auto& [mode, scale_block, outlier_columns] : kinds) {
        std::vector<Spec> group;
        for (const int n : {400, 136, 1032}) {
          Spec s;
          s.mode = mode;
          s.scale_block = scale_block;
          s.outlier_columns = outlier_columns;
          s.m = options.quick ? 70 : 300, s.n = options.quick ? n / 8 / 2 * 8 : n, s.k = options.quick ? 144 : 704;
          s.x_type = s.y_type = Type::bf16;
          s.row_slots = rows;
          s.bias = true;
          if (n != 136) s.adapters.push_back({16, Type::bf16, Type::bf16, 0.7f, false, true});
          if (n == 1032) s.adapters.push_back({70, Type::f16, Type::f16, 0.4f, false, false});
          s.activation = epilogue ? n % 3 + 1 : OCTOLORA_ACTIVATION_NONE;
          s.gate = epilogue && n != 400;
          s.residual = epilogue && n != 136;
          s.seed = random.next() % 1000000;
          group.push_back(s);
        }
        groups.push_back(std::move(group));
      }
    }
  }
  // The same with few rows.
  for (const int m : {5, 24}) {
    std::vector<Spec> group;
    for (const int n : {2000, 136, 4104}) {
      Spec s;
      s.mode = OCTOLORA_W8A8_DYNAMIC;
      s.m = m, s.n = options.quick ? n / 8 / 2 * 8 : n, s.k = options.quick ? 144 : 1160;
      s.x_type = Type::bf16;
      s.y_type = Type::f32;
      s.bias = n != 2000;
      if (n != 136) s.adapters.push_back({16, Type::bf16, Type::bf16, 0.7f, false, true});
      if (n == 4104) s.adapters.push_back({70, Type::f16, Type::f16, 0.4f, false, false});
      s.residual = n == 4104;
      s.seed = random.next() % 1000000;
      group.push_back(s);
    }
    groups.push_back(std::move(group));
  }
  return groups;
}

template <class T>
std::vector<T> typed(const std::vector<uint8_t>& bytes) {
  std::vector<T> values(bytes.size() / sizeof(T));
  if (!values.empty()) std::memcpy(values.data(), bytes.data(), bytes.size());
  return values;
}

// Codes, sums and row scales are equal bit for bit.
void expect_quantized(const Problem& p, const Quantized& want, const std::vector<int8_t>& codes,
                      const std::vector<int32_t>& sums, const std::vector<float>& row_scale) {
  for (int m = 0; m < p.m; ++m) {
    const bool undefined = want.undefined[m];
    bool finite = true;
    for (int k = 0; k < p.k; ++k) finite = finite && std::isfinite(p.x.value[static_cast<int64_t>(m) * p.k + k]);
    if (!undefined && std::memcmp(&want.row_scale[m], &row_scale[m], 4)) {
      fail("row_scale[%d] = %.9g, expected exactly %.9g", m, row_scale[m], want.row_scale[m]);
    }
    for (int k = 0; k < p.k; ++k) {
      const int64_t i = static_cast<int64_t>(m) * p.k + k;
      const bool defined = !undefined || want.outlier[k];
      if (defined && codes[i] != want.codes[i]) {
        fail("codes[%d,%d] = %d, expected %d (x = %.9g, row_scale = %.9g%s)", m, k, codes[i], want.codes[i],
             p.x.value[i], want.row_scale[m], want.outlier[k] ? ", outlier column" : "");
      }
    }
    // Whatever the codes of an undefined row are, its sums are theirs.
    for (int n = 0; n < p.n && (finite || !undefined); ++n) {
      const int64_t i = static_cast<int64_t>(m) * p.n + n;
      int64_t expected = want.sums[i];
      if (undefined) {
        expected = 0;
        for (int k = 0; k < p.k; ++k) {
          expected +=
              static_cast<int64_t>(codes[static_cast<int64_t>(m) * p.k + k]) * p.w[static_cast<int64_t>(n) * p.k + k];
        }
      }
      if (sums[i] != expected) fail("sums[%d,%d] = %d, expected exactly %lld", m, n, sums[i], (long long)expected);
    }
  }
}

void quantized_case(const Options& options, octolora_device* device, const Problem& p, int x_offset) {
  const Quantized want = quantize(p);
  const Linear linear = make_linear(device, p);
  const size_t rows = p.m, cuda = options.cuda();
  const size_t bytes = Runner::workspace_bytes(linear.get(), nullptr, p);
  Buffer x(device, cuda, p.x.bytes.size(), static_cast<size_t>(x_offset) * format(p.x.type).bytes);
  Buffer sums(device, cuda, rows * p.n * 4, 4), codes(device, cuda, rows * p.k, 1), scales(device, cuda, rows * 4, 4);
  Buffer workspace(device, cuda, bytes);
  x.write(p.x.bytes.data());
  auto run = [&](bool with_sums, bool with_codes, bool with_scales) {
    CHECK_OK(octolora_linear_quantized(
        linear.get(), x.get(), static_cast<int32_t>(p.x.type), with_sums ? static_cast<int32_t*>(sums.get()) : nullptr,
        with_codes ? static_cast<int8_t*>(codes.get()) : nullptr,
        with_scales ? static_cast<float*>(scales.get()) : nullptr, p.m, workspace.get(), bytes, nullptr));
    CHECK_OK(octolora_stream_synchronize(device, nullptr));
  };
  auto judge = [&] {
    expect_quantized(p, want, typed<int8_t>(codes.read()), typed<int32_t>(sums.read()), typed<float>(scales.read()));
  };
  run(true, true, true);
  judge();
  for (Buffer* b : {&sums, &codes, &scales}) b->clear();
  run(true, false, false);  // each output is optional and does not hang on another
  run(false, true, false);
  run(false, false, true);
  judge();
  for (Buffer* b : {&sums, &codes, &scales, &workspace, &x})
    b->expect_intact("an argument of octolora_linear_quantized");
}

// -128 * -128 and 127 * -128 all along the longest K: the sum that just fits an int32.
Problem extreme_sums(Type x_type, int32_t mode) {
  Problem p;
  p.m = 4;
  p.n = 3;
  p.k = OCTOLORA_MAX_K;
  p.mode = mode;
  p.x_divisor = 127.5f;  // a value of -a gives -127.5, whose nearest even is -128
  p.x_scale = 0.25f;
  p.w_scale = {0.5f};
  p.w.resize(static_cast<size_t>(p.n) * p.k);
  p.x = Typed(x_type, static_cast<size_t>(p.m) * p.k);
  for (int k = 0; k < p.k; ++k) {
    p.w[k] = -128;
    p.w[p.k + k] = 127;
    p.w[2 * p.k + k] = k % 2 ? 127 : -128;
    p.x.set(k, -1000.0);
    p.x.set(p.k + k, 1000.0);
    p.x.set(2 * p.k + k, k % 2 ? 1000.0 : -1000.0);
    p.x.set(3 * p.k + k, k == p.k - 1 ? -1000.0 : 0.0);
  }
  return p;
}

// Halves between two codes go to the even one, and the clamp takes what rounds beyond the range.
Problem ties() {
  Problem p;
  p.m = 3;
  p.n = 2;
  p.k = 300;
  p.mode = OCTOLORA_W8A8_STATIC;
  p.x_scale = 0.5f;
  p.w_scale = {1.f, 2.f};
  p.w.assign(static_cast<size_t>(p.n) * p.k, 1);
  p.x = Typed(Type::f32, static_cast<size_t>(p.m) * p.k);
  for (int k = 0; k < p.k; ++k) {
    p.x.set(k, (k - 150) * 0.5 + 0.25);
    p.x.set(p.k + k, std::nextafter((k - 150) * 0.5f + 0.25f, 1e9f));
    p.x.set(2 * p.k + k, std::nextafter((k - 150) * 0.5f + 0.25f, -1e9f));
  }
  return p;
}

// Weights that come in pieces are the same weights; before the first piece they are zeros.
void write_case(const Options& options, octolora_device* device) {
  Spec spec;
  spec.mode = OCTOLORA_W8A8_DYNAMIC;
  spec.m = 5, spec.n = 70, spec.k = 90, spec.bias = true, spec.seed = options.seed;
  const Problem p = make_problem(spec);
  octolora_linear_desc desc = describe(p);
  desc.weight = nullptr;
  octolora_linear* handle = nullptr;
  CHECK_OK(octolora_linear_create(device, &desc, &handle));
  const Linear linear(handle);

  Problem zeros = p;
  std::fill(zeros.w.begin(), zeros.w.end(), int8_t{0});
  const Arithmetic& arithmetic = options.cuda() ? kCudaArithmetic : kCpuArithmetic;
  Runner runner(device, options.cuda(), linear.get(), nullptr, p);
  expect_close(zeros, evaluate(zeros, arithmetic), runner.forward());

  const int cuts[] = {0, 1, 17, 64, 64, 70};
  for (int i = 4; i >= 0; --i) {
    CHECK_OK(
        octolora_linear_write(linear.get(), cuts[i], cuts[i + 1] - cuts[i], &p.w[static_cast<size_t>(cuts[i]) * p.k]));
  }
  const Linear whole = make_linear(device, p);
  Runner reference(device, options.cuda(), whole.get(), nullptr, p);
  if (runner.forward() != reference.forward()) fail("written in pieces and given at once differ");
  expect_close(p, evaluate(p, arithmetic), runner.forward());
}

// Layers of the size that the tiles were made for: many tiles in every direction, more blocks of K and of ranks than
// the pipelines have stages. The oracle judges some rows, at the edges of the tiles; where outlier columns tie the rows
// together, all of them.
void layer_case(const Options& options, octolora_device* device, const Spec& spec) {
  const Problem p = make_problem(spec);
  const Linear linear = make_linear(device, p);
  const Slots slots = filled_slots(linear.get(), p);
  Runner runner(device, options.cuda(), linear.get(), slots.get(), p);
  const std::vector<uint8_t> y = runner.forward();
  runner.expect_intact();
  if (!options.quick && runner.forward() != y) fail("the same call gives other bits");
  const size_t y_row = static_cast<size_t>(p.n) * format(p.y_type).bytes;
  if (!p.row_slot.empty()) {
    const std::vector<uint8_t> base = runner.forward(nullptr);
    for (int row = 0; row < p.m; ++row) {
      if (!uses_a_slot(p, row) && std::memcmp(&y[row * y_row], &base[row * y_row], y_row) != 0)
        fail("row %d uses no slot and has other bits than without slots", row);
    }
  }

  std::vector<int> rows;
  for (int row = 0; row < p.m; ++row) {
    const bool edge = row % 64 == 0 || row % 64 == 63 || row == p.m - 1;
    if (p.m <= 64 || p.threshold > 0 || (edge && row % 192 <= 64)) rows.push_back(row);
  }
  Problem judged = p;
  judged.m = static_cast<int>(rows.size());
  judged.x = Typed(p.x.type, rows.size() * p.k);
  if (p.residual.size()) judged.residual = Typed(p.residual.type, rows.size() * p.n);
  std::vector<uint8_t> got;
  for (size_t i = 0; i < rows.size(); ++i) {
    for (int k = 0; k < p.k; ++k) judged.x.set(i * p.k + k, p.x.value[static_cast<size_t>(rows[i]) * p.k + k]);
    for (size_t n = 0; p.residual.size() && n < static_cast<size_t>(p.n); ++n)
      judged.residual.set(i * p.n + n, p.residual.value[static_cast<size_t>(rows[i]) * p.n + n]);
    if (!p.row_slot.empty()) judged.row_slot[i] = p.row_slot[rows[i]];
    got.insert(got.end(), &y[rows[i] * y_row], &y[rows[i] * y_row] + y_row);
  }
  expect_close(judged, evaluate(judged, options.cuda() ? kCudaArithmetic : kCpuArithmetic), got);
}

std::vector<Spec> layer_specs(const Options& options) {
  const auto layer = [&](int m, int n, int k, int32_t mode, Type x, Type y, std::vector<Spec::AdapterSpec> adapters,
                         int outliers = -1) {
    Spec s;
    s.m = m, s.n = n, s.k = k;
    s.mode = mode;
    s.x_type = x, s.y_type = y;
    s.bias = true;
    s.adapters = std::move(adapters);
    s.outlier_columns = outliers;
    s.seed = options.seed + m + n + k;
    return s;
  };
  const int32_t w8a8 = OCTOLORA_W8A8_DYNAMIC, w8a16 = OCTOLORA_W8A16;
  const Type f32 = Type::f32, f16 = Type::f16, bf16 = Type::bf16;
  const Spec::AdapterSpec narrow = {16, bf16, bf16, 0.7f, false, true}, wide = {70, f16, f16, 0.4f, false, false};
  // Every kernel for many rows once, as shallow as it can be. Where kernels differ in their tile, N is what makes each
  // of them leave the least of a wave of 132 multiprocessors empty.
  std::vector<Spec> specs = {
      // W8A8: 256, 224, 192 and 128 columns, 192 in tiles of 192 rows, the low-rank update by mma.sync and by wgmma;
      // all of these with outliers.
      layer(70, 14792, 72, w8a8, bf16, bf16, {narrow}),
      layer(70, 14792, 136, w8a8, f16, bf16, {narrow, wide}),
      layer(70, 12680, 72, w8a8, bf16, f16, {narrow}),
      layer(70, 12680, 136, w8a8, bf16, bf16, {narrow, wide}),
      layer(70, 8456, 72, w8a8, f16, f16, {narrow}),
      layer(140, 8456, 144, w8a8, bf16, bf16, {narrow, wide}),
      layer(330, 8648, 72, w8a8, bf16, bf16, {narrow}),
      layer(330, 8648, 136, w8a8, f16, bf16, {narrow, wide}),
      layer(140, 400, 264, w8a8, bf16, bf16, {narrow}),
      layer(300, 400, 700, w8a8, bf16, bf16, {narrow, wide}),
      layer(70, 14792, 72, w8a8, bf16, bf16, {narrow}, 20),
      layer(70, 12680, 136, w8a8, f16, bf16, {narrow}, 70),
      layer(70, 12680, 136, w8a8, bf16, bf16, {narrow, wide}, 20),
      layer(260, 8648, 72, w8a8, bf16, bf16, {narrow}, 20),
      layer(70, 8456, 136, w8a8, bf16, bf16, {narrow}, 20),
      layer(70, 8456, 136, w8a8, f16, bf16, {narrow, wide}, 20),
      layer(300, 400, 700, w8a8, f16, f16, {{16, f16, f16, 0.7f, false, false}}, 20),
      layer(70, 136, 264, w8a8, bf16, bf16, {narrow, wide}, 20),
      // K in the shares of a cluster's blocks.
      layer(70, 136, 12296, w8a8, bf16, bf16, {narrow}),
      // W8A16: 256, 216 and 128 tokens, with more stages a tile than there are buffers, and the kernel for every
      // architecture in its largest tile.
      layer(220, 8456, 264, w8a16, bf16, bf16, {narrow}),
      layer(220, 8456, 72, w8a16, f16, bf16, {narrow, wide}),
      layer(200, 8456, 264, w8a16, bf16, f16, {narrow}),
      layer(200, 8456, 72, w8a16, f16, f16, {wide}),
      layer(200, 8456, 72, w8a16, f16, bf16, {{16, bf16, bf16, 1.f, false, false}, {30, f16, f16, 0.4f, false, true}}),
      layer(200, 136, 600, w8a16, bf16, bf16, {{16, bf16, bf16, 1.f, false, false}}),
      layer(129, 264, 72, w8a16, f16, bf16, {{16, f16, f16, 1.f, false, false}, {40, bf16, bf16, 0.4f, false, true}}),
      layer(70, 25700, 40, w8a16, f32, f32, {narrow}),
      layer(70, 25700, 40, w8a16, f16, f32, {wide}),
  };
  for (const int n : {8456, 136}) {
    for (const auto& adapters : {std::vector{narrow}, {narrow, wide}}) {
      Spec s = layer(70, n, 136, w8a8, bf16, bf16, adapters, n == 136 ? 70 : 20);
      s.activation = OCTOLORA_ACTIVATION_SILU;
      s.gate = s.residual = true;
      specs.push_back(s);
    }
  }
  for (const Type x : {bf16, f16}) {
    Spec s = layer(200, 8456, 72, w8a16, x, x, {narrow});
    s.activation = OCTOLORA_ACTIVATION_SILU;
    s.gate = true;
    specs.push_back(s);
  }
  // Few rows, by how many a kernel takes: high tiles, and low ones that divide K.
  for (const int m : {7, 16, 30, 60}) {
    for (const int n : {136, 17000}) {
      specs.push_back(layer(m, n, n == 136 ? 520 : 72, w8a8, bf16, bf16, {narrow, wide}));
      specs.push_back(layer(m, n, n == 136 ? 520 : 72, w8a16, bf16, bf16, {narrow}));
      specs.push_back(layer(m, n, n == 136 ? 520 : 72, w8a16, f16, f32, {wide}));
    }
  }
  const auto blocks = [](Spec s) {
    s.scale_block = 32;
    return s;
  };
  // Block scales: 160 and 128 tokens, then the kernel for every architecture in each tile.
  for (const Type x : {bf16, f16}) {
    specs.push_back(blocks(layer(300, 8456, 72, w8a16, x, bf16, {narrow})));
    specs.push_back(blocks(layer(128, 136, 400, w8a16, x, f16, {narrow, wide})));
    Spec s = blocks(layer(140, 8456, 72, w8a16, x, x, {narrow}));
    s.activation = OCTOLORA_ACTIVATION_SILU;
    s.gate = true;
    specs.push_back(s);
    for (const int m : {7, 30, 60, 140})
      specs.push_back(blocks(layer(m, m == 140 ? 17000 : 136, 72, w8a16, x, f32, {wide})));
  }
  if (options.quick) return specs;
  const std::vector<Spec> more = {
      layer(2600, 3080, 1160, w8a8, bf16, bf16,
            {{16, bf16, bf16, 0.7f, false, false}, {40, f16, f16, 0.4f, false, true}}),
      layer(700, 1160, 3100, w8a8, f16, f16, {{130, f32, f32, 1.f, false, false}}),
      layer(700, 1160, 1024, w8a8, bf16, bf16,
            {{520, bf16, bf16, 1.f, false, false}, {33, f16, f16, -1.f, false, false}}),
      layer(300, 264, 5000, w8a8, bf16, bf16, {}),
      layer(1300, 2056, 520, w8a8, f32, f32, {{16, f32, f32, 1.f, true, false}}),
      layer(8, 4096, 4096, w8a8, bf16, bf16, {{64, bf16, bf16, 1.f, false, false}}),
      layer(50, 2050, 3001, w8a8, bf16, bf16, {{64, bf16, bf16, 1.f, false, false}}),
      layer(400, 600, 1100, w8a8, bf16, bf16, {{16, bf16, bf16, 1.f, false, false}}, 70),
      layer(700, 3080, 200, w8a8, f16, bf16, {{16, f16, f16, 1.f, false, false}}, 70),
      layer(700, 3080, 200, w8a8, f32, f16, {{16, f32, f32, 1.f, false, false}}, 33),
      layer(1500, 2064, 1040, w8a16, bf16, bf16, {{16, bf16, bf16, 1.f, false, false}}),
      layer(1500, 1032, 1000, w8a16, f16, f16, {{16, f32, f32, 1.f, false, false}}),
      layer(16, 4096, 4096, w8a16, bf16, bf16, {{64, bf16, bf16, 1.f, false, false}}),
      // Each width of tile on Hopper, where it is the one that leaves the least of a wave empty, a row too few or too
      // many.
      layer(500, 8440, 72, w8a16, bf16, bf16,
            {{16, bf16, bf16, 0.7f, false, true}, {70, f16, f16, 0.4f, false, false}}),
      layer(512, 8440, 200, w8a16, f16, f16, {}),
      layer(431, 8440, 136, w8a16, bf16, f16, {{16, bf16, bf16, 0.7f, false, false}}),
      layer(217, 8440, 64, w8a16, f16, bf16, {{16, f32, f32, 0.7f, true, true}}),
      layer(127, 1016, 1000, w8a16, bf16, bf16, {{130, f16, f16, 0.7f, false, false}}),
      layer(5400, 392, 520, w8a16, bf16, bf16, {{16, f16, f16, 0.7f, false, true}}),
      layer(5400, 392, 360, w8a16, f16, f16, {{50, f16, bf16, 0.7f, false, true}}),
      layer(65, 8, 8, w8a16, bf16, bf16, {{16, bf16, bf16, 0.7f, false, false}}),
      // Block scales with each tile, by its rows or its number of tiles.
      blocks(layer(15, 1032, 4096, w8a16, bf16, bf16, {{64, bf16, bf16, 1.f, false, true}})),
      blocks(layer(31, 1032, 1000, w8a16, f16, f16, {{16, f32, f32, 1.f, true, false}})),
      blocks(layer(64, 4099, 1160, w8a16, f16, bf16, {{16, f16, f16, 0.7f, false, false}})),
      blocks(layer(1500, 2064, 1040, w8a16, bf16, bf16, {{16, bf16, bf16, 1.f, false, false}})),
      blocks(layer(700, 4104, 3104, w8a16, f16, f16, {{70, f16, f16, 0.4f, false, true}})),
      blocks(layer(300, 400, 704, w8a16, f32, f32, {{16, bf16, bf16, 0.7f, false, true}})),
      blocks(layer(113, 8440, 72, w8a16, bf16, f16, {{16, bf16, bf16, 0.7f, false, false}})),
      blocks(layer(224, 1032, 32, w8a16, f16, bf16, {})),
      blocks(layer(65, 136, 96, w8a16, bf16, bf16, {{16, bf16, bf16, 0.7f, false, true}})),
      blocks(layer(450, 3080, 3104, w8a16, bf16, bf16, {{130, f16, f16, 0.7f, false, false}})),
      // The same for W8A8: 256, 224 and 192 columns, 192 also in tiles of 192 rows, by mma.sync, by wgmma, and with
      // more ranks than stay in stages.
      layer(500, 8440, 200, w8a8, bf16, bf16, {{16, bf16, bf16, 0.7f, false, true}}),
      layer(511, 7408, 1160, w8a8, f16, f16, {{70, f16, f16, 0.4f, false, false}, {16, bf16, bf16, 0.7f, false, true}}),
      layer(385, 8448, 72, w8a8, bf16, f16, {{150, bf16, bf16, 0.4f, false, false}}),
      layer(431, 7384, 136, w8a8, f16, bf16, {{32, f16, f16, 0.7f, false, false}}),
      layer(257, 6344, 1040, w8a8, bf16, bf16,
            {{70, bf16, bf16, 0.7f, false, true}, {16, f16, f16, 0.4f, false, false}}),
      layer(390, 6352, 520, w8a8, bf16, bf16, {{150, f16, f16, 0.4f, false, true}}),
      layer(500, 6328, 1160, w8a8, bf16, bf16, {}),
      layer(300, 4240, 264, w8a8, f16, f16, {{16, f32, f32, 0.7f, true, true}}),
      layer(511, 6104, 136, w8a8, bf16, f16, {{150, bf16, bf16, 0.7f, false, false}}),
      layer(1147, 4216, 648, w8a8, bf16, bf16, {{16, bf16, bf16, 0.7f, false, true}}),
      layer(1130, 4200, 1160, w8a8, f16, bf16, {{150, f16, f16, 0.4f, false, true}}),
      layer(1152, 4224, 1032, w8a8, bf16, f16, {}),
      // More columns than one turn of the kernels for few rows covers, and ranks that leave B where it is.
      layer(5, 34000, 1032, w8a8, bf16, bf16, {{16, bf16, bf16, 1.f, false, true}}),
      layer(40, 34000, 1032, w8a16, f16, f16, {{16, f16, f16, 1.f, false, false}}),
      layer(9, 1000, 4104, w8a8, bf16, bf16, {{520, bf16, bf16, 1.f, false, false}}),
  };
  specs.insert(specs.end(), more.begin(), more.end());
  // What follows the linear, for each width of tile and each way of the low-rank update; the residual's place among the
  // ranks' in the pipeline is another in each.
  const auto followed = [&](Spec s, int32_t activation, bool gate, bool residual) {
    s.activation = activation, s.gate = gate, s.residual = residual;
    specs.push_back(s);
  };
  const int32_t none = OCTOLORA_ACTIVATION_NONE, gelu_tanh = OCTOLORA_ACTIVATION_GELU_TANH,
                gelu_erf = OCTOLORA_ACTIVATION_GELU_ERF, silu = OCTOLORA_ACTIVATION_SILU;
  const Spec::AdapterSpec r16 = {16, bf16, bf16, 0.7f, false, true}, r32 = {32, f16, f16, 0.4f, false, false},
                          r70 = {70, f16, f16, 0.4f, false, true}, r150 = {150, bf16, bf16, 0.4f, false, false};
  followed(layer(431, 7384, 136, w8a8, bf16, bf16, {r32}), gelu_tanh, true, true);
  followed(layer(511, 7376, 72, w8a8, f16, f16, {r70}), none, false, true);
  followed(layer(500, 6328, 1160, w8a8, bf16, f16, {r70, r16}), silu, false, true);
  followed(layer(511, 6104, 136, w8a8, bf16, bf16, {r150}), gelu_erf, true, true);
  followed(layer(300, 4216, 264, w8a8, f16, bf16, {r16}), none, true, true);
  followed(layer(1147, 4216, 648, w8a8, bf16, bf16, {r32}), gelu_erf, true, true);
  followed(layer(330, 8648, 136, w8a8, f16, f16, {r16}), none, false, true);
  followed(layer(1140, 4224, 72, w8a8, bf16, bf16, {}), gelu_tanh, true, false);
  followed(layer(2600, 3080, 1160, w8a8, bf16, bf16, {r16}), gelu_erf, true, true);
  followed(layer(2600, 3080, 648, w8a8, bf16, bf16, {}), gelu_tanh, false, true);
  // Rows with slots of their own: tiles that need none, one and several of them.
  const auto with_slots = [&](Spec s, RowSlots rows, bool epilogue) {
    s.row_slots = rows;
    followed(s, epilogue ? gelu_tanh : none, epilogue, epilogue);
  };
  for (const RowSlots rows : {RowSlots::blocks, RowSlots::shuffled, RowSlots::no_slot}) {
    for (const bool epilogue : {false, true}) {
      with_slots(layer(1300, 1544, 520, w8a8, bf16, bf16, {r16}), rows, epilogue);
      with_slots(layer(1300, 1544, 520, w8a8, bf16, bf16, {r16, r32, r16}), rows, epilogue);
      with_slots(layer(1300, 1544, 520, w8a8, f16, f16, {r70, r16, r150, r70, r32}), rows, epilogue);
    }
    with_slots(layer(1300, 600, 520, w8a8, bf16, bf16, {r16, r70}), rows, false);
    specs.back().outlier_columns = 20;
  }
  // Outlier columns: none, up to the ends of the steps and blocks in which they are multiplied, and more than are
  // gathered beforehand, beside ranks that stay, that do not, and that few rows need; M and N at the edges of tiles.
  for (const Type x : {bf16, f16, f32}) {
    const Type y = x == f32 ? bf16 : x;
    for (const int count : {0, 1, 16, 17, 21, 22, 64, 65, 85, 86, 130, 256, 257, 400}) {
      const int m = 254 + count % 5, n = 384 + 8 * (count % 3 - 1), k = 520 + 8 * (count % 4);
      specs.push_back(layer(m, n, k, w8a8, x, y, {}, count));
      specs.push_back(layer(m, n, k, w8a8, x, y, {r16}, count));
      if (count % 2) continue;
      specs.push_back(layer(m, n + 256, k, w8a8, x, y, {r70}, count));
      specs.push_back(layer(m, n, k, w8a8, x, y, {r150}, count));
      followed(layer(m, n, k, w8a8, x, y, {r16}, count), none, count % 3 == 0, true);
      followed(layer(m, n, k, w8a8, x, y, {r70, r16}, count), gelu_tanh, true, true);
      followed(layer(m, n, k, w8a8, x, y, {r150}, count), none, false, true);
      with_slots(layer(m, n, k, w8a8, x, y, {r16, r32, r16}, count), RowSlots::blocks, true);
      with_slots(layer(m, n, k, w8a8, x, y, {r150, r16}, count), RowSlots::shuffled, false);
    }
  }
  // Few rows on either side of what a kernel takes at a time, K long enough to be divided, N no multiple of a tile.
  int turn = 0;
  for (const int m : {1, 7, 8, 9, 16, 17, 33, 63, 64}) {
    const Type x = turn % 2 ? f16 : bf16, y = turn % 3 ? x : f32, a = turn % 4 == 3 ? f16 : bf16;
    const std::vector<Spec::AdapterSpec> one = {{64, a, a, 0.7f, false, turn % 2 == 0}},
                                         two = {{16, bf16, bf16, 0.7f, false, true},
                                                {40, f32, f16, -0.4f, true, false}};
    specs.push_back(layer(m, 1000 + turn, 8200, w8a8, x, y, turn % 2 ? one : two));
    specs.push_back(layer(m, 4099 - 8 * turn, 1160, w8a8, x, y, turn % 2 ? two : one));
    specs.push_back(layer(m, 520 + turn, 4104, w8a16, x, y, turn % 2 ? one : two));
    ++turn;
  }
  // W so wide that each cluster makes h for itself: many passes over the ranks, high and low parts, other types than x.
  specs.push_back(layer(12, 14792, 4104, w8a8, bf16, bf16, {r70, r16}));
  specs.push_back(layer(8, 28672, 1160, w8a8, f16, f16, {r150, r16, r32}));
  specs.push_back(layer(31, 9000, 2056, w8a8, f16, f32, {{40, f32, f32, -0.4f, true, true}}));
  specs.push_back(layer(61, 20000, 1032, w8a8, bf16, bf16, {r150, r16}));
  followed(layer(64, 6400, 8200, w8a8, bf16, bf16, {r32}), silu, true, true);
  // The same without adapters, where the multiplication follows the quantization at once, and with tiles that leave a
  // warpgroup without rows.
  for (const int m : {1, 17, 64}) {
    specs.push_back(layer(m, 4096, 4096, w8a8, bf16, f32, {}));
    specs.push_back(layer(m, 1000, 8200, w8a8, f16, f32, {}));
    specs.push_back(layer(m, 4096, 4096, w8a16, bf16, f32, {}));
    specs.push_back(layer(m, 500, 4104, w8a8, bf16, f32, {{16, bf16, bf16, 1.f, false, false}}));
  }
  // Every number of few rows, K divided among blocks; some of them also with tiles of 72 and of 144 rows of W.
  for (int m = 1; m <= 64; ++m) {
    const Type x = m % 2 ? bf16 : f16;
    specs.push_back(layer(m, 2200 + 331 * (m % 3), 520 + 8 * (m % 5), m % 4 == 3 ? w8a16 : w8a8, x, x,
                          {{m % 7 ? 24 : 64, x, bf16, 0.7f, m % 5 == 4, m % 3 == 0}}));
    if (m % 7 == 1) {
      specs.push_back(layer(m, m % 2 ? 9210 : 18100, 264, m % 4 ? w8a8 : w8a16, x, bf16,
                            {{16, bf16, bf16, 0.7f, false, false}, {40, f16, f16, 0.4f, false, true}}));
    }
  }
  return specs;
}

// More than 2^31 elements in y or in x, where a 32-bit index would wrap: a block of rows over and over, some of them
// judged. The CPU runs the same with fewer repetitions.
void many_rows(const Options& options, octolora_device* device, int32_t mode, int n, int k) {
  constexpr int kBlock = 410;
  const int m = options.cuda() ? 65600 : 3 * kBlock;
  Spec spec;
  spec.mode = mode;
  spec.m = kBlock, spec.n = n, spec.k = k;
  spec.x_type = Type::f16, spec.y_type = Type::bf16;
  spec.seed = options.seed;
  const Problem block = make_problem(spec);
  const Linear linear = make_linear(device, block);
  const size_t x_row = static_cast<size_t>(k) * 2, y_row = static_cast<size_t>(n) * 2;
  size_t bytes = 0;
  CHECK_OK(octolora_linear_workspace(linear.get(), nullptr, m, OCTOLORA_FLOAT16, &bytes));
  struct Memory {
    octolora_device* device;
    void* memory = nullptr;
    Memory(octolora_device* d, size_t size) : device(d) { CHECK_OK(octolora_device_alloc(d, size, &memory)); }
    ~Memory() { octolora_device_free(device, memory); }
    uint8_t* at(size_t offset) const { return static_cast<uint8_t*>(memory) + offset; }
  };
  const Memory x(device, m * x_row), y(device, m * y_row), scratch(device, bytes);
  for (int row = 0; row < m; row += kBlock) {
    CHECK_OK(octolora_device_copy(device, x.at(row * x_row), block.x.bytes.data(), kBlock * x_row, nullptr));
  }
  CHECK_OK(octolora_linear_forward(linear.get(), nullptr, x.memory, OCTOLORA_FLOAT16, y.memory, OCTOLORA_BFLOAT16, m,
                                   scratch.memory, bytes, nullptr));
  CHECK_OK(octolora_stream_synchronize(device, nullptr));

  const int rows[] = {0, 511, m / 2, m - kBlock - 1, m - 64, m - 1};
  Problem judged = block;
  judged.m = static_cast<int>(sizeof rows / sizeof *rows);
  judged.x = Typed(Type::f16, static_cast<size_t>(judged.m) * k);
  std::vector<uint8_t> got(judged.m * y_row);
  for (int i = 0; i < judged.m; ++i) {
    for (int j = 0; j < k; ++j) {
      judged.x.set(static_cast<size_t>(i) * k + j, block.x.value[static_cast<size_t>(rows[i] % kBlock) * k + j]);
    }
    CHECK_OK(octolora_device_copy(device, &got[i * y_row], y.at(rows[i] * y_row), y_row, nullptr));
  }
  CHECK_OK(octolora_stream_synchronize(device, nullptr));
  expect_close(judged, evaluate(judged, options.cuda() ? kCudaArithmetic : kCpuArithmetic), got);
}

// bf16 rows of every magnitude side by side on the CPU: instructions that take subnormal numbers for zero may see some
// of them and must not see others. What a row gives does not hang on the rows beside it.
void mixed_magnitudes(const Options& options, octolora_device* device, int scale_block) {
  Spec spec;
  spec.mode = OCTOLORA_W8A16;
  spec.m = 21, spec.n = 61, spec.k = 333;
  spec.x_type = Type::bf16, spec.y_type = Type::f32;
  spec.scale_block = scale_block;
  spec.seed = options.seed + 11;
  Problem p = make_problem(spec);
  const double factors[] = {1, 0x1p-129, 0x1p-98, 0, 0x1p-126, 0x1p60, 0x1p-104};
  for (int m = 0; m < p.m; ++m) {
    for (int k = 0; k < p.k; ++k) {
      const size_t i = static_cast<size_t>(m) * p.k + k;
      p.x.set(i, p.x.value[i] * factors[m % 7]);
    }
  }
  p.w_scale.assign(1, 1.f);  // y keeps what is small
  const Linear linear = make_linear(device, p);
  Runner runner(device, false, linear.get(), nullptr, p);
  const std::vector<uint8_t> y = runner.forward();
  expect_close(p, evaluate(p, kCpuArithmetic), y);
  const size_t y_row = static_cast<size_t>(p.n) * 4;
  for (int m = 0; m < p.m; ++m) {
    Problem one = p;
    one.m = 1;
    one.x = Typed(Type::bf16, p.k);
    for (int k = 0; k < p.k; ++k) one.x.set(k, p.x.value[static_cast<size_t>(m) * p.k + k]);
    Runner alone(device, false, linear.get(), nullptr, one);
    if (std::memcmp(alone.forward().data(), &y[m * y_row], y_row)) fail("row %d has other bits alone", m);
  }
}

void fill(Suite& suite, const Options& options) {
  const std::shared_ptr<octolora_device> device(open_device(options.ordinal));
  std::vector<Spec> specs = corner_specs(options.seed, options.quick);
  const std::vector<Spec> pairs = pairwise_specs(options.seed, options.quick);
  specs.insert(specs.end(), pairs.begin(), pairs.end());
  for (size_t i = 0; i < specs.size(); ++i) {
    const Spec& spec = specs[i];
    suite.add("forward " + spec.name(), [=] { forward_case(options, device.get(), spec); });
    if (spec.mode != OCTOLORA_W8A16 && (!options.quick || i % 3 == 0)) {
      suite.add("quantized " + spec.name(),
                [=] { quantized_case(options, device.get(), make_problem(spec), spec.x_offset); });
    }
  }
  if (!options.quick) {
    for (Type x : {Type::f32, Type::f16, Type::bf16}) {
      for (int32_t mode : {OCTOLORA_W8A8_DYNAMIC, OCTOLORA_W8A8_STATIC}) {
        suite.add(text("quantized extreme sums, mode %d, x %s", mode, format(x).name),
                  [=] { quantized_case(options, device.get(), extreme_sums(x, mode), 0); });
      }
    }
  }
  if (!options.quick) {
    for (int32_t mode : {OCTOLORA_W8A16, OCTOLORA_W8A8_DYNAMIC}) {
      suite.add(text("many rows, wide y, mode %d", mode), [=] { many_rows(options, device.get(), mode, 32800, 16); });
      suite.add(text("many rows, wide x, mode %d", mode), [=] { many_rows(options, device.get(), mode, 16, 32800); });
    }
  }
  for (const Spec& spec : layer_specs(options)) {
    suite.add("layer " + spec.name(), [=] { layer_case(options, device.get(), spec); });
  }
  const std::vector<std::vector<Spec>> groups = group_specs(options);
  for (size_t i = 0; i < groups.size(); ++i) {
    suite.add(text("group %zu of %zu outputs, first %s", i, groups[i].size(), groups[i][0].name().c_str()),
              [=] { group_case(options, device.get(), groups[i], i % 2); });
  }
  suite.add("quantized ties", [=] { quantized_case(options, device.get(), ties(), 0); });
  for (const int block : {0, 32}) {
    if (options.cuda()) break;
    suite.add(text("mixed magnitudes, blocks=%d", block), [=] { mixed_magnitudes(options, device.get(), block); });
  }
  suite.add("write in pieces", [=] { write_case(options, device.get()); });
}

}  // namespace
}  // namespace test

int main(int argc, char** argv) { return test::run_main(argc, argv, test::fill); }
