#include "train/train_job.h"

#include "files/checksums.h"

namespace cambium {

namespace {

// Bounds that keep every product of sizes far from the end of int64_t.
constexpr int64_t kMaxLayers = 100'000;
constexpr int64_t kMaxHeads = 65'536;
constexpr int64_t kMaxWidth = int64_t{1} << 20;
constexpr int64_t kMaxPositions = int64_t{1} << 30;

}  // namespace

void visit_fields(ModelPlan& plan, FieldVisitor& visit) {
  visit({"config", "a config.json or its folder: its layers with random weights"}, plan.config);
  visit({"layers", "of attention and feed-forward"}, plan.layers, ints_from(1, kMaxLayers));
  visit({"width", "channels of the residual stream"}, plan.width, ints_from(1, kMaxWidth));
  visit({"heads", "query heads"}, plan.heads, ints_from(1, kMaxHeads));
  visit({"kv_heads", "key and value heads; 0 = heads"}, plan.kv_heads, ints_from(0, kMaxHeads));
  visit({"head_dim", "channels of a head; 0 = width / heads"}, plan.head_dim,
        ints_from(0, kMaxHeads));
  visit({"feed_forward", "inner channels"}, plan.feed_forward, ints_from(1, kMaxWidth));
  visit({"max_positions", "longest text"}, plan.max_positions, ints_from(1, kMaxPositions));
  visit({"rope_theta", "base of the rotary frequencies"}, plan.rope_theta, reals_above(0.0, 1e15));
  visit({"tied_head", "the head shares the embedding's weights"}, plan.tied_head);
  visit({"init_std", "standard deviation of fresh matrices; 0 = each parameter's own rule"},
        plan.init_std, reals_from(0.0, 1e3));
}

ModelPlan read_model_plan(const PlanTable& table) {
  ModelPlan plan;
  read_fields(plan, table);
  if (!plan.config.empty()) {
    for (const std::string& key : table.keys()) {
      expect(key == "config" || key == "init_std",
             "{}: config says the model's shape: leave {} out, or leave config out", table.where(),
             key);
    }
    return plan;
  }
  for (const char* key : {"layers", "width", "heads", "feed_forward"}) {
    expect(table.has(key), "{}: {} is missing; it must be a whole number from 1", table.where(),
           key);
  }
  plan.kv_heads = plan.kv_heads == 0 ? plan.heads : plan.kv_heads;
  plan.head_dim = plan.head_dim == 0 ? plan.width / plan.heads : plan.head_dim;
  expect(plan.head_dim > 0, "{}: {} heads do not fit into width {}; give head_dim", table.where(),
         plan.heads, plan.width);
  return plan;
}

ModelSpec model_spec(const ModelPlan& plan, const Tokenizer& tokenizer) {
  if (!plan.config.empty()) {
    const ModelSpec given = read_spec(plan.config);
    expect(tokenizer.vocab_size() <= given.vocab,
           "[model] config: {} has {} tokens, the tokenizer {}; give the model's own as "
           "tokenizer.path",
           plan.config, given.vocab, tokenizer.vocab_size());
    return given;
  }
  ModelSpec spec;
  spec.family = "llama";
  spec.vocab = tokenizer.vocab_size();
  spec.width = plan.width;
  const LayerSpec layer = decoder_layer(
      {"attention",
       {{"heads", plan.heads}, {"kv_heads", plan.kv_heads}, {"head_dim", plan.head_dim}}},
      plan.feed_forward);
  spec.layers.assign(static_cast<size_t>(plan.layers), layer);
  spec.max_positions = plan.max_positions;
  spec.rope.theta = plan.rope_theta;
  spec.rope.dim = plan.head_dim;
  spec.tied_head = plan.tied_head;
  if (const auto id = tokenizer.bos_id()) {
    spec.bos_id = *id;
  }
  for (const int32_t id : tokenizer.eos_ids()) {
    spec.eos_ids.push_back(id);
  }
  return spec;
}

Tokenizer load_tokenizer(const std::filesystem::path& dir, int64_t vocab) {
  Tokenizer tokenizer = Tokenizer::load(dir);
  expect(tokenizer.vocab_size() <= vocab,
         "{}: the tokenizer has {} tokens, the model only {}; they do not belong together",
         dir.string(), tokenizer.vocab_size(), vocab);
  return tokenizer;
}

std::shared_ptr<RunFolder> claim_training_folder(const std::filesystem::path& folder, bool resume,
                                                 const std::vector<std::string>& names) {
  auto claimed = std::make_shared<RunFolder>(folder, training_folder_use(resume, names));
  expect_only_written((folder / "model").string());
  return claimed;
}

LoadOptions load_on(Device device, const LoadedModel* share) {
  const bool cuda = device.kind == Device::kCuda;
  return {.storage = cuda ? MatrixStorage::kStored : MatrixStorage::kF32,
          .device = device,
          .share = share};
}

void save_trained(Model& model, Weights& weights, const std::filesystem::path& dir,
                  const std::filesystem::path& tokenizer_dir,
                  const nlohmann::ordered_json& provenance, MatrixStorage storage) {
  weights.set_trainable(model, nullptr);
  expect_only_written(dir.string());
  SaveOptions options;
  options.tokenizer_from = tokenizer_dir;
  options.storage = storage;
  options.replace = true;
  options.files["provenance.json"] =
      provenance.dump(1, ' ', false, nlohmann::ordered_json::error_handler_t::replace) + "\n";
  save_model(model, dir, options);
}

}  // namespace cambium
