#include "text/tokenizer_train.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <algorithm>
#include <fstream>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/file.h"
#include "base/test_folder.h"
#include "base/testing.h"
#include "text/tokenizer.h"
#include "text/tokenizer_verify.h"

namespace cambium {
namespace {

using ::testing::HasSubstr;

const std::vector<std::string> kTexts = {"low lower lowest", "new newer newest",
                                         "low new 1234 1234", "<s>low low low</s>"};

BpeTraining training(int32_t vocab_size) {
  BpeTraining t;
  t.vocab_size = vocab_size;
  t.special_tokens = {"<s>", "</s>"};
  return t;
}

TEST(TrainBpe, LearnsAndRoundTrips) {
  const std::string file = train_bpe(kTexts, training(265));
  const Tokenizer tokenizer = Tokenizer::parse(file);
  EXPECT_EQ(tokenizer.vocab_size(), 265);
  EXPECT_EQ(tokenizer.token_id("<s>"), 0);
  EXPECT_TRUE(tokenizer.is_special(1));
  EXPECT_TRUE(tokenizer.token_id("low").has_value());
  for (const std::string text : {"low newest", "1234", "é😀\n\n x", "<s>a</s>", "  spaces  "}) {
    EXPECT_EQ(tokenizer.decode(tokenizer.encode(text, false), false), text);
  }
  EXPECT_EQ(tokenizer.encode("1234", false).size(), 4U);
  EXPECT_EQ(tokenizer.encode("a 12", false).size(), 4U);
}

TEST(TrainBpe, DoesNotDependOnTheOrderOfTexts) {
  std::vector<std::string> reversed(kTexts.rbegin(), kTexts.rend());
  EXPECT_EQ(train_bpe(kTexts, training(280)), train_bpe(reversed, training(280)));
}

TEST(TrainBpe, StopsWhereNothingRepeats) {
  const std::vector<std::string> once = {"abc"};
  EXPECT_EQ(Tokenizer::parse(train_bpe(once, training(400))).vocab_size(), 258);
}

TEST(TrainTokenizer, NamesTheEndToken) {
  const TokenizerFiles files = train_tokenizer(kTexts, 320, {"<|end|>"}, "");
  const Tokenizer tokenizer = Tokenizer::parse(files.tokenizer_json, files.config_json);
  EXPECT_LE(tokenizer.vocab_size(), 320);
  EXPECT_EQ(tokenizer.eos_id(), 0);
  EXPECT_FALSE(tokenizer.has_chat_template());
  EXPECT_EQ(tokenizer.encode("<|end|>", false), std::vector<int32_t>{0});
  EXPECT_THROW(train_tokenizer(kTexts, 256, {"<|end|>"}, ""), Error);
  EXPECT_THROW(train_tokenizer(kTexts, 300, {}, ""), Error);
}

TEST(TrainBpe, RefusesWrongUse) {
  EXPECT_THROW(train_bpe(kTexts, training(257)), Error);
  BpeTraining twice = training(300);
  twice.special_tokens = {"<s>", "<s>"};
  EXPECT_THROW(train_bpe(kTexts, twice), Error);
  BpeTraining broken = training(300);
  broken.pattern = "(";
  EXPECT_THROW(train_bpe(kTexts, broken), Error);
}

TEST(VerifyTokenizer, CountsAndShowsDisagreements) {
  const TestFolder folder;
  const std::filesystem::path dir = folder.path();
  const std::string chat_template =
      "{% if messages|length > 1 %}{{ raise_exception('one at most') }}{% endif %}"
      "<s>{{ messages[0].content }}";
  const TokenizerFiles files = train_tokenizer(kTexts, 258, {"<s>", "</s>"}, chat_template);
  write_file_atomically(dir / "tokenizer.json", files.tokenizer_json);
  write_file_atomically(dir / "tokenizer_config.json", files.config_json);
  EXPECT_EQ(Tokenizer::load(dir).eos_id(), 0);

  const Tokenizer tokenizer = Tokenizer::load(dir);
  const int32_t a = tokenizer.encode("a", false).at(0);
  const auto reference = [&](const std::string& text) {
    std::ofstream(dir / "reference.json") << text;
    return verify_tokenizer(dir, dir / "reference.json");
  };
  const std::string id = std::to_string(a);
  const TokenizerReport good =
      reference(R"({"cases":[{"text":"a","ids":[)" + id + R"(],"ids_with_special":[)" + id +
                R"(],"decoded":"a"}],"chats":[{"messages":[{"content":"x"}],"prompt":"<s>x"},
          {"messages":[{},{}],"tools":null,"add_generation_prompt":true,"prompt":null}]})");
  EXPECT_TRUE(good.ok());
  EXPECT_EQ(good.total(), 5U);
  const TokenizerReport bad = reference(
      R"({"cases":[{"text":"a","ids":[1],"ids_with_special":[],"decoded":"b"}],
          "chats":[{"messages":[{},{}],"prompt":"x"}]})");
  EXPECT_EQ(bad.failed(), 4U);
  EXPECT_THAT(bad.mismatches.at(0), HasSubstr("encode of \"a\""));
  EXPECT_THAT(bad.mismatches.at(3), HasSubstr("one at most"));
  EXPECT_THROW(reference("{"), Error);
  EXPECT_FALSE(reference("{}").ok());

  std::filesystem::rename(dir / "tokenizer.json", dir / "tokenizer.json.xz");
  const std::string message = testing::error_of([&] { Tokenizer::load(dir); });
  EXPECT_THAT(message, HasSubstr("unpack it"));
}

