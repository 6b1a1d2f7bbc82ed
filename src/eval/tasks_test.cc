#include "eval/tasks.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "base/error.h"
#include "base/file.h"
#include "base/testing.h"
#include "eval/problems/problems.h"

namespace cambium {
namespace {

// One line in each published form; the texts are ours.
struct Row {
  const char* form;
  const char* line;
  const char* question;
  const char* answer;
  AnswerForm answers;
};

const Row kRows[] = {
    {"gsm8k", R"({"question": "Two and two?", "answer": "2+2=<<2+2=4>>4\n#### 4"})", "Two and two?",
     "4", AnswerForm::kNumber},
    {"gsm8k",
     R"({"messages": [{"role": "system", "content": "Be brief."},
         {"role": "user", "content": "Two?"}, {"role": "assistant", "content": "#### 2"}]})",
     "Two?", "2", AnswerForm::kNumber},
    {"math500",
     R"({"problem": "Halve $1$.", "solution": "So \\boxed{\\frac12}.", "answer": "\\frac{1}{2}",
         "subject": "Algebra", "level": 1, "unique_id": "test/1"})",
     "Halve $1$.", "\\frac{1}{2}", AnswerForm::kMath},
    {"aime",
     R"({"id": 60, "problem": "Find it.", "solution": "s", "answer": "025", "url": "u",
         "question": "Find it."})",
     "Find it.", "025", AnswerForm::kInteger},
    {"svamp",
     R"x({"Answer": 145.0, "Question": "How many?", "Equation": "( 1 )", "Body": "There are groups ",
         "Type": "x", "ID": "chal-1", "idx": 0})x",
     "There are groups. How many?", "145", AnswerForm::kNumber},
    {"mawps", R"({"input": "How much is it ?", "target": 11.5, "type": "singleeq", "idx": 0})",
     "How much is it ?", "11.5", AnswerForm::kNumber},
    {"asdiv",
     R"x({"body": "Seven in one basket.", "question": "How many?", "solution_type": "Addition",
         "answer": "9 (apples)", "formula": "7+2=9", "idx": 0})x",
     "Seven in one basket. How many?", "9", AnswerForm::kNumber},
};

std::string one_line(std::string text) {
  std::erase(text, '\n');
  return text;
}

TEST(Tasks, ReadsEachFormByNameAndByItself) {
  for (const Row& row : kRows) {
    for (const char* form : {row.form, "auto"}) {
      const Task task = parse_task(form, one_line(row.line), "here");
      ASSERT_EQ(task.examples.size(), 1u);
      EXPECT_EQ(task.name, row.form);
      EXPECT_EQ(task.form, row.answers);
      EXPECT_EQ(task.examples[0].question, row.question);
      EXPECT_EQ(task.examples[0].answer, row.answer);
      const std::string response = "I think\n#### " + std::string(row.answer);
      EXPECT_TRUE(grade(task, response, task.examples[0]).correct);
      EXPECT_FALSE(grade(task, "#### 77", task.examples[0]).correct);
    }
  }
}

