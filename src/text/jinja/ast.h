// Templates as trees.
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "text/jinja/value.h"

namespace cambium::jinja {

struct Expr;
struct Stmt;
using ExprPtr = std::unique_ptr<Expr>;
using StmtPtr = std::unique_ptr<Stmt>;
using Body = std::vector<StmtPtr>;

struct Expr {
  enum class Kind {
    kConstant,   // value
    kName,       // name
    kList,       // args
    kTuple,      // args
    kDict,       // args: key, value, key, value, ...
    kAttribute,  // args[0].name
    kItem,       // args[0][args[1]]
    kSlice,      // args[0][args[1]:args[2]:args[3]], missing bounds null
    kCall,       // args[0](args[1..], named)
    kFilter,     // args[0] | name(args[1..], named); args[0] null in a filter block
    kTest,       // args[0] is name(args[1..], named)
    kNot,
    kNegative,
    kPositive,
    kAnd,
    kOr,
    kCondition,  // args[0] if args[1] else args[2] (may be null)
    kConcat,     // args joined by ~
    kBinary,     // args[0] name args[1], name one of + - * / // % **
    kCompare,    // args[0] ops[0] args[1] ops[1] args[2] ...
  };
  Kind kind;
  int line = 0;
  int depth = 1;  // of the tree below, bounded by the parser
  std::string name;
  Value value;
  std::vector<ExprPtr> args;
  std::vector<std::pair<std::string, ExprPtr>> named;
  std::vector<std::string> ops;
  ExprPtr star;         // *args of a call
  ExprPtr double_star;  // **kwargs of a call
};

/// What an assignment or a loop assigns to.
struct Target {
  enum class Kind { kName, kAttribute, kTuple };
  Kind kind = Kind::kName;
  std::string name;       // the variable, or the namespace
  std::string attribute;  // of the namespace
  std::vector<Target> parts;
};

struct Parameter {
  std::string name;
  ExprPtr fallback;  // null: none
};

struct Stmt {
  enum class Kind {
    kData,         // text
    kPrint,        // expr
    kIf,           // branches, orelse
    kFor,          // target in expr if test: body, orelse
    kSet,          // target = expr
    kSetBlock,     // target = body through filter (may be null)
    kMacro,        // text(parameters): body
    kCall,         // expr is the call, body with parameters is its caller
    kFilterBlock,  // body through filter
    kWith,         // assignments, body
    kScope,        // body in a scope of its own
    kBreak,
    kContinue,

  };
  Kind kind;
  int line = 0;
  std::string text;
  ExprPtr expr;
  ExprPtr test;
  ExprPtr filter;
  Target target;
  Body body;
  Body orelse;
  std::vector<std::pair<ExprPtr, Body>> branches;
  std::vector<Parameter> parameters;
  bool takes_varargs =
      false;  // a macro whose body names varargs, kwargs or caller may be given them
  bool takes_kwargs = false;
  bool takes_caller = false;
  std::vector<std::pair<Target, ExprPtr>> assignments;
};

}  // namespace cambium::jinja
