#include "files/gguf.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <limits>
#include <unordered_set>
#include <utility>

#include "base/error.h"

namespace cambium {
namespace {

constexpr std::array kBlocks{
    GgufBlock{GgufType::kF32, "F32", 1, 4},
    GgufBlock{GgufType::kF16, "F16", 1, 2},
    GgufBlock{GgufType::kBF16, "BF16", 1, 2},
    GgufBlock{GgufType::kQ4_0, "Q4_0", 32, 18},
    GgufBlock{GgufType::kQ4_1, "Q4_1", 32, 20},
    GgufBlock{GgufType::kQ5_0, "Q5_0", 32, 22},
    GgufBlock{GgufType::kQ5_1, "Q5_1", 32, 24},
    GgufBlock{GgufType::kQ8_0, "Q8_0", 32, 34},
    GgufBlock{GgufType::kQ4_K, "Q4_K", 256, 144},
    GgufBlock{GgufType::kQ5_K, "Q5_K", 256, 176},
    GgufBlock{GgufType::kQ6_K, "Q6_K", 256, 210},
    GgufBlock{GgufType::kQ2_K, "Q2_K", 256, 84},
    GgufBlock{GgufType::kQ3_K, "Q3_K", 256, 110},
    GgufBlock{GgufType::kQ8_K, "Q8_K", 256, 292},
    GgufBlock{GgufType::kIQ4_NL, "IQ4_NL", 32, 18},
    GgufBlock{GgufType::kIQ4_XS, "IQ4_XS", 256, 136},
    GgufBlock{GgufType::kMXFP4, "MXFP4", 32, 17},
};

/// Names of types that exist but are not read, for messages.
constexpr std::pair<uint32_t, std::string_view> kOtherTypes[] = {
    {9, "Q8_1"},   {16, "IQ2_XXS"}, {17, "IQ2_XS"}, {18, "IQ3_XXS"}, {19, "IQ1_S"},
    {21, "IQ3_S"}, {22, "IQ2_S"},   {24, "I8"},     {25, "I16"},     {26, "I32"},
    {27, "I64"},   {28, "F64"},     {29, "IQ1_M"},  {34, "TQ1_0"},   {35, "TQ2_0"},
};

const GgufBlock* find_block(uint32_t type) {
  for (const GgufBlock& block : kBlocks) {
    if (static_cast<uint32_t>(block.type) == type) {
      return &block;
    }
  }
  return nullptr;
}

std::string type_name(uint32_t type) {
  for (const auto& [number, name] : kOtherTypes) {
    if (number == type) {
      return std::string(name);
    }
  }
  return fmt::format("number {}", type);
}

/// The file's numbers for metadata types.
enum class ValueType : uint32_t {
  kU8,
  kI8,
  kU16,
  kI16,
  kU32,
  kI32,
  kF32,
  kBool,
  kString,
  kArray,
  kU64,
  kI64,
  kF64
};

constexpr int kMaxNesting = 4;
constexpr uint32_t kMaxAxes = 4;

/// Fewest bytes that a value of this type takes in the file; 0 for an unknown type.
size_t smallest_size(ValueType type) {
  switch (type) {
    case ValueType::kU8:
    case ValueType::kI8:
    case ValueType::kBool:
      return 1;
    case ValueType::kU16:
    case ValueType::kI16:
      return 2;
    case ValueType::kU32:
    case ValueType::kI32:
    case ValueType::kF32:
      return 4;
    case ValueType::kU64:
    case ValueType::kI64:
    case ValueType::kF64:
    case ValueType::kString:
      return 8;
    case ValueType::kArray:
      return 12;
  }
  return 0;
}

const char* kind_name(const GgufValue& value) {
  constexpr const char* kNames[] = {"a flag",   "an integer", "an integer",
                                    "a number", "a text",     "a list"};
  return kNames[value.value.index()];
}

std::optional<int64_t> as_integer(const GgufValue& value) {
  if (const auto* i = std::get_if<int64_t>(&value.value)) {
    return *i;
  }
  if (const auto* u = std::get_if<uint64_t>(&value.value)) {
    if (std::in_range<int64_t>(*u)) {
      return static_cast<int64_t>(*u);
    }
  }
  return std::nullopt;
}

std::optional<double> as_number(const GgufValue& value) {
  const auto* number = std::get_if<double>(&value.value);
  if (number == nullptr || !std::isfinite(*number)) {
    return std::nullopt;
  }
  return *number;
}

std::optional<std::string> as_text(const GgufValue& value) {
  if (const auto* text = std::get_if<std::string>(&value.value)) {
    return *text;
  }
  return std::nullopt;
}

/// Looks a key up and turns its value into T by `convert`.
template <class T, class Convert>
std::optional<T> look_up(const GgufMetadata& metadata, const std::string& path,
                         std::string_view key, const char* wanted, Convert convert) {
  const auto found = metadata.find(key);
  if (found == metadata.end()) {
    return std::nullopt;
  }
  std::optional<T> result = convert(found->second);
  expect(result.has_value(), "{}: '{}' should be {}, but is {}", path, key, wanted,
         kind_name(found->second));
  return result;
}

template <class T, class Convert>
std::optional<T> look_up(const Gguf& gguf, std::string_view key, const char* wanted,
                         Convert convert) {
  return look_up<T>(gguf.metadata(), gguf.path(), key, wanted, convert);
}

std::optional<int64_t> integer_of(const GgufMetadata& metadata, std::string_view key,
                                  const std::string& path) {
  return look_up<int64_t>(metadata, path, key, "an integer", as_integer);
}

template <class T, class Convert>
std::optional<std::vector<T>> look_up_list(const Gguf& gguf, std::string_view key,
                                           const char* wanted, Convert convert) {
  return look_up<std::vector<T>>(gguf, key, wanted,
                                 [&](const GgufValue& value) -> std::optional<std::vector<T>> {
                                   const auto* list = std::get_if<GgufValue::List>(&value.value);
                                   if (list == nullptr) {
                                     return std::nullopt;
                                   }
                                   std::vector<T> out;
                                   out.reserve(list->size());
                                   for (const GgufValue& item : *list) {
                                     std::optional<T> one = convert(item);
                                     if (!one) {
                                       return std::nullopt;
                                     }
                                     out.push_back(std::move(*one));
                                   }
                                   return out;
                                 });
}

}  // namespace

const GgufBlock& gguf_block(GgufType type) {
  const GgufBlock* block = find_block(static_cast<uint32_t>(type));
  CAMBIUM_CHECK(block != nullptr);
  return *block;
}

int64_t GgufTensor::rows() const {
  int64_t rows = 1;
  for (size_t axis = 0; axis + 1 < shape.size(); ++axis) {
    rows *= shape[axis];
  }
  return rows;
}

/// A cursor over the mapped bytes that never passes their end.
class Gguf::Reader {
 public:
  explicit Reader(const MappedFile& file) : file_(file) {}

