// Attention forward in bf16 on tensor cores. Scores and sums are fp32, probabilities are rounded to
// bf16 for their product with the values. Two kernels over the same tiles:
//
// Many rows (training, prefill): each warp has rows of its own and goes through every tile of keys;
// values of a tile arrive while its scores are computed, keys of the next while its values are
// added.
// Few rows (decode): bound by reading keys and values, once for all heads of a group. Warps divide
// the keys of each tile, several tiles are under way, and the warps' results are added at the end
// in the order of the warps. As many blocks as the device holds share all keys evenly, so that none
// is left to run alone (batch-invariant: parts of fixed keys, dealt to them); whoever is done last
// with a row tile adds up its parts, in their order.
//
// Pages in fp8 are widened to bf16 on the way: by many rows as they come to shared memory, by few
// rows as they leave it, so that half the bytes are under way.
#include "ops/attention/attention_f8.cuh"

namespace cambium::cuda::attention {
namespace {

/// Keys and values as kernels read them: in bf16, or in fp8 with scales.
template <class E>
struct Stored {
  using Rows = View<bf16>;
};
template <>
struct Stored<f8e4m3> {
  using Rows = ScaledRows;
};

/// E: of the keys and values.
template <class E>
struct Args {
  Layout layout;
  const Tile* tiles;
  View<bf16> q;
  typename Stored<E>::Rows k, v;
  View<bf16> y;
  float* largest;
  float* inverse_sum;
  Partials partials;
  const Piece* pieces;  // of few rows
  const int32_t* first_piece;
  unsigned* done;
};

/// The running softmax of a warp's kM x 16 rows: number m 2 + half is of row 16 m + 8 half + l / 4.
template <int kDim, int kM>
struct Softmax {
  float largest[kM * 2];  // before the scale
  float sum[kM * 2];      // of this lane's columns
  float y[kM][kDim / 8][4];

  __device__ __forceinline__ void start() {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      largest[2 * m] = largest[2 * m + 1] = -INFINITY;
      sum[2 * m] = sum[2 * m + 1] = 0.0F;
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          y[m][n][e] = 0.0F;
        }
      }
    }
  }
  /// Scores become probabilities, and what was summed is taken relative to the new largest score.
  /// scale: positive, for powers of two.
  template <int kN>
  __device__ __forceinline__ void add_scores(float scale, float (&s)[kM][kN][4]) {
#pragma unroll
    for (int i = 0; i < kM * 2; ++i) {
      const int m = i / 2;
      const int e = i % 2 * 2;
      float most = largest[i];
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        most = fmaxf(most, fmaxf(s[m][n][e], s[m][n][e + 1]));
      }
      most = fmaxf(most, __shfl_xor_sync(0xffffffffU, most, 1));
      most = fmaxf(most, __shfl_xor_sync(0xffffffffU, most, 2));
      // Nothing seen yet: any finite number keeps exp2 from -inf - -inf.
      const float base = most == -INFINITY ? 0.0F : most * scale;
      const float shrink = fast_exp2(fmaf(largest[i], scale, -base));
      largest[i] = most;
      float added = 0.0F;
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        s[m][n][e] = fast_exp2(fmaf(s[m][n][e], scale, -base));
        s[m][n][e + 1] = fast_exp2(fmaf(s[m][n][e + 1], scale, -base));
        added += s[m][n][e] + s[m][n][e + 1];
      }
      sum[i] = fmaf(sum[i], shrink, added);
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        y[m][n][e] *= shrink;
        y[m][n][e + 1] *= shrink;
      }
    }
  }
  /// The sums of whole rows, in every lane of a row.
  __device__ __forceinline__ void finish() {
#pragma unroll
    for (int i = 0; i < kM * 2; ++i) {
      sum[i] += __shfl_xor_sync(0xffffffffU, sum[i], 1);
      sum[i] += __shfl_xor_sync(0xffffffffU, sum[i], 2);
    }
  }
};

template <int kM, int kN>
__device__ __forceinline__ void negate(float (&s)[kM][kN][4]) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        s[m][n][e] = -s[m][n][e];
      }
    }
  }
}

