// Files of JSON lines as people have them: empty lines, lines that end as Windows ends them, a byte
// order mark at the start.
#pragma once

#include <cstdint>
#include <functional>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "base/file.h"

namespace cambium {

/// The lines of a file that are not empty.
class JsonLines {
 public:
  struct Line {
    std::string_view text;
    int64_t number;  // in the file, from 1
  };
  using Use = std::function<void(const nlohmann::ordered_json& value, int64_t line)>;

  explicit JsonLines(const std::string& path);

  /// Up to `most` more of them, in the file's order, and of `bytes` in all, but one at least; none
  /// at its end. They stay with the file.
  std::vector<Line> next(size_t most, size_t bytes);
  /// Calls `use` with the line's value and number. Error with "path:line: " before it where it is
  /// not JSON or nests too deep; Errors that `use` throws get the same beginning. From many threads
  /// at once, if `use` may be called so.
  void read(const Line& line, const Use& use) const;
  /// Of the file's bytes.
  uint64_t checksum() const;

 private:
  MappedFile file_;
  std::string_view rest_;
  int64_t number_ = 0;  // of the last line
};

/// Reads every line in turn. Returns the checksum of the file's bytes.
uint64_t each_json_line(const std::string& path, const JsonLines::Use& use);

}  // namespace cambium
