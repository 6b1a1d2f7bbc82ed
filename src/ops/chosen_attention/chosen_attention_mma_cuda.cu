// Attention to chosen keys on tensor cores: bf16, keys and values of the same number of channels,
// up to 128. A block has a token and up to kRows of the heads that read one head of keys. Each of
// its warps walks tiles of kKeys keys of its own, which it copies itself while it computes the tile
// before, and has a running softmax of its own; these are brought together at the end.
#include "ops/attention/attention_softmax.cuh"
#include "ops/chosen_attention/chosen_cuda.cuh"

namespace cambium::cuda::chosen {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kKeys = 16;  // of a warp's tile
constexpr int kStages = 2;

struct Args {
  ChosenAttention<bf16> in;
  attention::Layout layout;
  Calls calls;
  latent::Partials partials;
};

/// Queries, then for each warp and stage keys and values; in their place the warps' sums at the
/// end.
template <int kDim>
struct Shared {
  static constexpr int kRow = attention::shared_row(kDim);
  union {
    struct {
      bf16 queries[kRows * kRow];
      bf16 tiles[kWarps][kStages][2][kKeys * kRow];
    };
    float y[kWarps][kRows][kDim];
  };
  float largest[kWarps][kRows];  // times the scale
  float sum[kWarps][kRows];
};

template <int kDim>
__global__ void __launch_bounds__(kThreads, 3) mma_kernel(const Args a) {
  constexpr int kRow = Shared<kDim>::kRow;
  constexpr int kChunks = kDim / 8;  // of 16 bytes, of a row
  extern __shared__ __align__(16) float memory[];
  Shared<kDim>& shared = *reinterpret_cast<Shared<kDim>*>(memory);
  await_inputs();
  const attention::Layout& layout = a.layout;
  Work work;
  if (!find_work(a.in, layout, a.calls, a.partials, work)) {
    return;
  }
  const View<bf16>& k = a.in.k.wide;
  const View<bf16>& v = a.in.v.wide;
  const auto thread = static_cast<int>(threadIdx.x);
  const int warp = thread / 32;
  const int lane = thread % 32;
  const int dim = layout.head_dim;
  const auto tiles = static_cast<int>((work.end - work.first + kKeys - 1) / kKeys);
  // The row of key lane % kKeys of a tile.
  const auto find_row = [&](int tile) -> int64_t {
    const int64_t i = work.first + int64_t{tile} * kKeys + lane % kKeys;
    return i < work.end
               ? layout.key_row(work.segment, static_cast<int>(a.in.chosen.position(work.list, i)))
               : -1;
  };
  const auto copy_tile = [&](int stage, int64_t row) {
    bf16* keys = shared.tiles[warp][stage][0];
    bf16* values = shared.tiles[warp][stage][1];
#pragma unroll
    for (int i = 0; i < kKeys * kChunks / 32; ++i) {
      const int r = (i * 32 + lane) / kChunks;
      const int d = (i * 32 + lane) % kChunks * 8;
      const int64_t from = __shfl_sync(0xffffffffU, row, r);
      const bool exists = from >= 0 && d < dim;
      copy_16(keys + r * kRow + d, exists ? k.row(from, work.kv_head) + d : k.data, exists);
      copy_16(values + r * kRow + d, exists ? v.row(from, work.kv_head) + d : v.data, exists);
    }
  };
  attention::copy_rows<kDim, kThreads>(
      shared.queries, kRows, a.in.q.data, dim, [&](int r) -> int64_t {
        return r < work.rows ? a.in.q.rows.offset(work.t, work.head + r) : -1;
      });
  copy_tile(0, find_row(warp));
  commit_copies();
  int64_t next = find_row(warp + kWarps);
  wait_for_copies<0>();
  __syncthreads();  // the queries are there
  const float scale = attention::positive_scale(layout);
  attention::Softmax<kDim, 1> softmax;
  softmax.start();
  int stage = 0;
  for (int tile = warp; tile < tiles; tile += kWarps) {
    copy_tile(stage ^ 1, next);
    commit_copies();
    next = find_row(tile + 2 * kWarps);
    wait_for_copies<1>();
    __syncwarp();
    float s[1][kKeys / 8][4] = {};
    attention::scores_of<kDim, 1, kKeys / 8>(shared.queries, shared.tiles[warp][stage][0], s);
    const auto here = static_cast<int>(work.end - work.first) - tile * kKeys;
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        s[0][n][e] = n * 8 + lane % 4 * 2 + e % 2 < here ? s[0][n][e] : -INFINITY;
      }
    }
    softmax.add_scores(scale, s);
    attention::add_values<kDim, 1, kKeys / 8>(s, shared.tiles[warp][stage][1], softmax.y);
    __syncwarp();  // the tile has been read
    stage ^= 1;
  }
  softmax.finish();
  wait_for_copies<0>();
  __syncthreads();  // all tiles have been read
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = lane / 4 + 8 * half;
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
      shared.y[warp][r][n * 8 + lane % 4 * 2] = softmax.y[0][n][2 * half];
      shared.y[warp][r][n * 8 + lane % 4 * 2 + 1] = softmax.y[0][n][2 * half + 1];
    }
    if (lane % 4 == 0) {
      shared.largest[warp][r] = softmax.largest[half] * layout.scale;
      shared.sum[warp][r] = softmax.sum[half];
    }
  }
  __syncthreads();
  for (int i = thread; i < work.rows * kDim; i += kThreads) {
    const int r = i / kDim;
    const int column = i % kDim;
    float largest = -INFINITY;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      largest = fmaxf(largest, shared.largest[w][r]);
    }
    float sum = 0.0F;
    float value = 0.0F;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      // A warp without keys has no largest score.
      const float own = shared.largest[w][r];
      const float factor = own == -INFINITY ? 0.0F : expf(own - largest);
      sum += factor * shared.sum[w][r];
      value += factor * shared.y[w][r][column];
    }
    if (column == 0) {
      store_sums(a.in, a.partials, work, r, largest, sum);
    }
    if (column < dim) {
      store_value(a.in, a.partials, work, r, column, value, sum);
    }
  }
}

}  // namespace

bool forward_on_tensor_cores(const ChosenAttention<bf16>& a, const latent::Tokens& tokens,
                             const latent::Partials& partials, const Launch& on) {
  const AttentionShape& shape = a.shape;
  const auto suits = [](const View<bf16>& x) { return x.defined() && attention::aligned(x, 16); };
  if (shape.head_dim != shape.value_dim || shape.head_dim > 128 || shape.scale <= 0.0F ||
      !suits(a.q) || !suits(a.k.wide) || !suits(a.v.wide)) {
    return false;
  }
  const attention::DeviceLayout layout = attention::layout_of(shape, on);
  const Args args{latent::for_device(a), layout.layout, {tokens.segment, tokens.single}, partials};
  const bool narrow = shape.head_dim <= 64;
  launch_ahead(on, "chosen_attention", narrow ? mma_kernel<64> : mma_kernel<128>,
               blocks_of(a, partials), dim3(kThreads),
               narrow ? sizeof(Shared<64>) : sizeof(Shared<128>), args);
  return true;
}

}  // namespace cambium::cuda::chosen
