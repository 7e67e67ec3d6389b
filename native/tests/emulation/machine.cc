// SPDX-License-Identifier: Apache-2.0
#include "machine.h"

#include <cuda_fp16.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <queue>

namespace emulation {

// ---- Chance ----

namespace {

int setting(const char* name, int otherwise) {
  const char* text = std::getenv(name);
  return text && *text ? std::atoi(text) : otherwise;
}

uint64_t chance = 0x9e3779b97f4a7c15u * static_cast<uint64_t>(setting("OCTOLORA_EMULATION_SEED", 1)) + 1;

template <size_t Count>
int one_of(const int (&values)[Count]) {
  return values[random(Count)];
}

}  // namespace

uint32_t random(uint32_t below) {
  chance ^= chance << 13;
  chance ^= chance >> 7;
  chance ^= chance << 17;
  return static_cast<uint32_t>((chance >> 32) * below >> 32);
}

// ---- Fibers ----

Fiber* current = nullptr;

namespace {

constexpr size_t kStackBytes = 256 * 1024;

void* machine_stack = nullptr;
int64_t now = 0;
std::vector<std::unique_ptr<Fiber>> idle_fibers;

extern "C" void emulation_switch(void** save, void* load);
asm(R"(
.text
.type emulation_switch, @function
emulation_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
)");

void leave() { emulation_switch(&current->stack_pointer, machine_stack); }

void exit_thread();

void enter_fiber() {
  current->block->grid->launch.body();
  exit_thread();
  std::abort();
}

Fiber* new_fiber() {
  std::unique_ptr<Fiber> fiber;
  if (idle_fibers.empty()) {
    fiber = std::make_unique<Fiber>();
    void* stack =
        mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) fault("no memory for the stack of a thread");
    mprotect(stack, 4096, PROT_NONE);
    fiber->stack = static_cast<uint8_t*>(stack);
  } else {
    uint8_t* const stack = idle_fibers.back()->stack;
    fiber = std::move(idle_fibers.back());
    idle_fibers.pop_back();
    *fiber = Fiber();
    fiber->stack = stack;
  }
  void** top = reinterpret_cast<void**>(fiber->stack + kStackBytes) - 3;
  *--top = reinterpret_cast<void*>(enter_fiber);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber->stack_pointer = top;
  return fiber.release();
}

}  // namespace

void fault(const char* format, ...) {
  std::va_list list;
  va_start(list, format);
  std::fprintf(stderr, "emulated GPU: ");
  std::vfprintf(stderr, format, list);
  va_end(list);
  if (current) {
    std::fprintf(stderr, " [block %u of %u, warp %d, lane %d, round %lld, in %s]", current->block->index.x,
                 current->block->grid->launch.grid.x, current->thread / kWarp, current->lane(),
                 static_cast<long long>(now), current->block->grid->launch.name.c_str());
  }
  std::fprintf(stderr, "\n");
  std::fflush(nullptr);
  _exit(3);
}

void sleep(int rounds) {
  current->wakes = now + rounds;
  current->where = "asleep";
  leave();
}

void breathe() {
  const uint32_t restless = block().cluster->restless;
  if (restless && random(restless) == 0) sleep(1 + static_cast<int>(random(random(16) ? 4 : 60)));
}

void wait_while(const uint32_t* word, uint32_t value, const char* what) {
  while (*word == value) {
    current->watched = word;
    current->value = value;
    current->where = what;
    leave();
    current->watched = nullptr;
  }
}

// ---- What happens later ----

namespace {

struct Happening {
  int64_t when;
  uint32_t order;
  Fiber* of;
  std::function<void()> what;
};
bool comes_after(const Happening& a, const Happening& b) {
  return a.when != b.when ? a.when > b.when : a.order > b.order;
}
std::vector<Happening> happenings;

void let_happen() {
  while (!happenings.empty() && happenings.front().when <= now) {
    std::pop_heap(happenings.begin(), happenings.end(), comes_after);
    const Happening next = std::move(happenings.back());
    happenings.pop_back();
    current = next.of;
    next.what();
    current = nullptr;
    --next.of->block->cluster->messages;
  }
}

}  // namespace

void later(std::function<void()> what) {
  Cluster* const cluster = block().cluster;
  uint32_t delay = cluster->longest_delay;
  if (random(8) == 0) delay *= 6;
  ++cluster->messages;
  happenings.push_back({now + random(delay), random(~0u), current, std::move(what)});
  std::push_heap(happenings.begin(), happenings.end(), comes_after);
}

