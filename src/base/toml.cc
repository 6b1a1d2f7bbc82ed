#include "base/toml.h"

#include <stdexcept>

namespace {
[[noreturn, gnu::noinline]] void toml_assertion_failed() {
  throw std::logic_error("the text ends in the middle of something");
}
}  // namespace

// A failed assertion of the library must not end the process: it is how some broken texts show.
#define TOML_ASSERT(condition) ((condition) ? void() : toml_assertion_failed())
#include <toml++/toml.h>
#include <algorithm>
#include <cmath>
#include <map>
#include <optional>
#include <set>
#include <sstream>
#include <type_traits>
#include <variant>

#include "base/error.h"
#include "base/file.h"
#include "base/text.h"

namespace cambium {

using TableList = std::vector<std::shared_ptr<PlanNode>>;

/// A table with what was asked of it. Children are made once, so that every reader of a table marks
/// the same one.
struct PlanNode {
  std::string file;
  std::string path;  // "optimizer.mixer"; empty for the whole plan
  toml::table values;
  std::set<std::string> asked;
  std::map<std::string, std::shared_ptr<PlanNode>> tables;
  std::map<std::string, TableList> lists;
  bool only_asked = false;  // the plan has no such table; somebody asked for one

  /// Whether the plan, or what was set afterwards, has this table.
  bool given() const {
    return !only_asked || !values.empty() || !lists.empty() ||
           std::any_of(tables.begin(), tables.end(),
                       [](const auto& child) { return child.second->given(); });
  }

  std::string name_of(const std::string& key) const {
    return path.empty() ? key : path + "." + key;
  }

  const toml::node* find(const std::string& key) {
    asked.insert(key);
    return values.get(key);
  }

  std::string place_of(const toml::node& node) const {
    const auto line = node.source().begin.line;
    return line > 0 ? fmt::format("{}:{}", file, line) : file;
  }

