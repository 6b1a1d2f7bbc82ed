// Supernets made of banks, and banks made of supernets.
#include <gmock/gmock.h>

#include "base/test_folder.h"
#include "base/testing.h"
#include "hybrid/graft.h"
#include "hybrid/mixer_bank.h"
#include "tensor/copy.h"
#include "train/testing.h"

namespace cambium {
namespace {

using testing::all_weights;
using ::testing::ElementsAre;
using testing::error_of;
using ::testing::HasSubstr;

constexpr const char* kDelta = "gated_delta_net";
constexpr const char* kWindow = "sliding_window";

std::vector<float> logits_of(Model& model) {
  Arena arena;
  Context ctx{.arena = &arena};
  Batch batch;
  batch.add(std::vector<int32_t>{5, 9, 20, 3, 7, 12, 3, 4});
  return elements_of(model.logits(ctx, model.forward(ctx, batch)));
}

ModelSpec read_config_of(const ModelSpec& spec) {
  const Family& cambium = find_family("cambium");
  return cambium.read_config(cambium.write_config(spec), "here");
}

class SupernetOfBanks : public ::testing::Test {
 protected:
  SupernetOfBanks() {
    bank_.add(kDelta, made(kDelta, {0, 1, 3}), "delta");
    bank_.add(kWindow, made(kWindow, {0, 3}), "window");
  }

  LoadedModel made(const char* mixer, const std::vector<int64_t>& layers) {
    return convert(*teacher_.model, *teacher_.model, layers, {.mixer = mixer}, 7, true);
  }

