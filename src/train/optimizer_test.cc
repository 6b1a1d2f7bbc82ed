#include "train/optimizer.h"

#include <gmock/gmock.h>

#include <map>

#include "base/error.h"
#include "base/testing.h"
#include "ops/optimizer/optimizer.h"
#include "ops/testing.h"
#include "train/testing.h"

namespace cambium {
namespace {

using testing::for_each_isa;
using ::testing::HasSubstr;
using testing::relative_error;
using Numbers = std::vector<double>;

Numbers draw(int64_t n, uint64_t stream, double scale = 1.0) {
  Rng rng(5, stream);
  Numbers values;
  for (int64_t i = 0; i < n; ++i) {
    // Rounded to float, so that both precisions see the same numbers.
    values.push_back(static_cast<float>(scale * static_cast<double>(rng.normal())));
  }
  return values;
}

/// AdamW as the paper's algorithm 2 has it.
struct NaiveAdamw {
  double rate, beta1, beta2, epsilon, decay;

  void step(int64_t t, const Numbers& g, Numbers& p, Numbers& m, Numbers& v) const {
    for (size_t i = 0; i < p.size(); ++i) {
      m[i] = beta1 * m[i] + (1 - beta1) * g[i];
      v[i] = beta2 * v[i] + (1 - beta2) * g[i] * g[i];
      const double m_hat = m[i] / (1 - std::pow(beta1, static_cast<double>(t)));
      const double v_hat = v[i] / (1 - std::pow(beta2, static_cast<double>(t)));
      p[i] -= rate * (m_hat / (std::sqrt(v_hat) + epsilon) + decay * p[i]);
    }
  }
};

Numbers transposed(const Numbers& x, int64_t rows, int64_t columns) {
  Numbers out(x.size());
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) {
      out[static_cast<size_t>(c * rows + r)] = x[static_cast<size_t>(r * columns + c)];
    }
  }
  return out;
}

/// a (n, k) times b (k, m)
Numbers product(const Numbers& a, const Numbers& b, int64_t n, int64_t k, int64_t m) {
  Numbers out(static_cast<size_t>(n * m), 0.0);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < m; ++j) {
      for (int64_t l = 0; l < k; ++l) {
        out[static_cast<size_t>(i * m + j)] +=
            a[static_cast<size_t>(i * k + l)] * b[static_cast<size_t>(l * m + j)];
      }
    }
  }
  return out;
}

/// Five rounds of X <- 3.4445 X - 4.7750 (X X^T) X + 2.0315 (X X^T)^2 X from X / |X|, on the rows
/// as they come: X (X^T X) = (X X^T) X, so a tall matrix needs no transposition here.
Numbers newton_schulz(Numbers x, int64_t rows, int64_t columns) {
  double square = 0.0;
  for (const double value : x) {
    square += value * value;
  }
  for (double& value : x) {
    value /= std::sqrt(square);
  }
  for (int round = 0; round < 5; ++round) {
    const Numbers a = product(x, transposed(x, rows, columns), rows, columns, rows);
    const Numbers ax = product(a, x, rows, rows, columns);
    const Numbers aax = product(a, ax, rows, rows, columns);
    for (size_t i = 0; i < x.size(); ++i) {
      x[i] = 3.4445 * x[i] - 4.7750 * ax[i] + 2.0315 * aax[i];
    }
  }
  return x;
}

struct NaiveMuon {
  double rate, momentum, decay;

  void step(const Numbers& g, Numbers& p, Numbers& m, int64_t rows, int64_t columns) const {
    Numbers nesterov;
    for (size_t i = 0; i < p.size(); ++i) {
      m[i] = momentum * m[i] + (1 - momentum) * g[i];
      nesterov.push_back(momentum * m[i] + (1 - momentum) * g[i]);
    }
    const Numbers x = newton_schulz(nesterov, rows, columns);
    const double factor = 0.2 * std::sqrt(static_cast<double>(std::max(rows, columns)));
    for (size_t i = 0; i < p.size(); ++i) {
      p[i] -= rate * (factor * x[i] + decay * p[i]);
    }
  }

  /// Of a stack, each matrix by itself.
  void step_each(const Numbers& g, Numbers& p, Numbers& m,
                 const std::vector<int64_t>& shape) const {
    const int64_t rows = shape[shape.size() - 2];
    const int64_t columns = shape.back();
    for (int64_t at = 0; at < std::ssize(p); at += rows * columns) {
      const auto matrix = [&](const Numbers& all) {
        return Numbers(all.begin() + at, all.begin() + at + rows * columns);
      };
      Numbers one = matrix(p);
      Numbers momentum_of_one = matrix(m);
      step(matrix(g), one, momentum_of_one, rows, columns);
      std::copy(one.begin(), one.end(), p.begin() + at);
      std::copy(momentum_of_one.begin(), momentum_of_one.end(), m.begin() + at);
    }
  }
};