// ---- Shared memory and barriers ----

Block& shared_block(uint32_t address) {
  const uint32_t peer = address / kPeer;
  if (peer == 0) return block();
  Cluster& cluster = *block().cluster;
  if (peer > cluster.blocks.size()) fault("block %u of a cluster of %zu", peer - 1, cluster.blocks.size());
  return *cluster.blocks[peer - 1];
}

uint8_t* shared_memory(uint32_t address, uint32_t bytes, uint32_t alignment) {
  Block& of = shared_block(address);
  const uint32_t offset = address % kPeer;
  if (offset % alignment) fault("shared address %u is no multiple of %u", offset, alignment);
  if (offset < kSharedBase || offset + bytes > kSharedBase + of.shared_bytes)
    fault("shared address %u + %u, of %u + %u", offset, bytes, kSharedBase, of.shared_bytes);
  if (of.exited == static_cast<int>(of.grid->launch.block.x)) fault("the block of shared address %u is gone", offset);
  return of.shared + (offset - kSharedBase);
}

uint32_t shared_address(const void* pointer) {
  const Block& of = block();
  const auto* at = static_cast<const uint8_t*>(pointer);
  if (at < of.shared || at >= of.shared + of.shared_bytes) fault("%p is not in the block's shared memory", pointer);
  return kSharedBase + static_cast<uint32_t>(at - of.shared);
}

uint32_t peer_address(uint32_t address, int rank) {
  if (rank < 0 || rank >= static_cast<int>(block().cluster->blocks.size())) fault("block %d of a cluster", rank);
  return address % kPeer + static_cast<uint32_t>(rank + 1) * kPeer;
}

void* variable(const char* function, int line, size_t bytes) {
  Block& of = block();
  Grid& grid = *of.grid;
  const uint32_t first = of.shared_bytes - kStaticBytes;
  for (const Grid::Variable& v : grid.variables)
    if (v.line == line && v.function == function) return of.shared + first + v.offset;
  const uint32_t offset = grid.variable_bytes;
  grid.variable_bytes += static_cast<uint32_t>((bytes + 15) / 16 * 16);
  if (grid.variable_bytes > kStaticBytes) fault("more than %d bytes of shared variables", kStaticBytes);
  grid.variables.push_back({function, line, offset});
  return of.shared + first + offset;
}

Barrier& barrier_at(uint32_t address) {
  shared_memory(address, 8, 8);
  Block& of = shared_block(address);
  const auto found = of.barriers.find(address % kPeer);
  if (found == of.barriers.end()) fault("the barrier at shared address %u is not initialised", address % kPeer);
  return found->second;
}

void settle(Barrier& barrier) {
  if (barrier.pending < 0) fault("a barrier for %d arrivals gets one more", barrier.arrivals);
  if (std::abs(barrier.bytes) >= 1 << 20) fault("a barrier expects %lld bytes", static_cast<long long>(barrier.bytes));
  if (barrier.pending || barrier.bytes) return;
  barrier.phase ^= 1;
  barrier.pending = barrier.arrivals;
}

void warp_sync(const char* what) {
  Warp& w = warp();
  const uint32_t turn = w.turn;
  if (++w.arrived == kWarp) {
    w.arrived = 0;
    ++w.turn;
  } else {
    wait_while(&w.turn, turn, what);
  }
}

namespace {

void end_turn(HardwareBarrier& b) {
  b.arrived = 0;
  b.result = b.all;
  ++b.turn;
}

// Threads that are gone are not waited for, where the barrier is for all.
void end_turns(Block& of) {
  HardwareBarrier& b = of.hardware[0];
  if (b.arrived && b.arrived == static_cast<int>(of.grid->launch.block.x) - of.exited) end_turn(b);
  Cluster& c = *of.cluster;
  if (c.arrived && c.arrived == static_cast<int>(c.fibers.size()) - c.exited) {
    c.arrived = 0;
    ++c.turn;
  }
}

}  // namespace

bool hardware_barrier(int number, int threads, bool waits, bool says) {
  breathe();
  HardwareBarrier& b = block().hardware[number];
  if (b.arrived == 0) {
    b.threads = threads;
    b.all = true;
  }
  if (b.threads != threads || threads % kWarp)
    fault("hardware barrier %d: for %d threads and for %d", number, b.threads, threads);
  b.all = b.all && says;
  const uint32_t turn = b.turn;
  ++b.arrived;
  if (number == 0)
    end_turns(block());
  else if (b.arrived == threads)
    end_turn(b);
  if (waits) wait_while(&b.turn, turn, "a hardware barrier");
  return b.result;
}

