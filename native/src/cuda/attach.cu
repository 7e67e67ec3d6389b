// SPDX-License-Identifier: Apache-2.0
//
// Filling slots: an adapter's factors, as the caller has them, become the layouts of kernels.h, on the stream.
//
//   A [rank,K], B [N,rank] fp32, fp16 or bf16, in device memory or in pinned host memory, which is read in place
//
// A 16-bit factor is stored as it is. An fp32 factor that bf16 or fp16 holds exactly is stored in that type, else as
// fp16 times the power of two that brings its largest element to [1, 2); which of them is found out on the way. `pack`
// moves the numbers, and the last of a slot's blocks writes the chunks' descriptions, the scale and the flags: until
// then nobody on the stream has seen them, and nothing is decided on the host, so that all of it may be captured in a
// graph.
//
// Slots made for magnitudes (DoRA) keep B and the biases apart from what a forward reads. With the adapters applied one
// after the other as PEFT does, g_i = m_i / |rows of W + c_i B_i A_i| for those with a magnitude, else 1:
//
//   y - bias = G base + sum_i F_i (c_i (x.A_i^T).B_i^T + c_i bias_i)     G = product of all g_j     F_i = product j >=
//   i
//
// `row_norms` makes g_i from the int8 weights and the stored factors, `compose` makes G s_w, F_i B_i and F_i bias_i.
#include <algorithm>

#include "attach.h"
#include "check.h"
#include "convert.cuh"

namespace octolora::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kMaxBlocks = 1024;
constexpr int kPackBlocks = 3;  // of `pack` on a multiprocessor at the same time

// How a factor is stored: true value times 2^exponent, as fp16 or bf16.
struct StoredType {
  bool f16;
  int exponent;
  float largest;  // stored absolute maximum
};

__device__ StoredType stored_type(Dtype type, const FactorStatistics& found) {
  const float largest = __uint_as_float(found.largest);
  if (type != Dtype::f32) return {type == Dtype::f16, 0, largest};
  if (!found.beyond_bf16) return {false, 0, largest};
  if (!found.beyond_f16) return {true, 0, largest};
  const int exponent = found.largest < kInfinityBits ? -ilogbf(largest) : 0;
  return {true, exponent, scalbnf(largest, exponent)};
}

// value * 2^exponent for exponents beyond those of a float; exact where the result is a normal number.
struct PowerOfTwo {
  float first, second;
  explicit __device__ PowerOfTwo(int exponent)
      : first(scalbnf(1.f, exponent / 2)), second(scalbnf(1.f, exponent - exponent / 2)) {}
  __device__ float operator()(float value) const { return value * first * second; }
};

// Eight consecutive elements, of which the first `present` exist (none below 1, all from 8 on), as one or two 16-byte
// loads where they are aligned.
struct Octet {
  uint32_t word[8];  // fp32: one element a word; else two
};
__device__ __forceinline__ Octet load_octet(const void* data, Dtype type, int64_t index, int present, bool vectors) {
  Octet octet = {};
  if (type == Dtype::f32) {
    const auto* from = static_cast<const uint32_t*>(data) + index;
    if (vectors && present >= 8) {
      const uint4 low = reinterpret_cast<const uint4*>(from)[0], high = reinterpret_cast<const uint4*>(from)[1];
      return {{low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w}};
    }
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (i < present) octet.word[i] = from[i];
    return octet;
  }
  const auto* from = static_cast<const uint16_t*>(data) + index;
  if (vectors && present >= 8) {
    const uint4 all = *reinterpret_cast<const uint4*>(from);
    return {{all.x, all.y, all.z, all.w}};
  }
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (i < present) octet.word[i / 2] |= static_cast<uint32_t>(from[i]) << i % 2 * 16;
  return octet;
}

__device__ __forceinline__ bool loads_vectors(const FactorSource& s) {
  const int64_t bytes = s.stride * (s.type == Dtype::f32 ? 4 : 2);
  return reinterpret_cast<uintptr_t>(s.data) % 16 == 0 && bytes % 16 == 0;
}

