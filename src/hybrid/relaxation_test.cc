#include "hybrid/relaxation.h"

#include <gmock/gmock.h>

#include "base/test_folder.h"
#include "base/testing.h"
#include "hybrid/scoring.h"
#include "train/testing.h"

namespace cambium {
namespace {

using ::testing::HasSubstr;

UnitSpec delta_mixer() {
  return {"gated_delta_net",
          {{"heads", int64_t{2}}, {"key_dim", int64_t{4}}, {"value_dim", int64_t{8}}}};
}

UnitSpec biased(UnitSpec mixer) {
  mixer.options.set("out_bias", true);
  return mixer;
}

/// Random values in double precision for what has no memory yet.
void fill_doubles(LoadedModel& model, uint64_t seed) {
  const LoadedModel start = fresh_model(model.model->spec(), seed, 0.3);
  std::map<std::string, Tensor> from;
  start.model->visit([&](const std::string& name, Parameter& p) { from[name] = p.tensor; });
  std::vector<std::string> open;
  model.model->visit([&](const std::string& name, Parameter& p) {
    if (p.tensor.data == nullptr) {
      open.push_back(name);
    }
  });
  model.weights.allocate(*model.model, nullptr, MatrixStorage::kF32, Dtype::kF64);
  model.model->visit([&](const std::string& name, Parameter& p) {
    if (std::find(open.begin(), open.end(), name) != open.end()) {
      copy_values(p.tensor, from.at(name));
    }
  });
}

LoadedModel without_memory(const ModelSpec& spec) {
  return {{}, std::make_unique<Model>(spec), {}};
}

double loss_of(const GatedMixers& gated, Model& teacher, const PackedSequence& sequence,
               bool backward) {
  Arena arena;
  Tape tape(arena);
  Context plain{.arena = &arena};
  Context ctx{.arena = &arena, .tape = backward ? &tape : nullptr};
  LossInputs inputs;
  inputs.teacher_hidden = teacher.forward(plain, sequence.batch);
  inputs.teacher_head = teacher.head().detached();
  inputs.hidden = gated.model().forward(ctx, sequence.batch);
  inputs.head = gated.model().head().detached();
  inputs.labels = sequence.labels;
  const LossSums sums = head_loss(ctx, inputs, {.reverse_kl = 1.0F});
  tape.backward(ctx);
  return sums.total;
}

// In double precision; the gates are sums of few powers of two, so that their factors, which are
// floats, are exact.
TEST(GatedMixers, GradientsEqualFiniteDifferences) {
  const auto data = testing::copy_task();
  Packer packer(*data, 1, 24, LongDocuments::kDrop);
  const PackedSequence sequence = packer.next();
  UnitSpec scaled = testing::attention_mixer();
  scaled.out = 0.5F;
  ModelSpec spec = testing::tiny_spec({biased(testing::attention_mixer()), scaled});
  LoadedModel teacher = without_memory(spec);
  fill_doubles(teacher, 2);
  UnitSpec half = delta_mixer();
  half.out = 0.5F;
  LoadedModel student = without_memory(testing::tiny_spec({biased(delta_mixer()), half}));
  std::map<std::string, Tensor> common;
  teacher.model->visit([&](const std::string& name, Parameter& p) { common[name] = p.tensor; });
  student.model->visit([&](const std::string& name, Parameter& p) {
    if (name.find("mixer") == std::string::npos) {
      p.tensor = common.at(name).detached();
    }
  });
  fill_doubles(student, 3);
  MixerBank bank(*teacher.model);
  bank.add("student", std::move(student), "student");
  GatedMixers gated(bank);
  ASSERT_EQ(gated.layers(), 2U);

  const std::vector<double> gates = {0.75, 0.375};
  gated.set(gates);
  loss_of(gated, *teacher.model, sequence, true);
  const std::vector<double> found = gated.take_gradients();
  for (const double zero : gated.take_gradients()) {
    EXPECT_EQ(zero, 0.0) << "what was taken is gone";
  }
  constexpr double kStep = 0x1p-11;
  for (size_t i = 0; i < gates.size(); ++i) {
    double side[2];
    for (const int up : {0, 1}) {
      std::vector<double> moved = gates;
      moved[i] += up == 1 ? kStep : -kStep;
      gated.set(moved);
      side[up] = loss_of(gated, *teacher.model, sequence, false);
    }
    const double expected = (side[1] - side[0]) / (2.0 * kStep) * gates[i] * (1.0 - gates[i]);
    EXPECT_GT(std::abs(expected), 1e-3);
    EXPECT_NEAR(found[i], expected, 1e-5 * std::abs(expected)) << "layer " << i;
  }
}

TEST(GatedMixers, AMixerWhoseOutputIsNormedHasNoGate) {
  ModelSpec spec = testing::tiny_attention(2);
  spec.layers[0].branches[1].out_norm = {};  // of the feed-forward, which has no gate
  spec.layers[1].branches[0].out_norm = {};
  LoadedModel teacher = fresh_model(spec, 1);
  MixerBank bank(*teacher.model);
  bank.add("student",
           convert(*teacher.model, *teacher.model, {0, 1}, {.mixer = "gated_delta_net"}, 3, true),
           "student");
  EXPECT_THAT(testing::error_of([&] { const GatedMixers gated(bank); }),
              HasSubstr("gates: layer 1 norms the output of its mixer"));
}

// A gate that is open, or shut, everywhere leaves the teacher, or the student.
TEST(GatedMixers, TheEndsAreTheTeacherAndTheStudent) {
  LoadedModel teacher = fresh_model(testing::tiny_attention(3), 1, 0.3);
  MixerBank bank(*teacher.model);
  bank.add(
      "student",
      convert(*teacher.model, *teacher.model, {0, 1, 2}, {.mixer = "gated_delta_net"}, 3, true),
      "student");
  GatedMixers gated(bank);
  const LoadedModel student = bank.build(bank.all(1));
  const auto data = testing::copy_task();
  const HeldOut documents(*data, 3, 40);
  for (const auto& [gate, model] :
       {std::pair{1.0, teacher.model.get()}, std::pair{0.0, student.model.get()}}) {
    gated.set({gate, gate, gate});
    EXPECT_EQ(total(documents.measure(gated.model())).cross_entropy,
              total(documents.measure(*model)).cross_entropy);
  }
}

/// A teacher, and a student whose windows are as long as its texts and thus no loss at all, but for
/// a layer whose window gives nothing.
class Gates : public ::testing::Test {
 protected:
  void SetUp() override {
    Progress::silence(true);
    make_bank({0, 1, 2, 3});
    options_.method = ScoreMethod::kGates;
    options_.probe.loss = {};
    options_.probe.loss.reverse_kl = 1.0F;
    options_.probe.align.all_tokens = true;
    options_.probe.steps = 30;
    options_.probe.sequence_length = 48;
    options_.probe.schedule.peak = 0.2;
  }
  void TearDown() override { Progress::silence(false); }

