#include "train/trainer.h"

#include <gmock/gmock.h>

#include "base/error.h"
#include "base/test_folder.h"
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

template <class F>
std::string error_of(F&& f) {
  try {
    f();
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

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

}  // namespace
}  // namespace cambium
