#include "hybrid/placement_search.h"

#include <gmock/gmock.h>

#include <cmath>
#include <nlohmann/json.hpp>

#include "base/file.h"
#include "base/progress.h"
#include "base/test_folder.h"
#include "base/testing.h"
#include "eval/problem_source.h"
#include "hybrid/graft.h"
#include "hybrid/placement_choice.h"
#include "hybrid/sealed.h"
#include "train/testing.h"

namespace cambium {
namespace {

namespace fs = std::filesystem;
using ::testing::HasSubstr;

/// Damage of 9 layers and two kinds that acts over two layers, and multiplies.
Measured planted(const Choices& c) {
  double sum = 0.0;
  for (size_t l = 0; l < c.size(); ++l) {
    const auto x = static_cast<double>(l);
    sum += c[l] == 0 ? 0.0 : 0.2 + 0.15 * std::sin(2.1 * x) + (c[l] == 2 ? 0.1 * std::cos(x) : 0.0);
    sum += l > 0 && c[l] != 0 && c[l - 1] != 0 ? 0.1 + 0.08 * std::sin(5.0 * x) : 0.0;
    sum += l > 1 && c[l] == 1 && c[l - 2] == 1 ? 0.05 : 0.0;
  }
  const double value = std::exp(sum) - 1.0;
  return {value, value, value};
}

SearchOptions small_search() {
  SearchOptions o;
  o.limits = {std::vector<std::vector<double>>(9, {1.0, 0.2, 0.1}), 4.0, {0, 0, 0}, {9, 9, 9}};
  o.evaluations = 90;
  return o;
}

double best_of_all(const PlacementLimits& limits) {
  double least = INFINITY;
  for (int n = 0; n < 19683; ++n) {
    Choices c;
    for (int l = 0, rest = n; l < 9; ++l, rest /= 3) {
      c.push_back(rest % 3);
    }
    least = limits.allow(c) ? std::min(least, planted(c).value) : least;
  }
  return least;
}

TEST(PlacementSearch, FindsNearlyTheBestOfAllAndKeepsItsLimits) {
  struct Row {
    double budget;
    std::vector<int64_t> at_least, at_most;
  };
  for (const Row& row : {Row{4.0, {0, 0, 0}, {9, 9, 9}}, Row{2.0, {0, 0, 0}, {9, 9, 9}},
                         Row{5.0, {1, 0, 4}, {3, 9, 9}}}) {
    SearchOptions o = small_search();
    o.limits.budget = row.budget;
    o.limits.at_least = row.at_least;
    o.limits.at_most = row.at_most;
    const SearchResult r = search_placement(o, planted);
    EXPECT_LE(r.steps.size(), 90U);
    const SearchStep& best = r.steps[r.best];
    EXPECT_TRUE(o.limits.allow(best.choices));
    EXPECT_LE(best.value.value, 1.02 * best_of_all(o.limits)) << row.budget;
    for (size_t i = 0; i < r.steps.size(); ++i) {
      for (size_t k = 0; k < i; ++k) {
        EXPECT_NE(r.steps[i].choices, r.steps[k].choices) << "measured twice";
      }
      EXPECT_TRUE(!o.limits.allow(r.steps[i].choices) ||
                  r.steps[i].value.value >= best.value.value);
    }
  }
}

TEST(PlacementSearch, OfASmallSpaceEverythingIsMeasuredOnce) {
  SearchOptions o;
  o.limits = {std::vector<std::vector<double>>(3, {1.0, 0.0}), 3.0, {0, 0}, {3, 3}};
  o.evaluations = 100;
  const SearchResult r = search_placement(o, planted);
  EXPECT_LE(r.steps.size(), 8U);
  EXPECT_EQ(r.steps[r.best].value.value, 0.0) << "the teacher itself is within this budget";
}

// More measurements than the surrogate is fitted to.
TEST(PlacementSearch, AllPlacementsAreMeasuredWhereThatIsAsked) {
  SearchOptions o;
  o.limits = {std::vector<std::vector<double>>(6, {1.0, 0.2, 0.1}), 3.0, {0, 0, 0}, {6, 6, 6}};
  o.evaluations = 729;
  const SearchResult r = search_placement(o, planted);
  ASSERT_EQ(r.steps.size(), 729U);
  for (const SearchStep& step : r.steps) {
    EXPECT_TRUE(!o.limits.allow(step.choices) || step.value.value >= r.steps[r.best].value.value);
  }
  EXPECT_GT(r.rank, 0.9);
  EXPECT_GT(r.predicted.high, r.steps[r.best].value.value);
}

TEST(PlacementSearch, ABudgetThatCannotBeKeptIsSaidSo) {
  SearchOptions o = small_search();
  o.limits.budget = 0.8;
  EXPECT_THAT(testing::message_of([&] { search_placement(o, planted); }),
              HasSubstr("the cheapest placement allowed costs 0.9"));
  o.limits.budget = 4.0;
  o.limits.at_least = {5, 5, 0};
  EXPECT_THAT(testing::message_of([&] { search_placement(o, planted); }),
              HasSubstr("there are 9 open layers"));
  o.limits.at_least = {4, 0, 0};
  EXPECT_THAT(testing::message_of([&] { search_placement(o, planted); }),
              HasSubstr("a lower --at-least"));
}

/// A teacher, its banks of windows and of Gated DeltaNet, and documents.
struct World {
  LoadedModel teacher;
  Tokenizer tokenizer = testing::byte_tokenizer();
  std::unique_ptr<DocumentSource> source =
      problem_source(tokenizer, ProblemSpec{}, Split::kValid, 1);
  HeldOut choosing{*source, 3, 400}, reported{*source, 3, 400, 3};
  std::unique_ptr<MixerBank> bank;

