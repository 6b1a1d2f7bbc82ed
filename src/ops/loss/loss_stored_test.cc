// The losses against a stored teacher: k tokens and the rest.
#include <numeric>

#include "ops/loss/loss.h"
#include "ops/loss/loss_testing.h"
#include "ops/testing.h"

namespace cambium {
namespace {

using namespace testing;  // NOLINT(google-build-using-namespace)

struct Case {
  const char* name;
  int64_t tokens, channels, vocabulary, k;
  LossConfig config;
  double spread = 1.0;  // of the logits
};

std::ostream& operator<<(std::ostream& out, const Case& c) {
  return out << c.name;
}

std::vector<Input> make_inputs(const Case& c) {
  return {{{c.tokens, c.channels}}, {{c.vocabulary, c.channels}, -c.spread, c.spread}};
}

struct Stored {
  std::vector<int32_t> tokens;
  std::vector<float> log_p;
  StoredTeacher view(int64_t k) const { return {k, tokens, log_p}; }
};

/// The k likeliest of softmax(hidden head^T) and the rest.
Stored store(const Case& c, const std::vector<double>& hidden, const std::vector<double>& head) {
  Stored stored;
  const auto n = static_cast<size_t>(c.vocabulary);
  const auto width = static_cast<size_t>(c.channels);
  for (size_t t = 0; t < static_cast<size_t>(c.tokens); ++t) {
    std::vector<double> logits(n);
    for (size_t v = 0; v < n; ++v) {
      for (size_t i = 0; i < width; ++i) {
        logits[v] += hidden[t * width + i] * head[v * width + i];
      }
    }
    std::vector<int32_t> order(n);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
      return logits[static_cast<size_t>(a)] > logits[static_cast<size_t>(b)];
    });
    const double largest = logits[static_cast<size_t>(order[0])];
    double sum = 0.0;
    double rest = 0.0;
    for (size_t i = n; i-- > 0;) {
      const double e = std::exp(logits[static_cast<size_t>(order[i])] - largest);
      sum += e;
      rest += i >= static_cast<size_t>(c.k) ? e : 0.0;
    }
    for (size_t i = 0; i < static_cast<size_t>(c.k); ++i) {
      stored.tokens.push_back(order[i]);
      stored.log_p.push_back(
          static_cast<float>(logits[static_cast<size_t>(order[i])] - largest - std::log(sum)));
    }
    stored.log_p.push_back(std::max(static_cast<float>(std::log(rest / sum)), -60000.0F));
  }
  return stored;
}

struct LossRun {
  LossSums sums;
  std::vector<double> dhidden, dhead;
};

constexpr double kScale = 0.37;

