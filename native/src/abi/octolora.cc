// SPDX-License-Identifier: Apache-2.0
//
// The C ABI: checks arguments, owns handles, turns exceptions into statuses and messages. No arithmetic.
#include "octolora/octolora.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <exception>
#include <limits>
#include <new>
#include <string>

#include "backend.h"

#ifndef OCTOLORA_VERSION_STRING
#error "the build defines OCTOLORA_VERSION_STRING"
#endif

using octolora::Activation;
using octolora::Device;
using octolora::Dtype;
using octolora::Error;
using octolora::ForwardArgs;
using octolora::Linear;
using octolora::LinearSpec;
using octolora::Mode;
using octolora::Output;
using octolora::require_finite;
using octolora::SlotFill;
using octolora::Slots;

// Members go in reverse order, so what lives on a device goes before the device.
struct octolora_device {
  std::shared_ptr<Device> impl;
  bool cpu;
};
struct octolora_linear {
  std::shared_ptr<Device> device;
  bool cpu;
  std::shared_ptr<Linear> impl;
};
struct octolora_slots {
  std::shared_ptr<Device> device;
  bool cpu;
  std::shared_ptr<Linear> linear;
  std::vector<int> capacity;
  bool split, magnitudes;
  std::unique_ptr<Slots> impl;
};

namespace {

// A fixed buffer: keeping a message must not fail, least of all when memory is short.
thread_local char last_error[1024] = "";

octolora_status fail(octolora_status status, const char* message) noexcept {
  std::snprintf(last_error, sizeof last_error, "%s", message);
  return status;
}

template <class Body>
octolora_status guarded(Body body) noexcept {
  try {
    body();
    return OCTOLORA_OK;
  } catch (const Error& error) {
    return fail(error.status(), error.what());
  } catch (const std::bad_alloc&) {
    return fail(OCTOLORA_OUT_OF_MEMORY, "out of host memory");
  } catch (const std::exception& error) {
    return fail(OCTOLORA_INTERNAL, error.what());
  } catch (...) {
    return fail(OCTOLORA_INTERNAL, "unknown exception");
  }
}

void require(const void* pointer, const char* what) {
  if (!pointer) throw Error(OCTOLORA_INVALID_ARGUMENT, "%s is NULL", what);
}

void require_aligned(const void* pointer, size_t alignment, const char* what) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  if (address % alignment) {
    throw Error(OCTOLORA_INVALID_ARGUMENT, "%s = %p is not aligned to %zu bytes", what, pointer, alignment);
  }
}

Dtype dtype(int32_t value, const char* what) {
  if (value < OCTOLORA_FLOAT32 || value > OCTOLORA_BFLOAT16) {
    throw Error(
        OCTOLORA_INVALID_ARGUMENT,
        "%s = %d is no element type; expected OCTOLORA_FLOAT32 (0), OCTOLORA_FLOAT16 (1) or OCTOLORA_BFLOAT16 (2)",
        what, value);
  }
  return static_cast<Dtype>(value);
}

void require_rows(int32_t rows) {
  if (rows < 0) throw Error(OCTOLORA_INVALID_ARGUMENT, "rows = %d, expected 0 or more", rows);
}

void require_apart(const void* a, size_t a_bytes, const char* a_name, const void* b, size_t b_bytes,
                   const char* b_name) {
  const auto a0 = reinterpret_cast<uintptr_t>(a), b0 = reinterpret_cast<uintptr_t>(b);
  if (a0 < b0 + b_bytes && b0 < a0 + a_bytes) {
    throw Error(OCTOLORA_INVALID_ARGUMENT, "%s (%zu bytes at %p) and %s (%zu bytes at %p) overlap", a_name, a_bytes, a,
                b_name, b_bytes, b);
  }
}

// Copies a caller's struct of an older or newer size; fields the caller does not know are zero.
template <class Struct>
Struct read_struct(const Struct* given, const char* what, size_t least) {
  require(given, what);
  if (given->struct_size < least) {
    throw Error(OCTOLORA_INVALID_ARGUMENT, "%s.struct_size = %u, expected %zu (sizeof the struct)", what,
                given->struct_size, sizeof(Struct));
  }
  Struct copy{};
  std::memcpy(&copy, given, std::min<size_t>(given->struct_size, sizeof copy));
  return copy;
}

