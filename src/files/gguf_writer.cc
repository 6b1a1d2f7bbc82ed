#include "files/gguf_writer.h"

#include <algorithm>
#include <cmath>

#include "base/error.h"
#include "base/float16.h"

namespace cambium {
namespace {

constexpr uint64_t kAlignment = 32;  // of a tensor's bytes, where no key says otherwise

uint64_t padding(uint64_t size) {
  return (kAlignment - size % kAlignment) % kAlignment;
}

uint64_t bytes_of_tensor(const GgufSource& tensor) {
  int64_t count = 1;
  for (const int64_t size : tensor.shape) {
    count *= size;
  }
  const GgufBlock& block = gguf_block(tensor.type);
  return static_cast<uint64_t>(count / block.elements) * block.bytes;
}

template <class Round>
std::string narrowed(std::span<const float> values, Round round) {
  std::string bytes(values.size() * sizeof(uint16_t), '\0');
  for (size_t i = 0; i < values.size(); ++i) {
    const uint16_t bits = round(values[i]);
    std::memcpy(bytes.data() + i * sizeof(bits), &bits, sizeof(bits));
  }
  return bytes;
}

std::string as_q8_0(std::span<const float> values) {
  const GgufBlock& block = gguf_block(GgufType::kQ8_0);
  const auto elements = static_cast<size_t>(block.elements);
  std::string bytes;
  bytes.reserve(values.size() / elements * block.bytes);
  for (size_t first = 0; first < values.size(); first += elements) {
    float largest = 0.0F;
    for (size_t i = 0; i < elements; ++i) {
      largest = std::max(largest, std::abs(values[first + i]));
    }
    const float step = largest / 127.0F;
    const float inverse = step > 0.0F ? 1.0F / step : 0.0F;
    bytes += GgufKeys::bytes_of(f32_to_f16(step));
    for (size_t i = 0; i < elements; ++i) {
      bytes += static_cast<char>(static_cast<int8_t>(std::round(values[first + i] * inverse)));
    }
  }
  return bytes;
}

/// The file's number for the type that a value is written in, and its bytes.
std::pair<uint32_t, std::string> encoded(const GgufValue& value) {
  if (const auto* flag = std::get_if<bool>(&value.value)) {
    return {7, *flag ? std::string("\x01") : std::string(1, '\0')};
  }
  if (const auto* size = std::get_if<uint64_t>(&value.value)) {
    return {4, GgufKeys::bytes_of(static_cast<uint32_t>(*size))};
  }
  if (const auto* integer = std::get_if<int64_t>(&value.value)) {
    return {5, GgufKeys::bytes_of(static_cast<int32_t>(*integer))};
  }
  if (const auto* number = std::get_if<double>(&value.value)) {
    return {6, GgufKeys::bytes_of(static_cast<float>(*number))};
  }
  if (const auto* text = std::get_if<std::string>(&value.value)) {
    return {8, GgufKeys::text_bytes(*text)};
  }
  const auto& list = std::get<GgufValue::List>(value.value);
  CAMBIUM_CHECK(!list.empty());
  std::string bytes =
      GgufKeys::bytes_of(encoded(list.front()).first) + GgufKeys::bytes_of<uint64_t>(list.size());
  for (const GgufValue& item : list) {
    bytes += encoded(item).second;
  }
  return {9, bytes};
}

}  // namespace

void GgufKeys::value(std::string_view key, const GgufValue& value) {
  const auto [type, bytes] = encoded(value);
  raw(key, type, bytes);
}

void write_gguf(const std::string& path, const GgufKeys& keys,
                const std::vector<GgufSource>& tensors) {
  constexpr uint32_t kVersion = 3;
  std::string head = "GGUF" + GgufKeys::bytes_of(kVersion) +
                     GgufKeys::bytes_of<uint64_t>(tensors.size()) +
                     GgufKeys::bytes_of(keys.count()) + keys.bytes();
  uint64_t offset = 0;
  for (const GgufSource& tensor : tensors) {
    head += GgufKeys::text_bytes(tensor.name) +
            GgufKeys::bytes_of(static_cast<uint32_t>(tensor.shape.size()));
    for (size_t axis = tensor.shape.size(); axis-- > 0;) {
      head += GgufKeys::bytes_of(tensor.shape[axis]);
    }
    head += GgufKeys::bytes_of(static_cast<uint32_t>(tensor.type)) + GgufKeys::bytes_of(offset);
    const uint64_t size = bytes_of_tensor(tensor);
    offset += size + padding(size);
  }
  head.append(padding(head.size()), '\0');
  AtomicFile file(path);
  file.write(head);
  for (const GgufSource& tensor : tensors) {
    const uint64_t before = file.size();
    tensor.write([&](std::span<const std::byte> bytes) { file.write(bytes); });
    const uint64_t size = file.size() - before;
    CAMBIUM_CHECK(size == bytes_of_tensor(tensor), "{}: {} bytes", tensor.name, size);
    file.write(std::string(padding(size), '\0'));
  }
  file.commit();
}

bool can_encode(GgufType type, int64_t columns) {
  return type == GgufType::kF32 || type == GgufType::kF16 || type == GgufType::kBF16 ||
         (type == GgufType::kQ8_0 && columns % gguf_block(type).elements == 0);
}

std::string encode_rows(GgufType type, std::span<const float> values) {
  switch (type) {
    case GgufType::kF16:
      return narrowed(values, f32_to_f16);
    case GgufType::kBF16:
      return narrowed(values, f32_to_bf16);
    case GgufType::kQ8_0:
      return as_q8_0(values);
    default:
      CAMBIUM_CHECK(type == GgufType::kF32, "{}", gguf_block(type).name);
      return {reinterpret_cast<const char*>(values.data()), values.size_bytes()};
  }
}

}  // namespace cambium
