// SPDX-License-Identifier: Apache-2.0
//
// What a device does, as the C ABI sees it. src/abi checks every argument and owns the handles; an implementation of
// these classes (src/cuda, src/cpu) may rely on valid arguments and only does the work. Failures are thrown as Error.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "error.h"
#include "octolora/octolora.h"

namespace octolora {

enum class Dtype : int32_t { f32 = OCTOLORA_FLOAT32, f16 = OCTOLORA_FLOAT16, bf16 = OCTOLORA_BFLOAT16 };
constexpr size_t size_of(Dtype type) { return type == Dtype::f32 ? 4 : 2; }

enum class Mode : int32_t { w8a16 = OCTOLORA_W8A16, dynamic = OCTOLORA_W8A8_DYNAMIC, fixed = OCTOLORA_W8A8_STATIC };

// octolora_linear_desc without its pointers, defaults filled in.
struct LinearSpec {
  int n = 0, k = 0;
  Mode mode = Mode::dynamic;
  bool round_x_to_f16 = false;
  float x_scale = 0.f;
  float x_divisor = 127.f;
  float outlier_threshold = 0.f;
};

// The low-rank storage of one linear. Which slots are filled, and with which rank, is the implementation's to keep.
class Slots {
 public:
  virtual ~Slots() = default;
  virtual void set(int slot, const octolora_adapter_desc& adapter, float scale, octolora_stream stream) = 0;
  virtual void set_scale(int slot, float scale, octolora_stream stream) = 0;
  virtual void clear(int slot, octolora_stream stream) = 0;
};

struct ForwardArgs {
  const Slots* slots;  // may be null
  const void* x;       // [rows,k]
  Dtype x_type;
  void* y;  // [rows,n]
  Dtype y_type;
  int rows;  // > 0
  void* workspace;
  octolora_stream stream;
};

struct QuantizedArgs {
  const void* x;
  Dtype x_type;
  int32_t* sums;     // [rows,n] or null
  int8_t* codes;     // [rows,k] or null
  float* row_scale;  // [rows] or null
  int rows;          // > 0
  void* workspace;
  octolora_stream stream;
};

class Linear {
 public:
  explicit Linear(const LinearSpec& s) : spec(s) {}
  virtual ~Linear() = default;
  // weight [rows,k]; done on return.
  virtual void write(int first_row, int rows, const int8_t* weight) = 0;
  virtual std::unique_ptr<Slots> create_slots(const std::vector<int>& capacity, bool split) = 0;
  virtual size_t workspace(const Slots* slots, int rows, Dtype x_type) const = 0;
  virtual void forward(const ForwardArgs& args) const = 0;
  virtual void quantized(const QuantizedArgs& args) const = 0;

  const LinearSpec spec;
};

class Device {
 public:
  virtual ~Device() = default;
  virtual void info(octolora_device_info& info) const = 0;  // all fields but struct_size
  virtual void set_threads(int threads) = 0;
  virtual void* alloc(size_t bytes) = 0;  // 256-byte aligned, bytes > 0; counted by in_use()
  virtual void free(void* memory) = 0;
  virtual void copy(void* to, const void* from, size_t bytes, octolora_stream stream) = 0;
  virtual octolora_stream stream_create() = 0;
  virtual void stream_destroy(octolora_stream stream) = 0;
  virtual void stream_synchronize(octolora_stream stream) = 0;
  // Waits for all work on the device; called before an object's memory goes. Never throws.
  virtual void drain() noexcept = 0;
  virtual uint64_t in_use() const = 0;
  // desc has its defaults filled in and is valid; scale and bias are host arrays, weight may be null (zeros).
  virtual std::unique_ptr<Linear> create_linear(const LinearSpec& spec, const octolora_linear_desc& desc) = 0;
};

std::shared_ptr<Device> make_cpu_device();              // src/cpu
std::shared_ptr<Device> make_cuda_device(int ordinal);  // src/cuda, or a stub that throws OCTOLORA_NO_DEVICE
int cuda_device_count();                                // throws OCTOLORA_NO_DEVICE with the reason when there is none

}  // namespace octolora
