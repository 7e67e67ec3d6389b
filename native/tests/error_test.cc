// SPDX-License-Identifier: Apache-2.0
//
// Every argument the header rules out gives its status and a message with the numbers, keeps nothing and leaves the
// library usable.
#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <thread>
#include <utility>

#include "support/cases.h"
#include "support/runner.h"

namespace test {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();

// A small W8A8 linear with everything that a call needs, all valid; a case changes one thing.
struct Scene {
  octolora_device* device;
  bool cuda;
  Problem problem;
  octolora_linear_desc desc;
  octolora_adapter_desc adapter;
  std::vector<float> a, b, adapter_bias;
  Linear linear, w8a16;
  Slots slots;
  octolora_linear* made_linear = nullptr;
  octolora_slots* made_slots = nullptr;
  std::unique_ptr<Buffer> x, y, workspace;
  size_t workspace_bytes = 0;
  Linear twin;
  std::unique_ptr<Buffer> twin_y, row_slot, group_workspace;
  size_t group_bytes = 0;

  Scene(octolora_device* d, bool on_cuda) : device(d), cuda(on_cuda) {
    problem.m = 3, problem.n = 5, problem.k = 7;
    problem.mode = OCTOLORA_W8A8_DYNAMIC;
    problem.w.assign(35, 1);
    problem.w_scale.assign(5, 0.5f);
    problem.bias.assign(5, 1.f);
    problem.x = Typed(Type::f32, 21);
    linear = make_linear(d, problem);
    Problem other = problem;
    other.mode = OCTOLORA_W8A16;
    w8a16 = make_linear(d, other);
    desc = describe(problem);
    a.assign(4 * 7, 1.f), b.assign(5 * 4, 1.f), adapter_bias.assign(5, 1.f);
    adapter = {};
    adapter.struct_size = sizeof adapter;
    adapter.rank = 4;
    adapter.a = a.data();
    adapter.b = b.data();
    adapter.bias = adapter_bias.data();
    slots = make_slots(linear.get(), {4, 2}, false);
    CHECK_OK(octolora_linear_workspace(linear.get(), slots.get(), 3, OCTOLORA_FLOAT32, &workspace_bytes));
    x.reset(new Buffer(d, on_cuda, 21 * 4));
    x->write(problem.x.bytes.data());
    y.reset(new Buffer(d, on_cuda, 15 * 4));
    workspace.reset(new Buffer(d, on_cuda, workspace_bytes + 256));
    twin = make_linear(d, problem);
    twin_y.reset(new Buffer(d, on_cuda, 15 * 4));
    row_slot.reset(new Buffer(d, on_cuda, 3 * 4));
    CHECK_OK(group([](Group&) {}, Ask::workspace));
    group_workspace.reset(new Buffer(d, on_cuda, group_bytes + 256));
  }

  octolora_status create() { return octolora_linear_create(device, &desc, &made_linear); }
  octolora_status set(int32_t slot = 0, float scale = 1.f) {
    return octolora_slots_set(slots.get(), slot, &adapter, scale, nullptr);
  }
  octolora_status make_with(int32_t count, const int32_t* capacity, int32_t precision = OCTOLORA_LORA_16BIT) {
    return octolora_slots_create(linear.get(), count, capacity, precision, &made_slots);
  }

  // The arguments of a forward, to be changed one at a time.
  struct Call {
    const octolora_linear* linear;
    const octolora_slots* slots;
    const void* x;
    int32_t x_dtype;
    void* y;
    int32_t y_dtype, rows;
    void* workspace;
    size_t bytes;
    octolora_stream stream;
  };
  Call call() {
    return {linear.get(), slots.get(), x->get(), 0, y->get(), 0, 3, workspace->get(), workspace_bytes, nullptr};
  }
  octolora_status forward(const Call& c) {
    return octolora_linear_forward(c.linear, c.slots, c.x, c.x_dtype, c.y, c.y_dtype, c.rows, c.workspace, c.bytes,
                                   c.stream);
  }
  octolora_status forward(const std::function<void(Call&)>& change) {
    Call c = call();
    change(c);
    return forward(c);
  }

