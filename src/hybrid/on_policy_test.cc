// On-policy rounds: the student's own answers, sampled by its weights of the moment.
#include "hybrid/on_policy.h"

#include <gmock/gmock.h>

#include "base/file.h"
#include "base/json.h"
#include "base/test_folder.h"
#include "hybrid/sealed.h"
#include "hybrid/testing.h"
#include "serve/engine.h"

namespace cambium {
namespace {

namespace fs = std::filesystem;
using testing::all_weights;
using testing::byte_tokenizer;
using ::testing::HasSubstr;
using testing::message_of;

ModelSpec spec_of() {
  ModelSpec spec = testing::every_mixer();
  spec.vocab = byte_tokenizer().vocab_size();
  return spec;
}

class OnPolicyTest : public ::testing::Test {
 protected:
  void SetUp() override {
    Progress::silence(true);
    std::string lines;
    for (int i = 0; i < 9; ++i) {
      lines += R"({"prompt": "say )" + std::to_string(i) + "\"}\n";
    }
    write_file_atomically(folder_.at("prompts.jsonl"), lines);
    config_ = testing::tiny_config(4);
    config_.loss = on_policy_loss();
    config_.sequence_length = 40;
    config_.checkpoint_every = 1;
    config_.keep_checkpoints = 10;
    config_.resume = true;
    on_policy_ = {.round_prompts = 3, .samples = 2, .max_new_tokens = 8};
  }
  void TearDown() override { Progress::silence(false); }

  /// Weights after the run, or after the checkpoint of `stop` steps alone is left.
  std::vector<float> run(const std::string& name, const std::string& prompts = "prompts.jsonl",
                         TrainSummary* summary = nullptr) {
    TrainConfig config = config_;
    config.folder = folder_.at(name);
    LoadedModel student = fresh_model(spec_of(), 1);
    LoadedModel teacher = fresh_model(spec_of(), 2);
    const auto source = load_prompts(folder_.at(prompts), tokenizer_);
    const TrainSummary done =
        run_on_policy(student, config, on_policy_, *source, tokenizer_, *teacher.model);
    if (summary != nullptr) {
      *summary = done;
    }
    return all_weights(*student.model);
  }

