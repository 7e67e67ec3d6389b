// SPDX-License-Identifier: Apache-2.0
//
// The CUDA backend's objects. device.cc has the device and the linears, slots.cc the slots.
#pragma once

#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

#include "attach.h"
#include "backend.h"
#include "check.h"
#include "kernels.h"

namespace octolora::cuda {

constexpr size_t kAlignment = 256;

inline cudaStream_t cuda_stream(octolora_stream stream) { return reinterpret_cast<cudaStream_t>(stream); }

// Makes a device current for the scope and puts back what was.
class Current {
 public:
  explicit Current(int ordinal) {
    OCTOLORA_CUDA(cudaGetDevice(&before_), "cuda:%d", ordinal);
    if (before_ != ordinal) OCTOLORA_CUDA(cudaSetDevice(ordinal), "cuda:%d", ordinal);
    changed_ = before_ != ordinal;
  }
  ~Current() {
    if (changed_) cudaSetDevice(before_);
  }
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

class CudaDevice final : public Device {
 public:
  explicit CudaDevice(int ordinal);
  ~CudaDevice() override;

  void info(octolora_device_info& info) const override;
  void set_threads(int) override {
    throw Error(OCTOLORA_UNSUPPORTED, "threads are for the CPU device; this is cuda:%d", ordinal);
  }
  void* alloc(size_t bytes) override;
  void free(void* memory) override;
  void* host_alloc(size_t bytes) override;
  void host_free(void* memory) override;
  void copy(void* to, const void* from, size_t bytes, octolora_stream stream) override;
  octolora_stream stream_create() override;
  void stream_destroy(octolora_stream stream) override;
  void stream_synchronize(octolora_stream stream) override;
  void synchronize() override;
  uint64_t in_use() const override { return in_use_.load(); }
  std::unique_ptr<Linear> create_linear(const LinearSpec& spec, const octolora_linear_desc& desc) override;
  void fill(const SlotFill* fills, int count, octolora_stream stream) override;
  size_t workspace(const ForwardArgs& args) const override;
  void forward(const ForwardArgs& args) const override;
  void explain(const ForwardArgs& args, Explanation& to) const override;

  // The device has a buffer that adapters in pageable memory pass through, as large as the largest of its slots needs.
  void need_staging(size_t bytes);
  void need_staging_no_more(size_t bytes) noexcept;

  const int ordinal;
  Limits limits{};

 private:
  friend class Staging;
  void fit_staging();

  std::string name_;
  size_t memory_bytes_ = 0;
  std::atomic<uint64_t> in_use_{0};
  std::mutex mutex_;
  std::unordered_map<void*, size_t> sizes_;
  std::mutex staging_mutex_;
  std::multiset<size_t> staging_needs_;
  void* staging_ = nullptr;
  size_t staging_bytes_ = 0;
  cudaEvent_t staging_free_ = nullptr;  // the work that read it last
};

// The staging buffer, in the hands of one thread and then of what that enqueues on its stream.
class Staging {
 public:
  Staging(CudaDevice& device, cudaStream_t stream);
  ~Staging();
  Staging(const Staging&) = delete;
  Staging& operator=(const Staging&) = delete;
  // A matrix of `rows` rows of `width` bytes, dense, beside what was put here before.
  const void* put(const void* from, size_t width, size_t rows, size_t pitch);

