// SPDX-License-Identifier: Apache-2.0
//
// The int8 GEMM of the CPU backend beside oneDNN's, on the same processor, threads and instruction set, in one process,
// call by call in turn.
//
//   onednn_compare [--shape MxNxK] [--threads T] [--isa avx512-vnni|avx2] [--repeats R] [--clock wall|thread]
//
// --clock thread counts the processor time of the calling thread, which other load on the machine does not lengthen; it
// is for one thread.
//
// oneDNN multiplies codes that somebody else has made: s8 x s8 -> s32, weights packed beforehand in the layout it asks
// for. Ours is timed twice: "sums" (quantize x and give the int32 sums) and "forward" (bf16 in, bf16 out: quantize,
// multiply, scale, round). Both do strictly more than what oneDNN is timed for. The sums are compared with oneDNN's
// before anything is timed; without VNNI oneDNN may add pairs of products in saturating 16 bits, so the codes of the
// comparison are small enough (|w| <= 63) that neither can go wrong.
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <oneapi/dnnl/dnnl.hpp>
#include <string>
#include <unordered_map>

#include "bench_support.h"

extern "C" void omp_set_num_threads(int threads);

namespace octolora::bench {
namespace {

struct Options {
  int m = 512, n = 3072, k = 3072, threads = 0, repeats = 31;
  std::string isa = "avx512-vnni";
  bool thread_clock = false;
};

double thread_us() {
  timespec time{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) * 1e6 + static_cast<double>(time.tv_nsec) * 1e-3;
}

Options parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; i += 2) {
    const std::string name = argv[i];
    if (i + 1 == argc) throw std::invalid_argument(name + " needs a value");
    const std::string value = argv[i + 1];
    if (name == "--shape") {
      if (std::sscanf(value.c_str(), "%dx%dx%d", &options.m, &options.n, &options.k) != 3)
        throw std::invalid_argument("--shape " + value + ", expected MxNxK");
    } else if (name == "--threads") {
      options.threads = std::stoi(value);
    } else if (name == "--isa") {
      options.isa = value;
    } else if (name == "--clock") {
      if (value != "wall" && value != "thread")
        throw std::invalid_argument("--clock " + value + ", expected wall or thread");
      options.thread_clock = value == "thread";
    } else if (name == "--repeats") {
      options.repeats = std::max(1, std::stoi(value));
    } else {
      throw std::invalid_argument("unknown option " + name);
    }
  }
  return options;
}

