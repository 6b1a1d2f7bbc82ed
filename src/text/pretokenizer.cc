#include "text/pretokenizer.h"

#include <nlohmann/json.hpp>
#include <utility>

#include "base/error.h"
#include "text/pattern.h"
#include "text/unicode.h"

namespace cambium::text {

const char* const kGpt2Pattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

namespace {

using nlohmann::json;

enum class Behavior { kIsolated, kRemoved, kMergedWithPrevious, kMergedWithNext, kContiguous };

Behavior behavior_of(const json& spec) {
  const std::string name = spec.at("behavior").get<std::string>();
  if (name == "Isolated") {
    return Behavior::kIsolated;
  }
  if (name == "Removed") {
    return Behavior::kRemoved;
  }
  if (name == "MergedWithPrevious") {
    return Behavior::kMergedWithPrevious;
  }
  if (name == "MergedWithNext") {
    return Behavior::kMergedWithNext;
  }
  if (name == "Contiguous") {
    return Behavior::kContiguous;
  }
  fail(
      "[tokenizer] split behavior {:?} is not supported; expected Isolated, Removed, "
      "MergedWithPrevious, MergedWithNext or Contiguous",
      name);
}

/// A stretch of a piece: a match of the pattern or what lies between two.
struct Span {
  size_t begin;
  size_t end;
  bool match;
};

class Split : public PreTokenStep {
 public:
  Split(Pattern pattern, Behavior behavior, bool invert)
      : pattern_(std::move(pattern)), behavior_(behavior), invert_(invert) {}

  void apply(Pieces& pieces) const override {
    std::vector<std::string_view> out;
    out.reserve(pieces.views.size() * 2);
    for (const std::string_view piece : pieces.views) {
      if (behavior_ == Behavior::kIsolated) {
        isolate(piece, out);
      } else {
        general(piece, out);
      }
    }
    pieces.views = std::move(out);
  }

 private:
  static void add(std::string_view piece, size_t begin, size_t end,
                  std::vector<std::string_view>& out) {
    if (begin < end) {
      out.push_back(piece.substr(begin, end - begin));
    }
  }

  /// The common case: matches and gaps both stay, so nothing needs to be remembered.
  void isolate(std::string_view piece, std::vector<std::string_view>& out) const {
    size_t done = 0;
    each_match(pattern_, piece, [&](size_t begin, size_t end) {
      add(piece, done, begin, out);
      add(piece, begin, end, out);
      done = end;
    });
    add(piece, done, piece.size(), out);
  }

  void general(std::string_view piece, std::vector<std::string_view>& out) const {
    std::vector<Span> spans;
    size_t done = 0;
    each_match(pattern_, piece, [&](size_t begin, size_t end) {
      if (done != begin) {
        spans.push_back({done, begin, invert_});
      }
      spans.push_back({begin, end, !invert_});
      done = end;
    });
    if (done != piece.size()) {
      spans.push_back({done, piece.size(), invert_});
    }
    switch (behavior_) {
      case Behavior::kMergedWithNext:
        merge_with_next(spans);
        break;
      case Behavior::kMergedWithPrevious:
      case Behavior::kContiguous:
        merge(spans);
        break;
      case Behavior::kRemoved:
        std::erase_if(spans, [](const Span& span) { return span.match; });
        break;
      case Behavior::kIsolated:
        break;
    }
    for (const Span& span : spans) {
      add(piece, span.begin, span.end, out);
    }
  }

  void merge(std::vector<Span>& spans) const {
    std::vector<Span> merged;
    bool previous = false;
    for (const Span& span : spans) {
      const bool join =
          behavior_ == Behavior::kContiguous ? span.match == previous : span.match && !previous;
      if (join && !merged.empty()) {
        merged.back().end = span.end;
      } else {
        merged.push_back(span);
      }
      previous = span.match;
    }
    spans = std::move(merged);
  }

  static void merge_with_next(std::vector<Span>& spans) {
    std::vector<Span> merged;  // from the end
    bool previous = false;
    for (auto span = spans.rbegin(); span != spans.rend(); ++span) {
      if (span->match && !previous && !merged.empty()) {
        merged.back().begin = span->begin;
      } else {
        merged.push_back(*span);
      }
      previous = span->match;
    }
    spans.assign(merged.rbegin(), merged.rend());
  }

  Pattern pattern_;
  Behavior behavior_;
  bool invert_;
};

/// Begins every piece that does not begin with `prefix` with it.
class Prefix : public PreTokenStep {
 public:
  explicit Prefix(std::string prefix) : prefix_(std::move(prefix)) {}
  void apply(Pieces& pieces) const override {
    for (std::string_view& piece : pieces.views) {
      if (!piece.starts_with(prefix_)) {
        piece = pieces.owned.emplace_back(prefix_ + std::string(piece));
      }
    }
  }

