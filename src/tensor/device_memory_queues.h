// Private to the room: the half of CopyQueue that builds with CUDA have.
#pragma once

#include "tensor/device_memory.h"

namespace cambium {

std::unique_ptr<CopyQueue> cuda_copy_queue(Device device);

}  // namespace cambium
