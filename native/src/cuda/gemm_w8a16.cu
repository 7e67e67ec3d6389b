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

using Bf16 = Table<Base::w8a16_bf16>;
using F16 = Table<Base::w8a16_f16>;

void set_up(const Limits& limits) {
  gemm::set_up(Bf16::kTuned, Bf16::kRows, limits);
  gemm::set_up(F16::kTuned, F16::kRows, limits);
}

void launch(const GemmArgs& args, const Limits& limits, cudaStream_t stream) {
  gemm::launch(args.x_f16 ? F16::kTuned : Bf16::kTuned, Bf16::kRows, args, limits, stream);
}

void describe(const GemmArgs& args, const Limits& limits, Explanation& to) {
  gemm::describe(kGemmW8a16.name, args.x_f16 ? F16::kTuned : Bf16::kTuned, Bf16::kRows, args, limits, to);
}

const char* refuses(const GemmArgs&, const Limits&) { return nullptr; }

}  // namespace

const GemmFamily kGemmW8a16 = {"mma.sync 16-bit, weights widened in registers", set_up, refuses, launch, describe};

}  // namespace octolora::cuda
