// How the scan is cut into work on the CPU.
#include <algorithm>

#include "base/parallel.h"
#include "ops/selective_scan/scan_blocks.h"
#include "tensor/arena.h"

namespace cambium {
namespace {

// Sets first[s] to the number of chunks before segment s, where asked, and returns them all.
int64_t count_chunks(const SelectiveScan<float>& a, int64_t* first) {
  int64_t count = 0;
  for (int64_t s = 0; s < a.segments.count; ++s) {
    if (first != nullptr) {
      first[s] = count;
    }
    count += (a.segments.length(s) + kScanChunk - 1) / kScanChunk;
  }
  return count;
}

ScanKernel make_blocks(const SelectiveScan<float>& a, Arena& arena) {
  auto* start = arena.empty(Dtype::kI64, {a.channels + 1}).ptr<int64_t>();
  int64_t blocks = 0;
  scan_blocks({a.channels, a.b_groups, a.c_groups, start, &blocks});
  // A piece of work should outweigh handing it to a thread.
  constexpr int64_t kLeastWork = 1 << 13;
  const int64_t work = a.segments.tokens() * a.channels * a.states;
  const int64_t pieces =
      std::min({blocks, 1 + work / kLeastWork, std::max<int64_t>(4 * num_threads(), 16)});
  int64_t* first = nullptr;
  if (a.kept != nullptr) {
    first = arena.empty(Dtype::kI64, {a.segments.count}).ptr<int64_t>();
    count_chunks(a, first);
  }
  return {.op = a,
          .first_chunk = first,
          .chunk_states = static_cast<float*>(a.kept),
          .block_start = start,
          .blocks = blocks,
          .pieces = pieces,
          .scratch = arena.empty(Dtype::kF32, {pieces * scan_scratch(a.states)}).ptr<float>(),
          .db_blocks = nullptr,
          .dc_blocks = nullptr};
}

}  // namespace

// The states at chunk starts, the first included, are all that backward needs.
int64_t selective_scan_forward::cpu_keeps(const SelectiveScan<float>& a) {
  return count_chunks(a, nullptr) * a.states * a.channels * static_cast<int64_t>(sizeof(float));
}

void selective_scan_forward::cpu(const SelectiveScan<float>& a, Arena& arena) {
  scan_blocks_forward(make_blocks(a, arena));
}

void selective_scan_backward::cpu(const SelectiveScan<float>& a, Arena& arena) {
  ScanKernel kernel = make_blocks(a, arena);
  const auto parts = [&](const View<float>& input) {
    return input.grad == nullptr ? nullptr
                                 : arena
                                       .empty(Dtype::kF32, {a.segments.tokens(), kernel.blocks,
                                                            scan_padded(a.states)})
                                       .ptr<float>();
  };
  kernel.db_blocks = parts(a.b);
  kernel.dc_blocks = parts(a.c);
  scan_blocks_backward(kernel);
}

}  // namespace cambium
