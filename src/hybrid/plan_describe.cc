// What a plan would do, take and need, worked out from shapes alone.
#include <algorithm>
#include <map>

#include "base/text.h"
#include "hybrid/importance.h"
#include "hybrid/plan.h"
#include "model/model.h"
#include "serve/cache_plan.h"

namespace cambium {
namespace {

// What training one stage's model costs, from shapes.
struct Shapes {
  double parameters = 0.0;
  double mixers = 0.0;     // parameters of all mixers
  double converted = 0.0;  // parameters of the mixers that the teacher does not have
  double added = 0.0;      // parameters of the mixers this stage adds
  double attended = 0.0;   // channels of queries over all attention layers

  Shapes(const ModelSpec& spec, const ModelSpec& teacher) {
    Model model(spec);
    parameters = static_cast<double>(model.parameter_count());
    const std::vector<std::string> other = converted_mixers(spec, teacher);
    for (int64_t i = 0; i < model.layer_count(); ++i) {
      for (const UnitSpec& mixer : spec.layers[static_cast<size_t>(i)].mixers()) {
        const std::string prefix = unit_prefix(i, mixer);
        double count = 0.0;
        model.visit_layer(i, [&](const std::string& name, Parameter& p) {
          count += name.starts_with(prefix) ? static_cast<double>(p.numel()) : 0.0;
        });
        mixers += count;
        if (std::find(other.begin(), other.end(), prefix) != other.end()) {
          converted += count;
        }
        if (mixer.kind == "attention") {
          attended += static_cast<double>(mixer.options.integer("attention", "heads") *
                                          mixer.options.integer("attention", "head_dim"));
        }
      }
    }
  }

  double trained(const TrainConfig& c) const {
    if (c.objective == Objective::kAlign) {
      return added;
    }
    return c.trained == Trained::kMixers      ? mixers
           : c.trained == Trained::kConverted ? converted
                                              : parameters;
  }

