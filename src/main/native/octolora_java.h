// SPDX-License-Identifier: Apache-2.0
//
// octolora.h for NativeOctolora.java where it speaks in structs: the same calls with their fields as arguments, so that
// Java knows no struct layout and a changed field is a compile error here. And a copy that waits.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>

#include "octolora/octolora.h"

static_assert(OCTOLORA_ABI_VERSION == 3, "NativeOctolora.java binds version 3: bring both to the new version");

// numbers: ordinal, compute capability, units. name [128], kernels [32]: zero-terminated UTF-8.
inline octolora_status octolora_java_device_info(const octolora_device* device, int32_t* numbers, int64_t* memory,
                                                 signed char* name, signed char* kernels) {
  octolora_device_info info{};
  info.struct_size = sizeof info;
  const octolora_status status = octolora_device_get_info(device, &info);
  numbers[0] = info.ordinal;
  numbers[1] = info.compute_capability;
  numbers[2] = info.units;
  *memory = static_cast<int64_t>(info.memory_bytes);
  std::memcpy(name, info.name, sizeof info.name);
  std::memcpy(kernels, info.kernels, sizeof info.kernels);
  return status;
}

// Copies and waits, because the host memory may be gone when the call returns.
inline octolora_status octolora_java_copy(octolora_device* device, void* to, const void* from, size_t bytes,
                                          octolora_stream stream) {
  const octolora_status status = octolora_device_copy(device, to, from, bytes, stream);
  return status == OCTOLORA_OK ? octolora_stream_synchronize(device, stream) : status;
}

inline octolora_status octolora_java_linear_create(octolora_device* device, int32_t n, int32_t k, int32_t mode,
                                                   int32_t round_x, float x_scale, float x_divisor,
                                                   float outlier_threshold, const void* weight, int32_t scale_count,
                                                   const float* scale, int32_t scale_block, const void* block_scale,
                                                   const float* bias, octolora_linear** linear) {
  octolora_linear_desc desc{};
  desc.struct_size = sizeof desc;
  desc.n = n;
  desc.k = k;
  desc.mode = mode;
  desc.scale_count = scale_count;
  desc.round_x = round_x;
  desc.x_scale = x_scale;
  desc.x_divisor = x_divisor;
  desc.outlier_threshold = outlier_threshold;
  desc.weight = static_cast<const int8_t*>(weight);
  desc.scale = scale;
  desc.bias = bias;
  desc.scale_block = scale_block;
  desc.block_scale = static_cast<const uint16_t*>(block_scale);
  return octolora_linear_create(device, &desc, linear);
}

// Of a direct buffer, from its position on.
inline int64_t octolora_java_address(const void* buffer) { return reinterpret_cast<int64_t>(buffer); }

// octolora_slots_set_many; numbers: slots, slot, rank, a_dtype, b_dtype, precision, a, b, bias and magnitude of each.
inline octolora_status octolora_java_slots_set(const int64_t* numbers, const float* scales, int32_t count,
                                               octolora_stream stream) {
  const std::unique_ptr<octolora_adapter_desc[]> adapters(new (std::nothrow) octolora_adapter_desc[count]());
  const std::unique_ptr<octolora_slot_fill[]> fills(new (std::nothrow) octolora_slot_fill[count]());
  if (!adapters || !fills) return OCTOLORA_OUT_OF_MEMORY;
  for (int32_t i = 0; i < count; ++i, numbers += 10) {
    octolora_adapter_desc& adapter = adapters[i];
    adapter.struct_size = sizeof adapter;
    adapter.rank = static_cast<int32_t>(numbers[2]);
    adapter.a_dtype = static_cast<int32_t>(numbers[3]);
    adapter.b_dtype = static_cast<int32_t>(numbers[4]);
    adapter.precision = static_cast<int32_t>(numbers[5]);
    adapter.a = reinterpret_cast<const void*>(numbers[6]);
    adapter.b = reinterpret_cast<const void*>(numbers[7]);
    adapter.bias = reinterpret_cast<const float*>(numbers[8]);
    adapter.magnitude = reinterpret_cast<const float*>(numbers[9]);
    fills[i].struct_size = sizeof(octolora_slot_fill);
    fills[i].slot = static_cast<int32_t>(numbers[1]);
    fills[i].slots = reinterpret_cast<octolora_slots*>(numbers[0]);
    fills[i].adapter = &adapter;
    fills[i].scale = scales[i];
  }
  return octolora_slots_set_many(fills.get(), count, stream);
}

// A forward; outputs: linear, slots, y, residual, gate and activation of each.
struct octolora_java_call {
  octolora_forward_desc desc{};
  octolora_output output[OCTOLORA_MAX_OUTPUTS]{};

  octolora_java_call(int32_t rows, int32_t x_dtype, int32_t y_dtype, const void* x, const int32_t* row_slot,
                     const int64_t* outputs, int32_t output_count) {
    for (int32_t i = 0; i < output_count && i < OCTOLORA_MAX_OUTPUTS; ++i, outputs += 6) {
      output[i].struct_size = sizeof(octolora_output);
      output[i].linear = reinterpret_cast<const octolora_linear*>(outputs[0]);
      output[i].slots = reinterpret_cast<const octolora_slots*>(outputs[1]);
      output[i].y = reinterpret_cast<void*>(outputs[2]);
      output[i].residual = reinterpret_cast<const void*>(outputs[3]);
      output[i].gate = reinterpret_cast<const void*>(outputs[4]);
      output[i].activation = static_cast<int32_t>(outputs[5]);
    }
    desc.struct_size = sizeof desc;
    desc.rows = rows;
    desc.x = x;
    desc.x_dtype = x_dtype;
    desc.y_dtype = y_dtype;
    desc.row_slot = row_slot;
    desc.outputs = output;
    desc.output_count = output_count;
  }
};

inline octolora_status octolora_java_forward(int32_t rows, int32_t x_dtype, int32_t y_dtype, const void* x,
                                             const int32_t* row_slot, const int64_t* outputs, int32_t output_count,
                                             void* workspace, size_t workspace_bytes, octolora_stream stream) {
  octolora_java_call call(rows, x_dtype, y_dtype, x, row_slot, outputs, output_count);
  call.desc.workspace = workspace;
  call.desc.workspace_bytes = workspace_bytes;
  return octolora_forward(&call.desc, stream);
}

inline octolora_status octolora_java_forward_workspace(int32_t rows, int32_t x_dtype, int32_t y_dtype, const void* x,
                                                       const int32_t* row_slot, const int64_t* outputs,
                                                       int32_t output_count, size_t* bytes) {
  const octolora_java_call call(rows, x_dtype, y_dtype, x, row_slot, outputs, output_count);
  return octolora_forward_workspace(&call.desc, bytes);
}

inline octolora_status octolora_java_forward_explain(int32_t rows, int32_t x_dtype, int32_t y_dtype, const void* x,
                                                     const int32_t* row_slot, const int64_t* outputs,
                                                     int32_t output_count, signed char* text, size_t size) {
  const octolora_java_call call(rows, x_dtype, y_dtype, x, row_slot, outputs, output_count);
  return octolora_forward_explain(&call.desc, reinterpret_cast<char*>(text), size);
}
