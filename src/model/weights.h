// Weights: the memory of a model's parameters, loaded strictly, made fresh, and written whole.
#pragma once

#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "files/safetensors.h"
#include "model/model.h"
#include "tensor/arena.h"

namespace cambium {

/// How matrices are kept; norms, convolutions and the like are always fp32.
enum class MatrixStorage {
  kF32,
  kBF16,
  kStored,  // loading: bf16 where the file has bf16; saving: as they are in memory
};

/// "f32", "bf16" or "stored"; Error otherwise.
MatrixStorage parse_storage(const std::string& name);

/// Chooses which parameters get a gradient; null = none.
using TrainablePredicate = std::function<bool(const std::string& name, const Parameter& parameter)>;

class Weights {
 public:
  /// Gives every parameter of `model` that has no memory yet zeroed memory; F64 for tests of the
  /// definitions. A parameter that already views another model's memory keeps it (and never has a
  /// gradient here): that model must outlive this one.
  void allocate(Model& model, const TrainablePredicate& trainable = nullptr,
                MatrixStorage storage = MatrixStorage::kF32, Dtype real = Dtype::kF32,
                Device device = {});
  /// Takes the gradients of the owned parameters away and gives the chosen ones zeroed gradients;
  /// those become fp32 in memory of their own, on the device they are on. So what views another
  /// model's memory is never written to: a chosen parameter gets its values in memory of its own.
  void set_trainable(Model& model, const TrainablePredicate& trainable);
  /// Gives one parameter that has no memory yet zeroed memory.
  void add(const std::string& name, Parameter& p, Dtype dtype, bool with_grad, Device device = {});
  /// The same for many on a device, without gradients. Matrices of one unit and type lie one after
  /// the other, so that those of one x (q, k and v; gate and up) can be one product.
  struct Request {
    std::string name;
    Parameter* parameter = nullptr;
    Dtype dtype = Dtype::kF32;
  };
  void add_together(const std::vector<Request>& requests, Device device);
  /// Gives it the bytes of a tensor of `file`, which stays mapped as long as these weights live.
  void map(const std::string& name, Parameter& p, Dtype dtype, const TensorEntry& entry,
           const std::shared_ptr<const SafeTensors>& file);
  /// Makes a parameter a view of another model's tensor and gives up its own memory.
  void share(const std::string& name, Parameter& p, const Tensor& with);
  /// Takes what `from` owns of the tensors that parameters of `model` view. The model that `from`
  /// belongs to is not to be used afterwards.
  void take_over(Model& model, Weights&& from);
  /// Moves every parameter's values to the device; gradients that were wanted are zero there. What
  /// another model's memory holds is to be there already. Its activations become bf16 there if a
  /// matrix is.
  void move_to(Model& model, Device device);
  int64_t bytes() const;
  /// Gives the resident pages of mapped tensors back to the system: they come from the file again
  /// when they are read. What was written to them is lost.
  void release_mapped() const;

