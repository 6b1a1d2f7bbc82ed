#include "files/golden.h"

#include <filesystem>

#include "base/error.h"
#include "files/safetensors.h"

namespace cambium {
namespace {

/// What the names of the presets' logits begin with.
constexpr const char* kOfPreset = "logits.";

std::string path_in(const std::string& folder) {
  return (std::filesystem::path(folder) / "golden.safetensors").string();
}

}  // namespace

void write_golden(const std::string& folder, const Golden& golden) {
  const auto length = static_cast<int64_t>(golden.tokens.size());
  std::vector<TensorSource> sources = {
      TensorSource::from_memory("tokens", StoredType::kI64, {length}, golden.tokens.data())};
  const auto add = [&](const std::string& name, const std::vector<float>& logits) {
    CAMBIUM_CHECK(static_cast<int64_t>(logits.size()) == length * golden.vocabulary, "{}", name);
    sources.push_back(TensorSource::from_memory(name, StoredType::kF32, {length, golden.vocabulary},
                                                logits.data()));
  };
  add("logits", golden.logits);
  for (const auto& [name, logits] : golden.presets) {
    add(kOfPreset + name, logits);
  }
  write_safetensors(path_in(folder), sources);
}

std::optional<Golden> read_golden(const std::string& folder) {
  const std::string path = path_in(folder);
  if (!std::filesystem::exists(path)) {
    return std::nullopt;
  }
  const SafeTensors file = SafeTensors::open(path);
  const TensorEntry& tokens = file.at("tokens");
  expect(tokens.dtype == StoredType::kI64 && tokens.shape.size() == 1,
         "{}: tokens: expected I64 (T), got {} {}", path, stored_type_name(tokens.dtype),
         shape_text(tokens.shape));
  const auto read_logits = [&](const TensorEntry& logits) {
    expect(logits.dtype == StoredType::kF32 && logits.shape.size() == 2 &&
               logits.shape[0] == tokens.shape[0] &&
               logits.shape[1] == file.at("logits").shape.back(),
           "{}: {}: expected F32 ({}, vocabulary), got {} {}", path, logits.name, tokens.shape[0],
           stored_type_name(logits.dtype), shape_text(logits.shape));
    return as_f32(logits);
  };
  Golden golden{as_i64(tokens), read_logits(file.at("logits")), file.at("logits").shape[1]};
  for (const TensorEntry& entry : file.tensors()) {
    if (entry.name.starts_with(kOfPreset)) {
      golden.presets[entry.name.substr(std::string(kOfPreset).size())] = read_logits(entry);
    }
  }
  for (const int64_t token : golden.tokens) {
    expect(token >= 0 && token < golden.vocabulary, "{}: token {} is outside the vocabulary of {}",
           path, token, golden.vocabulary);
  }
  return golden;
}

}  // namespace cambium
