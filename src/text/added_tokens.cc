#include "text/added_tokens.h"

#include <algorithm>
#include <utility>

#include "text/unicode.h"

namespace cambium::text {
namespace {

size_t character_before(std::string_view text, size_t at) {
  do {
    --at;
  } while (at > 0 && (static_cast<unsigned char>(text[at]) & 0xC0) == 0x80);
  return at;
}

bool word_touches(std::string_view text, size_t begin, size_t end) {
  return (begin > 0 && is_word(decode_utf8(text, character_before(text, begin)).code_point)) ||
         (end < text.size() && is_word(decode_utf8(text, end).code_point));
}

size_t extend_left(std::string_view text, size_t begin, size_t least) {
  while (begin > least) {
    const size_t before = character_before(text, begin);
    if (!is_white_space(decode_utf8(text, before).code_point)) {
      break;
    }
    begin = before;
  }
  return begin;
}

size_t extend_right(std::string_view text, size_t end) {
  while (end < text.size()) {
    const Decoded d = decode_utf8(text, end);
    if (!is_white_space(d.code_point)) {
      break;
    }
    end += d.length;
  }
  return end;
}

}  // namespace

AddedTokenMatcher::AddedTokenMatcher(std::vector<AddedToken> tokens)
    : tokens_(std::move(tokens)), trie_(1) {
  for (size_t i = 0; i < tokens_.size(); ++i) {
    uint32_t node = 0;
    for (const unsigned char byte : tokens_[i].content) {
      auto& children = trie_[node].children;
      const auto place = std::lower_bound(children.begin(), children.end(),
                                          std::pair<unsigned char, uint32_t>(byte, 0));
      if (place != children.end() && place->first == byte) {
        node = place->second;
      } else {
        const auto fresh = static_cast<uint32_t>(trie_.size());
        children.insert(place, {byte, fresh});
        trie_.emplace_back();
        node = fresh;
      }
    }
    trie_[node].token = static_cast<int>(i);
    starts_[static_cast<unsigned char>(tokens_[i].content[0])] = true;
  }
}

int AddedTokenMatcher::match(std::string_view text) const {
  uint32_t node = 0;
  int best = -1;
  for (const unsigned char byte : text) {
    const auto& children = trie_[node].children;
    const auto place = std::lower_bound(children.begin(), children.end(),
                                        std::pair<unsigned char, uint32_t>(byte, 0));
    if (place == children.end() || place->first != byte) {
      break;
    }
    node = place->second;
    if (trie_[node].token >= 0) {
      best = trie_[node].token;
    }
  }
  return best;
}

void AddedTokenMatcher::split(std::string_view text, std::vector<Segment>& out) const {
  size_t done = 0;
  size_t at = 0;
  while (!tokens_.empty() && at < text.size()) {
    if (!starts_[static_cast<unsigned char>(text[at])]) {
      ++at;
      continue;
    }
    const int found = match(text.substr(at));
    if (found < 0) {
      ++at;
      continue;
    }
    const AddedToken& token = tokens_[static_cast<size_t>(found)];
    size_t begin = at;
    size_t end = at + token.content.size();
    at = end;
    if (token.single_word && word_touches(text, begin, end)) {
      continue;
    }
    if (token.lstrip) {
      begin = extend_left(text, begin, std::min(done, begin));
    }
    if (token.rstrip) {
      end = extend_right(text, end);
    }
    if (done < begin) {
      out.push_back({text.substr(done, begin - done), -1});
    }
    out.push_back({text.substr(begin, end - begin), token.id});
    done = end;
  }
  if (done < text.size()) {
    out.push_back({text.substr(done), -1});
  }
}

}  // namespace cambium::text