void cluster_arrive() {
  breathe();
  Cluster& c = *block().cluster;
  current->cluster_turn = c.turn;
  ++c.arrived;
  end_turns(block());
}

void cluster_wait() { wait_while(&block().cluster->turn, current->cluster_turn, "the cluster"); }

// ---- wgmma ----

float widen16(uint32_t bits, Wgmma::Type type) {
  if (type == Wgmma::Type::bf16) {
    const uint32_t word = bits << 16;
    float value;
    std::memcpy(&value, &word, 4);
    return value;
  }
  static const std::vector<float> values = [] {
    std::vector<float> table(65536);
    for (uint32_t i = 0; i < table.size(); ++i) {
      const __half_raw raw{static_cast<unsigned short>(i)};
      table[i] = __half2float(__half(raw));
    }
    return table;
  }();
  return values[bits & 0xffff];
}

namespace {

constexpr uint32_t kTaken = 0x7fdeadbe;  // in accumulators that wgmma has

// Row `row` of a tile in the 128-byte swizzle, half `half` of the 32 bytes that the descriptor stands for.
const uint8_t* operand(const Block& of, uint64_t descriptor, int row, int half) {
  if (descriptor >> 62 != 1 || (descriptor >> 32 & 0x3fff) != 1024 >> 4) fault("wgmma descriptor %#lx", descriptor);
  uint32_t address = static_cast<uint32_t>(descriptor & 0x3fff) * 16 + static_cast<uint32_t>(row * 128 + half * 16);
  address ^= (address >> 7 & 7) << 4;
  if (address < kSharedBase || address + 16 > kSharedBase + of.shared_bytes)
    fault("wgmma reads shared address %u", address);
  return of.shared + (address - kSharedBase);
}

template <class Value, class Sum, int kDepth>
void multiply(const Wgmma& op, const Value (*a)[kDepth], const Value (*b)[kDepth]) {
  for (int m = 0; m < 64; ++m) {
    for (int n = 0; n < op.columns; ++n) {
      Sum sum = 0;
      for (int k = 0; k < kDepth; ++k) sum += static_cast<Sum>(a[m][k]) * static_cast<Sum>(b[n][k]);
      const int thread = m / 16 * kWarp + m % 8 * 4 + n % 8 / 2, place = n / 8 * 4 + m % 16 / 8 * 2 + n % 2;
      Sum& to = reinterpret_cast<Sum*>(op.sums[thread])[place];
      to = op.accumulate ? to + sum : sum;
    }
  }
}

void execute(const Block& of, const Wgmma& op) {
  if (op.type == Wgmma::Type::s8) {
    static int8_t a[64][32], b[256][32];
    for (int half = 0; half < 2; ++half) {
      for (int row = 0; row < 64; ++row) std::memcpy(&a[row][16 * half], operand(of, op.a, row, half), 16);
      for (int row = 0; row < op.columns; ++row) std::memcpy(&b[row][16 * half], operand(of, op.b, row, half), 16);
    }
    return multiply<int8_t, int32_t, 32>(op, a, b);
  }
  static float a[64][16], b[256][16];
  const auto bring = [&](float* to, uint64_t descriptor, int row, int half) {
    uint16_t bits[8];
    std::memcpy(bits, operand(of, descriptor, row, half), 16);
    for (int i = 0; i < 8; ++i) to[8 * half + i] = widen16(bits[i], op.type);
  };
  for (int half = 0; half < 2; ++half) {
    for (int row = 0; row < 64 && !op.a_in_registers; ++row) bring(a[row], op.a, row, half);
    for (int row = 0; row < op.columns; ++row) bring(b[row], op.b, row, half);
  }
  for (int thread = 0; thread < kWarpgroup && op.a_in_registers; ++thread) {
    const int g = thread % kWarp / 4, t = thread % 4;
    for (int i = 0; i < 4; ++i) {
      float* const to = &a[thread / kWarp * 16 + g + i % 2 * 8][i / 2 * 8 + 2 * t];
      to[0] = widen16(op.a_registers[thread][i] & 0xffff, op.type);
      to[1] = widen16(op.a_registers[thread][i] >> 16, op.type);
    }
  }
  multiply<float, float, 16>(op, a, b);
}

void check_untouched(const Sums& s) {
  const auto* words = static_cast<const uint32_t*>(s.registers);
  for (size_t i = 0; i < s.words; ++i)
    if (words[i] != kTaken) fault("accumulator %zu of a thread changed while wgmma had it", i);
}

}  // namespace

