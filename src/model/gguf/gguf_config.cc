#include "model/gguf/gguf_config.h"

#include <algorithm>
#include <cmath>

#include "base/error.h"
#include "base/json.h"
#include "model/gguf/gguf_rope.h"

namespace cambium {
namespace {

using Json = GgufJson;

constexpr int64_t kMaxSize = int64_t{1} << 31;

/// Keys that say nothing, or nothing that a tensor does not say better.
constexpr const char* kUnused[] = {"vocab_size", "tensor_data_layout"};

void read_rules(GgufArchitectureKeys& keys, const GgufArchitecture& row, Json& config) {
  for (const GgufKeyRule& rule : row.keys) {
    const bool there = keys.has(rule.key);
    expect(there || !rule.required, "{}: the key '{}' is missing", keys.path(),
           keys.named(rule.key));
    if (!there) {
      continue;
    }
    Json& to = config[rule.config];
    switch (rule.kind) {
      case GgufKeyRule::kSize:
        to = rule.required ? keys.need(rule.key) : *keys.size(rule.key);
        break;
      case GgufKeyRule::kNumber:
        to = *keys.number(rule.key);
        break;
      case GgufKeyRule::kFlag:
        to = *keys.flag(rule.key);
        break;
    }
    if (!rule.written && to == 0) {
      to = nullptr;  // none
    }
  }
  for (const auto& [key, expected] : row.constants) {
    const auto wanted = static_cast<int64_t>(expected);
    const auto value = keys.size(key);
    expect(value == wanted, "{}: '{}' is {}, expected {} in a model of its architecture",
           keys.path(), keys.named(key), value ? std::to_string(*value) : "missing", wanted);
  }
}

void read_vocabulary(GgufArchitectureKeys& keys, Json& config) {
  const Gguf& gguf = keys.gguf();
  const GgufTensor* embedding = gguf.find("token_embd.weight");
  expect(embedding != nullptr && embedding->shape.size() == 2,
         "{}: the matrix token_embd.weight is missing", gguf.path());
  config["vocab_size"] = embedding->shape[0];
  config["tie_word_embeddings"] = gguf.find("output.weight") == nullptr;
  for (const char* name : {"bos", "eos"}) {
    if (const auto id = gguf.integer(fmt::format("tokenizer.ggml.{}_token_id", name))) {
      config[fmt::format("{}_token_id", name)] = *id;
    }
  }
}

ModelSpec read_by(const GgufArchitecture& row, const Gguf& gguf) {
  const std::string& path = gguf.path();
  GgufArchitectureKeys keys(gguf, row.name);
  const Family& family = find_family(row.families.front());
  Json config = {{"model_type", row.config.value("model_type", family.model_types.front())}};
  read_vocabulary(keys, config);
  read_rules(keys, row, config);
  // Layers after the last predict a token more; they are neither run nor kept.
  const int64_t more = keys.size("nextn_predict_layers").value_or(0);
  const int64_t layers = config.at("num_hidden_layers").get<int64_t>() - more;
  expect(layers > 0, "{}: '{}' leaves none of '{}'", path, keys.named("nextn_predict_layers"),
         keys.named("block_count"));
  config["num_hidden_layers"] = layers;
  expect(layers <= static_cast<int64_t>(gguf.tensors().size()),
         "{}: '{}' is {}, but there are only {} tensors", path, keys.named("block_count"), layers,
         gguf.tensors().size());
  for (const GgufPart& part : row.parts) {
    part.read(keys, config);
  }
  read_gguf_rope(keys, row.rope, config);
  for (const auto& [key, value] : row.config.items()) {
    if (!config.contains(key)) {
      config[key] = value;
    }
  }
  for (const char* key : kUnused) {
    keys.has(key);
  }
  expect(keys.flag("attention.causal").value_or(true),
         "{}: '{}' is false: this model does not generate text", path,
         keys.named("attention.causal"));
  keys.refuse_others();
  ModelSpec spec = family.read_config(config.dump(), path);
  expect(
      expresses(family, spec),
      "{}: a {} config.json cannot express what the keys say (a part of a head that turns, '{}', "
      "where the family turns all of it, or the like)",
      path, family.name, keys.named("rope.dimension_count"));
  return spec;
}

/// What both configurations say otherwise: the path of the first key, and the two values.
struct Difference {
  std::string key;
  Json ours, theirs;
};

bool near(const Json& a, const Json& b) {
  if (a.is_number() && b.is_number()) {
    const auto x = a.get<double>();
    const auto y = b.get<double>();
    return std::abs(x - y) <= 1e-6 * std::max(std::abs(x), std::abs(y));
  }
  if (a.is_array() && b.is_array() && a.size() == b.size()) {
    return std::equal(a.begin(), a.end(), b.begin(), near);
  }
  return a == b;
}

std::optional<Difference> difference(const Json& ours, const Json& theirs) {
  Json keys = ours;
  keys.update(theirs);
  for (const auto& [key, unused] : keys.items()) {
    if (key == "bos_token_id" || key == "eos_token_id") {
      continue;  // the tokenizer's
    }
    const Json a = ours.value(key, Json());
    const Json b = theirs.value(key, Json());
    if (a.is_object() && b.is_object()) {
      if (const auto inside = difference(a, b)) {
        return Difference{key + "." + inside->key, inside->ours, inside->theirs};
      }
    } else if (!near(a, b)) {
      return Difference{key, a, b};
    }
  }
  return std::nullopt;
}

/// What units of our own layout can have and no model of llama.cpp's has.
struct Beyond {
  const char* kind;
  const char* option;  // that makes it so; null: every unit of the kind
  const char* value;   // of the option; null: any
  const char* has;
  const char* there;
};
constexpr Beyond kBeyond[] = {
    {"attention", "temperature", nullptr, "a learned factor of the scores of each head",
     "one number for all heads"},
    {"sliding_window", "temperature", nullptr, "a learned factor of the scores of each head",
     "one number for all heads"},
    {"mamba", "out_gate", "sigmoid", "a sigmoid gate of its output", "a SiLU gate"},
    {"mamba2", "out_gate", "sigmoid", "a sigmoid gate of its output", "a SiLU gate"},
    {"mamba", nullptr, nullptr, "groups of x and B that several heads share",
     "Mamba and Mamba-2 as published"},
    {"parallel", nullptr, nullptr, "a window beside a recurrence", "one mixer or the other"},
    {"sliding_window", "sinks", nullptr, "first tokens that stay in sight behind its window",
     "windows without them"},
};

/// Why there is no architecture for the model: the first of its layers that says so.
std::string beyond_llama_cpp(const ModelSpec& spec) {
  for (size_t i = 0; i < spec.layers.size(); ++i) {
    for (const UnitSpec& mixer : spec.layers[i].mixers()) {
      for (const Beyond& one : kBeyond) {
        const auto& options = mixer.options;
        if (mixer.kind == one.kind && (one.option == nullptr || options.has(one.option)) &&
            (one.value == nullptr || options.text(one.kind, one.option) == one.value)) {
          const std::string named = one.option == nullptr ? "" : fmt::format(" ({})", one.option);
          return fmt::format("layers.{}, {}, has {}{}, and llama.cpp has {}", i, mixer.kind,
                             one.has, named, one.there);
        }
      }
    }
  }
  return fmt::format("llama.cpp has no architecture that computes it (here are those of {})",
                     gguf_architecture_names());
}

/// Windows that no text of the model's lengths leaves are none.
void drop_wide_windows(ModelSpec& spec) {
  for (LayerSpec& layer : spec.layers) {
    UnitSpec* mixer = layer.mixer();
    if (mixer != nullptr && mixer->kind == "attention" &&
        mixer->options.integer("attention", "window", 0) >= spec.max_positions) {
      Options rest;
      for (const auto& [name, value] : mixer->options.values()) {
        if (name != "window") {
          rest.set(name, value);
        }
      }
      mixer->options = rest;
    }
  }
}

}  // namespace

double shortest_decimal(float value) {
  return std::stod(fmt::format("{}", value));
}

std::string GgufArchitectureKeys::ask(std::string_view key) {
  asked_.emplace(key);
  return named(key);
}

std::optional<int64_t> GgufArchitectureKeys::size(std::string_view key) {
  const auto value = gguf_.integer(ask(key));
  expect(value.value_or(0) >= 0 && value.value_or(0) <= kMaxSize,
         "{}: '{}' is {}, which is no size", path(), named(key), value.value_or(0));
  return value;
}

int64_t GgufArchitectureKeys::need(std::string_view key) {
  const auto value = size(key);
  expect(value.has_value(), "{}: the key '{}' is missing", path(), named(key));
  expect(*value > 0, "{}: '{}' is 0, which is no size", path(), named(key));
  return *value;
}

std::optional<double> GgufArchitectureKeys::number(std::string_view key) {
  const auto value = gguf_.number(ask(key));
  if (!value) {
    return std::nullopt;
  }
  const auto narrow = static_cast<float>(*value);
  expect(std::isfinite(narrow), "{}: '{}' is {}, more than fp32 holds", path(), named(key), *value);
  return shortest_decimal(narrow);
}

std::optional<double> GgufArchitectureKeys::positive(std::string_view key) {
  const auto value = number(key);
  expect(!value || *value > 0, "{}: '{}' is {}, expected more than 0", path(), named(key),
         value.value_or(0));
  return value;
}

std::optional<std::vector<int64_t>> GgufArchitectureKeys::by_layer(std::string_view key,
                                                                   int64_t layers) {
  const std::string whole = ask(key);
  const auto it = gguf_.metadata().find(whole);
  if (it == gguf_.metadata().end()) {
    return std::nullopt;
  }
  const auto* list = std::get_if<GgufValue::List>(&it->second.value);
  if (list == nullptr) {
    return std::vector<int64_t>(static_cast<size_t>(layers), *size(key));
  }
  const int64_t more = std::min(size("nextn_predict_layers").value_or(0), kMaxSize);
  expect(std::ssize(*list) == layers || std::ssize(*list) == layers + more,
         "{}: '{}' has {} entries, expected {}", path(), whole, list->size(), layers);
  std::vector<int64_t> values;
  for (const GgufValue& item : std::span(*list).first(static_cast<size_t>(layers))) {
    const auto* flag = std::get_if<bool>(&item.value);
    const auto* natural = std::get_if<uint64_t>(&item.value);
    const auto* integer = std::get_if<int64_t>(&item.value);
    expect(flag != nullptr || natural != nullptr || integer != nullptr,
           "{}: '{}' should be a list of integers", path(), whole);
    const int64_t value = flag != nullptr      ? static_cast<int64_t>(*flag)
                          : natural != nullptr ? static_cast<int64_t>(*natural & INT64_MAX)
                                               : *integer;
    expect(value >= 0 && value <= kMaxSize, "{}: '{}' has {}, which is no size", path(), whole,
           value);
    values.push_back(value);
  }
  return values;
}

void GgufArchitectureKeys::refuse_others() const {
  for (const auto& [key, value] : gguf_.metadata()) {
    if (key.starts_with(prefix_)) {
      expect(asked_.contains(key.substr(prefix_.size())),
             "{}: the key '{}' may change what the model computes and is not understood here",
             gguf_.path(), key);
    }
  }
}

void GgufHead::sizes(std::string_view key, const std::vector<int64_t>& values) {
  GgufValue::List list;
  for (const int64_t value : values) {
    list.emplace_back().value = static_cast<uint64_t>(value);
  }
  put(key, std::move(list));
}

const std::vector<GgufArchitecture>& gguf_architectures() {
  static const std::vector<GgufArchitecture> rows = [] {
    std::vector<GgufArchitecture> all;
    for (const auto& file : {gguf_attention_architectures(), gguf_mamba_architectures(),
                             gguf_linear_architectures(), gguf_latent_architectures()}) {
      all.insert(all.end(), file.begin(), file.end());
    }
    return all;
  }();
  return rows;
}

std::string gguf_architecture_names() {
  std::vector<std::string> names;
  for (const GgufArchitecture& row : gguf_architectures()) {
    if (std::find(names.begin(), names.end(), row.name) == names.end()) {
      names.push_back(row.name);
    }
  }
  const std::string last = names.back();
  names.pop_back();
  return fmt::format("{} and {}", fmt::join(names, ", "), last);
}

GgufModel read_gguf_model(const Gguf& gguf) {
  const std::string name = gguf.text("general.architecture").value_or("(none)");
  const std::vector<GgufArchitecture>& rows = gguf_architectures();
  const auto row = std::find_if(rows.begin(), rows.end(), [&](const GgufArchitecture& one) {
    GgufArchitectureKeys keys(gguf, name);
    return one.name == name && (one.fits == nullptr || one.fits(keys));
  });
  expect(row != rows.end(), "{}: the architecture is '{}', which cannot be imported; {} can",
         gguf.path(), name, gguf_architecture_names());
  return {&*row, read_by(*row, gguf)};
}

GgufHeading write_gguf_heading(const ModelSpec& spec, const std::string& where) {
  const std::vector<GgufArchitecture>& rows = gguf_architectures();
  const auto row = std::find_if(rows.begin(), rows.end(), [&](const GgufArchitecture& one) {
    return std::find(one.families.begin(), one.families.end(), spec.family) != one.families.end() &&
           (one.holds == nullptr || one.holds(spec));
  });
  expect(row != rows.end(),
         "{}: a model of family {} cannot be written as GGUF: {}; run it by Cambium{}", where,
         spec.family, beyond_llama_cpp(spec),
         spec.family == "cambium" ? " or in transformers (cambium export --transformers)" : "");
  GgufHeading heading{&*row, spec, {.architecture = row->name}, {}};
  ModelSpec& said = heading.spec;
  said.family = row->families.front();
  said.kept = {};  // an import passes heads for more tokens by as well
  drop_wide_windows(said);
  if (row->fold != nullptr) {
    heading.factors = row->fold(said);
  }
  const Json config = parse_json<Json>(find_family(said.family).write_config(said), where);
  GgufHead& head = heading.head;
  head.metadata["general.architecture"].value = row->name;
  head.size("vocab_size", said.vocab);
  for (const GgufKeyRule& rule : row->keys) {
    const Json value = config.value(rule.config, Json());
    if (value.is_null() || !rule.written) {
      continue;
    }
    switch (rule.kind) {
      case GgufKeyRule::kSize:
        head.size(rule.key, value.get<int64_t>());
        break;
      case GgufKeyRule::kNumber:
        head.number(rule.key, value.get<double>());
        break;
      case GgufKeyRule::kFlag:
        head.flag(rule.key, value.get<bool>());
        break;
    }
  }
  for (const auto& [key, value] : row->constants) {
    head.put(key, value);
  }
  for (const GgufPart& part : row->parts) {
    part.write(said, config, head);
  }
  write_gguf_rope(said, row->rope, head);
  return heading;
}

void expect_gguf_says_all(const GgufHeading& heading, std::vector<GgufTensor> tensors,
                          const std::string& where) {
  for (const auto& [name, values] : heading.head.tensors) {
    tensors.push_back({name,
                       GgufType::kF32,
                       {std::ssize(values)},
                       reinterpret_cast<const std::byte*>(values.data()),
                       values.size() * sizeof(float)});
  }
  // Numbers as a file holds them.
  GgufMetadata metadata = heading.head.metadata;
  for (auto& [key, value] : metadata) {
    if (auto* number = std::get_if<double>(&value.value)) {
      *number = static_cast<float>(*number);
    }
  }
  ModelSpec back = [&] {
    try {
      return read_by(*heading.row, Gguf(where, std::move(metadata), std::move(tensors)));
    } catch (const Error& error) {
      fail("cannot be written as GGUF, as the file could not be read back: {}", error.what());
    }
  }();
  const ModelSpec& spec = heading.spec;
  if (!heading.row->rope.turns || same_rotation(back.rope, spec.rope)) {
    back.rope = spec.rope;
  }
  for (size_t i = 0; i < std::min(back.more_ropes.size(), spec.more_ropes.size()); ++i) {
    if (same_rotation(back.more_ropes[i], spec.more_ropes[i])) {
      back.more_ropes[i] = spec.more_ropes[i];
    }
  }
  const Family& family = find_family(spec.family);
  const auto config = [&](const ModelSpec& of) {
    return parse_json<Json>(family.write_config(of), where);
  };
  const std::optional<Difference> found = difference(config(spec), config(back));
  expect(!found,
         "{}: cannot be written as GGUF: in config.json's words '{}' is {}, and llama.cpp's {} "
         "computes with {}",
         where, found ? found->key : "", found ? found->ours.dump() : "", heading.row->name,
         found ? found->theirs.dump() : "");
}

}  // namespace cambium
