// Operands of the products of experts in shared memory: how copies in the background bring them.
#pragma once

#include "ops/cuda_mma.cuh"
#include "ops/cuda_warpgroup.cuh"

namespace cambium::cuda::expert_tiles {

/// Tiles of kM x kN, kDepth a step; warps along rows and columns; blocks of a multiprocessor.
template <int kM_, int kN_, int kDepth_, int kStages_, int kRowWarps_, int kColumnWarps_,
          int kBlocks_, bool kWarpgroups_ = false>
struct Shape {
  static constexpr int kM = kM_, kN = kN_, kDepth = kDepth_, kStages = kStages_;
  static constexpr int kRowWarps = kRowWarps_, kColumnWarps = kColumnWarps_, kBlocks = kBlocks_;
  static constexpr int kThreads = 32 * kRowWarps * kColumnWarps;
  static constexpr int kStage = (kM + kN) * kDepth;  // elements
  // Products of warpgroups: each has 64 rows and all columns.
  static constexpr bool kWarpgroups = cuda::kWarpgroups && kWarpgroups_;
  static_assert(!kWarpgroups_ || (kDepth == 64 && kThreads == 2 * kM && kN == 256));
  static constexpr int kRowTiles = kWarpgroups ? 1 : kM / kRowWarps / 16;
  static constexpr int kColumnTiles = kWarpgroups ? kN / 8 : kN / kColumnWarps / 8;
  // Copies take a number of threads that divides the tile's rows.
  static constexpr int kCopiers = kThreads == 384 ? 256 : kThreads;
  // A stage is written while products of so many steps before may still read theirs.
  static constexpr int kReading = kWarpgroups ? 1 : 0;
  static constexpr int kAhead = kStages - 1 - kReading;
};

// --- Operands in shared memory, in rows of 128 bytes whose pieces of 16 are swizzled by the row.

/// Where piece `piece` of the depth of row i lies, of kRows rows, in elements.
template <int kRows>
__device__ __forceinline__ int place_of(int i, int piece) {
  return piece / 8 * kRows * 64 + i * 64 + ((piece % 8) ^ (i % 8)) * 8;
}
/// The same of a turned operand: rows i to i + 7 at p of the depth.
__device__ __forceinline__ int turned_place_of(int i, int p) {
  return i / 64 * 64 * 64 + p * 64 + ((i % 64 / 8) ^ (p % 8)) * 8;
}

/// As copy_16, but of what is not wanted nothing is written.
__device__ __forceinline__ void copy_wanted(bool wanted, bf16* to, const bf16* from, bool exists) {
  const int bytes = exists ? 16 : 0;
  asm volatile(
      "{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %0, 0;\n\t"
      "@p cp.async.cg.shared.global [%1], [%2], 16, %3;\n\t}"
      :
      : "r"(wanted ? 1 : 0), "r"(shared_address(to)), "l"(__cvta_generic_to_global(from)),
        "r"(bytes)
      : "memory");
}

/// Begins to copy kRows rows of kDepth elements; zeros from `depth` on, of rows from `rows` on
/// nothing.
template <int kRows, int kDepth, int kThreads>
__device__ __forceinline__ void copy_rows(const bf16* from, int64_t stride, int rows, int depth,
                                          bf16* to) {
  constexpr int kPieces = kDepth / 8;
  constexpr int kStep = kThreads / kPieces;
  static_assert(kThreads % kPieces == 0 && kStep % 8 == 0 && kRows % kStep == 0);
  const int row = static_cast<int>(threadIdx.x) / kPieces;
  const int piece = static_cast<int>(threadIdx.x) % kPieces;
  const bool exists = piece * 8 < depth;
  const bf16* at = exists ? from + row * stride + piece * 8 : from;
  const int64_t step = exists ? kStep * stride : 0;
  to += place_of<kRows>(row, piece);
#pragma unroll
  for (int i = 0; i < kRows; i += kStep) {
    copy_wanted(row + i < rows, to + i * 64, at, exists);
    at += step;
  }
}
/// The same of rows `token` of this thread's own (row_of_thread), counted on from `from`.
template <int kRows, int kDepth, int kThreads>
__device__ __forceinline__ void copy_tokens(const bf16* from, int64_t stride,
                                            const int (&token)[kRows * kDepth / 8 / kThreads],
                                            int rows, int depth, bf16* to) {
  constexpr int kPieces = kDepth / 8;
  constexpr int kStep = kThreads / kPieces;
  const int row = static_cast<int>(threadIdx.x) / kPieces;
  const int piece = static_cast<int>(threadIdx.x) % kPieces;
  const bool exists = piece * 8 < depth;
  const bf16* at = exists ? from + piece * 8 : from;
  to += place_of<kRows>(row, piece);
#pragma unroll
  for (int i = 0; i < kRows; i += kStep) {
    copy_wanted(row + i < rows, to + i * 64, at + token[i / kStep] * stride, exists);
  }
}
/// Rows of two operands by turns, kTurn of the first and kTurn of the second.
template <int kRows, int kTurn, int kDepth, int kThreads>
__device__ __forceinline__ void copy_both(const bf16* first, const bf16* second, int64_t stride,
                                          int rows, int depth, bf16* to) {
  constexpr int kPieces = kDepth / 8;
  constexpr int kStep = kThreads / kPieces;
  static_assert(kTurn % kStep == 0 && kRows % (2 * kTurn) == 0);
  const int row = static_cast<int>(threadIdx.x) / kPieces;
  const int piece = static_cast<int>(threadIdx.x) % kPieces;
  const bool exists = piece * 8 < depth;
  const int64_t offset = row * stride + piece * 8;
  const bf16* each[2] = {exists ? first + offset : first, exists ? second + offset : second};
  to += place_of<kRows>(row, piece);
#pragma unroll
  for (int i = 0; i < kRows; i += kStep) {
    const int own = i / (2 * kTurn) * kTurn + i % kTurn;
    copy_wanted(row + own < rows, to + i * 64, each[i / kTurn % 2] + (exists ? own * stride : 0),
                exists);
  }
}
/// As copy_rows, turned: 64 rows of the depth, kRows elements each.
template <int kRows, int kThreads>
__device__ __forceinline__ void copy_turned(const bf16* from, int64_t stride, int rows, int depth,
                                            bf16* to) {
  constexpr int kPieces = kRows / 8;
  constexpr int kStep = kThreads / kPieces;
  static_assert(kThreads % kPieces == 0 && kStep % 8 == 0 && 64 % kStep == 0);
  const int p = static_cast<int>(threadIdx.x) / kPieces;
  const int i = static_cast<int>(threadIdx.x) % kPieces * 8;
  const bool wanted = i < rows;
  const bf16* at = from + p * stride + i;
  to += turned_place_of(i, p);
#pragma unroll
  for (int q = 0; q < 64; q += kStep) {
    const bool exists = p + q < depth;
    copy_wanted(wanted, to + q * 64, exists ? at : from, exists);
    at += kStep * stride;
  }
}

}  // namespace cambium::cuda::expert_tiles
