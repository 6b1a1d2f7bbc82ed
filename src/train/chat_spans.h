// What a chat template writes for the turns of the assistant, found in the rendering of the whole
// conversation: the only text a model will ever be asked to continue.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "train/token_spans.h"

namespace cambium {

/// A conversation with all that its template is given.
struct Conversation {
  nlohmann::ordered_json messages;  // an array of objects with 'role'
  std::string tools;                // a JSON array, or empty
  std::string variables;            // a JSON object of further template variables, or empty
};

struct RenderedChat {
  std::string text;
  std::vector<TextSpan> turns;   // what is learned, in order
  std::vector<size_t> messages;  // the message each belongs to
};

/// Renders the conversation once as a whole and finds each turn of the assistant in it: from behind
/// what the template writes to ask for an answer to the end of the turn. Turns that the template
/// writes otherwise once more turns follow (thoughts dropped from the history) are found as the
/// whole writes them. Error when a turn cannot be found, or the template refuses the conversation.
///
/// Time is linear in the length of the conversation: contents are marked at their ends with
/// characters that no text uses, and the marks are looked up in a second rendering. Only where the
/// template does not carry the marks through are the beginnings of the conversation rendered one by
/// one.
RenderedChat render_chat(const Tokenizer& tokenizer, const Conversation& conversation);

}  // namespace cambium