struct KernelRow {
  const char* name;
  int64_t step;
  double gradient_scale, weight_decay, beta1, beta2, epsilon;
};

// Every tail of every vector width, pieces for several threads; the memory behind stays as it is.
TEST(AdamwKernel, MatchesDefinition) {
  const KernelRow rows[] = {
      {"first step", 1, 1.0, 0.0, 0.9, 0.95, 1e-8}, {"later", 7, 1.0, 0.0, 0.9, 0.95, 1e-8},
      {"decay", 3, 1.0, 0.3, 0.9, 0.95, 1e-8},      {"clipped", 2, 0.01, 0.0, 0.9, 0.95, 1e-8},
      {"no momentum", 4, 1.0, 0.1, 0.0, 0.5, 1e-8}, {"large epsilon", 4, 1.0, 0.1, 0.9, 0.95, 0.5}};
  const auto check = [](const KernelRow& row, int64_t n) {
    constexpr int64_t kBehind = 16;
    const auto fill = [n](const Numbers& from) {
      std::vector<float> to(static_cast<size_t>(n + kBehind), 77.0F);
      std::copy(from.begin(), from.end(), to.begin());
      return to;
    };
    Numbers p = draw(n, 1);
    const Numbers g = draw(n, 2, 3.0);
    Numbers m = draw(n, 3, 0.2);
    Numbers v = draw(n, 4);
    for (double& x : v) {
      x = static_cast<float>(x * x);
    }
    std::vector<float> fp = fill(p);
    std::vector<float> fg = fill(g);
    std::vector<float> fm = fill(m);
    std::vector<float> fv = fill(v);
    const auto t = static_cast<double>(row.step);
    Arena arena;
    adamw_update({.arena = &arena}, Tensor::of(fp.data(), {n}, fg.data()),
                 Tensor::of(fm.data(), {n}), Tensor::of(fv.data(), {n}),
                 {.gradient_scale = static_cast<float>(row.gradient_scale),
                  .rate = 0.02F,
                  .beta1 = static_cast<float>(row.beta1),
                  .beta2 = static_cast<float>(row.beta2),
                  .m_correction = static_cast<float>(1 / (1 - std::pow(row.beta1, t))),
                  .v_correction = static_cast<float>(1 / (1 - std::pow(row.beta2, t))),
                  .epsilon = static_cast<float>(row.epsilon),
                  .weight_decay = static_cast<float>(row.weight_decay)});
    Numbers scaled = g;
    for (double& x : scaled) {
      x *= row.gradient_scale;
    }
    NaiveAdamw{0.02, row.beta1, row.beta2, row.epsilon, row.weight_decay}.step(row.step, scaled, p,
                                                                               m, v);
    const auto head = [n](const std::vector<float>& x) {
      return Numbers(x.begin(), x.begin() + n);
    };
    EXPECT_LE(relative_error(head(fp), p), 1e-6) << row.name << ", n " << n;
    EXPECT_LE(relative_error(head(fm), m), 1e-6) << row.name << ", n " << n;
    EXPECT_LE(relative_error(head(fv), v), 1e-6) << row.name << ", n " << n;
    EXPECT_EQ(head(fg), head(fill(g))) << row.name << ", n " << n;
    for (const std::vector<float>* memory : {&fp, &fg, &fm, &fv}) {
      EXPECT_EQ(std::vector<float>(memory->begin() + n, memory->end()),
                std::vector<float>(kBehind, 77.0F))
          << row.name << ", n " << n;
    }
  };
  for_each_isa([&] {
    for (const KernelRow& row : rows) {
      for (const int64_t n : {1, 3, 7, 8, 15, 16, 17, 33, 100}) {
        check(row, n);
      }
    }
    check(rows[2], 50001);
  });
}

TEST(SumSquaresKernel, MatchesDefinition) {
  for_each_isa([] {
    for (const int64_t n : {0, 1, 7, 16, 19, 1024, 1025, 5003}) {
      const Numbers values = draw(n, 6, 10.0);
      std::vector<float> x(values.begin(), values.end());
      x.insert(x.end(), 16, 1e6F);  // not to be read
      double expected = 0.0;
      for (const double value : values) {
        expected += value * value;
      }
      Arena arena;
      const double result = sum_squares({.arena = &arena}, Tensor::of(x.data(), {n}));
      EXPECT_NEAR(result, expected, 1e-6 * expected) << n;
    }
  });
}

