// How attention's kernel of few rows brings keys and values to shared memory: which chunks a warp
// copies, where their rows lie, and the copies themselves.
#pragma once

#include "ops/attention/attention_few_products.cuh"

namespace cambium::cuda::attention {

/// How a block is made: its warps, the chunks of a ring, kG x 16 keys of a chunk, and the blocks
/// that a multiprocessor is to hold. Q x 8: the queries of a tile.
template <class Element, int kDimOf, int kQOf, int kWarpsOf, int kStagesOf, int kGOf, int kBlocksOf>
struct Form {
  using E = Element;
  static constexpr int kDim = kDimOf;
  static constexpr int kQ = kQOf;
  static constexpr int kQueries = kQ * 8;
  static constexpr int kWarps = kWarpsOf;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kStages = kStagesOf;
  static constexpr int kG = kGOf;
  static constexpr int kBlocks = kBlocksOf;
  static constexpr int kChunkKeys = kG * 16;
  static constexpr int kStep = kWarps * kChunkKeys;  // keys that the warps take together
  using Keys = Chunk<kDim, kChunkKeys, E>;
  static constexpr size_t kShared = size_t{kWarps} * kStages * Keys::kBytes;
  /// With a chunk less in its rings: the same results.
  using Shorter = Form<E, kDim, kQ, kWarps, kStages - 1, kG, kBlocks>;
};

/// The number of the warp, known to be the same in all its lanes.
__device__ __forceinline__ int warp_number() {
  return __shfl_sync(0xffffffffU, static_cast<int>(threadIdx.x) / 32, 0);
}

/// The power of two that a page's size is, or -1.
__device__ __forceinline__ int find_page_bits(int size) {
  return (size & (size - 1)) == 0 ? 31 - __clz(size) : -1;
}

/// Which chunks a warp copies, one after the other through all pieces of its block: a step ahead,
/// so that the page table's entries have arrived when their rows are copied.
template <class F>
class Walk {
 public:
  /// For pieces [piece, end).
  __device__ __forceinline__ Walk(const Layout& layout, const Piece* pieces, int piece, int end)
      : layout_(layout),
        pieces_(pieces),
        piece_(piece),
        end_(end),
        page_size_(layout.page_size),
        page_bits_(find_page_bits(page_size_)) {
    if (piece_ < end_) {
      begin_piece();
    }
    step();
  }
  /// Whether there is a chunk, and the row of key l % kChunkKeys of it: -1 where it is not read.
  __device__ __forceinline__ bool any() const { return piece_ < end_; }
  __device__ __forceinline__ int row() const { return exists_ ? page_ * page_size_ + offset_ : -1; }
  /// Whether all its keys were in pages before this call.
  __device__ __forceinline__ bool is_old() const {
    return position_ - F::kStep + F::kChunkKeys <= first_new_;
  }
  /// To the next chunk.
  __device__ __forceinline__ void step() {
    while (piece_ < end_ && position_ >= end_key_) {
      if (++piece_ < end_) {
        begin_piece();
      }
    }
    const int p = position_ + static_cast<int>(threadIdx.x) % F::kChunkKeys;
    exists_ = piece_ < end_ && p >= first_key_ && p < end_key_;
    if (table_ == nullptr) {
      offset_ = start_ + p;
    } else if (exists_) {
      const int page = page_bits_ >= 0 ? p >> page_bits_ : p / page_size_;
      offset_ = p - page * page_size_;
      page_ = table_[page];  // nothing waits for it before row()
    }
    position_ += F::kStep;
  }

 private:
  __device__ __forceinline__ void begin_piece() {
    const Tile& tile = pieces_[piece_].tile;
    first_key_ = tile.first_key;
    end_key_ = tile.end_key;
    position_ = first_key_ / F::kStep * F::kStep + warp_number() * F::kChunkKeys;
    start_ = layout_.start[tile.segment];
    table_ = layout_.table == nullptr
                 ? nullptr
                 : layout_.table + int64_t{tile.segment} * layout_.pages_per_segment;
    first_new_ = table_ == nullptr ? 0 : layout_.position[tile.segment];
  }

