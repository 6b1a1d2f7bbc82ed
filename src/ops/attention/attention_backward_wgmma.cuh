// What the kernels of attention's backward pass by products of warpgroups share: their tiles in
// shared memory, the ring that one warp fills, and products whose left side is in registers.
#pragma once

#include <climits>

#include "ops/attention/attention_mma.cuh"
#include "ops/cuda_bulk.cuh"
#include "ops/cuda_tensor_map.cuh"
#include "ops/cuda_warpgroup.cuh"

namespace cambium::cuda::attention::wgmma {

inline constexpr int kGroup = 128;  // threads of a warpgroup
inline constexpr int kGroups = 2;   // that multiply; a third has the warp that copies
inline constexpr int kBlock = (kGroups + 1) * kGroup;
inline constexpr int kRows = 64;  // tokens of a tile
inline constexpr int kOwn = kGroups * kRows;

template <int kDim>
inline constexpr int kStages = kDim <= 64 ? 4 : 3;

/// What P = exp2(score - log_sum) and dS = P (dP - delta) take of a token and head.
struct alignas(8) RowNumbers {
  float log_sum;
  float delta;
};
/// Those at `at`, or of a token that does not exist: its P is 0.
__device__ __forceinline__ RowNumbers numbers_of(const RowNumbers* at, bool exists) {
  return exists ? *at : RowNumbers{INFINITY, 0.0F};
}

/// (64, kDim) in tiles of 64 columns.
template <int kDim>
struct Rows64 {
  static constexpr int kTiles = kDim / kTileColumns;
  bf16 tiles[kTiles][kTileSize];
};

template <int kDim>
struct Shared {
  Rows64<kDim> own[kGroups][2];           // keys and values, or q and dy
  Rows64<kDim> walked[kStages<kDim>][2];  // q and dy, or keys and values
  RowNumbers numbers[kStages<kDim>][kRows];
  uint64_t own_full;  // barriers
  uint64_t full[kStages<kDim>], empty[kStages<kDim>];
};

/// Boxes of 64 tokens and 64 columns of a head.
struct Boxes {
  CUtensorMap q, k, v, dy;
};

struct Args {
  Layout layout;
  const Tile* tiles;
  const RowNumbers* numbers;  // (H, T)
  int tokens;                 // T
  View<bf16> q, k, v;
  bool set_q, set_k, set_v;
};

/// What a block computes: tokens or keys [first, first + kOwn) of a segment.
struct Own {
  Tile tile;
  int start;   // row of the segment's first token
  int length;  // of the segment
};

__device__ __forceinline__ Own find_own(const Layout& layout, const Tile& tile) {
  const int start = layout.start[tile.segment];
  return {tile, start, layout.start[tile.segment + 1] - start};
}

template <int kDim>
__device__ __forceinline__ void init_barriers(Shared<kDim>& s) {
  if (threadIdx.x == 0) {
    init_barrier(&s.own_full, 1);
    for (int i = 0; i < kStages<kDim>; ++i) {
      init_barrier(&s.full[i], 32);  // the lanes of the warp that copies
      init_barrier(&s.empty[i], kGroups * kGroup / 32);
    }
    barriers_ready();
  }
  __syncthreads();
}

template <int kDim>
__device__ __forceinline__ void copy_tile(Rows64<kDim>& to, const CUtensorMap& from, int head,
                                          int token, uint64_t* barrier) {
#pragma unroll
  for (int c = 0; c < Rows64<kDim>::kTiles; ++c) {
    copy_box(to.tiles[c], from, {c * kTileColumns, head, token}, barrier);
  }
}

/// One thread: brings the block's own rows of two tensors, from `token` on.
template <int kDim>
__device__ __forceinline__ void copy_own(Shared<kDim>& s, const CUtensorMap& first,
                                         const CUtensorMap& second, int head, int token) {
  arrive_expecting(&s.own_full, sizeof(s.own));
  for (int g = 0; g < kGroups; ++g) {
    copy_tile(s.own[g][0], first, head, token + g * kRows, &s.own_full);
    copy_tile(s.own[g][1], second, head, token + g * kRows, &s.own_full);
  }
}

/// A warp: brings the next tile of two tensors and, if wanted, two numbers of each lane.
template <int kDim>
__device__ __forceinline__ void copy_walked(Shared<kDim>& s, RingPlace<kStages<kDim>>& at,
                                            const CUtensorMap& first, const CUtensorMap& second,
                                            int head, int token, const RowNumbers* numbers) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  uint64_t* full = &s.full[at.stage];
  await_phase(&s.empty[at.stage], at.parity ^ 1);
  if (numbers != nullptr) {
    s.numbers[at.stage][lane] = numbers[0];
    s.numbers[at.stage][lane + 32] = numbers[1];
  }
  if (lane == 0) {
    arrive_expecting(full, sizeof(s.walked[0]));
    copy_tile(s.walked[at.stage][0], first, head, token, full);
    copy_tile(s.walked[at.stage][1], second, head, token, full);
  } else {
    arrive(full);
  }
  __syncwarp();
  at.next();
}

