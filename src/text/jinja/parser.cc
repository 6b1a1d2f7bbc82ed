#include "text/jinja/parser.h"

#include <array>

#include "text/jinja/expression_parser.h"

namespace cambium::jinja {
namespace {

class Parser : public ExpressionParser {
 public:
  explicit Parser(std::string_view source) : ExpressionParser(tokenize(source)) {}

  Body run() {
    Body body = statements({});
    if (current().kind != TokenKind::kEnd) {
      wrong("unexpected {}", describe(current()));
    }
    return body;
  }

 private:
  using Ends = std::initializer_list<const char*>;

  StmtPtr make(Stmt::Kind kind) const {
    auto node = std::make_unique<Stmt>();
    node->kind = kind;
    node->line = current().line;
    return node;
  }

  /// Statements up to a block tag whose name is one of `ends`; the tag's name is left to be read.
  Body statements(Ends ends) {
    const Nested nested(*this);
    const int opened_at = current().line;
    Body body;
    for (;;) {
      switch (current().kind) {
        case TokenKind::kEnd:
          if (ends.size() > 0) {
            wrong("expected {{% {} %}} for the block of line {}, got the end of the template",
                  *(ends.end() - 1), opened_at);
          }
          return body;
        case TokenKind::kData: {
          auto node = make(Stmt::Kind::kData);
          node->text = take().text;
          body.push_back(std::move(node));
          break;
        }
        case TokenKind::kVariableBegin: {
          auto node = make(Stmt::Kind::kPrint);
          take();
          node->expr = tuple(true);
          if (current().kind != TokenKind::kVariableEnd) {
            wrong("expected }}}} after the expression, got {}", describe(current()));
          }
          take();
          body.push_back(std::move(node));
          break;
        }
        default: {
          take();  // {%
          for (const char* end : ends) {
            if (at_name(end)) {
              return body;
            }
          }
          body.push_back(statement());
        }
      }
    }
  }

  void end_tag(std::string_view where) {
    if (current().kind != TokenKind::kBlockEnd) {
      wrong("expected %}} after {}, got {}", where, describe(current()));
    }
    take();
  }

  /// The body of a block up to {% end %}, which is read too.
  Body body_until(const char* end) {
    Body body = statements({end});
    take();
    end_tag(end);
    return body;
  }

  StmtPtr statement() {
    const int line = current().line;
    const std::string name = expect_name("of a block");
    StmtPtr node;
    if (name == "if") {
      node = if_block();
    } else if (name == "for") {
      node = for_block();
    } else if (name == "set") {
      node = set();
    } else if (name == "macro") {
      node = macro();
    } else if (name == "call") {
      node = call_block();
    } else if (name == "filter") {
      node = make(Stmt::Kind::kFilterBlock);
      node->filter = filters(nullptr, true);
      end_tag("filter");
      node->body = body_until("endfilter");
    } else if (name == "with") {
      node = with();
    } else if (name == "generation") {  // marks what the model wrote; prints as it stands
      node = make(Stmt::Kind::kScope);
      end_tag(name);
      node->body = body_until("endgeneration");
    } else if (name == "break" || name == "continue") {
      if (loops_ == 0) {
        wrong("{} outside of a loop", name);
      }
      node = make(name == "break" ? Stmt::Kind::kBreak : Stmt::Kind::kContinue);
      end_tag(name);
    } else {
      wrong(
          "unexpected block {:?}; expected if, for, set, macro, call, filter, with, raw, "
          "generation, break, continue or the end of an open block",
          name);
    }
    node->line = line;
    return node;
  }

  StmtPtr if_block() {
    auto node = make(Stmt::Kind::kIf);
    for (;;) {
      ExprPtr condition = tuple(false);
      end_tag("the condition");
      Body body = statements({"elif", "else", "endif"});
      node->branches.emplace_back(std::move(condition), std::move(body));
      const std::string end = take().text;
      if (end == "elif") {
        continue;
      }
      end_tag(end);
      if (end == "else") {
        node->orelse = body_until("endif");
      }
      return node;
    }
  }

  StmtPtr for_block() {
    auto node = make(Stmt::Kind::kFor);
    node->target = target(false, "in");
    if (!skip_name("in")) {
      wrong("expected in after the loop variable, got {}", describe(current()));
    }
    node->expr = tuple(false, "recursive");
    if (skip_name("if")) {
      node->test = expression();
    }
    if (at_name("recursive")) {
      wrong("recursive loops are not supported; expected a macro that calls itself");
    }
    end_tag("for");
    ++loops_;
    node->body = statements({"else", "endfor"});
    --loops_;
    const std::string end = take().text;
    end_tag(end);
    if (end == "else") {
      node->orelse = body_until("endfor");
    }
    return node;
  }

