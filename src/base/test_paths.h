// For tests: where the sources and the program of this build are. cmake/rooms.cmake writes the file
// that defines them, so that no other object depends on where the sources lie.
#pragma once

namespace cambium {

extern const char kSourceDir[];
extern const char kProgram[];

}  // namespace cambium
