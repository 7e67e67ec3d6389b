// SPDX-License-Identifier: Apache-2.0
//
// The problems that the tests run: a seeded selection in which every two values of any two factors (shape, mode, types,
// adapters, contents of x, alignment) meet at least once, and the corners that no draw would find.
#pragma once

#include <string>
#include <vector>

#include "oracle.h"

namespace test {

// Which slots the rows of x name: none (every slot is added to every row), one after the other in blocks of rows, in
// any order with numbers that are no slot among them, or -1 everywhere.
enum class RowSlots { all, blocks, shuffled, no_slot };

enum class Fill { normal, exact, zero_rows, nan_rows, inf_rows, subnormal, huge };

struct Spec {
  int m = 1, n = 1, k = 1;
  int32_t mode = OCTOLORA_W8A8_DYNAMIC;
  bool round_x = false;
  float x_divisor = 127.f;
  Type x_type = Type::f32, y_type = Type::f32;
  bool bias = false, scale_per_channel = true;
  int scale_block = 0;
  int outlier_columns = -1;  // -1: threshold off; 0: on, none found; kAll: every column
  Fill fill = Fill::normal;
  struct AdapterSpec {
    int rank;
    Type a_type, b_type;
    float scale;
    bool split, bias;
    bool magnitude = false;
  };
  std::vector<AdapterSpec> adapters;
  RowSlots row_slots = RowSlots::all;
  int32_t activation = OCTOLORA_ACTIVATION_NONE;
  bool gate = false, residual = false;
  int x_offset = 0, y_offset = 0;  // elements beside a 256-byte boundary
  uint64_t seed = 1;

  static constexpr int kAll = 1 << 30;
  std::string name() const;
};

Problem make_problem(const Spec& spec);
std::vector<Spec> pairwise_specs(uint64_t seed, bool quick);
std::vector<Spec> corner_specs(uint64_t seed, bool quick);

}  // namespace test
