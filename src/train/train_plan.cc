#include "train/train_plan.h"

#include "base/error.h"

namespace cambium {
namespace {

/// Position of `name` among `names`, or an Error that lists them.
size_t choose(const PlanTable& plan, const std::string& key, const std::string& fallback,
              const std::vector<std::string>& names) {
  const std::string name = plan.get_string(key, fallback);
  for (size_t i = 0; i < names.size(); ++i) {
    if (names[i] == name) {
      return i;
    }
  }
  fail("{}: {} = \"{}\" is not known; expected one of {}", plan.where(), key, name,
       fmt::join(names, ", "));
}

float get_float(const PlanTable& plan, const std::string& key, float fallback) {
  return static_cast<float>(plan.get_real(key, static_cast<double>(fallback)));
}

void read_optimizer(const PlanTable& plan, OptimizerConfig& o) {
  o.kind = static_cast<OptimizerKind>(
      choose(plan, "kind", o.kind == OptimizerKind::kMuon ? "muon" : "adamw", {"adamw", "muon"}));
  o.beta1 = plan.get_real("beta1", o.beta1);
  o.beta2 = plan.get_real("beta2", o.beta2);
  o.epsilon = plan.get_real("epsilon", o.epsilon);
  o.clip_norm = plan.get_real("clip_norm", o.clip_norm);
  o.momentum = plan.get_real("momentum", o.momentum);
  for (int g = 0; g < kParameterGroups; ++g) {
    const auto id = static_cast<ParameterGroup>(g);
    const PlanTable table = plan.table(parameter_group_name(id));
    o.group(id).rate_scale = table.get_real("rate_scale", o.group(id).rate_scale);
    o.group(id).weight_decay = table.get_real("weight_decay", o.group(id).weight_decay);
    expect(o.group(id).rate_scale >= 0.0 && o.group(id).weight_decay >= 0.0,
           "{}: rate_scale and weight_decay must not be negative", table.where());
  }
}

}  // namespace

TrainConfig read_train_config(const PlanTable& plan, const TrainConfig& defaults, bool partial) {
  TrainConfig c = defaults;
  c.objective = static_cast<Objective>(
      choose(plan, "objective", c.objective == Objective::kAlign ? "align" : "end_to_end",
             {"end_to_end", "align"}));
  const char* const trained[] = {"everything", "mixers", "converted"};
  c.trained = static_cast<Trained>(choose(plan, "train", trained[static_cast<size_t>(c.trained)],
                                          {std::begin(trained), std::end(trained)}));
  c.sequence_length = plan.get_int("sequence_length", c.sequence_length);
  c.sequences_per_step = plan.get_int("sequences_per_step", c.sequences_per_step);
  c.long_documents = static_cast<LongDocuments>(
      choose(plan, "long_documents", c.long_documents == LongDocuments::kDrop ? "drop" : "cut",
             {"cut", "drop"}));
  const int64_t seed = plan.get_int("seed", static_cast<int64_t>(c.seed));
  c.seed = static_cast<uint64_t>(seed);
  c.steps = plan.get_int("steps", c.steps);
  const int64_t tokens = plan.get_int("tokens", 0);
  const int64_t step_tokens = c.sequence_length * c.sequences_per_step;
  if (tokens != 0) {
    expect(!plan.has("steps"), "{}: give steps or tokens, not both", plan.where());
    expect(tokens > 0 && step_tokens > 0,
           "{}: tokens, sequence_length and sequences_per_step must be above zero", plan.where());
    c.steps = (tokens + step_tokens - 1) / step_tokens;
  }
  expect(c.steps > 0 || (partial && c.steps == 0),
         "{}: steps or tokens must be given, and above zero", plan.where());
  c.checkpoint_layers = plan.get_bool("checkpoint_layers", c.checkpoint_layers);
  c.checkpoint_every = plan.get_int("checkpoint_every", c.checkpoint_every);
  c.keep_checkpoints = plan.get_int("keep_checkpoints", c.keep_checkpoints);

  const PlanTable loss = plan.table("loss");
  c.loss.cross_entropy = get_float(loss, "cross_entropy", c.loss.cross_entropy);
  c.loss.forward_kl = get_float(loss, "forward_kl", c.loss.forward_kl);
  c.loss.reverse_kl = get_float(loss, "reverse_kl", c.loss.reverse_kl);
  c.loss.temperature = get_float(loss, "temperature", c.loss.temperature);

  const PlanTable align = plan.table("align");
  if (align.has("layers")) {
    c.align.layers = align.get_int_list("layers");
  }
  c.align.weight = align.get_real("weight", c.align.weight);
  c.align.squared = align.get_bool("squared", c.align.squared);
  c.align.all_tokens = align.get_bool("all_tokens", c.align.all_tokens);

  read_optimizer(plan.table("optimizer"), c.optimizer);

  const PlanTable schedule = plan.table("schedule");
  c.schedule.peak = schedule.get_real("rate", c.schedule.peak);
  c.schedule.warmup_steps = schedule.get_int("warmup_steps", c.schedule.warmup_steps);
  c.schedule.decay = parse_decay(schedule.get_string("decay", decay_name(c.schedule.decay)));
  c.schedule.final_ratio = schedule.get_real("final_ratio", c.schedule.final_ratio);

  const PlanTable divergence = plan.table("divergence");
  c.divergence.factor = divergence.get_real("factor", c.divergence.factor);
  c.divergence.window = divergence.get_int("window", c.divergence.window);
  c.divergence.patience = divergence.get_int("patience", c.divergence.patience);
  return c;
}

}  // namespace cambium
