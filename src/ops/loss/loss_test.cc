#include "ops/loss/loss.h"

#include "base/float16.h"
#include "ops/stateful_testing.h"

namespace cambium {
namespace {

using namespace testing;  // NOLINT(google-build-using-namespace)

struct Case {
  const char* name;
  int64_t tokens, channels, teacher_channels, vocabulary;
  LossConfig config;
  double spread = 1.0;  // of the logits
  bool teacher = true;
};

std::ostream& operator<<(std::ostream& out, const Case& c) {
  return out << c.name;
}

std::vector<int32_t> make_labels(int64_t tokens, int64_t vocabulary) {
  std::vector<int32_t> labels;
  for (int64_t t = 0; t < tokens; ++t) {
    labels.push_back(t % 3 == 1 ? -100 : static_cast<int32_t>((7 * t + 2) % vocabulary));
  }
  return labels;
}

std::vector<Input> make_inputs(const Case& c) {
  const double head = c.spread;
  return {{{c.tokens, c.channels}},
          {{c.vocabulary, c.channels}, -head, head},
          {{c.tokens, c.teacher_channels}, -1.0, 1.0, false},
          {{c.vocabulary, c.teacher_channels}, -head, head, false}};
}

struct LossRun {
  LossSums sums;
  std::vector<double> dhidden, dhead;
};

constexpr double kScale = 0.37;

template <class Real>
LossRun run_loss(const Case& c, const std::vector<std::vector<double>>& values, bool reference,
                 bool with_grad = true) {
  Arena& arena = shared_arena();
  Context ctx{.arena = &arena, .reference = reference};
  const auto inputs = make_inputs(c);
  std::vector<OwnedTensor> owned;
  for (size_t i = 0; i < inputs.size(); ++i) {
    owned.emplace_back(DtypeOf<Real>::value, std::span<const int64_t>(inputs[i].shape),
                       with_grad && i < 2);
    std::copy(values[i].begin(), values[i].end(), owned.back().view.template ptr<Real>());
  }
  const auto labels = make_labels(c.tokens, c.vocabulary);
  LossRun run;
  run.sums = head_loss(ctx,
                       {.hidden = owned[0].view,
                        .head = owned[1].view,
                        .teacher_hidden = c.teacher ? owned[2].view : Tensor{},
                        .teacher_head = c.teacher ? owned[3].view : Tensor{},
                        .labels = labels,
                        .scale = kScale},
                       c.config);
  EXPECT_EQ(arena.used_bytes(), 0);
  if (with_grad) {
    run.dhidden = to_doubles(owned[0].view, owned[0].view.grad);
    run.dhead = to_doubles(owned[1].view, owned[1].view.grad);
  }
  return run;
}

class HeadLoss : public ::testing::TestWithParam<Case> {};

TEST_P(HeadLoss, GradientsMatchDifferences) {
  const Case& c = GetParam();
  auto values = draw(make_inputs(c));
  const LossRun exact = run_loss<double>(c, values, true);
  for (size_t i = 0; i < 2; ++i) {
    const auto& gradient = i == 0 ? exact.dhidden : exact.dhead;
    std::vector<double> analytic;
    std::vector<double> numeric;
    for (size_t j = 0; j < values[i].size(); j += std::max<size_t>(1, values[i].size() / 20)) {
      const double saved = values[i][j];
      constexpr double kStep = 1e-5;
      values[i][j] = saved + kStep;
      const double up = run_loss<double>(c, values, true, false).sums.total;
      values[i][j] = saved - kStep;
      const double down = run_loss<double>(c, values, true, false).sums.total;
      values[i][j] = saved;
      numeric.push_back(kScale * (up - down) / (2 * kStep));
      analytic.push_back(gradient[j]);
    }
    EXPECT_LE(relative_error(analytic, numeric), 1e-6) << "gradient of input " << i;
  }
}

TEST_P(HeadLoss, KernelsMatchDefinition) {
  const Case& c = GetParam();
  const auto values = draw(make_inputs(c));
  const LossRun exact = run_loss<double>(c, values, true);
  const auto expect_same = [&](const LossRun& run, bool with_grad) {
    EXPECT_EQ(run.sums.tokens, exact.sums.tokens);
    EXPECT_EQ(run.sums.agreement, exact.sums.agreement);
    EXPECT_EQ(run.sums.correct, exact.sums.correct);
    const std::vector<double> a = {run.sums.cross_entropy, run.sums.forward_kl, run.sums.reverse_kl,
                                   run.sums.total};
    const std::vector<double> b = {exact.sums.cross_entropy, exact.sums.forward_kl,
                                   exact.sums.reverse_kl, exact.sums.total};
    for (size_t i = 0; i < a.size(); ++i) {
      EXPECT_NEAR(a[i], b[i], 1e-5 * std::max(1.0, std::abs(b[i]))) << "sum " << i;
    }
    if (with_grad) {
      EXPECT_LE(relative_error(run.dhidden, exact.dhidden), 1e-4);
      EXPECT_LE(relative_error(run.dhead, exact.dhead), 1e-4);
    }
  };
  expect_same(run_loss<float>(c, values, true), true);
  for_each_isa([&] {
    expect_same(run_loss<float>(c, values, false), true);
    expect_same(run_loss<float>(c, values, false, false), false);
    for (const int64_t chunk : {1, 3, 7, 1000}) {
      Case cut = c;
      cut.config.chunk_tokens = chunk;
      expect_same(run_loss<float>(cut, values, false), true);
    }
  });
}

INSTANTIATE_TEST_SUITE_P(
    Cases, HeadLoss,
    ::testing::Values(
        Case{"cross_entropy", 9, 5, 5, 17, {.cross_entropy = 1.0F}, 1.0, false},
        Case{"cross_entropy_reports_kl", 9, 5, 4, 300, {.cross_entropy = 0.5F}},
        Case{"forward_kl", 8, 6, 4, 33, {.forward_kl = 1.0F}},
        Case{"reverse_kl", 8, 6, 4, 33, {.reverse_kl = 1.0F}},
        Case{"reverse_kl_warm", 8, 6, 4, 70, {.reverse_kl = 2.0F, .temperature = 2.5F}},
        Case{"forward_kl_cold", 8, 6, 4, 40, {.forward_kl = 0.7F, .temperature = 0.5F}},
        Case{"forward_and_labels", 7, 6, 6, 50, {.cross_entropy = 0.3F, .forward_kl = 0.7F}},
        Case{"reverse_and_labels", 7, 6, 6, 50, {.cross_entropy = 0.3F, .reverse_kl = 0.7F}},
        Case{"everything",
             10,
             6,
             8,
             257,
             {.cross_entropy = 0.2F, .forward_kl = 0.3F, .reverse_kl = 0.5F, .temperature = 1.7F}},
        Case{"sharp",
             10,
             6,
             6,
             64,
             {.cross_entropy = 0.2F, .forward_kl = 0.3F, .reverse_kl = 0.5F},
             20.0},
        Case{"sharp_reverse", 10, 6, 6, 64, {.reverse_kl = 1.0F}, 20.0},
        Case{"wide", 3, 4, 4, 5000, {.reverse_kl = 1.0F}}),
    ::testing::PrintToStringParamName());

// Logits hundreds apart: exponentials underflow, the losses stay finite and right.
TEST(HeadLossExtremes, HugeLogits) {
  for (const LossConfig& config :
       {LossConfig{.cross_entropy = 1.0F}, LossConfig{.reverse_kl = 1.0F},
        LossConfig{.forward_kl = 1.0F}, LossConfig{.forward_kl = 1.0F, .reverse_kl = 1.0F}}) {
    const Case c{"", 6, 4, 4, 50, config, 2000.0};
    const auto values = draw(make_inputs(c));
    const LossRun exact = run_loss<double>(c, values, true);
    for_each_isa([&] {
      const LossRun run = run_loss<float>(c, values, false);
      EXPECT_NEAR(run.sums.total, exact.sums.total, 1e-5 * exact.sums.total);
      EXPECT_LE(relative_error(run.dhidden, exact.dhidden), 1e-3);
      EXPECT_LE(relative_error(run.dhead, exact.dhead), 1e-3);
    });
  }
}

TEST(HeadLossKl, IsZeroForTheTeacherItself) {
  const Case c{"", 5, 6, 6, 100, {.forward_kl = 1.0F, .reverse_kl = 1.0F}};
  auto values = draw(make_inputs(c));
  values[2] = values[0];
  values[3] = values[1];
  for_each_isa([&] {
    const LossRun run = run_loss<float>(c, values, false);
    EXPECT_EQ(run.sums.total, 0.0);
    EXPECT_EQ(run.sums.agreement, run.sums.tokens);
    for (const double g : run.dhidden) {
      EXPECT_NEAR(g, 0.0, 1e-7);
    }
  });
}

// A frozen bf16 head gives what the same numbers give in f32, and the hidden states their gradient.
TEST(HeadLossBf16, FrozenHead) {
  constexpr int64_t kTokens = 5, kChannels = 8, kVocabulary = 40;
  Arena arena;
  Context ctx{.arena = &arena};
  const OwnedTensor hidden(Dtype::kF32, {kTokens, kChannels}, true);
  const OwnedTensor head(Dtype::kF32, {kVocabulary, kChannels});
  const OwnedTensor narrow(Dtype::kBF16, {kVocabulary, kChannels});
  for (int64_t i = 0; i < hidden.view.numel(); ++i) {
    hidden.view.ptr<float>()[i] = static_cast<float>(std::sin(i));
  }
  for (int64_t i = 0; i < head.view.numel(); ++i) {
    narrow.view.ptr<bf16>()[i] = round_to_bf16(static_cast<float>(std::cos(3 * i)));
    head.view.ptr<float>()[i] = widen(narrow.view.ptr<bf16>()[i]);
  }
  const auto labels = make_labels(kTokens, kVocabulary);
  const auto run = [&](const Tensor& weight) {
    std::fill_n(hidden.view.grad_ptr<float>(), hidden.view.numel(), 0.0F);
    const LossSums sums = head_loss(ctx, {.hidden = hidden.view, .head = weight, .labels = labels},
                                    {.cross_entropy = 1.0F});
    auto result = to_doubles(hidden.view, hidden.view.grad);
    result.push_back(sums.total);
    return result;
  };
  for_each_isa([&] { EXPECT_LE(relative_error(run(narrow.view), run(head.view)), 1e-5); });
}

TEST(HeadLossMask, NoLabelsNoWork) {
  Arena arena;
  Context ctx{.arena = &arena};
  const OwnedTensor hidden(Dtype::kF32, {3, 4}, true);
  const OwnedTensor head(Dtype::kF32, {7, 4}, true);
  const std::vector<int32_t> labels = {-1, -1, -1};
  const LossSums sums = head_loss(ctx, {.hidden = hidden.view, .head = head.view, .labels = labels},
                                  {.cross_entropy = 1.0F});
  EXPECT_EQ(sums.tokens, 0);
  EXPECT_EQ(sums.total, 0.0);
}

TEST(HeadLossErrors, NameWhatIsWrong) {
  Arena arena;
  Context ctx{.arena = &arena};
  const std::vector<int32_t> labels = {1, 2, 3};
  const LossInputs good{.hidden = arena.empty(Dtype::kF32, {3, 4}),
                        .head = arena.empty(Dtype::kF32, {7, 4}),
                        .labels = labels};
  const auto message = [&](auto change, LossConfig config = {.cross_entropy = 1.0F}) {
    LossInputs in = good;
    change(in);
    return error_of([&] { head_loss(ctx, in, config); });
  };
  EXPECT_EQ(message([](auto&) {}, {.reverse_kl = 1.0F}),
            "[head_loss] the KL terms need a teacher; give its hidden states and head");
  EXPECT_EQ(message([&](auto& in) {
              in.head = arena.empty(Dtype::kF32, {7, 5});
            }),
            "[head_loss] expected the student's head (V, 4) of f32 or bf16, got f32 (7, 5)");
  EXPECT_EQ(message([&](auto& in) {
              in.head = arena.empty(Dtype::kF32, {3, 4});
            }),
            "[head_loss] expected labels below the vocabulary 3, got 3");
  EXPECT_EQ(message([&](auto& in) { in.labels = in.labels.subspan(1); }),
            "[head_loss] expected a label for each of 3 rows, got 2");
  EXPECT_EQ(message([&](auto& in) {
              in.teacher_hidden = arena.empty(Dtype::kF32, {3, 8});
              in.teacher_head = arena.empty(Dtype::kF32, {9, 8});
            }),
            "[head_loss] expected a teacher with the student's vocabulary of 7, got 9");
  EXPECT_EQ(message([](auto&) {}, {.cross_entropy = 1.0F, .temperature = 0.0F}),
            "[head_loss] expected a temperature above 0, got 0");
}

struct AlignCase {
  int64_t tokens, channels;
  bool squared, masked;
};

std::ostream& operator<<(std::ostream& out, const AlignCase& c) {
  return out << c.tokens << "x" << c.channels << (c.squared ? "_squared" : "")
             << (c.masked ? "_masked" : "");
}

class AlignLoss : public ::testing::TestWithParam<AlignCase> {};

TEST_P(AlignLoss, MatchesDefinitionAndDifferences) {
  const AlignCase& c = GetParam();
  const int64_t tokens = c.tokens;
  const int64_t channels = c.channels;
  const bool squared = c.squared;
  const bool masked = c.masked;
  auto values = draw({{{tokens, channels}}, {{tokens, channels}}});
  const auto labels = masked ? make_labels(tokens, 5) : std::vector<int32_t>{};
  std::vector<double> grad;
  const auto run = [&]<class Real>(bool reference) {
    Context ctx{.arena = &shared_arena(), .reference = reference};
    const OwnedTensor out(DtypeOf<Real>::value, {tokens, channels}, true);
    const OwnedTensor target(DtypeOf<Real>::value, {tokens, channels});
    std::copy(values[0].begin(), values[0].end(), out.view.template ptr<Real>());
    std::copy(values[1].begin(), values[1].end(), target.view.template ptr<Real>());
    const double sum = align_loss(ctx, out.view, target.view, labels, squared, kScale);
    grad = to_doubles(out.view, out.view.grad);
    return sum;
  };
  const double exact = run.template operator()<double>(true);
  const std::vector<double> exact_grad = grad;
  for (size_t j = 0; j < values[0].size(); j += 5) {
    const double saved = values[0][j];
    values[0][j] = saved + 1e-5;
    const double up = run.template operator()<double>(true);
    values[0][j] = saved - 1e-5;
    const double down = run.template operator()<double>(true);
    values[0][j] = saved;
    EXPECT_NEAR(exact_grad[j], kScale * (up - down) / 2e-5, 1e-7);
  }
  for_each_isa([&] {
    EXPECT_NEAR(run.template operator()<float>(false), exact, 1e-5 * exact);
    EXPECT_LE(relative_error(grad, exact_grad), 1e-5);
  });
}

INSTANTIATE_TEST_SUITE_P(Cases, AlignLoss,
                         ::testing::Values(AlignCase{4, 7, false, false},
                                           AlignCase{9, 33, true, true},
                                           AlignCase{9, 64, false, true}),
                         ::testing::PrintToStringParamName());

TEST(AlignLossErrors, NameWhatIsWrong) {
  Arena arena;
  Context ctx{.arena = &arena};
  const Tensor out = arena.empty(Dtype::kF32, {3, 4});
  EXPECT_EQ(error_of([&] {
              align_loss(ctx, out, arena.empty(Dtype::kF32, {3, 5}), {}, false, 1.0);
            }),
            "[align_loss] expected a target shaped like out f32 (3, 4), got f32 (3, 5)");
}

}  // namespace
}  // namespace cambium
