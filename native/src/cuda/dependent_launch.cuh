// SPDX-License-Identifier: Apache-2.0
//
// Programmatic dependent launch, from sm_90 on: a kernel that starts while the one before it in the stream still runs.
// It may read what no kernel writes until it calls ptx::wait_for_primaries, which returns when all that was enqueued
// before is done and visible. Kernels that are all launched this way and all wait are in order like any others.
#pragma once

#include <cuda_runtime.h>

#include "check.h"
#include "kernels.h"
#include "ptx.cuh"

namespace octolora::cuda {

// Shared memory of a kernel that starts where another is ending. How much of a multiprocessor's memory is shared
// changes only while nothing runs there, so all of these ask for the most.
template <class Kernel>
void share_memory(Kernel kernel, int bytes, const char* name) {
  const auto function = reinterpret_cast<const void*>(kernel);
  OCTOLORA_CUDA(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
                "%s: %d bytes of shared memory", name, bytes);
  OCTOLORA_CUDA(
      cudaFuncSetAttribute(function, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared),
      "%s: the most of shared memory", name);
}

// A launch of clusters whose blocks may start early. A cluster of one block is one all the same: st.async in a grid
// that was launched without clusters is an illegal instruction.
struct DependentLaunch {
  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute attributes[2];

  DependentLaunch(int blocks, int threads, int cluster, int shared_bytes, cudaStream_t stream) {
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
    config.stream = stream;
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim.x = static_cast<unsigned>(cluster);
    attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
    config.attrs = attributes;
    config.numAttrs = 2;
  }
  // On any architecture; before sm_90 nothing starts early, and there are no clusters.
  DependentLaunch(const Limits& limits, dim3 grid, int threads, int cluster, int shared_bytes, cudaStream_t stream)
      : DependentLaunch(1, threads, cluster, shared_bytes, stream) {
    config.gridDim = grid;
    config.numAttrs = limits.capability < 90 ? 0 : cluster > 1 ? 2 : 1;
  }
  DependentLaunch(const DependentLaunch&) = delete;
  DependentLaunch& operator=(const DependentLaunch&) = delete;
};

}  // namespace octolora::cuda
