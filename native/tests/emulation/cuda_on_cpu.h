// SPDX-License-Identifier: Apache-2.0
//
// The CUDA language as a host compiler understands it, on the machine of machine.h. Included before every source of the
// CUDA backend, which CMakeLists.txt changes in three places: shared variables, and launches by <<< >>>.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cfloat>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <utility>

#include "machine.h"

// The sources have bodies for sm_90a.
#define __CUDA_ARCH__ 900
#define __CUDA_ARCH_FEAT_SM90_ALL

#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __maxnreg__
#define __maxnreg__(...)
#undef __grid_constant__
#define __grid_constant__

#ifndef __clang__
#define __builtin_assume(condition) static_cast<void>(0)
#endif
#define threadIdx (::emulation::current->index)
#define blockIdx (::emulation::block().index)
// Not a macro: a launch has a member of this name.
struct EmulatedExtent {
  unsigned emulation::Index::*axis;
  operator unsigned() const { return emulation::block().grid->launch.grid.*axis; }
};
static const struct {
  EmulatedExtent x{&emulation::Index::x}, y{&emulation::Index::y}, z{&emulation::Index::z};
} gridDim;

using std::max;
using std::min;

// ---- Launches ----

namespace emulation {

void enqueue(Launch launch, cudaStream_t stream);

template <class... Parameters, class... Arguments>
cudaError_t launch(const char* name, const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                   Arguments&&... arguments) {
  Launch l;
  l.name = name;
  l.grid = {config->gridDim.x, config->gridDim.y, config->gridDim.z};
  l.block = {config->blockDim.x, config->blockDim.y, config->blockDim.z};
  l.shared_bytes = config->dynamicSmemBytes;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& a = config->attrs[i];
    if (a.id == cudaLaunchAttributeProgrammaticStreamSerialization)
      l.dependent = a.val.programmaticStreamSerializationAllowed != 0;
    else if (a.id == cudaLaunchAttributeClusterDimension)
      l.cluster = static_cast<int>(a.val.clusterDim.x);
    else if (a.id == cudaLaunchAttributeCooperative)
      l.cooperative = a.val.cooperative != 0;
    else
      return cudaErrorInvalidValue;
  }
  std::tuple<std::decay_t<Parameters>...> copies(std::forward<Arguments>(arguments)...);
  l.body = [kernel, copies] { std::apply(kernel, copies); };
  enqueue(std::move(l), config->stream);
  return cudaGetLastError();
}

// What kernel<<<blocks, threads, bytes, stream>>> becomes.
template <class... Parameters>
auto launcher(const char* name, void (*kernel)(Parameters...), unsigned blocks, unsigned threads, size_t bytes,
              cudaStream_t stream) {
  return [=](Parameters... arguments) {
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = bytes;
    config.stream = stream;
    launch(name, &config, kernel, arguments...);
  };
}

cudaError_t active_clusters(int* count, const cudaLaunchConfig_t* config);
template <class Kernel>
cudaError_t active_clusters(int* count, Kernel, const cudaLaunchConfig_t* config) {
  return active_clusters(count, config);
}

inline uint8_t* dynamic_shared() { return block().shared; }

}  // namespace emulation

#define cudaLaunchKernelEx(...) ::emulation::launch(#__VA_ARGS__, __VA_ARGS__)
#define cudaOccupancyMaxActiveClusters ::emulation::active_clusters

// ---- What threads of a block or a warp do together ----

