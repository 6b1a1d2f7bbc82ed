// The plan of a graft: a TOML file that says everything a run does, so that it can be repeated.
// docs/distillation.md explains each key.
#pragma once

#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "eval/problem_source.h"
#include "eval/problems/long_context.h"
#include "hybrid/graft.h"
#include "hybrid/on_policy.h"
#include "hybrid/place_plan.h"
#include "train/train_plan.h"

namespace cambium {

class Tokenizer;

/// Where documents come from: files of JSON lines, or generated problems.
struct DataPlan {
  std::string train;  // path; empty = generated
  std::string valid;
  ProblemSpec problems;
};

/// How problems are asked.
enum class Ask {
  kAuto,  // a benchmark through the chat template where there is one; generated problems plainly
  kTemplate,  // through the chat template
  kPlain,     // "question\n"
};

/// Retrieval from long texts that any model can be asked (eval/problems/long_context.h).
struct LongPlan {
  std::vector<std::string> tasks;  // passkey, keyvalue, variables; none = not asked
  LongGrid grid{.lengths = {}, .depths = 5, .answers = 4};
};

/// How models are measured, all of them alike.
struct EvaluationPlan {
  int64_t held_out_documents = 64;
  int64_t held_out_tokens = 512;  // of a document at most
  int64_t problems = 200;         // generated, or of `task`
  int64_t retrieval = 0;          // generated retrieval problems
  std::string task;  // a benchmark file's name (gsm8k, ...); empty = generated problems
  std::string task_path;
  Ask ask = Ask::kAuto;
  int64_t max_new_tokens = 256;
  int64_t batch = 64;                  // problems generated at once
  std::vector<int64_t> contexts = {};  // tokens at which speed is measured; see speed_contexts
  int64_t speed_batch = 1;
  int64_t speed_repeats = 3;
  RetrievalSpec retrieval_spec;
  /// Characters of texts; at each length as many are asked as `retrieval` says.
  std::vector<int64_t> retrieval_lengths = {};
  LongPlan long_texts = {};
  /// Of the baseline beside each stage, which is not trained: the teacher with windows of so many
  /// tokens, and sinks, in the layers that the stage's model has converted. 0 = none.
  int64_t baseline_window = 0;
  int64_t baseline_sinks = 0;

  GraftOptions baseline() const {
    return {.mixer = "sliding_window", .window = baseline_window, .sinks = baseline_sinks};
  }
};

struct GatePlan {
  double max_reverse_kl = 0.0;      // 0 = not asked
  double min_accuracy_kept = 0.0;   // of the teacher's accuracy; 0 = not asked
  double min_retrieval_kept = 0.0;  // of the teacher's, at each length; 0 = not asked
  /// Mean tokens of an answer over the teacher's: a model that thinks longer loses by it what it
  /// won in speed. 0 = not asked.
  double max_answer_length_ratio = 0.0;
  /// Of questions with options, the share answered with the same letter in all rotations of them;
  /// 0 = not asked.
  double max_sticky = 0.0;
  bool cached_equals_uncached = true;
  bool lower_bound = false;  // the interval's lower end must pass, not the value
  int64_t retries = 0;       // further attempts
  double retry_steps = 1.0;  // each trains this many times the stage's steps on top
};

/// The teacher's logits of a phase's documents, kept in a file (train/stored_logits.h): made where
/// it is not there, and read in the teacher's place.
struct LogitsPlan {
  std::string file;  // empty = the teacher runs beside the student
  int64_t top_k = 32;
  int64_t documents = 0;  // the first so many; 0 = all that a file of documents has
};

/// One kind of training in a stage.
struct Phase {
  /// align, distill, sft or on_policy: its table, and its folder in the run; or fit
  std::string name;
  TrainConfig config;
  bool teacher = true;    // false: learns from the data alone
  bool once = false;      // in the first attempt only
  std::string data = "";  // a file of its own, from its first document on; empty = [data] train
  /// The student answers the prompts of those documents itself.
  std::optional<OnPolicyConfig> on_policy = std::nullopt;
  LogitsPlan logits{};
};

/// The stage's result becomes a weighted mean of itself and of earlier stages' models.
struct MergePlan {
  std::vector<std::string> with;  // names of stages; empty = no merge
  std::vector<double> weights;    // of the result itself, then of those; empty = all alike
};

/// Of a stage whose search chooses how many layers it converts.
inline constexpr int64_t kAnyLayers = -1;

struct StagePlan {
  std::string name;
  int64_t layers = 0;   // converted in all after this stage; kAnyLayers: what its search takes
  std::string from;     // the stage it starts from; empty = the teacher
  bool branch = false;  // later stages do not go on from it unless they say so
  GraftOptions graft;
  /// With these mixers beside attention and that of `graft`, the stage makes a supernet. Its
  /// presets have the names of the mixers, each of them in all layers that choose; `graft`'s is
  /// active, and so what the gate sees.
  std::vector<GraftOptions> beside;
  /// Mixers that its search may give a layer instead of that of `graft`.
  std::vector<GraftOptions> others;
  PlacePlan place;
  std::vector<int64_t> list;  // the layers to convert, of place method "list"
  std::vector<Phase> phases;
  GatePlan gate;
  MergePlan merge;

