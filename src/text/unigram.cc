#include "text/unigram.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "base/error.h"
#include "text/unicode.h"

namespace cambium::text {
namespace {

constexpr double kUnknownPenalty = 10.0;  // below the lowest score

}  // namespace

Unigram::Unigram(const UnigramConfig& config)
    : unknown_(config.unknown), byte_fallback_(config.byte_fallback) {
  expect(!config.vocab.empty(), "[tokenizer] expected a Unigram vocabulary of at least one token");
  expect(unknown_ >= -1 && unknown_ < static_cast<int32_t>(config.vocab.size()),
         "[tokenizer] model.unk_id is {}, but the vocabulary has {} tokens", unknown_,
         config.vocab.size());
  size_t bytes = 0;
  for (const auto& [spelling, score] : config.vocab) {
    expect(std::isfinite(score), "[tokenizer] the score of token {:?} is not a finite number",
           spelling);
    bytes += spelling.size();
  }
  children_.reserve(bytes);
  token_.push_back(-1);
  double lowest = std::numeric_limits<double>::infinity();
  std::fill(std::begin(byte_ids_), std::end(byte_ids_), -1);
  for (size_t id = 0; id < config.vocab.size(); ++id) {
    const auto& [spelling, score] = config.vocab[id];
    scores_.push_back(score);
    lowest = std::min(lowest, score);
    int32_t node = 0;
    for (const char c : spelling) {
      const auto byte = static_cast<int32_t>(static_cast<unsigned char>(c));
      int32_t next = children_.find(node, byte).id;
      if (next < 0) {
        next = static_cast<int32_t>(token_.size());
        token_.push_back(-1);
        children_.insert(node, byte, {0, next});
      }
      node = next;
    }
    if (!spelling.empty()) {
      token_[static_cast<size_t>(node)] = static_cast<int32_t>(id);
    }
    if (spelling.size() == 6 && spelling.starts_with("<0x") && spelling[5] == '>') {
      const auto digits = spelling.substr(3, 2);
      if (digits.find_first_not_of("0123456789ABCDEF") == std::string::npos) {
        byte_ids_[std::stoi(digits, nullptr, 16)] = static_cast<int32_t>(id);
      }
    }
  }
  unknown_score_ = lowest - kUnknownPenalty;
}

void Unigram::unknown(std::string_view part, std::vector<int32_t>& out) const {
  const auto known = [&](char c) { return byte_ids_[static_cast<unsigned char>(c)] >= 0; };
  if (byte_fallback_ && std::all_of(part.begin(), part.end(), known)) {
    for (const char c : part) {
      out.push_back(byte_ids_[static_cast<unsigned char>(c)]);
    }
    return;
  }
  expect(unknown_ >= 0, "[tokenizer] no token spells {:?}, and there is no token for the unknown",
         std::string(part));
  out.push_back(unknown_);
}

// The best cut of the first n bytes ends with a token that begins where another best cut ends.
void Unigram::encode(std::string_view piece, std::vector<int32_t>& out) const {
  struct Best {
    double score = 0.0;
    size_t begin = 0;  // of the last token
    int32_t id = -1;   // -1: a character that no token spells
    bool reached = false;
  };
  std::vector<Best> best(piece.size() + 1);
  best[0].reached = true;
  const auto offer = [&](size_t begin, size_t end, double score, int32_t id) {
    Best& at = best[end];
    if (!at.reached || score > at.score) {
      at = {score, begin, id, true};
    }
  };
  for (size_t begin = 0; begin < piece.size();) {
    const size_t character = std::min(decode_utf8(piece, begin).length, piece.size() - begin);
    const double so_far = best[begin].score;
    bool single = false;  // the character alone is a token
    int32_t node = 0;
    for (size_t end = begin; end < piece.size();) {
      node = children_.find(node, static_cast<unsigned char>(piece[end])).id;
      if (node < 0) {
        break;
      }
      ++end;
      if (const int32_t id = token_[static_cast<size_t>(node)]; id >= 0) {
        offer(begin, end, so_far + scores_[static_cast<size_t>(id)], id);
        single = single || end == begin + character;
      }
    }
    if (!single) {
      offer(begin, begin + character, so_far + unknown_score_, -1);
    }
    begin += character;
  }
  std::vector<std::pair<size_t, size_t>> spans;  // from last to first
  std::vector<int32_t> ids;
  for (size_t end = piece.size(); end > 0;) {
    const Best& at = best[end];
    // Neighbouring unknown characters are one unknown part.
    const bool unknown_token = at.id < 0 || at.id == unknown_;
    if (unknown_token && !ids.empty() && ids.back() < 0) {
      spans.back().first = at.begin;
    } else {
      spans.emplace_back(at.begin, end);
      ids.push_back(unknown_token ? -1 : at.id);
    }
    end = at.begin;
  }
  for (size_t i = ids.size(); i-- > 0;) {
    if (ids[i] >= 0) {
      out.push_back(ids[i]);
    } else {
      unknown(piece.substr(spans[i].first, spans[i].second - spans[i].first), out);
    }
  }
}

}  // namespace cambium::text
