// The trainer's run folder (log, checkpoints, resuming) and its judgement of a step.
#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "base/checksum.h"
#include "base/error.h"
#include "base/text.h"
#include "train/checkpoint.h"
#include "train/train_plan.h"
#include "train/trainer.h"

namespace cambium {
namespace {

bool all_finite(const float* x, int64_t n) {
  return std::all_of(x, x + n, [](float v) { return std::isfinite(v); });
}

bool all_finite(const Tensor& t) {
  return !t.defined() || all_finite(t.ptr<float>(), t.numel());
}

bool gradient_finite(const Tensor& t) {
  return !t.has_grad() || all_finite(t.grad_ptr<float>(), t.numel());
}

/// Of every parameter's name and bytes.
std::string weights_digest(Model& model) {
  Checksum sum;
  model.visit([&](const std::string& name, Parameter& p) {
    sum.update(std::as_bytes(std::span(name)));
    sum.update(
        {static_cast<const std::byte*>(p.tensor.data), static_cast<size_t>(p.tensor.bytes())});
  });
  return checksum_text(sum.digest());
}

double median(std::vector<double> values) {
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
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
  if (config_.first_sample > 0) {
    f["first sample"] = fmt::format("{}", config_.first_sample);
  }
  f["data"] = data_.fingerprint();
  f["model"] = layer_map(student_.spec());
  f["start weights"] = weights_digest(student_);
  if (teacher_ != nullptr) {
    f["teacher weights"] = weights_digest(*teacher_);
  }
  Checksum trained;
  int64_t count = 0;
  student_.visit([&](const std::string& name, Parameter& p) {
    if (p.tensor.has_grad()) {
      trained.update(std::as_bytes(std::span(name)));
      ++count;
    }
  });
  f["trained"] = fmt::format("{} tensors ({})", count, checksum_text(trained.digest()));
  return f;
}

namespace {

NamedTensors checkpoint_tensors(Model& model, Optimizer& optimizer) {
  NamedTensors tensors;
  model.visit([&](const std::string& name, Parameter& p) {
    if (p.tensor.has_grad()) {
      tensors.emplace_back(name, p.tensor.detached());
    }
  });
  optimizer.visit_state([&](const std::string& name, const Tensor& state) {
    tensors.emplace_back("optimizer." + name, state);
  });
  return tensors;
}

}  // namespace

void Trainer::resume_or_start() {
  make_folder(config_.folder);
  fingerprint_ = fingerprint();
  const std::string log_path = config_.folder + "/log.jsonl";
  const auto newest = newest_checkpoint(config_.folder);
  log_ = std::make_unique<LineLog>(log_path);
  if (!config_.resume) {
    expect(!newest && log_->size() == 0,
           "{} holds a run already; resume it (--resume) or choose another folder", config_.folder);
    return;
  }
  if (!newest) {
    log_->truncate(0);
    return;
  }
  const CheckpointState state = read_checkpoint_state(*newest);
  expect_same_run(*newest, state.fingerprint, fingerprint_);
  expect(log_->size() >= state.log_bytes,
         "{} is shorter than it was when {} was written ({} of {} bytes); it cannot be continued",
         log_path, *newest, log_->size(), state.log_bytes);
  read_checkpoint_tensors(*newest, checkpoint_tensors(student_, *optimizer_));
  log_->truncate(state.log_bytes);
  optimizer_->set_steps_taken(state.optimizer_steps);
  packer_.seek(state.data);
  next_step_ = state.step;
  recent_ = state.recent;
  above_ = state.above;
  summary_ = {.steps = state.step,
              .tokens = state.tokens,
              .learned = state.learned,
              .seconds = state.seconds,
              .first_loss = state.first_loss,
              .last_loss = state.last_loss,
              .data = state.data,
              .checkpoint = *newest};
}

std::string Trainer::save_checkpoint() {
  CAMBIUM_CHECK(log_ != nullptr, "a run without a folder has no checkpoints");
  log_->sync();
  CheckpointState state;
  state.step = next_step_;
  state.data = packer_.position();
  state.log_bytes = log_->size();
  state.tokens = summary_.tokens;
  state.learned = summary_.learned;
  state.seconds = summary_.seconds;
  state.first_loss = summary_.first_loss;
  state.last_loss = summary_.last_loss;
  state.optimizer_steps = optimizer_->steps_taken();
  state.recent = recent_;
  state.above = above_;
  state.fingerprint = fingerprint_;
  summary_.checkpoint = write_checkpoint(
      config_.folder, state, checkpoint_tensors(student_, *optimizer_), config_.keep_checkpoints);
  return summary_.checkpoint;
}

void Trainer::log_step(const StepReport& r) {
  std::string line = fmt::format("{{\"event\":\"step\",\"step\":{},\"loss\":{}", r.step, r.loss);
  if (config_.objective == Objective::kEndToEnd) {
    line += fmt::format(",\"cross_entropy\":{},\"accuracy\":{}", r.cross_entropy, r.accuracy);
    if (teacher_ != nullptr) {
      line += fmt::format(",\"forward_kl\":{},\"reverse_kl\":{},\"agreement\":{}", r.forward_kl,
                          r.reverse_kl, r.agreement);
    }
  }
  if (!r.align_layers.empty()) {
    line +=
        fmt::format(",\"align\":{},\"align_layers\":[{}]", r.align, fmt::join(r.align_layers, ","));
  }
  line += fmt::format(
      ",\"rate\":{},\"gradient_norm\":{},\"tokens\":{},\"learned\":{},\"documents\":{},"
      "\"cut\":{},\"dropped\":{},\"seconds\":{:.4f},\"tokens_per_second\":{:.1f}}}",
      r.rate, r.gradient_norm, r.tokens, r.learned, summary_.data.documents, summary_.data.cut,
      summary_.data.dropped, r.seconds, static_cast<double>(r.tokens) / r.seconds);
  log_->append(line);
}

void Trainer::log_event(const std::string& name, const std::string& fields_json) {
  if (log_ == nullptr) {
    return;
  }
  nlohmann::ordered_json line = {{"event", name}, {"step", next_step_}};
  if (!fields_json.empty()) {
    line.update(nlohmann::ordered_json::parse(fields_json));
  }
  log_->append(line.dump());
}

std::string Trainer::last_good() const {
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
                     find_trouble(sequences)));
  }
  const DivergenceConfig& limits = config_.divergence;
  const auto window = static_cast<size_t>(std::max<int64_t>(limits.window, 10));
  if (limits.factor > 0.0 && recent_.size() >= window) {
    const double usual = median(recent_);
    above_ = report.loss > limits.factor * usual ? above_ + 1 : 0;
    if (above_ >= limits.patience) {
      stop(
          fmt::format("the loss {:.4g} has been more than {} times its running median {:.4g} for "
                      "{} steps, and {}; a lower learning rate or a longer warm-up may help",
                      report.loss, limits.factor, usual, above_, largest_gradient()));
    }
  }
  recent_.push_back(report.loss);
  if (recent_.size() > window) {
    recent_.erase(recent_.begin());
  }
}

