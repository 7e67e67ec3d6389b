// SPDX-License-Identifier: Apache-2.0
//
// A test program: named cases on the devices of the command line, one line for each that fails, a count at the end.
//
//   --device cpu|cuda:N|all   where to run; "all" is the CPU and every CUDA device
//   --filter TEXT             only cases whose name contains TEXT
//   --quick                   small shapes, for runs under compute-sanitizer
//   --one-thread              leave out the cases that call from several host threads, for racecheck
//   --seed N                  another draw of the random cases
//   --list                    print the names of the cases
//   --times                   print the seconds that each case took
//
// Exit status: 0 all passed, 1 a case failed or none ran, 2 bad usage, 77 the device is not there (the reason is
// printed).
#pragma once

#include <cstdarg>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

namespace test {

// A failed expectation; the text names the numbers.
class Failure : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

__attribute__((format(printf, 1, 2))) std::string text(const char* format, ...);
[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char* format, ...);

struct Options {
  int ordinal = -1;  // OCTOLORA_CPU or a CUDA ordinal
  bool quick = false;
  bool one_thread = false;
  uint64_t seed = 20261122;
  bool cuda() const { return ordinal >= 0; }
};

class Suite {
 public:
  // body throws to fail. A body that finds nothing to do on this device calls skip() with the reason.
  void add(std::string name, std::function<void()> body) { cases_.push_back({std::move(name), std::move(body)}); }

 private:
  friend int run_main(int, char**, const std::function<void(Suite&, const Options&)>&);
  struct Case {
    std::string name;
    std::function<void()> body;
  };
  std::vector<Case> cases_;
};

[[noreturn]] void skip(const std::string& reason);
// At the start of a case that calls from several host threads.
void needs_threads(const Options& options);

// Runs what fill() adds, once for each device.
int run_main(int argc, char** argv, const std::function<void(Suite&, const Options&)>& fill);

}  // namespace test