/// The scale of Softmax::add_scores; not 0, which times -inf would be NaN.
__device__ __forceinline__ float positive_scale(const Layout& layout) {
  return fmaxf(fabsf(layout.scale) * kLog2E, 1e-30F);
}

/// The row of position p, or -1 where the tile does not read it.
__device__ __forceinline__ int64_t find_key(const Layout& layout, const Block& b, int p) {
  return p >= b.tile.first_key && p < b.tile.end_key ? layout.key_row(b.segment, p) : -1;
}

template <int kDim, int kWarps, int kM, class E>
__global__ void __launch_bounds__(kWarps * 32, kDim <= 128 ? 2 : 1) many_rows(const Args<E> a) {
  constexpr int kThreads = kWarps * 32;
  constexpr int kRows = kWarps * kM * 16;
  extern __shared__ __align__(16) bf16 shared[];
  bf16* q = shared;
  bf16* keys = q + kRows * shared_row(kDim);
  bf16* values = keys + kKeys * shared_row(kDim);
  auto* key_rows = reinterpret_cast<int64_t*>(values + kKeys * shared_row(kDim));  // (2, kKeys)
  __shared__ int positions[kRows];
  const Block b = find_block(a.layout, a.tiles);
  const Tile& tile = b.tile;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32;
  const int warp_row = thread / 32 * kM * 16;
  const int begin = tile.first_key / kKeys * kKeys;

  static_assert(kRows <= kThreads);
  find_positions(a.layout, b, kRows, positions);
  copy_queries<kDim, kThreads>(a.layout, b, tile.first_row, b.rows, kRows, a.q.data, a.q.rows,
                               a.layout.head_dim, q);
  if (thread < kKeys) {
    key_rows[thread] = find_key(a.layout, b, begin + thread);
  }
  __syncthreads();
  copy_keys<kDim, kThreads>(a.k, a.layout.head_dim, b.kv_head, key_rows, kKeys, keys);
  commit_copies();
  // Between these positions every row of the tile sees every key.
  const int sure_end = min(b.first_position + tile.first_row / a.layout.group + 1, tile.end_key);
  const int last_row = min(tile.first_row + kRows, b.rows) - 1;
  const int sure_first =
      max(a.layout.reach(b.first_position + last_row / a.layout.group), tile.first_key);
  const float scale = positive_scale(a.layout);
  Softmax<kDim, kM> state;
  state.start();
  int half = 0;
  for (int first = begin; first < tile.end_key; first += kKeys) {
    const int64_t* rows = key_rows + half * kKeys;
    int64_t* next_rows = key_rows + (half ^ 1) * kKeys;
    half ^= 1;
    wait_for_copies<0>();
    __syncthreads();  // the keys are here, the values before have been read
    copy_keys<kDim, kThreads>(a.v, a.layout.value_dim, b.kv_head, rows, kKeys, values);
    commit_copies();
    if (thread < kKeys) {
      next_rows[thread] = find_key(a.layout, b, first + kKeys + thread);
    }
    float s[kM][kKeys / 8][4] = {};
    scores_of<kDim>(q + warp_row * shared_row(kDim), keys, s);
    wait_for_copies<0>();
    __syncthreads();  // the values are here, the keys have been read
    if (first + kKeys < tile.end_key) {
      copy_keys<kDim, kThreads>(a.k, a.layout.head_dim, b.kv_head, next_rows, kKeys, keys);
      commit_copies();
    }
    if (a.layout.scale < 0.0F) {
      negate(s);
    }
    if (first < sure_first || first + kKeys > sure_end) {
      mask(a.layout, tile, positions + warp_row, first, s);
    }
    state.add_scores(scale, s);
    add_values<kDim>(s, values, state.y);
  }
  state.finish();
#pragma unroll
  for (int i = 0; i < kM * 2; ++i) {
    const int r = warp_row + i * 8 + lane / 4;
    const int row = tile.first_row + r;
    if (row >= b.rows) {
      continue;
    }
    const int m = i / 2;
    const int e = i % 2 * 2;
    const float largest = state.largest[i] == -INFINITY ? -INFINITY : state.largest[i] * scale;
    const int value_dim = a.layout.value_dim;
    if (tile.partial >= 0) {
      const int64_t at = (int64_t{tile.partial} * a.layout.kv_heads + b.kv_head) * kRows + r;
      float* out = a.partials.y + at * value_dim + lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        if (n * 8 < value_dim) {
          *reinterpret_cast<float2*>(out + n * 8) =
              make_float2(state.y[m][n][e], state.y[m][n][e + 1]);
        }
      }
      if (lane % 4 == 0) {
        a.partials.largest[at] = largest;
        a.partials.sum[at] = state.sum[i];
      }
      continue;
    }
    const int64_t token = b.start + row / a.layout.group;
    const int head = b.kv_head * a.layout.group + row % a.layout.group;
    const float inverse = 1.0F / state.sum[i];
    bf16* out = a.y.row(token, head) + lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
      if (n * 8 < value_dim) {
        *reinterpret_cast<uint32_t*>(out + n * 8) =
            pack(state.y[m][n][e] * inverse, state.y[m][n][e + 1] * inverse);
      }
    }
    if (a.largest != nullptr && lane % 4 == 0) {
      a.largest[token * a.layout.heads + head] = largest;
      a.inverse_sum[token * a.layout.heads + head] = inverse;
    }
  }
}

