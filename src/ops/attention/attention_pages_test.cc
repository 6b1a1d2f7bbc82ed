// Attention over cached keys and values: every way to cut a sequence gives what one pass gives.
#include <cstring>
#include <numeric>

#include "base/float16.h"
#include "base/parallel.h"
#include "base/testing.h"
#include "ops/attention/attention.h"
#include "ops/testing.h"
#include "tensor/workspace.h"

#if CAMBIUM_CUDA
#include "ops/attention/attention_cudnn.h"
#endif

namespace cambium {
namespace {

using testing::as_paged;
using testing::as_stored;
using testing::for_each_isa;
using testing::on_cuda;

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

std::ostream& operator<<(std::ostream& out, const Case& c) {
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

class AttentionPages : public ::testing::TestWithParam<Case> {};

constexpr double kTolerance = 5e-6;
/// On CUDA heads are wider: scores that sum 256 products reach 50, whose rounding in fp32 shows. By
/// kernels of bf16 a probability and the result, of values up to 1, are each rounded by 2^-9 of
/// themselves at most; the rest is room.
constexpr double kCudaTolerance = 2e-5;
constexpr double kNarrowTolerance = 6e-3;

double tolerance_of(Dtype activations) {
  return activations == Dtype::kBF16 ? kNarrowTolerance : kCudaTolerance;
}

void expect_splits_agree(const Case& c, Cached& cached, double tolerance, bool reference) {
  cached.poison();
  ASSERT_LE(cached.run({{0, 0, c.tokens}}, reference), tolerance) << "one pass";
  for (int64_t cut = 1; cut < c.tokens; ++cut) {
    cached.poison();
    ASSERT_LE(cached.run({{0, 0, cut}}, reference), tolerance) << "up to " << cut;
    ASSERT_LE(cached.run({{0, cut, c.tokens - cut}}, reference), tolerance) << "from " << cut;
  }
  for (const int64_t step : {1, 3, 17}) {
    cached.poison();
    for (int64_t t = 0; t < c.tokens; t += step) {
      ASSERT_LE(cached.run({{0, t, std::min(step, c.tokens - t)}}, reference), tolerance)
          << "steps of " << step << " at " << t;
    }
  }
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

TEST_P(AttentionPages, EverySplitEqualsOnePass) {
  const Case& c = GetParam();
  Cached cached(c, 1, 7);
  for_each_isa([&] { expect_splits_agree(c, cached, kTolerance, false); });
  if (c.tokens <= 50) {
    expect_splits_agree(c, cached, kTolerance, true);
  }
}

class AttentionPagesOnCuda : public ::testing::TestWithParam<Case> {};

TEST_P(AttentionPagesOnCuda, EverySplitEqualsOnePass) {
  if (!on_cuda()) {
    GTEST_SKIP() << why_no_cuda();
  }
  for_each_on_cuda(GetParam(), [](const Case& c, Dtype activations) {
    Cached cached(c, 1, 7, Device::kCuda, activations);
    expect_splits_agree(c, cached, tolerance_of(activations), false);
  });
}

// Those of the CPU, and the dims and groups that have kernels of their own.
INSTANTIATE_TEST_SUITE_P(
    Shapes, AttentionPagesOnCuda,
    ::testing::Values(Case{40, 4, 2, 16, 16, 0, 16}, Case{70, 4, 2, 16, 16, 0, 64},
                      Case{70, 4, 2, 32, 16, 20, 16}, Case{80, 3, 1, 64, 64, 9, 1},
                      Case{45, 6, 2, 7, 5, 1, 5}, Case{66, 18, 1, 24, 40, 0, 7},
                      Case{100, 8, 2, 64, 64, 0, 16}, Case{70, 4, 1, 96, 96, 0, 16},
                      Case{70, 8, 2, 128, 128, 33, 32}, Case{66, 16, 1, 128, 64, 0, 16},
                      Case{40, 2, 1, 256, 256, 0, 16}, Case{40, 2, 2, 192, 128, 0, 16},
                      Case{150, 14, 2, 64, 64, 0, 128}, Case{70, 14, 2, 64, 64, 20, 256}),
    ::testing::PrintToStringParamName());
INSTANTIATE_TEST_SUITE_P(Sinks, AttentionPagesOnCuda,
                         ::testing::Values(Case{70, 4, 2, 32, 16, 20, 16, {}, 5},
                                           Case{90, 8, 2, 64, 64, 20, 16, {}, 16},
                                           Case{80, 3, 1, 64, 64, 9, 1, {}, 3},
                                           Case{45, 6, 2, 7, 5, 1, 5, {}, 100},
                                           Case{90, 8, 2, 128, 128, 10, 32, {}, 30},
                                           Case{100, 16, 1, 128, 64, 7, 16, {}, 1},
                                           Case{70, 4, 1, 96, 96, 30, 16, {}, 17},
                                           Case{60, 2, 1, 256, 256, 12, 16, {}, 20}),
                         ::testing::PrintToStringParamName());

// bf16 and f8 pages hold rounded numbers, and every token sees those, however its sequence is cut:
// beside the definition over rounded keys and values the error is that of fp32 pages.
INSTANTIATE_TEST_SUITE_P(Bf16, AttentionPages,
                         ::testing::Values(Case{40, 4, 2, 16, 16, 0, 16, Dtype::kBF16},
                                           Case{70, 4, 2, 32, 16, 20, 16, Dtype::kBF16},
                                           Case{45, 6, 2, 7, 5, 1, 5, Dtype::kBF16},
                                           Case{66, 18, 1, 24, 40, 0, 7, Dtype::kBF16}),
                         ::testing::PrintToStringParamName());
INSTANTIATE_TEST_SUITE_P(F8, AttentionPages,
                         ::testing::Values(Case{40, 4, 2, 16, 16, 0, 16, Dtype::kF8E4M3},
                                           Case{70, 4, 2, 32, 16, 20, 16, Dtype::kF8E4M3},
                                           Case{45, 6, 2, 7, 5, 1, 5, Dtype::kF8E4M3},
                                           Case{66, 18, 1, 24, 40, 0, 7, Dtype::kF8E4M3},
                                           Case{80, 3, 1, 64, 64, 9, 1, Dtype::kF8E4M3}),
                         ::testing::PrintToStringParamName());

INSTANTIATE_TEST_SUITE_P(
    Shapes, AttentionPages,
    ::testing::Values(Case{40, 4, 2, 16, 16, 0, 16}, Case{70, 4, 2, 16, 16, 0, 64},
                      Case{70, 4, 2, 32, 16, 20, 16}, Case{80, 3, 1, 64, 64, 9, 1},
                      Case{45, 6, 2, 7, 5, 1, 5}, Case{66, 18, 1, 24, 40, 0, 7},
                      Case{40, 14, 2, 64, 64, 0, 128}, Case{40, 4, 2, 16, 16, 9, 256}),
    ::testing::PrintToStringParamName());

// Sinks within a page, a whole page, more than the window, more than the sequence, in pages of one
// token; those of the middle are given away while later tokens are computed.
INSTANTIATE_TEST_SUITE_P(Sinks, AttentionPages,
                         ::testing::Values(Case{70, 4, 2, 32, 16, 20, 16, Dtype::kF32, 5},
                                           Case{70, 4, 2, 16, 16, 20, 16, Dtype::kF32, 16},
                                           Case{70, 4, 2, 16, 16, 9, 7, Dtype::kF32, 30},
                                           Case{45, 6, 2, 7, 5, 1, 5, Dtype::kF32, 100},
                                           Case{80, 3, 1, 64, 64, 9, 1, Dtype::kF32, 1},
                                           Case{66, 18, 1, 24, 40, 8, 7, Dtype::kBF16, 3},
                                           Case{45, 6, 2, 7, 5, 4, 5, Dtype::kBF16, 5},
                                           Case{70, 4, 2, 32, 16, 20, 16, Dtype::kF8E4M3, 17}),
                         ::testing::PrintToStringParamName());

// A soft cap, and sinks that have a score and no value, alone and together.
INSTANTIATE_TEST_SUITE_P(
    Bends, AttentionPages,
    ::testing::Values(Case{40, 4, 2, 16, 16, 0, 16, Dtype::kF32, 0, 0.8F},
                      Case{45, 6, 2, 7, 5, 4, 5, Dtype::kBF16, 5, 2.0F},
                      Case{40, 4, 2, 16, 16, 0, 16, Dtype::kF32, 0, 0.0F, true},
                      Case{45, 6, 2, 7, 5, 9, 5, Dtype::kF8E4M3, 3, 0.0F, true},
                      Case{66, 18, 1, 24, 40, 0, 7, Dtype::kBF16, 0, 1.5F, true}),
    ::testing::PrintToStringParamName());
INSTANTIATE_TEST_SUITE_P(Bends, AttentionPagesOnCuda,
                         ::testing::Values(Case{70, 4, 2, 32, 16, 20, 16, {}, 0, 0.8F},
                                           Case{45, 6, 2, 7, 5, 4, 5, {}, 5, 2.0F},
                                           Case{90, 8, 2, 64, 64, 0, 16, {}, 0, 0.0F, true},
                                           Case{45, 6, 2, 7, 5, 9, 5, {}, 3, 0.0F, true},
                                           Case{66, 16, 1, 128, 64, 20, 16, {}, 0, 0.0F, true},
                                           Case{70, 4, 1, 96, 96, 0, 16, {}, 0, 0.0F, true},
                                           Case{40, 2, 1, 256, 256, 0, 16, {}, 0, 1.5F, true}),
                         ::testing::PrintToStringParamName());

void expect_far_pieces_agree(const Case& c, Cached& cached, double tolerance) {
  cached.poison();
  ASSERT_LE(cached.run({{0, 0, 1100}}), tolerance);
  ASSERT_LE(cached.run({{0, 1100, 300}}), tolerance);
  for (int64_t t = 1400; t < c.tokens; t += 20) {
    ASSERT_LE(cached.run({{0, t, 3}}), tolerance);
    ASSERT_LE(cached.run({{0, t + 3, 1}}), tolerance);
    ASSERT_LE(cached.run({{0, t + 4, 16}}), tolerance);
  }
}

TEST(AttentionPagesLong, DecodeAndPrefillFarIntoASequence) {
  // Many splits, a window that skips most of them, and sinks that are in some.
  for (const Dtype pages : {Dtype::kF32, Dtype::kBF16, Dtype::kF8E4M3}) {
    for (const auto& [window, sinks] : {std::pair{0, 0}, {700, 0}, {300, 10}, {60, 300}}) {
      const Case c = {1500, 3, 1, 16, 16, window, 64, pages, sinks};
      Cached cached(c, 1, 3);
      for_each_isa([&] { expect_far_pieces_agree(c, cached, kTolerance); });
    }
  }
}

TEST(AttentionPagesLong, SinkLogitsJoinManySplits) {
  const Case c = {1500, 3, 1, 16, 16, 0, 64, Dtype::kF32, 0, 1.5F, true};
  Cached cached(c, 1, 3);
  for_each_isa([&] { expect_far_pieces_agree(c, cached, kTolerance); });
  if (!on_cuda()) {
    return;
  }
  for (const float softcap : {0.0F, 1.5F}) {
    for (const int64_t dim : {16, 128}) {
      for_each_on_cuda({1500, 4, 1, dim, dim, 0, 64, {}, 0, softcap, true},
                       [](const Case& each, Dtype activations) {
                         Cached both(each, 1, 3, Device::kCuda, activations);
                         expect_far_pieces_agree(each, both, tolerance_of(activations));
                       });
    }
  }
}

TEST(AttentionPagesLong, OnCuda) {
  if (!on_cuda()) {
    GTEST_SKIP() << why_no_cuda();
  }
  for (const auto& [window, sinks] : {std::pair{0, 0}, {700, 0}, {60, 300}}) {
    for_each_on_cuda({1500, 3, 1, 16, 16, window, 64, {}, sinks},
                     [](const Case& c, Dtype activations) {
                       Cached cached(c, 1, 3, Device::kCuda, activations);
                       expect_far_pieces_agree(c, cached, tolerance_of(activations));
                     });
  }
}

// The dims of models, whose bf16 has kernels of its own.
TEST(AttentionPagesLong, WideHeadsOnCuda) {
  if (!on_cuda()) {
    GTEST_SKIP() << why_no_cuda();
  }
  for (const auto& [window, sinks] : {std::pair{0, 0}, {300, 10}}) {
    for_each_on_cuda({1500, 2, 1, 128, 128, window, 16, {}, sinks},
                     [](const Case& c, Dtype activations) {
                       Cached cached(c, 1, 3, Device::kCuda, activations);
                       expect_far_pieces_agree(c, cached, tolerance_of(activations));
                     });
  }
}

/// Prefill, a longer prefill, an empty segment, then chunks beside single steps; returns the
/// results of the last call and those of its pieces by themselves.
std::pair<std::vector<double>, std::vector<double>> run_batch(Cached& cached, double tolerance) {
  cached.poison();
  EXPECT_LE(cached.run({{0, 0, 100}, {1, 0, 290}, {2, 0, 0}, {3, 0, 5}}), tolerance);
  EXPECT_LE(cached.run({{0, 100, 150}, {1, 290, 1}, {2, 0, 64}, {3, 5, 1}}), tolerance);
  const std::vector<Cached::Piece> step = {{0, 250, 1}, {1, 291, 1}, {2, 64, 30}, {3, 6, 2}};
  EXPECT_LE(cached.run(step), tolerance);
  const auto together = cached.last();
  std::vector<double> apart;
  for (const auto& piece : step) {
    EXPECT_LE(cached.run({piece}), tolerance);
    apart.insert(apart.end(), cached.last().begin(), cached.last().end());
  }
  EXPECT_LE(cached.run(step), tolerance);
  EXPECT_EQ(cached.last(), together) << "two runs differ";
  return {together, apart};
}

TEST(AttentionPagesBatch, SequencesAtDifferentPlacesTogetherAndApart) {
  for (const Case& c :
       {Case{300, 4, 2, 16, 16, 0, 16}, Case{300, 4, 2, 16, 16, 50, 16, Dtype::kF32, 20}}) {
    Cached cached(c, 4, 5);
    for_each_isa([&] {
      const auto [together, apart] = run_batch(cached, kTolerance);
      EXPECT_EQ(together, apart);
    });
  }
}

TEST(AttentionPagesBatch, OnCuda) {
  if (!on_cuda()) {
    GTEST_SKIP() << why_no_cuda();
  }
  for (const auto& shape :
       {Case{300, 4, 2, 16, 16, 0, 16}, Case{300, 4, 2, 64, 64, 0, 16},
        Case{300, 8, 1, 128, 128, 50, 64}, Case{300, 4, 2, 64, 64, 50, 16, {}, 20}}) {
    for_each_on_cuda(shape, [](const Case& c, Dtype activations) {
      Cached cached(c, 4, 5, Device::kCuda, activations);
      const auto [together, apart] = run_batch(cached, tolerance_of(activations));
      EXPECT_EQ(together, apart) << "keys are split by the segment alone";
    });
  }
}

// So many heads that a block takes several sequences, and some of the last one's keys.
TEST(AttentionPagesBatch, BlocksOfManySequencesOnCuda) {
  if (!on_cuda()) {
    GTEST_SKIP() << why_no_cuda();
  }
  for (const Dtype pages : {Dtype::kBF16, Dtype::kF8E4M3}) {
    SCOPED_TRACE(dtype_name(pages));
    Cached cached({330, 150, 150, 16, 16, 0, 16, pages}, 3, 5, Device::kCuda, Dtype::kBF16);
    const double tolerance = tolerance_of(Dtype::kBF16);
    cached.poison();
    EXPECT_LE(cached.run({{0, 0, 329}, {1, 0, 317}, {2, 0, 200}}), tolerance);
    const std::vector<Cached::Piece> step = {{0, 329, 1}, {1, 317, 1}, {2, 200, 1}};
    EXPECT_LE(cached.run(step), tolerance);
    const auto first = cached.last();
    EXPECT_LE(cached.run(step), tolerance);
    EXPECT_EQ(cached.last(), first) << "two runs differ";
  }
}

#if CAMBIUM_CUDA
using cuda::attention::allow_cudnn;
using cuda::attention::cudnn_calls;
using cuda::attention::cudnn_status;
using cuda::attention::limit_gathered;

/// A cache for activations in bf16, everything in it poisoned.
class PrefillCache : public Cached {
 public:
  PrefillCache(const Case& c, int sequences, Dtype pages = Dtype::kBF16)
      : Cached(with_pages(c, pages), sequences, 13, Device::kCuda, Dtype::kBF16) {
    poison_scratch(int64_t{80} << 20);
    poison();
  }

 private:
  static Case with_pages(Case c, Dtype pages) {
    c.pages = pages;
    return c;
  }
};

/// Pieces of prompts that cuDNN serves where there is one, and our own kernels elsewhere.
class AttentionPrefill : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!on_cuda()) {
      GTEST_SKIP() << why_no_cuda();
    }
    allow_cudnn(true);
    served_ = cudnn_status().rfind("cuDNN", 0) == 0;
  }
  void TearDown() override {
    if (on_cuda()) {
      allow_cudnn(true);
      limit_gathered(0);
    }
  }

