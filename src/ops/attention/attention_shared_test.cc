#include "ops/attention/attention_shared.h"

#include <gtest/gtest.h>

namespace cambium::cuda::attention {
namespace {

constexpr size_t kOfSm80 = 163 * 1024;
constexpr size_t kOfSm89 = 99 * 1024;  // of sm_86 and sm_120 too
constexpr size_t kOfSm90 = 227 * 1024;

TEST(AttentionTiles, AreTheLargestThatADeviceHolds) {
  struct Case {
    size_t most;
    int dim, value_dim, rows, backward;
  };
  for (const Case& c : {
           Case{kOfSm90, 64, 64, 64, 64},
           Case{kOfSm90, 128, 128, 64, 64},
           Case{kOfSm90, 192, 128, 64, 32},
           Case{kOfSm90, 256, 256, 64, 32},
           Case{kOfSm80, 128, 128, 64, 64},
           Case{kOfSm80, 256, 256, 64, 32},
           Case{kOfSm89, 64, 64, 64, 64},
           Case{kOfSm89, 96, 96, 64, 32},
           Case{kOfSm89, 128, 128, 64, 32},
           Case{kOfSm89, 192, 128, 16, 32},
           Case{kOfSm89, 256, 256, 16, 16},
       }) {
    SCOPED_TRACE(::testing::Message() << c.most / 1024 << " KiB, " << c.dim << " " << c.value_dim);
    EXPECT_EQ(forward_rows(c.most, c.dim, c.value_dim), c.rows);
    EXPECT_EQ(backward_tile(c.most, c.dim, c.value_dim), c.backward);
  }
}

TEST(AttentionTiles, EveryHeadUpTo256FitsEveryDevice) {
  for (const size_t most : {kOfSm80, kOfSm89, kOfSm90}) {
    for (int dim = 1; dim <= 256; ++dim) {
      for (const int value_dim : {1, 64, 96, 128, 256}) {
        EXPECT_LE(forward_shared(forward_rows(most, dim, value_dim), dim, value_dim), most);
        EXPECT_LE(backward_shared(backward_tile(most, dim, value_dim), dim, value_dim), most);
      }
    }
  }
}

}  // namespace
}  // namespace cambium::cuda::attention