void check_blocks(const octolora_linear_desc& d, LinearSpec& spec) {
  if (d.scale_block < 0 || d.scale_block % 32) {
    throw Error(OCTOLORA_INVALID_ARGUMENT, "scale_block = %d, expected 0 or a multiple of 32", d.scale_block);
  }
  if (!d.scale_block) {
    if (!d.block_scale) return;
    throw Error(OCTOLORA_INVALID_ARGUMENT, "block_scale = %p with scale_block = 0, expected NULL",
                static_cast<const void*>(d.block_scale));
  }
  if (spec.mode != Mode::w8a16) {
    throw Error(OCTOLORA_UNSUPPORTED,
                "scale_block = %d with mode = %d (%s): block scales are for OCTOLORA_W8A16 (0), as each would need an "
                "int32 sum of its own",
                d.scale_block, d.mode, name_of(spec.mode));
  }
  require(d.block_scale, "block_scale");
  require_aligned(d.block_scale, alignof(uint16_t), "block_scale");
  spec.scale_block = d.scale_block;
  const int64_t blocks = spec.scale_blocks();
  for (int64_t i = 0; i < d.n * blocks; ++i) {
    if ((d.block_scale[i] & 0x7c00) != 0x7c00) continue;
    throw Error(OCTOLORA_INVALID_ARGUMENT, "block_scale[%lld,%lld] = 0x%04x, expected a finite fp16 number",
                static_cast<long long>(i / blocks), static_cast<long long>(i % blocks), d.block_scale[i]);
  }
}

LinearSpec check(const octolora_linear_desc& d) {
  if (d.n < 1) throw Error(OCTOLORA_INVALID_ARGUMENT, "n = %d, expected 1 or more", d.n);
  if (d.k < 1 || d.k > OCTOLORA_MAX_K) {
    throw Error(OCTOLORA_INVALID_ARGUMENT, "k = %d, expected 1 to %d, where the int32 sum is exact", d.k,
                OCTOLORA_MAX_K);
  }
  if (d.mode < OCTOLORA_W8A16 || d.mode > OCTOLORA_W8A8_STATIC) {
    throw Error(OCTOLORA_INVALID_ARGUMENT,
                "mode = %d, expected OCTOLORA_W8A16 (0), OCTOLORA_W8A8_DYNAMIC (1) or OCTOLORA_W8A8_STATIC (2)",
                d.mode);
  }
  if (d.scale_count != 1 && d.scale_count != d.n) {
    throw Error(OCTOLORA_INVALID_ARGUMENT, "scale_count = %d, expected 1 or n = %d", d.scale_count, d.n);
  }
  require(d.scale, "scale");
  require_aligned(d.scale, alignof(float), "scale");
  require_finite(d.scale, d.scale_count, "scale");
  if (d.bias) {
    require_aligned(d.bias, alignof(float), "bias");
    require_finite(d.bias, d.n, "bias");
  }
  if (d.round_x != OCTOLORA_FLOAT32 && d.round_x != OCTOLORA_FLOAT16) {
    throw Error(OCTOLORA_INVALID_ARGUMENT, "round_x = %d, expected OCTOLORA_FLOAT32 (0) or OCTOLORA_FLOAT16 (1)",
                d.round_x);
  }
  LinearSpec spec;
  spec.n = d.n;
  spec.k = d.k;
  spec.mode = static_cast<Mode>(d.mode);
  if (spec.mode != Mode::w8a16) spec.round_x_to_f16 = d.round_x == OCTOLORA_FLOAT16;
  if (spec.mode == Mode::fixed) {
    if (!(std::isfinite(d.x_scale) && d.x_scale > 0)) {
      throw Error(OCTOLORA_INVALID_ARGUMENT, "x_scale = %g, expected a finite number above 0", d.x_scale);
    }
    spec.x_scale = d.x_scale;
  }
  if (spec.mode == Mode::dynamic) {
    if (d.x_divisor != 0 && !(d.x_divisor >= 1 && d.x_divisor <= 127.5f)) {
      throw Error(OCTOLORA_INVALID_ARGUMENT, "x_divisor = %g, expected 1 to 127.5, or 0 for 127", d.x_divisor);
    }
    if (d.x_divisor != 0) spec.x_divisor = d.x_divisor;
    if (!(std::isfinite(d.outlier_threshold) && d.outlier_threshold >= 0)) {
      throw Error(OCTOLORA_INVALID_ARGUMENT, "outlier_threshold = %g, expected a finite number, 0 (off) or more",
                  d.outlier_threshold);
    }
    spec.outlier_threshold = d.outlier_threshold;
  }
  check_blocks(d, spec);
  return spec;
}

void require_no_stream(bool cpu, octolora_stream stream) {
  if (cpu && stream) {
    throw Error(OCTOLORA_INVALID_ARGUMENT, "stream = %p, expected NULL on the CPU device", static_cast<void*>(stream));
  }
}

