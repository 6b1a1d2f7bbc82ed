// ModelSpec: a model as data. A family file reads one from config.json; the graft edits it; Model
// builds it.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "model/tensor_rules.h"
#include "nn/layer.h"
#include "ops/rope/rope.h"

namespace cambium {

/// A placement of a supernet with a name (model/supernet.h).
struct Preset {
  std::string name;
  std::vector<int> active;  // of each layer the unit of its choice that runs, -1 = it has no choice
  friend bool operator==(const Preset&, const Preset&) = default;
};

struct KeptTensors;  // model/kept_tensors.h

/// What a checkpoint has besides the model: heads that predict more tokens (MTP). Their tensors are
/// kept as they are stored, from reading to writing, and never run. Models that differ in nothing
/// else are the same.
struct KeptSpec {
  std::string family;  // the checkpoint's, by whose names and config.json they are known
  int64_t heads = 0;   // how many tokens more
  std::string kinds;   // of their layers, where config.json says them (Nemotron-3)
  /// Null where there are none, or a configuration was read alone.
  std::shared_ptr<const KeptTensors> tensors;

  friend bool operator==(const KeptSpec& /*a*/, const KeptSpec& /*b*/) { return true; }
};

struct ModelSpec {
  std::string family;  // row of the table of families (families/registry.cc)
  int64_t vocab = 0;
  int64_t width = 0;
  std::vector<LayerSpec> layers;
  NormSpec norm{};  // the last one, before the output head
  /// Factors of the embedding and of what the head reads.
  float embedding_scale = 1.0F;
  float logit_scale = 1.0F;
  /// Logits are cap tanh(logits / cap); 0 = as they are.
  float logit_cap = 0.0F;
  RopeConfig rope{};
  /// Those that LayerSpec::rope counts from 1 on.
  std::vector<RopeConfig> more_ropes{};
  bool tied_head = false;  // the output head is the embedding
  int64_t max_positions = 0;
  int64_t bos_id = -1;
  std::vector<int64_t> eos_ids;
  std::vector<Preset> presets{};
  KeptSpec kept{};
  friend bool operator==(const ModelSpec&, const ModelSpec&) = default;

  const RopeConfig& rope_of(const LayerSpec& layer) const {
    return layer.rope == 0 ? rope : more_ropes.at(static_cast<size_t>(layer.rope) - 1);
  }
};

/// What the names of a unit's parameters begin with, such as "layers.3.mixer.".
std::string unit_prefix(int64_t layer, const UnitSpec& unit);
/// Layers whose mixers are others than the teacher's in the same place; without a teacher, layers
/// whose mixer is not full attention, as if the teacher had nothing else.
std::vector<int64_t> converted_layers(const ModelSpec& spec, const ModelSpec* teacher = nullptr);
/// The prefixes of the mixers that the teacher does not have in the same layer.
/// Those of a choice are all meant, whichever runs.
std::vector<std::string> converted_mixers(const ModelSpec& spec, const ModelSpec& teacher);
/// The prefixes of the mixers of full attention.
std::vector<std::string> attention_mixers(const ModelSpec& spec);
/// Whether a parameter's name begins with one of the prefixes.
bool starts_with_one(const std::string& name, const std::vector<std::string>& prefixes);
/// "AAMMG": the letters of the table of units, one a layer: that of its mixer, or of its
/// feed-forward where it has no mixer, "(A2)" where several mixers stand side by side, - where
/// nothing is left.
std::string layer_map(const ModelSpec& spec);
/// The kind that speaks for a layer in tables: of its mixer, or of its feed-forward where it has no
/// mixer, or "removed".
std::string layer_kind(const LayerSpec& layer);

/// A file that stands beside config.json, the same in every checkpoint of its family.
struct CodeFile {
  const char* name;
  const char* text;
};

/// A tensor of a head that predicts one token more, beside those of its layers.
struct MtpTensor {
  enum class Place : uint8_t { kFirst, kLast };  // `#`: the number of that layer of the head
  enum class Shape : uint8_t { kNorm, kJoin, kTokens };  // (C), (C, 2 C), (V, C)
  const char* name;
  Shape shape = Shape::kNorm;
  Place place = Place::kFirst;
  bool optional = false;
};

/// The heads of a family's checkpoints that predict more tokens (MTP).
struct MtpRules {
  /// Patterns of their tensors; `#` is the number of a layer after the model's last.
  std::vector<std::string> tensors{};
  /// The key of config.json that says how many there are, and how many where it does not.
  const char* count = "num_nextn_predict_layers";
  int64_t otherwise = 0;
  /// The layers of all heads, a head's after the other's; null = whatever the patterns match is
  /// kept, without a look at names and shapes. `kinds` is what `kinds_key` of config.json says.
  std::vector<LayerSpec> (*layers)(const ModelSpec& spec, int64_t heads,
                                   const std::string& kinds) = nullptr;
  const char* kinds_key = nullptr;
  /// They are named "mtp.layers.0" and so on, in place of going on with the model's numbers.
  bool apart = false;
  std::vector<MtpTensor> own{};
};

/// A family of checkpoints: how its config.json and tensors map to ours.
struct Family {
  const char* name;
  /// Values of config.json's model_type that this family reads.
  std::vector<std::string> model_types;
  ModelSpec (*read_config)(const std::string& config_json, const std::string& where);
  /// config.json for a spec the family can express; Error where it cannot.
  std::string (*write_config)(const ModelSpec& spec);
  std::vector<TensorRule> tensors;
  /// Patterns of tensors that hold nothing a config does not say.
  std::vector<std::string> ignored{};
  std::vector<SizeRule> sizes{};
  std::vector<ConstantRule> constants{};
  MtpRules mtp{};
  /// Files that are written beside config.json: the code by which other programs run it.
  std::vector<CodeFile> code{};

  /// The tensor that our parameter is written to, for example "layers.0.mixer.q_proj.weight" ->
  /// "model.layers.0.self_attn.q_proj.weight".
  std::string tensor_name(const ModelSpec& spec, const std::string& ours) const {
    return stored_names(tensors, spec, ours).front();
  }
};

/// Whether the family's configuration says all of the spec: it reads back as it was.
bool expresses(const Family& family, const ModelSpec& spec);
/// Its own family where that says all of it, our own layout otherwise.
std::string fitting_family(const ModelSpec& spec);

const std::vector<Family>& families();
const Family& find_family(const std::string& name);
/// Reads DIR/config.json with the family its model_type names, and from the headers of the weights
/// beside it what a config.json gets wrong (dt_rank). A config.json that is not what the folder's
/// checksums.json says is an Error. `dir` may also be a configuration file of any
/// name, which is read alone. With a preset's name, the plain hybrid that the preset is.
ModelSpec read_spec(const std::filesystem::path& dir, const std::string& preset = {});

}  // namespace cambium
