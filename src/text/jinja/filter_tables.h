// How the tables of filters and methods find each other.
#pragma once

#include "text/jinja/runtime.h"

namespace cambium::jinja {

/// The filters for text.
Filter find_text_filter(std::string_view name);

/// Methods of strings that filters share.
std::string strip(const std::string& s, const Value& characters, bool left, bool right);
std::string replace(Runtime& runtime, const std::string& s, const std::string& old,
                    const std::string& fresh, int64_t count);
std::string capitalize(const std::string& s);
std::string center(const std::string& s, int64_t width, const std::string& fill);

}  // namespace cambium::jinja
