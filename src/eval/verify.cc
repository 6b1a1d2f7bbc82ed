#include "eval/verify.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <optional>
#include <span>

#include "base/checked.h"
#include "base/parallel.h"
#include "base/progress.h"
#include "files/safetensors.h"
#include "ops/recurrence/recurrence.h"
#include "serve/cache.h"
#include "tensor/copy.h"

namespace cambium {
namespace {

struct Prompt {
  std::vector<int32_t> tokens;
  std::vector<float> logits;  // (n, V)
  std::vector<int32_t> greedy;
  double deviation = 1.0;
  int64_t size() const { return static_cast<int64_t>(tokens.size()); }
};

using Row = std::span<const float>;

std::vector<int32_t> token_ids(const TensorEntry& entry, int64_t vocab, const std::string& file) {
  std::vector<int32_t> ids;
  for (const int64_t id : as_i64(entry)) {
    expect(id >= 0 && id < vocab, "{}: token {} in {} is outside the model's vocabulary of {}",
           file, id, entry.name, vocab);
    ids.push_back(static_cast<int32_t>(id));
  }
  return ids;
}

double standard_deviation(Row values) {
  double sum = 0.0;
  double squares = 0.0;
  for (const double x : values) {
    sum += x;
    squares += x * x;
  }
  const auto n = static_cast<double>(values.size());
  return std::sqrt(std::max(squares / n - sum / n * sum / n, 1e-30));
}

std::vector<Prompt> read_prompts(const std::string& path, int64_t vocab) {
  const SafeTensors file = SafeTensors::open(path);
  std::vector<Prompt> prompts;
  for (int k = 0; file.find("tokens." + std::to_string(k)) != nullptr; ++k) {
    const std::string number = std::to_string(k);
    Prompt prompt;
    prompt.tokens = token_ids(file.at("tokens." + number), vocab, path);
    const TensorEntry& logits = file.at("logits." + number);
    expect(logits.shape == std::vector<int64_t>({prompt.size(), vocab}) && prompt.size() > 0,
           "{}: expected {} ({}, {}) by tokens.{} and the model's vocabulary, got {}", path,
           logits.name, prompt.size(), vocab, k, shape_text(logits.shape));
    prompt.logits = as_f32(logits);
    prompt.deviation = standard_deviation(prompt.logits);
    if (const TensorEntry* greedy = file.find("greedy." + number)) {
      prompt.greedy = token_ids(*greedy, vocab, path);
    }
    prompts.push_back(std::move(prompt));
  }
  expect(!prompts.empty(), "{}: expected tensors tokens.0 and logits.0, found none", path);
  return prompts;
}

int32_t largest(Row row) {
  return static_cast<int32_t>(std::max_element(row.begin(), row.end()) - row.begin());
}

/// sum p (log p - log q), p = softmax(reference), q = softmax(ours).
double kl(Row reference, Row ours) {
  const auto log_sum = [](Row row) {
    const double top = *std::max_element(row.begin(), row.end());
    double sum = 0.0;
    for (const double x : row) {
      sum += std::exp(x - top);
    }
    return top + std::log(sum);
  };
  const double p_sum = log_sum(reference);
  const double q_sum = log_sum(ours);
  double divergence = 0.0;
  for (size_t i = 0; i < reference.size(); ++i) {
    const double log_p = reference[i] - p_sum;
    divergence += std::exp(log_p) * (log_p - (ours[i] - q_sum));
  }
  return divergence;
}

/// Sequences fed piece by piece through a cache, or again from their starts each time without one.
class Runner {
 public:
  Runner(Model& model, Workspace& workspace, bool cached, std::span<const Prompt> prompts,
         int64_t page_size)
      : model_(model), workspace_(workspace) {
    int64_t most = 0;
    int64_t piece = 0;
    for (const Prompt& prompt : prompts) {
      sequences_.push_back({.length = prompt.size()});
      most = std::max(most, most_tokens(prompt));
      piece = std::max(piece, prompt.size());
    }
    if (cached) {
      cache_.emplace(model, CacheConfig{.max_sequences = std::ssize(prompts),
                                        .page_size = page_size,
                                        .memory_bytes = 0,
                                        .max_tokens = most,
                                        .piece_tokens = piece,
                                        .values = model.activations()});
      for (size_t k = 0; k < prompts.size(); ++k) {
        sequences_[k].slot = cache_->open(most_tokens(prompts[k]));
        CAMBIUM_CHECK(sequences_[k].slot >= 0);
      }
    }
  }

