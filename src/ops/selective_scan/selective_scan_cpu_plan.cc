// How the scan is cut into work on the CPU.
#include <algorithm>
#include <variant>
#include <vector>

#include "base/parallel.h"
#include "ops/segment_plans.h"
#include "ops/selective_scan/scan_blocks.h"
#include "tensor/arena.h"

namespace cambium {
namespace {

struct ChunkPlan {
  using Key = std::monostate;
  Key key;
  std::vector<int64_t> first;  // (segments + 1): chunks before each segment, and all of them
};

std::shared_ptr<const ChunkPlan> chunk_plan(const SelectiveScan<float>& a) {
  return plan_for<ChunkPlan>(a.segments.plans, {}, [&] {
    ChunkPlan plan{{}, {0}};
    for (int64_t s = 0; s < a.segments.count; ++s) {
      plan.first.push_back(plan.first.back() +
                           (a.segments.length(s) + kScanChunk - 1) / kScanChunk);
    }
    return plan;
  });
}

/// `first_chunk` is read where states are kept.
ScanKernel make_blocks(const SelectiveScan<float>& a, const int64_t* first_chunk, Arena& arena) {
  auto* start = arena.empty(Dtype::kI64, {a.channels + 1}).ptr<int64_t>();
  int64_t blocks = 0;
  scan_blocks({a.channels, a.b_groups, a.c_groups, start, &blocks});
  // A piece of work should outweigh handing it to a thread.
  constexpr int64_t kLeastWork = 1 << 13;
  const int64_t work = a.segments.tokens() * a.channels * a.states;
  const int64_t pieces =
      std::min({blocks, 1 + work / kLeastWork, std::max<int64_t>(4 * num_threads(), 16)});
  return {.op = a,
          .first_chunk = first_chunk,
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
  return chunk_plan(a)->first.back() * a.states * a.channels * static_cast<int64_t>(sizeof(float));
}

void selective_scan_forward::cpu(const SelectiveScan<float>& a, Arena& arena) {
  const auto plan = a.kept == nullptr ? nullptr : chunk_plan(a);
  scan_blocks_forward(make_blocks(a, plan == nullptr ? nullptr : plan->first.data(), arena));
}

void selective_scan_backward::cpu(const SelectiveScan<float>& a, Arena& arena) {
  const auto plan = chunk_plan(a);
  ScanKernel kernel = make_blocks(a, plan->first.data(), arena);
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
