// What a plan would do, take and need, worked out from shapes alone.
#include <algorithm>
#include <filesystem>
#include <map>
#include <set>

#include "base/text.h"
#include "hybrid/grafts/graft_table.h"
#include "hybrid/importance.h"
#include "hybrid/plan.h"
#include "model/model.h"
#include "model/supernet.h"
#include "nn/units/units.h"
#include "serve/cache_plan.h"
#include "train/stored_logits.h"
#include "train/training_cost.h"

namespace cambium {
namespace {

// What training one stage's model costs, from shapes. Of a supernet's mixers one of each choice
// runs in a step, on average as much as the mean of them.
struct Shapes {
  double parameters = 0.0;
  double running = 0.0;    // of them, those that a step reads
  double mixers = 0.0;     // parameters of all mixers
  double converted = 0.0;  // parameters of the mixers that the teacher does not have
  double converted_running = 0.0;
  double attention = 0.0;  // parameters of the mixers of full attention
  double added = 0.0;      // parameters of the mixers this stage adds
  double attended = 0.0;   // channels of queries or values, on average, over all attention layers

  Shapes(const ModelSpec& spec, const ModelSpec& teacher) {
    Model model(spec);
    parameters = static_cast<double>(model.parameter_count());
    const std::vector<std::string> other = converted_mixers(spec, teacher);
    running = parameters;
    for (int64_t i = 0; i < model.layer_count(); ++i) {
      const LayerSpec& layer = spec.layers[static_cast<size_t>(i)];
      size_t choices = layer.choice() == nullptr ? 0 : layer.choice()->choices();
      const double of_choice = 1.0 / static_cast<double>(std::max<size_t>(choices, 1));
      for (const UnitSpec& mixer : layer.all_mixers()) {
        const double share = choices > 0 ? of_choice : 1.0;
        choices -= choices > 0 ? 1 : 0;
        const std::string prefix = unit_prefix(i, mixer);
        double count = 0.0;
        model.visit_layer(i, [&](const std::string& name, Parameter& p) {
          count += name.starts_with(prefix) ? static_cast<double>(p.numel()) : 0.0;
        });
        mixers += count;
        running -= count * (1.0 - share);
        if (std::find(other.begin(), other.end(), prefix) != other.end()) {
          converted += count;
          converted_running += count * share;
        }
        if (is_attention(mixer)) {
          attention += count;
          const AttentionSizes shape = attention_shape(mixer, model.spec().width);
          attended +=
              share * static_cast<double>(shape.heads * (shape.dim + shape.value_dim)) / 2.0;
        }
      }
    }
  }

  double trained(const TrainConfig& c) const {
    if (c.objective == Objective::kAlign) {
      return added;
    }
    // Converted mixers are none of full attention.
    const double frozen = c.freeze_attention ? attention : 0.0;
    return c.trained == Trained::kMixers      ? mixers - frozen
           : c.trained == Trained::kConverted ? converted
                                              : parameters - frozen;
  }

  // Of the trained parameters, those that a step leaves alone.
  double resting(const TrainConfig& c) const {
    return c.objective == Objective::kAlign || c.trained == Trained::kConverted
               ? converted - converted_running
               : parameters - running;
  }

  // FLOPs of one token's forward pass: two for each parameter, and queries and values against half
  // the sequence on average.
  double forward(int64_t sequence) const {
    return 2.0 * running + 2.0 * attended * static_cast<double>(sequence);
  }
};

// FLOPs a token. Backward is a product for the inputs (all of the model) and one for the weights
// (of what is trained); activation checkpointing runs the forward pass twice.
// `watched`: the teacher runs beside the student, and its logits are not read from a file.
double training_flops(const TrainConfig& c, const Shapes& student, const Shapes& teacher,
                      bool watched) {
  const double taught = watched ? teacher.forward(c.sequence_length) : 0.0;
  const double trained = student.trained(c) - student.resting(c);
  if (c.objective == Objective::kAlign) {
    return taught + 6.0 * trained;
  }
  const double once = student.forward(c.sequence_length);
  const double watch = c.loss.reverse_kl != 0.0F || c.loss.forward_kl != 0.0F ? taught : 0.0;
  return watch + once * (c.checkpoint_layers ? 3.0 : 2.0) + 2.0 * trained;
}

/// What the answers of an on-policy phase take, beside learning from them. Every token of its
/// sequences, prompts included, goes through the student once; those of the answers one by one, as
/// many sequences at once as a batch has, and each such step reads the weights that run.
struct Sampling {
  double tokens = 0.0, flops = 0.0, steps = 0.0, bytes = 0.0;

