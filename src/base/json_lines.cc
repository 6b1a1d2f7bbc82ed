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

uint64_t each_json_line(
    const std::string& path,
    const std::function<void(const nlohmann::ordered_json& value, int64_t line)>& use) {
  const MappedFile file(path);
  std::string_view text(reinterpret_cast<const char*>(file.bytes().data()), file.bytes().size());
  if (text.starts_with(kByteOrderMark)) {
    text.remove_prefix(kByteOrderMark.size());
  }
  size_t begin = 0;
  for (int64_t number = 1; begin < text.size(); ++number) {
    const size_t end = std::min(text.find('\n', begin), text.size());
    const std::string_view line = text.substr(begin, end - begin);
    begin = end + 1;
    if (line.find_first_not_of(" \t\r") == std::string_view::npos) {
      continue;
    }
    expect(!too_deep(line), "{}:{}: this line nests more than {} levels deep", path, number,
           kMaxDepth);
    const auto json = nlohmann::ordered_json::parse(line, nullptr, false);
    expect(!json.is_discarded(), "{}:{}: this line is not JSON", path, number);
    try {
      use(json, number);
    } catch (const Error& error) {
      fail("{}:{}: {}", path, number, error.what());
    }
  }
  return checksum(file.bytes());
}

}  // namespace cambium
