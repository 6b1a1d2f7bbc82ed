// The scores of blocks and pools on tensor cores: bf16, lists by head, pieces of whole tiles of 64
// keys. A block of threads has up to 64 rows, tokens with their heads, 16 a warp, and walks the
// keys of some pieces; the next tile is on its way while one is read. A score does not depend on
// the rows beside it, so that a token has the same however a call is cut.
#include "ops/attention/attention_mma.cuh"
#include "ops/selection/selection_cuda.cuh"

namespace cambium::cuda::selection {
namespace {

constexpr int kThreads = 128;
constexpr int kDim = 128;
constexpr int kRows = 64;
constexpr int kKeys = 64;
constexpr int kRow = attention::shared_row(kDim);
/// Keys of a block's pieces, about: where many tokens have them in common, and where each token
/// that decodes has its own, all of which are read once.
constexpr int kKeysOfBlock = 1024;
constexpr int kKeysOfSingle = 256;

struct Shared {
  bf16 queries[kRows * kRow];
  bf16 keys[2][kKeys * kRow];
  int64_t rows[2][kKeys];
};

struct Args {
  ChooseTokens<bf16> in;
  attention::Layout layout;
  const int32_t* segments;
  Scores to;
  int pieces;  // of a block
  int tokens;
};

/// Tokens [t, end) of segment s, and pieces from `first` on.
__device__ void score_run(const Args& a, Shared& shared, int s, int64_t t, int64_t end,
                          int64_t first) {
  const attention::Layout& layout = a.layout;
  const auto size = static_cast<int>(a.in.chosen.size);
  const int heads = layout.heads;
  const int64_t own = layout.position[s] + t - layout.start[s];  // of the first token
  const int64_t last = own + (end - t) - 1;
  const int64_t candidates = a.in.candidates(last);
  if (first >= candidates || candidates <= a.in.top()) {
    return;
  }
  const int64_t stop = min(first + a.pieces, candidates);
  // What is local for the last token is so for all, or lies after them.
  const int64_t scored = min(stop, a.in.first_local(last));
  const auto thread = static_cast<int>(threadIdx.x);
  const int warp = thread / 32;
  const int lane = thread % 32;
  const auto place_of = [&](int row, int64_t piece) {
    const int64_t of_list = (t - a.to.first) * a.in.chosen.lists + row;
    return a.to.rows + of_list * a.to.capacity + piece;
  };
  const auto rows = static_cast<int>(end - t) * heads;
  const auto is_local = [&](int row, int64_t piece) {
    return piece >= a.in.first_local(own + row / heads);
  };
  for (int i = thread; scored < stop && i < rows * static_cast<int>(stop - scored); i += kThreads) {
    const int row = i / static_cast<int>(stop - scored);
    const int64_t piece = max(scored, first) + i % static_cast<int>(stop - scored);
    if (piece < stop) {
      *place_of(row, piece) = INFINITY;
    }
  }
  if (first >= scored) {
    return;
  }
  const int64_t first_key = first * size;
  const auto tiles = static_cast<int>((scored - first) * size / kKeys);
  const auto find_rows = [&](int tile) {
    if (thread < kKeys && tile < tiles) {
      shared.rows[tile % 2][thread] =
          layout.key_row(s, static_cast<int>(first_key + int64_t{tile} * kKeys + thread));
    }
  };
  const auto copy_keys = [&](int tile) {
    attention::copy_rows<kDim, kThreads>(
        shared.keys[tile % 2], kKeys, a.in.keys.wide.data, layout.head_dim, [&](int r) -> int64_t {
          return shared.rows[tile % 2][r] * a.in.keys.wide.rows.outer_stride;
        });
  };
  __syncthreads();  // what was computed before has been read
  find_rows(0);
  attention::copy_rows<kDim, kThreads>(
      shared.queries, kRows, a.in.q.data, layout.head_dim, [&](int r) -> int64_t {
        return r < rows ? a.in.q.rows.offset(t + r / heads, r % heads) : -1;
      });
  __syncthreads();
  copy_keys(0);
  commit_copies();
  find_rows(1);
  const bool pools = a.in.chosen.tail;
  const float nothing = pools ? 0.0F : -INFINITY;
  float together[2] = {nothing, nothing};  // of rows lane / 4 and lane / 4 + 8 of the warp's
  for (int tile = 0; tile < tiles; ++tile) {
    __syncthreads();  // the rows of the next tile are there, and the tile before has been read
    if (tile + 1 < tiles) {
      copy_keys(tile + 1);
    }
    commit_copies();
    wait_for_copies<1>();
    __syncthreads();
    find_rows(tile + 2);
    if (warp * 16 >= rows) {
      continue;
    }
    float dot[1][kKeys / 8][4] = {};
    attention::scores_of<kDim, 1, kKeys / 8>(shared.queries + warp * 16 * kRow,
                                             shared.keys[tile % 2], dot);
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float& r = together[e / 2];
        r = pools ? r + dot[0][n][e] : fmaxf(r, dot[0][n][e]);
      }
    }
    const int64_t keys = (int64_t{tile} + 1) * kKeys;
    if (keys % size != 0) {
      continue;
    }
    const int64_t piece = first + keys / size - 1;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float r = together[half];
#pragma unroll
      for (int lanes = 1; lanes < 4; lanes *= 2) {
        const float other = __shfl_xor_sync(0xffffffffU, r, lanes);
        r = pools ? r + other : fmaxf(r, other);
      }
      const int row = warp * 16 + half * 8 + lane / 4;
      if (lane % 4 == 0 && row < rows) {
        *place_of(row, piece) = is_local(row, piece) ? INFINITY
                                : pools              ? r / static_cast<float>(size)
                                                     : r;
      }
      together[half] = nothing;
    }
  }
  wait_for_copies<0>();
}

