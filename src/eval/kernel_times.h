// Where the device's time of a step goes, kernel by kernel of those that operations call.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "ops/device_clock.h"
#include "ops/op_timer.h"
#include "tensor/device.h"

namespace cambium {

/// For as long as a context has it as its timer: marks before and behind each call. A GPU takes
/// some microseconds for them, which are counted.
class KernelTimes : public OpTimer {
 public:
  explicit KernelTimes(Device device);
  void begin(const OpCall& call) override;
  void end(const OpCall& call) override;

  /// Calls of one kernel and, where it is known (work_of()), one shape.
  struct Line {
    std::string kernel, shape;
    int64_t calls = 0;
    double seconds = 0.0;  // of all of them
  };
  /// Once the device was waited for; what takes longest first.
  std::vector<Line> lines() const;

 private:
  struct Call {
    const char* kernel;
    std::string shape;
    int64_t begin, end;  // marks
  };
  std::unique_ptr<DeviceClock> clock_;
  std::vector<Call> calls_;
};

}  // namespace cambium