/// With `teacher`, the whole distribution of that hidden state and head.
template <class Real>
LossRun run_loss(const Case& c, const std::vector<std::vector<double>>& values,
                 const Stored& stored, bool reference, bool with_grad = true,
                 const std::vector<std::vector<double>>* teacher = nullptr) {
  Arena& arena = shared_arena();
  Context ctx{.arena = &arena, .reference = reference};
  const auto inputs = make_inputs(c);
  std::vector<OwnedTensor> owned;
  for (size_t i = 0; i < (teacher != nullptr ? 4 : 2); ++i) {
    const std::vector<double>& from = i < 2 ? values[i] : (*teacher)[i - 2];
    owned.emplace_back(DtypeOf<Real>::value, std::span<const int64_t>(inputs[i % 2].shape),
                       with_grad && i < 2);
    std::copy(from.begin(), from.end(), owned.back().view.template ptr<Real>());
  }
  const auto labels = testing::make_labels(c.tokens, c.vocabulary);
  LossRun run;
  run.sums = head_loss(ctx,
                       {.hidden = owned[0].view,
                        .head = owned[1].view,
                        .teacher_hidden = teacher != nullptr ? owned[2].view : Tensor{},
                        .teacher_head = teacher != nullptr ? owned[3].view : Tensor{},
                        .stored = teacher != nullptr ? StoredTeacher{} : stored.view(c.k),
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

class StoredLoss : public ::testing::TestWithParam<Case> {
 protected:
  const Case& c_ = GetParam();
  std::vector<std::vector<double>> values_ = draw(make_inputs(c_));
  std::vector<std::vector<double>> teacher_ = draw(make_inputs(c_), 2);
  Stored stored_ = store(c_, teacher_[0], teacher_[1]);
};

TEST_P(StoredLoss, GradientsMatchDifferences) {
  const LossRun exact = run_loss<double>(c_, values_, stored_, true);
  for (size_t i = 0; i < 2; ++i) {
    const auto& gradient = i == 0 ? exact.dhidden : exact.dhead;
    std::vector<double> analytic;
    std::vector<double> numeric;
    for (size_t j = 0; j < values_[i].size(); j += std::max<size_t>(1, values_[i].size() / 20)) {
      const double saved = values_[i][j];
      constexpr double kStep = 1e-5;
      values_[i][j] = saved + kStep;
      const double up = run_loss<double>(c_, values_, stored_, true, false).sums.total;
      values_[i][j] = saved - kStep;
      const double down = run_loss<double>(c_, values_, stored_, true, false).sums.total;
      values_[i][j] = saved;
      numeric.push_back(kScale * (up - down) / (2 * kStep));
      analytic.push_back(gradient[j]);
    }
    // The stored probabilities are floats: they sum to one within 1e-7.
    EXPECT_LE(relative_error(analytic, numeric), 2e-6) << "gradient of input " << i;
  }
}

void expect_same(const LossRun& run, const LossRun& exact, double tolerance) {
  EXPECT_EQ(run.sums.tokens, exact.sums.tokens);
  EXPECT_EQ(run.sums.agreement, exact.sums.agreement);
  EXPECT_EQ(run.sums.correct, exact.sums.correct);
  const std::vector<double> a = {run.sums.cross_entropy, run.sums.forward_kl, run.sums.reverse_kl,
                                 run.sums.total};
  const std::vector<double> b = {exact.sums.cross_entropy, exact.sums.forward_kl,
                                 exact.sums.reverse_kl, exact.sums.total};
  for (size_t i = 0; i < a.size(); ++i) {
    EXPECT_NEAR(a[i], b[i], tolerance * std::max(1.0, std::abs(b[i]))) << "sum " << i;
  }
  if (!run.dhidden.empty()) {
    EXPECT_LE(relative_error(run.dhidden, exact.dhidden), 10 * tolerance);
    EXPECT_LE(relative_error(run.dhead, exact.dhead), 10 * tolerance);
  }
}

TEST_P(StoredLoss, KernelsMatchDefinition) {
  const LossRun exact = run_loss<double>(c_, values_, stored_, true);
  for_each_isa([&] {
    expect_same(run_loss<float>(c_, values_, stored_, false), exact, 1e-5);
    expect_same(run_loss<float>(c_, values_, stored_, false, false), exact, 1e-5);
    for (const int64_t chunk : {1, 3, 1000}) {
      Case cut = c_;
      cut.config.chunk_tokens = chunk;
      expect_same(run_loss<float>(cut, values_, stored_, false), exact, 1e-5);
    }
  });
}

// The whole vocabulary is the whole teacher; less of it is never more than that.
TEST_P(StoredLoss, IsTheWholeKlWhereAllTokensAreStored) {
  const LossRun whole = run_loss<double>(c_, values_, stored_, true, true, &teacher_);
  const LossRun some = run_loss<double>(c_, values_, stored_, true);
  EXPECT_LE(some.sums.forward_kl, whole.sums.forward_kl + 1e-5);
  EXPECT_LE(some.sums.reverse_kl, whole.sums.reverse_kl + 1e-5);
  Case all = c_;
  all.k = c_.vocabulary;
  const Stored everything = store(all, teacher_[0], teacher_[1]);
  expect_same(run_loss<double>(all, values_, everything, true), whole, 1e-5);
  for_each_isa([&] { expect_same(run_loss<float>(all, values_, everything, false), whole, 1e-5); });
}

TEST_P(StoredLoss, CudaMatchesDefinition) {
  if (!on_cuda()) {
    GTEST_SKIP() << why_no_cuda();
  }
  for (const Dtype type : {Dtype::kF32, Dtype::kBF16}) {
    SCOPED_TRACE(dtype_name(type));
    std::vector<std::vector<double>> values = values_;
    for (auto& input : values) {
      input = as_stored(input, type);
    }
    const LossRun exact = run_loss<double>(c_, values, stored_, true);
    CudaContext cuda(type);
    const auto inputs = make_inputs(c_);
    const OwnedTensor hidden = cuda_tensor(type, inputs[0].shape, values[0], true);
    const OwnedTensor head = cuda_tensor(Dtype::kF32, inputs[1].shape, values[1], true);
    const auto labels = testing::make_labels(c_.tokens, c_.vocabulary);
    LossRun run;
    run.sums = head_loss(cuda.ctx,
                         {.hidden = hidden.view,
                          .head = head.view,
                          .stored = stored_.view(c_.k),
                          .labels = labels,
                          .scale = kScale},
                         c_.config);
    run.dhidden = take(hidden.view.grad_tensor());
    run.dhead = take(head.view.grad_tensor());
    if (type == Dtype::kF32) {
      expect_same(run, exact, 1e-5);
      continue;
    }
    // Logits in bf16: 2^-9 of the largest, which the spread bounds.
    const double bound = 0.02 * c_.spread * static_cast<double>(c_.channels);
    EXPECT_NEAR(run.sums.total, exact.sums.total,
                bound * std::max(1.0, std::abs(exact.sums.total)));
    EXPECT_LE(norm_error(run.dhidden, exact.dhidden), kNarrowBackward + bound);
    EXPECT_LE(norm_error(run.dhead, exact.dhead), kNarrowBackward + bound);
  }
}

INSTANTIATE_TEST_SUITE_P(
    Cases, StoredLoss,
    ::testing::Values(Case{"forward_kl", 8, 6, 33, 4, {.forward_kl = 1.0F}},
                      Case{"reverse_kl", 8, 6, 33, 4, {.reverse_kl = 1.0F}},
                      Case{"one_token", 7, 5, 40, 1, {.forward_kl = 0.5F, .reverse_kl = 0.5F}},
                      Case{"all_but_one", 7, 5, 40, 39, {.forward_kl = 0.5F, .reverse_kl = 0.5F}},
                      Case{"all", 7, 5, 40, 40, {.forward_kl = 0.5F, .reverse_kl = 0.5F}},
                      Case{"everything",
                           10,
                           6,
                           257,
                           32,
                           {.cross_entropy = 0.2F, .forward_kl = 0.3F, .reverse_kl = 0.5F}},
                      Case{"labels_alone", 7, 6, 50, 8, {.cross_entropy = 1.0F}},
                      Case{"sharp", 10, 6, 64, 8, {.forward_kl = 0.3F, .reverse_kl = 0.5F}, 20.0},
                      Case{"wide", 3, 4, 4501, 128, {.forward_kl = 0.5F, .reverse_kl = 0.5F}}),
    ::testing::PrintToStringParamName());

TEST(StoredLossErrors, NameWhatIsWrong) {
  Arena& arena = shared_arena();
  const ArenaScope scope(arena);
  Context ctx{.arena = &arena};
  const Tensor hidden = arena.empty(Dtype::kF32, {2, 4});
  const Tensor head = arena.empty(Dtype::kF32, {5, 4});
  const std::vector<int32_t> labels = {0, 1};
  const auto error = [&](const Stored& stored, int64_t k, LossConfig config, Tensor teacher = {}) {
    return error_of([&] {
      head_loss(ctx,
                {.hidden = hidden,
                 .head = head,
                 .teacher_hidden = teacher,
                 .teacher_head = head,
                 .stored = stored.view(k),
                 .labels = labels},
                config);
    });
  };
  const Stored good{{0, 1}, {-1, -1, -1, -1}};
  EXPECT_EQ(error(good, 1, {.reverse_kl = 1.0F, .temperature = 2.0F}),
            "[head_loss] a stored teacher is known at temperature 1 alone, got temperature 2");
  EXPECT_EQ(error(good, 2, {.reverse_kl = 1.0F}),
            "[head_loss] expected 2 rows of k <= 5 stored tokens and k + 1 log-probabilities, got "
            "k=2 with 2 and 4");
  EXPECT_EQ(error({{0, 5}, {-1, -1, -1, -1}}, 1, {.reverse_kl = 1.0F}),
            "[head_loss] expected stored tokens below the vocabulary 5, got 5");
  EXPECT_EQ(error(good, 1, {.reverse_kl = 1.0F}, hidden),
            "[head_loss] expected a teacher or a stored one, not both");
}

}  // namespace
}  // namespace cambium
