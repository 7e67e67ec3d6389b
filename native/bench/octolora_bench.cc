// SPDX-License-Identifier: Apache-2.0
//
// Time of a forward, shape by shape: quantize + int8 product + adapter + store, from x on the device to y on the
// device.
//
// Calls are enqueued one behind the other in batches of at least 20 ms, and a batch is timed from an idle stream to an
// idle stream, so the time of a launch counts where it is not hidden. Every call of a batch uses the next of several
// sets of (weights, adapter, x, y), which together exceed any cache. The data are normal random numbers.
//
//   floor = max(int8 operations / peak + adapter operations / (peak / 2), bytes / bandwidth)
//   bytes = W + x + y + residual + A + B once each, A and B in 16 bits on CUDA and fp32 on the CPU
//
// The peaks are those of --tops and --gbs; else the data sheet's of the H100 and H200 (SXM): 1979 TOPS int8, half of it
// in 16 bits, 3350 and 4800 GB/s. On other devices, and on the CPU, no floor is printed unless both are given.
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <numeric>
#include <optional>

#include "bench_support.h"

namespace octolora::bench {
namespace {

constexpr const char* kUsage =
    R"(octolora_bench [options]
  --device cpu|cuda:N              default cuda:0 where CUDA is there, else cpu
  --shape MxNxK                    instead of the list; may be repeated. MxN+N+NxK: outputs of one call, of these N
  --after gelu_tanh|gelu_erf|silu|gate|residual
                                   what follows in every output; may be repeated
  --rank R                         one adapter of this rank in every layer; 0, the default, is none; may be repeated
  --mode w8a8|w8a16|outlier        default w8a8 (dynamic); outlier: threshold 6, with 6 columns above it
  --x bf16|fp16|f32                type of x and y; default bf16
  --tops T --gbs B                 peak int8 TOPS (16-bit TFLOP/s for w8a16) and GB/s of the floor
  --threads T                      of the CPU device
  --csv FILE                       the table as comma-separated values
  --explain                        below each line, how the call runs
  --quick                          four shapes, fewer repeats
)";

struct Shape {
  int m;
  std::vector<int> n;  // of each output
  int k;