// The octet as 16-bit numbers, two a word, and with kSplit what they leave of the elements as a second set.
struct Halves {
  uint32_t high[4], low[4];
};
template <bool kSplit>
__device__ __forceinline__ Halves halves_of(const Octet& octet, Dtype type, const StoredType& stored,
                                            const PowerOfTwo& power, bool low_parts) {
  Halves halves = {};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (type != Dtype::f32) {
      halves.high[i] = octet.word[i];
      continue;
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float value = power(__uint_as_float(octet.word[2 * i + j]));
      const uint16_t bits = encode16(value, stored.f16);
      halves.high[i] |= static_cast<uint32_t>(bits) << 16 * j;
      if (kSplit && low_parts) {
        halves.low[i] |= static_cast<uint32_t>(encode16(value - decode16(bits, stored.f16), stored.f16)) << 16 * j;
      }
    }
  }
  return halves;
}

// ---- Measure ----

// What a thread has seen of the elements of an fp32 factor.
struct Seen {
  uint32_t largest = 0;  // magnitude bits
  bool beyond_bf16 = false, beyond_f16 = false;

  __device__ __forceinline__ void add(const Octet& octet) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float value = __uint_as_float(octet.word[i]);
      largest = max(largest, magnitude_bits(value));
      beyond_bf16 |= (octet.word[i] & 0xffffu) != 0;
      beyond_f16 |= round_to_f16(value) != value;
    }
  }
  // All lanes of a warp.
  __device__ __forceinline__ void tell(FactorStatistics* found) {
    largest = __reduce_max_sync(~0u, largest);
    beyond_bf16 = __any_sync(~0u, beyond_bf16);
    beyond_f16 = __any_sync(~0u, beyond_f16);
    if (threadIdx.x % 32 != 0) return;
    atomicMax(&found->largest, largest);
    if (beyond_bf16) atomicOr(&found->beyond_bf16, 1u);
    if (beyond_f16) atomicOr(&found->beyond_f16, 1u);
  }
};

// Both factors, in a launch of its own: where a slot has too much for blocks that wait for each other.
__global__ __launch_bounds__(kThreads) void measure(const __grid_constant__ PackBatch batch) {
  const PackArgs& p = batch.member[0];
  const auto measure_factor = [](const FactorSource& s, FactorStatistics* found) {
    if (s.type != Dtype::f32) return;
    const bool vectors = loads_vectors(s);
    const int octets = (s.columns + 7) / 8;
    const int64_t items = static_cast<int64_t>(s.rows) * octets, step = static_cast<int64_t>(gridDim.x) * kThreads;
    Seen seen;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < items; i += step) {
      const int64_t row = i / octets;
      const int column = static_cast<int>(i - row * octets) * 8;
      seen.add(load_octet(s.data, s.type, row * s.stride + column, s.columns - column, vectors));
    }
    seen.tell(found);
  };
  measure_factor(p.a_source, &p.found[0]);
  measure_factor(p.b_source, &p.found[1]);
}

// ---- Pack ----

// What the warps of `pack` share out among each other: pieces of A (8 ranks x 64 values of K), of B (32 octets), of the
// bias and of the magnitudes (128 values).
struct Pieces {
  int k_pieces, b_octets;  // of a row
  int64_t a, b, vector;
  __host__ __device__ Pieces(const PackArgs& p)
      : k_pieces((p.a_source.columns + 63) / 64),
        b_octets(p.chunk_count * (kChunkRank / 8)),
        a(static_cast<int64_t>(p.chunk_count) * (kChunkRank / 8) * k_pieces),
        b((static_cast<int64_t>(p.n) * b_octets + 31) / 32),
        vector((p.n + 127) / 128) {}
  __host__ __device__ int64_t total(const PackArgs& p) const {
    return a + b + (p.bias_source ? vector : 0) + (p.magnitude_source ? vector : 0);
  }
};

__device__ FactorStatistics read_anew(const FactorStatistics& found) {
  const auto& now = const_cast<const volatile FactorStatistics&>(found);
  return {now.largest, now.beyond_bf16, now.beyond_f16, now.blocks};
}

