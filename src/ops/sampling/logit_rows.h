// Private to the operation on the CPU: what it wants to know of a row before it draws.
#pragma once

#include <cstdint>

#include "base/cpu.h"

namespace cambium {

struct LogitRow {
  int64_t n;
  const float* logits;
  int32_t* largest;  // the first of the largest; -1 where none is above -infinity or one is NaN
  double* log_sum;   // log(sum exp(logit - largest)), where there is a largest
};
CAMBIUM_CPU_KERNEL(read_logit_row, LogitRow)

}  // namespace cambium
