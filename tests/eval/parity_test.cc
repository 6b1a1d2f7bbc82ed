// Every family against logits of its reference implementation, by every way through the model.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <limits>

#include "base/file.h"
#include "base/test_folder.h"
#include "base/test_paths.h"
#include "base/testing.h"
#include "eval/verify.h"
#include "files/safetensors.h"
#include "model/weights.h"
#include "tensor/device_memory.h"

namespace cambium {
namespace {

std::string fixture(const std::string& name) {
  return std::string(kSourceDir) + "/tests/fixtures/" + name;
}

// Every folder of tests/fixtures that holds a reference.
std::vector<std::string> fixtures() {
  std::vector<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(fixture(""))) {
    if (std::filesystem::exists(entry.path() / "reference.safetensors")) {
      names.push_back(entry.path().filename().string());
    }
  }
  std::sort(names.begin(), names.end());
  return names;
}

class Parity : public ::testing::TestWithParam<std::string> {};

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

TEST_P(Parity, ACacheChangesNothing) {
  const LoadedModel loaded = load_model(fixture(GetParam()));
  std::vector<int32_t> text;
  for (int32_t i = 0; i < 130; ++i) {
    text.push_back(i * 37 % static_cast<int32_t>(loaded.model->spec().vocab));
  }
  const VerifyReport report = verify_cached(*loaded.model, {text, {3, 1, 2}});
  EXPECT_TRUE(report.ok());
  ASSERT_GE(report.rows.size(), 14U);
  EXPECT_EQ(report.rows.front().way, "prefill at once");
  EXPECT_EQ(report.rows.front().tokens, 133);
  // Not because anything passes: pieces round differently than the whole.
  EXPECT_FALSE(verify_cached(*loaded.model, {text}, {.max_error = 0.0}).ok());
}

struct Bounds {
  double error, kl;  // in bf16, as the percentage
  int64_t same_percent;
  double f32_error = 1e-4;
};

/// Where rounding may turn a hard choice (of experts, of keys) a token can become another one, so
/// that the largest error says nothing. The bounds are twice what PyTorch's bf16 has on the same
/// fixtures where that is more (KL: kimi_k2 0.221, deepseek_v32 0.135, the others up to 0.019;
/// error: apriel2, by its authors' code with what goes from module to module rounded, 0.66). What
/// makes much of rounding in bf16 does so in f32: on the CPU apriel2 is off by 6.0e-5.
Bounds bounds_of(const std::string& dir) {
  const ModelSpec spec = read_spec(dir);
  bool chooses = false;
  bool chooses_keys = false;
  for (const LayerSpec& layer : spec.layers) {
    for (const BranchSpec& branch : layer.branches) {
      for (const UnitSpec& unit : branch.units) {
        chooses = chooses || unit.kind == "experts";
        chooses_keys = chooses_keys || unit.options.has("index_top");
      }
    }
  }
  if (spec.family == "kimi_k2" || chooses_keys) {
    return {10.0, 0.45, 55};
  }
  if (spec.family == "apriel2") {
    return {1.3, 2e-3, 90, 2e-4};
  }
  return chooses ? Bounds{10.0, 0.04, 80} : Bounds{0.4, 2e-3, 90};
}

TEST_P(Parity, OnTheGpu) {
  if (cuda_devices() == 0) {
    GTEST_SKIP() << why_no_cuda();
  }
  const std::string dir = fixture(GetParam());
  const auto report = [&](MatrixStorage storage, const VerifyConfig& config) {
    const LoadedModel loaded =
        load_model(dir, {.storage = storage, .device = Device::kCuda, .check_golden = false});
    return verify_model(*loaded.model, dir + "/reference.safetensors", config);
  };
  const Bounds bounds = bounds_of(dir);
  for (const VerifyRow& row : report(MatrixStorage::kF32, {}).rows) {
    EXPECT_TRUE(row.ok) << row.way << ": error " << row.error << ", KL " << row.kl;
    EXPECT_LT(row.error, bounds.f32_error) << row.way;
  }
  for (const VerifyRow& row : report(MatrixStorage::kBF16, {}).rows) {
    EXPECT_LT(row.error, bounds.error) << row.way << " in bf16";
    EXPECT_LT(row.kl, bounds.kl) << row.way << " in bf16";
    EXPECT_GT(row.same_choice, row.tokens * bounds.same_percent / 100) << row.way << " in bf16";
  }
}

INSTANTIATE_TEST_SUITE_P(Families, Parity, ::testing::ValuesIn(fixtures()),
                         [](const auto& info) { return info.param; });

TEST(Fixtures, AreHere) {
  EXPECT_GE(fixtures().size(), 5U);
}

/// The fixture with other files: `edit` changes config.json's text.
struct Variant {
  explicit Variant(const std::string& name) : from(fixture(name)) {}
  TestFolder folder;
  std::string from;

