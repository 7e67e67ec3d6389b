/* SPDX-License-Identifier: Apache-2.0 */
#include "octolora/octolora.h"

/* Twice: the include guard holds. */
#include "octolora/octolora.h"

_Static_assert(sizeof(octolora_status) == 4, "a status is an int32_t");
_Static_assert(OCTOLORA_OK == 0, "success is zero");
_Static_assert(128LL * 128 * OCTOLORA_MAX_K <= INT32_MAX, "the int32 sum is exact up to OCTOLORA_MAX_K");
_Static_assert(128LL * 128 * (OCTOLORA_MAX_K + 1LL) > INT32_MAX, "and not beyond");

uint32_t octolora_header_as_c11(void);
uint32_t octolora_header_as_c11(void) { return octolora_abi_version(); }
