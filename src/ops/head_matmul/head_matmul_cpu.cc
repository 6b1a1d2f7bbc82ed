#include "base/parallel.h"
#include "ops/head_matmul/head_matmul_kernels.h"
#include "ops/rows_simd.h"

namespace cambium::CAMBIUM_ISA {
namespace {

// Tokens that share the rows of a weight they read.
constexpr int64_t kTokens = 8;

/// body(head, first token, last) in pieces of a head and kTokens tokens.
template <class Body>
void each_piece(const HeadMatmul<float>& a, const Body& body) {
  const int64_t blocks = (a.tokens() + kTokens - 1) / kTokens;
  parallel_for(a.heads() * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % blocks * kTokens;
      const int64_t last = first + kTokens < a.tokens() ? first + kTokens : a.tokens();
      body(i / blocks, first, last);
    }
  });
}

template <class Weight>
void plain(const HeadMatmul<float>& a, const Weight& weight) {
  each_piece(a, [&](int64_t h, int64_t first, int64_t last) {
    for (int64_t n = 0; n < a.y.channels; ++n) {
      for (int64_t t = first; t < last; ++t) {
        float& y = a.y.row(t, h)[n];
        const float sum = dot_rows(a.x.row(t, h), weight.row(h, n), a.x.channels);
        y = a.accumulate ? y + sum : sum;
      }
    }
  });
}

template <class Weight>
void transposed(const HeadMatmul<float>& a, const Weight& weight) {
  each_piece(a, [&](int64_t h, int64_t first, int64_t last) {
    for (int64_t t = first; t < last && !a.accumulate; ++t) {
      std::memset(a.y.row(t, h), 0, static_cast<size_t>(a.y.channels) * sizeof(float));
    }
    for (int64_t n = 0; n < a.x.channels; ++n) {
      for (int64_t t = first; t < last; ++t) {
        add_row(a.y.row(t, h), a.x.row(t, h)[n], weight.row(h, n), a.y.channels);
      }
    }
  });
}

}  // namespace

void head_matmul_forward(const HeadMatmul<float>& a) {
  a.weight.narrow.defined() ? plain(a, a.weight.narrow) : plain(a, a.weight.wide);
}

void head_matmul_transposed_forward(const HeadMatmul<float>& a) {
  a.weight.narrow.defined() ? transposed(a, a.weight.narrow) : transposed(a, a.weight.wide);
}

void head_matmul_grad_weight(const HeadMatmulGradWeight<float>& a) {
  parallel_for(a.n.rows.inner * a.n.channels, 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t h = i / a.n.channels;
      const int64_t n = i % a.n.channels;
      for (int64_t t = 0; t < a.n.rows.outer; ++t) {
        add_row(a.out.row(h, n), a.n.row(t, h)[n], a.k.row(t, h), a.k.channels);
      }
    }
  });
}

}  // namespace cambium::CAMBIUM_ISA
