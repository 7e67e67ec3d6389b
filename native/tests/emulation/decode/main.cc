#include "emu.h"
#include "kernels.h"
namespace emu { Block blocks[kBlocks]; Fiber fibers[kBlocks*kT]; Fiber*cur; ucontext_t main_ctx; std::mt19937 rng(1); int cl_arrived; unsigned cl_gen; unsigned cl_seen[kBlocks*kT]; std::vector<Pending> pending; int now,bx,gx,bar_at; int exited[kBlocks]; }
using namespace emu;
static std::function<void()>* job;
static void entry(){ (*job)(); cur->done=true; exited[cur->block]++; swapcontext(&cur->ctx,&main_ctx); }
long switches=0;
void emu_run(int grid,int shared,int barriers,std::function<void()> f){ job=&f; gx=grid; bar_at=barriers; if(grid%8) abort(); if(shared>232448){printf("too much shared memory\n");abort();}
  for(bx=0;bx<grid/8;bx++){ pending.clear(); now=0; cl_arrived=0; cl_gen=1;
    for(int b=0;b<8;b++){ exited[b]=0; blocks[b].mem.assign(shared+1024,0xee); blocks[b].base=(uint8_t*)(((uintptr_t)blocks[b].mem.data()+1023)&~uintptr_t(1023)); for(auto&x:blocks[b].bars)x=Bar(); for(auto&w:blocks[b].warps){w.arrived=0;w.gen=0;} for(auto&n:blocks[b].named)n=Named(); }
    // canary behind
    for(int i=0;i<8*kT;i++){ Fiber&F=fibers[i]; if(!F.stack) F.stack=(char*)aligned_alloc(4096,96<<10); getcontext(&F.ctx); F.ctx.uc_stack.ss_sp=F.stack; F.ctx.uc_stack.ss_size=96<<10; F.ctx.uc_link=nullptr; F.block=i/kT; F.thread=i%kT; F.done=false; makecontext(&F.ctx,entry,0); }
    int left=8*kT; std::vector<int> order(128); for(int i=0;i<128;i++)order[i]=i; long idle=0; 
    while(left){ now++; std::shuffle(order.begin(),order.end(),rng); 
      for(size_t i=0;i<pending.size();){ if(pending[i].when<=now){ auto g=std::move(pending[i].f); pending[i]=std::move(pending.back()); pending.pop_back(); g(); } else i++; }
      int before=left; unsigned prob=rng()%4;
      for(int w:order){ if(rng()%4<prob) continue; for(int l=0;l<32;l++){ Fiber&F=fibers[w*32+l]; if(F.done)continue; cur=&F; swapcontext(&main_ctx,&F.ctx); switches++; if(F.done)left--; } }
      if(left==before){ if(++idle>400000){ printf("DEADLOCK\n"); for(int i=0;i<8*kT;i+=32) if(!fibers[i].done) printf("block %d warp %d: %s\n",i/kT,i%kT/32,fibers[i].where); abort(); } } else idle=0; }
    if(!pending.empty()){ printf("%zu still under way at the end\n",pending.size()); abort(); }
    for(int b=0;b<8;b++) for(int i=0;i<64;i++){ Bar&x=blocks[b].bars[i]; if(x.init&&(x.tx||x.pending!=x.count)){ printf("block %d barrier %d not idle at the end: tx %ld pending %d of %d\n",b,i,(long)x.tx,x.pending,x.count); } }
  } }
