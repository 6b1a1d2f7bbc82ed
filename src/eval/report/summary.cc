#include "eval/report/summary.h"

#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "base/file.h"

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

std::vector<double> read_numbers(const Json& json) {
  std::vector<double> out;
  for (const Json& v : json) {
    out.push_back(v.is_null() ? std::numeric_limits<double>::quiet_NaN() : v.get<double>());
  }
  return out;
}

Json to_json(const Measured& m) {
  return {{"value", m.value}, {"low", m.low}, {"high", m.high}};
}
Measured measured(const Json& j) {
  return {j.at("value"), j.at("low"), j.at("high")};
}

Json to_json(const AccuracySummary& a) {
  return {{"correct", a.correct},
          {"total", a.total},
          {"value", a.accuracy.value},
          {"low", a.accuracy.low},
          {"high", a.accuracy.high}};
}
AccuracySummary accuracy(const Json& j) {
  return {j.at("correct"), j.at("total"), measured(j)};
}

Json to_json(const ModelSummary& m) {
  Json speed = Json::array();
  for (const SpeedSummary& s : m.speed) {
    speed.push_back({{"context", s.context},
                     {"batch", s.batch},
                     {"prefill_tokens_per_second", to_json(s.prefill)},
                     {"decode_tokens_per_second", to_json(s.decode)}});
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
          {"held_out",
           {{"reverse_kl", m.reverse_kl},
            {"reverse_kl_converted", m.reverse_kl_converted},
            {"selection_reverse_kl", m.selection_reverse_kl},
            {"nll", m.nll},
            {"agreement", m.agreement}}},
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

ModelSummary model(const Json& j) {
  ModelSummary m;
  m.name = j.at("name");
  m.dir = j.at("dir");
  m.converted = j.at("layers_converted");
  m.map = j.at("layer_map");
  m.mixers = j.at("mixers").get<std::map<std::string, int64_t>>();
  m.parameters = j.at("parameters");
  m.tokens_trained = j.at("tokens_trained");
  m.tokens_learned = j.value("tokens_learned", int64_t{0});
  m.next_sample = j.value("next_sample", uint64_t{0});
  m.from = j.value("from", "");
  m.checksums = j.value("checksums", "");
  m.seconds = j.at("seconds");
  m.accuracy = accuracy(j.at("accuracy"));
  m.retrieval = accuracy(j.at("retrieval"));
  m.reverse_kl = j.at("held_out").at("reverse_kl");
  m.reverse_kl_converted = j.at("held_out").at("reverse_kl_converted");
  m.selection_reverse_kl = j.at("held_out").value("selection_reverse_kl", 0.0);
  m.nll = j.at("held_out").at("nll");
  m.agreement = j.at("held_out").at("agreement");
  for (const Json& s : j.at("speed")) {
    m.speed.push_back({s.at("context"), s.at("batch"), measured(s.at("prefill_tokens_per_second")),
                       measured(s.at("decode_tokens_per_second"))});
  }
  m.cache_bytes_per_token = j.at("cache_bytes_per_token");
  m.state_bytes_per_sequence = j.at("state_bytes_per_sequence");
  m.gate = {j.at("gate").at("passed"), j.at("gate").at("attempts"), j.at("gate").at("reason"),
            j.at("gate").value("kept", int64_t{0})};
  m.shipped = j.at("shipped");
  return m;
}

}  // namespace

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
  try {
    const Json json = Json::parse(text);
    RunSummary s;
    s.name = json.at("name");
    s.date = json.at("date");
    s.machine = json.at("machine");
    s.command = json.at("command");
    s.task = json.at("task");
    s.seconds = json.at("seconds");
    s.plan = json.at("plan");
    for (const Json& m : json.at("models")) {
      s.models.push_back(model(m));
    }
    for (const Json& i : json.at("importance")) {
      s.importance.push_back({i.at("stage"), i.at("method"), i.at("metric"),
                              read_numbers(i.at("scores")),
                              i.at("converted").get<std::vector<bool>>(), i.value("data", "")});
    }
    for (const Json& c : json.at("curves")) {
      s.curves.push_back({c.at("stage"), c.at("phase"), read_numbers(c.at("tokens")),
                          read_numbers(c.at("loss")), read_numbers(c.at("reverse_kl"))});
    }
    return s;
  } catch (const nlohmann::json::exception& e) {
    fail("{}: expected the summary of a run that `cambium hybridize` writes: {}", where, e.what());
  }
}

}  // namespace cambium
