// Reading Hugging Face config.json files: typed access with errors that name file, key and what was
// expected. Private to the families.
#pragma once

#include <nlohmann/json.hpp>
#include <string>

#include "model/spec.h"

namespace cambium::config {

using Json = nlohmann::ordered_json;

Json parse(const std::string& text, const std::string& where);
int64_t integer(const Json& config, const char* key, const std::string& where);
/// `fallback` also stands for null.
int64_t integer_or(const Json& config, const char* key, int64_t fallback, const std::string& where);
double real_or(const Json& config, const char* key, double fallback, const std::string& where);
bool flag_or(const Json& config, const char* key, bool fallback, const std::string& where);

/// What every decoder of this kind spells alike: sizes, eps, rope (rope_theta + rope_scaling, or
/// the newer rope_parameters), ids; num_hidden_layers attention layers.
ModelSpec read_decoder(const Json& config, const std::string& family, const std::string& where);
/// The same keys written, from a spec of equal attention layers and feed-forwards; Error otherwise.
Json write_decoder(const ModelSpec& spec, const char* architecture, const char* model_type);
/// Whether a layer is {norm, any mixer}, {norm, swiglu} with this norm and no other option: what
/// decoder configurations express.
bool is_decoder_layer(const LayerSpec& layer, const NormSpec& norm);
/// x as the shortest decimal that reads back as the same float.
double shortest(float x);
/// Channels inside the feed-forward of a layer that has one.
int64_t inner_of(const LayerSpec& layer);
/// The keys above that do not depend on the layers.
Json write_common(const ModelSpec& spec);

/// Our name -> "model.layers.N.self_attn.q_proj.weight" and so on; `mixer_prefix` in place of our
/// "mixer." ("self_attn.").
std::string decoder_tensor_name(const std::string& ours, const char* mixer_prefix);
/// Layer of "layers.N....", or -1.
int64_t layer_of(const std::string& ours);

}  // namespace cambium::config
