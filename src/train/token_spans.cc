#include "train/token_spans.h"

#include <algorithm>
#include <string>

namespace cambium {
namespace {

bool is_space(char c) {
  return c == ' ' || c == '\t' || c == '\n' || c == '\r';
}

/// Tokens that `text` cut at `cut` and the whole begin with alike.
size_t tokens_before(const Tokenizer& tokenizer, std::string_view text, size_t cut,
                     std::span<const int32_t> ids) {
  const std::vector<int32_t> apart = tokenizer.encode(text.substr(0, cut), false);
  const auto [mine, theirs] = std::mismatch(apart.begin(), apart.end(), ids.begin(), ids.end());
  (void)theirs;
  return static_cast<size_t>(mine - apart.begin());
}

}  // namespace

std::vector<TextSpan> token_spans(const Tokenizer& tokenizer, std::string_view text,
                                  std::span<const int32_t> ids) {
  std::vector<TextSpan> spans;
  spans.reserve(ids.size());
  size_t at = 0;
  for (const int32_t id : ids) {
    std::string_view bytes = tokenizer.token_bytes(id);
    if (!text.substr(at).starts_with(bytes)) {
      // A prefix space that the text does not have; white space that an added token swallowed.
      if (bytes.starts_with(' ') && text.substr(at).starts_with(bytes.substr(1))) {
        bytes.remove_prefix(1);
      } else {
        size_t next = at;
        while (next < text.size() && is_space(text[next])) {
          ++next;
        }
        if (next > at && text.substr(next).starts_with(bytes)) {
          at = next;
        } else if (tokenizer.is_special(id)) {
          bytes = {};
        } else {
          return {};
        }
      }
    }
    spans.push_back({at, at + bytes.size()});
    at += bytes.size();
  }
  while (at < text.size() && is_space(text[at])) {
    ++at;
  }
  return at == text.size() ? spans : std::vector<TextSpan>();
}

std::vector<uint8_t> tokens_of_parts(const Tokenizer& tokenizer, std::string_view text,
                                     std::span<const int32_t> ids,
                                     std::span<const TextSpan> parts) {
  std::vector<uint8_t> inside(ids.size(), 0);
  const std::vector<TextSpan> spans = token_spans(tokenizer, text, ids);
  if (spans.size() == ids.size()) {
    size_t part = 0;
    for (size_t t = 0; t < ids.size(); ++t) {
      while (part < parts.size() && parts[part].end <= spans[t].begin) {
        ++part;
      }
      inside[t] = part < parts.size() && spans[t].end > parts[part].begin ? 1 : 0;
    }
    return inside;
  }
  for (const TextSpan& part : parts) {
    const size_t begin = tokens_before(tokenizer, text, part.begin, ids);
    const size_t end =
        part.end == text.size() ? ids.size() : tokens_before(tokenizer, text, part.end, ids);
    for (size_t t = begin; t < end; ++t) {
      inside[t] = 1;
    }
  }
  return inside;
}

}  // namespace cambium
