#include "model/gguf/gguf_import.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

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
#include "model/gguf/gguf_config.h"
#include "model/gguf/gguf_tokenizer.h"
#include "model/weights.h"
#include "text/charsmap_testing.h"
#include "text/tokenizer.h"

namespace cambium {
namespace {

namespace fs = std::filesystem;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::ThrowsMessage;

constexpr uint64_t kVocabulary = 9;
constexpr uint64_t kHidden = 8;
constexpr uint64_t kFeedForward = 12;

/// A model of one layer: two query heads of four channels, one key head.
struct Tiny {
  std::string architecture = "llama";
  std::string tokenizer = "gpt2";
  std::string pre = "smollm";
  std::vector<std::string> tokens{"<|end|>", "a", "b", "ab", "Ġ", "1", "Ġab", "<x>", "é"};
  std::vector<int32_t> types{3, 1, 1, 1, 1, 1, 1, 4, 1};
  std::vector<std::string> merges{"a b", "Ġ ab"};
  uint32_t layers = 1;
  uint32_t bos = 0;
  bool add_bos = false;
  bool says_eos = true;
  bool tied = true;
  std::vector<float> rope_divisors;
  std::string chat_template = "{{ messages[0]['content'] }}";
  std::string leave_out;                             // a tensor
  std::function<void(GgufBuilder&)> more = nullptr;  // more keys or tensors

  std::string file() const {
    GgufBuilder b;
    b.text("general.architecture", architecture);
    const std::string prefix = architecture + ".";
    b.u32(prefix + "block_count", layers);
    b.u32(prefix + "context_length", 64);
    b.u32(prefix + "embedding_length", kHidden);
    b.u32(prefix + "feed_forward_length", kFeedForward);
    b.u32(prefix + "attention.head_count", 2);
    b.u32(prefix + "attention.head_count_kv", 1);
    b.f32(prefix + "attention.layer_norm_rms_epsilon", 1e-5F);
    b.f32(prefix + "rope.freq_base", 500000.0F);
    b.text("tokenizer.ggml.model", tokenizer);
    b.text("tokenizer.ggml.pre", pre);
    b.texts("tokenizer.ggml.tokens", tokens);
    b.i32s("tokenizer.ggml.token_type", types);
    b.texts("tokenizer.ggml.merges", merges);
    b.u32("tokenizer.ggml.bos_token_id", bos);
    if (says_eos) {
      b.u32("tokenizer.ggml.eos_token_id", 0);
    }
    b.flag("tokenizer.ggml.add_bos_token", add_bos);
    if (!chat_template.empty()) {
      b.text("tokenizer.chat_template", chat_template);
    }
    // Every element tells its row: 100 row + column, which bf16 also holds for small rows.
    const auto tensor = [&](const std::string& name, const std::vector<uint64_t>& shape) {
      if (name == leave_out) {
        return;
      }
      std::vector<float> values;
      const uint64_t rows = shape.size() == 2 ? shape[0] : 1;
      for (uint64_t row = 0; row < rows; ++row) {
        for (uint64_t column = 0; column < shape.back(); ++column) {
          values.push_back(static_cast<float>(100 * row + column));
        }
      }
      b.tensor_f32(name, shape, values);
    };
    tensor("token_embd.weight", {kVocabulary, kHidden});
    tensor("blk.0.attn_norm.weight", {kHidden});
    tensor("blk.0.attn_q.weight", {8, kHidden});
    tensor("blk.0.attn_k.weight", {4, kHidden});
    tensor("blk.0.attn_v.weight", {4, kHidden});
    tensor("blk.0.attn_output.weight", {kHidden, 8});
    tensor("blk.0.ffn_norm.weight", {kHidden});
    tensor("blk.0.ffn_gate.weight", {kFeedForward, kHidden});
    tensor("blk.0.ffn_up.weight", {kFeedForward, kHidden});
    tensor("blk.0.ffn_down.weight", {kHidden, kFeedForward});
    tensor("output_norm.weight", {kHidden});
    if (!tied) {
      tensor("output.weight", {kVocabulary, kHidden});
    }
    if (!rope_divisors.empty()) {
      b.tensor_f32("rope_freqs.weight", {rope_divisors.size()}, rope_divisors);
    }
    if (more) {
      more(b);
    }
    return b.file();
  }
};

class ImportTest : public ::testing::Test {
 protected:
  void write(const Tiny& tiny) { std::ofstream(gguf_, std::ios::binary) << tiny.file(); }
  GgufImportSummary import(const Tiny& tiny, const GgufImportOptions& options = {}) {
    write(tiny);
    return import_gguf(gguf_, out_, options);
  }
  nlohmann::json json(const std::string& name) const {
    return nlohmann::json::parse(read_text_file(out_ + "/" + name));
  }
  std::vector<std::string> names_here() const {
    std::vector<std::string> names;
    for (const auto& entry : fs::directory_iterator(folder_.path())) {
      names.push_back(entry.path().filename().string());
    }
    return names;
  }