using namespace octolora; using namespace octolora::cuda;
float gauss(){ static std::mt19937 g(7); static std::normal_distribution<float> n; return n(g); }
uint16_t enc(float v,bool f16){ return f16?__half_as_ushort(__float2half_rn(v)):__bfloat16_as_ushort(__float2bfloat16_rn(v)); }
float dec(uint16_t b,bool f16){ return f16?__half2float(__ushort_as_half(b)):__bfloat162float(__ushort_as_bfloat16(b)); }
struct Slot{ int rank; bool a16,b16; float scale; bool bias; };
struct Mem{ int n; std::vector<Slot> slots; bool split; bool bias; };
int run(int m,int k,bool xf16,std::vector<Mem> mems,int mode,bool after,Dtype yt){
  int kp=(k+15)/16*16; PrepareArgs p; GemmArgs g; std::vector<uint16_t> x((size_t)m*k+64); uint16_t*xp=(uint16_t*)(((uintptr_t)x.data()+15)&~uintptr_t(15)); std::vector<float> xf((size_t)m*k);
  for(int i=0;i<m*k;i++){ xp[i]=enc(gauss()*(1+i/k%5),xf16); xf[i]=dec(xp[i],xf16);} p.x=xp; p.x_type=xf16?Dtype::f16:Dtype::bf16; p.m=g.m=m; p.k=g.k=k; p.k_pitch=g.k_pitch=kp; p.spec.k=k; p.spec.mode=mode==1?Mode::fixed:Mode::dynamic; p.spec.x_scale=0.05f; if(mode==2)p.spec.x_divisor=127.5f; if(mode==3)p.spec.round_x_to_f16=true; p.member_count=g.member_count=mems.size(); g.y_type=yt; p.q=(int8_t*)256;
  std::vector<std::vector<uint8_t>> keep; auto alloc=[&](size_t b){ keep.emplace_back(b+16); return (void*)(((uintptr_t)keep.back().data()+15)&~uintptr_t(15)); }; keep.reserve(200);
  struct Ref{ std::vector<double> want,tol; void*y; }; std::vector<Ref> refs;
  // codes
  std::vector<int> q((size_t)m*k); std::vector<double> sx(m);
  for(int r=0;r<m;r++){ float mx=0; auto ms=[&](float v){return mode==3?__half2float(__float2half_rn(v)):v;}; for(int i=0;i<k;i++) mx=std::max(mx,fabsf(ms(xf[r*k+i]))); float sc=mx/p.spec.x_divisor,f=p.spec.x_divisor/mx; if(mode==1) sc=p.spec.x_scale; sx[r]=sc; for(int i=0;i<k;i++){ float v=ms(xf[r*k+i]); v=mode==1?v/p.spec.x_scale:v*f; v=std::nearbyint(v); q[r*k+i]=(int)std::min(127.f,std::max(-128.f,v)); } }
  for(size_t e=0;e<mems.size();e++){ Mem&M=mems[e]; int n=M.n; GemmMember&o=g.member[e]; PrepareMember&pm=p.member[e]; auto*w=(int8_t*)alloc((size_t)n*kp); memset(w,0,(size_t)n*kp); for(int i=0;i<n;i++)for(int j=0;j<k;j++) w[(size_t)i*kp+j]=(int8_t)(rng()%255-127); auto*s=(float*)alloc(n*4); auto*bias=(float*)alloc(n*4); for(int i=0;i<n;i++){s[i]=0.01f*(1+i%3);bias[i]=gauss();} o.weight=w;o.n=pm.n=n;o.scale=s; if(M.bias) pm.bias=bias; o.bias=M.bias?bias:nullptr;
    AdapterView v; std::vector<Chunk>*ch=new std::vector<Chunk>; int per=M.split?32:16,up=M.split?48:16; int nch=0; for(auto&sl:M.slots) nch+=(sl.rank+15)/16; v.chunk_count=nch; v.down_columns=nch*per; v.up_columns=nch*up; v.slot_count=M.slots.size(); int st=(k+31)/32; auto*a=(uint16_t*)alloc((size_t)v.down_columns*st*32*2+16); memset(a,0,(size_t)v.down_columns*st*64); auto*b=(uint16_t*)alloc((size_t)n*v.up_columns*2+16); memset(b,0,(size_t)n*v.up_columns*2); auto*scale=(float*)alloc(64*4); auto*hb=(int32_t*)alloc(64*4); auto*sb=(float*)alloc((size_t)(M.slots.size()+1)*n*4);
    Ref ref; ref.want.assign((size_t)m*n,0); ref.tol.assign((size_t)m*n,0); std::vector<double> slotb(n,0);
    for(size_t si=0,c=0;si<M.slots.size();si++){ Slot&sl=M.slots[si]; scale[si]=sl.scale; hb[si]=sl.bias; for(int i=0;i<n;i++){ sb[si*n+i]=gauss(); if(sl.bias) slotb[i]+=sl.scale*sb[si*n+i]; }
      for(int r0=0;r0<sl.rank;r0+=16,c++){ Chunk k_{}; k_.down=c*per;k_.up=c*up;k_.slot=si;k_.split=M.split;k_.ranks=std::min(16,sl.rank-r0);k_.exponent=(int)(c%3);k_.range=3;k_.a_f16=sl.a16;k_.b_f16=sl.b16; ch->push_back(k_);
        for(int r=0;r<k_.ranks;r++){ std::vector<double> A(k),B(n); for(int i=0;i<k;i++){ float f=gauss()/sqrtf(k); uint16_t hi=enc(f,sl.a16); float t=dec(hi,sl.a16); auto put=[&](int col,uint16_t bits){ int oct=col/8,gg=col%8,step=i/32,o32=i%32; int part=o32/8,tt=o32%8/2; a[(((size_t)oct*st+step)*32+gg*4+tt)*8+part*2+o32%2]=bits; }; put(k_.down+r,hi); A[i]=t; if(M.split){ uint16_t lo=enc(f-t,sl.a16); put(k_.down+16+r,lo); A[i]+=dec(lo,sl.a16);} }
          for(int i=0;i<n;i++){ float f=gauss()*0.3f; uint16_t hi=enc(f,sl.b16); B[i]=dec(hi,sl.b16); b[(size_t)i*v.up_columns+k_.up+r]=hi; if(M.split){ uint16_t lo=enc(f-B[i],sl.b16); // (h_hi+h_lo)(b_hi+b_lo): columns h_hi b_hi, h_lo b_hi, h_hi b_lo
              b[(size_t)i*v.up_columns+k_.up+16+r]=hi; b[(size_t)i*v.up_columns+k_.up+32+r]=lo; B[i]+=dec(lo,sl.b16);} }
          for(int r2=0;r2<m;r2++){ double h=0; for(int i=0;i<k;i++) h+=A[i]*xf[r2*k+i]; h*=scale[si]*std::ldexp(1.0,-k_.exponent); for(int i=0;i<n;i++){ ref.want[(size_t)r2*n+i]+=h*B[i]; ref.tol[(size_t)r2*n+i]+=std::fabs(h*B[i])*(M.split?1e-4:sl.b16?6e-4:5e-3); } } } } }
    v.a=(uint4*)a; v.b=b; v.chunks=ch->data(); v.scale=scale; v.has_bias=hb; v.slot_bias=sb; if(nch){ pm.adapters=o.adapters=v; pm.total_bias=(float*)256; pm.h=(uint16_t*)256; o.bias=(float*)256; } 
    int eb=yt==Dtype::f32?4:2; auto*y=(uint8_t*)alloc((size_t)m*n*eb); memset(y,0xff,(size_t)m*n*eb); o.y=y; ref.y=y; float*res=nullptr; if(after){ auto*r=(uint8_t*)alloc((size_t)m*n*eb); for(int i=0;i<m*n;i++){ float f=gauss(); if(eb==4)((float*)r)[i]=f; else ((uint16_t*)r)[i]=enc(f,yt==Dtype::f16);} o.residual=r; }
    for(int r=0;r<m;r++)for(int i=0;i<n;i++){ long sum=0; for(int j=0;j<k;j++) sum+=q[r*k+j]*w[(size_t)i*kp+j]; double base=(double)sum*sx[r]*s[i]; double&t=ref.want[(size_t)r*n+i]; t+=base+(M.bias?bias[i]:0)+(nch?slotb[i]:0); ref.tol[(size_t)r*n+i]+=1e-5*std::fabs(base)+1e-4; if(after) t+=eb==4?((float*)o.residual)[r*n+i]:dec(((uint16_t*)o.residual)[r*n+i],yt==Dtype::f16); if(eb==2) ref.tol[(size_t)r*n+i]+=std::fabs(t)*(yt==Dtype::f16?6e-4:4.2e-3); }
    refs.push_back(ref); }
  Limits L{}; L.capability=90;L.multiprocessors=132;L.shared_bytes=232448;L.sliced_clusters=getenv("CL")?atoi(getenv("CL")):3; 
  if(!decode_sliced_takes(p,g,L)){ printf("refused\n"); return 2; }
  switches=0; launch_decode_sliced(p,g,L,nullptr);
  int bad=0; double worst=0; for(size_t e=0;e<refs.size();e++){ int n=mems[e].n; for(int r=0;r<m;r++)for(int i=0;i<n;i++){ double got=yt==Dtype::f32?((float*)refs[e].y)[r*n+i]:dec(((uint16_t*)refs[e].y)[r*n+i],yt==Dtype::f16); double w=refs[e].want[(size_t)r*n+i],d=std::fabs(got-w)/refs[e].tol[(size_t)r*n+i]; if(!(d<=1)){ if(bad++<(getenv("V")?atoi(getenv("V")):5)) printf("  member %zu y[%d,%d] %g want %g tol %g\n",e,r,i,got,w,refs[e].tol[(size_t)r*n+i]); } if(d==d)worst=std::max(worst,d); } }
  printf("%s worst %.2f of the tolerance, %ld switches\n",bad?"FAIL":"ok",worst,switches); return bad!=0; }
