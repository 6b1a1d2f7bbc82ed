#include "hybrid/on_policy.h"

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>

#include "base/file.h"
#include "base/json.h"
#include "base/json_fields.h"
#include "base/progress.h"
#include "base/random.h"
#include "hybrid/sealed.h"
#include "model/supernet.h"
#include "serve/engine.h"

namespace cambium {
namespace {

constexpr int64_t kMaxCount = 1'000'000;
constexpr int64_t kMaxNewTokens = int64_t{1} << 24;

std::vector<int32_t> prompt_of(const DocumentSource& prompts, uint64_t index) {
  Document document = prompts.document(index);
  const auto first = std::find(document.learn.begin(), document.learn.end(), 1);
  const auto length = first - document.learn.begin();
  // A token that begins every text is no prompt.
  expect(length > 1 || (length == 1 && first == document.learn.end()),
         "document {} of the prompts has no prompt: all of it is to be learned. Give documents "
         "with prompts ('prompt', 'messages' or 'question'), not plain text",
         index);
  document.tokens.resize(static_cast<size_t>(length));
  return std::move(document.tokens);
}

// Prompts with the student's answers, as documents: document i is answer i % (answers of a round)
// of its round, which is sampled when it is first asked for.
class OnPolicySource : public DocumentSource {
 public:
  OnPolicySource(Model& student, const TrainConfig& config, const OnPolicyConfig& on_policy,
                 const DocumentSource& prompts, const Tokenizer& tokenizer)
      : student_(student),
        train_(config),
        config_(on_policy),
        prompts_(prompts),
        stop_ids_(tokenizer.eos_ids()) {
    expect(!stop_ids_.empty(), "the tokenizer names no end token, which answers are to end with");
    for (const int64_t id : student.spec().eos_ids) {
      stop_ids_.push_back(static_cast<int32_t>(id));
    }
  }

  int64_t size() const override { return 0; }

  Document document(uint64_t index) const override {
    const auto count = static_cast<uint64_t>(answers());
    if (documents_.empty() || index / count != round_) {
      round_ = index / count;
      documents_ = find_round();
    }
    return documents_[index % count];
  }

  std::string fingerprint() const override {
    OnPolicyConfig config = config_;
    std::string text = "on-policy";
    for (const auto& [key, value] : fingerprint_fields(config)) {
      text += fmt::format(" {} {}", key, value);
    }
    return fmt::format("{} from {} of {}", text, train_.first_sample, prompts_.fingerprint());
  }

 private:
  int64_t answers() const { return config_.round_prompts * config_.samples; }
  std::filesystem::path file() const {
    return std::filesystem::path(train_.folder) / "rounds" / fmt::format("{:06}.json", round_);
  }

  std::vector<Document> find_round() const {
    if (!train_.folder.empty() && std::filesystem::exists(file())) {
      return read_round();
    }
    std::vector<Document> documents = sample_round();
    if (!train_.folder.empty()) {
      make_folder(file().parent_path().string());
      write_round(documents);
    }
    return documents;
  }

  // The prompt of answer i of the round.
  std::vector<int32_t> prompt(int64_t i) const {
    const auto asked = static_cast<uint64_t>(i / config_.samples) +
                       round_ * static_cast<uint64_t>(config_.round_prompts);
    return prompt_of(prompts_, document_at(prompts_, train_.seed, train_.first_sample + asked));
  }

  // Answers are as long as a sequence of training has room for; a prompt that fills it has none.
  std::vector<Document> sample_round() const {
    std::vector<Document> documents(static_cast<size_t>(answers()));
    // The engine serves a model without gradients: this one views the student's weights.
    const std::map<std::string, Tensor> tensors = tensors_of(student_);
    const LoadedModel served = view_model(
        student_.spec(), student_, [&](const std::string& name) { return tensors.at(name); });
    Engine engine(*served.model,
                  {.max_sequences = std::min(config_.batch, answers()), .deterministic = true});
    std::vector<Engine::Ticket> tickets(documents.size(), -1);
    for (int64_t i = 0; i < answers(); ++i) {
      GenerationRequest request;
      request.prompt = prompt(i);
      documents[static_cast<size_t>(i)].append(request.prompt, false);
      const int64_t room = train_.sequence_length + 1 - static_cast<int64_t>(request.prompt.size());
      if (room > 0) {
        request.max_new_tokens = std::min(config_.max_new_tokens, room);
        request.stop_ids = stop_ids_;
        request.sampling.temperature = static_cast<float>(config_.temperature);
        request.seed = mix_seed(train_.seed, round_);
        request.stream = static_cast<uint64_t>(i);
        tickets[static_cast<size_t>(i)] = engine.submit(std::move(request));
      }
    }
    Progress progress(fmt::format("{} round {}", train_.label, round_ + 1),
                      static_cast<uint64_t>(answers()), {.unit = "answers"});
    while (engine.step()) {
      progress.update(static_cast<uint64_t>(answers() - engine.waiting() - engine.running()));
    }
    int64_t tokens = 0;
    int64_t ended = 0;
    for (size_t i = 0; i < documents.size(); ++i) {
      if (tickets[i] < 0) {
        continue;
      }
      const GenerationResult result = engine.take(tickets[i]);
      documents[i].append(result.tokens, true);
      tokens += static_cast<int64_t>(result.tokens.size());
      if (result.reason == FinishReason::kStop) {
        documents[i].append({stop_ids_.front()}, true);
        ++ended;
      }
    }
    progress.finish(fmt::format("{:.1f} tokens an answer, {} of {} came to an end",
                                static_cast<double>(tokens) / static_cast<double>(answers()), ended,
                                answers()));
    return documents;
  }