  StmtPtr set() {
    auto node = make(Stmt::Kind::kSet);
    node->target = target(true, "");
    if (skip_operator("=")) {
      node->expr = tuple(true);
      end_tag("set");
      return node;
    }
    node->kind = Stmt::Kind::kSetBlock;
    if (at_operator("|")) {
      node->filter = filters(nullptr);
    }
    end_tag("set");
    node->body = body_until("endset");
    return node;
  }

  StmtPtr macro() {
    auto node = make(Stmt::Kind::kMacro);
    node->text = expect_name("of a macro");
    parameters(*node);
    end_tag("macro");
    function_body(*node, "endmacro");
    return node;
  }

  StmtPtr call_block() {
    auto node = make(Stmt::Kind::kCall);
    if (at_operator("(")) {
      parameters(*node);
    }
    node->expr = expression();
    if (node->expr->kind != Expr::Kind::kCall) {
      wrong("expected a call of a macro in the call block");
    }
    end_tag("call");
    function_body(*node, "endcall");
    return node;
  }

  /// A body that loops around it cannot be left from.
  void function_body(Stmt& node, const char* end) {
    const int outer = std::exchange(loops_, 0);
    const bool varargs = std::exchange(saw_varargs_, false);
    const bool kwargs = std::exchange(saw_kwargs_, false);
    const bool caller = std::exchange(saw_caller_, false);
    node.body = body_until(end);
    node.takes_varargs = std::exchange(saw_varargs_, varargs);
    node.takes_kwargs = std::exchange(saw_kwargs_, kwargs);
    node.takes_caller = std::exchange(saw_caller_, caller);
    loops_ = outer;
  }

  void parameters(Stmt& node) {
    expect_operator("(", "before the parameters");
    while (!at_operator(")")) {
      Parameter parameter;
      parameter.name = expect_name("of a parameter");
      if (skip_operator("=")) {
        parameter.fallback = expression();
      } else if (!node.parameters.empty() && node.parameters.back().fallback) {
        wrong("expected a default for {:?}, because the parameter before it has one",
              parameter.name);
      }
      node.parameters.push_back(std::move(parameter));
      if (!at_operator(")")) {
        expect_operator(",", "between parameters");
      }
    }
    take();
  }

  StmtPtr with() {
    auto node = make(Stmt::Kind::kWith);
    while (current().kind != TokenKind::kBlockEnd) {
      if (!node->assignments.empty()) {
        expect_operator(",", "between assignments");
      }
      Target name = target(false, "");
      expect_operator("=", "after the name");
      node->assignments.emplace_back(std::move(name), expression());
    }
    end_tag("with");
    node->body = body_until("endwith");
    return node;
  }

  /// `a`, `ns.a`, or names with commas; `stop` is the name behind it.
  Target target(bool with_namespace, std::string_view stop) {
    Target whole;
    whole.kind = Target::Kind::kTuple;
    bool comma = false;
    do {
      if (!whole.parts.empty() &&
          (at_operator("=") || at_operator(")") || (!stop.empty() && at_name(stop)))) {
        comma = true;
        break;
      }
      whole.parts.push_back(single_target(with_namespace));
      comma = skip_operator(",");
    } while (comma);
    if (whole.parts.size() == 1 && !comma) {
      return std::move(whole.parts[0]);
    }
    return whole;
  }

  Target single_target(bool with_namespace) {
    const Nested nested(*this);
    if (skip_operator("(")) {
      Target inner = target(with_namespace, "");
      expect_operator(")", "after the names");
      return inner;
    }
    Target one;
    one.name = expect_name("to assign to");
    for (const char* reserved : {"true", "false", "none", "True", "False", "None"}) {
      if (one.name == reserved) {
        wrong("cannot assign to {}", one.name);
      }
    }
    if (with_namespace && skip_operator(".")) {
      one.kind = Target::Kind::kAttribute;
      one.attribute = expect_name("of the namespace's attribute");
    }
    return one;
  }

  int loops_ = 0;
};

}  // namespace

Body parse(std::string_view source) {
  return Parser(source).run();
}

}  // namespace cambium::jinja
