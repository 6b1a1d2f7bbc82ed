// The expression half of the parser.
#pragma once

#include <fmt/format.h>

#include <initializer_list>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/error.h"
#include "text/jinja/ast.h"
#include "text/jinja/lexer.h"

namespace cambium::jinja {

class ExpressionParser {
 public:
  explicit ExpressionParser(std::vector<Token> tokens) : tokens_(std::move(tokens)) {}

 protected:
  /// Bounds the recursion of the parser and the depth of its trees.
  static constexpr int kMaxDepth = 200;

  class Nested {
   public:
    explicit Nested(ExpressionParser& parser) : parser_(parser) {
      if (++parser_.nesting_ > kMaxDepth) {
        parser_.wrong("the template is nested more than {} deep", kMaxDepth);
      }
    }
    ~Nested() { --parser_.nesting_; }
    Nested(const Nested&) = delete;
    Nested& operator=(const Nested&) = delete;

   private:
    ExpressionParser& parser_;
  };

  template <class... Args>
  [[noreturn]] void wrong(fmt::format_string<Args...> what, Args&&... args) const {
    fail("[chat_template] line {}: {}", current().line,
         fmt::format(what, std::forward<Args>(args)...));
  }

  const Token& current() const { return tokens_[at_]; }
  const Token& ahead() const { return tokens_[at_ + (at_ + 1 < tokens_.size() ? 1 : 0)]; }
  Token take() { return tokens_[at_ + 1 < tokens_.size() ? at_++ : at_]; }
  bool at_operator(std::string_view op) const {
    return current().kind == TokenKind::kOperator && current().text == op;
  }
  bool at_name(std::string_view name) const {
    return current().kind == TokenKind::kName && current().text == name;
  }
  bool skip_operator(std::string_view op);
  bool skip_name(std::string_view name);
  void expect_operator(std::string_view op, std::string_view where);
  std::string expect_name(std::string_view where);
  bool at_tag_end() const {
    return current().kind == TokenKind::kVariableEnd || current().kind == TokenKind::kBlockEnd;
  }

  ExprPtr expression(bool with_condition = true);
  /// One expression, or several with commas as a tuple. `stop`: a name that ends it.
  ExprPtr tuple(bool with_condition, std::string_view stop = {});
  /// `| name(...)` and further filters; `node` null in a filter block, where the first | is left
  /// out.
  ExprPtr filters(ExprPtr node, bool first_without_pipe = false);
  ExprPtr postfix(ExprPtr node);
  ExprPtr primary();

  size_t at_ = 0;
  // Names met since a macro began.
  bool saw_varargs_ = false;
  bool saw_kwargs_ = false;
  bool saw_caller_ = false;

 private:
  ExprPtr make(Expr::Kind kind, std::string name = {}) const;
  ExprPtr make(Expr::Kind kind, std::string name, ExprPtr a, ExprPtr b = nullptr) const;
  /// Bounds the depth of `node`'s tree.
  ExprPtr checked(ExprPtr node) const;
  ExprPtr condition();
  ExprPtr disjunction();
  ExprPtr conjunction();
  ExprPtr negation();
  ExprPtr comparison();
  ExprPtr sum();
  ExprPtr concat();
  ExprPtr product();
  ExprPtr power();
  ExprPtr unary(bool with_filter = true);
  ExprPtr chain(ExprPtr (ExpressionParser::*operand)(), std::initializer_list<const char*> ops);
  ExprPtr filters_and_tests(ExprPtr node);
  ExprPtr test(ExprPtr node);
  ExprPtr subscript(ExprPtr node);
  ExprPtr call(ExprPtr node);
  void call_arguments(Expr& node);
  ExprPtr parenthesised();
  ExprPtr list_literal();
  ExprPtr dict_literal();

  std::vector<Token> tokens_;
  int nesting_ = 0;
};

}  // namespace cambium::jinja
