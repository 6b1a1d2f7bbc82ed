// What the CUDA kernels of attention to chosen keys share: what a block computes.
#pragma once

#include "ops/attention/attention_cuda.cuh"
#include "ops/chosen_attention/chosen_attention_kernels.h"
#include "ops/latent_attention/latent_cuda.cuh"

namespace cambium::cuda::chosen {

/// Heads of a block, all of which read one head of keys.
inline constexpr int kRows = 16;

/// Blocks (heads of keys, kRows of a group at a time; T).
template <class T>
dim3 blocks_of(const ChosenAttention<T>& a) {
  const AttentionShape& shape = a.shape;
  return dim3(static_cast<unsigned>(shape.kv_heads * ceil_div(shape.group(), kRows)),
              static_cast<unsigned>(a.q.rows.outer));
}

struct Work {
  int64_t t;
  int segment;
  int kv_head;
  int head;  // the first of `rows`
  int rows;
  int64_t list;
  int64_t count;  // of the list's keys
};
template <class T>
__device__ __forceinline__ Work find_work(const ChosenAttention<T>& a,
                                          const attention::Layout& layout,
                                          const int32_t* segments) {
  Work work;
  work.t = blockIdx.y;
  work.kv_head = static_cast<int>(blockIdx.x) % layout.kv_heads;
  const int in_group = static_cast<int>(blockIdx.x) / layout.kv_heads * kRows;
  work.head = work.kv_head * layout.group + in_group;
  work.rows = min(layout.group - in_group, kRows);
  work.segment = segments[work.t];
  work.list = a.list(work.t, work.kv_head);
  work.count = a.chosen.count(layout.position[work.segment] + work.t - layout.start[work.segment]);
  return work;
}

/// Keeps row r's largest score, and the sum of exp(score - largest), where backward wants them.
template <class T>
__device__ __forceinline__ void keep_sums(const ChosenAttention<T>& a, const Work& work, int r,
                                          float largest, float sum) {
  if (a.largest != nullptr) {
    const int64_t row = work.t * a.shape.heads + work.head + r;
    a.largest[row] = largest;
    a.inverse_sum[row] = 1.0F / sum;
  }
}

/// On tensor cores; false where the sizes do not suit (chosen_attention_mma_cuda.cu).
bool forward_on_tensor_cores(const ChosenAttention<bf16>& a, const Launch& on);

}  // namespace cambium::cuda::chosen
