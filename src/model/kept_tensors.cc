#include "model/kept_tensors.h"

#include <algorithm>
#include <charconv>
#include <set>

#include "base/checked.h"
#include "base/text.h"
#include "model/families/config.h"
#include "model/model.h"
#include "model/packed_tensor.h"

namespace cambium {
namespace {

using config::Json;

constexpr const char* kOwn = "cambium";
constexpr std::string_view kPrefix = "kept.";

/// Whether a pattern of MtpRules::tensors means this tensor of a model of so many layers.
bool matches(std::string pattern, const std::string& tensor, size_t layers) {
  const size_t mark = pattern.find('#');
  if (mark == std::string::npos) {
    return match_pattern(pattern, tensor);
  }
  pattern[mark] = '*';
  std::vector<std::string_view> captures;
  if (!match_pattern(pattern, tensor, &captures)) {
    return false;
  }
  size_t number = 0;
  const std::string_view text = captures[0];
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  return error == std::errc() && end == text.data() + text.size() && number >= layers;
}

/// The table's name of a tensor of layer `layer`, as the heads' files have it.
std::string apart_name(const std::string& tensor, size_t layer, size_t own) {
  const std::string number = fmt::format(".layers.{}.", layer);
  const size_t at = tensor.find(number);
  CAMBIUM_CHECK(at != std::string::npos, "{}", tensor);
  return fmt::format("mtp.layers.{}.{}", own, tensor.substr(at + number.size()));
}

/// Checks the tensors of the heads one after the other.
class MtpCheck {
 public:
  MtpCheck(const SafeTensors& file, const ModelSpec& spec, const KeptSpec& said,
           const Family& family)
      : file_(file), spec_(spec), rules_(family.mtp) {
    const std::vector<LayerSpec> layers = rules_.layers(spec, said.heads, said.kinds);
    ModelSpec longer = spec;
    longer.layers.insert(longer.layers.end(), layers.begin(), layers.end());
    Model model(longer);
    ParametersByName parameters;
    model.visit([&](const std::string& name, Parameter& p) { parameters[name] = &p; });
    for (size_t i = 0; i < layers.size(); ++i) {
      const size_t layer = spec.layers.size() + i;
      model.visit_layer(static_cast<int64_t>(layer), [&](const std::string& ours, Parameter&) {
        expect_parameter(stored_forms(family.tensors, longer, parameters, ours), layer, i,
                         ours.find(".indexer.") != std::string::npos);
      });
    }
    const size_t length = layers.size() / static_cast<size_t>(said.heads);
    for (const MtpTensor& own : rules_.own) {
      for (size_t head = 0; head < static_cast<size_t>(said.heads); ++head) {
        const size_t layer =
            head * length + (own.place == MtpTensor::Place::kLast ? length - 1 : 0);
        expect_own(own, rules_.apart ? layer : spec.layers.size() + layer);
      }
    }
  }

  void expect_known(const TensorEntry& entry) const {
    expect(used_.contains(entry.name) || is_activation_scale(entry.name),
           "{}: tensor {} {} is none of a head that predicts more tokens; config.json and weights "
           "do not fit together",
           file_.path(), entry.name, shape_text(entry.shape));
  }

 private:
  /// Any of the forms in which a parameter may be stored. An index may be left out.
  void expect_parameter(const std::vector<StoredForm>& forms, size_t layer, size_t own,
                        bool optional) {
    std::string first;
    for (const StoredForm& form : forms) {
      std::vector<PackedTensor> found;
      for (const StoredPiece& piece : form) {
        const std::string name = rules_.apart ? apart_name(piece.tensor, layer, own) : piece.tensor;
        first = first.empty() ? name : first;
        std::optional<PackedTensor> tensor = find_packed(file_, name);
        if (!tensor) {
          break;
        }
        expect_shape(*tensor, piece.shape);
        found.push_back(*std::move(tensor));
      }
      if (found.size() == form.size()) {
        for (const PackedTensor& tensor : found) {
          used_.insert(tensor.parts.begin(), tensor.parts.end());
        }
        return;
      }
    }
    expect(optional, "{}: tensor {} of a head that predicts more tokens is missing", file_.path(),
           first);
  }

  void expect_own(const MtpTensor& own, size_t layer) {
    std::string name = own.name;
    if (const size_t mark = name.find('#'); mark != std::string::npos) {
      name.replace(mark, 1, std::to_string(layer));
    }
    const std::optional<PackedTensor> tensor = find_packed(file_, name);
    expect(tensor || own.optional, "{}: tensor {} of a head that predicts more tokens is missing",
           file_.path(), name);
    if (!tensor) {
      return;
    }
    switch (own.shape) {
      case MtpTensor::Shape::kNorm:
        expect_shape(*tensor, {spec_.width});
        break;
      case MtpTensor::Shape::kJoin:
        expect_shape(*tensor, {spec_.width, 2 * spec_.width});
        break;
      case MtpTensor::Shape::kTokens:
        expect_shape(*tensor, {spec_.vocab, spec_.width});
        break;
    }
    used_.insert(tensor->parts.begin(), tensor->parts.end());
  }