  size_t position() const { return position_; }
  size_t left() const { return file_.bytes().size() - position_; }

  template <class T>
  T take(std::string_view what) {
    need(sizeof(T), what);
    T value;
    std::memcpy(&value, file_.bytes().data() + position_, sizeof(T));
    position_ += sizeof(T);
    return value;
  }

  std::string text(std::string_view what) {
    const auto length = take<uint64_t>(what);
    need(length, what);
    const char* begin = reinterpret_cast<const char*>(file_.bytes().data()) + position_;
    position_ += length;
    return {begin, static_cast<size_t>(length)};
  }

  /// A count of things of at least `each` bytes, all of which must still fit into the file.
  uint64_t count(uint64_t count, size_t each, std::string_view what) const {
    expect(count <= left() / each,
           "{}: {} claims {} entries, but only {} bytes of the file are left: it is damaged or cut "
           "short",
           file_.path(), what, count, left());
    return count;
  }

  GgufValue value(ValueType type, std::string_view key, int nesting) {
    switch (type) {
      case ValueType::kU8:
        return {uint64_t{take<uint8_t>(key)}};
      case ValueType::kI8:
        return {int64_t{take<int8_t>(key)}};
      case ValueType::kU16:
        return {uint64_t{take<uint16_t>(key)}};
      case ValueType::kI16:
        return {int64_t{take<int16_t>(key)}};
      case ValueType::kU32:
        return {uint64_t{take<uint32_t>(key)}};
      case ValueType::kI32:
        return {int64_t{take<int32_t>(key)}};
      case ValueType::kU64:
        return {take<uint64_t>(key)};
      case ValueType::kI64:
        return {take<int64_t>(key)};
      case ValueType::kF32:
        return {double{take<float>(key)}};
      case ValueType::kF64:
        return {take<double>(key)};
      case ValueType::kBool:
        return {take<uint8_t>(key) != 0};
      case ValueType::kString:
        return {text(key)};
      case ValueType::kArray:
        return {list(key, nesting)};
    }
    fail("{}: '{}' has a value of unknown type {}", file_.path(), key, static_cast<uint32_t>(type));
  }

