// Which bytes of a text each of its tokens stands for: to learn a part of a text that was tokenized
// as a whole.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "text/tokenizer.h"

namespace cambium {

/// Bytes [begin, end) of a text.
struct TextSpan {
  size_t begin = 0;
  size_t end = 0;
};

/// The bytes of each token of `ids`, the encoding of `text`. A token that stands for no byte of the
/// text (a begin token, the prefix space of SentencePiece) has an empty span where it stands. Empty
/// when the tokens cannot be laid along the text, because a normaliser rewrote it.
std::vector<TextSpan> token_spans(const Tokenizer& tokenizer, std::string_view text,
                                  std::span<const int32_t> ids);

/// For each token of `ids` whether it stands for a byte of one of `parts`, which are in order and
/// apart. Where tokens cannot be laid along the text, a part begins with the first token that
/// differs from the encoding of what stands before it.
std::vector<uint8_t> tokens_of_parts(const Tokenizer& tokenizer, std::string_view text,
                                     std::span<const int32_t> ids, std::span<const TextSpan> parts);

}  // namespace cambium
