#include "ops/matmul/matmul_choices.h"

#include <cstdlib>
#include <sstream>

#include "base/error.h"

namespace cambium {
namespace {

constexpr size_t kMostBytes = size_t{16} << 20;

// "key \t sixteen hex digits, eight times"
std::string line_of(const std::string& key, const ProductChoices::Choice& choice) {
  std::string line = key + '\t';
  for (const uint64_t word : choice) {
    line += fmt::format("{:016x}", word);
  }
  return line;
}

std::optional<ProductChoices::Choice> choice_of(const std::string& digits) {
  ProductChoices::Choice choice{};
  if (digits.size() != 16 * choice.size() ||
      digits.find_first_not_of("0123456789abcdef") != std::string::npos) {
    return std::nullopt;
  }
  for (size_t i = 0; i < choice.size(); ++i) {
    choice[i] = std::stoull(digits.substr(16 * i, 16), nullptr, 16);
  }
  return choice;
}

}  // namespace

ProductChoices::ProductChoices(std::filesystem::path file) : file_(std::move(file)) {
  std::error_code unreadable;
  if (file_.empty() || !std::filesystem::is_regular_file(file_, unreadable)) {
    return;
  }
  try {
    std::istringstream lines(read_text_file(file_.string(), kMostBytes));
    for (std::string line; std::getline(lines, line);) {
      const size_t tab = line.find('\t');
      if (tab == std::string::npos) {
        continue;
      }
      if (const auto choice = choice_of(line.substr(tab + 1))) {
        choices_[line.substr(0, tab)] = *choice;
      }
    }
  } catch (const Error&) {  // a cache that cannot be read is an empty one
  }
}

std::optional<ProductChoices::Choice> ProductChoices::find(const std::string& key) const {
  const std::lock_guard lock(mutex_);
  const auto at = choices_.find(key);
  return at == choices_.end() ? std::nullopt : std::optional(at->second);
}

void ProductChoices::add(const std::string& key, const Choice& choice) {
  const std::lock_guard lock(mutex_);
  choices_[key] = choice;
  if (file_.empty()) {
    return;
  }
  try {
    if (log_ == nullptr) {
      make_folder(file_.parent_path().string());
      log_ = std::make_unique<LineLog>(file_.string());
    }
    log_->append(line_of(key, choice));
  } catch (const Error&) {
    file_.clear();  // no room for it, or no permission: measured again next time
  }
}

std::filesystem::path ProductChoices::cache_file(const std::string& name) {
  const auto folder = [](const char* variable, const char* below) -> std::filesystem::path {
    const char* value = std::getenv(variable);
    return value == nullptr || *value == '\0' ? std::filesystem::path{}
                                              : std::filesystem::path(value) / below;
  };
  for (const auto& found : {folder("CAMBIUM_CACHE", ""), folder("XDG_CACHE_HOME", "cambium"),
                            folder("HOME", ".cache/cambium")}) {
    if (!found.empty()) {
      return found / name;
    }
  }
  return {};
}

}  // namespace cambium
