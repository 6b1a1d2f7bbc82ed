#include "eval/verify_values.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <span>

#include "base/checked.h"
#include "base/file.h"
#include "base/json.h"
#include "serve/cache.h"
#include "tensor/copy.h"

namespace cambium {
namespace {

using Json = nlohmann::json;

struct Case {
  std::string text;
  std::vector<int32_t> ids, top, greedy;
  std::vector<double> nll, top_logits;
};

template <class T>
std::vector<T> numbers(const Json& json, const char* key, const std::string& where) {
  const auto it = json.find(key);
  if (it == json.end()) {
    return {};
  }
  expect(it->is_array() && std::all_of(it->begin(), it->end(),
                                       [](const Json& value) {
                                         return std::is_integral_v<T> ? value.is_number_integer()
                                                                      : value.is_number();
                                       }),
         "{}: expected '{}' to be a list of numbers", where, key);
  return it->get<std::vector<T>>();
}

std::vector<int32_t> tokens(const Json& json, const char* key, int64_t vocab,
                            const std::string& where) {
  std::vector<int32_t> ids;
  for (const int64_t id : numbers<int64_t>(json, key, where)) {
    expect(id >= 0 && id < vocab, "{}: token {} in '{}' is outside the model's vocabulary of {}",
           where, id, key, vocab);
    ids.push_back(static_cast<int32_t>(id));
  }
  return ids;
}

std::vector<Case> read_cases(const std::string& path, int64_t vocab) {
  const Json json = parse_json<Json>(read_text_file(path), path);
  expect(json.is_object() && json.contains("cases") && json["cases"].is_array() &&
             !json["cases"].empty(),
         "{}: expected an object with the list 'cases'", path);
  std::vector<Case> cases;
  for (const Json& entry : json["cases"]) {
    const std::string where = fmt::format("{}: cases[{}]", path, cases.size());
    expect(entry.is_object(), "{}: expected an object", where);
    Case& c = cases.emplace_back();
    c.text = entry.contains("text") && entry["text"].is_string() ? entry["text"].get<std::string>()
                                                                 : std::to_string(cases.size());
    c.ids = tokens(entry, "ids", vocab, where);
    c.nll = numbers<double>(entry, "nll", where);
    c.top = tokens(entry, "last_top_ids", vocab, where);
    c.top_logits = numbers<double>(entry, "last_top_logits", where);
    c.greedy = tokens(entry, "greedy", vocab, where);
    expect(c.ids.size() >= 2 && c.nll.size() == c.ids.size() - 1 &&
               c.top.size() == c.top_logits.size(),
           "{}: expected at least 2 'ids', an 'nll' for each but the first, and as many "
           "'last_top_logits' as 'last_top_ids'",
           where);
  }
  return cases;
}

double nll(std::span<const float> row, int32_t token) {
  const double top = *std::max_element(row.begin(), row.end());
  double sum = 0.0;
  for (const double x : row) {
    sum += std::exp(x - top);
  }
  return top + std::log(sum) - row[static_cast<size_t>(token)];
}

ValuesRow run(Model& model, const Case& c, const ValuesConfig& config) {
  ValuesRow row{.text = c.text.substr(0, c.text.find('\n')).substr(0, 40),
                .tokens = static_cast<int64_t>(c.ids.size()),
                .greedy_tokens = static_cast<int64_t>(c.greedy.size())};
  const auto vocab = static_cast<size_t>(model.spec().vocab);
  Cache cache(model, {.max_sequences = 1,
                      .memory_bytes = 0,
                      .max_tokens = row.tokens + row.greedy_tokens,
                      .piece_tokens = row.tokens,
                      .values = model.activations()});
  const int64_t slot = cache.open(row.tokens + row.greedy_tokens);
  CAMBIUM_CHECK(slot >= 0);
  Workspace workspace(model.device());
  const auto worst = [](double& error, double difference) {
    error = larger_error(error, std::abs(difference));
  };
  std::vector<int32_t> piece = c.ids;
  int64_t fed = 0;
  for (size_t next = 0; next <= c.greedy.size(); ++next) {
    const WorkspaceScope scope(workspace);
    Context ctx = context_for(model, workspace);
    Batch batch;
    batch.add(piece, fed, slot, row.tokens);
    ForwardOptions options;
    options.states = cache.prepare(batch);
    const std::vector<float> logits =
        elements_of(model.logits(ctx, model.forward(ctx, batch, options)));
    const auto at = [&](size_t t) { return std::span(logits).subspan(t * vocab, vocab); };
    const std::span<const float> last = at(piece.size() - 1);
    if (next == 0) {
      for (size_t t = 0; t < c.nll.size(); ++t) {
        worst(row.nll_error, nll(at(t), c.ids[t + 1]) - c.nll[t]);
      }
      for (size_t i = 0; i < c.top.size(); ++i) {
        worst(row.logit_error, last[static_cast<size_t>(c.top[i])] - c.top_logits[i]);
      }
    }
    const auto token =
        static_cast<int32_t>(std::max_element(last.begin(), last.end()) - last.begin());
    if (next == c.greedy.size() || token != c.greedy[next]) {
      break;
    }
    ++row.greedy_same;
    fed += std::ssize(piece);
    piece = {token};
  }
  cache.close(slot);
  row.ok = row.nll_error <= config.max_nll_error && row.logit_error <= config.max_logit_error &&
           row.greedy_same == row.greedy_tokens;
  return row;
}

}  // namespace

std::vector<ValuesRow> verify_values(Model& model, const std::string& json_file,
                                     const ValuesConfig& config) {
  std::vector<ValuesRow> rows;
  for (const Case& c : read_cases(json_file, model.spec().vocab)) {
    rows.push_back(run(model, c, config));
  }
  return rows;
}

}  // namespace cambium
