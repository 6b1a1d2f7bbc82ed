// Reading GGUF, llama.cpp's file of metadata, tokenizer and quantised tensors, versions 2 and 3.
// The format's definition: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
//
// The file is mapped and trusted in nothing: every length is checked against what is left of it
// before it is used, and a wrong one is an Error that names the file and the key or tensor.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "base/file.h"

namespace cambium {

/// How a tensor's elements are stored, with the file's own numbers.
enum class GgufType : uint32_t {
  kF32 = 0,
  kF16 = 1,
  kQ4_0 = 2,
  kQ4_1 = 3,
  kQ5_0 = 6,
  kQ5_1 = 7,
  kQ8_0 = 8,
  kQ2_K = 10,
  kQ3_K = 11,
  kQ4_K = 12,
  kQ5_K = 13,
  kQ6_K = 14,
  kQ8_K = 15,
  kIQ4_NL = 20,
  kIQ4_XS = 23,
  kBF16 = 30,
  kMXFP4 = 39,
};

struct GgufBlock {
  GgufType type;
  std::string_view name;
  int64_t elements;  ///< per block
  size_t bytes;      ///< per block
};
const GgufBlock& gguf_block(GgufType type);

struct GgufTensor {
  std::string name;
  GgufType type = GgufType::kF32;
  std::vector<int64_t> shape;  ///< outermost first, as everywhere in Cambium (the file: reversed)
  const std::byte* data = nullptr;
  size_t size = 0;  ///< bytes
  size_t part = 0;  ///< which file of a split model holds it

  int64_t columns() const { return shape.empty() ? 1 : shape.back(); }
  int64_t rows() const;
};

/// Rows [first, first + count) of a tensor as fp32; out: (count, columns).
void dequantise_rows(const GgufTensor& tensor, int64_t first, int64_t count, std::span<float> out);

/// A metadata value. Integers of all widths are held as 64 bits, floats as double.
struct GgufValue {
  using List = std::vector<GgufValue>;
  std::variant<bool, uint64_t, int64_t, double, std::string, List> value;
};

using GgufMetadata = std::map<std::string, GgufValue, std::less<>>;

class Gguf {
 public:
  /// Of a model split into NAME-00001-of-0000N.gguf, ..., `path` is the first part: the tensors of
  /// the others, found beside it by their names, join its own.
  explicit Gguf(const std::string& path);
  /// What a file of this name would say: its tensors' data, where they have any, is the caller's.
  Gguf(std::string name, GgufMetadata metadata, std::vector<GgufTensor> tensors);

  const std::string& path() const { return path_; }
  uint32_t version() const { return version_; }
  const std::vector<GgufTensor>& tensors() const { return tensors_; }
  const GgufTensor* find(std::string_view name) const;
  const GgufMetadata& metadata() const { return metadata_; }

  // Metadata by key: nothing when the key is absent, Error when the value has another type.
  std::optional<bool> flag(std::string_view key) const;
  std::optional<int64_t> integer(std::string_view key) const;
  std::optional<double> number(std::string_view key) const;
  std::optional<std::vector<double>> numbers(std::string_view key) const;
  std::optional<std::string> text(std::string_view key) const;
  std::optional<std::vector<std::string>> texts(std::string_view key) const;
  std::optional<std::vector<int64_t>> integers(std::string_view key) const;

  /// Gives the tensor's resident pages back to the system.
  void release(const GgufTensor& tensor) const;

 private:
  class Reader;
  GgufMetadata read_part(size_t part);
  void read_tensors(Reader& reader, uint64_t count, size_t part, int64_t alignment);
  void join_parts();

  std::string path_;
  std::vector<MappedFile> files_;  // more than one of a split model
  uint32_t version_ = 0;
  GgufMetadata metadata_;
  std::vector<GgufTensor> tensors_;
};

}  // namespace cambium
