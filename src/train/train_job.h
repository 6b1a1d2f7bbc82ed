// A training run as a plan says it: model, tokenizer, data and stage. What `cambium train` runs.
#pragma once

#include <memory>

#include "train/train_plan.h"

namespace cambium {

/// Shape of a model trained from scratch: layers of attention, alike.
///   [model] layers, width, heads, kv_heads, head_dim, feed_forward, max_positions, rope_theta,
///           tied_head, init_std (0 = each parameter's own rule)
struct ModelPlan {
  ModelSpec spec;
  double init_std = 0.0;
};

/// Reads [model]; vocabulary and end token are the tokenizer's.
ModelPlan read_model_plan(const PlanTable& table, const Tokenizer& tokenizer);

/// Saves a trained model with its tokenizer as a checkpoint folder, replacing one that is there.
void save_trained(Model& model, const std::filesystem::path& dir,
                  const std::filesystem::path& tokenizer_dir, const std::string& provenance);

}  // namespace cambium
