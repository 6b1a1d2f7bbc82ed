#include "ops/chosen_attention/chosen_attention.h"

#include <numeric>

#include "base/testing.h"
#include "ops/selection/selection.h"
#include "ops/testing_inputs.h"

namespace cambium {
namespace {

using testing::Input;

struct Case {
  std::vector<int32_t> lengths;
  int64_t heads, kv_heads, dim, value;
  int64_t top, size;
  bool tail = false;
  bool by_head = true;  // a list for each head of keys
};

std::ostream& operator<<(std::ostream& out, const Case& c) {
  for (const int32_t length : c.lengths) {
    out << length << "_";
  }
  out << "tokens_" << c.heads << "_heads_on_" << c.kv_heads << "_of_" << c.dim << "_and_" << c.value
      << "_top_" << c.top << "_of_" << c.size << (c.tail ? "_with_a_tail" : "");
  return out << (c.by_head ? "" : "_together");
}

std::vector<int32_t> starts(const std::vector<int32_t>& lengths) {
  std::vector<int32_t> start{0};
  for (const int32_t n : lengths) {
    start.push_back(start.back() + n);
  }
  return start;
}

/// Lists of pieces evenly spaced, others for each head, and last the one that the token is in.
struct Lists {
  explicit Lists(const Case& c, int64_t behind = 0) {
    chosen.budget = c.top + (c.tail ? 1 : 0);
    chosen.size = c.size;
    chosen.lists = c.by_head ? c.kv_heads : 1;
    chosen.tail = c.tail;
    for (const int32_t length : c.lengths) {
      for (int64_t own = behind; own < behind + length; ++own) {
        const int64_t whole = c.tail ? (own + 1) / c.size : own / c.size;  // before its own
        for (int64_t list = 0; list < chosen.lists; ++list) {
          add(own, whole, c.tail ? c.top : c.top - 1, list);
        }
      }
    }
    chosen.pieces = pieces.data();
  }

  /// `most` of the pieces 0 .. whole - 1, then piece `whole`.
  void add(int64_t own, int64_t whole, int64_t most, int64_t list) {
    const size_t end = pieces.size() + static_cast<size_t>(chosen.budget);
    const int64_t shift = whole > most ? (own + 3 * list) % (whole - most + 1) : 0;
    for (int64_t i = 0; i < std::min(most, whole); ++i) {
      pieces.push_back(static_cast<int32_t>(i + shift));
    }
    pieces.push_back(static_cast<int32_t>(whole));
    pieces.resize(end);
  }

  ChosenTokens on(const Context& ctx) const {
    ChosenTokens there = chosen;
    there.pieces = ctx.to_device(std::span<const int32_t>(pieces));
    return there;
  }

  std::vector<int32_t> pieces;
  ChosenTokens chosen;
};

std::vector<Input> inputs_of(const Case& c) {
  const int64_t tokens = starts(c.lengths).back();
  return {
      {{tokens, c.heads, c.dim}}, {{tokens, c.kv_heads, c.dim}}, {{tokens, c.kv_heads, c.value}}};
}

class ChosenAttention : public ::testing::TestWithParam<Case> {};

TEST_P(ChosenAttention, KernelsMatchDefinitionAndGradientsMatchDifferences) {
  const Case& c = GetParam();
  const std::vector<int32_t> start = starts(c.lengths);
  const std::vector<int32_t> position(c.lengths.size());
  const Lists lists(c);
  const auto operation = [&](Context& ctx, const std::vector<Tensor>& in) {
    return chosen_attention(ctx, in[0], in[1], in[2], {start, position, {}}, 0.3F, lists.on(ctx));
  };
  if (start.back() <= 40) {
    testing::expect_gradients_match_differences(operation, inputs_of(c), 1e-6, 12);
  }
  testing::expect_kernels_match_reference(operation, inputs_of(c));
}

INSTANTIATE_TEST_SUITE_P(
    Shapes, ChosenAttention,
    ::testing::Values(Case{{3}, 1, 1, 4, 2, 2, 1}, Case{{9, 1, 0, 7}, 6, 2, 5, 3, 2, 2},
                      Case{{37}, 4, 4, 24, 8, 3, 5}, Case{{70, 20}, 9, 3, 32, 16, 2, 16},
                      Case{{20, 12}, 4, 2, 8, 8, 5, 1}, Case{{30}, 6, 2, 12, 10, 2, 4, true},
                      Case{{67, 41}, 20, 1, 16, 8, 4, 8, true, false},
                      Case{{41}, 32, 2, 128, 128, 2, 8}, Case{{100, 33}, 18, 1, 64, 128, 2, 32},
                      Case{{90}, 2, 1, 256, 200, 3, 10, false, false},
                      Case{{90}, 6, 2, 256, 256, 3, 10}, Case{{150}, 16, 1, 128, 128, 2, 64},
                      Case{{270}, 3, 1, 128, 128, 2, 128}),
    ::testing::PrintToStringParamName());

/// One sequence whose keys and values go through pages in pieces, against the whole without pages.
class PagedChoice {
 public:
  explicit PagedChoice(const Case& c)
      : c_(c), lists_(c), inputs_(inputs_of(c)), values_(testing::draw(inputs_)) {
    table_.resize(static_cast<size_t>((tokens() + kPage - 1) / kPage));
    std::iota(table_.rbegin(), table_.rend(), 0);
  }

