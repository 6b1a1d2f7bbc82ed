#include "eval/verify.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <span>

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

/// A sequence fed piece by piece through a cache, or again from its start each time without one.
class Runner {
 public:
  /// `prompt` is the length of the sequence for rotations that depend on it.
  Runner(Model& model, Workspace& workspace, Cache* cache, int64_t prompt, int64_t most)
      : model_(model), workspace_(workspace), cache_(cache), prompt_(prompt) {
    if (cache_ != nullptr) {
      slot_ = cache_->open(most);
      CAMBIUM_CHECK(slot_ >= 0);
    }
  }
  ~Runner() {
    if (cache_ != nullptr) {
      cache_->close(slot_);
    }
  }
  Runner(const Runner&) = delete;
  Runner& operator=(const Runner&) = delete;

  /// Logits of the new tokens, appended.   (n, V)
  void feed(std::span<const int32_t> tokens, std::vector<float>& logits) {
    Batch batch;
    ForwardOptions options;
    const auto before = static_cast<int64_t>(fed_.size());
    fed_.insert(fed_.end(), tokens.begin(), tokens.end());
    if (cache_ == nullptr) {
      batch.add(fed_, 0, -1, prompt_);
    } else {
      batch.add(tokens, before, slot_, prompt_);
      options.states = cache_->prepare(batch);
    }
    const WorkspaceScope scope(workspace_);
    Context ctx = context_for(model_, workspace_);
    const Tensor hidden = model_.forward(ctx, batch, options);
    const auto n = static_cast<int64_t>(tokens.size());
    const Tensor y = model_.logits(ctx, hidden.slice(0, hidden.dim(0) - n, n));
    const std::vector<float> values = elements_of(y);
    logits.insert(logits.end(), values.begin(), values.end());
  }

 private:
  Model& model_;
  Workspace& workspace_;
  Cache* cache_;
  int64_t prompt_;
  int64_t slot_ = -1;
  std::vector<int32_t> fed_;
};

/// How to cut a prompt of n tokens: the ends of its pieces; empty = this way does not apply.
using Cuts = std::function<std::vector<int64_t>(int64_t n)>;

struct Way {
  std::string name;
  bool cached = true;
  Cuts cuts;
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
  return list;
}

void compare(const Prompt& prompt, std::span<const float> ours, VerifyRow& row) {
  const size_t vocab = prompt.logits.size() / prompt.tokens.size();
  double sum = 0.0;
  for (size_t t = 0; t < prompt.tokens.size(); ++t) {
    const Row expected = Row(prompt.logits).subspan(t * vocab, vocab);
    const Row got = ours.subspan(t * vocab, vocab);
    for (size_t v = 0; v < vocab; ++v) {
      const double error = std::abs(static_cast<double>(got[v]) - expected[v]) / prompt.deviation;
      row.error = error <= row.error ? row.error : error;  // NaN stays
    }
    sum += kl(expected, got);
    row.same_choice += largest(expected) == largest(got) ? 1 : 0;
  }
  const double mean = sum / static_cast<double>(prompt.size());
  row.kl = mean <= row.kl ? row.kl : mean;
}

VerifyRow run(Model& model, Workspace& workspace, const Way& way,
              const std::vector<Prompt>& prompts, const VerifyConfig& config) {
  VerifyRow row{.way = way.name};
  const auto vocab = static_cast<size_t>(model.spec().vocab);
  for (const Prompt& prompt : prompts) {
    const std::vector<int64_t> ends = way.cuts(prompt.size());
    if (ends.empty()) {
      continue;
    }
    const int64_t most = prompt.size() + static_cast<int64_t>(prompt.greedy.size());
    Cache cache(model, {.max_sequences = 1,
                        .page_size = config.page_size,
                        .memory_bytes = 0,
                        .max_tokens = most,
                        .piece_tokens = prompt.size(),
                        .values = model.activations()});
    Runner runner(model, workspace, way.cached ? &cache : nullptr, prompt.size(), most);
    std::vector<float> logits;
    int64_t begin = 0;
    for (const int64_t end : ends) {
      runner.feed(std::span(prompt.tokens)
                      .subspan(static_cast<size_t>(begin), static_cast<size_t>(end - begin)),
                  logits);
      begin = end;
    }
    compare(prompt, logits, row);
    row.prompts += 1;
    row.tokens += prompt.size();
    row.greedy_tokens += static_cast<int64_t>(prompt.greedy.size());
    for (const int32_t expected : prompt.greedy) {
      const int32_t token = largest(Row(logits).last(vocab));
      if (token != expected) {
        break;
      }
      ++row.greedy_same;
      runner.feed({&token, 1}, logits);
    }
  }
  row.ok = row.error <= config.max_error && row.kl <= config.max_kl &&
           row.greedy_same == row.greedy_tokens;
  return row;
}

VerifyReport run_ways(Model& model, const std::vector<Prompt>& prompts, bool cached,
                      const VerifyConfig& config) {
  VerifyReport report;
  Workspace workspace(model.device());
  for (const Way& way : ways(config)) {
    if (cached && !way.cached) {
      continue;
    }
    VerifyRow row = run(model, workspace, way, prompts, config);
    if (row.prompts > 0) {
      report.rows.push_back(std::move(row));
    }
  }
  return report;
}

}  // namespace

bool VerifyReport::ok() const {
  return !rows.empty() &&
         std::all_of(rows.begin(), rows.end(), [](const VerifyRow& row) { return row.ok; });
}

VerifyReport verify_model(Model& model, const std::string& reference_file,
                          const VerifyConfig& config) {
  return run_ways(model, read_prompts(reference_file, model.spec().vocab), false, config);
}

VerifyReport verify_cached(Model& model, const std::vector<std::vector<int32_t>>& texts,
                           const VerifyConfig& config) {
  std::vector<Prompt> prompts;
  Workspace workspace(model.device());
  for (const std::vector<int32_t>& text : texts) {
    Prompt prompt;
    prompt.tokens = text;
    Runner(model, workspace, nullptr, prompt.size(), prompt.size()).feed(text, prompt.logits);
    prompt.deviation = standard_deviation(prompt.logits);
    prompts.push_back(std::move(prompt));
  }
  return run_ways(model, prompts, true, config);
}

}  // namespace cambium
