// SPDX-License-Identifier: Apache-2.0
//
// Slots: where their parts lie, and how an adapter comes to them. Nothing about their contents is kept on the host.
#include <optional>

#include "device.h"

namespace octolora::cuda {

// ---- Staging ----

void CudaDevice::need_staging(size_t bytes) {
  const std::lock_guard lock(staging_mutex_);
  const auto need = staging_needs_.insert(bytes);
  try {
    fit_staging();
  } catch (...) {
    staging_needs_.erase(need);
    throw;
  }
}

void CudaDevice::need_staging_no_more(size_t bytes) noexcept {
  const std::lock_guard lock(staging_mutex_);
  staging_needs_.erase(staging_needs_.find(bytes));
  try {
    fit_staging();
  } catch (const Error&) {  // the larger one stays
  }
}

// free() waits for the work that reads the old one.
void CudaDevice::fit_staging() {
  const size_t bytes = staging_needs_.empty() ? 0 : *staging_needs_.rbegin();
  if (bytes == staging_bytes_) return;
  void* const fresh = bytes ? alloc(bytes) : nullptr;
  if (staging_) free(staging_);
  staging_ = fresh;
  staging_bytes_ = bytes;
}

Staging::Staging(CudaDevice& device, cudaStream_t stream)
    : device_(device), lock_(device.staging_mutex_), stream_(stream) {
  OCTOLORA_CUDA(cudaStreamWaitEvent(stream, device.staging_free_, 0), "cuda:%d", device.ordinal);
}

Staging::~Staging() { cudaEventRecord(device_.staging_free_, stream_); }

const void* Staging::put(const void* from, size_t width, size_t rows, size_t pitch) {
  void* const to = static_cast<uint8_t*>(device_.staging_) + used_;
  if (width == pitch) {
    OCTOLORA_CUDA(cudaMemcpyAsync(to, from, width * rows, cudaMemcpyDefault, stream_), "%zu bytes", width * rows);
  } else {
    OCTOLORA_CUDA(cudaMemcpy2DAsync(to, width, from, pitch, width, rows, cudaMemcpyDefault, stream_),
                  "%zu rows of %zu bytes", rows, width);
  }
  used_ += static_cast<size_t>(round_up64(static_cast<int64_t>(width * rows), kAlignment));
  return to;
}

// ---- Sources ----

namespace {

// The address at which the device's kernels read this memory, or null where they cannot: pageable memory, and that of
// another device.
const void* readable(const void* memory, int ordinal) {
  cudaPointerAttributes attributes;
  OCTOLORA_CUDA(cudaPointerGetAttributes(&attributes, memory), "%p", memory);
  const bool here = attributes.type == cudaMemoryTypeHost || attributes.type == cudaMemoryTypeManaged ||
                    (attributes.type == cudaMemoryTypeDevice && attributes.device == ordinal);
  return here ? attributes.devicePointer : nullptr;
}

// What a caller gave, as memory that the kernels read: where it is, or by way of the staging buffer.
class Sources {
 public:
  Sources(CudaDevice& device, cudaStream_t stream) : device_(device), stream_(stream) {}

  FactorSource matrix(const void* data, Dtype type, int rows, int columns, int64_t stride, const char* what) {
    const void* const there = readable(data, device_.ordinal);
    if (there) return {there, type, rows, columns, stride};
    const size_t element = size_of(type);
    return {staging(data, what).put(data, columns * element, rows, stride * element), type, rows, columns, columns};
  }

  const float* vector(const float* data, int count, const char* what) {
    if (!data) return nullptr;
    const void* there = readable(data, device_.ordinal);
    if (!there) {
      require_finite(data, count, what);
      there = staging(data, what).put(data, count * sizeof(float), 1, count * sizeof(float));
    }
    return static_cast<const float*>(there);
  }

  bool staged() const { return staging_.has_value(); }

 private:
  Staging& staging(const void* data, const char* what) {
    if (staging_) return *staging_;
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    OCTOLORA_CUDA(cudaStreamIsCapturing(stream_, &status), "%s", what);
    if (status != cudaStreamCaptureStatusNone) {
      throw Error(OCTOLORA_INVALID_ARGUMENT,
                  "%s = %p is pageable host memory, expected pinned or device memory while the stream is captured",
                  what, data);
    }
    staging_.emplace(device_, stream_);
    return *staging_;
  }

