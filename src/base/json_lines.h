// Files of JSON lines as people have them: empty lines, lines that end as Windows ends them, a byte
// order mark at the start.
#pragma once

#include <cstdint>
#include <functional>
#include <nlohmann/json_fwd.hpp>
#include <string>

namespace cambium {

/// Calls `use` with each line's value and number. Error with "path:line: " before it for a line
/// that is not JSON or nests too deep; Errors that `use` throws get the same beginning. Returns the
/// checksum of the file's bytes.
uint64_t each_json_line(
    const std::string& path,
    const std::function<void(const nlohmann::ordered_json& value, int64_t line)>& use);

}  // namespace cambium
