#include "src/emu.h"
#include "src/gemm_sm90.cc"
using namespace octolora; using namespace octolora::cuda; using emu::rng;
static double gauss() { static std::normal_distribution<float> n; return n(rng); }
static uint16_t enc(float v, bool f16) { return f16 ? __half_as_ushort(__float2half_rn(v)) : __bfloat16_as_ushort(__float2bfloat16_rn(v)); }
static float dec(uint16_t b, bool f16) { return emu::d16(b, f16); }
struct SlotSpec { int rank; bool f16; bool bias; float scale; };
struct Out { int n; std::vector<SlotSpec> slots; bool bias = true; Activation act = Activation::none; bool residual = false, gate = false; bool split = false; };
struct Case { int m, k; std::vector<Out> outs; int rows_slots = 0; /*0 none, 1 blocks, 2 shuffled, 3 -1 everywhere, 4 blocks with holes*/ bool f16 = false; int sms = 4; int outliers = -1; bool inplace = false; Dtype raw = Dtype::bf16; };
enum Kind { t192, t224, t256, t128x192, t128 };
static int failures = 0;
static const char* kAfterName(const GemmArgs& g) { static const char* n[] = {"nothing", "slots_of_rows", "outliers", "residual", "gelu_tanh", "gelu_erf", "silu", "anything", "anything_and_outliers"}; return n[(int)after(g)]; }
template <class C, After A> static void go(const GemmArgs& g, const Limits& L) {
  const bool wide = is_wide(g);
  if (wide) cuda::launch<C, true, A>(g, L, nullptr); else cuda::launch<C, false, A>(g, L, nullptr); }
#ifndef TILES
#define TILES 7
#endif
static bool dispatch(Kind t, const GemmArgs& g, const Limits& L) {
  After a = after(g); const bool wide = is_wide(g);
#if TILES & 1
  if (t == t192) { using C = Config<192, 192>; switch (a) { case After::outliers: if (wide) return false; cuda::launch<C, false, After::outliers>(g, L, nullptr); return true;
 case After::nothing: go<C, After::nothing>(g, L); return true;
      case After::residual: if (wide) return false; cuda::launch<C, false, After::residual>(g, L, nullptr); return true;
      case After::gelu_tanh: if (wide) return false; cuda::launch<C, false, After::gelu_tanh>(g, L, nullptr); return true;
      case After::gelu_erf: if (wide) return false; cuda::launch<C, false, After::gelu_erf>(g, L, nullptr); return true; default: return false; } }
#endif
#if TILES & 2
  if (t == t224) { using C = Config<128, 224>; switch (a) { case After::outliers: go<C, After::outliers>(g, L); return true; case After::nothing: go<C, After::nothing>(g, L); return true; case After::slots_of_rows: go<C, After::slots_of_rows>(g, L); return true;
      case After::residual: go<C, After::residual>(g, L); return true; case After::gelu_tanh: go<C, After::gelu_tanh>(g, L); return true; case After::anything: go<C, After::anything>(g, L); return true; default: return false; } }
#endif
#if TILES & 4
  if (t == t256) { using C = Config<128, 256>; switch (a) { case After::outliers: if (wide) return false; cuda::launch<C, false, After::outliers>(g, L, nullptr); return true; case After::nothing: go<C, After::nothing>(g, L); return true; case After::slots_of_rows: go<C, After::slots_of_rows>(g, L); return true; default: return false; } }
#endif
#if TILES & 8
  if (t == t128x192) { using C = Config<128, 192>; switch (a) { case After::anything_and_outliers: go<C, After::anything_and_outliers>(g, L); return true; case After::nothing: go<C, After::nothing>(g, L); return true; case After::slots_of_rows: go<C, After::slots_of_rows>(g, L); return true; case After::residual: go<C, After::residual>(g, L); return true; case After::outliers: go<C, After::outliers>(g, L); return true; case After::anything: go<C, After::anything>(g, L); return true; default: return false; } }
  if (t == t128) { using C = Config<128, 128>; switch (a) { case After::anything_and_outliers: go<C, After::anything_and_outliers>(g, L); return true; case After::nothing: go<C, After::nothing>(g, L); return true; case After::slots_of_rows: go<C, After::slots_of_rows>(g, L); return true; case After::outliers: go<C, After::outliers>(g, L); return true; default: go<C, After::anything>(g, L); return true; } }
#endif
  return false; }
