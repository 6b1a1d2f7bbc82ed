// What a dry run says that a plan will take.
#include <gmock/gmock.h>

#include "base/file.h"
#include "base/test_folder.h"
#include "base/text.h"
#include "hybrid/plan.h"
#include "hybrid/testing.h"
#include "train/testing.h"

namespace cambium {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;
using testing::read_plan;

// A dry run counts what answers to learn from take, and what logits do that are to be stored.
TEST(PlanDescription, CountsSamplingAndStoredLogits) {
  const TestFolder folder;
  const std::string file = folder.at("x.logits");
  const HybridPlan plan = read_plan(fmt::format(R"(
[graft]
mixer = "sliding_window"
window = 8
[distill]
steps = 10
sequence_length = 100
logits = {{file = "{}", top_k = 4, documents = 20}}
[[stage]]
layers = 1
[[stage]]
layers = 2
on_policy = {{steps = 5, sequence_length = 40, batch = 8}}
)",
                                                file),
                                    {}, "t");
  const ModelSpec teacher = testing::tiny_attention(4);
  const std::string text = describe_plan(plan, teacher, 1e9);
  // 20 documents of 100 tokens; ids of 24 tokens have 5 bits.
  EXPECT_THAT(text, HasSubstr("x.logits: 13 bytes a token; at most 2.0K tokens, 25.4 KiB on disk"));
  EXPECT_THAT(text, HasSubstr("x.logits: 13 bytes a token; made before"));
  EXPECT_THAT(text, HasSubstr("sample   at most 200 tokens of prompts and answers"));
  EXPECT_THAT(text, HasSubstr("about 25 decode steps"));
  EXPECT_THAT(text, HasSubstr("each of which reads 32.1 KiB of weights"));
  write_file_atomically(file, "there");
  EXPECT_THAT(describe_plan(plan, teacher, 1e9), HasSubstr("13 bytes a token; it is there"));
}

TEST(PlanDescription, CountsWhatTrainingCosts) {
  // 4 layers of 16 channels: q and o 16 x 16, k and v 8 x 16; feed-forward 3 x 24 x 16.
  const HybridPlan plan = read_plan(R"(
[graft]
mixer = "sliding_window"
[distill]
steps = 1
sequence_length = 100
[[stage]]
layers = 2
[[stage]]
layers = 3
distill = {train = "mixers"}
)",
                                    {}, "t");
  const std::string text = describe_plan(plan, testing::tiny_attention(4), 1e9);
  // Norms 9 x 16, embedding 24 x 16 tied, 4 x (768 + 1152): 8208 parameters; 2 FLOPs each forward
  // for the teacher, 2 for the student, 2 for the inputs and 2 for the weights' gradients; scores
  // and values cost 2 x 16 channels x 100 tokens a layer and token, thrice: 4 layers of the
  // teacher, forward and backward of the student's 2.
  EXPECT_THAT(text, HasSubstr("8.2K parameters trained"));
  EXPECT_THAT(text, HasSubstr(fmt::format("{:.3g} FLOP", 100.0 * (8 * 8208 + 3200 * (4 + 2 * 2)))));
  // Mixers only: no weights' gradients for the rest.
  EXPECT_THAT(text, HasSubstr("3.1K parameters trained"));
  EXPECT_THAT(text, HasSubstr(fmt::format("{:.3g} FLOP",
                                          100.0 * (6 * 8208 + 2 * 4 * 768 + 3200 * (4 + 2 * 1)))));
}

// A stage that converts nothing more aligns what is converted.
TEST(PlanDescription, CountsWhatAnAlignmentTrains) {
  const HybridPlan plan = read_plan(R"(
[graft]
mixer = "sliding_window"
[align]
steps = 1
sequence_length = 100
[[stage]]
name = "two"
layers = 2
[[stage]]
name = "three"
layers = 3
[[stage]]
name = "on"
layers = 3
from = "three"
)",
                                    {}, "t");
  const std::string text = describe_plan(plan, testing::tiny_attention(4), 1e9);
  for (const auto& [stage, trained] :
       {std::pair{"two", "1.5K"}, {"three", "768"}, {"on", "2.3K"}}) {
    const std::string told = text.substr(text.find(fmt::format("stage {}:", stage)));
    EXPECT_THAT(told.substr(0, told.find("FLOP")),
                HasSubstr(fmt::format(" {} parameters trained", trained)))
        << stage;
  }
}

TEST(PlanDescription, SaysWhatADeviceHolds) {
  const auto memory = [](const std::string& train, Device device) {
    const HybridPlan plan = read_plan("[graft]\nmixer = \"sliding_window\"\n[optimizer]\n" + train +
                                          "\n[distill]\nsteps = 1\nsequence_length = 8\ntrain = "
                                          "\"converted\"\n[[stage]]\nlayers = 2\n",
                                      {}, "t");
    ModelSpec teacher = testing::tiny_attention(64);
    return describe_plan(plan, teacher, 1e9, device);
  };
  // 64 layers of q, k, v, o (768) and a feed-forward (1152), an embedding of 384, norms of 16;
  // trained are two mixers.
  const int64_t matrices = 64 * (768 + 1152) + 384;
  const int64_t norms = 129 * 16;
  const auto row = [](int64_t bytes, const char* kind) {
    return fmt::format("{:>10}  {}\n", human_bytes(static_cast<uint64_t>(bytes)), kind);
  };
  const std::string on_cuda = memory("", Device::kCuda);
  EXPECT_THAT(on_cuda, HasSubstr("'s distill:"));
  EXPECT_THAT(on_cuda, HasSubstr(row(2 * matrices + 4 * norms, "teacher")));
  EXPECT_THAT(on_cuda, HasSubstr(row(4 * 2 * 768, "trained weights")));
  EXPECT_THAT(on_cuda, HasSubstr(row(4 * 2 * 768, "gradients")));
  EXPECT_THAT(on_cuda, HasSubstr(row(8 * 2 * 768, "optimiser")));
  EXPECT_THAT(on_cuda, Not(HasSubstr("frozen")));
  EXPECT_THAT(memory("", Device::kCpu), HasSubstr(row(4 * (matrices + norms), "teacher")));
  EXPECT_THAT(memory("state = \"bf16\"\noffload = true", Device::kCuda),
              HasSubstr(row(4 * 2 * 768, "optimiser (the host's)")));
}

TEST(PlanDescription, ATeacherMayHaveMixersOfItsOwn) {
  // Mamba of 16 channels in layers 0 and 2; a stage converts one of the two attentions.
  const UnitSpec mamba = {
      "mamba",
      {{"inner", int64_t{16}}, {"xb", int64_t{8}}, {"state", int64_t{4}}, {"dt_rank", int64_t{2}}}};
  const UnitSpec attention = testing::attention_mixer();
  const ModelSpec teacher = testing::tiny_spec({mamba, attention, mamba, attention});
  const HybridPlan plan = read_plan(R"(
[graft]
mixer = "sliding_window"
[distill]
steps = 1
sequence_length = 100
train = "converted"
[[stage]]
layers = 1
place = {method = "mmr", probe = {steps = 10}}
)",
                                    {}, "t");
  const std::string text = describe_plan(plan, teacher, 1e9);
  EXPECT_THAT(text, HasSubstr("mmr: 2 probes of 10 steps"));
  // The new window alone: q, k, v and o.
  EXPECT_THAT(text, HasSubstr("768 parameters trained"));
}

}  // namespace
}  // namespace cambium
