// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdarg>
#include <cstdio>
#include <string>

namespace octolora {

// How a forward would run, line by line. What describes a step decides by the functions that the step itself uses.
class Explanation {
 public:
  // A launch on a device: "3 gemm ...".
  __attribute__((format(printf, 2, 3))) void launch(const char* format, ...) {
    text_ += std::to_string(++launches_) + " ";
    std::va_list args;
    va_start(args, format);
    line(format, args);
    va_end(args);
  }
  // Anything else, indented.
  __attribute__((format(printf, 2, 3))) void note(const char* format, ...) {
    text_ += "  ";
    std::va_list args;
    va_start(args, format);
    line(format, args);
    va_end(args);
  }
  const std::string& text() const { return text_; }

 private:
  void line(const char* format, std::va_list args) {
    char text[512];
    std::vsnprintf(text, sizeof text, format, args);
    text_ += text;
    text_ += '\n';
  }

  std::string text_;
  int launches_ = 0;
};

}  // namespace octolora
