#include "text/jinja/interpreter.h"

#include <algorithm>
#include <utility>

#include "base/error.h"
#include "text/jinja/runtime.h"

namespace cambium::jinja {
namespace {

/// Macros made in macros can build chains of scopes longer than the program ever nests.
constexpr int kMaxScopes = 1000;

struct Scope {
  std::shared_ptr<Scope> parent;
  int depth = 0;
  std::vector<std::pair<std::string, Value>> variables;

  const Value* find(std::string_view name) const {
    for (const Scope* scope = this; scope != nullptr; scope = scope->parent.get()) {
      for (const auto& [key, value] : scope->variables) {
        if (key == name) {
          return &value;
        }
      }
    }
    return nullptr;
  }

  void set(const std::string& name, Value value) {
    for (auto& [key, old] : variables) {
      if (key == name) {
        old = std::move(value);
        return;
      }
    }
    variables.emplace_back(name, std::move(value));
  }
};

enum class Flow { kNext, kBreak, kContinue };

class Interpreter {
 public:
  explicit Interpreter(std::shared_ptr<Scope> root) : scope_(std::move(root)) {}
  Interpreter(const Interpreter&) = delete;
  Interpreter& operator=(const Interpreter&) = delete;

  /// Macros hold the scope they were made in, which holds them: taken apart here.
  ~Interpreter() {
    for (const auto& scope : captured_) {
      scope->variables.clear();
    }
  }

  std::string run(const Body& body) {
    try {
      execute(body);
    } catch (const Error& e) {
      fail("[chat_template] line {}: {}", line_, e.what());
    }
    return std::move(out_);
  }

 private:
  /// Counts nesting, so that deep recursion is an error and not an overflow.
  class Nested {
   public:
    explicit Nested(Interpreter& interpreter) : depth_(interpreter.depth_) {
      expect(++depth_ <= Budget::kDepth, "the template recurses more than {} deep", Budget::kDepth);
    }
    ~Nested() { --depth_; }
    Nested(const Nested&) = delete;
    Nested& operator=(const Nested&) = delete;

   private:
    int& depth_;
  };

  /// A scope for the time of its life.
  class Inner {
   public:
    Inner(Interpreter& interpreter, std::shared_ptr<Scope> parent)
        : interpreter_(interpreter), outer_(interpreter.scope_) {
      auto fresh = std::make_shared<Scope>();
      fresh->depth = parent->depth + 1;
      expect(fresh->depth <= kMaxScopes, "scopes are nested more than {} deep", kMaxScopes);
      fresh->parent = std::move(parent);
      interpreter.scope_ = std::move(fresh);
    }
    explicit Inner(Interpreter& interpreter) : Inner(interpreter, interpreter.scope_) {}
    ~Inner() { interpreter_.scope_ = std::move(outer_); }
    Inner(const Inner&) = delete;
    Inner& operator=(const Inner&) = delete;

   private:
    Interpreter& interpreter_;
    std::shared_ptr<Scope> outer_;
  };

  void print(std::string_view text) {
    out_ += text;
    expect(out_.size() <= static_cast<size_t>(Budget::kOutput),
           "the template prints more than {} MiB", Budget::kOutput >> 20);
  }

  /// What `body` prints, in a scope of its own.
  std::string capture(const Body& body) {
    std::string outer = std::exchange(out_, {});
    try {
      const Inner inner(*this);
      execute(body);
    } catch (...) {
      out_ = std::move(outer);
      throw;
    }
    runtime_.budget.bytes(out_.size());
    return std::exchange(out_, std::move(outer));
  }

  Flow execute(const Body& body) {
    const Nested nested(*this);
    for (const StmtPtr& statement : body) {
      const Flow flow = execute(*statement);
      if (flow != Flow::kNext) {
        return flow;
      }
    }
    return Flow::kNext;
  }

  Flow execute(const Stmt& node) {
    runtime_.budget.step();
    line_ = node.line;
    switch (node.kind) {
      case Stmt::Kind::kData:
        print(node.text);
        break;
      case Stmt::Kind::kPrint: {
        const Value value = evaluate(*node.expr);
        value.is_string() ? print(value.as_string()) : print(runtime_.str(value));
        break;
      }
      case Stmt::Kind::kIf:
        return execute_if(node);
      case Stmt::Kind::kFor:
        execute_for(node, evaluate(*node.expr), 0);
        break;
      case Stmt::Kind::kSet:
        assign(node.target, evaluate(*node.expr));
        break;
      case Stmt::Kind::kSetBlock:
        assign(node.target, filtered(node, capture(node.body)));
        break;
      case Stmt::Kind::kMacro:
        scope_->set(node.text, macro(node, node.text));
        break;
      case Stmt::Kind::kCall:
        execute_call(node);
        break;
      case Stmt::Kind::kFilterBlock:
        print(runtime_.str(filtered(node, capture(node.body))));
        break;
      case Stmt::Kind::kWith:
        return execute_with(node);
      case Stmt::Kind::kScope: {
        const Inner inner(*this);
        return execute(node.body);
      }
      case Stmt::Kind::kBreak:
        return Flow::kBreak;
      case Stmt::Kind::kContinue:
        return Flow::kContinue;
    }
    return Flow::kNext;
  }

