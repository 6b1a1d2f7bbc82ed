#include "eval/mt_bench.h"

#include <gmock/gmock.h>

#include <nlohmann/json.hpp>

#include "base/file.h"
#include "base/test_folder.h"
#include "base/testing.h"

namespace cambium {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using testing::message_of;

TEST(MtBench, FindsRatings) {
  struct Row {
    const char* text;
    double rating;
  };
  for (const Row& row :
       {Row{"Good. Rating: [[8]]", 8}, Row{"[[7.5]]", 7.5}, Row{"Rating: [6]", 6},
        Row{"[1] says so. Rating: [[9]]", 9}, Row{"[[10]]", 10}, Row{"[[11]]", 0}, Row{"[[0]]", 0},
        Row{"[[rating]] [[3]]", 3}, Row{"8", 0}, Row{"[[", 0}, Row{"[[5", 0}, Row{"", 0}}) {
    EXPECT_EQ(rating_of(row.text), row.rating) << row.text;
  }
  EXPECT_EQ(without_thoughts("<think>hm [[1]]</think>\n Yes. "), "Yes.");
  EXPECT_EQ(without_thoughts("Yes"), "Yes");
}

void write_bench(const TestFolder& folder) {
  write_file_atomically(
      folder.at("question.jsonl"),
      R"({"question_id": 1, "category": "writing", "turns": ["Write {answer}.", "Again."]})"
      "\n"
      R"({"question_id": 2, "category": "math", "turns": ["1+1?", "Twice?"]})"
      "\n");
  std::string prompts;
  for (const char* name : {"single-v1", "single-math-v1"}) {
    for (const char* turns : {"", "-multi-turn"}) {
      const std::string reference = std::string(name) == "single-v1" ? "" : " ref {ref_answer_1}";
      prompts += nlohmann::json({{"name", std::string(name) + turns},
                                 {"system_prompt", *turns == 0 ? "" : "Judge."},
                                 {"prompt_template",
                                  *turns == 0 ? "{question} -> {answer}" + reference
                                              : "{question_1} {answer_1} {question_2} {answer_2}" +
                                                    reference}})
                     .dump() +
                 "\n";
    }
  }
  write_file_atomically(folder.at("judge_prompts.jsonl"), prompts);
  write_file_atomically(folder.at("reference_gpt4.jsonl"),
                        R"({"question_id": 2, "choices": [{"turns": ["two", "four"]}]})"
                        "\n");
}

TEST(MtBench, AsksTwoTurnsAndJudgesEach) {
  const TestFolder folder;
  write_bench(folder);
  const MtBench bench = load_mt_bench(folder.at(""), 0);
  std::vector<std::string> judged;
  const Asker model = [&](const std::vector<MtConversation>& all) {
    EXPECT_EQ(all[0].temperature, 0.7);
    EXPECT_EQ(all[1].temperature, 0.0);
    std::vector<std::string> out;
    for (const MtConversation& one : all) {
      out.push_back("<think>x</think>answer " + std::to_string(one.messages.size()));
    }
    return out;
  };
  const Asker judge = [&](const std::vector<MtConversation>& all) {
    for (const MtConversation& one : all) {
      judged.push_back(one.messages.back().content);
    }
    return std::vector<std::string>{"[[8]]", "[[6]]", "[[3]]", "no rating"};
  };
  const std::vector<MtAnswer> answers = answer_mt_bench(bench, model);
  const MtResult result = judge_mt_bench(bench, answers, judge);
  EXPECT_THAT(judged,
              ElementsAre("Write {answer}. -> answer 1", "Write {answer}. answer 1 Again. answer 3",
                          "1+1? -> answer 1 ref two", "1+1? answer 1 Twice? answer 3 ref two"));
  EXPECT_EQ(result.unrated, 1);
  EXPECT_DOUBLE_EQ(result.score.value, 17.0 / 3);
  EXPECT_EQ(result.turns[0], 5.5);
  EXPECT_EQ(result.turns[1], 6.0);
  EXPECT_EQ(result.categories.at("writing"), 7.0);
  EXPECT_EQ(result.categories.at("math"), 3.0);
  const MtBench one = load_mt_bench(folder.at(""), 1);
  EXPECT_EQ(one.questions.size(), 1U);
  // A file of answers is judged as they were, whether another judge has rated them or not.
  for (const std::string& lines : {mt_bench_lines(answers), mt_bench_lines(result.answers)}) {
    write_file_atomically(folder.at("answers.jsonl"), lines);
    EXPECT_EQ(mt_bench_lines(read_mt_answers(folder.at("answers.jsonl"), bench)),
              mt_bench_lines(answers));
    EXPECT_EQ(read_mt_answers(folder.at("answers.jsonl"), one).size(), 2U);
  }
  struct Row {
    const char* text;
    const char* message;
  };
  for (const Row& row :
       {Row{R"({"question_id": 1, "turn": 1, "response": "a"})",
            "answers.jsonl: expected an answer to turn 2 of question 1, got none"},
        Row{R"({"question_id": 1, "turn": 3, "response": "a"})",
            "answers.jsonl:1: expected 1 or 2 in field 'turn'"},
        Row{R"({"question_id": 1, "turn": 1})",
            "answers.jsonl:1: expected text in field 'response'"},
        Row{"{\"question_id\": 1, \"turn\": 1, \"response\": \"a\"}\n"
            "{\"question_id\": 1, \"turn\": 1, \"response\": \"b\"}",
            "answers.jsonl:2: expected one answer to turn 1 of question 1, got a second"}}) {
    write_file_atomically(folder.at("answers.jsonl"), row.text);
    EXPECT_THAT(message_of([&] { read_mt_answers(folder.at("answers.jsonl"), bench); }),
                HasSubstr(row.message));
  }
}

TEST(MtBench, BadFilesAreNamed) {
  const TestFolder folder;
  struct Row {
    const char* file;
    const char* text;
    const char* message;
  };
  for (const Row& row :
       {Row{"question.jsonl", "", "question.jsonl has no questions"},
        Row{"question.jsonl", R"({"question_id": 1, "category": "a", "turns": ["x"]})",
            "question.jsonl:1: expected 'turns', a list of two texts"},
        Row{"question.jsonl", R"({"category": "a", "turns": ["x", "y"]})",
            "question.jsonl:1: expected a number in field 'question_id'"},
        Row{"question.jsonl", "[]", "question.jsonl:1: expected"},
        Row{"judge_prompts.jsonl", "{}", "judge_prompts.jsonl:1: expected text in field 'name'"},
        Row{"judge_prompts.jsonl",
            R"({"name": "single-v1", "system_prompt": "", "prompt_template": ""})",
            "expected a prompt 'single-v1-multi-turn'"},
        Row{"reference_gpt4.jsonl", R"({"question_id": 2, "choices": []})",
            "reference_gpt4.jsonl:1: expected 'choices'"}}) {
    write_bench(folder);
    write_file_atomically(folder.at(row.file), row.text);
    EXPECT_THAT(message_of([&] { load_mt_bench(folder.at(""), 0); }), HasSubstr(row.message));
  }
}

}  // namespace
}  // namespace cambium
