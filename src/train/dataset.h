// Documents and how they become batches.
//
// A source gives document i as tokens and a mask of what is to be learned. A Sampler fixes the
// order: sample index -> (epoch, permuted document), from the seed alone. A Packer fills sequences
// of a given number of tokens with whole documents, each a segment of its own, so that no state
// crosses from one to the next. The next sample index is the whole position of a run in its data.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "nn/batch.h"
#include "text/tokenizer.h"

namespace cambium {

/// learn[t] says whether tokens[t] is one the model is to produce: the token before it gets it as
/// label. learn[0] has no meaning.
struct Document {
  std::vector<int32_t> tokens;
  std::vector<uint8_t> learn;  // (tokens)

  /// Appends tokens that all count or all do not.
  void append(const std::vector<int32_t>& ids, bool learned);
  /// Tokens that become labels.
  int64_t labels() const;
};

class DocumentSource {
 public:
  virtual ~DocumentSource() = default;
  /// Documents there are, or 0 when they never end.
  virtual int64_t size() const = 0;
  /// Document `index`, the same at every call. index < size() unless size() is 0.
  virtual Document document(uint64_t index) const = 0;
  /// Names the contents: a run resumes only over the same. One line without quotes.
  virtual std::string fingerprint() const = 0;
};

/// Which tokens of a document are learned.
enum class LearnWhat { kCompletion, kAll };

/// prompt = question_prompt(question), completion = answer + end token.
Document question_document(const Tokenizer& tokenizer, std::string_view question,
                           std::string_view answer, LearnWhat learn = LearnWhat::kCompletion);
/// The prompt and the completion as they are, tokenized as one text, then the end token.
Document completion_document(const Tokenizer& tokenizer, std::string_view prompt,
                             std::string_view completion, LearnWhat learn = LearnWhat::kCompletion);
/// Through the chat template: what it writes for the turns of the assistant is learned
/// (train/chat_spans.h). `messages_json` is an array of message objects. Error when the template
/// refuses it or a turn cannot be found in what it writes.
Document chat_document(const Tokenizer& tokenizer, std::string_view messages_json,
                       LearnWhat learn = LearnWhat::kCompletion);
/// Plain text, then the end token; all of it is learned.
Document text_document(const Tokenizer& tokenizer, std::string_view text);

/// Reads a file of JSON lines. A row is one of
///
///   {"messages": [{"role", "content"}, ...]}   also as "conversations", with from and value
///   {"question", "answer"}
///   {"prompt", "completion"}                   two strings, or two lists of messages
///   {"text"}
///
/// A column that is null is an absent one. Conversations may have "tools", "documents",
/// "enable_thinking", "chat_template_kwargs" (all given to the template) and "system"; a message
/// with "weight": 0 or "train": false is not learned. Other columns are said once on standard
/// error. So are rows that the chat template cannot write: they are left out. The whole file is
/// checked and tokenised here. Error with the line for anything else, and for a file without
/// documents.
std::unique_ptr<DocumentSource> load_jsonl(const std::string& path, const Tokenizer& tokenizer,
                                           LearnWhat learn = LearnWhat::kCompletion);

/// The prompts of such a file, as documents of which nothing is learned: what stands before the
/// answer ("prompt", "question"; "messages" up to the last turn, where that is the assistant's),
/// through the chat template where it is a conversation. A "prompt" needs no "completion" here.
/// Error with the line for plain text.
std::unique_ptr<DocumentSource> load_prompts(const std::string& path, const Tokenizer& tokenizer);

/// Documents made on demand. `make` must give the same document for the same index at every call.
std::unique_ptr<DocumentSource> generated_source(std::function<Document(uint64_t index)> make,
                                                 std::string fingerprint, int64_t size = 0);

/// Draws each sample from one of several sources with the given weights. It never ends; each of
/// its sources is walked in its own order, as often as it takes.
std::unique_ptr<DocumentSource> mixed_source(std::vector<std::shared_ptr<DocumentSource>> sources,
                                             std::vector<double> weights, uint64_t seed);

/// The document a run sees at `sample`: a fresh permutation each epoch; sources without end are
/// taken in their own order.
uint64_t document_at(const DocumentSource& source, uint64_t seed, uint64_t sample);

/// What became of the documents so far.
struct DataPosition {
  uint64_t next_sample = 0;
  int64_t documents = 0;  // used
  int64_t cut = 0;        // used, but shortened to a sequence
  int64_t dropped = 0;    // too long, or nothing to learn in them
  friend bool operator==(const DataPosition&, const DataPosition&) = default;
};

enum class LongDocuments { kCut, kDrop };

/// A packed sequence: a batch of whole documents and what each token should predict.
struct PackedSequence {
  Batch batch;
  std::vector<int32_t> labels;      // (T): the next token, or -1
  int64_t learned = 0;              // labels that are not -1
  std::vector<uint64_t> documents;  // (S): which of the source; filled in by the packer
  uint64_t noise = 0;               // ForwardOptions::noise
};

class Packer {
 public:
  /// `source` must outlive the packer.
  Packer(const DocumentSource& source, uint64_t seed, int64_t sequence_length,
         LongDocuments long_documents);

  /// Documents in order as long as they fit into `sequence_length`; at least one.
  PackedSequence next();

  const DataPosition& position() const { return position_; }
  void seek(const DataPosition& position);

 private:
  void expect_some_to_learn(int64_t dropped) const;

  const DocumentSource& source_;
  uint64_t seed_;
  int64_t length_;
  LongDocuments long_documents_;
  DataPosition position_;
  int64_t cut_away_ = 0;  // of the dropped: documents whose labels were all cut off
};

/// Adds one document to a sequence.
void add_document(PackedSequence& sequence, const Document& document);

}  // namespace cambium