size_t matrix_bytes(int64_t rows, int64_t columns, Dtype type) {
  return static_cast<size_t>(rows) * static_cast<size_t>(columns) * octolora::size_of(type);
}

void check_slots(const octolora_linear* linear, const octolora_slots* slots, const char* what) {
  if (slots && slots->linear != linear->impl) {
    throw Error(OCTOLORA_INVALID_ARGUMENT, "%s were created for another linear (n = %d, k = %d)", what,
                slots->linear->spec.n, slots->linear->spec.k);
  }
}

void check_workspace(size_t needed, const void* workspace, size_t bytes) {
  if (bytes < needed) {
    throw Error(OCTOLORA_WORKSPACE_TOO_SMALL, "workspace_bytes = %zu, expected at least %zu", bytes, needed);
  }
  if (needed) {
    require(workspace, "workspace");
    require_aligned(workspace, 256, "workspace");
  }
}

void check_slot(const octolora_slots* slots, int32_t slot) {
  require(slots, "slots");
  const int count = static_cast<int>(slots->capacity.size());
  if (slot < 0 || slot >= count) {
    throw Error(OCTOLORA_INVALID_ARGUMENT, "slot = %d, expected 0 to %d", slot, count - 1);
  }
}

// "outputs[2].y", in a buffer of its own; "y" alone for an output of no description, number -1.
struct Name {
  Name(int output, const char* field) {
    if (output < 0)
      std::snprintf(text, sizeof text, "%s", field);
    else
      std::snprintf(text, sizeof text, "outputs[%d].%s", output, field);
  }
  operator const char*() const { return text; }

  char text[32];
};

// A call as the caller wrote it, in this library's types; all but the pointers to data is checked.
struct Call {
  const octolora_linear* first = nullptr;
  bool described = false;  // by the caller, and not made from the arguments of a single forward
  size_t workspace_bytes = 0;
  ForwardArgs args;
};

// Valid, with b_stride filled in.
SlotFill read_fill(octolora_slots* slots, int32_t slot, const octolora_adapter_desc* adapter, float scale,
                   octolora_stream stream) {
  check_slot(slots, slot);
  require_no_stream(slots->cpu, stream);
  auto a = read_struct(adapter, "adapter", offsetof(octolora_adapter_desc, magnitude));
  if (a.rank < 1 || a.rank > slots->capacity[slot]) {
    throw Error(OCTOLORA_INVALID_ARGUMENT, "adapter.rank = %d, expected 1 to %d, the capacity of slot %d", a.rank,
                slots->capacity[slot], slot);
  }
  const Dtype a_type = dtype(a.a_dtype, "adapter.a_dtype"), b_type = dtype(a.b_dtype, "adapter.b_dtype");
  if (a.precision != OCTOLORA_LORA_16BIT && !(a.precision == OCTOLORA_LORA_SPLIT && slots->split)) {
    throw Error(OCTOLORA_INVALID_ARGUMENT, "adapter.precision = %d, expected OCTOLORA_LORA_16BIT (0)%s", a.precision,
                slots->split ? " or OCTOLORA_LORA_SPLIT (1)" : "; the slots were not made for OCTOLORA_LORA_SPLIT");
  }
  if (a.b_stride == 0) a.b_stride = a.rank;
  if (a.b_stride < a.rank) {
    throw Error(OCTOLORA_INVALID_ARGUMENT, "adapter.b_stride = %d, expected at least the rank %d, or 0", a.b_stride,
                a.rank);
  }
  require(a.a, "adapter.a");
  require(a.b, "adapter.b");
  require_aligned(a.a, octolora::size_of(a_type), "adapter.a");
  require_aligned(a.b, octolora::size_of(b_type), "adapter.b");
  require_aligned(a.bias, alignof(float), "adapter.bias");
  require_aligned(a.magnitude, alignof(float), "adapter.magnitude");
  if (a.magnitude && !slots->magnitudes) {
    throw Error(OCTOLORA_INVALID_ARGUMENT,
                "adapter.magnitude = %p, expected NULL: the slots were not made with OCTOLORA_LORA_MAGNITUDES",
                static_cast<const void*>(a.magnitude));
  }
  if (a.magnitude && a.bias) throw Error(OCTOLORA_UNSUPPORTED, "an adapter with a magnitude and a bias");
  require_finite(scale, "scale");
  return {slots->impl.get(), slot, a, scale};
}