  Flow execute_if(const Stmt& node) {
    for (const auto& [condition, body] : node.branches) {
      if (evaluate(*condition).truth()) {
        return execute(body);
      }
    }
    return execute(node.orelse);
  }

  Flow execute_with(const Stmt& node) {
    std::vector<Value> values;
    for (const auto& [target, expr] : node.assignments) {
      values.push_back(evaluate(*expr));
    }
    const Inner inner(*this);
    for (size_t i = 0; i < values.size(); ++i) {
      assign(node.assignments[i].first, std::move(values[i]));
    }
    return execute(node.body);
  }

  void execute_for(const Stmt& node, const Value& over, int depth) {
    auto items = std::make_shared<List>();
    items->items = runtime_.iterate(over);
    if (node.test) {
      std::vector<Value> kept;
      for (Value& item : items->items) {
        const Inner inner(*this);
        assign(node.target, item);
        if (evaluate(*node.test).truth()) {
          kept.push_back(std::move(item));
        }
      }
      items->items = std::move(kept);
    }
    const auto changed = std::make_shared<std::vector<Value>>();
    for (size_t i = 0; i < items->items.size(); ++i) {
      runtime_.budget.step();
      const Inner inner(*this);
      assign(node.target, items->items[i]);
      auto loop = std::make_shared<Loop>();
      loop->items = items;
      loop->index = i;
      loop->depth = depth;
      loop->changed = changed;
      scope_->set("loop", Value::Data(std::shared_ptr<const Loop>(std::move(loop))));
      if (execute(node.body) == Flow::kBreak) {
        return;
      }
    }
    if (items->items.empty()) {
      const Inner inner(*this);
      execute(node.orelse);
    }
  }

  void execute_call(const Stmt& node) {
    const Value caller = macro(node, "caller");
    const Value callee = evaluate(*node.expr->args[0]);
    Args args = arguments(*node.expr);
    args.named.emplace_back("caller", caller);
    line_ = node.line;
    print(runtime_.str(runtime_.call(callee, args)));
  }

  Value filtered(const Stmt& node, std::string text) {
    block_text_ = Value(std::move(text));
    return node.filter ? evaluate(*node.filter) : block_text_;
  }

  void assign(const Target& target, Value value) {
    switch (target.kind) {
      case Target::Kind::kName:
        scope_->set(target.name, std::move(value));
        break;
      case Target::Kind::kAttribute: {
        const Value* found = scope_->find(target.name);
        const auto space = found == nullptr ? nullptr : found->get_if<Namespace>();
        expect(space != nullptr, "cannot assign to {}.{}: expected a namespace, got a {}",
               target.name, target.attribute,
               found == nullptr ? "name without a value" : found->type_name());
        space->values.set(target.attribute, std::move(value));
        break;
      }
      case Target::Kind::kTuple: {
        std::vector<Value> parts = runtime_.iterate(value);
        expect(parts.size() == target.parts.size(), "expected {} values to unpack, got {}",
               target.parts.size(), parts.size());
        for (size_t i = 0; i < parts.size(); ++i) {
          assign(target.parts[i], std::move(parts[i]));
        }
      }
    }
  }

  Value macro(const Stmt& node, const std::string& name) {
    if (captured_.empty() || captured_.back() != scope_) {
      captured_.push_back(scope_);
    }
    auto callable = std::make_shared<Callable>();
    callable->name = name;
    callable->call = [this, &node, name, scope = scope_](Runtime&, const Args& args) {
      return call_macro(node, name, scope, args);
    };
    return Value::Data(std::shared_ptr<const Callable>(std::move(callable)));
  }

  Value call_macro(const Stmt& node, const std::string& name, const std::shared_ptr<Scope>& made_in,
                   const Args& args) {
    const Nested nested(*this);
    std::string outer = std::exchange(out_, {});
    try {
      const Inner inner(*this, made_in);
      bind_parameters(node, name, args);
      execute(node.body);
    } catch (...) {
      out_ = std::move(outer);
      throw;
    }
    runtime_.budget.bytes(out_.size());
    return Value(std::exchange(out_, std::move(outer)));
  }

