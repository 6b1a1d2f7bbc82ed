#include "ops/selection/selection.h"

#include "base/testing.h"
#include "ops/testing_inputs.h"

namespace cambium {
namespace {

using testing::Input;

/// What each token of one sequence has chosen.
std::vector<std::vector<int32_t>> lists(Context& ctx, const ChosenTokens& chosen, int64_t tokens,
                                        int64_t first = 0) {
  std::vector<int32_t> all(static_cast<size_t>(tokens * chosen.budget));
  ctx.synchronize();
  if (ctx.device().kind == Device::kCpu) {
    std::copy_n(chosen.positions, all.size(), all.begin());
  } else {
    copy_memory(all.data(), Device{}, chosen.positions, ctx.device(),
                static_cast<int64_t>(all.size() * sizeof(int32_t)));
  }
  std::vector<std::vector<int32_t>> result;
  for (int64_t t = 0; t < tokens; ++t) {
    const auto begin = all.begin() + t * chosen.budget;
    result.emplace_back(begin, begin + chosen.count(first + t));
  }
  return result;
}

struct Case {
  int64_t tokens, heads, dim, budget;
  Dtype pages = Dtype::kF32;
};
constexpr Case kCases[] = {{1, 1, 4, 1},      {30, 3, 7, 5},     {90, 16, 32, 16},
                           {300, 5, 20, 9},   {200, 2, 64, 70},  {40, 2, 8, 100},
                           {90, 70, 128, 20}, {70, 64, 128, 20}, {130, 9, 128, 64}};

std::vector<Input> inputs_of(const Case& c) {
  return {{{c.tokens, c.heads, c.dim}}, {{c.tokens, c.dim}}, {{c.tokens, c.heads}}};
}

/// All of them by one call without pages.
std::vector<std::vector<int32_t>> whole(Context& ctx, const Case& c,
                                        const std::vector<Tensor>& in) {
  const std::vector<int32_t> start = {0, static_cast<int32_t>(c.tokens)};
  const std::vector<int32_t> position = {0};
  return lists(ctx, choose_tokens(ctx, in[0], in[1], in[2], {start, position, {}}, c.budget),
               c.tokens);
}

/// The same through pages in calls that end at `cuts`.
std::vector<std::vector<int32_t>> in_pieces(Context& ctx, const Case& c,
                                            const std::vector<Tensor>& in,
                                            const std::vector<int64_t>& cuts) {
  const int64_t count = (c.tokens + 3) / 4;
  std::vector<int32_t> table;
  for (int64_t i = count; i > 0; --i) {
    table.push_back(static_cast<int32_t>(i - 1));
  }
  const OwnedTensor keys(c.pages, {count, 4, 1, c.dim}, false, in[0].device);
  const OwnedTensor scales(Dtype::kBF16, {count, 4, 1}, false, in[0].device);
  IndexPages pages{keys.view, table, count};
  if (c.pages == Dtype::kF8E4M3) {
    pages.key_scales = scales.view;
  }
  std::vector<std::vector<int32_t>> result;
  int64_t begin = 0;
  for (const int64_t end : cuts) {
    const std::vector<int32_t> start = {0, static_cast<int32_t>(end - begin)};
    const std::vector<int32_t> position = {static_cast<int32_t>(begin)};
    const auto rows = [&](size_t i) { return in[i].slice(0, begin, end - begin); };
    const ChosenTokens chosen =
        choose_tokens(ctx, rows(0), rows(1), rows(2), {start, position, {}}, c.budget, &pages);
    for (const auto& list : lists(ctx, chosen, end - begin, begin)) {
      result.push_back(list);
    }
    begin = end;
  }
  return result;
}

/// body(ctx, inputs) with the definition, every instruction set and CUDA, whose numbers are
/// multiples of 1/8: sums are exact, so that equal scores are equal everywhere.
template <class Body>
void for_each_form(const Case& c, const Body& body) {
  const std::vector<Input> inputs = inputs_of(c);
  auto values = testing::draw(inputs);
  for (auto& input : values) {
    for (double& x : input) {
      x = std::round(x * 8) / 8;
    }
  }
  const auto on_cpu = [&](bool reference) {
    Arena arena;
    Context ctx{.arena = &arena, .reference = reference};
    body(ctx, testing::HeldInputs(inputs, values).tensors);
  };
  on_cpu(true);
  testing::for_each_isa([&] { on_cpu(false); });
  if (testing::on_cuda()) {
    SCOPED_TRACE("cuda");
    for (const Dtype type : {Dtype::kF32, Dtype::kBF16}) {
      SCOPED_TRACE(dtype_name(type));
      testing::CudaContext cuda(type);
      body(cuda.ctx, testing::HeldInputs(inputs, values, Device::kCuda, type).tensors);
    }
  }
}

TEST(ChooseTokens, EveryFormAndEveryCutChoosesAlike) {
  for (Case c : kCases) {
    SCOPED_TRACE(c.tokens);
    std::vector<std::vector<int32_t>> expected;
    for_each_form(c, [&](Context& ctx, const std::vector<Tensor>& in) {
      const auto chosen = whole(ctx, c, in);
      if (expected.empty()) {
        expected = chosen;  // of the definition
      }
      EXPECT_EQ(chosen, expected);
      // The numbers are multiples of 1/8 below 1, which every type of pages holds.
      for (const Dtype type : {Dtype::kF32, Dtype::kBF16}) {
        if (type == Dtype::kF32 && in[0].dtype == Dtype::kBF16) {
          continue;  // pages are not wider than what is kept in them
        }
        c.pages = type;
        EXPECT_EQ(in_pieces(ctx, c, in, {c.tokens}), expected);
        EXPECT_EQ(in_pieces(ctx, c, in, {c.tokens / 3, c.tokens / 2, c.tokens}), expected);
      }
    });
    for (int64_t t = 0; t < c.tokens; ++t) {
      const auto& list = expected[static_cast<size_t>(t)];
      EXPECT_EQ(std::ssize(list), std::min(c.budget, t + 1));
      EXPECT_TRUE(std::is_sorted(list.begin(), list.end()));
    }
  }
}

/// The last three tokens of sequences, whose keys before them are written alone.
TEST(ChooseTokens, OfLongSequences) {
  for (const Case& c :
       {Case{40003, 2, 4, 300, Dtype::kBF16}, Case{1283, 40, 128, 300, Dtype::kBF16}}) {
    SCOPED_TRACE(c.tokens);
    std::vector<std::vector<int32_t>> expected;
    for_each_form(c, [&](Context& ctx, const std::vector<Tensor>& in) {
      const auto before = static_cast<int32_t>(c.tokens) - 3;
      const OwnedTensor keys(c.pages, {1, c.tokens, 1, c.dim}, false, in[0].device);
      const std::vector<int32_t> table = {0};
      const IndexPages pages{keys.view, table, 1};
      const std::vector<int32_t> first = {0, before};
      const std::vector<int32_t> rest = {0, 3};
      const std::vector<int32_t> none = {0};
      const std::vector<int32_t> behind = {before};
      write_index(ctx, in[1].slice(0, 0, before), {first, none, {}}, pages);
      const auto last = [&](size_t i) { return in[i].slice(0, before, 3); };
      const auto chosen = lists(
          ctx, choose_tokens(ctx, last(0), last(1), last(2), {rest, behind, {}}, c.budget, &pages),
          3, before);
      if (expected.empty()) {
        expected = chosen;  // of the definition
      }
      EXPECT_EQ(chosen, expected);
    });
  }
}

TEST(ChooseTokens, OfEqualScoresTheEarlierToken) {
  Arena arena;
  Context ctx{.arena = &arena};
  std::vector<float> q(6, 1.0F);
  std::vector<float> k = {1, 2, 1, 2, 1, 2};
  std::vector<float> w(6, 1.0F);
  const Case c{6, 1, 1, 2};
  const auto chosen = whole(ctx, c,
                            {Tensor::of(q.data(), {6, 1, 1}), Tensor::of(k.data(), {6, 1}),
                             Tensor::of(w.data(), {6, 1})});
  EXPECT_EQ(chosen,
            (std::vector<std::vector<int32_t>>{{0}, {0, 1}, {0, 1}, {1, 3}, {1, 3}, {1, 3}}));
}

TEST(ChooseWindow, IsTheLastTokensAndTheFirst) {
  Arena arena;
  Context ctx{.arena = &arena};
  const std::vector<int32_t> start = {0, 3, 5};
  const std::vector<int32_t> position = {4, 0};  // the second sequence has few tokens yet
  const ChosenTokens chosen = choose_window(ctx, {start, position, {}}, 3, 2);
  const auto list = [&](int64_t t, int64_t own) {
    std::vector<int64_t> positions;
    for (int64_t i = 0; i < chosen.count(own); ++i) {
      positions.push_back(chosen.position(t, i));
    }
    return positions;
  };
  using Positions = std::vector<int64_t>;
  EXPECT_EQ(list(0, 4), (Positions{0, 1, 2, 3, 4}));
  EXPECT_EQ(list(1, 5), (Positions{0, 1, 3, 4, 5}));
  EXPECT_EQ(list(2, 6), (Positions{0, 1, 4, 5, 6}));
  EXPECT_EQ(list(4, 1), (Positions{0, 1}));
  EXPECT_FALSE(choose_window(ctx, {start, position, {}}, 7, 0).defined());
}

TEST(ChooseTokensErrors, NameWhatCame) {
  Arena arena;
  Context ctx{.arena = &arena};
  const std::vector<int32_t> start = {0, 2};
  const std::vector<int32_t> position = {0};
  const Segments segments{start, position, {}};
  const Tensor q = arena.empty(Dtype::kF32, {2, 3, 4});
  const Tensor k = arena.empty(Dtype::kF32, {2, 4});
  const Tensor w = arena.empty(Dtype::kF32, {2, 3});
  EXPECT_EQ(testing::error_of([&] { choose_tokens(ctx, q, w, w, segments, 1); }),
            "[choose_tokens] expected k f32 (2, 4) beside q f32 (2, 3, 4), got f32 (2, 3)");
  EXPECT_EQ(testing::error_of([&] { choose_tokens(ctx, q, k, w, segments, 0); }),
            "[choose_tokens] expected a budget of at least 1 token, got 0");
  EXPECT_EQ(testing::error_of([&] { choose_window(ctx, segments, 0, 1); }),
            "[choose_window] expected a window of at least 1 token and sinks of at least 0, got 0 "
            "and 1");
}

}  // namespace
}  // namespace cambium
