// The products as the CPU kernels take them (matmul_cpu_plan.cc makes them).
#pragma once

#include <cstdint>

#include "base/cpu.h"

namespace cambium {

/// c (m, n) = [c or bias or 0] + a (m, k) b (k, n), for operands that may be stored transposed.
struct Gemm {
  int64_t m, n, k;
  const float* a;
  int64_t a_row, a_k;  // element (i, p) of a is a[i * a_row + p * a_k]
  const void* b;       // float, or bf16 when b_is_bf16
  bool b_is_bf16;
  bool b_rows_are_k;  // (k, n) in memory; else (n, k)
  int64_t b_stride;   // elements from one row in memory to the next
  const float* bias;  // (n), or null
  float* c;
  int64_t c_row;
  bool accumulate;  // add to c; then bias is null
};

/// Most products that are computed in one go: what reads one x in a layer.
inline constexpr int64_t kMaxProducts = 8;

/// Products of one a, of equal m and k and stored alike, computed in one parallel loop. Each has
/// the bits it has by itself.
struct Gemms {
  int64_t count;
  const Gemm* each;
  int64_t threads;  // a hint for cutting the work; the result does not depend on it
  float* turned;    // (k, few_rows(m)): memory for gemm_few_rows, from 3 rows on
};

/// Products are summed over blocks of this depth and the sums of blocks added up, everywhere, so
/// that an element has the same bits whichever kernel computes it.
inline constexpr int64_t kGemmDepth = 256;
/// Up to this many rows gemm takes gemm_few_rows, where b is (n, k) in memory and a_k is 1.
inline constexpr int64_t kFewRows = 16;
/// How many rows gemm_few_rows computes for m of them.
constexpr int64_t few_rows(int64_t m) {
  return m <= 2 ? m : (m + 3) / 4 * 4;
}

struct ColumnSums {
  int64_t rows, columns;
  const float* x;  // (rows, columns)
  int64_t x_row;
  float* sum;  // (columns), added to
};

/// y (columns, rows) = the transpose of x (rows, columns).
struct Transpose {
  int64_t rows, columns;
  const float* x;
  int64_t x_row;
  float* y;
  int64_t y_row;
};

CAMBIUM_CPU_KERNEL(gemm, Gemms)
CAMBIUM_CPU_KERNEL(gemm_few_rows, Gemms)
CAMBIUM_CPU_KERNEL(column_sums, ColumnSums)
CAMBIUM_CPU_KERNEL(transpose, Transpose)

}  // namespace cambium
