#include <cstdio>

#include <filesystem>
#include <optional>

#include "base/checked.h"
#include "base/signals.h"
#include "cli/commands.h"
#include "cli/options.h"
#include "hybrid/calibrate.h"
#include "hybrid/placement.h"
#include "hybrid/placement_file.h"
#include "hybrid/plan.h"
#include "train/train_job.h"

namespace cambium {
namespace {

struct ConvertArgs {
  std::string base, output, teacher, init = "attention", storage = "f32", scores, data, placement;
  std::vector<std::string> banks;
  std::vector<int64_t> layers;
  GraftOptions graft;
  // As in GraftOptions where they were not given.
  int64_t calibrate = -1, calibrate_tokens = -1;
  int64_t count = 0, seed = 1;
  DeviceOption device;
  bool replace = false, no_rope = false;
};

/// The documents that starts are calibrated by and fitted on.
struct Documents {
  Tokenizer tokenizer;
  std::shared_ptr<DocumentSource> train, valid;

  Documents(const std::string& model, const std::string& file, uint64_t seed)
      : tokenizer(Tokenizer::load(model)) {
    if (file.empty()) {
      train = problem_source(tokenizer, {}, Split::kTrain, seed);
      valid = problem_source(tokenizer, {}, Split::kValid, seed);
    } else {
      train = valid = load_jsonl(file, tokenizer);
    }
  }
};

/// Trains the new mixers in the folder `folder`, from where a run of the same command before was.
void fit(LoadedModel& hybrid, Model& teacher, const std::vector<int64_t>& layers,
         const GraftOptions& graft, const Documents& documents, uint64_t seed,
         const std::string& folder) {
  TrainConfig config = fit_config(graft.fit_steps(), layers, seed);
  config.folder = folder;
  config.resume = true;
  try {
    Trainer(*hybrid.model, hybrid.weights, config, *documents.train, &teacher).run();
  } catch (const Interrupted& e) {
    throw Interrupted(e.signal(), fmt::format("no hybrid is written; the fit so far is kept in {}, "
                                              "and the same command goes on with it",
                                              folder));
  }
  hybrid.weights.set_trainable(*hybrid.model, nullptr);
}

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
             args.graft == unset.graft && args.init == unset.init && !args.no_rope &&
             args.calibrate < 0 && args.calibrate_tokens < 0 && args.data.empty(),
         "--placement says which layers get what: expected no --layers, --scores, --count, "
         "--teacher, --init, --data or options of a mixer beside it");
  const StopAnywhere stop("nothing is written");
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
  if (!args.placement.empty()) {
    return run_placement(args);
  }
  expect(args.banks.empty(), "--bank belongs to --placement");
  const StopSignals signals;
  std::optional<StopAnywhere> stop("nothing is written");
  GraftOptions graft = args.graft;
  graft.from_attention = args.init == "attention";
  graft.rope = !args.no_rope;
  expect(args.calibrate != 0, "--calibrate: expected at least 1 document, got 0");
  graft.calibrate = std::max<int64_t>(args.calibrate, 0);
  graft.calibrate_tokens =
      args.calibrate_tokens < 0 ? graft.calibrate_tokens : args.calibrate_tokens;
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
  const bool runs = graft.calibrate > 0 || graft.fit_steps() > 0;
  expect(runs || args.data.empty(), "--data belongs to --calibrate and --fit");
  std::optional<Documents> documents;
  std::optional<CalibrationData> calibration;
  const auto seed = static_cast<uint64_t>(args.seed);
  if (runs) {
    expect(args.replace || !std::filesystem::exists(args.output),
           "{} exists already; choose another folder, or --replace", args.output);
    documents.emplace(args.base, args.data, seed);
    if (graft.calibrate > 0) {
      calibration.emplace(*documents->train, *documents->valid,
                          documents->train == documents->valid, graft);
    }
  }
  // What the graft leaves alone is written from the base's own memory, mapped where it can be.
  const LoadOptions load{.storage = MatrixStorage::kStored,
                         .device = runs ? args.device.device() : Device{}};
  LoadedModel base = load_model(args.base, load);
  LoadedModel original;
  if (!args.teacher.empty()) {
    original = load_model(args.teacher, load);
  }
  Model& teacher = original.model ? *original.model : *base.model;
  std::vector<LayerCalibration> found;
  LoadedModel hybrid = convert(*base.model, teacher, layers, graft, seed, true,
                               calibration ? &*calibration : nullptr, &found);
  const std::string fit_folder = args.output + ".fit";
  std::vector<MixerAgreement> fitted;
  if (graft.fit_steps() > 0) {
    stop.reset();  // from here on the trainer keeps what it has
    fit(hybrid, teacher, layers, graft, *documents, seed, fit_folder);
    stop.emplace("nothing is written; the fit is kept in " + fit_folder);
    if (calibration) {
      fitted = measure_mixers(*hybrid.model, teacher, layers, calibration->checked);
    }
  }
  save.written = [&] {
    base.weights.release_mapped();
    original.weights.release_mapped();
  };
  if (calibration) {
    save.files["calibration.json"] = calibration_json(found, fitted);
  }
  save_model(*hybrid.model, args.output, save);
  if (graft.fit_steps() > 0) {
    std::filesystem::remove_all(fit_folder);
  }
  if (calibration) {
    fmt::print("{}", describe_calibration(found, fitted));
  }
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
  args.option("window", "tokens that sliding_window and parallel see (0 = 128)", &a->graft.window);
  args.option("sinks", "first tokens of the text that sliding_window and parallel see too", &a->graft.sinks);
  args.option("recurrent",
              "parallel: the mixer beside the window: gated_delta_net, kimi_delta, mamba2 or "
              "lightning",
              &a->graft.recurrent);
  args.option("window-dropout", "parallel: share of documents trained without their window",
              &a->graft.window_dropout);
  args.option("state", "numbers a channel of mamba (0 = 16 or what divides the head)",
              &a->graft.state);
  args.choice("init", "where new mixers start", {"attention", "random"}, &a->init);
  args.flag("no-rope", "gated_delta_net: q and k do not turn by position", &a->no_rope);
  args.option("calibrate", "documents that the teacher runs over to calibrate the start by",
              &a->calibrate);
  args.option("calibrate-tokens", "tokens of each of them at most (512 otherwise)",
              &a->calibrate_tokens, {2});
  args.option("fit",
              "steps of fitting each new mixer to its attention's output, on the teacher's "
              "own inputs (300 with --calibrate, otherwise none)",
              &a->graft.fit);
  args.option("data,d", "documents for both, JSON lines (generated problems otherwise)", &a->data);
  a->device.declare(args);
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
      "  cambium convert models/teacher -o out/h --layers 3,5,8 --mixer mamba2 --calibrate 16\n"
      "  cambium convert TEACHER -o H1 --scores scores.json --count 25 --mixer mamba --faithful\n"
      "  cambium convert H1 -o H2 --teacher TEACHER --layers 3,5 --mixer mamba\n"
      "  cambium convert TEACHER -o H --placement placement.json",
      declare};
}

}  // namespace cambium
