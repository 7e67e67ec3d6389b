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

class CpuSlots final : public Slots {
 public:
  // a: [rank,k] in panels of ranks; b: [n,rank] in panels of channels, both widened to fp32, which is exact for every
  // type. bias [n] in whole panels. x·Aᵀ of the slot has `capacity` columns from `first_column` on.
  struct Slot {
    int capacity = 0;
    int rank = 0;  // 0: empty
    float scale = 0.f;
    bool has_bias = false;
    int64_t first_column = 0;
    Array<float> a, b, bias;

    bool active() const { return rank > 0 && scale != 0.f; }
  };

  CpuSlots(const std::shared_ptr<Context>& context, int n, int k, const std::vector<int>& capacity);
  void set(int slot, const octolora_adapter_desc& adapter, float scale, octolora_stream stream) override;
  void set_scale(int slot, float scale, octolora_stream stream) override;
  void clear(int slot, octolora_stream stream) override;

  const std::vector<Slot>& slots() const { return slots_; }
  int64_t columns() const { return columns_; }  // of all slots side by side
  Panels a_panels(int rank) const;
  Panels b_panels(int rank) const;

 private:
  const std::shared_ptr<Context> context_;
  const int n_, k_;
  std::vector<Slot> slots_;
  int64_t columns_ = 0;
};

class CpuLinear final : public Linear {
 public:
  CpuLinear(const std::shared_ptr<Context>& context, const LinearSpec& spec, const octolora_linear_desc& desc);
  void write(int first_row, int rows, const int8_t* weight) override;
  std::unique_ptr<Slots> create_slots(const std::vector<int>& capacity, bool split) override;
  void quantized(const QuantizedArgs& args) const override;

 private:
  friend class Pass;

  const std::shared_ptr<Context> context_;
  const Panels panels_;
  const uint8_t flip_;  // XORed into every stored weight
  Array<uint8_t> weight_;
  Array<float> scale_;  // [n] in whole panels, whatever scale_count was
  Array<float> bias_;   // [n] in whole panels
  const bool has_bias_;
};

size_t forward_workspace(const ForwardArgs& args);
void forward(const ForwardArgs& args);
void explain(const ForwardArgs& args, Explanation& to);

}  // namespace octolora::cpu
