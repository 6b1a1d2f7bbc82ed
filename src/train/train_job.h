// A training run as a plan says it: model, tokenizer, data and stage. What `cambium train` runs.
#pragma once

#include <memory>
#include <nlohmann/json.hpp>

#include "train/train_plan.h"

namespace cambium {

/// [model] of a plan: a model trained from scratch, of layers of attention, alike, or of the layers
/// that a config.json says.
struct ModelPlan {
  std::string config;  // that file, or its folder; nothing else but init_std goes with it
  int64_t layers = 0;
  int64_t width = 0;
  int64_t heads = 0;
  int64_t kv_heads = 0;  // 0 = heads
  int64_t head_dim = 0;  // 0 = width / heads
  int64_t feed_forward = 0;
  int64_t max_positions = 4096;
  double rope_theta = 10000.0;
  bool tied_head = true;
  double init_std = 0.0;  // 0 = each parameter's own rule
};
void visit_fields(ModelPlan& plan, FieldVisitor& visit);

ModelPlan read_model_plan(const PlanTable& table);
/// Vocabulary and end tokens are the tokenizer's, or those of `config`, into which the tokenizer
/// must fit.
ModelSpec model_spec(const ModelPlan& plan, const Tokenizer& tokenizer);

/// The tokenizer in `dir`, of a model with so large a vocabulary; Error where it has more tokens.
Tokenizer load_tokenizer(const std::filesystem::path& dir, int64_t vocab);

/// Claims the folder of a run: `names` are what it writes there beside log and checkpoints. Error
/// before any work when something that is not ours is in the way, in its "model" too.
std::shared_ptr<RunFolder> claim_training_folder(const std::filesystem::path& folder, bool resume,
                                                 const std::vector<std::string>& names);

/// How a run loads the models that it trains and measures on `device`. On a CUDA device matrices
/// stay bf16 where their file has them so; those that are trained become f32. What `share` has too
/// is held once.
LoadOptions load_on(Device device, const LoadedModel* share = nullptr);

/// Saves a trained model with its tokenizer as a checkpoint folder, its matrices in f32 or bf16,
/// replacing one that we wrote. The model has no gradients afterwards.
void save_trained(Model& model, Weights& weights, const std::filesystem::path& dir,
                  const std::filesystem::path& tokenizer_dir,
                  const nlohmann::ordered_json& provenance,
                  MatrixStorage storage = MatrixStorage::kF32);

}  // namespace cambium