  Sampling(const OnPolicyConfig& c, const Shapes& student, const TrainConfig& train, double all,
           Device device)
      : tokens(all),
        flops(all * student.forward(train.sequence_length)),
        steps(all / static_cast<double>(c.batch)),
        bytes(student.running *
              static_cast<double>(dtype_size(activations_of(train.precision, device)))) {}

  std::string describe(double speed) const {
    return fmt::format(
        "  sample   at most {} tokens of prompts and answers, {:.3g} FLOP, {}; about {} decode "
        "steps "
        "where all of them are answers, each of which reads {} of weights\n",
        human_count(tokens), flops, human_duration(flops / speed), human_count(steps),
        human_bytes(static_cast<uint64_t>(bytes)));
  }
};

/// What a phase's stored logits take where they are not there yet. How many tokens documents have
/// is not known before they are read: of a file, not more than it has bytes.
struct Storing {
  std::string file;
  bool there = false, known = true;
  double tokens = 0.0, flops = 0.0;
  int64_t row = 0;

  Storing(const Phase& phase, const HybridPlan& plan, const ModelSpec& teacher,
          const Shapes& taught)
      : file(phase.logits.file), there(std::filesystem::exists(file)) {
    const LogitsPlan& logits = phase.logits;
    const auto sequence = static_cast<double>(phase.config.sequence_length);
    const std::string& data = phase.data.empty() ? plan.data.train : phase.data;
    std::error_code missing;
    const auto bytes =
        static_cast<double>(data.empty() ? 0 : std::filesystem::file_size(data, missing));
    tokens = static_cast<double>(logits.documents) * sequence;
    if (!data.empty() && !missing) {
      tokens = logits.documents > 0 ? std::min(tokens, bytes) : bytes;
    }
    known = tokens > 0.0;
    row = stored_row_bytes(std::min(logits.top_k, teacher.vocab), teacher.vocab);
    flops = there ? 0.0 : tokens * taught.forward(phase.config.sequence_length);
  }

