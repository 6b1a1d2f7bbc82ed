#include "hybrid/plan.h"

#include <gmock/gmock.h>

#include "base/error.h"
#include "base/file.h"
#include "base/test_folder.h"
#include "base/test_paths.h"
#include "base/testing.h"
#include "base/text.h"
#include "hybrid/testing.h"
#include "train/testing.h"

namespace cambium {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::ThrowsMessage;

using testing::read_plan;

constexpr const char* kStages = "[[stage]]\nlayers = 1\n[[stage]]\nname = \"all\"\nlayers = 3\n";

std::string error_of(const std::string& text, const std::vector<std::string>& set = {}) {
  return testing::message_of(
      [&] { check_plan(read_plan(text, set, "t"), testing::tiny_attention(4)); });
}

const TrainConfig& config(const StagePlan& stage, const char* phase) {
  return stage.phase(phase)->config;
}

// Phases with documents of their own, attention frozen in them; what stands nowhere is an error.
TEST(HybridPlan, APhaseMayHaveItsOwnDocuments) {
  const std::string text =
      "teacher = \"t\"\n[graft]\nmixer = \"gated_delta_net\"\n[place]\nmethod = \"uniform\"\n"
      "[[stage]]\nname = \"text\"\nlayers = 2\ndistill = {steps = 3}\n"
      "[[stage]]\nname = \"traces\"\nlayers = 2\nfrom = \"text\"\n"
      "distill = {steps = 2, data = \"traces.jsonl\", freeze_attention = true}\n";
  const HybridPlan plan = read_plan(text);
  EXPECT_EQ(plan.stages[0].phases.at(0).data, "");
  EXPECT_EQ(plan.stages[1].phases.at(0).data, "traces.jsonl");
  EXPECT_FALSE(plan.stages[0].phases.at(0).config.freeze_attention);
  EXPECT_TRUE(plan.stages[1].phases.at(0).config.freeze_attention);
  const std::string described = describe_plan(plan, testing::tiny_attention(4), 1e9);
  EXPECT_THAT(described, HasSubstr("parameters trained on traces.jsonl"));
  std::vector<std::string> missing;
  check_plan_inputs(plan, &missing);
  EXPECT_THAT(missing, ::testing::Contains("traces.jsonl (stage traces: distill.data)"));
  EXPECT_THAT(testing::message_of(
                  [&] { read_plan(text + "[stage.align]\nsteps = 1\nfreeze_attention = true\n"); }),
              HasSubstr("leave 'freeze_attention' out"));
}

TEST(HybridPlan, HasDefaultsForAllButTeacherAndStages) {
  const HybridPlan plan = read_plan(std::string("teacher = \"dir\"\n") + kStages);
  EXPECT_EQ(plan.name, "p");
  EXPECT_EQ(plan.teacher, "dir");
  EXPECT_TRUE(plan.stop_at_failure);
  ASSERT_EQ(plan.stages.size(), 2);
  EXPECT_EQ(plan.stages[0].name, "1");
  EXPECT_EQ(plan.stages[1].name, "all");
  EXPECT_EQ(plan.stages[0].graft.mixer, "mamba");
  EXPECT_EQ(plan.stages[0].place.method, "leave-mixer-out");
  ASSERT_EQ(plan.stages[0].phases.size(), 1);  // of the calibrated start
  EXPECT_EQ(plan.stages[0].phases[0].name, "fit");
  EXPECT_EQ(read_plan(kStages, {}, "other").teacher, "other");
}

TEST(HybridPlan, SetReplacesStagesAndTables) {
  const std::string text =
      std::string("teacher = \"dir\"\n[graft]\nmixer = \"mamba2\"\nstate = 8\n") + kStages;
  const HybridPlan plan =
      read_plan(text, {"stage=[{name = 'one', layers = 2, distill = {steps = 3}}]",
                       "graft={mixer = 'kimi_delta'}", "graft.rope=false"});
  ASSERT_EQ(plan.stages.size(), 1);
  EXPECT_EQ(plan.stages[0].name, "one");
  EXPECT_EQ(plan.stages[0].layers, 2);
  EXPECT_EQ(config(plan.stages[0], "distill").steps, 3);
  EXPECT_EQ(plan.stages[0].graft.mixer, "kimi_delta");
  EXPECT_THAT(error_of(kStages, {"stage=[{layers = 2, layer = 3}]"}), HasSubstr("stage[0].layer"));
  EXPECT_THAT(error_of(kStages, {"stage=[1, 2]"}), HasSubstr("must be a list of tables"));
}

TEST(HybridPlan, StagesTakeTheirDefaultsFromThePlan) {
  const HybridPlan plan = read_plan(R"(
[graft]
mixer = "gated_delta_net"
[gate]
max_reverse_kl = 0.5
retries = 2
[align]
steps = 10
[align.schedule]
rate = 1e-2
[distill]
sequence_length = 100
tokens = 250
train = "mixers"
[[stage]]
layers = 1
[[stage]]
layers = 2
graft = {mixer = "sliding_window", window = 7, sinks = 4}
gate = {retries = 0}
align = {steps = 20}
distill = {steps = 5}
place = {method = "mmr", probe = {steps = 3}}
[[stage]]
place = {method = "list", list = [0, 3]}
sft = {steps = 4}
)",
                                    {}, "t");
  ASSERT_EQ(plan.stages.size(), 3);
  const StagePlan& a = plan.stages[0];
  const StagePlan& b = plan.stages[1];
  const StagePlan& c = plan.stages[2];
  EXPECT_EQ(a.graft.mixer, "gated_delta_net");
  EXPECT_EQ(b.graft.mixer, "sliding_window");
  EXPECT_EQ(b.graft.window, 7);
  EXPECT_EQ(b.graft.sinks, 4);
  EXPECT_EQ(c.graft.mixer, "gated_delta_net");
  EXPECT_EQ(a.gate.retries, 2);
  EXPECT_EQ(b.gate.retries, 0);
  EXPECT_EQ(b.gate.max_reverse_kl, 0.5);
  EXPECT_EQ(config(a, "align").steps, 10);
  EXPECT_EQ(config(b, "align").steps, 20);
  EXPECT_EQ(config(b, "align").schedule.peak, 1e-2);
  EXPECT_EQ(config(a, "align").objective, Objective::kAlign);
  EXPECT_EQ(config(a, "distill").steps, 3);  // 250 tokens in steps of 100
  EXPECT_EQ(config(b, "distill").steps, 5);
  EXPECT_EQ(config(a, "distill").loss.reverse_kl, 1.0F);
  EXPECT_EQ(config(a, "distill").trained, Trained::kMixers);
  EXPECT_EQ(config(a, "align").trained, Trained::kEverything);
  EXPECT_EQ(a.phase("sft"), nullptr);
  ASSERT_NE(c.phase("sft"), nullptr);
  EXPECT_EQ(config(c, "sft").loss.cross_entropy, 1.0F);
  EXPECT_EQ(b.place.method, "mmr");
  EXPECT_EQ(b.place.probe.steps, 3);
  EXPECT_EQ(c.layers, 4);  // the list's two more
  EXPECT_THAT(c.place.list, ElementsAre(0, 3));
}

