#include "files/checksums.h"

#include <algorithm>
#include <charconv>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "base/checksum.h"
#include "base/error.h"
#include "base/file.h"
#include "base/json.h"
#include "base/signals.h"

namespace cambium {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

constexpr const char* kFileName = "checksums.json";
constexpr const char* kAlgorithm = "xxh3-64";

std::string at(const std::string& folder, const std::string& name) {
  return (fs::path(folder) / name).string();
}

std::string folder_of(const std::string& path) {
  const std::string folder = fs::path(path).parent_path().string();
  return folder.empty() ? "." : folder;
}

FileChecksum checksum_of(const std::string& path) {
  const MappedFile file(path);
  return {file.bytes().size(), checksum(file.bytes())};
}

}  // namespace

void write_checksums(const std::string& folder, const FileChecksums& known) {
  FileChecksums all;
  std::error_code error;
  for (const fs::directory_entry& entry : fs::directory_iterator(folder, error)) {
    const std::string name = entry.path().filename().string();
    if (!entry.is_regular_file() || name == kFileName || name.starts_with('.')) {
      continue;
    }
    const auto found = known.find(name);
    all[name] = found != known.end() ? found->second : checksum_of(entry.path().string());
  }
  expect(!error, "cannot read the folder {}: {}", folder, error.message());
  Json files = Json::object();
  for (const auto& [name, sum] : all) {
    files[name] = {{"bytes", sum.bytes}, {"xxh3", checksum_text(sum.digest)}};
  }
  const Json root = {{"algorithm", kAlgorithm}, {"files", files}};
  write_file_atomically(at(folder, kFileName), root.dump(2) + "\n");
}

std::optional<FileChecksums> read_checksums(const std::string& folder) {
  const std::string path = at(folder, kFileName);
  if (!fs::exists(path)) {
    return std::nullopt;
  }
  const Json root = try_json<Json>(read_text_file(path));
  const bool known_form = root.is_object() && root.value("algorithm", Json()) == kAlgorithm &&
                          root.contains("files") && root["files"].is_object();
  expect(known_form, "{}: expected an object with \"algorithm\": \"{}\" and \"files\"", path,
         kAlgorithm);
  FileChecksums checksums;
  for (const auto& [name, entry] : root["files"].items()) {
    FileChecksum sum;
    const bool good = entry.is_object() && entry.contains("bytes") && entry.contains("xxh3") &&
                      entry["bytes"].is_number_unsigned() && entry["xxh3"].is_string();
    bool parsed = false;
    if (good) {
      sum.bytes = entry["bytes"].get<uint64_t>();
      const auto& text = entry["xxh3"].get_ref<const std::string&>();
      const auto [end, code] =
          std::from_chars(text.data(), text.data() + text.size(), sum.digest, 16);
      parsed = code == std::errc() && end == text.data() + text.size() && text.size() == 16;
    }
    expect(parsed, "{}: the entry of '{}' needs \"bytes\" and 16 hexadecimal digits of \"xxh3\"",
           path, name);
    checksums[name] = sum;
  }
  return checksums;
}

namespace {

void verify_entry(const FileChecksums& checksums, const std::string& folder,
                  const std::string& name, bool content) {
  const std::string path = at(folder, name);
  expect(fs::exists(path),
         "{} is missing, but {} lists it; copy the folder again (or accept a change that was "
         "meant: cambium verify {} --accept)",
         path, kFileName, folder);
  if (content) {
    const MappedFile file(path);
    verify_checksum(checksums, path, file.bytes());
  }
}

size_t verify_all(const std::string& folder, bool tensors) {
  const std::optional<FileChecksums> checksums = read_checksums(folder);
  if (!checksums) {
    return 0;
  }
  for (const auto& [name, sum] : *checksums) {
    expect(fs::path(name).filename() == name, "{}/{}: '{}' is not the name of a file in the folder",
           folder, kFileName, name);
    verify_entry(*checksums, folder, name, tensors || !name.ends_with(".safetensors"));
  }
  return checksums->size();
}

}  // namespace

size_t verify_checksums(const std::string& folder) {
  return verify_all(folder, true);
}

size_t verify_small_files(const std::string& folder) {
  return verify_all(folder, false);
}

void verify_listed(const std::string& folder, std::span<const char* const> names) {
  const FileChecksums checksums = read_checksums(folder).value_or(FileChecksums());
  for (const char* name : names) {
    if (checksums.contains(name)) {
      verify_entry(checksums, folder, name, true);
    }
  }
}

std::vector<std::string> unlisted_files(const std::string& folder) {
  const FileChecksums listed = read_checksums(folder).value_or(FileChecksums());
  std::vector<std::string> names;
  for (const fs::directory_entry& entry : fs::directory_iterator(folder)) {
    const std::string name = entry.path().filename().string();
    if (entry.is_regular_file() && name != kFileName && !name.starts_with('.') &&
        !listed.contains(name)) {
      names.push_back(name);
    }
  }
  std::sort(names.begin(), names.end());
  return names;
}

void expect_only_written(const std::string& folder) {
  std::error_code error;
  if (fs::symlink_status(folder, error).type() == fs::file_type::not_found) {
    return;
  }
  expect(fs::is_directory(folder, error), "{} is in the way: it is a file, expected a folder",
         folder);
  const FileChecksums listed = read_checksums(folder).value_or(FileChecksums());
  for (const fs::directory_entry& entry : fs::directory_iterator(folder)) {
    const std::string name = entry.path().filename().string();
    const bool ours = entry.is_regular_file() && (name == kFileName || listed.contains(name));
    expect(ours,
           "{} is in the way: {} would be replaced with it, and it was not written by us; "
           "move it away or choose another folder",
           at(folder, name), folder);
  }
}

void verify_checksum(const FileChecksums& checksums, const std::string& path,
                     std::span<const std::byte> bytes) {
  const auto found = checksums.find(fs::path(path).filename().string());
  if (found == checksums.end()) {
    return;
  }
  stop_point();
  expect_bytes(found->second, path, bytes.size());
  expect_digest(found->second, path, checksum(bytes));
}

void expect_bytes(const FileChecksum& sum, const std::string& path, uint64_t bytes) {
  expect(bytes == sum.bytes,
         "{} has {} bytes, {} says {}: the file was cut short or changed; copy it again (or accept "
         "a change that was meant: cambium verify {} --accept)",
         path, bytes, kFileName, sum.bytes, folder_of(path));
}

void expect_digest(const FileChecksum& sum, const std::string& path, uint64_t digest) {
  expect(digest == sum.digest,
         "{} has checksum {}, {} says {}: the file is damaged or was changed; copy it again (or "
         "accept a change that was meant: cambium verify {} --accept)",
         path, checksum_text(digest), kFileName, checksum_text(sum.digest), folder_of(path));
}

}  // namespace cambium
