// A checkpoint folder as tensors in files: where each parameter lies in them, by the rules of its
// family, and how values come from there and go there.
#pragma once

#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "files/safetensors.h"
#include "model/model.h"
#include "model/packed_tensor.h"
#include "model/supernet.h"
#include "model/weight_stream.h"

namespace cambium {

/// A parameter as a file has it: pieces of one tensor or of several.
struct StoredParameter {
  struct Source {
    StoredPiece piece;
    PackedTensor packed;  // the whole tensor

    const TensorEntry& entry() const { return packed.values; }
  };
  std::vector<Source> sources;
  std::vector<int64_t> shape;  // of the parameter

  /// bf16 where all of it is, or is packed in less; else that of the first.
  StoredType dtype() const;
  /// Whether some of it is packed: products of scales, which bf16 need not hold.
  bool is_packed() const;
  /// The parameter as a tensor of its own, where its elements lie one after the other.
  std::optional<TensorEntry> run() const;
};

/// What a folder holds, of which a model may be one preset.
class StoredModel {
 public:
  StoredModel(const std::filesystem::path& dir, const std::string& preset);

  const ModelSpec& whole() const { return model_->spec(); }
  ModelSpec spec() const;
  /// Error unless every tensor of the file is used, every parameter has one, and shapes agree.
  void expect_fits(const SafeTensors& file) const;
  /// The stored tensors of a parameter of spec().
  std::optional<StoredParameter> find(const SafeTensors& file, const std::string& ours) const;

 private:
  std::optional<StoredParameter> find_whole(const SafeTensors& file, const std::string& ours) const;

  std::unique_ptr<Model> model_;  // all of it, without memory
  ParametersByName parameters_;
  ActiveUnits active_;  // empty: all of it
};

/// Fills a contiguous tensor of a device, f32 or bf16, by way of the host: one piece at a time.
void read_to_device(const Tensor& to, const StoredParameter& from);
/// Fills a contiguous tensor of the host, f32 or bf16.
void read_into(const Tensor& to, const StoredParameter& from);
/// Whether two stored parameters have the same values; of one type, the same bytes.
bool same_values(const StoredParameter& a, const StoredParameter& b);
/// What stream_weights() has to copy for `to`; nothing where elements must be gathered one by one,
/// for which there is read_into().
std::optional<std::vector<WeightTarget>> stream_targets(const StoredParameter& from,
                                                        const Tensor& to);

/// Where the parameters of a model lie in tensors that are written, and what their values are. What
/// is left out is as in checkpoints of the model's family, and the values those in its memory.
struct TensorLayout {
  std::function<StoredForm(const std::string& ours, const ParametersByName& parameters)> form = {};
  /// Fills `to`, f32 or bf16 on the host, with the values of a parameter.
  std::function<void(const std::string& ours, const Tensor& to)> read = {};
};
/// The tensors of a checkpoint of the model's family and those that it keeps, or of another layout.
/// The model's memory is read when they are written. bf16 where `narrow` says so of all the
/// parameters in a tensor, else f32.
std::vector<TensorSource> tensor_sources(Model& model,
                                         const std::function<bool(const Parameter&)>& narrow,
                                         const TensorLayout& layout = {});

}  // namespace cambium
