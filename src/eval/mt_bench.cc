#include "eval/mt_bench.h"

#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <thread>

#include "base/error.h"
#include "base/json.h"
#include "base/json_lines.h"
#include "base/progress.h"
#include "base/signals.h"
#include "base/text.h"
#include "eval/http_post.h"
#include "eval/statistics.h"
#include "eval/text_edit.h"

namespace cambium {
namespace {

using Json = nlohmann::ordered_json;

std::string text_at(const Json& line, const char* key) {
  const auto at = line.is_object() ? line.find(key) : line.end();
  expect(line.is_object() && at != line.end() && at->is_string(), "expected text in field '{}'",
         key);
  return at->get<std::string>();
}

int64_t id_of(const Json& line) {
  const auto at = line.is_object() ? line.find("question_id") : line.end();
  expect(line.is_object() && at != line.end() && at->is_number_integer(),
         "expected a number in field 'question_id'");
  return at->get<int64_t>();
}

std::vector<std::string> two_turns(const Json& line) {
  const auto at = line.is_object() ? line.find("turns") : line.end();
  expect(line.is_object() && at != line.end() && at->is_array() && at->size() == 2 &&
             at->at(0).is_string() && at->at(1).is_string(),
         "expected 'turns', a list of two texts");
  return at->get<std::vector<std::string>>();
}

/// The names in braces replaced in one pass: a question that holds "{answer}" stays as it is.
std::string filled(std::string_view words, const std::map<std::string, std::string>& values) {
  std::string out;
  while (!words.empty()) {
    const size_t open = words.find('{');
    const size_t close = open == std::string_view::npos ? open : words.find('}', open);
    if (close == std::string_view::npos) {
      return out.append(words);
    }
    const auto value = values.find(std::string(words.substr(open + 1, close - open - 1)));
    if (value == values.end()) {
      out.append(words.substr(0, open + 1));
      words.remove_prefix(open + 1);
    } else {
      out.append(words.substr(0, open)).append(value->second);
      words.remove_prefix(close + 1);
    }
  }
  return out;
}

/// The answer in a chat completion.
std::string content_of(const HttpReply& reply, const std::string& url) {
  const Json json = try_json<Json>(reply.body);
  expect(reply.status != 401 && reply.status != 403,
         "{}: expected to be let in, got status {}: {}; the server's key is read from "
         "CAMBIUM_JUDGE_KEY",
         url, reply.status, shortened(reply.body));
  const nlohmann::ordered_json::json_pointer at("/choices/0/message/content");
  expect(json.is_object() && json.contains(at) && json.at(at).is_string(),
         "{}: expected a chat completion with choices[0].message.content, got status {}: {}", url,
         reply.status, shortened(reply.body));
  return json.at(at).get<std::string>();
}

}  // namespace

MtBench load_mt_bench(const std::string& folder, int64_t limit) {
  MtBench bench;
  const std::filesystem::path path(folder);
  each_json_line(path / "question.jsonl", [&](const Json& line, int64_t /*number*/) {
    if (limit == 0 || std::ssize(bench.questions) < limit) {
      bench.questions.push_back({id_of(line), text_at(line, "category"), two_turns(line), {}});
    }
  });
  expect(!bench.questions.empty(), "{}/question.jsonl has no questions", folder);
  each_json_line(path / "judge_prompts.jsonl", [&](const Json& line, int64_t /*number*/) {
    JudgePrompt& prompt = bench.prompts[text_at(line, "name")];
    prompt = {text_at(line, "system_prompt"), text_at(line, "prompt_template")};
  });
  for (const char* name :
       {"single-v1", "single-v1-multi-turn", "single-math-v1", "single-math-v1-multi-turn"}) {
    expect(bench.prompts.contains(name), "{}/judge_prompts.jsonl: expected a prompt '{}'", folder,
           name);
  }
  if (std::filesystem::exists(path / "reference_gpt4.jsonl")) {
    each_json_line(path / "reference_gpt4.jsonl", [&](const Json& line, int64_t /*number*/) {
      const int64_t id = id_of(line);
      const auto choices = line.find("choices");
      expect(choices != line.end() && choices->is_array() && !choices->empty(),
             "expected 'choices', a list with the reference's turns");
      for (MtQuestion& question : bench.questions) {
        if (question.id == id) {
          question.references = two_turns(choices->front());
        }
      }
    });
  }
  return bench;
}

double mt_temperature(const std::string& category) {
  for (const char* exact : {"extraction", "math", "coding", "reasoning"}) {
    if (category == exact) {
      return 0.0;
    }
  }
  return category == "stem" || category == "humanities" ? 0.1 : 0.7;
}

Asker ask_model(Model& model, const Tokenizer& tokenizer, const EngineConfig& engine_config,
                int64_t max_new_tokens, uint64_t seed) {
  return [&model, &tokenizer, engine_config, max_new_tokens,
          seed](const std::vector<MtConversation>& conversations) {
    Engine engine(model, engine_config);
    std::vector<int32_t> stops = tokenizer.eos_ids();
    for (const int64_t id : model.spec().eos_ids) {
      stops.push_back(static_cast<int32_t>(id));
    }
    std::vector<Engine::Ticket> tickets;
    for (size_t i = 0; i < conversations.size(); ++i) {
      GenerationRequest request;
      request.prompt =
          tokenizer.encode(tokenizer.apply_chat_template(conversations[i].messages), false);
      request.max_new_tokens = max_new_tokens;
      request.stop_ids = stops;
      request.sampling.temperature = static_cast<float>(conversations[i].temperature);
      request.seed = seed;
      request.stream = i;
      tickets.push_back(engine.submit(std::move(request)));
    }
    while (engine.step()) {
      stop_point();
    }
    std::vector<std::string> out;
    for (const Engine::Ticket ticket : tickets) {
      out.push_back(tokenizer.decode(engine.take(ticket).tokens, true));
    }
    return out;
  };
}

Asker ask_address(const std::string& url, const std::string& name, const std::string& key,
                  int64_t max_new_tokens, double seconds) {
  const HttpAddress address = parse_chat_address(url);
  if (!key.empty() && !address.tls && !address.local()) {
    note("{}: without TLS the key in CAMBIUM_JUDGE_KEY can be read on the way; ask by https://",
         url);
  }
  return [=](const std::vector<MtConversation>& conversations) {
    constexpr int kAttempts = 3;
    std::vector<std::string> out;
    for (const MtConversation& conversation : conversations) {
      Json messages = Json::array();
      for (const ChatMessage& message : conversation.messages) {
        messages.push_back({{"role", message.role}, {"content", message.content}});
      }
      const std::string body = Json({{"model", name},
                                     {"messages", messages},
                                     {"temperature", conversation.temperature},
                                     {"max_tokens", max_new_tokens}})
                                   .dump(-1, ' ', false, Json::error_handler_t::replace);
      for (int attempt = 1;; ++attempt) {
        stop_point();
        HttpReply reply;
        try {
          reply = http_post(address, body, key, seconds);
        } catch (const Error&) {
          if (attempt == kAttempts) {
            throw;
          }
        }
        const bool passing = reply.status == 0 || reply.status == 429 || reply.status >= 500;
        if (!passing || attempt == kAttempts) {
          out.push_back(content_of(reply, url));
          break;
        }
        std::this_thread::sleep_for(std::chrono::milliseconds(200 * attempt * attempt));
      }
    }
    return out;
  };
}

std::string without_thoughts(const std::string& answer) {
  constexpr std::string_view kEnd = "</think>";
  const size_t end = answer.rfind(kEnd);
  return std::string(trim(end == std::string::npos ? std::string_view(answer)
                                                   : std::string_view(answer).substr(end + 8)));
}

double rating_of(const std::string& judgement) {
  for (const auto& [open, close] : {std::pair{"[[", "]]"}, std::pair{"[", "]"}}) {
    const std::string_view begin = open;
    for (size_t at = judgement.find(begin); at != std::string::npos;
         at = judgement.find(begin, at + 1)) {
      const size_t from = at + begin.size();
      const size_t end = judgement.find(close, from);
      const std::string number =
          end == std::string::npos ? std::string() : judgement.substr(from, end - from);
      const bool plain = !number.empty() && number.size() <= 5 && is_digit(number[0]) &&
                         number.find_first_not_of("0123456789.") == std::string::npos;
      const double rating = plain ? std::atof(number.c_str()) : 0.0;
      if (rating >= 1 && rating <= 10) {
        return rating;
      }
    }
  }
  return 0.0;
}

MtConversation judge_conversation(const MtBench& bench, const MtQuestion& question,
                                  const std::vector<std::string>& answers, size_t turn) {
  const std::string name =
      std::string(question.references.empty() ? "single-v1" : "single-math-v1") +
      (turn == 0 ? "" : "-multi-turn");
  std::map<std::string, std::string> values = {{"question", question.turns[0]},
                                               {"answer", answers[0]},
                                               {"question_1", question.turns[0]},
                                               {"answer_1", answers[0]},
                                               {"question_2", question.turns[1]}};
  if (turn > 0) {
    values["answer_2"] = answers[1];
  }
  for (size_t r = 0; r < question.references.size(); ++r) {
    values["ref_answer_" + std::to_string(r + 1)] = question.references[r];
  }
  const JudgePrompt& prompt = bench.prompts.at(name);
  MtConversation out;
  if (!prompt.system.empty()) {
    out.messages.push_back({"system", prompt.system});
  }
  out.messages.push_back({"user", filled(prompt.words, values)});
  return out;
}

void summarise_ratings(MtResult& result) {
  std::map<int64_t, std::pair<double, double>> questions;  // sum and number of ratings
  std::map<std::string, std::pair<double, double>> categories;
  double sums[2] = {0, 0};
  double counts[2] = {0, 0};
  for (const MtAnswer& answer : result.answers) {
    if (answer.rating == 0) {
      ++result.unrated;
      continue;
    }
    for (auto* sum : {&questions[answer.id], &categories[answer.category]}) {
      sum->first += answer.rating;
      sum->second += 1;
    }
    sums[answer.turn] += answer.rating;
    counts[answer.turn] += 1;
  }
  for (const size_t turn : {0, 1}) {
    result.turns[turn] = counts[turn] > 0 ? sums[turn] / counts[turn] : 0.0;
  }
  for (const auto& [name, sum] : categories) {
    result.categories[name] = sum.first / sum.second;
  }
  std::vector<double> values;
  std::vector<double> weights;
  for (const auto& [id, sum] : questions) {
    values.push_back(sum.first);
    weights.push_back(sum.second);
  }
  if (!values.empty()) {
    const Estimate score = bootstrap_ratio(values, weights, 1);
    result.score = {score.value, score.interval.low, score.interval.high};
  }
}

std::vector<MtAnswer> answer_mt_bench(const MtBench& bench, const Asker& model) {
  std::vector<MtAnswer> answers;
  std::vector<MtConversation> open;
  for (const MtQuestion& question : bench.questions) {
    open.push_back({{}, mt_temperature(question.category)});
    for (size_t turn = 0; turn < 2; ++turn) {
      answers.push_back({question.id, question.category, turn, question.turns[turn], ""});
    }
  }
  for (size_t turn = 0; turn < 2; ++turn) {
    for (size_t i = 0; i < open.size(); ++i) {
      open[i].messages.push_back({"user", bench.questions[i].turns[turn]});
    }
    const std::vector<std::string> said = model(open);
    for (size_t i = 0; i < open.size(); ++i) {
      std::string& response = answers[2 * i + turn].response;
      response = without_thoughts(said[i]);
      open[i].messages.push_back({"assistant", response});
    }
  }
  return answers;
}

MtResult judge_mt_bench(const MtBench& bench, std::vector<MtAnswer> answers, const Asker& judge) {
  CAMBIUM_CHECK(answers.size() == 2 * bench.questions.size());
  std::vector<MtConversation> judged;
  for (size_t i = 0; i < bench.questions.size(); ++i) {
    const std::vector<std::string> said = {answers[2 * i].response, answers[2 * i + 1].response};
    for (size_t turn = 0; turn < 2; ++turn) {
      judged.push_back(judge_conversation(bench, bench.questions[i], said, turn));
    }
  }
  const std::vector<std::string> judgements = judge(judged);
  CAMBIUM_CHECK(judgements.size() == answers.size());
  MtResult result;
  result.answers = std::move(answers);
  for (size_t i = 0; i < judgements.size(); ++i) {
    result.answers[i].judgement = judgements[i];
    result.answers[i].rating = rating_of(without_thoughts(judgements[i]));
  }
  summarise_ratings(result);
  return result;
}

std::string mt_bench_lines(const std::vector<MtAnswer>& answers) {
  std::string lines;
  for (const MtAnswer& answer : answers) {
    Json line = {{"question_id", answer.id},
                 {"category", answer.category},
                 {"turn", answer.turn + 1},
                 {"question", answer.question},
                 {"response", answer.response}};
    if (!answer.judgement.empty()) {
      line["judgement"] = answer.judgement;
      line["rating"] = answer.rating;
    }
    lines += line.dump(-1, ' ', false, Json::error_handler_t::replace) + "\n";
  }
  return lines;
}

std::vector<MtAnswer> read_mt_answers(const std::string& path, const MtBench& bench) {
  std::map<std::pair<int64_t, size_t>, std::string> responses;
  each_json_line(path, [&](const Json& line, int64_t /*number*/) {
    const int64_t id = id_of(line);
    const auto turn = line.find("turn");
    expect(turn != line.end() && turn->is_number_integer() && (*turn == 1 || *turn == 2),
           "expected 1 or 2 in field 'turn'");
    const auto index = turn->get<size_t>() - 1;
    expect(responses.emplace(std::pair(id, index), text_at(line, "response")).second,
           "expected one answer to turn {} of question {}, got a second", index + 1, id);
  });
  std::vector<MtAnswer> answers;
  for (const MtQuestion& question : bench.questions) {
    for (size_t turn = 0; turn < 2; ++turn) {
      const auto found = responses.find({question.id, turn});
      expect(found != responses.end(),
             "{}: expected an answer to turn {} of question {}, got none; answer it first, or ask "
             "of fewer questions with --count",
             path, turn + 1, question.id);
      answers.push_back(
          {question.id, question.category, turn, question.turns[turn], found->second});
    }
  }
  return answers;
}

}  // namespace cambium
