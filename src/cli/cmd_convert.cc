#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <optional>

#include "base/checked.h"
#include "base/signals.h"
#include "base/text.h"
#include "cli/commands.h"
#include "cli/options.h"
#include "hybrid/calibrate.h"
#include "hybrid/placement.h"
#include "hybrid/placement_file.h"
#include "hybrid/plan.h"
#include "nn/units/units.h"
#include "train/train_job.h"

namespace cambium {
namespace {

struct ConvertArgs {
  std::string base, output, teacher, init = "attention", storage = "f32", scores, data, placement;
  std::string preset, joins;
  std::vector<std::string> banks, mixers = {"mamba"}, added, dropped;
  std::vector<int64_t> layers;
  GraftOptions graft;
  // As in GraftOptions where they were not given.
  int64_t calibrate = -1, calibrate_tokens = -1;
  int64_t count = 0, seed = 1;
  DeviceOption device;
  bool replace = false, no_rope = false, supernet = false, thin = false;

  /// A hybrid or a view of what `base` has, in which no new mixer is started.
  bool starts_nothing() const {
    const ConvertArgs unset;
    return layers.empty() && scores.empty() && count == 0 && teacher.empty() &&
           graft == unset.graft && mixers == unset.mixers && init == unset.init && !no_rope &&
           calibrate < 0 && calibrate_tokens < 0 && data.empty() && !supernet;
  }
};

/// The documents that starts are calibrated by and fitted on.
struct Documents {
  Tokenizer tokenizer;
  std::shared_ptr<DocumentSource> train, valid;

