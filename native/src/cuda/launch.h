// SPDX-License-Identifier: Apache-2.0
//
// The configuration of a launch on a stream, optionally in clusters. From sm_90 on the kernel may start while the one
// before it still runs: it calls ptx::wait_for_primaries() before it touches memory.
#pragma once

#include <cuda_runtime.h>

#include "kernels.h"

namespace octolora::cuda {

struct Launch {
  Launch(const Limits& limits, dim3 grid, int threads, int shared_bytes, cudaStream_t stream, int cluster = 1) {
    config.gridDim = grid;
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
    config.stream = stream;
    config.attrs = attributes;
    if (limits.capability < 90) return;
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    config.numAttrs = 1;
    if (cluster == 1) return;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim.x = static_cast<unsigned>(cluster);
    attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
    config.numAttrs = 2;
  }
  Launch(const Launch&) = delete;
  Launch& operator=(const Launch&) = delete;

  cudaLaunchConfig_t config = {};

 private:
  cudaLaunchAttribute attributes[2] = {};
};

}  // namespace octolora::cuda
