#include "model/stored_model.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <set>
#include <type_traits>
#include <unordered_map>

#include "base/float16.h"
#include "base/parallel.h"
#include "model/kept_tensors.h"
#include "tensor/copy.h"

namespace cambium {
namespace {

constexpr int64_t kSpan = int64_t{1} << 20;      // elements looked at in one go
constexpr int64_t kRead = int64_t{1} << 16;      // elements read in one go
constexpr int64_t kPiece = int64_t{1} << 18;     // and by one thread
constexpr int64_t kMostRuns = int64_t{1} << 14;  // copies of one parameter

/// Calls visit(first element of ours, of theirs) for each round of the loops but the last.
template <class Visit>
void each_run(const StoredPiece& piece, const Visit& visit, size_t depth, int64_t ours,
              int64_t theirs) {
  if (depth + 1 == piece.loops.size()) {
    visit(ours, theirs);
    return;
  }
  const PieceLoop& loop = piece.loops[depth];
  for (int64_t i = 0; i < loop.count; ++i) {
    each_run(piece, visit, depth + 1, ours + i * loop.ours, theirs + i * loop.theirs);
  }
}

template <class Visit>
void each_run(const StoredPiece& piece, const Visit& visit) {
  each_run(piece, visit, 0, piece.ours, piece.theirs);
}

/// Elements [begin, begin + count) of a tensor.
TensorEntry elements(const TensorEntry& whole, int64_t begin, int64_t count) {
  TensorEntry some = whole;
  const size_t size = stored_type_size(whole.dtype);
  some.shape = {count};
  some.data += static_cast<size_t>(begin) * size;
  some.size = static_cast<size_t>(count) * size;
  return some;
}

void store_number(float* to, float x) {
  *to = x;
}
void store_number(bf16* to, float x) {
  *to = round_to_bf16(x);
}

/// Reads rows of a stored tensor; the memory that it needs is that of the longest.
class RowReader {
 public:
  explicit RowReader(const PackedTensor& from) : from_(from), some_(from.values) {
    some_.shape = {0};
  }

  /// The numbers begin, begin + step, ... to to[0], to[to_step], ...
  template <class T>
  void read(T* to, int64_t to_step, int64_t begin, int64_t step, int64_t count) {
    const auto span = static_cast<size_t>((count - 1) * step + 1);
    const bool is_run = to_step == 1 && step == 1;
    if constexpr (std::is_same_v<T, float>) {
      if (is_run) {
        read_all(begin, std::span(to, span));
        return;
      }
    } else if (is_run && !from_.is_packed() && from_.values.dtype == StoredType::kBF16) {
      std::memcpy(to, from_.values.data + begin * static_cast<int64_t>(sizeof(T)),
                  span * sizeof(T));
      return;
    }
    numbers_.resize(std::max(numbers_.size(), span));
    read_all(begin, std::span(numbers_.data(), span));
    for (int64_t i = 0; i < count; ++i) {
      store_number(to + i * to_step, numbers_[static_cast<size_t>(i * step)]);
    }
  }

 private:
  void read_all(int64_t begin, std::span<float> out) {
    if (from_.is_packed()) {
      from_.unpack(begin, out);
      return;
    }
    const size_t size = stored_type_size(some_.dtype);
    some_.shape[0] = static_cast<int64_t>(out.size());
    some_.data = from_.values.data + static_cast<size_t>(begin) * size;
    some_.size = out.size() * size;
    copy_as_f32(some_, out);
  }

