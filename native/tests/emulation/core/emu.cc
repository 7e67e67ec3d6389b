#include "emu.h"
namespace emu {
Block blocks[kMaxBlocks]; Fiber fibers[kMaxBlocks * kMaxThreads]; Fiber* cur; void* main_sp; std::mt19937 rng(1);
int cluster_size, threads, bx, gx; long now; unsigned cl_gen, primaries_done; int cl_arrived; int max_delay = 40, preempt = 64, strict_exit = !getenv("LAX"); long switches;
std::vector<Event> events; long event_order; std::vector<Region> regions; static std::function<void()>* job;
extern "C" void emu_switch(void** save, void* load);
asm(".globl emu_switch\nemu_switch:\npush %rbp\npush %rbx\npush %r12\npush %r13\npush %r14\npush %r15\nmov %rsp,(%rdi)\nmov %rsi,%rsp\npop %r15\npop %r14\npop %r13\npop %r12\npop %rbx\npop %rbp\nret\n");
void die(const char* format, ...) { va_list l; va_start(l, format); printf("FAULT: "); vprintf(format, l);
  if (cur) printf("  [block %d warp %d lane %d, time %ld]", cur->block, cur->thread / 32, cur->thread % 32, now); printf("\n"); fflush(stdout); _exit(3); }
static void leave() { Fiber* me = cur; switches++; emu_switch(&me->sp, main_sp); }
void sleep_until(long when) { if (!cur) return; cur->wake = when; cur->watch = nullptr; cur->where = "preempted"; leave(); }
void wait_on(const unsigned* watch, unsigned value, const char* where) { cur->watch = watch; cur->value = value; cur->where = where; leave(); cur->watch = nullptr; }
static bool after(const Event& a, const Event& b) { return a.when != b.when ? a.when > b.when : a.order > b.order; }
void later(std::function<void()> f, int least) { int d = max_delay; if (rng() % 8 == 0) d *= 6; long o = rng(); events.push_back({now + least + (int)(rng() % d), o, std::move(f)}); std::push_heap(events.begin(), events.end(), after); }
static void entry() { (*job)(); cur->done = true; blocks[cur->block].exited++; leave(); abort(); }
float f16_table(uint16_t b) { static std::vector<float> t = [] { std::vector<float> t(65536); for (int i = 0; i < 65536; i++) t[i] = __half2float(__ushort_as_half((unsigned short)i)); return t; }(); return t[b]; }
void execute(Block& b, WOp& op, int block);
static bool engine() { bool any = false;
  for (int b = 0; b < cluster_size; b++) for (auto& g : blocks[b].group) { if (g.ops.empty() || g.ops.front().arrived < 128) continue; any = true;
      while (!g.ops.empty() && g.ops.front().arrived == 128 && rng() % g.speed == 0) { execute(blocks[b], g.ops.front(), b); g.ops.pop_front(); g.first++; g.done++; } }
  return any; }
void run(int grid, int threads_, int cluster, int shared_bytes, std::function<void()> f) {
  job = &f; gx = grid; threads = threads_; cluster_size = cluster; if (grid % cluster || threads > kMaxThreads || cluster > kMaxBlocks) die("launch");
  if (shared_bytes > 232448) die("too much shared memory: %d", shared_bytes);
  for (bx = 0; bx < grid / cluster; bx++) {
    events.clear(); now = 0; cl_arrived = 0; cl_gen = 1; primaries_done = 0;
    { static const int delays[] = {1, 4, 20, 60, 200}; max_delay = delays[rng() % 5]; static const int pre[] = {0, 16, 64, 256}; preempt = pre[rng() % 4]; }
    for (int b = 0; b < cluster; b++) { Block& B = blocks[b]; B.exited = 0; B.size = shared_bytes; B.mem.assign(shared_bytes + 2048, 0); for (auto& v : B.mem) v = 0xd7; B.base = (uint8_t*)(((uintptr_t)B.mem.data() + 1023) & ~uintptr_t(1023));
      B.bars.assign(shared_bytes / 8, Bar()); for (auto& w : B.warps) { w.arrived = 0; w.gen = 0; static const int s[] = {1, 2, 4, 4, 4, 4, 4, 4}; w.speed = s[rng() % 8]; if (rng() % 12 == 0) w.speed = 0; } for (auto& n : B.named) n = Named();
      for (auto& g : B.group) { g.ops.clear(); g.first = 0; g.done = 0; static const int s[] = {1, 2, 8, 40, 200}; g.speed = s[rng() % 5]; } }
    for (auto& r : regions) { if (r.dependent && (bx == 0 || !r.writable)) { for (size_t i = 0; i < r.bytes; i++) ((uint8_t*)r.p)[i] = 0xff; } }
    later([] { for (auto& r : regions) if (r.dependent && (bx == 0 || !r.writable)) memcpy((void*)r.p, r.content.data(), r.bytes); primaries_done = 1; }, rng() % 2 ? 0 : rng() % 300);
    for (int i = 0; i < cluster * threads; i++) { Fiber& F = fibers[i]; constexpr int kStack = 96 << 10; if (!F.stack) F.stack = (char*)aligned_alloc(4096, kStack);
      void** top = (void**)(F.stack + kStack); top -= 3; *--top = (void*)entry; for (int j = 0; j < 6; j++) *--top = nullptr; F.sp = top; F.block = i / threads; F.thread = i % threads; F.done = false; F.watch = nullptr; F.wake = 0; F.issued = 0; F.groups.clear(); F.acc.clear(); F.fenced = false; }
    int left = cluster * threads, warps = cluster * threads / 32; std::vector<int> order(warps); for (int i = 0; i < warps; i++) order[i] = i;
    while (left) { now++;
      for (int i = 0; i < 4; i++) std::swap(order[rng() % warps], order[rng() % warps]); if (now % 16 == 0) std::shuffle(order.begin(), order.end(), rng);
      cur = nullptr;
      while (!events.empty() && events.front().when <= now) { std::pop_heap(events.begin(), events.end(), after); auto g = std::move(events.back().f); events.pop_back(); g(); }
      bool progress = engine() || !events.empty(); unsigned pause = rng() % 4;
      for (int w : order) { int speed = blocks[w * 32 / threads].warps[w * 32 % threads / 32].speed; bool skip = speed == 0 ? rng() % 64 != 0 : rng() % 4 < pause || (int)(rng() % 4) >= speed;
        unsigned first = rng() % 32; for (int l = 0; l < 32; l++) { Fiber& F = fibers[w * 32 + (l + first) % 32]; if (F.done) continue; if (F.watch ? *F.watch == F.value : F.wake > now) { progress |= !F.watch; continue; } progress = true; if (skip) continue;
          cur = &F; emu_switch(&main_sp, F.sp); cur = nullptr; if (F.done) left--; } }
      if (!progress) { printf("FAULT: DEADLOCK at %ld\n", now); for (int i = 0; i < cluster * threads; i += 32) for (int l = 0; l < 32; l++) if (!fibers[i + l].done) { printf("block %d warp %d lane %d: %s\n", fibers[i + l].block, fibers[i + l].thread / 32, l, fibers[i + l].where); if (l == 0) break; } fflush(stdout); _exit(3); } }
    cur = nullptr;
    for (int b = 0; b < cluster; b++) { for (auto& F : {0}) (void)F; for (auto& g : blocks[b].group) if (!g.ops.empty()) die("wgmma under way at the end"); }
    if (!events.empty()) { if (strict_exit) die("%zu copies or arrivals still under way at the end", events.size()); }
    for (int b = 0; b < cluster; b++) blocks[b].exited = 0;
    while (!events.empty()) { std::pop_heap(events.begin(), events.end(), after); auto g = std::move(events.back().f); events.pop_back(); g(); }
    for (int b = 0; b < cluster; b++) for (size_t i = 0; i < blocks[b].bars.size(); i++) { Bar& x = blocks[b].bars[i]; if (x.init && (x.tx || x.pending != x.count)) die("block %d barrier at %zu not idle at the end: tx %ld pending %d of %d", b, i * 8, (long)x.tx, x.pending, x.count); }
  } }
void* make(const char* name, size_t bytes, bool writable, bool dependent, int align) { const size_t guard = 1024; uint8_t* p = (uint8_t*)aligned_alloc(4096, (bytes + 3 * guard + 8191) / 4096 * 4096); memset(p, 0xab, (bytes + 3 * guard + 8191) / 4096 * 4096);
  p += guard + (align < 256 ? align : 0); regions.push_back({p, bytes, name, writable, dependent, {}, {}}); memset(p, 0, bytes); if (writable) regions.back().written.assign(bytes, 0); return p; }
void freeze() { for (auto& r : regions) if (r.dependent) r.content.assign(r.p, r.p + r.bytes); }
Region& region_of(const void* q) { for (auto& r : regions) if ((const uint8_t*)q >= r.p && (const uint8_t*)q < r.p + r.bytes) return r; die("address %p is nowhere", q); }
void check_global(const void* q, size_t bytes, bool write, const char* what) { Region& r = region_of(q); if ((const uint8_t*)q + bytes > r.p + r.bytes) die("%s beyond the end of %s", what, r.name);
  if (r.dependent && !primaries_done) die("%s of %s before the kernel before is done", what, r.name);
  if (write) { if (!r.writable) die("write of %s", r.name); if (!primaries_done) die("write of %s before the kernel before is done", r.name); for (size_t i = 0; i < bytes; i++) if (r.written[(const uint8_t*)q - r.p + i]++) die("%s: byte %zu of %s written twice", what, (const uint8_t*)q - r.p + i, r.name); } }
void clear_regions() { for (auto& r : regions) { const uint8_t* e = r.p + r.bytes; for (int i = 0; i < 512; i++) if (e[i] != 0xab) { printf("FAULT: written behind %s\n", r.name); _exit(3); } for (int i = 1; i < 512; i++) if (r.p[-i] != 0xab) { printf("FAULT: written before %s\n", r.name); _exit(3); } free((void*)((uintptr_t)r.p & ~uintptr_t(4095))); } regions.clear(); }
// kinds: 0 s8 SS, 1 bf16 SS, 2 f16 SS, 3 bf16 RS, 4 f16 RS
void execute(Block& b, WOp& op, int block) {
  auto locate = [&](uint64_t desc, int row, int byte) { uint32_t lin = (uint32_t)(desc & 0x3fff) * 16 + row * 128 + byte; uint32_t sw = lin ^ (((lin >> 7) & 7) << 4); return at(sw, block, 16); };
  Fiber* const f0 = nullptr; (void)f0;
  if (op.kind == 0) { static int8_t A[64][32], B[256][32];
    for (int r = 0; r < 64; r++) for (int h = 0; h < 2; h++) memcpy(&A[r][16 * h], locate(op.a, r, 16 * h), 16);
    for (int r = 0; r < op.n; r++) for (int h = 0; h < 2; h++) memcpy(&B[r][16 * h], locate(op.b, r, 16 * h), 16);
    for (int m = 0; m < 64; m++) for (int n = 0; n < op.n; n++) { int s = 0; for (int k = 0; k < 32; k++) s += (int)A[m][k] * B[n][k];
        int lane = m % 8 * 4 + n % 8 / 2, th = m / 16 * 32 + lane, reg = n / 8 * 4 + (m % 16 / 8) * 2 + n % 2; int32_t* d = (int32_t*)op.d[th]; d[reg] = op.accumulate ? d[reg] + s : s; }
  } else { static float A[64][16], B[256][16]; const bool f16 = op.kind == 2 || op.kind == 4;
    if (op.kind <= 2) { for (int r = 0; r < 64; r++) for (int h = 0; h < 2; h++) { const uint8_t* p = locate(op.a, r, 16 * h); for (int k = 0; k < 8; k++) A[r][8 * h + k] = d16(((const uint16_t*)p)[k], f16); } }
    else for (int th = 0; th < 128; th++) { int w = th / 32, g = th % 32 / 4, t = th % 4; for (int i = 0; i < 4; i++) { uint32_t v = *op.areg[th][i]; int row = 16 * w + g + i % 2 * 8, k = i / 2 * 8 + 2 * t; A[row][k] = d16(v & 0xffff, f16); A[row][k + 1] = d16(v >> 16, f16); } }
    for (int r = 0; r < op.n; r++) for (int h = 0; h < 2; h++) { const uint8_t* p = locate(op.b, r, 16 * h); for (int k = 0; k < 8; k++) B[r][8 * h + k] = d16(((const uint16_t*)p)[k], f16); }
    for (int m = 0; m < 64; m++) for (int n = 0; n < op.n; n++) { float s = 0; for (int k = 0; k < 16; k++) s += A[m][k] * B[n][k];
        int lane = m % 8 * 4 + n % 8 / 2, th = m / 16 * 32 + lane, reg = n / 8 * 4 + (m % 16 / 8) * 2 + n % 2; float* d = (float*)op.d[th]; d[reg] = op.accumulate ? d[reg] + s : s; } } }
}  // namespace emu
