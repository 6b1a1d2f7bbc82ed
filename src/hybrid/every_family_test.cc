// What is done to a model of any family: an attention layer converted, the hybrid distilled, saved,
// loaded and checked. Every folder of tests/fixtures is a row.
#include <gmock/gmock.h>

#include <algorithm>
#include <filesystem>
#include <map>

#include "base/test_folder.h"
#include "base/test_paths.h"
#include "base/testing.h"
#include "hybrid/folder_check.h"
#include "hybrid/graft.h"
#include "hybrid/importance.h"
#include "model/supernet.h"
#include "nn/units/units.h"
#include "tensor/copy.h"
#include "train/testing.h"
#include "train/train_job.h"

namespace cambium {
namespace {

using ::testing::HasSubstr;

const std::filesystem::path kFixtures = std::filesystem::path(kSourceDir) / "tests" / "fixtures";

std::vector<std::string> families_at_hand() {
  std::vector<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(kFixtures)) {
    if (std::filesystem::exists(entry.path() / "model.safetensors")) {
      names.push_back(entry.path().filename().string());
    }
  }
  std::sort(names.begin(), names.end());
  return names;
}

std::vector<float> logits_of(Model& model) {
  std::vector<int32_t> tokens;
  for (int32_t i = 0; i < 20; ++i) {
    tokens.push_back((7 * i + 3) % 60);
  }
  Batch batch;
  batch.add(tokens);
  Arena arena;
  Context ctx{.arena = &arena};
  return elements_of(model.logits(ctx, model.forward(ctx, batch)));
}

class EveryFamily : public ::testing::TestWithParam<std::string> {
 protected:
  void SetUp() override { Progress::silence(true); }
  void TearDown() override { Progress::silence(false); }
};

TEST_P(EveryFamily, OnlyAttentionIsACandidate) {
  const LoadedModel teacher =
      load_model(kFixtures / GetParam(), {.storage = MatrixStorage::kStored});
  const ModelSpec& spec = teacher.model->spec();
  const std::vector<int64_t> open = attention_layers(spec);
  for (int64_t i = 0; i < std::ssize(spec.layers); ++i) {
    const LayerSpec& layer = spec.layers[static_cast<size_t>(i)];
    const bool candidate = std::find(open.begin(), open.end(), i) != open.end();
    const std::string kind = layer.mixer() == nullptr ? "none" : layer.mixer()->kind;
    const std::vector<UnitSpec> mixers = layer.mixers();
    const bool attends = std::any_of(mixers.begin(), mixers.end(), is_attention);
    EXPECT_EQ(candidate, attends) << "layer " << i;
    if (candidate) {
      EXPECT_TRUE(is_attention(*layer.mixer())) << "layer " << i;
      continue;
    }
    EXPECT_THAT(
        testing::error_of([&] { convert_spec(spec, spec, {i}, {.mixer = "gated_delta_net"}); }),
        HasSubstr("layer " + std::to_string(i) + " has no attention to replace: its mixer is " +
                  kind));
  }
  if (open.empty()) {
    EXPECT_THAT(testing::error_of([&] { open_layers(spec); }), HasSubstr("no attention layer"));
  }
}

// What a score of leaving it out and a conversion change is attention alone: what stands beside it
// (Falcon-H1's Mamba-2) stays, with its weights and factors.
TEST_P(EveryFamily, WhatStandsBesideAttentionStays) {
  LoadedModel teacher = load_model(kFixtures / GetParam(), {.storage = MatrixStorage::kStored});
  Model& model = *teacher.model;
  const std::vector<int64_t> open = attention_layers(model.spec());
  ASSERT_FALSE(open.empty());
  const int64_t layer = open.front();
  const LayerSpec& before = model.spec().layers[static_cast<size_t>(layer)];
  LoadedModel hybrid = convert(model, model, {layer}, {.mixer = "gated_delta_net"}, 1, true);
  LayerSpec after = hybrid.model->spec().layers[static_cast<size_t>(layer)];
  EXPECT_TRUE(after.mixes_by("gated_delta_net"));
  EXPECT_EQ(after.mixer()->out, before.mixer()->out);
  *after.mixer() = *before.mixer();
  EXPECT_EQ(after, before);
  const std::string attention = unit_prefix(layer, *before.mixer());
  const std::map<std::string, Tensor> ours = tensors_of(model);
  for (const auto& [name, tensor] : tensors_of(*hybrid.model)) {
    if (!name.starts_with(attention)) {
      EXPECT_EQ(tensor.data, ours.at(name).data) << name;
    }
  }
  // Without attention is with attention that adds nothing.
  LoadedModel silent = load_model(kFixtures / GetParam());
  silent.model->visit_layer(layer, [&](const std::string& name, Parameter& p) {
    if (name.starts_with(attention + "o_proj.")) {
      fill(p.tensor, 0.0);
    }
  });
  EXPECT_EQ(logits_of(*remove_layer(*silent.model, layer, false).model), logits_of(*silent.model));
}

/// Converted, trained, saved and found again.
void expect_kept(LoadedModel& teacher, const std::vector<int64_t>& layers,
                 const GraftOptions& options) {
  LoadedModel student = convert(*teacher.model, *teacher.model, layers, options, 1, true);
  const std::vector<float> converted = logits_of(*student.model);
  TrainConfig config = testing::tiny_config(2);
  config.loss = {.reverse_kl = 1.0F};
  const auto data = testing::copy_task();
  {
    Trainer trainer(*student.model, student.weights, config, *data, teacher.model.get());
    const TrainSummary summary = trainer.run();
    EXPECT_TRUE(std::isfinite(summary.last_loss) && summary.first_loss > 0.0);
  }
  const std::vector<float> trained = logits_of(*student.model);
  EXPECT_NE(trained, converted);
  const TestFolder folder;
  const std::string saved = folder.at("hybrid");
  save_trained(*student.model, student.weights, saved, {}, {});
  const LoadedModel again = load_model(saved);
  EXPECT_EQ(again.model->spec().layers, student.model->spec().layers);
  EXPECT_EQ(logits_of(*again.model), trained);
  for (const FolderCheckRow& row : check_folder(saved)) {
    EXPECT_TRUE(row.ok) << row.path << ": " << row.text;
  }
}

TEST_P(EveryFamily, AHybridIsMadeTrainedSavedAndFoundAgain) {
  LoadedModel teacher = load_model(kFixtures / GetParam(), {.storage = MatrixStorage::kStored});
  const std::vector<int64_t> open = attention_layers(teacher.model->spec());
  if (open.empty()) {
    GTEST_SKIP() << "has no attention to replace: " << layer_map(teacher.model->spec());
  }
  if (is_supernet(teacher.model->spec())) {
    GTEST_SKIP() << "draws a placement for each step, as supernets' own tests do";
  }
  // One mixer tells of a family's layers; a gate of attention's output must have a place in others.
  std::vector<std::string> mixers = {"gated_delta_net"};
  const UnitSpec& attention =
      *teacher.model->spec().layers[static_cast<size_t>(open.back())].mixer();
  if (attention.options.flag("", "gate", false)) {
    mixers.insert(mixers.end(), {"mamba", "mamba2"});
  }
  for (const std::string& mixer : mixers) {
    SCOPED_TRACE(mixer);
    expect_kept(teacher, {open.back()}, {.mixer = mixer});
  }
  // The teacher, which the hybrids had parts of, is as it was.
  EXPECT_EQ(logits_of(*teacher.model),
            logits_of(*load_model(teacher.dir, {.storage = MatrixStorage::kStored}).model));
}

INSTANTIATE_TEST_SUITE_P(Fixtures, EveryFamily, ::testing::ValuesIn(families_at_hand()),
                         [](const auto& info) { return info.param; });

}  // namespace
}  // namespace cambium