  TestFolder folder_;
  Tokenizer tokenizer_ = byte_tokenizer();
  TrainConfig config_;
  OnPolicyConfig on_policy_;
};

TEST_F(OnPolicyTest, GoesOnFromAnyCheckpointBitForBit) {
  TrainSummary summary;
  const std::vector<float> whole = run("whole", "prompts.jsonl", &summary);
  EXPECT_EQ(run("again"), whole);
  EXPECT_GT(summary.data.next_sample, 3U);  // more than one round
  EXPECT_TRUE(fs::exists(folder_.at("whole/rounds/000001.json")));
  for (const int64_t kept : {1, 2, 3}) {
    const std::string name = "kept-" + std::to_string(kept);
    fs::copy(folder_.at("whole"), folder_.at(name), fs::copy_options::recursive);
    for (int64_t step = kept + 1; step <= 4; ++step) {
      fs::remove_all(folder_.at(fmt::format("{}/checkpoints/step-{:06}", name, step)));
    }
    EXPECT_EQ(run(name), whole) << kept;
    EXPECT_EQ(testing::curve(folder_.at(name)), testing::curve(folder_.at("whole")));
  }
  // Rounds that are not there are sampled again where the weights are still those of then.
  fs::copy(folder_.at("whole"), folder_.at("anew"), fs::copy_options::recursive);
  fs::remove_all(folder_.at("anew/checkpoints"));
  EXPECT_EQ(run("anew"), whole);
}

// What a round asks and answers: as the engine answers with the weights of the moment.
TEST_F(OnPolicyTest, ARoundIsWhatTheStudentAnswers) {
  run("run");
  const std::string file = folder_.at("run/rounds/000000.json");
  const auto round = parse_json<nlohmann::json>(read_sealed(file), file);
  ASSERT_EQ(round["answers"].size(), 6U);
  LoadedModel student = fresh_model(spec_of(), 1);
  const auto prompts = load_prompts(folder_.at("prompts.jsonl"), tokenizer_);
  Engine engine(*student.model, {.deterministic = true});
  for (uint64_t i = 0; i < 6; ++i) {
    GenerationRequest request;
    request.prompt = prompts->document(document_at(*prompts, config_.seed, i / 2)).tokens;
    request.max_new_tokens = 8;
    request.stop_ids = tokenizer_.eos_ids();
    for (const int64_t id : student.model->spec().eos_ids) {
      request.stop_ids.push_back(static_cast<int32_t>(id));
    }
    request.sampling.temperature = 1.0F;
    request.seed = mix_seed(config_.seed, 0);
    request.stream = i;
    std::vector<int32_t> tokens = request.prompt;
    std::vector<GenerationRequest> one;
    one.push_back(std::move(request));
    const GenerationResult result = std::move(engine.generate(std::move(one))[0]);
    tokens.insert(tokens.end(), result.tokens.begin(), result.tokens.end());
    if (result.reason == FinishReason::kStop) {
      tokens.push_back(tokenizer_.eos_ids()[0]);
    }
    EXPECT_EQ(round["answers"][i]["tokens"].get<std::vector<int32_t>>(), tokens) << i;
  }
}

TEST_F(OnPolicyTest, SaysWhatIsWrong) {
  write_file_atomically(folder_.at("text.jsonl"), "{\"text\": \"a b c\"}\n");
  EXPECT_THAT(message_of([&] { run("a", "text.jsonl"); }), HasSubstr("expected a prompt"));
  EXPECT_THAT(message_of([&] { run("b", "absent.jsonl"); }), HasSubstr("absent.jsonl"));
  const TrainConfig good = config_;
  config_.loss.cross_entropy = 1.0F;
  EXPECT_THAT(message_of([&] { run("c"); }), HasSubstr("own answers are no labels"));
  config_.loss = {};
  EXPECT_THAT(message_of([&] { run("d"); }), HasSubstr("give reverse_kl or forward_kl a weight"));
  config_ = good;
  run("e");
  on_policy_.temperature = 0.5;
  EXPECT_THAT(message_of([&] { run("e"); }), HasSubstr("data: was on-policy"));
  on_policy_.temperature = 1.0;
  for (const auto& round : fs::directory_iterator(folder_.at("e/rounds"))) {
    std::string text = read_text_file(round.path().string());
    text[text.size() - 10] ^= 1;
    write_file_atomically(round.path().string(), text);
  }
  fs::remove_all(folder_.at("e/checkpoints/step-000004"));
  fs::remove_all(folder_.at("e/checkpoints/step-000003"));
  EXPECT_THAT(message_of([&] { run("e"); }), HasSubstr("is not what was written"));
  // Plain text is no prompt in training documents either.
  LoadedModel student = fresh_model(spec_of(), 1);
  LoadedModel teacher = fresh_model(spec_of(), 2);
  const auto texts = load_jsonl(folder_.at("text.jsonl"), tokenizer_);
  EXPECT_THAT(message_of([&] {
                run_on_policy(student, config_, on_policy_, *texts, tokenizer_, *teacher.model);
              }),
              HasSubstr("document 0 of the prompts has no prompt"));
}

// A stage of a plan asks generated problems, the run's own data, and goes on in them.
TEST_F(OnPolicyTest, IsAStageOfAPlan) {
  testing::write_inputs(folder_.path(), testing::kMeasuresLittle + R"([graft]
mixer = "gated_delta_net"
calibrate = 0
[place]
method = "uniform"
[[stage]]
name = "one"
layers = 2
[stage.on_policy]
steps = 2
sequence_length = 320
round_prompts = 2
max_new_tokens = 6
checkpoint_every = 1
)");
  const RunSummary summary = testing::run(folder_.path(), "run");
  ASSERT_EQ(summary.curves.size(), 1);
  EXPECT_EQ(summary.curves[0].phase, "on_policy");
  EXPECT_EQ(summary.curves[0].loss.size(), 2);
  const std::string phase = folder_.at("run/stages/one/attempt-1/on_policy");
  EXPECT_TRUE(fs::exists(phase + "/rounds/000000.json"));
  EXPECT_GT(summary.models[1].next_sample, 0U);
  EXPECT_THAT(message_of([&] {
                testing::run(folder_.path(), "bad", false,
                             {"on_policy.loss.cross_entropy=1", "on_policy.steps=1"});
              }),
              HasSubstr("own answers are no labels"));
  EXPECT_THAT(message_of([&] {
                testing::run(folder_.path(), "bad", false, {"on_policy.prompts=\"nowhere.jsonl\""});
              }),
              HasSubstr("nowhere.jsonl"));
}

}  // namespace
}  // namespace cambium
