// Writing GGUF, version 3 (files/gguf.h reads it).
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "files/gguf.h"
#include "files/safetensors.h"

namespace cambium {

/// Metadata as the file's bytes.
class GgufKeys {
 public:
  template <class T>
  static std::string bytes_of(const T& value) {
    static_assert(std::is_trivially_copyable_v<T>);
    std::string out(sizeof(T), '\0');
    std::memcpy(out.data(), &value, sizeof(T));
    return out;
  }
  static std::string text_bytes(std::string_view text) {
    return bytes_of<uint64_t>(text.size()) + std::string(text);
  }

  /// A key with a value of any type number, already in bytes.
  void raw(std::string_view key, uint32_t type, std::string_view value) {
    bytes_ += text_bytes(key) + bytes_of(type) + std::string(value);
    ++count_;
  }
  void u32(std::string_view key, uint32_t value) { raw(key, 4, bytes_of(value)); }
  void f32(std::string_view key, float value) { raw(key, 6, bytes_of(value)); }
  void flag(std::string_view key, bool value) {
    raw(key, 7, value ? "\x01" : std::string(1, '\0'));
  }
  void text(std::string_view key, std::string_view value) { raw(key, 8, text_bytes(value)); }
  void texts(std::string_view key, const std::vector<std::string>& values) {
    std::string bytes = bytes_of<uint32_t>(8) + bytes_of<uint64_t>(values.size());
    for (const std::string& value : values) {
      bytes += text_bytes(value);
    }
    raw(key, 9, bytes);
  }
  void i32s(std::string_view key, const std::vector<int32_t>& values) {
    std::string bytes = bytes_of<uint32_t>(5) + bytes_of<uint64_t>(values.size());
    for (const int32_t value : values) {
      bytes += bytes_of(value);
    }
    raw(key, 9, bytes);
  }

  /// As the type of its kind: u32, i32, f32, a flag, a text, or a list of one of them.
  void value(std::string_view key, const GgufValue& value);

  const std::string& bytes() const { return bytes_; }
  int64_t count() const { return count_; }

 private:
  std::string bytes_;
  int64_t count_ = 0;
};

/// A tensor to write: `write` is called once and hands over all its bytes, in pieces of any size.
struct GgufSource {
  std::string name;
  GgufType type = GgufType::kF32;
  std::vector<int64_t> shape;  ///< outermost first
  std::function<void(const PutBytes&)> write;
};

/// The file appears under its name when it is whole.
void write_gguf(const std::string& path, const GgufKeys& keys,
                const std::vector<GgufSource>& tensors);

/// Whether `encode_rows` can write rows of so many columns in this type: F32, F16, BF16, and Q8_0
/// where blocks of 32 fill a row.
bool can_encode(GgufType type, int64_t columns);
/// The bytes of whole rows. Q8_0 as llama.cpp rounds: d = largest / 127 in f16, q = round(x / d).
std::string encode_rows(GgufType type, std::span<const float> values);

}  // namespace cambium
