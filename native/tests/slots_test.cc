// SPDX-License-Identifier: Apache-2.0
//
// The life of adapter slots: what a slot held before leaves no trace, and neither does what another caller does at the
// same time.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <thread>

#include "support/cases.h"
#include "support/runner.h"

namespace test {
namespace {

const Arithmetic& arithmetic(const Options& options) { return options.cuda() ? kCudaArithmetic : kCpuArithmetic; }

Spec base_spec(const Options& options, int32_t mode, Type x) {
  Spec s;
  s.mode = mode;
  s.x_type = x;
  s.y_type = x;
  s.bias = true;
  s.m = options.quick ? 5 : 19;
  s.n = options.quick ? 17 : 70;
  s.k = options.quick ? 33 : 131;
  if (mode == OCTOLORA_W8A8_DYNAMIC) s.outlier_columns = 2;
  s.seed = options.seed + static_cast<uint64_t>(mode) * 16 + static_cast<uint64_t>(x);
  return s;
}

// A random history of set, set_scale and clear over three slots; after each step y is that of the slots' contents.
void history(const Options& options, octolora_device* device, int32_t mode, Type x, bool split, bool magnitudes,
             int scale_block) {
  Spec base_of = base_spec(options, mode, x);
  base_of.scale_block = scale_block;
  const Problem base = make_problem(base_of);
  const std::vector<int32_t> capacity = {64, 17, 5};
  const Linear linear = make_linear(device, base);
  const Slots slots = make_slots(linear.get(), capacity, split, magnitudes);
  Runner runner(device, options.cuda(), linear.get(), slots.get(), base, 1, 1);
  const uint64_t ready = memory_in_use(device);
  Random random(options.seed + 77);
  std::vector<Adapter> held(capacity.size());
  const int steps = options.quick ? 8 : 30;
  for (int step = 0; step < steps; ++step) {
    const int slot = random.below(static_cast<int>(capacity.size()));
    const float scale = static_cast<float>(random.between(-4, 4)) * 0.35f;
    const int action = step == 0 ? 0 : random.below(4);
    if (action < 2) {
      Spec s = base_spec(options, mode, x);
      s.seed = random.next();
      const Type type = static_cast<Type>(random.below(3));
      s.adapters = {{random.between(1, capacity[slot]), type, random.coin() ? type : static_cast<Type>(random.below(3)),
                     scale, split && random.coin(), random.coin()}};
      Spec::AdapterSpec& only = s.adapters[0];
      only.magnitude = magnitudes && random.below(3) > 0;
      if (only.magnitude) only.bias = false;
      held[slot] = make_problem(s).adapters[0];
      octolora_adapter_desc desc = describe(held[slot]);
      // What the description names is read before the call returns: here it lives no longer than the call.
      std::vector<uint8_t> a = held[slot].a.bytes, b = held[slot].b.bytes;
      std::vector<float> bias = held[slot].bias, magnitude = held[slot].magnitude;
      desc.a = a.data();
      desc.b = b.data();
      if (desc.bias) desc.bias = bias.data();
      if (desc.magnitude) desc.magnitude = magnitude.data();
      CHECK_OK(octolora_slots_set(slots.get(), slot, &desc, scale, nullptr));
      std::fill(a.begin(), a.end(), uint8_t{0xff});
      std::fill(b.begin(), b.end(), uint8_t{0xff});
      std::fill(bias.begin(), bias.end(), NAN);
      std::fill(magnitude.begin(), magnitude.end(), NAN);
    } else if (action == 2) {
      held[slot].scale = scale;
      if (random.coin()) {
        CHECK_OK(octolora_slots_set_scale(slots.get(), slot, scale, nullptr));
      } else {
        float* scales = nullptr;
        CHECK_OK(octolora_slots_scales(slots.get(), &scales));
        CHECK_OK(octolora_device_copy(device, scales + slot, &scale, sizeof scale, nullptr));
        CHECK_OK(octolora_slots_refresh(slots.get(), nullptr));
      }
    } else {
      held[slot] = Adapter();
      CHECK_OK(octolora_slots_clear(slots.get(), slot, nullptr));
    }
    Problem p = base;
    for (const Adapter& a : held) {
      if (a.rank) p.adapters.push_back(a);
    }
    try {
      expect_close(p, evaluate(p, arithmetic(options)), runner.forward());
    } catch (const Failure& f) {
      fail("step %d (action %d on slot %d): %s", step, action, slot, f.what());
    }
  }
  runner.expect_intact();
  if (memory_in_use(device) != ready) fail("filling slots changed memory_in_use");
}

// The same adapter from pageable, pinned and device memory gives the same bits, also where no element is 16-byte
// aligned.
void sources(const Options& options, octolora_device* device, Type type, int offset) {
  Spec s = base_spec(options, OCTOLORA_W8A8_DYNAMIC, Type::f32);
  s.k = options.quick ? 64 : 200;
  s.adapters = {{13, type, type, 0.6f, false, true}};
  const Problem p = make_problem(s);
  const Adapter& adapter = p.adapters[0];
  const Linear linear = make_linear(device, p);
  const Slots slots = make_slots(linear.get(), {16}, false);
  Runner runner(device, options.cuda(), linear.get(), slots.get(), p);
  const octolora_adapter_desc pageable = describe(adapter);
  const size_t shift = static_cast<size_t>(offset) * format(type).bytes;
  const struct {
    const void* from;
    size_t bytes, shift;
  } parts[] = {{pageable.a, adapter.a.bytes.size(), shift},
               {pageable.b, adapter.b.bytes.size(), shift},
               {pageable.bias, adapter.bias.size() * sizeof(float), static_cast<size_t>(offset) * sizeof(float)}};
  CHECK_OK(octolora_slots_set(slots.get(), 0, &pageable, adapter.scale, nullptr));
  const std::vector<uint8_t> want = runner.forward();
  expect_close(p, evaluate(p, arithmetic(options)), want);

  for (bool pinned : {true, false}) {
    void* memory[3];
    for (int i = 0; i < 3; ++i) {
      const size_t bytes = parts[i].bytes + parts[i].shift;
      CHECK_OK(pinned ? octolora_host_alloc(device, bytes, &memory[i])
                      : octolora_device_alloc(device, bytes, &memory[i]));
      CHECK_OK(octolora_device_copy(device, static_cast<uint8_t*>(memory[i]) + parts[i].shift, parts[i].from,
                                    parts[i].bytes, nullptr));
    }
    CHECK_OK(octolora_stream_synchronize(device, nullptr));
    octolora_adapter_desc desc = pageable;
    desc.a = static_cast<uint8_t*>(memory[0]) + parts[0].shift;
    desc.b = static_cast<uint8_t*>(memory[1]) + parts[1].shift;
    desc.bias = reinterpret_cast<float*>(static_cast<uint8_t*>(memory[2]) + parts[2].shift);
    CHECK_OK(octolora_slots_clear(slots.get(), 0, nullptr));
    CHECK_OK(octolora_slots_set(slots.get(), 0, &desc, adapter.scale, nullptr));
    const std::vector<uint8_t> y = runner.forward();
    for (void* each : memory) CHECK_OK(pinned ? octolora_host_free(device, each) : octolora_device_free(device, each));
    if (y != want) {
      expect_close(p, evaluate(p, arithmetic(options)), y);
      size_t different = 0, first = 0;
      for (size_t i = 0; i < y.size(); i += 4) {
        if (std::memcmp(&y[i], &want[i], 4) == 0) continue;
        if (different++ == 0) first = i;
      }
      fail("%s memory gives other bits than pageable memory: %zu of %zu, y[%zu] = %.9g instead of %.9g",
           pinned ? "pinned" : "device", different, y.size() / 4, first / 4,
           static_cast<double>(decode(Type::f32, &y[first])), static_cast<double>(decode(Type::f32, &want[first])));
    }
  }
}

// octolora_slots_set_many is octolora_slots_set one by one: over two linears, more than one launch takes, with a slot
// that is filled twice.
void many(const Options& options, octolora_device* device, bool magnitudes) {
  constexpr int kSlots = 13;
  Spec s = base_spec(options, OCTOLORA_W8A8_DYNAMIC, Type::f32);
  for (int i = 0; i < 2 * kSlots; ++i) {
    const Type type = static_cast<Type>(i % 3);
    s.adapters.push_back(
        {1 + i * 5 % 17, type, type, 0.1f * static_cast<float>(i % 5 - 2), false, false, magnitudes && i % 12 == 0});
    s.adapters.back().bias = !s.adapters.back().magnitude && i % 2;
  }
  const Problem p = make_problem(s);
  const Linear linears[2] = {make_linear(device, p), make_linear(device, p)};
  const std::vector<int32_t> capacity(kSlots, 17);
  std::vector<octolora_adapter_desc> descs;
  for (const Adapter& a : p.adapters) descs.push_back(describe(a));
  std::vector<std::vector<uint8_t>> results[2];
  for (int together = 0; together < 2; ++together) {
    std::vector<Slots> slots;
    std::vector<octolora_slot_fill> fills;
    for (int i = 0; i < 2; ++i) slots.push_back(make_slots(linears[i].get(), capacity, false, magnitudes));
    const auto add = [&](int linear, int slot, int adapter) {
      fills.push_back({sizeof(octolora_slot_fill), slot, slots[static_cast<size_t>(linear)].get(),
                       &descs[static_cast<size_t>(adapter)], p.adapters[static_cast<size_t>(adapter)].scale});
    };
    for (int i = 0; i < 2 * kSlots; ++i) add(i % 2, i / 2, i);
    add(0, 3, 0);
    add(0, 3, 11);
    if (together) {
      CHECK_OK(octolora_slots_set_many(fills.data(), static_cast<int32_t>(fills.size()), nullptr));
    } else {
      for (const octolora_slot_fill& f : fills)
        CHECK_OK(octolora_slots_set(f.slots, f.slot, f.adapter, f.scale, nullptr));
    }
    for (int i = 0; i < 2; ++i) {
      Runner runner(device, options.cuda(), linears[i].get(), slots[static_cast<size_t>(i)].get(), p);
      results[together].push_back(runner.forward());
    }
  }
  if (results[0] != results[1]) fail("many at once give other bits than one by one");
  Problem held = p;
  held.adapters.clear();
  for (int i = 0; i < kSlots; ++i) held.adapters.push_back(p.adapters[static_cast<size_t>(i == 3 ? 11 : 2 * i)]);
  expect_close(held, evaluate(held, arithmetic(options)), results[1][0]);
}

// Factors of more numbers than a device holds at a time.
void large(const Options& options, octolora_device* device) {
  Spec s = base_spec(options, OCTOLORA_W8A16, Type::bf16);
  s.m = 3, s.n = 4300, s.k = 70;
  s.adapters = {{200, Type::f32, Type::f32, 0.5f, false, true}, {200, Type::f16, Type::f32, 0.5f, true, false}};
  const Problem p = make_problem(s);
  const Linear linear = make_linear(device, p);
  const Slots slots = make_slots(linear.get(), {200, 208}, true);
  std::vector<octolora_slot_fill> fills;
  std::vector<octolora_adapter_desc> descs;
  for (const Adapter& a : p.adapters) descs.push_back(describe(a));
  for (int i = 0; i < 2; ++i)
    fills.push_back({sizeof(octolora_slot_fill), i, slots.get(), &descs[static_cast<size_t>(i)], 0.5f});
  CHECK_OK(octolora_slots_set_many(fills.data(), 2, nullptr));
  Runner runner(device, options.cuda(), linear.get(), slots.get(), p);
  expect_close(p, evaluate(p, arithmetic(options)), runner.forward());
}

// What PEFT 0.21 computes for W = [[3,4],[0,2]], bias [1,-1], A = [[1,0]], B = [[1],[0.5]], scale 2, m = [10,4] and
// x = [1,2].
void dora_of_peft(const Options& options, octolora_device* device) {
  Problem p;
  p.m = 1, p.n = 2, p.k = 2;
  p.w = {3, 4, 0, 2};
  p.w_scale = {1.f};
  p.bias = {1.f, -1.f};
  p.x = Typed(Type::f32, 2);
  p.x.set(0, 1), p.x.set(1, 2);
  Adapter a;
  a.rank = a.b_stride = 1;
  a.scale = 2.f;
  a.a = a.b = Typed(Type::f32, 2);
  a.a.set(0, 1), a.b.set(0, 1), a.b.set(1, 0.5);
  a.magnitude = {10.f, 4.f};
  p.adapters = {a};
  const Linear linear = make_linear(device, p);
  const Slots slots = make_slots(linear.get(), {1}, false, true);
  const octolora_adapter_desc desc = describe(a);
  CHECK_OK(octolora_slots_set(slots.get(), 0, &desc, a.scale, nullptr));
  Runner runner(device, options.cuda(), linear.get(), slots.get(), p);
  const std::vector<uint8_t> y = runner.forward();
  const Expected judged = evaluate(p, arithmetic(options));
  expect_close(p, judged, y);
  const double want[] = {21.302588, 7.944272};
  for (int i = 0; i < 2; ++i) {
    const double oracle = judged.y[i], got = decode(Type::f32, &y[i * 4]);
    if (std::fabs(oracle - want[i]) > 2e-6 || std::fabs(got - want[i]) > 2e-6 + judged.bound[i]) {
      fail("y[%d] = %.8g, the oracle says %.8g, PEFT %.8g", i, got, oracle, want[i]);
    }
  }
}

// Weights written after an adapter with a magnitude change what its rows are divided by, from the refresh on.
void refreshed_weights(const Options& options, octolora_device* device, int32_t mode) {
  Spec s = base_spec(options, mode, Type::f32);
  s.adapters = {{9, Type::f32, Type::bf16, 0.7f, false, false, true}, {4, Type::f16, Type::f16, 0.5f, false, true}};
  Problem p = make_problem(s);
  const Linear linear = make_linear(device, p);
  const Slots slots = make_slots(linear.get(), {16, 16}, false, true);
  for (int i = 0; i < 2; ++i) {
    const octolora_adapter_desc desc = describe(p.adapters[i]);
    CHECK_OK(octolora_slots_set(slots.get(), i, &desc, p.adapters[i].scale, nullptr));
  }
  Runner runner(device, options.cuda(), linear.get(), slots.get(), p);
  expect_close(p, evaluate(p, arithmetic(options)), runner.forward());
  for (size_t i = 0; i < p.w.size(); i += 3) p.w[i] = static_cast<int8_t>(p.w[i] / 4);
  CHECK_OK(octolora_linear_write(linear.get(), 0, p.n, p.w.data()));
  CHECK_OK(octolora_slots_refresh(slots.get(), nullptr));
  expect_close(p, evaluate(p, arithmetic(options)), runner.forward());
}

// Setting the scale of an empty slot fills nothing; a slot cleared and set again behaves as new.
void empty_slots(const Options& options, octolora_device* device) {
  Spec s = base_spec(options, OCTOLORA_W8A8_DYNAMIC, Type::f16);
  s.adapters = {{8, Type::f16, Type::f16, 0.7f, false, true}};
  const Problem with = make_problem(s);
  Problem base = with;
  base.adapters.clear();
  const Linear linear = make_linear(device, base);
  const Slots none = make_slots(linear.get(), {}, false);
  const Slots slots = make_slots(linear.get(), {8, 512}, false);
  Runner runner(device, options.cuda(), linear.get(), slots.get(), base);
  const std::vector<uint8_t> plain = runner.forward(nullptr);
  expect_close(base, evaluate(base, arithmetic(options)), plain);
  if (runner.forward(none.get()) != plain) fail("slots of count 0 differ from no slots");
  if (runner.forward() != plain) fail("new slots differ from no slots");
  CHECK_OK(octolora_slots_set_scale(slots.get(), 1, 3.f, nullptr));
  if (runner.forward() != plain) fail("a scale for an empty slot differs from no slots");

  const octolora_adapter_desc desc = describe(with.adapters[0]);
  CHECK_OK(octolora_slots_set(slots.get(), 0, &desc, 0.7f, nullptr));
  const std::vector<uint8_t> first = runner.forward();
  expect_close(with, evaluate(with, arithmetic(options)), first);
  CHECK_OK(octolora_slots_clear(slots.get(), 0, nullptr));
  if (runner.forward() != plain) fail("a cleared slot differs from no slots");
  CHECK_OK(octolora_slots_set(slots.get(), 0, &desc, 0.7f, nullptr));
  if (runner.forward() != first) fail("cleared and set again differs from set once");
}

// Two sets of slots beside one linear do not know of each other, and outlive neither more nor less than they must.
void two_sets(const Options& options, octolora_device* device) {
  Spec s = base_spec(options, OCTOLORA_W8A16, Type::bf16);
  s.adapters = {{5, Type::bf16, Type::bf16, 1.f, false, false}};
  const Problem one = make_problem(s);
  Problem two = one;
  s.seed += 1000;
  s.adapters[0].rank = 9;
  two.adapters = make_problem(s).adapters;
  const uint64_t before = memory_in_use(device);
  {
    Linear linear = make_linear(device, one);
    const Slots a = make_slots(linear.get(), {16}, false);
    const Slots b = make_slots(linear.get(), {9}, false);
    octolora_adapter_desc desc = describe(one.adapters[0]);
    CHECK_OK(octolora_slots_set(a.get(), 0, &desc, 1.f, nullptr));
    desc = describe(two.adapters[0]);
    CHECK_OK(octolora_slots_set(b.get(), 0, &desc, 1.f, nullptr));
    Runner with_a(device, options.cuda(), linear.get(), a.get(), one);
    Runner with_b(device, options.cuda(), linear.get(), b.get(), two);
    expect_close(one, evaluate(one, arithmetic(options)), with_a.forward());
    expect_close(two, evaluate(two, arithmetic(options)), with_b.forward());
    expect_close(one, evaluate(one, arithmetic(options)), with_a.forward());
  }
  if (memory_in_use(device) != before) fail("memory_in_use %llu before, other after", (unsigned long long)before);
}

// Slots whose order is another give the same sum, within the bound, and every order gives its own bits each time.
void permuted(const Options& options, octolora_device* device) {
  Spec s = base_spec(options, OCTOLORA_W8A8_DYNAMIC, Type::f32);
  s.adapters = {{16, Type::f16, Type::f16, 0.7f, false, false},
                {5, Type::bf16, Type::bf16, 0.4f, false, true},
                {8, Type::f32, Type::f32, -1.5f, false, false}};
  Problem p = make_problem(s);
  const Linear linear = make_linear(device, p);
  std::vector<int> order = {0, 1, 2};
  do {
    const Slots slots = make_slots(linear.get(), {16, 16, 16}, false);
    for (int i = 0; i < 3; ++i) {
      const octolora_adapter_desc desc = describe(p.adapters[order[i]]);
      CHECK_OK(octolora_slots_set(slots.get(), i, &desc, p.adapters[order[i]].scale, nullptr));
    }
    Runner runner(device, options.cuda(), linear.get(), slots.get(), p);
    expect_close(p, evaluate(p, arithmetic(options)), runner.forward());
  } while (std::next_permutation(order.begin(), order.end()));
}

// A power of two in the scale is exact: y - base doubles when the scale does. Base and adapter are integers here.
void power_of_two(const Options& options, octolora_device* device) {
  Spec s = base_spec(options, OCTOLORA_W8A8_STATIC, Type::f32);
  s.fill = Fill::exact;
  s.adapters = {{16, Type::f32, Type::f32, 1.f, false, true}};
  Problem p = make_problem(s);
  const Linear linear = make_linear(device, p);
  const Slots slots = make_slots(linear.get(), {16}, false);
  const octolora_adapter_desc desc = describe(p.adapters[0]);
  Runner runner(device, options.cuda(), linear.get(), slots.get(), p);
  for (float scale : {1.f, 2.f, -4.f, 0.125f}) {
    CHECK_OK(octolora_slots_set(slots.get(), 0, &desc, scale, nullptr));
    p.adapters[0].scale = scale;
    expect_close(p, evaluate(p, arithmetic(options)), runner.forward());
  }
}

// One linear, one set of slots, four threads with their own x, y and workspace: each gets what it gets alone.
void concurrent(const Options& options, octolora_device* device) {
  needs_threads(options);
  constexpr int kThreads = 4;
  Spec s = base_spec(options, OCTOLORA_W8A8_DYNAMIC, Type::f32);
  s.adapters = {{16, Type::f32, Type::f32, 0.5f, false, false}};
  const Problem p = make_problem(s);
  const Linear linear = make_linear(device, p);
  const Slots slots = make_slots(linear.get(), {16}, false);
  const octolora_adapter_desc desc = describe(p.adapters[0]);
  CHECK_OK(octolora_slots_set(slots.get(), 0, &desc, 0.5f, nullptr));
  Runner alone(device, options.cuda(), linear.get(), slots.get(), p);
  const std::vector<uint8_t> want = alone.forward();

  std::vector<std::string> failures(kThreads);
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      try {
        Runner runner(device, options.cuda(), linear.get(), slots.get(), p);
        for (int i = 0; i < (options.quick ? 2 : 25); ++i) {
          if (runner.forward() != want) fail("thread %d, call %d: other bits than alone", t, i);
        }
      } catch (const std::exception& e) {
        failures[t] = e.what();
      }
    });
  }
  for (std::thread& t : threads) t.join();
  for (const std::string& f : failures) {
    if (!f.empty()) fail("%s", f.c_str());
  }
}