// What can be calibrated is, unless the plan says otherwise: [graft], the documents, and the fit's
// steps.
TEST(HybridPlan, AStartIsCalibratedWhereItCanBe) {
  const struct {
    const char* graft;
    int64_t documents;
    int64_t fit;
  } rows[] = {{"mixer = \"gated_delta_net\"", 64, 300},
              {"mixer = \"lightning\"\nfit = 7", 64, 7},
              {"mixer = \"gated_delta_net\"\ncalibrate = 0", 0, 0},
              {"mixer = \"gated_delta_net\"\ncalibrate = 5", 5, 300},
              {"mixer = \"gated_delta_net\"\ncalibrate_tokens = 9\nfit = 7", 64, 7},
              {"mixer = \"mamba\"\nfaithful = true", 0, 0},
              {"mixer = \"mamba2\"\ninit = \"random\"", 0, 0},
              {"mixer = \"sliding_window\"", 0, 0}};
  for (const auto& row : rows) {
    const HybridPlan plan =
        read_plan(std::string("[graft]\n") + row.graft + "\n[[stage]]\nlayers = 1\n", {}, "t");
    const StagePlan& stage = plan.stages[0];
    EXPECT_EQ(stage.graft.calibrate, row.documents) << row.graft;
    EXPECT_EQ(stage.phase("fit") == nullptr ? 0 : config(stage, "fit").steps, row.fit) << row.graft;
  }
  // A stage's own word holds for that stage.
  const HybridPlan plan = read_plan(
      "[graft]\nmixer = \"gated_delta_net\"\n[[stage]]\nlayers = 1\n[[stage]]\nlayers = 2\n"
      "graft = {calibrate = 0}\n",
      {}, "t");
  EXPECT_EQ(plan.stages[0].graft.calibrate, 64);
  EXPECT_EQ(plan.stages[1].graft.calibrate, 0);
}

