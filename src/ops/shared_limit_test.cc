#include "ops/shared_limit.h"

#include <gtest/gtest.h>

#include "base/testing.h"

namespace cambium {
namespace {

TEST(SharedLimit, IsTheDevicesOrWhatIsAskedFor) {
  const size_t of_sm90 = 227 * 1024;
  const size_t of_sm89 = 99 * 1024;
  EXPECT_EQ(shared_limit(of_sm90, nullptr), of_sm90);
  EXPECT_EQ(shared_limit(of_sm90, "99"), of_sm89);
  EXPECT_EQ(shared_limit(of_sm90, "48"), kSharedOfAll);
  EXPECT_EQ(shared_limit(of_sm89, "163"), of_sm89) << "never raised";
}

TEST(SharedLimit, RefusesWhatNoDeviceHas) {
  for (const char* wrong : {"", "0", "47", "-99", "99 KiB", "0x63", "99999999999"}) {
    EXPECT_EQ(testing::error_of([&] { shared_limit(size_t{227} * 1024, wrong); }),
              std::string("[cuda] expected CAMBIUM_CUDA_SHARED, KiB of shared memory a block, from "
                          "48 on, got '") +
                  wrong + "'");
  }
}

}  // namespace
}  // namespace cambium