  void write_round(const std::vector<Document>& documents) const {
    using Json = nlohmann::ordered_json;
    Json answers = Json::array();
    for (const Document& document : documents) {
      const auto first = std::find(document.learn.begin(), document.learn.end(), 1);
      answers.push_back({{"prompt", first - document.learn.begin()}, {"tokens", document.tokens}});
    }
    write_sealed(file(), Json{{"round", round_}, {"answers", answers}}.dump(1) + "\n");
  }

  std::vector<Document> read_round() const {
    const std::string where = file().string();
    const auto root = parse_json<nlohmann::json>(read_sealed(file()), where);
    std::vector<Document> documents;
    for (const JsonFields& answer : JsonFields(root, where).objects("answers")) {
      Document document;
      const auto last = static_cast<int64_t>(student_.spec().vocab) - 1;
      for (const int64_t id : answer.wholes("tokens", 0, last)) {
        document.tokens.push_back(static_cast<int32_t>(id));
      }
      const auto size = static_cast<int64_t>(document.tokens.size());
      document.learn.assign(document.tokens.size(), 1);
      std::fill_n(document.learn.begin(), answer.whole("prompt", 0, size), 0);
      documents.push_back(std::move(document));
    }
    expect(static_cast<int64_t>(documents.size()) == answers(), "{}: expected {} answers, got {}",
           where, answers(), documents.size());
    return documents;
  }

  Model& student_;
  const TrainConfig train_;
  const OnPolicyConfig config_;
  const DocumentSource& prompts_;
  std::vector<int32_t> stop_ids_;
  mutable uint64_t round_ = 0;
  mutable std::vector<Document> documents_;  // of the round
};

}  // namespace

void visit_fields(OnPolicyConfig& c, FieldVisitor& visit) {
  visit({"round_prompts", "prompts answered at once, by the weights of that moment"},
        c.round_prompts, ints_from(1, kMaxCount));
  visit({"samples", "answers to each prompt"}, c.samples, ints_from(1, kMaxCount));
  visit({"max_new_tokens", "tokens of an answer at most; it ends with its sequence too"},
        c.max_new_tokens, ints_from(1, kMaxNewTokens));
  visit({"temperature", "of the sampling; 0 = the likeliest token"}, c.temperature,
        reals_from(0.0, 100.0));
  visit({"batch", "answers sampled side by side", nullptr, false}, c.batch, ints_from(1, 1 << 16));
}

LossConfig on_policy_loss() {
  return {.forward_kl = 0.5F, .reverse_kl = 0.5F};
}

void check_on_policy(const TrainConfig& config, const std::string& where) {
  expect(config.objective == Objective::kEndToEnd && config.loss.cross_entropy == 0.0F,
         "{}: a student's own answers are no labels: cross_entropy and objective align do not "
         "belong to on-policy rounds",
         where);
  expect(config.loss.forward_kl != 0.0F || config.loss.reverse_kl != 0.0F,
         "{}: on-policy rounds learn by KL; give reverse_kl or forward_kl a weight", where);
}

TrainSummary run_on_policy(LoadedModel& student, TrainConfig config,
                           const OnPolicyConfig& on_policy, const DocumentSource& prompts,
                           const Tokenizer& tokenizer, Model& teacher) {
  check_on_policy(config, config.label);
  const OnPolicySource source(*student.model, config, on_policy, prompts, tokenizer);
  const uint64_t first = std::exchange(config.first_sample, 0);
  Trainer trainer(*student.model, student.weights, config, source, &teacher);
  if (trainer.next_step() == 0 && !config.folder.empty()) {
    remove_folder((std::filesystem::path(config.folder) / "rounds").string());
  }
  TrainSummary summary = trainer.run();
  const auto samples = static_cast<uint64_t>(on_policy.samples);
  summary.data.next_sample = first + (summary.data.next_sample + samples - 1) / samples;
  return summary;
}

}  // namespace cambium
