// Trainer: steps of one stage of training, from next-token training of a whole model to alignment
// of single mixers. It owns the loop, the log and the checkpoints; what comes before and after
// (plans, gates, evaluation) is its caller's.
//
// A run folder holds log.jsonl and checkpoints/step-NNNNNN. A run that is killed and resumed gives
// the same numbers, bit for bit, as one that was not.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/background.h"
#include "base/progress.h"
#include "model/weights.h"
#include "ops/loss/loss.h"
#include "tensor/workspace.h"
#include "train/checkpoint.h"
#include "train/dataset.h"
#include "train/optimizer.h"
#include "train/rounded_weights.h"
#include "train/router_training.h"
#include "train/run_record.h"
#include "train/schedule.h"
#include "train/step_judge.h"
#include "train/supernet_sampling.h"

namespace cambium {

class StoredLogits;

enum class Objective {
  /// The losses at the output head (and alignment as a further term), backward through the whole.
  kEndToEnd,
  /// Teacher-forced: each chosen layer's mixer sees the teacher's normalised input of that layer
  /// and learns the teacher's mixer output. Layers are independent; nothing else is run or trained.
  kAlign,
};

/// What a stage may change; the rest is frozen and costs neither gradients nor moments.
enum class Trained {
  kEverything,
  kMixers,     // the mixers of all layers; of a choice, all
  kConverted,  // the mixers of TrainConfig::converted; those that differ from the teacher's where
               // it names none
};

/// Of activations in training; weights and what the optimiser keeps are f32.
enum class Precision {
  kAuto,  // bf16 on a CUDA device, f32 on the CPU
  kF32,
  kBF16,  // on a CUDA device
};

struct AlignConfig {
  std::vector<int64_t> layers;  // of the student; the teacher's layer of the same number teaches
  double weight = 1.0;
  bool squared = false;     // mean of squares instead of the norm over sqrt(width)
  bool all_tokens = false;  // every token instead of those with a label
};

struct TrainConfig {
  Objective objective = Objective::kEndToEnd;
  /// With tokens above 0 the run ends with the step that reaches them, counting those that went
  /// through the model, and `steps` only says how few they can be; otherwise it has `steps` steps.
  int64_t steps = 0;
  int64_t tokens = 0;
  int64_t sequence_length = 2048;  // tokens of a packed sequence
  int64_t sequences_per_step = 1;
  LongDocuments long_documents = LongDocuments::kCut;
  uint64_t seed = 1;  // of the data's order
  /// Where the run begins in that order: a phase that follows another goes on where that one ended
  /// (TrainSummary::data.next_sample).
  uint64_t first_sample = 0;
  LossConfig loss{.cross_entropy = 1.0F};
  AlignConfig align;  // used by kAlign, and as a term of kEndToEnd where it names layers
  /// Where the student is a supernet. What does not run in a step has no gradients then; its
  /// weights and what the optimiser keeps of them stay as they are.
  SupernetConfig supernet;
  RouterTraining router;  // kEndToEnd
  OptimizerConfig optimizer;
  ScheduleConfig schedule;
  Trained trained = Trained::kEverything;
  bool freeze_attention = false;  // whatever else is trained, mixers of full attention are not
  /// For Trained::kConverted without a teacher: what the names of the mixers' parameters begin with
  /// (converted_mixers() of model/spec.h).
  std::vector<std::string> converted;
  /// Further restricts what is trained; null = all. Groups with rate scale 0 are never trained, and
  /// kAlign trains the mixers of its layers only.
  TrainablePredicate trainable;
  /// The teacher's logits from a file, in place of a teacher: losses at the head, at temperature 1.
  const StoredLogits* logits = nullptr;
  Precision precision = Precision::kAuto;
  bool checkpoint_layers = false;  // activation checkpointing
  DivergenceConfig divergence;

  std::string folder;  // of the run; empty = no log and no checkpoints
  /// The folder as its caller has claimed it; null = the trainer claims it.
  std::shared_ptr<RunFolder> run_folder;
  int64_t checkpoint_every = 0;  // steps; 0 = only at the end
  int64_t keep_checkpoints = 2;
  /// Where checkpoints become durable while the next steps are done. Who gives one waits for it
  /// after a run that has ended; null = the trainer's own, and run() waits for the last checkpoint.
  Background* background = nullptr;
  bool resume = false;
  std::string label = "train";  // of the progress line
  /// Waits for the device after each part of a step, to say how long it took: for benchmarks.
  bool time_parts = false;
  /// FLOP/s of a large product on the device, which steps are compared with; 0 = measured where
  /// the device is a GPU, before the first step of run().
  double matrix_peak = 0.0;

