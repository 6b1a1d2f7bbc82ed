// What the tests of attention with and without cuDNN share.
#pragma once

#include "ops/attention/attention_cudnn.h"
#include "ops/attention/attention_wgmma.h"
#include "ops/testing.h"

namespace cambium::testing {

/// Skips without a device; says whether the library is there.
class WithCudnn : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!on_cuda()) {
      GTEST_SKIP() << why_no_cuda();
    }
    cuda::attention::allow_cudnn(true);
    served_ = cuda::attention::cudnn_status().rfind("cuDNN", 0) == 0;
  }
  void TearDown() override {
    if (on_cuda()) {
      cuda::attention::allow_cudnn(true);
      cuda::attention::allow_warpgroups(true);
      cuda::attention::limit_gathered(0);
    }
  }

  bool served_ = false;
};

}  // namespace cambium::testing
