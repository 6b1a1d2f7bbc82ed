#include "model/tokenizer_train.h"

#include <nlohmann/json.hpp>

#include "base/error.h"

namespace cambium {
namespace {

using Json = nlohmann::ordered_json;

constexpr const char* kPieces = R"( ?[A-Za-z]+|[0-9]|[^\S\r\n]+|[\r\n]+| ?[^\sA-Za-z0-9]+)";

bool letter(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z');
}
bool digit(char c) {
  return c >= '0' && c <= '9';
}
bool newline(char c) {
  return c == '\n' || c == '\r';
}
bool blank(char c) {
  return c == ' ' || c == '\t' || c == '\v' || c == '\f';
}

// The pieces of kPieces, byte by byte; the training text is ASCII or has its other bytes among
// signs.
void count_pieces(const std::string& text, std::map<std::string, int64_t>& counts) {
  size_t i = 0;
  const size_t n = text.size();
  const auto sign = [&](size_t at) {
    const char c = text[at];
    return !letter(c) && !digit(c) && !newline(c) && !blank(c);
  };
  while (i < n) {
    const size_t begin = i;
    const bool lead = text[i] == ' ' && i + 1 < n && (letter(text[i + 1]) || sign(i + 1));
    const size_t body = lead ? i + 1 : i;
    i = body + 1;
    if (letter(text[body])) {
      while (i < n && letter(text[i])) ++i;
    } else if (digit(text[body])) {
    } else if (newline(text[body])) {
      while (i < n && newline(text[i])) ++i;
    } else if (blank(text[body])) {
      while (i < n && blank(text[i])) ++i;
    } else {
      while (i < n && sign(i)) ++i;
    }
    ++counts[text.substr(begin, i - begin)];
  }
}

// GPT-2's printable stand-in for a byte, as UTF-8.
std::string spelled(unsigned char byte) {
  const bool printable = (byte >= 33 && byte <= 126) || (byte >= 161 && byte != 173);
  int code = byte;
  if (!printable) {
    code = 256;
    for (int b = 0; b < byte; ++b) {
      code += (b >= 33 && b <= 126) || (b >= 161 && b != 173) ? 0 : 1;
    }
  }
  if (code < 128) {
    return std::string(1, static_cast<char>(code));
  }
  return {static_cast<char>(0xC0 | (code >> 6)), static_cast<char>(0x80 | (code & 0x3F))};
}

struct Piece {
  std::vector<std::string> parts;
  int64_t count = 0;
};

}  // namespace

TokenizerFiles train_tokenizer(const std::vector<std::string>& texts, int64_t vocab_size,
                               const std::vector<std::string>& special,
                               const std::string& chat_template) {
  const auto least = static_cast<int64_t>(special.size()) + 256;
  expect(vocab_size >= least && !special.empty(),
         "[train_tokenizer] expected at least one special token and a vocabulary of at least {} "
         "(special tokens and 256 bytes), got {}",
         least, vocab_size);
  std::map<std::string, int64_t> counts;
  for (const std::string& text : texts) {
    count_pieces(text, counts);
  }
  std::vector<Piece> pieces;
  for (const auto& [text, count] : counts) {
    Piece piece{{}, count};
    for (const char c : text) {
      piece.parts.push_back(spelled(static_cast<unsigned char>(c)));
    }
    pieces.push_back(std::move(piece));
  }
  Json vocab = Json::object();
  int64_t next = 0;
  Json added = Json::array();
  for (const std::string& token : special) {
    added.push_back({{"id", next},
                     {"content", token},
                     {"single_word", false},
                     {"lstrip", false},
                     {"rstrip", false},
                     {"normalized", false},
                     {"special", true}});
    vocab[token] = next++;
  }
  for (int byte = 0; byte < 256; ++byte) {
    vocab[spelled(static_cast<unsigned char>(byte))] = next++;
  }
  Json merges = Json::array();
  while (next < vocab_size) {
    std::map<std::pair<std::string, std::string>, int64_t> pairs;
    for (const Piece& piece : pieces) {
      for (size_t i = 0; i + 1 < piece.parts.size(); ++i) {
        pairs[{piece.parts[i], piece.parts[i + 1]}] += piece.count;
      }
    }
    const std::pair<const std::pair<std::string, std::string>, int64_t>* best = nullptr;
    for (const auto& entry : pairs) {
      if (best == nullptr || entry.second > best->second) {
        best = &entry;
      }
    }
    if (best == nullptr) {
      break;  // every piece is one token
    }
    const auto [left, right] = best->first;
    const std::string joined = left + right;
    merges.push_back(left + " " + right);
    vocab[joined] = next++;
    for (Piece& piece : pieces) {
      std::vector<std::string>& parts = piece.parts;
      for (size_t i = 0; i + 1 < parts.size(); ++i) {
        if (parts[i] == left && parts[i + 1] == right) {
          parts[i] = joined;
          parts.erase(parts.begin() + static_cast<std::ptrdiff_t>(i) + 1);
        }
      }
    }
  }
  Json file;
  file["version"] = "1.0";
  file["truncation"] = nullptr;
  file["padding"] = nullptr;
  file["added_tokens"] = added;
  file["normalizer"] = nullptr;
  const Json byte_level = {{"type", "ByteLevel"},
                           {"add_prefix_space", false},
                           {"trim_offsets", true},
                           {"use_regex", false}};
  file["pre_tokenizer"] = {{"type", "Sequence"},
                           {"pretokenizers",
                            {{{"type", "Split"},
                              {"pattern", {{"Regex", kPieces}}},
                              {"behavior", "Isolated"},
                              {"invert", false}},
                             byte_level}}};
  file["post_processor"] = nullptr;
  file["decoder"] = {{"type", "ByteLevel"},
                     {"add_prefix_space", true},
                     {"trim_offsets", true},
                     {"use_regex", true}};
  file["model"] = {{"type", "BPE"},
                   {"dropout", nullptr},
                   {"unk_token", nullptr},
                   {"continuing_subword_prefix", nullptr},
                   {"end_of_word_suffix", nullptr},
                   {"fuse_unk", false},
                   {"byte_fallback", false},
                   {"ignore_merges", false},
                   {"vocab", vocab},
                   {"merges", merges}};
  Json config = {{"tokenizer_class", "PreTrainedTokenizerFast"}, {"eos_token", special.front()}};
  if (!chat_template.empty()) {
    config["chat_template"] = chat_template;
  }
  return {file.dump(1) + "\n", config.dump(1) + "\n"};
}

}  // namespace cambium