inline void __syncthreads() {
  ::emulation::hardware_barrier(0, static_cast<int>(::emulation::block().grid->launch.block.x), true, true);
}
inline void __syncwarp(unsigned = ~0u) {
  ::emulation::breathe();
  ::emulation::warp_sync("__syncwarp");
}
template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return ::emulation::show(value, "__shfl_sync")[lane % 32];
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return ::emulation::show(value, "__shfl_xor_sync")[::emulation::current->lane() ^ mask];
}
// Within `width` lanes.
template <class T>
T __shfl_up_sync(unsigned, T value, int delta, int width = 32) {
  const auto shown = ::emulation::show(value, "__shfl_up_sync");
  const int lane = ::emulation::current->lane();
  return lane % width < delta ? value : shown[lane - delta];
}
inline unsigned __ballot_sync(unsigned, int says) {
  const auto shown = ::emulation::show(says, "__ballot_sync");
  unsigned bits = 0;
  for (int i = 0; i < 32; ++i) bits |= (shown[i] ? 1u : 0u) << i;
  return bits;
}
inline bool __all_sync(unsigned mask, int says) { return __ballot_sync(mask, says) == ~0u; }
inline bool __any_sync(unsigned mask, int says) { return __ballot_sync(mask, says) != 0; }
template <class T, class Join>
T emulated_reduction(T value, Join join) {
  const auto shown = ::emulation::show(value, "__reduce_sync");
  T result = shown[0];
  for (int i = 1; i < 32; ++i) result = join(result, shown[i]);
  return result;
}
template <class T>
T __reduce_max_sync(unsigned, T value) {
  return emulated_reduction(value, [](T a, T b) { return std::max(a, b); });
}
template <class T>
T __reduce_min_sync(unsigned, T value) {
  return emulated_reduction(value, [](T a, T b) { return std::min(a, b); });
}
template <class T>
T __reduce_add_sync(unsigned, T value) {
  return emulated_reduction(value, [](T a, T b) { return a + b; });
}
template <class T>
T __reduce_or_sync(unsigned, T value) {
  return emulated_reduction(value, [](T a, T b) { return a | b; });
}

// ---- Memory ----

inline void __threadfence() { ::emulation::breathe(); }
inline void __nanosleep(unsigned) { ::emulation::sleep(4); }
template <class T>
T __ldg(const T* from) {
  return *from;
}
template <class T>
T __ldcg(const T* from) {
  return *from;
}
template <class T>
T atomicAdd(T* to, T value) {
  const T before = *to;
  *to += value;
  return before;
}
template <class T>
T atomicMax(T* to, T value) {
  const T before = *to;
  *to = std::max(before, value);
  return before;
}
template <class T>
T atomicOr(T* to, T value) {
  const T before = *to;
  *to |= value;
  return before;
}

// ---- Arithmetic ----

template <class To, class From>
To emulated_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
inline unsigned __float_as_uint(float v) { return emulated_bits<unsigned>(v); }
inline float __uint_as_float(unsigned v) { return emulated_bits<float>(v); }
inline int __float_as_int(float v) { return emulated_bits<int>(v); }
inline float __int_as_float(int v) { return emulated_bits<float>(v); }
// The sources are compiled without contraction, so that these are what they say.
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.f / a; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __clz(unsigned v) { return v ? __builtin_clz(v) : 32; }
inline int __ffs(unsigned v) { return __builtin_ffs(static_cast<int>(v)); }
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const uint64_t bytes = low | static_cast<uint64_t>(high) << 32;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned s = selector >> 4 * i & 0xf;
    unsigned byte = static_cast<unsigned>(bytes >> 8 * (s & 7)) & 0xff;
    if (s & 8) byte = byte & 0x80 ? 0xff : 0;
    result |= byte << 8 * i;
  }
  return result;
}
template <class Each>
unsigned emulated_halves(Each each) {
  return (each(0) & 0xffff) | (each(16) & 0xffff) << 16;
}
inline unsigned __vmaxu2(unsigned a, unsigned b) {
  return emulated_halves([&](int s) { return std::max(a >> s & 0xffff, b >> s & 0xffff); });
}
inline unsigned __vminu2(unsigned a, unsigned b) {
  return emulated_halves([&](int s) { return std::min(a >> s & 0xffff, b >> s & 0xffff); });
}
inline unsigned __viaddmax_u16x2(unsigned a, unsigned b, unsigned c) {
  return __vmaxu2(emulated_halves([&](int s) { return (a >> s) + (b >> s); }), c);
}
inline unsigned __viaddmin_u16x2(unsigned a, unsigned b, unsigned c) {
  return __vminu2(emulated_halves([&](int s) { return (a >> s) + (b >> s); }), c);
}
