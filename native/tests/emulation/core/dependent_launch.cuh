#pragma once
#include "emu.h"
#include "kernels.h"
namespace octolora::cuda {
inline void launch_dependents() {} inline void prefetch_l2(const void* p) { emu::region_of(p); }
inline void wait_for_primaries() { while (!emu::primaries_done) emu::wait_on(&emu::primaries_done, 0, "wait_for_primaries"); emu::maybe(); }
struct DependentLaunch { struct Config { int grid, threads, cluster, shared; cudaLaunchAttribute* attrs; int numAttrs; } config; cudaLaunchAttribute attributes[2]; DependentLaunch(int b, int t, int c, int s, cudaStream_t) { config = {b, t, c, s, nullptr, 0}; } };
template <class K, class... A> int emu_launch(const DependentLaunch::Config* c, K k, const A&... a) { emu::run(c->grid, c->threads, c->cluster, c->shared, [&] { k(a...); }); return 0; }
}