/// A layer of attention, one of Mamba and one of experts: matrices wide and tall, a convolution of
/// rank 3, stacks of matrices, vectors, and a matrix that is kept in fp32.
ModelSpec trained_spec() {
  ModelSpec spec = testing::tiny_spec({testing::attention_mixer(),
                                       {"mamba",
                                        {{"inner", int64_t{16}},
                                         {"xb", int64_t{8}},
                                         {"state", int64_t{4}},
                                         {"dt_rank", int64_t{2}}}}});
  spec.layers.push_back(testing::tiny_experts(1).layers.front());
  return spec;
}

struct Trained {
  explicit Trained(const TrainablePredicate& trainable) : loaded(fresh_model(trained_spec(), 1)) {
    loaded.weights.set_trainable(*loaded.model, trainable);
  }
  Model& model() const { return *loaded.model; }

  /// Fresh gradients, each parameter's from a stream of its own.
  std::map<std::string, Numbers> set_gradients(uint64_t step) const {
    std::map<std::string, Numbers> all;
    uint64_t stream = 1000 * step;
    model().visit([&](const std::string& name, Parameter& p) {
      if (p.tensor.has_grad()) {
        all[name] = draw(p.numel(), ++stream, 0.1);
        std::copy(all[name].begin(), all[name].end(), p.tensor.grad_ptr<float>());
      }
    });
    return all;
  }

  LoadedModel loaded;
};

bool everything(const std::string& /*name*/, const Parameter& /*parameter*/) {
  return true;
}

OptimizerConfig grouped_config(OptimizerKind kind) {
  OptimizerConfig config;
  config.kind = kind;
  config.clip_norm = 0.7;
  config.group(ParameterGroup::kMixer) = {0.5, 0.1};
  config.group(ParameterGroup::kFeedForward) = {1.0, 0.2};
  config.group(ParameterGroup::kNorm) = {2.0, 0.3};
  config.group(ParameterGroup::kEmbedding) = {0.25, 0.4};
  return config;
}

bool ends_with_any(const std::string& name, const std::vector<std::string>& ends) {
  return std::any_of(ends.begin(), ends.end(),
                     [&](const std::string& end) { return name.ends_with(end); });
}

/// What never decays, and what Muon takes, by name.
bool never_decays(const std::string& name) {
  return ends_with_any(name, {"bias", "norm.weight", "A_log", "D"});
}
bool is_muons(const std::string& name) {
  return ends_with_any(
      name, {"_proj.weight", "gate.weight", "up.weight", "down.weight", "router.weight"});
}

// Steps of a whole model: bias correction, decoupled decay, rates by group, clipping by the global
// norm, and gradients that are zero afterwards.
void expect_steps_match_definition(OptimizerKind kind, double tolerance) {
  const Trained trained(everything);
  const OptimizerConfig config = grouped_config(kind);
  Optimizer optimizer(trained.model(), config);
  struct State {
    Numbers p, m, v;
  };
  std::map<std::string, State> naive;
  trained.model().visit([&](const std::string& name, Parameter& p) {
    const auto n = static_cast<size_t>(p.numel());
    naive[name] = {{p.tensor.ptr<float>(), p.tensor.ptr<float>() + n}, Numbers(n), Numbers(n)};
  });
  int muons = 0;
  for (int64_t t = 1; t <= 4; ++t) {
    const double rate = 0.02 / static_cast<double>(t);
    auto gradients = trained.set_gradients(static_cast<uint64_t>(t));
    double square = 0.0;
    for (const auto& [name, g] : gradients) {
      for (const double x : g) {
        square += x * x;
      }
    }
    const double norm = std::sqrt(square);
    ASSERT_GT(norm, config.clip_norm);
    EXPECT_NEAR(optimizer.gradient_norm(), norm, 1e-6 * norm);
    // The third step is not clipped: the norm that is given counts.
    const double given = t == 3 ? 0.5 : norm;
    const double scale = t == 3 ? 1.0 : config.clip_norm / norm;
    optimizer.step(rate, given);
    EXPECT_EQ(optimizer.steps_taken(), t);
    trained.model().visit([&](const std::string& name, Parameter& p) {
      Numbers& g = gradients[name];
      for (double& x : g) {
        x *= scale;
      }
      State& state = naive[name];
      const GroupConfig& group = config.group(p.group);
      const double decay = never_decays(name) ? 0.0 : group.weight_decay;
      const double group_rate = rate * group.rate_scale;
      const Numbers before = state.p;
      if (kind == OptimizerKind::kMuon && is_muons(name)) {
        ++muons;
        NaiveMuon{group_rate, config.momentum, decay}.step_each(g, state.p, state.m, p.shape);
      } else {
        NaiveAdamw{group_rate, config.beta1, config.beta2, config.epsilon, decay}.step(
            t, g, state.p, state.m, state.v);
      }
      // The change is compared, not the weight: it is small beside it.
      Numbers change;
      Numbers expected;
      for (size_t i = 0; i < before.size(); ++i) {
        change.push_back(static_cast<double>(p.tensor.ptr<float>()[i]) - before[i]);
        expected.push_back(state.p[i] - before[i]);
        EXPECT_EQ(p.tensor.grad_ptr<float>()[i], 0.0F) << name;
      }
      EXPECT_LE(relative_error(change, expected), tolerance) << name << " at step " << t;
      // From here both go on with the same weights.
      std::copy_n(p.tensor.ptr<float>(), state.p.size(), state.p.begin());
    });
  }
  EXPECT_EQ(muons, kind == OptimizerKind::kMuon ? 4 * (4 + 4 + 2 * 3 + 4 + 1 + 3) : 0);
}

