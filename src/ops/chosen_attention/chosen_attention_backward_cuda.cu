// Attention to chosen keys on CUDA, backward: a kernel whose blocks have queries and walk their
// keys, and one whose blocks have keys and walk the queries after them, so that no sum is shared
// between blocks. Probabilities are computed anew from what the forward kernel kept.
#include "ops/attention/attention_cuda.cuh"
#include "ops/chosen_attention/chosen_attention_kernels.h"
#include "ops/latent_attention/latent_cuda.cuh"
#include "ops/shared_limit.h"

namespace cambium::cuda {
namespace chosen {
namespace {

using attention::kThreads;
using attention::row_stride;

/// Rows of queries in the first kernel.
constexpr int kRows = 16;

template <class T>
struct BackwardArgs {
  ChosenAttention<T> in;
  attention::Layout layout;
  const int32_t* segments;
  const attention::Tile* tiles;                     // of keys
  const float* delta;                               // (T, H)
  bool q_vectors, k_vectors, v_vectors, y_vectors;  // whether 4 elements can be read at once
};

/// Shared memory: q and dy (kRows, their strides), keys and values (keys, their strides), weights
/// (kRows, keys + 4), the rows of the keys.
constexpr size_t queries_shared(int keys, int dim, int value_dim) {
  const int floats =
      (kRows + keys) * (row_stride(dim) + row_stride(value_dim)) + kRows * (keys + 4);
  return static_cast<size_t>(floats) * sizeof(float) + static_cast<size_t>(keys) * sizeof(int64_t);
}
/// Keys, values, q and dy (tile, their strides), probabilities and slopes (tile, tile + 4).
constexpr size_t keys_shared(int tile, int dim, int value_dim) {
  const int floats = 2 * tile * (row_stride(dim) + row_stride(value_dim)) + 2 * tile * (tile + 4);
  return static_cast<size_t>(floats) * sizeof(float);
}
// Every device holds the largest tiles in dims of up to 128, and the smallest in any.
static_assert(queries_shared(64, 128, 128) <= kSharedOfSm86);
static_assert(keys_shared(32, 128, 128) <= kSharedOfSm86);
static_assert(queries_shared(16, kMaxKernelHeadDim, kMaxKernelHeadDim) <= kSharedOfSm86);
static_assert(keys_shared(16, kMaxKernelHeadDim, kMaxKernelHeadDim) <= kSharedOfSm86);

/// Blocks (heads of keys, kRows of a group at a time; T), which walk kKeys keys at a time.
template <class T, int kColumns, int kKeys>
__global__ void __launch_bounds__(kThreads) queries_kernel(const BackwardArgs<T> a) {
  extern __shared__ __align__(16) float shared[];
  const attention::Layout& layout = a.layout;
  const ChosenTokens& chosen = a.in.chosen;
  const int dim = layout.head_dim;
  const int value_dim = layout.value_dim;
  const int stride = row_stride(dim);
  const int value_stride = row_stride(value_dim);
  float* queries = shared;
  float* grads = queries + kRows * stride;
  float* keys = grads + kRows * value_stride;
  float* values = keys + kKeys * stride;
  float* weights = values + kKeys * value_stride;
  auto* key_rows = reinterpret_cast<int64_t*>(weights + kRows * (kKeys + 4));
  const auto thread = static_cast<int>(threadIdx.x);
  const int ty = thread / 16;
  const int tx = thread % 16;
  const int64_t t = blockIdx.y;
  const int kv_head = static_cast<int>(blockIdx.x) % layout.kv_heads;
  const int first_head = static_cast<int>(blockIdx.x) / layout.kv_heads * kRows;  // of the group
  const int rows = min(layout.group - first_head, kRows);
  const int head = kv_head * layout.group + first_head;
  const int64_t start = layout.start[a.segments[t]];
  const int64_t count = chosen.count(t - start);
  const int64_t list = a.in.list(t, kv_head);
  attention::load_rows<T>(queries, stride, kRows, dim, a.q_vectors, [&](int r) -> const T* {
    return r < rows ? a.in.q.row(t, head + r) : nullptr;
  });
  attention::load_rows<T>(
      grads, value_stride, kRows, value_dim, a.y_vectors,
      [&](int r) -> const T* { return r < rows ? a.in.y.grad_row(t, head + r) : nullptr; });
  const int64_t at = t * layout.heads + head + min(ty, rows - 1);
  const float largest = a.in.largest[at];
  const float inverse = a.in.inverse_sum[at];
  const float delta = a.delta[at];
  float dq[1][kColumns] = {};
  for (int64_t tile = 0; tile < count; tile += kKeys) {
    __syncthreads();  // the tile before has been read
    if (thread < kKeys) {
      const int64_t i = tile + thread;
      key_rows[thread] = i < count ? start + chosen.position(list, i) : -1;
    }
    __syncthreads();
    attention::load_rows<T>(keys, stride, kKeys, dim, a.k_vectors, [&](int r) -> const T* {
      return key_rows[r] < 0 ? nullptr : a.in.k.wide.row(key_rows[r], kv_head);
    });
    attention::load_rows<T>(
        values, value_stride, kKeys, value_dim, a.v_vectors, [&](int r) -> const T* {
          return key_rows[r] < 0 ? nullptr : a.in.v.wide.row(key_rows[r], kv_head);
        });
    __syncthreads();
    float score[1][kKeys / 16] = {};
    float dp[1][kKeys / 16] = {};
    attention::add_dots(queries, keys, stride, dim, score);
    attention::add_dots(grads, values, value_stride, value_dim, dp);
#pragma unroll
    for (int j = 0; j < kKeys / 16; ++j) {
      const float p = expf(score[0][j] * layout.scale - largest) * inverse;
      weights[ty * (kKeys + 4) + tx + 16 * j] =
          tile + tx + 16 * j < count ? p * (dp[0][j] - delta) * layout.scale : 0.0F;
    }
    __syncthreads();
    attention::add_products<kKeys>(weights, keys, stride, dim, dq);
  }
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    const int column = 4 * tx + c / 4 * 64 + c % 4;
    if (ty < rows && column < dim) {
      add_to(a.in.q.grad_row(t, head + ty) + column, dq[0][c]);
    }
  }
}

/// Blocks (tiles of kTile keys, heads of keys). Thread (ty, tx) has keys kEach ty + i, of kTile
/// rows of queries (token by token, and of each the group's heads) those at tx + 16 j.
template <class T, int kColumns, int kTile>
__global__ void __launch_bounds__(kThreads) keys_kernel(const BackwardArgs<T> a) {
  constexpr int kEach = kTile / 16;
  extern __shared__ __align__(16) float shared[];
  const attention::Layout& layout = a.layout;
  const int dim = layout.head_dim;
  const int value_dim = layout.value_dim;
  const int stride = row_stride(dim);
  const int value_stride = row_stride(value_dim);
  float* keys = shared;
  float* values = keys + kTile * stride;
  float* queries = values + kTile * value_stride;
  float* grads = queries + kTile * stride;
  float* probabilities = grads + kTile * value_stride;
  float* slopes = probabilities + kTile * (kTile + 4);
  const int ty = static_cast<int>(threadIdx.x) / 16;
  const int tx = static_cast<int>(threadIdx.x) % 16;
  const attention::Tile tile = a.tiles[blockIdx.x];
  const auto kv_head = static_cast<int>(blockIdx.y);
  const int64_t start = layout.start[tile.segment];
  const int64_t end_row = (layout.start[tile.segment + 1] - start) * layout.group;
  const auto key_row = [&](int r) {
    return tile.first_key + r < tile.end_key ? start + tile.first_key + r : -1;
  };
  attention::load_rows<T>(keys, stride, kTile, dim, a.k_vectors, [&](int r) -> const T* {
    return key_row(r) < 0 ? nullptr : a.in.k.wide.row(key_row(r), kv_head);
  });
  attention::load_rows<T>(values, value_stride, kTile, value_dim, a.v_vectors,
                          [&](int r) -> const T* {
                            return key_row(r) < 0 ? nullptr : a.in.v.wide.row(key_row(r), kv_head);
                          });
  float dk[kEach][kColumns] = {};
  float dv[kEach][kColumns] = {};
  for (int64_t row = int64_t{tile.first_key} * layout.group; row < end_row; row += kTile) {
    bool looks[kEach][kEach];
    bool any = false;
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const int64_t own = (row + tx + 16 * j) / layout.group;
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const int p = tile.first_key + ty * kEach + i;
        looks[i][j] = row + tx + 16 * j < end_row && p < tile.end_key &&
                      a.in.chosen.has(a.in.list(start + own, kv_head), own, p);
        any = any || looks[i][j];
      }
    }
    if (__syncthreads_or(any ? 1 : 0) == 0) {
      continue;  // nobody here looks at these keys
    }
    const auto token_of = [&](int r) { return start + (row + r) / layout.group; };
    const auto head_of = [&](int r) {
      return kv_head * layout.group + static_cast<int>((row + r) % layout.group);
    };
    attention::load_rows<T>(queries, stride, kTile, dim, a.q_vectors, [&](int r) -> const T* {
      return row + r < end_row ? a.in.q.row(token_of(r), head_of(r)) : nullptr;
    });
    attention::load_rows<T>(
        grads, value_stride, kTile, value_dim, a.y_vectors, [&](int r) -> const T* {
          return row + r < end_row ? a.in.y.grad_row(token_of(r), head_of(r)) : nullptr;
        });
    __syncthreads();
    float score[kEach][kEach] = {};
    float dp[kEach][kEach] = {};
    attention::add_dots(keys, queries, stride, dim, score);
    attention::add_dots(values, grads, value_stride, value_dim, dp);
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const int r = tx + 16 * j;
      const int64_t at = row + r < end_row ? token_of(r) * layout.heads + head_of(r) : 0;
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const float p =
            looks[i][j] ? expf(score[i][j] * layout.scale - a.in.largest[at]) * a.in.inverse_sum[at]
                        : 0.0F;
        const int to = (ty * kEach + i) * (kTile + 4) + r;
        probabilities[to] = p;
        slopes[to] = p * (dp[i][j] - a.delta[at]) * layout.scale;
      }
    }
    __syncthreads();
    attention::add_products<kTile>(slopes, queries, stride, dim, dk);
    attention::add_products<kTile>(probabilities, grads, value_stride, value_dim, dv);
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int64_t to = key_row(ty * kEach + i);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int column = 4 * tx + c / 4 * 64 + c % 4;
      if (to >= 0 && column < dim && a.in.k.wide.grad != nullptr) {
        add_to(a.in.k.wide.grad_row(to, kv_head) + column, dk[i][c]);
      }
      if (to >= 0 && column < value_dim && a.in.v.wide.grad != nullptr) {
        add_to(a.in.v.wide.grad_row(to, kv_head) + column, dv[i][c]);
      }
    }
  }
}

