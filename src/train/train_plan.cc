#include "train/train_plan.h"

#include "base/error.h"

namespace cambium {
namespace {

// Bounds that no run meets and that keep every product of them far from the end of int64_t.
constexpr int64_t kMaxSteps = 1'000'000'000'000;
constexpr int64_t kMaxTokens = 1'000'000'000'000'000;
constexpr int64_t kMaxSequenceLength = int64_t{1} << 24;
constexpr int64_t kMaxSequences = int64_t{1} << 20;
constexpr int64_t kMaxKept = 1'000'000;
constexpr double kMaxFactor = 1e6;

void visit_loss(LossConfig& loss, FieldVisitor& visit) {
  visit({"cross_entropy", "weight of the next-token loss"}, loss.cross_entropy,
        reals_from(0.0, kMaxFactor));
  visit({"forward_kl", "weight of KL(teacher, student)"}, loss.forward_kl,
        reals_from(0.0, kMaxFactor));
  visit({"reverse_kl", "weight of KL(student, teacher)"}, loss.reverse_kl,
        reals_from(0.0, kMaxFactor));
  visit({"temperature", "of both sides of the KL terms"}, loss.temperature,
        reals_above(0.0, kMaxFactor));
}

void visit_align(AlignConfig& align, FieldVisitor& visit) {
  visit({"layers", "layers whose mixers are aligned; empty = those just converted"}, align.layers,
        ints_from(0, 1'000'000));
  visit({"weight", "of the alignment term"}, align.weight, reals_from(0.0, kMaxFactor));
  visit({"squared", "mean of squares instead of the norm over sqrt(width)"}, align.squared);
  visit({"all_tokens", "every token instead of those with a label"}, align.all_tokens);
}

void visit_optimizer(OptimizerConfig& o, FieldVisitor& visit) {
  visit({"kind", "muon takes the matrices of mixers and feed-forwards, of experts each by itself",
         ""},
        o.kind, {{"adamw", OptimizerKind::kAdamW}, {"muon", OptimizerKind::kMuon}});
  visit({"beta1", "decay of the first moment", "beta"}, o.beta1, reals_within(0.0, 1.0));
  visit({"beta2", "decay of the second moment", ""}, o.beta2, reals_within(0.0, 1.0));
  visit({"epsilon", "added to the root of the second moment"}, o.epsilon, reals_from(0.0, 1.0));
  visit({"clip_norm", "largest norm of all gradients; 0 = no clipping", "clip"}, o.clip_norm,
        reals_from(0.0, DBL_MAX));
  visit({"momentum", "of muon"}, o.momentum, reals_within(0.0, 1.0));
  // Stands in fingerprints where it is not what runs of earlier versions had.
  visit({"state", "how AdamW keeps its moments; bf16 is rounded stochastically", nullptr, false},
        o.state, {{"f32", OptimizerState::kF32}, {"bf16", OptimizerState::kBF16}});
  visit({"offload", "the optimiser's state stays in the host's memory", nullptr, false}, o.offload);
  for (int g = 0; g < kParameterGroups; ++g) {
    const auto id = static_cast<ParameterGroup>(g);
    const std::string label = fmt::format("group {}", parameter_group_name(id));
    visit.table({parameter_group_name(id), "", label.c_str()}, [&] {
      visit({"rate_scale", "times the learning rate; 0 freezes the group"}, o.group(id).rate_scale,
            reals_from(0.0, kMaxFactor));
      visit({"weight_decay", "of matrices; vectors never decay"}, o.group(id).weight_decay,
            reals_from(0.0, kMaxFactor));
    });
  }
  visit.table({"converted"}, [&] {
    visit({"rate_scale", "times that of a group, for converted mixers", nullptr, false},
          o.converted_rate_scale, reals_above(0.0, kMaxFactor));
  });
}

void visit_schedule(ScheduleConfig& schedule, FieldVisitor& visit) {
  visit({"rate", "the highest learning rate", "peak"}, schedule.peak, reals_above(0.0, 1e3));
  visit({"warmup_steps", "steps of linear rise to it", "warmup"}, schedule.warmup_steps,
        ints_from(0, kMaxSteps));
  visit({"decay", "shape of the fall after the warm-up", ""}, schedule.decay,
        std::span<const std::pair<const char*, Decay>>(kDecays));
  visit({"final_ratio", "of the rate, at the last step", "final"}, schedule.final_ratio,
        reals_from(0.0, 1e3));
}

void visit_divergence(DivergenceConfig& divergence, FieldVisitor& visit) {
  visit({"factor", "times the running median that a loss may reach; 0 = no limit", nullptr, false},
        divergence.factor, reals_from(0.0, kMaxFactor));
  visit({"window", "steps the median is taken over, at least 10", nullptr, false},
        divergence.window, ints_from(1, kMaxKept));
  visit({"patience", "steps in a row above the limit that stop the run", nullptr, false},
        divergence.patience, ints_from(1, kMaxKept));
}

}  // namespace

void visit_fields(OptimizerConfig& optimizer, FieldVisitor& visit) {
  visit_optimizer(optimizer, visit);
}

void visit_fields(TrainConfig& c, FieldVisitor& visit) {
  visit({"objective", "losses at the head, or the mixers alone against the teacher's"}, c.objective,
        {{"end_to_end", Objective::kEndToEnd}, {"align", Objective::kAlign}});
  // What is trained stands in fingerprints as the list of tensors.
  visit({"train", "what may change", nullptr, false}, c.trained,
        {{"everything", Trained::kEverything},
         {"mixers", Trained::kMixers},
         {"converted", Trained::kConverted}});
  visit({"freeze_attention", "mixers of full attention stay as they are", nullptr, false},
        c.freeze_attention);
  visit({"steps", "updates of the weights"}, c.steps, ints_from(0, kMaxSteps));
  visit({"tokens", "instead of steps: tokens to run through the model, padding not counted"},
        c.tokens, ints_from(0, kMaxTokens));
  visit({"sequence_length", "most tokens of a packed sequence"}, c.sequence_length,
        ints_from(1, kMaxSequenceLength));
  visit({"sequences_per_step", "sequences whose gradients make one update"}, c.sequences_per_step,
        ints_from(1, kMaxSequences));
  visit({"long_documents", "what is done with a document longer than a sequence"}, c.long_documents,
        {{"cut", LongDocuments::kCut}, {"drop", LongDocuments::kDrop}});
  visit({"seed", "of the order of the documents; the plan's own unless given"}, c.seed,
        ints_from(0));
  // bf16 stands in fingerprints as what was computed in.
  visit({"precision", "of activations; auto is bf16 on a GPU and f32 on the CPU", nullptr, false},
        c.precision,
        {{"auto", Precision::kAuto}, {"f32", Precision::kF32}, {"bf16", Precision::kBF16}});
  visit({"checkpoint_layers", "recompute activations: less memory, more time", nullptr, false},
        c.checkpoint_layers);
  visit({"checkpoint_every", "steps between checkpoints; 0 = at the end", nullptr, false},
        c.checkpoint_every, ints_from(0, kMaxSteps));
  visit({"keep_checkpoints", "so many of the newest stay", nullptr, false}, c.keep_checkpoints,
        ints_from(1, kMaxKept));
  visit.table({"loss"}, [&] { visit_loss(c.loss, visit); });
  visit.table({"align"}, [&] { visit_align(c.align, visit); });
  visit.table({"supernet"}, [&] { visit_fields(c.supernet, visit); });
  visit.table({"router"}, [&] { visit_fields(c.router, visit); });
  visit.table({"optimizer"}, [&] { visit_optimizer(c.optimizer, visit); });
  visit.table({"schedule"}, [&] { visit_schedule(c.schedule, visit); });
  visit.table({"divergence"}, [&] { visit_divergence(c.divergence, visit); });
}

TrainConfig read_train_config(const PlanTable& plan, const TrainConfig& defaults, bool partial) {
  TrainConfig c = defaults;
  read_fields(c, plan);
  expect(!(plan.has("steps") && plan.has("tokens")), "{}: give steps or tokens, not both",
         plan.where());
  if (plan.has("steps")) {
    c.tokens = 0;
  }
  if (c.tokens > 0) {
    c.steps = c.least_steps();
  }
  expect(partial || c.has_length(), "{}: steps or tokens must be given, and above zero",
         plan.where());
  return c;
}

}  // namespace cambium