  const TestFolder folder_;
  const std::string gguf_ = folder_.at("model.gguf");
  const std::string out_ = folder_.at("out");
};

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
  EXPECT_EQ(verify_checksums(out_), 5U);
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
                                   {"rope_scaling", nullptr},
                                   {"attention_bias", false},
                                   {"mlp_bias", false},
                                   {"tie_word_embeddings", true},
                                   {"torch_dtype", "bfloat16"},
                                   {"bos_token_id", 0},
                                   {"eos_token_id", 0}};
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

TEST_F(ImportTest, TokenizerEncodesAsBefore) {
  import(Tiny());
  const Tokenizer tokenizer = Tokenizer::load(out_);
  EXPECT_THAT(tokenizer.encode("ab ab11<|end|>a<x>", false), ElementsAre(3, 6, 5, 5, 0, 1, 7));
  EXPECT_EQ(tokenizer.decode(tokenizer.encode("ab<|end|><x>", false), true), "ab<x>");
  EXPECT_EQ(tokenizer.eos_id(), 0);
  EXPECT_TRUE(tokenizer.has_chat_template());
  EXPECT_EQ(json("generation_config.json")["eos_token_id"], 0);
}

TEST_F(ImportTest, BeginTokenIsAddedWhereWanted) {
  Tiny tiny;
  tiny.add_bos = true;
  import(tiny);
  const Tokenizer tokenizer = Tokenizer::load(out_);
  EXPECT_THAT(tokenizer.encode("ab", true), ElementsAre(0, 3));
  EXPECT_THAT(tokenizer.encode("ab", false), ElementsAre(3));
}

TEST_F(ImportTest, EveryPreTokeniserLoads) {
  for (const char* pre : {"gpt-2", "default", "smollm", "starcoder", "llama-bpe", "dbrx", "qwen2",
                          "deepseek-r1-qwen", "stablelm2", "tekken", "deepseek-v3",
                          "deepseek-coder", "gpt-4o", "bailingmoe", "seed-coder", "superbpe"}) {
    Tiny tiny;
    tiny.pre = pre;
    write(tiny);
    const GgufTokenizerFiles files = tokenizer_from_gguf(Gguf(gguf_), kVocabulary);
    const Tokenizer tokenizer = Tokenizer::parse(files.tokenizer_json, files.tokenizer_config_json);
    EXPECT_THAT(tokenizer.encode("ab ab11", false), ElementsAre(3, 6, 5, 5)) << pre;
    EXPECT_EQ(files.notes.size(), pre == std::string("default") ? 1U : 0U);
  }
}

// These cut digits from letters or the text at other places than between words.
TEST_F(ImportTest, PreTokenisersThatCutElsewhereLoad) {
  for (const char* pre : {"falcon", "bloom", "viking", "deepseek-llm"}) {
    Tiny tiny;
    tiny.pre = pre;
    write(tiny);
    const GgufTokenizerFiles files = tokenizer_from_gguf(Gguf(gguf_), kVocabulary);
    const Tokenizer tokenizer = Tokenizer::parse(files.tokenizer_json, files.tokenizer_config_json);
    EXPECT_THAT(tokenizer.encode("ab1", false), ElementsAre(3, 5)) << pre;
  }
}

// Pieces with scores: "▁a" joins before "ab" because its score is higher; bytes spell what no piece
// does.
TEST_F(ImportTest, SentencePieceScoresBecomeMerges) {
  Tiny tiny;
  tiny.tokenizer = "llama";
  tiny.tokens = {"<unk>", "<s>", "</s>", "<0xC3>", "<0xA9>", "▁", "a", "b", "ab"};
  tiny.types = {2, 3, 3, 6, 6, 1, 1, 1, 1};
  tiny.bos = 1;
  tiny.merges = {};
  const auto import_with = [&](float whole, bool prefix) {
    tiny.more = [=](GgufBuilder& b) {
      std::string scores = GgufBuilder::bytes_of<uint32_t>(6) + GgufBuilder::bytes_of<uint64_t>(9);
      for (const float score : {0.0F, 0.0F, 0.0F, 0.0F, 0.0F, -1.0F, -2.0F, -3.0F, whole}) {
        scores += GgufBuilder::bytes_of(score);
      }
      b.raw("tokenizer.ggml.scores", 9, scores);
      b.u32("tokenizer.ggml.unknown_token_id", 0);
      b.flag("tokenizer.ggml.add_space_prefix", prefix);
    };
    GgufImportOptions again;
    again.replace = true;
    import(tiny, again);
    return Tokenizer::load(out_);
  };
  tiny.add_bos = true;
  EXPECT_THAT(import_with(-0.5F, true).encode("ab é", true), ElementsAre(1, 5, 8, 5, 3, 4));
  EXPECT_EQ(import_with(-0.5F, true).decode(std::vector<int32_t>{5, 8, 5, 3, 4}, true), "ab é");
  EXPECT_THAT(import_with(-0.5F, false).encode("ab", true), ElementsAre(1, 8));
}

std::string list_of_bytes(std::string_view bytes) {
  return GgufBuilder::bytes_of<uint32_t>(0) + GgufBuilder::bytes_of<uint64_t>(bytes.size()) +
         std::string(bytes);
}

std::string list_of_floats(const std::vector<float>& values) {
  std::string list =
      GgufBuilder::bytes_of<uint32_t>(6) + GgufBuilder::bytes_of<uint64_t>(values.size());
  for (const float value : values) {
    list += GgufBuilder::bytes_of(value);
  }
  return list;
}

/// T5's order of special tokens; the last two fill the embedding up.
Tiny tiny_unigram(const std::string& charsmap, const std::function<void(GgufBuilder&)>& more = {}) {
  Tiny tiny;
  tiny.tokenizer = "t5";
  tiny.says_eos = false;
  tiny.tokens = {"<pad>", "</s>", "<unk>", "▁", "fi", "▁fi", "x", "[PAD1]", "[PAD2]"};
  tiny.types = {3, 3, 2, 1, 1, 1, 1, 5, 5};
  tiny.merges = {};
  tiny.more = [=](GgufBuilder& b) {
    b.raw("tokenizer.ggml.scores", 9, list_of_floats({0, 0, 0, -2, -3, -4, -5, -1000, -1000}));
    if (!charsmap.empty()) {
      b.raw("tokenizer.ggml.precompiled_charsmap", 9, list_of_bytes(charsmap));
    }
    if (more) {
      more(b);
    }
  };
  return tiny;
}

const std::map<std::string, std::string> kLigatures = {{"\uFB01", "fi"}, {"\n", " "}};

TEST_F(ImportTest, UnigramVocabulariesComeWithTheirNormalisation) {
  const std::string charsmap = testing::CharsmapBuilder(kLigatures).blob();
  const auto encode = [&](bool prefix, bool remove, const char* text, const std::string& map) {
    write(tiny_unigram(map, [=](GgufBuilder& b) {
      b.flag("tokenizer.ggml.add_space_prefix", prefix);
      b.flag("tokenizer.ggml.remove_extra_whitespaces", remove);
      b.u32("tokenizer.ggml.unknown_token_id", 2);
    }));
    const GgufTokenizerFiles files = tokenizer_from_gguf(Gguf(gguf_), kVocabulary);
    EXPECT_TRUE(files.notes.empty());
    return Tokenizer::parse(files.tokenizer_json, files.tokenizer_config_json).encode(text, true);
  };
  // An end token is added where the file does not say so.
  EXPECT_THAT(encode(true, false, "\uFB01x\nfi", charsmap), ElementsAre(5, 6, 5, 1));
  EXPECT_THAT(encode(false, false, "\uFB01x\nfi", charsmap), ElementsAre(4, 6, 5, 1));
  EXPECT_THAT(encode(true, true, "  fi   \uFB01 \n ", charsmap), ElementsAre(5, 5, 1));
  EXPECT_THAT(encode(true, false, "fi  fi", charsmap), ElementsAre(5, 3, 5, 1));
  EXPECT_THAT(encode(true, false, "\uFB01", ""), ElementsAre(3, 2, 1));
  // What fills the embedding up is no token; unknown characters in a row are one.
  EXPECT_THAT(encode(true, false, "[PAD1]", charsmap), ElementsAre(3, 2, 1));
}

TEST_F(ImportTest, AUnigramVocabularyIsT5sWhereItDoesNotSay) {
  const std::string charsmap = testing::CharsmapBuilder(kLigatures).blob();
  import(tiny_unigram(charsmap));
  const Tokenizer tokenizer = Tokenizer::load(out_);
  EXPECT_EQ(tokenizer.vocab_size(), 7);
  EXPECT_EQ(tokenizer.pad_id(), 0);
  EXPECT_THAT(tokenizer.encode("x?\uFB01", true), ElementsAre(6, 2, 4, 1));
  EXPECT_EQ(json("tokenizer_config.json").at("unk_token"), "<unk>");
  EXPECT_EQ(tokenizer.decode(std::vector<int32_t>{5, 6, 5}, true), " fix fi");
}

TEST_F(ImportTest, ACharsmapThatIsBrokenOrNotUsedIsNamed) {
  const std::string charsmap = testing::CharsmapBuilder(kLigatures).blob();
  EXPECT_THAT([&] { import(tiny_unigram(charsmap.substr(0, 99))); },
              ThrowsMessage<Error>(AllOf(HasSubstr("'tokenizer.ggml.precompiled_charsmap'"),
                                         HasSubstr("the charsmap is cut"))));
  EXPECT_THAT([&] {
    import(tiny_unigram("", [](GgufBuilder& b) {
      b.raw("tokenizer.ggml.precompiled_charsmap", 9,
            GgufBuilder::bytes_of<uint32_t>(4) + GgufBuilder::bytes_of<uint64_t>(1) +
                GgufBuilder::bytes_of<uint32_t>(256));
    }));
},
              ThrowsMessage<Error>(HasSubstr("should be a list of bytes, but holds 256")));
EXPECT_THAT(names_here(), ElementsAre("model.gguf"));
Tiny tiny;
tiny.more = [&](GgufBuilder& b) {
  b.raw("tokenizer.ggml.precompiled_charsmap", 9, list_of_bytes(charsmap));
};
EXPECT_THAT(import(tiny).notes,
            ElementsAre(HasSubstr("'tokenizer.ggml.precompiled_charsmap' is not used")));
}

TEST_F(ImportTest, TurnsEndWithTokensKnownByName) {
  Tiny tiny;
  tiny.tokens[7] = "<|im_end|>";
  tiny.types[7] = 3;
  import(tiny);
  EXPECT_EQ(json("generation_config.json").at("eos_token_id"), nlohmann::json({0, 7}));
  tiny.types[7] = 1;  // the same letters as an ordinary token
  GgufImportOptions again;
  again.replace = true;
  import(tiny, again);
  EXPECT_EQ(json("generation_config.json").at("eos_token_id"), 0);
}

TEST_F(ImportTest, EveryChatTemplateComesAlong) {
  Tiny tiny;
  tiny.more = [](GgufBuilder& b) { b.text("tokenizer.chat_template.tool_use", "tools"); };
  import(tiny);
  const nlohmann::json expected = {
      {{"name", "default"}, {"template", "{{ messages[0]['content'] }}"}},
      {{"name", "tool_use"}, {"template", "tools"}}};
  EXPECT_EQ(json("tokenizer_config.json").at("chat_template"), expected);
}

// What a template cannot do is said when it is imported, with what is refused for it and how to
// mend it; the template stays as it was.
TEST_F(ImportTest, ATemplateThatCannotBeUsedIsWarnedOf) {
  const auto import_with = [&](const std::string& main, const std::string& tools) {
    Tiny tiny;
    tiny.chat_template = main;
    tiny.more = [&](GgufBuilder& b) {
      if (!tools.empty()) {
        b.text("tokenizer.chat_template.tool_use", tools);
      }
      b.text("tokenizer.chat_template.rag", "{% for %}");
    };
    GgufImportOptions again;
    again.replace = true;
    return import(tiny, again);
  };
  const std::string good = "{{ messages[0]['content'] }}";
  const auto only_rag = ElementsAre(HasSubstr("'rag' is kept, but nothing here uses it"));
  GgufImportSummary summary = import_with(good, good);
  EXPECT_TRUE(summary.warnings.empty());
  EXPECT_THAT(summary.notes, only_rag);
  // Not a template; one that asks for what does not exist; one that refuses a first question.
  for (const auto& [source, why] :
       {std::pair{"{% for %}", "line 1"},
        {"{{ messages | no_such_filter }}", "no_such_filter"},
        {"{{ raise_exception('only with a system message') }}", "only with a system message"}}) {
    summary = import_with(source, good);
    EXPECT_THAT(summary.warnings,
                ElementsAre(AllOf(HasSubstr("The chat template 'default' cannot be used: "),
                                  HasSubstr(why), HasSubstr("`cambium chat`, --chat and"),
                                  HasSubstr("chat_template.jinja"))))
        << source;
    EXPECT_EQ(json("tokenizer_config.json").at("chat_template").at(0).at("template"), source);
    const Tokenizer tokenizer = Tokenizer::load(out_);
    EXPECT_THAT([&] { tokenizer.expect_chat(out_, "use it plainly"); },
                ThrowsMessage<Error>(AllOf(HasSubstr(out_ + ": the chat template cannot be used"),
                                           HasSubstr(why), HasSubstr("; use it plainly"))));
    summary = import_with(good, source);
    EXPECT_THAT(summary.warnings,
                ElementsAre(AllOf(HasSubstr("The chat template 'tool_use' cannot be used: "),
                                  HasSubstr(why), HasSubstr("Requests with tools"))))
        << source;
    EXPECT_NO_THROW(Tokenizer::load(out_).expect_chat(out_, ""));
  }
  import_with("{% for %}", "");
  std::ofstream(out_ + "/chat_template.jinja") << good;
  EXPECT_NO_THROW(Tokenizer::load(out_).expect_chat(out_, ""));
  EXPECT_THAT(
      [&] {
        import_with("", "");
        Tokenizer::load(out_).expect_chat(out_, "ask plainly");
      },
      ThrowsMessage<Error>(HasSubstr("has no chat template; ask plainly")));
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
  EXPECT_EQ(
      scaling([](GgufBuilder& b) {
        b.text("llama.rope.scaling.type", "yarn");
        b.f32("llama.rope.scaling.factor", 4);
        b.u32("llama.rope.scaling.original_context_length", 16);
      }),
      nlohmann::json(
          {{"rope_type", "yarn"}, {"factor", 4.0}, {"original_max_position_embeddings", 16}}));
  EXPECT_EQ(scaling([](GgufBuilder& b) {
              b.text("llama.rope.scaling.type", "longrope");
              b.u32("llama.rope.scaling.original_context_length", 16);
              b.tensor_f32("rope_factors_long.weight", {2}, std::vector<float>{2, 4});
              b.tensor_f32("rope_factors_short.weight", {2}, std::vector<float>{1, 1.5});
            }),
            nlohmann::json({{"rope_type", "longrope"},
                            {"long_factor", {2.0, 4.0}},
                            {"short_factor", {1.0, 1.5}},
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
      {"norms of queries and keys", with_tensor("blk.0.attn_q_norm.weight")},
      {"'llama.attention.clamp_kqv' may change what the model computes",
       with_key("llama.attention.clamp_kqv", 8)},
      {"'llama.attention.layer_norm_rms_epsilon' stands twice",
       with_key("llama.attention.layer_norm_rms_epsilon", 0)},
      {"'llama.expert_count'", with_key("llama.expert_count", 8)},
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
}

}  // namespace
}  // namespace cambium
