// SPDX-License-Identifier: Apache-2.0
//
// A few threads that stay, and share out the numbered tasks of one call at a time.
//
//   Lease lease(pool);
//   lease.run(count, [&](int64_t task) { ... });   // returns when every task is done; tasks do not throw
//
// A caller that finds the pool taken by another thread runs its tasks itself, so calls never wait for each other. So
// does a child process after fork(), which has none of the threads. Which thread runs a task is left to chance; a task
// must not care.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace octolora::cpu {

class ThreadPool {
 public:
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  // Threads a call may use, the caller's included. Waits for a running call. On failure nothing has changed.
  void resize(int threads);
  int threads() const { return threads_.load(std::memory_order_relaxed); }

  class Lease {
   public:
    // wanted false: the caller runs everything itself, as small work should.
    explicit Lease(ThreadPool& pool, bool wanted = true)
        : pool_(wanted && pool.usable() && pool.taken_.try_lock() ? &pool : nullptr) {}
    ~Lease() {
      if (pool_ != nullptr) pool_->taken_.unlock();
    }
    Lease(const Lease&) = delete;
    Lease& operator=(const Lease&) = delete;

    template <class Task>
    void run(int64_t count, const Task& task) {
      if (pool_ == nullptr || count <= 1) {
        for (int64_t i = 0; i < count; ++i) task(i);
        return;
      }
      pool_->run(Job{[](const void* context, int64_t i) { (*static_cast<const Task*>(context))(i); }, &task, count});
    }

   private:
    ThreadPool* pool_;
  };

 private:
  struct Job {
    void (*call)(const void* context, int64_t task);
    const void* context;
    int64_t count;
  };
  // A worker sleeps on its own ticket: a small job wakes few workers.
  struct alignas(64) Worker {
    std::atomic<uint32_t> ticket{0};
    std::atomic<bool> stop{false};
    std::thread thread;
  };

  bool usable() const;
  void run(const Job& job);
  void work();
  void serve(Worker& worker);
  static void stop(std::vector<std::unique_ptr<Worker>>& workers);

  std::mutex taken_;  // held for a whole call; guards everything below
  std::vector<std::unique_ptr<Worker>> workers_;
  std::atomic<int> threads_{1};
  const int64_t process_;  // that the workers live in

  // A worker that wakes up while the job is open counts itself in and takes tasks. Once all tasks are taken the caller
  // closes the job and waits for those inside alone: a worker that the system schedules late holds nobody up.
  static constexpr uint32_t kOpen = 0x80000000u;
  Job job_{};
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<uint32_t> state_{0};  // kOpen, and the number of workers inside
};

// OCTOLORA_NUM_THREADS, or the processors that this process may run on.
int default_threads();

}  // namespace octolora::cpu
