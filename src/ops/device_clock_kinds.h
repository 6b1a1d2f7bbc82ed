// Private to the room: the clock that builds with CUDA have.
#pragma once

#include "ops/device_clock.h"

namespace cambium {

/// Of the current device.
std::unique_ptr<DeviceClock> cuda_clock();

}  // namespace cambium
