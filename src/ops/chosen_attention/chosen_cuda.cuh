// What the CUDA kernels of attention to chosen keys share: what a block computes, and where its
// results go.
#pragma once

#include "ops/attention/attention_cuda.cuh"
#include "ops/chosen_attention/chosen_attention_kernels.h"
#include "ops/latent_attention/latent_cuda.cuh"

namespace cambium::cuda::chosen {

/// Heads of a block, all of which read one head of keys.
inline constexpr int kRows = 16;
/// Keys of a part of a decoding token's.
inline constexpr int kPartKeys = 128;

/// The call's tokens, as latent::Tokens has them.
struct Calls {
  const int32_t* segment;
  const int32_t* single;
};

/// Blocks (heads of keys, kRows of a group at a time; T; parts).
template <class T>
dim3 blocks_of(const ChosenAttention<T>& a, const latent::Partials& partials) {
  const AttentionShape& shape = a.shape;
  return dim3(static_cast<unsigned>(shape.kv_heads * ceil_div(shape.group(), kRows)),
              static_cast<unsigned>(a.q.rows.outer), static_cast<unsigned>(partials.parts));
}

struct Work {
  int64_t t;
  int segment;
  int kv_head;
  int head;  // the first of `rows`
  int rows;
  int64_t list;
  int64_t first, end;  // of the list's keys
  int64_t at;          // of the first head's partial result; -1: the block has all keys
};
/// False where the block has nothing to do.
template <class T>
__device__ __forceinline__ bool find_work(const ChosenAttention<T>& a,
                                          const attention::Layout& layout, const Calls& calls,
                                          const latent::Partials& partials, Work& work) {
  work.t = blockIdx.y;
  work.kv_head = static_cast<int>(blockIdx.x) % layout.kv_heads;
  const int in_group = static_cast<int>(blockIdx.x) / layout.kv_heads * kRows;
  work.head = work.kv_head * layout.group + in_group;
  work.rows = min(layout.group - in_group, kRows);
  const int single = calls.single[work.t];
  const auto part = static_cast<int>(blockIdx.z);
  if (part > 0 && single < 0) {
    return false;
  }
  const bool whole = partials.parts == 1 || single < 0;
  work.segment = calls.segment[work.t];
  const int64_t own = layout.position[work.segment] + work.t - layout.start[work.segment];
  const int64_t count = a.chosen.count(own);
  work.list = a.list(work.t, work.kv_head);
  work.first = whole ? 0 : int64_t{part} * kPartKeys;
  work.end = whole ? count : min(count, work.first + kPartKeys);
  work.at = whole ? -1 : (int64_t{single} * partials.parts + part) * layout.heads + work.head;
  return true;
}

/// Row r's largest score, and the sum of exp(score - largest).
template <class T>
__device__ __forceinline__ void store_sums(const ChosenAttention<T>& a,
                                           const latent::Partials& partials, const Work& work,
                                           int r, float largest, float sum) {
  if (work.at >= 0) {
    partials.largest[work.at + r] = largest;
    partials.sum[work.at + r] = sum;
  } else if (a.largest != nullptr) {
    const int64_t row = work.t * a.shape.heads + work.head + r;
    a.largest[row] = largest;
    a.inverse_sum[row] = 1.0F / sum;
  }
}
/// Column `column` of its sum of exp(score - largest) value.
template <class T>
__device__ __forceinline__ void store_value(const ChosenAttention<T>& a,
                                            const latent::Partials& partials, const Work& work,
                                            int r, int column, float value, float sum) {
  if (work.at >= 0) {
    partials.y[(work.at + r) * a.shape.value_dim + column] = value;
  } else {
    store(a.y.row(work.t, work.head + r) + column, value / sum);
  }
}

/// On tensor cores; false where the sizes do not suit (chosen_attention_mma_cuda.cu).
bool forward_on_tensor_cores(const ChosenAttention<bf16>& a, const latent::Tokens& tokens,
                             const latent::Partials& partials, const Launch& on);

}  // namespace cambium::cuda::chosen
