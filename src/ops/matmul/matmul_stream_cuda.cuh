// What the streamed products share (matmul_stream_cuda.cu, matmul_stream_tensor_cuda.cu).
#pragma once

#include <cstdint>

#include "ops/cuda.cuh"
#include "ops/cuda_bulk.cuh"
#include "ops/matmul/matmul_cuda.cuh"

namespace cambium::cuda {

inline constexpr int kStreamWarps = 16;  // that multiply
inline constexpr int kBringer = kStreamWarps;
inline constexpr int kFinisher = kStreamWarps + 1;
inline constexpr int kStreamThreads = (kStreamWarps + 2) * 32;
inline constexpr int kVector = 8;  // columns of 16 bytes

struct StreamProduct {
  const bf16* weight;
  const float* bias;
  bf16* y;
  int64_t y_stride;
  int32_t first_row;  // of all products' rows
  int32_t accumulate;
};
struct StreamRows {
  const bf16* x;
  int64_t x_stride;
  int32_t rows;  // of all weights
  int32_t k;
  int32_t count;      // of products
  int32_t team_bits;  // a row's warps are 1 << team_bits
  int32_t stages;
  int32_t before_inputs;  // whether weights may be read before the kernels before this one are done
  int32_t dealt;          // of the rows: evenly, before it begins; blocks draw the others
  int32_t drawn;          // at once
  int32_t last_draw;      // the number of the last one that blocks make, in vain
  int32_t ahead;          // stages that may be on their way when the next rows are drawn
  StreamProduct each[kMaxMatmuls];
};

/// As many rows as there are teams at most, of one weight; none: there is nothing left.
struct Tile {
  int row;
  int rows;
  int product;
};

/// The tiles of a block, for the thread that brings them: its even share of the rows that are
/// dealt, and then of the others as many as it is in time for, as memory serves some
/// multiprocessors faster than others. Who sums a row does not change its sum.
///
/// `turn` numbers the draws of all blocks. It is zero between products: each block draws in vain
/// once, and the last draw there is makes it zero again. It may be the same for all products of a
/// device, as they have one stream and nobody draws before the kernels before this one are done.
class Tiles {
 public:
  __device__ explicit Tiles(const StreamRows& a)
      : row_(static_cast<int>(int64_t{a.dealt} * blockIdx.x / gridDim.x)),
        end_(static_cast<int>(int64_t{a.dealt} * (blockIdx.x + 1) / gridDim.x)) {}
  /// Whether the next one is drawn.
  __device__ bool draws() const { return drew_; }
  __device__ Tile next(const StreamRows& a) {
    if (row_ == end_ && drew_) {
      row_ = static_cast<int>(min(a.dealt + int64_t{draw_} * a.drawn, int64_t{a.rows}));
      end_ = min(row_ + a.drawn, a.rows);
    }
    while (product_ + 1 < a.count && row_ >= a.each[product_ + 1].first_row) {
      ++product_;
    }
    const int last = product_ + 1 < a.count ? min(end_, a.each[product_ + 1].first_row) : end_;
    const Tile tile = {row_, max(0, min(last - row_, kStreamWarps >> a.team_bits)), product_};
    row_ += tile.rows;
    return tile;
  }
  /// Once a tile is on its way: draws where it was the last in hand, so that the answer is there
  /// when the next one is wanted. The first draw waits for the kernels before this one.
  __device__ void look_ahead(const StreamRows& a, unsigned* turn) {
    if (row_ == end_ && a.dealt < a.rows) {
      await_inputs();
      draw_ = atomicInc(turn, static_cast<unsigned>(a.last_draw));
      drew_ = true;
    }
  }

 private:
  int row_, end_;
  int product_ = 0;
  unsigned draw_ = 0;
  bool drew_ = false;
};

/// Deals half of the rows to `blocks` blocks, and at least what the ring holds, `ring_tiles` each,
/// since it is filled before draws may be made. The others are to be drawn by `drawn` rows; where
/// they are fewer than one a block, all are dealt.
void deal_rows(StreamRows& a, int64_t blocks, int64_t ring_tiles, int64_t drawn);

/// Multiplies three to eight rows of x by tensor cores. False, and nothing done, where the widths
/// do not suit it. `a` is filled but for team_bits and stages.
bool stream_by_tensor_cores(StreamRows a, int64_t x_rows, const Launch& on);

}  // namespace cambium::cuda
