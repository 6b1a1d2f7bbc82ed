// place: which layers get which mixer.
#include <cmath>
#include <cstdio>
#include <filesystem>

#include "base/checked.h"
#include "base/signals.h"
#include "base/text.h"
#include "cli/commands.h"
#include "cli/options.h"
#include "eval/problems/long_context.h"
#include "hybrid/measure.h"
#include "hybrid/placement.h"
#include "hybrid/placement_choice.h"
#include "train/train_job.h"

namespace cambium {
namespace {

struct PlaceArgs {
  std::string model, scores, method = "lowest";
  int64_t count = 0, cache = 0;
  double fraction = 0.0;
  CacheOption values;

  // Of --method search; as they are here where they were not given.
  std::vector<std::string> banks, at_least, at_most, none_or_at_least, compared;
  std::string metric, cost, output, trace, data, task, task_path;
  double share = 0.0, speedup = 0.0, budget = 0.0, retrieval_share = -1.0;
  int64_t context = -1, batch = -1, repeats = -1, evaluations = -1, reach = -1, beam = -1,
          documents = -1, max_tokens = -1, problems = -1, max_new_tokens = -1, seed = -1,
          data_seed = -1;
  LongTextsOption long_texts;
  DeviceOption device;
  bool fresh = false;
};

void check_applies(const PlaceArgs& a) {
  const bool search = a.method == "search";
  const char* const searching = "--method search";
  const std::pair<const char*, bool> of_search[] = {
      {"--bank", !a.banks.empty()},
      {"--at-least", !a.at_least.empty()},
      {"--none-or-at-least", !a.none_or_at_least.empty()},
      {"--at-most", !a.at_most.empty()},
      {"--compare", !a.compared.empty()},
      {"--metric", !a.metric.empty()},
      {"--cost", !a.cost.empty()},
      {"--output", !a.output.empty()},
      {"--trace", !a.trace.empty()},
      {"--data", !a.data.empty()},
      {"--task", !a.task.empty()},
      {"--task-path", !a.task_path.empty()},
      {"--budget", a.share > 0},
      {"--speedup", a.speedup > 0},
      {"--budget-cost", a.budget > 0},
      {"--retrieval-share", a.retrieval_share >= 0},
      {"--length", a.long_texts.given()},
      {"--context", a.context >= 0},
      {"--batch", a.batch >= 0},
      {"--repeats", a.repeats >= 0},
      {"--evaluations", a.evaluations >= 0},
      {"--reach", a.reach >= 0},
      {"--beam", a.beam >= 0},
      {"--documents", a.documents >= 0},
      {"--max-tokens", a.max_tokens >= 0},
      {"--problems", a.problems >= 0},
      {"--max-new-tokens", a.max_new_tokens >= 0},
      {"--seed", a.seed >= 0},
      {"--data-seed", a.data_seed >= 0},
      {"--fresh", a.fresh}};
  for (const auto& [option, given] : of_search) {
    refuse(given && !search, option, searching);
  }
  const char* const others = "the methods lowest and uniform";
  refuse(search && !a.scores.empty(), "--scores", "--method lowest (search has --compare)");
  refuse(search && a.count > 0, "--count", others);
  refuse(search && a.fraction > 0, "--fraction", others);
  refuse(search && a.cache > 0, "--cache-per-token", others);
}

// What was asked, in the file of the answer.
std::string command_of(const PlaceArgs& a, const ChoiceOptions& o) {
  std::string text = "cambium place " + a.model + " --method search";
  for (const std::string& bank : a.banks) {
    text += " --bank " + bank;
  }
  text += fmt::format(" --metric {} --cost {} --context {} --batch {} --repeats {}", o.metric,
                      cost_kind_name(o.cost.kind), o.cost.context, o.cost.batch, o.cost.repeats);
  text += o.share > 0 ? fmt::format(" --budget {}", o.share)
                      : fmt::format(" --budget-cost {}", o.budget);
  for (const std::string& count : a.at_least) {
    text += " --at-least " + count;
  }
  for (const std::string& count : a.at_most) {
    text += " --at-most " + count;
  }
  for (const std::string& count : a.none_or_at_least) {
    text += " --none-or-at-least " + count;
  }
  return text + fmt::format(" --evaluations {} --reach {} --beam {} --seed {}", o.evaluations,
                            o.reach, o.beam, o.seed);
}

ChoiceOptions choice_options(const PlaceArgs& a) {
  ChoiceOptions o;
  o.metric = a.metric.empty() ? o.metric : a.metric;
  o.cost.kind = parse_cost_kind(a.cost.empty() ? "decode" : a.cost);
  o.cost.context = or_else(a.context, o.cost.context);
  o.cost.batch = or_else(a.batch, o.cost.batch);
  o.cost.repeats = or_else(a.repeats, o.cost.repeats);
  o.cost.values = a.values.values();
  expect((a.share > 0) + (a.speedup > 0) + (a.budget > 0) == 1,
         "--method search: expected one of --budget, --speedup and --budget-cost");
  refuse(a.batch >= 0 && o.cost.kind == CostKind::kCache, "--batch", "--cost decode and prefill");
  refuse(a.repeats >= 0 && o.cost.kind == CostKind::kCache, "--repeats",
         "--cost decode and prefill");
  expect(a.speedup == 0 || a.speedup >= 1, "--speedup: expected at least 1, got {}", a.speedup);
  o.share = a.speedup > 0 ? 1.0 / a.speedup : a.share;
  o.budget = a.budget;
  o.at_least = parse_layer_counts("--at-least", a.at_least);
  o.at_most = parse_layer_counts("--at-most", a.at_most);
  o.none_or_at_least = parse_layer_counts("--none-or-at-least", a.none_or_at_least);
  o.evaluations = or_else(a.evaluations, o.evaluations);
  o.reach = or_else(a.reach, o.reach);
  o.beam = or_else(a.beam, o.beam);
  o.seed = static_cast<uint64_t>(or_else<int64_t>(a.seed, 1));
  o.scores.assign(a.compared.begin(), a.compared.end());
  o.trace = a.trace.empty() ? a.output + ".trace" : a.trace;
  o.fresh = a.fresh;
  o.command = command_of(a, o);
  return o;
}

std::string shown(const Measured& m) {
  return fmt::format("{:.5f} [{:.5f}, {:.5f}]", m.value, m.low, m.high);
}

void print_choice(const ChosenPlacement& p) {
  const LayerCosts& costs = p.costs;
  const double whole = costs.teacher();
  fmt::print("cost of a layer, {}{}\n", cost_unit(costs.kind),
             costs.rows.empty() ? std::string()
                                : fmt::format(" (least squares over {} models, {:.1f} % off at "
                                              "most)",
                                              costs.rows.size(), 100 * costs.worst_fit()));
  for (size_t k = 0; k < costs.kinds.size(); ++k) {
    for (const std::vector<double>& layer : costs.layers) {
      if (std::isfinite(layer[k])) {
        fmt::print("  {:<20} {:.6g}{}\n", costs.kinds[k], layer[k],
                   costs.slow_alone(k) ? ", more where it has one layer alone: none or two" : "");
        break;
      }
    }
  }
  fmt::print("  {:<20} {:.6g} of the teacher's {:.6g}\n", "all else", costs.rest, whole);
  fmt::print("\n{} placements measured; surrogate: {} scale, rank correlation {}\n",
             p.search.steps.size(), p.search.log_scale ? "logarithmic" : "plain",
             std::isfinite(p.search.rank)
                 ? fmt::format("{:.2f} (left out, better half)", p.search.rank)
                 : std::string("unknown (too few, or all alike)"));
  fmt::print("chosen at {:.1f} % of the teacher's cost (budget {:.1f} %):\n",
             100 * costs.of(p.choices) / whole, 100 * p.budget / whole);
  for (size_t k = 0; k < p.kinds.size(); ++k) {
    std::vector<std::string> layers;
    for (size_t i = 0; i < p.choices.size(); ++i) {
      if (p.choices[i] == static_cast<int>(k)) {
        layers.push_back(std::to_string(p.layers[i]));
      }
    }
    fmt::print("  {:<20} {:>3} layers: {}\n", p.kinds[k].name, layers.size(), join(layers, ","));
  }
  fmt::print("{}, measured {}, predicted by the others {}\n\n", score_heading(p.metric),
             shown(p.measured), shown(p.search.predicted));
  fmt::print("{:<42} {:>6} {:>32} {:>32}\n", "on data that chose nothing", "cost", p.metric,
             "worse than the chosen one by");
  fmt::print("{:<42} {:>5.1f}% {:>32}\n", "chosen", 100 * costs.of(p.choices) / whole,
             shown(p.reported));
  for (const ComparedPlacement& c : p.compared) {
    fmt::print("{:<42} {:>6} {:>32} {:>32}\n", c.name,
               std::isfinite(c.cost) ? fmt::format("{:.1f}%", 100 * c.cost) : "-", shown(c.value),
               shown(c.behind));
  }
}

int run_search(const PlaceArgs& a) {
  const bool is_there = std::filesystem::exists(std::filesystem::path(a.model) / "config.json");
  const bool supernet = a.banks.empty() && is_there && is_supernet(read_spec(a.model));
  expect(!a.banks.empty() || supernet,
         "--method search: expected --bank KIND=DIR, the teacher with every attention layer "
         "converted, or a supernet as the model");
  expect(!a.output.empty(), "--method search: expected --output, the file of the placement");
  ChoiceOptions options = choice_options(a);
  check_placement_path(a.output, kPlacementFile);
  check_placement_path(options.trace, kTraceFile);
  const bool asks = metric_asks(options.metric);
  const bool accuracy = options.metric == "accuracy";
  refuse(!asks && a.problems >= 0, "--problems", "the metrics accuracy and retrieval");
  refuse(!asks && a.max_new_tokens >= 0, "--max-new-tokens", "the metrics accuracy and retrieval");
  const bool long_texts = a.long_texts.given();
  refuse(long_texts && options.metric != "retrieval", "--length", "--metric retrieval");
  refuse(!accuracy && !a.task.empty(), "--task", "--metric accuracy");
  refuse(asks && a.documents >= 0, "--documents", "the metrics reverse-kl and nll");
  refuse(!a.data.empty() && a.retrieval_share >= 0, "--retrieval-share",
         "generated documents, without --data");
  expect(a.task.empty() == a.task_path.empty(), "expected both --task and --task-path");

  const StopAnywhere stop("nothing is measured");
  LoadedModel loaded =
      load_model(a.model, {.storage = MatrixStorage::kStored, .device = a.device.device()});
  expect(supernet || !is_supernet(loaded.model->spec()),
         "--bank: {} is a supernet, whose own mixers are placed; leave --bank out", a.model);
  LoadedModel attention = supernet ? attention_of(*loaded.model, a.model) : LoadedModel();
  LoadedModel& teacher = supernet ? attention : loaded;
  MixerBank bank = supernet ? bank_of(*loaded.model, attention, a.model) : MixerBank(*loaded.model);
  for (const std::string& text : a.banks) {
    const auto [kind, dir] = parse_bank(text);
    bank.add(kind, load_bank(teacher, dir), dir);
  }

  DataPlan files;
  files.train = a.data;
  files.valid = a.data;
  files.problems.retrieval_share = or_else(a.retrieval_share, 0.25);
  EvaluationPlan evaluate;
  const int64_t documents = or_else<int64_t>(a.documents, 32);
  const int64_t problems = asks ? or_else<int64_t>(a.problems, 100) : 0;
  expect(!asks || problems > 0, "--problems: expected at least 1");
  evaluate.held_out_documents = documents;
  evaluate.held_out_tokens = or_else<int64_t>(a.max_tokens, 512);
  evaluate.task = a.task;
  evaluate.task_path = a.task_path;
  evaluate.problems = accuracy ? problems : 0;
  evaluate.max_new_tokens = or_else(a.max_new_tokens, evaluate.max_new_tokens);
  evaluate.retrieval = options.metric == "retrieval" && !long_texts ? problems : 0;
  check_fields(evaluate, "place");
  const auto seed = static_cast<uint64_t>(or_else<int64_t>(a.data_seed, 1));
  const RunData data(files, evaluate, seed, load_tokenizer(a.model, teacher.model->spec().vocab),
                     {documents, accuracy ? problems : 0});
  const HeldOut chosen_by = data.selection_documents(documents);
  const auto far = [&](uint64_t of) { return a.long_texts.task(problems, of, data.tokenizer()); };
  const Task asked = accuracy     ? data.selection_problems(problems)
                     : long_texts ? far(choosing_seed(seed))
                     : asks ? problem_task(files.problems, ProblemKind::kRetrieval, Split::kTest,
                                           options.seed, problems, problems)
                            : Task{};
  const Task others = accuracy ? data.task() : long_texts ? far(seed) : data.retrieval();
  AccuracyConfig answers = long_texts ? data.long_answers(evaluate) : data.answers(evaluate);
  answers.max_new_tokens = or_else(a.max_new_tokens, answers.max_new_tokens);
  const JudgeData choosing{&chosen_by, &asked, &data.tokenizer(), answers};
  const JudgeData reported{&data.held_out(), &others, &data.tokenizer(), answers};
  const ChosenPlacement placement = choose_placement(bank, options, choosing, reported);
  write_placement(placement, a.output);
  print_choice(placement);
  const std::string next = supernet
                               ? fmt::format("--add-preset NAME={} -o SUPERNET keeps", a.output)
                               : fmt::format("--placement {} -o HYBRID builds", a.output);
  fmt::print("written to {}; cambium convert {} {} it\n", a.output, a.model, next);
  return 0;
}

/// How a method chooses `count` of the layers that it is given.
LayerChooser chooser(const PlaceArgs& args, const ModelSpec& spec) {
  expect(args.method == "uniform" || !args.scores.empty(),
         "--method lowest: expected --scores, a file of `cambium score`");
  if (args.method == "uniform") {
    refuse(!args.scores.empty(), "--scores", "--method lowest");
    return spread_evenly;
  }
  return lowest_of(importance_of(args.scores, spec));
}

int run_place(const PlaceArgs& args) {
  check_applies(args);
  if (args.method == "search") {
    return run_search(args);
  }
  const ModelSpec spec = read_spec(args.model);
  expect((args.count > 0) + (args.fraction > 0) + (args.cache > 0) == 1,
         "expected one of --count, --fraction and --cache-per-token");
  refuse(args.values.name != "bf16" && args.cache == 0, "--cache", "--cache-per-token");
  const LayerChooser choose = chooser(args, spec);
  const std::vector<int64_t> open = open_layers(spec);
  std::vector<int64_t> layers;
  if (args.cache > 0) {
    layers = place_for_cache(spec, args.cache, args.values.values(), choose);
    expect(!layers.empty(),
           "--cache-per-token {}: the cache takes no more than that as it is; there is nothing to "
           "convert",
           args.cache);
  } else {
    const int64_t count = args.count > 0 ? args.count : layers_to_convert(spec, args.fraction);
    expect(count > 0,
           "--fraction {}: {} of the {} layers that have a mixer have another than attention "
           "already ({}); give a larger one, or --count",
           args.fraction, converted_layers(spec).size(), layers_with_mixer(spec), layer_map(spec));
    layers = choose(open, count);
  }
  std::vector<std::string> names;
  for (const int64_t layer : layers) {
    names.push_back(std::to_string(layer));
  }
  fmt::print("{}\n", join(names, ","));
  return 0;
}

Action declare(Args& args) {
  auto a = std::make_shared<PlaceArgs>();
  args.positional("model", "the model (lowest and uniform read its config.json alone)", &a->model);
  args.choice("method", "by score, by depth, or by searching any mixers under a budget",
              {"lowest", "uniform", "search"}, &a->method);
  args.option("scores", "lowest: layer scores of `cambium score`", &a->scores);
  args.option("count,k", "layers to convert", &a->count);
  args.option("fraction",
              "share of the layers with a mixer that are to have another than attention in the end",
              &a->fraction, {0.0, 1.0});
  args.option("cache-per-token",
              "bytes the cache may take a token: the fewest layers are converted that make it so",
              &a->cache);
  a->values.declare(args);
  args.option("bank",
              "search: KIND=DIR, mixers of one kind for every attention layer: the model that "
              "convert made of them all and distill --objective align trained",
              &a->banks);
  args.option("budget", "search: share of the teacher's cost, 0.5", &a->share,
              reals_above(0.0, 1.0));
  args.option("speedup", "search: the same as its inverse, 2", &a->speedup, reals_above(0.0));
  args.option("budget-cost", "search: in the cost's unit: ms, or bytes of a sequence", &a->budget,
              reals_above(0.0));
  args.choice("cost", "search: what is budgeted, measured on this device (decode otherwise)",
              {"decode", "prefill", "cache"}, &a->cost);
  args.option("context", "search: tokens at which it is measured (4096 otherwise)", &a->context,
              {1, kMaxPositions});
  args.option("batch", "search: sequences at once (1 otherwise)", &a->batch, {1, 4096});
  args.option("repeats", "search: rounds of timing (5 otherwise)", &a->repeats, {1, 10'000});
  args.option("at-most", "search: KIND=LAYERS, such as attention=4", &a->at_most);
  args.option("at-least", "search: the same from below", &a->at_least);
  args.option("none-or-at-least",
              "search: the same where there are any: a server that groups its cache by kinds is "
              "slow where a kind has one layer alone",
              &a->none_or_at_least);
  args.choice("metric", "search: what is kept (reverse-kl otherwise)", placement_metrics(),
              &a->metric);
  a->long_texts.declare(args, "search: ");
  args.option("evaluations", "search: placements measured (200 otherwise)", &a->evaluations,
              {4, 1'000'000});
  args.option("reach", "search: layers apart that may act on each other (1 otherwise)", &a->reach,
              {0, 8});
  args.option("beam", "search: width of the check by beam search (4 otherwise; 0 = none)", &a->beam,
              {0, 1000});
  args.option("data,d", "search: documents, JSON lines (generated problems otherwise)", &a->data);
  args.option("retrieval-share", "search: of generated documents (0.25 otherwise)",
              &a->retrieval_share, {0.0, 1.0});
  args.option("documents", "search: as many choose, and as many others report (32 otherwise)",
              &a->documents, {1});
  args.option("max-tokens", "search: tokens of a document at most (512 otherwise)", &a->max_tokens,
              {2});
  args.choice("task", "search: of --metric accuracy (generated problems otherwise)", task_forms(),
              &a->task);
  args.option("task-path", "search: the task's file", &a->task_path);
  args.option("problems", "search: as many choose, and as many others report (100 otherwise)",
              &a->problems, {1});
  args.option("max-new-tokens",
              "search: tokens of an answer at most (256 otherwise, of long texts 64)",
              &a->max_new_tokens, {1});
  args.option("compare", "search: layer scores whose placements are measured beside the chosen one",
              &a->compared);
  args.option("seed", "search: of what is drawn (1 otherwise)", &a->seed);
  args.option("data-seed", "search: of generated documents and problems (1 otherwise)",
              &a->data_seed);
  args.option("output,o", "search: file of the placement", &a->output);
  args.option("trace", "search: file of what was measured, for any budget (OUTPUT.trace otherwise)",
              &a->trace);
  args.flag("fresh", "search: start anew where the trace is of another question", &a->fresh);
  a->device.declare(args);
  return [a] { return run_place(*a); };
}

}  // namespace

Command place_command() {
  return {
      "place", "chooses which layers get which mixer: by score, evenly, or by search",
      "  cambium place models/teacher --scores scores.json --count 10\n"
      "  cambium place models/teacher --method uniform --fraction 0.6\n"
      "  cambium place models/teacher --scores scores.json --cache-per-token 1024\n"
      "  cambium place TEACHER --method search --bank gdn=GDN --bank window=WIN --speedup 2 \\\n"
      "      --context 8192 --at-most attention=6 -o placement.json\n"
      "  cambium place SUPERNET --method search --budget 0.5 -o placement.json",
      declare};
}

}  // namespace cambium
