#include "train/step_judge.h"

#include <algorithm>
#include <cmath>

#include "base/error.h"

namespace cambium {
namespace {

constexpr size_t kLastLosses = 10;

bool all_finite(const float* x, int64_t n) {
  return std::all_of(x, x + n, [](float v) { return std::isfinite(v); });
}

bool all_finite(const Tensor& t) {
  return !t.defined() || all_finite(t.ptr<float>(), t.numel());
}

bool gradient_finite(const Tensor& t) {
  return !t.has_grad() || all_finite(t.grad_ptr<float>(), t.numel());
}

double median(std::vector<double> values) {
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

}  // namespace

std::string StepJudge::diverged(double loss) {
  const auto window = static_cast<size_t>(std::max<int64_t>(limits_.window, 10));
  std::vector<double>& recent = state_.recent;
  if (limits_.factor > 0.0 && recent.size() >= window) {
    const double usual = median(recent);
    state_.above = loss > limits_.factor * usual ? state_.above + 1 : 0;
    if (state_.above >= limits_.patience) {
      return fmt::format(
          "the loss {:.4g} has been more than {} times its running median {:.4g} for "
          "{} steps",
          loss, limits_.factor, usual, state_.above);
    }
  }
  recent.push_back(loss);
  if (recent.size() > window) {
    recent.erase(recent.begin());
  }
  return "";
}

double StepJudge::last_loss() const {
  const size_t last = std::min(kLastLosses, state_.recent.size());
  double sum = 0.0;
  for (size_t i = state_.recent.size() - last; i < state_.recent.size(); ++i) {
    sum += state_.recent[i];
  }
  return sum / static_cast<double>(last);
}

std::string largest_gradient(Model& model) {
  std::string where = "no parameter";
  double largest = -1.0;
  model.visit([&](const std::string& name, Parameter& p) {
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

std::string find_trouble(Model& student, Model* teacher, std::span<const PackedSequence> sequences,
                         Arena& arena) {
  std::string found;
  student.visit([&](const std::string& name, Parameter& p) {
    if (found.empty() && p.tensor.dtype == Dtype::kF32 && !all_finite(p.tensor)) {
      found = fmt::format("the first parameter with a value that is not finite is {}", name);
    }
  });
  const auto layers = static_cast<size_t>(student.layer_count());
  for (size_t s = 0; s < sequences.size() && found.empty(); ++s) {
    const ArenaScope scope(arena);
    Context plain{.arena = &arena};
    if (teacher != nullptr && !all_finite(teacher->forward(plain, sequences[s].batch))) {
      return "the teacher's hidden states are not finite";
    }
    std::vector<MixerTap> taps(layers);
    ForwardOptions options;
    options.taps = taps;
    const Tensor hidden = student.forward(plain, sequences[s].batch, options);
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
  student.visit([&](const std::string& name, Parameter& p) {
    if (name != "embed.weight" && !gradient_finite(p.tensor)) {
      found = fmt::format("gradients are not finite from {} downwards", name);
    }
  });
  return found.empty() ? "activations are finite, so the output head or the loss is to blame"
                       : found;
}

}  // namespace cambium