  void expect_shape(const PackedTensor& tensor, const std::vector<int64_t>& shape) const {
    expect(tensor.shape == shape, "{}: tensor {} has shape {}, expected {} by config.json",
           file_.path(), tensor.values.name, shape_text(tensor.shape), shape_text(shape));
  }

  const SafeTensors& file_;
  const ModelSpec& spec_;
  const MtpRules& rules_;
  std::set<std::string> used_;
};

std::string text_at(const Json& config, const char* key, const std::string& where) {
  return key == nullptr ? "" : config::text_or(config, key, "", where);
}

}  // namespace

int64_t KeptTensors::numbers() const {
  int64_t sum = 0;
  for (const TensorEntry& entry : entries) {
    sum += entry.name.find("_scale") == std::string::npos ? entry.count() : 0;
  }
  return sum;
}

KeptSpec read_kept(const Json& config, const Family& family, const std::string& where) {
  if (family.name == std::string_view(kOwn)) {
    const auto it = config.find("kept");
    if (it == config.end()) {
      return {};
    }
    const std::string inside = where + ".kept";
    expect(it->is_object(), "{}: expected an object", inside);
    KeptSpec said;
    said.family = config::text_or(*it, "family", "", inside);
    find_family(said.family);
    said.heads = config::integer(*it, "heads", 1, kMaxLayers, inside);
    said.kinds = config::text_or(*it, "kinds", "", inside);
    return said;
  }
  const auto text = config.find("text_config");
  const Json& own = text != config.end() && text->is_object() ? *text : config;
  KeptSpec said;
  said.family = family.name;
  said.heads =
      config::integer_or(own, family.mtp.count, family.mtp.otherwise, 0, kMaxLayers, where);
  said.kinds = text_at(own, family.mtp.kinds_key, where);
  return said;
}

void take_kept(ModelSpec& spec, const KeptSpec& said, const Family& family,
               const std::shared_ptr<const SafeTensors>& file) {
  auto kept = std::make_shared<KeptTensors>();
  kept->file = file;
  for (const TensorEntry& entry : file->tensors()) {
    if (std::any_of(family.mtp.tensors.begin(), family.mtp.tensors.end(),
                    [&](const std::string& pattern) {
                      return matches(pattern, entry.name, spec.layers.size());
                    })) {
      kept->entries.push_back(entry);
    }
  }
  expect(family.name != std::string_view(kOwn) || !kept->entries.empty(),
         "{}: config.json says that tensors of {} are kept, and the files have none", file->path(),
         said.family);
  if (kept->entries.empty()) {
    return;
  }
  if (family.mtp.layers != nullptr) {
    expect(said.heads > 0,
           "{}: tensor {} is one of a head that predicts more tokens, and config.json says {} {}",
           file->path(), kept->entries.front().name, family.mtp.count, said.heads);
    const MtpCheck check(*file, spec, said, family);
    for (const TensorEntry& entry : kept->entries) {
      check.expect_known(entry);
    }
  }
  spec.kept = said;
  spec.kept.tensors = std::move(kept);
}

void write_kept(Json& config, const ModelSpec& spec) {
  const KeptSpec& kept = spec.kept;
  if (kept.tensors == nullptr) {
    return;
  }
  if (spec.family == kOwn) {
    config["kept"] = {{"family", kept.family}, {"heads", std::max<int64_t>(kept.heads, 1)}};
    if (!kept.kinds.empty()) {
      config["kept"]["kinds"] = kept.kinds;
    }
    return;
  }
  const MtpRules& rules = find_family(spec.family).mtp;
  config[rules.count] = kept.heads;
  if (!kept.kinds.empty()) {
    config[rules.kinds_key] = kept.kinds;
  }
}

std::vector<TensorSource> kept_sources(const ModelSpec& spec) {
  std::vector<TensorSource> sources;
  if (spec.kept.tensors == nullptr) {
    return sources;
  }
  for (const TensorEntry& entry : spec.kept.tensors->entries) {
    const bool named = spec.family != kOwn || entry.name.starts_with(kPrefix);
    sources.push_back(
        TensorSource::from_memory(named ? entry.name : std::string(kPrefix) + entry.name,
                                  entry.dtype, entry.shape, entry.data));
  }
  return sources;
}

bool kept_is_stale(const ModelSpec& spec) {
  return spec.kept.tensors != nullptr && spec.family != spec.kept.family;
}

std::string describe_kept(const ModelSpec& spec) {
  if (spec.kept.tensors == nullptr) {
    return "";
  }
  const KeptTensors& kept = *spec.kept.tensors;
  std::string text = fmt::format(
      "kept and not run: {} of {} for more tokens at once (MTP), {} tensors, {} parameters",
      spec.kept.heads == 1 ? "a head" : "heads", spec.kept.family, kept.entries.size(),
      human_count(static_cast<double>(kept.numbers())));
  if (kept_is_stale(spec)) {
    text += "; stale: trained with layers that have changed since";
  }
  return text;
}

}  // namespace cambium
