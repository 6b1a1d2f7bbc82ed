#include "model/weights.h"
#include "base/checked.h"
#include "tensor/copy.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstring>
#include <mutex>
#include <optional>
#include <set>
#include <unordered_set>

#include "base/file.h"
#include "base/float16.h"
#include "base/parallel.h"
#include "base/progress.h"
#include "base/signals.h"
#include "base/text.h"
#include "files/checksums.h"
#include "files/golden.h"
#include "files/safetensors.h"
#include "model/stored_model.h"
#include "model/supernet.h"
#include "model/weight_stream.h"

namespace cambium {
namespace {

constexpr double kGoldenTolerance = 1e-3;
constexpr double kGoldenToleranceBf16 = 5e-2;
constexpr int64_t kGoldenTokensAtLoad = 8;

/// How a parameter is kept in memory. What is trained is fp32.
Dtype dtype_in_memory(const Parameter& p, StoredType stored, MatrixStorage storage, bool trained) {
  const bool stored_bf16 = stored == StoredType::kBF16 && !trained;
  const bool bf16 =
      storage == MatrixStorage::kBF16 || (storage == MatrixStorage::kStored && stored_bf16);
  return bf16 && p.is_matrix() ? Dtype::kBF16 : Dtype::kF32;
}

/// Whether the bytes in the file are those wanted in memory, and where numbers may lie.
bool usable_in_place(const TensorEntry& entry, Dtype dtype) {
  const StoredType type = dtype == Dtype::kBF16 ? StoredType::kBF16 : StoredType::kF32;
  const auto size = static_cast<uintptr_t>(dtype_size(dtype));
  return entry.dtype == type && reinterpret_cast<uintptr_t>(entry.data) % size == 0;
}

/// The tensors of `other`, by our names, whose values in its files are those in `file`.
std::map<std::string, Tensor> equal_tensors(Model& model, const StoredModel& stored,
                                            const SafeTensors& file, const LoadedModel& other) {
  const StoredModel stored_theirs(other.dir, other.preset);
  const SafeTensors theirs = SafeTensors::open(other.dir.string(), SafeTensors::Check::kHeader);
  std::map<std::string, Tensor> held;
  other.model->visit([&](const std::string& name, Parameter& p) { held[name] = p.tensor; });
  std::map<std::string, Tensor> equal;
  model.visit([&](const std::string& name, Parameter& p) {
    const auto it = held.find(name);
    if (it == held.end()) {
      return;
    }
    const std::optional<StoredParameter> a = stored.find(file, name);
    const std::optional<StoredParameter> b = stored_theirs.find(theirs, name);
    if (a && b && a->shape == p.shape && same_values(*a, *b)) {
      equal[name] = it->second.detached();
    }
  });
  return equal;
}

std::vector<int32_t> default_golden_prompt(int64_t vocab) {
  std::vector<int32_t> tokens;
  for (int64_t i = 0; i < 32; ++i) {
    tokens.push_back(static_cast<int32_t>((7 + i * i * 13 + i * 101) % vocab));
  }
  return tokens;
}

std::vector<float> run_logits(Model& model, std::span<const int32_t> tokens) {
  Workspace workspace(model.device());
  const WorkspaceScope scope(workspace);
  Context ctx = context_for(model, workspace);
  Batch batch;
  batch.add(tokens);
  return elements_of(model.logits(ctx, model.forward(ctx, batch)));
}

void expect_finite(const std::vector<float>& logits, const std::filesystem::path& dir) {
  const auto bad =
      std::find_if(logits.begin(), logits.end(), [](float x) { return !std::isfinite(x); });
  expect(bad == logits.end(),
         "{}: a logit of the golden prompt is {}: the model's weights are broken, or its numbers "
         "overflow",
         dir.string(), bad == logits.end() ? 0.0F : *bad);
}

constexpr const char* kTokenizerFiles[] = {"tokenizer.json",         "tokenizer_config.json",
                                           "chat_template.jinja",    "chat_template.json",
                                           "generation_config.json", "special_tokens_map.json"};

// A device computes in bf16 where a matrix is.
void choose_activations(Model& model) {
  bool narrow = false;
  model.visit([&](const std::string& /*name*/, Parameter& p) {
    narrow = narrow || p.tensor.dtype == Dtype::kBF16;
  });
  const bool cpu = model.device().kind == Device::kCpu;
  model.set_activations(narrow && !cpu ? Dtype::kBF16 : Dtype::kF32);
}

// Files beside the weights are compared with checksums.json before anything is read of them.
// Folders of other programs have no such file and load as they are; one of ours that lost its says
// so, once.
void check_files(const std::filesystem::path& dir) {
  if (verify_small_files(dir.string()) > 0) {
    return;
  }
  static std::mutex mutex;
  static std::set<std::string> noted;
  const bool ours = std::filesystem::exists(dir / "golden.safetensors") ||
                    std::filesystem::exists(dir / "provenance.json");
  const std::lock_guard lock(mutex);
  if (ours && noted.insert(dir.string()).second) {
    say("note: {} has no checksums.json, though it was written by cambium: its files are not "
        "checked; cambium verify {} --accept writes one",
        dir.string(), dir.string());
  }
}

}  // namespace

void check_tokenizer_files(const std::filesystem::path& dir) {
  verify_listed(dir.string(), kTokenizerFiles);
}

MatrixStorage parse_storage(const std::string& name) {
  constexpr std::pair<const char*, MatrixStorage> kNames[] = {{"f32", MatrixStorage::kF32},
                                                              {"bf16", MatrixStorage::kBF16},
                                                              {"stored", MatrixStorage::kStored}};
  for (const auto& [known, storage] : kNames) {
    if (name == known) {
      return storage;
    }
  }
  fail("--storage: expected f32, bf16 or stored, got '{}'", name);
}

void Weights::allocate(Model& model, const TrainablePredicate& trainable, MatrixStorage storage,
                       Dtype real, Device device) {
  model.expect_runs();
  std::vector<Request> together;
  model.visit([&](const std::string& name, Parameter& p) {
    if (!p.tensor.defined()) {
      const bool bf16 = storage == MatrixStorage::kBF16 && p.is_matrix();
      const bool with_grad = trainable != nullptr && trainable(name, p);
      if (device.kind == Device::kCuda && !with_grad) {
        together.push_back({name, &p, bf16 ? Dtype::kBF16 : real});
      } else {
        add(name, p, bf16 ? Dtype::kBF16 : real, with_grad, device);
      }
    }
  });
  add_together(together, device);
}

void Weights::add(const std::string& name, Parameter& p, Dtype dtype, bool with_grad,
                  Device device) {
  CAMBIUM_CHECK(dtype != Dtype::kBF16 || !with_grad, "{}: trained weights are fp32", name);
  auto [it, fresh] = tensors_.emplace(name, OwnedTensor(dtype, p.shape, with_grad, device));
  CAMBIUM_CHECK(fresh, "{} is visited twice", name);
  p.tensor = it->second.view;
}

void Weights::add_together(const std::vector<Request>& requests, Device device) {
  // By the unit's name: "layers.3.mixer" of "layers.3.mixer.q_proj.weight".
  std::map<std::pair<std::string, Dtype>, std::vector<const Request*>> units;
  for (const Request& request : requests) {
    const size_t last = request.name.rfind('.');
    const size_t before = last == std::string::npos || last == 0
                              ? std::string::npos
                              : request.name.rfind('.', last - 1);
    units[{request.name.substr(0, before), request.dtype}].push_back(&request);
  }
  for (const auto& [key, members] : units) {
    // Each begins at a multiple of what kernels align to; most matrices end at one.
    constexpr int64_t kAlign = 256;
    const auto bytes_of = [&, dtype = key.second](const Request& request) {
      return (request.parameter->numel() * dtype_size(dtype) + kAlign - 1) / kAlign * kAlign;
    };
    int64_t bytes = 0;
    for (const Request* member : members) {
      bytes += bytes_of(*member);
    }
    const auto block = std::make_shared<const Buffer>(bytes, device);
    int64_t at = 0;
    for (const Request* member : members) {
      Parameter& p = *member->parameter;
      OwnedTensor owned;
      owned.view =
          Tensor::of(member->dtype, device, p.shape, static_cast<std::byte*>(block->data()) + at);
      owned.block = block;
      at += bytes_of(*member);
      p.tensor = owned.view;
      const bool fresh = tensors_.emplace(member->name, std::move(owned)).second;
      CAMBIUM_CHECK(fresh, "{} is visited twice", member->name);
    }
  }
}

void Weights::map(const std::string& name, Parameter& p, Dtype dtype, const TensorEntry& entry,
                  const std::shared_ptr<const SafeTensors>& file) {
  OwnedTensor mapped;
  // Writing to it changes pages of this process only, never the file (MappedFile).
  void* data = const_cast<std::byte*>(entry.data);
  mapped.view = Tensor::of(dtype, Device{}, p.shape, data);
  p.tensor = mapped.view;
  const bool fresh = tensors_.emplace(name, std::move(mapped)).second;
  CAMBIUM_CHECK(fresh, "{} is visited twice", name);
  if (files_.empty() || files_.back() != file) {
    files_.push_back(file);
  }
}

void Weights::set_trainable(Model& model, const TrainablePredicate& trainable) {
  model.visit([&](const std::string& name, Parameter& p) {
    const bool wanted = trainable != nullptr && trainable(name, p);
    const auto it = tensors_.find(name);
    if (it == tensors_.end()) {  // another model's, which is not written to
      if (wanted) {
        const Tensor theirs = p.tensor;
        add(name, p, theirs.dtype == Dtype::kF64 ? Dtype::kF64 : Dtype::kF32, true, theirs.device);
        copy(p.tensor.detached(), theirs);
      }
      return;
    }
    OwnedTensor& owned = it->second;
    const bool in_a_file = owned.data.bytes() == 0;
    if (wanted && (in_a_file || owned.view.dtype == Dtype::kBF16)) {
      const Dtype dtype = owned.view.dtype == Dtype::kF64 ? Dtype::kF64 : Dtype::kF32;
      OwnedTensor master(dtype, p.shape, false, owned.view.device);
      copy(master.view, owned.view);
      owned = std::move(master);
    }
    owned.want_grad(wanted);
    p.tensor = owned.view;
  });
}

void Weights::share(const std::string& name, Parameter& p, const Tensor& with) {
  p.tensor = with.detached();
  tensors_.erase(name);
}

void Weights::take_over(Model& model, Weights&& from) {
  model.visit([&](const std::string& name, Parameter& p) {
    const auto theirs = from.tensors_.find(name);
    if (theirs != from.tensors_.end() && theirs->second.view.data == p.tensor.data) {
      const bool fresh = tensors_.insert(from.tensors_.extract(theirs)).inserted;
      CAMBIUM_CHECK(fresh, "{} is owned twice", name);
    }
  });
  files_.insert(files_.end(), from.files_.begin(), from.files_.end());
}

void Weights::move_to(Model& model, Device device) {
  model.visit([&](const std::string& name, Parameter& p) {
    if (p.tensor.device == device) {
      return;
    }
    const auto it = tensors_.find(name);
    CAMBIUM_CHECK(it != tensors_.end(), "{} belongs to another model, which is not on {}", name,
                  device.describe());
    OwnedTensor& owned = it->second;
    OwnedTensor moved(owned.view.dtype, p.shape, owned.view.has_grad(), device);
    copy(moved.view, owned.view);
    owned = std::move(moved);
    p.tensor = owned.view;
  });
  if (device.kind != Device::kCpu) {
    files_.clear();  // what they held is there now
  }
  choose_activations(model);
}

int64_t Weights::bytes() const {
  int64_t sum = 0;
  for (const auto& [name, tensor] : tensors_) {
    sum += tensor.view.bytes() + tensor.grad.bytes();
  }
  return sum;
}

void Weights::release_mapped() const {
  for (const auto& file : files_) {
    for (const TensorEntry& entry : file->tensors()) {
      file->release(entry);
    }
  }
}

WeightSizes weight_sizes(const std::filesystem::path& dir, MatrixStorage storage,
                         const std::string& preset) {
  const StoredModel stored(dir, preset);
  Model model(stored.spec());
  std::optional<SafeTensors> file;
  const bool is_there = std::filesystem::exists(dir / "model.safetensors") ||
                        std::filesystem::exists(dir / "model.safetensors.index.json");
  if (is_there) {
    file = SafeTensors::open(dir.string(), SafeTensors::Check::kHeader);
    stored.expect_fits(*file);
  }
  WeightSizes sizes;
  model.visit([&](const std::string& ours, Parameter& p) {
    const Dtype dtype =
        file ? dtype_in_memory(p, stored.find(*file, ours)->dtype(), storage, false)
             : (storage == MatrixStorage::kBF16 && p.is_matrix() ? Dtype::kBF16 : Dtype::kF32);
    sizes.bytes += p.numel() * dtype_size(dtype);
    sizes.narrow = sizes.narrow || dtype == Dtype::kBF16;
  });
  return sizes;
}

LoadedModel load_model(const std::filesystem::path& dir, const LoadOptions& options) {
  if (options.check_golden) {
    check_files(dir);
  }
  const auto started = std::chrono::steady_clock::now();
  const StoredModel stored(dir, options.preset);
  LoadedModel loaded{dir, std::make_unique<Model>(stored.spec()), {}};
  loaded.preset = options.preset;
  Model& model = *loaded.model;
  model.expect_runs();
  // On a device the checksums are compared as the weights go by.
  const bool stream = options.device.kind != Device::kCpu;
  const auto file = std::make_shared<const SafeTensors>(SafeTensors::open(
      dir.string(), stream ? SafeTensors::Check::kHeader : SafeTensors::Check::kContents));
  stored.expect_fits(*file);
  double tolerance = kGoldenTolerance;
  std::vector<Weights::Request> together;
  std::vector<std::pair<StoredParameter, const Parameter*>> streamed;
  const std::map<std::string, Tensor> held_already =
      options.share == nullptr ? std::map<std::string, Tensor>{}
                               : equal_tensors(model, stored, *file, *options.share);
  const bool exact_packed = options.saved_as == MatrixStorage::kF32;
  model.visit([&](const std::string& ours, Parameter& p) {
    const StoredParameter found = *stored.find(*file, ours);
    const std::optional<TensorEntry> run = found.run();
    const bool trained = options.trainable != nullptr && options.trainable(ours, p);
    const StoredType type = exact_packed && found.is_packed() ? StoredType::kF32 : found.dtype();
    const Dtype dtype = dtype_in_memory(p, type, options.storage, trained);
    if (dtype == Dtype::kBF16 && found.dtype() != StoredType::kBF16) {
      tolerance = kGoldenToleranceBf16;  // rounded
    }
    const auto shared = held_already.find(ours);
    if (!trained && shared != held_already.end()) {
      loaded.weights.share(ours, p, shared->second);
    } else if (stream) {
      if (trained) {
        loaded.weights.add(ours, p, dtype, trained, options.device);
      } else {
        together.push_back({ours, &p, dtype});
      }
      streamed.push_back({found, &p});
    } else if (!trained && run && usable_in_place(*run, dtype)) {
      loaded.weights.map(ours, p, dtype, *run, file);
    } else {
      stop_point();
      loaded.weights.add(ours, p, dtype, trained);
      read_into(p.tensor, found);
      for (const StoredParameter::Source& source : found.sources) {
        file->release(source.entry());
      }
    }
  });
  if (stream) {
    loaded.weights.add_together(together, options.device);
    std::vector<WeightTarget> targets;
    wait_for(options.device);  // what makes the memory zero is not in order with the copies
    for (const auto& [found, parameter] : streamed) {
      if (const auto some = stream_targets(found, parameter->tensor)) {
        targets.insert(targets.end(), some->begin(), some->end());
        continue;
      }
      read_to_device(parameter->tensor, found);
    }
    stream_weights(*file, std::move(targets), options.device,
                   {.label = fmt::format("loading {}", dir.string())});
    choose_activations(model);
  }
  // Activations in bf16 say little of a golden prompt's logits in fp32: checksums alone tell there
  // that the weights are those that were written. `verify` compares in fp32.
  if (options.check_golden && model.activations() != Dtype::kBF16) {
    check_golden(model, dir, tolerance, kGoldenTokensAtLoad, options.preset);
  }
  loaded.load_bytes = file->total_bytes();
  loaded.load_seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
  return loaded;
}

LoadedModel fresh_model(const ModelSpec& spec, uint64_t seed, double std) {
  LoadedModel loaded{{}, std::make_unique<Model>(spec), {}};
  Model& model = *loaded.model;
  loaded.weights.allocate(model);
  const double depth = std::sqrt(2.0 * static_cast<double>(model.layer_count()));
  model.visit([&](const std::string& name, Parameter& p) {
    const Init rule = p.init;
    if (std > 0.0 && p.is_matrix()) {
      p.init = {InitKind::kNormal, std};
    }
    if (name.ends_with("o_proj.weight") || name.ends_with("out_proj.weight") ||
        name.ends_with("down.weight")) {
      p.init.scale /= depth;
    }
    initialise(p, name, seed);
    p.init = rule;
  });
  return loaded;
}

void save_model(Model& model, const std::filesystem::path& dir, const SaveOptions& options) {
  write_model(model, dir, options)->commit();
}

std::unique_ptr<AtomicDirectory> write_model(Model& model, const std::filesystem::path& dir,
                                             const SaveOptions& options) {
  const ModelSpec& spec = model.spec();
  const Family& family = find_family(spec.family);
  auto folder = std::make_unique<AtomicDirectory>(
      dir.string(),
      options.replace ? AtomicDirectory::Existing::kReplace : AtomicDirectory::Existing::kRefuse);
  const std::filesystem::path inside = folder->path();
  write_file_atomically((inside / "config.json").string(), family.write_config(spec) + "\n");
  for (const CodeFile& file : family.code) {
    write_file_atomically((inside / file.name).string(), file.text);
  }
  for (const auto& [name, text] : options.files) {
    write_file_atomically((inside / name).string(), text);
  }
  if (!options.tokenizer_from.empty()) {
    for (const char* name : kTokenizerFiles) {
      const auto from = options.tokenizer_from / name;
      if (std::filesystem::exists(from)) {
        write_file_atomically((inside / name).string(), read_text_file(from.string()));
      }
    }
  }
  std::vector<TensorSource> sources = tensor_sources(model, [&](const Parameter& p) {
    const bool is_narrow = p.tensor.dtype == Dtype::kBF16;
    return options.storage == MatrixStorage::kBF16
               ? p.is_matrix() || is_narrow
               : options.storage == MatrixStorage::kStored && is_narrow;
  });
  FileChecksums sums = write_safetensors((inside / "model.safetensors").string(),
                                         std::move(sources), {.always_index = true});
  if (options.written) {
    options.written();
  }
  add_golden(inside, options.golden_tokens);
  write_checksums(inside.string(), sums);
  return folder;
}

void add_golden(const std::filesystem::path& dir, std::span<const int32_t> prompt) {
  // Mapped as stored: the logits are those of widened weights, bit for bit.
  const LoadedModel written =
      load_model(dir, {.storage = MatrixStorage::kStored, .check_golden = false});
  const int64_t vocab = written.model->spec().vocab;
  const std::vector<int32_t> tokens = prompt.empty()
                                          ? default_golden_prompt(vocab)
                                          : std::vector<int32_t>(prompt.begin(), prompt.end());
  const auto run = [&](Model& model) {
    std::vector<float> logits = run_logits(model, tokens);
    expect_finite(logits, dir);
    return logits;
  };
  Golden golden{{tokens.begin(), tokens.end()}, run(*written.model), vocab};
  for (const Preset& preset : written.model->spec().presets) {
    golden.presets[preset.name] = run(*view_hybrid(*written.model, preset.active).model);
  }
  write_golden(dir.string(), golden);
}

void expect_numbers(Model& model, const std::filesystem::path& dir) {
  expect_finite(run_logits(model, default_golden_prompt(model.spec().vocab)), dir);
}

/// Error where the logits of `prompt`, the first of what `golden` was made of, are not `expected`.
static double compare_golden(Model& model, std::span<const int32_t> prompt,
                             std::span<const float> expected, double tolerance,
                             const std::string& where) {
  const std::vector<float> logits = run_logits(model, prompt);
  double mean = 0.0;
  double square = 0.0;
  double worst = 0.0;
  for (size_t i = 0; i < logits.size(); ++i) {
    const double golden = expected[i];
    mean += golden;
    square += golden * golden;
    worst = larger_error(worst, std::abs(logits[i] - golden));
  }
  const auto n = static_cast<double>(logits.size());
  const double deviation = std::sqrt(std::max(square / n - mean / n * mean / n, 1e-30));
  const double error = worst / deviation;
  expect(
      error <= tolerance,
      "{}: the golden prompt's logits differ by {:.2e} standard deviations from those stored "
      "with the checkpoint (at most {:.0e} is rounding); weights and program do not fit together",
      where, error, tolerance);
  return error;
}

double check_golden(Model& model, const std::filesystem::path& dir, double tolerance,
                    int64_t tokens, const std::string& preset) {
  const auto golden = read_golden(dir.string());
  if (!golden) {
    return 0.0;
  }
  expect(golden->vocabulary == model.spec().vocab,
         "{}: golden.safetensors has {} logits a token, the model {}", dir.string(),
         golden->vocabulary, model.spec().vocab);
  std::vector<int32_t> prompt(golden->tokens.begin(), golden->tokens.end());
  if (tokens > 0 && tokens < static_cast<int64_t>(prompt.size())) {
    prompt.resize(static_cast<size_t>(tokens));
  }
  const auto compare_preset = [&](Model& hybrid, const std::string& name) {
    const auto it = golden->presets.find(name);
    expect(it != golden->presets.end(),
           "{}: golden.safetensors has no logits of preset {}, which config.json names",
           dir.string(), name);
    return compare_golden(hybrid, prompt, it->second, tolerance,
                          fmt::format("{}, preset {}", dir.string(), name));
  };
  if (!preset.empty()) {
    return compare_preset(model, preset);
  }
  double error = compare_golden(model, prompt, golden->logits, tolerance, dir.string());
  for (const Preset& other : model.spec().presets) {
    error = std::max(error, compare_preset(*view_hybrid(model, other.active).model, other.name));
  }
  return error;
}

void copy_values(const Tensor& to, const Tensor& from) {
  CAMBIUM_CHECK(to.same_shape(from) && to.contiguous() && from.contiguous(), "{} from {}", to,
                from);
  const auto value = [&](int64_t i) -> double {
    switch (from.dtype) {
      case Dtype::kF64:
        return from.ptr<double>()[i];
      case Dtype::kBF16:
        return widen(from.ptr<bf16>()[i]);
      default:
        return from.ptr<float>()[i];
    }
  };
  if (to.dtype == from.dtype) {
    std::memcpy(to.data, from.data, static_cast<size_t>(to.bytes()));
    return;
  }
  for (int64_t i = 0; i < to.numel(); ++i) {
    const double x = value(i);
    if (to.dtype == Dtype::kF64) {
      to.ptr<double>()[i] = x;
    } else if (to.dtype == Dtype::kBF16) {
      to.ptr<bf16>()[i] = round_to_bf16(static_cast<float>(x));
    } else {
      to.ptr<float>()[i] = static_cast<float>(x);
    }
  }
}

}  // namespace cambium
