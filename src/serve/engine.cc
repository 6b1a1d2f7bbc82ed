#include "serve/engine.h"

#include <algorithm>
#include <chrono>

#include "base/random.h"
#include "ops/recurrence/recurrence.h"
#include "serve/seen_tokens.h"
#include "tensor/copy.h"

namespace cambium {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_between(Clock::time_point from, Clock::time_point to) {
  return std::chrono::duration<double>(to - from).count();
}

}  // namespace

EngineConfig completed(EngineConfig config, Device device) {
  if (config.prefill_chunk == 0) {
    config.prefill_chunk = device.kind == Device::kCpu ? 256 : 2048;
  }
  if (config.prefill_tokens == 0) {
    config.prefill_tokens = 4 * config.prefill_chunk;
  }
  return config;
}

CacheConfig cache_config(const EngineConfig& config) {
  expect(config.prefill_chunk > 0 && config.prefill_chunk % kRecurrenceChunk == 0,
         "[engine] expected prefill_chunk to be a multiple of {} tokens, got {}", kRecurrenceChunk,
         config.prefill_chunk);
  expect(config.reserve_tokens >= 0, "[engine] expected reserve_tokens of at least 0, got {}",
         config.reserve_tokens);
  expect(config.prefill_tokens >= config.prefill_chunk,
         "[engine] expected prefill_tokens of at least prefill_chunk={}, got {}",
         config.prefill_chunk, config.prefill_tokens);
  return {.max_sequences = config.max_sequences,
          .page_size = config.page_size,
          .memory_bytes = config.memory_bytes,
          .max_tokens = config.max_tokens,
          .piece_tokens = config.prefill_chunk,
          .values = config.cache_values,
          .reserve = config.reserve};
}

const char* finish_reason_name(FinishReason reason) {
  switch (reason) {
    case FinishReason::kStop:
      return "stop";
    case FinishReason::kLength:
      return "length";
    case FinishReason::kCancelled:
      return "cancelled";
  }
  return "";
}

struct Engine::Job {
  Ticket ticket = 0;
  GenerationRequest request;
  GenerationResult result;
  SeenTokens seen;                     // where the request penalises
  std::vector<RankedToken> likeliest;  // of the token that is chosen next
  int64_t slot = -1;
  int64_t room = 0;      // tokens that memory is set aside for
  int64_t fed = 0;       // tokens that went through the model
  int64_t last_row = 0;  // of this step's batch
  bool done = false;
  Clock::time_point submitted, admitted, first_token;

  int64_t prompt() const { return static_cast<int64_t>(request.prompt.size()); }
  /// Tokens there are, of prompt and answer.
  int64_t tokens() const { return prompt() + static_cast<int64_t>(result.tokens.size()); }
  /// Most tokens that go through the model: the last one generated does not.
  int64_t most() const { return prompt() + std::max<int64_t>(request.max_new_tokens - 1, 0); }
};

Engine::Engine(Model& model, const EngineConfig& config)
    : model_(model),
      config_(completed(config, model.device())),
      cache_(model, cache_config(config_)),
      workspace_(model.device()) {
  if (config_.reserve) {
    workspace_.reserve(config_.workspace);
  }
}

Engine::~Engine() = default;

