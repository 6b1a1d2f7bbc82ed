#include "train/stored_logits.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <nlohmann/json.hpp>
#include <numeric>

#include "base/float16.h"
#include "base/json.h"
#include "base/json_fields.h"
#include "base/parallel.h"
#include "base/progress.h"
#include "base/resumable_file.h"
#include "base/signals.h"
#include "tensor/copy.h"

namespace cambium {
namespace {

using Json = nlohmann::ordered_json;

constexpr std::string_view kMagic = "CAMLOGIT";
constexpr int64_t kTokensTogether = 2048;
/// What a killed process loses at most.
constexpr std::chrono::seconds kKeepEvery{2};
/// Log-probabilities below it are stored as it: fp16 ends soon after.
constexpr float kLeast = -60000.0F;
constexpr int64_t kMaxVocabulary = int64_t{1} << 24;
constexpr int64_t kMaxRows = int64_t{1} << 48;

int64_t id_bits(int64_t vocabulary) {
  int64_t bits = 1;
  while ((int64_t{1} << bits) < vocabulary) {
    ++bits;
  }
  return bits;
}

template <class T>
T read_number(const std::byte* at) {
  T value;
  std::memcpy(&value, at, sizeof value);
  return value;
}

void add_number(std::string& text, uint64_t value) {
  text.append(reinterpret_cast<const char*>(&value), sizeof value);
}

// Document `index` as the packer cuts it to sequences of `max_tokens`.
Document cut_document(const DocumentSource& data, uint64_t index, int64_t max_tokens) {
  Document document = data.document(index);
  const size_t most = static_cast<size_t>(max_tokens) + 1;
  document.tokens.resize(std::min(document.tokens.size(), most));
  document.learn.resize(document.tokens.size());
  return document;
}

// The k largest of a row of logits and what the others come to, packed as in the file.
void pack_row(std::span<const float> logits, int64_t top_k, std::byte* out) {
  const auto k = static_cast<size_t>(top_k);
  std::vector<int32_t> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  const auto before = [&](int32_t a, int32_t b) {
    const float x = logits[static_cast<size_t>(a)];
    const float y = logits[static_cast<size_t>(b)];
    return x > y || (x == y && a < b);
  };
  std::nth_element(order.begin(), order.begin() + (top_k - 1), order.end(), before);
  std::sort(order.begin(), order.begin() + top_k, before);
  const auto largest = static_cast<double>(logits[static_cast<size_t>(order[0])]);
  double rest = 0.0;
  for (size_t i = logits.size(); i-- > k;) {
    rest += std::exp(static_cast<double>(logits[static_cast<size_t>(order[i])]) - largest);
  }
  double all = rest;
  for (size_t i = k; i-- > 0;) {
    all += std::exp(static_cast<double>(logits[static_cast<size_t>(order[i])]) - largest);
  }
  const int64_t bits = id_bits(static_cast<int64_t>(logits.size()));
  const auto put = [&](size_t i, double log_p) {
    const uint16_t half = f32_to_f16(std::max(static_cast<float>(log_p), kLeast));
    std::memcpy(out + 2 * i, &half, sizeof half);
  };
  std::byte* ids = out + 2 * (top_k + 1);
  for (size_t i = 0; i < k; ++i) {
    put(i, static_cast<double>(logits[static_cast<size_t>(order[i])]) - largest - std::log(all));
    for (int64_t b = 0; b < bits; ++b) {
      const int64_t at = static_cast<int64_t>(i) * bits + b;
      const auto bit = static_cast<uint32_t>(order[i]) >> b & 1U;
      ids[at / 8] |= static_cast<std::byte>(bit << (at % 8));
    }
  }
  put(k, std::log(rest) - std::log(all));  // -infinity, and so the least, where k is all of them
}

std::string header_of(const StoredLogitsInfo& info) {
  return Json{{"version", 1},
              {"top_k", info.top_k},
              {"vocabulary", info.vocabulary},
              {"documents", info.documents},
              {"max_tokens", info.max_tokens},
              {"rows", info.rows},
              {"data", info.data},
              {"tokenizer", info.tokenizer},
              {"teacher", info.teacher},
              {"teacher_name", info.teacher_name}}
      .dump(-1, ' ', false, Json::error_handler_t::replace);
}

StoredLogitsInfo read_header(const std::string& text, const std::string& where) {
  const auto root = parse_json<nlohmann::json>(text, where);
  const JsonFields fields(root, where);
  expect(fields.whole("version") == 1, "{} is of a newer version", where);
  StoredLogitsInfo info;
  info.vocabulary = fields.whole("vocabulary", 1, kMaxVocabulary);
  info.top_k = fields.whole("top_k", 1, info.vocabulary);
  info.documents = fields.whole("documents", 0, kMaxRows);
  info.max_tokens = fields.whole("max_tokens", 1);
  info.rows = fields.whole("rows", 0, kMaxRows);
  info.data = fields.text("data");
  info.tokenizer = fields.text("tokenizer");
  info.teacher = fields.text("teacher");
  info.teacher_name = fields.text("teacher_name");
  return info;
}

/// Documents that are run together. They follow from the data alone, so that a run that goes on
/// computes what one that was never stopped does.
struct Group {
  PackedSequence sequence;
  int64_t end = 0;  // the first document after it
};

Group next_group(const DocumentSource& data, const StoredLogitsInfo& info, int64_t next) {
  Group group;
  for (; next < info.documents; ++next) {
    const Document document = cut_document(data, static_cast<uint64_t>(next), info.max_tokens);
    const auto rows = static_cast<int64_t>(document.tokens.size()) - 1;
    if (document.labels() == 0) {
      continue;
    }
    const int64_t size = group.sequence.batch.size();
    if (size > 0 && size + rows > kTokensTogether) {
      break;
    }
    add_document(group.sequence, document);
  }
  group.end = next;
  return group;
}

// What the teacher says of the group's tokens that are learned, as rows of the file.
std::vector<std::byte> rows_of_group(const PackedSequence& group, Model& teacher,
                                     Workspace& workspace, const StoredLogitsInfo& info) {
  const WorkspaceScope scope(workspace);
  Context ctx = context_for(teacher, workspace);
  const Tensor hidden = teacher.forward(ctx, group.batch);
  std::vector<int64_t> learned;
  for (size_t t = 0; t < group.labels.size(); ++t) {
    if (group.labels[t] >= 0) {
      learned.push_back(static_cast<int64_t>(t));
    }
  }
  const int64_t row_bytes = stored_row_bytes(info.top_k, info.vocabulary);
  std::vector<std::byte> packed(learned.size() * static_cast<size_t>(row_bytes));
  const auto most = static_cast<size_t>(head_loss_rows(info.vocabulary, teacher.device()));
  for (size_t begin = 0; begin < learned.size(); begin += most) {
    stop_point();
    const auto rows = std::span(learned).subspan(begin, std::min(most, learned.size() - begin));
    const ArenaScope rows_scope(*ctx.arena);
    const Tensor chosen =
        ctx.arena->empty(hidden.dtype, {static_cast<int64_t>(rows.size()), hidden.dim(1)});
    gather_rows(chosen, hidden, rows);
    const std::vector<float> logits = elements_of(teacher.logits(ctx, chosen));
    std::byte* out = packed.data() + static_cast<int64_t>(begin) * row_bytes;
    parallel_for(static_cast<int64_t>(rows.size()), 1, [&](int64_t from, int64_t to) {
      for (int64_t r = from; r < to; ++r) {
        pack_row(std::span(logits).subspan(static_cast<size_t>(r * info.vocabulary),
                                           static_cast<size_t>(info.vocabulary)),
                 info.top_k, out + r * row_bytes);
      }
    });
  }
  return packed;
}

}  // namespace

int64_t stored_row_bytes(int64_t top_k, int64_t vocabulary) {
  return 2 * (top_k + 1) + (top_k * id_bits(vocabulary) + 7) / 8;
}

int64_t documents_stored(const DocumentSource& data, int64_t asked) {
  return data.size() == 0 ? asked : asked == 0 ? data.size() : std::min(asked, data.size());
}

StoredLogits::StoredLogits(const std::string& path) : file_(path) {
  const std::span<const std::byte> bytes = file_.bytes();
  constexpr size_t kNumber = sizeof(uint64_t);
  const bool begins = bytes.size() >= kMagic.size() + 2 * kNumber &&
                      std::memcmp(bytes.data(), kMagic.data(), kMagic.size()) == 0;
  expect(begins, "{} holds no stored logits; `cambium logits` writes such files", path);
  const size_t body = bytes.size() - kNumber;
  digest_ = checksum(bytes.first(body));
  expect(digest_ == read_number<uint64_t>(bytes.data() + body),
         "{} is not what was written: its checksum is {}, not {}; it was damaged or cut", path,
         checksum_text(digest_), checksum_text(read_number<uint64_t>(bytes.data() + body)));
  const auto length = read_number<uint64_t>(bytes.data() + kMagic.size());
  const size_t header = kMagic.size() + kNumber;
  expect(length <= body - header, "{}: the header is longer than the file", path);
  info_ = read_header(
      {reinterpret_cast<const char*>(bytes.data()) + header, static_cast<size_t>(length)}, path);
  const auto documents = static_cast<uint64_t>(info_.documents);
  const auto row = static_cast<uint64_t>(stored_row_bytes(info_.top_k, info_.vocabulary));
  const uint64_t left = body - header - length;
  expect(documents < left / kNumber && static_cast<uint64_t>(info_.rows) <= left / row &&
             (documents + 1) * kNumber + static_cast<uint64_t>(info_.rows) * row == left,
         "{}: expected {} documents and {} rows of {} bytes, got {} bytes", path, documents,
         info_.rows, row, left);
  starts_ = bytes.data() + header + length;
  rows_ = starts_ + (documents + 1) * kNumber;
  uint64_t last = 0;
  for (uint64_t i = 0; i <= documents; ++i) {
    const auto start = read_number<uint64_t>(starts_ + i * kNumber);
    expect(start >= last && start <= static_cast<uint64_t>(info_.rows),
           "{}: document {} begins at row {}, after one that begins at {}", path, i, start, last);
    last = start;
  }
}

std::string StoredLogits::fingerprint() const {
  return fmt::format("top {} of {} rows ({})", info_.top_k, info_.rows, checksum_text(digest_));
}

void StoredLogits::expect_same(const char* what, const std::string& stored,
                               const std::string& given) const {
  expect(stored == given,
         "{} holds logits of {}: {} there, {} here; store them anew with `cambium logits`", path(),
         what, stored, given);
}

void StoredLogits::expect_data(const std::string& given) const {
  expect_same("other data", info_.data, given);
}
void StoredLogits::expect_tokenizer(const std::string& given) const {
  expect_same("another tokenizer", info_.tokenizer, given);
}
void StoredLogits::expect_teacher(const std::string& given) const {
  expect_same("another teacher", info_.teacher, given);
}

void StoredLogits::read_row(int64_t row, int32_t* tokens, float* log_p) const {
  const std::byte* at = rows_ + row * stored_row_bytes(info_.top_k, info_.vocabulary);
  // What rounding took or gave is shared out: the probabilities sum to one.
  double sum = 0.0;
  for (int64_t i = 0; i <= info_.top_k; ++i) {
    log_p[i] = f16_to_f32(read_number<uint16_t>(at + 2 * i));
    sum += std::exp(static_cast<double>(log_p[i]));
  }
  const auto shift = static_cast<float>(std::log(sum));
  expect(std::isfinite(shift), "{}: row {} has no probabilities", path(), row);
  for (int64_t i = 0; i <= info_.top_k; ++i) {
    log_p[i] -= shift;
  }
  const std::byte* ids = at + 2 * (info_.top_k + 1);
  const int64_t bits = id_bits(info_.vocabulary);
  for (int64_t i = 0; i < info_.top_k; ++i) {
    uint32_t id = 0;
    for (int64_t b = 0; b < bits; ++b) {
      const int64_t bit = i * bits + b;
      id |= (std::to_integer<uint32_t>(ids[bit / 8]) >> (bit % 8) & 1U) << b;
    }
    expect(id < static_cast<uint32_t>(info_.vocabulary), "{}: row {} has the token {} of {}",
           path(), row, id, info_.vocabulary);
    tokens[i] = static_cast<int32_t>(id);
  }
}

StoredRows StoredLogits::rows_of(const PackedSequence& sequence) const {
  const Segments segments = sequence.batch.segments();
  CAMBIUM_CHECK(static_cast<int64_t>(sequence.documents.size()) == segments.count());
  StoredRows out;
  out.top_k = info_.top_k;
  out.tokens.resize(sequence.labels.size() * static_cast<size_t>(info_.top_k));
  out.log_p.resize(sequence.labels.size() * static_cast<size_t>(info_.top_k + 1));
  for (int64_t s = 0; s < segments.count(); ++s) {
    const uint64_t document = sequence.documents[static_cast<size_t>(s)];
    expect(document < static_cast<uint64_t>(info_.documents),
           "{} holds the logits of the first {} documents, the run has come to document {}; store "
           "more of them, or train for fewer steps",
           path(), info_.documents, document);
    const std::byte* start = starts_ + document * sizeof(uint64_t);
    auto row = static_cast<int64_t>(read_number<uint64_t>(start));
    const auto end = static_cast<int64_t>(read_number<uint64_t>(start + sizeof(uint64_t)));
    const int64_t first = segments.start[static_cast<size_t>(s)];
    for (int64_t t = first; t < first + segments.length(s); ++t) {
      if (sequence.labels[static_cast<size_t>(t)] < 0) {
        continue;
      }
      expect(row < end,
             "{} holds documents cut at {} tokens; document {} is longer in this run: make "
             "sequence_length smaller or store them anew with a larger --sequence",
             path(), info_.max_tokens, document);
      read_row(row++, out.tokens.data() + t * info_.top_k,
               out.log_p.data() + t * (info_.top_k + 1));
    }
  }
  return out;
}

StoredLogitsInfo write_stored_logits(const std::string& path, Model& teacher,
                                     const DocumentSource& data, StoredLogitsInfo info) {
  info.vocabulary = teacher.spec().vocab;
  expect(info.top_k >= 1 && info.top_k <= info.vocabulary,
         "expected to store 1 to {} tokens, the vocabulary, got {}", info.vocabulary, info.top_k);
  info.documents = documents_stored(data, info.documents);
  expect(info.documents > 0,
         "the data never ends; say how many documents' logits are to be stored");
  info.data = data.fingerprint();
  std::vector<uint64_t> starts{0};
  for (int64_t i = 0; i < info.documents; ++i) {
    const Document document = cut_document(data, static_cast<uint64_t>(i), info.max_tokens);
    starts.push_back(starts.back() + static_cast<uint64_t>(document.labels()));
  }
  info.rows = static_cast<int64_t>(starts.back());
  expect(info.rows > 0, "the data has no document with anything to learn in its first {} tokens",
         info.max_tokens);
  const std::string header = header_of(info);
  std::string begin(kMagic);
  add_number(begin, header.size());
  begin += header;
  for (const uint64_t start : starts) {
    add_number(begin, start);
  }
  const auto row_bytes = static_cast<uint64_t>(stored_row_bytes(info.top_k, info.vocabulary));
  ResumableFile file(path, begin);
  const uint64_t done = (file.size() - begin.size()) / row_bytes;
  Progress progress("storing " + path, starts.back(), {.unit = "tokens"});
  Workspace workspace(teacher.device());
  auto kept = std::chrono::steady_clock::now();
  for (int64_t next = 0; next < info.documents;) {
    const Group group = next_group(data, info, next);
    next = group.end;
    if (group.sequence.batch.size() == 0 || starts[static_cast<size_t>(next)] <= done) {
      continue;  // of an earlier run
    }
    file.write(rows_of_group(group.sequence, teacher, workspace, info));
    progress.update(starts[static_cast<size_t>(next)]);
    if (std::chrono::steady_clock::now() - kept > kKeepEvery) {
      file.keep();
      kept = std::chrono::steady_clock::now();
    }
  }
  const uint64_t sum = file.checksum();
  file.write(std::as_bytes(std::span(&sum, 1)));
  file.commit();
  progress.finish(fmt::format("{} bytes a token", row_bytes));
  return info;
}

}  // namespace cambium
