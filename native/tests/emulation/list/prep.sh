# NATIVE: the folder native of the sources to run; CUDA_HOME: the toolkit, for its headers. From this folder.
export NATIVE=${NATIVE:-$(realpath ../../..)}
N=$NATIVE/src/cuda; rm -rf src; mkdir src; cp ../core/*.* src/; cp $N/kernels.h $N/convert.cuh $N/prepare.cuh $N/outliers.cuh src/; sed -i 's/kMaxThreads = 896/kMaxThreads = 1024/' src/emu.h
python3 - <<'P'
import os; N=os.environ['NATIVE']+'/src/cuda/'
c=open('src/convert.cuh').read(); a=c.index('// Four int8, in the order'); open('src/convert.cuh','w').write(c[:a]+'\n}  // namespace octolora::cuda\n')
k=open(N+'outliers.cu').read()
k=k.replace('void list(','void list_kernel(').replace('__shared__','static').replace('const __grid_constant__ PrepareArgs args','const PrepareArgs& args')
a=k.index('// Magnitudes of X in'); b=k.index('// A warp has some of the rows'); c=k.index('// A warp for each row to gather')
k=k[:a]+k[b:c]+'\n}\n}\n'
open('src/outliers.cc','w').write(k)
e=open('src/emu.h').read()
e+='''
template <class T> T __shfl_up_sync(unsigned, T v, int d) { return emu::collective(v, [&](T* a, int l) { return l >= d ? a[l - d] : a[l]; }, "shfl"); }
inline int __ffs(unsigned v) { return __builtin_ffs(v); }
inline unsigned atomicOr(unsigned* p, unsigned v) { emu::maybe(); unsigned o = *p; *p |= v; return o; }
'''
open('src/emu.h','w').write(e)
P
