// Runs that are killed go on as if they had not been.
#include <gmock/gmock.h>

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <csignal>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "base/file.h"
#include "base/signals.h"
#include "base/test_child.h"
#include "base/test_folder.h"
#include "base/testing.h"
#include "files/checksums.h"
#include "files/safetensors.h"
#include "train/checkpoint.h"
#include "train/run_record.h"
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
  EXPECT_EQ(testing::curve(killed), testing::curve(folder.at("whole")));
  EXPECT_EQ(run_to_end(run_config(killed)), whole);  // nothing left to do: loads the last one
}

TEST(Resume, PassesOverADamagedCheckpoint) {
  const TestFolder folder;
  const std::vector<float> whole = run_to_end(run_config(folder.path()));
  const std::vector<std::string> lines = testing::curve(folder.path());
  const std::string newest = *newest_checkpoint(folder.path());
  EXPECT_THAT(newest, HasSubstr("step-000040"));
  std::filesystem::resize_file(newest + "/state.safetensors", 1000);
  EXPECT_THAT(*newest_checkpoint(folder.path()), HasSubstr("step-000039"));
  EXPECT_EQ(run_to_end(run_config(folder.path())), whole);
  EXPECT_EQ(testing::curve(folder.path()), lines);
}

std::string error_of(const TrainConfig& config, uint64_t data_seed = 7) {
  return testing::message_of([&] { run_to_end(config, data_seed); });
}

TEST(Resume, RefusesAnotherRun) {
  const TestFolder folder;
  run_to_end(run_config(folder.path()));
  TrainConfig config = run_config(folder.path());
  config.schedule.peak = 0.5;
  EXPECT_THAT(error_of(config), HasSubstr("schedule: was peak 0.01"));
  EXPECT_THAT(error_of(run_config(folder.path()), 8), HasSubstr("data: was copy task 7"));
  config = run_config(folder.path());
  config.steps += 3;  // so that nothing can follow a run that has ended
  EXPECT_THAT(error_of(config), HasSubstr("steps: was 40, is now 43"));
  config = run_config(folder.path());
  config.resume = false;
  EXPECT_THAT(error_of(config), HasSubstr("holds a run already"));
}

/// The names of the tensors of a checkpoint that are the optimiser's.
std::vector<std::string> optimizer_tensors(const std::filesystem::path& checkpoint) {
  std::vector<std::string> names;
  const SafeTensors state = SafeTensors::open((checkpoint / "state.safetensors").string());
  for (const TensorEntry& entry : state.tensors()) {
    if (entry.name.starts_with("optimizer.")) {
      names.push_back(entry.name);
    }
  }
  return names;
}

TEST(Resume, ARunThatHasEndedKeepsNoStateOfTheOptimizer) {
  const TestFolder folder;
  const std::vector<float> whole = run_to_end(run_config(folder.path()));
  const auto all = list_checkpoints(folder.path());
  ASSERT_EQ(all.size(), 2U);
  EXPECT_TRUE(optimizer_tensors(all[0]).empty());
  EXPECT_FALSE(optimizer_tensors(all[1]).empty());
  EXPECT_TRUE(read_checkpoint_state(all[0].string()).ended);
  EXPECT_FALSE(read_checkpoint_state(all[1].string()).ended);
  // As versions wrote it that kept the state to the end.
  const std::string state = (all[0] / "state.safetensors").string();
  {
    const SafeTensors last = SafeTensors::open(state);
    const SafeTensors before = SafeTensors::open((all[1] / "state.safetensors").string());
    std::vector<TensorSource> tensors;
    for (const TensorEntry& entry : before.tensors()) {
      const TensorEntry* newer = last.find(entry.name);
      tensors.push_back(TensorSource::from_memory(entry.name, entry.dtype, entry.shape,
                                                  (newer != nullptr ? *newer : entry).data));
    }
    write_safetensors(state, std::move(tensors));
  }
  const std::string path = (all[0] / "training.json").string();
  auto json = nlohmann::json::parse(read_text_file(path));
  json.erase("ended");
  write_file_atomically(path, json.dump());
  write_checksums(all[0].string());
  EXPECT_EQ(run_to_end(run_config(folder.path())), whole);
}

