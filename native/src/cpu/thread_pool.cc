// SPDX-License-Identifier: Apache-2.0
#include "thread_pool.h"

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <system_error>

#include "../error.h"
#include "float_environment.h"

#if defined(__linux__)
#include <sched.h>
#endif
#include <unistd.h>

namespace octolora::cpu {

namespace {

constexpr int kMaxThreads = 1024;

// About the gap between two steps of one call; a sleeping thread takes several times longer to come back.
constexpr int kSpins = 512;

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// The value of `number` once it is no longer `old`.
uint32_t wait_for_change(const std::atomic<uint32_t>& number, uint32_t old) {
  for (int i = 0; i < kSpins; ++i) {
    const uint32_t value = number.load(std::memory_order_acquire);
    if (value != old) return value;
    relax();
  }
  number.wait(old, std::memory_order_acquire);
  return number.load(std::memory_order_acquire);
}

}  // namespace

ThreadPool::ThreadPool(int threads) : process_(::getpid()) { resize(threads); }

ThreadPool::~ThreadPool() {
  if (process_ == ::getpid()) {
    stop(workers_);
  } else {
    // The threads did not come along with fork(); joining them would wait for ever.
    for (std::unique_ptr<Worker>& worker : workers_) static_cast<void>(worker.release());
  }
}

bool ThreadPool::usable() const { return threads() > 1 && process_ == ::getpid(); }

void ThreadPool::resize(int threads) {
  if (process_ != ::getpid()) {
    throw Error(OCTOLORA_UNSUPPORTED, "the device was created before fork(); its threads stayed in process %lld",
                static_cast<long long>(process_));
  }
  const std::lock_guard<std::mutex> lock(taken_);
  const size_t wanted = static_cast<size_t>(threads - 1), had = workers_.size();
  std::vector<std::unique_ptr<Worker>> surplus;
  try {
    workers_.reserve(wanted);
    surplus.reserve(std::max(had, wanted));  // nothing may throw on the way back
    while (workers_.size() < wanted) {
      workers_.push_back(std::make_unique<Worker>());
      Worker& worker = *workers_.back();
      worker.thread = std::thread([this, &worker] { serve(worker); });
    }
  } catch (const std::exception& failure) {  // std::system_error from the thread, std::bad_alloc from the list
    const size_t reached = workers_.size();
    for (size_t i = had; i < reached; ++i) surplus.push_back(std::move(workers_[i]));
    workers_.resize(had);
    stop(surplus);
    throw Error(OCTOLORA_OUT_OF_MEMORY, "could not start %d threads, got %zu: %s", threads, reached, failure.what());
  }
  while (workers_.size() > wanted) {
    surplus.push_back(std::move(workers_.back()));
    workers_.pop_back();
  }
  stop(surplus);
  threads_.store(threads, std::memory_order_relaxed);
}

void ThreadPool::stop(std::vector<std::unique_ptr<Worker>>& workers) {
  for (const std::unique_ptr<Worker>& worker : workers) {
    worker->stop.store(true, std::memory_order_relaxed);
    worker->ticket.fetch_add(1, std::memory_order_release);
    worker->ticket.notify_one();
  }
  for (const std::unique_ptr<Worker>& worker : workers) {
    if (worker->thread.joinable()) worker->thread.join();
  }
  workers.clear();
}

void ThreadPool::serve(Worker& worker) {
  const DefaultFloatEnvironment environment;
  uint32_t ticket = 0;
  while (true) {
    ticket = wait_for_change(worker.ticket, ticket);
    if (worker.stop.load(std::memory_order_relaxed)) return;
    uint32_t state = state_.load(std::memory_order_relaxed);
    bool inside = false;
    while ((state & kOpen) != 0 && !inside)
      inside = state_.compare_exchange_weak(state, state + 1, std::memory_order_acquire, std::memory_order_relaxed);
    if (!inside) continue;
    work();
    if (state_.fetch_sub(1, std::memory_order_release) == 1) state_.notify_one();
  }
}

void ThreadPool::work() {
  const Job job = job_;
  for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < job.count;) job.call(job.context, i);
}

void ThreadPool::run(const Job& job) {
  const int64_t helpers = std::min<int64_t>(static_cast<int64_t>(workers_.size()), job.count - 1);
  job_ = job;
  next_.store(0, std::memory_order_relaxed);
  state_.store(kOpen, std::memory_order_release);
  for (int64_t i = 0; i < helpers; ++i) {
    Worker& worker = *workers_[static_cast<size_t>(i)];
    worker.ticket.fetch_add(1, std::memory_order_release);
    worker.ticket.notify_one();
  }
  work();
  state_.fetch_and(~kOpen, std::memory_order_relaxed);
  for (uint32_t state; (state = state_.load(std::memory_order_acquire)) != 0;) wait_for_change(state_, state);
}

int default_threads() {
  if (const char* text = std::getenv("OCTOLORA_NUM_THREADS"); text != nullptr && *text != '\0') {
    char* end = nullptr;
    const long threads = std::strtol(text, &end, 10);
    if (*end != '\0' || threads < 1 || threads > kMaxThreads) {
      throw Error(OCTOLORA_INVALID_ARGUMENT,
                  "environment variable OCTOLORA_NUM_THREADS is \"%.100s\", expected 1 to %d", text, kMaxThreads);
    }
    return static_cast<int>(threads);
  }
  int threads = static_cast<int>(std::thread::hardware_concurrency());
#if defined(__linux__)
  // The kernel refuses a mask that is too small for its processors; try larger ones.
  for (int processors = 1024; processors <= 1 << 16; processors *= 2) {
    cpu_set_t* mask = CPU_ALLOC(static_cast<size_t>(processors));
    if (mask == nullptr) break;
    const size_t bytes = CPU_ALLOC_SIZE(static_cast<size_t>(processors));
    const bool known = ::sched_getaffinity(0, bytes, mask) == 0;
    if (known) threads = CPU_COUNT_S(bytes, mask);
    const bool retry = !known && errno == EINVAL;
    CPU_FREE(mask);
    if (!retry) break;
  }
#endif
  return std::min(std::max(threads, 1), kMaxThreads);
}

}  // namespace octolora::cpu