 private:
  CudaDevice& device_;
  const std::lock_guard<std::mutex> lock_;
  const cudaStream_t stream_;
  size_t used_ = 0;
};

// Device memory that goes with its owner.
class Buffer {
 public:
  Buffer(CudaDevice& device, size_t bytes)
      : device_(device), memory_(device.alloc(std::max<size_t>(bytes, 1))), bytes_(bytes) {}
  ~Buffer() {
    try {
      device_.free(memory_);
    } catch (const Error&) {  // a broken context: nothing is left to free
    }
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  template <class T>
  T* as() const {
    return static_cast<T*>(memory_);
  }
  void clear() { OCTOLORA_CUDA(cudaMemset(memory_, 0, bytes_), "%zu bytes", bytes_); }
  template <class T>
  void fill(const T* host, size_t count) {
    OCTOLORA_CUDA(cudaMemcpy(memory_, host, count * sizeof(T), cudaMemcpyHostToDevice), "%zu bytes", count * sizeof(T));
  }

 private:
  CudaDevice& device_;
  void* memory_;
  size_t bytes_;
};

class CudaLinear;

class CudaSlots final : public Slots {
 public:
  CudaSlots(CudaLinear& linear, const std::vector<int>& capacity, bool split, bool magnitudes);
  ~CudaSlots() override;
  void set_scale(int slot, float scale, octolora_stream stream) override;
  void clear(int slot, octolora_stream stream) override;
  void refresh(octolora_stream stream) override;
  float* scales() override { return view_.scale; }
  AdapterView view() const { return view_; }
  // The slot's place and what to put there, all but the sources.
  PackArgs pack_args(int slot, const octolora_adapter_desc& adapter, float scale) const;
  const LinearSpec& spec() const;
  // With magnitudes: the factors of slots first to end - 1, whose contents, scale or weights are new, and what depends
  // on any of them.
  void compose(int first, int end, cudaStream_t stream);
  // s_w as the magnitudes change it, or null: the linear's own.
  const float* weight_scale() const { return weight_scale_; }

 private:
  struct Range {
    int first, count;  // chunks
  };
  void place(const std::vector<int>& capacity);
  int64_t down_columns(int chunks) const { return static_cast<int64_t>(chunks) * kChunkRank * (split_ ? 2 : 1); }
  int64_t up_columns(int chunks) const { return static_cast<int64_t>(chunks) * kChunkRank * (split_ ? 3 : 1); }

  CudaLinear& linear_;
  const bool split_, magnitudes_;
  std::vector<Range> ranges_;  // by slot
  size_t staging_ = 0;         // bytes
  std::unique_ptr<Buffer> memory_;
  // All below lie in memory_.
  AdapterView view_;
  FactorStatistics* found_ = nullptr;  // [slots][2]
  // With magnitudes: what was given, from which what the view shows is composed; else the same.
  uint16_t* given_b_ = nullptr;
  float* given_bias_ = nullptr;
  float *magnitude_ = nullptr, *factor_ = nullptr;  // [slots][N]
  int32_t* has_magnitude_ = nullptr;                // [slots]
  float* weight_scale_ = nullptr;                   // [N]
};

struct Workspace {
  int8_t* q = nullptr;
  uint16_t* planes = nullptr;
  RowScale* rows = nullptr;
  OutlierView outliers;
  uint16_t* h[kMaxMembers] = {};
  float* total_bias[kMaxMembers] = {};
  uint32_t* needed_steps[kMaxMembers] = {};
  size_t bytes = 0;
};

class CudaLinear final : public Linear {
 public:
  CudaLinear(CudaDevice& device, const LinearSpec& spec, const octolora_linear_desc& desc);
  void write(int first_row, int rows, const int8_t* weight) override;
  std::unique_ptr<Slots> create_slots(const std::vector<int>& capacity, bool split, bool magnitudes) override {
    const Current current(device.ordinal);
    return std::make_unique<CudaSlots>(*this, capacity, split, magnitudes);
  }
  void quantized(const QuantizedArgs& args) const override;

  // What all linears of a forward share is taken from the first.
  Workspace place(const ForwardArgs& args) const;
  PrepareArgs prepare_args(const void* x, Dtype x_type, int rows, const Workspace& workspace) const;
  GemmArgs gemm_args(int rows) const;
  GemmMember member() const;

  CudaDevice& device;
  const int k_pitch;

 private:
  void fill_block_scale(const uint16_t* from);

  Buffer weight_, scale_;
  std::unique_ptr<Buffer> bias_, block_scale_;
};

}  // namespace octolora::cuda