  std::string describe(double speed, bool first) const {
    const std::string sizes =
        known ? fmt::format("at most {} tokens, {} on disk", human_count(tokens),
                            human_bytes(static_cast<uint64_t>(tokens * static_cast<double>(row))))
              : "as many tokens as its data has, which is not there yet";
    return fmt::format(
        "  logits   {}: {} bytes a token; {}\n", file, row,
        there    ? "it is there"
        : !first ? "made before"
                 : fmt::format("{}, {:.3g} FLOP, {}", sizes, flops, human_duration(flops / speed)));
  }
};

// How much of a model training has changed: what it has in common with the teacher is held once.
enum class Changed : uint8_t { kConverted, kMixers, kEverything };

Changed changed_by(const TrainConfig& c) {
  const bool mixers = c.objective == Objective::kAlign || c.trained != Trained::kEverything;
  return !mixers                                                             ? Changed::kEverything
         : c.trained == Trained::kMixers && c.objective != Objective::kAlign ? Changed::kMixers
                                                                             : Changed::kConverted;
}

std::vector<std::string> mixer_prefixes(const ModelSpec& spec) {
  std::vector<std::string> prefixes;
  for (size_t i = 0; i < spec.layers.size(); ++i) {
    for (const UnitSpec& mixer : spec.layers[i].all_mixers()) {
      prefixes.push_back(unit_prefix(static_cast<int64_t>(i), mixer));
    }
  }
  return prefixes;
}

// What a phase takes of `device`; `taken` are the layers that an alignment trains, `before` what
// earlier training has changed.
std::vector<MemoryItem> phase_memory(const Phase& phase, const ModelSpec& hybrid,
                                     const ModelSpec& teacher, const std::vector<int64_t>& taken,
                                     Changed before, Device device) {
  const TrainConfig& c = phase.config;
  const std::vector<std::string> converted = converted_mixers(hybrid, teacher);
  const std::vector<std::string> mixers = mixer_prefixes(hybrid);
  const std::vector<std::string> attention = attention_mixers(hybrid);
  std::vector<std::string> added;
  for (const int64_t layer : taken) {
    added.push_back(unit_prefix(layer, *hybrid.layers[static_cast<size_t>(layer)].mixer()));
  }
  TrainingShape shape;
  shape.student = &hybrid;
  shape.teacher = &teacher;  // held by the run, whether the phase asks it or not
  shape.activations = activations_of(c.precision, device);
  shape.bf16_matrices = device.kind == Device::kCuda;
  shape.trained = [&](const std::string& name) {
    const std::vector<std::string>& these = c.objective == Objective::kAlign ? added
                                            : c.trained == Trained::kMixers  ? mixers
                                                                             : converted;
    return (changed_by(c) == Changed::kEverything || starts_with_one(name, these)) &&
           !(c.freeze_attention && starts_with_one(name, attention));
  };
  shape.shared = [&](const std::string& name) {
    return before != Changed::kEverything &&
           !starts_with_one(name, before == Changed::kMixers ? mixers : converted);
  };
  return training_memory(c, shape);
}

std::string describe_memory(const std::vector<MemoryItem>& items, const std::string& where,
                            Device device) {
  const auto bytes = [](int64_t n) { return human_bytes(static_cast<uint64_t>(n)); };
  std::string s = fmt::format("memory     about {} of {}, in {}:\n", bytes(total_bytes(items)),
                              device.kind == Device::kCpu ? "the host" : "a GPU", where);
  for (const MemoryItem& item : items) {
    if (item.bytes > 0) {
      s += fmt::format("           {:>10}  {}{}\n", bytes(item.bytes), item.kind,
                       item.host ? " (the host's)" : "");
    }
  }
  if (device.kind == Device::kCuda) {
    s += "           matrices in bf16, as files of bf16 are held; files of f32 take twice that\n";
  }
  return s;
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
  if (gate.min_retrieval_kept > 0) {
    asks.push_back(fmt::format("at least {:.0f} % of the teacher's retrieval at each length",
                               100.0 * gate.min_retrieval_kept));
  }
  if (gate.max_answer_length_ratio > 0) {
    asks.push_back(fmt::format("answers of at most {:g} times the teacher's length",
                               gate.max_answer_length_ratio));
  }
  if (gate.max_sticky > 0) {
    asks.push_back(
        fmt::format("at most {:.0f} % of questions with the same letter in all rotations",
                    100.0 * gate.max_sticky));
  }
  if (gate.cached_equals_uncached) {
    asks.emplace_back("the same through a cache");
  }
  return fmt::format("  gate     {}; {} retries\n", asks.empty() ? "none" : join(asks, " and "),
                     gate.retries);
}

// How the stage chooses among so many layers of attention.
std::string describe_place(const HybridPlan& plan, const StagePlan& stage, int64_t open) {
  const PlacePlan& place = stage.place;
  if (plan.layers_added(stage) == 0) {
    return "  place    nothing\n";
  }
  std::string s = fmt::format("  place    {}", place.method);
  if (place.trains()) {
    const TrainConfig& probe = place.probe;
    const int64_t probes = place.method == "mmr" ? open : 1;
    s += fmt::format(
        ": {}{} steps = {} tokens",
        place.method == "mmr" ? fmt::format("{} probes of ", probes) : "", probe.least_steps(),
        human_count(static_cast<double>(probes * probe.least_steps() * probe.step_tokens())));
  } else if (place.measures()) {
    const bool search = place.method == "search";
    const bool retrieval = place.metric == "retrieval";
    const int64_t reported = retrieval ? plan.evaluate.retrieval : plan.evaluate.problems;
    const std::string documents = fmt::format("{} documents{}", place.documents,
                                              place.data.empty() ? "" : " of " + place.data);
    s += fmt::format(
        " by {} on {}", place.metric,
        !place.asks() ? documents
                      : fmt::format("{} {}{}", place.problems > 0 ? place.problems : reported,
                                    retrieval ? "texts" : "problems",
                                    search ? "" : ", equal shares by reverse KL on " + documents));
    s += search ? fmt::format(", {} placements", place.evaluations) : "";
  }
  if (place.tries()) {
    const Phase* align = stage.phase("align");
    const size_t trials = place.method == "search" ? stage.kinds().size() : 1;
    s += fmt::format(", of all of it converted{}",
                     align == nullptr ? std::string()
                                      : fmt::format(" and aligned ({} of {} steps)", trials,
                                                    align->config.least_steps()));
  }
  if (place.method == "search" && place.has_budget()) {
    const std::string most =
        place.budget_cost > 0.0
            ? fmt::format("{:g}", place.budget_cost)
            : fmt::format("{:.1f} % of what it starts from", 100.0 * place.choice().share);
    s += fmt::format("\n  budget   {} ({}, {} tokens of context)", most, cost_unit(place.cost.kind),
                     place.cost.context);
  }
  if (place.method == "search") {
    for (const std::string& count : place.at_least) {
      s += fmt::format(", at least {}", count);
    }
    for (const std::string& count : place.at_most) {
      s += fmt::format(", at most {}", count);
    }
    for (const std::string& count : place.none_or_at_least) {
      s += fmt::format(", none or at least {}", count);
    }
  }
  return s + "\n";
}

std::string describe_cache(const ModelSpec& spec) {
  const CachePlan cache(Model(spec), {});
  return fmt::format("{} a token and {} a sequence, as served",
                     human_bytes(static_cast<uint64_t>(cache.lasting_bytes_per_token())),
                     human_bytes(static_cast<uint64_t>(cache.fixed_bytes())));
}

}  // namespace

std::string describe_plan(const HybridPlan& plan, const ModelSpec& teacher, double flops,
                          Device device) {
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
  std::vector<MemoryItem> memory;
  std::string most;              // where so much is taken
  std::set<std::string> stored;  // files of logits that an earlier phase has made
  std::map<std::string, Changed> changed{{"", Changed::kConverted}};
  std::map<std::string, ModelSpec> hybrids{{"", teacher}};
  for (const StagePlan& stage : plan.stages) {
    const int64_t added = plan.layers_added(stage);
    const double converted_before = Shapes(hybrids.at(stage.from), teacher).converted;
    ModelSpec hybrid = hybrids.at(stage.from);
    std::vector<GraftOptions> grafts = stage.kinds();
    grafts.insert(grafts.end(), stage.beside.begin(), stage.beside.end());
    // Which layers go changes neither cost nor cache: a teacher's layers of attention are alike.
    const std::vector<int64_t> taken = likely_layers(stage, hybrid, added);
    std::vector<std::string> kinds;
    for (const GraftOptions& graft : grafts) {
      kinds.push_back(graft.mixer);
    }
    const std::string counts =
        stage.layers == kAnyLayers
            ? fmt::format("{} of {} layers",
                          added == 0 ? "as many as before" : "as many as the search takes", layers)
            : fmt::format("{} of {} layers ({} more)", stage.layers, layers, added);
    s += fmt::format("stage {}: {} {} {}{}{}{}\n", stage.name, counts,
                     stage.makes_supernet() ? "choose among attention," : "become",
                     join(kinds, stage.others.empty() ? ", " : " or "),
                     stage.graft.faithful ? ", the released layout" : "",
                     stage.from.empty() ? "" : ", from " + stage.from,
                     stage.branch ? ", a branch" : "");
    s += describe_place(plan, stage, std::ssize(attention_layers(hybrid)));
    size_t turn = 0;
    for (const int64_t layer : taken) {
      const auto at = static_cast<size_t>(layer);
      const UnitSpec attention = *teacher.layers[at].mixer();
      if (!stage.makes_supernet()) {
        const GraftOptions& kind = grafts[turn++ % grafts.size()];
        *hybrid.layers[at].mixer() = graft_spec(attention, teacher.width, kind);
        continue;
      }
      std::vector<UnitSpec> units = {attention};
      for (const GraftOptions& graft : grafts) {
        units.push_back(graft_spec(attention, teacher.width, graft));
        units.back().name = mixer_unit_name(graft.mixer);
      }
      add_choice(hybrid, layer, std::move(units), 1);
    }
    Shapes student(hybrid, teacher);
    // What an alignment trains: the new mixers, or all of them where none is new.
    const std::vector<int64_t> aligned = taken.empty() ? converted_layers(hybrid, &teacher) : taken;
    student.added = student.converted - (taken.empty() ? 0.0 : converted_before);
    Changed so_far = changed.at(stage.from);
    for (const Phase& phase : stage.phases) {
      const TrainConfig& c = phase.config;
      const auto tokens = static_cast<double>(c.least_steps() * c.step_tokens());
      const double work = tokens * training_flops(c, student, taught, phase.logits.file.empty());
      const double trained = student.trained(c);
      all_tokens += tokens;
      all_flops += work;
      const std::vector<MemoryItem> takes =
          phase_memory(phase, hybrid, teacher, aligned, so_far, device);
      if (total_bytes(takes) > total_bytes(memory)) {
        memory = takes;
        most = fmt::format("stage {}'s {}", stage.name, phase.name);
      }
      so_far = std::max(so_far, changed_by(c));
      s += fmt::format(
          "  {:<8} {}{} steps of {} x {} tokens = {} tokens{}, rate {:g}, {} warm-up, {} "
          "decay; {} parameters trained{}; {:.3g} FLOP, {}\n",
          phase.name, c.tokens > 0 ? "at least " : "", c.least_steps(), c.sequences_per_step,
          c.sequence_length, human_count(tokens), c.tokens > 0 ? "" : " at most", c.schedule.peak,
          c.schedule.warmup_steps, decay_name(c.schedule.decay), human_count(trained),
          !phase.data.empty() ? " on " + phase.data
          : phase.on_policy   ? " on its own answers"
                              : "",
          work, human_duration(work / flops));
      if (phase.on_policy) {
        const Sampling sampling(*phase.on_policy, student, c, tokens, device);
        all_flops += sampling.flops;
        s += sampling.describe(flops);
      }
      if (!phase.logits.file.empty()) {
        const Storing storing(phase, plan, teacher, taught);
        const bool first = stored.insert(phase.logits.file).second;
        all_flops += first ? storing.flops : 0.0;
        s += storing.describe(flops, first);
      }
    }
    if (!stage.merge.with.empty()) {
      s += fmt::format("  merge    with {}\n", join(stage.merge.with, ", "));
    }
    s += describe_gate(stage.gate);
    s += fmt::format("  cache    {}\n\n", describe_cache(hybrid));
    hybrids[stage.name] = std::move(hybrid);
    changed[stage.name] = stage.merge.with.empty() ? so_far : Changed::kEverything;
  }
  s += fmt::format(
      "in all     at most {} tokens, {:.3g} FLOP: {} at {:.3g} FLOP/s (--flops changes it); "
      "probes, retries and measuring come on top\n",
      human_count(all_tokens), all_flops, human_duration(all_flops / flops), flops);
  if (!memory.empty()) {
    s += describe_memory(memory, most, device);
  }
  return s;
}

}  // namespace cambium
