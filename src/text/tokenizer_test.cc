#include "text/tokenizer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>
#include <vector>

#include "base/error.h"
#include "base/testing.h"
#include "text/unicode.h"

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

Ids ids_of(const json& file, std::string_view text, bool special = false) {
  return Tokenizer::parse(file.dump()).encode(text, special);
}

TEST(Tokenizer, Pipeline) {
  const Tokenizer tokenizer = Tokenizer::parse(small_tokenizer().dump());
  struct Row {
    std::string text;
    Ids ids;
  };
  const std::vector<Row> rows = {
      {"", {}},
      {"a", {'a'}},
      {"the", {257}},
      {"thee", {257, 'e'}},
      {"  the", {' ', 258}},
      {"t the", {'t', 258}},
      {"there", {257, 'r', 'e'}},
      {"her", {'h', 259}},
      {"12", {'1', '2'}},
      {"é", {260}},
      {"e\u0301", {'e', 0xCC, 0x81}},
      {"\r\n", {'\r', '\n'}},
      {"\xFF", {0xEF, 0xBF, 0xBD}},                        // not UTF-8: U+FFFD
      {"a\xE4\xBD z", {'a', 0xEF, 0xBF, 0xBD, ' ', 'z'}},  // one for a broken character
      {"<s></s>", {300, 301}},
      {"the<think>the", {257, 302, 257}},
      {"<thin", {'<', 256, 'i', 'n'}},
  };
  for (const auto& [text, ids] : rows) {
    EXPECT_EQ(tokenizer.encode(text, false), ids) << text;
    Ids wrapped = {300};
    wrapped.insert(wrapped.end(), ids.begin(), ids.end());
    EXPECT_EQ(tokenizer.encode(text, true), wrapped) << text;
    if (text::is_valid_utf8(text)) {
      EXPECT_EQ(tokenizer.decode(ids, false), text);
    }
  }
}

TEST(Tokenizer, LongPiecesMergeAsShortOnes) {
  const Tokenizer tokenizer = Tokenizer::parse(small_tokenizer().dump());
  std::string text;
  Ids expected;
  for (int i = 0; i < 20000; ++i) {
    text += "the";
    expected.push_back(257);
  }
  EXPECT_EQ(tokenizer.encode(text, false), expected);
}

TEST(Tokenizer, AddedTokenFlags) {
  struct Row {
    json flags;
    std::string text;
    Ids ids;
  };
  const std::vector<Row> rows = {
      {{{"lstrip", true}}, "a  <x> b", {'a', 310, ' ', 'b'}},
      {{{"rstrip", true}}, "a <x> \n b", {'a', ' ', 310, 'b'}},
      {{{"single_word", true}}, "a<x> <x>", {'a', '<', 'x', '>', ' ', 310}},
      {{{"normalized", true}}, "<x>", {310}},
  };
  for (const auto& [flags, text, ids] : rows) {
    json file = small_tokenizer();
    json token = {{"id", 310}, {"content", "<x>"}};
    token.update(flags);
    file["added_tokens"].push_back(token);
    EXPECT_EQ(ids_of(file, text), ids) << flags;
  }
  json longest = small_tokenizer();
  longest["added_tokens"].push_back({{"id", 310}, {"content", "<s><s>"}, {"special", true}});
  EXPECT_EQ(ids_of(longest, "<s><s><s>"), (Ids{310, 300}));
}

TEST(Tokenizer, Normalizers) {
  struct Row {
    json normalizer;
    std::string text;
    std::string same_as;
  };
  const json replace = {{"type", "Replace"}, {"pattern", {{"String", "x"}}}, {"content", "the"}};
  const std::vector<Row> rows = {
      {{{"type", "NFC"}}, "e\u0301", "é"},
      {{{"type", "NFD"}}, "é", "e\u0301"},
      {{{"type", "NFKC"}}, "\uFB01", "fi"},
      {{{"type", "Lowercase"}}, "THE É", "the é"},
      {{{"type", "Prepend"}, {"prepend", "the"}}, "a", "thea"},
      {{{"type", "Strip"}, {"strip_left", true}, {"strip_right", true}}, " \u3000a ", "a"},
      {replace, "ax", "athe"},
      {{{"type", "Sequence"}, {"normalizers", {replace, {{"type", "NFC"}}}}}, "xe\u0301", "theé"},
  };
  for (const auto& [normalizer, text, same_as] : rows) {
    json file = small_tokenizer();
    const Ids expected = ids_of(file, same_as);
    file["normalizer"] = normalizer;
    EXPECT_EQ(ids_of(file, text), expected) << normalizer;
  }
}

