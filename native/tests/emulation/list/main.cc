#include "src/emu.h"
#include "src/outliers.cc"
using namespace octolora; using namespace octolora::cuda; using emu::rng;
static int failures;
template <class X> void run_case(int seed, Dtype type) {
  rng.seed(seed); auto pick = [&](std::initializer_list<int> l) { return l.begin()[rng() % l.size()]; };
  const int m = pick({70, 133, 300}), k = pick({40, 72, 257, 1000, 3072, 5000, 40000}), kp = round_up(k, 16), bands = pick({1, 2, 5, 44, 128}), grid = pick({1, 2, 5}); const int count = std::min(k, pick({0, 0, 1, 16, 17, 21, 22, 63, 64, 65, 85, 86, 130, 255, 256, 257, 400, 1 << 20}));
  if ((int64_t)k * bands > 400000) return; 
  std::vector<int> all(k); for (int i = 0; i < k; i++) all[i] = i; std::shuffle(all.begin(), all.end(), rng); std::vector<int> cols(all.begin(), all.begin() + count); std::sort(cols.begin(), cols.end());
  PrepareArgs p; p.m = m; p.k = k; p.k_pitch = kp; p.x_type = type; const int words = (k + 31) / 32; p.outliers.words = words;
  auto* partial = (uint32_t*)emu::make("partial", (size_t)bands * words * 4, false, true); for (int c : cols) { partial[(rng() % bands) * words + c / 32] |= 1u << c % 32; if (rng() % 2) partial[(rng() % bands) * words + c / 32] |= 1u << c % 32; }
  auto* flags = (uint32_t*)emu::make("flags", words * 4, true, false); auto* list = (int32_t*)emu::make("list", k * 4, true, false); auto* n = (int32_t*)emu::make("count", 4, true, false); memset(flags, 0xcd, words * 4); memset(list, 0xcd, k * 4);
  p.outliers.partial = partial; p.outliers.flags = flags; p.outliers.list = list; p.outliers.count = n;
  auto* x = (X*)emu::make("x", (size_t)m * k * sizeof(X), false, false); for (size_t i = 0; i < (size_t)m * k; i++) { std::normal_distribution<float> g; if constexpr (sizeof(X) == 4) x[i] = g(rng) * 3; else ((uint16_t*)x)[i] = rng(); } p.x = x;
  p.member_count = pick({0, 1, 3}); int total = 0; std::vector<int8_t*> w; for (int i = 0; i < p.member_count; i++) { p.member[i].n = pick({8, 100, 264}); total += p.member[i].n; auto* q = (int8_t*)emu::make("w", (size_t)p.member[i].n * kp, false, false); for (size_t j = 0; j < (size_t)p.member[i].n * kp; j++) q[j] = rng(); p.member[i].weight = q; w.push_back(q); }
  uint16_t *xo = nullptr, *wo = nullptr; if (p.member_count) { xo = (uint16_t*)emu::make("x_o", (size_t)m * kOutlierColumns * 2, true, false); wo = (uint16_t*)emu::make("w_o", (size_t)total * kOutlierColumns * 2, true, false); memset(xo, 0xcd, (size_t)m * kOutlierColumns * 2); memset(wo, 0xcd, (size_t)total * kOutlierColumns * 2); p.outliers.x = xo; p.outliers.weight = wo; }
  emu::freeze(); emu::run(xo ? grid : 1, kListThreads, 1, 1024, [&] { list_kernel<X>(p, bands); });
  int bad = 0; auto wrong = [&](const char* s, int i, int j, int got, int want) { if (bad++ < 5) printf("  %s[%d,%d] = %x want %x\n", s, i, j, got, want); };
  if (*n != count) wrong("count", 0, 0, *n, count); for (int i = 0; i < count; i++) if (list[i] != cols[i]) wrong("list", i, 0, list[i], cols[i]);
  std::vector<uint32_t> f(words); for (int c : cols) f[c / 32] |= 1u << c % 32; for (int i = 0; i < words; i++) if (f[i] != flags[i]) wrong("flags", i, 0, flags[i], f[i]);
  const int pieces = sizeof(X) == 4 ? 3 : 1, end = std::min(kOutlierColumns, (count * pieces + 63) / 64 * 64);
  if (xo) { for (int i = 0; i < m; i++) for (int e = 0; e < kOutlierColumns; e++) { uint16_t want = 0; if (e >= end) want = 0xcdcd; else if (e / pieces < count) { size_t at = (size_t)i * k + cols[e / pieces]; if constexpr (sizeof(X) == 4) { float v = x[at]; for (int q = 0; q < e % 3; q++) v -= emu::d16(__bfloat16_as_ushort(__float2bfloat16_rn(v)), false); want = __bfloat16_as_ushort(__float2bfloat16_rn(v)); } else want = ((uint16_t*)x)[at]; } if (xo[(size_t)i * kOutlierColumns + e] != want) wrong("x_o", i, e, xo[(size_t)i * kOutlierColumns + e], want); }
    int row = 0; for (int q = 0; q < p.member_count; q++) for (int i = 0; i < p.member[q].n; i++, row++) for (int e = 0; e < kOutlierColumns; e++) { uint16_t want = 0; if (e >= end) want = 0xcdcd; else if (e / pieces < count) { float v = w[q][(size_t)i * kp + cols[e / pieces]]; want = std::is_same_v<X, __half> ? __half_as_ushort(__float2half_rn(v)) : __bfloat16_as_ushort(__float2bfloat16_rn(v)); } uint16_t got = wo[(size_t)row * kOutlierColumns + e]; if (got != want) wrong("w_o", row, e, got, want); } }
  emu::clear_regions(); printf("%s seed %d m %d k %d bands %d grid %d count %d members %d\n", bad ? "FAIL" : "ok", seed, m, k, bands, grid, count, p.member_count); fflush(stdout); failures += bad != 0; }
int main(int c, char** v) { for (int s = atoi(v[1]); s <= atoi(v[2]); s++) { if (s % 3 == 0) run_case<float>(s, Dtype::f32); if (s % 3 == 1) run_case<__half>(s, Dtype::f16); if (s % 3 == 2) run_case<__nv_bfloat16>(s, Dtype::bf16); } printf("%d failed\n", failures); return failures != 0; }
