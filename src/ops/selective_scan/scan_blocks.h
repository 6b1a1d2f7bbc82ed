// Private to the operation on the CPU: its work in blocks of channels, which the plan deals to
// pieces.
#pragma once

#include "ops/selective_scan/selective_scan_kernels.h"

namespace cambium {

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
  SelectiveScan<float> op;
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
CAMBIUM_CPU_KERNEL(scan_blocks_forward, ScanKernel)
CAMBIUM_CPU_KERNEL(scan_blocks_backward, ScanKernel)

}  // namespace cambium