constexpr int kFewRows = 16;

/// The rows of a tile from its partial results, added in the order of the parts.
template <int kThreads, class E>
__device__ void add_parts(const Args<E>& a, const Piece& piece, int kv_head, int start, int rows) {
  const int value_dim = a.layout.value_dim;
  const int64_t step = int64_t{a.layout.kv_heads} * kFewRows;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int r = warp; r < kFewRows; r += kThreads / 32) {
    const int row = piece.tile.first_row + r;
    if (row >= rows) {
      break;
    }
    const int64_t first =
        (int64_t{piece.first_partial} * a.layout.kv_heads + kv_head) * kFewRows + r;
    float largest = -INFINITY;
    for (int i = lane; i < piece.count; i += 32) {
      largest = fmaxf(largest, __ldcg(a.partials.largest + first + i * step));
    }
    largest = warp_max(largest);
    bf16* out =
        a.y.row(start + row / a.layout.group, kv_head * a.layout.group + row % a.layout.group);
    for (int first_dim = 0; first_dim < value_dim; first_dim += 128) {
      // Lane i has the factor of part i of 32, and four numbers of the row.
      const int d = first_dim + 4 * lane;
      float sum = 0.0F;
      float4 total = make_float4(0.0F, 0.0F, 0.0F, 0.0F);
      for (int base = 0; base < piece.count; base += 32) {
        const int count = min(32, piece.count - base);
        float factor = 0.0F;
        if (lane < count) {
          const int64_t at = first + (base + lane) * step;
          factor = fast_exp2(__ldcg(a.partials.largest + at) - largest);
          sum = fmaf(__ldcg(a.partials.sum + at), factor, sum);
        }
#pragma unroll 8
        for (int i = 0; i < count; ++i) {
          const float f = __shfl_sync(0xffffffffU, factor, i);
          if (d < value_dim) {
            const float4 y = __ldcg(reinterpret_cast<const float4*>(
                a.partials.y + (first + (base + i) * step) * value_dim + d));
            total.x = fmaf(y.x, f, total.x);
            total.y = fmaf(y.y, f, total.y);
            total.z = fmaf(y.z, f, total.z);
            total.w = fmaf(y.w, f, total.w);
          }
        }
      }
      const float inverse = 1.0F / warp_sum(sum);
      if (d < value_dim) {
        *reinterpret_cast<uint2*>(out + d) = make_uint2(pack(total.x * inverse, total.y * inverse),
                                                        pack(total.z * inverse, total.w * inverse));
      }
    }
  }
}

