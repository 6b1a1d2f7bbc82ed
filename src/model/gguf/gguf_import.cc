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
#include "model/gguf/gguf_places.h"
#include "model/gguf/gguf_tokenizer.h"

namespace cambium {
namespace {

constexpr int64_t kChunkElements = 1 << 18;

/// Every planned tensor is there with its shape, and nothing is left over.
std::vector<const GgufTensor*> match(const Gguf& gguf, const std::vector<GgufPlace>& plan,
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
  for (const GgufPlace& row : plan) {
    const auto found = left.find(row.gguf);
    expect(found != left.end(), "{}: the tensor '{}' is missing", gguf.path(), row.gguf);
    const GgufTensor* tensor = found->second;
    expect(tensor->shape == row.shape, "{}: tensor '{}' has the shape {}, expected {}", gguf.path(),
           row.gguf, shape_text(tensor->shape), shape_text(row.shape));
    tensors.push_back(tensor);
    left.erase(found);
  }
  expect(left.empty(), "{}: the tensor '{}' (and {} more) has no place in a {} model", gguf.path(),
         left.empty() ? "" : left.begin()->first, left.empty() ? 0 : left.size() - 1, architecture);
  return tensors;
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
            stored[static_cast<size_t>(gguf_row(i, columns, rotary_heads))];
      }
    } else {
      for (int64_t i = 0; i < count; ++i) {
        dequantise_rows(
            tensor, gguf_row(first + i, rows, rotary_heads), 1,
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
  const std::vector<GgufPlace> plan = gguf_places(config);
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
        {plan[i].stored, dtype, plan[i].shape,
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
