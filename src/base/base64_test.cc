#include "base/base64.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <utility>

#include "base/error.h"

namespace cambium {
namespace {

TEST(Base64, GoesThereAndBack) {
  const std::pair<std::string, const char*> rows[] = {
      {"", ""},        {"f", "Zg=="},        {"fo", "Zm8="},
      {"foo", "Zm9v"}, {"foob", "Zm9vYg=="}, {std::string("\xfb\xff\0", 3), "+/8A"},
  };
  for (const auto& [bytes, text] : rows) {
    EXPECT_EQ(to_base64(bytes), text);
    EXPECT_EQ(from_base64(text, "it"), bytes);
  }
  EXPECT_EQ(from_base64("Zm8", "without padding"), "fo");
}

TEST(Base64, WhatIsNoBase64IsNamed) {
  const std::pair<const char*, const char*> rows[] = {
      {"Zm9vZ", "it: base64 of 5 letters is cut"}, {"Zm!v", "it: letter 2 is no letter of base64"},
      {"Zg=", "it: letter 2 is no letter"},        {"Z===", "it: letter 1 is no letter"},
      {"Zh==", "it: base64 ends within a byte"},   {"Zg==Zg==", "it: letter 2 is no letter"},
  };
  for (const auto& [text, message] : rows) {
    const auto read = [text = text] { from_base64(text, "it"); };
    EXPECT_THAT(read, ::testing::ThrowsMessage<Error>(::testing::HasSubstr(message))) << text;
  }
}

}  // namespace
}  // namespace cambium
