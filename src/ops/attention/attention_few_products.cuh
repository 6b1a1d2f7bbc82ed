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

// --- fp8. Numbers of keys and values become f16, which holds each of them, in one instruction for
// two; their rows' scales are left out of the products. That of a key its scores are times, that of
// a value the probability, which is rounded to f16 for its product with the value. Both operands
// are kept within the range of f16 by powers of two: queries by one for each, probabilities by one
// for the largest scale of a value so far. As the sum over dims and the order of the sums are free,
// lane l takes numbers 16 k + 4 (l % 4) .. 3 of every 16 of a key, and 32 k + 4 (l / 4) .. 3 of
// every 32 of a value, each as one word.

/// c += a b, as mma() of bf16.
__device__ __forceinline__ void mma_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                        uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/// Two numbers as f16, the first in the lower half.
__device__ __forceinline__ uint32_t pack_f16(float first, float second) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(second), "f"(first));
  return packed;
}

/// The four numbers of a word, as f16.
__device__ __forceinline__ uint2 to_f16(uint32_t word) {
  uint2 x;
#if __CUDA_ARCH__ >= 890
  asm("{.reg .b16 low, high;\n\t"
      "mov.b32 {low, high}, %2;\n\t"
      "cvt.rn.f16x2.e4m3x2 %0, low;\n\t"
      "cvt.rn.f16x2.e4m3x2 %1, high;}"
      : "=r"(x.x), "=r"(x.y)
      : "r"(word));
#else
  // With sign, exponent and mantissa in their places in an f16, a number is 2^-8 of its value.
  const auto widen = [](uint32_t high_bytes) {
    const uint32_t moved = (high_bytes & 0x80008000U) | (high_bytes >> 1 & 0x3f803f80U);
    uint32_t widened;
    asm("fma.rn.f16x2 %0, %1, %2, %3;"
        : "=r"(widened)
        : "r"(moved), "r"(0x5c005c00U), "r"(0x80008000U));  // times 256
    return widened;
  };
  x.x = widen(__byte_perm(word, 0, 0x1404));
  x.y = widen(__byte_perm(word, 0, 0x3424));
#endif
  return x;
}

/// 2^(e - 127), for 0 < e < 255; 0 for e = 0.
__device__ __forceinline__ float power(int e) {
  return __int_as_float(e << 23);
}

template <int kDim, int kQ, int kG>
struct Products<kDim, kQ, kG, f8e4m3> {
  using Keys = Chunk<kDim, kG * 16, f8e4m3>;
  // Numbers whose exponent is e are taken times power(kSum - e): they begin at 2^14. Those of
  // smaller exponents than kLeast stay below that, so that both powers are numbers.
  static constexpr int kSum = 268;
  static constexpr int kLeast = 15;

  uint32_t q[kQ][kDim / 16][2];
  float q_unit[kQ][2];   // what the queries of this lane's scores are times
  int largest = kLeast;  // exponent of the values' scales so far

