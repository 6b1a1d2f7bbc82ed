#include "cli/bench_models.h"

#include <cstdio>

#include "base/progress.h"
#include "model/random_model.h"

namespace cambium {

void ModelsOption::declare(Args& args) {
  args.positionals("models", "checkpoint folders, measured in turns", &models, false);
  args.option("preset",
              "of the models, which are supernets: the placement with this name; may be given "
              "several times",
              &presets);
  args.option("random-weights", "config.json, or its folder: a model of its sizes, made-up numbers",
              &random);
  cache.declare(args);
  cache.declare_page_size(args);
  args.choice("storage", "of matrices in memory; random weights: stored is f32",
              {"stored", "f32", "bf16"}, &storage);
  device.declare(args);
  args.flag("json", "print JSON", &json);
}

size_t ModelsOption::count() const {
  const size_t all = stored() + random.size();
  expect(all > 0, "bench: expected a checkpoint folder, or --random-weights with a configuration");
  return all;
}

const std::string& ModelsOption::path(size_t i) const {
  return i < stored() ? models[i / std::max<size_t>(presets.size(), 1)] : random[i - stored()];
}

const std::string& ModelsOption::preset(size_t i) const {
  static const std::string kNone;
  return i < stored() && !presets.empty() ? presets[i % presets.size()] : kNone;
}

std::string ModelsOption::name(size_t i) const {
  return path(i) + (i >= stored()     ? " (random weights)"
                    : presets.empty() ? ""
                                      : " (" + preset(i) + ")");
}

LoadedModel ModelsOption::load(size_t i) const {
  LoadOptions options;
  options.storage = parse_storage(storage);
  options.device = device.device();
  options.preset = preset(i);
  return i < stored() ? load_model(path(i), options)
                      : random_model(read_spec(path(i)), options.storage, 1, options.device);
}

void note_unless_finite(const std::string& model, bool finite) {
  if (!finite) {
    note(
        "{}: its logits are not finite numbers, so its weights or what computes them are broken; "
        "the times may not be those of a sound model",
        model);
  }
}

nlohmann::ordered_json limits_json(const MachineLimits& limits) {
  return {{"bytes_per_second", limits.bytes_per_second},
          {"flops_per_second", limits.flops_per_second}};
}

void print_limits(const std::string& model, const MachineLimits& limits) {
  fmt::print("{}: the machine copies {:.1f} GB/s and multiplies at {:.3f} TFLOP/s\n", model,
             1e-9 * limits.bytes_per_second, 1e-12 * limits.flops_per_second);
}

}  // namespace cambium
