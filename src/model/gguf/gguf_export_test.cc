#include "model/gguf/gguf_export.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <numeric>

#include "base/checked.h"
#include "base/test_paths.h"
#include "base/testing.h"
#include "files/safetensors.h"
#include "model/gguf/gguf_testing.h"
#include "model/spec.h"
#include "model/weights.h"
#include "tensor/copy.h"

namespace cambium {
namespace {

using testing::error_of;
using ::testing::HasSubstr;
using testing::ImportTest;
using testing::Tiny;

std::string fixture(const std::string& name) {
  return std::string(kSourceDir) + "/tests/fixtures/" + name;
}

class ExportTest : public ImportTest {
 protected:
  /// Exports the folder and imports the file again.
  void there_and_back(const std::string& folder, GgufType type = GgufType::kF32) {
    export_gguf(folder, back_gguf_, {type, ""});
    GgufImportOptions options;
    options.float32 = true;
    options.replace = true;
    import_gguf(back_gguf_, back_, options);
  }
  static std::vector<float> logits_of(const std::string& folder) {
    const LoadedModel loaded = load_model(folder);
    Arena arena;
    Context ctx{.arena = &arena};
    Batch batch;
    batch.add(std::vector<int32_t>{5, 9, 100, 3, 200, 77, 5});
    return elements_of(loaded.model->logits(ctx, loaded.model->forward(ctx, batch)));
  }
  /// What comes back computes the same, but for what logarithms of decays lose.
  void expect_comes_back(const std::string& folder, const std::string& architecture) {
    there_and_back(folder);
    EXPECT_EQ(Gguf(back_gguf_).text("general.architecture"), architecture);
    const std::vector<float> ours = logits_of(folder);
    const std::vector<float> back = logits_of(back_);
    ASSERT_EQ(ours.size(), back.size());
    float size = 0.0F;
    double worst = 0.0;
    for (size_t i = 0; i < ours.size(); ++i) {
      size = std::max(size, std::abs(ours[i]));
      worst = larger_error(worst, std::abs(ours[i] - back[i]));
    }
    EXPECT_LE(worst, 2e-5F * size);
  }
  static std::map<std::string, std::vector<float>> values(const std::string& folder) {
    std::map<std::string, std::vector<float>> all;
    const SafeTensors file = SafeTensors::open(folder);
    for (const TensorEntry& entry : file.tensors()) {
      all[entry.name] = as_f32(entry);
    }
    return all;
  }

