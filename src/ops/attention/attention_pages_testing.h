// What the tests of attention over pages share: a cache that is filled piece by piece, and what one
// pass over the whole gives.
#pragma once

#include <cstring>
#include <numeric>

#include "base/float16.h"
#include "ops/attention/attention.h"
#include "ops/testing.h"
#include "tensor/workspace.h"

namespace cambium::testing::pages {

struct Case {
  int64_t tokens, heads, kv_heads, dim, value_dim, window, page_size;
  Dtype pages = Dtype::kF32;
  int64_t sinks = 0;
  float softcap = 0.0F;
  bool sink_logits = false;
};

/// Sequences with their queries, keys and values, and a cache whose unused memory is NaN; on a CUDA
/// device with activations of f32 or bf16. Batch-invariant, results are not compared with the
/// definition.
class Cached {
 public:
  Cached(const Case& c, int sequences, uint64_t seed, Device device = {},
         Dtype activations = Dtype::kF32, bool batch_invariant = false)
      : c_(c),
        per_sequence_((c.tokens + c.page_size - 1) / c.page_size),
        device_(device),
        activations_(activations),
        batch_invariant_(batch_invariant),
        workspace_(device) {
    const int64_t t = c.tokens * sequences;
    auto values = testing::draw({{{t, c.heads, c.dim}, -2, 2},
                                 {{t, c.kv_heads, c.dim}, -2, 2},
                                 {{t, c.kv_heads, c.value_dim}}},
                                seed);
    for (auto& input : values) {
      input = as_stored(input, activations);
    }
    fill(q_, {t, c.heads, c.dim}, values[0]);
    fill(k_, {t, c.kv_heads, c.dim}, values[1]);
    fill(v_, {t, c.kv_heads, c.value_dim}, values[2]);
    const auto logits = testing::draw({{{c.heads}, -2, 4}}, seed)[0];
    sink_logits_ = OwnedTensor(Dtype::kF32, {c.heads}, false, device);
    testing::put(sink_logits_.view, logits);
    const int64_t pages = per_sequence_ * sequences + 3;
    keys_ = OwnedTensor(c.pages, {pages, c.page_size, c.kv_heads, c.dim}, false, device);
    values_ = OwnedTensor(c.pages, {pages, c.page_size, c.kv_heads, c.value_dim}, false, device);
    if (c.pages == Dtype::kF8E4M3) {
      key_scales_ = OwnedTensor(Dtype::kBF16, {pages, c.page_size, c.kv_heads}, false, device);
      value_scales_ = OwnedTensor(Dtype::kBF16, {pages, c.page_size, c.kv_heads}, false, device);
    }
    order_.resize(static_cast<size_t>(pages));
    std::iota(order_.begin(), order_.end(), 0);
    std::shuffle(order_.begin(), order_.end(), std::mt19937_64(seed));
    if (batch_invariant) {
      return;
    }
    expected_ =
        testing::run_operation<double>(
            [&](Context& ctx, const std::vector<Tensor>& in) {
              std::vector<int32_t> start;
              for (int s = 0; s <= sequences; ++s) {
                start.push_back(static_cast<int32_t>(s * c.tokens));
              }
              const std::vector<int32_t> position(static_cast<size_t>(sequences));
              return attention(ctx, in[0], in[1], in[2], {start, position, {}}, config(in[3]));
            },
            {{{t, c.heads, c.dim}},
             {{t, c.kv_heads, c.dim}},
             {{t, c.kv_heads, c.value_dim}},
             {{c.heads}}},
            {values[0], as_paged(values[1], c.dim, c.pages),
             as_paged(values[2], c.value_dim, c.pages), logits},
            true, false)
            .output;
  }

  AttentionConfig config(const Tensor& sink_logits) const {
    return {.scale = 0.5F,
            .window = c_.window,
            .sinks = c_.sinks,
            .softcap = c_.softcap,
            .sink_logits = c_.sink_logits ? sink_logits : Tensor{}};
  }

  /// Forgets everything.
  void poison() {
    const WorkspaceScope scope(workspace_);
    for_each_part([&](const Tensor& part) { poison(part); });
    poison(workspace_.arena().empty(Dtype::kU8, {poisoned_scratch_}));
  }

  /// A piece of sequence s: tokens [first, first + count).
  struct Piece {
    int s;
    int64_t first, count;
  };