  void make_bank(const std::vector<int64_t>& converted) {
    LoadedModel student = convert(*teacher_.model, *teacher_.model, converted,
                                  {.mixer = "sliding_window", .window = 64}, 1, true);
    student.model->visit_layer(kEssential, [](const std::string& name, Parameter& p) {
      if (name.find("o_proj") != std::string::npos) {
        fill(p.tensor, 0.0);
      }
    });
    bank_ = std::make_unique<MixerBank>(*teacher_.model);
    bank_->add("student", std::move(student), "student");
  }
  Importance ask(const std::filesystem::path& path = {}) {
    ScoreData data;
    data.train = data_.get();
    data.bank = bank_.get();
    return score_importance(*teacher_.model, *teacher_.model, options_, data, path);
  }

  static constexpr int64_t kEssential = 2;
  LoadedModel teacher_ = fresh_model(testing::tiny_attention(4), 1, 0.3);
  std::unique_ptr<DocumentSource> data_ = testing::copy_task();
  std::unique_ptr<MixerBank> bank_;
  ScoreOptions options_;
};

TEST_F(Gates, TheLayerThatIsNeededStaysOpen) {
  const Importance scores = ask();
  ASSERT_EQ(scores.layers.size(), 4U);
  for (const LayerScore& s : scores.layers) {
    if (s.layer == kEssential) {
      EXPECT_GT(s.score, 0.6);
    } else {
      EXPECT_LT(s.score, 0.4) << "nothing but its price speaks in layer " << s.layer;
    }
  }
  options_.price = 0.0;
  for (const LayerScore& s : ask().layers) {
    EXPECT_NEAR(s.score, s.layer == kEssential ? 1.0 : 0.5, s.layer == kEssential ? 0.4 : 1e-3);
  }
}

TEST_F(Gates, AStoppedRunGoesOnToTheSameBits) {
  const TestFolder folder;
  options_.probe.steps = 6;
  options_.probe.sequences_per_step = 2;
  const Importance whole = ask(folder.at("whole.json"));
  EXPECT_TRUE(whole.gates.logits.empty() && whole.unscored.empty());
  // What a run leaves that is stopped after its second step.
  Importance stopped = whole;
  stopped.layers.clear();
  stopped.unscored = {0, 1, 2, 3};
  const RelaxationConfig config{options_.probe, options_.price};
  struct Enough {};
  EXPECT_THROW(learn_gates(*bank_, config, *data_, stopped.gates,
                           [&] {
                             if (stopped.gates.steps == 2) {
                               throw Enough();
                             }
                           }),
               Enough);
  write_importance(stopped, folder.at("stopped.json"));
  const Importance continued = ask(folder.at("stopped.json"));
  ASSERT_EQ(continued.layers.size(), 4U);
  for (size_t i = 0; i < 4; ++i) {
    EXPECT_EQ(continued.layers[i].score, whole.layers[i].score);
    EXPECT_EQ(continued.layers[i].tie, whole.layers[i].tie);
  }
  // Stopped between the last step and the scores of all layers.
  stopped.gates = {};
  learn_gates(*bank_, config, *data_, stopped.gates, [] {});
  stopped.layers = {whole.layers[0]};
  stopped.unscored = {1, 2, 3};
  write_importance(stopped, folder.at("late.json"));
  EXPECT_EQ(ask(folder.at("late.json")).order(), whole.order());
}

TEST_F(Gates, OnACudaDeviceTheyAreThoseOfTheCpu) {
  if (cuda_devices() == 0) {
    GTEST_SKIP() << why_no_cuda();
  }
  options_.probe.steps = 10;
  options_.probe.precision = Precision::kF32;
  const Importance expected = ask();
  bank_ = nullptr;
  teacher_.weights.move_to(*teacher_.model, Device::kCuda);
  make_bank({0, 1, 2, 3});
  for (const Precision precision : {Precision::kF32, Precision::kBF16}) {
    options_.probe.precision = precision;
    const Importance scores = ask();
    for (size_t i = 0; i < 4; ++i) {
      EXPECT_NEAR(scores.layers[i].score, expected.layers[i].score,
                  precision == Precision::kF32 ? 1e-3 : 5e-2);
    }
  }
}

TEST_F(Gates, WhatDecidesIsInTheFileAndWrongUseIsRefused) {
  const TestFolder folder;
  const std::filesystem::path path = folder.at("gates.json");
  options_.probe.steps = 1;
  ask(path);
  const struct {
    const char* named;
    std::function<void()> change;
  } rows[] = {{"price", [&] { options_.price = 0.3; }},
              {"probe align", [&] { options_.probe.align.weight = 2.0; }},
              {"data", [&] { data_ = testing::copy_task(8); }}};
  for (const auto& row : rows) {
    const ScoreOptions options = options_;
    row.change();
    EXPECT_THAT(testing::message_of([&] { ask(path); }),
                HasSubstr(std::string("\n  ") + row.named + ": "));
    options_ = options;
    data_ = testing::copy_task();
    EXPECT_EQ(testing::message_of([&] { ask(path); }), "no error");
  }
  options_.probe.steps = 0;
  EXPECT_THAT(testing::message_of([&] { ask(); }), HasSubstr("gates: expected steps above 0"));
  options_.probe.steps = 1;
  make_bank({0, 2, 3});
  EXPECT_THAT(testing::message_of([&] { ask(); }),
              HasSubstr("gates: layer 1 of student has attention still"));
  bank_ = nullptr;
  EXPECT_THAT(testing::message_of([&] { ask(); }), HasSubstr("gates: expected the student"));
}

}  // namespace
}  // namespace cambium
