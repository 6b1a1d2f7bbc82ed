// What a run does with folders that are not its own, with bad weights and with threads that cannot
// start, and the exit status that says so.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <limits>

#include "base/file.h"
#include "base/test_folder.h"
#include "base/test_paths.h"
#include "program.h"

namespace cambium {
namespace {

namespace fs = std::filesystem;
using testing::HasSubstr;
using testing::Not;

std::string train(const std::string& output, const std::string& more = "") {
  return "train '" + std::string(kSourceDir) + "/plans/teacher.toml' -o " + output +
         " --set train.steps=2 --set train.sequence_length=640 --set model.layers=1"
         " --set tokenizer.samples=100 " +
         more;
}

std::string hybridize(const std::string& output, const std::string& more = "") {
  return "hybridize '" + std::string(kSourceDir) + "/plans/demo.toml' -t " + teacher() + " -o " +
         output + " " + more;
}

std::string distill(const std::string& output, const std::string& more = "") {
  return "distill " + teacher() + " -t " + teacher() + " -o " + output +
         " --steps 1 --sequence 640 " + more;
}

// A tokenizer that the plan asks for is made before the model and the data are looked at, and kept
// once they are.
TEST(Runs, APlanAtFaultLeavesNothing) {
  const TestFolder folder;
  const std::pair<const char*, const char*> rows[] = {
      {"--set data.train=nowhere.jsonl", "nowhere.jsonl"},
      {"--set model.kv_heads=7", "7"},
  };
  for (const auto& [more, problem] : rows) {
    const Outcome outcome = cambium(train(folder.at("run"), more));
    EXPECT_EQ(outcome.status, 1) << outcome.text;
    EXPECT_THAT(outcome.text, HasSubstr(problem));
    EXPECT_FALSE(fs::exists(folder.at("run"))) << more;
  }
  EXPECT_EQ(cambium(train(folder.at("run"))).status, 0);
  EXPECT_TRUE(fs::exists(folder.at("run") + "/tokenizer/tokenizer.json"));
  EXPECT_TRUE(fs::exists(folder.at("run") + "/model/tokenizer.json"));
}

// Steps that could not be kept are not made. An ended run keeps its weights, a checkpoint before
// the end the optimiser's state too.
TEST(Runs, ADiskWithoutRoomForTheCheckpointIsSaidBeforeTheSteps) {
  const TestFolder folder;
  const auto on_disk_of = [&](const std::string& size) {
    return "unshare -rm sh -c 'mount -t tmpfs -o size=" + size + " none " + folder.path() +
           " && exec \"$@\"' --";
  };
  if (std::system((on_disk_of("1m") + " true 2>/dev/null").c_str()) != 0) {
    GTEST_SKIP() << "this machine lets nobody mount a disk of a size";
  }
  const std::string args = train(folder.at("run"), "--set model.width=192 ");  // 1.1 MiB of weights
  const Outcome full = cambium(args, "/dev/null", on_disk_of("1m"));
  EXPECT_EQ(full.status, 1);
  EXPECT_THAT(full.text, HasSubstr("are needed for the checkpoints of this run"));
  EXPECT_THAT(full.text, Not(HasSubstr("/2 steps")));
  const Outcome between =
      cambium(args + "--set train.checkpoint_every=1", "/dev/null", on_disk_of("3m"));
  EXPECT_EQ(between.status, 1);
  EXPECT_THAT(between.text, HasSubstr("are needed for the checkpoints of this run"));
  EXPECT_EQ(cambium(args, "/dev/null", on_disk_of("8m")).status, 0);
}

TEST(Runs, WhatSomebodyElseWroteStays) {
  const TestFolder folder;
  const struct {
    std::string command;
    const char* name;  // what is in the way
  } rows[] = {
      {train(folder.at("run")), "model"},
      {train(folder.at("run")), "log.jsonl"},
      {train(folder.at("run")), "tokenizer"},
      {train(folder.at("run"), "--resume"), "model"},
      {train(folder.at("run")), "checkpoints"},
      {distill(folder.at("run")), "model"},
      {distill(folder.at("run")), "log.jsonl"},
      {hybridize(folder.at("run")), "stages"},
      {hybridize(folder.at("run")), "plan.toml"},
      {hybridize(folder.at("run")), "report.html"},
      {hybridize(folder.at("run"), "--resume"), "stages"},
      {hybridize(folder.at("run"), "--dry-run"), "stages"},
  };
  for (const auto& row : rows) {
    fs::remove_all(folder.at("run"));
    const fs::path there = fs::path(folder.at("run")) / row.name;
    const bool file = there.has_extension();
    fs::create_directories(file ? there.parent_path() : there);
    const std::string precious = file ? there.string() : (there / "precious.txt").string();
    write_file_atomically(precious, "precious");
    const Outcome outcome = cambium(row.command);
    EXPECT_EQ(outcome.status, 1) << row.command << "\n" << outcome.text;
    EXPECT_THAT(outcome.text, HasSubstr(folder.at("run"))) << row.command;
    EXPECT_EQ(read_text_file(precious), "precious") << row.command;
  }
  // A file where the folder would be.
  for (const std::string& command :
       {train(folder.at("file")), distill(folder.at("file")), hybridize(folder.at("file")),
        "convert " + teacher() + " --layers 1 -o " + folder.at("file"),
        "merge " + teacher() + " " + teacher() + " -o " + folder.at("file")}) {
    write_file_atomically(folder.at("file"), "precious");
    const Outcome outcome = cambium(command);
    EXPECT_EQ(outcome.status, 1) << command << "\n" << outcome.text;
    EXPECT_THAT(outcome.text, HasSubstr(folder.at("file"))) << command;
    EXPECT_EQ(read_text_file(folder.at("file")), "precious") << command;
  }
}

TEST(Runs, OneAtATimeInAFolder) {
  const TestFolder folder;
  const std::string first = train(folder.at("run"));
  ASSERT_EQ(cambium(first).status, 0);
  const std::string held = "flock '" + folder.at("run") + "/.cambium-run'";
  for (const std::string& command : {first + " --resume", distill(folder.at("run"), "--resume")}) {
    const Outcome second = cambium(command, "/dev/null", held);
    EXPECT_EQ(second.status, 1) << second.text;
    EXPECT_THAT(second.text, HasSubstr("is in use by another run")) << command;
  }
  // And begun anew only elsewhere.
  const Outcome again = cambium(first);
  EXPECT_EQ(again.status, 1);
  EXPECT_THAT(again.text, HasSubstr("--resume"));
  EXPECT_EQ(cambium(first + " --resume").status, 0);
}

TEST(Runs, AFailureHasAStatusAndALine) {
  const TestFolder folder;
  const Outcome diverged =
      cambium(train(folder.at("run"),
                    "--set train.schedule.rate=1000 --set train.steps=40 --set "
                    "train.schedule.warmup_steps=0 --set train.optimizer.kind=adamw"));
  EXPECT_EQ(diverged.status, 1) << diverged.text;
  EXPECT_THAT(diverged.text, HasSubstr("training stopped at step"));
  EXPECT_FALSE(fs::exists(folder.at("run/model")));
}

/// The teacher with every weight of its matrices NaN, as a stranger's folder.
std::string model_of_nan(const std::string& dir) {
  fs::copy(teacher(), dir);
  fs::remove(dir + "/checksums.json");
  fs::remove(dir + "/golden.safetensors");
  fs::remove(dir + "/provenance.json");
  std::string file = read_text_file(dir + "/model.safetensors");
  uint64_t header = 0;
  std::memcpy(&header, file.data(), sizeof header);
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (size_t at = sizeof header + header; at + sizeof nan <= file.size(); at += sizeof nan) {
    std::memcpy(file.data() + at, &nan, sizeof nan);
  }
  write_file_atomically(dir + "/model.safetensors", file);
  return dir;
}

// In batches, where sampling runs in parallel pieces: an error of one of them is the command's.
TEST(Runs, NumbersThatAreNoneAreAnErrorWhateverTheThreads) {
  const TestFolder folder;
  const std::string model = model_of_nan(folder.at("m"));
  std::string prompts;
  for (int i = 0; i < 64; ++i) {
    prompts += "{\"prompt\": \"Tom has 3\"}\n";
  }
  write_file_atomically(folder.at("in.jsonl"), prompts);
  write_file_atomically(folder.at("text.jsonl"), "{\"text\": \"Tom has 3 shells.\"}\n");
  for (const char* threads : {"1", "4"}) {
    for (const std::string& command :
         {"generate " + model + " -i " + folder.at("in.jsonl") + " -n 4 --temperature 0.5",
          "generate " + model + " -i " + folder.at("in.jsonl") + " -n 4",
          "generate " + model + " -p Tom -n 4", "eval " + model + " -n 40 --max-new-tokens 4",
          "eval " + model + " -n 40 --temperature 1",
          "eval " + model + " --task text --data " + folder.at("text.jsonl"),
          "score " + model + " --documents 1 -o " + folder.at("scores.json"),
          "convert " + model + " --layers 1 -o " + folder.at("h"),
          "merge " + model + " " + model + " -o " + folder.at("h"), "verify " + model}) {
      const Outcome outcome = cambium(command + " --threads " + threads);
      EXPECT_EQ(outcome.status, 1) << command << "\n" << outcome.text;
      EXPECT_FALSE(fs::exists(folder.at("h"))) << command;
      EXPECT_THAT(outcome.text, ::testing::ContainsRegex("nan|NaN")) << command;
    }
  }
}

TEST(Runs, WriteTheirMatricesInTheTypeThatIsAsked) {
  const TestFolder folder;
  const auto bytes = [&](const std::string& run) {
    return static_cast<double>(fs::file_size(folder.at(run + "/model/model.safetensors")));
  };
  for (const auto& command : {train, distill}) {
    for (const std::string type : {"f32", "bf16"}) {
      fs::remove_all(folder.at(type));
      const Outcome outcome = cambium(command(folder.at(type), "--storage " + type));
      ASSERT_EQ(outcome.status, 0) << outcome.text;
    }
    EXPECT_NEAR(bytes("bf16") / bytes("f32"), 0.5, 0.05);
    const Outcome read = cambium("verify " + folder.at("bf16/model"));
    EXPECT_EQ(read.status, 0) << read.text;
  }
}

#ifndef CAMBIUM_SANITIZED
TEST(Runs, ThreadsThatCannotStartAreAnErrorNotAHang) {
  for (const char* limit :
       {"ulimit -v 400000; CAMBIUM_THREADS=64", "ulimit -v 400000; CAMBIUM_THREADS=512",
        "ulimit -v 2000000; CAMBIUM_THREADS=1024"}) {
    const Outcome outcome = cambium("generate " + teacher() + " -p Tom -n 2", "/dev/null",
                                    std::string(limit) + " timeout 60");
    EXPECT_EQ(outcome.status, 1) << limit << outcome.text;
    EXPECT_THAT(outcome.text, HasSubstr("could start only")) << limit;
  }
}
#endif

}  // namespace
}  // namespace cambium
