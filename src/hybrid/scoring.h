// Scoring layers.
//
// Leave-one-out: what is lost when the mixer, or the whole layer, is taken out, without any
// training. MMR (mixer replacement, Apriel-H1): swap the layer alone, distil for a few steps, read
// the loss. It asks what heals, where leave-one-out asks what hurts, and is run again on each
// hybrid.
//
// Window swap (Priming, arXiv 2605.08301): give the layer alone a window instead of all it sees;
// with retrieval as the metric it finds the layers that look far. Restore one (KL-guided selection,
// arXiv 2512.20569): in a student with every layer converted, give one layer its attention back and
// take the gain; it asks what a layer is worth where nothing else helps, as leave-one-out asks
// where everything else does.
#pragma once

#include "eval/quality.h"
#include "hybrid/graft.h"
#include "hybrid/importance.h"
#include "hybrid/mixer_bank.h"
#include "train/held_out.h"
#include "train/train_plan.h"

namespace cambium {

struct ScoreOptions {
  ScoreMethod method = ScoreMethod::kLeaveMixerOut;
  std::string metric = "reverse-kl";  // of all but mmr: one of placement_metrics()
  GraftOptions graft;                 // mmr and window-swap: what is tried
  TrainConfig probe;                  // mmr and gates: how
  double price = 10.0;                // gates: RelaxationConfig's
  uint64_t seed = 1;                  // of what starts at random
  bool fresh = false;                 // start anew where the file answers another question
  std::string label = "score";        // of the progress line
  /// Memory for the hidden states of documents that are kept between layers.
  int64_t stored_bytes = int64_t{1} << 30;
};

/// What is scored on. Only what the method and metric look at is used.
struct ScoreData {
  const Tokenizer* tokenizer = nullptr;
  const DocumentSource* train = nullptr;  // mmr and gates
  const HeldOut* documents = nullptr;     // the others; with problems they decide between equals
  const Task* problems = nullptr;         // accuracy and retrieval
  AccuracyConfig answers;                 // how problems are asked
  const MixerBank* bank = nullptr;  // restore-one, gates: of `base`, whose kind 1 is the student
};

/// Scores every attention layer of `base` (the teacher itself or a hybrid made from it), kept in
/// `path` (empty = nowhere). Leave-one-out and window swap, larger = worse than `teacher` so;
/// restore-one, by how much the student with the layer's attention is better; gates, how far the
/// gate of its attention was open on the way; MMR, the mean loss of
/// the last steps (at most ten and at most half) of `base` with the layer's mixer swapped and
/// trained alone. Error when `path` holds the answer to another question: other weights, data or
/// options.
Importance score_importance(Model& base, Model& teacher, const ScoreOptions& options,
                            const ScoreData& data, const std::filesystem::path& path);

/// How gates are learned unless told: fewer numbers than layers of a model, so in large steps.
TrainConfig gate_probe(uint64_t seed);

/// What gates are learned on: of `share` of the samples generated retrieval from texts of up to
/// `chars` characters (0: the usual ones), else `documents`.
std::shared_ptr<DocumentSource> with_retrieval(std::shared_ptr<DocumentSource> documents,
                                               const Tokenizer& tokenizer, double share,
                                               int64_t chars, uint64_t seed);

/// Trains the mixers of `layers` alone, as a phase "align" does, from `first_sample` of the data
/// on.
void align_mixers(LoadedModel& student, Model& teacher, const std::vector<int64_t>& layers,
                  TrainConfig config, const DocumentSource& data, uint64_t first_sample,
                  const std::string& label);

/// "20 of gsm8k (...)": how many problems, and of their texts.
std::string digest(const Task& task);
/// Of a model's configuration and weights.
std::string model_digest(Model& model);

}  // namespace cambium
