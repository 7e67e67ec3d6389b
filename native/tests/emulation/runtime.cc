// SPDX-License-Identifier: Apache-2.0
//
// The calls of the CUDA runtime and of the driver that the library and its tests make, on the machine of machine.h.
// Everything is enqueued; it runs when someone waits for it.
#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>

#include "machine.h"

// Opaque in CUDA's headers.
struct CUstream_st : emulation::Stream {};
struct CUevent_st : emulation::Event {};
struct CUgraph_st {
  std::vector<emulation::Work> work;
};
struct CUgraphExec_st {
  std::vector<emulation::Work> work;
};

namespace emulation {
namespace {

std::recursive_mutex mutex;
using Lock = std::lock_guard<std::recursive_mutex>;
thread_local cudaError_t last_error = cudaSuccess;
int captures = 0;

struct Memory {
  size_t bytes;
  bool device;
};
std::map<const uint8_t*, Memory> memories;

cudaError_t answer(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

// The memory that a pointer lies in; null for what is not of this file.
const Memory* memory_of(const void* pointer) {
  auto after = memories.upper_bound(static_cast<const uint8_t*>(pointer));
  if (after == memories.begin()) return nullptr;
  --after;
  return static_cast<const uint8_t*>(pointer) < after->first + after->second.bytes ? &after->second : nullptr;
}

Stream& stream_of(cudaStream_t stream) {
  static auto* const legacy = [] {
    auto* s = new CUstream_st;
    add_stream(s);
    return s;
  }();
  return stream ? *stream : *legacy;
}

void put(cudaStream_t stream, Work work) {
  Stream& s = stream_of(stream);
  if (s.captures_to)
    s.captures_to->push_back(std::move(work));
  else
    s.queue.push_back(std::move(work));
}
void put(cudaStream_t stream, std::function<void()> action) {
  Work work;
  work.action = std::move(action);
  put(stream, std::move(work));
}

// What waits, allocates or copies at once is not allowed while a stream is captured.
bool forbidden() { return captures > 0; }

void* allocate(size_t bytes, bool device) {
  const size_t padded = (bytes + 511) / 256 * 256;
  auto* const memory = static_cast<uint8_t*>(std::aligned_alloc(256, padded));
  if (!memory) return nullptr;
  std::memset(memory, 0xd7, bytes);
  memories[memory] = {bytes, device};
  return memory;
}

cudaError_t release(void* pointer, bool device) {
  const Lock lock(mutex);
  if (!pointer) return cudaSuccess;
  const auto found = memories.find(static_cast<const uint8_t*>(pointer));
  if (found == memories.end() || found->second.device != device) return answer(cudaErrorInvalidValue);
  if (forbidden()) return answer(cudaErrorStreamCaptureUnsupported);
  run();
  memories.erase(found);
  std::free(pointer);
  return cudaSuccess;
}

struct Plane {
  uint8_t* to;
  size_t to_pitch;
  const uint8_t* from;
  size_t from_pitch, width, height;

  void copy() const {
    for (size_t row = 0; row < height; ++row) std::memmove(to + row * to_pitch, from + row * from_pitch, width);
  }
};

cudaError_t copy(Plane plane, cudaStream_t stream, bool at_once) {
  const Lock lock(mutex);
  const Memory *from = memory_of(plane.from), *to = memory_of(plane.to);
  if (at_once || (!to && from)) {  // to memory that only the host knows, a copy waits for its end
    if (forbidden()) return answer(cudaErrorStreamCaptureUnsupported);
    put(stream, [plane] { plane.copy(); });
    run();
    return cudaSuccess;
  }
  if (!from) {  // of pageable memory, the call takes a copy
    auto values = std::make_shared<std::vector<uint8_t>>(plane.width * plane.height);
    Plane staged = plane;
    staged.to = values->data();
    staged.to_pitch = plane.width;
    staged.copy();
    plane.from_pitch = plane.width;
    put(stream, [plane, values]() mutable {
      plane.from = values->data();
      plane.copy();
    });
    return cudaSuccess;
  }
  put(stream, [plane] { plane.copy(); });
  return cudaSuccess;
}

Plane line(void* to, const void* from, size_t bytes) {
  return {static_cast<uint8_t*>(to), bytes, static_cast<const uint8_t*>(from), bytes, bytes, 1};
}

CUresult encode_tensor_map(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* matrix,
                           const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                           const cuuint32_t* steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                           CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  const unsigned span = swizzle == CU_TENSOR_MAP_SWIZZLE_128B ? 128 : swizzle == CU_TENSOR_MAP_SWIZZLE_64B ? 64 : 0;
  const bool fits = type == CU_TENSOR_MAP_DATA_TYPE_UINT8 && rank == 2 && interleave == CU_TENSOR_MAP_INTERLEAVE_NONE &&
                    reinterpret_cast<uintptr_t>(matrix) % 16 == 0 && strides[0] % 16 == 0 && sizes[0] && sizes[1] &&
                    sizes[0] <= 1ull << 32 && sizes[1] <= 1ull << 32 && box[0] == span && box[1] >= 1 &&
                    box[1] <= 256 && steps[0] == 1 && steps[1] == 1;
  if (!fits) return CUDA_ERROR_INVALID_VALUE;
  const TensorMap made = {TensorMap::kMagic,
                          static_cast<uint8_t*>(matrix),
                          static_cast<int64_t>(sizes[0]),
                          static_cast<int64_t>(sizes[1]),
                          static_cast<int64_t>(strides[0]),
                          static_cast<int32_t>(box[1]),
                          static_cast<int32_t>(box[0])};
  static_assert(sizeof made <= sizeof *map);
  std::memcpy(map, &made, sizeof made);
  return CUDA_SUCCESS;
}

}  // namespace

void enqueue(Launch launch, cudaStream_t stream) {
  const Lock lock(mutex);
  const Properties& p = properties();
  const unsigned blocks = launch.grid.x * launch.grid.y * launch.grid.z;
  const size_t together =
      kSharedPerMultiprocessor / (launch.shared_bytes + 1024) * static_cast<size_t>(p.multiprocessors);
  const bool fits = blocks > 0 && launch.grid.y < 65536 && launch.block.x <= 1024 && launch.block.y == 1 &&
                    launch.block.z == 1 && launch.shared_bytes <= kSharedPerBlock && launch.cluster >= 1 &&
                    launch.cluster <= 8 && launch.grid.x % static_cast<unsigned>(launch.cluster) == 0 &&
                    (p.capability >= 90 || (!launch.dependent && launch.cluster == 1)) &&
                    static_cast<size_t>(launch.cluster) <= together;
  if (!fits) {
    answer(cudaErrorInvalidConfiguration);
    return;
  }
  if (launch.cooperative && blocks > together) {
    answer(cudaErrorCooperativeLaunchTooLarge);
    return;
  }
  Work work;
  work.launch = std::make_unique<Launch>(std::move(launch));
  put(stream, std::move(work));
}

cudaError_t active_clusters(int* count, const cudaLaunchConfig_t* config) {
  int cluster = 1;
  for (unsigned i = 0; i < config->numAttrs; ++i)
    if (config->attrs[i].id == cudaLaunchAttributeClusterDimension)
      cluster = static_cast<int>(config->attrs[i].val.clusterDim.x);
  const size_t by_shared = kSharedPerMultiprocessor / (config->dynamicSmemBytes + 1024);
  const size_t by_threads = static_cast<size_t>(kThreadsPerMultiprocessor) / config->blockDim.x;
  *count = static_cast<int>(std::min(by_shared, by_threads)) * properties().multiprocessors / cluster;
  return cudaSuccess;
}

}  // namespace emulation

using namespace emulation;

extern "C" {

// ---- The runtime ----

cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaErrorMemoryAllocation            ? "cudaErrorMemoryAllocation"
         : error == cudaErrorInvalidValue              ? "cudaErrorInvalidValue"
         : error == cudaErrorInvalidConfiguration      ? "cudaErrorInvalidConfiguration"
         : error == cudaErrorStreamCaptureUnsupported  ? "cudaErrorStreamCaptureUnsupported"
         : error == cudaErrorCooperativeLaunchTooLarge ? "cudaErrorCooperativeLaunchTooLarge"
                                                       : "an error of the emulated GPU";
}
const char* cudaGetErrorString(cudaError_t error) { return cudaGetErrorName(error); }
cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* ordinal) {
  *ordinal = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int ordinal) { return answer(ordinal ? cudaErrorInvalidDevice : cudaSuccess); }
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* to, int) {
  *to = {};
  std::snprintf(to->name, sizeof to->name, "emulated GPU");
  to->major = properties().capability / 10;
  to->minor = properties().capability % 10;
  to->multiProcessorCount = properties().multiprocessors;
  to->sharedMemPerBlockOptin = kSharedPerBlock;
  to->totalGlobalMem = size_t{1} << 32;
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() {
  const Lock lock(mutex);
  if (forbidden()) return answer(cudaErrorStreamCaptureUnsupported);
  run();
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** memory, size_t bytes) {
  const Lock lock(mutex);
  if (forbidden()) return answer(cudaErrorStreamCaptureUnsupported);
  *memory = bytes > size_t{1} << 32 ? nullptr : allocate(bytes, true);
  return *memory ? cudaSuccess : answer(cudaErrorMemoryAllocation);
}
cudaError_t cudaFree(void* memory) { return release(memory, true); }
cudaError_t cudaHostAlloc(void** memory, size_t bytes, unsigned) {
  const Lock lock(mutex);
  if (forbidden()) return answer(cudaErrorStreamCaptureUnsupported);
  *memory = bytes > size_t{1} << 32 ? nullptr : allocate(bytes, false);
  return *memory ? cudaSuccess : answer(cudaErrorMemoryAllocation);
}
cudaError_t cudaFreeHost(void* memory) { return release(memory, false); }
cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  *free = *total = size_t{1} << 32;
  return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
  const Lock lock(mutex);
  const Memory* const memory = memory_of(pointer);
  *attributes = {};
  attributes->type = !memory ? cudaMemoryTypeUnregistered : memory->device ? cudaMemoryTypeDevice : cudaMemoryTypeHost;
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  return copy(line(to, from, bytes), nullptr, true);
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
  return copy(line(to, from, bytes), stream, false);
}
cudaError_t cudaMemcpy2D(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width, size_t height,
                         cudaMemcpyKind) {
  return copy({static_cast<uint8_t*>(to), to_pitch, static_cast<const uint8_t*>(from), from_pitch, width, height},
              nullptr, true);
}
cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                              size_t height, cudaMemcpyKind, cudaStream_t stream) {
  return copy({static_cast<uint8_t*>(to), to_pitch, static_cast<const uint8_t*>(from), from_pitch, width, height},
              stream, false);
}
cudaError_t cudaMemset2D(void* to, size_t pitch, int value, size_t width, size_t height) {
  const Lock lock(mutex);
  put(nullptr, [=] {
    for (size_t row = 0; row < height; ++row) std::memset(static_cast<uint8_t*>(to) + row * pitch, value, width);
  });
  return cudaSuccess;
}
cudaError_t cudaMemset(void* to, int value, size_t bytes) { return cudaMemset2D(to, bytes, value, bytes, 1); }

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  const Lock lock(mutex);
  *stream = new CUstream_st;
  add_stream(*stream);
  return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  const Lock lock(mutex);
  run();
  remove_stream(stream);
  delete stream;
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  const Lock lock(mutex);
  if (stream_of(stream).captures_to || forbidden()) return answer(cudaErrorStreamCaptureUnsupported);
  run();
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  const Lock lock(mutex);
  *status = stream_of(stream).captures_to ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = new CUevent_st;
  return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  const Lock lock(mutex);
  run();
  delete event;
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  const Lock lock(mutex);
  const uint64_t version = ++event->recorded;
  put(stream, [=] { event->reached = std::max(event->reached, version); });
  return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  const Lock lock(mutex);
  Work work;
  work.awaits = event;
  work.version = event->recorded;
  put(stream, std::move(work));
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute attribute, int value) {
  const bool fits =
      attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value <= static_cast<int>(kSharedPerBlock);
  return answer(fits ? cudaSuccess : cudaErrorInvalidValue);
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
  const bool known = std::strcmp(name, "cuTensorMapEncodeTiled") == 0;
  *function = known ? reinterpret_cast<void*>(encode_tensor_map) : nullptr;
  *found = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

// ---- The driver's graphs ----

CUresult cuStreamBeginCapture_v2(CUstream stream, CUstreamCaptureMode) {
  const Lock lock(mutex);
  stream->captures_to = new std::vector<Work>;
  ++captures;
  return CUDA_SUCCESS;
}
CUresult cuStreamEndCapture(CUstream stream, CUgraph* graph) {
  const Lock lock(mutex);
  std::unique_ptr<std::vector<Work>> work(std::exchange(stream->captures_to, nullptr));
  --captures;
  *graph = new CUgraph_st{std::move(*work)};
  return CUDA_SUCCESS;
}
CUresult cuGraphGetNodes(CUgraph graph, CUgraphNode*, size_t* count) {
  *count = graph->work.size();
  return CUDA_SUCCESS;
}
CUresult cuGraphInstantiateWithFlags(CUgraphExec* instance, CUgraph graph, unsigned long long) {
  *instance = new CUgraphExec_st;
  for (const Work& work : graph->work) (*instance)->work.push_back(work.copy());
  return CUDA_SUCCESS;
}
CUresult cuGraphLaunch(CUgraphExec instance, CUstream stream) {
  const Lock lock(mutex);
  for (const Work& work : instance->work) put(stream, work.copy());
  return CUDA_SUCCESS;
}
CUresult cuGraphExecDestroy(CUgraphExec instance) {
  delete instance;
  return CUDA_SUCCESS;
}
CUresult cuGraphDestroy(CUgraph graph) {
  delete graph;
  return CUDA_SUCCESS;
}
CUresult cuGetErrorName(CUresult, const char** name) {
  *name = "an error of the emulated GPU";
  return CUDA_SUCCESS;
}

}  // extern "C"
