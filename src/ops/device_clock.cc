#include "ops/device_clock.h"

#include <chrono>
#include <vector>

#include "base/error.h"
#include "ops/device_clock_kinds.h"

namespace cambium {
namespace {

class HostClock : public DeviceClock {
 public:
  int64_t mark(CUstream_st* /*stream*/) override {
    marks_.push_back(std::chrono::steady_clock::now());
    return static_cast<int64_t>(marks_.size()) - 1;
  }
  double seconds(int64_t from, int64_t to) const override {
    return std::chrono::duration<double>(marks_.at(static_cast<size_t>(to)) -
                                         marks_.at(static_cast<size_t>(from)))
        .count();
  }
  void clear() override { marks_.clear(); }

 private:
  std::vector<std::chrono::steady_clock::time_point> marks_;
};

}  // namespace

std::unique_ptr<DeviceClock> DeviceClock::on(Device device) {
  CAMBIUM_CHECK(device.kind != Device::kMeta, "nothing runs there");
  if constexpr (kCudaBuild) {
    if (device.kind == Device::kCuda) {
      return cuda_clock();
    }
  }
  return std::make_unique<HostClock>();
}

}  // namespace cambium
