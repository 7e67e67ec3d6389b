// SPDX-License-Identifier: Apache-2.0
#include "harness.h"

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "octolora/octolora.h"

namespace test {
namespace {

struct Skip {
  std::string reason;
};

std::string format_text(const char* format, std::va_list args) {
  char buffer[2048];
  std::vsnprintf(buffer, sizeof buffer, format, args);
  return buffer;
}

int usage(const char* program, const char* what) {
  std::fprintf(
      stderr,
      "%s: %s\n"
      "usage: %s [--device cpu|cuda:N|all] [--filter TEXT] [--quick] [--one-thread] [--seed N] [--list] [--times]\n",
      program, what, program);
  return 2;
}

constexpr int kMostFailuresShown = 40;
constexpr int kSkipped = 77;

}  // namespace

std::string text(const char* format, ...) {
  std::va_list args;
  va_start(args, format);
  std::string result = format_text(format, args);
  va_end(args);
  return result;
}

void fail(const char* format, ...) {
  std::va_list args;
  va_start(args, format);
  Failure failure(format_text(format, args));
  va_end(args);
  throw failure;
}

void skip(const std::string& reason) { throw Skip{reason}; }

void needs_threads(const Options& options) {
  if (options.one_thread) skip("calls from several host threads, which --one-thread leaves out");
}

int run_main(int argc, char** argv, const std::function<void(Suite&, const Options&)>& fill) {
  Options options;
  std::string device = "cpu", filter;
  bool list = false, times = false;
  for (int i = 1; i < argc; ++i) {
    const std::string flag = argv[i];
    if (flag == "--quick") {
      options.quick = true;
    } else if (flag == "--one-thread") {
      options.one_thread = true;
    } else if (flag == "--list") {
      list = true;
    } else if (flag == "--times") {
      times = true;
    } else if ((flag == "--device" || flag == "--filter" || flag == "--seed") && i + 1 < argc) {
      const char* value = argv[++i];
      if (flag == "--device") device = value;
      if (flag == "--filter") filter = value;
      if (flag == "--seed") options.seed = std::strtoull(value, nullptr, 0);
    } else {
      return usage(argv[0], ("unknown or incomplete option '" + flag + "'").c_str());
    }
  }

  std::vector<int> ordinals;
  int32_t count = 0;
  const octolora_status cuda = octolora_cuda_device_count(&count);
  const std::string why = cuda == OCTOLORA_OK ? "" : octolora_last_error();
  if (device == "cpu" || device == "all") ordinals.push_back(OCTOLORA_CPU);
  if (device == "all") {
    for (int i = 0; i < count; ++i) ordinals.push_back(i);
    if (cuda != OCTOLORA_OK) std::printf("CUDA left out: %s\n", why.c_str());
  } else if (device.rfind("cuda:", 0) == 0) {
    const int ordinal = std::atoi(device.c_str() + 5);
    if (cuda != OCTOLORA_OK) {
      std::printf("skipped, no CUDA device: %s\n", why.c_str());
      return kSkipped;
    }
    if (ordinal < 0 || ordinal >= count) {
      std::printf("skipped: %s asked for, this machine has %d CUDA devices\n", device.c_str(), count);
      return kSkipped;
    }
    ordinals.push_back(ordinal);
  }
  if (ordinals.empty()) return usage(argv[0], ("unknown device '" + device + "'").c_str());

  int passed = 0, failed = 0, skipped = 0;
  for (int ordinal : ordinals) {
    options.ordinal = ordinal;
    const std::string place = ordinal < 0 ? "cpu" : text("cuda:%d", ordinal);
    Suite suite;
    fill(suite, options);
    std::printf("%s on %s, seed %llu%s\n", octolora_version(), place.c_str(),
                static_cast<unsigned long long>(options.seed), options.quick ? ", quick" : "");
    using Clock = std::chrono::steady_clock;
    const auto seconds_since = [](Clock::time_point start) {
      return std::chrono::duration<double>(Clock::now() - start).count();
    };
    const Clock::time_point start = Clock::now();
    for (const Suite::Case& c : suite.cases_) {
      if (c.name.find(filter) == std::string::npos) continue;
      if (list) {
        std::printf("%s\n", c.name.c_str());
        continue;
      }
      std::string failure;
      const Clock::time_point begin = Clock::now();
      try {
        c.body();
        ++passed;
        if (times) std::printf("%8.3f s  %s\n", seconds_since(begin), c.name.c_str());
        continue;
      } catch (const Skip& s) {
        ++skipped;
        std::printf("SKIP %s %s: %s\n", place.c_str(), c.name.c_str(), s.reason.c_str());
        continue;
      } catch (const std::exception& e) {
        failure = e.what();
      }
      if (++failed <= kMostFailuresShown) {
        std::printf("FAIL %s %s: %s\n", place.c_str(), c.name.c_str(), failure.c_str());
        std::fflush(stdout);
      }
    }
    std::printf("%s: %.1f s\n", place.c_str(), seconds_since(start));
  }
  if (list) return 0;
  if (failed > kMostFailuresShown) std::printf("... and %d more failures\n", failed - kMostFailuresShown);
  if (skipped) std::printf("%d skipped\n", skipped);
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 && passed > 0 ? 0 : 1;
}

}  // namespace test
