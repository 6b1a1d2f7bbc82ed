// Attention to chosen keys on CUDA, forward, for every type and size: a block has a token and up to
// kRows of the heads that read one head of keys, and walks the chosen keys in tiles of kKeys with a
// running maximum in fp32. The keys of tokens that decode (segments of one token) are cut in parts
// of kPartKeys, whose results are added in order. bf16 of the dims that suit goes to tensor cores
// (chosen_attention_mma_cuda.cu).
#include <algorithm>

#include "ops/chosen_attention/chosen_cuda.cuh"

namespace cambium::cuda {
namespace chosen {
namespace {

using attention::kKeys;
using attention::kThreads;
using attention::row_stride;

constexpr int kScoreStride = kKeys + 4;

template <class T, class K>
struct ForwardArgs {
  ChosenAttention<T> in;
  attention::Layout layout;
  Calls calls;
  latent::Partials partials;
  View<K> k, v;
  const bf16* k_scales;  // of fp8, as ScaledRows has them
  const bf16* v_scales;
  bool q_vectors, k_vectors, v_vectors;  // whether 4 elements can be read at once
};

/// Shared memory: q (kRows, stride), then keys and after them values (kKeys, the larger stride),
/// weights (kRows, kKeys + 4), the rows of the keys.
constexpr size_t forward_shared(int dim, int value_dim) {
  const int larger = row_stride(std::max(dim, value_dim));
  const int floats = kRows * row_stride(dim) + kKeys * larger + kRows * kScoreStride;
  return static_cast<size_t>(floats) * sizeof(float) + kKeys * sizeof(int64_t);
}

/// Blocks (heads of keys, kRows of a group at a time; T; parts). Thread (ty, tx) has row ty, of it
/// the keys tx + 16 j of a tile and the columns 4 tx + 64 c + e of values; kColumns = 4 per 64.
template <class T, class K, int kColumns>
__global__ void __launch_bounds__(kThreads) forward_kernel(const ForwardArgs<T, K> a) {
  extern __shared__ __align__(16) float shared[];
  const attention::Layout& layout = a.layout;
  const int dim = layout.head_dim;
  const int value_dim = layout.value_dim;
  const int stride = row_stride(dim);
  const int value_stride = row_stride(value_dim);
  float* queries = shared;
  float* keys = queries + kRows * stride;
  float* weights = keys + kKeys * max(stride, value_stride);
  auto* key_rows = reinterpret_cast<int64_t*>(weights + kRows * kScoreStride);
  const auto thread = static_cast<int>(threadIdx.x);
  const int ty = thread / 16;
  const int tx = thread % 16;
  await_inputs();
  Work work;
  if (!find_work(a.in, layout, a.calls, a.partials, work)) {
    return;
  }
  const int64_t end = work.end;
  const int kv_head = work.kv_head;
  attention::load_rows<T>(queries, stride, kRows, dim, a.q_vectors, [&](int r) -> const T* {
    return r < work.rows ? a.in.q.row(work.t, work.head + r) : nullptr;
  });
  const auto factors = [&](const bf16* scales) {
    return [=](int r) {
      return attention::factor_of(scales[key_rows[r] * layout.kv_heads + kv_head]);
    };
  };
  float largest = -INFINITY;
  float sum = 0.0F;  // of this thread's keys
  float y[1][kColumns] = {};
  for (int64_t tile = work.first; tile < end; tile += kKeys) {
    __syncthreads();  // the tile before has been read
    if (thread < kKeys) {
      const int64_t i = tile + thread;
      key_rows[thread] =
          i < end
              ? layout.key_row(work.segment, static_cast<int>(a.in.chosen.position(work.list, i)))
              : -1;
    }
    __syncthreads();
    attention::load_rows<K>(
        keys, stride, kKeys, dim, a.k_vectors,
        [&](int r) -> const K* {
          return key_rows[r] < 0 ? nullptr : a.k.row(key_rows[r], kv_head);
        },
        factors(a.k_scales));
    __syncthreads();
    float score[1][kKeys / 16] = {};
    attention::add_dots(queries, keys, stride, dim, score);
    float most = largest;
#pragma unroll
    for (int j = 0; j < kKeys / 16; ++j) {
      score[0][j] = tile + tx + 16 * j < end ? score[0][j] * layout.scale : -INFINITY;
      most = fmaxf(most, score[0][j]);
    }
#pragma unroll
    for (int lanes = 8; lanes > 0; lanes /= 2) {
      most = fmaxf(most, __shfl_xor_sync(0xffffffffU, most, lanes));
    }
    const float factor = expf(largest - most);  // 0 for the first tile
    largest = most;
    sum *= factor;
#pragma unroll
    for (int j = 0; j < kKeys / 16; ++j) {
      const float weight = expf(score[0][j] - most);
      sum += weight;
      weights[ty * kScoreStride + tx + 16 * j] = weight;
    }
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      y[0][c] *= factor;
    }
    __syncthreads();  // the keys have been read
    attention::load_rows<K>(
        keys, value_stride, kKeys, value_dim, a.v_vectors,
        [&](int r) -> const K* {
          return key_rows[r] < 0 ? nullptr : a.v.row(key_rows[r], kv_head);
        },
        factors(a.v_scales));
    __syncthreads();
    attention::add_products<kKeys>(weights, keys, value_stride, value_dim, y);
  }
#pragma unroll
  for (int lanes = 8; lanes > 0; lanes /= 2) {
    sum += __shfl_xor_sync(0xffffffffU, sum, lanes);
  }
  if (ty >= work.rows) {
    return;
  }
  if (tx == 0) {
    store_sums(a.in, a.partials, work, ty, largest, sum);
  }
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    const int column = 4 * tx + c / 4 * 64 + c % 4;
    if (column < value_dim) {
      store_value(a.in, a.partials, work, ty, column, y[0][c], sum);
    }
  }
}

template <class T, class K>
void forward(const ChosenAttention<T>& a, const View<K>& k, const View<K>& v, const bf16* k_scales,
             const bf16* v_scales, const latent::Tokens& tokens, const latent::Partials& partials,
             const Launch& on) {
  const AttentionShape& shape = a.shape;
  const attention::DeviceLayout layout = attention::layout_of(shape, on);
  const ForwardArgs<T, K> args{latent::for_device(a),
                               layout.layout,
                               {tokens.segment, tokens.single},
                               partials,
                               k,
                               v,
                               k_scales,
                               v_scales,
                               attention::aligned(a.q, 4 * sizeof(T)),
                               attention::aligned(k, 4 * sizeof(K)),
                               attention::aligned(v, 4 * sizeof(K))};
  const auto kernel = shape.value_dim <= 128 ? forward_kernel<T, K, 8> : forward_kernel<T, K, 16>;
  launch_ahead(on, "chosen_attention", kernel, blocks_of(a, partials), dim3(kThreads),
               forward_shared(layout.layout.head_dim, layout.layout.value_dim), args);
}

/// Parts of a decoding token's keys: as many as the choice can reach, and the table, which is the
/// same for steps that follow each other. Where a part begins does not depend on the call.
latent::Partials make_partials(const AttentionShape& shape, const ChosenTokens& chosen,
                               const latent::Tokens& tokens, const Launch& on) {
  latent::Partials partials;
  if (tokens.singles == 0 || shape.table == nullptr) {
    return partials;
  }
  int64_t reach = shape.pages_per_segment * shape.page_size;
  if (chosen.defined()) {
    const int64_t most = chosen.budget * chosen.size;
    reach = on.batch_invariant ? most : std::min(reach, most);
  }
  partials.parts = ceil_div(reach, kPartKeys);
  if (partials.parts > 1) {
    const int64_t rows = tokens.singles * partials.parts * shape.heads;
    partials.y = scratch<float>(on, rows * shape.value_dim);
    partials.largest = scratch<float>(on, rows);
    partials.sum = scratch<float>(on, rows);
  }
  return partials;
}

template <class T>
void forward_by_type(const ChosenAttention<T>& a, const latent::Tokens& tokens,
                     const latent::Partials& partials, const Launch& on) {
  if constexpr (std::is_same_v<T, bf16>) {
    if (forward_on_tensor_cores(a, tokens, partials, on)) {
      return;
    }
  }
  if (a.k.scaled.defined()) {
    forward(a, a.k.scaled.rows, a.v.scaled.rows, a.k.scaled.scales, a.v.scaled.scales, tokens,
            partials, on);
  } else if (a.k.narrow.defined()) {
    forward(a, a.k.narrow, a.v.narrow, nullptr, nullptr, tokens, partials, on);
  } else {
    forward(a, a.k.wide, a.v.wide, nullptr, nullptr, tokens, partials, on);
  }
}

template <class T>
void forward(const ChosenAttention<T>& a, const Launch& on) {
  const latent::Tokens tokens = latent::tokens_of(a.shape, on);
  const latent::Partials partials = make_partials(a.shape, a.chosen, tokens, on);
  forward_by_type(a, tokens, partials, on);
  latent::add_parts("chosen_attention", a.y, tokens, partials, on);
}

}  // namespace
}  // namespace chosen

void chosen_attention_forward(const ChosenAttention<float>& a, const Launch& on) {
  chosen::forward(a, on);
}
void chosen_attention_forward(const ChosenAttention<bf16>& a, const Launch& on) {
  chosen::forward(a, on);
}

}  // namespace cambium::cuda
