// Losses on documents that are not trained on: what gates and importance scores are made of.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "model/model.h"
#include "ops/loss/loss.h"
#include "train/dataset.h"

namespace cambium {

/// The first documents of a source, packed once and measured many times. Every document stands
/// alone, so that an interval can be taken over documents.
class HeldOut {
 public:
  /// `documents` of `source` from number `first` on, each cut to `max_tokens`; those with nothing
  /// to learn do not count. Error when there is none.
  HeldOut(const DocumentSource& source, int64_t documents, int64_t max_tokens, int64_t first = 0);

  int64_t documents() const { return documents_; }
  int64_t labels() const { return labels_; }

  /// Of the tokens and what is learned of them.
  std::string fingerprint() const;

  /// Sums per document. With a teacher the KL terms (temperature 1) are measured too. `label`: of
  /// the progress line; empty = none.
  std::vector<LossSums> measure(Model& model, Model* teacher = nullptr,
                                const std::string& label = "") const;

  /// The documents as they are run together, and the sums of one such group, given the final hidden
  /// states (T, C) of the model and, for the KL terms, of the teacher.
  const std::vector<PackedSequence>& groups() const { return groups_; }
  static void add_sums(Context& ctx, const PackedSequence& group, const Model& model,
                       const Tensor& hidden, const Model* teacher, const Tensor& taught,
                       std::vector<LossSums>& sums);

 private:
  std::vector<PackedSequence> groups_;
  int64_t documents_ = 0;
  int64_t labels_ = 0;
};

LossSums total(const std::vector<LossSums>& sums);

}  // namespace cambium
