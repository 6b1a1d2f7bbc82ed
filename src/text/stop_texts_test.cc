#include "text/stop_texts.h"

#include <gtest/gtest.h>

#include "base/test_paths.h"

namespace cambium {
namespace {

TEST(StopTexts, TheFirstInTheTextCounts) {
  const std::vector<std::string> stops = {"\n", "Question"};
  EXPECT_EQ(first_stop("one\nQuestion", stops), 3U);
  EXPECT_EQ(first_stop("a Question\n", stops), 2U);
  EXPECT_EQ(first_stop("neither", stops), 7U);
  EXPECT_EQ(first_stop("neither\n", {}), 8U);
}

// However its tokens cut it, an answer ends with the token that completes a stop.
TEST(StopWatch, EndsWithTheTokenThatCompletesAStop) {
  const Tokenizer tokenizer = Tokenizer::load(std::string(kSourceDir) + "/models/teacher");
  const std::string text = "Tom has 3 books and Ida has 12 books more than Tom.";
  const std::vector<int32_t> tokens = tokenizer.encode(text, false);
  const auto pushed = [&](const std::vector<std::string>& stops) {
    StopWatch watch(tokenizer, stops);
    size_t count = 1;
    while (count <= tokens.size() && watch.push(tokens[count - 1])) {
      ++count;
    }
    return count;
  };
  for (const std::string stop : {"Tom", " and Ida has", "12 books more", "than", "."}) {
    SCOPED_TRACE(stop);
    size_t least = 1;
    while (tokenizer.decode(std::span(tokens).first(least), true).find(stop) == std::string::npos) {
      ++least;
    }
    EXPECT_EQ(pushed({"never", stop}), least);
  }
  EXPECT_EQ(pushed({"never"}), tokens.size() + 1);
  EXPECT_EQ(pushed({}), tokens.size() + 1);
}

}  // namespace
}  // namespace cambium
