// The program as its users run it: help, wrong usage, errors, and commands that need no training
// (of those that answer: answers_test.cc).
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <filesystem>
#include <nlohmann/json.hpp>
#include <vector>

#include "base/file.h"
#include "base/test_folder.h"
#include "base/test_paths.h"
#include "model/spec.h"
#include "program.h"

namespace cambium {
namespace {

using testing::HasSubstr;

const char* const kCommands[] = {"hybridize", "score",  "place",  "convert",  "distill", "logits",
                                 "train",     "data",   "eval",   "bench",    "report",  "inspect",
                                 "verify",    "import", "export", "generate", "chat"};

TEST(CommandLine, AloneItShowsWhatThereIs) {
  const Outcome outcome = cambium("");
  EXPECT_EQ(outcome.status, 0);
  for (const char* command : kCommands) {
    EXPECT_THAT(outcome.text, HasSubstr(std::string("  ") + command));
  }
  EXPECT_THAT(cambium("--version").text, HasSubstr("cambium "));
}

TEST(CommandLine, EveryCommandExplainsItselfWithExamples) {
  for (const char* command : kCommands) {
    const Outcome outcome = cambium(std::string(command) + " --help");
    EXPECT_EQ(outcome.status, 0) << command;
    EXPECT_THAT(outcome.text, HasSubstr(std::string("cambium ") + command)) << command;
    EXPECT_THAT(outcome.text, HasSubstr("Examples:")) << command;
    EXPECT_THAT(outcome.text, HasSubstr("--threads")) << command;
  }
}

TEST(CommandLine, WrongUsageIsNamedAndTheNearestSuggested) {
  const struct {
    const char* arguments;
    const char* text;
  } rows[] = {
      {"verfy", "did you mean 'verify'"},
      {"zzzzz", "unknown command 'zzzzz'"},
      {"inspect x --memry 3", "did you mean '--memory'"},
      {"generate x --tempreature=1", "did you mean '--temperature'"},
      {"inspect", "model"},
      {"inspect a b", "b"},
      {"bench x --batch many", "many"},
      {"verify x --threads -3", "threads"},
  };
  for (const auto& row : rows) {
    const Outcome outcome = cambium(row.arguments);
    EXPECT_EQ(outcome.status, 2) << row.arguments << "\n" << outcome.text;
    EXPECT_THAT(outcome.text, HasSubstr(row.text)) << row.arguments;
    EXPECT_THAT(outcome.text, HasSubstr("--help")) << row.arguments;
  }
}

TEST(CommandLine, ChoicesAndRangesAreCheckedBeforeAnythingIsRead) {
  const struct {
    const char* arguments;
    const char* text;
  } rows[] = {
      {"distill x -t y -o z --objective alignn", "did you mean 'align'"},
      {"distill x -t y -o z --objective alignn", "end_to_end, align"},
      {"convert x -o y --layers 1 --init randm", "attention, random"},
      {"data problem", "problems, retrieval, mixed"},
      {"data problems --split tests", "train, valid, test"},
      {"data problems --format csv", "qa, messages"},
      {"data problems -n 0", "expected a whole number from 1, got 0"},
      {"data problems --seed -1", "expected a whole number from 0, got -1"},
      {"data problems --seed 99999999999999999999", "99999999999999999999"},
      {"score x --method mrm", "mmr"},
      {"score x --metric kl", "reverse-kl"},
      {"place x --method best", "lowest, uniform"},
      {"place x --method uniform --fraction 1.5", "expected a number from 0 to 1, got 1.5"},
      {"eval x --task gsm", "gsm8k"},
      {"eval x --temperature -1", "expected a number from 0, got -1"},
      {"eval x --temperature nan", "nan"},
      {"generate x -p y --seed ''", "from 0, got nothing"},
      {"generate x -p y --seed 0x10", "from 0, got 0x10"},
      {"generate x -p y --temperature ''", "from 0, got nothing"},
      {"eval x --batch 0x0", "from 1 to 4096, got 0x0"},
      {"eval x --batch 0", "--batch"},
      {"generate x -p y --temperature inf", "inf"},
      {"generate x -p y --top-p 0", "expected a number above 0 to 1, got 0"},
      {"generate x -p y --min-p 2", "--min-p"},
      {"generate x -p y --repetition-penalty 0", "expected a number above 0 to 1000, got 0"},
      {"chat x --presence-penalty 2.1", "expected a number from -2 to 2, got 2.1"},
      {"generate x -p y --frequency-penalty -3", "expected a number from -2 to 2, got -3"},
      {"generate x -i y --logprobs 21", "expected a whole number from 0 to 20, got 21"},
      {"bench x --contexts 512,-1", "expected a whole number from 1, got -1"},
      {"bench x --decode 9223372036854775807", "--decode"},
      {"bench x --repeats 9223372036854775807", "--repeats"},
      {"bench x --storage f16", "stored, f32, bf16"},
      {"bench throughput x --input 0", "expected a whole number from 1"},
      {"bench throughput x --outptu 3", "did you mean '--output'"},
      {"bench throughput x --admission al", "whole, as-needed, got 'al'"},
      {"bench decode x --batch 0", "expected a whole number from 1 to 4096, got 0"},
      {"bench prefill x --decode 3", "unknown option '--decode'"},
      {"inspect x --context 9223372036854775807", "--context"},
      {"eval x -n 9223372036854775807", "--count"},
      {"generate x -p y -n 9223372036854775807", "--max-new-tokens"},
      {"generate x -p y --top-k 9223372036854775807", "--top-k"},
      {"convert x -o y --layers 9223372036854775807", "--layers"},
      {"convert x -o y --layers 1 --mixer manba", "did you mean 'mamba'"},
      {"convert x -o y --layers 1 --storage f16", "f32, bf16, stored"},
      {"convert x -o y --layers 1 --calibrate 8 --calibrate-tokens 1", "--calibrate-tokens"},
      {"merge x y -o z --storage f16", "f32, bf16, got 'f16'"},
      {"score x --method mmr --mixer manba", "did you mean 'mamba'"},
      {"score x --metric accuracy --task gsm", "gsm8k, math500"},
      {"hybridize x --flops 0", "--flops"},
  };
  for (const auto& row : rows) {
    const Outcome outcome = cambium(row.arguments);
    EXPECT_EQ(outcome.status, 2) << row.arguments << "\n" << outcome.text;
    EXPECT_THAT(outcome.text, HasSubstr(row.text)) << row.arguments;
  }
}

// Standard output and error that are full or closed: what is lost there is said where it can be,
// and nothing of it goes anywhere else.
TEST(CommandLine, StreamsThatCannotBeWritten) {
  const TestFolder folder;
  const std::string generate = "generate " + teacher() + " -p Tom -n 2";
  EXPECT_EQ(cambium(generate + " 2>/dev/full").status, 0);
  EXPECT_EQ(cambium("zzz 2>/dev/full").status, 2);
  EXPECT_EQ(cambium("inspect /nowhere 2>/dev/full").status, 1);
  for (const std::string& command :
       {generate, "inspect " + teacher(), std::string("data problems -n 3"),
        std::string("data problems -n 1000000000")}) {
    const Outcome full = cambium(command + " >/dev/full");
    EXPECT_EQ(full.status, 1) << command;
    EXPECT_THAT(full.text, HasSubstr("cannot write standard output")) << command;
  }
  const std::string prompts = folder.at("in.jsonl");
  write_file_atomically(prompts, "{\"prompt\": \"Tom\"}\n");
  const std::string batch =
      "generate " + teacher() + " -n 2 -i " + prompts + " -o " + folder.at("out.jsonl");
  EXPECT_EQ(cambium(batch + " >&- 2>&-").status, 0);
  EXPECT_TRUE(read_text_file(folder.at("out.jsonl")).starts_with("{\"prompt\":\"Tom\""));
}

TEST(CommandLine, OptionsThatWouldDoNothingAreRefused) {
  const struct {
    const char* arguments;
    const char* text;
  } rows[] = {
      {"eval x --task gsm8k", "--data"},
      {"convert x -o y --layers 1 --count 3", "--count belongs to --scores"},
      {"convert x -o y --layers 1 --calibrate 0", "--calibrate: expected at least 1 document"},
      {"convert x -o y --layers 1 --calibrate 4 --init random", "not go with a random start"},
      {"convert x -o y --layers 1 --bank a=b", "--bank belongs to --placement"},
      {"convert x -o y --placement p --layers 1", "--placement says which layers"},
      {"convert x -o y --placement p --mixer mamba2", "--placement says which layers"},
      {"place x --method uniform --count 2 --speedup 2", "--speedup belongs to --method search"},
      {"place x --method search --count 2", "--count belongs to"},
      {"place x --method search", "expected --bank KIND=DIR"},
      {"place x --method search --bank a=b -o y", "expected one of --budget, --speedup"},
      {"place x --method search --bank a=b -o y --speedup 0.5", "at least 1, got 0.5"},
      {"place x --method search --bank a=b -o y --speedup 2 --at-most gdn", "such as attention=5"},
      {"place x --method search --bank a=b -o y --speedup 2 --none-or-at-least gdn",
       "--none-or-at-least: expected KIND=LAYERS"},
      {"place x --none-or-at-least gdn=2", "--none-or-at-least belongs to --method search"},
      {"place x --method search --bank a=b -o y --speedup 2 --problems 3", "--problems belongs to"},
      {"score x --method restore-one", "expected --student"},
      {"score x --student y", "--student belongs to --method restore-one and gates"},
      {"score x --method gates", "--method gates: expected --student"},
      {"score x --method gates --student y --metric nll", "--metric belongs to"},
      {"score x --price 2", "--price belongs to --method gates"},
      {"score x --method mmr --retrieval-share 0.5", "--retrieval-share belongs to --method gates"},
      {"eval x --data y", "--data belongs to"},
      {"generate x -p y --logprobs 3", "--logprobs and --samples belong to --input"},
      {"generate x -i y --samples 3", "give --temperature"},
      {"generate x -i y --task gsm8k -d z", "one of --prompt, --input and --task"},
      {"generate x --task gsm8k", "--task and --data belong together"},
      {"generate x -i y -d z", "--task and --data belong together"},
      {"eval x --task text --data y --chat", "--chat belongs to"},
      {"eval x --task svamp --data y --teacher z", "--teacher belongs to"},
      {"eval x --task svamp --data y --set word.max_steps=3", "--set belongs to"},
      {"eval", "a checkpoint folder or --answers FILE, got neither"},
      {"eval x --answers y", "a checkpoint folder or --answers FILE, got both"},
      {"eval --answers y --chat", "--chat belongs to"},
      {"eval --answers y --ungraded", "--ungraded belongs to"},
      {"eval x --task text --data y --ungraded", "--ungraded belongs to"},
      {"eval --task gsm8k --data y --answers z --cache f8", "--cache belongs to"},
      {"eval x --ungraded", "expected --output"},
  };
  for (const auto& row : rows) {
    const Outcome outcome = cambium(row.arguments);
    EXPECT_EQ(outcome.status, 1) << row.arguments << "\n" << outcome.text;
    EXPECT_THAT(outcome.text, HasSubstr(row.text)) << row.arguments;
  }
}

TEST(CommandLine, APlanWhoseTeacherIsNotThereSaysSo) {
  const Outcome outcome =
      cambium("hybridize '" + std::string(kSourceDir) + "/plans/demo.toml' -t nowhere --dry-run");
  EXPECT_EQ(outcome.status, 1);
  EXPECT_THAT(outcome.text, HasSubstr("the teacher 'nowhere' is not there"));
}

// Not at the first question: a template may also stand in a file of its own.
TEST(CommandLine, AChatTemplateThatCannotBeUsedIsNamedAtOnce) {
  const TestFolder folder;
  const std::string model = folder.at("model");
  std::filesystem::copy(teacher(), model);
  write_file_atomically(model + "/chat_template.jinja", "{{ messages | no_such_filter }}");
  const std::pair<std::string, const char*> rows[] = {
      {"chat " + model, "use cambium generate"},
      {"chat " + model + " --system x", "use cambium generate"},
      {"generate " + model + " --chat -p x", "leave --chat away"},
      {"eval " + model + " --chat -n 1", "leave --chat away"},
  };
  for (const auto& [arguments, instead] : rows) {
    const Outcome outcome = cambium(arguments);
    EXPECT_EQ(outcome.status, 1) << arguments << "\n" << outcome.text;
    EXPECT_THAT(outcome.text, HasSubstr(model + ": the chat template cannot be used: "));
    EXPECT_THAT(outcome.text, HasSubstr("no_such_filter"));
    EXPECT_THAT(outcome.text, HasSubstr(instead));
  }
}

TEST(CommandLine, OutputsAreOpenedBeforeTheWork) {
  const TestFolder folder;
  const std::string model = std::string(kSourceDir) + "/models/teacher";
  write_file_atomically(folder.at("in.jsonl"), "{\"prompt\": \"Tom\"}\n");
  std::filesystem::create_directory(folder.at("pipes"));
  const std::string pipe = folder.at("pipes/pipe");
  ASSERT_EQ(::mkfifo(pipe.c_str(), 0666), 0);
  for (const std::string& output : {std::string("/none/x"), folder.path(), pipe}) {
    EXPECT_EQ(cambium("data problems -n 1 -o " + output).status, 1);
    EXPECT_EQ(cambium("score " + model + " -o " + output).status, 1);
    const Outcome eval = cambium("eval " + model + " -n 2000 -o " + output);
    EXPECT_EQ(eval.status, 1);
    EXPECT_THAT(eval.text, HasSubstr("cannot write " + output));
    const Outcome generate =
        cambium("generate " + model + " -i " + folder.at("in.jsonl") + " -o " + output);
    EXPECT_EQ(generate.status, 1);
    EXPECT_THAT(generate.text, HasSubstr("cannot write " + output));
  }
}

// What a file holds may be meant for a terminal; errors show it as text.
TEST(CommandLine, ErrorsPrintNoControlCharacters) {
  const TestFolder folder;
  write_file_atomically(folder.at("config.json"),
                        "{\"model_type\": \"ll\\u001b]0;owned\\u0007ama\"}");
  const Outcome outcome = cambium("inspect " + folder.path());
  EXPECT_EQ(outcome.status, 1);
  EXPECT_THAT(outcome.text, HasSubstr("owned"));
  EXPECT_THAT(outcome.text, ::testing::Not(HasSubstr("\x1b")));
  EXPECT_THAT(outcome.text, ::testing::Not(HasSubstr("\x07")));
}

// A model trained with the tokenizer of another folder has it beside it.
TEST(CommandLine, TrainingWithAGivenTokenizerKeepsIt) {
  const TestFolder folder;
  const Outcome outcome =
      cambium("train '" + std::string(kSourceDir) + "/plans/teacher.toml' -o " + folder.at("run") +
              " --set train.steps=1 --set train.sequence_length=640 --set model.layers=1"
              " --set tokenizer.path='\"" +
              teacher() + "\"'");
  EXPECT_EQ(outcome.status, 0) << outcome.text;
  EXPECT_EQ(cambium("generate " + folder.at("run/model") + " -p Tom -n 1").status, 0);
}

// The layers of a hybrid, with weights of their own.
TEST(CommandLine, AHybridIsTrainedFromScratchByItsConfig) {
  const TestFolder folder;
  ASSERT_EQ(cambium("convert " + teacher() + " -o " + folder.at("h") +
                    " --layers 1,3 --mixer gated_delta_net")
                .status,
            0);
  const std::string plan = "[model]\nconfig = \"" + folder.at("h/config.json") +
                           "\"\n[tokenizer]\npath = \"" + teacher() +
                           "\"\n[train]\nsteps = 1\nsequence_length = 640\n";
  write_file_atomically(folder.at("plan.toml"), plan);
  const std::string train = "train " + folder.at("plan.toml") + " -o " + folder.at("run");
  const Outcome outcome = cambium(train);
  EXPECT_EQ(outcome.status, 0) << outcome.text;
  EXPECT_THAT(cambium("inspect " + folder.at("run/model")).text, HasSubstr("AGAGAA"));
  const Outcome both = cambium(train + "x --set model.width=64");
  EXPECT_EQ(both.status, 1);
  EXPECT_THAT(both.text, HasSubstr("config says the model's shape: leave width out"));
  // A tokenizer of more tokens than the model has does not fit.
  write_file_atomically(folder.at("plan.toml"), plan.substr(0, plan.find("[tokenizer]")) +
                                                    "[tokenizer]\nvocabulary = 700\n" +
                                                    plan.substr(plan.find("[train]")));
  EXPECT_THAT(cambium(train + "y").text, HasSubstr("has 640 tokens, the tokenizer 700"));
}

TEST(CommandLine, ErrorsNameWhatIsWrong) {
  TestFolder folder;
  write_file_atomically(folder.at("config.json"), "{\"model_type\": \"lama\"}");
  // A model with the tokenizer of another.
  std::filesystem::copy(fixture("llama"), folder.at("other"));
  for (const char* name : {"tokenizer.json", "tokenizer_config.json"}) {
    std::filesystem::copy(std::filesystem::path(teacher()) / name, folder.at("other"));
  }
  auto uneven = nlohmann::json::parse(read_text_file(fixture("llama") + "/config.json"));
  uneven["num_key_value_heads"] = 3;
  write_file_atomically(folder.at("uneven.json"), uneven.dump());
  const struct {
    std::string arguments;
    const char* text;
  } rows[] = {
      {"inspect /nowhere", "/nowhere/config.json"},
      {"inspect " + folder.at("uneven.json"),
       "uneven.json: layer 0: attention: expected kv_heads to divide heads, got heads=4"},
      {"inspect " + folder.path(), "did you mean 'llama'"},
      {"verify " + fixture("llama") + " --reference /nowhere.safetensors", "/nowhere.safetensors"},
      {"verify " + fixture("llama") + " --storage bf16 --reference values.json",
       "a reference of logits (.safetensors) alone, got values.json"},
      {"inspect " + fixture("llama") + " --memory-total lots", "24GiB"},
      {"inspect " + fixture("llama") + " --memory-total 1e300GiB", "24GiB"},
      {"bench train", "expected --random-weights"},
      {"bench train --random-weights " + fixture("llama") + " --mode stage-a", "--teacher-random"},
      {"bench train --random-weights " + fixture("llama") + " --sequence 64 --tokens-per-step 96",
       "multiple of the 64 tokens"},
      {"bench " + fixture("llama") + " --contexts 9223372036854775807", "context"},
      {"inspect " + fixture("llama") + " --memory-total infGB", "24GiB"},
      {"generate " + fixture("llama") + " -p hello", "tokenizer.json"},
      {"distill x -t y -o " + folder.at("out") + " --set on_policy.samples=2",
       "--set on_policy.samples belongs to --objective on-policy, not end_to_end"},
      {"score " + folder.at("other"), "the tokenizer has 640 tokens, the model only 384"},
      {"distill " + folder.at("other") + " -t y -o " + folder.at("out"),
       "the tokenizer has 640 tokens, the model only 384"},
  };
  for (const auto& row : rows) {
    const Outcome outcome = cambium(row.arguments);
    EXPECT_EQ(outcome.status, 1) << row.arguments << "\n" << outcome.text;
    EXPECT_THAT(outcome.text, HasSubstr("cambium: error: ")) << row.arguments;
    EXPECT_THAT(outcome.text, HasSubstr(row.text)) << row.arguments;
  }
}

TEST(CommandLine, DevicesAreNamedOrRefused) {
  for (const auto& [name, expected] :
       {std::pair{"gpu", "--device: expected auto, cpu, cuda or cuda:N, got 'gpu'"},
        std::pair{"cuda:", "--device: expected auto, cpu, cuda or cuda:N, got 'cuda:'"},
        std::pair{"cuda:-1", "--device: expected auto, cpu, cuda or cuda:N, got 'cuda:-1'"},
        std::pair{"cuda:77", "--device: there is no cuda:77: "}}) {
    const Outcome outcome =
        cambium("verify " + fixture("llama") + " --device " + std::string(name));
    EXPECT_EQ(outcome.status, 1) << name;
    EXPECT_THAT(outcome.text, HasSubstr(expected));
  }
}

TEST(CommandLine, VerifyTellsByItsStatus) {
  const Outcome good = cambium("verify " + fixture("qwen3"));
  EXPECT_EQ(good.status, 0) << good.text;
  EXPECT_THAT(good.text, HasSubstr("token by token"));
  // The weights of one model beside the reference of another of its shape.
  const Outcome bad = cambium("verify " + fixture("mistral") + " --reference " +
                              fixture("mistral_swa") + "/reference.safetensors");
  EXPECT_EQ(bad.status, 1) << bad.text;
  EXPECT_THAT(bad.text, HasSubstr("FAILED"));
}

// What rounding may do is less than what another model does.
TEST(CommandLine, VerifyHoldsBf16ToItsOwnBounds) {
  const std::string rounded = "verify " + fixture("mistral") + " --storage bf16 --reference ";
  const Outcome good = cambium(rounded + fixture("mistral") + "/reference.safetensors");
  EXPECT_EQ(good.status, 0) << good.text;
  const Outcome bad = cambium(rounded + fixture("mistral_swa") + "/reference.safetensors");
  EXPECT_EQ(bad.status, 1) << bad.text;
  EXPECT_THAT(bad.text, HasSubstr("FAILED"));
}

TEST(CommandLine, InspectCountsBeforeAnythingIsLoaded) {
  TestFolder folder;  // a configuration without weights
  write_file_atomically(folder.at("config.json"),
                        read_text_file(fixture("llama") + "/config.json"));
  const std::string inspect = "inspect " + folder.path();
  const Outcome outcome = cambium(inspect + " --json --cache f32");
  ASSERT_EQ(outcome.status, 0) << outcome.text;
  const auto json = nlohmann::json::parse(outcome.text);
  EXPECT_EQ(json["parameters"], 126400);
  EXPECT_EQ(json["layers"], 3);
  // Three layers of two key-value heads of 16, keys and values, fp32.
  EXPECT_EQ(json["cache_bytes_per_token"], 3 * 2 * 2 * 16 * 4);
  EXPECT_FALSE(json.contains("memory"));
  const Outcome narrow = cambium(inspect + " --json");
  EXPECT_EQ(nlohmann::json::parse(narrow.text)["cache_bytes_per_token"], 3 * 2 * 2 * 16 * 2);
  // In fp8, and for each of the heads a scale in bf16.
  const Outcome least = cambium(inspect + " --json --cache f8");
  EXPECT_EQ(nlohmann::json::parse(least.text)["cache_bytes_per_token"], 3 * 2 * 2 * (16 + 2));
  EXPECT_THAT(cambium(inspect + " --cache f16").text, HasSubstr("bf16, f32, f8"));
}

// Mixtures of experts, hybrids, windows and several mixers side by side.
TEST(CommandLine, InspectCountsUnitsByKind) {
  const auto json =
      nlohmann::json::parse(cambium("inspect " + fixture("nemotron_h_moe") + " --json").text);
  EXPECT_EQ(json["mixers"].size(), 2U);
  const auto& experts = json["feed_forwards"]["experts"];
  EXPECT_EQ(experts["layers"], 3);
  // A token goes to some of the experts alone.
  EXPECT_EQ(json["parameters"].get<int64_t>() - json["active_parameters"].get<int64_t>(),
            experts["parameters"].get<int64_t>() - experts["active_parameters"].get<int64_t>());
  EXPECT_LT(experts["active_parameters"], experts["parameters"]);
  EXPECT_THAT(cambium("inspect " + fixture("nemotron_h_moe")).text,
              HasSubstr(" active for a token), 7 layers"));
  const auto beside =
      nlohmann::json::parse(cambium("inspect " + fixture("falcon_h1") + " --json").text);
  EXPECT_EQ(beside["mixers"]["attention"]["layers"], 3);
  EXPECT_EQ(beside["mixers"]["attention"]["bytes_per_token"], beside["cache_bytes_per_token"]);
  EXPECT_EQ(beside["mixers"]["mamba2"]["bytes_per_token"], 0);
}

// Of what a token looks at: how much, chosen by whom, in which layers.
TEST(CommandLine, InspectSaysWhatAnIndexChooses) {
  const auto indexes = [](const std::string& model) {
    return nlohmann::json::parse(cambium("inspect " + model + " --json").text)["indexes"];
  };
  EXPECT_TRUE(indexes(fixture("llama")).is_null());
  EXPECT_EQ(indexes(fixture("deepseek_v32")), nlohmann::json::parse(R"([{
    "mixer": "latent_attention", "layers": [0, 1, 2, 3], "heads": 16, "key_width": 32,
    "chooses": "tokens", "for_each": "token", "top": 16, "budget": 16}])"));
  EXPECT_THAT(cambium("inspect " + fixture("deepseek_v32")).text,
              HasSubstr("\nan index of 16 heads, keys of 32 channels, in 4 layers (0,1,2,3):\n"
                        "  a token looks at 16 tokens; in texts of up to 16 tokens, at all\n"));
  EXPECT_EQ(indexes(fixture("minimax_m3")), nlohmann::json::parse(R"([{
    "mixer": "attention", "layers": [1, 2], "heads": 2, "key_width": 16,
    "chooses": "blocks", "for_each": "head of keys", "top": 3, "size": 8, "local": 1,
    "budget": 24}])"));
  EXPECT_THAT(cambium("inspect " + fixture("minimax_m3")).text,
              HasSubstr("  a token, for each head of keys, looks at 3 blocks of 8 tokens, the last "
                        "1 always; in texts of up to 24 tokens, at all\n"));
  // Pools in one layer of our own layout, tokens in another.
  TestFolder folder;
  ModelSpec spec = read_spec(fixture("llama"));
  spec.family = "cambium";
  for (size_t i = 0; i < 2; ++i) {
    Options& options = spec.layers[i].mixer()->options;
    options.set("index_heads", options.integer("attention", "kv_heads"));
    options.set("index_dim", int64_t{16});
    options.set("index_of", i == 0 ? "pools" : "tokens");
    options.set("index_top", int64_t{3});
  }
  spec.layers[0].mixer()->options.set("index_size", int64_t{4});
  write_file_atomically(folder.at("config.json"), find_family("cambium").write_config(spec));
  const auto of_layers = indexes(folder.path());
  ASSERT_EQ(of_layers.size(), 2U);
  EXPECT_EQ(of_layers[0]["layers"].dump(), "[0]");
  EXPECT_EQ(of_layers[0]["budget"], 15);  // three whole ones, and all but one of the next
  EXPECT_FALSE(of_layers[0].contains("local"));
  EXPECT_EQ(of_layers[1]["chooses"], "tokens");
  EXPECT_THAT(cambium("inspect " + folder.path()).text,
              HasSubstr("looks at 3 pools of 4 tokens and what comes after the last whole one;"));
}

