#include <cstdio>
#include <optional>

#include "base/signals.h"
#include "cli/commands.h"
#include "cli/options.h"
#include "eval/problem_source.h"
#include "train/train_job.h"

namespace cambium {
namespace {

struct DistillArgs {
  std::string student, teacher, output, data, plan, objective = "end_to_end";
  std::vector<std::string> set;
  std::vector<int64_t> layers;
  int64_t steps = 100, sequence = 1024, sequences = 1, warmup = 10, seed = 1, every = 0;
  double rate = 3e-4, reverse_kl = 1.0, forward_kl = 0.0, cross_entropy = 0.0, temperature = 1.0;
  DeviceOption device;
  bool mixers_only = false, freeze_attention = false, resume = false, checkpoint_layers = false;
};

int run(const DistillArgs& a) {
  const StopSignals signals;
  PlanTable table = PlanTable::parse("", "--set");
  table.set_all(a.set);
  TrainConfig config;
  config.objective = a.objective == "align" ? Objective::kAlign : Objective::kEndToEnd;
  config.steps = a.steps;
  config.sequence_length = a.sequence;
  config.sequences_per_step = a.sequences;
  config.seed = static_cast<uint64_t>(a.seed);
  config.loss = {};
  config.loss.reverse_kl = static_cast<float>(a.reverse_kl);
  config.loss.forward_kl = static_cast<float>(a.forward_kl);
  config.loss.cross_entropy = static_cast<float>(a.cross_entropy);
  config.loss.temperature = static_cast<float>(a.temperature);
  config.schedule.peak = a.rate;
  config.schedule.warmup_steps = a.warmup;
  config.checkpoint_layers = a.checkpoint_layers;
  config.checkpoint_every = a.every;
  config.align.layers = a.layers;
  config.trained = a.mixers_only ? Trained::kConverted : Trained::kEverything;
  config.freeze_attention = a.freeze_attention;
  config = read_train_config(table.table("train"), config);
  const ProblemSpec problems = read_problem_spec(table.table("problems"));
  table.expect_all_used();
  check_fields(config, "distill");
  const Device device = a.device.device();
  activations_of(config.precision, device);
  const std::shared_ptr<RunFolder> folder = claim_training_folder(a.output, a.resume, {"model"});
  std::optional<StopAnywhere> stop("the run has not begun");
  const LoadedModel teacher = load_model(a.teacher, load_on(device));
  LoadedModel student = load_model(a.student, load_on(device, &teacher));
  const Tokenizer tokenizer = Tokenizer::load(a.student);
  expect(tokenizer.fingerprint() == Tokenizer::load(a.teacher).fingerprint(),
         "{} and {} have different tokenizers; a student learns from a teacher with the same ids",
         a.student, a.teacher);
  config.folder = a.output;
  config.run_folder = folder;
  config.resume = a.resume;
  config.label = "distill";
  if (config.objective == Objective::kAlign && a.layers.empty()) {
    config.align.layers = converted_layers(student.model->spec(), &teacher.model->spec());
  }
  const std::shared_ptr<DocumentSource> source =
      a.data.empty() ? problem_source(tokenizer, problems, Split::kTrain, config.seed)
                     : load_jsonl(a.data, tokenizer);
  Trainer trainer(*student.model, student.weights, config, *source, teacher.model.get());
  stop.reset();  // from here on the trainer keeps what it has
  const TrainSummary summary = trainer.run();
  folder->expect_present();
  save_trained(*student.model, student.weights, std::filesystem::path(a.output) / "model",
               a.student,
               {{"student", a.student},
                {"teacher", a.teacher},
                {"tokens", summary.tokens},
                {"learned", summary.learned}});
  fmt::print("{} tokens in {:.0f} s, loss {:.4f} -> {:.4f}\nmodel in {}/model\n", summary.tokens,
             summary.seconds, summary.first_loss, summary.last_loss, a.output);
  return 0;
}

Action declare(Args& args) {
  auto a = std::make_shared<DistillArgs>();
  args.positional("student", "the hybrid to heal", &a->student);
  args.option("teacher,t", "the full-attention model it was made from", &a->teacher, true);
  args.option("output,o", "run folder: log, checkpoints, model", &a->output, true);
  args.option("data,d", "documents, JSON lines (generated problems otherwise)", &a->data);
  args.choice("objective", "what is learned (align: mixer outputs, teacher-forced)",
              {"end_to_end", "align"}, &a->objective);
  args.option("steps", "steps", &a->steps, {1});
  args.option("sequence", "tokens of a packed sequence", &a->sequence, {1});
  args.option("sequences", "sequences a step", &a->sequences, {1});
  args.option("rate", "peak learning rate", &a->rate);
  args.option("warmup", "warm-up steps", &a->warmup);
  args.option("reverse-kl", "weight", &a->reverse_kl);
  args.option("forward-kl", "weight", &a->forward_kl);
  args.option("cross-entropy", "weight", &a->cross_entropy);
  args.option("temperature", "of the KL terms", &a->temperature);
  args.option("layers", "align: only these layers", &a->layers);
  args.option("seed", "order of the data", &a->seed);
  args.option("checkpoint-every", "steps between checkpoints (0 = at the end)", &a->every);
  args.option("set", "train.KEY=value or problems.KEY=value, as in plans", &a->set);
  a->device.declare(args);
  args.flag("mixers-only", "train the converted layers' mixers only", &a->mixers_only);
  args.flag("freeze-attention", "leave the remaining attention as it is", &a->freeze_attention);
  args.flag("checkpoint-layers", "recompute activations: less memory, more time",
            &a->checkpoint_layers);
  args.flag("resume", "go on from the newest checkpoint", &a->resume);
  return [a] { return run(*a); };
}

}  // namespace

Command distill_command() {
  static const std::string examples =
      "  cambium distill HYBRID -t TEACHER -o out/heal --steps 200 --rate 1e-3\n"
      "  cambium distill HYBRID -t TEACHER -o out/align --objective align --steps 100\n"
      "  cambium distill HYBRID -t TEACHER -o out/heal --data traces.jsonl --freeze-attention\n"
      "Keys for --set:\n" +
      fields_help(list_fields<TrainConfig>(), "train.");
  return {"distill", "heals a hybrid against its teacher, one stage", examples.c_str(), declare};
}

}  // namespace cambium
