// SPDX-License-Identifier: Apache-2.0
//
// The CUDA backend's objects: what lives in device memory, and which kernels a forward enqueues.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "adapter_types.h"
#include "backend.h"
#include "check.h"
#include "kernels.h"

namespace octolora::cuda {
namespace {

constexpr int kMinCapability = 80;
constexpr size_t kAlignment = 256;

// In the order of preference; the last takes everything.
constexpr const GemmFamily* kW8a8Families[] = {&kGemmSm90, &kGemmW8a8, nullptr};
constexpr const GemmFamily* kW8a16Families[] = {&kGemmW8a16, nullptr};

cudaStream_t cuda_stream(octolora_stream stream) { return reinterpret_cast<cudaStream_t>(stream); }

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

  void info(octolora_device_info& info) const override;
  void set_threads(int) override {
    throw Error(OCTOLORA_UNSUPPORTED, "threads are for the CPU device; this is cuda:%d", ordinal);
  }
  void* alloc(size_t bytes) override;
  void free(void* memory) override;
  void copy(void* to, const void* from, size_t bytes, octolora_stream stream) override;
  octolora_stream stream_create() override;
  void stream_destroy(octolora_stream stream) override;
  void stream_synchronize(octolora_stream stream) override;
  void drain() noexcept override;
  uint64_t in_use() const override { return in_use_.load(); }
  std::unique_ptr<Linear> create_linear(const LinearSpec& spec, const octolora_linear_desc& desc) override;
  size_t workspace(const ForwardArgs& args) const override;
  void forward(const ForwardArgs& args) const override;
  void explain(const ForwardArgs& args, Explanation& to) const override;

  const int ordinal;
  Limits limits{};

 private:
  std::string name_;
  size_t memory_bytes_ = 0;
  std::atomic<uint64_t> in_use_{0};
  std::mutex mutex_;
  std::unordered_map<void*, size_t> sizes_;
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
  CudaSlots(CudaLinear& linear, const std::vector<int>& capacity, bool split);
  void set(int slot, const octolora_adapter_desc& adapter, float scale, octolora_stream stream) override;
  void set_scale(int slot, float scale, octolora_stream stream) override;
  void clear(int slot, octolora_stream stream) override;
  AdapterView view() const;

 private:
  struct Range {
    int first, count;  // chunks
  };
  void write_scale(int slot, float scale, cudaStream_t stream);
  void write_chunks(int slot, cudaStream_t stream);
  void write_has_bias(int slot, bool has_bias, cudaStream_t stream);