/// With ignore_merges each piece that stays whole becomes the token made for it.
TEST(Tokenizer, PreTokenizers) {
  struct Row {
    json step;
    std::vector<std::string> pieces;
  };
  const auto split = [](const char* pattern, const char* behavior, bool invert = false) -> json {
    return {{"type", "Split"},
            {"pattern", {{"String", pattern}}},
            {"behavior", behavior},
            {"invert", invert}};
  };
  const std::vector<Row> rows = {
      {split("-", "Isolated"), {"a", "-", "-", "b 12"}},
      {split("-", "Removed"), {"a", "b 12"}},
      {split("-", "Removed", true), {"-", "-"}},
      {split("-", "MergedWithPrevious"), {"a-", "-", "b 12"}},
      {split("-", "MergedWithNext"), {"a", "-", "-b 12"}},
      {split("-", "Contiguous"), {"a", "--", "b 12"}},
      {{{"type", "Digits"}, {"individual_digits", true}}, {"a--b ", "1", "2"}},
      {{{"type", "Digits"}, {"individual_digits", false}}, {"a--b ", "12"}},
      {{{"type", "Punctuation"}}, {"a", "-", "-", "b 12"}},
      {{{"type", "Whitespace"}}, {"a", "--", "b", "12"}},
      {{{"type", "WhitespaceSplit"}}, {"a--b", "12"}},
      {{{"type", "ByteLevel"}, {"add_prefix_space", true}}, {" a", "--", "b", " 12"}},
  };
  for (const auto& [step, pieces] : rows) {
    json file = small_tokenizer();
    const json bytes = {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", false}};
    file["pre_tokenizer"] = {{"type", "Sequence"}, {"pretokenizers", {step}}};
    if (step["type"] != "ByteLevel") {
      file["pre_tokenizer"]["pretokenizers"].push_back(bytes);
    }
    file["model"]["ignore_merges"] = true;
    Ids expected;
    for (const std::string& piece : pieces) {
      const std::string spelling = text::bytes_to_alphabet(piece);
      json& vocab = file["model"]["vocab"];
      if (!vocab.contains(spelling)) {
        vocab[spelling] = 400 + vocab.size();
      }
      expected.push_back(vocab[spelling]);
    }
    EXPECT_EQ(ids_of(file, "a--b 12"), expected) << step;
  }
}

TEST(Tokenizer, SentencePieceStyle) {
  json file;
  file["model"] = {
      {"type", "BPE"},
      {"byte_fallback", true},
      {"unk_token", "<unk>"},
      {"vocab",
       {{"<unk>", 0}, {"<0xC3>", 1}, {"<0xA9>", 2}, {"\u2581", 3}, {"a", 4}, {"\u2581a", 5}}},
      {"merges", {"\u2581 a"}}};
  file["normalizer"] = {
      {"type", "Sequence"},
      {"normalizers",
       {{{"type", "Prepend"}, {"prepend", "\u2581"}},
        {{"type", "Replace"}, {"pattern", {{"String", " "}}}, {"content", "\u2581"}}}}};
  file["decoder"] = {{"type", "Sequence"},
                     {"decoders",
                      {{{"type", "Replace"}, {"pattern", {{"String", "\u2581"}}}, {"content", " "}},
                       {{"type", "ByteFallback"}},
                       {{"type", "Fuse"}},
                       {{"type", "Strip"}, {"content", " "}, {"start", 1}, {"stop", 0}}}}};
  const Tokenizer tokenizer = Tokenizer::parse(file.dump());
  EXPECT_THAT(tokenizer.encode("a aé", false), ElementsAre(5, 5, 1, 2));
  EXPECT_EQ(tokenizer.decode(Ids{5, 5, 1, 2}, false), "a aé");
  EXPECT_THAT(tokenizer.encode("b", false), ElementsAre(3, 0));
}

TEST(Tokenizer, RefusesWhatItDoesNotKnow) {
  struct Row {
    std::string path;
    json value;
    std::string message;
  };
  const std::vector<Row> rows = {
      {"/model/type", "WordPiece", "expected model type BPE or Unigram, got \"WordPiece\""},
      {"/model/dropout", 0.1, "makes ids random"},
      {"/model/end_of_word_suffix", "</w>", "end_of_word_suffix is not supported"},
      {"/model/merges/0", "t h e", "expected a merge"},
      {"/model/merges/0", "t zz", "is not in the vocabulary"},
      {"/model/vocab/a", -1, "expected the id of \"a\""},
      {"/model/vocab/a", 98, "belongs to both"},
      {"/model", 3, "does not have the expected shape"},
      {"/normalizer", {{"type", "Precompiled"}}, "key 'precompiled_charsmap' not found"},
      {"/pre_tokenizer", {{"type", "UnicodeScripts"}}, "pre_tokenizer type \"UnicodeScripts\""},
      {"/pre_tokenizer/pretokenizers/0/behavior", "Other", "split behavior \"Other\""},
      {"/pre_tokenizer/pretokenizers/0/pattern", {{"Regex", "("}}, "expected a regular expression"},
      {"/post_processor/type", "Other", "post_processor type \"Other\""},
      {"/decoder/type", "CTC", "decoder type \"CTC\""},
      {"/added_tokens/0/id", 301, "belongs to both"},
  };
  for (const auto& [path, value, message] : rows) {
    json file = small_tokenizer();
    file[json::json_pointer(path)] = value;
    EXPECT_THAT(testing::error_of([&] { Tokenizer::parse(file.dump()); }), HasSubstr(message));
  }
  EXPECT_THROW(Tokenizer::parse("{"), Error);
  EXPECT_THROW(Tokenizer::load("/nonexistent"), Error);
}

TEST(Tokenizer, Decoding) {
  const Tokenizer tokenizer = Tokenizer::parse(small_tokenizer().dump());
  EXPECT_EQ(tokenizer.decode(Ids{0xF0, 0x9F, 'a'}, false), "\uFFFDa");
  EXPECT_EQ(tokenizer.decode(Ids{'a', -5, 299, 100000, 'b'}, false), "ab");
  StreamDecoder stream(tokenizer);
  std::vector<std::string> parts;
  for (const int32_t id : {0xF0, 0x9F, 0x98, 0x80, 300, int{'a'}, 0xC3}) {
    parts.push_back(stream.push(id));
  }
  EXPECT_THAT(parts, ElementsAre("", "", "", "😀", "", "a", ""));
  EXPECT_EQ(stream.finish(), "\uFFFD");
}

TEST(Tokenizer, NamesAndFingerprint) {
  const json config = {{"bos_token", "<s>"},
                       {"eos_token", {{"content", "</s>"}, {"__type", "AddedToken"}}},
                       {"pad_token", nullptr}};
  json file = small_tokenizer();
  const Tokenizer tokenizer = Tokenizer::parse(file.dump(), config.dump());
  EXPECT_EQ(tokenizer.bos_id(), 300);
  EXPECT_EQ(tokenizer.eos_id(), 301);
  EXPECT_THAT(tokenizer.eos_ids(), ElementsAre(301));
  EXPECT_EQ(tokenizer.pad_id(), std::nullopt);
  EXPECT_TRUE(tokenizer.is_special(300));
  EXPECT_FALSE(tokenizer.is_special(302));
  EXPECT_EQ(tokenizer.token_id("the"), 257);
  EXPECT_EQ(tokenizer.token_id("nothing"), std::nullopt);
  EXPECT_EQ(tokenizer.token_bytes(258), " the");
  EXPECT_EQ(tokenizer.token_text(299), "");
  file["version"] = "2.0";
  EXPECT_EQ(Tokenizer::parse(file.dump()).fingerprint(), tokenizer.fingerprint());
  std::swap(file["model"]["merges"][0], file["model"]["merges"][3]);
  EXPECT_NE(Tokenizer::parse(file.dump()).fingerprint(), tokenizer.fingerprint());
}

TEST(Tokenizer, NumbersOfADecoderMayBeOfAnySize) {
  json file = small_tokenizer();
  file["decoder"] = {{"type", "Strip"}, {"content", " "}, {"start", 1}, {"stop", 4e43}};
  EXPECT_THROW((void)Tokenizer::parse(file.dump()), Error);
}

TEST(Tokenizer, TheRulesHaveAFingerprintOfTheirOwn) {
  const json file = small_tokenizer();
  const json config = {{"chat_template", "{{ messages }}"}};
  const Tokenizer tokenizer = Tokenizer::parse(file.dump(), config.dump());
  json normalised = file;
  normalised["normalizer"] = {{"type", "NFC"}};
  json templated = config;
  templated["chat_template"] = "{{ messages[0] }}";
  EXPECT_EQ(Tokenizer::parse(file.dump(), config.dump()).rules_fingerprint(),
            tokenizer.rules_fingerprint());
  for (const Tokenizer& other : {Tokenizer::parse(normalised.dump(), config.dump()),
                                 Tokenizer::parse(file.dump(), templated.dump())}) {
    EXPECT_EQ(other.fingerprint(), tokenizer.fingerprint());
    EXPECT_NE(other.rules_fingerprint(), tokenizer.rules_fingerprint());
  }
}

TEST(Tokenizer, ManyThreads) {
  const Tokenizer tokenizer = Tokenizer::parse(small_tokenizer().dump());
  const std::string text = "the there her é <think> 12 the";
  const Ids expected = tokenizer.encode(text, true);
  std::vector<std::thread> threads;
  std::vector<int> wrong(4);
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < 200; ++i) {
        wrong[static_cast<size_t>(t)] += tokenizer.encode(text, true) != expected;
      }
    });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  EXPECT_THAT(wrong, ElementsAre(0, 0, 0, 0));
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

