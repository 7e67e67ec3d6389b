// SPDX-License-Identifier: Apache-2.0
#include "linear.h"

#include <cmath>
#include <cstring>

namespace octolora::cpu {

namespace {

// Elements packed at a time; a multiple of every group.
constexpr int64_t kPiece = 256;
constexpr int64_t kRowsPerTask = 16;

Panels weight_panels(const Kernels& kernels, const LinearSpec& spec) {
  return {spec.n, spec.k, kernels.lanes, spec.mode == Mode::w8a16 ? 1 : kernels.group};
}

// from: [rows, k] with `stride` elements from row to row.
void pack_factor(const Kernels& kernels, const Panels& panels, const void* from, Dtype type, int64_t stride,
                 float* to) {
  float piece[kPiece];
  for (int64_t row = 0; row < panels.rows; ++row) {
    for (int64_t first = 0; first < panels.k; first += kPiece) {
      const int64_t count = std::min(kPiece, panels.k - first);
      const size_t at = static_cast<size_t>(row * stride + first) * size_of(type);
      kernels.widen(static_cast<const char*>(from) + at, type, count, piece);
      pack(panels, row, first, count, piece, to);
    }
  }
}

}  // namespace

CpuSlots::CpuSlots(const CpuLinear& linear, const std::vector<int>& capacity, bool magnitudes)
    : linear_(linear),
      context_(linear.context_),
      n_(linear.spec.n),
      k_(linear.spec.k),
      scales_(context_, capacity.size(), "the scales of slots"),
      slots_(capacity.size()) {
  for (size_t i = 0; i < capacity.size(); ++i) {
    Slot& slot = slots_[i];
    slot.capacity = capacity[i];
    slot.scale = scales_.data() + i;
    slot.first_column = columns_;
    slot.a = Array<float>(context_, static_cast<uint64_t>(a_panels(slot.capacity).size()), "A of a slot, as fp32");
    slot.b = Array<float>(context_, static_cast<uint64_t>(b_panels(slot.capacity).size()), "B of a slot, as fp32");
    slot.bias = Array<float>(context_, static_cast<uint64_t>(b_panels(1).padded_rows()), "the bias of a slot");
    if (magnitudes) {
      for (Array<float>* each : {&slot.magnitude, &slot.factor})
        *each = Array<float>(context_, static_cast<uint64_t>(b_panels(1).padded_rows()), "the magnitudes of a slot");
    }
    columns_ += a_panels(slot.capacity).padded_rows();
  }
}

Panels CpuSlots::a_panels(int rank) const { return {rank, k_, context_->kernels.lanes, 1}; }
Panels CpuSlots::b_panels(int rank) const { return {n_, rank, context_->kernels.lanes, 1}; }

// Nothing below can fail once the arguments are valid, so a slot is never left half-filled.
void CpuSlots::set(int index, const octolora_adapter_desc& adapter, float scale) {
  if (adapter.bias != nullptr) require_finite(adapter.bias, n_, "adapter.bias");
  if (adapter.magnitude != nullptr) require_finite(adapter.magnitude, n_, "adapter.magnitude");
  Slot& slot = slots_[static_cast<size_t>(index)];
  const Kernels& kernels = context_->kernels;
  pack_factor(kernels, a_panels(adapter.rank), adapter.a, static_cast<Dtype>(adapter.a_dtype), k_, slot.a.data());
  pack_factor(kernels, b_panels(adapter.rank), adapter.b, static_cast<Dtype>(adapter.b_dtype), adapter.b_stride,
              slot.b.data());
  slot.has_bias = adapter.bias != nullptr;
  if (slot.has_bias) std::memcpy(slot.bias.data(), adapter.bias, static_cast<size_t>(n_) * sizeof(float));
  slot.has_magnitude = adapter.magnitude != nullptr;
  if (slot.has_magnitude)
    std::memcpy(slot.magnitude.data(), adapter.magnitude, static_cast<size_t>(n_) * sizeof(float));
  slot.rank = adapter.rank;
  set_scale(index, scale, nullptr);
}

void CpuSlots::set_scale(int index, float scale, octolora_stream) {
  scales_.data()[index] = scale;
  Slot& slot = slots_[static_cast<size_t>(index)];
  if (slot.has_magnitude) measure(slot);
}

void CpuSlots::clear(int index, octolora_stream) {
  Slot& slot = slots_[static_cast<size_t>(index)];
  slot.rank = 0;
  slot.has_magnitude = false;
}

void CpuSlots::refresh(octolora_stream) {
  for (Slot& slot : slots_)
    if (slot.has_magnitude) measure(slot);
}

// The factors of a slot: row by row, in pieces of K that stay in the first cache.
void CpuSlots::measure(Slot& slot) const {
  const Panels a = a_panels(slot.rank), b = b_panels(slot.rank);
  ThreadPool::Lease pool(context_->pool);
  pool.run((n_ + kRowsPerTask - 1) / kRowsPerTask, [&](int64_t task) {
    const int64_t end = std::min<int64_t>(n_, (task + 1) * kRowsPerTask);
    for (int64_t row = task * kRowsPerTask; row < end; ++row) {
      float up[OCTOLORA_MAX_RANK];
      unpack(b, row, 0, slot.rank, slot.b.data(), up);
      double square = 0;
      for (int64_t first = 0; first < k_; first += kPiece) {
        const int64_t count = std::min(kPiece, k_ - first);
        float codes[kPiece];
        linear_.read(row, first, count, codes);
        double delta[kPiece] = {};
        for (int64_t panel = 0; panel < a.count(); ++panel) {
          const int width = a.width(panel), there = a.rows_of(panel);
          const float* down = slot.a.data() + a.offset(panel) + first * width;
          const float* factors = up + panel * kColumns;
          for (int64_t i = 0; i < count; ++i)
            for (int r = 0; r < there; ++r) delta[i] += static_cast<double>(factors[r]) * down[i * width + r];
        }
        for (int64_t i = 0; i < count; ++i) {
          const double w = static_cast<double>(linear_.scale(row)) * codes[i] + *slot.scale * delta[i];
          square += w * w;
        }
      }
      slot.factor.data()[row] = static_cast<float>(slot.magnitude.data()[row] / std::sqrt(square));
    }
  });
}

CpuLinear::CpuLinear(const std::shared_ptr<Context>& context, const LinearSpec& s, const octolora_linear_desc& desc)
    : Linear(s),
      context_(context),
      panels_(weight_panels(context->kernels, s)),
      flip_(s.mode == Mode::w8a16 ? uint8_t{0} : context->kernels.weight_flip),
      weight_(context, static_cast<uint64_t>(panels_.size()), "the packed weights"),
      scale_(context, static_cast<uint64_t>(panels_.padded_rows()), "the weight scales"),
      block_panels_{s.n, s.scale_block ? (s.k + kScaleBlock - 1) / kScaleBlock : 0, panels_.lanes, 1},
      block_scale_(context, static_cast<uint64_t>(block_panels_.size()), "the block scales"),
      bias_(context, desc.bias != nullptr ? static_cast<uint64_t>(panels_.padded_rows()) : 0, "the bias"),
      has_bias_(desc.bias != nullptr) {
  for (int i = 0; i < spec.n; ++i) scale_.data()[i] = desc.scale[desc.scale_count == 1 ? 0 : i];
  if (has_bias_) std::memcpy(bias_.data(), desc.bias, static_cast<size_t>(spec.n) * sizeof(float));
  if (spec.scale_block) fill_block_scale(desc.block_scale);
  if (desc.weight != nullptr) {
    write(0, spec.n, desc.weight);
  } else if (flip_ != 0) {
    std::memset(weight_.data(), flip_, static_cast<size_t>(panels_.size()));
  }
}

void CpuLinear::write(int first_row, int rows, const int8_t* weight) {
  const int64_t end_row = int64_t{first_row} + rows;
  const int64_t first_panel = first_row / kColumns, end_panel = (end_row - 1) / kColumns + 1;
  ThreadPool::Lease pool(context_->pool);
  pool.run(end_panel - first_panel, [&](int64_t task) {
    const int64_t panel = first_panel + task;
    const int64_t first = std::max<int64_t>(first_row, panel * kColumns);
    const int64_t end = std::min<int64_t>(end_row, (panel + 1) * kColumns);
    // Piece by piece over all rows of the panel: the lines written stay in the first cache.
    for (int64_t k = 0; k < panels_.k; k += kPiece) {
      const int64_t count = std::min(kPiece, panels_.k - k);
      for (int64_t row = first; row < end; ++row) {
        const int8_t* from = weight + (row - first_row) * panels_.k + k;
        uint8_t piece[kPiece];
        for (int64_t i = 0; i < count; ++i) piece[i] = static_cast<uint8_t>(static_cast<uint8_t>(from[i]) ^ flip_);
        pack(panels_, row, k, count, piece, weight_.data());
      }
    }
  });
}

// from [n][blocks]; a block of more than kScaleBlock columns is repeated.
void CpuLinear::fill_block_scale(const uint16_t* from) {
  std::vector<uint16_t> row(static_cast<size_t>(block_panels_.k));
  for (int64_t i = 0; i < spec.n; ++i, from += spec.scale_blocks()) {
    for (int64_t j = 0; j < block_panels_.k; ++j) row[j] = from[j * kScaleBlock / spec.scale_block];
    pack(block_panels_, i, 0, block_panels_.k, row.data(), block_scale_.data());
  }
}

void CpuLinear::read(int64_t row, int64_t first, int64_t count, float* codes) const {
  uint8_t stored[kPiece];
  unpack(panels_, row, first, count, weight_.data(), stored);
  for (int64_t i = 0; i < count; ++i) codes[i] = static_cast<float>(static_cast<int8_t>(stored[i] ^ flip_));
  if (!spec.scale_block) return;
  uint16_t halves[kPiece / kScaleBlock];
  float scales[kPiece / kScaleBlock];
  const int64_t blocks = (count + kScaleBlock - 1) / kScaleBlock;
  unpack(block_panels_, row, first / kScaleBlock, blocks, block_scale_.data(), halves);
  context_->kernels.widen(halves, Dtype::f16, blocks, scales);
  for (int64_t i = 0; i < count; ++i) codes[i] *= scales[i / kScaleBlock];
}

std::unique_ptr<Slots> CpuLinear::create_slots(const std::vector<int>& capacity, bool, bool magnitudes) {
  return std::make_unique<CpuSlots>(*this, capacity, magnitudes);
}

}  // namespace octolora::cpu
