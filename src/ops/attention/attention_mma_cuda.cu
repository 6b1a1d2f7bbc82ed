// Attention forward in bf16 on tensor cores. Scores and sums are fp32, probabilities are rounded to
// bf16 for their product with the values. Segments of few rows (decode) have a kernel of their own
// (attention_few_cuda.cu). In that of many rows (training, prefill) each warp has rows of its own
// and goes through every tile of keys; values of a tile arrive while its scores are computed, keys
// of the next while its values are added. Pages in fp8 are widened to bf16 as they come to shared
// memory.
#include "ops/attention/attention_f8.cuh"
#include "ops/attention/attention_few.cuh"
#include "ops/attention/attention_softmax.cuh"

namespace cambium::cuda::attention {
namespace {

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

/// The row of position p, or -1 where the tile does not read it.
__device__ __forceinline__ int64_t find_key(const Layout& layout, const Block& b, int p) {
  return b.tile.has(p) ? layout.key_row(b.segment, p) : -1;
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
  const int begin = tile.first_tile<kKeys>();

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
  int next = 0;
  for (int first = begin; first < tile.end_key; first = next) {
    next = tile.next_tile<kKeys>(first);
    const int64_t* rows = key_rows + half * kKeys;
    int64_t* next_rows = key_rows + (half ^ 1) * kKeys;
    half ^= 1;
    wait_for_copies<0>();
    __syncthreads();  // the keys are here, the values before have been read
    copy_keys<kDim, kThreads>(a.v, a.layout.value_dim, b.kv_head, rows, kKeys, values);
    commit_copies();
    if (thread < kKeys) {
      next_rows[thread] = find_key(a.layout, b, next + thread);
    }
    float s[kM][kKeys / 8][4] = {};
    scores_of<kDim>(q + warp_row * shared_row(kDim), keys, s);
    wait_for_copies<0>();
    __syncthreads();  // the values are here, the keys have been read
    if (next < tile.end_key) {
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
    const Total total = total_of(a.layout, head, largest, state.sum[i]);
    bf16* out = a.y.row(token, head) + lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
      if (n * 8 < value_dim) {
        *reinterpret_cast<uint32_t*>(out + n * 8) =
            pack(state.y[m][n][e] * total.factor, state.y[m][n][e + 1] * total.factor);
      }
    }
    if (a.largest != nullptr && lane % 4 == 0) {
      a.largest[token * a.layout.heads + head] = total.largest;
      a.inverse_sum[token * a.layout.heads + head] = total.inverse_sum;
    }
  }
}

constexpr int kManyRows = 128;
template <int kDim>
constexpr size_t kManyShared = (kManyRows + 2 * kKeys) * shared_row(kDim) * sizeof(bf16) +
                               2 * kKeys * sizeof(int64_t);

template <int kDim, class E>
void launch_forward(const Attention<bf16>& a, const typename Stored<E>::Rows& k,
                    const typename Stored<E>::Rows& v, int64_t gathered, const Launch& on) {
  constexpr int kManyWarps = kDim <= 128 ? 4 : 8;
  const DeviceLayout device = layout_of(a.shape, on, a.sink_logits.data);
  const FewRows<E> few(a.shape);
  const TileLists lists = forward_tiles(a.shape,
                                        {kManyRows, few.tile_rows(), a.largest != nullptr,
                                         few.blocks_per_head(), gathered, on.batch_invariant},
                                        on);
  const Partials many = make_partials(lists.many_partials, kManyRows, a.shape, on);
  const Args<E> args = {device.layout, lists.many.items, a.q,           k,   v,
                        a.y,           a.largest,        a.inverse_sum, many};
  launch(on, "attention", many_rows<kDim, kManyWarps, kManyRows / 16 / kManyWarps, E>,
         dim3(static_cast<unsigned>(lists.many.count * a.shape.kv_heads)), dim3(kManyWarps * 32),
         kManyShared<kDim>, args);
  few.launch(
      {device.layout, a.q, k, v, a.y, make_partials(lists.few_partials, kFewRows, a.shape, on),
       lists.pieces.items, lists.first_piece.items, lists.done},
      lists.first_piece.count - 1, on);
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
  const auto rows = [](const auto& x) { return x.rows.outer; };
  const int64_t most =
      std::max({rows(a.k), rows(a.v), rows(a.scaled_k.rows), rows(a.scaled_v.rows)});
  const bool fits =
      std::max(a.shape.head_dim, a.shape.value_dim) <= 128 || kManyShared<256> <= most_shared();
  if (a.shape.softcap > 0.0F || most > INT32_MAX || !fits || !aligned(a.q, 16) ||
      !aligned(a.k, 16) || !aligned(a.v, 16)) {
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
