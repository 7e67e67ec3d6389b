// SPDX-License-Identifier: Apache-2.0
//
// A Problem of the oracle, carried out by the library.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "device.h"
#include "oracle.h"

namespace test {

inline octolora_linear_desc describe(const Problem& p) {
  octolora_linear_desc d = {};
  d.struct_size = sizeof d;
  d.n = p.n;
  d.k = p.k;
  d.mode = p.mode;
  d.scale_count = static_cast<int32_t>(p.w_scale.size());
  d.round_x = p.round_x ? OCTOLORA_FLOAT16 : OCTOLORA_FLOAT32;
  d.x_scale = p.x_scale;
  d.x_divisor = p.x_divisor;
  d.outlier_threshold = p.threshold;
  d.weight = p.w.data();
  d.scale = p.w_scale.data();
  d.bias = p.bias.empty() ? nullptr : p.bias.data();
  d.scale_block = p.scale_block;
  if (p.scale_block) d.block_scale = reinterpret_cast<const uint16_t*>(p.block_scale.bytes.data());
  return d;
}

inline octolora_adapter_desc describe(const Adapter& a) {
  octolora_adapter_desc d = {};
  d.struct_size = sizeof d;
  d.rank = a.rank;
  d.a_dtype = static_cast<int32_t>(a.a.type);
  d.b_dtype = static_cast<int32_t>(a.b.type);
  d.precision = a.split ? OCTOLORA_LORA_SPLIT : OCTOLORA_LORA_16BIT;
  d.b_stride = a.b_stride == a.rank ? 0 : a.b_stride;
  d.a = a.a.bytes.data();
  d.b = a.b.bytes.data();
  d.bias = a.bias.empty() ? nullptr : a.bias.data();
  d.magnitude = a.magnitude.empty() ? nullptr : a.magnitude.data();
  return d;
}

inline Linear make_linear(octolora_device* device, const Problem& p) {
  const octolora_linear_desc desc = describe(p);
  octolora_linear* linear = nullptr;
  CHECK_OK(octolora_linear_create(device, &desc, &linear));
  return Linear(linear);
}

inline Slots make_slots(octolora_linear* linear, const std::vector<int32_t>& capacity, bool split,
                        bool magnitudes = false) {
  octolora_slots* slots = nullptr;
  CHECK_OK(octolora_slots_create(
      linear, static_cast<int32_t>(capacity.size()), capacity.data(),
      (split ? OCTOLORA_LORA_SPLIT : OCTOLORA_LORA_16BIT) | (magnitudes ? OCTOLORA_LORA_MAGNITUDES : 0), &slots));
  return Slots(slots);
}

// x, the outputs and the workspace of a call. The workspace has exactly the bytes that the library asks for.
class Runner {
 public:
  struct Member {
    const octolora_linear* linear;
    const octolora_slots* slots;
    const Problem* problem;
  };

  // x_offset, y_offset: elements by which x and y, with gate and residual, miss a 256-byte boundary. in_place: the
  // residual lies where y goes.
  Runner(octolora_device* device, bool cuda, const std::vector<Member>& members, int x_offset = 0, int y_offset = 0,
         bool in_place = false)
      : device_(device),
        problem_(*members[0].problem),
        in_place_(in_place),
        x_(device, cuda, problem_.x.bytes.size(), static_cast<size_t>(x_offset) * format(problem_.x.type).bytes),
        row_slot_(device, cuda, problem_.row_slot.size() * sizeof(int32_t)) {
    const size_t offset = static_cast<size_t>(y_offset) * format(problem_.y_type).bytes;
    for (const Member& member : members) {
      const Problem& p = *member.problem;
      outputs_.emplace_back(new Output{member,
                                       {device, cuda, static_cast<size_t>(p.m) * p.n * format(p.y_type).bytes, offset},
                                       {device, cuda, p.residual.bytes.size(), offset},
                                       {device, cuda, p.gate.bytes.size(), offset}});
      outputs_.back()->residual.write(p.residual.bytes.data());
      outputs_.back()->gate.write(p.gate.bytes.data());
    }
    x_.write(problem_.x.bytes.data());
    row_slot_.write(problem_.row_slot.data());
    workspace_.reset(new Buffer(device, cuda, workspace_bytes()));
  }
  Runner(octolora_device* device, bool cuda, const octolora_linear* linear, const octolora_slots* slots,
         const Problem& p, int x_offset = 0, int y_offset = 0)
      : Runner(device, cuda, {{linear, slots, &p}}, x_offset, y_offset) {}

  // What octolora_linear_workspace says, for one output.
  static size_t workspace_bytes(const octolora_linear* linear, const octolora_slots* slots, const Problem& p) {
    size_t bytes = 0;
    CHECK_OK(octolora_linear_workspace(linear, slots, p.m, static_cast<int32_t>(p.x.type), &bytes));
    return bytes;
  }

