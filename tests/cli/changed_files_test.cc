// Files of a checkpoint that were changed: who reads them says so.
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

// Every file of a checkpoint, one character changed or gone: named wherever the folder is loaded,
// until it is accepted.
TEST(ChangedFiles, AreNamedWhereverAFolderIsLoaded) {
  const std::string model = std::string(kSourceDir) + "/models/teacher";
  const struct {
    const char* file;
    const char* from;
    const char* to;  // null: the file goes
  } rows[] = {
      {"config.json", "1e-06", "1e-05"},          {"tokenizer.json", "<|end|>", "<|enx|>"},
      {"tokenizer_config.json", "user", "usr"},   {"provenance.json", "7000", "8000"},
      {"golden.safetensors", "logits", "logits"}, {"golden.safetensors", "", nullptr},
      {"model.safetensors", "", nullptr},         {"tokenizer_config.json", "", nullptr},
  };
  for (const auto& row : rows) {
    const TestFolder folder;
    const std::string dir = folder.at("m");
    std::filesystem::copy(model, dir);
    const std::string path = dir + "/" + row.file;
    if (row.to == nullptr) {
      std::filesystem::remove(path);
    } else {
      std::string bytes = read_text_file(path);
      const size_t at = bytes.find(row.from);
      if (std::string(row.from) == row.to) {
        bytes.back() = static_cast<char>(bytes.back() ^ 1);
      } else if (at == std::string::npos) {
        bytes += " ";
      } else {
        bytes.replace(at, std::string(row.from).size(), row.to);
      }
      write_file_atomically(path, bytes);
    }
    for (const std::string& command : {"generate " + dir + " -p Tom -n 1", "verify " + dir}) {
      const Outcome outcome = cambium(command);
      EXPECT_EQ(outcome.status, 1) << command << "\n" << outcome.text;
      EXPECT_THAT(outcome.text, HasSubstr(row.file)) << command;
      EXPECT_THAT(outcome.text, HasSubstr("verify " + dir + " --accept")) << command;
    }
  }
}

// Commands that read one file of a checkpoint compare that one.
TEST(ChangedFiles, AreNamedByWhoReadsOneAlone) {
  const TestFolder folder;
  const std::string dir = folder.at("m");
  std::filesystem::copy(teacher(), dir);
  std::filesystem::remove(dir + "/model.safetensors");
  EXPECT_EQ(cambium("inspect " + dir).status, 0);  // not read, not missed
  const std::string reference = " --reference " + folder.at("reference.json");
  write_file_atomically(folder.at("reference.json"), R"({"texts": ["a"], "ids": [[1]]})");
  std::string config = read_text_file(dir + "/config.json");
  const size_t at = config.find("32768");
  ASSERT_NE(at, std::string::npos);
  write_file_atomically(dir + "/config.json", config.replace(at, 5, "32769"));
  for (const std::string& command :
       {"inspect " + dir, "place " + dir + " --method uniform --count 2",
        "bench --random-weights " + dir, "convert " + dir + " -o " + folder.at("h") + " --layers 1",
        "hybridize '" + std::string(kSourceDir) + "/plans/demo.toml' --dry-run -t " + dir}) {
    const Outcome outcome = cambium(command);
    EXPECT_EQ(outcome.status, 1) << command << outcome.text;
    EXPECT_THAT(outcome.text, HasSubstr("config.json has checksum")) << command;
  }
  const std::string verify = "verify --tokenizer " + dir + reference;
  EXPECT_THAT(cambium(verify).text, ::testing::Not(HasSubstr("checksum")));
  const std::string train = "train '" + std::string(kSourceDir) + "/plans/teacher.toml' -o " +
                            folder.at("run") + " --set tokenizer.path='\"" + dir + "\"'";
  write_file_atomically(dir + "/tokenizer_config.json", "{}");
  for (const std::string& command : {verify, train}) {
    const Outcome outcome = cambium(command);
    EXPECT_EQ(outcome.status, 1) << command << outcome.text;
    EXPECT_THAT(outcome.text, HasSubstr("tokenizer_config.json has")) << command;
  }
}

TEST(ChangedFiles, AreAcceptedByVerify) {
  const TestFolder folder;
  const std::string dir = folder.at("run/stage/m");
  std::filesystem::create_directories(folder.at("run/stage"));
  std::filesystem::copy(std::string(kSourceDir) + "/models/teacher", dir);
  for (const std::string& good : {dir, folder.at("run")}) {
    const Outcome outcome = cambium("verify " + good);
    EXPECT_EQ(outcome.status, 0) << outcome.text;
    EXPECT_THAT(outcome.text, HasSubstr("files are as written"));
    EXPECT_THAT(outcome.text, HasSubstr("golden prompt"));
  }
  write_file_atomically(dir + "/provenance.json", "{\"by\": \"hand\"}\n");
  EXPECT_EQ(cambium("verify " + folder.at("run")).status, 1);
  EXPECT_EQ(cambium("verify " + dir + " --accept").status, 0);
  EXPECT_EQ(cambium("verify " + folder.at("run")).status, 0);
  // What lost its checksums says so, and loads.
  std::filesystem::remove(dir + "/checksums.json");
  const Outcome note = cambium("generate " + dir + " -p Tom -n 1");
  EXPECT_EQ(note.status, 0) << note.text;
  EXPECT_THAT(note.text, HasSubstr("note: " + dir + " has no checksums.json"));
  // A folder of another program never had any.
  const Outcome foreign = cambium("verify " + fixture("llama"));
  EXPECT_EQ(foreign.status, 0);
  EXPECT_THAT(foreign.text, ::testing::Not(HasSubstr("checksums.json")));
  std::filesystem::create_directories(folder.at("empty"));
  EXPECT_THAT(cambium("verify " + folder.at("empty")).text,
              HasSubstr("nothing that can be checked"));
}

}  // namespace
}  // namespace cambium