  void config(const std::string& old_text, const std::string& new_text) {
    std::string text = read_text_file(from + "/config.json");
    const size_t at = text.find(old_text);
    ASSERT_NE(at, std::string::npos);
    write_file_atomically(folder.at("config.json"), text.replace(at, old_text.size(), new_text));
  }
  void weights(uint64_t shard_bytes, const std::string& old_name = "",
               const std::string& new_name = "") {
    const SafeTensors file = SafeTensors::open(from);
    std::vector<TensorSource> sources;
    for (const TensorEntry& t : file.tensors()) {
      sources.push_back(TensorSource::from_memory(t.name == old_name ? new_name : t.name, t.dtype,
                                                  t.shape, t.data));
    }
    SafeTensorsOptions options;
    options.max_shard_bytes = shard_bytes;
    write_safetensors(folder.at("model.safetensors"), sources, options);
  }
  double error() {
    const LoadedModel loaded = load_model(folder.path());
    return verify_model(*loaded.model, from + "/reference.safetensors").rows.front().error;
  }
};

TEST(Variants, ShardsReadAsOneFile) {
  Variant v("llama");
  v.config("\"llama\"", "\"llama\"");
  v.weights(100000);
  ASSERT_TRUE(std::filesystem::exists(v.folder.at("model.safetensors.index.json")));
  EXPECT_LT(v.error(), 1e-4);
}

// One token's embedding is not a number; the prompt after the last that has it is as it was.
TEST(Variants, WhatIsNoNumberInOnePromptIsNotForgottenAtTheNext) {
  const std::string dir = fixture("llama");
  const LoadedModel loaded = load_model(dir, {.storage = MatrixStorage::kF32});
  const SafeTensors file = SafeTensors::open(dir + "/reference.safetensors");
  const std::vector<int64_t> with = as_i64(file.at("tokens.1"));
  const std::vector<int64_t> without = as_i64(file.at("tokens.2"));
  const auto token = std::find_if(with.begin(), with.end(), [&](int64_t id) {
    return std::find(without.begin(), without.end(), id) == without.end();
  });
  ASSERT_NE(token, with.end());
  int64_t found = 0;
  loaded.model->visit([&](const std::string& name, Parameter& p) {
    if (name == "embed.weight") {
      ++found;
      const int64_t width = p.tensor.dim(1);
      std::fill_n(p.tensor.ptr<float>() + *token * width, width,
                  std::numeric_limits<float>::quiet_NaN());
    }
  });
  ASSERT_EQ(found, 1);
  for (const VerifyRow& row : verify_model(*loaded.model, dir + "/reference.safetensors").rows) {
    EXPECT_TRUE(std::isnan(row.error)) << row.way;
    EXPECT_TRUE(std::isnan(row.kl)) << row.way;
    EXPECT_FALSE(row.ok) << row.way;
  }
}

TEST(Variants, TheRankOfAStepProjectionIsItsTensors) {
  for (const char* rank : {"7", "null", "5"}) {
    Variant v("apriel_h1");
    v.config("\"dt_rank\": \"auto\"", std::string("\"dt_rank\": ") + rank);
    v.weights(0);
    EXPECT_LT(v.error(), 1e-4) << rank;
  }
}

TEST(Variants, SpellingsOfConfigurations) {
  const std::pair<const char*, const char*> edits[] = {
      {"\"rope_theta\": 10000.0", "\"head_dim\": null, \"rope_scaling\": null"},
      {"\"rope_theta\": 10000.0",
       "\"rope_parameters\": {\"rope_type\": \"default\", \"rope_theta\": 10000.0}"},
      {"\"torch_dtype\"", "\"dtype\""}};
  for (const auto& [old_text, new_text] : edits) {
    Variant v("llama");
    v.config(old_text, new_text);
    v.weights(0);
    EXPECT_LT(v.error(), 1e-4) << new_text;
  }
}

TEST(Variants, RotationsOfAnotherScaleAreSeen) {
  Variant v("llama");
  v.config(
      "\"rope_theta\": 10000.0",
      "\"rope_theta\": 10000.0, \"rope_scaling\": {\"rope_type\": \"llama3\", \"factor\": 8.0, "
      "\"low_freq_factor\": 1.0, \"high_freq_factor\": 4.0, "
      "\"original_max_position_embeddings\": 64}");
  v.weights(0);
  EXPECT_GT(v.error(), 1e-3);
}

TEST(Variants, TiedEmbeddingsMayHaveKeptTheNameOfTheHead) {
  Variant v("llama");
  v.config("\"llama\"", "\"llama\"");
  v.weights(0, "model.embed_tokens.weight", "lm_head.weight");
  EXPECT_LT(v.error(), 1e-4);
}

TEST(Variants, ATiedHeadThatIsAnotherMatrixIsAnError) {
  Variant v("qwen3");
  v.config("\"tie_word_embeddings\": false", "\"tie_word_embeddings\": true");
  v.weights(0);
  EXPECT_NE(testing::error_of([&] {
              v.error();
            }).find("model.embed_tokens.weight and lm_head.weight are not the same"),
            std::string::npos);
}

TEST(Variants, InfinitiesOfPythonInKeysThatAreNotUsed) {
  Variant v("llama");
  v.config("\"rope_theta\"",
           "\"time_step_limit\": [0.0, Infinity, -Infinity, NaN], \"note\": \"an \\\"Infinity\\\" "
           "of NaN\", \"rope_theta\"");
  v.weights(0);
  EXPECT_LT(v.error(), 1e-4);
}

// Within the original positions dynamic scaling is the plain rotation, and so is linear scaling
// by 1.
TEST(Variants, ScalingsThatChangeNothing) {
  for (const char* scaling : {"{\"rope_type\": \"dynamic\", \"factor\": 2.0}",
                              "{\"type\": \"linear\", \"factor\": 1.0}"}) {
    Variant v("llama");
    v.config("\"rope_theta\"", std::string("\"rope_scaling\": ") + scaling + ", \"rope_theta\"");
    v.weights(0);
    EXPECT_LT(v.error(), 1e-4) << scaling;
  }
}

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
    layer.mixer()->options.set("window", int64_t{33});
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

TEST(Verify, RoundedChoicesHaveWiderBounds) {
  EXPECT_EQ(bf16_bounds(read_spec(fixture("llama"))).max_kl, 2e-3);
  EXPECT_EQ(bf16_bounds(read_spec(fixture("mixtral"))).max_kl, 0.45);       // experts
  EXPECT_EQ(bf16_bounds(read_spec(fixture("deepseek_v32"))).max_kl, 0.45);  // keys
}

TEST(Verify, AReferenceOfAnotherModelIsAnError) {
  const LoadedModel loaded = load_model(fixture("llama"));
  EXPECT_THROW(verify_model(*loaded.model, fixture("llama") + "/model.safetensors"), Error);
  EXPECT_THROW(verify_model(*loaded.model, fixture("llama") + "/absent.safetensors"), Error);
}

}  // namespace
}  // namespace cambium
