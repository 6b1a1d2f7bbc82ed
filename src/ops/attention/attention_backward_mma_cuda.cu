// Backward of attention in bf16 on tensor cores; attention_backward_cuda.cu has the formulas. Sums
// are fp32, P and dS are rounded to bf16 for their products. As there, one kernel has tiles of rows
// and walks the keys, another has tiles of keys and walks the rows; each warp has rows (keys) of
// its own, and the next tile arrives while one is computed.
#include "ops/attention/attention_mma.cuh"

namespace cambium::cuda::attention {
namespace {

struct Args {
  Layout layout;
  const Tile* tiles;
  View<bf16> q, k, v, y;
  const float* largest;
  const float* inverse_sum;
  const float* delta;
};

/// What P = exp2(score - log_sum) and dS = P (dP - delta) take of a row. P is 0 where it does not
/// exist.
struct RowNumbers {
  float log_sum;
  float delta;
  int position;
};
__device__ __forceinline__ RowNumbers row_numbers(const Args& a, const Block& b, int row,
                                                  int end_row) {
  const int position = row / a.layout.group;
  if (row >= end_row) {
    return {INFINITY, 0.0F, position};
  }
  const int64_t at = int64_t{b.start + position} * a.layout.heads + b.kv_head * a.layout.group +
                     row % a.layout.group;
  return {a.largest[at] - log2f(a.inverse_sum[at]), a.delta[at], position};
}

template <int kDim, int kThreads>
__device__ __forceinline__ void copy_segment_keys(const View<bf16>& from, const Block& b, int first,
                                                  int keys, int dim, bf16* to) {
  copy_rows<kDim, kThreads>(to, keys, from.data, dim, [&](int r) -> int64_t {
    return first + r < b.tile.end_key ? from.rows.offset(int64_t{b.start} + first + r, b.kv_head)
                                      : -1;
  });
}

/// Adds to two neighbours of a gradient.
__device__ __forceinline__ void add_pair(bf16* to, float first, float second) {
  const uint32_t pair = *reinterpret_cast<const uint32_t*>(to);
  *reinterpret_cast<uint32_t*>(to) =
      pack(__uint_as_float(pair << 16) + first, __uint_as_float(pair & 0xffff0000U) + second);
}

/// Shared memory: q and dy (kRows, row), twice keys and values (kTileKeys, row).
template <int kDim, int kWarps, int kM, int kTileKeys>
__global__ void __launch_bounds__(kWarps * 32) query_grads(const Args a) {
  constexpr int kThreads = kWarps * 32;
  constexpr int kRows = kWarps * kM * 16;
  constexpr int kTileSize = kTileKeys * shared_row(kDim);
  extern __shared__ __align__(16) bf16 shared[];
  bf16* q = shared;
  bf16* dy = q + kRows * shared_row(kDim);
  bf16* stages = dy + kRows * shared_row(kDim);
  __shared__ int positions[kRows];
  const Block b = find_block(a.layout, a.tiles);
  const Tile& tile = b.tile;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp_row = static_cast<int>(threadIdx.x) / 32 * kM * 16;
  const int begin = tile.first_tile<kTileKeys>();
  const auto copy_tile = [&](int first, bf16* to) {
    copy_segment_keys<kDim, kThreads>(a.k, b, first, kTileKeys, a.layout.head_dim, to);
    copy_segment_keys<kDim, kThreads>(a.v, b, first, kTileKeys, a.layout.value_dim, to + kTileSize);
    commit_copies();
  };
  static_assert(kRows <= kThreads);
  find_positions(a.layout, b, kRows, positions);
  copy_queries<kDim, kThreads>(a.layout, b, tile.first_row, b.rows, kRows, a.q.data, a.q.rows,
                               a.layout.head_dim, q);
  copy_queries<kDim, kThreads>(a.layout, b, tile.first_row, b.rows, kRows, a.y.grad, a.y.rows,
                               a.layout.value_dim, dy);
  copy_tile(begin, stages);
  RowNumbers numbers[kM * 2];
#pragma unroll
  for (int i = 0; i < kM * 2; ++i) {
    numbers[i] = row_numbers(a, b, tile.first_row + warp_row + i * 8 + lane / 4, b.rows);
  }
  // Between these positions every row of the tile sees every key.
  const int sure_end = min(tile.first_row / a.layout.group + 1, tile.end_key);
  const int sure_first = a.layout.reach((min(tile.first_row + kRows, b.rows) - 1) / a.layout.group);
  const float scale = a.layout.scale * kLog2E;
  float dq[kM][kDim / 8][4] = {};
  int stage = 0;
  int next = 0;
  for (int first = begin; first < tile.end_key; first = next, stage ^= 1) {
    next = tile.next_tile<kTileKeys>(first);
    wait_for_copies<0>();
    __syncthreads();  // this tile is here, the one before has been read
    if (next < tile.end_key) {
      copy_tile(next, stages + (stage ^ 1) * 2 * kTileSize);
    }
    const bf16* keys = stages + stage * 2 * kTileSize;
    float s[kM][kTileKeys / 8][4] = {};
    float dp[kM][kTileKeys / 8][4] = {};
    scores_of<kDim>(q + warp_row * shared_row(kDim), keys, s);
    scores_of<kDim>(dy + warp_row * shared_row(kDim), keys + kTileSize, dp);
#pragma unroll
    for (int i = 0; i < kM * 2; ++i) {
#pragma unroll
      for (int n = 0; n < kTileKeys / 8; ++n) {
#pragma unroll
        for (int e = i % 2 * 2; e < i % 2 * 2 + 2; ++e) {
          s[i / 2][n][e] = fmaf(s[i / 2][n][e], scale, -numbers[i].log_sum);
        }
      }
    }
    if (first < sure_first || first + kTileKeys > sure_end) {
      mask(a.layout, tile, positions + warp_row, first, s);
    }
#pragma unroll
    for (int i = 0; i < kM * 2; ++i) {
#pragma unroll
      for (int n = 0; n < kTileKeys / 8; ++n) {
#pragma unroll
        for (int e = i % 2 * 2; e < i % 2 * 2 + 2; ++e) {
          s[i / 2][n][e] = fast_exp2(s[i / 2][n][e]) * (dp[i / 2][n][e] - numbers[i].delta);
        }
      }
    }
    add_values<kDim>(s, keys, dq);
  }
#pragma unroll
  for (int i = 0; i < kM * 2; ++i) {
    const int row = tile.first_row + warp_row + i * 8 + lane / 4;
    if (row >= b.rows) {
      continue;
    }
    bf16* to = a.q.grad_row(b.start + row / a.layout.group,
                            b.kv_head * a.layout.group + row % a.layout.group) +
               lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
      if (n * 8 < a.layout.head_dim) {
        add_pair(to + n * 8, dq[i / 2][n][i % 2 * 2] * a.layout.scale,
                 dq[i / 2][n][i % 2 * 2 + 1] * a.layout.scale);
      }
    }
  }
}

/// Scores are of (key, row) here. Shared memory: keys and values (kWarps 16, row), twice q and dy
/// (kTileRows, row), twice the numbers of the rows. One of dk and dv at a time where both would not
/// fit in registers.
template <int kDim, int kWarps, int kTileRows, bool kWantKeys, bool kWantValues>
__global__ void __launch_bounds__(kWarps * 32) key_grads(const Args a) {
  constexpr int kThreads = kWarps * 32;
  constexpr int kTileKeys = kWarps * 16;
  constexpr int kTileSize = kTileRows * shared_row(kDim);
  extern __shared__ __align__(16) bf16 shared[];
  bf16* keys = shared;
  bf16* values = keys + kTileKeys * shared_row(kDim);
  bf16* stages = values + kTileKeys * shared_row(kDim);
  auto* all_numbers = reinterpret_cast<RowNumbers*>(stages + 4 * kTileSize);
  const Block b = find_block(a.layout, a.tiles);
  const Tile& tile = b.tile;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32;
  const int warp_key = thread / 32 * 16;
  const int length = b.rows / a.layout.group;
  const int end_row = a.layout.end_token(tile, length) * a.layout.group;
  const auto copy_tile = [&](int first, int stage) {
    bf16* to = stages + stage * 2 * kTileSize;
    copy_queries<kDim, kThreads>(a.layout, b, first, end_row, kTileRows, a.q.data, a.q.rows,
                                 a.layout.head_dim, to);
    copy_queries<kDim, kThreads>(a.layout, b, first, end_row, kTileRows, a.y.grad, a.y.rows,
                                 a.layout.value_dim, to + kTileSize);
    commit_copies();
    if (thread < kTileRows) {
      all_numbers[stage * kTileRows + thread] = row_numbers(a, b, first + thread, end_row);
    }
  };
  copy_segment_keys<kDim, kThreads>(a.k, b, tile.first_key, kTileKeys, a.layout.head_dim, keys);
  if constexpr (kWantKeys) {
    copy_segment_keys<kDim, kThreads>(a.v, b, tile.first_key, kTileKeys, a.layout.value_dim,
                                      values);
  }
  copy_tile(tile.first_row, 0);
  const float scale = a.layout.scale * kLog2E;
  float dk[1][kWantKeys ? kDim / 8 : 1][4] = {};
  float dv[1][kWantValues ? kDim / 8 : 1][4] = {};
  int stage = 0;
  for (int first = tile.first_row; first < end_row; first += kTileRows, stage ^= 1) {
    wait_for_copies<0>();
    __syncthreads();  // this tile is here, the one before has been read
    if (first + kTileRows < end_row) {
      copy_tile(first + kTileRows, stage ^ 1);
    }
    const bf16* q = stages + stage * 2 * kTileSize;
    const bf16* dy = q + kTileSize;
    const RowNumbers* numbers = all_numbers + stage * kTileRows;
    float s[1][kTileRows / 8][4] = {};
    scores_of<kDim>(keys + warp_key * shared_row(kDim), q, s);
    const int last_row = min(first + kTileRows, end_row) - 1;
    const bool all_seen = tile.end_key - 1 <= first / a.layout.group &&
                          tile.first_key >= a.layout.reach(last_row / a.layout.group);
#pragma unroll
    for (int n = 0; n < kTileRows / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int r = n * 8 + lane % 4 * 2 + e;
        const float log_sum = numbers[r].log_sum;
        const int position = numbers[r].position;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int p = tile.first_key + warp_key + i * 8 + lane / 4;
          const bool seen = all_seen || a.layout.sees(position, p);
          float& x = s[0][n][i * 2 + e];
          x = seen ? fast_exp2(fmaf(x, scale, -log_sum)) : 0.0F;
        }
      }
    }
    if constexpr (kWantValues) {
      add_values<kDim>(s, dy, dv);
    }
    if constexpr (kWantKeys) {
      float dp[1][kTileRows / 8][4] = {};
      scores_of<kDim>(values + warp_key * shared_row(kDim), dy, dp);
#pragma unroll
      for (int n = 0; n < kTileRows / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          dp[0][n][e] = s[0][n][e] * (dp[0][n][e] - numbers[n * 8 + lane % 4 * 2 + e % 2].delta);
        }
      }
      add_values<kDim>(dp, q, dk);
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int p = tile.first_key + warp_key + i * 8 + lane / 4;
    if (p >= tile.end_key) {
      continue;
    }
    // k and v may be the same memory: one thread adds both, one after the other.
    const int64_t token = int64_t{b.start} + p;
    if (kWantKeys && a.k.grad != nullptr) {
      bf16* to = a.k.grad_row(token, b.kv_head) + lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < (kWantKeys ? kDim / 8 : 1); ++n) {
        if (n * 8 < a.layout.head_dim) {
          add_pair(to + n * 8, dk[0][n][i * 2] * a.layout.scale,
                   dk[0][n][i * 2 + 1] * a.layout.scale);
        }
      }
    }
    if (kWantValues && a.v.grad != nullptr) {
      bf16* to = a.v.grad_row(token, b.kv_head) + lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < (kWantValues ? kDim / 8 : 1); ++n) {
        if (n * 8 < a.layout.value_dim) {
          add_pair(to + n * 8, dv[0][n][i * 2], dv[0][n][i * 2 + 1]);
        }
      }
    }
  }
}

