// A mapped file that another program shortens: touching what is gone is SIGBUS. There is no going
// on from it, but the process says which file it was instead of dying without a word.
#pragma once

#include <cstddef>
#include <string>

namespace cambium {

/// From here on SIGBUS in a mapped file ends the process with a message that names the file and
/// exit status 1; any other ends it as always.
void explain_map_faults();

/// Files that are mapped, for the message.
void add_map(const void* memory, size_t size, const std::string& path);
void remove_map(const void* memory);

}  // namespace cambium
