// SPDX-License-Identifier: Apache-2.0
//
// Which kernel table a device uses.
#include <cstdlib>
#include <cstring>

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
  return here ? &kAvx512Vnni : nullptr;
}
const Kernels* avx2_here() {
  const bool here = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  return here ? &kAvx2 : nullptr;
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
