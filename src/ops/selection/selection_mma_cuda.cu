// The scores of the choice on tensor cores: bf16, an index whose keys have 128 numbers. A block has
// a token and kKeys keys, a warp 16 of them as rows of products with the token's queries, 64 heads
// at a time.
#include "ops/attention/attention_mma.cuh"
#include "ops/selection/selection_cuda.cuh"

namespace cambium::cuda::selection {
namespace {

constexpr int kThreads = 256;
constexpr int kDim = 128;
constexpr int kKeys = 128;
constexpr int kHeads = 64;  // at a time
constexpr int kRow = attention::shared_row(kDim);

struct Shared {
  bf16 keys[kKeys * kRow];
  bf16 queries[kHeads * kRow];
  float weights[kHeads];
  int64_t rows[kKeys];
};

__global__ void __launch_bounds__(kThreads, 3)
    mma_kernel(ChooseTokens<bf16> a, attention::Layout layout, const int32_t* segments,
               Scores scores) {
  extern __shared__ __align__(16) float shared[];
  Shared& to = *reinterpret_cast<Shared*>(shared);
  await_inputs();
  const int64_t t = scores.first + blockIdx.y;
  const int s = segments[t];
  const int64_t own = layout.position[s] + t - layout.start[s];
  const int64_t begin = int64_t{blockIdx.x} * kKeys;
  if (begin > own || own < a.chosen.budget) {
    return;
  }
  const auto thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32;
  const int warp = thread / 32;
  if (thread < kKeys) {
    const int64_t p = begin + thread;
    to.rows[thread] = p <= own ? layout.key_row(s, static_cast<int>(p)) : -1;
  }
  __syncthreads();
  attention::copy_rows<kDim, kThreads>(to.keys, kKeys, a.keys.wide.data, kDim,
                                       [&](int r) -> int64_t {
                                         const int64_t row = to.rows[r];
                                         return row < 0 ? -1 : row * a.keys.wide.rows.outer_stride;
                                       });
  float sum[2] = {};  // of keys lane / 4 and lane / 4 + 8 of the warp's
  for (int h = 0; h < layout.heads; h += kHeads) {
    if (h > 0) {
      __syncthreads();  // the queries before have been read
    }
    attention::copy_rows<kDim, kThreads>(to.queries, kHeads, a.q.data, kDim, [&](int r) -> int64_t {
      return h + r < layout.heads ? a.q.rows.offset(t, h + r) : -1;
    });
    commit_copies();
    if (thread < kHeads) {
      to.weights[thread] = h + thread < layout.heads ? load(a.weight.row(t) + h + thread) : 0.0F;
    }
    wait_for_copies<0>();
    __syncthreads();
    float dot[1][kHeads / 8][4] = {};
    attention::scores_of<kDim, 1, kHeads / 8>(to.keys + warp * 16 * kRow, to.queries, dot);
#pragma unroll
    for (int n = 0; n < kHeads / 8; ++n) {
#pragma unroll
      for (int x = 0; x < 4; ++x) {
        sum[x / 2] += to.weights[n * 8 + lane % 4 * 2 + x % 2] * fmaxf(dot[0][n][x], 0.0F);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    sum[i] += __shfl_xor_sync(0xffffffffU, sum[i], 1);
    sum[i] += __shfl_xor_sync(0xffffffffU, sum[i], 2);
    const int64_t p = begin + warp * 16 + i * 8 + lane / 4;
    if (lane % 4 == 0 && p <= own) {
      scores.rows[int64_t{blockIdx.y} * scores.capacity + p] = sum[i];
    }
  }
}

}  // namespace

bool score_on_tensor_cores(const ChooseTokens<bf16>& a, const attention::Layout& layout,
                           const latent::Tokens& tokens, const Scores& scores, const Launch& on) {
  if (a.shape.head_dim != kDim || !a.keys.wide.defined() || !aligned(a.keys.wide) ||
      a.keys.wide.rows.inner != 1 || !aligned(a.q)) {
    return false;
  }
  if (score_by_warpgroups(a, layout, tokens, scores, on)) {
    return true;
  }
  launch_ahead(on, "choose_tokens", mma_kernel,
               dim3(static_cast<unsigned>(ceil_div(scores.capacity, kKeys)),
                    static_cast<unsigned>(scores.count)),
               dim3(kThreads), sizeof(Shared), latent::for_device(a), layout, tokens.segment,
               scores);
  return true;
}

}  // namespace cambium::cuda::selection
