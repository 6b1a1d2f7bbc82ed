// Grafts in place of latent attention: what its rows are, and all that a teacher of it goes
// through.
#include <gmock/gmock.h>

#include <cmath>
#include <numeric>

#include "base/test_paths.h"
#include "base/testing.h"
#include "eval/verify.h"
#include "hybrid/calibrate.h"
#include "hybrid/grafts/graft_table.h"
#include "hybrid/mixer_bank.h"
#include "hybrid/scoring.h"
#include "model/kept_tensors.h"
#include "nn/units/head_mixer.h"
#include "nn/units/units.h"
#include "ops/matmul/matmul.h"
#include "train/testing.h"

namespace cambium {
namespace {

using ::testing::AnyOf;
using testing::error_of;
using ::testing::HasSubstr;

constexpr int64_t kHeads = 2, kNope = 6, kRope = 4, kValue = 5;

enum class Form : uint8_t { kPlain, kQueryLatent, kGated, kIndexed };
constexpr Form kForms[] = {Form::kPlain, Form::kQueryLatent, Form::kGated, Form::kIndexed};

UnitSpec latent_mixer(Form form) {
  UnitSpec unit{"latent_attention",
                {{"heads", kHeads},
                 {"kv_rank", int64_t{8}},
                 {"nope_dim", kNope},
                 {"rope_dim", kRope},
                 {"value_dim", kValue}}};
  if (form != Form::kPlain) {
    unit.options.set("q_rank", int64_t{7});
  }
  if (form == Form::kGated) {
    unit.options.set("gate", true);
  }
  if (form == Form::kIndexed) {
    for (const auto& [key, value] : {std::pair{"index_heads", int64_t{2}},
                                     {"index_dim", int64_t{6}},
                                     {"index_top", int64_t{100}}}) {
      unit.options.set(key, value);
    }
  }
  return unit;
}

/// Layers of it, their norms' weights away from one.
LoadedModel make_teacher(Form form, int layers = 3) {
  ModelSpec spec =
      testing::tiny_spec(std::vector<UnitSpec>(static_cast<size_t>(layers), latent_mixer(form)));
  spec.rope.dim = kRope;
  spec.rope.interleaved = true;
  LoadedModel teacher = fresh_model(spec, 5, 0.4);
  teacher.model->visit([](const std::string& name, Parameter& p) {
    Rng rng(3, name.size());
    for (int64_t i = 0; name.ends_with("norm.weight") && i < p.numel(); ++i) {
      p.tensor.ptr<float>()[i] += 0.3F * rng.normal();
    }
  });
  return teacher;
}

std::vector<float> logits(Model& model, int64_t tokens = 40) {
  std::vector<int32_t> text(static_cast<size_t>(tokens));
  for (size_t i = 0; i < text.size(); ++i) {
    text[i] = static_cast<int32_t>(3 + i * i % 20);
  }
  Workspace workspace(model.device());
  Context ctx = context_for(model, workspace);
  Batch batch;
  batch.add(text);
  return elements_of(model.logits(ctx, model.forward(ctx, batch)));
}

/// The mixer of a layer given one token alone, at position 0, where nothing turns.
struct OneToken {
  explicit OneToken(Model& model, uint64_t seed) : x(Dtype::kF32, {1, model.spec().width}) {
    Rng rng(seed, 1);
    for (int64_t i = 0; i < x.view.numel(); ++i) {
      x.view.ptr<float>()[i] = rng.normal();
    }
    batch.add(std::vector<int32_t>{1});
    inputs = {&batch, model.rope_for(ctx, batch, 0), nullptr};
  }

  std::vector<float> times(const std::vector<float>& rows) {
    const int64_t width = x.view.dim(1);
    std::vector<float> y;
    for (size_t at = 0; at < rows.size(); at += static_cast<size_t>(width)) {
      y.push_back(std::inner_product(x.view.ptr<float>(), x.view.ptr<float>() + width,
                                     rows.begin() + static_cast<ptrdiff_t>(at), 0.0F));
    }
    return y;
  }