/// Numbers from row to row of keys and values in shared memory.
template <class E>
constexpr int stored_row(int dim) {
  return sizeof(E) == 1 ? shared_row_f8(dim) : shared_row(dim);
}

template <int kDim, int kThreads>
__device__ __forceinline__ void copy_stored(const View<bf16>& from, int dim, int kv_head,
                                            const int64_t* key_rows, int keys, bf16* to) {
  copy_keys<kDim, kThreads>(from, dim, kv_head, key_rows, keys, to);
}
template <int kDim, int kThreads>
__device__ __forceinline__ void copy_stored(const ScaledRows& from, int dim, int kv_head,
                                            const int64_t* key_rows, int keys, f8e4m3* to) {
  copy_codes<kDim, kThreads>(from.rows, dim, kv_head, key_rows, keys, to);
}

/// The products of 16 queries with the 16 keys of a warp in a tile. For those of fp8 the queries
/// are kept in registers, and each lane reads the scale of one key or value of the tiles to come.
template <int kDim, class E>
struct Products;

template <int kDim>
struct Products<kDim, bf16> {
  const bf16* q;

  __device__ __forceinline__ void start(const Args<bf16>& /*a*/, int /*kv_head*/,
                                        const bf16* queries, const int64_t* /*rows*/,
                                        const int64_t* /*next_rows*/) {
    q = queries;
  }
  __device__ __forceinline__ void begin_tile(const Args<bf16>& /*a*/, int /*kv_head*/,
                                             const int64_t* /*rows_after_next*/) {}
  __device__ __forceinline__ void scores(const bf16* keys, float (&s)[1][2][4]) const {
    scores_of<kDim>(q, keys, s);
  }
  __device__ __forceinline__ void add(const float (&p)[1][2][4], const bf16* values,
                                      float (&y)[1][kDim / 8][4]) const {
    add_values<kDim>(p, values, y);
  }
};

template <int kDim>
struct Products<kDim, f8e4m3> {
  Queries<kDim> q;
  bf16 next, after_next;  // scales
  Factors factors;        // of the tile in hand

  /// rows, next_rows: of the warp's keys in the first two tiles.
  __device__ __forceinline__ void start(const Args<f8e4m3>& a, int kv_head, const bf16* queries,
                                        const int64_t* rows, const int64_t* next_rows) {
    q.load(queries);
    next = scale(a, kv_head, rows);
    after_next = scale(a, kv_head, next_rows);
  }
  __device__ __forceinline__ void begin_tile(const Args<f8e4m3>& a, int kv_head,
                                             const int64_t* rows_after_next) {
    factors.set(factor_of(next));
    next = after_next;
    after_next = scale(a, kv_head, rows_after_next);
  }
  /// Of key l of the rows in lane l < 16, of value l in lane 16 + l; of one that is not there, any.
  __device__ __forceinline__ static bf16 scale(const Args<f8e4m3>& a, int kv_head,
                                               const int64_t* rows) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int64_t row = rows[lane % 16];
    return row < 0 ? bf16{0} : *(lane < 16 ? a.k : a.v).scale(row, kv_head);
  }
  __device__ __forceinline__ void scores(const f8e4m3* keys, float (&s)[1][2][4]) const {
    scores_of<kDim>(q, keys, factors, s);
  }
  __device__ __forceinline__ void add(const float (&p)[1][2][4], const f8e4m3* values,
                                      float (&y)[1][kDim / 8][4]) const {
    add_values<kDim>(p, values, factors, y);
  }
};

/// Columns of the sums of one row to where they belong: numbers 2 e and 2 e + 1 of y[0][n].
template <int kDim>
__device__ __forceinline__ void store_sums(const float (&y)[1][kDim / 8][4], int half, float* to,
                                           bf16 /*type*/) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int n = 0; n < kDim / 8; ++n) {
    *reinterpret_cast<float2*>(to + n * 8 + lane % 4 * 2) =
        make_float2(y[0][n][half * 2], y[0][n][half * 2 + 1]);
  }
}
template <int kDim>
__device__ __forceinline__ void store_sums(const float (&y)[1][kDim / 8][4], int half, float* to,
                                           f8e4m3 /*type*/) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int k = 0; k < kDim / 32; ++k) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int i = half * 2 + e;
      *reinterpret_cast<float4*>(to + 32 * k + 4 * (lane % 4 * 2 + e)) =
          make_float4(y[0][4 * k][i], y[0][4 * k + 1][i], y[0][4 * k + 2][i], y[0][4 * k + 3][i]);
    }
  }
}

