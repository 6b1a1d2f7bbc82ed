// JSON files that notice being edited: the first key is a checksum of everything after it.
#pragma once

#include <filesystem>
#include <string>
#include <string_view>

namespace cambium {

/// `json` is an object of at least one key as nlohmann's dump(1) writes it.
std::string seal(std::string_view json);

/// The object again, without the checksum. Error naming `where` when it has none or is not what was
/// sealed.
std::string unseal(std::string_view text, const std::string& where);
bool is_sealed(std::string_view text);

void write_sealed(const std::filesystem::path& path, std::string_view json);
std::string read_sealed(const std::filesystem::path& path);

}  // namespace cambium
