#include "base/resumable_file.h"

#include <gmock/gmock.h>
#include <sys/resource.h>

#include <csignal>
#include <filesystem>
#include <memory>

#include "base/file.h"
#include "base/test_folder.h"
#include "base/testing.h"

namespace cambium {
namespace {

using testing::error_of;
using ::testing::HasSubstr;

void put(ResumableFile& file, std::string_view text) {
  file.write(std::as_bytes(std::span(text)));
}

TEST(ResumableFile, GoesOnFromWhatWasKept) {
  const TestFolder folder;
  const std::string path = folder.at("f");
  {
    ResumableFile file(path, "head ");
    put(file, "one ");
  }  // as any exception ends it
  EXPECT_FALSE(std::filesystem::exists(path));
  // What a killed process wrote after the last mark counts for nothing.
  const std::string part = read_text_file(path + ".part");
  EXPECT_EQ(part, "head one ");
  write_file_atomically(path + ".part", part + "half");
  {
    ResumableFile file(path, "head ");
    EXPECT_EQ(file.size(), 9U);
    put(file, "two");
    EXPECT_EQ(file.checksum(),
              checksum(std::as_bytes(std::span(std::string_view("head one two")))));
    file.commit();
  }
  EXPECT_EQ(read_text_file(path), "head one two");
  EXPECT_FALSE(std::filesystem::exists(path + ".part"));
  EXPECT_FALSE(std::filesystem::exists(path + ".part.kept"));
  // A file that is there gives way at commit; a mark that was left behind means nothing.
  write_file_atomically(path + ".part.kept", "9 0123456789abcdef\n");
  ResumableFile again(path, "other ");
  EXPECT_EQ(read_text_file(path), "head one two");
  again.commit();
  EXPECT_EQ(read_text_file(path), "other ");
}

// A disk that is full in the middle of a piece; there is room again when the process ends.
TEST(ResumableFile, WritesAgainWhatFailedHalfway) {
  const TestFolder folder;
  const std::string path = folder.at("f");
  std::string piece;
  while (piece.size() < size_t{3} << 20) {
    piece += std::to_string(piece.size()) + " ";
  }
  struct rlimit before {};
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &before), 0);
  const auto old = std::signal(SIGXFSZ, SIG_IGN);
  {
    ResumableFile file(path, "head ");
    struct rlimit full = before;
    full.rlim_cur = size_t{2} << 20;
    ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &full), 0);
    EXPECT_THAT(error_of([&] { put(file, piece); }), HasSubstr("cannot write"));
    ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &before), 0);
  }
  std::signal(SIGXFSZ, old);
  ResumableFile file(path, "head ");
  EXPECT_EQ(file.size(), 5 + piece.size());
  file.commit();
  EXPECT_EQ(read_text_file(path), "head " + piece);
}

TEST(ResumableFile, RefusesWhatItCannotGoOnWith) {
  const TestFolder folder;
  const std::string path = folder.at("f");
  {
    ResumableFile file(path, "head ");
    put(file, "one ");
    EXPECT_THAT(error_of([&] { ResumableFile(path, "head "); }),
                HasSubstr("is being written by another process"));
  }
  const std::string mark = read_text_file(path + ".part.kept");
  const struct {
    const char* part;
    std::string mark;
    const char* begin;
    const char* error;
  } rows[] = {
      {"head one ", mark, "tail ", "left half-made, of other data"},
      {"head two ", mark, "head ", "it was damaged or edited"},
      {"head ", mark, "head ", "left half-made"},
      {"head one ", "many\n", "head ", "expected a number of bytes"},
      {"head one ", "9 0123\n", "head ", "it was damaged or edited"},
  };
  for (const auto& row : rows) {
    write_file_atomically(path + ".part", row.part);
    write_file_atomically(path + ".part.kept", row.mark);
    EXPECT_THAT(error_of([&] { ResumableFile(path, row.begin); }), HasSubstr(row.error))
        << row.part;
  }
  EXPECT_THAT(error_of([&] { ResumableFile("/dev/null", "x"); }), HasSubstr("no file that could"));
  EXPECT_THAT(error_of([&] { ResumableFile(folder.at("no/f"), "x"); }), HasSubstr("cannot write"));
}

}  // namespace
}  // namespace cambium
