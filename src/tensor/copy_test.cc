#include "tensor/copy.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <numeric>

#include "base/testing.h"
#include "tensor/arena.h"

namespace cambium {
namespace {

using testing::error_of;

OwnedTensor counted(Dtype dtype, std::initializer_list<int64_t> shape) {
  OwnedTensor wide(Dtype::kF32, shape);
  std::iota(wide.view.ptr<float>(), wide.view.ptr<float>() + wide.view.numel(), -2.0F);
  OwnedTensor t(dtype, shape);
  copy(t.view, wide.view);
  return t;
}

std::vector<double> values(const Tensor& t) {
  OwnedTensor wide(Dtype::kF64, std::span(t.shape.data(), static_cast<size_t>(t.rank)));
  copy(wide.view, t);
  return {wide.view.ptr<double>(), wide.view.ptr<double>() + t.numel()};
}

TEST(Copy, BetweenEveryTwoFloatingTypes) {
  constexpr Dtype kTypes[] = {Dtype::kF32, Dtype::kF64, Dtype::kBF16};
  for (const Dtype from : kTypes) {
    for (const Dtype to : kTypes) {
      const OwnedTensor a = counted(from, {2, 3});
      const OwnedTensor b(to, {2, 3});
      copy(b.view, a.view);
      EXPECT_EQ(values(b.view), (std::vector<double>{-2, -1, 0, 1, 2, 3}))
          << dtype_name(from) << " to " << dtype_name(to);
    }
  }
}

TEST(Copy, RoundsToNearestEven) {
  const OwnedTensor a(Dtype::kF32, {3});
  a.view.ptr<float>()[0] = 1.0F + 0x1p-8F;             // half way: to even
  a.view.ptr<float>()[1] = 1.0F + 0x1p-8F + 0x1p-20F;  // above
  a.view.ptr<float>()[2] = 1.0F + 0x1.8p-7F;           // half way: to even, which is up
  const OwnedTensor b(Dtype::kBF16, {3});
  copy(b.view, a.view);
  EXPECT_EQ(values(b.view), (std::vector<double>{1, 1 + 0x1p-7, 1 + 0x1p-6}));
}

TEST(Copy, RowsOfSlices) {
  const OwnedTensor a = counted(Dtype::kF32, {3, 6});
  const OwnedTensor b(Dtype::kF32, {3, 4});
  copy(b.view.slice(1, 1, 2), a.view.slice(1, 3, 2));
  EXPECT_EQ(values(b.view), (std::vector<double>{0, 1, 2, 0, 0, 7, 8, 0, 0, 13, 14, 0}));
}

TEST(Copy, Integers) {
  const OwnedTensor a(Dtype::kI32, {2});
  a.view.ptr<int32_t>()[1] = 7;
  const OwnedTensor b(Dtype::kI32, {2});
  copy(b.view, a.view);
  EXPECT_EQ(b.view.ptr<int32_t>()[1], 7);
}

// Longer than what is brought to the host at a time, and not a whole number of such pieces.
constexpr int64_t kMany = (int64_t{2} << 20) + 76;

void expect_read_whole(const Tensor& t, const Tensor& of_host) {
  for (const Dtype as : {t.dtype, Dtype::kF32}) {
    const OwnedTensor expected(as, {kMany});
    copy(expected.view, of_host);
    std::vector<std::byte> read;
    int pieces = 0;
    read_in_pieces(t, as, [&](std::span<const std::byte> bytes) {
      read.insert(read.end(), bytes.begin(), bytes.end());
      ++pieces;
    });
    EXPECT_EQ(pieces, 3);
    ASSERT_EQ(std::ssize(read), expected.view.bytes());
    EXPECT_EQ(std::memcmp(read.data(), expected.view.data, read.size()), 0);
  }
}

TEST(Pieces, AreTheWholeInItsOrder) {
  for (const Dtype dtype : {Dtype::kF32, Dtype::kBF16}) {
    const OwnedTensor t = counted(dtype, {7, kMany / 7});
    ASSERT_EQ(kMany % 7, 0);
    expect_read_whole(t.view, t.view.reshape({kMany}));
  }
  const OwnedTensor none(Dtype::kF32, {0, 4});
  read_in_pieces(none.view, Dtype::kF32, [](std::span<const std::byte>) { FAIL(); });
}

TEST(Pieces, SameElementsAreThoseOfOneShapeAndTheSameBits) {
  const OwnedTensor a = counted(Dtype::kBF16, {kMany});
  const OwnedTensor b = counted(Dtype::kBF16, {kMany});
  const OwnedTensor wide(Dtype::kF32, {kMany});
  copy(wide.view, a.view);
  EXPECT_TRUE(same_elements(a.view, b.view));
  EXPECT_TRUE(same_elements(a.view, wide.view));
  EXPECT_FALSE(same_elements(a.view, b.view.slice(0, 0, kMany - 1)));
  wide.view.ptr<float>()[kMany - 1] += 0.5F;
  EXPECT_FALSE(same_elements(a.view, wide.view));
  EXPECT_FALSE(same_elements(wide.view, a.view));
  b.view.ptr<bf16>()[kMany - 1] = round_to_bf16(0.5F);
  EXPECT_FALSE(same_elements(a.view, b.view));
}

TEST(Fill, EveryFloatingTypeAndZeroOfAll) {
  for (const Dtype dtype : {Dtype::kF32, Dtype::kF64, Dtype::kBF16}) {
    const OwnedTensor t(dtype, {5});
    fill(t.view, 1.5);
    EXPECT_EQ(values(t.view), std::vector<double>(5, 1.5));
  }
  const OwnedTensor i(Dtype::kI64, {1});
  i.view.ptr<int64_t>()[0] = 3;
  fill(i.view, 0);
  EXPECT_EQ(i.view.ptr<int64_t>()[0], 0);
}

TEST(Rows, GatherAndAdd) {
  const OwnedTensor wide = counted(Dtype::kF32, {3, 4});
  const Tensor x = wide.view.slice(1, 1, 2);
  const std::vector<int64_t> rows{2, 0, 2};
  const OwnedTensor out(Dtype::kF32, {3, 2});
  gather_rows(out.view, x, rows);
  EXPECT_EQ(values(out.view), (std::vector<double>{7, 8, -1, 0, 7, 8}));
  add_rows(x, out.view, rows);
  EXPECT_EQ(values(wide.view), (std::vector<double>{-2, -2, 0, 1, 2, 3, 4, 5, 6, 21, 24, 9}));
}

class CopyOnCuda : public ::testing::Test {
 protected:
  void SetUp() override {
    if (cuda_devices() == 0) {
      GTEST_SKIP() << why_no_cuda();
    }
  }

