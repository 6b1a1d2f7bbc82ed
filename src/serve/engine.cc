#include "serve/engine.h"

#include <algorithm>
#include <chrono>
#include <exception>

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
  int64_t expected = 0;  // tokens of steps whose tokens are not taken in yet
  bool done = false;
  Clock::time_point submitted, admitted, first_token;

  int64_t prompt() const { return static_cast<int64_t>(request.prompt.size()); }
  /// Tokens there are and the host knows, of prompt and answer.
  int64_t known() const { return prompt() + static_cast<int64_t>(result.tokens.size()); }
  int64_t tokens() const { return known() + expected; }
  /// Most tokens that go through the model: the last one generated does not.
  int64_t most() const { return prompt() + std::max<int64_t>(request.max_new_tokens - 1, 0); }
  /// Whether the host has to do with the logits that its tokens are chosen from.
  bool watches_logits() const {
    return request.on_logits || request.sampling.penalises() || request.logprobs > 0;
  }
};

// A step whose tokens are not taken in yet.
struct Engine::Flight {
  std::vector<Job*> jobs;  // each of a row that gives a token; null once it is of no use
  std::vector<int32_t> slots;
  std::vector<int64_t> rows;
  std::vector<SamplingConfig> configs;
  std::vector<double> uniforms;
  std::vector<float> log_probabilities;  // of watched logits
  bool repeats = false;                  // one token of each sequence, and nobody watches
  bool watched = false;                  // a job watches logits
  const Buffer* fetched = nullptr;       // what the step made of newest_
};

Engine::Engine(Model& model, const EngineConfig& config)
    : model_(model),
      config_(completed(config, model.device())),
      cache_(model, cache_config(config_)),
      queue_(model, cache_.table_entries(), config_.deterministic) {
  if (config_.reserve) {
    queue_.reserve(config_.workspace);
  }
  const int64_t slots = cache_.capacity();
  newest_memory_ = OwnedTensor(Dtype::kI32, {2, slots}, false, model.device());
  auto* tokens = newest_memory_.view.ptr<int32_t>();
  newest_ = {Tensor::of(Dtype::kI32, model.device(), {&slots, 1}, tokens),
             Tensor::of(Dtype::kF32, model.device(), {&slots, 1}, tokens + slots)};
  for (Buffer& buffer : fetched_) {
    buffer = Buffer::pinned(newest_memory_.view.bytes(), model.device());
  }
}

