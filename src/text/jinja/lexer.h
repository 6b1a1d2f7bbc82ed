// Template text into tokens, with the whitespace rules of trim_blocks and lstrip_blocks: a block
// tag takes the newline behind it and the blanks before it on its line; - and + at a tag override
// that.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace cambium::jinja {

enum class TokenKind {
  kData,           // text to print
  kVariableBegin,  // {{
  kVariableEnd,
  kBlockBegin,  // {%
  kBlockEnd,
  kName,
  kString,  // text: the content, escapes resolved
  kInteger,
  kFloat,
  kOperator,  // text: the operator
  kEnd,
};

struct Token {
  TokenKind kind;
  std::string text;
  int line;
};

/// The last token is kEnd. Throws Error naming the line.
std::vector<Token> tokenize(std::string_view source);

/// How a token reads in an error message.
std::string describe(const Token& token);

}  // namespace cambium::jinja
