#include <cstdio>
#include <map>
#include <nlohmann/json.hpp>

#include "base/checked.h"
#include "base/text.h"
#include "cli/commands.h"
#include "cli/options.h"
#include "model/spec.h"
#include "serve/cache_plan.h"

namespace cambium {
namespace {

struct InspectArgs {
  std::string model, memory, cache = "bf16";
  int64_t context = 0;
  bool json = false;
};

struct Row {
  int64_t layers = 0, parameters = 0, token_bytes = 0, sequence_bytes = 0;
};

int run(const InspectArgs& args) {
  Model model(read_spec(args.model));
  const ModelSpec& spec = model.spec();
  CacheConfig cache_config;
  cache_config.values = parse_cache_values(args.cache);
  const CachePlan cache(model, cache_config);
  std::map<std::string, Row> rows;
  for (int64_t i = 0; i < model.layer_count(); ++i) {
    Row& row = rows[layer_kind(spec.layers[static_cast<size_t>(i)])];
    ++row.layers;
    model.layer(i).visit_mixers(
        [&](const std::string&, Parameter& p) { row.parameters += p.numel(); });
    row.token_bytes += cache.layers()[static_cast<size_t>(i)].per_token;
    row.sequence_bytes += cache.layers()[static_cast<size_t>(i)].per_sequence;
  }
  const int64_t parameters = model.parameter_count();
  const int64_t context = args.context > 0 ? args.context : spec.max_positions;
  const int64_t memory = args.memory.empty() ? 0 : parse_bytes("--memory", args.memory);
  struct Fit {
    const char* storage;
    int64_t weights, sequences, longest;
  };
  std::vector<Fit> fits;
  for (const auto& [storage, bytes] :
       {std::pair{"f32", int64_t{4}}, std::pair{"bf16", int64_t{2}}}) {
    const int64_t weights = parameters * bytes;
    const int64_t left = std::max<int64_t>(0, memory - weights);
    fits.push_back({storage, weights, cache.sequences_in(left, context),
                    cache.longest_in(left, spec.max_positions)});
  }
  if (args.json) {
    nlohmann::ordered_json json;
    json["family"] = spec.family;
    json["layers"] = model.layer_count();
    json["layer_map"] = layer_map(spec);
    json["parameters"] = parameters;
    json["cache_bytes_per_token"] = cache.lasting_bytes_per_token();
    for (const auto& [kind, row] : rows) {
      json["mixers"][kind] = {{"layers", row.layers},
                              {"parameters", row.parameters},
                              {"bytes_per_token", row.token_bytes},
                              {"bytes_per_sequence", row.sequence_bytes}};
    }
    for (const Fit& fit : fits) {
      if (memory > 0) {
        json["memory"][fit.storage] = {{"weights", fit.weights},
                                       {"context", context},
                                       {"sequences", fit.sequences},
                                       {"longest_sequence", fit.longest}};
      }
    }
    std::printf("%s\n", json.dump(1).c_str());
    return 0;
  }
  const auto bytes = [](int64_t n) { return human_bytes(static_cast<uint64_t>(n)); };
  std::printf("%s: %s, %s parameters, %lld layers of width %lld, vocabulary %lld\n%s\n\n",
              args.model.c_str(), spec.family.c_str(),
              human_count(static_cast<double>(parameters)).c_str(),
              static_cast<long long>(model.layer_count()), static_cast<long long>(spec.width),
              static_cast<long long>(spec.vocab), layer_map(spec).c_str());
  std::printf("%-18s %7s %12s %14s %18s\n", "mixer", "layers", "parameters", "cache / token",
              "cache / sequence");
  for (const auto& [kind, row] : rows) {
    std::printf("%-18s %7lld %12s %14s %18s\n", kind.c_str(), static_cast<long long>(row.layers),
                human_count(static_cast<double>(row.parameters)).c_str(),
                bytes(row.token_bytes).c_str(), bytes(row.sequence_bytes).c_str());
  }
  std::printf("\na sequence of %lld tokens takes %s of cache\n", static_cast<long long>(context),
              bytes(cache.sequence_bytes(context)).c_str());
  for (const Fit& fit : fits) {
    std::printf("weights in %-5s %s", fit.storage, bytes(fit.weights).c_str());
    if (memory > 0) {
      std::printf("; in %s fit %lld sequences of %lld tokens, or one of %lld", args.memory.c_str(),
                  static_cast<long long>(fit.sequences), static_cast<long long>(context),
                  static_cast<long long>(fit.longest));
    }
    std::printf("\n");
  }
  return 0;
}

Action declare(Args& args) {
  auto a = std::make_shared<InspectArgs>();
  args.positional("model", "checkpoint folder (only its config.json is read)", &a->model);
  args.option("memory", "what fits into this much: 24GiB, 80GB", &a->memory);
  args.option("cache", "bf16 or f32: how keys and values are kept", &a->cache);
  args.option("context", "tokens of a sequence (the model's positions otherwise)", &a->context,
              {0, kMaxPositions});
  args.flag("json", "print JSON", &a->json);
  return [a] { return run(*a); };
}

}  // namespace

Command inspect_command() {
  return {"inspect", "layers, mixers, parameters, cache and what fits, before anything is loaded",
          "  cambium inspect models/teacher\n"
          "  cambium inspect DIR --memory 80GB --context 16384",
          declare};
}

}  // namespace cambium
