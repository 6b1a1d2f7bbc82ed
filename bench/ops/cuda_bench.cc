// Speed of the CUDA kernels at the sizes of real models, each next to what the device can do,
// measured in the same run: bytes that must move against a copy within the device, operations
// against a large product. Every figure is the median of several repeats, in GPU time: calls are
// queued behind copies that keep the device busy meanwhile, so that the host's part is not in it
// (it has a column of its own). Calls take turns among inputs that no cache holds together.
// Arguments: names of sections (matmul, attention, narrow, recurrence, scan, pointwise, loss,
// latent, experts, chosen), --quick (few repeats, no extremes), --only TEXT (rows that have it in
// their operation or shape; several: one of them), --pair-rows N (rows an expert from which pairs
// of blocks take the experts' products), --json FILE. Without a CUDA device it says so and ends.
#include <array>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <string>
#include <vector>

#include "base/file.h"
#include "cuda_machine.h"
#include "cuda_sections.h"
#include "ops/experts/experts_kernels.h"
#include "ops/matmul/matmul.h"

namespace {

using namespace cambium;

// Products of a model with 15B parameters: what one call of a layer computes from one x.
struct Product {
  const char* name;
  std::vector<int64_t> outputs;
  int64_t inputs;
};

void product(Bench& bench, const Product& p, int64_t tokens) {
  const int64_t outputs = std::accumulate(p.outputs.begin(), p.outputs.end(), int64_t{0});
  const std::string shape = fmt::format("{} x {} x {}", tokens, outputs, p.inputs);
  bench.row(fmt::format("matmul {}", p.name), shape, [&](Scene& s) {
    Work work;
    const double bytes =
        2.0 * static_cast<double>(outputs * p.inputs + tokens * p.inputs + tokens * outputs);
    (tokens <= 64 ? work.bytes : work.flops) =
        tokens <= 64 ? bytes : 2.0 * static_cast<double>(tokens * outputs * p.inputs);
    work.sets = sets_for(bytes);
    const Tensor x = s.bf16({work.sets * tokens, p.inputs});
    std::vector<Affine> weights;
    for (int64_t set = 0; set < work.sets; ++set) {
      for (const int64_t n : p.outputs) {
        weights.push_back({s.bf16({n, p.inputs}, -0.02, 0.02), {}});
      }
    }
    work.call = [=, &s, count = p.outputs.size()](int64_t set) {
      std::array<Tensor, 4> y;
      matmul_each(s.ctx, part_of(x, set, tokens),
                  std::span(weights).subspan(static_cast<size_t>(set) * count, count),
                  std::span(y).first(count));
    };
    return work;
  });
}

void matmul_section(Bench& bench) {
  const std::vector<Product> products = {{"qkv", {4096, 1024, 1024}, 5120},
                                         {"o", {5120}, 4096},
                                         {"gate, up", {14336, 14336}, 5120},
                                         {"down", {5120}, 14336},
                                         {"head", {131072}, 5120}};
  for (const Product& p : products) {
    for (const int64_t tokens : {1, 2, 4, 8, 16, 64}) {
      product(bench, p, tokens);
    }
  }
  for (const Product& p : products) {
    product(bench, p, 4096);
  }
}

struct Section {
  const char* name;
  void (*run)(Bench&);
};
constexpr Section kSections[] = {{"matmul", matmul_section},   {"attention", attention_section},
                                 {"narrow", narrow_section},   {"recurrence", recurrence_section},
                                 {"scan", scan_section},       {"pointwise", pointwise_section},
                                 {"loss", loss_section},       {"latent", latent_section},
                                 {"experts", experts_section}, {"chosen", chosen_section}};

struct Options {
  std::vector<std::string> sections;  // empty: all
  bool quick = false;
  std::vector<std::string> only;
  std::string json;
};

Options parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument == "--quick") {
      options.quick = true;
    } else if (argument == "--only") {
      expect(++i < argc, "--only needs a part of an operation's name or shape");
      options.only.emplace_back(argv[i]);
    } else if (argument == "--pair-rows") {
      expect(++i < argc && std::atoll(argv[i]) > 0, "--pair-rows needs a number of rows");
      experts_pair_rows = std::atoll(argv[i]);
    } else if (argument == "--json") {
      expect(++i < argc, "--json needs the name of a file");
      options.json = argv[i];
    } else {
      expect(std::any_of(std::begin(kSections), std::end(kSections),
                         [&](const Section& s) { return argument == s.name; }),
             "expected matmul, attention, narrow, recurrence, scan, pointwise, loss, latent, "
             "experts, chosen, --quick, --only TEXT, --pair-rows N or --json FILE, got {}",
             argument);
      options.sections.push_back(argument);
    }
  }
  return options;
}

int run_all(const Options& options) {
  if (cuda_devices() == 0) {
    std::printf("no CUDA device: %s\n", why_no_cuda().c_str());
    return 0;
  }
  const std::string name = cuda_device_info(kDevice).name;
  std::printf("%s; limits and figures of this run, bf16 unless said otherwise\n", name.c_str());
  std::printf("%-33s %-52s %10s %16s %16s %6s %9s\n", "operation", "shape", "ms", "work",
              "achieved", "share", "queue us");
  const double begin = now_ms();
  Bench bench(options.quick);
  bench.only = options.only;
  for (const Section& section : kSections) {
    const auto& wanted = options.sections;
    if (wanted.empty() || std::find(wanted.begin(), wanted.end(), section.name) != wanted.end()) {
      bench.section = section.name;
      std::printf("%s\n", section.name);
      section.run(bench);
    }
  }
  std::printf("%.1f s\n", 1e-3 * (now_ms() - begin));
  if (!options.json.empty()) {
    const nlohmann::ordered_json report = {{"device", name},
                                           {"copy_gb_per_s", bench.copy_gbs},
                                           {"product_tflop_per_s", bench.product_tflops},
                                           {"quick", options.quick},
                                           {"rows", bench.rows}};
    write_file_atomically(options.json, report.dump(1) + "\n");
  }
  return bench.failures == 0 ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run_all(parse(argc, argv));
  } catch (const Error& error) {
    std::fprintf(stderr, "cuda_bench: %s\n", error.what());
    return 1;
  }
}