TEST(TokenizerFiles, UnigramTakesTheCutOfHighestScore) {
  const std::string file = R"({"model": {"type": "Unigram", "unk_id": 0, "byte_fallback": false,
      "vocab": [["<unk>", 0], ["a", -1.0], ["b", -1.0], ["ab", -1.5], ["abc", -9], ["c", -3]]}})";
  const Tokenizer tokenizer = Tokenizer::parse(file, "{}");
  EXPECT_THAT(tokenizer.encode("abc", false), ElementsAre(3, 5));  // -4.5, against -9 and -5
  EXPECT_THAT(tokenizer.encode("ba", false), ElementsAre(2, 1));
  // Neighbouring characters that nothing spells are one unknown token.
  EXPECT_THAT(tokenizer.encode("a\u65e5\u65e5b", false), ElementsAre(1, 0, 2));
  const std::string bytes = R"({"model": {"type": "Unigram", "unk_id": 0, "byte_fallback": true,
      "vocab": [["<unk>", 0], ["a", -1.0], ["<0xC3>", -20], ["<0xA9>", -20]]}})";
  EXPECT_THAT(Tokenizer::parse(bytes, "{}").encode("a\u00e9a\u00e8", false),
              ElementsAre(1, 2, 3, 1, 0));
  EXPECT_THROW(Tokenizer::parse(R"({"model": {"type": "Unigram", "vocab": [["a"]]}})", "{}"),
               Error);
  EXPECT_THROW(
      Tokenizer::parse(R"({"model": {"type": "Unigram", "unk_id": 7, "vocab": [["a", 0]]}})", "{}"),
      Error);
}

