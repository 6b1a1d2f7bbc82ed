#include "base/parallel.h"
#include "ops/attention/key_rows_simd.h"
#include "ops/rows_simd.h"
#include "ops/selection/selection_work.h"

namespace cambium::CAMBIUM_ISA {
namespace {

void score(const ChooseTokens<float>& a, int64_t s, int64_t t, int64_t own, float* scores) {
  float key[kMaxKernelHeadDim];
  for (int64_t p = 0; p <= own; ++p) {
    load_numbers(a.keys, a.shape.key_row(s, p), key);
    float sum = 0.0F;
    for (int64_t h = 0; h < a.shape.heads; ++h) {
      const float dot = dot_rows(a.q.row(t, h), key, a.shape.head_dim);
      sum += a.weight.row(t)[h] * (dot > 0.0F ? dot : 0.0F);
    }
    scores[p] = sum;
  }
}

inline uint32_t bits_of(float x) {
  uint32_t bits = 0;
  std::memcpy(&bits, &x, sizeof bits);
  return ordered_bits(bits);
}

/// The budget-th largest of the scores as ordered bits, by one digit of 8 bits after the other;
/// left is how many of those equal to it are among the budget largest.
uint32_t threshold(const float* scores, int64_t count, int64_t budget, int64_t& left) {
  uint32_t prefix = 0;
  left = budget;
  for (int shift = 24; shift >= 0; shift -= 8) {
    int64_t counts[256] = {};
    const uint32_t mask = shift == 24 ? 0U : 0xffffffffU << (shift + 8);
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t bits = bits_of(scores[i]);
      counts[(bits >> shift) & 0xffU] += (bits & mask) == prefix ? 1 : 0;
    }
    uint32_t digit = 255;
    while (counts[digit] < left) {
      left -= counts[digit];
      --digit;
    }
    prefix |= digit << shift;
  }
  return prefix;
}

}  // namespace

void choose_piece(const ChoosePiece& piece) {
  const ChooseTokens<float>& a = piece.in;
  parallel_for(piece.last - piece.first, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t t = piece.first + i;
      const int64_t own = a.shape.first_position(piece.segment) + t - a.shape.start[piece.segment];
      int32_t* to = a.positions + t * a.budget;
      if (own < a.budget) {
        for (int64_t p = 0; p <= own; ++p) {
          to[p] = static_cast<int32_t>(p);
        }
        continue;
      }
      float* scores = piece.scores + i * piece.longest;
      score(a, piece.segment, t, own, scores);
      int64_t left = 0;
      const uint32_t least = threshold(scores, own + 1, a.budget, left);
      for (int64_t p = 0; p <= own; ++p) {
        const uint32_t bits = bits_of(scores[p]);
        if (bits > least || (bits == least && left-- > 0)) {
          *to++ = static_cast<int32_t>(p);
        }
      }
    }
  });
}

}  // namespace cambium::CAMBIUM_ISA