  OwnedTensor x;
  Arena arena;
  Context ctx{.arena = &arena};
  Batch batch;
  UnitInputs inputs;
};

void expect_near(const std::vector<float>& found, const std::vector<float>& expected,
                 const char* what) {
  ASSERT_EQ(found.size(), expected.size()) << what;
  for (size_t i = 0; i < found.size(); ++i) {
    EXPECT_NEAR(found[i], expected[i], 1e-4F + 1e-4F * std::abs(expected[i])) << what << " " << i;
  }
}

// With the factors of the token at hand the expanded rows give its queries, keys, values and gates.
TEST(LatentRows, GiveWhatTheAttentionComputesUpToTheFactorsOfItsNorms) {
  for (const Form form : kForms) {
    SCOPED_TRACE(static_cast<int>(form));
    LoadedModel teacher = make_teacher(form);
    OneToken token(*teacher.model, 7);
    const MixerParameters p = layer_parameters(*teacher.model, 0);
    const UnitSpec spec = *teacher.model->spec().layers[0].mixer();
    LatentScales scales(spec, p);
    scales.add(token.ctx, token.x.view);
    const AttentionWeights a =
        read_attention(*teacher.model, 0, find_graft("gated_delta_net"), scales.mean());
    auto* mixer = dynamic_cast<ScoredMixer*>(teacher.model->layer(0).mixer());
    ASSERT_NE(mixer, nullptr);
    const auto [q, k] = mixer->scored(token.ctx, token.x.view, token.inputs);
    for (const auto& [of_attention, rows] : {std::pair{q, &a.q}, std::pair{k, &a.k}}) {
      std::vector<float> expected;
      for (int64_t h = 0; h < kHeads; ++h) {
        const float* head = of_attention.ptr<float>() + h * (kNope + kRope);
        expected.insert(expected.end(), head + kNope, head + kNope + kRope);
        expected.insert(expected.end(), head, head + kNope);
      }
      expect_near(token.times(*rows), expected, rows == &a.q ? "q" : "k");
    }
    // One token attends to itself alone.
    const Tensor y = mixer->heads(token.ctx, token.x.view, token.inputs);
    std::vector<float> values = token.times(a.v);
    const std::vector<float> gates = token.times(a.gate);
    EXPECT_EQ(gates.size(), form == Form::kGated ? values.size() : 0);
    for (size_t i = 0; i < gates.size(); ++i) {
      values[i] /= 1.0F + std::exp(-gates[i]);
    }
    expect_near(values, {y.ptr<float>(), y.ptr<float>() + y.numel()}, "v");
    EXPECT_EQ(a.o, elements_of(p.at("o_proj.weight")->tensor));
  }
}

// Without a measurement the factors are those of inputs whose channels are independent.
TEST(LatentRows, WithoutDataTheNormsAreThoseOfIndependentChannels) {
  LoadedModel teacher = make_teacher(Form::kQueryLatent);
  const MixerParameters p = layer_parameters(*teacher.model, 0);
  const UnitSpec spec = *teacher.model->spec().layers[0].mixer();
  const Norm& norm = *teacher.model->layer(0).first_norm();
  const float* weight = norm.weight.tensor.ptr<float>();
  OwnedTensor x(Dtype::kF32, {4000, teacher.model->spec().width});
  Rng rng(2, 2);
  for (int64_t i = 0; i < x.view.numel(); ++i) {
    x.view.ptr<float>()[i] = weight[i % x.view.dim(1)] * rng.normal();
  }
  Workspace workspace;
  Context ctx = workspace.context();
  LatentScales scales(spec, p);
  scales.add(ctx, x.view);
  std::vector<float> channels(weight, weight + x.view.dim(1));
  const LatentScale white = white_latents(spec, p, channels);
  EXPECT_NEAR(white.q / scales.mean().q, 1.0, 0.15);
  EXPECT_NEAR(white.kv / scales.mean().kv, 1.0, 0.15);
  // That is what a graft reads.
  const Graft& graft = find_graft("mamba2");
  EXPECT_EQ(read_attention(*teacher.model, 0, graft).v,
            read_attention(*teacher.model, 0, graft, white).v);
}

TEST(LatentRows, AMixerWhoseKeysAreAsWideAsValuesTakesTheDimsWithoutPositions) {
  LoadedModel teacher = make_teacher(Form::kPlain);
  const AttentionWeights whole = read_attention(*teacher.model, 0, find_graft("mamba2"));
  const AttentionWeights cut = read_attention(*teacher.model, 0, find_graft("mamba"));
  EXPECT_EQ(cut.shape.dim, kValue);
  const int64_t width = whole.shape.width;
  for (int64_t row = 0; row < kHeads * kValue; ++row) {
    const int64_t from = row / kValue * (kNope + kRope) + kRope + kNope - kValue + row % kValue;
    for (const auto& [a, b] : {std::pair{&cut.q, &whole.q}, std::pair{&cut.k, &whole.k}}) {
      EXPECT_TRUE(std::equal(a->begin() + row * width, a->begin() + (row + 1) * width,
                             b->begin() + from * width))
          << row;
    }
  }
}

TEST(LatentGraft, AWindowLongerThanTheTextChangesNothing) {
  for (const Form form : kForms) {
    SCOPED_TRACE(static_cast<int>(form));
    LoadedModel teacher = make_teacher(form);
    const auto windowed = [&](int64_t window, int64_t sinks, const char* mixer = "sliding_window") {
      return convert(*teacher.model, *teacher.model, {0, 2},
                     {.mixer = mixer, .window = window, .sinks = sinks}, 7);
    };
    const std::vector<float> expected = logits(*teacher.model);
    EXPECT_EQ(layer_map(windowed(64, 0).model->spec()), "WLW");
    EXPECT_EQ(logits(*windowed(64, 0).model), expected);
    EXPECT_EQ(logits(*windowed(2, 64).model), expected);
    EXPECT_NE(logits(*windowed(2, 0).model), expected);
    EXPECT_NE(logits(*windowed(2, 3).model), logits(*windowed(2, 0).model));
    EXPECT_EQ(layer_map(windowed(64, 0, "parallel").model->spec()), "PLP");
  }
  LoadedModel teacher = make_teacher(Form::kPlain);
  EXPECT_EQ(error_of([&] {
              graft_spec(latent_mixer(Form::kPlain), 16,
                         {.mixer = "sliding_window", .sink_logits = true});
            }),
            "sliding_window: a window on latents has no sinks' scores; leave sink_logits out");
}

struct Start {
  const char* name;
  GraftOptions options;
  bool takes_gates;
};

std::vector<Start> starts() {
  return {{"mamba", {.mixer = "mamba"}, true},
          {"mamba, faithful", {.mixer = "mamba", .faithful = true}, false},
          {"mamba, random", {.mixer = "mamba", .from_attention = false}, true},
          {"mamba2", {.mixer = "mamba2"}, true},
          {"gated_delta_net", {.mixer = "gated_delta_net"}, true},
          {"gated_delta_net, no positions", {.mixer = "gated_delta_net", .rope = false}, true},
          {"gated_delta_net, faithful", {.mixer = "gated_delta_net", .faithful = true}, false},
          {"kimi_delta", {.mixer = "kimi_delta"}, true},
          {"lightning", {.mixer = "lightning"}, true},
          {"parallel", {.mixer = "parallel"}, true},
          {"parallel, mamba2", {.mixer = "parallel", .recurrent = "mamba2"}, true},
          {"parallel, kimi_delta", {.mixer = "parallel", .recurrent = "kimi_delta"}, true}};
}

TEST(LatentGraft, EveryStartStandsInItsPlace) {
  for (const Form form : kForms) {
    LoadedModel teacher = make_teacher(form);
    for (const Start& start : starts()) {
      SCOPED_TRACE(start.name);
      const auto made = [&] {
        return convert(*teacher.model, *teacher.model, {1}, start.options, 7);
      };
      if (form == Form::kGated && !start.takes_gates) {
        EXPECT_THAT(error_of(made), AnyOf(HasSubstr("whose output has a gate"),
                                          HasSubstr("the gate of an attention's output")));
        continue;
      }
      LoadedModel hybrid = made();
      const std::vector<float> out = logits(*hybrid.model);
      EXPECT_TRUE(std::all_of(out.begin(), out.end(), [](float x) { return std::isfinite(x); }));
      EXPECT_NE(out, logits(*teacher.model));
      const UnitSpec& mixer = *hybrid.model->spec().layers[1].mixer();
      const bool turns =
          mixer.options.flag("", "rope", false) || mixer.options.flag("", "recurrent.rope", false);
      EXPECT_EQ(turns, start.options.rope && !start.options.faithful && mixer.kind != "mamba" &&
                           mixer.kind != "mamba2" && start.options.recurrent != "mamba2");
    }
  }
}

TEST(LatentGraft, CalibrationLowersTheErrorOnDocumentsItHasNotSeen) {
  Progress::silence(true);
  const auto source = testing::copy_task(7);
  const auto others = testing::copy_task(8);
  for (const Graft& graft : grafts()) {
    SCOPED_TRACE(graft.mixer);
    LoadedModel teacher = make_teacher(Form::kQueryLatent);
    GraftOptions options{.mixer = graft.mixer};
    options.calibrate = 24;
    const CalibrationData data(*source, *others, false, options);
    std::vector<LayerCalibration> found;
    convert(*teacher.model, *teacher.model, {0, 2}, options, 1, true, &data, &found);
    for (const LayerCalibration& layer : found) {
      EXPECT_EQ(layer.heads.size(), static_cast<size_t>(kHeads));
      if (graft.calibrate != nullptr) {
        EXPECT_LT(layer.calibrated.error, layer.start.error);
        EXPECT_GT(layer.calibrated.explained, layer.start.explained);
      }
    }
  }
  Progress::silence(false);
}

// Scores ask for hybrids of a latent teacher as of any other.
TEST(LatentGraft, LayersAreScoredByEveryMethod) {
  Progress::silence(true);
  LoadedModel teacher = make_teacher(Form::kIndexed);
  const auto source = testing::copy_task();
  HeldOut documents{*source, 4, 48};
  MixerBank bank(*teacher.model);
  bank.add("student",
           convert(*teacher.model, *teacher.model, {0, 1, 2}, {.mixer = "kimi_delta"}, 3, true),
           "student");
  for (const ScoreMethod method :
       {ScoreMethod::kLeaveMixerOut, ScoreMethod::kLeaveBlockOut, ScoreMethod::kMixerReplacement,
        ScoreMethod::kWindowSwap, ScoreMethod::kRestoreOne, ScoreMethod::kGates}) {
    SCOPED_TRACE(score_method_name(method));
    ScoreOptions options;
    options.method = method;
    options.graft.mixer = method == ScoreMethod::kWindowSwap ? "sliding_window" : "gated_delta_net";
    options.graft.window = method == ScoreMethod::kWindowSwap ? 3 : 0;
    options.probe = testing::tiny_config(2);
    options.probe.loss = {};
    options.probe.loss.reverse_kl = 1.0F;
    ScoreData data;
    data.train = source.get();
    data.documents = &documents;
    data.bank = &bank;
    const Importance scores = score_importance(*teacher.model, *teacher.model, options, data, {});
    ASSERT_EQ(scores.layers.size(), 3U);
    for (const LayerScore& s : scores.layers) {
      EXPECT_TRUE(std::isfinite(s.score) && s.score != 0.0) << s.layer;
    }
  }
  Progress::silence(false);
}

TEST(LatentGraft, ASupernetKeepsTheAttentionByItsOwnName) {
  LoadedModel teacher = make_teacher(Form::kPlain);
  MixerBank bank(*teacher.model);
  bank.add("delta",
           convert(*teacher.model, *teacher.model, {0, 2}, {.mixer = "gated_delta_net"}, 3, true),
           "delta");
  LoadedModel supernet = bank.supernet();
  EXPECT_EQ(attention_label(supernet.model->spec()), "latent_attention");
  LoadedModel attention = attention_of(*supernet.model, "it");
  EXPECT_EQ(testing::all_weights(*attention.model), testing::all_weights(*teacher.model));
  const MixerBank again = bank_of(*supernet.model, attention, "it");
  EXPECT_EQ(again.kinds(), bank.kinds());
  EXPECT_EQ(testing::all_weights(*again.build({1, 0, 1}).model),
            testing::all_weights(*bank.build({1, 0, 1}).model));
}

// Every mixer, through a cache cut in many ways, on every device there is.
TEST(LatentGraft, ACacheInPiecesGivesWhatTheWholeGives) {
  const LoadedModel teacher = load_model(std::string(kSourceDir) + "/tests/fixtures/deepseek_v3");
  std::vector<int32_t> text(40);
  for (size_t i = 0; i < text.size(); ++i) {
    text[i] = static_cast<int32_t>((5 + i * i * 7) % 384);
  }
  for (const Graft& graft : grafts()) {
    SCOPED_TRACE(graft.mixer);
    GraftOptions options{.mixer = graft.mixer};
    if (options.mixer == "sliding_window" || options.mixer == "parallel") {
      options.window = 6;
      options.sinks = 2;
    }
    LoadedModel hybrid = convert(*teacher.model, *teacher.model, {1, 2}, options, 7);
    const std::vector<float> expected = logits(*hybrid.model);
    for (const Device device : {Device{}, Device{Device::kCuda}}) {
      if (device.kind == Device::kCuda && cuda_devices() == 0) {
        continue;
      }
      hybrid.weights.move_to(*hybrid.model, device);
      for (const VerifyRow& row : verify_cached(*hybrid.model, {text}).rows) {
        EXPECT_LT(row.kl, 1e-8) << device.describe() << ", " << row.way;
      }
      const std::vector<float> found = logits(*hybrid.model);
      for (size_t i = 0; i < found.size(); ++i) {
        ASSERT_NEAR(found[i], expected[i], 1e-3) << device.describe();
      }
    }
  }
}

// Nothing of a conversion touches what a checkpoint keeps beside the model.
TEST(LatentGraft, ConversionsCarryWhatTheCheckpointKeeps) {
  ModelSpec spec = testing::tiny_spec({latent_mixer(Form::kPlain), latent_mixer(Form::kPlain)});
  spec.family = "deepseek_v3";
  spec.rope.dim = kRope;
  spec.kept = {"deepseek_v3", 1, "", std::make_shared<KeptTensors>()};
  LoadedModel teacher = fresh_model(spec, 5);
  MixerBank bank(*teacher.model);
  bank.add("delta",
           convert(*teacher.model, *teacher.model, {0}, {.mixer = "gated_delta_net"}, 3, true),
           "delta");
  for (const ModelSpec& made :
       {bank.spec({1, 0}), bank.build({1, 0}).model->spec(), bank.supernet().model->spec(),
        convert_spec(spec, spec, {1}, {.mixer = "mamba"})}) {
    EXPECT_EQ(made.kept.tensors, spec.kept.tensors);
    EXPECT_TRUE(kept_is_stale(made));
  }
}

double divergence(const HeldOut& documents, Model& student, Model& teacher) {
  const LossSums sums = total(documents.measure(student, &teacher));
  return sums.reverse_kl / static_cast<double>(sums.tokens);
}

// From a checkpoint of DeepSeek-V3 to a hybrid that distillation brings nearer to it.
TEST(LatentGraft, ADeepseekModelIsConvertedAndDistilled) {
  Progress::silence(true);
  LoadedModel teacher = load_model(std::string(kSourceDir) + "/tests/fixtures/deepseek_v3");
  const auto source = testing::copy_task();
  const HeldOut documents(*source, 8, 48, 1000);
  for (const char* mixer : {"gated_delta_net", "sliding_window"}) {
    SCOPED_TRACE(mixer);
    const GraftOptions options{.mixer = mixer,
                               .window = std::string(mixer) == "sliding_window" ? 2 : 0};
    LoadedModel student = convert(*teacher.model, *teacher.model, {1, 3}, options, 7);
    const double started = divergence(documents, *student.model, *teacher.model);
    double left = started;
    for (const Objective objective : {Objective::kAlign, Objective::kEndToEnd}) {
      TrainConfig config = fit_config(24, {1, 3}, 1);
      config.objective = objective;
      config.sequence_length = 128;
      config.schedule.peak = objective == Objective::kAlign ? 3e-3 : 1e-3;
      if (objective == Objective::kEndToEnd) {
        config.align = {};
        config.loss.reverse_kl = 1.0F;
      }
      Trainer trainer(*student.model, student.weights, config, *source, teacher.model.get());
      while (!trainer.finished()) {
        trainer.step();
      }
      student.weights.set_trainable(*student.model, nullptr);
      const double now = divergence(documents, *student.model, *teacher.model);
      EXPECT_LT(now, left);
      left = now;
    }
    EXPECT_LT(left, 0.85 * started);
  }
  Progress::silence(false);
}

}  // namespace
}  // namespace cambium
