// Rows of a few numbers a channel, as weights (C, K) and states (C, K - 1) lie, read and written as
// columns whose lanes run over channels. For *_cpu.cc files only.
#pragma once

#include <utility>

#include "base/simd.h"
#include "ops/conv/conv_rows.h"

namespace cambium::CAMBIUM_ISA {

using LaneNumbers = std::make_integer_sequence<int, kLanes>;

/// Element f of a, b and c in a row, for f of lane l: 3 l + kColumn.
template <int kColumn, int... L>
static inline vf third_of(vf a, vf b, vf c, std::integer_sequence<int, L...> /*lanes*/) {
  const vf low =
      __builtin_shufflevector(a, b, (3 * L + kColumn < 2 * kLanes ? 3 * L + kColumn : 0)...);
  return __builtin_shufflevector(low, c,
                                 (3 * L + kColumn < 2 * kLanes ? L : 3 * L + kColumn - kLanes)...);
}
/// The inverse: of a row of all columns lane by lane, vector kVector.
template <int kVector, int... L>
static inline vf rows_of_three(vf a, vf b, vf c, std::integer_sequence<int, L...> /*lanes*/) {
  const vf low = __builtin_shufflevector(
      a, b,
      ((kVector * kLanes + L) % 3 == 2
           ? 0
           : (kVector * kLanes + L) / 3 + (kVector * kLanes + L) % 3 * kLanes)...);
  return __builtin_shufflevector(
      low, c, ((kVector * kLanes + L) % 3 == 2 ? kLanes + (kVector * kLanes + L) / 3 : L)...);
}
/// Elements kFirst, kFirst + 2, ... of a and b in a row.
template <int kFirst, int... L>
static inline vf every_other(vf a, vf b, std::integer_sequence<int, L...> /*lanes*/) {
  return __builtin_shufflevector(a, b, (2 * L + kFirst)...);
}

/// column[j], lane l = rows[l * count + j], for `lanes` channels; other lanes are zero.
static inline void load_columns(const float* rows, int64_t count, int64_t lanes, vf* column) {
  constexpr LaneNumbers kAll{};
  if (count == 4 && lanes == kLanes) {
    vf r[4];
    std::memcpy(r, rows, sizeof r);
    const vf even[2] = {every_other<0>(r[0], r[1], kAll), every_other<0>(r[2], r[3], kAll)};
    const vf odd[2] = {every_other<1>(r[0], r[1], kAll), every_other<1>(r[2], r[3], kAll)};
    column[0] = every_other<0>(even[0], even[1], kAll);
    column[1] = every_other<0>(odd[0], odd[1], kAll);
    column[2] = every_other<1>(even[0], even[1], kAll);
    column[3] = every_other<1>(odd[0], odd[1], kAll);
    return;
  }
  if (count == 3 && lanes == kLanes) {
    vf r[3];
    std::memcpy(r, rows, sizeof r);
    column[0] = third_of<0>(r[0], r[1], r[2], kAll);
    column[1] = third_of<1>(r[0], r[1], r[2], kAll);
    column[2] = third_of<2>(r[0], r[1], r[2], kAll);
    return;
  }
  for (int64_t j = 0; j < count; ++j) {
    float values[kLanes] = {};
    for (int64_t l = 0; l < lanes; ++l) {
      values[l] = rows[l * count + j];
    }
    column[j] = vload(values);
  }
}

/// The inverse.
static inline void store_columns(const vf* column, int64_t count, int64_t lanes, float* rows) {
  constexpr LaneNumbers kAll{};
  if (count == 3 && lanes == kLanes) {
    vstore(rows, rows_of_three<0>(column[0], column[1], column[2], kAll));
    vstore(rows + kLanes, rows_of_three<1>(column[0], column[1], column[2], kAll));
    vstore(rows + 2 * kLanes, rows_of_three<2>(column[0], column[1], column[2], kAll));
    return;
  }
  for (int64_t j = 0; j < count; ++j) {
    float values[kLanes];
    vstore(values, column[j]);
    for (int64_t l = 0; l < lanes; ++l) {
      rows[l * count + j] = values[l];
    }
  }
}

}  // namespace cambium::CAMBIUM_ISA
