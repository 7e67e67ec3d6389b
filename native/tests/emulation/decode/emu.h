#pragma once
#include <cuda.h>
#include <cuda_runtime.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <ucontext.h>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <vector>
#include <algorithm>
using std::min; using std::max;
namespace emu {
constexpr int kBlocks=8, kT=512; constexpr uint32_t kBase=4096;
struct Bar{ bool init=false; int count=0,pending=0; int64_t tx=0; unsigned phase=0; long completions=0; };
struct Warp{ alignas(16) uint8_t slot[32][64]; int arrived=0; unsigned gen=0; };
struct Named{ int arrived=0; unsigned gen=0; };
struct Block{ std::vector<uint8_t> mem; uint8_t* base; Bar bars[64]; Warp warps[16]; Named named[16]; int cl_arrived=0; bool exited=false; };
struct Fiber{ ucontext_t ctx; char* stack; int block, thread; bool done=true; const char* where=""; };
extern Block blocks[kBlocks]; extern Fiber fibers[kBlocks*kT]; extern Fiber* cur; extern ucontext_t main_ctx; extern std::mt19937 rng;
extern int cl_arrived; extern unsigned cl_gen; extern unsigned cl_seen[kBlocks*kT];
struct Pending{ int when; std::function<void()> f; }; extern std::vector<Pending> pending; extern int now; extern int bx, gx; extern int bar_at; extern int exited[kBlocks];
inline void yield(const char* w){ cur->where=w; Fiber* me=cur; swapcontext(&me->ctx,&main_ctx); }
inline Block& blk(){ return blocks[cur->block]; }
inline uint8_t* shared(){ return blk().base; }
inline uint8_t* at(uint32_t a,int b){ return blocks[b].base+(a-kBase); }
inline uint32_t local(uint32_t a){ return a&0xfffff; }
inline Bar& bar(uint32_t a,int b){ int i=((int)(local(a)-kBase)-bar_at)/8; if(i<0||i>=64||(local(a)-kBase-bar_at)%8){printf("bad barrier address %u\n",a);abort();} return blocks[b].bars[i]; }
inline void check(Bar&x){ if(x.pending<0){printf("too many arrivals\n");abort();} if(x.pending==0&&x.tx==0){ x.phase^=1; x.pending=x.count; x.completions++; } }
inline void later(std::function<void()> f){ pending.push_back({now+(int)(rng()%40),f}); }
struct Idx{unsigned x,y,z;};
inline Idx tid(){ return {(unsigned)cur->thread,0,0}; } inline Idx bid(){ return {(unsigned)(bx*8+cur->block),0,0}; } inline Idx gdim(){ return {(unsigned)gx,1,1}; }
inline Warp& warp(){ return blk().warps[cur->thread/32]; }
inline void warp_sync(const char*w){ Warp&W=warp(); unsigned g=W.gen; if(++W.arrived==32){W.arrived=0;W.gen++;} else while(W.gen==g) yield(w); }
template<class T,class F> auto collective(const T& v,F f,const char*w){ Warp&W=warp(); int l=cur->thread%32; static_assert(sizeof(T)<=64); memcpy(W.slot[l],&v,sizeof v); warp_sync(w); T all[32]; for(int i=0;i<32;i++) memcpy(&all[i],W.slot[i],sizeof(T)); auto r=f(all,l); warp_sync(w); return r; }
inline void named(int n,int threads,bool wait){ Named&N=blk().named[n]; unsigned g=N.gen; if(++N.arrived==threads){N.arrived=0;N.gen++;} else if(wait) while(N.gen==g) yield("named"); }
}
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__
#define threadIdx (emu::tid())
#define blockIdx (emu::bid())
#define gridDim (emu::gdim())
inline void __syncwarp(){ emu::warp_sync("syncwarp"); }
inline void __syncthreads(){ emu::named(0,emu::kT,true); }
template<class T> T __shfl_sync(unsigned,T v,int src){ return emu::collective(v,[&](T*a,int){return a[src&31];},"shfl"); }
template<class T> T __shfl_xor_sync(unsigned,T v,int x){ return emu::collective(v,[&](T*a,int l){return a[l^x];},"shflx"); }
template<class T> T __shfl_up_sync(unsigned,T v,int x,int){ return emu::collective(v,[&](T*a,int l){return a[l>=x?l-x:l];},"shflu"); }
inline unsigned __ballot_sync(unsigned,int p){ return emu::collective(p,[&](int*a,int){unsigned r=0; for(int i=0;i<32;i++) r|=(a[i]?1u:0)<<i; return r;},"ballot"); }
inline bool __all_sync(unsigned m,int p){ return __ballot_sync(m,p)==~0u; }
inline bool __any_sync(unsigned m,int p){ return __ballot_sync(m,p)!=0; }
template<class T> T __reduce_max_sync(unsigned,T v){ return emu::collective(v,[&](T*a,int){T r=a[0]; for(int i=1;i<32;i++) r=std::max(r,a[i]); return r;},"redux"); }
inline int __reduce_max_sync(unsigned m,int v){ return __reduce_max_sync<int>(m,v); }
template<class T> T __ldcg(const T*p){ return *p; }
template<class T> T __ldg(const T*p){ return *p; }
inline unsigned __vmaxu2(unsigned a,unsigned b){ return std::max(a&0xffff,b&0xffff)|(std::max(a>>16,b>>16)<<16); }
inline unsigned __byte_perm(unsigned a,unsigned b,unsigned s){ uint64_t v=a|((uint64_t)b<<32); unsigned r=0; for(int i=0;i<4;i++) r|=(unsigned)((v>>(8*((s>>(4*i))&7)))&255)<<(8*i); return r; }
inline unsigned __float_as_uint(float f){ unsigned u; memcpy(&u,&f,4); return u; } inline float __uint_as_float(unsigned u){ float f; memcpy(&f,&u,4); return f; }
inline float __fdiv_rn(float a,float b){return a/b;} inline float __fmul_rn(float a,float b){return a*b;} inline float __fadd_rn(float a,float b){ volatile float r=a+b; return r;}
inline int __ffs(int v){return __builtin_ffs(v);}
