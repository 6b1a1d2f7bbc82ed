#include "text/tokenizer_train.h"

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>
#include <queue>
#include <set>
#include <tuple>
#include <unordered_map>
#include <utility>

#include "base/error.h"
#include "text/added_tokens.h"
#include "text/pretokenizer.h"
#include "text/unicode.h"

namespace cambium {

const char* const kDefaultSplitPattern =
    R"([^\r\n\p{L}\p{N}]?\p{L}+| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";

namespace {

using nlohmann::json;
using Pair = std::pair<int32_t, int32_t>;

json pretokenizer_spec(const std::string& pattern) {
  const json digits = {{"type", "Digits"}, {"individual_digits", true}};
  const json split = {{"type", "Split"},
                      {"pattern", {{"Regex", pattern}}},
                      {"behavior", "Isolated"},
                      {"invert", false}};
  const json bytes = {{"type", "ByteLevel"},
                      {"add_prefix_space", false},
                      {"trim_offsets", true},
                      {"use_regex", false}};
  return {{"type", "Sequence"}, {"pretokenizers", {digits, split, bytes}}};
}

struct Word {
  std::vector<int32_t> symbols;
  int64_t count;
};

/// The pieces of all texts with how often each came, in an order that does not depend on the
/// texts'.
std::map<std::string, int64_t> count_pieces(std::span<const std::string> texts,
                                            const BpeTraining& training) {
  std::vector<text::AddedToken> added;
  for (const std::string& special : training.special_tokens) {
    added.push_back({.content = special, .id = 0});
  }
  const text::AddedTokenMatcher matcher(std::move(added));
  const text::PreTokenizer pretokenizer =
      text::make_pretokenizer(pretokenizer_spec(training.pattern));
  std::unordered_map<std::string, int64_t> counts;
  for (const std::string& raw : texts) {
    const std::string text = text::to_valid_utf8(raw);
    std::vector<text::Segment> segments;
    matcher.split(text, segments);
    for (const text::Segment& segment : segments) {
      if (segment.id >= 0) {
        continue;
      }
      text::Pieces pieces;
      pieces.views.push_back(segment.text);
      pretokenizer.apply(pieces);
      for (const std::string_view piece : pieces.views) {
        ++counts[std::string(piece)];
      }
    }
  }
  return {counts.begin(), counts.end()};
}

class Trainer {
 public:
  /// Symbols 0..255 are the bytes; merges continue from 256.
  explicit Trainer(const std::map<std::string, int64_t>& pieces) {
    for (int byte = 0; byte < 256; ++byte) {
      spelling_.emplace_back(1, static_cast<char>(byte));
      ids_.emplace(spelling_.back(), byte);
    }
    for (const auto& [piece, count] : pieces) {
      Word word{{}, count};
      for (const unsigned char byte : piece) {
        word.symbols.push_back(byte);
      }
      if (word.symbols.size() > 1) {
        words_.push_back(std::move(word));
      }
    }
    for (size_t i = 0; i < words_.size(); ++i) {
      count(i, 1);
    }
    for (const auto& [pair, pair_count] : counts_) {
      heap_.push(candidate(pair, pair_count));
    }
  }

  /// Joins pairs seen at least `min_count` times until there are `most` symbols.
  void learn(size_t most, int64_t min_count) {
    while (spelling_.size() < most && !heap_.empty()) {
      const Candidate best = heap_.top();
      heap_.pop();
      const int64_t now = counts_[best.pair];
      if (now != best.count) {  // counts change under the heap; look again at today's
        if (now > 0) {
          heap_.push(candidate(best.pair, now));
        }
        continue;
      }
      if (now < min_count || now <= 0) {
        break;
      }
      join(best.pair);
    }
  }

  const std::vector<std::string>& spelling() const { return spelling_; }
  const std::vector<Pair>& merges() const { return merges_; }

 private:
  struct Candidate {
    int64_t count;
    std::string left, right;
    Pair pair;
    /// The most frequent first, and of equals the one that sorts first.
    bool operator<(const Candidate& other) const {
      if (count != other.count) {
        return count < other.count;
      }
      return std::tie(left, right) > std::tie(other.left, other.right);
    }
  };

  Candidate candidate(Pair pair, int64_t pair_count) const {
    return {pair_count, spelling_[static_cast<size_t>(pair.first)],
            spelling_[static_cast<size_t>(pair.second)], pair};
  }

  /// Adds (sign 1) or takes away (sign -1) the pairs of a word.
  void count(size_t index, int sign) {
    const Word& word = words_[index];
    for (size_t i = 0; i + 1 < word.symbols.size(); ++i) {
      const Pair pair{word.symbols[i], word.symbols[i + 1]};
      counts_[pair] += sign * word.count;
      if (sign > 0) {
        places_[pair].insert(index);
        fresh_.insert(pair);
      }
    }
  }

