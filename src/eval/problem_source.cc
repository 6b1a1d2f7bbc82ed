#include "eval/problem_source.h"

#include "base/error.h"

namespace cambium {

std::string describe_problems(const ProblemSpec& s) {
  std::string out = fmt::format(
      "retrieval {:g}; words: {}-{} steps, {} distractors, hard {:g}, shuffle {:g}, lookback {:g}, "
      "numbers to {}, results to {}, factors to {}; texts: {}-{} chars, {}-{} facts, {} questions, "
      "{} digits",
      s.retrieval_share, s.word.min_steps, s.word.max_steps, s.word.distractors, s.word.hard,
      s.word.shuffle, s.word.lookback, s.word.max_number, s.word.max_value, s.word.max_factor,
      s.retrieval.min_chars, s.retrieval.max_chars, s.retrieval.min_facts, s.retrieval.max_facts,
      s.retrieval.questions, s.retrieval.digits);
  if (s.retrieval.alike > 0.0) {
    out += fmt::format(", alike {:g}", s.retrieval.alike);
  }
  if (s.word.name_operands) {
    out += ", operands named";
  }
  if (s.word.name_results) {
    out += ", results named";
  }
  return out;
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
                  int64_t count, int64_t first) {
  ProblemSpec only = spec;
  only.retrieval_share = kind == ProblemKind::kRetrieval ? 1.0 : 0.0;
  only.validate();
  Task task{kind == ProblemKind::kRetrieval ? "retrieval" : "problems", AnswerForm::kNumber, {}};
  for (int64_t i = first; i < first + count; ++i) {
    const Problem problem = make_problem(only, split, seed, static_cast<uint64_t>(i));
    task.examples.push_back({problem.question, problem.result, problem.answer});
  }
  return task;
}

void visit_fields(RetrievalSpec& r, FieldVisitor& visit) {
  visit({"min_chars", "shortest text"}, r.min_chars, ints_from(0));
  visit({"max_chars", "longest text"}, r.max_chars, ints_from(0));
  visit({"min_facts", "fewest facts in a text"}, r.min_facts, ints_from(0));
  visit({"max_facts", "most facts in a text"}, r.max_facts, ints_from(0));
  visit({"questions", "facts that are asked for at once, at most"}, r.questions, ints_from(0));
  visit({"digits", "of each value"}, r.digits, ints_from(0));
  visit({"alike", "chance that the names of a text share their words"}, r.alike,
        reals_from(0.0, 1.0));
}

void visit_fields(ProblemSpec& spec, FieldVisitor& visit) {
  visit({"retrieval_share", "chance that a problem is one of retrieval"}, spec.retrieval_share,
        reals_from(0.0, 1.0));
  visit.table({"word"}, [&] {
    WordSpec& w = spec.word;
    visit({"min_steps", "fewest computations"}, w.min_steps, ints_from(0));
    visit({"max_steps", "most computations"}, w.max_steps, ints_from(0));
    visit({"distractors", "sentences that do not matter, at most"}, w.distractors, ints_from(0));
    visit({"hard", "chance that a distractor is a quantity of the same kind"}, w.hard,
          reals_from(0.0, 1.0));
    visit({"shuffle", "chance that the facts come in any order"}, w.shuffle, reals_from(0.0, 1.0));
    visit({"lookback", "how often a step needs more than the result before it"}, w.lookback,
          reals_from(0.0, kMostLookback));
    visit({"name_operands", "steps name the owner whose quantity they take"}, w.name_operands);
    visit({"name_results", "steps name the owner of what they find"}, w.name_results);
    visit({"max_number", "largest number in the text"}, w.max_number, ints_from(0));
    visit({"max_value", "largest result of a step"}, w.max_value, ints_from(0));
    visit({"max_factor", "largest factor"}, w.max_factor, ints_from(0));
  });
  visit.table({"retrieval"}, [&] { visit_fields(spec.retrieval, visit); });
}

ProblemSpec read_problem_spec(const PlanTable& plan) {
  ProblemSpec spec;
  read_fields(spec, plan);
  spec.validate();
  return spec;
}

}  // namespace cambium