static int run_case(const char* name, Kind tile, const Case& c) {
  GemmArgs g; const int m = c.m, k = c.k, kp = round_up(k, 16); g.m = m; g.k = k; g.k_pitch = kp; g.x_pitch = kp; g.y_type = c.f16 ? Dtype::f16 : Dtype::bf16; g.member_count = c.outs.size();
  auto* q = (int8_t*)emu::make("q", (size_t)m * kp, false, true); for (int i = 0; i < m; i++) for (int j = 0; j < k; j++) q[(size_t)i * kp + j] = (int)(rng() % 255) - 127; g.x = q;
  auto* rows = (RowScale*)emu::make("rows", sizeof(RowScale) * m, false, true); for (int i = 0; i < m; i++) rows[i] = {0.01f * (1 + i % 7), std::ldexp(1.f, (int)(rng() % 7) - 3)}; g.rows = rows;
  int32_t* row_slot = nullptr; int max_slots = 0; for (auto& o : c.outs) max_slots = std::max<int>(max_slots, o.slots.size());
  if (c.rows_slots) { row_slot = (int32_t*)emu::make("row_slot", 4 * m, false, true); g.row_slot = row_slot; for (int i = 0; i < m; i++) row_slot[i] = c.rows_slots == 1 ? (int)((int64_t)i * max_slots / m) : c.rows_slots == 2 ? (int)(rng() % (max_slots + 1)) - 1 : c.rows_slots == 3 ? -1 : i / 100 % 3 ? -1 : i / 150 % max_slots; }
  std::vector<int> outl; const void* raw = nullptr;

  const bool xf16 = c.raw == Dtype::f16, x32 = c.raw == Dtype::f32; std::vector<float> xv; uint16_t *xo = nullptr, *wo = nullptr; int wo_row = 0; const int pieces = x32 ? 3 : 1;
  if (c.outliers >= 0) { std::vector<int> all(k); for (int j = 0; j < k; j++) all[j] = j; std::shuffle(all.begin(), all.end(), rng); outl.assign(all.begin(), all.begin() + std::min(k, c.outliers)); std::sort(outl.begin(), outl.end());
    auto* list = (int32_t*)emu::make("outliers", 4 * std::max<size_t>(1, outl.size()), false, true); memcpy(list, outl.data(), 4 * outl.size()); auto* count = (int32_t*)emu::make("count", 4, false, true); *count = outl.size(); g.outliers.list = list; g.outliers.count = count;
    const size_t es = x32 ? 4 : 2; auto* x = (uint8_t*)emu::make("raw x", (size_t)m * k * es, false, true); xv.resize((size_t)m * k); for (size_t i = 0; i < (size_t)m * k; i++) { float v = gauss() * 5; if (x32) { memcpy(x + 4 * i, &v, 4); xv[i] = v; } else { uint16_t e = enc(v, xf16); memcpy(x + 2 * i, &e, 2); xv[i] = dec(e, xf16); } } g.raw_x = x; g.raw_type = c.raw;
    for (int i = 0; i < m; i++) for (int j : outl) q[(size_t)i * kp + j] = 0;
    int total = 0; for (auto& o : c.outs) total += o.n; xo = (uint16_t*)emu::make("x_o", (size_t)m * kOutlierColumns * 2, false, true); wo = (uint16_t*)emu::make("w_o", (size_t)total * kOutlierColumns * 2, false, true); memset(xo, 0xff, (size_t)m * kOutlierColumns * 2); memset(wo, 0xff, (size_t)total * kOutlierColumns * 2); g.outliers.x = xo; g.outliers.weight = wo;
    const int end = std::min((int)(outl.size() * pieces + 63) / 64 * 64, kOutlierColumns);
    for (int i = 0; i < m; i++) for (int e = 0; e < end; e++) { uint16_t v = 0; if (e / pieces < (int)outl.size()) { float t = xv[(size_t)i * k + outl[e / pieces]]; if (x32) for (int p = 0; p < e % 3; p++) t -= dec(enc(t, false), false); v = enc(t, xf16); } xo[(size_t)i * kOutlierColumns + e] = v; } }
  struct Ref { std::vector<double> want, tol; uint16_t* y; }; std::vector<Ref> refs(c.outs.size());
  for (size_t e = 0; e < c.outs.size(); e++) { const Out& o = c.outs[e]; GemmMember& M = g.member[e]; const int n = o.n; M.n = n; auto* w = (int8_t*)emu::make("weight", (size_t)n * kp, false, false); for (int i = 0; i < n; i++) for (int j = 0; j < k; j++) w[(size_t)i * kp + j] = (int)(rng() % 255) - 127; M.weight = w; if (wo) { const int end = std::min((int)(outl.size() * pieces + 63) / 64 * 64, kOutlierColumns); for (int i = 0; i < n; i++, wo_row++) for (int e = 0; e < end; e++) wo[(size_t)wo_row * kOutlierColumns + e] = e / pieces < (int)outl.size() ? enc(w[(size_t)i * kp + outl[e / pieces]], xf16) : 0; }
    auto* s = (float*)emu::make("scale", n * 4, false, false); auto* bias = (float*)emu::make("bias", n * 4, false, true); for (int i = 0; i < n; i++) { s[i] = 0.003f * (1 + i % 5); bias[i] = gauss() * 3; } M.scale = s; M.bias = o.bias ? bias : nullptr;
    Ref& R = refs[e]; R.want.assign((size_t)m * n, 0); R.tol.assign((size_t)m * n, 0);
    AdapterView v; const int up = o.split ? 48 : 16; std::vector<Chunk> chunks; for (size_t si = 0; si < o.slots.size(); si++) for (int r0 = 0; r0 < o.slots[si].rank; r0 += 16) { Chunk ch{}; ch.up = chunks.size() * up; ch.slot = si; ch.ranks = std::min(16, o.slots[si].rank - r0); ch.b_f16 = o.slots[si].f16; ch.split = o.split; chunks.push_back(ch); }
    v.chunk_count = chunks.size(); v.up_columns = chunks.size() * up; v.slot_count = o.slots.size(); uint16_t *b = nullptr, *h = nullptr; Chunk* dch = nullptr; float* sc = nullptr; float* sb = nullptr; int32_t* hb = nullptr;
    if (v.chunk_count) { b = (uint16_t*)emu::make("b", (size_t)n * v.up_columns * 2, false, true); h = (uint16_t*)emu::make("h", (size_t)m * v.up_columns * 2, false, true); dch = (Chunk*)emu::make("chunks", sizeof(Chunk) * chunks.size(), false, true); memcpy(dch, chunks.data(), sizeof(Chunk) * chunks.size()); sc = (float*)emu::make("scales", 4 * v.slot_count, false, true); hb = (int32_t*)emu::make("has_bias", 4 * v.slot_count, false, true); sb = (float*)emu::make("slot_bias", (size_t)4 * v.slot_count * n, false, true);
      for (int i = 0; i < v.slot_count; i++) { sc[i] = o.slots[i].scale; hb[i] = o.slots[i].bias; for (int j = 0; j < n; j++) sb[(size_t)i * n + j] = gauss() * 2; }
      for (auto& ch : chunks) for (int r = 0; r < up; r++) { const int col = ch.up + r; if (r % 16 >= ch.ranks) continue; for (int i = 0; i < n; i++) b[(size_t)i * v.up_columns + col] = enc(gauss(), ch.b_f16); for (int i = 0; i < m; i++) if (!row_slot || row_slot[i] == ch.slot) h[(size_t)i * v.up_columns + col] = enc(gauss() * 20, ch.b_f16); }
      v.b = b; v.chunks = dch; v.scale = sc; v.has_bias = hb; v.slot_bias = sb; M.adapters = v; M.h = h;
      if (row_slot) { const int words = needed_words(v.up_columns), sw = slot_words(v.up_columns), tiles = (m + kSlotRows - 1) / kSlotRows; auto* ns = (uint32_t*)emu::make("needed", (size_t)tiles * sw * 4, false, true); for (int t = 0; t < tiles; t++) { for (int st = 0; st < v.up_columns / 16; st++) { const Chunk& ch = chunks[st * 16 / up]; bool need = false; for (int i = t * kSlotRows; i < std::min(m, (t + 1) * kSlotRows); i++) need |= row_slot[i] == ch.slot; if (need) ns[t * sw + st / 32] |= 1u << st % 32; } for (int i = t * kSlotRows; i < std::min(m, (t + 1) * kSlotRows); i++) if (row_slot[i] >= 0 && row_slot[i] < v.slot_count && hb[row_slot[i]]) ns[t * sw + words] = 1; } M.needed_steps = ns; } }
    M.activation = o.act; auto* y = (uint16_t*)emu::make("y", (size_t)m * n * 2, true, false); memset(y, 0xff, (size_t)m * n * 2); M.y = y; R.y = y; uint16_t *res = nullptr, *gate = nullptr;
    if (o.residual) { res = c.inplace ? y : (uint16_t*)emu::make("residual", (size_t)m * n * 2, false, true); for (int i = 0; i < m * n; i++) res[i] = enc(gauss() * 10, c.f16); M.residual = res; }
    if (o.gate) { gate = (uint16_t*)emu::make("gate", n * 2, false, true, n % 2 ? 4 : 256); for (int i = 0; i < n; i++) gate[i] = enc(gauss(), c.f16); M.gate = gate; }
    std::vector<float> hf((size_t)m * v.up_columns), bf((size_t)n * v.up_columns); for (int j = 0; j < v.up_columns; j++) { bool f = chunks[j / up].b_f16; for (int i = 0; i < m; i++) hf[(size_t)i * v.up_columns + j] = dec(h[(size_t)i * v.up_columns + j], f); for (int i = 0; i < n; i++) bf[(size_t)i * v.up_columns + j] = dec(b[(size_t)i * v.up_columns + j], f); }
    for (int i = 0; i < m; i++) for (int j = 0; j < n; j++) { int sum = 0; const int8_t *qi = q + (size_t)i * kp, *wj = w + (size_t)j * kp; for (int x = 0; x < k; x++) sum += (int)qi[x] * wj[x]; double base = (double)sum * s[j] * rows[i].scale, mag = std::fabs(base), lr = 0; const float *hh = hf.data() + (size_t)i * v.up_columns, *bb = bf.data() + (size_t)j * v.up_columns; double lm = 0; for (int x = 0; x < v.up_columns; x++) { lr += (double)hh[x] * bb[x]; lm += std::fabs(hh[x] * bb[x]); } lr *= rows[i].power; lm *= rows[i].power;
        for (int x : outl) { double t = (double)xv[(size_t)i * k + x] * wj[x] * s[j]; base += t; mag += std::fabs(t); }
        double val = base + lr + (o.bias ? bias[j] : 0); if (row_slot && v.chunk_count && row_slot[i] >= 0 && row_slot[i] < v.slot_count && hb[row_slot[i]]) { val += (double)sc[row_slot[i]] * sb[(size_t)row_slot[i] * n + j]; mag += 3; } double tol = (2e-6 + outl.size() * 1.2e-7) * (mag + lm + std::fabs(val)) + 1e-6;
        if (o.act == Activation::gelu_tanh) { val = 0.5 * val * (1 + std::tanh(std::sqrt(2 / M_PI) * (val + 0.044715 * val * val * val))); tol = tol * 1.2 + 1e-6; } if (o.act == Activation::gelu_erf) { val = 0.5 * val * std::erfc(-val / std::sqrt(2.)); tol = tol * 1.2 + 3e-6; } if (o.act == Activation::silu) { val = val / (1 + std::exp(-val)); tol = 1.2 * tol + 1e-6; }
        if (o.gate) { val *= dec(gate[j], c.f16); tol *= std::fabs(dec(gate[j], c.f16)) + 1e-6; } if (o.residual) val += dec(res[(size_t)i * n + j], c.f16); tol += std::fabs(val) * (c.f16 ? 0x1p-11 : 0x1p-8) * 1.01 + 1e-6; R.want[(size_t)i * n + j] = val; R.tol[(size_t)i * n + j] = tol; } }
  emu::freeze(); Limits L{}; L.capability = 90; L.multiprocessors = c.sms; L.shared_bytes = 232448; if (const char* why = refuses(g, L)) { printf("%s: refused (%s)\n", name, why); emu::clear_regions(); return 0; }
  long before = emu::switches; if (!dispatch(tile, g, L)) {  emu::clear_regions(); return 0; }
  int bad = 0; double worst = 0; for (size_t e = 0; e < refs.size(); e++) { const int n = c.outs[e].n; for (int i = 0; i < m; i++) for (int j = 0; j < n; j++) { double got = dec(refs[e].y[(size_t)i * n + j], c.f16), d = std::fabs(got - refs[e].want[(size_t)i * n + j]) / refs[e].tol[(size_t)i * n + j]; if (!(d <= 1)) { if (bad++ < 4) printf("\n  output %zu y[%d,%d] = %g want %g tol %g", e, i, j, got, refs[e].want[(size_t)i * n + j], refs[e].tol[(size_t)i * n + j]); } if (d == d) worst = std::max(worst, d); } }
  emu::clear_regions(); printf("%s %s%s, %s: worst %.2f of the tolerance, %ld switches%s\n", bad ? "FAIL" : "ok", name, is_wide(g) ? " wide" : "", kAfterName(g), worst, emu::switches - before, bad ? " ****" : ""); if (bad) printf("  %d wrong\n", bad); fflush(stdout); failures += bad != 0; if (bad && getenv("FIRST")) { fflush(stdout); _exit(4); } return bad; }
int main(int argc, char** argv) {
  const int seed = argc > 1 ? atoi(argv[1]) : 1; const char* filter = argc > 2 ? argv[2] : ""; int index = 0;
  auto t = [&](const char* name, Kind tile, Case c) { index++; if (!strstr(name, filter)) return; rng.seed(seed * 1000 + index); run_case(name, tile, c); };
  auto slots = [](std::vector<int> ranks, bool bias = false) { std::vector<SlotSpec> s; for (size_t i = 0; i < ranks.size(); i++) s.push_back({ranks[i], i % 2 == 1, bias && i % 3 != 2, 0.5f + i}); return s; };
#include "cases2.inc"
  printf("%d failed\n", failures); return failures != 0; }
