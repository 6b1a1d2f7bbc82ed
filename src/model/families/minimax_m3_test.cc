// Files as MiniMax-M3 was released: a model of text beside one of images, experts apart, names of
// their own. They are made of the fixture, which has transformers' names.
#include <gtest/gtest.h>

#include "base/test_folder.h"
#include "base/test_paths.h"
#include "files/safetensors.h"
#include "model/families/testing.h"
#include "model/weights.h"
#include "tensor/copy.h"

namespace cambium {
namespace {

using testing::Json;

const std::string kFixture = std::string(kSourceDir) + "/tests/fixtures/minimax_m3";

std::vector<float> logits_of(Model& model) {
  Arena arena;
  Context ctx{.arena = &arena};
  Batch batch;
  std::vector<int32_t> tokens;
  for (int32_t i = 0; i < 60; ++i) {
    tokens.push_back(3 + i * i % 200);
  }
  batch.add(tokens);
  return elements_of(model.logits(ctx, model.forward(ctx, batch)));
}

/// The name with `from` replaced, where it is there.
std::string replaced(std::string name, std::string_view from, std::string_view to) {
  const size_t at = name.find(from);
  return at == std::string::npos ? name : name.replace(at, from.size(), to);
}

/// Equal parts of a tensor's rows under names of their own.
void add_parts(std::vector<TensorSource>& sources, const TensorEntry& t,
               const std::vector<std::string>& names, std::vector<int64_t> shape) {
  for (size_t i = 0; i < names.size(); ++i) {
    sources.push_back(
        TensorSource::from_memory(names[i], t.dtype, shape, t.data + i * (t.size / names.size())));
  }
}

void write_released(const std::string& folder) {
  const SafeTensors file = SafeTensors::open(kFixture);
  std::vector<TensorSource> sources;
  for (const TensorEntry& t : file.tensors()) {
    std::string name = "language_model." + t.name;
    name = replaced(name, ".mlp.gate.e_score", ".block_sparse_moe.e_score");
    for (const char* part : {"experts.", "gate.", "shared_experts."}) {
      name = replaced(name, std::string(".mlp.") + part, std::string(".block_sparse_moe.") + part);
    }
    name = replaced(name, ".self_attn.indexer.", ".self_attn.index_");
    std::vector<std::string> names = {name};
    std::vector<int64_t> shape = t.shape;
    if (shape.size() == 3) {
      names.clear();
      const bool both = name.ends_with("gate_up_proj");
      for (int64_t e = 0; e < t.shape[0]; ++e) {
        for (const char* part :
             both ? std::vector<const char*>{"w1", "w3"} : std::vector<const char*>{"w2"}) {
          names.push_back(replaced(name, both ? "gate_up_proj" : "down_proj",
                                   std::to_string(e) + "." + part + ".weight"));
        }
      }
      shape = {t.shape[1] / (both ? 2 : 1), t.shape[2]};
    } else if (name.ends_with("gate_up_proj.weight")) {
      names = {replaced(name, "gate_up", "gate"), replaced(name, "gate_up", "up")};
      shape = {t.shape[0] / 2, t.shape[1]};
    }
    add_parts(sources, t, names, shape);
  }
  const std::vector<float> patch(8);
  sources.push_back(
      TensorSource::from_memory("vision_tower.vision_model.embeddings.patch_embedding.weight",
                                StoredType::kF32, {2, 4}, patch.data()));
  write_safetensors(folder + "/model.safetensors", sources, {});
  Json config = {{"model_type", "minimax_m3_vl"},
                 {"text_config", Json::parse(read_text_file(kFixture + "/config.json"))}};
  config["text_config"].erase("architectures");
  write_file_atomically(folder + "/config.json", config.dump(1));
}

TEST(MinimaxM3, ReleasedFilesAreReadForTheirText) {
  const TestFolder folder;
  write_released(folder.path());
  const LoadedModel released = load_model(folder.path());
  const LoadedModel saved = load_model(kFixture);
  EXPECT_EQ(released.model->spec(), saved.model->spec());
  EXPECT_EQ(logits_of(*released.model), logits_of(*saved.model));
}

}  // namespace
}  // namespace cambium
