#include "nn/units/indexer.h"

#include <algorithm>

#include "base/checked.h"

namespace cambium {

Selection read_selection(const Options& options, const char* owner, const char* of) {
  Selection selection{.top = options.size(owner, "index_top", kMaxPositions)};
  const std::string name = options.text(owner, "index_of", of);
  const auto* known = std::find(std::begin(kPieceNames), std::end(kPieceNames), name);
  expect(known != std::end(kPieceNames),
         "{}: expected index_of to be tokens, blocks or pools, got '{}'", owner, name);
  selection.granularity = static_cast<Granularity>(known - std::begin(kPieceNames));
  const bool tokens = selection.granularity == Granularity::kToken;
  const bool blocks = selection.granularity == Granularity::kBlock;
  expect(!tokens || !options.has("index_size"),
         "{}: index_size is of blocks and pools, and tokens are chosen; give index_of", owner);
  expect(blocks || !options.has("index_local"),
         "{}: index_local is of blocks, and {} are chosen; leave it out", owner, name);
  if (!tokens) {
    selection.size = options.size(owner, "index_size", kMaxPositions);
  }
  selection.local = options.size_or(owner, "index_local", 1, kMaxPositions, 1);
  expect(!blocks || selection.local <= selection.top,
         "{}: expected index_local of at most index_top={}, got {}", owner, selection.top,
         selection.local);
  checked_product(owner, "tokens of the index's choice", {selection.top, selection.size},
                  kMaxPositions);
  return selection;
}

std::vector<AttendingRun> attending_runs(const Segments& segments, const Selection& selection) {
  std::vector<AttendingRun> runs;
  const auto add = [&](int64_t s, int64_t token, int64_t position, int64_t count, bool all) {
    if (count <= 0) {
      return;
    }
    if (runs.empty() || runs.back().all != all) {
      runs.push_back({all, s, token, {0}, {}});
    }
    AttendingRun& run = runs.back();
    // Segments without tokens lie between.
    while (run.segment + std::ssize(run.position) < s) {
      run.start.push_back(run.start.back());
      run.position.push_back(0);
    }
    run.start.push_back(run.start.back() + static_cast<int32_t>(count));
    run.position.push_back(static_cast<int32_t>(position));
  };
  for (int64_t s = 0; s < segments.count(); ++s) {
    const int64_t token = segments.start[static_cast<size_t>(s)];
    const int64_t first = segments.position[static_cast<size_t>(s)];
    const int64_t length = segments.length(s);
    const int64_t near = std::clamp<int64_t>(selection.all() - first, 0, length);
    add(s, token, first, near, true);
    add(s, token + near, first + near, length - near, false);
  }
  return runs;
}

bool looks_at_all(const UnitInputs& inputs, const Selection& selection) {
  const Segments segments = inputs.segments();
  for (int64_t s = 0; s < segments.count(); ++s) {
    const int64_t first = inputs.state == nullptr ? 0 : segments.position[static_cast<size_t>(s)];
    if (first + segments.length(s) > selection.all()) {
      return false;
    }
  }
  return true;
}

ChosenTokens choose_by_index(Context& ctx, const Tensor& q, const Tensor& k, const Tensor& weight,
                             const UnitInputs& inputs, const Selection& selection,
                             const Tensor& pages, const Tensor& scales) {
  const Segments segments = inputs.segments();
  const bool all = looks_at_all(inputs, selection);
  if (inputs.state == nullptr) {
    return all ? ChosenTokens{}
               : choose_tokens(ctx, q, k.merge_last(), weight, segments, selection);
  }
  const IndexPages to{pages, inputs.state->table, inputs.state->pages_per_segment, scales};
  if (all) {
    write_index(ctx, k.merge_last(), segments, to);
    return {};
  }
  return choose_tokens(ctx, q, k.merge_last(), weight, segments, selection, &to);
}

}  // namespace cambium
