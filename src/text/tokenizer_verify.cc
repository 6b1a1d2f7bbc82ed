#include "text/tokenizer_verify.h"

#include <nlohmann/json.hpp>
#include <optional>
#include <utility>

#include "base/error.h"
#include "base/file.h"
#include "base/json.h"
#include "text/tokenizer.h"

namespace cambium {
namespace {

using nlohmann::json;
using nlohmann::ordered_json;  // templates print mappings in the order of the file

std::string show(const json& value) {
  std::string text = value.dump(-1, ' ', false, json::error_handler_t::replace);
  constexpr size_t kMost = 400;
  return text.size() <= kMost ? text : text.substr(0, kMost) + "...";
}

constexpr const char* kSpecial = "encode with special tokens";

class Verifier {
 public:
  Verifier(Tokenizer tokenizer, size_t most) : tokenizer_(std::move(tokenizer)), most_(most) {}

  void text_case(const ordered_json& item) {
    if (item.contains("text")) {
      const auto text = item.at("text").get<std::string>();
      for (const auto& [key, special] : {std::pair{"ids", false}, {"ids_with_special", true}}) {
        if (item.contains(key)) {
          check(special ? report.encode_special : report.encode, special ? kSpecial : "encode",
                text, item.at(key), tokenizer_.encode(text, special));
          by_file_wrong_ +=
              special && item.at(key) != ordered_json(tokenizer_.encode_by_file(text)) ? 1 : 0;
        }
      }
    }
    if (item.contains("decoded")) {
      const auto ids = item.at("ids").get<std::vector<int32_t>>();
      check(report.decode, "decode", ids, item.at("decoded"), tokenizer_.decode(ids, false));
    }
  }

  void chat_case(const ordered_json& item) {
    std::optional<std::string> prompt;
    std::string refusal;
    const auto text_of = [&](const char* key) {
      return item.contains(key) && !item.at(key).is_null() ? item.at(key).dump() : std::string();
    };
    try {
      prompt = tokenizer_.apply_chat_template(text_of("messages"), text_of("tools"),
                                              item.value("add_generation_prompt", false),
                                              text_of("kwargs"));
    } catch (const Error& e) {
      refusal = e.what();
    }
    check(report.chat, "chat", item.at("messages"), item.at("prompt"),
          prompt ? json(*prompt) : json(nullptr), refusal);
  }

  TokenizerReport finish() {
    if (tokenizer_.has_config_post_processor() && report.encode_special.failed > 0 &&
        by_file_wrong_ == 0) {
      report.encode_special.failed = 0;
      std::erase_if(report.mismatches,
                    [](const std::string& line) { return line.starts_with(kSpecial); });
      report.note =
          "note: the reference was made from tokenizer.json alone; tokenizer_config.json asks for "
          "other tokens around a text (add_bos_token, add_eos_token), and these are used";
    }
    return std::move(report);
  }

  TokenizerReport report;

 private:
  void check(TokenizerCheck& kind, const char* name, const json& input, const json& expected,
             const json& got, const std::string& note = {}) {
    ++kind.total;
    if (expected == got) {
      return;
    }
    ++kind.failed;
    if (report.mismatches.size() < most_) {
      report.mismatches.push_back(fmt::format("{} of {}\n  expected {}\n  got      {}{}", name,
                                              show(input), show(expected), show(got),
                                              note.empty() ? "" : " (" + note + ")"));
    }
  }

  Tokenizer tokenizer_;
  size_t most_;
  size_t by_file_wrong_ = 0;  // with the special tokens of tokenizer.json alone
};

}  // namespace

TokenizerReport verify_tokenizer(const std::filesystem::path& dir,
                                 const std::filesystem::path& reference_file,
                                 size_t max_mismatches) {
  Verifier verifier(Tokenizer::load(dir), max_mismatches);
  try {
    const ordered_json reference =
        parse_json<ordered_json>(read_text_file(reference_file.string()), reference_file.string());
    for (const auto& item : reference.value("cases", ordered_json::array())) {
      verifier.text_case(item);
    }
    for (const auto& item : reference.value("chats", ordered_json::array())) {
      verifier.chat_case(item);
    }
  } catch (const json::exception& e) {
    fail("[tokenizer] {} does not have the shape of a reference: {}", reference_file.string(),
         json_problem(e));
  }
  return verifier.finish();
}

}  // namespace cambium