// With waits a warp has one piece, which it keeps in registers until all blocks of the slot have seen theirs: so that
// memory behind the bus is read once.
template <bool kSplit>
__device__ void pack_slot(const PackArgs& p, bool waits) {
  const int lane = threadIdx.x % 32;
  const Pieces pieces(p);
  const int64_t total = pieces.total(p);
  const int64_t first = static_cast<int64_t>(blockIdx.x - p.first_block) * kWarps + threadIdx.x / 32;
  const bool a_vectors = loads_vectors(p.a_source), b_vectors = loads_vectors(p.b_source);
  const int steps = (p.a_source.columns + 31) / 32;  // of 32 values of K
  const int rank = p.a_source.rows;

  // Of A, lane (r, q) of a load brings k offsets 8q..8q+7 of rank r: 128 bytes of a 16-bit row at once, which pinned
  // memory needs.
  const int r = lane / 8, q = lane % 8, t = q % 4;
  const auto place_in_a = [&](int64_t piece) {  // first rank, first k
    const int group = static_cast<int>(piece / pieces.k_pieces);
    return int2{group * 8, static_cast<int>(piece - static_cast<int64_t>(group) * pieces.k_pieces) * 64};
  };
  const auto place_in_b = [&](int64_t piece) {  // row, first rank
    const int64_t item = piece * 32 + lane, row = item / pieces.b_octets;
    return int2{static_cast<int>(row), static_cast<int>(item - row * pieces.b_octets) * 8};
  };
  const auto load = [&](int64_t piece, Octet(&octet)[2]) {
    if (piece < pieces.a) {
      const int2 at = place_in_a(piece);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int row = at.x + 4 * j + r, k = at.y + 8 * q;
        const int present = row < rank ? p.a_source.columns - k : 0;
        octet[j] = load_octet(p.a_source.data, p.a_source.type, row * p.a_source.stride + k, present, a_vectors);
      }
    } else if (piece < pieces.a + pieces.b) {
      const int2 at = place_in_b(piece - pieces.a);
      const int present = at.x < p.n ? rank - at.y : 0;
      octet[0] = load_octet(p.b_source.data, p.b_source.type, at.x * p.b_source.stride + at.y, present, b_vectors);
    }
  };

  Octet octet[2] = {};
  if (waits) {
    Seen a_seen, b_seen;
    if (first < total) load(first, octet);
    if (first < pieces.a && p.a_source.type == Dtype::f32) {
      a_seen.add(octet[0]);
      a_seen.add(octet[1]);
      a_seen.tell(&p.found[0]);
    } else if (first >= pieces.a && first < pieces.a + pieces.b && p.b_source.type == Dtype::f32) {
      b_seen.add(octet[0]);
      b_seen.tell(&p.found[1]);
    }
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
      atomicAdd(&p.found[1].blocks, 1u);
      while (read_anew(p.found[1]).blocks < p.blocks) __nanosleep(100);
      __threadfence();
    }
    __syncthreads();
  }
  const StoredType a_type = stored_type(p.a_source.type, read_anew(p.found[0]));
  const StoredType b_type = stored_type(p.b_source.type, read_anew(p.found[1]));
  const PowerOfTwo a_power(a_type.exponent), b_power(b_type.exponent);
  uint32_t largest = 0;  // of A in 16 bits, two at a time

  // The four lanes of a row's 32 values transpose their words, so that each holds its part of a fragment.
  const auto store_a = [&](int64_t piece) {
    const int2 at = place_in_a(piece);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if (p.a_source.type != Dtype::f32) {
#pragma unroll
        for (int i = 0; i < 4; ++i) largest = __vmaxu2(largest, octet[j].word[i] & 0x7fff7fffu);
      }
      const Halves halves = halves_of<kSplit>(octet[j], p.a_source.type, a_type, a_power, p.low_parts);
      const auto store = [&](const uint4 word, int column) {  // by value: an array would go to local memory
        uint32_t out[4];
#pragma unroll
        for (int s = 0; s < 4; ++s) {
          const int i_sent = t ^ s;
          const uint32_t send = i_sent == 0 ? word.x : i_sent == 1 ? word.y : i_sent == 2 ? word.z : word.w;
          const uint32_t got = __shfl_xor_sync(~0u, send, s);
#pragma unroll
          for (int i = 0; i < 4; ++i) out[i] = (t ^ s) == i ? got : out[i];
        }
        const int step = at.y / 32 + q / 4;
        if (step < steps) {
          p.a[(static_cast<int64_t>(column / 8) * steps + step) * 32 + (4 * j + r) * 4 + t] = {out[0], out[1], out[2],
                                                                                               out[3]};
        }
      };
      const int column = p.first_down + at.x / kChunkRank * kChunkRank * (kSplit ? 2 : 1) + at.x % kChunkRank;
      store({halves.high[0], halves.high[1], halves.high[2], halves.high[3]}, column);
      if (kSplit) store({halves.low[0], halves.low[1], halves.low[2], halves.low[3]}, column + kChunkRank);
    }
  };

  const auto store_b = [&](int64_t piece) {
    const int2 at = place_in_b(piece);
    if (at.x >= p.n) return;
    const Halves halves = halves_of<kSplit>(octet[0], p.b_source.type, b_type, b_power, p.low_parts);
    uint16_t* const to = p.b + static_cast<int64_t>(at.x) * p.up_columns + p.first_up +
                         at.y / kChunkRank * kChunkRank * (kSplit ? 3 : 1) + at.y % kChunkRank;
    const uint4 high = {halves.high[0], halves.high[1], halves.high[2], halves.high[3]};
    *reinterpret_cast<uint4*>(to) = high;
    if (kSplit) {
      *reinterpret_cast<uint4*>(to + kChunkRank) = high;
      *reinterpret_cast<uint4*>(to + 2 * kChunkRank) = {halves.low[0], halves.low[1], halves.low[2], halves.low[3]};
    }
  };

  const auto copy_vector = [&](int64_t piece, const float* from, float* to) {
    for (int i = 0; i < 4; ++i) {
      const int64_t at = piece * 128 + i * 32 + lane;
      if (at < p.n) to[at] = from[at];
    }
  };

  for (int64_t i = first; i < total; i += static_cast<int64_t>(p.blocks) * kWarps) {
    if (!waits) load(i, octet);
    int64_t piece = i;
    if (piece < pieces.a) {
      store_a(piece);
      continue;
    }
    piece -= pieces.a;
    if (piece < pieces.b) {
      store_b(piece);
      continue;
    }
    piece -= pieces.b;
    if (p.bias_source && piece < pieces.vector) {
      copy_vector(piece, p.bias_source, p.bias);
      continue;
    }
    if (p.bias_source) piece -= pieces.vector;
    copy_vector(piece, p.magnitude_source, p.magnitude);
  }
  if (p.a_source.type != Dtype::f32) {
    const float2 both = decode16x2(largest, a_type.f16);
    const uint32_t bits = __reduce_max_sync(~0u, max(magnitude_bits(both.x), magnitude_bits(both.y)));
    if (lane == 0) atomicMax(&p.found[0].largest, bits);
  }

  // The last block describes the slot, and leaves the statistics as it found them.
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(&p.found[0].blocks, 1u) + 1 == p.blocks;
  __syncthreads();
  if (!last) return;
  __threadfence();
  const StoredType a_final = stored_type(p.a_source.type, read_anew(p.found[0]));
  __syncthreads();
  for (int i = threadIdx.x; i < p.chunk_count; i += kThreads) {
    Chunk& chunk = p.chunks[i];
    chunk.ranks = max(0, min(kChunkRank, rank - i * kChunkRank));
    chunk.exponent = a_type.exponent + b_type.exponent;
    // |x . A_stored| <= K * largest for |x| < 1; h is to stay below 2^14.
    const float bound = static_cast<float>(p.a_source.columns) * a_final.largest;
    chunk.range =
        (bound < __uint_as_float(kInfinityBits) ? ilogbf(fmaxf(bound, 0x1p-100f)) : 0) + 1 - chunk.exponent - 14;
    chunk.a_f16 = a_type.f16;
    chunk.b_f16 = b_type.f16;
  }
  if (threadIdx.x == 0) {
    *p.scale = p.new_scale;
    *p.has_bias = p.bias_source != nullptr;
    if (p.has_magnitude) *p.has_magnitude = p.magnitude_source != nullptr;
    p.found[0] = p.found[1] = FactorStatistics{};
  }
}

