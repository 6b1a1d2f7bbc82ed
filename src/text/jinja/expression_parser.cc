#include "text/jinja/expression_parser.h"

#include <algorithm>
#include <charconv>

namespace cambium::jinja {

using Kind = Expr::Kind;

bool ExpressionParser::skip_operator(std::string_view op) {
  const bool found = at_operator(op);
  at_ += found;
  return found;
}

bool ExpressionParser::skip_name(std::string_view name) {
  const bool found = at_name(name);
  at_ += found;
  return found;
}

void ExpressionParser::expect_operator(std::string_view op, std::string_view where) {
  if (!skip_operator(op)) {
    wrong("expected {} {}, got {}", op, where, describe(current()));
  }
}

std::string ExpressionParser::expect_name(std::string_view where) {
  if (current().kind != TokenKind::kName) {
    wrong("expected a name {}, got {}", where, describe(current()));
  }
  return take().text;
}

ExprPtr ExpressionParser::make(Kind kind, std::string name) const {
  auto node = std::make_unique<Expr>();
  node->kind = kind;
  node->line = current().line;
  node->name = std::move(name);
  return node;
}

ExprPtr ExpressionParser::make(Kind kind, std::string name, ExprPtr a, ExprPtr b) const {
  auto node = make(kind, std::move(name));
  if (a) {
    node->line = a->line;
  }
  node->args.push_back(std::move(a));
  if (b) {
    node->args.push_back(std::move(b));
  }
  return checked(std::move(node));
}

ExprPtr ExpressionParser::checked(ExprPtr node) const {
  const auto below = [&](const ExprPtr& part) {
    if (part) {
      node->depth = std::max(node->depth, part->depth + 1);
    }
  };
  std::for_each(node->args.begin(), node->args.end(), below);
  for (const auto& [name, part] : node->named) {
    below(part);
  }
  below(node->star);
  below(node->double_star);
  if (node->depth > kMaxDepth) {
    wrong("the expression is nested more than {} deep", kMaxDepth);
  }
  return node;
}

ExprPtr ExpressionParser::expression(bool with_condition) {
  const Nested nested(*this);
  return with_condition ? condition() : disjunction();
}

ExprPtr ExpressionParser::tuple(bool with_condition, std::string_view stop) {
  auto node = make(Kind::kTuple);
  bool comma = false;
  while (!at_tag_end() && !at_operator(")") && !(!stop.empty() && at_name(stop))) {
    node->args.push_back(expression(with_condition));
    comma = skip_operator(",");
    if (!comma) {
      break;
    }
  }
  if (node->args.empty()) {
    wrong("expected an expression, got {}", describe(current()));
  }
  if (node->args.size() == 1 && !comma) {
    return std::move(node->args[0]);
  }
  return checked(std::move(node));
}

ExprPtr ExpressionParser::condition() {
  ExprPtr node = disjunction();
  while (skip_name("if")) {
    auto whole = make(Kind::kCondition);
    ExprPtr test = disjunction();
    ExprPtr other = skip_name("else") ? expression() : nullptr;
    whole->args.push_back(std::move(node));
    whole->args.push_back(std::move(test));
    whole->args.push_back(std::move(other));
    node = checked(std::move(whole));
  }
  return node;
}

ExprPtr ExpressionParser::disjunction() {
  ExprPtr node = conjunction();
  while (skip_name("or")) {
    ExprPtr right = conjunction();
    node = make(Kind::kOr, {}, std::move(node), std::move(right));
  }
  return node;
}

ExprPtr ExpressionParser::conjunction() {
  ExprPtr node = negation();
  while (skip_name("and")) {
    ExprPtr right = negation();
    node = make(Kind::kAnd, {}, std::move(node), std::move(right));
  }
  return node;
}

ExprPtr ExpressionParser::negation() {
  if (at_name("not")) {
    const Nested nested(*this);
    take();
    return make(Kind::kNot, {}, negation());
  }
  return comparison();
}

ExprPtr ExpressionParser::comparison() {
  auto node = make(Kind::kCompare);
  node->args.push_back(sum());
  node->line = node->args[0]->line;
  for (;;) {
    std::string op;
    for (const char* symbol : {"==", "!=", "<=", ">=", "<", ">"}) {
      if (at_operator(symbol)) {
        op = symbol;
      }
    }
    if (!op.empty()) {
      take();
    } else if (skip_name("in")) {
      op = "in";
    } else if (at_name("not") && ahead().kind == TokenKind::kName && ahead().text == "in") {
      at_ += 2;
      op = "not in";
    } else {
      break;
    }
    node->ops.push_back(op);
    node->args.push_back(sum());
  }
  return node->ops.empty() ? std::move(node->args[0]) : checked(std::move(node));
}

ExprPtr ExpressionParser::chain(ExprPtr (ExpressionParser::*operand)(),
                                std::initializer_list<const char*> ops) {
  ExprPtr node = (this->*operand)();
  for (;;) {
    const auto op = std::find_if(ops.begin(), ops.end(),
                                 [&](const char* symbol) { return at_operator(symbol); });
    if (op == ops.end()) {
      return node;
    }
    take();
    ExprPtr right = (this->*operand)();
    node = make(Kind::kBinary, *op, std::move(node), std::move(right));
  }
}

ExprPtr ExpressionParser::sum() {
  return chain(&ExpressionParser::concat, {"+", "-"});
}

ExprPtr ExpressionParser::concat() {
  ExprPtr node = product();
  if (!at_operator("~")) {
    return node;
  }
  auto whole = make(Kind::kConcat);
  whole->args.push_back(std::move(node));
  while (skip_operator("~")) {
    whole->args.push_back(product());
  }
  return checked(std::move(whole));
}

ExprPtr ExpressionParser::product() {
  return chain(&ExpressionParser::power, {"*", "/", "//", "%"});
}

ExprPtr ExpressionParser::power() {
  ExprPtr node = unary();
  while (skip_operator("**")) {
    ExprPtr right = unary();
    node = make(Kind::kBinary, "**", std::move(node), std::move(right));
  }
  return node;
}

ExprPtr ExpressionParser::unary(bool with_filter) {
  const Nested nested(*this);
  ExprPtr node;
  if (skip_operator("-")) {
    node = make(Kind::kNegative, {}, unary(false));
  } else if (skip_operator("+")) {
    node = make(Kind::kPositive, {}, unary(false));
  } else {
    node = primary();
  }
  node = postfix(std::move(node));
  return with_filter ? filters_and_tests(std::move(node)) : std::move(node);
}

ExprPtr ExpressionParser::postfix(ExprPtr node) {
  for (;;) {
    if (at_operator(".") || at_operator("[")) {
      node = subscript(std::move(node));
    } else if (at_operator("(")) {
      node = call(std::move(node));
    } else {
      return node;
    }
  }
}

ExprPtr ExpressionParser::filters_and_tests(ExprPtr node) {
  for (;;) {
    if (at_operator("|")) {
      node = filters(std::move(node));
    } else if (at_name("is")) {
      node = test(std::move(node));
    } else if (at_operator("(")) {
      node = call(std::move(node));
    } else {
      return node;
    }
  }
}

ExprPtr ExpressionParser::filters(ExprPtr node, bool first_without_pipe) {
  while (first_without_pipe || skip_operator("|")) {
    first_without_pipe = false;
    auto filter = make(Kind::kFilter);
    filter->name = expect_name("of a filter");
    while (skip_operator(".")) {
      filter->name += "." + expect_name("of a filter");
    }
    filter->args.push_back(std::move(node));
    if (at_operator("(")) {
      call_arguments(*filter);
    }
    node = checked(std::move(filter));
  }
  return node;
}

ExprPtr ExpressionParser::test(ExprPtr node) {
  take();  // is
  const bool negated = skip_name("not");
  auto whole = make(Kind::kTest);
  whole->name = expect_name("of a test");
  whole->args.push_back(std::move(node));
  const Token& next = current();
  const bool operand =
      next.kind == TokenKind::kString || next.kind == TokenKind::kInteger ||
      next.kind == TokenKind::kFloat || at_operator("[") || at_operator("{") ||
      (next.kind == TokenKind::kName && !at_name("else") && !at_name("or") && !at_name("and"));
  if (at_operator("(")) {
    call_arguments(*whole);
  } else if (operand) {
    if (at_name("is")) {
      wrong("expected an operator, got is; tests cannot be chained");
    }
    whole->args.push_back(postfix(primary()));
  }
  ExprPtr result = checked(std::move(whole));
  return negated ? make(Kind::kNot, {}, std::move(result)) : std::move(result);
}

ExprPtr ExpressionParser::subscript(ExprPtr node) {
  if (skip_operator(".")) {
    if (current().kind == TokenKind::kInteger) {
      auto index = make(Kind::kConstant);
      const std::string digits = take().text;
      int64_t value = 0;
      std::from_chars(digits.data(), digits.data() + digits.size(), value);
      index->value = value;
      return make(Kind::kItem, {}, std::move(node), std::move(index));
    }
    std::string name = expect_name("after the dot");
    return make(Kind::kAttribute, std::move(name), std::move(node));
  }
  expect_operator("[", "before an index");
  auto slice = make(Kind::kSlice);
  slice->args.resize(4);
  size_t part = 1;
  while (!at_operator("]")) {
    if (skip_operator(":")) {
      if (++part > 3) {
        wrong("expected ] after the slice");
      }
      continue;
    }
    if (slice->args[part]) {
      wrong("expected ] after the index, got {}", describe(current()));
    }
    slice->args[part] = expression();
  }
  expect_operator("]", "after the index");
  if (part == 1) {
    if (!slice->args[1]) {
      wrong("expected an index between [ and ]");
    }
    return make(Kind::kItem, {}, std::move(node), std::move(slice->args[1]));
  }
  slice->args[0] = std::move(node);
  return checked(std::move(slice));
}

ExprPtr ExpressionParser::call(ExprPtr node) {
  auto whole = make(Kind::kCall);
  whole->args.push_back(std::move(node));
  call_arguments(*whole);
  return checked(std::move(whole));
}

void ExpressionParser::call_arguments(Expr& node) {
  expect_operator("(", "before arguments");
  while (!at_operator(")")) {
    if (skip_operator("**")) {
      node.double_star = expression();
    } else if (skip_operator("*")) {
      node.star = expression();
    } else if (current().kind == TokenKind::kName && ahead().kind == TokenKind::kOperator &&
               ahead().text == "=") {
      std::string name = take().text;
      take();
      node.named.emplace_back(std::move(name), expression());
    } else {
      if (!node.named.empty()) {
        wrong("expected arguments by position before those by name");
      }
      node.args.push_back(expression());
    }
    if (!at_operator(")")) {
      expect_operator(",", "between arguments");
    }
  }
  take();
}

ExprPtr ExpressionParser::primary() {
  auto node = make(Kind::kConstant);
  switch (current().kind) {
    case TokenKind::kName: {
      const std::string name = take().text;
      if (name == "true" || name == "True" || name == "false" || name == "False") {
        node->value = name == "true" || name == "True";
      } else if (name == "none" || name == "None") {
        node->value = Value::none();
      } else {
        node->kind = Kind::kName;
        node->name = name;
        saw_varargs_ |= name == "varargs";
        saw_kwargs_ |= name == "kwargs";
        saw_caller_ |= name == "caller";
      }
      return node;
    }
    case TokenKind::kString: {
      std::string text;
      while (current().kind == TokenKind::kString) {  // neighbours join
        text += take().text;
      }
      node->value = std::move(text);
      return node;
    }
    case TokenKind::kInteger: {
      const std::string digits = take().text;
      const char second = digits.size() > 2 && digits[0] == '0' ? digits[1] : '0';
      const int base = second == 'x' ? 16 : second == 'o' ? 8 : second == 'b' ? 2 : 10;
      int64_t value = 0;
      const auto result = std::from_chars(digits.data() + (base == 10 ? 0 : 2),
                                          digits.data() + digits.size(), value, base);
      if (result.ec != std::errc()) {
        wrong("integer {} is too large", digits);
      }
      node->value = value;
      return node;
    }
    case TokenKind::kFloat:
      node->value = std::strtod(take().text.c_str(), nullptr);
      return node;
    default:
      if (at_operator("(")) {
        return parenthesised();
      }
      if (at_operator("[")) {
        return list_literal();
      }
      if (at_operator("{")) {
        return dict_literal();
      }
      wrong("expected an expression, got {}", describe(current()));
  }
}

ExprPtr ExpressionParser::parenthesised() {
  take();
  if (skip_operator(")")) {
    return make(Kind::kTuple);
  }
  ExprPtr inside = tuple(true);
  expect_operator(")", "after the expression");
  return inside;
}

ExprPtr ExpressionParser::list_literal() {
  take();
  auto node = make(Kind::kList);
  while (!at_operator("]")) {
    node->args.push_back(expression());
    if (!at_operator("]")) {
      expect_operator(",", "between items of a list");
    }
  }
  take();
  return checked(std::move(node));
}

ExprPtr ExpressionParser::dict_literal() {
  take();
  auto node = make(Kind::kDict);
  while (!at_operator("}")) {
    node->args.push_back(expression());
    expect_operator(":", "after a key");
    node->args.push_back(expression());
    if (!at_operator("}")) {
      expect_operator(",", "between items of a mapping");
    }
  }
  take();
  return checked(std::move(node));
}

}  // namespace cambium::jinja
