// On-policy distillation: the student answers prompts itself, and the teacher says at each of the
// student's own tokens what it would have gone on with (Agarwal et al., GKD, arXiv 2306.13649). The
// loss there is the KL over the whole vocabulary, of which a sampled token's log-ratio is an
// estimate; no gradient goes through the sampling.
//
// Answers are sampled on the engine in rounds, by the weights of that moment. Everything drawn is
// named by seed, round and answer, and a round's answers are kept in the run's folder, so that a
// resumed run goes on with them.
#pragma once

#include "base/fields.h"
#include "model/weights.h"
#include "text/tokenizer.h"
#include "train/trainer.h"

namespace cambium {

struct OnPolicyConfig {
  int64_t round_prompts = 32;  // answered at once
  int64_t samples = 1;         // answers to each of them
  int64_t max_new_tokens = 256;
  double temperature = 1.0;
  int64_t batch = 64;  // answers sampled side by side
};
void visit_fields(OnPolicyConfig& config, FieldVisitor& visit);

/// What an on-policy stage is trained by unless told: half reverse KL, half forward KL.
LossConfig on_policy_loss();

/// Error that begins with `where` for losses that the student's own answers cannot teach.
void check_on_policy(const TrainConfig& config, const std::string& where);

/// Trains as `config` says on answers that the student samples. The prompt of a document is what
/// stands before its first token to learn; config.first_sample is the first document in their
/// order, and the summary's data.next_sample the one after the last. Error for a document without a
/// prompt. Rounds are kept in config.folder/rounds.
TrainSummary run_on_policy(LoadedModel& student, TrainConfig config,
                           const OnPolicyConfig& on_policy, const DocumentSource& prompts,
                           const Tokenizer& tokenizer, Model& teacher);

}  // namespace cambium
