#include "eval/verify_values.h"

#include <gtest/gtest.h>

#include <cmath>
#include <nlohmann/json.hpp>

#include "base/file.h"
#include "base/test_folder.h"
#include "base/test_paths.h"
#include "files/safetensors.h"
#include "model/weights.h"

namespace cambium {
namespace {

using Json = nlohmann::json;

// The values of the llama fixture's second prompt, from the logits of its reference.
Json fixture_case() {
  const std::string dir = std::string(kSourceDir) + "/tests/fixtures/llama";
  const SafeTensors file = SafeTensors::open(dir + "/reference.safetensors");
  const std::vector<int64_t> ids = as_i64(file.at("tokens.1"));
  const std::vector<float> logits = as_f32(file.at("logits.1"));
  const size_t vocab = logits.size() / ids.size();
  Json c = {{"text", "llama"}, {"ids", ids}, {"greedy", as_i64(file.at("greedy.1"))}};
  for (size_t t = 0; t + 1 < ids.size(); ++t) {
    double sum = 0.0;
    for (size_t v = 0; v < vocab; ++v) {
      sum += std::exp(static_cast<double>(logits[t * vocab + v]));
    }
    c["nll"].push_back(std::log(sum) - logits[t * vocab + static_cast<size_t>(ids[t + 1])]);
  }
  c["last_top_ids"] = {3};
  c["last_top_logits"] = {logits[(ids.size() - 1) * vocab + 3]};
  return c;
}

std::vector<ValuesRow> verify(const Json& c) {
  const TestFolder folder;
  write_file_atomically(folder.at("values.json"), Json{{"cases", {c}}}.dump());
  const LoadedModel loaded = load_model(std::string(kSourceDir) + "/tests/fixtures/llama");
  return verify_values(*loaded.model, folder.at("values.json"));
}

TEST(VerifyValues, AgreeWithTheReferenceAndSeeWhatIsWrong) {
  const Json right = fixture_case();
  const ValuesRow row = verify(right).at(0);
  EXPECT_TRUE(row.ok) << row.nll_error << " " << row.logit_error;
  EXPECT_EQ(row.greedy_same, 12);
  Json wrong = right;
  wrong["nll"][1] = right["nll"][1].get<double>() + 0.01;
  EXPECT_FALSE(verify(wrong).at(0).ok);
  EXPECT_NEAR(verify(wrong).at(0).nll_error, 0.01, 1e-3);
  wrong = right;
  wrong["greedy"][2] = right["greedy"][2] == 0 ? 1 : 0;
  EXPECT_EQ(verify(wrong).at(0).greedy_same, 2);
  wrong = right;
  wrong["last_top_logits"] = {1e3};
  EXPECT_FALSE(verify(wrong).at(0).ok);
}

TEST(VerifyValues, FilesThatDoNotFitAreErrors) {
  for (const auto& [key, value] : {std::pair<const char*, Json>{"ids", {1}},
                                   {"ids", {1, 100000}},
                                   {"ids", {1.5, 2}},
                                   {"nll", Json::array()},
                                   {"nll", "x"},
                                   {"last_top_ids", {1, 2}}}) {
    Json c = fixture_case();
    c[key] = value;
    EXPECT_THROW(verify(c), Error) << key << " " << value;
  }
}

}  // namespace
}  // namespace cambium
