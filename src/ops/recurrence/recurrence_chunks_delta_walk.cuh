// Private to recurrence_chunks_delta_cuda.cu: forms of the walk, how those at work in a kernel tell
// each other how far they are, and pieces.
#pragma once

#include "ops/recurrence/recurrence_chunks_delta_cuda.cuh"
#include "ops/recurrence/recurrence_pieces.h"

namespace cambium::cuda {

inline constexpr int kStateTile = 64;  // float4 of a tile in fp32

/// A form of the walk: 16 kWide columns a block, segments in pieces or not.
template <int kKey_, int kDim_, int kWide, bool kPieces_>
struct WalkForm {
  static constexpr int kKey = kKey_;
  static constexpr int kDim = kDim_;
  static constexpr int kParts = kWide;
  static constexpr bool kPieces = kPieces_;
  // Few blocks walk, and others prepare chunks beside them.
  static constexpr bool kPrepares = kWide == 1;
  static constexpr int kKeyTiles = kKey / 16;
  static constexpr int kDimTiles = kDim / 16;
  static constexpr int kColumnTiles = kDimTiles + (kPieces ? kKeyTiles : 0);
  // Walks of a head of a piece: of the first, of others.
  static constexpr int kSlices = kDimTiles / kParts;
  static constexpr int kAllSlices = kColumnTiles / kParts;
  static constexpr int kKeySlices = kAllSlices - kSlices;  // of the identity's columns
  /// Of a head whose segment is in so many pieces.
  __host__ __device__ static constexpr int64_t head_walks(int64_t pieces) {
    return kSlices + (pieces - 1) * kAllSlices;
  }
  static_assert(head_walks(kMostPieces) <= kMostHeadWalks);
};

/// What this thread and those it met at a barrier wrote is there for who finds the number.
__device__ __forceinline__ void publish(int32_t* at, int32_t x) {
  asm volatile("st.release.gpu.global.s32 [%0], %1;" : : "l"(at), "r"(x) : "memory");
}
/// The same within a block, of numbers that grow, and how its counterpart finds them: atomically,
/// as no barrier lies between the two.
__device__ __forceinline__ void publish_in_block(int32_t* at, int32_t x) {
  asm volatile("red.release.cta.shared.max.s32 [%0], %1;"
               :
               : "r"(shared_address(at)), "r"(x)
               : "memory");
}
__device__ __forceinline__ int32_t find_in_block(int32_t* at) {
  int32_t x;
  asm volatile("atom.acquire.cta.shared.or.b32 %0, [%1], 0;"
               : "=r"(x)
               : "r"(shared_address(at))
               : "memory");
  return x;
}
__device__ __forceinline__ int32_t find(const int32_t* at) {
  int32_t x;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(x) : "l"(at) : "memory");
  return x;
}
__device__ __forceinline__ void await_more_than(const int32_t* at, int32_t x) {
  while (find(at) <= x) {
    __nanosleep(200);
  }
}

// A call's chunks.
struct DeltaCall {
  const int32_t* first;   // (segments + 1): chunks of the segments before
  const ChunkSpan* span;  // (count)
  const int32_t* walked;  // (walked_count): the segments that are walked
  int64_t count, walked_count;
  int pieces;   // of a segment at most
  int workers;  // blocks that prepare chunks
};

/// A segment's head in pieces, of which a call has `most` at most.
template <class Form>
struct HeadPieces {
  int most;
  int64_t segment, h, heads;
  int64_t first, chunks;  // the segment's
  int64_t count;          // pieces

  __device__ HeadPieces(const Recurrence<bf16>& a, const DeltaCall& call, int64_t of_segment,
                        int64_t of_head)
      : most(call.pieces), segment(of_segment), h(of_head), heads(a.heads) {
    first = call.first[segment];
    chunks = call.first[segment + 1] - first;
    count = Form::kPieces ? pieces_of(chunks, most) : 1;
  }
  __device__ int64_t begin(int64_t piece) const { return piece_begin(chunks, count, piece); }
  __device__ int64_t chunks_in(int64_t piece) const { return begin(piece + 1) - begin(piece); }
  /// Where a walk says how far it is. Those of later pieces come before those of the first, which
  /// waits for them.
  __device__ int64_t walk(int64_t piece, int64_t slice) const {
    const int64_t before = piece == 0 ? most - 1 : piece - 1;
    return (segment * heads + h) * Form::head_walks(most) + before * Form::kAllSlices + slice;
  }
  // Of a later piece.
  __device__ int64_t place(int64_t piece) const {
    return piece_place(first + begin(piece)) * heads + h;
  }
  __device__ float4* ends(const DeltaParts& parts, int64_t piece) const {
    return parts.ends + place(piece) * Form::kColumnTiles * Form::kKeyTiles * kStateTile;
  }
  __device__ Tile* starts(const DeltaParts& parts, int64_t piece) const {
    return parts.starts + place(piece) * Form::kDimTiles * Form::kKeyTiles;
  }
};

}  // namespace cambium::cuda
