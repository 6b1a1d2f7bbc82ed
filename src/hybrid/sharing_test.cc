// A student holds what it has in common with its teacher as views of the teacher's tensors.
#include <gtest/gtest.h>

#include <filesystem>

#include "base/progress.h"
#include "base/test_folder.h"
#include "hybrid/graft.h"
#include "train/testing.h"
#include "train/train_job.h"

namespace cambium {
namespace {

using testing::all_weights;

constexpr int64_t kSteps = 4;

struct Trace {
  std::vector<double> losses, norms;
  std::vector<float> weights;
  int64_t bytes = 0;          // that the student owns, before it is trained
  int64_t trained_bytes = 0;  // and in training
  int64_t trained = 0;        // parameters
};

class Sharing : public ::testing::TestWithParam<MatrixStorage> {
 protected:
  void SetUp() override {
    Progress::silence(true);
    LoadedModel teacher = fresh_model(testing::tiny_attention(4), 3);
    SaveOptions save;
    save.storage = GetParam();
    save_model(*teacher.model, folder_.at("teacher"), save);
    LoadedModel stored = load_model(folder_.at("teacher"));
    LoadedModel hybrid =
        convert(*stored.model, *stored.model, {1, 2}, {.mixer = "gated_delta_net"}, 7);
    save_model(*hybrid.model, folder_.at("hybrid"), {});
    converted_ = converted_mixers(hybrid.model->spec(), stored.model->spec());
    hybrid.model->visit([&](const std::string& name, Parameter& p) {
      new_parameters_ += is_new(name) ? p.numel() : 0;
    });
  }
  void TearDown() override { Progress::silence(false); }

  bool is_new(const std::string& name) const {
    return std::any_of(converted_.begin(), converted_.end(),
                       [&](const std::string& prefix) { return name.starts_with(prefix); });
  }

  Trace train(const LoadedModel& teacher, LoadedModel student, const TrainConfig& config) const {
    Trace run;
    run.bytes = student.weights.bytes();
    const auto data = testing::copy_task();
    const std::vector<float> taught = all_weights(*teacher.model);
    Trainer trainer(*student.model, student.weights, config, *data, teacher.model.get());
    run.trained_bytes = student.weights.bytes();
    run.trained = trainer.optimizer().trained_parameters();
    while (!trainer.finished()) {
      const StepReport report = trainer.step();
      run.losses.push_back(report.loss);
      run.norms.push_back(report.gradient_norm);
    }
    run.weights = all_weights(*student.model);
    EXPECT_EQ(all_weights(*teacher.model), taught) << "training wrote to the teacher";
    return run;
  }

  static TrainConfig config(Trained trained) {
    TrainConfig c = testing::tiny_config(kSteps);
    c.loss = {};
    c.loss.reverse_kl = 1.0F;
    c.trained = trained;
    return c;
  }

