// SPDX-License-Identifier: Apache-2.0
//
// A Problem of the oracle, carried out by the library.
#pragma once

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

// x, y and the workspace of forwards of one linear. The workspace has exactly the bytes that the library asks for.
class Runner {
 public:
  // x_offset, y_offset: elements by which x and y miss a 256-byte boundary.
  Runner(octolora_device* device, bool cuda, const octolora_linear* linear, const octolora_slots* slots,
         const Problem& p, int x_offset = 0, int y_offset = 0)
      : linear_(linear),
        slots_(slots),
        problem_(p),
        device_(device),
        x_(device, cuda, p.x.bytes.size(), static_cast<size_t>(x_offset) * format(p.x.type).bytes),
        y_(device, cuda, static_cast<size_t>(p.m) * p.n * format(p.y_type).bytes,
           static_cast<size_t>(y_offset) * format(p.y_type).bytes),
        workspace_(device, cuda, workspace_bytes(linear, slots, p)) {
    x_.write(p.x.bytes.data());
  }

  static size_t workspace_bytes(const octolora_linear* linear, const octolora_slots* slots, const Problem& p) {
    size_t bytes = 0;
    CHECK_OK(octolora_linear_workspace(linear, slots, p.m, static_cast<int32_t>(p.x.type), &bytes));
    return bytes;
  }

  void enqueue(const octolora_slots* slots, octolora_stream stream) {
    CHECK_OK(octolora_linear_forward(linear_, slots, x_.get(), static_cast<int32_t>(problem_.x.type), y_.get(),
                                     static_cast<int32_t>(problem_.y_type), problem_.m, workspace_.get(),
                                     workspace_.bytes(), stream));
  }
  // y of a forward, with fresh NaN in y before it.
  std::vector<uint8_t> forward(const octolora_slots* slots) {
    y_.clear();
    enqueue(slots, nullptr);
    CHECK_OK(octolora_stream_synchronize(device_, nullptr));
    return y_.read();
  }
  std::vector<uint8_t> forward() { return forward(slots_); }

  void clear_y() { y_.clear(); }
  std::vector<uint8_t> read_y() const { return y_.read(); }

  // No byte beside y and the workspace was written, and x is as it was.
  void expect_intact() const {
    y_.expect_intact("y");
    workspace_.expect_intact("workspace");
    x_.expect_intact("x");
    if (x_.read() != problem_.x.bytes) fail("x was changed");
  }
  const Buffer& x() const { return x_; }
  void* y() const { return y_.get(); }
  const Buffer& workspace() const { return workspace_; }

 private:
  const octolora_linear* linear_;
  const octolora_slots* slots_;
  const Problem& problem_;
  octolora_device* device_;
  Buffer x_, y_, workspace_;
};

}  // namespace test
