// A teacher's logits kept in a file, for training that does without the teacher: of each token to
// be learned its k likeliest tokens and how likely they and all others together are.
//
// The file, little-endian:
//   "CAMLOGIT", the header's length (u64), the header (JSON, StoredLogitsInfo);
//   (documents + 1) u64: the first row of each document, and the number of rows;
//   rows, one for each token of a document that is learned, in order: (k + 1) log-probabilities as
//   fp16, the last that of all other tokens, then k ids of so many bits as the vocabulary takes,
//   packed from the lowest bit on, up to a whole byte;
//   XXH3 of all bytes before it (u64).
// A log-probability keeps its relative precision in fp16: that of a likely token is off by less
// than 2^-12 of how far it is from certain.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "base/file.h"
#include "model/model.h"
#include "ops/loss/loss.h"
#include "train/dataset.h"

namespace cambium {

/// What the logits are of. Data, tokenizer and teacher are named by fingerprints.
struct StoredLogitsInfo {
  int64_t top_k = 0;
  int64_t vocabulary = 0;
  int64_t documents = 0;   // the first ones of the data, cut to max_tokens
  int64_t max_tokens = 0;  // rows of a document's sequence, the last token not counted
  int64_t rows = 0;
  std::string data, tokenizer, teacher;
  std::string teacher_name;  // the folder it was in: for people
};

/// Rows of a packed sequence as head_loss takes them.
struct StoredRows {
  int64_t top_k = 0;
  std::vector<int32_t> tokens;  // (T, k); 0 where there is no label
  std::vector<float> log_p;     // (T, k + 1)

  StoredTeacher view() const { return {top_k, tokens, log_p}; }
};

class StoredLogits {
 public:
  /// Reads and sums up the whole file. Error when it is no such file, is cut, or a byte is not what
  /// was written.
  explicit StoredLogits(const std::string& path);

  const StoredLogitsInfo& info() const { return info_; }
  const std::string& path() const { return file_.path(); }
  /// Names the file's contents.
  std::string fingerprint() const;
  /// Error, naming both, unless the logits are of this data, tokenizer, or teacher.
  void expect_data(const std::string& fingerprint) const;
  void expect_tokenizer(const std::string& fingerprint) const;
  void expect_teacher(const std::string& fingerprint) const;

  /// Error for a document that is not in the file or has more to learn than was stored.
  StoredRows rows_of(const PackedSequence& sequence) const;

 private:
  void expect_same(const char* what, const std::string& stored, const std::string& given) const;
  void read_row(int64_t row, int32_t* tokens, float* log_p) const;

  MappedFile file_;
  StoredLogitsInfo info_;
  uint64_t digest_ = 0;
  const std::byte* starts_ = nullptr;
  const std::byte* rows_ = nullptr;
};

/// Bytes that a row of the file takes: one token to be learned.
int64_t stored_row_bytes(int64_t top_k, int64_t vocabulary);

/// Documents a file holds that was asked for so many, or for all of them by 0: at most those there
/// are, and 0 where 0 is asked of data that never ends.
int64_t documents_stored(const DocumentSource& data, int64_t asked);

/// Runs the teacher over the first `documents_stored` of the data, as `info.documents` asks,
/// and writes what it says. Fills in rows, documents and the vocabulary of `info`, and returns it.
/// The file appears when it is whole (base/resumable_file.h): what was stopped goes on where it
/// was, and ends with the same bytes.
StoredLogitsInfo write_stored_logits(const std::string& path, Model& teacher,
                                     const DocumentSource& data, StoredLogitsInfo info);

}  // namespace cambium