// What `place` and `score` know on the command line, as keys.
TEST(HybridPlan, AStagePlacesAsTheCommandsDo) {
  const HybridPlan plan = read_plan(R"(
[graft]
mixer = "gated_delta_net"
[evaluate]
retrieval = 3
[align]
steps = 4
sequence_length = 100
[[stage]]
name = "gates"
layers = 1
place = {method = "gates", probe = {sequence_length = 64}, price = 5.0}
[[stage]]
name = "restore"
layers = 2
place = {method = "restore-one", metric = "nll", data = "traces.jsonl"}
[[stage]]
name = "both"
graft = {window = 8}
[stage.place]
method = "search"
metric = "retrieval"
mixers = ["sliding_window"]
speedup = 2.0
cost = "prefill"
context = 64
at_most = ["attention=1", "sliding_window=1"]
none_or_at_least = ["sliding_window=2"]
[[stage]]
name = "on"
from = "both"
distill = {steps = 2, sequence_length = 100}
)",
                                    {}, "t");
  const ModelSpec teacher = testing::tiny_attention(4);
  check_plan(plan, teacher);
  const TrainConfig& probe = plan.stages[0].place.probe;
  EXPECT_EQ(probe.steps, 150);  // the command's
  EXPECT_EQ(probe.sequence_length, 64);
  EXPECT_EQ(probe.schedule.peak, 0.2);
  EXPECT_TRUE(probe.align.all_tokens);
  EXPECT_EQ(plan.stages[1].place.data, "traces.jsonl");
  const StagePlan& both = plan.stages[2];
  EXPECT_EQ(both.layers, kAnyLayers);
  EXPECT_EQ(plan.layers_added(both), kAnyLayers);
  EXPECT_EQ(plan.layers_added(plan.stages[3]), 0);
  ASSERT_EQ(both.kinds().size(), 2);
  EXPECT_EQ(both.kinds()[0].window, 0);  // each has the options it knows
  EXPECT_EQ(both.kinds()[1].window, 8);
  EXPECT_EQ(both.kinds()[0].calibrate, 64);
  EXPECT_EQ(both.kinds()[1].calibrate, 0);
  const ChoiceOptions choice = both.place.choice();
  EXPECT_EQ(choice.share, 0.5);
  EXPECT_EQ(choice.budget, 0.0);
  EXPECT_EQ(choice.cost.kind, CostKind::kPrefill);
  EXPECT_EQ(choice.cost.context, 64);
  EXPECT_EQ(choice.at_most.at("sliding_window"), 1);
  EXPECT_EQ(choice.none_or_at_least.at("sliding_window"), 2);
  const std::string described = describe_plan(plan, teacher, 1e9);
  EXPECT_THAT(described, HasSubstr("gates: 150 steps"));
  EXPECT_THAT(described, HasSubstr(", none or at least sliding_window=2"));
  EXPECT_THAT(described, HasSubstr("as many as the search takes of 4 layers become "
                                   "gated_delta_net or sliding_window"));
  EXPECT_THAT(described,
              HasSubstr("budget   50.0 % of what it starts from (ms a prompt, 64 tokens of "
                        "context), at most attention=1, at most sliding_window=1"));
  std::vector<std::string> missing;
  check_plan_inputs(plan, &missing);
  EXPECT_THAT(missing, ::testing::Contains("traces.jsonl (stage restore: place.data)"));
}

TEST(HybridPlan, SetChangesOneKeyAndTheTextKeepsIt) {
  const HybridPlan plan =
      read_plan(kStages, {"name=\"x\"", "distill.steps=7", "gate.max_reverse_kl=0.25"}, "t");
  EXPECT_EQ(plan.name, "x");
  EXPECT_EQ(config(plan.stages[1], "distill").steps, 7);
  EXPECT_EQ(plan.stages[0].gate.max_reverse_kl, 0.25);
  EXPECT_THAT(plan.text, HasSubstr("0.25"));
}

