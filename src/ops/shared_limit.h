// How much shared memory CUDA kernels reckon with. Free of CUDA, so that it is tested everywhere.
#pragma once

#include <cstddef>
#include <initializer_list>

namespace cambium {

/// What every device that kernels are compiled for gives a block without being asked, bytes.
inline constexpr size_t kSharedOfAll = 48 * 1024;
/// What sm_86, 89 and 120 give a block that asks for it: the least of all these devices.
inline constexpr size_t kSharedOfSm86 = 99 * 1024;

/// The bytes that a device gives a block, lowered to what CAMBIUM_CUDA_SHARED (`kib`; null: not
/// set) says in KiB, never raised. Error where that is no whole number or less than kSharedOfAll.
size_t shared_limit(size_t given, const char* kib);

/// The first of `tiles`, the largest first, of which a block takes at most `most` bytes; where none
/// does the last, and its launch says what is lacking.
template <class Bytes>
constexpr int largest_tile(size_t most, std::initializer_list<int> tiles, const Bytes& bytes) {
  int last = 0;
  for (const int tile : tiles) {
    last = tile;
    if (bytes(tile) <= most) {
      break;
    }
  }
  return last;
}

}  // namespace cambium
