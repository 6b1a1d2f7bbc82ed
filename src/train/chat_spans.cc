#include "train/chat_spans.h"

#include <algorithm>
#include <map>
#include <optional>

#include "base/error.h"

namespace cambium {
namespace {

using Json = nlohmann::ordered_json;

// A mark is kOpen, the message's number in digits from kDigits on, kClose: characters of the
// private use area, each of three bytes.
constexpr std::string_view kOpen = "\uF5A0";
constexpr std::string_view kClose = "\uF5A1";
constexpr std::string_view kDigits[] = {"\uF5B0", "\uF5B1", "\uF5B2", "\uF5B3", "\uF5B4",
                                        "\uF5B5", "\uF5B6", "\uF5B7", "\uF5B8", "\uF5B9"};
constexpr size_t kCharBytes = 3;
constexpr const char* kSpace = " \t\r\n";
// Renderings of beginnings, one by one, take time that grows with the square of their number.
constexpr size_t kMaxTurnsOneByOne = 200;

std::string mark_of(size_t message) {
  std::string mark(kOpen);
  for (const char digit : std::to_string(message)) {
    mark += kDigits[digit - '0'];
  }
  return mark + std::string(kClose);
}

/// The conversation's messages up to `count`, each content with its mark before the white space
/// that ends it (templates like to trim). False when a content cannot carry one.
bool mark_contents(const Json& messages, size_t count, Json& marked) {
  marked = Json::array();
  for (size_t i = 0; i < count; ++i) {
    Json message = messages[i];
    const auto content = message.find("content");
    if (content == message.end() || !content->is_string()) {
      return false;
    }
    auto text = content->get<std::string>();
    const size_t last = text.find_last_not_of(kSpace);
    text.insert(last == std::string::npos ? 0 : last + 1, mark_of(i));
    *content = text;
    marked.push_back(std::move(message));
  }
  return true;
}

/// A rendering without its marks, and where they stood.
struct Unmarked {
  std::string text;
  std::vector<std::pair<size_t, size_t>> ends;  // message, place in `text`
};

std::optional<Unmarked> take_marks(const std::string& marked) {
  Unmarked out;
  size_t done = 0;
  for (size_t at = marked.find(kOpen); at != std::string::npos; at = marked.find(kOpen, done)) {
    out.text += std::string_view(marked).substr(done, at - done);
    size_t message = 0;
    size_t next = at + kCharBytes;
    while (std::string_view(marked).substr(next, kCharBytes) != kClose) {
      const auto* const digit = std::find(std::begin(kDigits), std::end(kDigits),
                                          std::string_view(marked).substr(next, kCharBytes));
      if (digit == std::end(kDigits)) {
        return std::nullopt;  // the template cut a mark apart
      }
      message = message * 10 + static_cast<size_t>(digit - std::begin(kDigits));
      next += kCharBytes;
    }
    out.ends.emplace_back(message, out.text.size());
    done = next + kCharBytes;
  }
  out.text += std::string_view(marked).substr(done);
  return out;
}

size_t common_prefix(std::string_view a, std::string_view b) {
  return static_cast<size_t>(std::mismatch(a.begin(), a.end(), b.begin(), b.end()).first -
                             a.begin());
}

bool is_assistant(const Json& message) {
  return message["role"] == "assistant";
}

class ChatRenderer {
 public:
  ChatRenderer(const Tokenizer& tokenizer, const Conversation& conversation)
      : tokenizer_(tokenizer), chat_(conversation) {}

  RenderedChat run() {
    RenderedChat out;
    out.text = render(chat_.messages, false);
    for (size_t i = 0; i < chat_.messages.size(); ++i) {
      if (is_assistant(chat_.messages[i])) {
        out.messages.push_back(i);
      }
    }
    if (!out.messages.empty() && !find_by_marks(out)) {
      find_one_by_one(out);
    }
    return out;
  }

 private:
  std::string render(const Json& messages, bool ask) const {
    return tokenizer_.apply_chat_template(messages.dump(), chat_.tools, ask, chat_.variables);
  }

  /// White space that ends a message's content.
  std::string_view tail_of(size_t message) const {
    const std::string_view content =
        chat_.messages[message]["content"].get_ref<const std::string&>();
    const size_t last = content.find_last_not_of(kSpace);
    return content.substr(last == std::string_view::npos ? 0 : last + 1);
  }

  /// What stands behind a message's content, whose mark was at `place` of a rendering.
  std::string_view behind_content(std::string_view text, size_t place, size_t message) const {
    text.remove_prefix(place);
    const std::string_view tail = tail_of(message);
    return text.starts_with(tail) ? text.substr(tail.size()) : text;
  }