  CudaDevice& device_;
  const cudaStream_t stream_;
  std::optional<Staging> staging_;
};

}  // namespace

// ---- Slots ----

CudaSlots::CudaSlots(CudaLinear& linear, const std::vector<int>& capacity, bool split, bool magnitudes)
    : linear_(linear), split_(split), magnitudes_(magnitudes) {
  place(capacity);
  for (const int rank : capacity) {
    const int64_t bytes = round_up64(static_cast<int64_t>(rank) * linear.spec.k * 4, kAlignment) +
                          round_up64(static_cast<int64_t>(rank) * linear.spec.n * 4, kAlignment) +
                          2 * round_up64(int64_t{linear.spec.n} * 4, kAlignment);
    staging_ = std::max(staging_, static_cast<size_t>(bytes));
  }
  std::vector<Chunk> chunks;
  for (size_t slot = 0; slot < ranges_.size(); ++slot) {
    for (int i = 0; i < ranges_[slot].count; ++i) {
      const int index = ranges_[slot].first + i;
      Chunk chunk{};
      chunk.down = static_cast<int32_t>(down_columns(index));
      chunk.up = static_cast<int32_t>(up_columns(index));
      chunk.slot = static_cast<int32_t>(slot);
      chunk.split = split;
      chunks.push_back(chunk);
    }
  }
  memory_->clear();
  if (!chunks.empty()) {
    OCTOLORA_CUDA(cudaMemcpy(const_cast<Chunk*>(view_.chunks), chunks.data(), chunks.size() * sizeof(Chunk),
                             cudaMemcpyHostToDevice),
                  "%zu chunks", chunks.size());
  }
  refresh(nullptr);
  OCTOLORA_CUDA(cudaStreamSynchronize(nullptr), "%zu slots", capacity.size());
  if (staging_) linear_.device.need_staging(staging_);
}

CudaSlots::~CudaSlots() {
  if (staging_) linear_.device.need_staging_no_more(staging_);
}

// Every part, first to find out the size of the whole, then in place.
void CudaSlots::place(const std::vector<int>& capacity) {
  int chunks = 0;
  for (const int rank : capacity) {
    const int count = (rank + kChunkRank - 1) / kChunkRank;
    ranges_.push_back({chunks, count});
    chunks += count;
  }
  const size_t slots = capacity.size(), n = static_cast<size_t>(linear_.spec.n);
  const size_t b_count = n * static_cast<size_t>(up_columns(chunks)), bias_count = slots * n;
  view_.slot_count = static_cast<int>(slots);
  view_.chunk_count = chunks;
  view_.down_columns = static_cast<int>(down_columns(chunks));
  view_.up_columns = static_cast<int>(up_columns(chunks));
  for (const Range& range : ranges_)
    view_.slot_columns = std::max(view_.slot_columns, static_cast<int>(up_columns(range.count)));
  const auto all = [&](uint8_t* memory) {
    size_t bytes = 0;
    const auto take = [&](auto*& pointer, size_t count) {
      using T = std::remove_pointer_t<std::remove_reference_t<decltype(pointer)>>;
      pointer = reinterpret_cast<T*>(memory + bytes);
      bytes += static_cast<size_t>(round_up64(static_cast<int64_t>(count * sizeof(T)), kAlignment));
    };
    take(view_.a, static_cast<size_t>(down_columns(chunks)) * static_cast<size_t>((linear_.spec.k + 31) / 32) * 4);
    take(view_.b, b_count);
    take(view_.chunks, static_cast<size_t>(chunks));
    take(view_.scale, slots);
    take(view_.slot_bias, bias_count);
    take(view_.has_bias, slots);
    take(found_, 2 * slots);
    given_b_ = const_cast<uint16_t*>(view_.b);
    given_bias_ = const_cast<float*>(view_.slot_bias);
    if (magnitudes_) {
      take(given_b_, b_count);
      take(given_bias_, bias_count);
      take(magnitude_, bias_count);
      take(factor_, bias_count);
      take(has_magnitude_, slots);
      take(weight_scale_, n);
    }
    return bytes;
  };
  memory_ = std::make_unique<Buffer>(linear_.device, all(nullptr));
  all(memory_->as<uint8_t>());
}

const LinearSpec& CudaSlots::spec() const { return linear_.spec; }

PackArgs CudaSlots::pack_args(int slot, const octolora_adapter_desc& adapter, float scale) const {
  const Range range = ranges_[slot];
  const int64_t at = static_cast<int64_t>(slot) * linear_.spec.n;
  PackArgs args;
  args.n = linear_.spec.n;
  args.split = split_;
  args.low_parts = adapter.precision == OCTOLORA_LORA_SPLIT;
  args.chunk_count = range.count;
  args.first_down = static_cast<int>(down_columns(range.first));
  args.first_up = static_cast<int>(up_columns(range.first));
  args.up_columns = view_.up_columns;
  args.found = found_ + 2 * slot;
  args.a = const_cast<uint4*>(view_.a);
  args.b = given_b_;
  args.chunks = const_cast<Chunk*>(view_.chunks) + range.first;
  args.scale = view_.scale + slot;
  args.has_bias = const_cast<int32_t*>(view_.has_bias) + slot;
  args.has_magnitude = magnitudes_ ? has_magnitude_ + slot : nullptr;
  args.bias = given_bias_ + at;
  args.magnitude = magnitudes_ ? magnitude_ + at : nullptr;
  args.new_scale = scale;
  return args;
}

// Fills whose sources the device reads where they are go together, as many as a launch takes; one that passes through
// the staging buffer goes alone.
void CudaDevice::fill(const SlotFill* fills, int count, octolora_stream stream_) {
  const Current current(ordinal);
  const cudaStream_t stream = cuda_stream(stream_);
  PackBatch batch;
  int first = 0;  // of the fills in the batch
  const auto flush = [&](int end) {
    if (batch.count) launch_pack(batch, limits, stream);
    batch.count = 0;
    for (int i = first; i < end; ++i) {
      static_cast<CudaSlots*>(fills[i].slots)->compose(fills[i].slot, fills[i].slot + 1, stream);
    }
    first = end;
  };
  for (int i = 0; i < count; ++i) {
    const octolora_adapter_desc& adapter = fills[i].adapter;
    const LinearSpec& spec = static_cast<CudaSlots*>(fills[i].slots)->spec();
    PackArgs args = static_cast<CudaSlots*>(fills[i].slots)->pack_args(fills[i].slot, adapter, fills[i].scale);
    const bool again = std::any_of(batch.member, batch.member + batch.count,
                                   [&](const PackArgs& other) { return other.chunks == args.chunks; });
    if (again || batch.count == kMaxPack) flush(i);
    Sources sources(*this, stream);
    const auto a_type = static_cast<Dtype>(adapter.a_dtype), b_type = static_cast<Dtype>(adapter.b_dtype);
    args.a_source = sources.matrix(adapter.a, a_type, adapter.rank, spec.k, spec.k, "adapter.a");
    args.b_source = sources.matrix(adapter.b, b_type, spec.n, adapter.rank, adapter.b_stride, "adapter.b");
    args.bias_source = sources.vector(adapter.bias, spec.n, "adapter.bias");
    args.magnitude_source = sources.vector(adapter.magnitude, spec.n, "adapter.magnitude");
    if (sources.staged()) flush(i);
    batch.member[batch.count++] = args;
    if (sources.staged()) flush(i + 1);
  }
  flush(count);
}

void CudaSlots::set_scale(int slot, float scale, octolora_stream stream_) {
  const Current current(linear_.device.ordinal);
  launch_set_scale(view_.scale + slot, scale, cuda_stream(stream_));
  compose(slot, slot + 1, cuda_stream(stream_));
}

void CudaSlots::clear(int slot, octolora_stream stream_) {
  const Current current(linear_.device.ordinal);
  const Range range = ranges_[slot];
  ClearArgs args;
  args.n = linear_.spec.n;
  args.chunk_count = range.count;
  args.first_up = static_cast<int>(up_columns(range.first));
  args.up_columns = view_.up_columns;
  args.columns = static_cast<int>(up_columns(range.count));
  args.b = const_cast<uint16_t*>(view_.b);
  args.chunks = const_cast<Chunk*>(view_.chunks) + range.first;
  args.has_bias = const_cast<int32_t*>(view_.has_bias) + slot;
  args.has_magnitude = magnitudes_ ? has_magnitude_ + slot : nullptr;
  launch_clear(args, cuda_stream(stream_));
  compose(slot, slot + 1, cuda_stream(stream_));
}

void CudaSlots::refresh(octolora_stream stream_) {
  const Current current(linear_.device.ordinal);
  compose(0, static_cast<int>(ranges_.size()), cuda_stream(stream_));
}

void CudaSlots::compose(int first, int end, cudaStream_t stream) {
  if (!magnitudes_) return;
  const GemmMember weights = linear_.member();
  const int n = linear_.spec.n;
  for (int slot = first; slot < end; ++slot) {
    const int64_t at = static_cast<int64_t>(slot) * n;
    NormArgs norm;
    norm.weight = weights.weight;
    norm.weight_scale = weights.scale;
    norm.block_scale = weights.block_scale;
    norm.n = n;
    norm.k = linear_.spec.k;
    norm.k_pitch = linear_.k_pitch;
    norm.a = view_.a;
    norm.b = given_b_;
    norm.up_columns = view_.up_columns;
    norm.chunks = view_.chunks + ranges_[slot].first;
    norm.chunk_count = ranges_[slot].count;
    norm.split = split_;
    norm.scale = view_.scale + slot;
    norm.has_magnitude = has_magnitude_ + slot;
    norm.magnitude = magnitude_ + at;
    norm.factor = factor_ + at;
    launch_row_norms(norm, linear_.spec.mode == Mode::w8a16, stream);
  }
  ComposeArgs args;
  args.n = n;
  args.slot_count = view_.slot_count;
  args.chunk_count = view_.chunk_count;
  args.up_columns = view_.up_columns;
  args.chunks = view_.chunks;
  args.has_bias = view_.has_bias;
  args.has_magnitude = has_magnitude_;
  args.factor = factor_;
  args.weight_scale = weights.scale;
  args.given_b = given_b_;
  args.given_bias = given_bias_;
  args.scale = weight_scale_;
  args.b = const_cast<uint16_t*>(view_.b);
  args.bias = const_cast<float*>(view_.slot_bias);
  launch_compose(args, stream);
}

}  // namespace octolora::cuda
