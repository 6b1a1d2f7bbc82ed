// Private to the room: what builds with CUDA have of CopyQueue and WorkRecorder, and what is said
// where there is no device.
#pragma once

#include <memory>
#include <string>
#include <string_view>

#include "tensor/device_memory.h"
#include "tensor/work_recorder.h"

namespace cambium {

std::unique_ptr<CopyQueue> cuda_copy_queue(Device device);
std::unique_ptr<WorkRecorder> cuda_recorder(Device device, int64_t upload_bytes);
/// Why CUDA's runtime of version `built` (13000: 13.0) finds no devices with a driver for CUDA of
/// version `driver` (0: there is none); `says`: the runtime's own words.
std::string why_no_devices(int driver, int built, std::string_view says);
/// Why a GPU of compute capability major.minor runs no kernel of this program; empty where it does.
std::string why_too_old(std::string_view gpu, int major, int minor);

/// The recorder that compares or records what this thread queues now; null where none does.
WorkRecorder*& recorder_in_use();

}  // namespace cambium