  const PackedTensor& from_;
  TensorEntry some_;
  std::vector<float> numbers_;
};

/// The piece, a row of theirs at a time: the loop with the shortest step over there is the inner
/// one, so that files are read in their order even where rows are columns of ours.
template <class T>
void read_piece(T* to, const StoredParameter::Source& source) {
  const int64_t count = source.piece.count();
  if (count == 0) {
    return;
  }
  std::vector<PieceLoop> outer = source.piece.loops;
  const auto shortest =
      std::min_element(outer.begin(), outer.end(),
                       [](const PieceLoop& a, const PieceLoop& b) { return a.theirs < b.theirs; });
  const PieceLoop row = *shortest;
  outer.erase(shortest);
  const int64_t part = std::max<int64_t>(kRead / row.theirs, 1);
  const int64_t parts = (row.count + part - 1) / part;
  const int64_t rows = count / row.count;
  parallel_for(rows * parts, std::max<int64_t>(kPiece / row.count, 1), [&](int64_t i, int64_t end) {
    RowReader reader(source.packed);
    for (; i < end; ++i) {
      const int64_t begin = i % parts * part;
      int64_t ours = source.piece.ours + begin * row.ours;
      int64_t theirs = source.piece.theirs + begin * row.theirs;
      int64_t rest = i / parts;
      for (auto loop = outer.rbegin(); loop != outer.rend(); ++loop) {
        ours += rest % loop->count * loop->ours;
        theirs += rest % loop->count * loop->theirs;
        rest /= loop->count;
      }
      reader.read(to + ours, row.ours, theirs, row.theirs, std::min(part, row.count - begin));
    }
  });
}

bool same_elements(const TensorEntry& a, const TensorEntry& b) {
  if (a.dtype == b.dtype && a.data == b.data) {
    return true;
  }
  const int64_t count = a.count();
  std::atomic<bool> same = true;
  parallel_for((count + kSpan - 1) / kSpan, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last && same; ++i) {
      const int64_t n = std::min(count - i * kSpan, kSpan);
      const TensorEntry x = elements(a, i * kSpan, n);
      const TensorEntry y = elements(b, i * kSpan, n);
      if (a.dtype == b.dtype) {
        same = same && std::memcmp(x.data, y.data, x.size) == 0;
        continue;
      }
      const std::vector<float> wide = as_f32(x);
      same = same && std::memcmp(wide.data(), as_f32(y).data(), wide.size() * sizeof(float)) == 0;
    }
  });
  return same;
}

/// Whether the tensor is one of the family's constants; Error where it has another value.
bool is_constant(const Family& family, const TensorEntry& entry, const std::string& path) {
  for (const ConstantRule& constant : family.constants) {
    if (match_pattern(constant.theirs, entry.name)) {
      const double value = entry.count() == 1 ? static_cast<double>(as_f32(entry)[0]) : NAN;
      expect(std::abs(value - constant.value) <= 0.01 * std::abs(constant.value),  // it may be bf16
             "{}: tensor {} {} is expected to be {}, as in every published {} model", path,
             entry.name, shape_text(entry.shape), constant.value, family.name);
      return true;
    }
  }
  return false;
}

TensorSource constant_source(const std::string& name, double value) {
  return {name, StoredType::kF32, {}, [number = static_cast<float>(value)](const PutBytes& put) {
            put(std::as_bytes(std::span(&number, 1)));
          }};
}

int64_t count_of(const std::vector<int64_t>& shape) {
  int64_t n = 1;
  for (const int64_t size : shape) {
    n *= size;
  }
  return n;
}

ParametersByName parameters_of(Model& model) {
  ParametersByName parameters;
  model.visit([&](const std::string& name, Parameter& p) { parameters[name] = &p; });
  return parameters;
}

/// A number may be stored as one of no axes or of one.
bool same_shape(const std::vector<int64_t>& stored, const std::vector<int64_t>& expected) {
  return stored == expected || (stored.empty() && expected == std::vector<int64_t>{1});
}

/// One of the model's tensors on the host, in this type.
Tensor on_host(const Tensor& t, Dtype dtype, OwnedTensor& memory) {
  if (t.dtype == dtype && t.device.kind == Device::kCpu) {
    return t;
  }
  memory = OwnedTensor(dtype, std::span(t.shape.data(), static_cast<size_t>(t.rank)));
  copy(memory.view, t);
  return memory.view;
}

template <class T>
void scatter(T* to, const StoredPiece& piece, const T* from) {
  const PieceLoop& last = piece.loops.back();
  each_run(piece, [&](int64_t ours, int64_t theirs) {
    for (int64_t i = 0; i < last.count; ++i) {
      to[theirs + i * last.theirs] = from[ours + i * last.ours];
    }
  });
}

/// A tensor to write and what it is made of.
struct Joined {
  struct Member {
    StoredPiece piece;
    const Parameter* parameter = nullptr;
    std::string ours;
  };
  std::string name;
  std::vector<int64_t> shape;
  std::vector<Member> members;
  bool narrow = true;

  int64_t count() const { return count_of(shape); }
};

/// Reads parameters by TensorLayout::read and keeps the last: the entries of a stack follow each
/// other.
class ParameterReader {
 public:
  using Read = std::function<void(const std::string& ours, const Tensor& to)>;
  explicit ParameterReader(Read read) : read_(std::move(read)) {}

