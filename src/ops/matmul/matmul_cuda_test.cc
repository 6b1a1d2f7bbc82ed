// Products on a CUDA device, held to the definition on the CPU.
#include "ops/matmul/matmul.h"

#include <numeric>

#include "ops/matmul/matmul_testing.h"
#include "ops/testing.h"

namespace cambium {
namespace {

using testing::as_stored;
using testing::cuda_tensor;
using testing::CudaContext;
using testing::draw;
using testing::kNarrowForward;
using testing::MatmulShape;
using testing::norm_error;
using testing::on_cuda;
using testing::put;
using testing::relative_error;
using testing::take;

// What a CUDA device computes: its x, weight and gradients, in a wider memory if `wide`, whose
// rows then begin where no vector does.
struct OnCuda {
  MatmulShape shape;
  Dtype activations, weight;
  bool wide, accumulate;
};

std::string describe(const OnCuda& c) {
  return fmt::format("{} x {} x {}, {} by a weight of {}{}{}", c.shape.t, c.shape.n, c.shape.k,
                     dtype_name(c.activations), dtype_name(c.weight), c.wide ? ", views" : "",
                     c.accumulate ? ", added" : "");
}

// The elements of the matrix of `all` that `wide` columns stand around: 2 before and 3 behind.
std::vector<double> inner_columns(const std::vector<double>& all, int64_t rows, int64_t columns) {
  std::vector<double> inner;
  for (int64_t r = 0; r < rows; ++r) {
    const auto from = all.begin() + r * (columns + 5) + 2;
    inner.insert(inner.end(), from, from + columns);
  }
  return inner;
}

// A result on the device beside that of the definition, in memory that holds `before`, and the
// columns around it, which must stay.
void expect_product(const OnCuda& c, int64_t rows, int64_t columns, Dtype type, double tolerance,
                    const std::function<void(const Context&, const Tensor&)>& product,
                    const std::function<void(const Context&, const Tensor&)>& exact) {
  const int64_t width = columns + (c.wide ? 5 : 0);
  const auto before = as_stored(draw({{{rows, width}}}, 5)[0], type);
  const auto slice = [&](const Tensor& t) { return c.wide ? t.slice(1, 2, columns) : t; };
  const OwnedTensor here(Dtype::kF64, {rows, width});
  put(here.view, before);
  Arena arena;
  exact({.arena = &arena, .reference = true}, slice(here.view));
  const OwnedTensor there = cuda_tensor(type, {rows, width}, before);
  const CudaContext cuda(c.activations);
  product(cuda.ctx, slice(there.view));
  auto got = take(there.view);
  auto expected = take(here.view);
  if (c.wide) {
    for (size_t i = 0; i < got.size(); ++i) {
      const auto column = static_cast<int64_t>(i) % width;
      if (column < 2 || column >= columns + 2) {
        ASSERT_EQ(got[i], before[i]) << "column " << column << " is not the product's";
      }
    }
    got = inner_columns(got, rows, columns);
    expected = inner_columns(expected, rows, columns);
  }
  if (type == Dtype::kBF16) {
    EXPECT_LE(norm_error(got, expected), tolerance);
  } else {
    EXPECT_LE(relative_error(got, expected), tolerance);
  }
}

void expect_matches_definition(const OnCuda& c) {
  SCOPED_TRACE(describe(c));
  const int64_t t = c.shape.t;
  const int64_t n = c.shape.n;
  const int64_t k = c.shape.k;
  const int64_t more = c.wide ? 5 : 0;
  const auto values = draw({{{t, k + more}}, {{n + 1, k}}, {{t, n + more}}});
  const bool narrow = c.activations == Dtype::kBF16;
  const auto x = as_stored(values[0], c.activations);
  const auto dy = as_stored(values[2], c.activations);
  // Beside activations of bf16 a weight of f32 is rounded as it is multiplied.
  const auto w = as_stored(values[1], narrow ? Dtype::kBF16 : c.weight);
  const OwnedTensor x_there = cuda_tensor(c.activations, {t, k + more}, x);
  const OwnedTensor dy_there = cuda_tensor(c.activations, {t, n + more}, dy);
  const OwnedTensor w_there = cuda_tensor(c.weight, {n + 1, k}, w);
  const OwnedTensor x_here(Dtype::kF64, {t, k + more});
  const OwnedTensor dy_here(Dtype::kF64, {t, n + more});
  const OwnedTensor w_here(Dtype::kF64, {n + 1, k});
  put(x_here.view, x);
  put(dy_here.view, dy);
  put(w_here.view, w);
  const auto columns = [&](const OwnedTensor& of, int64_t count) {
    return c.wide ? of.view.slice(1, 3, count) : of.view;
  };
  const auto rows = [&](const OwnedTensor& of) { return of.view.slice(0, c.wide ? 1 : 0, n); };
  const double forward = narrow ? kNarrowForward : 1e-5;
  using Ctx = const Context&;
  using To = const Tensor&;
  expect_product(
      c, t, n, c.activations, forward,
      [&](Ctx ctx, To y) { matmul_into(ctx, y, columns(x_there, k), rows(w_there), c.accumulate); },
      [&](Ctx ctx, To y) { matmul_into(ctx, y, columns(x_here, k), rows(w_here), c.accumulate); });
  expect_product(
      c, t, k, c.activations, forward,
      [&](Ctx ctx, To dx) {
        matmul_grad_input(ctx, dx, columns(dy_there, n), rows(w_there), c.accumulate);
      },
      [&](Ctx ctx, To dx) {
        matmul_grad_input(ctx, dx, columns(dy_here, n), rows(w_here), c.accumulate);
      });
  // Products of bf16 are exact in fp32 and so is the gradient's type.
  expect_product(
      c, n, k, Dtype::kF32, narrow ? 1e-4 : 1e-5,
      [&](Ctx ctx, To dw) {
        matmul_grad_weight(ctx, dw, columns(dy_there, n), columns(x_there, k), c.accumulate);
      },
      [&](Ctx ctx, To dw) {
        matmul_grad_weight(ctx, dw, columns(dy_here, n), columns(x_here, k), c.accumulate);
      });
}

/// Weights that lie one after the other give the numbers of as many products, biases included,
/// where rows of 16 bytes let their results lie side by side, in runs or not at all.
TEST(MatmulCudaEach, OfOneBlockIsOfItsParts) {
  if (!testing::on_cuda()) {
    GTEST_SKIP() << "no CUDA device";
  }
  constexpr int64_t kIn = 96;
  const std::vector<std::vector<int64_t>> lists = {{64, 16, 24}, {12, 32, 16, 8, 3, 40, 8, 64}};
  for (const std::vector<int64_t>& sizes : lists) {
    const int64_t rows = std::accumulate(sizes.begin(), sizes.end(), int64_t{0});
    const auto drawn = testing::draw({{{rows, kIn}}, {{rows}}});
    for (const Dtype type : {Dtype::kF32, Dtype::kBF16}) {
      for (const int64_t tokens : {1, 7, 9, 64, 600}) {
        const std::vector<double> x = testing::draw({{{tokens, kIn}}}, 2)[0];
        const auto run = [&](Context& ctx, Dtype elements) {
          const Device device = ctx.device();
          const OwnedTensor in(elements, {tokens, kIn}, false, device);
          const OwnedTensor weight(elements, {rows, kIn}, false, device);
          const OwnedTensor bias(sum_dtype(elements), {rows}, false, device);
          testing::put(in.view, x);
          testing::put(weight.view, drawn[0]);
          testing::put(bias.view, drawn[1]);
          std::vector<Affine> of;
          int64_t row = 0;
          for (const int64_t size : sizes) {
            of.push_back({weight.view.slice(0, row, size),
                          of.size() == 1 ? Tensor{} : bias.view.slice(0, row, size)});
            row += size;
          }
          std::vector<Tensor> to(of.size());
          matmul_each(ctx, in.view, of, to);
          std::vector<double> all;
          for (const Tensor& y : to) {
            ctx.synchronize();
            const std::vector<double> part = testing::take(y);
            all.insert(all.end(), part.begin(), part.end());
          }
          return all;
        };
        Arena arena;
        Context plain{.arena = &arena};
        const std::vector<double> exact = run(plain, Dtype::kF64);
        testing::CudaContext cuda(type);
        EXPECT_LE(testing::relative_error(run(cuda.ctx, type), exact),
                  type == Dtype::kF32 ? 1e-5 : 2e-2)
            << tokens << " tokens, " << sizes.size() << " products";
      }
    }
  }
}

class MatmulCuda : public ::testing::TestWithParam<MatmulShape> {};

TEST_P(MatmulCuda, EveryTypeViewAndSum) {
  if (!on_cuda()) {
    GTEST_SKIP() << why_no_cuda();
  }
  for (const Dtype activations : {Dtype::kF32, Dtype::kBF16}) {
    for (const Dtype weight : {Dtype::kF32, Dtype::kBF16}) {
      for (const bool wide : {false, true}) {
        for (const bool accumulate : {false, true}) {
          expect_matches_definition({GetParam(), activations, weight, wide, accumulate});
        }
      }
    }
  }
}

// What stays unrounded of x in bf16 is the definition's to the precision of fp32, and so is the
// bias's gradient; those of x and the weight are of a result's gradient in bf16.
TEST_P(MatmulCuda, UnroundedResultsAreOfFp32) {
  if (!on_cuda()) {
    GTEST_SKIP() << why_no_cuda();
  }
  const auto [t, n, k] = GetParam();
  auto values = draw({{{t, k}}, {{n, k}}, {{n}}, {{t, n}}});
  for (const size_t i : {0, 1}) {
    values[i] = as_stored(values[i], Dtype::kBF16);
  }
  // The result, and the gradients of x, the weight and the bias from `dy`.
  const auto run = [&](Context& ctx, Tape& tape, const std::vector<OwnedTensor>& in,
                       const std::vector<double>& dy) {
    ctx.tape = &tape;
    const Tensor y = matmul_unrounded(ctx, in[0].view, in[1].view, in[2].view);
    EXPECT_EQ(y.dtype, sum_dtype(in[0].view.dtype));
    std::vector<std::vector<double>> all = {take(y)};
    put(y.grad_tensor(), dy);
    tape.backward(ctx);
    for (const OwnedTensor& one : in) {
      all.push_back(take(one.view.grad_tensor()));
    }
    return all;
  };
  const std::array<std::vector<int64_t>, 3> shapes = {{{t, k}, {n, k}, {n}}};
  const auto on_cpu = [&](const std::vector<double>& dy) {
    std::vector<OwnedTensor> in;
    for (size_t i = 0; i < shapes.size(); ++i) {
      in.emplace_back(Dtype::kF64, std::span<const int64_t>(shapes[i]), true);
      put(in.back().view, values[i]);
    }
    Arena arena;
    Tape tape(arena);
    Context ctx{.arena = &arena, .reference = true};
    return run(ctx, tape, in, dy);
  };
  std::vector<OwnedTensor> there;
  for (size_t i = 0; i < shapes.size(); ++i) {
    there.push_back(cuda_tensor(i == 0 ? Dtype::kBF16 : Dtype::kF32,
                                std::span<const int64_t>(shapes[i]), values[i], true));
  }
  CudaContext cuda(Dtype::kBF16);
  Tape tape(testing::cuda_host_arena());
  const auto got = run(cuda.ctx, tape, there, values[3]);
  const auto exact = on_cpu(values[3]);
  const auto rounded = on_cpu(as_stored(values[3], Dtype::kBF16));
  constexpr double kFp32 = 2e-5;
  EXPECT_LE(relative_error(got[0], exact[0]), kFp32);
  EXPECT_LE(norm_error(got[1], rounded[1]), kNarrowForward);
  EXPECT_LE(norm_error(got[2], rounded[2]), 1e-4);
  EXPECT_LE(relative_error(got[3], exact[3]), kFp32);

  const OwnedTensor narrow = cuda_tensor(Dtype::kBF16, {n, k}, values[1]);
  cuda.ctx.tape = nullptr;
  EXPECT_LE(relative_error(take(matmul_unrounded(cuda.ctx, there[0].view.detached(), narrow.view,
                                                 there[2].view.detached())),
                           exact[0]),
            kFp32);
}

// One to eight rows, where kernels of few rows end; rows around a tile; sizes no vector divides.
INSTANTIATE_TEST_SUITE_P(
    Shapes, MatmulCuda,
    ::testing::Values(MatmulShape{1, 1, 1}, MatmulShape{1, 64, 64}, MatmulShape{1, 130, 601},
                      MatmulShape{2, 96, 256}, MatmulShape{2, 5, 7}, MatmulShape{3, 80, 224},
                      MatmulShape{3, 1, 300}, MatmulShape{4, 128, 512}, MatmulShape{4, 17, 33},
                      MatmulShape{5, 64, 128}, MatmulShape{5, 47, 61}, MatmulShape{6, 96, 31},
                      MatmulShape{7, 130, 257}, MatmulShape{8, 16, 512}, MatmulShape{8, 33, 40},
                      MatmulShape{63, 64, 128}, MatmulShape{63, 35, 77}, MatmulShape{64, 128, 64},
                      MatmulShape{64, 1, 96}, MatmulShape{65, 96, 200}, MatmulShape{65, 34, 257}),
    ::testing::PrintToStringParamName());

// Weights large enough to be streamed: every team of warps, shares that end within a tile, several
// weights at once, a bias, and sums into what is there.
TEST(MatmulCudaStream, FewRowsMatchDefinition) {
  if (!on_cuda()) {
    GTEST_SKIP() << why_no_cuda();
  }
  for (const int64_t k : {256, 264, 896, 1536, 2056, 4096, 5120, 8200, 14336, 16384, 16392}) {
    const std::array<int64_t, 3> sizes = {700000 / k + 133, 7, 300};
    const int64_t all = sizes[0] + sizes[1] + sizes[2];
    for (const int64_t t : {1, 2, 3, 4, 5, 8}) {
      if (t > 4 && k % 32 != 0) {
        continue;  // by the library, which rounds before the bias is added
      }
      SCOPED_TRACE(fmt::format("{} rows of {}", t, k));
      auto values = draw({{{t, k}}, {{all, k}}, {{all}}, {{t, all}}}, static_cast<uint64_t>(k + t));
      for (const size_t i : {0, 1, 3}) {
        values[i] = as_stored(values[i], Dtype::kBF16);
      }
      const auto run = [&](Context& ctx, const std::vector<Tensor>& in) {
        std::array<Affine, 3> of;
        int64_t row = 0;
        for (size_t i = 0; i < of.size(); ++i) {
          of[i] = {in[1].slice(0, row, sizes[i]),
                   i == 1 ? Tensor{} : in[2].slice(0, row, sizes[i])};
          row += sizes[i];
        }
        std::vector<std::vector<double>> results;
        for (const Tensor& y : matmul_each<3>(ctx, in[0], of)) {
          results.push_back(take(y));
        }
        matmul_into(ctx, in[3], in[0], in[1], true);
        results.push_back(take(in[3]));
        results.push_back(take(matmul_unrounded(ctx, in[0], in[1], in[2])));
        return results;
      };
      CudaContext cuda(Dtype::kBF16);
      const std::vector<OwnedTensor> there = [&] {
        std::vector<OwnedTensor> tensors;
        tensors.push_back(cuda_tensor(Dtype::kBF16, {t, k}, values[0], false));
        tensors.push_back(cuda_tensor(Dtype::kBF16, {all, k}, values[1], false));
        tensors.push_back(cuda_tensor(Dtype::kF32, {all}, values[2], false));
        tensors.push_back(cuda_tensor(Dtype::kBF16, {t, all}, values[3], false));
        return tensors;
      }();
      const auto got = run(cuda.ctx, {there[0].view, there[1].view, there[2].view, there[3].view});
      std::vector<double> exact(static_cast<size_t>(t * all));
      for (int64_t i = 0; i < t; ++i) {
        for (int64_t n = 0; n < all; ++n) {
          for (int64_t c = 0; c < k; ++c) {
            exact[static_cast<size_t>(i * all + n)] += values[0][static_cast<size_t>(i * k + c)] *
                                                       values[1][static_cast<size_t>(n * k + c)];
          }
        }
      }
      int64_t row = 0;
      for (size_t part = 0; part < sizes.size(); ++part) {
        for (int64_t i = 0; i < t; ++i) {
          for (int64_t n = 0; n < sizes[part]; ++n) {
            const double product = exact[static_cast<size_t>(i * all + row + n)];
            const double want =
                product + (part == 1 ? 0.0 : values[2][static_cast<size_t>(row + n)]);
            const double had = got[part][static_cast<size_t>(i * sizes[part] + n)];
            // Some devices have the library for more than four rows too.
            const double rounding = t > 4 ? std::abs(product) / 256 : 0.0;
            ASSERT_NEAR(had, want,
                        0.01 * std::abs(want) + 2e-3 * std::sqrt(double(k)) / 16 + rounding)
                << "weight " << part << " row " << i << " output " << n;
          }
        }
        row += sizes[part];
      }
      for (size_t i = 0; i < exact.size(); ++i) {
        const double want = exact[i] + values[3][i];
        ASSERT_NEAR(got[3][i], want, 0.01 * std::abs(want) + 2e-3 * std::sqrt(double(k)) / 16) << i;
      }
      for (size_t i = 0; i < exact.size(); ++i) {
        exact[i] += values[2][i % static_cast<size_t>(all)];
      }
      EXPECT_LE(norm_error(got[4], exact), 1e-4) << "unrounded";
    }
  }
}

// Products of one x by weights of two types, with a bias and without, forward and backward.
TEST(MatmulCudaEach, MatchesDefinition) {
  if (!on_cuda()) {
    GTEST_SKIP() << why_no_cuda();
  }
  constexpr int64_t kDepth = 96;
  for (const Dtype type : {Dtype::kF32, Dtype::kBF16}) {
    for (const int64_t t : {0, 1, 4, 5, 64}) {
      SCOPED_TRACE(fmt::format("{} rows of {}", t, dtype_name(type)));
      const bool narrow = type == Dtype::kBF16;
      auto values = draw({{{t, kDepth}}, {{70, kDepth}}, {{1, kDepth}}, {{33, kDepth}}, {{70}}});
      for (const size_t i : {0, 1, 2}) {
        values[i] = as_stored(values[i], type);
      }
      values[3] = as_stored(values[3], Dtype::kBF16);
      // Results, then the gradients of x, the first two weights and the bias.
      const auto run = [&](Context& ctx, Tape& tape, const std::vector<Tensor>& in) {
        ctx.tape = &tape;
        const std::array<Affine, 3> of{{{in[1], in[4]}, {in[2], {}}, {in[3], {}}}};
        const std::array<Tensor, 3> y = matmul_each(ctx, in[0], of);
        std::vector<std::vector<double>> all;
        for (const Tensor& one : y) {
          all.push_back(take(one));
          put(one.grad_tensor(),
              as_stored(draw({{{t, one.dim(1)}}}, static_cast<uint64_t>(one.dim(1)))[0], type));
        }
        tape.backward(ctx);
        for (const size_t i : {0, 1, 2, 4}) {
          all.push_back(take(in[i].grad_tensor()));
        }
        return all;
      };
      const auto owned = [&](bool device) {
        std::vector<OwnedTensor> tensors;
        for (size_t i = 0; i < values.size(); ++i) {
          const std::vector<int64_t> shape =
              i == 4
                  ? std::vector<int64_t>{70}
                  : std::vector<int64_t>{static_cast<int64_t>(values[i].size()) / kDepth, kDepth};
          const Dtype there = i == 0 ? type : i == 3 ? Dtype::kBF16 : Dtype::kF32;
          if (device) {
            tensors.push_back(cuda_tensor(there, shape, values[i], i != 3));
          } else {
            tensors.emplace_back(Dtype::kF64, std::span<const int64_t>(shape), i != 3);
            put(tensors.back().view, values[i]);
          }
        }
        return tensors;
      };
      const auto views = [](const std::vector<OwnedTensor>& tensors) {
        std::vector<Tensor> list;
        for (const OwnedTensor& one : tensors) {
          list.push_back(one.view);
        }
        return list;
      };
      const auto there = owned(true);
      CudaContext cuda(type);
      Tape tape(testing::cuda_host_arena());
      const auto got = run(cuda.ctx, tape, views(there));
      const auto here = owned(false);
      Arena arena;
      Tape exact_tape(arena);
      Context exact_ctx{.arena = &arena, .reference = true};
      const auto exact = run(exact_ctx, exact_tape, views(here));
      for (size_t i = 0; i < exact.size(); ++i) {
        EXPECT_LE(norm_error(got[i], exact[i]), narrow ? kNarrowForward : 1e-5) << i;
      }
    }
  }
}

/// Products of bf16 read what is kept rounded of an f32 weight, those of f32 the weight.
TEST(MatmulCudaRounded, WhatIsKeptOfAWeightIsRead) {
  if (!on_cuda()) {
    GTEST_SKIP() << why_no_cuda();
  }
  const std::vector<double> x_values = draw({{{9, 16}}}, 1)[0];
  const std::vector<double> dy_values = draw({{{9, 24}}}, 2)[0];
  const std::vector<double> other = as_stored(draw({{{24, 16}}}, 3)[0], Dtype::kBF16);
  const OwnedTensor kept = cuda_tensor(Dtype::kBF16, {24, 16}, other);
  for (const Dtype type : {Dtype::kF32, Dtype::kBF16}) {
    // Of another weight, to see which is read.
    const OwnedTensor weight = cuda_tensor(Dtype::kF32, {24, 16}, draw({{{24, 16}}}, 4)[0]);
    const OwnedTensor alone = cuda_tensor(Dtype::kF32, {24, 16}, other);
    Tensor with_kept = weight.view.detached();
    with_kept.rounded = kept.view.data;
    const OwnedTensor x = cuda_tensor(type, {9, 16}, x_values);
    const OwnedTensor dy = cuda_tensor(type, {9, 24}, dy_values);
    const CudaContext cuda(type);
    const auto products = [&](const Tensor& w) {
      const Tensor y = cuda.ctx.arena->empty(type, {9, 24});
      const Tensor dx = cuda.ctx.arena->empty(type, {9, 16});
      matmul_into(cuda.ctx, y, x.view, w);
      matmul_grad_input(cuda.ctx, dx, dy.view, w, false);
      return std::pair{take(y), take(dx)};
    };
    EXPECT_EQ(products(with_kept),
              products(type == Dtype::kBF16 ? alone.view : weight.view.detached()));
  }
}

TEST(MatmulCudaViews, NoTokensAndNoDepth) {
  if (!on_cuda()) {
    GTEST_SKIP() << why_no_cuda();
  }
  for (const Dtype type : {Dtype::kF32, Dtype::kBF16}) {
    CudaContext cuda(type);
    const auto empty = [&](std::initializer_list<int64_t> shape) {
      return cuda.ctx.arena->empty(type, shape);
    };
    const OwnedTensor w = cuda_tensor(Dtype::kF32, {3, 4}, std::vector<double>(12, 1.0));
    const OwnedTensor bias = cuda_tensor(Dtype::kF32, {3}, {1, 2, 3});
    EXPECT_EQ(matmul(cuda.ctx, empty({0, 4}), w.view).dim(0), 0);
    for (const int64_t t : {2, 9}) {
      const Tensor y =
          matmul(cuda.ctx, empty({t, 0}), w.view.slice(0, 0, 0).reshape({3, 0}), bias.view);
      const auto rows = take(y);
      ASSERT_EQ(rows.size(), static_cast<size_t>(3 * t));
      for (size_t i = 0; i < rows.size(); ++i) {
        EXPECT_EQ(rows[i], static_cast<double>(i % 3 + 1));
      }
    }
    // Of no tokens a weight's gradient is zero, or stays.
    const OwnedTensor dw = cuda_tensor(Dtype::kF32, {3, 4}, std::vector<double>(12, 7.0));
    matmul_grad_weight(cuda.ctx, dw.view, empty({0, 3}), empty({0, 4}), true);
    EXPECT_EQ(take(dw.view), std::vector<double>(12, 7.0));
    matmul_grad_weight(cuda.ctx, dw.view, empty({0, 3}), empty({0, 4}), false);
    EXPECT_EQ(take(dw.view), std::vector<double>(12, 0.0));
  }
}

}  // namespace
}  // namespace cambium
