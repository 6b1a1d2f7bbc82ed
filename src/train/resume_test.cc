// Runs that are killed go on as if they had not been.
#include <gmock/gmock.h>

#include <chrono>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "base/test_child.h"
#include "base/test_folder.h"
#include "train/checkpoint.h"
#include "train/testing.h"

namespace cambium {
namespace {

constexpr const char* kChild = "Resume.DISABLED_Child";
using ::testing::HasSubstr;

constexpr int64_t kSteps = 40;

TrainConfig run_config(const std::string& folder) {
  TrainConfig config = testing::tiny_config(kSteps);
  config.folder = folder;
  config.checkpoint_every = 3;
  config.resume = true;
  return config;
}

/// Runs to the end, resuming what is there; returns the weights.
std::vector<float> run_to_end(const TrainConfig& config, uint64_t data_seed = 7) {
  Progress::silence(true);
  LoadedModel model = fresh_model(testing::tiny_attention(2), 1);
  const auto data = testing::copy_task(data_seed);
  Trainer trainer(*model.model, model.weights, config, *data);
  trainer.run();
  Progress::silence(false);
  return testing::all_weights(*model.model);
}

/// The log without the fields that say how fast it went.
std::vector<std::string> curve(const std::string& folder) {
  std::vector<std::string> lines;
  std::ifstream file(folder + "/log.jsonl");
  for (std::string line; std::getline(file, line);) {
    nlohmann::json json = nlohmann::json::parse(line);
    json.erase("seconds");
    json.erase("tokens_per_second");
    lines.push_back(json.dump());
  }
  return lines;
}

// Not a test: what the process that is to be killed runs.
TEST(Resume, DISABLED_Child) {
  const std::string folder = test_child_folder();
  ASSERT_FALSE(folder.empty());
  run_to_end(run_config(folder));
}

TEST(Resume, AKilledRunEqualsAnUninterruptedOneBitForBit) {
  const TestFolder folder;
  const std::vector<float> whole = run_to_end(run_config(folder.at("whole")));
  const std::string killed = folder.at("killed");
  Rng rng(11, 0);
  bool ended = false;
  for (int round = 0; round < 6 && !ended; ++round) {
    ended = run_test_child(kChild, killed, static_cast<int>(rng.between(20, 60 + 40 * round)));
  }
  ASSERT_TRUE(ended || run_test_child(kChild, killed, -1));
  EXPECT_EQ(curve(killed), curve(folder.at("whole")));
  EXPECT_EQ(run_to_end(run_config(killed)), whole);  // nothing left to do: loads the last one
}

TEST(Resume, PassesOverADamagedCheckpoint) {
  const TestFolder folder;
  const std::vector<float> whole = run_to_end(run_config(folder.path()));
  const std::vector<std::string> lines = curve(folder.path());
  const std::string newest = *newest_checkpoint(folder.path());
  EXPECT_THAT(newest, HasSubstr("step-000040"));
  std::filesystem::resize_file(newest + "/state.safetensors", 1000);
  EXPECT_THAT(*newest_checkpoint(folder.path()), HasSubstr("step-000039"));
  EXPECT_EQ(run_to_end(run_config(folder.path())), whole);
  EXPECT_EQ(curve(folder.path()), lines);
}

std::string error_of(const TrainConfig& config, uint64_t data_seed = 7) {
  try {
    run_to_end(config, data_seed);
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

TEST(Resume, RefusesAnotherRun) {
  const TestFolder folder;
  run_to_end(run_config(folder.path()));
  TrainConfig config = run_config(folder.path());
  config.schedule.peak = 0.5;
  EXPECT_THAT(error_of(config), HasSubstr("schedule: was peak 0.01"));
  EXPECT_THAT(error_of(run_config(folder.path()), 8), HasSubstr("data: was copy task 7"));
  config = run_config(folder.path());
  config.resume = false;
  EXPECT_THAT(error_of(config), HasSubstr("holds a run already"));
}

TEST(Resume, KeepsTheLastCheckpoints) {
  const TestFolder folder;
  run_to_end(run_config(folder.path()));
  int count = 0;
  for (const auto& entry : std::filesystem::directory_iterator(folder.at("checkpoints"))) {
    count += entry.is_directory() ? 1 : 0;
  }
  EXPECT_EQ(count, 2);
}

}  // namespace
}  // namespace cambium
