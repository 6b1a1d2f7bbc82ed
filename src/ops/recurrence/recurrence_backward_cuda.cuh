// Private to the backward in chunks on CUDA (bf16): what its kernels hand on to each other, and
// tiles they share.
//
// A chunk of 64 tokens is four blocks of 16. With l_i the sum of log decays of a block's tokens up
// to i, and B_b the sum of all before block b, the decay between two tokens is
//
//   exp(G_i - G_j) = exp(l_i) exp(B_b - B_(m+1)) exp(l_last - l_j),   i in block b, j in block m
//
// per channel. For m < b no factor is above 1. For m = b the second is exp(-l_last), which is taken
// where it is below 2^kStrongDecay in all channels: the first and the third take it back. Where a
// block decays more, its own pairs are taken one by one. Sums of log decays are of base 2 in code:
// one instruction makes a decay of them.
#pragma once

#include "ops/recurrence/recurrence_cuda.cuh"
#include "ops/recurrence/recurrence_mma.cuh"

namespace cambium::cuda {

inline constexpr int kBlockTokens = 16;
inline constexpr int kChunkBlocks = kChunkTokens / kBlockTokens;
inline constexpr int kPairRow = kChunkTokens + 8;  // in shared memory: no bank conflicts
// Shared memory that a block of these kernels may take; devices with less walk token by token.
inline constexpr size_t kBackwardShared = 128 * 1024;
inline constexpr float kStrongDecay = 80.0F;
// Decays below are zero in fp32 in any case, and infinities have no differences.
inline constexpr float kLeastLogDecay = -120.0F;

/// A log decay of base 2.
__device__ __forceinline__ float log2_decay(const float* log_decay) {
  return fmaxf(*log_decay, kLeastLogDecay) * 1.4426950408889634F;
}

// Each (chunks, heads, ...).
struct BackwardParts {
  float* sums;    // (64, K) l, or (64) with one decay per head
  bf16* queries;  // (64, K) exp(G) q
  bf16* reads;    // (64, K) -w exp(G) k; delta only
  // du, the gradient by w e, is values + keys dS for the gradient dS by the state after the chunk.
  bf16* keys;     // (64, K)
  bf16* values;   // (64, V)
  float* totals;  // (K) exp(G_last)
  bf16* du;       // (V, 64) transposed
  bf16* states;   // (V, K) dS transposed
  // Where value heads share keys: the gradients by q and k of each, (T, heads, K); else null.
  float* dq_heads;
  float* dk_heads;
};

__device__ __forceinline__ uint32_t scale_pair(uint32_t pair, float first, float second) {
  return pack(first_of(pair) * first, second_of(pair) * second);
}
/// Adds pair(n) to columns 8 n and the next of a row, n < kPairs.
template <int kPairs, class Pair>
__device__ __forceinline__ void add_pairs(bf16* row, const Pair& pair) {
  uint32_t before[kPairs];
#pragma unroll
  for (int n = 0; n < kPairs; ++n) {
    before[n] = *reinterpret_cast<const uint32_t*>(row + 8 * n);
  }
#pragma unroll
  for (int n = 0; n < kPairs; ++n) {
    const float2 more = pair(n);
    *reinterpret_cast<uint32_t*>(row + 8 * n) =
        pack(first_of(before[n]) + more.x, second_of(before[n]) + more.y);
  }
}

/// What a block of a grid of (chunks, heads) has, in 32 bits: quotients of 64 take long.
struct ChunkHead {
  int chunk, head, key_head;

  __device__ explicit ChunkHead(const Recurrence<bf16>& a) {
    const auto heads = static_cast<unsigned>(a.heads);
    chunk = static_cast<int>(blockIdx.x / heads);
    head = static_cast<int>(blockIdx.x % heads);
    key_head = head / static_cast<int>(heads / static_cast<unsigned>(a.key_heads));
  }
};

/// Copies `rows` rows of kDim elements in the background, `from_stride` apart, to rows `to_stride`
/// apart; those from `valid` on are zero.
template <int kDim, int kThreads>
__device__ __forceinline__ void copy_rows_to(const bf16* from, int64_t from_stride, int valid,
                                             int rows, bf16* to, int to_stride) {
  constexpr int kPieces = kDim / 8;
  for (int x = static_cast<int>(threadIdx.x); x < rows * kPieces; x += kThreads) {
    const int row = x / kPieces;
    const bool exists = row < valid;
    copy_16(to + row * to_stride + x % kPieces * 8,
            from + (exists ? row * from_stride + x % kPieces * 8 : 0), exists);
  }
}

/// Whether the backward of `a` has the form in chunks; `a.segments` is the host's.
bool recurrence_has_backward_chunks(const Recurrence<bf16>& a);
/// All gradients, but that by skip where it has no form of its own; `a.segments` is the device's,
/// a.y.rows.outer the tokens.
void recurrence_backward_chunks(const Recurrence<bf16>& a, const DeviceChunks& chunks,
                                const Launch& on);
/// Its pass over the chunks (recurrence_backward_state_cuda.cu): du and dS.
void recurrence_backward_walk(const Recurrence<bf16>& a, const DeviceChunks& chunks,
                              const BackwardParts& parts, const Launch& on);
/// Its last kernel (recurrence_backward_keys_cuda.cu): from du, dS and the kept states everything
/// inside the chunks.
void recurrence_backward_inside(const Recurrence<bf16>& a, const DeviceChunks& chunks,
                                const BackwardParts& parts, const Launch& on);

/// Whether it has a form of its own (recurrence_backward_scan_cuda.cu): one decay a head, no delta
/// rule, dims of Mamba-2. Of the form in chunks it is one.
bool recurrence_has_backward_scan(const Recurrence<bf16>& a);
/// All gradients, that by skip too. In how many parts (T, key heads, shares, K) that leaves the
/// gradients by q and k where there is more than one; else `dq_parts` and `dk_parts` are null.
int64_t recurrence_backward_shares(const Recurrence<bf16>& a, const DeviceChunks& chunks);
void recurrence_backward_scan(const Recurrence<bf16>& a, const DeviceChunks& chunks, int64_t shares,
                              float* dq_parts, float* dk_parts, const Launch& on);

/// Calls f.operator()<K, V>() for the dims of a head.
template <class F>
void with_head_dims(int64_t key_dim, int64_t dim, const F& f) {
  const auto with_key = [&]<int kKey>() {
    if (dim == 64) {
      f.template operator()<kKey, 64>();
    } else if (dim == 96) {
      f.template operator()<kKey, 96>();
    } else {
      f.template operator()<kKey, 128>();
    }
  };
  if (key_dim == 64) {
    with_key.template operator()<64>();
  } else if (key_dim == 96) {
    with_key.template operator()<96>();
  } else {
    with_key.template operator()<128>();
  }
}

}  // namespace cambium::cuda
