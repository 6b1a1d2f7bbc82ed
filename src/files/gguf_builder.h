// For tests: makes GGUF files, right ones and wrong ones.
#pragma once

#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

namespace cambium {

class GgufBuilder {
 public:
  uint32_t version = 3;
  uint64_t alignment = 32;  ///< of what is written; the key general.alignment is the test's
  int64_t extra_tensors = 0;
  int64_t extra_keys = 0;  ///< lies about the counts

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
    keys_ += text_bytes(key) + bytes_of(type) + std::string(value);
    ++key_count_;
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

  /// `shape` outermost first; `offset` -1: where the data really is.
  void tensor(std::string_view name, uint32_t type, const std::vector<uint64_t>& shape,
              std::string_view data, int64_t offset = -1) {
    pad(&data_);
    tensors_ += text_bytes(name) + bytes_of(static_cast<uint32_t>(shape.size()));
    for (size_t axis = shape.size(); axis-- > 0;) {
      tensors_ += bytes_of(shape[axis]);
    }
    tensors_ += bytes_of(type);
    tensors_ +=
        bytes_of(offset < 0 ? static_cast<uint64_t>(data_.size()) : static_cast<uint64_t>(offset));
    data_ += data;
    ++tensor_count_;
  }
  void tensor_f32(std::string_view name, const std::vector<uint64_t>& shape,
                  std::span<const float> values) {
    tensor(name, 0, shape,
           {reinterpret_cast<const char*>(values.data()), values.size() * sizeof(float)});
  }

  std::string file() const {
    std::string out = "GGUF" + bytes_of(version) + bytes_of(tensor_count_ + extra_tensors) +
                      bytes_of(key_count_ + extra_keys) + keys_ + tensors_;
    pad(&out);
    return out + data_;
  }

 private:
  void pad(std::string* text) const {
    text->append((alignment - text->size() % alignment) % alignment, '\0');
  }

  std::string keys_;
  std::string tensors_;
  std::string data_;
  int64_t key_count_ = 0;
  int64_t tensor_count_ = 0;
};

}  // namespace cambium
