#pragma once
#include "emu.h"
namespace octolora::cuda::ptx {
using namespace emu;
inline uint32_t shared_address(const void* p) { auto d = (const uint8_t*)p - blk().base; if (d < 0 || d >= blk().size) die("shared_address out of range"); return (uint32_t)d + kBase; }
inline void touch(const void* p) { check_global(p, 4, false, "touch"); }
inline uint32_t load_shared(uint32_t a) { maybe(); if (a % 4) die("unaligned"); uint32_t v; memcpy(&v, at(a, cur->block, 4), 4); return v; }
inline uint4 load_shared_16(uint32_t a) { maybe(); if (a % 16) die("unaligned"); uint4 v; memcpy(&v, at(a, cur->block, 16), 16); return v; }
inline uint2 load_shared_8(uint32_t a) { maybe(); if (a % 8) die("unaligned"); uint2 v; memcpy(&v, at(a, cur->block, 8), 8); return v; }
inline float2 load_shared_pair(uint32_t a) { maybe(); if (a % 8) die("unaligned"); float2 v; memcpy(&v, at(a, cur->block, 8), 8); return v; }
inline void store_shared(uint32_t a, float v) { if (a % 4) die("unaligned"); memcpy(at(a, cur->block, 4), &v, 4); }
inline void store_shared(uint32_t a, uint2 v) { if (a % 8) die("unaligned"); memcpy(at(a, cur->block, 8), &v, 8); }
inline void store_shared(uint32_t a, uint4 v) { if (a % 16) die("unaligned"); memcpy(at(a, cur->block, 16), &v, 16); }
inline void store_16(void* to, uint4 v) { maybe(); if ((uintptr_t)to % 16) die("unaligned store"); check_global(to, 16, true, "store_16"); memcpy(to, &v, 16); }
inline void load_matrix_x4(uint32_t (&r)[4], uint32_t a) { if (a % 16) die("unaligned ldmatrix");
  struct R { uint32_t v[4]; }; R o = collective(a, [&](uint32_t* all, int l) { R r; for (int i = 0; i < 4; i++) memcpy(&r.v[i], at(all[8 * i + l / 4], cur->block, 16) + l % 4 * 4, 4); return r; }, "ldmatrix"); for (int i = 0; i < 4; i++) r[i] = o.v[i]; }
inline void store_matrix_x4(uint32_t a, uint32_t b0, uint32_t b1, uint32_t b2, uint32_t b3) { if (a % 16) die("unaligned stmatrix"); uint32_t v[4] = {b0, b1, b2, b3};
  collective(a, [&](uint32_t* all, int l) { for (int i = 0; i < 4; i++) memcpy(at(all[8 * i + l / 4], cur->block, 16) + l % 4 * 4, &v[i], 4); return 0; }, "stmatrix"); }
struct F4 { float c[4]; };
struct Op { uint32_t a[4], b[2]; };
inline void mma16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bool f16) { Op o{{a[0], a[1], a[2], a[3]}, {b0, b1}};
  auto r = collective(o, [&](Op* all, int l) { F4 r; int g = l / 4, t = l % 4; for (int i = 0; i < 4; i++) { int row = g + (i / 2) * 8, col = 2 * t + i % 2; float s = 0;
      for (int k = 0; k < 16; k++) { int al = (row % 8) * 4 + (k % 8) / 2, ar = (row / 8) + (k / 8) * 2, bl = col * 4 + (k % 8) / 2; s += d16(all[al].a[ar] >> (k % 2 * 16) & 0xffff, f16) * d16(all[bl].b[k / 8] >> (k % 2 * 16) & 0xffff, f16); } r.c[i] = s; } return r; }, "mma");
  for (int i = 0; i < 4; i++) c[i] += r.c[i]; }
inline void mma_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { mma16(c, a, b0, b1, true); }
inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { mma16(c, a, b0, b1, false); }
struct OpF { float a[4], b[2]; };
inline void mma_tf32(float (&c)[4], const float (&a)[4], float b0, float b1) { OpF o{{a[0], a[1], a[2], a[3]}, {b0, b1}};
  auto r = collective(o, [&](OpF* all, int l) { F4 r; int g = l / 4, t = l % 4; for (int i = 0; i < 4; i++) { int row = g + (i / 2) * 8, col = 2 * t + i % 2; float s = 0; for (int k = 0; k < 8; k++) s += all[(row % 8) * 4 + k % 4].a[row / 8 + (k / 4) * 2] * all[col * 4 + k % 4].b[k / 4]; r.c[i] = s; } return r; }, "mma tf32");
  for (int i = 0; i < 4; i++) c[i] += r.c[i]; }
