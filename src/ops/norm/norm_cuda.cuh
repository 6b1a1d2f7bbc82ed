// What the CUDA kernels of norms share. kWidth threads of a block of 256 take a row and keep their
// part of it in registers, so that a row is read once whatever number of passes its formula has;
// rows too long for that are read again (kPer = 0). Backward kernels run a fixed number of blocks
// over the rows: a thread then meets the same columns in every row and sums a weight's gradient
// over them in registers. Partial sums per block are added in order by a second kernel.
#pragma once

#include "ops/cuda.cuh"

namespace cambium::cuda::norm {

constexpr int kThreads = 256;
/// Blocks of a backward kernel: four for each multiprocessor of an H100. A constant, as the order
/// of sums depends on it.
constexpr int64_t kBackwardBlocks = 528;

/// A row in threads: each holds kPer vectors of kVec elements, kWidth vectors apart; kPer = 0 is
/// any number that are not held.
template <int kVec_, int kWidth_, int kPer_>
struct Tile {
  static constexpr int kVec = kVec_, kWidth = kWidth_, kPer = kPer_;
  static constexpr int kRows = kThreads / kWidth;  // of a block at a time
  static constexpr int kHeld = kPer == 0 ? 1 : kPer;

  __device__ static int row() { return static_cast<int>(threadIdx.x) / kWidth; }

  /// Calls f(i, c) for this thread's vectors in a row: the i-th held begins at channel c.
  template <class F>
  __device__ static void each(int channels, const F& f) {
    const int first = static_cast<int>(threadIdx.x) % kWidth * kVec;
    if constexpr (kPer == 0) {
      for (int c = first; c < channels; c += kWidth * kVec) {
        f(0, c);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kPer; ++i) {
        if (first + i * kWidth * kVec < channels) {
          f(i, first + i * kWidth * kVec);
        }
      }
    }
  }

  /// Sums over the threads of a row, in each of them. All threads of the block call.
  template <int kN>
  __device__ static void sum(float (&value)[kN]) {
    constexpr int kLanes = kWidth < 32 ? kWidth : 32;
#pragma unroll
    for (float& v : value) {
#pragma unroll
      for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) {
        v += __shfl_xor_sync(0xffffffffU, v, lanes);
      }
    }
    if constexpr (kWidth > 32) {
      static_assert(kWidth == kThreads);
      __shared__ float part[kThreads / 32][kN];
      __syncthreads();  // the array may still be read from an earlier call
      if (threadIdx.x % 32 == 0) {
#pragma unroll
        for (int n = 0; n < kN; ++n) {
          part[threadIdx.x / 32][n] = value[n];
        }
      }
      __syncthreads();
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        value[n] = 0.0F;
#pragma unroll
        for (int warp = 0; warp < kThreads / 32; ++warp) {
          value[n] += part[warp][n];
        }
      }
    }
  }
};

/// This thread's part of a row, as it lies in memory; of nothing where `channels` is 0.
template <class Tile, class T>
class Held {
 public:
  using Vector = Packed<Tile::kVec, T>;
  __device__ Held(const T* row, int channels) : row_(row) {
    if constexpr (Tile::kPer > 0) {
      Tile::each(channels,
                 [&](int i, int c) { value_[i] = *reinterpret_cast<const Vector*>(row + c); });
    }
  }
  __device__ void get(int i, int c, float (&out)[Tile::kVec]) const {
    const Vector vector = Tile::kPer > 0 ? value_[i] : *reinterpret_cast<const Vector*>(row_ + c);
#pragma unroll
    for (int j = 0; j < Tile::kVec; ++j) {
      out[j] = load(&vector.value[j]);
    }
  }

 private:
  const T* row_;
  Vector value_[Tile::kHeld];
};

/// kVec elements of a weight: 16 bytes at a time.
template <int kVec>
__device__ __forceinline__ void load_weight(const float* p, float (&out)[kVec]) {
  constexpr int kStep = kVec < 4 ? kVec : 4;
#pragma unroll
  for (int j = 0; j < kVec; j += kStep) {
    float part[kStep];
    load_n<kStep>(p + j, part);
#pragma unroll
    for (int k = 0; k < kStep; ++k) {
      out[j + k] = part[k];
    }
  }
}