  // FLOPs of one token's forward pass: two for each parameter, and queries and values against half
  // the sequence on average.
  double forward(int64_t sequence) const {
    return 2.0 * parameters + 2.0 * attended * static_cast<double>(sequence);
  }
};

// FLOPs a token. Backward is a product for the inputs (all of the model) and one for the weights
// (of what is trained); activation checkpointing runs the forward pass twice.
double training_flops(const TrainConfig& c, const Shapes& student, const Shapes& teacher) {
  const double taught = teacher.forward(c.sequence_length);
  const double trained = student.trained(c);
  if (c.objective == Objective::kAlign) {
    return taught + 6.0 * trained;
  }
  const double once = student.forward(c.sequence_length);
  const double watch = c.loss.reverse_kl != 0.0F || c.loss.forward_kl != 0.0F ? taught : 0.0;
  return watch + once * (c.checkpoint_layers ? 3.0 : 2.0) + 2.0 * trained;
}

// Bytes of one sequence's activations: what blocks of this kind keep for the backward pass, about
// 16 times the width and 4 times the feed-forward of a token in fp32. With checkpointing a block's
// input alone, and one block at a time in full.
double activation_bytes(const TrainConfig& c, const ModelSpec& spec) {
  const auto tokens = static_cast<double>(c.sequence_length);
  const auto width = static_cast<double>(spec.width);
  double all = 0.0;
  double largest = 0.0;
  for (const LayerSpec& layer : spec.layers) {
    const UnitSpec* ff = layer.feed_forward();
    const int64_t inner = ff == nullptr ? 0 : ff->options.integer(ff->kind, "inner", 0);
    const double block = 16.0 * width + 4.0 * static_cast<double>(inner);
    all += c.checkpoint_layers ? width : block;
    largest = std::max(largest, block);
  }
  const bool one_block = c.checkpoint_layers || c.objective == Objective::kAlign;
  return 4.0 * tokens * (one_block ? largest + (c.checkpoint_layers ? all : 0.0) : all);
}

std::string describe_gate(const GatePlan& gate) {
  std::vector<std::string> asks;
  if (gate.max_reverse_kl > 0) {
    asks.push_back(fmt::format("held-out reverse KL at most {:g}", gate.max_reverse_kl));
  }
  if (gate.min_accuracy_kept > 0) {
    asks.push_back(
        fmt::format("at least {:.0f} % of the teacher's accuracy", 100.0 * gate.min_accuracy_kept));
  }
  return fmt::format("  gate     {}; {} retries\n", asks.empty() ? "none" : join(asks, " and "),
                     gate.retries);
}

std::string describe_cache(const ModelSpec& spec) {
  const CachePlan cache(Model(spec), {});
  return fmt::format("{} a token and {} a sequence, as served",
                     human_bytes(static_cast<uint64_t>(cache.lasting_bytes_per_token())),
                     human_bytes(static_cast<uint64_t>(cache.fixed_bytes())));
}

}  // namespace

std::string describe_plan(const HybridPlan& plan, const ModelSpec& teacher, double flops) {
  const Shapes taught(teacher, teacher);
  const auto layers = static_cast<int64_t>(teacher.layers.size());
  std::string s;
  s += fmt::format("plan       {}\nteacher    {}: {} parameters, {} layers, width {}\n", plan.name,
                   plan.teacher.string(), human_count(taught.parameters), layers, teacher.width);
  s += fmt::format("cache      {}\n", describe_cache(teacher));
  s += fmt::format("data       {}\n\n",
                   plan.data.train.empty() ? "generated problems" : plan.data.train);
  double all_tokens = 0.0;
  double all_flops = 0.0;
  double memory = 0.0;
  std::map<std::string, ModelSpec> hybrids{{"", teacher}};
  for (const StagePlan& stage : plan.stages) {
    const int64_t before = plan.layers_before(stage);
    const double converted_before = Shapes(hybrids.at(stage.from), teacher).converted;
    ModelSpec hybrid = hybrids.at(stage.from);
    s += fmt::format("stage {}: {} of {} layers ({} more) become {}{}{}{}\n", stage.name,
                     stage.layers, layers, stage.layers - before, stage.graft.mixer,
                     stage.graft.faithful ? ", the released layout" : "",
                     stage.from.empty() ? "" : ", from " + stage.from,
                     stage.branch ? ", a branch" : "");
    s += fmt::format("  place    {}", stage.layers > before ? stage.place.method : "nothing");
    const TrainConfig& probe = stage.place.probe;
    const bool places = stage.layers > before;
    if (places && stage.place.method == "mmr") {
      const auto probes = static_cast<int64_t>(attention_layers(hybrid).size());
      const double tokens = static_cast<double>(probes * probe.least_steps() *
                                                probe.sequences_per_step * probe.sequence_length);
      s += fmt::format(": {} probes of {} steps = {} tokens\n", probes, probe.least_steps(),
                       human_count(tokens));
    } else if (places && stage.place.method.starts_with("leave")) {
      s += fmt::format(" by {} on {}\n", stage.place.metric,
                       stage.place.metric == "accuracy"
                           ? fmt::format("{} problems, equal shares by reverse KL on {} documents",
                                         stage.place.problems > 0 ? stage.place.problems
                                                                  : plan.evaluate.problems,
                                         stage.place.documents)
                           : fmt::format("{} documents", stage.place.documents));
    } else {
      s += "\n";
    }
    // Which layers go changes neither cost nor cache: a teacher's layers of attention are alike.
    std::vector<int64_t> taken = attention_layers(hybrid);
    taken.resize(std::min(taken.size(), static_cast<size_t>(stage.layers - before)));
    for (const int64_t layer : taken) {
      const auto at = static_cast<size_t>(layer);
      *hybrid.layers[at].mixer() =
          graft_spec(*teacher.layers[at].mixer(), teacher.width, stage.graft);
    }
    Shapes student(hybrid, teacher);
    student.added = student.converted - converted_before;
    for (const Phase& phase : stage.phases) {
      const TrainConfig& c = phase.config;
      const auto tokens = static_cast<double>(c.least_steps() * c.step_tokens());
      const double work = tokens * training_flops(c, student, taught);
      const double trained = student.trained(c);
      all_tokens += tokens;
      all_flops += work;
      // Weights of teacher, last hybrid and student; gradient and two moments of what is trained.
      memory = std::max(memory, 4.0 * (2.0 * taught.parameters + student.parameters) +
                                    12.0 * trained + activation_bytes(c, hybrid));
      s += fmt::format(
          "  {:<8} {}{} steps of {} x {} tokens = {} tokens{}, rate {:g}, {} warm-up, {} "
          "decay; {} parameters trained; {:.3g} FLOP, {}\n",
          phase.name, c.tokens > 0 ? "at least " : "", c.least_steps(), c.sequences_per_step,
          c.sequence_length, human_count(tokens), c.tokens > 0 ? "" : " at most", c.schedule.peak,
          c.schedule.warmup_steps, decay_name(c.schedule.decay), human_count(trained), work,
          human_duration(work / flops));
    }
    if (!stage.merge.with.empty()) {
      s += fmt::format("  merge    with {}\n", join(stage.merge.with, ", "));
    }
    s += describe_gate(stage.gate);
    s += fmt::format("  cache    {}\n\n", describe_cache(hybrid));
    hybrids[stage.name] = std::move(hybrid);
  }
  s += fmt::format(
      "in all     at most {} tokens, {:.3g} FLOP: {} at {:.3g} FLOP/s (--flops changes it); "
      "probes, retries and measuring come on top\n",
      human_count(all_tokens), all_flops, human_duration(all_flops / flops), flops);
  s += fmt::format(
      "memory     about {}: weights in fp32 of teacher, last hybrid and student, "
      "gradients and two moments of what is trained, one sequence's activations\n",
      human_bytes(static_cast<uint64_t>(memory)));
  return s;
}

}  // namespace cambium
