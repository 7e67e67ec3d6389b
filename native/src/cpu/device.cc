// SPDX-License-Identifier: Apache-2.0
#include <cstdio>
#include <cstring>
#include <new>

#if defined(OCTOLORA_CPU_X86)
#include <cpuid.h>
#endif

#include "linear.h"

namespace octolora::cpu {

namespace {

void processor_name(char (&name)[sizeof(octolora_device_info::name)]) {
  name[0] = '\0';
#if defined(OCTOLORA_CPU_X86)
  // Leaves 0x80000002 to 0x80000004 hold 48 characters, padded with blanks or zeros.
  char brand[49] = {};
  unsigned words[4];
  for (unsigned leaf = 0; leaf < 3; ++leaf) {
    if (__get_cpuid(0x80000002u + leaf, &words[0], &words[1], &words[2], &words[3]) == 0) break;
    std::memcpy(brand + 16 * leaf, words, 16);
  }
  const char* begin = brand + std::strspn(brand, " ");
  size_t length = std::strlen(begin);
  while (length > 0 && begin[length - 1] == ' ') --length;
  std::snprintf(name, sizeof name, "%.*s", static_cast<int>(length), begin);
#endif
  if (name[0] == '\0') std::snprintf(name, sizeof name, "CPU");
}

// Everything is done when a call returns, so streams are always null and there is nothing to wait for.
class CpuDevice final : public Device {
 public:
  CpuDevice() : context_(new Context{choose_kernels(), ThreadPool(default_threads())}) {}

  void info(octolora_device_info& info) const override {
    info.ordinal = OCTOLORA_CPU;
    info.compute_capability = 0;
    info.units = context_->pool.threads();
    info.memory_bytes = machine_memory(false);
    processor_name(info.name);
    std::snprintf(info.kernels, sizeof info.kernels, "%s", context_->kernels.name);
  }
  void set_threads(int threads) override { context_->pool.resize(threads); }
  void* alloc(size_t bytes) override { return allocate(*context_, bytes, "octolora_device_alloc"); }
  void free(void* memory) override { release(*context_, memory); }
  void* host_alloc(size_t bytes) override {
    return ::operator new(bytes, std::align_val_t(kAlignment));  // std::bad_alloc is OCTOLORA_OUT_OF_MEMORY
  }
  void host_free(void* memory) override { ::operator delete(memory, std::align_val_t(kAlignment)); }
  void copy(void* to, const void* from, size_t bytes, octolora_stream) override {
    if (bytes > 0) std::memmove(to, from, bytes);
  }
  octolora_stream stream_create() override { return nullptr; }
  void stream_destroy(octolora_stream) override {}
  void stream_synchronize(octolora_stream) override {}
  void synchronize() override {}
  uint64_t in_use() const override { return context_->in_use.load(std::memory_order_relaxed); }
  void fill(const SlotFill* fills, int count, octolora_stream) override {
    for (int i = 0; i < count; ++i)
      static_cast<CpuSlots*>(fills[i].slots)->set(fills[i].slot, fills[i].adapter, fills[i].scale);
  }
  std::unique_ptr<Linear> create_linear(const LinearSpec& spec, const octolora_linear_desc& desc) override {
    return std::make_unique<CpuLinear>(context_, spec, desc);
  }
  size_t workspace(const ForwardArgs& args) const override { return forward_workspace(args); }
  void forward(const ForwardArgs& args) const override { cpu::forward(args); }
  void explain(const ForwardArgs& args, Explanation& to) const override { cpu::explain(args, to); }

 private:
  const std::shared_ptr<Context> context_;
};

}  // namespace

}  // namespace octolora::cpu

namespace octolora {
std::shared_ptr<Device> make_cpu_device() { return std::make_shared<cpu::CpuDevice>(); }
}  // namespace octolora