  // The same as a description, with two outputs, of `linear` and of its twin without slots.
  struct Group {
    octolora_forward_desc desc;
    octolora_output outputs[OCTOLORA_MAX_OUTPUTS + 1];
    octolora_stream stream;
  };
  enum class Ask { forward, workspace };
  octolora_status group(const std::function<void(Group&)>& change, Ask ask = Ask::forward) {
    Group g = {};
    for (octolora_output& output : g.outputs) {
      output.struct_size = sizeof output;
      output.linear = twin.get();
      output.y = twin_y->get();
    }
    g.outputs[0].linear = linear.get();
    g.outputs[0].slots = slots.get();
    g.outputs[0].y = y->get();
    g.desc.struct_size = sizeof g.desc;
    g.desc.rows = 3;
    g.desc.x = x->get();
    g.desc.outputs = g.outputs;
    g.desc.output_count = 2;
    g.desc.workspace = group_workspace ? group_workspace->get() : nullptr;
    g.desc.workspace_bytes = group_bytes;
    change(g);
    return ask == Ask::forward ? octolora_forward(&g.desc, g.stream)
                               : octolora_forward_workspace(&g.desc, &group_bytes);
  }
};

char* shifted(void* p, int bytes) { return static_cast<char*>(p) + bytes; }

// A call of the CPU device with a stream, which must be NULL there.
template <class Call>
std::function<octolora_status(Scene&)> on_cpu_stream(Call call) {
  return [call](Scene& s) {
    if (s.cuda) skip("a CUDA device takes streams");
    return call(s, reinterpret_cast<octolora_stream>(0x40));
  };
}

struct BadCall {
  const char* name;
  octolora_status status;
  std::vector<const char*> words;  // each is in the message
  std::function<octolora_status(Scene&)> run;
};

std::vector<BadCall> bad_calls() {
  using S = Scene&;
  using C = Scene::Call&;
  using G = Scene::Group&;
  const octolora_status bad = OCTOLORA_INVALID_ARGUMENT;
  return {
      {"device: NULL result", bad, {"device", "NULL"}, [](S) { return octolora_device_create(OCTOLORA_CPU, nullptr); }},
      {"device: ordinal -2",
       bad,
       {"ordinal", "-2"},
       [](S) {
         octolora_device* d = nullptr;
         return octolora_device_create(-2, &d);
       }},
      {"device: ordinal beyond",
       OCTOLORA_NO_DEVICE,
       {},
       [](S) {
         octolora_device* d = nullptr;
         return octolora_device_create(12345, &d);
       }},
      {"info: NULL device",
       bad,
       {"device", "NULL"},
       [](S) {
         octolora_device_info info = {};
         info.struct_size = sizeof info;
         return octolora_device_get_info(nullptr, &info);
       }},
      {"info: NULL", bad, {"info", "NULL"}, [](S s) { return octolora_device_get_info(s.device, nullptr); }},
      {"info: struct_size 0",
       bad,
       {"struct_size", "0", "184"},
       [](S s) {
         octolora_device_info info = {};
         return octolora_device_get_info(s.device, &info);
       }},
      {"memory_in_use: NULL",
       bad,
       {"bytes", "NULL"},
       [](S s) { return octolora_device_memory_in_use(s.device, nullptr); }},
      {"device_synchronize: NULL", bad, {"device", "NULL"}, [](S) { return octolora_device_synchronize(nullptr); }},
      {"count: NULL", bad, {"count", "NULL"}, [](S) { return octolora_cuda_device_count(nullptr); }},
      {"threads: 0", bad, {"threads", "0", "1024"}, [](S s) { return octolora_device_set_threads(s.device, 0); }},
      {"threads: 1025", bad, {"threads", "1025"}, [](S s) { return octolora_device_set_threads(s.device, 1025); }},
      {"alloc: NULL result", bad, {"memory", "NULL"}, [](S s) { return octolora_device_alloc(s.device, 16, nullptr); }},
      {"alloc: 2^60 bytes",
       OCTOLORA_OUT_OF_MEMORY,
       {"1152921504606846976"},
       [](S s) {
         void* memory = nullptr;
         const octolora_status status = octolora_device_alloc(s.device, size_t{1} << 60, &memory);
         if (memory) fail("memory was written: %p", memory);
         return status;
       }},
      {"alloc: all bytes there are",
       OCTOLORA_OUT_OF_MEMORY,
       {},
       [](S s) {
         void* memory = nullptr;
         return octolora_device_alloc(s.device, SIZE_MAX, &memory);
       }},
      {"copy: NULL target",
       bad,
       {"to", "NULL"},
       [](S s) { return octolora_device_copy(s.device, nullptr, s.a.data(), 4, nullptr); }},
      {"copy: NULL source",
       bad,
       {"from", "NULL"},
       [](S s) { return octolora_device_copy(s.device, s.x->get(), nullptr, 4, nullptr); }},
      {"stream: NULL result", bad, {"stream", "NULL"}, [](S s) { return octolora_stream_create(s.device, nullptr); }},

      {"linear: NULL device",
       bad,
       {"device", "NULL"},
       [](S s) { return octolora_linear_create(nullptr, &s.desc, &s.made_linear); }},
      {"linear: NULL desc",
       bad,
       {"desc", "NULL"},
       [](S s) { return octolora_linear_create(s.device, nullptr, &s.made_linear); }},
      {"linear: NULL result",
       bad,
       {"linear", "NULL"},
       [](S s) { return octolora_linear_create(s.device, &s.desc, nullptr); }},
      {"linear: struct_size 8",
       bad,
       {"struct_size", "8", "80"},
       [](S s) { return s.desc.struct_size = 8, s.create(); }},
      {"linear: n 0", bad, {"n = 0"}, [](S s) { return s.desc.n = 0, s.create(); }},
      {"linear: n -5", bad, {"n = -5"}, [](S s) { return s.desc.n = -5, s.create(); }},
      {"linear: k 0", bad, {"k = 0", "131071"}, [](S s) { return s.desc.k = 0, s.create(); }},
      {"linear: k 131072", bad, {"k = 131072", "131071"}, [](S s) { return s.desc.k = 131072, s.create(); }},
      {"linear: mode 3", bad, {"mode = 3"}, [](S s) { return s.desc.mode = 3, s.create(); }},
      {"linear: mode -1", bad, {"mode = -1"}, [](S s) { return s.desc.mode = -1, s.create(); }},
      {"linear: scale_count 4", bad, {"scale_count = 4", "5"}, [](S s) { return s.desc.scale_count = 4, s.create(); }},
      {"linear: scale_count 0", bad, {"scale_count = 0"}, [](S s) { return s.desc.scale_count = 0, s.create(); }},
      {"linear: NULL scale", bad, {"scale", "NULL"}, [](S s) { return s.desc.scale = nullptr, s.create(); }},
      {"linear: NaN scale", bad, {"scale[3]", "nan"}, [](S s) { return s.problem.w_scale[3] = kNan, s.create(); }},
      {"linear: infinite scale", bad, {"scale[4]", "inf"}, [](S s) { return s.problem.w_scale[4] = kInf, s.create(); }},
      {"linear: NaN bias", bad, {"bias[2]", "nan"}, [](S s) { return s.problem.bias[2] = kNan, s.create(); }},
      {"linear: round_x bf16",
       bad,
       {"round_x = 2"},
       [](S s) { return s.desc.round_x = OCTOLORA_BFLOAT16, s.create(); }},
      {"linear: static, x_scale 0",
       bad,
       {"x_scale = 0"},
       [](S s) { return s.desc.mode = OCTOLORA_W8A8_STATIC, s.create(); }},
      {"linear: static, x_scale -1",
       bad,
       {"x_scale = -1"},
       [](S s) { return s.desc.mode = OCTOLORA_W8A8_STATIC, s.desc.x_scale = -1.f, s.create(); }},
      {"linear: static, x_scale NaN",
       bad,
       {"x_scale", "nan"},
       [](S s) { return s.desc.mode = OCTOLORA_W8A8_STATIC, s.desc.x_scale = kNan, s.create(); }},
      {"linear: static, x_scale inf",
       bad,
       {"x_scale", "inf"},
       [](S s) { return s.desc.mode = OCTOLORA_W8A8_STATIC, s.desc.x_scale = kInf, s.create(); }},
      {"linear: x_divisor 128",
       bad,
       {"x_divisor = 128", "127.5"},
       [](S s) { return s.desc.x_divisor = 128.f, s.create(); }},
      {"linear: x_divisor -1", bad, {"x_divisor = -1"}, [](S s) { return s.desc.x_divisor = -1.f, s.create(); }},
      {"linear: x_divisor NaN", bad, {"x_divisor", "nan"}, [](S s) { return s.desc.x_divisor = kNan, s.create(); }},
      {"linear: threshold -6",
       bad,
       {"outlier_threshold = -6"},
       [](S s) { return s.desc.outlier_threshold = -6.f, s.create(); }},
      {"linear: threshold NaN",
       bad,
       {"outlier_threshold", "nan"},
       [](S s) { return s.desc.outlier_threshold = kNan, s.create(); }},
      {"linear: blocks of 16",
       bad,
       {"scale_block = 16", "32"},
       [](S s) { return s.desc.scale_block = 16, s.create(); }},
      {"linear: blocks of -32", bad, {"scale_block = -32"}, [](S s) { return s.desc.scale_block = -32, s.create(); }},
      {"linear: NULL block scales",
       bad,
       {"block_scale", "NULL"},
       [](S s) { return s.desc.mode = OCTOLORA_W8A16, s.desc.scale_block = 32, s.create(); }},
      {"linear: block scales without blocks",
       bad,
       {"block_scale", "scale_block = 0"},
       [](S s) {
         const uint16_t one = 0x3c00;
         s.desc.mode = OCTOLORA_W8A16, s.desc.block_scale = &one;
         return s.create();
       }},
      {"linear: block scales with W8A8",
       OCTOLORA_UNSUPPORTED,
       {"scale_block = 32", "W8A8 dynamic", "OCTOLORA_W8A16"},
       [](S s) {
         const std::vector<uint16_t> ones(static_cast<size_t>(s.desc.n) * s.desc.k, 0x3c00);
         s.desc.scale_block = 32, s.desc.block_scale = ones.data();
         return s.create();
       }},
      {"linear: infinite block scale",
       bad,
       {"block_scale[3,0]", "0xfc00"},
       [](S s) {
         std::vector<uint16_t> scales(static_cast<size_t>(s.desc.n) * s.desc.k, 0x3c00);
         s.desc.mode = OCTOLORA_W8A16, s.desc.scale_block = s.desc.k / 32 * 32 + 32;
         scales[3] = 0xfc00;
         s.desc.block_scale = scales.data();
         return s.create();
       }},
      {"linear: 256 TiB of weights",
       OCTOLORA_OUT_OF_MEMORY,
       {},
       [](S s) {
         s.desc.n = std::numeric_limits<int32_t>::max();
         s.desc.k = OCTOLORA_MAX_K;
         s.desc.scale_count = 1;
         s.desc.bias = nullptr;
         s.desc.weight = nullptr;
         return s.create();
       }},

      {"write: NULL linear",
       bad,
       {"linear", "NULL"},
       [](S s) { return octolora_linear_write(nullptr, 0, 1, s.problem.w.data()); }},
      {"write: NULL weight",
       bad,
       {"weight", "NULL"},
       [](S s) { return octolora_linear_write(s.linear.get(), 0, 1, nullptr); }},
      {"write: past the end",
       bad,
       {"rows 4 to 5", "4"},
       [](S s) { return octolora_linear_write(s.linear.get(), 4, 2, s.problem.w.data()); }},
      {"write: row -1",
       bad,
       {"-1"},
       [](S s) { return octolora_linear_write(s.linear.get(), -1, 2, s.problem.w.data()); }},
      {"write: rows -1",
       bad,
       {"rows"},
       [](S s) { return octolora_linear_write(s.linear.get(), 0, -1, s.problem.w.data()); }},
      {"write: int32 wraps",
       bad,
       {"2147483647"},
       [](S s) { return octolora_linear_write(s.linear.get(), 2147483647, 2147483647, s.problem.w.data()); }},

      {"slots: NULL linear",
       bad,
       {"linear", "NULL"},
       [](S s) {
         const int32_t capacity = 1;
         return octolora_slots_create(nullptr, 1, &capacity, OCTOLORA_LORA_16BIT, &s.made_slots);
       }},
      {"slots: NULL result",
       bad,
       {"slots", "NULL"},
       [](S s) {
         const int32_t capacity = 1;
         return octolora_slots_create(s.linear.get(), 1, &capacity, OCTOLORA_LORA_16BIT, nullptr);
       }},
      {"slots: count -1", bad, {"slot_count = -1"}, [](S s) { return s.make_with(-1, nullptr); }},
      {"slots: NULL capacity", bad, {"capacity", "NULL"}, [](S s) { return s.make_with(2, nullptr); }},
      {"slots: capacity 0",
       bad,
       {"capacity[1] = 0", "4096"},
       [](S s) {
         const int32_t capacity[] = {4, 0};
         return s.make_with(2, capacity);
       }},
      {"slots: capacity 4097",
       bad,
       {"capacity[0] = 4097", "4096"},
       [](S s) {
         const int32_t capacity[] = {4097};
         return s.make_with(1, capacity);
       }},
      {"slots: precision 4",
       bad,
       {"precision = 4"},
       [](S s) {
         const int32_t capacity[] = {4};
         return s.make_with(1, capacity, 4);
       }},

      {"slots: more than the device has",
       OCTOLORA_OUT_OF_MEMORY,
       {},
       [](S s) {
         if (!s.cuda) skip("an overcommitted host hands out memory it does not have");
         Problem long_rows;
         long_rows.n = 1;
         long_rows.k = OCTOLORA_MAX_K;
         long_rows.w.assign(long_rows.k, 1);
         long_rows.w_scale.assign(1, 1.f);
         const Linear linear = make_linear(s.device, long_rows);
         const std::vector<int32_t> capacity(1024, OCTOLORA_MAX_RANK);  // a gibibyte each
         const uint64_t before = memory_in_use(s.device);
         const octolora_status status =
             octolora_slots_create(linear.get(), 1024, capacity.data(), OCTOLORA_LORA_16BIT, &s.made_slots);
         const std::string message = octolora_last_error();
         if (memory_in_use(s.device) != before) fail("slots that could not be made hold memory (%s)", message.c_str());
         return status;
       }},

      {"set: NULL slots",
       bad,
       {"slots", "NULL"},
       [](S s) { return octolora_slots_set(nullptr, 0, &s.adapter, 1.f, nullptr); }},
      {"set: NULL adapter",
       bad,
       {"adapter", "NULL"},
       [](S s) { return octolora_slots_set(s.slots.get(), 0, nullptr, 1.f, nullptr); }},
      {"set: slot 2", bad, {"slot = 2", "1"}, [](S s) { return s.set(2); }},
      {"set: slot -1", bad, {"slot = -1"}, [](S s) { return s.set(-1); }},
      {"set: struct_size 4", bad, {"struct_size", "4", "56"}, [](S s) { return s.adapter.struct_size = 4, s.set(); }},
      {"set: rank 0", bad, {"rank = 0", "4"}, [](S s) { return s.adapter.rank = 0, s.set(); }},
      {"set: rank above capacity", bad, {"rank = 4", "capacity", "2"}, [](S s) { return s.set(1); }},
      {"set: a_dtype 7", bad, {"a_dtype = 7"}, [](S s) { return s.adapter.a_dtype = 7, s.set(); }},
      {"set: b_dtype -1", bad, {"b_dtype = -1"}, [](S s) { return s.adapter.b_dtype = -1, s.set(); }},
      {"set: split where not made for it",
       bad,
       {"precision = 1", "SPLIT"},
       [](S s) { return s.adapter.precision = OCTOLORA_LORA_SPLIT, s.set(); }},
      {"set: precision 9", bad, {"precision = 9"}, [](S s) { return s.adapter.precision = 9, s.set(); }},
      {"set: b_stride below rank", bad, {"b_stride = 3", "4"}, [](S s) { return s.adapter.b_stride = 3, s.set(); }},
      {"set: NULL a", bad, {"a", "NULL"}, [](S s) { return s.adapter.a = nullptr, s.set(); }},
      {"set: NULL b", bad, {"b", "NULL"}, [](S s) { return s.adapter.b = nullptr, s.set(); }},
      {"set: misaligned a",
       bad,
       {"adapter.a", "4 bytes"},
       [](S s) { return s.adapter.a = shifted(s.a.data(), 1), s.set(); }},
      {"set: NaN bias", bad, {"bias[1]", "nan"}, [](S s) { return s.adapter_bias[1] = kNan, s.set(); }},
      {"set: magnitude where not made for it",
       bad,
       {"magnitude", "OCTOLORA_LORA_MAGNITUDES"},
       [](S s) { return s.adapter.magnitude = s.adapter_bias.data(), s.set(); }},
      {"set: magnitude and bias",
       OCTOLORA_UNSUPPORTED,
       {"magnitude", "bias"},
       [](S s) {
         const int32_t capacity[] = {4};
         CHECK_OK(s.make_with(1, capacity, OCTOLORA_LORA_MAGNITUDES));
         s.adapter.magnitude = s.adapter_bias.data();
         const octolora_status status = octolora_slots_set(s.made_slots, 0, &s.adapter, 1.f, nullptr);
         octolora_slots_destroy(std::exchange(s.made_slots, nullptr));
         return status;
       }},
      {"set_many: count -1", bad, {"count = -1"}, [](S) { return octolora_slots_set_many(nullptr, -1, nullptr); }},
      {"set_many: NULL fills", bad, {"fills", "NULL"}, [](S) { return octolora_slots_set_many(nullptr, 1, nullptr); }},
      {"set_many: second fill",
       bad,
       {"fills[1]", "slot = 2"},
       [](S s) {
         octolora_slot_fill fills[2] = {};
         fills[0] = {sizeof fills[0], 0, s.slots.get(), &s.adapter, 1.f};
         fills[1] = {sizeof fills[1], 2, s.slots.get(), &s.adapter, 1.f};
         return octolora_slots_set_many(fills, 2, nullptr);
       }},
      {"scales: NULL slots",
       bad,
       {"slots", "NULL"},
       [](S) {
         float* scales = nullptr;
         return octolora_slots_scales(nullptr, &scales);
       }},
      {"scales: NULL scales",
       bad,
       {"scales", "NULL"},
       [](S s) { return octolora_slots_scales(s.slots.get(), nullptr); }},
      {"refresh: NULL slots", bad, {"slots", "NULL"}, [](S) { return octolora_slots_refresh(nullptr, nullptr); }},
      {"host_alloc: NULL memory",
       bad,
       {"memory", "NULL"},
       [](S s) { return octolora_host_alloc(s.device, 1, nullptr); }},
      {"set: NaN scale", bad, {"scale", "nan"}, [](S s) { return s.set(0, kNan); }},
      {"set: infinite scale", bad, {"scale", "inf"}, [](S s) { return s.set(0, -kInf); }},
      {"set_scale: NaN",
       bad,
       {"scale", "nan"},
       [](S s) { return octolora_slots_set_scale(s.slots.get(), 0, kNan, nullptr); }},
      {"set_scale: slot 9",
       bad,
       {"slot = 9"},
       [](S s) { return octolora_slots_set_scale(s.slots.get(), 9, 1.f, nullptr); }},
      {"set_scale: NULL", bad, {"slots", "NULL"}, [](S) { return octolora_slots_set_scale(nullptr, 0, 1.f, nullptr); }},
      {"clear: slot 9", bad, {"slot = 9"}, [](S s) { return octolora_slots_clear(s.slots.get(), 9, nullptr); }},
      {"clear: NULL", bad, {"slots", "NULL"}, [](S) { return octolora_slots_clear(nullptr, 0, nullptr); }},

      {"workspace: NULL linear",
       bad,
       {"linear", "NULL"},
       [](S s) { return octolora_linear_workspace(nullptr, nullptr, 1, 0, &s.workspace_bytes); }},
      {"workspace: NULL result",
       bad,
       {"bytes", "NULL"},
       [](S s) { return octolora_linear_workspace(s.linear.get(), nullptr, 1, 0, nullptr); }},
      {"workspace: rows -1",
       bad,
       {"rows = -1"},
       [](S s) { return octolora_linear_workspace(s.linear.get(), nullptr, -1, 0, &s.workspace_bytes); }},
      {"workspace: dtype 3",
       bad,
       {"x_dtype = 3"},
       [](S s) { return octolora_linear_workspace(s.linear.get(), nullptr, 1, 3, &s.workspace_bytes); }},

      {"forward: NULL linear", bad, {"linear", "NULL"}, [](S s) { return s.forward([](C c) { c.linear = nullptr; }); }},
      {"forward: NULL x", bad, {"x", "NULL"}, [](S s) { return s.forward([](C c) { c.x = nullptr; }); }},
      {"forward: NULL y", bad, {"y", "NULL"}, [](S s) { return s.forward([](C c) { c.y = nullptr; }); }},
      {"forward: misaligned x",
       bad,
       {"x = ", "4 bytes"},
       [](S s) { return s.forward([](C c) { c.x = static_cast<const char*>(c.x) + 2; }); }},
      {"forward: misaligned y",
       bad,
       {"y = ", "4 bytes"},
       [](S s) { return s.forward([](C c) { c.y = shifted(c.y, 1); }); }},
      {"forward: y is x",
       bad,
       {"overlap", "84 bytes", "60 bytes"},
       [](S s) { return s.forward([](C c) { c.y = const_cast<void*>(c.x); }); }},
      {"forward: the workspace is x",
       bad,
       {"workspace (", "x (84 bytes", "overlap"},
       [](S s) { return s.forward([](C c) { c.workspace = const_cast<void*>(c.x); }); }},
      {"forward: the workspace is y",
       bad,
       {"workspace (", "y (60 bytes", "overlap"},
       [](S s) { return s.forward([](C c) { c.workspace = c.y; }); }},
      {"forward: x_dtype 3", bad, {"x_dtype = 3"}, [](S s) { return s.forward([](C c) { c.x_dtype = 3; }); }},
      {"forward: y_dtype -1", bad, {"y_dtype = -1"}, [](S s) { return s.forward([](C c) { c.y_dtype = -1; }); }},
      {"forward: rows -3", bad, {"rows = -3"}, [](S s) { return s.forward([](C c) { c.rows = -3; }); }},
      {"forward: small workspace",
       OCTOLORA_WORKSPACE_TOO_SMALL,
       {"workspace_bytes"},
       [](S s) { return s.forward([](C c) { c.bytes -= 1; }); }},
      {"forward: no workspace",
       OCTOLORA_WORKSPACE_TOO_SMALL,
       {"workspace_bytes = 0"},
       [](S s) { return s.forward([](C c) { c.workspace = nullptr, c.bytes = 0; }); }},
      {"forward: NULL workspace",
       bad,
       {"workspace", "NULL"},
       [](S s) { return s.forward([](C c) { c.workspace = nullptr; }); }},
      {"forward: misaligned workspace",
       bad,
       {"workspace", "256"},
       [](S s) { return s.forward([](C c) { c.workspace = shifted(c.workspace, 128); }); }},
      {"forward: more rows than the workspace is for",
       OCTOLORA_WORKSPACE_TOO_SMALL,
       {"workspace_bytes"},
       [](S s) {
         return s.forward([](C c) {
           c.rows = 4000;
           c.y = shifted(c.y, 1 << 24);
         });
       }},
      {"forward: stream on the CPU", bad, {"stream"}, on_cpu_stream([](S s, octolora_stream stream) {
         return s.forward([=](C c) { c.stream = stream; });
       })},
      {"quantized: stream on the CPU", bad, {"stream"}, on_cpu_stream([](S s, octolora_stream stream) {
         return octolora_linear_quantized(s.linear.get(), s.x->get(), 0, nullptr, nullptr, nullptr, 3,
                                          s.workspace->get(), s.workspace_bytes, stream);
       })},
      {"set: stream on the CPU", bad, {"stream"}, on_cpu_stream([](S s, octolora_stream stream) {
         return octolora_slots_set(s.slots.get(), 0, &s.adapter, 1.f, stream);
       })},
      {"set_scale: stream on the CPU", bad, {"stream"}, on_cpu_stream([](S s, octolora_stream stream) {
         return octolora_slots_set_scale(s.slots.get(), 0, 1.f, stream);
       })},
      {"clear: stream on the CPU", bad, {"stream"}, on_cpu_stream([](S s, octolora_stream stream) {
         return octolora_slots_clear(s.slots.get(), 0, stream);
       })},
      {"copy: stream on the CPU", bad, {"stream"}, on_cpu_stream([](S s, octolora_stream stream) {
         return octolora_device_copy(s.device, s.x->get(), s.a.data(), 4, stream);
       })},
      {"synchronize: stream on the CPU", bad, {"stream"}, on_cpu_stream([](S s, octolora_stream stream) {
         return octolora_stream_synchronize(s.device, stream);
       })},

      {"group: NULL desc", bad, {"desc", "NULL"}, [](S) { return octolora_forward(nullptr, nullptr); }},
      {"group: struct_size 16",
       bad,
       {"desc.struct_size = 16", "64"},
       [](S s) { return s.group([](G g) { g.desc.struct_size = 16; }); }},
      {"group: no outputs",
       bad,
       {"output_count = 0", "1 to 8"},
       [](S s) { return s.group([](G g) { g.desc.output_count = 0; }); }},
      {"group: 9 outputs",
       bad,
       {"output_count = 9", "1 to 8"},
       [](S s) { return s.group([](G g) { g.desc.output_count = 9; }); }},
      {"group: NULL outputs",
       bad,
       {"outputs", "NULL"},
       [](S s) { return s.group([](G g) { g.desc.outputs = nullptr; }); }},
      {"group: struct_size 0 of an output",
       bad,
       {"outputs[0].struct_size = 0", "48"},
       [](S s) { return s.group([](G g) { g.outputs[0].struct_size = 0; }); }},
      {"group: outputs of two sizes",
       bad,
       {"outputs[1].struct_size = 56", "48"},
       [](S s) { return s.group([](G g) { g.outputs[1].struct_size = 56; }); }},
      {"group: NULL linear",
       bad,
       {"outputs[1].linear", "NULL"},
       [](S s) { return s.group([](G g) { g.outputs[1].linear = nullptr; }); }},
      {"group: activation 4",
       bad,
       {"outputs[1].activation = 4"},
       [](S s) { return s.group([](G g) { g.outputs[1].activation = 4; }); }},
      {"group: activation -1",
       bad,
       {"outputs[0].activation = -1"},
       [](S s) { return s.group([](G g) { g.outputs[0].activation = -1; }); }},
      {"group: slots of another linear",
       bad,
       {"outputs[1].slots", "n = 5, k = 7"},
       [](S s) { return s.group([&](G g) { g.outputs[1].slots = s.slots.get(); }); }},
      {"group: another mode",
       bad,
       {"outputs[1].linear", "W8A16", "W8A8 dynamic"},
       [](S s) { return s.group([&](G g) { g.outputs[1].linear = s.w8a16.get(); }); }},
      {"group: another k",
       bad,
       {"outputs[1].linear", "k = 6 and 7"},
       [](S s) {
         Problem other = s.problem;
         other.k = 6;
         const Linear linear = make_linear(s.device, other);
         return s.group([&](G g) { g.outputs[1].linear = linear.get(); });
       }},
      {"group: another threshold",
       bad,
       {"outputs[1].linear", "outlier_threshold 6 and 0"},
       [](S s) {
         Problem other = s.problem;
         other.threshold = 6;
         const Linear linear = make_linear(s.device, other);
         return s.group([&](G g) { g.outputs[1].linear = linear.get(); });
       }},
      {"group: another divisor",
       bad,
       {"outputs[1].linear", "x_divisor 127.5 and 127"},
       [](S s) {
         Problem other = s.problem;
         other.x_divisor = 127.5;
         const Linear linear = make_linear(s.device, other);
         return s.group([&](G g) { g.outputs[1].linear = linear.get(); });
       }},
      {"group: another rounding of x",
       bad,
       {"outputs[1].linear", "round_x 1 and 0"},
       [](S s) {
         Problem other = s.problem;
         other.round_x = true;
         const Linear linear = make_linear(s.device, other);
         return s.group([&](G g) { g.outputs[1].linear = linear.get(); });
       }},
      {"group: another device",
       bad,
       {"outputs[1].linear", "octolora_device"},
       [](S s) {
         const Device device = open_device(s.cuda ? 0 : OCTOLORA_CPU);
         const Linear linear = make_linear(device.get(), s.problem);
         return s.group([&](G g) { g.outputs[1].linear = linear.get(); });
       }},
      {"group: rows -1", bad, {"rows = -1"}, [](S s) { return s.group([](G g) { g.desc.rows = -1; }); }},
      {"group: x_dtype 3", bad, {"x_dtype = 3"}, [](S s) { return s.group([](G g) { g.desc.x_dtype = 3; }); }},
      {"group: y_dtype 3", bad, {"y_dtype = 3"}, [](S s) { return s.group([](G g) { g.desc.y_dtype = 3; }); }},
      {"group: NULL x", bad, {"x", "NULL"}, [](S s) { return s.group([](G g) { g.desc.x = nullptr; }); }},
      {"group: NULL y",
       bad,
       {"outputs[1].y", "NULL"},
       [](S s) { return s.group([](G g) { g.outputs[1].y = nullptr; }); }},
      {"group: misaligned y",
       bad,
       {"outputs[1].y = ", "4 bytes"},
       [](S s) { return s.group([](G g) { g.outputs[1].y = shifted(g.outputs[1].y, 2); }); }},
      {"group: misaligned residual",
       bad,
       {"outputs[0].residual = ", "4 bytes"},
       [](S s) { return s.group([](G g) { g.outputs[0].residual = shifted(g.outputs[0].y, 2); }); }},
      {"group: misaligned gate",
       bad,
       {"outputs[1].gate = ", "4 bytes"},
       [](S s) { return s.group([](G g) { g.outputs[1].gate = static_cast<const char*>(g.desc.x) + 1; }); }},
      {"group: misaligned row_slot",
       bad,
       {"row_slot = ", "4 bytes"},
       [](S s) {
         return s.group([&](G g) { g.desc.row_slot = reinterpret_cast<int32_t*>(shifted(s.row_slot->get(), 2)); });
       }},
      {"group: one y for two outputs",
       bad,
       {"outputs[1].y", "outputs[0].y", "overlap", "60 bytes"},
       [](S s) { return s.group([](G g) { g.outputs[1].y = g.outputs[0].y; }); }},
      {"group: y is x",
       bad,
       {"outputs[1].y", "x (84 bytes", "overlap"},
       [](S s) { return s.group([](G g) { g.outputs[1].y = const_cast<void*>(g.desc.x); }); }},
      {"group: the residual is another's y",
       bad,
       {"outputs[0].residual", "outputs[1].y", "overlap"},
       [](S s) { return s.group([](G g) { g.outputs[0].residual = g.outputs[1].y; }); }},
      {"group: the residual is part of y",
       bad,
       {"outputs[0].residual", "outputs[0].y", "overlap"},
       [](S s) { return s.group([](G g) { g.outputs[0].residual = shifted(g.outputs[0].y, 4); }); }},
      {"group: the gate is in y",
       bad,
       {"outputs[1].gate (20 bytes", "outputs[0].y", "overlap"},
       [](S s) { return s.group([](G g) { g.outputs[1].gate = g.outputs[0].y; }); }},
      {"group: row_slot and magnitudes",
       OCTOLORA_UNSUPPORTED,
       {"row_slot", "outputs[0].slots", "OCTOLORA_LORA_MAGNITUDES"},
       [](S s) {
         const int32_t capacity[] = {4, 2};
         CHECK_OK(s.make_with(2, capacity, OCTOLORA_LORA_MAGNITUDES));
         const octolora_status status = s.group([&](G g) {
           g.outputs[0].slots = s.made_slots;
           g.desc.row_slot = static_cast<const int32_t*>(s.row_slot->get());
         });
         octolora_slots_destroy(std::exchange(s.made_slots, nullptr));
         return status;
       }},
      {"group: the workspace is a y",
       bad,
       {"workspace (", "outputs[1].y (60 bytes", "overlap"},
       [](S s) { return s.group([](G g) { g.desc.workspace = g.outputs[1].y; }); }},
      {"group: row_slot is in y",
       bad,
       {"row_slot (12 bytes", "outputs[0].y", "overlap"},
       [](S s) { return s.group([](G g) { g.desc.row_slot = static_cast<const int32_t*>(g.outputs[0].y); }); }},
      {"group: the workspace of fewer outputs",
       OCTOLORA_WORKSPACE_TOO_SMALL,
       {"workspace_bytes"},
       [](S s) { return s.group([](G g) { g.desc.workspace_bytes -= 1; }); }},
      {"group: NULL workspace",
       bad,
       {"workspace", "NULL"},
       [](S s) { return s.group([](G g) { g.desc.workspace = nullptr; }); }},
      {"group: misaligned workspace",
       bad,
       {"workspace", "256"},
       [](S s) { return s.group([](G g) { g.desc.workspace = shifted(g.desc.workspace, 64); }); }},
      {"group: stream on the CPU", bad, {"stream"}, on_cpu_stream([](S s, octolora_stream stream) {
         return s.group([=](G g) { g.stream = stream; });
       })},
      {"group workspace: NULL result",
       bad,
       {"bytes", "NULL"},
       [](S s) {
         octolora_status status = OCTOLORA_OK;
         s.group([&](G g) { status = octolora_forward_workspace(&g.desc, nullptr); });
         return status;
       }},
      {"group workspace: NULL desc",
       bad,
       {"desc", "NULL"},
       [](S s) { return octolora_forward_workspace(nullptr, &s.workspace_bytes); }},
      {"group workspace: 9 outputs",
       bad,
       {"output_count = 9"},
       [](S s) { return s.group([](G g) { g.desc.output_count = 9; }, Scene::Ask::workspace); }},

      {"explain: NULL text",
       bad,
       {"text", "NULL"},
       [](S s) {
         octolora_status status = OCTOLORA_OK;
         s.group([&](G g) { status = octolora_forward_explain(&g.desc, nullptr, 9); });
         return status;
       }},
      {"explain: size 0",
       bad,
       {"size = 0"},
       [](S s) {
         octolora_status status = OCTOLORA_OK;
         char text = '?';
         s.group([&](G g) { status = octolora_forward_explain(&g.desc, &text, 0); });
         if (text != '?') fail("text was written");
         return status;
       }},
      {"explain: rows -2",
       bad,
       {"rows = -2"},
       [](S s) {
         octolora_status status = OCTOLORA_OK;
         char text[9];
         s.group([&](G g) {
           g.desc.rows = -2;
           status = octolora_forward_explain(&g.desc, text, sizeof text);
           g.desc.rows = 0;
         });
         return status;
       }},

      {"quantized: W8A16",
       OCTOLORA_UNSUPPORTED,
       {"W8A16", "5", "7"},
       [](S s) {
         return octolora_linear_quantized(s.w8a16.get(), s.x->get(), 0, nullptr, nullptr, nullptr, 3,
                                          s.workspace->get(), s.workspace_bytes, nullptr);
       }},
      {"quantized: NULL linear",
       bad,
       {"linear", "NULL"},
       [](S s) {
         return octolora_linear_quantized(nullptr, s.x->get(), 0, nullptr, nullptr, nullptr, 3, s.workspace->get(),
                                          s.workspace_bytes, nullptr);
       }},
      {"quantized: NULL x",
       bad,
       {"x", "NULL"},
       [](S s) {
         return octolora_linear_quantized(s.linear.get(), nullptr, 0, nullptr, nullptr, nullptr, 3, s.workspace->get(),
                                          s.workspace_bytes, nullptr);
       }},
      {"quantized: misaligned sums",
       bad,
       {"sums", "4 bytes"},
       [](S s) {
         return octolora_linear_quantized(s.linear.get(), s.x->get(), 0,
                                          reinterpret_cast<int32_t*>(shifted(s.y->get(), 2)), nullptr, nullptr, 3,
                                          s.workspace->get(), s.workspace_bytes, nullptr);
       }},
      {"quantized: no workspace",
       OCTOLORA_WORKSPACE_TOO_SMALL,
       {"workspace_bytes = 0"},
       [](S s) {
         return octolora_linear_quantized(s.linear.get(), s.x->get(), 0, nullptr, nullptr, nullptr, 3, nullptr, 0,
                                          nullptr);
       }},
  };
}

void bad_call(octolora_device* device, bool cuda, const BadCall& bad) {
  const uint64_t empty = memory_in_use(device);
  {
    Scene scene(device, cuda);
    const uint64_t before = memory_in_use(device);
    const octolora_status status = bad.run(scene);
    const std::string message = octolora_last_error();
    if (status != bad.status) {
      octolora_linear_destroy(scene.made_linear);
      octolora_slots_destroy(scene.made_slots);
      fail("%s instead of %s (last message: %s)", octolora_status_name(status), octolora_status_name(bad.status),
           message.c_str());
    }
    if (message.empty()) fail("no message");
    for (const char* word : bad.words) {
      if (message.find(word) == std::string::npos) fail("the message '%s' lacks '%s'", message.c_str(), word);
    }
    if (scene.made_linear || scene.made_slots) fail("a failed create wrote its result");
    if (memory_in_use(device) != before) fail("memory_in_use changed by the failed call");

    // The objects of the scene still work: x is zeros, so y is the bias.
    const octolora_status after = scene.forward(scene.call());
    if (after != OCTOLORA_OK) fail("a good call afterwards: %s", octolora_last_error());
    CHECK_OK(octolora_stream_synchronize(device, nullptr));
    const std::vector<uint8_t> y = scene.y->read();
    for (int i = 0; i < 15; ++i) {
      if (decode(Type::f32, &y[4 * i]) != 1.f) fail("a good call afterwards gives %g", decode(Type::f32, &y[4 * i]));
    }
  }
  if (memory_in_use(device) != empty) fail("bytes in use are left");
}

void names_and_versions() {
  if (octolora_abi_version() != OCTOLORA_ABI_VERSION)
    fail("ABI version %u, header %d", octolora_abi_version(), OCTOLORA_ABI_VERSION);
  const std::string version = octolora_version();
  if (version.rfind(OCTOLORA_TEST_VERSION " (", 0) != 0 || version.back() != ')') fail("version '%s'", version.c_str());
  const struct {
    octolora_status status;
    const char* name;
  } names[] = {{0, "OCTOLORA_OK"},
               {1, "OCTOLORA_INVALID_ARGUMENT"},
               {2, "OCTOLORA_OUT_OF_MEMORY"},
               {3, "OCTOLORA_NO_DEVICE"},
               {4, "OCTOLORA_UNSUPPORTED"},
               {5, "OCTOLORA_CUDA_ERROR"},
               {6, "OCTOLORA_WORKSPACE_TOO_SMALL"},
               {7, "OCTOLORA_INTERNAL"},
               {8, "unknown status"},
               {-1, "unknown status"}};
  for (const auto& n : names) {
    if (std::string(octolora_status_name(n.status)) != n.name)
      fail("status %d is named '%s'", n.status, octolora_status_name(n.status));
  }
}

// Each thread has its own message; a success does not wipe it.
void messages_by_thread(const Options& options, octolora_device* device) {
  needs_threads(options);
  octolora_device_set_threads(device, 1025);
  const std::string mine = octolora_last_error();
  std::string fresh, other;
  std::thread([&] {
    fresh = octolora_last_error();
    octolora_device_set_threads(device, 0);
    other = octolora_last_error();
  }).join();
  if (!fresh.empty()) fail("a new thread starts with '%s'", fresh.c_str());
  if (other.find("threads = 0") == std::string::npos) fail("the other thread's message is '%s'", other.c_str());
  memory_in_use(device);
  if (octolora_last_error() != mine) fail("'%s' became '%s'", mine.c_str(), octolora_last_error());
}

void destroy_null() {
  octolora_device_destroy(nullptr);
  octolora_linear_destroy(nullptr);
  octolora_slots_destroy(nullptr);
}

// Without CUDA: a count of 0, a reason, and the same reason for every ordinal. With: one ordinal too many is named.
void cuda_presence() {
  int32_t count = -1;
  const octolora_status status = octolora_cuda_device_count(&count);
  octolora_device* device = nullptr;
  if (status == OCTOLORA_OK) {
    if (count < 1) fail("OCTOLORA_OK with %d devices", count);
    if (octolora_device_create(count, &device) != OCTOLORA_NO_DEVICE)
      fail("ordinal %d of %d devices was taken", count, count);
    if (std::string(octolora_last_error()).find(text("%d", count)) == std::string::npos) {
      fail("the message '%s' lacks the ordinal %d", octolora_last_error(), count);
    }
    return;
  }
  const std::string reason = octolora_last_error();
  if (status != OCTOLORA_NO_DEVICE || count != 0)
    fail("%s, count %d, expected OCTOLORA_NO_DEVICE, 0", octolora_status_name(status), count);
  if (reason.size() < 10) fail("the reason is '%s'", reason.c_str());
  if (octolora_device_create(0, &device) != OCTOLORA_NO_DEVICE) fail("ordinal 0 was taken without CUDA");
  if (device) fail("a failed create wrote its result");
  std::printf("CUDA is absent here: %s\n", reason.c_str());
}

void info(octolora_device* device, int ordinal) {
  octolora_device_info info;
  std::memset(&info, 0x5a, sizeof info);
  info.struct_size = sizeof info;
  CHECK_OK(octolora_device_get_info(device, &info));
  if (info.struct_size != sizeof info) fail("struct_size = %u", info.struct_size);
  if (info.ordinal != ordinal) fail("ordinal = %d, expected %d", info.ordinal, ordinal);
  if (info.units < 1) fail("units = %d", info.units);
  if (!std::memchr(info.name, 0, sizeof info.name) || !info.name[0]) fail("name is empty or has no end");
  if (!std::memchr(info.kernels, 0, sizeof info.kernels) || !info.kernels[0]) fail("kernels is empty or has no end");
  if ((info.compute_capability >= 80) != (ordinal >= 0)) fail("compute_capability = %d", info.compute_capability);
  const char* wanted = std::getenv("OCTOLORA_CPU_ISA");
  if (ordinal < 0 && wanted) {  // the processor may have less
    const std::vector<std::string> sets = {"portable", "avx2", "avx512-vnni"};
    const auto level = [&](const char* name) { return std::find(sets.begin(), sets.end(), name) - sets.begin(); };
    if (level(info.kernels) > level(wanted)) fail("kernels %s, though OCTOLORA_CPU_ISA=%s", info.kernels, wanted);
  }
  std::printf("%s: %s, %d units, %llu MiB, kernels %s\n", ordinal < 0 ? "cpu" : "cuda", info.name, info.units,
              static_cast<unsigned long long>(info.memory_bytes >> 20), info.kernels);
}

// Memory is counted while it is held and aligned as documented; 0 bytes are an allocation like any other.
void allocation(octolora_device* device) {
  const uint64_t before = memory_in_use(device);
  for (size_t bytes : {size_t{0}, size_t{1}, size_t{255}, size_t{1} << 20}) {
    void* memory = nullptr;
    CHECK_OK(octolora_device_alloc(device, bytes, &memory));
    if (!memory) fail("%zu bytes gave NULL", bytes);
    if (reinterpret_cast<uintptr_t>(memory) % 256) fail("%zu bytes at %p, not 256-byte aligned", bytes, memory);
    if (memory_in_use(device) < before + bytes) fail("%zu bytes are not counted", bytes);
    CHECK_OK(octolora_device_free(device, memory));
    if (memory_in_use(device) != before) fail("%zu bytes freed are still counted", bytes);
  }
  CHECK_OK(octolora_device_free(device, nullptr));
  CHECK_OK(octolora_device_copy(device, nullptr, nullptr, 0, nullptr));
}

// A linear holds its int8 weights and little else: never a wider copy.
void weight_memory(octolora_device* device) {
  Problem p;
  p.n = 1024;
  p.k = 2048;
  p.w.assign(static_cast<size_t>(p.n) * p.k, 3);
  p.w_scale.assign(p.n, 1.f);
  p.block_scale = Typed(Type::f16, p.w.size() / 32);
  const struct {
    int32_t mode;
    int scale_block;
  } kinds[] = {{OCTOLORA_W8A16, 0}, {OCTOLORA_W8A16, 32}, {OCTOLORA_W8A8_DYNAMIC, 0}};
  for (const auto& [mode, scale_block] : kinds) {
    p.mode = mode;
    p.scale_block = scale_block;
    const uint64_t before = memory_in_use(device);
    const Linear linear = make_linear(device, p);
    const uint64_t held = memory_in_use(device) - before;
    // Weights, a scale, a bias and a column sum for each channel, and the padding of each dimension to whole tiles.
    // Block scales stay in 16 bits.
    const uint64_t scales = scale_block ? static_cast<uint64_t>(p.n + 256) * (p.k / 32) * 2 : 0;
    const uint64_t most = static_cast<uint64_t>(p.n + 256) * (p.k + 256) + scales + 16ull * p.n + 4096;
    if (held < p.w.size() || held > most) {
      fail("mode %d: %llu bytes held for %zu weights, expected at most %llu", mode, (unsigned long long)held,
           p.w.size(), (unsigned long long)most);
    }
  }
}

// Objects keep what they stand on: handles may be destroyed in any order.
void any_order(int ordinal) {
  octolora_device* device = nullptr;
  CHECK_OK(octolora_device_create(ordinal, &device));
  Problem p;
  p.n = 3, p.k = 4;
  p.w.assign(12, 1);
  p.w_scale.assign(1, 1.f);
  const octolora_linear_desc desc = describe(p);
  octolora_linear* linear = nullptr;
  CHECK_OK(octolora_linear_create(device, &desc, &linear));
  const int32_t capacity = 2;
  octolora_slots* slots = nullptr;
  CHECK_OK(octolora_slots_create(linear, 1, &capacity, OCTOLORA_LORA_16BIT, &slots));
  octolora_device_destroy(device);
  octolora_linear_destroy(linear);
  octolora_slots_destroy(slots);
}

// No rows: nothing is read, written or asked for.
void no_rows(octolora_device* device, bool cuda) {
  Scene s(device, cuda);
  size_t bytes = 1;
  CHECK_OK(octolora_linear_workspace(s.linear.get(), s.slots.get(), 0, OCTOLORA_FLOAT16, &bytes));
  CHECK_OK(octolora_linear_forward(s.linear.get(), s.slots.get(), nullptr, 0, nullptr, 0, 0, nullptr, bytes, nullptr));
  CHECK_OK(s.group([](Scene::Group& g) {
    g.desc.rows = 0;
    g.desc.x = g.desc.workspace = nullptr;
    g.outputs[0].y = g.outputs[1].y = nullptr;
    CHECK_OK(octolora_forward_workspace(&g.desc, &g.desc.workspace_bytes));
  }));
  CHECK_OK(
      octolora_linear_quantized(s.linear.get(), nullptr, 0, nullptr, nullptr, nullptr, 0, nullptr, bytes, nullptr));
}

// A description of a later version, whose structs have grown at their ends, means the same.
void grown_structs(octolora_device* device, bool cuda) {
  Scene s(device, cuda);
  struct Grown {
    octolora_output output;
    int64_t later;
  } grown[2] = {};
  CHECK_OK(s.group([&](Scene::Group& g) {
    for (int i = 0; i < 2; ++i) {
      grown[i].output = g.outputs[i];
      grown[i].output.struct_size = sizeof grown[i];
      grown[i].later = -1;
    }
    g.desc.outputs = &grown[0].output;
  }));
  CHECK_OK(octolora_stream_synchronize(device, nullptr));
  for (const Buffer* y : {s.y.get(), s.twin_y.get()}) {
    const std::vector<uint8_t> bytes = y->read();
    for (int i = 0; i < 15; ++i)
      if (decode(Type::f32, &bytes[4 * i]) != 1.f)
        fail("y[%d] = %g, expected the bias, 1", i, decode(Type::f32, &bytes[4 * i]));
  }
}

// One of a version without block scales ends before them; what lies behind it is not read.
void linear_without_blocks(octolora_device* device) {
  Problem p;
  p.n = 3, p.k = 4;
  p.w.assign(12, 1);
  p.w_scale.assign(1, 1.f);
  octolora_linear_desc desc = describe(p);
  desc.struct_size = offsetof(octolora_linear_desc, scale_block);
  desc.scale_block = -1;
  octolora_linear* linear = nullptr;
  CHECK_OK(octolora_linear_create(device, &desc, &linear));
  octolora_linear_destroy(linear);
}

// How a linear with block scales runs, with few rows and with many.
void explained_blocks(octolora_device* device, bool cuda) {
  for (const int m : {3, 200}) {
    Spec s;
    s.mode = OCTOLORA_W8A16;
    s.scale_block = 32;
    s.m = m, s.n = 64, s.k = 64;
    s.x_type = s.y_type = Type::bf16;
    const Problem p = make_problem(s);
    const Linear linear = make_linear(device, p);
    const std::string whole = Runner(device, cuda, linear.get(), nullptr, p).explain();
    for (const char* word : {"block scales", cuda ? "mma" : "cpu: "})
      if (whole.find(word) == std::string::npos) fail("the explanation lacks '%s':\n%s", word, whole.c_str());
  }
}

// Text of whole lines that name the call; what does not fit is cut off.
void explanation(octolora_device* device, bool cuda) {
  Scene s(device, cuda);
  CHECK_OK(s.group([&](Scene::Group& g) {
    char text[4096], part[41];
    CHECK_OK(octolora_forward_explain(&g.desc, text, sizeof text));
    const std::string whole = text;
    for (const char* word : {"x [3, 7] fp32, W8A8 dynamic, y fp32, 2 outputs", "N = 5", cuda ? "\n1 " : "cpu: "})
      if (whole.find(word) == std::string::npos) fail("the explanation lacks '%s':\n%s", word, text);
    if (whole.back() != '\n') fail("the explanation ends within a line:\n%s", text);
    std::memset(part, '?', sizeof part);
    CHECK_OK(octolora_forward_explain(&g.desc, part, 40));
    if (part != whole.substr(0, 39) || part[40] != '?') fail("cut to 39 characters it is '%s'", part);
  }));
}

// Asking does not overflow: the most rows there can be need more than fewer do.
void workspace_grows(octolora_device* device) {
  Problem p;
  p.n = 4;
  p.k = OCTOLORA_MAX_K;
  p.w.assign(static_cast<size_t>(p.n) * p.k, 1);
  p.w_scale.assign(1, 1.f);
  for (int32_t mode : {OCTOLORA_W8A16, OCTOLORA_W8A8_DYNAMIC}) {
    p.mode = mode;
    const Linear linear = make_linear(device, p);
    size_t last = 0;
    for (int32_t rows : {1, 2, 1000, 100000, std::numeric_limits<int32_t>::max()}) {
      size_t bytes = 0;
      CHECK_OK(octolora_linear_workspace(linear.get(), nullptr, rows, OCTOLORA_FLOAT32, &bytes));
      if (bytes < last) fail("mode %d: %zu bytes for %d rows, %zu for fewer", mode, bytes, rows, last);
      last = bytes;
    }
  }
}

void fill(Suite& suite, const Options& options) {
  const std::shared_ptr<octolora_device> device(open_device(options.ordinal));
  const bool cuda = options.cuda();
  for (const BadCall& bad : bad_calls()) {
    suite.add(bad.name, [=] { bad_call(device.get(), cuda, bad); });
  }
  suite.add("names and versions", names_and_versions);
  suite.add("messages by thread", [=] { messages_by_thread(options, device.get()); });
  suite.add("destroy NULL", destroy_null);
  suite.add("presence of CUDA", cuda_presence);
  suite.add("device info", [=] { info(device.get(), options.ordinal); });
  suite.add("allocation", [=] { allocation(device.get()); });
  suite.add("weight memory", [=] { weight_memory(device.get()); });
  suite.add("destroyed in any order", [=] { any_order(options.ordinal); });
  suite.add("explanation", [=] { explanation(device.get(), cuda); });
  suite.add("grown structs", [=] { grown_structs(device.get(), cuda); });
  suite.add("linear of a version without blocks", [=] { linear_without_blocks(device.get()); });
  suite.add("explanation of block scales", [=] { explained_blocks(device.get(), cuda); });
  suite.add("no rows", [=] { no_rows(device.get(), cuda); });
  suite.add("workspace of many rows", [=] { workspace_grows(device.get()); });
}

}  // namespace
}  // namespace test

int main(int argc, char** argv) { return test::run_main(argc, argv, test::fill); }
