// Keys and values in fp8 for attention's kernels on tensor cores: copied as bf16, or as they lie
// and then made fragments of products straight from their rows in shared memory.
#pragma once

#include "ops/attention/attention_mma.cuh"

namespace cambium::cuda::attention {

/// Copies the rows of keys or values (-1: none, zeros) to shared memory as bf16: what copy_keys()
/// does of bf16 pages, but that it is done on return.
template <int kDim, int kThreads>
__device__ __forceinline__ void copy_keys(const ScaledRows& from, int dim, int kv_head,
                                          const int64_t* key_rows, int keys, bf16* to) {
  constexpr int kChunks = kDim / 16;
#pragma unroll 2
  for (int i = static_cast<int>(threadIdx.x); i < keys * kChunks; i += kThreads) {
    const int r = i / kChunks;
    const int d = i % kChunks * 16;
    const int64_t row = key_rows[r];
    uint4 codes = make_uint4(0, 0, 0, 0);
    uint32_t factor = 0;
    if (row >= 0 && d < dim) {
      codes = *reinterpret_cast<const uint4*>(from.rows.row(row, kv_head) + d);
      factor = factor_of(*from.scale(row, kv_head));
    }
    const uint2 x[4] = {widen_four(codes.x, factor), widen_four(codes.y, factor),
                        widen_four(codes.z, factor), widen_four(codes.w, factor)};
    auto* out = reinterpret_cast<uint4*>(to + r * shared_row(kDim) + d);
    out[0] = make_uint4(x[0].x, x[0].y, x[1].x, x[1].y);
    out[1] = make_uint4(x[2].x, x[2].y, x[3].x, x[3].y);
  }
}

// --- Products with 16 keys of a warp that lie in shared memory as they do in pages. A sum over
// dims, and the order of the results' columns, are free: lane l takes numbers 16 k + 4 (l % 4) .. 3
// of every 16 of a key, and numbers 32 k + 4 (l / 4) .. 3 of every 32 of a value, each as one word.

/// Rows in shared memory are 16 bytes longer than kDim numbers: words of 8 rows, or of every second
/// row of 8, lie in different banks.
constexpr int shared_row_f8(int dim) {
  return dim + 16;
}

/// The same copies as copy_keys() of bf16 pages makes, in fp8.
template <int kDim, int kThreads>
__device__ __forceinline__ void copy_codes(const View<f8e4m3>& from, int dim, int kv_head,
                                           const int64_t* key_rows, int keys, f8e4m3* to) {
  constexpr int kChunks = kDim / 16;
#pragma unroll 4
  for (int i = static_cast<int>(threadIdx.x); i < keys * kChunks; i += kThreads) {
    const int r = i / kChunks;
    const int d = i % kChunks * 16;
    const bool exists = key_rows[r] >= 0 && d < dim;
    copy_16(to + r * shared_row_f8(kDim) + d,
            exists ? from.row(key_rows[r], kv_head) + d : from.data, exists);
  }
}

/// 16 queries as fragments for scores_of(): their dims in the order of the keys'.
template <int kDim>
struct Queries {
  uint32_t x[kDim / 16][4];

  __device__ __forceinline__ void load(const bf16* q) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const bf16* row = q + lane / 4 * shared_row(kDim) + lane % 4 * 4;
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
      const uint2 upper = *reinterpret_cast<const uint2*>(row + 16 * k);
      const uint2 lower = *reinterpret_cast<const uint2*>(row + 8 * shared_row(kDim) + 16 * k);
      x[k][0] = upper.x;
      x[k][1] = lower.x;
      x[k][2] = upper.y;
      x[k][3] = lower.y;
    }
  }
};

/// What the numbers of 16 keys and values are times, in the lanes that take them.
struct Factors {
  uint32_t key[2];    // of key lane / 4, and of that + 8
  uint32_t value[2];  // of values 2 (lane % 4) and the next, and of those 8 after

  /// mine: in lane l < 16 the factor of key l, in lane 16 + l that of value l.
  __device__ __forceinline__ void set(uint32_t mine) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      key[i] = __shfl_sync(0xffffffffU, mine, lane / 4 + 8 * i);
      const int first = 16 + lane % 4 * 2 + 8 * i;
      const uint32_t low = __shfl_sync(0xffffffffU, mine, first);
      const uint32_t high = __shfl_sync(0xffffffffU, mine, first + 1);
      value[i] = __byte_perm(low, high, 0x5410);
    }
  }
};

template <int kDim>
__device__ __forceinline__ void scores_of(const Queries<kDim>& q, const f8e4m3* keys,
                                          const Factors& factors, float (&s)[1][2][4]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const f8e4m3* key = keys + lane / 4 * shared_row_f8(kDim) + lane % 4 * 4;
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const auto word =
          *reinterpret_cast<const uint32_t*>(key + n * 8 * shared_row_f8(kDim) + 16 * k);
      const uint2 y = widen_four(word, factors.key[n]);
      mma(s[0][n], q.x[k], y.x, y.y);
    }
  }
}

/// y += P values. Column c of y[4 k + i] is number 32 k + 4 c + i.
template <int kDim>
__device__ __forceinline__ void add_values(const float (&p)[1][2][4], const f8e4m3* values,
                                           const Factors& factors, float (&y)[1][kDim / 8][4]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const f8e4m3* value = values + lane % 4 * 2 * shared_row_f8(kDim) + lane / 4 * 4;
  const uint32_t x[4] = {pack(p[0][0][0], p[0][0][1]), pack(p[0][0][2], p[0][0][3]),
                         pack(p[0][1][0], p[0][1][1]), pack(p[0][1][2], p[0][1][3])};
#pragma unroll
  for (int k = 0; k < kDim / 32; ++k) {
    const auto word = [&](int row) {
      return *reinterpret_cast<const uint32_t*>(value + row * shared_row_f8(kDim) + 32 * k);
    };
    const uint32_t a = word(0);
    const uint32_t b = word(1);
    const uint32_t c = word(8);
    const uint32_t d = word(9);
    mma(y[0][4 * k], x, widen_two<0, 4>(a, b, factors.value[0]),
        widen_two<0, 4>(c, d, factors.value[1]));
    mma(y[0][4 * k + 1], x, widen_two<1, 5>(a, b, factors.value[0]),
        widen_two<1, 5>(c, d, factors.value[1]));
    mma(y[0][4 * k + 2], x, widen_two<2, 6>(a, b, factors.value[0]),
        widen_two<2, 6>(c, d, factors.value[1]));
    mma(y[0][4 * k + 3], x, widen_two<3, 7>(a, b, factors.value[0]),
        widen_two<3, 7>(c, d, factors.value[1]));
  }
}

}  // namespace cambium::cuda::attention