  /// Runs the pieces as one packed call, pages out of reach missing from the table and poisoned,
  /// and returns the largest error.
  double run(const std::vector<Piece>& pieces, bool reference = false) {
    const WorkspaceScope scope(workspace_);
    Context ctx = workspace_.context(activations_);
    ctx.reference = reference;
    ctx.batch_invariant = batch_invariant_;
    std::vector<int32_t> start = {0};
    std::vector<int32_t> position;
    std::vector<int32_t> table;
    for (const Piece& piece : pieces) {
      start.push_back(start.back() + static_cast<int32_t>(piece.count));
      position.push_back(static_cast<int32_t>(piece.first));
      const int64_t reach =
          c_.window > 0 ? std::max<int64_t>(0, piece.first - c_.window + 1) : int64_t{0};
      for (int64_t p = 0; p < per_sequence_; ++p) {
        const auto page = order_[static_cast<size_t>(piece.s * per_sequence_ + p)];
        const bool seen = p >= reach / c_.page_size || p * c_.page_size < c_.sinks;
        const bool needed = seen && p * c_.page_size < piece.first + piece.count;
        table.push_back(needed ? page : -1);
        if (!needed) {
          for_each_part([&](const Tensor& part) { poison(part.slice(0, page, 1)); });
        }
      }
    }
    const int64_t t = start.back();
    const Tensor q = gather(q_.view, pieces, t);
    const Tensor k = gather(k_.view, pieces, t);
    const Tensor v = gather(v_.view, pieces, t);
    const KvPages pages = {keys_.view,    values_.view,     table,
                           per_sequence_, key_scales_.view, value_scales_.view};
    const Tensor y =
        attention(ctx, q, k, v, {start, position, {}}, config(sink_logits_.view), &pages);
    last_ = testing::take(y);
    if (batch_invariant_) {
      return 0.0;
    }
    std::vector<double> expected;
    const int64_t row = c_.heads * c_.value_dim;
    for (const Piece& piece : pieces) {
      const auto from = expected_.begin() + (piece.s * c_.tokens + piece.first) * row;
      expected.insert(expected.end(), from, from + piece.count * row);
    }
    return t == 0 ? 0.0 : testing::relative_error(last_, expected, 1.0);
  }

  const std::vector<double>& last() const { return last_; }
  /// For kernels that take more scratch.
  void poison_scratch(int64_t bytes) { poisoned_scratch_ = bytes; }

 private:
  template <class F>
  void for_each_part(const F& f) const {
    for (const OwnedTensor* part : {&keys_, &values_, &key_scales_, &value_scales_}) {
      if (part->view.defined()) {
        f(part->view);
      }
    }
  }
  void poison(const Tensor& t) const {
    device_.kind == Device::kCpu
        ? static_cast<void>(std::memset(t.data, 0xff, static_cast<size_t>(t.bytes())))
        : fill_memory(t.data, device_, 0xff, t.bytes());
  }
  void fill(OwnedTensor& t, std::initializer_list<int64_t> shape,
            const std::vector<double>& values) const {
    t = OwnedTensor(activations_, shape, false, device_);
    testing::put(t.view, values);
  }
  Tensor gather(const Tensor& all, const std::vector<Piece>& pieces, int64_t t) {
    const Tensor out = workspace_.arena().empty(activations_, {t, all.dim(1), all.dim(2)});
    int64_t at = 0;
    for (const Piece& piece : pieces) {
      copy(out.slice(0, at, piece.count),
           all.slice(0, piece.s * c_.tokens + piece.first, piece.count));
      at += piece.count;
    }
    return out;
  }

  Case c_;
  int64_t per_sequence_;
  Device device_;
  Dtype activations_;
  bool batch_invariant_;
  OwnedTensor q_, k_, v_, keys_, values_, key_scales_, value_scales_, sink_logits_;
  Workspace workspace_;  // kept: a fresh one for each of thousands of calls is mostly page faults
  std::vector<int32_t> order_;
  std::vector<double> expected_;
  std::vector<double> last_;
  int64_t poisoned_scratch_ = int64_t{1} << 20;
};

inline std::ostream& operator<<(std::ostream& out, const Case& c) {
  out << c.tokens << "_tokens_" << c.heads << "_on_" << c.kv_heads << "_heads_of_" << c.dim;
  if (c.value_dim != c.dim) {
    out << "_and_" << c.value_dim;
  }
  if (c.window > 0) {
    out << "_window_" << c.window;
  }
  if (c.sinks > 0) {
    out << "_sinks_" << c.sinks;
  }
  if (c.softcap > 0) {
    out << "_cap_" << static_cast<int>(100 * c.softcap);
  }
  if (c.sink_logits) {
    out << "_logits";
  }
  return out << "_pages_of_" << c.page_size
             << (c.pages == Dtype::kBF16     ? "_bf16"
                 : c.pages == Dtype::kF8E4M3 ? "_f8"
                                             : "");
}

inline constexpr double kTolerance = 5e-6;
/// On CUDA heads are wider: scores that sum 256 products reach 50, whose rounding in fp32 shows. By
/// kernels of bf16 a probability and the result, of values up to 1, are each rounded by 2^-9 of
/// themselves at most; the rest is room.
inline constexpr double kCudaTolerance = 2e-5;
inline constexpr double kNarrowTolerance = 6e-3;

inline double tolerance_of(Dtype activations) {
  return activations == Dtype::kBF16 ? kNarrowTolerance : kCudaTolerance;
}

/// Calls body(c, activations) for the activations that go with each type of pages on a CUDA device.
template <class Body>
void for_each_on_cuda(Case c, const Body& body) {
  constexpr std::pair<Dtype, Dtype> kTypes[] = {{Dtype::kF32, Dtype::kF32},
                                                {Dtype::kF32, Dtype::kBF16},
                                                {Dtype::kF32, Dtype::kF8E4M3},
                                                {Dtype::kBF16, Dtype::kBF16},
                                                {Dtype::kBF16, Dtype::kF8E4M3}};
  for (const auto& [activations, pages] : kTypes) {
    SCOPED_TRACE(std::string("cuda ") + dtype_name(activations) + " over pages of " +
                 dtype_name(pages));
    c.pages = pages;
    body(c, activations);
  }
}

}  // namespace cambium::testing::pages
