#include "ops/latent_attention/latent_attention.h"

#include <numeric>

#include "base/testing.h"
#include "ops/testing_inputs.h"

namespace cambium {
namespace {

using testing::Input;

struct Case {
  std::vector<int32_t> lengths;
  int64_t heads, rank, rope;
  int64_t budget = 0;  // 0 = no choice
  int64_t size = 1;    // tokens of a piece; of larger ones the last is the token's own
};

std::ostream& operator<<(std::ostream& out, const Case& c) {
  for (const int32_t length : c.lengths) {
    out << length << "_";
  }
  out << "tokens_" << c.heads << "_heads_of_" << c.rank << "_and_" << c.rope;
  if (c.budget > 0) {
    out << "_choosing_" << c.budget;
  }
  return c.size > 1 ? out << "_of_" << c.size : out;
}

std::vector<int32_t> starts(const std::vector<int32_t>& lengths) {
  std::vector<int32_t> start{0};
  for (const int32_t n : lengths) {
    start.push_back(start.back() + n);
  }
  return start;
}

/// Every token's choice: the piece that it is in, and pieces evenly spaced before it.
std::vector<int32_t> spread(const std::vector<int32_t>& lengths, int64_t budget, int64_t size) {
  std::vector<int32_t> pieces;
  for (const int32_t length : lengths) {
    for (int64_t t = 0; t < length; ++t) {
      const int64_t own = t / size;
      for (int64_t i = 0; i < budget; ++i) {
        pieces.push_back(
            static_cast<int32_t>(own < budget ? std::min(i, own) : own * (i + 1) / budget));
      }
    }
  }
  return pieces;
}

class LatentAttention : public ::testing::TestWithParam<Case> {};

TEST_P(LatentAttention, KernelsMatchDefinitionAndGradientsMatchDifferences) {
  const Case& c = GetParam();
  const std::vector<int32_t> start = starts(c.lengths);
  const std::vector<int32_t> position(c.lengths.size());
  const int64_t tokens = start.back();
  const std::vector<int32_t> choice = spread(c.lengths, c.budget, c.size);
  const auto operation = [&](Context& ctx, const std::vector<Tensor>& in) {
    ChosenTokens chosen;
    if (c.budget > 0) {
      chosen = {ctx.to_device(std::span<const int32_t>(choice)), c.budget, c.size};
    }
    return latent_attention(ctx, in[0], in[1], in[2], {start, position, {}}, 0.3F, chosen);
  };
  const std::vector<Input> inputs = {
      {{tokens, c.heads, c.rank + c.rope}}, {{tokens, c.rank}}, {{tokens, c.rope}}};
  if (tokens <= 40) {
    testing::expect_gradients_match_differences(operation, inputs, 1e-6, 12);
  }
  testing::expect_kernels_match_reference(operation, inputs);
}

INSTANTIATE_TEST_SUITE_P(Shapes, LatentAttention,
                         ::testing::Values(Case{{3}, 1, 4, 2}, Case{{9, 1, 0, 7}, 3, 5, 2},
                                           Case{{37}, 2, 24, 8}, Case{{70, 20}, 9, 32, 16},
                                           Case{{9}, 3, 300, 6}, Case{{20, 12}, 3, 8, 4, 5},
                                           Case{{67, 41}, 10, 16, 8, 7}, Case{{41}, 2, 512, 64, 33},
                                           Case{{30}, 3, 8, 4, 3, 4},
                                           Case{{70, 9}, 3, 512, 64, 2, 16},
                                           Case{{70, 9}, 3, 512, 64}, Case{{41}, 2, 640, 64}),
                         ::testing::PrintToStringParamName());

/// One sequence whose latents go through pages in pieces, against the whole without pages.
struct Paged {
  int64_t tokens, heads, rank, rope;
  Dtype pages;
};

std::vector<double> whole(const Paged& c, const std::vector<Input>& inputs,
                          std::vector<std::vector<double>> values) {
  const int64_t pieces = latent_pieces(c.rank);
  values[1] = testing::as_paged(values[1], c.rank / pieces, c.pages);
  values[2] = testing::as_paged(values[2], c.rope, c.pages);
  const std::vector<int32_t> start = {0, static_cast<int32_t>(c.tokens)};
  const std::vector<int32_t> position = {0};
  return testing::run_operation<double>(
             [&](Context& ctx, const std::vector<Tensor>& in) {
               return latent_attention(ctx, in[0], in[1], in[2], {start, position, {}}, 0.2F);
             },
             inputs, values, true, false)
      .output;
}

std::vector<double> in_pieces(Context& ctx, const Paged& c, const std::vector<Tensor>& in,
                              const std::vector<int64_t>& cuts) {
  constexpr int64_t kPage = 4;
  const int64_t count = (c.tokens + kPage - 1) / kPage;
  const int64_t pieces = latent_pieces(c.rank);
  const Device device = in[0].device;
  std::vector<int32_t> table(static_cast<size_t>(count));
  std::iota(table.rbegin(), table.rend(), 0);
  const auto pages = [&](int64_t groups, int64_t size) {
    return OwnedTensor(c.pages, {count, kPage, groups, size}, false, device);
  };
  const auto scales = [&](int64_t groups) {
    return OwnedTensor(Dtype::kBF16, {count, kPage, groups}, false, device);
  };
  const OwnedTensor latents = pages(pieces, c.rank / pieces);
  const OwnedTensor keys = pages(1, c.rope);
  const OwnedTensor latent_scales = scales(pieces);
  const OwnedTensor key_scales = scales(1);
  LatentPages to{latents.view, keys.view, table, count};
  if (c.pages == Dtype::kF8E4M3) {
    to.latent_scales = latent_scales.view;
    to.rope_key_scales = key_scales.view;
  }
  std::vector<double> result;
  int64_t begin = 0;
  for (const int64_t end : cuts) {
    const std::vector<int32_t> start = {0, static_cast<int32_t>(end - begin)};
    const std::vector<int32_t> position = {static_cast<int32_t>(begin)};
    const Segments segments{start, position, {}};
    const auto rows = [&](size_t i) { return in[i].slice(0, begin, end - begin); };
    write_latents(ctx, rows(1), rows(2), segments, to);
    const Tensor y = latent_attention(ctx, rows(0), rows(1), rows(2), segments, 0.2F, {}, &to);
    const std::vector<double> values = testing::take(y);
    result.insert(result.end(), values.begin(), values.end());
    begin = end;
  }
  return result;
}

TEST(LatentAttentionPages, EveryCutGivesTheWhole) {
  const Paged shape{90, 5, 256, 8, Dtype::kF32};
  const std::vector<Input> inputs = {{{shape.tokens, shape.heads, shape.rank + shape.rope}},
                                     {{shape.tokens, shape.rank}},
                                     {{shape.tokens, shape.rope}}};
  const auto values = testing::draw(inputs);
  std::vector<int64_t> steps(static_cast<size_t>(shape.tokens));
  std::iota(steps.begin(), steps.end(), 1);
  for (const Dtype type : {Dtype::kF32, Dtype::kBF16, Dtype::kF8E4M3}) {
    Paged c = shape;
    c.pages = type;
    const std::vector<double> expected = whole(c, inputs, values);
    for (const std::vector<int64_t>& cuts : {std::vector<int64_t>{90}, {1, 5, 40, 41, 90}, steps}) {
      Arena arena;
      Context ctx{.arena = &arena};
      const testing::HeldInputs in(inputs, values);
      EXPECT_LE(testing::relative_error(in_pieces(ctx, c, in.tensors, cuts), expected), 2e-5)
          << dtype_name(type) << ", " << cuts.size() << " pieces";
      if (testing::on_cuda()) {
        for (const bool invariant : {false, true}) {
          testing::CudaContext cuda;
          cuda.ctx.batch_invariant = invariant;
          const testing::HeldInputs there(inputs, values, Device::kCuda);
          EXPECT_LE(testing::relative_error(in_pieces(cuda.ctx, c, there.tensors, cuts), expected),
                    2e-5)
              << "cuda, " << dtype_name(type) << ", " << cuts.size() << " pieces";
        }
      }
    }
  }
}

TEST(LatentAttentionPages, OnTensorCoresEveryCutGivesTheWhole) {
  if (!testing::on_cuda()) {
    GTEST_SKIP() << why_no_cuda();
  }
  // Both halves of rows, heads that fill no block, several tiles, parts of one and of several.
  for (const Paged& c : {Paged{100, 66, 512, 64, Dtype::kBF16}, {500, 3, 512, 64, Dtype::kBF16}}) {
    const std::vector<Input> inputs = {
        {{c.tokens, c.heads, c.rank + c.rope}}, {{c.tokens, c.rank}}, {{c.tokens, c.rope}}};
    auto values = testing::draw(inputs);
    for (double& x : values[0]) {
      x = testing::as_bf16(x);
    }
    const std::vector<double> expected = whole(c, inputs, values);
    std::vector<int64_t> cuts{c.tokens / 2};
    for (int64_t end = c.tokens - 9; end <= c.tokens; ++end) {
      cuts.push_back(end);
    }
    for (const bool invariant : {false, true}) {
      testing::CudaContext cuda(Dtype::kBF16);
      cuda.ctx.batch_invariant = invariant;
      const testing::HeldInputs in(inputs, values, Device::kCuda, Dtype::kBF16);
      EXPECT_LE(testing::norm_error(in_pieces(cuda.ctx, c, in.tensors, cuts), expected),
                testing::kNarrowForward)
          << c.heads << " heads" << (invariant ? ", batch invariant" : "");
    }
  }
}

/// Sequences in pages of random numbers, each with so many tokens behind it and so many in the
/// call.
struct Batch {
  std::vector<int32_t> behind, lengths;
  int64_t heads, page;
  int64_t budget = 0;  // 0 = no choice
};

class BatchOnTensorCores {
 public:
  explicit BatchOnTensorCores(const Batch& batch)
      : batch_(batch), start_(starts(batch.lengths)), segments_(std::ssize(batch.lengths)) {
    int64_t longest = 0;
    for (size_t s = 0; s < batch.lengths.size(); ++s) {
      longest = std::max<int64_t>(longest, batch.behind[s] + batch.lengths[s]);
      for (int64_t i = 0; i < batch.lengths[s]; ++i) {
        const int64_t own = batch.behind[s] + i;
        for (int64_t c = 0; c < batch.budget; ++c) {
          choice_.push_back(static_cast<int32_t>(
              own < batch.budget ? std::min(c, own) : own * (c + 1) / batch.budget));
        }
      }
    }
    pages_ = (longest + batch.page - 1) / batch.page;
    table_.resize(static_cast<size_t>(segments_ * pages_));
    std::iota(table_.rbegin(), table_.rend(), 0);
    const int64_t tokens = start_.back();
    inputs_ = {{{tokens, batch.heads, 576}},
               {{tokens, 512}},
               {{tokens, 64}},
               {{std::ssize(table_), batch.page, 4, 128}},
               {{std::ssize(table_), batch.page, 1, 64}}};
    values_ = testing::draw(inputs_);
    for (auto& values : values_) {
      values = testing::as_stored(std::move(values), Dtype::kBF16);
    }
  }

