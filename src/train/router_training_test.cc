// Routers that are trained to use all their experts.
#include "train/router_training.h"

#include <gmock/gmock.h>

#include "base/test_folder.h"
#include "base/testing.h"
#include "tensor/device_memory.h"
#include "train/testing.h"

namespace cambium {
namespace {

using testing::copy_task;
using ::testing::HasSubstr;
using testing::tiny_config;
using testing::tiny_experts;

/// Biases of the logits, and of the choice.
const Options kSoftmax = {{"router", "softmax"}, {"bias", true}};
const Options kPlainSigmoid = {{"router", "sigmoid"}, {"bias", true}};
const Options kSigmoid = {{"router", "sigmoid"}, {"router_bias", true}};

struct TrainedRun {
  StepReport first, last;
  std::vector<float> weights;
};

/// Of a model whose routers all prefer expert 0, by their biases.
LoadedModel one_sided(const ModelSpec& spec) {
  LoadedModel model = fresh_model(spec, 1);
  model.model->visit([](const std::string& name, Parameter& p) {
    if (name.ends_with("router.bias")) {
      p.tensor.ptr<float>()[0] = 1.0F;
    }
  });
  return model;
}

TrainedRun train(const ModelSpec& spec, const TrainConfig& config, Device device = {}) {
  Progress::silence(true);
  LoadedModel model = one_sided(spec);
  model.weights.move_to(*model.model, device);
  const auto data = copy_task();
  Trainer trainer(*model.model, model.weights, config, *data);
  TrainedRun run;
  trainer.run([&](const StepReport& report) {
    run.first = report.step == 0 ? report : run.first;
    run.last = report;
    return true;
  });
  Progress::silence(false);
  run.weights = testing::all_weights(*model.model);
  return run;
}

TEST(RouterTraining, BringsWorkToAllExperts) {
  struct Row {
    const char* name;
    Options router;
    RouterTraining training;
  };
  for (const Row& row : std::vector<Row>{{"softmax, balance", kSoftmax, {.balance = 1.0}},
                                         {"sigmoid, balance", kPlainSigmoid, {.balance = 1.0}},
                                         {"sigmoid, bias", kSigmoid, {.bias_rate = 0.03}}}) {
    SCOPED_TRACE(row.name);
    TrainConfig config = tiny_config(60);
    config.router = row.training;
    const TrainedRun with = train(tiny_experts(2, row.router), config);
    config.router = {.z = 1e-12};  // as good as without, but reported
    const TrainedRun without = train(tiny_experts(2, row.router), config);
    EXPECT_GT(with.first.router.load, 2.0);
    EXPECT_LT(with.last.router.load, 1.7);
    EXPECT_GT(without.last.router.load, with.last.router.load + 0.4);
  }
}

TEST(RouterTraining, TheZLossKeepsLogitsSmall) {
  TrainConfig config = tiny_config(40);
  config.router = {.z = 0.1};
  const TrainedRun run = train(tiny_experts(2, kSoftmax), config);
  EXPECT_LT(run.last.router.z, 0.7 * run.first.router.z);
}

TEST(RouterTraining, TheReportIsPartOfTheLoss) {
  TrainConfig config = tiny_config(1);
  const double plain = train(tiny_experts(3, kSoftmax), config).first.loss;
  config.router = {.balance = 0.5, .z = 0.25};
  const StepReport step = train(tiny_experts(3, kSoftmax), config).first;
  EXPECT_NEAR(step.router.loss, 3 * (0.5 * step.router.balance + 0.25 * step.router.z), 1e-9);
  EXPECT_NEAR(step.loss, plain + step.router.loss, 1e-6);
}

TEST(RouterTraining, CheckpointedLayersGiveTheSameSteps) {
  TrainConfig config = tiny_config(3);
  config.router = {.balance = 0.5, .z = 0.1, .bias_rate = 0.01};
  const TrainedRun plain = train(tiny_experts(2, kSigmoid), config);
  config.checkpoint_layers = true;
  const TrainedRun again = train(tiny_experts(2, kSigmoid), config);
  EXPECT_NEAR(plain.last.router.balance, again.last.router.balance, 1e-6);
  EXPECT_NEAR(plain.last.loss, again.last.loss, 1e-5);
  ASSERT_EQ(plain.weights.size(), again.weights.size());
  for (size_t i = 0; i < plain.weights.size(); ++i) {
    EXPECT_NEAR(plain.weights[i], again.weights[i], 1e-5) << i;
  }
}

TEST(RouterTraining, ACudaDeviceDoesTheSteps) {
  if (cuda_devices() == 0) {
    GTEST_SKIP() << why_no_cuda();
  }
  TrainConfig config = tiny_config(3);
  config.router = {.balance = 0.5, .z = 0.1, .bias_rate = 0.01};
  const TrainedRun here = train(tiny_experts(2, kSigmoid), config);
  for (const auto& [precision, tolerance] :
       {std::pair{Precision::kF32, 1e-4}, std::pair{Precision::kBF16, 3e-2}}) {
    config.precision = precision;
    const TrainedRun there = train(tiny_experts(2, kSigmoid), config, Device::kCuda);
    EXPECT_NEAR(there.last.router.balance, here.last.router.balance, tolerance);
    EXPECT_NEAR(there.last.router.z, here.last.router.z, tolerance * here.last.router.z);
    EXPECT_NEAR(there.first.loss, here.first.loss, tolerance * here.first.loss);
  }
}

TEST(RouterTraining, AStoppedRunGoesOnWithTheBiasesItHad) {
  const TestFolder folder;
  TrainConfig config = tiny_config(6);
  config.router.bias_rate = 0.05;
  const TrainedRun whole = train(tiny_experts(2, kSigmoid), config);
  config.folder = folder.at("run");
  const auto data = copy_task();
  Progress::silence(true);
  {
    LoadedModel model = one_sided(tiny_experts(2, kSigmoid));
    Trainer trainer(*model.model, model.weights, config, *data);
    trainer.run([](const StepReport& report) { return report.step < 2; });
  }
  Progress::silence(false);
  config.resume = true;
  EXPECT_EQ(train(tiny_experts(2, kSigmoid), config).weights, whole.weights);
  config.router.bias_rate = 0.06;
  EXPECT_THAT(testing::message_of([&] { train(tiny_experts(2, kSigmoid), config); }),
              HasSubstr("router"));
  Progress::silence(false);
}

TEST(RouterTraining, WhereThereIsNothingToTrainItSaysSo) {
  struct Row {
    ModelSpec spec;
    RouterTraining training;
    Trained trained;
    const char* message;
  };
  const RouterTraining balance{.balance = 0.01};
  for (const Row& row : std::vector<Row>{
           {testing::tiny_attention(2), balance, Trained::kEverything,
            "train: router: expected a model with routed experts, got AA without any; leave router "
            "out"},
           {tiny_experts(2, kSoftmax), balance, Trained::kMixers,
            "no router is trained, so its losses have nothing to change"},
           {tiny_experts(2, kSoftmax),
            {.bias_rate = 0.1},
            Trained::kEverything,
            "bias_rate moves choice biases, which no router of the model has; use balance"}}) {
    TrainConfig config = tiny_config(1);
    config.router = row.training;
    config.trained = row.trained;
    EXPECT_THAT(testing::message_of([&] { train(row.spec, config); }), HasSubstr(row.message));
    Progress::silence(false);
  }
}

}  // namespace
}  // namespace cambium