TEST(CommandLine, PlaceSaysWhatThereIsToConvert) {
  struct Row {
    const char* arguments;
    int status;
    const char* text;
  };
  for (const Row& row : std::initializer_list<Row>{
           {"olmo3 --method uniform --cache-per-token 100", 0, "3\n"},  // the one without a window
           {"smollm3 --method uniform --fraction 0.4", 0, "1,3\n"},
           {"nemotron_h --method uniform --fraction 1", 0, "5\n"},
           {"qwen3_next --method uniform --fraction 0.5", 1,
            "--fraction 0.5: 3 of the 4 layers that have a mixer have another than attention "
            "already "
            "(GGGA); give a larger one, or --count"},
           {"mistral_swa --method uniform --cache-per-token 100", 1,
            "--cache-per-token 100: the cache takes no more than that as it is"},
           {"falcon_h1 --method uniform --fraction 0.5", 0, "0,2\n"},  // beside Mamba-2
           {"llama --method uniform --count 4", 1,
            "4 layers are to be converted, but only 3 still have attention"}}) {
    const Outcome outcome = cambium("place " + fixture(row.arguments));
    EXPECT_EQ(outcome.status, row.status) << row.arguments;
    EXPECT_THAT(outcome.text, HasSubstr(row.text)) << row.arguments;
  }
}

