// Models whose weights are packed in fp8: what is written is rounded where bf16 is asked for alone.
#include <gtest/gtest.h>

#include "base/test_folder.h"
#include "program.h"

namespace cambium {
namespace {

// Scaled numbers of fp8 take more bits than bf16 has.
TEST(PackedWeights, AreExactUnlessBf16IsAskedFor) {
  const TestFolder folder;
  const std::string model = fixture("qwen3_fp8");
  const std::string graft = "convert " + model + " --layers 1 --mixer sliding_window --window 512";
  struct Row {
    std::string command;
    const char* option;
    bool exact;
  };
  const Row rows[] = {{graft, "-o", true},  // a window that no text leaves
                      {graft + " --storage stored", "-o", true},
                      {graft + " --storage bf16", "-o", false},
                      {"export " + model, "--transformers", true},
                      {"export " + model + " --storage f32", "--transformers", true},
                      {"export " + model + " --storage bf16", "--transformers", false},
                      {"merge " + model + " " + model, "-o", true}};
  for (const Row& row : rows) {
    SCOPED_TRACE(row.command);
    const std::string out = folder.at("out" + std::to_string(&row - rows));
    const Outcome outcome = cambium(row.command + " " + row.option + " " + out);
    ASSERT_EQ(outcome.status, 0) << outcome.text;
    const Outcome checked =
        cambium("verify " + out + " --reference " + model + "/reference.safetensors");
    EXPECT_EQ(checked.status, row.exact ? 0 : 1) << checked.text;
  }
}

}  // namespace
}  // namespace cambium
