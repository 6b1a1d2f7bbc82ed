// What the tiles of attention's kernels in fp32 take of a block's shared memory, and so which tiles
// a device can have. Free of CUDA, so that it is tested everywhere.
#pragma once

#include <cstddef>
#include <cstdint>

#include "ops/shared_limit.h"

namespace cambium::cuda::attention {

/// Keys that a tile of rows walks at a time.
inline constexpr int kKeys = 64;

constexpr int padded(int dim) {
  return (dim + 3) / 4 * 4;
}
/// Floats from one row of a tile to the next: a quarter of it is odd.
constexpr int row_stride(int dim) {
  return padded(dim) / 4 % 2 == 0 ? padded(dim) + 4 : padded(dim);
}

/// Forward: q (rows, stride), then keys and after them values (kKeys, the larger stride),
/// probabilities (rows, kKeys + 4), the rows of the keys.
constexpr size_t forward_shared(int rows, int dim, int value_dim) {
  const int larger = row_stride(dim > value_dim ? dim : value_dim);
  const int floats = rows * row_stride(dim) + kKeys * larger + rows * (kKeys + 4);
  return static_cast<size_t>(floats) * sizeof(float) + kKeys * sizeof(int64_t);
}
/// Backward: a tile of rows and one of keys in dims D and Dv, weights (tile, tile + 4), and three
/// numbers of each row.
constexpr size_t backward_shared(int tile, int dim, int value_dim) {
  const int floats =
      2 * tile * (row_stride(dim) + row_stride(value_dim)) + tile * (tile + 4) + 3 * tile;
  return static_cast<size_t>(floats) * sizeof(float);
}

/// Rows of a tile of many, where a block may have `most` bytes of shared memory.
constexpr int forward_rows(size_t most, int dim, int value_dim) {
  return largest_tile(most, {64, 16},
                      [&](int rows) { return forward_shared(rows, dim, value_dim); });
}
/// Rows and keys of the backward pass's tiles; of dims past 128 a thread has registers for half.
constexpr int backward_tile(size_t most, int dim, int value_dim) {
  const auto bytes = [&](int tile) { return backward_shared(tile, dim, value_dim); };
  const int widest = dim > value_dim ? dim : value_dim;
  return widest <= 64    ? 64
         : widest <= 128 ? largest_tile(most, {64, 32}, bytes)
                         : largest_tile(most, {32, 16}, bytes);
}

}  // namespace cambium::cuda::attention
