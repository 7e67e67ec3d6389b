// SPDX-License-Identifier: Apache-2.0
//
// W8A16: x stays in 16 bits, int8 weights widen in registers on their way into the tensor cores; the kernel and its
// layouts are in gemm.cuh. fp32 x comes as three bf16 planes that are multiplied one after the other. Weights with
// block scales (GGUF Q8_0) take tiles whose warps have registers left for them.
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
};

// With block scales a warp has all rows of its tile, so that a block of threads widens W once: more of x is read again
// from shared memory, but what is scarce are instructions.
template <Base B>
struct BlocksTable {
  static constexpr gemm::Tuned kTuned[] = {
      gemm::tuned<Tile<B, 16, 64, 16, 16, 5>>(16, 0),      gemm::tuned<Tile<B, 32, 64, 32, 16, 4>>(32, 0),
      gemm::tuned<Tile<B, 64, 64, 64, 16, 3>>(64, 0),      gemm::tuned<Tile<B, 128, 128, 128, 16, 3>>(INT_MAX, 264),
      gemm::tuned<Tile<B, 64, 64, 64, 16, 3>>(INT_MAX, 0),
  };
};

struct Rows {
  const gemm::Tuned* rows;
  int count;
};
template <int Count>
constexpr Rows rows_of(const gemm::Tuned (&rows)[Count]) {
  return {rows, Count};
}
constexpr Rows kBf16 = rows_of(Table<Base::w8a16_bf16>::kTuned), kF16 = rows_of(Table<Base::w8a16_f16>::kTuned);
constexpr Rows kBf16Blocks = rows_of(BlocksTable<Base::w8a16_bf16_blocks>::kTuned);
constexpr Rows kF16Blocks = rows_of(BlocksTable<Base::w8a16_f16_blocks>::kTuned);

void set_up(const Limits& limits) {
  for (const Rows& table : {kBf16, kF16, kBf16Blocks, kF16Blocks}) gemm::set_up(table.rows, table.count, limits);
}

// visit(table, args of that output alone) for each.
template <class Visit>
void each_output(const GemmArgs& args, const Visit& visit) {
  GemmArgs one = args;
  one.member_count = 1;
  for (int i = 0; i < args.member_count; ++i) {
    one.member[0] = args.member[i];
    if (one.member[0].block_scale)
      visit(args.x_f16 ? kF16Blocks : kBf16Blocks, one);
    else
      visit(args.x_f16 ? kF16 : kBf16, one);
  }
}

void launch(const GemmArgs& args, const Limits& limits, cudaStream_t stream) {
  each_output(args, [&](const Rows& table, const GemmArgs& one) {
    gemm::launch(table.rows, table.count, one, limits, stream);
  });
}

void describe(const GemmArgs& args, const Limits& limits, Explanation& to) {
  each_output(args, [&](const Rows& table, const GemmArgs& one) {
    const std::string name = std::string(kGemmW8a16.name) + (one.member[0].block_scale ? ", block scales" : "");
    gemm::describe(name.c_str(), table.rows, table.count, one, limits, to);
  });
}

const char* refuses(const GemmArgs&, const Limits&) { return nullptr; }

}  // namespace

const GemmFamily kGemmW8a16 = {"mma.sync 16-bit, weights widened in registers", set_up, refuses, launch, describe};

}  // namespace octolora::cuda
