#include "train/training_cost.h"

#include <gtest/gtest.h>

namespace cambium {
namespace {

TEST(TrainingMemory, IsSaidByItsParts) {
  constexpr int64_t kGiB = int64_t{1} << 30;
  EXPECT_EQ(memory_parts({{"teacher", 0},
                          {"trained weights", 2 * kGiB},
                          {"gradients", 2 * kGiB},
                          {"optimiser", 4 * kGiB, true},
                          {"activations", kGiB / 2}}),
            "4.5 GiB in all: trained weights 2.0 GiB, gradients 2.0 GiB, optimiser 4.0 GiB of the "
            "host's, activations 512 MiB");
}

}  // namespace
}  // namespace cambium