// Of a GPU that need not be there: as much of everything as its shapes say.
TEST(CommandLine, InspectPlansMemory) {
  TestFolder folder;
  write_file_atomically(folder.at("config.json"),
                        read_text_file(fixture("llama") + "/config.json"));
  const std::string inspect = "inspect " + folder.path() + " --storage bf16";
  const Outcome outcome = cambium(inspect + " --memory-total 2GiB --max-sequences 7 --json");
  ASSERT_EQ(outcome.status, 0) << outcome.text;
  const auto memory = nlohmann::json::parse(outcome.text)["memory"];
  EXPECT_EQ(memory["total"], int64_t{2} << 30);
  EXPECT_GT(memory["weights"], 126400 * 2);  // norms are fp32
  EXPECT_LT(memory["weights"], 126400 * 2 * 11 / 10);
  EXPECT_EQ(memory["sequences"], 7);
  EXPECT_EQ(memory["cache_tokens"], 7 * 512);
  EXPECT_EQ(memory["cache"], 7 * 512 * 384);
  EXPECT_EQ(memory["page_size"], 256);  // a token of a layer takes 128 bytes
  EXPECT_EQ(memory["total"].get<int64_t>() - memory["left"].get<int64_t>(),
            memory["weights"].get<int64_t>() + memory["workspace"].get<int64_t>() +
                memory["cache"].get<int64_t>() + memory["reserve"].get<int64_t>() +
                memory["in_use"].get<int64_t>());
  const Outcome asked =
      cambium(inspect + " --memory-total 2GiB --max-sequences 7 --page-size 48 --json");
  EXPECT_EQ(nlohmann::json::parse(asked.text)["memory"]["cache_tokens"], 7 * 11 * 48);
  EXPECT_THAT(cambium(inspect + " --memory-total 2GiB --page-size -1").text,
              HasSubstr("--page-size"));
  const Outcome table = cambium(inspect + " --memory-total 2GiB --cache-memory 400KiB");
  EXPECT_EQ(table.status, 0);
  EXPECT_THAT(table.text, HasSubstr("in pages of 256"));
  for (const char* row : {"weights", "workspace", "cache", "reserve", "left"}) {
    EXPECT_THAT(table.text, HasSubstr(row));
  }
  const Outcome small = cambium(inspect + " --memory-total 300MiB");
  EXPECT_EQ(small.status, 1);
  EXPECT_THAT(small.text, HasSubstr("a sequence takes at least"));
  EXPECT_EQ(cambium(inspect + " --memory --device cpu").status, 0);
}

