#include "eval/choices.h"

#include <gmock/gmock.h>

#include <nlohmann/json.hpp>

#include "base/error.h"
#include "base/testing.h"
#include "eval/csv.h"
#include "eval/tasks.h"

namespace cambium {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using testing::message_of;

TEST(Csv, ReadsQuotesAndEndsOfLines) {
  const std::vector<CsvRow> rows = parse_csv(
      "\xEF\xBB\xBF"
      "a,\"b, \"\"c\"\"\"\r\n\n\"two\nlines\",\n x ,y",
      "t.csv");
  ASSERT_EQ(rows.size(), 3U);
  EXPECT_THAT(rows[0].fields, ElementsAre("a", "b, \"c\""));
  EXPECT_THAT(rows[1].fields, ElementsAre("two\nlines", ""));
  EXPECT_THAT(rows[2].fields, ElementsAre(" x ", "y"));
  EXPECT_EQ(rows[2].line, 5);
  EXPECT_TRUE(parse_csv("", "t.csv").empty());
  struct Row {
    const char* text;
    const char* message;
  };
  for (const Row& row :
       {Row{"a\n\"open", "t.csv line 2: a quoted field is never closed"},
        Row{"a,b\n1", "t.csv line 2: expected 2 fields, as in the first line, got 1"},
        Row{"\"a\"b", "t.csv line 1: expected a comma or the end of the line"}}) {
    EXPECT_THAT(message_of([&] { parse_csv(row.text, "t.csv"); }), HasSubstr(row.message));
  }
}

constexpr const char* kArc =
    R"({"id": "q", "question": "Which?", "choices": {"text": ["air", "ice", "fog"], "label": ["1", "2", "3"]}, "answerKey": "2"})";
constexpr const char* kHellaSwag =
    R"({"activity_label": "Baking", "ctx_a": "A man [step] mixes.", "ctx_b": "THEN he", "ctx": "x", "endings": ["eats [title] it.", "runs.", "sits.", "naps."], "label": "3"})";
constexpr const char* kMmlu =
    R"({"question": " Two and two? ", "choices": ["3", "4", "5", "6"], "answer": 1, "subject": "elementary_mathematics"})";
constexpr const char* kOwn = R"({"question": "Two?", "choices": ["no", "yes"], "answer": "yes"})";

// What lm-evaluation-harness puts before a model, and what it lets it continue with.
TEST(Choices, AreAskedAsTheHarnessAsks) {
  struct Row {
    const char* form;
    const char* line;
    const char* context;
    std::vector<std::string> continuations;
    const char* answer;
  };
  const Row rows[] = {
      {"arc", kArc, "Question: Which?\nAnswer:", {" air", " ice", " fog"}, "B"},
      {"hellaswag",
       kHellaSwag,
       "Baking: A man mixes. Then he",
       {" eats. it.", " runs.", " sits.", " naps."},
       "D"},
      {"mmlu",
       kMmlu,
       "The following are multiple choice questions (with answers) about elementary "
       "mathematics.\n\nTwo and two?\nA. 3\nB. 4\nC. 5\nD. 6\nAnswer:",
       {" A", " B", " C", " D"},
       "B"},
      {"choices", kOwn, "Question: Two?\nAnswer:", {" no", " yes"}, "B"},
  };
  for (const Row& row : rows) {
    for (const char* form : {row.form, "auto"}) {
      const Task task = parse_task(form, row.line, "here");
      ASSERT_EQ(task.examples.size(), 1U);
      EXPECT_EQ(task.name, row.form);
      EXPECT_EQ(task.form, AnswerForm::kLetter);
      EXPECT_EQ(task.examples[0].answer, row.answer);
      const ChoicePrompt prompt = choice_prompt(task.examples[0].choice, task.style);
      EXPECT_EQ(prompt.context, row.context);
      EXPECT_EQ(prompt.continuations, row.continuations);
      EXPECT_TRUE(grade(task, std::string("So: Answer: ") + row.answer, task.examples[0]).correct);
    }
  }
  EXPECT_THAT(parse_task("arc", kArc, "here").examples[0].question,
              HasSubstr("Which?\n\nA) air\nB) ice\nC) fog\n\n"));
}

constexpr const char* kGpqa =
    "Record,Question,Correct Answer,Incorrect Answer 1,Incorrect Answer 2,Incorrect Answer 3\n"
    "1,\"Why, then?\",right,wrong one,wrong two,wrong three\n"
    "2,How?,good,bad,worse,worst\n";

TEST(Choices, GpqaIsShuffledBySeed) {
  const Task one = parse_task("gpqa", kGpqa, "gpqa.csv", 0, 1);
  ASSERT_EQ(one.examples.size(), 2U);
  EXPECT_EQ(one.examples[0].choice.stem, "Why, then?");
  bool moved = false;
  for (uint64_t seed = 1; seed < 20; ++seed) {
    const Task task = parse_task("gpqa", kGpqa, "gpqa.csv", 0, seed);
    for (size_t i = 0; i < 2; ++i) {
      const ChoiceQuestion& choice = task.examples[i].choice;
      EXPECT_EQ(choice.options[static_cast<size_t>(choice.correct)], i == 0 ? "right" : "good");
      EXPECT_EQ(task.examples[i].answer, choice_letter(choice.correct));
      moved = moved || choice.correct != one.examples[i].choice.correct;
    }
  }
  EXPECT_TRUE(moved);
  EXPECT_EQ(parse_task("gpqa", kGpqa, "gpqa.csv", 0, 1).examples[1].question,
            one.examples[1].question);
  EXPECT_EQ(parse_task("gpqa", kGpqa, "gpqa.csv", 1).examples.size(), 1U);
}

TEST(Choices, RotationMovesEveryOption) {
  const ChoiceQuestion question{"Q", {"a", "b", "c", "d"}, 1};
  const ChoiceQuestion turned = rotated(question, 3);
  EXPECT_THAT(turned.options, ElementsAre("b", "c", "d", "a"));
  EXPECT_EQ(turned.correct, 0);
  EXPECT_EQ(rotated(question, 4).options, question.options);
}

TEST(Choices, BadFilesAreNamed) {
  struct Row {
    const char* form;
    const char* text;
    const char* message;
  };
  const Row rows[] = {
      {"gpqa", "", "gpqa.csv is empty"},
      {"gpqa", "Question,Correct Answer\nQ,A\n", "expected a column 'Incorrect Answer 1'"},
      {"gpqa", "Question,Correct Answer,Incorrect Answer 1,Incorrect Answer 2,Incorrect Answer 3\n",
       "has no questions under its first line"},
      {"gpqa",
       "Question,Correct Answer,Incorrect Answer 1,Incorrect Answer 2,Incorrect Answer "
       "3\nQ,a,,c,d\n",
       "line 2: nothing in column 'Incorrect Answer 1'"},
      {"choices", R"({"question": "Q", "choices": ["a", "b"], "answer": 2})",
       "expected the right answer to be one of 0 to 1, got 2"},
      {"choices", R"({"question": "Q", "choices": ["a", "b"], "answer": -1})", "got -1"},
      {"choices", R"({"question": "Q", "choices": ["a", "b"], "answer": "neither"})",
       "expected 'answer' to name one of 2 options, got 'neither'"},
      {"choices", R"({"question": "Q", "choices": ["a"], "answer": 0})",
       "expected 2 to 26 options, got 1"},
      {"choices", R"({"question": "Q", "answer": 0})", "expected 'choices', a list of texts"},
      {"choices", R"({"question": "Q", "choices": ["a", 2], "answer": 0})",
       "to hold texts, got number"},
      {"arc",
       R"({"question": "Q", "choices": {"text": ["a", "b"], "label": ["A"]}, "answerKey": "A"})",
       "expected a label for each of 2 choices, got 1"},
      {"arc",
       R"({"question": "Q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "C"})",
       "expected 'answerKey' to be one of A, B, got 'C'"},
      {"hellaswag", R"({"ctx": "c", "endings": ["a", "b"], "label": ""})", "use validation"},
  };
  for (const Row& row : rows) {
    EXPECT_THAT(message_of([&] { parse_task(row.form, row.text, "gpqa.csv"); }),
                HasSubstr(row.message))
        << row.text;
  }
}

