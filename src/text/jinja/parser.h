// Tokens into a tree.
#pragma once

#include <string_view>

#include "text/jinja/ast.h"

namespace cambium::jinja {

/// Throws Error naming the line, what was expected and what came.
Body parse(std::string_view source);

}  // namespace cambium::jinja
