# NATIVE: the folder native of the sources to run; CUDA_HOME: the toolkit, for its headers. From this folder.
export NATIVE=${NATIVE:-$(realpath ../../..)}
N=${1:-$NATIVE/src/cuda}; rm -rf src; mkdir src; cp ../core/*.* src/
python3 - <<'Q'
p='src/ptx.cuh'; t=open(p).read()
t=t.replace("inline uint4 load_shared_16","inline uint16_t load_shared_u16(uint32_t a) { maybe(); if (a % 2) die(\"unaligned\"); uint16_t v; memcpy(&v, at(a, cur->block, 2), 2); return v; }\ninline uint4 load_shared_16",1); open(p,'w').write(t)
Q
cp $N/kernels.h $N/convert.cuh $N/prepare.cuh $N/row_slots.cuh src/
python3 - $N <<'PY'
import re,sys
N=sys.argv[1]+'/'
def sub(s,a,b):
    if a not in s: raise SystemExit('missing: '+a)
    return s.replace(a,b)
c=open('src/convert.cuh').read(); a=c.index('// Four int8, in the order'); open('src/convert.cuh','w').write(c[:a]+'\n}  // namespace octolora::cuda\n')
k=open(N+'prepare_sm90.cu').read()
k=sub(k,'extern __shared__ __align__(1024) uint8_t memory[];','uint8_t* const memory = emu::shared();')
k=sub(k,'const __grid_constant__ PrepareArgs args','const PrepareArgs& args'); k=sub(k,'const __grid_constant__ Plan plan','const Plan& plan'); k=sub(k,'const __grid_constant__ CUtensorMap x_map','const CUtensorMap& x_map')
a=k.index('__device__ __forceinline__ uint32_t cluster_address'); b=k.index('template <bool kF16, int kSums>')
k=k[:a]+'''inline uint32_t cluster_address(uint32_t address, int rank) { return ptx::cluster_address_of(address, rank); }
inline void send(uint32_t to, uint32_t value, uint32_t barrier) { ptx::send_bytes(to, &value, 4, barrier); }
inline void send(uint32_t to, const float* four, uint32_t barrier) { ptx::send_bytes(to, four, 16, barrier); }
'''+k[b:]
k=sub(k,'multiply_16(float (&sum)[kSums], const uint32_t* a,','multiply_16(float (&sum)[kSums], const uint32_t* const* a,')
k=sub(k,'const uint4 low = from[i / 2][0], high = from[i / 2][1];','const uint4 &low = from[i / 2][0], &high = from[i / 2][1];')
m=re.search(r'const uint32_t operand\[4\] = \{(.*?)\};',k,re.S); parts=[x.strip() for x in re.sub(r'\s+',' ',m.group(1)).split(',')]; assert len(parts)==4
k=k.replace(m.group(0),'const uint32_t* operand[4] = {'+', '.join('&('+x+')' for x in parts)+'};')
k=sub(k,'cudaLaunchKernelEx(','emu_launch(')
a=k.index('}  // namespace\n\nvoid set_up_prepare_sm90'); k=k[:a]+'}\n}\n'
open('src/prepare_sm90.cc','w').write(k)
PY
