#include "model/packed_tensor.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "base/error.h"
#include "base/float4.h"
#include "base/float8.h"

namespace cambium {
namespace {

constexpr int64_t kBlock = 128;   // rows and columns of a scale of fp8
constexpr int64_t kMxGroup = 32;  // numbers of a scale
constexpr int64_t kNvGroup = 16;

int64_t blocks(int64_t n) {
  return (n + kBlock - 1) / kBlock;
}

const TensorEntry& scales_of(const SafeTensors& file, const TensorEntry& values,
                             const std::string& name, std::initializer_list<StoredType> types,
                             const std::vector<int64_t>& shape) {
  const TensorEntry* scales = file.find(name);
  expect(scales != nullptr, "{}: tensor {} is {}, whose scales {} are missing", file.path(),
         values.name, stored_type_name(values.dtype), name);
  expect(
      scales->shape == shape && std::find(types.begin(), types.end(), scales->dtype) != types.end(),
      "{}: tensor {} has scales {} {} {}, expected {} {}", file.path(), values.name, name,
      stored_type_name(scales->dtype), shape_text(scales->shape), stored_type_name(*types.begin()),
      shape_text(shape));
  return *scales;
}

float number_of(const SafeTensors& file, const TensorEntry& values, const std::string& name) {
  const TensorEntry* entry = file.find(name);
  expect(entry != nullptr && entry->count() == 1,
         "{}: tensor {} is packed in NVFP4, expected the number {} beside it", file.path(),
         values.name, name);
  return as_f32(*entry).front();
}

PackedTensor f8_tensor(const SafeTensors& file, const TensorEntry& values) {
  std::vector<int64_t> shape = values.shape;
  expect(shape.size() >= 2, "{}: tensor {} is F8_E4M3 {}, expected a matrix", file.path(),
         values.name, shape_text(shape));
  for (size_t i = shape.size() - 2; i < shape.size(); ++i) {
    shape[i] = blocks(shape[i]);
  }
  const std::string name = values.name + "_scale_inv";
  const TensorEntry& scales =
      scales_of(file, values, name, {StoredType::kF32, StoredType::kBF16}, shape);
  return {Packing::kF8Blocks, values, scales, 1.0F, values.shape, {values.name, name}};
}

PackedTensor mx_tensor(const SafeTensors& file, const TensorEntry& values) {
  const std::string suffix = "_blocks";
  std::vector<int64_t> scale_shape = values.shape;
  expect(values.shape.size() >= 3 && values.shape.back() == kMxGroup / 2,
         "{}: tensor {} is U8 {}, expected MXFP4 in blocks of {} bytes", file.path(), values.name,
         shape_text(values.shape), kMxGroup / 2);
  scale_shape.pop_back();
  std::vector<int64_t> shape = scale_shape;
  shape.back() *= kMxGroup;
  const std::string name = values.name.substr(0, values.name.size() - suffix.size()) + "_scales";
  const TensorEntry& scales = scales_of(file, values, name, {StoredType::kU8}, scale_shape);
  return {Packing::kMxFp4, values, scales, 1.0F, shape, {values.name, name}};
}

/// `stem` is the name of the weight; `divides`: the last factor is a divisor.
PackedTensor nv_tensor(const SafeTensors& file, const TensorEntry& values, const std::string& stem,
                       bool divides) {
  std::vector<int64_t> shape = values.shape;
  expect(!shape.empty(), "{}: tensor {} is U8 without axes", file.path(), values.name);
  shape.back() *= 2;
  expect(shape.back() % kNvGroup == 0,
         "{}: tensor {} packs rows of {} numbers, expected groups of {}", file.path(), values.name,
         shape.back(), kNvGroup);
  std::vector<int64_t> scale_shape = shape;
  scale_shape.back() /= kNvGroup;
  const TensorEntry& scales =
      scales_of(file, values, stem + "_scale", {StoredType::kF8E4M3}, scale_shape);
  const std::string whole = stem + (divides ? "_global_scale" : "_scale_2");
  const float number = number_of(file, values, whole);
  return {Packing::kNvFp4, values,
          scales,          divides ? 1.0F / number : number,
          shape,           {values.name, scales.name, whole}};
}

uint8_t byte_at(const TensorEntry& entry, int64_t i) {
  return static_cast<uint8_t>(entry.data[i]);
}

float e2m1_at(const TensorEntry& values, int64_t i) {
  return e2m1_to_f32(static_cast<unsigned>(byte_at(values, i / 2)) >> (i % 2 * 4));
}

/// Number i of float scales in the file.
float scale_at(const TensorEntry& scales, int64_t i) {
  TensorEntry one = scales;
  const size_t size = stored_type_size(scales.dtype);
  one.shape = {1};
  one.data += static_cast<size_t>(i) * size;
  one.size = size;
  float value = 0.0F;
  copy_as_f32(one, std::span(&value, 1));
  return value;
}

}  // namespace

void PackedTensor::unpack(int64_t begin, std::span<float> out) const {
  const int64_t end = begin + static_cast<int64_t>(out.size());
  const int64_t columns = shape.empty() ? 1 : shape.back();
  for (int64_t i = begin; i < end;) {
    // Up to the end of the numbers that share a scale.
    const int64_t row = i / columns;
    const int64_t column = i % columns;
    const int64_t group = packing == Packing::kF8Blocks ? kBlock
                          : packing == Packing::kMxFp4  ? kMxGroup
                                                        : kNvGroup;
    const int64_t stop =
        std::min(end, row * columns + std::min(columns, (column / group + 1) * group));
    float* to = out.data() + (i - begin);
    if (packing == Packing::kF8Blocks) {
      const int64_t rows = shape[shape.size() - 2];
      const int64_t at =
          (row / rows * blocks(rows) + row % rows / kBlock) * blocks(columns) + column / kBlock;
      const float scale = scale_at(scales, at);
      for (; i < stop; ++i) {
        *to++ = e4m3_to_f32(byte_at(values, i)) * scale;
      }
      continue;
    }
    const int64_t at = row * (columns / group) + column / group;
    const float scale = packing == Packing::kMxFp4 ? std::ldexp(1.0F, byte_at(scales, at) - 127)
                                                   : e4m3_to_f32(byte_at(scales, at)) * factor;
    for (; i < stop; ++i) {
      *to++ = e2m1_at(values, i) * scale;
    }
  }
}

std::optional<PackedTensor> find_packed(const SafeTensors& file, const std::string& name) {
  const TensorEntry* entry = file.find(name);
  if (entry == nullptr) {
    const TensorEntry* packed = file.find(name + "_packed");
    return packed == nullptr ? std::nullopt : std::optional(nv_tensor(file, *packed, name, true));
  }
  if (entry->dtype == StoredType::kF8E4M3) {
    return f8_tensor(file, *entry);
  }
  if (entry->dtype == StoredType::kU8) {
    return name.ends_with("_blocks") ? mx_tensor(file, *entry)
                                     : nv_tensor(file, *entry, name, false);
  }
  return PackedTensor{Packing::kNone, *entry, {}, 1.0F, entry->shape, {name}};
}

bool is_activation_scale(std::string_view name) {
  constexpr const char* kEnds[] = {".input_scale", ".input_global_scale", ".k_scale", ".v_scale"};
  return std::any_of(std::begin(kEnds), std::end(kEnds),
                     [&](const char* end) { return name.ends_with(end); });
}

}  // namespace cambium