__global__ __launch_bounds__(kThreads, kPackBlocks) void pack(const __grid_constant__ PackBatch batch, bool waits) {
  int member = 0;
  while (member + 1 < batch.count && blockIdx.x >= batch.member[member + 1].first_block) ++member;
  const PackArgs& p = batch.member[member];
  if (p.split)
    pack_slot<true>(p, waits);
  else
    pack_slot<false>(p, waits);
}

__global__ void set_scale(float* scale, float value) { *scale = value; }

// B becomes zero too: a forward multiplies it by zeros, and an adapter with infinities would not go away.
__global__ __launch_bounds__(kThreads) void clear(const ClearArgs p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < p.chunk_count) p.chunks[i].ranks = 0;
  if (i == 0) *p.has_bias = 0;
  if (i == 0 && p.has_magnitude) *p.has_magnitude = 0;
  const int vectors = p.columns / 8;
  if (i < static_cast<int64_t>(p.n) * vectors) {
    reinterpret_cast<uint4*>(p.b + i / vectors * p.up_columns + p.first_up)[i % vectors] = {};
  }
}

// ---- Magnitudes ----

constexpr int kNormRows = 32;  // of W, a block's
constexpr int kNormK = 128;    // values of K at a time

// g[n] = m[n] / |W[n,:] + c B[n,:] A|, with W = s_w q, or s_w d q with block scales. A block has 32 rows of W; a thread
// 4 of them, 4 values of K wide. w8a16: W is stored in the order that kernels.h gives, and the block takes A in the
// same.
__global__ __launch_bounds__(kThreads) void row_norms(const NormArgs p, bool w8a16) {
  if (!*p.has_magnitude) return;
  __shared__ float a[kChunkRank][kNormK];
  __shared__ float b[kNormRows][kChunkRank + 1];
  const int column = threadIdx.x % 32, rows = threadIdx.x / 32;  // its word of 4 stored bytes; its rows, kWarps apart
  const int first_row = blockIdx.x * kNormRows, steps = (p.k + 31) / 32;
  const int split = p.split;
  const auto k_of = [&](int stored) {
    if (!w8a16) return stored;
    const int word = stored % 16 / 4, byte = stored % 4;
    return stored / 16 * 16 + 2 * word + byte % 2 + byte / 2 * 8;
  };
  float square[kNormRows / kWarps] = {};
  for (int start = 0; start < p.k; start += kNormK) {
    float delta[kNormRows / kWarps][4] = {};
    for (int c = 0; c < p.chunk_count; ++c) {
      const Chunk chunk = p.chunks[c];
      if (chunk.ranks == 0) continue;
      __syncthreads();
      for (int i = threadIdx.x; i < kChunkRank * kNormK; i += kThreads) {
        const int r = i / kNormK, k = start + k_of(i % kNormK);
        float value = 0.f;
        if (k < p.k) {
          const int o = k % 32;
          const auto at = [&](int down) {
            return ((static_cast<int64_t>(down / 8) * steps + k / 32) * 32 + down % 8 * 4 + o % 8 / 2) * 8 + o / 8 * 2 +
                   o % 2;
          };
          const auto* stored = reinterpret_cast<const uint16_t*>(p.a);
          value = decode16(stored[at(chunk.down + r)], chunk.a_f16);
          if (split) value += decode16(stored[at(chunk.down + kChunkRank + r)], chunk.a_f16);
        }
        a[r][i % kNormK] = value;
      }
      for (int i = threadIdx.x; i < kNormRows * kChunkRank; i += kThreads) {
        const int n = first_row + i / kChunkRank, r = i % kChunkRank;
        float value = 0.f;
        if (n < p.n) {
          const uint16_t* const from = p.b + static_cast<int64_t>(n) * p.up_columns + chunk.up + r;
          value = decode16(from[0], chunk.b_f16);
          if (split) value += decode16(from[2 * kChunkRank], chunk.b_f16);
          value = scalbnf(value * *p.scale, -chunk.exponent);
        }
        b[i / kChunkRank][r] = value;
      }
      __syncthreads();
#pragma unroll
      for (int r = 0; r < kChunkRank; ++r) {
        const float4 down = *reinterpret_cast<const float4*>(&a[r][column * 4]);
#pragma unroll
        for (int i = 0; i < kNormRows / kWarps; ++i) {
          const float up = b[rows + i * kWarps][r];
          delta[i][0] += up * down.x;
          delta[i][1] += up * down.y;
          delta[i][2] += up * down.z;
          delta[i][3] += up * down.w;
        }
      }
    }
    // Beyond K both the weights and A are zero.
    const int stored = start + column * 4;
#pragma unroll
    for (int i = 0; i < kNormRows / kWarps; ++i) {
      const int n = first_row + rows + i * kWarps;
      if (n >= p.n || stored >= p.k_pitch) continue;
      const uint32_t bytes =
          *reinterpret_cast<const uint32_t*>(p.weight + static_cast<int64_t>(n) * p.k_pitch + stored);
      const int64_t block = static_cast<int64_t>(stored / kScaleBlock) * block_scale_pitch(p.n) + n;
      const float block_scale = p.block_scale ? decode16(p.block_scale[block], true) : 1.f;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float q = static_cast<float>(static_cast<int8_t>(bytes >> 8 * j & 255u));
        const float w = p.weight_scale[n] * (block_scale * q) + delta[i][j];  // the inner product is exact
        square[i] += w * w;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kNormRows / kWarps; ++i) {
    const int n = first_row + rows + i * kWarps;
#pragma unroll
    for (int offset = 16; offset; offset /= 2) square[i] += __shfl_xor_sync(~0u, square[i], offset);
    if (column == 0 && n < p.n) p.factor[n] = __fdiv_rn(p.magnitude[n], __fsqrt_rn(square[i]));
  }
}

// A thread has 8 columns of one row of B; those of the first columns also have the row's scale and the slots' biases.
__global__ __launch_bounds__(kThreads) void compose(const ComposeArgs p) {
  const int octets = p.up_columns / 8;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, row = item / octets;
  if (row >= p.n) return;
  const int column = static_cast<int>(item - row * octets) * 8;
  const auto factor_from = [&](int slot) {
    float factor = 1.f;
    for (int i = slot; i < p.slot_count; ++i) {
      if (p.has_magnitude[i]) factor *= p.factor[static_cast<int64_t>(i) * p.n + row];
    }
    return factor;
  };
  if (column == 0) {
    p.scale[row] = p.weight_scale[row] * factor_from(0);
    for (int i = 0; i < p.slot_count; ++i) {
      const int64_t at = static_cast<int64_t>(i) * p.n + row;
      if (p.has_bias[i]) p.bias[at] = p.given_bias[at] * factor_from(i);
    }
  }
  const int chunk_columns = p.up_columns / p.chunk_count;
  const Chunk& chunk = p.chunks[column / chunk_columns];
  const int within = column % chunk_columns;
  if (within >= kChunkRank) return;  // copies and low parts come with the high ones
  const float factor = factor_from(chunk.slot);
  const bool filled = chunk.ranks > 0;  // else zeros, whatever was given last
  const int64_t at = row * p.up_columns + column;
  const auto words = [&](int offset) { return *reinterpret_cast<const uint4*>(p.given_b + at + offset); };
  const auto part = [](const uint4& w, int i) { return i == 0 ? w.x : i == 1 ? w.y : i == 2 ? w.z : w.w; };
  const bool f16 = chunk.b_f16;
  const uint4 high = filled ? words(0) : uint4{}, low = filled && chunk.split ? words(2 * kChunkRank) : uint4{};
  uint32_t new_high[4], new_low[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 h = decode16x2(part(high, i), f16), l = decode16x2(part(low, i), f16);
    const float x = (h.x + l.x) * factor, y = (h.y + l.y) * factor;
    const uint16_t x_bits = encode16(x, f16), y_bits = encode16(y, f16);
    new_high[i] = x_bits | static_cast<uint32_t>(y_bits) << 16;
    new_low[i] = encode16(x - decode16(x_bits, f16), f16) |
                 static_cast<uint32_t>(encode16(y - decode16(y_bits, f16), f16)) << 16;
  }
  const auto store = [&](int offset, const uint32_t(&w)[4]) {
    *reinterpret_cast<uint4*>(p.b + at + offset) = {w[0], w[1], w[2], w[3]};
  };
  store(0, new_high);
  if (chunk.split) {
    store(kChunkRank, new_high);
    store(2 * kChunkRank, new_low);
  }
}

}  // namespace

