#include "hybrid/scoring.h"

#include <gmock/gmock.h>

#include "base/error.h"
#include "base/file.h"
#include "base/progress.h"
#include "base/test_folder.h"
#include "base/testing.h"
#include "eval/problem_source.h"
#include "train/testing.h"

namespace cambium {
namespace {

namespace fs = std::filesystem;
using ::testing::HasSubstr;

LoadedModel byte_model(uint64_t seed, int layers = 4) {
  ModelSpec spec = testing::tiny_attention(layers);
  spec.vocab = 261;
  spec.max_positions = 2048;
  spec.eos_ids = {0};
  return fresh_model(spec, seed, 0.3);
}

/// A question about `model`, asked again and again with something changed.
struct Question {
  LoadedModel model = byte_model(1);
  LoadedModel teacher = byte_model(2);
  Tokenizer tokenizer = testing::byte_tokenizer();
  std::unique_ptr<DocumentSource> source =
      problem_source(tokenizer, ProblemSpec{}, Split::kValid, 1);
  HeldOut documents{*source, 3, 400};
  Task problems = problem_task({}, ProblemKind::kWord, Split::kTest, 1, 3);
  ScoreOptions options;
  AccuracyConfig answers;
  const MixerBank* bank = nullptr;

  Question() {
    answers.max_new_tokens = 2;
    options.probe.loss = {};
    options.probe.loss.reverse_kl = 1.0F;
    options.probe.steps = 2;
    options.probe.sequence_length = 320;
  }
  Importance ask(const fs::path& path = {}) {
    return score_importance(*model.model, *teacher.model, options,
                            {&tokenizer, source.get(), &documents, &problems, answers, bank}, path);
  }
};

void spoil(Model& model) {
  model.visit_layer(3, [](const std::string& name, Parameter& p) {
    if (name.find("o_proj") != std::string::npos) {
      p.tensor.ptr<float>()[0] += 1.0F;
    }
  });
}

class Scoring : public ::testing::Test {
 protected:
  void SetUp() override { Progress::silence(true); }
  void TearDown() override { Progress::silence(false); }
};

TEST_F(Scoring, LeaveOneOutIsTheLossOfTheModelWithoutTheLayer) {
  Question q;
  for (const char* metric : {"reverse-kl", "nll"}) {
    for (const auto method : {ScoreMethod::kLeaveMixerOut, ScoreMethod::kLeaveBlockOut}) {
      q.options.method = method;
      q.options.metric = metric;
      const Importance scores = q.ask();
      ASSERT_EQ(scores.layers.size(), 4U);
      for (const LayerScore& s : scores.layers) {
        const LoadedModel without =
            remove_layer(*q.model.model, s.layer, method == ScoreMethod::kLeaveBlockOut);
        const LossSums sums = total(q.documents.measure(*without.model, q.teacher.model.get()));
        const double expected = q.options.metric == "nll" ? sums.cross_entropy : sums.reverse_kl;
        EXPECT_EQ(s.score, expected / static_cast<double>(sums.tokens));
      }
    }
  }
}

TEST_F(Scoring, WindowSwapIsTheLossWithAWindowInTheLayer) {
  Question q;
  q.options.method = ScoreMethod::kWindowSwap;
  q.options.graft.window = 5;
  for (const char* metric : {"reverse-kl", "nll"}) {
    q.options.metric = metric;
    for (const LayerScore& s : q.ask().layers) {
      const LoadedModel swapped = convert(*q.model.model, *q.model.model, {s.layer},
                                          {.mixer = "sliding_window", .window = 5}, 1);
      const LossSums sums = total(q.documents.measure(*swapped.model, q.teacher.model.get()));
      const double expected = q.options.metric == "nll" ? sums.cross_entropy : sums.reverse_kl;
      EXPECT_EQ(s.score, expected / static_cast<double>(sums.tokens));
    }
  }
}

TEST_F(Scoring, RestoreOneIsWhatALayersAttentionSavesTheStudent) {
  Question q;
  q.options.method = ScoreMethod::kRestoreOne;
  EXPECT_THAT(testing::message_of([&] { q.ask(); }),
              HasSubstr("restore-one: expected the student"));
  Model& teacher = *q.model.model;
  MixerBank partial(teacher);
  partial.add("student",
              convert(teacher, teacher, {0, 2, 3}, {.mixer = "gated_delta_net"}, 3, true), "some");
  q.bank = &partial;
  EXPECT_THAT(testing::message_of([&] { q.ask(); }),
              HasSubstr("restore-one: layer 1 of some has attention still"));
  MixerBank bank(teacher);
  bank.add("student",
           convert(teacher, teacher, {0, 1, 2, 3}, {.mixer = "gated_delta_net"}, 3, true),
           "student");
  q.bank = &bank;
  const auto damage = [&](const std::vector<int64_t>& converted) {
    const LoadedModel model = convert(teacher, teacher, converted, {.mixer = "gated_delta_net"}, 3);
    const LossSums sums = total(q.documents.measure(*model.model, q.teacher.model.get()));
    return sums.reverse_kl / static_cast<double>(sums.tokens);
  };
  const double all = damage({0, 1, 2, 3});
  const Importance scores = q.ask();
  ASSERT_EQ(scores.layers.size(), 4U);
  for (const LayerScore& s : scores.layers) {
    std::vector<int64_t> others = {0, 1, 2, 3};
    std::erase(others, s.layer);
    EXPECT_EQ(s.score, all - damage(others));
  }
  // Wrong answers are all alike here: what tells layers apart is the gain in reverse KL.
  q.options.metric = "retrieval";
  const Importance answered = q.ask();
  for (const LayerScore& s : answered.layers) {
    EXPECT_EQ(s.score, 0.0);
  }
  EXPECT_EQ(answered.order(), scores.order());
}

// What models share is on the device with them; what a probe adds is made on the CPU and moved.
TEST_F(Scoring, ScoresOfACudaDeviceAreThoseOfTheCpu) {
  if (cuda_devices() == 0) {
    GTEST_SKIP() << why_no_cuda();
  }
  const struct {
    ScoreMethod method;
    const char* mixer;
  } rows[] = {{ScoreMethod::kLeaveMixerOut, "mamba"},
              {ScoreMethod::kLeaveBlockOut, "mamba"},
              {ScoreMethod::kMixerReplacement, "mamba"},
              {ScoreMethod::kMixerReplacement, "mamba2"},
              {ScoreMethod::kMixerReplacement, "gated_delta_net"},
              {ScoreMethod::kMixerReplacement, "sliding_window"}};
  for (const auto& row : rows) {
    Question q;
    q.options.method = row.method;
    q.options.graft.mixer = row.mixer;
    const Importance expected = q.ask();
    q.model.weights.move_to(*q.model.model, Device::kCuda);
    q.teacher.weights.move_to(*q.teacher.model, Device::kCuda);
    for (const bool narrow : {false, true}) {
      q.model.model->set_activations(narrow ? Dtype::kBF16 : Dtype::kF32);
      q.options.probe.precision = narrow ? Precision::kBF16 : Precision::kF32;
      const Importance scores = q.ask();
      ASSERT_EQ(scores.layers.size(), expected.layers.size());
      for (size_t i = 0; i < scores.layers.size(); ++i) {
        const double score = expected.layers[i].score;
        EXPECT_NEAR(scores.layers[i].score, score, (narrow ? 5e-2 : 1e-3) * score)
            << score_method_name(row.method) << ", " << row.mixer << " in layer "
            << scores.layers[i].layer;
      }
    }
  }
}

TEST_F(Scoring, OldScoresAreNeverGivenForAnotherQuestion) {
  const TestFolder folder;
  const fs::path path = folder.at("scores.json");
  const struct {
    const char* named;  // what the error says differs
    ScoreMethod method;
    const char* metric;
    std::function<void(Question&)> change;
  } rows[] = {
      {"model", ScoreMethod::kLeaveMixerOut, "reverse-kl",
       [](Question& q) { spoil(*q.model.model); }},
      {"teacher", ScoreMethod::kLeaveMixerOut, "reverse-kl",
       [](Question& q) { spoil(*q.teacher.model); }},
      {"data", ScoreMethod::kLeaveMixerOut, "nll",
       [](Question& q) { q.documents = HeldOut(*q.source, 4, 400); }},
      {"metric", ScoreMethod::kLeaveMixerOut, "nll",
       [](Question& q) { q.options.metric = "reverse-kl"; }},
      {"method", ScoreMethod::kLeaveMixerOut, "nll",
       [](Question& q) { q.options.method = ScoreMethod::kLeaveBlockOut; }},
      {"window", ScoreMethod::kWindowSwap, "nll", [](Question& q) { q.options.graft.window = 9; }},
      {"problems", ScoreMethod::kLeaveMixerOut, "accuracy",
       [](Question& q) { q.problems.examples[1].answer += "1"; }},
      {"answers", ScoreMethod::kLeaveMixerOut, "accuracy",
       [](Question& q) { q.answers.max_new_tokens = 3; }},
      {"tokenizer's rules", ScoreMethod::kLeaveMixerOut, "accuracy",
       [](Question& q) { q.tokenizer = testing::byte_tokenizer("{{ messages[0].content }}"); }},
      {"graft window", ScoreMethod::kMixerReplacement, "reverse-kl",
       [](Question& q) { q.options.graft.window = 9; }},
      {"graft sinks", ScoreMethod::kMixerReplacement, "reverse-kl",
       [](Question& q) { q.options.graft.sinks = 2; }},
      {"probe schedule", ScoreMethod::kMixerReplacement, "reverse-kl",
       [](Question& q) { q.options.probe.schedule.peak *= 2; }},
      {"seed", ScoreMethod::kMixerReplacement, "reverse-kl",
       [](Question& q) { q.options.seed = 2; }},
  };
  for (const auto& row : rows) {
    Question q;
    q.options.graft.mixer = "sliding_window";
    q.options.method = row.method;
    q.options.metric = row.metric;
    fs::remove(path);
    const Importance first = q.ask(path);
    EXPECT_EQ(q.ask(path).order(), first.order()) << "the same question goes on: " << row.named;
    row.change(q);
    const std::string error = testing::message_of([&] { q.ask(path); });
    EXPECT_THAT(error, HasSubstr("holds scores of something else")) << row.named;
    EXPECT_THAT(error, HasSubstr(std::string("\n  ") + row.named + ": "));
    EXPECT_THAT(error, HasSubstr("--fresh"));
    q.options.fresh = true;
    EXPECT_EQ(q.ask(path).layers.size(), 4U) << row.named;
    q.options.fresh = false;
    EXPECT_EQ(q.ask(path).layers.size(), 4U) << row.named;
  }
}

TEST_F(Scoring, AStoppedScoringGoesOnToTheSameNumbers) {
  const TestFolder folder;
  Question q;
  q.documents = HeldOut(*q.source, 30, 400);  // several groups
  const Importance whole = q.ask();
  ASSERT_GT(q.documents.groups().size(), 3U);
  // One group at a time, stopped after some of them: the file has sums of parts.
  q.options.stored_bytes = 1;
  const Importance chunked = q.ask(folder.at("a.json"));
  Importance stopped = chunked;
  stopped.layers.resize(1);
  stopped.unscored = {1, 2, 3};
  for (int64_t layer = 1; layer < 4; ++layer) {
    const LoadedModel without = remove_layer(*q.model.model, layer, false);
    HeldOut begun(*q.source, 30, 400);
    PartialScore p{layer, layer, {}, 0.0};
    std::vector<LossSums> sums = begun.measure(*without.model, q.teacher.model.get());
    int64_t done = 0;
    for (int64_t g = 0; g < layer; ++g) {
      done += begun.groups()[static_cast<size_t>(g)].batch.segments().count();
    }
    for (int64_t i = 0; i < done; ++i) {
      p.sums += sums[static_cast<size_t>(i)];
    }
    stopped.partial.push_back(p);
  }
  write_importance(stopped, folder.at("b.json"));
  q.options.stored_bytes = int64_t{1} << 30;
  const Importance continued = q.ask(folder.at("b.json"));
  ASSERT_EQ(continued.layers.size(), 4U);
  EXPECT_TRUE(continued.partial.empty() && continued.unscored.empty());
  for (size_t i = 0; i < 4; ++i) {
    EXPECT_EQ(chunked.layers[i].score, whole.layers[i].score);
    EXPECT_EQ(continued.layers[i].score, whole.layers[i].score);
  }
}

TEST_F(Scoring, EqualAccuraciesAreToldApartByReverseKl) {
  // Random weights answer nothing: every layer's share of wrong answers is 1.
  Question q;
  const std::vector<int64_t> by_kl = q.ask().order();
  q.options.metric = "accuracy";
  const Importance scores = q.ask();
  for (const LayerScore& s : scores.layers) {
    EXPECT_EQ(s.score, 1.0);
  }
  EXPECT_EQ(scores.order(), by_kl);
  EXPECT_EQ(score_heading("accuracy"), "wrong answers, share of the problems");
}

TEST_F(Scoring, AModelWithoutAttentionIsRefusedByItsMixers) {
  Question q;
  q.model = convert(*q.model.model, *q.model.model, {0, 1, 2, 3}, {.mixer = "mamba"}, 1);
  const TestFolder folder;
  EXPECT_THAT(testing::message_of([&] { q.ask(folder.at("new.json")); }),
              HasSubstr("no attention layer that could be replaced: its layers are MMMM, their "
                        "mixers mamba"));
  EXPECT_FALSE(fs::exists(folder.at("new.json")));
}

TEST_F(Scoring, TheOutputIsCheckedBeforeTheWork) {
  const TestFolder folder;
  write_file_atomically(folder.at("precious.json"), "{\"of\": \"someone\"}\n");
  EXPECT_THAT(testing::message_of([&] { check_scores_path(folder.at("precious.json")); }),
              HasSubstr("expected the layer scores"));
  EXPECT_NE(testing::message_of([&] { check_scores_path(folder.at("none/scores.json")); }),
            "no error");
  EXPECT_THAT(testing::message_of([&] { check_scores_path(folder.path()); }),
              HasSubstr("is not a file"));
  EXPECT_EQ(testing::message_of([&] { check_scores_path(folder.at("new.json")); }), "no error");
  EXPECT_FALSE(fs::exists(folder.at("new.json")));
  // An earlier version's file is read, and never continued.
  write_file_atomically(folder.at("old.json"),
                        R"({"method": "mmr", "metric": "loss", "fingerprint": "m AAAA",)"
                        R"( "layers": [{"layer": 0, "score": 1.5, "seconds": 1}], "order": [0]})");
  EXPECT_EQ(read_importance(folder.at("old.json")).layers.size(), 1U);
  Question q;
  EXPECT_THAT(testing::message_of([&] { q.ask(folder.at("old.json")); }),
              HasSubstr("earlier version"));
}

}  // namespace
}  // namespace cambium
