// The tokens that each token of a call may look at. Free of containers, for kernels.
#pragma once

#include <cstdint>

namespace cambium {

/// Tokens are chosen in pieces of `size` neighbours: piece i of a sequence has the positions
/// [i size, (i + 1) size). A token at position `own` looks at whole pieces and, last, at what there
/// is of the piece that it is in: the pieces of its list, of which its own is the last where pieces
/// are larger than a token. Without a choice it looks at all up to itself.
struct ChosenTokens {
  const int32_t* pieces =
      nullptr;         // (T, lists, budget) ascending, where kernels find them; or null
  int64_t budget = 0;  // most pieces of a list
  int64_t size = 1;
  int64_t lists = 1;  // of a token: one for each of so many groups of heads
  /// Only pieces that are whole are chosen, and what a token has after the last of them comes
  /// besides.
  bool tail = false;

  constexpr bool defined() const { return pieces != nullptr; }
  /// What a token sees of the piece that is always its list's last.
  constexpr int64_t last_piece(int64_t own) const {
    return tail ? (own + 1) % size : own % size + 1;
  }
  /// How many a token at position `own` looks at.
  constexpr int64_t count(int64_t own) const {
    if (pieces == nullptr) {
      return own + 1;
    }
    const int64_t most = size == 1 && !tail ? budget : (budget - 1) * size + last_piece(own);
    return most < own + 1 ? most : own + 1;
  }
  /// The i-th of a list. Lists are counted over tokens and the lists of a token.
  constexpr int64_t position(int64_t list, int64_t i) const {
    if (pieces == nullptr) {
      return i;
    }
    return size == 1 ? pieces[list * budget + i]
                     : pieces[list * budget + i / size] * size + i % size;
  }
  /// Whether the token of a list, at position `own`, looks at position p.
  constexpr bool has(int64_t list, int64_t own, int64_t p) const {
    const int64_t seen = count(own);
    if (p > own || seen == own + 1) {
      return p <= own;
    }
    const int64_t piece = p / size;
    const int64_t all = (seen + size - 1) / size;
    int64_t first = 0;
    int64_t end = all;
    while (first < end) {
      const int64_t middle = (first + end) / 2;
      if (pieces[list * budget + middle] < piece) {
        first = middle + 1;
      } else {
        end = middle;
      }
    }
    return first < all && pieces[list * budget + first] == piece;
  }
};

}  // namespace cambium