/// False where the device's blocks have too little shared memory.
template <int kDim>
bool launch_backward(const Attention<bf16>& a, const float* delta, const Launch& on) {
  constexpr bool kTogether = kDim <= 128;  // dk and dv in one kernel
  constexpr int kRowWarps = 4;
  constexpr int kRowTiles = kTogether ? 2 : 1;
  constexpr int kRows = kRowWarps * kRowTiles * 16;
  constexpr int kTileKeys = 32;
  constexpr int kKeyWarps = kTogether ? 8 : 4;
  constexpr int kOwnKeys = kKeyWarps * 16;
  constexpr int kTileRows = kDim <= 64 ? 64 : 32;
  constexpr size_t kRowShared = (2 * kRows + 4 * kTileKeys) * shared_row(kDim) * sizeof(bf16);
  constexpr size_t kKeyShared = (2 * kOwnKeys + 4 * kTileRows) * shared_row(kDim) * sizeof(bf16) +
                                2 * kTileRows * sizeof(RowNumbers);
  if (std::max(kRowShared, kKeyShared) > most_shared()) {
    return false;
  }
  const DeviceLayout device = layout_of(a.shape, on);
  const BackwardTiles tiles = backward_tiles(a.shape, kRows, kOwnKeys, on);
  Args args = {device.layout, nullptr, a.q, a.k, a.v, a.y, a.largest, a.inverse_sum, delta};
  const auto blocks = [&](const List<Tile>& list) {
    return dim3(static_cast<unsigned>(list.count * a.shape.kv_heads));
  };
  if (a.q.grad != nullptr) {
    args.tiles = tiles.rows.items;
    launch(on, "attention backward", query_grads<kDim, kRowWarps, kRowTiles, kTileKeys>,
           blocks(tiles.rows), dim3(kRowWarps * 32), kRowShared, args);
  }
  args.tiles = tiles.keys.items;
  const auto run_keys = [&](auto* kernel) {
    launch(on, "attention backward", kernel, blocks(tiles.keys), dim3(kKeyWarps * 32), kKeyShared,
           args);
  };
  if constexpr (kTogether) {
    if (a.k.grad != nullptr || a.v.grad != nullptr) {
      run_keys(key_grads<kDim, kKeyWarps, kTileRows, true, true>);
    }
  } else {
    if (a.k.grad != nullptr) {
      run_keys(key_grads<kDim, kKeyWarps, kTileRows, true, false>);
    }
    if (a.v.grad != nullptr) {
      run_keys(key_grads<kDim, kKeyWarps, kTileRows, false, true>);
    }
  }
  return true;
}

}  // namespace

bool backward_on_tensor_cores(const Attention<bf16>& a, const float* delta, const Launch& on) {
  if (a.shape.softcap > 0.0F || !aligned(a.q, 16) || !aligned(a.k, 16) || !aligned(a.v, 16) ||
      !aligned(a.y, 16)) {
    return false;
  }
  const int64_t widest = std::max(a.shape.head_dim, a.shape.value_dim);
  return widest <= 64    ? launch_backward<64>(a, delta, on)
         : widest <= 96  ? launch_backward<96>(a, delta, on)
         : widest <= 128 ? launch_backward<128>(a, delta, on)
                         : launch_backward<256>(a, delta, on);
}

}  // namespace cambium::cuda::attention
