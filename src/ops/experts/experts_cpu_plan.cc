// The products of each expert as calls of the CPU's matrix kernels, one after the other: the rows
// of an expert lie together.
#include <algorithm>

#include "base/parallel.h"
#include "ops/experts/experts_ref.h"
#include "ops/matmul/gemm.h"
#include "tensor/arena.h"

namespace cambium {
namespace {

struct ExpertRows {
  int64_t expert, begin, count;
};

/// Calls f for the experts that have rows.
template <class F>
void for_experts(const ExpertLists& lists, const F& f) {
  for (int64_t e = 0; e < lists.experts; ++e) {
    const ExpertRows rows{e, lists.start[e], lists.start[e + 1] - lists.start[e]};
    if (rows.count > 0) {
      f(rows);
    }
  }
}

/// The product of an expert's rows of x with its `outputs` rows of the weight.
Gemm product(const View<float>& x, const MatmulWeight<float>& weight, int64_t weight_rows,
             const ExpertRows& rows) {
  const bool narrow = weight.narrow.defined();
  Gemm g{};
  g.m = rows.count;
  g.a = x.row(rows.begin);
  g.a_row = x.rows.outer_stride;
  g.a_k = 1;
  g.k = x.channels;
  const int64_t first = rows.expert * weight_rows;
  g.b = narrow ? static_cast<const void*>(weight.narrow.row(first)) : weight.wide.row(first);
  g.b_is_bf16 = narrow;
  g.b_stride = weight.inputs();
  return g;
}

void multiply(const Gemm& g, float* turned) {
  gemm({.count = 1, .each = &g, .threads = num_threads(), .turned = turned});
}

}  // namespace

void experts_matmul_forward::cpu(const ExpertsMatmul<float>& a, Arena& arena) {
  float* turned = arena.empty(Dtype::kF32, {a.x.channels, kFewRows}).ptr<float>();
  for_experts(a.lists, [&](const ExpertRows& rows) {
    Gemm g = product(a.x, a.weight, a.y.channels, rows);
    g.n = a.y.channels;
    g.bias = a.bias.defined() ? a.bias.row(rows.expert) : nullptr;
    g.c = a.y.row(rows.begin);
    g.c_row = a.y.rows.outer_stride;
    multiply(g, turned);
  });
}

// The CPU dispatches and multiplies by operations of their own: the definition stands in.
void experts_hidden_forward::cpu(const ExpertsHidden<float>& a, Arena& /*arena*/) {
  reference(a);
}

void experts_grad_input::cpu(const ExpertsGradInput<float>& a, Arena& /*arena*/) {
  for_experts(a.lists, [&](const ExpertRows& rows) {
    Gemm g = product(a.dy, a.weight, a.dy.channels, rows);
    g.n = a.out.channels;
    g.b_rows_are_k = true;
    g.c = a.out.row(rows.begin);
    g.c_row = a.out.rows.outer_stride;
    g.accumulate = a.accumulate;
    multiply(g, nullptr);
  });
}

void experts_grad_weight::cpu(const ExpertsGradWeight<float>& a, Arena& /*arena*/) {
  const int64_t outputs = a.dy.channels;
  for (int64_t e = 0; e < a.lists.experts; ++e) {
    const int64_t begin = a.lists.start[e];
    Gemm g{};
    g.m = outputs;
    g.n = a.x.channels;
    g.k = a.lists.start[e + 1] - begin;
    g.c = a.out.row(e * outputs);
    g.c_row = a.out.rows.outer_stride;
    g.accumulate = a.accumulate;
    if (g.k == 0) {
      for (int64_t n = 0; n < outputs && !a.accumulate; ++n) {
        std::fill_n(a.out.row(e * outputs + n), g.n, 0.0F);
      }
      continue;
    }
    g.a = a.dy.row(begin);
    g.a_row = 1;
    g.a_k = a.dy.rows.outer_stride;
    g.b = a.x.row(begin);
    g.b_rows_are_k = true;
    g.b_stride = a.x.rows.outer_stride;
    multiply(g, nullptr);
  }
}

void experts_grad_bias::cpu(const ExpertsGradBias<float>& a, Arena& /*arena*/) {
  for_experts(a.lists, [&](const ExpertRows& rows) {
    column_sums({rows.count, a.dy.channels, a.dy.row(rows.begin), a.dy.rows.outer_stride,
                 a.out + rows.expert * a.dy.channels});
  });
}

}  // namespace cambium
