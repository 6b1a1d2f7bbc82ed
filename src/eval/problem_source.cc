#include "eval/problem_source.h"

#include "base/error.h"

namespace cambium {

std::string describe_problems(const ProblemSpec& s) {
  return fmt::format(
      "retrieval {:g}; words: {}-{} steps, {} distractors, hard {:g}, shuffle {:g}, lookback {:g}, "
      "numbers to {}, results to {}, factors to {}; texts: {}-{} chars, {}-{} facts, {} questions, "
      "{} digits",
      s.retrieval_share, s.word.min_steps, s.word.max_steps, s.word.distractors, s.word.hard,
      s.word.shuffle, s.word.lookback, s.word.max_number, s.word.max_value, s.word.max_factor,
      s.retrieval.min_chars, s.retrieval.max_chars, s.retrieval.min_facts, s.retrieval.max_facts,
      s.retrieval.questions, s.retrieval.digits);
}

std::unique_ptr<DocumentSource> problem_source(const Tokenizer& tokenizer, const ProblemSpec& spec,
                                               Split split, uint64_t seed, int64_t every) {
  spec.validate();
  const auto make = [tokenizer, spec, split, seed, every](uint64_t index) {
    const Problem problem = make_problem(spec, split, seed, index);
    const bool whole = every > 0 && index % static_cast<uint64_t>(every) == 0;
    return question_document(tokenizer, problem.question, problem.answer,
                             whole ? LearnWhat::kAll : LearnWhat::kCompletion);
  };
  return generated_source(make, fmt::format("problems {} seed {} whole {}: {}", split_name(split),
                                            seed, every, describe_problems(spec)));
}

Task problem_task(const ProblemSpec& spec, ProblemKind kind, Split split, uint64_t seed,
                  int64_t count) {
  ProblemSpec only = spec;
  only.retrieval_share = kind == ProblemKind::kRetrieval ? 1.0 : 0.0;
  only.validate();
  Task task{kind == ProblemKind::kRetrieval ? "retrieval" : "problems", AnswerForm::kNumber, {}};
  for (int64_t i = 0; i < count; ++i) {
    const Problem problem = make_problem(only, split, seed, static_cast<uint64_t>(i));
    task.examples.push_back({problem.question, problem.result, problem.answer});
  }
  return task;
}

}  // namespace cambium
