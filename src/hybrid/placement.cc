#include "hybrid/placement.h"

#include <algorithm>
#include <cmath>

#include "serve/cache_plan.h"

namespace cambium {

std::vector<int64_t> place_lowest(const Importance& importance, int64_t count) {
  const auto scored = static_cast<int64_t>(importance.layers.size());
  expect(count >= 0 && count <= scored, "{} layers are to be converted, but only {} were scored",
         count, scored);
  std::vector<int64_t> chosen = importance.order();
  chosen.resize(static_cast<size_t>(count));
  std::sort(chosen.begin(), chosen.end());
  return chosen;
}

std::vector<int64_t> place_uniform(const ModelSpec& spec, int64_t count) {
  const std::vector<int64_t> open = attention_layers(spec);
  const auto n = static_cast<int64_t>(open.size());
  expect(count >= 0 && count <= n,
         "{} layers are to be converted, but only {} still have attention", count, n);
  std::vector<int64_t> chosen;
  for (int64_t i = 0; i < count; ++i) {
    chosen.push_back(open[static_cast<size_t>((2 * i + 1) * n / (2 * count))]);
  }
  return chosen;
}

int64_t layers_to_convert(const ModelSpec& spec, double fraction) {
  expect(fraction >= 0.0 && fraction <= 1.0, "expected a fraction from 0 to 1, got {}", fraction);
  const auto target =
      static_cast<int64_t>(std::lround(fraction * static_cast<double>(spec.layers.size())));
  return std::max<int64_t>(0, target - converted_layers(spec));
}

int64_t layers_for_cache_budget(const ModelSpec& spec, int64_t bytes_per_token) {
  const Model model(spec);
  const CachePlan cache(model, {});
  int64_t total = cache.lasting_bytes_per_token();
  std::vector<int64_t> attention;
  for (const int64_t layer : attention_layers(spec)) {
    attention.push_back(cache.layers()[static_cast<size_t>(layer)].per_token);
  }
  std::sort(attention.rbegin(), attention.rend());
  int64_t count = 0;
  for (const int64_t bytes : attention) {
    if (total <= bytes_per_token) {
      break;
    }
    total -= bytes;
    ++count;
  }
  expect(total <= bytes_per_token,
         "a cache of {} bytes a token cannot be reached: {} remain with every attention layer "
         "converted",
         bytes_per_token, total);
  return count;
}

}  // namespace cambium
