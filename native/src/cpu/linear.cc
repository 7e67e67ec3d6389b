// SPDX-License-Identifier: Apache-2.0
#include "linear.h"

#include <cstring>

namespace octolora::cpu {

namespace {

// Elements packed at a time; a multiple of every group.
constexpr int64_t kPiece = 256;

Panels weight_panels(const Kernels& kernels, const LinearSpec& spec) {
  return {spec.n, spec.k, kernels.columns, kernels.lanes, spec.mode == Mode::w8a16 ? 1 : kernels.group};
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

CpuSlots::CpuSlots(const std::shared_ptr<Context>& context, int n, int k, const std::vector<int>& capacity)
    : context_(context), n_(n), k_(k), slots_(capacity.size()) {
  for (size_t i = 0; i < capacity.size(); ++i) {
    Slot& slot = slots_[i];
    slot.capacity = capacity[i];
    slot.first_column = columns_;
    slot.a = Array<float>(context, static_cast<uint64_t>(a_panels(slot.capacity).size()), "A of a slot, as fp32");
    slot.b = Array<float>(context, static_cast<uint64_t>(b_panels(slot.capacity).size()), "B of a slot, as fp32");
    slot.bias = Array<float>(context, static_cast<uint64_t>(b_panels(1).padded_rows()), "the bias of a slot");
    columns_ += a_panels(slot.capacity).padded_rows();
  }
}

Panels CpuSlots::a_panels(int rank) const { return {rank, k_, context_->kernels.columns, context_->kernels.lanes, 1}; }
Panels CpuSlots::b_panels(int rank) const { return {n_, rank, context_->kernels.columns, context_->kernels.lanes, 1}; }

// Nothing below can fail once the arguments are valid, so a slot is never left half-filled.
void CpuSlots::set(int index, const octolora_adapter_desc& adapter, float scale, octolora_stream) {
  Slot& slot = slots_[static_cast<size_t>(index)];
  const Kernels& kernels = context_->kernels;
  const int64_t b_stride = adapter.b_stride != 0 ? adapter.b_stride : adapter.rank;
  pack_factor(kernels, a_panels(adapter.rank), adapter.a, static_cast<Dtype>(adapter.a_dtype), k_, slot.a.data());
  pack_factor(kernels, b_panels(adapter.rank), adapter.b, static_cast<Dtype>(adapter.b_dtype), b_stride, slot.b.data());
  slot.has_bias = adapter.bias != nullptr;
  if (slot.has_bias) std::memcpy(slot.bias.data(), adapter.bias, static_cast<size_t>(n_) * sizeof(float));
  slot.rank = adapter.rank;
  slot.scale = scale;
}

void CpuSlots::set_scale(int slot, float scale, octolora_stream) { slots_[static_cast<size_t>(slot)].scale = scale; }

void CpuSlots::clear(int slot, octolora_stream) { slots_[static_cast<size_t>(slot)].rank = 0; }

CpuLinear::CpuLinear(const std::shared_ptr<Context>& context, const LinearSpec& s, const octolora_linear_desc& desc)
    : Linear(s),
      context_(context),
      panels_(weight_panels(context->kernels, s)),
      flip_(s.mode == Mode::w8a16 ? uint8_t{0} : context->kernels.weight_flip),
      weight_(context, static_cast<uint64_t>(panels_.size()), "the packed weights"),
      scale_(context, static_cast<uint64_t>(panels_.padded_rows()), "the weight scales"),
      bias_(context, desc.bias != nullptr ? static_cast<uint64_t>(panels_.padded_rows()) : 0, "the bias"),
      has_bias_(desc.bias != nullptr) {
  for (int i = 0; i < spec.n; ++i) scale_.data()[i] = desc.scale[desc.scale_count == 1 ? 0 : i];
  if (has_bias_) std::memcpy(bias_.data(), desc.bias, static_cast<size_t>(spec.n) * sizeof(float));
  if (desc.weight != nullptr) {
    write(0, spec.n, desc.weight);
  } else if (flip_ != 0) {
    std::memset(weight_.data(), flip_, static_cast<size_t>(panels_.size()));
  }
}

void CpuLinear::write(int first_row, int rows, const int8_t* weight) {
  const int64_t end_row = int64_t{first_row} + rows;
  const int64_t first_panel = first_row / panels_.columns, end_panel = (end_row - 1) / panels_.columns + 1;
  ThreadPool::Lease pool(context_->pool);
  pool.run(end_panel - first_panel, [&](int64_t task) {
    const int64_t panel = first_panel + task;
    const int64_t first = std::max<int64_t>(first_row, panel * panels_.columns);
    const int64_t end = std::min<int64_t>(end_row, (panel + 1) * panels_.columns);
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

std::unique_ptr<Slots> CpuLinear::create_slots(const std::vector<int>& capacity, bool) {
  return std::make_unique<CpuSlots>(context_, spec.n, spec.k, capacity);
}

}  // namespace octolora::cpu