  CudaLinear& linear_;
  const bool split_;
  std::vector<Range> ranges_;  // by slot
  std::vector<Chunk> chunks_;
  Buffer a_, b_, chunk_buffer_, scale_, slot_bias_, has_bias_;
};

struct Workspace {
  int8_t* q = nullptr;
  uint16_t* planes = nullptr;
  RowScale* rows = nullptr;
  OutlierView outliers;
  uint16_t* h[kMaxMembers] = {};
  float* total_bias[kMaxMembers] = {};
  size_t bytes = 0;
};

class CudaLinear final : public Linear {
 public:
  CudaLinear(CudaDevice& device, const LinearSpec& spec, const octolora_linear_desc& desc);
  void write(int first_row, int rows, const int8_t* weight) override;
  std::unique_ptr<Slots> create_slots(const std::vector<int>& capacity, bool split) override {
    const Current current(device.ordinal);
    return std::make_unique<CudaSlots>(*this, capacity, split);
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
  Buffer weight_, scale_;
  std::unique_ptr<Buffer> bias_;
};

// ---- Device ----

CudaDevice::CudaDevice(int ordinal_) : ordinal(ordinal_) {
  const int count = cuda_device_count();
  if (ordinal >= count)
    throw Error(OCTOLORA_NO_DEVICE, "cuda:%d: %d CUDA device%s present", ordinal, count, count == 1 ? "" : "s");
  const Current current(ordinal);
  cudaDeviceProp properties;
  OCTOLORA_CUDA(cudaGetDeviceProperties(&properties, ordinal), "cuda:%d", ordinal);
  name_ = properties.name;
  memory_bytes_ = properties.totalGlobalMem;
  limits.capability = properties.major * 10 + properties.minor;
  limits.multiprocessors = properties.multiProcessorCount;
  limits.shared_bytes = static_cast<int>(properties.sharedMemPerBlockOptin);
  if (limits.capability < kMinCapability) {
    throw Error(OCTOLORA_NO_DEVICE, "cuda:%d (%s) has compute capability %d.%d, expected %d.%d or later", ordinal,
                name_.c_str(), properties.major, properties.minor, kMinCapability / 10, kMinCapability % 10);
  }
  set_up_prepare(limits);
  for (const GemmFamily* const* families : {kW8a8Families, kW8a16Families})
    for (; *families; ++families) (*families)->set_up(limits);
}

void CudaDevice::info(octolora_device_info& info) const {
  info.ordinal = ordinal;
  info.compute_capability = limits.capability;
  info.units = limits.multiprocessors;
  info.memory_bytes = memory_bytes_;
  std::snprintf(info.name, sizeof info.name, "%s", name_.c_str());
  std::snprintf(info.kernels, sizeof info.kernels, "%s",
                limits.capability == 90 ? "wgmma s8, mma.sync s8" : "mma.sync s8");
}

void* CudaDevice::alloc(size_t bytes) {
  const Current current(ordinal);
  void* memory = nullptr;
  const cudaError_t error = cudaMalloc(&memory, bytes);
  if (error != cudaSuccess) {
    size_t free = 0, total = 0;
    cudaGetLastError();
    cudaMemGetInfo(&free, &total);
    fail(error, "cudaMalloc", __FILE__, __LINE__, "cuda:%d: %zu bytes, of %zu free", ordinal, bytes, free);
  }
  try {
    const std::lock_guard lock(mutex_);
    sizes_[memory] = bytes;
  } catch (...) {
    cudaFree(memory);
    throw;
  }
  in_use_ += bytes;
  return memory;
}

void CudaDevice::free(void* memory) {
  {
    const std::lock_guard lock(mutex_);
    const auto found = sizes_.find(memory);
    if (found == sizes_.end()) {
      throw Error(OCTOLORA_INVALID_ARGUMENT, "memory = %p was not allocated on cuda:%d, or was freed", memory, ordinal);
    }
    in_use_ -= found->second;
    sizes_.erase(found);
  }
  const Current current(ordinal);
  OCTOLORA_CUDA(cudaFree(memory), "cuda:%d", ordinal);
}

void CudaDevice::copy(void* to, const void* from, size_t bytes, octolora_stream stream) {
  const Current current(ordinal);
  OCTOLORA_CUDA(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, cuda_stream(stream)), "%zu bytes from %p to %p",
                bytes, from, to);
}

octolora_stream CudaDevice::stream_create() {
  const Current current(ordinal);
  cudaStream_t stream = nullptr;
  OCTOLORA_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cuda:%d", ordinal);
  return reinterpret_cast<octolora_stream>(stream);
}

void CudaDevice::stream_destroy(octolora_stream stream) {
  const Current current(ordinal);
  OCTOLORA_CUDA(cudaStreamDestroy(cuda_stream(stream)), "cuda:%d", ordinal);
}

void CudaDevice::stream_synchronize(octolora_stream stream) {
  const Current current(ordinal);
  OCTOLORA_CUDA(cudaStreamSynchronize(cuda_stream(stream)), "cuda:%d", ordinal);
}

void CudaDevice::drain() noexcept {
  try {
    const Current current(ordinal);
    cudaDeviceSynchronize();
  } catch (const Error&) {
  }
}

std::unique_ptr<Linear> CudaDevice::create_linear(const LinearSpec& spec, const octolora_linear_desc& desc) {
  const Current current(ordinal);
  return std::make_unique<CudaLinear>(*this, spec, desc);
}

// ---- Linear ----

CudaLinear::CudaLinear(CudaDevice& device_, const LinearSpec& spec_, const octolora_linear_desc& desc)
    : Linear(spec_),
      device(device_),
      k_pitch(round_up(spec_.k, 16)),
      weight_(device_, static_cast<size_t>(spec_.n) * k_pitch),
      scale_(device_, static_cast<size_t>(spec_.n) * sizeof(float)) {
  if (desc.scale_count == spec.n) {
    scale_.fill(desc.scale, spec.n);
  } else {
    const std::vector<float> repeated(spec.n, desc.scale[0]);
    scale_.fill(repeated.data(), repeated.size());
  }
  if (desc.bias) {
    bias_ = std::make_unique<Buffer>(device, static_cast<size_t>(spec.n) * sizeof(float));
    bias_->fill(desc.bias, spec.n);
  }
  if (!desc.weight || k_pitch != spec.k) weight_.clear();
  if (desc.weight) write(0, spec.n, desc.weight);
}

void CudaLinear::write(int first_row, int rows, const int8_t* weight) {
  const Current current(device.ordinal);
  int8_t* const to = weight_.as<int8_t>() + static_cast<int64_t>(first_row) * k_pitch;
  OCTOLORA_CUDA(cudaMemcpy2D(to, k_pitch, weight, spec.k, spec.k, rows, cudaMemcpyDefault), "weight: %d rows of K = %d",
                rows, spec.k);
  if (spec.mode == Mode::w8a16) launch_widen_order(to, static_cast<int64_t>(rows) * k_pitch / 16, nullptr);
  OCTOLORA_CUDA(cudaStreamSynchronize(nullptr), "weight: %d rows of K = %d", rows, spec.k);
}

Workspace CudaLinear::place(const ForwardArgs& f) const {
  Workspace w;
  const auto take = [&](auto*& pointer, size_t count) {
    using T = std::remove_pointer_t<std::remove_reference_t<decltype(pointer)>>;
    pointer = reinterpret_cast<T*>(static_cast<uint8_t*>(f.workspace) + w.bytes);
    w.bytes += static_cast<size_t>(round_up64(static_cast<int64_t>(count * sizeof(T)), kAlignment));
  };
  const size_t padded = static_cast<size_t>(f.rows) * k_pitch;
  if (spec.mode == Mode::w8a16)
    take(w.planes, padded * (f.x_type == Dtype::f32 ? 3 : 1));
  else
    take(w.q, padded);
  take(w.rows, f.rows);
  if (spec.outlier_threshold > 0) {
    w.outliers.words = (spec.k + 31) / 32;
    take(w.outliers.partial, static_cast<size_t>(w.outliers.words) * kOutlierRowChunks);
    take(w.outliers.flags, w.outliers.words);
    take(w.outliers.list, spec.k);
    take(w.outliers.count, 1);
  }
  for (int i = 0; i < f.output_count; ++i) {
    const auto* slots = static_cast<const CudaSlots*>(f.outputs[i].slots);
    if (!slots || !slots->view().slot_count) continue;
    take(w.h[i], static_cast<size_t>(f.rows) * slots->view().up_columns);
    take(w.total_bias[i], f.outputs[i].linear->spec.n);
  }
  return w;
}

PrepareArgs CudaLinear::prepare_args(const void* x, Dtype x_type, int rows, const Workspace& workspace) const {
  PrepareArgs args;
  args.x = x;
  args.x_type = x_type;
  args.m = rows;
  args.k = spec.k;
  args.k_pitch = k_pitch;
  args.spec = spec;
  args.outliers = workspace.outliers;
  args.q = workspace.q;
  args.planes = workspace.planes;
  args.rows = workspace.rows;
  return args;
}

GemmArgs CudaLinear::gemm_args(int rows) const {
  GemmArgs args;
  args.m = rows;
  args.k = spec.k;
  args.k_pitch = k_pitch;
  return args;
}

GemmMember CudaLinear::member() const {
  GemmMember member;
  member.weight = weight_.as<int8_t>();
  member.n = spec.n;
  member.scale = scale_.as<float>();
  member.bias = bias_ ? bias_->as<float>() : nullptr;
  return member;
}

size_t CudaDevice::workspace(const ForwardArgs& f) const {
  ForwardArgs sizes = f;
  sizes.workspace = nullptr;
  return static_cast<const CudaLinear*>(f.outputs[0].linear)->place(sizes).bytes;
}

namespace {

// The kernels of a forward, in the order of their fields.
struct Plan {
  bool outliers = false, prepares = false;
  PrepareArgs prepare;
  GemmArgs gemm;
  const GemmFamily* const* families = nullptr;  // those it may be multiplied by

