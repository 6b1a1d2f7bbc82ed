#include "base/file.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <filesystem>
#include <fstream>

#include "base/error.h"
#include "base/map_faults.h"
#include "base/test_folder.h"

namespace cambium {
namespace {

namespace fs = std::filesystem;
using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::ThrowsMessage;
using ::testing::UnorderedElementsAre;

std::vector<std::string> names_in(const std::string& folder) {
  std::vector<std::string> names;
  for (const auto& entry : fs::directory_iterator(folder)) {
    names.push_back(entry.path().filename().string());
  }
  return names;
}

void put(const std::string& path, std::string_view text) {
  std::ofstream(path, std::ios::binary) << text;
}

TEST(MappedFile, GivesTheBytes) {
  const TestFolder folder;
  put(folder.at("a"), "hello");
  MappedFile file(folder.at("a"));
  EXPECT_EQ(file.bytes().size(), 5U);
  EXPECT_EQ(static_cast<char>(file.bytes()[4]), 'o');
  const MappedFile moved = std::move(file);
  moved.release(0, 5);
  EXPECT_EQ(static_cast<char>(moved.bytes()[0]), 'h');
}

TEST(MappedFile, EmptyFileIsEmpty) {
  const TestFolder folder;
  put(folder.at("a"), "");
  EXPECT_TRUE(MappedFile(folder.at("a")).bytes().empty());
}

TEST(MappedFile, NamesWhatIsWrong) {
  const TestFolder folder;
  EXPECT_THAT([&] { MappedFile(folder.at("absent")); },
              ThrowsMessage<Error>(AllOf(HasSubstr("absent"), HasSubstr("No such file"))));
  EXPECT_THAT([&] { MappedFile(folder.path()); }, ThrowsMessage<Error>(HasSubstr("is a folder")));
  EXPECT_THAT([&] { read_text_file("/dev/null"); },
              ThrowsMessage<Error>(HasSubstr("not a regular file")));
}

TEST(FileReader, ReadsAtAnyPlaceAndNamesAFileThatIsTooShort) {
  const TestFolder folder;
  put(folder.at("a"), "0123456789");
  FileReader opened(folder.at("a"));
  const FileReader file = std::move(opened);
  EXPECT_EQ(file.size(), 10U);
  std::string text(4, ' ');
  file.read(3, std::as_writable_bytes(std::span(text)));
  EXPECT_EQ(text, "3456");
  file.read(0, std::as_writable_bytes(std::span(text)));
  EXPECT_EQ(text, "0123");
  EXPECT_THAT([&] { file.read(7, std::as_writable_bytes(std::span(text))); },
              ThrowsMessage<Error>(AllOf(HasSubstr(folder.at("a")), HasSubstr("after 10 of 10"))));
  EXPECT_THAT([&] { FileReader(folder.path()); }, ThrowsMessage<Error>(HasSubstr("is a folder")));
}

TEST(ReadTextFile, ReadsAndRefusesTooMuch) {
  const TestFolder folder;
  put(folder.at("a"), std::string("x\0y", 3));
  EXPECT_EQ(read_text_file(folder.at("a")), std::string("x\0y", 3));
  EXPECT_THAT([&] { read_text_file(folder.at("a"), 2); },
              ThrowsMessage<Error>(HasSubstr("3 bytes, expected at most 2")));
}

TEST(MappedFileDeathTest, AFileThatBecomesShorterIsNamed) {
  const TestFolder folder;
  const std::string path = folder.at("weights");
  write_file_atomically(path, std::string(100000, 'x'));
  EXPECT_EXIT(
      {
        explain_map_faults();
        MappedFile first(path);
        const MappedFile file(std::move(first));
        std::filesystem::resize_file(path, 10);
        volatile std::byte last = file.bytes().back();
        (void)last;
      },
      ::testing::ExitedWithCode(1), "weights became shorter");
  EXPECT_EXIT(
      {
        explain_map_faults();
        std::raise(SIGBUS);
      },
      ::testing::KilledBySignal(SIGBUS), "");
}

TEST(AtomicFile, AppearsAtCommitWithItsChecksum) {
  const TestFolder folder;
  const std::string big(1 << 20, 'b');
  AtomicFile file(folder.at("a"));
  file.write("small");
  file.write(big);
  file.write("end");
  EXPECT_FALSE(fs::exists(folder.at("a")));
  file.commit();
  const std::string text = read_text_file(folder.at("a"));
  EXPECT_EQ(text, "small" + big + "end");
  EXPECT_EQ(file.size(), text.size());
  EXPECT_EQ(file.checksum(), checksum(std::as_bytes(std::span(text))));
  EXPECT_THAT(names_in(folder.path()), UnorderedElementsAre("a"));
}

TEST(AtomicFile, WithoutCommitTheOldFileStays) {
  const TestFolder folder;
  write_file_atomically(folder.at("a"), "old");
  { AtomicFile(folder.at("a")).write("new"); }
  EXPECT_EQ(read_text_file(folder.at("a")), "old");
  EXPECT_THAT(names_in(folder.path()), UnorderedElementsAre("a"));
}

// Renaming would put a file in their place.
TEST(AtomicFile, PipesStayAndLinksLeadOn) {
  const TestFolder folder;
  std::filesystem::create_directory(folder.at("d"));
  const std::string pipe = folder.at("pipe");
  ASSERT_EQ(::mkfifo(pipe.c_str(), 0666), 0);
  std::filesystem::create_symlink("pipe", folder.at("to-pipe"));
  std::filesystem::create_symlink("loop", folder.at("loop"));
  for (const std::string& name : {pipe, folder.at("to-pipe"), folder.at("loop"), folder.at("d")}) {
    EXPECT_THAT([&] { write_file_atomically(name, "text"); },
                ::testing::ThrowsMessage<Error>(::testing::HasSubstr("cannot write " + name)));
  }
  EXPECT_THROW(const LineLog log(pipe), Error);
  EXPECT_TRUE(std::filesystem::is_fifo(pipe));
  write_file_atomically(folder.at("d/file"), "old");
  std::filesystem::create_symlink("d/file", folder.at("link"));
  std::filesystem::create_symlink("d/new", folder.at("new-link"));
  write_file_atomically(folder.at("link"), "text");
  write_file_atomically(folder.at("new-link"), "text");
  EXPECT_TRUE(std::filesystem::is_symlink(folder.at("link")));
  EXPECT_TRUE(std::filesystem::is_symlink(folder.at("new-link")));
  EXPECT_EQ(read_text_file(folder.at("d/file")), "text");
  EXPECT_EQ(read_text_file(folder.at("d/new")), "text");
}

TEST(AtomicFile, MissingFolderIsNamed) {
  EXPECT_THAT([] { AtomicFile("/nonexistent/folder/file"); },
              ThrowsMessage<Error>(
                  AllOf(HasSubstr("/nonexistent/folder/file"), HasSubstr("No such file"))));
  EXPECT_THAT([] { AtomicFile("/tmp/"); }, ThrowsMessage<Error>(HasSubstr("name is missing")));
}

/// While it lives, no file grows past `bytes`: what a full disk looks like to a writer.
class FileSizeLimit {
 public:
  explicit FileSizeLimit(rlim_t bytes) {
    ::getrlimit(RLIMIT_FSIZE, &before_);
    const rlimit limit{bytes, before_.rlim_max};
    ::setrlimit(RLIMIT_FSIZE, &limit);
  }
  ~FileSizeLimit() { ::setrlimit(RLIMIT_FSIZE, &before_); }
  FileSizeLimit(const FileSizeLimit&) = delete;
  FileSizeLimit& operator=(const FileSizeLimit&) = delete;