/// How a backward kernel divides its rows. Row r has weight r % weights: block b takes rows of
/// weight b % weights and of those the chunk b / weights.
struct Chunks {
  int64_t rows;  // of a weight
  int64_t weights;
  int64_t chunks;
  int64_t chunk;  // rows of a chunk

  constexpr int64_t blocks() const { return weights * chunks; }
};

inline Chunks chunks_of(int64_t rows, int64_t weights, int64_t rows_of_block) {
  const int64_t own = rows / weights;
  const int64_t most = ceil_div(own, rows_of_block);
  const int64_t wanted = ceil_div(kBackwardBlocks, weights);
  const int64_t chunks = most < wanted ? most : wanted;
  return {own, weights, chunks, chunks == 0 ? 0 : ceil_div(own, chunks)};
}

/// Calls f(row, channels) for the rows of this block, in every thread; channels is 0 where a thread
/// has no row but must take part in sums.
template <class Tile, class F>
__device__ void for_rows(const Chunks& chunks, int64_t channels, const F& f) {
  const int64_t weight = blockIdx.x % chunks.weights;
  const int64_t begin = blockIdx.x / chunks.weights * chunks.chunk;
  const int64_t end = begin + chunks.chunk < chunks.rows ? begin + chunks.chunk : chunks.rows;
  for (int64_t first = begin; first < end; first += Tile::kRows) {
    const int64_t k = first + Tile::row();
    const bool mine = k < end;
    f(weight + (mine ? k : begin) * chunks.weights, mine ? static_cast<int>(channels) : 0);
  }
}

/// Rows of partial sums that a backward kernel leaves for each chunk.
template <class Tile>
constexpr int64_t kPartialRows = Tile::kPer == 0 ? Tile::kRows : 1;

/// A thread's sums over the rows of its block, by column. `partial` is (chunks * kPartialRows,
/// weights, channels), or null where the sums are not wanted.
template <class Tile>
class ColumnSums {
 public:
  __device__ ColumnSums(float* partial, const Chunks& chunks, int64_t channels)
      : channels_(static_cast<int>(channels)) {
    if (partial != nullptr) {
      int64_t row = blockIdx.x / chunks.weights;
      if constexpr (Tile::kPer == 0) {
        row = row * Tile::kRows + Tile::row();
      }
      out_ = partial + (row * chunks.weights + blockIdx.x % chunks.weights) * channels;
      if constexpr (Tile::kPer == 0) {
        Tile::each(channels_, [&](int, int c) {
#pragma unroll
          for (int j = 0; j < Tile::kVec; ++j) {
            out_[c + j] = 0.0F;
          }
        });
      }
    }
  }
  __device__ void add(int i, int c, const float (&value)[Tile::kVec]) {
#pragma unroll
    for (int j = 0; j < Tile::kVec; ++j) {
      if constexpr (Tile::kPer > 0) {
        sum_[i][j] += value[j];
      } else if (out_ != nullptr) {
        out_[c + j] += value[j];
      }
    }
  }
  /// Adds up the rows of the block. All threads call, after the last row.
  __device__ void finish() const {
    if constexpr (Tile::kPer > 0) {
      if (out_ == nullptr) {
        return;
      }
      if constexpr (Tile::kRows == 1) {
        Tile::each(channels_, [&](int i, int c) {
#pragma unroll
          for (int j = 0; j < Tile::kVec; ++j) {
            out_[c + j] = sum_[i][j];
          }
        });
      } else {
        __shared__ float all[kThreads * Tile::kHeld * Tile::kVec];  // (kRows, channels)
        __syncthreads();
        Tile::each(channels_, [&](int i, int c) {
#pragma unroll
          for (int j = 0; j < Tile::kVec; ++j) {
            all[Tile::row() * channels_ + c + j] = sum_[i][j];
          }
        });
        __syncthreads();
        for (int c = static_cast<int>(threadIdx.x); c < channels_; c += kThreads) {
          float sum = 0.0F;
          for (int row = 0; row < Tile::kRows; ++row) {
            sum += all[row * channels_ + c];
          }
          out_[c] = sum;
        }
      }
    }
  }