void wgmma_issue(Wgmma::Type type, int columns, void* d, uint64_t a, const uint32_t* a_registers, uint64_t b,
                 bool accumulate) {
  breathe();
  Fiber& f = *current;
  if (!f.wgmma_fenced) fault("wgmma without a fence before it");
  Warpgroup& group = block().warpgroups[static_cast<size_t>(f.thread / kWarpgroup)];
  const uint32_t number = f.wgmma_issued++, place = number - group.done;
  while (group.under_way.size() <= place) group.under_way.emplace_back();
  Wgmma& op = group.under_way[place];
  if (op.arrived++ == 0) {
    op.type = type;
    op.columns = columns;
    op.a = a;
    op.b = b;
    op.a_in_registers = a_registers;
    op.accumulate = accumulate;
  } else if (op.type != type || op.columns != columns || op.a != a || op.b != b || op.accumulate != accumulate) {
    fault("the threads of a warpgroup disagree on a wgmma");
  }
  const int thread = f.thread % kWarpgroup;
  if (a_registers) std::memcpy(op.a_registers[thread], a_registers, sizeof op.a_registers[thread]);
  const size_t words = static_cast<size_t>(columns) / 2;
  auto taken = std::find_if(f.sums.begin(), f.sums.end(), [&](const Sums& s) { return s.registers == d; });
  if (taken == f.sums.end()) {
    Sums s{d, words, number, std::vector<uint32_t>(words)};
    std::memcpy(s.values.data(), d, words * 4);
    std::fill_n(static_cast<uint32_t*>(d), words, kTaken);
    f.sums.push_back(std::move(s));
    taken = f.sums.end() - 1;
  } else {
    if (taken->words != words) fault("wgmma of %d columns onto sums of %zu", columns, taken->words * 2);
    check_untouched(*taken);
  }
  taken->last = number;
  op.sums[thread] = taken->values.data();
}

void wgmma_wait(size_t pending) {
  breathe();
  Fiber& f = *current;
  if (f.wgmma_groups.size() <= pending) return;
  const uint32_t target = f.wgmma_groups[f.wgmma_groups.size() - 1 - pending];
  const Warpgroup& group = block().warpgroups[static_cast<size_t>(f.thread / kWarpgroup)];
  while (static_cast<int32_t>(group.done - target) < 0) wait_while(&group.done, group.done, "wgmma");
  for (size_t i = 0; i < f.sums.size();) {
    Sums& s = f.sums[i];
    if (static_cast<int32_t>(s.last - target) < 0) {
      check_untouched(s);
      std::memcpy(s.registers, s.values.data(), s.words * 4);
      std::swap(s, f.sums.back());
      f.sums.pop_back();
    } else {
      ++i;
    }
  }
  f.wgmma_groups.erase(f.wgmma_groups.begin(), f.wgmma_groups.end() - static_cast<std::ptrdiff_t>(pending));
}

// ---- The machine ----