  const GemmFamily& family(const Limits& limits) const {
    const GemmFamily* const* family = families;
    while ((*family)->refuses(gemm, limits)) ++family;
    return **family;
  }
};

Plan plan_of(const ForwardArgs& f) {
  const auto& first = *static_cast<const CudaLinear*>(f.outputs[0].linear);
  const LinearSpec& spec = first.spec;
  const Workspace workspace = first.place(f);
  Plan plan;
  PrepareArgs& prepare = plan.prepare = first.prepare_args(f.x, f.x_type, f.rows, workspace);
  GemmArgs& gemm = plan.gemm = first.gemm_args(f.rows);
  gemm.y_type = f.y_type;
  gemm.rows = workspace.rows;
  prepare.row_slot = gemm.row_slot = f.row_slot;
  prepare.member_count = gemm.member_count = f.output_count;
  bool adapters = false;
  for (int i = 0; i < f.output_count; ++i) {
    const Output& output = f.outputs[i];
    GemmMember& to = gemm.member[i];
    to = static_cast<const CudaLinear*>(output.linear)->member();
    to.y = output.y;
    to.activation = output.activation;
    to.residual = output.residual;
    to.gate = output.gate;
    PrepareMember& from = prepare.member[i];
    from.n = to.n;
    if (!workspace.h[i]) continue;
    adapters = true;
    from.adapters = to.adapters = static_cast<const CudaSlots*>(output.slots)->view();
    from.h = workspace.h[i];
    to.h = workspace.h[i];
    if (f.row_slot) continue;  // each row has a bias of its own
    from.bias = to.bias;
    from.total_bias = workspace.total_bias[i];
    to.bias = workspace.total_bias[i];
  }
  if (spec.mode != Mode::w8a16) {
    plan.outliers = spec.outlier_threshold > 0;
    if (plan.outliers) {
      gemm.outliers = workspace.outliers;
      gemm.raw_x = f.x;
      gemm.raw_type = f.x_type;
    }
    plan.prepares = true;
    gemm.x = workspace.q;
    gemm.x_pitch = first.k_pitch;
    plan.families = kW8a8Families;
    return plan;
  }
  const bool in_place = f.x_type != Dtype::f32 && spec.k % 8 == 0 && reinterpret_cast<uintptr_t>(f.x) % 16 == 0;
  if (in_place) prepare.planes = nullptr;
  plan.prepares = !in_place || adapters;
  if (!plan.prepares) gemm.rows = nullptr;
  gemm.x = in_place ? f.x : workspace.planes;
  gemm.x_pitch = in_place ? spec.k : first.k_pitch;
  gemm.planes = f.x_type == Dtype::f32 ? 3 : 1;
  gemm.x_f16 = f.x_type == Dtype::f16;
  plan.families = kW8a16Families;
  return plan;
}

}  // namespace

void CudaDevice::forward(const ForwardArgs& f) const {
  const Current current(ordinal);
  const cudaStream_t stream = cuda_stream(f.stream);
  const Plan plan = plan_of(f);
  if (plan.outliers) launch_find_outliers(plan.prepare, limits, stream);
  if (plan.prepares) launch_prepare(plan.prepare, limits, stream);
  plan.family(limits).launch(plan.gemm, limits, stream);
}

void CudaDevice::explain(const ForwardArgs& f, Explanation& to) const {
  // A piece of the workspace that is not NULL is one that is used.
  ForwardArgs placed = f;
  if (!placed.workspace) placed.workspace = reinterpret_cast<void*>(kAlignment);
  const Plan plan = plan_of(placed);
  to.note("cuda:%d: %s, compute capability %d.%d, %d multiprocessors", ordinal, name_.c_str(), limits.capability / 10,
          limits.capability % 10, limits.multiprocessors);
  if (plan.outliers) describe_find_outliers(plan.prepare, limits, to);
  if (plan.prepares)
    describe_prepare(plan.prepare, limits, to);
  else
    to.note("no prepare: x is read where it is and there are no adapters");
  const GemmFamily& family = plan.family(limits);
  for (const GemmFamily* const* other = plan.families; *other != &family; ++other)
    to.note("not %s: %s", (*other)->name, (*other)->refuses(plan.gemm, limits));
  family.describe(plan.gemm, limits, to);
}

void CudaLinear::quantized(const QuantizedArgs& f) const {
  const Current current(device.ordinal);
  const cudaStream_t stream = cuda_stream(f.stream);
  ForwardArgs placed;
  placed.x_type = f.x_type;
  placed.rows = f.rows;
  placed.workspace = f.workspace;
  const Workspace workspace = place(placed);
  const PrepareArgs prepare = prepare_args(f.x, f.x_type, f.rows, workspace);
  if (spec.outlier_threshold > 0) launch_find_outliers(prepare, device.limits, stream);
  launch_prepare(prepare, device.limits, stream);
  if (f.sums) {
    GemmArgs gemm = gemm_args(f.rows);
    gemm.x = workspace.q;
    gemm.x_pitch = k_pitch;
    gemm.y_type = Dtype::f32;
    gemm.store_sums = true;
    gemm.member_count = 1;
    gemm.member[0] = member();
    gemm.member[0].bias = nullptr;
    gemm.member[0].y = f.sums;
    kGemmW8a8.launch(gemm, device.limits, stream);
  }
  if (f.codes) {
    OCTOLORA_CUDA(
        cudaMemcpy2DAsync(f.codes, spec.k, workspace.q, k_pitch, spec.k, f.rows, cudaMemcpyDeviceToDevice, stream),
        "codes: M = %d, K = %d", f.rows, spec.k);
  }
  if (f.row_scale) {
    OCTOLORA_CUDA(cudaMemcpy2DAsync(f.row_scale, sizeof(float), &workspace.rows->scale, sizeof(RowScale), sizeof(float),
                                    f.rows, cudaMemcpyDeviceToDevice, stream),
                  "row scales: M = %d", f.rows);
  }
}

// ---- Slots ----

int chunks_of(const std::vector<int>& capacity) {
  int chunks = 0;
  for (const int rank : capacity) chunks += (rank + kChunkRank - 1) / kChunkRank;
  return chunks;
}
int64_t fragment_steps(int k) { return (k + 31) / 32; }
constexpr int down_columns(int chunks, bool split) { return chunks * kChunkRank * (split ? 2 : 1); }
constexpr int up_columns(int chunks, bool split) { return chunks * kChunkRank * (split ? 3 : 1); }

CudaSlots::CudaSlots(CudaLinear& linear, const std::vector<int>& capacity, bool split)
    : linear_(linear),
      split_(split),
      a_(linear.device,
         static_cast<size_t>(down_columns(chunks_of(capacity), split)) * fragment_steps(linear.spec.k) * 64),
      b_(linear.device, static_cast<size_t>(linear.spec.n) * up_columns(chunks_of(capacity), split) * 2),
      chunk_buffer_(linear.device, static_cast<size_t>(chunks_of(capacity)) * sizeof(Chunk)),
      scale_(linear.device, capacity.size() * sizeof(float)),
      slot_bias_(linear.device, capacity.size() * linear.spec.n * sizeof(float)),
      has_bias_(linear.device, capacity.size() * sizeof(int32_t)) {
  for (size_t slot = 0; slot < capacity.size(); ++slot) {
    const int count = (capacity[slot] + kChunkRank - 1) / kChunkRank;
    ranges_.push_back({static_cast<int>(chunks_.size()), count});
    for (int i = 0; i < count; ++i) {
      Chunk chunk{};
      chunk.down = down_columns(static_cast<int>(chunks_.size()), split);
      chunk.up = up_columns(static_cast<int>(chunks_.size()), split);
      chunk.slot = static_cast<int>(slot);
      chunk.split = split;
      chunks_.push_back(chunk);
    }
  }
  for (Buffer* buffer : {&a_, &b_, &scale_, &slot_bias_, &has_bias_}) buffer->clear();
  if (!chunks_.empty()) chunk_buffer_.fill(chunks_.data(), chunks_.size());
  OCTOLORA_CUDA(cudaStreamSynchronize(nullptr), "%zu slots", capacity.size());
}

AdapterView CudaSlots::view() const {
  const int chunks = static_cast<int>(chunks_.size());
  return {a_.as<uint4>(),
          b_.as<uint16_t>(),
          chunk_buffer_.as<Chunk>(),
          scale_.as<float>(),
          slot_bias_.as<float>(),
          has_bias_.as<int32_t>(),
          static_cast<int>(ranges_.size()),
          chunks,
          down_columns(chunks, split_),
          up_columns(chunks, split_)};
}

void CudaSlots::set(int slot, const octolora_adapter_desc& adapter, float scale, octolora_stream stream_) {
  const Current current(linear_.device.ordinal);
  const cudaStream_t stream = cuda_stream(stream_);
  const int n = linear_.spec.n, k = linear_.spec.k, rank = adapter.rank;
  const FactorView a{adapter.a, static_cast<Dtype>(adapter.a_dtype), rank, k, k};
  const FactorView b{adapter.b, static_cast<Dtype>(adapter.b_dtype), n, rank, adapter.b_stride};
  const bool split = adapter.precision == OCTOLORA_LORA_SPLIT;
  const FactorType a_type = choose_type(a, split), b_type = choose_type(b, split);
  const Range range = ranges_[slot];

  // Both factors of the whole slot, zero beyond the rank, in the layouts of kernels.h.
  const int64_t steps = fragment_steps(k);
  const int slot_down = down_columns(range.count, split_), slot_up = up_columns(range.count, split_);
  std::vector<uint16_t> a_packed(static_cast<size_t>(slot_down) * steps * 32),
      b_packed(static_cast<size_t>(n) * slot_up);
  const auto low_part = [&](float value, uint16_t high, bool f16) -> uint16_t {
    return split ? encode(value - decode(high, f16), f16) : 0;
  };
  for (int r = 0; r < rank; ++r) {
    const int column = down_columns(r / kChunkRank, split_) + r % kChunkRank;
    const auto row_of = [&](int c) { return a_packed.data() + (c / 8 * steps * 32 + c % 8 * 4) * 8; };
    uint16_t* const high_row = row_of(column);
    uint16_t* const low_row = split_ ? row_of(column + kChunkRank) : nullptr;
    for (int i = 0; i < k; ++i) {
      const int o = i % 32;
      const int64_t at = i / 32 * 256 + o % 8 / 2 * 8 + o / 8 * 2 + o % 2;
      const float value = std::ldexp(a.at(r, i), a_type.exponent);
      high_row[at] = encode(value, a_type.f16);
      if (low_row) low_row[at] = low_part(value, high_row[at], a_type.f16);
    }
  }
  for (int i = 0; i < n; ++i) {
    for (int r = 0; r < rank; ++r) {
      uint16_t* const to =
          b_packed.data() + static_cast<int64_t>(i) * slot_up + up_columns(r / kChunkRank, split_) + r % kChunkRank;
      const float value = std::ldexp(b.at(i, r), b_type.exponent);
      to[0] = encode(value, b_type.f16);
      if (split_) {
        to[kChunkRank] = to[0];
        to[2 * kChunkRank] = low_part(value, to[0], b_type.f16);
      }
    }
  }
  for (int i = 0; i < range.count; ++i) {
    Chunk& chunk = chunks_[range.first + i];
    chunk.ranks = std::clamp(rank - i * kChunkRank, 0, kChunkRank);
    chunk.exponent = a_type.exponent + b_type.exponent;
    // |x . A_stored| <= K * largest for |x| < 1; h is to stay below 2^14.
    const float bound = std::max(static_cast<float>(k) * a_type.largest, std::ldexp(1.f, -100));
    chunk.range = std::ilogb(bound) + 1 - chunk.exponent - 14;
    chunk.a_f16 = a_type.f16;
    chunk.b_f16 = b_type.f16;
  }

  const Chunk& first = chunks_[range.first];
  uint16_t* const a_to = a_.as<uint16_t>() + static_cast<int64_t>(first.down) * steps * 32;
  OCTOLORA_CUDA(cudaMemcpyAsync(a_to, a_packed.data(), a_packed.size() * 2, cudaMemcpyHostToDevice, stream),
                "A of slot %d: rank %d", slot, rank);
  const size_t pitch = static_cast<size_t>(view().up_columns) * 2;
  OCTOLORA_CUDA(cudaMemcpy2DAsync(b_.as<uint16_t>() + first.up, pitch, b_packed.data(), slot_up * 2, slot_up * 2, n,
                                  cudaMemcpyHostToDevice, stream),
                "B of slot %d: rank %d", slot, rank);
  if (adapter.bias) {
    OCTOLORA_CUDA(cudaMemcpyAsync(slot_bias_.as<float>() + static_cast<int64_t>(slot) * n, adapter.bias,
                                  n * sizeof(float), cudaMemcpyHostToDevice, stream),
                  "bias of slot %d", slot);
  }
  write_chunks(slot, stream);
  write_has_bias(slot, adapter.bias != nullptr, stream);
  write_scale(slot, scale, stream);
}

void CudaSlots::set_scale(int slot, float scale, octolora_stream stream) {
  const Current current(linear_.device.ordinal);
  write_scale(slot, scale, cuda_stream(stream));
}

void CudaSlots::clear(int slot, octolora_stream stream_) {
  const Current current(linear_.device.ordinal);
  const cudaStream_t stream = cuda_stream(stream_);
  for (int i = 0; i < ranges_[slot].count; ++i) chunks_[ranges_[slot].first + i].ranks = 0;
  write_chunks(slot, stream);
  write_has_bias(slot, false, stream);
}

void CudaSlots::write_scale(int slot, float scale, cudaStream_t stream) {
  OCTOLORA_CUDA(cudaMemcpyAsync(scale_.as<float>() + slot, &scale, sizeof scale, cudaMemcpyHostToDevice, stream),
                "scale of slot %d", slot);
}

void CudaSlots::write_chunks(int slot, cudaStream_t stream) {
  const Range range = ranges_[slot];
  OCTOLORA_CUDA(cudaMemcpyAsync(chunk_buffer_.as<Chunk>() + range.first, chunks_.data() + range.first,
                                range.count * sizeof(Chunk), cudaMemcpyHostToDevice, stream),
                "chunks of slot %d", slot);
}

void CudaSlots::write_has_bias(int slot, bool has_bias, cudaStream_t stream) {
  const int32_t value = has_bias;
  OCTOLORA_CUDA(cudaMemcpyAsync(has_bias_.as<int32_t>() + slot, &value, sizeof value, cudaMemcpyHostToDevice, stream),
                "bias of slot %d", slot);
}

}  // namespace
}  // namespace octolora::cuda

namespace octolora {

std::shared_ptr<Device> make_cuda_device(int ordinal) { return std::make_shared<cuda::CudaDevice>(ordinal); }

int cuda_device_count() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess && count > 0) return count;
  cudaGetLastError();
  int driver = 0;
  cudaDriverGetVersion(&driver);
  if (driver == 0) throw Error(OCTOLORA_NO_DEVICE, "no NVIDIA driver: libcuda.so.1 was not found");
  if (driver < CUDART_VERSION && error == cudaErrorInsufficientDriver) {
    throw Error(OCTOLORA_NO_DEVICE, "the NVIDIA driver offers CUDA %d.%d, this library needs %d.%d", driver / 1000,
                driver % 1000 / 10, CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10);
  }
  if (error == cudaSuccess || error == cudaErrorNoDevice)
    throw Error(OCTOLORA_NO_DEVICE, "the NVIDIA driver sees no CUDA device");
  throw Error(OCTOLORA_NO_DEVICE, "%s (%s)", cudaGetErrorString(error), cudaGetErrorName(error));
}

}  // namespace octolora
