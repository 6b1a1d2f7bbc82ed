// MT-Bench (Zheng et al., "Judging LLM-as-a-judge", 2023): questions of two turns, each answer
// rated 1 to 10 by a judge. The questions, the judge's prompts and the reference answers are
// FastChat's files, given by the user.
#pragma once

#include <functional>
#include <map>
#include <string>
#include <vector>

#include "eval/report/summary.h"
#include "model/model.h"
#include "serve/engine.h"
#include "text/tokenizer.h"

namespace cambium {

struct MtQuestion {
  int64_t id = 0;
  std::string category;
  std::vector<std::string> turns;       // two
  std::vector<std::string> references;  // two where there are any (math, reasoning, coding)
};

struct JudgePrompt {
  std::string system;
  std::string words;  // with {question}, {answer}, ...
};

struct MtBench {
  std::vector<MtQuestion> questions;
  std::map<std::string, JudgePrompt>
      prompts;  // single-v1, single-v1-multi-turn, single-math-v1, ...
};

/// FOLDER/question.jsonl, judge_prompts.jsonl and, where present, reference_gpt4.jsonl. Error
/// naming file and line for what is missing.
MtBench load_mt_bench(const std::string& folder, int64_t limit);

/// What FastChat answers a category's questions at: 0.7 for writing and roleplay, 0 for extraction,
/// math, coding and reasoning, 0.1 for stem and humanities, else 0.7.
double mt_temperature(const std::string& category);

/// One conversation whose last message wants an answer.
struct MtConversation {
  std::vector<ChatMessage> messages;
  double temperature = 0.0;
};
/// Answers to all, in their order.
using Asker = std::function<std::vector<std::string>(const std::vector<MtConversation>&)>;

/// A model here, through its chat template. Model and tokenizer must outlive it.
Asker ask_model(Model& model, const Tokenizer& tokenizer, const EngineConfig& engine,
                int64_t max_new_tokens, uint64_t seed);
/// One behind an OpenAI-compatible address. What fails for a moment (no connection, 429, 5xx) is
/// asked three times; then, or where the reply has no answer, an Error.
Asker ask_address(const std::string& url, const std::string& name, const std::string& key,
                  int64_t max_new_tokens, double seconds);

/// An answer without what a reasoner thought before it: from the last "</think>" on.
std::string without_thoughts(const std::string& answer);
/// The number in "[[7]]" or "[[7.5]]", else in "[7]", between 1 and 10; 0 where there is none.
double rating_of(const std::string& judgement);

/// What the judge reads on the turn (0 or 1); single answer grading.
MtConversation judge_conversation(const MtBench& bench, const MtQuestion& question,
                                  const std::vector<std::string>& answers, size_t turn);

struct MtAnswer {
  int64_t id = 0;
  std::string category;
  size_t turn = 0;
  std::string question, response;
  std::string judgement{};  // empty = not judged yet
  double rating = 0.0;      // 0 = the judge gave none
};
struct MtResult {
  std::vector<MtAnswer> answers;
  Measured score;            // of rated turns, bootstrap over questions
  double turns[2] = {0, 0};  // mean of each
  std::map<std::string, double> categories;
  int64_t unrated = 0;
};

/// Both turns of every question, in their order, not judged.
std::vector<MtAnswer> answer_mt_bench(const MtBench& bench, const Asker& model);
/// `answers` are those of answer_mt_bench, or of a file.
MtResult judge_mt_bench(const MtBench& bench, std::vector<MtAnswer> answers, const Asker& judge);

/// A file of answers, a line a turn, judged or not; and back. Error that names the file where it
/// lacks a turn of the bench's questions; what it has of others is not read.
std::string mt_bench_lines(const std::vector<MtAnswer>& answers);
std::vector<MtAnswer> read_mt_answers(const std::string& path, const MtBench& bench);

/// Means of ratings; unrated answers do not count and are told.
void summarise_ratings(MtResult& result);

}  // namespace cambium