// Scores of another question are never given, whatever was changed; D1 of what was found once.
TEST(CommandLine, ScoresAreNeverStale) {
  const TestFolder folder;
  const std::string scores = " -o " + folder.at("s.json");
  const std::string model = std::string(kSourceDir) + "/models/teacher";
  const std::string first = "score " + model + " --documents 2 --max-tokens 40" + scores;
  write_file_atomically(folder.at("a.jsonl"), "{\"text\": \"one two three\"}\n");
  const std::string data = " --data " + folder.at("a.jsonl");
  ASSERT_EQ(cambium(first + data).status, 0);
  EXPECT_EQ(cambium(first + data).status, 0);
  // The data's contents, not its name.
  write_file_atomically(folder.at("a.jsonl"), "{\"text\": \"one two four\"}\n");
  const Outcome changed = cambium(first + data);
  EXPECT_EQ(changed.status, 1);
  EXPECT_THAT(changed.text, HasSubstr("holds scores of something else"));
  EXPECT_THAT(changed.text, HasSubstr("data: "));
  EXPECT_EQ(cambium(first + data + " --fresh").status, 0);
  EXPECT_EQ(cambium(first + data + " --metric nll").status, 1);
  EXPECT_EQ(cambium(first + data + " --method leave-block-out").status, 1);
  EXPECT_EQ(cambium(first + data + " --method window-swap --window 4 --fresh").status, 0);
  // What does nothing is refused, and an output that cannot be written before the work.
  EXPECT_THAT(cambium(first + data + " --window 4").text, HasSubstr("--window belongs to"));
  EXPECT_THAT(cambium(first + data + " --sinks 4").text, HasSubstr("--sinks belongs to"));
  EXPECT_THAT(cambium(first + data + " --problems 4").text, HasSubstr("--problems belongs to"));
  EXPECT_EQ(cambium("score " + model + data + " -o /none/s.json").status, 1);
}

