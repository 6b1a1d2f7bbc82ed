// Products of up to 16 queries with the keys of a warp, for attention's kernel of few rows. Queries
// are the narrow side of a product: a tile of kQ x 8 of them takes half the instructions and
// registers that 16 rows would. So scores are (keys, queries) and sums (dims, queries): number e of
// a tile belongs to key or dim l / 4 + 8 (e / 2) and query 2 (l % 4) + e % 2 of lane l.
#pragma once

#include "ops/attention/attention_few.cuh"

namespace cambium::cuda::attention {

/// A chunk in shared memory: kKeys keys, as many values, and for those of fp8 the scales of the
/// keys and of the values. Rows are 16 bytes longer than kDim numbers: those of one access lie in
/// different banks.
template <int kDim, int kKeys, class E>
struct Chunk {
  static constexpr int kRow = kDim + 16 / static_cast<int>(sizeof(E));
  static constexpr int kScales = sizeof(E) == 1 ? 2 * kKeys : 0;
  static constexpr int kBytes =
      2 * kKeys * kRow * static_cast<int>(sizeof(E)) + kScales * static_cast<int>(sizeof(bf16));

  E* rows;

  __device__ __forceinline__ E* key(int i) const { return rows + i * kRow; }
  __device__ __forceinline__ E* value(int i) const { return rows + (kKeys + i) * kRow; }
  __device__ __forceinline__ bf16* key_scales() const {
    return reinterpret_cast<bf16*>(rows + 2 * kKeys * kRow);
  }
  __device__ __forceinline__ bf16* value_scales() const { return key_scales() + kKeys; }
};

/// An 8 x 8 matrix of 16-bit numbers, transposed: lane l has row l / 4, columns 2 (l % 4) and the
/// next.
__device__ __forceinline__ uint32_t transpose(uint32_t x) {
  uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

/// The row of query r of the tile, or null where there is none.
__device__ __forceinline__ const bf16* find_query(const View<bf16>& q, const Layout& layout,
                                                  const Block& b, int r) {
  const int row = b.tile.first_row + r;
  return row < b.rows
             ? q.row(b.start + row / layout.group, b.kv_head * layout.group + row % layout.group)
             : nullptr;
}

/// kG x 16 keys.
template <int kDim, int kQ, int kG, class E>
struct Products;

template <int kDim, int kQ, int kG>
struct Products<kDim, kQ, kG, bf16> {
  using Keys = Chunk<kDim, kG * 16, bf16>;
  uint32_t q[kQ][kDim / 16][2];

  __device__ __forceinline__ void load_queries(const View<bf16>& queries, const Layout& layout,
                                               const Block& b) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int t = 0; t < kQ; ++t) {
      const bf16* row = find_query(queries, layout, b, t * 8 + lane / 4);
#pragma unroll
      for (int k = 0; k < kDim / 16; ++k) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int d = 16 * k + 8 * i + lane % 4 * 2;
          q[t][k][i] = row != nullptr && d < layout.head_dim
                           ? *reinterpret_cast<const uint32_t*>(row + d)
                           : 0U;
        }
      }
    }
  }
  __device__ __forceinline__ void scores(const Keys& keys, float (&s)[kG][kQ][4]) const {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int g = 0; g < kG; ++g) {
      const bf16* key = keys.key(16 * g + lane % 16) + lane / 16 * 8;
      float odd[kQ][4] = {};  // a second sum: products wait for each other half as long
#pragma unroll
      for (int k = 0; k < kDim / 16; ++k) {
        uint32_t x[4];
        load_matrices(x, key + 16 * k);
#pragma unroll
        for (int t = 0; t < kQ; ++t) {
          mma(k % 2 == 0 ? s[g][t] : odd[t], x, q[t][k][0], q[t][k][1]);
        }
      }
#pragma unroll
      for (int t = 0; t < kQ; ++t) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          s[g][t][e] += odd[t][e];
        }
      }
    }
  }
  /// y += the values times the probabilities p.
  __device__ __forceinline__ void add(const Keys& keys, const float (&p)[kG][kQ][4],
                                      float (&y)[kQ][kDim / 16][4]) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int g = 0; g < kG; ++g) {
      const bf16* value = keys.value(16 * g + lane % 8 + lane / 16 * 8) + lane / 8 % 2 * 8;
      uint32_t x[kQ][2];
#pragma unroll
      for (int t = 0; t < kQ; ++t) {
        x[t][0] = transpose(pack(p[g][t][0], p[g][t][1]));
        x[t][1] = transpose(pack(p[g][t][2], p[g][t][3]));
      }
#pragma unroll
      for (int m = 0; m < kDim / 16; ++m) {
        uint32_t v[4];
        load_matrices_transposed(v, value + 16 * m);
#pragma unroll
        for (int t = 0; t < kQ; ++t) {
          mma(y[t][m], v, x[t][0], x[t][1]);
        }
      }
    }
  }
  __device__ __forceinline__ void finish(float (&/*y*/)[kQ][kDim / 16][4]) const {}
  /// The sums of query 2 (l % 4) + e of each lane l to their row.
  __device__ __forceinline__ static void store(const float (&y)[kDim / 16][4], int e, float* to) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int m = 0; m < kDim / 16; ++m) {
      to[16 * m + lane / 4] = y[m][e];
      to[16 * m + 8 + lane / 4] = y[m][e + 2];
    }
  }
};