  void bind_parameters(const Stmt& node, const std::string& name, const Args& args) {
    std::vector<bool> bound(args.named.size(), false);
    for (size_t i = 0; i < node.parameters.size(); ++i) {
      const Parameter& parameter = node.parameters[i];
      const auto named = std::find_if(args.named.begin(), args.named.end(),
                                      [&](const auto& arg) { return arg.first == parameter.name; });
      if (named != args.named.end()) {
        expect(i >= args.positional.size(), "macro {} got {:?} twice", name, parameter.name);
        bound[static_cast<size_t>(named - args.named.begin())] = true;
        scope_->set(parameter.name, named->second);
      } else if (i < args.positional.size()) {
        scope_->set(parameter.name, args.positional[i]);
      } else if (parameter.fallback) {
        scope_->set(parameter.name, evaluate(*parameter.fallback));
      } else {
        scope_->set(parameter.name, Value::undefined("parameter " + parameter.name));
      }
    }
    std::vector<Value> rest;
    for (size_t i = node.parameters.size(); i < args.positional.size(); ++i) {
      rest.push_back(args.positional[i]);
    }
    expect(rest.empty() || node.takes_varargs, "macro {} takes at most {} arguments, got {}", name,
           node.parameters.size(), args.positional.size());
    scope_->set("varargs", Value::list(std::move(rest), List::Kind::kTuple));
    Dict more;
    for (size_t i = 0; i < args.named.size(); ++i) {
      const bool caller = args.named[i].first == "caller";
      expect(bound[i] || (caller ? node.takes_caller : node.takes_kwargs),
             "macro {} has no parameter {:?}", name, args.named[i].first);
      if (caller && !bound[i]) {
        scope_->set("caller", args.named[i].second);
      } else if (!bound[i]) {
        more.set(args.named[i].first, args.named[i].second);
      }
    }
    scope_->set("kwargs", Value::dict(std::move(more)));
  }

  Value evaluate(const Expr& node) {
    const Nested nested(*this);
    runtime_.budget.step();
    switch (node.kind) {
      case Expr::Kind::kConstant:
        return node.value;
      case Expr::Kind::kName: {
        const Value* found = scope_->find(node.name);
        return found != nullptr ? *found : Value::undefined(node.name);
      }
      case Expr::Kind::kList:
      case Expr::Kind::kTuple:
        return evaluate_list(node);
      case Expr::Kind::kDict:
        return evaluate_dict(node);
      case Expr::Kind::kAttribute:
        return at_line(node, [&](const Value& v) { return runtime_.attribute(v, node.name); });
      case Expr::Kind::kItem:
        return evaluate_item(node);
      case Expr::Kind::kSlice:
        return evaluate_slice(node);
      case Expr::Kind::kCall:
        return evaluate_call(node);
      case Expr::Kind::kFilter:
        return apply_filter(node, node.args[0] ? evaluate(*node.args[0]) : block_text_);
      case Expr::Kind::kTest:
        return evaluate_test(node);
      case Expr::Kind::kNot:
        return !evaluate(*node.args[0]).truth();
      case Expr::Kind::kNegative:
        return at_line(node, [&](const Value& v) { return runtime_.negative(v); });
      case Expr::Kind::kPositive:
        return at_line(node, [&](const Value& v) {
          runtime_.negative(v);
          return v;
        });
      case Expr::Kind::kAnd:
      case Expr::Kind::kOr: {
        Value left = evaluate(*node.args[0]);
        const bool decided = left.truth() == (node.kind == Expr::Kind::kOr);
        return decided ? left : evaluate(*node.args[1]);
      }
      case Expr::Kind::kCondition:
        if (evaluate(*node.args[1]).truth()) {
          return evaluate(*node.args[0]);
        }
        return node.args[2] ? evaluate(*node.args[2]) : Value::undefined("the missing else");
      case Expr::Kind::kConcat:
        return evaluate_concat(node);
      case Expr::Kind::kBinary: {
        const Value left = evaluate(*node.args[0]);
        const Value right = evaluate(*node.args[1]);
        line_ = node.line;
        return runtime_.binary(node.name, left, right);
      }
      case Expr::Kind::kCompare:
        return evaluate_compare(node);
    }
    return {};
  }

  template <class Body1>
  Value at_line(const Expr& node, Body1&& body) {
    const Value value = evaluate(*node.args[0]);
    line_ = node.line;
    return body(value);
  }