  int32_t tokens() const { return c_.lengths[0]; }

  /// With keys and values as pages keep them, and all inputs as activations are.
  std::vector<double> whole(Dtype pages, Dtype activations) const {
    auto values = rounded(activations);
    values[1] = testing::as_paged(values[1], c_.dim, pages);
    values[2] = testing::as_paged(values[2], c_.value, pages);
    const std::vector<int32_t> start = {0, tokens()};
    const std::vector<int32_t> position = {0};
    return testing::run_operation<double>(
               [&](Context& ctx, const std::vector<Tensor>& in) {
                 return chosen_attention(ctx, in[0], in[1], in[2], {start, position, {}}, 0.2F,
                                         lists_.on(ctx));
               },
               inputs_, values, true, false)
        .output;
  }

  std::vector<double> in_pieces(Context& ctx, Dtype type, Dtype activations,
                                const std::vector<int32_t>& cuts) const {
    const Device device = ctx.device();
    const testing::HeldInputs held(inputs_, rounded(activations), device, activations);
    const std::vector<Tensor>& in = held.tensors;
    const auto count = std::ssize(table_);
    const OwnedTensor keys(type, {count, kPage, c_.kv_heads, c_.dim}, false, device);
    const OwnedTensor all(type, {count, kPage, c_.kv_heads, c_.value}, false, device);
    const OwnedTensor key_scales(Dtype::kBF16, {count, kPage, c_.kv_heads}, false, device);
    const OwnedTensor value_scales(Dtype::kBF16, {count, kPage, c_.kv_heads}, false, device);
    KvPages pages{keys.view, all.view, table_, count};
    if (type == Dtype::kF8E4M3) {
      pages.key_scales = key_scales.view;
      pages.value_scales = value_scales.view;
    }
    std::vector<double> result;
    int32_t begin = 0;
    for (const int32_t end : cuts) {
      const std::vector<int32_t> start = {0, end - begin};
      const std::vector<int32_t> position = {begin};
      const auto rows = [&](size_t i) { return in[i].slice(0, begin, end - begin); };
      ChosenTokens chosen = lists_.on(ctx);
      chosen.pieces += begin * chosen.lists * chosen.budget;
      const Tensor y = chosen_attention(ctx, rows(0), rows(1), rows(2), {start, position, {}}, 0.2F,
                                        chosen, &pages);
      const std::vector<double> piece = testing::take(y);
      result.insert(result.end(), piece.begin(), piece.end());
      begin = end;
    }
    return result;
  }

 private:
  static constexpr int64_t kPage = 4;

  std::vector<std::vector<double>> rounded(Dtype activations) const {
    auto values = values_;
    for (auto& input : values) {
      input = testing::as_stored(std::move(input), activations);
    }
    return values;
  }