  // The call, its first output with these slots.
  void enqueue(const octolora_slots* slots, octolora_stream stream) {
    if (plain()) {
      CHECK_OK(octolora_linear_forward(
          outputs_[0]->member.linear, slots, x_.get(), static_cast<int32_t>(problem_.x.type), outputs_[0]->y.get(),
          static_cast<int32_t>(problem_.y_type), problem_.m, workspace_->get(), workspace_->bytes(), stream));
      return;
    }
    std::vector<octolora_output> outputs;
    const octolora_forward_desc desc = describe_call(slots, outputs);
    CHECK_OK(octolora_forward(&desc, stream));
  }
  void enqueue(octolora_stream stream) { enqueue(outputs_[0]->member.slots, stream); }

  // y of a forward, with fresh NaN in y before it.
  std::vector<uint8_t> forward(const octolora_slots* slots) {
    clear_y();
    enqueue(slots, nullptr);
    CHECK_OK(octolora_stream_synchronize(device_, nullptr));
    return read_y();
  }
  std::vector<uint8_t> forward() { return forward(outputs_[0]->member.slots); }

  // What octolora_forward_explain says of the call.
  std::string explain() const {
    std::vector<octolora_output> outputs;
    const octolora_forward_desc desc = describe_call(outputs_[0]->member.slots, outputs);
    char text[4096];
    CHECK_OK(octolora_forward_explain(&desc, text, sizeof text));
    return text;
  }

  void clear_y() {
    for (const auto& output : outputs_) {
      output->y.clear();
      if (in_place_ && output->residual.bytes()) output->y.write(output->member.problem->residual.bytes.data());
    }
  }
  std::vector<uint8_t> read_y(size_t output = 0) const { return outputs_[output]->y.read(); }

  // No byte beside y and the workspace was written, and what is only read is as it was.
  void expect_intact() const {
    workspace_->expect_intact("workspace");
    x_.expect_intact("x");
    row_slot_.expect_intact("row_slot");
    if (x_.read() != problem_.x.bytes) fail("x was changed");
    for (const auto& output : outputs_) {
      const Problem& p = *output->member.problem;
      output->y.expect_intact("y");
      if (output->residual.read() != p.residual.bytes) fail("residual was changed");
      if (output->gate.read() != p.gate.bytes) fail("gate was changed");
    }
  }
  const Buffer& x() const { return x_; }
  void* y() const { return outputs_[0]->y.get(); }
  Buffer& row_slot() { return row_slot_; }
  const Buffer& workspace() const { return *workspace_; }

 private:
  struct Output {
    Member member;
    Buffer y, residual, gate;
  };

  // octolora_linear_forward can say it.
  bool plain() const {
    return outputs_.size() == 1 && problem_.row_slot.empty() && !problem_.residual.size() && !problem_.gate.size() &&
           problem_.activation == OCTOLORA_ACTIVATION_NONE;
  }

  octolora_forward_desc describe_call(const octolora_slots* first_slots, std::vector<octolora_output>& outputs) const {
    for (const auto& output : outputs_) {
      octolora_output o = {};
      o.struct_size = sizeof o;
      o.activation = output->member.problem->activation;
      o.linear = output->member.linear;
      o.slots = outputs.empty() ? first_slots : output->member.slots;
      o.y = output->y.get();
      if (output->residual.bytes()) o.residual = in_place_ ? o.y : output->residual.get();
      if (output->gate.bytes()) o.gate = output->gate.get();
      outputs.push_back(o);
    }
    octolora_forward_desc d = {};
    d.struct_size = sizeof d;
    d.rows = problem_.m;
    d.x = x_.get();
    d.x_dtype = static_cast<int32_t>(problem_.x.type);
    d.y_dtype = static_cast<int32_t>(problem_.y_type);
    d.row_slot = row_slot_.bytes() ? static_cast<const int32_t*>(row_slot_.get()) : nullptr;
    d.outputs = outputs.data();
    d.output_count = static_cast<int32_t>(outputs.size());
    d.workspace = workspace_ ? workspace_->get() : nullptr;
    d.workspace_bytes = workspace_ ? workspace_->bytes() : 0;
    return d;
  }

  size_t workspace_bytes() const {
    std::vector<octolora_output> outputs;
    const octolora_forward_desc desc = describe_call(outputs_[0]->member.slots, outputs);
    size_t bytes = 0;
    CHECK_OK(octolora_forward_workspace(&desc, &bytes));
    if (plain() && bytes != workspace_bytes(outputs_[0]->member.linear, outputs_[0]->member.slots, problem_))
      fail("octolora_forward_workspace and octolora_linear_workspace differ");
    return bytes;
  }

  octolora_device* device_;
  const Problem& problem_;  // of the first output, for what all of them share
  const bool in_place_;
  Buffer x_, row_slot_;
  std::vector<std::unique_ptr<Output>> outputs_;
  std::unique_ptr<Buffer> workspace_;
};

}  // namespace test
