#pragma once
#include "ptx.cuh"
namespace octolora::cuda { inline void tensor_map_encoder() {}
inline CUtensorMap tensor_map(const void* m, int64_t w, int64_t r, int64_t p, int box, int = 128) { CUtensorMap t{}; if (p % 16 || (uintptr_t)m % 16 || box > 256 || box < 1) emu::die("tensor map"); ptx::Map x{(const uint8_t*)m, w, r, p, box}; memcpy(&t, &x, sizeof x); return t; } }