  /// One call with the next tokens of each sequence, which may be none.
  void feed(std::span<const std::span<const int32_t>> tokens) {
    Batch batch;
    ForwardOptions options;
    for (size_t k = 0; k < tokens.size(); ++k) {
      Sequence& sequence = sequences_[k];
      const auto before = std::ssize(sequence.fed);
      sequence.fed.insert(sequence.fed.end(), tokens[k].begin(), tokens[k].end());
      if (!tokens[k].empty() && cache_) {
        batch.add(tokens[k], before, sequence.slot, sequence.length);
      } else if (!tokens[k].empty()) {
        batch.add(sequence.fed, 0, -1, sequence.length);
      }
    }
    if (cache_) {
      options.states = cache_->prepare(batch);
    }
    const WorkspaceScope scope(workspace_);
    Context ctx = context_for(model_, workspace_);
    const Tensor hidden = model_.forward(ctx, batch, options);
    int64_t end = 0;
    for (size_t k = 0; k < tokens.size(); ++k) {
      if (const auto n = std::ssize(tokens[k]); n > 0) {
        Sequence& sequence = sequences_[k];
        end += cache_ ? n : std::ssize(sequence.fed);
        const auto values = elements_of(model_.logits(ctx, hidden.slice(0, end - n, n)));
        sequence.logits.insert(sequence.logits.end(), values.begin(), values.end());
      }
    }
  }

  /// Of the tokens fed so far.   (n, V)
  std::vector<float>& logits(size_t k) { return sequences_[k].logits; }

 private:
  struct Sequence {
    int64_t length = 0;  // of the prompt, for rotations that depend on it
    int64_t slot = -1;
    std::vector<int32_t> fed{};
    std::vector<float> logits{};
  };
  static int64_t most_tokens(const Prompt& prompt) {
    return prompt.size() + std::ssize(prompt.greedy);
  }

