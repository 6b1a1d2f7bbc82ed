#include "model/stored_model.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <unordered_map>

#include "base/float16.h"
#include "base/parallel.h"
#include "tensor/copy.h"

namespace cambium {
namespace {

constexpr int64_t kSpan = int64_t{1} << 20;      // elements looked at in one go
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

void read_elements(const Tensor& to, int64_t at, const TensorEntry& from) {
  const auto count = static_cast<size_t>(from.count());
  if (to.dtype == Dtype::kF32) {
    copy_as_f32(from, std::span(to.ptr<float>() + at, count));
  } else if (from.dtype == StoredType::kBF16) {
    std::memcpy(to.ptr<bf16>() + at, from.data, from.size);
  } else {
    const std::vector<float> values = as_f32(from);
    std::transform(values.begin(), values.end(), to.ptr<bf16>() + at,
                   [](float x) { return round_to_bf16(x); });
  }
}

/// Where neighbours of ours are not neighbours over there: one element at a time.
template <class T>
void gather(T* to, const StoredPiece& piece, const std::vector<float>& from) {
  const PieceLoop& last = piece.loops.back();
  each_run(piece, [&](int64_t ours, int64_t theirs) {
    for (int64_t i = 0; i < last.count; ++i) {
      const float x = from[static_cast<size_t>(theirs + i * last.theirs)];
      if constexpr (std::is_same_v<T, float>) {
        to[ours + i * last.ours] = x;
      } else {
        to[ours + i * last.ours] = round_to_bf16(x);
      }
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
  };
  std::string name;
  std::vector<int64_t> shape;
  std::vector<Member> members;
  bool narrow = true;

  int64_t count() const {
    int64_t n = 1;
    for (const int64_t size : shape) {
      n *= size;
    }
    return n;
  }
};

void write_joined(const Joined& joined, Dtype dtype, const PutBytes& put) {
  OwnedTensor whole(dtype, std::vector<int64_t>{joined.count()});
  for (const Joined::Member& member : joined.members) {
    OwnedTensor memory;
    const Tensor from = on_host(member.parameter->tensor, dtype, memory);
    if (dtype == Dtype::kBF16) {
      scatter(whole.view.ptr<bf16>(), member.piece, from.ptr<bf16>());
    } else {
      scatter(whole.view.ptr<float>(), member.piece, from.ptr<float>());
    }
  }
  put({static_cast<const std::byte*>(whole.view.data), static_cast<size_t>(whole.view.bytes())});
}

TensorSource source_of(const Joined& joined) {
  const Dtype dtype = joined.narrow ? Dtype::kBF16 : Dtype::kF32;
  const StoredType type = joined.narrow ? StoredType::kBF16 : StoredType::kF32;
  const auto& [piece, parameter] = joined.members.front();
  const bool alone = joined.members.size() == 1 && piece.is_one_run();
  if (!alone) {
    return {joined.name, type, joined.shape,
            [joined, dtype](const PutBytes& put) { write_joined(joined, dtype, put); }};
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
  const bool narrow = std::all_of(sources.begin(), sources.end(), [](const Source& source) {
    return source.entry.dtype == StoredType::kBF16;
  });
  const StoredType first = sources.front().entry.dtype;
  return narrow || first != StoredType::kBF16 ? first : StoredType::kF32;
}

std::optional<TensorEntry> StoredParameter::run() const {
  if (sources.size() != 1 || !sources.front().piece.is_one_run()) {
    return std::nullopt;
  }
  const auto& [piece, entry] = sources.front();
  TensorEntry result = elements(entry, piece.theirs, piece.count());
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
      const TensorEntry* entry = file.find(piece.tensor);
      if (entry == nullptr) {
        break;
      }
      expect(same_shape(entry->shape, piece.shape),
             "{}: tensor {} has shape {}, expected {} by config.json", file.path(), entry->name,
             shape_text(entry->shape), shape_text(piece.shape));
      stored.sources.push_back({std::move(piece), *entry});
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
  std::unordered_map<std::string, int64_t> used;  // elements of each tensor
  std::vector<std::string> missing;
  model_->visit([&](const std::string& ours, Parameter& /*p*/) {
    const std::optional<StoredParameter> stored = find_whole(file, ours);
    if (!stored) {
      missing.push_back(family.tensor_name(spec, ours));
      return;
    }
    for (const auto& [piece, entry] : stored->sources) {
      used[entry.name] += piece.count();
    }
  });
  expect(missing.empty(), "{}: {} of the model's tensors are missing, the first is {}", file.path(),
         missing.size(), missing.empty() ? "" : missing.front());
  for (const TensorEntry& entry : file.tensors()) {
    const auto found = used.find(entry.name);
    CAMBIUM_CHECK(found == used.end() || found->second == entry.count(),
                  "{} elements of {} are asked for", found->second, entry.name);
    const bool ignorable =
        (spec.tied_head && entry.name == family.tensor_name(spec, "head.weight")) ||
        std::any_of(family.ignored.begin(), family.ignored.end(),
                    [&](const std::string& pattern) { return match_pattern(pattern, entry.name); });
    expect(ignorable || found != used.end(),
           "{}: tensor {} {} belongs to no parameter of this {} model; config.json and weights do "
           "not fit together",
           file.path(), entry.name, shape_text(entry.shape), spec.family);
  }
}

void read_into(const Tensor& to, const StoredParameter& from) {
  CAMBIUM_CHECK(to.contiguous() && to.device.kind == Device::kCpu, "{}", to);
  for (const auto& [piece, entry] : from.sources) {
    if (piece.has_runs()) {
      each_run(piece,
               [&, &whole = entry, count = piece.loops.back().count](int64_t ours, int64_t theirs) {
                 read_elements(to, ours, elements(whole, theirs, count));
               });
    } else if (to.dtype == Dtype::kF32) {
      gather(to.ptr<float>(), piece, as_f32(entry));
    } else {
      gather(to.ptr<bf16>(), piece, as_f32(entry));
    }
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
  for (const auto& [piece, entry] : from.sources) {
    if (!piece.has_runs()) {
      return std::nullopt;
    }
    runs += piece.count() / piece.loops.back().count;
  }
  if (runs > kMostRuns) {
    return std::nullopt;
  }
  const Tensor flat = to.detached().reshape({to.numel()});
  std::vector<WeightTarget> targets;
  for (const auto& [piece, entry] : from.sources) {
    each_run(piece,
             [&, &whole = entry, count = piece.loops.back().count](int64_t ours, int64_t theirs) {
               targets.push_back({elements(whole, theirs, count), flat.slice(0, ours, count)});
             });
  }
  return targets;
}

std::vector<TensorSource> tensor_sources(Model& model,
                                         const std::function<bool(const Parameter&)>& narrow) {
  const std::vector<TensorRule>& rules = find_family(model.spec().family).tensors;
  const ParametersByName parameters = parameters_of(model);
  std::vector<Joined> tensors;
  std::unordered_map<std::string, size_t> places;
  model.visit([&](const std::string& ours, Parameter& p) {
    CAMBIUM_CHECK(p.tensor.dtype == Dtype::kF32 || p.tensor.dtype == Dtype::kBF16, "{}", ours);
    const std::vector<StoredForm> forms = stored_forms(rules, model.spec(), parameters, ours);
    for (const StoredPiece& piece : forms.front()) {
      const auto [it, fresh] = places.emplace(piece.tensor, tensors.size());
      if (fresh) {
        tensors.push_back({piece.tensor, piece.shape, {}});
      }
      Joined& joined = tensors[it->second];
      CAMBIUM_CHECK(joined.shape == piece.shape, "{} of {}", piece.tensor, ours);
      joined.members.push_back({piece, &p});
      joined.narrow = joined.narrow && narrow(p);
    }
  });
  std::vector<TensorSource> sources;
  for (const Joined& joined : tensors) {
    int64_t count = 0;
    for (const Joined::Member& member : joined.members) {
      count += member.piece.count();
    }
    CAMBIUM_CHECK(count == joined.count(), "{} of {} elements of {}", count, joined.count(),
                  joined.name);
    sources.push_back(source_of(joined));
  }
  return sources;
}

}  // namespace cambium
