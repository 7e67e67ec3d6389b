// SPDX-License-Identifier: Apache-2.0
//
// Time to swap the adapter of a whole model: FLUX.1-dev's 504 linear layers, each with one slot, on a CUDA device.
//
// A swap is octolora_slots_set_many of all layers, or octolora_slots_set of one behind the other, from an idle stream
// to an idle stream. It stands beside two ways to copy the same bytes from the same memory to the device: as one piece,
// and factor by factor. Every round swaps to another of several adapters, normal random numbers in memory that nothing
// has read since.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "bench_support.h"

namespace octolora::bench {
namespace {

constexpr const char* kUsage = "swap_bench [--device N] [--rank R] [--rounds N]\n";

struct Layers {
  int n, k, count;
};
const std::vector<Layers> kFlux = {
    {3072, 64, 1},     {3072, 4096, 1},   {3072, 256, 2},    {3072, 3072, 3},   {3072, 768, 1},
    {18432, 3072, 38}, {3072, 3072, 152}, {12288, 3072, 38}, {3072, 12288, 38}, {9216, 3072, 38},
    {3072, 3072, 114}, {12288, 3072, 38}, {3072, 15360, 38}, {6144, 3072, 1},   {64, 3072, 1},
};

enum class Memory { pinned, pageable, device };

// One adapter of all layers, its factors behind each other.
class Adapter {
 public:
  Adapter(octolora_device* device, Memory kind, const std::vector<char>& data) : device_(device), kind_(kind) {
    if (kind == Memory::pinned) {
      OCTOLORA_CHECK(octolora_host_alloc(device, data.size(), &memory_));
      std::memcpy(memory_, data.data(), data.size());
    } else if (kind == Memory::device) {
      OCTOLORA_CHECK(octolora_device_alloc(device, data.size(), &memory_));
      OCTOLORA_CHECK(octolora_device_copy(device, memory_, data.data(), data.size(), nullptr));
      OCTOLORA_CHECK(octolora_stream_synchronize(device, nullptr));
    } else {
      memory_ = std::malloc(data.size());
      if (memory_ == nullptr) throw std::bad_alloc();
      std::memcpy(memory_, data.data(), data.size());
    }
  }
  ~Adapter() {
    if (kind_ == Memory::pinned) octolora_host_free(device_, memory_);
    if (kind_ == Memory::device) octolora_device_free(device_, memory_);
    if (kind_ == Memory::pageable) std::free(memory_);
  }
  Adapter(const Adapter&) = delete;
  Adapter& operator=(const Adapter&) = delete;
  const char* at(size_t offset) const { return static_cast<const char*>(memory_) + offset; }