constexpr const char* kSmallBpe =
    R"("model": {"type": "BPE", "vocab": {"<s>": 0, "a": 1, "b": 2, "</s>": 3, "<0xF0>": 4,
       "<0x9F>": 5, "<0xC3>": 6, "<0xA9>": 7}, "merges": []})";

TEST(TokenizerFiles, SpecialTokensNamedAndNowhereDefinedTakeTheNextIds) {
  const Tokenizer tokenizer =
      Tokenizer::parse(std::string("{") + kSmallBpe + "}",
                       R"({"bos_token": "<s>", "pad_token": {"content": "<pad>"},
          "additional_special_tokens": ["<tool>", {"content": "</tool>"}, "<s>"]})");
  EXPECT_THAT(tokenizer.encode("<tool>a</tool><pad>", false), ElementsAre(9, 1, 10, 8));
  EXPECT_EQ(tokenizer.pad_id(), 8);
  EXPECT_TRUE(tokenizer.is_special(9));
}

TEST(TokenizerFiles, TheVocabularysIdOfAnAddedTokenCounts) {
  const Tokenizer tokenizer = Tokenizer::parse(
      std::string("{") + kSmallBpe + R"(, "added_tokens": [{"id": 99, "content": "b"}]})", "{}");
  EXPECT_THAT(tokenizer.encode("ab", false), ElementsAre(1, 2));
  EXPECT_EQ(tokenizer.vocab_size(), 8);
}