Output read_output(const octolora_output& given, const octolora_linear* first, int i) {
  require(given.linear, Name(i, "linear"));
  if (given.activation < OCTOLORA_ACTIVATION_NONE || given.activation > OCTOLORA_ACTIVATION_SILU) {
    throw Error(OCTOLORA_INVALID_ARGUMENT,
                "%s = %d, expected OCTOLORA_ACTIVATION_NONE (0), _GELU_TANH (1), _GELU_ERF (2) or _SILU (3)",
                Name(i, "activation").text, given.activation);
  }
  check_slots(given.linear, given.slots, Name(i, "slots"));
  const LinearSpec& spec = given.linear->impl->spec;
  if (first && given.linear->device != first->device) {
    throw Error(OCTOLORA_INVALID_ARGUMENT, "%s is on another octolora_device than outputs[0].linear",
                Name(i, "linear").text);
  }
  if (first && !spec.shares_x_with(first->impl->spec)) {
    const LinearSpec& other = first->impl->spec;
    throw Error(OCTOLORA_INVALID_ARGUMENT,
                "%s reads x another way than outputs[0].linear: k = %d and %d, %s and %s, round_x %d and %d, x_scale "
                "%g and %g, x_divisor %g and %g, outlier_threshold %g and %g",
                Name(i, "linear").text, spec.k, other.k, name_of(spec.mode), name_of(other.mode), spec.round_x_to_f16,
                other.round_x_to_f16, spec.x_scale, other.x_scale, spec.x_divisor, other.x_divisor,
                spec.outlier_threshold, other.outlier_threshold);
  }
  Output output;
  output.linear = given.linear->impl.get();
  output.slots = given.slots ? given.slots->impl.get() : nullptr;
  output.y = given.y;
  output.activation = static_cast<Activation>(given.activation);
  output.residual = given.residual;
  output.gate = given.gate;
  return output;
}

Call read_call(const octolora_forward_desc* given) {
  const auto desc = read_struct(given, "desc", sizeof(octolora_forward_desc));
  Call call;
  call.described = true;
  call.workspace_bytes = desc.workspace_bytes;
  ForwardArgs& args = call.args;
  require_rows(desc.rows);
  args.x = desc.x;
  args.x_type = dtype(desc.x_dtype, "x_dtype");
  args.y_type = dtype(desc.y_dtype, "y_dtype");
  args.rows = desc.rows;
  args.row_slot = desc.row_slot;
  args.workspace = desc.workspace;
  if (desc.output_count < 1 || desc.output_count > OCTOLORA_MAX_OUTPUTS) {
    throw Error(OCTOLORA_INVALID_ARGUMENT, "output_count = %d, expected 1 to %d", desc.output_count,
                OCTOLORA_MAX_OUTPUTS);
  }
  require(desc.outputs, "outputs");
  args.output_count = desc.output_count;
  // An array of structs lies in steps of the size that the caller's header gave them.
  const uint32_t step = desc.outputs->struct_size;
  const char* at = reinterpret_cast<const char*>(desc.outputs);
  for (int i = 0; i < desc.output_count; ++i, at += step) {
    char name[16];
    std::snprintf(name, sizeof name, "outputs[%d]", i);
    const auto output = read_struct(reinterpret_cast<const octolora_output*>(at), name, sizeof(octolora_output));
    if (output.struct_size != step) {
      throw Error(OCTOLORA_INVALID_ARGUMENT, "%s.struct_size = %u, expected %u as in outputs[0]", name,
                  output.struct_size, step);
    }
    args.outputs[i] = read_output(output, call.first, i);
    if (!call.first) call.first = output.linear;
    if (args.row_slot && output.slots && output.slots->magnitudes) {
      throw Error(OCTOLORA_UNSUPPORTED,
                  "row_slot with %s made with OCTOLORA_LORA_MAGNITUDES: magnitudes change the base",
                  Name(i, "slots").text);
    }
  }
  return call;
}

