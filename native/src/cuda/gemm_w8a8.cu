// SPDX-License-Identifier: Apache-2.0
//
// W8A8: int8 x int8 on the tensor cores, exact int32 sums; the kernel and its layouts are in gemm.cuh.
#include <climits>

#include "gemm.cuh"

namespace octolora::cuda {
namespace {

using gemm::Base;
template <Base B, int BlockM, int BlockN, int WarpM, int WarpN, int Stages>
using Tile = gemm::Config<B, BlockM, BlockN, WarpM, WarpN, Stages>;

// First row that fits. Small M takes narrow tiles, so that enough blocks stream W. Large M: eight warps of 64x32 leave
// room for a second block on the multiprocessor, whose sixteen warps keep the tensor cores busier than fewer, larger
// warps do.
constexpr gemm::Tuned kTuned[] = {
    gemm::tuned<Tile<Base::w8a8, 16, 64, 16, 16, 6>>(16, 0),
    gemm::tuned<Tile<Base::w8a8, 32, 64, 16, 32, 5>>(32, 0),
    gemm::tuned<Tile<Base::w8a8, 64, 128, 32, 64, 4>>(64, 0),
    gemm::tuned<Tile<Base::w8a8, 128, 128, 64, 32, 3>>(INT_MAX, 0),
};
// The outlier tail needs registers of its own.
constexpr gemm::Tuned kTunedOutliers[] = {
    gemm::tuned<Tile<Base::w8a8_outliers, 16, 64, 16, 16, 6>>(16, 0),
    gemm::tuned<Tile<Base::w8a8_outliers, 64, 128, 32, 64, 4>>(64, 0),
    gemm::tuned<Tile<Base::w8a8_outliers, 128, 128, 64, 32, 3>>(INT_MAX, 0),
};
constexpr gemm::Tuned kTunedSums[] = {
    gemm::tuned<Tile<Base::w8a8_sums, 64, 128, 32, 64, 4>>(INT_MAX, 0),
};

template <int Rows>
constexpr int rows_of(const gemm::Tuned (&)[Rows]) {
  return Rows;
}

}  // namespace

void set_up_gemm_w8a8(const Limits& limits) {
  gemm::set_up(kTuned, rows_of(kTuned), limits);
  gemm::set_up(kTunedOutliers, rows_of(kTunedOutliers), limits);
  gemm::set_up(kTunedSums, rows_of(kTunedSums), limits);
}

void launch_gemm_w8a8(const GemmArgs& args, const Limits& limits, cudaStream_t stream) {
  if (args.store_sums)
    gemm::launch(kTunedSums, rows_of(kTunedSums), args, limits, stream);
  else if (args.outliers.list)
    gemm::launch(kTunedOutliers, rows_of(kTunedOutliers), args, limits, stream);
  else
    gemm::launch(kTuned, rows_of(kTuned), args, limits, stream);
}

}  // namespace octolora::cuda
