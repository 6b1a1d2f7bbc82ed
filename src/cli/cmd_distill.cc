#include <cstdio>
#include <optional>

#include "base/background.h"
#include "base/checksum.h"
#include "base/signals.h"
#include "base/text.h"
#include "cli/commands.h"
#include "cli/options.h"
#include "eval/problem_source.h"
#include "hybrid/on_policy.h"
#include "hybrid/scoring.h"
#include "train/stored_logits.h"
#include "train/train_job.h"

namespace cambium {
namespace {

struct DistillArgs {
  std::string student, teacher, output, data, prompts, logits, objective = "end_to_end";
  std::vector<std::string> set;
  std::vector<int64_t> layers;
  int64_t steps = 100, sequence = 1024, sequences = 1, warmup = 10, seed = 1, every = 0;
  double rate = 3e-4, reverse_kl = -1.0, forward_kl = -1.0, cross_entropy = 0.0, temperature = 1.0;
  DeviceOption device;
  PresetOption preset;
  StorageOption storage;
  bool supernet = false;
  bool mixers_only = false, freeze_attention = false, resume = false, checkpoint_layers = false;
};

int run(const DistillArgs& a) {
  const StopSignals signals;
  PlanTable table = PlanTable::parse("", "--set");
  table.set_all(a.set);
  const bool on_policy = a.objective == "on-policy";
  expect(on_policy || a.prompts.empty(),
         "--prompts belongs to --objective on-policy: the student answers them itself");
  expect(!a.teacher.empty() || !a.logits.empty(),
         "--teacher is missing; stored logits (--logits) can stand in its place");
  expect(a.logits.empty() || a.objective == "end_to_end",
         "--logits holds what a teacher says of the documents it was stored for: it belongs to "
         "--objective end_to_end, not {}",
         a.objective);
  TrainConfig config;
  config.objective = a.objective == "align" ? Objective::kAlign : Objective::kEndToEnd;
  config.steps = a.steps;
  config.sequence_length = a.sequence;
  config.sequences_per_step = a.sequences;
  config.seed = static_cast<uint64_t>(a.seed);
  config.loss = on_policy ? on_policy_loss() : LossConfig{.reverse_kl = 1.0F};
  if (a.reverse_kl >= 0.0 || a.forward_kl >= 0.0) {
    config.loss.reverse_kl = static_cast<float>(std::max(a.reverse_kl, 0.0));
    config.loss.forward_kl = static_cast<float>(std::max(a.forward_kl, 0.0));
  }
  config.loss.cross_entropy = static_cast<float>(a.cross_entropy);
  config.loss.temperature = static_cast<float>(a.temperature);
  config.schedule.peak = a.rate;
  config.schedule.warmup_steps = a.warmup;
  config.checkpoint_layers = a.checkpoint_layers;
  config.checkpoint_every = a.every;
  config.align.layers = a.layers;
  config.supernet.sampling = a.supernet ? PlacementSampling::kUniform : PlacementSampling::kNone;
  config.trained = a.mixers_only ? Trained::kConverted : Trained::kEverything;
  config.freeze_attention = a.freeze_attention;
  config = read_train_config(table.table("train"), config);
  OnPolicyConfig rounds;
  const PlanTable of_rounds = table.table("on_policy");
  expect(on_policy || of_rounds.keys().empty(),
         "--set on_policy.{} belongs to --objective on-policy, not {}",
         on_policy ? "" : join(of_rounds.keys(), ", on_policy."), a.objective);
  if (on_policy) {
    read_fields(rounds, of_rounds);
    check_on_policy(config, "distill");
  }
  const ProblemSpec problems = read_problem_spec(table.table("problems"));
  table.expect_all_used();
  check_fields(config, "distill");
  const Device device = a.device.device();
  activations_of(config.precision, device);
  const std::shared_ptr<RunFolder> folder =
      claim_training_folder(a.output, a.resume, {"model", "rounds"});
  std::optional<StopAnywhere> stop("the run has not begun");
  const Tokenizer tokenizer = load_tokenizer(a.student, read_spec(a.student).vocab);
  std::optional<StoredLogits> logits;
  if (!a.logits.empty()) {
    logits.emplace(a.logits);
    logits->expect_tokenizer(checksum_text(tokenizer.fingerprint()));
    config.logits = &*logits;
  }
  LoadedModel teacher;
  if (!a.teacher.empty()) {
    teacher = load_model(a.teacher, load_on(device));
    expect(tokenizer.fingerprint() == Tokenizer::load(a.teacher).fingerprint(),
           "{} and {} have different tokenizers; a student learns from a teacher with the same ids",
           a.student, a.teacher);
    if (logits) {
      logits->expect_teacher(model_digest(*teacher.model));
    }
  }
  LoadOptions of_student = load_on(device, teacher.model == nullptr ? nullptr : &teacher);
  of_student.preset = a.preset.name;
  LoadedModel student = load_model(a.student, of_student);
  if (teacher.model != nullptr) {
    config.converted = converted_mixers(student.model->spec(), teacher.model->spec());
  }
  config.folder = a.output;
  config.run_folder = folder;
  Background background;
  config.background = &background;
  config.resume = a.resume;
  config.label = "distill";
  if (config.objective == Objective::kAlign && a.layers.empty()) {
    config.align.layers = converted_layers(student.model->spec(), &teacher.model->spec());
  }
  const std::shared_ptr<DocumentSource> source =
      !a.prompts.empty() ? load_prompts(a.prompts, tokenizer)
      : a.data.empty()   ? problem_source(tokenizer, problems, Split::kTrain, config.seed)
                         : load_jsonl(a.data, tokenizer);
  TrainSummary summary;
  if (on_policy) {
    stop.reset();  // from here on the trainer keeps what it has
    summary = run_on_policy(student, config, rounds, *source, tokenizer, *teacher.model);
  } else {
    Trainer trainer(*student.model, student.weights, config, *source,
                    logits ? nullptr : teacher.model.get());
    stop.reset();
    summary = trainer.run();
  }
  folder->expect_present();
  save_trained(*student.model, student.weights, std::filesystem::path(a.output) / "model",
               a.student,
               {{"student", a.student},
                {"teacher", a.teacher.empty() ? logits->info().teacher_name : a.teacher},
                {"tokens", summary.tokens},
                {"learned", summary.learned}},
               a.storage.storage());
  background.wait();
  fmt::print("{} tokens in {:.0f} s, loss {:.4f} -> {:.4f}\nmodel in {}/model\n", summary.tokens,
             summary.seconds, summary.first_loss, summary.last_loss, a.output);
  return 0;
}

Action declare(Args& args) {
  auto a = std::make_shared<DistillArgs>();
  args.positional("student", "the hybrid to heal", &a->student);
  args.option("teacher,t", "the full-attention model it was made from", &a->teacher);
  args.option("logits", "the teacher's stored logits (cambium logits), in its place", &a->logits);
  args.option("output,o", "run folder: log, checkpoints, model", &a->output, true);
  args.option("data,d", "documents, JSON lines (generated problems otherwise)", &a->data);
  args.option("prompts",
              "on-policy: what the student answers, JSON lines (those of --data otherwise)",
              &a->prompts);
  args.choice("objective",
              "what is learned (align: mixer outputs, teacher-forced; on-policy: the teacher's "
              "distribution on the student's own answers)",
              {"end_to_end", "align", "on-policy"}, &a->objective);
  args.option("steps", "steps", &a->steps, {1});
  args.option("sequence", "tokens of a packed sequence", &a->sequence, {1});
  args.option("sequences", "sequences a step", &a->sequences, {1});
  args.option("rate", "peak learning rate", &a->rate);
  args.option("warmup", "warm-up steps", &a->warmup);
  args.option("reverse-kl", "weight; 1 unless a KL is given, on-policy half of each",
              &a->reverse_kl);
  args.option("forward-kl", "weight", &a->forward_kl);
  args.option("cross-entropy", "weight", &a->cross_entropy);
  args.option("temperature", "of the KL terms", &a->temperature);
  args.option("layers", "align: only these layers", &a->layers);
  args.option("seed", "order of the data", &a->seed);
  args.option("checkpoint-every", "steps between checkpoints (0 = at the end)", &a->every);
  args.option("set", "train.KEY=value, problems.KEY=value or on_policy.KEY=value, as in plans",
              &a->set);
  a->device.declare(args);
  a->preset.declare(args);
  args.flag("supernet",
            "the student is a supernet: each step draws the mixers that run (as "
            "train.supernet.sampling says, otherwise uniform)",
            &a->supernet);
  args.flag("mixers-only", "train the converted layers' mixers only", &a->mixers_only);
  args.flag("freeze-attention", "leave the remaining attention as it is", &a->freeze_attention);
  args.flag("checkpoint-layers", "recompute activations: less memory, more time",
            &a->checkpoint_layers);
  a->storage.declare(args);
  args.flag("resume", "go on from the newest checkpoint", &a->resume);
  return [a] { return run(*a); };
}

}  // namespace

Command distill_command() {
  static const std::string examples =
      "  cambium distill HYBRID -t TEACHER -o out/heal --steps 200 --rate 1e-3\n"
      "  cambium distill HYBRID -t TEACHER -o out/align --objective align --steps 100\n"
      "  cambium distill HYBRID -t TEACHER -o out/heal --data traces.jsonl --freeze-attention\n"
      "  cambium distill SUPERNET -t TEACHER -o out/super --supernet --mixers-only\n"
      "  cambium distill HYBRID -t TEACHER -o out/own --objective on-policy --prompts p.jsonl\n"
      "  cambium distill HYBRID --logits text.logits -o out/heal --data text.jsonl\n"
      "Keys for --set:\n" +
      fields_help(list_fields<TrainConfig>(), "train.") +
      fields_help(list_fields<OnPolicyConfig>(), "on_policy.");
  return {"distill", "heals a hybrid against its teacher, one stage", examples.c_str(), declare};
}

}  // namespace cambium
