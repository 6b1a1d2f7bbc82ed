// Word problems. A chain of quantities is drawn first (numbers and structure), and put into words
// as it grows: facts that hold from the start, then what happens, then the question. Every quantity
// of the chain is needed for the answer; distractors are the only sentences that are not.
#include <xxhash.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "base/error.h"
#include "base/random.h"
#include "eval/problems/phrases.h"
#include "eval/problems/problems.h"

namespace cambium {
namespace {

constexpr int kMaxGiven = 5;   // keeps the owners of the longest story within the names
constexpr int64_t kLeast = 2;  // no quantity is smaller, so that every noun is a plural

enum class Move {
  kAdd,
  kSubtract,
  kMultiply,
  kDivide,
  kSum,    // with another owner's quantity
  kPacks,  // n bags of m: two steps
  kRest,   // a given number less the quantity
  kSubtractOwner,
};

struct Option {
  Move move;
  double weight;
};

struct Owner {
  std::string name;   // in a sentence: "Tom", "the pen"
  std::string label;  // before a step: "Tom", "pen"
  int64_t value;
};

struct Sides {
  int64_t low;
  int64_t high;
  bool empty() const { return low > high; }
};

class Story {
 public:
  Story(const WordSpec& spec, Rng& rng) : spec_(spec), rng_(rng) { choose_scene(); }

  /// Nothing when the chain ran into numbers from which no step leads on.
  std::optional<Problem> tell();

 private:
  void choose_scene();
  void choose_counted();
  Words words();
  std::string number(int64_t n) const { return std::to_string(n); }

  size_t meet();
  size_t give(int64_t high);
  std::optional<size_t> other_owner(int64_t high);
  Sides range(Move move) const;
  std::vector<int64_t> divisors(int64_t most) const;
  std::optional<Move> choose(const std::vector<Option>& options);

  void compute(const std::string& label, int64_t left, char op, int64_t right, int64_t result,
               const Owner* from = nullptr);
  bool relate();
  bool happen(int steps);
  bool ask(bool with_step);
  void distract();
  void relate_in_vain();