  Value evaluate_list(const Expr& node) {
    std::vector<Value> items;
    for (const ExprPtr& item : node.args) {
      items.push_back(evaluate(*item));
    }
    return Value::list(std::move(items),
                       node.kind == Expr::Kind::kTuple ? List::Kind::kTuple : List::Kind::kList);
  }

  Value evaluate_dict(const Expr& node) {
    Dict dict;
    for (size_t i = 0; i + 1 < node.args.size(); i += 2) {
      Value key = evaluate(*node.args[i]);
      dict.set(std::move(key), evaluate(*node.args[i + 1]));
    }
    return Value::dict(std::move(dict));
  }

  Value evaluate_item(const Expr& node) {
    const Value object = evaluate(*node.args[0]);
    const Value key = evaluate(*node.args[1]);
    line_ = node.line;
    return runtime_.item(object, key);
  }

  Value evaluate_slice(const Expr& node) {
    const Value object = evaluate(*node.args[0]);
    Value bounds[3];
    for (size_t i = 0; i < 3; ++i) {
      bounds[i] = node.args[i + 1] ? evaluate(*node.args[i + 1]) : Value::none();
    }
    line_ = node.line;
    return runtime_.slice(object, bounds[0], bounds[1], bounds[2]);
  }

  /// The arguments of a call, filter or test; args[0] is what it applies to.
  Args arguments(const Expr& node) {
    Args args;
    for (size_t i = 1; i < node.args.size(); ++i) {
      args.positional.push_back(evaluate(*node.args[i]));
    }
    for (const auto& [name, expr] : node.named) {
      args.named.emplace_back(name, evaluate(*expr));
    }
    if (node.star) {
      const std::vector<Value> more = runtime_.iterate(evaluate(*node.star));
      args.positional.insert(args.positional.end(), more.begin(), more.end());
    }
    if (node.double_star) {
      const Value more = evaluate(*node.double_star);
      expect(more.is_dict(), "expected a mapping after **, got a {}", more.type_name());
      for (const auto& [key, value] : more.as_dict().items()) {
        args.named.emplace_back(expect_string(key, "**"), value);
      }
    }
    return args;
  }

  Value evaluate_call(const Expr& node) {
    const Value callee = evaluate(*node.args[0]);
    const Args args = arguments(node);
    line_ = node.line;
    return runtime_.call(callee, args);
  }

  Value apply_filter(const Expr& node, Value value) {
    const Args args = arguments(node);
    line_ = node.line;
    return runtime_.filter(node.name, value, args);
  }

  Value evaluate_test(const Expr& node) {
    const Value value = evaluate(*node.args[0]);
    const Args args = arguments(node);
    line_ = node.line;
    return runtime_.test(node.name, value, args);
  }

  Value evaluate_concat(const Expr& node) {
    std::string text;
    for (const ExprPtr& part : node.args) {
      text += runtime_.str(evaluate(*part));
    }
    return runtime_.text(std::move(text));
  }

  Value evaluate_compare(const Expr& node) {
    Value left = evaluate(*node.args[0]);
    for (size_t i = 0; i < node.ops.size(); ++i) {
      Value right = evaluate(*node.args[i + 1]);
      line_ = node.line;
      if (!compare(node.ops[i], left, right)) {
        return false;
      }
      left = std::move(right);
    }
    return true;
  }

  bool compare(const std::string& op, const Value& a, const Value& b) {
    Budget& budget = runtime_.budget;
    if (op == "==") {
      return equal(a, b, budget);
    }
    if (op == "!=") {
      return !equal(a, b, budget);
    }
    if (op == "in") {
      return runtime_.contains(b, a);
    }
    if (op == "not in") {
      return !runtime_.contains(b, a);
    }
    if (op == "<" || op == ">=") {
      return (op == "<") == less(a, b, budget);
    }
    return (op == ">") == less(b, a, budget);
  }

  Runtime runtime_;
  std::shared_ptr<Scope> scope_;
  std::vector<std::shared_ptr<Scope>> captured_;
  std::string out_;
  Value block_text_;  // what the filters of a block apply to
  int line_ = 0;
  int depth_ = 0;
};

}  // namespace

std::string render(const Body& body, const std::vector<std::pair<std::string, Value>>& variables) {
  auto globals = std::make_shared<Scope>();
  globals->variables = global_functions();
  auto given = std::make_shared<Scope>();
  given->parent = std::move(globals);
  for (const auto& [name, value] : variables) {
    given->set(name, value);
  }
  auto root = std::make_shared<Scope>();
  root->parent = std::move(given);
  return Interpreter(std::move(root)).run(body);
}

}  // namespace cambium::jinja
