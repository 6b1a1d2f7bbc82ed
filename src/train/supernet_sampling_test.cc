// Which mixers of a supernet run in a step, and what a step leaves alone.
#include "train/supernet_sampling.h"

#include <gmock/gmock.h>

#include "base/test_folder.h"
#include "base/testing.h"
#include "train/testing.h"

namespace cambium {
namespace {

using testing::error_of;
using ::testing::HasSubstr;

constexpr const char* kWindow = "sliding_window";
constexpr const char* kDelta = "gated_delta_net";

/// Every layer chooses among attention, a window and a delta net; the last of them lacks the net.
ModelSpec small_supernet(int layers) {
  UnitSpec window = testing::attention_mixer();
  window.kind = kWindow;
  window.name = mixer_unit_name(kWindow);
  window.options.set("window", int64_t{3});
  const UnitSpec delta{kDelta,
                       {{"heads", int64_t{2}}, {"key_dim", int64_t{4}}, {"value_dim", int64_t{8}}},
                       1.0F,
                       mixer_unit_name(kDelta)};
  ModelSpec spec = testing::tiny_attention(layers);
  for (int i = 0; i < layers; ++i) {
    BranchSpec& branch = spec.layers[static_cast<size_t>(i)].branches.front();
    branch.units.push_back(window);
    if (i < layers - 1) {
      branch.units.push_back(delta);
    }
    branch.active = 0;
  }
  return spec;
}

SupernetConfig sampling(PlacementSampling how, std::vector<std::string> weights = {}) {
  return {how, std::move(weights)};
}

TEST(PlacementSampler, DrawsBySeedAndStepAlone) {
  const ModelSpec spec = small_supernet(6);
  for (const PlacementSampling how : {PlacementSampling::kUniform, PlacementSampling::kWeighted,
                                      PlacementSampling::kComposition}) {
    const PlacementSampler one(spec, sampling(how), 5);
    const PlacementSampler same(spec, sampling(how), 5);
    const PlacementSampler other(spec, sampling(how), 6);
    const ActiveUnits at_nine = one.draw(9);
    int differ = 0;
    for (int64_t step = 0; step < 20; ++step) {
      EXPECT_EQ(one.draw(step), same.draw(step));
      differ += one.draw(step) != other.draw(step) ? 1 : 0;
    }
    EXPECT_EQ(one.draw(9), at_nine);
    EXPECT_GT(differ, 15);
  }
}

/// Of 3,000 steps: the share of draws of each unit in a layer.
std::vector<double> shares(const PlacementSampler& sampler, size_t layer) {
  std::vector<double> counts(3);
  for (int64_t step = 0; step < 3000; ++step) {
    counts[static_cast<size_t>(sampler.draw(step)[layer])] += 1.0 / 3000.0;
  }
  return counts;
}

TEST(PlacementSampler, GivesEachMixerItsShare) {
  const ModelSpec spec = small_supernet(4);
  struct Row {
    SupernetConfig config;
    std::vector<double> first, last;  // of layers 0 and 3
  };
  const double third = 1.0 / 3.0;
  const Row rows[] = {
      {sampling(PlacementSampling::kUniform), {third, third, third}, {0.5, 0.5, 0.0}},
      {sampling(PlacementSampling::kWeighted, {"attention=0", "gated_delta_net=3"}),
       {0.0, 0.25, 0.75},
       {0.0, 1.0, 0.0}},
      {sampling(PlacementSampling::kComposition), {third, third, third}, {0.5, 0.5, 0.0}},
  };
  for (const Row& row : rows) {
    const PlacementSampler sampler(spec, row.config, 1);
    const std::vector<double> first = shares(sampler, 0);
    const std::vector<double> last = shares(sampler, 3);
    for (size_t i = 0; i < 3; ++i) {
      EXPECT_NEAR(first[i], row.first[i], 0.04) << i;
      EXPECT_NEAR(last[i], row.last[i], 0.04) << i;
    }
  }
}

// With uniform draws all 6 layers are alike once in 3^5 steps; by composition 3 times in 28.
TEST(PlacementSampler, CompositionsReachTheEnds) {
  ModelSpec spec = small_supernet(7);
  spec.layers.pop_back();
  const PlacementSampler sampler(spec, sampling(PlacementSampling::kComposition), 1);
  int alike = 0;
  for (int64_t step = 0; step < 2800; ++step) {
    const ActiveUnits active = sampler.draw(step);
    alike += std::count(active.begin(), active.end(), active[0]) == 6 ? 1 : 0;
  }
  EXPECT_NEAR(alike, 300, 60);
}

TEST(PlacementSampler, WrongSettingsAreNamed) {
  const ModelSpec spec = small_supernet(2);
  struct Row {
    ModelSpec spec;
    SupernetConfig config;
    const char* message;
  };
  const Row rows[] = {
      {spec, {}, "the student is a supernet: expected supernet.sampling"},
      {testing::tiny_attention(2), sampling(PlacementSampling::kUniform), "is a plain model (AA)"},
      {spec, sampling(PlacementSampling::kUniform, {"attention=2"}), "belong to"},
      {spec, sampling(PlacementSampling::kWeighted, {"atention=2"}), "did you mean 'attention'"},
      {spec, sampling(PlacementSampling::kWeighted, {"attention"}), "got 'attention'"},
      {spec, sampling(PlacementSampling::kWeighted, {"attention=-1"}), "got 'attention=-1'"},
      {spec, sampling(PlacementSampling::kWeighted, {"attention=0", "sliding_window=0"}),
       "layer 1 has a weight above 0"},
      {spec, sampling(PlacementSampling::kPresets), "has no presets"},
  };
  for (const Row& row : rows) {
    EXPECT_THAT(error_of([&] { PlacementSampler(row.spec, row.config, 1); }),
                HasSubstr(row.message));
  }
}

/// Values of the parameters and of what the optimiser keeps of them, by name.
std::map<std::string, std::vector<float>> kept(Model& model, const std::vector<std::string>& names,
                                               Optimizer& optimizer) {
  std::map<std::string, std::vector<float>> values;
  model.visit([&](const std::string& name, Parameter& p) { values[name] = elements_of(p.tensor); });
  optimizer.visit_state(
      [&](const std::string& name, const Tensor& t) { values[name] = elements_of(t); });
  std::erase_if(values, [&](const auto& entry) {
    return std::none_of(names.begin(), names.end(), [&](const std::string& unit) {
      return entry.first.starts_with(unit + ".");
    });
  });
  return values;
}

TEST(SupernetTraining, LeavesTheMixersThatRestAlone) {
  LoadedModel model = fresh_model(small_supernet(3), 1);
  const auto data = testing::copy_task();
  TrainConfig config = testing::tiny_config(8);
  config.supernet.sampling = PlacementSampling::kUniform;
  Trainer trainer(*model.model, model.weights, config, *data);
  const PlacementSampler sampler(model.model->spec(), config.supernet, config.seed);
  auto& optimizer = const_cast<Optimizer&>(trainer.optimizer());
  for (int64_t step = 0; step < 8; ++step) {
    ModelSpec active = model.model->spec();
    std::vector<std::string> resting, running;
    const ActiveUnits units = sampler.draw(step);
    for (size_t layer = 0; layer < units.size(); ++layer) {
      const BranchSpec& choice = *active.layers[layer].choice();
      for (size_t i = 0; i < choice.units.size(); ++i) {
        std::string prefix = unit_prefix(static_cast<int64_t>(layer), choice.units[i]);
        prefix.pop_back();
        (static_cast<int>(i) == units[layer] ? running : resting).push_back(prefix);
      }
    }
    const auto before = kept(*model.model, resting, optimizer);
    const auto moved = kept(*model.model, running, optimizer);
    const StepReport report = trainer.step();
    EXPECT_EQ(report.placement.size(), 3U);
    EXPECT_EQ(kept(*model.model, resting, optimizer), before) << step;
    const auto after = kept(*model.model, running, optimizer);
    for (const auto& [name, values] : moved) {
      EXPECT_NE(after.at(name), values) << name;
    }
    EXPECT_EQ(layer_map(model.model->spec()), "AAA");  // as it was between steps
  }
}

// One preset alone: the same numbers as training the plain hybrid that it is.
TEST(SupernetTraining, OfOnePresetIsThatOfItsHybrid) {
  ModelSpec spec = small_supernet(3);
  put_preset(spec, {"one", {2, 0, 1}});
  LoadedModel model = fresh_model(spec, 1);
  TrainConfig config = testing::tiny_config(6);
  config.supernet.sampling = PlacementSampling::kPresets;
  LoadedModel start = view_hybrid(*model.model, spec.presets[0].active);
  LoadedModel plain{{}, std::make_unique<Model>(start.model->spec()), {}};
  plain.weights.allocate(*plain.model);
  std::map<std::string, Tensor> from = tensors_of(*start.model);
  plain.model->visit([&](const std::string& name, Parameter& p) { copy(p.tensor, from.at(name)); });
  const auto data = testing::copy_task();
  for (LoadedModel* each : {&model, &plain}) {
    TrainConfig own = config;
    own.supernet.sampling = each == &model ? PlacementSampling::kPresets : PlacementSampling::kNone;
    Progress::silence(true);
    Trainer(*each->model, each->weights, own, *data).run();
    Progress::silence(false);
  }
  LoadedModel trained = view_hybrid(*model.model, spec.presets[0].active);
  EXPECT_EQ(testing::all_weights(*trained.model), testing::all_weights(*plain.model));
}

// Also the correction of Adam's averages, which goes by the steps a mixer took part in.
TEST(SupernetTraining, GoesOnBitForBitAfterAStop) {
  const auto data = testing::copy_task();
  for (const auto& [how, state] :
       {std::pair{PlacementSampling::kUniform, OptimizerState::kF32},
        std::pair{PlacementSampling::kComposition, OptimizerState::kBF16}}) {
    const TestFolder folder;
    TrainConfig config = testing::tiny_config(12);
    config.supernet.sampling = how;
    config.optimizer.state = state;
    config.resume = true;
    const auto run = [&](const std::string& name, int64_t stop_after) {
      LoadedModel model = fresh_model(small_supernet(3), 1);
      TrainConfig own = config;
      own.folder = folder.at(name);
      Progress::silence(true);
      Trainer trainer(*model.model, model.weights, own, *data);
      try {
        trainer.run([&](const StepReport& report) { return report.step + 1 < stop_after; });
      } catch (const Error&) {
        EXPECT_LT(stop_after, 12);
      }
      Progress::silence(false);
      return testing::all_weights(*model.model);
    };
    const std::vector<float> whole = run("whole", 12);
    run("parts", 5);
    run("parts", 7);
    EXPECT_EQ(run("parts", 12), whole);
    EXPECT_EQ(testing::curve(folder.at("parts")), testing::curve(folder.at("whole")));
    config.supernet.sampling = PlacementSampling::kWeighted;
    EXPECT_THAT(testing::message_of([&] { run("parts", 12); }), HasSubstr("supernet"));
  }
}

// With attention frozen, as its teacher has it, a step of attention alone changes nothing.
TEST(SupernetTraining, AlignsTheMixersOfTheirTurn) {
  LoadedModel teacher = fresh_model(testing::tiny_attention(2), 1);
  LoadedModel model = fresh_model(small_supernet(2), 1);
  const auto data = testing::copy_task();
  for (const Objective objective : {Objective::kAlign, Objective::kEndToEnd}) {
    TrainConfig config = testing::tiny_config(10);
    config.objective = objective;
    config.trained = Trained::kConverted;
    config.align.layers = {0, 1};
    config.loss = {.cross_entropy = 0.0F, .forward_kl = 0.5F, .reverse_kl = 0.5F};
    config.supernet.sampling = PlacementSampling::kUniform;
    Trainer trainer(*model.model, model.weights, config, *data, teacher.model.get());
    const std::vector<std::string> attention = {"layers.0.mixer", "layers.1.mixer"};
    auto& optimizer = const_cast<Optimizer&>(trainer.optimizer());
    const auto before = kept(*model.model, attention, optimizer);
    int aligned = 0;
    for (int step = 0; step < 10; ++step) {
      const StepReport report = trainer.step();
      EXPECT_EQ(report.align > 0.0, report.placement != "AA") << report.placement;
      aligned += report.align > 0.0 ? 1 : 0;
    }
    EXPECT_GT(aligned, 3);
    EXPECT_EQ(kept(*model.model, attention, optimizer), before);
  }
}

}  // namespace
}  // namespace cambium
