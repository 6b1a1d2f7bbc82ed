// The products of the operation as calls of the CPU's matrix kernels.
#include "base/parallel.h"
#include "ops/matmul/gemm.h"
#include "ops/matmul/matmul_kernels.h"
#include "tensor/arena.h"

namespace cambium {
namespace {

// Of fewer tokens or narrower x a product is done sooner than its operand is turned.
constexpr int64_t kTurnFromTokens = 32;
constexpr int64_t kTurnFromWidth = 256;

Gemm product(const View<float>& a, const MatmulWeight<float>& weight, const View<float>& c) {
  const bool narrow = weight.narrow.defined();
  Gemm g{};
  g.m = c.rows.outer;
  g.n = c.channels;
  g.k = a.channels;
  g.a = a.data;
  g.a_row = a.rows.outer_stride;
  g.a_k = 1;
  g.b = narrow ? static_cast<const void*>(weight.narrow.data) : weight.wide.data;
  g.b_is_bf16 = narrow;
  g.b_stride = weight.inputs();
  g.c = c.data;
  g.c_row = c.rows.outer_stride;
  return g;
}

void multiply(const Gemm& g) {
  gemm({.count = 1, .each = &g, .threads = num_threads(), .turned = nullptr});
}

/// Products of one a by rows of weights, of which few rows of a want memory to turn them in.
void multiply_by_rows(Gemms& all, Arena& arena) {
  const Gemm& g = all.each[0];
  if (g.m > 2 && g.m <= kFewRows) {
    all.turned = arena.empty(Dtype::kF32, {g.k, few_rows(g.m)}).ptr<float>();
  }
  gemm(all);
}

}  // namespace

void matmul_forward::cpu(const Matmuls<float>& a, Arena& arena) {
  static_assert(kMaxProducts == kMaxMatmuls);
  Gemm each[kMaxProducts];  // of which a call uses the first
  for (int64_t i = 0; i < a.count; ++i) {
    each[i] = product(a.each[i].x, a.each[i].weight, a.each[i].y);
    each[i].bias = a.each[i].bias.data;
    each[i].accumulate = a.each[i].accumulate;
  }
  Gemms all{.count = a.count, .each = each, .threads = num_threads(), .turned = nullptr};
  multiply_by_rows(all, arena);
}

void matmul_unrounded_forward::cpu(const UnroundedMatmuls<float>& a, Arena& arena) {
  matmul_forward::cpu(a, arena);
}

void matmul_grad_input_of::cpu(const MatmulGradInput<float>& a, Arena& /*arena*/) {
  Gemm g = product(a.dy, a.weight, a.out);
  g.b_rows_are_k = true;
  g.accumulate = a.accumulate;
  multiply(g);
}

// dy is read by columns, once for every panel of x: where there are several, it is turned first, so
// that the reads follow one another in memory.
void matmul_grad_weight_of::cpu(const MatmulGradWeight<float>& a, Arena& arena) {
  Gemm g{};
  g.m = a.dy.channels;
  g.n = a.x.channels;
  g.k = a.dy.rows.outer;
  g.a = a.dy.data;
  g.a_row = 1;
  g.a_k = a.dy.rows.outer_stride;
  if (g.n >= kTurnFromWidth && g.k >= kTurnFromTokens) {
    // Rows a few lines further apart than their length: powers of two would evict each other.
    const int64_t step = (g.k + 15) / 16 * 16 + 16;
    float* turned = arena.empty(Dtype::kF32, {g.m, step}).ptr<float>();
    transpose({g.k, g.m, a.dy.data, a.dy.rows.outer_stride, turned, step});
    g.a = turned;
    g.a_row = step;
    g.a_k = 1;
  }
  g.b = a.x.data;
  g.b_rows_are_k = true;
  g.b_stride = a.x.rows.outer_stride;
  g.c = a.out.data;
  g.c_row = a.out.rows.outer_stride;
  g.accumulate = a.accumulate;
  multiply(g);
}

void matmul_batch::cpu(const MatmulBatch<float>& a, Arena& arena) {
  for (int64_t i = 0; i < a.count; ++i) {
    Gemm g{};
    g.m = a.rows;
    g.n = a.columns;
    g.k = a.inner;
    g.a = a.x + i * a.rows * a.inner;
    g.a_row = a.inner;
    g.a_k = 1;
    g.b = a.weight + i * a.inner * a.columns;
    g.b_rows_are_k = a.turned;
    g.b_stride = a.turned ? a.columns : a.inner;
    g.c = a.y + i * a.rows * a.columns;
    g.c_row = a.columns;
    if (a.turned) {
      multiply(g);
    } else {
      const ArenaScope scope(arena);
      Gemms one{.count = 1, .each = &g, .threads = num_threads(), .turned = nullptr};
      multiply_by_rows(one, arena);
    }
  }
}

void matmul_grad_bias::cpu(const MatmulGradBias<float>& a, Arena& /*arena*/) {
  column_sums({a.dy.rows.outer, a.dy.channels, a.dy.data, a.dy.rows.outer_stride, a.out});
}

}  // namespace cambium
