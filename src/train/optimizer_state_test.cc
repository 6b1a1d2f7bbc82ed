// The optimiser's state in bf16 and in the host's memory: the same run when it is resumed.
#include <gmock/gmock.h>

#include "base/progress.h"
#include "base/test_folder.h"
#include "base/testing.h"
#include "train/checkpoint.h"
#include "train/testing.h"

namespace cambium {
namespace {

using testing::all_weights;
using ::testing::HasSubstr;

constexpr int64_t kSteps = 6;

struct Outcome {
  std::vector<double> losses;
  std::vector<float> weights;
  int64_t state_bytes = 0;
  int64_t trained = 0;
};

Outcome run(const TrainConfig& config, Device device = {}, int64_t stop_after = kSteps) {
  LoadedModel model = fresh_model(testing::tiny_attention(2), 1);
  model.weights.move_to(*model.model, device);
  const auto data = testing::copy_task();
  Trainer trainer(*model.model, model.weights, config, *data);
  Outcome out;
  trainer.run([&](const StepReport& report) {
    out.losses.push_back(report.loss);
    return report.step + 1 < stop_after;
  });
  out.weights = all_weights(*model.model);
  out.state_bytes = trainer.optimizer().state_bytes();
  out.trained = trainer.optimizer().trained_parameters();
  return out;
}

TrainConfig config_with(OptimizerState state, bool offload = false) {
  TrainConfig config = testing::tiny_config(kSteps);
  config.optimizer.state = state;
  config.optimizer.offload = offload;
  return config;
}

std::vector<Device> devices() {
  return cuda_devices() > 0 ? std::vector<Device>{Device::kCpu, Device::kCuda}
                            : std::vector<Device>{Device::kCpu};
}

class StateOfTheOptimizer : public ::testing::Test {
 protected:
  void SetUp() override { Progress::silence(true); }
  void TearDown() override { Progress::silence(false); }
};

TEST_F(StateOfTheOptimizer, InBf16IsHalfAsLargeAndLearns) {
  for (const Device device : devices()) {
    const Outcome wide = run(config_with(OptimizerState::kF32), device);
    const Outcome narrow = run(config_with(OptimizerState::kBF16), device);
    EXPECT_EQ(wide.state_bytes, wide.trained * optimizer_state_bytes({}));
    EXPECT_EQ(narrow.state_bytes, narrow.trained * 4);
    EXPECT_EQ(narrow.losses[0], wide.losses[0]);
    EXPECT_NE(narrow.weights, wide.weights);
    for (size_t i = 0; i < wide.losses.size(); ++i) {
      EXPECT_NEAR(narrow.losses[i], wide.losses[i], 0.02 * wide.losses[i]) << "step " << i;
    }
    EXPECT_EQ(run(config_with(OptimizerState::kBF16), device).weights, narrow.weights);
  }
}

TEST_F(StateOfTheOptimizer, AResumedRunIsTheSameBitForBit) {
  for (const Device device : devices()) {
    for (const bool offload : {false, true}) {
      SCOPED_TRACE(device.describe() + (offload ? " offload" : ""));
      const TestFolder folder;
      TrainConfig config = config_with(OptimizerState::kBF16, offload);
      config.resume = true;
      config.folder = folder.at("whole");
      const Outcome whole = run(config, device);
      config.folder = folder.at("stopped");
      run(config, device, 2);
      EXPECT_EQ(run(config, device).weights, whole.weights);
      EXPECT_EQ(testing::curve(config.folder), testing::curve(folder.at("whole")));
      config.optimizer.state = OptimizerState::kF32;
      EXPECT_THAT(testing::message_of([&] { run(config, device); }),
                  HasSubstr("optimizer state: was bf16, is now absent"));
    }
  }
}

TEST_F(StateOfTheOptimizer, InTheHostsMemoryChangesNothing) {
  for (const Device device : devices()) {
    for (const OptimizerState state : {OptimizerState::kF32, OptimizerState::kBF16}) {
      EXPECT_EQ(run(config_with(state, true), device).weights,
                run(config_with(state), device).weights);
    }
  }
}

}  // namespace
}  // namespace cambium