inline uint32_t round_to_s8(float v) { if (v != v) return 0; float r = std::nearbyint(v); r = std::min(127.f, std::max(-128.f, r)); return (uint32_t)(int)r; }
inline uint32_t pack_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) { return (a & 255) | (b & 255) << 8 | (c & 255) << 16 | (d & 255) << 24; }
inline uint32_t cluster_rank() { return cur->block; }
inline void cluster_sync() { cluster_barrier(); }
inline void cluster_meet() { maybe(); cluster_barrier(); }
inline void barrier_init(uint32_t b, uint32_t n) { if (b % 8) die("barrier alignment"); Bar& x = blk().bars.at((b - kBase) / 8); x = Bar(); x.init = true; x.count = x.pending = n; }
inline void barrier_init_fence() {}
inline void barrier_expect_bytes(uint32_t b, uint32_t n) { maybe(); Bar& x = bar(b, cur->block); x.tx += n; x.pending--; check(x); }
inline void barrier_arrive(uint32_t b) { maybe(); Bar& x = bar(b, cur->block); x.pending--; check(x); }
inline void barrier_arrive_cluster(uint32_t b, uint32_t r) { maybe(); if ((int)r >= cluster_size) die("rank"); later([=] { Bar& x = bar(b, r); x.pending--; check(x); }); }
inline void barrier_wait(uint32_t b, uint32_t parity) { if (parity > 1) die("parity %u", parity); Bar& x = bar(b, cur->block); while (x.phase == parity) wait_on(&x.phase, parity, "mbarrier"); maybe(); }
inline void named_sync(int n, int t) { maybe(); named(n, t, true); }
inline void named_arrive(int n, int t) { named(n, t, false); }
struct Map { const uint8_t* m; int64_t width, rows, pitch; int box; };
inline void prefetch_map(const CUtensorMap*) {}
inline void bulk_prefetch(const void* p, uint32_t bytes) { if ((uintptr_t)p % 16 || bytes % 16) die("bulk prefetch alignment"); Region& r = region_of(p); if ((const uint8_t*)p + bytes > r.p + r.bytes) die("bulk prefetch beyond the end of %s", r.name); }
inline void tensor_load_multicast(uint32_t to, const CUtensorMap* map, int x, int y, uint32_t barrier, uint16_t mask) { maybe(); Map m; memcpy(&m, map, sizeof m); if (to % 1024) die("copy to an address that is no multiple of 1024"); if (x % 16) die("x of a copy");
  if (!m.m) die("a map that was not made");
  Region& reg = region_of(m.m); if (reg.p + reg.bytes < m.m + (m.rows - 1) * m.pitch + m.width) die("map over the end of %s", reg.name);
  if (reg.dependent && !primaries_done) die("copy of %s before the kernel before is done", reg.name);
  for (int b = 0; b < cluster_size; b++) if (mask >> b & 1) { bar(barrier, b);
    for (int r = 0; r < m.box; r++) memset(at(to + r * 128, b, 128), 0x5b, 128);
    for (int first = 0; first < m.box; first += 32) { int last = std::min(first + 32, m.box);
      later([=] { for (int r = first; r < last; r++) for (int c = 0; c < 8; c++) { int64_t col = x + c * 16, row = y + r; uint8_t v[16]; for (int i = 0; i < 16; i++) v[i] = row >= 0 && row < m.rows && col + i < m.width ? m.m[row * m.pitch + col + i] : 0; memcpy(at(to + r * 128 + ((c ^ (r & 7)) * 16), b, 16), v, 16); }
        Bar& q = bar(barrier, b); q.tx -= (last - first) * 128; check(q); }); } } }
inline void tensor_load(uint32_t to, const CUtensorMap* map, int x, int y, uint32_t barrier) { tensor_load_multicast(to, map, x, y, barrier, 1 << cur->block); }
inline void bulk_load(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) { maybe(); if (to % 16 || (uintptr_t)from % 16 || bytes % 16 || !bytes) die("bulk copy alignment"); check_global(from, bytes, false, "bulk copy"); int b = cur->block; memset(at(to, b, bytes), 0x5b, bytes); later([=] { memcpy(at(to, b, bytes), from, bytes); Bar& q = bar(barrier, b); q.tx -= bytes; check(q); }); }
inline uint32_t cluster_address_of(uint32_t a, int r) { if (r < 0 || r >= cluster_size) die("rank"); return a | r << kRankShift; }
inline void send_bytes(uint32_t to, const void* v, int bytes, uint32_t on) { maybe(); if (to >> kRankShift != on >> kRankShift || to % bytes) die("send"); int r = to >> kRankShift; uint32_t mask = (1 << kRankShift) - 1; uint8_t copy[16]; memcpy(copy, v, bytes); uint4 c; memcpy(&c, copy, 16);
  bar(on & mask, r); later([=] { memcpy(at(to & mask, r, bytes), &c, bytes); Bar& x = bar(on & mask, r); x.tx -= bytes; check(x); }); }