TEST(Resume, AnEndBeforeTheLastStepIsNamed) {
  const TestFolder folder;
  run_to_end(run_config(folder.path()));
  const std::string newest = *newest_checkpoint(folder.path());
  auto json = nlohmann::json::parse(read_text_file(newest + "/training.json"));
  json["step"] = 12;
  write_file_atomically(newest + "/training.json", json.dump());
  write_checksums(newest);
  EXPECT_THAT(error_of(run_config(folder.path())),
              HasSubstr("says that the run has ended, after 12 steps"));
}

/// Lets the checkpoint of step 3 fail when it takes its name: something is there that it would
/// replace, and cannot be moved aside.
void obstruct(const std::string& run) {
  const std::string target = checkpoint_path(run, 3);
  make_folder(target);
  write_file_atomically(target + "/something", "mine");
  write_file_atomically(fmt::format("{}.replaced-{}", target, ::getpid()), "in the way");
}

TEST(Resume, ACheckpointThatFailsInTheBackgroundEndsTheRunAndLeavesNothing) {
  const TestFolder folder;
  const std::vector<float> whole = run_to_end(run_config(folder.at("whole")));
  const std::string run = folder.at("run");
  for (const bool broken : {false, true}) {
    TrainConfig config = run_config(run);
    Background background;
    config.background = broken ? &background : nullptr;
    LoadedModel model = fresh_model(testing::tiny_attention(2), 1);
    const auto data = testing::copy_task();
    Progress::silence(true);
    const std::string error = testing::message_of([&] {
      Trainer trainer(*model.model, model.weights, config, *data);
      trainer.run([&](const StepReport& report) {
        if (report.step == 0) {
          obstruct(run);
        }
        if (broken && report.step == 2) {
          model.model->visit([&](const std::string&, Parameter& p) {
            std::fill_n(p.tensor.ptr<float>(), p.numel(), NAN);
          });
        }
        return true;
      });
    });
    Progress::silence(false);
    EXPECT_THAT(error, HasSubstr(broken ? "training stopped at step 3" : "cannot replace"));
    EXPECT_THAT(error, HasSubstr("cannot replace " + checkpoint_path(run, 3)));
    for (const auto& entry : std::filesystem::directory_iterator(run + "/checkpoints")) {
      EXPECT_THAT(entry.path().string(), HasSubstr("/step-000003"));  // what was in the way
    }
    std::filesystem::remove_all(run + "/checkpoints");
  }
  EXPECT_EQ(run_to_end(run_config(run)), whole);
}

// A run that ends at once after a checkpoint was begun: it is there or it is not.
TEST(Resume, DISABLED_ChildThatEndsBesideAWrite) {
  const std::string folder = test_child_folder();
  ASSERT_FALSE(folder.empty());
  LoadedModel model = fresh_model(testing::tiny_attention(2), 1);
  const auto data = testing::copy_task();
  Trainer trainer(*model.model, model.weights, run_config(folder), *data);
  for (int64_t step = 0; step < 6; ++step) {
    trainer.step();
    if (step % 3 == 2) {
      trainer.save_checkpoint();
    }
  }
  std::raise(SIGKILL);
}

TEST(Resume, ARunKilledBesideAWriteGoesOnFromTheLastDurableCheckpoint) {
  const TestFolder folder;
  const std::vector<float> whole = run_to_end(run_config(folder.at("whole")));
  const std::string killed = folder.at("killed");
  EXPECT_FALSE(run_test_child("Resume.DISABLED_ChildThatEndsBesideAWrite", killed, -1));
  const auto found = list_checkpoints(killed);
  ASSERT_FALSE(found.empty());
  for (const auto& checkpoint : found) {
    EXPECT_GT(verify_checksums(checkpoint.string()), 0U) << checkpoint;
  }
  EXPECT_EQ(found.back(), checkpoint_path(killed, 3));  // the second one waited for it
  EXPECT_EQ(run_to_end(run_config(killed)), whole);
  EXPECT_EQ(testing::curve(killed), testing::curve(folder.at("whole")));
  for (const auto& entry : std::filesystem::directory_iterator(killed + "/checkpoints")) {
    EXPECT_TRUE(is_checkpoint_name(entry.path().filename().string())) << entry.path();
  }
}

