#include "train/step_judge.h"

#include <algorithm>
#include <cmath>

#include "base/error.h"
#include "ops/optimizer/optimizer.h"

namespace cambium {
namespace {

constexpr size_t kLastLosses = 10;
/// Of the median of a window over the mean of the first losses: where it is said.
constexpr double kRisen = 1.25;

bool finite(const Context& ctx, const Tensor& t) {
  return !t.defined() || all_finite(ctx, t);
}

double mean(std::span<const double> values) {
  double sum = 0.0;
  for (const double value : values) {
    sum += value;
  }
  return sum / static_cast<double>(values.size());
}

double median(std::vector<double> values) {
  const auto middle = values.begin() + static_cast<ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

}  // namespace

std::string StepJudge::diverged(double loss) {
  std::vector<double>& recent = state_.recent;
  if (limits_.factor > 0.0 && std::ssize(recent) >= window()) {
    const double usual = median(recent);
    state_.above = loss > limits_.factor * usual ? state_.above + 1 : 0;
    if (state_.above >= limits_.patience) {
      return fmt::format(
          "the loss {:.4g} has been more than {} times its running median {:.4g} for "
          "{} steps",
          loss, limits_.factor, usual, state_.above);
    }
  }
  if (state_.first.size() < kFirst) {
    state_.first.push_back(loss);
  }
  recent.push_back(loss);
  if (std::ssize(recent) > window()) {
    recent.erase(recent.begin());
  }
  return "";
}

std::string StepJudge::risen() const {
  if (state_.first.size() < kFirst || std::ssize(state_.recent) < window()) {
    return "";
  }
  const double began = mean(state_.first);
  const double now = median(state_.recent);
  // Documents differ: of losses that do not rise, 1 median in 32 lies above each of five others.
  const double highest = *std::max_element(state_.first.begin(), state_.first.end());
  return now > std::max(kRisen * began, highest)
             ? fmt::format(
                   "the loss of the last {} steps, {:.4g}, is {:.1f} times that of the first "
                   "{}, {:.4g}",
                   state_.recent.size(), now, now / began, kFirst, began)
             : "";
}

double StepJudge::last_loss() const {
  const size_t last = std::min(kLastLosses, state_.recent.size());
  return mean(std::span(state_.recent).last(last));
}

std::string largest_gradient(Model& model) {
  Workspace workspace(model.device());
  std::string where = "no parameter";
  double largest = -1.0;
  model.visit([&](const std::string& name, Parameter& p) {
    if (!p.tensor.has_grad()) {
      return;
    }
    const double sum = sum_squares(workspace.context(), p.tensor.grad_tensor());
    if (sum > largest) {
      largest = sum;
      where = name;
    }
  });
  return fmt::format("the largest gradient is that of {}", where);
}

std::string find_trouble(Model& student, Model* teacher, std::span<const PackedSequence> sequences,
                         Workspace& workspace, Dtype activations) {
  Context plain = workspace.context(activations);
  std::string found;
  student.visit([&](const std::string& name, Parameter& p) {
    if (found.empty() && p.tensor.dtype == Dtype::kF32 && !finite(plain, p.tensor)) {
      found = fmt::format("the first parameter with a value that is not finite is {}", name);
    }
  });
  const auto layers = static_cast<size_t>(student.layer_count());
  for (size_t s = 0; s < sequences.size() && found.empty(); ++s) {
    const WorkspaceScope scope(workspace);
    if (teacher != nullptr && !finite(plain, teacher->forward(plain, sequences[s].batch))) {
      return "the teacher's hidden states are not finite";
    }
    std::vector<MixerTap> taps(layers);
    ForwardOptions options;
    options.taps = taps;
    const Tensor hidden = student.forward(plain, sequences[s].batch, options);
    for (size_t i = 0; i < layers && found.empty(); ++i) {
      if (!finite(plain, taps[i].input)) {
        found = i == 0 ? "the embeddings are the first activations that are not finite"
                       : fmt::format(
                             "layer {}'s feed-forward gives the first activations that are "
                             "not finite",
                             i - 1);
      } else if (!finite(plain, taps[i].output)) {
        found = fmt::format("layer {}'s mixer gives the first activations that are not finite", i);
      }
    }
    if (found.empty() && !finite(plain, hidden)) {
      found = fmt::format("layer {}'s feed-forward gives the first activations that are not finite",
                          layers - 1);
    }
  }
  if (!found.empty()) {
    return found;
  }
  // Gradients spread downwards: the last parameter of the model that has one is where it began.
  student.visit([&](const std::string& name, Parameter& p) {
    if (name != "embed.weight" && p.tensor.has_grad() && !finite(plain, p.tensor.grad_tensor())) {
      found = fmt::format("gradients are not finite from {} downwards", name);
    }
  });
  return found.empty() ? "activations are finite, so the output head or the loss is to blame"
                       : found;
}

}  // namespace cambium