  [[noreturn]] void wrong_type(const std::string& key, const toml::node& node,
                               const char* expected) const {
    std::ostringstream text;
    node.visit([&](const auto& value) { text << value; });
    fail("{}: {} must be {}, got {}", place_of(node), name_of(key), expected, text.str());
  }
};

namespace {

std::shared_ptr<PlanNode> make_node(std::string file, std::string path, toml::table values) {
  auto node = std::make_shared<PlanNode>();
  node->file = std::move(file);
  node->path = std::move(path);
  node->values = std::move(values);
  return node;
}

constexpr int kMostParts = 32;  // of a dotted key, and of values inside one another

/// Dotted keys and nested values become tables inside one another, over which the library and we
/// recurse. Strings and comments do not count.
void expect_shallow(std::string_view text, const std::string& where) {
  int64_t line = 1;
  int64_t open = 0;
  int64_t dots = 0;  // of the key or number at hand
  char quote = 0;
  bool comment = false;
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (c == '\n') {
      ++line;
      comment = false;
      dots = 0;
      continue;
    }
    if (comment) {
      continue;
    }
    if (quote != 0) {
      if (c == '\\' && quote == '"') {
        ++i;
      } else if (c == quote) {
        quote = 0;
      }
      continue;
    }
    if (c == '"' || c == '\'') {
      quote = c;
    } else if (c == '#') {
      comment = true;
    } else if (c == '.') {
      ++dots;
    } else if (c == '=' || c == ',') {
      dots = 0;
    } else if (c == '[' || c == '{') {
      ++open;
    } else if (c == ']' || c == '}') {
      --open;
    }
    expect(dots < kMostParts && open < kMostParts, "{}:{}: nested more than {} deep", where, line,
           kMostParts);
  }
}

/// Splits the node's subtables off into nodes of their own.
void adopt(PlanNode& node) {
  std::vector<std::string> moved;
  for (auto& [key, value] : node.values) {
    const std::string name(key.str());
    if (toml::table* table = value.as_table()) {
      auto child = make_node(node.file, node.name_of(name), std::move(*table));
      adopt(*child);
      node.tables.emplace(name, std::move(child));
      moved.push_back(name);
    } else if (toml::array* array = value.as_array();
               array != nullptr && !array->empty() && array->is_homogeneous<toml::table>()) {
      TableList list;
      for (size_t i = 0; i < array->size(); ++i) {
        auto child = make_node(node.file, fmt::format("{}[{}]", node.name_of(name), i),
                               std::move(*array->get(i)->as_table()));
        adopt(*child);
        list.push_back(std::move(child));
      }
      node.lists.emplace(name, std::move(list));
      moved.push_back(name);
    }
  }
  for (const std::string& name : moved) {
    node.values.erase(name);
  }
}

/// TOML has inf and nan; no key of ours means anything by them.
template <class T>
bool is_finite(const T& value) {
  if constexpr (std::is_same_v<T, double>) {
    return std::isfinite(value);
  }
  return true;
}

template <class T>
std::optional<T> find_value(PlanNode& node, const std::string& key, const char* expected) {
  const toml::node* found = node.find(key);
  if (found == nullptr) {
    expect(!node.tables.contains(key) && !node.lists.contains(key),
           "{}: {} must be {}, got a table", node.file, node.name_of(key), expected);
    return std::nullopt;
  }
  std::optional<T> value = found->value_exact<T>();
  if constexpr (std::is_same_v<T, double>) {
    if (!value && found->is_integer()) {
      value = static_cast<double>(*found->value<int64_t>());
    }
  }
  if (!value || !is_finite(*value)) {
    node.wrong_type(key, *found, expected);
  }
  return value;
}

template <class T>
T need(PlanNode& node, const std::string& key, const char* expected) {
  const std::optional<T> value = find_value<T>(node, key, expected);
  expect(value.has_value(), "{}: {} is missing; it must be {}", node.file, node.name_of(key),
         expected);
  return *value;
}

template <class T>
std::vector<T> find_list(PlanNode& node, const std::string& key, const char* expected) {
  std::vector<T> out;
  const toml::node* found = node.find(key);
  if (found == nullptr) {
    return out;
  }
  const toml::array* array = found->as_array();
  if (array == nullptr) {
    node.wrong_type(key, *found, expected);
  }
  for (const toml::node& item : *array) {
    std::optional<T> value = item.value_exact<T>();
    if constexpr (std::is_same_v<T, double>) {
      if (!value && item.is_integer()) {
        value = static_cast<double>(*item.value<int64_t>());
      }
    }
    if (!value || !is_finite(*value)) {
      node.wrong_type(key, *found, expected);
    }
    out.push_back(*value);
  }
  return out;
}

constexpr const char* kInt = "a whole number";
constexpr const char* kReal = "a finite number";
constexpr const char* kBool = "true or false";
constexpr const char* kString = "a string";

void check_used(const PlanNode& node) {
  const std::vector<std::string> known(node.asked.begin(), node.asked.end());
  const auto check = [&](const std::string& key, const std::string& place) {
    expect(node.asked.contains(key), "{}: unknown key '{}'{}", place, node.name_of(key),
           did_you_mean(key, known));
  };
  for (const auto& [key, value] : node.values) {
    check(std::string(key.str()), node.place_of(value));
  }
  for (const auto& [key, child] : node.tables) {
    check(key, child->place_of(child->values));
    check_used(*child);
  }
  for (const auto& [key, list] : node.lists) {
    check(key, list.front()->place_of(list.front()->values));
    for (const auto& child : list) {
      check_used(*child);
    }
  }
}

toml::table whole(const PlanNode& node) {
  toml::table out = node.values;
  for (const auto& [key, child] : node.tables) {
    out.insert_or_assign(key, whole(*child));
  }
  for (const auto& [key, list] : node.lists) {
    toml::array array;
    for (const auto& child : list) {
      array.push_back(whole(*child));
    }
    out.insert_or_assign(key, std::move(array));
  }
  return out;
}

}  // namespace

PlanTable PlanTable::read(const std::string& path) {
  return parse(read_text_file(path, size_t{1} << 20), path);
}

PlanTable PlanTable::parse(std::string_view text, const std::string& where) {
  expect_shallow(text, where);
  try {
    auto node = make_node(where, "", toml::parse(text));
    adopt(*node);
    return PlanTable(std::move(node));
  } catch (const toml::parse_error& error) {
    fail("{}:{}: {}", where, error.source().begin.line, error.description());
  } catch (const std::logic_error& error) {
    fail("{}:{}: {}", where, 1 + std::count(text.begin(), text.end(), '\n'), error.what());
  }
}

bool PlanTable::has(const std::string& key) const {
  const auto table = node_->tables.find(key);
  return node_->find(key) != nullptr || node_->lists.contains(key) ||
         (table != node_->tables.end() && table->second->given());
}

