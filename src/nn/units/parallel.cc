// A window of attention and a recurrence side by side in one layer, as in B'MOJO-F and xLSTM's
// hybrids: both read x, and a gate per head mixes what their heads give before one projection,
//
//   y = o_proj(s window(x) + (1 - s) recurrent(x)),   s = sigmoid(gate_proj x) per head
//
// (mix_proj in place of gate_proj where the window is on latents with a gate of that name).
//
// Two units of a branch (nn/layer.h) are added behind projections of their own, where heads cannot
// be mixed any more; and what aligns or grafts a layer knows one mixer with one output. So the pair
// is a unit.
//
// A student can learn to use its window alone (arXiv 2510.05901). While it is trained, s is zero
// for a share `window_dropout` of the documents, in which the recurrence must do without.
#include <algorithm>

#include "base/checked.h"
#include "base/random.h"
#include "nn/units/head_mixer.h"
#include "nn/units/units.h"
#include "ops/pointwise/pointwise.h"

namespace cambium {
namespace {

constexpr const char* kName = "parallel";
constexpr std::string_view kRecurrent = "recurrent.";

std::unique_ptr<HeadMixer> head_mixer(const UnitSpec& spec, int64_t width) {
  std::unique_ptr<Unit> unit = make_unit(spec, width);
  auto* mixer = dynamic_cast<HeadMixer*>(unit.get());
  expect(mixer != nullptr,
         "parallel: expected recurrent to be gated_delta_net, kimi_delta, mamba2 or lightning, got "
         "{}",
         spec.kind);
  static_cast<void>(unit.release());
  return std::unique_ptr<HeadMixer>(mixer);
}

class ParallelUnit : public Unit {
 public:
  ParallelUnit(const Options& options, int64_t width)
      : dropout_(in_range(kName, "window_dropout", options.real(kName, "window_dropout", 0.0), 0.0,
                          1.0)) {
    UnitSpec window{"sliding_window"};
    for (const auto& [key, value] : options.values()) {
      if (!key.starts_with(kRecurrent) && key != "recurrent" && key != "window_dropout") {
        window.options.set(key, value);
      }
    }
    const UnitSpec recurrent = recurrent_part(options);
    window_ = head_mixer(window, width);
    recurrent_ = head_mixer(recurrent, width);
    expect(recurrent_->state_layout().pages.empty(),
           "parallel: expected recurrent to be a recurrence, got {}", recurrent.kind);
    expect(window_->head_count() == recurrent_->head_count() &&
               window_->inner() == recurrent_->inner(),
           "parallel: expected heads of one number and size, got {} in {} channels of the window "
           "and {} in {} of {}",
           window_->head_count(), window_->inner(), recurrent_->head_count(), recurrent_->inner(),
           recurrent.kind);
    gate_ = Linear(width, window_->head_count(), ParameterGroup::kMixer, true);
    gate_name_ = parallel_gate(options);
    reads_ = {&gate_};
    for (const HeadMixer* mixer : {window_.get(), recurrent_.get()}) {
      reads_.insert(reads_.end(), mixer->reads().begin(), mixer->reads().end());
    }
  }

  Tensor forward(Context& ctx, const Tensor& x, const UnitInputs& inputs) override {
    const std::vector<Tensor> rows = forward_all(ctx, x, reads_);
    const auto read = std::span<const Tensor>(rows).subspan(1);
    const size_t of_window = window_->reads().size();
    const Tensor near = window_->heads(ctx, x, read.first(of_window), inputs);
    const Tensor far = recurrent_->heads(ctx, x, read.subspan(of_window), inputs);
    return window_->project(ctx, mix_heads(ctx, near, far, rows[0], closed(ctx, inputs)));
  }

  // The window keeps pages alone and the recurrence slots alone, so both find theirs by the places
  // they know.
  StateLayout state_layout() const override {
    StateLayout layout = window_->state_layout();
    layout.slots = recurrent_->state_layout().slots;
    return layout;
  }

  std::string missing() const override {
    const std::string window = window_->missing();
    return window.empty() ? recurrent_->missing() : window;
  }

  void visit(const ParameterVisitor& visitor) override {
    window_->visit(visitor);
    recurrent_->visit([&](const std::string& name, Parameter& p) {
      if (!name.starts_with("out_proj.")) {  // the window's o_proj stands for both
        visitor(std::string(kRecurrent) + name, p);
      }
    });
    gate_.visit(gate_name_, visitor);
  }

 private:
  /// (T): not 0 for tokens of documents that go without their window; null where none do.
  const uint8_t* closed(const Context& ctx, const UnitInputs& inputs) const {
    if (dropout_ == 0.0 || inputs.noise == 0) {
      return nullptr;
    }
    const Segments segments = inputs.segments();
    auto* tokens = ctx.shared_scratch<uint8_t>(inputs.batch->size());
    for (int64_t s = 0; s < segments.count(); ++s) {
      const bool without = Rng(inputs.noise, static_cast<uint64_t>(s)).chance(dropout_);
      std::fill_n(tokens + segments.start[static_cast<size_t>(s)], segments.length(s),
                  static_cast<uint8_t>(without));
    }
    return tokens;
  }

  double dropout_;
  std::unique_ptr<HeadMixer> window_, recurrent_;
  Linear gate_;
  std::vector<const Linear*> reads_;  // the gate, then what the window and the recurrence read
  const char* gate_name_;
};

}  // namespace

UnitSpec recurrent_part(const Options& parallel) {
  UnitSpec recurrent{parallel.text(kName, "recurrent")};
  for (const auto& [key, value] : parallel.values()) {
    if (key.starts_with(kRecurrent)) {
      recurrent.options.set(std::string_view(key).substr(kRecurrent.size()), value);
    }
  }
  return recurrent;
}

const char* parallel_gate(const Options& parallel) {
  const bool taken = parallel.has("kv_rank") && parallel.flag(kName, "gate", false);
  return taken ? "mix_proj" : "gate_proj";
}

std::unique_ptr<Unit> make_parallel(const Options& options, int64_t width) {
  return std::make_unique<ParallelUnit>(options, width);
}

}  // namespace cambium
