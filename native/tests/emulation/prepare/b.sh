# NATIVE: the folder native of the sources to run; CUDA_HOME: the toolkit, for its headers. From this folder.
export NATIVE=${NATIVE:-$(realpath ../../..)}
S=${1:-$NATIVE/src/cuda}; cd .; bash prep.sh $S || exit 1
nice g++ -std=c++17 -O2 -g -w -fno-strict-aliasing -ffp-contract=off -mavx2 -mfma -D__CUDA_ARCH_FEAT_SM90_ALL=1 -I. -Isrc -I$NATIVE/src -I$NATIVE/include -I${CUDA_HOME:?}/include -o ${2:-emu} main.cc src/emu.cc 2>&1 | grep -E "error|undefined" | head -30
