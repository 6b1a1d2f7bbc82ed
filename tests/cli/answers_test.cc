// Answers from the command line: files of prompts, tasks that are answered, graded and judged.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <nlohmann/json.hpp>
#include <set>
#include <vector>

#include "base/file.h"
#include "base/test_folder.h"
#include "base/test_paths.h"
#include "program.h"

namespace cambium {
namespace {

using testing::AllOf;
using testing::HasSubstr;

// A file from Windows, an empty line, and lines that cannot be answered.
TEST(Answers, ABatchAnswersWhatItCan) {
  const TestFolder folder;
  const std::string model = std::string(kSourceDir) + "/models/teacher";
  std::string lines = "{\"prompt\": \"Tom has 3\", \"id\": 7}\r\n\r\n{\"prompt\": 4}\r\nnot JSON\n";
  lines +=
      "{\"prompt\": \"" + std::string(60000, 'x') + "\", \"id\": 8}\n  \n{\"prompt\": \"Ida\"}\n";
  write_file_atomically(folder.at("in.jsonl"), lines);
  const Outcome outcome = cambium("generate " + model + " -i " + folder.at("in.jsonl") + " -o " +
                                  folder.at("out.jsonl") + " -n 2");
  ASSERT_EQ(outcome.status, 0) << outcome.text;
  EXPECT_THAT(outcome.text, HasSubstr("3 of 5 prompts were not answered"));
  std::istringstream results(read_text_file(folder.at("out.jsonl")));
  std::vector<nlohmann::json> rows;
  for (std::string line; std::getline(results, line);) {
    rows.push_back(nlohmann::json::parse(line));
  }
  ASSERT_EQ(rows.size(), 5U);
  EXPECT_EQ(rows[0]["id"], 7);
  EXPECT_TRUE(rows[0].contains("completion"));
  EXPECT_THAT(rows[1]["error"], HasSubstr("in.jsonl:3"));
  EXPECT_THAT(rows[2]["error"], HasSubstr("in.jsonl:4"));
  EXPECT_EQ(rows[3]["id"], 8);
  EXPECT_THAT(rows[3]["error"], HasSubstr("positions"));
  EXPECT_TRUE(rows[4].contains("completion"));
  // Every one of the lines is the same alone as beside others: the last one is.
  write_file_atomically(folder.at("one.jsonl"), "{\"prompt\": \"Ida\"}\n");
  const Outcome alone = cambium("generate " + model + " -i " + folder.at("one.jsonl") + " -n 2");
  EXPECT_THAT(alone.text, HasSubstr(rows[4]["completion"].dump()));
}

TEST(Answers, ABatchGivesLogProbabilities) {
  const TestFolder folder;
  write_file_atomically(folder.at("in.jsonl"), "{\"prompt\": \"Tom has 3\"}\n");
  const Outcome outcome = cambium(
      "generate " + std::string(kSourceDir) + "/models/teacher -i " + folder.at("in.jsonl") +
      " -n 4 --logprobs 3 --repetition-penalty 1.1 -o " + folder.at("out.jsonl"));
  ASSERT_EQ(outcome.status, 0) << outcome.text;
  const auto line = nlohmann::json::parse(read_text_file(folder.at("out.jsonl")));
  const auto& content = line["logprobs"]["content"];
  ASSERT_GT(content.size(), 0U);
  std::string text;
  for (const auto& token : content) {
    text += token["token"];
    ASSERT_EQ(token["top_logprobs"].size(), 3U);
    EXPECT_LE(token["logprob"], token["top_logprobs"][0]["logprob"]);
    EXPECT_LE(token["top_logprobs"][1]["logprob"], token["top_logprobs"][0]["logprob"]);
    EXPECT_TRUE(token["top_logprobs"][2]["id"].is_number_integer());
  }
  EXPECT_EQ(text, line["completion"]);
}

std::vector<nlohmann::json> answers_to(const TestFolder& folder, const std::string& lines) {
  write_file_atomically(folder.at("in.jsonl"), lines);
  const Outcome outcome = cambium("generate " + teacher() + " -i " + folder.at("in.jsonl") +
                                  " -n 12 -o " + folder.at("out.jsonl"));
  EXPECT_EQ(outcome.status, 0) << outcome.text;
  std::vector<nlohmann::json> rows;
  std::istringstream results(read_text_file(folder.at("out.jsonl")));
  for (std::string line; std::getline(results, line);) {
    rows.push_back(nlohmann::json::parse(line));
  }
  return rows;
}

TEST(Answers, ALineOfABatchHasOptionsOfItsOwn) {
  const TestFolder folder;
  const std::string text = answers_to(folder, R"({"prompt": "Tom has 3"})"
                                              "\n")[0]["completion"];
  ASSERT_GT(text.size(), 8U);
  const std::string stop = text.substr(text.size() / 2, 3);
  std::string lines;
  for (const std::string& options :
       {std::string(R"({"temperature": 2, "top_k": 1})"),
        std::string(R"({"temperature": 2, "top_p": 1e-6, "seed": 5})"),
        std::string(R"({"temperature": 2, "min_p": 1, "max_new_tokens": 2})"),
        R"({"stop": ["never", ")" + stop + R"("]})", std::string(R"({"logprobs": 2})"),
        std::string(R"({"repetition_penalty": 0.01})"), std::string(R"({"frequency_penalty": -2})"),
        std::string(R"({"presence_penalty": -2})"), std::string(R"({"temperature": 2, "seed": 1})"),
        std::string(R"({"temperature": 2, "seed": 2})"), std::string("{}")}) {
    lines += R"({"prompt": "Tom has 3", "sampling": )" + options + "}\n";
  }
  const auto rows = answers_to(folder, lines);
  ASSERT_EQ(rows.size(), 11U);
  EXPECT_EQ(rows[0]["completion"], text) << "the likeliest of one";
  EXPECT_EQ(rows[1]["completion"], text);
  EXPECT_TRUE(text.starts_with(rows[2]["completion"].get<std::string>()));
  EXPECT_LT(rows[2]["completion"].get<std::string>().size(), text.size());
  EXPECT_EQ(rows[2]["finish_reason"], "length");
  EXPECT_EQ(rows[3]["completion"], text.substr(0, text.find(stop)));
  EXPECT_EQ(rows[3]["finish_reason"], "stop");
  EXPECT_EQ(rows[4]["completion"], text);
  EXPECT_EQ(rows[4]["logprobs"]["content"][0]["top_logprobs"].size(), 2U);
  for (const size_t penalised : {5, 6, 7}) {
    EXPECT_NE(rows[penalised]["completion"], text) << rows[penalised];
  }
  EXPECT_NE(rows[8]["completion"], rows[9]["completion"]);
  EXPECT_EQ(rows[10]["completion"], text) << "nothing of the others is left";
  EXPECT_FALSE(rows[10].contains("logprobs"));
}

TEST(Answers, OptionsOfALineThatCannotBeAreNamed) {
  const TestFolder folder;
  std::string lines = R"({"prompt": "Tom has 3"})"
                      "\n";
  const std::vector<std::pair<const char*, const char*>> wrong = {
      {R"({"top-p": 0.5})", "in.jsonl:2: 'sampling': unknown key 'top-p'; did you mean 'top_p'?"},
      {R"({"top_p": 2})", "in.jsonl:3: 'sampling': [sample_token] expected 0 < top_p <= 1, got 2"},
      {R"({"top_k": -1})", "in.jsonl:4: 'sampling': expected 'top_k' to be a whole number from 0"},
      {R"({"stop": ["a", ""]})", "in.jsonl:5: 'sampling': expected 'stop' to be a text or a list"},
      {R"({"logprobs": 1000})", "in.jsonl:6: 'sampling': expected 'logprobs' to be a whole number"},
      {R"(["stop"])", "in.jsonl:7: 'sampling': expected an object"},
  };
  for (const auto& [options, message] : wrong) {
    lines += R"({"prompt": "Ida", "sampling": )" + std::string(options) + "}\n";
  }
  const auto rows = answers_to(folder, lines);
  ASSERT_EQ(rows.size(), wrong.size() + 1);
  EXPECT_TRUE(rows[0].contains("completion"));
  for (size_t i = 0; i < wrong.size(); ++i) {
    EXPECT_THAT(rows[i + 1]["error"].get<std::string>(), HasSubstr(wrong[i].second));
  }
}

// Asked as messages, the answer is a message as well: what comes out is what `distill` learns from.
TEST(Answers, ABatchOfConversationsBecomesDocuments) {
  const TestFolder folder;
  write_file_atomically(folder.at("in.jsonl"),
                        R"({"prompt": [{"role": "user", "content": "Tom has 3"}], "split": "a"})"
                        "\n"
                        R"({"prompt": []})"
                        "\n");
  const std::string generate = "generate " + teacher() + " -n 4 ";
  const Outcome outcome =
      cambium(generate + "-i " + folder.at("in.jsonl") + " -o " + folder.at("out.jsonl"));
  ASSERT_EQ(outcome.status, 0) << outcome.text;
  EXPECT_THAT(outcome.text, HasSubstr("tokens/s"));
  EXPECT_THAT(outcome.text, HasSubstr("1 of 2 prompts were not answered"));
  const std::vector<nlohmann::json> rows = rows_of(folder.at("out.jsonl"));
  ASSERT_EQ(rows.size(), 2U);
  EXPECT_EQ(rows[0]["split"], "a");
  EXPECT_TRUE(rows[1].contains("error"));
  ASSERT_TRUE(rows[0]["completion"].is_array());
  EXPECT_EQ(rows[0]["completion"][0]["role"], "assistant");
  // The template is applied, with or without --chat.
  const Outcome plain = cambium(generate + "--chat -p 'Tom has 3'");
  EXPECT_THAT(plain.text, HasSubstr(rows[0]["completion"][0]["content"].get<std::string>() + "\n"));
  write_file_atomically(folder.at("documents.jsonl"), rows[0].dump() + "\n");
  const Outcome learned =
      cambium("eval " + teacher() + " --task text --data " + folder.at("documents.jsonl"));
  EXPECT_EQ(learned.status, 0) << learned.text;
  EXPECT_THAT(learned.text, HasSubstr("\"documents\": 1"));
  EXPECT_THAT(learned.text, HasSubstr("\"cache\": \"none\""));
  const Outcome cached = cambium("eval " + teacher() + " --teacher " + teacher() +
                                 " --task text --cache f8 --data " + folder.at("documents.jsonl"));
  ASSERT_EQ(cached.status, 0) << cached.text;
  EXPECT_THAT(cached.text, HasSubstr("\"cache\": \"f8\""));
  // Notes may stand before it.
  const double kl = nlohmann::json::parse(cached.text.substr(cached.text.find('{')))["forward_kl"];
  EXPECT_GT(kl, 1e-8);
  EXPECT_LT(kl, 0.2);
}

TEST(Answers, RightAnswersBecomeDocuments) {
  const TestFolder folder;
  const std::string questions = folder.at("questions.jsonl");
  ASSERT_EQ(
      cambium("data problems -n 6 --split test --set word.min_steps=3 -o " + questions).status, 0);
  const std::string generate = "generate " + teacher() + " --task gsm8k --samples 3 " +
                               "--temperature 1.5 --seed 4 -n 60 -d ";
  const std::string all = folder.at("all.jsonl");
  const Outcome outcome = cambium(generate + questions + " --keep all -o " + all);
  ASSERT_EQ(outcome.status, 0) << outcome.text;
  const std::vector<nlohmann::json> rows = rows_of(all);
  ASSERT_EQ(rows.size(), 18U);
  std::vector<nlohmann::json> good;
  std::set<std::string> texts;
  for (size_t i = 0; i < rows.size(); ++i) {
    EXPECT_EQ(rows[i]["sample"], i % 3);
    EXPECT_EQ(rows[i]["prompt"], rows[i / 3 * 3]["prompt"]);
    const std::string text = rows[i]["completion"][0]["content"];
    texts.insert(text);
    const std::string marked = "#### " + rows[i]["expected"].get<std::string>();
    EXPECT_EQ(rows[i]["correct"], text.find(marked + "\n") != std::string::npos ||
                                      (text.size() >= marked.size() && text.ends_with(marked)))
        << text;
    if (rows[i]["correct"] && rows[i]["finish_reason"] == "stop") {
      good.push_back(rows[i]);
    }
  }
  EXPECT_GT(good.size(), 0U);
  EXPECT_LT(good.size(), rows.size());
  EXPECT_GT(texts.size(), 6U);  // samples of a question are not all the same
  const Outcome kept = cambium(generate + questions + " -o " + folder.at("right.jsonl"));
  EXPECT_EQ(rows_of(folder.at("right.jsonl")), good);
  EXPECT_THAT(kept.text, HasSubstr(std::to_string(good.size()) + " right ones that did"));
}

TEST(Answers, AnswersAreGradedElsewhereAsAtOnce) {
  const TestFolder folder;
  const std::string answers = folder.at("answers.jsonl");
  const Outcome now = cambium("eval " + teacher() + " -n 12 -o " + folder.at("graded.jsonl"));
  ASSERT_EQ(now.status, 0) << now.text;
  const Outcome later = cambium("eval " + teacher() + " -n 12 --ungraded -o " + answers);
  ASSERT_EQ(later.status, 0) << later.text;
  EXPECT_THAT(later.text, HasSubstr("12 answers, not graded"));
  for (const nlohmann::json& row : rows_of(answers)) {
    EXPECT_FALSE(row.contains("correct"));
  }
  const Outcome graded =
      cambium("eval -n 12 --answers " + answers + " -o " + folder.at("again.jsonl"));
  ASSERT_EQ(graded.status, 0) << graded.text;
  EXPECT_EQ(read_text_file(folder.at("again.jsonl")), read_text_file(folder.at("graded.jsonl")));
  EXPECT_THAT(now.text, HasSubstr(graded.text));  // "problems: N of 12 right, ..."
  // Graded answers can be graded again; answers to something else cannot.
  EXPECT_EQ(cambium("eval -n 12 --answers " + folder.at("graded.jsonl")).text, graded.text);
  EXPECT_THAT(cambium("eval -n 11 --answers " + answers).text, HasSubstr("each of 11 problems"));
  EXPECT_THAT(cambium("eval -n 13 --answers " + answers).text,
              HasSubstr("each of 13 problems, got 12"));
  const Outcome other = cambium("eval -n 12 --seed 2 --answers " + answers);
  EXPECT_EQ(other.status, 1);
  EXPECT_THAT(other.text, HasSubstr("answers.jsonl:1: expected the answer to problem 1"));
  write_file_atomically(answers, "{\"question\": 3}\n");
  EXPECT_EQ(cambium("eval -n 1 --answers " + answers).status, 1);
}

TEST(Answers, EvalRefusesWhatItWouldNotRead) {
  struct Row {
    const char* arguments;
    const char* message;
  };
  const Row rows[] = {
      {"--task mt-bench --data x", "expected --judge, an address or a checkpoint"},
      {"--task mt-bench --data x --judge ftp://a", "got 'ftp://a'"},
      {"--task mt-bench --data x --judge nobody", "nobody/config.json"},
      {"--task mt-bench --data x --judge http://a --ungraded -o y", "leave --judge to"},
      {"--judge http://a", "--judge belongs to --task mt-bench"},
      {"--samples 4", "greedy answers are all the same"},
      {"--shots 2", "expected --shots K and --shots-data FILE together"},
      {"--rotations", "--rotations belongs to questions with options"},
      {"--by generation", "--by belongs to questions with options"},
      {"--length 100", "--length belongs to --task passkey, keyvalue, variables"},
      {"--task mmlu --data x --samples 2 --temperature 1", "add --by generation"},
      {"--against nothing.jsonl -n 1", "nothing.jsonl"},
      {"--task passkey --length 16 -n 1", "the question alone has"},
      {"--task text --data x --cache-memory 1GiB", "--cache-memory, --admission and"},
      {"--task mmlu --data x --deterministic", "belong to a model that answers in words"},
      {"-n 1 --cache-memory 100", "100 B hold no sequence of this model"},
  };
  for (const Row& row : rows) {
    const Outcome outcome = cambium("eval " + teacher() + " " + row.arguments);
    EXPECT_EQ(outcome.status, 1) << row.arguments;
    EXPECT_THAT(outcome.text, HasSubstr(row.message)) << row.arguments;
  }
}

// Answers to MT-Bench outlive a judge that cannot be had, and are those of --ungraded.
TEST(Answers, EvalKeepsAnswersThatNobodyJudged) {
  const TestFolder folder;
  write_file_atomically(
      folder.at("question.jsonl"),
      R"({"question_id": 1, "category": "writing", "turns": ["Write.", "Again."]})"
      "\n");
  std::string prompts;
  for (const char* name :
       {"single-v1", "single-v1-multi-turn", "single-math-v1", "single-math-v1-multi-turn"}) {
    const nlohmann::json line = {
        {"name", name}, {"system_prompt", ""}, {"prompt_template", "{answer}"}};
    prompts += line.dump() + "\n";
  }
  write_file_atomically(folder.at("judge_prompts.jsonl"), prompts);
  const std::string bench = " --task mt-bench --max-new-tokens 8 --data " + folder.path();
  const std::string kept = folder.at("kept.jsonl");
  const Outcome refused =
      cambium("eval " + teacher() + bench + " --judge http://127.0.0.1:1 -o " + kept);
  EXPECT_EQ(refused.status, 1);
  EXPECT_THAT(refused.text,
              AllOf(HasSubstr("Connection refused"), HasSubstr("the answers are kept in " + kept)));
  EXPECT_EQ(rows_of(kept).size(), 2U);
  ASSERT_EQ(
      cambium("eval " + teacher() + bench + " --ungraded -o " + folder.at("plain.jsonl")).status,
      0);
  EXPECT_EQ(read_text_file(folder.at("plain.jsonl")), read_text_file(kept));
  EXPECT_THAT(cambium("eval" + bench + " --answers " + kept + " --judge " + teacher()).text,
              HasSubstr("the judge gave no rating"));
  EXPECT_THAT(cambium("eval" + bench + " --answers " + kept).text, HasSubstr("expected --judge"));
}

// Stored answers are compared question by question, and lengths and depths make one table.
TEST(Answers, EvalComparesAnswersAndTabulatesLengths) {
  const TestFolder folder;
  const std::string first = folder.at("first.jsonl");
  ASSERT_EQ(cambium("eval " + teacher() + " -n 6 -o " + first).status, 0);
  const nlohmann::json row = rows_of(first).front();
  EXPECT_GT(row["tokens"], 3);
  EXPECT_EQ(row["truncated"], false);
  EXPECT_EQ(row["prompt"], row["question"].get<std::string>() + "\n");
  const Outcome same = cambium("eval " + teacher() + " -n 6 --against " + first);
  EXPECT_THAT(same.text, HasSubstr("+0.0 points [+0.0, +0.0], alone right 0 here, 0 there; p = 1"));
  EXPECT_THAT(same.text, HasSubstr("answers are 1.00 times as long"));
  const Outcome cut = cambium("eval " + teacher() + " -n 6 --max-new-tokens 3 --against " + first);
  EXPECT_THAT(cut.text, HasSubstr("6 cut off at the limit of tokens (100.0 %)"));
  EXPECT_THAT(cut.text, HasSubstr("alone right 0 here"));
  const Outcome table = cambium("eval " + teacher() +
                                " --task keyvalue --length 150,200 --depths 2 -n 2 --json "
                                "--max-new-tokens 4");
  ASSERT_EQ(table.status, 0) << table.text;
  const auto cells = nlohmann::json::parse(table.text.substr(table.text.find('{')))["cells"];
  ASSERT_EQ(cells.size(), 4U);
  EXPECT_EQ(cells[3]["length"], 200);
  EXPECT_EQ(cells[3]["depth"], 1.0);
  EXPECT_EQ(cells[3]["total"], 2);
}

}  // namespace
}  // namespace cambium