  __device__ __forceinline__ void load_queries(const View<bf16>& queries, const Layout& layout,
                                               const Block& b) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int t = 0; t < kQ; ++t) {
      const bf16* row = find_query(queries, layout, b, t * 8 + lane / 4);
      uint32_t most = 0;
#pragma unroll
      for (int k = 0; k < kDim / 16; ++k) {
        const int d = 16 * k + lane % 4 * 4;
        const uint2 x = row != nullptr && d < layout.head_dim
                            ? *reinterpret_cast<const uint2*>(row + d)
                            : make_uint2(0, 0);
        q[t][k][0] = x.x;
        q[t][k][1] = x.y;
        most = max(most, max(max(x.x & 0x7fffU, x.x >> 16 & 0x7fffU),
                             max(x.y & 0x7fffU, x.y >> 16 & 0x7fffU)));
      }
      most = max(most, __shfl_xor_sync(0xffffffffU, most, 1));
      most = max(most, __shfl_xor_sync(0xffffffffU, most, 2));
      const int exponent = max(static_cast<int>(most >> 7), kLeast);
      const float factor = power(kSum - exponent);
#pragma unroll
      for (int k = 0; k < kDim / 16; ++k) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          q[t][k][i] = pack_f16(__uint_as_float(q[t][k][i] << 16) * factor,
                                __uint_as_float(q[t][k][i] & 0xffff0000U) * factor);
        }
      }
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        q_unit[t][e] = power(254 - kSum + __shfl_sync(0xffffffffU, exponent, lane % 4 * 8 + e * 4));
      }
    }
  }
  __device__ __forceinline__ void scores(const Keys& keys, float (&s)[kG][kQ][4]) const {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
#pragma unroll
      for (int g = 0; g < kG; ++g) {
        const auto word = [&](int key) {
          return *reinterpret_cast<const uint32_t*>(keys.key(16 * g + key) + 16 * k + lane % 4 * 4);
        };
        const uint2 a = to_f16(word(lane / 4));
        const uint2 b = to_f16(word(lane / 4 + 8));
        const uint32_t x[4] = {a.x, b.x, a.y, b.y};
#pragma unroll
        for (int t = 0; t < kQ; ++t) {
          mma_f16(s[g][t], x, q[t][k][0], q[t][k][1]);
        }
      }
    }
#pragma unroll
    for (int g = 0; g < kG; ++g) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float scale = load(keys.key_scales() + 16 * g + lane / 4 + e / 2 * 8);
#pragma unroll
        for (int t = 0; t < kQ; ++t) {
          s[g][t][e] *= scale * q_unit[t][e % 2];
        }
      }
    }
  }
  __device__ __forceinline__ void add(const Keys& keys, const float (&p)[kG][kQ][4],
                                      float (&y)[kQ][kDim / 16][4]) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const bf16* scales = keys.value_scales();
    const unsigned exponent = scales[lane % (16 * kG)].bits >> 7 & 0xffU;
    const auto most = static_cast<int>(__reduce_max_sync(0xffffffffU, exponent));
    if (most > largest) {
      multiply(y, power(max(127 + largest - most, 0)));
      largest = most;
    }
    const float unit = power(kSum - largest);
#pragma unroll
    for (int g = 0; g < kG; ++g) {
      uint32_t x[kQ][2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float scale = load(scales + 16 * g + lane / 4 + 8 * i) * unit;
#pragma unroll
        for (int t = 0; t < kQ; ++t) {
          x[t][i] = transpose(pack_f16(p[g][t][2 * i] * scale, p[g][t][2 * i + 1] * scale));
        }
      }
#pragma unroll
      for (int k = 0; k < kDim / 32; ++k) {
        const auto word = [&](int value) {
          return *reinterpret_cast<const uint32_t*>(keys.value(16 * g + lane % 4 * 2 + value) +
                                                    32 * k + lane / 4 * 4);
        };
        const uint32_t a = word(0);
        const uint32_t b = word(1);
        const uint32_t c = word(8);
        const uint32_t d = word(9);
        // Numbers i of a and b side by side, for i = 0, 1 and i = 2, 3.
        const uint2 upper[2] = {to_f16(__byte_perm(a, b, 0x5140)),
                                to_f16(__byte_perm(a, b, 0x7362))};
        const uint2 lower[2] = {to_f16(__byte_perm(c, d, 0x5140)),
                                to_f16(__byte_perm(c, d, 0x7362))};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint32_t v[4] = {upper[i].x, upper[i].y, lower[i].x, lower[i].y};
#pragma unroll
          for (int t = 0; t < kQ; ++t) {
            mma_f16(y[t][2 * k + i], v, x[t][0], x[t][1]);
          }
        }
      }
    }
  }
  __device__ __forceinline__ static void multiply(float (&y)[kQ][kDim / 16][4], float factor) {
#pragma unroll
    for (int t = 0; t < kQ; ++t) {
#pragma unroll
      for (int m = 0; m < kDim / 16; ++m) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          y[t][m][e] *= factor;
        }
      }
    }
  }
  __device__ __forceinline__ void finish(float (&y)[kQ][kDim / 16][4]) const {
    multiply(y, power(254 - kSum + largest));
  }
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