TEST(HybridPlan, SaysWhatIsWrong) {
  const struct {
    const char* text;
    const char* error;
  } rows[] = {
      {"[[stage]]\nlayers = 2\n[[stage]]\nlayers = 2\n", "to grow from stage to stage, got 2"},
      {"[[stage]]\nlayers = 5\n", "5 layers are to be converted, the teacher has 4"},
      {"[[stage]]\nname = \"a\"\nlayers = 1\n[[stage]]\nname = \"a\"\nlayers = 2\n",
       "two stages are named 'a'"},
      {"[[stage]]\nplace = {method = \"list\", list = [4]}\n", "layer 4 does not exist"},
      {"[[stage]]\nlayers = 1\nplace = {method = \"list\"}\n", "expected 'list'"},
      {"[[stage]]\n", "expected 'layers'"},
      {"name = \"x\"\n", "at least one [[stage]]"},
      {"retires = 1\n[[stage]]\nlayers = 1\n", "retires"},
      {"[[stage]]\nlayers = 1\ngate = {retires = 1}\n", "retries"},
      {"[[stage]]\nlayers = 1\ngraft = {mixer = \"mamba3\"}\n", "mamba2"},
      {"[[stage]]\nlayers = 1\nplace = {method = \"mrm\"}\n", "'mmr'"},
      {"[[stage]]\nlayers = 1\nplace = {method = \"mmr\"}\n", "[place.probe] 'steps'"},
      {"[[stage]]\nlayers = 1\nplace = {metric = \"accuracy\"}\n[evaluate]\nproblems = 0\n",
       "metric accuracy needs problems"},
      {"[[stage]]\nlayers = 1\ngate = {min_accuracy_kept = 0.9}\n[evaluate]\nproblems = 0\n",
       "a gate on accuracy needs problems"},
      {"[[stage]]\nlayers = 1\ngate = {min_retrieval_kept = 0.9}\n",
       "a gate on retrieval needs texts"},
      {"[[stage]]\nlayers = 1\ngate = {max_answer_length_ratio = 1.2}\n[evaluate]\nproblems = 0\n",
       "a gate on the length of answers needs problems"},
      {"[[stage]]\nlayers = 1\ngate = {max_sticky = 0.5}\n", "needs questions with options"},
      {"[[stage]]\nlayers = 1\ngate = {max_sticky = 1.5}\n", "max_sticky"},
      {"[[stage]]\nlayers = 1\n[evaluate]\nretrieval_lengths = [200]\n",
       "retrieval_lengths does nothing without 'retrieval'"},
      {"[[stage]]\nlayers = 1\n[evaluate]\nretrieval = 2\nretrieval_lengths = [20]\n",
       "retrieval_lengths"},
      {"[[stage]]\nlayers = 1\n[evaluate.long]\ntasks = [\"passkey\"]\n",
       "'tasks' and 'tokens' together"},
      {"[[stage]]\nlayers = 1\n[evaluate.long]\ntokens = [512]\n", "'tasks' and 'tokens' together"},
      {"[[stage]]\nlayers = 1\n[evaluate.long]\ntasks = [\"needle\"]\ntokens = [512]\n",
       "among passkey, keyvalue, variables, got 'needle'"},
      {"after_failed_gate = \"halt\"\n[[stage]]\nlayers = 1\n", "one of stop, continue"},
      {"[data]\ntrain = \"a.jsonl\"\n[[stage]]\nlayers = 1\n", "both 'train' and 'valid'"},
      {"[evaluate]\ntask = \"gsm8k\"\n[[stage]]\nlayers = 1\n", "task_path"},
      {"[[stage]]\nlayers = \"many\"\n", "layers"},
      {"seed = -1\n[[stage]]\nlayers = 1\n", "seed must be a whole number from 0"},
      {"[evaluate]\ncontexts = [-1]\n[[stage]]\nlayers = 1\n", "from 1 to"},
      {"[evaluate]\ncontexts = [0]\n[[stage]]\nlayers = 1\n", "from 1 to"},
      {"[evaluate]\ncontexts = [9000000000000]\n[[stage]]\nlayers = 1\n", "from 1 to"},
      {"[evaluate]\ncontexts = [257]\n[[stage]]\nlayers = 1\n", "the teacher's 256 positions"},
      {"[evaluate.long]\ntasks = [\"passkey\"]\ntokens = [129]\n[[stage]]\nlayers = 1\n",
       "at most 128, the teacher's 256 positions less 128 for template and answer, got 129"},
      {"[data.problems.word]\nmax_value = 99999999999\n[[stage]]\nlayers = 1\n", "max_value"},
      {"[[stage]]\nlayers = 1\ngraft = {window = -5}\n", "window"},
      {"[[stage]]\nlayers = 1\ngraft = {mixer = \"mamba2\", faithful = true}\n",
       "faithful belongs to mamba and gated_delta_net"},
      {"[[stage]]\nlayers = 1\ngraft = {mixer = \"mamba\", window = 5}\n",
       "window belongs to sliding_window"},
      {"[[stage]]\nlayers = 1\ngraft = {mixer = \"mamba\", sinks = 5}\n",
       "sinks belongs to sliding_window and parallel"},
      {"[[stage]]\nlayers = 1\ngraft = {mixer = \"mamba2\", state = 5}\n",
       "state belongs to mamba"},
      {"[[stage]]\nlayers = 1\ngate = {max_reverse_kl = inf}\n", "max_reverse_kl"},
      {"[[stage]]\nlayers = 1\ngate = {retry_steps = nan}\n", "retry_steps"},
      {"[[stage]]\nlayers = 1\nplace = {method = \"list\", list = [1, 1]}\n", "2 layers"},
      {"[[stage]]\nlayers = 1\nplace = {method = \"uniform\", list = [1]}\n",
       "'list' does nothing with method \"uniform\""},
      {"[[stage]]\nlayers = 1\nplace = {probe = {steps = 1}}\n", "'probe' does nothing"},
      {"[[stage]]\nlayers = 1\nplace = {evaluations = 9}\n", "'evaluations' does nothing"},
      {"[[stage]]\nlayers = 1\nplace = {method = \"search\", evaluations = 1}\n", "from 4 to"},
      {"[[stage]]\nplace = {method = \"search\"}\n", "or a budget in [place]"},
      {"[[stage]]\nplace = {method = \"search\", budget = 0.5, speedup = 2.0}\n",
       "one of 'budget', 'speedup' and 'budget_cost'"},
      {"[[stage]]\nplace = {method = \"search\", speedup = 0.5}\n", "at least 1, got 0.5"},
      {"[[stage]]\nplace = {method = \"search\", budget = 0.5, at_most = [\"mamba\"]}\n",
       "at_most: expected KIND=LAYERS"},
      {"[[stage]]\nplace = {method = \"search\", budget = 0.5, none_or_at_least = [\"gdn=2\"]}\n",
       "none_or_at_least: there is no kind 'gdn'"},
      {"[[stage]]\nplace = {method = \"search\", budget = 0.5, at_most = [\"atention=1\"]}\n",
       "there is no kind 'atention'; did you mean 'attention'?; there are attention, mamba"},
      {"[[stage]]\nlayers = 1\nplace = {method = \"search\", at_most = [\"attention=1\"]}\n",
       "how many layers keep attention follows from 'layers'"},
      {"[[stage]]\nlayers = 1\nplace = {method = \"search\", mixers = [\"mamba\"]}\n",
       "mamba is given twice, or is the stage's own"},
      {"[[stage]]\nlayers = 1\nplace = {method = \"search\", mixers = [\"mamba3\"]}\n", "mamba2"},
      {"[[stage]]\nlayers = 1\ngraft = {beside = [\"mamba2\"]}\n"
       "place = {method = \"search\", mixers = [\"lightning\"]}\n",
       "leave one of the two out"},
      {"[[stage]]\nlayers = 1\nplace = {method = \"search\", context = 9}\n",
       "'context' does nothing with method \"search\" without a budget"},
      {"[[stage]]\nlayers = 1\nplace = {method = \"search\", budget = 0.5, cost = \"cache\", "
       "repeats = 3}\n",
       "'repeats' does nothing"},
      {"[[stage]]\nlayers = 1\nplace = {mixers = [\"mamba2\"]}\n", "'mixers' does nothing"},
      {"[[stage]]\nlayers = 1\nplace = {window = 8}\n", "'window' does nothing"},
      {"[[stage]]\nlayers = 1\nplace = {price = 8.0}\n", "'price' does nothing"},
      {"[[stage]]\nlayers = 1\nplace = {method = \"gates\", metric = \"nll\"}\n",
       "'metric' does nothing"},
      {"[[stage]]\nlayers = 1\nplace = {method = \"gates\", data = \"t.jsonl\"}\n",
       "'data' does nothing"},
      {"[[stage]]\nlayers = 1\nalign = {steps = 1, logits = {file = \"l\"}}\n", "expected 'file'"},
      {"[[stage]]\nlayers = 1\ndistill = {steps = 1, logits = {file = \"l\"}}\n",
       "generated problems never end: expected 'documents'"},
      {"[[stage]]\nlayers = 1\ndistill = {steps = 1, logits = {top_k = 3}}\n", "expected 'file'"},
      {"[[stage]]\nlayers = 1\ndistill = {steps = 1, loss = {temperature = 2.0}, logits = {file = "
       "\"l\", documents = 9}}\n",
       "those at temperature 1, got 2"},
      {"[[stage]]\nlayers = 1\ndistill = {steps = 1, objective = \"align\", logits = {file = "
       "\"l\", documents = 9}}\n",
       "alignment needs the teacher"},
      {"[[stage]]\nlayers = 1\nplace = {metric = \"retrieval\"}\n", "metric retrieval needs texts"},
      {"[[stage]]\nname = \"a\"\nplace = {method = \"search\", budget = 0.5}\n"
       "[[stage]]\nname = \"b\"\nlayers = 3\n",
       "goes on from stage a, whose search chooses how many layers"},
      {"[[stage]]\nlayers = 1\nsft = {steps = 1, loss = {reverse_kl = 1.0}}\n",
       "learns from the data alone"},
      {"[[stage]]\nlayers = 1\nsft = {steps = 1, loss = {cross_entropy = 0.0}}\n",
       "a cross_entropy above 0"},
      {"[[stage]]\nlayers = 1\nsft = {steps = 1, objective = \"align\"}\n",
       "learns from the data alone"},
      {"[[stage]]\nlayers = 1\nalign = {steps = 1, loss = {reverse_kl = 1.0}}\n",
       "objective align has no loss"},
      {"[[stage]]\nlayers = 1\nalign = {steps = 1, align = {layers = [7]}}\n",
       "layer 7 does not exist"},
      {"[[stage]]\nlayers = 1\ndistill = {steps = 1, loss = {reverse_kl = 0.0}}\n",
       "every loss has weight zero"},
      {"[[stage]]\nname = \"a\"\nlayers = 1\n[[stage]]\nfrom = \"b\"\nlayers = 2\n",
       "from = \"b\" is no earlier stage"},
      {"[[stage]]\nname = \"a\"\nlayers = 1\n[[stage]]\nname = \"b\"\nfrom = \"a\"\nlayers = 1\n",
       "converts nothing, trains nothing"},
      {"[[stage]]\nname = \"a\"\nlayers = 1\n[[stage]]\nname = \"b\"\nlayers = 2\n"
       "merge = {with = [\"a\"]}\n",
       "has not the same converted layers"},
      {"[[stage]]\nname = \"a\"\nlayers = 1\n[[stage]]\nname = \"b\"\nfrom = \"a\"\nlayers = 1\n"
       "merge = {with = [\"a\"], weights = [1]}\n",
       "expected 2 'weights'"},
  };
  for (const auto& row : rows) {
    EXPECT_THAT(error_of(row.text), HasSubstr(row.error)) << row.text;
  }
  EXPECT_THAT(error_of(kStages, {"distill.stps=3"}), HasSubstr("steps"));
  EXPECT_EQ(error_of(kStages), "no error");
}