  int total_n() const { return std::accumulate(n.begin(), n.end(), 0); }
  std::string n_text() const {
    std::string text;
    for (const int one : n) text += (text.empty() ? "" : "+") + std::to_string(one);
    return text;
  }
};

// Diffusion transformers and language models: prefill, then decode.
const std::vector<Shape> kShapes = {
    {4608, {3072}, 3072},  {4608, {9216}, 3072}, {4608, {12288}, 3072}, {4608, {21504}, 3072}, {4608, {3072}, 12288},
    {4608, {3072}, 15360}, {2048, {4096}, 4096}, {2048, {14336}, 4096}, {2048, {4096}, 14336}, {4096, {28672}, 8192},
    {1, {4096}, 4096},     {1, {14336}, 4096},   {1, {28672}, 8192},    {1, {8192}, 28672},    {4, {4096}, 4096},
    {4, {14336}, 4096},    {4, {28672}, 8192},   {4, {8192}, 28672},    {16, {4096}, 4096},    {16, {14336}, 4096},
    {16, {28672}, 8192},   {16, {8192}, 28672},  {32, {4096}, 4096},    {32, {14336}, 4096},   {32, {28672}, 8192},
    {32, {8192}, 28672},   {64, {4096}, 4096},   {64, {14336}, 4096},   {64, {28672}, 8192},   {64, {8192}, 28672}};
const std::vector<Shape> kQuickShapes = {
    {512, {3072}, 3072}, {4608, {3072}, 3072}, {1, {4096}, 4096}, {16, {14336}, 4096}};

enum class Kind { w8a8, w8a16, outlier };

struct Options {
  std::optional<int32_t> device;
  std::vector<Shape> shapes;
  std::vector<int> ranks;
  Kind kind = Kind::w8a8;
  std::string mode_name = "w8a8", x_name = "bf16", csv;
  int32_t x_type = OCTOLORA_BFLOAT16;
  int32_t activation = OCTOLORA_ACTIVATION_NONE;
  bool gate = false, residual = false;
  std::string after;  // all of it, for the table
  double tops = 0, gbs = 0;
  int threads = 0;
  bool explain = false, quick = false;
};

constexpr float kThreshold = 6.f;
constexpr int kOutlierColumns = 6;

[[noreturn]] void refuse(const std::string& message) { throw std::invalid_argument(message + "\n" + kUsage); }

double positive(const std::string& name, const std::string& text) {
  char* end = nullptr;
  const double value = std::strtod(text.c_str(), &end);
  if (text.empty() || *end != '\0' || !(value > 0)) refuse(name + " " + text + ", expected a positive number");
  return value;
}

int whole(const std::string& name, const std::string& text, int least) {
  char* end = nullptr;
  const long value = std::strtol(text.c_str(), &end, 10);
  if (text.empty() || *end != '\0' || value < least || value > INT32_MAX)
    refuse(name + " " + text + ", expected a whole number of at least " + std::to_string(least));
  return static_cast<int>(value);
}

Shape shape_of(const std::string& text) {
  Shape shape{};
  int at = 0, read = 0, n = 0;
  bool good = std::sscanf(text.c_str(), "%dx%n", &shape.m, &at) == 1 && at > 0;
  while (good && std::sscanf(text.c_str() + at, "%d%n", &n, &read) == 1) {
    good = n > 0;
    shape.n.push_back(n);
    at += read;
    if (text[static_cast<size_t>(at)] != '+') break;
    ++at;
  }
  read = 0;
  good = good && at > 0 && text[static_cast<size_t>(at) - 1] != '+' &&
         std::sscanf(text.c_str() + at, "x%d%n", &shape.k, &read) == 1;
  if (!good || text[static_cast<size_t>(at + read)] || shape.m < 1 || shape.k < 1 || shape.n.empty() ||
      shape.n.size() > OCTOLORA_MAX_OUTPUTS) {
    refuse("--shape " + text + ", expected MxNxK, or MxN+NxK with up to " + std::to_string(OCTOLORA_MAX_OUTPUTS) +
           " N");
  }
  return shape;
}

void add_after(Options& o, const std::string& value) {
  if (value == "gelu_tanh") {
    o.activation = OCTOLORA_ACTIVATION_GELU_TANH;
  } else if (value == "gelu_erf") {
    o.activation = OCTOLORA_ACTIVATION_GELU_ERF;
  } else if (value == "silu") {
    o.activation = OCTOLORA_ACTIVATION_SILU;
  } else if (value == "gate") {
    o.gate = true;
  } else if (value == "residual") {
    o.residual = true;
  } else {
    refuse("--after " + value + ", expected gelu_tanh, gelu_erf, silu, gate or residual");
  }
  o.after += (o.after.empty() ? "" : "+") + value;
}

Options parse(int argc, char** argv) {
  Options o;
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    if (name == "--quick") {
      o.quick = true;
      continue;
    }
    if (name == "--explain") {
      o.explain = true;
      continue;
    }
    if (name == "--help") {
      std::fputs(kUsage, stdout);
      std::exit(0);
    }
    if (i + 1 == argc) refuse(name + " is unknown or needs a value");
    const std::string value = argv[++i];
    if (name == "--device") {
      if (value != "cpu" && value.rfind("cuda:", 0) != 0) refuse("--device " + value + ", expected cpu or cuda:N");
      o.device = value == "cpu" ? OCTOLORA_CPU : whole("--device cuda:", value.substr(5), 0);
    } else if (name == "--shape") {
      o.shapes.push_back(shape_of(value));
    } else if (name == "--rank") {
      o.ranks.push_back(whole(name, value, 0));
    } else if (name == "--mode") {
      o.mode_name = value;
      if (value == "w8a8") {
        o.kind = Kind::w8a8;
      } else if (value == "w8a16") {
        o.kind = Kind::w8a16;
      } else if (value == "outlier") {
        o.kind = Kind::outlier;
      } else {
        refuse("--mode " + value + ", expected w8a8, w8a16 or outlier");
      }
    } else if (name == "--x") {
      o.x_name = value;
      if (value == "bf16") {
        o.x_type = OCTOLORA_BFLOAT16;
      } else if (value == "fp16") {
        o.x_type = OCTOLORA_FLOAT16;
      } else if (value == "f32") {
        o.x_type = OCTOLORA_FLOAT32;
      } else {
        refuse("--x " + value + ", expected bf16, fp16 or f32");
      }
    } else if (name == "--after") {
      add_after(o, value);
    } else if (name == "--tops") {
      o.tops = positive(name, value);
    } else if (name == "--gbs") {
      o.gbs = positive(name, value);
    } else if (name == "--threads") {
      o.threads = whole(name, value, 1);
    } else if (name == "--csv") {
      o.csv = value;
    } else {
      refuse("unknown option " + name);
    }
  }
  if (o.shapes.empty()) o.shapes = o.quick ? kQuickShapes : kShapes;
  if (o.ranks.empty()) o.ranks = {0};
  return o;
}

