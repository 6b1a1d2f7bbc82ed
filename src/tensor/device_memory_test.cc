#include <gtest/gtest.h>

#include "tensor/device_memory_queues.h"

namespace cambium {
namespace {

TEST(WhyNoDevices, SaysWhatDriverIsNeeded) {
  const int built = 13000;
  EXPECT_EQ(why_no_devices(0, built, "no CUDA-capable device is detected"),
            "no NVIDIA driver was found; one for CUDA 13 or newer is needed");
  EXPECT_EQ(why_no_devices(12080, built, "CUDA driver version is insufficient"),
            "the NVIDIA driver is for CUDA 12.8; one for CUDA 13 or newer is needed");
  EXPECT_EQ(why_no_devices(13010, built, "no CUDA-capable device is detected"),
            "no CUDA-capable device is detected (the NVIDIA driver is for CUDA 13.1)");
}

TEST(WhyNoDevices, SaysWhatGpuIsNeeded) {
  EXPECT_EQ(why_too_old("Tesla T4", 7, 5),
            "the Tesla T4 has compute capability 7.5; 8.0 or newer is needed");
  for (const int major : {8, 9, 10, 12}) {
    EXPECT_EQ(why_too_old("NVIDIA GPU", major, 0), "");
  }
}

}  // namespace
}  // namespace cambium