/// Cuts the newest checkpoint's tensors short.
void damage(const std::filesystem::path& checkpoint) {
  std::filesystem::resize_file(checkpoint / "state.safetensors", 1000);
}

// The rows are known by what they say, not by the name of their file.
TEST(Resume, RowsOfAFileGoOnBitForBitAndOtherRowsAreRefused) {
  const TestFolder folder;
  const auto write_rows = [&](const std::string& name, const std::string& last) {
    std::string lines;
    for (int i = 0; i < 12; ++i) {
      lines += R"({"prompt": "a)" + std::to_string(i) + R"(", "completion": "b)" +
               std::to_string(7 * i) + "\"}\n";
    }
    write_file_atomically(folder.at(name), lines + "{\"text\": \"" + last + "\"}\n");
  };
  write_rows("rows.jsonl", "c");
  write_rows("moved.jsonl", "c");
  write_rows("other.jsonl", "d");
  ModelSpec spec = testing::tiny_attention(2);
  spec.vocab = testing::byte_tokenizer().vocab_size();
  const auto run = [&](const char* run_folder, const char* file, int64_t stop_after) {
    LoadedModel model = fresh_model(spec, 1);
    const auto data = load_jsonl(folder.at(file), testing::byte_tokenizer());
    Trainer trainer(*model.model, model.weights, run_config(folder.at(run_folder)), *data);
    trainer.run([&](const StepReport& report) { return report.step + 1 < stop_after; });
    return testing::all_weights(*model.model);
  };
  Progress::silence(true);
  const std::vector<float> whole = run("whole", "rows.jsonl", kSteps);
  run("halted", "rows.jsonl", 17);  // in the middle of a pass over the rows
  EXPECT_THAT(testing::message_of([&] { run("halted", "other.jsonl", kSteps); }),
              HasSubstr("data: was jsonl"));
  EXPECT_EQ(run("halted", "moved.jsonl", kSteps), whole);
  EXPECT_EQ(testing::curve(folder.at("halted")), testing::curve(folder.at("whole")));
  Progress::silence(false);
}

TEST(Resume, SaysWhichCheckpointItTakesAndRefusesWhenNoneIsWhole) {
  const TestFolder folder;
  run_to_end(run_config(folder.path()));
  const auto all = list_checkpoints(folder.path());
  ASSERT_EQ(all.size(), 2U);
  damage(all[0]);
  ::testing::internal::CaptureStderr();
  run_to_end(run_config(folder.path()));
  const std::string said = ::testing::internal::GetCapturedStderr();
  EXPECT_THAT(said, HasSubstr("a damaged checkpoint is passed over: "));
  EXPECT_THAT(said, HasSubstr("goes on from " + all[1].string()));
  const uintmax_t log_bytes = std::filesystem::file_size(folder.at("log.jsonl"));
  for (const auto& checkpoint : list_checkpoints(folder.path())) {
    damage(checkpoint);
  }
  const std::string error = error_of(run_config(folder.path()));
  EXPECT_THAT(error, HasSubstr("none of its 2 checkpoints is whole"));
  EXPECT_THAT(error, HasSubstr("To start from the beginning, move"));
  EXPECT_EQ(std::filesystem::file_size(folder.at("log.jsonl")), log_bytes);
}