TEST(HybridPlan, TheShippedPlansAreWhole) {
  const std::string source = kSourceDir;
  const HybridPlan demo = read_hybrid_plan(source + "/plans/demo.toml", "", {});
  check_plan(demo, read_spec(source + "/models/teacher"));
  EXPECT_GE(demo.stages.size(), 4);
  const HybridPlan h1 = read_hybrid_plan(source + "/plans/apriel-h1.toml", "", {});
  const ModelSpec teacher = read_spec(source + "/plans/apriel-15b");
  check_plan(h1, teacher);
  std::vector<int64_t> layers;
  for (const StagePlan& stage : h1.stages) {
    if (!stage.branch) {  // the line
      layers.push_back(stage.layers);
    }
    // The optimiser of the source, everywhere; a gate at each stage.
    std::vector<TrainConfig> configs{stage.place.probe};
    for (const Phase& phase : stage.phases) {
      configs.push_back(phase.config);
    }
    for (const TrainConfig& c : configs) {
      EXPECT_EQ(c.optimizer.beta2, 0.999) << stage.name;
      EXPECT_EQ(c.optimizer.group(ParameterGroup::kMixer).weight_decay, 0.01) << stage.name;
    }
    EXPECT_TRUE(stage.gate.max_reverse_kl > 0.0 || stage.gate.min_accuracy_kept > 0.0);
  }
  ASSERT_EQ(h1.stages[3].name, "H-30-SFT");
  EXPECT_TRUE(h1.stages[3].branch);
  EXPECT_EQ(h1.stages[3].from, "H-30");
  EXPECT_EQ(h1.stages[4].name, "H-34");
  EXPECT_EQ(h1.stages[4].from, "H-30");
  EXPECT_EQ(h1.stages[4].phase("sft"), nullptr);
  EXPECT_THAT(layers, ElementsAre(25, 27, 30, 34, 37, 40));
  EXPECT_EQ(config(h1.stages[0], "align").trained, Trained::kMixers);
  const std::string text = describe_plan(h1, teacher, 4e14);
  EXPECT_THAT(text, HasSubstr("stage H-40: 40 of 50 layers (3 more) become mamba"));
  EXPECT_THAT(text, HasSubstr("5000 steps of 768 x 4096 tokens = 15.7B tokens"));
}

