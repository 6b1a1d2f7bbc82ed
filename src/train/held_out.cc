#include "train/held_out.h"

#include <algorithm>
#include <cmath>
#include <optional>

#include "base/checksum.h"
#include "base/error.h"
#include "base/progress.h"
#include "base/signals.h"

namespace cambium {
namespace {

/// Documents are run together up to so many tokens.
constexpr int64_t kTokensTogether = 2048;

}  // namespace

HeldOut::HeldOut(const DocumentSource& source, int64_t documents, int64_t max_tokens,
                 int64_t first) {
  expect(documents > 0 && max_tokens > 1,
         "held-out data needs at least one document of two tokens, got {} of {}", documents,
         max_tokens);
  const int64_t last = first + documents;
  const int64_t end = source.size() > 0 ? std::min<int64_t>(last, source.size()) : last;
  int64_t cut_away = 0;
  int64_t nearest = 0;  // place of the first token to learn, the smallest of those cut away
  for (int64_t i = first; i < end; ++i) {
    stop_point();
    Document document = source.document(static_cast<uint64_t>(i));
    const auto size = std::min<size_t>(document.tokens.size(), static_cast<size_t>(max_tokens));
    const int64_t place = document.learn.empty()
                              ? 0
                              : std::find(document.learn.begin() + 1, document.learn.end(), 1) -
                                    document.learn.begin() + 1;
    const bool learns = document.labels() > 0;
    document.tokens.resize(size);
    document.learn.resize(size);
    if (document.labels() == 0) {
      nearest = learns && (cut_away == 0 || place < nearest) ? place : nearest;
      cut_away += learns ? 1 : 0;
      continue;
    }
    const auto rows = static_cast<int64_t>(size) - 1;
    if (groups_.empty() || groups_.back().batch.size() + rows > kTokensTogether) {
      groups_.emplace_back();
    }
    add_document(groups_.back(), document);
    labels_ += document.labels();
    ++documents_;
  }
  expect(
      documents_ > 0 || cut_away == 0,
      "the held-out data has no document with anything to learn: {} of {} were cut at {} tokens "
      "before it (the nearest one begins at token {}); cut them later (held_out_tokens of a plan, "
      "--max-tokens, --calibrate-tokens of convert)",
      cut_away, end - first, max_tokens, nearest);
  expect(documents_ > 0, "the held-out data has no document with anything to learn");
  if (cut_away > 0) {
    note(
        "{} of {} documents end before anything to learn when cut at {} tokens, and are left out "
        "of the held-out measures (held_out_tokens of a plan, --max-tokens)",
        cut_away, end - first, max_tokens);
  }
}

std::string HeldOut::fingerprint() const {
  Checksum sum;
  for (const PackedSequence& group : groups_) {
    sum.update(std::as_bytes(group.batch.tokens()));
    sum.update(std::as_bytes(group.batch.segments().start));
    sum.update(std::as_bytes(std::span(group.labels)));
  }
  return fmt::format("{} documents, {} learned tokens ({})", documents_, labels_,
                     checksum_text(sum.digest()));
}

std::vector<LossSums> HeldOut::measure(Model& model, Model* teacher,
                                       const std::string& label) const {
  std::vector<LossSums> sums;
  std::optional<Progress> progress;
  if (!label.empty()) {
    progress.emplace(label, static_cast<uint64_t>(documents_),
                     Progress::Options{.unit = "documents"});
  }
  Workspace workspace(model.device());
  Context ctx = context_for(model, workspace);
  for (const PackedSequence& group : groups_) {
    const WorkspaceScope scope(workspace);
    const Tensor hidden = model.forward(ctx, group.batch);
    const Tensor taught = teacher == nullptr ? Tensor{} : teacher->forward(ctx, group.batch);
    add_sums(ctx, group, model, hidden, teacher, taught, sums);
    if (progress) {
      progress->update(sums.size());
    }
  }
  if (progress) {
    progress->finish();
  }
  return sums;
}

void HeldOut::add_sums(Context& ctx, const PackedSequence& group, const Model& model,
                       const Tensor& hidden, const Model* teacher, const Tensor& taught,
                       std::vector<LossSums>& sums) {
  const Segments segments = group.batch.segments();
  for (int64_t s = 0; s < segments.count(); ++s) {
    const int64_t begin = segments.start[static_cast<size_t>(s)];
    const int64_t rows = segments.length(s);
    LossInputs inputs;
    inputs.hidden = hidden.slice(0, begin, rows);
    inputs.head = model.head().detached();
    inputs.logit_cap = model.spec().logit_cap;
    if (teacher != nullptr) {
      inputs.teacher_hidden = taught.slice(0, begin, rows);
      inputs.teacher_head = teacher->head().detached();
      inputs.teacher_logit_cap = teacher->spec().logit_cap;
    }
    inputs.labels =
        std::span(group.labels).subspan(static_cast<size_t>(begin), static_cast<size_t>(rows));
    const ArenaScope scope(*ctx.arena);
    sums.push_back(head_loss(ctx, inputs, {.cross_entropy = 1.0F}));
    const LossSums& sum = sums.back();
    const double seen = sum.cross_entropy + sum.reverse_kl + sum.forward_kl;
    expect(
        std::isfinite(seen),
        "the loss of a held-out document is {}: the weights of a model are broken, or its numbers "
        "overflow",
        seen);
  }
}

LossSums total(const std::vector<LossSums>& sums) {
  LossSums all;
  for (const LossSums& s : sums) {
    all += s;
  }
  return all;
}

}  // namespace cambium
