// tokenizer.json and its like as a GGUF file's metadata.
#pragma once

#include <filesystem>
#include <string>

#include "files/gguf_writer.h"
#include "model/spec.h"

namespace cambium {

/// Tokens, their types, merges, special tokens and the chat template of the folder's byte-level BPE
/// tokenizer; rows of the embedding without a token are unused ones. Without a tokenizer.json:
/// none. `pre` names how text is cut in place of what tokenizer.json says. Error that says what
/// cannot be expressed.
void put_tokenizer(GgufKeys& keys, const std::filesystem::path& folder, const ModelSpec& spec,
                   const std::string& pre);

}  // namespace cambium
