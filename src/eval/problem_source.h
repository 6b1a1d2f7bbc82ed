// Generated problems as documents to train on and as examples to be tested on.
#pragma once

#include <memory>

#include "base/fields.h"
#include "eval/problems/problems.h"
#include "eval/tasks.h"
#include "train/dataset.h"

namespace cambium {

/// Problem i of (split, seed), question and answer. Of every `every` documents one is learned
/// whole, question included (0 = none): a model trained from scratch learns the language faster so.
std::unique_ptr<DocumentSource> problem_source(const Tokenizer& tokenizer, const ProblemSpec& spec,
                                               Split split, uint64_t seed, int64_t every = 0);

/// `count` problems of the split that are of `kind`, from number `first` on, as a task graded by
/// the final answer.
Task problem_task(const ProblemSpec& spec, ProblemKind kind, Split split, uint64_t seed,
                  int64_t count, int64_t first = 0);

void visit_fields(RetrievalSpec& spec, FieldVisitor& visit);
void visit_fields(ProblemSpec& spec, FieldVisitor& visit);

/// Reads the keys of generated problems: retrieval_share, [word] and [retrieval].
ProblemSpec read_problem_spec(const PlanTable& plan);

/// "retrieval_share=0.25 word 1-3 steps ...": what names a spec in fingerprints and reports.
std::string describe_problems(const ProblemSpec& spec);

}  // namespace cambium
