// Device: where memory lies and operations run.
#pragma once

#include <cstdint>
#include <string>

namespace cambium {

struct Device {
  /// kMeta has no memory: what is allocated there is counted only and nothing is computed, so a
  /// forward pass over it says what the same pass takes elsewhere.
  enum Kind : uint8_t { kCpu, kCuda, kMeta };

  Kind kind = kCpu;
  uint8_t index = 0;  // which of the machine's, for cuda

  constexpr Device() = default;
  // Not explicit: Device::kCpu is a device.
  constexpr Device(Kind kind, uint8_t index = 0) : kind(kind), index(index) {}  // NOLINT
  constexpr bool operator==(const Device&) const = default;
  /// "cpu", "cuda:1", "meta".
  std::string describe() const;
};

/// Whether this build has CUDA kernels.
inline constexpr bool kCudaBuild = CAMBIUM_CUDA != 0;

}  // namespace cambium
