// SPDX-License-Identifier: Apache-2.0
//
// wgmma with the first operand in registers.
//
// Thread l of warp w of the warpgroup, (g, t) = (l / 4, l % 4), holds of a [64,16], two 16-bit values a register:
//   a[0] (16w + g, 2t..)   a[1] (16w + g + 8, 2t..)   a[2] (16w + g, 8 + 2t..)   a[3] (16w + g + 8, 8 + 2t..)
// The hardware reads them after the instruction was issued: they may change once wgmma_wait says it is done.
#pragma once

#include <cstdint>

namespace octolora::cuda::ptx {

#define OCTOLORA_TENS(a) \
  "%" #a "0, %" #a "1, %" #a "2, %" #a "3, %" #a "4, %" #a "5, %" #a "6, %" #a "7, %" #a "8, %" #a "9, "
#define OCTOLORA_R10 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, "
#define OCTOLORA_R60 OCTOLORA_R10 OCTOLORA_TENS(1) OCTOLORA_TENS(2) OCTOLORA_TENS(3) OCTOLORA_TENS(4) OCTOLORA_TENS(5)
#define OCTOLORA_R100 OCTOLORA_R60 OCTOLORA_TENS(6) OCTOLORA_TENS(7) OCTOLORA_TENS(8) OCTOLORA_TENS(9)
#define OCTOLORA_REGISTERS_64 OCTOLORA_R60 "%60, %61, %62, %63"
#define OCTOLORA_REGISTERS_80 OCTOLORA_R60 OCTOLORA_TENS(6) "%70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define OCTOLORA_REGISTERS_96 \
  OCTOLORA_R60 OCTOLORA_TENS(6) OCTOLORA_TENS(7) OCTOLORA_TENS(8) "%90, %91, %92, %93, %94, %95"
#define OCTOLORA_REGISTERS_108 OCTOLORA_R100 "%100, %101, %102, %103, %104, %105, %106, %107"
#define OCTOLORA_REGISTERS_128 \
  OCTOLORA_R100 OCTOLORA_TENS(10) OCTOLORA_TENS(11) "%120, %121, %122, %123, %124, %125, %126, %127"
#define OCTOLORA_O4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define OCTOLORA_O16(i) OCTOLORA_O4(i), OCTOLORA_O4(i + 4), OCTOLORA_O4(i + 8), OCTOLORA_O4(i + 12)
#define OCTOLORA_OPERANDS_64 OCTOLORA_O16(0), OCTOLORA_O16(16), OCTOLORA_O16(32), OCTOLORA_O16(48)
#define OCTOLORA_OPERANDS_80 OCTOLORA_OPERANDS_64, OCTOLORA_O16(64)
#define OCTOLORA_OPERANDS_96 OCTOLORA_OPERANDS_80, OCTOLORA_O16(80)
#define OCTOLORA_OPERANDS_108 OCTOLORA_OPERANDS_96, OCTOLORA_O4(96), OCTOLORA_O4(100), OCTOLORA_O4(104)
#define OCTOLORA_OPERANDS_128 OCTOLORA_OPERANDS_96, OCTOLORA_O16(96), OCTOLORA_O16(112)

// d [64,n] += a [64,16] . b [n,16]^T; with accumulate false, d = a . b^T. `a0` is the operand number behind d's.
#define OCTOLORA_WGMMA_RS(name, type, n, registers, a0, a1, a2, a3, b_operand, p_operand)                            \
  __device__ __forceinline__ void name(float(&d)[registers], const uint32_t(&a)[4], uint64_t b, bool accumulate) {   \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #p_operand                                                     \
                 ", 0;\n"                                                                                            \
                 "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" OCTOLORA_REGISTERS_##registers \
                 "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #b_operand ", p, 1, 1, 0;\n}\n"                    \
                 : OCTOLORA_OPERANDS_##registers                                                                     \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)));           \
  }
#define OCTOLORA_WGMMA_RS_16BIT(n, registers, a0, a1, a2, a3, b_operand, p_operand)            \
  OCTOLORA_WGMMA_RS(wgmma_rs_bf16, "bf16", n, registers, a0, a1, a2, a3, b_operand, p_operand) \
  OCTOLORA_WGMMA_RS(wgmma_rs_f16, "f16", n, registers, a0, a1, a2, a3, b_operand, p_operand)
OCTOLORA_WGMMA_RS_16BIT(128, 64, 64, 65, 66, 67, 68, 69)
OCTOLORA_WGMMA_RS_16BIT(160, 80, 80, 81, 82, 83, 84, 85)
OCTOLORA_WGMMA_RS_16BIT(192, 96, 96, 97, 98, 99, 100, 101)
OCTOLORA_WGMMA_RS_16BIT(216, 108, 108, 109, 110, 111, 112, 113)
OCTOLORA_WGMMA_RS_16BIT(256, 128, 128, 129, 130, 131, 132, 133)

#undef OCTOLORA_WGMMA_RS_16BIT
#undef OCTOLORA_WGMMA_RS
#undef OCTOLORA_OPERANDS_128
#undef OCTOLORA_OPERANDS_108
#undef OCTOLORA_OPERANDS_96
#undef OCTOLORA_OPERANDS_80
#undef OCTOLORA_OPERANDS_64
#undef OCTOLORA_O16
#undef OCTOLORA_O4
#undef OCTOLORA_REGISTERS_128
#undef OCTOLORA_REGISTERS_108
#undef OCTOLORA_REGISTERS_96
#undef OCTOLORA_REGISTERS_80
#undef OCTOLORA_REGISTERS_64
#undef OCTOLORA_R100
#undef OCTOLORA_R60
#undef OCTOLORA_R10
#undef OCTOLORA_TENS

}  // namespace octolora::cuda::ptx
