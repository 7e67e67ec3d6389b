// SPDX-License-Identifier: Apache-2.0
//
// What a CPU device, its linears and its slots share; and host memory that the device counts as its own.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <utility>

#include "kernels.h"
#include "thread_pool.h"

namespace octolora::cpu {

constexpr size_t kAlignment = 256;

struct Context {
  const Kernels& kernels;
  ThreadPool pool;
  std::atomic<uint64_t> in_use{0};  // bytes in live allocations
};

// 256-byte aligned, counted by the context. what: for the message, "the weights [n,k]" and so on.
void* allocate(Context& context, uint64_t bytes, const char* what);
void release(Context& context, void* memory) noexcept;
// Memory of the machine, swap included; 0 when unknown.
uint64_t machine_memory(bool with_swap);

// A zeroed array that gives itself back.
template <class T>
class Array {
 public:
  Array() = default;
  Array(const std::shared_ptr<Context>& context, uint64_t count, const char* what);
  Array(Array&& other) noexcept : context_(std::move(other.context_)), data_(std::exchange(other.data_, nullptr)) {}
  Array& operator=(Array&& other) noexcept {
    std::swap(context_, other.context_);
    std::swap(data_, other.data_);
    return *this;
  }
  ~Array() {
    if (data_ != nullptr) release(*context_, data_);
  }
  T* data() { return data_; }
  const T* data() const { return data_; }

 private:
  std::shared_ptr<Context> context_;
  T* data_ = nullptr;
};

template <class T>
Array<T>::Array(const std::shared_ptr<Context>& context, uint64_t count, const char* what) : context_(context) {
  uint64_t bytes;
  if (__builtin_mul_overflow(count, uint64_t{sizeof(T)}, &bytes)) bytes = UINT64_MAX;
  data_ = static_cast<T*>(allocate(*context, bytes, what));
  std::memset(data_, 0, static_cast<size_t>(bytes));
}

}  // namespace octolora::cpu
