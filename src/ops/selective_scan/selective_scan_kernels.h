// Private to the operation: what its definition and its kernels are given. A gradient is null where
// it is not wanted.
#pragma once

#include <cstdint>

#include "base/cpu.h"
#include "ops/segment_walk.h"

namespace cambium {

/// An input (T, width), rows `stride` apart.
template <class Real>
struct ScanRows {
  const Real* data;
  Real* grad;
  int64_t stride;

  const Real* row(int64_t t) const { return data + t * stride; }
  Real* grad_row(int64_t t) const { return grad == nullptr ? nullptr : grad + t * stride; }
};

template <class Real>
struct ScanArgs {
  SegmentWalk segments;
  int64_t channels;  // d
  int64_t states;    // N
  int64_t b_groups;
  int64_t c_groups;
  ScanRows<Real> u, dt, b, c, z;
  const Real* a_log;    // (d, N)
  const Real* d;        // (d)
  const Real* dt_bias;  // (d)
  Real* da_log;
  Real* dd;
  Real* ddt_bias;
  Real* state;     // (slots, d, N) or null: before the segments; forward leaves those after them
  Real* y;         // (T, d) contiguous
  const Real* dy;  // backward only

  int64_t b_offset(int64_t channel) const { return channel / (channels / b_groups) * states; }
  int64_t c_offset(int64_t channel) const { return channel / (channels / c_groups) * states; }
  Real* state_of(int64_t segment) const {
    return state == nullptr ? nullptr : state + segments.row(segment) * channels * states;
  }
};

/// Backward recomputes this many states at a time from a kept one; they stay in the cache.
inline constexpr int64_t kScanChunk = 16;
/// Channels the widest kernel takes at once.
inline constexpr int64_t kScanLanes = 16;

constexpr int64_t scan_padded(int64_t states) {
  return (states + kScanLanes - 1) / kScanLanes * kScanLanes;
}

/// Floats of scratch memory for one piece of work.
constexpr int64_t scan_scratch(int64_t states) {
  return kScanLanes *
         ((2 * kScanChunk + 1) * states + 3 * states + 2 * scan_padded(states) + 8 * kScanChunk);
}

struct ScanKernel {
  ScanArgs<float> op;
  /// (segments): how many chunks of kScanChunk tokens the segments before have.
  const int64_t* first_chunk;
  /// (chunks, N, d): the states at chunk starts; forward writes them where not null, backward reads
  /// them.
  float* chunk_states;
  /// Channels are cut into blocks that do not cross a group: their starts, and d.
  const int64_t* block_start;  // (blocks + 1)
  int64_t blocks;
  int64_t pieces;  // of work; blocks are dealt to them
  float* scratch;  // (pieces, scan_scratch())
  // Backward only: gradients of B and C by block, to be summed in order.
  float* db_blocks;  // (T, blocks, scan_padded(N)) or null
  float* dc_blocks;
};

/// Cuts channels into the blocks of the instruction set in use.
struct ScanBlocks {
  int64_t channels, b_groups, c_groups;
  int64_t* start;  // (channels + 1)
  int64_t* count;
};

CAMBIUM_CPU_KERNEL(scan_blocks, ScanBlocks)
CAMBIUM_CPU_KERNEL(selective_scan_forward, ScanKernel)
CAMBIUM_CPU_KERNEL(selective_scan_backward, ScanKernel)

}  // namespace cambium
