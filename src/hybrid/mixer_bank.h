// Mixers that are ready for every layer, by kind, to put hybrids together from: a teacher's
// attention and, for each other kind, a whole conversion of the teacher ("bank"), as `convert`
// makes it and `distill --objective align` trains it.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "hybrid/surrogate.h"
#include "model/supernet.h"

namespace cambium {

/// The name of kind 0.
inline constexpr const char* kAttentionKind = "attention";
/// What a mixer that stands beside attention is named within its layer.
inline constexpr const char* kBeside = "beside";

class MixerBank {
 public:
  /// The teacher, or a hybrid some of whose attention is left, must outlive the bank. Error where
  /// it has no attention layer.
  explicit MixerBank(Model& teacher);

  /// Adds a conversion, which came from `where`. Error unless it is the teacher but for the mixers
  /// of its attention layers, at least one of which is another; attention that is left there is
  /// only not to be had as this kind.
  void add(const std::string& kind, LoadedModel model, const std::string& where);

  Model& teacher() const { return teacher_; }
  /// "attention" first.
  const std::vector<std::string>& kinds() const { return kinds_; }
  /// The teacher's attention layers: what a placement is about.
  const std::vector<int64_t>& layers() const { return layers_; }
  /// Whether the open layer at this place can have the kind.
  bool has(int64_t place, int kind) const;
  /// Error that begins with `who` unless every open layer can have the kind.
  void expect_everywhere(int kind, const std::string& who) const;
  /// Of the kind's mixers: settings and weights. "" of attention.
  const std::string& digest(int kind) const { return digests_[static_cast<size_t>(kind)]; }
  /// Where a kind came from. "" of attention.
  const std::string& source(int kind) const { return sources_[static_cast<size_t>(kind)]; }

  /// The hybrid's spec. `choices` has a kind an open layer; -1 leaves the layer without a mixer.
  ModelSpec spec(const Choices& choices) const;
  /// The hybrid, all of it views of the teacher's and the banks' memory, which must outlive it.
  LoadedModel build(const Choices& choices) const;
  /// The teacher with the kind's mixers beside its attention in the open layers: units of the name
  /// kBeside, whose outputs are added to attention's. Views, as build's. Every open layer has the
  /// kind.
  LoadedModel build_beside(int kind) const;
  /// All of it as one model (model/supernet.h): each open layer chooses among the kinds it can
  /// have, where that is more than attention, which runs. Views as well. `edit` may add presets and
  /// choose what is active. Error where a mixer has a name of its own.
  LoadedModel supernet(const std::function<void(ModelSpec& spec)>& edit = {}) const;
  /// All open layers of one kind, as far as it is to be had.
  Choices all(int kind) const;

 private:
  Model& teacher_;
  std::vector<int64_t> layers_;
  std::vector<std::string> kinds_, digests_, sources_;
  std::vector<LoadedModel> banks_;                      // of kind k at k - 1
  std::vector<std::map<std::string, Tensor>> tensors_;  // of kind k; of kind 0, all of the teacher
};

/// What a supernet's attention is labelled within its layers: "attention" or "latent_attention".
std::string attention_label(const ModelSpec& supernet);

/// A bank of a supernet: its mixers as kinds. `teacher` is its hybrid of attention alone
/// (attention_of), and both views must be outlived by the supernet.
MixerBank bank_of(Model& supernet, LoadedModel& teacher, const std::string& where);
LoadedModel attention_of(Model& supernet, const std::string& where);

/// The supernet with one mixer more in the choices of `layers`, under this label: that of
/// `conversion`, whose other parts are not looked at. Presets and what is active stay as they are;
/// `edit` may add presets. Views of both. Error where a layer has a mixer of that label.
LoadedModel add_mixer(Model& supernet, Model& conversion, const std::vector<int64_t>& layers,
                      const std::string& label,
                      const std::function<void(ModelSpec& spec)>& edit = {});

/// The conversion in `dir`, what it has in common with the teacher held once.
LoadedModel load_bank(const LoadedModel& teacher, const std::filesystem::path& dir);

/// "0012": the kinds of a placement, a character each (0-9, a-z), as files have them.
std::string placement_text(const Choices& choices);
/// Error that names `where` unless the text has `layers` characters below `kinds`.
Choices parse_placement(const std::string& text, size_t layers, size_t kinds,
                        const std::string& where);

}  // namespace cambium
