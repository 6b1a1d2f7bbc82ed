// Device: where memory lies and operations run.
#pragma once

#include <cstdint>
#include <string>

namespace cambium {

struct Device {
  enum Kind : uint8_t { kCpu, kCuda };

  Kind kind = kCpu;
  uint8_t index = 0;  // which of the machine's, for cuda

  constexpr Device() = default;
  // Not explicit: Device::kCpu is a device.
  constexpr Device(Kind kind, uint8_t index = 0) : kind(kind), index(index) {}  // NOLINT
  constexpr bool operator==(const Device&) const = default;
  /// "cpu", "cuda:1".
  std::string describe() const;
};

/// Whether this build has CUDA kernels.
inline constexpr bool kCudaBuild = CAMBIUM_CUDA != 0;

}  // namespace cambium