namespace {

void launch(const PackBatch& batch, int blocks, bool waits, cudaStream_t stream) {
  const PackArgs& first = batch.member[0];
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  cudaLaunchAttribute together;  // blocks that wait for each other run at the same time, or the launch is refused
  together.id = cudaLaunchAttributeCooperative;
  together.val.cooperative = 1;
  config.attrs = &together;
  config.numAttrs = waits ? 1 : 0;
  OCTOLORA_CUDA(cudaLaunchKernelEx(&config, pack, batch, waits), "packing %d adapters, the first for N = %d, K = %d",
                batch.count, first.n, first.a_source.columns);
}

}  // namespace

void launch_pack(const PackBatch& batch, const Limits& limits, cudaStream_t stream) {
  const int together = limits.multiprocessors * kPackBlocks;
  PackBatch part;  // slots that go together
  int part_blocks = 0;
  bool part_waits = false;
  const auto flush = [&] {
    if (part.count) launch(part, part_blocks, part_waits, stream);
    part.count = part_blocks = 0;
  };
  for (int i = 0; i < batch.count; ++i) {
    PackArgs p = batch.member[i];
    const bool f32 = p.a_source.type == Dtype::f32 || p.b_source.type == Dtype::f32;
    const int64_t blocks = (Pieces(p).total(p) + kWarps - 1) / kWarps;
    const bool waits = f32 && blocks <= together;
    if (waits != part_waits || (waits && part_blocks + blocks > together)) flush();
    part_waits = waits;
    p.blocks = static_cast<unsigned>(waits ? blocks : std::min<int64_t>(blocks, kMaxBlocks));
    p.first_block = static_cast<unsigned>(part_blocks);
    part.member[part.count++] = p;
    part_blocks += static_cast<int>(p.blocks);
    if (f32 && !waits) {  // measured by a launch before it, alone
      PackBatch one;
      one.member[0] = p;
      measure<<<p.blocks, kThreads, 0, stream>>>(one);
      OCTOLORA_CUDA(cudaGetLastError(), "measuring an adapter: rank %d, N = %d, K = %d", p.a_source.rows, p.n,
                    p.a_source.columns);
    }
  }
  flush();
}

