// The picture of score against throughput, of one run or several, and its numbers as a table.
#include <algorithm>

#include "base/error.h"
#include "base/text.h"
#include "eval/report/summary.h"
#include "eval/report/svg.h"

namespace cambium {
namespace {

/// The model's speed at that context and batch; nullptr where it was not measured there.
const SpeedSummary* speed_at(const ModelSummary& model, int64_t context, int64_t batch) {
  const auto at = std::find_if(model.speed.begin(), model.speed.end(), [&](const SpeedSummary& s) {
    return s.context == context && s.batch == batch;
  });
  return at == model.speed.end() ? nullptr : &*at;
}

/// A field of RFC 4180; text that a spreadsheet would take for a formula is quoted by an
/// apostrophe.
std::string csv_field(const std::string& text) {
  std::string out = "\"";
  if (!text.empty() && std::string_view("=+-@").find(text[0]) != std::string_view::npos) {
    out += '\'';
  }
  for (const char c : text) {
    out += c == '"' ? "\"\"" : std::string(1, c);
  }
  return out + "\"";
}

}  // namespace

std::vector<std::string> frontier_charts(std::span<const RunSummary> runs, int64_t context,
                                         int64_t batch) {
  std::vector<svg::Point> accuracy;
  std::vector<svg::Point> retrieval;
  for (size_t r = 0; r < runs.size(); ++r) {
    for (const ModelSummary& model : runs[r].models) {
      const SpeedSummary* speed = speed_at(model, context, batch);
      if (speed == nullptr) {
        continue;
      }
      const bool baseline = model.converted > 0 && model.tokens_trained == 0 && !model.shipped;
      const auto point = [&](const Measured& y) {
        const Measured& x = speed->decode;
        return svg::Point{x.value,
                          x.low,
                          x.high,
                          y.value,
                          y.low,
                          y.high,
                          (runs.size() > 1 ? runs[r].name + ": " : std::string()) + model.name,
                          model.converted == 0,
                          2 * static_cast<int>(r) + (baseline ? 1 : 0),
                          baseline};
      };
      accuracy.push_back(point(model.accuracy.accuracy));
      if (const auto kept = least_retrieval_kept(model, runs[r].models.front())) {
        retrieval.push_back(point(*kept));
      }
    }
  }
  const svg::Axis x{
      .title = fmt::format("decode, tokens/s at {} tokens of context, batch {}", context, batch)};
  std::vector<std::string> charts{
      svg::scatter(accuracy, x, {.title = "accuracy", .percent = true})};
  if (!retrieval.empty()) {
    charts.push_back(svg::scatter(
        retrieval, x, {.title = "least kept of the teacher\u2019s retrieval", .percent = true}));
  }
  return charts;
}

std::string render_frontiers(std::span<const RunSummary> runs) {
  CAMBIUM_CHECK(!runs.empty());
  const SpeedSummary* place = nullptr;
  for (const ModelSummary& model : runs.front().models) {
    for (const SpeedSummary& speed : model.speed) {
      const bool everywhere = std::all_of(runs.begin(), runs.end(), [&](const RunSummary& run) {
        return std::any_of(run.models.begin(), run.models.end(), [&](const ModelSummary& m) {
          return speed_at(m, speed.context, speed.batch) != nullptr;
        });
      });
      if (everywhere && (place == nullptr || speed.context > place->context)) {
        place = &speed;
      }
    }
  }
  expect(place != nullptr,
         "the runs share no context and batch at which speed was measured, so that one picture of "
         "them would compare what cannot be compared");
  return svg::standalone(frontier_charts(runs, place->context, place->batch));
}

std::string frontier_csv(std::span<const RunSummary> runs) {
  std::string out =
      "run,machine,date,model,layers_converted,context,batch,decode_tokens_per_second,decode_low,"
      "decode_high,prefill_tokens_per_second,accuracy,accuracy_low,accuracy_high,correct,total,"
      "cache_bytes_per_token,state_bytes_per_sequence,least_retrieval_kept\n";
  for (const RunSummary& run : runs) {
    for (const ModelSummary& m : run.models) {
      for (const SpeedSummary& s : m.speed) {
        const AccuracySummary& a = m.accuracy;
        const auto kept = least_retrieval_kept(m, run.models.front());
        out += fmt::format(
            "{},{},{},{},{},{},{},{},{},{},{},{},{},{},{},{},{},{},{}\n", csv_field(run.name),
            csv_field(run.machine), csv_field(run.date), csv_field(m.name), m.converted, s.context,
            s.batch, s.decode.value, s.decode.low, s.decode.high, s.prefill.value, a.accuracy.value,
            a.accuracy.low, a.accuracy.high, a.correct, a.total, m.cache_bytes_per_token,
            m.state_bytes_per_sequence, kept ? fmt::format("{}", kept->value) : std::string());
      }
    }
  }
  return out;
}

}  // namespace cambium
