// SPDX-License-Identifier: Apache-2.0
//
// What both benchmarks need: the C ABI with errors as exceptions, owners of its handles, data, medians.
#pragma once

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "octolora/octolora.h"

namespace octolora::bench {

inline void check(octolora_status status, const char* call) {
  if (status == OCTOLORA_OK) return;
  throw std::runtime_error(std::string(call) + ": " + octolora_status_name(status) + ": " + octolora_last_error());
}
#define OCTOLORA_CHECK(call) ::octolora::bench::check((call), #call)

struct Destroy {
  void operator()(octolora_device* device) const { octolora_device_destroy(device); }
  void operator()(octolora_linear* linear) const { octolora_linear_destroy(linear); }
  void operator()(octolora_slots* slots) const { octolora_slots_destroy(slots); }
};
template <class T>
using Handle = std::unique_ptr<T, Destroy>;

inline Handle<octolora_device> open_device(int32_t ordinal) {
  octolora_device* device = nullptr;
  OCTOLORA_CHECK(octolora_device_create(ordinal, &device));
  return Handle<octolora_device>(device);
}

class DeviceMemory {
 public:
  DeviceMemory(octolora_device* device, size_t bytes) : device_(device) {
    OCTOLORA_CHECK(octolora_device_alloc(device, bytes, &memory_));
  }
  DeviceMemory(DeviceMemory&& other) noexcept
      : device_(other.device_), memory_(std::exchange(other.memory_, nullptr)) {}
  DeviceMemory& operator=(DeviceMemory&&) = delete;
  ~DeviceMemory() {
    if (memory_ != nullptr) octolora_device_free(device_, memory_);
  }
  void* get() const { return memory_; }

 private:
  octolora_device* device_;
  void* memory_ = nullptr;
};

inline size_t element_size(int32_t type) { return type == OCTOLORA_FLOAT32 ? 4 : 2; }

// Normal numbers of deviation 1, as elements of a 16- or 32-bit type. They repeat after 2^18 + 3 elements, which no row
// length divides: enough entropy for the clocks, and quick to make.
inline std::vector<char> normal_data(size_t count, int32_t type, unsigned seed, float deviation = 1.f) {
  constexpr size_t kPeriod = (size_t{1} << 18) + 3;
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.f, deviation);
  const size_t size = element_size(type), fresh = std::min(count, kPeriod);
  std::vector<char> data(count * size);
  for (size_t i = 0; i < fresh; ++i) {
    const float value = normal(random);
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if (type == OCTOLORA_FLOAT32) {
      std::memcpy(&data[i * size], &bits, 4);
      continue;
    }
    // Truncation is as good as rounding here. Numbers below the smallest normal fp16 become zero.
    const uint32_t exponent = (bits >> 23) & 255u;
    const uint32_t half =
        (bits >> 16 & 0x8000u) | (exponent < 113 ? 0u : (exponent - 112u) << 10 | (bits >> 13 & 0x3ffu));
    const uint16_t element = static_cast<uint16_t>(type == OCTOLORA_FLOAT16 ? half : bits >> 16);
    std::memcpy(&data[i * size], &element, 2);
  }
  for (size_t done = fresh * size; done < data.size(); done += fresh * size)
    std::memcpy(&data[done], data.data(), std::min(fresh * size, data.size() - done));
  return data;
}

// int8 weights as a quantizer makes them: normal, with the row's largest of about four deviations at 127.
inline std::vector<int8_t> normal_weights(size_t count, unsigned seed) {
  constexpr size_t kPeriod = (size_t{1} << 18) + 3;
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.f, 127.f / 4.f);
  std::vector<int8_t> data(count);
  for (size_t i = 0; i < std::min(count, kPeriod); ++i)
    data[i] = static_cast<int8_t>(std::lrint(std::clamp(normal(random), -127.f, 127.f)));
  for (size_t i = kPeriod; i < count; ++i) data[i] = data[i - kPeriod];
  return data;
}

inline double now_us() {
  return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

inline double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const size_t half = values.size() / 2;
  return values.size() % 2 != 0 ? values[half] : (values[half - 1] + values[half]) / 2;
}

}  // namespace octolora::bench
