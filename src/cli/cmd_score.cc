// score: which layers need their attention least.
#include <algorithm>
#include <cstdio>

#include "base/signals.h"
#include "base/text.h"
#include "cli/commands.h"
#include "cli/options.h"
#include "hybrid/measure.h"
#include "hybrid/placement_judge.h"
#include "hybrid/scoring.h"
#include "train/train_job.h"

namespace cambium {
namespace {

struct ScoreArgs {
  std::string model, teacher, data, output = "scores.json", method = "leave-mixer-out",
                                    metric = "reverse-kl", task, task_path, student;
  // Of some methods and metrics only; as they are here where they were not given.
  std::string mixer;
  int64_t window = -1, sinks = -1, steps = -1, sequence = -1, problems = -1, max_new_tokens = -1;
  double rate = -1.0, price = -1.0, hidden = -1.0, retrieval_share = -1.0;
  int64_t retrieval_chars = -1;
  LongTextsOption long_texts;
  int64_t documents = 32, max_tokens = 512, seed = 1;
  DeviceOption device;
  bool fresh = false;
};

void check_applies(const ScoreArgs& args, ScoreMethod method) {
  const bool probes = method == ScoreMethod::kMixerReplacement;
  const bool swaps = method == ScoreMethod::kWindowSwap;
  const bool relaxes = method == ScoreMethod::kGates;
  const bool asks = metric_asks(args.metric);
  const char* const training = "--method mmr and gates";
  refuse(!args.mixer.empty() && !probes, "--mixer", "--method mmr");
  refuse(args.window >= 0 && !probes && !swaps, "--window", "--method mmr and window-swap");
  refuse(args.sinks >= 0 && !probes && !swaps, "--sinks", "--method mmr and window-swap");
  refuse(args.steps >= 0 && !probes && !relaxes, "--steps", training);
  refuse(args.sequence >= 0 && !probes && !relaxes, "--sequence", training);
  refuse(args.rate >= 0 && !probes && !relaxes, "--rate", training);
  refuse(args.price >= 0 && !relaxes, "--price", "--method gates");
  refuse(args.hidden >= 0 && !relaxes, "--hidden", "--method gates");
  refuse(args.retrieval_share >= 0 && !relaxes, "--retrieval-share", "--method gates");
  refuse(args.retrieval_chars >= 0 && !relaxes, "--retrieval-chars", "--method gates");
  const bool students = method == ScoreMethod::kRestoreOne || relaxes;
  refuse(!students && !args.student.empty(), "--student", "--method restore-one and gates");
  refuse(students && !args.teacher.empty(), "--teacher",
         "scores of a hybrid; of restore-one and gates the model is the teacher");
  refuse(!probes && !args.teacher.empty() && args.metric == "nll", "--teacher",
         "the metrics reverse-kl, accuracy and retrieval and to --method mmr");
  expect(!students || !args.student.empty(),
         "--method {}: expected --student, the model with every attention layer converted",
         args.method);
  refuse((probes || relaxes) && args.metric != "reverse-kl", "--metric",
         "the methods but mmr and gates");
  const char* const asking = "the metrics accuracy and retrieval, of all methods but mmr and gates";
  refuse(!asks && args.problems >= 0, "--problems", asking);
  refuse(!asks && args.max_new_tokens >= 0, "--max-new-tokens", asking);
  refuse(args.metric != "retrieval" && args.long_texts.given(), "--length", "--metric retrieval");
  refuse(args.metric != "accuracy" && !args.task.empty(), "--task", "--metric accuracy");
  refuse(args.metric != "accuracy" && !args.task_path.empty(), "--task-path", "--metric accuracy");
  expect(args.task.empty() == args.task_path.empty(), "expected both --task and --task-path");
}

ScoreOptions score_options(const ScoreArgs& args, ScoreMethod method) {
  ScoreOptions options;
  options.method = method;
  options.metric = args.metric;
  options.seed = static_cast<uint64_t>(args.seed);
  options.fresh = args.fresh;
  options.label = args.method;
  options.graft.mixer = method == ScoreMethod::kWindowSwap ? "sliding_window"
                        : args.mixer.empty()               ? options.graft.mixer
                                                           : args.mixer;
  options.graft.window = or_else(args.window, options.graft.window);
  options.graft.sinks = or_else(args.sinks, options.graft.sinks);
  TrainConfig& probe = options.probe;
  probe = gate_probe(options.seed);
  if (method != ScoreMethod::kGates) {
    probe.steps = 100;
    probe.schedule.peak = 3e-4;
    probe.align.all_tokens = false;
  }
  probe.steps = or_else(args.steps, probe.steps);
  probe.sequence_length = or_else(args.sequence, probe.sequence_length);
  probe.schedule.peak = or_else(args.rate, probe.schedule.peak);
  options.price = or_else(args.price, options.price);
  probe.align.weight = or_else(args.hidden, probe.align.weight);
  check_fields(options.graft, "score");
  check_graft_options(options.graft, "score");
  check_fields(probe, "score");
  return options;
}

int run_score(const ScoreArgs& args) {
  const ScoreMethod method = parse_score_method(args.method);
  check_applies(args, method);
  const ScoreOptions options = score_options(args, method);
  check_scores_path(args.output);
  const StopAnywhere stop("nothing is scored");
  const LoadOptions load{.storage = MatrixStorage::kStored, .device = args.device.device()};
  LoadedModel base = load_model(args.model, load);
  LoadedModel original;
  if (!args.teacher.empty()) {
    original = load_model(args.teacher, load);
  }
  Model& teacher = original.model ? *original.model : *base.model;

  DataPlan files;
  files.train = args.data;
  files.valid = args.data;
  EvaluationPlan evaluate;
  evaluate.held_out_documents = args.documents;
  evaluate.held_out_tokens = args.max_tokens;
  evaluate.task = args.task;
  evaluate.task_path = args.task_path;
  const bool asks = metric_asks(args.metric);
  const int64_t problems = asks ? or_else<int64_t>(args.problems, 100) : 0;
  evaluate.problems = args.metric == "accuracy" ? problems : 0;
  const bool long_texts = args.long_texts.given();
  evaluate.retrieval = args.metric == "retrieval" && !long_texts ? problems : 0;
  evaluate.max_new_tokens = or_else(args.max_new_tokens, evaluate.max_new_tokens);
  check_fields(evaluate, "score");
  expect(!asks || problems > 0, "--problems: expected at least 1");
  const RunData data(files, evaluate, options.seed,
                     load_tokenizer(args.model, base.model->spec().vocab));
  ScoreData scored;
  scored.tokenizer = &data.tokenizer();
  std::shared_ptr<DocumentSource> mixed;
  if (method == ScoreMethod::kGates) {
    const double share = or_else(args.retrieval_share, 0.5);
    expect(share <= 1.0, "--retrieval-share: expected 0 to 1, got {}", share);
    mixed = with_retrieval(data.shared_train(), data.tokenizer(), share,
                           std::max<int64_t>(args.retrieval_chars, 0), options.seed);
  }
  scored.train = mixed ? mixed.get() : &data.train();
  scored.documents = &data.held_out();
  const Task far =
      long_texts ? args.long_texts.task(problems, options.seed, data.tokenizer()) : Task{};
  scored.problems = long_texts                   ? &far
                    : args.metric == "retrieval" ? &data.retrieval()
                                                 : &data.task();
  scored.answers = long_texts ? data.long_answers(evaluate) : data.answers(evaluate);
  scored.answers.max_new_tokens = or_else(args.max_new_tokens, scored.answers.max_new_tokens);
  std::unique_ptr<MixerBank> bank;
  if (!args.student.empty()) {
    bank = std::make_unique<MixerBank>(*base.model);
    bank->add("student", load_bank(base, args.student), args.student);
    scored.bank = bank.get();
  }
  const Importance importance =
      score_importance(*base.model, teacher, options, scored, args.output);
  fmt::print("layer  {}{} (larger = needed more)\n",
             method == ScoreMethod::kRestoreOne ? "what its attention saves: " : "",
             score_heading(importance.metric));
  for (const int64_t layer : importance.order()) {
    const auto it = std::find_if(importance.layers.begin(), importance.layers.end(),
                                 [&](const LayerScore& s) { return s.layer == layer; });
    fmt::print("{:5}  {:.5g}\n", layer, it->score);
  }
  fmt::print("written to {}\n", args.output);
  return 0;
}

Action declare_score(Args& args) {
  auto a = std::make_shared<ScoreArgs>();
  args.positional("model", "the model whose layers are scored", &a->model);
  args.choice(
      "method",
      "what is asked: how the model does without the layer's mixer or the whole layer; how a "
      "new mixer there heals (mmr); with a window there; what its attention gains a student "
      "with all layers converted; how far gates between a student's mixers and all attention "
      "stay open for it",
      score_method_names(), &a->method);
  args.choice("metric",
              "of all methods but mmr and gates; nll of the teacher's own answers (--data) is the "
              "likelihood of its traces",
              placement_metrics(), &a->metric);
  args.option("data,d", "documents, JSON lines (generated problems otherwise)", &a->data);
  args.option("documents", "documents measured a layer", &a->documents, {1});
  args.option("max-tokens", "tokens of a document at most", &a->max_tokens, {1});
  args.option("teacher", "the original teacher, when the model is a hybrid", &a->teacher);
  args.option("student", "restore-one and gates: the model with every attention layer converted",
              &a->student);
  args.choice("mixer", "mmr: the mixer that is tried (mamba otherwise)", graft_mixers(), &a->mixer);
  args.option("window",
              "window-swap, and mmr of sliding_window and parallel: its tokens (128 otherwise)",
              &a->window);
  args.option("sinks",
              "window-swap, and mmr of sliding_window and parallel: first tokens seen too (0 "
              "otherwise)",
              &a->sinks);
  args.option("steps", "mmr: training steps a layer (100 otherwise); gates: steps (150 otherwise)",
              &a->steps);
  args.option("sequence", "mmr and gates: tokens a step (1024 otherwise)", &a->sequence);
  args.option("rate", "mmr: learning rate (3e-4 otherwise); gates: of their logits (0.2 otherwise)",
              &a->rate);
  args.option("price",
              "gates: highest price of attention in all layers, in nats a token (10 otherwise)",
              &a->price);
  args.option("hidden", "gates: weight of agreement in hidden states (1 otherwise)", &a->hidden);
  args.option("retrieval-share", "gates: of generated retrieval among documents (0.5 otherwise)",
              &a->retrieval_share);
  args.option("retrieval-chars", "gates: longest text of it (600 otherwise)", &a->retrieval_chars);
  args.choice("task", "metric accuracy (generated problems otherwise)", task_forms(), &a->task);
  args.option("task-path", "metric accuracy: the task's file", &a->task_path);
  args.option("problems", "metrics accuracy and retrieval: problems asked (100 otherwise)",
              &a->problems);
  args.option(
      "max-new-tokens",
      "accuracy and retrieval: tokens of an answer at most (256 otherwise, of long texts 64)",
      &a->max_new_tokens);
  a->long_texts.declare(args);
  args.option("seed", "of data and of what starts at random", &a->seed);
  args.option("output,o", "file of scores; goes on with what it holds of the same question",
              &a->output);
  a->device.declare(args);
  args.flag("fresh", "start anew where the file holds scores of something else", &a->fresh);
  return [a] { return run_score(*a); };
}

}  // namespace

Command score_command() {
  return {"score", "scores how much a model needs each layer's attention",
          "  cambium score models/teacher -o scores.json\n"
          "  cambium score MODEL --data text.jsonl --method leave-block-out --metric nll\n"
          "  cambium score HYBRID --teacher MODEL --method mmr --mixer mamba --steps 100\n"
          "  cambium score TEACHER --method window-swap --window 512 --metric retrieval --length "
          "4096,16384\n"
          "  cambium score TEACHER --method restore-one --student ALL_CONVERTED -d traces.jsonl "
          "--metric nll\n"
          "  cambium score TEACHER --method gates --student ALL_CONVERTED -o gates.json",
          declare_score};
}

}  // namespace cambium
