// Which operations of a step are told apart and what they must move; how long they take is never
// asserted.
#include "eval/op_profile.h"

#include <gmock/gmock.h>

#include <limits>

#include "base/testing.h"
#include "ops/attention/attention.h"
#include "ops/matmul/matmul.h"
#include "ops/matmul/matmul_weight.h"
#include "ops/norm/norm.h"
#include "ops/recurrence/recurrence.h"
#include "train/testing.h"

namespace cambium {
namespace {

using ::testing::HasSubstr;

constexpr MachineLimits kLimits = {.bytes_per_second = 1e9, .flops_per_second = 1e9};

std::vector<Device> devices() {
  return cuda_devices() > 0 ? std::vector<Device>{{}, {Device::kCuda}} : std::vector<Device>{{}};
}

LoadedModel model_on(Device device, const ModelSpec& spec) {
  LoadedModel model = fresh_model(spec, 1);
  model.weights.move_to(*model.model, device);
  return model;
}

const OpLine& line_of(const StepProfile& step, const std::string& kernel,
                      const std::string& weights = "") {
  for (const OpLine& line : step.ops) {
    if (line.kernel == kernel && line.weights == weights) {
      return line;
    }
  }
  ADD_FAILURE() << "no " << kernel << " of " << weights;
  static const OpLine none;
  return none;
}

void expect_sound(const StepProfile& step) {
  EXPECT_TRUE(step.finite);
  EXPECT_GT(step.step_seconds, 0.0);
  EXPECT_GT(step.wall_seconds, 0.0);
  double sum = 0.0;
  for (size_t i = 0; i < step.ops.size(); ++i) {
    const OpLine& line = step.ops[i];
    SCOPED_TRACE(line.kernel + " " + line.shape);
    EXPECT_FALSE(line.shape.empty()) << "what it must do is not known";
    EXPECT_GT(line.cost.bytes, 0.0);
    EXPECT_GT(line.calls, 0);
    EXPECT_GE(line.call_seconds, 0.0);
    EXPECT_TRUE(i == 0 || line.step_seconds <= step.ops[i - 1].step_seconds);
    sum += line.step_seconds;
  }
  EXPECT_DOUBLE_EQ(sum, step.ops_seconds);
}

TEST(OpProfile, KnowsEveryOperationOfEveryMixer) {
  for (const Device device : devices()) {
    SCOPED_TRACE(device.describe());
    LoadedModel loaded = model_on(device, testing::every_mixer());
    const OpProfileConfig config = {.sequences = 3, .context = 9, .tokens = 21, .repeats = 2};
    const StepProfile decode = profile_decode(*loaded.model, config, kLimits);
    expect_sound(decode);
    EXPECT_TRUE(decode.decode);
    EXPECT_EQ(decode.tokens, 3);
    EXPECT_EQ(line_of(decode, "matmul", "head").shape, "3 x 16 -> 24");
    EXPECT_EQ(line_of(decode, "embedding", "embed").shape, "3 x 16");
    EXPECT_EQ(line_of(decode, "matmul", "feed_forward.gate + feed_forward.up").shape,
              "3 x 16 -> 24 + 24");
    EXPECT_EQ(line_of(decode, "matmul", "feed_forward.gate + feed_forward.up").calls,
              loaded.model->layer_count());
    EXPECT_EQ(line_of(decode, "sample_rows").shape, "3 x 24");
    EXPECT_EQ(line_of(decode, "selective_scan", "mixer.A_log").shape,
              "3 x 1 at 9, 16 channels of 4");
    const StepProfile prefill = profile_prefill(*loaded.model, config, kLimits);
    expect_sound(prefill);
    EXPECT_EQ(prefill.tokens, 21);
    EXPECT_EQ(line_of(prefill, "matmul", "head").shape, "1 x 16 -> 24");
    EXPECT_EQ(line_of(prefill, "matmul", "feed_forward.down").shape, "21 x 24 -> 16");
  }
}

// The operations that are counted call by call are those that the model's sizes say.
TEST(OpProfile, CountsTheOperationsOfAStep) {
  UnitSpec window = testing::attention_mixer();
  window.kind = "sliding_window";
  window.options.set("window", int64_t{6});
  window.options.set("sinks", int64_t{2});
  LoadedModel loaded = fresh_model(testing::tiny_spec({testing::attention_mixer(), window}), 1);
  const StepCosts costs(*loaded.model, Dtype::kBF16);
  for (const int64_t context : {0, 1, 5, 40}) {
    const StepProfile step =
        profile_decode(*loaded.model, {.sequences = 4, .context = context, .repeats = 1}, kLimits);
    double flops = 0.0;
    for (const OpLine& line : step.ops) {
      flops += static_cast<double>(line.calls) * line.cost.flops;
      EXPECT_NEAR(line.share * line.call_seconds, kLimits.seconds(line.cost),
                  1e-9 * kLimits.seconds(line.cost));
    }
    EXPECT_DOUBLE_EQ(flops, costs.of(4, context, 1).flops) << context;
  }
}

TEST(OpProfile, SaysThatLogitsAreNotNumbers) {
  LoadedModel loaded = fresh_model(testing::tiny_attention(1), 1);
  fill(loaded.model->head(), std::numeric_limits<double>::quiet_NaN());
  const OpProfileConfig config = {.context = 3, .tokens = 4, .repeats = 1};
  const StepProfile step = profile_decode(*loaded.model, config, kLimits);
  EXPECT_FALSE(step.finite);
  for (const OpLine& line : step.ops) {
    EXPECT_NE(line.kernel, "sample_rows");
  }
  EXPECT_FALSE(profile_prefill(*loaded.model, config, kLimits).finite);
}

TEST(OpProfileErrors, NameWhatIsWrong) {
  LoadedModel loaded = fresh_model(testing::tiny_attention(1), 1);
  for (const OpProfileConfig& config : {OpProfileConfig{.sequences = 0}, {.repeats = 0}}) {
    EXPECT_THAT(testing::error_of([&] { profile_decode(*loaded.model, config, kLimits); }),
                HasSubstr("sequences, tokens and repeats above 0"));
  }
  EXPECT_THAT(testing::error_of([&] { profile_prefill(*loaded.model, {.tokens = 0}, kLimits); }),
              HasSubstr("got 1, 0, 10 and 1024"));
}

// Remembers the work of the last call.
class LastWork : public OpTimer {
 public:
  void begin(const OpCall& call) override { work = work_of(call); }
  void end(const OpCall& /*call*/) override {}
  OpWork work;
};

TEST(OpWork, OfAProduct) {
  Arena arena;
  LastWork timer;
  Context ctx{.arena = &arena, .timer = &timer};
  const OwnedTensor x(Dtype::kF32, {5, 6});
  const OwnedTensor wide(Dtype::kF32, {7, 6});
  const OwnedTensor narrow(Dtype::kBF16, {3, 6});
  const OwnedTensor bias(Dtype::kF32, {3});
  std::array<Tensor, 2> y;
  matmul_each(ctx, x.view, std::array<Affine, 2>{{{wide.view, {}}, {narrow.view, bias.view}}}, y);
  EXPECT_EQ(timer.work.shape, "5 x 6 -> 7 + 3");
  EXPECT_EQ(timer.work.weights, (std::vector<const void*>{wide.view.data, narrow.view.data}));
  EXPECT_EQ(timer.work.cost.bytes, 4 * 30 + (4 * 42 + 4 * 35) + (2 * 18 + 4 * 3 + 4 * 15));
  EXPECT_EQ(timer.work.cost.flops, 2 * 5 * 6 * 10);
}

// Of a result that is not rounded each element is of fp32.
TEST(OpWork, OfAnUnroundedProduct) {
  const OwnedTensor x(Dtype::kBF16, {5, 6});
  const OwnedTensor weight(Dtype::kBF16, {7, 6});
  const OwnedTensor y(Dtype::kF32, {5, 7});
  const UnroundedMatmuls<bf16> args(1, [&](int64_t) {
    return MatmulTo<bf16, float>{
        view<bf16>(x.view), weight_view<bf16>(weight.view), {}, view<float>(y.view), false};
  });
  const OpWork work = work_of({"matmul_unrounded_forward", typeid(args), &args, nullptr});
  EXPECT_EQ(work.shape, "5 x 6 -> 7");
  EXPECT_EQ(work.weights, (std::vector<const void*>{weight.view.data}));
  EXPECT_EQ(work.cost.bytes, 2 * 30 + 2 * 42 + 4 * 35);
  EXPECT_EQ(work.cost.flops, 2 * 5 * 6 * 7);
}

TEST(OpWork, OfARecurrence) {
  Arena arena;
  LastWork timer;
  Context ctx{.arena = &arena, .timer = &timer};
  const OwnedTensor q(Dtype::kF32, {4, 1, 3});
  const OwnedTensor v(Dtype::kF32, {4, 2, 5});
  const OwnedTensor decay(Dtype::kF32, {4, 2});
  const OwnedTensor state(Dtype::kF32, {2, 2, 3, 5});
  // One segment begins, the other goes on: only its state is read.
  const std::array<int32_t, 3> start = {0, 1, 4};
  const std::array<int32_t, 2> position = {0, 7};
  const std::array<int32_t, 2> slot = {1, 0};
  recurrence(ctx, {.q = q.view, .k = q.view, .v = v.view, .log_decay = decay.view},
             {start, position, slot}, state.view);
  EXPECT_EQ(timer.work.shape, "4 tokens of 2 sequences, 1/2 heads of 3 x 5");
  EXPECT_EQ(timer.work.cost.bytes, 4 * (2 * 12 + 2 * 40 + 8 + 3 * 30));
  EXPECT_EQ(timer.work.cost.flops, 4 * 4 * 30);
}

TEST(OpWork, OfAKernelThatServingDoesNotCallIsNotKnown) {
  struct Args {};
  const Args args;
  const OpWork work = work_of({"probe", typeid(args), &args, nullptr});
  EXPECT_EQ(work.shape, "");
  EXPECT_EQ(work.cost.bytes, 0.0);
}

}  // namespace
}  // namespace cambium
