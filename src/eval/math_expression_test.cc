#include "eval/math_expression.h"

#include <gtest/gtest.h>

#include "eval/graders.h"

namespace cambium {
namespace {

TEST(MathExpression, IsTheSameFunctionOrNot) {
  struct Row {
    const char* a;
    const char* b;
    bool same;
  };
  const Row rows[] = {
      {"x+1", "1+x", true},
      {"x+1", "x-1", false},
      {"(a+5)(b+2)", "ab+2a+5b+10", true},
      {"2(x-1)", "2x-2", true},
      {"x^2-1", "(x-1)(x+1)", true},
      {"x^{10}", "x^10", true},
      {"x^{-1}", "\\frac{1}{x}", true},
      {"\\frac{11+9a}{20}", "\\frac{9a}{20}+\\frac{11}{20}", true},
      {"\\frac12", "0.5", true},
      {"1\\frac{4}{5}", "\\frac{9}{5}", true},
      {"137 \\frac{1}{2}", "137.5", true},
      {"3\\sqrt{13}", "\\sqrt{117}", true},
      {"\\sqrt2", "2^{1/2}", true},
      {"\\sqrt[3]{-8}", "-2", true},
      {"\\frac{1}{\\sqrt{2}}", "\\frac{\\sqrt{2}}{2}", true},
      {"\\cot x", "\\frac{\\cos x}{\\sin x}", true},
      {"\\sin^2 x+\\cos^2 x", "1", true},
      {"\\sin^{-1} x", "\\arcsin x", true},
      {"\\sin 2x", "2\\sin x\\cos x", true},
      {"6 - 5i", "-5i+6", true},
      {"6 - 5i", "6 + 5i", false},
      {"2\\pi", "\\pi\\cdot 2", true},
      {"e^{i\\pi}", "-1", true},
      {"\\log_2 8", "3", true},
      {"5!", "120", true},
      {"\\binom{5}{2}", "10", true},
      {"|{-3}|", "3", true},
      {"x_1+x_2", "x_2+x_1", true},
      {"x_1", "x_2", false},
      {"x_{12}", "x_12", false},
      {"1,000", "1000", true},
      {"2\\sqrt{3}", "2\\sqrt{2}", false},
      {"0.333", "\\frac{1}{3}", false},
      {"x", "X", false},
      {"\\theta", "\\phi", false},
  };
  for (const Row& row : rows) {
    EXPECT_EQ(same_expression(row.a, row.b), row.same) << row.a << " and " << row.b;
    EXPECT_EQ(same_expression(row.b, row.a), row.same) << row.b << " and " << row.a;
  }
}

TEST(MathExpression, WhatIsNoFormulaHasNoValue) {
  for (const char* text : {"",
                           " ",
                           "(",
                           "x+",
                           "\\frac{1}",
                           "\\frac",
                           "x=2",
                           "1,2",
                           "east",
                           "\\text{east}",
                           "(1,2)",
                           "1/0",
                           "\\begin{pmatrix}1\\end{pmatrix}",
                           "^",
                           "!",
                           "x^",
                           "\\unknown",
                           "}",
                           "171!",
                           "\\sqrt[",
                           "1..2"}) {
    EXPECT_FALSE(value_at(text, 0).has_value()) << text;
  }
  EXPECT_FALSE(value_at(std::string(1000, '(') + "1" + std::string(1000, ')'), 0).has_value());
  EXPECT_FALSE(value_at("x" + std::string(1500, '^') + "2", 0).has_value());
  EXPECT_FALSE(
      value_at(std::string(1500, '-') + "x^" + std::string(400, '-') + "1", 0).has_value());
  EXPECT_FALSE(value_at(std::string(100'000, '1'), 0).has_value());
}

// Shapes around the formulas.
TEST(SameMath, ComparesShapePartByPart) {
  struct Row {
    const char* a;
    const char* b;
    bool same;
  };
  const Row rows[] = {
      {"1,-2", "\\{-2,1\\}", true},
      {"\\{1\\pm\\sqrt{5},-2\\}", "\\{-2,1-\\sqrt{5},1+\\sqrt{5}\\}", true},
      {"1 \\pm \\sqrt{19}", "1+\\sqrt{19}, 1-\\sqrt{19}", true},
      {"1 \\pm \\sqrt{19}", "1+\\sqrt{19}", false},
      {"(0,9) \\cup (9,36)", "(9,36)\\cup(0,9)", true},
      {"(0,9) \\cup (9,36)", "(0,9) \\cup (9,36]", false},
      {"(2,\\infty)", "x > 2", true},
      {"[2,\\infty)", "x \\ge 2", true},
      {"[2,\\infty)", "x > 2", false},
      {"x \\in [-2,7]", "-2 \\le x \\le 7", true},
      {"[-2,7]", "7 \\geq x \\geq -2", true},
      {"(\\frac{1}{2},3]", "\\frac12 < x \\leq 3", true},
      {"\\begin{pmatrix} 1/5 \\\\ -18/5 \\end{pmatrix}",
       "\\begin{bmatrix} 0.2 \\\\ \\frac{-18}{5} \\end{bmatrix}", true},
      {"\\begin{pmatrix} 1 & 2 \\end{pmatrix}", "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", false},
      {"5x - 7y + 11z + 4 = 0", "10x - 14y + 22z = -8", true},
      {"5x - 7y + 11z + 4 = 0", "5x - 7y + 11z - 4 = 0", false},
      {"y = 2x + 3", "y = 3 + 2x", true},
      {"(\\frac{3}{5},\\frac{8}{3}]", "(0.6, 8/3]", true},
      {"\\text{east}", "East", true},
      {"\\text{east}", "west", false},
      {"(x+1)(x-2)", "(x-2)(x+1)", true},
      {"10{,}080", "10080", true},
      {"ab", "AB", false},
  };
  for (const Row& row : rows) {
    EXPECT_EQ(same_math(row.a, row.b), row.same) << row.a << " and " << row.b;
    EXPECT_EQ(same_math(row.b, row.a), row.same) << row.b << " and " << row.a;
  }
}

// As lm-evaluation-harness has it; scripts/compare_graders.py compares thousands of answers.
TEST(HarnessGraders, FindAndCompareAsTheReferenceDoes) {
  struct Row {
    Extraction extraction;
    const char* response;
    const char* expected;
    const char* given;
    bool correct;
  };
  using enum Extraction;
  const Row rows[] = {
      {kStrict, "so\n#### 1,234", "1234", "1,234", true},
      {kStrict, "#### 5.\n#### 6", "5", "5.", true},
      {kStrict, "####5 #### x", "5", "", false},
      {kStrict, "The answer is 5.", "5", "", false},
      {kFlexible, "The answer is $5.", "5", "$5.", true},
      {kFlexible, "5 in 3 days", "5", "3", false},
      {kFlexible, "1,200.", "1200", "1,200.", true},
      {kFlexible, "none", "5", "", false},
      {kHendrycks, "so $x=\\frac12$", "\\frac{1}{2}", "x=\\frac12", true},
      {kHendrycks, "$1$ then $2$", "2", "1$ then $2", false},
      {kHendrycks, "it is $0.5$", "\\frac{1}{2}", "0.5", true},
      {kHendrycks, "$a/b$", "a/b", "a/b", true},
      {kMinerva, "Final Answer: The final answer is $3\\sqrt{13}$. I hope it is correct.",
       "3\\sqrt{13}", "$3\\sqrt{13}$", true},
      {kMinerva, "Final Answer: The final answer is $12 \\text{ cm}$. I hope it is correct.", "12",
       "$12 \\text{ cm}$", true},
      {kMinerva, "Final Answer: The final answer is $x+1$. I hope it is correct.", "1+x", "$x+1$",
       true},
      {kMinerva, "\\boxed{12}", "12", "", false},
  };
  for (const Row& row : rows) {
    const Grade graded = grade_like_harness(row.extraction, row.response, row.expected);
    EXPECT_EQ(graded.given, row.correct || *row.given != 0 ? row.given : graded.given)
        << row.response;
    EXPECT_EQ(graded.correct, row.correct) << row.response;
  }
}

TEST(Graders, AllWordsMustStandInTheResponse) {
  struct Row {
    const char* response;
    const char* expected;
    bool correct;
  };
  for (const Row& row : {Row{"The number is 12345.", "12345", true}, Row{"123456", "12345", false},
                         Row{"X1, X2 and x3", "X1 X2 X3", true}, Row{"X1, X2", "X1 X2 X3", false},
                         Row{"", "1", false}, Row{"anything", "", false}}) {
    EXPECT_EQ(grade(AnswerForm::kWords, row.response, row.expected).correct, row.correct)
        << row.response;
  }
}

}  // namespace
}  // namespace cambium
