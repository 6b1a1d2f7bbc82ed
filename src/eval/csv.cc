#include "eval/csv.h"

#include "base/error.h"

namespace cambium {
namespace {

/// The field at `at`, which moves to the comma or end of line after it. Quotes count only where a
/// field begins with one; two of them inside are one.
std::string take_field(std::string_view text, size_t& at, int64_t& line,
                       const std::string& origin) {
  std::string field;
  if (at >= text.size() || text[at] != '"') {
    for (; at < text.size() && text[at] != ',' && text[at] != '\n'; ++at) {
      field += text[at];
    }
    if (field.ends_with('\r')) {
      field.pop_back();
    }
    return field;
  }
  const int64_t begin = line;
  for (++at; at < text.size(); ++at) {
    if (text[at] != '"') {
      line += text[at] == '\n' ? 1 : 0;
      field += text[at];
    } else if (at + 1 < text.size() && text[at + 1] == '"') {
      field += text[at++];
    } else {
      ++at;
      if (at < text.size() && text[at] == '\r') {
        ++at;
      }
      expect(at >= text.size() || text[at] == ',' || text[at] == '\n',
             "{} line {}: expected a comma or the end of the line after a quoted field", origin,
             line);
      return field;
    }
  }
  fail("{} line {}: a quoted field is never closed", origin, begin);
}

}  // namespace

std::vector<CsvRow> parse_csv(std::string_view text, const std::string& origin) {
  if (text.starts_with("\xEF\xBB\xBF")) {
    text.remove_prefix(3);
  }
  std::vector<CsvRow> rows;
  int64_t line = 1;
  for (size_t at = 0; at < text.size(); ++line) {
    CsvRow row{{}, line};
    row.fields.push_back(take_field(text, at, line, origin));
    while (at < text.size() && text[at] == ',') {
      ++at;
      row.fields.push_back(take_field(text, at, line, origin));
    }
    ++at;  // the end of the line
    if (row.fields.size() == 1 && row.fields[0].empty()) {
      continue;
    }
    expect(rows.empty() || row.fields.size() == rows[0].fields.size(),
           "{} line {}: expected {} fields, as in the first line, got {}", origin, row.line,
           rows.empty() ? 0 : rows[0].fields.size(), row.fields.size());
    rows.push_back(std::move(row));
  }
  return rows;
}

}  // namespace cambium
