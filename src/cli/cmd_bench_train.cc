// bench train: how fast steps of training run, and what they take, of models of any shape with
// made-up numbers.
#include <algorithm>
#include <cstdio>
#include <nlohmann/json.hpp>

#include "base/checked.h"
#include "base/random.h"
#include "base/signals.h"
#include "base/text.h"
#include "cli/commands.h"
#include "cli/options.h"
#include "eval/kernel_times.h"
#include "eval/statistics.h"
#include "hybrid/graft.h"
#include "hybrid/placement.h"
#include "model/random_model.h"
#include "train/matrix_peak.h"
#include "train/training_cost.h"

namespace cambium {
namespace {

using Json = nlohmann::ordered_json;

constexpr int64_t kWarmUp = 2;      // steps that are not measured
constexpr int64_t kTimedParts = 3;  // steps whose parts are timed, after the measured ones

struct BenchTrainArgs {
  std::string random, teacher, mode = "train", mixer = "mamba", precision = "auto", state = "f32";
  std::vector<int64_t> layers;
  int64_t convert = 0, sequence = 4096, packed = 1, tokens = 0, steps = 5;
  DeviceOption device;
  bool faithful = false, checkpoint_layers = false, offload = false, dry_run = false, json = false;
  bool operations = false;
};

struct Specs {
  ModelSpec student;
  std::optional<ModelSpec> teacher;
};

Specs read_specs(const BenchTrainArgs& a) {
  expect(!a.random.empty(),
         "bench train: expected --random-weights with a config.json or its folder");
  const ModelSpec given = read_spec(a.random);
  const bool converts = a.convert > 0 || !a.layers.empty();
  expect(!converts || a.teacher.empty(),
         "bench train: --convert and --layers make the student of --random-weights, which is its "
         "teacher; leave --teacher-random away");
  if (converts) {
    expect(a.convert == 0 || a.layers.empty(), "bench train: give --convert or --layers, not both");
    const std::vector<int64_t> layers =
        a.layers.empty() ? place_uniform(given, a.convert) : a.layers;
    return {convert_spec(given, given, layers, {.mixer = a.mixer, .faithful = a.faithful}), given};
  }
  expect(a.mode != "stage-a" || !a.teacher.empty(),
         "bench train: --mode stage-a trains the mixers that the teacher does not have; give "
         "--convert, --layers or --teacher-random");
  if (a.mode == "train") {
    expect(a.teacher.empty(), "bench train: --teacher-random belongs to --mode distill or stage-a");
    return {given, std::nullopt};
  }
  return {given, a.teacher.empty() ? given : read_spec(a.teacher)};
}

TrainConfig config_of(const BenchTrainArgs& a, int64_t steps) {
  TrainConfig config;
  config.steps = steps;
  config.sequence_length = a.sequence * a.packed;
  const int64_t at_once = config.sequence_length;
  const int64_t tokens = a.tokens == 0 ? at_once : a.tokens;
  expect(tokens % at_once == 0,
         "bench train: --tokens-per-step must be a multiple of the {} tokens that run at once "
         "(--sequence times --packed), got {}",
         at_once, tokens);
  config.sequences_per_step = tokens / at_once;
  config.loss = {};
  (a.mode == "train" ? config.loss.cross_entropy : config.loss.reverse_kl) = 1.0F;
  config.schedule.peak = 1e-5;
  config.trained = a.mode == "stage-a" ? Trained::kConverted : Trained::kEverything;
  config.precision = a.precision == "bf16"  ? Precision::kBF16
                     : a.precision == "f32" ? Precision::kF32
                                            : Precision::kAuto;
  config.checkpoint_layers = a.checkpoint_layers;
  config.optimizer.state = a.state == "bf16" ? OptimizerState::kBF16 : OptimizerState::kF32;
  config.optimizer.offload = a.offload;
  return config;
}

// Documents of random tokens that each fill a sequence; all of them is learned.
std::unique_ptr<DocumentSource> random_documents(int64_t length, int64_t vocab) {
  return generated_source(
      [=](uint64_t index) {
        Rng random(1, index);
        std::vector<int32_t> tokens(static_cast<size_t>(length));
        for (int32_t& token : tokens) {
          token = static_cast<int32_t>(random.between(0, vocab - 1));
        }
        Document document;
        document.append(tokens, true);
        return document;
      },
      "random tokens");
}

// What of the student is trained, and what it has in common with the teacher.
TrainingShape shape_of(const Specs& specs, const TrainConfig& config, Dtype activations) {
  TrainingShape shape;
  shape.student = &specs.student;
  shape.teacher = specs.teacher ? &*specs.teacher : nullptr;
  shape.activations = activations;
  shape.bf16_matrices = activations == Dtype::kBF16;
  if (config.trained == Trained::kEverything) {
    shape.trained = [](const std::string&) { return true; };
    return shape;
  }
  const std::vector<std::string> units = converted_mixers(specs.student, *specs.teacher);
  shape.trained = [units](const std::string& name) {
    return std::any_of(units.begin(), units.end(),
                       [&](const std::string& unit) { return name.starts_with(unit); });
  };
  shape.shared = [trained = shape.trained](const std::string& name) { return !trained(name); };
  return shape;
}

Measured summarise(const std::vector<double>& values) {
  const auto [low, high] = std::minmax_element(values.begin(), values.end());
  return {median(values), *low, *high};
}

void print_memory(const std::vector<MemoryItem>& plan) {
  for (const MemoryItem& item : plan) {
    if (item.bytes > 0) {
      fmt::print("  {:<16} {:>12}{}\n", item.kind, human_bytes(static_cast<uint64_t>(item.bytes)),
                 item.host ? "  of the host" : "");
    }
  }
  fmt::print("  {:<16} {:>12}\n", "planned in all",
             human_bytes(static_cast<uint64_t>(total_bytes(plan))));
}

Json memory_json(const std::vector<MemoryItem>& plan) {
  Json json;
  for (const MemoryItem& item : plan) {
    json[item.kind] = item.bytes;
  }
  return json;
}

constexpr std::pair<const char*, double StepTimes::*> kParts[] = {
    {"teacher", &StepTimes::teacher},
    {"forward", &StepTimes::forward},
    {"head", &StepTimes::head},
    {"backward", &StepTimes::backward},
    {"optimizer", &StepTimes::optimizer}};

/// The kernels of one more step.
std::vector<KernelTimes::Line> time_kernels(Trainer& trainer, Device device) {
  KernelTimes times(device);
  trainer.set_time_parts(false);
  trainer.set_timer(&times);
  trainer.step();
  trainer.set_timer(nullptr);
  return times.lines();
}

int run(const BenchTrainArgs& a) {
  const Specs specs = read_specs(a);
  const TrainConfig config = config_of(a, kWarmUp + a.steps + kTimedParts + (a.operations ? 1 : 0));
  const Device device = a.dry_run ? a.device.described() : a.device.device();
  const Dtype activations = activations_of(config.precision, device);
  const TrainingShape shape = shape_of(specs, config, activations);
  const std::vector<MemoryItem> plan = training_memory(config, shape);
  Json json = {{"model", a.random},
               {"mode", a.mode},
               {"device", device.describe()},
               {"activations", dtype_name(activations)},
               {"sequence", a.sequence},
               {"tokens_per_step", config.step_tokens()},
               {"flops_per_token", training_flops(config, shape)},
               {"planned_bytes", memory_json(plan)},
               {"planned_bytes_in_all", total_bytes(plan)}};
  if (!a.json) {
    fmt::print(
        "{} {}: {}, activations in {}, {} sequences of {} tokens a step, {:.3g} FLOP a "
        "token\n",
        a.mode, a.random, device.describe(), dtype_name(activations),
        config.step_tokens() / a.sequence, a.sequence, training_flops(config, shape));
    print_memory(plan);
  }
  if (a.dry_run) {
    if (a.json) {
      fmt::print("{}\n", json.dump(1));
    }
    return 0;
  }
  const StopAnywhere stop("nothing is measured to its end");
  const MatrixStorage frozen = shape.bf16_matrices ? MatrixStorage::kBF16 : MatrixStorage::kF32;
  LoadedModel teacher;
  if (specs.teacher) {
    teacher = random_model(*specs.teacher, frozen, 2, device);
  }
  const bool shares = config.trained == Trained::kConverted;
  LoadedModel student = random_model(specs.student, MatrixStorage::kF32, 1, device,
                                     shares ? teacher.model.get() : nullptr);
  const double peak = measure_matrix_peak(device, activations);
  const auto data = random_documents(a.sequence, specs.student.vocab);
  TrainConfig timed = config;
  timed.matrix_peak = peak;
  Trainer trainer(*student.model, student.weights, timed, *data, teacher.model.get());
  std::vector<double> speeds, shares_of_peak, milliseconds;
  std::vector<std::vector<double>> parts(std::size(kParts));
  StepReport last;
  for (int64_t step = 0; step < kWarmUp + a.steps + kTimedParts; ++step) {
    stop_point();
    trainer.set_time_parts(step >= kWarmUp + a.steps);
    last = trainer.step();
    if (step >= kWarmUp + a.steps) {
      for (size_t i = 0; i < std::size(kParts); ++i) {
        parts[i].push_back(1e3 * (last.times.*kParts[i].second));
      }
    } else if (step >= kWarmUp) {
      speeds.push_back(static_cast<double>(last.tokens) / last.seconds);
      shares_of_peak.push_back(last.peak_share);
      milliseconds.push_back(1e3 * last.seconds);
    }
  }
  const std::vector<KernelTimes::Line> kernels =
      a.operations ? time_kernels(trainer, device) : std::vector<KernelTimes::Line>{};
  const Measured speed = summarise(speeds);
  const double flops = speed.value * trainer.flops_per_token();
  const int64_t weights =
      student.weights.bytes() + teacher.weights.bytes() + trainer.rounded_bytes();
  json["trained_parameters"] = trainer.optimizer().trained_parameters();
  json["tokens_per_second"] = {speed.value, speed.low, speed.high};
  json["flops_per_second"] = flops;
  json["matrix_peak_flops_per_second"] = peak;
  json["matrix_peak_share"] = flops / peak;
  json["milliseconds_a_step"] = median(milliseconds);
  Json split;
  for (size_t i = 0; i < std::size(kParts); ++i) {
    split[kParts[i].first] = median(parts[i]);
  }
  json["milliseconds"] = split;
  json["weight_and_gradient_bytes"] = weights;
  json["optimizer_bytes"] = trainer.optimizer().state_bytes();
  json["activation_bytes"] = trainer.peak_activation_bytes();
  json["device_bytes"] = last.device_bytes;
  json["loss"] = last.loss;
  for (const KernelTimes::Line& line : kernels) {
    json["operations"].push_back({{"operation", line.kernel},
                                  {"shape", line.shape},
                                  {"calls", line.calls},
                                  {"ms", 1e3 * line.seconds}});
  }
  if (a.json) {
    fmt::print("{}\n", json.dump(1));
    return 0;
  }
  const auto bytes = [](int64_t n) { return human_bytes(static_cast<uint64_t>(n)); };
  fmt::print("  {:<16} {:>12}  (weights and gradients {}, optimiser {}, activations {})\n",
             "taken in all",
             bytes(weights + trainer.optimizer().state_bytes() + trainer.peak_activation_bytes()),
             bytes(weights), bytes(trainer.optimizer().state_bytes()),
             bytes(trainer.peak_activation_bytes()));
  if (last.device_bytes > 0) {
    fmt::print("  {:<16} {:>12}\n", "in use on device", bytes(last.device_bytes));
  }
  fmt::print("\n{:>24} {:>14} {:>22} {:>12}", "tokens/s [range]", "TFLOP/s", "of the matrix peak",
             "ms a step");
  for (const auto& [name, member] : kParts) {
    fmt::print(" {:>10}", name);
  }
  fmt::print("\n{:>24} {:>14.3f} {:>22} {:>12.1f}",
             fmt::format("{:.0f} [{:.0f}, {:.0f}]", speed.value, speed.low, speed.high),
             flops / 1e12, fmt::format("{:.1f} % of {:.3g}", 100.0 * flops / peak, peak / 1e12),
             median(milliseconds));
  for (const std::vector<double>& part : parts) {
    fmt::print(" {:>10.1f}", median(part));
  }
  fmt::print("\n");
  for (const KernelTimes::Line& line : kernels) {
    fmt::print("{:>10.3f} ms {:>6} calls  {} {}\n", 1e3 * line.seconds, line.calls, line.kernel,
               line.shape);
  }
  return 0;
}

Action declare(Args& args) {
  auto a = std::make_shared<BenchTrainArgs>();
  args.option("random-weights", "config.json, or its folder: the model that is trained",
              &a->random);
  args.option("teacher-random", "the teacher's, for distill and stage-a", &a->teacher);
  args.choice("mode",
              "next tokens, reverse KL of the whole model, or of the converted mixers alone, with "
              "the rest the teacher's",
              {"train", "distill", "stage-a"}, &a->mode);
  args.option("convert", "distil into a hybrid of --random-weights: so many layers, evenly spread",
              &a->convert);
  args.option("layers", "the same: these layers", &a->layers);
  args.choice("mixer", "of the converted layers", graft_mixers(), &a->mixer);
  args.option("sequence", "tokens of a sequence", &a->sequence, {2, kMaxPositions});
  args.option("packed", "sequences that run at once", &a->packed, {1, 4096});
  args.option("tokens-per-step", "0 = those that run at once", &a->tokens, {0, int64_t{1} << 40});
  args.option("steps", "measured ones; the median and the range are printed", &a->steps,
              {1, 10'000});
  args.choice("precision", "of activations", {"auto", "f32", "bf16"}, &a->precision);
  a->device.declare(args);
  args.choice("optimizer-state", "how AdamW keeps its moments", {"f32", "bf16"}, &a->state);
  args.flag("offload", "the optimiser's state stays in the host's memory", &a->offload);
  args.flag("faithful", "the mixer's released layout", &a->faithful);
  args.flag("checkpoint-layers", "recompute activations: less memory, more time",
            &a->checkpoint_layers);
  args.flag("operations", "one more step, of which the device's time of each operation is printed",
            &a->operations);
  args.flag("dry-run", "print the planned memory only", &a->dry_run);
  args.flag("json", "print JSON", &a->json);
  return [a] { return run(*a); };
}

}  // namespace

Command bench_train_command() {
  return {"train", "speed, memory and parts of a step of training, with random weights",
          "  cambium bench train --random-weights llama-1b --tokens-per-step 32768\n"
          "  cambium bench train --random-weights llama-1b --mode distill --checkpoint-layers\n"
          "  cambium bench train --random-weights plans/apriel-15b --mode stage-a --convert 30 \\\n"
          "      --faithful --checkpoint-layers",
          declare};
}

}  // namespace cambium
