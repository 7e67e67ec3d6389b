// SPDX-License-Identifier: Apache-2.0
//
// Streams and CUDA graphs: a forward can be captured, a replay uses what the slots hold at that moment, and forwards on
// two streams do not disturb each other. The driver's functions come from libcuda.so.1 at run time.
#include <dlfcn.h>

#include <cstring>
#include <memory>

#include "support/cases.h"
#include "support/runner.h"

namespace test {
namespace {

// The few driver functions needed, with the signatures of cuda.h (handles are pointers, CUresult is an int).
struct Driver {
  using Graph = void*;
  using Exec = void*;
  int (*begin_capture)(octolora_stream, int mode) = nullptr;
  int (*end_capture)(octolora_stream, Graph*) = nullptr;
  int (*instantiate)(Exec*, Graph, unsigned long long flags) = nullptr;
  int (*launch)(Exec, octolora_stream) = nullptr;
  int (*node_count)(Graph, void** nodes, size_t* count) = nullptr;
  int (*exec_destroy)(Exec) = nullptr;
  int (*graph_destroy)(Graph) = nullptr;
  int (*error_name)(int, const char**) = nullptr;

  static const Driver& get() {
    static const Driver driver = [] {
      Driver d;
      void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
      if (!library) fail("libcuda.so.1: %s", dlerror());
      auto find = [&](auto& function, const char* name) {
        function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(library, name));
        if (!function) fail("libcuda.so.1 has no %s", name);
      };
      find(d.begin_capture, "cuStreamBeginCapture_v2");
      find(d.end_capture, "cuStreamEndCapture");
      find(d.instantiate, "cuGraphInstantiateWithFlags");
      find(d.launch, "cuGraphLaunch");
      find(d.node_count, "cuGraphGetNodes");
      find(d.exec_destroy, "cuGraphExecDestroy");
      find(d.graph_destroy, "cuGraphDestroy");
      find(d.error_name, "cuGetErrorName");
      return d;
    }();
    return driver;
  }
  void check(int result, const char* what) const {
    const char* name = nullptr;
    if (result && error_name(result, &name)) name = nullptr;
    if (result) fail("%s: %s (%d)", what, name ? name : "unknown error", result);
  }
};

class Stream {
 public:
  explicit Stream(octolora_device* device) : device_(device) { CHECK_OK(octolora_stream_create(device, &stream_)); }
  ~Stream() { octolora_stream_destroy(device_, stream_); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  octolora_stream get() const { return stream_; }
  void synchronize() const { CHECK_OK(octolora_stream_synchronize(device_, stream_)); }

 private:
  octolora_device* device_;
  octolora_stream stream_ = nullptr;
};

// Whatever is enqueued between construction and replay() becomes a graph. Capture mode 0, global: an allocation or a
// synchronisation anywhere in the process during the capture is an error, so this also holds the library to "allocates
// nothing, waits for nothing".
class Graph {
 public:
  template <class Enqueue>
  Graph(const Stream& stream, Enqueue enqueue) {
    const Driver& driver = Driver::get();
    driver.check(driver.begin_capture(stream.get(), 0), "cuStreamBeginCapture");
    std::string failure;
    try {
      enqueue();
    } catch (const std::exception& e) {
      failure = e.what();
    }
    const int ended = driver.end_capture(stream.get(), &graph_);
    if (!failure.empty()) fail("during capture: %s", failure.c_str());
    driver.check(ended, "cuStreamEndCapture");
    driver.check(driver.node_count(graph_, nullptr, &nodes_), "cuGraphGetNodes");
    driver.check(driver.instantiate(&exec_, graph_, 0), "cuGraphInstantiateWithFlags");
  }
  ~Graph() {
    if (exec_) Driver::get().exec_destroy(exec_);
    if (graph_) Driver::get().graph_destroy(graph_);
  }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  // What a call says during a capture that comes to nothing.
  template <class Call>
  static bool refuses(const Stream& stream, Call call) {
    const Driver& driver = Driver::get();
    driver.check(driver.begin_capture(stream.get(), 0), "cuStreamBeginCapture");
    const bool refused = call();
    Driver::Graph graph = nullptr;
    driver.end_capture(stream.get(), &graph);
    if (graph) driver.graph_destroy(graph);
    return refused;
  }
  void replay(const Stream& stream) const {
    Driver::get().check(Driver::get().launch(exec_, stream.get()), "cuGraphLaunch");
  }
  size_t nodes() const { return nodes_; }