  Tensor read(const std::string& ours, const Parameter& p, Dtype dtype) {
    if (ours != ours_ || memory_.view.dtype != dtype) {
      memory_ = OwnedTensor(dtype, p.shape);
      ours_.clear();
      read_(ours, memory_.view);
      ours_ = ours;
    }
    return memory_.view;
  }

 private:
  Read read_;
  std::string ours_;
  OwnedTensor memory_;
};

void write_joined(const Joined& joined, Dtype dtype, ParameterReader* reader, const PutBytes& put) {
  OwnedTensor whole(dtype, std::vector<int64_t>{joined.count()});
  for (const Joined::Member& member : joined.members) {
    OwnedTensor memory;
    const Tensor from = reader != nullptr ? reader->read(member.ours, *member.parameter, dtype)
                                          : on_host(member.parameter->tensor, dtype, memory);
    if (dtype == Dtype::kBF16) {
      scatter(whole.view.ptr<bf16>(), member.piece, from.ptr<bf16>());
    } else {
      scatter(whole.view.ptr<float>(), member.piece, from.ptr<float>());
    }
  }
  put({static_cast<const std::byte*>(whole.view.data), static_cast<size_t>(whole.view.bytes())});
}

TensorSource source_of(const Joined& joined, const std::shared_ptr<ParameterReader>& reader) {
  const Dtype dtype = joined.narrow ? Dtype::kBF16 : Dtype::kF32;
  const StoredType type = joined.narrow ? StoredType::kBF16 : StoredType::kF32;
  const StoredPiece& piece = joined.members.front().piece;
  const Parameter* parameter = joined.members.front().parameter;
  const bool alone = joined.members.size() == 1 && piece.is_one_run();
  if (reader != nullptr || !alone) {
    return {joined.name, type, joined.shape, [joined, dtype, reader](const PutBytes& put) {
              write_joined(joined, dtype, reader.get(), put);
            }};
  }
  const Tensor t = parameter->tensor;
  const int64_t begin = piece.ours;
  const int64_t count = piece.count();
  if (t.dtype == dtype && t.device.kind == Device::kCpu) {
    return TensorSource::from_memory(
        joined.name, type, joined.shape,
        static_cast<const std::byte*>(t.data) + begin * dtype_size(dtype));
  }
  return {joined.name, type, joined.shape, [t, dtype, begin, count](const PutBytes& put) {
            OwnedTensor memory;
            const Tensor some = t.detached().reshape({t.numel()}).slice(0, begin, count);
            const Tensor here = on_host(some, dtype, memory);
            put({static_cast<const std::byte*>(here.data), static_cast<size_t>(here.bytes())});
          }};
}

}  // namespace

StoredType StoredParameter::dtype() const {
  const auto is_narrow = [](const Source& source) {
    return source.packed.is_packed() || source.entry().dtype == StoredType::kBF16;
  };
  if (std::all_of(sources.begin(), sources.end(), is_narrow)) {
    return StoredType::kBF16;
  }
  return is_narrow(sources.front()) ? StoredType::kF32 : sources.front().entry().dtype;
}

bool StoredParameter::is_packed() const {
  return std::any_of(sources.begin(), sources.end(),
                     [](const Source& source) { return source.packed.is_packed(); });
}

std::optional<TensorEntry> StoredParameter::run() const {
  if (sources.size() != 1 || !sources.front().piece.is_one_run() ||
      sources.front().packed.is_packed()) {
    return std::nullopt;
  }
  const StoredPiece& piece = sources.front().piece;
  TensorEntry result = elements(sources.front().entry(), piece.theirs, piece.count());
  result.shape = shape;
  return result;
}

StoredModel::StoredModel(const std::filesystem::path& dir, const std::string& preset)
    : model_(std::make_unique<Model>(read_spec(dir))), parameters_(parameters_of(*model_)) {
  if (!preset.empty()) {
    active_ = find_preset(whole(), preset, dir.string()).active;
  }
}

ModelSpec StoredModel::spec() const {
  return active_.empty() ? whole() : unwrapped(whole(), active_);
}

