#include "train/train_job.h"

namespace cambium {

ModelPlan read_model_plan(const PlanTable& table, const Tokenizer& tokenizer) {
  ModelPlan plan;
  ModelSpec& spec = plan.spec;
  spec.family = "llama";
  spec.vocab = tokenizer.vocab_size();
  spec.width = table.get_int("width");
  const int64_t heads = table.get_int("heads");
  const int64_t kv_heads = table.get_int("kv_heads", heads);
  const int64_t head_dim = table.get_int("head_dim", spec.width / std::max<int64_t>(heads, 1));
  const int64_t layers = table.get_int("layers");
  const int64_t inner = table.get_int("feed_forward");
  const LayerSpec layer = decoder_layer(
      {"attention", {{"heads", heads}, {"kv_heads", kv_heads}, {"head_dim", head_dim}}}, inner);
  expect(layers > 0 && spec.width > 0 && inner > 0,
         "{}: expected layers, width and feed_forward above 0", table.where());
  spec.layers.assign(static_cast<size_t>(layers), layer);
  spec.max_positions = table.get_int("max_positions", 4096);
  spec.rope.theta = table.get_real("rope_theta", 10000.0);
  spec.rope.dim = head_dim;
  spec.tied_head = table.get_bool("tied_head", true);
  plan.init_std = table.get_real("init_std", 0.0);
  if (const auto id = tokenizer.bos_id()) {
    spec.bos_id = *id;
  }
  for (const int32_t id : tokenizer.eos_ids()) {
    spec.eos_ids.push_back(id);
  }
  return plan;
}

void save_trained(Model& model, const std::filesystem::path& dir,
                  const std::filesystem::path& tokenizer_dir, const std::string& provenance) {
  SaveOptions options;
  options.tokenizer_from = tokenizer_dir;
  options.replace = true;
  options.files["provenance.json"] = provenance;
  save_model(model, dir, options);
}

}  // namespace cambium
