#include "text/regex.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "base/error.h"
#include "text/unicode.h"

namespace cambium::text {
namespace {

/// Where Oniguruma's dialect and PCRE2's differ: the first match, "-" for none.
TEST(Regex, SpeaksOniguruma) {
  struct Row {
    std::string pattern, subject, match;
  };
  const std::vector<Row> rows = {
      {R"(\h+)", "xyzCafe", "Cafe"},
      {R"(\H+)", "abXY", "XY"},
      {R"(\s)", "a\u0085", "\u0085"},
      {R"(\s)", "a\u180E", "-"},
      {R"(\S+)", "\u3000b", "b"},
      {R"([^\s]+)", "\u2028b", "b"},
      {R"(\w+)", "!e\u0301_1", "e\u0301_1"},
      {R"(\bb)", "ab b", "b"},
      {R"(\v)", "\n", "-"},
      {R"([\p{L}&&[^\p{Han}]]+)", "日ab本", "ab"},
      {R"([^\p{L}&&[^a]]+)", "xya1", "a1"},
      {R"([a[bc]]+)", "xcab", "cab"},
      {R"([a[^\x00-\x7F]]+)", "bébab", "é"},
      {R"([\w-]+)", "+a-b", "a-b"},
      {R"([]a]+)", "x]a", "]a"},
      {R"([a-c\-z]+)", "x-zb", "-zb"},
      {R"(a{,2})", "aaa", "aa"},
      {R"(\p{N}{1,3}+)", "12345", "12345"},
      {R"(a++b)", "aab", "aab"},
      {R"(\p{^L}+)", "ab12", "12"},
      {R"(\p{Letter}\p{Decimal_Number})", "1a2", "a2"},
      {R"([[:alpha:]]+)", "1éa", "éa"},
      {R"((?m:a.b))", "a\nb", "a\nb"},
      {R"(a.b)", "a\nb", "-"},
      {R"(^b$)", "a\nb\nc", "b"},
      {R"((?i:'S|'LL))", "it's", "'s"},
      {R"(\u00e9)", "aé", "é"},
      {R"(\s+(?!\S)|\s+)", "   a", "  "},
      {R"(a(?#note)b)", "ab", "ab"},
      {R"({)", "a{", "{"},
  };
  for (const auto& [pattern, subject, match] : rows) {
    size_t begin = 0;
    size_t end = 0;
    const Regex regex(pattern);
    const bool found = regex.find(subject, 0, begin, end);
    EXPECT_EQ(found ? subject.substr(begin, end - begin) : "-", match) << pattern;
  }
}

TEST(Regex, RefusesWhatIsWrong) {
  for (const char* pattern :
       {"(", ")", "[a", "a\\", "\\p{Nothing}", "(*FAIL)", "\\x{zz}", "\\k<a>"}) {
    EXPECT_THROW(Regex{pattern}, Error) << pattern;
  }
  const std::string nested(100, '[');
  EXPECT_THROW(Regex{nested}, Error);
}

TEST(Utf8, ReplacesMaximalParts) {
  EXPECT_EQ(to_valid_utf8("a\xF0\x9F\x98z"), "a\uFFFDz");
  EXPECT_EQ(to_valid_utf8("\xE0\x80\x80"), "\uFFFD\uFFFD\uFFFD");
  EXPECT_EQ(to_valid_utf8("\xED\xA0\x80"), "\uFFFD\uFFFD\uFFFD");
  EXPECT_EQ(to_valid_utf8("\xC3"), "\uFFFD");
  EXPECT_EQ(incomplete_utf8_suffix("a\xF0\x9F\x98"), 3U);
  EXPECT_EQ(incomplete_utf8_suffix("a\x98"), 0U);
  EXPECT_EQ(incomplete_utf8_suffix("é"), 0U);
  std::string bytes;
  for (int i = 0; i < 256; ++i) {
    bytes += static_cast<char>(i);
  }
  std::string back;
  EXPECT_TRUE(alphabet_to_bytes(bytes_to_alphabet(bytes), back));
  EXPECT_EQ(back, bytes);
  EXPECT_FALSE(alphabet_to_bytes("a b", back));
}

}  // namespace
}  // namespace cambium::text
