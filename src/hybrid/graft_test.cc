#include "hybrid/graft.h"

#include <gmock/gmock.h>
#include <algorithm>

#include <cmath>
#include <limits>
#include <numeric>

#include "base/random.h"
#include "base/test_folder.h"
#include "base/testing.h"
#include "hybrid/graft_testing.h"
#include "hybrid/grafts/graft_table.h"
#include "train/testing.h"

namespace cambium {
namespace {

using namespace graft_testing;  // NOLINT(google-build-using-namespace)

TEST(Graft, AWindowLongerThanTheTextChangesNothing) {
  for (const Biases biases : kAllBiases) {
    LoadedModel teacher = make_teacher(teacher_spec(biases));
    LoadedModel hybrid = convert(*teacher.model, *teacher.model, {1, 4},
                                 {.mixer = "sliding_window", .window = 64}, 7);
    EXPECT_EQ(layer_map(hybrid.model->spec()), "AWAAWA");
    EXPECT_EQ(logits(*hybrid.model), logits(*teacher.model));
  }
}

TEST(Graft, AWindowIsNeverWiderThanTheAttentionsOwn) {
  UnitSpec attention = *teacher_spec().layers[0].mixer();
  attention.options.set("window", int64_t{32});
  for (const auto& [asked, expected] : {std::pair<int64_t, int64_t>{0, 32}, {64, 32}, {8, 8}}) {
    for (const char* mixer : {"sliding_window", "parallel"}) {
      const UnitSpec unit = graft_spec(attention, 24, {.mixer = mixer, .window = asked});
      EXPECT_EQ(unit.options.integer(mixer, "window", 0), expected) << mixer;
    }
  }
}

TEST(Graft, AWindowKeepsGatesSoftCapsAndSinksScores) {
  LoadedModel teacher = make_gated_teacher(true);
  LoadedModel hybrid =
      convert(*teacher.model, *teacher.model, {1, 4}, {.mixer = "sliding_window", .window = 64}, 7);
  EXPECT_EQ(logits(*hybrid.model), logits(*teacher.model));
  LoadedModel pair =
      convert(*teacher.model, *teacher.model, {1, 4}, {.mixer = "parallel", .window = 64}, 7);
  for (const char* name : {"q_proj.weight", "sinks"}) {
    const std::string full = std::string("layers.1.mixer.") + name;
    Parameter& from = parameter(*teacher.model, full);
    Parameter& to = parameter(*pair.model, full);
    EXPECT_TRUE(std::equal(from.tensor.ptr<float>(), from.tensor.ptr<float>() + from.numel(),
                           to.tensor.ptr<float>()))
        << name;
  }
}

// The window gives what the attention gave and the recurrence not yet.
TEST(Graft, AWindowBesideARecurrenceBeginsWithMostOfTheSum) {
  LoadedModel teacher = make_teacher(teacher_spec());
  const std::vector<float> whole = logits(*teacher.model);
  double before = std::numeric_limits<double>::infinity();
  for (const double share : {0.5, 0.9, 0.98, 0.998}) {
    LoadedModel pair = convert(*teacher.model, *teacher.model, {1, 4},
                               {.mixer = "parallel", .window = 64, .window_share = share}, 7);
    const double off = difference(whole, logits(*pair.model));
    EXPECT_LT(off, before) << share;
    EXPECT_GT(off, 0.0) << share;  // or nothing would teach it
    before = off;
    const Parameter& bias = parameter(*pair.model, "layers.1.mixer.gate_proj.bias");
    for (int64_t head = 0; head < bias.numel(); ++head) {
      EXPECT_NEAR(1.0 / (1.0 + std::exp(-bias.tensor.ptr<float>()[head])), share, 1e-6);
    }
  }
}

// A temperature is a factor of rows: what is grafted from them is what is grafted from attention
// whose rows had it.
TEST(Graft, ATemperatureGoesWithItsHeads) {
  for (const std::string of : {"query", "key"}) {
    ModelSpec spec = teacher_spec(Biases::kOfQkv);
    spec.family = "cambium";
    for (LayerSpec& layer : spec.layers) {
      layer.mixer()->options.set("temperature", of);
    }
    LoadedModel teacher = make_teacher(spec);
    LoadedModel scaled = make_teacher(teacher_spec(Biases::kOfQkv));
    Parameter& factors = parameter(*teacher.model, "layers.1.mixer.temperature");
    for (int64_t h = 0; h < factors.numel(); ++h) {
      factors.tensor.ptr<float>()[h] = 0.5F + static_cast<float>(h);
    }
    for (const char* which : {"_proj.weight", "_proj.bias"}) {
      Parameter& p = parameter(*scaled.model, "layers.1.mixer." + of.substr(0, 1) + which);
      for (int64_t i = 0; i < p.numel(); ++i) {
        p.tensor.ptr<float>()[i] *= factors.tensor.ptr<float>()[i * factors.numel() / p.numel()];
      }
    }
    for (const char* mixer : {"mamba", "mamba2", "sliding_window"}) {
      const GraftOptions options{.mixer = mixer};
      EXPECT_LT(
          difference(
              mixer_output(*convert(*teacher.model, *teacher.model, {1}, options, 7).model, 1),
              mixer_output(*convert(*scaled.model, *scaled.model, {1}, options, 7).model, 1)),
          1e-5)
          << of << " " << mixer;
    }
    const TestFolder folder;
    save_model(*teacher.model, folder.at("m"), {});
    const LoadedModel loaded = load_model(folder.at("m"));
    EXPECT_EQ(loaded.model->spec().layers, spec.layers);
    EXPECT_EQ(logits(*loaded.model), logits(*teacher.model));
  }
}

// Scores of sinks that a window gets change nearly nothing until they have learned.
TEST(Graft, NewScoresOfSinksStartQuiet) {
  LoadedModel teacher = make_teacher(teacher_spec());
  LoadedModel hybrid = convert(*teacher.model, *teacher.model, {1, 4},
                               {.mixer = "sliding_window", .window = 64, .sink_logits = true}, 7);
  const std::vector<float> expected = mixer_output(*teacher.model, 1);
  const double moved = difference(mixer_output(*hybrid.model, 1), expected);
  EXPECT_GT(moved, 0.0);
  EXPECT_LT(moved, 1e-2 * difference(expected, std::vector<float>(expected.size())));
}

TEST(Graft, SinksAreWhatTheWindowIsGivenBesides) {
  LoadedModel teacher = make_teacher(teacher_spec(kAllBiases[0]));
  const auto with_sinks = [&](int64_t sinks, const char* mixer = "sliding_window") {
    return convert(*teacher.model, *teacher.model, {1, 4},
                   {.mixer = mixer, .window = 2, .sinks = sinks}, 7);
  };
  LoadedModel none = with_sinks(0);
  LoadedModel some = with_sinks(3);
  const auto option = [](const LoadedModel& model) {
    return model.model->spec().layers[4].mixer()->options.integer("", "sinks", -1);
  };
  EXPECT_EQ(option(none), -1);  // written where they were asked for
  EXPECT_EQ(option(some), 3);
  EXPECT_NE(logits(*some.model), logits(*none.model));
  // More than the text has: nothing is out of sight.
  EXPECT_EQ(logits(*with_sinks(64).model), logits(*teacher.model));
  // The same of a window that has a recurrence beside it.
  LoadedModel beside = with_sinks(3, "parallel");
  EXPECT_EQ(option(beside), 3);
  EXPECT_EQ(option(with_sinks(0, "parallel")), -1);
  EXPECT_NE(logits(*beside.model), logits(*with_sinks(0, "parallel").model));
  LoadedModel wide =
      convert(*teacher.model, *teacher.model, {1, 4}, {.mixer = "parallel", .window = 64}, 7);
  EXPECT_EQ(logits(*with_sinks(64, "parallel").model), logits(*wide.model));
}

struct Start {
  const char* name;
  GraftOptions options;
};

// Every graft that fills a new mixer.
std::vector<Start> starts() {
  return {{"mamba", {.mixer = "mamba"}},
          {"mamba, a state narrower than half a head", {.mixer = "mamba", .state = 2}},
          {"mamba, faithful", {.mixer = "mamba", .faithful = true}},
          {"mamba2", {.mixer = "mamba2"}},
          {"gated_delta_net", {.mixer = "gated_delta_net"}},
          {"gated_delta_net, faithful", {.mixer = "gated_delta_net", .faithful = true}},
          {"kimi_delta", {.mixer = "kimi_delta"}},
          {"lightning", {.mixer = "lightning"}},
          {"parallel", {.mixer = "parallel"}},
          {"parallel, mamba2", {.mixer = "parallel", .recurrent = "mamba2"}},
          {"parallel, lightning", {.mixer = "parallel", .recurrent = "lightning"}}};
}

// A bias is the weight of an input that is always 1. Two teachers say the same attention both ways;
// what is grafted from them must say the same too. Only the first layer sees such an input: the
// embeddings are -1 and 1, with 1 first, and the norm keeps them.
TEST(Graft, ABiasStartsAsTheWeightOfAConstantInputDoes) {
  for (const bool normed : {false, true}) {
    for (const Start& start : starts()) {
      LoadedModel hybrids[2];
      for (const bool as_biases : {false, true}) {
        ModelSpec spec = teacher_spec(as_biases ? Biases::kOfQkv : Biases::kNone);
        spec.norm.eps = 0.0F;
        if (normed) {
          for (LayerSpec& layer : spec.layers) {
            layer.mixer()->options.set("qk_norm_eps", 1e-6);
          }
        }
        LoadedModel teacher = fresh_model(spec, 1);
        float* embed = parameter(*teacher.model, "embed.weight").tensor.ptr<float>();
        for (int64_t i = 0; i < spec.vocab * spec.width; ++i) {
          embed[i] = i % spec.width == 0 || embed[i] > 0.0F ? 1.0F : -1.0F;
        }
        for (const std::string which : {"q", "k", "v"}) {
          const std::string name = "layers.0.mixer." + which + "_proj";
          Parameter& weight = parameter(*teacher.model, name + ".weight");
          Rng random(5, static_cast<uint64_t>(which[0]));
          for (int64_t row = 0; row < weight.shape[0]; ++row) {
            const float bias = 2.0F * random.normal();
            weight.tensor.ptr<float>()[row * spec.width] = as_biases ? 0.0F : bias;
            if (as_biases) {
              parameter(*teacher.model, name + ".bias").tensor.ptr<float>()[row] = bias;
            }
          }
          if (normed && which != "v") {
            Parameter& norm = parameter(*teacher.model, "layers.0.mixer." + which + "_norm.weight");
            for (int64_t i = 0; i < norm.numel(); ++i) {
              norm.tensor.ptr<float>()[i] += 0.3F * random.normal();
            }
          }
        }
        LoadedModel& hybrid = hybrids[as_biases ? 1 : 0];
        hybrid = convert(*teacher.model, *teacher.model, {0}, start.options, 7);
        // A gate that starts closed would hide the rest.
        const std::string mixer = start.options.mixer;
        if (mixer == "kimi_delta" || mixer == "lightning" || mixer == "parallel") {
          continue;  // theirs are open
        }
        Parameter& in = parameter(*hybrid.model, "layers.0.mixer.in_proj.weight");
        const RowRange gate = rows_of(in, "z");
        std::fill_n(in.tensor.ptr<float>() + gate.begin * spec.width, gate.count * spec.width,
                    0.1F);
      }
      const std::vector<float> as_weights = mixer_output(*hybrids[0].model, 0);
      const std::vector<float> as_biases = mixer_output(*hybrids[1].model, 0);
      EXPECT_LT(difference(as_biases, as_weights), 1e-4) << start.name;
      EXPECT_GT(difference(as_weights, std::vector<float>(as_weights.size())), 1e-2) << start.name;
    }
  }
}

TEST(Graft, TheBiasOfTheOutputStays) {
  for (const Start& start : starts()) {
    LoadedModel teacher = make_teacher(teacher_spec(Biases::kOfAll));
    Parameter& bias = parameter(*teacher.model, "layers.0.mixer.o_proj.bias");
    LoadedModel with = convert(*teacher.model, *teacher.model, {0}, start.options, 7);
    const std::vector<float> before(bias.tensor.ptr<float>(), bias.tensor.ptr<float>() + 24);
    std::fill_n(bias.tensor.ptr<float>(), 24, 0.0F);
    LoadedModel without = convert(*teacher.model, *teacher.model, {0}, start.options, 7);
    std::vector<float> expected = mixer_output(*without.model, 0);
    for (size_t i = 0; i < expected.size(); ++i) {
      expected[i] += before[i % 24];
    }
    EXPECT_LT(difference(mixer_output(*with.model, 0), expected), 1e-6) << start.name;
  }
}

// A mixer asks for biases where the attention had them: what is made of other teachers stays as it
// was, down to the names in its configuration.
TEST(Graft, BiasesAreAskedForWhereTheAttentionHasThem) {
  for (const Start& start : starts()) {
    for (const Biases biases : kAllBiases) {
      const ModelSpec teacher = teacher_spec(biases);
      const UnitSpec unit = graft_spec(*teacher.layers[0].mixer(), teacher.width, start.options);
      const UnitSpec plain =
          graft_spec(*teacher_spec().layers[0].mixer(), teacher.width, start.options);
      UnitSpec expected = plain;
      const std::string mixer = start.options.mixer;
      const bool pair = mixer == "parallel";
      const std::string recurrent = !pair                             ? mixer
                                    : start.options.recurrent.empty() ? "gated_delta_net"
                                                                      : start.options.recurrent;
      const std::string prefix = pair ? "recurrent." : "";
      if (biases != Biases::kNone && pair) {
        expected.options.set("qkv_bias", true);
      }
      if (biases != Biases::kNone && recurrent != "mamba2") {
        expected.options.set(prefix + (recurrent == "mamba"       ? "in_bias"
                                       : recurrent == "lightning" ? "qkv_bias"
                                                                  : "conv_bias"),
                             true);
      }
      if (biases == Biases::kOfAll) {
        expected.options.set("out_bias", true);
      }
      EXPECT_TRUE(unit.options == expected.options) << start.name;
      EXPECT_FALSE(plain.options.has("in_bias") || plain.options.has("out_bias")) << start.name;
      EXPECT_EQ(plain.options.has("conv_bias"), mixer == "mamba") << start.name;
    }
  }
}

std::vector<std::pair<Graft, Biases>> graft_cases() {
  std::vector<std::pair<Graft, Biases>> cases;
  for (const Graft& graft : grafts()) {
    for (const Biases biases : kAllBiases) {
      cases.emplace_back(graft, biases);
    }
  }
  return cases;
}

TEST(Graft, EveryMixerGivesAFiniteModelThatCanBeSavedAndLoaded) {
  for (const auto& [graft, biases] : graft_cases()) {
    LoadedModel teacher = make_teacher(teacher_spec(biases));
    const char* mixer = graft.mixer;
    for (const bool faithful : {false, true}) {
      if (faithful && std::find(graft.options.begin(), graft.options.end(), "faithful") ==
                          graft.options.end()) {
        continue;  // refused: WrongRequestsAreNamed
      }
      for (const bool from_attention : {false, true}) {
        const GraftOptions options{
            .mixer = mixer, .from_attention = from_attention, .faithful = faithful};
        LoadedModel hybrid = convert(*teacher.model, *teacher.model, {0, 3, 5}, options, 7);
        const std::vector<float> direct = logits(*hybrid.model);
        for (const float x : direct) {
          ASSERT_TRUE(std::isfinite(x)) << mixer;
        }
        const TestFolder folder;
        const std::filesystem::path dir = std::filesystem::path(folder.path()) / "m";
        save_model(*hybrid.model, dir, {});
        LoadedModel loaded = load_model(dir);
        EXPECT_EQ(loaded.model->spec(), hybrid.model->spec()) << mixer;
        EXPECT_EQ(logits(*loaded.model), direct) << mixer;
      }
    }
  }
}

TEST(Graft, GatedTeachersAreConvertedSavedAndLoaded) {
  for (const Start& start : starts()) {
    if (start.options.faithful) {
      continue;  // refused: AGateThatHasNoPlaceIsRefused
    }
    LoadedModel teacher = make_gated_teacher(false);
    LoadedModel hybrid = convert(*teacher.model, *teacher.model, {0, 4}, start.options, 7);
    const TestFolder folder;
    save_model(*hybrid.model, folder.at("m"), {});
    const LoadedModel loaded = load_model(folder.at("m"));
    EXPECT_EQ(loaded.model->spec(), hybrid.model->spec()) << start.name;
    EXPECT_EQ(logits(*loaded.model), logits(*hybrid.model)) << start.name;
  }
}

/// Norms of outputs in place of inputs, norms of q and k over all heads, two rotations, GeGLU and
/// a soft cap of the logits.
ModelSpec post_norm_spec() {
  ModelSpec spec = teacher_spec();
  spec.family = "cambium";
  spec.logit_cap = 2.0F;
  spec.more_ropes = {{.theta = 500.0, .dim = 8}};
  for (size_t i = 0; i < spec.layers.size(); ++i) {
    LayerSpec& layer = spec.layers[i];
    layer.rope = i % 3 == 0 ? 1 : 0;
    for (BranchSpec& branch : layer.branches) {
      branch.out_norm = {NormKind::kZeroCentred, 1e-6F};
      branch.norm = {NormKind::kNone};
    }
    layer.mixer()->options.set("qk_norm_eps", 1e-6);
    layer.mixer()->options.set("qk_norm_over", "width");
    layer.branches[1].units[0].options.set("activation", "gelu_tanh");
  }
  return spec;
}

TEST(Graft, PostNormTeachersAreConvertedSavedAndDistilled) {
  for (const Graft& graft : grafts()) {
    LoadedModel teacher = make_teacher(post_norm_spec());
    LoadedModel hybrid =
        convert(*teacher.model, *teacher.model, {0, 4}, {.mixer = graft.mixer, .window = 0}, 7);
    const std::vector<float> direct = logits(*hybrid.model);
    EXPECT_TRUE(std::all_of(direct.begin(), direct.end(), [](float x) {
      return std::abs(x) <= 2.0F;
    })) << graft.mixer;
    const TestFolder folder;
    save_model(*hybrid.model, folder.at("m"), {});
    const LoadedModel loaded = load_model(folder.at("m"));
    EXPECT_EQ(loaded.model->spec(), hybrid.model->spec()) << graft.mixer;
    EXPECT_EQ(logits(*loaded.model), direct) << graft.mixer;
    if (std::string(graft.mixer) != "gated_delta_net") {
      continue;
    }
    TrainConfig config = testing::tiny_config(12);
    config.loss = {.reverse_kl = 1.0F};
    const auto data = testing::copy_task();
    Trainer trainer(*hybrid.model, hybrid.weights, config, *data, teacher.model.get());
    const TrainSummary summary = trainer.run();
    EXPECT_LT(summary.last_loss, 0.8 * summary.first_loss);
  }
}

// What a query head reads must come from its own key-value head, as in the attention: with all but
// one query head silenced, another key-value head's values can change nothing.
TEST(Graft, PairsHeadsAsGroupedQueryAttentionDid) {
  for (const char* mixer :
       {"mamba", "mamba2", "gated_delta_net", "kimi_delta", "lightning", "parallel"}) {
    for (int64_t head = 0; head < 4; ++head) {
      LoadedModel teacher = fresh_model(teacher_spec(), 1);
      float* o = parameter(*teacher.model, "layers.2.mixer.o_proj.weight").tensor.ptr<float>();
      for (int64_t row = 0; row < 24; ++row) {
        for (int64_t c = 0; c < 32; ++c) {
          o[row * 32 + c] *= c / 8 == head ? 1.0F : 0.0F;
        }
      }
      const GraftOptions options{.mixer = mixer};
      LoadedModel before = convert(*teacher.model, *teacher.model, {2}, options, 7);
      const std::vector<float> base = logits(*before.model);
      for (int64_t kv = 0; kv < 2; ++kv) {
        LoadedModel changed = fresh_model(teacher_spec(), 1);
        std::copy_n(o, 24 * 32,
                    parameter(*changed.model, "layers.2.mixer.o_proj.weight").tensor.ptr<float>());
        float* v = parameter(*changed.model, "layers.2.mixer.v_proj.weight").tensor.ptr<float>();
        for (int64_t i = 0; i < 8 * 24; ++i) {
          v[kv * 8 * 24 + i] += 0.5F;
        }
        LoadedModel after = convert(*changed.model, *changed.model, {2}, options, 7);
        const double moved = difference(logits(*after.model), base);
        if (kv == head / 2) {
          EXPECT_GT(moved, 1e-6) << mixer << " head " << head;
        } else {
          EXPECT_EQ(moved, 0.0) << mixer << " head " << head;
        }
      }
    }
  }
}

TEST(Graft, FaithfulRowsAreTheReleasedLayout) {
  LoadedModel teacher = fresh_model(teacher_spec(), 1);
  LoadedModel hybrid =
      convert(*teacher.model, *teacher.model, {2}, {.mixer = "mamba", .faithful = true}, 7);
  EXPECT_EQ(hybrid.model->spec().family, "apriel_h");
  const float* in = parameter(*hybrid.model, "layers.2.mixer.in_proj.weight").tensor.ptr<float>();
  const auto rows_equal = [&](int64_t first, const char* source, int64_t rows) {
    const float* from = parameter(*teacher.model, source).tensor.ptr<float>();
    return std::equal(from, from + rows * 24, in + first * 24);
  };
  // z 32 | x 16 | B 16 | C 32
  EXPECT_TRUE(rows_equal(32, "layers.2.mixer.v_proj.weight", 16));
  EXPECT_TRUE(rows_equal(48, "layers.2.mixer.k_proj.weight", 16));
  EXPECT_TRUE(rows_equal(64, "layers.2.mixer.q_proj.weight", 32));
  EXPECT_EQ(parameter(*hybrid.model, "layers.2.mixer.out_proj.weight").tensor.ptr<float>()[5],
            parameter(*teacher.model, "layers.2.mixer.o_proj.weight").tensor.ptr<float>()[5]);
}

// A released layout that cannot say all of the model is not chosen: what would be lost would only
// be missed when the result is saved.
TEST(Graft, TheReleasedLayoutIsChosenOnlyWhereItCanExpressTheModel) {
  const GraftOptions faithful{.mixer = "mamba", .faithful = true};
  const ModelSpec plain = teacher_spec();
  EXPECT_EQ(convert_spec(plain, plain, {2}, faithful).family, "apriel_h");
  EXPECT_EQ(convert_spec(plain, plain, {0, 1, 2, 3, 4, 5}, faithful).family, "cambium");
  ModelSpec normed = plain;
  for (LayerSpec& layer : normed.layers) {
    layer.mixer()->options.set("qk_norm_eps", 1e-6);
  }
  EXPECT_EQ(convert_spec(normed, normed, {2}, faithful).family, "cambium");
  const ModelSpec biased = teacher_spec(Biases::kOfQkv);
  const ModelSpec all_biased = teacher_spec(Biases::kOfAll);
  EXPECT_EQ(convert_spec(biased, biased, {2}, faithful).family, "cambium");
  EXPECT_EQ(convert_spec(all_biased, all_biased, {2}, faithful).family, "cambium");
  for (const ModelSpec& spec : {plain, normed, biased, all_biased}) {
    LoadedModel teacher = fresh_model(spec, 1);
    for (const std::vector<int64_t>& layers : {std::vector<int64_t>{2}, {0, 1, 2, 3, 4, 5}}) {
      LoadedModel hybrid = convert(*teacher.model, *teacher.model, layers, faithful, 7);
      const TestFolder folder;
      const std::filesystem::path dir = std::filesystem::path(folder.path()) / "m";
      save_model(*hybrid.model, dir, {});
      EXPECT_EQ(load_model(dir).model->spec(), hybrid.model->spec());
    }
  }
}

// Attention that does not turn its queries and keys gives way to a mixer that does not either; so
// does any where that is asked.
TEST(Graft, RotationFollowsTheAttention) {
  for (const char* mixer : {"gated_delta_net", "kimi_delta", "lightning"}) {
    UnitSpec attention = *teacher_spec().layers[0].mixer();
    const GraftOptions options{.mixer = mixer};
    EXPECT_TRUE(graft_spec(attention, 24, options).options.flag("", "rope", false)) << mixer;
    const GraftOptions without{.mixer = mixer, .rope = false};
    EXPECT_FALSE(graft_spec(attention, 24, without).options.flag("", "rope", true)) << mixer;
    attention.options.set("rope", false);
    EXPECT_FALSE(graft_spec(attention, 24, options).options.flag("", "rope", true)) << mixer;
  }
}

// The norms of q and k stay what they are, in the attention's own kind.
TEST(Graft, LightningKeepsTheNormsOfQueriesAndKeys) {
  ModelSpec spec = teacher_spec();
  Options& attention = spec.layers[2].mixer()->options;
  EXPECT_EQ(graft_spec(*spec.layers[2].mixer(), 24, {.mixer = "lightning"})
                .options.real("", "qk_norm_eps", 0.0),
            1e-6);
  attention.set("qk_norm_eps", 1e-4);
  attention.set("qk_norm", "zero_centred");
  LoadedModel teacher = fresh_model(spec, 1);
  float* norm = parameter(*teacher.model, "layers.2.mixer.k_norm.weight").tensor.ptr<float>();
  norm[3] = 0.5F;
  norm[5] = -1.0F;  // a factor of zero
  LoadedModel hybrid = convert(*teacher.model, *teacher.model, {2}, {.mixer = "lightning"}, 7);
  const Options& made = hybrid.model->spec().layers[2].mixer()->options;
  EXPECT_EQ(made.text("", "qk_norm"), "zero_centred");
  EXPECT_EQ(made.real("", "qk_norm_eps", 0.0), 1e-4);
  const Parameter& kept = parameter(*hybrid.model, "layers.2.mixer.k_norm.weight");
  EXPECT_TRUE(std::equal(norm, norm + 8, kept.tensor.ptr<float>()));
  const Parameter& rows = parameter(*hybrid.model, "layers.2.mixer.qkv_proj.weight");
  EXPECT_TRUE(std::equal(
      parameter(*teacher.model, "layers.2.mixer.k_proj.weight").tensor.ptr<float>(),
      parameter(*teacher.model, "layers.2.mixer.k_proj.weight").tensor.ptr<float>() + 16 * 24,
      rows.tensor.ptr<float>() + rows_of(rows, "k").begin * 24));
}

TEST(Graft, LaterStagesStartFromTheTeacherAndKeepTheHybrid) {
  LoadedModel teacher = fresh_model(teacher_spec(), 1);
  const GraftOptions options{.mixer = "mamba2"};
  LoadedModel first = convert(*teacher.model, *teacher.model, {1}, options, 7);
  // Training moved everything in the hybrid, layer 4's attention included.
  first.model->visit([](const std::string&, Parameter& p) {
    for (int64_t i = 0; i < p.numel(); ++i) {
      p.tensor.ptr<float>()[i] += 0.25F;
    }
  });
  LoadedModel second = convert(*first.model, *teacher.model, {4}, options, 7);
  LoadedModel direct = convert(*teacher.model, *teacher.model, {4}, options, 7);
  const auto value = [](LoadedModel& m, const char* name) {
    return parameter(*m.model, name).tensor.ptr<float>()[100];
  };
  EXPECT_EQ(value(second, "layers.4.mixer.in_proj.weight"),
            value(direct, "layers.4.mixer.in_proj.weight"));
  EXPECT_EQ(value(second, "layers.1.mixer.in_proj.weight"),
            value(first, "layers.1.mixer.in_proj.weight"));
  EXPECT_EQ(value(second, "layers.4.feed_forward.up.weight"),
            value(first, "layers.4.feed_forward.up.weight"));
}

TEST(Graft, SharingGivesTheSameModelWithoutTheMemory) {
  LoadedModel teacher = fresh_model(teacher_spec(), 1);
  const GraftOptions options{.mixer = "gated_delta_net"};
  LoadedModel whole = convert(*teacher.model, *teacher.model, {3}, options, 7);
  LoadedModel shared = convert(*teacher.model, *teacher.model, {3}, options, 7, true);
  EXPECT_EQ(logits(*whole.model), logits(*shared.model));
  EXPECT_LT(shared.weights.bytes(), whole.weights.bytes() / 4);
}

TEST(Graft, WindowsThatAreNotTrainedAreTheAttentionsOwnMemory) {
  LoadedModel plain = make_teacher(teacher_spec(Biases::kOfAll));
  LoadedModel gated = make_gated_teacher(true);
  for (LoadedModel* teacher : {&plain, &gated}) {
    LoadedModel copied = convert(*teacher->model, *teacher->model, {1, 2},
                                 {.mixer = "sliding_window", .window = 4, .sinks = 2}, 7);
    LoadedModel view = view_windows(*teacher->model, {1, 2}, 4, 2);
    EXPECT_EQ(layer_map(view.model->spec()), layer_map(copied.model->spec()));
    EXPECT_EQ(logits(*view.model), logits(*copied.model));
    EXPECT_NE(logits(*view.model), logits(*teacher->model));
    EXPECT_EQ(view.weights.bytes(), 0);
  }
  EXPECT_THAT(testing::message_of([&] { view_windows(*plain.model, {9}, 4, 0); }),
              ::testing::HasSubstr("layer 9 does not exist"));
}

TEST(Graft, LeavingOneOut) {
  LoadedModel teacher = fresh_model(teacher_spec(), 1);
  const std::vector<float> all = logits(*teacher.model);
  LoadedModel no_mixer = remove_layer(*teacher.model, 2, false);
  LoadedModel no_block = remove_layer(*teacher.model, 2, true);
  EXPECT_EQ(layer_map(no_block.model->spec()), "AA-AAA");
  EXPECT_GT(difference(logits(*no_mixer.model), all), 1e-6);
  EXPECT_GT(difference(logits(*no_block.model), logits(*no_mixer.model)), 1e-6);
  // Also where outputs are normed.
  LoadedModel normed = make_teacher(post_norm_spec());
  LoadedModel without = remove_layer(*normed.model, 2, false);
  EXPECT_GT(difference(logits(*without.model), logits(*normed.model)), 1e-6);
}

struct Wrong {
  std::vector<int64_t> layers;
  GraftOptions options;
  std::string message;
};

TEST(Graft, WrongRequestsAreNamed) {
  LoadedModel teacher = fresh_model(teacher_spec(), 1);
  LoadedModel hybrid = convert(*teacher.model, *teacher.model, {1}, {.mixer = "mamba"}, 7);
  const Wrong wrongs[] = {
      {{6}, {}, "layer 6 does not exist: the model has layers 0 to 5"},
      {{2, 2}, {}, "layer 2 is given twice"},
      {{1}, {}, "layer 1 has no attention to replace: its mixer is mamba"},
      {{2}, {.mixer = "mambo"}, "unknown mixer 'mambo'; did you mean 'mamba'?"},
      {{2}, {.mixer = "identity"}, "identity cannot take the place of attention"},
      {{2}, {.mixer = "mamba", .state = 5}, "expected the state to divide"},
      {{2},
       {.mixer = "mamba2", .faithful = true},
       "faithful belongs to mamba and gated_delta_net, not to mamba2"},
      {{2}, {.mixer = "sliding_window", .faithful = true}, "faithful belongs to"},
      {{2}, {.mixer = "gated_delta_net", .window = 7}, "window belongs to sliding_window"},
      {{2}, {.mixer = "mamba", .sinks = 4}, "sinks belongs to sliding_window and parallel"},
      {{2}, {.mixer = "sliding_window", .state = 7}, "state belongs to mamba"},
      {{2}, {.mixer = "kimi_delta", .faithful = true}, "faithful belongs to"},
      {{2}, {.mixer = "mamba2", .recurrent = "mamba2"}, "recurrent belongs to parallel"},
      {{2}, {.mixer = "lightning", .window_dropout = 0.2}, "window_dropout belongs to parallel"},
      {{2}, {.mixer = "parallel", .window_dropout = 1.2}, "expected window_dropout from 0 to 1"},
      {{2}, {.mixer = "lightning", .window_share = 0.5}, "window_share belongs to parallel"},
      {{2}, {.mixer = "parallel", .window_share = 0.0}, "expected window_share between 0 and 1"},
      {{2}, {.mixer = "parallel", .window_share = 1.0}, "expected window_share between 0 and 1"},
      {{2},
       {.mixer = "parallel", .recurrent = "kimi_delt"},
       "expected recurrent to be one of gated_delta_net, kimi_delta, mamba2, lightning, got "
       "'kimi_delt'; did you mean 'kimi_delta'?"},
      {{2},
       {.mixer = "sliding_window", .window = -5},
       "expected window, sinks and state of at least 0"},
      {{2},
       {.mixer = "sliding_window", .sinks = -1},
       "expected window, sinks and state of at least 0"},
  };
  for (const Wrong& wrong : wrongs) {
    const std::string message = testing::error_of(
        [&] { convert(*hybrid.model, *teacher.model, wrong.layers, wrong.options, 7); });
    EXPECT_NE(message.find(wrong.message), std::string::npos) << message;
  }
}

}  // namespace
}  // namespace cambium
