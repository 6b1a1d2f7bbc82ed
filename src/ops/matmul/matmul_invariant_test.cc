// Products of batch-invariant contexts on CUDA: their numbers, and that a row has the same bits
// among any number of rows.
#include "ops/matmul/matmul.h"
#include "ops/testing.h"

namespace cambium {
namespace {

using testing::as_stored;
using testing::cuda_tensor;
using testing::CudaContext;
using testing::draw;
using testing::kNarrowForward;
using testing::norm_error;
using testing::put;
using testing::take;

constexpr int64_t kMostRows = 300;

struct Size {
  int64_t n, k;
};

std::ostream& operator<<(std::ostream& out, const Size& s) {
  return out << s.n << "x" << s.k;
}

class BatchInvariantProducts : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!testing::on_cuda()) {
      GTEST_SKIP() << why_no_cuda();
    }
  }
};
class BatchInvariantMatmul : public BatchInvariantProducts,
                             public ::testing::WithParamInterface<Size> {};

enum class ResultKind { kPlain, kAdded, kUnrounded };

/// Rows [first, first + rows) of x times the weight, with the bias; or added to what y holds.
std::vector<double> product_of(ResultKind kind, Dtype type, const Tensor& x, const Tensor& weight,
                               const Tensor& bias, const Tensor& before, int64_t first,
                               int64_t rows) {
  CudaContext cuda(type);
  cuda.ctx.batch_invariant = true;
  const Tensor part = x.slice(0, first, rows);
  if (kind == ResultKind::kUnrounded) {
    return take(matmul_unrounded(cuda.ctx, part, weight, bias));
  }
  if (kind == ResultKind::kPlain) {
    return take(matmul(cuda.ctx, part, weight, bias));
  }
  const Tensor y = cuda.ctx.arena->empty(type, {rows, weight.dim(0)});
  copy(y, before.slice(0, first, rows));
  matmul_into(cuda.ctx, y, part, weight, true);
  return take(y);
}

TEST_P(BatchInvariantMatmul, ARowIsTheSameAmongAnyNumber) {
  const auto [n, k] = GetParam();
  const auto drawn = draw({{{kMostRows, k}}, {{n, k}}, {{n}}, {{kMostRows, n}}});
  for (const Dtype type : {Dtype::kF32, Dtype::kBF16}) {
    for (const Dtype stored : {Dtype::kF32, Dtype::kBF16}) {
      const bool narrow = type == Dtype::kBF16;
      const auto x = as_stored(drawn[0], type);
      const auto w = as_stored(drawn[1], narrow ? Dtype::kBF16 : stored);
      const auto before = as_stored(drawn[3], type);
      const OwnedTensor x_here(Dtype::kF64, {kMostRows, k});
      const OwnedTensor w_here(Dtype::kF64, {n, k});
      const OwnedTensor bias_here(Dtype::kF64, {n});
      put(x_here.view, x);
      put(w_here.view, w);
      put(bias_here.view, drawn[2]);
      const OwnedTensor x_there = cuda_tensor(type, {kMostRows, k}, x);
      const OwnedTensor w_there = cuda_tensor(stored, {n, k}, w);
      const OwnedTensor bias_there = cuda_tensor(Dtype::kF32, {n}, drawn[2]);
      const OwnedTensor before_there = cuda_tensor(type, {kMostRows, n}, before);
      std::vector<double> plain;
      for (const ResultKind kind :
           {ResultKind::kPlain, ResultKind::kAdded, ResultKind::kUnrounded}) {
        SCOPED_TRACE(fmt::format("x {}, weight {}, result {}", dtype_name(type), dtype_name(stored),
                                 static_cast<int>(kind)));
        const bool accumulate = kind == ResultKind::kAdded;
        const auto part_of = [&](int64_t first, int64_t rows) {
          return product_of(kind, type, x_there.view, w_there.view, bias_there.view,
                            before_there.view, first, rows);
        };
        const auto all = part_of(0, kMostRows);
        Arena arena;
        Context exact{.arena = &arena};
        auto expected =
            take(matmul(exact, x_here.view, w_here.view, accumulate ? Tensor{} : bias_here.view));
        for (size_t i = 0; accumulate && i < expected.size(); ++i) {
          expected[i] += before[i];
        }
        const bool rounded = narrow && kind != ResultKind::kUnrounded;
        EXPECT_LE(norm_error(all, expected), rounded ? kNarrowForward : narrow ? 1e-4 : 1e-5);
        if (kind == ResultKind::kPlain) {
          plain = all;
        } else if (kind == ResultKind::kUnrounded) {
          EXPECT_EQ(as_stored(all, type), plain) << "it is rounded once, where it is stored";
        }
        for (const int64_t rows : {1, 2, 5, 16, 17, 33, 64, 65, 127, 128, 256}) {
          const int64_t first = kMostRows - rows;
          const auto part = part_of(first, rows);
          EXPECT_TRUE(std::equal(part.begin(), part.end(), all.begin() + first * n, all.end()))
              << rows << " rows";
        }
      }
    }
  }
}

