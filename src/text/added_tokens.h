// Added tokens: texts that become one token wherever they stand, before anything else looks.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace cambium::text {

struct AddedToken {
  std::string content;
  int32_t id = -1;
  bool special = false;      // left out by decode(skip_special)
  bool normalized = false;   // looked for in the normalised text
  bool single_word = false;  // only where no word character touches it
  bool lstrip = false;       // takes the white space before it along
  bool rstrip = false;       // and behind it
};

/// A stretch of text: a token (id >= 0) or text between tokens (id -1).
struct Segment {
  std::string_view text;
  int32_t id;
};

/// Finds added tokens: the leftmost, and of those the longest.
class AddedTokenMatcher {
 public:
  explicit AddedTokenMatcher(std::vector<AddedToken> tokens);

  bool empty() const { return tokens_.empty(); }
  /// Appends the segments of `text`; empty text has none.
  void split(std::string_view text, std::vector<Segment>& out) const;

 private:
  /// The longest token at the start of `text`: its index, or -1.
  int match(std::string_view text) const;

  struct Node {
    std::vector<std::pair<unsigned char, uint32_t>> children;  // sorted by byte
    int token = -1;
  };
  std::vector<AddedToken> tokens_;
  std::vector<Node> trie_;
  bool starts_[256] = {};  // bytes that begin a token
};

}  // namespace cambium::text
