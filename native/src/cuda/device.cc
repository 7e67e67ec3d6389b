// SPDX-License-Identifier: Apache-2.0
//
// The device and its linears: what lives in device memory, and which kernels a forward enqueues.
#include "device.h"

#include <cstring>

namespace octolora::cuda {
namespace {

constexpr int kMinCapability = 80;

// In the order of preference; the last takes everything.
constexpr const GemmFamily* kW8a8Families[] = {&kGemmSm90, &kGemmW8a8, nullptr};
constexpr const GemmFamily* kW8a16Families[] = {&kGemmW8a16Sm90, &kGemmW8a16, nullptr};

}  // namespace

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
  set_up_find_outliers(limits);
  for (const GemmFamily* const* families : {kW8a8Families, kW8a16Families})
    for (; *families; ++families) (*families)->set_up(limits);
  set_up_decode(limits);
  OCTOLORA_CUDA(cudaEventCreateWithFlags(&staging_free_, cudaEventDisableTiming), "cuda:%d", ordinal);
}

CudaDevice::~CudaDevice() {
  if (staging_free_) cudaEventDestroy(staging_free_);
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

void* CudaDevice::host_alloc(size_t bytes) {
  const Current current(ordinal);
  void* memory = nullptr;
  OCTOLORA_CUDA(cudaHostAlloc(&memory, bytes, cudaHostAllocPortable), "%zu bytes of pinned memory", bytes);
  return memory;
}

void CudaDevice::host_free(void* memory) {
  const Current current(ordinal);
  OCTOLORA_CUDA(cudaFreeHost(memory), "%p", memory);
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

void CudaDevice::synchronize() {
  const Current current(ordinal);
  OCTOLORA_CUDA(cudaDeviceSynchronize(), "cuda:%d", ordinal);
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
  if (spec.scale_block) fill_block_scale(desc.block_scale);
  if (desc.weight)
    write(0, spec.n, desc.weight);
  else
    weight_.clear();
}

// from [N][blocks]; a block of more than kScaleBlock columns is repeated.
void CudaLinear::fill_block_scale(const uint16_t* from) {
  const int rows = (spec.k + kScaleBlock - 1) / kScaleBlock, pitch = block_scale_pitch(spec.n);
  const int64_t blocks = spec.scale_blocks();
  std::vector<uint16_t> columns(static_cast<size_t>(rows) * pitch);
  for (int n = 0; n < spec.n; n += 8) {  // eight at a time: whole lines of both arrays
    for (int row = 0; row < rows; ++row) {
      const int64_t block = row * kScaleBlock / spec.scale_block;
      for (int i = n; i < std::min(n + 8, spec.n); ++i)
        columns[static_cast<size_t>(row) * pitch + i] = from[i * blocks + block];
    }
  }
  block_scale_ = std::make_unique<Buffer>(device, columns.size() * sizeof(uint16_t));
  block_scale_->fill(columns.data(), columns.size());
}

void CudaLinear::write(int first_row, int rows, const int8_t* weight) {
  const Current current(device.ordinal);
  int8_t* const to = weight_.as<int8_t>() + static_cast<int64_t>(first_row) * k_pitch;
  OCTOLORA_CUDA(cudaMemcpy2D(to, k_pitch, weight, spec.k, spec.k, rows, cudaMemcpyDefault), "weight: %d rows of K = %d",
                rows, spec.k);
  if (k_pitch != spec.k) {  // what lies there is zero in the order of the file alone
    OCTOLORA_CUDA(cudaMemset2D(to + spec.k, k_pitch, 0, k_pitch - spec.k, rows), "weight: %d rows", rows);
  }
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
    take(w.q, std::max(padded, decode_q_bytes(f.rows, spec.k)));
  take(w.rows, f.rows);
  if (spec.outlier_threshold > 0) {
    w.outliers.words = (spec.k + 31) / 32;
    take(w.outliers.partial, static_cast<size_t>(w.outliers.words) * kOutlierRowChunks);
    take(w.outliers.flags, w.outliers.words);
    take(w.outliers.list, spec.k);
    take(w.outliers.count, 1);
    if (device.limits.capability == 90 && f.rows > kDecodeRows && f.output_count) {
      size_t n = 0;
      for (int i = 0; i < f.output_count; ++i) n += f.outputs[i].linear->spec.n;
      take(w.outliers.x, static_cast<size_t>(f.rows) * kOutlierColumns);
      take(w.outliers.weight, n * kOutlierColumns);
    }
  }
  for (int i = 0; i < f.output_count; ++i) {
    const auto* slots = static_cast<const CudaSlots*>(f.outputs[i].slots);
    if (!slots || !slots->view().slot_count) continue;
    take(w.h[i], static_cast<size_t>(f.rows) * slots->view().up_columns);
    take(w.total_bias[i], f.outputs[i].linear->spec.n);
    const int tiles = (f.rows + kSlotRows - 1) / kSlotRows;
    take(w.needed_steps[i], static_cast<size_t>(tiles) * slot_words(slots->view().up_columns));
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
  member.block_scale = block_scale_ ? block_scale_->as<uint16_t>() : nullptr;
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
  bool outliers = false, prepares = false, adapters = false;
  PrepareArgs prepare;
  GemmArgs gemm;
  const GemmFamily* const* families = nullptr;  // those it may be multiplied by

  const GemmFamily& family(const Limits& limits) const {
    const GemmFamily* const* family = families;
    while ((*family)->refuses(gemm, limits)) ++family;
    return **family;
  }
};

Plan plan_of(const ForwardArgs& f, const Limits& limits) {
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
  for (int i = 0; i < f.output_count; ++i) {
    const Output& output = f.outputs[i];
    GemmMember& to = gemm.member[i];
    to = static_cast<const CudaLinear*>(output.linear)->member();
    const auto* slots = static_cast<const CudaSlots*>(output.slots);
    if (slots && slots->weight_scale()) to.scale = slots->weight_scale();
    to.y = output.y;
    to.activation = output.activation;
    to.residual = output.residual;
    to.gate = output.gate;
    PrepareMember& from = prepare.member[i];
    from.n = to.n;
    from.weight = to.weight;
    if (!workspace.h[i]) continue;
    plan.adapters = true;
    from.adapters = to.adapters = slots->view();
    from.h = workspace.h[i];
    to.h = workspace.h[i];
    if (f.row_slot) {
      from.needed_steps = workspace.needed_steps[i];
      to.needed_steps = from.needed_steps;
      continue;  // each row has a bias of its own
    }
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
    if (&plan.family(limits) != &kGemmSm90)
      for (OutlierView* of : {&prepare.outliers, &gemm.outliers}) of->x = of->weight = nullptr;
    return plan;
  }
  const bool in_place = f.x_type != Dtype::f32 && spec.k % 8 == 0 && reinterpret_cast<uintptr_t>(f.x) % 16 == 0;
  if (in_place) prepare.planes = nullptr;
  plan.prepares = !in_place || plan.adapters;
  if (!plan.prepares) gemm.rows = nullptr;
  gemm.x = in_place ? f.x : workspace.planes;
  gemm.x_in_place = in_place;
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
  const Plan plan = plan_of(f, limits);
  if (!decode_refuses(plan.prepare, plan.gemm, limits)) return launch_decode(plan.prepare, plan.gemm, limits, stream);
  if (plan.outliers) launch_find_outliers(plan.prepare, limits, stream);
  if (plan.prepares) launch_prepare(plan.prepare, limits, stream);
  plan.family(limits).launch(plan.gemm, limits, stream);
}

void CudaDevice::explain(const ForwardArgs& f, Explanation& to) const {
  // A piece of the workspace that is not NULL is one that is used.
  ForwardArgs placed = f;
  if (!placed.workspace) placed.workspace = reinterpret_cast<void*>(kAlignment);
  const Plan plan = plan_of(placed, limits);
  to.note("cuda:%d: %s, compute capability %d.%d, %d multiprocessors", ordinal, name_.c_str(), limits.capability / 10,
          limits.capability % 10, limits.multiprocessors);
  const char* const not_decode = decode_refuses(plan.prepare, plan.gemm, limits);
  if (!not_decode) return describe_decode(plan.prepare, plan.gemm, limits, to);
  if (f.rows <= kDecodeRows) to.note("not the kernels for few rows: %s", not_decode);
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