// Depths within a slice, of one and of many; columns that no tile divides, and enough of them for
// the large tiles; sizes that cannot be read 16 bytes at a time.
INSTANTIATE_TEST_SUITE_P(Sizes, BatchInvariantMatmul,
                         ::testing::Values(Size{1, 1}, Size{33, 100}, Size{64, 64}, Size{40, 7},
                                           Size{256, 1032}, Size{130, 2600}, Size{31, 515},
                                           Size{4200, 192}),
                         ::testing::PrintToStringParamName());

// Products of one x have the bits they have by themselves, however their results lie.
TEST_F(BatchInvariantProducts, ProductsTogetherAreThoseApart) {
  constexpr int64_t kDepth = 576;
  const std::vector<int64_t> sizes = {64, 33, 200};
  const auto drawn = draw({{{kMostRows, kDepth}}, {{297, kDepth}}, {{297}}});
  for (const Dtype type : {Dtype::kF32, Dtype::kBF16}) {
    const OwnedTensor x = cuda_tensor(type, {kMostRows, kDepth}, as_stored(drawn[0], type));
    const OwnedTensor w = cuda_tensor(Dtype::kF32, {297, kDepth}, drawn[1]);
    const OwnedTensor b = cuda_tensor(Dtype::kF32, {297}, drawn[2]);
    std::array<Affine, 3> of;
    int64_t row = 0;
    for (size_t i = 0; i < of.size(); ++i) {
      of[i] = {w.view.slice(0, row, sizes[i]), i == 1 ? Tensor{} : b.view.slice(0, row, sizes[i])};
      row += sizes[i];
    }
    for (const int64_t rows : {0, 1, 30, 100, 300}) {
      SCOPED_TRACE(fmt::format("{} rows of {}", rows, dtype_name(type)));
      CudaContext cuda(type);
      cuda.ctx.batch_invariant = true;
      const Tensor part = x.view.slice(0, 0, rows);
      const std::array<Tensor, 3> together = matmul_each<3>(cuda.ctx, part, of);
      for (size_t i = 0; i < of.size(); ++i) {
        EXPECT_EQ(take(together[i]), take(matmul(cuda.ctx, part, of[i].weight, of[i].bias))) << i;
      }
    }
  }
}

TEST_F(BatchInvariantProducts, WithoutDepthIsTheBias) {
  for (const Dtype type : {Dtype::kF32, Dtype::kBF16}) {
    CudaContext cuda(type);
    cuda.ctx.batch_invariant = true;
    const OwnedTensor bias = cuda_tensor(Dtype::kF32, {3}, {1, 2, 3});
    for (const int64_t rows : {1, 20, 100}) {
      const auto y = take(matmul(cuda.ctx, cuda.ctx.arena->empty(type, {rows, 0}),
                                 cuda.ctx.arena->empty(Dtype::kF32, {3, 0}), bias.view));
      for (size_t i = 0; i < y.size(); ++i) {
        EXPECT_EQ(y[i], static_cast<double>(i % 3 + 1));
      }
    }
  }
}

}  // namespace
}  // namespace cambium