// On the CPU any number of threads gives the same bits.
void thread_counts(const Options& options, octolora_device* device) {
  if (options.cuda()) {
    if (octolora_device_set_threads(device, 2) != OCTOLORA_UNSUPPORTED) fail("set_threads on CUDA is not UNSUPPORTED");
    return;
  }
  for (int32_t mode : {OCTOLORA_W8A16, OCTOLORA_W8A8_DYNAMIC}) {
    Spec s = base_spec(options, mode, Type::bf16);
    s.m = options.quick ? 9 : 65;
    s.adapters = {{33, Type::bf16, Type::bf16, 0.5f, false, true}};
    const Problem p = make_problem(s);
    const Linear linear = make_linear(device, p);
    const Slots slots = make_slots(linear.get(), {33}, false);
    const octolora_adapter_desc desc = describe(p.adapters[0]);
    CHECK_OK(octolora_slots_set(slots.get(), 0, &desc, 0.5f, nullptr));
    std::vector<uint8_t> first;
    for (int32_t threads : {1, 2, 3, 7, 64}) {
      CHECK_OK(octolora_device_set_threads(device, threads));
      Runner runner(device, false, linear.get(), slots.get(), p);
      const std::vector<uint8_t> y = runner.forward();
      if (first.empty()) {
        first = y;
        expect_close(p, evaluate(p, kCpuArithmetic), y);
      }
      if (y != first) fail("%d threads give other bits than 1", threads);
      runner.expect_intact();
    }
  }
}