  const Layout& layout_;
  const Piece* pieces_;
  int piece_, end_;
  int page_size_;
  int page_bits_;     // -1: the size of a page is no power of two
  int position_ = 0;  // of the chunk after the one whose row is known
  int first_key_ = 0, end_key_ = 0;
  int start_ = 0;
  int first_new_ = 0;  // position of the call's first token
  const int32_t* table_ = nullptr;
  bool exists_ = false;
  int page_ = 0, offset_ = 0;  // of the key of this lane
};

/// Where a lane finds its 16 bytes of each row of a head.
template <class F>
struct Source {
  using E = typename F::E;
  static constexpr int kNumbers = 16 / static_cast<int>(sizeof(E));
  // Lanes for a row: a power of two, so that a lane has the same place in all of its rows.
  static constexpr int kLanes = F::kDim / kNumbers <= 4    ? 4
                                : F::kDim / kNumbers <= 8  ? 8
                                : F::kDim / kNumbers <= 16 ? 16
                                                           : 32;

  const char* at;
  uint32_t stride;  // bytes from row to row
  bool exists;      // else: zeros

  /// at + row * stride
  __device__ __forceinline__ const char* row(int row) const {
    const char* p;
    asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(p) : "r"(row), "r"(stride), "l"(at));
    return p;
  }
  __device__ __forceinline__ static int number() {
    return static_cast<int>(threadIdx.x) % kLanes * kNumbers;
  }
  __device__ __forceinline__ Source(const View<E>& rows, int dim, int kv_head)
      : at(reinterpret_cast<const char*>(rows.data + kv_head * rows.rows.inner_stride + number())),
        stride(static_cast<uint32_t>(rows.rows.outer_stride) * static_cast<uint32_t>(sizeof(E))),
        exists(number() < dim) {
    asm volatile("" : "+l"(at));  // worked out once, not for every chunk
  }
};

/// Begins to copy the keys and values of the rows that lanes 0 .. kChunkKeys - 1 have (-1: zeros).
template <class F>
__device__ __forceinline__ void copy_chunk(const Source<F>& k, const Source<F>& v, int mine,
                                           const typename F::Keys& to) {
  using S = Source<F>;
  constexpr int kRows = 32 / S::kLanes;  // at a time
  const int first = static_cast<int>(threadIdx.x) % 32 / S::kLanes;
  auto* key = to.key(first) + S::number();
  auto* value = to.value(first) + S::number();
#pragma unroll
  for (int i = 0; i < F::kChunkKeys; i += kRows) {
    const int row = __shfl_sync(0xffffffffU, mine, i + first);
    if (S::kLanes * S::kNumbers == F::kDim || S::number() < F::kDim) {
      copy_16(key + i * F::Keys::kRow, k.row(row), row >= 0 && k.exists);
      copy_16(value + i * F::Keys::kRow, v.row(row), row >= 0 && v.exists);
    }
  }
}

/// The scales of a chunk that is being copied: read when it begins, put in their places a chunk
/// later, when they have arrived.
template <int kKeys, class E>
struct Scales {
  template <class Keys>
  __device__ __forceinline__ void put(const Keys& /*to*/) const {}
  __device__ __forceinline__ void read(const FewArgs<E>& /*a*/, int /*kv_head*/, int /*row*/) {}
};
template <int kKeys>
struct Scales<kKeys, f8e4m3> {
  bf16 key{0}, value{0};

  template <class Keys>
  __device__ __forceinline__ void put(const Keys& to) const {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    if (lane < kKeys) {
      to.key_scales()[lane] = key;
      to.value_scales()[lane] = value;
    }
  }
  __device__ __forceinline__ void read(const FewArgs<f8e4m3>& a, int kv_head, int row) {
    key = value = bf16{0};
    if (row >= 0) {
      const uint64_t at = static_cast<uint64_t>(static_cast<uint32_t>(row)) *
                              static_cast<uint32_t>(a.layout.kv_heads) +
                          static_cast<uint32_t>(kv_head);
      key = a.k.scales[at];
      value = a.v.scales[at];
    }
  }
};

__device__ __forceinline__ const View<bf16>& rows_of(const View<bf16>& x) {
  return x;
}
__device__ __forceinline__ const View<f8e4m3>& rows_of(const ScaledRows& x) {
  return x.rows;
}

}  // namespace cambium::cuda::attention
