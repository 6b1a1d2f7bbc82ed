// The trainer's record in its run folder (log, checkpoints, resuming) and its judgement of a step.
#include <cmath>
#include <nlohmann/json.hpp>

#include "base/checksum.h"
#include "base/error.h"
#include "base/progress.h"
#include "tensor/copy.h"
#include "train/checkpoint.h"
#include "train/stored_logits.h"
#include "train/train_plan.h"
#include "train/trainer.h"

namespace cambium {
namespace {

/// Of what a run does with its settings. Runs without one were begun by versions that took seed 1
/// for the data's order unless [train] gave another, began every phase at the first document, and
/// ended a run of so many tokens as if every sequence were full.
constexpr const char* kRunVersion = "2";

/// Of every parameter's name and values, those of bf16 as f32 has them.
std::string weights_digest(Model& model) {
  Checksum sum;
  model.visit([&](const std::string& name, Parameter& p) {
    sum.update(std::as_bytes(std::span(name)));
    const Dtype as = p.tensor.dtype == Dtype::kBF16 ? Dtype::kF32 : p.tensor.dtype;
    read_in_pieces(p.tensor, as, [&](std::span<const std::byte> bytes) { sum.update(bytes); });
  });
  return checksum_text(sum.digest());
}

/// To parts of `per` in one.
double rounded(double x, double per) {
  return std::round(x * per) / per;
}

}  // namespace

std::map<std::string, std::string> Trainer::fingerprint() {
  std::map<std::string, std::string> f = fingerprint_fields(config_);
  // Runs of earlier versions have no entries for what they did not know.
  if (config_.align.layers.empty()) {
    f.erase("align");
  }
  if (config_.tokens == 0) {
    f.erase("tokens");
  }
  if (!sampler_) {
    f.erase("supernet");
  }
  if (!config_.router.on()) {
    f.erase("router");
  }
  f.emplace("version", kRunVersion);
  if (activations_ != Dtype::kF32) {
    f["precision"] = dtype_name(activations_);
  }
  if (config_.optimizer.state == OptimizerState::kBF16) {
    f["optimizer state"] = "bf16";
  }
  if (config_.first_sample > 0) {
    f["first sample"] = fmt::format("{}", config_.first_sample);
  }
  f["data"] = data_.fingerprint();
  f["model"] = layer_map(student_.spec());
  f["start weights"] = weights_digest(student_);
  if (teacher_ != nullptr) {
    f["teacher weights"] = weights_digest(*teacher_);
  }
  if (config_.logits != nullptr) {
    f["stored logits"] = config_.logits->fingerprint();
  }
  Checksum trained;
  int64_t count = 0;
  student_.visit([&](const std::string& name, Parameter& p) {
    if (p.tensor.has_grad()) {
      if (config_.optimizer.kind == OptimizerKind::kMuon && p.tensor.rank == 3 && p.is_matrix()) {
        f["muon"] = "of each expert";
      }
      trained.update(std::as_bytes(std::span(name)));
      ++count;
    }
  });
  f["trained"] = fmt::format("{} tensors ({})", count, checksum_text(trained.digest()));
  return f;
}

NamedTensors Trainer::checkpoint_tensors(bool with_optimizer) {
  NamedTensors tensors;
  student_.visit([&](const std::string& name, Parameter& p) {
    if (p.tensor.has_grad()) {
      tensors.emplace_back(name, p.tensor.detached());
    }
  });
  if (with_optimizer) {
    optimizer_->visit_state([&](const std::string& name, const Tensor& state) {
      tensors.emplace_back("optimizer." + name, state);
    });
  }
  return tensors;
}

// Where the steps from here on are done: for the log, and the reader where it was elsewhere before.
void Trainer::note_device(const std::string& before) {
  const std::string here = describe_device(student_.device());
  if (here == before) {
    return;
  }
  if (next_step_ > 0) {
    note(
        "the run was begun on {} and goes on on {}: it will differ by rounding from one that "
        "stayed",
        before, here);
  }
  log_event("device",
            nlohmann::json{{"device", here}, {"precision", dtype_name(activations_)}}.dump());
}

// A run goes on as it was begun: what newer versions would choose differently stays, and is said.
void Trainer::accept_earlier_version(const std::map<std::string, std::string>& stored) {
  if (stored.contains("version")) {
    return;
  }
  fingerprint_.erase("version");
  fingerprint_.erase("first sample");  // the checkpoint has the place in the data
  const auto seed = stored.find("seed");
  if (seed != stored.end() && seed->second != fingerprint_["seed"]) {
    note("the run was begun with seed {} for the order of its documents and keeps it",
         seed->second);
    config_.seed = std::stoull(seed->second);
    fingerprint_["seed"] = seed->second;
    packer_.emplace(data_, config_.seed, config_.sequence_length, config_.long_documents);
  }
  const auto data = stored.find("data");
  if (data != stored.end() && fingerprint_["data"].starts_with(data->second + " rows ")) {
    note(
        "the run was begun by a version that tokenized prompts and completions apart; from here on "
        "they are tokenized together");
    fingerprint_["data"] = data->second;
  }
  if (config_.tokens > 0) {
    note("the run was begun with {} steps for its {} tokens and ends with them", config_.steps,
         config_.tokens);
    config_.tokens = 0;
    fingerprint_.erase("tokens");
  }
}

void Trainer::resume_or_start() {
  record_ = std::make_unique<RunRecord>(config_.run_folder, config_.resume);
  fingerprint_ = fingerprint();
  const auto newest = config_.resume ? record_->find_checkpoint() : std::nullopt;
  if (!newest) {
    note_device("cpu");
    return;
  }
  const CheckpointState state = read_checkpoint_state(*newest);
  accept_earlier_version(state.fingerprint);
  expect_same_run(*newest, state.fingerprint, fingerprint_);
  record_->restore(*newest, state, checkpoint_tensors(!state.ended));
  optimizer_->set_steps_taken(sampler_ ? 0 : state.optimizer_steps);
  const ActiveUnits before = active_units(student_.spec());
  for (int64_t step = 0; sampler_ && step < state.optimizer_steps; ++step) {
    choose_mixers(step);
    optimizer_->count_step();
  }
  student_.activate(before);
  packer_->seek(state.summary.data);
  next_step_ = state.summary.steps;
  judge_.set_state(state.judge);
  summary_ = state.summary;
  expect(!state.ended || finished(),
         "{}/training.json: says that the run has ended, after {} steps", *newest, next_step_);
  note_device(state.device);
}

std::string Trainer::save_checkpoint() {
  CAMBIUM_CHECK(record_ != nullptr, "a run without a folder has no checkpoints");
  summary_.steps = next_step_;
  summary_.data = packer_->position();
  CheckpointState state{.summary = summary_,
                        .optimizer_steps = optimizer_->steps_taken(),
                        .ended = finished(),
                        .device = describe_device(student_.device()),
                        .judge = judge_.state(),
                        .fingerprint = fingerprint_};
  summary_.checkpoint = record_->save(state, checkpoint_tensors(!state.ended),
                                      config_.keep_checkpoints, background());
  return summary_.checkpoint;
}

void Trainer::log_step(const StepReport& r) {
  nlohmann::ordered_json line = {{"event", "step"}, {"step", r.step}, {"loss", r.loss}};
  if (config_.objective == Objective::kEndToEnd) {
    line["cross_entropy"] = r.cross_entropy;
    line["accuracy"] = r.accuracy;
    if (teacher_ != nullptr) {
      line["forward_kl"] = r.forward_kl;
      line["reverse_kl"] = r.reverse_kl;
      line["agreement"] = r.agreement;
    }
  }
  if (!r.align_layers.empty()) {
    line["align"] = r.align;
    line["align_layers"] = r.align_layers;
  }
  if (routers_) {
    line["router_balance"] = r.router.balance;
    line["router_z"] = r.router.z;
    line["router_load"] = r.router.load;
  }
  if (!r.placement.empty()) {
    line["placement"] = r.placement;
  }
  line["rate"] = r.rate;
  line["gradient_norm"] = r.gradient_norm;
  line["tokens"] = r.tokens;
  line["learned"] = r.learned;
  line["documents"] = summary_.data.documents;
  line["cut"] = summary_.data.cut;
  line["dropped"] = summary_.data.dropped;
  line["seconds"] = rounded(r.seconds, 1e4);
  line["tokens_per_second"] = rounded(static_cast<double>(r.tokens) / r.seconds, 10.0);
  if (r.peak_share > 0.0) {
    line["matrix_peak_share"] = rounded(r.peak_share, 1e4);
  }
  if (r.device_bytes > 0) {
    line["device_bytes"] = r.device_bytes;
  }
  record_->log(line);
}

void Trainer::log_event(const std::string& name, const std::string& fields_json) {
  if (record_ == nullptr) {
    return;
  }
  nlohmann::ordered_json line = {{"event", name}, {"step", next_step_}};
  if (!fields_json.empty()) {
    line.update(nlohmann::ordered_json::parse(fields_json));
  }
  record_->log(line);
}

std::string Trainer::last_good() {
  try {
    background().wait();
  } catch (const Error& error) {
    return fmt::format("the last checkpoint could not be written ({})", error.what());
  }
  return summary_.checkpoint.empty() ? "there is no checkpoint yet"
                                     : "the last good checkpoint is " + summary_.checkpoint;
}

// Called before the update, so that a bad step never reaches the weights.
void Trainer::judge(const StepReport& report, const std::vector<PackedSequence>& sequences) {
  const auto stop = [&](const std::string& what) {
    log_event("stopped", nlohmann::json{{"reason", what}}.dump());
    fail("training stopped at step {}: {}; {}", report.step, what, last_good());
  };
  if (!std::isfinite(report.loss) || !std::isfinite(report.gradient_norm)) {
    stop(fmt::format("the {} is {}, and {}", std::isfinite(report.loss) ? "gradient norm" : "loss",
                     std::isfinite(report.loss) ? report.gradient_norm : report.loss,
                     find_trouble(student_, teacher_, sequences, workspace_, activations_)));
  }
  if (const std::string why = judge_.diverged(report.loss); !why.empty()) {
    stop(fmt::format("{}, and {}; a lower learning rate or a longer warm-up may help", why,
                     largest_gradient(student_)));
  }
  // Once, when the rate has been at its height for a window of steps.
  if (report.step + 1 == config_.schedule.warmup_steps + judge_.window()) {
    if (const std::string how = judge_.risen(); !how.empty()) {
      log_event("risen", nlohmann::json{{"how", how}}.dump());
      note(
          "{}: at a rate of {:.2g} more is lost of what the model brought along than is taught; "
          "try a third of it",
          how, config_.schedule.peak);
    }
  }
}

}  // namespace cambium