std::string Trainer::largest_gradient() {
  std::string where = "no parameter";
  double largest = -1.0;
  student_.visit([&](const std::string& name, Parameter& p) {
    if (!p.tensor.has_grad()) {
      return;
    }
    double sum = 0.0;
    const float* g = p.tensor.grad_ptr<float>();
    for (int64_t i = 0; i < p.tensor.numel(); ++i) {
      sum += static_cast<double>(g[i]) * static_cast<double>(g[i]);
    }
    if (sum > largest) {
      largest = sum;
      where = name;
    }
  });
  return fmt::format("the largest gradient is that of {}", where);
}

std::string Trainer::find_trouble(const std::vector<PackedSequence>& sequences) {
  std::string found;
  student_.visit([&](const std::string& name, Parameter& p) {
    if (found.empty() && p.tensor.dtype == Dtype::kF32 && !all_finite(p.tensor)) {
      found = fmt::format("the first parameter with a value that is not finite is {}", name);
    }
  });
  const auto layers = static_cast<size_t>(student_.layer_count());
  for (size_t s = 0; s < sequences.size() && found.empty(); ++s) {
    const ArenaScope scope(arena_);
    Context plain{.arena = &arena_};
    if (teacher_ != nullptr && !all_finite(teacher_->forward(plain, sequences[s].batch))) {
      return "the teacher's hidden states are not finite";
    }
    std::vector<MixerTap> taps(layers);
    ForwardOptions options;
    options.taps = taps;
    const Tensor hidden = student_.forward(plain, sequences[s].batch, options);
    for (size_t i = 0; i < layers && found.empty(); ++i) {
      if (!all_finite(taps[i].input)) {
        found = i == 0 ? "the embeddings are the first activations that are not finite"
                       : fmt::format(
                             "layer {}'s feed-forward gives the first activations that are "
                             "not finite",
                             i - 1);
      } else if (!all_finite(taps[i].output)) {
        found = fmt::format("layer {}'s mixer gives the first activations that are not finite", i);
      }
    }
    if (found.empty() && !all_finite(hidden)) {
      found = fmt::format("layer {}'s feed-forward gives the first activations that are not finite",
                          layers - 1);
    }
  }
  if (!found.empty()) {
    return found;
  }
  // Gradients spread downwards: the last parameter of the model that has one is where it began.
  student_.visit([&](const std::string& name, Parameter& p) {
    if (name != "embed.weight" && !gradient_finite(p.tensor)) {
      found = fmt::format("gradients are not finite from {} downwards", name);
    }
  });
  return found.empty() ? "activations are finite, so the output head or the loss is to blame"
                       : found;
}

}  // namespace cambium