/// Blocks (pieces, tokens). A block's tokens may be of several segments.
__global__ void __launch_bounds__(kThreads) pieces_mma_kernel(const Args a) {
  extern __shared__ __align__(16) float memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  await_inputs();
  const int64_t first = a.to.first + int64_t{blockIdx.y} * a.tokens;
  const int64_t end = min(first + a.tokens, a.to.first + a.to.count);
  for (int64_t t = first; t < end;) {
    const int s = a.segments[t];
    const int64_t stop = min(end, int64_t{a.layout.start[s + 1]});
    score_run(a, shared, s, t, stop, int64_t{blockIdx.x} * a.pieces);
    t = stop;
  }
}

}  // namespace

bool score_pieces_on_tensor_cores(const ChooseTokens<bf16>& a, const attention::Layout& layout,
                                  const latent::Tokens& tokens, const Scores& scores,
                                  const Launch& on) {
  const auto suits = [](const View<bf16>& x) { return x.defined() && attention::aligned(x, 16); };
  if (a.weight.defined() || a.chosen.size % kKeys != 0 || layout.heads > kRows ||
      layout.head_dim > kDim || layout.head_dim % 8 != 0 || !suits(a.q) || !suits(a.keys.wide) ||
      a.keys.wide.rows.inner != 1) {
    return false;
  }
  const bool singles = tokens.singles == a.shape.segments;
  Args args{latent::for_device(a), layout, tokens.segment, scores, 1};
  args.pieces = static_cast<int>(
      std::max<int64_t>((singles ? kKeysOfSingle : kKeysOfBlock) / a.chosen.size, 1));
  args.tokens = singles ? 1 : kRows / layout.heads;
  launch_ahead(on, "choose_tokens", pieces_mma_kernel,
               dim3(static_cast<unsigned>(ceil_div(scores.capacity, args.pieces)),
                    static_cast<unsigned>(ceil_div(scores.count, args.tokens))),
               dim3(kThreads), sizeof(Shared), args);
  return true;
}

}  // namespace cambium::cuda::selection
