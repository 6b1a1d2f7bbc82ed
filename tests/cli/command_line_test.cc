// The program as its users run it: help, wrong usage, errors, and commands that need no training.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/wait.h>

#include <array>
#include <cstdio>
#include <nlohmann/json.hpp>

#include "base/file.h"
#include "base/test_folder.h"

namespace cambium {
namespace {

using testing::HasSubstr;

struct Outcome {
  int status = -1;
  std::string text;  // standard output and error together
};

Outcome cambium(const std::string& arguments, const std::string& input = "/dev/null") {
  const std::string command =
      std::string("'") + CAMBIUM_BINARY + "' " + arguments + " 2>&1 <'" + input + "'";
  FILE* pipe = popen(command.c_str(), "r");
  Outcome outcome;
  std::array<char, 4096> buffer{};
  for (size_t n = 0; (n = std::fread(buffer.data(), 1, buffer.size(), pipe)) > 0;) {
    outcome.text.append(buffer.data(), n);
  }
  const int status = pclose(pipe);
  outcome.status = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  return outcome;
}

std::string fixture(const std::string& name) {
  return std::string(CAMBIUM_SOURCE_DIR) + "/tests/fixtures/" + name;
}

const char* const kCommands[] = {"hybridize", "score",  "place",  "convert",  "distill",
                                 "train",     "data",   "eval",   "bench",    "report",
                                 "inspect",   "verify", "import", "generate", "chat"};

TEST(CommandLine, AloneItShowsWhatThereIs) {
  const Outcome outcome = cambium("");
  EXPECT_EQ(outcome.status, 0);
  for (const char* command : kCommands) {
    EXPECT_THAT(outcome.text, HasSubstr(std::string("  ") + command));
  }
  EXPECT_THAT(cambium("--version").text, HasSubstr("cambium "));
}

TEST(CommandLine, EveryCommandExplainsItselfWithExamples) {
  for (const char* command : kCommands) {
    const Outcome outcome = cambium(std::string(command) + " --help");
    EXPECT_EQ(outcome.status, 0) << command;
    EXPECT_THAT(outcome.text, HasSubstr(std::string("cambium ") + command)) << command;
    EXPECT_THAT(outcome.text, HasSubstr("Examples:")) << command;
    EXPECT_THAT(outcome.text, HasSubstr("--threads")) << command;
  }
}

TEST(CommandLine, WrongUsageIsNamedAndTheNearestSuggested) {
  const struct {
    const char* arguments;
    const char* text;
  } rows[] = {
      {"verfy", "did you mean 'verify'"},
      {"zzzzz", "unknown command 'zzzzz'"},
      {"inspect x --memry 3", "did you mean '--memory'"},
      {"generate x --tempreature=1", "did you mean '--temperature'"},
      {"inspect", "model"},
      {"inspect a b", "b"},
      {"bench x --batch many", "many"},
      {"verify x --threads -3", "threads"},
  };
  for (const auto& row : rows) {
    const Outcome outcome = cambium(row.arguments);
    EXPECT_EQ(outcome.status, 2) << row.arguments << "\n" << outcome.text;
    EXPECT_THAT(outcome.text, HasSubstr(row.text)) << row.arguments;
    EXPECT_THAT(outcome.text, HasSubstr("--help")) << row.arguments;
  }
}

TEST(CommandLine, ErrorsNameWhatIsWrong) {
  TestFolder folder;
  write_file_atomically(folder.at("config.json"), "{\"model_type\": \"lama\"}");
  const struct {
    std::string arguments;
    const char* text;
  } rows[] = {
      {"inspect /nowhere", "/nowhere/config.json"},
      {"inspect " + folder.path(), "did you mean 'llama'"},
      {"verify " + fixture("llama") + " --reference /nowhere.safetensors", "/nowhere.safetensors"},
      {"inspect " + fixture("llama") + " --memory lots", "24GiB"},
      {"generate " + fixture("llama") + " -p hello", "tokenizer.json"},
  };
  for (const auto& row : rows) {
    const Outcome outcome = cambium(row.arguments);
    EXPECT_EQ(outcome.status, 1) << row.arguments << "\n" << outcome.text;
    EXPECT_THAT(outcome.text, HasSubstr("cambium: error: ")) << row.arguments;
    EXPECT_THAT(outcome.text, HasSubstr(row.text)) << row.arguments;
  }
}

TEST(CommandLine, BenchNeedsNoWeights) {
  TestFolder folder;  // a configuration under another name, without weights
  write_file_atomically(folder.at("sizes.json"), read_text_file(fixture("llama") + "/config.json"));
  const Outcome outcome = cambium("bench --random-weights " + folder.at("sizes.json") +
                                  " --contexts 4 --decode 2 --repeats 1 --json");
  ASSERT_EQ(outcome.status, 0) << outcome.text;
  const auto rows = nlohmann::json::parse(outcome.text);
  ASSERT_EQ(rows.size(), 1U);
  EXPECT_GT(rows[0]["prefill"][0], 0.0);
  EXPECT_GE(rows[0]["decode_cpu_ms"][0], 0.0);
  const Outcome nothing = cambium("bench");
  EXPECT_EQ(nothing.status, 1);
  EXPECT_THAT(nothing.text, HasSubstr("--random-weights"));
}

TEST(CommandLine, VerifyTellsByItsStatus) {
  const Outcome good = cambium("verify " + fixture("qwen3"));
  EXPECT_EQ(good.status, 0) << good.text;
  EXPECT_THAT(good.text, HasSubstr("token by token"));
  // The weights of one model beside the reference of another of its shape.
  const Outcome bad = cambium("verify " + fixture("mistral") + " --reference " +
                              fixture("mistral_swa") + "/reference.safetensors");
  EXPECT_EQ(bad.status, 1) << bad.text;
  EXPECT_THAT(bad.text, HasSubstr("FAILED"));
}

TEST(CommandLine, InspectCountsBeforeAnythingIsLoaded) {
  TestFolder folder;  // a configuration without weights
  write_file_atomically(folder.at("config.json"),
                        read_text_file(fixture("llama") + "/config.json"));
  const Outcome outcome = cambium("inspect " + folder.path() + " --memory 1MiB --json --cache f32");
  ASSERT_EQ(outcome.status, 0) << outcome.text;
  const auto json = nlohmann::json::parse(outcome.text);
  EXPECT_EQ(json["parameters"], 126400);
  EXPECT_EQ(json["layers"], 3);
  // Three layers of two key-value heads of 16, keys and values, fp32.
  EXPECT_EQ(json["cache_bytes_per_token"], 3 * 2 * 2 * 16 * 4);
  EXPECT_EQ(json["memory"]["f32"]["sequences"], (1048576 - 126400 * 4) / (512 * 768));
  const Outcome narrow = cambium("inspect " + folder.path() + " --memory 1MiB --json");
  const auto halved = nlohmann::json::parse(narrow.text);
  EXPECT_EQ(halved["cache_bytes_per_token"], 3 * 2 * 2 * 16 * 2);
  EXPECT_EQ(halved["memory"]["f32"]["sequences"], (1048576 - 126400 * 4) / (512 * 384));
  EXPECT_THAT(cambium("inspect " + folder.path() + " --cache f16").text, HasSubstr("bf16 or f32"));
}

TEST(CommandLine, BenchMeasuresModelsSideBySide) {
  const Outcome outcome = cambium("bench " + fixture("llama") + " " + fixture("apriel_h1") +
                                  " --contexts 64 --repeats 1 --json");
  ASSERT_EQ(outcome.status, 0) << outcome.text;
  EXPECT_THAT(outcome.text, HasSubstr("prefill"));
  EXPECT_THAT(outcome.text, HasSubstr("apriel_h1"));
}

// Scores of another question are never given, whatever was changed; D1 of what was found once.
TEST(CommandLine, ScoresAreNeverStale) {
  const TestFolder folder;
  const std::string scores = " -o " + folder.at("s.json");
  const std::string model = std::string(CAMBIUM_SOURCE_DIR) + "/models/teacher";
  const std::string first = "score " + model + " --documents 2 --max-tokens 40" + scores;
  write_file_atomically(folder.at("a.jsonl"), "{\"text\": \"one two three\"}\n");
  const std::string data = " --data " + folder.at("a.jsonl");
  ASSERT_EQ(cambium(first + data).status, 0);
  EXPECT_EQ(cambium(first + data).status, 0);
  // The data's contents, not its name.
  write_file_atomically(folder.at("a.jsonl"), "{\"text\": \"one two four\"}\n");
  const Outcome changed = cambium(first + data);
  EXPECT_EQ(changed.status, 1);
  EXPECT_THAT(changed.text, HasSubstr("holds scores of something else"));
  EXPECT_THAT(changed.text, HasSubstr("data: "));
  EXPECT_EQ(cambium(first + data + " --fresh").status, 0);
  EXPECT_EQ(cambium(first + data + " --metric nll").status, 1);
  EXPECT_EQ(cambium(first + data + " --method leave-block-out").status, 1);
  // What does nothing is refused, and an output that cannot be written before the work.
  EXPECT_THAT(cambium(first + data + " --window 4").text, HasSubstr("--window belongs to"));
  EXPECT_THAT(cambium(first + data + " --problems 4").text, HasSubstr("--problems belongs to"));
  EXPECT_EQ(cambium("score " + model + data + " -o /none/s.json").status, 1);
}

TEST(CommandLine, MergeWritesAModelThatLoads) {
  const TestFolder folder;
  const std::string model = fixture("llama");
  const Outcome merged =
      cambium("merge " + model + " " + model + " -o " + folder.at("m") + " --weights 3,1");
  EXPECT_EQ(merged.status, 0) << merged.text;
  EXPECT_EQ(cambium("inspect " + folder.at("m")).status, 0);
  EXPECT_THAT(
      cambium("merge " + model + " " + model + " -o " + folder.at("n") + " --weights 1").text,
      HasSubstr("expected one for each of the 2 models"));
  EXPECT_THAT(
      cambium("merge " + model + " " + model + " -o " + folder.at("n") + " --weights 1,x").text,
      HasSubstr("got 'x'"));
  EXPECT_THAT(cambium("merge " + model + " " + fixture("qwen3") + " -o " + folder.at("n")).text,
              HasSubstr("error"));
  EXPECT_EQ(cambium("merge " + model + " " + model + " -o " + folder.at("m")).status, 1);
}

}  // namespace
}  // namespace cambium
