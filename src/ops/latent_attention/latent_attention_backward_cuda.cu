// Latent attention on CUDA, backward: a kernel whose blocks have queries and walk their keys, and
// one whose blocks have keys and walk the queries after them, so that no sum is shared between
// blocks. Probabilities are computed anew from what the forward kernel kept.
#include <vector>

#include "ops/latent_attention/latent_cuda.cuh"
#include "ops/shared_limit.h"

namespace cambium::cuda {
namespace latent {
namespace {

constexpr int kColumns = static_cast<int>(kMaxLatent) / kThreads;  // of a thread

/// A segment's keys, kHeads at a time in the second kernel.
struct KeyTile {
  int32_t segment;
  int32_t first;  // of the segment's tokens
};

/// Shared memory of both, whose tiles have `lanes` rows, a lane each: kHeads rows of each, `lanes`
/// of each, and lanes * kHeads weights twice.
constexpr size_t queries_shared(int lanes, int all, int rank) {
  return sizeof(float) *
         static_cast<size_t>(kHeads * (odd(all) + odd(rank)) + lanes * odd(all) + lanes * kHeads);
}
constexpr size_t keys_shared(int lanes, int all, int rank) {
  return sizeof(float) * static_cast<size_t>(kHeads * odd(all) + lanes * (odd(all) + odd(rank)) +
                                             2 * lanes * kHeads);
}
/// The lanes that have a row, where a block may have `most` bytes. Sums are taken in the same order
/// with any number.
template <class Bytes>
constexpr int lanes_of(size_t most, const Bytes& shared, int all, int rank) {
  return largest_tile(most, {kTile, kTile / 2, kTile / 4},
                      [&](int lanes) { return shared(lanes, all, rank); });
}
static_assert(queries_shared(kTile / 4, kMaxLatent, kMaxLatent) <= kSharedOfSm86);
static_assert(keys_shared(kTile / 4, kMaxLatent, kMaxLatent) <= kSharedOfSm86);

/// Blocks (heads / kHeads, T).
template <class T, int kLanes>
__global__ void __launch_bounds__(kThreads)
    queries_kernel(LatentAttention<T> a, const int32_t* segments, const int32_t* starts,
                   const float* delta) {
  extern __shared__ __align__(16) float shared[];
  const auto rank = static_cast<int>(a.shape.value_dim);
  const auto all = static_cast<int>(a.shape.head_dim);
  const auto heads = static_cast<int>(a.shape.heads);
  float* queries = shared;
  float* grads = queries + kHeads * odd(all);
  float* keys = grads + kHeads * odd(rank);
  float* weights = keys + kLanes * odd(all);
  const int64_t t = blockIdx.y;
  const int first_head = static_cast<int>(blockIdx.x) * kHeads;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t start = starts[segments[t]];
  const int64_t count = a.chosen.count(t - start);
  const int head = first_head + warp;
  for (int d = lane; d < all; d += 32) {
    queries[warp * odd(all) + d] = head < heads ? load(a.q.row(t, head) + d) : 0.0F;
  }
  for (int d = lane; d < rank; d += 32) {
    grads[warp * odd(rank) + d] = head < heads ? load(a.y.grad_row(t, head) + d) : 0.0F;
  }
  const int64_t at = t * heads + head;
  const float largest = head < heads ? a.largest[at] : 0.0F;
  const float inverse = head < heads ? a.inverse_sum[at] : 0.0F;
  const float mean = head < heads ? delta[at] : 0.0F;
  float dq[kHeads][kColumns] = {};
  for (int64_t tile = 0; tile < count; tile += kLanes) {
    __syncthreads();
    load_keys<kLanes>(a, keys, [&](int r) -> int64_t {
      return tile + r < count ? start + a.chosen.position(t, tile + r) : -1;
    });
    __syncthreads();
    float ds = 0.0F;
    if (lane < kLanes && tile + lane < count) {
      const float* key = keys + lane * odd(all);
      const float score = dot(queries + warp * odd(all), key, all) * a.shape.scale;
      const float p = expf(score - largest) * inverse;
      ds = p * (dot(grads + warp * odd(rank), key, rank) - mean) * a.shape.scale;
    }
    if (lane < kLanes) {
      weights[lane * kHeads + warp] = ds;
    }
    __syncthreads();
    for (int j = 0; j < kLanes; ++j) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const int column = static_cast<int>(threadIdx.x) + c * kThreads;
        const float key = column < all ? keys[j * odd(all) + column] : 0.0F;
#pragma unroll
        for (int h = 0; h < kHeads; ++h) {
          dq[h][c] += weights[j * kHeads + h] * key;
        }
      }
    }
  }
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int column = static_cast<int>(threadIdx.x) + c * kThreads;
      if (first_head + h < heads && column < all) {
        add_to(a.q.grad_row(t, first_head + h) + column, dq[h][c]);
      }
    }
  }
}

