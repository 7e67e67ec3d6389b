// SPDX-License-Identifier: Apache-2.0
#include "memory.h"

#include <cstdlib>
#include <new>

#if defined(__linux__)
#include <sys/sysinfo.h>
#endif

namespace octolora::cpu {

namespace {
// Stands in front of every allocation, and is as long as the alignment.
struct Header {
  uint64_t bytes;
};
static_assert(sizeof(Header) <= kAlignment);
}  // namespace

uint64_t machine_memory(bool with_swap) {
#if defined(__linux__)
  struct sysinfo info {};
  if (::sysinfo(&info) == 0)
    return (static_cast<uint64_t>(info.totalram) + (with_swap ? info.totalswap : 0)) * info.mem_unit;
#endif
  static_cast<void>(with_swap);
  return 0;
}

void* allocate(Context& context, uint64_t bytes, const char* what) {
  // An allocator that overcommits would grant more than the machine has, and the process would die on first use.
  const uint64_t machine = machine_memory(true);
  const uint64_t limit = machine != 0 ? machine : static_cast<uint64_t>(PTRDIFF_MAX) - kAlignment;
  void* block = nullptr;
  if (bytes <= limit) {
    block = ::operator new (static_cast<size_t>(bytes) + kAlignment, std::align_val_t{kAlignment}, std::nothrow);
  }
  if (block == nullptr) {
    throw Error(OCTOLORA_OUT_OF_MEMORY,
                "%s: no %llu bytes of host memory (%llu in use by this device, the machine has %llu)", what,
                static_cast<unsigned long long>(bytes),
                static_cast<unsigned long long>(context.in_use.load(std::memory_order_relaxed)),
                static_cast<unsigned long long>(machine));
  }
  static_cast<Header*>(block)->bytes = bytes;
  context.in_use.fetch_add(bytes, std::memory_order_relaxed);
  return static_cast<char*>(block) + kAlignment;
}

void release(Context& context, void* memory) noexcept {
  if (memory == nullptr) return;
  void* block = static_cast<char*>(memory) - kAlignment;
  context.in_use.fetch_sub(static_cast<Header*>(block)->bytes, std::memory_order_relaxed);
  ::operator delete (block, std::align_val_t{kAlignment});
}

}  // namespace octolora::cpu