 private:
  rlimit before_{};
};

TEST(AtomicFile, FullDiskLeavesNothing) {
  const TestFolder folder;
  const std::string big(1 << 20, 'b');
  for (const bool at_commit : {false, true}) {
    const FileSizeLimit limit(1000);
    const auto write = [&] {
      write_file_atomically(folder.at("a"), at_commit ? big.substr(0, 2000) : big);
    };
    EXPECT_THAT(
        write, ThrowsMessage<Error>(AllOf(HasSubstr(folder.at("a")), HasSubstr("File too large"))));
    EXPECT_THAT(names_in(folder.path()), IsEmpty());
  }
}

TEST(AtomicDirectory, AppearsWhole) {
  const TestFolder folder;
  AtomicDirectory out(folder.at("sub/model/"));
  put(out.path() + "/a", "1");
  make_folder(out.path() + "/inner");
  put(out.path() + "/inner/b", "2");
  EXPECT_FALSE(fs::exists(folder.at("sub/model")));
  out.commit();
  EXPECT_EQ(read_text_file(folder.at("sub/model/inner/b")), "2");
  EXPECT_THAT(names_in(folder.at("sub")), UnorderedElementsAre("model"));
}

TEST(AtomicDirectory, WithoutCommitNothingRemains) {
  const TestFolder folder;
  {
    const AtomicDirectory out(folder.at("model"));
    put(out.path() + "/a", "1");
  }
  EXPECT_THAT(names_in(folder.path()), IsEmpty());
}

/// What this process has open below `folder`.
size_t open_files_below(const std::string& folder) {
  size_t count = 0;
  std::error_code gone;  // the iterator's own
  for (const auto& entry : fs::directory_iterator("/proc/self/fd")) {
    count += fs::read_symlink(entry.path(), gone).string().starts_with(folder) ? 1 : 0;
  }
  return count;
}

// An error of writing is kept by the open file: what is closed before it is synced may lose it.
TEST(AtomicDirectory, FilesStayOpenUntilTheyAreSyncedWithTheFolder) {
  const TestFolder folder;
  for (const bool committed : {true, false}) {
    {
      AtomicDirectory out(folder.at("model"));
      const std::string inside = out.path() + "/";
      write_file_atomically(out.path() + "/a", "1");
      write_file_atomically(out.path() + "/a", "2");
      write_file_atomically(out.path() + "/b", "3");
      make_folder(out.path() + "/inner");
      write_file_atomically(out.path() + "/inner/c", "4");  // not directly in it: synced by itself
      EXPECT_EQ(open_files_below(inside), 3U);
      if (committed) {
        out.sync();
        EXPECT_EQ(open_files_below(inside), 0U);
        EXPECT_FALSE(fs::exists(folder.at("model")));
        EXPECT_EQ(read_text_file(out.path() + "/a"), "2");
        write_file_atomically(out.path() + "/d", "5");
        out.commit();
        EXPECT_EQ(read_text_file(folder.at("model/d")), "5");
        fs::remove_all(folder.at("model"));
      }
    }
    EXPECT_EQ(open_files_below(folder.path()), 0U) << committed;
  }
}

TEST(AtomicDirectory, RefusesOrReplaces) {
  const TestFolder folder;
  make_folder(folder.at("model"));
  put(folder.at("model/old"), "1");
  EXPECT_THAT([&] { AtomicDirectory(folder.at("model")); },
              ThrowsMessage<Error>(AllOf(HasSubstr("model"), HasSubstr("not empty"))));
  EXPECT_THAT([&] { AtomicDirectory(folder.at("model/old")); },
              ThrowsMessage<Error>(HasSubstr("is a file")));
  AtomicDirectory out(folder.at("model"), AtomicDirectory::Existing::kReplace);
  put(out.path() + "/new", "2");
  out.commit();
  EXPECT_THAT(names_in(folder.at("model")), UnorderedElementsAre("new"));
  EXPECT_THAT(names_in(folder.path()), UnorderedElementsAre("model"));
}

TEST(AtomicDirectory, FillsAnEmptyFolder) {
  const TestFolder folder;
  make_folder(folder.at("model"));
  AtomicDirectory out(folder.at("model"));
  put(out.path() + "/a", "1");
  out.commit();
  EXPECT_THAT(names_in(folder.at("model")), UnorderedElementsAre("a"));
}

TEST(Leftovers, OfKilledWritersGoThoseOfLivingStay) {
  const TestFolder folder;
  const pid_t child = ::fork();
  if (child == 0) {
    const AtomicDirectory out(folder.at("model"));
    put(out.path() + "/a", "1");
    AtomicFile file(folder.at("file"));
    file.write("x");
    ::kill(::getpid(), SIGKILL);
  }
  ::waitpid(child, nullptr, 0);
  EXPECT_EQ(names_in(folder.path()).size(), 2U);

  const AtomicFile living(folder.at("living"));
  put(folder.at("unrelated"), "1");
  { const AtomicDirectory again(folder.at("model")); }  // cleans its own name only
  EXPECT_EQ(names_in(folder.path()).size(), 3U);
  EXPECT_EQ(remove_leftovers(folder.path()), 1);
  EXPECT_EQ(names_in(folder.path()).size(), 2U);  // the living one and the unrelated file
}

TEST(RemoveFolder, IsAllOrNothingForWhoComesAfterAKill) {
  const TestFolder folder;
  const std::string path = folder.at("model");
  constexpr int64_t kFiles = 300;
  for (int64_t round = 0; round < 12; ++round) {
    make_folder(path);
    for (int64_t i = 0; i < kFiles; ++i) {
      put(path + "/" + std::to_string(i), "1");
    }
    const pid_t child = ::fork();
    if (child == 0) {
      remove_folder(path);
      ::_exit(0);
    }
    ::usleep(static_cast<useconds_t>(200 * round));
    ::kill(child, SIGKILL);
    ::waitpid(child, nullptr, 0);
    if (fs::exists(path)) {
      EXPECT_EQ(names_in(path).size(), static_cast<size_t>(kFiles));
    }
    remove_folder(path);
    EXPECT_THAT(names_in(folder.path()), IsEmpty()) << "leftovers go too";
  }
  remove_folder(path);  // nothing there
}

TEST(LineLog, GrowsAndDropsAnUnfinishedLine) {
  const TestFolder folder;
  const std::string path = folder.at("log.jsonl");
  {
    LineLog log(path);
    log.append("{\"step\": 1}");
    log.append("{\"step\": 2}");
    log.sync();
    EXPECT_EQ(log.size(), read_text_file(path).size());
  }
  std::ofstream(path, std::ios::app) << std::string(10000, '{');
  LineLog log(path);
  EXPECT_EQ(read_text_file(path), "{\"step\": 1}\n{\"step\": 2}\n");
  log.truncate(12);
  log.append("{\"step\": 9}");
  EXPECT_EQ(read_text_file(path), "{\"step\": 1}\n{\"step\": 9}\n");
}

TEST(LineLog, OnlyAnUnfinishedLineGivesAnEmptyLog) {
  const TestFolder folder;
  put(folder.at("log"), "{\"st");
  EXPECT_EQ(LineLog(folder.at("log")).size(), 0U);
  EXPECT_EQ(read_text_file(folder.at("log")), "");
}

TEST(LineLog, FullDiskKeepsTheLinesBefore) {
  const TestFolder folder;
  LineLog log(folder.at("log"));
  log.append("first");
  {
    const FileSizeLimit limit(10);
    EXPECT_THAT([&] { log.append("a line too long"); },
                ThrowsMessage<Error>(HasSubstr("File too large")));
  }
  EXPECT_EQ(read_text_file(folder.at("log")), "first\n");
  EXPECT_THAT([] { LineLog("/dev/full").append("x"); },
              ThrowsMessage<Error>(AllOf(HasSubstr("/dev/full"), HasSubstr("No space left"))));
}

}  // namespace
}  // namespace cambium
