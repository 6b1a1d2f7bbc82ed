#include "eval/cached_losses.h"

#include <algorithm>

#include "serve/cache.h"

namespace cambium {
namespace {

// For the documents of one group at once, each in one piece.
CacheConfig cache_for(const HeldOut& documents, Dtype values) {
  CacheConfig config{.max_sequences = 1, .max_tokens = 1, .values = values};
  for (const PackedSequence& group : documents.groups()) {
    const Segments segments = group.batch.segments();
    config.max_sequences = std::max(config.max_sequences, segments.count());
    for (int64_t s = 0; s < segments.count(); ++s) {
      config.max_tokens = std::max(config.max_tokens, segments.length(s));
    }
  }
  config.piece_tokens = config.max_tokens;
  return config;
}

}  // namespace

std::vector<LossSums> measure_cached(const HeldOut& documents, Model& model, Model* teacher,
                                     Dtype values) {
  Cache cache(model, cache_for(documents, values));
  std::vector<LossSums> sums;
  Workspace workspace(model.device());
  Context ctx = context_for(model, workspace);
  for (const PackedSequence& group : documents.groups()) {
    const WorkspaceScope scope(workspace);
    const Segments segments = group.batch.segments();
    Batch batch;
    std::vector<int64_t> slots;
    for (int64_t s = 0; s < segments.count(); ++s) {
      const auto begin = static_cast<size_t>(segments.start[static_cast<size_t>(s)]);
      const int64_t length = segments.length(s);
      slots.push_back(cache.open(length));
      batch.add(group.batch.tokens().subspan(begin, static_cast<size_t>(length)), 0, slots.back());
    }
    const Tensor hidden = model.forward(ctx, batch, {.states = cache.prepare(batch)});
    const Tensor taught = teacher == nullptr ? Tensor{} : teacher->forward(ctx, group.batch);
    HeldOut::add_sums(ctx, group, model, hidden, teacher, taught, sums);
    for (const int64_t slot : slots) {
      cache.close(slot);
    }
  }
  return sums;
}

}  // namespace cambium
