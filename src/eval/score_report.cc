#include "eval/score_report.h"

#include <cmath>
#include <nlohmann/json.hpp>
#include <numeric>

#include "eval/paired.h"
#include "eval/statistics.h"
#include "train/held_out.h"

namespace cambium {
namespace {

using Json = nlohmann::ordered_json;

Json interval_json(const Measured& m) {
  return {{"value", m.value}, {"low", m.low}, {"high", m.high}};
}

std::string percent(const Measured& m) {
  return fmt::format("{:.1f} % [{:.1f}, {:.1f}]", 100 * m.value, 100 * m.low, 100 * m.high);
}

// Of each document, the bytes of the tokens that are predicted.
std::vector<double> label_bytes(const HeldOut& documents, const Tokenizer& tokenizer) {
  std::vector<double> out;
  for (const PackedSequence& group : documents.groups()) {
    const Segments segments = group.batch.segments();
    for (int64_t s = 0; s < segments.count(); ++s) {
      const auto begin = static_cast<size_t>(segments.start[static_cast<size_t>(s)]);
      out.push_back(0.0);
      for (size_t t = begin; t < begin + static_cast<size_t>(segments.length(s)); ++t) {
        const int32_t label = group.labels[t];
        if (label >= 0 && !tokenizer.is_special(label)) {
          out.back() += static_cast<double>(tokenizer.token_bytes(label).size());
        }
      }
    }
  }
  return out;
}

// The same questions answered by another model: who is better, and how sure that is.
Json against_json(const ScoreReport& r) {
  const StoredGrades ours = grades_of(*r.result);
  const StoredGrades theirs = read_grades(r.against);
  const PairedResult paired = compare_grades(ours, theirs, r.against);
  Json json = {
      {"file", r.against},
      {"accuracy", mean(theirs.scores).value},
      {"difference", interval_json({paired.difference.value, paired.difference.interval.low,
                                    paired.difference.interval.high})},
      {"interval", "paired bootstrap over questions, 95 %"},
      {"only_this", paired.only_first},
      {"only_that", paired.only_second},
      {"p", paired.p},
      {"test", paired.exact ? "McNemar, exact" : "sign flips of the differences"}};
  if (theirs.mean_tokens > 0 && ours.mean_tokens > 0) {
    json["length_ratio"] = ours.mean_tokens / theirs.mean_tokens;
  }
  if (r.seconds > 0) {
    json["seconds"] = r.seconds;
  }
  return json;
}

std::string against_text(const Json& j) {
  const Json& d = j["difference"];
  std::string text = fmt::format(
      "against {}: {:+.1f} points [{:+.1f}, {:+.1f}], alone right {} here, {} there; p = {:.3g} "
      "({})\n",
      j["file"].get<std::string>(), 100 * d["value"].get<double>(), 100 * d["low"].get<double>(),
      100 * d["high"].get<double>(), j["only_this"].get<int64_t>(), j["only_that"].get<int64_t>(),
      j["p"].get<double>(), j["test"].get<std::string>());
  if (j.contains("length_ratio")) {
    text += fmt::format("  answers are {:.2f} times as long\n", j["length_ratio"].get<double>());
  }
  return text;
}

// Rows of lengths, columns of depths.
Json cells_json(const LongGrid& grid, const AccuracyResult& result) {
  Json cells = Json::array();
  const auto each = static_cast<size_t>(grid.answers);
  for (size_t at = 0; at < result.examples.size(); at += each) {
    const auto cell = static_cast<int64_t>(at / each);
    int64_t right = 0;
    for (size_t i = at; i < at + each; ++i) {
      right += result.examples[i].correct ? 1 : 0;
    }
    const Estimate share = proportion(right, static_cast<int64_t>(each));
    cells.push_back({{"length", grid.lengths[static_cast<size_t>(cell / grid.depths)]},
                     {"depth", depth_of(cell % grid.depths, grid.depths)},
                     {"correct", right},
                     {"total", each},
                     {"low", share.interval.low},
                     {"high", share.interval.high}});
  }
  return cells;
}

std::string cells_text(const LongGrid& grid, const Json& cells) {
  std::string text = fmt::format("{:>9} tokens, depth", "");
  for (int64_t d = 0; d < grid.depths; ++d) {
    text += fmt::format(" {:>6.0f}%", 100 * depth_of(d, grid.depths));
  }
  for (size_t i = 0; i < cells.size(); ++i) {
    if (i % static_cast<size_t>(grid.depths) == 0) {
      text += fmt::format("\n{:>9}              ", cells[i]["length"].get<int64_t>());
    }
    text += fmt::format(" {:>6.0f}%",
                        100 * cells[i]["correct"].get<double>() / cells[i]["total"].get<double>());
  }
  return text + "\n";
}

}  // namespace

Json score_json(const ScoreReport& r) {
  const AccuracyResult& result = *r.result;
  const AccuracySummary& s = result.summary;
  Json json = {{"correct", s.correct},
               {"total", s.total},
               {"samples", result.samples},
               {"unanswered", result.unanswered},
               {"no_answer_found", result.no_answer},
               {"truncated", result.truncated},
               {"mean_tokens", result.mean_tokens()},
               {"accuracy", s.accuracy.value},
               {"low", s.accuracy.low},
               {"high", s.accuracy.high},
               {"interval", result.samples == 1
                                ? "Wilson, 95 %"
                                : "bootstrap over problems (Wilson's where all are alike), 95 %"}};
  if (r.seconds > 0) {
    json["right_per_second"] = static_cast<double>(s.correct) / r.seconds;
  }
  if (r.grid) {
    json["cells"] = cells_json(*r.grid, result);
  }
  if (!r.against.empty()) {
    json["against"] = against_json(r);
  }
  return json;
}

std::string score_text(const ScoreReport& r) {
  const AccuracyResult& result = *r.result;
  const AccuracySummary& s = result.summary;
  std::string text = fmt::format(
      "{}: {} of {} right, {} (95 %){}\n", r.task, s.correct, s.total, percent(s.accuracy),
      result.unanswered == 0 ? "" : fmt::format("; {} not answered: too long", result.unanswered));
  if (result.samples > 1) {
    text += fmt::format("  pass@1 as the mean of {} answers to each of {} problems\n",
                        result.samples, r.problems);
  }
  if (result.measured > 0) {
    text += fmt::format(
        "  {} cut off at the limit of tokens ({:.1f} %), {} without an answer that could be found; "
        "{:.1f} tokens an answer\n",
        result.truncated,
        100 * static_cast<double>(result.truncated) / static_cast<double>(s.total),
        result.no_answer, result.mean_tokens());
  }
  if (r.grid) {
    text += cells_text(*r.grid, cells_json(*r.grid, result));
  }
  if (r.seconds > 0) {
    text += fmt::format("  {:.2f} right answers a second\n",
                        static_cast<double>(s.correct) / r.seconds);
  }
  return text + (r.against.empty() ? "" : against_text(against_json(r)));
}

Json choices_json(const ChoiceSummary& s, int64_t rotations) {
  Json json = {{"acc", interval_json(s.by_sum.accuracy)},
               {"acc_norm", interval_json(s.by_length.accuracy)},
               {"margin", interval_json(s.margin)},
               {"letters", s.letters}};
  if (rotations > 1) {
    json["sticky"] = interval_json(s.sticky.accuracy);
  }
  return json;
}

std::string choices_text(const ChoiceSummary& s, int64_t rotations, const std::string& task,
                         size_t questions) {
  std::string text =
      fmt::format("{}: acc {}, acc_norm {} (95 %) of {} questions\n", task,
                  percent(s.by_sum.accuracy), percent(s.by_length.accuracy), questions);
  text += fmt::format(
      "  margin {:+.3f} [{:+.3f}, {:+.3f}]: log p of the right option less the best other\n",
      s.margin.value, s.margin.low, s.margin.high);
  if (rotations > 1) {
    text += fmt::format("  sticky {}: the same letter in all {} rotations of the options\n",
                        percent(s.sticky.accuracy), rotations);
  }
  return text;
}

Json mt_bench_json(const MtResult& result) {
  return {{"score", interval_json(result.score)},
          {"interval", "bootstrap over questions, 95 %"},
          {"turns", {result.turns[0], result.turns[1]}},
          {"categories", result.categories},
          {"unrated", result.unrated}};
}

std::string mt_bench_text(const MtResult& result) {
  std::string text = fmt::format(
      "mt-bench: {:.2f} [{:.2f}, {:.2f}] of 10; first turn {:.2f}, second {:.2f}; {} of {} not "
      "rated\n",
      result.score.value, result.score.low, result.score.high, result.turns[0], result.turns[1],
      result.unrated, result.answers.size());
  for (const auto& [category, score] : result.categories) {
    text += fmt::format("  {:<12} {:.2f}\n", category, score);
  }
  return text;
}

Json text_json(const HeldOut& documents, const std::vector<LossSums>& each,
               const Tokenizer& tokenizer, bool teacher, const std::string& cached) {
  const LossSums sums = total(each);
  const auto tokens = static_cast<double>(sums.tokens);
  const std::vector<double> lengths = label_bytes(documents, tokenizer);
  const double bytes = std::accumulate(lengths.begin(), lengths.end(), 0.0);
  std::vector<double> losses;
  std::vector<double> counts;
  for (const LossSums& one : each) {
    losses.push_back(one.cross_entropy);
    counts.push_back(static_cast<double>(one.tokens));
  }
  const Interval nll = bootstrap_ratio(losses, counts, 1).interval;
  Json json = {{"task", "text"},
               {"cache", cached},
               {"documents", documents.documents()},
               {"tokens", sums.tokens},
               {"nll", sums.cross_entropy / tokens},
               {"perplexity", std::exp(sums.cross_entropy / tokens)},
               {"perplexity_low", std::exp(nll.low)},
               {"perplexity_high", std::exp(nll.high)},
               {"interval", "bootstrap over documents, 95 %"},
               {"bytes", bytes},
               {"byte_perplexity", std::exp(sums.cross_entropy / bytes)},
               {"bits_per_byte", sums.cross_entropy / bytes / std::log(2.0)},
               {"token_accuracy", static_cast<double>(sums.correct) / tokens}};
  if (teacher) {
    json["reverse_kl"] = sums.reverse_kl / tokens;
    json["forward_kl"] = sums.forward_kl / tokens;
    json["agreement"] = static_cast<double>(sums.agreement) / tokens;
  }
  return json;
}

}  // namespace cambium