  /// What the template writes behind the content of `message` when nothing follows it: the end of
  /// the turn, and with `ask` what stands before an answer. Nothing when the mark got lost.
  std::optional<std::string> write_behind(size_t message, bool ask) const {
    Json marked;
    if (!mark_contents(chat_.messages, message + 1, marked)) {
      return std::nullopt;
    }
    const std::optional<Unmarked> found = take_marks(render(marked, ask));
    if (!found || found->ends.empty() || found->ends.back().first != message) {
      return std::nullopt;
    }
    return std::string(behind_content(found->text, found->ends.back().second, message));
  }

  /// Fills out.turns; false when the template does not carry the marks through.
  bool find_by_marks(RenderedChat& out) const {
    try {
      Json marked;
      if (out.text.find(kOpen) != std::string::npos ||
          !mark_contents(chat_.messages, chat_.messages.size(), marked)) {
        return false;
      }
      const std::optional<Unmarked> found = take_marks(render(marked, false));
      return found && found->text == out.text && find_turns(*found, out);
    } catch (const Error&) {
      return false;  // it refuses the marks, or a conversation that ends early
    }
  }

  bool find_turns(const Unmarked& found, RenderedChat& out) const {
    std::map<size_t, size_t> ends;  // of each content in the text; the last place where it stands
    for (const auto& [message, place] : found.ends) {
      ends[message] = place;
    }
    std::map<std::string, std::string> asks;  // by the role of the message before
    std::optional<std::string> close;
    std::vector<TextSpan> turns;
    const std::string_view text = out.text;
    for (const size_t i : out.messages) {
      if (i == 0 || !ends.contains(i) || !ends.contains(i - 1) || ends[i] < ends[i - 1]) {
        return false;
      }
      const std::string role = chat_.messages[i - 1]["role"].dump();
      if (!asks.contains(role)) {
        const std::optional<std::string> ask = write_behind(i - 1, true);
        if (!ask) {
          return false;
        }
        asks[role] = *ask;
      }
      if (!close) {
        close = write_behind(i, false);
        if (!close) {
          return false;
        }
      }
      const std::string_view header = behind_content(text.substr(0, ends[i]), ends[i - 1], i - 1);
      const std::string_view rest = behind_content(text, ends[i], i);
      const size_t begin = ends[i] - header.size() + common_prefix(header, asks[role]);
      const bool last = i + 1 == chat_.messages.size();
      const size_t end =
          last ? text.size() : text.size() - rest.size() + common_prefix(rest, *close);
      if (!turns.empty() && begin < turns.back().end) {
        return false;
      }
      turns.push_back({begin, end});
    }
    out.turns = std::move(turns);
    return true;
  }

  /// Each turn between the rendering of what stands before it, asking for an answer, and the
  /// rendering that ends with it. Both must begin the whole; where the template writes the last
  /// turn only as its own rendering has it, that one is learned.
  void find_one_by_one(RenderedChat& out) const {
    expect(out.messages.size() <= kMaxTurnsOneByOne,
           "the conversation has {} turns of the assistant, and the chat template does not show "
           "where they stand in it; give shorter conversations",
           out.messages.size());
    std::vector<TextSpan> turns;
    std::vector<size_t> messages;
    size_t odd = 0;
    for (const size_t i : out.messages) {
      Json so_far(chat_.messages.begin(), chat_.messages.begin() + static_cast<ptrdiff_t>(i));
      const std::string before = render(so_far, true);
      so_far.push_back(chat_.messages[i]);
      const std::string after = render(so_far, false);
      const size_t done = turns.empty() ? 0 : turns.back().end;
      const bool last = i + 1 == chat_.messages.size();
      if (out.text.starts_with(before) && out.text.starts_with(after) && done <= before.size() &&
          before.size() <= after.size()) {
        turns.push_back({before.size(), after.size()});
        messages.push_back(i);
      } else if (last && after == out.text) {
        // A prompt that opens a thought, which the conversation's own rendering does not have.
        turns.push_back({std::max(done, common_prefix(before, out.text)), out.text.size()});
        messages.push_back(i);
      } else {
        odd = odd == 0 ? i + 1 : odd;
      }
    }
    const bool last_found = !messages.empty() && messages.back() + 1 == chat_.messages.size();
    expect(odd == 0 || last_found,
           "the chat template writes turn {} differently when more turns follow, so the "
           "assistant's tokens cannot be told; give one conversation per turn",
           odd);
    if (odd > 0) {
      turns = {turns.back()};
      messages = {messages.back()};
    }
    out.turns = std::move(turns);
    out.messages = std::move(messages);
  }

  const Tokenizer& tokenizer_;
  const Conversation& chat_;
};

}  // namespace

RenderedChat render_chat(const Tokenizer& tokenizer, const Conversation& conversation) {
  return ChatRenderer(tokenizer, conversation).run();
}

}  // namespace cambium