 private:
  octolora_device* device_;
  Memory kind_;
  void* memory_ = nullptr;
};

struct Layer {
  int n, k;
  Handle<octolora_linear> linear;
  Handle<octolora_slots> slots;
};

void run(int ordinal, int rank, int rounds) {
  constexpr int kAdapters = 3;
  const Handle<octolora_device> device = open_device(ordinal);
  octolora_device_info info{};
  info.struct_size = sizeof info;
  OCTOLORA_CHECK(octolora_device_get_info(device.get(), &info));
  octolora_stream stream = nullptr;
  OCTOLORA_CHECK(octolora_stream_create(device.get(), &stream));

  std::vector<Layer> layers;
  size_t elements = 0;
  for (const Layers& kind : kFlux) {
    const std::vector<float> scale(static_cast<size_t>(kind.n), 0.01f);
    octolora_linear_desc desc{};
    desc.struct_size = sizeof desc;
    desc.n = kind.n;
    desc.k = kind.k;
    desc.mode = OCTOLORA_W8A8_DYNAMIC;
    desc.scale_count = kind.n;
    desc.scale = scale.data();
    for (int i = 0; i < kind.count; ++i) {
      octolora_linear* linear = nullptr;
      OCTOLORA_CHECK(octolora_linear_create(device.get(), &desc, &linear));
      Handle<octolora_linear> owner(linear);
      octolora_slots* slots = nullptr;
      OCTOLORA_CHECK(octolora_slots_create(linear, 1, &rank, OCTOLORA_LORA_16BIT, &slots));
      layers.push_back({kind.n, kind.k, std::move(owner), Handle<octolora_slots>(slots)});
      elements += static_cast<size_t>(rank) * (static_cast<size_t>(kind.n) + static_cast<size_t>(kind.k));
    }
  }
  uint64_t in_use = 0;
  OCTOLORA_CHECK(octolora_device_memory_in_use(device.get(), &in_use));
  std::printf("%s, octolora %s: %zu layers, rank %d, %.1f million numbers; %.2f GB in use\n", info.name,
              octolora_version(), layers.size(), rank, static_cast<double>(elements) * 1e-6,
              static_cast<double>(in_use) * 1e-9);
  std::printf("%-9s %-5s %8s %12s %12s %12s %12s %12s %12s %8s\n", "memory", "type", "MB", "one copy ms", "copies ms",
              "singles ms", "enqueue ms", "swap ms", "enqueue ms", "of copy");

  const struct {
    Memory kind;
    const char* name;
  } memories[] = {{Memory::pinned, "pinned"}, {Memory::pageable, "pageable"}, {Memory::device, "device"}};
  const struct {
    int32_t type;
    const char* name;
  } types[] = {{OCTOLORA_BFLOAT16, "bf16"}, {OCTOLORA_FLOAT32, "fp32"}};
  for (const auto& memory : memories) {
    for (const auto& type : types) {
      const size_t element = element_size(type.type), bytes = elements * element;
      std::vector<std::unique_ptr<Adapter>> adapters;
      for (int i = 0; i < kAdapters; ++i) {
        adapters.push_back(std::make_unique<Adapter>(
            device.get(), memory.kind, normal_data(elements, type.type, static_cast<unsigned>(i) + 1, 0.02f)));
      }
      const DeviceMemory target(device.get(), bytes);
      const auto timed = [&](auto&& enqueue, double* enqueued) {
        std::vector<double> times, host;
        for (int round = 0; round < rounds + 2; ++round) {
          const Adapter& adapter = *adapters[static_cast<size_t>(round) % kAdapters];
          OCTOLORA_CHECK(octolora_stream_synchronize(device.get(), stream));
          const double begin = now_us();
          enqueue(adapter);
          const double returned = now_us();
          OCTOLORA_CHECK(octolora_stream_synchronize(device.get(), stream));
          if (round < 2) continue;  // the first touch of everything
          times.push_back(now_us() - begin);
          host.push_back(returned - begin);
        }
        if (enqueued != nullptr) *enqueued = median(host) * 1e-3;
        return median(times) * 1e-3;
      };
      const auto each_factor = [&](auto&& visit) {
        size_t offset = 0;
        for (const Layer& layer : layers) {
          const size_t a = static_cast<size_t>(rank) * static_cast<size_t>(layer.k) * element;
          const size_t b = static_cast<size_t>(rank) * static_cast<size_t>(layer.n) * element;
          visit(layer, offset, a, b);
          offset += a + b;
        }
      };
      const double one = timed(
          [&](const Adapter& adapter) {
            OCTOLORA_CHECK(octolora_device_copy(device.get(), target.get(), adapter.at(0), bytes, stream));
          },
          nullptr);
      const double many = timed(
          [&](const Adapter& adapter) {
            each_factor([&](const Layer&, size_t offset, size_t a, size_t b) {
              char* const to = static_cast<char*>(target.get()) + offset;
              OCTOLORA_CHECK(octolora_device_copy(device.get(), to, adapter.at(offset), a, stream));
              OCTOLORA_CHECK(octolora_device_copy(device.get(), to + a, adapter.at(offset + a), b, stream));
            });
          },
          nullptr);
      std::vector<octolora_adapter_desc> descs(layers.size());
      std::vector<octolora_slot_fill> fills(layers.size());
      const auto describe = [&](const Adapter& adapter) {
        size_t i = 0;
        each_factor([&](const Layer& layer, size_t offset, size_t a, size_t) {
          octolora_adapter_desc& desc = descs[i];
          desc.struct_size = sizeof desc;
          desc.rank = rank;
          desc.a_dtype = desc.b_dtype = type.type;
          desc.a = adapter.at(offset);
          desc.b = adapter.at(offset + a);
          fills[i] = {sizeof fills[i], 0, layer.slots.get(), &desc, 1.f};
          ++i;
        });
      };
      double singles_enqueued = 0, enqueued = 0;
      const double singles = timed(
          [&](const Adapter& adapter) {
            describe(adapter);
            for (const octolora_slot_fill& fill : fills)
              OCTOLORA_CHECK(octolora_slots_set(fill.slots, fill.slot, fill.adapter, fill.scale, stream));
          },
          &singles_enqueued);
      const double swap = timed(
          [&](const Adapter& adapter) {
            describe(adapter);
            OCTOLORA_CHECK(octolora_slots_set_many(fills.data(), static_cast<int32_t>(fills.size()), stream));
          },
          &enqueued);
      std::printf("%-9s %-5s %8.1f %12.3f %12.3f %12.3f %12.3f %12.3f %12.3f %8.2f\n", memory.name, type.name,
                  static_cast<double>(bytes) * 1e-6, one, many, singles, singles_enqueued, swap, enqueued, swap / one);
      std::fflush(stdout);
    }
  }
  OCTOLORA_CHECK(octolora_stream_destroy(device.get(), stream));
}

}  // namespace
}  // namespace octolora::bench

int main(int argc, char** argv) {
  int ordinal = 0, rank = 16, rounds = 9;
  for (int i = 1; i < argc; i += 2) {
    const std::string name = argv[i];
    const int value = i + 1 < argc ? std::atoi(argv[i + 1]) : -1;
    if (name == "--device" && value >= 0) {
      ordinal = value;
    } else if (name == "--rank" && value > 0) {
      rank = value;
    } else if (name == "--rounds" && value > 0) {
      rounds = value;
    } else {
      std::fputs(octolora::bench::kUsage, stderr);
      return 2;
    }
  }
  try {
    octolora::bench::run(ordinal, rank, rounds);
    return 0;
  } catch (const std::exception& failure) {
    std::fprintf(stderr, "swap_bench: %s\n", failure.what());
    return 2;
  }
}
