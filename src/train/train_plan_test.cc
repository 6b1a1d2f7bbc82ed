// The keys of a stage of training: read, refused, and listed in the documents.
#include "train/train_plan.h"

#include <gmock/gmock.h>

#include "base/error.h"
#include "base/file.h"
#include "base/test_paths.h"
#include "base/testing.h"

namespace cambium {
namespace {

using ::testing::HasSubstr;

TrainConfig read(const std::string& text, const TrainConfig& defaults = {}) {
  return read_train_config(PlanTable::parse(text, "p.toml"), defaults);
}

std::string error_of(const std::string& text) {
  return testing::message_of([&] { read(text); });
}

TEST(TrainPlan, ReadsEveryKindOfKey) {
  const TrainConfig c = read(
      "objective = \"align\"\ntrain = \"converted\"\nsteps = 7\nlong_documents = \"drop\"\n"
      "[loss]\nreverse_kl = 0.5\n[align]\nlayers = [0, 3]\n[optimizer]\nkind = \"muon\"\n"
      "[optimizer.norm]\nrate_scale = 0\n[schedule]\nrate = 5e-3\ndecay = \"linear\"\n");
  EXPECT_EQ(c.objective, Objective::kAlign);
  EXPECT_EQ(c.trained, Trained::kConverted);
  EXPECT_EQ(c.steps, 7);
  EXPECT_EQ(c.long_documents, LongDocuments::kDrop);
  EXPECT_EQ(c.loss.reverse_kl, 0.5F);
  EXPECT_THAT(c.align.layers, ::testing::ElementsAre(0, 3));
  EXPECT_EQ(c.optimizer.kind, OptimizerKind::kMuon);
  EXPECT_EQ(c.optimizer.group(ParameterGroup::kNorm).rate_scale, 0.0);
  EXPECT_EQ(c.schedule.peak, 5e-3);
  EXPECT_EQ(c.schedule.decay, Decay::kLinear);
}

TEST(TrainPlan, StepsAndTokensReplaceEachOther) {
  TrainConfig defaults;
  defaults.tokens = 5000;
  EXPECT_EQ(read("steps = 4", defaults).tokens, 0);
  const TrainConfig c = read("tokens = 250\nsequence_length = 100");
  EXPECT_EQ(c.tokens, 250);
  EXPECT_EQ(c.steps, 3);  // at least
  EXPECT_THAT(error_of("steps = 1\ntokens = 2"), HasSubstr("give steps or tokens, not both"));
  EXPECT_THAT(error_of("sequence_length = 8"), HasSubstr("steps or tokens must be given"));
}

TEST(TrainPlan, RefusesValuesThatCannotBe) {
  const struct {
    const char* line;
    const char* expected;
  } rows[] = {
      {"steps = -1", "steps must be a whole number from 0"},
      {"steps = 9223372036854775807", "p.toml:1: steps must be a whole number from 0"},
      {"tokens = 9223372036854775807", "tokens must be"},
      {"steps = 1\nsequence_length = 9223372036854775807", "sequence_length must be"},
      {"steps = 1\nsequence_length = 0", "sequence_length must be"},
      {"steps = 1\nsequences_per_step = 9223372036854775807", "sequences_per_step must be"},
      {"steps = 1\nseed = -1", "seed must be"},
      {"steps = 1\nkeep_checkpoints = 0", "keep_checkpoints must be"},
      {"steps = 1\n[schedule]\nrate = inf", "schedule.rate must be a finite number, got inf"},
      {"steps = 1\n[schedule]\nrate = nan", "schedule.rate must be a finite number, got nan"},
      {"steps = 1\n[schedule]\nrate = 0", "schedule.rate must be a number above 0"},
      {"steps = 1\n[schedule]\nwarmup_steps = -1", "schedule.warmup_steps must be"},
      {"steps = 1\n[optimizer]\nbeta1 = 1.0", "optimizer.beta1 must be a number from 0 below 1"},
      {"steps = 1\n[optimizer]\nkind = \"muno\"", "did you mean 'muon'"},
      {"steps = 1\n[optimizer.mixer]\nweight_decay = -0.1", "optimizer.mixer.weight_decay must be"},
      {"steps = 1\n[loss]\ntemperature = 0", "loss.temperature must be a number above 0"},
      {"steps = 1\n[loss]\nreverse_kl = -1", "loss.reverse_kl must be"},
      {"steps = 1\n[align]\nlayers = [-1]", "align.layers must be a list"},
      {"steps = 1\n[divergence]\npatience = 0", "divergence.patience must be"},
  };
  for (const auto& row : rows) {
    EXPECT_THAT(error_of(row.line), HasSubstr(row.expected)) << row.line;
  }
}

// The fingerprints of runs that earlier versions began, to the letter: they are compared as text.
TEST(TrainPlan, FingerprintsReadAsTheyAlwaysHave) {
  TrainConfig c;
  c.steps = 40;
  c.align.layers = {1, 2};
  c.optimizer.kind = OptimizerKind::kMuon;
  c.loss.reverse_kl = 0.1F;
  auto f = fingerprint_fields(c);
  EXPECT_EQ(f["objective"], "end to end");
  EXPECT_EQ(f["steps"], "40");
  EXPECT_EQ(f["long_documents"], "cut");
  EXPECT_EQ(f["loss"], "cross_entropy 1 forward_kl 0 reverse_kl 0.1 temperature 1");
  EXPECT_EQ(f["align"], "layers 1,2 weight 1 squared no all_tokens no");
  EXPECT_EQ(f["optimizer"], "muon beta 0.9 0.95 epsilon 1e-08 clip 1 momentum 0.95");
  EXPECT_EQ(f["group feed_forward"], "rate_scale 1 weight_decay 0.1");
  EXPECT_EQ(f["schedule"], "peak 0.001 warmup 0 cosine final 0.1");
  EXPECT_EQ(f.count("checkpoint_every"), 0U);
  EXPECT_EQ(f.count("divergence"), 0U);
}

TEST(TrainPlan, TheDocumentListsEveryKey) {
  const std::string path = std::string(kSourceDir) + "/docs/distillation.md";
  const std::string table = fields_table(list_fields<TrainConfig>());
  EXPECT_THAT(read_text_file(path), HasSubstr(table)) << "docs/distillation.md should hold:\n"
                                                      << table;
}

// Letters that toml++ 3.3 takes for impossible where it looks for white space: in keys, and after a
// line's end that a backslash takes back.
TEST(TrainPlan, AnyLetterIsReadOrRefused) {
  for (const char* letter : {"\xef\xaf\xa6", "\xef\xb8\x8f", "\xef\xb9\xaf", "\xef\xbb\xbc"}) {
    const std::string text = letter;
    const PlanTable plan =
        PlanTable::parse("a = \"\"\"x\\\n  " + text + "y\"\"\"\n\"" + text + "\" = 1\n");
    EXPECT_EQ(plan.get_string("a", ""), "x" + text + "y");
    EXPECT_EQ(plan.get_int(text, 0), 1);
    EXPECT_THROW(PlanTable::parse("[a" + text + "]\n"), Error);
    EXPECT_THROW(PlanTable::parse("a" + text + " = 1\n"), Error);
  }
}

}  // namespace
}  // namespace cambium
