// What configurations of hybrids spell alike. Private to the families.
#pragma once

#include "model/families/config.h"

namespace cambium::config {

/// Attention of these sizes, with the model's rotation.
UnitSpec attention_of(const Sizes& sizes);
/// Its keys: heads, key-value heads, head_dim; no biases.
void write_attention(Json& config, const Options& attention);
/// What read_model reads, with the names of the family.
Json begin_config(const ModelSpec& spec, const char* architecture, const char* model_type);
/// Error where one of the flags is true.
void refuse_flags(const Json& config, std::initializer_list<const char*> keys,
                  const std::string& where);
/// Which layers are of a kind: those whose index leaves `offset` when divided by `period`.
struct Every {
  int64_t period = 1, offset = 0;
  bool has(int64_t layer) const { return layer % period == offset; }
};
/// What could say which layers are marked, if anything of this form can.
Every every_of(const std::vector<bool>& marked);

/// The names of Granite's feed-forwards, dense ones and experts, after the family's own `more`.
std::vector<TensorRule> granite_tensors(std::vector<TensorRule> more = {});
/// The names of Jamba's checkpoints, which Bamba and Falcon-H1 took over, after the family's own
/// `more`, which win.
std::vector<TensorRule> jamba_tensors(std::vector<TensorRule> more);

}  // namespace cambium::config
