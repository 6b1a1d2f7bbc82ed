// The whole graft on a teacher of four tiny layers: stages, gates, retries, and runs that are
// killed.
#include "hybrid/pipeline.h"

#include <gmock/gmock.h>

#include <chrono>
#include <nlohmann/json.hpp>

#include "base/file.h"
#include "base/json.h"
#include "base/random.h"
#include "base/test_child.h"
#include "base/test_folder.h"
#include "hybrid/placement_file.h"
#include "hybrid/testing.h"

namespace cambium {
namespace {

constexpr const char* kChild = "Pipeline.DISABLED_Child";
namespace fs = std::filesystem;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

using testing::error_of;
using testing::kMeasuresLittle;
using testing::run;
using testing::weights_in;
using testing::write_inputs;

TEST(Pipeline, ACalibratedStartIsAPhaseBeforeTheOthers) {
  const TestFolder folder;
  write_inputs(folder.path(), kMeasuresLittle + R"([graft]
mixer = "mamba2"
calibrate = 4
fit = 2
[place]
method = "uniform"
[[stage]]
name = "one"
layers = 2
)");
  const RunSummary summary = run(folder.path(), "run");
  ASSERT_EQ(summary.curves.size(), 1);
  EXPECT_EQ(summary.curves[0].phase, "fit");
  EXPECT_EQ(summary.curves[0].loss.size(), 2);
  EXPECT_GT(summary.models[1].tokens_trained, 0);
  const FitSummary& fit = summary.models[1].fit;
  EXPECT_EQ(fit.layers, 2);
  EXPECT_NE(fit.after, fit.before);
  const std::string stage = folder.at("run") + "/stages/one";
  EXPECT_THAT(read_text_file(stage + "/calibration.json"), HasSubstr("look_back"));
  EXPECT_THAT(read_text_file(stage + "/calibration.json"), HasSubstr("fitted"));
  EXPECT_THAT(read_text_file(stage + "/files.json"), HasSubstr("calibration.json"));
  // Random weights look back evenly; what is asked of the start decides it, and a fit alone may be.
  const RunSummary plain = run(folder.path(), "plain", false, {"graft.calibrate=0", "graft.fit=1"});
  EXPECT_EQ(plain.curves[0].loss.size(), 1);
  EXPECT_EQ(plain.models[1].fit.layers, 0);
  EXPECT_NE(plain.models[1].reverse_kl_converted, summary.models[1].reverse_kl_converted);
  EXPECT_FALSE(fs::exists(folder.at("plain") + "/stages/one/calibration.json"));
}

TEST(Pipeline, GoesThroughItsStagesAndSaysWhatBecameOfEach) {
  const TestFolder folder;
  write_inputs(folder.path());
  const RunSummary summary = run(folder.path(), "run");
  ASSERT_EQ(summary.models.size(), 4);
  const ModelSummary& one = summary.models[1];
  const ModelSummary& two = summary.models[2];
  const ModelSummary& three = summary.models[3];
  EXPECT_EQ(summary.models[0].converted, 0);
  EXPECT_EQ(one.converted, 1);
  EXPECT_EQ(two.converted, 2);
  EXPECT_EQ(three.converted, 3);
  // What a stage has converted stays so.
  for (size_t layer = 0; layer < 4; ++layer) {
    EXPECT_TRUE(one.map[layer] == 'A' || one.map[layer] == two.map[layer]) << one.map << two.map;
    EXPECT_TRUE(two.map[layer] == 'A' || two.map[layer] == three.map[layer]);
  }
  EXPECT_TRUE(one.gate.passed);
  EXPECT_EQ(one.gate.attempts, 1);
  EXPECT_FALSE(two.gate.passed);
  EXPECT_EQ(two.gate.attempts, 2);
  EXPECT_THAT(two.gate.reason, HasSubstr("at most 1e-12 asked: FAILED"));
  EXPECT_THAT(three.gate.reason, HasSubstr("accuracy"));
  // 3 + 3 steps; then 3 + 3 and twice 3 in the second attempt. A step packs 160 to 320 tokens.
  EXPECT_GT(one.tokens_trained, 6 * 160);
  EXPECT_LE(one.tokens_trained, 6 * 320);
  EXPECT_GT(two.tokens_trained - one.tokens_trained, 12 * 160);
  EXPECT_LE(two.tokens_trained - one.tokens_trained, 12 * 320);
  EXPECT_LT(one.cache_bytes_per_token, summary.models[0].cache_bytes_per_token);
  EXPECT_GT(one.reverse_kl, 0.0);
  EXPECT_EQ(one.accuracy.total, 3);
  EXPECT_EQ(one.retrieval.total, 2);
  ASSERT_EQ(one.speed.size(), 1);
  EXPECT_EQ(one.speed[0].context, 8);
  EXPECT_GT(one.speed[0].decode.value, 0.0);
  // The folder holds the same, and models that load and are what the summary says.
  const fs::path at = folder.at("run");
  EXPECT_EQ(read_summary(at / "summary.json").models.size(), 4);
  EXPECT_THAT(read_text_file((at / "report.html").string()), HasSubstr("tiny"));
  const LoadedModel last = load_model(at / three.dir);
  EXPECT_EQ(layer_map(last.model->spec()), three.map);
  ASSERT_EQ(summary.importance.size(), 3);
  EXPECT_EQ(summary.importance[2].method, "mmr");
  std::vector<std::string> curves;
  for (const CurveSummary& curve : summary.curves) {
    curves.push_back(curve.stage + " " + curve.phase);
  }
  EXPECT_THAT(curves, ElementsAre("one align", "one distill", "two align", "two distill",
                                  "three align", "three distill"));
  EXPECT_EQ(summary.curves[1].loss.size(), 3);
  EXPECT_EQ(summary.curves[3].loss.size(), 9);  // both attempts
  EXPECT_GT(summary.curves[3].reverse_kl[0], 0.0);
  EXPECT_GT(two.reverse_kl_converted, 0.0);
}

TEST(Pipeline, ABaselineWithoutTrainingStandsBesideAStage) {
  const TestFolder folder;
  write_inputs(folder.path(), kMeasuresLittle + R"(baseline_window = 5
baseline_sinks = 1
[graft]
mixer = "gated_delta_net"
calibrate = 0
[place]
method = "uniform"
[[stage]]
name = "one"
layers = 2
[[stage]]
name = "on"
from = "one"
layers = 2
distill = {steps = 1, sequence_length = 64}
[[stage]]
name = "all"
layers = 4
)");
  const RunSummary summary = run(folder.path(), "run");
  std::vector<std::string> names;
  for (const ModelSummary& model : summary.models) {
    names.push_back(model.name);
    EXPECT_EQ(model.speed.size(), 1U);
  }
  // Once for the same layers.
  EXPECT_THAT(names, ElementsAre("teacher", "one", "one/windows", "on", "all", "all/windows"));
  const ModelSummary& one = summary.models[1];
  const ModelSummary& baseline = summary.models[2];
  std::string map = one.map;
  std::replace(map.begin(), map.end(), 'G', 'W');
  EXPECT_EQ(baseline.map, map);
  EXPECT_EQ(baseline.converted, 2);
  EXPECT_EQ(baseline.tokens_trained, 0);
  EXPECT_GT(baseline.reverse_kl, 0.0);
  EXPECT_FALSE(baseline.shipped);
  EXPECT_EQ(baseline.gate.attempts, 0);
  EXPECT_THAT(read_text_file(folder.at("run") + "/frontier.csv"), HasSubstr("one/windows"));
  const RunSummary again = run(folder.path(), "run", true);
  ASSERT_EQ(again.models.size(), summary.models.size());
  EXPECT_EQ(again.models[2].reverse_kl, baseline.reverse_kl);
  EXPECT_EQ(again.models[2].cache_bytes_per_token, baseline.cache_bytes_per_token);
}

TEST(Pipeline, AStageMaySearchForItsLayers) {
  const TestFolder folder;
  std::string plan = testing::kPlan;
  const std::string after = "[place]\n";
  plan.insert(plan.find(after) + after.size(), "method = \"search\"\nevaluations = 8\n");
  write_inputs(folder.path(), plan);
  const RunSummary summary = run(folder.path(), "run");
  ASSERT_EQ(summary.models.size(), 4);
  EXPECT_EQ(summary.models[1].converted, 1);
  EXPECT_EQ(summary.models[2].converted, 2);
  EXPECT_TRUE(fs::exists(folder.at("run/stages/one/search.json")));
  // What it chose by is kept with the stage: edited, it is refused.
  const std::string trace = folder.at("run/stages/one/search.json");
  write_file_atomically(trace, read_text_file(trace) + " ");
  EXPECT_THAT(error_of([&] { run(folder.path(), "run", true); }), HasSubstr("search.json"));
}

// Several kinds under a budget of cache bytes: its number of layers follows, another stage trains
// on, and a run that is stopped goes on with the placement it had.
TEST(Pipeline, AStageMayChooseAmongMixersUnderABudget) {
  const TestFolder folder;
  std::string plan = testing::kPlan;
  plan.resize(plan.find("[[stage]]"));
  plan += R"(
[[stage]]
name = "any"
align = {steps = 1}
[stage.graft]
window = 4
calibrate = 2
fit = 1
[stage.place]
method = "search"
evaluations = 6
mixers = ["sliding_window"]
cost = "cache"
context = 64
budget = 0.6
at_least = ["sliding_window=1"]
[[stage]]
name = "on"
from = "any"
)";
  write_inputs(folder.path(), plan);
  const RunSummary summary = run(folder.path(), "run");
  ASSERT_EQ(summary.models.size(), 3);
  const ModelSummary& any = summary.models[1];
  EXPECT_GE(any.converted, 2);
  EXPECT_GE(std::count(any.map.begin(), any.map.end(), 'W'), 1) << any.map;
  EXPECT_EQ(any.fit.layers, any.converted);
  EXPECT_EQ(summary.models[2].map, any.map);
  EXPECT_GT(summary.models[2].tokens_trained, any.tokens_trained);
  // The costs and the budget are kept with the result.
  const std::string stage = folder.at("run/stages/any");
  const auto chosen = parse_json<nlohmann::json>(read_text_file(stage + "/chosen.json"), "chosen");
  EXPECT_LE(chosen["cost"]["share"], 0.6 + 1e-9);
  EXPECT_EQ(chosen["cost"]["measured"]["of"], "cache");
  EXPECT_THAT(read_text_file(stage + "/files.json"), HasSubstr("chosen.json"));
  const PlacementRecipe recipe = read_placement(stage + "/chosen.json");
  ASSERT_EQ(recipe.kinds.size(), 3);
  EXPECT_EQ(recipe.kinds[2].name, "sliding_window");
  for (size_t i = 0; i < recipe.layers.size(); ++i) {
    const char letters[] = {'A', 'G', 'W'};
    EXPECT_EQ(any.map[static_cast<size_t>(recipe.layers[i])],
              letters[static_cast<size_t>(recipe.choices[i])]);
  }
}

// A stage makes its teacher's logits once, trains by them, and refuses those of something else.
TEST(Pipeline, AStageMayTrainByStoredLogits) {
  const TestFolder folder;
  std::string plan = testing::kPlan;
  plan.resize(plan.find("[[stage]]\nname = \"two\""));
  write_inputs(folder.path(), plan);
  const std::string file = folder.at("all.logits");
  const std::vector<std::string> stored = {fmt::format("distill.logits.file=\"{}\"", file),
                                           "distill.logits.top_k=300",
                                           "distill.logits.documents=40"};
  const RunSummary beside = run(folder.path(), "beside");
  const RunSummary read = run(folder.path(), "stored", false, stored);
  // All of the vocabulary is stored: the same but for fp16.
  EXPECT_NEAR(read.models[1].reverse_kl, beside.models[1].reverse_kl,
              1e-2 * beside.models[1].reverse_kl);
  EXPECT_NE(read.models[1].reverse_kl, beside.models[1].reverse_kl);
  const std::string made = read_text_file(file);
  const auto time = fs::last_write_time(file);
  EXPECT_EQ(run(folder.path(), "again", false, stored).models[1].reverse_kl,
            read.models[1].reverse_kl);
  EXPECT_EQ(fs::last_write_time(file), time);
  std::vector<std::string> fewer = stored;
  fewer[1] = "distill.logits.top_k=2";
  EXPECT_THAT(error_of([&] { run(folder.path(), "fewer", false, fewer); }),
              HasSubstr("the plan asks for 2, of 40 of up to 320: remove it"));
  fewer = stored;
  fewer[2] = "distill.logits.documents=41";
  EXPECT_THAT(error_of([&] { run(folder.path(), "more", false, fewer); }),
              HasSubstr("the plan asks for 300, of 41 of up to 320: remove it"));
  std::vector<std::string> other = stored;
  other.emplace_back("seed=9");
  EXPECT_THAT(error_of([&] { run(folder.path(), "other", false, other); }),
              HasSubstr("holds logits of other data"));
  std::string damaged = made;
  damaged[damaged.size() / 2] ^= 1;
  write_file_atomically(file, damaged);
  EXPECT_THAT(error_of([&] { run(folder.path(), "damaged", false, stored); }),
              HasSubstr("is not what was written"));
}

// The methods that compare with a trial, and the metrics that ask or read a file.
TEST(Pipeline, AStageMayScoreAsTheCommandDoes) {
  const TestFolder folder;
  std::string plan = testing::kPlan;
  plan.resize(plan.find("[[stage]]"));
  write_inputs(folder.path());
  const std::string documents = "[place]\ndocuments = 2\n";
  plan.erase(plan.find(documents), documents.size());
  write_file_atomically(folder.at("traces.jsonl"),
                        "{\"prompt\": \"1 + 1\", \"completion\": \" = 2\"}\n");
  const struct {
    const char* place;
    const char* metric;  // of the report
    const char* data;
  } rows[] = {
      {R"(method = "gates", price = 3.0, probe = {steps = 2, sequence_length = 320})",
       "mean opening of the gate of attention", "training documents"},
      {R"(method = "restore-one", metric = "retrieval", documents = 2, max_new_tokens = 2)",
       "wrong answers, share of the problems",
       "2 texts, equal shares by 2 documents, none of those that are reported"},
      {R"(method = "window-swap", window = 4, metric = "retrieval", documents = 2, problems = 3)",
       "wrong answers, share of the problems", "3 texts, equal shares by 2 documents"},
      {R"(method = "window-swap", window = 4, metric = "nll", data = "TRACES")",
       "negative log-likelihood, nats a token", "1 documents of "},
  };
  for (const auto& row : rows) {
    std::string place = row.place;
    if (const size_t at = place.find("TRACES"); at != std::string::npos) {
      place.replace(at, 6, folder.at("traces.jsonl"));
    }
    const std::string stage =
        fmt::format("[[stage]]\nname = \"s\"\nlayers = 1\nplace = {{{}}}\n", place);
    write_file_atomically(folder.at("plan.toml"), plan + stage);
    remove_folder(folder.at("run"));
    const RunSummary summary = run(folder.path(), "run");
    ASSERT_EQ(summary.importance.size(), 1) << place;
    EXPECT_THAT(summary.importance[0].metric, HasSubstr(row.metric)) << place;
    EXPECT_THAT(summary.importance[0].data, HasSubstr(row.data)) << place;
    EXPECT_EQ(summary.models[1].converted, 1) << place;
  }
  // The file that chose is one of the run's inputs.
  write_file_atomically(folder.at("traces.jsonl"),
                        "{\"prompt\": \"1 + 2\", \"completion\": \" = 3\"}\n");
  EXPECT_THAT(error_of([&] { run(folder.path(), "run", true); }),
              HasSubstr("selection data of " + folder.at("traces.jsonl")));
}

// On a device: the same stages, and the numbers of the CPU but for rounding.
TEST(Pipeline, GoesThroughItsStagesOnACudaDevice) {
  if (cuda_devices() == 0) {
    GTEST_SKIP() << why_no_cuda();
  }
  const TestFolder folder;
  write_inputs(folder.path());
  const std::vector<std::string> f32 = {"align.precision=f32", "distill.precision=f32"};
  const RunSummary expected = run(folder.path(), "cpu", false, f32);
  const RunSummary summary = run(folder.path(), "cuda", false, f32, Device::kCuda);
  ASSERT_EQ(summary.models.size(), expected.models.size());
  for (size_t i = 0; i < 2; ++i) {
    EXPECT_EQ(summary.models[i].map, expected.models[i].map);
    EXPECT_EQ(summary.models[i].tokens_trained, expected.models[i].tokens_trained);
    EXPECT_NEAR(summary.models[i].nll, expected.models[i].nll, 1e-3 * expected.models[i].nll);
    EXPECT_NEAR(summary.models[i].reverse_kl, expected.models[i].reverse_kl,
                1e-2 * expected.models[i].reverse_kl + 1e-6);
  }
  EXPECT_THAT(error_of([&] { run(folder.path(), "cuda", true, f32); }),
              HasSubstr("another device: cuda then, cpu now"));
  const RunSummary narrow = run(folder.path(), "bf16", false, {}, Device::kCuda);
  EXPECT_EQ(narrow.models.size(), expected.models.size());
  EXPECT_NEAR(narrow.models[1].nll, expected.models[1].nll, 2e-2 * expected.models[1].nll);
}

// Each gate by itself fails a run that the others let pass, and says what was expected and what
// came.
TEST(Pipeline, EveryGateOfTruthCanFail) {
  const TestFolder folder;
  std::string plan = testing::kPlan;
  plan.resize(plan.find("[[stage]]\nname = \"two\""));
  write_inputs(folder.path(), plan);
  const RunSummary passed =
      run(folder.path(), "passed", false,
          {"evaluate.retrieval_lengths=[150]", "evaluate.long.tasks=[\"keyvalue\"]",
           "evaluate.long.tokens=[200]", "evaluate.long.depths=3", "evaluate.long.texts=1"});
  const ModelSummary& one = passed.models[1];
  ASSERT_TRUE(one.gate.passed) << one.gate.reason;
  EXPECT_THAT(one.gate.reason, HasSubstr("without and through a cache"));
  ASSERT_EQ(one.retrieval_at.size(), 2U);
  EXPECT_EQ(one.retrieval_at[0].found.total, 2);
  EXPECT_EQ(one.retrieval_at[1].what, "keyvalue of 200 tokens");
  EXPECT_EQ(one.retrieval_at[1].found.total, 3);
  EXPECT_GT(one.answer_tokens, 0.0);
  const std::string page = read_text_file(folder.at("passed/report.html"));
  EXPECT_THAT(page, HasSubstr("of 150 characters"));
  EXPECT_THAT(page, HasSubstr("keyvalue of 200 tokens"));
  EXPECT_THAT(page, HasSubstr("without and through a cache"));
  // Random weights answer nothing right; of answers the length is what it is.
  const RunSummary failed =
      run(folder.path(), "failed", false, {"gate.max_answer_length_ratio=0.01"});
  EXPECT_FALSE(failed.models[1].gate.passed);
  EXPECT_THAT(failed.models[1].gate.reason, HasSubstr("at most 0.01 times asked: FAILED"));
  EXPECT_THAT(read_text_file(folder.at("failed/summary.json")),
              HasSubstr("at most 0.01 times asked: FAILED"));
  const RunSummary lost = run(folder.path(), "lost", false, {"gate.min_retrieval_kept=0.5"});
  EXPECT_FALSE(lost.models[1].gate.passed);
  EXPECT_THAT(lost.models[1].gate.reason, HasSubstr("retrieval 0.0 % is 0.0 % of the teacher's"));
}

TEST(Pipeline, StopsAtAFailedGateAndShipsWhatWasGoodBefore) {
  const TestFolder folder;
  write_inputs(folder.path());
  const RunSummary summary = run(folder.path(), "run", false, {"after_failed_gate=\"stop\""});
  ASSERT_EQ(summary.models.size(), 3);
  EXPECT_TRUE(summary.models[1].shipped);
  EXPECT_FALSE(summary.models[2].shipped);
  EXPECT_FALSE(fs::exists(folder.at("run/stages/three")));
}

TEST(Pipeline, RefusesAFolderThatHoldsAnotherRun) {
  const TestFolder folder;
  write_inputs(folder.path());
  make_folder(folder.at("run"));
  write_file_atomically(folder.at("run/plan.toml"), "name = \"other\"\n");
  EXPECT_THAT(error_of([&] { run(folder.path(), "run"); }), HasSubstr("holds a run already"));
  EXPECT_THAT(error_of([&] { run(folder.path(), "run", true); }),
              HasSubstr("was started with another plan"));
}

// Not a test: what the process that is to be killed runs.
TEST(Pipeline, DISABLED_Child) {
  const std::string folder = test_child_folder();
  ASSERT_FALSE(folder.empty());
  run(folder, "killed", true);
}

TEST(Pipeline, ARunKilledAnywhereEndsAsOneThatWasNot) {
  const TestFolder folder;
  write_inputs(folder.path());
  const auto begin = std::chrono::steady_clock::now();
  const RunSummary whole = run(folder.path(), "whole");
  const auto took = std::chrono::duration_cast<std::chrono::milliseconds>(
      std::chrono::steady_clock::now() - begin);
  // Later rounds live longer, so that every part of the run sees a death.
  Rng rng(3, 0);
  bool ended = false;
  for (int round = 0; round < 12 && !ended; ++round) {
    ended = run_test_child(kChild, folder.path(),
                           rng.between(30, 60 + took.count() * (round + 2) / 10));
  }
  ASSERT_TRUE(ended || run_test_child(kChild, folder.path(), -1));
  const RunSummary killed = read_summary(folder.at("killed/summary.json"));
  ASSERT_EQ(killed.models.size(), whole.models.size());
  for (size_t i = 0; i < whole.models.size(); ++i) {
    const ModelSummary& a = whole.models[i];
    const ModelSummary& b = killed.models[i];
    EXPECT_EQ(a.map, b.map);
    EXPECT_EQ(a.tokens_trained, b.tokens_trained);
    EXPECT_EQ(a.reverse_kl, b.reverse_kl);
    EXPECT_EQ(a.gate.reason, b.gate.reason);
    EXPECT_EQ(a.gate.attempts, b.gate.attempts);
    if (i > 0) {
      EXPECT_EQ(weights_in(folder.at("whole/" + a.dir)), weights_in(folder.at("killed/" + b.dir)));
    }
  }
  ASSERT_EQ(killed.curves.size(), whole.curves.size());
  for (size_t i = 0; i < whole.curves.size(); ++i) {
    EXPECT_EQ(killed.curves[i].loss, whole.curves[i].loss);
  }
}

// A stage whose layers choose: its gate sees the mixer that is active, its folder has them all.
TEST(Pipeline, MakesASupernet) {
  const TestFolder folder;
  std::string plan = testing::kPlan;
  plan = plan.substr(0, plan.find("[[stage]]")) + R"(
[[stage]]
name = "super"
layers = 2
graft = {beside = ["sliding_window"], window = 8}
distill = {supernet = {sampling = "composition"}}
)";
  testing::write_inputs(folder.path(), plan);
  const RunSummary summary = testing::run(folder.path(), "run");
  // The stage's row is of the active mixer; the other presets have rows of their own.
  ASSERT_EQ(summary.models.size(), 4U);
  EXPECT_EQ(summary.models[2].name, "super/attention");
  EXPECT_EQ(summary.models[2].map, "AAAA");
  EXPECT_EQ(summary.models[3].name, "super/sliding_window");
  EXPECT_EQ(std::count(summary.models[3].map.begin(), summary.models[3].map.end(), 'W'), 2);
  EXPECT_GT(summary.models[3].reverse_kl, 0.0);
  EXPECT_EQ(summary.models[3].accuracy.total, 3);
  EXPECT_LT(summary.models[1].cache_bytes_per_token, summary.models[2].cache_bytes_per_token);
  ASSERT_EQ(summary.models[3].speed.size(), 1U);
  EXPECT_GT(summary.models[3].speed[0].decode.value, 0.0);
  EXPECT_THAT(read_text_file(folder.at("run/frontier.csv")), HasSubstr("super/sliding_window"));
  EXPECT_THAT(read_text_file(folder.at("run/frontier.svg")), HasSubstr("super/attention"));
  // A run that goes on finds them measured; edited, they are refused.
  EXPECT_EQ(testing::run(folder.path(), "run", true).models[3].reverse_kl,
            summary.models[3].reverse_kl);
  EXPECT_EQ(std::count(summary.models[1].map.begin(), summary.models[1].map.end(), 'G'), 2);
  const std::string dir = folder.at("run") + "/stages/super/model";
  const ModelSpec spec = read_spec(dir);
  EXPECT_EQ(choice_layers(spec).size(), 2U);
  EXPECT_EQ(layer_map(read_spec(dir, "attention")), "AAAA");
  EXPECT_EQ(layer_map(read_spec(dir, "gated_delta_net")), summary.models[1].map);
  EXPECT_EQ(layer_map(spec), summary.models[1].map);
  const std::string log =
      read_text_file(folder.at("run") + "/stages/super/attempt-1/align/log.jsonl");
  EXPECT_NE(log.find("placement"), std::string::npos);
  const std::string kept = folder.at("run/stages/super/preset-attention.json");
  write_file_atomically(kept, read_text_file(kept) + " ");
  EXPECT_THAT(error_of([&] { run(folder.path(), "run", true); }), HasSubstr("preset-attention"));
  // Nothing can go on from it.
  testing::write_inputs(folder.at("next"), plan + "[[stage]]\nname = \"next\"\nlayers = 3\n");
  EXPECT_NE(testing::error_of([&] {
              testing::run(folder.at("next"), "run");
            }).find("goes on from stage super, which makes a supernet"),
            std::string::npos);
}

}  // namespace
}  // namespace cambium