int64_t PlanTable::get_int(const std::string& key) const {
  return need<int64_t>(*node_, key, kInt);
}
int64_t PlanTable::get_int(const std::string& key, int64_t fallback) const {
  return find_value<int64_t>(*node_, key, kInt).value_or(fallback);
}
double PlanTable::get_real(const std::string& key) const {
  return need<double>(*node_, key, kReal);
}
double PlanTable::get_real(const std::string& key, double fallback) const {
  return find_value<double>(*node_, key, kReal).value_or(fallback);
}
bool PlanTable::get_bool(const std::string& key, bool fallback) const {
  return find_value<bool>(*node_, key, kBool).value_or(fallback);
}
std::string PlanTable::get_string(const std::string& key) const {
  return need<std::string>(*node_, key, kString);
}
std::string PlanTable::get_string(const std::string& key, const std::string& fallback) const {
  return find_value<std::string>(*node_, key, kString).value_or(fallback);
}
std::vector<int64_t> PlanTable::get_int_list(const std::string& key) const {
  return find_list<int64_t>(*node_, key, "a list of whole numbers");
}
std::vector<double> PlanTable::get_real_list(const std::string& key) const {
  return find_list<double>(*node_, key, "a list of numbers");
}
std::vector<std::string> PlanTable::get_string_list(const std::string& key) const {
  return find_list<std::string>(*node_, key, "a list of strings");
}

PlanTable PlanTable::table(const std::string& key) const {
  const toml::node* value = node_->find(key);
  if (value != nullptr) {
    node_->wrong_type(key, *value, "a table");
  }
  expect(!node_->lists.contains(key), "{}: {} must be one table [{}], got a list [[{}]]",
         node_->file, node_->name_of(key), key, key);
  auto it = node_->tables.find(key);
  if (it == node_->tables.end()) {
    it = node_->tables.emplace(key, make_node(node_->file, node_->name_of(key), {})).first;
    it->second->only_asked = true;
  }
  return PlanTable(it->second);
}

std::vector<PlanTable> PlanTable::tables(const std::string& key) const {
  std::vector<PlanTable> out;
  const toml::node* value = node_->find(key);
  if (value != nullptr) {
    node_->wrong_type(key, *value, "a list of tables");
  }
  expect(!node_->tables.contains(key), "{}: {} must be a list of tables [[{}]], got one table",
         node_->file, node_->name_of(key), key);
  const auto it = node_->lists.find(key);
  if (it != node_->lists.end()) {
    for (const auto& child : it->second) {
      out.push_back(PlanTable(child));
    }
  }
  return out;
}

std::vector<std::string> PlanTable::keys() const {
  std::vector<std::pair<uint32_t, std::string>> found;
  for (const auto& [key, value] : node_->values) {
    found.emplace_back(value.source().begin.line, key.str());
  }
  for (const auto& [key, child] : node_->tables) {
    if (child->given()) {
      found.emplace_back(child->values.source().begin.line, key);
    }
  }
  for (const auto& [key, list] : node_->lists) {
    found.emplace_back(list.front()->values.source().begin.line, key);
  }
  std::sort(found.begin(), found.end());
  std::vector<std::string> out;
  for (auto& [line, key] : found) {
    out.push_back(std::move(key));
  }
  return out;
}

void PlanTable::set(const std::string& dotted_key, const std::string& value) {
  const std::vector<std::string> parts = split(dotted_key, '.');
  PlanNode* node = node_.get();
  for (size_t i = 0; i + 1 < parts.size(); ++i) {
    auto& child = node->tables[parts[i]];
    if (child == nullptr) {
      child = make_node(node->file, node->name_of(parts[i]), {});
    }
    node = child.get();
  }
  toml::table parsed;
  try {
    parsed = toml::parse("value = " + value);
  } catch (const toml::parse_error&) {
    parsed.insert_or_assign("value", value);
  }
  node->values.insert_or_assign(parts.back(), *parsed.get("value"));
}

void PlanTable::set_all(const std::vector<std::string>& assignments) {
  for (const std::string& entry : assignments) {
    const size_t at = entry.find('=');
    expect(at != std::string::npos && at > 0, "--set: expected key=value, got '{}'", entry);
    set(entry.substr(0, at), entry.substr(at + 1));
  }
}

void PlanTable::expect_all_used() const {
  check_used(*node_);
}

std::string PlanTable::where() const {
  return node_->path.empty() ? node_->file : fmt::format("{} [{}]", node_->file, node_->path);
}

std::string PlanTable::place(const std::string& key) const {
  const toml::node* found = node_->find(key);
  return fmt::format("{}: {}", found == nullptr ? node_->file : node_->place_of(*found),
                     node_->name_of(key));
}

std::string PlanTable::to_text() const {
  std::ostringstream out;
  out << whole(*node_) << "\n";
  return out.str();
}

}  // namespace cambium