namespace {

struct Multiprocessor {
  int threads = kThreadsPerMultiprocessor, blocks = 32;
  size_t shared = kSharedPerMultiprocessor;
};

std::vector<Stream*> streams;
std::vector<Multiprocessor> multiprocessors;
std::vector<Cluster*> resident;

void exit_thread() {
  Fiber& f = *current;
  Block& b = *f.block;
  if (f.wgmma_groups.size() &&
      static_cast<int32_t>(b.warpgroups[static_cast<size_t>(f.thread / kWarpgroup)].done - f.wgmma_groups.back()) < 0)
    fault("a thread ends while its wgmma is under way");
  for (const auto& group : f.store_groups)
    if (group->unread) fault("a thread ends while its stores read shared memory");
  f.done = true;
  ++b.exited;
  ++b.cluster->exited;
  end_turns(b);
  leave();
}

bool fits(const Multiprocessor& m, const Launch& l) {
  return m.blocks > 0 && m.threads >= static_cast<int>(l.block.x) && m.shared >= l.shared_bytes + 1024;
}

// Places the next cluster of a grid, if there is room for all of its blocks.
bool place(Grid& grid) {
  const Launch& l = grid.launch;
  const std::vector<Multiprocessor> before = multiprocessors;
  const auto count = static_cast<uint32_t>(multiprocessors.size());
  int at[16];
  for (int i = 0; i < l.cluster; ++i) {
    const uint32_t first = random(count);
    uint32_t tried = 0;
    while (tried < count && !fits(multiprocessors[(first + tried) % count], l)) ++tried;
    if (tried == count) {
      multiprocessors = before;
      return false;
    }
    at[i] = static_cast<int>((first + tried) % count);
    Multiprocessor& m = multiprocessors[static_cast<size_t>(at[i])];
    m.threads -= static_cast<int>(l.block.x);
    m.shared -= l.shared_bytes + 1024;
    --m.blocks;
  }
  auto cluster = std::make_unique<Cluster>();
  cluster->longest_delay = static_cast<uint32_t>(one_of({1, 4, 20, 60, 200}));
  cluster->restless = static_cast<uint32_t>(one_of({0, 16, 64, 256}));
  for (int i = 0; i < l.cluster; ++i) {
    auto b = std::make_unique<Block>();
    b->grid = &grid;
    b->cluster = cluster.get();
    b->rank = i;
    const unsigned number = grid.placed++;
    b->index = {number % l.grid.x, number / l.grid.x % l.grid.y, number / l.grid.x / l.grid.y};
    b->multiprocessor = at[i];
    const size_t asked = (l.shared_bytes + 15) / 16 * 16;
    b->shared_bytes = static_cast<uint32_t>(asked + kStaticBytes);
    b->memory.assign(b->shared_bytes + 1024, static_cast<uint8_t>(0xd0 + random(16)));
    b->shared = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(b->memory.data()) + 1023) / 1024 * 1024);
    const size_t warps = (l.block.x + kWarp - 1) / kWarp;
    b->warps.resize(warps);
    for (Warp& w : b->warps) w.pace = random(12) ? one_of({1, 1, 2, 4}) : 64;
    b->warpgroups.resize((warps + 3) / 4);
    for (Warpgroup& g : b->warpgroups) g.pace = one_of({1, 1, 2, 8, 40});
    for (unsigned thread = 0; thread < l.block.x; ++thread) {
      Fiber* const f = new_fiber();
      f->block = b.get();
      f->thread = static_cast<int>(thread);
      f->index = {thread, 0, 0};
      cluster->fibers.push_back(f);
    }
    cluster->blocks.push_back(std::move(b));
  }
  resident.push_back(cluster.get());
  grid.clusters.push_back(std::move(cluster));
  return true;
}

// Hands back what a cluster had whose threads are gone and whose messages have arrived.
void retire(Cluster* cluster) {
  Grid& grid = *cluster->blocks[0]->grid;
  for (const auto& b : cluster->blocks) {
    for (const Warpgroup& g : b->warpgroups)
      if (!g.under_way.empty()) fault("wgmma under way at the end of a block of %s", grid.launch.name.c_str());
    Multiprocessor& m = multiprocessors[static_cast<size_t>(b->multiprocessor)];
    m.threads += static_cast<int>(grid.launch.block.x);
    m.shared += grid.launch.shared_bytes + 1024;
    ++m.blocks;
    ++grid.done;
    if (!b->lets_dependents_start) ++grid.letting;
  }
  for (Fiber* f : cluster->fibers) idle_fibers.emplace_back(f);
  resident.erase(std::find(resident.begin(), resident.end(), cluster));
  grid.clusters.erase(
      std::find_if(grid.clusters.begin(), grid.clusters.end(), [&](const auto& c) { return c.get() == cluster; }));
  if (grid.done == grid.blocks) {
    grid.complete = 1;
    grid.primary.reset();
  }
}

std::shared_ptr<Grid> begin(const Launch& launch, std::shared_ptr<Grid> primary) {
  auto grid = std::make_shared<Grid>();
  grid->launch = launch;
  grid->blocks = launch.grid.x * launch.grid.y * launch.grid.z;
  grid->primary = std::move(primary);
  return grid;
}