// From banks to a hybrid that loads, twice the same, by what is kept.
TEST(CommandLine, APlacementIsSearchedAndBuilt) {
  const TestFolder folder;
  const std::string model = std::string(kSourceDir) + "/models/teacher";
  const std::string bank = folder.at("win");
  ASSERT_EQ(cambium("convert " + model + " -o " + bank +
                    " --layers 3,4,5,6 --mixer sliding_window --window 16")
                .status,
            0);
  const std::string output = folder.at("p.json");
  const std::string search = "place " + model + " --method search --bank win=" + bank +
                             " --cost cache --context 2048 --documents 2 --evaluations 12 -o " +
                             output + " --budget ";
  const Outcome first = cambium(search + "0.9");
  ASSERT_EQ(first.status, 0) << first.text;
  EXPECT_THAT(first.text, HasSubstr("worse than the chosen one by"));
  const std::string placed = read_text_file(output);
  EXPECT_EQ(cambium(search + "0.9").status, 0);
  EXPECT_EQ(read_text_file(output), placed) << "what was measured is kept, and decides";
  EXPECT_THAT(cambium(search + "0.1").text, HasSubstr("the budget cannot be kept"));
  const std::string hybrid = folder.at("hybrid");
  const Outcome built = cambium("convert " + model + " -o " + hybrid + " --placement " + output);
  EXPECT_EQ(built.status, 0) << built.text;
  EXPECT_THAT(cambium("inspect " + hybrid).text, HasSubstr("sliding_window"));
  // Layers of the bank that are the teacher's are told from a bank of another model.
  EXPECT_THAT(cambium("convert " + bank + " -o " + folder.at("x") + " --placement " + output).text,
              HasSubstr("another teacher"));
  EXPECT_THAT(cambium("place " + model + " --method search --bank win=" + model +
                      " --cost cache --budget 0.9 -o " + folder.at("y"))
                  .text,
              HasSubstr("all of its attention is the teacher's"));
}

TEST(CommandLine, MergeWritesAModelThatLoads) {
  const TestFolder folder;
  const std::string model = fixture("llama");
  const Outcome merged =
      cambium("merge " + model + " " + model + " -o " + folder.at("m") + " --weights 3,1");
  EXPECT_EQ(merged.status, 0) << merged.text;
  EXPECT_EQ(cambium("inspect " + folder.at("m")).status, 0);
  EXPECT_THAT(
      cambium("merge " + model + " " + model + " -o " + folder.at("n") + " --weights 1").text,
      HasSubstr("expected one for each of the 2 models"));
  EXPECT_THAT(
      cambium("merge " + model + " " + model + " -o " + folder.at("n") + " --weights 1,x").text,
      HasSubstr("got 'x'"));
  EXPECT_THAT(cambium("merge " + model + " " + fixture("qwen3") + " -o " + folder.at("n")).text,
              HasSubstr("error"));
  EXPECT_EQ(cambium("merge " + model + " " + model + " -o " + folder.at("m")).status, 1);
}

}  // namespace
}  // namespace cambium