  World() {
    ModelSpec spec = testing::tiny_attention(4);
    spec.vocab = 261;
    spec.max_positions = 2048;
    spec.eos_ids = {0};
    teacher = fresh_model(spec, 1, 0.3);
    bank = std::make_unique<MixerBank>(*teacher.model);
  }
  LoadedModel all(const char* mixer, std::vector<int64_t> layers = {0, 1, 2, 3}) {
    return convert(*teacher.model, *teacher.model, layers, {.mixer = mixer}, 1, true);
  }
  void add_both() {
    bank->add("window", all("sliding_window"), "w");
    bank->add("gdn", all("gated_delta_net"), "g");
  }
  ChosenPlacement choose(const ChoiceOptions& options) {
    return choose_placement(*bank, options, {&choosing}, {&reported});
  }
};

ChoiceOptions half_the_cache() {
  ChoiceOptions o;
  o.cost.context = 1024;
  o.share = 0.55;
  o.evaluations = 20;
  return o;
}

class Placing : public ::testing::Test {
 protected:
  void SetUp() override { Progress::silence(true); }
  void TearDown() override { Progress::silence(false); }
};

TEST_F(Placing, AHybridOfTheBankIsTheOneThatConvertMakes) {
  World w;
  w.add_both();
  EXPECT_EQ(w.bank->kinds(), (std::vector<std::string>{"attention", "window", "gdn"}));
  LoadedModel hybrid = w.bank->build({2, 0, 1, 0});
  LoadedModel first =
      convert(*w.teacher.model, *w.teacher.model, {0}, {.mixer = "gated_delta_net"}, 1);
  LoadedModel both = convert(*first.model, *w.teacher.model, {2}, {.mixer = "sliding_window"}, 1);
  EXPECT_EQ(hybrid.model->spec(), both.model->spec());
  EXPECT_EQ(testing::all_weights(*hybrid.model), testing::all_weights(*both.model));
  EXPECT_EQ(hybrid.weights.bytes(), 0) << "all of it is the bank's memory";
  EXPECT_EQ(w.bank->build({0, 0, 0, 0}).model->spec(), w.teacher.model->spec());
}

TEST_F(Placing, ABankIsTheTeacherButForItsMixers) {
  const struct {
    const char* kind;
    const char* error;
    std::function<LoadedModel(World&)> model;
  } rows[] = {
      {"attention", "what the teacher itself brings", [](World& w) { return w.all("mamba"); }},
      {"gdn", "given twice", [](World& w) { return w.all("mamba"); }},
      {"a/b", "expected", [](World& w) { return w.all("mamba"); }},
      {"x", "all of its attention is the teacher's",
       [](World& w) { return fresh_model(w.teacher.model->spec(), 1, 0.3); }},
      {"x", "was not made from this teacher",
       [](World&) { return fresh_model(testing::tiny_attention(3), 1); }},
      {"x", "is not the teacher's",
       [](World& w) {
         LoadedModel other = fresh_model(w.teacher.model->spec(), 2, 0.3);
         return convert(*other.model, *other.model, {0, 1}, {.mixer = "mamba"}, 1);
       }},
      {"x", "in more than its mixer",
       [](World& w) {
         ModelSpec spec = w.all("mamba").model->spec();
         spec.layers[2].branches[1].units[0].out = 0.5F;
         return fresh_model(spec, 1);
       }},
  };
  for (const auto& row : rows) {
    World w;
    w.add_both();
    const std::string error =
        testing::message_of([&] { w.bank->add(row.kind, row.model(w), "there"); });
    EXPECT_THAT(error, HasSubstr(row.error)) << row.kind;
    EXPECT_THAT(error, HasSubstr(std::string("bank ") + row.kind + "=there"));
    EXPECT_EQ(w.bank->kinds().size(), 3U) << "nothing was added";
  }
}

TEST_F(Placing, APartOfABankIsPlacedOnlyWhereItIs) {
  World w;
  w.bank->add("window", w.all("sliding_window", {1, 2}), "w");
  EXPECT_EQ(w.bank->all(1), (Choices{0, 1, 1, 0}));
  ChoiceOptions o = half_the_cache();
  o.share = 0.7;
  EXPECT_EQ(w.choose(o).choices, (Choices{0, 1, 1, 0}));
  o.share = 0.5;
  EXPECT_THAT(testing::message_of([&] { w.choose(o); }), HasSubstr("the budget cannot be kept"));
}

TEST_F(Placing, AStoppedSearchGoesOnToTheSamePlacement) {
  const TestFolder folder;
  World w;
  w.add_both();
  ChoiceOptions o = half_the_cache();
  o.trace = folder.at("whole.trace");
  const ChosenPlacement whole = w.choose(o);
  EXPECT_LE(whole.costs.of(whole.choices), whole.budget * (1 + 1e-9));
  // As if stopped after some: the trace has the first ones alone.
  nlohmann::ordered_json json = nlohmann::ordered_json::parse(read_sealed(o.trace));
  ASSERT_EQ(json["evaluations"].size(), whole.search.steps.size());
  while (json["evaluations"].size() > 7) {
    json["evaluations"].erase(json["evaluations"].size() - 1);
  }
  write_sealed(folder.at("part.trace"), json.dump(1) + "\n");
  o.trace = folder.at("part.trace");
  const ChosenPlacement resumed = w.choose(o);
  EXPECT_EQ(resumed.choices, whole.choices);
  ASSERT_EQ(resumed.search.steps.size(), whole.search.steps.size());
  for (size_t i = 0; i < whole.search.steps.size(); ++i) {
    EXPECT_EQ(resumed.search.steps[i].choices, whole.search.steps[i].choices);
    EXPECT_EQ(resumed.search.steps[i].value.value, whole.search.steps[i].value.value);
  }
  // Another budget takes what it finds there; another question is refused.
  o.share = 0.8;
  w.choose(o);
  o.metric = "nll";
  EXPECT_THAT(testing::message_of([&] { w.choose(o); }),
              HasSubstr("\n  metric: reverse-kl in the file, nll now"));
  o.fresh = true;
  EXPECT_NO_THROW(w.choose(o));
}

// Windows without training stand in the table where the search could not choose them.
TEST_F(Placing, WindowsAreTheBaselineWhateverTheBanksAre) {
  const TestFolder folder;
  ChoiceOptions o = half_the_cache();
  o.share = 0.7;
  World both;
  both.add_both();
  EXPECT_THAT(both.choose(o).compared.back().name, ::testing::Not(HasSubstr("windows of")));
  World w;
  w.bank->add("gdn", w.all("gated_delta_net"), "g");
  const ChosenPlacement chosen = w.choose(o);
  const ComparedPlacement& windows = chosen.compared.back();
  EXPECT_EQ(windows.name, "its attention, the rest windows of 128");
  EXPECT_TRUE(std::isnan(windows.cost));
  std::vector<int64_t> layers;
  for (size_t i = 0; i < chosen.choices.size(); ++i) {
    if (chosen.choices[i] != 0) {
      layers.push_back(static_cast<int64_t>(i));
    }
  }
  const LoadedModel model = convert(*w.teacher.model, *w.teacher.model, layers,
                                    {.mixer = "sliding_window", .window = 128, .sinks = 4}, 1);
  const LossSums sums = total(w.reported.measure(*model.model, w.teacher.model.get()));
  EXPECT_DOUBLE_EQ(windows.value.value, sums.reverse_kl / static_cast<double>(sums.tokens));
  write_placement(chosen, folder.at("placement.json"));
  EXPECT_EQ(read_placement(folder.at("placement.json")).choices, chosen.choices);
}

TEST_F(Placing, ThePlacementsFileBuildsItAgain) {
  const TestFolder folder;
  World w;
  save_model(*w.teacher.model, folder.at("teacher"), {});
  save_model(*w.all("sliding_window").model, folder.at("win"), {});
  save_model(*w.all("gated_delta_net").model, folder.at("gdn"), {});
  LoadedModel teacher = load_model(folder.at("teacher"));
  MixerBank bank(*teacher.model);
  bank.add("window", load_bank(teacher, folder.at("win")), folder.at("win"));
  bank.add("gdn", load_bank(teacher, folder.at("gdn")), folder.at("gdn"));
  const ChosenPlacement chosen =
      choose_placement(bank, half_the_cache(), {&w.choosing}, {&w.reported});
  const fs::path file = folder.at("placement.json");
  write_placement(chosen, file);
  const PlacementRecipe recipe = read_placement(file);
  const MixerBank again = bank_for(recipe, teacher, {}, file.string());
  EXPECT_EQ(testing::all_weights(*again.build(recipe.choices).model),
            testing::all_weights(*bank.build(chosen.choices).model));
  // Banks and teachers that are others than the ones it was searched with.
  EXPECT_THAT(
      testing::message_of([&] { bank_for(recipe, teacher, {"window=" + folder.at("gdn")}, "p"); }),
      HasSubstr("its mixers are not those that p was searched with"));
  EXPECT_THAT(testing::message_of([&] { bank_for(recipe, teacher, {"x=y"}, "p"); }),
              HasSubstr("places no such kind"));
  LoadedModel other = fresh_model(w.teacher.model->spec(), 9);
  EXPECT_THAT(testing::message_of([&] { bank_for(recipe, other, {}, "p"); }),
              HasSubstr("another teacher"));
  for (const char* text : {"gdn", "=dir", "gdn="}) {
    EXPECT_THAT(testing::message_of([&] { parse_bank(text); }), HasSubstr("expected KIND=DIR"));
  }
}

TEST_F(Placing, HostileFilesAreErrorsWithTheirName) {
  const TestFolder folder;
  World w;
  w.add_both();
  ChoiceOptions o = half_the_cache();
  o.trace = folder.at("a.trace");
  const ChosenPlacement chosen = w.choose(o);
  const fs::path file = folder.at("p.json");
  write_placement(chosen, file);
  const struct {
    bool trace;
    const char* key;
    nlohmann::ordered_json value;
    const char* error;
  } rows[] = {
      {false, "file", "a poem", "expected a placement"},
      {false, "file", 7, "expected a placement"},
      {false, "placement", "012", "expected a kind for each of 4 layers"},
      {false, "placement", "0003", "expected kinds from 0 to 2"},
      {false, "placement", "00A0", "expected kinds from 0 to 2"},
      {false, "open_layers", {0, 1, 2, -3}, "open_layers"},
      {false, "kinds", nlohmann::ordered_json::array(), "as the first kind"},
      {true, "file", "a placement", "expected measured placements"},
      {true, "evaluations", {{{"placement", "0000"}}}, "value"},
      {true, "costs", {{{"of", "gold"}}}, "unknown cost 'gold'"},
      {true, "fingerprint", nlohmann::ordered_json::object(), "another question"},
  };
  for (const auto& row : rows) {
    const fs::path original = row.trace ? o.trace : file;
    nlohmann::ordered_json json = nlohmann::ordered_json::parse(read_sealed(original));
    json[row.key] = row.value;
    ChoiceOptions changed = o;
    changed.trace = folder.at("changed");
    write_sealed(changed.trace, json.dump(1) + "\n");
    const std::string error = testing::message_of(
        [&] { row.trace ? (void)w.choose(changed) : (void)read_placement(changed.trace); });
    EXPECT_THAT(error, HasSubstr(row.error)) << row.key;
  }
  for (const char* text : {"", "{", "{}", "[1]", "{\"checksum\": \"0\"}"}) {
    write_file_atomically(folder.at("x"), text);
    EXPECT_THAT(testing::message_of([&] { read_placement(folder.at("x")); }),
                HasSubstr(folder.at("x")))
        << text;
  }
}

TEST_F(Placing, WrongOptionsAreSaidBeforeTheWork) {
  const struct {
    std::function<void(ChoiceOptions&)> change;
    const char* error;
  } rows[] = {
      {[](ChoiceOptions& o) { o.at_most["gnd"] = 1; }, "there is no kind 'gnd'; did you mean"},
      {[](ChoiceOptions& o) { o.none_or_at_least["gnd"] = 2; }, "--none-or-at-least: there is no"},
      {[](ChoiceOptions& o) { o.share = 0.0; }, "expected one budget"},
      {[](ChoiceOptions& o) { o.budget = 5.0; }, "expected one budget"},
      {[](ChoiceOptions& o) { o.share = 0.001; }, "the budget cannot be kept"},
      {[](ChoiceOptions& o) { o.metric = "accuracy"; }, "there are no problems"},
      {[](ChoiceOptions& o) { o.evaluations = 3; }, "expected at least"},
      {[](ChoiceOptions& o) { o.cost.context = 0; }, "context"},
  };
  for (const auto& row : rows) {
    World w;
    w.add_both();
    ChoiceOptions o = half_the_cache();
    row.change(o);
    EXPECT_THAT(testing::message_of([&] { w.choose(o); }), HasSubstr(row.error));
  }
}

TEST_F(Placing, CacheCostsAreTheCachePlansAndTimesAddUp) {
  World w;
  w.add_both();
  CostConfig config;
  config.context = 512;
  const LayerCosts bytes = measure_layer_costs(*w.bank, config);
  EXPECT_EQ(bytes.layers[0][0], 512.0 * 2 * 8 * 2) << "a key and a value of 8 numbers in bf16";
  EXPECT_LT(bytes.layers[0][1], bytes.layers[0][0]);
  EXPECT_EQ(bytes.teacher(), 4 * bytes.layers[0][0]);
  config.context = 32;
  config.repeats = 1;
  for (const CostKind kind : {CostKind::kDecode, CostKind::kPrefill}) {
    config.kind = kind;
    const LayerCosts times = measure_layer_costs(*w.bank, config);
    ASSERT_EQ(times.rows.size(), 7U) << "the teacher, and two models for each kind and for none";
    EXPECT_GT(times.teacher(), 0.0);
    for (const LayerCosts::Row& row : times.rows) {
      EXPECT_GT(row.measured.value, 0.0);
    }
    ASSERT_EQ(times.alone.size(), times.kinds.size());
    EXPECT_EQ(times.alone[1].counts[1], 1);
    EXPECT_FALSE(times.slow_alone(0)) << "attention's is the teacher itself";
    const auto json = nlohmann::json::parse(costs_json(times).dump());
    const LayerCosts back = read_costs({json, "costs"});
    EXPECT_EQ(back.question, times.question);
    EXPECT_EQ(back.layers, times.layers);
    EXPECT_EQ(back.alone[1].measured.low, times.alone[1].measured.low);
    EXPECT_EQ(back.teacher(), times.teacher());
  }
}

TEST(Losses, AreComparedDocumentByDocument) {
  const Losses a{{1, 2, 3, 4}, {10, 10, 10, 10}};
  const Losses b{{2, 3, 4, 5}, {10, 10, 10, 10}};
  EXPECT_DOUBLE_EQ(a.mean().value, 0.25);
  EXPECT_GT(a.mean().high, 0.3);
  const Measured d = difference(b, a);
  EXPECT_DOUBLE_EQ(d.value, 0.1);
  EXPECT_NEAR(d.low, 0.1, 1e-12) << "the same in every document: nothing is unsure";
}

}  // namespace
}  // namespace cambium
