// SPDX-License-Identifier: Apache-2.0
//
// The CPU's linear and its slots: what they keep. linear.cc fills them, forward.cc multiplies.
#pragma once

#include <memory>
#include <vector>

#include "../backend.h"
#include "memory.h"
#include "panels.h"

namespace octolora::cpu {

class CpuLinear;

class CpuSlots final : public Slots {
 public:
  // a: [rank,k] in panels of ranks; b: [n,rank] in panels of channels, both widened to fp32, which is exact for every
  // type. bias, magnitude and factor [n] in whole panels. x·Aᵀ of the slot has `capacity` columns from `first_column`
  // on.
  struct Slot {
    int capacity = 0;
    int rank = 0;                  // 0: empty
    const float* scale = nullptr;  // one of scales()
    bool has_bias = false, has_magnitude = false;
    int64_t first_column = 0;
    Array<float> a, b, bias;
    Array<float> magnitude, factor;  // DoRA: m, and m / the length of the row of W + scale·B·A

    bool active() const { return rank > 0 && (*scale != 0.f || has_magnitude); }
  };

  CpuSlots(const CpuLinear& linear, const std::vector<int>& capacity, bool magnitudes);
  void set(int slot, const octolora_adapter_desc& adapter, float scale);
  void set_scale(int slot, float scale, octolora_stream stream) override;
  void clear(int slot, octolora_stream stream) override;
  void refresh(octolora_stream stream) override;
  float* scales() override { return scales_.data(); }

  const std::vector<Slot>& slots() const { return slots_; }
  int64_t columns() const { return columns_; }  // of all slots side by side
  Panels a_panels(int rank) const;
  Panels b_panels(int rank) const;

 private:
  void measure(Slot& slot) const;

  const CpuLinear& linear_;
  const std::shared_ptr<Context> context_;
  const int n_, k_;
  Array<float> scales_;
  std::vector<Slot> slots_;
  int64_t columns_ = 0;
};

class CpuLinear final : public Linear {
 public:
  CpuLinear(const std::shared_ptr<Context>& context, const LinearSpec& spec, const octolora_linear_desc& desc);
  void write(int first_row, int rows, const int8_t* weight) override;
  std::unique_ptr<Slots> create_slots(const std::vector<int>& capacity, bool split, bool magnitudes) override;
  // s_w, and codes of one row of W from its place `first` on, times their block scales where there are any.
  float scale(int64_t row) const { return scale_.data()[row]; }
  void read(int64_t row, int64_t first, int64_t count, float* codes) const;
  void quantized(const QuantizedArgs& args) const override;

 private:
  void fill_block_scale(const uint16_t* from);

  friend class Pass;
  friend class CpuSlots;

  const std::shared_ptr<Context> context_;
  const Panels panels_;
  const uint8_t flip_;  // XORed into every stored weight
  Array<uint8_t> weight_;
  Array<float> scale_;  // [n] in whole panels, whatever scale_count was
  // fp16, empty or a matrix [n, k / kScaleBlock, rounded up] in panels
  const Panels block_panels_;
  Array<uint16_t> block_scale_;
  Array<float> bias_;  // [n] in whole panels
  const bool has_bias_;
};

size_t forward_workspace(const ForwardArgs& args);
void forward(const ForwardArgs& args);
void explain(const ForwardArgs& args, Explanation& to);

}  // namespace octolora::cpu
