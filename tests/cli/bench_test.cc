// bench as its users run it: what is measured and said. How long it takes is never asserted.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <nlohmann/json.hpp>
#include <set>
#include <string>

#include "base/file.h"
#include "base/test_folder.h"
#include "program.h"

namespace cambium {
namespace {

using testing::HasSubstr;

TEST(Bench, NeedsNoWeights) {
  TestFolder folder;  // a configuration under another name, without weights
  write_file_atomically(folder.at("sizes.json"), read_text_file(fixture("llama") + "/config.json"));
  const Outcome outcome =
      cambium("bench --random-weights " + folder.at("sizes.json") +
              " --contexts 4 --decode 2 --repeats 1 --device cpu --json --quiet");
  ASSERT_EQ(outcome.status, 0) << outcome.text;
  const auto rows = nlohmann::json::parse(outcome.text);
  ASSERT_EQ(rows.size(), 1U);
  EXPECT_GT(rows[0]["prefill"][0], 0.0);
  EXPECT_GE(rows[0]["decode_cpu_ms"][0], 0.0);
  const Outcome nothing = cambium("bench");
  EXPECT_EQ(nothing.status, 1);
  EXPECT_THAT(nothing.text, HasSubstr("--random-weights"));
}

TEST(Bench, OfOneKindStandsBesideTheLimits) {
  const std::string small = " --repeats 1 --contexts 8,300 --batch 2 --device cpu --json --quiet";
  for (const std::string kind : {"decode", "prefill"}) {
    const Outcome outcome = cambium("bench " + kind + " " + fixture("apriel_h1") + small);
    ASSERT_EQ(outcome.status, 0) << outcome.text;
    const auto rows = nlohmann::json::parse(outcome.text);
    ASSERT_EQ(rows.size(), 2U);
    for (const auto& row : rows) {
      EXPECT_GT(row[kind][0], 0.0);
      EXPECT_GT(row["bytes"], 0.0);
      EXPECT_GT(row["share"], 0.0);
      EXPECT_GT(row["limits"]["bytes_per_second"], 0.0);
    }
    EXPECT_GT(rows[1]["flops"], rows[0]["flops"]);
    EXPECT_THAT(cambium("bench " + kind).text, HasSubstr("--random-weights"));
  }
  EXPECT_THAT(cambium("bench throughput --help").text, HasSubstr("--sequences"));
}

TEST(Bench, OfOperationsTakesStepsApart) {
  const std::string bench =
      "bench ops --random-weights " + fixture("apriel_h1") + " --repeats 1 --device cpu";
  const Outcome outcome = cambium(bench + " --sequences 3 --context 20 --tokens 30 --json");
  ASSERT_EQ(outcome.status, 0) << outcome.text;
  const auto models = nlohmann::json::parse(outcome.text);
  ASSERT_EQ(models.size(), 1U);
  EXPECT_GT(models[0]["limits"]["bytes_per_second"], 0.0);
  const auto& steps = models[0]["steps"];
  ASSERT_EQ(steps.size(), 2U);
  EXPECT_EQ(steps[0]["step"], "decode");
  EXPECT_EQ(steps[0]["tokens"], 3);
  EXPECT_EQ(steps[1]["step"], "prefill");
  EXPECT_EQ(steps[1]["tokens"], 30);
  for (const auto& step : steps) {
    EXPECT_TRUE(step["finite"]);
    EXPECT_GT(step["step_ms"], 0.0);
    std::vector<std::string> names;
    for (const auto& op : step["operations"]) {
      names.push_back(op["operation"]);
      EXPECT_GT(op["bytes"], 0.0) << op;
    }
    for (const char* name : {"matmul", "attention", "selective_scan", "short_conv"}) {
      EXPECT_THAT(names, testing::Contains(name));
    }
  }
  const Outcome table = cambium(bench + " --step decode");
  ASSERT_EQ(table.status, 0) << table.text;
  EXPECT_THAT(table.text, HasSubstr("decode, 1 sequences at 1024 tokens"));
  EXPECT_THAT(table.text, HasSubstr("all operations"));
  EXPECT_THAT(table.text, testing::Not(HasSubstr("prefill,")));
  EXPECT_THAT(cambium("bench ops").text, HasSubstr("--random-weights"));
  EXPECT_THAT(cambium("bench ops x --step decod").text, HasSubstr("did you mean 'decode'"));
}

TEST(Bench, OfThroughputRunsTheEngine) {
  const std::string requests = "bench throughput --random-weights " + fixture("llama");
  const std::string bench = requests + " --input 20 --output 5 --batch 3";
  const Outcome outcome = cambium(bench + " --sequences 7 --device cpu --json");
  ASSERT_EQ(outcome.status, 0) << outcome.text;
  const auto rows = nlohmann::json::parse(outcome.text);
  ASSERT_EQ(rows.size(), 1U);
  EXPECT_EQ(rows[0]["largest_batch"], 3);
  EXPECT_GT(rows[0]["output_tokens_per_second"], 0.0);
  EXPECT_GT(rows[0]["token_ms"]["p99"], 0.0);
  EXPECT_GT(rows[0]["peak_bytes"], 0);
  const Outcome table = cambium(bench + " --device cpu");
  ASSERT_EQ(table.status, 0) << table.text;
  EXPECT_THAT(table.text, HasSubstr("32 of 20 tokens in and 5 out"));
  const Outcome dense =
      cambium(requests +
              " --input 20 --output 400 --sequences 9 --cache-memory 330KB --admission as-needed "
              "--device cpu --json");
  ASSERT_EQ(dense.status, 0) << dense.text;
  EXPECT_GT(nlohmann::json::parse(dense.text)[0]["preemptions"], 0);
  const Outcome small = cambium(bench + " --cache-memory 10 --device cpu");
  EXPECT_EQ(small.status, 1);
  EXPECT_THAT(small.text, HasSubstr("a sequence of 24 tokens takes"));
  EXPECT_THAT(cambium(bench + " --cache-memory lots").text, HasSubstr("24GiB"));
}

// A checkpoint of which every number of the last norm is NaN is measured, and said to be broken.
TEST(Bench, SaysThatLogitsAreNotNumbers) {
  const TestFolder folder;
  std::string weights = read_text_file(fixture("llama") + "/model.safetensors");
  uint64_t header = 0;
  std::memcpy(&header, weights.data(), sizeof(header));
  const auto json = nlohmann::json::parse(weights.substr(8, header));
  const auto& place = json["model.norm.weight"]["data_offsets"];
  const auto begin = place[0].get<size_t>();
  weights.replace(8 + header + begin, place[1].get<size_t>() - begin,
                  place[1].get<size_t>() - begin, '\xff');
  write_file_atomically(folder.at("model.safetensors"), weights);
  write_file_atomically(folder.at("config.json"),
                        read_text_file(fixture("llama") + "/config.json"));
  const std::string model = " " + folder.path() + " --device cpu";
  const std::string few = model + " --contexts 4 --repeats 1";
  for (const std::string& arguments :
       {few, " decode" + few, " prefill" + few, " ops --context 4 --tokens 4" + model}) {
    const Outcome outcome = cambium("bench" + arguments);
    EXPECT_EQ(outcome.status, 0) << outcome.text;
    EXPECT_THAT(outcome.text, HasSubstr("its logits are not finite numbers")) << arguments;
  }
  const Outcome engine = cambium("bench throughput --input 4 --output 2 --sequences 2" + model);
  EXPECT_EQ(engine.status, 1);
  EXPECT_THAT(engine.text, HasSubstr("every logit is NaN"));
}

TEST(Bench, MeasuresModelsSideBySide) {
  const Outcome outcome = cambium("bench " + fixture("llama") + " " + fixture("apriel_h1") +
                                  " --contexts 64 --repeats 1 --json");
  ASSERT_EQ(outcome.status, 0) << outcome.text;
  EXPECT_THAT(outcome.text, HasSubstr("prefill"));
  EXPECT_THAT(outcome.text, HasSubstr("apriel_h1"));
}

TEST(Bench, TrainSaysSpeedAndMemory) {
  for (const char* mode : {"train", "distill", "stage-a --convert 1"}) {
    SCOPED_TRACE(mode);
    const Outcome outcome =
        cambium("bench train --random-weights " + fixture("llama") + " --sequence 32 --steps 1 " +
                "--device cpu --json --operations --mode " + mode);
    ASSERT_EQ(outcome.status, 0) << outcome.text;
    const auto json = nlohmann::json::parse(outcome.text);
    EXPECT_GT(json["tokens_per_second"][0].get<double>(), 0.0);
    EXPECT_GT(json["matrix_peak_share"].get<double>(), 0.0);
    EXPECT_EQ(json["optimizer_bytes"], json["planned_bytes"]["optimiser"]);
    const auto& planned = json["planned_bytes"];
    EXPECT_EQ(json["weight_and_gradient_bytes"].get<int64_t>(),
              planned["teacher"].get<int64_t>() + planned["frozen weights"].get<int64_t>() +
                  planned["trained weights"].get<int64_t>() + planned["gradients"].get<int64_t>());
    std::set<std::string> operations;
    for (const auto& line : json["operations"]) {
      EXPECT_GT(line["calls"].get<int64_t>(), 0) << line;
      operations.insert(line["operation"].get<std::string>());
    }
    EXPECT_TRUE(operations.contains("matmul_forward")) << json["operations"];
    EXPECT_TRUE(operations.contains("matmul_grad_weight_of")) << json["operations"];
  }
  const Outcome dry =
      cambium("bench train --random-weights " + fixture("llama") + " --dry-run --device cuda");
  EXPECT_EQ(dry.status, 0) << dry.text;
  EXPECT_NE(dry.text.find("planned in all"), std::string::npos) << dry.text;
}

// Of a size at which the parts that the plan knows of count.
TEST(Bench, TrainTakesWhatItsPlanSays) {
  TestFolder folder;
  write_file_atomically(folder.at("config.json"), R"({"model_type": "llama", "hidden_size": 128,
      "intermediate_size": 384, "num_hidden_layers": 10, "num_attention_heads": 4,
      "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 1024,
      "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": true})");
  for (const char* memory : {"", " --checkpoint-layers"}) {
    SCOPED_TRACE(memory);
    const Outcome outcome = cambium("bench train --random-weights " + folder.path() +
                                    " --sequence 512 --steps 1 --device cpu --json" + memory);
    ASSERT_EQ(outcome.status, 0) << outcome.text;
    const auto json = nlohmann::json::parse(outcome.text);
    const auto& planned = json["planned_bytes"];
    const double taken = json["activation_bytes"];
    EXPECT_NEAR(planned["activations"].get<double>() + planned["logits"].get<double>(), taken,
                0.06 * taken);
  }
}

}  // namespace
}  // namespace cambium
