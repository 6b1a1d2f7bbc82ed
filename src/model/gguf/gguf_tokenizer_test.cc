// Tokenizers and chat templates that come with a GGUF file.
#include "model/gguf/gguf_tokenizer.h"

#include <gmock/gmock.h>

#include <map>

#include "base/error.h"
#include "base/testing.h"
#include "model/gguf/gguf_testing.h"
#include "text/charsmap_testing.h"
#include "text/tokenizer.h"

namespace cambium {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using testing::kVocabulary;
using ::testing::ThrowsMessage;
using testing::Tiny;

class TokenizerImportTest : public testing::ImportTest {};

TEST_F(TokenizerImportTest, TokenizerEncodesAsBefore) {
  import(Tiny());
  const Tokenizer tokenizer = Tokenizer::load(out_);
  EXPECT_THAT(tokenizer.encode("ab ab11<|end|>a<x>", false), ElementsAre(3, 6, 5, 5, 0, 1, 7));
  EXPECT_EQ(tokenizer.decode(tokenizer.encode("ab<|end|><x>", false), true), "ab<x>");
  EXPECT_EQ(tokenizer.eos_id(), 0);
  EXPECT_TRUE(tokenizer.has_chat_template());
  EXPECT_EQ(json("generation_config.json")["eos_token_id"], 0);
}

TEST_F(TokenizerImportTest, BeginTokenIsAddedWhereWanted) {
  Tiny tiny;
  tiny.add_bos = true;
  import(tiny);
  const Tokenizer tokenizer = Tokenizer::load(out_);
  EXPECT_THAT(tokenizer.encode("ab", true), ElementsAre(0, 3));
  EXPECT_THAT(tokenizer.encode("ab", false), ElementsAre(3));
}

TEST_F(TokenizerImportTest, EveryPreTokeniserLoads) {
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
TEST_F(TokenizerImportTest, PreTokenisersThatCutElsewhereLoad) {
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
TEST_F(TokenizerImportTest, SentencePieceScoresBecomeMerges) {
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

TEST_F(TokenizerImportTest, UnigramVocabulariesComeWithTheirNormalisation) {
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

TEST_F(TokenizerImportTest, AUnigramVocabularyIsT5sWhereItDoesNotSay) {
  const std::string charsmap = testing::CharsmapBuilder(kLigatures).blob();
  import(tiny_unigram(charsmap));
  const Tokenizer tokenizer = Tokenizer::load(out_);
  EXPECT_EQ(tokenizer.vocab_size(), 7);
  EXPECT_EQ(tokenizer.pad_id(), 0);
  EXPECT_THAT(tokenizer.encode("x?\uFB01", true), ElementsAre(6, 2, 4, 1));
  EXPECT_EQ(json("tokenizer_config.json").at("unk_token"), "<unk>");
  EXPECT_EQ(tokenizer.decode(std::vector<int32_t>{5, 6, 5}, true), " fix fi");
}

TEST_F(TokenizerImportTest, ACharsmapThatIsBrokenOrNotUsedIsNamed) {
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

TEST_F(TokenizerImportTest, TurnsEndWithTokensKnownByName) {
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

TEST_F(TokenizerImportTest, EveryChatTemplateComesAlong) {
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
TEST_F(TokenizerImportTest, ATemplateThatCannotBeUsedIsWarnedOf) {
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

}  // namespace
}  // namespace cambium
