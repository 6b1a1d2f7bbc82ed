#include "files/golden.h"

#include <filesystem>

#include "base/error.h"
#include "files/safetensors.h"

namespace cambium {
namespace {

std::string path_in(const std::string& folder) {
  return (std::filesystem::path(folder) / "golden.safetensors").string();
}

}  // namespace

void write_golden(const std::string& folder, const Golden& golden) {
  const auto length = static_cast<int64_t>(golden.tokens.size());
  CAMBIUM_CHECK(static_cast<int64_t>(golden.logits.size()) == length * golden.vocabulary);
  write_safetensors(
      path_in(folder),
      {TensorSource::from_memory("tokens", StoredType::kI64, {length}, golden.tokens.data()),
       TensorSource::from_memory("logits", StoredType::kF32, {length, golden.vocabulary},
                                 golden.logits.data())});
}

std::optional<Golden> read_golden(const std::string& folder) {
  const std::string path = path_in(folder);
  if (!std::filesystem::exists(path)) {
    return std::nullopt;
  }
  const SafeTensors file = SafeTensors::open(path);
  const TensorEntry& tokens = file.at("tokens");
  const TensorEntry& logits = file.at("logits");
  expect(tokens.dtype == StoredType::kI64 && tokens.shape.size() == 1,
         "{}: tokens: expected I64 (T), got {} {}", path, stored_type_name(tokens.dtype),
         shape_text(tokens.shape));
  expect(logits.dtype == StoredType::kF32 && logits.shape.size() == 2 &&
             logits.shape[0] == tokens.shape[0],
         "{}: logits: expected F32 ({}, vocabulary), got {} {}", path, tokens.shape[0],
         stored_type_name(logits.dtype), shape_text(logits.shape));
  Golden golden{as_i64(tokens), as_f32(logits), logits.shape[1]};
  for (const int64_t token : golden.tokens) {
    expect(token >= 0 && token < golden.vocabulary, "{}: token {} is outside the vocabulary of {}",
           path, token, golden.vocabulary);
  }
  return golden;
}

}  // namespace cambium