/// Shared memory: q (16, row), kStages times keys and values (kWarps 16, row) each, the rows of as
/// many tiles of keys. At the end the warps' sums (kWarps, 16, kDim + 4) lie over keys and values.
template <int kDim, int kWarps, int kStages, class E>
__device__ void few_rows_piece(const Args<E>& a, const Piece& piece, int kv_head, bf16* shared) {
  constexpr int kThreads = kWarps * 32;
  constexpr int kTileKeys = kWarps * 16;
  constexpr int kTileSize = kTileKeys * stored_row<E>(kDim);
  constexpr int kSumRow = kDim + 4;
  bf16* q = shared;
  auto* tiles = reinterpret_cast<E*>(q + kFewRows * shared_row(kDim));
  auto* key_rows = reinterpret_cast<int64_t*>(tiles + kStages * 2 * kTileSize);
  __shared__ int positions[kFewRows];
  __shared__ float warp_largest[kWarps][kFewRows];
  __shared__ float warp_sum[kWarps][kFewRows];
  __shared__ bool last;
  static_assert(kWarps * kFewRows * kSumRow * sizeof(float) <= kStages * 2 * kTileSize * sizeof(E));
  static_assert(kStages >= 3);  // tiles whose rows are known when one begins
  const Block b = block_of(a.layout, piece.tile, kv_head);
  const Tile& tile = b.tile;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32;
  const int warp = thread / 32;
  const int begin = tile.first_key / kTileKeys * kTileKeys;
  const int count = (tile.end_key - begin + kTileKeys - 1) / kTileKeys;
  const auto copy_tile = [&](int i) {
    if (i < count) {
      E* to = tiles + i % kStages * 2 * kTileSize;
      const int64_t* rows = key_rows + i % kStages * kTileKeys;
      copy_stored<kDim, kThreads>(a.k, a.layout.head_dim, b.kv_head, rows, kTileKeys, to);
      copy_stored<kDim, kThreads>(a.v, a.layout.value_dim, b.kv_head, rows, kTileKeys,
                                  to + kTileSize);
    }
    commit_copies();
  };
  find_positions(a.layout, b, kFewRows, positions);
  for (int i = thread; i < kStages * kTileKeys; i += kThreads) {
    key_rows[i] = find_key(a.layout, b, begin + i);
  }
  __syncthreads();
  copy_queries<kDim, kThreads>(a.layout, b, tile.first_row, b.rows, kFewRows, a.q.data, a.q.rows,
                               a.layout.head_dim, q);
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) {
    copy_tile(i);
  }
  const int sure_end = min(b.first_position + tile.first_row / a.layout.group + 1, tile.end_key);
  const int last_row = min(tile.first_row + kFewRows, b.rows) - 1;
  const int sure_first =
      max(a.layout.reach(b.first_position + last_row / a.layout.group), tile.first_key);
  const float scale = positive_scale(a.layout);
  Softmax<kDim, 1> state;
  state.start();
  if constexpr (sizeof(E) == 1) {
    wait_for_copies<kStages - 2>();
    __syncthreads();  // the queries are here
  }
  Products<kDim, E> products;
  products.start(a, kv_head, q, key_rows + warp * 16, key_rows + kTileKeys + warp * 16);
  for (int i = 0; i < count; ++i) {
    wait_for_copies<kStages - 2>();
    __syncthreads();  // tile i is here, tile i - 1 has been read
    copy_tile(i + kStages - 1);
    products.begin_tile(a, kv_head, key_rows + (i + 2) % kStages * kTileKeys + warp * 16);
    const int first = begin + i * kTileKeys;
    // Looked up here and put in its place after the products, when it has arrived.
    const int64_t next_row = find_key(a.layout, b, first + kStages * kTileKeys + thread);
    const E* keys = tiles + i % kStages * 2 * kTileSize + warp * 16 * stored_row<E>(kDim);
    float s[1][2][4] = {};
    products.scores(keys, s);
    if (a.layout.scale < 0.0F) {
      negate(s);
    }
    if (first < sure_first || first + kTileKeys > sure_end) {
      mask(a.layout, tile, positions, first + warp * 16, s);
    }
    state.add_scores(scale, s);
    products.add(s, keys + kTileSize, state.y);
    if (thread < kTileKeys) {
      key_rows[i % kStages * kTileKeys + thread] = next_row;
    }
  }
  state.finish();
  wait_for_copies<0>();
  __syncthreads();  // keys and values are no longer read
  auto* sums = reinterpret_cast<float*>(tiles);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int r = i * 8 + lane / 4;
    store_sums<kDim>(state.y, i, sums + (warp * kFewRows + r) * kSumRow, E{});
    if (lane % 4 == 0) {
      warp_largest[warp][r] = state.largest[i] == -INFINITY ? -INFINITY : state.largest[i] * scale;
      warp_sum[warp][r] = state.sum[i];
    }
  }
  __syncthreads();
  const int value_dim = a.layout.value_dim;
  for (int r = warp; r < kFewRows; r += kWarps) {
    const int row = tile.first_row + r;
    if (row >= b.rows) {
      break;
    }
    float largest = -INFINITY;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      largest = fmaxf(largest, warp_largest[w][r]);
    }
    const float base = largest == -INFINITY ? 0.0F : largest;
    float factor[kWarps];
    float sum = 0.0F;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      factor[w] = fast_exp2(warp_largest[w][r] - base);
      sum = fmaf(warp_sum[w][r], factor[w], sum);
    }
    const int64_t at = (int64_t{tile.partial} * a.layout.kv_heads + b.kv_head) * kFewRows + r;
    bf16* out =
        a.y.row(b.start + row / a.layout.group, b.kv_head * a.layout.group + row % a.layout.group);
    for (int d = lane; d < value_dim; d += 32) {
      float total = 0.0F;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        total = fmaf(sums[(w * kFewRows + r) * kSumRow + d], factor[w], total);
      }
      if (tile.partial >= 0) {
        a.partials.y[at * value_dim + d] = total;
      } else {
        store(out + d, total / sum);
      }
    }
    if (tile.partial >= 0 && lane == 0) {
      a.partials.largest[at] = largest;
      a.partials.sum[at] = sum;
    }
  }
  if (piece.parts < 0) {
    return;
  }
  __threadfence();
  __syncthreads();
  if (thread == 0) {
    // Counts the parts that are done and starts from zero again after the last.
    const auto parts = static_cast<unsigned>(piece.count);
    last = atomicInc(a.done + int64_t{piece.parts} * a.layout.kv_heads + kv_head, parts - 1) ==
           parts - 1;
  }
  __syncthreads();
  if (last) {
    __threadfence();
    add_parts<kThreads>(a, piece, kv_head, b.start, b.rows);
  }
}

