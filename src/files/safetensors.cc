#include "files/safetensors.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <filesystem>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <tuple>
#include <unordered_set>
#include <utility>

#include "base/error.h"
#include "base/float16.h"
#include "base/float8.h"
#include "base/json.h"
#include "base/text.h"

namespace cambium {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

struct TypeRow {
  StoredType type;
  std::string_view name;
  size_t size;
};
constexpr std::array kTypes{
    TypeRow{StoredType::kF64, "F64", 8},        TypeRow{StoredType::kF32, "F32", 4},
    TypeRow{StoredType::kF16, "F16", 2},        TypeRow{StoredType::kBF16, "BF16", 2},
    TypeRow{StoredType::kF8E4M3, "F8_E4M3", 1}, TypeRow{StoredType::kI64, "I64", 8},
    TypeRow{StoredType::kI32, "I32", 4},        TypeRow{StoredType::kI16, "I16", 2},
    TypeRow{StoredType::kI8, "I8", 1},          TypeRow{StoredType::kU8, "U8", 1},
    TypeRow{StoredType::kBool, "BOOL", 1},
};

constexpr uint64_t kMaxHeaderBytes = 100'000'000;  // the format's own limit
constexpr const char* kSingleName = "model.safetensors";
constexpr const char* kIndexName = "model.safetensors.index.json";

Json parse_object(std::string_view text, const std::string& path, const char* what) {
  Json root = parse_json<Json>(text, fmt::format("{}: the {}", path, what),
                               {.depth = 16, .unique_keys = true});
  expect(root.is_object(), "{}: the {} is not a JSON object", path, what);
  return root;
}

std::optional<TypeRow> type_row(std::string_view name) {
  for (const TypeRow& row : kTypes) {
    if (row.name == name) {
      return row;
    }
  }
  return std::nullopt;
}

const TypeRow& type_row(StoredType type) {
  return kTypes[static_cast<size_t>(type)];
}

/// The bytes of a tensor of this shape, or nothing when they exceed what can be addressed.
std::optional<uint64_t> bytes_of(std::span<const int64_t> shape, size_t element) {
  uint64_t bytes = element;
  for (const int64_t size : shape) {
    if (__builtin_mul_overflow(bytes, static_cast<uint64_t>(size), &bytes)) {
      return {};
    }
  }
  if (bytes > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) {
    return {};
  }
  return bytes;
}

uint64_t bytes_of(const TensorSource& tensor) {
  const auto bytes = bytes_of(tensor.shape, stored_type_size(tensor.dtype));
  CAMBIUM_CHECK(bytes.has_value(), "tensor {}", tensor.name);
  return *bytes;
}

bool is_size(const Json& value) {
  return value.is_number_unsigned() &&
         value.get<uint64_t>() <= static_cast<uint64_t>(std::numeric_limits<int64_t>::max());
}

/// Reads one tensor's row of the header; `body` are the bytes after the header.
TensorEntry parse_entry(const std::string& path, const std::string& name, const Json& row,
                        std::span<const std::byte> body) {
  const auto need = [&](bool condition, const std::string& why) {
    expect(condition, "{}: tensor '{}': {}", path, name, why);
  };
  need(row.is_object(), "its header entry is not an object");
  for (const char* key : {"dtype", "shape", "data_offsets"}) {
    need(row.contains(key), fmt::format("its header entry has no \"{}\"", key));
  }
  TensorEntry entry;
  entry.name = name;
  const auto type = row["dtype"].is_string() ? type_row(row["dtype"].get_ref<const std::string&>())
                                             : std::nullopt;
  need(type.has_value(), fmt::format("its dtype {} is none that can be read", row["dtype"].dump()));
  entry.dtype = type->type;
  need(row["shape"].is_array(), "its shape is not a list");
  for (const Json& size : row["shape"]) {
    need(is_size(size), fmt::format("its shape has {}, which is no size", size.dump()));
    entry.shape.push_back(size.get<int64_t>());
  }
  const Json& offsets = row["data_offsets"];
  need(offsets.is_array() && offsets.size() == 2 && is_size(offsets[0]) && is_size(offsets[1]),
       "its data_offsets are not two positions");
  const auto begin = offsets[0].get<uint64_t>();
  const auto end = offsets[1].get<uint64_t>();
  need(begin <= end, fmt::format("its bytes end at {} before they begin at {}", end, begin));
  need(end <= body.size(),
       fmt::format("its bytes end at {}, but the file has only {} bytes of tensors: the file is "
                   "cut short or its header is wrong",
                   end, body.size()));
  const auto bytes = bytes_of(entry.shape, type->size);
  need(bytes.has_value() && *bytes == end - begin,
       fmt::format("{} {} needs {} bytes, its data_offsets span {}", type->name,
                   shape_text(entry.shape), bytes ? std::to_string(*bytes) : "too many",
                   end - begin));
  entry.data = body.data() + begin;
  entry.size = end - begin;
  return entry;
}

/// The format wants every byte of the file to belong to exactly one tensor.
void check_tiling(const std::string& path, std::vector<TensorEntry>& entries,
                  std::span<const std::byte> body) {
  // Empty tensors share their place with a neighbour; they stand before it.
  std::sort(entries.begin(), entries.end(), [](const TensorEntry& a, const TensorEntry& b) {
    return std::tie(a.data, a.size, a.name) < std::tie(b.data, b.size, b.name);
  });
  const std::byte* at = body.data();
  const TensorEntry* previous = nullptr;
  for (const TensorEntry& entry : entries) {
    expect(entry.data >= at, "{}: tensor '{}' overlaps tensor '{}'", path, entry.name,
           previous != nullptr ? previous->name : "");
    expect(entry.data == at, "{}: {} bytes before tensor '{}' belong to no tensor", path,
           entry.data - at, entry.name);
    at = entry.data + entry.size;
    previous = &entry;
  }
  const auto used = static_cast<size_t>(at - body.data());
  expect(used == body.size(), "{}: {} bytes after the last tensor belong to no tensor", path,
         body.size() - used);
}

std::string sibling(const std::string& path, const std::string& name) {
  return (fs::path(path).parent_path() / name).string();
}

std::string resolve(const std::string& path) {
  if (!fs::is_directory(path)) {
    return path;
  }
  for (const char* name : {kSingleName, kIndexName}) {
    std::string file = (fs::path(path) / name).string();
    if (fs::exists(file)) {
      return file;
    }
  }
  fail("{}: expected {} or {} in this folder, found neither", path, kSingleName, kIndexName);
}

template <class From, class To>
void convert(const TensorEntry& entry, To* out) {
  const auto count = static_cast<size_t>(entry.count());
  for (size_t i = 0; i < count; ++i) {
    From value;
    std::memcpy(&value, entry.data + i * sizeof(From), sizeof(From));
    out[i] = static_cast<To>(value);  // NOLINT(bugprone-signed-char-misuse): I8 is signed
  }
}

template <float (*widen)(uint16_t)>
void convert_half(const TensorEntry& entry, float* out) {
  const auto count = static_cast<size_t>(entry.count());
  for (size_t i = 0; i < count; ++i) {
    uint16_t bits;
    std::memcpy(&bits, entry.data + i * sizeof bits, sizeof bits);
    out[i] = widen(bits);
  }
}

std::string header_of(std::span<const TensorSource> tensors,
                      const std::map<std::string, std::string>& metadata) {
  Json root = Json::object();  // keys come out sorted: deterministic
  if (!metadata.empty()) {
    root["__metadata__"] = metadata;
  }
  uint64_t at = 0;
  for (const TensorSource& tensor : tensors) {
    const uint64_t end = at + bytes_of(tensor);
    root[tensor.name] = {{"dtype", stored_type_name(tensor.dtype)},
                         {"shape", tensor.shape},
                         {"data_offsets", {at, end}}};
    at = end;
  }
  std::string text = root.dump();
  // Spaces align the first tensor to 64 bytes, and with it all that follow to their elements.
  text.append((64 - (text.size() + 8) % 64) % 64, ' ');
  return text;
}

/// Writes one file; counts its tensor bytes into `written` and reports them.
FileChecksum write_file(const std::string& path, std::vector<TensorSource> tensors,
                        const SafeTensorsOptions& options, uint64_t* written) {
  std::stable_sort(tensors.begin(), tensors.end(),
                   [](const TensorSource& a, const TensorSource& b) {
                     return stored_type_size(a.dtype) > stored_type_size(b.dtype);
                   });
  AtomicFile file(path);
  const std::string header = header_of(tensors, options.metadata);
  const uint64_t length = header.size();
  file.write(std::as_bytes(std::span(&length, 1)));
  file.write(header);
  for (const TensorSource& tensor : tensors) {
    const uint64_t size = bytes_of(tensor);
    uint64_t done = 0;
    tensor.write([&](std::span<const std::byte> bytes) {
      done += bytes.size();
      CAMBIUM_CHECK(done <= size, "tensor {}: {} bytes put, expected {}", tensor.name, done, size);
      file.write(bytes);
      *written += bytes.size();
      if (options.progress) {
        options.progress(*written);
      }
    });
    CAMBIUM_CHECK(done == size, "tensor {}: {} bytes put, expected {}", tensor.name, done, size);
  }
  file.commit();
  return {file.size(), file.checksum()};
}

/// Cuts the list, in its order, into files of at most `limit` bytes (or one larger tensor).
std::vector<std::vector<TensorSource>> cut(std::vector<TensorSource> tensors, uint64_t limit) {
  std::vector<std::vector<TensorSource>> shards(1);
  uint64_t bytes = 0;
  for (TensorSource& tensor : tensors) {
    const uint64_t size = bytes_of(tensor);
    if (limit > 0 && !shards.back().empty() && bytes + size > limit) {
      shards.emplace_back();
      bytes = 0;
    }
    bytes += size;
    shards.back().push_back(std::move(tensor));
  }
  return shards;
}

}  // namespace

