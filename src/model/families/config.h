// Reading Hugging Face config.json files: typed access with errors that name file, key and what was
// expected. Private to the families.
#pragma once

#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "model/spec.h"

namespace cambium::config {

using Json = nlohmann::ordered_json;

/// The infinities and NaN that Python writes become null.
Json parse(const std::string& text, const std::string& where);
/// There and not null.
bool has(const Json& config, const char* key);
/// From `low` to `high`.
int64_t integer(const Json& config, const char* key, int64_t low, int64_t high,
                const std::string& where);
/// `fallback` also stands for null.
int64_t integer_or(const Json& config, const char* key, int64_t fallback, int64_t low, int64_t high,
                   const std::string& where);
/// Finite.
double real_or(const Json& config, const char* key, double fallback, const std::string& where);
bool flag_or(const Json& config, const char* key, bool fallback, const std::string& where);
std::string text_or(const Json& config, const char* key, const char* fallback,
                    const std::string& where);
/// A list of `count` strings.
std::vector<std::string> texts(const Json& config, const char* key, size_t count,
                               const std::string& where);
/// Error for a checkpoint whose quantization_config says that its weights are none that
/// model/packed_tensor.h reads.
void refuse_quantised(const Json& config, const std::string& where);

/// What transformers' configuration of its model_type has where the key is not said.
double absent_rope_theta(const Json& config);
double absent_rms_norm_eps(const Json& config);
/// Sets rope_scaling where nothing is said of it; null says that there is none.
void set_absent_scaling(Json& config, const Json& scaling);
/// Rotations of heads of `head_dim`; max_positions where the original length is not said.
RopeConfig read_rope(const Json& config, int64_t head_dim, int64_t max_positions,
                     const std::string& where);
/// Rotations by kind of layer, as newer files of some families say them in rope_parameters: the
/// configuration with those of full layers alone, and those of windowed layers where they are said.
std::pair<Json, std::optional<Json>> split_ropes(const Json& config);
/// rope_scaling, with the attention factor as it is.
Json write_rope_scaling(const RopeConfig& rope);

/// How a family's config.json says which layers have a sliding window.
enum class Windows : uint8_t {
  kNone,        // it cannot
  kEverywhere,  // sliding_window, for all layers
  kByLayer,     // sliding_window and layer_types
};

/// The partial_rotary_factor by which read_rope finds `dim` channels of a head of `head_dim`.
double rotary_share(int64_t dim, int64_t head_dim);
/// Puts what write_common wrote of the rotation into rope_parameters, with partial_rotary_factor.
void move_rope_to_parameters(Json& config, const RopeConfig& rope, int64_t head_dim);

/// The text model's part of a composite configuration (images and text), with what is said outside
/// of it: tie_word_embeddings, and the ids of tokens that it does not name.
Json text_config(const Json& config, const std::string& where);
/// The reverse, without a model of images.
Json composite_config(Json text, const char* architecture, const char* model_type);
/// The rules with names that begin with `from` beginning with `to` instead.
std::vector<TensorRule> tensors_under(std::vector<TensorRule> rules, std::string_view from,
                                      std::string_view to);

/// What differs between decoders of the Llama kind.
struct DecoderTraits {
  bool qkv_bias = false;        // q, k and v have biases whatever the config says
  bool attention_bias = false;  // the config may say so, of q, k, v and o
  bool mlp_bias = false;        // likewise
  Windows windows = Windows::kNone;
};

struct Sizes {
  int64_t layers = 0, heads = 0, kv_heads = 0, head_dim = 0;
};
Sizes read_sizes(const Json& config, const std::string& where);

/// The keys that do not depend on the layers: vocabulary, width, eps, positions, ids; Error for a
/// hidden_act that is not SiLU.
ModelSpec read_model(const Json& config, const std::string& family, const std::string& where);
/// read_model, rope (rope_theta + rope_scaling, or the newer rope_parameters), and
/// num_hidden_layers equal layers of attention and SwiGLU.
ModelSpec read_decoder(const Json& config, const std::string& family, const std::string& where,
                       const DecoderTraits& traits = {});
/// Gives the layers that layer_types calls sliding_attention the window; without that list, those
/// from `full_below` on.
void set_windows(ModelSpec& spec, const Json& config, int64_t window, int64_t full_below,
                 const std::string& where);
/// The configuration with a list of layer_types where it has none: each `every`th layer is full.
Json with_layer_types(Json config, int64_t every, const std::string& where);
/// layer_types and sliding_window (null where no layer has one) of layers of attention; Error for
/// several windows.
void write_layer_types(const ModelSpec& spec, Json& config);
/// What decoders of attention spell alike, from the first layer: read_model's keys, sizes, the part
/// of a head that turns. For writers that end in expressed().
Json write_attention_decoder(const ModelSpec& spec, const char* architecture,
                             const char* model_type);
/// The same keys written, from a spec of layers that differ in their windows at most; Error where
/// the traits cannot express it.
Json write_decoder(const ModelSpec& spec, const char* architecture, const char* model_type,
                   const DecoderTraits& traits = {});
/// Whether a layer is {norm, any mixer}, {norm, swiglu} with this norm and no factor: what decoder
/// configurations express.
bool is_decoder_layer(const LayerSpec& layer, const NormSpec& norm);
/// The first unit of the kind, or null; first_unit: an Error that says that the family needs one.
const UnitSpec* find_unit(const ModelSpec& spec, std::string_view kind);
const UnitSpec& first_unit(const ModelSpec& spec, std::string_view kind);
/// The first mixer of the kind, or, where no layer has one, a small one: a hybrid's configuration
/// gives the sizes of all its kinds, and some released models (Granite 4 Micro) have one alone.
UnitSpec mixer_or_small(const ModelSpec& spec, std::string_view kind);
/// x as the shortest decimal that reads back as the same float.
double shortest(float x);
/// Channels inside the feed-forward of a layer that has one.
int64_t inner_of(const LayerSpec& layer);
/// What read_model reads.
Json write_common(const ModelSpec& spec);

/// The names of Llama's checkpoints, after the family's own `more`, which win.
std::vector<TensorRule> decoder_tensors(std::vector<TensorRule> more = {});
/// The rows, and after them those of the same tensors in a file with other modalities beside the
/// text: under "language_model." or, as newer files have them, "model.language_model.".
std::vector<TensorRule> composite_tensors(const std::vector<TensorRule>& text);
/// Buffers of older files.
std::vector<std::string> decoder_ignored();
/// The text of a configuration that says all of the spec: where `read` makes another spec of it, an
/// Error that names the first layer that the family cannot express.
std::string expressed(const Json& config, const ModelSpec& spec,
                      ModelSpec (*read)(const std::string& text, const std::string& where));

}  // namespace cambium::config
