// llama.cpp's architectures as data: one row says how a file's keys and config.json say the same,
// which tensor is which of our parameters and in which order its numbers stand. Import and export
// read the same row, in its two directions.
#pragma once

#include <deque>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "files/gguf.h"
#include "model/spec.h"

namespace cambium {

using GgufJson = nlohmann::ordered_json;

/// The shortest decimal that gives the same float: 1e-05 and not 9.999999747378752e-06.
double shortest_decimal(float value);

/// The keys of a file's architecture, by their names without its prefix. What nobody asked for may
/// change what the model computes.
class GgufArchitectureKeys {
 public:
  GgufArchitectureKeys(const Gguf& gguf, std::string architecture)
      : gguf_(gguf), prefix_(std::move(architecture) + ".") {}

  const Gguf& gguf() const { return gguf_; }
  const std::string& path() const { return gguf_.path(); }
  std::string named(std::string_view key) const { return prefix_ + std::string(key); }

  bool has(std::string_view key) { return gguf_.metadata().contains(ask(key)); }
  /// From 0 to 2^31.
  std::optional<int64_t> size(std::string_view key);
  /// The same of a key that must be there and be above 0.
  int64_t need(std::string_view key);
  /// As shortest_decimal().
  std::optional<double> number(std::string_view key);
  /// The same, of what must be above 0.
  std::optional<double> positive(std::string_view key);
  std::optional<bool> flag(std::string_view key) { return gguf_.flag(ask(key)); }
  std::optional<std::string> text(std::string_view key) { return gguf_.text(ask(key)); }
  /// A number a layer: a list, or one for all.
  std::optional<std::vector<int64_t>> by_layer(std::string_view key, int64_t layers);
  /// Error that names a key of the architecture which nobody asked for.
  void refuse_others() const;

 private:
  std::string ask(std::string_view key);

  const Gguf& gguf_;
  std::string prefix_;
  std::set<std::string, std::less<>> asked_;
};

/// What a file says before its tensors: keys, and tensors that stand for keys.
struct GgufHead {
  std::string architecture;
  GgufMetadata metadata{};
  std::map<std::string, std::vector<float>> tensors{};

  void size(std::string_view key, int64_t value) { put(key, static_cast<uint64_t>(value)); }
  void number(std::string_view key, double value) { put(key, value); }
  void flag(std::string_view key, bool value) { put(key, value); }
  void text(std::string_view key, std::string value) { put(key, std::move(value)); }
  /// A number a layer.
  void sizes(std::string_view key, const std::vector<int64_t>& values);
  /// Any of the kinds that a GgufValue holds.
  template <class T>
  void put(std::string_view key, T value) {
    metadata[architecture + "." + std::string(key)].value = std::move(value);
  }
};

/// A key and what config.json calls it; the value is the same.
struct GgufKeyRule {
  enum Kind : uint8_t { kSize, kNumber, kFlag };
  const char* key;
  std::string config;
  Kind kind = kSize;
  bool required = false;  ///< to import
  bool written = true;    ///< false: llama.cpp does not look at it
};

/// What of a configuration takes more than one key, or says the same in another form.
struct GgufPart {
  void (*read)(GgufArchitectureKeys& keys, GgufJson& config);
  void (*write)(const ModelSpec& spec, const GgufJson& config, GgufHead& head);
};

/// How a file says rotations.
struct GgufRope {
  bool turns = true;
  /// config.json's key of the channels that turn: "rotary_dim", "qk_rope_head_dim", or
  /// "partial_rotary_factor", their share of the head.
  const char* dims = "partial_rotary_factor";
  bool truncate = true;  ///< YaRN's ramp begins and ends at whole channels
  /// yarn_log_multiplier is a tenth of mscale_all_dim, and scales the scores (DeepSeek).
  bool scales_scores = false;
};

/// In which order the numbers of a parameter stand in its tensor, where it is not its own.
struct GgufOrder {
  enum Kind : uint8_t {
    kPairs,    ///< rotary pairs of each of `heads` heads are neighbours: 2i and 2i + 1; what does
               ///< not turn of a head stands where it is
    kTiled,    ///< rows of `heads` heads, of which `groups` share a key head, with that head inside
    kTiledIn,  ///< columns likewise
    kLatent,   ///< keys' and values' rows of MLA in two tensors, the keys' transposed
  };
  std::string_view ours;  ///< pattern, and ":block" where a block alone is meant
  Kind kind;
  std::string_view heads;  ///< option of the unit
  std::string_view groups{};
};

/// What a tensor has of another shape, with its numbers in the same order.
struct GgufShape {
  enum Kind : uint8_t { kSqueezed, kColumn, kByGroup };
  std::string_view tensor;  ///< pattern
  Kind kind;
};

/// What a tensor holds in place of our numbers.
struct GgufValues {
  enum Kind : uint8_t { kPlusOne, kMinusExp, kExp };
  std::string_view tensor;  ///< pattern
  Kind kind;
};

/// Numbers of which a key holds a list, one a layer: those of a parameter, or the same in all
/// layers.
struct GgufNumbers {
  const char* key;
  std::string_view ours{};  ///< pattern, whose first star is the layer
  double fixed = 0;         ///< without a parameter
};

/// Factors of parameters' rows: those of a block ("name:block"), or all.
using GgufFactors = std::map<std::string, float>;

struct GgufArchitecture {
  std::string name;
  /// Ours that it computes; what is imported is the first.
  std::vector<std::string> families;
  std::vector<GgufKeyRule> keys;
  std::vector<TensorRule> tensors;
  GgufRope rope{};
  std::vector<GgufPart> parts{};
  /// What config.json says in all its models.
  GgufJson config = GgufJson::object();
  /// Keys of the same value in all its models.
  std::map<std::string, uint64_t> constants{};
  std::vector<GgufOrder> orders{};
  std::vector<GgufShape> shapes{};
  std::vector<GgufValues> values{};
  std::vector<GgufNumbers> numbers{};
  /// Of rows of one name, the first that fits the file (null: all do) is its own,
  bool (*fits)(GgufArchitectureKeys& keys) = nullptr;
  /// and of rows with one family the first that can hold the model.
  bool (*holds)(const ModelSpec& spec) = nullptr;
  /// Makes factors that the file has no key for factors of parameters.
  GgufFactors (*fold)(ModelSpec& spec) = nullptr;
};

const std::vector<GgufArchitecture>& gguf_architectures();
/// The rows of the table's files.
std::vector<GgufArchitecture> gguf_attention_architectures();
std::vector<GgufArchitecture> gguf_mamba_architectures();
std::vector<GgufArchitecture> gguf_linear_architectures();
std::vector<GgufArchitecture> gguf_latent_architectures();
/// The names of all, each once: "llama, qwen2 and qwen3".
std::string gguf_architecture_names();

}  // namespace cambium