  Case c_;
  Lists lists_;
  std::vector<Input> inputs_;
  std::vector<std::vector<double>> values_;
  std::vector<int32_t> table_;
};

TEST(ChosenAttentionPages, EveryCutGivesTheWhole) {
  for (const Case& c : {Case{{90}, 12, 2, 32, 24, 2, 8}, Case{{70}, 6, 1, 16, 16, 3, 5, true},
                        Case{{210}, 18, 1, 64, 64, 3, 64}}) {
    const PagedChoice call(c);
    const int32_t n = call.tokens();
    std::vector<int32_t> steps(static_cast<size_t>(n));
    std::iota(steps.begin(), steps.end(), 1);
    for (const Dtype type : {Dtype::kF32, Dtype::kBF16, Dtype::kF8E4M3}) {
      const std::vector<double> expected = call.whole(type, Dtype::kF32);
      const std::vector<double> narrow = call.whole(type, Dtype::kBF16);
      for (const std::vector<int32_t>& cuts :
           {std::vector<int32_t>{n}, {1, 5, n / 2, n / 2 + 1, n}, steps}) {
        SCOPED_TRACE(::testing::Message() << n << " tokens, pages in " << dtype_name(type) << ", "
                                          << cuts.size() << " pieces");
        Arena arena;
        Context ctx{.arena = &arena};
        EXPECT_LE(testing::relative_error(call.in_pieces(ctx, type, Dtype::kF32, cuts), expected),
                  2e-5);
        if (!testing::on_cuda()) {
          continue;
        }
        testing::CudaContext cuda;
        EXPECT_LE(
            testing::relative_error(call.in_pieces(cuda.ctx, type, Dtype::kF32, cuts), expected),
            2e-5);
        if (type != Dtype::kF32) {
          testing::CudaContext half(Dtype::kBF16);
          EXPECT_LE(testing::norm_error(call.in_pieces(half.ctx, type, Dtype::kBF16, cuts), narrow),
                    testing::kNarrowForward);
        }
      }
    }
  }
}

/// Whoever has chosen everything attends as attention does.
TEST(ChosenAttention, ToEverythingIsAttention) {
  const Case c{{17, 40}, 6, 3, 16, 12, 50, 1};
  const std::vector<Input> inputs = inputs_of(c);
  const auto values = testing::draw(inputs);
  const std::vector<int32_t> start = starts(c.lengths);
  const std::vector<int32_t> position(2);
  const Lists lists(c);
  const auto run = [&](bool chosen) {
    return testing::run_operation<double>(
               [&](Context& ctx, const std::vector<Tensor>& in) {
                 const Segments segments{start, position, {}};
                 return chosen ? chosen_attention(ctx, in[0], in[1], in[2], segments, 0.3F,
                                                  lists.on(ctx))
                               : attention(ctx, in[0], in[1], in[2], segments, {.scale = 0.3F});
               },
               inputs, values, true, false)
        .output;
  };
  EXPECT_LE(testing::relative_error(run(true), run(false)), 1e-12);
}

TEST(ChosenAttentionErrors, NameWhatCame) {
  Arena arena;
  Context ctx{.arena = &arena};
  const auto tensor = [&](std::initializer_list<int64_t> shape) {
    return arena.empty(Dtype::kF32, shape);
  };
  const std::vector<int32_t> start = {0, 2};
  const std::vector<int32_t> position = {0};
  const Segments segments{start, position, {}};
  const auto error = [&](const Tensor& k, const Tensor& v, const ChosenTokens& chosen) {
    return testing::error_of([&] {
      chosen_attention(ctx, tensor({2, 6, 4}), k, v, segments, 1.0F, chosen);
    });
  };
  EXPECT_EQ(error(tensor({2, 4, 4}), tensor({2, 4, 4}), {}),
            "[chosen_attention] expected k f32 (2, Hkv, 4), Hkv a divisor of 6, beside q f32 "
            "(2, 6, 4), got f32 (2, 4, 4)");
  EXPECT_EQ(error(tensor({2, 2, 4}), tensor({2, 3, 4}), {}),
            "[chosen_attention] expected v f32 (2, 2, Dv) beside k f32 (2, 2, 4), got f32 "
            "(2, 3, 4)");
  EXPECT_EQ(error(tensor({2, 2, 4}), tensor({2, 2, 4}), {nullptr, 1, 1, 3}),
            "[chosen_attention] expected a list of chosen tokens, or one for each of 2 heads of "
            "keys, got 3");
}

}  // namespace
}  // namespace cambium
