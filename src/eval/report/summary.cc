#include "eval/report/summary.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "base/checked.h"
#include "base/error.h"
#include "base/file.h"
#include "base/json.h"
#include "base/json_fields.h"

namespace cambium {
namespace {

using Json = nlohmann::ordered_json;

// JSON has no NaN: null stands for it.
Json numbers(const std::vector<double>& values) {
  Json out = Json::array();
  for (const double v : values) {
    out.push_back(std::isfinite(v) ? Json(v) : Json());
  }
  return out;
}

Json to_json(const Measured& m) {
  return {{"value", m.value}, {"low", m.low}, {"high", m.high}};
}
Measured measured(const JsonFields& j) {
  return {j.real("value"), j.real("low"), j.real("high")};
}

Json to_json(const AccuracySummary& a) {
  return {{"correct", a.correct},
          {"total", a.total},
          {"value", a.accuracy.value},
          {"low", a.accuracy.low},
          {"high", a.accuracy.high}};
}
AccuracySummary accuracy(const JsonFields& j) {
  return {j.whole("correct"), j.whole("total"), measured(j)};
}

Json to_json(const ModelSummary& m) {
  Json speed = Json::array();
  for (const SpeedSummary& s : m.speed) {
    speed.push_back({{"context", s.context},
                     {"batch", s.batch},
                     {"prefill_tokens_per_second", to_json(s.prefill)},
                     {"decode_tokens_per_second", to_json(s.decode)}});
  }
  Json lengths = Json::array();
  for (const RetrievalAt& at : m.retrieval_at) {
    Json entry = to_json(at.found);
    entry["what"] = at.what;
    lengths.push_back(std::move(entry));
  }
  return {{"name", m.name},
          {"dir", m.dir},
          {"layers_converted", m.converted},
          {"layer_map", m.map},
          {"mixers", m.mixers},
          {"parameters", m.parameters},
          {"tokens_trained", m.tokens_trained},
          {"tokens_learned", m.tokens_learned},
          {"next_sample", m.next_sample},
          {"from", m.from},
          {"checksums", m.checksums},
          {"seconds", m.seconds},
          {"accuracy", to_json(m.accuracy)},
          {"retrieval", to_json(m.retrieval)},
          {"retrieval_at", lengths},
          {"sticky", to_json(m.sticky)},
          {"answer_tokens", m.answer_tokens},
          {"right_answers_per_second", right_answers_per_second(m)},
          {"cached_kl", m.cached_kl},
          {"cached_limit", m.cached_limit},
          {"held_out",
           {{"reverse_kl", m.reverse_kl},
            {"reverse_kl_converted", m.reverse_kl_converted},
            {"selection_reverse_kl", m.selection_reverse_kl},
            {"nll", m.nll},
            {"agreement", m.agreement}}},
          {"fit", {{"layers", m.fit.layers}, {"before", m.fit.before}, {"after", m.fit.after}}},
          {"speed", speed},
          {"cache_bytes_per_token", m.cache_bytes_per_token},
          {"state_bytes_per_sequence", m.state_bytes_per_sequence},
          {"gate",
           {{"passed", m.gate.passed},
            {"attempts", m.gate.attempts},
            {"kept", m.gate.kept},
            {"reason", m.gate.reason}}},
          {"shipped", m.shipped}};
}

ModelSummary model(const JsonFields& j) {
  ModelSummary m;
  m.name = j.text("name");
  m.dir = j.text("dir");
  m.converted = j.whole("layers_converted");
  m.map = j.text("layer_map");
  const int64_t layers = std::ssize(layers_of_map(m.map));
  expect(layers <= kMaxLayers, "{}: expected 'layer_map' to have at most {} layers, got {}",
         j.where(), kMaxLayers, layers);
  m.mixers = j.wholes_by_name("mixers");
  m.parameters = j.whole("parameters");
  m.tokens_trained = j.whole("tokens_trained");
  m.tokens_learned = j.has("tokens_learned") ? j.whole("tokens_learned") : 0;
  m.next_sample = j.has("next_sample") ? j.unsigned_whole("next_sample") : 0;
  m.from = j.has("from") ? j.text("from") : "";
  m.checksums = j.has("checksums") ? j.text("checksums") : "";
  m.seconds = j.real("seconds");
  m.accuracy = accuracy(j.object("accuracy"));
  m.retrieval = accuracy(j.object("retrieval"));
  if (j.has("retrieval_at")) {
    for (const JsonFields& at : j.objects("retrieval_at")) {
      // Runs of November 2026 have the characters alone.
      m.retrieval_at.push_back(
          {at.has("what") ? at.text("what")
                          : fmt::format("retrieval of {} characters", at.whole("characters")),
           accuracy(at)});
    }
  }
  m.sticky = j.has("sticky") ? accuracy(j.object("sticky")) : AccuracySummary{};
  m.answer_tokens = j.has("answer_tokens") ? j.real("answer_tokens") : 0.0;
  m.cached_kl = j.has("cached_kl") ? j.real("cached_kl") : -1.0;
  m.cached_limit = j.has("cached_limit") ? j.real("cached_limit") : 0.0;
  const JsonFields held_out = j.object("held_out");
  m.reverse_kl = held_out.real("reverse_kl");
  m.reverse_kl_converted = held_out.real("reverse_kl_converted");
  m.selection_reverse_kl =
      held_out.has("selection_reverse_kl") ? held_out.real("selection_reverse_kl") : 0.0;
  m.nll = held_out.real("nll");
  m.agreement = held_out.real("agreement");
  if (j.has("fit")) {
    const JsonFields fit = j.object("fit");
    m.fit = {fit.whole("layers"), fit.real("before"), fit.real("after")};
  }
  for (const JsonFields& s : j.objects("speed")) {
    m.speed.push_back({s.whole("context"), s.whole("batch"),
                       measured(s.object("prefill_tokens_per_second")),
                       measured(s.object("decode_tokens_per_second"))});
  }
  m.cache_bytes_per_token = j.whole("cache_bytes_per_token");
  m.state_bytes_per_sequence = j.whole("state_bytes_per_sequence");
  const JsonFields gate = j.object("gate");
  m.gate = {gate.flag("passed"), gate.whole("attempts"), gate.text("reason"),
            gate.has("kept") ? gate.whole("kept") : 0};
  m.shipped = j.flag("shipped");
  return m;
}

}  // namespace

const AccuracySummary* find_retrieval(const ModelSummary& model, const std::string& what) {
  for (const RetrievalAt& at : model.retrieval_at) {
    if (at.what == what) {
      return &at.found;
    }
  }
  return nullptr;
}

AccuracySummary overall_retrieval(const ModelSummary& model) {
  if (model.retrieval.total > 0) {
    return model.retrieval;
  }
  AccuracySummary all;
  for (const RetrievalAt& at : model.retrieval_at) {
    all.correct += at.found.correct;
    all.total += at.found.total;
  }
  all.accuracy.value =
      all.total == 0 ? 0.0 : static_cast<double>(all.correct) / static_cast<double>(all.total);
  return all;
}

std::optional<Measured> least_retrieval_kept(const ModelSummary& model,
                                             const ModelSummary& teacher) {
  std::optional<Measured> least;
  const auto add = [&](const AccuracySummary& now, const AccuracySummary& before) {
    const double all = before.accuracy.value;
    if (now.total > 0 && all > 0.0) {
      const auto share = [&](double found) { return std::min(found / all, 1.0); };
      const Measured kept{share(now.accuracy.value), share(now.accuracy.low),
                          share(now.accuracy.high)};
      if (!least || kept.value < least->value) {
        least = kept;
      }
    }
  };
  add(model.retrieval, teacher.retrieval);
  for (const RetrievalAt& at : model.retrieval_at) {
    if (const AccuracySummary* before = find_retrieval(teacher, at.what)) {
      add(at.found, *before);
    }
  }
  return least;
}

double right_answers_per_second(const ModelSummary& model) {
  return model.speed.empty() || model.answer_tokens <= 0.0
             ? 0.0
             : model.accuracy.accuracy.value * model.speed.back().decode.value /
                   model.answer_tokens;
}

std::vector<std::string> layers_of_map(const std::string& map) {
  std::vector<std::string> layers;
  for (size_t at = 0; at < map.size(); ++at) {
    if (map[at] == '(') {
      const size_t end = std::min(map.find(')', at), map.size());
      layers.push_back(map.substr(at + 1, end - at - 1));
      at = end;
    } else {
      layers.emplace_back(1, map[at]);
    }
  }
  return layers;
}

std::string summary_json(const RunSummary& s) {
  Json json;
  json["name"] = s.name;
  json["date"] = s.date;
  json["machine"] = s.machine;
  json["command"] = s.command;
  json["task"] = s.task;
  json["seconds"] = s.seconds;
  json["models"] = Json::array();
  for (const ModelSummary& m : s.models) {
    json["models"].push_back(to_json(m));
  }
  json["importance"] = Json::array();
  for (const ImportanceSummary& i : s.importance) {
    json["importance"].push_back({{"stage", i.stage},
                                  {"method", i.method},
                                  {"metric", i.metric},
                                  {"scores", numbers(i.scores)},
                                  {"converted", i.converted},
                                  {"data", i.data}});
  }
  json["curves"] = Json::array();
  for (const CurveSummary& c : s.curves) {
    json["curves"].push_back({{"stage", c.stage},
                              {"phase", c.phase},
                              {"tokens", numbers(c.tokens)},
                              {"loss", numbers(c.loss)},
                              {"reverse_kl", numbers(c.reverse_kl)}});
  }
  json["plan"] = s.plan;
  return json.dump(1, ' ', false, Json::error_handler_t::replace) + "\n";
}

void write_summary(const RunSummary& s, const std::filesystem::path& path) {
  write_file_atomically(path.string(), summary_json(s));
}

RunSummary read_summary(const std::filesystem::path& path) {
  return parse_summary(read_text_file(path.string()), path.string());
}

RunSummary parse_summary(const std::string& text, const std::string& where) {
  const auto root = parse_json<nlohmann::json>(text, where);
  const JsonFields json(root, where);
  RunSummary s;
  s.name = json.text("name");
  s.date = json.text("date");
  s.machine = json.text("machine");
  s.command = json.text("command");
  s.task = json.text("task");
  s.seconds = json.real("seconds");
  s.plan = json.text("plan");
  for (const JsonFields& m : json.objects("models")) {
    s.models.push_back(model(m));
  }
  for (const JsonFields& i : json.objects("importance")) {
    s.importance.push_back({i.text("stage"), i.text("method"), i.text("metric"), i.reals("scores"),
                            i.flags("converted"), i.has("data") ? i.text("data") : ""});
  }
  for (const JsonFields& c : json.objects("curves")) {
    s.curves.push_back({c.text("stage"), c.text("phase"), c.reals("tokens"), c.reals("loss"),
                        c.reals("reverse_kl")});
    const CurveSummary& curve = s.curves.back();
    expect(
        curve.loss.size() == curve.tokens.size() && curve.reverse_kl.size() == curve.tokens.size(),
        "{}: expected as many values of 'loss' and 'reverse_kl' as of 'tokens', got {}, {} and {}",
        c.where(), curve.loss.size(), curve.reverse_kl.size(), curve.tokens.size());
  }
  return s;
}

}  // namespace cambium
