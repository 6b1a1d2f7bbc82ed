#include "hybrid/calibrate.h"

#include <gtest/gtest.h>

#include <filesystem>

#include "base/test_folder.h"
#include "base/testing.h"
#include "hybrid/grafts/graft_table.h"
#include "hybrid/least_squares.h"
#include "ops/rope/rope.h"
#include "train/testing.h"

namespace cambium {
namespace {

using testing::error_of;

class Quiet {
 public:
  Quiet() { Progress::silence(true); }
  ~Quiet() { Progress::silence(false); }
};

/// softmax of scores (t + 1), and what HeadStatistics says of such rows, from its words.
struct BruteForce {
  double look_back = 0.0, concentration = 0.0, rows = 0.0;
  std::vector<double> mass = std::vector<double>(200);

  void add(const std::vector<double>& scores) {
    double sum = 0.0;
    for (const double s : scores) {
      sum += std::exp(s);
    }
    double entropy = 0.0;
    for (size_t i = 0; i < scores.size(); ++i) {
      const double p = std::exp(scores[i]) / sum;
      const size_t back = scores.size() - 1 - i;
      look_back += p * static_cast<double>(back);
      mass[back] += p;
      entropy -= p * std::log(p);
    }
    concentration +=
        scores.size() == 1 ? 1.0 : 1.0 - entropy / std::log(static_cast<double>(scores.size()));
    rows += 1.0;
  }
  void expect_same(const HeadStatistics& head) const {
    EXPECT_NEAR(head.look_back, look_back / rows, 1e-5);
    EXPECT_NEAR(head.concentration, concentration / rows, 1e-5);
    double nearer = 0.0;
    for (size_t d = 0; static_cast<double>(d) < head.half_distance; ++d) {
      nearer += mass[d];
    }
    EXPECT_LT(nearer, 0.5 * rows + 1e-4);
    EXPECT_GE(nearer + mass[static_cast<size_t>(head.half_distance)], 0.5 * rows - 1e-4);
  }
};

TEST(AttentionStatistics, RowsAreThoseOfAPlainSoftmax) {
  struct Case {
    const char* name;
    std::vector<int32_t> starts;
    int64_t window, rows;
    std::vector<std::vector<int64_t>> queries;  // of each segment
  };
  for (const Case& c :
       {Case{"every row but the first", {0, 5}, 0, 64, {{1, 2, 3, 4}}},
        Case{"some, the last among them", {0, 9}, 0, 4, {{2, 4, 6, 8}}},
        Case{"segments, one of a single token", {0, 4, 5, 8}, 0, 2, {{2, 3}, {}, {1, 2}}},
        Case{"a window", {0, 9}, 3, 64, {{1, 2, 3, 4, 5, 6, 7, 8}}},
        Case{"a window of itself", {0, 4}, 1, 64, {{1, 2, 3}}}}) {
    SCOPED_TRACE(c.name);
    constexpr int64_t kHeads = 4, kKeyHeads = 2, kDim = 3;
    const int64_t tokens = c.starts.back();
    OwnedTensor q(Dtype::kF32, {tokens, kHeads, kDim});
    OwnedTensor k(Dtype::kF32, {tokens, kKeyHeads, kDim});
    Rng rng(3, static_cast<uint64_t>(tokens));
    for (const Tensor& t : {q.view, k.view}) {
      for (int64_t i = 0; i < t.numel(); ++i) {
        t.ptr<float>()[i] = 2.0F * rng.normal();
      }
    }
    const std::vector<int32_t> positions(c.starts.size() - 1);
    AttentionRows rows(kHeads);
    rows.add(q.view, k.view, {c.starts, positions, {}}, {0.7F, c.window}, c.rows);
    for (int64_t h = 0; h < kHeads; ++h) {
      BruteForce brute;
      for (size_t s = 0; s < c.queries.size(); ++s) {
        for (const int64_t t : c.queries[s]) {
          std::vector<double> scores;
          for (int64_t at = c.window > 0 ? std::max<int64_t>(0, t - c.window + 1) : 0; at <= t;
               ++at) {
            double dot = 0.0;
            for (int64_t d = 0; d < kDim; ++d) {
              dot += static_cast<double>(
                         q.view.ptr<float>()[((c.starts[s] + t) * kHeads + h) * kDim + d]) *
                     k.view.ptr<float>()[((c.starts[s] + at) * kKeyHeads + h / 2) * kDim + d];
            }
            scores.push_back(0.7 * dot);
          }
          brute.add(scores);
        }
      }
      EXPECT_EQ(rows.count(), static_cast<int64_t>(brute.rows));
      brute.expect_same(rows.heads()[static_cast<size_t>(h)]);
    }
  }
}

TEST(LeastSquares, FindsWhatMadeTheNumbers) {
  constexpr int64_t kRows = 200, kChannels = 5;
  OwnedTensor x(Dtype::kF32, {kRows, kChannels});
  Rng rng(1, 1);
  for (int64_t i = 0; i < x.view.numel(); ++i) {
    x.view.ptr<float>()[i] = rng.normal() + (i % kChannels == 2 ? 4.0F : 0.0F);
  }
  // The channel that hardly varies is what a constant is made of.
  const std::vector<float> u = constant_direction({x.view});
  EXPECT_NEAR(u[2], 0.25, 0.05);
  EXPECT_EQ(constant_direction({x.view.slice(0, 0, 90), x.view.slice(0, 90, 110)}), u);
  // errors = change x: the change comes back, and the weight is what it was and the change.
  OwnedTensor gram(Dtype::kF32, {kChannels, kChannels});
  OwnedTensor cross(Dtype::kF32, {2, kChannels});
  OwnedTensor weight(Dtype::kF32, {2, kChannels});
  for (int64_t t = 0; t < kRows; ++t) {
    const float* row = x.view.ptr<float>() + t * kChannels;
    for (int64_t i = 0; i < kChannels; ++i) {
      for (int64_t j = 0; j < kChannels; ++j) {
        gram.view.ptr<float>()[i * kChannels + j] += row[i] * row[j];
      }
      cross.view.ptr<float>()[i] += (row[0] - 2.0F * row[3]) * row[i];
      cross.view.ptr<float>()[kChannels + i] += row[4] * row[i];
    }
  }
  weight.view.ptr<float>()[0] = 7.0F;
  add_ridge_solution(weight.view, gram.view, cross.view, 1e-6);
  const float expected[] = {8, 0, 0, -2, 0, 0, 0, 0, 0, 1};
  for (int64_t i = 0; i < 2 * kChannels; ++i) {
    EXPECT_NEAR(weight.view.ptr<float>()[i], expected[i], 1e-3) << i;
  }
  // Inputs that are nothing change nothing.
  OwnedTensor nothing(Dtype::kF32, {kChannels, kChannels});
  add_ridge_solution(weight.view, nothing.view, cross.view, 1e-6);
  EXPECT_NEAR(weight.view.ptr<float>()[0], 8.0, 1e-3);
}

/// Attention of many forms: biases, normed q and k, as in Qwen.
LoadedModel make_teacher(bool biases, bool normed) {
  UnitSpec attention = testing::attention_mixer();
  attention.options.set("qkv_bias", biases);
  attention.options.set("out_bias", biases);
  if (normed) {
    attention.options.set("qk_norm_eps", 1e-6);
  }
  LoadedModel teacher = fresh_model(testing::tiny_spec({attention, attention, attention}), 5, 0.4);
  teacher.model->visit([](const std::string& name, Parameter& p) {
    Rng rng(3, name.size());
    for (int64_t i = 0; name.find("_proj.bias") != std::string::npos && i < p.numel(); ++i) {
      p.tensor.ptr<float>()[i] = rng.normal();
    }
  });
  return teacher;
}

GraftOptions calibrated(const std::string& mixer) {
  GraftOptions options{.mixer = mixer};
  options.calibrate = 24;
  return options;
}

TEST(Calibrate, StatisticsAreOfTheTeachersOwnProbabilities) {
  const Quiet quiet;
  LoadedModel teacher = make_teacher(true, true);
  const GraftOptions options = calibrated("gated_delta_net");
  const auto source = testing::copy_task();
  const CalibrationData data(*source, *source, false, options);
  std::vector<LayerCalibration> found;
  convert(*teacher.model, *teacher.model, {0}, options, 1, true, &data, &found);
  // q and k of layer 0 by plain loops, from the input that the model's own norm gives.
  const MixerParameters p = layer_parameters(*teacher.model, 0);
  const auto project = [&](const std::string& which, const float* x, int64_t head, int64_t at) {
    std::vector<double> y(8);
    double squares = 0.0;
    for (int64_t d = 0; d < 8; ++d) {
      const int64_t row = head * 8 + d;
      y[static_cast<size_t>(d)] = p.at(which + "_proj.bias")->tensor.ptr<float>()[row];
      for (int64_t c = 0; c < 16; ++c) {
        y[static_cast<size_t>(d)] +=
            static_cast<double>(p.at(which + "_proj.weight")->tensor.ptr<float>()[row * 16 + c]) *
            x[c];
      }
      squares += y[static_cast<size_t>(d)] * y[static_cast<size_t>(d)];
    }
    for (int64_t d = 0; d < 8; ++d) {
      y[static_cast<size_t>(d)] *=
          p.at(which + "_norm.weight")->tensor.ptr<float>()[d] / std::sqrt(squares / 8.0 + 1e-6);
    }
    for (size_t d = 0; d < 4; ++d) {
      const double angle = static_cast<double>(at) * std::pow(10000.0, -2.0 * double(d) / 8.0);
      const double low = y[d];
      y[d] = low * std::cos(angle) - y[d + 4] * std::sin(angle);
      y[d + 4] = y[d + 4] * std::cos(angle) + low * std::sin(angle);
    }
    return y;
  };
  std::vector<BruteForce> brute(2);
  Workspace workspace;
  for (const PackedSequence& group : data.fitted.groups()) {
    std::vector<MixerTap> taps(3);
    Context ctx = workspace.context();
    teacher.model->forward(ctx, group.batch, {.taps = taps});
    const float* x = taps[0].input.ptr<float>();
    const Segments segments = group.batch.segments();
    for (int64_t s = 0; s < segments.count(); ++s) {
      const int64_t begin = segments.start[static_cast<size_t>(s)];
      for (int64_t t = 1; t < segments.length(s); ++t) {
        for (int64_t head = 0; head < 2; ++head) {
          const std::vector<double> q = project("q", x + (begin + t) * 16, head, t);
          std::vector<double> scores;
          for (int64_t at = 0; at <= t; ++at) {
            const std::vector<double> k = project("k", x + (begin + at) * 16, 0, at);
            double dot = 0.0;
            for (size_t d = 0; d < 8; ++d) {
              dot += q[d] * k[d];
            }
            scores.push_back(dot / std::sqrt(8.0));
          }
          brute[static_cast<size_t>(head)].add(scores);
        }
      }
    }
  }
  for (size_t head = 0; head < 2; ++head) {
    brute[head].expect_same(found[0].heads[head]);
    EXPECT_DOUBLE_EQ(found[0].half_lives[head], half_life(found[0].heads[head]));
  }
}

TEST(Calibrate, LowersTheErrorOnDocumentsItHasNotSeen) {
  const Quiet quiet;
  const auto source = testing::copy_task(7);
  const auto others = testing::copy_task(8);
  for (const bool biases : {false, true}) {
    for (const Graft& graft : grafts()) {
      SCOPED_TRACE(graft.mixer);
      LoadedModel teacher = make_teacher(biases, biases);
      const GraftOptions options = calibrated(graft.mixer);
      const CalibrationData data(*source, *others, false, options);
      std::vector<LayerCalibration> found;
      const LoadedModel hybrid =
          convert(*teacher.model, *teacher.model, {2, 0}, options, 1, false, &data, &found);
      ASSERT_EQ(found.size(), 2U);
      EXPECT_EQ(found[0].layer, 2);
      const auto now = measure_mixers(*hybrid.model, *teacher.model, {2, 0}, data.checked);
      for (size_t i = 0; i < 2; ++i) {
        const LayerCalibration& layer = found[i];
        EXPECT_NEAR(now[i].error, layer.calibrated.error, 1e-6);
        if (graft.calibrate == nullptr) {
          EXPECT_TRUE(layer.half_lives.empty());
          EXPECT_EQ(layer.calibrated.error, layer.start.error);
          continue;
        }
        EXPECT_EQ(layer.half_lives.size(), 2U);
        EXPECT_LT(layer.calibrated.error, layer.start.error);
        EXPECT_GT(layer.calibrated.explained, layer.start.explained);
      }
      const std::string table = describe_calibration(found, now);
      EXPECT_EQ(table.find("nothing to calibrate") != std::string::npos,
                graft.calibrate == nullptr);
    }
  }
}

TEST(Calibrate, AResumedFitIsThatOfARunThatWasNotStopped) {
  const Quiet quiet;
  const TestFolder folder;
  const auto source = testing::copy_task();
  LoadedModel teacher = make_teacher(false, false);
  const GraftOptions options = calibrated("gated_delta_net");
  const CalibrationData data(*source, *source, true, options);
  // Steps until the run is stopped; the same folder goes on.
  const auto fitted = [&](const std::string& name, const std::vector<int64_t>& stops) {
    std::vector<float> weights;
    std::vector<double> errors;
    for (const int64_t stop : stops) {
      std::vector<LayerCalibration> found;
      LoadedModel hybrid =
          convert(*teacher.model, *teacher.model, {0, 1}, options, 1, true, &data, &found);
      TrainConfig config = fit_config(6, {0, 1}, 1);
      config.sequence_length = 48;
      config.folder = folder.at(name);
      config.resume = true;
      Trainer trainer(*hybrid.model, hybrid.weights, config, *source, teacher.model.get());
      trainer.run([&](const StepReport& report) { return report.step + 1 < stop; });
      weights = testing::all_weights(*hybrid.model);
      hybrid.weights.set_trainable(*hybrid.model, nullptr);
      errors = {found[0].calibrated.error,
                measure_mixers(*hybrid.model, *teacher.model, {0, 1}, data.checked)[0].error};
    }
    EXPECT_LT(errors[1], errors[0]);
    return weights;
  };
  EXPECT_EQ(fitted("stopped", {2, 5, 6}), fitted("whole", {6}));
}

TEST(Calibrate, WrongRequestsAreNamed) {
  const auto check = [](const GraftOptions& options) {
    return error_of([&] { check_graft_options(options, "convert"); });
  };
  GraftOptions options = calibrated("mamba");
  options.faithful = true;
  EXPECT_NE(check(options).find("calibrate changes the start from attention"), std::string::npos);
  options = calibrated("mamba");
  options.from_attention = false;
  EXPECT_NE(check(options).find("does not go with a random start"), std::string::npos);
  options = {.mixer = "mamba", .rope = false};
  EXPECT_EQ(check(options),
            "convert: rope belongs to gated_delta_net and kimi_delta and lightning, not to mamba");
  options = {.mixer = "gated_delta_net", .faithful = true, .rope = false};
  EXPECT_NE(check(options).find("the released layout has no positions"), std::string::npos);
  options = {.mixer = "mamba", .calibrate_tokens = 9};
  EXPECT_NE(check(options).find("does nothing without calibrate"), std::string::npos);

  // Layers without attention, no documents, and none left to judge by.
  const auto source = testing::copy_task();
  const GraftOptions good = calibrated("mamba2");
  const CalibrationData data(*source, *source, false, good);
  LoadedModel teacher = fresh_model(testing::every_mixer(), 1);
  std::vector<LayerCalibration> found;
  EXPECT_NE(error_of([&] {
              convert(*teacher.model, *teacher.model, {2}, good, 1, true, &data, &found);
            }).find("has no attention to replace"),
            std::string::npos);
  const auto empty = generated_source([](uint64_t) { return Document{{1, 2}, {0, 0}}; }, "", 3);
  EXPECT_NE(error_of([&] {
              CalibrationData(*empty, *source, false, good);
            }).find("no document with anything to learn"),
            std::string::npos);
  EXPECT_NE(error_of([&] {
              CalibrationData(*source, *source, false, {.mixer = "mamba2"});
            }).find("at least one document"),
            std::string::npos);
  // A file of fewer documents than are asked for is judged on the same ones.
  const auto few = generated_source([&](uint64_t i) { return source->document(i); }, "", 5);
  const CalibrationData same(*few, *few, true, good);
  EXPECT_EQ(same.checked.fingerprint(), same.fitted.fingerprint());
  const auto more = generated_source([&](uint64_t i) { return source->document(i); }, "", 27);
  EXPECT_EQ(CalibrationData(*more, *more, true, good).checked.documents(), 3);
}

}  // namespace
}  // namespace cambium