  const LoadedModel teacher_ = fresh_model(testing::tiny_attention(4), 3);
  MixerBank bank_{*teacher_.model};
};

TEST_F(SupernetOfBanks, HoldsEveryHybridOfTheBank) {
  LoadedModel supernet = bank_.supernet();
  const ModelSpec& spec = supernet.model->spec();
  EXPECT_THAT(choice_layers(spec), ElementsAre(0, 1, 3));
  EXPECT_THAT(mixer_labels(spec), ElementsAre("attention", kDelta, kWindow));
  EXPECT_EQ(spec.layers[1].all_mixers().size(), 2U);
  EXPECT_EQ(spec.layers[2].all_mixers().size(), 1U);
  EXPECT_EQ(converted_layers(spec, &teacher_.model->spec()).size(), 3U);
  EXPECT_EQ(converted_mixers(spec, teacher_.model->spec()).size(), 5U);
  EXPECT_EQ(all_weights(*attention_of(*supernet.model, "it").model), all_weights(*teacher_.model));
  struct Row {
    Choices choices;
    ActiveUnits active;
  };
  for (const Row& row : {Row{{1, 0, 0, 2}, {1, 0, -1, 2}}, Row{{2, 1, 0, 1}, {2, 1, -1, 1}}}) {
    LoadedModel by_bank = bank_.build(row.choices);
    LoadedModel by_supernet = view_hybrid(*supernet.model, row.active);
    EXPECT_EQ(by_bank.model->spec(), by_supernet.model->spec());
    EXPECT_EQ(all_weights(*by_bank.model), all_weights(*by_supernet.model));
  }
}

TEST_F(SupernetOfBanks, IsABankAgain) {
  LoadedModel supernet = bank_.supernet();
  LoadedModel attention = attention_of(*supernet.model, "it");
  const MixerBank again = bank_of(*supernet.model, attention, "it");
  EXPECT_EQ(again.kinds(), bank_.kinds());
  EXPECT_EQ(again.layers(), bank_.layers());
  for (int64_t place = 0; place < 4; ++place) {
    for (int kind = 0; kind < 3; ++kind) {
      EXPECT_EQ(again.has(place, kind), bank_.has(place, kind)) << place << " " << kind;
    }
  }
  EXPECT_EQ(all_weights(*again.build({2, 1, 0, 1}).model),
            all_weights(*bank_.build({2, 1, 0, 1}).model));
  EXPECT_THAT(error_of([&] { attention_of(*teacher_.model, "it"); }),
              HasSubstr("it: expected a supernet, got a plain model (AAAA)"));
}

// A mixer joins a supernet: what was there stays, bit for bit, presets included, and a thin one has
// what its presets use.
TEST_F(SupernetOfBanks, TakesAnotherMixer) {
  LoadedModel supernet = bank_.supernet([](ModelSpec& spec) {
    put_preset(spec, {"old", uniform_units(spec, kDelta)});
    spec.layers[0].choice()->active = 1;
  });
  const LoadedModel made_later =
      convert(*teacher_.model, *teacher_.model, {0, 3}, {.mixer = kWindow, .window = 3}, 8, true);
  const auto narrow = [](ModelSpec& spec) {
    put_preset(spec, {"narrow", uniform_units(spec, "narrow")});
  };
  LoadedModel more = add_mixer(*supernet.model, *made_later.model, {0, 3}, "narrow", narrow);
  const ModelSpec& spec = more.model->spec();
  EXPECT_THAT(mixer_labels(spec), ElementsAre("attention", kDelta, kWindow, "narrow"));
  EXPECT_EQ(spec.layers[0].all_mixers().size(), 4U);
  EXPECT_EQ(spec.layers[1].all_mixers().size(), 2U);
  EXPECT_EQ(spec.layers[0].choice()->active, 1);
  ASSERT_EQ(spec.presets.size(), 2U);
  EXPECT_EQ(spec.presets[0].active, supernet.model->spec().presets[0].active);
  EXPECT_THAT(spec.presets[1].active, ElementsAre(3, 0, -1, 3));
  for (const Preset& preset : supernet.model->spec().presets) {
    EXPECT_EQ(all_weights(*view_hybrid(*more.model, preset.active).model),
              all_weights(*view_hybrid(*supernet.model, preset.active).model));
  }
  EXPECT_EQ(all_weights(*view_hybrid(*more.model, spec.presets[1].active).model),
            all_weights(*made_later.model));
  const ModelSpec thin = thinned(spec, "it");
  EXPECT_THAT(mixer_labels(thin), ElementsAre(kDelta, "narrow", "attention"));
  EXPECT_THAT(error_of([&] {
                add_mixer(*supernet.model, *made_later.model, {0, 3}, kWindow);
              }),
              HasSubstr("layer 0 has a mixer 'sliding_window' already; give the new one a name: "
                        "NAME=sliding_window"));
  EXPECT_THAT(error_of([&] { add_mixer(*supernet.model, *made_later.model, {2}, "narrow"); }),
              HasSubstr("layer 2 has no choice"));
}

/// Layers of attention with Mamba-2 beside it, as Falcon-H1's.
ModelSpec attention_beside_mamba(int layers) {
  const UnitSpec mamba{"mamba2",
                       {{"heads", int64_t{2}},
                        {"head_dim", int64_t{8}},
                        {"state", int64_t{4}},
                        {"b_heads", int64_t{1}}},
                       0.5F,
                       "mamba"};
  ModelSpec spec = testing::tiny_attention(layers);
  for (LayerSpec& layer : spec.layers) {
    layer.mixer()->name = "self_attn";
    layer.mixer()->out = 0.75F;
    layer.branches[0].units.push_back(mamba);
  }
  return spec;
}

// What stands beside the attention runs with each choice, under its own name; a plain hybrid has
// the mixer under the attention's name and factor.
TEST(SupernetBesideAnotherMixer, ChoosesInPlaceOfTheAttention) {
  const LoadedModel teacher = fresh_model(attention_beside_mamba(3), 3);
  const auto made = [&](const char* mixer, const std::vector<int64_t>& layers) {
    return convert(*teacher.model, *teacher.model, layers, {.mixer = mixer}, 7, true);
  };
  MixerBank bank(*teacher.model);
  bank.add(kDelta, made(kDelta, {0, 2}), "delta");
  bank.add(kWindow, made(kWindow, {2}), "window");
  LoadedModel supernet = bank.supernet([](ModelSpec& spec) {
    put_preset(spec, {"fast", uniform_units(spec, kDelta)});
    put_preset(spec, {"mixed", {0, -1, 2}});
  });
  const ModelSpec& spec = supernet.model->spec();
  EXPECT_EQ(layer_map(spec), "(A2)(A2)(A2)");
  EXPECT_THAT(mixer_labels(spec), ElementsAre("attention", kDelta, kWindow));
  EXPECT_THAT(active_labels(spec, spec.presets[1].active), ElementsAre("attention", "", kWindow));
  EXPECT_EQ(layer_map(unwrapped(spec, spec.presets[1].active)), "(A2)(A2)(W2)");
  EXPECT_EQ(resting_units(spec), (std::set<std::string>{"layers.0.mixer_gated_delta_net",
                                                        "layers.2.mixer_gated_delta_net",
                                                        "layers.2.mixer_sliding_window"}));
  EXPECT_EQ(read_config_of(spec), spec);
  for (const auto& [choices, active] :
       {std::pair{Choices{0, 0, 0}, ActiveUnits{0, -1, 0}}, {{1, 0, 2}, {1, -1, 2}}}) {
    LoadedModel by_bank = bank.build(choices);
    LoadedModel by_supernet = view_hybrid(*supernet.model, active);
    EXPECT_EQ(by_bank.model->spec().layers, by_supernet.model->spec().layers);
    EXPECT_EQ(all_weights(*by_bank.model), all_weights(*by_supernet.model));
    supernet.model->activate(active);
    EXPECT_EQ(logits_of(*supernet.model), logits_of(*by_bank.model));
    EXPECT_EQ(supernet.model->state_layouts().size(), by_bank.model->state_layouts().size());
  }

  // Another mixer joins before what stands beside, and leaves again.
  LoadedModel more = add_mixer(*supernet.model, *made("lightning", {0}).model, {0}, "lightning",
                               [](ModelSpec& wider) {
                                 put_preset(wider, {"light", uniform_units(wider, "lightning")});
                               });
  EXPECT_EQ(layer_map(unwrapped(more.model->spec(), more.model->spec().presets[2].active)),
            "(N2)(A2)(A2)");
  EXPECT_EQ(all_weights(*view_hybrid(*more.model, spec.presets[0].active).model),
            all_weights(*view_hybrid(*supernet.model, spec.presets[0].active).model));
  ModelSpec without = more.model->spec();
  std::erase_if(without.presets, [](const Preset& preset) { return preset.name != "fast"; });
  without = thinned(without, "it");
  EXPECT_EQ(layer_map(unwrapped(without, without.presets[0].active)), "(G2)(A2)(G2)");
  EXPECT_EQ(without.layers[0].choice()->choices(), 1U);

  LayerSpec bare = spec.layers[2];
  take_mixer_out(bare);
  EXPECT_EQ(bare.branches[0].units, std::vector<UnitSpec>({spec.layers[2].all_mixers().back()}));
  EXPECT_EQ(bare.choice(), nullptr);
}

// Aligned and distilled with the new mixers alone to learn: those that were drawn do, attention and
// what stands beside it stay the teacher's, and so does the placement of attention alone.
TEST(SupernetBesideAnotherMixer, LearnsItsNewMixers) {
  LoadedModel teacher = fresh_model(attention_beside_mamba(2), 3);
  MixerBank bank(*teacher.model);
  bank.add(kDelta, convert(*teacher.model, *teacher.model, {0, 1}, {.mixer = kDelta}, 7, true),
           "delta");
  ModelSpec spec = bank.supernet().model->spec();
  put_preset(spec, {"fast", uniform_units(spec, kDelta)});
  LoadedModel student = fresh_model(spec, 1);
  const std::map<std::string, Tensor> from = tensors_of(*bank.supernet().model);
  student.model->visit(
      [&](const std::string& name, Parameter& p) { copy_values(p.tensor, from.at(name)); });
  const auto data = testing::copy_task();
  for (const Objective objective : {Objective::kAlign, Objective::kEndToEnd}) {
    TrainConfig config = testing::tiny_config(6);
    config.objective = objective;
    config.trained = Trained::kConverted;
    config.align.layers = {0, 1};
    config.loss = {.cross_entropy = 0.0F, .reverse_kl = 1.0F};
    config.supernet.sampling = PlacementSampling::kUniform;
    Trainer trainer(*student.model, student.weights, config, *data, teacher.model.get());
    for (int step = 0; step < 6; ++step) {
      const StepReport report = trainer.step();
      EXPECT_EQ(report.align > 0.0, report.placement.find('G') != std::string::npos)
          << report.placement;
    }
  }
  EXPECT_EQ(all_weights(*attention_of(*student.model, "it").model), all_weights(*teacher.model));
  for (int layer = 0; layer < 2; ++layer) {
    const std::string name = fmt::format("layers.{}.mixer_gated_delta_net.in_proj.weight", layer);
    EXPECT_NE(elements_of(tensors_of(*student.model).at(name)), elements_of(from.at(name)));
  }
  // What was learned is in the folder, whole and as the preset.
  const TestFolder folder;
  save_model(*student.model, folder.at("supernet"), {});
  LoadedModel fast = load_model(folder.at("supernet"), {.preset = "fast"});
  EXPECT_EQ(layer_map(fast.model->spec()), "(G2)(G2)");
  EXPECT_EQ(logits_of(*fast.model),
            logits_of(*view_hybrid(*student.model, uniform_units(spec, kDelta)).model));
}

TEST(SupernetBesideAnotherMixer, ChoosesInPlaceOfAFirstUnitAlone) {
  ModelSpec spec = attention_beside_mamba(1);
  std::swap(spec.layers[0].branches[0].units[0], spec.layers[0].branches[1].units[0]);
  EXPECT_THAT(error_of([&] { add_choice(spec, 0, {testing::attention_mixer()}, 0); }),
              HasSubstr("layer 0: expected a branch whose first unit is a mixer"));
  spec = attention_beside_mamba(1);
  for (const auto& [active, beside] : {std::pair{-1, 1}, {1, 1}, {0, 2}, {0, -1}}) {
    spec.layers[0].branches[0].active = active;
    spec.layers[0].branches[0].beside = beside;
    EXPECT_THAT(error_of([&] { const Model model(spec); }),
                HasSubstr("expected as many beside a choice as stand after it"))
        << active << " " << beside;
  }
}

// Options of several mixers: each takes those it knows.
TEST(GraftOptions, AreSharedOut) {
  GraftOptions both{.mixer = kDelta, .beside = {kWindow}, .window = 64, .rope = false};
  const std::vector<GraftOptions> grafts = grafts_of(both, "convert");
  ASSERT_EQ(grafts.size(), 2U);
  EXPECT_EQ(grafts[0], (GraftOptions{.mixer = kDelta, .rope = false}));
  EXPECT_EQ(grafts[1], (GraftOptions{.mixer = kWindow, .window = 64}));
  both.state = 8;
  EXPECT_THAT(error_of([&] { grafts_of(both, "convert"); }),
              HasSubstr("state belongs to mamba, not to gated_delta_net"));
}

}  // namespace
}  // namespace cambium
