# NATIVE: the folder native of the sources to run; CUDA_HOME: the toolkit, for its headers. From this folder.
export NATIVE=${NATIVE:-$(realpath ../../..)}
N=$NATIVE/src/cuda; cd .
cp $N/decode.cuh $N/convert.cuh $N/kernels.h src/
python3 - <<'PY'
import re
import os; N=os.environ['NATIVE']+'/src/cuda/'
s=open(N+'epilogue.cuh').read()
s=re.sub(r'  asm\("ex2.*?\n','  power = std::exp2(u);\n',s); s=re.sub(r'  asm\("rcp.*?\n','  reciprocal = 1.f / (1.f + power);\n',s)
open('src/epilogue.cuh','w').write(s)
c=open('src/convert.cuh').read()
a=c.index('// Four int8, in the order'); c=c[:a]+'\n}  // namespace octolora::cuda\n'; open('src/convert.cuh','w').write(c)
k=open(N+'decode_sliced.cu').read()
k=re.sub(r'extern __shared__ __align__\(1024\) uint8_t (\w+)\[\];',r'uint8_t* const \1 = emu::shared();',k)
k=k.replace('OCTOLORA_CUDA(cudaLaunchKernelEx(&launch.config,','EMU_LAUNCH((&launch.config,')
k=re.sub(r'EMU_LAUNCH\(\(&launch.config, (kernel_for\([^;]*?\)), s\),',r'emu_run(launch.config.grid, launch.config.shared, s.barriers_at, [&]{ \1(s); }); (void)sizeof(int); OCTOLORA_CUDA(0,',k)
a=k.index('void set_up_decode_sliced'); b=k.index('bool decode_sliced_takes'); k=k[:a]+k[b:]
open('src/decode_sliced.cc','w').write('#include "emu.h"\nvoid emu_run(int grid,int shared,int barriers,std::function<void()> f);\n'+k)
PY
grep -n "emu_run" src/decode_sliced.cc
