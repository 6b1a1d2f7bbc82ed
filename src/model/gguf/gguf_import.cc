#include "model/gguf/gguf_import.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <map>
#include <optional>
#include <utility>

#include "base/error.h"
#include "base/file.h"
#include "base/json.h"
#include "base/signals.h"
#include "files/gguf.h"
#include "files/safetensors.h"
#include "model/gguf/gguf_config.h"
#include "model/gguf/gguf_tensors.h"
#include "model/gguf/gguf_tokenizer.h"
#include "model/stored_model.h"

namespace cambium {
namespace {

/// Axes of one say nothing.
std::vector<int64_t> without_ones(std::vector<int64_t> shape) {
  shape.erase(std::remove(shape.begin(), shape.end(), 1), shape.end());
  return shape;
}

/// A GGUF file as the parameters of its model.
class GgufParameters {
 public:
  GgufParameters(const Gguf& gguf, const GgufModel& model)
      : gguf_(gguf),
        row_(*model.row),
        layers_(std::ssize(model.spec.layers)),
        predicting_(gguf.integer(row_.name + ".nextn_predict_layers").value_or(0)) {
    Model shapes(model.spec);
    ParametersByName parameters;
    shapes.visit([&](const std::string& name, Parameter& p) { parameters[name] = &p; });
    shapes.visit([&](const std::string& name, Parameter& p) {
      names_.push_back(name);
      forms_[name] = gguf_form(row_, model.spec, parameters, name);
      shapes_[name] = p.shape;
    });
  }

  /// Error unless every tensor that is wanted is there with its shape, and nothing is left over.
  void expect_fits() const {
    for (const GgufNumbers& numbers : row_.numbers) {
      for (int64_t layer = 0; numbers.ours.empty() && layer < layers_; ++layer) {
        const float value = number_of(numbers.key, layer);
        expect(std::abs(value - numbers.fixed) <= 0.01 * std::abs(numbers.fixed),  // it may be bf16
               "{}: '{}' has {}, expected {}, as in every published model", gguf_.path(),
               numbers.key, value, numbers.fixed);
      }
    }
    std::map<std::string_view, const GgufTensor*> left;
    for (const GgufTensor& tensor : gguf_.tensors()) {
      left.emplace(tensor.name, &tensor);
    }
    // These became part of the configuration.
    for (const char* name :
         {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}) {
      left.erase(name);
    }
    for (const std::string& ours : names_) {
      for (const StoredPiece& piece : forms_.at(ours)) {
        if (gguf_number(piece.tensor)) {
          numbers_of(piece.tensor);
          continue;
        }
        const GgufTensor* tensor = gguf_.find(piece.tensor);
        expect(tensor != nullptr, "{}: the tensor '{}' is missing", gguf_.path(), piece.tensor);
        expect(without_ones(tensor->shape) == without_ones(piece.shape),
               "{}: tensor '{}' has the shape {}, expected {}", gguf_.path(), piece.tensor,
               shape_text(tensor->shape), shape_text(piece.shape));
        left.erase(piece.tensor);
      }
    }
    std::erase_if(left, [&](const auto& entry) {
      std::vector<std::string_view> captures;
      int64_t layer = 0;
      return match_pattern("blk.*.*", entry.first, &captures) &&
             std::from_chars(captures[0].data(), captures[0].data() + captures[0].size(), layer)
                     .ec == std::errc() &&
             layer >= layers_ && layer < layers_ + predicting_;
    });
    expect(left.empty(), "{}: the tensor '{}' (and {} more) has no place in a {} model",
           gguf_.path(), left.empty() ? "" : left.begin()->first,
           left.empty() ? 0 : left.size() - 1, row_.name);
  }

  void read(const std::string& ours, const Tensor& to) const {
    std::vector<std::vector<float>> values;
    StoredParameter stored{{}, shapes_.at(ours)};
    for (const StoredPiece& piece : forms_.at(ours)) {
      const std::vector<float>& numbers = values.emplace_back(numbers_of(piece.tensor));
      TensorEntry entry;
      entry.name = piece.tensor;
      entry.dtype = StoredType::kF32;
      entry.shape = piece.shape;
      entry.data = reinterpret_cast<const std::byte*>(numbers.data());
      entry.size = numbers.size() * sizeof(float);
      PackedTensor plain;
      plain.values = entry;
      plain.shape = piece.shape;
      stored.sources.push_back({piece, plain});
    }
    read_into(to, stored);
  }

