#include "text/charsmap.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <nlohmann/json.hpp>

#include "base/base64.h"
#include "base/error.h"
#include "text/charsmap_testing.h"
#include "text/tokenizer.h"
#include "text/unicode.h"

namespace cambium::text {
namespace {

using nlohmann::json;
using testing::CharsmapBuilder;

const std::map<std::string, std::string> kRules = {
    {"\t", " "},           {"\u00A0", " "},        {"\uFB01", "fi"}, {"A", "a"},
    {"A\u0301", "á"},      {"e\u0301", "é"},       {"\u0301", ""},   {"x\u0301", "X"},
    {"\u00BD", "1⁄2"},     {"\uFF76\uFF9E", "ガ"}, {"\uFF76", "カ"}, {"\u1100\u1161", "가"},
    {"\U0001F468", "man"}, {"\r\n", " "},
};

TEST(Charsmap, ReplacesCharactersAndShortClusters) {
  struct Row {
    const char* text;
    const char* normalised;
  };
  const Row rows[] = {
      {"", ""},
      {"plain", "plain"},
      {"a\tb\u00A0\uFB01n", "a b fin"},
      {"\u00BD", "1⁄2"},
      // A cluster of fewer than 6 bytes is one key; its shortest prefix in the map wins, and what
      // follows it in the cluster goes.
      {"e\u0301", "é"},
      {"A\u0301", "a"},
      {"x\u0301", "X"},
      {"x\u0302", "x\u0302"},
      // Not begun by a key as a cluster: character by character.
      {"y\u0301", "y"},
      {"\r\n", " "},
      {"\r\t", "\r "},
      // Halfwidth katakana and its mark are one cluster of 6 bytes: too long.
      {"\uFF76\uFF9E", "カ\uFF9E"},
      {"\u1100\u1161", "\u1100\u1161"},
      {"e\u0301\u0302\u0303", "e\u0302\u0303"},
      {"\U0001F468\u200D\U0001F469", "man\u200D\U0001F469"},
  };
  const Charsmap map(CharsmapBuilder(kRules).blob());
  for (const Row& row : rows) {
    EXPECT_EQ(map.normalise(row.text), row.normalised) << row.text;
  }
  // A zero ends what is looked up.
  EXPECT_EQ(map.normalise(std::string_view("\0\t", 2)), std::string_view("\0 ", 2));
}

TEST(Charsmap, GraphemeClusters) {
  const auto lengths = [](std::string_view text) {
    std::vector<size_t> found;
    for (size_t at = 0; at < text.size(); at += found.back()) {
      found.push_back(grapheme_length(text, at));
    }
    return found;
  };
  using ::testing::ElementsAre;
  EXPECT_THAT(lengths("ab"), ElementsAre(1, 1));
  EXPECT_THAT(lengths("e\u0301\u0302x"), ElementsAre(5, 1));
  EXPECT_THAT(lengths("\r\n\n"), ElementsAre(2, 1));
  EXPECT_THAT(lengths("\u1100\u1161\u11A8\u1100"), ElementsAre(9, 3));
  // A virama joins consonants, whatever of marks stands between, but not a vowel sign.
  EXPECT_THAT(lengths("\u0915\u094D\u0937x"), ElementsAre(9, 1));
  EXPECT_THAT(lengths("\u0915\u0301\u094D\u200D\u0937"), ElementsAre(14));
  EXPECT_THAT(lengths("\u0915\u094D\u200C\u0937"), ElementsAre(9, 3));
  EXPECT_THAT(lengths("\u0915\u093E\u0937\u094D"), ElementsAre(6, 6));
  // Marks and joiners of scripts that are younger than the library's tables.
  EXPECT_THAT(lengths("e\u0897x"), ElementsAre(4, 1));
  EXPECT_THAT(lengths("e\U00011B67x"), ElementsAre(5, 1));
  EXPECT_THAT(lengths("\u1794\u17D2\u1794"), ElementsAre(9));
  EXPECT_THAT(lengths("\uA98F\uA9C0\uA98F"), ElementsAre(9));
  // Regional indicators pair up from the start of their run, wherever the search began.
  EXPECT_THAT(lengths("\U0001F1E6\U0001F1E7\U0001F1E8\U0001F1E9\U0001F1EA"), ElementsAre(8, 8, 4));
  EXPECT_THAT(lengths("\U0001F468\u200D\U0001F469a"), ElementsAre(11, 1));
}

// Keys that end alike may share their nodes, as in the tries that SentencePiece writes.
TEST(Charsmap, NodesMayBeShared) {
  const std::map<std::string, std::string> rules = {{"\u00E9", "e"}, {"\u0169", "u"}};
  CharsmapBuilder builder(rules);
  const uint32_t from = builder.position("\xC5");
  const uint32_t to = builder.position("\xC3");
  std::vector<uint32_t>& units = builder.units();
  const uint32_t base = to ^ units[to] >> 10;
  units[from] = (units[from] & 0x3FFU) | (from ^ base) << 10;
  EXPECT_EQ(Charsmap(CharsmapBuilder(rules).blob()).normalise("\u00E9\u0169"), "eu");
  EXPECT_EQ(Charsmap(builder.blob()).normalise("\u00E9\u0169"), "ee");
}

TEST(Charsmap, AnEmptyTrieChangesNothing) {
  EXPECT_EQ(Charsmap(testing::charsmap_of({0}, "")).normalise("a\u0301b"), "a\u0301b");
}

TEST(Charsmap, WhatIsBrokenIsNamed) {
  const CharsmapBuilder good(kRules);
  struct Row {
    const char* message;
    std::string blob;
  };
  const auto changed = [](const std::string& at,
                          const std::function<void(CharsmapBuilder&, uint32_t&)>& change) {
    CharsmapBuilder builder(kRules);
    change(builder, builder.units()[builder.position(at)]);
    return builder.blob();
  };
  const std::string whole = good.blob();
  const Row rows[] = {
      {"cut: expected 4 bytes with the size of its trie, got 0", ""},
      {"cut: expected 4 bytes with the size of its trie, got 3", whole.substr(0, 3)},
      {"trie has 0 bytes; expected a multiple of 4", testing::le32(0)},
      {"trie has 6 bytes; expected a multiple of 4", testing::le32(6) + "abcdef"},
      {"cut: its trie has 4294967292 bytes, but only 4 follow", testing::le32(0xFFFFFFFC) + "abcd"},
      {"cut: its trie has", whole.substr(0, 500)},
      {"cut: its last replacement has no end", whole.substr(0, whole.size() - 1)},
      {"replacements are not UTF-8", testing::charsmap_of({0}, std::string("\xC3\0", 2))},
      {"points out of itself: unit 0 to", testing::charsmap_of({0x3FFFFFU << 10}, "")},
      {"points out of itself: unit",
       changed("\xC2", [](CharsmapBuilder&, uint32_t& unit) { unit |= 0x1FFFFFU << 10; })},
      {"points out of itself: unit",
       changed("e", [](CharsmapBuilder&, uint32_t& unit) { unit |= 1U << 9; })},
      {"goes round in a circle at unit", changed("\xEF\xBD",
                                                 [](CharsmapBuilder& b, uint32_t& unit) {
                                                   const uint32_t root = b.units()[0] >> 10;
                                                   unit = (unit & 0x3FFU) |
                                                          (b.position("\xEF\xBD") ^ root) << 10;
                                                 })},
      {"replacements, which have", changed("A",
                                           [](CharsmapBuilder& b, uint32_t& unit) {
                                             b.units()[b.position("A") ^ unit >> 10] |= 0x7FFFFFFFU;
                                           })},
      {"points into a character, at byte", changed("\u00BD",
                                                   [](CharsmapBuilder& b, uint32_t& unit) {
                                                     b.units()[b.position("\u00BD") ^ unit >> 10] +=
                                                         2;
                                                   })},
  };
  for (const Row& row : rows) {
    EXPECT_THAT([&] { Charsmap map(row.blob); },
                ::testing::ThrowsMessage<Error>(::testing::HasSubstr(row.message)));
  }
  // Whatever is cut off, and whatever byte is another, is refused or harmless.
  for (size_t length = 0; length < whole.size(); ++length) {
    try {
      Charsmap(whole.substr(0, length)).normalise("A\u0301\t\uFB01");
    } catch (const Error&) {
    }
  }
  for (size_t at = 0; at < whole.size(); ++at) {
    std::string other = whole;
    other[at] = static_cast<char>(other[at] ^ 0xFF);
    try {
      Charsmap(other).normalise("A\u0301\t\uFB01\u00BD\r\nx\u0301");
    } catch (const Error&) {
    }
  }
}

TEST(Charsmap, WhatGrowsWithoutEndIsAnError) {
  const std::map<std::string, std::string> rules = {{"a", std::string(1 << 20, 'b')}};
  const Charsmap map(CharsmapBuilder(rules).blob());
  EXPECT_THAT([&] { map.normalise(std::string(300, 'a')); },
              ::testing::ThrowsMessage<Error>(::testing::HasSubstr("more than 256 MiB")));
}

TEST(Charsmap, NormalisesForATokenizer) {
  json file = json::parse(R"({
      "model": {"type": "Unigram", "unk_id": 0,
                "vocab": [["<unk>", 0], ["\u2581fi", -1], ["n", -2], ["\u2581", -3]]},
      "pre_tokenizer": {"type": "Metaspace", "prepend_scheme": "always"}})");
  file["normalizer"] = {{"type", "Precompiled"},
                        {"precompiled_charsmap", to_base64(CharsmapBuilder(kRules).blob())}};
  const Tokenizer tokenizer = Tokenizer::parse(file.dump());
  EXPECT_THAT(tokenizer.encode("\uFB01n\u00A0\uFB01", false), ::testing::ElementsAre(1, 2, 1));
  for (const auto& [charsmap, message] :
       {std::pair<json, const char*>{"@@@@", "normalizer Precompiled: letter 0 is no letter"},
        {"", "the charsmap is cut"},
        {nullptr, "type must be string"}}) {
    file["normalizer"]["precompiled_charsmap"] = charsmap;
    EXPECT_THAT([&] { Tokenizer::parse(file.dump()); },
                ::testing::ThrowsMessage<Error>(::testing::HasSubstr(message)));
  }
}

}  // namespace
}  // namespace cambium::text