TEST(TokenizerFiles, LlamaTokenizersTakeTheirBeginTokenFromTheConfiguration) {
  const std::string file =
      std::string("{") + kSmallBpe + R"(, "post_processor": {"type": "ByteLevel"}})";
  const auto config = [](const char* made_by, const char* flags) {
    return fmt::format(R"({{"tokenizer_class": "{}", "bos_token": "<s>", "eos_token": "</s>"{}}})",
                       made_by, flags);
  };
  const auto ids = [&](const char* made_by, const char* flags) {
    return Tokenizer::parse(file, config(made_by, flags)).encode("a", true);
  };
  EXPECT_THAT(ids("LlamaTokenizerFast", R"(, "add_bos_token": true)"), ElementsAre(0, 1));
  EXPECT_THAT(ids("LlamaTokenizer", R"(, "add_bos_token": false, "add_eos_token": true)"),
              ElementsAre(1, 3));
  EXPECT_THAT(ids("LlamaTokenizerFast", ""), ElementsAre(1));
  EXPECT_THAT(ids("PreTrainedTokenizerFast", R"(, "add_bos_token": true)"), ElementsAre(1));
}

TEST(TokenizerFiles, ByteTokensThatAreNoTextShowAsOneMarkEach) {
  const Tokenizer tokenizer = Tokenizer::parse(
      std::string("{") + kSmallBpe +
          R"(, "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]}})",
      "{}");
  EXPECT_EQ(tokenizer.decode(std::vector<int32_t>{1, 6, 7, 2}, true), "a\u00e9b");
  EXPECT_EQ(tokenizer.decode(std::vector<int32_t>{1, 4, 5, 2}, true), "a\ufffd\ufffdb");
  EXPECT_EQ(tokenizer.decode(std::vector<int32_t>{1, 4, 5}, true), "a\ufffd\ufffd");
  EXPECT_EQ(tokenizer.decode(std::vector<int32_t>{6, 7, 4}, true), "\ufffd\ufffd\ufffd");
}

TEST(TokenizerFiles, MarksOfTheFirstTokenGo) {
  const Tokenizer tokenizer = Tokenizer::parse(
      R"({"model": {"type": "BPE", "vocab": {"\u2581\u2581a": 0, "\u2581b": 1}, "merges": []},
          "decoder": {"type": "Metaspace", "replacement": "\u2581"}})",
      "{}");
  EXPECT_EQ(tokenizer.decode(std::vector<int32_t>{0, 1, 0}, true), "a b  a");
}

TEST(TokenizerFiles, WhatRewritesWithoutEndIsAnError) {
  std::string steps;
  for (int i = 0; i < 3; ++i) {
    steps += std::string(i == 0 ? "" : ",") +
             R"({"type": "Replace", "pattern": {"String": "a"}, "content": ")" +
             std::string(1000, 'a') + "\"}";
  }
  const Tokenizer tokenizer = Tokenizer::parse(
      std::string("{") + kSmallBpe + R"(, "normalizer": {"type": "Sequence", "normalizers": [)" +
          steps + "]}}",
      "{}");
  EXPECT_THAT(
      [&] { tokenizer.encode("a", false); },
      ::testing::ThrowsMessage<Error>(::testing::HasSubstr("more than 256 MiB of one text")));
  EXPECT_THROW(
      Tokenizer::parse(std::string("{") + kSmallBpe +
                           R"(, "decoder": {"type": "Sequence", "decoders": [)" + steps + "]}}",
                       "{}"),
      Error);
}

TEST(TokenizerFiles, ABrokenChatTemplateIsInNobodysWay) {
  const Tokenizer tokenizer =
      Tokenizer::parse(std::string("{") + kSmallBpe + "}", R"({"chat_template": "{% for %}"})");
  EXPECT_THAT(tokenizer.encode("ab", false), ElementsAre(1, 2));
  const ChatMessage message{"user", "a"};
  EXPECT_THROW(tokenizer.apply_chat_template(std::span(&message, 1)), Error);
  EXPECT_THROW(tokenizer.apply_chat_template(std::span(&message, 1)), Error);  // and again
}

}  // namespace
}  // namespace cambium
