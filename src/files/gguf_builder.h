// For tests: makes GGUF files, right ones and wrong ones.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "files/gguf_writer.h"

namespace cambium {

class GgufBuilder : public GgufKeys {
 public:
  uint32_t version = 3;
  uint64_t alignment = 32;  ///< of what is written; the key general.alignment is the test's
  int64_t extra_tensors = 0;
  int64_t extra_keys = 0;  ///< lies about the counts

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
                      bytes_of(count() + extra_keys) + bytes() + tensors_;
    pad(&out);
    return out + data_;
  }

 private:
  void pad(std::string* text) const {
    text->append((alignment - text->size() % alignment) % alignment, '\0');
  }

  std::string tensors_;
  std::string data_;
  int64_t tensor_count_ = 0;
};

}  // namespace cambium