Engine::Ticket Engine::submit(GenerationRequest request) {
  expect(!request.prompt.empty(), "[engine] expected a prompt of at least one token");
  expect(request.max_new_tokens > 0, "[engine] expected max_new_tokens above 0, got {}",
         request.max_new_tokens);
  check_sampling(request.sampling);
  const int64_t vocab = model_.spec().vocab;
  expect(request.logprobs >= 0 && request.logprobs <= kMostRanked,
         "[engine] expected logprobs from 0 to {}, got {}", kMostRanked, request.logprobs);
  request.logprobs = std::min(request.logprobs, vocab);
  for (const int32_t token : request.prompt) {
    expect(token >= 0 && token < vocab,
           "[engine] token {} of the prompt is outside the model's vocabulary of {}", token, vocab);
  }
  auto job = std::make_unique<Job>();
  job->request = std::move(request);
  job->ticket = next_ticket_;
  job->result.prompt_tokens = job->prompt();
  job->submitted = Clock::now();
  if (job->request.sampling.penalises()) {
    for (const int32_t token : job->request.prompt) {
      job->seen.add(token, false);
    }
  }
  // An answer ends where the model's positions do.
  int64_t& most_new = job->request.max_new_tokens;
  most_new = std::min(most_new, cache_.plan().config().max_tokens - job->prompt() + 1);
  expect(most_new > 0, "[engine] a prompt of {} tokens can never fit: the model has {} positions",
         job->prompt(), cache_.plan().config().max_tokens);
  cache_.expect_fits(job->most());
  waiting_.push_back(std::move(job));
  return next_ticket_++;
}

// In order of arrival: a request that needs more room than there is holds back those behind it, or
// it could wait for ever.
void Engine::admit() {
  while (!waiting_.empty()) {
    Job& job = *waiting_.front();
    job.room = config_.admission == Admission::kWhole
                   ? job.most()
                   : std::min(job.most(), job.tokens() + config_.reserve_tokens);
    job.slot = cache_.open(job.room);
    if (job.slot < 0) {
      return;
    }
    if (job.result.preemptions == 0) {
      job.admitted = Clock::now();
      job.result.queue_seconds = seconds_between(job.submitted, job.admitted);
    }
    running_.push_back(std::move(waiting_.front()));
    waiting_.pop_front();
  }
}

// The oldest first: each running request has room for what it feeds next, and where there is more,
// for a reserve. The requests that run are in the order they came, and so are those that wait,
// after them; the oldest is never sent back while there are others, so every request ends.
void Engine::make_room() {
  for (size_t i = 0; i < running_.size(); ++i) {
    Job& job = *running_[i];
    if (job.tokens() <= job.room) {
      continue;
    }
    int64_t room = std::min(job.most(), job.tokens() + config_.reserve_tokens);
    while (!cache_.extend(job.slot, room)) {
      if (room > job.tokens()) {
        room = job.tokens();
        continue;
      }
      preempt_youngest();
      if (i == running_.size()) {
        return;  // it was the youngest itself
      }
    }
    job.room = room;
  }
}

void Engine::preempt_youngest() {
  CAMBIUM_CHECK(running_.size() > 1, "a request alone has all memory");
  Job& job = *running_.back();
  cache_.close(job.slot);
  job.slot = -1;
  ++job.result.preemptions;
  job.result.recomputed_tokens += job.fed;
  job.fed = 0;
  waiting_.push_front(std::move(running_.back()));
  running_.pop_back();
}

// The tokens that a request feeds next: a piece of its prompt, or its newest token. After an
// interruption, a piece of the answer that it has, cut as prompts are.
std::span<const int32_t> Engine::next_piece(const Job& job) const {
  const bool prompt = job.fed < job.prompt();
  const int64_t grid = (job.fed / config_.prefill_chunk + 1) * config_.prefill_chunk;
  const int64_t end = prompt                  ? std::min(grid, job.prompt())
                      : config_.deterministic ? job.fed + 1
                                              : std::min(grid, job.tokens());
  return std::span(prompt ? job.request.prompt : job.result.tokens)
      .subspan(static_cast<size_t>(prompt ? job.fed : job.fed - job.prompt()),
               static_cast<size_t>(end - job.fed));
}