template <int R> inline void registers_more() { warp_sync("setmaxnreg"); }
template <int R> inline void registers_fewer() { warp_sync("setmaxnreg"); }
// wgmma
inline void wgmma_fence() { cur->fenced = true; maybe(); }
inline void wgmma_commit() { cur->groups.push_back(cur->issued); maybe(); }
template <int N> inline void wgmma_wait() { Fiber& F = *cur; maybe(); if ((int)F.groups.size() <= N) return; long target = F.groups[F.groups.size() - 1 - N]; Group& g = blk().group[F.thread / 128];
  while ((long)g.done < target) wait_on(&g.done, g.done, "wgmma wait");
  for (size_t i = 0; i < F.acc.size();) { Acc& a = F.acc[i]; if (a.last < target) { const uint32_t* d = (const uint32_t*)a.d; for (int j = 0; j < a.bytes / 4; j++) if (d[j] != 0x7fdeadbe) die("sum register %d changed while wgmma was under way", j); memcpy(a.d, a.hidden.data(), a.bytes); F.acc.erase(F.acc.begin() + i); } else i++; }
  maybe(); }
inline uint64_t wgmma_descriptor(uint32_t a) { if (a % 1024) die("descriptor alignment"); return (static_cast<uint64_t>(1) << 62) | (static_cast<uint64_t>(1024 >> 4) << 32) | (static_cast<uint64_t>(1) << 16) | ((a & 0x3ffff) >> 4); }
inline void wgmma_issue(int kind, int n, void* d, uint64_t a, const uint32_t* const* areg, uint64_t b, bool accumulate) { maybe(); Fiber& F = *cur; Group& g = blk().group[F.thread / 128]; long at_op = F.issued++; int i = (int)(at_op - g.first); if (i < 0) die("wgmma order");
  if (!F.fenced) die("wgmma without a fence before it"); while ((int)g.ops.size() <= i) g.ops.emplace_back(); WOp& op = g.ops[i]; if (op.arrived == 0) { op.kind = kind; op.n = n; op.a = a; op.b = b; op.accumulate = accumulate; } else if (op.kind != kind || op.n != n || op.a != a || op.b != b || op.accumulate != accumulate) die("threads of a warpgroup disagree on a wgmma");
  int bytes = n * 2; Acc* acc = nullptr; for (auto& x : F.acc) if (x.d == d) acc = &x;
  if (!acc) { F.acc.push_back({d, bytes, 0, std::vector<uint32_t>(n / 2, 0x7fc00001)}); acc = &F.acc.back(); if (accumulate) memcpy(acc->hidden.data(), d, bytes); for (int j = 0; j < n / 2; j++) ((uint32_t*)d)[j] = 0x7fdeadbe; }
  else { if (acc->bytes != bytes) die("accumulator sizes"); const uint32_t* p = (const uint32_t*)d; for (int j = 0; j < n / 2; j++) if (p[j] != 0x7fdeadbe) die("sum register %d changed while wgmma was under way", j); }
  acc->last = at_op; op.d[F.thread % 128] = acc->hidden.data(); if (areg) for (int j = 0; j < 4; j++) op.areg[F.thread % 128][j] = areg[j]; op.arrived++; }
template <int R> inline void wgmma_s8(int32_t (&d)[R], uint64_t a, uint64_t b, bool acc) { wgmma_issue(0, R * 2, d, a, nullptr, b, acc); }
template <int R> inline void wgmma_bf16(float (&d)[R], uint64_t a, uint64_t b, bool acc) { wgmma_issue(1, R * 2, d, a, nullptr, b, acc); }
template <int R> inline void wgmma_f16(float (&d)[R], uint64_t a, uint64_t b, bool acc) { wgmma_issue(2, R * 2, d, a, nullptr, b, acc); }
template <int R> inline void wgmma_bf16(float (&d)[R], const uint32_t* const* a, uint64_t b, bool acc) { wgmma_issue(3, R * 2, d, 0, a, b, acc); }
template <int R> inline void wgmma_f16(float (&d)[R], const uint32_t* const* a, uint64_t b, bool acc) { wgmma_issue(4, R * 2, d, 0, a, b, acc); }
}  // namespace octolora::cuda::ptx
