#include "model/tensor_rules.h"

#include <algorithm>

#include "base/error.h"
#include "model/spec.h"

namespace cambium {
namespace {

/// Layer of "layers.N....".
const LayerSpec* layer_of(const ModelSpec& spec, std::string_view ours) {
  std::vector<std::string_view> captures;
  if (!match_pattern("layers.*.*", ours, &captures)) {
    return nullptr;
  }
  return &spec.layers.at(std::stoul(std::string(captures[0])));
}

/// The unit whose parameter this is, of "layers.N.NAME."; null for a norm's.
const UnitSpec* unit_of(const LayerSpec& layer, std::string_view ours) {
  std::vector<std::string_view> captures;
  CAMBIUM_CHECK(match_pattern("layers.*.*", ours, &captures), "{}", ours);
  for (const BranchSpec& branch : layer.branches) {
    for (const UnitSpec& unit : branch.units) {
      if (captures[1].starts_with(unit_name(unit) + ".")) {
        return &unit;
      }
    }
  }
  return nullptr;
}

bool has_unit(const LayerSpec& layer, std::string_view kind) {
  return std::any_of(layer.branches.begin(), layer.branches.end(), [&](const BranchSpec& branch) {
    return std::any_of(branch.units.begin(), branch.units.end(),
                       [&](const UnitSpec& unit) { return unit.kind == kind; });
  });
}

/// Whether the row of the table holds for the layer and the head.
bool holds(const TensorRule& rule, const ModelSpec& spec, const std::string& ours) {
  if (rule.tied && !spec.tied_head) {
    return false;
  }
  if (rule.mixer.empty()) {
    return true;
  }
  const LayerSpec* layer = layer_of(spec, ours);
  if (layer == nullptr) {
    return false;
  }
  const UnitSpec* unit = unit_of(*layer, ours);
  const bool of_mixer = unit != nullptr && find_unit_kind(unit->kind).role == UnitRole::kMixer;
  return of_mixer ? unit->kind == rule.mixer : has_unit(*layer, rule.mixer);
}

std::vector<std::string_view> parts_of(const TensorRule& rule) {
  return rule.rows.empty() ? std::vector<std::string_view>{rule.ours} : rule.rows;
}

/// "name:block".
std::pair<std::string_view, std::string_view> split_block(std::string_view part) {
  const size_t colon = part.find(':');
  return {part.substr(0, colon),
          colon == std::string_view::npos ? std::string_view() : part.substr(colon + 1)};
}

/// The tensor of one entry of a stack.
std::string numbered(const std::string& tensor, int64_t entry) {
  std::string name = tensor;
  if (const size_t mark = name.find('#'); mark != std::string::npos) {
    name.replace(mark, 1, std::to_string(entry));
  }
  return name;
}

/// Loops of one element go, and neighbours that step alike become one.
std::vector<PieceLoop> merged(const std::vector<PieceLoop>& loops) {
  std::vector<PieceLoop> result;
  for (const PieceLoop& loop : loops) {
    if (loop.count == 1) {
      continue;
    }
    if (!result.empty() && result.back().ours == loop.count * loop.ours &&
        result.back().theirs == loop.count * loop.theirs) {
      result.back() = {result.back().count * loop.count, loop.ours, loop.theirs};
    } else {
      result.push_back(loop);
    }
  }
  if (result.empty()) {
    result.push_back({1, 1, 1});
  }
  return result;
}

/// Rows of a parameter, or of a block of it.
RowRange rows_in(const Parameter& p, std::string_view block, size_t axis) {
  return block.empty() ? RowRange{0, p.shape[axis]} : rows_of(p, block);
}

/// Where part `index` of the rule's tensor goes, the stars being `captures`.
StoredForm place(const TensorRule& rule, size_t index, const ModelSpec& spec,
                 const ParametersByName& parameters,
                 const std::vector<std::string_view>& captures) {
  const std::string theirs = fill_pattern(rule.theirs, captures);
  const bool numbers = theirs.find('#') != std::string::npos;
  const size_t axis = rule.stacked || numbers ? 1 : 0;
  int64_t total = 0;
  int64_t before = 0;
  RowRange own;
  const Parameter* p = nullptr;
  std::string ours;
  const std::vector<std::string_view> parts = parts_of(rule);
  for (size_t i = 0; i < parts.size(); ++i) {
    const auto [pattern, block] = split_block(parts[i]);
    const std::string name = fill_pattern(pattern, captures);
    const auto it = parameters.find(name);
    CAMBIUM_CHECK(it != parameters.end() && it->second->shape.size() > axis,
                  "{} has rows of {}, which the model has not", theirs, name);
    const RowRange rows = rows_in(*it->second, block, axis);
    if (i == index) {
      p = it->second;
      ours = name;
      own = rows;
      before = total;
    }
    total += rows.count;
  }
  int64_t groups = 1;
  if (rule.groups == kEveryRow) {
    groups = own.count;
  } else if (!rule.groups.empty()) {
    const LayerSpec* layer = layer_of(spec, ours);
    const UnitSpec* unit = layer == nullptr ? nullptr : unit_of(*layer, ours);
    CAMBIUM_CHECK(unit != nullptr, "{} belongs to no unit", ours);
    groups = unit->options.integer(unit->kind, rule.groups);
  }
  CAMBIUM_CHECK(total % groups == 0 && before % groups == 0 && own.count % groups == 0,
                "{} of {} rows in {} groups", ours, own.count, groups);
  const int64_t entries = axis == 1 ? p->shape[0] : 1;
  int64_t columns = 1;
  StoredPiece piece{theirs, {}, 0, 0, {}};
  for (size_t i = axis + 1; i < p->shape.size(); ++i) {
    columns *= p->shape[i];
  }
  if (rule.stacked) {
    piece.shape.push_back(entries);
  }
  if (rule.transposed) {
    piece.shape.insert(piece.shape.end(), {columns, total});
  } else {
    piece.shape.push_back(total);
    piece.shape.insert(piece.shape.end(), p->shape.begin() + static_cast<ptrdiff_t>(axis) + 1,
                       p->shape.end());
  }
  piece.shape.insert(piece.shape.begin(), static_cast<size_t>(rule.ones_before), 1);
  piece.shape.insert(piece.shape.end(), static_cast<size_t>(rule.ones_after), 1);
  // Steps from a row to the next and from a column to the next, over there.
  const int64_t row = rule.transposed ? 1 : columns;
  const int64_t column = rule.transposed ? total : 1;
  const int64_t share = own.count / groups;
  const int64_t entry = p->shape[axis] * columns;
  std::vector<PieceLoop> loops = {
      {groups, share * columns, total / groups * row}, {share, columns, row}, {columns, 1, column}};
  piece.ours = own.begin * columns;
  piece.theirs = before / groups * row;
  if (!numbers) {
    loops.insert(loops.begin(), {entries, entry, total * columns});
  }
  piece.loops = merged(loops);
  StoredForm form;
  for (int64_t i = 0; i < (numbers ? entries : 1); ++i) {
    StoredPiece& made = form.emplace_back(piece);
    made.tensor = numbered(theirs, i);
    made.ours += i * entry;
  }
  return form;
}

}  // namespace

std::string fill_pattern(std::string_view pattern, const std::vector<std::string_view>& captures) {
  std::string text;
  size_t next = 0;
  for (const char c : pattern) {
    if (c == '*') {
      CAMBIUM_CHECK(next < captures.size(), "{} has more stars than its rule", pattern);
      text += captures[next++];
    } else {
      text += c;
    }
  }
  return text;
}

bool match_pattern(std::string_view pattern, std::string_view text,
                   std::vector<std::string_view>* captures) {
  while (!pattern.empty()) {
    if (pattern.front() != '*') {
      if (text.empty() || text.front() != pattern.front()) {
        return false;
      }
      pattern.remove_prefix(1);
      text.remove_prefix(1);
      continue;
    }
    pattern.remove_prefix(1);
    // A star takes up to where the literal text after it first stands.
    const std::string_view literal = pattern.substr(0, pattern.find('*'));
    const size_t end = literal.empty() ? text.size() : text.find(literal, 1);
    if (text.empty() || end == std::string_view::npos) {
      return false;
    }
    if (captures != nullptr) {
      captures->push_back(text.substr(0, end));
    }
    text.remove_prefix(end);
  }
  return text.empty();
}

int64_t StoredPiece::count() const {
  int64_t n = 1;
  for (const PieceLoop& loop : loops) {
    n *= loop.count;
  }
  return n;
}

std::vector<std::string> find_names(const std::vector<TensorRule>& rules, const ModelSpec& spec,
                                    const std::string& ours) {
  std::vector<std::string> names;
  for (const TensorRule& rule : rules) {
    for (const std::string_view part : parts_of(rule)) {
      std::vector<std::string_view> captures;
      if (match_pattern(split_block(part).first, ours, &captures) && holds(rule, spec, ours)) {
        names.push_back(numbered(fill_pattern(rule.theirs, captures), 0));
      }
    }
  }
  return names;
}

std::vector<std::string> stored_names(const std::vector<TensorRule>& rules, const ModelSpec& spec,
                                      const std::string& ours) {
  std::vector<std::string> names = find_names(rules, spec, ours);
  CAMBIUM_CHECK(!names.empty(), "no rule of {} names the tensor of {}", spec.family, ours);
  return names;
}

std::vector<StoredForm> stored_forms(const std::vector<TensorRule>& rules, const ModelSpec& spec,
                                     const ParametersByName& parameters, const std::string& ours) {
  const std::vector<RowBlock>& blocks = parameters.at(ours)->blocks;
  std::vector<StoredForm> by_block(blocks.size());
  std::vector<StoredForm> forms;
  for (const TensorRule& rule : rules) {
    const std::vector<std::string_view> parts = parts_of(rule);
    for (size_t i = 0; i < parts.size(); ++i) {
      const auto [pattern, block] = split_block(parts[i]);
      std::vector<std::string_view> captures;
      if (!match_pattern(pattern, ours, &captures) || !holds(rule, spec, ours)) {
        continue;
      }
      if (block.empty()) {
        forms.push_back(place(rule, i, spec, parameters, captures));
        continue;
      }
      const auto found = std::find_if(
          blocks.begin(), blocks.end(),
          [wanted = block](const RowBlock& candidate) { return candidate.name == wanted; });
      if (found != blocks.end() && by_block[static_cast<size_t>(found - blocks.begin())].empty()) {
        by_block[static_cast<size_t>(found - blocks.begin())] =
            place(rule, i, spec, parameters, captures);
      }
    }
  }
  const auto is_placed = [](const StoredForm& form) { return !form.empty(); };
  if (!by_block.empty() && std::all_of(by_block.begin(), by_block.end(), is_placed)) {
    StoredForm& all = *forms.insert(forms.begin(), StoredForm{});
    for (const StoredForm& form : by_block) {
      all.insert(all.end(), form.begin(), form.end());
    }
  }
  CAMBIUM_CHECK(!forms.empty(), "no rule of {} names the tensor of {}", spec.family, ours);
  return forms;
}

}  // namespace cambium