 private:
  std::string prefix_;
};

/// Spells pieces in the byte alphabet, for steps that follow a ByteLevel.
class ToAlphabet : public PreTokenStep {
 public:
  void apply(Pieces& pieces) const override {
    for (std::string_view& piece : pieces.views) {
      piece = pieces.owned.emplace_back(bytes_to_alphabet(piece));
    }
  }
};

/// SentencePiece's blanks: each becomes `mark`, and a piece begins with one.
class Metaspace : public PreTokenStep {
 public:
  enum class Prepend { kAlways, kFirst, kNever };
  Metaspace(std::string mark, Prepend prepend) : mark_(std::move(mark)), prepend_(prepend) {}
  void apply(Pieces& pieces) const override {
    bool first = pieces.at_start;
    for (std::string_view& piece : pieces.views) {
      std::string& text = pieces.owned.emplace_back();
      for (const char c : piece) {
        c == ' ' ? text += mark_ : text += c;
      }
      const bool prepend = prepend_ == Prepend::kAlways || (prepend_ == Prepend::kFirst && first);
      if (prepend && !text.starts_with(mark_)) {
        text.insert(0, mark_);
      }
      piece = text;
      first = false;
    }
  }

 private:
  std::string mark_;
  Prepend prepend_;
};

void append_steps(const json& spec, PreTokenizer& out);

void add_split(PreTokenizer& out, Pattern pattern, Behavior behavior, bool invert = false) {
  out.steps.push_back(std::make_unique<Split>(std::move(pattern), behavior, invert));
}

void append_byte_level(const json& spec, PreTokenizer& out) {
  if (spec.value("add_prefix_space", true)) {
    out.steps.push_back(std::make_unique<Prefix>(" "));
  }
  if (spec.value("use_regex", true)) {
    add_split(out, Pattern::from_regex(kGpt2Pattern), Behavior::kIsolated);
  }
  out.byte_level = true;
}

void append_metaspace(const json& spec, PreTokenizer& out) {
  const std::string mark = spec.value("replacement", "\u2581");
  const std::string scheme =
      spec.value("prepend_scheme", spec.value("add_prefix_space", true) ? "always" : "never");
  expect(scheme == "always" || scheme == "first" || scheme == "never",
         "[tokenizer] expected prepend_scheme always, first or never, got {:?}", scheme);
  out.steps.push_back(
      std::make_unique<Metaspace>(mark, scheme == "always"  ? Metaspace::Prepend::kAlways
                                        : scheme == "first" ? Metaspace::Prepend::kFirst
                                                            : Metaspace::Prepend::kNever));
  if (spec.value("split", true)) {
    add_split(out, Pattern::from_string(mark), Behavior::kMergedWithNext);
  }
}

void append_steps(const json& spec, PreTokenizer& out) {
  const std::string type = spec.at("type").get<std::string>();
  if (type == "Sequence") {
    for (const json& item : spec.at("pretokenizers")) {
      append_steps(item, out);
    }
    return;
  }
  if (out.byte_level) {  // a step after ByteLevel sees the alphabet's spelling
    out.steps.push_back(std::make_unique<ToAlphabet>());
    out.byte_level = false;
  }
  if (type == "ByteLevel") {
    append_byte_level(spec, out);
  } else if (type == "Split") {
    add_split(out, Pattern::from_json(spec.at("pattern")), behavior_of(spec),
              spec.value("invert", false));
  } else if (type == "Digits") {
    add_split(out, Pattern::from_regex("\\p{N}"),
              spec.value("individual_digits", false) ? Behavior::kIsolated : Behavior::kContiguous);
  } else if (type == "Punctuation") {
    const bool given = spec.contains("behavior");
    add_split(out, Pattern::from_regex(R"([\p{P}!-/:-@\[-`{-~])"),
              given ? behavior_of(spec) : Behavior::kIsolated);
  } else if (type == "Whitespace") {
    add_split(out, Pattern::from_regex(R"(\w+|[^\w\s]+)"), Behavior::kRemoved, true);
  } else if (type == "WhitespaceSplit") {
    add_split(out, Pattern::from_regex("\\s"), Behavior::kRemoved);
  } else if (type == "Metaspace") {
    append_metaspace(spec, out);
  } else {
    fail(
        "[tokenizer] pre_tokenizer type {:?} is not supported; expected Sequence, ByteLevel, "
        "Split, "
        "Digits, Punctuation, Whitespace, WhitespaceSplit or Metaspace",
        type);
  }
}

}  // namespace

PreTokenizer make_pretokenizer(const json& spec) {
  PreTokenizer out;
  if (!spec.is_null()) {
    append_steps(spec, out);
  }
  return out;
}

}  // namespace cambium::text
