#include "train/trainer.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <set>

#include "base/error.h"
#include "base/progress.h"
#include "base/random.h"
#include "base/signals.h"
#include "base/text.h"
#include "ops/loss/loss.h"
#include "train/checkpoint.h"
#include "train/matrix_peak.h"
#include "train/stored_logits.h"
#include "train/train_plan.h"
#include "train/training_cost.h"

namespace cambium {
namespace {

uint64_t bytes_of(const NamedTensors& tensors) {
  uint64_t sum = 0;
  for (const auto& [name, tensor] : tensors) {
    sum += static_cast<uint64_t>(tensor.bytes());
  }
  return sum;
}

/// What a run's checkpoints take at most beside the `there` that lie in its folder: those that stay
/// and the one that is being written. One before the end takes `whole`, with the optimiser's state,
/// the last one `ended`.
uint64_t room_for_checkpoints(const TrainConfig& config, int64_t next_step, int64_t there,
                              uint64_t whole, uint64_t ended) {
  const int64_t every = config.checkpoint_every;
  const int64_t before_the_end = every == 0 ? 0
                                 : config.tokens > 0
                                     ? 1  // at least: steps are not known
                                     : (config.steps - 1) / every - next_step / every;
  const int64_t stay = std::clamp(config.keep_checkpoints - there, int64_t{0}, before_the_end);
  return static_cast<uint64_t>(stay) * whole + (before_the_end > stay ? whole : ended);
}

double now_seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

ForwardOptions with_taps(std::span<MixerTap> taps) {
  ForwardOptions options;
  options.taps = taps;
  return options;
}

template <class T>
bool contains(const std::vector<T>& values, const T& value) {
  return std::find(values.begin(), values.end(), value) != values.end();
}

// What the run takes of a GPU, before gradients and the optimiser's state are made: said of runs
// with a folder, and by the error of memory that runs out.
void plan_memory(Model& student, Model* teacher, const TrainConfig& config, Dtype activations,
                 const TrainablePredicate& trains) {
  if (student.device().kind != Device::kCuda) {
    return;
  }
  std::set<const void*> of_teacher;
  bool narrow = false;
  if (teacher != nullptr) {
    teacher->visit([&](const std::string&, Parameter& p) {
      of_teacher.insert(p.tensor.data);
      narrow = narrow || p.tensor.dtype == Dtype::kBF16;
    });
  }
  std::set<std::string> trained;
  std::set<std::string> shared;
  student.visit([&](const std::string& name, Parameter& p) {
    if (trains(name, p)) {
      trained.insert(name);
      return;
    }
    narrow = narrow || p.tensor.dtype == Dtype::kBF16;
    if (of_teacher.contains(p.tensor.data)) {
      shared.insert(name);
    }
  });
  const std::string parts = memory_parts(training_memory(
      config, {.student = &student.spec(),
               .teacher = teacher == nullptr ? nullptr : &teacher->spec(),
               .trained = [&](const std::string& name) { return trained.contains(name); },
               .shared = [&](const std::string& name) { return shared.contains(name); },
               .activations = activations,
               .bf16_matrices = narrow}));
  set_memory_note(parts);
  if (!config.folder.empty()) {
    say("{}: about {}", config.label, parts);
  }
}

}  // namespace

Dtype activations_of(Precision precision, Device device) {
  const bool cuda = device.kind == Device::kCuda;
  expect(cuda || precision != Precision::kBF16,
         "precision bf16 needs a CUDA device; the CPU trains in f32");
  return cuda && precision != Precision::kF32 ? Dtype::kBF16 : Dtype::kF32;
}

bool rounds_once(const TrainConfig& config, Dtype activations) {
  return activations == Dtype::kBF16 && config.objective == Objective::kEndToEnd &&
         !config.checkpoint_layers;
}

void TrainConfig::scale_length(double factor) {
  const auto scaled = [&](int64_t n) {
    return n == 0 ? 0 : std::max<int64_t>(1, std::llround(static_cast<double>(n) * factor));
  };
  tokens = scaled(tokens);
  steps = tokens > 0 ? least_steps() : scaled(steps);
}

/// Sums over the sequences of a step.
struct Trainer::Sums {
  LossSums loss;
  std::vector<double> align;  // per chosen layer
};

Trainer::Trainer(Model& student, Weights& weights, TrainConfig config, const DocumentSource& data,
                 Model* teacher)
    : student_(student),
      weights_(weights),
      config_(std::move(config)),
      data_(data),
      teacher_(teacher),
      workspace_(student.device()),
      activations_(activations_of(config_.precision, student.device())),
      tape_(workspace_.host()),
      judge_(config_.divergence) {
  check_config();
  config_.steps = config_.least_steps();
  packer_.emplace(data, config_.seed, config_.sequence_length, config_.long_documents);
  packer_->seek({.next_sample = config_.first_sample});
  const TrainablePredicate trains = [this, units = trained_units(), frozen = frozen_units()](
                                        const std::string& name, const Parameter& p) {
    return config_.optimizer.group(p.group).rate_scale != 0.0 && starts_with_one(name, units) &&
           !starts_with_one(name, frozen) &&
           (config_.trainable == nullptr || config_.trainable(name, p));
  };
  plan_memory(student_, teacher_, config_, activations_, trains);
  weights_.set_trainable(student_, trains);
  if (rounds_once(config_, activations_)) {
    rounded_ = RoundedWeights(student_);
  }
  optimizer_ = std::make_unique<Optimizer>(student_, config_.optimizer, converted());
  if (is_supernet(student_.spec()) || config_.supernet.sampling != PlacementSampling::kNone) {
    sampler_.emplace(student_.spec(), config_.supernet, config_.seed);
  }
  if (config_.router.on()) {
    routers_.emplace(student_, config_.router, config_.label);
  }
  count_flops();
  if (!config_.folder.empty()) {
    if (config_.run_folder == nullptr) {
      config_.run_folder =
          std::make_shared<RunFolder>(config_.folder, training_folder_use(config_.resume));
    }
    resume_or_start();
  }
}

Trainer::~Trainer() = default;

void Trainer::count_flops() {
  std::set<std::string> trained;
  student_.visit([&](const std::string& name, Parameter& p) {
    if (p.tensor.has_grad()) {
      trained.insert(name);
    }
  });
  const auto of = [&](const TrainConfig& config) {
    return training_flops(
        config, {.student = &student_.spec(),
                 .teacher = teacher_ == nullptr ? nullptr : &teacher_->spec(),
                 .trained = [&](const std::string& name) { return trained.contains(name); },
                 .shared = nullptr});
  };
  flops_per_token_ = of(config_);
  TrainConfig alone = config_;
  alone.sequence_length = 1;
  flops_alone_ = of(alone);
}

// What a token attends to grows with its document, not with the sequence that many share. (That it
// stops growing at a window's end is left out: between one token and a sequence it is a line.)
double Trainer::step_flops(const std::vector<PackedSequence>& sequences) const {
  double tokens = 0.0;
  double behind = 0.0;  // over tokens: those of the document, without one
  for (const PackedSequence& sequence : sequences) {
    for (const int32_t length : sequence.batch.lengths()) {
      tokens += length;
      behind += static_cast<double>(length) * (length - 1);
    }
  }
  const auto most = static_cast<double>(std::max<int64_t>(config_.sequence_length - 1, 1));
  return tokens * flops_alone_ + behind / most * (flops_per_token_ - flops_alone_);
}

// Makes the mixers of the step run, and the optimiser leave the others alone.
void Trainer::choose_mixers(int64_t step) {
  student_.activate(sampler_->draw(step));
  const std::set<std::string> resting = resting_units(student_.spec());
  optimizer_->rest([&](const std::string& name) { return resting.contains(unit_of(name)); });
}

void Trainer::check_config() const {
  expect(config_.has_length(), "steps must be above zero (or tokens), got {}", config_.steps);
  expect(config_.schedule.peak > 0.0, "the learning rate must be above zero, got {}",
         config_.schedule.peak);
  check_fields(config_, config_.label);
  const bool aligns = !config_.align.layers.empty();
  const LossConfig& loss = config_.loss;
  const bool distils = loss.forward_kl != 0.0F || loss.reverse_kl != 0.0F;
  expect(config_.objective != Objective::kAlign || aligns,
         "alignment: expected layers to align (align.layers, --layers; otherwise those whose mixer "
         "is not of the teacher's kind), got none");
  expect(config_.objective == Objective::kAlign || distils || loss.cross_entropy != 0.0F || aligns,
         "every loss has weight zero; give cross_entropy, forward_kl or reverse_kl a weight");
  expect(teacher_ != nullptr || (!aligns && (!distils || config_.logits != nullptr)),
         "a KL or alignment loss needs a teacher model");
  if (config_.logits != nullptr) {
    CAMBIUM_CHECK(teacher_ == nullptr, "stored logits stand in place of a teacher");
    expect(loss.temperature == 1.0F,
           "stored logits are those at temperature 1, got temperature {}; leave it out",
           loss.temperature);
    expect(config_.logits->info().vocabulary == student_.spec().vocab,
           "{} holds logits over {} tokens, the student has {}", config_.logits->path(),
           config_.logits->info().vocabulary, student_.spec().vocab);
    config_.logits->expect_data(data_.fingerprint());
  }
  if (teacher_ != nullptr) {
    CAMBIUM_CHECK(teacher_->device() == student_.device(),
                  "the teacher is on {}, the student on {}", teacher_->device().describe(),
                  student_.device().describe());
    expect(teacher_->spec().vocab == student_.spec().vocab,
           "teacher and student must share their vocabulary, got {} and {} tokens",
           teacher_->spec().vocab, student_.spec().vocab);
  }
  expect(!config_.freeze_attention || config_.objective != Objective::kAlign,
         "alignment trains the mixers of its layers alone; leave freeze_attention out");
  expect(!config_.router.on() || config_.objective != Objective::kAlign,
         "alignment trains the mixers of its layers alone, and no router; leave router out");
  expect(config_.trained != Trained::kConverted || !config_.converted.empty() ||
             (teacher_ != nullptr && teacher_->layer_count() == student_.layer_count()),
         "training the converted mixers needs a teacher of as many layers, or the list of "
         "their names, to tell which they are");
  expect(config_.optimizer.converted_rate_scale == 1.0 || !converted().empty(),
         "optimizer.converted.rate_scale: expected a teacher, or the list of the converted mixers' "
         "names, to tell which they are, got neither; leave it out");
  for (const int64_t layer : config_.align.layers) {
    expect(layer >= 0 && layer < student_.layer_count(),
           "layer {} to align does not exist; the model has layers 0 to {}", layer,
           student_.layer_count() - 1);
    expect(teacher_->layer_count() == student_.layer_count() &&
               teacher_->spec().width == student_.spec().width,
           "alignment needs a teacher of the student's layers and width ({} of {}), got {} of {}",
           student_.layer_count(), student_.spec().width, teacher_->layer_count(),
           teacher_->spec().width);
    expect(student_.layer(layer).mixer() != nullptr && teacher_->layer(layer).mixer() != nullptr,
           "layer {} to align has no mixer", layer);
  }
}

bool Trainer::finished() const {
  return config_.tokens > 0 ? summary_.tokens >= config_.tokens : next_step_ >= config_.steps;
}

/// What the names of converted mixers' parameters begin with, as far as that is known.
std::vector<std::string> Trainer::converted() const {
  return config_.converted.empty() && teacher_ != nullptr
             ? converted_mixers(student_.spec(), teacher_->spec())
             : config_.converted;
}

/// What the names of trained parameters may begin with.
std::vector<std::string> Trainer::trained_units() const {
  const bool aligns = config_.objective == Objective::kAlign;
  if (!aligns && config_.trained == Trained::kEverything) {
    return {""};
  }
  const std::vector<std::string> converted = this->converted();
  std::vector<std::string> units;
  for (int64_t i = 0; i < student_.layer_count(); ++i) {
    const LayerSpec& layer = student_.spec().layers[static_cast<size_t>(i)];
    std::vector<UnitSpec> mixers = layer.all_mixers();
    if (aligns) {  // the output of the first alone is compared, of a choice that of each in its
                   // turn
      const bool chosen = contains(config_.align.layers, i);
      const size_t compared = layer.choice() != nullptr ? layer.choice()->choices() : 1;
      mixers.resize(chosen ? std::min(mixers.size(), compared) : 0);
    }
    for (const UnitSpec& mixer : mixers) {
      const std::string prefix = unit_prefix(i, mixer);
      if (config_.trained != Trained::kConverted || contains(converted, prefix)) {
        units.push_back(prefix);
      }
    }
  }
  return units;
}

/// What the names of parameters that stay as they are begin with.
std::vector<std::string> Trainer::frozen_units() const {
  return config_.freeze_attention ? attention_mixers(student_.spec()) : std::vector<std::string>{};
}

double Trainer::rate() const {
  if (config_.tokens == 0) {
    return learning_rate(config_.schedule, static_cast<double>(next_step_),
                         static_cast<double>(config_.steps));
  }
  const auto full = static_cast<double>(config_.step_tokens());
  return learning_rate(config_.schedule, static_cast<double>(summary_.tokens) / full,
                       static_cast<double>(config_.tokens) / full);
}

StepReport Trainer::step() {
  CAMBIUM_CHECK(!finished());
  const double start = now_seconds();
  times_ = {};
  part_began_ = start;
  StepReport report;
  report.step = next_step_;
  const ActiveUnits before = active_units(student_.spec());
  if (sampler_) {
    choose_mixers(next_step_);
    report.placement = layer_map(student_.spec());
    if (config_.matrix_peak > 0.0) {
      count_flops();
    }
  }
  std::vector<PackedSequence> sequences;
  for (int64_t i = 0; i < config_.sequences_per_step; ++i) {
    sequences.push_back(packer_->next());
    sequences.back().noise = mix_seed(mix_seed(config_.seed, static_cast<uint64_t>(next_step_)),
                                      static_cast<uint64_t>(i) + 1);
    report.tokens += sequences.back().batch.size();
    report.learned += sequences.back().learned;
  }
  // Every token weighs the same, however the step is cut into sequences.
  const double label_scale = 1.0 / static_cast<double>(report.learned);
  const double align_scale =
      config_.align.all_tokens ? 1.0 / static_cast<double>(report.tokens) : label_scale;
  Sums sums;
  sums.align.resize(config_.align.layers.size());
  {
    const RoundedWeights::Use rounded(rounded_);
    for (const PackedSequence& sequence : sequences) {
      const WorkspaceScope scope(workspace_);
      tape_.clear();
      if (config_.objective == Objective::kAlign) {
        align_mixers(sequence, align_scale, sums);
      } else {
        end_to_end(sequence, label_scale, align_scale,
                   static_cast<double>(sequence.batch.size()) / static_cast<double>(report.tokens),
                   sums);
      }
    }
  }
  report.loss = sums.loss.total * label_scale;
  report.cross_entropy = sums.loss.cross_entropy * label_scale;
  report.forward_kl = sums.loss.forward_kl * label_scale;
  report.reverse_kl = sums.loss.reverse_kl * label_scale;
  report.agreement = static_cast<double>(sums.loss.agreement) * label_scale;
  report.accuracy = static_cast<double>(sums.loss.correct) * label_scale;
  for (const double s : sums.align) {
    report.align_layers.push_back(s * align_scale);
    report.align += s * align_scale / static_cast<double>(sums.align.size());
    report.loss += config_.align.weight * s * align_scale;
  }
  if (routers_) {
    report.router = routers_->report();
    report.loss += report.router.loss;
  }
  report.rate = rate();
  time_part(&StepTimes::backward);
  report.gradient_norm = optimizer_->gradient_norm();
  judge(report, sequences);
  optimizer_->step(report.rate, report.gradient_norm);
  if (routers_) {
    routers_->end_step();
  }
  wait_for(workspace_.device());
  report.seconds = now_seconds() - start;
  time_part(&StepTimes::optimizer);
  report.times = times_;
  report.peak_share = config_.matrix_peak > 0.0
                          ? step_flops(sequences) / report.seconds / config_.matrix_peak
                          : 0.0;
  note_memory();
  report.device_bytes = device_bytes_;
  student_.activate(before);

  summary_.first_loss = next_step_ == 0 ? report.loss : summary_.first_loss;
  ++next_step_;
  summary_.steps = next_step_;
  summary_.tokens += report.tokens;
  summary_.learned += report.learned;
  summary_.seconds += report.seconds;
  summary_.data = packer_->position();
  summary_.last_loss = judge_.last_loss();
  if (record_ != nullptr) {
    log_step(report);
  }
  return report;
}

Context Trainer::context(Tape* tape) {
  Context ctx = workspace_.context(activations_, tape);
  ctx.timer = timer_;
  return ctx;
}

void Trainer::end_to_end(const PackedSequence& sequence, double label_scale, double align_scale,
                         double share, Sums& sums) {
  const bool aligns = !config_.align.layers.empty();
  const auto layers = static_cast<size_t>(student_.layer_count());
  std::vector<MixerTap> teacher_taps(aligns ? layers : 0);
  std::vector<MixerTap> taps(aligns ? layers : 0);
  Context plain = context();
  Context ctx = context(&tape_);
  LossInputs inputs;
  if (teacher_ != nullptr) {
    inputs.teacher_hidden = teacher_->forward(plain, sequence.batch, with_taps(teacher_taps));
    inputs.teacher_head = teacher_->head().detached();
    inputs.teacher_logit_cap = teacher_->spec().logit_cap;
    time_part(&StepTimes::teacher);
  }
  ForwardOptions options = with_taps(taps);
  options.checkpoint_layers = config_.checkpoint_layers;
  options.noise = sequence.noise;
  if (routers_) {
    options.routers = routers_->taps(ctx, sequence.batch.size(), share);
  }
  inputs.hidden = student_.forward(ctx, sequence.batch, options);
  inputs.head = student_.head();
  inputs.logit_cap = student_.spec().logit_cap;
  StoredRows stored;
  if (config_.logits != nullptr) {
    stored = config_.logits->rows_of(sequence);
    inputs.stored = stored.view();
  }
  inputs.labels = sequence.labels;
  inputs.scale = label_scale;
  time_part(&StepTimes::forward);
  sums.loss += head_loss(ctx, inputs, config_.loss);
  time_part(&StepTimes::head);
  for (size_t i = 0; i < sums.align.size(); ++i) {
    const auto layer = static_cast<size_t>(config_.align.layers[i]);
    if (!taps[layer].output.has_grad()) {
      continue;  // of a supernet: a frozen mixer, with nothing trained before it
    }
    sums.align[i] += align_loss(
        ctx, taps[layer].output, teacher_taps[layer].output,
        config_.align.all_tokens ? std::span<const int32_t>{} : std::span(sequence.labels),
        config_.align.squared, config_.align.weight * align_scale);
  }
  tape_.backward(ctx);
  if (routers_) {
    routers_->note_call(ctx);
  }
  time_part(&StepTimes::backward);
}

void Trainer::align_mixers(const PackedSequence& sequence, double scale, Sums& sums) {
  std::vector<MixerTap> taps(static_cast<size_t>(teacher_->layer_count()));
  Context plain = context();
  teacher_->forward(plain, sequence.batch, with_taps(taps));
  time_part(&StepTimes::teacher);
  for (size_t i = 0; i < sums.align.size(); ++i) {
    const WorkspaceScope scope(workspace_);
    const int64_t layer = config_.align.layers[i];
    const MixerTap& tap = taps[static_cast<size_t>(layer)];
    Context ctx = context(&tape_);
    const UnitInputs forward{.batch = &sequence.batch,
                             .rope = student_.rope_for(plain, sequence.batch, layer),
                             .noise = layer_noise(sequence.noise, layer)};
    const Tensor out = student_.layer(layer).mixer()->forward(ctx, tap.input, forward);
    if (!out.has_grad()) {
      continue;  // of a supernet: a mixer that is not trained
    }
    sums.align[i] += align_loss(
        ctx, out, tap.output,
        config_.align.all_tokens ? std::span<const int32_t>{} : std::span(sequence.labels),
        config_.align.squared, config_.align.weight * scale);
    tape_.backward(ctx);
  }
}

void Trainer::time_part(double StepTimes::*part) {
  if (!config_.time_parts) {
    return;
  }
  wait_for(workspace_.device());
  const double now = now_seconds();
  times_.*part += now - part_began_;
  part_began_ = now;
}

void Trainer::measure_peak() {
  if (config_.matrix_peak == 0.0 && student_.device().kind == Device::kCuda) {
    config_.matrix_peak = measure_matrix_peak(student_.device(), activations_);
    log_event("matrix peak", fmt::format(R"({{"flops": {:.4g}}})", config_.matrix_peak));
  }
}

// Asking takes a moment, and memory of a step is kept for the next: it grows in the first ones.
void Trainer::note_memory() {
  constexpr int64_t kGrows = 3;
  constexpr int64_t kNowAndThen = 32;
  const int64_t asked = memory_asked_++;
  if (student_.device().kind == Device::kCuda && (asked < kGrows || asked % kNowAndThen == 0)) {
    const CudaDeviceInfo info = cuda_device_info(student_.device());
    device_bytes_ = std::max(device_bytes_, info.total_bytes - info.free_bytes);
  }
}

std::string Trainer::describe_speed(const StepReport& report) {
  std::string text =
      fmt::format("{} tokens/s", human_count(static_cast<double>(report.tokens) / report.seconds));
  if (report.peak_share > 0.0) {
    text += fmt::format("  {:.0f} % of the matrix peak", 100.0 * report.peak_share);
  }
  if (report.device_bytes > 0) {
    text += fmt::format("  {}", human_bytes(static_cast<uint64_t>(report.device_bytes)));
  }
  return text;
}

TrainSummary Trainer::run(const std::function<bool(const StepReport&)>& after_step) {
  const bool by_tokens = config_.tokens > 0;
  const auto done = [&] { return by_tokens ? summary_.tokens : next_step_; };
  Progress progress(config_.label,
                    static_cast<uint64_t>(by_tokens ? config_.tokens : config_.steps),
                    {.unit = by_tokens ? "tokens" : "steps"});
  progress.update(static_cast<uint64_t>(done()));
  if (!finished()) {
    if (record_ != nullptr) {
      const RunFolder& folder = record_->folder();
      const auto there = std::ssize(list_checkpoints(folder.path().string()));
      folder.expect_room(
          room_for_checkpoints(config_, next_step_, there, bytes_of(checkpoint_tensors(true)),
                               bytes_of(checkpoint_tensors(false))),
          "the checkpoints of this run");
    }
    measure_peak();
  }
  bool go_on = true;
  int64_t saved_at = summary_.checkpoint.empty() ? -1 : next_step_;
  while (!finished() && go_on && stop_signal() == 0) {
    const StepReport report = step();
    progress.update(static_cast<uint64_t>(done()),
                    fmt::format("loss {:.4f}  {}", report.loss, describe_speed(report)));
    if (after_step) {
      go_on = after_step(report);
    }
    const bool due = config_.checkpoint_every > 0 && next_step_ % config_.checkpoint_every == 0;
    background().check();
    if (record_ != nullptr && due) {
      save_checkpoint();
      saved_at = next_step_;
    }
  }
  if (record_ != nullptr && saved_at != next_step_) {
    save_checkpoint();
  }
  if (!finished() || config_.background == nullptr) {
    background().wait();
  }
  if (!finished()) {
    stop_if_asked(record_ == nullptr
                      ? std::string("nothing is kept of this part of the work")
                      : fmt::format("{} steps are done and kept in {}; go on with --resume",
                                    next_step_, summary_.checkpoint));
  }
  progress.finish(fmt::format("loss {:.4f}", summary_.last_loss));
  if (finished() && summary_.data.dropped > 0) {
    note(
        "{} documents were not trained on beside the {} that were: longer than sequence_length, or "
        "without anything to learn in their first {} tokens",
        summary_.data.dropped, summary_.data.documents, config_.sequence_length);
  }
  return summary_;
}

}  // namespace cambium