std::string_view stored_type_name(StoredType type) {
  return type_row(type).name;
}

size_t stored_type_size(StoredType type) {
  return type_row(type).size;
}

int64_t TensorEntry::count() const {
  return static_cast<int64_t>(size / stored_type_size(dtype));
}

std::string shape_text(std::span<const int64_t> shape) {
  return fmt::format("({})", fmt::join(shape, ", "));
}

void copy_as_f32(const TensorEntry& entry, std::span<float> out) {
  CAMBIUM_CHECK(static_cast<int64_t>(out.size()) == entry.count(), "{}", entry.name);
  switch (entry.dtype) {
    case StoredType::kF64:
      return convert<double>(entry, out.data());
    case StoredType::kF32:
      if (entry.size > 0) {
        std::memcpy(out.data(), entry.data, entry.size);
      }
      return;
    case StoredType::kF16:
      return convert_half<f16_to_f32>(entry, out.data());
    case StoredType::kBF16:
      return convert_half<bf16_to_f32>(entry, out.data());
    case StoredType::kF8E4M3:
      std::transform(entry.data, entry.data + entry.size, out.data(),
                     [](std::byte x) { return e4m3_to_f32(std::to_integer<uint8_t>(x)); });
      return;
    default:
      fail("tensor '{}' is {}, expected a float type", entry.name, stored_type_name(entry.dtype));
  }
}

