// Mistral's models of text and images, of which the text model is read: Ministral 3, whose queries
// are scaled by their positions, and Mistral Small 3.
#include "base/checked.h"
#include "model/families/config.h"
#include "model/families/families.h"

namespace cambium {
namespace {

using config::Json;

constexpr config::DecoderTraits kTraits{.windows = config::Windows::kEverywhere};

ModelSpec read_text(const Json& config, const char* family, const std::string& where) {
  ModelSpec spec = config::read_decoder(config, family, where, kTraits);
  const int64_t window = config::integer_or(config, "sliding_window", 0, 1, kMaxPositions, where);
  for (LayerSpec& layer : spec.layers) {
    if (window > 0) {
      layer.mixer()->options.set("window", window);
    }
  }
  return spec;
}

Json write_text(const ModelSpec& spec, const char* model_type) {
  Json config = config::write_decoder(spec, "Ministral3ForCausalLM", model_type, kTraits);
  config::move_rope_to_parameters(config, spec.rope, config["head_dim"].get<int64_t>());
  return config;
}

ModelSpec read_ministral3(const std::string& text, const std::string& where) {
  return read_text(config::parse(text, where), "ministral3", where);
}

std::string write_ministral3(const ModelSpec& spec) {
  return config::expressed(write_text(spec, "ministral3"), spec, read_ministral3);
}

ModelSpec read_mistral3(const std::string& text, const std::string& where) {
  const Json config = config::text_config(config::parse(text, where), where);
  const std::string type = config::text_or(config, "model_type", "mistral", where);
  expect(type == "ministral3" || type == "mistral",
         "{}: expected a text_config of model_type ministral3 or mistral, got '{}'", where, type);
  return read_text(config, "mistral3", where);
}

std::string write_mistral3(const ModelSpec& spec) {
  const Json text = write_text(spec, spec.rope.query_beta > 0.0 ? "ministral3" : "mistral");
  return config::expressed(
      config::composite_config(text, "Mistral3ForConditionalGeneration", "mistral3"), spec,
      read_mistral3);
}

Family ministral3_family() {
  return {"ministral3",
          {"ministral3"},
          read_ministral3,
          write_ministral3,
          config::decoder_tensors(),
          config::decoder_ignored()};
}

Family mistral3_family() {
  const std::vector<TensorRule> text = config::decoder_tensors();
  std::vector<TensorRule> rules = config::tensors_under(text, "", "language_model.");
  // As newer versions of transformers have them in memory.
  const std::vector<TensorRule> newer =
      config::tensors_under(text, "model.", "model.language_model.");
  rules.insert(rules.end(), newer.begin(), newer.end());
  std::vector<std::string> ignored = config::decoder_ignored();
  for (const char* images : {"*vision_tower.*", "vision_tower.*", "*multi_modal_projector.*",
                             "multi_modal_projector.*"}) {
    ignored.emplace_back(images);
  }
  return {"mistral3", {"mistral3"}, read_mistral3, write_mistral3, rules, ignored};
}

}  // namespace

std::vector<Family> mistral3_families() {
  return {ministral3_family(), mistral3_family()};
}

}  // namespace cambium