int run(const Options& o) {
  const bool avx2 = o.isa == "avx2";
  if (!avx2 && o.isa != "avx512-vnni") throw std::invalid_argument("--isa " + o.isa + ", expected avx512-vnni or avx2");
  setenv("OCTOLORA_CPU_ISA", o.isa.c_str(), 1);
  if (dnnl::set_max_cpu_isa(avx2 ? dnnl::cpu_isa::avx2 : dnnl::cpu_isa::avx512_core_vnni) != dnnl::status::success)
    throw std::runtime_error("oneDNN refused the instruction set " + o.isa);

  const Handle<octolora_device> device = open_device(OCTOLORA_CPU);
  if (o.threads > 0) OCTOLORA_CHECK(octolora_device_set_threads(device.get(), o.threads));
  octolora_device_info info{};
  info.struct_size = sizeof info;
  OCTOLORA_CHECK(octolora_device_get_info(device.get(), &info));
  if (o.isa != info.kernels) throw std::runtime_error("this processor offers " + std::string(info.kernels) + " only");
  if (o.thread_clock && info.units != 1) {
    throw std::invalid_argument("--clock thread needs --threads 1, not " + std::to_string(info.units));
  }
  omp_set_num_threads(info.units);

  // ---- Ours
  const size_t m = static_cast<size_t>(o.m), n = static_cast<size_t>(o.n), k = static_cast<size_t>(o.k);
  std::vector<int8_t> weights = normal_weights(n * k, 1);
  for (int8_t& w : weights) w = static_cast<int8_t>(w / 2);
  const std::vector<float> scale(n, 0.01f);
  octolora_linear_desc desc{};
  desc.struct_size = sizeof desc;
  desc.n = o.n;
  desc.k = o.k;
  desc.mode = OCTOLORA_W8A8_DYNAMIC;
  desc.scale_count = o.n;
  desc.weight = weights.data();
  desc.scale = scale.data();
  octolora_linear* made = nullptr;
  OCTOLORA_CHECK(octolora_linear_create(device.get(), &desc, &made));
  const Handle<octolora_linear> linear(made);
  const std::vector<char> x = normal_data(m * k, OCTOLORA_BFLOAT16, 2);
  size_t workspace_bytes = 0;
  OCTOLORA_CHECK(octolora_linear_workspace(made, nullptr, o.m, OCTOLORA_BFLOAT16, &workspace_bytes));
  const DeviceMemory workspace(device.get(), workspace_bytes), y(device.get(), m * n * 2);
  std::vector<int32_t> sums(m * n);
  std::vector<int8_t> codes(m * k);
  std::vector<float> row_scale(m);
  auto our_sums = [&] {
    OCTOLORA_CHECK(octolora_linear_quantized(made, x.data(), OCTOLORA_BFLOAT16, sums.data(), codes.data(),
                                             row_scale.data(), o.m, workspace.get(), workspace_bytes, nullptr));
  };
  auto our_forward = [&] {
    OCTOLORA_CHECK(octolora_linear_forward(made, nullptr, x.data(), OCTOLORA_BFLOAT16, y.get(), OCTOLORA_BFLOAT16, o.m,
                                           workspace.get(), workspace_bytes, nullptr));
  };
  our_sums();

  // ---- oneDNN: W [n,k] is its [k,n] matrix read column by column
  using dnnl::memory;
  const dnnl::engine engine(dnnl::engine::kind::cpu, 0);
  dnnl::stream stream(engine);
  const memory::desc source({o.m, o.k}, memory::data_type::s8, memory::format_tag::ab);
  const memory::desc plain({o.k, o.n}, memory::data_type::s8, memory::format_tag::ba);
  const memory::desc any({o.k, o.n}, memory::data_type::s8, memory::format_tag::any);
  const memory::desc result({o.m, o.n}, memory::data_type::s32, memory::format_tag::ab);
  const dnnl::matmul::primitive_desc how(dnnl::matmul::desc(source, any, result), engine);
  const dnnl::matmul matmul(how);
  memory packed(how.weights_desc(), engine), plain_weights(plain, engine, weights.data());
  dnnl::reorder(plain_weights, packed).execute(stream, plain_weights, packed);
  std::vector<int32_t> their_sums(m * n);
  memory source_memory(source, engine, codes.data()), result_memory(result, engine, their_sums.data());
  const std::unordered_map<int, memory> arguments = {
      {DNNL_ARG_SRC, source_memory}, {DNNL_ARG_WEIGHTS, packed}, {DNNL_ARG_DST, result_memory}};
  auto theirs = [&] {
    matmul.execute(stream, arguments);
    stream.wait();
  };
  theirs();
  for (size_t i = 0; i < sums.size(); ++i) {
    if (sums[i] != their_sums[i]) {
      std::fprintf(stderr, "sums[%zu,%zu]: ours %d, oneDNN %d\n", i / n, i % n, sums[i], their_sums[i]);
      return 1;
    }
  }

  // ---- In turn, so that a change of clock or of other load meets all three
  std::vector<double> sums_us, forward_us, onednn_us;
  auto timed = [&](auto&& call, std::vector<double>& to) {
    const double begin = o.thread_clock ? thread_us() : now_us();
    call();
    to.push_back((o.thread_clock ? thread_us() : now_us()) - begin);
  };
  for (int i = 0; i < o.repeats; ++i) {
    timed(theirs, onednn_us);
    timed(our_sums, sums_us);
    timed(our_forward, forward_us);
  }
  const dnnl_version_t& version = *dnnl::version();
  std::printf("%s, %d threads, %s; oneDNN %d.%d.%d, %s; M=%d N=%d K=%d, median of %d, %s time\n", info.name, info.units,
              info.kernels, version.major, version.minor, version.patch, how.impl_info_str(), o.m, o.n, o.k, o.repeats,
              o.thread_clock ? "processor" : "wall");
  const double operations = 2.0 * o.m * o.n * o.k, reference = median(onednn_us);
  auto line = [&](const char* what, const std::vector<double>& times) {
    const double us = median(times), fastest = *std::min_element(times.begin(), times.end());
    std::printf("%-44s %10.0f us (fastest %.0f)  %7.3f TOPS  %5.2f x oneDNN's speed\n", what, us, fastest,
                operations / us / 1e6, reference / us);
  };
  line("oneDNN   s8 x s8 -> s32", onednn_us);
  line("octolora quantize + s8 x s8 -> s32", sums_us);
  line("octolora forward, bf16 -> bf16", forward_us);
  return 0;
}

}  // namespace
}  // namespace octolora::bench

int main(int argc, char** argv) {
  try {
    return octolora::bench::run(octolora::bench::parse(argc, argv));
  } catch (const std::exception& failure) {
    std::fprintf(stderr, "onednn_compare: %s\n", failure.what());
    return 2;
  }
}
