// How the tensors of a family's checkpoints stand for our parameters: a table from which reading,
// writing and strict checking all derive.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace cambium {

struct ModelSpec;

/// One row of a family's table. `*` stands for one or more characters, and those of `theirs` take
/// what those of `ours` matched, in order: {"layers.*.mixer.*", "model.layers.*.self_attn.*"}. The
/// first row that matches names the tensor that is written; any row that matches may be read.
struct TensorRule {
  const char* ours;
  const char* theirs;
  /// Only in layers whose mixer is of this kind; empty = in all.
  std::string_view mixer{};
  /// Only where the output head is the embedding.
  bool tied = false;
  /// Our parameter is part `part` of `parts` equal blocks of the tensor's rows (a fused
  /// projection).
  int part = 0;
  int parts = 1;
};

/// An option of a mixer that its tensor's first axis says better than config.json does.
struct SizeRule {
  const char* mixer;
  const char* option;
  const char* parameter;  // relative to the layer
};

/// A tensor that stands for a parameter, or part `part` of `parts` of one.
struct StoredName {
  std::string tensor;
  int part = 0;
  int parts = 1;
};

/// What `*` of the pattern matched, or false.
bool match_pattern(std::string_view pattern, std::string_view text,
                   std::vector<std::string_view>* captures = nullptr);

/// The tensors that may hold our parameter, by the rows of the table in order.
std::vector<StoredName> stored_names(const std::vector<TensorRule>& rules, const ModelSpec& spec,
                                     const std::string& ours);

}  // namespace cambium
