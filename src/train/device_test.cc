// Training on a CUDA device: the CPU's steps but for rounding, and its own bit for bit.
#include <gmock/gmock.h>

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "base/test_folder.h"
#include "base/testing.h"
#include "files/checksums.h"
#include "train/checkpoint.h"
#include "train/held_out.h"
#include "train/testing.h"
#include "train/train_job.h"

namespace cambium {
namespace {

using testing::all_weights;
using testing::every_mixer;
using ::testing::HasSubstr;

constexpr int64_t kSteps = 5;

TrainConfig device_config(Precision precision) {
  TrainConfig config = testing::tiny_config(kSteps);
  config.schedule.peak = 1e-3;
  config.precision = precision;
  return config;
}

LoadedModel model_on(Device device, uint64_t seed) {
  LoadedModel model = fresh_model(every_mixer(), seed);
  model.weights.move_to(*model.model, device);
  return model;
}

struct Steps {
  std::vector<double> losses, norms;
  std::vector<float> weights;
};

/// Runs to the end, or so many steps, of a run that is resumed where there is one.
Steps run_on(Device device, const TrainConfig& config, bool taught = false,
             int64_t stop_after = kSteps) {
  LoadedModel student = model_on(device, 1);
  LoadedModel teacher = model_on(device, 2);
  const auto data = testing::copy_task();
  Trainer trainer(*student.model, student.weights, config, *data,
                  taught ? teacher.model.get() : nullptr);
  Steps steps;
  trainer.run([&](const StepReport& report) {
    steps.losses.push_back(report.loss);
    steps.norms.push_back(report.gradient_norm);
    return report.step + 1 < stop_after;
  });
  steps.weights = all_weights(*student.model);
  return steps;
}

void expect_close(const Steps& got, const Steps& expected, double tolerance) {
  ASSERT_EQ(got.losses.size(), expected.losses.size());
  for (size_t i = 0; i < got.losses.size(); ++i) {
    EXPECT_NEAR(got.losses[i], expected.losses[i], tolerance * expected.losses[i]) << "step " << i;
    // Later steps begin from other weights; rounding of bf16 moves their gradients far.
    if (i == 0 || tolerance < 1e-3) {
      EXPECT_NEAR(got.norms[i], expected.norms[i], 10 * tolerance * expected.norms[i])
          << "step " << i;
    }
  }
}

class OnTheCpu : public ::testing::Test {
 protected:
  void SetUp() override { Progress::silence(true); }
  void TearDown() override { Progress::silence(false); }
};

class OnCuda : public OnTheCpu {
 protected:
  void SetUp() override {
    if (cuda_devices() == 0) {
      GTEST_SKIP() << why_no_cuda();
    }
    OnTheCpu::SetUp();
  }
};

TEST_F(OnCuda, SaysWhatMemoryItTakesBeforeItTakesIt) {
  set_memory_note("");
  run_on(Device::kCuda, device_config(Precision::kAuto), true);
  EXPECT_THAT(memory_note(),
              ::testing::AllOf(HasSubstr(" in all: teacher "), HasSubstr(", gradients "),
                               HasSubstr(", optimiser "), HasSubstr(", activations ")));
}

TEST_F(OnTheCpu, ActivationsAreF32) {
  EXPECT_EQ(activations_of(Precision::kAuto, Device::kCpu), Dtype::kF32);
  EXPECT_EQ(activations_of(Precision::kAuto, Device::kCuda), Dtype::kBF16);
  EXPECT_EQ(activations_of(Precision::kF32, Device::kCuda), Dtype::kF32);
  EXPECT_THAT(testing::message_of([] { run_on(Device::kCpu, device_config(Precision::kBF16)); }),
              HasSubstr("precision bf16 needs a CUDA device"));
  EXPECT_EQ(run_on(Device::kCpu, device_config(Precision::kAuto)).weights,
            run_on(Device::kCpu, device_config(Precision::kF32)).weights);
}

// Checkpoints say where their steps were done; those of versions that had the CPU alone do not.
TEST_F(OnTheCpu, ResumesRunsThatDoNotSayWhereTheyWereBegun) {
  const TestFolder folder;
  TrainConfig config = device_config(Precision::kAuto);
  const std::vector<float> whole = run_on(Device::kCpu, config).weights;
  config.folder = folder.at("run");
  config.resume = true;
  run_on(Device::kCpu, config, false, 3);
  const std::string newest = *newest_checkpoint(config.folder);
  EXPECT_EQ(read_checkpoint_state(newest).device, "cpu");
  const std::string path = newest + "/training.json";
  nlohmann::json json = nlohmann::json::parse(std::ifstream(path));
  json.erase("device");
  std::ofstream(path) << json.dump(2);
  write_checksums(newest);
  EXPECT_EQ(run_on(Device::kCpu, config).weights, whole);
}

TEST_F(OnTheCpu, SaysThatItGoesOnOnAnotherDevice) {
  const TestFolder folder;
  TrainConfig config = device_config(Precision::kAuto);
  config.folder = folder.at("run");
  config.resume = true;
  run_on(Device::kCpu, config, false, 3);
  const std::string newest = *newest_checkpoint(config.folder);
  const std::string path = newest + "/training.json";
  nlohmann::json json = nlohmann::json::parse(std::ifstream(path));
  json["device"] = "cuda (of a kind)";
  std::ofstream(path) << json.dump(2);
  write_checksums(newest);
  ::testing::internal::CaptureStderr();
  run_on(Device::kCpu, config);
  EXPECT_THAT(::testing::internal::GetCapturedStderr(),
              HasSubstr("begun on cuda (of a kind) and goes on on cpu"));
  EXPECT_THAT(testing::curve(config.folder),
              ::testing::Contains(::testing::AllOf(HasSubstr(R"("event":"device")"),
                                                   HasSubstr(R"("device":"cpu")"))));
}

TEST_F(OnCuda, StepsAreThoseOfTheCpu) {
  struct Case {
    const char* name;
    bool taught;
    std::function<void(TrainConfig&)> change;
  };
  const auto distil = [](TrainConfig& c) {
    c.loss = {};
    c.loss.reverse_kl = 1.0F;
    c.loss.forward_kl = 0.5F;
    c.loss.cross_entropy = 0.5F;
    c.align.layers = {1, 4};
  };
  const auto align = [](TrainConfig& c) {
    c.objective = Objective::kAlign;
    c.align.layers = {0, 1, 2, 3, 4};
    c.align.all_tokens = true;
  };
  const auto muon = [](TrainConfig& c) { c.optimizer.kind = OptimizerKind::kMuon; };
  for (const Case& c : {Case{"next token", false, [](TrainConfig&) {}}, Case{"muon", false, muon},
                        Case{"distil", true, distil}, Case{"align", true, align}}) {
    SCOPED_TRACE(c.name);
    TrainConfig config = device_config(Precision::kF32);
    c.change(config);
    const Steps expected = run_on(Device::kCpu, config, c.taught);
    for (const Precision precision : {Precision::kF32, Precision::kBF16}) {
      const bool narrow = precision == Precision::kBF16;
      SCOPED_TRACE(narrow ? "bf16" : "f32");
      config.precision = precision;
      expect_close(run_on(Device::kCuda, config, c.taught), expected, narrow ? 2e-2 : 1e-4);
    }
  }
}

TEST_F(OnCuda, AStoppedRunEqualsAnUninterruptedOneBitForBit) {
  for (const Precision precision : {Precision::kF32, Precision::kAuto}) {
    const TestFolder folder;
    TrainConfig config = device_config(precision);
    config.resume = true;
    config.folder = folder.at("whole");
    const Steps whole = run_on(Device::kCuda, config);
    config.folder = folder.at("stopped");
    run_on(Device::kCuda, config, false, 2);
    EXPECT_EQ(run_on(Device::kCuda, config).weights, whole.weights);
    EXPECT_EQ(testing::curve(config.folder), testing::curve(folder.at("whole")));
  }
}

TEST_F(OnCuda, CheckpointedLayersGiveTheSameSteps) {
  TrainConfig config = device_config(Precision::kF32);
  const Steps kept = run_on(Device::kCuda, config);
  config.checkpoint_layers = true;
  expect_close(run_on(Device::kCuda, config), kept, 1e-5);
  config.precision = Precision::kBF16;
  const Steps again = run_on(Device::kCuda, config);
  config.checkpoint_layers = false;
  expect_close(again, run_on(Device::kCuda, config), 1e-3);
}

// In f32 a run can go on elsewhere; bf16 is another run.
TEST_F(OnCuda, GoesOnWithARunOfTheCpu) {
  const TestFolder folder;
  TrainConfig config = device_config(Precision::kF32);
  const Steps whole = run_on(Device::kCpu, config);
  config.resume = true;
  config.folder = folder.at("run");
  run_on(Device::kCpu, config, false, 3);
  config.precision = Precision::kAuto;
  EXPECT_THAT(testing::message_of([&] { run_on(Device::kCuda, config); }),
              HasSubstr("precision: was absent, is now bf16"));
  config.precision = Precision::kF32;
  ::testing::internal::CaptureStderr();
  const Steps rest = run_on(Device::kCuda, config);
  EXPECT_THAT(::testing::internal::GetCapturedStderr(), HasSubstr("begun on cpu and goes on"));
  ASSERT_EQ(rest.losses.size(), 2U);
  EXPECT_NEAR(rest.losses[1], whole.losses[4], 1e-4 * whole.losses[4]);
  EXPECT_THAT(read_checkpoint_state(*newest_checkpoint(config.folder)).device, HasSubstr("cuda ("));
}

TEST_F(OnCuda, NamesTheLayerOfNumbersThatAreNotFinite) {
  LoadedModel model = model_on(Device::kCuda, 1);
  const auto data = testing::copy_task();
  Trainer trainer(*model.model, model.weights, device_config(Precision::kAuto), *data);
  trainer.step();
  model.model->visit([&](const std::string& name, Parameter& p) {
    if (name == "layers.2.feed_forward.down.weight") {
      fill(p.tensor, 3e38);
    }
  });
  EXPECT_THAT(testing::message_of([&] { trainer.step(); }), HasSubstr("layer 2's feed-forward"));
}

// Masters, frozen bf16 and gradients, from the CPU to the device and back to a folder.
TEST_F(OnCuda, MovesWhatIsTrainedAndSavesIt) {
  const TestFolder folder;
  const auto trainable = [](const std::string& name, const Parameter&) {
    return name.find(".mixer.") != std::string::npos;
  };
  const LoadedModel start = fresh_model(every_mixer(), 1);
  SaveOptions narrow;
  narrow.storage = MatrixStorage::kBF16;
  save_model(*start.model, folder.at("start"), narrow);
  const LoadOptions stored = load_on(Device::kCuda);
  EXPECT_EQ(stored.storage, MatrixStorage::kStored);
  LoadedModel model = load_model(
      folder.at("start"),
      {.storage = MatrixStorage::kStored, .trainable = trainable, .device = Device::kCuda});
  const auto expect_trained = [&] {
    model.model->visit([&](const std::string& name, Parameter& p) {
      EXPECT_EQ(p.tensor.has_grad(), trainable(name, p)) << name;
      EXPECT_EQ(p.tensor.device, Device(Device::kCuda)) << name;
      EXPECT_TRUE(!p.tensor.has_grad() || p.tensor.dtype == Dtype::kF32) << name;
      if (p.tensor.has_grad()) {
        EXPECT_THAT(elements_of(p.tensor.grad_tensor()), ::testing::Each(0.0F)) << name;
      }
    });
  };
  expect_trained();
  LoadedModel again = load_model(folder.at("start"), stored);
  const std::vector<float> values = all_weights(*again.model);
  again.weights.set_trainable(*again.model, trainable);
  EXPECT_EQ(all_weights(*again.model), values);
  model = std::move(again);
  expect_trained();
  EXPECT_EQ(all_weights(*load_model(folder.at("start")).model), values);
  save_trained(*model.model, model.weights, folder.at("end"), {}, {});
  EXPECT_EQ(all_weights(*load_model(folder.at("end")).model), values);
}

TEST_F(OnCuda, HeldOutLossesAreThoseOfTheCpu) {
  const HeldOut held_out(*testing::copy_task(), 60, 48);
  LoadedModel student = model_on(Device::kCpu, 1);
  LoadedModel teacher = model_on(Device::kCpu, 2);
  const LossSums expected = total(held_out.measure(*student.model, teacher.model.get()));
  student.weights.move_to(*student.model, Device::kCuda);
  teacher.weights.move_to(*teacher.model, Device::kCuda);
  for (const Dtype type : {Dtype::kF32, Dtype::kBF16}) {
    student.model->set_activations(type);
    const LossSums sums = total(held_out.measure(*student.model, teacher.model.get()));
    const double tolerance = type == Dtype::kF32 ? 1e-4 : 2e-2;
    EXPECT_EQ(sums.tokens, expected.tokens);
    EXPECT_NEAR(sums.cross_entropy, expected.cross_entropy, tolerance * expected.cross_entropy);
    EXPECT_NEAR(sums.reverse_kl, expected.reverse_kl, 2 * tolerance * expected.reverse_kl);
  }
}

}  // namespace
}  // namespace cambium