// Before any work is done for it.
TEST(HybridPlan, WhatTheTeacherHasNotIsSaid) {
  const std::string text = std::string(
                               "[distill]\nsteps = 1\n[graft]\nmixer = \"gated_delta_net\"\n"
                               "[place]\nmethod = \"uniform\"\n") +
                           kStages;
  EXPECT_EQ(error_of(text), "no error");
  EXPECT_THAT(error_of(text, {"distill.router.balance=0.01"}),
              HasSubstr("distill: router: expected a model with routed experts, got AAAA"));
  const std::string fixtures = std::string(kSourceDir) + "/tests/fixtures/";
  const auto error_with = [&](const std::string& family, const std::vector<std::string>& set) {
    const ModelSpec teacher = read_spec(fixtures + family);
    return testing::message_of([&] { check_plan(read_plan(text, set, "t"), teacher); });
  };
  EXPECT_EQ(error_with("qwen3_moe", {"distill.router.balance=0.01"}), "no error");
  EXPECT_THAT(error_with("qwen3_moe", {"distill.router.bias_rate=0.01"}),
              HasSubstr("bias_rate moves choice biases, which no router of the model has"));
  EXPECT_EQ(error_with("falcon_h1", {}), "no error");
  // A supernet chooses in place of a layer's attention, whatever stands beside it.
  const std::string supernet = R"(
[graft]
mixer = "gated_delta_net"
beside = ["kimi_delta"]
[place]
method = "uniform"
[[stage]]
layers = 1
)";
  for (const char* family : {"deepseek_v3", "falcon_h1"}) {
    const ModelSpec teacher = read_spec(fixtures + family);
    const HybridPlan plan = read_plan(supernet, {}, "t");
    EXPECT_EQ(testing::message_of([&] { check_plan(plan, teacher); }), "no error") << family;
    EXPECT_THAT(describe_plan(plan, teacher, 1e12),
                HasSubstr("1 of " + std::to_string(teacher.layers.size())));
  }
}

