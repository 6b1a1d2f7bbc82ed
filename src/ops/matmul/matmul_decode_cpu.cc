// The product of a few tokens with a weight, as in decoding: every weight is used once per call, so
// the time is that of reading them. Squares of the weight are transposed in registers and used at
// once; lanes run over outputs and each output is summed in the order of gemm's, so that a token
// gets the same bits here and there.
#include "base/parallel.h"
#include "base/simd.h"
#include "ops/matmul/matmul_kernels.h"
#include "ops/matmul/matmul_simd.h"

namespace cambium::CAMBIUM_ISA {
namespace {

// How far ahead of its use a weight is asked for: too many rows are walked at once for the hardware
// to see the pattern.
constexpr int64_t kPrefetchBytes = 512;
constexpr int64_t kBytesPerPiece = 65536;

// sum[t] += x[t] (span) of a square, for kTokens tokens.
template <class T, int kTokens>
inline void multiply_square(const Square<T>& square, const float* const (&x)[kTokens], int64_t p,
                            vf (&sum)[kTokens]) {
#pragma GCC unroll 32
  for (int q = 0; q < kSpan<T>; ++q) {
    const vf w = column(square, q);
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) {
      sum[t] += x[t][p + q] * w;
    }
  }
}

template <class T, int kTokens>
inline void multiply_part(const Square<T>& square, const float* const (&x)[kTokens], int64_t p,
                          int64_t length, vf (&sum)[kTokens]) {
  for (int q = 0; q < length; ++q) {
    const vf w = column(square, q);
    for (int t = 0; t < kTokens; ++t) {
      sum[t] += x[t][p + q] * w;
    }
  }
}

// Outputs [n0, n1). kGroups vectors of outputs at once give the multiply-adds of few tokens
// something to overlap with.
template <class T, int kTokens, int kGroups>
void multiply_outputs(const Gemm& g, int64_t n0, int64_t n1) {
  constexpr int64_t kAhead = kPrefetchBytes / static_cast<int64_t>(sizeof(T));
  const T* b = static_cast<const T*>(g.b);
  // Of fewer tokens the last is computed several times and stored once.
  const float* x[kTokens];
  for (int t = 0; t < kTokens; ++t) {
    x[t] = g.a + (t < g.m ? t : g.m - 1) * g.a_row;
  }
  for (int64_t n = n0; n < n1; n += kGroups * kLanes) {
    for (int64_t k0 = 0; k0 == 0 || k0 < g.k; k0 += kGemmDepth) {
      const int64_t end = g.k - k0 < kGemmDepth ? g.k : k0 + kGemmDepth;
      vf sum[kGroups][kTokens] = {};
      for (int64_t p = k0; p < end; p += kSpan<T>) {
        // Where this row stands in a while, or the row that follows in this place.
        const int64_t ahead =
            p + kAhead < g.k ? kAhead : kAhead - g.k + kGroups * kLanes * g.b_stride;
#pragma GCC unroll 2
        for (int group = 0; group < kGroups; ++group) {
          const int64_t rows = n1 - n - group * kLanes;
          if (rows <= 0) {
            break;
          }
          const T* corner = b + (n + group * kLanes) * g.b_stride + p;
          for (int i = 0; i < kLanes; ++i) {
            __builtin_prefetch(corner + i * g.b_stride + ahead);
          }
          const Square<T> square = load_square(corner, g.b_stride, rows, end - p);
          if (end - p >= kSpan<T>) {
            multiply_square<T, kTokens>(square, x, p, sum[group]);
          } else {
            multiply_part<T, kTokens>(square, x, p, end - p, sum[group]);
          }
        }
      }
      for (int group = 0; group < kGroups; ++group) {
        const int64_t first = n + group * kLanes;
        const int64_t lanes = n1 - first;
        for (int t = 0; lanes > 0 && t < kTokens && t < g.m; ++t) {
          float* c = g.c + t * g.c_row + first;
          const float* add = k0 > 0 || g.accumulate ? c
                             : g.bias == nullptr    ? nullptr
                                                    : g.bias + first;
          const vf base = add == nullptr ? vf{} : vload_upto(add, lanes);
          vstore_upto(c, add == nullptr ? sum[group][t] : sum[group][t] + base, lanes);
        }
      }
    }
  }
}

template <class T, int kTokens, int kGroups>
void multiply(const Gemm& g) {
  constexpr int64_t kOutputs = kGroups * kLanes;
  const int64_t bytes = kOutputs * g.k * static_cast<int64_t>(sizeof(T));
  const int64_t grain = (kBytesPerPiece / (bytes + 1) + 1) * kOutputs;
  parallel_for(g.n, grain, [&](int64_t begin, int64_t end) {
    multiply_outputs<T, kTokens, kGroups>(g, begin, end);
  });
}

template <class T>
void multiply(const Gemm& g) {
  if (g.m == 1) {
    multiply<T, 1, 2>(g);
  } else if (g.m == 2) {
    multiply<T, 2, 2>(g);
  } else if (g.m <= 4) {
    multiply<T, 4, 1>(g);
  } else {
    multiply<T, 8, 1>(g);
  }
}

}  // namespace

void gemm_few_rows(const Gemm& g) {
  g.b_is_bf16 ? multiply<uint16_t>(g) : multiply<float>(g);
}

}  // namespace cambium::CAMBIUM_ISA