struct Member {
  Handle<octolora_linear> linear;
  Handle<octolora_slots> slots;
  DeviceMemory y, residual, gate;
};
struct Set {
  DeviceMemory x;
  std::vector<Member> members;
  std::vector<octolora_output> outputs;
};

class Stream {
 public:
  explicit Stream(octolora_device* device) : device_(device) {
    OCTOLORA_CHECK(octolora_stream_create(device, &stream_));
  }
  ~Stream() { octolora_stream_destroy(device_, stream_); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  octolora_stream get() const { return stream_; }
  void synchronize() const { OCTOLORA_CHECK(octolora_stream_synchronize(device_, stream_)); }

 private:
  octolora_device* device_;
  octolora_stream stream_ = nullptr;
};

struct Result {
  double us, fastest_us;
  size_t sets;
  std::string explanation;
};

Result measure(octolora_device* device, const Options& o, const Shape& s, int rank) {
  constexpr double kBatchUs = 20e3;
  constexpr size_t kBeyondCaches = size_t{256} << 20;
  const int repeats = o.quick ? 7 : 21;
  const size_t m = static_cast<size_t>(s.m), n = static_cast<size_t>(s.total_n()), k = static_cast<size_t>(s.k);
  const size_t r = static_cast<size_t>(rank), element = element_size(o.x_type);

  // One copy on the host serves every set.
  const std::vector<int8_t> weights = normal_weights(n * k, 1);
  std::vector<char> x = normal_data(m * k, o.x_type, 2);
  if (o.kind == Kind::outlier) {
    const uint32_t f32 = 0x41000000;  // 8.0
    const uint16_t bf16 = 0x4100, f16 = 0x4800;
    const void* eight = &f32;
    if (o.x_type == OCTOLORA_BFLOAT16) eight = &bf16;
    if (o.x_type == OCTOLORA_FLOAT16) eight = &f16;
    for (size_t row = 0; row < m; ++row)
      for (size_t i = 0; i < kOutlierColumns; ++i)
        std::memcpy(&x[(row * k + i * k / kOutlierColumns) * element], eight, element);
  }
  const std::vector<float> scale(n, 0.01f);
  const std::vector<char> a = normal_data(r * k, OCTOLORA_BFLOAT16, 3, 0.02f);
  const std::vector<char> b = normal_data(n * r, OCTOLORA_BFLOAT16, 4, 0.02f);
  const std::vector<char> residual = normal_data(o.residual ? m * n : 0, o.x_type, 5);
  const std::vector<char> gate = normal_data(o.gate ? n : 0, o.x_type, 6);

  octolora_linear_desc desc{};
  desc.struct_size = sizeof desc;
  desc.k = s.k;
  desc.mode = o.kind == Kind::w8a16 ? OCTOLORA_W8A16 : OCTOLORA_W8A8_DYNAMIC;
  desc.outlier_threshold = o.kind == Kind::outlier ? kThreshold : 0.f;
  desc.scale = scale.data();
  octolora_adapter_desc adapter{};
  adapter.struct_size = sizeof adapter;
  adapter.rank = rank;
  adapter.a_dtype = adapter.b_dtype = OCTOLORA_BFLOAT16;
  adapter.a = a.data();

  const Stream stream(device);
  const size_t set_bytes = n * k + (m * k + m * n) * element;
  const size_t count = std::max<size_t>(3, (kBeyondCaches + set_bytes - 1) / set_bytes);
  const auto on_device = [&](const std::vector<char>& from, size_t first, size_t bytes) {
    DeviceMemory memory(device, bytes);
    if (!from.empty()) OCTOLORA_CHECK(octolora_device_copy(device, memory.get(), &from[first], bytes, stream.get()));
    return memory;
  };
  std::vector<Set> sets;
  sets.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    Set set{on_device(x, 0, x.size()), {}, {}};
    size_t first = 0;  // of the output's channels among all
    for (const int own : s.n) {
      const size_t channels = static_cast<size_t>(own);
      desc.n = desc.scale_count = own;
      desc.weight = weights.data() + first * k;
      octolora_linear* linear = nullptr;
      OCTOLORA_CHECK(octolora_linear_create(device, &desc, &linear));
      Handle<octolora_linear> linear_handle(linear);
      octolora_slots* slots = nullptr;
      if (rank > 0) OCTOLORA_CHECK(octolora_slots_create(linear, 1, &rank, OCTOLORA_LORA_16BIT, &slots));
      Handle<octolora_slots> slots_handle(slots);
      adapter.b = b.data() + first * r * 2;
      if (rank > 0) OCTOLORA_CHECK(octolora_slots_set(slots, 0, &adapter, 1.f, stream.get()));
      const size_t y_bytes = m * channels * element;
      set.members.push_back({std::move(linear_handle), std::move(slots_handle), DeviceMemory(device, y_bytes),
                             on_device(residual, m * first * element, o.residual ? y_bytes : 0),
                             on_device(gate, first * element, o.gate ? channels * element : 0)});
      const Member& member = set.members.back();
      octolora_output output{};
      output.struct_size = sizeof output;
      output.activation = o.activation;
      output.linear = linear;
      output.slots = slots;
      output.y = member.y.get();
      output.residual = o.residual ? member.residual.get() : nullptr;
      output.gate = o.gate ? member.gate.get() : nullptr;
      set.outputs.push_back(output);
      first += channels;
    }
    sets.push_back(std::move(set));
    stream.synchronize();
  }
  octolora_forward_desc call{};
  call.struct_size = sizeof call;
  call.rows = s.m;
  call.x_dtype = call.y_dtype = o.x_type;
  call.output_count = static_cast<int32_t>(s.n.size());
  call.outputs = sets[0].outputs.data();
  OCTOLORA_CHECK(octolora_forward_workspace(&call, &call.workspace_bytes));
  const DeviceMemory workspace(device, call.workspace_bytes);
  call.workspace = workspace.get();

