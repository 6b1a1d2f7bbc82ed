#include <algorithm>

#include "model/kept_tensors.h"

#include <gmock/gmock.h>

#include <nlohmann/json.hpp>

#include "base/file.h"
#include "base/random.h"
#include "base/test_folder.h"
#include "base/test_paths.h"
#include "base/testing.h"
#include "model/families/config.h"
#include "model/gguf/gguf_export.h"
#include "model/supernet.h"
#include "model/weights.h"

namespace cambium {
namespace {

using json = nlohmann::ordered_json;
using ::testing::HasSubstr;

std::string fixture(const std::string& name) {
  return std::string(kSourceDir) + "/tests/fixtures/" + name;
}

/// A checkpoint with heads that predict more tokens: layers of a fixture under other names, and
/// tensors of their own.
struct Heads {
  const char* fixture;
  std::vector<std::pair<std::string, std::string>> layers;  // what their names begin with: from, to
  std::vector<std::pair<std::string, std::vector<int64_t>>> own;
  json config;  // keys besides
  int64_t heads;
};

std::vector<Heads> rows() {
  const auto deepseek = [](const char* name) {
    return Heads{name,
                 {{"model.layers.3.", "model.layers.4."}},
                 {{"model.layers.4.enorm.weight", {64}},
                  {"model.layers.4.hnorm.weight", {64}},
                  {"model.layers.4.eh_proj.weight", {64, 128}},
                  {"model.layers.4.shared_head.norm.weight", {64}},
                  {"model.layers.4.embed_tokens.weight", {384, 64}},
                  {"model.layers.4.shared_head.head.weight", {384, 64}}},
                 {{"num_nextn_predict_layers", 1}},
                 1};
  };
  const auto qwen = [](const char* name, const char* layer, const json& config) {
    return Heads{name,
                 {{layer, "mtp.layers.0."}},
                 {{"mtp.fc.weight", {64, 128}},
                  {"mtp.pre_fc_norm_embedding.weight", {64}},
                  {"mtp.pre_fc_norm_hidden.weight", {64}},
                  {"mtp.norm.weight", {64}}},
                 config,
                 1};
  };
  Heads two = deepseek("deepseek_v3");
  two.layers.emplace_back("model.layers.2.", "model.layers.5.");
  two.own.resize(4);  // without copies of the embedding and the output head
  for (size_t i = 0; i < 4; ++i) {
    two.own.emplace_back(two.own[i]);
    two.own.back().first[13] = '5';
  }
  two.config["num_nextn_predict_layers"] = two.heads = 2;
  return {deepseek("deepseek_v3"),
          deepseek("deepseek_v32"),
          two,
          qwen("qwen3_next", "model.layers.3.", json::object()),
          qwen("qwen3_5_moe", "model.language_model.layers.3.", json::object()),
          {"nemotron_h_moe",
           {{"backbone.layers.3.", "mtp.layers.0."}, {"backbone.layers.1.", "mtp.layers.1."}},
           {{"mtp.layers.0.enorm.weight", {64}},
            {"mtp.layers.0.hnorm.weight", {64}},
            {"mtp.layers.0.eh_proj.weight", {64, 128}},
            {"mtp.layers.1.final_layernorm.weight", {64}}},
           {{"num_nextn_predict_layers", 1}, {"mtp_hybrid_override_pattern", "*E"}},
           1}};
}

/// The tensors of the row's heads, in bf16, whose bytes no rounding may touch.
std::vector<std::pair<std::string, std::vector<int64_t>>> tensors_of(const Heads& row) {
  auto all = row.own;
  const SafeTensors file = SafeTensors::open(fixture(row.fixture));
  for (const auto& [from, to] : row.layers) {
    for (const TensorEntry& entry : file.tensors()) {
      if (entry.name.starts_with(from)) {
        all.emplace_back(to + entry.name.substr(from.size()), entry.shape);
      }
    }
  }
  return all;
}

using Edit = std::function<void(std::vector<std::pair<std::string, std::vector<int64_t>>>& tensors,
                                json& config)>;

/// Writes the row's checkpoint, with something changed.
void write(const Heads& row, const std::string& dir, const Edit& edit = {}) {
  const SafeTensors file = SafeTensors::open(fixture(row.fixture));
  json config = config::parse(read_text_file(fixture(row.fixture) + "/config.json"), row.fixture);
  json& inside = config.contains("text_config") ? config["text_config"] : config;
  inside.erase("mtp_num_hidden_layers");
  inside.erase("time_step_limit");  // its infinity is no JSON, and the default
  auto more = tensors_of(row);
  inside.update(row.config);
  if (edit) {
    edit(more, inside);
  }
  std::vector<TensorSource> sources;
  for (const TensorEntry& entry : file.tensors()) {
    sources.push_back(TensorSource::from_memory(entry.name, entry.dtype, entry.shape, entry.data));
  }
  std::vector<std::vector<uint16_t>> values;
  for (const auto& [name, shape] : more) {
    int64_t count = 1;
    for (const int64_t size : shape) {
      count *= size;
    }
    Rng random(4, name.size());
    std::vector<uint16_t>& numbers = values.emplace_back();
    for (int64_t i = 0; i < count; ++i) {
      numbers.push_back(static_cast<uint16_t>(random.between(0, 0x3fff)));
    }
    sources.push_back(TensorSource::from_memory(name, StoredType::kBF16, shape, numbers.data()));
  }
  make_folder(dir);
  write_file_atomically(dir + "/config.json", config.dump(1));
  write_safetensors(dir + "/model.safetensors", std::move(sources));
}

std::vector<float> logits_of(Model& model) {
  Arena arena;
  Context ctx{.arena = &arena};
  Batch batch;
  batch.add(std::vector<int32_t>{5, 9, 100, 3, 77, 12});
  const Tensor logits = model.logits(ctx, model.forward(ctx, batch));
  return {logits.ptr<float>(), logits.ptr<float>() + logits.numel()};
}

void expect_same_bytes(const std::string& dir, const std::string& other, const std::string& prefix,
                       const Heads& row) {
  const SafeTensors a = SafeTensors::open(dir);
  const SafeTensors b = SafeTensors::open(other);
  for (const auto& [name, shape] : tensors_of(row)) {
    const TensorEntry& x = a.at(name);
    const TensorEntry& y = b.at(prefix + name);
    EXPECT_TRUE(x.dtype == y.dtype && x.shape == y.shape &&
                std::equal(x.bytes().begin(), x.bytes().end(), y.bytes().begin(), y.bytes().end()))
        << name;
  }
}

/// The model as one of our own layout, whose memory it views.
LoadedModel as_cambium(LoadedModel& model) {
  ModelSpec spec = model.model->spec();
  spec.family = "cambium";
  std::map<std::string, Tensor> tensors = tensors_of(*model.model);
  return view_model(spec, *model.model, [&](const std::string& name) { return tensors.at(name); });
}

TEST(KeptTensors, TravelWithTheModelAndDoNotRun) {
  for (const Heads& row : rows()) {
    SCOPED_TRACE(fmt::format("{}, {} heads", row.fixture, row.heads));
    const TestFolder folder;
    write(row, folder.at("from"));
    LoadedModel model = load_model(folder.at("from"));
    const KeptSpec& kept = model.model->spec().kept;
    ASSERT_NE(kept.tensors, nullptr);
    EXPECT_EQ(kept.family, model.model->spec().family);
    EXPECT_EQ(kept.heads, row.heads);
    EXPECT_EQ(kept.tensors->entries.size(), tensors_of(row).size());
    EXPECT_FALSE(kept_is_stale(model.model->spec()));
    EXPECT_THAT(describe_kept(model.model->spec()), HasSubstr(kept.family + " for more tokens"));
    LoadedModel plain = load_model(fixture(row.fixture));
    EXPECT_EQ(describe_kept(plain.model->spec()), "");
    EXPECT_EQ(plain.model->parameter_count(), model.model->parameter_count());
    EXPECT_EQ(logits_of(*plain.model), logits_of(*model.model));
    // The family's layout, and our own, twice.
    save_model(*model.model, folder.at("again"), {});
    expect_same_bytes(folder.at("from"), folder.at("again"), "", row);
    EXPECT_EQ(read_spec(folder.at("again")).kept.heads, row.heads);
    EXPECT_EQ(read_spec(folder.at("again")).kept.kinds, kept.kinds);
    save_model(*as_cambium(model).model, folder.at("ours"), {});
    LoadedModel ours = load_model(folder.at("ours"));
    save_model(*ours.model, folder.at("ours2"), {});
    for (const char* name : {"ours", "ours2"}) {
      expect_same_bytes(folder.at("from"), folder.at(name), "kept.", row);
      const ModelSpec spec = read_spec(folder.at(name));
      EXPECT_EQ(spec.kept.family, kept.family);
      EXPECT_EQ(spec.kept.heads, row.heads);
      EXPECT_EQ(spec.kept.kinds, kept.kinds);
      EXPECT_EQ(spec.kept.tensors->numbers(), kept.tensors->numbers());
      EXPECT_THAT(describe_kept(spec), HasSubstr("; stale"));
    }
  }
}

// What llama.cpp runs is the model alone.
TEST(KeptTensors, StayOutOfGgufFiles) {
  for (const Heads& row : rows()) {
    if (row.fixture != std::string("deepseek_v3") && row.fixture != std::string("nemotron_h_moe")) {
      continue;  // others ask for what these fixtures do not have
    }
    SCOPED_TRACE(fmt::format("{}, {} heads", row.fixture, row.heads));
    const TestFolder folder;
    write(row, folder.at("from"));
    export_gguf(folder.at("from"), folder.at("with.gguf"), {GgufType::kF32, ""});
    export_gguf(fixture(row.fixture), folder.at("without.gguf"), {GgufType::kF32, ""});
    EXPECT_EQ(read_text_file(folder.at("with.gguf")), read_text_file(folder.at("without.gguf")));
  }
}

TEST(KeptTensors, ThoseThatDoNotFitAreNamed) {
  const std::vector<Heads> all = rows();
  const struct {
    const char* what;
    size_t row;
    Edit edit;
    const char* error;
  } cases[] = {
      {"one is missing", 0, [](auto& tensors, json&) { tensors.erase(tensors.begin() + 2); },
       "tensor model.layers.4.eh_proj.weight of a head that predicts more tokens is missing"},
      {"one of its layer is missing", 3,
       [](auto& tensors, json&) {
         std::erase_if(tensors, [](const auto& t) { return t.first.ends_with("q_proj.weight"); });
       },
       "tensor mtp.layers.0.self_attn.q_proj.weight of a head that predicts more tokens is "
       "missing"},
      {"a shape", 3,
       [](auto& tensors, json&) {
         tensors[0].second = {64, 64};
       },
       "tensor mtp.fc.weight has shape (64, 64), expected (64, 128) by config.json"},
      {"a shape in its layer", 5,
       [](auto& tensors, json&) {
         for (auto& [name, shape] : tensors) {
           shape = name.ends_with("k_proj.weight") ? std::vector<int64_t>{32, 64} : shape;
         }
       },
       "tensor mtp.layers.0.mixer.k_proj.weight has shape (32, 64), expected (64, 64)"},
      {"one too many", 5,
       [](auto& tensors, json&) {
         tensors.push_back({"mtp.layers.2.norm.weight", {64}});
       },
       "tensor mtp.layers.2.norm.weight (64) is none of a head that predicts more tokens"},
      {"more heads than config.json says", 2,
       [](auto&, json& config) { config["num_nextn_predict_layers"] = 1; },
       "tensor model.layers.5."},
      {"none by config.json", 0,
       [](auto&, json& config) { config["num_nextn_predict_layers"] = 0; },
       "config.json says num_nextn_predict_layers 0"},
      {"a kind of layer that the model has not", 5,
       [](auto&, json& config) { config["mtp_hybrid_override_pattern"] = "*-"; },
       "has a layer - (mtp_hybrid_override_pattern), and the model has none like it"}};
  for (const auto& c : cases) {
    const TestFolder folder;
    write(all[c.row], folder.at("from"), c.edit);
    EXPECT_THAT(testing::error_of([&] { read_spec(folder.at("from")); }), HasSubstr(c.error))
        << c.what;
  }
  // A configuration that counts heads beside files that have none is what many publish.
  const TestFolder folder;
  write(all[0], folder.at("from"), [](auto& tensors, json&) { tensors.clear(); });
  EXPECT_EQ(read_spec(folder.at("from")).kept.tensors, nullptr);
  // In our own layout what is said is there, and what is there is said.
  write(all[0], folder.at("whole"));
  LoadedModel model = load_model(folder.at("whole"));
  LoadedModel plain = load_model(folder.at("from"));
  save_model(*as_cambium(model).model, folder.at("ours"), {});
  save_model(*as_cambium(plain).model, folder.at("none"), {});
  for (const char* name : {"ours", "none"}) {
    std::filesystem::remove(folder.at(name) + "/checksums.json");
  }
  const auto weights = [&](const char* name) { return folder.at(name) + "/model.safetensors"; };
  std::filesystem::rename(weights("ours"), folder.at("with"));
  std::filesystem::rename(weights("none"), weights("ours"));
  std::filesystem::rename(folder.at("with"), weights("none"));
  EXPECT_THAT(testing::error_of([&] { read_spec(folder.at("ours")); }),
              HasSubstr("config.json says that tensors of deepseek_v3 are kept, and the files "
                        "have none"));
  EXPECT_THAT(testing::error_of([&] { load_model(folder.at("none")); }),
              HasSubstr("tensor kept.model.layers.4."));
}

}  // namespace
}  // namespace cambium
