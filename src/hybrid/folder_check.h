// Whether a folder that was written here still is what was written: a checkpoint, a run of `train`
// or `distill`, a run of `hybridize`.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

namespace cambium {

struct FolderCheckRow {
  std::string path;
  std::string text;  // what was compared, or what is wrong
  bool ok = true;
};

/// Every checkpoint in the folder (itself included): the files against checksums.json, the model
/// against its golden prompt. Every sealed file against its checksum, and the files it lists. A
/// row each. Error when the folder holds nothing that can be checked.
std::vector<FolderCheckRow> check_folder(const std::filesystem::path& folder);

/// Takes the files of a checkpoint as they are now: writes checksums.json anew. Error when the
/// folder is no checkpoint.
void accept_files(const std::filesystem::path& folder);

}  // namespace cambium
