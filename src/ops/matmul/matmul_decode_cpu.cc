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

// turned (k, tokens) = a (m, k) transposed: the values that one weight is multiplied by lie
// together (rows of a that are a multiple of 4 KiB apart would evict each other). Of fewer rows the
// last is repeated, computed several times and stored once.
void turn_tokens(const Gemm& g, int64_t tokens, float* turned) {
  for (int64_t t = 0; t < tokens; t += kLanes) {
    for (int64_t p = 0; p < g.k; p += kLanes) {
      vf square[kLanes] = {};
      for (int i = 0; i < kLanes && t + i < tokens; ++i) {
        square[i] = vload_upto(g.a + (t + i < g.m ? t + i : g.m - 1) * g.a_row + p, g.k - p);
      }
      transpose_square(square);
      for (int q = 0; q < kLanes && p + q < g.k; ++q) {
        vstore_upto(turned + (p + q) * tokens + t, square[q], tokens - t);
      }
    }
  }
}

// Stores the sums of a block of depth at k0 for a vector of outputs of token t.
inline void finish(const Gemm& g, int64_t k0, int64_t t, int64_t n, int64_t count, vf sum) {
  float* c = g.c + t * g.c_row + n;
  const float* add = k0 > 0 || g.accumulate ? c : g.bias == nullptr ? nullptr : g.bias + n;
  vstore_upto(c, add == nullptr ? sum : sum + vload_upto(add, count), count);
}

// One or two tokens are read as they lie: turning them would cost more than it saves.
template <int kTokens, int kGroups>
inline constexpr bool kTurned = kTokens* kGroups > 2;

// Column q of token t: turned, with kStep tokens; or as it lies, where kStep is 0.
template <int kStep>
inline float at(const float* x, int64_t x_row, int q, int t) {
  return kStep > 0 ? x[q * kStep + t] : x[t * x_row + q];
}

// sum[t] += x[t] (span) of the first `length` columns of a square.
template <class T, int kStep, int kTokens>
inline void multiply_square(const Square<T>& square, const float* x, int64_t x_row,
                            vf (&sum)[kTokens]) {
#pragma GCC unroll 32
  for (int q = 0; q < kSpan<T>; ++q) {
    const vf w = column(square, q);
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) {
      sum[t] = vfma(vset(at<kStep>(x, x_row, q, t)), w, sum[t]);
    }
  }
}

template <class T, int kStep, int kTokens>
inline void multiply_part(const Square<T>& square, const float* x, int64_t x_row, int64_t length,
                          vf (&sum)[kTokens]) {
  for (int q = 0; q < length; ++q) {
    const vf w = column(square, q);
    for (int t = 0; t < kTokens; ++t) {
      sum[t] = vfma(vset(at<kStep>(x, x_row, q, t)), w, sum[t]);
    }
  }
}

// Outputs [n0, n1), a vector of them at a time: two vectors at once would be faster by a quarter
// for one token and f32 weights of short rows, but rows a multiple of 4 KiB apart then evict each
// other. Tokens come in groups of kTokens, whose sums fit into registers beside the square.
template <class T, int kTokens, int kGroups>
void multiply_outputs(const Gemm& g, const float* x, int64_t n0, int64_t n1) {
  constexpr int kStep = kTurned<kTokens, kGroups> ? kGroups * kTokens : 0;
  constexpr int64_t kAhead = kPrefetchBytes / static_cast<int64_t>(sizeof(T));
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
          const float* values = x + p * (kStep > 0 ? kStep : 1) + i * kTokens;
          if (end - p >= kSpan<T>) {
            multiply_square<T, kStep>(square, values, g.a_row, sum[i]);
          } else {
            multiply_part<T, kStep>(square, values, g.a_row, end - p, sum[i]);
          }
        }
      }
      for (int t = 0; t < kGroups * kTokens && t < g.m; ++t) {
        finish(g, k0, t, n, n1 - n, sum[t / kTokens][t % kTokens]);
      }
    }
  }
}

// Outputs that a thread takes at once.
int64_t outputs_per_piece(const Gemm& g) {
  const int64_t bytes = kLanes * g.k * (g.b_is_bf16 ? 2 : 4);
  return (kBytesPerPiece / (bytes + 1) + 1) * kLanes;
}
int64_t pieces_of(const Gemm& g) {
  return (g.n + outputs_per_piece(g) - 1) / outputs_per_piece(g);
}

template <int kTokens, int kGroups = 1>
void multiply(const Gemms& all) {
  const float* x = all.each[0].a;
  if (kTurned<kTokens, kGroups>) {
    turn_tokens(all.each[0], kGroups * kTokens, all.turned);
    x = all.turned;
  }
  int64_t pieces = 0;
  for (int64_t i = 0; i < all.count; ++i) {
    pieces += pieces_of(all.each[i]);
  }
  parallel_for(pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) {
      int64_t local = piece;
      const Gemm* g = all.each;
      for (; local >= pieces_of(*g); ++g) {
        local -= pieces_of(*g);
      }
      const int64_t n0 = local * outputs_per_piece(*g);
      const int64_t next = n0 + outputs_per_piece(*g);
      const int64_t n1 = next < g->n ? next : g->n;
      if (g->b_is_bf16) {
        multiply_outputs<bf16, kTokens, kGroups>(*g, x, n0, n1);
      } else {
        multiply_outputs<float, kTokens, kGroups>(*g, x, n0, n1);
      }
    }
  });
}

}  // namespace

// Tokens are computed in twos, fours, eights, twelves and sixteens: sums that do not fit into the
// registers come in two groups, and both use a square before the next is read.
void gemm_few_rows(const Gemms& all) {
  switch (few_rows(all.each[0].m)) {
    case 1:
      return multiply<1>(all);
    case 2:
      return multiply<2>(all);
    case 4:
      return multiply<4>(all);
    case 8:
      return multiply<8>(all);
    case 12:
      return multiply<6, 2>(all);
    default:
      return multiply<8, 2>(all);
  }
}

}  // namespace cambium::CAMBIUM_ISA
