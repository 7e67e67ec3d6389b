// SPDX-License-Identifier: Apache-2.0
//
// A GPU on the CPU, for tests of the CUDA kernels where there is none.
//
// The threads of the resident blocks are fibers that one host thread runs in a random order: whole clusters of several
// grids side by side, as far as the threads and the shared memory of the multiprocessors reach. What the hardware does
// beside the threads happens at random times between its issue and the instruction that waits for it: copies, tensor
// copies, messages and arrivals between blocks, wgmma, the start of the next grid of a stream and of other streams.
// A fault ends the process with one line: a deadlock, a barrier that gets more than it expects, a shared address that
// is none, accumulators that are touched while wgmma has them, threads of a warpgroup that disagree, a block that is
// gone when a message arrives, a map or an alignment that the hardware refuses.
//
// It shows that a kernel computes what it should whatever the order of its parts. It knows nothing of weak memory,
// memory proxies, bank conflicts, registers, what ptxas makes of the code, or time.
#pragma once

#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

namespace emulation {

[[noreturn]] __attribute__((format(printf, 1, 2))) void fault(const char* format, ...);

// 0 .. below - 1
uint32_t random(uint32_t below);

struct Index {
  unsigned x = 1, y = 1, z = 1;
};

constexpr int kWarp = 32, kWarpgroup = 128;
constexpr uint32_t kSharedBase = 1024;   // the first address of a block's shared memory, of a block of the cluster
constexpr uint32_t kPeer = 1u << 24;     // (rank + 1) times this in an address: that of another block
constexpr int kStaticBytes = 24 * 1024;  // for variables, behind what a launch asks for

// ---- What a block has ----

struct Barrier {
  int arrivals = 0, pending = 0;
  int64_t bytes = 0;   // expected and not yet there
  uint32_t phase = 0;  // parity of the phase under way
};

// Of a warp: what its lanes show each other, in two places by turns.
struct Warp {
  alignas(16) uint8_t shown[2][kWarp][64];
  int arrived = 0;
  uint32_t turn = 0;
  int pace = 0;  // runs once in so many rounds
};

struct HardwareBarrier {
  int arrived = 0, threads = 0;
  uint32_t turn = 0;
  bool all = true, result = true;  // of what its threads say
};

// A matrix for tensor copies: what is in a CUtensorMap.
struct TensorMap {
  static constexpr uint64_t kMagic = 0x6d617020656d7521;
  uint64_t magic;
  uint8_t* matrix;
  int64_t width, rows, pitch;
  int32_t box_rows, box_bytes;
};

// d [64, columns] += a . b^T by a warpgroup.
struct Wgmma {
  enum class Type { s8, bf16, f16 };
  Type type = Type::s8;
  int columns = 0;
  uint64_t a = 0, b = 0;  // descriptors
  bool a_in_registers = false, accumulate = false;
  int arrived = 0;
  uint32_t a_registers[kWarpgroup][4];
  uint32_t* sums[kWarpgroup];
};

struct Warpgroup {
  std::deque<Wgmma> under_way;
  uint32_t done = 0;  // also the number of the first that is under way
  int pace = 1;
};

struct Grid;
struct Cluster;

struct Block {
  Grid* grid = nullptr;
  Cluster* cluster = nullptr;
  int rank = 0;  // in the cluster
  Index index;
  int multiprocessor = 0;
  std::vector<uint8_t> memory;
  uint8_t* shared = nullptr;
  uint32_t shared_bytes = 0;
  std::unordered_map<uint32_t, Barrier> barriers;
  std::vector<Warp> warps;
  std::vector<Warpgroup> warpgroups;
  HardwareBarrier hardware[16];
  int exited = 0;
  bool lets_dependents_start = false;
};

struct Cluster {
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<struct Fiber*> fibers;
  int arrived = 0;
  uint32_t turn = 0;
  int exited = 0, messages = 0;  // messages: copies, stores and arrivals under way
  uint32_t longest_delay = 40, restless = 64;
};

struct Launch {
  std::string name;
  Index grid, block;
  int cluster = 1;
  size_t shared_bytes = 0;
  bool dependent = false, cooperative = false;
  std::function<void()> body;
};

struct Grid {
  Launch launch;
  std::shared_ptr<Grid> primary;  // while it may still run
  unsigned blocks = 0, placed = 0, done = 0, letting = 0;
  uint32_t complete = 0;
  std::vector<std::unique_ptr<Cluster>> clusters;
  struct Variable {
    const char* function;
    int line;
    uint32_t offset;
  };
  std::vector<Variable> variables;
  uint32_t variable_bytes = 0;
};

// ---- A thread ----

struct Sums {  // accumulators that wgmma has
  void* registers;
  size_t words;
  uint32_t last;  // number of the last wgmma that writes them
  std::vector<uint32_t> values;
};

struct CopyAsync {
  uint32_t to;
  const void* from;
  bool present;
  int group;
  bool done;
};

struct StoreGroup {
  uint32_t unread = 0, unwritten = 0;
};

struct Fiber {
  void* stack_pointer = nullptr;
  uint8_t* stack = nullptr;
  Block* block = nullptr;
  int thread = 0;  // in the block
  Index index;
  bool done = false;
  const char* where = "";
  const uint32_t* watched = nullptr;  // does not run while this is `value`
  uint32_t value = 0;
  int64_t wakes = 0;
  uint32_t cluster_turn = 0;
  uint32_t arrivals = 0;  // under way to other blocks
  // Of the thread's own queues.
  uint32_t wgmma_issued = 0;
  bool wgmma_fenced = false;
  std::vector<uint32_t> wgmma_groups;
  std::vector<Sums> sums;
  std::vector<CopyAsync> copies;
  int copy_group = 0;
  std::deque<std::shared_ptr<StoreGroup>> store_groups;
  std::shared_ptr<StoreGroup> open_stores;