 private:
  Driver::Graph graph_ = nullptr;
  Driver::Exec exec_ = nullptr;
  size_t nodes_ = 0;
};

// The explanation of a call has a line for each launch, "1 ...", "2 ...", and the graph a node.
void expect_explained(const Runner& runner, const Graph& captured) {
  const std::string text = runner.explain();
  size_t launches = 0;
  for (size_t at = 0; at < text.size(); at = text.find('\n', at) + 1) launches += text[at] != ' ';
  if (launches != captured.nodes())
    fail("%zu launches were captured, but explained are these %zu:\n%s", captured.nodes(), launches, text.c_str());
}

Spec spec_of(const Options& options, int32_t mode, Type x, int m) {
  Spec s;
  s.mode = mode;
  s.x_type = x;
  s.y_type = x;
  s.m = m;
  s.n = options.quick ? 33 : 136;
  s.k = options.quick ? 65 : 264;
  s.bias = true;
  if (mode == OCTOLORA_W8A8_DYNAMIC) s.outlier_columns = 3;
  s.adapters = {{16, Type::bf16, Type::bf16, 0.7f, false, true}, {5, Type::f16, Type::f16, 0.4f, false, false}};
  s.seed = options.seed + static_cast<uint64_t>(mode) + 10 * static_cast<uint64_t>(m);
  return s;
}

void need_cuda(const Options& options) {
  if (!options.cuda()) skip("streams and graphs exist on CUDA devices only");
}

void graph(const Options& options, octolora_device* device, int32_t mode, Type x, int m) {
  need_cuda(options);
  const Problem p = make_problem(spec_of(options, mode, x, m));
  Problem now = p;
  const Linear linear = make_linear(device, p);
  const Slots slots = make_slots(linear.get(), {64, 8}, false);
  const Stream stream(device);
  auto set = [&](int slot, const Adapter& a) {
    const octolora_adapter_desc desc = describe(a);
    CHECK_OK(octolora_slots_set(slots.get(), slot, &desc, a.scale, stream.get()));
  };
  for (int i = 0; i < 2; ++i) set(i, p.adapters[i]);
  stream.synchronize();  // the next call is on the default stream
  Runner runner(device, true, linear.get(), slots.get(), p);
  const std::vector<uint8_t> want = runner.forward();
  expect_close(p, evaluate(p, kCudaArithmetic), want);

  const uint64_t before = memory_in_use(device);
  const Graph captured(stream, [&] { runner.enqueue(slots.get(), stream.get()); });
  if (captured.nodes() == 0) fail("the captured graph is empty");
  if (memory_in_use(device) != before) fail("a captured forward changed memory_in_use");
  expect_explained(runner, captured);
  auto replay = [&] {
    runner.clear_y();
    captured.replay(stream);
    stream.synchronize();
    return runner.read_y();
  };
  if (replay() != want) fail("a replay gives other bits than the call");

  // The graph reads the slots when it runs: another scale, another adapter with another rank and type, none.
  CHECK_OK(octolora_slots_set_scale(slots.get(), 0, -1.5f, stream.get()));
  now.adapters[0].scale = -1.5f;
  const std::vector<uint8_t> rescaled = replay();
  expect_close(now, evaluate(now, kCudaArithmetic), rescaled);
  if (rescaled == want) fail("another scale changed nothing in the replay");

  Spec other = spec_of(options, mode, x, m);
  other.seed += 5000;
  other.adapters = {{33, Type::f32, Type::f32, 0.9f, false, false}};
  now.adapters[0] = make_problem(other).adapters[0];
  set(0, now.adapters[0]);
  expect_close(now, evaluate(now, kCudaArithmetic), replay());

  CHECK_OK(octolora_slots_clear(slots.get(), 0, stream.get()));
  CHECK_OK(octolora_slots_clear(slots.get(), 1, stream.get()));
  now.adapters.clear();
  expect_close(now, evaluate(now, kCudaArithmetic), replay());

  now.adapters = p.adapters;
  for (int i = 0; i < 2; ++i) set(i, p.adapters[i]);
  if (replay() != want) fail("the first adapters again give other bits than at first");
  runner.expect_intact();
}

// A swap can be captured: its replays read pinned or device memory anew, of another adapter too, and set_scale, clear
// and scales in device memory are work like any other.
void captured_swap(const Options& options, octolora_device* device, bool pinned, bool magnitudes) {
  need_cuda(options);
  Spec spec = spec_of(options, OCTOLORA_W8A8_DYNAMIC, Type::f32, 17);
  spec.adapters = {{16, Type::f32, Type::f32, 0.7f, false, false, magnitudes}};
  Problem p = make_problem(spec);
  spec.seed += 7000;
  Adapter other = make_problem(spec).adapters[0];
  for (uint64_t i = 1; other.b_stride != p.adapters[0].b_stride; ++i) {  // the captured call has one stride
    spec.seed += i;
    other = make_problem(spec).adapters[0];
  }
  const Linear linear = make_linear(device, p);
  const Slots slots = make_slots(linear.get(), {16}, false, magnitudes);
  const Stream stream(device);
  Runner runner(device, true, linear.get(), slots.get(), p);

  octolora_adapter_desc desc = describe(p.adapters[0]);
  if (Graph::refuses(stream, [&] {
        return octolora_slots_set(slots.get(), 0, &desc, 0.7f, stream.get()) == OCTOLORA_INVALID_ARGUMENT;
      }) == false) {
    fail("a capture took pageable memory");
  }
  const Adapter& first = p.adapters[0];
  const size_t a_bytes = first.a.bytes.size(), b_bytes = first.b.bytes.size();
  const size_t m_bytes = first.magnitude.size() * sizeof(float);
  void* memory[3] = {};
  const size_t bytes[3] = {a_bytes, b_bytes, m_bytes};
  for (int i = 0; i < 3; ++i) {
    CHECK_OK(pinned ? octolora_host_alloc(device, bytes[i], &memory[i])
                    : octolora_device_alloc(device, bytes[i], &memory[i]));
  }
  const auto fill = [&](const Adapter& adapter) {
    CHECK_OK(octolora_device_copy(device, memory[0], adapter.a.bytes.data(), a_bytes, stream.get()));
    CHECK_OK(octolora_device_copy(device, memory[1], adapter.b.bytes.data(), b_bytes, stream.get()));
    CHECK_OK(octolora_device_copy(device, memory[2], adapter.magnitude.data(), m_bytes, stream.get()));
    stream.synchronize();
  };
  desc.a = memory[0];
  desc.b = memory[1];
  if (magnitudes) desc.magnitude = static_cast<const float*>(memory[2]);
  const uint64_t before = memory_in_use(device);
  const Graph swap(stream, [&] { CHECK_OK(octolora_slots_set(slots.get(), 0, &desc, 0.7f, stream.get())); });
  const Graph rescale(stream, [&] { CHECK_OK(octolora_slots_set_scale(slots.get(), 0, -1.5f, stream.get())); });
  const Graph empty(stream, [&] { CHECK_OK(octolora_slots_clear(slots.get(), 0, stream.get())); });
  const Graph forward(stream, [&] { runner.enqueue(slots.get(), stream.get()); });
  if (memory_in_use(device) != before) fail("a captured swap changed memory_in_use");
  const auto judge = [&](const char* what) {
    runner.clear_y();
    forward.replay(stream);
    stream.synchronize();
    try {
      expect_close(p, evaluate(p, kCudaArithmetic), runner.read_y());
    } catch (const Failure& f) {
      fail("%s: %s", what, f.what());
    }
  };
  fill(p.adapters[0]);
  swap.replay(stream);
  judge("the first adapter");
  rescale.replay(stream);
  p.adapters[0].scale = -1.5f;
  judge("another scale");
  fill(other);
  p.adapters[0] = other;
  swap.replay(stream);
  judge("the second adapter");
  float* scales = nullptr;
  CHECK_OK(octolora_slots_scales(slots.get(), &scales));
  const float half = 0.5f;
  CHECK_OK(octolora_device_copy(device, scales, &half, sizeof half, stream.get()));
  CHECK_OK(octolora_slots_refresh(slots.get(), stream.get()));
  p.adapters[0].scale = half;
  judge("a scale written on the device");
  empty.replay(stream);
  p.adapters.clear();
  judge("a cleared slot");
  for (void* each : memory) CHECK_OK(pinned ? octolora_host_free(device, each) : octolora_device_free(device, each));
}

// Two outputs with everything that may follow them, rows with slots of their own: a replay reads what the slots, the
// gate, the residual and the rows' slots hold then.
void group_graph(const Options& options, octolora_device* device, int32_t mode, Type x, int m) {
  need_cuda(options);
  Spec spec = spec_of(options, mode, x, m);
  spec.row_slots = RowSlots::shuffled;
  spec.activation = OCTOLORA_ACTIVATION_SILU;
  spec.gate = true;
  Spec second = spec;
  second.n += 7;
  second.seed += 1;
  second.activation = OCTOLORA_ACTIVATION_NONE;
  second.gate = false;
  second.residual = true;
  Problem p[2] = {make_problem(spec), make_problem(second)};
  p[1].x = p[0].x;
  p[1].row_slot = p[0].row_slot;
  const Linear linears[2] = {make_linear(device, p[0]), make_linear(device, p[1])};
  const Slots slots[2] = {make_slots(linears[0].get(), {16, 8}, false), make_slots(linears[1].get(), {16, 8}, false)};
  const Stream stream(device);
  for (int i = 0; i < 2; ++i) {
    for (int slot = 0; slot < 2; ++slot) {
      const octolora_adapter_desc desc = describe(p[i].adapters[slot]);
      CHECK_OK(octolora_slots_set(slots[i].get(), slot, &desc, p[i].adapters[slot].scale, stream.get()));
    }
  }
  Runner runner(device, true, {{linears[0].get(), slots[0].get(), &p[0]}, {linears[1].get(), slots[1].get(), &p[1]}});
  stream.synchronize();
  const Graph captured(stream, [&] { runner.enqueue(stream.get()); });
  expect_explained(runner, captured);
  const auto replay = [&] {
    runner.clear_y();
    captured.replay(stream);
    stream.synchronize();
    for (int i = 0; i < 2; ++i)
      expect_close(p[i], evaluate(p[i], kCudaArithmetic, {&p[1 - i]}), runner.read_y(static_cast<size_t>(i)));
  };
  replay();
  const std::vector<uint8_t> first = runner.read_y(), direct = runner.forward();
  if (first != direct) fail("a replay gives other bits than the call");

  for (int i = 0; i < m; ++i) p[0].row_slot[i] = i % 3 - 1;
  p[1].row_slot = p[0].row_slot;
  runner.row_slot().write(p[0].row_slot.data());
  CHECK_OK(octolora_slots_set_scale(slots[1].get(), 0, 2.5f, stream.get()));
  p[1].adapters[0].scale = 2.5f;
  replay();
  if (m > 3 && runner.read_y() == first) fail("other slots for the rows changed nothing in the replay");
  runner.expect_intact();
}

// octolora_linear_quantized is capturable as well.
void quantized_graph(const Options& options, octolora_device* device) {
  need_cuda(options);
  const Problem p = make_problem(spec_of(options, OCTOLORA_W8A8_DYNAMIC, Type::f16, 19));
  const Quantized want = quantize(p);
  const Linear linear = make_linear(device, p);
  const Stream stream(device);
  const size_t bytes = Runner::workspace_bytes(linear.get(), nullptr, p);
  Buffer x(device, true, p.x.bytes.size()), sums(device, true, want.sums.size() * 4), workspace(device, true, bytes);
  x.write(p.x.bytes.data());
  const Graph captured(stream, [&] {
    CHECK_OK(octolora_linear_quantized(linear.get(), x.get(), OCTOLORA_FLOAT16, static_cast<int32_t*>(sums.get()),
                                       nullptr, nullptr, p.m, workspace.get(), bytes, stream.get()));
  });
  captured.replay(stream);
  stream.synchronize();
  const std::vector<uint8_t> got = sums.read();
  if (std::memcmp(got.data(), want.sums.data(), got.size())) fail("the replayed sums are not those of the oracle");
}

// Work of two streams, interleaved, each with its own workspace, gives what each gives alone.
void two_streams(const Options& options, octolora_device* device) {
  need_cuda(options);
  const Problem p = make_problem(spec_of(options, OCTOLORA_W8A8_DYNAMIC, Type::bf16, 65));
  const Problem q = make_problem(spec_of(options, OCTOLORA_W8A16, Type::bf16, 17));
  const Linear one = make_linear(device, p), two = make_linear(device, q);
  Runner a(device, true, one.get(), nullptr, p), b(device, true, two.get(), nullptr, q);
  const std::vector<uint8_t> want_a = a.forward(), want_b = b.forward();
  const Stream first(device), second(device);
  a.clear_y();
  b.clear_y();
  for (int i = 0; i < (options.quick ? 3 : 50); ++i) {
    a.enqueue(nullptr, first.get());
    b.enqueue(nullptr, second.get());
  }
  first.synchronize();
  second.synchronize();
  if (a.read_y() != want_a || b.read_y() != want_b)
    fail("two streams at once give other bits than one after the other");
}

// A slot's new contents are ordered by the stream: forward, set, forward on one stream without a wait between them.
void stream_order(const Options& options, octolora_device* device) {
  need_cuda(options);
  Problem p = make_problem(spec_of(options, OCTOLORA_W8A8_DYNAMIC, Type::f32, 33));
  const Linear linear = make_linear(device, p);
  const Slots slots = make_slots(linear.get(), {16}, false);
  const Stream stream(device);
  Problem with_first = p, with_second = p;
  with_first.adapters = {p.adapters[0]};
  with_second.adapters = {p.adapters[1]};
  Runner a(device, true, linear.get(), slots.get(), with_first),
      b(device, true, linear.get(), slots.get(), with_second);
  for (int i = 0; i < (options.quick ? 1 : 10); ++i) {
    octolora_adapter_desc desc = describe(with_first.adapters[0]);
    CHECK_OK(octolora_slots_set(slots.get(), 0, &desc, with_first.adapters[0].scale, stream.get()));
    a.enqueue(slots.get(), stream.get());
    desc = describe(with_second.adapters[0]);
    CHECK_OK(octolora_slots_set(slots.get(), 0, &desc, with_second.adapters[0].scale, stream.get()));
    b.enqueue(slots.get(), stream.get());
  }
  stream.synchronize();
  expect_close(with_first, evaluate(with_first, kCudaArithmetic), a.read_y());
  expect_close(with_second, evaluate(with_second, kCudaArithmetic), b.read_y());
}

// octolora_device_synchronize waits for streams that the default stream does not wait for.
void device_synchronize(const Options& options, octolora_device* device) {
  const Problem p = make_problem(spec_of(options, OCTOLORA_W8A8_STATIC, Type::f32, 130));
  const Linear linear = make_linear(device, p);
  std::unique_ptr<Stream> stream;
  if (options.cuda()) stream = std::make_unique<Stream>(device);
  Runner runner(device, options.cuda(), linear.get(), nullptr, p);
  runner.clear_y();
  for (int i = 0; i < (options.quick ? 1 : 200); ++i) runner.enqueue(nullptr, stream ? stream->get() : nullptr);
  CHECK_OK(octolora_device_synchronize(device));
  Problem base = p;
  base.adapters.clear();
  expect_close(base, evaluate(base, options.cuda() ? kCudaArithmetic : kCpuArithmetic), runner.read_y());
}

// A stream of the CPU device, where one is given at all, is NULL.
void cpu_stream(const Options& options, octolora_device* device) {
  if (options.cuda()) skip("for the CPU device");
  octolora_stream stream = nullptr;
  const octolora_status status = octolora_stream_create(device, &stream);
  if (status == OCTOLORA_OK && stream) fail("the CPU device gave a stream: %p", static_cast<void*>(stream));
  if (status != OCTOLORA_OK && status != OCTOLORA_UNSUPPORTED) fail("%s", octolora_status_name(status));
  CHECK_OK(octolora_stream_destroy(device, nullptr));
  CHECK_OK(octolora_stream_synchronize(device, nullptr));
}

void fill(Suite& suite, const Options& options) {
  const std::shared_ptr<octolora_device> device(open_device(options.ordinal));
  const char* const modes[] = {"w8a16", "dynamic", "static"};
  for (int32_t mode : {OCTOLORA_W8A16, OCTOLORA_W8A8_DYNAMIC, OCTOLORA_W8A8_STATIC}) {
    for (Type x : {Type::f32, Type::bf16}) {
      for (int m : {1, 17, 130}) {
        if (options.quick && m > 17) continue;
        suite.add(text("graph %s %s m=%d", modes[mode], format(x).name, m),
                  [=] { graph(options, device.get(), mode, x, m); });
        suite.add(text("graph of a group %s %s m=%d", modes[mode], format(x).name, m),
                  [=] { group_graph(options, device.get(), mode, x, m); });
      }
    }
  }
  for (bool pinned : {true, false}) {
    for (bool magnitudes : {false, true}) {
      suite.add(text("captured swap from %s memory%s", pinned ? "pinned" : "device", magnitudes ? " magnitudes" : ""),
                [=] { captured_swap(options, device.get(), pinned, magnitudes); });
    }
  }
  suite.add("graph of quantized", [=] { quantized_graph(options, device.get()); });
  suite.add("two streams", [=] { two_streams(options, device.get()); });
  suite.add("stream order", [=] { stream_order(options, device.get()); });
  suite.add("device synchronize", [=] { device_synchronize(options, device.get()); });
  suite.add("stream of the CPU", [=] { cpu_stream(options, device.get()); });
}

}  // namespace
}  // namespace test

int main(int argc, char** argv) { return test::run_main(argc, argv, test::fill); }
