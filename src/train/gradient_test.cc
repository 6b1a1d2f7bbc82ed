// The gradient of whole models in double precision against finite differences, with every mixer.
#include <gtest/gtest.h>

#include <optional>

#include "train/testing.h"

namespace cambium {
namespace {

UnitSpec window_mixer() {
  UnitSpec mixer = testing::attention_mixer();
  mixer.kind = "sliding_window";
  mixer.options.set("window", int64_t{3});
  return mixer;
}

UnitSpec mamba_mixer() {
  return {
      "mamba",
      {{"inner", int64_t{16}}, {"xb", int64_t{8}}, {"state", int64_t{4}}, {"dt_rank", int64_t{2}}}};
}

UnitSpec mamba2_mixer() {
  return {"mamba2",
          {{"heads", int64_t{2}},
           {"head_dim", int64_t{8}},
           {"state", int64_t{4}},
           {"b_heads", int64_t{1}}}};
}

UnitSpec delta_mixer() {
  return {"gated_delta_net",
          {{"heads", int64_t{2}}, {"key_dim", int64_t{4}}, {"value_dim", int64_t{8}}}};
}

UnitSpec kimi_mixer() {
  return {"kimi_delta", {{"heads", int64_t{2}}, {"head_dim", int64_t{4}}}};
}

UnitSpec lightning_mixer() {
  return {"lightning",
          {{"heads", int64_t{2}},
           {"kv_heads", int64_t{1}},
           {"head_dim", int64_t{8}},
           {"rope", true},
           {"qk_norm_eps", 1e-6}}};
}

UnitSpec parallel_mixer() {
  UnitSpec mixer = window_mixer();
  mixer.kind = "parallel";
  mixer.options.set("window_dropout", 0.5);
  mixer.options.set("recurrent", "gated_delta_net");
  const UnitSpec delta = delta_mixer();
  for (const auto& [key, value] : delta.options.values()) {
    mixer.options.set("recurrent." + key, value);
  }
  return mixer;
}

UnitSpec with_biases(UnitSpec mixer, std::initializer_list<const char*> biases) {
  for (const char* bias : biases) {
    mixer.options.set(bias, true);
  }
  return mixer;
}

UnitSpec given(UnitSpec mixer, const char* option, const OptionValue& value) {
  mixer.options.set(option, value);
  return mixer;
}

/// A double-precision copy of a fresh model.
struct DoubleModel {
  explicit DoubleModel(const ModelSpec& spec, uint64_t seed, bool trained) : model(spec) {
    LoadedModel start = fresh_model(spec, seed, 0.2);
    weights.allocate(
        model, [trained](const std::string&, const Parameter&) { return trained; },
        MatrixStorage::kF32, Dtype::kF64);
    std::map<std::string, Tensor> from;
    start.model->visit([&](const std::string& name, Parameter& p) { from[name] = p.tensor; });
    model.visit(
        [&](const std::string& name, Parameter& p) { copy_values(p.tensor, from.at(name)); });
  }
  Model model;
  Weights weights;
};

bool has_routers(const ModelSpec& spec) {
  return spec.layers[0].feed_forward()->kind == "experts";
}

/// Routers say their losses where there is a tape; it is run for a backward pass alone.
double loss_of(Model& student, Model& teacher, const PackedSequence& sequence, bool backward,
               bool checkpointed) {
  Arena arena;
  Tape tape(arena);
  Context plain{.arena = &arena};
  std::optional<RouterTrainer> routers;
  if (has_routers(student.spec())) {
    routers.emplace(student, RouterTraining{.balance = 0.4, .z = 0.1}, "test");
  }
  Context ctx{.arena = &arena, .tape = backward || routers ? &tape : nullptr};
  LossInputs inputs;
  inputs.teacher_hidden = teacher.forward(plain, sequence.batch);
  inputs.teacher_head = teacher.head().detached();
  ForwardOptions options;
  options.checkpoint_layers = checkpointed;
  options.noise = 5;
  if (routers) {
    options.routers = routers->taps(ctx, sequence.batch.size(), 1.0);
  }
  inputs.hidden = student.forward(ctx, sequence.batch, options);
  inputs.head = backward ? student.head() : student.head().detached();
  inputs.labels = sequence.labels;
  inputs.scale = 1.0 / static_cast<double>(sequence.learned);
  LossConfig config{.cross_entropy = 0.5F};
  config.forward_kl = 0.3F;
  config.reverse_kl = 0.7F;
  config.temperature = 1.5F;
  const LossSums sums = head_loss(ctx, inputs, config);
  if (backward) {
    tape.backward(ctx);
  }
  double loss = sums.total * inputs.scale;
  if (routers) {
    routers->note_call(ctx);
    loss += routers->report().loss;
  }
  return loss;
}

TEST(WholeModelGradient, EqualsFiniteDifferences) {
  const auto data = testing::copy_task();
  Packer packer(*data, 1, 24, LongDocuments::kDrop);
  const PackedSequence sequence = packer.next();
  ASSERT_GT(sequence.batch.segments().count(), 1);
  std::vector<ModelSpec> specs;
  for (const std::vector<UnitSpec>& mixers : std::vector<std::vector<UnitSpec>>{
           {testing::attention_mixer(), mamba_mixer()},
           {window_mixer(), mamba2_mixer()},
           {delta_mixer(), testing::attention_mixer()},
           {kimi_mixer(), lightning_mixer()},
           {parallel_mixer()},
           {with_biases(mamba_mixer(), {"in_bias", "out_bias"}),
            with_biases(mamba2_mixer(), {"out_bias"})},
           {with_biases(delta_mixer(), {"conv_bias", "out_bias"}),
            with_biases(window_mixer(), {"qkv_bias", "out_bias"})},
           {given(testing::attention_mixer(), "temperature", "query"),
            given(mamba_mixer(), "out_gate", "sigmoid")},
           {given(testing::attention_mixer(), "temperature", "key"),
            given(given(mamba2_mixer(), "out_gate", "sigmoid"), "norm_first", true)}}) {
    specs.push_back(testing::tiny_spec(mixers));
  }
  const Options softmax = {{"router", "softmax"}, {"renormalise", true}};
  const Options sigmoid = {{"router", "sigmoid"}, {"router_bias", true}, {"scale", 2.0}};
  specs.push_back(testing::tiny_experts(2, softmax, 2));
  specs.push_back(testing::tiny_experts(2, sigmoid, 2));
  for (const ModelSpec& spec : specs) {
    for (const bool checkpointed : {false, true}) {
      if (checkpointed && has_routers(spec)) {
        continue;  // says its losses in the backward steps alone
      }
      DoubleModel student(spec, 1, true);
      DoubleModel teacher(testing::tiny_attention(2), 2, false);
      loss_of(student.model, teacher.model, sequence, true, checkpointed);
      student.model.visit([&](const std::string& name, Parameter& p) {
        // A fixed few of each parameter's numbers: first, last and one between.
        for (const int64_t i : {int64_t{0}, p.numel() / 2, p.numel() - 1}) {
          double& w = p.tensor.ptr<double>()[i];
          const double kept = w;
          constexpr double kStep = 1e-5;
          w = kept + kStep;
          const double above = loss_of(student.model, teacher.model, sequence, false, checkpointed);
          w = kept - kStep;
          const double below = loss_of(student.model, teacher.model, sequence, false, checkpointed);
          w = kept;
          const double expected = (above - below) / (2.0 * kStep);
          EXPECT_NEAR(p.tensor.grad_ptr<double>()[i], expected,
                      1e-6 * std::max(1e-2, std::abs(expected)))
              << layer_map(spec) << " " << name << "[" << i << "]";
        }
      });
    }
  }
}

struct BackwardPass {
  std::vector<double> gradients;  // of all parameters
  int64_t peak_bytes = 0;
};

/// Layers share the memory of gradients unless they are tapped.
BackwardPass backward_pass(const ModelSpec& spec, const PackedSequence& sequence, bool tapped,
                           bool checkpointed) {
  DoubleModel made(spec, 1, true);
  Arena arena;
  Tape tape(arena);
  Context ctx{.arena = &arena, .tape = &tape};
  std::vector<MixerTap> taps(spec.layers.size());
  const Tensor hidden =
      made.model.forward(ctx, sequence.batch,
                         {.checkpoint_layers = checkpointed,
                          .taps = tapped ? std::span(taps) : std::span<MixerTap>{}});
  const LossInputs inputs{.hidden = hidden,
                          .head = made.model.head(),
                          .labels = sequence.labels,
                          .scale = 1.0 / static_cast<double>(sequence.learned)};
  head_loss(ctx, inputs, LossConfig{.cross_entropy = 1.0F});
  tape.backward(ctx);
  BackwardPass pass{{}, arena.peak_bytes()};
  made.model.visit([&](const std::string&, Parameter& p) {
    const double* gradient = p.tensor.grad_ptr<double>();
    pass.gradients.insert(pass.gradients.end(), gradient, gradient + p.numel());
  });
  return pass;
}

TEST(WholeModelGradient, IsTheSameWhereLayersShareItsMemory) {
  const auto data = testing::copy_task();
  Packer packer(*data, 1, 24, LongDocuments::kDrop);
  const PackedSequence sequence = packer.next();
  // Layers of other sizes in an order of no pattern, and some that hand their input on.
  ModelSpec spec = testing::tiny_spec({testing::attention_mixer(), mamba_mixer(), delta_mixer(),
                                       mamba_mixer(), mamba2_mixer(), window_mixer(),
                                       testing::attention_mixer(), kimi_mixer()});
  for (const int64_t at : {7, 4, 2, 2}) {
    spec.layers.insert(spec.layers.begin() + at, LayerSpec{});
  }
  const BackwardPass apart = backward_pass(spec, sequence, true, false);
  const BackwardPass shared = backward_pass(spec, sequence, false, false);
  const BackwardPass again = backward_pass(spec, sequence, false, true);
  EXPECT_EQ(shared.gradients, apart.gradients);
  EXPECT_EQ(again.gradients, apart.gradients);
  EXPECT_LT(shared.peak_bytes, apart.peak_bytes * 8 / 10);
  EXPECT_LT(again.peak_bytes, shared.peak_bytes);
}

}  // namespace
}  // namespace cambium
