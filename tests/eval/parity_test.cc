// Every family against logits of its reference implementation, by every way through the model.
#include <gtest/gtest.h>

#include <filesystem>

#include "eval/verify.h"
#include "model/weights.h"

namespace cambium {
namespace {

std::string fixture(const std::string& name) {
  return std::string(CAMBIUM_SOURCE_DIR) + "/tests/fixtures/" + name;
}

class Parity : public testing::TestWithParam<const char*> {};

TEST_P(Parity, EveryWayAgreesWithTheReference) {
  const std::string dir = fixture(GetParam());
  const LoadedModel loaded = load_model(dir);
  const VerifyReport report = verify_model(*loaded.model, dir + "/reference.safetensors");
  ASSERT_GE(report.rows.size(), 15U);
  for (const VerifyRow& row : report.rows) {
    EXPECT_TRUE(row.ok) << row.way << ": error " << row.error << ", KL " << row.kl << ", greedy "
                        << row.greedy_same << " of " << row.greedy_tokens;
    EXPECT_LT(row.error, 1e-4) << row.way;
    EXPECT_EQ(row.same_choice, row.tokens) << row.way;
  }
  EXPECT_EQ(report.rows.front().prompts, 3);
  EXPECT_EQ(report.rows.front().greedy_tokens, 36);
}

INSTANTIATE_TEST_SUITE_P(Families, Parity,
                         testing::Values("llama", "mistral", "mistral_swa", "qwen3", "apriel_h1"),
                         [](const auto& info) { return std::string(info.param); });

TEST(Verify, SeesAWeightThatIsWrong) {
  const std::string dir = fixture("mistral_swa");
  const LoadedModel loaded = load_model(dir);
  loaded.model->layer(2).visit([](const std::string& name, Parameter& p) {
    if (name == "mixer.k_proj.weight") {
      p.tensor.ptr<float>()[5] += 0.2F;
    }
  });
  const VerifyReport report = verify_model(*loaded.model, dir + "/reference.safetensors");
  EXPECT_FALSE(report.ok());
  EXPECT_GT(report.rows.front().error, 1e-3);
}

TEST(Verify, SeesAWindowThatIsWrong) {
  const std::string dir = fixture("mistral_swa");
  ModelSpec spec = read_spec(dir);
  for (LayerSpec& layer : spec.layers) {
    layer.mixer.options.set("window", int64_t{33});
  }
  Model model(spec);
  Weights weights;
  weights.allocate(model);
  const LoadedModel loaded = load_model(dir);
  std::map<std::string, Tensor> from;
  loaded.model->visit([&](const std::string& name, Parameter& p) { from[name] = p.tensor; });
  model.visit([&](const std::string& name, Parameter& p) { copy_values(p.tensor, from[name]); });
  EXPECT_FALSE(verify_model(model, dir + "/reference.safetensors").ok());
}

TEST(Verify, AReferenceOfAnotherModelIsAnError) {
  const LoadedModel loaded = load_model(fixture("llama"));
  EXPECT_THROW(verify_model(*loaded.model, fixture("llama") + "/model.safetensors"), Error);
  EXPECT_THROW(verify_model(*loaded.model, fixture("llama") + "/absent.safetensors"), Error);
}

}  // namespace
}  // namespace cambium