/// A warpgroup's own 64 rows, as the left side of products: in registers if kHeld.
template <int kDim, bool kHeld>
struct Left {
  uint32_t part[kHeld ? kDim / 16 : 1][4];
  uint64_t described;

  __device__ __forceinline__ explicit Left(const Rows64<kDim>& rows) {
    if constexpr (kHeld) {
      const int thread = static_cast<int>(threadIdx.x) % kGroup;
      const int row = thread / 32 * 16 + thread % 16;
#pragma unroll
      for (int k = 0; k < kDim / 16; ++k) {
        load_matrices(part[k], rows.tiles[k / 4] + swizzled(row, k % 4 * 2 + thread % 32 / 16));
      }
    } else {
      described = describe_tile(&rows);
    }
  }
  /// Begins d = rows right', of 64 rows right; they make a commit.
  __device__ __forceinline__ void multiply(const Rows64<kDim>& right, float (&d)[kRows / 8][4]) {
    const uint64_t b = describe_tile(&right);
    begin_products();
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
      if constexpr (kHeld) {
        if (k == 0) {
          multiply_async<false, false>(d, part[k], b);
        } else {
          multiply_async<false>(d, part[k], b + of_columns(k));
        }
      } else {
        if (k == 0) {
          multiply_async<false, false, false>(d, described, b);
        } else {
          multiply_async(d, described + of_columns(k), b + of_columns(k));
        }
      }
    }
    commit_products();
  }
};

/// Begins d += weights right, of 64 rows right; they make a commit.
template <int kDim>
__device__ __forceinline__ void add_product(const uint32_t (&weights)[kRows / 16][4],
                                            const Rows64<kDim>& right, float (&d)[kDim / 8][4]) {
  const uint64_t b = describe_tile(&right, kTileBytes);
  begin_products();
#pragma unroll
  for (int k = 0; k < kRows / 16; ++k) {
    multiply_async<true>(d, weights[k], b + of_rows(k));
  }
  commit_products();
}

/// A token sees the keys that are fewer than this many tokens before it, itself among them.
__device__ __forceinline__ int span_of(const Layout& layout) {
  return layout.window > 0 ? layout.window : INT_MAX;
}
/// Of a token so many after a key.
__device__ __forceinline__ bool sees(int distance, int span) {
  return static_cast<unsigned>(distance) < static_cast<unsigned>(span);
}
/// Whether each of 64 tokens sees each of 64 keys; distance: between the first of both.
__device__ __forceinline__ bool see_all(int distance, int span) {
  return distance >= kRows - 1 && distance + kRows - 1 < span;
}

