#include "ops/optimizer/optimizer.h"

#include <limits>
#include <numeric>

#include "base/parallel.h"
#include "ops/testing.h"
#include "tensor/copy.h"
#include "tensor/workspace.h"

namespace cambium {
namespace {

using testing::draw;
using testing::error_of;
using testing::for_each_isa;

// The numbers of a parameter and its states after an update: p, gradient, m, v.
using Update =
    std::function<void(const Context&, const Tensor& p, const Tensor& m, const Tensor& v)>;

struct Form {
  Device device;
  Dtype dtype;  // of p; the others have that of its sums
  bool reference = false;
  int64_t begin = 0;  // where the elements of each begin in their memory
};

std::vector<std::vector<double>> draw_parts(std::initializer_list<int64_t> shape) {
  const std::vector<int64_t> sizes(shape);
  return draw({{sizes}, {sizes}, {sizes}, {sizes, 0, 1}}, 7);
}

std::vector<std::vector<double>> updated(const Form& form,
                                         const std::vector<std::vector<double>>& values,
                                         std::initializer_list<int64_t> shape,
                                         const Update& update) {
  Workspace workspace(form.device);
  Context ctx = workspace.context();
  ctx.reference = form.reference;
  const auto count = static_cast<int64_t>(values[0].size());
  const auto owned = [&](Dtype dtype, bool with_grad) {
    return OwnedTensor(dtype, {form.begin + count}, with_grad, form.device);
  };
  const auto part = [&](const OwnedTensor& t) {
    return t.view.slice(0, form.begin, count).reshape(shape);
  };
  const OwnedTensor p = owned(form.dtype, true);
  const OwnedTensor m = owned(sum_dtype(form.dtype), false);
  const OwnedTensor v = owned(sum_dtype(form.dtype), false);
  const Tensor parts[] = {part(p), part(p).grad_tensor(), part(m), part(v)};
  for (size_t i = 0; i < 4; ++i) {
    testing::put(parts[i], values[i]);
  }
  update(ctx, parts[0], parts[2], parts[3]);
  std::vector<std::vector<double>> out;
  for (const Tensor& t : parts) {
    out.push_back(testing::take(t));
  }
  return out;
}

std::vector<double> joined(const std::vector<std::vector<double>>& parts) {
  std::vector<double> all;
  for (const auto& part : parts) {
    all.insert(all.end(), part.begin(), part.end());
  }
  return all;
}

// By CUDA on vectors and off them; of p in bf16 all that stays f32 is as exact.
void expect_cuda_matches(std::initializer_list<int64_t> shape, const Update& update,
                         double tolerance) {
  for (const Dtype dtype : {Dtype::kF32, Dtype::kBF16}) {
    auto values = draw_parts(shape);
    values[0] = testing::as_stored(values[0], dtype);
    const auto exact = updated({{}, Dtype::kF64, true}, values, shape, update);
    for (const int64_t begin : {0, 1}) {
      SCOPED_TRACE(fmt::format("cuda {} from element {}", dtype_name(dtype), begin));
      const Form form{Device::kCuda, dtype, false, begin};
      auto got = updated(form, values, shape, update);
      EXPECT_EQ(updated(form, values, shape, update), got) << "two runs differ";
      if (dtype == Dtype::kBF16) {
        EXPECT_LE(testing::norm_error(got[0], exact[0]), 0x1p-8);
        got[0] = exact[0];
      }
      EXPECT_LE(testing::relative_error(joined(got), joined(exact)), tolerance);
    }
  }
}

void expect_kernels_match(std::initializer_list<int64_t> shape, const Update& update,
                          double tolerance) {
  const auto values = draw_parts(shape);
  const auto run = [&](Dtype dtype, bool reference) {
    return joined(updated({{}, dtype, reference}, values, shape, update));
  };
  const auto exact = run(Dtype::kF64, true);
  EXPECT_LE(testing::relative_error(run(Dtype::kF32, true), exact), tolerance);
  for_each_isa(
      [&] { EXPECT_LE(testing::relative_error(run(Dtype::kF32, false), exact), tolerance); });
  if (testing::on_cuda()) {
    expect_cuda_matches(shape, update, tolerance);
  }
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
  expect_kernels_match({40, 100}, update, 1e-4);
  expect_kernels_match({97, 33}, update, 1e-4);
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
    for (const Dtype dtype : {Dtype::kF32, Dtype::kBF16}) {
      if (!testing::on_cuda()) {
        break;
      }
      // The numbers are exact in bf16 too. From the second element on nothing is aligned.
      const testing::CudaContext cuda;
      const OwnedTensor there(dtype, {n + 1}, false, Device::kCuda);
      for (const int64_t begin : {0, 1}) {
        const Tensor part = there.view.slice(0, begin, n);
        copy(part, x.view);
        const double sum = sum_squares(cuda.ctx, part);
        EXPECT_NEAR(sum, exact, 1e-6 * exact) << "cuda " << dtype_name(dtype);
        EXPECT_EQ(sum_squares(cuda.ctx, part), sum) << "two runs differ";
      }
    }
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

TEST(AllFinite, FindsOneAnywhereOnCuda) {
  if (!testing::on_cuda()) {
    GTEST_SKIP() << why_no_cuda();
  }
  const testing::CudaContext cuda;
  for (const Dtype dtype : {Dtype::kF32, Dtype::kBF16}) {
    const OwnedTensor x(dtype, {3001}, false, Device::kCuda);
    for (const int64_t begin : {0, 1}) {
      const Tensor part = x.view.slice(0, begin, 3000);
      EXPECT_TRUE(all_finite(cuda.ctx, part));
      for (const double bad :
           {std::numeric_limits<double>::infinity(), -std::numeric_limits<double>::infinity(),
            std::numeric_limits<double>::quiet_NaN()}) {
        for (const int64_t at : {0, 31, 1023, 1024, 2999}) {
          testing::put(part.slice(0, at, 1), {bad});
          EXPECT_FALSE(all_finite(cuda.ctx, part)) << dtype_name(dtype) << " at " << at;
          testing::put(part.slice(0, at, 1), {3e38});
          EXPECT_TRUE(all_finite(cuda.ctx, part)) << dtype_name(dtype) << " at " << at;
        }
      }
    }
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