  TestFolder folder_;
  std::vector<std::string> converted_;
  int64_t new_parameters_ = 0;
};

TEST_P(Sharing, AHybridCostsItsMixersAndLearnsTheSame) {
  const LoadedModel teacher = load_model(folder_.at("teacher"));
  for (const Trained trained : {Trained::kConverted, Trained::kMixers, Trained::kEverything}) {
    SCOPED_TRACE(static_cast<int>(trained));
    const Trace apart = train(teacher, load_model(folder_.at("hybrid")), config(trained));
    const Trace shared =
        train(teacher, load_model(folder_.at("hybrid"), load_on({}, &teacher)), config(trained));
    EXPECT_EQ(shared.losses, apart.losses);
    EXPECT_EQ(shared.norms, apart.norms);
    EXPECT_EQ(shared.weights, apart.weights);
    EXPECT_EQ(shared.bytes, 4 * new_parameters_);
    // Values and gradients of what is trained, and nothing else.
    EXPECT_EQ(shared.trained_bytes, 8 * shared.trained);
    EXPECT_EQ(shared.trained, apart.trained);
    if (trained == Trained::kConverted) {
      EXPECT_EQ(shared.trained, new_parameters_);
    }
  }
}

// What a pipeline does: the graft views its base, and takes over what the base owns.
TEST_P(Sharing, AGraftTakesOverWhatItsBaseOwns) {
  const LoadedModel teacher = load_model(folder_.at("teacher"));
  const GraftOptions graft{.mixer = "mamba2"};
  LoadedModel copied = load_model(folder_.at("hybrid"));
  copied = convert(*copied.model, *teacher.model, {3}, graft, 7);
  LoadedModel base = load_model(folder_.at("hybrid"), load_on({}, &teacher));
  LoadedModel hybrid = convert(*base.model, *teacher.model, {3}, graft, 7, true);
  const int64_t added = hybrid.weights.bytes();
  hybrid.weights.take_over(*hybrid.model, std::move(base.weights));
  base = {};
  EXPECT_EQ(hybrid.weights.bytes(), added + 4 * new_parameters_);
  EXPECT_EQ(all_weights(*hybrid.model), all_weights(*copied.model));
  const Trace apart = train(teacher, std::move(copied), config(Trained::kConverted));
  const Trace shared = train(teacher, std::move(hybrid), config(Trained::kConverted));
  EXPECT_EQ(shared.losses, apart.losses);
  EXPECT_EQ(shared.weights, apart.weights);
}

TEST_P(Sharing, WhatDiffersIsNotShared) {
  const LoadedModel teacher = load_model(folder_.at("teacher"));
  LoadedModel changed = load_model(folder_.at("hybrid"));
  changed.model->visit([](const std::string& name, Parameter& p) {
    if (name == "layers.0.feed_forward.up.weight") {
      p.tensor.ptr<float>()[p.numel() - 1] += 1.0F;
    }
  });
  save_model(*changed.model, folder_.at("changed"), {});
  LoadedModel student = load_model(folder_.at("changed"), load_on({}, &teacher));
  EXPECT_EQ(all_weights(*student.model), all_weights(*changed.model));
  std::map<std::string, const void*> taught;
  teacher.model->visit(
      [&](const std::string& name, Parameter& p) { taught[name] = p.tensor.data; });
  student.model->visit([&](const std::string& name, Parameter& p) {
    const bool other = is_new(name) || name == "layers.0.feed_forward.up.weight";
    EXPECT_EQ(p.tensor.data == taught[name], !other) << name;
  });
  save_trained(*student.model, student.weights, folder_.at("saved"), {}, {});
  EXPECT_EQ(all_weights(*load_model(folder_.at("saved")).model), all_weights(*changed.model));
}

// On a device matrices stay as the teacher's file has them, and only masters are f32.
TEST_P(Sharing, OnADeviceFrozenMatricesAreTheTeachers) {
  if (cuda_devices() == 0) {
    GTEST_SKIP() << why_no_cuda();
  }
  const LoadedModel teacher = load_model(folder_.at("teacher"), load_on(Device::kCuda));
  const Trace apart = train(teacher, load_model(folder_.at("hybrid"), load_on(Device::kCuda)),
                            config(Trained::kConverted));
  const Trace shared =
      train(teacher, load_model(folder_.at("hybrid"), load_on(Device::kCuda, &teacher)),
            config(Trained::kConverted));
  EXPECT_EQ(shared.losses, apart.losses);
  EXPECT_EQ(shared.norms, apart.norms);
  EXPECT_EQ(shared.weights, apart.weights);
  EXPECT_EQ(shared.trained_bytes, 8 * shared.trained);
  EXPECT_EQ(shared.trained, new_parameters_);
}

INSTANTIATE_TEST_SUITE_P(Stored, Sharing,
                         ::testing::Values(MatrixStorage::kF32, MatrixStorage::kBF16),
                         [](const auto& info) {
                           return info.param == MatrixStorage::kF32 ? "F32" : "BF16";
                         });

}  // namespace
}  // namespace cambium
