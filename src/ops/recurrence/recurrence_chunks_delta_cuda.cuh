// Private to the delta rule's chunks on CUDA (recurrence_chunks_delta_cuda.cu): what its two
// kernels share.
#pragma once

#include "ops/recurrence/recurrence_chunks_cuda.cuh"

namespace cambium::cuda {

// Of a chunk and head.
struct DeltaGates {
  float starts[kC];  // exp(G)
  float ends[kC];    // f
  float decay;       // exp(G_last)
  float unused[3];   // whole pieces of 16 bytes
};
/// What every walk of a chunk and head takes, copied as one range.
struct DeltaStep {
  Tile inverse[kPairTiles];  // (tokens, tokens), right: T - I; as pair_tile() counts
  DeltaGates gates;
};
/// The keys of a chunk in rows as copy_rows() leaves them, those past its tokens zero.
template <int kKey>
struct DeltaKeys {
  bf16 row[kC * (kKey + 8)];
};

/// What the kernels hand on, per chunk and head; P's tiles as pair_tile() counts them. Columns are
/// those of the value and, where sequences are walked in pieces, of the identity.
struct DeltaParts {
  Tile* pairs;      // (kPairTiles), (tokens, tokens), left: P
  DeltaStep* step;  // ()
  void* keys;       // DeltaKeys, of a chunk and head of keys; null: they are read as they lie
  Tile* states;     // (columns / 16, K / 16), (column, key), left: the state at the start
  Tile* errors;     // (columns / 16, 4), (column, tokens), left: e
  int32_t* walked;  // (segments, heads, walks of a head): how far they are
  int32_t* turn;    // how many blocks of walk_kernel have begun
  // (items of a chunk, chunks), where walk_kernel prepares them itself: 1 when an item is there.
  int32_t* prepared;
  // Of pieces but the first: (segments, heads, pieces - 1).
  float4* ends;  // (columns / 16, K / 16, 2, 32 lanes), accumulators: what their own walks end with
  Tile* starts;  // (V / 16, K / 16), (value, key), left: the state that came
};

inline constexpr int kItemHeads = 2;

/// What walk_kernel prepares at a time: of a chunk, kItemHeads heads at most that share keys.
struct PrepareItems {
  int64_t group;  // heads that share keys
  int64_t of_group, of_chunk;

  __host__ __device__ explicit PrepareItems(const Recurrence<bf16>& a)
      : group(a.heads / a.key_heads),
        of_group((group + kItemHeads - 1) / kItemHeads),
        of_chunk(a.key_heads * of_group) {}
  __device__ int64_t first_head(int64_t item) const {
    return item / of_group * group + item % of_group * kItemHeads;
  }
  __device__ int heads(int64_t item) const {
    return static_cast<int>(min(int64_t{kItemHeads}, group - item % of_group * kItemHeads));
  }
  __device__ int64_t item(int64_t h) const { return h / group * of_group + h % group / kItemHeads; }
  /// The item that has the keys of that one.
  __device__ int64_t of_keys(int64_t item) const { return item / of_group * of_group; }
};

/// The whole of a call with one decay a head and the delta rule. `segments` is the host's, those of
/// `a` the device's.
void delta_chunks(const Recurrence<bf16>& a, const SegmentWalk& segments,
                  const DeviceChunks& chunks, const RecurrenceKept& kept, const Launch& on);

inline constexpr int kMostHeadWalks = 128;

/// The first kernel: P, T - I, what becomes of the decays, keys unless null, and that none of a
/// head's walks, kMostHeadWalks at most, has begun (recurrence_chunks_pairs_cuda.cu).
void prepare_delta(const Recurrence<bf16>& a, const DeviceChunks& chunks, int64_t head_walks,
                   const DeltaParts& parts, const Launch& on);

}  // namespace cambium::cuda
