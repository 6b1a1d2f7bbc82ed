// The whole graft on teachers whose attention is not a layer's only mixer, or is on latents.
#include <gmock/gmock.h>

#include <filesystem>

#include "base/test_folder.h"
#include "base/test_paths.h"
#include "hybrid/folder_check.h"
#include "hybrid/pipeline.h"
#include "hybrid/testing.h"

namespace cambium {
namespace {

constexpr const char* kPlanOfFamilies = R"(
name = "tiny"
[data.problems]
retrieval_share = 0.0
[data.problems.word]
min_steps = 1
max_steps = 1
[evaluate]
held_out_documents = 1
held_out_tokens = 200
problems = 2
retrieval = 1
max_new_tokens = 2
contexts = [8]
speed_repeats = 1
[graft]
mixer = "gated_delta_net"
calibrate = 0
[place]
documents = 1
[align]
steps = 1
sequence_length = 256
[distill]
steps = 1
sequence_length = 256
[[stage]]
name = "gates"
branch = true
layers = 1
place = {method = "gates", probe = {steps = 1, sequence_length = 256}}
[[stage]]
name = "search"
[stage.graft]
mixer = "gated_delta_net"
window = 16
[stage.place]
method = "search"
mixers = ["sliding_window"]
cost = "cache"
context = 200
budget = 0.8
evaluations = 5
)";

struct FamilyRow {
  const char* fixture;
  const char* map;
};

class PipelineOf : public ::testing::TestWithParam<FamilyRow> {};

TEST_P(PipelineOf, ChoosesConvertsTrainsAndMeasures) {
  const TestFolder folder;
  const std::string fixture = std::string(kSourceDir) + "/tests/fixtures/" + GetParam().fixture;
  const LoadedModel teacher = load_model(fixture);
  testing::write_inputs(folder.path(), kPlanOfFamilies, *teacher.model);
  const RunSummary summary = testing::run(folder.path(), "run");
  ASSERT_EQ(summary.models.size(), 3);
  EXPECT_EQ(summary.models[0].map, GetParam().map);
  for (size_t i = 1; i < summary.models.size(); ++i) {
    const ModelSummary& model = summary.models[i];
    SCOPED_TRACE(model.name + " " + model.map);
    EXPECT_GE(model.converted, 1);
    EXPECT_NE(model.map, GetParam().map);
    EXPECT_TRUE(model.gate.passed) << model.gate.reason;
    EXPECT_GT(model.reverse_kl, 0.0);
    EXPECT_GT(model.accuracy.total, 0);
    EXPECT_LT(model.cache_bytes_per_token, summary.models[0].cache_bytes_per_token);
    const ModelSpec hybrid = read_spec(std::filesystem::path(folder.at("run")) / model.dir);
    for (size_t layer = 0; layer < hybrid.layers.size(); ++layer) {
      const std::vector<UnitSpec> before = teacher.model->spec().layers[layer].mixers();
      const std::vector<UnitSpec> after = hybrid.layers[layer].mixers();
      ASSERT_EQ(after.size(), before.size());
      EXPECT_TRUE(std::equal(after.begin() + 1, after.end(), before.begin() + 1));
    }
  }
  for (const FolderCheckRow& row : check_folder(folder.at("run"))) {
    EXPECT_TRUE(row.ok) << row.path << ": " << row.text;
  }
}

INSTANTIATE_TEST_SUITE_P(Teachers, PipelineOf,
                         ::testing::Values(FamilyRow{"falcon_h1", "(A2)(A2)(A2)"},
                                           FamilyRow{"deepseek_v32", "LLLL"},
                                           FamilyRow{"kimi_linear", "KKKL"}),
                         [](const auto& info) { return std::string(info.param.fixture); });

}  // namespace
}  // namespace cambium
