// SPDX-License-Identifier: Apache-2.0
//
// Descriptions of matrices for Hopper's tensor copy engine. The driver makes them, and is asked for by name, so that
// the library loads without one.
#pragma once

#include <cuda.h>

#include "check.h"

namespace octolora::cuda {

using EncodeTensorMap = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                     const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                                     CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// Throws where the driver has none; called when a device is set up, so that no forward is the first to find out.
inline EncodeTensorMap tensor_map_encoder() {
  static const EncodeTensorMap encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    OCTOLORA_CUDA(
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found),
        "tensor maps");
    return reinterpret_cast<EncodeTensorMap>(function);
  }();
  return encode;
}

// A matrix of bytes [rows, width] in boxes of `box_rows` x `box_bytes`, 128 or 64, in the swizzle of that many bytes;
// what lies outside reads as zero and is not written.
inline CUtensorMap tensor_map(const void* matrix, int64_t width, int64_t rows, int64_t pitch, int box_rows,
                              int box_bytes = 128) {
  CUtensorMap map;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(width), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(pitch)};
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(box_bytes), static_cast<cuuint32_t>(box_rows)}, steps[2] = {1, 1};
  const CUresult result = tensor_map_encoder()(&map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, const_cast<void*>(matrix), sizes,
                                               strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                               box_bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_128B,
                                               CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw Error(OCTOLORA_CUDA_ERROR, "cuTensorMapEncodeTiled: error %d for %lld rows of %lld bytes, pitch %lld, at %p",
                static_cast<int>(result), static_cast<long long>(rows), static_cast<long long>(width),
                static_cast<long long>(pitch), matrix);
  }
  return map;
}

}  // namespace octolora::cuda