// --- fp8. Numbers become the bf16 that they stand for on their way to the products
// (attention_cuda.cuh). As the sum over dims and the order of the sums are free, lane l takes
// numbers 16 k + 4 (l % 4) .. 3 of every 16 of a key, and 32 k + 4 (l / 4) .. 3 of every 32 of a
// value, each as one word.

template <int kDim, int kQ, int kG>
struct Products<kDim, kQ, kG, f8e4m3> {
  using Keys = Chunk<kDim, kG * 16, f8e4m3>;
  uint32_t q[kQ][kDim / 16][2];

  __device__ __forceinline__ void load_queries(const View<bf16>& queries, const Layout& layout,
                                               const Block& b) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int t = 0; t < kQ; ++t) {
      const bf16* row = find_query(queries, layout, b, t * 8 + lane / 4);
#pragma unroll
      for (int k = 0; k < kDim / 16; ++k) {
        const int d = 16 * k + lane % 4 * 4;
        const uint2 x = row != nullptr && d < layout.head_dim
                            ? *reinterpret_cast<const uint2*>(row + d)
                            : make_uint2(0, 0);
        q[t][k][0] = x.x;
        q[t][k][1] = x.y;
      }
    }
  }
  __device__ __forceinline__ void scores(const Keys& keys, float (&s)[kG][kQ][4]) const {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int g = 0; g < kG; ++g) {
      const f8e4m3* key = keys.key(16 * g + lane / 4) + lane % 4 * 4;
      const bf16* scales = keys.key_scales() + 16 * g + lane / 4;
      const uint32_t factors[2] = {factor_of(scales[0]), factor_of(scales[8])};
#pragma unroll
      for (int k = 0; k < kDim / 16; ++k) {
        const auto word = [&](int row) {
          return *reinterpret_cast<const uint32_t*>(key + row * Keys::kRow + 16 * k);
        };
        const uint2 upper = widen_four(word(0), factors[0]);
        const uint2 lower = widen_four(word(8), factors[1]);
        const uint32_t x[4] = {upper.x, lower.x, upper.y, lower.y};
#pragma unroll
        for (int t = 0; t < kQ; ++t) {
          mma(s[g][t], x, q[t][k][0], q[t][k][1]);
        }
      }
    }
  }
  __device__ __forceinline__ void add(const Keys& keys, const float (&p)[kG][kQ][4],
                                      float (&y)[kQ][kDim / 16][4]) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int g = 0; g < kG; ++g) {
      uint32_t x[kQ][2];
#pragma unroll
      for (int t = 0; t < kQ; ++t) {
        x[t][0] = transpose(pack(p[g][t][0], p[g][t][1]));
        x[t][1] = transpose(pack(p[g][t][2], p[g][t][3]));
      }
      const f8e4m3* value = keys.value(16 * g + lane % 4 * 2) + lane / 4 * 4;
      const bf16* scales = keys.value_scales() + 16 * g + lane % 4 * 2;
      const auto factors_of = [](const bf16* two) {
        return __byte_perm(factor_of(two[0]), factor_of(two[1]), 0x5410);
      };
      const uint32_t factors[2] = {factors_of(scales), factors_of(scales + 8)};
#pragma unroll
      for (int k = 0; k < kDim / 32; ++k) {
        const auto word = [&](int row) {
          return *reinterpret_cast<const uint32_t*>(value + row * Keys::kRow + 32 * k);
        };
        const uint32_t a = word(0);
        const uint32_t b = word(1);
        const uint32_t c = word(8);
        const uint32_t d = word(9);
        const uint32_t v[2][4] = {
            {widen_two<0, 4>(a, b, factors[0]), widen_two<1, 5>(a, b, factors[0]),
             widen_two<0, 4>(c, d, factors[1]), widen_two<1, 5>(c, d, factors[1])},
            {widen_two<2, 6>(a, b, factors[0]), widen_two<3, 7>(a, b, factors[0]),
             widen_two<2, 6>(c, d, factors[1]), widen_two<3, 7>(c, d, factors[1])}};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
          for (int t = 0; t < kQ; ++t) {
            mma(y[t][2 * k + i], v[i], x[t][0], x[t][1]);
          }
        }
      }
    }
  }
  __device__ __forceinline__ void finish(float (&/*y*/)[kQ][kDim / 16][4]) const {}
  /// The sums of query 2 (l % 4) + e of each lane l to their row.
  __device__ __forceinline__ static void store(const float (&y)[kDim / 16][4], int e, float* to) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int k = 0; k < kDim / 32; ++k) {
      *reinterpret_cast<float4*>(to + 32 * k + lane / 4 * 4) =
          make_float4(y[2 * k][e], y[2 * k][e + 2], y[2 * k + 1][e], y[2 * k + 1][e + 2]);
    }
  }
};

}  // namespace cambium::cuda::attention