TEST(HybridPlan, OfASupernetOneMixerOfALayerRuns) {
  const std::string source = kSourceDir;
  const HybridPlan plan = read_hybrid_plan(source + "/plans/super-apriel.toml", "", {});
  const ModelSpec teacher = read_spec(source + "/plans/apriel-1.6-15b");
  check_plan(plan, teacher);
  EXPECT_TRUE(plan.stages[0].makes_supernet());
  EXPECT_THAT(describe_plan(plan, teacher, 4e14),
              HasSubstr("48 of 48 layers (48 more) choose among attention, gated_delta_net, "
                        "kimi_delta, sliding_window"));
  const HybridPlan small = read_plan(R"(
[graft]
mixer = "sliding_window"
window = 8
[[stage]]
layers = 4
graft = {beside = ["gated_delta_net"]}
distill = {steps = 1, sequence_length = 100, train = "converted"}
)",
                                     {}, "t");
  // Of the 8208 parameters 4 x 768 are attention's, and as many the windows'. Each of three mixers
  // runs in a third of the steps; the new ones alone are trained.
  const ModelSpec tiny = testing::tiny_attention(4);
  ModelSpec all_delta = tiny;
  GraftOptions delta;
  delta.mixer = "gated_delta_net";
  for (LayerSpec& layer : all_delta.layers) {
    *layer.mixer() = graft_spec(*layer.mixer(), tiny.width, delta);
  }
  const double rest = 8208 - 4 * 768;
  const double net = static_cast<double>(Model(all_delta).parameter_count()) - rest;
  const double runs = rest + (2 * 4 * 768 + net) / 3;
  const double forward = 2 * runs + 3200 * 4.0 / 3;
  const double flops = 2 * 8208 + 3200 * 4 + 2 * forward + 2 * (4 * 768 + net) / 3;
  const std::string text = describe_plan(small, tiny, 1e9);
  EXPECT_THAT(text, HasSubstr("choose among attention, sliding_window, gated_delta_net"));
  EXPECT_THAT(text, HasSubstr(fmt::format("{:.3g} FLOP", 100.0 * flops)));
}

TEST(HybridPlan, AChatTemplateThatWillBeAskedThroughIsTriedFirst) {
  const TestFolder folder;
  const std::string tokenizer = std::string(kSourceDir) + "/models/teacher/tokenizer.json";
  std::filesystem::copy_file(tokenizer, folder.at("tokenizer.json"));
  const auto check = [&](const std::string& ask, const std::string& source) {
    write_file_atomically(folder.at("chat_template.jinja"), source);
    HybridPlan plan =
        read_plan("[evaluate]\nask = \"" + ask + "\"\n[[stage]]\nlayers = 1\n", {}, "t");
    plan.teacher = folder.path();
    check_plan_inputs(plan);
  };
  check("template", "{{ messages[0].content }}");
  EXPECT_THAT([&] { check("template", "{% for %}"); },
              ThrowsMessage<Error>(AllOf(HasSubstr("[evaluate] ask: " + folder.path()),
                                         HasSubstr("the chat template cannot be used"),
                                         HasSubstr("ask = \"plain\" does without it"))));
  check("plain", "{% for %}");
  check("auto", "{% for %}");  // generated problems are asked plainly
  EXPECT_THAT(
      [&] { check("auto\"\nlong = {tasks = [\"passkey\"], tokens = [512]}\n#", "{% for %}"); },
      ThrowsMessage<Error>(HasSubstr("the chat template cannot be used")));
  EXPECT_THAT([&] { check("auto\"\ntask = \"gsm8k\"\ntask_path = \"none.jsonl", "{% for %}"); },
              ThrowsMessage<Error>(HasSubstr("the chat template cannot be used")));
}