void Engine::plan_step() {
  batch_.clear();
  ready_.clear();
  int64_t read = 0;
  for (const auto& job : running_) {
    const std::span<const int32_t> piece = next_piece(*job);
    const auto length = static_cast<int64_t>(piece.size());
    if (job->fed < job->prompt() || length > 1) {
      if (read + length > config_.prefill_tokens) {
        continue;
      }
      read += length;
    }
    batch_.add(piece, job->fed, job->slot, job->prompt());
    job->fed += length;
    if (job->fed == job->tokens()) {
      job->last_row = batch_.size() - 1;
      ready_.push_back(job.get());
    }
  }
}

bool Engine::step() {
  make_room();
  admit();
  if (running_.empty()) {
    return false;
  }
  plan_step();
  const WorkspaceScope scope(workspace_);
  Context ctx = context_for(model_, workspace_);
  ctx.batch_invariant = config_.deterministic;
  ForwardOptions options;
  options.states = cache_.prepare(batch_);
  choose_tokens(model_.forward(ctx, batch_, options));
  const auto done = std::stable_partition(running_.begin(), running_.end(),
                                          [](const auto& job) { return !job->done; });
  std::move(done, running_.end(), std::back_inserter(finished_));
  running_.erase(done, running_.end());
  return true;
}

void Engine::choose_tokens(const Tensor& hidden) {
  const auto count = static_cast<int64_t>(ready_.size());
  if (count == 0) {
    return;
  }
  Context ctx = context_for(model_, workspace_);
  ctx.batch_invariant = config_.deterministic;
  std::vector<int64_t> last(ready_.size());
  std::vector<SamplingConfig> configs;
  std::vector<double> uniforms;
  for (size_t i = 0; i < ready_.size(); ++i) {
    last[i] = ready_[i]->last_row;
    const GenerationRequest& request = ready_[i]->request;
    configs.push_back(request.sampling);
    uniforms.push_back(
        Rng(request.seed, mix_seed(request.stream, static_cast<uint64_t>(ready_[i]->fed)))
            .uniform());
  }
  const Tensor rows = ctx.arena->empty(hidden.dtype, {count, hidden.dim(1)});  // (R, C)
  gather_rows(rows, hidden, last);
  const Tensor logits = model_.logits(ctx, rows);  // (R, V)
  edit_logits(logits);
  std::vector<int32_t> tokens(ready_.size());
  std::vector<float> log_probabilities(ready_.size());
  sample_tokens(ctx, penalised(ctx, logits, configs), configs, uniforms, tokens, log_probabilities);
  rank(ctx, logits, tokens, log_probabilities);
  for (size_t i = 0; i < ready_.size(); ++i) {
    accept(*ready_[i], tokens[i], log_probabilities[i]);
  }
}

// Lets requests see and change their rows.
void Engine::edit_logits(const Tensor& logits) const {
  if (std::none_of(ready_.begin(), ready_.end(),
                   [](const Job* job) { return static_cast<bool>(job->request.on_logits); })) {
    return;
  }
  const auto vocab = static_cast<size_t>(logits.dim(1));
  std::vector<float> values = elements_of(logits);
  for (size_t i = 0; i < ready_.size(); ++i) {
    if (ready_[i]->request.on_logits) {
      ready_[i]->request.on_logits(std::span(values).subspan(i * vocab, vocab));
    }
  }
  copy(logits, Tensor::of(values.data(), {logits.dim(0), logits.dim(1)}));
}

// The logits that tokens are chosen from: a copy where a request penalises tokens it has had.
Tensor Engine::penalised(const Context& ctx, const Tensor& logits,
                         std::span<const SamplingConfig> configs) const {
  if (std::none_of(configs.begin(), configs.end(),
                   [](const SamplingConfig& config) { return config.penalises(); })) {
    return logits;
  }
  std::vector<std::span<const SeenToken>> seen;
  for (const Job* job : ready_) {
    seen.push_back(job->seen.tokens());
  }
  const Tensor lowered = ctx.arena->empty(logits.dtype, {logits.dim(0), logits.dim(1)});
  copy(lowered, logits);
  penalise_tokens(ctx, lowered, configs, seen);
  return lowered;
}

