// Groups of options that several commands have, and the file that results go to.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "base/file.h"
#include "cli/args.h"
#include "eval/tasks.h"
#include "model/weights.h"
#include "ops/sampling/sampling.h"
#include "serve/engine.h"
#include "tensor/device.h"
#include "text/tokenizer.h"

namespace cambium {

/// Error where an option was given that belongs to something else.
void refuse(bool given, const char* option, const char* what);

/// What an option that is below zero where it was not given says, or what is there without it.
template <class T>
T or_else(T given, T fallback) {
  return given < 0 ? fallback : given;
}

/// `--length`: what --metric retrieval asks, in place of generated texts of some hundred
/// characters.
struct LongTextsOption {
  std::vector<int64_t> lengths;  // tokens

  void declare(Args& args, const std::string& of = "");
  bool given() const { return !lengths.empty(); }
  /// About so many pass keys and keys and values, in texts of these lengths.
  Task task(int64_t problems, uint64_t seed, const Tokenizer& tokenizer) const;
};

/// Where a command's results go, opened before the work, so that nothing is computed for a file
/// that cannot be written. Standard output where the path is empty.
class ResultFile {
 public:
  explicit ResultFile(const std::string& path);
  /// Writes everything; the file appears under its name.
  void write(std::string_view text);

 private:
  std::unique_ptr<AtomicFile> file_;
};

/// --device: auto (a CUDA device where there is one that can be used), cpu, cuda or cuda:N.
struct DeviceOption {
  std::string name = "auto";

  void declare(Args& args);
  /// Error where it is not there. Says once, for auto in a build with CUDA, why the CPU computes.
  Device device() const;
  /// The same for what only tells of a device: one that is named need not be there.
  Device described() const;
};

/// --preset: of a supernet, which of its placements is meant; empty = the mixers that are active.
struct PresetOption {
  std::string name;

  void declare(Args& args);
};

/// --storage: how the matrices of a model that is written are kept.
struct StorageOption {
  std::string name = "f32";

  void declare(Args& args);
  MatrixStorage storage() const { return parse_storage(name); }
};

/// --cache and --page-size: how keys and values are kept.
struct CacheOption {
  std::string name = "bf16";  // empty: was not given, and is the cache's default
  int64_t page_size = 0;      // tokens; 0: as the cache chooses (CacheConfig::page_size)

  void declare(Args& args);
  /// --page-size, of commands that make a cache.
  void declare_page_size(Args& args);
  Dtype values() const;
};

/// "24GiB", "80GB", "512MiB", "1000000" -> bytes; Error that names the option otherwise.
int64_t parse_bytes(const char* option, const std::string& text);

/// --cache-memory, --admission and --deterministic of commands that run an engine for many
/// requests.
struct EngineOptions {
  std::string memory, admission = "whole";
  bool deterministic = false;

  void declare(Args& args);
  bool given() const { return *this != EngineOptions{}; }
  /// Sets what the options say.
  void apply(EngineConfig& config) const;
  friend bool operator==(const EngineOptions&, const EngineOptions&) = default;
};

struct SamplingOptions {
  double temperature = 0.0, top_p = 1.0, min_p = 0.0;
  double repetition = 1.0, presence = 0.0, frequency = 0.0;
  int64_t top_k = 0, seed = 0;

  void declare(Args& args);
  SamplingConfig config() const;
};

}  // namespace cambium
