// Generated problems as documents to train on and as examples to be tested on.
#pragma once

#include <memory>

#include "eval/problems/problems.h"
#include "eval/tasks.h"
#include "train/dataset.h"

namespace cambium {

/// Problem i of (split, seed), question and answer. Of every `every` documents one is learned
/// whole, question included (0 = none): a model trained from scratch learns the language faster so.
std::unique_ptr<DocumentSource> problem_source(const Tokenizer& tokenizer, const ProblemSpec& spec,
                                               Split split, uint64_t seed, int64_t every = 0);

/// The first `count` problems of the split that are of `kind`, as a task graded by the final
/// answer.
Task problem_task(const ProblemSpec& spec, ProblemKind kind, Split split, uint64_t seed,
                  int64_t count);

/// "retrieval_share=0.25 word 1-3 steps ...": what names a spec in fingerprints and reports.
std::string describe_problems(const ProblemSpec& spec);

}  // namespace cambium