TEST(Optimizer, AdamwMatchesDefinition) {
  for_each_isa([] { expect_steps_match_definition(OptimizerKind::kAdamW, 2e-4); });
}

TEST(Optimizer, MuonMatchesDefinition) {
  for_each_isa([] { expect_steps_match_definition(OptimizerKind::kMuon, 5e-4); });
}

// Independent of how the iteration is written: without decay the update is near a matrix of equal
// singular values, whose root mean square is 0.2 of the rate.
TEST(Optimizer, MuonsUpdateIsNearlyOrthogonal) {
  const Trained trained(everything);
  OptimizerConfig config = grouped_config(OptimizerKind::kMuon);
  for (const ParameterGroup group : {ParameterGroup::kMixer, ParameterGroup::kFeedForward}) {
    config.group(group) = {1.0, 0.0};
  }
  Optimizer optimizer(trained.model(), config);
  std::map<std::string, Numbers> before;
  trained.model().visit([&](const std::string& name, Parameter& p) {
    before[name] = {p.tensor.ptr<float>(), p.tensor.ptr<float>() + p.numel()};
  });
  trained.set_gradients(1);
  constexpr double kRate = 0.1;
  optimizer.step(kRate, 0.0);
  trained.model().visit([&](const std::string& name, Parameter& p) {
    if (!is_muons(name) || p.shape.size() != 2) {
      return;  // a stack's matrices are compared with their definition
    }
    const bool wide = p.shape[0] <= p.shape[1];
    const int64_t small = std::min(p.shape[0], p.shape[1]);
    const int64_t large = std::max(p.shape[0], p.shape[1]);
    Numbers x;
    const double unit = kRate * 0.2 * std::sqrt(static_cast<double>(large));
    for (size_t i = 0; i < before[name].size(); ++i) {
      x.push_back((before[name][i] - static_cast<double>(p.tensor.ptr<float>()[i])) / unit);
    }
    const Numbers flipped = transposed(x, p.shape[0], p.shape[1]);
    const Numbers gram =
        wide ? product(x, flipped, small, large, small) : product(flipped, x, small, large, small);
    double trace = 0.0;
    for (int64_t i = 0; i < small; ++i) {
      trace += gram[static_cast<size_t>(i * small + i)];
      for (int64_t j = 0; j < i; ++j) {
        EXPECT_LT(std::abs(gram[static_cast<size_t>(i * small + j)]), 0.45) << name;
      }
    }
    EXPECT_GT(trace, 0.5 * static_cast<double>(small)) << name;
    EXPECT_LT(trace, 1.4 * static_cast<double>(small)) << name;
  });
}