// Log-probabilities of requests that want the likeliest tokens, or whose choice was from penalised
// logits: of the model's own logits.
void Engine::rank(const Context& ctx, const Tensor& logits, std::span<const int32_t> tokens,
                  std::span<float> log_probabilities) {
  std::vector<int32_t> wanted;
  int32_t most = 0;
  for (const Job* job : ready_) {
    const auto logprobs = static_cast<int32_t>(job->request.logprobs);
    wanted.push_back(logprobs == 0 && !job->request.sampling.penalises() ? -1 : logprobs);
    most = std::max(most, logprobs);
  }
  const auto width = static_cast<size_t>(most);
  std::vector<RankedToken> likeliest(ready_.size() * width);
  rank_tokens(ctx, logits, tokens, wanted, log_probabilities, likeliest);
  for (size_t i = 0; i < ready_.size(); ++i) {
    const auto first = likeliest.begin() + static_cast<ptrdiff_t>(i * width);
    ready_[i]->likeliest.assign(first, first + ready_[i]->request.logprobs);
  }
}

void Engine::accept(Job& job, int32_t token, float log_probability) {
  if (job.result.tokens.empty()) {
    job.first_token = Clock::now();
    job.result.prefill_seconds = seconds_between(job.admitted, job.first_token);
  }
  const auto& stops = job.request.stop_ids;
  if (std::find(stops.begin(), stops.end(), token) != stops.end()) {
    finish(job, FinishReason::kStop);
    return;
  }
  job.result.tokens.push_back(token);
  job.result.log_probabilities.push_back(log_probability);
  job.result.likeliest.insert(job.result.likeliest.end(), job.likeliest.begin(),
                              job.likeliest.end());
  if (job.request.sampling.penalises()) {
    job.seen.add(token, true);
  }
  if (job.request.on_token && !job.request.on_token(token)) {
    finish(job, FinishReason::kCancelled);
  } else if (static_cast<int64_t>(job.result.tokens.size()) >= job.request.max_new_tokens) {
    finish(job, FinishReason::kLength);
  }
}

void Engine::finish(Job& job, FinishReason reason) {
  job.result.reason = reason;
  if (!job.result.tokens.empty()) {
    job.result.decode_seconds = seconds_between(job.first_token, Clock::now());
  }
  if (job.slot >= 0) {
    cache_.close(job.slot);
    job.slot = -1;
  }
  job.done = true;
}

void Engine::cancel(Ticket ticket) {
  const auto end = [&](auto& jobs) {
    const auto it = std::find_if(jobs.begin(), jobs.end(),
                                 [&](const auto& job) { return job->ticket == ticket; });
    if (it == jobs.end()) {
      return;
    }
    finish(**it, FinishReason::kCancelled);
    finished_.push_back(std::move(*it));
    jobs.erase(it);
  };
  end(waiting_);
  end(running_);
}

bool Engine::finished(Ticket ticket) const {
  return std::any_of(finished_.begin(), finished_.end(),
                     [&](const auto& job) { return job->ticket == ticket; });
}

GenerationResult Engine::take(Ticket ticket) {
  const auto it = std::find_if(finished_.begin(), finished_.end(),
                               [&](const auto& job) { return job->ticket == ticket; });
  CAMBIUM_CHECK(it != finished_.end(), "request {} is not finished", ticket);
  GenerationResult result = std::move((*it)->result);
  finished_.erase(it);
  return result;
}

std::vector<GenerationResult> Engine::generate(std::vector<GenerationRequest> requests) {
  std::vector<Ticket> tickets;
  for (GenerationRequest& request : requests) {
    tickets.push_back(submit(std::move(request)));
  }
  std::vector<GenerationResult> results;
  for (const Ticket ticket : tickets) {
    while (!finished(ticket)) {
      step();
    }
    results.push_back(take(ticket));
  }
  return results;
}

}  // namespace cambium
