#include "ops/matmul/matmul.h"

#include "base/float16.h"
#include "base/parallel.h"
#include "base/testing.h"
#include "ops/matmul/matmul_testing.h"
#include "ops/testing.h"
#include "tensor/workspace.h"

namespace cambium {
namespace {

using testing::as_stored;
using testing::draw;
using testing::error_of;
using testing::expect_gradients_match_differences;
using testing::expect_kernels_match_reference;
using testing::for_each_isa;
using testing::MatmulShape;
using testing::relative_error;

class Matmul : public ::testing::TestWithParam<MatmulShape> {};

TEST_P(Matmul, KernelsMatchDefinition) {
  const auto [t, n, k] = GetParam();
  const auto plain = [](Context& ctx, const std::vector<Tensor>& in) {
    return matmul(ctx, in[0], in[1]);
  };
  const auto with_bias = [](Context& ctx, const std::vector<Tensor>& in) {
    return matmul(ctx, in[0], in[1], in[2]);
  };
  expect_kernels_match_reference(plain, {{{t, k}}, {{n, k}, -1.0, 1.0, true, true}});
  expect_kernels_match_reference(with_bias, {{{t, k}}, {{n, k}, -1.0, 1.0, true, true}, {{n}}});
}

// Every tile height and width, tails of every axis, one and several blocks of depth.
INSTANTIATE_TEST_SUITE_P(
    Shapes, Matmul,
    ::testing::Values(MatmulShape{1, 1, 1}, MatmulShape{1, 64, 64}, MatmulShape{2, 3, 5},
                      MatmulShape{3, 80, 224}, MatmulShape{4, 17, 33}, MatmulShape{5, 47, 600},
                      MatmulShape{6, 96, 31}, MatmulShape{7, 130, 257}, MatmulShape{8, 16, 512},
                      MatmulShape{9, 33, 300}, MatmulShape{12, 31, 47}, MatmulShape{13, 65, 80},
                      MatmulShape{16, 47, 513}, MatmulShape{17, 47, 64}, MatmulShape{33, 7, 300},
                      MatmulShape{65, 34, 257}, MatmulShape{400, 24, 19}),
    ::testing::PrintToStringParamName());

TEST(MatmulGradients, MatchDifferences) {
  const auto operation = [](Context& ctx, const std::vector<Tensor>& in) {
    return matmul(ctx, in[0], in[1], in[2]);
  };
  expect_gradients_match_differences(operation, {{{5, 7}}, {{6, 7}}, {{6}}});
  // Frozen weights: the gradient still reaches x.
  expect_gradients_match_differences(operation, {{{5, 7}}, {{6, 7}, -1, 1, false}, {{6}}});
}

// Of x in bf16 the result is that of sums; of wider x it is the product's.
TEST(MatmulUnrounded, IsTheProductInTheTypeOfSums) {
  const auto unrounded = [](Context& ctx, const std::vector<Tensor>& in) {
    return matmul_unrounded(ctx, in[0], in[1], in[2]);
  };
  for (const MatmulShape s : {MatmulShape{1, 130, 600}, MatmulShape{5, 7, 33},
                              MatmulShape{9, 33, 300}, MatmulShape{65, 34, 257}}) {
    SCOPED_TRACE(s);
    expect_kernels_match_reference(unrounded,
                                   {{{s.t, s.k}}, {{s.n, s.k}, -1.0, 1.0, true, true}, {{s.n}}});
  }
  expect_gradients_match_differences(unrounded, {{{5, 7}}, {{6, 7}}, {{6}}});

  Arena nowhere(Device{Device::kMeta});
  for (const auto& [type, result] : {std::pair{Dtype::kBF16, Dtype::kF32},
                                     {Dtype::kF32, Dtype::kF32},
                                     {Dtype::kF64, Dtype::kF64}}) {
    Context ctx{.arena = &nowhere};
    const Tensor weight = nowhere.empty(sum_dtype(type), {3, 4});
    EXPECT_EQ(matmul_unrounded(ctx, nowhere.empty(type, {2, 4}), weight).dtype, result);
  }
}

TEST(MatmulViews, ColumnSliceOfX) {
  const auto operation = [](Context& ctx, const std::vector<Tensor>& in) {
    return matmul(ctx, in[0].slice(1, 8, 24), in[1]);
  };
  expect_gradients_match_differences(operation, {{{6, 40}}, {{10, 24}, -1.0, 1.0, true, true}});
  expect_kernels_match_reference(operation, {{{6, 40}}, {{10, 24}, -1.0, 1.0, true, true}});
}

TEST(MatmulViews, NoTokensAndNoDepth) {
  Arena arena;
  Context ctx{.arena = &arena};
  std::vector<float> w(12, 1.0F);
  std::vector<float> bias{1.0F, 2.0F, 3.0F};
  const Tensor none = arena.empty(Dtype::kF32, {0, 4});
  EXPECT_EQ(matmul(ctx, none, Tensor::of(w.data(), {3, 4})).dim(0), 0);
  const Tensor y = matmul(ctx, arena.empty(Dtype::kF32, {2, 0}), Tensor::of(w.data(), {3, 0}),
                          Tensor::of(bias.data(), {3}));
  EXPECT_EQ(testing::to_doubles(y, y.data), (std::vector<double>{1, 2, 3, 1, 2, 3}));
}

// bf16 weights are widened exactly, so the product is that of their f32 copy, bit for bit.
TEST(MatmulBf16, EqualsWidenedWeights) {
  const CpuIsa best = cpu_isa();
  for (const MatmulShape s : {MatmulShape{1, 5, 7}, MatmulShape{1, 130, 600},
                              MatmulShape{3, 64, 64}, MatmulShape{9, 37, 300}}) {
    const auto values = draw({{{s.t, s.k}}, {{s.n, s.k}}});
    std::vector<float> x(values[0].begin(), values[0].end());
    std::vector<bf16> narrow;
    std::vector<float> wide;
    for (const double v : values[1]) {
      narrow.push_back(round_to_bf16(static_cast<float>(v)));
      wide.push_back(widen(narrow.back()));
    }
    for (int isa = 0; isa <= static_cast<int>(best); ++isa) {
      set_cpu_isa(static_cast<CpuIsa>(isa));
      std::vector<std::vector<double>> outputs;
      std::vector<std::vector<double>> grads;
      for (const Tensor& w :
           {Tensor::of(narrow.data(), {s.n, s.k}), Tensor::of(wide.data(), {s.n, s.k})}) {
        Arena arena;
        Tape tape(arena);
        Context ctx{.arena = &arena, .tape = &tape};
        std::vector<float> dx(x.size());
        const Tensor y = matmul(ctx, Tensor::of(x.data(), {s.t, s.k}, dx.data()), w);
        std::fill_n(y.grad_ptr<float>(), y.numel(), 0.5F);
        tape.backward(ctx);
        outputs.push_back(testing::to_doubles(y, y.data));
        grads.emplace_back(dx.begin(), dx.end());
      }
      EXPECT_EQ(outputs[0], outputs[1]) << cpu_isa_name(cpu_isa());
      EXPECT_EQ(grads[0], grads[1]) << cpu_isa_name(cpu_isa());
    }
    set_cpu_isa(best);
  }
}

// What decoding relies on: a token's result is the same bits in any company, on any threads.
TEST(MatmulRows, DependNeitherOnOtherRowsNorOnThreads) {
  const int64_t n = 200;
  const int64_t k = 700;
  const int64_t most = 450;
  const auto values = draw({{{most, k}}, {{n, k}}});
  std::vector<float> x(values[0].begin(), values[0].end());
  std::vector<float> w(values[1].begin(), values[1].end());
  Arena arena;
  const Context ctx{.arena = &arena};
  const auto product = [&](int64_t t) {
    const Tensor y = arena.empty(Dtype::kF32, {t, n});
    matmul_into(ctx, y, Tensor::of(x.data(), {t, k}), Tensor::of(w.data(), {n, k}));
    return testing::to_doubles(y, y.data);
  };
  const int threads = num_threads();
  set_num_threads(1);
  const auto all = product(most);
  for (const int count : {1, 2, 5}) {
    set_num_threads(count);
    for (const int64_t t : {1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 16, 17, 31, 200, 450}) {
      const auto some = product(t);
      EXPECT_TRUE(std::equal(some.begin(), some.end(), all.begin())) << t << " rows";
    }
  }
  set_num_threads(threads);
}

// Several products of one x: each result and gradient has the bits of a call of its own, whatever
// the other weights' sizes and types.
TEST(MatmulEach, EqualsSingleProductsBitForBit) {
  const std::vector<int64_t> outputs{70, 1, 33};
  const int64_t k = 300;
  const CpuIsa best = cpu_isa();
  const int threads = num_threads();
  for (const int64_t t : {0, 1, 3, 8, 13, 16, 60, 250}) {
    const auto values = draw({{{t, k}}, {{70, k}}, {{1, k}}, {{33, k}}, {{70}}, {{t, 70}}});
    std::vector<std::vector<float>> floats;
    for (const auto& list : values) {
      floats.emplace_back(list.begin(), list.end());
    }
    std::vector<bf16> narrow;
    for (const float v : floats[3]) {
      narrow.push_back(round_to_bf16(v));
    }
    const auto run = [&](bool together, bool reference) {
      Arena arena;
      Tape tape(arena);
      Context ctx{.arena = &arena, .tape = &tape, .reference = reference};
      std::vector<float> dx(floats[0].size());
      std::vector<std::vector<float>> dw{std::vector<float>(floats[1].size()),
                                         std::vector<float>(floats[2].size())};
      std::vector<float> db(70);
      const Tensor x = Tensor::of(floats[0].data(), {t, k}, dx.data());
      const std::array<Affine, 3> of{{{Tensor::of(floats[1].data(), {70, k}, dw[0].data()),
                                       Tensor::of(floats[4].data(), {70}, db.data())},
                                      {Tensor::of(floats[2].data(), {1, k}, dw[1].data()), {}},
                                      {Tensor::of(narrow.data(), {33, k}), {}}}};
      const std::array<Tensor, 3> y =
          together
              ? matmul_each(ctx, x, of)
              : std::array<Tensor, 3>{matmul(ctx, x, of[0].weight, of[0].bias),
                                      matmul(ctx, x, of[1].weight), matmul(ctx, x, of[2].weight)};
      std::vector<std::vector<double>> all;
      for (size_t i = 0; i < 3; ++i) {
        EXPECT_EQ(y[i].dim(1), outputs[i]);
        for (int64_t j = 0; j < y[i].numel(); ++j) {
          y[i].grad_ptr<float>()[j] = floats[5][static_cast<size_t>(j)];
        }
        all.push_back(testing::to_doubles(y[i], y[i].data));
      }
      tape.backward(ctx);
      all.emplace_back(dx.begin(), dx.end());
      all.emplace_back(dw[0].begin(), dw[0].end());
      all.emplace_back(dw[1].begin(), dw[1].end());
      all.emplace_back(db.begin(), db.end());
      return all;
    };
    for (int isa = 0; isa <= static_cast<int>(best); ++isa) {
      set_cpu_isa(static_cast<CpuIsa>(isa));
      set_num_threads(1);
      const auto single = run(false, false);
      for (const int count : {1, 3}) {
        set_num_threads(count);
        EXPECT_EQ(run(true, false), single) << t << " rows, " << cpu_isa_name(cpu_isa());
      }
    }
    set_cpu_isa(best);
    EXPECT_EQ(run(true, true), run(false, true)) << t << " rows, by the definition";
  }
  set_num_threads(threads);
}

TEST(MatmulInto, AddsToWhatIsThere) {
  const auto values = draw({{{9, 70}}, {{20, 70}}, {{9, 20}}});
  const CpuIsa best = cpu_isa();
  for (const bool reference : {false, true}) {
    for (int isa = 0; isa <= static_cast<int>(best); ++isa) {
      set_cpu_isa(static_cast<CpuIsa>(isa));
      Arena arena;
      const Context ctx{.arena = &arena, .reference = reference};
      std::vector<float> x(values[0].begin(), values[0].end());
      std::vector<float> w(values[1].begin(), values[1].end());
      std::vector<float> dy(values[2].begin(), values[2].end());
      const Tensor tx = Tensor::of(x.data(), {9, 70});
      const Tensor tw = Tensor::of(w.data(), {20, 70});
      const Tensor tdy = Tensor::of(dy.data(), {9, 20});
      // Each result twice: fresh, and added to ones, in a wider memory that must stay as it was.
      const auto check = [&](int64_t rows, int64_t columns, auto&& product) {
        std::vector<float> fresh(static_cast<size_t>(rows * columns));
        std::vector<float> wide(static_cast<size_t>(rows * (columns + 3)), 1.0F);
        product(Tensor::of(fresh.data(), {rows, columns}), false);
        product(Tensor::of(wide.data(), {rows, columns + 3}).slice(1, 2, columns), true);
        for (int64_t i = 0; i < rows; ++i) {
          for (int64_t j = 0; j < columns + 3; ++j) {
            const bool inside = j >= 2 && j < columns + 2;
            const float expected =
                1.0F + (inside ? fresh[static_cast<size_t>(i * columns + j - 2)] : 0.0F);
            EXPECT_NEAR(wide[static_cast<size_t>(i * (columns + 3) + j)], expected, 1e-5);
          }
        }
      };
      check(9, 20, [&](const Tensor& out, bool add) { matmul_into(ctx, out, tx, tw, add); });
      check(9, 70, [&](const Tensor& out, bool add) { matmul_grad_input(ctx, out, tdy, tw, add); });
      check(20, 70,
            [&](const Tensor& out, bool add) { matmul_grad_weight(ctx, out, tdy, tx, add); });
    }
  }
  set_cpu_isa(best);
}

// Many pairs of matrices at once, by every form against the definition in double precision.
TEST(MatmulBatch, MatchesDefinition) {
  struct Sizes {
    int64_t count, t, n, k;
  };
  for (const Sizes sizes :
       {Sizes{1, 5, 4, 3}, {3, 2, 7, 9}, {4, 6, 6, 40}, {7, 16, 32, 24}, {5, 33, 17, 65}}) {
    const int64_t count = sizes.count;
    const int64_t t = sizes.t;
    const int64_t n = sizes.n;
    const int64_t k = sizes.k;
    for (const bool turned : {false, true}) {
      SCOPED_TRACE(fmt::format("{} x {} x {} x {}{}", count, t, n, k, turned ? " turned" : ""));
      auto values = testing::draw({{{count * t * k}}, {{count * n * k}}}, 11);
      for (auto& each : values) {
        each = as_stored(each, Dtype::kBF16);
      }
      const auto product = [&](Device device, Dtype dtype, bool reference) {
        Workspace workspace(device);
        Context ctx = workspace.context();
        ctx.reference = reference;
        const int64_t x_shape[] = {count, t, k};
        const int64_t w_shape[] = {count, turned ? k : n, turned ? n : k};
        const int64_t y_shape[] = {count, t, n};
        const OwnedTensor x(dtype, x_shape, false, device);
        const OwnedTensor w(dtype, w_shape, false, device);
        const OwnedTensor y(dtype, y_shape, false, device);
        testing::put(x.view, values[0]);
        testing::put(w.view, values[1]);
        matmul_batch_into(ctx, y.view, x.view, w.view, turned);
        return testing::take(y.view);
      };
      const auto exact = product({}, Dtype::kF64, true);
      for (int64_t b = 0, i = 0; b < count; ++b) {  // and the definition against a sum
        for (int64_t r = 0; r < t; ++r) {
          for (int64_t c = 0; c < n; ++c, ++i) {
            double sum = 0.0;
            for (int64_t j = 0; j < k; ++j) {
              const int64_t at = turned ? j * n + c : c * k + j;
              sum += values[0][static_cast<size_t>((b * t + r) * k + j)] *
                     values[1][static_cast<size_t>(b * n * k + at)];
            }
            ASSERT_NEAR(exact[static_cast<size_t>(i)], sum, 1e-12);
          }
        }
      }
      EXPECT_LE(relative_error(product({}, Dtype::kF32, true), exact), 1e-6);
      for_each_isa(
          [&] { EXPECT_LE(relative_error(product({}, Dtype::kF32, false), exact), 1e-5); });
      if (testing::on_cuda()) {
        const Device cuda{Device::kCuda, 0};
        EXPECT_LE(relative_error(product(cuda, Dtype::kF32, false), exact), 1e-5);
        EXPECT_LE(relative_error(product(cuda, Dtype::kBF16, false), exact), 0x1p-7);
      }
    }
  }
}

TEST(MatmulBatch, NamesWhatDoesNotFit) {
  Arena arena;
  const Context ctx{.arena = &arena};
  const auto of = [&](std::initializer_list<int64_t> shape) {
    return arena.empty(Dtype::kF32, shape);
  };
  matmul_batch_into(ctx, of({2, 3, 4}), of({2, 3, 5}), of({2, 4, 5}));
  EXPECT_EQ(error_of([&] {
              matmul_batch_into(ctx, of({2, 3, 4}), of({2, 3, 5}), of({2, 4, 5}), true);
            }),
            "[matmul_batch] expected a contiguous weight (2, 5, 4) beside x f32 (2, 3, 5), got f32 "
            "(2, 4, 5)");
  EXPECT_EQ(
      error_of([&] {
        matmul_batch_into(ctx, of({1, 3, 4}), of({2, 3, 5}), of({2, 4, 5}));
      }),
      "[matmul_batch] expected a contiguous out (2, 3, 4) beside x f32 (2, 3, 5), got f32 (1, 3, "
      "4)");
}

TEST(MatmulErrors, NameTheShapes) {
  Arena arena;
  Tape tape(arena);
  Context ctx{.arena = &arena, .tape = &tape};
  const Tensor x = arena.empty(Dtype::kF32, {4, 8});
  const Tensor w = arena.empty(Dtype::kF32, {3, 8});
  EXPECT_EQ(testing::message_of([&] {
              matmul(ctx, x, arena.empty(Dtype::kF32, {3, 7}));
            }),
            "[matmul] expected x (rows, 7) f32 or f64 with contiguous rows, got f32 (4, 8)");
  EXPECT_EQ(testing::message_of([&] {
              matmul(ctx, x, arena.empty(Dtype::kF64, {3, 8}));
            }),
            "[matmul] expected a contiguous weight (N, K) of f32 or bf16, got f64 (3, 8)");
  EXPECT_EQ(testing::message_of([&] { matmul(ctx, x, w, arena.empty(Dtype::kF32, {4})); }),
            "[matmul] expected bias f32 (3), got f32 (4)");
  EXPECT_EQ(testing::message_of([&] { matmul(ctx, x, w.slice(1, 0, 4)); }),
            "[matmul] expected a contiguous weight (N, K) of f32 or bf16, got f32 (3, 4)");
  Tensor bf16 = arena.empty(Dtype::kBF16, {3, 8});
  bf16.grad = bf16.data;
  EXPECT_EQ(testing::message_of([&] { matmul(ctx, x, bf16); }),
            "[matmul] a bf16 weight has no gradient; train the f32 weight, got bf16 (3, 8)");
  EXPECT_EQ(testing::message_of([&] {
              matmul_into(ctx, arena.empty(Dtype::kF32, {5, 3}), x, w);
            }),
            "[matmul_into] expected out f32 with 4 rows, got f32 (5, 3)");
  EXPECT_EQ(testing::message_of([&] {
              matmul_grad_weight(ctx, w, arena.empty(Dtype::kF32, {5, 3}), x, true);
            }),
            "[matmul_grad_weight] expected x f32 with 5 rows, got f32 (4, 8)");
}

}  // namespace
}  // namespace cambium
