// SPDX-License-Identifier: Apache-2.0
#include <type_traits>

#include "octolora/octolora.h"

// The layout that bindings in other languages count on, on every 64-bit platform.
static_assert(std::is_standard_layout_v<octolora_device_info> && sizeof(octolora_device_info) == 184);
static_assert(std::is_standard_layout_v<octolora_linear_desc> && sizeof(octolora_linear_desc) == 80);
static_assert(std::is_standard_layout_v<octolora_adapter_desc> && sizeof(octolora_adapter_desc) == 56);
static_assert(std::is_same_v<decltype(octolora_last_error()), const char*>);