  /// Runs the pieces, in so many calls of cuDNN.
  void expect_right(Cached& cached, const std::vector<Cached::Piece>& pieces, int64_t calls) {
    const int64_t before = cudnn_calls();
    const double error = cached.run(pieces);
    EXPECT_LE(error, kNarrowTolerance);
    EXPECT_EQ(cudnn_calls() - before, served_ ? calls : 0) << cudnn_status();
  }

  bool served_ = false;
};

class AttentionPrefillShapes : public AttentionPrefill, public ::testing::WithParamInterface<Case> {
 protected:
  void expect_splits_right(const Case& c, Dtype pages) {
    PrefillCache cached(c, 1, pages);
    expect_right(cached, {{0, 0, c.tokens}}, 1);
    // Cuts on and beside the ends of pages and of tiles, and of what is served.
    for (const int64_t cut : {1, 128, 255, 256, 257, 300, 512, 513, 640, 721}) {
      SCOPED_TRACE(cut);
      for (const bool allowed : {true, false}) {
        allow_cudnn(allowed);
        cached.poison();
        expect_right(cached, {{0, 0, cut}}, allowed && cut >= 256 ? 1 : 0);
        expect_right(cached, {{0, cut, c.tokens - cut}}, allowed && c.tokens - cut >= 256 ? 1 : 0);
      }
      allow_cudnn(true);
    }
    for (const int64_t step : {256, 300}) {
      SCOPED_TRACE(step);
      cached.poison();
      for (int64_t t = 0; t < c.tokens; t += step) {
        const int64_t count = std::min(step, c.tokens - t);
        expect_right(cached, {{0, t, count}}, count >= 256 ? 1 : 0);
        const auto once = cached.last();
        expect_right(cached, {{0, t, count}}, count >= 256 ? 1 : 0);
        EXPECT_EQ(cached.last(), once) << "two runs differ";
      }
    }
  }
};

TEST_P(AttentionPrefillShapes, EverySplitEqualsOnePass) {
  for (const Dtype pages : {Dtype::kBF16, Dtype::kF8E4M3}) {
    SCOPED_TRACE(dtype_name(pages));
    expect_splits_right(GetParam(), pages);
  }
}

INSTANTIATE_TEST_SUITE_P(
    Shapes, AttentionPrefillShapes,
    ::testing::Values(Case{1000, 4, 1, 64, 64, 0, 16}, Case{976, 4, 1, 128, 128, 0, 64},
                      Case{1000, 4, 1, 128, 128, 300, 16}, Case{900, 2, 2, 64, 64, 33, 5},
                      Case{1000, 4, 2, 64, 64, 1, 16}, Case{900, 4, 2, 128, 64, 700, 16},
                      Case{900, 2, 1, 96, 96, 0, 7}, Case{900, 2, 1, 256, 256, 0, 16}),
    ::testing::PrintToStringParamName());

TEST_F(AttentionPrefill, BesideTokensOfOtherSequences) {
  for (const auto& c : {Case{900, 8, 2, 64, 64, 0, 16}, Case{900, 4, 1, 128, 128, 350, 16}}) {
    SCOPED_TRACE(::testing::PrintToString(c));
    PrefillCache cached(c, 6);
    // Pieces that begin their sequences go together, as do those that do not.
    expect_right(cached, {{0, 0, 600}, {1, 0, 300}, {2, 0, 64}, {3, 0, 5}, {4, 0, 0}}, 1);
    expect_right(cached,
                 {{1, 300, 1}, {0, 600, 256}, {3, 5, 1}, {4, 0, 512}, {2, 64, 500}, {5, 0, 16}}, 2);
    const std::vector<Cached::Piece> step = {{4, 512, 300}, {1, 301, 1},  {2, 564, 30},
                                             {5, 16, 700},  {0, 856, 44}, {3, 6, 270}};
    expect_right(cached, step, 1);
    const auto together = cached.last();
    expect_right(cached, step, 1);
    EXPECT_EQ(cached.last(), together) << "two runs differ";
    expect_right(cached, {{1, 302, 1}, {4, 812, 1}, {3, 276, 2}}, 0);
  }
}

TEST_F(AttentionPrefill, WhatIsNotServedIsOurs) {
  for (const auto& c : {Case{600, 4, 2, 32, 32, 0, 16}, Case{600, 2, 1, 72, 72, 0, 16}}) {
    SCOPED_TRACE(::testing::PrintToString(c));
    PrefillCache cached(c, 1);
    expect_right(cached, {{0, 0, 300}}, 0);
    expect_right(cached, {{0, 300, 300}}, 0);
  }
}

// It has no sinks: it serves the pieces whose tokens all have them in their window.
TEST_F(AttentionPrefill, PiecesBeyondTheWindowOfSinksAreOurs) {
  PrefillCache cached({900, 4, 2, 64, 64, 400, 16, {}, 9}, 1);
  expect_right(cached, {{0, 0, 400}}, 1);
  expect_right(cached, {{0, 400, 500}}, 0);
  cached.poison();
  expect_right(cached, {{0, 0, 401}}, 0);
}

TEST_F(AttentionPrefill, GathersNoMoreThanItsLimitAtATime) {
  const Case c = {900, 8, 4, 64, 64, 0, 16};
  PrefillCache cached(c, 3);
  expect_right(cached, {{0, 0, 500}, {1, 0, 500}, {2, 0, 500}}, 1);
  // 900 keys take 1,024 rows of 64 + 64 numbers a head.
  constexpr int64_t kHead = int64_t{1024} * 128 * 2;
  const std::vector<Cached::Piece> pieces = {{0, 500, 400}, {1, 500, 400}, {2, 500, 400}};
  for (const auto& [heads, calls] : std::vector<std::pair<int64_t, int64_t>>{
           {12, 1}, {11, 2}, {8, 2}, {4, 3}, {3, 6}, {2, 6}, {1, 12}}) {
    SCOPED_TRACE(heads);
    limit_gathered(heads * kHead);
    expect_right(cached, pieces, calls);
  }
  limit_gathered(kHead - 1);
  expect_right(cached, pieces, 0);
}
#endif

// Single tokens far into sequences of many lengths, beside pieces of prompts: more keys than blocks
// would share evenly.
TEST(AttentionPagesBatch, InvariantOnCuda) {
  if (!on_cuda()) {
    GTEST_SKIP() << why_no_cuda();
  }
  for (const auto& shape :
       {Case{1300, 16, 8, 64, 64, 0, 16}, Case{1300, 8, 8, 128, 128, 700, 64, {}, 10},
        Case{1300, 12, 4, 16, 16, 0, 16}, Case{1300, 12, 4, 16, 16, 100, 16, {}, 70}}) {
    SCOPED_TRACE(fmt::format("heads of {}", shape.dim));
    for_each_on_cuda(shape, [](const Case& c, Dtype activations) {
      constexpr int kSequences = 12;
      Cached cached(c, kSequences, 5, Device::kCuda, activations, true);
      cached.poison();
      std::vector<Cached::Piece> step;
      for (int s = 0; s < kSequences; ++s) {
        const int64_t first = s % 4 == 3 ? 3 * s : 1270 - 97 * s;
        cached.run({{s, 0, first}});
        step.push_back({s, first, s % 4 == 3 ? 5 + 20 * s : s % 5 == 1 ? 3 : 1});
      }
      cached.run(step);
      const auto together = cached.last();
      auto from = together.begin();
      for (const auto& piece : step) {
        cached.run({piece});
        const auto to = from + static_cast<ptrdiff_t>(cached.last().size());
        EXPECT_TRUE(std::equal(from, to, cached.last().begin())) << "sequence " << piece.s;
        from = to;
      }
      cached.run({step[8], step[3], step[0]});
      const auto few = cached.last();
      cached.run({step[0]});
      EXPECT_TRUE(std::equal(cached.last().rbegin(), cached.last().rend(), few.rbegin()));
    });
  }
}

TEST(AttentionPagesThreads, ResultsDoNotDependOnTheirNumber) {
  const Case c = {1300, 3, 1, 16, 16, 0, 32};
  Cached cached(c, 1, 9);
  cached.poison();
  ASSERT_LE(cached.run({{0, 0, 1290}}), kTolerance);
  const int before = num_threads();
  for (const int64_t count : {1, 10}) {
    set_num_threads(1);
    cached.run({{0, 1290, count}});
    const auto one = cached.last();
    set_num_threads(4);
    cached.run({{0, 1290, count}});
    EXPECT_EQ(one, cached.last());
  }
  set_num_threads(before);
}

// What rounding costs. A key or value is off by at most 2^-9 of itself (half a unit in the last of
// 8 bits), so a score s = scale q.k by at most e = 2^-9 scale sum |q_i k_i|, a probability by a
// factor within exp(+-2e), and the output, a mean of values, by at most (exp(2e) - 1 + 2^-9)
// (largest |value|) + the error of fp32.
TEST(AttentionPagesRounding, StaysWithinItsBound) {
  const Case exact = {200, 4, 2, 16, 16, 0, 16};
  Case rounded = exact;
  rounded.pages = Dtype::kBF16;
  Cached wide(exact, 1, 11);
  Cached narrow(rounded, 1, 11);
  ASSERT_LE(wide.run({{0, 0, 200}}), kTolerance);
  ASSERT_LE(narrow.run({{0, 0, 200}}), kTolerance);
  const double unit = std::exp2(-9.0);
  const double e = unit * 0.5 * 16 * 2 * 2;  // scale 1/2, 16 products of numbers up to 2
  const double bound = std::expm1(2 * e) + unit + kTolerance;  // values up to 1
  double worst = 0.0;
  for (size_t i = 0; i < wide.last().size(); ++i) {
    worst = std::max(worst, std::abs(wide.last()[i] - narrow.last()[i]));
  }
  EXPECT_LE(worst, bound);
  EXPECT_GT(worst, 0.0);
}

TEST(AttentionPagesErrors, NameTheSegmentAndThePage) {
  Arena arena;
  Tape tape(arena);
  const Tensor q = arena.empty(Dtype::kF32, {2, 2, 8});
  const Tensor k = arena.empty(Dtype::kF32, {2, 1, 8});
  const Tensor cache = arena.empty(Dtype::kF32, {3, 4, 1, 8});
  const std::vector<int32_t> start = {0, 2};
  const auto message = [&](Context ctx, const Tensor& query, const Tensor& keys,
                           const std::vector<int32_t>& table, int32_t at) {
    const std::vector<int32_t> position = {at};
    const KvPages pages = {keys, cache, table, 2};
    return testing::message_of([&] {
      attention(ctx, query, k, k, {start, position, {}}, {}, &pages);
    });
  };
  const Context plain{.arena = &arena};
  EXPECT_EQ(message(plain, q, cache, {2, 0}, 3), "no error");
  EXPECT_EQ(message(plain, q, cache, {2, 0}, 7),
            "[attention] segment 0 reaches position 8, its page table covers 0..7");
  EXPECT_EQ(message(plain, q, cache, {2, -1}, 3),
            "[attention] segment 0 needs page 1 of its table, which names -1 of 3 pages");
  EXPECT_EQ(message(plain, q, cache, {3, 1}, 3),
            "[attention] segment 0 needs page 0 of its table, which names 3 of 3 pages");
  EXPECT_EQ(message(plain, q, cache, {2}, 0),
            "[attention] expected a page table (1, 2), got 1 entries");
  EXPECT_EQ(message(plain, q, arena.empty(Dtype::kF8E4M3, {3, 4, 1, 8}), {2, 0}, 0),
            "[attention] expected scales bf16 (3, 4, 1) of cached keys in f8, got none");
  EXPECT_EQ(message(plain, q, arena.empty(Dtype::kF32, {3, 4, 2, 8}), {2, 0}, 0),
            "[attention] expected cached keys f32 (pages, page_size, 1, 8), got f32 (3, 4, 2, 8)");
  EXPECT_EQ(message(plain, q, arena.empty(Dtype::kF32, {3, 5, 1, 8}), {2, 0}, 0),
            "[attention] expected as many pages of keys as of values, got f32 (3, 5, 1, 8) and "
            "f32 (3, 4, 1, 8)");
  Tensor with_grad = q;
  with_grad.grad = arena.allocate(q.bytes());
  EXPECT_EQ(message({.arena = &arena, .tape = &tape}, with_grad, cache, {2, 0}, 0),
            "[attention] cached keys and values have no gradient; train without");
}

}  // namespace
}  // namespace cambium
