// Tables as RFC 4180 writes them: fields between commas, quoted where they hold commas, quotes or
// ends of lines.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace cambium {

struct CsvRow {
  std::vector<std::string> fields;
  int64_t line = 0;  // where it begins, from 1
};

/// All rows, the first with the columns' names. Lines may end as Windows ends them; empty ones and
/// a byte order mark are passed over. Error with `origin` and the line for a quote that is never
/// closed, or a row that is not as long as the first.
std::vector<CsvRow> parse_csv(std::string_view text, const std::string& origin);

}  // namespace cambium