std::vector<float> as_f32(const TensorEntry& entry) {
  std::vector<float> values(static_cast<size_t>(entry.count()));
  copy_as_f32(entry, values);
  return values;
}

std::vector<int64_t> as_i64(const TensorEntry& entry) {
  std::vector<int64_t> values(static_cast<size_t>(entry.count()));
  switch (entry.dtype) {
    case StoredType::kI64:
      convert<int64_t>(entry, values.data());
      break;
    case StoredType::kI32:
      convert<int32_t>(entry, values.data());
      break;
    case StoredType::kI16:
      convert<int16_t>(entry, values.data());
      break;
    case StoredType::kI8:
      convert<int8_t>(entry, values.data());
      break;
    case StoredType::kU8:
    case StoredType::kBool:
      convert<uint8_t>(entry, values.data());
      break;
    default:
      fail("tensor '{}' is {}, expected an integer type", entry.name,
           stored_type_name(entry.dtype));
  }
  return values;
}

SafeTensors SafeTensors::open(const std::string& path, Check check) {
  SafeTensors model;
  model.path_ = resolve(path);
  if (model.path_.ends_with(".json")) {
    model.add_index(model.path_);
  } else {
    model.add_file(model.path_);
  }
  if (check == Check::kContents) {
    const fs::path folder = fs::path(model.path_).parent_path();
    if (const auto checksums = read_checksums(folder.empty() ? "." : folder.string())) {
      for (const MappedFile& file : model.files_) {
        verify_checksum(*checksums, file.path(), file.bytes());
      }
    }
  }
  return model;
}

