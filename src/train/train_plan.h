// A stage of training as a plan says it. `cambium train`, `cambium distill` and the staged plans of
// the graft read the same keys here.
#pragma once

#include "base/toml.h"
#include "train/trainer.h"

namespace cambium {

/// Reads, all optional but for steps or tokens:
///
///   objective = "end_to_end" | "align"
///   train = "everything" | "mixers" | "converted"
///   steps, or tokens (a step has sequence_length * sequences_per_step)
///   sequence_length, sequences_per_step, long_documents = "cut" | "drop", seed
///   checkpoint_layers, checkpoint_every, keep_checkpoints
///   [loss] cross_entropy, forward_kl, reverse_kl, temperature
///   [align] layers, weight, squared, all_tokens
///   [optimizer] kind = "adamw" | "muon", beta1, beta2, epsilon, clip_norm, momentum
///   [optimizer.mixer | feed_forward | norm | embedding] rate_scale, weight_decay
///   [schedule] rate, warmup_steps, decay = "constant" | "linear" | "cosine", final_ratio
///   [divergence] factor, window, patience
///
/// What a key is not given for is as in `defaults`. Folder, label and resume are the caller's.
/// With `partial`, steps may stay 0: the keys are defaults of stages that give their own.
TrainConfig read_train_config(const PlanTable& plan, const TrainConfig& defaults = {},
                              bool partial = false);

}  // namespace cambium