 private:
  /// One number of a list that a key holds.
  float number_of(const std::string& key, int64_t layer) const {
    const auto list = gguf_.numbers(key);
    expect(list.has_value(), "{}: the key '{}' is missing", gguf_.path(), key);
    expect(std::ssize(*list) == layers_, "{}: '{}' has {} entries, expected {}", gguf_.path(), key,
           list->size(), layers_);
    return static_cast<float>((*list)[static_cast<size_t>(layer)]);
  }

  std::vector<float> numbers_of(const std::string& name) const {
    if (const auto number = gguf_number(name)) {
      return {number_of(number->first, number->second)};
    }
    const GgufTensor& tensor = *gguf_.find(name);
    std::vector<float> values(static_cast<size_t>(tensor.rows() * tensor.columns()));
    dequantise_rows(tensor, 0, tensor.rows(), values);
    expect(std::all_of(values.begin(), values.end(), [](float v) { return std::isfinite(v); }),
           "{}: tensor '{}' holds values that are not finite: the file is damaged", gguf_.path(),
           name);
    try {
      from_gguf_values(row_, name, values);
    } catch (const Error& error) {
      fail("{}: {}", gguf_.path(), error.what());
    }
    gguf_.release(tensor);
    return values;
  }

  const Gguf& gguf_;
  const GgufArchitecture& row_;
  int64_t layers_;
  int64_t predicting_;              // layers after them, which predict a token more
  std::vector<std::string> names_;  // in the model's order
  std::map<std::string, StoredForm> forms_;
  std::map<std::string, std::vector<int64_t>> shapes_;
};

/// config.json of the spec, with the type of its weights.
std::string config_text(const ModelSpec& spec, bool float32) {
  GgufJson config =
      parse_json<GgufJson>(find_family(spec.family).write_config(spec), "config.json");
  config["torch_dtype"] = float32 ? "float32" : "bfloat16";
  return config.dump(2) + "\n";
}

}  // namespace

GgufImportSummary import_gguf(const std::string& gguf_path, const std::string& folder,
                              const GgufImportOptions& options) {
  const Gguf gguf(gguf_path);
  const GgufModel read = read_gguf_model(gguf);
  const GgufParameters parameters(gguf, read);
  parameters.expect_fits();
  GgufImportSummary summary;
  std::optional<GgufTokenizerFiles> tokenizer;
  const std::string kind = gguf.text("tokenizer.ggml.model").value_or("");
  if (kind == "none" || kind == "no_vocab") {
    summary.notes.emplace_back("The file has no tokenizer.");
  } else {
    tokenizer = tokenizer_from_gguf(gguf, read.spec.vocab);
    summary.notes = std::move(tokenizer->notes);
    summary.warnings = std::move(tokenizer->warnings);
  }
  Model model(read.spec);
  summary.layers = std::ssize(read.spec.layers);
  summary.parameters = model.parameter_count();
  const auto narrow = [&](const Parameter& p) { return !options.float32 && !p.keep_fp32; };
  TensorLayout layout;
  layout.read = [&](const std::string& ours, const Tensor& to) {
    stop_point();
    parameters.read(ours, to);
  };
  std::vector<TensorSource> sources = tensor_sources(model, narrow, layout);
  for (const TensorSource& source : sources) {
    uint64_t count = 1;
    for (const int64_t size : source.shape) {
      count *= static_cast<uint64_t>(size);
    }
    summary.bytes += count * stored_type_size(source.dtype);
  }

  AtomicDirectory out(folder, options.replace ? AtomicDirectory::Existing::kReplace
                                              : AtomicDirectory::Existing::kRefuse);
  SafeTensorsOptions save{.always_index = true};
  save.max_shard_bytes = options.max_shard_bytes;
  if (options.progress) {
    save.progress = [&](uint64_t done) { options.progress(done, summary.bytes); };
  }
  const auto at = [&](const char* name) { return out.path() + "/" + name; };
  const FileChecksums checksums =
      write_safetensors(at("model.safetensors"), std::move(sources), save);
  write_file_atomically(at("config.json"), config_text(read.spec, options.float32));
  if (tokenizer) {
    write_file_atomically(at("tokenizer.json"), tokenizer->tokenizer_json);
    write_file_atomically(at("tokenizer_config.json"), tokenizer->tokenizer_config_json);
    write_file_atomically(at("generation_config.json"), tokenizer->generation_config_json);
  }
  if (options.finish) {
    options.finish(out.path());
  }
  write_checksums(out.path(), checksums);
  out.commit();
  return summary;
}

}  // namespace cambium
