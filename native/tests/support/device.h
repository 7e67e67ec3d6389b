// SPDX-License-Identifier: Apache-2.0
//
// The C handles with an owner, and device memory whose surroundings are watched. A status that is not OCTOLORA_OK
// throws.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>
#include <type_traits>
#include <vector>

#include "harness.h"
#include "octolora/octolora.h"

namespace test {

inline void check(octolora_status status, const char* what) {
  if (status != OCTOLORA_OK) fail("%s: %s: %s", what, octolora_status_name(status), octolora_last_error());
}
#define CHECK_OK(call) ::test::check((call), #call)

template <class Handle, void (*destroy)(Handle*)>
using Owned = std::unique_ptr<Handle, std::integral_constant<void (*)(Handle*), destroy>>;
using Linear = Owned<octolora_linear, octolora_linear_destroy>;
using Slots = Owned<octolora_slots, octolora_slots_destroy>;
using Device = Owned<octolora_device, octolora_device_destroy>;

inline Device open_device(int ordinal) {
  octolora_device* device = nullptr;
  CHECK_OK(octolora_device_create(ordinal, &device));
  return Device(device);
}

inline uint64_t memory_in_use(const octolora_device* device) {
  uint64_t bytes = 0;
  CHECK_OK(octolora_device_memory_in_use(device, &bytes));
  return bytes;
}

// Device memory with a strip of known bytes on either side. The strips are NaN in every float format, so that a kernel
// that reads past an end and uses what it read shows it in its result; one that writes past an end is found by
// intact(). Under AddressSanitizer memory of the CPU device is cut to size instead, so that any access outside stops
// the program.
class Buffer {
 public:
  static constexpr size_t kStrip = 512;  // keeps the 256-byte alignment of octolora_device_alloc
  static constexpr uint8_t kFill = 0xff;

  // offset: bytes by which the memory misses a 256-byte boundary.
  Buffer(octolora_device* device, bool cuda, size_t bytes, size_t offset = 0)
      : device_(device), bytes_(bytes), offset_(offset) {
#if defined(__SANITIZE_ADDRESS__)
    exact_ = !cuda;
#else
    (void)cuda;
#endif
    if (exact_) {
      host_.reset(new (std::align_val_t(256)) uint8_t[bytes + offset]);
      base_ = host_.get();
    } else {
      CHECK_OK(octolora_device_alloc(device_, total(), &memory_));
      base_ = static_cast<uint8_t*>(memory_) + kStrip;
    }
    clear();
  }
  ~Buffer() {
    if (memory_) octolora_device_free(device_, memory_);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  void* get() const { return base_ + offset_; }
  size_t bytes() const { return bytes_; }

  // Every byte, strips included, becomes kFill.
  void clear() {
    if (exact_) {
      std::vector<uint8_t> fill(bytes_ + offset_, kFill);
      if (!fill.empty()) std::copy(fill.begin(), fill.end(), base_);
    } else {
      const std::vector<uint8_t> fill(total(), kFill);
      copy(memory_, fill.data(), fill.size());
    }
  }
  void write(const void* from) { copy(get(), from, bytes_); }
  std::vector<uint8_t> read() const {
    std::vector<uint8_t> bytes(bytes_);
    copy(bytes.data(), get(), bytes_);
    return bytes;
  }
  void expect_intact(const char* what) const {
    if (exact_) return;
    std::vector<uint8_t> all(total());
    copy(all.data(), memory_, all.size());
    const size_t begin = kStrip + offset_, end = begin + bytes_;
    for (size_t i = 0; i < all.size(); ++i) {
      if (all[i] != kFill && (i < begin || i >= end)) {
        fail("%s of %zu bytes: byte %lld was written, which is outside", what, bytes_,
             static_cast<long long>(i) - static_cast<long long>(begin));
      }
    }
  }

 private:
  struct Release {
    void operator()(uint8_t* p) const { ::operator delete[](p, std::align_val_t(256)); }
  };
  size_t total() const { return kStrip + offset_ + bytes_ + kStrip; }
  void copy(void* to, const void* from, size_t bytes) const {
    CHECK_OK(octolora_device_copy(device_, to, from, bytes, nullptr));
    CHECK_OK(octolora_stream_synchronize(device_, nullptr));
  }

  octolora_device* device_;
  size_t bytes_, offset_;
  bool exact_ = false;
  void* memory_ = nullptr;
  std::unique_ptr<uint8_t[], Release> host_;
  uint8_t* base_ = nullptr;
};

}  // namespace test
