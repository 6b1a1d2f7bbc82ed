#include "cli/options.h"

#include <cstdio>
#include <filesystem>

#include "base/checked.h"
#include "base/error.h"

namespace cambium {

ResultFile::ResultFile(const std::string& path) {
  if (path.empty()) {
    return;
  }
  expect(!std::filesystem::is_directory(path), "cannot write {}: it is a folder, expected a file",
         path);
  file_ = std::make_unique<AtomicFile>(path);
}

void ResultFile::write(std::string_view text) {
  if (file_ != nullptr) {
    file_->write(text);
    file_->commit();
    return;
  }
  fmt::print("{}", text);
  std::fflush(stdout);
}

void SamplingOptions::declare(Args& args) {
  args.option("temperature", "0 = always the likeliest token", &temperature);
  args.option("top-k", "choose among the k likeliest (0 = all)", &top_k, {0, kMaxVocab});
  args.option("top-p", "choose among the likeliest that make up this share", &top_p,
              reals_above(0.0, 1.0));
  args.option("min-p", "drop tokens less likely than this times the likeliest", &min_p, {0.0, 1.0});
  args.option("seed", "of the sampling", &seed);
}

SamplingConfig SamplingOptions::config() const {
  const SamplingConfig config = {static_cast<float>(temperature), top_k, static_cast<float>(top_p),
                                 static_cast<float>(min_p)};
  check_sampling(config);
  return config;
}

}  // namespace cambium
