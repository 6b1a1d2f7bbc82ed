// The plan of a graft: a TOML file that says everything a run does, so that it can be repeated.
// docs/distillation.md explains each key.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "eval/problems/problems.h"
#include "hybrid/graft.h"
#include "hybrid/importance.h"
#include "train/train_plan.h"

namespace cambium {

/// Where documents come from: files of JSON lines, or generated problems.
struct DataPlan {
  std::string train;  // path; empty = generated
  std::string valid;
  ProblemSpec problems;
};

/// How models are measured, all of them alike.
struct EvaluationPlan {
  int64_t held_out_documents = 64;
  int64_t held_out_tokens = 512;  // of a document at most
  int64_t problems = 200;         // generated, or of `task`
  int64_t retrieval = 0;          // generated retrieval problems
  std::string task;  // a benchmark file's name (gsm8k, ...); empty = generated problems
  std::string task_path;
  int64_t max_new_tokens = 256;
  int64_t batch = 64;                  // problems generated at once
  std::vector<int64_t> contexts = {};  // tokens at which speed is measured
  int64_t speed_batch = 1;
  int64_t speed_repeats = 3;
  RetrievalSpec retrieval_spec;
};

struct PlacePlan {
  /// leave-mixer-out, leave-block-out, mmr, uniform, or list.
  std::string method = "leave-mixer-out";
  std::string metric = "reverse-kl";  // or nll, accuracy
  int64_t documents = 32;             // for leave-one-out
  TrainConfig probe;                  // for mmr
  std::vector<int64_t> list;
};

struct GatePlan {
  double max_reverse_kl = 0.0;     // 0 = not asked
  double min_accuracy_kept = 0.0;  // of the teacher's accuracy; 0 = not asked
  bool lower_bound = false;        // the interval's lower end must pass, not the value
  int64_t retries = 0;             // further attempts
  double retry_steps = 1.0;        // each trains this many times the stage's steps on top
};

struct StagePlan {
  std::string name;
  int64_t layers = 0;  // converted in all after this stage
  GraftOptions graft;
  PlacePlan place;
  bool has_align = false, has_distill = false, has_sft = false;
  TrainConfig align, distill, sft;
  GatePlan gate;
};

struct HybridPlan {
  std::string name;
  std::string text;  // the file, as run
  std::filesystem::path teacher;
  uint64_t seed = 1;
  /// What a failed gate does to the run: stop at the last good hybrid, or go on from the failed
  /// one.
  bool stop_at_failure = true;
  MatrixStorage storage = MatrixStorage::kF32;  // of the hybrids written
  DataPlan data;
  EvaluationPlan evaluate;
  std::vector<StagePlan> stages;
};

void visit_fields(GraftOptions& graft, FieldVisitor& visit);

/// Reads and checks a plan. `teacher` (from the command line) wins over the plan's; `overrides` are
/// "dotted.key=value". Relative paths are taken from the current folder. Error names file, key,
/// what was expected and, for an unknown key, the nearest.
HybridPlan read_hybrid_plan(const std::filesystem::path& path, const std::string& teacher,
                            const std::vector<std::string>& overrides);

/// Checks the plan against the teacher's layers: counts grow, layers exist, mixers fit.
void check_plan(const HybridPlan& plan, const ModelSpec& teacher);

/// Reads the keys of generated problems: retrieval_share, [word] and [retrieval].
ProblemSpec read_problem_spec(const PlanTable& plan);

/// What the plan would do, take and need, for people. `flops` is the machine's speed in FLOP/s that
/// training reaches.
std::string describe_plan(const HybridPlan& plan, const ModelSpec& teacher, double flops);

}  // namespace cambium
