#include "base/json_lines.h"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "base/checksum.h"
#include "base/error.h"
#include "base/file.h"

namespace cambium {
namespace {

/// No row of data nests deeper, and copying and writing a value take a stack frame a level.
constexpr int kMaxDepth = 100;
constexpr std::string_view kByteOrderMark = "\xEF\xBB\xBF";

bool too_deep(std::string_view json) {
  int depth = 0;
  bool quoted = false;
  for (size_t i = 0; i < json.size(); ++i) {
    const char c = json[i];
    if (quoted) {
      i += c == '\\' ? 1 : 0;
      quoted = c != '"';
    } else if (c == '"') {
      quoted = true;
    } else if (c == '[' || c == '{') {
      if (++depth > kMaxDepth) {
        return true;
      }
    } else if (c == ']' || c == '}') {
      --depth;
    }
  }
  return false;
}

}  // namespace

JsonLines::JsonLines(const std::string& path)
    : file_(path),
      rest_(reinterpret_cast<const char*>(file_.bytes().data()), file_.bytes().size()) {
  if (rest_.starts_with(kByteOrderMark)) {
    rest_.remove_prefix(kByteOrderMark.size());
  }
}

std::vector<JsonLines::Line> JsonLines::next(size_t most, size_t bytes) {
  std::vector<Line> lines;
  const size_t left = rest_.size();
  while (!rest_.empty() && lines.size() < most && (lines.empty() || left - rest_.size() < bytes)) {
    const size_t end = std::min(rest_.find('\n'), rest_.size());
    const std::string_view line = rest_.substr(0, end);
    rest_.remove_prefix(std::min(end + 1, rest_.size()));
    ++number_;
    if (line.find_first_not_of(" \t\r") != std::string_view::npos) {
      lines.push_back({line, number_});
    }
  }
  return lines;
}

void JsonLines::read(const Line& line, const Use& use) const {
  expect(!too_deep(line.text), "{}:{}: this line nests more than {} levels deep", file_.path(),
         line.number, kMaxDepth);
  const auto json = nlohmann::ordered_json::parse(line.text, nullptr, false);
  expect(!json.is_discarded(), "{}:{}: this line is not JSON", file_.path(), line.number);
  try {
    use(json, line.number);
  } catch (const Error& error) {
    fail("{}:{}: {}", file_.path(), line.number, error.what());
  }
}

uint64_t JsonLines::checksum() const {
  return cambium::checksum(file_.bytes());
}

uint64_t each_json_line(const std::string& path, const JsonLines::Use& use) {
  JsonLines lines(path);
  constexpr size_t kSome = 1024;
  constexpr size_t kBytes = size_t{1} << 20;
  for (auto some = lines.next(kSome, kBytes); !some.empty(); some = lines.next(kSome, kBytes)) {
    for (const JsonLines::Line& line : some) {
      lines.read(line, use);
    }
  }
  return lines.checksum();
}

}  // namespace cambium
