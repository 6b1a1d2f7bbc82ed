// The scores of blocks and pools, and of tokens where each head has a list. A block of threads has
// some tokens with their heads as rows, and whole pieces, whose keys it walks in tiles; products in
// fp32, then a warp brings those of a row and a piece together, tile after tile. All pieces whose
// scores count lie before a token: blocks that it is in are chosen whatever theirs.
#include <algorithm>

#include "ops/attention/attention_cuda.cuh"
#include "ops/selection/selection_cuda.cuh"

namespace cambium::cuda::selection {
namespace {

using attention::kKeys;
using attention::kThreads;
using attention::row_stride;

constexpr int kScoreStride = kKeys + 4;

template <class T, class K>
struct PieceArgs {
  ChooseTokens<T> in;
  attention::Layout layout;
  const int32_t* segments;
  Scores to;
  View<K> keys;
  const bf16* scales;  // of fp8, as ScaledRows has them
  int pieces;          // of a block of threads
  int heads, tokens;   // whose rows it has at a time
  bool q_vectors, k_vectors;
};

/// Shared memory: queries (kRows, stride), keys (kKeys, stride), products (kRows, kKeys + 4), what
/// came together (kRows, pieces), sums over heads (tokens, pieces), the rows of the keys.
constexpr size_t piece_shared(int rows, int dim, int pieces, int tokens) {
  const int floats =
      (rows + kKeys) * row_stride(dim) + rows * kScoreStride + (rows + tokens) * pieces;
  return static_cast<size_t>((floats + 1) / 2 * 2) * sizeof(float) + kKeys * sizeof(int64_t);
}

/// Tokens [t, end) of segment s, and pieces from `first` on.
template <int kR, class T, class K>
__device__ void score_run(const PieceArgs<T, K>& a, float* shared, int s, int64_t t, int64_t end,
                          int64_t first) {
  constexpr int kRows = 16 * kR;
  const attention::Layout& layout = a.layout;
  const auto size = static_cast<int>(a.in.chosen.size);
  const int dim = layout.head_dim;
  const int stride = row_stride(dim);
  float* queries = shared;
  float* keys = queries + kRows * stride;
  float* products = keys + kKeys * stride;
  float* together = products + kRows * kScoreStride;
  float* sums = together + kRows * a.pieces;
  auto* key_rows =
      reinterpret_cast<int64_t*>(shared + ((sums - shared) + a.tokens * a.pieces + 1) / 2 * 2);
  const auto thread = static_cast<int>(threadIdx.x);
  const int64_t own = layout.position[s] + t - layout.start[s];  // of the first token
  const int64_t last = own + (end - t) - 1;
  const int64_t candidates = a.in.candidates(last);
  if (first >= candidates || candidates <= a.in.top()) {
    return;
  }
  const int count = static_cast<int>(min(int64_t{a.pieces}, candidates - first));
  const int64_t first_key = first * size;
  const int64_t end_key = min(last + 1, (first + count) * size);
  const bool pools = a.in.chosen.tail;
  const bool weighted = a.in.weight.defined();
  const auto score_at = [&](int token, int64_t list, int piece) {
    const int64_t row = (t + token - a.to.first) * a.in.chosen.lists + list;
    return a.to.rows + row * a.to.capacity + first + piece;
  };
  for (int h = 0; h < layout.heads; h += a.heads) {
    __syncthreads();
    attention::load_rows<T>(queries, stride, kRows, dim, a.q_vectors, [&](int r) -> const T* {
      const int64_t token = t + r / a.heads;
      const int head = h + r % a.heads;
      return token < end && head < layout.heads ? a.in.q.row(token, head) : nullptr;
    });
    for (int i = thread; i < kRows * count; i += kThreads) {
      together[i] = pools ? 0.0F : -INFINITY;
    }
    for (int64_t tile = first_key; tile < end_key; tile += kKeys) {
      __syncthreads();  // the tile before has been read
      if (thread < kKeys) {
        const int64_t p = tile + thread;
        key_rows[thread] = p < end_key ? layout.key_row(s, static_cast<int>(p)) : -1;
      }
      __syncthreads();
      attention::load_rows<K>(
          keys, stride, kKeys, dim, a.k_vectors,
          [&](int r) -> const K* { return key_rows[r] < 0 ? nullptr : a.keys.row(key_rows[r], 0); },
          [&](int r) { return attention::factor_of(a.scales[key_rows[r]]); });
      __syncthreads();
      float dot[kR][kKeys / 16] = {};
      attention::add_dots(queries, keys, stride, dim, dot);
#pragma unroll
      for (int i = 0; i < kR; ++i) {
#pragma unroll
        for (int j = 0; j < kKeys / 16; ++j) {
          products[(thread / 16 * kR + i) * kScoreStride + thread % 16 + 16 * j] = dot[i][j];
        }
      }
      __syncthreads();
      const int64_t tile_end = min(tile + kKeys, end_key);
      const auto first_here = static_cast<int>(tile / size - first);
      const auto here = static_cast<int>((tile_end - 1) / size - first) - first_here + 1;
      for (int i = thread / 32; i < kRows * here; i += kThreads / 32) {
        const int row = i / here;
        const int piece = first_here + i % here;
        const int64_t begin = max(tile, (first + piece) * size);
        const int64_t stop = min(tile_end, (first + piece + 1) * size);
        float value = pools ? 0.0F : -INFINITY;
        for (int64_t p = begin + thread % 32; p < stop; p += 32) {
          const float product = products[row * kScoreStride + static_cast<int>(p - tile)];
          value = pools ? value + product : fmaxf(value, product);
        }
        value = pools ? warp_sum(value) : warp_max(value);
        if (thread % 32 == 0) {
          float& r = together[row * count + piece];
          r = pools ? r + value : fmaxf(r, value);
        }
      }
    }
    __syncthreads();
    const auto tokens = static_cast<int>(end - t);
    const int heads = min(a.heads, layout.heads - h);
    const auto result = [&](int token, int head, int piece) {
      const float r = together[(token * a.heads + head) * count + piece];
      return pools ? r / static_cast<float>(size) : r;
    };
    for (int i = thread; i < tokens * count; i += kThreads) {
      const int token = i / count;
      const int piece = i % count;
      const bool local = first + piece >= a.in.first_local(own + token);
      if (first + piece >= a.in.candidates(own + token)) {
        continue;
      }
      if (!weighted) {
        for (int head = 0; head < heads; ++head) {
          *score_at(token, h + head, piece) = local ? INFINITY : result(token, head, piece);
        }
        continue;
      }
      float sum = h == 0 ? 0.0F : sums[i];
      for (int head = 0; head < heads; ++head) {
        sum +=
            load(a.in.weight.row(t + token) + h + head) * fmaxf(result(token, head, piece), 0.0F);
      }
      sums[i] = sum;
      if (h + a.heads >= layout.heads) {
        *score_at(token, 0, piece) = local ? INFINITY : sum;
      }
    }
  }
}

/// Blocks (pieces, tokens). A block's tokens may be of several segments.
template <int kR, class T, class K>
__global__ void __launch_bounds__(kThreads) piece_kernel(const PieceArgs<T, K> a) {
  extern __shared__ __align__(16) float shared[];
  await_inputs();
  const int64_t first = a.to.first + int64_t{blockIdx.y} * a.tokens;
  const int64_t end = min(first + a.tokens, a.to.first + a.to.count);
  for (int64_t t = first; t < end;) {
    const int s = a.segments[t];
    const int64_t stop = min(end, int64_t{a.layout.start[s + 1]});
    score_run<kR>(a, shared, s, t, stop, int64_t{blockIdx.x} * a.pieces);
    t = stop;
  }
}

template <class T, class K>
void score(const ChooseTokens<T>& a, const View<K>& keys, const bf16* scales,
           const attention::Layout& layout, const latent::Tokens& tokens, const Scores& to,
           const Launch& on) {
  const auto size = static_cast<int>(std::min<int64_t>(a.chosen.size, INT32_MAX));
  PieceArgs<T, K> args{latent::for_device(a), layout, tokens.segment, to, keys, scales};
  args.pieces = std::max(kKeys / size, 1);
  args.q_vectors = attention::aligned(a.q, 4 * sizeof(T));
  args.k_vectors = attention::aligned(keys, 4 * sizeof(K));
  const auto run = [&]<int kR>(int most_tokens) {
    args.heads = std::min(layout.heads, 16 * kR);
    args.tokens = std::min(16 * kR / args.heads, most_tokens);
    launch_ahead(on, "choose_tokens", piece_kernel<kR, T, K>,
                 dim3(static_cast<unsigned>(ceil_div(to.capacity, args.pieces)),
                      static_cast<unsigned>(ceil_div(to.count, args.tokens))),
                 dim3(kThreads), piece_shared(16 * kR, layout.head_dim, args.pieces, args.tokens),
                 args);
  };
  // Tokens that decode have keys of their own, each.
  if (tokens.singles == a.shape.segments) {
    run.template operator()<1>(1);
  } else {
    run.template operator()<4>(INT32_MAX);
  }
}

}  // namespace

template <class T>
void score_pieces(const ChooseTokens<T>& a, const attention::Layout& layout,
                  const latent::Tokens& tokens, const Scores& scores, const Launch& on) {
  if constexpr (std::is_same_v<T, bf16>) {
    if (score_pieces_on_tensor_cores(a, layout, tokens, scores, on)) {
      return;
    }
  }
  if (a.keys.scaled.defined()) {
    score(a, a.keys.scaled.rows, a.keys.scaled.scales, layout, tokens, scores, on);
  } else if (a.keys.narrow.defined()) {
    score(a, a.keys.narrow, nullptr, layout, tokens, scores, on);
  } else {
    score(a, a.keys.wide, nullptr, layout, tokens, scores, on);
  }
}
template void score_pieces(const ChooseTokens<float>&, const attention::Layout&,
                           const latent::Tokens&, const Scores&, const Launch&);
template void score_pieces(const ChooseTokens<bf16>&, const attention::Layout&,
                           const latent::Tokens&, const Scores&, const Launch&);

}  // namespace cambium::cuda::selection
