// Which of the library's algorithms computes a product fastest: measured once on a machine, kept in
// a file for the next time. The same file gives the same algorithms, and so the same bits.
#pragma once

#include <array>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>

#include "base/file.h"

namespace cambium {

/// Choices by a product's key (words without line breaks or tabs). Any thread may call.
class ProductChoices {
 public:
  using Choice = std::array<uint64_t, 8>;

  /// Reads `file` where it is there; lines that are not choices are passed over. An empty path
  /// remembers nothing beyond the program's end.
  explicit ProductChoices(std::filesystem::path file);
  std::optional<Choice> find(const std::string& key) const;
  /// Keeps a choice, also in the file; a file that cannot be written is left alone.
  void add(const std::string& key, const Choice& choice);

  /// `name` in the folder for what programs may forget: $CAMBIUM_CACHE, else
  /// $XDG_CACHE_HOME/cambium, else ~/.cache/cambium; empty where none of them is named.
  static std::filesystem::path cache_file(const std::string& name);

 private:
  mutable std::mutex mutex_;
  std::filesystem::path file_;
  std::map<std::string, Choice> choices_;
  std::unique_ptr<LineLog> log_;
};

}  // namespace cambium
