#include "base/json.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "base/error.h"
#include "base/testing.h"

namespace cambium {
namespace {

using nlohmann::json;

std::string message(const std::string& text, const JsonRules& rules = {}) {
  return testing::message_of([&] { parse_json<json>(text, "file.json", rules); });
}

std::string nested(const std::string& open, const std::string& inside, const std::string& close,
                   int times) {
  std::string text;
  for (int i = 0; i < times; ++i) {
    text += open;
  }
  text += inside;
  for (int i = 0; i < times; ++i) {
    text += close;
  }
  return text;
}

TEST(ParseJson, GivesWhatTheLibraryGives) {
  for (const char* text : {"{}", "[1, 2.5, -3e2, null, true, \"a\\\"[{\"]", "\"x\"", "12",
                           R"({"a": {"b": [{"c": "}"}]}, "": 18446744073709551615})"}) {
    EXPECT_EQ(parse_json<json>(text, "x"), json::parse(text));
  }
}

TEST(ParseJson, DepthIsLimitedWhateverIsNested) {
  EXPECT_EQ(message(nested("[", "1", "]", 200)), "no error");
  EXPECT_EQ(message(nested("[", "1", "]", 201)), "file.json:1: JSON nested more than 200 deep");
  EXPECT_EQ(message("\n" + nested("{\"a\":", "1", "}", 300000)),
            "file.json:2: JSON nested more than 200 deep");
  EXPECT_EQ(message(std::string(300000, '[')), "file.json:1: JSON nested more than 200 deep");
  // Brackets in strings do not count.
  EXPECT_EQ(message("\"" + std::string(1000, '[') + "\\\"" + std::string(1000, '{') + "\""),
            "no error");
}

TEST(ParseJson, WhatIsNoJsonIsNamed) {
  EXPECT_THAT(message("{\n\"a\": nope}"),
              ::testing::StartsWith("file.json is not valid JSON: parse error at line 2"));
  EXPECT_THAT(message(""), ::testing::StartsWith("file.json is not valid JSON"));
  EXPECT_THAT(message("\"" + std::string(100000, 'x')), ::testing::SizeIs(::testing::Lt(400)));
  EXPECT_THAT(message("[1e999]"), ::testing::HasSubstr("not valid JSON"));
}

TEST(ParseJson, PythonsNumbersAreReadWhereAllowed) {
  const std::string text = R"({"a": [0.0, Infinity, -Infinity, NaN, -1], "b": "Infinity NaN"})";
  EXPECT_THAT(message(text), ::testing::HasSubstr("not valid JSON"));
  EXPECT_EQ(
      parse_json<json>(text, "x", {.python = true}),
      json::parse(R"({"a": [0.0, "Infinity", "-Infinity", "NaN", -1], "b": "Infinity NaN"})"));
}

TEST(ParseJson, EqualKeysAreRefusedWhereAsked) {
  const JsonRules unique{.unique_keys = true};
  EXPECT_EQ(message(R"({"a": 1, "b": {"a": 2}, "c": [{"a": 1}, {"a": 1}], "d": "a"})", unique),
            "no error");
  EXPECT_EQ(message("{\"a\": 1,\n \"a\": 2}", unique), "file.json:2: the key 'a' stands twice");
  EXPECT_EQ(message(R"({"a": 1, "\u0061": 2})", unique), "file.json:1: the key 'a' stands twice");
  EXPECT_EQ(message(R"({"a": 1, "a": 2})"), "no error");
}

// As in the merges of a tokenizer.json: what is counted for a message is counted only then, or this
// takes minutes.
TEST(ParseJson, ManySmallListsAreReadInOnePass) {
  std::string text = "[";
  for (int i = 0; i < 300000; ++i) {
    text += R"(["ab", "cd"],)";
  }
  text += "0]";
  EXPECT_EQ(parse_json<json>(text, "x").size(), 300001U);
}

}  // namespace
}  // namespace cambium
