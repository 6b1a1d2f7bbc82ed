// Private to the operation on CUDA: its forms, the chunks of a call, and how tokens of a head are
// staged in shared memory.
//
//   recurrence_steps_cuda.cu           forward token by token: decode, and any dims, any T
//   recurrence_chunks_cuda.cu          forward in chunks on tensor cores: bf16, dims 64 or 128; the
//                                      form with a decay per channel
//   recurrence_chunks_channel_cuda.cu  what that needs first
//   recurrence_chunks_state_cuda.cu    its pass over the chunks in turn
//   recurrence_chunks_delta_cuda.cu    with one decay a head and the delta rule; of few heads
//                                      long segments in pieces
//   recurrence_chunks_pairs_cuda.cu    what that needs first
//   recurrence_chunks_scan_cuda.cu     with one decay a head and no delta rule: K of 256 too, and V
//                                      any multiple of 16 from 64 on
//   recurrence_backward_cuda.cu        backward token by token
//   recurrence_backward_chunks_cuda.cu backward in chunks: bf16, dims 64, 96 or 128
//   recurrence_backward_state_cuda.cu  its pass over the chunks in turn
//   recurrence_backward_keys_cuda.cu   what it does last, inside all chunks at once
//   recurrence_backward_scan_cuda.cu   all of it with one decay a head, no delta rule and V = 64
//
// Chunks are cut at multiples of kRecurrenceChunk of absolute position. A recorded forward call
// keeps the states at chunk starts (chunks, heads, K, V) and, under the delta rule, the errors
// e = v - S' k of all tokens (T, heads, V).
#pragma once

#include <memory>

#include "ops/cuda.cuh"
#include "ops/recurrence/recurrence_kernels.h"
#include "ops/segment_plans.h"

namespace cambium::cuda {

inline constexpr int kChunkTokens = 64;

/// Chunk c of a segment that stands at `position`: its first token in the segment.
constexpr int64_t chunk_begin(int64_t position, int64_t c) {
  return c == 0 ? 0 : c * kChunkTokens - position % kChunkTokens;
}
constexpr int64_t chunks_of(int64_t position, int64_t length) {
  return length == 0 ? 0 : (position % kChunkTokens + length + kChunkTokens - 1) / kChunkTokens;
}

struct ChunkSpan {
  int32_t segment;
  int32_t token;   // the first, in the packed tokens
  int32_t tokens;  // 1 to kChunkTokens
  int32_t last;    // whether the segment ends with it
};

/// The chunks of a call on the device.
struct DeviceChunks {
  const int32_t* first = nullptr;   // (segments + 1): chunks of the segments before
  const ChunkSpan* span = nullptr;  // (count)
  int64_t count = 0;
  std::shared_ptr<const void> owner;
};
DeviceChunks device_chunks(const SegmentWalk& segments, const Launch& on);
/// Their number, from the host's arrays.
int64_t count_chunks(const SegmentWalk& segments);

/// What forward leaves backward, in Recurrence::kept.
struct RecurrenceKept {
  float* states = nullptr;  // (chunks, heads, K, V)
  float* errors = nullptr;  // (T, heads, V), delta only
};
template <class T>
RecurrenceKept recurrence_kept(const Recurrence<T>& a, int64_t chunks) {
  auto* states = static_cast<float*>(a.kept);
  return {states, states != nullptr && a.delta ? states + chunks * a.state_size() : nullptr};
}

/// Segments of fewer tokens run token by token whatever else is in the call, so that a sequence's
/// results do not depend on the others.
inline constexpr int64_t kLeastChunked = 32;

/// The forward forms, for the segments of fewer than `end` tokens, and for those of at least
/// kLeastChunked. `a.segments` is the host's. Token by token `chunks` may be empty where nothing is
/// kept.
template <class T>
void recurrence_steps(const Recurrence<T>& a, const DeviceSegments& segments,
                      const DeviceChunks& chunks, int64_t end, const Launch& on);
bool recurrence_has_chunks(const Recurrence<bf16>& a);
void recurrence_chunks(const Recurrence<bf16>& a, const DeviceSegments& segments,
                       const DeviceChunks& chunks, const Launch& on);

// --- A head's state in registers. A warp holds 16 columns of S (K, V): lane l the rows
// (l / 4) * kRows ... + kRows - 1 of columns 4 (l % 4) ... + 3. So S' x sums over lanes of equal
// l % 4 and S x over the four lanes of equal l / 4, and no warp waits for another.
inline constexpr int kWarpColumns = 16;
inline constexpr int kStepWarps = 4;
inline constexpr int kStepThreads = 32 * kStepWarps;
inline constexpr int kStepColumns = kStepWarps * kWarpColumns;

template <int kRows>
inline constexpr int kStepTokens = kRows > 32 ? 4 : 8;  // staged in shared memory at a time
template <int kRows>
inline constexpr int kKeyPad = 8 * (kRows + 4);  // floats of a staged key: no bank conflicts

template <int kRows>
__device__ __forceinline__ int key_at(int i) {
  return i / kRows * (kRows + 4) + i % kRows;
}

/// Sums over the 8 lanes that hold other rows of the same columns.
__device__ __forceinline__ void sum_over_rows(float (&x)[4]) {
#pragma unroll
  for (int lanes = 4; lanes < 32; lanes *= 2) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      x[c] += __shfl_xor_sync(0xffffffffU, x[c], lanes);
    }
  }
}

