// Files that this program wrote and somebody changed: whatever stands in them, a command ends with
// an error that names the file.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <vector>

#include "base/file.h"
#include "base/test_folder.h"
#include "program.h"

namespace cambium {
namespace {

using testing::AllOf;
using testing::HasSubstr;

/// What no file of ours is.
std::vector<std::string> odd_texts() {
  std::string deep;
  for (int i = 0; i < 100000; ++i) {
    deep += "{\"a\":";
  }
  return {"",
          "[",
          "[]",
          "null",
          "\"text\"",
          "{}",
          std::string(300000, '['),
          deep,
          "\xff\xfe{",
          std::string("{\0}", 3),
          "{\"models\": [NaN]}",
          "[1e999]",
          "{\"name\": \"" + std::string(1 << 20, 'x') + "\", \"a\": {}}"};
}

/// The command with the file at `path` as each of `texts`: an error that names the file, short,
/// never a crash and never success.
void expect_named(const std::string& command, const std::string& path,
                  const std::vector<std::string>& texts) {
  for (const std::string& text : texts) {
    write_file_atomically(path, text);
    const Outcome outcome = cambium(command);
    EXPECT_EQ(outcome.status, 1) << command << "\n" << outcome.text << text.substr(0, 200);
    const std::filesystem::path file(path);  // named as a whole, or as "FOLDER: NAME ..."
    EXPECT_THAT(outcome.text,
                AllOf(HasSubstr("cambium: error: "), HasSubstr(file.parent_path().string()),
                      HasSubstr(file.filename().string())))
        << text.substr(0, 200);
    EXPECT_LT(outcome.text.size(), 2000U);
  }
}

TEST(OddFiles, OfARunAreNamed) {
  const TestFolder folder;
  expect_named("report " + folder.path(), folder.at("summary.json"), odd_texts());
  expect_named("place " + teacher() + " --count 2 --scores " + folder.at("scores.json"),
               folder.at("scores.json"), odd_texts());
  expect_named("score " + teacher() + " -o " + folder.at("scores.json"), folder.at("scores.json"),
               odd_texts());
  expect_named("verify " + teacher() + " --reference " + folder.at("reference.json"),
               folder.at("reference.json"), odd_texts());
}

TEST(OddFiles, ScoresOfLayersThatAreNotThereOrTwice) {
  const TestFolder folder;
  const auto scores = [](const std::string& layers) {
    return R"({"method": "mmr", "metric": "nll", "fingerprint": {}, "layers": [)" + layers + "]}";
  };
  const auto entry = [](const std::string& layer) {
    return "{\"layer\": " + layer + R"(, "score": 0.5, "seconds": 1})";
  };
  const std::string place =
      "place " + teacher() + " --count 2 --scores " + folder.at("scores.json");
  write_file_atomically(folder.at("scores.json"), scores(entry("1") + "," + entry("0")));
  EXPECT_EQ(cambium(place).text, "0,1\n");
  expect_named(
      place, folder.at("scores.json"),
      {scores(entry("1") + "," + entry("1")), scores(entry("1") + "," + entry("400")),
       scores(entry("1") + "," + entry("-1")), scores(entry("1.5")), scores(entry("1e300")),
       scores(entry("18446744073709551615")), scores(entry("\"1\"")), scores(entry("null"))});
}

TEST(OddFiles, OfACheckpointAreNamed) {
  const TestFolder folder;
  for (const char* name : {"config.json", "tokenizer.json", "tokenizer_config.json",
                           "generation_config.json", "checksums.json"}) {
    const std::string dir = folder.at(name);
    std::filesystem::copy(teacher(), dir);
    std::filesystem::remove(dir + "/checksums.json");
    expect_named("generate " + dir + " -p Tom -n 1", dir + "/" + name,
                 {"", "[", "[]", std::string(300000, '['), "\xff\xfe{"});
  }
}

}  // namespace
}  // namespace cambium
