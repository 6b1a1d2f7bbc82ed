// Products and sums of rows for the CPU kernels. Only *_cpu.cc files include it.
#pragma once

#include "base/simd.h"

namespace cambium::CAMBIUM_ISA {

template <class B>
static float dot_rows(const float* a, const B* b, int64_t n) {
  vf sum = {};
  for (int64_t i = 0; i < n; i += kLanes) {
    sum += vload_upto(a + i, n - i) * vload_upto(b + i, n - i);
  }
  return vsum(sum);
}

/// y += factor x
template <class X>
static void add_row(float* y, float factor, const X* x, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) {
    vstore_upto(y + i, vload_upto(y + i, n - i) + factor * vload_upto(x + i, n - i), n - i);
  }
}

}  // namespace cambium::CAMBIUM_ISA
