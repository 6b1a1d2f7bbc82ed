#include "ops/optimizer/optimizer.h"

#include <limits>
#include <numeric>
#include <optional>

#include "base/parallel.h"
#include "base/random.h"
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
  EXPECT_EQ(p.view.grad_ptr<float>()[1], -50.0F);
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

// Matrices that are updated together are each as by themselves: by the CPU's kernels to the bit, by
// a GPU's, which takes their products as one, to what the iteration makes of rounding.
TEST(Muon, MatricesTogetherAreAsAlone) {
  const MuonConfig config{.gradient_scale = 0.5F, .rate = 0.1F, .weight_decay = 0.2F};
  std::vector<Device> devices = {{}};
  if (testing::on_cuda()) {
    devices.push_back({Device::kCuda, 0});
  }
  for (const Device device : devices) {
    for (const std::array<int64_t, 2> shape_of_one :
         {std::array<int64_t, 2>{3, 19}, {35, 6}, {16, 16}, {48, 128}}) {
      const int64_t rows = shape_of_one[0];
      const int64_t columns = shape_of_one[1];
      SCOPED_TRACE(fmt::format("{} ({}, {})", device.describe(), rows, columns));
      constexpr int64_t kCount = 5;
      const auto values = draw({{{kCount * rows * columns}}, {{kCount * rows * columns}}}, 3);
      const auto run = [&](bool together) {
        Workspace workspace(device);
        const Context ctx = workspace.context();
        const int64_t shape[] = {kCount, rows, columns};
        const OwnedTensor p(Dtype::kF32, shape, true, device);
        const OwnedTensor m(Dtype::kF32, shape, false, device);
        testing::put(p.view, values[0]);
        testing::put(p.view.grad_tensor(), values[1]);
        std::vector<MuonMatrix> matrices;
        for (int64_t i = 0; i < kCount; ++i) {
          const auto one = [&](const OwnedTensor& t) {
            return t.view.slice(0, i, 1).reshape({rows, columns});
          };
          matrices.push_back({one(p), one(m)});
        }
        if (together) {
          muon_update(ctx, matrices, config);
        } else {
          for (const auto& [weight, momentum] : matrices) {
            muon_update(ctx, weight, momentum, config);
          }
        }
        std::vector<double> all = testing::take(p.view);
        for (const Tensor& t : {m.view, p.view.grad_tensor()}) {
          const std::vector<double> more = testing::take(t);
          all.insert(all.end(), more.begin(), more.end());
        }
        return all;
      };
      const std::vector<double> alone = run(false);
      if (device.kind == Device::kCpu) {
        EXPECT_EQ(run(true), alone);
      } else {
        EXPECT_LE(testing::relative_error(run(true), alone), 1e-4);
      }
    }
  }
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

// Several tensors with one wait, some of more than a group of blocks.
TEST(SumSquares, OfManyAreThoseOfEach) {
  Arena arena;
  const Context ctx{.arena = &arena};
  std::vector<OwnedTensor> owned;
  std::vector<Tensor> tensors;
  for (const int64_t n : {int64_t{3}, int64_t{1} << 21, int64_t{1025}, (int64_t{1} << 20) + 7}) {
    owned.emplace_back(Dtype::kF32, std::initializer_list<int64_t>{n});
    for (int64_t i = 0; i < n; ++i) {
      owned.back().view.ptr<float>()[i] = static_cast<float>(i % 13) - 6.0F;
    }
    tensors.push_back(owned.back().view);
  }
  const std::vector<double> sums = sums_of_squares(ctx, tensors);
  ASSERT_EQ(sums.size(), tensors.size());
  for (size_t i = 0; i < sums.size(); ++i) {
    double exact = 0.0;
    for (int64_t k = 0; k < tensors[i].numel(); ++k) {
      exact += std::pow(static_cast<double>(k % 13) - 6.0, 2);
    }
    EXPECT_EQ(sums[i], exact);  // small whole numbers
    EXPECT_EQ(sums[i], sum_squares(ctx, tensors[i]));
  }
  EXPECT_TRUE(sums_of_squares(ctx, {}).empty());
  if (testing::on_cuda()) {
    const testing::CudaContext cuda;
    std::vector<OwnedTensor> there;
    std::vector<Tensor> views;
    for (const Tensor& t : tensors) {
      there.emplace_back(Dtype::kF32, std::initializer_list<int64_t>{t.numel()}, false,
                         Device::kCuda);
      copy(there.back().view, t);
      views.push_back(there.back().view);
    }
    EXPECT_EQ(sums_of_squares(cuda.ctx, views), sums);
  }
}

// A parameter with moments in bf16, of which one update is done.
struct Narrow {
  OwnedTensor p, m, v;

  explicit Narrow(int64_t n, Device device = {})
      : p(Dtype::kF32, {n}, true, device),
        m(Dtype::kBF16, {n}, false, device),
        v(Dtype::kBF16, {n}, false, device) {
    const OwnedTensor drawn(Dtype::kF32, {n});
    uint64_t stream = 0;
    for (const Tensor& t : {p.view.detached(), p.view.grad_tensor(), m.view, v.view}) {
      Rng rng(3, ++stream);
      for (int64_t i = 0; i < n; ++i) {
        drawn.view.ptr<float>()[i] = std::abs(rng.normal());
      }
      copy(t, drawn.view);
    }
  }
};

constexpr AdamwConfig kNarrowUpdate = {.gradient_scale = 0.5F,
                                       .rate = 1e-2F,
                                       .m_correction = 1.5F,
                                       .v_correction = 1.25F,
                                       .weight_decay = 0.1F};

// The exact moments lie between the kept one and its neighbour, the parameter is the usual one.
TEST(AdamwNarrow, RoundsToNeighboursAndIsRightOnAverage) {
  constexpr int64_t kN = 100003;
  for (const bool cuda : {false, true}) {
    if (cuda && !testing::on_cuda()) {
      continue;
    }
    const Device device = cuda ? Device::kCuda : Device::kCpu;
    Arena arena;
    const Context here{.arena = &arena};
    const std::optional<testing::CudaContext> there =
        cuda ? std::optional<testing::CudaContext>(std::in_place) : std::nullopt;
    const Context& ctx = cuda ? there->ctx : here;
    const auto check = [&] {
      const Narrow before(kN);
      const Narrow after(kN, device);
      adamw_update_narrow(ctx, after.p.view, after.m.view, after.v.view, kNarrowUpdate, 77);
      const std::vector<float> p = elements_of(after.p.view.detached());
      const std::vector<float> m = elements_of(after.m.view);
      const std::vector<float> v = elements_of(after.v.view);
      const std::vector<float> m_before = elements_of(before.m.view);
      const std::vector<float> v_before = elements_of(before.v.view);
      const std::vector<float> g = elements_of(before.p.view.grad_tensor());
      const std::vector<float> p_before = elements_of(before.p.view.detached());
      double bias = 0.0;
      double spread = 0.0;
      for (size_t i = 0; i < p.size(); ++i) {
        const AdamwConfig& c = kNarrowUpdate;
        const double grad = static_cast<double>(g[i]) * 0.5;
        const double b1 = static_cast<double>(c.beta1);
        const double b2 = static_cast<double>(c.beta2);
        const double exact_m = b1 * static_cast<double>(m_before[i]) + (1 - b1) * grad;
        const double exact_v = b2 * static_cast<double>(v_before[i]) + (1 - b2) * grad * grad;
        // bf16 has 8 bits of mantissa: neighbours are at most 2^-7 of the value apart.
        ASSERT_NEAR(static_cast<double>(m[i]), exact_m, exact_m * 0x1p-7) << i;
        ASSERT_NEAR(static_cast<double>(v[i]), exact_v, exact_v * 0x1p-7) << i;
        const double step =
            exact_m * 1.5 / (std::sqrt(exact_v * 1.25) + static_cast<double>(c.epsilon));
        const double rate = static_cast<double>(c.rate);
        const double expected =
            static_cast<double>(p_before[i]) * (1 - rate * static_cast<double>(c.weight_decay)) -
            rate * step;
        ASSERT_NEAR(static_cast<double>(p[i]), expected, 1e-5 * std::abs(expected) + 1e-6) << i;
        const double error = (static_cast<double>(v[i]) - exact_v) / exact_v;
        bias += error;
        spread += error * error;
      }
      EXPECT_GT(spread, 0.0);
      EXPECT_LT(std::abs(bias), 5.0 * std::sqrt(spread));  // of a sum of independent errors
      EXPECT_EQ(elements_of(after.p.view.grad_tensor()), g);
    };
    cuda ? check() : for_each_isa(check);
  }
}

TEST(AdamwNarrow, TheKeyDecidesTheRounding) {
  Arena arena;
  const Context ctx{.arena = &arena};
  const auto moments = [&](uint64_t key) {
    const Narrow t(4099);
    adamw_update_narrow(ctx, t.p.view, t.m.view, t.v.view, kNarrowUpdate, key);
    return std::pair(elements_of(t.m.view), elements_of(t.v.view));
  };
  EXPECT_EQ(moments(1), moments(1));
  EXPECT_NE(moments(1).first, moments(2).first);
  EXPECT_NE(moments(1).second, moments(2).second);
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
  EXPECT_EQ(error_of([&] { adamw_update_narrow(ctx, p.view, m.view, m.view, {}, 1); }),
            "[adamw_update_narrow] expected a contiguous m bf16 shaped like p f32 (2, 3), got f32 "
            "(2, 3)");
  EXPECT_EQ(error_of([&] { muon_update(ctx, p.view.reshape({6}), m.view, {}); }),
            "[muon_update] expected a matrix p, got f32 (6)");
  const OwnedTensor other(Dtype::kF32, {3, 2}, true);
  const OwnedTensor momentum(Dtype::kF32, {3, 2});
  const MuonMatrix matrices[] = {{p.view, m.view}, {other.view, momentum.view}};
  EXPECT_EQ(error_of([&] { muon_update(ctx, matrices, {}); }),
            "[muon_update] expected matrices of one shape, got f32 (2, 3) and f32 (3, 2)");
  EXPECT_EQ(error_of([&] { all_finite(ctx, p.view.slice(1, 0, 2)); }),
            "[all_finite] expected a contiguous x, got f32 (2, 2)");
}

}  // namespace
}  // namespace cambium
