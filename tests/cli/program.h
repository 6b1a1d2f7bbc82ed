// The built program, run as its users run it.
#pragma once

#include <sys/wait.h>

#include <array>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>
#include <vector>

#include "base/file.h"
#include "base/test_paths.h"

namespace cambium {

struct Outcome {
  int status = -1;   // -1: a signal ended it
  std::string text;  // standard output and error together
};

/// Through the shell: `arguments` are its words, `before` what stands before the program ("ulimit
/// -f 8;", "timeout 3").
inline Outcome cambium(const std::string& arguments, const std::string& input = "/dev/null",
                       const std::string& before = "") {
  const std::string command = before + " '" + kProgram + "' 2>&1 <'" + input + "' " + arguments;
  FILE* pipe = popen(command.c_str(), "r");
  Outcome outcome;
  std::array<char, 4096> buffer{};
  for (size_t n = 0; (n = std::fread(buffer.data(), 1, buffer.size(), pipe)) > 0;) {
    outcome.text.append(buffer.data(), n);
  }
  const int status = pclose(pipe);
  outcome.status = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  return outcome;
}

/// The lines of a file of JSON lines.
inline std::vector<nlohmann::json> rows_of(const std::string& path) {
  std::istringstream text(read_text_file(path));
  std::vector<nlohmann::json> rows;
  for (std::string line; std::getline(text, line);) {
    rows.push_back(nlohmann::json::parse(line));
  }
  return rows;
}

inline std::string fixture(const std::string& name) {
  return std::string(kSourceDir) + "/tests/fixtures/" + name;
}

inline std::string teacher() {
  return std::string(kSourceDir) + "/models/teacher";
}

}  // namespace cambium