// The pointers to data, once there is at least one row.
void check_data(const Call& call) {
  const ForwardArgs& args = call.args;
  const auto name = [&](int output, const char* field) { return Name(call.described ? output : -1, field); };
  const size_t x_bytes = matrix_bytes(args.rows, args.outputs[0].linear->spec.k, args.x_type);
  const size_t y_element = octolora::size_of(args.y_type);
  require(args.x, "x");
  require_aligned(args.x, octolora::size_of(args.x_type), "x");
  require_aligned(args.row_slot, alignof(int32_t), "row_slot");
  for (int i = 0; i < args.output_count; ++i) {
    const Output& output = args.outputs[i];
    const Name y = name(i, "y");
    require(output.y, y);
    require_aligned(output.y, y_element, y);
    require_aligned(output.residual, y_element, name(i, "residual"));
    require_aligned(output.gate, y_element, name(i, "gate"));
  }
  // Every y against everything that is read and against the other y.
  for (int i = 0; i < args.output_count; ++i) {
    const Name y = name(i, "y");
    const size_t y_bytes = matrix_bytes(args.rows, args.outputs[i].linear->spec.n, args.y_type);
    const auto apart = [&](const void* other, size_t bytes, const char* name) {
      if (other) require_apart(other, bytes, name, args.outputs[i].y, y_bytes, y);
    };
    apart(args.x, x_bytes, "x");
    apart(args.row_slot, static_cast<size_t>(args.rows) * sizeof(int32_t), "row_slot");
    for (int j = 0; j < args.output_count; ++j) {
      const Output& other = args.outputs[j];
      const int n = other.linear->spec.n;
      if (j > i) apart(other.y, matrix_bytes(args.rows, n, args.y_type), name(j, "y"));
      if (j != i || other.residual != other.y) {
        apart(other.residual, matrix_bytes(args.rows, n, args.y_type), name(j, "residual"));
      }
      apart(other.gate, matrix_bytes(1, n, args.y_type), name(j, "gate"));
    }
  }
}

size_t workspace_of(const Call& call) { return call.args.rows ? call.first->device->workspace(call.args) : 0; }

// The bytes of the workspace that are written, against x and every y.
void check_scratch(const Call& call, size_t bytes) {
  const ForwardArgs& args = call.args;
  const auto apart = [&](const void* other, int columns, octolora::Dtype type, const char* name) {
    require_apart(args.workspace, bytes, "workspace", other, matrix_bytes(args.rows, columns, type), name);
  };
  apart(args.x, args.outputs[0].linear->spec.k, args.x_type, "x");
  for (int i = 0; i < args.output_count; ++i) {
    apart(args.outputs[i].y, args.outputs[i].linear->spec.n, args.y_type, Name(call.described ? i : -1, "y"));
  }
}

void forward(Call& call, octolora_stream stream) {
  require_no_stream(call.first->cpu, stream);
  if (!call.args.rows) return;
  check_data(call);
  const size_t scratch = workspace_of(call);
  check_workspace(scratch, call.args.workspace, call.workspace_bytes);
  check_scratch(call, scratch);
  call.args.stream = stream;
  call.first->device->forward(call.args);
}

void explain(const Call& call, octolora::Explanation& to) {
  const ForwardArgs& args = call.args;
  const LinearSpec& spec = args.outputs[0].linear->spec;
  to.note("x [%d, %d] %s, %s%s, y %s, %d output%s, %zu bytes of workspace", args.rows, spec.k, name_of(args.x_type),
          name_of(spec.mode), spec.outlier_threshold > 0 ? " with outlier columns" : "", name_of(args.y_type),
          args.output_count, args.output_count == 1 ? "" : "s", workspace_of(call));
  if (args.rows)
    call.first->device->explain(args, to);
  else
    to.note("no rows: nothing is done");
}

// The call of the functions that take one linear and no description.
Call single_call(const octolora_linear* linear, const octolora_slots* slots, int32_t x_dtype, int32_t y_dtype,
                 int32_t rows) {
  require(linear, "linear");
  require_rows(rows);
  check_slots(linear, slots, "slots");
  Call call;
  call.first = linear;
  call.args.x_type = dtype(x_dtype, "x_dtype");
  call.args.y_type = dtype(y_dtype, "y_dtype");
  call.args.rows = rows;
  call.args.output_count = 1;
  call.args.outputs[0].linear = linear->impl.get();
  call.args.outputs[0].slots = slots ? slots->impl.get() : nullptr;
  return call;
}

}  // namespace