 private:
  void need(uint64_t bytes, std::string_view what) const {
    expect(
        bytes <= left(),
        "{}: the file ends within {}: it needs {} bytes, {} are left; it is damaged or cut short",
        file_.path(), what, bytes, left());
  }

  GgufValue::List list(std::string_view key, int nesting) {
    expect(nesting < kMaxNesting, "{}: '{}' nests lists more than {} deep", file_.path(), key,
           kMaxNesting);
    const auto type = static_cast<ValueType>(take<uint32_t>(key));
    const size_t smallest = smallest_size(type);
    expect(smallest > 0, "{}: '{}' is a list of unknown type {}", file_.path(), key,
           static_cast<uint32_t>(type));
    const uint64_t length = count(take<uint64_t>(key), smallest, key);
    GgufValue::List items;
    items.reserve(length);
    for (uint64_t i = 0; i < length; ++i) {
      items.push_back(value(type, key, nesting + 1));
    }
    return items;
  }

  const MappedFile& file_;
  size_t position_ = 0;
};

Gguf::Gguf(std::string name, GgufMetadata metadata, std::vector<GgufTensor> tensors)
    : path_(std::move(name)), metadata_(std::move(metadata)), tensors_(std::move(tensors)) {}

Gguf::Gguf(const std::string& path) : path_(path) {
  files_.emplace_back(path);
  metadata_ = read_part(0);
  join_parts();
}

// Parts carry split.no, split.count and split.tensors.count; the first holds the model's metadata.
void Gguf::join_parts() {
  const std::string first = path();
  const int64_t count = integer("split.count").value_or(0);
  if (count == 0) {
    return;
  }
  expect(count > 0 && count <= 99999, "{}: 'split.count' is {}, expected 1 to 99999", first, count);
  const int64_t number = integer("split.no").value_or(0);
  const std::string ending = fmt::format("-{:05}-of-{:05}.gguf", number + 1, count);
  expect(
      first.ends_with(ending),
      "{}: this is part {} of {} of a split model, whose name should end in '{}': the other parts "
      "are found by their names",
      first, number + 1, count, ending);
  const std::string stem = first.substr(0, first.size() - ending.size());
  const auto name_of = [&](int64_t part) {
    return fmt::format("{}-{:05}-of-{:05}.gguf", stem, part + 1, count);
  };
  expect(number == 0, "{}: this is part {} of {} of a split model; give the first part, {}", first,
         number + 1, count, name_of(0));
  for (int64_t part = 1; part < count; ++part) {
    const std::string name = name_of(part);
    expect(std::filesystem::exists(name), "{}: part {} of {} of this split model is missing: {}",
           first, part + 1, count, name);
    files_.emplace_back(name);
    const GgufMetadata metadata = read_part(files_.size() - 1);
    const auto says = [&](const char* key, int64_t expected) {
      const auto value = integer_of(metadata, key, name);
      expect(value == expected, "{}: '{}' is {}, but {} makes it {}", name, key,
             value ? std::to_string(*value) : "missing", first, expected);
    };
    says("split.no", part);
    says("split.count", count);
  }
  const int64_t tensors = integer("split.tensors.count").value_or(-1);
  expect(tensors == static_cast<int64_t>(tensors_.size()),
         "{}: 'split.tensors.count' is {}, but the {} parts hold {} tensors", first, tensors, count,
         tensors_.size());
}

GgufMetadata Gguf::read_part(size_t part) {
  GgufMetadata metadata;
  const std::string& path = files_[part].path();
  Reader reader(files_[part]);
  const auto magic = reader.take<std::array<char, 4>>("its first bytes");
  expect(std::string_view(magic.data(), 4) == "GGUF",
         "{}: this is no GGUF file (it does not begin with 'GGUF')", path);
  const auto version = reader.take<uint32_t>("its version");
  expect(version != 0x02000000U && version != 0x03000000U,
         "{}: this is a big-endian GGUF file; only little-endian ones can be read", path);
  expect(version == 2 || version == 3, "{}: GGUF version {} cannot be read; expected 2 or 3", path,
         version);
  version_ = version;
  // A tensor's row: name length, axes, type, offset. A key's row: length, type, a byte of value.
  const auto tensor_count =
      reader.count(reader.take<uint64_t>("its tensor count"), 24, "the tensor count");
  const auto key_count = reader.count(reader.take<uint64_t>("its key count"), 13, "the key count");
  for (uint64_t i = 0; i < key_count; ++i) {
    const std::string key = reader.text(fmt::format("the name of metadata key {}", i));
    const auto type = static_cast<ValueType>(reader.take<uint32_t>(key));
    GgufValue value = reader.value(type, key, 0);
    expect(metadata.emplace(key, std::move(value)).second, "{}: the key '{}' stands twice", path,
           key);
  }
  const int64_t alignment = integer_of(metadata, "general.alignment", path).value_or(32);
  read_tensors(reader, tensor_count, part, alignment);
  return metadata;
}

void Gguf::read_tensors(Reader& reader, uint64_t count, size_t part, int64_t alignment) {
  const MappedFile& file = files_[part];
  const std::string& path = file.path();
  const size_t before_this = tensors_.size();
  std::unordered_set<std::string> names;
  for (const GgufTensor& tensor : tensors_) {
    names.insert(tensor.name);
  }
  std::vector<uint64_t> offsets;
  for (uint64_t i = 0; i < count; ++i) {
    GgufTensor tensor;
    tensor.part = part;
    tensor.name = reader.text(fmt::format("the name of tensor {}", i));
    const std::string& name = tensor.name;
    expect(names.insert(name).second, "{}: the tensor '{}' stands twice", path, name);
    const auto axes = reader.take<uint32_t>(name);
    expect(axes <= kMaxAxes, "{}: tensor '{}' has {} axes, expected at most {}", path, name, axes,
           kMaxAxes);
    uint64_t elements = 1;
    for (uint32_t axis = 0; axis < axes; ++axis) {
      const auto size = reader.take<uint64_t>(name);
      expect(size > 0, "{}: tensor '{}' has an axis of size 0", path, name);
      expect(!__builtin_mul_overflow(elements, size, &elements) && elements <= 1ULL << 48,
             "{}: tensor '{}' claims more elements than a file can hold", path, name);
      tensor.shape.insert(tensor.shape.begin(), static_cast<int64_t>(size));
    }
    const auto type = reader.take<uint32_t>(name);
    const GgufBlock* block = find_block(type);
    expect(block != nullptr,
           "{}: tensor '{}' is stored as {}, which cannot be read; expected F32, F16, BF16, Q8_0, "
           "Q4_0, Q4_1, Q5_0, Q5_1, Q2_K to Q6_K, Q8_K, IQ4_NL, IQ4_XS or MXFP4",
           path, name, type_name(type));
    tensor.type = block->type;
    expect(tensor.columns() % block->elements == 0,
           "{}: tensor '{}': rows of {} elements cannot be cut into {} blocks of {}", path, name,
           tensor.columns(), block->name, block->elements);
    tensor.size = elements / static_cast<uint64_t>(block->elements) * block->bytes;
    offsets.push_back(reader.take<uint64_t>(name));
    tensors_.push_back(std::move(tensor));
  }

  expect(alignment > 0 && alignment <= 1 << 20 &&
             std::has_single_bit(static_cast<uint64_t>(alignment)),
         "{}: 'general.alignment' is {}, expected a power of two", path, alignment);
  const auto step = static_cast<uint64_t>(alignment);
  const uint64_t begin = (reader.position() + step - 1) / step * step;
  const uint64_t whole = file.bytes().size();
  std::vector<std::pair<uint64_t, size_t>> order;  // offset, index
  for (size_t i = 0; i < offsets.size(); ++i) {
    GgufTensor& tensor = tensors_[before_this + i];
    expect(offsets[i] % step == 0, "{}: tensor '{}' begins at {}, which is not a multiple of {}",
           path, tensor.name, offsets[i], alignment);
    expect(
        begin <= whole && offsets[i] <= whole - begin && tensor.size <= whole - begin - offsets[i],
        "{}: tensor '{}' needs {} bytes from {}, but the file has {}: it is damaged or cut short",
        path, tensor.name, tensor.size, begin + offsets[i], whole);
    tensor.data = file.bytes().data() + begin + offsets[i];
    if (tensor.size > 0) {
      order.emplace_back(offsets[i], before_this + i);
    }
  }
  std::sort(order.begin(), order.end());
  for (size_t i = 1; i < order.size(); ++i) {
    const GgufTensor& before = tensors_[order[i - 1].second];
    const GgufTensor& after = tensors_[order[i].second];
    expect(before.data + before.size <= after.data, "{}: tensor '{}' overlaps tensor '{}'", path,
           after.name, before.name);
  }
}

const GgufTensor* Gguf::find(std::string_view name) const {
  for (const GgufTensor& tensor : tensors_) {
    if (tensor.name == name) {
      return &tensor;
    }
  }
  return nullptr;
}

std::optional<bool> Gguf::flag(std::string_view key) const {
  return look_up<bool>(*this, key, "a flag", [](const GgufValue& value) -> std::optional<bool> {
    if (const auto* flag = std::get_if<bool>(&value.value)) {
      return *flag;
    }
    return std::nullopt;
  });
}

std::optional<int64_t> Gguf::integer(std::string_view key) const {
  return look_up<int64_t>(*this, key, "an integer", as_integer);
}

std::optional<double> Gguf::number(std::string_view key) const {
  return look_up<double>(*this, key, "a finite number", as_number);
}

std::optional<std::vector<double>> Gguf::numbers(std::string_view key) const {
  return look_up_list<double>(*this, key, "a list of finite numbers", as_number);
}

std::optional<std::string> Gguf::text(std::string_view key) const {
  return look_up<std::string>(*this, key, "a text", as_text);
}

std::optional<std::vector<std::string>> Gguf::texts(std::string_view key) const {
  return look_up_list<std::string>(*this, key, "a list of texts", as_text);
}

std::optional<std::vector<int64_t>> Gguf::integers(std::string_view key) const {
  return look_up_list<int64_t>(*this, key, "a list of integers", as_integer);
}

void Gguf::release(const GgufTensor& tensor) const {
  const MappedFile& file = files_[tensor.part];
  file.release(static_cast<size_t>(tensor.data - file.bytes().data()), tensor.size);
}

}  // namespace cambium