std::optional<StoredParameter> StoredModel::find_whole(const SafeTensors& file,
                                                       const std::string& ours) const {
  for (StoredForm& form :
       stored_forms(find_family(whole().family).tensors, whole(), parameters_, ours)) {
    StoredParameter stored{{}, parameters_.at(ours)->shape};
    for (StoredPiece& piece : form) {
      std::optional<PackedTensor> found = find_packed(file, piece.tensor);
      if (!found) {
        break;
      }
      expect(same_shape(found->shape, piece.shape),
             "{}: tensor {} has shape {}, expected {} by config.json", file.path(),
             found->values.name, shape_text(found->shape), shape_text(piece.shape));
      stored.sources.push_back({std::move(piece), *std::move(found)});
    }
    if (stored.sources.size() == form.size()) {
      return stored;
    }
  }
  return std::nullopt;
}

std::optional<StoredParameter> StoredModel::find(const SafeTensors& file,
                                                 const std::string& ours) const {
  return find_whole(file, supernet_name(whole(), active_, ours));
}

void StoredModel::expect_fits(const SafeTensors& file) const {
  const ModelSpec& spec = whole();
  const Family& family = find_family(spec.family);
  std::unordered_map<std::string, int64_t> used;    // numbers of each tensor
  std::unordered_map<std::string, int64_t> wanted;  // those it has
  std::vector<std::string> missing;
  model_->visit([&](const std::string& ours, Parameter& /*p*/) {
    const std::optional<StoredParameter> stored = find_whole(file, ours);
    if (!stored) {
      missing.push_back(family.tensor_name(spec, ours));
      return;
    }
    for (const auto& [piece, packed] : stored->sources) {
      for (const std::string& part : packed.parts) {
        used[part] += part == packed.values.name ? piece.count() : 0;
      }
      wanted[packed.values.name] = count_of(packed.shape);
    }
  });
  expect(missing.empty(), "{}: {} of the model's tensors are missing, the first is {}", file.path(),
         missing.size(), missing.empty() ? "" : missing.front());
  if (spec.tied_head) {  // a file may have both tensors all the same, but of the same numbers
    const TensorEntry* embed = file.find(family.tensor_name(spec, "embed.weight"));
    const TensorEntry* head = file.find(family.tensor_name(spec, "head.weight"));
    expect(embed == nullptr || head == nullptr ||
               (embed->size == head->size && std::memcmp(embed->data, head->data, head->size) == 0),
           "{}: {} and {} are not the same, and config.json says that they are "
           "(tie_word_embeddings); say false there, or take {} out of the file",
           file.path(), embed == nullptr ? "" : embed->name, head == nullptr ? "" : head->name,
           head == nullptr ? "" : head->name);
  }
  std::set<std::string> kept;
  if (spec.kept.tensors != nullptr) {
    for (const TensorEntry& entry : spec.kept.tensors->entries) {
      kept.insert(entry.name);
    }
  }
  for (const TensorEntry& entry : file.tensors()) {
    const auto found = used.find(entry.name);
    const auto all = wanted.find(entry.name);
    CAMBIUM_CHECK(all == wanted.end() || found->second == all->second,
                  "{} elements of {} are asked for", found->second, entry.name);
    const bool ignorable =
        kept.contains(entry.name) || is_activation_scale(entry.name) ||
        (spec.tied_head && entry.name == family.tensor_name(spec, "head.weight")) ||
        std::any_of(family.ignored.begin(), family.ignored.end(),
                    [&](const std::string& pattern) { return match_pattern(pattern, entry.name); });
    expect(ignorable || found != used.end() || is_constant(family, entry, file.path()),
           "{}: tensor {} {} belongs to no parameter of this {} model; config.json and weights do "
           "not fit together",
           file.path(), entry.name, shape_text(entry.shape), spec.family);
  }
}

void read_into(const Tensor& to, const StoredParameter& from) {
  CAMBIUM_CHECK(to.contiguous() && to.device.kind == Device::kCpu, "{}", to);
  for (const StoredParameter::Source& source : from.sources) {
    if (to.dtype == Dtype::kF32) {
      read_piece(to.ptr<float>(), source);
    } else {
      read_piece(to.ptr<bf16>(), source);
    }
  }
}

void read_to_device(const Tensor& to, const StoredParameter& from) {
  const Tensor flat = to.detached().reshape({to.numel()});
  const bool in_pieces =
      std::all_of(from.sources.begin(), from.sources.end(),
                  [](const StoredParameter::Source& s) { return s.piece.is_one_run(); });
  if (!in_pieces) {
    const OwnedTensor here(to.dtype, from.shape);
    read_into(here.view, from);
    copy(to.detached(), here.view);
    return;
  }
  for (const StoredParameter::Source& source : from.sources) {
    const int64_t count = source.piece.count();
    StoredParameter one{{source}, {count}};
    one.sources.front().piece.ours = 0;
    const OwnedTensor here(to.dtype, {count});
    read_into(here.view, one);
    copy(flat.slice(0, source.piece.ours, count), here.view);
  }
}

