# NATIVE: the folder native of the sources to run; CUDA_HOME: the toolkit, for its headers. From this folder.
export NATIVE=${NATIVE:-$(realpath ../../..)}
cd .; bash prep.sh >/dev/null; g++ -std=c++17 -O2 -g -w -D__CUDA_ARCH_FEAT_SM90_ALL=1 -I. -Isrc -I$NATIVE/src -I$NATIVE/include -I${CUDA_HOME:?}/include -o emu main.cc src/decode_sliced.cc 2>&1 | grep -E "error|undefined" | head -20