/// Block b of each key-value head takes the pieces of block b.
template <int kDim, int kWarps, int kStages, class E>
__global__ void __launch_bounds__(kWarps * 32) few_rows(const Args<E> a) {
  extern __shared__ __align__(16) bf16 shared[];
  const int kv_head = static_cast<int>(blockIdx.x % a.layout.kv_heads);
  const int block = static_cast<int>(blockIdx.x / a.layout.kv_heads);
  await_inputs();
  const int end = a.first_piece[block + 1];
  for (int i = a.first_piece[block]; i < end; ++i) {
    __syncthreads();  // shared memory is done with the piece before
    few_rows_piece<kDim, kWarps, kStages>(a, a.pieces[i], kv_head, shared);
  }
}

constexpr int kManyRows = 128;

template <int kDim, class E>
void launch_forward(const Attention<bf16>& a, const typename Stored<E>::Rows& k,
                    const typename Stored<E>::Rows& v, int64_t gathered, const Launch& on) {
  constexpr int kManyWarps = kDim <= 128 ? 4 : 8;
  constexpr int kFewWarps = kDim <= 128 ? 4 : 2;
  constexpr int kStages = kDim <= 64 ? 4 : 3;
  constexpr int kFewKeys = kFewWarps * 16;
  constexpr size_t kManyShared =
      (kManyRows + 2 * kKeys) * shared_row(kDim) * sizeof(bf16) + 2 * kKeys * sizeof(int64_t);
  constexpr size_t kFewShared = kFewRows * shared_row(kDim) * sizeof(bf16) +
                                kStages * 2 * kFewKeys * stored_row<E>(kDim) * sizeof(E) +
                                kStages * kFewKeys * sizeof(int64_t);
  const DeviceLayout device = layout_of(a.shape, on);
  const auto few_kernel = few_rows<kDim, kFewWarps, kStages, E>;
  static const auto resident =
      static_cast<int64_t>(resident_blocks(few_kernel, kFewWarps * 32, kFewShared));
  const TileLists lists =
      forward_tiles(a.shape,
                    {kManyRows, kFewRows, a.largest != nullptr,
                     static_cast<int>(std::max<int64_t>(resident / a.shape.kv_heads, 1)), gathered,
                     on.batch_invariant},
                    on);
  const Partials many = make_partials(lists.many_partials, kManyRows, a.shape, on);
  const Partials few = make_partials(lists.few_partials, kFewRows, a.shape, on);
  Args<E> args = {device.layout,
                  lists.many.items,
                  a.q,
                  k,
                  v,
                  a.y,
                  a.largest,
                  a.inverse_sum,
                  many,
                  lists.pieces.items,
                  lists.first_piece.items,
                  lists.done};
  const auto blocks = [&](const List<Tile>& list) {
    return dim3(static_cast<unsigned>(list.count * a.shape.kv_heads));
  };
  launch(on, "attention", many_rows<kDim, kManyWarps, kManyRows / 16 / kManyWarps, E>,
         blocks(lists.many), dim3(kManyWarps * 32), kManyShared, args);
  args.partials = few;
  launch_ahead(on, "attention", few_kernel,
               dim3(static_cast<unsigned>((lists.first_piece.count - 1) * a.shape.kv_heads)),
               dim3(kFewWarps * 32), kFewShared, args);
  combine(a, device.layout, lists.many_parts, kManyRows, lists.many_parts_rows, many, on);
}

