#include "model/tokenizer_train.h"

#include <gtest/gtest.h>

#include "base/error.h"
#include "model/tokenizer.h"

namespace cambium {
namespace {

const std::vector<std::string> kTexts = {"Tom picks 12 apples.\nTom: 12+7=19\n",
                                         "Ann picks 340 apples, then Tom eats 7.\n"};

TEST(TrainTokenizer, RoundTripsWordsAndKeepsDigitsApart) {
  const TokenizerFiles files = train_tokenizer(kTexts, 320, {"<|end|>"}, "");
  const Tokenizer tokenizer = Tokenizer::parse(files.tokenizer_json, files.config_json);
  EXPECT_LE(tokenizer.vocab_size(), 320);
  EXPECT_EQ(tokenizer.eos_id(), 0);
  for (const std::string text : {kTexts[0], kTexts[1], std::string("a\tb  c\r\n\xc3\xa9 42")}) {
    EXPECT_EQ(tokenizer.decode(tokenizer.encode(text, false), false), text);
  }
  EXPECT_EQ(tokenizer.encode("340", false).size(), 3U);
  EXPECT_EQ(tokenizer.encode(" apples", false).size(), 1U);
  EXPECT_EQ(tokenizer.encode("<|end|>", false), std::vector<int32_t>{0});
}

TEST(TrainTokenizer, IsDeterministicAndStopsWhenNothingIsLeftToMerge) {
  const TokenizerFiles a = train_tokenizer(kTexts, 4000, {"<|end|>"}, "");
  EXPECT_EQ(a.tokenizer_json, train_tokenizer(kTexts, 4000, {"<|end|>"}, "").tokenizer_json);
  EXPECT_LT(Tokenizer::parse(a.tokenizer_json).vocab_size(), 400);
}

TEST(TrainTokenizer, RefusesAVocabularyWithoutRoomForBytes) {
  EXPECT_THROW(train_tokenizer(kTexts, 256, {"<|end|>"}, ""), Error);
}

}  // namespace
}  // namespace cambium
