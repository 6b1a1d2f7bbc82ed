// How the tensors of a family's checkpoints stand for our parameters: a table from which reading,
// writing and strict checking all derive.
#pragma once

#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "nn/parameter.h"

namespace cambium {

struct ModelSpec;

/// TensorRule::groups: every row is a group, so that the rows of the parts take turns.
inline constexpr std::string_view kEveryRow = "*";

/// One row of a family's table. `*` stands for one or more characters, and those of `theirs` take
/// what those of `ours` matched, in order: {"layers.*.mixer.*", "model.layers.*.self_attn.*"}. The
/// first row that matches names the tensor that is written; any row that matches may be read.
///
/// Rows are the first axis of a parameter, of a stacked one the second. A fused tensor names what
/// its rows are made of, in their order, and the sizes of the parts are those of the parameters:
///   {.theirs = "model.layers.*.self_attn.qkv_proj.*",
///    .rows = {"layers.*.mixer.q_proj.*", "layers.*.mixer.k_proj.*", "layers.*.mixer.v_proj.*"}}
/// "name:block" is a row block of a parameter (RowBlock): a parameter whose blocks all have rows
/// in the table is read from, and written to, the tensors that those name.
struct TensorRule {
  const char* ours = "";
  /// `#` counts the entries of a stacked parameter, each of which is a tensor of its own.
  std::string theirs{};
  /// Only for the parameters of a mixer of this kind, and for what else a layer with one has; empty
  /// = for all.
  std::string_view mixer{};
  /// Only where the output head is the embedding.
  bool tied = false;
  /// In place of `ours`.
  std::vector<std::string_view> rows{};
  /// The rows repeat so many times, each time with an equal share of every part: an option of the
  /// unit that the parameters belong to ("heads"), or kEveryRow.
  std::string_view groups{};
  /// The first axis counts entries (experts), and the rows are the second.
  bool stacked = false;
  /// Theirs has its last two axes the other way round: (..., columns, rows).
  bool transposed = false;
  /// Theirs has so many axes of one before and after ours: (1, 1, H, 1).
  int ones_before = 0;
  int ones_after = 0;
};

/// An option of a mixer that its tensor's first axis says better than config.json does.
struct SizeRule {
  const char* mixer;
  const char* option;
  const char* parameter;  // relative to the layer
};

/// A tensor of one number that the family's programs look for and no configuration changes: it is
/// checked where it is read, and written beside the parameter `ours`.
struct ConstantRule {
  const char* ours;
  const char* theirs;
  double value;
};

/// One loop over elements, with the steps it takes in our parameter and in their tensor.
struct PieceLoop {
  int64_t count = 0, ours = 0, theirs = 0;
};

/// Elements of a parameter that lie in one stored tensor. Loops are nested, the first outermost;
/// those that step through both sides alike are one loop.
struct StoredPiece {
  std::string tensor;
  std::vector<int64_t> shape;  // of the whole stored tensor
  int64_t ours = 0;            // the first element, in our parameter
  int64_t theirs = 0;          // and in their tensor
  std::vector<PieceLoop> loops;

  int64_t count() const;
  /// Elements lie one after the other on both sides, in as many runs as the outer loops say.
  bool has_runs() const { return loops.back().ours == 1 && loops.back().theirs == 1; }
  bool is_one_run() const { return loops.size() == 1 && has_runs(); }
};

/// Pieces that together are a parameter.
using StoredForm = std::vector<StoredPiece>;
using ParametersByName = std::map<std::string, const Parameter*>;

/// What `*` of the pattern matched, or false.
bool match_pattern(std::string_view pattern, std::string_view text,
                   std::vector<std::string_view>* captures = nullptr);

/// The pattern with its stars filled.
std::string fill_pattern(std::string_view pattern, const std::vector<std::string_view>& captures);

/// The tensors that may hold our parameter, or some of its rows, by the rows of the table in order;
/// none where it has no row.
std::vector<std::string> find_names(const std::vector<TensorRule>& rules, const ModelSpec& spec,
                                    const std::string& ours);
/// The same of a table that has all of the model's parameters.
std::vector<std::string> stored_names(const std::vector<TensorRule>& rules, const ModelSpec& spec,
                                      const std::string& ours);
/// The ways in which our parameter may be stored; the first is how it is written. `parameters`: all
/// those of a model of `spec`, for the sizes of what shares a tensor.
std::vector<StoredForm> stored_forms(const std::vector<TensorRule>& rules, const ModelSpec& spec,
                                     const ParametersByName& parameters, const std::string& ours);

}  // namespace cambium
