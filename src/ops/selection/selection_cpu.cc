#include "base/parallel.h"
#include "ops/attention/key_rows_simd.h"
#include "ops/rows_simd.h"
#include "ops/selection/selection_work.h"

namespace cambium::CAMBIUM_ISA {
namespace {

/// The scores of the candidates of the token at `own`, list after list, `longest` apart. r has room
/// for a number of each head.
void score(const ChooseTokens<float>& a, int64_t s, int64_t t, int64_t own, int64_t longest,
           float* scores, float* r) {
  const int64_t size = a.chosen.size;
  const int64_t heads = a.shape.heads;
  float key[kMaxKernelHeadDim];
  for (int64_t i = 0; i < a.candidates(own); ++i) {
    if (i >= a.first_local(own)) {
      for (int64_t list = 0; list < a.chosen.lists; ++list) {
        scores[list * longest + i] = INFINITY;
      }
      continue;
    }
    const int64_t end = own + 1 < (i + 1) * size ? own + 1 : (i + 1) * size;
    for (int64_t p = i * size; p < end; ++p) {
      load_numbers(a.keys, a.shape.key_row(s, p), key);
      for (int64_t h = 0; h < heads; ++h) {
        const float dot = dot_rows(a.q.row(t, h), key, a.shape.head_dim);
        const bool first = p == i * size;
        if (a.chosen.tail) {
          r[h] = first ? dot : r[h] + dot;
        } else {
          r[h] = first || dot > r[h] ? dot : r[h];
        }
      }
    }
    float sum = 0.0F;
    for (int64_t h = 0; h < heads; ++h) {
      const float score = a.chosen.tail ? r[h] / static_cast<float>(size) : r[h];
      if (a.weight.defined()) {
        sum += a.weight.row(t)[h] * (score > 0.0F ? score : 0.0F);
      } else {
        scores[h * longest + i] = score;
      }
    }
    if (a.weight.defined()) {
      scores[i] = sum;
    }
  }
}

inline uint32_t bits_of(float x) {
  uint32_t bits = 0;
  std::memcpy(&bits, &x, sizeof bits);
  return ordered_bits(bits);
}

/// The top-th largest of the scores as ordered bits, by one digit of 8 bits after the other; left
/// is how many of those equal to it are among the top.
uint32_t threshold(const float* scores, int64_t count, int64_t top, int64_t& left) {
  uint32_t prefix = 0;
  left = top;
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

/// The `top` best of the scores, ascending; the place after them.
int32_t* choose_best(const float* scores, int64_t count, int64_t top, int32_t* to) {
  int64_t left = 0;
  const uint32_t least = threshold(scores, count, top, left);
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = bits_of(scores[i]);
    if (bits > least || (bits == least && left-- > 0)) {
      *to++ = static_cast<int32_t>(i);
    }
  }
  return to;
}

}  // namespace

void choose_piece(const ChoosePiece& piece) {
  const ChooseTokens<float>& a = piece.in;
  const int64_t lists = a.chosen.lists;
  parallel_for(piece.last - piece.first, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t t = piece.first + i;
      const int64_t own = a.shape.first_position(piece.segment) + t - a.shape.start[piece.segment];
      const int64_t count = a.candidates(own);
      float* scores = piece.scores + i * piece.room;
      if (count > a.top()) {
        score(a, piece.segment, t, own, piece.longest, scores, scores + lists * piece.longest);
      }
      for (int64_t list = 0; list < lists; ++list) {
        int32_t* to = a.pieces + (t * lists + list) * a.chosen.budget;
        if (count > a.top()) {
          to = choose_best(scores + list * piece.longest, count, a.top(), to);
        } else {
          for (int64_t p = 0; p < count; ++p) {
            *to++ = static_cast<int32_t>(p);
          }
        }
        if (a.has_tail(own)) {
          *to = static_cast<int32_t>(count);
        }
      }
    }
  });
}

}  // namespace cambium::CAMBIUM_ISA
