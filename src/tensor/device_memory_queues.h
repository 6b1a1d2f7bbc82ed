// Private to the room: what builds with CUDA have of CopyQueue and WorkRecorder.
#pragma once

#include "tensor/device_memory.h"
#include "tensor/work_recorder.h"

namespace cambium {

std::unique_ptr<CopyQueue> cuda_copy_queue(Device device);
std::unique_ptr<WorkRecorder> cuda_recorder(Device device, int64_t upload_bytes);
/// The recorder that compares or records what this thread queues now; null where none does.
WorkRecorder*& recorder_in_use();

}  // namespace cambium
