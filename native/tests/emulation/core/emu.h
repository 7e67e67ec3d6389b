// Runs the threads of one cluster as fibers, with copies, remote stores, arrivals and wgmma delayed at random.
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <algorithm>
#include <climits>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <unistd.h>
#include <memory>
#include <deque>
#include <queue>
#include <random>
#include <vector>
using std::max; using std::min;
namespace emu {
constexpr int kMaxBlocks = 8, kMaxThreads = 896;
constexpr uint32_t kBase = 4096, kRankShift = 20;
struct Bar { bool init = false; int count = 0, pending = 0; int64_t tx = 0; unsigned phase = 0; long completions = 0; };
struct Warp { alignas(16) uint8_t slot[32][64]; int arrived = 0; unsigned gen = 0; int speed = 4; };
struct Named { int arrived = 0; unsigned gen = 0; int threads = 0; };
struct Acc { void* d; int bytes; long last; std::vector<uint32_t> hidden; };
struct Fiber { void* sp = nullptr; char* stack = nullptr; int block = 0, thread = 0; bool done = true; const char* where = "";
  const unsigned* watch = nullptr; unsigned value = 0; long wake = 0;
  long issued = 0; std::vector<long> groups; std::vector<Acc> acc; bool fenced = false; };
struct WOp { int arrived = 0; int kind = 0; int n = 0; uint64_t a = 0, b = 0; bool accumulate = false; Acc* acc_unused = nullptr;
  uint32_t* d[128]; const uint32_t* areg[128][4]; };
struct Group { std::deque<WOp> ops; long first = 0; unsigned done = 0; int speed = 1; };  // ops[0] is op number `first` == done
struct Block { std::vector<uint8_t> mem; uint8_t* base = nullptr; int size = 0; std::vector<Bar> bars; Warp warps[kMaxThreads / 32];
  Named named[16]; Group group[kMaxThreads / 128]; int exited = 0; };
extern Block blocks[kMaxBlocks]; extern Fiber fibers[kMaxBlocks * kMaxThreads]; extern Fiber* cur; extern void* main_sp;
extern std::mt19937 rng; extern int cluster_size, threads, bx, gx; extern long now; extern unsigned cl_gen, primaries_done; extern int cl_arrived;
extern int max_delay, preempt, strict_exit; extern long switches;
struct Event { long when; long order; std::function<void()> f; };
extern std::vector<Event> events; extern long event_order;
[[noreturn]] void die(const char* format, ...);
void sleep_until(long when);
void wait_on(const unsigned* watch, unsigned value, const char* where);
void later(std::function<void()> f, int least = 0);
inline void maybe() { if (preempt && rng() % preempt == 0) sleep_until(now + 1 + rng() % (rng() % 16 ? 4 : 60)); }
inline Block& blk() { return blocks[cur->block]; }
inline uint8_t* shared() { return blk().base; }
inline uint8_t* at(uint32_t a, int b, int bytes = 1) {
  if (a < kBase || a + bytes > kBase + blocks[b].size) die("shared address %u + %d out of %d", a - kBase, bytes, blocks[b].size);
  return blocks[b].base + (a - kBase); }
inline Bar& bar(uint32_t a, int b) {
  if (a < kBase || a % 8 || (a - kBase) / 8 >= blocks[b].bars.size()) die("bad barrier address %u", a);
  Bar& x = blocks[b].bars[(a - kBase) / 8];
  if (!x.init) die("barrier at %u of block %d is not initialised", a - kBase, b);
  if (strict_exit && blocks[b].exited == threads) die("barrier at %u: block %d has exited", a - kBase, b);
  return x; }
inline void check(Bar& x) {
  if (x.pending < 0) die("too many arrivals at a barrier (count %d)", x.count);
  if (x.tx > (1 << 20) || x.tx < -(1 << 20)) die("transaction count %ld", (long)x.tx);
  if (x.pending == 0 && x.tx == 0) { x.phase ^= 1; x.pending = x.count; x.completions++; } }
struct Idx { unsigned x, y, z; };
inline Idx tid() { return {(unsigned)cur->thread, 0, 0}; }
inline Idx bid() { return {(unsigned)(bx * cluster_size + cur->block), 0, 0}; }
inline Idx gdim() { return {(unsigned)gx, 1, 1}; }
inline Warp& warp() { return blk().warps[cur->thread / 32]; }
inline void warp_sync(const char* w) { Warp& W = warp(); unsigned g = W.gen; if (++W.arrived == 32) { W.arrived = 0; W.gen++; } else while (W.gen == g) wait_on(&W.gen, g, w); }
template <class T, class F> auto collective(const T& v, F f, const char* w) {
  maybe(); Warp& W = warp(); int l = cur->thread % 32; static_assert(sizeof(T) <= 64); memcpy(W.slot[l], &v, sizeof v); warp_sync(w);
  T all[32]; for (int i = 0; i < 32; i++) memcpy(&all[i], W.slot[i], sizeof(T)); auto r = f(all, l); warp_sync(w); return r; }
inline void named(int n, int count, bool wait) {
  Named& N = blk().named[n]; if (N.arrived == 0) N.threads = count; if (N.threads != count || count % 32) die("named barrier %d: %d and %d threads", n, N.threads, count);
  unsigned g = N.gen; if (++N.arrived == count) { N.arrived = 0; N.gen++; } else if (wait) while (N.gen == g) wait_on(&N.gen, g, "named barrier"); }
inline void cluster_barrier() { unsigned g = cl_gen; if (++cl_arrived == cluster_size * threads) { cl_arrived = 0; cl_gen++; } else while (cl_gen == g) wait_on(&cl_gen, g, "cluster barrier"); }
void run(int grid, int threads, int cluster, int shared_bytes, std::function<void()> f);
// Memory that the kernel may read or write.
struct Region { const uint8_t* p; size_t bytes; const char* name; bool writable; bool dependent; std::vector<uint8_t> content; std::vector<uint8_t> written; };
extern std::vector<Region> regions;
void* make(const char* name, size_t bytes, bool writable, bool dependent, int align = 256);
void freeze();   // what is in dependent regions now is what they hold once the primaries are done
void check_global(const void* p, size_t bytes, bool write, const char* what);
void clear_regions();
Region& region_of(const void* p);
float f16_table(uint16_t b);
inline float d16(uint32_t bits, bool f16) { if (f16) return f16_table(bits & 0xffff); uint32_t u = bits << 16; float f; memcpy(&f, &u, 4); return f; }
}  // namespace emu
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__
#define __builtin_assume(x) ((void)0)
#define threadIdx (emu::tid())
#define blockIdx (emu::bid())
#define gridDim (emu::gdim())
inline void __syncwarp() { emu::maybe(); emu::warp_sync("syncwarp"); }
inline void __syncthreads() { emu::named(0, emu::threads, true); }
template <class T> T __shfl_sync(unsigned, T v, int src) { return emu::collective(v, [&](T* a, int) { return a[src & 31]; }, "shfl"); }
template <class T> T __shfl_xor_sync(unsigned, T v, int x) { return emu::collective(v, [&](T* a, int l) { return a[l ^ x]; }, "shfl"); }
inline unsigned __ballot_sync(unsigned, int p) { return emu::collective(p, [&](int* a, int) { unsigned r = 0; for (int i = 0; i < 32; i++) r |= (a[i] ? 1u : 0) << i; return r; }, "ballot"); }
inline bool __all_sync(unsigned m, int p) { return __ballot_sync(m, p) == ~0u; }
inline bool __any_sync(unsigned m, int p) { return __ballot_sync(m, p) != 0; }
template <class T> T __reduce_max_sync(unsigned, T v) { return emu::collective(v, [&](T* a, int) { T r = a[0]; for (int i = 1; i < 32; i++) r = std::max(r, a[i]); return r; }, "redux"); }
template <class T> T __reduce_add_sync(unsigned, T v) { return emu::collective(v, [&](T* a, int) { T r = a[0]; for (int i = 1; i < 32; i++) r += a[i]; return r; }, "redux"); }
template <class T> T __reduce_or_sync(unsigned, T v) { return emu::collective(v, [&](T* a, int) { T r = a[0]; for (int i = 1; i < 32; i++) r |= a[i]; return r; }, "redux"); }
template <class T> T __ldg(const T* p) { emu::check_global(p, sizeof(T), false, "ldg"); return *p; }
inline unsigned __vmaxu2(unsigned a, unsigned b) { return std::max(a & 0xffff, b & 0xffff) | (std::max(a >> 16, b >> 16) << 16); }
inline unsigned __viaddmax_u16x2(unsigned a, unsigned b, unsigned c) { return __vmaxu2((a + b & 0xffff) | ((a >> 16) + (b >> 16) << 16), c); }
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned s) { uint64_t v = a | ((uint64_t)b << 32); unsigned r = 0; for (int i = 0; i < 4; i++) r |= (unsigned)((v >> (8 * ((s >> (4 * i)) & 7))) & 255) << (8 * i); return r; }
inline unsigned __float_as_uint(float f) { unsigned u; memcpy(&u, &f, 4); return u; }
inline float __uint_as_float(unsigned u) { float f; memcpy(&f, &u, 4); return f; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.f / a; }
inline float __fmul_rn(float a, float b) { volatile float r = a * b; return r; }
inline float __fadd_rn(float a, float b) { volatile float r = a + b; return r; }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
