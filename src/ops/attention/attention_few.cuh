// The kernel of few rows (attention_few_cuda.cu), as attention's forward pass calls it.
#pragma once

#include "ops/attention/attention_mma.cuh"

namespace cambium::cuda::attention {

/// The most rows of a tile of few rows.
inline constexpr int kFewRows = 16;

/// E: of the keys and values.
template <class E>
struct FewArgs {
  Layout layout;
  View<bf16> q;
  typename Stored<E>::Rows k, v;
  View<bf16> y;
  Partials partials;
  const Piece* pieces;
  const int32_t* first_piece;
  unsigned* done;
  int early;  // whether older keys in pages may be read before the kernel before this one is done
};

/// The form of the kernel that suits the segments of few rows.
template <class E>
class FewRows {
 public:
  explicit FewRows(const AttentionShape& shape);
  /// How many blocks take the pieces of a key-value head (Cut::blocks).
  int blocks_per_head() const { return blocks_per_head_; }
  /// Rows of a tile (Cut::few_rows).
  int tile_rows() const { return tile_rows_; }
  /// With `blocks` blocks for each key-value head.
  void launch(const FewArgs<E>& args, int64_t blocks, const Launch& on) const;

 private:
  int dim_;        // that heads are padded to
  int tile_rows_;  // 8 or 16
  int queries_;    // rows that a product takes: 8 or 16
  int blocks_per_head_;
};

}  // namespace cambium::cuda::attention
