#include "ops/loss/loss.h"

#include "base/float16.h"
#include "ops/loss/loss_testing.h"
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
  float cap = 0.0F;  // of the student's logits; twice that of the teacher's
};

std::ostream& operator<<(std::ostream& out, const Case& c) {
  return out << c.name;
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
                        .logit_cap = c.cap,
                        .teacher_logit_cap = 2 * c.cap,
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

/// The head that is trained is f32, that of the teacher and the hidden states are of `type`.
LossRun run_loss_on_cuda(const Case& c, const std::vector<std::vector<double>>& values, Dtype type,
                         bool with_grad = true) {
  CudaContext cuda(type);
  const auto inputs = make_inputs(c);
  const auto tensor = [&](size_t i, Dtype dtype) {
    return cuda_tensor(dtype, inputs[i].shape, values[i], with_grad && i < 2);
  };
  const OwnedTensor hidden = tensor(0, type);
  const OwnedTensor head = tensor(1, Dtype::kF32);
  const OwnedTensor teacher_hidden = tensor(2, type);
  const OwnedTensor teacher_head = tensor(3, type);
  const auto labels = make_labels(c.tokens, c.vocabulary);
  const int64_t before = cuda_arena().used_bytes();
  LossRun run;
  run.sums = head_loss(cuda.ctx,
                       {.hidden = hidden.view,
                        .head = head.view,
                        .teacher_hidden = c.teacher ? teacher_hidden.view : Tensor{},
                        .teacher_head = c.teacher ? teacher_head.view : Tensor{},
                        .logit_cap = c.cap,
                        .teacher_logit_cap = 2 * c.cap,
                        .labels = labels,
                        .scale = kScale},
                       c.config);
  EXPECT_EQ(cuda_arena().used_bytes(), before);
  if (with_grad) {
    run.dhidden = take(hidden.view.grad_tensor());
    run.dhead = take(head.view.grad_tensor());
  }
  return run;
}

// What a row of logits says about its rounding.
struct LogitRow {
  double magnitude = 0.0;  // of the largest in size
  double gap = 0.0;        // of the largest to the next
};

std::vector<LogitRow> logit_rows(const std::vector<double>& hidden, const std::vector<double>& head,
                                 int64_t channels, int64_t vocabulary) {
  const auto width = static_cast<size_t>(channels);
  std::vector<LogitRow> rows;
  for (size_t t = 0; t * width < hidden.size(); ++t) {
    LogitRow row;
    double largest = -INFINITY;
    double next = -INFINITY;
    for (size_t v = 0; v < static_cast<size_t>(vocabulary); ++v) {
      double logit = 0.0;
      for (size_t i = 0; i < width; ++i) {
        logit += hidden[t * width + i] * head[v * width + i];
      }
      row.magnitude = std::max(row.magnitude, std::abs(logit));
      next = std::max(next, std::min(logit, largest));
      largest = std::max(largest, logit);
    }
    row.gap = largest - next;
    rows.push_back(row);
  }
  return rows;
}

/// What rounding logits to bf16 may cost, summed over the rows that count. A logit is off by at
/// most e, 2^-9 of the largest and a little for the sum it comes from. A log probability is then
/// off by d = 2 e / temperature, a probability by a factor within exp(+-d); cross-entropy by 2 e,
/// and sum_v p (log p - log q) by (exp(d) - 1) sum_v p |log p - log q| + 2 d, where the sum is at
/// most KL + sqrt(2 KL) (Pinsker).
struct RoundingBounds {
  RoundingBounds(const Case& c, const std::vector<std::vector<double>>& values,
                 const LossSums& exact) {
    const auto student = logit_rows(values[0], values[1], c.channels, c.vocabulary);
    const auto teacher = logit_rows(values[2], values[3], c.teacher_channels, c.vocabulary);
    const auto labels = make_labels(c.tokens, c.vocabulary);
    double e = 0.0;
    const double roundings = c.cap > 0.0F ? 2.0 : 1.0;  // a cap rounds once more
    for (size_t t = 0; t < labels.size(); ++t) {
      if (labels[t] >= 0) {
        e = std::max({e, roundings * 0x1.02p-9 * student[t].magnitude,
                      roundings * 0x1.02p-9 * teacher[t].magnitude});
      }
    }
    for (size_t t = 0; t < labels.size(); ++t) {
      if (labels[t] >= 0) {
        const bool close = student[t].gap <= 2 * e;
        correct += close ? 1 : 0;
        agreement += close || teacher[t].gap <= 2 * e ? 1 : 0;
      }
    }
    const double temperature = c.config.temperature;
    const double d = 2 * e / temperature;
    const auto rows = static_cast<double>(exact.tokens);
    const auto kl = [&](double sum) {
      return std::expm1(d) * (sum + std::sqrt(2 * std::max(sum, 0.0) * rows)) + 2 * d * rows;
    };
    cross_entropy = 2 * e * rows;
    forward_kl = kl(exact.forward_kl);
    reverse_kl = kl(exact.reverse_kl);
    total = c.config.cross_entropy * cross_entropy +
            temperature * temperature *
                (c.config.forward_kl * forward_kl + c.config.reverse_kl * reverse_kl);
    gradient = kNarrowBackward + std::expm1(2 * e / std::min(1.0, temperature));
  }

  double cross_entropy, forward_kl, reverse_kl, total;
  double gradient;  // relative to its norm
  int64_t agreement = 0;
  int64_t correct = 0;  // rows whose choice may change
};

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

// f32 is held to what the CPU is held to, bf16 to what rounding its logits may cost.
TEST_P(HeadLoss, CudaMatchesDefinition) {
  if (!on_cuda()) {
    GTEST_SKIP() << why_no_cuda();
  }
  const Case& c = GetParam();
  for (const Dtype type : {Dtype::kF32, Dtype::kBF16}) {
    SCOPED_TRACE(dtype_name(type));
    const bool narrow = type == Dtype::kBF16;
    auto values = draw(make_inputs(c));
    for (auto& input : values) {
      input = as_stored(input, type);
    }
    const LossRun exact = run_loss<double>(c, values, true);
    const RoundingBounds bounds(c, values, exact.sums);
    const auto expect_near = [&](double got, double expected, double bound, const char* name) {
      const double small = 1e-5 * std::max(1.0, std::abs(expected));
      EXPECT_NEAR(got, expected, narrow ? bound + small : small) << name;
    };
    const auto expect_same = [&](const LossRun& run, bool with_grad) {
      const LossSums& a = run.sums;
      const LossSums& b = exact.sums;
      EXPECT_EQ(a.tokens, b.tokens);
      EXPECT_LE(std::abs(a.agreement - b.agreement), narrow ? bounds.agreement : 0);
      EXPECT_LE(std::abs(a.correct - b.correct), narrow ? bounds.correct : 0);
      expect_near(a.cross_entropy, b.cross_entropy, bounds.cross_entropy, "cross-entropy");
      expect_near(a.forward_kl, b.forward_kl, bounds.forward_kl, "forward KL");
      expect_near(a.reverse_kl, b.reverse_kl, bounds.reverse_kl, "reverse KL");
      expect_near(a.total, b.total, bounds.total, "total");
      if (with_grad && narrow) {
        EXPECT_LE(norm_error(run.dhidden, exact.dhidden), bounds.gradient);
        EXPECT_LE(norm_error(run.dhead, exact.dhead), bounds.gradient);
      } else if (with_grad) {
        EXPECT_LE(relative_error(run.dhidden, exact.dhidden), 1e-4);
        EXPECT_LE(relative_error(run.dhead, exact.dhead), 1e-4);
      }
    };
    const LossRun run = run_loss_on_cuda(c, values, type);
    expect_same(run, true);
    expect_same(run_loss_on_cuda(c, values, type, false), false);
    for (const int64_t chunk : {1, 3, 7, 1000}) {
      Case cut = c;
      cut.config.chunk_tokens = chunk;
      expect_same(run_loss_on_cuda(cut, values, type), true);
    }
    const LossRun again = run_loss_on_cuda(c, values, type);
    EXPECT_EQ(again.sums.total, run.sums.total) << "two runs differ";
    EXPECT_EQ(again.dhidden, run.dhidden) << "two runs differ";
    EXPECT_EQ(again.dhead, run.dhead) << "two runs differ";
  }
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
        Case{"capped_logits",
             10,
             6,
             6,
             64,
             {.cross_entropy = 0.2F, .forward_kl = 0.3F, .reverse_kl = 0.5F, .temperature = 1.7F},
             3.0,
             true,
             2.0F},
        Case{"sharp_reverse", 10, 6, 6, 64, {.reverse_kl = 1.0F}, 20.0},
        Case{"wide", 3, 4, 4, 5000, {.reverse_kl = 1.0F}},
        // Several slices of a row on CUDA, whose last is short and unaligned.
        Case{"wider", 3, 3, 4, 4501, {.cross_entropy = 0.5F, .forward_kl = 0.5F}}),
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
    if (on_cuda()) {
      const LossRun run = run_loss_on_cuda(c, values, Dtype::kF32);
      EXPECT_NEAR(run.sums.total, exact.sums.total, 1e-5 * exact.sums.total);
      EXPECT_LE(relative_error(run.dhidden, exact.dhidden), 1e-3);
      EXPECT_LE(relative_error(run.dhead, exact.dhead), 1e-3);
      // bf16 cannot tell such logits apart; what comes of them is finite.
      const LossRun narrow = run_loss_on_cuda(c, values, Dtype::kBF16);
      EXPECT_TRUE(std::isfinite(narrow.sums.total));
      for (const auto* gradient : {&narrow.dhidden, &narrow.dhead}) {
        EXPECT_TRUE(std::all_of(gradient->begin(), gradient->end(),
                                [](double g) { return std::isfinite(g); }));
      }
    }
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
  for (const Dtype type : {Dtype::kF32, Dtype::kBF16}) {
    if (!on_cuda()) {
      break;
    }
    // Of bf16 the heads hold the same numbers in two types.
    for (auto& input : values) {
      input = as_stored(input, type);
    }
    const LossRun run = run_loss_on_cuda(c, values, type);
    EXPECT_NEAR(run.sums.total, 0.0, 1e-5) << dtype_name(type);
    EXPECT_EQ(run.sums.agreement, run.sums.tokens) << dtype_name(type);
    for (const double g : run.dhidden) {
      EXPECT_NEAR(g, 0.0, 1e-4) << dtype_name(type);
    }
  }
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
  if (!on_cuda()) {
    return;
  }
  const std::vector<double> expected = run(head.view);
  const auto hidden_values = to_doubles(hidden.view, hidden.view.data);
  for (const Dtype type : {Dtype::kF32, Dtype::kBF16}) {
    CudaContext cuda(type);
    const OwnedTensor there = cuda_tensor(type, {kTokens, kChannels}, hidden_values, true);
    const OwnedTensor weight =
        cuda_tensor(Dtype::kBF16, {kVocabulary, kChannels}, to_doubles(head.view, head.view.data));
    const LossSums sums =
        head_loss(cuda.ctx, {.hidden = there.view, .head = weight.view, .labels = labels},
                  {.cross_entropy = 1.0F});
    auto result = take(there.view.grad_tensor());
    result.push_back(sums.total);
    EXPECT_LE(norm_error(result, expected), type == Dtype::kF32 ? 1e-5 : kNarrowBackward)
        << dtype_name(type);
  }
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
  if (on_cuda()) {
    const Case c{"", 3, 4, 4, 7, {.cross_entropy = 1.0F}, 1.0, false};
    CudaContext cuda;
    const auto values = draw(make_inputs(c));
    const OwnedTensor there = cuda_tensor(Dtype::kF32, {3, 4}, values[0], true);
    const OwnedTensor weight = cuda_tensor(Dtype::kF32, {7, 4}, values[1], true);
    EXPECT_EQ(
        head_loss(cuda.ctx, {.hidden = there.view, .head = weight.view, .labels = labels}, c.config)
            .total,
        0.0);
    EXPECT_EQ(take(there.view.grad_tensor()), std::vector<double>(12, 0.0));
    EXPECT_EQ(take(weight.view.grad_tensor()), std::vector<double>(28, 0.0));
  }
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
  for (const Dtype type : {Dtype::kF32, Dtype::kBF16}) {
    if (!on_cuda()) {
      break;
    }
    SCOPED_TRACE(std::string("cuda ") + dtype_name(type));
    for (auto& input : values) {
      input = as_stored(input, type);
    }
    const double expected = run.template operator()<double>(true);
    const std::vector<double> expected_grad = std::exchange(grad, {});
    CudaContext cuda(type);
    const OwnedTensor out = cuda_tensor(type, {tokens, channels}, values[0], true);
    const OwnedTensor target = cuda_tensor(type, {tokens, channels}, values[1]);
    const double sum = align_loss(cuda.ctx, out.view, target.view, labels, squared, kScale);
    EXPECT_NEAR(sum, expected, 1e-5 * expected);
    const auto once = take(out.view.grad_tensor());
    EXPECT_LE(norm_error(once, expected_grad), type == Dtype::kF32 ? 1e-5 : kNarrowForward);
    align_loss(cuda.ctx, out.view, target.view, labels, squared, kScale);
    auto twice = take(out.view.grad_tensor());
    std::transform(twice.begin(), twice.end(), twice.begin(), [](double g) { return g / 2; });
    EXPECT_EQ(twice, once) << "the gradient is added to what is there";
  }
}

INSTANTIATE_TEST_SUITE_P(Cases, AlignLoss,
                         ::testing::Values(AlignCase{4, 7, false, false},
                                           AlignCase{9, 33, true, true},
                                           AlignCase{9, 64, false, true},
                                           AlignCase{70, 264, true, true}),
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