  void join(Pair pair) {
    const std::string joined =
        spelling_[static_cast<size_t>(pair.first)] + spelling_[static_cast<size_t>(pair.second)];
    // Two ways to join may spell the same token.
    const auto [known, fresh] = ids_.emplace(joined, static_cast<int32_t>(spelling_.size()));
    const int32_t id = known->second;
    if (fresh) {
      spelling_.push_back(joined);
    }
    merges_.push_back(pair);
    fresh_.clear();
    for (const size_t index : std::exchange(places_[pair], {})) {
      count(index, -1);
      std::vector<int32_t>& symbols = words_[index].symbols;
      size_t out = 0;
      for (size_t i = 0; i < symbols.size(); ++i) {
        const bool here =
            i + 1 < symbols.size() && symbols[i] == pair.first && symbols[i + 1] == pair.second;
        symbols[out++] = here ? id : symbols[i];
        i += here;
      }
      symbols.resize(out);
      count(index, 1);
    }
    counts_.erase(pair);
    for (const Pair& grown : fresh_) {
      if (const auto found = counts_.find(grown); found != counts_.end()) {
        heap_.push(candidate(grown, found->second));
      }
    }
  }

  std::vector<std::string> spelling_;   // of symbols, as bytes
  std::map<std::string, int32_t> ids_;  // the inverse
  std::vector<Pair> merges_;
  std::vector<Word> words_;
  std::map<Pair, int64_t> counts_;
  std::map<Pair, std::set<size_t>> places_;
  std::set<Pair> fresh_;  // pairs that the last join touched
  std::priority_queue<Candidate> heap_;
};

json added_token(const std::string& content, int32_t id) {
  return {{"id", id},        {"content", content},  {"single_word", false}, {"lstrip", false},
          {"rstrip", false}, {"normalized", false}, {"special", true}};
}

}  // namespace

std::string train_bpe(std::span<const std::string> texts, const BpeTraining& training) {
  const size_t specials = training.special_tokens.size();
  const auto size = static_cast<size_t>(std::max<int64_t>(training.vocab_size, 0));
  expect(
      size >= specials + 256,
      "[tokenizer] expected a vocab_size of at least {} ({} special tokens and 256 bytes), got {}",
      specials + 256, specials, training.vocab_size);
  const std::set<std::string> distinct(training.special_tokens.begin(),
                                       training.special_tokens.end());
  expect(distinct.size() == specials && !distinct.contains(""),
         "[tokenizer] expected distinct special tokens that are not empty");

  Trainer trainer(count_pieces(texts, training));
  trainer.learn(size - specials, training.min_count);

  json vocab = json::object();
  json merges = json::array();
  int32_t next = 0;
  json added = json::array();
  for (const std::string& special : training.special_tokens) {
    added.push_back(added_token(special, next));
    vocab[special] = next++;
  }
  for (const std::string& bytes : trainer.spelling()) {
    const std::string token = text::bytes_to_alphabet(bytes);
    expect(!vocab.contains(token), "[tokenizer] the special token {:?} is also learnt", token);
    vocab[token] = next++;
  }
  for (const auto& [left, right] : trainer.merges()) {
    merges.push_back({text::bytes_to_alphabet(trainer.spelling()[static_cast<size_t>(left)]),
                      text::bytes_to_alphabet(trainer.spelling()[static_cast<size_t>(right)])});
  }
  const json bytes = {{"type", "ByteLevel"},
                      {"add_prefix_space", false},
                      {"trim_offsets", true},
                      {"use_regex", false}};
  const json file = {{"version", "1.0"},
                     {"truncation", nullptr},
                     {"padding", nullptr},
                     {"added_tokens", added},
                     {"normalizer", nullptr},
                     {"pre_tokenizer", pretokenizer_spec(training.pattern)},
                     {"post_processor", bytes},
                     {"decoder", bytes},
                     {"model",
                      {{"type", "BPE"},
                       {"dropout", nullptr},
                       {"unk_token", nullptr},
                       {"continuing_subword_prefix", nullptr},
                       {"end_of_word_suffix", nullptr},
                       {"fuse_unk", false},
                       {"byte_fallback", false},
                       {"ignore_merges", false},
                       {"vocab", vocab},
                       {"merges", merges}}}};
  return file.dump(1);
}

TokenizerFiles train_tokenizer(const std::vector<std::string>& texts, int64_t vocab_size,
                               const std::vector<std::string>& special,
                               const std::string& chat_template) {
  expect(!special.empty(), "[tokenizer] expected at least one special token, the end of a text");
  BpeTraining training;
  training.vocab_size = vocab_size;
  training.special_tokens = special;
  json config = {{"tokenizer_class", "PreTrainedTokenizerFast"}, {"eos_token", special.front()}};
  if (!chat_template.empty()) {
    config["chat_template"] = chat_template;
  }
  return {train_bpe(texts, training) + "\n", config.dump(1) + "\n"};
}

}  // namespace cambium
