#include "ops/selection/selection.h"

#include "base/testing.h"
#include "ops/testing_inputs.h"

namespace cambium {
namespace {

using testing::Input;

/// The positions that each list of the tokens of one sequence has.
std::vector<std::vector<int32_t>> lists(Context& ctx, ChosenTokens chosen, int64_t tokens,
                                        int64_t first = 0) {
  std::vector<int32_t> all(static_cast<size_t>(tokens * chosen.lists * chosen.budget));
  ctx.synchronize();
  if (ctx.device().kind == Device::kCpu) {
    std::copy_n(chosen.pieces, all.size(), all.begin());
  } else {
    copy_memory(all.data(), Device{}, chosen.pieces, ctx.device(),
                static_cast<int64_t>(all.size() * sizeof(int32_t)));
  }
  chosen.pieces = all.data();
  std::vector<std::vector<int32_t>> result;
  for (int64_t list = 0; list < tokens * chosen.lists; ++list) {
    const int64_t own = first + list / chosen.lists;
    auto& positions = result.emplace_back();
    for (int64_t i = 0; i < chosen.count(own); ++i) {
      positions.push_back(static_cast<int32_t>(chosen.position(list, i)));
    }
    for (int64_t p = 0; p <= own + 1; ++p) {
      EXPECT_EQ(chosen.has(list, own, p),
                std::binary_search(positions.begin(), positions.end(), p));
    }
  }
  return result;
}

Selection tokens(int64_t top) {
  return {.top = top};
}
Selection blocks(int64_t top, int64_t size, int64_t local = 1) {
  return {Granularity::kBlock, top, size, local};
}
Selection pools(int64_t top, int64_t size) {
  return {Granularity::kPool, top, size};
}

struct Case {
  int64_t tokens, heads, dim;
  Selection selection;
  bool weights = true;  // else each head has a list
  Dtype pages = Dtype::kF32;
};
const Case kCases[] = {
    {1, 1, 4, tokens(1)},
    {30, 3, 7, tokens(5)},
    {90, 16, 32, tokens(16)},
    {300, 5, 20, tokens(9)},
    {200, 2, 64, tokens(70)},
    {40, 2, 8, tokens(100)},
    {90, 70, 128, tokens(20)},
    {70, 64, 128, tokens(20)},
    {130, 9, 128, tokens(64)},
    {40, 3, 12, tokens(7), false},
    {1, 2, 4, blocks(1, 8), false},
    {90, 2, 16, blocks(3, 8), false},
    {90, 2, 16, blocks(3, 8)},
    {101, 3, 20, blocks(4, 7, 2), false},
    {150, 5, 9, blocks(2, 10, 2)},
    {260, 4, 128, blocks(3, 64), false},
    {390, 4, 128, blocks(2, 128), false},
    {60, 4, 32, blocks(50, 16), false},
    {90, 70, 24, blocks(5, 6), false},
    {41, 1, 8, blocks(40, 1, 5), false},
    {90, 3, 16, pools(3, 8)},
    {90, 3, 16, pools(3, 8), false},
    {101, 16, 20, pools(4, 4)},
    {90, 70, 24, pools(5, 16)},
    {270, 4, 128, pools(1, 128)},
    {200, 4, 128, pools(2, 64), false},
    {30, 2, 8, pools(9, 1)},
};

std::vector<Input> inputs_of(const Case& c) {
  return {{{c.tokens, c.heads, c.dim}}, {{c.tokens, c.dim}}, {{c.tokens, c.heads}}};
}

/// Of rows of the inputs.
template <class Rows>
ChosenTokens choose(Context& ctx, const Case& c, const Rows& rows, const Segments& segments,
                    const IndexPages* pages = nullptr) {
  return choose_tokens(ctx, rows(0), rows(1), c.weights ? rows(2) : Tensor{}, segments, c.selection,
                       pages);
}

/// All of them by one call without pages.
std::vector<std::vector<int32_t>> whole(Context& ctx, const Case& c,
                                        const std::vector<Tensor>& in) {
  const std::vector<int32_t> start = {0, static_cast<int32_t>(c.tokens)};
  const std::vector<int32_t> position = {0};
  const auto all = [&](size_t i) { return in[i]; };
  return lists(ctx, choose(ctx, c, all, {start, position, {}}), c.tokens);
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
    const ChosenTokens chosen = choose(ctx, c, rows, {start, position, {}}, &pages);
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
    SCOPED_TRACE(::testing::Message()
                 << c.tokens << " tokens, " << c.heads << " heads, top " << c.selection.top
                 << " of " << c.selection.size << (c.weights ? "" : ", lists by head"));
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
    const int64_t each = c.weights ? 1 : c.heads;
    ASSERT_EQ(std::ssize(expected), c.tokens * each);
    for (int64_t i = 0; i < c.tokens * each; ++i) {
      const auto& list = expected[static_cast<size_t>(i)];
      const int64_t seen = i / each + 1;
      EXPECT_EQ(std::ssize(list) == seen, seen <= c.selection.all());
      EXPECT_LE(std::ssize(list), c.selection.all());
      EXPECT_TRUE(std::is_sorted(list.begin(), list.end()));
      EXPECT_TRUE(c.selection.granularity != Granularity::kBlock || list.back() == seen - 1);
    }
  }
}

TEST(ChooseTokens, SequencesBesideEachOtherChooseAsAlone) {
  for (const Case& c : {Case{130, 3, 16, tokens(7)}, Case{130, 3, 16, blocks(2, 8), false},
                        Case{210, 4, 128, blocks(2, 64), false}, Case{130, 3, 16, pools(3, 5)}}) {
    SCOPED_TRACE(::testing::Message() << c.tokens << " tokens, pieces of " << c.selection.size);
    std::vector<std::vector<int32_t>> expected;
    for_each_form(c, [&](Context& ctx, const std::vector<Tensor>& in) {
      std::vector<int32_t> start = {0};
      std::vector<std::vector<int32_t>> alone;
      for (const int64_t length : {c.tokens / 3, int64_t{1}, c.tokens - c.tokens / 3 - 1}) {
        const int64_t first = start.back();
        Case one = c;
        one.tokens = length;
        std::vector<Tensor> rows;
        for (const Tensor& t : in) {
          rows.push_back(t.slice(0, first, length));
        }
        for (const auto& list : whole(ctx, one, rows)) {
          alone.push_back(list);
        }
        start.push_back(static_cast<int32_t>(first + length));
      }
      const std::vector<int32_t> position(3);
      const auto all = [&](size_t i) { return in[i]; };
      const ChosenTokens chosen = choose(ctx, c, all, {start, position, {}});
      std::vector<std::vector<int32_t>> together;
      for (size_t s = 0; s < 3; ++s) {
        ChosenTokens own = chosen;
        own.pieces += start[s] * chosen.lists * chosen.budget;
        for (const auto& list : lists(ctx, own, start[s + 1] - start[s])) {
          together.push_back(list);
        }
      }
      EXPECT_EQ(together, alone);
      expected = expected.empty() ? alone : expected;
      EXPECT_EQ(alone, expected);
    });
  }
}

/// The last three tokens of sequences, whose keys before them are written alone.
TEST(ChooseTokens, OfLongSequences) {
  for (const Case& c : {Case{40003, 2, 4, tokens(300), true, Dtype::kBF16},
                        Case{1283, 40, 128, tokens(300), true, Dtype::kBF16},
                        Case{40003, 2, 4, blocks(30, 16), false, Dtype::kBF16},
                        Case{40003, 2, 4, pools(300, 2), true, Dtype::kBF16}}) {
    SCOPED_TRACE(::testing::Message() << c.tokens << " tokens, pieces of " << c.selection.size);
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
      const auto chosen = lists(ctx, choose(ctx, c, last, {rest, behind, {}}, &pages), 3, before);
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
  const std::vector<Tensor> in = {Tensor::of(q.data(), {6, 1, 1}), Tensor::of(k.data(), {6, 1}),
                                  Tensor::of(w.data(), {6, 1})};
  using Lists = std::vector<std::vector<int32_t>>;
  EXPECT_EQ(whole(ctx, {6, 1, 1, tokens(2)}, in),
            (Lists{{0}, {0, 1}, {0, 1}, {1, 3}, {1, 3}, {1, 3}}));
  // Of blocks the largest score counts, and the token's own is one of the two.
  EXPECT_EQ(whole(ctx, {6, 1, 1, blocks(2, 2)}, in),
            (Lists{{0}, {0, 1}, {0, 1, 2}, {0, 1, 2, 3}, {0, 1, 4}, {0, 1, 4, 5}}));
  // Of pools the mean, and what is after the last whole one comes besides.
  EXPECT_EQ(whole(ctx, {6, 1, 1, pools(1, 2)}, in),
            (Lists{{0}, {0, 1}, {0, 1, 2}, {0, 1}, {0, 1, 4}, {0, 1}}));
  k = {1, 2, 3, 1, 2, 1};
  EXPECT_EQ(whole(ctx, {6, 1, 1, pools(1, 2)}, in),
            (Lists{{0}, {0, 1}, {0, 1, 2}, {2, 3}, {2, 3, 4}, {2, 3}}));
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
  EXPECT_EQ(testing::error_of([&] { choose_tokens(ctx, q, w, w, segments, tokens(1)); }),
            "[choose_tokens] expected k f32 (2, 4) beside q f32 (2, 3, 4), got f32 (2, 3)");
  EXPECT_EQ(testing::error_of([&] { choose_tokens(ctx, q, k, w, segments, tokens(0)); }),
            "[choose_tokens] expected a budget of at least 1 token, block or pool, got 0");
  const auto error = [&](const Selection& selection) {
    return testing::error_of([&] { choose_tokens(ctx, q, k, w, segments, selection); });
  };
  EXPECT_EQ(
      error({.top = 1, .size = 2}),
      "[choose_tokens] expected pieces of at least 1 token, and of 1 where tokens are chosen, "
      "got 2");
  EXPECT_EQ(error(blocks(2, 4, 3)),
            "[choose_tokens] expected 1 to 2 local blocks, a token's own the first of them, got 3");
  EXPECT_EQ(testing::error_of([&] { choose_window(ctx, segments, 0, 1); }),
            "[choose_window] expected a window of at least 1 token and sinks of at least 0, got 0 "
            "and 1");
}

}  // namespace
}  // namespace cambium