void SafeTensors::add_file(const std::string& path) {
  MappedFile file(path);
  const std::span<const std::byte> bytes = file.bytes();
  expect(bytes.size() >= 8,
         "{}: {} bytes are too few for a safetensors file: it is empty or cut short", path,
         bytes.size());
  uint64_t length = 0;
  std::memcpy(&length, bytes.data(), sizeof length);
  expect(length <= kMaxHeaderBytes,
         "{}: a header of {} bytes is more than the format allows ({}): this is not a safetensors "
         "file, or its start is damaged",
         path, length, kMaxHeaderBytes);
  expect(length <= bytes.size() - 8,
         "{}: the header has {} bytes, but only {} follow: the file is cut short", path, length,
         bytes.size() - 8);
  const std::string_view text(reinterpret_cast<const char*>(bytes.data()) + 8, length);
  const std::span<const std::byte> body = bytes.subspan(8 + length);
  const Json root = parse_object(text, path, "header");

  std::vector<TensorEntry> entries;
  for (const auto& [name, row] : root.items()) {
    if (name != "__metadata__") {
      entries.push_back(parse_entry(path, name, row, body));
      continue;
    }
    expect(row.is_object(), "{}: __metadata__ is not an object", path);
    for (const auto& [key, value] : row.items()) {
      expect(value.is_string(), "{}: __metadata__ '{}' is not a string", path, key);
      metadata_[key] = value.get<std::string>();
    }
  }
  check_tiling(path, entries, body);
  for (TensorEntry& entry : entries) {
    const bool added = places_.emplace(entry.name, tensors_.size()).second;
    expect(added, "{}: tensor '{}' is also in another file of this model", path, entry.name);
    tensors_.push_back(std::move(entry));
  }
  files_.push_back(std::move(file));
}