  // What `counted` gives, on the device.
  static OwnedTensor counted_there(Dtype dtype, std::initializer_list<int64_t> shape) {
    OwnedTensor there(dtype, shape, false, Device::kCuda);
    copy(there.view, counted(dtype, shape).view);
    return there;
  }
};

TEST_F(CopyOnCuda, BetweenEveryTwoDevicesAndTypes) {
  constexpr Dtype kTypes[] = {Dtype::kF32, Dtype::kBF16};
  constexpr Device kDevices[] = {Device::kCpu, Device::kCuda};
  // More elements than a block has threads; all of them are exact in bf16.
  std::vector<double> expected(300);
  std::iota(expected.begin(), expected.end(), -2.0);
  std::transform(expected.begin(), expected.end(), expected.begin(),
                 [](double x) { return x > 250 ? x - 250 : x; });
  const OwnedTensor exact(Dtype::kF64, {3, 100});
  std::copy(expected.begin(), expected.end(), exact.view.ptr<double>());
  for (const Device from_device : kDevices) {
    for (const Device to_device : kDevices) {
      for (const Dtype from : kTypes) {
        for (const Dtype to : kTypes) {
          const OwnedTensor a(from, {3, 100}, false, from_device);
          const OwnedTensor b(to, {3, 100}, false, to_device);
          copy(a.view, exact.view);
          copy(b.view, a.view);
          EXPECT_EQ(values(b.view), expected)
              << dtype_name(from) << " on " << from_device.describe() << " to " << dtype_name(to)
              << " on " << to_device.describe();
        }
      }
    }
  }
  const OwnedTensor none(Dtype::kF32, {0, 4}, false, Device::kCuda);
  const OwnedTensor narrow(Dtype::kBF16, {0, 4}, false, Device::kCuda);
  copy(none.view, narrow.view);
  copy(narrow.view, OwnedTensor(Dtype::kBF16, {0, 4}).view);
}

TEST_F(CopyOnCuda, IsReadInPieces) {
  for (const Dtype dtype : {Dtype::kF32, Dtype::kBF16}) {
    const OwnedTensor here = counted(dtype, {kMany});
    const OwnedTensor there(dtype, {kMany}, false, Device::kCuda);
    copy(there.view, here.view);
    expect_read_whole(there.view, here.view);
    EXPECT_TRUE(same_elements(there.view, here.view));
    fill(there.view.slice(0, kMany - 1, 1), 0.5);
    EXPECT_FALSE(same_elements(there.view, here.view));
  }
}

TEST_F(CopyOnCuda, RoundsAsTheCpuDoes) {
  const float numbers[] = {1.0F + 0x1p-8F,             // half way: to even
                           1.0F + 0x1p-8F + 0x1p-20F,  // above
                           1.0F + 0x1.8p-7F,           // half way: to even, which is up
                           -1.0F - 0x1p-8F - 0x1p-20F,
                           0x1.9p-130F,  // below the smallest normal number, half way
                           3.4e38F,      // to infinity
                           -std::numeric_limits<float>::infinity()};
  constexpr int64_t kCount = std::size(numbers);
  const OwnedTensor here(Dtype::kF32, {kCount});
  std::copy(std::begin(numbers), std::end(numbers), here.view.ptr<float>());
  const OwnedTensor narrow(Dtype::kBF16, {kCount});
  copy(narrow.view, here.view);
  const OwnedTensor there(Dtype::kF32, {kCount}, false, Device::kCuda);
  const OwnedTensor narrow_there(Dtype::kBF16, {kCount}, false, Device::kCuda);
  copy(there.view, here.view);
  copy(narrow_there.view, there.view);
  EXPECT_EQ(values(narrow_there.view), values(narrow.view));
}

TEST_F(CopyOnCuda, RowsOfSlices) {
  for (const Dtype dtype : {Dtype::kF32, Dtype::kBF16}) {
    const OwnedTensor here = counted(dtype, {3, 6});
    const OwnedTensor there = counted_there(dtype, {3, 6});
    for (const OwnedTensor* from : {&here, &there}) {
      for (const Device device : {Device(Device::kCpu), Device(Device::kCuda)}) {
        const OwnedTensor to(dtype, {3, 4}, false, device);
        copy(to.view.slice(1, 1, 2), from->view.slice(1, 3, 2));
        EXPECT_EQ(values(to.view), (std::vector<double>{0, 1, 2, 0, 0, 7, 8, 0, 0, 13, 14, 0}));
      }
    }
    // Heads of a fused projection: (2, 3, 2) of rows of 9.
    const OwnedTensor wide = counted_there(dtype, {2, 9});
    const OwnedTensor heads(dtype, {2, 3, 2}, false, Device::kCuda);
    copy(heads.view, wide.view.slice(1, 2, 6).split_last(3, 2));
    EXPECT_EQ(values(heads.view), (std::vector<double>{0, 1, 2, 3, 4, 5, 9, 10, 11, 12, 13, 14}));
  }
}

TEST_F(CopyOnCuda, IntegersAndFill) {
  const OwnedTensor a(Dtype::kI32, {2});
  a.view.ptr<int32_t>()[1] = 7;
  const OwnedTensor there(Dtype::kI32, {2}, false, Device::kCuda);
  const OwnedTensor b(Dtype::kI32, {2});
  copy(there.view, a.view);
  copy(b.view, there.view);
  EXPECT_EQ(b.view.ptr<int32_t>()[1], 7);
  fill(there.view, 0);
  copy(b.view, there.view);
  EXPECT_EQ(b.view.ptr<int32_t>()[1], 0);
  for (const Dtype dtype : {Dtype::kF32, Dtype::kBF16}) {
    const OwnedTensor t = counted_there(dtype, {700});
    fill(t.view.slice(0, 1, 600), 1.5);
    std::vector<double> expected = values(counted(dtype, {700}).view);
    std::fill_n(expected.begin() + 1, 600, 1.5);
    EXPECT_EQ(values(t.view), expected);
    fill(t.view, 0);
    EXPECT_EQ(values(t.view), std::vector<double>(700, 0.0));
    EXPECT_EQ(elements_of(t.view), std::vector<float>(700, 0.0F));
  }
}

TEST_F(CopyOnCuda, RowsGatheredAndAdded) {
  const std::vector<int64_t> rows{2, 0, 2};
  for (const Dtype dtype : {Dtype::kF32, Dtype::kBF16}) {
    const OwnedTensor wide = counted_there(dtype, {3, 4});
    const Tensor x = wide.view.slice(1, 1, 2);
    const OwnedTensor out(dtype, {3, 2}, false, Device::kCuda);
    gather_rows(out.view, x, rows);
    EXPECT_EQ(values(out.view), (std::vector<double>{7, 8, -1, 0, 7, 8}));
    const OwnedTensor two(dtype, {2, 2}, false, Device::kCuda);
    gather_rows(two.view, x, std::span(rows).first(2));
    add_rows(x, two.view, std::span(rows).first(2));
    EXPECT_EQ(values(wide.view), (std::vector<double>{-2, -2, 0, 1, 2, 3, 4, 5, 6, 14, 16, 9}));
    gather_rows(two.view.slice(0, 0, 0), x, {});
    add_rows(x, two.view.slice(0, 0, 0), {});
  }
  // Rows of every width that a thread can move at once, and many of them.
  std::vector<int64_t> many;
  for (int64_t i = 0; i < 3000; ++i) {
    many.push_back(i * 7919 % 500);
  }
  for (const Dtype dtype : {Dtype::kF32, Dtype::kBF16}) {
    for (const int64_t channels : {1, 2, 7, 8, 72}) {
      const OwnedTensor here(Dtype::kF32, {500, channels});
      for (int64_t i = 0; i < here.view.numel(); ++i) {
        here.view.ptr<float>()[i] = static_cast<float>(i % 251);
      }
      const OwnedTensor table(dtype, {500, channels}, false, Device::kCuda);
      copy(table.view, here.view);
      const OwnedTensor out(dtype, {3000, channels}, false, Device::kCuda);
      gather_rows(out.view, table.view, many);
      std::vector<double> expected;
      for (const int64_t row : many) {
        for (int64_t c = 0; c < channels; ++c) {
          expected.push_back(static_cast<double>((row * channels + c) % 251));
        }
      }
      EXPECT_EQ(values(out.view), expected) << channels << " channels";
    }
  }
}

TEST_F(CopyOnCuda, ErrorsNameWhatCame) {
  const OwnedTensor there(Dtype::kF32, {2, 3}, false, Device::kCuda);
  const OwnedTensor wide(Dtype::kF64, {2, 3}, false, Device::kCuda);
  const OwnedTensor here(Dtype::kF32, {1, 3});
  const std::vector<int64_t> rows{2};
  EXPECT_EQ(error_of([&] { copy(there.view, wide.view); }),
            "[copy] cuda converts f32 and bf16, got f64 (2, 3) to f32 (2, 3)");
  EXPECT_EQ(error_of([&] { fill(wide.view, 1); }),
            "[fill] cuda fills f32 and bf16, got f64 (2, 3)");
  EXPECT_EQ(error_of([&] { gather_rows(here.view, there.view, rows); }),
            "[gather_rows] expected both on one device, got cpu and cuda:0");
}

TEST(CopyErrors, NameWhatCame) {
  const OwnedTensor a(Dtype::kF32, {2, 3});
  const OwnedTensor b(Dtype::kF32, {3, 2});
  const OwnedTensor i(Dtype::kI32, {2, 3});
  Tensor elsewhere = a.view;
  elsewhere.device = {Device::kCuda, kCudaBuild ? uint8_t{77} : uint8_t{1}};
  const std::vector<int64_t> rows{2};
  const OwnedTensor one(Dtype::kF32, {1, 3});
  EXPECT_EQ(error_of([&] { copy(a.view, b.view); }),
            "[copy] expected tensors of one shape, got f32 (3, 2) to f32 (2, 3)");
  EXPECT_EQ(error_of([&] { copy(a.view, i.view); }), "[copy] expected f32, f64 or bf16, got i32");
  const std::string no_memory = error_of([&] { copy(elsewhere, a.view); });
  if (kCudaBuild) {
    EXPECT_THAT(no_memory, ::testing::HasSubstr("cuda:77"));
  } else {
    EXPECT_EQ(no_memory, "[copy] this build has no memory on cuda:1; take the cpu");
  }
  EXPECT_EQ(error_of([&] { fill(i.view, 1); }), "[fill] expected f32, f64 or bf16, got i32");
  EXPECT_EQ(error_of([&] { gather_rows(one.view, a.view, rows); }),
            "[gather_rows] expected rows in [0, 2), got 2");
  EXPECT_EQ(error_of([&] { add_rows(a.view, b.view, rows); }),
            "[add_rows] expected 1 rows of f32 (2, 3), got f32 (3, 2)");
}

}  // namespace
}  // namespace cambium
