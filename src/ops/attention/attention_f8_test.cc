// Pages in fp8: every code, and scales that differ by many orders.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <tuple>

#include "base/float16.h"
#include "base/float8.h"
#include "base/testing.h"
#include "ops/attention/attention.h"
#include "ops/testing.h"
#include "tensor/workspace.h"

namespace cambium {
namespace {

using testing::as_paged;
using testing::as_stored;
using testing::for_each_isa;
using testing::on_cuda;

constexpr double kTolerance = 5e-6;
constexpr double kCudaTolerance = 2e-5;    // sums of up to 256 products
constexpr double kNarrowTolerance = 6e-3;  // probabilities and results rounded to bf16

double tolerance_of(Dtype activations) {
  return activations == Dtype::kBF16 ? kNarrowTolerance : kCudaTolerance;
}

/// Tokens of one sequence whose rows in f8 hold every code, with a largest number so far above the
/// others that many are subnormal and yet decide the scores; queries do not see that number.
struct Codes {
  int64_t tokens, heads, kv_heads, dim;
  std::vector<double> q, k, v;

  Codes(int64_t t, int64_t h, int64_t kv, int64_t d) : tokens(t), heads(h), kv_heads(kv), dim(d) {
    auto drawn = testing::draw({{{t, h, d}, -0.2, 0.2}, {{t, kv, d}, -3, 3}}, 5);
    q = as_stored(drawn[0], Dtype::kBF16);
    k = as_stored(drawn[1], Dtype::kBF16);
    for (int64_t i = 0; i < t * h; ++i) {
      q[static_cast<size_t>(i * d)] = 0.0;
    }
    for (int64_t row = 0; row < t * kv; ++row) {
      k[static_cast<size_t>(row * d)] = 448.0 * 255;
      for (int64_t i = 0; i < d; ++i) {
        const auto code = static_cast<uint8_t>(i == 0 ? 0x7e : row * d + i);
        const f8e4m3 number{(code & 0x7f) == 0x7f ? uint8_t{0x80} : code};
        v.push_back(widen(from_scaled(number, round_to_bf16(row % 2 == 0 ? 0.37F : 1e-9F))));
      }
    }
  }

  std::vector<double> run(Device device, Dtype activations, bool reference = false) const {
    constexpr int64_t kPage = 16;
    const int64_t pages = (tokens + kPage - 1) / kPage;
    Workspace workspace(device);
    const WorkspaceScope scope(workspace);
    Context ctx = workspace.context(activations);
    ctx.reference = reference;
    const auto input = [&](int64_t rows, const std::vector<double>& values) {
      OwnedTensor t(activations, {tokens, rows, dim}, false, device);
      testing::put(t.view, values);
      return t;
    };
    const OwnedTensor in[] = {input(heads, q), input(kv_heads, k), input(kv_heads, v)};
    const OwnedTensor keys(Dtype::kF8E4M3, {pages, kPage, kv_heads, dim}, false, device);
    const OwnedTensor values(Dtype::kF8E4M3, {pages, kPage, kv_heads, dim}, false, device);
    const OwnedTensor key_scales(Dtype::kBF16, {pages, kPage, kv_heads}, false, device);
    const OwnedTensor value_scales(Dtype::kBF16, {pages, kPage, kv_heads}, false, device);
    std::vector<int32_t> table(static_cast<size_t>(pages));
    std::iota(table.begin(), table.end(), 0);
    const KvPages kv = {keys.view, values.view, table, pages, key_scales.view, value_scales.view};
    // The first half together, then token by token.
    std::vector<double> all;
    for (int64_t t = 0; t < tokens;) {
      const int64_t count = t == 0 ? (tokens + 1) / 2 : 1;
      const std::vector<int32_t> start = {0, static_cast<int32_t>(count)};
      const std::vector<int32_t> position = {static_cast<int32_t>(t)};
      const auto part = [&](const OwnedTensor& x) { return x.view.slice(0, t, count); };
      const auto y = testing::take(attention(ctx, part(in[0]), part(in[1]), part(in[2]),
                                             {start, position, {}}, {.scale = 0.5F}, &kv));
      all.insert(all.end(), y.begin(), y.end());
      t += count;
    }
    return all;
  }

  /// Over the numbers that the pages hold, in double precision and without pages.
  std::vector<double> expected() const {
    return testing::run_operation<double>(
               [&](Context& ctx, const std::vector<Tensor>& x) {
                 const std::vector<int32_t> start = {0, static_cast<int32_t>(tokens)};
                 const std::vector<int32_t> position = {0};
                 return attention(ctx, x[0], x[1], x[2], {start, position, {}}, {.scale = 0.5F});
               },
               {{{tokens, heads, dim}}, {{tokens, kv_heads, dim}}, {{tokens, kv_heads, dim}}},
               {q, as_paged(k, dim, Dtype::kF8E4M3), v}, true, false)
        .output;
  }
};

TEST(AttentionPagesF8, EveryCodeComesBackAndDecides) {
  for (const auto& [heads, kv_heads, dim] :
       {std::tuple{2, 1, 16}, std::tuple{4, 2, 64}, std::tuple{3, 3, 80}, std::tuple{7, 1, 128}}) {
    SCOPED_TRACE(dim);
    const Codes codes(40, heads, kv_heads, dim);
    EXPECT_EQ(as_paged(codes.v, dim, Dtype::kF8E4M3), codes.v) << "the scale is not the intended";
    const auto expected = codes.expected();
    for_each_isa([&] {
      EXPECT_LE(testing::relative_error(codes.run({}, Dtype::kF32), expected), kTolerance);
    });
    EXPECT_LE(testing::relative_error(codes.run({}, Dtype::kF32, true), expected), kTolerance);
  }
}

TEST(AttentionPagesF8, OnCuda) {
  if (!on_cuda()) {
    GTEST_SKIP() << why_no_cuda();
  }
  for (const auto& [heads, kv_heads, dim] :
       {std::tuple{2, 1, 16}, std::tuple{4, 2, 64}, std::tuple{6, 3, 96}, std::tuple{3, 3, 80},
        std::tuple{7, 1, 128}, std::tuple{12, 1, 64}, std::tuple{2, 2, 256},
        std::tuple{2, 1, 20}}) {
    SCOPED_TRACE(dim);
    const Codes codes(150, heads, kv_heads, dim);
    const auto expected = codes.expected();
    for (const Dtype type : {Dtype::kF32, Dtype::kBF16}) {
      EXPECT_LE(testing::relative_error(codes.run(Device::kCuda, type), expected),
                tolerance_of(type))
          << dtype_name(type);
    }
    // A token by itself is the row of values that it wrote.
    const Codes one(1, heads, kv_heads, dim);
    for (const Dtype type : {Dtype::kF32, Dtype::kBF16}) {
      EXPECT_EQ(one.run(Device::kCuda, type), one.run({}, Dtype::kF32)) << dtype_name(type);
    }
  }
}

TEST(AttentionPagesF8, ARowThatIsNotFiniteIsNan) {
  Codes codes(2, 2, 1, 16);
  codes.v[3] = INFINITY;
  const auto check = [&](const std::vector<double>& y) {
    EXPECT_TRUE(std::all_of(y.begin(), y.end(), [](double x) { return std::isnan(x); }));
  };
  for_each_isa([&] { check(codes.run({}, Dtype::kF32)); });
  check(codes.run({}, Dtype::kF32, true));
  if (on_cuda()) {
    check(codes.run(Device::kCuda, Dtype::kF32));
    check(codes.run(Device::kCuda, Dtype::kBF16));
  }
}

}  // namespace
}  // namespace cambium