TEST(Resume, SaysThatItStartsAgainWithoutACheckpoint) {
  const TestFolder folder;
  run_to_end(run_config(folder.path()));
  std::filesystem::remove_all(folder.at("checkpoints"));
  ::testing::internal::CaptureStderr();
  run_to_end(run_config(folder.path()));
  EXPECT_THAT(::testing::internal::GetCapturedStderr(), HasSubstr("starts from its first step"));
}

// A run of a version that wrote no mark and no "version" into its fingerprint, that ordered the
// data by seed 1 whatever the plan's, and counted tokens as if every sequence were full.
TEST(Resume, GoesOnWithARunOfAnEarlierVersionAsItWasBegun) {
  const TestFolder folder;
  const auto limited = [](TrainConfig config, uint64_t seed) {
    config.seed = seed;
    config.sequence_length = 24;  // another order packs otherwise
    return config;
  };
  const auto run = [&](TrainConfig config, const DocumentSource& data, int64_t stop_after) {
    Progress::silence(true);
    LoadedModel model = fresh_model(testing::tiny_attention(2), 1);
    Trainer trainer(*model.model, model.weights, config, data);
    trainer.run([&](const StepReport& r) { return r.step + 1 < stop_after; });
    Progress::silence(false);
    EXPECT_EQ(trainer.summary().steps, std::min<int64_t>(kSteps, stop_after));
    return testing::all_weights(*model.model);
  };
  const auto copies = testing::copy_task();
  const auto data =
      generated_source([&](uint64_t index) { return copies->document(index); }, "a few", 50);
  const std::vector<float> whole = run(limited(run_config(folder.at("whole")), 1), *data, kSteps);
  const std::string old = folder.at("old");
  run(limited(run_config(old), 1), *data, 20);
  std::filesystem::remove(old + "/" + RunFolder::kMark);
  for (const auto& checkpoint : list_checkpoints(old)) {
    const std::string path = (checkpoint / "training.json").string();
    nlohmann::json json = nlohmann::json::parse(std::ifstream(path));
    json["fingerprint"].erase("version");
    std::ofstream(path) << json.dump(2);
    write_checksums(checkpoint.string());
  }
  TrainConfig now = limited(run_config(old), 7);
  now.tokens = kSteps * now.step_tokens();
  now.first_sample = 30;
  EXPECT_EQ(run(now, *data, kSteps), whole);
}

TEST(Resume, ASignalEndsARunThatThenGoesOn) {
  const TestFolder folder;
  const std::vector<float> whole = run_to_end(run_config(folder.at("whole")));
  TrainConfig config = run_config(folder.at("stopped"));
  config.checkpoint_every = 0;
  {
    const StopSignals signals;
    Progress::silence(true);
    LoadedModel model = fresh_model(testing::tiny_attention(2), 1);
    const auto data = testing::copy_task();
    Trainer trainer(*model.model, model.weights, config, *data);
    try {
      trainer.run([](const StepReport& report) {
        if (report.step == 16) {
          std::raise(SIGTERM);
        }
        return true;
      });
      ADD_FAILURE();
    } catch (const Interrupted& stopped) {
      EXPECT_EQ(stopped.signal(), SIGTERM);
      EXPECT_THAT(stopped.what(), HasSubstr("17 steps are done and kept in "));
      EXPECT_THAT(stopped.what(), HasSubstr("step-000017; go on with --resume"));
    }
    Progress::silence(false);
  }
  EXPECT_EQ(run_to_end(run_config(folder.at("stopped"))), whole);
  EXPECT_EQ(testing::curve(folder.at("stopped")), testing::curve(folder.at("whole")));
}

TEST(Resume, AFolderThatIsRemovedDuringTheRunIsAnError) {
  const TestFolder folder;
  TrainConfig config = run_config(folder.at("run"));
  config.checkpoint_every = 0;
  LoadedModel model = fresh_model(testing::tiny_attention(2), 1);
  const auto data = testing::copy_task();
  Trainer trainer(*model.model, model.weights, config, *data);
  Progress::silence(true);
  int64_t last = 0;
  EXPECT_THROW(trainer.run([&](const StepReport& report) {
    last = report.step;
    if (report.step == 3) {
      std::filesystem::remove_all(folder.at("run"));
    }
    return true;
  }),
               Error);
  EXPECT_EQ(last, 3);
  Progress::silence(false);
  EXPECT_FALSE(std::filesystem::exists(folder.at("run")));
}

