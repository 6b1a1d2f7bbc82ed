// Whose a folder is: ours, another run's, or a stranger's.
#include "base/run_folder.h"

#include <gmock/gmock.h>

#include <filesystem>

#include "base/error.h"
#include "base/file.h"
#include "base/test_folder.h"
#include "base/testing.h"

namespace cambium {
namespace {

namespace fs = std::filesystem;
using ::testing::AllOf;
using ::testing::HasSubstr;

RunFolderUse use(bool resume, const std::string& kind = "train") {
  return {kind, resume, {"log.jsonl", "model"}, [](const fs::path& folder) {
            return fs::exists(folder / "log.jsonl");
          }};
}

std::string error_of(const std::string& path, const RunFolderUse& how) {
  return testing::message_of([&] { const RunFolder folder(path, how); });
}

TEST(RunFolder, IsCreatedMarkedAndTakenAgainOnlyToResume) {
  const TestFolder test;
  const std::string path = test.at("a/b/run");
  {
    const RunFolder folder(path, use(false));
    EXPECT_TRUE(fs::exists(fs::path(path) / RunFolder::kMark));
  }
  // Nothing has been written yet, as by a run that was killed: it may begin anew.
  make_folder(path);
  write_file_atomically(path + "/" + RunFolder::kMark, R"({"run": "train"})");
  EXPECT_EQ(error_of(path, use(false)), "no error");
  EXPECT_TRUE(fs::exists(fs::path(path) / RunFolder::kMark));
  write_file_atomically(path + "/log.jsonl", "{}\n");
  EXPECT_THAT(error_of(path, use(false)), HasSubstr("holds a run already; go on with --resume"));
  EXPECT_EQ(error_of(path, use(true)), "no error");
  EXPECT_THAT(error_of(path, use(true, "hybridize")),
              HasSubstr("holds a run of `\"train\"`, not of `hybridize`"));
}

TEST(RunFolder, NothingIsLeftOfARunThatWroteNothing) {
  const TestFolder test;
  EXPECT_EQ(error_of(test.at("run"), use(false)), "no error");
  EXPECT_FALSE(fs::exists(test.at("run")));
  // A folder that was there stays, and so does a mark that another run made.
  make_folder(test.at("mine"));
  EXPECT_EQ(error_of(test.at("mine"), use(false)), "no error");
  EXPECT_TRUE(fs::is_empty(test.at("mine")));
  write_file_atomically(test.at(RunFolder::kMark), "{\"run\": \"train\"}");
  EXPECT_EQ(error_of(test.path(), use(true)), "no error");
  EXPECT_TRUE(fs::exists(test.at(RunFolder::kMark)));
  // What replaced the folder while the run went on is not the run's to remove.
  {
    const RunFolder folder(test.at("moved"), use(false));
    fs::remove_all(test.at("moved"));
    make_folder(test.at("moved"));
    write_file_atomically(test.at("moved") + "/" + RunFolder::kMark, "{}");
  }
  EXPECT_TRUE(fs::exists(test.at("moved")));
}

TEST(RunFolder, OfAStrangerIsNotTouched) {
  for (const bool resume : {false, true}) {
    const TestFolder test;
    make_folder(test.at("model"));
    write_file_atomically(test.at("model/precious.txt"), "years of work\n");
    EXPECT_THAT(error_of(test.path(), use(resume)), HasSubstr("model is in the way"));
    EXPECT_TRUE(fs::exists(test.at("model/precious.txt")));
    EXPECT_FALSE(fs::exists(test.at(RunFolder::kMark)));
  }
  const TestFolder test;
  fs::create_symlink("nowhere", test.at("model"));
  EXPECT_THAT(error_of(test.path(), use(false)), HasSubstr("model is in the way"));
  write_file_atomically(test.at("file"), "");
  EXPECT_THAT(error_of(test.at("file"), use(false)), HasSubstr("cannot create the folder"));
}

TEST(RunFolder, FilesThatAreNotInTheWayMayStay) {
  const TestFolder test;
  write_file_atomically(test.at("notes.txt"), "mine\n");
  EXPECT_EQ(error_of(test.path(), use(false)), "no error");
}

TEST(RunFolder, WithoutAMarkIsTakenOverWhenItLooksLikeOurs) {
  const TestFolder test;
  write_file_atomically(test.at("log.jsonl"), "{}\n");
  EXPECT_THAT(error_of(test.path(), use(false)), HasSubstr("holds a run already"));
  EXPECT_EQ(error_of(test.path(), use(true)), "no error");
  EXPECT_TRUE(fs::exists(test.at(RunFolder::kMark)));
}

TEST(RunFolder, IsOneRunsAtATime) {
  const TestFolder test;
  {
    const RunFolder first(test.path(), use(false));
    for (const bool resume : {false, true}) {
      EXPECT_THAT(error_of(test.path(), use(resume)),
                  HasSubstr("is in use by another run (process "));
    }
    first.expect_present();
  }
  EXPECT_EQ(error_of(test.path(), use(true)), "no error");
}

TEST(RunFolder, TellsWhenItWasRemovedOrReplaced) {
  const TestFolder test;
  const std::string path = test.at("run");
  for (const bool made_again : {false, true}) {
    const RunFolder folder(path, use(true));
    fs::remove_all(path);
    if (made_again) {
      make_folder(path);
      write_file_atomically(path + "/" + RunFolder::kMark, "{}");
    }
    EXPECT_THROW(folder.expect_present(), Error);
  }
}

TEST(RunFolder, SaysWhatIsFreeAndWhatIsTaken) {
  const TestFolder folder;
  const RunFolder claimed(folder.at("run"), use(false));
  EXPECT_NO_THROW(claimed.expect_room(1, "a byte"));
  EXPECT_THAT(testing::message_of([&] { claimed.expect_room(uint64_t{1} << 62, "a checkpoint"); }),
              AllOf(HasSubstr(folder.at("run")), HasSubstr("4.0 EiB are needed for a checkpoint"),
                    HasSubstr("are free there")));
}

TEST(RunFolder, AHalfWrittenMarkIsNoObstacle) {
  const TestFolder test;
  write_file_atomically(test.at(RunFolder::kMark), "{\"program\": \"cam");
  EXPECT_EQ(error_of(test.path(), use(true)), "no error");
}

}  // namespace
}  // namespace cambium
