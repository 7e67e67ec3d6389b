// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <stdexcept>

#include "octolora/octolora.h"

namespace octolora {

// A failure on its way to the C ABI, which turns it into a status and the thread's message.
class Error : public std::runtime_error {
 public:
  __attribute__((format(printf, 3, 4))) Error(octolora_status status, const char* format, ...)
      : std::runtime_error(""), status_(status) {
    std::va_list args;
    va_start(args, format);
    char text[1024];
    std::vsnprintf(text, sizeof text, format, args);
    va_end(args);
    static_cast<std::runtime_error&>(*this) = std::runtime_error(text);
  }
  octolora_status status() const { return status_; }

 private:
  octolora_status status_;
};

inline void require_finite(float value, const char* what) {
  if (!std::isfinite(value)) {
    throw Error(OCTOLORA_INVALID_ARGUMENT, "%s = %g is not finite", what, static_cast<double>(value));
  }
}

inline void require_finite(const float* values, int count, const char* what) {
  for (int i = 0; i < count; ++i) {
    if (!std::isfinite(values[i])) {
      throw Error(OCTOLORA_INVALID_ARGUMENT, "%s[%d] = %g is not finite", what, i, static_cast<double>(values[i]));
    }
  }
}

}  // namespace octolora
