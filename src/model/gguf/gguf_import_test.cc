#include "model/gguf/gguf_import.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <functional>
#include <nlohmann/json.hpp>
#include <numeric>

#include "base/error.h"
#include "base/file.h"
#include "base/test_folder.h"
#include "base/testing.h"
#include "files/checksums.h"
#include "files/gguf_builder.h"
#include "files/safetensors.h"
#include "model/gguf/gguf_rope.h"
#include "model/gguf/gguf_testing.h"
#include "model/weights.h"
#include "text/tokenizer.h"

namespace cambium {
namespace {

namespace fs = std::filesystem;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using testing::ImportTest;
using testing::kHidden;
using ::testing::ThrowsMessage;
using testing::Tiny;

TEST_F(ImportTest, WeightsTakeTheirPlaces) {
  uint64_t done = 0;
  uint64_t total = 0;
  GgufImportOptions options;
  options.float32 = true;
  options.progress = [&](uint64_t d, uint64_t t) { done = d, total = t; };
  const GgufImportSummary summary = import(Tiny(), options);
  EXPECT_EQ(summary.layers, 1);
  EXPECT_EQ(summary.bytes, static_cast<uint64_t>(summary.parameters) * 4);
  EXPECT_EQ(done, summary.bytes);
  EXPECT_EQ(total, summary.bytes);
  EXPECT_TRUE(summary.notes.empty());

  const SafeTensors model = SafeTensors::open(out_);
  EXPECT_EQ(model.tensors().size(), 11U);
  const auto first_column = [&](const std::string& name) {
    const TensorEntry& entry = model.at(name);
    EXPECT_EQ(entry.dtype, StoredType::kF32);
    const std::vector<float> values = as_f32(entry);
    std::vector<int> rows;
    for (size_t i = 0; i < values.size(); i += static_cast<size_t>(entry.shape.back())) {
      rows.push_back(static_cast<int>(values[i]) / 100);
    }
    return rows;
  };
  // Pairs (0, 1), (2, 3) of each head of four become halves.
  const std::string attention = "model.layers.0.self_attn.";
  EXPECT_THAT(first_column(attention + "q_proj.weight"), ElementsAre(0, 2, 1, 3, 4, 6, 5, 7));
  EXPECT_THAT(first_column(attention + "k_proj.weight"), ElementsAre(0, 2, 1, 3));
  EXPECT_THAT(first_column(attention + "v_proj.weight"), ElementsAre(0, 1, 2, 3));
  EXPECT_THAT(model.at("model.layers.0.mlp.down_proj.weight").shape, ElementsAre(8, 12));
  EXPECT_EQ(verify_checksums(out_), 6U);
}

TEST_F(ImportTest, ConfigSaysTheSame) {
  import(Tiny());
  const nlohmann::json config = json("config.json");
  const nlohmann::json expected = {{"architectures", {"LlamaForCausalLM"}},
                                   {"model_type", "llama"},
                                   {"vocab_size", 9},
                                   {"hidden_size", 8},
                                   {"intermediate_size", 12},
                                   {"num_hidden_layers", 1},
                                   {"num_attention_heads", 2},
                                   {"num_key_value_heads", 1},
                                   {"head_dim", 4},
                                   {"hidden_act", "silu"},
                                   {"max_position_embeddings", 64},
                                   {"rms_norm_eps", 1e-5},
                                   {"rope_theta", 500000.0},
                                   {"attention_bias", false},
                                   {"mlp_bias", false},
                                   {"tie_word_embeddings", true},
                                   {"torch_dtype", "bfloat16"},
                                   {"bos_token_id", 0},
                                   {"eos_token_id", 0},
                                   {"pad_token_id", nullptr}};
  EXPECT_EQ(config, expected);
  EXPECT_EQ(SafeTensors::open(out_).tensors()[0].dtype, StoredType::kBF16);
}

// The folder is what the strict loader of checkpoints takes.
TEST_F(ImportTest, TheResultLoads) {
  for (const bool tied : {true, false}) {
    Tiny tiny;
    tiny.tied = tied;
    GgufImportOptions options;
    options.replace = true;
    import(tiny, options);
    EXPECT_EQ(json("config.json")["tie_word_embeddings"], tied);
    const LoadedModel loaded = load_model(out_);
    ASSERT_NE(loaded.model, nullptr);
  }
}

TEST_F(ImportTest, ShardsAndTheGoldenHook) {
  GgufImportOptions options;
  options.max_shard_bytes = 500;
  options.finish = [&](const std::string& folder) {
    EXPECT_TRUE(fs::exists(folder + "/tokenizer.json"));
    add_golden(folder);
  };
  import(Tiny(), options);
  EXPECT_TRUE(fs::exists(out_ + "/model.safetensors.index.json"));
  EXPECT_EQ(SafeTensors::open(out_).tensors().size(), 11U);
  EXPECT_TRUE(read_checksums(out_)->contains("golden.safetensors"));
  EXPECT_NO_THROW(load_model(out_));  // compares the golden logits
}

// qwen2 holds rotary pairs as halves already; a llama's biases are turned as its rows are.
TEST_F(ImportTest, BiasesAndOtherArchitectures) {
  const auto biases = [](bool output) {
    return [=](GgufBuilder& b) {
      std::vector<float> q(8);
      std::iota(q.begin(), q.end(), 0.0F);
      b.tensor_f32("blk.0.attn_q.bias", {8}, q);
      b.tensor_f32("blk.0.attn_k.bias", {4}, std::vector<float>{0, 1, 2, 3});
      b.tensor_f32("blk.0.attn_v.bias", {4}, std::vector<float>{0, 1, 2, 3});
      if (output) {
        b.tensor_f32("blk.0.attn_output.bias", {kHidden}, q);
      }
    };
  };
  const auto q_bias = [&] {
    const SafeTensors file = SafeTensors::open(out_);
    std::vector<float> values(8);
    const auto bytes = file.find("model.layers.0.self_attn.q_proj.bias")->bytes();
    std::memcpy(values.data(), bytes.data(), bytes.size());
    return values;
  };
  GgufImportOptions options;
  options.replace = true;
  options.float32 = true;
  Tiny llama;
  llama.more = biases(true);
  import(llama, options);
  EXPECT_EQ(json("config.json").at("model_type"), "llama");
  EXPECT_EQ(json("config.json").at("attention_bias"), true);
  EXPECT_THAT(q_bias(), ElementsAre(0, 2, 1, 3, 4, 6, 5, 7));
  llama.more = biases(false);
  import(llama, options);
  EXPECT_EQ(json("config.json").at("model_type"), "qwen2");
  Tiny qwen2;
  qwen2.architecture = "qwen2";
  qwen2.more = biases(false);
  import(qwen2, options);
  EXPECT_EQ(json("config.json").at("model_type"), "qwen2");
  EXPECT_EQ(json("config.json").at("use_sliding_window"), false);
  EXPECT_THAT(q_bias(), ElementsAre(0, 1, 2, 3, 4, 5, 6, 7));
  Tiny qwen3;
  qwen3.architecture = "qwen3";
  qwen3.more = [](GgufBuilder& b) {
    b.tensor_f32("blk.0.attn_q_norm.weight", {4}, std::vector<float>{1, 2, 3, 4});
    b.tensor_f32("blk.0.attn_k_norm.weight", {4}, std::vector<float>{1, 2, 3, 4});
  };
  import(qwen3, options);
  EXPECT_EQ(json("config.json").at("model_type"), "qwen3");
}

TEST_F(ImportTest, RopeScalingBecomesConfiguration) {
  GgufImportOptions options;
  options.replace = true;
  const auto scaling = [&](const std::function<void(GgufBuilder&)>& more) {
    Tiny tiny;
    tiny.more = more;
    import(tiny, options);
    return json("config.json").at("rope_scaling");
  };
  EXPECT_EQ(scaling([](GgufBuilder& b) {
              b.text("llama.rope.scaling.type", "linear");
              b.f32("llama.rope.scaling.factor", 4);
            }),
            nlohmann::json({{"rope_type", "linear"}, {"factor", 4.0}}));
  EXPECT_EQ(scaling([](GgufBuilder& b) {
              b.text("llama.rope.scaling.type", "yarn");
              b.f32("llama.rope.scaling.factor", 4);
              b.u32("llama.rope.scaling.original_context_length", 16);
            }),
            nlohmann::json({{"rope_type", "yarn"},
                            {"factor", 4.0},
                            {"original_max_position_embeddings", 16},
                            {"attention_factor", 0.1 * std::log(4.0) + 1},
                            {"beta_fast", 32.0},
                            {"beta_slow", 1.0},
                            {"truncate", true}}));
  EXPECT_EQ(scaling([](GgufBuilder& b) {
              b.text("llama.rope.scaling.type", "longrope");
              b.u32("llama.rope.scaling.original_context_length", 16);
              b.tensor_f32("rope_factors_long.weight", {2}, std::vector<float>{2, 4});
              b.tensor_f32("rope_factors_short.weight", {2}, std::vector<float>{1, 1.5});
            }),
            nlohmann::json({{"rope_type", "longrope"},
                            {"long_factor", {2.0, 4.0}},
                            {"short_factor", {1.0, 1.5}},
                            {"factor", 4.0},
                            {"attention_factor", std::sqrt(1.5)},
                            {"original_max_position_embeddings", 16}}));
}

// A model in parts: the first holds the metadata, each some of the tensors.
TEST_F(ImportTest, SplitFilesAreJoined) {
  const auto name = [&](int part) {
    return folder_.at(fmt::format("m-{:05}-of-00002.gguf", part));
  };
  const auto write_parts = [&](uint32_t tensors, uint32_t second_number) {
    Tiny tiny;
    tiny.leave_out = "output_norm.weight";
    tiny.more = [&](GgufBuilder& b) {
      b.u32("split.no", 0);
      b.u32("split.count", 2);
      b.u32("split.tensors.count", tensors);
    };
    std::ofstream(name(1), std::ios::binary) << tiny.file();
    GgufBuilder second;
    second.u32("split.no", second_number);
    second.u32("split.count", 2);
    second.tensor_f32("output_norm.weight", {kHidden}, std::vector<float>(kHidden, 1.0F));
    std::ofstream(name(2), std::ios::binary) << second.file();
  };
  const auto message = [&](const std::string& path) -> std::string {
    return testing::message_of([&] { import_gguf(path, out_, {}); });
  };
  write_parts(11, 1);
  EXPECT_EQ(message(name(1)), "no error");
  EXPECT_EQ(SafeTensors::open(out_).tensors().size(), 11U);
  fs::remove_all(out_);
  EXPECT_THAT(message(name(2)), HasSubstr("this is part 2 of 2 of a split model; give the first"));
  write_parts(12, 1);
  EXPECT_THAT(message(name(1)), HasSubstr("'split.tensors.count' is 12, but the 2 parts hold 11"));
  write_parts(11, 0);
  EXPECT_THAT(message(name(1)), HasSubstr("'split.no' is 0"));
  fs::remove(name(2));
  EXPECT_THAT(message(name(1)), HasSubstr("part 2 of 2 of this split model is missing"));
  fs::rename(name(1), folder_.at("renamed.gguf"));
  EXPECT_THAT(message(folder_.at("renamed.gguf")), HasSubstr("whose name should end in"));
}

TEST_F(ImportTest, WhatCannotBeImportedIsNamedAndLeavesNothing) {
  struct Row {
    const char* message;
    std::function<void(Tiny&)> change;
  };
  const auto with_tensor = [](const char* name) {
    return [name](Tiny& t) {
      t.more = [name](GgufBuilder& b) { b.tensor_f32(name, {1}, std::vector<float>{1}); };
    };
  };
  const auto with_key = [](const char* name, uint32_t value) {
    return [=](Tiny& t) { t.more = [=](GgufBuilder& b) { b.u32(name, value); }; };
  };
  const Row rows[] = {
      {"the architecture is 'falcon'", [](Tiny& t) { t.architecture = "falcon"; }},
      {"'blk.0.attn_q.weight' is missing", [](Tiny& t) { t.leave_out = "blk.0.attn_q.weight"; }},
      {"token_embd.weight is missing", [](Tiny& t) { t.leave_out = "token_embd.weight"; }},
      {"'blk.1.attn_norm.weight' is missing", [](Tiny& t) { t.layers = 2; }},
      {"'llama.block_count' is 99", [](Tiny& t) { t.layers = 99; }},
      {"'llama.block_count' is 0", [](Tiny& t) { t.layers = 0; }},
      {"'blk.0.attn_sinks' (and 0 more) has no place", with_tensor("blk.0.attn_sinks")},
      {"'blk.0.attn_q.bias' has the shape (1), expected (8)", with_tensor("blk.0.attn_q.bias")},
      {"'blk.0.attn_k.bias' (and 0 more) has no place", with_tensor("blk.0.attn_k.bias")},
      {"'blk.0.attn_q_norm.weight' (and 0 more) has no place in a llama model",
       with_tensor("blk.0.attn_q_norm.weight")},
      {"'llama.attention.clamp_kqv' may change what the model computes",
       with_key("llama.attention.clamp_kqv", 8)},
      {"'llama.attention.layer_norm_rms_epsilon' stands twice",
       with_key("llama.attention.layer_norm_rms_epsilon", 0)},
      {"the key 'llama.expert_used_count' is missing", with_key("llama.expert_count", 8)},
      {"has experts ('qwen3.expert_count')",
       [](Tiny& t) {
         t.architecture = "qwen3";
         t.more = [](GgufBuilder& b) { b.u32("qwen3.expert_count", 8); };
       }},
      {"'minimax-m2.expert_gating_func' is missing, expected 2",
       [](Tiny& t) {
         t.architecture = "minimax-m2";
         t.more = [](GgufBuilder& b) {
           for (const char* key :
                {"expert_count", "expert_used_count", "expert_feed_forward_length"}) {
             b.u32(std::string("minimax-m2.") + key, 8);
           }
         };
       }},
      {"'llama.nextn_predict_layers' leaves none of 'llama.block_count'",
       with_key("llama.nextn_predict_layers", 1)},
      {"'llama.rope.freq_base' is 1e+300, more than fp32 holds",
       [](Tiny& t) {
         t.says_theta = false;
         t.more = [](GgufBuilder& b) {
           b.raw("llama.rope.freq_base", 12, GgufBuilder::bytes_of(1e300));
         };
       }},
      {"'granitehybrid.attention.head_count_kv' has 2 entries, expected 1",
       [](Tiny& t) {
         t.architecture = "granitehybrid";
         t.says_kv_heads = false;
         t.more = [](GgufBuilder& b) {
           b.i32s("granitehybrid.attention.head_count_kv", {1, 0});
           b.f32("granitehybrid.logit_scale", 1.0F);
           for (const char* key : {"time_step_rank", "state_size", "group_count", "conv_kernel"}) {
             b.u32(std::string("granitehybrid.ssm.") + key, 4);
           }
         };
       }},
      {"'llama.rope.dimension_count'", with_key("llama.rope.dimension_count", 2)},
      {"keys and values of different", with_key("llama.attention.value_length", 8)},
      {"'blk.0.attn_q.weight' has the shape (8, 8), expected (4, 8)",
       [](Tiny& t) {
         t.more = [](GgufBuilder& b) {
           b.u32("llama.attention.key_length", 2);
           b.u32("llama.attention.value_length", 2);
         };
       }},
      {"'tokenizer.ggml.model') is 'bert'", [](Tiny& t) { t.tokenizer = "bert"; }},
      {"'tokenizer.ggml.scores' is missing", [](Tiny& t) { t.tokenizer = "llama"; }},
      {"'tokenizer.ggml.scores' is missing", [](Tiny& t) { t.tokenizer = "t5"; }},
      {"is 'nonsense', which is not known", [](Tiny& t) { t.pre = "nonsense"; }},
      {"tokens 1 and 2 are both 'a'", [](Tiny& t) { t.tokens[2] = "a"; }},
      {"text that is not UTF-8", [](Tiny& t) { t.tokens[8] = "\xff\xfe"; }},
      {"merge 0 is 'ab'", [](Tiny& t) { t.merges[0] = "ab"; }},
      {"merge 1 ('a é') needs the token 'aé'", [](Tiny& t) { t.merges[1] = "a é"; }},
      {"has 8 entries for 9 tokens", [](Tiny& t) { t.types.pop_back(); }},
      {"there are 10 tokens, but token_embd.weight has only 9 rows",
       [](Tiny& t) {
         t.tokens.emplace_back("z");
         t.types.push_back(1);
       }},
      {"'tokenizer.ggml.bos_token_id' is 77", [](Tiny& t) { t.bos = 77; }},
      {"rope_freqs.weight to be F32 (2)",
       [](Tiny& t) {
         t.rope_divisors = {1, 1, 8};
       }},
      {"not of Llama 3's kind",
       [](Tiny& t) {
         t.rope_divisors = {8, 1};
       }},
      {"0 is no divisor",
       [](Tiny& t) {
         t.rope_divisors = {1, 0};
       }},
      {"YaRN needs 'llama.rope.scaling.factor'",
       [](Tiny& t) { t.more = [](GgufBuilder& b) { b.text("llama.rope.scaling.type", "yarn"); }; }},
  };
  for (const Row& row : rows) {
    Tiny tiny;
    row.change(tiny);
    EXPECT_THAT([&] { import(tiny); },
                ThrowsMessage<Error>(AllOf(HasSubstr(gguf_), HasSubstr(row.message))));
    EXPECT_THAT(names_here(), ElementsAre("model.gguf"));
  }
}

TEST_F(ImportTest, FailuresOnTheWayLeaveNothing) {
  GgufImportOptions options;
  options.finish = [](const std::string&) { fail("the golden prompt went wrong"); };
  EXPECT_THAT([&] { import(Tiny(), options); }, ThrowsMessage<Error>(HasSubstr("golden prompt")));
  EXPECT_THAT(names_here(), ElementsAre("model.gguf"));

  make_folder(out_);
  write_file_atomically(out_ + "/precious", "x");
  EXPECT_THAT([&] { import(Tiny()); },
              ThrowsMessage<Error>(AllOf(HasSubstr(out_), HasSubstr("not empty"))));
  EXPECT_EQ(read_text_file(out_ + "/precious"), "x");
}

// Divisors made from parameters give the parameters back; where only ratios are in the divisors,
// ones that make the same divisors.
TEST(Llama3RopeTest, IsRecovered) {
  struct Row {
    Llama3Rope made;
    double theta;
    int64_t head_dim;
    Llama3Rope found;
  };
  const Row rows[] = {
      {{8, 1, 4, 8192}, 500000, 128, {8, 1, 4, 8192}},   // Llama 3.1
      {{32, 1, 4, 8192}, 500000, 64, {32, 1, 4, 8192}},  // Llama 3.2 1B
      {{4, 2, 8, 16384}, 500000, 128, {4, 1, 4, 8192}},  // the same ratios
      {{8, 1.5, 6, 8192}, 10000, 128, {8, 1.5, 6, 8192}},
  };
  for (const Row& row : rows) {
    std::vector<float> divisors;
    const int64_t count = row.head_dim / 2;
    for (int64_t i = 0; i < count; ++i) {
      divisors.push_back(static_cast<float>(llama3_divisor(row.made, row.theta, i, count)));
    }
    const auto found = recover_llama3_rope(divisors, row.theta);
    ASSERT_TRUE(found.has_value());
    EXPECT_NEAR(found->factor, row.found.factor, 1e-6);
    EXPECT_NEAR(found->low_freq_factor, row.found.low_freq_factor, 1e-4);
    EXPECT_NEAR(found->high_freq_factor, row.found.high_freq_factor, 1e-4);
    EXPECT_EQ(found->original_length, row.found.original_length);
  }
  EXPECT_FALSE(recover_llama3_rope(std::vector<float>(32, 1.0F), 10000).has_value());
  // With so few frequencies that one or none lies between the thresholds, others give the same.
  for (const double length : {64.0, 200.0, 1000.0, 8192.0}) {
    const Llama3Rope made{8, 1, 4, length};
    std::vector<float> divisors;
    for (int64_t i = 0; i < 8; ++i) {
      divisors.push_back(static_cast<float>(llama3_divisor(made, 12e6, i, 8)));
    }
    const auto found = recover_llama3_rope(divisors, 12e6);
    ASSERT_TRUE(found.has_value()) << length;
    for (int64_t i = 0; i < 8; ++i) {
      EXPECT_NEAR(llama3_divisor(*found, 12e6, i, 8), divisors[static_cast<size_t>(i)], 1e-4);
    }
  }
}

}  // namespace
}  // namespace cambium
