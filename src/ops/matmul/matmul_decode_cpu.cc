// The product of a few tokens with a weight, as in decoding: every weight is used once per call, so
// the time is that of reading them. Squares of the weight are transposed in registers and used at
// once; lanes run over outputs and each output is summed in the order of gemm's, so that a token
// gets the same bits here and there.
#include "base/parallel.h"
#include "base/simd.h"
#include "ops/matmul/gemm.h"
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

// Outputs [n0, n1), a vector of them at a time: two vectors at once would be faster by a quarter
// for one token and f32 weights of short rows, but rows a multiple of 4 KiB apart then evict each
// other. Tokens come in groups of kTokens, whose sums fit into registers beside the square; all
// groups use a square before the next is read.
template <class T, int kTokens, int kGroups>
void multiply_outputs(const Gemm& g, int64_t n0, int64_t n1) {
  constexpr int64_t kAhead = kPrefetchBytes / static_cast<int64_t>(sizeof(T));
  // Of fewer tokens the last is computed several times and stored once.
  const float* x[kGroups][kTokens];
  for (int t = 0; t < kGroups * kTokens; ++t) {
    x[t / kTokens][t % kTokens] = g.a + (t < g.m ? t : g.m - 1) * g.a_row;
  }
  for (int64_t n = n0; n < n1; n += kLanes) {
    const T* b = static_cast<const T*>(g.b) + n * g.b_stride;
    for (int64_t k0 = 0; k0 == 0 || k0 < g.k; k0 += kGemmDepth) {
      const int64_t end = g.k - k0 < kGemmDepth ? g.k : k0 + kGemmDepth;
      vf sum[kGroups][kTokens] = {};
      for (int64_t p = k0; p < end; p += kSpan<T>) {
        // Where this row stands in a while, or the row that follows in this place.
        const int64_t ahead = p + kAhead < g.k ? kAhead : kAhead - g.k + kLanes * g.b_stride;
        for (int i = 0; i < kLanes; ++i) {
          __builtin_prefetch(b + i * g.b_stride + p + ahead);
        }
        const Square<T> square = load_square(b + p, g.b_stride, n1 - n, end - p);
#pragma GCC unroll 2
        for (int i = 0; i < kGroups; ++i) {
          if (end - p >= kSpan<T>) {
            multiply_square<T, kTokens>(square, x[i], p, sum[i]);
          } else {
            multiply_part<T, kTokens>(square, x[i], p, end - p, sum[i]);
          }
        }
      }
      for (int t = 0; t < kGroups * kTokens && t < g.m; ++t) {
        const vf total = sum[t / kTokens][t % kTokens];
        float* c = g.c + t * g.c_row + n;
        const float* add = k0 > 0 || g.accumulate ? c : g.bias == nullptr ? nullptr : g.bias + n;
        vstore_upto(c, add == nullptr ? total : total + vload_upto(add, n1 - n), n1 - n);
      }
    }
  }
}

template <class T, int kTokens, int kGroups = 1>
void multiply(const Gemm& g) {
  const int64_t bytes = kLanes * g.k * static_cast<int64_t>(sizeof(T));
  const int64_t grain = (kBytesPerPiece / (bytes + 1) + 1) * kLanes;
  parallel_for(g.n, grain, [&](int64_t begin, int64_t end) {
    multiply_outputs<T, kTokens, kGroups>(g, begin, end);
  });
}

template <class T>
void multiply(const Gemm& g) {
  if (g.m == 1) {
    multiply<T, 1>(g);
  } else if (g.m == 2) {
    multiply<T, 2>(g);
  } else if (g.m <= 4) {
    multiply<T, 4>(g);
  } else if (g.m <= 8) {
    multiply<T, 8>(g);
  } else {
    multiply<T, 8, 2>(g);
  }
}

}  // namespace

void gemm_few_rows(const Gemm& g) {
  g.b_is_bf16 ? multiply<bf16>(g) : multiply<float>(g);
}

}  // namespace cambium::CAMBIUM_ISA
