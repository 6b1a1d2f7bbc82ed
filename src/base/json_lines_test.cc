#include "base/json_lines.h"

#include <gmock/gmock.h>

#include <nlohmann/json.hpp>

#include "base/checksum.h"
#include "base/test_folder.h"
#include "base/testing.h"

namespace cambium {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

TEST(JsonLines, ComeInTheirOrderSoManyAtATime) {
  const TestFolder folder;
  const std::string text = "\xEF\xBB\xBF[1]\n\n \t\r\n[2]\r\n[3]\n[4, 4, 4, 4, 4, 4]\n[5]";
  write_file_atomically(folder.at("f.jsonl"), text);
  const auto numbers = [](const std::vector<JsonLines::Line>& lines) {
    std::vector<int64_t> of;
    for (const JsonLines::Line& line : lines) {
      of.push_back(line.number);
    }
    return of;
  };
  JsonLines lines(folder.at("f.jsonl"));
  EXPECT_EQ(lines.checksum(), checksum(std::as_bytes(std::span(text))));
  EXPECT_THAT(numbers(lines.next(2, 1000)), ElementsAre(1, 4));
  EXPECT_THAT(numbers(lines.next(9, 4)), ElementsAre(5));
  EXPECT_THAT(numbers(lines.next(9, 1)), ElementsAre(6)) << "one, however long it is";
  const std::vector<JsonLines::Line> last = lines.next(9, 1000);
  EXPECT_THAT(numbers(last), ElementsAre(7));
  EXPECT_TRUE(lines.next(9, 1000).empty());
  int64_t value = 0;
  lines.read(last[0], [&](const auto& json, int64_t line) {
    value = 10 * json[0].template get<int64_t>() + line;
  });
  EXPECT_EQ(value, 57);
  EXPECT_THAT(testing::error_of([&] {
                lines.read({"[1", 3}, [](const auto&, int64_t) {});
              }),
              HasSubstr("f.jsonl:3: this line is not JSON"));
}

TEST(JsonLines, EachIsReadInTurn) {
  const TestFolder folder;
  write_file_atomically(folder.at("f.jsonl"), "1\n2\n\n3\n");
  std::vector<int64_t> read;
  each_json_line(folder.at("f.jsonl"), [&](const auto& json, int64_t line) {
    read.push_back(10 * json.template get<int64_t>() + line);
  });
  EXPECT_THAT(read, ElementsAre(11, 22, 34));
}

}  // namespace
}  // namespace cambium