int main(int argc,char**argv){ int fails=0; rng.seed(argc>1?atoi(argv[1]):1); int only=argc>2?atoi(argv[2]):-1; int id=0;
  auto t=[&](const char*name,int m,int k,bool xf16,std::vector<Mem> mems,int mode=0,bool after=false,Dtype yt=Dtype::f32){ if(only>=0&&only!=id++) return; printf("%s: ",name); fflush(stdout); fails+=run(m,k,xf16,mems,mode,after,yt)==1; fflush(stdout); };
  Slot r16{16,false,false,0.7f,false}, r64{64,false,false,0.5f,true}, h20{20,true,true,-1.25f,false}, mix{33,true,false,0.4f,true};
  t("base m1",1,1024,false,{{600,{},false,false}});
  t("base m1 k1048",1,1048,false,{{600,{},false,true}});
  t("r16 m1",1,1024,false,{{600,{r16},false,false}});
  t("r64 m1 k1160",1,1160,false,{{1500,{r64},false,true}});
  t("r64 m5 bf16 y odd n",5,1160,false,{{1501,{r64},false,true}},0,true,Dtype::bf16);
  t("r64+h20+mix m8",8,2056,false,{{2000,{r64,h20,mix},false,true}});
  t("m13 f16",13,1160,true,{{2000,{r16,h20},false,true}},0,false,Dtype::f16);
  t("m16 r150",16,520,false,{{3000,{{150,false,false,1.f,false}},false,true}});
  t("m17",17,1160,false,{{1800,{r64},false,true}});
  t("m32 split",32,1160,false,{{1800,{{40,true,true,0.5f,true}},true,true}});
  t("m33",33,1160,false,{{3000,{r16,mix},false,true}});
  t("m64 f16 mixed",64,1160,true,{{3000,{r16,h20},false,true}});
  t("m64 r48",64,1288,false,{{3000,{{48,false,false,0.5f,true}},false,true}});
  t("k small, no adapters",9,264,false,{{700,{},false,true}});
  t("k 8",3,8,false,{{700,{},false,true}});
  t("fixed",12,1160,false,{{1800,{r16},false,true}},1);
  t("127.5",12,1160,false,{{1800,{r16},false,true}},2);
  t("round",12,1160,false,{{1800,{r16},false,true}},3);
  t("group",6,1160,false,{{1000,{r16,r64},false,true},{136,{},false,false},{1800,{h20,mix},true,true},{900,{r16},false,false}});
  t("group m40",40,1160,true,{{3000,{r16},false,true},{1360,{},false,false},{1800,{h20},false,true}});
  t("long k m2",2,9000,false,{{700,{r16},false,true}});
  t("m24 k 5000",24,5000,false,{{700,{},false,true}});
  if(getenv("REAL")){ t("real 4096 m16",16,4096,false,{{4096,{r64},false,true}},0,false,Dtype::bf16); t("real k 8192 m64",64,8192,false,{{4000,{r16},false,true}},0,false,Dtype::bf16); t("real k 28672 m3",3,28672,false,{{2000,{r64},false,true}},0,false,Dtype::bf16); }
  printf("%d failed\n",fails); return fails; }
