#include "ops/experts/experts.h"

#include <functional>
#include <limits>

#include "base/testing.h"
#include "ops/matmul/matmul.h"
#include "ops/pointwise/pointwise.h"
#include "ops/testing.h"

namespace cambium {
namespace {

using testing::expect_gradients_match_differences;
using testing::expect_kernels_match_reference;
using testing::Input;

using In = std::vector<Tensor>;

struct Row {
  const char* name;
  int64_t tokens, experts, top, width, inner;
  RouterConfig config{};
  bool choice_bias = false;
  bool biases = false;
};

std::ostream& operator<<(std::ostream& out, const Row& row) {
  return out << row.name;
}

/// The whole way of a token: logits, x, up, down and what else the row has.
Tensor experts_of(Context& ctx, const In& in, const Row& row) {
  RouterConfig config = row.config;
  config.top = row.top;
  size_t next = 4;
  const Tensor choice_bias = row.choice_bias ? in[next++] : Tensor{};
  const Tensor up_bias = row.biases ? in[next++] : Tensor{};
  const Tensor down_bias = row.biases ? in[next++] : Tensor{};
  const Routing routing = route(ctx, in[0], choice_bias, config);
  const Tensor rows = dispatch(ctx, in[1], routing);
  const Tensor hidden = silu(ctx, experts_matmul(ctx, rows, in[2], up_bias, routing));
  return combine(ctx, experts_matmul(ctx, hidden, in[3], down_bias, routing), routing);
}

std::vector<Input> inputs_of(const Row& row) {
  std::vector<Input> inputs = {
      {{row.tokens, row.experts}, -2.0, 2.0},
      {{row.tokens, row.width}},
      {{row.experts, row.inner, row.width}, -1.0, 1.0, true, true},
      {{row.experts, row.width, row.inner}, -1.0, 1.0, true, true},
  };
  if (row.choice_bias) {
    inputs.push_back({{row.experts}, -0.5, 0.5, false});
  }
  if (row.biases) {
    inputs.push_back({{row.experts, row.inner}, -1.0, 1.0, true, true});
    inputs.push_back({{row.experts, row.width}, -1.0, 1.0, true, true});
  }
  return inputs;
}

constexpr RouterConfig kPlain{};
constexpr RouterConfig kMixtral{.renormalise = true};
constexpr RouterConfig kSigmoid{
    .score = RouterScore::kSigmoid, .renormalise = true, .eps = 1e-6F, .scale = 2.5F};
constexpr RouterConfig kGrouped{.score = RouterScore::kSigmoid,
                                .renormalise = true,
                                .eps = 1e-20F,
                                .scale = 0.5F,
                                .groups = 4,
                                .group_top = 2};

class Experts : public ::testing::TestWithParam<Row> {};

TEST_P(Experts, KernelsMatchDefinitionAndGradientsMatchDifferences) {
  const Row& row = GetParam();
  const auto operation = [&](Context& c, const In& in) { return experts_of(c, in, row); };
  expect_gradients_match_differences(operation, inputs_of(row));
  expect_kernels_match_reference(operation, inputs_of(row));
}

INSTANTIATE_TEST_SUITE_P(Table, Experts,
                         ::testing::Values(Row{"one_token", 1, 4, 2, 8, 5, kPlain},
                                           Row{"softmax_of_all", 7, 6, 2, 19, 11, kPlain},
                                           Row{"softmax_of_the_chosen", 7, 6, 3, 19, 11, kMixtral},
                                           Row{"every_expert", 5, 3, 3, 16, 8, kMixtral},
                                           Row{"biases", 6, 4, 2, 24, 16, kMixtral, false, true},
                                           Row{"sigmoid_with_choice_bias", 9, 8, 3, 16, 24,
                                               kSigmoid, true},
                                           Row{"groups", 9, 16, 3, 16, 8, kGrouped, true},
                                           Row{"groups_of_one", 6, 4, 2, 8, 8, kGrouped, true},
                                           Row{"experts_without_tokens", 2, 40, 2, 8, 8, kMixtral},
                                           Row{"more_rows_than_a_tile", 70, 2, 2, 72, 9, kMixtral},
                                           Row{"no_tokens", 0, 4, 2, 8, 5, kPlain}),
                         [](const auto& info) { return std::string(info.param.name); });

TEST_P(Experts, RouterLossesMatchTheirDefinitionAndDifferences) {
  const Row& row = GetParam();
  const auto operation = [&](Context& c, const In& in) {
    RouterConfig config = row.config;
    config.top = row.top;
    const Tensor choice_bias = row.choice_bias ? in[1] : Tensor{};
    return router_losses(c, in[0], route(c, in[0], choice_bias, config), config.score);
  };
  std::vector<Input> inputs = {{{row.tokens, row.experts}, -2.0, 2.0}};
  if (row.choice_bias) {
    inputs.push_back({{row.experts}, -0.5, 0.5, false});
  }
  expect_gradients_match_differences(operation, inputs);
  expect_kernels_match_reference(operation, inputs);
}

/// What the float kernels choose for logits (T, E) of the CPU.
std::vector<int32_t> chosen(const std::vector<float>& logits, int64_t experts,
                            const RouterConfig& config, const std::vector<float>& bias = {}) {
  std::vector<float> numbers = logits;
  std::vector<float> biases = bias;
  Arena arena;
  Context ctx{.arena = &arena};
  const auto tokens = std::ssize(logits) / experts;
  const Routing routing =
      route(ctx, Tensor::of(numbers.data(), {tokens, experts}),
            bias.empty() ? Tensor{} : Tensor::of(biases.data(), {experts}), config);
  return {routing.lists.expert, routing.lists.expert + routing.lists.rows()};
}

TEST(Route, OfEqualsTheLowerExpertIsChosenAndNanLast) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const RouterConfig two{.score = RouterScore::kSigmoid, .top = 2};
  EXPECT_EQ(chosen({1, 3, 3, 3}, 4, two), (std::vector<int32_t>{1, 2}));
  EXPECT_EQ(chosen({nan, 3, nan, -9}, 4, two), (std::vector<int32_t>{1, 3}));
  EXPECT_EQ(chosen({nan, nan, nan, nan}, 4, two), (std::vector<int32_t>{0, 1}));
}

// Logits that bf16 cannot tell apart choose as they are: of 1 and 1 + 2^-10 the greater.
TEST(Route, OfUnroundedLogitsTheGreaterIsChosen) {
  if (!testing::on_cuda()) {
    GTEST_SKIP() << why_no_cuda();
  }
  for (const bool alone : {false, true}) {
    for (const int64_t tokens : {1, 3, 70}) {
      testing::CudaContext cuda(Dtype::kBF16);
      cuda.ctx.batch_invariant = alone;
      std::vector<double> one_and_small(16);
      one_and_small[0] = 1.0;
      one_and_small[8] = 1.0;
      one_and_small[9] = 0x1p-10;
      const OwnedTensor weight = testing::cuda_tensor(Dtype::kBF16, {2, 8}, one_and_small);
      const OwnedTensor x = testing::cuda_tensor(
          Dtype::kBF16, {tokens, 8}, std::vector<double>(static_cast<size_t>(8 * tokens), 1.0));
      const Routing routing =
          route(cuda.ctx, matmul_unrounded(cuda.ctx, x.view, weight.view), {}, {.top = 1});
      cuda.ctx.synchronize();
      std::array<int32_t, 3> start{};
      constexpr int64_t kStarts = 3;
      copy(Tensor::of(Dtype::kI32, Device::kCpu, {&kStarts, 1}, start.data()),
           Tensor::of(Dtype::kI32, Device::kCuda, {&kStarts, 1}, routing.lists.start));
      EXPECT_EQ(start, (std::array<int32_t, 3>{0, 0, static_cast<int32_t>(tokens)}));
    }
  }
}

TEST(Route, TheBiasChoosesAndGroupsLimit) {
  const RouterConfig one{.score = RouterScore::kSigmoid, .top = 1};
  EXPECT_EQ(chosen({0, 1, 2, 3}, 4, one, {9, 0, 0, 0}), (std::vector<int32_t>{0}));
  // The best expert stands alone in its group; the other group's two are better together.
  const RouterConfig grouped{.score = RouterScore::kSigmoid, .top = 1, .groups = 2, .group_top = 1};
  EXPECT_EQ(chosen({4, -9, 2, 2}, 4, grouped), (std::vector<int32_t>{2}));
}

TEST(Route, RowsAreTheSlotsByExpert) {
  std::vector<float> logits = {0, 1, 5, 9, 1, 0, 0, 5, 9};  // experts 2 1, 0 1, 2 1
  Arena arena;
  Context ctx{.arena = &arena};
  const Routing routing = route(ctx, Tensor::of(logits.data(), {3, 3}), {}, {.top = 2});
  const ExpertLists& lists = routing.lists;
  EXPECT_EQ(std::vector<int32_t>(lists.start, lists.start + 4), (std::vector<int32_t>{0, 1, 4, 6}));
  EXPECT_EQ(std::vector<int32_t>(lists.slot, lists.slot + 6),
            (std::vector<int32_t>{2, 1, 3, 5, 0, 4}));
  for (int32_t s = 0; s < 6; ++s) {
    EXPECT_EQ(lists.slot[lists.row[s]], s);
  }
}

/// The losses of logits (T, E): those of the tokens, whose means are the call's.
std::vector<float> losses_of(std::vector<float> logits, int64_t experts,
                             const RouterConfig& config) {
  Arena arena;
  Context ctx{.arena = &arena};
  const Tensor t = Tensor::of(logits.data(), {std::ssize(logits) / experts, experts});
  const Tensor losses = router_losses(ctx, t, route(ctx, t, {}, config), config.score);
  return {losses.ptr<float>(), losses.ptr<float>() + losses.numel()};
}

TEST(RouterLosses, OneWhereExpertsGetAsMuchAndMoreWhereOneGetsAll) {
  const float much = 30.0F;  // a softmax of 0 and 1
  for (const RouterScore score : {RouterScore::kSoftmax, RouterScore::kSigmoid}) {
    const RouterConfig one{.score = score};
    const float other = score == RouterScore::kSoftmax ? 0.0F : -much;
    const std::vector<float> even = losses_of({much, other, other, much}, 2, one);
    EXPECT_NEAR(even[0], 1.0F, 1e-6F);
    EXPECT_NEAR(even[1], 1.0F, 1e-6F);
    EXPECT_NEAR(even[2], much * much, 1e-3F);
    // All tokens with one of two experts: twice as much.
    EXPECT_NEAR(losses_of({much, other, much, other}, 2, one)[0], 2.0F, 1e-6F);
  }
  // Undecided tokens cost the z-loss log(E)^2 and no balance, whoever is chosen.
  const std::vector<float> undecided = losses_of({0, 0, 0, 0, 0, 0, 0, 0}, 4, {.top = 2});
  EXPECT_NEAR(undecided[0], 1.0F, 1e-6F);
  EXPECT_NEAR(undecided[2], std::pow(std::log(4.0F), 2.0F), 1e-5F);
}

TEST(Experts, WhatIsAddedAndItsGateAreAsTheDefinition) {
  const Row row{"", 9, 6, 3, 24, 16, kMixtral};
  for (const bool gate : {false, true}) {
    const auto operation = [&](Context& c, const In& in) {
      const Routing routing = route(c, in[0], {}, {.top = row.top, .renormalise = true});
      return combine_with(c, dispatch(c, in[1], routing), routing, in[2], gate ? in[3] : Tensor{});
    };
    testing::expect_kernels_match_reference(operation, {{{row.tokens, row.experts}, -2, 2, false},
                                                        {{row.tokens, row.width}, -1, 1, false},
                                                        {{row.tokens, row.width}, -1, 1, false},
                                                        {{row.tokens, 1}, -2, 2, false}});
  }
}

TEST(Experts, ATokensResultDoesNotDependOnOthers) {
  const Row row{"", 40, 8, 3, 64, 48, kMixtral};
  const auto values = testing::draw(inputs_of(row));
  const auto run = [&](int64_t begin, int64_t count) {
    Row some = row;
    some.tokens = count;
    auto part = values;
    for (const size_t i : {size_t{0}, size_t{1}}) {
      const auto width = i == 0 ? row.experts : row.width;
      part[i] = {values[i].begin() + begin * width, values[i].begin() + (begin + count) * width};
    }
    return testing::run_operation<float>(
               [&](Context& c, const In& in) { return experts_of(c, in, some); }, inputs_of(some),
               part, false, false)
        .output;
  };
  const std::vector<double> all = run(0, row.tokens);
  for (const int64_t t : {0, 7, 39}) {
    EXPECT_EQ(run(t, 1),
              std::vector<double>(all.begin() + t * row.width, all.begin() + (t + 1) * row.width))
        << "token " << t;
  }
}

TEST(Experts, WrongInputsAreNamed) {
  Arena arena;
  Context ctx{.arena = &arena};
  const auto tensor = [&](std::initializer_list<int64_t> shape) {
    return arena.empty(Dtype::kF32, shape);
  };
  const auto error = [&](const std::function<void()>& f) { return testing::error_of(f); };
  EXPECT_EQ(error([&] {
              route(ctx, tensor({2, 4}), {}, {.top = 5});
            }),
            "[route] expected top from 1 to 4, the experts to choose from, got 5");
  EXPECT_EQ(error([&] {
              route(ctx, tensor({2, 4}), {}, {.groups = 3});
            }),
            "[route] expected groups that divide 4 experts and at most as many of them to stay, "
            "got 3 and 1");
  EXPECT_EQ(error([&] {
              route(ctx, tensor({2, 4}), tensor({3}), {});
            }),
            "[route] expected choice_bias f32 (4), got f32 (3)");
  EXPECT_EQ(error([&] {
              route(ctx, tensor({1, 2000}), {}, {});
            }),
            "[route] expected at most 1024 experts, got 2000");
  const Tensor logits = tensor({2, 4});
  std::fill_n(logits.ptr<float>(), 8, 0.0F);
  const Routing routing = route(ctx, logits, {}, {.top = 2});
  EXPECT_EQ(error([&] {
              router_losses(ctx, tensor({2, 5}), routing, RouterScore::kSoftmax);
            }),
            "[router_losses] expected the logits that were routed, of 2 tokens and 4 experts, got "
            "f32 (2, 5)");
  EXPECT_EQ(error([&] {
              dispatch(ctx, tensor({3, 8}), routing);
            }),
            "[dispatch] expected 2 tokens, as were routed, got f32 (3, 8)");
  EXPECT_EQ(error([&] {
              combine(ctx, tensor({3, 8}), routing);
            }),
            "[combine] expected 4 rows, one a token and expert, got f32 (3, 8)");
  EXPECT_EQ(error([&] {
              experts_matmul(ctx, tensor({4, 8}), tensor({4, 5, 7}), {}, routing);
            }),
            "[experts_matmul] expected a contiguous weight (4, N, 8) of f32 or bf16, got f32 (4, "
            "5, 7)");
  EXPECT_EQ(error([&] {
              experts_matmul(ctx, tensor({4, 8}), tensor({4, 5, 8}), tensor({4, 6}), routing);
            }),
            "[experts_matmul] expected a contiguous bias f32 (4, 5), got f32 (4, 6)");
  EXPECT_EQ(error([&] {
              combine_with(ctx, tensor({4, 8}), routing, tensor({2, 7}), {});
            }),
            "[combine_with] expected what is added as the result is, f32 (2, 8), got f32 (2, 7)");
  EXPECT_EQ(error([&] {
              combine_with(ctx, tensor({4, 8}), routing, tensor({2, 8}), tensor({2, 2}));
            }),
            "[combine_with] expected a gate for each of 2 tokens, f32 (2, 1), got f32 (2, 2)");
  EXPECT_EQ(error([&] {
              experts_hidden(ctx, tensor({3, 8}), tensor({4, 5, 8}), {}, tensor({4, 5, 8}), {}, 0,
                             routing);
            }),
            "[experts_hidden] expected 2 tokens, as were routed, got f32 (3, 8)");
  EXPECT_EQ(error([&] {
              experts_hidden(ctx, tensor({2, 8}), tensor({4, 5, 8}), {}, tensor({4, 6, 8}), {}, 0,
                             routing);
            }),
            "[experts_hidden] expected gate and up of one shape and type, with biases or without, "
            "got f32 (4, 5, 8) and f32 (4, 6, 8)");
}

}  // namespace
}  // namespace cambium
