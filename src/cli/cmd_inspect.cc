#include <algorithm>
#include <cstdio>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>

#include "base/checked.h"
#include "base/text.h"
#include "cli/commands.h"
#include "cli/options.h"
#include "model/kept_tensors.h"
#include "model/supernet.h"
#include "serve/cache_plan.h"
#include "serve/memory_plan.h"
#include "tensor/device_memory.h"

namespace cambium {
namespace {

struct InspectArgs {
  std::string model, memory_total, cache_memory, storage = "stored";
  int64_t context = 0, max_sequences = 0;
  CacheOption cache;
  DeviceOption device;
  PresetOption preset;
  bool memory = false, json = false;
};

/// Units of one kind: where they run, or rest in a choice.
struct Row {
  UnitRole role = UnitRole::kMixer;
  int64_t layers = 0, parameters = 0, active = 0, token_bytes = 0, sequence_bytes = 0;
};

/// Mixers, then feed-forwards, each by name.
using Rows = std::map<std::pair<UnitRole, std::string>, Row>;

Rows rows_of(Model& model, const CachePlan& cache) {
  Rows rows;
  size_t kept = 0;  // in the cache's layouts: those of the units that run and keep something
  for (int64_t i = 0; i < model.layer_count(); ++i) {
    for (const BranchSpec& branch : model.spec().layers[static_cast<size_t>(i)].branches) {
      for (size_t u = 0; u < branch.units.size(); ++u) {
        const UnitSpec& unit = branch.units[u];
        const UnitRole role = find_unit_kind(unit.kind).role;
        const bool runs = branch.runs(u);
        Row& row = rows[{role, runs ? unit.kind : unit.kind + " (rests)"}];
        row.role = role;
        ++row.layers;
        model.visit_layer(
            i, [&, prefix = unit_prefix(i, unit)](const std::string& name, Parameter& p) {
              row.parameters += name.starts_with(prefix) ? p.numel() : 0;
              row.active += runs && name.starts_with(prefix) ? p.active() : 0;
            });
        if (runs && !make_unit(unit, model.spec().width)->state_layout().empty()) {
          const LayerBytes bytes = bytes_of(cache.layouts()[kept++]);
          row.token_bytes += bytes.per_token;
          row.sequence_bytes += bytes.per_sequence;
        }
      }
    }
  }
  return rows;
}

/// Layers whose mixers have the same index.
struct IndexRow {
  std::string mixer;
  IndexShape index;
  std::vector<int64_t> layers;
};

std::vector<IndexRow> indexes_of(const ModelSpec& spec) {
  std::vector<IndexRow> rows;
  for (size_t i = 0; i < spec.layers.size(); ++i) {
    for (const UnitSpec& mixer : spec.layers[i].mixers()) {
      const IndexShape index = make_unit(mixer, spec.width)->index();
      if (index.heads == 0) {
        continue;
      }
      auto row = std::find_if(rows.begin(), rows.end(), [&](const IndexRow& one) {
        return one.mixer == mixer.kind && one.index == index;
      });
      if (row == rows.end()) {
        row = rows.insert(row, {mixer.kind, index, {}});
      }
      row->layers.push_back(static_cast<int64_t>(i));
    }
  }
  return rows;
}

/// "16 tokens", "16 blocks of 128 tokens, the last of them always", ...
std::string describe_choice(const Selection& selection) {
  const char* pieces = kPieceNames[static_cast<size_t>(selection.granularity)];
  switch (selection.granularity) {
    case Granularity::kToken:
      break;
    case Granularity::kBlock:
      return fmt::format("{} {} of {} tokens, the last {} always", selection.top, pieces,
                         selection.size, selection.local);
    case Granularity::kPool:
      return fmt::format("{} {} of {} tokens and what comes after the last whole one",
                         selection.top, pieces, selection.size);
  }
  return fmt::format("{} {}", selection.top, pieces);
}

nlohmann::ordered_json index_json(const IndexRow& row) {
  const Selection& selection = row.index.selection;
  nlohmann::ordered_json json = {
      {"mixer", row.mixer},
      {"layers", row.layers},
      {"heads", row.index.heads},
      {"key_width", row.index.dim},
      {"chooses", kPieceNames[static_cast<size_t>(selection.granularity)]},
      {"for_each", row.index.by_head ? "head of keys" : "token"},
      {"top", selection.top},
      {"budget", selection.all()}};
  if (selection.granularity != Granularity::kToken) {
    json["size"] = selection.size;
  }
  if (selection.granularity == Granularity::kBlock) {
    json["local"] = selection.local;
  }
  return json;
}

void print_index(const IndexRow& row) {
  fmt::print("\nan index of {} heads, keys of {} channels, in {} layers ({}):\n", row.index.heads,
             row.index.dim, row.layers.size(), fmt::join(row.layers, ","));
  fmt::print("  a token{} looks at {}; in texts of up to {} tokens, at all\n",
             row.index.by_head ? ", for each head of keys," : "",
             describe_choice(row.index.selection), row.index.selection.all());
}

MemoryPlan plan_of(const InspectArgs& args, const ModelSpec& spec) {
  MemoryRequest request;
  request.spec = &spec;
  request.weights = weight_sizes(args.model, parse_storage(args.storage), args.preset.name);
  request.engine.cache_values = args.cache.values();
  request.engine.page_size = args.cache.page_size;
  request.engine.max_tokens = args.context;
  if (args.max_sequences > 0) {
    request.engine.max_sequences = args.max_sequences;
  }
  if (!args.cache_memory.empty()) {
    request.engine.memory_bytes = parse_bytes("--cache-memory", args.cache_memory);
  }
  if (!args.memory_total.empty()) {
    request.total_bytes = parse_bytes("--memory-total", args.memory_total);
  }
  // Without a GPU the plan is that of one elsewhere.
  const bool elsewhere = args.device.name == "auto" && cuda_devices() == 0;
  request.device = elsewhere ? Device(Device::kMeta) : args.device.device();
  return plan_memory(request);
}

nlohmann::ordered_json memory_json(const MemoryPlan& plan) {
  return {{"device", plan.device},
          {"measured", plan.measured},
          {"total", plan.total},
          {"in_use", plan.taken},
          {"weights", plan.weights},
          {"workspace", plan.workspace.device},
          {"pinned", plan.workspace.host},
          {"cache", plan.cache.bytes},
          {"reserve", plan.reserve},
          {"left", plan.left()},
          {"sequences", plan.cache.sequences},
          {"cache_tokens", plan.cache.pages * plan.engine.page_size},
          {"page_size", plan.engine.page_size},
          {"longest_sequence", plan.longest}};
}

void print_plan(const MemoryPlan& plan) {
  const auto row = [](const char* name, int64_t n, const std::string& note) {
    fmt::print("  {:<12} {:>10}{}\n", name,
               human_bytes(static_cast<uint64_t>(std::max(n, int64_t{0}))),
               note.empty() ? "" : "  " + note);
  };
  fmt::print("\nmemory of {}, {}\n", plan.device, human_bytes(static_cast<uint64_t>(plan.total)));
  if (plan.taken > 0) {
    row("in use", plan.taken, "by others, and by code that the driver loaded");
  }
  row("weights", plan.weights, "");
  row("workspace", plan.workspace.device,
      fmt::format("{}: {} tokens of prompts beside {} sequences; {} pinned of the host",
                  plan.measured ? "measured" : "about", plan.engine.prefill_tokens,
                  plan.cache.sequences, human_bytes(static_cast<uint64_t>(plan.workspace.host))));
  row("cache", plan.cache.bytes,
      fmt::format("{} sequences at once, {} tokens in all, the longest of {}, in pages of {}",
                  plan.cache.sequences, plan.cache.pages * plan.engine.page_size, plan.longest,
                  plan.engine.page_size));
  row("reserve", plan.reserve, "code, graphs, metadata of steps");
  row("left", plan.left(), "");
}

int run(const InspectArgs& args) {
  Model model(read_spec(args.model, args.preset.name));
  const ModelSpec& spec = model.spec();
  CacheConfig cache_config;
  cache_config.values = args.cache.values();
  cache_config.page_size = args.cache.page_size;
  const CachePlan cache(model, cache_config);
  const Rows rows = rows_of(model, cache);
  const int64_t parameters = model.parameter_count();
  // Norms, embedding and head are there for every token.
  int64_t rest = parameters;
  int64_t active = parameters;
  for (const auto& [key, row] : rows) {
    rest -= row.parameters;
    active -= row.parameters - row.active;
  }
  const int64_t context = args.context > 0 ? args.context : spec.max_positions;
  std::optional<MemoryPlan> plan;
  if (args.memory || !args.memory_total.empty()) {
    plan = plan_of(args, spec);
  }
  if (args.json) {
    nlohmann::ordered_json json;
    json["family"] = spec.family;
    json["layers"] = model.layer_count();
    json["layer_map"] = layer_map(spec);
    if (is_supernet(spec)) {
      json["choices"] = {{"layers", choice_layers(spec)}, {"mixers", mixer_labels(spec)}};
      for (const Preset& preset : spec.presets) {
        json["presets"][preset.name] = layer_map(unwrapped(spec, preset.active));
      }
    }
    json["parameters"] = parameters;
    json["active_parameters"] = active;
    if (spec.kept.tensors != nullptr) {
      json["kept"] = {{"family", spec.kept.family},
                      {"heads", spec.kept.heads},
                      {"tensors", spec.kept.tensors->entries.size()},
                      {"parameters", spec.kept.tensors->numbers()},
                      {"stale", kept_is_stale(spec)}};
    }
    json["cache_bytes_per_token"] = cache.lasting_bytes_per_token();
    for (const auto& [key, row] : rows) {
      nlohmann::ordered_json unit = {{"layers", row.layers},
                                     {"parameters", row.parameters},
                                     {"active_parameters", row.active}};
      if (row.role == UnitRole::kMixer) {
        unit["bytes_per_token"] = row.token_bytes;
        unit["bytes_per_sequence"] = row.sequence_bytes;
      }
      json[row.role == UnitRole::kMixer ? "mixers" : "feed_forwards"][key.second] = unit;
    }
    for (const IndexRow& row : indexes_of(spec)) {
      json["indexes"].push_back(index_json(row));
    }
    if (plan) {
      json["memory"] = memory_json(*plan);
    }
    std::printf("%s\n", json.dump(1).c_str());
    return 0;
  }
  const auto bytes = [](int64_t n) { return human_bytes(static_cast<uint64_t>(n)); };
  const auto count = [](int64_t n) { return human_count(static_cast<double>(n)); };
  fmt::print("{}: {}, {} parameters{}, {} layers of width {}, vocabulary {}\n{}\n\n", args.model,
             spec.family, count(parameters),
             active == parameters ? "" : fmt::format(" ({} active for a token)", count(active)),
             model.layer_count(), spec.width, spec.vocab, layer_map(spec));
  if (is_supernet(spec)) {
    fmt::print("a supernet: {} layers choose among {}; below, those that are active\n",
               choice_layers(spec).size(), join(mixer_labels(spec), ", "));
    for (const Preset& preset : spec.presets) {
      fmt::print("  preset {:<16} {}\n", preset.name, layer_map(unwrapped(spec, preset.active)));
    }
    fmt::print("\n");
  }
  fmt::print("{:<26} {:>6} {:>11} {:>12} {:>14} {:>17}\n", "unit", "layers", "parameters",
             "for a token", "cache / token", "cache / sequence");
  for (const auto& [key, row] : rows) {
    const bool keeps = row.token_bytes + row.sequence_bytes > 0;
    fmt::print("{:<26} {:>6} {:>11} {:>12} {:>14} {:>17}\n", key.second, row.layers,
               count(row.parameters), count(row.active), keeps ? bytes(row.token_bytes) : "-",
               keeps ? bytes(row.sequence_bytes) : "-");
  }
  fmt::print("{:<26} {:>6} {:>11} {:>12} {:>14} {:>17}\n", "embedding, head, norms", "-",
             count(rest), count(rest), "-", "-");
  for (const IndexRow& row : indexes_of(spec)) {
    print_index(row);
  }
  if (const std::string kept = describe_kept(spec); !kept.empty()) {
    fmt::print("\n{}\n", kept);
  }
  std::printf("\na sequence of %lld tokens takes %s of cache\n", static_cast<long long>(context),
              bytes(cache.sequence_bytes(context)).c_str());
  std::printf("weights take %s in f32, %s in bf16\n", bytes(4 * parameters).c_str(),
              bytes(2 * parameters).c_str());
  if (plan) {
    print_plan(*plan);
  }
  return 0;
}

Action declare(Args& args) {
  auto a = std::make_shared<InspectArgs>();
  args.positional("model",
                  "checkpoint folder (its config.json and the headers of its weights are read)",
                  &a->model);
  args.flag("memory", "plan the memory of serving it: weights, workspace, cache, what is left",
            &a->memory);
  args.option("memory-total", "the same, for a device with this much: 24GiB, 80GB",
              &a->memory_total);
  args.option("cache-memory", "at most this much of it for the cache", &a->cache_memory);
  args.option("max-sequences", "sequences at once (32)", &a->max_sequences, {1, 65'536});
  args.choice("storage", "of matrices in memory; without weights, stored is f32",
              {"stored", "f32", "bf16"}, &a->storage);
  a->cache.declare(args);
  a->cache.declare_page_size(args);
  args.option("context", "tokens of a sequence (the model's positions otherwise)", &a->context,
              {0, kMaxPositions});
  a->preset.declare(args);
  a->device.declare(args);
  args.flag("json", "print JSON", &a->json);
  return [a] { return run(*a); };
}

}  // namespace

Command inspect_command() {
  return {"inspect", "layers, mixers, parameters, cache and what fits, before anything is loaded",
          "  cambium inspect models/teacher\n"
          "  cambium inspect DIR --memory --max-sequences 64\n"
          "  cambium inspect DIR --memory-total 80GB --context 16384",
          declare};
}

}  // namespace cambium
