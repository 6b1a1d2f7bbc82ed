// DeviceClock: how long a device took between two places in its work.
#pragma once

#include <cstdint>
#include <memory>

#include "tensor/device.h"

struct CUstream_st;

namespace cambium {

/// On the CPU the clock's; on CUDA by events in the stream, which name times of the device: what
/// the host does meanwhile shows only where the device has nothing left to do.
class DeviceClock {
 public:
  static std::unique_ptr<DeviceClock> on(Device device);
  DeviceClock() = default;
  DeviceClock(const DeviceClock&) = delete;
  DeviceClock& operator=(const DeviceClock&) = delete;
  virtual ~DeviceClock() = default;
  /// Marks what `stream` has been given by now. Marks are numbers from 0 since clear().
  virtual int64_t mark(CUstream_st* stream) = 0;
  /// From one mark to a later one, once the device was waited for. Clocks of a device count the
  /// marks' own work, some microseconds: what two marks with nothing between them say.
  virtual double seconds(int64_t from, int64_t to) const = 0;
  virtual void clear() = 0;
};

}  // namespace cambium
