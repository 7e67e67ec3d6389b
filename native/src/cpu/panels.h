// SPDX-License-Identifier: Apache-2.0
//
// Where things lie in packed matrices. A matrix [rows, k] becomes panels of kColumns rows; the last is narrower, but
// still a multiple of `lanes`. Panel p begins at p * kColumns * depth, its layout is [depth / group][width][group], and
// depth is k rounded up to a multiple of group and of 2, with zeros. Rows that pad the last panel are never read back.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels.h"

namespace octolora::cpu {

constexpr int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

struct Panels {
  int64_t rows, k;
  int lanes, group;

  int64_t depth() const { return round_up(k, std::max(group, 2)); }
  int64_t padded_rows() const { return round_up(rows, lanes); }
  int64_t size() const { return padded_rows() * depth(); }
  int64_t count() const { return (rows + kColumns - 1) / kColumns; }
  int64_t offset(int64_t panel) const { return panel * kColumns * depth(); }
  // Rows that are there, and with padding.
  int rows_of(int64_t panel) const { return static_cast<int>(std::min<int64_t>(kColumns, rows - panel * kColumns)); }
  int width(int64_t panel) const { return static_cast<int>(round_up(rows_of(panel), lanes)); }
};

// Elements first .. first + count - 1 of row `row`, first a multiple of group, to their places in the packed matrix
// `to`.
template <class Element>
void pack(const Panels& panels, int64_t row, int64_t first, int64_t count, const Element* from, Element* to) {
  const int64_t panel = row / kColumns, lane = row % kColumns, group = panels.group;
  const int64_t step = panels.width(panel) * group;
  Element* at = to + panels.offset(panel) + first / group * step + lane * group;
  for (int64_t i = 0; i < count; i += group, at += step)
    for (int64_t j = 0; j < std::min(group, count - i); ++j) at[j] = from[i + j];
}

// The way back.
template <class Element>
void unpack(const Panels& panels, int64_t row, int64_t first, int64_t count, const Element* from, Element* to) {
  const int64_t panel = row / kColumns, lane = row % kColumns, group = panels.group;
  const int64_t step = panels.width(panel) * group;
  const Element* at = from + panels.offset(panel) + first / group * step + lane * group;
  for (int64_t i = 0; i < count; i += group, at += step)
    for (int64_t j = 0; j < std::min(group, count - i); ++j) to[i + j] = at[j];
}

}  // namespace octolora::cpu
