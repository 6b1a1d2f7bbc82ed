#include "eval/graders.h"

#include <gtest/gtest.h>

#include "eval/tasks.h"

namespace cambium {
namespace {

TEST(Graders, LastNumber) {
  struct Row {
    const char* text;
    const char* want;
  };
  const Row rows[] = {
      {"so 12-7=5.", "5"},
      {"it is -3", "-3"},
      {"12-7", "7"},
      {"x-7", "7"},
      {"she has $1,234.50 now.", "1234.50"},
      {"between 3, 4", "4"},
      {"1,2", "2"},
      {"version 1.2.3", "3"},
      {"costs .5 dollars", ".5"},
      {"about 1,000,000!", "1000000"},
      {"7", "7"},
  };
  for (const Row& row : rows) {
    EXPECT_EQ(last_number(row.text).value_or("none"), row.want) << row.text;
  }
  EXPECT_FALSE(last_number("no number"));
  EXPECT_FALSE(last_number(""));
}

TEST(Graders, NumberValue) {
  struct Row {
    const char* text;
    double want;
  };
  const Row rows[] = {
      {"12", 12},
      {"-1,234.5", -1234.5},
      {"3/4", 0.75},
      {".5", 0.5},
      {"\\frac{3}{4}", 0.75},
      {"-\\frac{3}{4}", -0.75},
      {"\\frac34", 0.75},
      {"1\\frac{4}{5}", 1.8},
      {"137 \\frac{1}{2}", 137.5},
      {"-(1/3)", -1 / 3.},
      {"025", 25},
      {"+7", 7},
  };
  for (const Row& row : rows) {
    ASSERT_TRUE(number_value(row.text)) << row.text;
    EXPECT_DOUBLE_EQ(*number_value(row.text), row.want) << row.text;
  }
  for (const char* text : {"", "-", "--2", "x", "1/0", "5:45", "1,2", "12 apples", "\\frac{a}{2}",
                           "\\frac{1}", "inf"}) {
    EXPECT_FALSE(number_value(text)) << text;
  }
}

TEST(Graders, MarkedAnswer) {
  struct Row {
    const char* text;
    const char* want;
  };
  const Row rows[] = {
      {"a\n#### 42", "42"},
      {"#### 1\nno, #### 2 \nmore", "2"},
      {"thus \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"},
      {"\\boxed{1} or \\boxed{ 2 }", "2"},
      {"\\boxed 5$", "5"},
      {"\\boxed{cut off", "none"},
      {"nothing", "none"},
  };
  for (const Row& row : rows) {
    EXPECT_EQ(marked_answer(row.text).value_or("none"), row.want) << row.text;
  }
}

TEST(Graders, Grade) {
  struct Row {
    AnswerForm form;
    const char* response;
    const char* expected;
    bool correct;
  };
  constexpr auto kNumber = AnswerForm::kNumber;
  constexpr auto kInteger = AnswerForm::kInteger;
  constexpr auto kMath = AnswerForm::kMath;
  const Row rows[] = {
      {kNumber, "Tom: 12+7=19\n#### 19", "19", true},
      {kNumber, "#### 19\nWait, 20", "19", true},
      {kNumber, "#### $1,900", "1900", true},
      {kNumber, "#### 19 apples", "19", true},
      {kNumber, "so there are 19 apples.", "19", true},
      {kNumber, "so there are 19 of 20", "19", false},
      {kNumber, "#### 18", "19", false},
      {kNumber, "#### ", "19", false},
      {kNumber, "#### 0.5", "1/2", true},
      {kNumber, "\\boxed{\\frac12}", "0.5", true},
      {kNumber, "It starts at 5:45", "5:45", true},
      {kNumber, "#### 5:46", "5:45", false},
      {kNumber, "The winner is Mrs. Hilt.", "Mrs. Hilt", true},
      {kNumber, "#### Tom", "Mrs. Hilt", false},
      {kInteger, "\\boxed{25}", "025", true},
      {kInteger, "\\boxed{025}", "25", true},
      {kInteger, "\\boxed{25.5}", "025", false},
      {kMath, "so $\\boxed{\\dfrac{14}{3}}$", "\\frac{14}{3}", true},
      {kMath, "\\boxed{14/3}", "\\frac{14}{3}", true},
      {kMath, "\\boxed{13/3}", "\\frac{14}{3}", false},
      {kMath, "The answer is $p-q$.", "p - q", true},
      {kMath, "we get $x=5$", "x=5", true},
      {kMath, "#### 5", "x=5", true},
      {kMath, "hence 42", "42", true},
      {kMath, "", "42", false},
  };
  for (const Row& row : rows) {
    EXPECT_EQ(grade(row.form, row.response, row.expected).correct, row.correct)
        << row.response << " for " << row.expected;
  }
  EXPECT_FALSE(grade(kNumber, "I do not know", "3").answered);
  EXPECT_TRUE(grade(kNumber, "4", "3").answered);
  EXPECT_EQ(grade(kNumber, "#### 1,900", "3").given, "1900");
}

TEST(Graders, SameMath) {
  struct Row {
    const char* a;
    const char* b;
    bool same;
  };
  const Row rows[] = {
      {"\\left( 3, \\frac{\\pi}{2} \\right)", "(3,\\frac{\\pi}{2})", true},
      {"(3, \\frac\\pi2)", "(2,\\frac{\\pi}{2})", false},
      {"90^\\circ", "90", true},
      {"90 degrees", "90^{\\circ}", true},
      {"\\frac{270}7\\text{ degrees}", "\\frac{270}{7}", true},
      {"\\text{Evelyn}", "Evelyn", true},
      {"\\text{(C)}", "C", true},
      {"11\\sqrt2", "11 \\sqrt{2}", true},
      {"10,\\!080", "10080", true},
      {"\\$32,\\!348", "32348", true},
      {"\\$18.90", "18.9", true},
      {"15\\mbox{ cm}^2", "15", true},
      {"5.4 \\text{ cents}", "5.4", true},
      {"4210_{5}", "4210_5", true},
      {"4210_{5}", "4210", false},
      {"1,-2", "-2, 1", true},
      {"1,-2", "1,2", false},
      {"1,1,2", "1,2,2", false},
      {"(1,-2)", "(-2,1)", false},
      {"(3,4]", "(3,4)", false},
      {"(0.5,1)", "(\\frac{1}{2},1)", true},
      {"y = 2x + 3", "2x+3", true},
      {"x \\in [-2,7]", "[-2,7]", true},
      {".35625", "0.35625", true},
      {"\\tfrac34", "0.75", true},
      {"50\\%", "50", true},
      {"6 - 5i", "6-5i", true},
      {"\\sqrt{51}", "\\sqrt{15}", false},
      {"\\begin{pmatrix} 1/5 \\\\ 2 \\end{pmatrix}", "\\begin{pmatrix}1/5\\\\2\\end{pmatrix}",
       true},
      {"", "0", false},
  };
  for (const Row& row : rows) {
    EXPECT_EQ(same_math(row.a, row.b), row.same) << row.a << " and " << row.b;
    EXPECT_EQ(same_math(row.b, row.a), row.same) << row.b << " and " << row.a;
    EXPECT_TRUE(same_math(row.a, row.a)) << row.a;
    const std::string once = normalise_math(row.a);
    EXPECT_EQ(normalise_math(once), once);
  }
}

TEST(Graders, FindsThePythonOfAResponse) {
  struct Row {
    const char* response;
    const char* code;  // null = none
  };
  const Row rows[] = {
      {"Here:\n```python\ndef f(x):\n    return x\n```\nIt adds.", "def f(x):\n    return x\n"},
      {"```\nx = 1\n```\nthen\n```python\ndef f(): pass\n```", "def f(): pass\n"},
      {"```bash\nls\n```\n```py\nf = lambda x: x\n```", "f = lambda x: x\n"},
      {"```python\ndef f():\n    return 1", "def f():\n    return 1\n"},
      {"The code is\nimport math\ndef f(x):\n    return math.pi",
       "import math\ndef f(x):\n    return math.pi\n"},
      {"```python\r\ndef f(): pass\r\n```", "def f(): pass\r\n"},
      {"I do not know.", nullptr},
      {"", nullptr},
  };
  for (const Row& row : rows) {
    const auto code = python_code(row.response);
    EXPECT_EQ(code.value_or("none"), row.code == nullptr ? "none" : row.code) << row.response;
  }
}

TEST(Graders, ProgramsAreRunAgainstTheirTests) {
  const std::string tests = "import math\nassert f(4) == 2\nassert f(9) == 3\n";
  const auto run = [&](const std::string& code) {
    return grade(AnswerForm::kPython, "```python\n" + code + "\n```", tests);
  };
  EXPECT_TRUE(run("def f(x):\n    return x ** 0.5").correct);
  EXPECT_TRUE(run("def f(x):\n    print('busy')\n    return x ** 0.5").correct);
  EXPECT_TRUE(run("def f(x): return x ** 0.5\nif __name__ == '__main__': print(input())").correct);
  struct Row {
    const char* code;
    const char* given;
  };
  const Row wrong[] = {
      {"def f(x):\n    return x", "exit status 1: AssertionError"},
      {"def g(x):\n    return x", "exit status 1: NameError: name 'f' is not defined"},
      {"def f(x) return x", "exit status 1: SyntaxError: "},
      {"import sys\nsys.exit(0)", "exit status 0"},
      {"import os\ndef f(x): os._exit(0)", "exit status 0"},
      {"def f(x):\n    raise SystemExit(0)", "exit status 0"},
      {"import os\nos.remove('tests.py')\nopen('tests.py', 'w').close()\ndef f(x): return x",
       "exit status 1: AssertionError"},
      {"import builtins\nbuiltins.exec = print\ndef f(x): return x", "exit status 1: Assertion"},
  };
  for (const Row& row : wrong) {
    const Grade graded = run(row.code);
    EXPECT_TRUE(graded.answered) << row.code;
    EXPECT_FALSE(graded.correct) << row.code;
    EXPECT_EQ(graded.given.rfind(row.given, 0), 0U) << graded.given;
  }
  EXPECT_FALSE(grade(AnswerForm::kPython, "No idea.", tests).answered);
}

// Torn and hostile text is graded as wrong, never a crash.
TEST(Graders, BrokenText) {
  for (const char* text :
       {"\\frac", "\\frac{1", "\\boxed", "\\boxed{", "\\text{", "\\sqrt", "_{", "^{a", "}", "{{{",
        "$", "$$", "#### ####", "-", ".", ",", "\\left", "\\boxed{}"}) {
    for (const AnswerForm form : {AnswerForm::kNumber, AnswerForm::kInteger, AnswerForm::kMath}) {
      EXPECT_FALSE(grade(form, text, "7").correct) << text;
    }
    EXPECT_FALSE(same_math(text, "7")) << text;
  }
}

}  // namespace
}  // namespace cambium