// Slots of another linear are refused, even of one with the same shape.
void foreign_slots(const Options& options, octolora_device* device) {
  const Problem p = make_problem(base_spec(options, OCTOLORA_W8A16, Type::f32));
  const Linear one = make_linear(device, p), other = make_linear(device, p);
  const Slots slots = make_slots(other.get(), {4}, false);
  size_t bytes = 0;
  if (octolora_linear_workspace(one.get(), slots.get(), 1, OCTOLORA_FLOAT32, &bytes) != OCTOLORA_INVALID_ARGUMENT) {
    fail("octolora_linear_workspace took another linear's slots");
  }
  Runner runner(device, options.cuda(), one.get(), nullptr, p);
  if (octolora_linear_forward(one.get(), slots.get(), runner.x().get(), OCTOLORA_FLOAT32, runner.y(), OCTOLORA_FLOAT32,
                              p.m, runner.workspace().get(), runner.workspace().bytes(),
                              nullptr) != OCTOLORA_INVALID_ARGUMENT) {
    fail("octolora_linear_forward took another linear's slots");
  }
}

void fill(Suite& suite, const Options& options) {
  const std::shared_ptr<octolora_device> device(open_device(options.ordinal));
  const char* const modes[] = {"w8a16", "dynamic", "static"};
  for (int32_t mode : {OCTOLORA_W8A16, OCTOLORA_W8A8_DYNAMIC, OCTOLORA_W8A8_STATIC}) {
    for (Type x : {Type::f32, Type::f16, Type::bf16}) {
      for (bool split : {false, true}) {
        for (bool magnitudes : {false, true}) {
          for (int scale_block : mode == OCTOLORA_W8A16 ? std::vector<int>{0, 64} : std::vector<int>{0}) {
            suite.add(text("history %s %s%s%s%s", modes[mode], format(x).name, split ? " split" : "",
                           magnitudes ? " magnitudes" : "", scale_block ? " block scales" : ""),
                      [=] { history(options, device.get(), mode, x, split, magnitudes, scale_block); });
          }
        }
      }
    }
  }
  for (Type type : {Type::f32, Type::f16, Type::bf16}) {
    for (int offset : {0, 1}) {
      suite.add(text("sources %s%s", format(type).name, offset ? " unaligned" : ""),
                [=] { sources(options, device.get(), type, offset); });
    }
  }
  suite.add("many at once", [=] { many(options, device.get(), false); });
  suite.add("many at once, magnitudes", [=] { many(options, device.get(), true); });
  if (!options.quick) suite.add("large factors", [=] { large(options, device.get()); });
  suite.add("DoRA of PEFT", [=] { dora_of_peft(options, device.get()); });
  for (int32_t mode : {OCTOLORA_W8A16, OCTOLORA_W8A8_DYNAMIC}) {
    suite.add(text("refreshed weights %s", modes[mode]), [=] { refreshed_weights(options, device.get(), mode); });
  }
  suite.add("empty slots", [=] { empty_slots(options, device.get()); });
  suite.add("two sets of slots", [=] { two_sets(options, device.get()); });
  suite.add("permuted slots", [=] { permuted(options, device.get()); });
  suite.add("powers of two in the scale", [=] { power_of_two(options, device.get()); });
  suite.add("concurrent forwards", [=] { concurrent(options, device.get()); });
  suite.add("thread counts", [=] { thread_counts(options, device.get()); });
  suite.add("slots of another linear", [=] { foreign_slots(options, device.get()); });
}

}  // namespace
}  // namespace test

int main(int argc, char** argv) { return test::run_main(argc, argv, test::fill); }
