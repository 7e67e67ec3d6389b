# NATIVE: the folder native of the sources to run; CUDA_HOME: the toolkit, for its headers. From this folder.
export NATIVE=${NATIVE:-$(realpath ../../..)}
# usage: prep.sh SOURCE_DIR ; makes src/
N=${1:-$NATIVE/src/cuda}; rm -rf src; mkdir src; cp ../core/*.* src/
cp $N/kernels.h $N/convert.cuh $N/epilogue.cuh $N/outliers.cuh src/; sed -i 's/kMaxThreads = 896/kMaxThreads = 1024/' src/emu.h; sed -i 's/inline void barrier_init_fence() {}/inline void barrier_init_fence() {}\ninline void fence_async_shared() { maybe(); }/' src/ptx.cuh; sed -i 's/inline int __popc/inline float __int_as_float(int u) { float f; memcpy(\&f, \&u, 4); return f; }\ninline int __popc/' src/emu.h
python3 - $N <<'PY'
import re,sys
N=sys.argv[1]+'/'
def sub(s,a,b,n=1,must=True):
    if must and a not in s: raise SystemExit('missing: '+a)
    return s.replace(a,b)
s=open(N+'epilogue.cuh').read()
s=re.sub(r'  asm\("ex2.*?\n','  power = std::exp2(u);\n',s); s=re.sub(r'  asm\("rcp.*?\n','  reciprocal = 1.f / (1.f + power);\n',s)
open('src/epilogue.cuh','w').write(s)
c=open('src/convert.cuh').read(); a=c.index('// Four int8, in the order'); open('src/convert.cuh','w').write(c[:a]+'\n}  // namespace octolora::cuda\n')
k=open(N+'gemm_sm90.cu').read()
k=sub(k,'extern __shared__ __align__(1024) uint8_t memory[];','uint8_t* const memory = emu::shared();')
k=sub(k,'const __grid_constant__ Params p','const Params& p')
k=sub(k,'asm volatile("mov.u32 %0, %%tid.x;\\n" : "=r"(thread));','')
k=sub(k,'asm volatile("" : "+f"(rows[i].power));','')
k=k.replace('cudaLaunchKernelEx(','emu_launch(launch.config.grid ? &launch.config : ')
a=k.index('template <class C, bool kWide, After kAfter>\nvoid set_up()'); b=k.index('const char* refuses'); c=k.index('// A tile, and what it takes')
k=k[:a]+k[b:c]+'\n}\n}\n'
open('src/gemm_sm90.cc','w').write(k)
PY