  std::vector<double> expected() const {
    return testing::run_operation<double>(
               [&](Context& ctx, const std::vector<Tensor>& in) { return attend(ctx, in, all()); },
               inputs_, values_, true, false)
        .output;
  }
  /// Of the whole call, or of its first sequence alone.
  std::vector<double> on_cuda(bool invariant, bool alone = false) const {
    testing::CudaContext cuda(Dtype::kBF16);
    cuda.ctx.batch_invariant = invariant;
    const testing::HeldInputs in(inputs_, values_, Device::kCuda, Dtype::kBF16);
    return testing::take(attend(cuda.ctx, in.tensors, alone ? 1 : all()));
  }

 private:
  size_t all() const { return batch_.lengths.size(); }

  Tensor attend(Context& ctx, const std::vector<Tensor>& in, size_t segments) const {
    const Segments of{
        std::span(start_).first(segments + 1), std::span(batch_.behind).first(segments), {}};
    const LatentPages pages{
        in[3], in[4], std::span(table_).first(segments * static_cast<size_t>(pages_)), pages_};
    ChosenTokens chosen;
    if (batch_.budget > 0) {
      chosen = {ctx.to_device(std::span(choice_)), batch_.budget};
    }
    const auto rows = [&](size_t i) { return in[i].slice(0, 0, start_[segments]); };
    return latent_attention(ctx, rows(0), rows(1), rows(2), of, 0.2F, chosen, &pages);
  }