// Starts what may start in a stream; whether anything did.
bool advance(Stream& s) {
  bool any = false;
  auto& running = s.running;
  running.erase(std::remove_if(running.begin(), running.end(), [](const auto& g) { return g->complete != 0; }),
                running.end());
  while (!s.queue.empty()) {
    Work& next = s.queue.front();
    if (next.launch) {
      const bool early = next.launch->dependent && !running.empty();
      if (early ? running.back()->letting < running.back()->blocks : !running.empty()) break;
      if (early && random(4)) break;  // or later
      running.push_back(begin(*next.launch, early ? running.back() : nullptr));
    } else {
      if (!running.empty()) break;
      if (next.awaits && next.awaits->reached < next.version) break;
      if (next.action) next.action();
    }
    s.queue.pop_front();
    any = true;
  }
  for (const auto& grid : running) {
    // All that run at the same time or none, where the blocks wait for each other.
    const unsigned most = grid->launch.cooperative ? grid->blocks : 1 + random(8);
    for (unsigned i = 0; i < most && grid->placed < grid->blocks; ++i) {
      if (!place(*grid)) break;
      any = true;
    }
    if (grid->placed < grid->blocks) break;  // grids behind it find no room before
  }
  return any;
}

// wgmma of all of whose threads it was asked; whether any is under way.
bool multiply_on() {
  bool any = false;
  for (const Cluster* c : resident) {
    for (const auto& b : c->blocks) {
      for (Warpgroup& g : b->warpgroups) {
        while (!g.under_way.empty() && g.under_way.front().arrived == kWarpgroup) {
          any = true;
          if (random(static_cast<uint32_t>(g.pace))) break;
          execute(*b, g.under_way.front());
          g.under_way.pop_front();
          ++g.done;
        }
      }
    }
  }
  return any;
}

// A round of a cluster's warps; whether any thread ran or will by itself.
bool run_threads(Cluster& c) {
  bool any = false;
  const uint32_t warps = static_cast<uint32_t>((c.fibers.size() + kWarp - 1) / kWarp), first = random(warps);
  const uint32_t step = warps > 2 && random(2) ? warps - 1 : 1;  // either way round
  const uint32_t lazy = random(4);
  for (uint32_t i = 0; i < warps; ++i) {
    const size_t w = (first + i * step) % warps;
    const size_t begin = w * kWarp, end = std::min(begin + kWarp, c.fibers.size());
    Fiber* const lead = c.fibers[begin];
    const int pace = lead->block->warps[static_cast<size_t>(lead->thread / kWarp)].pace;
    const bool skips = random(4) < lazy || random(static_cast<uint32_t>(pace));
    for (size_t j = begin; j < end; ++j) {
      Fiber& f = *c.fibers[j];
      if (f.done || (f.watched && *f.watched == f.value)) continue;
      any = true;
      if (skips || f.wakes > now) continue;
      current = &f;
      emulation_switch(&machine_stack, f.stack_pointer);
      current = nullptr;
    }
  }
  return any;
}

[[noreturn]] void report_deadlock() {
  for (const Cluster* c : resident) {
    const char* said = nullptr;
    for (const Fiber* f : c->fibers) {
      if (f->done || (said == f->where && f->lane())) continue;
      said = f->where;
      std::fprintf(stderr, "  %s, block %u, warp %d, lane %d: %s\n", f->block->grid->launch.name.c_str(),
                   f->block->index.x, f->thread / kWarp, f->lane(), f->where);
    }
  }
  fault("nothing can go on");
}

}  // namespace

Work Work::copy() const {
  Work other;
  if (launch) other.launch = std::make_unique<Launch>(*launch);
  other.action = action;
  other.awaits = awaits;
  other.version = version;
  return other;
}

const Properties& properties() {
  static const Properties p = {setting("OCTOLORA_EMULATION_UNITS", 6), setting("OCTOLORA_EMULATION_CAPABILITY", 90)};
  return p;
}

void add_stream(Stream* stream) { streams.push_back(stream); }
void remove_stream(Stream* stream) { streams.erase(std::find(streams.begin(), streams.end(), stream)); }

void run() {
  if (multiprocessors.empty()) multiprocessors.resize(static_cast<size_t>(properties().multiprocessors));
  for (;;) {
    ++now;
    bool any = false, waiting = false;
    for (size_t i = 0, first = random(static_cast<uint32_t>(streams.size())); i < streams.size(); ++i) {
      Stream& s = *streams[(first + i) % streams.size()];
      any |= advance(s);
      waiting |= !s.queue.empty() || !s.running.empty();
    }
    if (!waiting && resident.empty()) return;
    any |= !happenings.empty();
    let_happen();
    any |= multiply_on();
    const std::vector<Cluster*> present = resident;
    for (Cluster* c : present) {
      any |= run_threads(*c);
      if (c->exited == static_cast<int>(c->fibers.size()) && c->messages == 0) {
        retire(c);
        any = true;
      }
    }
    if (!any) report_deadlock();
  }
}

}  // namespace emulation