void launch_set_scale(float* scale, float value, cudaStream_t stream) {
  set_scale<<<1, 1, 0, stream>>>(scale, value);
  OCTOLORA_CUDA(cudaGetLastError(), "scale %g", static_cast<double>(value));
}

void launch_clear(const ClearArgs& args, cudaStream_t stream) {
  const int64_t vectors = std::max<int64_t>(static_cast<int64_t>(args.n) * (args.columns / 8), args.chunk_count);
  clear<<<static_cast<unsigned>((vectors + kThreads - 1) / kThreads), kThreads, 0, stream>>>(args);
  OCTOLORA_CUDA(cudaGetLastError(), "clearing %d columns of N = %d", args.columns, args.n);
}

void launch_row_norms(const NormArgs& args, bool w8a16, cudaStream_t stream) {
  row_norms<<<static_cast<unsigned>((args.n + kNormRows - 1) / kNormRows), kThreads, 0, stream>>>(args, w8a16);
  OCTOLORA_CUDA(cudaGetLastError(), "row norms: N = %d, K = %d", args.n, args.k);
}

void launch_compose(const ComposeArgs& args, cudaStream_t stream) {
  const int64_t octets = static_cast<int64_t>(args.n) * (args.up_columns / 8);
  compose<<<static_cast<unsigned>((octets + kThreads - 1) / kThreads), kThreads, 0, stream>>>(args);
  OCTOLORA_CUDA(cudaGetLastError(), "magnitudes: N = %d, %d slots", args.n, args.slot_count);
}

}  // namespace octolora::cuda