 private:
  int channels_;
  float* out_ = nullptr;
  float sum_[Tile::kHeld][Tile::kVec] = {};
};

/// out[c] += the sum over rows of partial (rows, columns): 32 columns a block, whose 32 warps take
/// every 32nd row. A template, so that more than one file may have it.
template <int = 0>
__global__ void __launch_bounds__(1024)
    add_partial_sums(const float* partial, int64_t rows, int64_t columns, float* out) {
  __shared__ float part[32][32];
  const int64_t column = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x;
  float sum = 0.0F;
  if (column < columns) {
#pragma unroll 4
    for (int64_t r = threadIdx.y; r < rows; r += 32) {
      sum += partial[r * columns + column];
    }
  }
  part[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y == 0 && column < columns) {
    sum = 0.0F;
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      sum += part[i][threadIdx.x];
    }
    out[column] += sum;
  }
}

/// Scratch for partial sums of a weight's gradient and, after the kernel that fills it, their sum.
template <class Tile>
class WeightGrad {
 public:
  WeightGrad(const Launch& on, const Chunks& chunks, int64_t channels, float* grad)
      : rows_(chunks.chunks * kPartialRows<Tile>),
        columns_(chunks.weights * channels),
        grad_(grad),
        partial_(grad == nullptr || rows_ == 0 ? nullptr : scratch<float>(on, rows_ * columns_)) {}
  float* partial() const { return partial_; }
  void add(const Launch& on, const char* operation) const {
    if (partial_ != nullptr) {
      launch(on, operation, add_partial_sums<>, static_cast<unsigned>(ceil_div(columns_, 32)),
             dim3(32, 32), 0, partial_, rows_, columns_, grad_);
    }
  }

 private:
  int64_t rows_, columns_;
  float* grad_;
  float* partial_;
};

/// Calls f(Tile) with the tile for rows of `channels` elements of T.
template <class T, class F>
void with_tile(int64_t channels, bool vectors, const F& f) {
  constexpr int kVec = 16 / sizeof(T);
  const int64_t n = channels / kVec;
  if (!vectors) {
    channels <= 512 ? f(Tile<1, 32, 0>{}) : f(Tile<1, kThreads, 0>{});
  } else if (n <= 16) {
    f(Tile<kVec, 8, 2>{});
  } else if (n <= 32) {
    f(Tile<kVec, 32, 1>{});
  } else if (n <= 128) {
    f(Tile<kVec, 32, 4>{});
  } else if (n <= 512) {
    f(Tile<kVec, kThreads, 2>{});
  } else if (n <= 768) {
    f(Tile<kVec, kThreads, 3>{});
  } else if (n <= 1024) {
    f(Tile<kVec, kThreads, 4>{});
  } else {
    f(Tile<kVec, kThreads, 0>{});
  }
}

/// The row of this thread in a forward kernel, and those after it where there are fewer blocks than
/// rows ask for: as in for_rows, all threads take part.
template <class Tile>
struct ForwardRow {
  __device__ ForwardRow(int64_t rows, int64_t channels)
      : rows_(rows),
        channels_(static_cast<int>(channels)),
        first_(int64_t{blockIdx.x} * Tile::kRows) {
    place();
  }
  __device__ bool any() const { return first_ < rows_; }
  __device__ void next() {
    first_ += int64_t{gridDim.x} * Tile::kRows;
    place();
  }
  int64_t index;
  int channels;

 private:
  __device__ void place() {
    const int64_t row = first_ + Tile::row();
    channels = row < rows_ ? channels_ : 0;
    index = row < rows_ ? row : 0;
  }
  int64_t rows_;
  int channels_;
  int64_t first_;  // of the block's
};
template <class Tile>
unsigned forward_blocks(int64_t rows) {
  return static_cast<unsigned>(ceil_div(rows, Tile::kRows));
}

}  // namespace cambium::cuda::norm
