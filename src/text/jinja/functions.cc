// The functions that every template sees.
#include <ctime>

#include "base/error.h"
#include "text/jinja/runtime.h"

namespace cambium::jinja {
namespace {

constexpr int64_t kMaxRange = 100'000;

Value range(Runtime& runtime, const Args& args) {
  const Bound b("range", args, {"start", "stop", "step"});
  const bool one = args.positional.size() == 1;
  const int64_t start = one ? 0 : expect_integer(b.required(0), "range");
  const int64_t stop = expect_integer(b.required(one ? 0 : 1), "range");
  const int64_t step = b.integer(2, 1);
  expect(step != 0, "the step of a range is zero");
  std::vector<Value> items;
  for (int64_t i = start; step > 0 ? i < stop : i > stop;) {
    expect(items.size() < kMaxRange, "a range may have {} items", kMaxRange);
    runtime.budget.step();
    items.emplace_back(i);
    if (__builtin_add_overflow(i, step, &i)) {
      break;
    }
  }
  return Value::list(std::move(items));
}

/// dict(mapping or pairs, name=value, ...)
Dict make_dict(Runtime& runtime, const Args& args, const char* name) {
  Dict dict;
  expect(args.positional.size() <= 1, "{} takes at most 1 argument by position, got {}", name,
         args.positional.size());
  for (const Value& from : args.positional) {
    if (from.is_dict()) {
      for (const auto& [key, value] : from.as_dict().items()) {
        // Keys other than text are looked for one by one.
        runtime.budget.step(key.is_string() ? 1 : static_cast<int64_t>(dict.size()) + 1);
        dict.set(key, value);
      }
      continue;
    }
    for (const Value& pair : runtime.iterate(from)) {
      std::vector<Value> both = runtime.iterate(pair);
      expect(both.size() == 2, "{} expected pairs, got {} values", name, both.size());
      runtime.budget.step(both[0].is_string() ? 1 : static_cast<int64_t>(dict.size()) + 1);
      dict.set(std::move(both[0]), std::move(both[1]));
    }
  }
  for (const auto& [key, value] : args.named) {
    dict.set(Value(key), value);
  }
  return dict;
}

Value dict(Runtime& runtime, const Args& args) {
  return Value::dict(make_dict(runtime, args, "dict"));
}

Value make_namespace(Runtime& runtime, const Args& args) {
  return runtime.make_namespace(make_dict(runtime, args, "namespace"));
}

Value raise_exception(Runtime& runtime, const Args& args) {
  const Bound b("raise_exception", args, {"message"});
  fail("{}", runtime.str(b[0]));
}

Value strftime_now(Runtime& runtime, const Args& args) {
  const Bound b("strftime_now", args, {"format"});
  const std::string format = b.string(0, "%Y-%m-%d");
  const std::time_t now = std::time(nullptr);
  std::tm local{};
  localtime_r(&now, &local);
  char buffer[512];
  const size_t length = std::strftime(buffer, sizeof(buffer), format.c_str(), &local);
  expect(length > 0 || format.empty(), "strftime_now cannot write {:?}", format);
  return runtime.text(std::string(buffer, length));
}

/// joiner(", ")() is empty the first time and the text from then on.
Value joiner(Runtime&, const Args& args) {
  const Bound b("joiner", args, {"sep"});
  auto made = std::make_shared<Callable>();
  made->name = "joiner";
  made->call = [separator = b.has(0) ? b[0] : Value(", "), used = std::make_shared<bool>(false)](
                   Runtime&, const Args&) {
    return std::exchange(*used, true) ? separator : Value("");
  };
  return Value::Data(std::shared_ptr<const Callable>(std::move(made)));
}

Value function(const char* name, Value (*body)(Runtime&, const Args&)) {
  auto made = std::make_shared<Callable>();
  made->name = name;
  made->call = body;
  return Value::Data(std::shared_ptr<const Callable>(std::move(made)));
}

}  // namespace

const std::vector<std::pair<std::string, Value>>& global_functions() {
  static const std::vector<std::pair<std::string, Value>> functions = {
      {"range", function("range", range)},
      {"dict", function("dict", dict)},
      {"namespace", function("namespace", make_namespace)},
      {"raise_exception", function("raise_exception", raise_exception)},
      {"strftime_now", function("strftime_now", strftime_now)},
      {"joiner", function("joiner", joiner)},
  };
  return functions;
}

}  // namespace cambium::jinja