  int lane() const { return thread % kWarp; }
};

extern Fiber* current;

// Other threads may run now.
void breathe();
// Until *word is no longer `value`.
void wait_while(const uint32_t* word, uint32_t value, const char* what);
void sleep(int rounds);

// Does something at a random time from now on, on behalf of the current cluster.
void later(std::function<void()> what);

inline Block& block() { return *current->block; }
inline Warp& warp() { return block().warps[static_cast<size_t>(current->thread / kWarp)]; }

// `bytes` at a shared address, aligned to `alignment`; of this block, or of the one that the address names.
uint8_t* shared_memory(uint32_t address, uint32_t bytes, uint32_t alignment);
Block& shared_block(uint32_t address);
uint32_t shared_address(const void* pointer);
uint32_t peer_address(uint32_t address, int rank);
void* variable(const char* function, int line, size_t bytes);

Barrier& barrier_at(uint32_t address);
void settle(Barrier& barrier);  // ends the phase if nothing is pending

void warp_sync(const char* what);
// What all lanes show, by lane.
template <class T>
struct Shown {
  const uint8_t (*from)[64];
  T operator[](int lane) const {
    T value;
    std::memcpy(&value, from[lane], sizeof value);
    return value;
  }
};
template <class T>
Shown<T> show(const T& own, const char* what) {
  static_assert(sizeof(T) <= 64);
  breathe();
  Warp& w = warp();
  auto& place = w.shown[w.turn % 2];
  std::memcpy(place[current->lane()], &own, sizeof own);
  warp_sync(what);
  return {place};
}

// All of `threads` threads arrive; with `waits`, the caller waits for them. What all of them say, and-ed.
bool hardware_barrier(int number, int threads, bool waits, bool says);
void cluster_arrive();
void cluster_wait();

void wgmma_issue(Wgmma::Type type, int columns, void* d, uint64_t a, const uint32_t* a_registers, uint64_t b,
                 bool accumulate);
void wgmma_wait(size_t pending);
float widen16(uint32_t bits, Wgmma::Type type);

// ---- The machine ----

struct Event {
  uint64_t recorded = 0, reached = 0;
};

struct Work {  // of a stream: one of these
  std::unique_ptr<Launch> launch;
  std::function<void()> action;
  Event* awaits = nullptr;
  uint64_t version = 0;

  Work copy() const;
};

struct Stream {
  std::deque<Work> queue;
  std::vector<std::shared_ptr<Grid>> running;
  std::vector<Work>* captures_to = nullptr;
};

struct Properties {
  int multiprocessors, capability;
};
const Properties& properties();
constexpr size_t kSharedPerBlock = 227 * 1024, kSharedPerMultiprocessor = 228 * 1024;
constexpr int kThreadsPerMultiprocessor = 2048;

void add_stream(Stream* stream);
void remove_stream(Stream* stream);
// Runs everything that was enqueued anywhere to its end.
void run();

}  // namespace emulation
