#include "hybrid/merge.h"

#include <cmath>
#include <numeric>

#include "base/error.h"
#include "tensor/copy.h"

namespace cambium {

LoadedModel merge_models(const std::vector<Model*>& models, const std::vector<double>& weights) {
  expect(!models.empty(), "merge: expected at least one model");
  expect(weights.empty() || weights.size() == models.size(),
         "merge: expected a weight for each of the {} models, got {}", models.size(),
         weights.size());
  std::vector<double> shares(models.size(), 1.0);
  for (size_t i = 0; i < weights.size(); ++i) {
    expect(std::isfinite(weights[i]) && weights[i] >= 0.0,
           "merge: expected weights of at least 0, got {}", weights[i]);
    shares[i] = weights[i];
  }
  const double sum = std::accumulate(shares.begin(), shares.end(), 0.0);
  expect(sum > 0.0 && std::isfinite(sum), "merge: expected a weight above 0");
  const ModelSpec& spec = models[0]->spec();
  std::vector<std::vector<Tensor>> sources(models.size());
  for (size_t i = 0; i < models.size(); ++i) {
    ModelSpec other = models[i]->spec();
    other.family = spec.family;
    expect(other == spec,
           "merge: model {} is not shaped like the first: layers {} and {}, width {} and {}, "
           "vocabulary {} and {}, or another option of config.json",
           i + 1, layer_map(spec), layer_map(other), spec.width, other.width, spec.vocab,
           other.vocab);
    models[i]->visit([&](const std::string&, Parameter& p) { sources[i].push_back(p.tensor); });
  }
  LoadedModel merged{{}, std::make_unique<Model>(spec), {}};
  merged.weights.allocate(*merged.model);
  size_t at = 0;
  merged.model->visit([&](const std::string&, Parameter& p) {
    const Tensor& out = p.tensor;
    std::vector<double> mean(static_cast<size_t>(out.numel()), 0.0);
    OwnedTensor source(Dtype::kF32, p.shape);
    for (size_t i = 0; i < models.size(); ++i) {
      copy(source.view, sources[i][at]);
      const float* x = source.view.ptr<float>();
      for (size_t k = 0; k < mean.size(); ++k) {
        mean[k] += shares[i] / sum * static_cast<double>(x[k]);
      }
    }
    float* y = out.ptr<float>();
    for (size_t k = 0; k < mean.size(); ++k) {
      y[k] = static_cast<float>(mean[k]);
    }
    ++at;
  });
  return merged;
}

}  // namespace cambium