  size_t next = 0;
  auto batch = [&](size_t calls) {
    const double begin = now_us();
    for (size_t i = 0; i < calls; ++i, next = (next + 1) % count) {
      call.x = sets[next].x.get();
      call.outputs = sets[next].outputs.data();
      OCTOLORA_CHECK(octolora_forward(&call, stream.get()));
    }
    stream.synchronize();
    return now_us() - begin;
  };
  batch(count);  // the first touch of everything
  const double once = batch(count) / static_cast<double>(count);
  const size_t calls = static_cast<size_t>(std::ceil(std::max(1.0, kBatchUs / once)));
  std::vector<double> times;
  for (int i = 0; i < repeats; ++i) times.push_back(batch(calls) / static_cast<double>(calls));
  std::vector<char> explanation(1 << 14);
  OCTOLORA_CHECK(octolora_forward_explain(&call, explanation.data(), explanation.size()));
  return {median(times), *std::min_element(times.begin(), times.end()), count, explanation.data()};
}

// At the right of a column of six characters, or beyond it.
std::string padded(const std::string& text) { return std::string(text.size() < 6 ? 6 - text.size() : 0, ' ') + text; }

int run(const Options& o) {
  int32_t cuda_devices = 0;
  const bool with_cuda = octolora_cuda_device_count(&cuda_devices) == OCTOLORA_OK && cuda_devices > 0;
  const Handle<octolora_device> device = open_device(o.device.value_or(with_cuda ? 0 : OCTOLORA_CPU));
  if (o.threads > 0) OCTOLORA_CHECK(octolora_device_set_threads(device.get(), o.threads));
  octolora_device_info info{};
  info.struct_size = sizeof info;
  OCTOLORA_CHECK(octolora_device_get_info(device.get(), &info));
  const bool cuda = info.ordinal != OCTOLORA_CPU;

  double tops = o.tops, gbs = o.gbs;
  const std::string name = info.name;
  const bool h200 = name.find("H200") != std::string::npos, h100 = name.find("H100") != std::string::npos;
  if (cuda && (h200 || h100)) {
    if (tops == 0) tops = o.kind == Kind::w8a16 ? 989.5 : 1979;
    if (gbs == 0) gbs = h200 ? 4800 : 3350;
  }
  const bool with_floor = tops > 0 && gbs > 0;

  char title[512];
  std::snprintf(title, sizeof title, "%s, %s, %d %s; octolora %s; mode %s, x and y %s%s%s; floor at %s", info.name,
                info.kernels, info.units, cuda ? "multiprocessors" : "threads", octolora_version(), o.mode_name.c_str(),
                o.x_name.c_str(), o.after.empty() ? "" : ", then ", o.after.c_str(), with_floor ? "" : "unknown peaks");
  std::string heading = title;
  if (with_floor) {
    std::snprintf(title, sizeof title, "%g TOPS, %g GB/s", tops, gbs);
    heading += title;
  }
  std::printf("%s\n%6s %6s %6s %5s %11s %11s %9s %8s %11s %6s %5s\n", heading.c_str(), "M", "N", "K", "rank", "us",
              "fastest us", "TOPS", "GB/s", "floor us", "share", "sets");
  std::ofstream csv;
  if (!o.csv.empty()) {
    csv.open(o.csv);
    if (!csv) throw std::runtime_error("cannot write " + o.csv);
    csv << "# " << heading << "\nm,n,k,rank,mode,x,us,fastest_us,tops,gbs,floor_us,share_of_floor,sets\n";
  }

  for (const Shape& s : o.shapes) {
    for (const int rank : o.ranks) {
      const Result result = measure(device.get(), o, s, rank);
      const double m = s.m, n = s.total_n(), k = s.k, r = rank, outputs = static_cast<double>(s.n.size());
      const double element = static_cast<double>(element_size(o.x_type)), factor = cuda ? 2 : 4;
      const double base = 2 * m * n * k, low_rank = 2 * m * r * (n + k * outputs);
      const double bytes = n * k + (m * k + m * n * (o.residual ? 2 : 1)) * element + r * (n + k * outputs) * factor;
      const double half = o.kind == Kind::w8a16 ? 1 : 0.5;
      const double floor_us =
          with_floor ? std::max((base + low_rank / half) / tops / 1e6, bytes / gbs / 1e3) : std::nan("");
      const double achieved_tops = (base + low_rank) / result.us / 1e6, achieved_gbs = bytes / result.us / 1e3;
      char floor_text[32] = "-", share_text[32] = "-";
      if (with_floor) {
        std::snprintf(floor_text, sizeof floor_text, "%.2f", floor_us);
        std::snprintf(share_text, sizeof share_text, "%.3f", floor_us / result.us);
      }
      std::printf("%6d %s %6d %5d %11.2f %11.2f %9.3f %8.1f %11s %6s %5zu\n", s.m, padded(s.n_text()).c_str(), s.k,
                  rank, result.us, result.fastest_us, achieved_tops, achieved_gbs, floor_text, share_text, result.sets);
      if (o.explain) std::fputs(result.explanation.c_str(), stdout);
      std::fflush(stdout);
      if (csv.is_open()) {
        char row[256];
        std::snprintf(row, sizeof row, "%d,%s,%d,%d,%s,%s,%.3f,%.3f,%.3f,%.1f,%s,%s,%zu\n", s.m, s.n_text().c_str(),
                      s.k, rank, o.mode_name.c_str(), o.x_name.c_str(), result.us, result.fastest_us, achieved_tops,
                      achieved_gbs, with_floor ? floor_text : "", with_floor ? share_text : "", result.sets);
        csv << row << std::flush;
      }
    }
  }
  if (csv.is_open() && !csv) throw std::runtime_error("could not write all of " + o.csv);
  return 0;
}

}  // namespace
}  // namespace octolora::bench

int main(int argc, char** argv) {
  try {
    return octolora::bench::run(octolora::bench::parse(argc, argv));
  } catch (const std::exception& failure) {
    std::fprintf(stderr, "octolora_bench: %s\n", failure.what());
    return 2;
  }
}
