// Backward of attention on CUDA, for every type and dim. Probabilities are computed again from each
// query's largest score and sum. With P the probabilities, dP = dY V' and delta = rowsum(dY Y):
// dV = P' dY, dS = scale P (dP - delta), dQ = dS K, dK = dS' Q. One kernel has tiles of rows and
// walks the keys for dQ, another has tiles of keys and walks the rows for dK and dV: scores are
// computed twice, and every gradient is one thread's sum in a fixed order.
#include "ops/attention/attention_cuda.cuh"
#include "ops/attention/attention_cudnn.h"
#include "ops/attention/attention_wgmma.h"

namespace cambium::cuda {
namespace attention {
namespace {

template <class T>
struct BackwardArgs {
  Layout layout;
  const Tile* tiles;
  View<T> q, k, v, y;
  const float* largest;
  const float* inverse_sum;
  const float* delta;
  bool q_vectors, k_vectors, v_vectors, y_vectors;  // whether 4 elements can be read at once
};

/// delta (T, H), a warp for each.
template <class T>
__global__ void __launch_bounds__(kThreads)
    delta_kernel(const View<T> y, int heads, int64_t count, float* delta) {
  const int64_t row = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / 32;
  if (row >= count) {
    return;
  }
  const T* out = y.row(row / heads, row % heads);
  const T* grad = y.grad_row(row / heads, row % heads);
  float sum = 0.0F;
  for (int64_t d = threadIdx.x % 32; d < y.channels; d += 32) {
    sum = fmaf(load(out + d), load(grad + d), sum);
  }
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) {
    delta[row] = sum;
  }
}

/// grads (H) -= sum over the rows of P delta, P the probability of the head's sink: a block for
/// each head, its sum in a fixed order.
__global__ void __launch_bounds__(kThreads)
    sink_grad_kernel(const float* sink_logits, const float* largest, const float* inverse_sum,
                     const float* delta, int heads, int64_t tokens, float* grads) {
  __shared__ float sums[kThreads / 32];
  const int head = static_cast<int>(blockIdx.x);
  const int thread = static_cast<int>(threadIdx.x);
  const float sink = sink_logits[head] * kLog2E;
  float sum = 0.0F;
  for (int64_t t = thread; t < tokens; t += kThreads) {
    const int64_t at = t * heads + head;
    sum = fmaf(exp2f(sink - largest[at]) * inverse_sum[at], delta[at], sum);
  }
  sum = warp_sum(sum);
  if (thread % 32 == 0) {
    sums[thread / 32] = sum;
  }
  __syncthreads();
  if (thread == 0) {
    for (int i = 1; i < kThreads / 32; ++i) {
      sum += sums[i];
    }
    grads[head] -= sum;
  }
}

/// A tile of rows in shared memory.
struct RowTile {
  float* q;
  float* dy;
  float* largest;
  float* inverse_sum;
  float* delta;
};

template <int kTile, class T>
__device__ __forceinline__ void load_row_tile(const BackwardArgs<T>& a, int kv_head, int start,
                                              int rows, int first, const RowTile& to) {
  const Layout& layout = a.layout;
  const auto token = [&](int r) { return int64_t{start} + (first + r) / layout.group; };
  const auto head = [&](int r) { return kv_head * layout.group + (first + r) % layout.group; };
  load_rows<T>(
      to.q, row_stride(layout.head_dim), kTile, layout.head_dim, a.q_vectors,
      [&](int r) -> const T* { return first + r < rows ? a.q.row(token(r), head(r)) : nullptr; });
  load_rows<T>(to.dy, row_stride(layout.value_dim), kTile, layout.value_dim, a.y_vectors,
               [&](int r) -> const T* {
                 return first + r < rows ? a.y.grad_row(token(r), head(r)) : nullptr;
               });
  const int r = static_cast<int>(threadIdx.x);
  if (r < kTile) {
    const bool exists = first + r < rows;
    const int64_t at = exists ? token(r) * layout.heads + head(r) : 0;
    to.largest[r] = exists ? a.largest[at] : 0.0F;
    to.inverse_sum[r] = exists ? a.inverse_sum[at] : 0.0F;
    to.delta[r] = exists ? a.delta[at] : 0.0F;
  }
}

template <int kTile, class T>
__device__ __forceinline__ void load_key_tile(const BackwardArgs<T>& a, int kv_head, int start,
                                              int first, int end, float* keys, float* values) {
  const Layout& layout = a.layout;
  load_rows<T>(keys, row_stride(layout.head_dim), kTile, layout.head_dim, a.k_vectors,
               [&](int r) -> const T* {
                 return first + r < end ? a.k.row(int64_t{start} + first + r, kv_head) : nullptr;
               });
  load_rows<T>(values, row_stride(layout.value_dim), kTile, layout.value_dim, a.v_vectors,
               [&](int r) -> const T* {
                 return first + r < end ? a.v.row(int64_t{start} + first + r, kv_head) : nullptr;
               });
}

template <int kColumns, class T>
__device__ __forceinline__ void add_row(T* to, int dim, const float (&sum)[kColumns]) {
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    const int column = 4 * static_cast<int>(threadIdx.x % 16) + 64 * (c / 4) + c % 4;
    if (column < dim) {
      add_to(to + column, sum[c]);
    }
  }
}

/// Shared memory of both kernels: backward_shared().
template <class T, int kTile, int kColumns>
__global__ void __launch_bounds__(kThreads, 1) query_grad_kernel(const BackwardArgs<T> a) {
  constexpr int kR = kTile / 16;
  extern __shared__ __align__(16) float shared[];
  const Layout& layout = a.layout;
  const int kv_head = static_cast<int>(blockIdx.x % layout.kv_heads);
  const Tile tile = a.tiles[blockIdx.x / layout.kv_heads];
  const int start = layout.start[tile.segment];
  const int rows = (layout.start[tile.segment + 1] - start) * layout.group;
  const int stride = row_stride(layout.head_dim);
  const int value_stride = row_stride(layout.value_dim);
  RowTile own;
  own.q = shared;
  own.dy = own.q + kTile * stride;
  float* keys = own.dy + kTile * value_stride;
  float* values = keys + kTile * stride;
  float* weights = values + kTile * value_stride;
  own.largest = weights + kTile * (kTile + 4);
  own.inverse_sum = own.largest + kTile;
  own.delta = own.inverse_sum + kTile;
  const int ty = static_cast<int>(threadIdx.x) / 16;
  const int tx = static_cast<int>(threadIdx.x) % 16;
  load_row_tile<kTile>(a, kv_head, start, rows, tile.first_row, own);
  float dq[kR][kColumns] = {};
  for (int first = tile.template first_tile<kTile>(); first < tile.end_key;
       first = tile.template next_tile<kTile>(first)) {
    __syncthreads();  // the tile before has been read
    load_key_tile<kTile>(a, kv_head, start, first, tile.end_key, keys, values);
    __syncthreads();
    float s[kR][kR] = {};
    float dp[kR][kR] = {};
    add_dots(own.q, keys, stride, layout.head_dim, s);
    add_dots(own.dy, values, value_stride, layout.value_dim, dp);
#pragma unroll
    for (int i = 0; i < kR; ++i) {
      const int r = ty * kR + i;
      const int position = (tile.first_row + r) / layout.group;
#pragma unroll
      for (int j = 0; j < kR; ++j) {
        const int p = first + tx + 16 * j;
        const bool seen = layout.sees(position, p) && p < tile.end_key;
        const Score score = score_of(layout, s[i][j]);
        const float probability = exp2f(score.value - own.largest[r]) * own.inverse_sum[r];
        weights[r * (kTile + 4) + tx + 16 * j] =
            seen ? probability * (dp[i][j] - own.delta[r]) * (layout.scale * score.slope) : 0.0F;
      }
    }
    __syncthreads();
    add_products<kTile>(weights, keys, stride, layout.head_dim, dq);
  }
#pragma unroll
  for (int i = 0; i < kR; ++i) {
    const int row = tile.first_row + ty * kR + i;
    if (row < rows) {
      add_row(a.q.grad_row(int64_t{start} + row / layout.group,
                           kv_head * layout.group + row % layout.group),
              layout.head_dim, dq[i]);
    }
  }
}

/// Weights are of (key, row) here: keys are this block's own tile.
template <class T, int kTile, int kColumns>
__global__ void __launch_bounds__(kThreads, 1) key_grad_kernel(const BackwardArgs<T> a) {
  constexpr int kR = kTile / 16;
  extern __shared__ __align__(16) float shared[];
  const Layout& layout = a.layout;
  const int kv_head = static_cast<int>(blockIdx.x % layout.kv_heads);
  const Tile tile = a.tiles[blockIdx.x / layout.kv_heads];
  const int start = layout.start[tile.segment];
  const int length = layout.start[tile.segment + 1] - start;
  const int stride = row_stride(layout.head_dim);
  const int value_stride = row_stride(layout.value_dim);
  float* keys = shared;
  float* values = keys + kTile * stride;
  RowTile theirs;
  theirs.q = values + kTile * value_stride;
  theirs.dy = theirs.q + kTile * stride;
  float* weights = theirs.dy + kTile * value_stride;
  theirs.largest = weights + kTile * (kTile + 4);
  theirs.inverse_sum = theirs.largest + kTile;
  theirs.delta = theirs.inverse_sum + kTile;
  const int ty = static_cast<int>(threadIdx.x) / 16;
  const int tx = static_cast<int>(threadIdx.x) % 16;
  load_key_tile<kTile>(a, kv_head, start, tile.first_key, tile.end_key, keys, values);
  const int end_row = layout.end_token(tile, length) * layout.group;
  float dk[kR][kColumns] = {};
  float dv[kR][kColumns] = {};
  for (int first = tile.first_row; first < end_row; first += kTile) {
    __syncthreads();  // the tile before has been read
    load_row_tile<kTile>(a, kv_head, start, end_row, first, theirs);
    __syncthreads();
    float s[kR][kR] = {};
    float dp[kR][kR] = {};
    add_dots(keys, theirs.q, stride, layout.head_dim, s);
    add_dots(values, theirs.dy, value_stride, layout.value_dim, dp);
#pragma unroll
    for (int j = 0; j < kR; ++j) {
      const int r = tx + 16 * j;
      const int position = (first + r) / layout.group;
#pragma unroll
      for (int i = 0; i < kR; ++i) {
        const int p = tile.first_key + ty * kR + i;
        const bool seen = layout.sees(position, p) && p < tile.end_key && first + r < end_row;
        const Score score = score_of(layout, s[i][j]);
        const float probability = exp2f(score.value - theirs.largest[r]) * theirs.inverse_sum[r];
        s[i][j] = seen ? probability : 0.0F;
        dp[i][j] =
            seen ? probability * (dp[i][j] - theirs.delta[r]) * (layout.scale * score.slope) : 0.0F;
        weights[(ty * kR + i) * (kTile + 4) + r] = s[i][j];
      }
    }
    __syncthreads();
    add_products<kTile>(weights, theirs.dy, value_stride, layout.value_dim, dv);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kR; ++i) {
#pragma unroll
      for (int j = 0; j < kR; ++j) {
        weights[(ty * kR + i) * (kTile + 4) + tx + 16 * j] = dp[i][j];
      }
    }
    __syncthreads();
    add_products<kTile>(weights, theirs.q, stride, layout.head_dim, dk);
  }
#pragma unroll
  for (int i = 0; i < kR; ++i) {
    const int p = tile.first_key + ty * kR + i;
    if (p >= tile.end_key) {
      continue;
    }
    // k and v may be the same memory: one thread adds both, one after the other.
    if (a.k.grad != nullptr) {
      add_row(a.k.grad_row(int64_t{start} + p, kv_head), layout.head_dim, dk[i]);
    }
    if (a.v.grad != nullptr) {
      add_row(a.v.grad_row(int64_t{start} + p, kv_head), layout.value_dim, dv[i]);
    }
  }
}

