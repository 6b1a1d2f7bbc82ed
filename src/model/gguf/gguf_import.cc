#include "model/gguf/gguf_import.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <optional>
#include <utility>

#include "base/error.h"
#include "base/file.h"
#include "base/float16.h"
#include "files/gguf.h"
#include "files/safetensors.h"
#include "model/gguf/gguf_config.h"
#include "model/gguf/gguf_tokenizer.h"

namespace cambium {
namespace {

constexpr int64_t kChunkElements = 1 << 18;

/// A tensor of the model: where it comes from and what it becomes.
struct Plan {
  std::string from;
  std::string to;
  std::vector<int64_t> shape;
  int64_t rotary_heads = 0;  ///< above 0: rows are rotary pairs of this many heads
};

std::vector<Plan> plan_of(const GgufLlamaConfig& c) {
  std::vector<Plan> plan = {
      {"token_embd.weight", "model.embed_tokens.weight", {c.vocabulary, c.hidden}}};
  const int64_t q = c.heads * c.head_dim;
  const int64_t kv = c.kv_heads * c.head_dim;
  const int64_t q_pairs = c.neighbouring_pairs ? c.heads : 0;
  const int64_t k_pairs = c.neighbouring_pairs ? c.kv_heads : 0;
  for (int64_t layer = 0; layer < c.layers; ++layer) {
    const auto add = [&](const char* from, const char* to, std::vector<int64_t> shape,
                         int64_t rotary_heads = 0, const char* what = "weight") {
      plan.push_back({fmt::format("blk.{}.{}.{}", layer, from, what),
                      fmt::format("model.layers.{}.{}.{}", layer, to, what), std::move(shape),
                      rotary_heads});
    };
    add("attn_norm", "input_layernorm", {c.hidden});
    add("attn_q", "self_attn.q_proj", {q, c.hidden}, q_pairs);
    add("attn_k", "self_attn.k_proj", {kv, c.hidden}, k_pairs);
    add("attn_v", "self_attn.v_proj", {kv, c.hidden});
    add("attn_output", "self_attn.o_proj", {c.hidden, q});
    add("ffn_norm", "post_attention_layernorm", {c.hidden});
    add("ffn_gate", "mlp.gate_proj", {c.intermediate, c.hidden});
    add("ffn_up", "mlp.up_proj", {c.intermediate, c.hidden});
    add("ffn_down", "mlp.down_proj", {c.hidden, c.intermediate});
    if (c.qkv_bias) {
      add("attn_q", "self_attn.q_proj", {q}, q_pairs, "bias");
      add("attn_k", "self_attn.k_proj", {kv}, k_pairs, "bias");
      add("attn_v", "self_attn.v_proj", {kv}, 0, "bias");
    }
    if (c.output_bias) {
      add("attn_output", "self_attn.o_proj", {c.hidden}, 0, "bias");
    }
    if (c.mlp_bias) {
      add("ffn_gate", "mlp.gate_proj", {c.intermediate}, 0, "bias");
      add("ffn_up", "mlp.up_proj", {c.intermediate}, 0, "bias");
      add("ffn_down", "mlp.down_proj", {c.hidden}, 0, "bias");
    }
    if (c.qk_norm) {
      add("attn_q_norm", "self_attn.q_norm", {c.head_dim});
      add("attn_k_norm", "self_attn.k_norm", {c.head_dim});
    }
  }
  plan.push_back({"output_norm.weight", "model.norm.weight", {c.hidden}});
  if (!c.tied) {
    plan.push_back({"output.weight", "lm_head.weight", {c.vocabulary, c.hidden}});
  }
  return plan;
}

/// Every planned tensor is there with its shape, and nothing is left over.
std::vector<const GgufTensor*> match(const Gguf& gguf, const std::vector<Plan>& plan,
                                     const std::string& architecture) {
  std::map<std::string_view, const GgufTensor*> left;
  for (const GgufTensor& tensor : gguf.tensors()) {
    left.emplace(tensor.name, &tensor);
  }
  // These became part of the configuration.
  for (const char* name :
       {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}) {
    left.erase(name);
  }
  std::vector<const GgufTensor*> tensors;
  for (const Plan& row : plan) {
    const auto found = left.find(row.from);
    expect(found != left.end(), "{}: the tensor '{}' is missing", gguf.path(), row.from);
    const GgufTensor* tensor = found->second;
    expect(tensor->shape == row.shape, "{}: tensor '{}' has the shape {}, expected {}", gguf.path(),
           row.from, shape_text(tensor->shape), shape_text(row.shape));
    tensors.push_back(tensor);
    left.erase(found);
  }
  expect(left.empty(), "{}: the tensor '{}' (and {} more) has no place in a {} model", gguf.path(),
         left.empty() ? "" : left.begin()->first, left.empty() ? 0 : left.size() - 1, architecture);
  return tensors;
}

/// The file's row that becomes row `row`: the file holds channel i of the first half at 2i and of
/// the second half at 2i + 1.
int64_t source_row(int64_t row, int64_t rows, int64_t rotary_heads) {
  if (rotary_heads == 0) {
    return row;
  }
  const int64_t head_dim = rows / rotary_heads;
  const int64_t head = row / head_dim;
  const int64_t channel = row % head_dim;
  const int64_t half = channel / (head_dim / 2);
  return head * head_dim + 2 * (channel % (head_dim / 2)) + half;
}

/// Streams a tensor: some rows at a time are decoded, narrowed and handed on.
void put_tensor(const Gguf& gguf, const GgufTensor& tensor, int64_t rotary_heads, bool float32,
                const PutBytes& put) {
  // A vector whose elements are rotary pairs (a bias) is so many rows of one element.
  const bool pairs_in_a_row = rotary_heads > 0 && tensor.shape.size() == 1;
  const int64_t rows = pairs_in_a_row ? 1 : tensor.rows();
  const int64_t columns = tensor.columns();
  const int64_t step = std::clamp<int64_t>(kChunkElements / columns, 1, rows);
  std::vector<float> wide(static_cast<size_t>(step * columns));
  std::vector<uint16_t> narrow(float32 ? 0 : wide.size());
  for (int64_t first = 0; first < rows; first += step) {
    const int64_t count = std::min(step, rows - first);
    const auto elements = static_cast<size_t>(count * columns);
    const std::span<float> values(wide.data(), elements);
    if (rotary_heads == 0) {
      dequantise_rows(tensor, first, count, values);
    } else if (pairs_in_a_row) {
      std::vector<float> stored(elements);
      dequantise_rows(tensor, 0, 1, stored);
      for (int64_t i = 0; i < columns; ++i) {
        values[static_cast<size_t>(i)] =
            stored[static_cast<size_t>(source_row(i, columns, rotary_heads))];
      }
    } else {
      for (int64_t i = 0; i < count; ++i) {
        dequantise_rows(
            tensor, source_row(first + i, rows, rotary_heads), 1,
            values.subspan(static_cast<size_t>(i * columns), static_cast<size_t>(columns)));
      }
    }
    expect(std::all_of(values.begin(), values.end(), [](float v) { return std::isfinite(v); }),
           "{}: tensor '{}' holds values that are not finite: the file is damaged", gguf.path(),
           tensor.name);
    if (float32) {
      put(std::as_bytes(values));
    } else {
      std::transform(values.begin(), values.end(), narrow.begin(), f32_to_bf16);
      put(std::as_bytes(std::span(narrow.data(), elements)));
    }
  }
  gguf.release(tensor);
}

}  // namespace

GgufImportSummary import_gguf(const std::string& gguf_path, const std::string& folder,
                              const GgufImportOptions& options) {
  const Gguf gguf(gguf_path);
  const GgufLlamaConfig config = read_llama_config(gguf);
  const std::vector<Plan> plan = plan_of(config);
  const std::vector<const GgufTensor*> tensors = match(gguf, plan, config.architecture);
  GgufTokenizerFiles tokenizer = tokenizer_from_gguf(gguf, config.vocabulary);

  GgufImportSummary summary;
  summary.layers = config.layers;
  summary.notes = std::move(tokenizer.notes);
  summary.warnings = std::move(tokenizer.warnings);
  const StoredType dtype = options.float32 ? StoredType::kF32 : StoredType::kBF16;
  std::vector<TensorSource> sources;
  for (size_t i = 0; i < plan.size(); ++i) {
    const GgufTensor* tensor = tensors[i];
    summary.parameters += tensor->rows() * tensor->columns();
    sources.push_back(
        {plan[i].to, dtype, plan[i].shape,
         [&gguf, tensor, heads = plan[i].rotary_heads, float32 = options.float32](
             const PutBytes& put) { put_tensor(gguf, *tensor, heads, float32, put); }});
  }
  summary.bytes = static_cast<uint64_t>(summary.parameters) * stored_type_size(dtype);

  AtomicDirectory out(folder, options.replace ? AtomicDirectory::Existing::kReplace
                                              : AtomicDirectory::Existing::kRefuse);
  SafeTensorsOptions save;
  save.max_shard_bytes = options.max_shard_bytes;
  if (options.progress) {
    save.progress = [&](uint64_t done) { options.progress(done, summary.bytes); };
  }
  const auto at = [&](const char* name) { return out.path() + "/" + name; };
  const FileChecksums checksums =
      write_safetensors(at("model.safetensors"), std::move(sources), save);
  write_file_atomically(at("config.json"),
                        llama_config_json(config, options.float32 ? "float32" : "bfloat16"));
  write_file_atomically(at("tokenizer.json"), tokenizer.tokenizer_json);
  write_file_atomically(at("tokenizer_config.json"), tokenizer.tokenizer_config_json);
  write_file_atomically(at("generation_config.json"), tokenizer.generation_config_json);
  if (options.finish) {
    options.finish(out.path());
  }
  write_checksums(out.path(), checksums);
  out.commit();
  return summary;
}

}  // namespace cambium