/// Sums x over the 4 lanes that hold other columns of the same rows; lane l leaves the sums of rows
/// l % 4 * kRows / 4 ... of its group in `to`.
template <int kRows>
__device__ __forceinline__ void sum_over_columns(const float (&x)[kRows], float* to) {
  const int quad = static_cast<int>(threadIdx.x) % 4;
  const int group = static_cast<int>(threadIdx.x) % 32 / 4;
  constexpr int kHalf = kRows / 2;
  constexpr int kQuarter = kRows / 4;
  float half[kHalf];
  const bool upper = quad >= 2;
#pragma unroll
  for (int r = 0; r < kHalf; ++r) {
    const float sent = __shfl_xor_sync(0xffffffffU, upper ? x[r] : x[kHalf + r], 2);
    half[r] = (upper ? x[kHalf + r] : x[r]) + sent;
  }
  const bool odd = quad % 2 != 0;
  float* out = to + group * (kRows + 4) + quad * kQuarter;
#pragma unroll
  for (int r = 0; r < kQuarter; ++r) {
    const float sent = __shfl_xor_sync(0xffffffffU, odd ? half[r] : half[kQuarter + r], 1);
    out[r] = (odd ? half[kQuarter + r] : half[r]) + sent;
  }
}

/// Elements [column, column + 4) of a row of `dim`, zero past its end.
template <class T>
__device__ __forceinline__ void load_columns(const T* row, int64_t column, int64_t dim, bool wide,
                                             float (&out)[4]) {
  if (wide && column < dim) {
    load_n<4>(row + column, out);
    return;
  }
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    out[c] = column + c < dim ? load(row + column + c) : 0.0F;
  }
}
template <class T>
__device__ __forceinline__ void store_columns(T* row, int64_t column, int64_t dim, bool wide,
                                              const float (&in)[4]) {
  if (wide && column < dim) {
    store_n<4>(row + column, in);
    return;
  }
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    if (column + c < dim) {
      store(row + column + c, in[c]);
    }
  }
}

/// The place of a thread in a block of kStepColumns columns of a head.
template <int kRows>
struct StepLane {
  int64_t column;  // the first of 4
  int row;         // the first of kRows
  int key;         // that row in a staged key

  __device__ explicit StepLane(int64_t slice)
      : column(slice * kStepColumns + threadIdx.x / 32 * kWarpColumns + threadIdx.x % 4 * 4),
        row(static_cast<int>(threadIdx.x) % 32 / 4 * kRows),
        key(key_at<kRows>(row)) {}
};

template <int kRows>
__device__ __forceinline__ void load_state(const float* state, int64_t key_dim, int64_t dim,
                                           const StepLane<kRows>& at, bool wide,
                                           float (&s)[kRows][4]) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (state != nullptr && at.row + r < key_dim) {
      load_columns(state + (at.row + r) * dim, at.column, dim, wide, s[r]);
    } else {
      s[r][0] = s[r][1] = s[r][2] = s[r][3] = 0.0F;
    }
  }
}
template <int kRows>
__device__ __forceinline__ void store_state(float* state, int64_t key_dim, int64_t dim,
                                            const StepLane<kRows>& at, bool wide,
                                            const float (&s)[kRows][4]) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (at.row + r < key_dim) {
      store_columns(state + (at.row + r) * dim, at.column, dim, wide, s[r]);
    }
  }
}

/// Stages q, k and the decays of tokens [t, t + n) of head h: (kStepTokens, kKeyPad) each; rows
/// past the key dim are zero.
template <class T, int kRows>
__device__ __forceinline__ void stage_keys(const Recurrence<T>& a, int64_t t, int n, int64_t h,
                                           float* q, float* k, float* decay) {
  const int64_t key_offset = a.key_head(h) * a.key_dim;
  for (int x = static_cast<int>(threadIdx.x); x < n * 8 * kRows; x += kStepThreads) {
    const int token = x / (8 * kRows);
    const int i = x % (8 * kRows);
    const bool in = i < a.key_dim;
    const int at = token * kKeyPad<kRows> + key_at<kRows>(i);
    q[at] = in ? load(a.q.at(t + token, key_offset + i)) : 0.0F;
    k[at] = in ? load(a.k.at(t + token, key_offset + i)) : 0.0F;
    decay[at] =
        in ? expf(*a.log_decay.at(t + token, a.decay_per_channel ? h * a.key_dim + i : h)) : 0.0F;
  }
}

/// Stages columns of `from` (T, heads, dim), zero past the end: (kStepTokens, kStepColumns).
template <class T>
__device__ __forceinline__ void stage_columns(const T* from, int64_t stride, int n, int64_t slice,
                                              int64_t dim, float* to) {
  for (int x = static_cast<int>(threadIdx.x); x < n * kStepColumns; x += kStepThreads) {
    const int64_t column = slice * kStepColumns + x % kStepColumns;
    to[x] = column < dim ? load(from + x / kStepColumns * stride + column) : 0.0F;
  }
}
template <class T>
__device__ __forceinline__ void stage_weights(const Recurrence<T>& a, int64_t t, int n, int64_t h,
                                              float* to) {
  if (static_cast<int>(threadIdx.x) < n) {
    to[threadIdx.x] = a.weight.defined() ? *a.weight.at(t + threadIdx.x, h) : 1.0F;
  }
}

/// Calls f.operator()<kRows>() for the fewest rows a lane needs. Key dims past 512 have no form.
template <class F>
void with_key_rows(const char* operation, int64_t key_dim, const F& f) {
  if (key_dim <= 32) {
    f.template operator()<4>();
  } else if (key_dim <= 64) {
    f.template operator()<8>();
  } else if (key_dim <= 128) {
    f.template operator()<16>();
  } else if (key_dim <= 256) {
    f.template operator()<32>();
  } else if (key_dim <= 512) {
    f.template operator()<64>();
  } else {
    check_launch(operation, {}, {}, 0, cudaErrorInvalidValue);
  }
}

}  // namespace cambium::cuda
