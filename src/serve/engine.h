// Engine: text generation for many requests at once on one model. Requests wait in a queue; each
// step runs one forward call over the next token of every running sequence and the next pieces of
// prompts, and new requests join as others finish.
//
// What a request gets does not depend on what runs beside it: prompts are cut at multiples of
// prefill_chunk in absolute position, and random numbers come from (seed, request's stream,
// position). On the CPU that holds to the last bit; on a GPU it does where the engine is
// deterministic, while by default kernels are chosen by all rows of a step and may round logits
// differently.
//
// On a GPU the host works one step ahead of the device: the next step is queued before this one's
// tokens are known, which it finds on the device. A request that ends by its tokens has then been
// in one step too many, whose token nobody sees.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "ops/sampling/sampling.h"
#include "serve/cache.h"
#include "serve/step_queue.h"

namespace cambium {

/// When a waiting request begins.
enum class Admission : uint8_t {
  /// Once there is memory for its longest answer: then nothing interrupts it.
  kWhole,
  /// Once there is memory for its prompt and a reserve. Where memory runs out later, the youngest
  /// request gives its own back, waits at the front with the tokens it has, and what the cache held
  /// of them is computed again.
  kAsNeeded,
};

struct EngineConfig {
  int64_t max_sequences = 32;
  /// Of the cache; 0 = as much as max_sequences need, allocated as it is needed.
  int64_t memory_bytes = 0;
  /// Tokens of a page of the cache; 0 = by what a token takes (CacheConfig::page_size).
  int64_t page_size = 0;
  /// Longest sequence; 0 = the model's positions.
  int64_t max_tokens = 0;
  /// Keys and values of the cache: bf16, f32 or f8 (CacheConfig::values).
  Dtype cache_values = Dtype::kBF16;
  /// Tokens of a prompt in one call; a multiple of kRecurrenceChunk. 0 = 256, on a GPU 2,048.
  int64_t prefill_chunk = 0;
  /// Tokens of all prompts in one call, beside the decoding sequences; at least prefill_chunk. 0 =
  /// four times that.
  int64_t prefill_tokens = 0;
  /// kWhole never computes anything twice, and needs nothing said about rounding: keys and states
  /// of an answer that is read again come from the kernels of prompts, which round differently than
  /// those of single tokens.
  Admission admission = Admission::kWhole;
  /// kAsNeeded: tokens a request has room for beyond those there are.
  int64_t reserve_tokens = 64;
  /// Answers depend neither on what runs beside them nor on interruptions, to the last bit: the
  /// kernels of the CPU and the batch-invariant ones of a GPU (Context::batch_invariant) see to the
  /// one, and an answer that is read again is read token by token, as it was made.
  bool deterministic = false;
  /// On a GPU a step is queued before the tokens of the one before are known.
  bool ahead = true;
  /// Takes the cache whole and the workspace when the engine is made (serve/memory_plan.h works
  /// them out), so that a step allocates nothing.
  bool reserve = false;
  WorkspaceBytes workspace{};
};

/// The configuration with what it leaves to the device, and the cache that an engine has by it.
/// Error for a prefill that cannot be cut so.
EngineConfig completed(EngineConfig config, Device device);
CacheConfig cache_config(const EngineConfig& completed);

struct GenerationRequest {
  std::vector<int32_t> prompt;
  int64_t max_new_tokens = 256;  // fewer where the model's positions end
  /// Tokens that end the generation; the one that did is not part of the result.
  std::vector<int32_t> stop_ids{};
  SamplingConfig sampling{};
  /// Sampling draws from (seed, stream, position).
  uint64_t seed = 0;
  uint64_t stream = 0;
  /// Likeliest tokens that are wanted beside each chosen one, 0 to kMostRanked.
  int64_t logprobs = 0;
  /// Called with each token as it is chosen; false cancels. Callbacks must not throw.
  std::function<bool(int32_t token)> on_token{};
  /// Called with the logits (V) that the next token is chosen from, which it may change.
  std::function<void(std::span<float> logits)> on_logits{};
};

enum class FinishReason : uint8_t { kStop, kLength, kCancelled };
const char* finish_reason_name(FinishReason reason);

struct GenerationResult {
  std::vector<int32_t> tokens;
  /// Of each token, at temperature 1, before penalties and cuts.
  std::vector<float> log_probabilities;
  /// (tokens, the request's logprobs or the vocabulary): the likeliest first.
  std::vector<RankedToken> likeliest;
  FinishReason reason = FinishReason::kLength;
  int64_t prompt_tokens = 0;
  int64_t preemptions = 0;        // times it was sent back to wait
  int64_t recomputed_tokens = 0;  // of it that the model had seen by then
  double queue_seconds = 0.0;     // waiting for room
  double prefill_seconds = 0.0;   // from room to the first token
  double decode_seconds = 0.0;    // from the first token to the last
};

class Engine {
 public:
  using Ticket = int64_t;