  const WordSpec& spec_;
  Rng& rng_;
  const Scene* scene_ = nullptr;
  Words fixed_;  // the words that stay the same through the story
  std::vector<std::string_view> names_;
  std::vector<Owner> owners_;
  int given_ = 0;    // owners whose quantity the text gives
  size_t last_ = 0;  // the owner whose quantity the chain has reached
  std::vector<std::string> facts_;
  std::vector<std::string> events_;
  std::string question_;
  std::vector<std::string> steps_;
  std::string content_;  // the structure and its numbers
  int64_t result_ = 0;
};

void Story::choose_scene() {
  const double which = rng_.uniform();
  if (which < 0.4) {
    scene_ = &having_scene();
    fixed_.i = rng_.pick(things());
  } else if (which < 0.6) {
    scene_ = &doing_scene();
    const Activity& activity = rng_.pick(activities());
    fixed_.v = activity.verb;
    fixed_.w = activity.base;
    fixed_.i = rng_.pick(activity.things);
  } else if (which < 0.85) {
    scene_ = &price_scene();
  } else {
    scene_ = &time_scene();
    const Activity& pastime = rng_.pick(pastimes());
    fixed_.v = pastime.verb;
    fixed_.w = pastime.base;
  }
  const Sentences names = scene_->goods ? goods() : people();
  names_.assign(names.begin(), names.end());
  rng_.shuffle(std::span(names_));
}

/// A new owner, whose quantity is not known yet.
size_t Story::meet() {
  CAMBIUM_CHECK(!names_.empty(), "a story of more than {} owners", owners_.size());
  const std::string name(names_.back());
  names_.pop_back();
  owners_.push_back({scene_->goods ? "the " + name : name, name, 0});
  return owners_.size() - 1;
}

/// The words that every sentence may use: who the chain has reached, and a bystander.
Words Story::words() {
  Words words = fixed_;
  words.a = owners_[last_].name;
  words.x = scene_->goods ? std::string(rng_.pick(people())) : std::string(names_.front());
  words.t = events_.empty() ? "" : " now";
  return words;
}

/// A new owner whose quantity the text gives.
size_t Story::give(int64_t high) {
  const size_t owner = meet();
  owners_[owner].value = rng_.between(kLeast, std::min<int64_t>(high, spec_.max_number));
  Words with = words();
  with.a = owners_[owner].name;
  with.n = number(owners_[owner].value);
  facts_.push_back(say(rng_.pick(scene_->given), with));
  content_ += "g" + with.n;
  ++given_;
  return owner;
}

/// An owner other than the last with a quantity in kLeast..high: an earlier one, or a new one.
std::optional<size_t> Story::other_owner(int64_t high) {
  std::vector<size_t> earlier;
  for (size_t k = 0; k < owners_.size(); ++k) {
    if (k != last_ && owners_[k].value <= high) {
      earlier.push_back(k);
    }
  }
  if (given_ < kMaxGiven && (earlier.empty() || rng_.chance(0.3))) {
    return give(high);
  }
  if (earlier.empty()) {
    return std::nullopt;
  }
  return rng_.pick(earlier);
}

/// The operands that take the last quantity to another one in range.
Sides Story::range(Move move) const {
  const int64_t value = owners_[last_].value;
  switch (move) {
    case Move::kAdd:
      return {kLeast, std::min<int64_t>(spec_.max_number, spec_.max_value - value)};
    case Move::kSubtract:
      return {kLeast, std::min<int64_t>(spec_.max_number, value - kLeast)};
    case Move::kMultiply:
      return {2, std::min<int64_t>(spec_.max_factor, spec_.max_value / value)};
    case Move::kRest:
      return {value + kLeast, std::min<int64_t>(spec_.max_value, value + spec_.max_number)};
    case Move::kSum:
      return {kLeast, spec_.max_value - value};
    case Move::kSubtractOwner:
      return {kLeast, value - kLeast};
    case Move::kPacks:
      return {4, std::min<int64_t>(spec_.max_number, spec_.max_value - value)};
    case Move::kDivide:
      return {2, static_cast<int64_t>(divisors(4).size()) + 1};
  }
  CAMBIUM_CHECK(false, "no such move");
}

std::vector<int64_t> Story::divisors(int64_t most) const {
  std::vector<int64_t> out;
  for (int64_t d = 2; d <= most; ++d) {
    if (owners_[last_].value % d == 0 && owners_[last_].value / d >= kLeast) {
      out.push_back(d);
    }
  }
  return out;
}

std::optional<Move> Story::choose(const std::vector<Option>& options) {
  double total = 0;
  for (const Option& option : options) {
    total += range(option.move).empty() ? 0.0 : option.weight;
  }
  double at = rng_.uniform() * total;
  for (const Option& option : options) {
    if (option.weight > 0 && !range(option.move).empty()) {
      at -= option.weight;
      if (at < 0) {
        return option.move;
      }
    }
  }
  return std::nullopt;
}

/// One worked step; `from` is whose quantity the right operand is, where it is an owner's.
void Story::compute(const std::string& label, int64_t left, char op, int64_t right, int64_t result,
                    const Owner* from) {
  const auto named = [&](const std::string& name, int64_t n) {
    return " " + name + " " + number(n);
  };
  const bool name_from = from != nullptr && spec_.name_operands;
  steps_.push_back(label + ": " + number(left) + op +
                   (name_from ? named(from->label, right) : number(right)) + "=" +
                   (spec_.name_results ? named(label, result) : number(result)));
  content_ += op + number(right) + ";";
  result_ = result;
}

/// A fact: one more owner, compared with the last one.
bool Story::relate() {
  const std::optional<Move> move =
      choose({{Move::kAdd, 3},
              {Move::kSubtract, 3},
              {Move::kMultiply, 2},
              {Move::kDivide, 2},
              {Move::kSum, (owners_.size() > 1 ? 1.5 : 0.8) * spec_.lookback}});
  if (!move) {
    return false;
  }
  const int64_t value = owners_[last_].value;
  const Sides sides = range(*move);
  std::optional<size_t> third;
  if (*move == Move::kSum) {
    third = other_owner(sides.high);
    if (!third) {
      return false;
    }
  }
  const size_t owner = meet();
  const std::string label = owners_[owner].label;
  Words with = words();
  with.a = owners_[owner].name;
  with.b = owners_[last_].name;
  content_ += "r";
  if (third) {
    with.c = owners_[*third].name;
    content_ += "o" + number(static_cast<int64_t>(*third));
    compute(label, value, '+', owners_[*third].value, value + owners_[*third].value,
            &owners_[*third]);
    // The step begins with the result before it; where there is none, with who is named first.
    if (steps_.size() > 1 && rng_.chance(0.5)) {
      std::swap(with.b, with.c);
    }
    facts_.push_back(say(rng_.pick(scene_->sum), with));
  } else if (*move == Move::kDivide) {
    const int64_t n = rng_.pick(divisors(4));
    with.p = n == 3 ? "a third" : "a quarter";
    compute(label, value, '/', n, value / n);
    facts_.push_back(say(rng_.pick(n == 2 ? scene_->half : scene_->part), with));
  } else {
    const int64_t n = rng_.between(sides.low, sides.high);
    with.n = number(n);
    if (*move == Move::kAdd) {
      compute(label, value, '+', n, value + n);
      facts_.push_back(say(rng_.pick(scene_->more), with));
    } else if (*move == Move::kSubtract) {
      compute(label, value, '-', n, value - n);
      facts_.push_back(say(rng_.pick(scene_->fewer), with));
    } else {
      compute(label, value, '*', n, value * n);
      facts_.push_back(say(rng_.pick(n == 2 ? scene_->twice : scene_->times), with));
    }
  }
  owners_[owner].value = result_;
  last_ = owner;
  return true;
}

/// Something happens to the last quantity, in at most so many steps.
bool Story::happen(int steps) {
  const auto weight = [](Sentences sentences, double w) { return sentences.empty() ? 0.0 : w; };
  const std::optional<Move> move =
      choose({{Move::kAdd, weight(scene_->gain, 3)},
              {Move::kSubtract, weight(scene_->loss, 3)},
              {Move::kDivide, owners_[last_].value % 2 == 0 ? weight(scene_->halve, 1.5) : 0.0},
              {Move::kPacks, steps >= 2 ? weight(scene_->packs, 2) : 0.0}});
  if (!move) {
    return false;
  }
  Owner& owner = owners_[last_];
  const Sides sides = range(*move);
  Words with = words();
  content_ += "e";
  Sentences sentences = scene_->gain;
  if (*move == Move::kPacks) {
    const int64_t n = rng_.between(2, std::min<int64_t>(spec_.max_factor, sides.high / 2));
    const int64_t m = rng_.between(2, sides.high / n);
    with.n = number(n);
    with.m = number(m);
    content_ += with.n;
    compute("New", n, '*', m, n * m);
    compute(owner.label, owner.value, '+', n * m, owner.value + n * m);
    sentences = scene_->packs;
  } else if (*move == Move::kDivide) {
    compute(owner.label, owner.value, '/', 2, owner.value / 2);
    sentences = scene_->halve;
  } else {
    const int64_t n = rng_.between(sides.low, sides.high);
    with.n = number(n);
    if (*move == Move::kAdd) {
      compute(owner.label, owner.value, '+', n, owner.value + n);
    } else {
      compute(owner.label, owner.value, '-', n, owner.value - n);
      sentences = scene_->loss;
    }
  }
  events_.push_back(say(rng_.pick(sentences), with));
  owner.value = result_;
  return true;
}

/// The question, with one more computation in it or none.
bool Story::ask(bool with_step) {
  Words with = words();
  if (!with_step) {
    question_ = say(rng_.pick(scene_->ask), with);
    return true;
  }
  const std::vector<int64_t> parts = divisors(10);
  const std::optional<Move> move = choose({{Move::kSum, 2 * spec_.lookback},
                                           {Move::kSubtractOwner, 1.5 * spec_.lookback},
                                           {Move::kMultiply, 1.5},
                                           {Move::kRest, scene_->ask_rest.empty() ? 0.0 : 1.5},
                                           {Move::kDivide, 1.5}});
  if (!move) {
    return false;
  }
  const int64_t value = owners_[last_].value;
  const Sides sides = range(*move);
  content_ += "q";
  const auto put = [&](const Question& question, int64_t left, char op, int64_t right,
                       int64_t result, const Owner* from = nullptr) {
    compute(std::string(question.label), left, op, right, result, from);
    question_ = say(question.text, with);
  };
  switch (*move) {
    case Move::kSum:
    case Move::kSubtractOwner: {
      const std::optional<size_t> other = other_owner(sides.high);
      if (!other) {
        return false;
      }
      with.b = owners_[*other].name;
      content_ += "o" + number(static_cast<int64_t>(*other));
      const int64_t right = owners_[*other].value;
      if (*move == Move::kSum) {
        put(rng_.pick(scene_->ask_total), value, '+', right, value + right, &owners_[*other]);
      } else {
        put(rng_.pick(scene_->ask_more), value, '-', right, value - right, &owners_[*other]);
      }
      return true;
    }
    case Move::kMultiply: {
      const int64_t n = rng_.between(sides.low, sides.high);
      with.n = number(n);
      put(rng_.pick(scene_->ask_times), value, '*', n, value * n);
      return true;
    }
    case Move::kDivide: {
      const int64_t n = rng_.pick(parts);
      with.n = number(n);
      put(rng_.pick(scene_->ask_divide), value, '/', n, value / n);
      return true;
    }
    default: {
      const int64_t n = rng_.between(sides.low, sides.high);
      with.n = number(n);
      content_ += "from" + with.n;
      put(rng_.pick(scene_->ask_rest), n, '-', value, n - value);
      return true;
    }
  }
}

/// A sentence that does not matter.
void Story::distract() {
  const bool on_shops = scene_->goods;
  Words with = words();
  with.a = rng_.pick(owners_).name;
  with.n = number(rng_.between(kLeast, spec_.max_number));
  do {
    with.i = rng_.pick(things());
  } while (with.i == fixed_.i);
  const auto at = rng_.below(static_cast<int64_t>(facts_.size()) + 1);
  facts_.insert(facts_.begin() + at,
                say(rng_.pick(on_shops ? distractors_on_shops() : distractors_on_people()), with));
}

/// One more owner of the same kind of quantity, which the question does not need.
void Story::relate_in_vain() {
  const Owner known = rng_.pick(owners_);
  const size_t owner = meet();
  Words with = words();
  with.a = owners_[owner].name;
  with.b = known.name;
  with.n = number(rng_.between(kLeast, spec_.max_number));
  facts_.push_back(say(rng_.pick(rng_.chance(0.5) ? scene_->more : scene_->given), with));
}

std::optional<Problem> Story::tell() {
  const int steps = static_cast<int>(rng_.between(spec_.min_steps, spec_.max_steps));
  const bool step_in_question = rng_.chance(0.5);
  const int before_question = steps - (step_in_question ? 1 : 0);
  int happening =
      rng_.chance(0.5) ? static_cast<int>(rng_.between(0, std::min(4, before_question))) : 0;
  last_ = give(spec_.max_number);
  while (static_cast<int>(steps_.size()) < before_question - happening) {
    if (!relate()) {
      return std::nullopt;
    }
  }
  while (static_cast<int>(steps_.size()) < before_question) {
    if (!happen(before_question - static_cast<int>(steps_.size()))) {
      return std::nullopt;
    }
  }
  if (!ask(step_in_question)) {
    return std::nullopt;
  }
  const int64_t vain = rng_.between(0, spec_.distractors);
  for (int64_t k = 0; k < vain; ++k) {
    if (rng_.chance(spec_.hard)) {
      relate_in_vain();
    } else {
      distract();
    }
  }
  if (rng_.chance(spec_.shuffle)) {
    rng_.shuffle(std::span(facts_));
  }

  Problem problem;
  problem.kind = ProblemKind::kWord;
  for (const std::vector<std::string>* part : {&facts_, &events_}) {
    for (const std::string& sentence : *part) {
      problem.question += sentence + " ";
    }
  }
  problem.question += question_;
  for (const std::string& step : steps_) {
    problem.answer += step + "\n";
  }
  problem.result = number(result_);
  problem.answer += "#### " + problem.result;
  problem.steps = static_cast<int>(steps_.size());
  problem.identity = XXH64(content_.data(), content_.size(), 0);
  return problem;
}

}  // namespace

Problem draw_word_problem(const WordSpec& spec, Rng& rng) {
  for (int attempt = 0; attempt < 1000; ++attempt) {
    if (std::optional<Problem> problem = Story(spec, rng).tell()) {
      return *std::move(problem);
    }
  }
  fail("[problems] found no story of {}..{} steps with results up to {}; widen the range",
       spec.min_steps, spec.max_steps, spec.max_value);
}

}  // namespace cambium