extern "C" {

const char* octolora_last_error(void) { return last_error; }

const char* octolora_status_name(octolora_status status) {
  switch (status) {
    case OCTOLORA_OK:
      return "OCTOLORA_OK";
    case OCTOLORA_INVALID_ARGUMENT:
      return "OCTOLORA_INVALID_ARGUMENT";
    case OCTOLORA_OUT_OF_MEMORY:
      return "OCTOLORA_OUT_OF_MEMORY";
    case OCTOLORA_NO_DEVICE:
      return "OCTOLORA_NO_DEVICE";
    case OCTOLORA_UNSUPPORTED:
      return "OCTOLORA_UNSUPPORTED";
    case OCTOLORA_CUDA_ERROR:
      return "OCTOLORA_CUDA_ERROR";
    case OCTOLORA_WORKSPACE_TOO_SMALL:
      return "OCTOLORA_WORKSPACE_TOO_SMALL";
    case OCTOLORA_INTERNAL:
      return "OCTOLORA_INTERNAL";
    default:
      return "unknown status";
  }
}

uint32_t octolora_abi_version(void) { return OCTOLORA_ABI_VERSION; }
const char* octolora_version(void) { return OCTOLORA_VERSION_STRING; }

octolora_status octolora_cuda_device_count(int32_t* count) {
  return guarded([&] {
    require(count, "count");
    *count = 0;
    *count = octolora::cuda_device_count();
  });
}

octolora_status octolora_device_create(int32_t ordinal, octolora_device** device) {
  return guarded([&] {
    require(device, "device");
    if (ordinal < OCTOLORA_CPU) {
      throw Error(OCTOLORA_INVALID_ARGUMENT, "ordinal = %d, expected OCTOLORA_CPU (-1) or a CUDA ordinal", ordinal);
    }
    auto made = std::make_unique<octolora_device>();
    made->cpu = ordinal == OCTOLORA_CPU;
    made->impl = ordinal == OCTOLORA_CPU ? octolora::make_cpu_device() : octolora::make_cuda_device(ordinal);
    *device = made.release();
  });
}

void octolora_device_destroy(octolora_device* device) {
  if (device) device->impl->drain();
  delete device;
}

octolora_status octolora_device_get_info(const octolora_device* device, octolora_device_info* info) {
  return guarded([&] {
    require(device, "device");
    auto full = read_struct(info, "info", sizeof(octolora_device_info));
    device->impl->info(full);
    std::memcpy(info, &full, sizeof full);
  });
}

octolora_status octolora_device_set_threads(octolora_device* device, int32_t threads) {
  return guarded([&] {
    require(device, "device");
    if (threads < 1 || threads > 1024) {
      throw Error(OCTOLORA_INVALID_ARGUMENT, "threads = %d, expected 1 to 1024", threads);
    }
    device->impl->set_threads(threads);
  });
}

octolora_status octolora_device_memory_in_use(const octolora_device* device, uint64_t* bytes) {
  return guarded([&] {
    require(device, "device");
    require(bytes, "bytes");
    *bytes = device->impl->in_use();
  });
}

octolora_status octolora_device_alloc(octolora_device* device, size_t bytes, void** memory) {
  return guarded([&] {
    require(device, "device");
    require(memory, "memory");
    *memory = device->impl->alloc(std::max<size_t>(bytes, 1));
  });
}

octolora_status octolora_device_free(octolora_device* device, void* memory) {
  return guarded([&] {
    require(device, "device");
    if (memory) device->impl->free(memory);
  });
}

octolora_status octolora_host_alloc(octolora_device* device, size_t bytes, void** memory) {
  return guarded([&] {
    require(device, "device");
    require(memory, "memory");
    *memory = device->impl->host_alloc(std::max<size_t>(bytes, 1));
  });
}

octolora_status octolora_host_free(octolora_device* device, void* memory) {
  return guarded([&] {
    require(device, "device");
    if (memory) device->impl->host_free(memory);
  });
}

octolora_status octolora_device_copy(octolora_device* device, void* to, const void* from, size_t bytes,
                                     octolora_stream stream) {
  return guarded([&] {
    require(device, "device");
    require_no_stream(device->cpu, stream);
    if (!bytes) return;
    require(to, "to");
    require(from, "from");
    device->impl->copy(to, from, bytes, stream);
  });
}

octolora_status octolora_stream_create(octolora_device* device, octolora_stream* stream) {
  return guarded([&] {
    require(device, "device");
    require(stream, "stream");
    *stream = device->impl->stream_create();
  });
}

octolora_status octolora_stream_destroy(octolora_device* device, octolora_stream stream) {
  return guarded([&] {
    require(device, "device");
    require_no_stream(device->cpu, stream);
    if (stream) device->impl->stream_destroy(stream);
  });
}

octolora_status octolora_stream_synchronize(octolora_device* device, octolora_stream stream) {
  return guarded([&] {
    require(device, "device");
    require_no_stream(device->cpu, stream);
    device->impl->stream_synchronize(stream);
  });
}

octolora_status octolora_device_synchronize(octolora_device* device) {
  return guarded([&] {
    require(device, "device");
    device->impl->synchronize();
  });
}

octolora_status octolora_linear_create(octolora_device* device, const octolora_linear_desc* desc,
                                       octolora_linear** linear) {
  return guarded([&] {
    require(device, "device");
    require(linear, "linear");
    auto d = read_struct(desc, "desc", offsetof(octolora_linear_desc, scale_block));
    const LinearSpec spec = check(d);
    auto made = std::make_unique<octolora_linear>();
    made->device = device->impl;
    made->cpu = device->cpu;
    made->impl = device->impl->create_linear(spec, d);
    *linear = made.release();
  });
}

void octolora_linear_destroy(octolora_linear* linear) {
  if (linear) linear->device->drain();
  delete linear;
}

octolora_status octolora_linear_write(octolora_linear* linear, int32_t first_row, int32_t rows, const int8_t* weight) {
  return guarded([&] {
    require(linear, "linear");
    const int n = linear->impl->spec.n;
    if (first_row < 0 || rows < 0 || first_row > n - rows) {
      throw Error(OCTOLORA_INVALID_ARGUMENT, "rows %d to %lld, expected rows within 0 to %d", first_row,
                  static_cast<long long>(first_row) + rows - 1, n - 1);
    }
    if (!rows) return;
    require(weight, "weight");
    linear->impl->write(first_row, rows, weight);
  });
}

octolora_status octolora_slots_create(octolora_linear* linear, int32_t slot_count, const int32_t* capacity,
                                      int32_t precision, octolora_slots** slots) {
  return guarded([&] {
    require(linear, "linear");
    require(slots, "slots");
    if (slot_count < 0) throw Error(OCTOLORA_INVALID_ARGUMENT, "slot_count = %d, expected 0 or more", slot_count);
    if (slot_count) require(capacity, "capacity");
    for (int i = 0; i < slot_count; ++i) {
      if (capacity[i] < 1 || capacity[i] > OCTOLORA_MAX_RANK) {
        throw Error(OCTOLORA_INVALID_ARGUMENT, "capacity[%d] = %d, expected a rank of 1 to %d", i, capacity[i],
                    OCTOLORA_MAX_RANK);
      }
    }
    const bool magnitudes = precision & OCTOLORA_LORA_MAGNITUDES;
    const int32_t parts = precision & ~OCTOLORA_LORA_MAGNITUDES;
    if (parts != OCTOLORA_LORA_16BIT && parts != OCTOLORA_LORA_SPLIT) {
      throw Error(OCTOLORA_INVALID_ARGUMENT,
                  "precision = %d, expected OCTOLORA_LORA_16BIT (0) or OCTOLORA_LORA_SPLIT (1), and with magnitudes "
                  "OCTOLORA_LORA_MAGNITUDES (2) more",
                  precision);
    }
    auto made = std::make_unique<octolora_slots>();
    made->device = linear->device;
    made->cpu = linear->cpu;
    made->linear = linear->impl;
    made->capacity.assign(capacity, capacity + slot_count);
    made->split = parts == OCTOLORA_LORA_SPLIT;
    made->magnitudes = magnitudes;
    made->impl = linear->impl->create_slots(made->capacity, made->split, magnitudes);
    *slots = made.release();
  });
}

void octolora_slots_destroy(octolora_slots* slots) {
  if (slots) slots->device->drain();
  delete slots;
}

octolora_status octolora_slots_set(octolora_slots* slots, int32_t slot, const octolora_adapter_desc* adapter,
                                   float scale, octolora_stream stream) {
  return guarded([&] {
    const SlotFill fill = read_fill(slots, slot, adapter, scale, stream);
    slots->device->fill(&fill, 1, stream);
  });
}

octolora_status octolora_slots_set_many(const octolora_slot_fill* fills, int32_t count, octolora_stream stream) {
  return guarded([&] {
    if (count < 0) throw Error(OCTOLORA_INVALID_ARGUMENT, "count = %d, expected 0 or more", count);
    if (!count) return;
    require(fills, "fills");
    std::vector<SlotFill> all;
    all.reserve(static_cast<size_t>(count));
    const octolora_slots* first = nullptr;
    // An array of structs lies in steps of the size that the caller's header gave them.
    const uint32_t step = fills->struct_size;
    const char* at = reinterpret_cast<const char*>(fills);
    for (int i = 0; i < count; ++i, at += step) {
      char name[24];
      std::snprintf(name, sizeof name, "fills[%d]", i);
      const auto given = read_struct(reinterpret_cast<const octolora_slot_fill*>(at), name, sizeof(octolora_slot_fill));
      try {
        if (given.struct_size != step)
          throw Error(OCTOLORA_INVALID_ARGUMENT, "struct_size = %u, expected %u as in fills[0]", given.struct_size,
                      step);
        all.push_back(read_fill(given.slots, given.slot, given.adapter, given.scale, stream));
        if (!first) first = given.slots;
        if (given.slots->device != first->device)
          throw Error(OCTOLORA_INVALID_ARGUMENT, "slots is on another octolora_device than fills[0].slots");
      } catch (const Error& error) {
        throw Error(error.status(), "%s: %s", name, error.what());
      }
    }
    first->device->fill(all.data(), count, stream);
  });
}

octolora_status octolora_slots_set_scale(octolora_slots* slots, int32_t slot, float scale, octolora_stream stream) {
  return guarded([&] {
    check_slot(slots, slot);
    require_no_stream(slots->cpu, stream);
    require_finite(scale, "scale");
    slots->impl->set_scale(slot, scale, stream);
  });
}

octolora_status octolora_slots_clear(octolora_slots* slots, int32_t slot, octolora_stream stream) {
  return guarded([&] {
    check_slot(slots, slot);
    require_no_stream(slots->cpu, stream);
    slots->impl->clear(slot, stream);
  });
}

octolora_status octolora_forward_workspace(const octolora_forward_desc* desc, size_t* bytes) {
  return guarded([&] {
    require(bytes, "bytes");
    *bytes = workspace_of(read_call(desc));
  });
}

octolora_status octolora_forward(const octolora_forward_desc* desc, octolora_stream stream) {
  return guarded([&] {
    Call call = read_call(desc);
    forward(call, stream);
  });
}

octolora_status octolora_slots_scales(octolora_slots* slots, float** scales) {
  return guarded([&] {
    require(slots, "slots");
    require(scales, "scales");
    *scales = slots->impl->scales();
  });
}

octolora_status octolora_slots_refresh(octolora_slots* slots, octolora_stream stream) {
  return guarded([&] {
    require(slots, "slots");
    require_no_stream(slots->cpu, stream);
    slots->impl->refresh(stream);
  });
}

octolora_status octolora_forward_explain(const octolora_forward_desc* desc, char* text, size_t size) {
  return guarded([&] {
    require(text, "text");
    if (!size) throw Error(OCTOLORA_INVALID_ARGUMENT, "size = 0, expected 1 or more");
    const Call call = read_call(desc);
    octolora::Explanation explanation;
    explain(call, explanation);
    std::snprintf(text, size, "%s", explanation.text().c_str());
  });
}

octolora_status octolora_linear_workspace(const octolora_linear* linear, const octolora_slots* slots, int32_t rows,
                                          int32_t x_dtype, size_t* bytes) {
  return guarded([&] {
    require(bytes, "bytes");
    *bytes = workspace_of(single_call(linear, slots, x_dtype, OCTOLORA_FLOAT32, rows));
  });
}

octolora_status octolora_linear_forward(const octolora_linear* linear, const octolora_slots* slots, const void* x,
                                        int32_t x_dtype, void* y, int32_t y_dtype, int32_t rows, void* workspace,
                                        size_t workspace_bytes, octolora_stream stream) {
  return guarded([&] {
    Call call = single_call(linear, slots, x_dtype, y_dtype, rows);
    call.args.x = x;
    call.args.outputs[0].y = y;
    call.args.workspace = workspace;
    call.workspace_bytes = workspace_bytes;
    forward(call, stream);
  });
}

octolora_status octolora_linear_quantized(const octolora_linear* linear, const void* x, int32_t x_dtype, int32_t* sums,
                                          int8_t* codes, float* row_scale, int32_t rows, void* workspace,
                                          size_t workspace_bytes, octolora_stream stream) {
  return guarded([&] {
    require(linear, "linear");
    require_rows(rows);
    require_no_stream(linear->cpu, stream);
    const Dtype x_type = dtype(x_dtype, "x_dtype");
    if (linear->impl->spec.mode == Mode::w8a16) {
      throw Error(OCTOLORA_UNSUPPORTED, "a W8A16 linear (n = %d, k = %d) does not quantize x", linear->impl->spec.n,
                  linear->impl->spec.k);
    }
    if (!rows) return;
    require(x, "x");
    require_aligned(x, octolora::size_of(x_type), "x");
    require_aligned(sums, alignof(int32_t), "sums");
    require_aligned(row_scale, alignof(float), "row_scale");
    check_workspace(workspace_of(single_call(linear, nullptr, x_dtype, OCTOLORA_FLOAT32, rows)), workspace,
                    workspace_bytes);
    linear->impl->quantized({x, x_type, sums, codes, row_scale, rows, workspace, stream});
  });
}

}  // extern "C"