/// S' becomes P'. distance: of the tile's first token from the thread's first key; the other key is
/// the eighth after it.
__device__ __forceinline__ void weigh_tokens(float scale, const RowNumbers* numbers, bool all_seen,
                                             int distance, int span, float (&s)[kRows / 8][4]) {
  const int column = static_cast<int>(threadIdx.x) % 4 * 2;
#pragma unroll
  for (int n = 0; n < kRows / 8; ++n) {
    const auto two = *reinterpret_cast<const float4*>(numbers + 8 * n + column);
    s[n][0] = fast_exp2(fmaf(s[n][0], scale, -two.x));
    s[n][1] = fast_exp2(fmaf(s[n][1], scale, -two.z));
    s[n][2] = fast_exp2(fmaf(s[n][2], scale, -two.x));
    s[n][3] = fast_exp2(fmaf(s[n][3], scale, -two.z));
  }
  if (!all_seen) {
#pragma unroll
    for (int n = 0; n < kRows / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const bool seen = sees(distance + 8 * n + column + e % 2 - e / 2 * 8, span);
        s[n][e] = seen ? s[n][e] : 0.0F;
      }
    }
  }
}

/// dP' becomes dS'.
__device__ __forceinline__ void differ_tokens(const RowNumbers* numbers,
                                              const float (&p)[kRows / 8][4],
                                              float (&dp)[kRows / 8][4]) {
  const int column = static_cast<int>(threadIdx.x) % 4 * 2;
#pragma unroll
  for (int n = 0; n < kRows / 8; ++n) {
    const auto two = *reinterpret_cast<const float4*>(numbers + 8 * n + column);
    dp[n][0] = p[n][0] * (dp[n][0] - two.y);
    dp[n][1] = p[n][1] * (dp[n][1] - two.w);
    dp[n][2] = p[n][2] * (dp[n][2] - two.y);
    dp[n][3] = p[n][3] * (dp[n][3] - two.w);
  }
}

/// S becomes P. distance: of the thread's first token from the tile's first key; the other token is
/// the eighth after it.
__device__ __forceinline__ void weigh_keys(float scale, const RowNumbers (&numbers)[2],
                                           bool all_seen, int distance, int span,
                                           float (&s)[kRows / 8][4]) {
  const int column = static_cast<int>(threadIdx.x) % 4 * 2;
#pragma unroll
  for (int n = 0; n < kRows / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      s[n][e] = fast_exp2(fmaf(s[n][e], scale, -numbers[e / 2].log_sum));
    }
  }
  if (!all_seen) {
#pragma unroll
    for (int n = 0; n < kRows / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const bool seen = sees(distance + e / 2 * 8 - (8 * n + column + e % 2), span);
        s[n][e] = seen ? s[n][e] : 0.0F;
      }
    }
  }
}

/// As the left side of a product; before what follows, which may begin to overwrite x.
__device__ __forceinline__ void pack_all(const float (&x)[kRows / 8][4],
                                         uint32_t (&packed)[kRows / 16][4]) {
#pragma unroll
  for (int n = 0; n < kRows / 8; ++n) {
    packed[n / 2][n % 2 * 2] = pack(x[n][0], x[n][1]);
    packed[n / 2][n % 2 * 2 + 1] = pack(x[n][2], x[n][3]);
  }
#pragma unroll
  for (int i = 0; i < kRows / 4; ++i) {
    asm volatile("" : "+r"(packed[i / 4][i % 4]) : : "memory");
  }
}

/// This warp has read a stage.
__device__ __forceinline__ void release(uint64_t* empty) {
  if (threadIdx.x % 32 == 0) {
    arrive(empty);
  }
}

/// Adds two neighbours to a gradient or sets them.
__device__ __forceinline__ void put_pair(bf16* to, bool set, float first, float second) {
  auto* pair = reinterpret_cast<uint32_t*>(to);
  const uint32_t old = set ? 0U : *pair;
  *pair = pack(first_of(old) + first, second_of(old) + second);
}

/// A row of sums times `scale`, of which a thread has two of every eight.
template <int kTiles>
__device__ __forceinline__ void put_row(bf16* row, bool set, const float (&sums)[kTiles][4],
                                        int half, float scale) {
  bf16* to = row + threadIdx.x % 4 * 2;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    put_pair(to + 8 * n, set, sums[n][2 * half] * scale, sums[n][2 * half + 1] * scale);
  }
}

}  // namespace cambium::cuda::attention::wgmma
