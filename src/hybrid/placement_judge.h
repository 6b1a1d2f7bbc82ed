// How good a placement's model is, as losses of documents or problems, so that two placements can
// be compared one by one on the same ones.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "eval/quality.h"
#include "eval/report/summary.h"
#include "train/held_out.h"
#include "train/layer_walk.h"

namespace cambium {

/// What each document or problem adds to the sum and to what it is divided by.
struct Losses {
  std::vector<double> loss;
  std::vector<double> weight;

  /// Of the whole, with the 95 % interval over documents (of a ratio of sums, by linearisation).
  Measured mean() const;
};
/// a - b over the same documents, whose differences are often far surer than either value.
Measured difference(const Losses& a, const Losses& b);

/// reverse-kl and nll (nats a token), accuracy and retrieval (wrong answers, share of the
/// problems).
const std::vector<std::string>& placement_metrics();
/// Whether problems are asked.
bool metric_asks(const std::string& metric);

struct JudgeData {
  const HeldOut* documents = nullptr;    // reverse-kl, nll
  const Task* problems = nullptr;        // accuracy, retrieval
  const Tokenizer* tokenizer = nullptr;  // of them
  AccuracyConfig answers{};
  Model* teacher = nullptr;  // of reverse-kl; null = the model that placements change
};

class PlacementJudge {
 public:
  /// Of the models that a placement makes of `base`. Everything given must outlive it. The
  /// teacher's hidden states of the documents are kept where `stored_bytes` hold them.
  PlacementJudge(Model& base, std::string metric, const JudgeData& data,
                 int64_t stored_bytes = int64_t{1} << 30);
  /// Smaller = better.
  Losses judge(Model& model);
  /// "64 documents, 5123 learned tokens (...)" or the problems: part of a fingerprint.
  std::string fingerprint() const;

 private:
  std::string metric_;
  JudgeData data_;
  std::unique_ptr<LayerWalk> walk_;
  int64_t loaded_ = 0;  // groups of documents, from the first
};

}  // namespace cambium
