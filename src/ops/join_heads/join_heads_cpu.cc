#include "base/parallel.h"
#include "base/simd.h"
#include "ops/join_heads/join_heads_kernels.h"

namespace cambium::CAMBIUM_ISA {
namespace {

constexpr int64_t kElementsPerPiece = 8192;

/// Tokens of a piece.
inline int64_t tokens_per_piece(const JoinHeads<float>& j) {
  return kElementsPerPiece / (j.heads() * j.y.channels + 1) + 1;
}

inline void add(float* to, const float* from, int64_t count) {
  for (int64_t c = 0; c < count; c += kLanes) {
    vstore_upto(to + c, vload_upto(to + c, count - c) + vload_upto(from + c, count - c), count - c);
  }
}

}  // namespace

void join_heads_forward(const JoinHeads<float>& j) {
  const auto a_bytes = static_cast<size_t>(j.a.channels) * sizeof(float);
  const auto b_bytes = static_cast<size_t>(j.b.channels) * sizeof(float);
  parallel_for(j.a.rows.outer, tokens_per_piece(j), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t h = 0; h < j.heads(); ++h) {
        std::memcpy(j.y.row(t, h), j.a.row(t, h), a_bytes);
        std::memcpy(j.y.row(t, h) + j.a.channels, j.b.row(t, j.shared() ? 0 : h), b_bytes);
      }
    }
  });
}

void join_heads_backward(const JoinHeads<float>& j) {
  parallel_for(j.a.rows.outer, tokens_per_piece(j), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t h = 0; h < j.heads(); ++h) {
        const float* dy = j.y.grad_row(t, h);
        if (j.a.grad != nullptr) {
          add(j.a.grad_row(t, h), dy, j.a.channels);
        }
        if (j.b.grad != nullptr) {
          add(j.b.grad_row(t, j.shared() ? 0 : h), dy + j.a.channels, j.b.channels);
        }
      }
    }
  });
}

}  // namespace cambium::CAMBIUM_ISA