template <int kTile, int kColumns, class T>
void launch_backward(const Attention<T>& a, BackwardArgs<T> args, const Launch& on) {
  const BackwardTiles tiles = backward_tiles(a.shape, kTile, kTile, on);
  const size_t shared = backward_shared(kTile, args.layout.head_dim, args.layout.value_dim);
  const auto blocks = [&](const List<Tile>& list) {
    return dim3(static_cast<unsigned>(list.count * args.layout.kv_heads));
  };
  if (a.q.grad != nullptr) {
    args.tiles = tiles.rows.items;
    launch(on, "attention backward", query_grad_kernel<T, kTile, kColumns>, blocks(tiles.rows),
           dim3(kThreads), shared, args);
  }
  if (a.k.grad != nullptr || a.v.grad != nullptr) {
    args.tiles = tiles.keys.items;
    launch(on, "attention backward", key_grad_kernel<T, kTile, kColumns>, blocks(tiles.keys),
           dim3(kThreads), shared, args);
  }
}

/// Makes a gradient that is to be set zero: these kernels add.
template <class T>
void make_zero(const View<T>& x, bool wanted, const Launch& on) {
  if (wanted) {
    const auto bytes = static_cast<size_t>(x.count() * x.channels) * sizeof(T);
    check_launch("attention backward", {}, {}, 0, cudaMemsetAsync(x.grad, 0, bytes, on.stream));
  }
}