  const std::string back_gguf_ = folder_.at("back.gguf");
  const std::string back_ = folder_.at("back");
};

TEST_F(ExportTest, AnImportIsWhatWasExported) {
  struct Case {
    const char* name;
    Tiny tiny;
  };
  std::vector<Case> cases(4);
  cases[0].name = "llama, tied";
  cases[1].name = "llama with a head and a begin token";
  cases[1].tiny.tied = false;
  cases[1].tiny.add_bos = true;
  cases[2].name = "linear rope";
  cases[2].tiny.more = [](GgufBuilder& b) {
    b.text("llama.rope.scaling.type", "linear");
    b.f32("llama.rope.scaling.factor", 4.0F);
  };
  cases[3].name = "qwen2";
  cases[3].tiny.architecture = "qwen2";
  cases[3].tiny.pre = "qwen2";
  cases[3].tiny.more = [](GgufBuilder& b) {
    std::vector<float> q(8);
    std::iota(q.begin(), q.end(), 0.0F);
    b.tensor_f32("blk.0.attn_q.bias", {8}, q);
    b.tensor_f32("blk.0.attn_k.bias", {4}, std::vector<float>{0, 1, 2, 3});
    b.tensor_f32("blk.0.attn_v.bias", {4}, std::vector<float>{4, 5, 6, 7});
  };
  for (const Case& c : cases) {
    SCOPED_TRACE(c.name);
    GgufImportOptions options;
    options.float32 = true;
    options.replace = true;
    import(c.tiny, options);
    there_and_back(out_);
    EXPECT_EQ(values(back_), values(out_));
    for (const char* name : {"config.json", "tokenizer.json", "tokenizer_config.json"}) {
      std::ifstream mine(back_ + "/" + name);
      EXPECT_EQ(nlohmann::json::parse(mine), json(name)) << name;
    }
  }
}

// Of a head of 64, whose divisors say Llama 3's parameters again.
TEST_F(ExportTest, Llama3RopeComesBack) {
  import(Tiny());
  ModelSpec spec = read_spec(fixture("llama"));
  spec.vocab = 9;
  spec.bos_id = 0;
  spec.eos_ids = {0};
  spec.rope = {.theta = 500000.0, .dim = 64, .scaling = RopeScaling::kLlama3, .factor = 8.0};
  for (LayerSpec& layer : spec.layers) {
    layer.mixer()->options.set("head_dim", int64_t{64});
  }
  const LoadedModel model = fresh_model(spec, 1);
  SaveOptions save;
  save.tokenizer_from = out_;
  save_model(*model.model, folder_.at("model"), save);
  there_and_back(folder_.at("model"));
  EXPECT_EQ(read_spec(back_), spec);
  EXPECT_EQ(values(back_), values(folder_.at("model")));
}

// Families by their fixtures, which have no tokenizer: the file itself is read.
TEST_F(ExportTest, FamiliesKeepTheirTensors) {
  for (const char* name : {"llama", "llama_bias", "mistral", "qwen3", "llama_rope_yarn"}) {
    SCOPED_TRACE(name);
    export_gguf(fixture(name), back_gguf_, {GgufType::kF32, ""});
    const Gguf file(back_gguf_);
    EXPECT_EQ(file.text("tokenizer.ggml.model"), "none");
    const ModelSpec spec = read_spec(fixture(name));
    EXPECT_EQ(file.integer(file.text("general.architecture").value_or("") + ".block_count"),
              std::ssize(spec.layers));
    const auto stored = values(fixture(name));
    const GgufTensor* down = file.find("blk.0.ffn_down.weight");
    ASSERT_NE(down, nullptr);
    std::vector<float> read(static_cast<size_t>(down->rows() * down->columns()));
    dequantise_rows(*down, 0, down->rows(), read);
    EXPECT_EQ(read, stored.at("model.layers.0.mlp.down_proj.weight"));
  }
}

TEST_F(ExportTest, NarrowTypesAreNear) {
  const auto stored = values(fixture("llama")).at("model.layers.1.mlp.gate_proj.weight");
  float largest = 0.0F;
  for (const float x : stored) {
    largest = std::max(largest, std::abs(x));
  }
  const std::pair<GgufType, float> rows[] = {
      {GgufType::kF16, 1.0F / 2048}, {GgufType::kBF16, 1.0F / 256}, {GgufType::kQ8_0, 1.0F / 250}};
  for (const auto& [type, bound] : rows) {
    SCOPED_TRACE(gguf_block(type).name);
    export_gguf(fixture("llama"), back_gguf_, {type, ""});
    const Gguf file(back_gguf_);
    const GgufTensor* gate = file.find("blk.1.ffn_gate.weight");
    ASSERT_NE(gate, nullptr);
    EXPECT_EQ(gate->type, type);
    EXPECT_EQ(file.find("blk.1.ffn_norm.weight")->type, GgufType::kF32);
    // Its rows of 112 channels are no whole blocks.
    EXPECT_EQ(file.find("blk.1.ffn_down.weight")->type,
              type == GgufType::kQ8_0 ? GgufType::kF16 : type);
    std::vector<float> read(stored.size());
    dequantise_rows(*gate, 0, gate->rows(), read);
    double worst = 0.0;
    for (size_t i = 0; i < read.size(); ++i) {
      worst = larger_error(worst, std::abs(read[i] - stored[i]));
    }
    EXPECT_LE(worst, bound * largest);
    // The fixture's numbers are those of bf16, and small.
    EXPECT_EQ(worst > 0.0, type == GgufType::kQ8_0);
  }
}

// Rows of the table of architectures in both directions.
TEST_F(ExportTest, ArchitecturesComeBack) {
  const std::pair<const char*, const char*> rows[] = {{"llama_bias", "llama"},
                                                      {"llama_rope_longrope", "llama"},
                                                      {"ministral3", "mistral3"},
                                                      {"mixtral", "llama"},
                                                      {"qwen3_fp8", "qwen3"},
                                                      {"phi3_longrope", "phi3"},
                                                      {"olmo2", "olmo2"},
                                                      {"olmo3", "olmo2"},
                                                      {"granite", "granite"},
                                                      {"granite_moe", "granitemoe"},
                                                      {"smollm3", "smollm3"},
                                                      {"apertus", "apertus"},
                                                      {"minimax_m2", "minimax-m2"},
                                                      {"granite_hybrid", "granitehybrid"},
                                                      {"falcon_h1", "falcon-h1"},
                                                      {"nemotron_h", "nemotron_h"},
                                                      {"nemotron_h_moe", "nemotron_h_moe"},
                                                      {"nemotron_h_latent", "nemotron_h_moe"},
                                                      {"jamba", "jamba"},
                                                      {"lfm2", "lfm2"},
                                                      {"lfm2_moe", "lfm2moe"},
                                                      {"deepseek_v3", "deepseek2"},
                                                      {"deepseek_v32", "deepseek32"},
                                                      {"kimi_k2", "deepseek2"},
                                                      {"kimi_linear", "kimi-linear"},
                                                      {"bailing_hybrid", "bailingmoe3"}};
  for (const auto& [name, architecture] : rows) {
    SCOPED_TRACE(name);
    expect_comes_back(fixture(name), architecture);
  }
}

/// Changes an option of every unit of a kind that has one.
void set_all(ModelSpec& spec, std::string_view kind, std::string_view option,
             const OptionValue& value) {
  for (LayerSpec& layer : spec.layers) {
    for (BranchSpec& branch : layer.branches) {
      for (UnitSpec& unit : branch.units) {
        if (unit.kind == kind) {
          unit.options.set(option, value);
        }
      }
    }
  }
}

// Fixtures with what llama.cpp asks for, of random weights.
TEST_F(ExportTest, ArchitecturesOfChangedModelsComeBack) {
  struct Row {
    const char* name;
    const char* architecture;
    std::function<void(ModelSpec&)> change;
  };
  const auto square = [](ModelSpec& s) { set_all(s, "gated_delta_net", "value_dim", int64_t{16}); };
  // As wide as the longest text: none.
  const auto unwindowed = [](ModelSpec& s) {
    for (LayerSpec& layer : s.layers) {
      if (layer.mixer()->options.has("window")) {
        layer.mixer()->options.set("window", s.max_positions);
      }
    }
  };
  const Row rows[] = {
      {"qwen3_next", "qwen3next", square},
      {"qwen3_5", "qwen35", square},
      {"qwen3_5_moe", "qwen35moe", square},
      {"gemma2", "gemma2",
       [](ModelSpec& s) { set_all(s, "attention", "scale", 1.0 / std::sqrt(32.0)); }},
      {"gemma3", "gemma3", [](ModelSpec& s) { set_all(s, "attention", "scale", 0.25); }},
      {"phi3", "phi3", unwindowed},
      {"qwen2_swa", "qwen2", unwindowed},
      {"qwen3_moe", "qwen3moe",
       [](ModelSpec& s) { s.layers[1].branches[1].units = s.layers[0].branches[1].units; }},
      {"gpt_oss", "gpt-oss", [](ModelSpec& s) { set_all(s, "experts", "limit", 7.0); }},
      // Where nothing is said of these two they have a scaling of their own.
      {"gpt_oss", "gpt-oss",
       [](ModelSpec& s) {
         set_all(s, "experts", "limit", 7.0);
         s.rope = {.theta = s.rope.theta, .dim = s.rope.dim};
       }},
      {"apertus", "apertus",
       [](ModelSpec& s) { s.rope = {.theta = s.rope.theta, .dim = s.rope.dim}; }},
      {"bamba", "granitehybrid", [](ModelSpec& s) { set_all(s, "mamba2", "b_heads", int64_t{1}); }},
      {"minimax_m2", "minimax-01", [](ModelSpec& s) {
         nlohmann::json config = {{"model_type", "minimax_m1"},
                                  {"vocab_size", 384},
                                  {"hidden_size", 64},
                                  {"num_hidden_layers", 3},
                                  {"num_attention_heads", 4},
                                  {"num_key_value_heads", 2},
                                  {"head_dim", 16},
                                  {"rotary_dim", 8},
                                  {"auto_map", {{"AutoModelForCausalLM", "code"}}},
                                  {"num_local_experts", 4},
                                  {"num_experts_per_tok", 2},
                                  {"intermediate_size", 32},
                                  {"attn_type_list", {0, 0, 1}}};
         for (const char* branch : {"full_attention", "linear_attention", "mlp"}) {
           config[fmt::format("layernorm_{}_alpha", branch)] = 3.5;
         }
         s = find_family("minimax_m1").read_config(config.dump(), "here");
       }}};
  for (const Row& row : rows) {
    SCOPED_TRACE(row.architecture);
    ModelSpec spec = read_spec(fixture(row.name));
    row.change(spec);
    const LoadedModel model = fresh_model(spec, 1);
    SaveOptions save;
    save.replace = true;
    save_model(*model.model, folder_.at("changed"), save);
    expect_comes_back(folder_.at("changed"), row.architecture);
  }
}

// llama.cpp has hybrids that are Granites as such.
TEST_F(ExportTest, AHybridOfAttentionAloneIsAGranite) {
  ModelSpec spec = read_spec(fixture("granite_hybrid"));
  const auto attends = std::find_if(spec.layers.begin(), spec.layers.end(),
                                    [](const LayerSpec& l) { return l.mixes_by("attention"); });
  ASSERT_NE(attends, spec.layers.end());
  spec.layers.assign(3, LayerSpec(*attends));
  save_model(*fresh_model(spec, 1).model, folder_.at("attends"), {});
  expect_comes_back(folder_.at("attends"), "granite");
  EXPECT_EQ(read_spec(back_).family, "granite");
}

// What only a file's tensors or its reading back would show is refused before it is written too.
TEST_F(ExportTest, WhatHasNoTensorOrNoKeyIsNamed) {
  const auto refused = [&](const char* name, const std::function<void(ModelSpec&)>& change) {
    ModelSpec spec = read_spec(fixture(name));
    change(spec);
    SaveOptions save;
    save.replace = true;
    save_model(*fresh_model(spec, 1).model, folder_.at("changed"), save);
    return error_of([&] { export_gguf(folder_.at("changed"), back_gguf_); });
  };
  EXPECT_THAT(refused("lfm2", [](ModelSpec& s) { set_all(s, "short_conv", "bias", true); }),
              HasSubstr("a lfm2 model with layers.0.mixer.in_proj.bias cannot be written as GGUF: "
                        "llama.cpp's lfm2 has no tensor for it"));
  EXPECT_THAT(refused("kimi_k2",
                      [](ModelSpec& s) {
                        const Options& o = s.layers.front().mixer()->options;
                        const auto dims = static_cast<double>(o.integer("", "nope_dim") +
                                                              o.integer("", "rope_dim"));
                        set_all(s, "latent_attention", "scale", 1.0 / std::sqrt(dims));
                      }),
              HasSubstr("YaRN and no mscale_all_dim cannot be written as GGUF"));
  EXPECT_THAT(refused("bailing_hybrid",
                      [](ModelSpec& s) {
                        for (LayerSpec& layer : s.layers) {
                          if (layer.mixes_by("kimi_delta")) {
                            const Options& old = layer.mixer()->options;
                            Options plain;
                            for (const auto& [key, value] : old.values()) {
                              if (key != "decay" && key != "lower_bound") {
                                plain.set(key, value);
                              }
                            }
                            layer.mixer()->options = plain;
                          }
                        }
                      }),
              HasSubstr("cannot be written as GGUF, as the file could not be read back: "));
  EXPECT_FALSE(std::filesystem::exists(back_gguf_));
}

TEST_F(ExportTest, WhatTheFileCannotSayIsRefused) {
  const std::pair<const char*, const char*> rows[] = {
      {"apriel_h1",
       "a model of family apriel_h cannot be written as GGUF: layers.1, mamba, has groups of x and "
       "B that several heads share, and llama.cpp has Mamba and Mamba-2 as published; run it by "
       "Cambium"},
      {"olmo_hybrid", "llama.cpp has no architecture that computes it (here are those of llama"},
      {"mistral_swa", "'sliding_window' is 32, and llama.cpp's llama computes with null"},
      {"qwen2_swa", "'sliding_window' is 32, and llama.cpp's qwen2 computes with null"},
      {"phi3", "'sliding_window' is 32, and llama.cpp's phi3 computes with null"},
      {"gemma2", "'query_pre_attn_scalar' is 24, and llama.cpp's gemma2 computes with 32"},
      {"gpt_oss", "'swiglu_limit' is 2.0, and llama.cpp's gpt-oss computes with 7.0"},
      {"qwen3_moe", "'intermediate_size' is 112, and llama.cpp's qwen3moe"},
      {"qwen3_next", "states of 32 x 32 for each head, and this one's are 16 x 32"},
      {"bamba", "one group of B and C"}};
  for (const auto& [name, problem] : rows) {
    EXPECT_THAT(error_of([&, n = name] { export_gguf(fixture(n), back_gguf_); }),
                HasSubstr(problem));
  }
  const std::string teacher = std::string(kSourceDir) + "/models/teacher";
  EXPECT_THAT(error_of([&] { export_gguf(teacher, back_gguf_); }),
              HasSubstr("llama.cpp has no name for how this tokenizer cuts text"));
  EXPECT_THAT(error_of([&] {
                export_gguf(teacher, back_gguf_, {GgufType::kF16, "quen"});
              }),
              HasSubstr("'quen' is not one of llama.cpp's names"));
  EXPECT_THAT(error_of([] { parse_gguf_type("q4_0"); }), HasSubstr("expected f32, f16, bf16"));
  EXPECT_FALSE(std::filesystem::exists(back_gguf_));
}

// The first layer of our own layout that llama.cpp has nothing for, by what it has.
TEST_F(ExportTest, LayersThatLlamaCppLacksAreNamed) {
  struct Row {
    UnitSpec mixer;
    const char* problem;
  };
  const Options attention = {
      {"heads", int64_t{4}}, {"kv_heads", int64_t{2}}, {"head_dim", int64_t{16}}};
  Options cooled = attention;
  cooled.set("temperature", "key");
  Options sunk = attention;
  sunk.set("window", int64_t{8});
  sunk.set("sinks", int64_t{2});
  const Options mamba2 = {{"heads", int64_t{4}},   {"head_dim", int64_t{16}},
                          {"state", int64_t{8}},   {"x_heads", int64_t{4}},
                          {"b_heads", int64_t{2}}, {"c_heads", int64_t{2}},
                          {"conv", int64_t{4}},    {"norm_group", int64_t{64}},
                          {"norm_eps", 1e-5},      {"out_gate", "sigmoid"}};
  const Row rows[] = {
      {{"attention", cooled},
       "layers.1, attention, has a learned factor of the scores of each head (temperature), and "
       "llama.cpp has one number for all heads; run it by Cambium or in transformers"},
      {{"mamba2", mamba2},
       "layers.1, mamba2, has a sigmoid gate of its output (out_gate), and llama.cpp has a SiLU "
       "gate; run it by Cambium"},
      {{"sliding_window", sunk}, "layers.1, sliding_window, has first tokens that stay in sight"},
      {{"attention", attention}, "llama.cpp has no architecture that computes it (here are those"}};
  for (const Row& row : rows) {
    ModelSpec spec = read_spec(fixture("llama"));
    spec.family = "cambium";
    *spec.layers[1].mixer() = row.mixer;
    SaveOptions save;
    save.replace = true;
    save_model(*fresh_model(spec, 1).model, folder_.at("own"), save);
    EXPECT_THAT(error_of([&] { export_gguf(folder_.at("own"), back_gguf_); }),
                HasSubstr(row.problem));
    EXPECT_FALSE(std::filesystem::exists(back_gguf_));
  }
}

}  // namespace
}  // namespace cambium
