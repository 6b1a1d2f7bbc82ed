// Supernets made of banks, and banks made of supernets.
#include <gmock/gmock.h>

#include "base/testing.h"
#include "hybrid/graft.h"
#include "hybrid/mixer_bank.h"
#include "train/testing.h"

namespace cambium {
namespace {

using testing::all_weights;
using ::testing::ElementsAre;
using testing::error_of;
using ::testing::HasSubstr;

constexpr const char* kDelta = "gated_delta_net";
constexpr const char* kWindow = "sliding_window";

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

TEST_F(SupernetOfBanks, RefusesMixersWithNames) {
  ModelSpec spec = testing::tiny_attention(2);
  spec.layers[0].mixer()->name = "own";
  const LoadedModel teacher = fresh_model(spec, 3);
  MixerBank bank(*teacher.model);
  bank.add(kDelta, convert(*teacher.model, *teacher.model, {0}, {.mixer = kDelta}, 7, true), "d");
  EXPECT_THAT(error_of([&] { bank.supernet(); }), HasSubstr("layer 0: its attention stands"));
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
