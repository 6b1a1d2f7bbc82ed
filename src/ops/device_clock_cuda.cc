#include <cuda_runtime_api.h>

#include <vector>

#include "base/error.h"
#include "ops/device_clock_kinds.h"

namespace cambium {
namespace {

void check(const char* what, cudaError_t status) {
  expect(status == cudaSuccess, "[clock] {} failed: {}", what, cudaGetErrorString(status));
}

/// Events are kept and used again: making one takes longer than many kernels.
class EventClock : public DeviceClock {
 public:
  ~EventClock() override {
    for (cudaEvent_t event : events_) {
      cudaEventDestroy(event);
    }
  }
  int64_t mark(CUstream_st* stream) override {
    if (used_ == events_.size()) {
      cudaEvent_t event = nullptr;
      check("making an event", cudaEventCreate(&event));
      events_.push_back(event);
    }
    check("marking a place in the stream", cudaEventRecord(events_[used_], stream));
    return static_cast<int64_t>(used_++);
  }
  double seconds(int64_t from, int64_t to) const override {
    float milliseconds = 0.0F;
    check("reading the time between two events",
          cudaEventElapsedTime(&milliseconds, events_.at(static_cast<size_t>(from)),
                               events_.at(static_cast<size_t>(to))));
    return 1e-3 * static_cast<double>(milliseconds);
  }
  void clear() override { used_ = 0; }

 private:
  std::vector<cudaEvent_t> events_;
  size_t used_ = 0;
};

}  // namespace

std::unique_ptr<DeviceClock> cuda_clock() {
  return std::make_unique<EventClock>();
}

}  // namespace cambium
