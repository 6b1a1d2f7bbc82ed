#include "model/gguf/gguf_export.h"

#include <algorithm>
#include <cmath>

#include "base/error.h"
#include "base/signals.h"
#include "files/gguf_writer.h"
#include "files/safetensors.h"
#include "model/gguf/gguf_places.h"
#include "model/gguf/gguf_tokenizer_export.h"
#include "model/spec.h"

namespace cambium {
namespace {

constexpr std::pair<const char*, GgufType> kTypes[] = {{"f32", GgufType::kF32},
                                                       {"f16", GgufType::kF16},
                                                       {"bf16", GgufType::kBF16},
                                                       {"q8_0", GgufType::kQ8_0}};

/// general.file_type: llama.cpp's number for a file of mostly this type.
uint32_t file_type(GgufType matrices) {
  switch (matrices) {
    case GgufType::kF16:
      return 1;
    case GgufType::kQ8_0:
      return 7;
    case GgufType::kBF16:
      return 32;
    default:
      return 0;
  }
}

/// Error where llama.cpp's architecture computes something else.
GgufLlamaConfig config_of(const ModelSpec& spec, const std::string& where) {
  GgufLlamaConfig c;
  // Mistral without a window is a llama there.
  c.architecture = spec.family == "mistral" ? "llama" : spec.family;
  expect(c.architecture == "llama" || c.architecture == "qwen2" || c.architecture == "qwen3",
         "{}: a {} model cannot be written as GGUF; llama, mistral, qwen2 and qwen3 can", where,
         spec.family);
  c.neighbouring_pairs = neighbouring_pairs(c.architecture);
  const Options& mixer = spec.layers.front().mixer()->options;
  const Options& inner = spec.layers.front().feed_forward()->options;
  c.layers = std::ssize(spec.layers);
  c.hidden = spec.width;
  c.intermediate = inner.integer("feed-forward", "inner");
  c.heads = mixer.integer("attention", "heads");
  c.kv_heads = mixer.integer("attention", "kv_heads", c.heads);
  c.head_dim = mixer.integer("attention", "head_dim");
  c.vocabulary = spec.vocab;
  c.context = spec.max_positions;
  c.rms_eps = spec.norm.eps;
  c.rope_theta = spec.rope.theta;
  c.qkv_bias = mixer.flag("attention", "qkv_bias", false);
  c.output_bias = mixer.flag("attention", "out_bias", false);
  c.mlp_bias = inner.flag("feed-forward", "bias", false);
  c.qk_norm = mixer.real("attention", "qk_norm_eps", 0.0) > 0.0;
  c.tied = spec.tied_head;
  expect(c.architecture == "llama" || (!c.output_bias && !c.mlp_bias),
         "{}: llama.cpp has no biases of the attention's output or the feed-forward in a {} model",
         where, c.architecture);
  expect(spec.rope.dim == c.head_dim,
         "{}: expected rotations of whole heads of {} channels, got {} of them", where, c.head_dim,
         spec.rope.dim);
  for (const LayerSpec& layer : spec.layers) {
    const int64_t window = layer.mixer()->options.integer("attention", "window", 0);
    expect(
        window == 0 || window >= spec.max_positions,
        "{}: llama.cpp runs {} models without sliding windows, and this one has one of {} tokens "
        "for texts of {}",
        where, c.architecture, window, spec.max_positions);
  }
  return c;
}

/// What llama.cpp divides each rotary frequency by: plain / scaled.
std::vector<float> rope_divisors(const RopeConfig& rope, int64_t length) {
  RopeConfig plain = rope;
  plain.scaling = RopeScaling::kNone;
  std::vector<float> divisors = rope_frequencies(plain);
  const std::vector<float> scaled = rope_frequencies(rope, length);
  std::transform(divisors.begin(), divisors.end(), scaled.begin(), divisors.begin(),
                 [](float a, float b) { return a / b; });
  return divisors;
}

GgufSource vector_source(std::string name, std::vector<float> values) {
  const auto count = static_cast<int64_t>(values.size());
  return {std::move(name), GgufType::kF32, {count}, [values](const PutBytes& put) {
            put(std::as_bytes(std::span(values)));
          }};
}

/// Keys, and the tensors that stand for keys.
void put_rope(GgufKeys& keys, std::vector<GgufSource>& tensors, const std::string& architecture,
              const RopeConfig& rope, const std::string& where) {
  const auto key = [&](const char* name) { return architecture + ".rope." + name; };
  keys.u32(key("dimension_count"), static_cast<uint32_t>(rope.dim));
  keys.f32(key("freq_base"), static_cast<float>(rope.theta));
  const auto scaling = [&](const char* kind) {
    keys.text(key("scaling.type"), kind);
    keys.f32(key("scaling.factor"), static_cast<float>(rope.factor));
    keys.u32(key("scaling.original_context_length"), static_cast<uint32_t>(rope.original_length));
  };
  switch (rope.scaling) {
    case RopeScaling::kNone:
      break;
    case RopeScaling::kLinear:
      scaling("linear");
      break;
    case RopeScaling::kLlama3:
      tensors.push_back(vector_source("rope_freqs.weight", rope_divisors(rope, 0)));
      break;
    case RopeScaling::kYarn: {
      expect(rope.truncate, "{}: llama.cpp has no YaRN whose ramp begins between two channels",
             where);
      scaling("yarn");
      // llama.cpp multiplies what the factor gives anyway by attn_factor.
      const double given = 0.1 * std::log(rope.factor) + 1.0;
      if (std::abs(rope.attention_factor / given - 1.0) > 1e-6) {
        keys.f32(key("scaling.attn_factor"), static_cast<float>(rope.attention_factor / given));
      }
      keys.f32(key("scaling.yarn_beta_fast"), static_cast<float>(rope.beta_fast));
      keys.f32(key("scaling.yarn_beta_slow"), static_cast<float>(rope.beta_slow));
      break;
    }
    case RopeScaling::kDynamic:
    case RopeScaling::kLongRope:
      fail(
          "{}: rotations that go by the length of the text (dynamic, longrope) cannot be written "
          "for {} models of llama.cpp",
          where, architecture);
  }
}

GgufKeys keys_of(const GgufLlamaConfig& c, GgufType matrices) {
  GgufKeys keys;
  keys.text("general.architecture", c.architecture);
  keys.u32("general.file_type", file_type(matrices));
  keys.u32("general.quantization_version", 2);
  const auto size = [&](const char* name, int64_t value) {
    keys.u32(c.architecture + "." + name, static_cast<uint32_t>(value));
  };
  size("vocab_size", c.vocabulary);
  size("context_length", c.context);
  size("embedding_length", c.hidden);
  size("block_count", c.layers);
  size("feed_forward_length", c.intermediate);
  size("attention.head_count", c.heads);
  size("attention.head_count_kv", c.kv_heads);
  size("attention.key_length", c.head_dim);
  size("attention.value_length", c.head_dim);
  keys.f32(c.architecture + ".attention.layer_norm_rms_epsilon", static_cast<float>(c.rms_eps));
  return keys;
}

/// The values of a stored tensor in the file's order of rows.
std::vector<float> values_of(const TensorEntry& entry, int64_t rotary_heads) {
  std::vector<float> stored = as_f32(entry);
  expect(std::all_of(stored.begin(), stored.end(), [](float x) { return std::isfinite(x); }),
         "tensor {} holds values that are not finite", entry.name);
  if (rotary_heads == 0) {
    return stored;
  }
  const int64_t rows = entry.shape.front();
  const auto columns = static_cast<int64_t>(stored.size()) / rows;
  std::vector<float> values(stored.size());
  for (int64_t row = 0; row < rows; ++row) {
    std::copy_n(stored.begin() + row * columns, columns,
                values.begin() + gguf_row(row, rows, rotary_heads) * columns);
  }
  return values;
}

/// Blocks that do not fill a row become f16, as llama.cpp's own quantising does it.
GgufType type_of(const std::vector<int64_t>& shape, GgufType matrices) {
  if (shape.size() < 2) {
    return GgufType::kF32;
  }
  return can_encode(matrices, shape.back()) ? matrices : GgufType::kF16;
}

}  // namespace

GgufType parse_gguf_type(const std::string& name) {
  const auto* row = std::find_if(std::begin(kTypes), std::end(kTypes),
                                 [&](const auto& type) { return name == type.first; });
  expect(row != std::end(kTypes), "expected f32, f16, bf16 or q8_0, got '{}'", name);
  return row->second;
}

uint64_t export_gguf(const std::filesystem::path& folder, const std::string& gguf_path,
                     const GgufExportOptions& options) {
  const std::string where = folder.string();
  const ModelSpec spec = read_spec(folder);
  const GgufLlamaConfig config = config_of(spec, where);
  const SafeTensors weights = SafeTensors::open(where);
  GgufKeys keys = keys_of(config, options.matrices);
  std::vector<GgufSource> tensors;
  put_rope(keys, tensors, config.architecture, spec.rope, where);
  put_tokenizer(keys, folder, spec, options.pre);
  for (const GgufPlace& place : gguf_places(config)) {
    const TensorEntry& entry = weights.at(place.stored);
    expect(entry.shape == place.shape, "{}: tensor {} has the shape {}, expected {}", where,
           place.stored, shape_text(entry.shape), shape_text(place.shape));
    const GgufType type = type_of(place.shape, options.matrices);
    tensors.push_back({place.gguf, type, place.shape,
                       [&weights, &entry, type, heads = place.rotary_heads](const PutBytes& put) {
                         stop_point();
                         const std::string bytes = encode_rows(type, values_of(entry, heads));
                         put(std::as_bytes(std::span(bytes)));
                         weights.release(entry);
                       }});
  }
  write_gguf(gguf_path, keys, tensors);
  return std::filesystem::file_size(gguf_path);
}

}  // namespace cambium
