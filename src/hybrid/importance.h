// How much a model needs each layer's attention: the scores, and the file they are kept in.
//
// A file of scores belongs to one question: models, data and options that decide the answer are its
// fingerprint. It is continued when the same question is asked again, and refused for another.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "model/model.h"
#include "ops/loss/loss.h"

namespace cambium {

enum class ScoreMethod {
  kLeaveMixerOut,
  kLeaveBlockOut,
  kMixerReplacement,
  kWindowSwap,
  kRestoreOne,
  kGates
};
const char* score_method_name(ScoreMethod method);
const std::vector<std::string>& score_method_names();
/// Of score_method_names(); Error with the nearest otherwise.
ScoreMethod parse_score_method(const std::string& name);

/// What a score of this metric is, for headings: "wrong answers, share of the problems".
std::string score_heading(const std::string& metric);

struct LayerScore {
  int64_t layer = 0;
  /// Larger = the layer's attention is needed more.
  double score = 0.0;
  double seconds = 0.0;
  /// Decides between equal scores, larger = needed more.
  double tie = 0.0;
};

/// A layer that has been measured on the first groups of the documents only.
struct PartialScore {
  int64_t layer = 0;
  int64_t groups = 0;
  LossSums sums;
  double seconds = 0.0;
};

/// Gates that have been learned for some steps (hybrid/relaxation.h), one a layer.
struct PartialGates {
  int64_t steps = 0;
  uint64_t next_sample = 0;                   // of the data
  std::vector<double> logits, first, second;  // and their moments
  std::vector<double> sums;                   // of the gates after each step
  double seconds = 0.0;
};

/// What decides the scores, by name.
using Fingerprint = std::map<std::string, std::string>;
/// What one has that the other has not, a line each: "\n  data: 3 in the file, 4 now".
std::string differences(const Fingerprint& stored, const Fingerprint& ours);

struct Importance {
  std::string method;
  std::string metric;
  Fingerprint fingerprint;
  std::vector<LayerScore> layers;  // in layer order
  std::vector<PartialScore> partial = {};
  PartialGates gates = {};             // without layers where none are being learned
  std::vector<int64_t> unscored = {};  // layers that are still to be scored

  /// Layers by score, the least needed first; equal scores by `tie`, then by layer.
  std::vector<int64_t> order() const;
};

Importance read_importance(const std::filesystem::path& path);
void write_importance(const Importance& importance, const std::filesystem::path& path);

/// Error unless scores can be written to `path`: another kind of file stands there, or the folder
/// is missing or may not be written.
void check_scores_path(const std::filesystem::path& path);

/// Scores as they come, kept in a file so that a stopped scoring goes on.
class ScoreFile {
 public:
  /// `start` has method, metric and fingerprint. Takes what `path` (empty = none) holds of the same
  /// question. Error that says what differs when it holds another's, unless `fresh`, which starts
  /// anew.
  ScoreFile(Importance start, const std::vector<int64_t>& layers, std::filesystem::path path,
            bool fresh);

  bool has(int64_t layer) const;
  PartialScore& partial(int64_t layer);
  PartialGates& gates() { return scores_.gates; }
  /// The layer is done.
  void add(const LayerScore& score);
  void save() const;
  const Importance& scores() const { return scores_; }

 private:
  Importance scores_;
  std::filesystem::path path_;
};

/// Scores `layers` one after another with `score(layer)`, kept in `path` as ScoreFile does.
/// `progress` is told how many are done.
Importance score_layers(const std::vector<int64_t>& layers, Importance start,
                        const std::function<double(int64_t layer)>& score,
                        const std::filesystem::path& path,
                        const std::function<void(int64_t done)>& progress, bool fresh = false);

/// Layers of `spec` that still have attention.
std::vector<int64_t> attention_layers(const ModelSpec& spec);
/// The same; Error that names the mixers there are where no layer has attention.
std::vector<int64_t> open_layers(const ModelSpec& spec);

}  // namespace cambium