void SafeTensors::add_index(const std::string& index_path) {
  const Json root = parse_object(read_text_file(index_path, kMaxHeaderBytes), index_path, "index");
  expect(root.contains("weight_map") && root["weight_map"].is_object(),
         "{}: expected an object \"weight_map\"", index_path);
  const Json& map = root["weight_map"];
  std::map<std::string, std::vector<std::string>> names_of;  // by file
  for (const auto& [name, file] : map.items()) {
    const std::string file_name = file.is_string() ? file.get<std::string>() : "";
    expect(!file_name.empty() && fs::path(file_name).filename() == file_name,
           "{}: tensor '{}' lies in {}, which is not the name of a file beside the index",
           index_path, name, file.dump());
    names_of[file_name].push_back(name);
  }
  for (const auto& [file, names] : names_of) {
    const std::string path = sibling(index_path, file);
    const size_t before = tensors_.size();
    add_file(path);
    for (const std::string& name : names) {
      const auto found = places_.find(name);
      expect(found != places_.end() && found->second >= before,
             "{}: tensor '{}' should be in this file (says {}), but is not", path, name,
             index_path);
    }
    for (size_t i = before; i < tensors_.size(); ++i) {
      const std::string& name = tensors_[i].name;
      expect(map.contains(name) && map[name] == file,
             "{}: tensor '{}' is in this file, but {} does not list it there", path, name,
             index_path);
    }
  }
}

const TensorEntry* SafeTensors::find(std::string_view name) const {
  const auto found = places_.find(std::string(name));
  return found == places_.end() ? nullptr : &tensors_[found->second];
}

const TensorEntry& SafeTensors::at(std::string_view name) const {
  if (const TensorEntry* entry = find(name)) {
    return *entry;
  }
  std::vector<std::string> names;
  for (const TensorEntry& entry : tensors_) {
    names.push_back(entry.name);
  }
  fail("{}: there is no tensor '{}'{}", path_, name, did_you_mean(name, names));
}

uint64_t SafeTensors::total_bytes() const {
  uint64_t bytes = 0;
  for (const TensorEntry& entry : tensors_) {
    bytes += entry.size;
  }
  return bytes;
}

void SafeTensors::release(const TensorEntry& entry) const {
  for (const MappedFile& file : files_) {
    const std::byte* begin = file.bytes().data();
    if (entry.data >= begin && entry.data + entry.size <= begin + file.bytes().size()) {
      file.release(static_cast<size_t>(entry.data - begin), entry.size);
      return;
    }
  }
}

TensorSource TensorSource::from_memory(std::string name, StoredType dtype,
                                       std::vector<int64_t> shape, const void* data) {
  TensorSource source{std::move(name), dtype, std::move(shape), {}};
  const std::span bytes(static_cast<const std::byte*>(data), bytes_of(source));
  source.write = [bytes](const PutBytes& put) { put(bytes); };
  return source;
}

FileChecksums write_safetensors(const std::string& path, std::vector<TensorSource> tensors,
                                const SafeTensorsOptions& options) {
  std::unordered_set<std::string> names;
  uint64_t total = 0;
  for (const TensorSource& tensor : tensors) {
    CAMBIUM_CHECK(tensor.name != "__metadata__" && !tensor.name.empty());
    CAMBIUM_CHECK(names.insert(tensor.name).second, "tensor {} is written twice", tensor.name);
    total += bytes_of(tensor);
  }
  const fs::path target(path);
  uint64_t written = 0;
  FileChecksums checksums;
  auto shards = cut(std::move(tensors), options.max_shard_bytes);
  Json map = Json::object();
  for (size_t i = 0; i < shards.size(); ++i) {
    const std::string name = shards.size() == 1
                                 ? target.filename().string()
                                 : fmt::format("{}-{:05}-of-{:05}{}", target.stem().string(), i + 1,
                                               shards.size(), target.extension().string());
    for (const TensorSource& tensor : shards[i]) {
      map[tensor.name] = name;
    }
    checksums[name] = write_file(sibling(path, name), std::move(shards[i]), options, &written);
  }
  if (shards.size() == 1 && !options.always_index) {
    return checksums;
  }
  // The index comes last: without it the shards are no model.
  const Json index = {{"metadata", {{"total_size", total}}}, {"weight_map", map}};
  const std::string text = index.dump(2) + "\n";
  write_file_atomically(path + ".index.json", text);
  checksums[target.filename().string() + ".index.json"] = {
      text.size(), checksum(std::as_bytes(std::span(text)))};
  return checksums;
}

}  // namespace cambium
