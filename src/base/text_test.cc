#include "base/text.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <limits>

namespace cambium {
namespace {

using ::testing::ElementsAre;

TEST(Text, EditDistance) {
  struct Row {
    const char* a;
    const char* b;
    size_t distance;
  };
  for (const Row& row :
       {Row{"", "", 0}, Row{"", "abc", 3}, Row{"abc", "abc", 0}, Row{"kitten", "sitting", 3},
        Row{"layres", "layers", 1}, Row{"rate", "rates", 1}, Row{"ab", "ba", 1}}) {
    EXPECT_EQ(edit_distance(row.a, row.b), row.distance) << row.a << " " << row.b;
    EXPECT_EQ(edit_distance(row.b, row.a), row.distance) << row.b << " " << row.a;
  }
}

TEST(Text, NearestName) {
  const std::vector<std::string> known{"learning_rate", "weight_decay", "seed", "steps", "k"};
  struct Row {
    const char* unknown;
    const char* nearest;  // null: none is near
  };
  for (const Row& row :
       {Row{"learning-rate", "learning_rate"}, Row{"learnin_rate", "learning_rate"},
        Row{"sead", "seed"}, Row{"Seed", "seed"}, Row{"stps", "steps"}, Row{"step", "steps"},
        Row{"temperature", nullptr}, Row{"zz", nullptr}, Row{"x", nullptr}, Row{"", nullptr}}) {
    const auto nearest = nearest_name(row.unknown, known);
    EXPECT_EQ(nearest.value_or("none"), row.nearest != nullptr ? row.nearest : "none")
        << row.unknown;
  }
  EXPECT_EQ(did_you_mean("sead", known), "; did you mean 'seed'?");
  EXPECT_EQ(did_you_mean("temperature", known), "");
}

TEST(Text, HumanBytes) {
  EXPECT_EQ(human_bytes(0), "0 B");
  EXPECT_EQ(human_bytes(1023), "1023 B");
  EXPECT_EQ(human_bytes(1536), "1.5 KiB");
  EXPECT_EQ(human_bytes(512 << 20), "512 MiB");
  EXPECT_EQ(human_bytes((1U << 20) - 1), "1.0 MiB");
  EXPECT_EQ(human_bytes(std::numeric_limits<uint64_t>::max()), "16.0 EiB");
}

TEST(Text, HumanCount) {
  EXPECT_EQ(human_count(0), "0");
  EXPECT_EQ(human_count(12.34), "12.3");
  EXPECT_EQ(human_count(999), "999");
  EXPECT_EQ(human_count(999.9), "1.0K");
  EXPECT_EQ(human_count(1.5e6), "1.5M");
  EXPECT_EQ(human_count(134.5e6), "134M");
  EXPECT_EQ(human_count(-2e9), "-2.0B");
}

TEST(Text, HumanDuration) {
  EXPECT_EQ(human_duration(0.5), "0.5s");
  EXPECT_EQ(human_duration(42), "42s");
  EXPECT_EQ(human_duration(125), "2m 05s");
  EXPECT_EQ(human_duration(3725), "1h 02m");
  EXPECT_EQ(human_duration(90000), "1d 01h");
  EXPECT_EQ(human_duration(std::numeric_limits<double>::infinity()), "?");
  EXPECT_EQ(human_duration(-1), "?");
}

TEST(Text, JoinAndSplit) {
  EXPECT_EQ(join(std::vector<std::string>{"a", "b"}, ", "), "a, b");
  EXPECT_EQ(join({}, ", "), "");
  EXPECT_THAT(split("a,,b", ','), ElementsAre("a", "", "b"));
  EXPECT_THAT(split("", ','), ElementsAre(""));
}

TEST(Printable, TerminalsAreLeftAlone) {
  EXPECT_EQ(printable("plain\ttext\né 日 😀"), "plain\ttext\né 日 😀");
  EXPECT_EQ(printable("\x1b]0;title\x07"), "\\x1b]0;title\\x07");
  EXPECT_EQ(printable("a\rb\x7f"), "a\\x0db\\x7f");
  EXPECT_EQ(printable("\xc2\x9b"), "\\xc2\\x9b");  // U+009B, another escape
  EXPECT_EQ(printable("\xff\xc3"), "\\xff\\xc3");
}

TEST(Shortened, TheMiddleIsLeftOut) {
  EXPECT_EQ(shortened("short"), "short");
  const std::string cut = shortened(std::string(1000, 'a') + "end", 30);
  EXPECT_EQ(cut, std::string(20, 'a') + "[... 973 bytes ...]" + std::string(7, 'a') + "end");
  std::string wide;
  for (int i = 0; i < 100; ++i) {
    wide += "é";
  }
  EXPECT_EQ(printable(shortened(wide, 31)), shortened(wide, 31));  // no character is cut in two
}

}  // namespace
}  // namespace cambium