  bool has_length() const { return steps > 0 || tokens > 0; }
  /// The most tokens a step can have; whole documents rarely fill it.
  int64_t step_tokens() const { return sequence_length * sequences_per_step; }
  /// The length in steps: exact for steps, the fewest there can be for tokens.
  int64_t least_steps() const {
    return tokens > 0 ? (tokens + step_tokens() - 1) / step_tokens() : steps;
  }
  /// The same run, `factor` times as long, and at least one step.
  void scale_length(double factor);
};

/// The type of activations on `device`; Error for one it cannot compute in.
Dtype activations_of(Precision precision, Device device);

/// Whether the trained matrices are rounded to bf16 once a step (RoundedWeights), for 2 bytes a
/// number, and not in each product: where memory is not so short that layers are computed again.
bool rounds_once(const TrainConfig& config, Dtype activations);

/// Seconds of the parts of a step, with TrainConfig::time_parts.
struct StepTimes {
  double teacher = 0.0;
  double forward = 0.0;
  double head = 0.0;  // of the student and, where there is one, the teacher: forward and backward
  double backward = 0.0;
  double optimizer = 0.0;
};

/// What one step did. Losses are means over the step's labels.
struct StepReport {
  int64_t step = 0;  // 0-based
  double loss = 0.0;
  double cross_entropy = 0.0;
  double forward_kl = 0.0;  // with a teacher
  double reverse_kl = 0.0;
  double agreement = 0.0;  // share of labels where student and teacher choose the same token
  double accuracy = 0.0;   // share of labels that are the student's choice
  double align = 0.0;      // mean over layers
  std::vector<double> align_layers;
  RouterReport router;  // with TrainConfig::router
  double rate = 0.0;
  double gradient_norm = 0.0;
  int64_t tokens = 0;
  int64_t learned = 0;
  double seconds = 0.0;
  StepTimes times;
  std::string placement;     // of a supernet: the map of what ran
  double peak_share = 0.0;   // of the matrix peak, by model FLOP/s; 0 = not measured
  int64_t device_bytes = 0;  // the most of a GPU's memory seen in use, whoever took it
};

class Trainer {
 public:
  /// Everything given must outlive the trainer; the models are on one device, where the steps are
  /// done. Chooses what is trained (Weights::set_trainable).
  /// With config.resume it goes on from the newest whole checkpoint of the folder, if there is one.
  Trainer(Model& student, Weights& weights, TrainConfig config, const DocumentSource& data,
          Model* teacher = nullptr);
  ~Trainer();

  /// Runs to the end of the configured steps. Stops with an Error that names step, layer and last
  /// good checkpoint when numbers are no longer finite or the loss diverges. `after_step` may
  /// return false to stop early (the checkpoint is written all the same). A SIGINT or SIGTERM that
  /// StopSignals caught ends it so too, with Interrupted. A checkpoint that cannot be made durable
  /// is an Error after one of the next steps.
  TrainSummary run(const std::function<bool(const StepReport&)>& after_step = {});

  /// One step: for callers that want the loop for themselves.
  StepReport step();
  /// As TrainConfig::time_parts, from the next step on.
  void set_time_parts(bool wanted) { config_.time_parts = wanted; }
  /// Told of every kernel from the next step on but those of the optimiser; null: nobody is.
  void set_timer(OpTimer* timer) { timer_ = timer; }
  /// Adds a line to the run's log: {"event": name, ...fields}. `fields_json` is an object or empty.
  void log_event(const std::string& name, const std::string& fields_json);
  /// Writes a checkpoint of the current state; returns its folder, which is there once the
  /// background is done, or the next checkpoint.
  std::string save_checkpoint();

  int64_t next_step() const { return next_step_; }
  bool finished() const;
  const TrainSummary& summary() const { return summary_; }
  const Optimizer& optimizer() const { return *optimizer_; }
  /// Model FLOPs of a token (training_flops) where a sequence is one document.
  double flops_per_token() const { return flops_per_token_; }
  int64_t rounded_bytes() const { return rounded_.bytes(); }
  /// The most bytes of activations at once so far.
  int64_t peak_activation_bytes() { return workspace_.arena().peak_bytes(); }

 private:
  struct Sums;
  void check_config() const;
  double rate() const;
  std::vector<std::string> converted() const;
  std::vector<std::string> trained_units() const;
  std::vector<std::string> frozen_units() const;
  Context context(Tape* tape = nullptr);
  /// `share`: of the step's tokens.
  void end_to_end(const PackedSequence& sequence, double label_scale, double align_scale,
                  double share, Sums& sums);
  void align_mixers(const PackedSequence& sequence, double scale, Sums& sums);
  void judge(const StepReport& report, const std::vector<PackedSequence>& sequences);
  std::map<std::string, std::string> fingerprint();
  void resume_or_start();
  void choose_mixers(int64_t step);
  void count_flops();
  double step_flops(const std::vector<PackedSequence>& sequences) const;
  void note_device(const std::string& before);
  void accept_earlier_version(const std::map<std::string, std::string>& stored);
  NamedTensors checkpoint_tensors(bool with_optimizer);
  Background& background() { return config_.background != nullptr ? *config_.background : own_; }
  void log_step(const StepReport& report);
  std::string last_good();
  void measure_peak();
  void note_memory();
  static std::string describe_speed(const StepReport& report);
  /// Adds to `part` the time since the last call, once the device is done; with time_parts only.
  void time_part(double StepTimes::*part);

  Model& student_;
  Weights& weights_;
  TrainConfig config_;
  const DocumentSource& data_;
  Model* teacher_;
  std::optional<Packer> packer_;
  Workspace workspace_;
  Dtype activations_;
  Tape tape_;
  RoundedWeights rounded_;
  OpTimer* timer_ = nullptr;
  std::unique_ptr<Optimizer> optimizer_;
  std::optional<PlacementSampler> sampler_;  // of a supernet
  std::optional<RouterTrainer> routers_;     // with TrainConfig::router
  std::unique_ptr<RunRecord> record_;
  Background own_;  // where the caller has none
  std::map<std::string, std::string> fingerprint_;
  int64_t next_step_ = 0;
  TrainSummary summary_;
  StepJudge judge_;
  double flops_per_token_ = 0.0;
  double flops_alone_ = 0.0;  // of a token that attends to itself alone
  int64_t device_bytes_ = 0;
  int64_t memory_asked_ = 0;
  StepTimes times_;          // of the step that is running
  double part_began_ = 0.0;  // of its part that is running
};

}  // namespace cambium