// What else a user put beside our checkpoints is his.
TEST(Resume, RemovesOnlyWhatItWrote) {
  const TestFolder folder;
  TrainConfig config = run_config(folder.path());
  config.checkpoint_every = 10;
  LoadedModel model = fresh_model(testing::tiny_attention(2), 1);
  const auto data = testing::copy_task();
  Trainer trainer(*model.model, model.weights, config, *data);
  Progress::silence(true);
  trainer.run([&](const StepReport& report) {
    if (report.step == 20) {  // the checkpoint of step 10 is there: the one of 20 waited for it
      write_file_atomically(folder.at("checkpoints/step-000010/notes.txt"), "mine");
      make_folder(folder.at("checkpoints/step-000010-copy"));
    }
    return true;
  });
  Progress::silence(false);
  EXPECT_TRUE(std::filesystem::exists(folder.at("checkpoints/step-000010/notes.txt")));
  EXPECT_FALSE(std::filesystem::exists(folder.at("checkpoints/step-000010/state.safetensors")));
  EXPECT_TRUE(std::filesystem::exists(folder.at("checkpoints/step-000010-copy")));
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

// Whatever stands in a checkpoint's state is read as it is meant or named.
TEST(Resume, AStateOfOddValuesIsNamed) {
  const TestFolder folder;
  TrainConfig config = run_config(folder.at("run"));
  config.steps = 2;
  run_to_end(config);
  const std::string newest = *newest_checkpoint(folder.at("run"));
  const std::string path = newest + "/training.json";
  const auto good = nlohmann::json::parse(read_text_file(path));
  EXPECT_EQ(read_checkpoint_state(newest).summary.steps, 2);
  const struct {
    const char* key;
    nlohmann::json value;
  } rows[] = {
      {"step", 1.5},        {"step", 1e300},
      {"step", -1},         {"step", UINT64_MAX},
      {"step", nullptr},    {"documents", "x"},
      {"next_sample", -1},  {"log_bytes", 1e30},
      {"last_loss", "x"},   {"recent", 3},
      {"recent", {"x"}},    {"above", nlohmann::json::object()},
      {"fingerprint", {1}}, {"fingerprint", {{"seed", 1}}},
  };
  for (const auto& row : rows) {
    nlohmann::json bad = good;
    bad[row.key] = row.value;
    write_file_atomically(path, bad.dump());
    EXPECT_THAT(
        [&] { read_checkpoint_state(newest); },
        ::testing::ThrowsMessage<Error>(::testing::AllOf(HasSubstr(path), HasSubstr(row.key))))
        << row.value;
    bad.erase(row.key);
    write_file_atomically(path, bad.dump());
    EXPECT_THAT([&] { read_checkpoint_state(newest); },
                ::testing::ThrowsMessage<Error>(HasSubstr(row.key)));
  }
  for (const std::string& text : {std::string(300000, '['), std::string("[]"), std::string("{"),
                                  std::string("\xff\xfe"), std::string()}) {
    write_file_atomically(path, text);
    EXPECT_THAT([&] { read_checkpoint_state(newest); },
                ::testing::ThrowsMessage<Error>(HasSubstr(path)));
  }
  // A log whose first line is deep is a stranger's, not the end of the program.
  const std::string stranger = folder.at("stranger");
  std::filesystem::create_directory(stranger);
  write_file_atomically(stranger + "/log.jsonl", std::string(300000, '[') + "\n");
  EXPECT_THAT([&] { RunFolder(stranger, training_folder_use(true)); },
              ::testing::ThrowsMessage<Error>(HasSubstr("is in the way")));
}

}  // namespace
}  // namespace cambium
