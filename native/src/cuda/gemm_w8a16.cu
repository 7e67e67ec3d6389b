// SPDX-License-Identifier: Apache-2.0
//
// W8A16: x stays in 16 bits, int8 weights widen in registers on their way into the tensor cores; the kernel and its
// layouts are in gemm.cuh. fp32 x comes as three bf16 planes that are multiplied one after the other.
#include <climits>

#include "gemm.cuh"

namespace octolora::cuda {
namespace {

using gemm::Base;
template <Base B, int BlockM, int BlockN, int WarpM, int WarpN, int Stages>
using Tile = gemm::Config<B, BlockM, BlockN, WarpM, WarpN, Stages>;

template <Base B>
struct Table {
  static constexpr gemm::Tuned kTuned[] = {
      gemm::tuned<Tile<B, 16, 64, 16, 16, 5>>(16, 0),        gemm::tuned<Tile<B, 32, 64, 16, 32, 4>>(32, 0),
      gemm::tuned<Tile<B, 64, 128, 32, 64, 3>>(64, 0),       gemm::tuned<Tile<B, 128, 256, 64, 64, 3>>(INT_MAX, 100),
      gemm::tuned<Tile<B, 128, 128, 64, 64, 2>>(INT_MAX, 0),
  };
  static constexpr int kRows = sizeof kTuned / sizeof kTuned[0];
};

}  // namespace

void set_up_gemm_w8a16(const Limits& limits) {
  gemm::set_up(Table<Base::w8a16_bf16>::kTuned, Table<Base::w8a16_bf16>::kRows, limits);
  gemm::set_up(Table<Base::w8a16_f16>::kTuned, Table<Base::w8a16_f16>::kRows, limits);
}

void launch_gemm_w8a16(const GemmArgs& args, const Limits& limits, cudaStream_t stream) {
  if (args.x_f16)
    gemm::launch(Table<Base::w8a16_f16>::kTuned, Table<Base::w8a16_f16>::kRows, args, limits, stream);
  else
    gemm::launch(Table<Base::w8a16_bf16>::kTuned, Table<Base::w8a16_bf16>::kRows, args, limits, stream);
}

}  // namespace octolora::cuda