  Documents(const std::string& model, int64_t vocab, const std::string& file, uint64_t seed)
      : tokenizer(load_tokenizer(model, vocab)) {
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

/// What stays of the base is written from its own memory, mapped where it can be; what it has in
/// fp8 or NVFP4 is rounded where bf16 is asked for alone.
LoadOptions load_options(const ConvertArgs& args) {
  const MatrixStorage storage = parse_storage(args.storage);
  return {.storage = MatrixStorage::kStored,
          .saved_as = storage == MatrixStorage::kStored ? MatrixStorage::kF32 : storage};
}

// The hybrid of a search: each layer's mixer is the one that was measured there.
int run_placement(const ConvertArgs& args) {
  expect(args.starts_nothing() && args.added.empty(),
         "--placement says which layers get what: expected no --layers, --scores, --count, "
         "--teacher, --init, --data or options of a mixer beside it");
  const StopAnywhere stop("nothing is written");
  const PlacementRecipe recipe = read_placement(args.placement);
  LoadedModel teacher = load_model(args.base, load_options(args));
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

/// "NAME=PLACEMENT": a placement of `cambium place --method search` on this supernet, one mixer for
/// all layers, or a mixer's number for each layer that has a choice, as files have it.
Preset parse_preset(const std::string& text, const ModelSpec& spec) {
  const size_t at = text.find('=');
  expect(at != std::string::npos && at + 1 < text.size(),
         "--add-preset: expected NAME=PLACEMENT, got '{}'", text);
  const std::string placement = text.substr(at + 1);
  const std::vector<std::string> labels = mixer_labels(spec);
  const std::vector<int64_t> choices = choice_layers(spec);
  const std::string where = "--add-preset " + text;
  if (std::find(labels.begin(), labels.end(), placement) != labels.end()) {
    return {text.substr(0, at), uniform_units(spec, placement)};
  }
  // A layer without attention was not open to a search.
  std::vector<std::string> chosen = active_labels(spec, uniform_units(spec, attention_label(spec)));
  if (std::filesystem::exists(placement)) {
    const PlacementRecipe recipe = read_placement(placement);
    for (size_t i = 0; i < recipe.layers.size(); ++i) {
      const auto layer = static_cast<size_t>(recipe.layers[i]);
      const bool here = layer < chosen.size() && spec.layers[layer].choice() != nullptr;
      expect(here || recipe.choices[i] == 0,
             "{}: layer {} has no choice here, and {} is to stand there", where, layer,
             recipe.kinds[static_cast<size_t>(recipe.choices[i])].name);
      if (here && recipe.choices[i] != 0) {
        chosen[layer] = recipe.kinds[static_cast<size_t>(recipe.choices[i])].name;
      }
    }
  } else {
    expect(
        labels.size() > 10 || placement.find_first_not_of("0123456789") == std::string::npos,
        "{}: expected a file of `cambium place --method search`, a mixer ({}) or the number of one "
        "for each of {} layers, got '{}'{}",
        where, join(labels, ", "), choices.size(), placement, did_you_mean(placement, labels));
    const Choices kinds = parse_placement(placement, choices.size(), labels.size(), where);
    for (size_t i = 0; i < kinds.size(); ++i) {
      chosen[static_cast<size_t>(choices[i])] = labels[static_cast<size_t>(kinds[i])];
    }
  }
  return {text.substr(0, at), units_of_labels(spec, chosen, where)};
}

// A supernet with other presets, a thin one, or the plain hybrid that a preset is.
int run_presets(const ConvertArgs& args) {
  expect(
      args.starts_nothing(),
      "--preset, --thin, --add-preset and --drop-preset take a supernet as it is: expected no "
      "--layers, --scores, --count, --teacher, --init, --data or options of a mixer beside them");
  expect(args.preset.empty() || (!args.thin && args.added.empty() && args.dropped.empty()),
         "--preset writes one hybrid: expected no --thin, --add-preset or --drop-preset beside it");
  const StopAnywhere stop("nothing is written");
  LoadOptions load = load_options(args);
  load.preset = args.preset;
  LoadedModel base = load_model(args.base, load);
  SaveOptions save = save_options(args);
  if (!args.preset.empty()) {
    save_model(*base.model, args.output, save);
    fmt::print("{}  preset {} as a plain hybrid, in {}\n", layer_map(base.model->spec()),
               args.preset, args.output);
    return 0;
  }
  ModelSpec spec = base.model->spec();
  expect(is_supernet(spec), "{}: is no supernet, which has presets; its layers are {}", args.base,
         layer_map(spec));
  for (const std::string& name : args.dropped) {
    find_preset(spec, name, args.base);
    std::erase_if(spec.presets, [&](const Preset& preset) { return preset.name == name; });
  }
  for (const std::string& text : args.added) {
    put_preset(spec, parse_preset(text, spec));
  }
  spec = args.thin ? thinned(spec, args.base) : spec;
  spec.family = fitting_family(spec);
  const std::map<std::string, Tensor> tensors = tensors_of(*base.model);
  LoadedModel view =
      view_model(spec, *base.model, [&](const std::string& name) { return tensors.at(name); });
  save_model(*view.model, args.output, save);
  fmt::print("{} of {} parameters, {} presets, in {}\n",
             human_count(static_cast<double>(view.model->parameter_count())),
             human_count(static_cast<double>(base.model->parameter_count())), spec.presets.size(),
             args.output);
  return 0;
}

struct Started {
  LoadedModel hybrid;
  std::vector<LayerCalibration> found;
  std::vector<MixerAgreement> fitted;
};

/// A conversion of `layers` to one mixer, started, calibrated and fitted as asked. All but the new
/// mixers are views of the base.
class Starter {
 public:
  Starter(const ConvertArgs& args, Model& base, Model& teacher, std::vector<int64_t> layers)
      : args_(args), base_(base), teacher_(teacher), layers_(std::move(layers)) {}

  /// `fit_folder`: where the fit is kept until the hybrid is written.
  Started start(const GraftOptions& graft, const std::string& fit_folder,
                std::optional<StopAnywhere>& stop) {
    const auto seed = static_cast<uint64_t>(args_.seed);
    std::optional<CalibrationData> calibration;
    if (!documents_ && (graft.calibrate > 0 || graft.fit_steps() > 0)) {
      documents_.emplace(args_.base, base_.spec().vocab, args_.data, seed);
    }
    if (graft.calibrate > 0) {
      calibration.emplace(*documents_->train, *documents_->valid,
                          documents_->train == documents_->valid, graft);
    }
    Started started;
    started.hybrid = convert(base_, teacher_, layers_, graft, seed, true,
                             calibration ? &*calibration : nullptr, &started.found);
    if (graft.fit_steps() > 0) {
      stop.reset();  // from here on the trainer keeps what it has
      fit(started.hybrid, teacher_, layers_, graft, *documents_, seed, fit_folder);
      stop.emplace("nothing is written; the fit is kept in " + fit_folder);
      if (calibration) {
        started.fitted =
            measure_mixers(*started.hybrid.model, teacher_, layers_, calibration->checked);
      }
    }
    return started;
  }

 private:
  const ConvertArgs& args_;
  Model& base_;
  Model& teacher_;
  std::vector<int64_t> layers_;
  std::optional<Documents> documents_;
};

/// What was asked of the new mixers.
GraftOptions asked_graft(const ConvertArgs& args) {
  GraftOptions asked = args.graft;
  asked.from_attention = args.init == "attention";
  asked.rope = !args.no_rope;
  expect(args.calibrate != 0, "--calibrate: expected at least 1 document, got 0");
  asked.calibrate = std::max<int64_t>(args.calibrate, 0);
  asked.calibrate_tokens =
      args.calibrate_tokens < 0 ? asked.calibrate_tokens : args.calibrate_tokens;
  check_fields(asked, "convert");
  return asked;
}

/// Error, before any work, where starts that take some could not be written or have no data to use.
bool check_runs(const ConvertArgs& args, const GraftOptions& asked) {
  const bool runs = asked.calibrate > 0 || asked.fit_steps() > 0;
  expect(runs || args.data.empty(), "--data belongs to --calibrate and --fit");
  expect(!runs || args.replace || !std::filesystem::exists(args.output),
         "{} exists already; choose another folder, or --replace", args.output);
  return runs;
}

/// The layers whose choice has attention, from which a mixer starts.
std::vector<int64_t> layers_with_attention(const ModelSpec& spec) {
  std::vector<int64_t> layers;
  for (const int64_t layer : choice_layers(spec)) {
    const BranchSpec& choice = *spec.layers[static_cast<size_t>(layer)].choice();
    if (std::any_of(choice.units.begin(),
                    choice.units.begin() + static_cast<int64_t>(choice.choices()), is_attention)) {
      layers.push_back(layer);
    }
  }
  return layers;
}

// A supernet with one mixer more; the others stay as they are, bit for bit.
int run_add_mixer(const ConvertArgs& args) {
  expect(
      args.scores.empty() && args.count == 0 && args.preset.empty() && !args.thin &&
          args.dropped.empty() && args.mixers == ConvertArgs{}.mixers && !args.graft.faithful,
      "--add-mixer takes --layers, --teacher, --add-preset and the options of that mixer's start: "
      "expected no --mixer, --scores, --count, --faithful, --preset, --thin or --drop-preset "
      "beside it");
  const StopSignals signals;
  std::optional<StopAnywhere> stop("nothing is written");
  const size_t at = args.joins.find('=');
  const std::string label = args.joins.substr(0, at);
  GraftOptions graft = asked_graft(args);
  graft.mixer = at == std::string::npos ? label : args.joins.substr(at + 1);
  check_stage_name(label, "--add-mixer " + args.joins);
  check_graft_options(graft, "convert");
  const ModelSpec spec = read_spec(args.base);
  expect(is_supernet(spec), "{}: is no supernet, which a mixer could join; its layers are {}",
         args.base, layer_map(spec));
  const std::vector<int64_t> open = layers_with_attention(spec);
  const std::vector<int64_t>& layers = args.layers.empty() ? open : args.layers;
  for (const int64_t layer : layers) {
    expect(std::find(open.begin(), open.end(), layer) != open.end(),
           "--layers: layer {} has no choice with attention, from which the mixer would start",
           layer);
  }
  expect(!layers.empty(), "{}: no layer has its attention any more, from which a mixer starts",
         args.base);
  const bool runs = check_runs(args, graft);
  LoadOptions load = load_options(args);
  load.device = runs ? args.device.device() : Device{};
  LoadedModel supernet = load_model(args.base, load);
  LoadedModel original;
  if (!args.teacher.empty()) {
    original = load_model(args.teacher, load);
  }
  const LoadedModel attention = attention_of(*supernet.model, args.base);
  Model& teacher = original.model ? *original.model : *attention.model;
  const std::string fit_folder = args.output + ".fit-" + label;
  Starter starter(args, *attention.model, teacher, layers);
  Started started = starter.start(graft, fit_folder, stop);
  const LoadedModel whole =
      add_mixer(*supernet.model, *started.hybrid.model, layers, label, [&](ModelSpec& edited) {
        for (const std::string& text : args.added) {
          put_preset(edited, parse_preset(text, edited));
        }
      });
  SaveOptions save = save_options(args);
  if (graft.calibrate > 0) {
    save.files["calibration-" + label + ".json"] = calibration_json(started.found, started.fitted);
    fmt::print("{}", describe_calibration(started.found, started.fitted));
  }
  save.written = [&] {
    supernet.weights.release_mapped();
    original.weights.release_mapped();
  };
  save_model(*whole.model, args.output, save);
  if (graft.fit_steps() > 0) {
    std::filesystem::remove_all(fit_folder);
  }
  fmt::print("{} joins in {} layers, which choose among {}; {} presets, in {}\n", label,
             layers.size(), join(mixer_labels(whole.model->spec()), ", "),
             whole.model->spec().presets.size(), args.output);
  return 0;
}

int run(const ConvertArgs& args) {
  expect(args.joins.empty() || (!args.supernet && args.placement.empty() && args.banks.empty()),
         "--add-mixer changes a supernet: expected no --supernet, --placement or --bank beside it");
  if (!args.joins.empty()) {
    return run_add_mixer(args);
  }
  if (!args.placement.empty()) {
    return run_placement(args);
  }
  expect(args.banks.empty(), "--bank belongs to --placement");
  if (!args.supernet &&
      (!args.preset.empty() || args.thin || !args.added.empty() || !args.dropped.empty())) {
    return run_presets(args);
  }
  expect(args.preset.empty() && !args.thin && args.dropped.empty(),
         "--supernet makes a supernet: expected no --preset, --thin or --drop-preset beside it");
  expect(args.supernet || args.mixers.size() == 1,
         "--mixer: expected one mixer, got {}; with --supernet all of them stand side by side",
         args.mixers.size());
  const StopSignals signals;
  std::optional<StopAnywhere> stop("nothing is written");
  GraftOptions asked = asked_graft(args);
  asked.mixer = args.mixers.front();
  asked.beside.assign(args.mixers.begin() + 1, args.mixers.end());
  const std::vector<GraftOptions> grafts = grafts_of(asked, "convert");
  std::vector<int64_t> layers = args.layers;
  expect(layers.empty() || args.scores.empty(), "expected --layers or --scores, not both");
  expect(args.count == 0 || !args.scores.empty(), "--count belongs to --scores");
  const ModelSpec base_spec = read_spec(args.base);
  if (!args.scores.empty()) {
    layers = place_lowest(importance_of(args.scores, base_spec), args.count);
  }
  expect(!layers.empty(), "expected --layers, --scores with --count, or --placement");
  open_layers(base_spec);  // what it says where there is none
  expect(
      !is_supernet(base_spec),
      "{} is a supernet already; --add-mixer gives it another mixer, --preset makes a hybrid of it",
      args.base);
  for (const GraftOptions& graft : grafts) {
    expect(!args.supernet || !graft.faithful,
           "--supernet has Cambium's own layout; --faithful is that of a released one");
    check_can_be_saved(
        convert_spec(base_spec, read_spec(args.teacher.empty() ? args.base : args.teacher), layers,
                     graft),
        "convert");
  }
  SaveOptions save = save_options(args);
  const bool runs = check_runs(args, asked);
  LoadOptions load = load_options(args);
  load.device = runs ? args.device.device() : Device{};
  LoadedModel base = load_model(args.base, load);
  LoadedModel original;
  if (!args.teacher.empty()) {
    original = load_model(args.teacher, load);
  }
  Model& teacher = original.model ? *original.model : *base.model;
  Starter starter(args, *base.model, teacher, layers);
  std::vector<Started> started;
  std::vector<std::string> fit_folders;
  for (const GraftOptions& graft : grafts) {
    fit_folders.push_back(args.output + ".fit" + (args.supernet ? "-" + graft.mixer : ""));
    Started& made = started.emplace_back(starter.start(graft, fit_folders.back(), stop));
    if (graft.calibrate > 0) {
      const std::string of = args.supernet ? "calibration-" + graft.mixer : "calibration";
      save.files[of + ".json"] = calibration_json(made.found, made.fitted);
    }
  }
  std::optional<MixerBank> bank;
  LoadedModel whole;
  if (args.supernet) {
    bank.emplace(*base.model);
    for (size_t i = 0; i < started.size(); ++i) {
      bank->add(grafts[i].mixer, std::move(started[i].hybrid), args.output);
    }
    whole = bank->supernet([&](ModelSpec& spec) {
      for (const std::string& text : args.added) {
        put_preset(spec, parse_preset(text, spec));
      }
    });
  }
  Model& hybrid = args.supernet ? *whole.model : *started.front().hybrid.model;
  save.written = [&] {
    base.weights.release_mapped();
    original.weights.release_mapped();
  };
  save_model(hybrid, args.output, save);
  for (size_t i = 0; i < grafts.size(); ++i) {
    if (grafts[i].fit_steps() > 0) {
      std::filesystem::remove_all(fit_folders[i]);
    }
    if (grafts[i].calibrate > 0) {
      fmt::print("{}{}", args.supernet ? grafts[i].mixer + "\n" : "",
                 describe_calibration(started[i].found, started[i].fitted));
    }
  }
  if (args.supernet) {
    fmt::print("{} layers choose among {}, {} presets, in {}\n",
               choice_layers(hybrid.spec()).size(), join(mixer_labels(hybrid.spec()), ", "),
               hybrid.spec().presets.size(), args.output);
  } else {
    fmt::print("{}  {} of {} layers converted, in {}\n", layer_map(hybrid.spec()),
               converted_layers(hybrid.spec(), &teacher.spec()).size(), hybrid.layer_count(),
               args.output);
  }
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
  args.some_of("mixer", "what takes the place of attention; several with --supernet",
               graft_mixers(), &a->mixers);
  args.flag("supernet", "attention stays: each layer chooses among it and the mixers",
            &a->supernet);
  args.option("add-mixer",
              "supernet: MIXER, or NAME=MIXER, joins the choice of its layers (or of --layers) and "
              "starts from their attention; the others stay as they are",
              &a->joins);
  args.option("add-preset",
              "supernet: NAME=PLACEMENT, a file of `cambium place --method search`, a mixer for "
              "all layers, or the number of a mixer for each: fast=gated_delta_net, mid=0110",
              &a->added);
  args.option("drop-preset", "supernet: NAME of a preset that goes", &a->dropped);
  args.flag("thin", "supernet: keep the mixers that its presets use", &a->thin);
  args.option("preset", "supernet: write the plain hybrid that this preset is", &a->preset);
  args.option("window", "tokens that sliding_window and parallel see (0 = 128)", &a->graft.window);
  args.option("sinks", "first tokens of the text that sliding_window and parallel see too",
              &a->graft.sinks);
  args.flag("sink-logits",
            "each head of sliding_window and parallel gets a sink's learned score without a value",
            &a->graft.sink_logits);
  args.option("recurrent",
              "parallel: the mixer beside the window: gated_delta_net, kimi_delta, mamba2 or "
              "lightning",
              &a->graft.recurrent);
  args.option("window-dropout", "parallel: share of documents trained without their window",
              &a->graft.window_dropout);
  args.option("window-share", "parallel: share of the window in the output at the start",
              &a->graft.window_share);
  args.option("state", "numbers a channel of mamba (0 = 16 or what divides the head)",
              &a->graft.state);
  args.choice("init", "where new mixers start", {"attention", "random"}, &a->init);
  args.flag("no-rope", "gated_delta_net, kimi_delta and lightning: q and k do not turn by position",
            &a->no_rope);
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
  args.choice("storage",
              "of matrices; stored is old ones as in the base (fp8 and NVFP4 as f32), new ones f32",
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
      "  cambium convert TEACHER -o H --placement placement.json\n"
      "  cambium convert TEACHER -o S --layers 3,5 --mixer gated_delta_net,sliding_window "
      "--supernet\n"
      "  cambium convert S -o S1 --add-mixer wide=sliding_window --window 1024\n"
      "  cambium convert S -o S2 --add-preset fast=gated_delta_net --thin\n"
      "  cambium convert S2 -o H --preset fast",
      declare};
}

}  // namespace cambium
