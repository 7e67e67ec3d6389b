// SPDX-License-Identifier: Apache-2.0
//
// Which kernel table a device uses.
#include <cstdlib>
#include <cstring>

#if defined(OCTOLORA_CPU_X86)
#include <cpuid.h>
#endif

#include "kernels.h"

namespace octolora::cpu {

namespace {

struct Candidate {
  const char* name;
  const Kernels* kernels;  // null where the processor or the build lacks it
};

#if defined(OCTOLORA_CPU_X86)
const Kernels* avx512_vnni_here() {
  // These also ask the operating system whether it keeps the wide registers.
  const bool here = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vnni");
  if (!here || !__builtin_cpu_supports("avx512bf16")) return here ? &kAvx512Vnni : nullptr;
  static const Kernels with_bf16 = [] {
    Kernels kernels = kAvx512Vnni;
    kernels.fits_pairs = fits_pairs_avx512_bf16;
    kernels.multiply_pairs = multiply_pairs_avx512_bf16;
    return kernels;
  }();
  return &with_bf16;
}
const Kernels* avx2_here() {
  // Not every compiler's __builtin_cpu_supports knows f16c.
  unsigned a, b, c = 0, d;
  const bool f16c = __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
  return f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? &kAvx2 : nullptr;
}
#else
const Kernels* avx512_vnni_here() { return nullptr; }
const Kernels* avx2_here() { return nullptr; }
#endif

}  // namespace

const Kernels& choose_kernels() {
  const Candidate candidates[] = {
      {"avx512-vnni", avx512_vnni_here()}, {"avx2", avx2_here()}, {"portable", &kPortable}};  // best first
  const char* cap = std::getenv("OCTOLORA_CPU_ISA");
  bool allowed = cap == nullptr || *cap == '\0';
  for (const Candidate& candidate : candidates) {
    if (!allowed) allowed = std::strcmp(cap, candidate.name) == 0;
    if (allowed && candidate.kernels != nullptr) return *candidate.kernels;
  }
  throw Error(OCTOLORA_INVALID_ARGUMENT,
              "environment variable OCTOLORA_CPU_ISA is \"%.100s\", expected avx512-vnni, avx2 or portable", cap);
}

}  // namespace octolora::cpu
