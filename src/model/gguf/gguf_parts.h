// The pieces that rows of the table of architectures share.
#pragma once

#include <string>
#include <vector>

#include "model/gguf/gguf_architecture.h"

namespace cambium::gguf {

// What rows are written with.
using Keys = GgufArchitectureKeys;
using Rule = GgufKeyRule;
using Rules = std::vector<TensorRule>;
inline constexpr Rule::Kind kSize = Rule::kSize;
inline constexpr Rule::Kind kNumber = Rule::kNumber;
inline constexpr Rule::Kind kFlag = Rule::kFlag;

/// `more` before what decoders call their tensors.
std::vector<TensorRule> decoder_tensors(std::vector<TensorRule> more = {});
/// Keys of decoders with attention and a dense feed-forward, and `more`.
std::vector<GgufKeyRule> decoder_keys(std::vector<GgufKeyRule> more = {});
/// The same without the feed-forward's.
std::vector<GgufKeyRule> attention_keys(std::vector<GgufKeyRule> more = {});

/// Granite's factors.
std::vector<GgufKeyRule> granite_keys();

/// The write() of a part that other keys or the tensors say.
void write_nothing(const ModelSpec& spec, const GgufJson& config, GgufHead& head);
/// head_dim, from the width where no key says it.
extern const GgufPart kHeadDim;
/// attention_bias and mlp_bias, which tensors show.
extern const GgufPart kBiases;
/// The window and which layers have it (layer_types); without a pattern each second, fourth, sixth
/// layer is full.
extern const GgufPart kWindows2, kWindows4, kWindows6;
/// layer_types where keys' heads are 0 in layers of the other kind, by the words of the family.
extern const GgufPart kMambaLayers, kConvLayers;

/// The orders of rows of attention whose rotary pairs are neighbours in the file.
std::vector<GgufOrder> pairs();
/// expert_gating_func: softmax 1, sigmoid 2, softmax of the chosen 3.
std::map<std::string, uint64_t> gating(uint64_t function);
/// A whole number of config.json that is there.
int64_t whole(const GgufJson& config, const char* key);
/// A number a layer that must be there.
std::vector<int64_t> by_layer(GgufArchitectureKeys& keys, const char* key, const GgufJson& config);
/// attention.head_count_kv: `heads` where a layer's mixer is of this kind, 0 elsewhere.
void write_kv_heads(const ModelSpec& spec, GgufHead& head, std::string_view kind, int64_t heads);
/// Channels of a head as config.json's `dim`, of which the file says the sum over `heads` of them.
void read_inner(GgufArchitectureKeys& keys, GgufJson& config, const char* heads, const char* dim);
/// The unit of this kind that comes first; Error where the model has none.
const UnitSpec& unit_of(const ModelSpec& spec, std::string_view kind);

}  // namespace cambium::gguf