  /// The model must have its weights and outlive the engine.
  explicit Engine(Model& model, const EngineConfig& config = {});
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  /// Queues a request. Error when it could never run: an empty prompt, a token outside the
  /// vocabulary, a prompt longer than the model's positions, more tokens than the cache holds,
  /// sampling settings outside their ranges.
  Ticket submit(GenerationRequest request);
  /// Queues one forward call and takes in the tokens of one: the same, or where it works ahead of
  /// the device the one before. false when there was neither.
  bool step();
  /// Ends a request, wherever it is, at once. Not from inside a callback: return false there.
  void cancel(Ticket ticket);
  /// Whether the request is finished, and its result, given once.
  bool finished(Ticket ticket) const;
  GenerationResult take(Ticket ticket);
  /// submit, step until done, take: results in the order of the requests.
  std::vector<GenerationResult> generate(std::vector<GenerationRequest> requests);

  int64_t waiting() const { return static_cast<int64_t>(waiting_.size()); }
  int64_t running() const { return static_cast<int64_t>(running_.size()); }
  Model& model() { return model_; }
  const Cache& cache() const { return cache_; }
  /// What the last step ran over, and how many rows of it gave a token.
  const Batch& batch() const { return batch_; }
  int64_t chosen() const { return chosen_; }
  /// The most that its steps had in use at once.
  WorkspaceBytes workspace_peak() const { return queue_.peak_bytes(); }
  /// How its steps were queued.
  WorkRecorder::Counts step_counts() const { return queue_.counts(); }

 private:
  struct Job;
  struct Flight;

  void admit();
  void make_room();
  void preempt_youngest();
  std::span<const int32_t> next_piece(const Job& job) const;
  bool may_go_ahead() const;
  void plan_step(Flight& flight);
  void queue_step(Flight& flight);
  void choose_tokens(Context& ctx, Flight& flight, const Tensor& hidden);
  void edit_logits(const Flight& flight, const Tensor& logits) const;
  Tensor penalised(const Context& ctx, const Flight& flight, const Tensor& logits) const;
  void rank(const Context& ctx, Flight& flight, const Tensor& logits);
  void take_in_oldest();
  void take_in_all();
  void accept(Job& job, int32_t token, float log_probability);
  void finish(Job& job, FinishReason reason);
  void sweep();

  Model& model_;
  EngineConfig config_;
  Cache cache_;
  StepQueue queue_;
  Batch batch_;
  std::deque<std::unique_ptr<Job>> waiting_;
  std::vector<std::unique_ptr<Job>> running_;
  std::vector<std::unique_ptr<Job>> finished_;
  int64_t chosen_ = 0;
  OwnedTensor newest_memory_;  // (2, slots): tokens, log-probabilities
  SampledTokens newest_;       // in it: of each slot
  std::array<Buffer, 2> fetched_;
  int64_t queued_ = 0;          // steps
  std::deque<Flight> flights_;  // at most two
  Ticket next_ticket_ = 0;
};

}  // namespace cambium
