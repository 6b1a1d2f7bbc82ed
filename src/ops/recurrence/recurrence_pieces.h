// Private to the operation on CUDA: in how many pieces a sequence is walked at once.
//
// A state is linear in the one it came from: S_after = M S_before + Z. So the chunks of a later
// piece of a sequence need not wait for those before it: one walk of it begins with a state of zero
// and ends with Z, and one, with values of zero, begins with the identity and ends with M. The
// state that came is multiplied in when it is there. That takes more walks of fewer chunks, so it
// is for few heads and long sequences, whose walks leave most of a device idle.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>

namespace cambium {

/// A piece of fewer chunks is not worth what it takes to put pieces together.
inline constexpr int64_t kLeastPiece = 32;
inline constexpr int64_t kMostPieces = 4;
/// Two walk as long as one does, as their blocks have more columns.
inline constexpr int64_t kFewestPieces = 3;

/// How many pieces a sequence of so many chunks has in a call whose sequences have `most` at most.
constexpr int64_t pieces_of(int64_t chunks, int64_t most) {
  return std::clamp<int64_t>(chunks / kLeastPiece, 1, most);
}
/// The first chunk of a piece; of the piece after the last one: `chunks`.
constexpr int64_t piece_begin(int64_t chunks, int64_t pieces, int64_t piece) {
  return chunks * piece / pieces;
}
/// The piece that has a chunk.
constexpr int64_t piece_at(int64_t chunks, int64_t pieces, int64_t chunk) {
  int64_t piece = 0;
  while (piece + 1 < pieces && chunk >= piece_begin(chunks, pieces, piece + 1)) {
    ++piece;
  }
  return piece;
}

/// A number of its own for the later piece whose first chunk that is, of all chunks of a call: no
/// two of them begin within kLeastPiece chunks.
constexpr int64_t piece_place(int64_t first_chunk) {
  return first_chunk / kLeastPiece;
}

/// A call on a device, where each head of a first piece is walked by so many blocks, and of a later
/// one, which has a second walk, by more.
struct PieceCosts {
  int64_t heads;
  int64_t first_blocks, later_blocks;  // a head
  int64_t resident_blocks;             // that the device holds at once
};

/// The most pieces for which all walks are at once on the device and leave an eighth of it to those
/// who read what they leave; 1: none is cut. `chunks`: of the sequences of a call that are walked
/// chunk by chunk.
constexpr int64_t most_pieces(std::span<const int64_t> chunks, const PieceCosts& costs) {
  for (int64_t most = kMostPieces; most >= kFewestPieces; --most) {
    int64_t blocks = 0;
    bool reached = false;
    for (const int64_t count : chunks) {
      const int64_t pieces = pieces_of(count, most);
      blocks += costs.heads * (costs.first_blocks + (pieces - 1) * costs.later_blocks);
      reached = reached || pieces == most;
    }
    if (reached && 8 * blocks <= 7 * costs.resident_blocks) {
      return most;
    }
  }
  return 1;
}

}  // namespace cambium