  Batch batch_;
  std::vector<int32_t> start_, table_, choice_;
  int64_t segments_;
  int64_t pages_ = 0;
  std::vector<Input> inputs_;
  std::vector<std::vector<double>> values_;
};

TEST(LatentAttentionPages, OnTensorCoresBatchesOfEveryLength) {
  if (!testing::on_cuda()) {
    GTEST_SKIP() << why_no_cuda();
  }
  const auto ones = [](size_t count) { return std::vector<int32_t>(count, 1); };
  const std::vector<Batch> batches = {
      {{0, 1, 62, 63, 64, 65, 126, 127, 128, 191, 192, 255, 256}, ones(13), 8, 64},
      {{319, 255, 64, 0}, ones(4), 128, 16},
      {{5000}, ones(1), 9, 64},
      {{1023, 2000, 17}, ones(3), 32, 7},
      {{900, 2, 300}, ones(3), 65, 64},
      {{700}, ones(1), 1, 256},
      {{130, 60, 0, 400}, {1, 20, 3, 5}, 33, 64},
      {{61, 0, 190}, {5, 1, 9}, 32, 64},
      {{0, 250}, {40, 9}, 5, 16},
      {{200, 1000, 64, 40}, ones(4), 64, 64, 64},
      {{300, 90}, {3, 1}, 40, 16, 100}};
  for (const Batch& batch : batches) {
    const BatchOnTensorCores call(batch);
    const std::vector<double> expected = call.expected();
    for (const bool invariant : {false, true}) {
      SCOPED_TRACE(::testing::Message() << batch.behind[0] << " behind, " << batch.heads << " heads"
                                        << (invariant ? ", batch invariant" : ""));
      const std::vector<double> y = call.on_cuda(invariant);
      EXPECT_LE(testing::norm_error(y, expected), testing::kNarrowForward);
      EXPECT_LE(testing::relative_error(y, expected), 2e-2);
      EXPECT_EQ(call.on_cuda(invariant), y) << "two runs differ";
      const std::vector<double> first = call.on_cuda(invariant, true);
      if (invariant) {
        EXPECT_TRUE(std::equal(first.begin(), first.end(), y.begin()));
      }
    }
  }
}

TEST(LatentAttentionErrors, NameWhatCame) {
  Arena arena;
  Context ctx{.arena = &arena};
  const auto tensor = [&](std::initializer_list<int64_t> shape) {
    return arena.empty(Dtype::kF32, shape);
  };
  const std::vector<int32_t> start = {0, 2};
  const std::vector<int32_t> position = {0};
  const Segments segments{start, position, {}};
  EXPECT_EQ(
      testing::error_of([&] {
        latent_attention(ctx, tensor({2, 3, 6}), tensor({2, 4}), tensor({2, 3}), segments, 1.0F);
      }),
      "[latent_attention] expected rope_key f32 (2, 2) beside latent f32 (2, 4) and q f32 "
      "(2, 3, 6), got f32 (2, 3)");
  EXPECT_EQ(testing::error_of([&] {
              latent_attention(ctx, tensor({2, 1, 1100}), tensor({2, 1000}), tensor({2, 100}),
                               segments, 1.0F);
            }),
            "[latent_attention] expected at most 1024 numbers of a latent and its key, got 1100");
}

}  // namespace
}  // namespace cambium