TEST(TokenizerFolder, GenerationConfigIsCheckedAndPipesAreNotWaitedFor) {
  const TestFolder folder;
  const std::filesystem::path dir = folder.path();
  const TokenizerFiles files = train_tokenizer(kTexts, 258, {"<s>", "</s>"}, "");
  write_file_atomically(dir / "tokenizer.json", files.tokenizer_json);
  const auto with = [&](const std::string& generation) {
    std::ofstream(dir / "generation_config.json") << generation;
    return Tokenizer::load(dir);
  };
  const auto message = [&](const std::string& generation) -> std::string {
    return testing::message_of([&] { with(generation); });
  };
  EXPECT_EQ(with(R"({"eos_token_id": [1, 0, 1], "temperature": Infinity})").eos_ids(),
            (std::vector<int32_t>{1, 0}));
  EXPECT_EQ(message(R"({"eos_token_id": null})"), "no error");
  EXPECT_THAT(message("[1]"), HasSubstr("generation_config.json: expected an object, got array"));
  EXPECT_THAT(message(R"({"eos_token_id": 4294967297})"), HasSubstr("got 4294967297"));
  EXPECT_THAT(message(R"({"eos_token_id": "x"})"), HasSubstr("eos_token_id"));

  std::filesystem::remove(dir / "generation_config.json");
  std::filesystem::remove(dir / "tokenizer.json");
  ASSERT_EQ(mkfifo((dir / "tokenizer.json").c_str(), 0600), 0);
  EXPECT_THROW(Tokenizer::load(dir), Error);
}

TEST(VerifyTokenizer, SpecialTokensAreThoseOfAllFilesOrOfTokenizerJsonAlone) {
  const TestFolder folder;
  const std::filesystem::path dir = folder.path();
  std::ofstream(dir / "tokenizer.json")
      << R"({"model": {"type": "BPE", "vocab": {"<s>": 0, "a": 1}, "merges": []},
             "post_processor": {"type": "ByteLevel"}})";
  std::ofstream(dir / "tokenizer_config.json")
      << R"({"tokenizer_class": "LlamaTokenizerFast", "bos_token": "<s>", "add_bos_token": true})";
  const auto report = [&](const std::string& cases) {
    std::ofstream(dir / "reference.json") << R"({"cases": [)" + cases + "]}";
    return verify_tokenizer(dir, dir / "reference.json");
  };
  const std::string all = R"({"text": "a", "ids": [1], "ids_with_special": [0, 1]})";
  const std::string alone = R"({"text": "a", "ids": [1], "ids_with_special": [1]})";
  EXPECT_TRUE(report(all).ok());
  EXPECT_EQ(report(all).note, "");
  EXPECT_TRUE(report(alone).ok());
  EXPECT_THAT(report(alone).note, HasSubstr("tokenizer.json alone"));
  EXPECT_THAT(report(alone).mismatches, ::testing::IsEmpty());
  EXPECT_EQ(report(all + "," + alone).failed(), 1U);
  EXPECT_EQ(report(alone + "," + all).mismatches.size(), 1U);
}

}  // namespace
}  // namespace cambium