bool same_values(const StoredParameter& a, const StoredParameter& b) {
  if (a.shape != b.shape) {
    return false;
  }
  const std::optional<TensorEntry> x = a.run();
  const std::optional<TensorEntry> y = b.run();
  if (x && y) {
    return same_elements(*x, *y);
  }
  if (a.dtype() != b.dtype()) {
    return false;
  }
  const Dtype dtype = a.dtype() == StoredType::kBF16 ? Dtype::kBF16 : Dtype::kF32;
  const OwnedTensor first(dtype, a.shape);
  const OwnedTensor second(dtype, b.shape);
  read_into(first.view, a);
  read_into(second.view, b);
  return std::memcmp(first.view.data, second.view.data, static_cast<size_t>(first.view.bytes())) ==
         0;
}

std::optional<std::vector<WeightTarget>> stream_targets(const StoredParameter& from,
                                                        const Tensor& to) {
  int64_t runs = 0;
  for (const auto& [piece, packed] : from.sources) {
    if (!piece.has_runs() || packed.is_packed()) {
      return std::nullopt;
    }
    runs += piece.count() / piece.loops.back().count;
  }
  if (runs > kMostRuns) {
    return std::nullopt;
  }
  const Tensor flat = to.detached().reshape({to.numel()});
  std::vector<WeightTarget> targets;
  for (const auto& [piece, packed] : from.sources) {
    each_run(piece, [&, &whole = packed.values, count = piece.loops.back().count](int64_t ours,
                                                                                  int64_t theirs) {
      targets.push_back({elements(whole, theirs, count), flat.slice(0, ours, count)});
    });
  }
  return targets;
}

std::vector<TensorSource> tensor_sources(Model& model,
                                         const std::function<bool(const Parameter&)>& narrow,
                                         const TensorLayout& layout) {
  const Family& family = find_family(model.spec().family);
  const auto form_of = [&](const std::string& ours, const ParametersByName& parameters) {
    return layout.form ? layout.form(ours, parameters)
                       : stored_forms(family.tensors, model.spec(), parameters, ours).front();
  };
  const auto reader = layout.read ? std::make_shared<ParameterReader>(layout.read) : nullptr;
  const ParametersByName parameters = parameters_of(model);
  std::vector<Joined> tensors;
  std::unordered_map<std::string, size_t> places;
  model.visit([&](const std::string& ours, Parameter& p) {
    CAMBIUM_CHECK(
        reader != nullptr || p.tensor.dtype == Dtype::kF32 || p.tensor.dtype == Dtype::kBF16, "{}",
        ours);
    for (const StoredPiece& piece : form_of(ours, parameters)) {
      const auto [it, fresh] = places.emplace(piece.tensor, tensors.size());
      if (fresh) {
        tensors.push_back({piece.tensor, piece.shape, {}});
      }
      Joined& joined = tensors[it->second];
      CAMBIUM_CHECK(joined.shape == piece.shape, "{} of {}", piece.tensor, ours);
      joined.members.push_back({piece, &p, ours});
      joined.narrow = joined.narrow && narrow(p);
    }
  });
  std::vector<TensorSource> sources;
  for (const ConstantRule& constant : family.constants) {
    for (const auto& [ours, parameter] : parameters) {
      std::vector<std::string_view> captures;
      if (!layout.form && match_pattern(constant.ours, ours, &captures)) {
        sources.push_back(constant_source(fill_pattern(constant.theirs, captures), constant.value));
      }
    }
  }
  for (const Joined& joined : tensors) {
    int64_t count = 0;
    for (const Joined::Member& member : joined.members) {
      count += member.piece.count();
    }
    CAMBIUM_CHECK(count == joined.count(), "{} of {} elements of {}", count, joined.count(),
                  joined.name);
    sources.push_back(source_of(joined, reader));
  }
  if (!layout.form) {
    for (TensorSource& kept : kept_sources(model.spec())) {
      sources.push_back(std::move(kept));
    }
  }
  return sources;
}

}  // namespace cambium
