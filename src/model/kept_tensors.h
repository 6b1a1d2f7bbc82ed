// Tensors of a checkpoint that travel with a model and are not part of it: heads that predict more
// tokens (MTP). They stay in their file, mapped, until a checkpoint is written; no device and no
// training ever sees them.
#pragma once

#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "files/safetensors.h"
#include "model/spec.h"

namespace cambium {

struct KeptTensors {
  std::shared_ptr<const SafeTensors> file;
  std::vector<TensorEntry> entries;

  /// Numbers, without the scales of packed ones.
  int64_t numbers() const;
};

/// What config.json says of the heads, without their tensors.
KeptSpec read_kept(const nlohmann::ordered_json& config, const Family& family,
                   const std::string& where);
/// Takes the heads' tensors from the folder's files, by their headers, into spec.kept. Error where
/// they are not those that config.json asks for, by name and shape; a file without any is fine,
/// unless it is of our own layout and says that it has some.
void take_kept(ModelSpec& spec, const KeptSpec& said, const Family& family,
               const std::shared_ptr<const SafeTensors>& file);
/// The keys of config.json for what a model keeps; nothing where it keeps nothing.
void write_kept(nlohmann::ordered_json& config, const ModelSpec& spec);
/// The tensors to write: byte for byte, in our own layout under "kept.".
std::vector<TensorSource> kept_sources(const ModelSpec& spec);
/// One line for people, or nothing: how many tokens more, of what size, and whether the layers that
/// the heads were trained with have changed.
std::string describe_kept(const ModelSpec& spec);
/// Whether the heads were trained with other layers than the model has now.
bool kept_is_stale(const ModelSpec& spec);

}  // namespace cambium
