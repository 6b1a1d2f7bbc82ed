// checksums.json: the size and checksum of every file of a checkpoint folder, so that a copy that
// was cut short or a disk that lost a bit is found before it becomes wrong text.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <vector>

namespace cambium {

struct FileChecksum {
  uint64_t bytes = 0;
  uint64_t digest = 0;
};

/// By file name inside the folder ("model.safetensors").
using FileChecksums = std::map<std::string, FileChecksum>;

/// Writes `folder`/checksums.json for every file directly in the folder. Those in `known` are not
/// read again: pass what the writers returned.
void write_checksums(const std::string& folder, const FileChecksums& known = {});

/// What `folder`/checksums.json says; nothing when there is no such file.
std::optional<FileChecksums> read_checksums(const std::string& folder);

/// Reads every listed file; Error names the first that is missing or differs. Returns how many were
/// checked: 0 when the folder has no checksums.json.
size_t verify_checksums(const std::string& folder);

/// The same without *.safetensors, which are compared when they are opened; that they are there is
/// checked. Quick enough for every load.
size_t verify_small_files(const std::string& folder);

/// Compares those of `names` that checksums.json lists, for who reads no more of the folder than
/// them. Error names the first that is missing or differs.
void verify_listed(const std::string& folder, std::span<const char* const> names);

/// Files of the folder that its checksums.json does not list, sorted; hidden ones are left out.
std::vector<std::string> unlisted_files(const std::string& folder);

/// Error when the folder holds anything that its checksums.json does not list: it is about to be
/// replaced as a whole, and only what we wrote may go. An absent or empty folder passes.
void expect_only_written(const std::string& folder);

/// Compares one file's bytes with its entry; a file that is not listed passes.
void verify_checksum(const FileChecksums& checksums, const std::string& path,
                     std::span<const std::byte> bytes);
/// The two halves of it, for who reads the file in pieces: how long it is, and what its bytes sum
/// to.
void expect_bytes(const FileChecksum& sum, const std::string& path, uint64_t bytes);
void expect_digest(const FileChecksum& sum, const std::string& path, uint64_t digest);

}  // namespace cambium
