// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime.h>

#include "error.h"

namespace octolora::cuda {

// Every CUDA call goes through here: what was called, where, what CUDA said, and the numbers of the problem.
#define OCTOLORA_CUDA(call, ...)                                                                       \
  do {                                                                                                 \
    const cudaError_t error_ = (call);                                                                 \
    if (error_ != cudaSuccess) ::octolora::cuda::fail(error_, #call, __FILE__, __LINE__, __VA_ARGS__); \
  } while (0)

[[noreturn]] __attribute__((format(printf, 5, 6))) inline void fail(cudaError_t error, const char* call,
                                                                    const char* file, int line, const char* format,
                                                                    ...) {
  cudaGetLastError();  // clears a non-sticky error, so that the next call starts clean
  char numbers[256];
  std::va_list list;
  va_start(list, format);
  std::vsnprintf(numbers, sizeof numbers, format, list);
  va_end(list);
  const char* base = file;
  for (const char* p = file; *p; ++p) {
    if (*p == '/') base = p + 1;
  }
  throw Error(error == cudaErrorMemoryAllocation ? OCTOLORA_OUT_OF_MEMORY : OCTOLORA_CUDA_ERROR,
              "%s: %s (%s), in %s at %s:%d", numbers, cudaGetErrorString(error), cudaGetErrorName(error), call, base,
              line);
}

}  // namespace octolora::cuda