template <class E>
void forward_by_dim(const Attention<bf16>& a, const typename Stored<E>::Rows& k,
                    const typename Stored<E>::Rows& v, int64_t gathered, const Launch& on) {
  const int64_t widest = std::max(a.shape.head_dim, a.shape.value_dim);
  if (widest <= 64) {
    launch_forward<64, E>(a, k, v, gathered, on);
  } else if (widest <= 96) {
    launch_forward<96, E>(a, k, v, gathered, on);
  } else if (widest <= 128) {
    launch_forward<128, E>(a, k, v, gathered, on);
  } else {
    launch_forward<256, E>(a, k, v, gathered, on);
  }
}

}  // namespace

bool forward_on_tensor_cores(const Attention<bf16>& a, int64_t gathered, const Launch& on) {
  if (!aligned(a.q, 16) || !aligned(a.k, 16) || !aligned(a.v, 16)) {
    return false;
  }
  if (!a.scaled_k.defined()) {
    forward_by_dim<bf16>(a, a.k, a.v, gathered, on);
    return true;
  }
  if (!aligned(a.scaled_k.rows, 16) || !aligned(a.scaled_v.rows, 16)) {
    return false;
  }
  forward_by_dim<f8e4m3>(a, a.scaled_k, a.scaled_v, gathered, on);
  return true;
}

}  // namespace cambium::cuda::attention