// Both published forms of MBPP: an array whose rows name imports, and lines with set-up code.
TEST(Tasks, ReadsProgramsAndTheirTests) {
  const std::string sanitized =
      R"([{"prompt": "Write a function to double.", "code": "def d(x):\n  return 2 * x", "task_id": 1,
           "test_imports": ["import math"], "test_list": ["assert d(2) == 4", "assert d(0) == 0"]},
          {"prompt": "Halve.", "code": "def h(x): return x / 2", "test_imports": [],
           "test_list": ["assert h(2) == 1"]}])";
  const std::string full = one_line(
      R"({"text": "Write a function to double.", "code": "def d(x):\n  return 2 * x", "task_id": 1,
          "test_setup_code": "import math", "test_list": ["assert d(2) == 4", "assert d(0) == 0"],
          "challenge_test_list": []})");
  for (const std::string& text : {sanitized, full}) {
    const Task task = parse_task("auto", text, "here");
    EXPECT_EQ(task.name, "mbpp");
    const Example& example = task.examples.front();
    EXPECT_EQ(example.answer, "import math\nassert d(2) == 4\nassert d(0) == 0\n");
    EXPECT_THAT(example.question, ::testing::HasSubstr("assert d(2) == 4"));
    EXPECT_TRUE(grade(task, "```python\n" + example.solution + "\n```", example).correct);
    EXPECT_FALSE(grade(task, "```python\ndef d(x): return x\n```", example).correct);
  }
  EXPECT_EQ(parse_task("mbpp", sanitized, "here").examples.size(), 2U);
  EXPECT_EQ(parse_task("mbpp", sanitized, "here", 1).examples.size(), 1U);
  EXPECT_THAT([] { parse_task("mbpp", R"([{"prompt": "x", "code": "y"}])", "here"); },
              ::testing::ThrowsMessage<Error>(::testing::HasSubstr("here entry 1, read as mbpp")));
  for (const char* list : {"7", "null", "{}", "[7]", "[[]]"}) {
    const std::string bad =
        std::string(R"([{"prompt": "x", "code": "y", "test_list": )") + list + "}]";
    EXPECT_THAT([&] { parse_task("mbpp", bad, "here"); },
                ::testing::ThrowsMessage<Error>(::testing::HasSubstr("expected 'test_list'")));
  }
  EXPECT_THAT([] { parse_task("auto", "[1, 2]", "here"); },
              ::testing::ThrowsMessage<Error>(::testing::HasSubstr("entry 1: expected an object")));
}

TEST(Tasks, ReadsOurOwnProblemsFromAFile) {
  ProblemSpec spec;
  spec.retrieval_share = 0.5;
  for (const ProblemFormat format : {ProblemFormat::kQuestionAnswer, ProblemFormat::kMessages}) {
    std::string lines;
    for (uint64_t index = 0; index < 20; ++index) {
      lines += problem_json(make_problem(spec, Split::kTest, 1, index), format) + "\n";
    }
    const std::string path = ::testing::TempDir() + "problems.jsonl";
    write_file_atomically(path, lines);
    const Task task = load_task("auto", path);
    ASSERT_EQ(task.examples.size(), 20u);
    EXPECT_EQ(load_task("gsm8k", path, 7).examples.size(), 7u);
    for (uint64_t index = 0; index < 20; ++index) {
      const Problem problem = make_problem(spec, Split::kTest, 1, index);
      EXPECT_EQ(task.examples[index].answer, problem.result);
      EXPECT_TRUE(grade(task, problem.answer, task.examples[index]).correct);
    }
  }
}

TEST(Tasks, BadFilesAreNamedWithTheirLine) {
  struct Bad {
    const char* form;
    const char* lines;
    const char* expected;
  };
  const Bad rows[] = {
      {"gsm9k", R"({"question": "a", "answer": "#### 1"})", "did you mean 'gsm8k'"},
      {"auto", R"({"prompt": "a"})", "no known form has the fields prompt"},
      {"auto", "", "no examples"},
      {"auto", "\n\n", "no examples"},
      {"gsm8k", "{\"question\": \"a\", \"answer\": \"#### 1\"}\n{\"question\": ", "line 2"},
      {"gsm8k", R"({"question": "a", "answer": "one"})", "#### ANSWER"},
      {"gsm8k", R"({"question": "a"})", "no field 'answer'"},
      {"svamp", R"({"Body": "a", "Question": "b", "Answer": []})", "field 'Answer'"},
      {"gsm8k", R"({"messages": "text"})", "line 1"},
      {"gsm8k", "[1]", "object"},
  };
  for (const Bad& row : rows) {
    const std::string message =
        testing::error_of([&] { parse_task(row.form, row.lines, "data.jsonl"); });
    EXPECT_NE(message.find(row.expected), std::string::npos) << message;
  }
  EXPECT_THROW(load_task("auto", ::testing::TempDir() + "absent.jsonl"), Error);
  EXPECT_THROW(parse_task("auto", kRows[0].line, "here", -1), Error);
}

}  // namespace
}  // namespace cambium
