#include "ops/optimizer/optimizer.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <span>
#include <utility>

#include "ops/checks.h"
#include "ops/matmul/matmul.h"
#include "ops/optimizer/optimizer_kernels.h"
#include "ops/optimizer/optimizer_ref.h"
#include "ops/run.h"

namespace cambium {
namespace {

void expect_parameter(const char* operation, const Tensor& p) {
  expect_computed(operation, "p", p);
  expect(p.contiguous() && p.has_grad(), "[{}] expected a contiguous p with a gradient, got {}",
         operation, p);
}

void expect_state(const char* operation, const char* name, const Tensor& state, const Tensor& p,
                  Dtype dtype) {
  expect(
      state.same_shape(p) && state.dtype == dtype && state.device == p.device && state.contiguous(),
      "[{}] expected a contiguous {} {} shaped like p {}, got {}", operation, name,
      dtype_name(dtype), p, state);
}

// The sum over blocks of what Kernel finds in each, of each tensor. The device is waited for once.
template <class Kernel>
std::vector<double> sum_blocks(const Context& ctx, const char* operation,
                               std::span<const Tensor> tensors) {
  const ArenaScope scope(ctx.host_arena());
  std::vector<std::span<double>> totals;
  for (const Tensor& x : tensors) {
    expect_computed(operation, "x", x);
    expect(x.contiguous(), "[{}] expected a contiguous x, got {}", operation, x);
    const int64_t blocks = Reduction<float>{x.numel(), nullptr, nullptr}.blocks();
    const int64_t groups = FoldParts<float>{blocks, nullptr, nullptr}.groups();
    totals.emplace_back(ctx.shared_scratch<double>(groups), static_cast<size_t>(groups));
  }
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Tensor& x = tensors[i];
    const ArenaScope parts(*ctx.arena);
    const int64_t blocks = Reduction<float>{x.numel(), nullptr, nullptr}.blocks();
    auto* part = ctx.scratch<double>(blocks);
    run<Kernel>(ctx, x, [&]<class T>() { return Reduction<T>{x.numel(), x.ptr<T>(), part}; });
    run<fold_parts>(ctx, x, [&]<class T>() {
      return FoldParts<T>{blocks, part, totals[i].data()};
    });
  }
  ctx.synchronize();
  std::vector<double> sums;
  for (const std::span<double> total : totals) {
    sums.push_back(std::accumulate(total.begin(), total.end(), 0.0));
  }
  return sums;
}

}  // namespace

void adamw_update(const Context& ctx, const Tensor& p, const Tensor& m, const Tensor& v,
                  const AdamwConfig& config) {
  expect_parameter("adamw_update", p);
  expect_state("adamw_update", "m", m, p, p.grad_dtype);
  expect_state("adamw_update", "v", v, p, p.grad_dtype);
  run<adamw>(ctx, p, [&]<class T>() {
    return Adamw<T>{p.numel(),       p.ptr<T>(),      p.grad_ptr<Sum<T>>(),
                    m.ptr<Sum<T>>(), v.ptr<Sum<T>>(), config};
  });
}

void adamw_update_narrow(const Context& ctx, const Tensor& p, const Tensor& m, const Tensor& v,
                         const AdamwConfig& config, uint64_t key) {
  expect_parameter("adamw_update_narrow", p);
  expect_state("adamw_update_narrow", "m", m, p, Dtype::kBF16);
  expect_state("adamw_update_narrow", "v", v, p, Dtype::kBF16);
  run<adamw_narrow>(ctx, p, [&]<class T>() {
    return AdamwNarrow<T>{p.numel(), p.ptr<T>(), p.grad_ptr<Sum<T>>(), m.ptr<bf16>(), v.ptr<bf16>(),
                          config,    key};
  });
}

void muon_update(const Context& ctx, std::span<const MuonMatrix> matrices,
                 const MuonConfig& config) {
  CAMBIUM_CHECK(!matrices.empty());
  const Tensor& first = matrices.front().p;
  for (const auto& [p, m] : matrices) {
    expect_parameter("muon_update", p);
    expect(p.rank == 2, "[muon_update] expected a matrix p, got {}", p);
    expect(p.same_shape(first) && p.device == first.device,
           "[muon_update] expected matrices of one shape, got {} and {}", first, p);
    expect_state("muon_update", "m", m, p, p.grad_dtype);
  }
  const auto count = static_cast<int64_t>(matrices.size());
  const Dtype dtype = matrices.front().m.dtype;
  const int64_t rows = first.dim(0);
  const int64_t columns = first.dim(1);
  const int64_t small = std::min(rows, columns);
  const int64_t large = std::max(rows, columns);
  const ArenaScope scope(*ctx.arena);
  Tensor x = ctx.arena->empty(dtype, {count, small, large});
  Tensor next = ctx.arena->empty(dtype, {count, small, large});
  const Tensor a = ctx.arena->empty(dtype, {count, small, small});
  const Tensor b = ctx.arena->empty(dtype, {count, small, small});
  std::vector<Tensor> each;
  for (const MuonMatrix& one : matrices) {
    each.push_back(x.slice(0, static_cast<int64_t>(each.size()), 1));
    run<muon_momentum>(ctx, one.p, [&]<class T>() {
      return MuonMomentum<T>{rows,
                             columns,
                             one.p.grad_ptr<Sum<T>>(),
                             one.m.ptr<Sum<T>>(),
                             each.back().ptr<Sum<T>>(),
                             config.gradient_scale,
                             config.momentum};
    });
  }
  const std::vector<double> squares = sums_of_squares(ctx, each);
  for (size_t i = 0; i < each.size(); ++i) {
    const auto normalise = static_cast<float>(1.0 / (std::sqrt(squares[i]) + 1e-12));
    run<scale_in_place>(ctx, x, [&]<class T>() {
      return Scale<T>{each[i].numel(), each[i].ptr<T>(), normalise};
    });
  }
  for (int round = 0; round < 5; ++round) {
    matmul_batch_into(ctx, a, x, x);
    matmul_batch_into(ctx, b, a, a);  // a's matrices are symmetric
    run<muon_polynomial>(ctx, b, [&]<class T>() {
      return MuonPolynomial<T>{count, small, a.ptr<T>(), b.ptr<T>(), 3.4445F, -4.7750F, 2.0315F};
    });
    matmul_batch_into(ctx, next, b, x, true);
    std::swap(x, next);
  }
  const double scale = 0.2 * std::sqrt(static_cast<double>(large));
  for (size_t i = 0; i < matrices.size(); ++i) {
    const Tensor& p = matrices[i].p;
    const Tensor change = x.slice(0, static_cast<int64_t>(i), 1);
    run<muon_apply>(ctx, p, [&]<class T>() {
      return MuonApply<T>{rows,
                          columns,
                          p.ptr<T>(),
                          p.grad_ptr<Sum<T>>(),
                          change.ptr<Sum<T>>(),
                          1.0F - config.rate * config.weight_decay,
                          static_cast<float>(static_cast<double>(config.rate) * scale)};
    });
  }
}

double sum_squares(const Context& ctx, const Tensor& x) {
  return sum_blocks<block_squares>(ctx, "sum_squares", std::span(&x, 1)).front();
}

std::vector<double> sums_of_squares(const Context& ctx, std::span<const Tensor> tensors) {
  return sum_blocks<block_squares>(ctx, "sum_squares", tensors);
}

bool all_finite(const Context& ctx, const Tensor& x) {
  return sum_blocks<block_not_finite>(ctx, "all_finite", std::span(&x, 1)).front() == 0.0;
}

}  // namespace cambium