/// A block has kHeads keys (a warp each) and walks the queries, token by token and head by head, in
/// tiles of kLanes (a lane each).
template <class T, int kLanes>
__global__ void __launch_bounds__(kThreads) keys_kernel(LatentAttention<T> a, const KeyTile* tiles,
                                                        const int32_t* starts, const float* delta) {
  extern __shared__ __align__(16) float shared[];
  const auto rank = static_cast<int>(a.shape.value_dim);
  const auto all = static_cast<int>(a.shape.head_dim);
  const auto heads = static_cast<int>(a.shape.heads);
  float* keys = shared;
  float* queries = keys + kHeads * odd(all);
  float* grads = queries + kLanes * odd(all);
  float* probabilities = grads + kLanes * odd(rank);
  float* weights = probabilities + kLanes * kHeads;
  const KeyTile tile = tiles[blockIdx.x];
  const int64_t start = starts[tile.segment];
  const int64_t end = starts[tile.segment + 1];
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t key_row = start + tile.first + warp;
  for (int d = lane; d < all; d += 32) {
    keys[warp * odd(all) + d] = key_row >= end ? 0.0F
                                : d < rank     ? number(a.latent, key_row, d)
                                               : number(a.rope_key, key_row, d - rank);
  }
  float dk[kHeads][kColumns] = {};
  const int64_t first_row = (start + tile.first) * heads;
  const int64_t end_row = end * heads;
  for (int64_t row = first_row; row < end_row; row += kLanes) {
    __syncthreads();
    for (int r = warp; r < kLanes; r += kThreads / 32) {
      const bool there = row + r < end_row;
      for (int d = lane; d < all; d += 32) {
        queries[r * odd(all) + d] =
            there ? load(a.q.row((row + r) / heads, (row + r) % heads) + d) : 0.0F;
      }
      for (int d = lane; d < rank; d += 32) {
        grads[r * odd(rank) + d] =
            there ? load(a.y.grad_row((row + r) / heads, (row + r) % heads) + d) : 0.0F;
      }
    }
    __syncthreads();
    float p = 0.0F;
    float ds = 0.0F;
    const int64_t own = row + lane;
    if (lane < kLanes && own < end_row && key_row < end &&
        a.chosen.has(own / heads, own / heads - start, key_row - start)) {
      const float* key = keys + warp * odd(all);
      const float score = dot(queries + lane * odd(all), key, all) * a.shape.scale;
      p = expf(score - a.largest[own]) * a.inverse_sum[own];
      ds = p * (dot(grads + lane * odd(rank), key, rank) - delta[own]) * a.shape.scale;
    }
    if (lane < kLanes) {
      probabilities[lane * kHeads + warp] = p;
      weights[lane * kHeads + warp] = ds;
    }
    if (__syncthreads_or(p != 0.0F ? 1 : 0) == 0) {
      continue;  // nobody here looks at these keys
    }
    for (int j = 0; j < kLanes; ++j) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const int column = static_cast<int>(threadIdx.x) + c * kThreads;
        const float q = column < all ? queries[j * odd(all) + column] : 0.0F;
        const float dy = column < rank ? grads[j * odd(rank) + column] : 0.0F;
#pragma unroll
        for (int k = 0; k < kHeads; ++k) {
          dk[k][c] += weights[j * kHeads + k] * q + probabilities[j * kHeads + k] * dy;
        }
      }
    }
  }
