#include "model/tokenizer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>
#include <vector>

#include "base/error.h"
#include "model/text/unicode.h"

namespace cambium {
namespace {

using nlohmann::json;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using Ids = std::vector<int32_t>;

constexpr const char* kSplit =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";

/// A byte-level tokenizer: id of a byte = its value, then 256: "th", 257: "the", 258: " the", 259:
/// "er", 260: "é", and added tokens from 300.
json small_tokenizer() {
  json vocab;
  for (int byte = 0; byte < 256; ++byte) {
    vocab[text::bytes_to_alphabet(std::string(1, static_cast<char>(byte)))] = byte;
  }
  const std::string blank = text::bytes_to_alphabet(" ");
  const std::string acute = text::bytes_to_alphabet("é");
  vocab["th"] = 256;
  vocab["the"] = 257;
  vocab[blank + "the"] = 258;
  vocab["er"] = 259;
  vocab[acute] = 260;
  json file;
  file["model"] = {{"type", "BPE"},
                   {"vocab", vocab},
                   {"merges",
                    {"t h", "th e", blank + " the", json{"e", "r"},
                     text::bytes_to_alphabet("\xC3") + " " + text::bytes_to_alphabet("\xA9")}}};
  file["pre_tokenizer"] = {
      {"type", "Sequence"},
      {"pretokenizers",
       {{{"type", "Split"},
         {"pattern", {{"Regex", kSplit}}},
         {"behavior", "Isolated"},
         {"invert", false}},
        {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", false}}}}};
  file["decoder"] = {{"type", "ByteLevel"}};
  file["added_tokens"] = {{{"id", 300}, {"content", "<s>"}, {"special", true}},
                          {{"id", 301}, {"content", "</s>"}, {"special", true}},
                          {{"id", 302}, {"content", "<think>"}, {"special", false}}};
  file["post_processor"] = {
      {"type", "TemplateProcessing"},
      {"single", {{{"SpecialToken", {{"id", "<s>"}}}}, {{"Sequence", {{"id", "A"}}}}}},
      {"special_tokens", {{"<s>", {{"id", "<s>"}, {"ids", {300}}}}}}};
  return file;
}

TEST(Tokenizer, EncodesAndDecodes) {
  const Tokenizer tokenizer = Tokenizer::parse(small_tokenizer().dump());
  EXPECT_EQ(tokenizer.vocab_size(), 303);
  EXPECT_THAT(tokenizer.encode("the the", false), ElementsAre(257, 258));
  EXPECT_THAT(tokenizer.encode("the<think> the", true), ElementsAre(300, 257, 302, 258));
  EXPECT_EQ(tokenizer.decode(Ids{300, 257, 302, 258}, false), "<s>the<think> the");
  EXPECT_EQ(tokenizer.decode(Ids{300, 257, 302, 258}, true), "the<think> the");
}

TEST(Tokenizer, AppliesTheChatTemplate) {
  const json config = {{"bos_token", "<s>"},
                       {"chat_template",
                        "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m['content'] | "
                        "trim }}\n{% endfor %}"}};
  const Tokenizer tokenizer = Tokenizer::parse(small_tokenizer().dump(), config.dump());
  const std::vector<ChatMessage> messages = {{"user", " hi "}, {"assistant", "ho"}};
  EXPECT_EQ(tokenizer.apply_chat_template(messages), "<s><user>hi\n<assistant>ho\n");
}

}  // namespace
}  // namespace cambium
