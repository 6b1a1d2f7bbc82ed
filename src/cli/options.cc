#include "cli/options.h"

#include <algorithm>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <map>

#include "base/checked.h"
#include "base/error.h"
#include "base/progress.h"
#include "eval/problems/long_context.h"
#include "tensor/device_memory.h"

namespace cambium {

void refuse(bool given, const char* option, const char* what) {
  expect(!given, "{} belongs to {}", option, what);
}

void LongTextsOption::declare(Args& args, const std::string& of) {
  args.option("length",
              of + "metric retrieval: pass keys, and keys and values, in texts of so many tokens "
                   "(4096,16384; generated texts of some hundred characters otherwise)",
              &lengths, {16, kMaxPositions});
}

Task LongTextsOption::task(int64_t problems, uint64_t seed, const Tokenizer& tokenizer) const {
  const std::vector<std::string> tasks = {"passkey", "keyvalue"};
  LongGrid grid{.lengths = lengths, .depths = 5};
  grid.answers = answers_of_cells(grid, tasks.size(), problems);
  return long_tasks(tasks, grid, seed, tokenizer);
}

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

void DeviceOption::declare(Args& args) {
  args.option("device", "auto (a GPU where one can be used), cpu, cuda, cuda:N", &name);
}

Device DeviceOption::device() const {
  if (name == "cpu") {
    return Device::kCpu;
  }
  if (name == "auto") {
    if (cuda_devices() > 0) {
      return Device::kCuda;
    }
    static const bool said = [] {
      if (kCudaBuild) {
        say("note: the CPU computes: {}", why_no_cuda());
      }
      return true;
    }();
    static_cast<void>(said);
    return Device::kCpu;
  }
  int64_t index = name == "cuda" ? 0 : -1;
  if (name.starts_with("cuda:") && name.size() > 5 && name.size() < 8 &&
      std::all_of(name.begin() + 5, name.end(), [](char c) { return c >= '0' && c <= '9'; })) {
    index = std::stoi(name.substr(5));
  }
  expect(index >= 0, "--device: expected auto, cpu, cuda or cuda:N, got '{}'", name);
  const int count = cuda_devices();
  expect(index < count, "--device: there is no {}: {}", name,
         why_no_cuda().empty() ? fmt::format("the machine has {} of them", count) : why_no_cuda());
  return {Device::kCuda, static_cast<uint8_t>(index)};
}

void PresetOption::declare(Args& args) {
  args.option("preset", "of a supernet: the placement with this name (its attention otherwise)",
              &name);
}

void StorageOption::declare(Args& args) {
  args.choice("storage", "of the model's matrices: bf16 is half the size, and a GPU computes in it",
              {"f32", "bf16"}, &name);
}

void CacheOption::declare(Args& args) {
  args.choice("cache", "how keys and values are kept (f8: e4m3, a scale a token and head)",
              {"bf16", "f32", "f8"}, &name);
}

void CacheOption::declare_page_size(Args& args) {
  args.option("page-size",
              "tokens of a page of the cache (0 = 16, or a larger power of two that makes a "
              "layer's page 64 KiB)",
              &page_size, {0, kMostPageAsked});
}

Dtype CacheOption::values() const {
  return name.empty() ? CacheConfig{}.values : parse_cache_values(name);
}

int64_t parse_bytes(const char* option, const std::string& text) {
  size_t end = 0;
  double value = 0.0;
  try {
    value = std::stod(text, &end);
  } catch (const std::exception&) {
    end = 0;
  }
  const std::string unit = text.substr(end);
  const std::map<std::string, double> units = {
      {"", 1.0},   {"B", 1.0},      {"KB", 1e3},        {"MB", 1e6},
      {"GB", 1e9}, {"KiB", 1024.0}, {"MiB", 1048576.0}, {"GiB", 1073741824.0}};
  const auto it = units.find(unit);
  // Up to 2^60 bytes, so that what is computed from it fits.
  expect(end > 0 && it != units.end() && value > 0 && value * it->second <= 0x1p60,
         "{}: expected a size such as 24GiB or 80GB, got '{}'", option, text);
  return static_cast<int64_t>(value * it->second);
}

void EngineOptions::declare(Args& args) {
  args.option("cache-memory", "of keys, values and states at most, such as 40GiB", &memory);
  args.choice("admission",
              "a request begins when there is memory for its longest answer, or for what it has "
              "(then the youngest waits again where memory runs out)",
              {"whole", "as-needed"}, &admission);
  args.flag("deterministic",
            "answers depend on nothing that runs beside them, to the last bit; on a GPU slower "
            "kernels see to it",
            &deterministic);
}

void EngineOptions::apply(EngineConfig& config) const {
  config.memory_bytes = memory.empty() ? 0 : parse_bytes("--cache-memory", memory);
  config.admission = admission == "whole" ? Admission::kWhole : Admission::kAsNeeded;
  config.deterministic = deterministic;
}

Device DeviceOption::described() const {
  return name.starts_with("cuda") && cuda_devices() == 0 ? Device::kCuda : device();
}

void SamplingOptions::declare(Args& args) {
  args.option("temperature", "0 = always the likeliest token", &temperature);
  args.option("top-k", "choose among the k likeliest (0 = all)", &top_k, {0, kMaxVocab});
  args.option("top-p", "choose among the likeliest that make up this share", &top_p,
              reals_above(0.0, 1.0));
  args.option("min-p", "drop tokens less likely than this times the likeliest", &min_p, {0.0, 1.0});
  args.option(
      "repetition-penalty",
      "divides logits of tokens of prompt and output (1 = none; negative ones are multiplied)",
      &repetition, reals_above(0.0, 1e3));
  args.option("presence-penalty", "taken off logits of tokens of the output", &presence,
              {-2.0, 2.0});
  args.option("frequency-penalty", "taken off them for each time they are in the output",
              &frequency, {-2.0, 2.0});
  args.option("seed", "of the sampling", &seed);
}

SamplingConfig SamplingOptions::config() const {
  const SamplingConfig config = {static_cast<float>(temperature), top_k,
                                 static_cast<float>(top_p),       static_cast<float>(min_p),
                                 static_cast<float>(repetition),  static_cast<float>(presence),
                                 static_cast<float>(frequency)};
  check_sampling(config);
  return config;
}

}  // namespace cambium
