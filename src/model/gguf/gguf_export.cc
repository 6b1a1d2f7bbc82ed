#include "model/gguf/gguf_export.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <set>

#include "base/error.h"
#include "base/signals.h"
#include "files/gguf_writer.h"
#include "files/safetensors.h"
#include "model/gguf/gguf_config.h"
#include "model/gguf/gguf_tensors.h"
#include "model/gguf/gguf_tokenizer_export.h"
#include "model/stored_model.h"

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

GgufSource vector_source(const std::string& name, const std::vector<float>& values) {
  return {name, GgufType::kF32, {std::ssize(values)}, [values](const PutBytes& put) {
            put(std::as_bytes(std::span(values)));
          }};
}

std::vector<float> values_of(const TensorSource& source) {
  std::vector<float> values;
  source.write([&](std::span<const std::byte> bytes) {
    const size_t before = values.size();
    values.resize(before + bytes.size() / sizeof(float));
    std::memcpy(values.data() + before, bytes.data(), bytes.size());
  });
  return values;
}

/// The lists of keys that hold parameters.
std::map<std::string, GgufValue> lists_of(const GgufArchitecture& row,
                                          const std::vector<TensorSource>& sources,
                                          int64_t layers) {
  std::map<std::string, std::vector<double>> numbers;
  for (const GgufNumbers& each : row.numbers) {
    numbers[each.key].assign(static_cast<size_t>(layers), each.fixed);
  }
  for (const TensorSource& source : sources) {
    if (const auto place = gguf_number(source.name)) {
      numbers.at(place->first).at(static_cast<size_t>(place->second)) = values_of(source).front();
    }
  }
  std::map<std::string, GgufValue> lists;
  for (const auto& [key, values] : numbers) {
    GgufValue::List list;
    for (const double value : values) {
      list.emplace_back().value = value;
    }
    lists[key].value = std::move(list);
  }
  return lists;
}

/// What llama.cpp wants in f32: all that is no matrix, and the routers.
bool is_plain(const std::string& tensor, const Parameter& p) {
  return !p.is_matrix() || tensor.find("ffn_gate_inp") != std::string::npos;
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
  const StoredModel stored(folder, "");
  const GgufHeading heading = write_gguf_heading(stored.whole(), where);
  const GgufArchitecture& row = *heading.row;
  const SafeTensors weights = SafeTensors::open(where);
  stored.expect_fits(weights);

  Model model(heading.spec);
  ParametersByName parameters;
  model.visit([&](const std::string& name, Parameter& p) { parameters[name] = &p; });
  std::set<std::string> plain;
  TensorLayout layout;
  layout.form = [&](const std::string& ours, const ParametersByName& /*same*/) {
    StoredForm form = gguf_form(row, heading.spec, parameters, ours);
    for (const StoredPiece& piece : form) {
      if (is_plain(piece.tensor, *parameters.at(ours))) {
        plain.insert(piece.tensor);
      }
    }
    return form;
  };
  layout.read = [&](const std::string& ours, const Tensor& to) {
    stop_point();
    const StoredParameter from = *stored.find(weights, ours);
    read_into(to, from);
    multiply_rows(heading.factors, ours, *parameters.at(ours),
                  std::span(to.ptr<float>(), static_cast<size_t>(to.numel())));
    for (const StoredParameter::Source& source : from.sources) {
      weights.release(source.entry());
    }
  };
  const std::vector<TensorSource> sources = tensor_sources(
      model, [](const Parameter& /*p*/) { return false; }, layout);
  std::vector<GgufTensor> shapes;
  for (const TensorSource& source : sources) {
    if (!gguf_number(source.name)) {
      shapes.push_back({source.name, GgufType::kF32, source.shape});
    }
  }
  expect_gguf_says_all(heading, std::move(shapes), where);

  GgufKeys keys;
  for (const auto& [key, value] : heading.head.metadata) {
    keys.value(key, value);
  }
  keys.u32("general.file_type", file_type(options.matrices));
  keys.u32("general.quantization_version", 2);
  for (const auto& [key, list] : lists_of(row, sources, std::ssize(heading.spec.layers))) {
    keys.value(key, list);
  }
  put_tokenizer(keys, folder, stored.whole(), options.pre);
  std::vector<GgufSource> tensors;
  for (const auto& [name, values] : heading.head.tensors) {
    tensors.push_back(vector_source(name, values));
  }
  for (const TensorSource& source : sources) {
    if (gguf_number(source.name)) {
      continue;
    }
    const GgufType type =
        plain.contains(source.name) ? GgufType::kF32 : type_of(source.shape, options.matrices);
    tensors.push_back({source.name, type, source.shape, [&, type](const PutBytes& put) {
                         std::vector<float> values = values_of(source);
                         expect(std::all_of(values.begin(), values.end(),
                                            [](float x) { return std::isfinite(x); }),
                                "{}: tensor {} would hold values that are not finite", where,
                                source.name);
                         to_gguf_values(row, source.name, values);
                         const std::string bytes = encode_rows(type, values);
                         put(std::as_bytes(std::span(bytes)));
                       }});
  }
  write_gguf(gguf_path, keys, tensors);
  return std::filesystem::file_size(gguf_path);
}

}  // namespace cambium