// The device may still be writing what is destroyed here. What went wrong there can be told no
// more.
Engine::~Engine() {
  try {
    queue_.wait(0);
  } catch (const std::exception&) {
    return;
  }
}

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
      if (!flights_.empty()) {
        // Some may have ended; and who is sent back knows all its tokens.
        take_in_all();
        sweep();
        return make_room();
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

// The tokens that a request feeds next, of those that the host knows: a piece of its prompt, or its
// newest token. After an interruption, a piece of the answer that it has, cut as prompts are.
std::span<const int32_t> Engine::next_piece(const Job& job) const {
  const bool prompt = job.fed < job.prompt();
  const int64_t grid = (job.fed / config_.prefill_chunk + 1) * config_.prefill_chunk;
  const int64_t end = prompt                  ? std::min(grid, job.prompt())
                      : config_.deterministic ? job.fed + 1
                                              : std::min(grid, job.known());
  return std::span(prompt ? job.request.prompt : job.result.tokens)
      .subspan(static_cast<size_t>(prompt ? job.fed : job.fed - job.prompt()),
               static_cast<size_t>(end - job.fed));
}

bool Engine::may_go_ahead() const {
  return config_.ahead && model_.device().kind == Device::kCuda &&
         std::none_of(running_.begin(), running_.end(),
                      [](const auto& job) { return job->watches_logits(); });
}

void Engine::plan_step(Flight& flight) {
  batch_.clear();
  int64_t read = 0;
  for (const auto& job : running_) {
    if (job->tokens() - job->prompt() >= job->request.max_new_tokens) {
      continue;  // its last token is on its way
    }
    const bool device_knows = job->fed == job->known();
    const int32_t reference = static_cast<int32_t>(-1 - job->slot);
    const std::span<const int32_t> piece =
        device_knows ? std::span(&reference, 1) : next_piece(*job);
    const auto length = static_cast<int64_t>(piece.size());
    if (job->fed < job->prompt() || length > 1) {
      if (read + length > config_.prefill_tokens) {
        continue;
      }
      read += length;
    }
    batch_.add(piece, job->fed, job->slot, job->prompt());
    job->fed += length;
    flight.watched = flight.watched || job->watches_logits();
    if (job->fed == job->tokens()) {
      ++job->expected;
      flight.jobs.push_back(job.get());
      flight.slots.push_back(static_cast<int32_t>(job->slot));
      flight.rows.push_back(batch_.size() - 1);
      flight.configs.push_back(job->request.sampling);
      flight.uniforms.push_back(
          Rng(job->request.seed, mix_seed(job->request.stream, static_cast<uint64_t>(job->fed)))
              .uniform());
    }
  }
  flight.repeats = !flight.watched && batch_.size() == batch_.segments().count() &&
                   batch_.size() == static_cast<int64_t>(flight.jobs.size());
  chosen_ = static_cast<int64_t>(flight.jobs.size());
}

bool Engine::step() {
  const bool ahead = may_go_ahead();
  if (!ahead) {
    take_in_all();
    sweep();
  }
  make_room();
  admit();
  if (running_.empty() && flights_.empty()) {
    return false;
  }
  Flight flight;
  plan_step(flight);
  if (batch_.size() > 0) {
    queue_step(flight);
  }
  // What was watched has tokens already.
  while (flights_.size() > (ahead && may_go_ahead() && batch_.size() > 0 ? 1U : 0U)) {
    take_in_oldest();
  }
  sweep();
  return true;
}

void Engine::queue_step(Flight& flight) {
  ForwardOptions options;
  options.states = cache_.prepare(batch_);
  options.newest = newest_.tokens;
  flight.fetched = &fetched_[static_cast<size_t>(queued_++ % 2)];
  queue_.run(
      batch_, flight.repeats,
      [&](Context& ctx) { choose_tokens(ctx, flight, model_.forward(ctx, batch_, options)); },
      flight.fetched->data(), newest_.tokens.data, newest_memory_.view.bytes());
  flights_.push_back(std::move(flight));
}

void Engine::choose_tokens(Context& ctx, Flight& flight, const Tensor& hidden) {
  if (flight.jobs.empty()) {
    return;
  }
  Tensor rows = hidden;  // (R, C)
  if (!flight.repeats) {
    rows =
        ctx.arena->empty(hidden.dtype, {static_cast<int64_t>(flight.rows.size()), hidden.dim(1)});
    gather_rows(rows, hidden, flight.rows);
  }
  const Tensor logits = model_.logits(ctx, rows);  // (R, V)
  if (!flight.watched) {
    return queue_samples(ctx, logits, flight.configs, flight.uniforms, flight.slots, newest_);
  }
  edit_logits(flight, logits);
  queue_samples(ctx, penalised(ctx, flight, logits), flight.configs, flight.uniforms, flight.slots,
                newest_);
  rank(ctx, flight, logits);
}

// Lets requests see and change their rows.
void Engine::edit_logits(const Flight& flight, const Tensor& logits) const {
  if (std::none_of(flight.jobs.begin(), flight.jobs.end(),
                   [](const Job* job) { return static_cast<bool>(job->request.on_logits); })) {
    return;
  }
  const auto vocab = static_cast<size_t>(logits.dim(1));
  std::vector<float> values = elements_of(logits);
  for (size_t i = 0; i < flight.jobs.size(); ++i) {
    if (flight.jobs[i]->request.on_logits) {
      flight.jobs[i]->request.on_logits(std::span(values).subspan(i * vocab, vocab));
    }
  }
  copy(logits, Tensor::of(values.data(), {logits.dim(0), logits.dim(1)}));
}

// The logits that tokens are chosen from: a copy where a request penalises tokens it has had.
Tensor Engine::penalised(const Context& ctx, const Flight& flight, const Tensor& logits) const {
  if (std::none_of(flight.configs.begin(), flight.configs.end(),
                   [](const SamplingConfig& config) { return config.penalises(); })) {
    return logits;
  }
  std::vector<std::span<const SeenToken>> seen;
  for (const Job* job : flight.jobs) {
    seen.push_back(job->seen.tokens());
  }
  const Tensor lowered = ctx.arena->empty(logits.dtype, {logits.dim(0), logits.dim(1)});
  copy(lowered, logits);
  penalise_tokens(ctx, lowered, flight.configs, seen);
  return lowered;
}

// Log-probabilities of requests that want the likeliest tokens, or whose choice was from penalised
// logits: of the model's own logits.
void Engine::rank(const Context& ctx, Flight& flight, const Tensor& logits) {
  std::vector<int32_t> wanted;
  int32_t most = 0;
  for (const Job* job : flight.jobs) {
    const auto logprobs = static_cast<int32_t>(job->request.logprobs);
    wanted.push_back(logprobs == 0 && !job->request.sampling.penalises() ? -1 : logprobs);
    most = std::max(most, logprobs);
  }
  const OwnedTensor tokens(Dtype::kI32, {cache_.capacity()});
  copy(tokens.view, newest_.tokens);
  const std::vector<float> of_slots = elements_of(newest_.log_probabilities);
  std::vector<int32_t> chosen;
  for (const int32_t slot : flight.slots) {
    chosen.push_back(tokens.view.ptr<int32_t>()[slot]);
    expect_chosen(chosen.back());
    flight.log_probabilities.push_back(of_slots[static_cast<size_t>(slot)]);
  }
  const auto width = static_cast<size_t>(most);
  std::vector<RankedToken> likeliest(flight.jobs.size() * width);
  rank_tokens(ctx, logits, chosen, wanted, flight.log_probabilities, likeliest);
  for (size_t i = 0; i < flight.jobs.size(); ++i) {
    const auto first = likeliest.begin() + static_cast<ptrdiff_t>(i * width);
    flight.jobs[i]->likeliest.assign(first, first + flight.jobs[i]->request.logprobs);
  }
}

void Engine::take_in_oldest() {
  const Flight flight = std::move(flights_.front());
  flights_.pop_front();
  queue_.wait(static_cast<int64_t>(flights_.size()));
  const bool cpu = model_.device().kind == Device::kCpu;
  const auto* tokens =
      static_cast<const int32_t*>(cpu ? newest_.tokens.data : flight.fetched->data());
  const auto* log_probabilities = reinterpret_cast<const float*>(tokens + cache_.capacity());
  for (size_t i = 0; i < flight.jobs.size(); ++i) {
    if (flight.jobs[i] != nullptr) {
      const auto slot = static_cast<size_t>(flight.slots[i]);
      accept(*flight.jobs[i], tokens[slot],
             flight.watched ? flight.log_probabilities[i] : log_probabilities[slot]);
    }
  }
}

void Engine::take_in_all() {
  while (!flights_.empty()) {
    take_in_oldest();
  }
}

// Moves what is done out of the way.
void Engine::sweep() {
  const auto done = std::stable_partition(running_.begin(), running_.end(),
                                          [](const auto& job) { return !job->done; });
  std::move(done, running_.end(), std::back_inserter(finished_));
  running_.erase(done, running_.end());
}

void Engine::accept(Job& job, int32_t token, float log_probability) {
  --job.expected;
  expect_chosen(token);
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
  for (Flight& flight : flights_) {
    std::replace(flight.jobs.begin(), flight.jobs.end(), &job, static_cast<Job*>(nullptr));
  }
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