template <class T>
void run_backward(const Attention<T>& a, const Launch& on) {
  // In bf16 by products of warpgroups where they serve, else by cuDNN, else by our kernels for
  // every device with tensor cores.
  if constexpr (std::is_same_v<T, bf16>) {
    if (backward_by_warpgroups(a, on) || backward_by_cudnn(a, on)) {
      return;
    }
  }
  make_zero(a.q, a.set_q, on);
  make_zero(a.k, a.set_k, on);
  make_zero(a.v, a.set_v, on);
  const int64_t count = a.y.count();
  auto* delta = scratch<float>(on, count);
  launch(on, "attention backward", delta_kernel<T>,
         dim3(static_cast<unsigned>(ceil_div(count * 32, kThreads))), dim3(kThreads), 0, a.y,
         static_cast<int>(a.shape.heads), count, delta);
  if (a.sink_logits.grad != nullptr) {
    const auto heads = static_cast<int>(a.shape.heads);
    launch(on, "attention backward", sink_grad_kernel, dim3(static_cast<unsigned>(heads)),
           dim3(kThreads), 0, static_cast<const float*>(a.sink_logits.data),
           static_cast<const float*>(a.largest), static_cast<const float*>(a.inverse_sum),
           static_cast<const float*>(delta), heads, a.y.rows.outer, a.sink_logits.grad);
  }
  if constexpr (std::is_same_v<T, bf16>) {
    if (backward_on_tensor_cores(a, delta, on)) {
      return;
    }
  }
  const DeviceLayout device = layout_of(a.shape, on);
  const BackwardArgs<T> args = {device.layout,
                                nullptr,
                                a.q,
                                a.k,
                                a.v,
                                a.y,
                                a.largest,
                                a.inverse_sum,
                                delta,
                                aligned(a.q, 4 * sizeof(T)),
                                aligned(a.k, 4 * sizeof(T)),
                                aligned(a.v, 4 * sizeof(T)),
                                aligned(a.y, 4 * sizeof(T))};
  const int64_t widest = std::max(a.shape.head_dim, a.shape.value_dim);
  const int tile = backward_tile(most_shared(), device.layout.head_dim, device.layout.value_dim);
  if (widest <= 64) {
    launch_backward<64, 4>(a, args, on);
  } else if (widest <= 128) {
    tile == 64 ? launch_backward<64, 8>(a, args, on) : launch_backward<32, 8>(a, args, on);
  } else {
    tile == 32 ? launch_backward<32, 16>(a, args, on) : launch_backward<16, 16>(a, args, on);
  }
}

}  // namespace
}  // namespace attention

void attention_backward(const Attention<float>& a, const Launch& on) {
  attention::run_backward(a, on);
}
void attention_backward(const Attention<bf16>& a, const Launch& on) {
  attention::run_backward(a, on);
}

}  // namespace cambium::cuda
