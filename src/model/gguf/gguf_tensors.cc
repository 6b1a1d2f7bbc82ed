#include "model/gguf/gguf_tensors.h"

#include <algorithm>
#include <cmath>

#include "base/error.h"

namespace cambium {
namespace {

/// The unit of "layers.N.NAME....".
const UnitSpec& unit_of(const ModelSpec& spec, const std::string& ours) {
  std::vector<std::string_view> captures;
  CAMBIUM_CHECK(match_pattern("layers.*.*", ours, &captures), "{}", ours);
  const LayerSpec& layer = spec.layers.at(std::stoul(std::string(captures[0])));
  for (const BranchSpec& branch : layer.branches) {
    for (const UnitSpec& unit : branch.units) {
      if (captures[1].starts_with(unit_name(unit) + ".")) {
        return unit;
      }
    }
  }
  fail("{} belongs to no unit", ours);
}

/// Pieces are single runs where orders are said.
void reorder_rows(StoredPiece& piece, const std::vector<PieceLoop>& loops) {
  CAMBIUM_CHECK(piece.is_one_run(), "{}", piece.tensor);
  piece.loops = loops;
}

/// Keys' and values' rows of each head: (heads, nope + value, rank) in ours.
StoredForm split_latent(const StoredPiece& whole, const UnitSpec& unit, const Parameter& p) {
  const int64_t heads = unit.options.integer(unit.kind, "heads");
  const int64_t nope = unit.options.integer(unit.kind, "nope_dim");
  const int64_t value = unit.options.integer(unit.kind, "value_dim");
  const int64_t rank = p.shape[1];
  const int64_t head = (nope + value) * rank;
  const auto named = [&](const char* part) {
    std::string name = whole.tensor;
    const size_t at = name.find("attn_kv_b");
    CAMBIUM_CHECK(at != std::string::npos, "{}", name);
    return name.replace(at, 9, part);
  };
  return {{named("attn_k_b"),
           {heads, rank, nope},
           0,
           0,
           {{heads, head, rank * nope}, {nope, rank, 1}, {rank, 1, nope}}},
          {named("attn_v_b"),
           {heads, value, rank},
           nope * rank,
           0,
           {{heads, head, value * rank}, {value * rank, 1, 1}}}};
}

/// Half h of pair i stands at row 2 i + h of its head; the rest of the head does not turn.
StoredForm neighbouring_pairs(const StoredPiece& whole, int64_t heads, const Parameter& p,
                              int64_t turning) {
  const int64_t head = p.shape[0] / heads;
  const int64_t half = turning / 2;
  const int64_t columns = whole.count() / p.shape[0];
  StoredPiece pairs = whole;
  reorder_rows(pairs, {{heads, head * columns, head * columns},
                       {2, half * columns, columns},
                       {half, columns, 2 * columns},
                       {columns, 1, 1}});
  if (turning == head) {
    return {pairs};
  }
  StoredPiece rest = whole;
  reorder_rows(rest, {{heads, head * columns, head * columns}, {(head - turning) * columns, 1, 1}});
  rest.ours += turning * columns;
  rest.theirs += turning * columns;
  return {pairs, rest};
}

void tile(StoredPiece& piece, const GgufOrder& rule, const UnitSpec& unit, const Parameter& p) {
  const int64_t heads = unit.options.integer(unit.kind, rule.heads);
  const int64_t count = piece.count();
  // Head k s + j, which shares key head k with s others, stands at j k_heads + k.
  const int64_t groups = unit.options.integer(unit.kind, rule.groups);
  const int64_t share = heads / groups;
  const int64_t rows = rule.kind == GgufOrder::kTiledIn ? p.shape[0] : 1;
  const int64_t head = count / rows / heads;
  std::vector<PieceLoop> loops = {
      {groups, share * head, head}, {share, head, groups * head}, {head, 1, 1}};
  if (rows > 1) {
    loops.insert(loops.begin(), {rows, heads * head, heads * head});
  }
  reorder_rows(piece, loops);
}

/// Whether the piece is the block of the parameter that the rule means, or all of it.
bool means(const GgufOrder& rule, const StoredPiece& piece, const Parameter& p,
           const std::string& ours) {
  const size_t colon = rule.ours.find(':');
  if (!match_pattern(rule.ours.substr(0, colon), ours)) {
    return false;
  }
  if (colon == std::string_view::npos) {
    return true;
  }
  const std::string_view block = rule.ours.substr(colon + 1);
  const bool there = std::any_of(p.blocks.begin(), p.blocks.end(),
                                 [&](const RowBlock& one) { return one.name == block; });
  return there && piece.ours == rows_of(p, block).begin * (p.numel() / p.shape[0]);
}

void reshape(StoredPiece& piece, const GgufShape& rule, const ModelSpec& spec,
             const std::string& ours) {
  std::vector<int64_t>& shape = piece.shape;
  switch (rule.kind) {
    case GgufShape::kSqueezed:
      shape.erase(std::remove(shape.begin() + 1, shape.end() - 1, 1), shape.end() - 1);
      break;
    case GgufShape::kColumn:
      shape.push_back(1);
      break;
    case GgufShape::kByGroup: {
      const UnitSpec& unit = unit_of(spec, ours);
      const int64_t groups = unit.options.integer(unit.kind, "b_heads");
      shape = {groups, shape[0] / groups};
      break;
    }
  }
}

void apply(GgufValues::Kind kind, bool to_file, std::span<float> values,
           const std::string& tensor) {
  for (float& x : values) {
    switch (kind) {
      case GgufValues::kPlusOne:
        x += to_file ? 1.0F : -1.0F;
        break;
      case GgufValues::kMinusExp:
      case GgufValues::kExp: {
        const float sign = kind == GgufValues::kExp ? 1.0F : -1.0F;
        expect(to_file || sign * x > 0.0F, "tensor '{}' holds {}, expected numbers {} 0", tensor, x,
               sign > 0.0F ? "above" : "below");
        x = to_file ? sign * std::exp(x) : std::log(sign * x);
        break;
      }
    }
  }
}

void apply_all(const GgufArchitecture& row, const std::string& tensor, bool to_file,
               std::span<float> values) {
  for (const GgufValues& rule : row.values) {
    if (match_pattern(rule.tensor, tensor)) {
      apply(rule.kind, to_file, values, tensor);
    }
  }
}

}  // namespace

StoredForm gguf_form(const GgufArchitecture& row, const ModelSpec& spec,
                     const ParametersByName& parameters, const std::string& ours) {
  const Parameter& p = *parameters.at(ours);
  for (const GgufNumbers& numbers : row.numbers) {
    std::vector<std::string_view> captures;
    if (!numbers.ours.empty() && match_pattern(numbers.ours, ours, &captures)) {
      return {{fmt::format("{}#{}", numbers.key, captures[0]), {1}, 0, 0, {{1, 1, 1}}}};
    }
  }
  expect(!find_names(row.tensors, spec, ours).empty(),
         "a {} model with {} cannot be written as GGUF: llama.cpp's {} has no tensor for it",
         spec.family, ours, row.name);
  StoredForm form = stored_forms(row.tensors, spec, parameters, ours).front();
  for (const GgufOrder& rule : row.orders) {
    for (StoredPiece& piece : form) {
      if (!means(rule, piece, p, ours)) {
        continue;
      }
      const UnitSpec& unit = unit_of(spec, ours);
      if (rule.kind == GgufOrder::kLatent) {
        return split_latent(piece, unit, p);
      }
      if (rule.kind == GgufOrder::kPairs && unit.kind == "attention") {
        form = neighbouring_pairs(piece, unit.options.integer("attention", rule.heads), p,
                                  spec.rope.dim);
        break;
      }
      if (rule.kind == GgufOrder::kTiled || rule.kind == GgufOrder::kTiledIn) {
        tile(piece, rule, unit, p);
      }
    }
  }
  for (const GgufShape& rule : row.shapes) {
    for (StoredPiece& piece : form) {
      if (match_pattern(rule.tensor, piece.tensor)) {
        reshape(piece, rule, spec, ours);
      }
    }
  }
  return form;
}

std::optional<std::pair<std::string, int64_t>> gguf_number(const std::string& tensor) {
  const size_t mark = tensor.find('#');
  if (mark == std::string::npos) {
    return std::nullopt;
  }
  return std::pair(tensor.substr(0, mark), std::stoll(tensor.substr(mark + 1)));
}

void to_gguf_values(const GgufArchitecture& row, const std::string& tensor,
                    std::span<float> values) {
  apply_all(row, tensor, true, values);
}

void from_gguf_values(const GgufArchitecture& row, const std::string& tensor,
                      std::span<float> values) {
  apply_all(row, tensor, false, values);
}

void multiply_rows(const GgufFactors& factors, const std::string& ours, const Parameter& parameter,
                   std::span<float> values) {
  const int64_t columns = parameter.numel() / parameter.shape[0];
  const auto multiply = [&](const std::string& name, RowRange rows) {
    const auto it = factors.find(name);
    if (it == factors.end()) {
      return;
    }
    for (float& x : values.subspan(static_cast<size_t>(rows.begin * columns),
                                   static_cast<size_t>(rows.count * columns))) {
      x *= it->second;
    }
  };
  multiply(ours, {0, parameter.shape[0]});
  for (const RowBlock& block : parameter.blocks) {
    multiply(fmt::format("{}:{}", ours, block.name), rows_of(parameter, block.name));
  }
}

}  // namespace cambium
