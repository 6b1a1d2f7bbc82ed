#include "text/bpe.h"

#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <queue>

#include "base/error.h"
#include "text/unicode.h"

namespace cambium::text {
namespace {

/// Up to this many symbols a scan for the best pair beats a heap.
constexpr size_t kShortPiece = 48;

/// A remembered piece; a cache line.
struct Remembered {
  static constexpr size_t kMaxBytes = 26;
  static constexpr size_t kMaxTokens = 8;
  uint32_t instance = 0;  // 0: free
  uint8_t bytes = 0;
  uint8_t tokens = 0;
  char piece[kMaxBytes];
  int32_t ids[kMaxTokens];
};
static_assert(sizeof(Remembered) == 64);

constexpr size_t kRemembered = size_t{1} << 14;  // 1 MiB a thread

Remembered* memory_of_thread() {
  thread_local const std::unique_ptr<Remembered[]> memory(new Remembered[kRemembered]());
  return memory.get();
}

uint32_t next_instance() {
  static std::atomic<uint32_t> counter{0};
  return ++counter;
}

}  // namespace

Bpe::Bpe(const BpeConfig& config)
    : ignore_merges_(config.ignore_merges),
      byte_fallback_(config.byte_fallback),
      fuse_unknown_(config.fuse_unknown),
      byte_level_(config.byte_level),
      instance_(next_instance()) {
  size_t length = 0;
  for (const auto& [token, id] : config.vocab) {
    length += token.size();
  }
  // Merges are spelled as the file spells tokens; pieces are looked up as bytes when byte-level.
  TokenTable spelling;
  spelling.reserve(config.vocab.size(), length);
  table_.reserve(config.vocab.size(), length);
  std::string bytes;
  for (const auto& [token, id] : config.vocab) {
    expect(spelling.insert(token, id), "[tokenizer] the vocabulary has {:?} twice", token);
    if (!byte_level_) {
      table_.insert(token, id);
    } else if (alphabet_to_bytes(token, bytes)) {
      table_.insert(bytes, id);
    }
  }
  for (int byte = 0; byte < 256; ++byte) {
    const char c = static_cast<char>(byte);
    byte_ids_[byte] = byte_level_ ? table_.find(std::string_view(&c, 1))
                                  : spelling.find(fmt::format("<0x{:02X}>", byte));
  }
  if (!config.unknown.empty()) {
    unknown_ = spelling.find(config.unknown);
    expect(unknown_ >= 0, "[tokenizer] expected unk_token {:?} in the vocabulary", config.unknown);
  }
  merges_.reserve(config.merges.size());
  std::string joined;
  uint32_t rank = 0;
  for (const auto& [left, right] : config.merges) {
    joined.assign(left).append(right);
    const int32_t a = spelling.find(left);
    const int32_t b = spelling.find(right);
    const int32_t ab = spelling.find(joined);
    if (a < 0 || b < 0 || ab < 0) {
      fail("[tokenizer] merge {} is {:?} + {:?}, but {:?} is not in the vocabulary", rank, left,
           right, a < 0 ? left : (b < 0 ? right : joined));
    }
    merges_.insert(a, b, {rank++, ab});
  }
}

void Bpe::encode(std::string_view piece, std::vector<int32_t>& out) const {
  if (piece.empty()) {
    return;
  }
  const uint64_t hash = hash_bytes(piece);
  const bool small = piece.size() <= Remembered::kMaxBytes;
  Remembered* slot = nullptr;
  if (small) {
    slot = &memory_of_thread()[(hash ^ instance_ * 0x9E3779B9U) & (kRemembered - 1)];
    if (slot->instance == instance_ && slot->bytes == piece.size() &&
        std::memcmp(slot->piece, piece.data(), piece.size()) == 0) {
      out.insert(out.end(), slot->ids, slot->ids + slot->tokens);
      return;
    }
  }
  const size_t before = out.size();
  const int32_t whole = ignore_merges_ ? table_.find(piece, hash) : -1;
  if (whole >= 0) {
    out.push_back(whole);
  } else {
    merge(piece, out);
  }
  const size_t added = out.size() - before;
  if (small && added <= Remembered::kMaxTokens) {
    slot->instance = instance_;
    slot->bytes = static_cast<uint8_t>(piece.size());
    slot->tokens = static_cast<uint8_t>(added);
    std::memcpy(slot->piece, piece.data(), piece.size());
    std::copy_n(out.data() + before, added, slot->ids);
  }
}

void Bpe::symbols(std::string_view piece, std::vector<int32_t>& out) const {
  out.clear();
  bool after_unknown = false;
  const auto add_unknown = [&] {
    if (unknown_ >= 0 && !(fuse_unknown_ && after_unknown)) {
      out.push_back(unknown_);
    }
    after_unknown = true;
  };
  for (size_t at = 0; at < piece.size();) {
    const size_t length = byte_level_ ? 1 : decode_utf8(piece, at).length;
    const std::string_view symbol = piece.substr(at, length);
    at += length;
    const int32_t id =
        byte_level_ ? byte_ids_[static_cast<unsigned char>(symbol[0])] : table_.find(symbol);
    if (id >= 0) {
      out.push_back(id);
      after_unknown = false;
      continue;
    }
    const auto has_token = [&](char c) { return byte_ids_[static_cast<unsigned char>(c)] >= 0; };
    if (byte_fallback_ && !byte_level_ && std::all_of(symbol.begin(), symbol.end(), has_token)) {
      for (const char c : symbol) {
        out.push_back(byte_ids_[static_cast<unsigned char>(c)]);
      }
      after_unknown = false;
    } else {
      add_unknown();
    }
  }
}

void Bpe::merge(std::string_view piece, std::vector<int32_t>& out) const {
  thread_local std::vector<int32_t> ids;
  symbols(piece, ids);
  if (ids.size() <= kShortPiece) {
    merge_short(ids);
  } else {
    merge_long(ids);
  }
  out.insert(out.end(), ids.begin(), ids.end());
  if (ids.capacity() > (size_t{1} << 20)) {  // one huge piece should not hold memory for ever
    std::vector<int32_t>().swap(ids);
  }
}

void Bpe::merge_short(std::vector<int32_t>& ids) const {
  Merge pairs[kShortPiece];  // pairs[i]: ids[i] with ids[i + 1]
  size_t n = ids.size();
  for (size_t i = 0; i + 1 < n; ++i) {
    pairs[i] = merges_.find(ids[i], ids[i + 1]);
  }
  while (n > 1) {
    size_t best = 0;
    for (size_t i = 1; i + 1 < n; ++i) {
      if (pairs[i].rank < pairs[best].rank) {
        best = i;
      }
    }
    if (pairs[best].rank == MergeTable::kNoRank) {
      break;
    }
    ids[best] = pairs[best].id;
    std::copy(ids.begin() + best + 2, ids.begin() + n, ids.begin() + best + 1);
    std::copy(pairs + best + 1, pairs + n - 1, pairs + best);
    --n;
    if (best > 0) {
      pairs[best - 1] = merges_.find(ids[best - 1], ids[best]);
    }
    if (best + 1 < n) {
      pairs[best] = merges_.find(ids[best], ids[best + 1]);
    }
  }
  ids.resize(n);
}

void Bpe::merge_long(std::vector<int32_t>& ids) const {
  constexpr uint32_t kEnd = 0xFFFFFFFF;
  expect(ids.size() < kEnd, "[tokenizer] a piece of {} symbols is too long", ids.size());
  struct Node {
    uint32_t previous, next;
    Merge pair;  // with the next node
  };
  const uint32_t n = static_cast<uint32_t>(ids.size());
  std::vector<Node> nodes(n);
  std::vector<uint64_t> initial;  // rank << 32 | position: the heap's order is BPE's
  for (uint32_t i = 0; i < n; ++i) {
    nodes[i] = {i == 0 ? kEnd : i - 1, i + 1 == n ? kEnd : i + 1, {MergeTable::kNoRank, -1}};
    if (i + 1 < n) {
      nodes[i].pair = merges_.find(ids[i], ids[i + 1]);
      if (nodes[i].pair.rank != MergeTable::kNoRank) {
        initial.push_back(static_cast<uint64_t>(nodes[i].pair.rank) << 32 | i);
      }
    }
  }
  std::priority_queue<uint64_t, std::vector<uint64_t>, std::greater<>> heap(std::greater<>(),
                                                                            std::move(initial));
  const auto renew = [&](uint32_t i) {
    Node& node = nodes[i];
    node.pair =
        node.next == kEnd ? Merge{MergeTable::kNoRank, -1} : merges_.find(ids[i], ids[node.next]);
    if (node.pair.rank != MergeTable::kNoRank) {
      heap.push(static_cast<uint64_t>(node.pair.rank) << 32 | i);
    }
  };
  while (!heap.empty()) {
    const uint32_t i = static_cast<uint32_t>(heap.top());
    const uint32_t rank = static_cast<uint32_t>(heap.top() >> 32);
    heap.pop();
    if (nodes[i].pair.rank != rank) {
      continue;  // the pair changed since; dead nodes have no rank
    }
    const uint32_t gone = nodes[i].next;
    ids[i] = nodes[i].pair.id;
    nodes[i].next = nodes[gone].next;
    nodes[gone].pair.rank = MergeTable::kNoRank;
    ids[gone] = -1;
    if (nodes[i].next != kEnd) {
      nodes[nodes[i].next].previous = i;
    }
    renew(i);
    if (nodes[i].previous != kEnd) {
      renew(nodes[i].previous);
    }
  }
  std::erase(ids, -1);
}

}  // namespace cambium::text
