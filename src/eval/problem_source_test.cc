// Generated problems as documents.
#include "eval/problem_source.h"

#include <gmock/gmock.h>

#include "base/test_paths.h"
#include "text/prompt_format.h"

namespace cambium {
namespace {

// A model is asked with the prompt's own tokens, so a document should begin with exactly those: no
// token of the shipped tokenizer spans the border of question and answer.
TEST(ProblemSource, ADocumentBeginsWithItsPromptsTokens) {
  const Tokenizer tokenizer = Tokenizer::load(std::string(kSourceDir) + "/models/teacher");
  ProblemSpec spec;
  spec.retrieval_share = 0.25;
  const auto source = problem_source(tokenizer, spec, Split::kTrain, 1, 0);
  for (uint64_t i = 0; i < 300; ++i) {
    const Problem problem = make_problem(spec, Split::kTrain, 1, i);
    Document apart;
    apart.append(tokenizer.encode(question_prompt(problem.question), true), false);
    apart.append(tokenizer.encode(problem.answer, false), true);
    apart.append({*tokenizer.eos_id()}, true);
    const Document document = source->document(i);
    ASSERT_EQ(document.tokens, apart.tokens) << problem.question;
    ASSERT_EQ(document.learn, apart.learn) << problem.question;
  }
}

}  // namespace
}  // namespace cambium