TEST(HybridPlan, NamesOfStagesAreNamesOfFolders) {
  const auto named = [](const std::string& toml_string) {
    return error_of("[[stage]]\nname = " + toml_string + "\nlayers = 1\n");
  };
  for (const char* bad :
       {"\"/x/victim\"", "\"../../../escaped\"", "\"..\"", "\".\"", "\"\"", "\"a/b\"",
        "\"a\\u0000b\"", "\"a b\"", "\"a\\n\"", "\"\\u001b]0;x\"", "\"\u00e9\""}) {
    EXPECT_THAT(named(bad), HasSubstr("the name of its folder")) << bad;
  }
  EXPECT_THAT(named("\"\\u001b]0;x\""), HasSubstr("'?]0;x'"));
  for (const char* good : {"\"H-25\"", "\"a_b.c\"", "\"...\"", "\"7\""}) {
    EXPECT_EQ(named(good), "no error") << good;
  }
}

TEST(HybridPlan, AListForAllStagesIsTakenPieceByPiece) {
  const HybridPlan plan = read_plan(R"(
[place]
method = "list"
list = [3, 0, 2]
[[stage]]
layers = 1
[[stage]]
layers = 3
)",
                                    {}, "t");
  EXPECT_THAT(plan.stages[0].list, ElementsAre(3));
  EXPECT_THAT(plan.stages[1].list, ElementsAre(0, 2));
  check_plan(plan, testing::tiny_attention(4));
  EXPECT_THAT(error_of("[place]\nmethod = \"list\"\nlist = [3]\n[[stage]]\nlayers = 2\n"),
              HasSubstr("the list has 1 layers to convert, 'layers' asks for 2 more"));
  EXPECT_THAT(error_of("[[stage]]\nplace = {method = \"list\", list = [1]}\n[[stage]]\n"
                       "place = {method = \"list\", list = [1]}\n"),
              HasSubstr("layer 1 has no attention to replace"));
}

TEST(HybridPlan, BranchesAndWhatLaterStagesGoOnFrom) {
  const HybridPlan plan = read_plan(R"(
[optimizer]
beta2 = 0.5
[distill]
steps = 1
[distill.optimizer]
beta1 = 0.25
[[stage]]
name = "a"
layers = 1
[[stage]]
name = "b"
from = "a"
branch = true
layers = 1
sft = {steps = 2}
merge = {with = ["a"]}
[[stage]]
name = "c"
layers = 2
)",
                                    {"seed=7"}, "t");
  EXPECT_EQ(plan.stages[1].from, "a");
  EXPECT_EQ(plan.stages[2].from, "a");
  EXPECT_EQ(plan.layers_before(plan.stages[2]), 1);
  EXPECT_EQ(plan.stages[2].phase("sft"), nullptr);
  // The plan's optimiser is every phase's and the probe's; its seed orders their data.
  EXPECT_EQ(config(plan.stages[1], "sft").optimizer.beta2, 0.5);
  EXPECT_EQ(config(plan.stages[1], "distill").optimizer.beta1, 0.25);
  EXPECT_EQ(plan.stages[0].place.probe.optimizer.beta2, 0.5);
  EXPECT_EQ(config(plan.stages[0], "distill").seed, 7U);
  check_plan(plan, testing::tiny_attention(4));
  EXPECT_THAT(describe_plan(plan, testing::tiny_attention(4), 1e9),
              HasSubstr("stage b: 1 of 4 layers (0 more) become mamba, from a, a branch"));
}

// Apriel-H1's layout has no q_norm and k_norm, and nothing to say of attention where none is left:
// such a hybrid is known before any work to be written in our own layout, which can say it.
TEST(HybridPlan, AHybridThatTheReleasedLayoutCannotSayIsPlannedInOurOwn) {
  const std::string text =
      "graft = {mixer = \"mamba\", faithful = true}\n[[stage]]\nname = \"all\"\nlayers = 3\n";
  const std::string source = kSourceDir;
  for (const char* fixture : {"qwen3", "llama"}) {
    const HybridPlan plan = read_plan(text, {}, "t");
    const ModelSpec teacher = read_spec(source + "/tests/fixtures/" + fixture);
    check_plan(plan, teacher);
    const ModelSpec spec = convert_spec(teacher, teacher, {0, 1, 2}, plan.stages[0].graft);
    EXPECT_EQ(spec.family, "cambium") << fixture;
    EXPECT_TRUE(expresses(find_family(spec.family), spec)) << fixture;
  }
}

}  // namespace
}  // namespace cambium
