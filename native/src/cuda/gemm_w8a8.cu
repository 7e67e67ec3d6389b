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

struct Table {
  const gemm::Tuned* rows;
  int count;
};
template <int Rows>
constexpr Table table(const gemm::Tuned (&rows)[Rows]) {
  return {rows, Rows};
}
Table table_for(const GemmArgs& args) {
  return args.store_sums ? table(kTunedSums) : args.outliers.list ? table(kTunedOutliers) : table(kTuned);
}

void set_up(const Limits& limits) {
  for (const Table& t : {table(kTuned), table(kTunedOutliers), table(kTunedSums)})
    gemm::set_up(t.rows, t.count, limits);
}

void launch(const GemmArgs& args, const Limits& limits, cudaStream_t stream) {
  const Table t = table_for(args);
  gemm::launch(t.rows, t.count, args, limits, stream);
}

void describe(const GemmArgs& args, const Limits& limits, Explanation& to) {
  const Table t = table_for(args);
  gemm::describe(kGemmW8a8.name, t.rows, t.count, args, limits, to);
}

const char* refuses(const GemmArgs&, const Limits&) { return nullptr; }

}  // namespace

const GemmFamily kGemmW8a8 = {"mma.sync s8", set_up, refuses, launch, describe};

}  // namespace octolora::cuda
