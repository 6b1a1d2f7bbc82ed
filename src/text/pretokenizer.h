// The `pre_tokenizer` part of tokenizer.json: cuts text into the pieces that are encoded one by
// one.
#pragma once

#include <deque>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>
#include <vector>

namespace cambium::text {

/// Pieces of a text, in order, none empty. A step that rewrites text keeps the new text in `owned`.
struct Pieces {
  std::vector<std::string_view> views;
  std::deque<std::string> owned;
  bool at_start = true;  // the first piece begins the whole text
};

class PreTokenStep {
 public:
  virtual ~PreTokenStep() = default;
  /// Cuts every piece further.
  virtual void apply(Pieces& pieces) const = 0;
};

struct PreTokenizer {
  std::vector<std::unique_ptr<PreTokenStep>> steps;
  /// The last step turns bytes into the byte alphabet. It is left to the vocabulary, which is then
  /// looked up by raw bytes.
  bool byte_level = false;

  void apply(Pieces& pieces) const {
    for (const auto& step : steps) {
      step->apply(pieces);
    }
  }
};

/// `spec` is the JSON value (null allowed). Throws Error for a type that is not supported.
PreTokenizer make_pretokenizer(const nlohmann::json& spec);

/// GPT-2's pattern, which ByteLevel uses when asked to split.
extern const char* const kGpt2Pattern;

}  // namespace cambium::text
