#include "train/trainer.h"

#include <gmock/gmock.h>
#include <algorithm>

#include "base/checked.h"
#include "base/error.h"
#include "base/test_folder.h"
#include "base/testing.h"
#include "train/testing.h"

namespace cambium {
namespace {

using testing::all_weights;
using testing::copy_task;
using ::testing::HasSubstr;
using testing::tiny_attention;
using testing::tiny_config;

class TrainerTest : public ::testing::Test {
 protected:
  void SetUp() override { Progress::silence(true); }
  void TearDown() override { Progress::silence(false); }
};

TEST_F(TrainerTest, LearnsToCopy) {
  LoadedModel model = fresh_model(tiny_attention(2), 1);
  const auto data = copy_task();
  TrainConfig config = tiny_config(400);
  config.sequences_per_step = 4;
  Trainer trainer(*model.model, model.weights, config, *data);
  const TrainSummary summary = trainer.run();
  EXPECT_GT(summary.first_loss, 2.5);
  EXPECT_LT(summary.last_loss, 0.6);
  EXPECT_EQ(summary.steps, 400);
}

// One packed sequence of six documents, and two of three: the same documents, the same step.
TEST_F(TrainerTest, GradientAccumulationIsOneBigBatch) {
  const auto data = generated_source(
      [](uint64_t index) {
        Rng rng(3, index);
        Document document;
        for (int i = 0; i < 9; ++i) {
          document.append({static_cast<int32_t>(rng.between(2, 23))},
                          i > 2 + static_cast<int>(index % 4));
        }
        return document;
      },
      "fixed length");
  std::vector<std::vector<float>> after;
  std::vector<double> losses;
  for (const int64_t pieces : {1, 2, 6}) {
    LoadedModel model = fresh_model(tiny_attention(2), 1);
    TrainConfig config = tiny_config(1);
    config.sequence_length = 48 / pieces;
    config.sequences_per_step = pieces;
    Trainer trainer(*model.model, model.weights, config, *data);
    const StepReport report = trainer.step();
    EXPECT_EQ(report.tokens, 48);
    losses.push_back(report.loss);
    after.push_back({static_cast<float>(report.gradient_norm)});
  }
  for (size_t i = 1; i < losses.size(); ++i) {
    EXPECT_NEAR(losses[i], losses[0], 1e-6);
    EXPECT_NEAR(after[i][0], after[0][0], 1e-5F * after[0][0]);
  }
}

// The share of the peak counts what documents attend to: a sequence of one document is the whole of
// training_flops, eight in one sequence are eight short sequences.
TEST_F(TrainerTest, PeakShareIsOfDocuments) {
  const auto documents_of = [](int tokens) {
    return generated_source(
        [tokens](uint64_t index) {
          Rng rng(3, index);
          Document document;
          for (int i = 0; i <= tokens; ++i) {
            document.append({static_cast<int32_t>(rng.between(2, 23))}, true);
          }
          return document;
        },
        "fixed length");
  };
  const auto flops = [&](int document, int64_t sequence) {
    LoadedModel model = fresh_model(tiny_attention(2), 1);
    TrainConfig config = tiny_config(1);
    config.sequence_length = sequence;
    config.sequences_per_step = 1;
    config.matrix_peak = 1e9;
    const auto data = documents_of(document);
    Trainer trainer(*model.model, model.weights, config, *data);
    const StepReport report = trainer.step();
    EXPECT_EQ(report.tokens, 64);
    const double counted = report.peak_share * config.matrix_peak * report.seconds;
    return std::pair(counted, trainer.flops_per_token() * static_cast<double>(report.tokens));
  };
  const auto [whole, of_whole] = flops(64, 64);
  EXPECT_NEAR(whole, of_whole, 1e-9 * of_whole);
  const auto [packed, of_packed] = flops(8, 64);
  EXPECT_EQ(of_packed, of_whole);
  LoadedModel model = fresh_model(tiny_attention(2), 1);
  TrainConfig config = tiny_config(1);
  config.sequence_length = 8;
  const auto data = documents_of(8);
  const Trainer alone(*model.model, model.weights, config, *data);
  EXPECT_NEAR(packed, alone.flops_per_token() * 64.0, 1e-9 * packed);
  EXPECT_LT(packed, whole);
}

TEST_F(TrainerTest, FrozenGroupsStayAndCostNothing) {
  LoadedModel model = fresh_model(tiny_attention(2), 1);
  const auto data = copy_task();
  TrainConfig config = tiny_config(3);
  for (const ParameterGroup g :
       {ParameterGroup::kFeedForward, ParameterGroup::kNorm, ParameterGroup::kEmbedding}) {
    config.optimizer.group(g).rate_scale = 0.0;
  }
  const int64_t bytes_before = model.weights.bytes();
  std::map<std::string, std::vector<float>> before;
  model.model->visit([&](const std::string& name, Parameter& p) {
    before[name] = {p.tensor.ptr<float>(), p.tensor.ptr<float>() + p.numel()};
  });
  Trainer trainer(*model.model, model.weights, config, *data);
  trainer.run();
  int64_t trained = 0;
  model.model->visit([&](const std::string& name, Parameter& p) {
    const std::vector<float> now(p.tensor.ptr<float>(), p.tensor.ptr<float>() + p.numel());
    EXPECT_EQ(now == before[name], p.group != ParameterGroup::kMixer) << name;
    trained += p.group == ParameterGroup::kMixer ? p.numel() : 0;
  });
  EXPECT_EQ(trainer.optimizer().trained_parameters(), trained);
  EXPECT_EQ(trainer.optimizer().state_bytes(), trained * 8);
  EXPECT_EQ(model.weights.bytes() - bytes_before, trained * 4);
}

// Of a hybrid with attention in its first layer only: what is trained beside it and what is not.
TEST_F(TrainerTest, FrozenAttentionStaysWhateverElseIsTrained) {
  const struct {
    Trained trained;
    bool freeze, others;  // whether attention stays; whether feed-forwards, norms and so on change
  } rows[] = {{Trained::kEverything, true, true},
              {Trained::kEverything, false, true},
              {Trained::kMixers, true, false},
              {Trained::kMixers, false, false}};
  const auto data = copy_task();
  for (const auto& row : rows) {
    LoadedModel model = fresh_model(testing::every_mixer(), 1);
    LoadedModel before = fresh_model(testing::every_mixer(), 1);
    TrainConfig config = tiny_config(2);
    config.trained = row.trained;
    config.freeze_attention = row.freeze;
    Trainer trainer(*model.model, model.weights, config, *data);
    trainer.run();
    std::map<std::string, std::vector<float>> old;
    before.model->visit(
        [&](const std::string& name, Parameter& p) { old[name] = elements_of(p.tensor); });
    model.model->visit([&](const std::string& name, Parameter& p) {
      const bool attention = name.starts_with("layers.0.mixer.");
      const bool changes =
          attention ? !row.freeze : name.find(".mixer.") != std::string::npos || row.others;
      EXPECT_EQ(p.tensor.has_grad(), changes) << name;
      EXPECT_TRUE(changes || elements_of(p.tensor) == old[name]) << name;
    });
  }
  LoadedModel model = fresh_model(testing::every_mixer(), 1);
  TrainConfig config = tiny_config(2);
  config.objective = Objective::kAlign;
  config.align.layers = {1};
  config.freeze_attention = true;
  EXPECT_THAT(testing::message_of([&] {
                Trainer trainer(*model.model, model.weights, config, *data, model.model.get());
              }),
              HasSubstr("leave freeze_attention out"));
}

// AdamW's first step is as long as the rate, whatever the gradient.
TEST_F(TrainerTest, ConvertedMixersHaveARateOfTheirOwn) {
  const auto data = copy_task();
  std::map<std::string, double> steps[2];
  for (const double scale : {1.0, 4.0}) {
    LoadedModel before = fresh_model(testing::every_mixer(), 2);
    LoadedModel model = fresh_model(testing::every_mixer(), 2);
    TrainConfig config = tiny_config(1);
    config.optimizer.converted_rate_scale = scale;
    config.converted = {"layers.1.mixer."};
    Trainer(*model.model, model.weights, config, *data).run();
    std::map<std::string, std::vector<float>> old;
    before.model->visit(
        [&](const std::string& name, Parameter& p) { old[name] = elements_of(p.tensor); });
    model.model->visit([&](const std::string& name, Parameter& p) {
      const std::vector<float> now = elements_of(p.tensor);
      double longest = 0.0;
      for (size_t i = 0; i < now.size(); ++i) {
        longest = larger_error(longest, std::abs(static_cast<double>(now[i]) - old[name][i]));
      }
      steps[scale > 1.0 ? 1 : 0][name] = longest;
    });
  }
  int64_t scaled = 0;
  for (const auto& [name, step] : steps[0]) {
    const bool converted = name.starts_with("layers.1.mixer.");
    EXPECT_NEAR(steps[1][name], (converted ? 4.0 : 1.0) * step, 0.02 * step) << name;
    scaled += converted && step > 0.0 ? 1 : 0;
  }
  EXPECT_GE(scaled, 4);
  LoadedModel model = fresh_model(testing::every_mixer(), 1);
  TrainConfig config = tiny_config(1);
  config.optimizer.converted_rate_scale = 4.0;
  EXPECT_THAT(testing::message_of([&] { Trainer(*model.model, model.weights, config, *data); }),
              HasSubstr("optimizer.converted.rate_scale: expected a teacher"));
}

TEST_F(TrainerTest, DistillingFromItselfHasNoLossAndNoGradient) {
  LoadedModel student = fresh_model(tiny_attention(2), 1);
  LoadedModel teacher = fresh_model(tiny_attention(2), 1);
  const auto data = copy_task();
  TrainConfig config = tiny_config(1);
  config.loss = {};
  config.loss.reverse_kl = 1.0F;
  config.loss.forward_kl = 0.5F;
  Trainer trainer(*student.model, student.weights, config, *data, teacher.model.get());
  const StepReport report = trainer.step();
  EXPECT_NEAR(report.loss, 0.0, 1e-6);
  EXPECT_NEAR(report.gradient_norm, 0.0, 1e-5);
  EXPECT_EQ(report.agreement, 1.0);
}

TEST_F(TrainerTest, CheckpointedLayersGiveTheSameSteps) {
  const auto data = copy_task();
  std::vector<std::vector<float>> after;
  for (const bool checkpointed : {false, true}) {
    LoadedModel model = fresh_model(tiny_attention(3), 1);
    TrainConfig config = tiny_config(3);
    config.checkpoint_layers = checkpointed;
    Trainer trainer(*model.model, model.weights, config, *data);
    trainer.run();
    after.push_back(all_weights(*model.model));
  }
  // Running a layer again adds gradients in another order: equal up to rounding.
  ASSERT_EQ(after[0].size(), after[1].size());
  for (size_t i = 0; i < after[0].size(); ++i) {
    EXPECT_NEAR(after[0][i], after[1][i], 1e-5) << i;
  }
}

// Alignment trains the mixers of its layers and nothing else, and brings their outputs closer.
TEST_F(TrainerTest, AlignsSingleMixers) {
  LoadedModel teacher = fresh_model(tiny_attention(3), 1);
  LoadedModel student = fresh_model(tiny_attention(3), 2);
  const std::vector<float> before = all_weights(*student.model);
  const auto data = copy_task();
  TrainConfig config = tiny_config(60);
  config.objective = Objective::kAlign;
  config.align.layers = {0, 2};
  config.align.all_tokens = true;
  Trainer trainer(*student.model, student.weights, config, *data, teacher.model.get());
  const StepReport first = trainer.step();
  ASSERT_EQ(first.align_layers.size(), 2U);
  StepReport last;
  trainer.run([&](const StepReport& report) {
    last = report;
    return true;
  });
  EXPECT_LT(last.align_layers[0], 0.7 * first.align_layers[0]);
  EXPECT_LT(last.align_layers[1], 0.7 * first.align_layers[1]);
  student.model->visit([&](const std::string& name, Parameter& p) {
    const bool chosen = name.starts_with("layers.0.mixer.") || name.starts_with("layers.2.mixer.");
    EXPECT_EQ(p.tensor.has_grad(), chosen) << name;
  });
}

// Layers of two mixers side by side, named as their family names them; the student has another SSM
// in layer 1, and an attention of its own in layer 2.
TEST_F(TrainerTest, FindsMixersByTheSpecWhateverTheirNames) {
  UnitSpec attention = testing::attention_mixer();
  attention.name = "self_attn";
  UnitSpec ssm = {
      "mamba",
      {{"inner", int64_t{16}}, {"xb", int64_t{8}}, {"state", int64_t{4}}, {"dt_rank", int64_t{2}}},
      1.0F,
      "ssm"};
  ModelSpec spec = testing::tiny_spec({ssm, ssm, ssm});
  for (LayerSpec& layer : spec.layers) {
    layer.branches[0].units.push_back(attention);
  }
  LoadedModel teacher = fresh_model(spec, 1);
  spec.layers[1].branches[0].units[0].options.set("state", int64_t{8});
  spec.layers[2].branches[0].units[1].options.set("kv_heads", int64_t{2});
  const std::vector<std::string> all = {"layers.0.ssm.", "layers.0.self_attn.",
                                        "layers.1.ssm.", "layers.1.self_attn.",
                                        "layers.2.ssm.", "layers.2.self_attn."};
  const std::vector<std::string> converted = {all[2], all[5]};
  const auto data = copy_task();
  const auto expect_trained = [&](const TrainConfig& config, Model* from,
                                  const std::vector<std::string>& wanted, const char* what) {
    LoadedModel student = fresh_model(spec, 2);
    Trainer trainer(*student.model, student.weights, config, *data, from);
    trainer.step();
    student.model->visit([&](const std::string& name, Parameter& p) {
      const bool chosen = std::any_of(wanted.begin(), wanted.end(), [&](const std::string& unit) {
        return name.starts_with(unit);
      });
      EXPECT_EQ(p.tensor.has_grad(), chosen) << what << ": " << name;
    });
  };
  TrainConfig config = tiny_config(1);
  config.trained = Trained::kMixers;
  expect_trained(config, nullptr, all, "mixers");
  config.trained = Trained::kConverted;
  expect_trained(config, teacher.model.get(), converted, "converted");
  config.converted = converted_mixers(spec, teacher.model->spec());
  EXPECT_EQ(config.converted, converted);
  expect_trained(config, nullptr, converted, "converted, as listed");
  config = tiny_config(1);
  config.objective = Objective::kAlign;
  config.align.layers = {0, 1, 2};
  expect_trained(config, teacher.model.get(), {all[0], all[2], all[4]}, "aligned");
  config.trained = Trained::kConverted;
  expect_trained(config, teacher.model.get(), {all[2]}, "aligned and converted");
}

TEST_F(TrainerTest, NamesStepLayerAndLastCheckpointOfNumbersThatAreNotFinite) {
  const auto data = copy_task();
  struct Case {
    const char* parameter;
    float value;
    const char* expected;
  };
  for (const Case& c : {Case{"layers.1.mixer.q_proj.weight", NAN, "layers.1.mixer.q_proj.weight"},
                        Case{"layers.1.feed_forward.down.weight", 3e38F, "layer 1's feed-forward"},
                        Case{"layers.2.mixer.o_proj.weight", 3e38F, "layer 2's mixer"}}) {
    const TestFolder folder;
    LoadedModel model = fresh_model(tiny_attention(3), 1);
    TrainConfig config = tiny_config(10);
    config.folder = folder.at("run");
    Trainer trainer(*model.model, model.weights, config, *data);
    trainer.step();
    trainer.step();
    trainer.save_checkpoint();
    model.model->visit([&](const std::string& name, Parameter& p) {
      if (name == c.parameter) {
        std::fill_n(p.tensor.ptr<float>(), p.numel(), c.value);
      }
    });
    const std::string error = testing::message_of([&] { trainer.step(); });
    EXPECT_THAT(error, HasSubstr("step 2"));
    EXPECT_THAT(error, HasSubstr(c.expected));
    EXPECT_THAT(error, HasSubstr("checkpoints/step-000002"));
  }
}

TEST_F(TrainerTest, StopsWhenTheLossDiverges) {
  LoadedModel model = fresh_model(tiny_attention(2), 1);
  const auto data = copy_task();
  TrainConfig config = tiny_config(60);
  config.divergence = {.factor = 0.01, .window = 10, .patience = 3};
  Trainer trainer(*model.model, model.weights, config, *data);
  EXPECT_THAT(testing::message_of([&] { trainer.run(); }), HasSubstr("running median"));
  EXPECT_EQ(trainer.next_step(), 12);
}

TEST_F(TrainerTest, SaysOnceThatTheRateLosesWhatWasLearned) {
  const auto data = copy_task();
  struct Case {
    double rate;
    int64_t window, steps;
    bool said;
  };
  // The rate is at its height after 20 steps; a window has at least ten.
  for (const Case& c :
       {Case{1e-5, 10, 30, false}, {0.1, 10, 30, true}, {0.1, 3, 30, true}, {0.1, 3, 29, false}}) {
    LoadedModel model = fresh_model(tiny_attention(2), 1);
    Trainer(*model.model, model.weights, tiny_config(120), *data).run();
    TrainConfig config = tiny_config(c.steps);
    config.schedule.peak = c.rate;
    config.schedule.warmup_steps = 20;
    config.divergence = {.factor = 0.0, .window = c.window};
    ::testing::internal::CaptureStderr();
    Trainer(*model.model, model.weights, config, *data).run();
    const std::string said = ::testing::internal::GetCapturedStderr();
    const size_t at = said.find("at a rate of 0.1 more is lost");
    EXPECT_EQ(at != std::string::npos, c.said) << c.window << ", " << c.steps << ": " << said;
    EXPECT_TRUE(at == std::string::npos || said.find("more is lost", at + 30) == std::string::npos);
  }
}

TEST_F(TrainerTest, RefusesImpossibleSettings) {
  LoadedModel model = fresh_model(tiny_attention(2), 1);
  LoadedModel teacher = fresh_model(tiny_attention(3), 1);
  const auto data = copy_task();
  struct Case {
    const char* expected;
    std::function<void(TrainConfig&)> change;
    bool with_teacher;
  };
  for (const Case& c : std::vector<Case>{
           {"steps must be above zero", [](TrainConfig& x) { x.steps = 0; }, false},
           {"needs a teacher", [](TrainConfig& x) { x.loss.reverse_kl = 1.0F; }, false},
           {"every loss has weight zero", [](TrainConfig& x) { x.loss = {}; }, false},
           {"expected layers to align", [](TrainConfig& x) { x.objective = Objective::kAlign; },
            true},
           {"layer 2 to align does not exist", [](TrainConfig& x) { x.align.layers = {2}; }, true},
           {"got 3 of 16", [](TrainConfig& x) { x.align.layers = {1}; }, true},
           {"nothing is to be trained",
            [](TrainConfig& x) {
              x.trainable = [](const std::string&, const Parameter&) { return false; };
            },
            false},
           {"learning rate", [](TrainConfig& x) { x.schedule.peak = 0.0; }, false}}) {
    TrainConfig config = tiny_config(5);
    c.change(config);
    EXPECT_THAT(testing::message_of([&] {
                  Trainer(*model.model, model.weights, config, *data,
                          c.with_teacher ? teacher.model.get() : nullptr);
                }),
                HasSubstr(c.expected));
  }
}

}  // namespace
}  // namespace cambium
