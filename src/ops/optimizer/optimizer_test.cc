#include "ops/optimizer/optimizer.h"

#include <limits>
#include <numeric>

#include "base/parallel.h"
#include "ops/testing.h"
#include "tensor/copy.h"

namespace cambium {
namespace {

using testing::draw;
using testing::error_of;
using testing::for_each_isa;

// The numbers of a parameter and its states after an update: p, gradient, m, v.
using Update =
    std::function<void(const Context&, const Tensor& p, const Tensor& m, const Tensor& v)>;

std::vector<double> updated(Dtype dtype, bool reference, std::initializer_list<int64_t> shape,
                            const Update& update) {
  Arena arena;
  const Context ctx{.arena = &arena, .reference = reference};
  const std::vector<int64_t> sizes(shape);
  const auto values = draw({{sizes}, {sizes}, {sizes}, {sizes, 0, 1}}, 7);
  const OwnedTensor p(dtype, shape, true);
  const OwnedTensor m(dtype, shape);
  const OwnedTensor v(dtype, shape);
  const Tensor parts[] = {p.view, p.view.grad_tensor(), m.view, v.view};
  std::vector<double> out;
  for (size_t i = 0; i < 4; ++i) {
    for (size_t j = 0; j < values[i].size(); ++j) {
      if (dtype == Dtype::kF64) {
        parts[i].ptr<double>()[j] = values[i][j];
      } else {
        parts[i].ptr<float>()[j] = static_cast<float>(values[i][j]);
      }
    }
  }
  update(ctx, p.view, m.view, v.view);
  for (const Tensor& t : parts) {
    const auto part = testing::to_doubles(t, t.data);
    out.insert(out.end(), part.begin(), part.end());
  }
  return out;
}

void expect_kernels_match(std::initializer_list<int64_t> shape, const Update& update,
                          double tolerance) {
  const auto exact = updated(Dtype::kF64, true, shape, update);
  EXPECT_LE(testing::relative_error(updated(Dtype::kF32, true, shape, update), exact), tolerance);
  for_each_isa([&] {
    EXPECT_LE(testing::relative_error(updated(Dtype::kF32, false, shape, update), exact),
              tolerance);
  });
}

TEST(Adamw, KernelsMatchDefinition) {
  const auto update = [](const Context& ctx, const Tensor& p, const Tensor& m, const Tensor& v) {
    adamw_update(ctx, p, m, v,
                 {.gradient_scale = 0.5F,
                  .rate = 0.1F,
                  .m_correction = 1.7F,
                  .v_correction = 2.9F,
                  .weight_decay = 0.2F});
  };
  expect_kernels_match({1}, update, 1e-6);
  expect_kernels_match({37}, update, 1e-6);
  expect_kernels_match({40, 1001}, update, 1e-6);
}

TEST(Adamw, FirstStepByHand) {
  // m^ = g, v^ = g^2: a step of the rate against the sign of g, whatever its size.
  Arena arena;
  const Context ctx{.arena = &arena};
  const OwnedTensor p(Dtype::kF32, {2}, true);
  const OwnedTensor m(Dtype::kF32, {2});
  const OwnedTensor v(Dtype::kF32, {2});
  p.view.grad_ptr<float>()[0] = 1e-3F;
  p.view.grad_ptr<float>()[1] = -50.0F;
  adamw_update(ctx, p.view, m.view, v.view,
               {.rate = 0.25F, .m_correction = 10.0F, .v_correction = 20.0F});
  EXPECT_NEAR(p.view.ptr<float>()[0], -0.25F, 1e-4F);
  EXPECT_NEAR(p.view.ptr<float>()[1], 0.25F, 1e-4F);
  EXPECT_EQ(p.view.grad_ptr<float>()[1], 0.0F);
}

TEST(Muon, KernelsMatchDefinition) {
  const auto update = [](const Context& ctx, const Tensor& p, const Tensor& m, const Tensor&) {
    muon_update(ctx, p, m, {.gradient_scale = 0.5F, .rate = 0.1F, .weight_decay = 0.2F});
  };
  // Wide, tall and square; the iteration multiplies the error of a product.
  expect_kernels_match({3, 19}, update, 1e-4);
  expect_kernels_match({35, 6}, update, 1e-4);
  expect_kernels_match({17, 17}, update, 1e-4);
}

TEST(Muon, UpdateHasSingularValuesNearOne) {
  // Rows of a wide update are nearly orthogonal, of length about 0.2 sqrt(columns) times the rate.
  Arena arena;
  const Context ctx{.arena = &arena};
  const OwnedTensor p(Dtype::kF32, {2, 8}, true);
  const OwnedTensor m(Dtype::kF32, {2, 8});
  const auto values = draw({{{16}}});
  std::copy(values[0].begin(), values[0].end(), p.view.grad_ptr<float>());
  muon_update(ctx, p.view, m.view, {.rate = 1.0F});
  const float* row = p.view.ptr<float>();
  const float scale = 0.04F * 8;
  const float length = std::inner_product(row, row + 8, row, 0.0F) / scale;
  const float across = std::inner_product(row, row + 8, row + 8, 0.0F) / scale;
  EXPECT_NEAR(length, 1.0F, 0.5F);
  EXPECT_NEAR(across, 0.0F, 0.35F);
}

TEST(SumSquares, OfAnyLengthByAnyIsaAndThreads) {
  Arena arena;
  const Context ctx{.arena = &arena};
  for (const int64_t n : {1, 17, 1024, 1025, 70001}) {
    const OwnedTensor x(Dtype::kF32, {n});
    double exact = 0.0;
    for (int64_t i = 0; i < n; ++i) {
      x.view.ptr<float>()[i] = static_cast<float>(i % 13) - 6.5F;
      exact += (static_cast<double>(i % 13) - 6.5) * (static_cast<double>(i % 13) - 6.5);
    }
    for_each_isa([&] {
      const int before = num_threads();
      set_num_threads(1);
      const double one = sum_squares(ctx, x.view);
      set_num_threads(3);
      EXPECT_EQ(sum_squares(ctx, x.view), one);
      set_num_threads(before);
      EXPECT_NEAR(one, exact, 1e-6 * exact);
    });
  }
}

TEST(AllFinite, FindsOneAnywhere) {
  Arena arena;
  const OwnedTensor x(Dtype::kF32, {3000});
  for (const bool reference : {true, false}) {
    const Context ctx{.arena = &arena, .reference = reference};
    for_each_isa([&] {
      EXPECT_TRUE(all_finite(ctx, x.view));
      for (const float bad :
           {std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity(),
            std::numeric_limits<float>::quiet_NaN()}) {
        for (const int64_t at : {0, 1023, 1024, 2999}) {
          x.view.ptr<float>()[at] = bad;
          EXPECT_FALSE(all_finite(ctx, x.view)) << bad << " at " << at;
          x.view.ptr<float>()[at] = std::numeric_limits<float>::max();
          EXPECT_TRUE(all_finite(ctx, x.view));
        }
      }
    });
  }
}

TEST(OptimizerErrors, NameWhatCame) {
  Arena arena;
  const Context ctx{.arena = &arena};
  const OwnedTensor p(Dtype::kF32, {2, 3}, true);
  const OwnedTensor m(Dtype::kF32, {2, 3});
  const OwnedTensor wrong(Dtype::kF32, {3, 2});
  EXPECT_EQ(error_of([&] { adamw_update(ctx, m.view, m.view, m.view, {}); }),
            "[adamw_update] expected a contiguous p with a gradient, got f32 (2, 3)");
  EXPECT_EQ(error_of([&] { adamw_update(ctx, p.view, m.view, wrong.view, {}); }),
            "[adamw_update] expected a contiguous v f32 shaped like p f32 (2, 3), got f32 (3, 2)");
  EXPECT_EQ(error_of([&] { muon_update(ctx, p.view.reshape({6}), m.view, {}); }),
            "[muon_update] expected a matrix p, got f32 (6)");
  EXPECT_EQ(error_of([&] { all_finite(ctx, p.view.slice(1, 0, 2)); }),
            "[all_finite] expected a contiguous x, got f32 (2, 2)");
}

}  // namespace
}  // namespace cambium