  bool makes_supernet() const { return !beside.empty(); }
  /// `graft` and after it `others`: what a converted layer may have.
  std::vector<GraftOptions> kinds() const;
  /// Null where the stage has no such phase.
  const Phase* phase(const std::string& name) const;
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

  /// Layers converted before `stage`; kAnyLayers where a search chooses how many.
  int64_t layers_before(const StagePlan& stage) const;
  /// Layers that `stage` converts; kAnyLayers where its search chooses how many.
  int64_t layers_added(const StagePlan& stage) const;
};

void visit_fields(GraftOptions& graft, FieldVisitor& visit);
void visit_fields(LogitsPlan& logits, FieldVisitor& visit);
void visit_fields(EvaluationPlan& evaluate, FieldVisitor& visit);
void visit_fields(GatePlan& gate, FieldVisitor& visit);

/// Reads and checks a plan. `teacher` (from the command line) wins over the plan's; `overrides` are
/// "dotted.key=value". Relative paths are taken from the current folder. Error names file, key,
/// what was expected and, for an unknown key, the nearest.
HybridPlan read_hybrid_plan(const std::filesystem::path& path, const std::string& teacher,
                            const std::vector<std::string>& overrides);

/// Error unless `name` can be the name of a folder and nothing else: letters, digits, '.', '_' and
/// '-', not "." or "..".
void check_stage_name(const std::string& name, const std::string& where);

/// Error unless the spec's family can write it and reads back what it wrote.
void check_can_be_saved(const ModelSpec& spec, const std::string& where);

/// Layers as a stage may take them that converts `count` (kAnyLayers: at most) of those of `base`:
/// which is not known before a choice, and a teacher's layers are alike.
std::vector<int64_t> likely_layers(const StagePlan& stage, const ModelSpec& base, int64_t count);
/// Every so-many-th of them, from `first` on: how several kinds share them as far as is known.
std::vector<int64_t> every_nth(const std::vector<int64_t>& layers, size_t first, size_t step);

/// Checks the plan against the teacher's layers: counts grow, layers exist, mixers fit, and a
/// family can write each stage's result.
void check_plan(const HybridPlan& plan, const ModelSpec& teacher);

/// Checks what the plan needs of the machine before any work: the teacher's tokenizer, data and
/// tasks, a chat template where one is asked for. Loads no weights. A file that is not there is an
/// Error, or with `missing` an entry of it.
void check_plan_inputs(const HybridPlan& plan, std::vector<std::string>* missing = nullptr);

/// Whether problems are asked through the chat template. By `auto` it is `foreign` ones that are, a
/// benchmark's and long texts: our own generated problems have words of their own.
bool asks_by_template(const EvaluationPlan& plan, const Tokenizer& tokenizer, bool foreign);
/// Tokens of an answer to such a text at most, and of the teacher's positions that are left beside
/// the text for answer and template.
constexpr int64_t kLongAnswerTokens = 64;
constexpr int64_t kLongRoom = 128;

/// Tokens at which speed is measured: those given, else 512 and 4096 as far as the teacher reaches.
std::vector<int64_t> speed_contexts(const EvaluationPlan& evaluate, const ModelSpec& teacher);

/// The problems of texts of so many characters.
ProblemSpec at_length(ProblemSpec problems, int64_t characters);

/// What the plan would do, take and need, for people. `flops` is the machine's speed in FLOP/s that
/// training reaches; memory is that of `device`, which need not be there.
std::string describe_plan(const HybridPlan& plan, const ModelSpec& teacher, double flops,
                          Device device = {});

}  // namespace cambium