TEST(Choices, FindsTheLetterOfAResponse) {
  struct Row {
    const char* response;
    const char* given;
  };
  const Row rows[] = {
      {"I think so.\nAnswer: B", "B"},
      {"**Answer:** C", "C"},
      {"The answer is (D).", "D"},
      {"The correct answer is option A because it is.", "A"},
      {"Thus \\boxed{B}.", "B"},
      {"Thus \\boxed{\\text{(C)}}.", "C"},
      {"Answer: $A$", "A"},
      {"The final answer is \\text{D}", "D"},
      {"It must be (B), not the others", "B"},
      {"B", "B"},
      {"B. Paris", "B"},
      {"**C**", "C"},
      {"Answer: A\nNo. Answer: B", "B"},
      {"The answer is a word", ""},
      {"A triangle has three sides", ""},
      {"I do not know", ""},
      {"Answer: BC", ""},
      {"", ""},
      {"(", ""},
  };
  for (const Row& row : rows) {
    const Grade graded = grade(AnswerForm::kLetter, row.response, "B");
    EXPECT_EQ(graded.given, row.given) << row.response;
    EXPECT_EQ(graded.answered, *row.given != 0) << row.response;
    EXPECT_EQ(graded.correct, std::string(row.given) == "B") << row.response;
  }
}

}  // namespace
}  // namespace cambium
