// Runs a parsed template.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "text/jinja/ast.h"

namespace cambium::jinja {

/// The text that `body` prints with these variables. Throws Error naming the line. Thread-safe.
std::string render(const Body& body, const std::vector<std::pair<std::string, Value>>& variables);

}  // namespace cambium::jinja
