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
#include "explanation.h"
#include "octolora/octolora.h"

namespace octolora {

enum class Dtype : int32_t { f32 = OCTOLORA_FLOAT32, f16 = OCTOLORA_FLOAT16, bf16 = OCTOLORA_BFLOAT16 };
constexpr size_t size_of(Dtype type) { return type == Dtype::f32 ? 4 : 2; }
constexpr const char* name_of(Dtype type) { return type == Dtype::f32 ? "fp32" : type == Dtype::f16 ? "fp16" : "bf16"; }

enum class Mode : int32_t { w8a16 = OCTOLORA_W8A16, dynamic = OCTOLORA_W8A8_DYNAMIC, fixed = OCTOLORA_W8A8_STATIC };

constexpr const char* name_of(Mode mode) {
  return mode == Mode::w8a16 ? "W8A16" : mode == Mode::dynamic ? "W8A8 dynamic" : "W8A8 static";
}

// octolora_linear_desc without its pointers, defaults filled in.
struct LinearSpec {
  int n = 0, k = 0;
  Mode mode = Mode::dynamic;
  bool round_x_to_f16 = false;
  float x_scale = 0.f;
  float x_divisor = 127.f;
  float outlier_threshold = 0.f;
  int scale_block = 0;  // columns of W that share a scale beside s_w; 0: none do

  int scale_blocks() const { return scale_block ? (k + scale_block - 1) / scale_block : 0; }

  // Both read x alike, so that one quantized x serves both.
  bool shares_x_with(const LinearSpec& other) const {
    return k == other.k && mode == other.mode && round_x_to_f16 == other.round_x_to_f16 && x_scale == other.x_scale &&
           x_divisor == other.x_divisor && outlier_threshold == other.outlier_threshold;
  }
};

// The low-rank storage of one linear. Which slots are filled, and with which rank, is the implementation's to keep.
class Slots {
 public:
  virtual ~Slots() = default;
  virtual void set_scale(int slot, float scale, octolora_stream stream) = 0;
  virtual void clear(int slot, octolora_stream stream) = 0;
  // What depends on the scales and on the weights beside what set() and set_scale() were told.
  virtual void refresh(octolora_stream stream) = 0;
  virtual float* scales() = 0;  // [slots]
};

// An adapter for one slot; its b_stride is filled in.
struct SlotFill {
  Slots* slots;
  int slot;
  octolora_adapter_desc adapter;
  float scale;
};

enum class Activation : int32_t {
  none = OCTOLORA_ACTIVATION_NONE,
  gelu_tanh = OCTOLORA_ACTIVATION_GELU_TANH,
  gelu_erf = OCTOLORA_ACTIVATION_GELU_ERF,
  silu = OCTOLORA_ACTIVATION_SILU
};

constexpr const char* name_of(Activation activation) {
  switch (activation) {
    case Activation::gelu_tanh:
      return "GELU (tanh)";
    case Activation::gelu_erf:
      return "GELU (erf)";
    case Activation::silu:
      return "SiLU";
    case Activation::none:
      break;
  }
  return "no activation";
}

class Linear;

struct Output {
  const Linear* linear = nullptr;
  const Slots* slots = nullptr;  // may be null
  void* y = nullptr;             // [rows,n]
  Activation activation = Activation::none;
  const void* residual = nullptr;  // [rows,n] of y's type, y itself or null
  const void* gate = nullptr;      // [n] of y's type, or null
};

// All outputs are of one device, with one k and one way to quantize x.
struct ForwardArgs {
  const void* x = nullptr;  // [rows,k]
  Dtype x_type = Dtype::f32, y_type = Dtype::f32;
  int rows = 0;                       // > 0
  const int32_t* row_slot = nullptr;  // [rows] or null
  int output_count = 0;
  Output outputs[OCTOLORA_MAX_OUTPUTS];
  void* workspace = nullptr;
  octolora_stream stream = nullptr;
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
  virtual std::unique_ptr<Slots> create_slots(const std::vector<int>& capacity, bool split, bool magnitudes) = 0;
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
  virtual void* host_alloc(size_t bytes) = 0;  // pinned; bytes > 0
  virtual void host_free(void* memory) = 0;
  virtual void copy(void* to, const void* from, size_t bytes, octolora_stream stream) = 0;
  virtual octolora_stream stream_create() = 0;
  virtual void stream_destroy(octolora_stream stream) = 0;
  virtual void stream_synchronize(octolora_stream stream) = 0;
  virtual void synchronize() = 0;  // all work on the device
  // The same before an object's memory goes, when errors have no one to go to.
  void drain() noexcept {
    try {
      synchronize();
    } catch (const Error&) {
    }
  }
  virtual uint64_t in_use() const = 0;
  // desc has its defaults filled in and is valid; scale, block_scale and bias are host arrays, weight may be null
  // (zeros).
  virtual std::unique_ptr<Linear> create_linear(const LinearSpec& spec, const octolora_linear_desc& desc) = 0;

  // In their order; the slots are of this device.
  virtual void fill(const SlotFill* fills, int count, octolora_stream stream) = 0;
  // Of args, the linears, the slots, rows and x_type.
  virtual size_t workspace(const ForwardArgs& args) const = 0;
  virtual void forward(const ForwardArgs& args) const = 0;
  virtual void explain(const ForwardArgs& args, Explanation& to) const = 0;
};

std::shared_ptr<Device> make_cpu_device();              // src/cpu
std::shared_ptr<Device> make_cuda_device(int ordinal);  // src/cuda, or a stub that throws OCTOLORA_NO_DEVICE
int cuda_device_count();                                // throws OCTOLORA_NO_DEVICE with the reason when there is none

}  // namespace octolora