 private:
  std::map<std::string, OwnedTensor> tensors_;  // without data of their own where a file has it
  std::vector<std::shared_ptr<const SafeTensors>> files_;
};

/// What a model's weights take before they are loaded.
struct WeightSizes {
  int64_t bytes = 0;    // in memory
  bool narrow = false;  // a matrix is bf16: a GPU computes in it
};
/// Of the weights beside the configuration, of which the headers alone are read; where there are
/// none, of a model with random weights (stored is f32). With a preset's name, of its hybrid.
WeightSizes weight_sizes(const std::filesystem::path& dir, MatrixStorage storage,
                         const std::string& preset = {});

struct LoadedModel {
  std::filesystem::path dir;
  std::unique_ptr<Model> model;
  Weights weights;
  /// From the call to a model that can run, and the bytes of its files (of random weights, in
  /// memory). On the CPU files are mapped, and read from the disk when they are first used.
  double load_seconds = 0.0;
  uint64_t load_bytes = 0;
  std::string preset{};  // LoadOptions::preset
};

struct LoadOptions {
  MatrixStorage storage = MatrixStorage::kF32;
  /// With kStored: what the model will be saved as. For f32, what is packed in fp8 or NVFP4 becomes
  /// f32, which holds it exactly, and not bf16, which rounds it.
  MatrixStorage saved_as = MatrixStorage::kStored;
  TrainablePredicate trainable = {};
  Device device = {};
  /// A model that load_model loaded, on `device`: what has its name, shape and values there becomes
  /// a view of its tensor and is held once. It must outlive the result.
  const LoadedModel* share = nullptr;
  /// Of a supernet: load the plain hybrid that this preset is, and nothing of the other mixers.
  std::string preset{};
  /// Compare the files with checksums.json and, where activations are not bf16, the logits with
  /// golden.safetensors, where there are
  /// such. Weights are compared with their checksum either way.
  bool check_golden = true;
};

/// Reads a checkpoint folder. Every tensor of the file is used exactly once and every parameter set
/// exactly once, or it is an Error that names what is missing, left over or of another shape.
/// Tensors that nobody trains and whose type in the file is the one asked for are not copied: the
/// file stays mapped, and replacing it by another (as this program writes) does not change them.
LoadedModel load_model(const std::filesystem::path& dir, const LoadOptions& options = {});

/// Compares the files of a tokenizer with the folder's checksums.json, where it lists them: for who
/// reads the tokenizer of a checkpoint that load_model did not load.
void check_tokenizer_files(const std::filesystem::path& dir);

/// A model of `spec` with every parameter at its initial rule, drawn from `seed`. Output
/// projections of mixers and feed-forwards (o_proj, out_proj, down) start smaller by sqrt(2
/// layers), and matrices with standard deviation `std` (0 = the parameter's own rule).
LoadedModel fresh_model(const ModelSpec& spec, uint64_t seed, double std = 0.0);

struct SaveOptions {
  /// Folder whose tokenizer files (tokenizer.json, tokenizer_config.json, chat templates,
  /// generation_config.json) come along; empty = none.
  std::filesystem::path tokenizer_from;
  MatrixStorage storage = MatrixStorage::kF32;
  /// Prompt of golden.safetensors; empty = a fixed one made of small ids.
  std::vector<int32_t> golden_tokens;
  /// More files by name, for example "provenance.json".
  std::map<std::string, std::string> files;
  bool replace = false;
  /// Called when the weights are written and `model` is not read any more, before what was written
  /// is read back: the place to give memory back.
  std::function<void()> written = {};
};

/// Writes config.json, model.safetensors, tokenizer, golden.safetensors and checksums.json as one
/// folder that appears whole or not at all. The model may be on any device. The golden logits come
/// from what was written, read back.
void save_model(Model& model, const std::filesystem::path& dir, const SaveOptions& options);
/// The same but for the commit: the folder can be read where it lies, and is its caller's to
/// commit.
std::unique_ptr<AtomicDirectory> write_model(Model& model, const std::filesystem::path& dir,
                                             const SaveOptions& options);

/// Writes golden.safetensors into a checkpoint folder: the logits of what the folder holds, and of
/// each of its presets, for `prompt` (empty = a fixed one made of small ids). save_model does this
/// itself; an import does it before its folder takes its name.
void add_golden(const std::filesystem::path& dir, std::span<const int32_t> prompt = {});

/// Error when a logit of the default golden prompt is not finite; `dir` names the model.
void expect_numbers(Model& model, const std::filesystem::path& dir);

/// Largest |difference| of the golden prompt's logits over their standard deviation; Error when the
/// folder's golden prompt is more than `tolerance` away. 0 when there is none. Compares the first
/// `tokens` tokens of the prompt, 0 = all: load_model takes a few, which cost one pass over the
/// weights. Of a supernet every preset is compared too; with `preset`, `model` is that hybrid.
double check_golden(Model& model, const std::filesystem::path& dir, double tolerance,
                    int64_t tokens = 0, const std::string& preset = {});

/// Copies a float tensor of any of F32, BF16, F64 over another of the same shape.
void copy_values(const Tensor& to, const Tensor& from);

}  // namespace cambium
