#include "hybrid/placement_judge.h"

#include <algorithm>
#include <cmath>

#include "base/signals.h"
#include "eval/statistics.h"
#include "hybrid/scoring.h"

namespace cambium {
namespace {

// sum(loss) / sum(weight), whose deviation is that of loss - mean * weight.
Measured ratio(const std::vector<double>& loss, const std::vector<double>& weight) {
  double sum = 0.0;
  double all = 0.0;
  for (size_t i = 0; i < loss.size(); ++i) {
    sum += loss[i];
    all += weight[i];
  }
  const double value = sum / std::max(all, 1e-300);
  double squares = 0.0;
  for (size_t i = 0; i < loss.size(); ++i) {
    const double off = loss[i] - value * weight[i];
    squares += off * off;
  }
  const auto n = static_cast<double>(loss.size());
  const double half = n > 1 ? kZ95 * std::sqrt(squares * n / (n - 1)) / all : 0.0;
  return {value, value - half, value + half};
}

}  // namespace

Measured Losses::mean() const {
  Measured m = ratio(loss, weight);
  // No loss is negative.
  m.low = std::max(m.low, 0.0);
  return m;
}

Measured difference(const Losses& a, const Losses& b) {
  CAMBIUM_CHECK(a.loss.size() == b.loss.size());
  std::vector<double> off;
  for (size_t i = 0; i < a.loss.size(); ++i) {
    CAMBIUM_CHECK(a.weight[i] == b.weight[i]);
    off.push_back(a.loss[i] - b.loss[i]);
  }
  return ratio(off, a.weight);
}

const std::vector<std::string>& placement_metrics() {
  static const std::vector<std::string> names = {"reverse-kl", "nll", "accuracy", "retrieval"};
  return names;
}

bool metric_asks(const std::string& metric) {
  return metric == "accuracy" || metric == "retrieval";
}

PlacementJudge::PlacementJudge(Model& base, std::string metric, const JudgeData& data,
                               int64_t stored_bytes)
    : metric_(std::move(metric)), data_(data) {
  if (metric_asks(metric_)) {
    expect(data_.problems != nullptr && !data_.problems->examples.empty(),
           "metric {}: there are no problems to be asked", metric_);
  } else {
    Model* const teacher = data_.teacher == nullptr ? &base : data_.teacher;
    walk_ = std::make_unique<LayerWalk>(*data_.documents, base,
                                        metric_ == "reverse-kl" ? teacher : nullptr, stored_bytes);
  }
}

Losses PlacementJudge::judge(Model& model) {
  Losses losses;
  if (walk_ == nullptr) {
    const AccuracyResult result = evaluate_accuracy(model, *data_.tokenizer, *data_.problems,
                                                    data_.answers, [](int64_t) { stop_point(); });
    for (const ExampleResult& example : result.examples) {
      losses.loss.push_back(example.correct ? 0.0 : 1.0);
      losses.weight.push_back(1.0);
    }
    return losses;
  }
  for (int64_t first = 0; first < walk_->groups();) {
    if (loaded_ != walk_->groups()) {
      loaded_ = walk_->load(first, walk_->groups()) - first;
    }
    for (const LossSums& sums : walk_->measure(model)) {
      losses.loss.push_back(metric_ == "nll" ? sums.cross_entropy : sums.reverse_kl);
      losses.weight.push_back(static_cast<double>(sums.tokens));
    }
    first += loaded_;
  }
  return losses;
}

std::string PlacementJudge::fingerprint() const {
  return walk_ != nullptr ? data_.documents->fingerprint()
                          : fmt::format("{}, at most {} tokens, {}", digest(*data_.problems),
                                        data_.answers.max_new_tokens,
                                        data_.answers.chat ? "chat template" : "plain");
}

}  // namespace cambium
