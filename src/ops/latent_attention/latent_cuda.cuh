// What the CUDA kernels of latent attention share: loads of rows, and which tokens decode.
#pragma once

#include "ops/attention/attention_cuda.cuh"
#include "ops/latent_attention/latent_attention_kernels.h"

namespace cambium::cuda::latent {

inline constexpr int kThreads = 256;
/// Heads of a block, a warp each.
inline constexpr int kHeads = 8;
/// Keys of a tile, a lane each; fewer where a block may have less shared memory (kLanes).
inline constexpr int kTile = 32;

/// The arguments without what is the host's: the same bytes in every step that is queued alike.
template <class Args>
Args for_device(Args args) {
  args.shape.start = args.shape.position = args.shape.table = nullptr;
  args.shape.plans = nullptr;
  return args;
}

/// Number d of a row, in fp32.
template <class T>
__device__ __forceinline__ float number(const KeyRows<T>& keys, int64_t row, int d) {
  if (keys.scaled.defined()) {
    const auto size = static_cast<int>(keys.scaled.rows.channels);
    return widen(from_scaled(keys.scaled.rows.row(row, d / size)[d % size],
                             *keys.scaled.scale(row, d / size)));
  }
  return keys.narrow.defined() ? load(keys.narrow.at(row, d)) : load(keys.wide.at(row, d));
}

/// Shared rows have an odd number of floats, so that lanes that read one column of 32 rows meet no
/// bank twice.
__host__ __device__ constexpr int odd(int n) {
  return n | 1;
}

/// Tokens of the call and how many of them are segments of their own, on the device.
struct Tokens {
  const int32_t* segment;  // (T)
  const int32_t* single;   // (T): the number among those that are a segment alone, or -1
  int64_t singles;
  std::shared_ptr<const void> owner;
};
Tokens tokens_of(const AttentionShape& shape, const Launch& on);

/// Results of parts: for decoding token i, part p and head h at (i * parts + p) * H + h.
struct Partials {
  float* y = nullptr;        // (.., R): sums of exp(score - largest) latent
  float* largest = nullptr;  // (..)
  float* sum = nullptr;      // (..)
  int64_t parts = 1;
};
/// For `blocks` blocks a part, of which the device holds `fill` at once; parts have `least` keys or
/// more, but those that are the same whatever else is in the call.
template <class T>
Partials make_partials(const LatentAttention<T>& a, const Tokens& tokens, int64_t blocks,
                       int64_t least, int64_t fill, const Launch& on);
/// Those of decoding tokens added in order to y (T, H, R), where there are more than one; a launch
/// that fails is named as `operation`'s.
template <class T>
void add_parts(const char* operation, const View<T>& y, const Tokens& tokens,
               const Partials& partials, const Launch& on);

/// Of `count` keys, those of one of so many parts, which begin at multiples of `tile`.
struct KeyRange {
  int64_t first, end;
};
__device__ __forceinline__ KeyRange keys_of_part(int64_t count, int64_t tile, int64_t part,
                                                 int64_t parts) {
  const int64_t each = ((count + tile - 1) / tile + parts - 1) / parts * tile;
  return {min(count, part * each), min(count, (part + 1) * each)};
}

/// Rows of kCount keys of a segment, kStep apart from position `first` + `from` on; -1 from `end`
/// on. `first` is a multiple of kCount kStep: where that divides a page, the table is asked once.
template <int kCount, int kStep>
__device__ __forceinline__ void find_rows(const attention::Layout& layout, int s, int64_t first,
                                          int from, int64_t end, int64_t (&rows)[kCount]) {
  const bool together = layout.table == nullptr || layout.page_size % (kCount * kStep) == 0;
  const int64_t row =
      together && first < end ? layout.key_row(s, static_cast<int>(first)) + from : 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int64_t p = first + from + i * kStep;
    rows[i] = p >= end ? -1 : together ? row + i * kStep : layout.key_row(s, static_cast<int>(p));
  }
}

/// On tensor cores; false where the sizes do not suit (latent_attention_mma_cuda.cu).
bool forward_on_tensor_cores(const LatentAttention<bf16>& a, const Tokens& tokens,
                             const Launch& on);
/// The same sizes by warpgroups; false where the device has none (latent_attention_wgmma_cuda.cu).
bool forward_by_warpgroups(const LatentAttention<bf16>& a, const Tokens& tokens, const Launch& on);

/// The latent and the rotated key of kRows rows, one row a warp at a time; zeros where row_of says
/// -1.
template <int kRows = kTile, class T, class RowOf>
__device__ void load_keys(const LatentAttention<T>& a, float* to, const RowOf& row_of) {
  const auto rank = static_cast<int>(a.shape.value_dim);
  const auto all = static_cast<int>(a.shape.head_dim);
  const int stride = odd(all);
  for (int r = static_cast<int>(threadIdx.x) / 32; r < kRows; r += kThreads / 32) {
    const int64_t row = row_of(r);
    for (int d = static_cast<int>(threadIdx.x) % 32; d < all; d += 32) {
      to[r * stride + d] = row < 0    ? 0.0F
                           : d < rank ? number(a.latent, row, d)
                                      : number(a.rope_key, row, d - rank);
    }
  }
}

/// delta (T, H): y . dy of an operation's arguments. A warp a head of a token.
template <class Args>
__global__ void __launch_bounds__(kThreads) delta_kernel(Args a, float* delta) {
  const int64_t row = int64_t{blockIdx.x} * (kThreads / 32) + threadIdx.x / 32;
  if (row >= a.y.count()) {
    return;
  }
  float sum = 0.0F;
  for (int64_t c = threadIdx.x % 32; c < a.shape.value_dim; c += 32) {
    sum += load(a.y.row(row) + c) * load(a.y.grad_row(row) + c);
  }
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) {
    delta[row] = sum;
  }
}

__device__ __forceinline__ float dot(const float* a, const float* b, int n) {
  float even = 0.0F;
  float odd_sum = 0.0F;
  int d = 0;
#pragma unroll 4
  for (; d + 1 < n; d += 2) {
    even += a[d] * b[d];
    odd_sum += a[d + 1] * b[d + 1];
  }
  return d < n ? even + a[d] * b[d] + odd_sum : even + odd_sum;
}

}  // namespace cambium::cuda::latent