#pragma unroll
  for (int k = 0; k < kHeads; ++k) {
    const int64_t to = start + tile.first + k;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int column = static_cast<int>(threadIdx.x) + c * kThreads;
      if (to >= end || column >= all) {
        continue;
      }
      const View<T>& key = column < rank ? a.latent.wide : a.rope_key.wide;
      if (key.grad != nullptr) {
        add_to(key.grad_row(to) + (column < rank ? column : column - rank), dk[k][c]);
      }
    }
  }
}

/// The tiles of keys.
struct BackwardPlan {
  struct Key {
    bool operator==(const Key&) const = default;
  };
  Key key;
  DeviceArray memory;
  int64_t tiles = 0;
};

BackwardPlan backward_plan(const AttentionShape& shape, const Launch& on) {
  std::vector<KeyTile> tiles;
  for (int64_t s = 0; s < shape.segments; ++s) {
    for (int64_t first = 0; first < shape.length(s); first += kHeads) {
      tiles.push_back({static_cast<int32_t>(s), static_cast<int32_t>(first)});
    }
  }
  const auto count = static_cast<int64_t>(tiles.size());
  return {{}, {tiles.data(), count * static_cast<int64_t>(sizeof(KeyTile)), on}, count};
}

template <class T>
void backward(const LatentAttention<T>& a, const Launch& on) {
  const AttentionShape& shape = a.shape;
  const attention::DeviceLayout layout = attention::layout_of(shape, on);
  const auto plan =
      plan_for<BackwardPlan>(shape.plans, {}, [&] { return backward_plan(shape, on); });
  const Tokens tokens = tokens_of(shape, on);
  const int32_t* starts = layout.layout.start;
  float* delta = scratch<float>(on, a.y.count());
  const auto all = static_cast<int>(shape.head_dim);
  const auto rank = static_cast<int>(shape.value_dim);
  constexpr const char* kWhat = "latent_attention's gradient";
  launch(on, kWhat, delta_kernel<LatentAttention<T>>,
         dim3(static_cast<unsigned>(ceil_div(a.y.count(), kThreads / 32))), dim3(kThreads), 0, a,
         delta);
  if (a.q.grad != nullptr) {
    const int lanes = lanes_of(most_shared(), queries_shared, all, rank);
    launch(on, kWhat,
           lanes == kTile       ? queries_kernel<T, kTile>
           : lanes == kTile / 2 ? queries_kernel<T, kTile / 2>
                                : queries_kernel<T, kTile / 4>,
           dim3(static_cast<unsigned>(ceil_div(shape.heads, kHeads)),
                static_cast<unsigned>(a.q.rows.outer)),
           dim3(kThreads), queries_shared(lanes, all, rank), a, tokens.segment, starts, delta);
  }
  if (a.latent.wide.grad != nullptr || a.rope_key.wide.grad != nullptr) {
    const int lanes = lanes_of(most_shared(), keys_shared, all, rank);
    launch(on, kWhat,
           lanes == kTile       ? keys_kernel<T, kTile>
           : lanes == kTile / 2 ? keys_kernel<T, kTile / 2>
                                : keys_kernel<T, kTile / 4>,
           dim3(static_cast<unsigned>(plan->tiles)), dim3(kThreads), keys_shared(lanes, all, rank),
           a, plan->memory.template as<KeyTile>(), starts, delta);
  }
}

}  // namespace
}  // namespace latent

void latent_attention_backward(const LatentAttention<float>& a, const Launch& on) {
  latent::backward(a, on);
}
void latent_attention_backward(const LatentAttention<bf16>& a, const Launch& on) {
  latent::backward(a, on);
}

}  // namespace cambium::cuda
