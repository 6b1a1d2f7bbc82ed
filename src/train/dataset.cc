#include "train/dataset.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "base/error.h"
#include "base/random.h"
#include "text/prompt_format.h"

namespace cambium {
namespace {

/// So many documents in a row without one that can be used are a mistake in the data.
constexpr int64_t kMaxDroppedInARow = 100000;

class GeneratedSource : public DocumentSource {
 public:
  GeneratedSource(std::function<Document(uint64_t)> make, std::string fingerprint, int64_t size)
      : make_(std::move(make)), fingerprint_(std::move(fingerprint)), size_(size) {}
  int64_t size() const override { return size_; }
  Document document(uint64_t index) const override { return make_(index); }
  std::string fingerprint() const override { return fingerprint_; }

 private:
  std::function<Document(uint64_t)> make_;
  std::string fingerprint_;
  int64_t size_;
};

// Blocks of samples in which every source has its share, in a fresh order per block.
class MixedSource : public DocumentSource {
 public:
  MixedSource(std::vector<std::shared_ptr<DocumentSource>> sources, std::vector<double> weights,
              uint64_t seed)
      : sources_(std::move(sources)), seed_(seed) {
    expect(!sources_.empty() && sources_.size() == weights.size(),
           "a mixture needs one weight for each of its {} sources, got {}", sources_.size(),
           weights.size());
    double sum = 0.0;
    for (const double w : weights) {
      expect(w > 0.0 && std::isfinite(w), "weights of a mixture must be above zero, got {}", w);
      sum += w;
    }
    for (size_t s = 0; s < weights.size(); ++s) {
      const double share = weights[s] / sum * kBlock;
      counts_.push_back(std::max<int64_t>(1, std::llround(share)));
      fingerprint_ +=
          fmt::format("{}{}*({})", s == 0 ? "" : "+", counts_.back(), sources_[s]->fingerprint());
    }
    block_ = std::accumulate(counts_.begin(), counts_.end(), int64_t{0});
  }

  int64_t size() const override { return 0; }

  Document document(uint64_t index) const override {
    const auto block = index / static_cast<uint64_t>(block_);
    const auto within = static_cast<int64_t>(index % static_cast<uint64_t>(block_));
    int64_t place = Permutation(block_, mix_seed(seed_, block))(within);
    size_t s = 0;
    while (place >= counts_[s]) {
      place -= counts_[s++];
    }
    const auto sample = block * static_cast<uint64_t>(counts_[s]) + static_cast<uint64_t>(place);
    return sources_[s]->document(document_at(*sources_[s], mix_seed(seed_, s + 1), sample));
  }

  std::string fingerprint() const override { return fingerprint_; }

 private:
  static constexpr double kBlock = 1000.0;
  std::vector<std::shared_ptr<DocumentSource>> sources_;
  std::vector<int64_t> counts_;  // samples of each source in a block
  int64_t block_ = 0;
  uint64_t seed_;
  std::string fingerprint_;
};

}  // namespace

void Document::append(const std::vector<int32_t>& ids, bool learned) {
  tokens.insert(tokens.end(), ids.begin(), ids.end());
  learn.insert(learn.end(), ids.size(), learned ? 1 : 0);
}

int64_t Document::labels() const {
  return learn.empty() ? 0 : std::count(learn.begin() + 1, learn.end(), 1);
}

Document question_document(const Tokenizer& tokenizer, std::string_view question,
                           std::string_view answer, LearnWhat learn) {
  return completion_document(tokenizer, question_prompt(question), answer, learn);
}

std::unique_ptr<DocumentSource> generated_source(std::function<Document(uint64_t index)> make,
                                                 std::string fingerprint, int64_t size) {
  return std::make_unique<GeneratedSource>(std::move(make), std::move(fingerprint), size);
}

std::unique_ptr<DocumentSource> mixed_source(std::vector<std::shared_ptr<DocumentSource>> sources,
                                             std::vector<double> weights, uint64_t seed) {
  return std::make_unique<MixedSource>(std::move(sources), std::move(weights), seed);
}

uint64_t document_at(const DocumentSource& source, uint64_t seed, uint64_t sample) {
  const auto size = static_cast<uint64_t>(source.size());
  if (size == 0) {
    return sample;
  }
  const Permutation order(source.size(), mix_seed(seed, sample / size));
  return static_cast<uint64_t>(order(static_cast<int64_t>(sample % size)));
}

Packer::Packer(const DocumentSource& source, uint64_t seed, int64_t sequence_length,
               LongDocuments long_documents)
    : source_(source), seed_(seed), length_(sequence_length), long_documents_(long_documents) {
  expect(sequence_length > 0, "sequence_length must be above zero, got {}", sequence_length);
}

// The last token of a document only serves as a label, so a document of n tokens takes n - 1 rows.
PackedSequence Packer::next() {
  PackedSequence sequence;
  for (int64_t dropped = 0;; ++position_.next_sample) {
    const uint64_t index = document_at(source_, seed_, position_.next_sample);
    Document document = source_.document(index);
    CAMBIUM_CHECK(document.tokens.size() == document.learn.size());
    bool cut = false;
    if (static_cast<int64_t>(document.tokens.size()) > length_ + 1 &&
        long_documents_ == LongDocuments::kCut) {
      document.tokens.resize(static_cast<size_t>(length_) + 1);
      document.learn.resize(static_cast<size_t>(length_) + 1);
      cut = true;
    }
    const int64_t rows = static_cast<int64_t>(document.tokens.size()) - 1;
    if (rows > length_ || document.labels() == 0) {
      ++position_.dropped;
      cut_away_ += cut ? 1 : 0;
      expect_some_to_learn(++dropped);
      continue;
    }
    if (sequence.batch.size() + rows > length_) {
      return sequence;
    }
    add_document(sequence, document);
    sequence.documents.push_back(index);
    ++position_.documents;
    position_.cut += cut ? 1 : 0;
    dropped = 0;
    if (sequence.batch.size() == length_) {
      ++position_.next_sample;
      return sequence;
    }
  }
}

void Packer::expect_some_to_learn(int64_t dropped) const {
  // All of a source that ends, or very many in a row, are a mistake in the data.
  const int64_t most =
      source_.size() > 0 ? std::min(source_.size(), kMaxDroppedInARow) : kMaxDroppedInARow;
  expect(dropped < most,
         "the data has {} documents in a row that are longer than sequence_length = {}, cut before "
         "anything to learn ({} so far), or have nothing to learn; make sequence_length larger or "
         "look at the data",
         dropped, length_, cut_away_);
}

void Packer::seek(const DataPosition& position) {
  position_ = position;
}

void add_document(PackedSequence& sequence, const Document& document) {
  CAMBIUM_CHECK(document.tokens.size() >= 2);
  const size_t rows = document.tokens.size() - 1;
  sequence.batch.add(std::span(document.tokens).first(rows));
  for (size_t t = 0; t < rows; ++t) {
    const bool learned = document.learn[t + 1] != 0;
    sequence.labels.push_back(learned ? document.tokens[t + 1] : -1);
    sequence.learned += learned ? 1 : 0;
  }
}

}  // namespace cambium