TEST(Optimizer, KeepsStateForWhatIsTrainedOnly) {
  struct Row {
    OptimizerKind kind;
    std::function<bool(const std::string&)> trained;
  };
  const Row rows[] = {
      {OptimizerKind::kAdamW, [](const std::string&) { return true; }},
      {OptimizerKind::kMuon, [](const std::string&) { return true; }},
      {OptimizerKind::kAdamW, [](const std::string& name) { return name.starts_with("layers.1"); }},
      {OptimizerKind::kMuon, [](const std::string& name) { return name.starts_with("layers.1"); }},
      {OptimizerKind::kMuon, [](const std::string& name) { return name.ends_with("A_log"); }}};
  for (const Row& row : rows) {
    const Trained trained(
        [&](const std::string& name, const Parameter&) { return row.trained(name); });
    Optimizer optimizer(trained.model(), {.kind = row.kind});
    std::vector<std::string> expected;
    int64_t bytes = 0;
    int64_t parameters = 0;
    trained.model().visit([&](const std::string& name, Parameter& p) {
      if (!row.trained(name)) {
        return;
      }
      const bool one = row.kind == OptimizerKind::kMuon && is_muons(name);
      parameters += p.numel();
      bytes += p.numel() * (one ? 4 : 8);
      expected.push_back(name + ".m");
      if (!one) {
        expected.push_back(name + ".v");
      }
    });
    std::vector<std::string> names;
    optimizer.visit_state([&](const std::string& name, const Tensor& state) {
      names.push_back(name);
      EXPECT_EQ(state.ptr<float>()[0], 0.0F) << name;
    });
    EXPECT_EQ(names, expected);
    EXPECT_EQ(optimizer.state_bytes(), bytes);
    EXPECT_EQ(optimizer.trained_parameters(), parameters);
    const std::vector<float> before = testing::all_weights(trained.model());
    trained.set_gradients(1);
    optimizer.step(0.1, 1.0);
    const std::vector<float> after = testing::all_weights(trained.model());
    int64_t moved = 0;
    for (size_t i = 0; i < before.size(); ++i) {
      moved += before[i] == after[i] ? 0 : 1;
    }
    EXPECT_EQ(moved, parameters);
  }
}

// A resumed optimiser corrects for the steps that its states have seen.
TEST(Optimizer, GoesOnFromItsStateAndStep) {
  for (const OptimizerKind kind : {OptimizerKind::kAdamW, OptimizerKind::kMuon}) {
    const Trained whole(everything);
    const Trained resumed(everything);
    Optimizer first(whole.model(), {.kind = kind});
    std::map<std::string, Numbers> saved;
    for (uint64_t t = 1; t <= 3; ++t) {
      whole.set_gradients(t);
      first.step(0.01, 0.5);
    }
    first.visit_state([&](const std::string& name, const Tensor& state) {
      saved[name] = {state.ptr<float>(), state.ptr<float>() + state.numel()};
    });
    std::map<std::string, Tensor> weights;
    whole.model().visit([&](const std::string& name, Parameter& p) { weights[name] = p.tensor; });
    resumed.model().visit(
        [&](const std::string& name, Parameter& p) { copy_values(p.tensor, weights.at(name)); });
    Optimizer second(resumed.model(), {.kind = kind});
    second.visit_state([&](const std::string& name, const Tensor& state) {
      std::copy(saved.at(name).begin(), saved.at(name).end(), state.ptr<float>());
    });
    second.set_steps_taken(first.steps_taken());
    for (Optimizer* optimizer : {&first, &second}) {
      const Trained& trained = optimizer == &first ? whole : resumed;
      trained.set_gradients(9);
      optimizer->step(0.01, 0.5);
      EXPECT_EQ(optimizer->steps_taken(), 4);
    }
    EXPECT_EQ(testing::all_weights(whole.model()), testing::all_weights(resumed.model()));
  }
}

TEST(Optimizer, ZeroGradientsForgetsThem) {
  const Trained trained(everything);
  Optimizer optimizer(trained.model(), {});
  trained.set_gradients(1);
  EXPECT_GT(optimizer.gradient_norm(), 0.0);
  optimizer.zero_gradients();
  for (const float g : testing::all_gradients(trained.model())) {
    EXPECT_EQ(g, 0.0F);
  }
  EXPECT_EQ(optimizer.gradient_norm(), 0.0);
}

TEST(OptimizerErrors, NameWhatIsWrong) {
  struct Row {
    OptimizerConfig config;
    bool trained;
    const char* expected;
  };
  const Row rows[] = {{{.beta1 = 1.0}, true, "betas must be in [0, 1), got 1 and 0.95"},
                      {{.beta2 = -0.5}, true, "betas must be in [0, 1), got 0.9 and -0.5"},
                      {{.epsilon = 0.0}, true, "epsilon must be above zero, got 0"},
                      {{}, false, "every parameter is frozen"}};
  for (const Row& row : rows) {
    const Trained trained([&](const std::string&, const Parameter&) { return row.trained; });
    const std::string message =
        testing::error_of([&] { const Optimizer optimizer(trained.model(), row.config); });
    EXPECT_THAT(message, HasSubstr(row.expected));
  }
}

}  // namespace
}  // namespace cambium
