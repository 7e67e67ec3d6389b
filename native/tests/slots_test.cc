// SPDX-License-Identifier: Apache-2.0
//
// The life of adapter slots: what a slot held before leaves no trace, and neither does what another caller does at the
// same time.
#include <algorithm>
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
void history(const Options& options, octolora_device* device, int32_t mode, Type x, bool split) {
  const Problem base = make_problem(base_spec(options, mode, x));
  const std::vector<int32_t> capacity = {64, 17, 5};
  const Linear linear = make_linear(device, base);
  const Slots slots = make_slots(linear.get(), capacity, split);
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
      held[slot] = make_problem(s).adapters[0];
      octolora_adapter_desc desc = describe(held[slot]);
      // What the description names is read before the call returns: here it lives no longer than the call.
      std::vector<uint8_t> a = held[slot].a.bytes, b = held[slot].b.bytes;
      std::vector<float> bias = held[slot].bias;
      desc.a = a.data();
      desc.b = b.data();
      if (desc.bias) desc.bias = bias.data();
      CHECK_OK(octolora_slots_set(slots.get(), slot, &desc, scale, nullptr));
      std::fill(a.begin(), a.end(), uint8_t{0xff});
      std::fill(b.begin(), b.end(), uint8_t{0xff});
      std::fill(bias.begin(), bias.end(), NAN);
    } else if (action == 2) {
      held[slot].scale = scale;
      CHECK_OK(octolora_slots_set_scale(slots.get(), slot, scale, nullptr));
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
        suite.add(text("history %s %s%s", modes[mode], format(x).name, split ? " split" : ""),
                  [=] { history(options, device.get(), mode, x, split); });
      }
    }
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