  Model& model_;
  Workspace& workspace_;
  std::optional<Cache> cache_;
  std::vector<Sequence> sequences_;
};

/// How to cut a prompt of n tokens: the ends of its pieces; empty = this way does not apply.
using Cuts = std::function<std::vector<int64_t>(int64_t n)>;

struct Way {
  std::string name;
  bool cached = true;
  Cuts cuts;
  bool packed = false;  // all prompts in one call, one ahead of the other where they are cut
};

std::vector<Way> ways(const VerifyConfig& config) {
  const auto whole = [](int64_t n) { return std::vector<int64_t>{n}; };
  std::vector<Way> list = {{"full forward", false, whole}, {"prefill at once", true, whole}};
  const int64_t page = config.page_size;
  const int64_t chunk = kRecurrenceChunk;
  for (const int64_t at : {int64_t{1}, int64_t{2}, int64_t{3}, page - 1, page, page + 1, chunk - 1,
                           chunk, chunk + 1, 2 * chunk - 1, 2 * chunk, 2 * chunk + 1}) {
    list.push_back({"split at " + std::to_string(at), true, [at](int64_t n) {
                      return at < n ? std::vector<int64_t>{at, n} : std::vector<int64_t>{};
                    }});
  }
  list.push_back({"split before the last", true, [](int64_t n) {
                    return n > 1 ? std::vector<int64_t>{n - 1, n} : std::vector<int64_t>{};
                  }});
  const auto pieces_of = [](int64_t size) {
    return [size](int64_t n) {
      std::vector<int64_t> ends;
      for (int64_t end = size; end < n; end += size) {
        ends.push_back(end);
      }
      ends.push_back(n);
      return ends;
    };
  };
  list.push_back({"pieces of 7", true, pieces_of(7)});
  list.push_back({"pieces of " + std::to_string(chunk), true, pieces_of(chunk)});
  list.push_back({"token by token", true, pieces_of(1)});
  list.push_back({"packed", false, whole, true});
  list.push_back({"packed prefill", true, whole, true});
  list.push_back({"packed pieces", true, pieces_of(7), true});
  return list;
}

void compare(const Prompt& prompt, std::span<const float> ours, VerifyRow& row) {
  struct Differences {
    double error = 0.0;
    double kl = 0.0;
    bool same_choice = false;
  };
  const size_t vocab = prompt.logits.size() / prompt.tokens.size();
  std::vector<Differences> of(prompt.tokens.size());
  parallel_for(prompt.size(), 1, [&](int64_t begin, int64_t end) {
    for (auto t = static_cast<size_t>(begin); t < static_cast<size_t>(end); ++t) {
      const Row expected = Row(prompt.logits).subspan(t * vocab, vocab);
      const Row got = ours.subspan(t * vocab, vocab);
      for (size_t v = 0; v < vocab; ++v) {
        const double error = std::abs(static_cast<double>(got[v]) - expected[v]) / prompt.deviation;
        of[t].error = larger_error(of[t].error, error);
      }
      of[t].kl = kl(expected, got);
      of[t].same_choice = largest(expected) == largest(got);
    }
  });
  double sum = 0.0;
  for (const Differences& token : of) {
    row.error = larger_error(row.error, token.error);
    sum += token.kl;
    row.same_choice += token.same_choice ? 1 : 0;
  }
  row.kl = larger_error(row.kl, sum / static_cast<double>(prompt.size()));
}

/// The prompts through the model, side by side, and what is to follow them greedily.
void run_together(Model& model, Workspace& workspace, const Way& way,
                  std::span<const Prompt> prompts, const VerifyConfig& config, VerifyRow& row) {
  Runner runner(model, workspace, way.cached, prompts, config.page_size);
  const auto vocab = static_cast<size_t>(model.spec().vocab);
  struct Progress {
    std::vector<int64_t> ends;
    size_t pieces = 0;
    size_t greedy = 0;
    int32_t token = -1;
  };
  std::vector<Progress> all;
  for (const Prompt& prompt : prompts) {
    all.push_back({way.cuts(prompt.size())});
    row.prompts += 1;
    row.tokens += prompt.size();
    row.greedy_tokens += std::ssize(prompt.greedy);
  }
  /// The next piece of a prompt, then the tokens that follow while they are the reference's.
  const auto next = [&](size_t k) -> std::span<const int32_t> {
    const Prompt& prompt = prompts[k];
    Progress& at = all[k];
    if (at.pieces < at.ends.size()) {
      const auto begin = static_cast<size_t>(at.pieces == 0 ? 0 : at.ends[at.pieces - 1]);
      const auto end = static_cast<size_t>(at.ends[at.pieces++]);
      return std::span(prompt.tokens).subspan(begin, end - begin);
    }
    if (at.greedy == prompt.greedy.size()) {
      return {};
    }
    at.token = largest(Row(runner.logits(k)).last(vocab));
    if (at.token != prompt.greedy[at.greedy]) {
      at.greedy = prompt.greedy.size();
      return {};
    }
    ++at.greedy;
    ++row.greedy_same;
    return {&at.token, 1};
  };
  for (;;) {
    std::vector<std::span<const int32_t>> tokens;
    bool any = false;
    for (size_t k = 0; k < prompts.size(); ++k) {
      tokens.push_back(next(k));
      any = any || !tokens.back().empty();
    }
    if (!any) {
      break;
    }
    runner.feed(tokens);
  }
  for (size_t k = 0; k < prompts.size(); ++k) {
    compare(prompts[k], runner.logits(k), row);
  }
}

VerifyRow run(Model& model, Workspace& workspace, const Way& way,
              const std::vector<Prompt>& prompts, const VerifyConfig& config) {
  VerifyRow row{.way = way.name};
  if (way.packed && prompts.size() > 1) {
    run_together(model, workspace, way, prompts, config, row);
  }
  for (const Prompt& prompt : prompts) {
    if (!way.packed && !way.cuts(prompt.size()).empty()) {
      run_together(model, workspace, way, {&prompt, 1}, config, row);
    }
  }
  row.ok = row.error <= config.max_error && row.kl <= config.max_kl &&
           (row.greedy_same == row.greedy_tokens || !config.same_greedy);
  return row;
}

VerifyReport run_ways(Model& model, const std::vector<Prompt>& prompts, bool cached,
                      const VerifyConfig& config, const std::string& label) {
  VerifyReport report;
  Workspace workspace(model.device());
  std::vector<Way> list = ways(config);
  std::erase_if(list, [&](const Way& way) { return cached && !way.cached; });
  std::optional<Progress> progress;
  if (!label.empty()) {
    progress.emplace(label, list.size(), Progress::Options{.unit = "ways"});
  }
  for (const Way& way : list) {
    VerifyRow row = run(model, workspace, way, prompts, config);
    if (row.prompts > 0) {
      report.rows.push_back(std::move(row));
    }
    if (progress) {
      progress->advance(1);
    }
  }
  if (progress) {
    progress->finish();
  }
  return report;
}

}  // namespace

VerifyConfig bf16_bounds(const ModelSpec& spec) {
  const bool chooses = std::any_of(spec.layers.begin(), spec.layers.end(), [](const LayerSpec& l) {
    return std::any_of(l.branches.begin(), l.branches.end(), [](const BranchSpec& branch) {
      return std::any_of(branch.units.begin(), branch.units.end(), [](const UnitSpec& unit) {
        return unit.kind == "experts" || unit.options.has("index_top");
      });
    });
  });
  return {.max_error = std::numeric_limits<double>::infinity(),
          .max_kl = chooses ? 0.45 : 2e-3,
          .same_greedy = false};
}

bool VerifyReport::ok() const {
  return !rows.empty() &&
         std::all_of(rows.begin(), rows.end(), [](const VerifyRow& row) { return row.ok; });
}

VerifyReport verify_model(Model& model, const std::string& reference_file,
                          const VerifyConfig& config) {
  return run_ways(model, read_prompts(reference_file, model.spec().vocab), false, config, "");
}

VerifyReport verify_cached(Model& model, const std::vector<std::vector<int32_t>>& texts,
                           const VerifyConfig& config, const std::string& label) {
  std::vector<Prompt> prompts;
  Workspace workspace(model.device());
  for (const std::vector<int32_t>& text : texts) {
    Prompt prompt;
    prompt.tokens = text;
    Runner runner(model, workspace, false, {&prompt, 1}, config.page_size);
    runner.feed({{std::span<const int32_t>(text)}});
    prompt.logits = std::move(runner.logits(0));
    prompt.deviation = standard_deviation(prompt.logits);
    prompts.push_back(std::move(prompt));
  }
  return run_ways(model, prompts, true, config, label);
}

}  // namespace cambium
