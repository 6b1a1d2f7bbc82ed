#include "tensor/copy.h"

#include <gtest/gtest.h>

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

TEST(CopyErrors, NameWhatCame) {
  const OwnedTensor a(Dtype::kF32, {2, 3});
  const OwnedTensor b(Dtype::kF32, {3, 2});
  const OwnedTensor i(Dtype::kI32, {2, 3});
  Tensor elsewhere = a.view;
  elsewhere.device = {Device::kCuda, 1};
  const std::vector<int64_t> rows{2};
  const OwnedTensor one(Dtype::kF32, {1, 3});
  EXPECT_EQ(error_of([&] { copy(a.view, b.view); }),
            "[copy] expected tensors of one shape, got f32 (3, 2) to f32 (2, 3)");
  EXPECT_EQ(error_of([&] { copy(a.view, i.view); }), "[copy] expected f32, f64 or bf16, got i32");
  EXPECT_EQ(error_of([&] { copy(elsewhere, a.view); }),
            "[copy] this build has no memory on cuda:1; take the cpu");
  EXPECT_EQ(error_of([&] { fill(i.view, 1); }), "[fill] expected f32, f64 or bf16, got i32");
  EXPECT_EQ(error_of([&] { gather_rows(one.view, a.view, rows); }),
            "[gather_rows] expected rows in [0, 2), got 2");
  EXPECT_EQ(error_of([&] { add_rows(a.view, b.view, rows); }),
            "[add_rows] expected 1 rows of f32 (2, 3), got f32 (3, 2)");
}

}  // namespace
}  // namespace cambium