template <class T>
void backward(const ChosenAttention<T>& a, const Launch& on) {
  constexpr const char* kWhat = "chosen_attention's gradient";
  const AttentionShape& shape = a.shape;
  const attention::DeviceLayout layout = attention::layout_of(shape, on);
  const latent::Tokens tokens = latent::tokens_of(shape, on);
  float* delta = scratch<float>(on, a.y.count());
  const auto dim = static_cast<int>(shape.head_dim);
  const auto value_dim = static_cast<int>(shape.value_dim);
  const int keys = largest_tile(most_shared(), {64, 32, 16},
                                [&](int n) { return queries_shared(n, dim, value_dim); });
  const int tile =
      largest_tile(most_shared(), {32, 16}, [&](int n) { return keys_shared(n, dim, value_dim); });
  const attention::BackwardTiles tiles = attention::backward_tiles(shape, tile, tile, on);
  const bool narrow = dim <= 128 && value_dim <= 128;
  launch(on, kWhat, latent::delta_kernel<ChosenAttention<T>>,
         dim3(static_cast<unsigned>(ceil_div(a.y.count(), latent::kThreads / 32))),
         dim3(latent::kThreads), 0, a, delta);
  const BackwardArgs<T> args{latent::for_device(a),
                             layout.layout,
                             tokens.segment,
                             tiles.keys.items,
                             delta,
                             attention::aligned(a.q, 4 * sizeof(T)),
                             attention::aligned(a.k.wide, 4 * sizeof(T)),
                             attention::aligned(a.v.wide, 4 * sizeof(T)),
                             attention::aligned(a.y, 4 * sizeof(T))};
  if (a.q.grad != nullptr) {
    launch(on, kWhat,
           narrow       ? queries_kernel<T, 8, 64>
           : keys == 64 ? queries_kernel<T, 16, 64>
           : keys == 32 ? queries_kernel<T, 16, 32>
                        : queries_kernel<T, 16, 16>,
           dim3(static_cast<unsigned>(shape.kv_heads * ceil_div(shape.group(), kRows)),
                static_cast<unsigned>(a.q.rows.outer)),
           dim3(kThreads), queries_shared(keys, dim, value_dim), args);
  }
  if (a.k.wide.grad != nullptr || a.v.wide.grad != nullptr) {
    launch(on, kWhat,
           narrow       ? keys_kernel<T, 8, 32>
           : tile == 32 ? keys_kernel<T, 16, 32>
                        : keys_kernel<T, 16, 16>,
           dim3(static_cast<unsigned>(tiles.keys.count), static_cast<unsigned>(shape.kv_heads)),
           dim3(kThreads), keys_shared(tile, dim, value_dim), args);
  }
}

}  // namespace
}  // namespace chosen

void chosen_attention_backward(const ChosenAttention<float>& a, const Launch& on) {
  chosen::backward(a, on);
}
void chosen_attention_backward(const ChosenAttention<bf16>& a, const Launch& on) {
  chosen::backward(a, on);
}

}  // namespace cambium::cuda
