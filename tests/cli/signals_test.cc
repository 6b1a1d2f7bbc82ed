// Ctrl-C and SIGTERM: the first ends a command at its next piece with a message and leaves nothing
// half-written, the second ends it as always.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>

#include "base/file.h"
#include "base/test_folder.h"
#include "base/test_paths.h"
#include "program.h"

namespace cambium {
namespace {

using testing::HasSubstr;

/// The command, sent the signal after so many seconds: long after its start, long before its end.
/// In the foreground timeout sends it to the command alone; else to its process group too, and the
/// command may get it twice.
Outcome stopped(const std::string& arguments, const std::string& signal, double seconds = 1.5) {
  return cambium(
      arguments, "/dev/null",
      "timeout --foreground --preserve-status -s " + signal + " " + std::to_string(seconds));
}

/// The command, sent the signal when it has made a file, however long that takes: a tenth of a
/// second later, at most 90 after its start.
Outcome stopped_with(const std::string& file, const std::string& arguments,
                     const std::string& signal) {
  const std::string watch = "i=0; while [ ! -e " + file +
                            " ] && kill -0 $$ && [ $i -lt 900 ]; do sleep 0.1; i=$((i+1)); done; "
                            "sleep 0.1; kill -" +
                            signal + " $$";
  return cambium(arguments, "/dev/null",
                 "sh -c '( " + watch + " ) > /dev/null 2>&1 & exec \"$@\"' sh");
}

TEST(Signals, EndCommandsWithAMessageAndNothingHalfWritten) {
  const TestFolder folder;
  std::string prompts;
  for (int i = 0; i < 20000; ++i) {
    prompts += "{\"prompt\": \"Tom has " + std::to_string(i) + " shells.\"}\n";
  }
  const TestFolder inputs;
  write_file_atomically(inputs.at("in.jsonl"), prompts);
  const std::string out = " -o " + folder.at("out");
  const struct {
    std::string arguments;
    const char* text;
  } rows[] = {
      {"eval " + teacher() + " -n 20000" + out, "answers are graded when all came"},
      {"bench " + teacher() + " --repeats 10000", "nothing is measured to its end"},
      {"data mixed -n 1000000000" + out, "nothing is written"},
      {"generate " + teacher() + " -i " + inputs.at("in.jsonl") + out, "nothing is written"},
  };
  for (const auto& row : rows) {
    const bool term = &row - rows == 1;
    const Outcome outcome = stopped(row.arguments, term ? "TERM" : "INT");
    EXPECT_EQ(outcome.status, term ? 143 : 130) << row.arguments << "\n" << outcome.text;
    EXPECT_THAT(outcome.text, HasSubstr(term ? "cambium: stopped by SIGTERM" : "by SIGINT"));
    EXPECT_THAT(outcome.text, HasSubstr(row.text)) << row.arguments;
    EXPECT_TRUE(std::filesystem::is_empty(folder.path())) << row.arguments;
  }
}

// A model that takes long to make, so that the signal comes while it does, and then long to run.
TEST(Signals, EndLoadingAndBenchesOfRandomModels) {
  const TestFolder folder;
  write_file_atomically(
      folder.at("config.json"),
      R"({"model_type": "llama", "vocab_size": 4096, "hidden_size": 1024, "num_hidden_layers": 24,
          "num_attention_heads": 16, "num_key_value_heads": 4, "intermediate_size": 4096,
          "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
          "hidden_act": "silu", "tie_word_embeddings": true, "eos_token_id": 1})");
  const std::string model = "--random-weights '" + folder.path() + "' --storage bf16";
  const std::string many = "--input 64 --output 64 --sequences 100000";
  const struct {
    std::string arguments;
    double seconds;
  } rows[] = {
      {"bench throughput " + model + " " + many, 0.4},
      {"bench " + model + " --repeats 10000", 0.4},
      {"bench decode " + teacher() + " --repeats 10000", 1.5},
      {"bench throughput " + teacher() + " " + many, 1.5},
  };
  for (const auto& row : rows) {
    const Outcome outcome = stopped(row.arguments, "INT", row.seconds);
    EXPECT_EQ(outcome.status, 130) << row.arguments << "\n" << outcome.text;
    EXPECT_THAT(outcome.text, HasSubstr("stopped by SIGINT; nothing is measured to its end"));
  }
}

TEST(Signals, ScoresAndTrainingKeepWhatTheyHave) {
  const TestFolder folder;
  const Outcome score = stopped_with(
      folder.at("scores.json"),
      "score " + teacher() + " --documents 1000 -o " + folder.at("scores.json"), "INT");
  EXPECT_EQ(score.status, 130) << score.text;
  EXPECT_THAT(score.text, HasSubstr("the layers scored so far are kept"));
  EXPECT_TRUE(std::filesystem::exists(folder.at("scores.json")));
  ASSERT_EQ(cambium("convert " + teacher() + " -o " + folder.at("win") +
                    " --layers 1,2,3,4,5,6,7,8 --mixer sliding_window")
                .status,
            0);
  const Outcome place = stopped_with(
      folder.at("p.json.trace"),
      "place " + teacher() + " --method search --bank win=" + folder.at("win") +
          " --cost cache --budget 0.7 --evaluations 200 --documents 200 -o " + folder.at("p.json"),
      "INT");
  EXPECT_EQ(place.status, 130) << place.text;
  EXPECT_THAT(place.text, HasSubstr("the placements measured so far are kept"));
  EXPECT_TRUE(std::filesystem::exists(folder.at("p.json.trace")));
  EXPECT_FALSE(std::filesystem::exists(folder.at("p.json")));
  const std::string train = "train '" + std::string(kSourceDir) + "/plans/teacher.toml' -o " +
                            folder.at("run") +
                            " --set train.sequence_length=640 --set tokenizer.samples=100";
  const Outcome first = stopped_with(folder.at("run/log.jsonl"), train, "TERM");
  EXPECT_EQ(first.status, 143) << first.text;
  EXPECT_THAT(first.text, HasSubstr("go on with --resume"));
  EXPECT_EQ(cambium(train + " --resume --stop-after 1").status, 0);
  EXPECT_EQ(cambium("verify " + folder.at("run")).status, 0);
}

}  // namespace
}  // namespace cambium
