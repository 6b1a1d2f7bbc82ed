// The speed of a large matrix product: what the work of a step is compared with.
#pragma once

#include "tensor/device.h"
#include "tensor/dtype.h"

namespace cambium {

/// FLOP/s of a square product of elements of `dtype` on the device, the median of several of
/// random numbers: 8,192 wide on a GPU in bf16, smaller where that would take long. Under a second.
double measure_matrix_peak(Device device, Dtype dtype);

}  // namespace cambium
