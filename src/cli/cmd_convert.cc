#include <cstdio>

#include "base/checked.h"
#include "base/signals.h"
#include "cli/commands.h"
#include "hybrid/graft.h"
#include "hybrid/placement.h"
#include "hybrid/placement_file.h"
#include "hybrid/plan.h"

namespace cambium {
namespace {

struct ConvertArgs {
  std::string base, output, teacher, init = "attention", storage = "f32", scores, placement;
  std::vector<std::string> banks;
  std::vector<int64_t> layers;
  GraftOptions graft;
  int64_t count = 0, seed = 1;
  bool replace = false;
};

SaveOptions save_options(const ConvertArgs& args) {
  SaveOptions save;
  save.tokenizer_from = args.base;
  save.storage = parse_storage(args.storage);
  save.replace = args.replace;
  return save;
}

// The hybrid of a search: each layer's mixer is the one that was measured there.
int run_placement(const ConvertArgs& args) {
  const ConvertArgs unset;
  expect(args.layers.empty() && args.scores.empty() && args.count == 0 && args.teacher.empty() &&
             args.graft == unset.graft && args.init == unset.init,
         "--placement says which layers get what: expected no --layers, --scores, --count, "
         "--teacher, --init or options of a mixer beside it");
  const PlacementRecipe recipe = read_placement(args.placement);
  LoadedModel teacher = load_model(args.base, {.storage = MatrixStorage::kStored});
  const MixerBank bank = bank_for(recipe, teacher, args.banks, args.placement);
  const LoadedModel hybrid = bank.build(recipe.choices);
  check_can_be_saved(hybrid.model->spec(), "convert");
  SaveOptions save = save_options(args);
  save_model(*hybrid.model, args.output, save);
  fmt::print("{}  {} of {} layers converted, in {}\n", layer_map(hybrid.model->spec()),
             converted_layers(hybrid.model->spec(), &teacher.model->spec()).size(),
             hybrid.model->layer_count(), args.output);
  return 0;
}

int run(const ConvertArgs& args) {
  const StopAnywhere stop("nothing is written");
  if (!args.placement.empty()) {
    return run_placement(args);
  }
  expect(args.banks.empty(), "--bank belongs to --placement");
  GraftOptions graft = args.graft;
  graft.from_attention = args.init == "attention";
  check_fields(graft, "convert");
  check_graft_options(graft, "convert");
  std::vector<int64_t> layers = args.layers;
  expect(layers.empty() || args.scores.empty(), "expected --layers or --scores, not both");
  expect(args.count == 0 || !args.scores.empty(), "--count belongs to --scores");
  if (!args.scores.empty()) {
    layers = place_by_file(args.scores, read_spec(args.base), args.count);
  }
  expect(!layers.empty(), "expected --layers, --scores with --count, or --placement");
  check_can_be_saved(
      convert_spec(read_spec(args.base), read_spec(args.teacher.empty() ? args.base : args.teacher),
                   layers, graft),
      "convert");
  SaveOptions save = save_options(args);
  // What the graft leaves alone is written from the base's own memory, mapped where it can be.
  LoadedModel base = load_model(args.base, {.storage = MatrixStorage::kStored});
  LoadedModel original;
  if (!args.teacher.empty()) {
    original = load_model(args.teacher, {.storage = MatrixStorage::kStored});
  }
  Model& teacher = original.model ? *original.model : *base.model;
  LoadedModel hybrid =
      convert(*base.model, teacher, layers, graft, static_cast<uint64_t>(args.seed), true);
  save.written = [&] {
    base.weights.release_mapped();
    original.weights.release_mapped();
  };
  save_model(*hybrid.model, args.output, save);
  fmt::print("{}  {} of {} layers converted, in {}\n", layer_map(hybrid.model->spec()),
             converted_layers(hybrid.model->spec(), &teacher.spec()).size(),
             hybrid.model->layer_count(), args.output);
  return 0;
}

Action declare(Args& args) {
  auto a = std::make_shared<ConvertArgs>();
  args.positional("base", "the teacher, or a hybrid made from it", &a->base);
  args.option("output,o", "folder of the hybrid", &a->output, true);
  args.option("layers,l", "layers to convert, from 0: 3,5,6", &a->layers, {0, kMaxLayers - 1});
  args.option("scores", "layer scores of `cambium score`: the lowest --count are converted",
              &a->scores);
  args.option("count,k", "how many layers, with --scores", &a->count, {0, kMaxLayers});
  args.option("placement", "a placement of `cambium place --method search`", &a->placement);
  args.option("bank", "placement: KIND=DIR, where a bank now is (as it was otherwise)", &a->banks);
  args.choice("mixer", "what takes the place of attention", graft_mixers(), &a->graft.mixer);
  args.option("window", "tokens that sliding_window sees (0 = 128)", &a->graft.window);
  args.option("state", "numbers a channel of mamba (0 = 16 or what divides the head)",
              &a->graft.state);
  args.choice("init", "where new mixers start", {"attention", "random"}, &a->init);
  args.flag("faithful", "the released layout of Apriel-H1, quirks included", &a->graft.faithful);
  args.option("teacher", "the original teacher, when base is a hybrid", &a->teacher);
  args.choice("storage", "of matrices; stored is old ones as in the base, new ones f32",
              {"f32", "bf16", "stored"}, &a->storage);
  args.option("seed", "of what does not come from attention", &a->seed);
  args.flag("replace", "replace the output folder", &a->replace);
  return [a] { return run(*a); };
}

}  // namespace

Command convert_command() {
  return {
      "convert", "writes a hybrid: chosen layers get a new mixer, started from their attention",
      "  cambium convert models/teacher -o out/h --layers 3,5,8 --mixer gated_delta_net\n"
      "  cambium convert TEACHER -o H1 --scores scores.json --count 25 --mixer mamba --faithful\n"
      "  cambium convert H1 -o H2 --teacher TEACHER --layers 3,5 --mixer mamba\n"
      "  cambium convert TEACHER -o H --placement placement.json",
      declare};
}

}  // namespace cambium
